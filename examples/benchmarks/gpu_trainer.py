"""Models, synthetic data and trainers for `gpu_checks.py`, `gpu_figures.py` and `gpu_training.py`."""

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import repeat
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset
from training_step import TOY
from transformers import PrinterCallback, TrainerCallback

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForPreTraining
from asit_hf.configuration_asit import SIZES
from asit_hf.data import PretrainingCrops
from asit_hf.fbank_asit import window_and_hop
from asit_hf.pretraining.arguments import ASiTPreTrainingArguments
from asit_hf.pretraining.presets import get_preset
from asit_hf.pretraining.trainer import ASiTPreTrainer

RATE = 16000


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def cheap_compiler() -> Iterator[None]:
    """On a CPU, traces graphs without compiling them, which would take a minute each."""
    original = torch.compile
    if device().type == "cpu":
        torch.compile = partial(original, backend="aot_eager")
    try:
        yield
    finally:
        torch.compile = original


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def build_model(
    size: str, preset: str, quick: bool = False, drop_path_rate: float = 0.1, **more: Any
) -> ASiTForPreTraining:
    """A model of a named size (a toy with `quick`), always with the same weights, on the CPU."""
    fields = {**get_preset(preset).config, "drop_path_rate": drop_path_rate, **more}
    fields |= TOY if quick else SIZES[size]
    return copy.deepcopy(_build_model(tuple(sorted(fields.items()))))


@lru_cache(maxsize=1)
def _build_model(fields: tuple[tuple[str, Any], ...]) -> ASiTForPreTraining:
    """Cached, because initializing a base model takes longer than a training step."""
    torch.manual_seed(0)
    return ASiTForPreTraining(ASiTConfig(**dict(fields)))


def num_samples(frames: int) -> int:
    """Samples that give this number of log-mel frames."""
    window, hop = window_and_hop(RATE)
    return window + hop * (frames - 1)


def local_frames(config: ASiTConfig) -> int:
    """Frames of a local crop: a third of a global crop's, rounded down to whole patches."""
    return config.num_frames // 3 // config.patch_size * config.patch_size


def build_batch(
    config: ASiTConfig, preset: str, size: int, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """
    A batch of noise in the form of [`~asit_hf.data.collate_crops`] for `size` clips, pinned if there is a GPU; `dtype`
    is float32, or int16 for PCM.
    """
    generator = torch.Generator().manual_seed(0)
    crops = {"global": (2, config.num_frames), "local": (get_preset(preset).num_local_crops, 0)}
    batch = {"sample_keys": torch.arange(size)}
    for kind, (count, frames) in crops.items():
        if count:
            samples = num_samples(frames or local_frames(config))
            noise = torch.rand(size, count, samples, generator=generator) - 0.5
            batch[f"{kind}_waveforms"] = noise if dtype == torch.float32 else (noise * 2**15).to(dtype)
            batch[f"{kind}_lengths"] = torch.full((size, count), samples)
    return {name: value.pin_memory() if torch.cuda.is_available() else value for name, value in batch.items()}


class SameBatch(IterableDataset):
    """Repeats one batch forever."""

    def __init__(self, batch: dict[str, torch.Tensor]):
        self.batch = batch

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return repeat(self.batch)


def build_clips(config: ASiTConfig, preset: str, count: int = 16) -> PretrainingCrops:
    """Crops of noise from arrays in memory, cut as those of files are."""
    generator = torch.Generator().manual_seed(0)
    seconds = num_samples(config.num_frames) / RATE
    clips = torch.rand(count, round(1.3 * seconds * RATE), generator=generator).numpy() - 0.5
    return PretrainingCrops(
        [{"array": clip, "sampling_rate": RATE} for clip in clips],
        RATE,
        global_seconds=seconds,
        local_seconds=num_samples(local_frames(config)) / RATE,
        num_local_crops=get_preset(preset).num_local_crops,
    )


class RecordingTrainer(ASiTPreTrainer):
    """Records the unrounded loss of every step."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.losses: list[torch.Tensor] = []
        self.remove_callback(PrinterCallback)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.detach())
        return loss


def build_trainer(
    model: ASiTForPreTraining,
    preset: str,
    dataset: Dataset,
    folder: str | Path,
    compiled: bool = False,
    callbacks: list[TrainerCallback] | None = None,
    **options: Any,
) -> RecordingTrainer:
    """A trainer that by default neither logs nor saves; `options` are its arguments."""
    ready = isinstance(dataset, SameBatch)
    arguments = {
        "preset": preset,
        "per_device_train_batch_size": 1 if ready else 4,  # one item is a batch
        "steps_per_epoch": 1000,
        "max_steps": 3,
        "learning_rate": 1e-4,
        "warmup_epochs": 0,
        "freeze_last_layer_epochs": 0,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "plot_steps": 0,
        "disable_tqdm": True,
        "use_cpu": device().type == "cpu",
        "dataloader_pin_memory": device().type == "cuda",
        "compile_layers": compiled,
        **options,
    }
    return RecordingTrainer(
        model=model,
        args=ASiTPreTrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=dataset,
        processing_class=ASiTFeatureExtractor(num_mel_bins=model.config.num_mel_bins),
        data_collator=itemgetter(0) if ready else None,
        callbacks=callbacks,
    )


def with_fallbacks(
    measure: Callable[[int, bool], dict[str, Any]], batch: int, compiled: bool
) -> tuple[dict[str, Any], int, bool, list[str]]:
    """
    Calls `measure(batch, compiled)`, with half the batch after running out of memory and with eager layers after
    compiled ones fail. Returns its result, the final batch and `compiled`, and the reasons for changes.
    """
    reasons: list[str] = []
    while True:
        try:
            return measure(batch, compiled), batch, compiled, reasons
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            reasons.append(f"out of memory at batch {batch}")
            batch //= 2
        except Exception as error:
            if not compiled or "CUDA error" in str(error):  # only a new process recovers from it
                raise
            reasons.append(f"compiled layers failed: {type(error).__name__}: {str(error)[:300]}")
            compiled = False
        gc.collect()  # tensors that the error's frames referenced
        torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
