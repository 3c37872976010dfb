"""What stops a run or spoils a step, and what is left then."""

import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForPreTraining
from asit_hf.data import PretrainingCrops
from asit_hf.data.collators import collate_crops
from asit_hf.pretraining.arguments import ASiTPreTrainingArguments
from asit_hf.pretraining.monitoring import PATIENCE, CollapseCallback, KnnProbeCallback, collapsed_losses
from asit_hf.pretraining.trainer import ASiTPreTrainer


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    for index in range(8):
        soundfile.write(folder / f"{index}.wav", rng.uniform(-0.3, 0.3, 16000), 16000)
    return sorted(str(path) for path in folder.iterdir())


def make_trainer(clips, output_dir, collate=collate_crops, **kwargs):
    torch.manual_seed(0)
    config = ASiTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        num_mel_bins=32,
        num_frames=48,
        distillation_hidden_size=32,
        distillation_bottleneck_size=16,
        num_prototypes=24,
    )
    settings = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 4,
        "warmup_epochs": 0,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "report_to": "none",
        "save_steps": 2,
        "logging_steps": 1,
        "plot_steps": 0,
        "disable_tqdm": True,
        **kwargs,
    }
    return ASiTPreTrainer(
        ASiTForPreTraining(config),
        ASiTPreTrainingArguments(output_dir=str(output_dir), **settings),
        processing_class=ASiTFeatureExtractor(num_mel_bins=32),
        train_dataset=PretrainingCrops(clips, 16000, global_seconds=0.5, local_seconds=0.25, num_local_crops=1),
        data_collator=collate,
    )


class AtStep(TrainerCallback):
    """Does something at the end of one step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def state(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_equal(first, second):
    for (name, value), other in zip(first.items(), second.values(), strict=True):
        assert torch.equal(value, other), name


# --- saving --------------------------------------------------------------------------------------------------------


def test_sigterm_finishes_the_step_saves_and_leaves(clips, tmp_path):
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
    assert_equal(state(whole), state(resumed))


def test_loader_workers_still_die_of_sigterm(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path, dataloader_num_workers=1, num_train_epochs=1, save_strategy="no")
    trainer.train()
    assert not trainer.terminated


@pytest.fixture
def full_disk():
    """From the call on, no file can be longer than 8 kB: writing fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_a_clear_error_and_the_checkpoint_before_stays(clips, tmp_path, full_disk):
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
    assert_equal(state(whole), state(resumed))


def test_a_checkpoint_has_its_name_only_when_it_is_whole(clips, tmp_path, monkeypatch):
    """What a kill at any moment of saving would leave: seen before every file that is written."""
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


def test_saving_a_step_again_replaces_it(clips, tmp_path):
    for seed in (0, 1):
        make_trainer(clips, tmp_path, num_train_epochs=1, seed=seed).train()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-2"]


def test_resuming_a_complete_run_changes_nothing(clips, tmp_path):
    whole = make_trainer(clips, tmp_path)
    whole.train()
    again = make_trainer(clips, tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 8
    assert_equal(state(whole), state(again))
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        f"checkpoint-{step}" for step in (2, 4, 6, 8)
    }


# --- losses that are not finite ------------------------------------------------------------------------------------


class Spoiling:
    """Batches of which some bring a spectrogram that is not finite."""

    def __init__(self, *bad_batches):
        self.bad_batches, self.count = bad_batches, 0

    def __call__(self, items):
        batch = collate_crops(items)
        if self.count in self.bad_batches:
            batch["global_waveforms"][0, 0, 100] = float("nan")
        self.count += 1
        return batch


def test_a_step_that_is_not_finite_is_skipped_counted_and_logged(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path, Spoiling(2, 3), save_strategy="no")
    states = {}

    class Keeper(TrainerCallback):
        def on_step_end(self, args, progress, control, **kwargs):
            states[progress.global_step] = state(trainer)

    trainer.add_callback(Keeper())
    trainer.train()
    assert_equal(states[2], states[3])  # nothing moves: weights, teacher, centers
    assert_equal(states[3], states[4])
    assert not torch.equal(states[4]["asit.layers.0.mlp.fc1.weight"], states[5]["asit.layers.0.mlp.fc1.weight"])
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row.get("skipped_steps", 0) for row in rows] == [0, 0, 1, 2, 2, 2, 2, 2]
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert ["global_loss" in row for row in rows] == [True, True, False, False, True, True, True, True]
    assert all(value.isfinite().all() for value in states[8].values())


def test_one_bad_pass_spoils_its_whole_step(clips, tmp_path):
    trainer = make_trainer(
        clips,
        tmp_path,
        Spoiling(1),
        save_strategy="no",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
    )
    before = state(trainer)
    trainer.add_callback(AtStep(1, lambda: assert_equal(before, state(trainer))))
    trainer.train()
    assert trainer.num_skipped_steps == 1


def test_too_many_in_a_row_stop_the_run_and_name_the_files(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path, Spoiling(1, 3, 4, 5), max_skipped_steps=3)
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
def test_collapse_is_told_by_loss(logs, expected):
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
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert all(row["cls_logit_std"] > 0 and row["patch_logit_std"] > 0 for row in rows)


# --- the kNN probe -------------------------------------------------------------------------------------------------


class Labelled:
    """Clips that differ as much as their labels: tones of two pitches."""

    def __init__(self, count):
        self.labels = [index % 2 for index in range(count)]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        time = np.arange(8000) / 16000
        return {"waveform": 0.3 * np.sin(2 * np.pi * (300 + 2000 * self.labels[index]) * time).astype(np.float32)}


def test_a_knn_probe_every_few_steps(clips, tmp_path):
    runs = []
    for probed in (False, True):
        trainer = make_trainer(clips, tmp_path, save_strategy="no")
        if probed:
            trainer.add_callback(KnnProbeCallback(trainer, Labelled(8), Labelled(4), every_steps=4))
        trainer.train()
        runs.append(trainer)
    rows = [row for row in runs[1].state.log_history if "knn_accuracy" in row]
    assert [row["step"] for row in rows] == [4, 8]
    assert all(row["knn_accuracy"] == 1.0 for row in rows)
    assert_equal(state(runs[0]), state(runs[1]))  # looking does not change the run
    with pytest.raises(ValueError, match="at least one step"):
        KnnProbeCallback(runs[1], Labelled(8), Labelled(4), every_steps=0)
