import json
import logging

import numpy as np
import pytest
import torch
from fake_clock import FakeClock
from torch.utils.data import IterableDataset
from transformers import ProgressCallback, TrainerCallback

from asit_hf import ASiTConfig, ASiTForAudioClassification
from asit_hf.finetuning.trainer import FinetuningArguments, FinetuningTrainer
from asit_hf.utils.time_budget import Plan, steps_left

CLIPS, CLASSES, BATCH = 12, 3, 4
PASS = CLIPS // BATCH


def make_items() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(CLIPS, 16, 16, generator=generator)
    return [{"input_values": one, "labels": torch.tensor(index % CLASSES)} for index, one in enumerate(values)]


class Stream(IterableDataset):
    def __iter__(self):
        yield from make_items()


@pytest.fixture
def make_trainer(tmp_path, monkeypatch):
    def make(clock: FakeClock, data=None, **kwargs) -> FinetuningTrainer:
        monkeypatch.setattr("asit_hf.utils.time_budget.now", clock)
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = ASiTConfig(**sizes, num_frames=16, num_mel_bins=16, num_labels=CLASSES)
        defaults = {
            "output_dir": str(tmp_path),
            "eval_strategy": "no",
            "save_strategy": "no",
            "load_best_model_at_end": False,
            "metric_for_best_model": None,
            "per_device_train_batch_size": BATCH,
            "learning_rate": 0.01,
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        args = FinetuningArguments(**{**defaults, **kwargs})
        items = make_items()
        trainer = FinetuningTrainer(
            ASiTForAudioClassification(config),
            args,
            train_dataset=items if data is None else data,
            eval_dataset=items[:BATCH],
            callbacks=[clock],
        )
        return trainer

    return make


class Stop(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def run(trainer: FinetuningTrainer, **kwargs) -> float:
    """Duration of training in seconds by its clock."""
    clock = next(one for one in trainer.callback_handler.callbacks if isinstance(one, FakeClock))
    start = clock.seconds
    trainer.train(**kwargs)
    return clock.seconds - start


@pytest.mark.parametrize(("step", "first", "steps"), [(1.0, 0.0, 30), (0.5, 8.0, 44), (4.0, 0.0, 7), (20.0, 0.0, 2)])
def test_the_number_of_steps_fits_the_time(make_trainer, step, first, steps):
    trainer = make_trainer(FakeClock(step, first), max_minutes=0.5)
    seconds = run(trainer)
    assert trainer.state.global_step == trainer.state.max_steps == steps
    assert seconds <= 30 + step
    assert trainer.state.num_train_epochs == -(-steps // PASS)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_learning_rate_schedule_ends_with_the_time(make_trainer, schedule):
    clock = FakeClock(1.0, 5.0)
    trainer = make_trainer(clock, max_minutes=1, lr_scheduler_type=schedule)
    run(trainer)
    rates = np.array(clock.rates) / 0.01
    assert trainer.state.global_step == len(rates) == 55
    assert rates[0] == 1
    assert rates[-1] < 0.03
    assert abs(np.diff(rates)).max() < 0.04
    assert np.diff(rates).max() <= 0


def test_a_short_warm_up_in_steps_is_kept(make_trainer):
    clock = FakeClock(1.0)
    run(make_trainer(clock, max_minutes=1, warmup_steps=10))
    np.testing.assert_allclose(clock.rates[:11], 0.01 * np.arange(11) / 10, atol=1e-12)
    assert clock.rates[-1] < 0.0004


def test_a_long_warm_up_is_cut_without_a_jump_and_logged_once(make_trainer, caplog):
    clock = FakeClock(1.0)
    with caplog.at_level(logging.WARNING):
        run(make_trainer(clock, max_minutes=1, warmup_steps=300))
    rates = np.array(clock.rates) / 0.01
    assert rates.max() == pytest.approx(1, abs=0.06)
    assert 10 <= rates.argmax() <= 18
    assert abs(np.diff(rates)).max() < 0.12  # a step of the cut warm-up is 1 / 12
    assert sum("300 steps" in message for message in caplog.messages) == 1


def test_a_warm_up_as_a_share_of_the_run(make_trainer):
    clock = FakeClock(1.0)
    run(make_trainer(clock, max_minutes=1, warmup_steps=0.25))
    rates = np.array(clock.rates)
    assert rates[0] == 0
    assert 14 <= rates.argmax() <= 20
    assert abs(np.diff(rates)).max() < 0.0009


def test_the_plan_is_logged_once(make_trainer, caplog):
    with caplog.at_level(logging.WARNING):
        run(make_trainer(FakeClock(1.0, events={20: 5.0, 40: 5.0}), max_minutes=1))
    assert sum("60 steps" in message and "1 s" in message for message in caplog.messages) == 1


def test_time_between_steps_counts(make_trainer):
    clock = FakeClock(1.0, events={10: 12.0, 25: 12.0})
    trainer = make_trainer(clock, max_minutes=1)
    seconds = run(trainer)
    assert 58 <= seconds <= 61
    assert trainer.state.global_step == seconds - 24
    rates = np.array(clock.rates) / 0.01
    assert rates[-1] < 0.06
    assert abs(np.diff(rates)).max() < 0.08  # no jump when the run turns out to be shorter


def test_evaluations_count_and_the_last_one_fits(make_trainer):
    clock = FakeClock(1.0, evaluation=5.0)
    trainer = make_trainer(clock, max_minutes=1, eval_strategy="steps", eval_steps=10)
    seconds = run(trainer)
    evaluated = [row["step"] for row in trainer.state.log_history if "eval_loss" in row]
    assert evaluated[-1] == trainer.state.global_step == trainer.state.max_steps
    assert evaluated[0] == 10
    assert 58 <= seconds <= 61
    assert clock.rates[-1] < 0.05 * 0.01


def test_evaluating_and_saving_by_epoch_and_keeping_the_best(make_trainer, tmp_path):
    strategies = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    best = {"metric_for_best_model": "loss", "save_total_limit": 1}
    trainer = make_trainer(FakeClock(1.0, evaluation=1.0), max_minutes=0.35, **strategies, **best)
    assert run(trainer) <= 0.35 * 60 + 1
    evaluated = [row["step"] for row in trainer.state.log_history if "eval_loss" in row]
    assert evaluated[:2] == [PASS, 2 * PASS]
    assert evaluated[-1] == trainer.state.global_step
    assert trainer.state.best_global_step in evaluated


def test_evaluation_interval_as_a_share_of_the_run(make_trainer):
    trainer = make_trainer(FakeClock(1.0), max_minutes=1, eval_strategy="steps", eval_steps=0.25)
    run(trainer)
    assert [row["step"] for row in trainer.state.log_history if "eval_loss" in row] == [15, 30, 45, 60]


def test_the_last_epochs_are_averaged(make_trainer, tmp_path):
    trainer = make_trainer(FakeClock(1.0, events={7: 6.0}), max_minutes=0.4, average_checkpoints=2)
    run(trainer)
    last = -(-trainer.state.global_step // PASS)
    assert sorted(path.name for path in tmp_path.glob("epoch-*")) == [f"epoch-{last - 1:02d}", f"epoch-{last:02d}"]
    trainer.load_average()


def test_the_step_decay_counts_epochs_of_the_data(make_trainer):
    clock = FakeClock(1.0)
    decay = {"lr_decay_start": 2, "lr_decay_step": 2, "lr_decay_gamma": 0.1, "warmup_steps": 2}
    run(make_trainer(clock, max_minutes=0.25, **decay))
    factors = [0, 0.5, *[1] * 4, *[0.1] * 6, *[0.01] * 3]
    np.testing.assert_allclose(np.array(clock.rates) / 0.01, factors)


def test_data_without_a_length(make_trainer):
    trainer = make_trainer(FakeClock(1.0), Stream(), max_minutes=0.5)
    run(trainer)
    assert trainer.state.global_step == 30
    assert trainer.args.max_steps == -1


@pytest.mark.slow
def test_the_time_is_not_shared_at_every_step(make_trainer, monkeypatch):
    moments = []
    trainer = make_trainer(FakeClock(0.05), max_minutes=0.5)
    agree = trainer.budget._agree
    monkeypatch.setattr(
        trainer.budget, "_agree", lambda args: (moments.append(trainer.state.global_step), agree(args))[1]
    )
    run(trainer)
    assert trainer.state.global_step == 600
    assert len(moments) < 75


@pytest.mark.slow
def test_a_resumed_run_has_the_remaining_time(make_trainer, tmp_path):
    saving = {"max_minutes": 1, "save_strategy": "steps", "save_steps": 20}
    cut = make_trainer(FakeClock(1.0), **saving)
    cut.add_callback(Stop(20))
    assert run(cut) == 20
    saved = json.loads((tmp_path / "checkpoint-20" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert saved["max_minutes"]["minutes"] == 1
    assert saved["max_minutes"]["seconds"] == pytest.approx(20)

    clock = FakeClock(2.0)  # on a slower machine
    resumed = make_trainer(clock, **saving)
    assert run(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-20")) == pytest.approx(40, abs=2)
    assert resumed.state.global_step == 40
    rates = np.array([*cut_rates(cut), *clock.rates]) / 0.01
    assert abs(np.diff(rates)).max() < 0.05
    assert rates[-1] < 0.06


def test_resuming_a_run_stopped_before_its_first_plan(make_trainer, tmp_path):
    saving = {"max_minutes": 0.25, "save_strategy": "steps", "save_steps": 2}
    cut = make_trainer(FakeClock(1.0), **saving)
    cut.add_callback(Stop(2))
    run(cut)
    clock = FakeClock(1.0)
    resumed = make_trainer(clock, **saving)
    assert run(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-2")) == 13
    assert resumed.state.global_step == 15
    assert clock.rates[-1] < 0.15 * 0.01


def cut_rates(trainer: FinetuningTrainer) -> list[float]:
    return next(one for one in trainer.callback_handler.callbacks if isinstance(one, FakeClock)).rates


def test_resuming_after_the_time_is_used_up_does_nothing(make_trainer, tmp_path, caplog):
    saving = {"max_minutes": 0.2, "save_strategy": "steps", "save_steps": 100}
    trainer = make_trainer(FakeClock(1.0), **saving)
    run(trainer)
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    resumed = make_trainer(FakeClock(1.0), **saving)
    with caplog.at_level(logging.WARNING):
        assert run(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-12")) == 0
    assert resumed.state.global_step == 12
    assert any("nothing to do" in message for message in caplog.messages)
    assert all(torch.equal(value, weights[name]) for name, value in resumed.model.state_dict().items())


def test_resuming_with_more_time_extends_a_run(make_trainer, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 100}
    run(make_trainer(FakeClock(1.0), max_minutes=0.2, **saving))
    clock = FakeClock(1.0)
    longer = make_trainer(clock, max_minutes=0.4, **saving)
    run(longer, resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert longer.state.global_step == 24
    np.testing.assert_allclose(np.array(clock.rates[1:]) / 0.01, 1 - np.arange(13, 24) / 24, atol=0.01)


def test_a_run_by_steps_can_be_resumed_by_time(make_trainer, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 6}
    run(make_trainer(FakeClock(1.0), max_steps=6, **saving))
    trainer = make_trainer(FakeClock(1.0), max_minutes=0.2, **saving)
    run(trainer, resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert trainer.state.global_step == 18
    assert (tmp_path / "checkpoint-18").is_dir()


def test_a_second_run_of_a_trainer_has_the_full_time(make_trainer):
    trainer = make_trainer(FakeClock(1.0), max_minutes=0.2)
    assert run(trainer) == run(trainer) == 12
    assert trainer.state.global_step == 12


def test_the_logged_speed_counts_the_steps_taken(make_trainer):
    trainer = make_trainer(FakeClock(1.0), max_minutes=0.2)
    run(trainer)
    (speed,) = [row for row in trainer.state.log_history if "train_runtime" in row]
    made = 12 / speed["train_runtime"]
    assert speed["train_steps_per_second"] == pytest.approx(made, rel=0.01)
    assert speed["train_samples_per_second"] == pytest.approx(BATCH * made, rel=0.01)


def test_the_progress_bar_shows_the_planned_steps(make_trainer):
    totals = []

    class Totals(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            totals.append(bar.training_bar.total)

    trainer = make_trainer(FakeClock(1.0), max_minutes=0.2, disable_tqdm=False)
    bar = next(one for one in trainer.callback_handler.callbacks if isinstance(one, ProgressCallback))
    trainer.add_callback(Totals())
    run(trainer)
    assert totals[0] is None
    assert totals[-1] == 12


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_minutes": 0}, ["max_minutes", "0"]),
        ({"max_minutes": -1.0}, ["max_minutes", "-1.0"]),
        ({"max_minutes": float("nan")}, ["max_minutes", "nan"]),
        ({"max_minutes": float("inf")}, ["max_minutes", "inf"]),
        ({"max_minutes": 8, "max_steps": 100}, ["max_minutes", "max_steps", "100"]),
    ],
)
def test_wrong_max_minutes_is_refused(tmp_path, options, words):
    with pytest.raises(ValueError) as error:
        FinetuningArguments(output_dir=str(tmp_path), **options)
    assert all(word in str(error.value) for word in words)


def test_ignored_epochs_are_logged(tmp_path, caplog):
    options = {"output_dir": str(tmp_path), "max_minutes": 1, "use_cpu": True, "report_to": "none"}
    FinetuningArguments(**options)
    assert "num_train_epochs" not in caplog.text
    FinetuningArguments(**options, num_train_epochs=7)
    assert "num_train_epochs 7" in caplog.text


def test_a_revised_plan_is_continuous():
    first = Plan(steps=100, unit=10.0, warmup=2.0)
    for step in (0, 5, 20, 60, 99):
        second = first.replan(step, 300, 12.0, 2.0)
        for measure in ("units", "decay", "progress"):
            assert getattr(second, measure)(step) == pytest.approx(getattr(first, measure)(step))
        assert second.progress(300) == second.decay(300) == 1
    assert first.decay(20) == 0
    assert first.decay(60) == 0.5


@pytest.mark.parametrize(
    ("seconds", "done", "steps"),
    [
        (7, 1, 2),  # 2 s, and 5 s for the evaluation at the end
        (14, 1, 9),  # the end is the first regular evaluation
        (18, 1, 9),  # not enough for more steps and another evaluation
        (21, 1, 11),
        (29, 1, 19),
        (34, 4, 19),  # evaluations at 10, 20 and 23
        (4, 4, 0),
        (4, 10, 0),
        (12, 10, 2),  # including the evaluation of step 10
    ],
)
def test_steps_and_evaluations_that_fit(seconds, done, steps):
    assert steps_left(seconds, 1.0, done, 10, 5.0) == steps


def test_steps_that_fit_without_evaluations():
    assert steps_left(34.4, 1.0, 3, None, 0.0) == steps_left(34.4, 1.0, 3, 10, 0.0) == 34
    assert steps_left(-1.0, 1.0, 3, None, 0.0) == 0


@pytest.mark.slow
def test_time_after_the_last_kept_checkpoint_counts(make_trainer, tmp_path):
    options = {"max_minutes": 0.5, "save_strategy": "steps", "save_steps": 4, "save_total_limit": 20}
    trainer = make_trainer(FakeClock(1.0), **options)
    run(trainer)
    trainer.save_state()
    resumed = make_trainer(FakeClock(1.0), **options)
    assert run(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-4")) == 0  # such as the best one
    assert resumed.state.global_step == 4

    again = make_trainer(FakeClock(1.0), **options)  # from the start, which resets the time
    again.add_callback(Stop(10))
    run(again)
    resumed = make_trainer(FakeClock(1.0), **options)
    assert run(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-8")) > 15


def test_time_used_up_before_a_step_is_timed_is_logged(make_trainer, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(FakeClock(1.0, first=60.0), max_minutes=0.5)
        run(trainer)
    assert trainer.state.global_step == 1
    assert "at step 1" in caplog.text
