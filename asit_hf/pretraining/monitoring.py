"""Watching whether a pretraining run learns: collapse of the distillation, and a kNN probe on labelled audio."""

import math
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import TrainerCallback
from transformers.utils import logging

from ..evaluation.embeddings import embed
from ..evaluation.probes import knn_probe
from ..modeling_asit import ASiTModel

logger = logging.get_logger(__name__)

# Logs in a row that have to look collapsed before it is said.
PATIENCE = 3
NEIGHBOURS = 20


def collapsed_losses(logs: dict[str, float], config: Any) -> dict[str, str]:
    """
    Which of the two distillation losses have nothing left to teach, by what a run logged: name to reason.

    The teacher's distributions are useless when they are uniform or the same for every input.
    """
    found: dict[str, str] = {}
    sizes = {"cls": config.num_prototypes, "patch": config.num_patch_prototypes or config.num_prototypes}
    for loss, kind in (("global_loss", "cls"), ("local_loss", "patch")):
        if f"{kind}_entropy" not in logs:
            continue
        entropy, spread = logs[f"{kind}_entropy"], logs[f"{kind}_logit_std"]
        highest = math.log(sizes[kind])
        if spread < 0.02 * logs["teacher_temperature"]:
            found[loss] = f"the teacher says the same of every input (its logits vary by {spread:.2g})"
        elif entropy > 0.999 * highest:
            found[loss] = f"the teacher's distributions are uniform (entropy {entropy:.3f} of {highest:.3f} nats)"
    spread_out = 1 / config.hidden_size**0.5
    if "global_loss" not in found and logs.get("feature_std", spread_out) < 0.01 * spread_out:
        found["global_loss"] = f"the teacher's features of all clips are alike (deviation {logs['feature_std']:.2g})"
    return found


class CollapseCallback(TrainerCallback):
    """Warns once when a distillation loss has collapsed for some logs in a row, and again after it recovered."""

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
    Measures the accuracy of a kNN vote with the teacher's embeddings of labelled clips every so many steps; the next
    log has it as `knn_accuracy`.

    Args:
        trainer ([`ASiTPreTrainer`]): the run.
        train, test ([`~asit_hf.data.LabelledClips`]): the clips that vote, and those that are asked about.
        every_steps (`int`): optimizer steps between two probes.
    """

    def __init__(self, trainer: Any, train: Dataset, test: Dataset, every_steps: int):
        if every_steps < 1:
            raise ValueError(f"expected at least one step between two probes, got {every_steps}")
        self.trainer, self.train, self.test, self.every_steps = trainer, train, test, every_steps

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every_steps == 0:
            encoder = _gather(self.trainer.accelerator.unwrap_model(self.trainer.model).teacher["asit"])
            if state.is_world_process_zero:
                self.trainer.next_log["knn_accuracy"] = self.accuracy(encoder)

    @torch.no_grad()
    def accuracy(self, encoder: ASiTModel) -> float:
        """Share of the test clips whose class the nearest training clips give."""
        with torch.compiler.set_stance("force_eager"):  # compiled layers would be compiled anew for every length
            features = [
                embed(encoder, self.trainer.processing_class, clips, progress=False)
                for clips in (self.train, self.test)
            ]
        labels = [np.asarray(clips.labels) for clips in (self.train, self.test)]
        k = min(NEIGHBOURS, len(labels[0]))
        return knn_probe(features[0], labels[0], features[1], labels[1], k=k)["accuracy"]


def _gather(encoder: ASiTModel) -> ASiTModel:
    """The encoder, or a copy with all its weights if FSDP sharded them: every process has to call this."""
    state = encoder.state_dict()
    if not any(isinstance(value, DTensor) for value in state.values()):
        return encoder
    with torch.device("meta"):  # draws no weights, so the random state stays as it is
        gathered = ASiTModel(encoder.config)
    gathered.load_state_dict({name: value.full_tensor() for name, value in state.items()}, assign=True)
    return gathered.eval()
