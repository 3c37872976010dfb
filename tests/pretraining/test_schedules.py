import numpy as np
import pytest

from asit_hf.pretraining.schedules import Schedules, cosine_schedule, stepwise_schedule


def test_cosine_with_warmup():
    values = cosine_schedule(1.0, 0.1, steps=100, warmup_steps=10)
    assert len(values) == 100
    assert values[0] == 0
    assert values[9] == values[10] == 1.0
    assert (np.diff(values[10:]) < 0).all()
    assert 0.1 < values[-1] < 0.1 + 1e-3


def test_cosine_is_the_mean_of_both_ends_in_the_middle():
    assert cosine_schedule(0.04, 0.4, steps=100)[50] == pytest.approx(0.22)


@pytest.mark.parametrize("warmup", [0, 7, 30])
def test_a_warmup_longer_than_the_run_is_truncated(warmup):
    values = cosine_schedule(1.0, 0.0, steps=5, warmup_steps=warmup)
    assert len(values) == 5
    assert np.isfinite(values).all()


def test_teacher_temperature_rises_once_per_epoch():
    values = stepwise_schedule(0.04, 0.07, steps=18, steps_per_epoch=3, warmup_epochs=4)
    expected = [0.04, 0.05, 0.06, 0.07, 0.07, 0.07]
    np.testing.assert_allclose(values, np.repeat(expected, 3))


@pytest.mark.parametrize("warmup_epochs", [0, 1, 50])
def test_a_run_shorter_than_the_temperature_warmup_works(warmup_epochs):
    values = stepwise_schedule(0.04, 0.07, steps=6, steps_per_epoch=2, warmup_epochs=warmup_epochs)
    assert len(values) == 6
    assert values[0] == (0.07 if warmup_epochs == 0 else 0.04)
    assert values.max() <= 0.07


def test_after_the_end_the_last_values_hold():
    schedules = Schedules(*(np.arange(4.0) for _ in range(4)))
    assert schedules.at(2)["weight_decay"] == 2
    assert schedules.at(9)["teacher_momentum"] == 3
