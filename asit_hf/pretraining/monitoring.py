"""Monitors a pretraining run: collapse of the distillation, kNN probe, plots, unreadable files."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.utils import logging

from ..evaluation.embeddings import embed
from ..evaluation.probes import knn_probe
from ..modeling_asit import ASiTModel
from .fsdp import unsharded

logger = logging.get_logger(__name__)

# Consecutive logs that must look collapsed before the warning.
PATIENCE = 3
NEIGHBORS = 20
CURVES = ("loss", "global_loss", "local_loss", "reconstruction_loss", "cls_entropy", "patch_entropy", "feature_std")
CURVES += ("learning_rate", "grad_norm")


def collapsed_losses(logs: dict[str, float], config: Any) -> dict[str, str]:
    """
    The distillation losses that have collapsed according to the logged values, mapped to the reason: the teacher's
    distributions carry no information if they are uniform or the same for every input.
    """
    found: dict[str, str] = {}
    sizes = {"cls": config.num_prototypes, "patch": config.num_patch_prototypes or config.num_prototypes}
    for loss, kind in (("global_loss", "cls"), ("local_loss", "patch")):
        entropy, deviation = logs.get(f"{kind}_entropy", 0.0), logs.get(f"{kind}_logit_std", math.inf)
        highest = math.log(sizes[kind])
        if deviation < 0.02 * logs["teacher_temperature"]:
            found[loss] = f"the teacher's distribution is the same for every input (logit std {deviation:.2g})"
        elif entropy > 0.999 * highest:
            found[loss] = f"the teacher's distributions are uniform (entropy {entropy:.3f} of {highest:.3f} nats)"
    expected = 1 / config.hidden_size**0.5  # std of each dimension of unit vectors in all directions
    if "global_loss" not in found and logs.get("feature_std", expected) < 0.01 * expected:
        found["global_loss"] = f"the teacher's features are the same for all clips (std {logs['feature_std']:.2g})"
    return found


class CollapseCallback(TrainerCallback):
    """Warns when a distillation loss looks collapsed in `PATIENCE` consecutive logs; once, until it recovers."""

    def __init__(self):
        self._logs_in_a_row: dict[str, int] = {}

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if not state.is_world_process_zero or "teacher_temperature" not in (logs or {}):
            return
        found = collapsed_losses(logs, model.config)
        self._logs_in_a_row = {loss: self._logs_in_a_row.get(loss, 0) + 1 for loss in found}
        for loss, count in self._logs_in_a_row.items():
            if count == PATIENCE:
                logger.warning(
                    f"{loss} has collapsed at step {state.global_step}: {found[loss]}. A lower teacher temperature or "
                    "learning rate, a slower teacher or larger batches may help."
                )


class KnnProbeCallback(TrainerCallback):
    """
    Logs the kNN accuracy of the teacher's embeddings on labelled clips, as `knn_accuracy`.

    Args:
        trainer ([`ASiTPreTrainer`]): the run.
        train, test ([`~asit_hf.data.LabelledClips`]): the neighbors, and the clips to classify.
        every_steps (`int`): optimizer steps between two probes.
    """

    def __init__(self, trainer: Any, train: Dataset, test: Dataset, every_steps: int):
        if every_steps < 1:
            raise ValueError(f"expected at least one step between two probes, got {every_steps}")
        self.trainer, self.train, self.test, self.every_steps = trainer, train, test, every_steps

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every_steps == 0:
            encoder = unsharded(self.trainer.accelerator.unwrap_model(self.trainer.model).teacher["asit"])
            if state.is_world_process_zero:
                self.trainer.next_log["knn_accuracy"] = self.accuracy(encoder)

    @torch.no_grad()
    def accuracy(self, encoder: ASiTModel) -> float:
        """Share of the test clips whose nearest training clips vote for their class."""
        with torch.compiler.set_stance("force_eager"):  # compiled layers would be recompiled for every length
            features = [
                embed(encoder, self.trainer.processing_class, clips, progress=False)
                for clips in (self.train, self.test)
            ]
        labels = [np.asarray(clips.labels) for clips in (self.train, self.test)]
        k = min(NEIGHBORS, len(labels[0]))
        return knn_probe((features[0], labels[0]), (features[1], labels[1]), k=k)["accuracy"]


class PlotCallback(TrainerCallback):
    """
    Every `plot_steps` steps and at the end: plots the reconstruction of the batch's first clip and the curves so far,
    as PNG in `output_dir/pictures` and, if the run reports to TensorBoard, there as well.
    """

    def __init__(self, trainer: Any):
        from .. import plotting  # needs matplotlib, which training without plots does not

        self.trainer, self.plotting = trainer, plotting

    def on_step_end(self, args, state, control, **kwargs):
        # at the last step, not in on_train_end: TensorBoard's writer is closed by then
        at_step = state.global_step % args.plot_steps == 0 or state.global_step == state.max_steps
        if not at_step or not state.is_world_process_zero:
            return
        if self.trainer.last_example is not None:
            figure = self.plotting.plot_reconstruction(**self.trainer.last_example)
            self._save(figure, args, state, f"reconstruction-{state.global_step}")
        if any("loss" in row for row in state.log_history):
            self._save(self.plotting.plot_curves(state.log_history, CURVES), args, state, "curves")

    def _save(self, figure: Any, args, state, name: str) -> None:
        folder = Path(args.output_dir) / "pictures"
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=110)
        for callback in self.trainer.callback_handler.callbacks:
            writer = getattr(callback, "tb_writer", None)
            if isinstance(callback, TensorBoardCallback) and writer is not None:
                writer.add_figure(name.split("-")[0], figure, state.global_step)


class BadFilesReport:
    """Files that could not be read, each reported once: as a warning and as a line of JSON in `path`."""

    def __init__(self, path: Path):
        self.path = path
        self.names: set[str] = set()

    def start(self, resumed: bool) -> None:
        """Continues the report of a resumed run; a new run starts a new one."""
        if not resumed:
            self.path.unlink(missing_ok=True)
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        self.names = {json.loads(line)["file"] for line in lines}

    def add(self, bad_files: list[tuple[str, str]]) -> None:
        """Takes pairs of file name and reason."""
        for name, reason in bad_files:
            if name in self.names:
                continue
            self.names.add(name)
            logger.warning(f"skipped {name}: {reason}")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps({"file": name, "reason": reason}) + "\n")
