"""Speed and memory on a GPU, one function per measurement; called by `gpu.py`. Toy sizes with `--quick`."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu import Run
from gpu_trainer import (
    RATE,
    SameBatch,
    build_batch,
    build_model,
    build_trainer,
    cheap_compiler,
    device,
    synchronize,
    with_fallbacks,
)
from gpu_training import CLIP_SECONDS, pool_folder, synthetic_clips
from official_loop import OfficialLoop
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from transformers import ASTConfig, ASTForAudioClassification, TrainerCallback

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForAudioClassification, ASiTForPreTraining
from asit_hf.configuration_asit import SIZES
from asit_hf.data import PretrainingCrops
from asit_hf.data.collators import collate_crops
from asit_hf.data.packed import PackedAudio, PackedCrops
from asit_hf.fbank_asit import num_fbank_frames
from asit_hf.pretraining.masking import corrupt
from asit_hf.pretraining.presets import get_preset

BATCH, QUICK_BATCH = 128, 4
WARM_UP = 5
# Timed steps of ours and of the plain loop, which is several times slower.
STEPS, PLAIN_STEPS = 15, 8
PRODUCT = 8192
LABELS = 527
TOY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def product(run: Run) -> dict[str, Any]:
    """Rate of a square bf16 matrix product, the reference for the rate of a training step."""
    size = 256 if run.quick else PRODUCT
    left, right = torch.randn(2, size, size, device=device(), dtype=torch.bfloat16)
    seconds = seconds_of(lambda: left @ right, 20)
    return {"values": {"TFLOP/s": 2 * size**3 / seconds / 1e12, "ms": 1000 * seconds}}


def ours(run: Run, size: str, preset: str, compiled: bool = True) -> dict[str, Any]:
    """Steps of `ASiTPreTrainer.train` in bf16, starting from int16 waveforms on the host."""

    def measure(batch: int, compiled: bool) -> dict[str, Any]:
        model = build_model(size, preset, run.quick)
        watch = Stopwatch(*((1, 2) if run.quick else (WARM_UP, STEPS)))
        dataset = SameBatch(build_batch(model.config, preset, batch, torch.int16))
        with tempfile.TemporaryDirectory() as folder, cheap_compiler():
            options = {"bf16": True, "max_steps": watch.last, "callbacks": [watch]}
            trainer = build_trainer(model, preset, dataset, folder, compiled, **options)
            trainer.train()
        if not torch.stack(trainer.losses).isfinite().all():
            raise FloatingPointError(f"expected finite losses, got {torch.stack(trainer.losses).tolist()}")
        inputs = trainer._prepare_inputs(dict(dataset.batch))
        preparing = seconds_of(lambda: trainer.prepare_views(dict(inputs)), 2 if run.quick else 10)
        return {
            **watch.values(batch),
            "ms of log-mel and GMML": 1000 * preparing,
            "clips/s of log-mel and GMML": batch / preparing,
        }

    values, batch, compiled, reasons = with_fallbacks(measure, QUICK_BATCH if run.quick else BATCH, compiled)
    values |= {"batch": batch, "layers": "compiled" if compiled else "eager"}
    values["GFLOP per clip"] = flops_of_a_clip(build_model(size, preset, run.quick), preset) / 1e9
    return {"values": values, "detail": "; ".join(reasons)}


def plain(run: Run, size: str, preset: str, bf16: bool, attention: str) -> dict[str, Any]:
    """Steps of the authors' loop on the same noise, with precomputed log-mel and masks (the authors use workers)."""

    def measure(batch: int, compiled: bool) -> dict[str, Any]:
        model = build_model(size, preset, run.quick).to(device())
        loop = OfficialLoop(model, get_preset(preset).gmml, bf16=bf16, attention=attention)
        clean, local, corruption = ready_views(model, preset, batch)
        del model
        watch = Stopwatch(*((1, 2) if run.quick else (2, PLAIN_STEPS)))
        for step in range(1, watch.last + 1):
            loop.step(clean, local, corruption=corruption)
            loop.optimizer.zero_grad()  # as ours does between steps
            watch.tick(step)
        return watch.values(batch)

    values, batch, _, reasons = with_fallbacks(measure, QUICK_BATCH if run.quick else BATCH, compiled=False)
    values |= {"batch": batch, "TF32": torch.backends.cuda.matmul.allow_tf32}
    return {"values": values, "detail": "; ".join(reasons)}


