"""Trainer with what finetuning recipes ask for beyond its own options."""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..data.epochs import EpochCallback
from ..evaluation.metrics import MAIN_METRIC
from ..hub.upload import PushMixin
from ..utils.cpu import warn_of_emulated_bf16
from ..utils.time_budget import TimeBudgetArguments, TimeBudgetMixin
from .optimization import average_checkpoints, param_groups_layer_decay, smooth_labels, step_decay

_DECAY_STEP, _DECAY_GAMMA = 1, 0.5


@dataclass
class FinetuningArguments(TimeBudgetArguments, TrainingArguments):
    """Trainer's arguments with other defaults, and those that it lacks."""

    eval_strategy: str = field(default="epoch", metadata={"help": "no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "no, steps, epoch or best."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept beside the best."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Keep the best checkpoint, not the last."})
    metric_for_best_model: str | None = field(
        default="auto", metadata={"help": "auto: accuracy, mAP or mse, as the labels have it."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false: the collator reads them."})
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Share of every target, soft or several ones too, spread over all classes."}
    )
    layer_decay: float = field(
        default=1.0, metadata={"help": "Each layer's learning rate, as a share of that of the layer above it."}
    )
    lr_decay_start: int | None = field(
        default=None,
        metadata={"help": "AST's step decay instead of lr_scheduler_type: epochs before the first."},
    )
    lr_decay_step: int = field(default=_DECAY_STEP, metadata={"help": "Epochs from one decay to the next."})
    lr_decay_gamma: float = field(
        default=_DECAY_GAMMA, metadata={"help": "What the learning rate is multiplied with at each."}
    )
    average_checkpoints: int = field(
        default=0,
        metadata={"help": "Save the weights after each of the last epochs (OUTPUT/epoch-NN) and keep their mean."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor takes one class id a clip: set label_smoothing, which takes any")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {self.label_smoothing}")
        decay = (self.lr_decay_step, self.lr_decay_gamma)
        if self.lr_decay_start is None and decay != (_DECAY_STEP, _DECAY_GAMMA):
            raise ValueError("lr_decay_step and lr_decay_gamma have no effect without lr_decay_start")
        if min(self.lr_decay_start or 0, self.lr_decay_step - 1, self.average_checkpoints) < 0:
            raise ValueError(
                "lr_decay_start and average_checkpoints must be at least 0 and lr_decay_step at least 1, got "
                f"{self.lr_decay_start}, {self.average_checkpoints} and {self.lr_decay_step}"
            )
        if self.average_checkpoints and self.load_best_model_at_end:
            raise ValueError(
                "average_checkpoints keeps a mean and load_best_model_at_end the best checkpoint: set one of them to "
                "0 or false"
            )

    def choose_metric(self, problem_type: str) -> None:
        """The main metric of labels of this `problem_type`, unless another one was named."""
        if self.metric_for_best_model == "auto":
            self.metric_for_best_model, self.greater_is_better = MAIN_METRIC[problem_type]


class FinetuningTrainer(TimeBudgetMixin, PushMixin, Trainer):
    """
    Finetunes a classifier: learning rates by layer, AST's step decay, label smoothing of soft and of several labels,
    and the mean of the last epochs' weights, as [`FinetuningArguments`] say. Tells the data set the epoch.
    """

    def __init__(self, model: nn.Module, args: FinetuningArguments, **kwargs: Any):
        super().__init__(model=model, args=args, **kwargs)
        self.add_callback(EpochCallback(self.train_dataset))
        if args.average_checkpoints:
            self.add_callback(_EpochWeights(lambda folder: self.save_model(str(folder), _internal_call=True)))
        warn_of_emulated_bf16(args)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> tuple:
        values = super().set_initial_training_values(args, dataloader)
        self._steps_per_epoch = values[1]
        return values

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            args = self.args
            groups = param_groups_layer_decay(model, args.learning_rate, args.weight_decay, args.layer_decay)
            self.optimizer = optimizer_class(groups, **kwargs)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        args = self.args
        if self.budget is None and self.lr_scheduler is None and args.lr_decay_start is not None:
            warmup_steps = args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,
                lambda step: step_decay(
                    step,
                    self._steps_per_epoch,
                    args.lr_decay_start,
                    args.lr_decay_step,
                    args.lr_decay_gamma,
                    warmup_steps,
                ),
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def lr_factor(self, step: int) -> float:
        args, plan = self.args, self.budget.plan
        if args.lr_decay_start is None:
            return super().lr_factor(step)
        warmup = min(1.0, float(plan.units(step))) if plan.warmup else 1.0
        return warmup * step_decay(
            step, self._steps_per_epoch, args.lr_decay_start, args.lr_decay_step, args.lr_decay_gamma
        )

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        factor = self.args.label_smoothing
        if factor and model.training:
            num_labels = self.accelerator.unwrap_model(model).config.num_labels
            inputs = {**inputs, "labels": smooth_labels(inputs["labels"], num_labels, factor)}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def load_average(self) -> None:
        """After training: the mean of the weights of the last epochs becomes the model's."""
        self.accelerator.wait_for_everyone()  # until the first process has written the last one
        last = self.state.num_train_epochs
        first = max(1, last - self.args.average_checkpoints + 1)
        folders = [epoch_folder(self.args.output_dir, epoch) for epoch in range(first, last + 1)]
        self.accelerator.unwrap_model(self.model).load_state_dict(average_checkpoints(folders))


class _EpochWeights(TrainerCallback):
    """Saves the weights after each epoch that will be averaged. Every process calls `save`."""

    def __init__(self, save: Callable[[Path], None]):
        self.save = save

    def on_epoch_end(self, args, state, control, **kwargs):
        epoch = math.ceil(round(state.epoch, 6))
        if args.max_minutes is not None:  # any epoch may turn out to be among the last
            self.save(epoch_folder(args.output_dir, epoch))
            if args.should_save:
                before = epoch_folder(args.output_dir, epoch - args.average_checkpoints)
                shutil.rmtree(before, ignore_errors=True)
        elif epoch > state.num_train_epochs - args.average_checkpoints:
            self.save(epoch_folder(args.output_dir, epoch))


def epoch_folder(output_dir: str, epoch: int) -> Path:
    """Where the weights after an epoch, counted from 1, are saved."""
    return Path(output_dir) / f"epoch-{epoch:02d}"
