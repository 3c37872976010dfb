"""A Trainer with layer-wise learning rates, AST's step decay, label smoothing and averaged checkpoints."""

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.optimization import get_scheduler
from transformers.trainer_utils import has_length

from ..data.epochs import EpochCallback
from ..evaluation.metrics import MAIN_METRIC
from ..hub.upload import PushMixin
from ..utils.arguments import check_inherited, refuse_without_effect
from ..utils.attention_cpu import choose_bf16_attention
from ..utils.cpu import warn_of_emulated_bf16
from ..utils.time_budget import TimeBudgetArguments, TimeBudgetMixin
from .calibration import calibrate_layer, last_linear
from .optimization import average_checkpoints, param_groups_layer_decay, smooth_labels, step_decay

# Options of TrainingArguments that training and evaluating a classifier cannot follow, by the reason.
_NO_EFFECT = {
    "the metrics take the logits and labels of all clips": (
        "prediction_loss_only batch_eval_metrics eval_do_concat_batches include_for_metrics"
    ),
    "batches are spectrograms with labels, without columns or tokens": (
        "length_column_name use_cache use_liger_kernel liger_kernel_config optim_target_modules"
    ),
    "it does not support the model's Boolean masks": "debug",
    "python -m asit_hf.predict classifies audio without labels": "do_predict",
}
_ALLOWED = {
    "label_names": (None, ["labels"]),
    "remove_unused_columns": (False,),
    "train_sampling_strategy": ("random", "sequential"),
    "include_num_input_tokens_seen": ("no", False),  # the parser takes its default for false
}


@dataclass
class SupervisedArguments(TimeBudgetArguments, TrainingArguments):
    """Trainer's arguments for clip and frame classifiers. Options that could only fail or do nothing are refused."""

    without_effect = " ".join(_NO_EFFECT.values()).split()

    do_train: bool = HfArg(default=True, help="False, with --do_eval True: only evaluate a trained classifier.")
    eval_strategy: str = HfArg(default="epoch", help="When to evaluate: no, steps or epoch.")
    save_strategy: str = HfArg(default="epoch", help="When to save: no, steps, epoch or best.")
    save_total_limit: int | None = HfArg(default=1, help="Checkpoints to keep besides the best.")
    remove_unused_columns: bool = HfArg(default=False, help="Must stay false: the collator needs them.")

    def __post_init__(self):
        check_inherited(self, _NO_EFFECT, _ALLOWED)
        for precision in ("bf16", "fp16"):
            if getattr(self, f"{precision}_full_eval") and not getattr(self, precision):
                raise ValueError(f"{precision}_full_eval needs {precision}, as the features are float32 without it")
        if self.fp16 and not torch.accelerator.is_available():
            raise ValueError("fp16 has no effect without an accelerator: use bf16, which a CPU computes too")
        if not self.do_train:
            if not self.do_eval:  # transformers sets it by eval_strategy
                raise ValueError("do_train False leaves nothing to do: set do_eval True to evaluate a classifier")
            if self.push_to_hub or self.resume_from_checkpoint:
                raise ValueError("push_to_hub and resume_from_checkpoint cannot be used with do_train False")
        super().__post_init__()
        try:  # what Trainer would find out after the data are read
            Trainer.get_optimizer_cls_and_kwargs(self)
            schedule = {"num_warmup_steps": 0, "num_training_steps": 1}
            kwargs = self.lr_scheduler_kwargs or {}
            optimizer = torch.optim.SGD([torch.zeros(1)], lr=self.learning_rate)
            get_scheduler(self.lr_scheduler_type, optimizer, **schedule, scheduler_specific_kwargs=dict(kwargs))
        except (ImportError, TypeError, ValueError) as error:
            raise ValueError(f"optim or lr_scheduler_type: {error}") from error


@dataclass
class FinetuningArguments(SupervisedArguments):
    """The arguments of finetuning: other defaults of Trainer's and some more options."""

    load_best_model_at_end: bool = HfArg(default=True, help="Keep the best checkpoint (first of ties), not the last.")
    metric_for_best_model: str | None = HfArg(default="auto", help="Metric of the best (auto: accuracy, mAP or mse).")
    label_smoothing: float = HfArg(default=0.0, help="Share of each target divided among all classes.")
    layer_decay: float = HfArg(default=1.0, help="Factor of the learning rate from each layer to the one below.")
    lr_decay_start: int | None = HfArg(default=None, help="First epoch of AST's step decay of the learning rate.")
    lr_decay_step: int = HfArg(default=1, help="Epochs between step decays.")
    lr_decay_gamma: float = HfArg(default=0.5, help="Factor of the learning rate at each step decay.")
    average_checkpoints: int = HfArg(default=0, help="Average the weights saved after the last N epochs.")
    calibrate: bool = HfArg(
        default=False,
        help="Divide the logits of the saved model, in its weights, by a temperature fitted on the validation data.",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor supports one class per clip only: use label_smoothing")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {self.label_smoothing}")
        if self.lr_decay_start is None:
            refuse_without_effect(self, ["lr_decay_step", "lr_decay_gamma"], "without lr_decay_start")
        else:
            refuse_without_effect(self, ["lr_scheduler_type", "lr_scheduler_kwargs"], "with lr_decay_start")
        if min(self.lr_decay_start or 0, self.lr_decay_step - 1, self.average_checkpoints) < 0:
            raise ValueError(
                "lr_decay_start and average_checkpoints must be at least 0 and lr_decay_step at least 1, got "
                f"{self.lr_decay_start}, {self.average_checkpoints} and {self.lr_decay_step}"
            )
        if self.average_checkpoints and self.load_best_model_at_end:
            raise ValueError("average_checkpoints and load_best_model_at_end exclude each other: unset one of them")

    def choose_metric(self, problem_type: str, compute_metrics: Callable, num_labels: int) -> None:
        """
        Resolves `metric_for_best_model` auto to the main metric of the labels' `problem_type`. Another one must be
        among those that `compute_metrics` gives for `num_labels` classes.
        """
        if self.metric_for_best_model == "auto":
            self.metric_for_best_model, self.greater_is_better = MAIN_METRIC[problem_type]
            return
        scores = np.eye(num_labels)
        targets = np.arange(num_labels) if problem_type == "single_label_classification" else scores > 0.5
        if problem_type == "multi_label_classification":
            targets = np.maximum(targets, targets[:1])
        known = ["loss", *compute_metrics(EvalPrediction(scores, targets))]
        if self.metric_for_best_model.removeprefix("eval_") not in known:
            got = f"got {self.metric_for_best_model!r}"
            raise ValueError(f"expected metric_for_best_model among {', '.join(known)}; {got}")


