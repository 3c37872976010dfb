"""Pretraining runs small enough for tests, and what their tests share."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForPreTraining
from asit_hf.data import PretrainingCrops
from asit_hf.pretraining.arguments import ASiTPreTrainingArguments
from asit_hf.pretraining.trainer import ASiTPreTrainer

CONFIG = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "num_mel_bins": 32,
    "num_frames": 48,
    "distillation_hidden_size": 32,
    "distillation_bottleneck_size": 16,
    "num_prototypes": 24,
    "drop_path_rate": 0.1,
}
CROPS = {"global_seconds": 0.5, "local_seconds": 0.25, "num_local_crops": 2}


def write_clips(folder, count=12):
    """Short files of noise and tones, shorter and longer than a crop."""
    rng = np.random.default_rng(0)
    for index in range(count):
        seconds = rng.uniform(0.4, 1.5)
        time = np.arange(int(16000 * seconds)) / 16000
        wave = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 4000) * time) + 0.05 * rng.standard_normal(len(time))
        soundfile.write(folder / f"{index:02d}.wav", wave.astype(np.float32), 16000)
    return sorted(str(path) for path in folder.glob("*.wav"))


def make_model(seed=0, **fields):
    torch.manual_seed(seed)
    return ASiTForPreTraining(ASiTConfig(**{**CONFIG, **fields}))


def make_arguments(output_dir, **options):
    quiet = {"use_cpu": True, "report_to": "none", "plot_steps": 0, "disable_tqdm": True}
    return ASiTPreTrainingArguments(output_dir=str(output_dir), **{**quiet, **options})


def make_trainer(data, output_dir, model=None, crops=None, cls=ASiTPreTrainer, data_collator=None, **options):
    """A trainer on files (a list of paths, cropped as `crops` says) or on a data set; logs every step."""
    settings = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "warmup_epochs": 1,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    files = isinstance(data, list) and data and isinstance(data[0], str)
    return cls(
        model or make_model(),
        make_arguments(output_dir, **{**settings, **options}),
        processing_class=ASiTFeatureExtractor(num_mel_bins=32),
        train_dataset=PretrainingCrops(data, 16000, **{**CROPS, **(crops or {})}) if files else data,
        data_collator=data_collator,
    )


def stack(items):
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def rows(trainer):
    """The logs of the steps."""
    return [row for row in trainer.state.log_history if "loss" in row]


def losses(trainer):
    return [row["loss"] for row in rows(trainer)]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(first, second):
    """Two models or states, bit for bit."""
    first, second = (one.state_dict() if isinstance(one, torch.nn.Module) else one for one in (first, second))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def assert_close(first, second, atol):
    """Two states, within rounding errors."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        # the gradient of the keys' bias is rounding errors only, from which AdamW makes large steps
        allowed = 1e-4 if atol and name.endswith("k_proj.bias") else atol
        torch.testing.assert_close(value, second[name], rtol=0, atol=allowed)


# --- runs in processes of their own --------------------------------------------------------------------------------


def launch(script, modes, output, *arguments):
    """`script MODE,MODE,... OUTPUT ARGUMENT...` in two processes under torchrun (gloo), as users start them."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    search = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*launcher, str(script), ",".join(modes), str(output), *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search},
    )
    (output / "stderr").write_text(done.stderr)


def save_result(trainer, output, mode, rank, **more):
    """What a run left, for `load_result` in the test."""
    result = {"steps": trainer.state.global_step, "skipped": trainer.num_skipped_steps, **more}
    torch.save({**result, "logs": json.dumps(rows(trainer))}, Path(output) / f"{mode}-{rank}.pt")


def load_result(output, mode, rank=0):
    path = output / f"{mode}-{rank}.pt"
    assert path.is_file(), f"{mode} did not finish: {(output / 'stderr').read_text()[-3000:]}"
    loaded = torch.load(path, weights_only=True)
    return {**loaded, "logs": json.loads(loaded["logs"])} if "logs" in loaded else loaded