def inference(run: Run, size: str) -> dict[str, Any]:
    """Classification of 10 s spectrograms in bf16, by our model and transformers' AST, both with random weights."""
    sizes = TOY if run.quick else SIZES[size]
    batch, frames = (2, 100) if run.quick else (BATCH, num_fbank_frames(CLIP_SECONDS * RATE, RATE))
    ast_frames = frames if run.quick else 1024  # it pads every clip to this length
    models = {
        "ours": (ASiTForAudioClassification(ASiTConfig(**sizes, num_labels=LABELS)), frames),
        "AST": (ASTForAudioClassification(ASTConfig(**sizes, num_labels=LABELS, max_length=ast_frames)), ast_frames),
    }
    values: dict[str, Any] = {"batch": batch}
    for name, (model, length) in models.items():
        model.to(device(), torch.bfloat16).eval()
        inputs = torch.randn(batch, length, 128, device=device(), dtype=torch.bfloat16)
        with torch.inference_mode():
            seconds = seconds_of(lambda model=model, inputs=inputs: model(inputs), 2 if run.quick else 10)
        values[f"{name} clips/s"] = batch / seconds
    values["ours / AST"] = values["ours clips/s"] / values["AST clips/s"]
    return {"values": values, "detail": "AST takes overlapping patches of 10.24 s"}


def corpus(run: Run, size: str) -> dict[str, Any]:
    """`predict` in bf16 on files of 5 s, and the share of its time that the bare forward passes need."""
    try:
        import corpus as benchmark
    except ImportError as error:
        return {"status": "skipped", "detail": str(error)}
    unlike, clips = (4, 8) if run.quick else (64, 8192)
    config = ASiTConfig(**(TOY if run.quick else SIZES[size]), num_labels=benchmark.LABELS)
    model = ASiTForAudioClassification(config).to(device(), torch.bfloat16).eval()
    job = benchmark.build_jobs(model, ASiTFeatureExtractor())["predict"]
    with tempfile.TemporaryDirectory() as name:
        folder = benchmark.write_audio(Path(name) / "clips", unlike, benchmark.CLIP_SECONDS)
        files = sorted(folder.iterdir())
        for index in range(unlike, clips):
            os.link(files[index % unlike], folder / f"{index:05d}{files[index % unlike].suffix}")
        with benchmark.recorded(model.asit) as calls:
            benchmark.run(job, folder)
        seconds = {}
        for side, call in {
            "bare": lambda: benchmark.repeat(model.asit, calls),
            "engine": lambda: benchmark.run(job, folder),
        }.items():
            start = time.perf_counter()
            call()
            seconds[side] = time.perf_counter() - start
    share = seconds["bare"] / seconds["engine"]
    return {"values": {"clips/s": clips / seconds["engine"], "share of the forward passes": share}}


def packed_pool(run: Run) -> dict[str, Any]:
    """Crops cut on the device from a pool in device memory: two of 6 s and four of 2 s per clip."""
    folder = pool_folder(run)
    if folder is None:
        return {"status": "skipped", "detail": 'no pool: see the row "pool"'}
    start = time.perf_counter()
    pool = PackedAudio.load(folder, device())
    synchronize()
    loading = time.perf_counter() - start
    crops = PackedCrops(pool, pool.sampling_rate)
    batch = QUICK_BATCH if run.quick else BATCH
    indices = torch.arange(batch) % len(crops)
    seconds = seconds_of(lambda: crops.gather(indices, indices), 2 if run.quick else 20)
    return {"values": {"clips/s": batch / seconds, "hours": pool.hours, "seconds to load": loading}}


