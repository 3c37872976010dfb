"""Schedules of a pretraining run, as plain arrays with one value per optimizer step."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..utils.time_budget import MAX_WARMUP_SHARE, Plan

if TYPE_CHECKING:
    from .arguments import ASiTPreTrainingArguments

# With max_minutes: schedules given in epochs are shortened if they would take more of the run than this.
MAX_TEMPERATURE_SHARE, MAX_FREEZE_SHARE = 0.3, 0.1


def half_cosine(start: float, end: float, progress: np.ndarray) -> np.ndarray:
    """From `start` at progress 0 to `end` at progress 1."""
    return end + 0.5 * (start - end) * (1 + np.cos(np.pi * progress))


def cosine_schedule(start: float, end: float, steps: int, warmup_steps: int = 0) -> np.ndarray:
    """
    Linear warm-up from 0 to `start` over `warmup_steps`, then a half cosine from `start` towards `end`: `(steps,)`.
    A warm-up longer than the run is truncated.
    """
    warmup = np.linspace(0.0, start, warmup_steps)[:steps]
    remaining = np.arange(steps - len(warmup))
    return np.concatenate((warmup, half_cosine(start, end, remaining / max(len(remaining), 1))))


def stepwise_schedule(start: float, end: float, steps: int, steps_per_epoch: int, warmup_epochs: int) -> np.ndarray:
    """
    From `start` to `end` in equal increments, one per epoch over `warmup_epochs`, then constant: `(steps,)`. A run
    shorter than the warm-up does not reach `end`.
    """
    epochs = np.arange(steps) // steps_per_epoch
    values = np.append(np.linspace(start, end, warmup_epochs), end)
    return values[np.minimum(epochs, warmup_epochs)]


@dataclass(frozen=True)
class Schedules:
    """Everything that changes over a run, one value per optimizer step: arrays of shape `(steps,)`."""

    learning_rate: np.ndarray
    weight_decay: np.ndarray
    teacher_momentum: np.ndarray
    teacher_temperature: np.ndarray

    def at(self, step: int) -> dict[str, float]:
        """The values at a step; after the end, the last ones."""
        step = min(step, len(self.learning_rate) - 1)
        return {name: float(values[step]) for name, values in vars(self).items()}

    def after(self, before: "Schedules", step: int) -> "Schedules":
        """The values of `before` up to `step`, and these from there on."""
        values = vars(before)
        return Schedules(**{name: np.append(values[name][:step], mine[step:]) for name, mine in vars(self).items()})


def epoch_schedules(args: "ASiTPreTrainingArguments", steps: int, steps_per_epoch: int) -> Schedules:
    """The schedules of a run of a known number of steps."""
    warmup_steps, warmup_epochs = round(args.warmup_epochs * steps_per_epoch), args.warmup_teacher_temperature_epochs
    temperatures = args.warmup_teacher_temperature, args.teacher_temperature
    return Schedules(
        learning_rate=cosine_schedule(args.learning_rate, args.min_learning_rate, steps, warmup_steps),
        weight_decay=cosine_schedule(args.weight_decay, args.weight_decay_end, steps),
        teacher_momentum=cosine_schedule(args.teacher_momentum, args.teacher_momentum_end, steps),
        teacher_temperature=stepwise_schedule(*temperatures, steps, steps_per_epoch, warmup_epochs),
    )


def planned_schedules(args: "ASiTPreTrainingArguments", plan: Plan) -> Schedules:
    """The schedules of a run by time, valid from the step at which its plan begins; the plan's unit is an epoch."""
    steps = np.arange(plan.steps)
    epochs = plan.units(steps)
    rising = args.learning_rate * epochs / max(plan.warmup, 1e-9)
    falling = half_cosine(args.learning_rate, args.min_learning_rate, plan.decay(steps))
    progress, warmup_epochs = plan.progress(steps), args.warmup_teacher_temperature_epochs
    temperatures = args.warmup_teacher_temperature, args.teacher_temperature
    temperature_by_epoch = stepwise_schedule(*temperatures, warmup_epochs + 1, 1, warmup_epochs)
    return Schedules(
        learning_rate=np.where(epochs < plan.warmup, rising, falling),
        weight_decay=half_cosine(args.weight_decay, args.weight_decay_end, progress),
        teacher_momentum=half_cosine(args.teacher_momentum, args.teacher_momentum_end, progress),
        teacher_temperature=temperature_by_epoch[np.minimum(epochs.astype(int), warmup_epochs)],
    )


def fitting_epoch(args: "ASiTPreTrainingArguments", steps: int | None, steps_per_epoch: int) -> tuple[float, str]:
    """
    Optimizer steps per epoch of the schedules in a run of `steps` steps (`None`: not known yet), and a note for the
    user if that epoch was shortened because the schedules given in epochs do not fit the run.
    """
    length = float(steps_per_epoch)
    for epochs, share in (
        (args.warmup_epochs, MAX_WARMUP_SHARE),
        (args.warmup_teacher_temperature_epochs, MAX_TEMPERATURE_SHARE),
        (args.freeze_last_layer_epochs, MAX_FREEZE_SHARE),
    ):
        if steps is not None and epochs > 0:
            length = min(length, share * steps / epochs)
    if length == steps_per_epoch:
        return length, ""
    names = ("warmup_epochs", "warmup_teacher_temperature_epochs", "freeze_last_layer_epochs")
    return length, (
        f"{steps} steps are {steps / steps_per_epoch:.3g} epochs, too few for schedules given in epochs: "
        f"{', '.join(f'{name} {getattr(args, name):g}' for name in names)} are shortened to "
        f"{length / steps_per_epoch:.0%}"
    )
