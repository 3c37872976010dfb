"""What stops a run or makes a step non-finite, and what remains then."""

import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import tiny_pretraining
import torch
from tiny_pretraining import assert_equal, rows, state, write_clips
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from asit_hf import ASiTConfig, ASiTForPreTraining
from asit_hf.data.collators import collate_crops
from asit_hf.pretraining.monitoring import PATIENCE, CollapseCallback, KnnProbeCallback, collapsed_losses


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("clips"), count=8)


def make_trainer(clips, output_dir, collate=None, **options):
    """Eight steps in four epochs."""
    options = {"num_train_epochs": 4, "warmup_epochs": 0, "save_strategy": "steps", "save_steps": 2, **options}
    return tiny_pretraining.make_trainer(clips, output_dir, data_collator=collate, **options)


class AtStep(TrainerCallback):
    """Calls a function at the end of one step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


# --- saving --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sigterm_finishes_the_step_saves_and_stops(clips, tmp_path):
    whole = make_trainer(clips, tmp_path / "whole", save_strategy="no")
    whole.train()
    assert not whole.terminated
    handler = signal.getsignal(signal.SIGTERM)
    stopped = make_trainer(clips, tmp_path / "stopped")
    stopped.add_callback(AtStep(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    stopped.train()
    assert stopped.terminated
    assert stopped.state.global_step == 4  # the step in which it was noticed
    assert signal.getsignal(signal.SIGTERM) is handler
    resumed = make_trainer(clips, tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=True)
    assert_equal(whole.model, resumed.model)


def test_loader_workers_still_exit_on_sigterm(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path, dataloader_num_workers=1, num_train_epochs=1, save_strategy="no")
    trainer.train()
    assert not trainer.terminated


@pytest.fixture
def full_disk():
    """A function after which no file can grow beyond 8 kB: writing fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
def test_a_full_disk_is_a_clear_error_and_keeps_the_previous_checkpoint(clips, tmp_path, full_disk):
    whole = make_trainer(clips, tmp_path / "whole", save_strategy="no")
    whole.train()
    trainer = make_trainer(clips, tmp_path / "full", save_total_limit=1)
    trainer.add_callback(AtStep(3, full_disk))
    with pytest.raises(OSError, match=r"step 4 .*MiB free.*checkpoint-2"):
        trainer.train()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert [path.name for path in (tmp_path / "full").glob("*") if path.is_dir()] == ["checkpoint-2"]
    resumed = make_trainer(clips, tmp_path / "full", save_total_limit=1)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(whole.model, resumed.model)


def test_a_checkpoint_gets_its_name_only_when_it_is_complete(clips, tmp_path, monkeypatch):
    """Checks what a kill between any two files of a checkpoint would leave."""
    trainer = make_trainer(clips, tmp_path, save_total_limit=1)
    seen = []
    for name in ("_save_optimizer_and_scheduler", "_save_rng_state", "save_model"):
        original = getattr(trainer, name)

        def watched(*args, original=original, **kwargs):
            original(*args, **kwargs)
            last = get_last_checkpoint(str(tmp_path))
            seen.append(last)
            if last:
                whole = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
                assert whole <= {path.name for path in Path(last).iterdir()}

        monkeypatch.setattr(trainer, name, watched)
    trainer.train()
    assert len(seen) == 12
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-8"]


def test_leftovers_of_a_killed_run_are_cleared(clips, tmp_path):
    (tmp_path / "unfinished" / "checkpoint-9").mkdir(parents=True)
    trainer = make_trainer(clips, tmp_path, num_train_epochs=1)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-2"]


def test_saving_a_step_again_replaces_its_checkpoint(clips, tmp_path):
    for seed in (0, 1):
        make_trainer(clips, tmp_path, num_train_epochs=1, seed=seed).train()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-2"]


def test_resuming_a_complete_run_changes_nothing(clips, tmp_path):
    whole = make_trainer(clips, tmp_path)
    whole.train()
    again = make_trainer(clips, tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 8
    assert_equal(whole.model, again.model)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        f"checkpoint-{step}" for step in (2, 4, 6, 8)
    }


# --- non-finite losses ---------------------------------------------------------------------------------------------


class CollateWithNaN:
    """Collates batches, some of them with a NaN in a waveform."""

    def __init__(self, *bad_batches):
        self.bad_batches, self.count = bad_batches, 0

    def __call__(self, items):
        batch = collate_crops(items)
        if self.count in self.bad_batches:
            batch["global_waveforms"][0, 0, 100] = float("nan")
        self.count += 1
        return batch


def test_a_non_finite_step_is_skipped_counted_and_logged(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path, CollateWithNaN(2, 3), save_strategy="no")
    states = {}

    class Keeper(TrainerCallback):
        def on_step_end(self, args, progress, control, **kwargs):
            states[progress.global_step] = state(trainer.model)

    trainer.add_callback(Keeper())
    trainer.train()
    assert_equal(states[2], states[3])  # nothing moves: weights, teacher, centers
    assert_equal(states[3], states[4])
    assert not torch.equal(states[4]["asit.layers.0.mlp.fc1.weight"], states[5]["asit.layers.0.mlp.fc1.weight"])
    logged = rows(trainer)
    assert [row.get("skipped_steps", 0) for row in logged] == [0, 0, 1, 2, 2, 2, 2, 2]
    assert all(np.isfinite(row["loss"]) for row in logged)
    assert ["global_loss" in row for row in logged] == [True, True, False, False, True, True, True, True]
    assert all(value.isfinite().all() for value in states[8].values())


