"""Schedules of a pretraining run, as plain arrays with one value per optimiser step."""

from dataclasses import dataclass

import numpy as np


def cosine_schedule(start: float, end: float, steps: int, warmup_steps: int = 0) -> np.ndarray:
    """
    Linear warm-up from 0 to `start` over `warmup_steps`, then a half cosine from `start` towards `end`: `(steps,)`.
    A warm-up longer than the run is cut.
    """
    warmup = np.linspace(0.0, start, warmup_steps)[:steps]
    remaining = np.arange(steps - len(warmup))
    cosine = end + 0.5 * (start - end) * (1 + np.cos(np.pi * remaining / max(len(remaining), 1)))
    return np.concatenate((warmup, cosine))


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
    """One value per optimiser step of everything that changes over a run; arrays of shape `(steps,)`."""

    learning_rate: np.ndarray
    weight_decay: np.ndarray
    teacher_momentum: np.ndarray
    teacher_temperature: np.ndarray

    def at(self, step: int) -> dict[str, float]:
        """The values at a step; past the end, the last ones."""
        step = min(step, len(self.learning_rate) - 1)
        return {name: float(values[step]) for name, values in vars(self).items()}
