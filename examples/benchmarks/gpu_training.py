"""Pretraining for the remaining time, with an export of the encoder every minute; called by `gpu.py`."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu import Run
from gpu_trainer import RATE, build_model, cheap_compiler, local_frames, num_samples, with_fallbacks
from transformers import TrainerCallback, set_seed

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForPreTraining
from asit_hf.configuration_asit import HUB_FILES, SENTENCE_TRANSFORMERS_FILES
from asit_hf.data.packed import INDEX, PackedAudio, PackedCrops, is_packed, write_packed
from asit_hf.data.parcels import decode_parcels
from asit_hf.fbank_asit import num_fbank_frames
from asit_hf.hub.export import to_float16
from asit_hf.loading import load_feature_extractor, read_model_type, resolve_checkpoint
from asit_hf.pretraining.arguments import ASiTPreTrainingArguments
from asit_hf.pretraining.initialization import encoder_from_vit
from asit_hf.pretraining.presets import get_preset
from asit_hf.pretraining.trainer import ASiTPreTrainer
from asit_hf.utils.arguments import parse_arguments
from asit_hf.utils.files import whole_folder

RECIPE = Path(__file__).parents[1] / "recipes" / "pretrain-gpu.yaml"
BATCH, QUICK_BATCH = 256, 4
EXPORT_SECONDS, QUICK_EXPORT_SECONDS = 60.0, 2.0
QUICK_SECONDS = 8.0
MARGIN = 10.0  # seconds for the last export and the worker's reply
SHARD_SIZE = "16MB"  # below 16 MiB
CLIP_SECONDS = 10


@dataclass
class TrainingSettings:
    """Settings with the names and meanings of `run_pretraining.py`."""

    size: str = "small"
    drop_path_rate: float = 0.1
    global_seconds: float = 2.0
    local_seconds: float = 1.0
    num_local_crops: int = 2


def pool(run: Run) -> dict[str, Any]:
    """Prepares the pool: decodes opus parcels, or writes noise for toy sizes if no pool is given."""
    target = run.scratch / "pool"
    if run.train_data is None and not run.quick:
        return {"status": "skipped", "detail": "no --train_data was given"}
    if run.train_data is None:
        write_packed(target, synthetic_clips(12), RATE)
    elif not is_packed(run.train_data):
        if not Path(run.train_data, INDEX).is_file():
            raise FileNotFoundError(f"expected packed audio or opus parcels in {run.train_data}, got neither")
        decode_parcels(run.train_data, target)
    found = PackedAudio.load(pool_folder(run))
    return {"values": {"hours": found.hours, "clips": len(found), "GB": found.num_bytes / 1e9}}


def pool_folder(run: Run) -> Path | None:
    """The folder of packed audio that was given or prepared, if any."""
    folders = [run.scratch / "pool", *([Path(run.train_data)] if run.train_data else [])]
    return next((folder for folder in folders if is_packed(folder)), None)


def train(run: Run, compiled: bool = True) -> dict[str, Any]:
    """Trains until shortly before the end. Updates its row with every export."""
    if pool_folder(run) is None:
        return {"status": "skipped", "detail": 'no pool: see the row "pool"'}
    row, batch, compiled, reasons = with_fallbacks(
        lambda batch, compiled: attempt(run, batch, compiled), QUICK_BATCH if run.quick else BATCH, compiled
    )
    row["values"] |= {"batch": batch, "layers": "compiled" if compiled else "eager"}
    return {**row, "detail": "; ".join(reasons)}


def attempt(run: Run, batch: int, compiled: bool) -> dict[str, Any]:
    """Trains by the recipe with one batch size."""
    options = ["--recipe", str(RECIPE), "--output_dir", str(run.scratch / "training")]
    options += ["--per_device_train_batch_size", str(batch), "--compile_layers", str(compiled)]
    if run.quick:
        options += ["--logging_steps", "1"]
    settings, args = parse_arguments((TrainingSettings, ASiTPreTrainingArguments), options)
    set_seed(args.seed)
    model = initial_model(run, settings, args.preset)
    if model.has_trained_encoder and model.has_new_heads:  # as in pretrain-small.yaml
        args.encoder_learning_rate_scale, args.standardize_head_inputs = 0.1, True
    extractor = initial_extractor(run, model.config.num_mel_bins)
    if run.quick:
        settings.global_seconds = num_samples(model.config.num_frames) / RATE
        settings.local_seconds = num_samples(local_frames(model.config)) / RATE
    crops = PackedCrops(
        pool_folder(run),
        extractor.sampling_rate,
        global_seconds=settings.global_seconds,
        local_seconds=settings.local_seconds,
        num_local_crops=settings.num_local_crops,
        roll_probability=get_preset(args.preset).roll_probability,
        seed=args.seed,
    )
    export = ExportTeacher(run, QUICK_EXPORT_SECONDS if run.quick else EXPORT_SECONDS)
    seconds = run.end - time.monotonic() - MARGIN
    args.max_minutes = (min(seconds, QUICK_SECONDS) if run.quick else seconds) / 60
    with cheap_compiler():
        trainer = ASiTPreTrainer(
            model=model, args=args, train_dataset=crops, processing_class=extractor, callbacks=[export]
        )
        export.trainer = trainer
        trainer.train()
    export.export()
    return export.row()


def initial_model(run: Run, settings: TrainingSettings, preset: str) -> ASiTForPreTraining:
    """A randomly initialized model of the recipe's size, or one with the weights of `--init`."""
    frames = num_fbank_frames(round(settings.global_seconds * RATE), RATE)
    fields = {**get_preset(preset).config, "drop_path_rate": settings.drop_path_rate}
    if run.init is None:
        return build_model(settings.size, preset, run.quick, **({} if run.quick else {"num_frames": whole(frames)}))
    if read_model_type(run.init) == ASiTConfig.model_type:
        return ASiTForPreTraining.from_pretrained(resolve_checkpoint(run.init), dtype=torch.float32, **fields)
    return ASiTForPreTraining.from_encoder(encoder_from_vit(run.init, num_frames=whole(frames), **fields))