def test_a_step_with_one_non_finite_pass_is_skipped(clips, tmp_path):
    trainer = make_trainer(
        clips,
        tmp_path,
        CollateWithNaN(1),
        save_strategy="no",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
    )
    before = state(trainer.model)
    trainer.add_callback(AtStep(1, lambda: assert_equal(before, trainer.model)))
    trainer.train()
    assert trainer.num_skipped_steps == 1


def test_too_many_skipped_steps_in_a_row_stop_the_run_and_name_the_files(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path, CollateWithNaN(1, 3, 4, 5), max_skipped_steps=3)
    with pytest.raises(FloatingPointError, match=r"3 steps in a row.*up to step 5.*\d\.wav") as error:
        trainer.train()
    assert sum(clip in str(error.value) for clip in clips) == 4  # the batch's files
    last = get_last_checkpoint(str(tmp_path))
    weights = ASiTForPreTraining.from_pretrained(last).state_dict()
    assert all(value.isfinite().all() for value in weights.values())


# --- collapse ------------------------------------------------------------------------------------------------------

HEALTHY = {
    "teacher_temperature": 0.05,
    "cls_entropy": 2.0,
    "patch_entropy": 2.0,
    "cls_logit_std": 0.1,
    "patch_logit_std": 0.1,
    "feature_std": 0.1,
}


@pytest.mark.parametrize(
    ("logs", "expected"),
    [
        ({}, {}),
        ({"cls_entropy": np.log(24) - 1e-4}, {"global_loss": "uniform"}),
        ({"patch_entropy": np.log(12) - 1e-4}, {"local_loss": "uniform"}),
        ({"cls_logit_std": 1e-4}, {"global_loss": "every input"}),
        ({"patch_logit_std": 1e-4}, {"local_loss": "every input"}),
        ({"feature_std": 1e-4}, {"global_loss": "all clips"}),
    ],
)
def test_collapse_is_reported_per_loss(logs, expected):
    config = ASiTConfig(hidden_size=32, num_attention_heads=2, num_prototypes=24, num_patch_prototypes=12)
    found = collapsed_losses({**HEALTHY, **logs}, config)
    assert found.keys() == expected.keys()
    assert all(expected[loss] in reason for loss, reason in found.items())


def test_a_run_whose_teacher_is_constant_warns_once(clips, tmp_path, caplog):
    trainer = make_trainer(clips, tmp_path, save_strategy="no", learning_rate=1e-9)
    with torch.no_grad():  # every clip, every patch alike
        for layer in (trainer.model.asit.layernorm, trainer.model.teacher["asit"].layernorm):
            layer.weight.zero_()
            layer.bias.fill_(0.5)
    trainer.train()
    warnings = [record.message for record in caplog.records if "has collapsed" in record.message]
    assert len(warnings) == 2
    assert {message.split()[0] for message in warnings} == {"global_loss", "local_loss"}
    assert f"at step {PATIENCE}" in warnings[0]


def test_a_healthy_run_does_not_warn(clips, tmp_path, caplog):
    trainer = make_trainer(clips, tmp_path, save_strategy="no")
    assert any(isinstance(callback, CollapseCallback) for callback in trainer.callback_handler.callbacks)
    trainer.train()
    assert not [record for record in caplog.records if "collapsed" in record.message]
    assert all(row["cls_logit_std"] > 0 and row["patch_logit_std"] > 0 for row in rows(trainer))


# --- the kNN probe -------------------------------------------------------------------------------------------------


class Labelled:
    """Tones of two pitches, one per label."""

    def __init__(self, count):
        self.labels = [index % 2 for index in range(count)]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        time = np.arange(8000) / 16000
        return {"waveform": 0.3 * np.sin(2 * np.pi * (300 + 2000 * self.labels[index]) * time).astype(np.float32)}


def test_the_knn_probe_logs_its_accuracy_and_does_not_change_the_run(clips, tmp_path):
    runs = []
    for probed in (False, True):
        trainer = make_trainer(clips, tmp_path, save_strategy="no")
        if probed:
            trainer.add_callback(KnnProbeCallback(trainer, Labelled(8), Labelled(4), every_steps=4))
        trainer.train()
        runs.append(trainer)
    logged = [row for row in runs[1].state.log_history if "knn_accuracy" in row]
    assert [row["step"] for row in logged] == [4, 8]
    assert all(row["knn_accuracy"] == 1.0 for row in logged)
    assert_equal(runs[0].model, runs[1].model)  # the probe does not change the run
    with pytest.raises(ValueError, match="at least one step"):
        KnnProbeCallback(runs[1], Labelled(8), Labelled(4), every_steps=0)
