"""Checks of GPU results against the CPU, one function each; called by `gpu.py`."""

import os
import platform
import socket
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import machine_facts
from gpu import NO_GPU, Run
from gpu_trainer import (
    RATE,
    RecordingTrainer,
    SameBatch,
    build_batch,
    build_clips,
    build_model,
    build_trainer,
    cheap_compiler,
    device,
    synchronize,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import TrainerCallback

from asit_hf import ASiTFeatureExtractor, ASiTForPreTraining
from asit_hf.fbank_asit import log_mel_spectrogram
from asit_hf.pretraining.masking import corrupt
from asit_hf.pretraining.presets import get_preset

ROOT = Path(__file__).parents[2]
FSDP_RECIPE = ROOT / "examples" / "recipes" / "fsdp.json"
NEEDS_CUDA = {"status": "needs CUDA"}


def facts(run: Run) -> dict[str, Any]:
    """Facts about the machine and the versions."""
    found = {name: value for name, value in machine_facts().items() if name not in ("date", "command")}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "device memory": f"{properties.total_memory / 2**30:.0f} GiB",
            "device capability": f"{properties.major}.{properties.minor}",
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
        }
    elif not run.quick:
        return {"status": NO_GPU, "detail": "expected a GPU, found none; use --quick for toy sizes on a CPU"}
    else:
        found["device"] = f"CPU, {platform.machine()}"
    return {"values": found}


def masks(run: Run, preset: str) -> dict[str, Any]:
    """Number of pixels of masks and corrupted views that differ from the CPU's."""
    config = build_model("small", preset, run.quick).config
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(8 if run.quick else 32, 2, config.num_frames, config.num_mel_bins, generator=generator)
    keys = torch.randint(2**62, (len(clean),), generator=generator)
    gmml = get_preset(preset).gmml
    expected = corrupt(clean, keys, 7, gmml)
    found = corrupt(clean.to(device()), keys.to(device()), 7, gmml)
    differing = sum(int((one != other.cpu()).sum()) for one, other in zip(expected, found))
    share = float(expected[1].float().mean())
    return {"value": differing, "detail": f"{len(clean)} clips, {share:.0%} of their pixels masked"}


def log_mel(run: Run) -> dict[str, Any]:
    """Largest difference in bins within 10 nats of the loudest; rounding dominates quieter bins on any device."""
    generator = torch.Generator().manual_seed(0)
    seconds = torch.arange(RATE * (1 if run.quick else 10)) / RATE
    tones = torch.sin(2 * torch.pi * torch.tensor([[200.0], [1000.0], [5000.0]]) * seconds)
    clips = 0.3 * tones + 0.1 * torch.randn(3, len(seconds), generator=generator)
    expected = log_mel_spectrogram(clips, RATE)
    found = log_mel_spectrogram(clips.to(device()), RATE).cpu()
    return {"value": float((found - expected).abs()[expected > expected.max() - 10].max())}


def gradients(run: Run, preset: str, bf16: bool) -> dict[str, Any]:
    """The larger relative error of the loss and of the gradient vector, against float32 on the CPU."""
    model = build_model("small", preset, run.quick)
    views = given_views(model, preset)
    loss, expected = loss_and_gradients(model, views)
    model.to(device())
    views = {name: value.to(device()) for name, value in views.items()}
    with exact_float32(), torch.autocast(device().type, torch.bfloat16, enabled=bf16):
        found_loss, found = loss_and_gradients(model, views)
    errors = {"loss": abs(found_loss - loss) / abs(loss), "gradients": relative_error(found, expected)}
    return {
        "value": max(errors.values()),
        "detail": ", ".join(f"{name} {error:.2g}" for name, error in errors.items()),
    }


def half_precision(run: Run) -> dict[str, Any]:
    """Losses of three trainer steps in float16, against float32."""
    if device().type != "cuda":  # Accelerate does not use float16 on a CPU
        return NEEDS_CUDA
    exact, half = train(run), train(run, fp16=True)
    moved = relative_error(weights(half.model), weights(build_model("small", "2024", run.quick)))
    if not 0 < moved < float("inf"):
        raise AssertionError(f"expected a finite change of the weights in three fp16 steps, got {moved} of their norm")
    return {**compare_losses(half, exact), "detail": f"{half.num_skipped_steps} of 3 steps skipped"}


def compiled(run: Run) -> dict[str, Any]:
    return compare_losses(train(run, compiled=True), train(run))


def checkpointing(run: Run) -> dict[str, Any]:
    return compare_losses(train(run, gradient_checkpointing=True), train(run))