class SupervisedTrainer(TimeBudgetMixin, PushMixin, Trainer):
    """Trainer of clip and frame classifiers. `dataloader_drop_last` applies to training only."""

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        if has_length(self.train_dataset) and not len(loader):
            raise ValueError(
                f"the training data contain {len(self.train_dataset)} clips, less than one batch: lower "
                "per_device_train_batch_size or set dataloader_drop_last to False"
            )
        return loader

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        with self._every_clip():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        with self._every_clip():
            return super().get_test_dataloader(*args, **kwargs)

    @contextmanager
    def _every_clip(self) -> Iterator[None]:
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last


class FinetuningTrainer(SupervisedTrainer):
    """Trainer of a classifier with the options of [`FinetuningArguments`]."""

    def __init__(self, model: nn.Module, args: FinetuningArguments, **kwargs: Any):
        choose_bf16_attention(model, args)
        super().__init__(model=model, args=args, **kwargs)
        self.add_callback(EpochCallback(self.train_dataset))
        if args.average_checkpoints:
            self.add_callback(_EpochWeights(lambda folder: self.save_model(str(folder), _internal_call=True)))
        warn_of_emulated_bf16(args)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> tuple:
        values = super().set_initial_training_values(args, dataloader)
        decay = {"start": args.lr_decay_start, "every": args.lr_decay_step, "gamma": args.lr_decay_gamma}
        self._step_decay = partial(step_decay, steps_per_epoch=values[1], **decay)
        return values

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            args = self.args
            model = self.model if model is None else model
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(args, model)
            groups = param_groups_layer_decay(model, args.weight_decay, args.layer_decay)
            for group in groups:
                group["lr"] = args.learning_rate * group.pop("lr_scale")
            self.optimizer = optimizer_class(groups, **kwargs)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        if self.budget is None and self.lr_scheduler is None and self.args.lr_decay_start is not None:
            decay = partial(self._step_decay, warmup_steps=self.args.get_warmup_steps(num_training_steps))
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: decay(step))
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def lr_factor(self, step: int) -> float:
        if self.args.lr_decay_start is None:
            return super().lr_factor(step)
        plan = self.budget.plan
        warmup = min(1.0, float(plan.units(step))) if plan.warmup else 1.0
        return warmup * self._step_decay(step)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        factor = self.args.label_smoothing
        if factor and model.training:
            num_labels = self.accelerator.unwrap_model(model).config.num_labels
            inputs = {**inputs, "labels": smooth_labels(inputs["labels"], num_labels, factor)}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        model = self.accelerator.unwrap_model(self.model)
        if hasattr(model, "get_base_model"):  # of peft, whose adapters do not name the classes
            model.get_base_model().config.save_pretrained(output_dir or self.args.output_dir)

    def load_average(self) -> None:
        """Replaces the trained weights by the mean of those saved after the last `average_checkpoints` epochs."""
        self.accelerator.wait_for_everyone()  # until the main process has saved the last epoch
        last = self.state.num_train_epochs
        first = max(1, last - self.args.average_checkpoints + 1)
        folders = [epoch_folder(self.args.output_dir, epoch) for epoch in range(first, last + 1)]
        self.accelerator.unwrap_model(self.model).load_state_dict(average_checkpoints(folders))

    def calibrate(self) -> dict[str, float]:
        """
        Divides the logits of the trained model, in the weights of its classifier, by a temperature fitted on
        `eval_dataset`. Result and errors as in [`~asit_hf.finetuning.calibration.calibrate_classifier`].
        """
        layer = last_linear(self.accelerator.unwrap_model(self.model))
        output = self.predict(self.eval_dataset, metric_key_prefix="validation")
        return calibrate_layer(layer, output.predictions, output.label_ids)


class _EpochWeights(TrainerCallback):
    """Saves the weights after each epoch that will be averaged; `save` is called in every process."""

    def __init__(self, save: Callable[[Path], None]):
        self.save = save

    def on_epoch_end(self, args, state, control, **kwargs):
        epoch = math.ceil(round(state.epoch, 6))
        timed = args.max_minutes is not None  # so the number of epochs is not known
        if timed or epoch > state.num_train_epochs - args.average_checkpoints:
            self.save(epoch_folder(args.output_dir, epoch))
        if timed and args.should_save:
            shutil.rmtree(epoch_folder(args.output_dir, epoch - args.average_checkpoints), ignore_errors=True)


def epoch_folder(output_dir: str, epoch: int) -> Path:
    """Folder of the weights saved after an epoch, counted from 1."""
    return Path(output_dir) / f"epoch-{epoch:02d}"
