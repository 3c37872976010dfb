"""Pretraining with torch, transformers, accelerate and their dependencies only."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ABSENT = (
    *("datasets", "evaluate", "soundfile", "soxr"),
    *("sklearn", "scipy", "matplotlib", "tensorboard", "pandas", "pyarrow"),
)
TWO_STEPS = f"""
import sys

for name in {ABSENT}:
    sys.modules[name] = None  # importing it fails, and finding it finds nothing

import numpy as np

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForPreTraining, ASiTPreTrainer, ASiTPreTrainingArguments
from asit_hf.data import PretrainingCrops
from asit_hf.evaluation.probes import knn_probe

noise = np.random.default_rng(0).standard_normal((8, 16000)).astype(np.float32)
clips = [{{"array": 0.1 * clip, "sampling_rate": 16000}} for clip in noise]
sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_mel_bins=32)
heads = dict(distillation_hidden_size=32, distillation_bottleneck_size=16, num_prototypes=24)
trainer = ASiTPreTrainer(
    ASiTForPreTraining(ASiTConfig(num_frames=48, **sizes, **heads)),
    ASiTPreTrainingArguments(
        sys.argv[1], max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to="none", plot_steps=0
    ),
    processing_class=ASiTFeatureExtractor(num_mel_bins=32),
    train_dataset=PretrainingCrops(clips, 16000, global_seconds=0.5, local_seconds=0.25),
)
trainer.train()
print(trainer.state.global_step)
labelled = noise[:, :8], np.arange(8) % 2
print(knn_probe(labelled, labelled, k=1)["accuracy"])
"""


@pytest.mark.slow
def test_two_steps_of_pretraining_without_optional_packages(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", TWO_STEPS, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["2", "1.0"], done.stdout