def resumed(run: Run) -> dict[str, Any]:
    """Steps 3 to 5 of a run resumed from the checkpoint of step 2, against those of an uninterrupted run."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "folder": folder}
        whole = train(run, **options)
        again = train(run, resume_from_checkpoint=f"{folder}/checkpoint-2", **options)
    difference = relative_error(weights(again.model), weights(whole.model))
    whole.losses = whole.losses[2:]
    return {**compare_losses(again, whole), "detail": f"weights differ by {difference:.2g} of their norm"}


def sharded(run: Run) -> dict[str, Any]:
    """Loss and gradients after `fully_shard` of every layer and of the model, against the unsharded model."""
    model = build_model("small", "2024", run.quick).to(device())
    views = {name: value.to(device()) for name, value in given_views(model, "2024").items()}
    with exact_float32():
        loss, expected = loss_and_gradients(model, views)
        with one_process():
            mesh = init_device_mesh(device().type, (1,))
            for encoder in (model.asit, model.teacher["asit"]):
                for layer in encoder.layers:
                    fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            found_loss, found = loss_and_gradients(model, views)
    return {"value": max(abs(found_loss - loss) / abs(loss), relative_error(found, expected))}


def sharded_trainer(run: Run) -> dict[str, Any]:
    """Losses of three steps with `examples/recipes/fsdp.json`, against three without."""
    if device().type != "cuda":
        return NEEDS_CUDA
    plain = train(run)
    with one_process_environment():
        found = train(run, fsdp=True, fsdp_config=str(FSDP_RECIPE))
        names = {type(module).__name__ for module in found.model.modules()}
        result = compare_losses(found, plain)
        if dist.is_initialized():
            dist.destroy_process_group()
    if not any(name.startswith("FSDP") for name in names):
        raise AssertionError("the trainer did not shard the model")
    return result


def synchronizations(run: Run) -> dict[str, Any]:
    """Number and places of host synchronizations between the ends of two consecutive training steps."""
    if device().type != "cuda":
        return NEEDS_CUDA
    model = build_model("small", "2024", run.quick)
    watch = _WatchSynchronizations()
    with tempfile.TemporaryDirectory() as folder:
        dataset = SameBatch(build_batch(model.config, "2024", 16, torch.int16))
        trainer = build_trainer(model, "2024", dataset, folder, callbacks=[watch], max_steps=6, bf16=True)
        with warnings.catch_warnings():
            trainer.train()
    listed = "; ".join(f"{place} x{count}" for place, count in watch.places.most_common())
    return {"value": sum(watch.places.values()), "detail": listed}


class _WatchSynchronizations(TrainerCallback):
    """Collects the warnings of `set_sync_debug_mode` from the end of step 4 to that of step 5."""

    def __init__(self):
        self.places: Counter[str] = Counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            self._original, warnings.showwarning = warnings.showwarning, self._note
            warnings.simplefilter("always")
            torch.set_warn_always(True)
            torch.cuda.set_sync_debug_mode("warn")
        elif state.global_step == 5:
            torch.cuda.set_sync_debug_mode("default")
            torch.set_warn_always(False)
            warnings.showwarning = self._original

    def _note(self, message, category, filename, lineno, *more):
        if "synchroniz" not in str(message):
            return
        frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
        ours = [frame for frame in frames if "asit_hf" in frame.filename]
        inner = f"{Path(filename).name}:{lineno}"
        outer = f" in {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
        self.places[inner + ("" if outer.endswith(inner) else outer)] += 1


def given_views(model: ASiTForPreTraining, preset: str, size: int = 2) -> dict[str, torch.Tensor]:
    """Model inputs computed from noise, on the CPU."""
    batch = build_batch(model.config, preset, size)
    extract = ASiTFeatureExtractor(num_mel_bins=model.config.num_mel_bins).extract
    views = {"input_values": extract(batch["global_waveforms"]), "drop_path_keys": batch["sample_keys"]}
    if "local_waveforms" in batch:
        views["local_values"] = extract(batch["local_waveforms"])
    gmml = get_preset(preset).gmml
    views["corrupted_values"], views["corruption_mask"] = corrupt(views["input_values"], batch["sample_keys"], 0, gmml)
    return views


def loss_and_gradients(
    model: ASiTForPreTraining, views: dict[str, torch.Tensor]
) -> tuple[float, dict[str, torch.Tensor]]:
    """Runs a forward and a backward pass; returns the loss and the unsharded gradients on the CPU."""
    model.train()
    model.zero_grad(set_to_none=True)
    loss = model(**views, teacher_temperature=0.04).loss
    loss.backward()
    model.forget_outputs()
    whole = {
        name: parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return loss.item(), {name: gradient.float().cpu() for name, gradient in whole.items()}


def relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of all tensors, divided by the norm of the expected ones."""
    if found.keys() != expected.keys():
        raise AssertionError(f"expected tensors {sorted(expected)}, got {sorted(found)}")
    apart = sum(float((found[name].double() - value.double()).square().sum()) for name, value in expected.items())
    return (apart / sum(float(value.double().square().sum()) for value in expected.values())) ** 0.5


def weights(model: ASiTForPreTraining) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().float().cpu() for name, parameter in model.named_parameters()}


def train(
    run: Run, folder: str | None = None, resume_from_checkpoint: str | None = None, **options: Any
) -> RecordingTrainer:
    """Trains the small model on noise for a few steps, preset 2024, by default in float32."""
    model = build_model("small", "2024", run.quick)
    with tempfile.TemporaryDirectory() as scratch, exact_float32(), cheap_compiler():
        trainer = build_trainer(model, "2024", build_clips(model.config, "2024"), folder or scratch, **options)
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
        synchronize()
    if trainer.args.device.type != device().type:
        raise AssertionError(f"expected training on {device()}, got {trainer.args.device}")
    return trainer


def compare_losses(found: RecordingTrainer, expected: RecordingTrainer) -> dict[str, Any]:
    """Largest relative difference between the losses of two runs at the same step."""
    ours, theirs = (torch.stack(one.losses).double().cpu() for one in (found, expected))
    if ours.shape != theirs.shape:
        raise AssertionError(f"expected {len(theirs)} steps, got {len(ours)}")
    return {"value": float(((ours - theirs).abs() / theirs.abs()).max())}


@contextmanager
def exact_float32() -> Iterator[None]:
    """Disables TF32, which rounds the inputs of products to three digits."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [products.allow_tf32, True]
    with suppress(RuntimeError):  # torch refuses to read this flag after its newer setting was used
        before[1] = convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = False
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


@contextmanager
def one_process() -> Iterator[None]:
    """A process group that contains only this process."""
    backend = "nccl" if device().type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
        try:
            yield
        finally:
            dist.destroy_process_group()


@contextmanager
def one_process_environment() -> Iterator[None]:
    """The environment variables that torchrun sets for a single process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]
