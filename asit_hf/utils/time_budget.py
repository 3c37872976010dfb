"""Training for a given time: the number of steps that fit is measured, and all schedules end with the run."""

import copy
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.optimization import get_scheduler
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import has_length
from transformers.utils import logging

logger = logging.get_logger(__name__)

STATE_KEY = "max_minutes"  # in trainer_state.json, among the states of callbacks
UNTIMED_STEPS = 3  # first steps, which compile, tune kernels and start the data loader
TIMED_STEPS, ANNOUNCED_STEPS = 2, 8  # timed steps before the first plan, and before it is logged
TOLERANCE = 0.03  # relative error of the number of remaining steps above which the plan is revised
MAX_WARMUP_SHARE = 0.2  # largest share of the run for a warm-up given in steps or epochs
_PROVISIONAL_STEPS = 1000  # assumed length of the run until the first plan
_STEPS_PER_SECOND = 1000  # faster than any machine; bounds Trainer's loops until the first plan
_BY_METRIC = ("reduce_lr_on_plateau", "greedy")  # schedules that do not depend on the number of steps

now = time.perf_counter


@dataclass
class TimeBudgetArguments:
    """Base class of training arguments: `max_minutes`."""

    max_minutes: float | None = HfArg(
        default=None,
        help="Training time in minutes, with compilation, evaluations and checkpoints; replaces max_steps and "
        "num_train_epochs. The number of steps is measured, and all schedules end with it.",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.max_minutes is None:
            return
        if not (math.isfinite(self.max_minutes) and self.max_minutes > 0):
            raise ValueError(f"expected max_minutes above 0 and finite, got {self.max_minutes}")
        if self.max_steps > 0:
            raise ValueError(f"max_minutes {self.max_minutes} and max_steps {self.max_steps} exclude each other")
        if self.num_train_epochs != type(self).num_train_epochs and self.should_log:
            logger.warning_once(f"num_train_epochs {self.num_train_epochs:g} is ignored: max_minutes ends the run")


@dataclass(frozen=True)
class Plan:
    """
    Progress of a run at each optimizer step from step `start` on. All measures are continuous at `start`, so that no
    schedule jumps when the plan is revised.
    """

    steps: int  # length of the whole run
    unit: float  # optimizer steps per unit of the warm-up, such as an epoch
    warmup: float  # length of the warm-up in units
    start: int = 0  # first step of the plan
    units_done: float = 0.0  # this and the following: the measures at `start`
    decay_done: float = 0.0
    done: float = 0.0

    def units(self, step: int | np.ndarray) -> Any:
        """Units completed at `step`; the warm-up ends at `warmup`."""
        return self.units_done + np.maximum(step - self.start, 0) / self.unit

    def decay(self, step: int | np.ndarray) -> Any:
        """Completed share of the steps after the warm-up, 0 to 1."""
        warmup_end = self.start + max(0.0, self.warmup - self.units_done) * self.unit
        return _ramp(step, warmup_end, self.decay_done, self.steps)

    def progress(self, step: int | np.ndarray) -> Any:
        """Completed share of the run, 0 to 1."""
        return _ramp(step, self.start, self.done, self.steps)

    def replan(self, step: int, steps: int, unit: float, warmup: float) -> "Plan":
        """The plan from `step` on for a run of `steps` steps in total."""
        measures = (self.units(step), self.decay(step), self.progress(step))
        return Plan(steps, unit, warmup, step, *map(float, measures))


def _ramp(step: int | np.ndarray, start: float, value: float, end: float) -> Any:
    """Linear from `value` at `start` to 1 at `end`."""
    return value + (1 - value) * np.clip((step - start) / max(end - start, 1e-9), 0.0, 1.0)


class TimeBudget(TrainerCallback):
    """
    Sets `state.max_steps` and the trainer's schedules so that the run ends after `args.max_minutes`.

    The projected end is checked each time the number of timed steps has doubled, later after every tenth of the
    remaining steps, and after evaluations and checkpoints. Only these checks synchronize the accelerator and share the
    main process's time with all processes.
    """

    def __init__(self, trainer: "TimeBudgetMixin"):
        self.trainer = trainer
        self.seconds = 60 * trainer.args.max_minutes
        self.most_steps = math.ceil(self.seconds * _STEPS_PER_SECOND)

    def reset(self) -> None:
        """Starts a run whose length is not known yet."""
        self.planned = self.announced = self.noted = self.due = False
        self.spent_before = self.last_evaluation = self.evaluations = 0.0  # seconds
        self.first_step = self.next_check = 0
        self.timed_from: tuple[int, float] | None = None
        self.plan = Plan(_PROVISIONAL_STEPS, *self.trainer.pace(None))
        self.trainer.follow_plan(self.plan)

    def spent(self) -> float:
        """Seconds used, including those before a resume."""
        return self.spent_before + now() - self.began

    def state(self) -> dict[str, Any]:
        """The state that a resumed run restores, as JSON."""
        plan = asdict(self.plan) if self.planned else None
        return {"minutes": self.trainer.args.max_minutes, "seconds": self.spent(), "plan": plan}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        ended = Path(args.output_dir) / TRAINER_STATE_NAME  # written when a run ends
        if state.global_step == 0 and state.is_world_process_zero:
            ended.unlink(missing_ok=True)  # the time of an earlier run does not count
        saved = state.stateful_callbacks.get(STATE_KEY) if state.global_step else None
        if saved is not None:
            self._resume(args, saved, ended)
        self.first_step = state.global_step
        self.next_check = state.global_step + 1
        spent = self._agree(args)[0]
        if saved is not None and state.is_world_process_zero:
            logger.warning(f"max_minutes {args.max_minutes:g}: {spent / 60:.2f} minutes were used before the resume")
        steps = self.plan.steps if self.planned else self.most_steps
        self._set_steps(args, state, state.global_step if spent >= self.seconds else steps)

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        done = state.global_step + 1  # not in on_step_end, where Trainer's own callback compares with max_steps
        if done >= state.max_steps:
            return
        over = args.world_size == 1 and self.spent() >= self.seconds
        if over or self.due or done >= self.next_check:
            self.due = False
            self._check(args, state, done)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self.trainer.steps_per_endless_epoch:
            state.epoch = state.global_step / self.trainer.steps_per_endless_epoch

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        state.stateful_callbacks[STATE_KEY] = self.state()

    def _check(self, args: TrainingArguments, state: TrainerState, done: int) -> None:
        spent, last_evaluation, evaluations = self._agree(args)
        training = spent - evaluations  # including checkpoints and plots
        if spent >= self.seconds:
            if not self.planned and state.is_world_process_zero:
                logger.warning(
                    f"max_minutes {args.max_minutes:g}: the time was used up at step {done}, before a step could be "
                    f"timed (the first {UNTIMED_STEPS} include compilation) and the schedules planned: increase it"
                )
            self._set_steps(args, state, done)
        elif done - self.first_step < UNTIMED_STEPS:
            self.next_check = done + 1
        elif self.timed_from is None:
            self.timed_from = (done, training)
            self.next_check = done + TIMED_STEPS
        else:
            timed = done - self.timed_from[0]
            step_seconds = max((training - self.timed_from[1]) / timed, 1 / _STEPS_PER_SECOND)
            interval = {"steps": state.eval_steps, "epoch": self.trainer.steps_per_pass}.get(args.eval_strategy)
            left = steps_left(self.seconds - spent, step_seconds, done, interval, last_evaluation)
            if timed >= TIMED_STEPS:
                self._replan(args, state, done, left)
                if state.is_world_process_zero and (timed >= ANNOUNCED_STEPS or left <= ANNOUNCED_STEPS):
                    self._announce(args, step_seconds)
            self.next_check = done + max(1, min(timed, (self.plan.steps - done) // 10))

    def _replan(self, args: TrainingArguments, state: TrainerState, done: int, left: int) -> None:
        steps = done + left
        if self.planned and left and abs(steps - self.plan.steps) <= TOLERANCE * (self.plan.steps - done):
            return
        logger.debug(f"step {done}: {steps} steps fit the time, {self.plan.steps} were planned")
        self._follow(self.plan.replan(done, steps, *self.trainer.pace(steps)))
        self._set_steps(args, state, steps)

    def _resume(self, args: TrainingArguments, saved: dict[str, Any], ended: Path) -> None:
        self.spent_before = saved["seconds"]
        if ended.is_file():  # includes the time after the last checkpoint that was kept
            states = TrainerState.load_from_json(str(ended)).stateful_callbacks
            self.spent_before = max(self.spent_before, states.get(STATE_KEY, {}).get("seconds", 0.0))
        if saved["plan"] is not None:
            plan = Plan(**saved["plan"])
            if args.max_minutes != saved["minutes"]:  # the schedules are recomputed for the new length
                steps = max(1, round(plan.steps * (args.max_minutes / saved["minutes"])))
                plan = Plan(steps, *self.trainer.pace(steps))
            self._follow(plan)

    def _follow(self, plan: Plan) -> None:
        self.plan, self.planned = plan, True
        self.trainer.follow_plan(plan)

    def _set_steps(self, args: TrainingArguments, state: TrainerState, steps: int) -> None:
        state.max_steps = steps
        if steps < self.most_steps:
            state.num_train_epochs = math.ceil(steps / self.trainer.steps_per_pass)
            state.compute_steps(args, steps)
        for callback in self.trainer.callback_handler.callbacks:
            bar = getattr(callback, "training_bar", None)
            if bar is not None:
                bar.total = steps if self.planned else None
                bar.refresh()

    def _announce(self, args: TrainingArguments, step_seconds: float) -> None:
        if not self.announced:
            self.announced = True
            logger.warning(f"max_minutes {args.max_minutes:g}: {self.plan.steps} steps of {step_seconds:.3g} s fit")
        if self.trainer.pace_note and not self.noted:
            self.noted = True
            logger.warning(self.trainer.pace_note)

    def _agree(self, args: TrainingArguments) -> list[float]:
        """The main process's seconds used, of the last evaluation, and of all evaluations since the start."""
        # torch 2.6 raises an error in current_accelerator() if there is none
        if torch.accelerator.is_available() and args.device.type == torch.accelerator.current_accelerator().type:
            torch.accelerator.synchronize(args.device)
        seconds = [self.spent(), self.last_evaluation, self.evaluations]
        if args.world_size > 1:
            shared = torch.tensor(seconds, dtype=torch.float64, device=args.device)
            torch.distributed.broadcast(shared, src=0)
            seconds = shared.tolist()
        return seconds


def steps_left(seconds: float, step_seconds: float, done: int, interval: int | None, evaluation: float) -> int:
    """
    Steps after step `done` (at least 1) that fit `seconds` together with their evaluations of `evaluation` seconds
    each: one after every `interval` steps of the run and one at its end.
    """
    if interval is None or evaluation == 0:
        return max(0, round(seconds / step_seconds))
    steps = 0
    to_next = -done % interval  # the evaluation of step `done` itself is still to come
    if seconds >= to_next * step_seconds + evaluation:
        seconds -= to_next * step_seconds + evaluation
        periods, seconds = divmod(seconds, interval * step_seconds + evaluation)
        steps = to_next + int(periods) * interval
    return steps + max(0, round((seconds - evaluation) / step_seconds))


class TimeBudgetMixin:
    """
    Adds `max_minutes` to a Trainer whose arguments are [`TimeBudgetArguments`]: it trains as many steps as fit, and
    scales the schedule of `lr_scheduler_type` to them. A trainer with its own schedules overrides `pace` and
    `follow_plan`, or `lr_factor`.
    """

    budget: TimeBudget | None = None
    pace_note: str = ""  # logged once: how `pace` shortened the warm-up
    steps_per_pass: int = 1  # optimizer steps per pass over the data
    steps_per_endless_epoch: int | None = None  # for data without a length whose epochs the user defines

    def __init__(self, model: nn.Module, args: TrainingArguments, **kwargs: Any):
        if args.max_minutes is None:
            super().__init__(model=model, args=args, **kwargs)
            return
        if not has_length(kwargs.get("train_dataset")):
            args.max_steps = 1  # Trainer requires it for data without a length
        try:
            super().__init__(model=model, args=args, **kwargs)
        finally:
            args.max_steps = -1
        self.budget = TimeBudget(self)
        self.add_callback(self.budget)

    def pace(self, steps: int | None) -> tuple[float, float]:
        """
        Optimizer steps per unit, and the warm-up in units; here the unit is the warm-up itself.

        Args:
            steps (`int`, *optional*): length of the run, which limits the warm-up; `None`: not known yet.
        """
        self.pace_note = ""
        asked = cut = self.args.get_warmup_steps(steps or _PROVISIONAL_STEPS)
        if steps is not None and self.args.warmup_steps >= 1 and asked > MAX_WARMUP_SHARE * steps:
            cut = MAX_WARMUP_SHARE * steps
            self.pace_note = f"the warm-up of {asked} steps is too long for this run: it is cut to {cut:.0f}"
        return max(1.0, cut), float(asked > 0)

    def follow_plan(self, plan: Plan) -> None:
        """Sets the schedules according to a plan."""
        if self.args.lr_scheduler_type in _BY_METRIC:
            return
        unused = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=self.args.learning_rate)
        options = (plan.warmup * plan.unit, plan.steps, self.args.lr_scheduler_kwargs)
        scheduler = get_scheduler(self.args.lr_scheduler_type, unused, *options)
        self._factor_at = scheduler.lr_lambdas[0]

    def lr_factor(self, step: int) -> float:
        """Factor of the peak learning rates at an optimizer step."""
        plan = self.budget.plan
        if plan.units(step) < plan.warmup:
            return self._factor_at(plan.units(step) * plan.unit)
        warmup_steps = plan.warmup * plan.unit
        return self._factor_at(warmup_steps + plan.decay(step) * (plan.steps - warmup_steps))

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        if self.budget is not None:
            self.budget.reset()
            if self.lr_scheduler is None and self.args.lr_scheduler_type not in _BY_METRIC:
                self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: self.lr_factor(step))
                self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> tuple:
        if self.budget is None:
            return super().set_initial_training_values(args, dataloader)
        bounded = copy.copy(args)
        bounded.max_steps = self.budget.most_steps
        values = super().set_initial_training_values(bounded, dataloader)
        self.steps_per_pass = values[1]
        return values

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple:
        samples = super().get_batch_samples(*args, **kwargs)
        if self.budget is not None and not samples[0]:
            self.control.should_epoch_stop = True  # the end of data of unknown length
        return samples

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        start = now()
        metrics = super().evaluate(*args, **kwargs)
        if self.budget is not None and self.is_in_train:
            self.budget.last_evaluation = now() - start
            self.budget.evaluations += self.budget.last_evaluation
            self.budget.due = True
        return metrics

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.budget is not None:
            self.budget.began = now()
        return super().train(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.budget is not None and self.state.global_step >= self.state.max_steps:
            logger.warning(f"nothing to do: max_minutes was used up at step {self.state.global_step}")
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self.budget is not None:
            self.state.stateful_callbacks[STATE_KEY] = self.budget.state()
            self.budget.due = True
        super()._save_checkpoint(*args, **kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: int, *args: Any) -> Any:
        if self.budget is not None:
            if self.state.max_steps == self.budget.most_steps:  # stopped before the first plan
                self.state.max_steps = self.state.global_step
            num_train_samples = self.state.max_steps * self.get_total_train_batch_size(self.args)
        return super()._finalize_training(trial, num_train_samples, *args)
