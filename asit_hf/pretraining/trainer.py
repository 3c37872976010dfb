"""ASiT's pretraining as a subclass of Trainer."""

import json
import shutil
import warnings
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length, rotate_checkpoints
from transformers.utils import logging

from ..data.collators import collate_crops
from ..data.epochs import EpochCallback
from ..data.packed import PackedCrops
from ..data.randomness import mix_keys
from ..data.workers import clear_worker_errors
from ..feature_extraction_asit import ASiTFeatureExtractor
from ..hub.cards import PushMixin
from ..modeling_asit import ASiTLayer
from ..utils.cpu import keep_freed_memory, warn_of_emulated_bf16
from ..utils.device import choices_for
from ..utils.time_budget import MAX_WARMUP_SHARE, Plan, TimeBudgetMixin
from .arguments import ASiTPreTrainingArguments
from .checkpoints import UNFINISHED, describe_failed_save, on_termination, publish
from .gradients import clip_tensor_norms, gradient_norms
from .masking import corrupt
from .modeling import ASiTForPreTraining, ASiTForPreTrainingOutput
from .monitoring import CollapseCallback
from .presets import get_preset
from .schedules import Schedules, cosine_schedule, planned_schedules, stepwise_schedule

logger = logging.get_logger(__name__)

BAD_FILES_REPORT = "bad_files.jsonl"
LARGEST_RESIDENT_SHARE = 0.5  # of an accelerator's free memory, for packed audio; training needs the rest
# With max_minutes: schedules given in epochs are shortened if they would take more of the run than this.
MAX_TEMPERATURE_SHARE, MAX_FREEZE_SHARE = 0.3, 0.1
_LOGGED = (
    "global_loss",
    "local_loss",
    "reconstruction_loss",
    "cls_entropy",
    "patch_entropy",
    "cls_logit_std",
    "patch_logit_std",
    "feature_std",
)