def flac_files(run: Run) -> dict[str, Any]:
    """Crops decoded by loader workers from flac files of noise."""
    try:
        import soundfile
    except ImportError as error:
        return {"status": "skipped", "detail": str(error)}
    workers = 1 if run.quick else max(1, (os.cpu_count() or 2) - 2)
    count, batch = (8, QUICK_BATCH) if run.quick else (512, 64)
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder, f"{name}.flac")) for name, _, _ in synthetic_clips(count)]
        for path, (_, _, samples) in zip(paths, synthetic_clips(count)):
            soundfile.write(path, samples, RATE)
        dataset = PretrainingCrops(paths, RATE)
        loader = DataLoader(dataset, batch, num_workers=workers, collate_fn=collate_crops, persistent_workers=True)
        for _ in loader:  # the first epoch starts the workers
            pass
        start = time.perf_counter()
        clips = sum(len(one["indices"]) for one in loader)
        seconds = time.perf_counter() - start
    return {"values": {"clips/s": clips / seconds, "workers": workers}}


def ready_views(
    model: ASiTForPreTraining, preset: str, batch: int
) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, torch.Tensor]]:
    """Clean spectrograms, local ones, and corrupted ones with their masks, on the device."""
    inputs = {name: value.to(device()) for name, value in build_batch(model.config, preset, batch).items()}
    extract = ASiTFeatureExtractor(num_mel_bins=model.config.num_mel_bins).extract
    clean = extract(inputs["global_waveforms"])
    local = extract(inputs["local_waveforms"]) if "local_waveforms" in inputs else None
    return clean, local, corrupt(clean, inputs["sample_keys"], 0, get_preset(preset).gmml)


def flops_of_a_clip(model: ASiTForPreTraining, preset: str, batch: int = 2) -> float:
    """Floating-point operations per clip of a step of the plain loop, which does not recompute activations."""
    model.to(device())
    loop = OfficialLoop(model, get_preset(preset).gmml)
    clean, local, corruption = ready_views(model, preset, batch)
    with FlopCounterMode(display=False) as counter:
        loop.step(clean, local, corruption=corruption)
    return counter.get_total_flops() / batch


def seconds_of(call: Callable[[], Any], count: int) -> float:
    """Mean seconds of a call, after two warm-up calls."""
    for _ in range(2):
        call()
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronize()
    return (time.perf_counter() - start) / count


class Stopwatch(TrainerCallback):
    """Measures time and memory of `steps` steps after `warm_up` steps."""

    def __init__(self, warm_up: int, steps: int):
        self.warm_up, self.steps = warm_up, steps
        self.seconds, self.between, self.peak = 0.0, None, None

    @property
    def last(self) -> int:
        return self.warm_up + self.steps

    def on_step_end(self, args, state, control, **kwargs):
        self.tick(state.global_step)

    def tick(self, step: int) -> None:
        """Must be called after every step, with its number, counted from 1."""
        if step not in (self.warm_up, self.last):
            return
        synchronize()
        now, on_gpu = time.perf_counter(), torch.cuda.is_available()
        if step == self.last:
            self.seconds = now - self._start
            self.peak = torch.cuda.max_memory_allocated() if on_gpu else None
        elif on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.between = torch.cuda.memory_allocated()
        self._start = time.perf_counter()

    def values(self, batch: int) -> dict[str, Any]:
        seconds = self.seconds / self.steps
        values = {"ms per step": 1000 * seconds, "clips/s": batch / seconds}
        if self.peak is not None:
            # per clip without weights and optimizer state, which stay allocated between steps
            memory = {"peak GiB": self.peak / 2**30, "MB per clip": (self.peak - self.between) / batch / 1e6}
            values |= memory
        return values
