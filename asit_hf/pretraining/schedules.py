"""Schedules of a pretraining run, as plain arrays with one value per optimizer step."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ..utils.time_budget import Plan


def half_cosine(start: float, end: float, progress: np.ndarray) -> np.ndarray:
    """From `start` at a progress of 0 to `end` at 1."""
    return end + 0.5 * (start - end) * (1 + np.cos(np.pi * progress))


def cosine_schedule(start: float, end: float, steps: int, warmup_steps: int = 0) -> np.ndarray:
    """
    Linear warm-up from 0 to `start` over `warmup_steps`, then a half cosine from `start` towards `end`: `(steps,)`.
    A warm-up longer than the run is cut.
    """
    warmup = np.linspace(0.0, start, warmup_steps)[:steps]
    remaining = np.arange(steps - len(warmup))
    return np.concatenate((warmup, half_cosine(start, end, remaining / max(len(remaining), 1))))


def stepwise_schedule(start: float, end: float, steps: int, steps_per_epoch: int, warmup_epochs: int) -> np.ndarray:
    """
    From `start` to `end` in equal steps, one an epoch, over `warmup_epochs`, then constant: `(steps,)`. A run shorter
    than the warm-up ends on its way.
    """
    epochs = np.arange(steps) // steps_per_epoch
    values = np.append(np.linspace(start, end, warmup_epochs), end)
    return values[np.minimum(epochs, warmup_epochs)]


@dataclass(frozen=True)
class Schedules:
    """One value per optimizer step of everything that changes over a run; arrays of shape `(steps,)`."""

    learning_rate: np.ndarray
    weight_decay: np.ndarray
    teacher_momentum: np.ndarray
    teacher_temperature: np.ndarray

    def at(self, step: int) -> dict[str, float]:
        """The values at a step; past the end, the last ones."""
        step = min(step, len(self.learning_rate) - 1)
        return {name: float(values[step]) for name, values in vars(self).items()}

    def after(self, before: "Schedules", step: int) -> "Schedules":
        """These from `step` on, and the others before it."""
        values = vars(before)
        return Schedules(**{name: np.append(values[name][:step], mine[step:]) for name, mine in vars(self).items()})


def planned_schedules(
    plan: "Plan",
    learning_rate: tuple[float, float],
    weight_decay: tuple[float, float],
    teacher_momentum: tuple[float, float],
    teacher_temperature: tuple[float, float],
    warmup_teacher_temperature_epochs: int,
) -> Schedules:
    """
    The schedules of a run by time, from the step on that its plan begins at; values come as (start, end), and the unit
    of the plan is an epoch.
    """
    steps = np.arange(plan.steps)
    epochs = plan.units(steps)
    warmup = learning_rate[0] * epochs / max(plan.warmup, 1e-9)
    temperatures = np.append(
        np.linspace(*teacher_temperature, warmup_teacher_temperature_epochs), teacher_temperature[1]
    )
    return Schedules(
        learning_rate=np.where(epochs < plan.warmup, warmup, half_cosine(*learning_rate, plan.decay(steps))),
        weight_decay=half_cosine(*weight_decay, plan.progress(steps)),
        teacher_momentum=half_cosine(*teacher_momentum, plan.progress(steps)),
        teacher_temperature=temperatures[np.minimum(epochs.astype(int), warmup_teacher_temperature_epochs)],
    )