class ASiTPreTrainer(TimeBudgetMixin, PushMixin, Trainer):
    """
    Pretrains an [`ASiTForPreTraining`].

    Batches hold waveform crops, as [`~asit_hf.data.PretrainingCrops`] reads them, or the keys of crops that are
    gathered here from [`~asit_hf.data.PackedCrops`]; log-mel, normalization and GMML run here, in batch, on the
    model's device. A batch may bring `input_values`, `corrupted_values`, `corruption_mask` and `local_values` of its
    own instead: what is there is used as it is.

    Args:
        model ([`ASiTForPreTraining`]): the model.
        args ([`ASiTPreTrainingArguments`]): the arguments.
        processing_class ([`ASiTFeatureExtractor`]): rate and normalization of the data; saved with every checkpoint.
        data_collator (`Callable`, *optional*): by default [`~asit_hf.data.collate_crops`], for an accelerator with
            `int16=True`.
    """

    def __init__(
        self,
        model: ASiTForPreTraining,
        args: ASiTPreTrainingArguments,
        processing_class: ASiTFeatureExtractor,
        data_collator: Any = None,
        **kwargs: Any,
    ):
        if not isinstance(model, ASiTForPreTraining):
            raise TypeError(f"ASiTPreTrainer trains an ASiTForPreTraining, got {type(model).__name__}")
        if args.n_gpu > 1:
            raise ValueError(
                f"expected one GPU a process, got {args.n_gpu}: start with torchrun --nproc_per_node {args.n_gpu}"
            )
        if kwargs.get("eval_dataset") is not None:
            raise ValueError("pretraining has no evaluation data: probe its checkpoints on labelled audio instead")
        if args.bf16 and model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(choices_for(args.device).bf16_attention)
        if data_collator is None:
            data_collator = partial(collate_crops, int16=choices_for(args.device).int16_batches)
        if isinstance(kwargs.get("train_dataset"), IterableDataset):
            # dispatched batches are joined tensor by tensor, which the list of bad files is not
            args.accelerator_config.dispatch_batches = False
        super().__init__(
            model=model, args=args, processing_class=processing_class, data_collator=data_collator, **kwargs
        )
        self._check_data()
        self._compare_preset()
        self.schedules: Schedules | None = None
        self.last_example: dict[str, torch.Tensor] | None = None
        self.next_log: dict[str, float] = {}  # what callbacks add to the next log
        self.num_skipped_steps = 0
        self.terminated = False
        self._staging: Path | None = None
        self._sums: dict[str, torch.Tensor] = {}
        self._num_passes = 0
        self._last_loss = torch.zeros((), device=args.device)
        self._passes_in_step: list[_Pass] = []
        if args.compile_layers:
            model.compile_layers()
        self.add_callback(EpochCallback(self.train_dataset))
        self.add_callback(_OptimizerSteps(self))
        self.add_callback(CollapseCallback())
        if args.plot_steps > 0:
            from .plots import PlotCallback

            self.add_callback(PlotCallback(self))

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            _configure_fsdp(self.accelerator)
        elif self.args.fsdp:
            raise ValueError(f"fsdp needs torchrun or accelerate launch, and a GPU; got {self.args.device}")

    @cached_property
    def known_bad_files(self) -> set[str]:
        """Files that were reported as unreadable, in this run or before a resume."""
        report = self._bad_files_report()
        if not report.is_file():
            return set()
        return {json.loads(line)["file"] for line in report.read_text().splitlines()}

    def forget_bad_files(self) -> None:
        """Starts the report of unreadable files anew, as a run from the start does."""
        self._bad_files_report().unlink(missing_ok=True)
        self.__dict__.pop("known_bad_files", None)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> tuple:
        values = super().set_initial_training_values(args, dataloader)
        self._steps_per_epoch, total_steps = values[1], values[-1]
        if not has_length(dataloader):
            if args.steps_per_epoch is None:
                raise ValueError("the data have no length: set steps_per_epoch, which the schedules count in")
            self._steps_per_epoch = self.steps_per_endless_epoch = args.steps_per_epoch
        if self.budget is None:
            self.schedules = self._build_schedules(total_steps, self._steps_per_epoch)
        else:
            self.budget.reset()
        return values

    def pace(self, steps: int | None) -> tuple[float, float]:
        """An epoch, or if the schedules that are given in epochs do not fit the run, less for all of them."""
        args, length = self.args, float(self._steps_per_epoch)
        for epochs, share in (
            (args.warmup_epochs, MAX_WARMUP_SHARE),
            (args.warmup_teacher_temperature_epochs, MAX_TEMPERATURE_SHARE),
            (args.freeze_last_layer_epochs, MAX_FREEZE_SHARE),
        ):
            if steps is not None and epochs > 0:
                length = min(length, share * steps / epochs)
        self.pace_note = ""
        if length < self._steps_per_epoch:
            self.pace_note = (
                f"{steps} steps are {steps / self._steps_per_epoch:.3g} epochs, too few for schedules given in "
                f"epochs: warmup_epochs {args.warmup_epochs:g}, warmup_teacher_temperature_epochs "
                f"{args.warmup_teacher_temperature_epochs} and freeze_last_layer_epochs "
                f"{args.freeze_last_layer_epochs} are shortened to {length / self._steps_per_epoch:.0%}"
            )
        return length, args.warmup_epochs

    def follow_plan(self, plan: Plan) -> None:
        args, before = self.args, self.schedules
        self.schedules = planned_schedules(
            plan,
            learning_rate=(args.learning_rate, args.min_learning_rate),
            weight_decay=(args.weight_decay, args.weight_decay_end),
            teacher_momentum=(args.teacher_momentum, args.teacher_momentum_end),
            teacher_temperature=(args.warmup_teacher_temperature, args.teacher_temperature),
            warmup_teacher_temperature_epochs=args.warmup_teacher_temperature_epochs,
        )
        if before is not None and plan.start <= len(before.learning_rate):  # the step that is being made is finished
            self.schedules = self.schedules.after(before, plan.start)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW; weight decay on matrices, the positions and the CLS token, not on biases and gains of norms."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            scale = self.args.encoder_learning_rate_scale
            # heads first: the learning rate that is logged is that of the first group
            modules = [(model, 1.0)] if scale == 1 else [(model.heads, 1.0), (model.asit, scale)]
            groups = []
            for module, factor in modules:
                trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
                rate = {"lr": self.args.learning_rate * factor}
                matrices = [parameter for parameter in trainable if parameter.dim() > 1]
                vectors = [parameter for parameter in trainable if parameter.dim() <= 1]
                groups.append({"params": matrices, "decays": True, **rate})
                groups.append({"params": vectors, "weight_decay": 0.0, "decays": False, **rate})
            self.optimizer = optimizer_class(groups, weight_decay=self.args.weight_decay, **kwargs)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            peak = self.args.learning_rate
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: self.schedules.at(step)["learning_rate"] / peak
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ASiTForPreTrainingOutput]:
        self._report_bad_files(inputs.pop("bad_files", []))
        views = self.prepare_views(inputs)
        temperature = self.schedules.at(self.state.global_step)["teacher_temperature"]
        with self.accelerator.autocast():  # Accelerate adds none under FSDP2
            output = model(**views, teacher_temperature=temperature, mean_over_all=self.args.mean_over_all)
        values = {name: output[name].detach().float() for name in _LOGGED if output.get(name) is not None}
        self._passes_in_step.append(_Pass(output.loss.detach(), values, inputs.get("files", [])))
        if self.args.plot_steps > 0 and output.reconstruction is not None:
            self.last_example = {
                "clean": views["input_values"][0, 0],
                "corrupted": views["corrupted_values"][0, 0],
                "mask": views["corruption_mask"][0, 0],
                "reconstruction": output.reconstruction[0, 0].detach(),
            }
        return (output.loss, output) if return_outputs else output.loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As Trainer's; a non-finite loss is replaced by the last finite one, or Trainer's sum would stay NaN."""
        loss = super().training_step(*args, **kwargs)
        self._last_loss = torch.where(torch.isfinite(loss), loss, self._last_loss)
        return self._last_loss

    @torch.no_grad()
    def prepare_views(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Waveform crops to what the model takes: clean and corrupted spectrograms, masks and local views."""
        views = {
            name: inputs[name]
            for name in ("input_values", "corrupted_values", "corruption_mask", "local_values")
            if name in inputs
        }
        extract = self.processing_class.extract
        if "input_values" not in views:
            if "global_waveforms" not in inputs:
                inputs = {**inputs, **self._gather(inputs)}
            clean = extract(_waveforms(inputs, "global"), inputs.get("global_lengths"))
            patch = self.model.config.patch_size
            views["input_values"] = clean[:, :, : clean.shape[2] // patch * patch]
            if "local_waveforms" in inputs:
                views["local_values"] = extract(_waveforms(inputs, "local"), inputs.get("local_lengths"))
        keys = inputs.get("sample_keys")
        if keys is not None:
            views["drop_path_keys"] = mix_keys(keys, self.state.global_step)
        if "corrupted_values" not in views:
            if keys is None:
                raise ValueError(
                    "a batch without corrupted_values needs sample_keys of shape (batch,), which its masks are drawn "
                    f"from; it brings {sorted(inputs)}"
                )
            gmml = replace(self.args.gmml, patch_size=self.model.config.patch_size)
            views["corrupted_values"], views["corruption_mask"] = corrupt(
                views["input_values"], keys, self._donor_key(), gmml
            )
        return views

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._num_passes:
            names = list(self._sums)
            means = torch.stack([self._sums[name] for name in names]) / self._num_passes
            means = self.accelerator.reduce(means, reduction="mean").tolist()
            logs.update(zip(names, means))
            step = self.schedules.at(self.state.global_step - 1)
            logs.update({name: value for name, value in step.items() if name != "learning_rate"})
            self._sums, self._num_passes = {}, 0
        if self.num_skipped_steps:
            logs["skipped_steps"] = self.num_skipped_steps
        logs.update(self.next_log)
        self.next_log.clear()
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; at SIGTERM the step is finished, a checkpoint is saved and `terminated` is true."""
        shutil.rmtree(Path(self.args.output_dir) / UNFINISHED, ignore_errors=True)  # of a run that was killed
        if self.args.keep_freed_memory and self.args.device.type == "cpu":
            keep_freed_memory()
        warn_of_emulated_bf16(self.args)
        with on_termination(self._ask_to_stop), clear_worker_errors():
            return super().train(*args, **kwargs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | None = None) -> torch.Tensor:
        """The norm to log. Those of all tensors are kept, for clipping each by itself before the optimizer's step."""
        if grad_norm is None:  # else Trainer has clipped by max_grad_norm, and unscaled for that
            self.accelerator.unscale_gradients()
        self.gradient_norms = gradient_norms(self.model)
        return self.gradient_norms.norm() if grad_norm is None else grad_norm

    def get_train_dataloader(self) -> DataLoader:
        if isinstance(self.train_dataset, PackedCrops):
            self._place_audio(self.train_dataset)
        return super().get_train_dataloader()

    def _place_audio(self, crops: PackedCrops) -> None:
        """Packed audio goes to an accelerator that has room for it; else loader workers cut the crops on the CPU."""
        pool, device = crops.sources, self.args.device
        if pool.audio.device == device or self.data_collator == crops.collate:
            return
        size = f"{pool.hours:.1f} hours of packed audio ({pool.num_bytes / 1e9:.2f} GB)"
        free = _free_memory(device)
        if free is None or pool.num_bytes <= free * LARGEST_RESIDENT_SHARE:
            crops.to(device)
            decision = f"{size} are resident on {device}"
        else:
            self.data_collator = crops.collate
            decision = (
                f"{size} stay on the CPU, being more than {LARGEST_RESIDENT_SHARE:.0%} of the {free / 1e9:.2f} GB "
                f"free on {device}: the loader cuts the crops, with {self.args.dataloader_num_workers} workers "
                "(dataloader_num_workers)"
            )
        if self.is_world_process_zero():
            logger.warning(decision)

    def _gather(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The crops of a batch that brings their keys only."""
        gather = getattr(self.train_dataset, "gather", None)
        if gather is None or "indices" not in inputs or "sample_keys" not in inputs:
            raise ValueError(
                "expected a batch with input_values or global_waveforms, or with the indices and sample_keys of "
                f"PackedCrops as training data; it brings {sorted(inputs)}"
            )
        crops = gather(inputs["indices"], inputs["sample_keys"])
        return {name: values.to(self.args.device) for name, values in crops.items()}

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        complete = self.budget is None and self.state.global_step >= self.state.max_steps
        if complete:  # Trainer would add a step to a run that is complete
            logger.warning(f"nothing to do: the run is complete at step {self.state.global_step}")
            return
        super()._run_epoch(*args, **kwargs)

    def _last_layer_rests(self) -> bool:
        step = self.state.global_step
        epochs = step / self._steps_per_epoch if self.budget is None else self.budget.plan.units(step)
        return epochs < self.args.freeze_last_layer_epochs

    def _ask_to_stop(self) -> None:
        self.terminated = True

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Under another name until it is whole: a run that is killed leaves no half checkpoint."""
        step, run_dir = self.state.global_step, Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{step}"
        push, self.args.push_to_hub = self.args.push_to_hub, False  # only what has its name is pushed
        self._staging = run_dir / UNFINISHED
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # every process has written its random state
            if self.args.should_save:
                publish(self._staging / name, run_dir / name)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(self._staging, ignore_errors=True)
            raise OSError(describe_failed_save(error, run_dir, step)) from error
        finally:
            self._staging, self.args.push_to_hub = None, push
        if push:
            self._push_from_checkpoint(str(run_dir / name))
        if self.args.should_save:
            rotate_checkpoints(str(run_dir), self.args.save_total_limit, self.state.best_model_checkpoint)

    def _check_data(self) -> None:
        try:
            num_clips = len(self.train_dataset)
        except TypeError:  # a stream, or no data at all
            return
        if num_clips == 0:
            raise ValueError("the training data hold no clip")
        per_pass = self.args.train_batch_size * self.args.world_size
        if self.args.dataloader_drop_last and num_clips < per_pass:
            raise ValueError(
                f"the training data hold {num_clips} clips, fewer than one batch of {per_pass}: lower "
                "per_device_train_batch_size or set dataloader_drop_last to False"
            )

    def _compare_preset(self) -> None:
        config = self.model.config
        differing = {
            name: (getattr(config, name), value)
            for name, value in get_preset(self.args.preset).config.items()
            if getattr(config, name) != value
        }
        if differing:
            listed = ", ".join(f"{name} {mine} ({theirs})" for name, (mine, theirs) in differing.items())
            logger.warning(f"The model differs from objective {self.args.preset} (in brackets): {listed}")

    def _build_schedules(self, steps: int, steps_per_epoch: int) -> Schedules:
        args = self.args
        if args.warmup_epochs * steps_per_epoch > steps:
            logger.warning(
                f"The warm-up of {args.warmup_epochs} epochs is longer than the run of {steps / steps_per_epoch:.1f}: "
                "the learning rate never reaches its peak"
            )
        return Schedules(
            learning_rate=cosine_schedule(
                args.learning_rate, args.min_learning_rate, steps, round(args.warmup_epochs * steps_per_epoch)
            ),
            weight_decay=cosine_schedule(args.weight_decay, args.weight_decay_end, steps),
            teacher_momentum=cosine_schedule(args.teacher_momentum, args.teacher_momentum_end, steps),
            teacher_temperature=stepwise_schedule(
                args.warmup_teacher_temperature,
                args.teacher_temperature,
                steps,
                steps_per_epoch,
                args.warmup_teacher_temperature_epochs,
            ),
        )

    def _donor_key(self) -> int:
        """A key of (seed, step, pass within the step, process)."""
        key = mix_keys(
            torch.tensor(self.args.seed), self.state.global_step, len(self._passes_in_step), self.args.process_index
        )
        return int(key)

    def _finish_step(self, skipped: bool) -> None:
        """Adds the step's values to the next log, on the device: they are read, and waited for, when it is time."""
        if not skipped:
            for done in self._passes_in_step:
                for name, value in done.values.items():
                    self._sums[name] = self._sums.get(name, 0) + value
            self._num_passes += len(self._passes_in_step)
        self._passes_in_step = []

    def _agree(self, *flags: bool | torch.Tensor) -> list[bool]:
        """Each flag, true where it is true in any process."""
        device = self.args.device  # a flag of the host's is filled in: copied, it would be waited for
        values = torch.stack(
            [
                flag.float() if isinstance(flag, torch.Tensor) else torch.full((), float(flag), device=device)
                for flag in flags
            ]
        )
        if self.args.world_size > 1:
            torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
        return [value > 0 for value in values.tolist()]

    def _describe_bad_step(self) -> str:
        files = [name for done in self._passes_in_step if not torch.isfinite(done.loss) for name in done.files] or [
            name for done in self._passes_in_step for name in done.files
        ]
        return (
            f"{self.args.max_skipped_steps} steps in a row had a loss or gradient that is not finite, up to step "
            f"{self.state.global_step}; files of the last batch of process {self.args.process_index}: "
            f"{', '.join(files) or 'not named by the data'}. Nothing was saved since they began: look at these files, "
            "or go on from the last checkpoint with a lower learning rate."
        )

    def _bad_files_report(self) -> Path:
        rank = f".rank{self.args.process_index}" if self.args.process_index else ""
        return Path(self.args.output_dir) / f"{BAD_FILES_REPORT}{rank}"

    def _report_bad_files(self, bad_files: list[tuple[str, str]]) -> None:
        for name, reason in bad_files:
            if name in self.known_bad_files:
                continue
            self.known_bad_files.add(name)
            logger.warning(f"skipped {name}: {reason}")
            report = self._bad_files_report()
            report.parent.mkdir(parents=True, exist_ok=True)
            with report.open("a") as file:
                file.write(json.dumps({"file": name, "reason": reason}) + "\n")


@dataclass
class _Pass:
    """One forward pass of a step: its loss, what is logged of it, and where its clips come from."""

    loss: torch.Tensor
    values: dict[str, torch.Tensor]
    files: list[str]


class _OptimizerSteps(TrainerCallback):
    """Once an optimizer step: clipping and weight decay before it, centers and teacher after it."""

    def __init__(self, trainer: ASiTPreTrainer):
        self.trainer = trainer
        self.skips = self.stops = False
        self.skipped_in_a_row = 0

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.trainer.forget_bad_files()

    def on_train_end(self, args, state, control, **kwargs):
        if self.trainer.known_bad_files:
            logger.warning(
                f"{len(self.trainer.known_bad_files)} files could not be read, see {self.trainer._bad_files_report()}"
            )

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        trainer = self.trainer
        norm = clip_tensor_norms(trainer.model, args.max_tensor_grad_norm, trainer.gradient_norms)
        self.skips, self.stops = trainer._agree(~torch.isfinite(norm), trainer.terminated)
        if self.skips:
            self._skip(args)
        elif trainer._last_layer_rests():
            for name, parameter in trainer.model.heads.named_parameters():  # looked up each time: FSDP replaces them
                if "prototypes" in name:
                    parameter.grad = None
        weight_decay = trainer.schedules.at(state.global_step)["weight_decay"]
        for group in trainer.optimizer.param_groups:
            if group["decays"]:
                group["weight_decay"] = weight_decay

    def on_optimizer_step(self, args, state, control, **kwargs):
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        if self.skips:
            model.forget_outputs()
        else:
            self.skipped_in_a_row = 0
            model.update_centers()
            model.update_teacher(self.trainer.schedules.at(state.global_step)["teacher_momentum"])
        self.trainer._finish_step(self.skips)

    def on_step_end(self, args, state, control, **kwargs):
        if self.stops:
            logger.warning(f"asked to stop: saving at step {state.global_step}")
            self.trainer.terminated = True  # where another process was asked
            control.should_save = control.should_training_stop = True

    def _skip(self, args) -> None:
        trainer = self.trainer
        trainer.num_skipped_steps += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= args.max_skipped_steps:
            raise FloatingPointError(trainer._describe_bad_step())
        if trainer.accelerator.scaler is None:  # a gradient scaler of float16 looks for itself
            for parameter in trainer.model.parameters():
                parameter.grad = None


def _configure_fsdp(accelerator: Accelerator) -> None:
    """
    Refuses options of FSDP that do not work here, and sets what Accelerate would set wrongly: which modules are
    sharded by default, and under bf16 what is cast. Its own policy also rounds spectrograms, losses and the sums of
    gradients over processes.
    """
    plugin, precision = accelerator.state.fsdp_plugin, accelerator.mixed_precision
    expected = {
        "version": (2, getattr(plugin, "fsdp_version", 1)),
        "state_dict_type": ("FULL_STATE_DICT", plugin.state_dict_type.name),
        "cpu_ram_efficient_loading": (False, plugin.cpu_ram_efficient_loading),  # fails on buffers
    }
    wrong = [f"{name} {value}, got {given}" for name, (value, given) in expected.items() if given != value]
    if wrong:
        raise ValueError(f"fsdp_config: expected {'; '.join(wrong)}. See examples/recipes/fsdp.json")
    if precision not in ("no", "bf16"):
        raise ValueError(f"FSDP: expected float32 or bf16, got {precision}. Set bf16 instead")
    # by default it would take the embeddings too, and then fail on the patch embeddings inside them
    plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or [ASiTLayer.__name__]
    if precision == "bf16":
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    warnings.filterwarnings("ignore", message=".*returned a view tensor")  # no view is changed in place


def _waveforms(inputs: dict[str, Any], kind: str) -> torch.Tensor:
    """Crops of a kind; those that travelled as int16 with scales of their own become float32."""
    waveforms, scales = inputs[f"{kind}_waveforms"], inputs.get(f"{kind}_scales")
    return waveforms if scales is None else waveforms * (scales * 2**-15)[..., None]


def _free_memory(device: torch.device) -> int | None:
    """Bytes; `None` where the device does not tell."""
    mem_get_info = getattr(torch.get_device_module(device), "mem_get_info", None)
    return mem_get_info(device)[0] if mem_get_info else None