def whole(frames: int, patch_size: int = 16) -> int:
    """Frames, rounded down to whole patches."""
    return frames // patch_size * patch_size


def initial_extractor(run: Run, num_mel_bins: int) -> ASiTFeatureExtractor:
    if run.init is not None and read_model_type(run.init) == ASiTConfig.model_type:
        return load_feature_extractor(run.init)
    return ASiTFeatureExtractor(num_mel_bins=num_mel_bins)


class ExportTeacher(TrainerCallback):
    """Exports the teacher's encoder every `every_seconds` seconds, and collects the log."""

    def __init__(self, run: Run, every_seconds: float):
        self.run, self.every_seconds = run, every_seconds
        self.trainer: ASiTPreTrainer | None = None
        self.log: list[dict[str, float]] = []
        self.num_exports, self.start, self.last = 0, 0.0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = self.last = time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.log.append({"step": state.global_step, "seconds": time.monotonic() - self.start, **(logs or {})})

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() - self.last >= self.every_seconds:
            self.export()
            self.last = time.monotonic()
            self.run.update(self.row())

    def export(self) -> None:
        export_teacher(self.trainer.model, self.trainer.processing_class, self.run.output_dir / "encoder")
        self.num_exports += 1

    def row(self) -> dict[str, Any]:
        trainer, seconds = self.trainer, time.monotonic() - self.start
        losses = [row["loss"] for row in self.log if "loss" in row]
        steps = trainer.state.global_step
        values = {
            "steps": steps,
            "minutes": seconds / 60,
            "ms per step": 1000 * seconds / max(steps, 1),
            "clips/s": steps * trainer.args.global_batch_size / seconds,
            "exports": self.num_exports,
            "skipped steps": trainer.num_skipped_steps,
        }
        if losses:
            values |= {"first loss": losses[0], "last loss": losses[-1]}
        return {"values": {**values, "log": self.log}}


def export_teacher(model: ASiTForPreTraining, extractor: ASiTFeatureExtractor, folder: Path) -> None:
    """
    Replaces `folder` atomically by the teacher's encoder and its feature extractor: float16 weights, which load as
    float32, in files below 16 MiB, without those that `python -m asit_hf.hub upload` adds.
    """
    encoder = model.teacher["asit"]
    halves = {name: tensor.cpu() for name, tensor in to_float16(encoder.state_dict()).items()}
    with whole_folder(folder) as scratch:
        encoder.save_pretrained(scratch, state_dict=halves, max_shard_size=SHARD_SIZE)
        extractor.save_pretrained(scratch)
        for name in (*HUB_FILES, *SENTENCE_TRANSFORMERS_FILES):
            (scratch / name).unlink(missing_ok=True)


def synthetic_clips(count: int) -> list[tuple[str, None, np.ndarray]]:
    """Clips as (name, `None`, 10 s of int16 noise), the form that `write_packed` takes."""
    generator = np.random.default_rng(0)
    size = CLIP_SECONDS * RATE
    return [(f"noise-{index}", None, generator.integers(-3000, 3000, size, np.int16)) for index in range(count)]
