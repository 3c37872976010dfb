"""
ASiT's pretraining as a subclass of Trainer. `ASiTPreTrainer` follows a batch from top to bottom:

`prepare_views` (waveforms to clean and corrupted spectrograms) -> `compute_loss` (forward pass) ->
`before_optimizer_step` (clip, or skip the step) -> `after_optimizer_step` (centers, teacher) -> `log`. Checkpoints are
written by `CompleteCheckpointsMixin`; runs limited by time are planned by `TimeBudgetMixin`.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..data.collators import collate_crops
from ..data.epochs import EpochCallback
from ..data.packed import PackedCrops
from ..data.randomness import mix_keys
from ..data.workers import clear_worker_errors
from ..feature_extraction_asit import ASiTFeatureExtractor
from ..hub.upload import PushMixin
from ..utils.attention_cpu import choose_bf16_attention
from ..utils.cpu import keep_freed_memory, warn_of_emulated_bf16
from ..utils.device import choices_for
from ..utils.time_budget import Plan, TimeBudgetMixin
from .arguments import STANDARDIZATION_CLIPS, TRAINED_ENCODER_SCALE, ASiTPreTrainingArguments
from .checkpoints import CompleteCheckpointsMixin, on_termination
from .fsdp import configure_fsdp
from .gradients import clip_tensor_norms, gradient_norms
from .masking import corrupt
from .modeling import ASiTForPreTraining
from .monitoring import BadFilesReport, CollapseCallback, PlotCallback
from .presets import differences_from_preset
from .schedules import Schedules, epoch_schedules, fitting_epoch, planned_schedules

logger = logging.get_logger(__name__)

BAD_FILES_REPORT = "bad_files.jsonl"
LARGEST_RESIDENT_SHARE = 0.5  # of an accelerator's free memory, for packed audio; training needs the rest
_NOT_LOGGED = ("loss", "reconstruction")  # of the model's output: Trainer logs the loss


class ASiTPreTrainer(CompleteCheckpointsMixin, TimeBudgetMixin, PushMixin, Trainer):
    """
    Pretrains an [`ASiTForPreTraining`].

    Batches hold waveform crops from [`~asit_hf.data.PretrainingCrops`], or the keys of crops that are gathered here
    from [`~asit_hf.data.PackedCrops`]; log-mel, normalization and GMML run here, in batch, on the model's device. A
    batch may also contain `input_values`, `corrupted_values`, `corruption_mask` and `local_values`, which are then
    used unchanged.

    Args:
        model, args ([`ASiTForPreTraining`], [`ASiTPreTrainingArguments`]): as in Trainer.
        processing_class ([`ASiTFeatureExtractor`]): sampling rate and normalization; saved with every checkpoint.
        data_collator (`Callable`, *optional*): by default [`~asit_hf.data.collate_crops`], on an accelerator with
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
            raise TypeError(f"expected an ASiTForPreTraining model, got {type(model).__name__}")
        if args.n_gpu > 1:
            raise ValueError(
                f"expected one GPU per process, got {args.n_gpu}: start with torchrun --nproc_per_node {args.n_gpu}"
            )
        if kwargs.get("eval_dataset") is not None:
            raise ValueError("pretraining has no evaluation data: probe its checkpoints on labelled audio instead")
        choose_bf16_attention(model, args)
        if data_collator is None:
            data_collator = partial(collate_crops, int16=choices_for(args.device).int16_batches)
        if isinstance(kwargs.get("train_dataset"), IterableDataset):
            # dispatched batches are concatenated tensor by tensor, which does not work for the list of bad files
            args.accelerator_config.dispatch_batches = False
        super().__init__(model, args, data_collator=data_collator, processing_class=processing_class, **kwargs)
        self._check_data()
        if differing := differences_from_preset(model.config, args.preset):
            listed = ", ".join(f"{name} {mine} ({theirs})" for name, (mine, theirs) in differing.items())
            logger.warning(f"the model differs from preset {args.preset} (in brackets): {listed}")
        self.schedules: Schedules | None = None
        self.last_example: dict[str, torch.Tensor] | None = None  # to plot
        self.next_log: dict[str, float] = {}  # values that callbacks add to the next log
        self.num_skipped_steps = 0
        self.terminated = False
        rank = f".rank{args.process_index}" if args.process_index else ""
        self.bad_files = BadFilesReport(Path(args.output_dir) / f"{BAD_FILES_REPORT}{rank}")
        self._passes_in_step: list[_Pass] = []
        self._last_loss = torch.zeros((), device=args.device)
        self._skips_step = self._stops_after_step = False
        self._skipped_in_a_row = 0
        self._sums: dict[str, torch.Tensor] = {}
        self._num_passes = 0
        if args.compile_layers:
            model.compile_layers()
        self.add_callback(EpochCallback(self.train_dataset))
        self.add_callback(_OptimizerStepHooks(self))
        self.add_callback(CollapseCallback())
        if args.plot_steps > 0:
            self.add_callback(PlotCallback(self))

    def _check_data(self) -> None:
        if not has_length(self.train_dataset):  # a stream, or no data at all
            return
        num_clips = len(self.train_dataset)
        if num_clips == 0:
            raise ValueError("the training data contain no clips")
        batch = self.args.train_batch_size * self.args.world_size
        if self.args.dataloader_drop_last and num_clips < batch:
            advice = "lower per_device_train_batch_size or set dataloader_drop_last to False"
            raise ValueError(f"the training data contain {num_clips} clips, less than one batch of {batch}: {advice}")

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            configure_fsdp(self.accelerator)
        elif self.args.fsdp:
            raise ValueError(f"fsdp needs torchrun or accelerate launch, and a GPU; got {self.args.device}")

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's. On SIGTERM the current step is finished, a checkpoint is saved and `terminated` is set."""
        if self.args.keep_freed_memory and self.args.device.type == "cpu":
            keep_freed_memory()
        warn_of_emulated_bf16(self.args)
        self.bad_files.start(resumed=bool(resume_from_checkpoint))
        with on_termination(partial(setattr, self, "terminated", True)), clear_worker_errors():
            if self.args.standardize_head_inputs and not resume_from_checkpoint:
                self._standardize_head_inputs()
            result = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.bad_files.names:
            logger.warning(f"{len(self.bad_files.names)} files could not be read, see {self.bad_files.path}")
        return result

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.budget is None and self.state.global_step >= self.state.max_steps:
            return  # a complete run was resumed: Trainer would add a step to it
        super()._run_epoch(*args, **kwargs)

    # --- data: waveforms to views ------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        if isinstance(self.train_dataset, PackedCrops):
            self._place_audio(self.train_dataset)
        return super().get_train_dataloader()

    def _place_audio(self, crops: PackedCrops) -> None:
        """Moves packed audio to an accelerator with enough memory; else loader workers cut the crops on the CPU."""
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
                f"{size} exceed {LARGEST_RESIDENT_SHARE:.0%} of the {free / 1e9:.2f} GB free on {device} and stay on "
                f"the CPU: {self.args.dataloader_num_workers} loader workers cut the crops (dataloader_num_workers)"
            )
        if self.is_world_process_zero():
            logger.warning(decision)

    @torch.no_grad()
    def prepare_views(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Turns waveform crops into the model's inputs: clean and corrupted spectrograms, masks, local views."""
        names = ("input_values", "corrupted_values", "corruption_mask", "local_values")
        views = {name: inputs[name] for name in names if name in inputs}
        extract = self.processing_class.extract
        if "input_values" not in views:
            if "global_waveforms" not in inputs:
                inputs = {**inputs, **self._gather_crops(inputs)}
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
                expected = "corrupted_values, or sample_keys of shape (batch,) to draw masks from"
                raise ValueError(f"expected {expected}, in the batch, got {sorted(inputs)}")
            seed, step, number = torch.tensor(self.args.seed), self.state.global_step, len(self._passes_in_step)
            donor_key = int(mix_keys(seed, step, number, self.args.process_index))
            gmml = replace(self.args.gmml, patch_size=self.model.config.patch_size)
            corrupted, mask = corrupt(views["input_values"], keys, donor_key, gmml)
            views |= {"corrupted_values": corrupted, "corruption_mask": mask}
        return views

    @torch.no_grad()
    def _standardize_head_inputs(self) -> None:
        for wrong, reason in (
            (self.is_fsdp_enabled, "does not work with FSDP"),
            (not self.model.has_new_heads, "needs new heads: those of the model are trained"),
            (not self.model.config.global_loss_weight > 0, "has no effect without the global loss"),
        ):
            if wrong:
                raise ValueError(f"standardize_head_inputs {reason}")
        encoder = self.model.train().teacher["asit"]  # equals the student's, without stochastic depth
        tokens, num_clips = [], 0
        for batch in self.get_train_dataloader():
            views = self.prepare_views(self._prepare_inputs(batch))["input_values"]
            with self.accelerator.autocast():
                cls_tokens = encoder(views.flatten(0, 1)).last_hidden_state[:, 0].clone()  # a view would keep all
            tokens.append(self.accelerator.gather(cls_tokens))
            num_clips += len(tokens[-1]) // views.shape[1]
            if num_clips >= STANDARDIZATION_CLIPS:
                break
        self.model.standardize_head_inputs(torch.cat(tokens))

    def _gather_crops(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The crops of a batch that contains only their keys."""
        gather = getattr(self.train_dataset, "gather", None)
        if gather is None or "indices" not in inputs or "sample_keys" not in inputs:
            expected = "input_values or global_waveforms, or indices and sample_keys of PackedCrops"
            raise ValueError(f"expected {expected} in the batch, got {sorted(inputs)}")
        crops = gather(inputs["indices"], inputs["sample_keys"])
        return {name: values.to(self.args.device) for name, values in crops.items()}

    # --- forward pass ------------------------------------------------------------------------------------------

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        """The loss of one forward pass, and with `return_outputs` the [`ASiTForPreTrainingOutput`]."""
        self.bad_files.add(inputs.pop("bad_files", []))
        views = self.prepare_views(inputs)
        temperature = self.schedules.at(self.state.global_step)["teacher_temperature"]
        with self.accelerator.autocast():  # Accelerate adds none under FSDP2
            output = model(**views, teacher_temperature=temperature, mean_over_all=self.args.mean_over_all)
        values = {name: value.detach().float() for name, value in output.items() if name not in _NOT_LOGGED}
        self._passes_in_step.append(_Pass(output.loss.detach(), values, inputs.get("files", [])))
        if self.args.plot_steps > 0 and output.reconstruction is not None:
            batches = views["input_values"], views["corrupted_values"], views["corruption_mask"], output.reconstruction
            names = ("clean", "corrupted", "mask", "reconstruction")
            self.last_example = {name: batch[0, 0].detach() for name, batch in zip(names, batches)}
        return (output.loss, output) if return_outputs else output.loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As Trainer's; a non-finite loss is replaced by the last finite one, or Trainer's sum would stay NaN."""
        loss = super().training_step(*args, **kwargs)
        self._last_loss = torch.where(torch.isfinite(loss), loss, self._last_loss)
        return self._last_loss

    # --- optimizer step ----------------------------------------------------------------------------------------

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | None = None) -> torch.Tensor:
        """The norm to log, before clipping. Those of single tensors are kept for `before_optimizer_step`."""
        if grad_norm is None:  # else Trainer has clipped by max_grad_norm, and unscaled before that
            self.accelerator.unscale_gradients()
        self._gradient_norms = gradient_norms(self.model)
        return self._gradient_norms.norm() if grad_norm is None else grad_norm

    def before_optimizer_step(self) -> None:
        """
        Clips the gradients and sets the weight decay of the step. A step is skipped in all processes if a loss or
        gradient of any is not finite: without gradients the optimizer changes nothing.
        """
        step = self.state.global_step
        epochs = step / self._steps_per_epoch if self.budget is None else self.budget.plan.units(step)
        norm = clip_tensor_norms(self.model, self.args.max_tensor_grad_norm, self._gradient_norms)
        self._skips_step, self._stops_after_step = self._agree(~torch.isfinite(norm), self.terminated)
        if self._skips_step:
            self.num_skipped_steps += 1
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row >= self.args.max_skipped_steps:
                raise FloatingPointError(self._describe_skipped_steps())
            if self.accelerator.scaler is None:  # the gradient scaler of fp16 skips the step itself
                for parameter in self.model.parameters():
                    parameter.grad = None
        elif epochs < self.args.freeze_last_layer_epochs:
            for name, parameter in self.model.heads.named_parameters():  # looked up each time: FSDP replaces them
                if "prototypes" in name:
                    parameter.grad = None
        for group in self.optimizer.param_groups:
            if group["decays"]:
                group["weight_decay"] = self.schedules.at(step)["weight_decay"]

    def after_optimizer_step(self) -> None:
        """Updates the centers and then the teacher, and adds the step's values to the next log."""
        model = self.accelerator.unwrap_model(self.model)
        if self._skips_step:
            model.forget_outputs()
        else:
            self._skipped_in_a_row = 0
            model.update_centers()
            model.update_teacher(self.schedules.at(self.state.global_step)["teacher_momentum"])
            for done in self._passes_in_step:
                for name, value in done.values.items():
                    self._sums[name] = self._sums.get(name, 0) + value  # on the device: `log` waits for the values
            self._num_passes += len(self._passes_in_step)
        self._passes_in_step = []
        if self._stops_after_step:
            logger.warning(f"termination requested: saving at step {self.state.global_step + 1}")
            self.terminated = True  # also if another process received the signal
            self.control.should_save = self.control.should_training_stop = True

    def _agree(self, *flags: bool | torch.Tensor) -> list[bool]:
        """Each flag, true if it is true in any process."""
        device = self.args.device  # torch.full, because copying a flag from the host would wait for the device
        flags = [one if torch.is_tensor(one) else torch.full((), one, device=device) for one in flags]
        values = torch.stack(flags).float()
        if self.args.world_size > 1:
            torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
        return [value > 0 for value in values.tolist()]

    def _describe_skipped_steps(self) -> str:
        failed = [one for one in self._passes_in_step if not torch.isfinite(one.loss)] or self._passes_in_step
        files = ", ".join(name for one in failed for name in one.files) or "not named by the data"
        return (
            f"{self.args.max_skipped_steps} steps in a row had a non-finite loss or gradient, up to step "
            f"{self.state.global_step}; files in the last batch of process {self.args.process_index}: {files}. Check "
            "the files, or resume from the last checkpoint, saved before these steps, with a lower learning rate."
        )

    # --- logging -----------------------------------------------------------------------------------------------

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

    # --- optimizer and schedules -------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW; weight decay applies to matrices, positions and the CLS token, not to biases and norm gains."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            scale = self._encoder_learning_rate_scale()
            # heads first: the logged learning rate is that of the first group
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

    def _encoder_learning_rate_scale(self) -> float:
        chosen, model = self.args.encoder_learning_rate_scale, self.accelerator.unwrap_model(self.model)
        if chosen is not None or not (model.has_trained_encoder and model.has_new_heads):
            return 1.0 if chosen is None else chosen
        if self.is_world_process_zero():
            logger.warning(
                f"the encoder is trained and the heads are new: encoder_learning_rate_scale is {TRAINED_ENCODER_SCALE}"
            )
        self.args.encoder_learning_rate_scale = TRAINED_ENCODER_SCALE  # the model card names the value
        return TRAINED_ENCODER_SCALE

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        if self.lr_scheduler is None:
            peak = self.args.learning_rate
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer, lambda step: self.schedules.at(step)["learning_rate"] / peak
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> tuple:
        values = super().set_initial_training_values(args, dataloader)
        steps_per_epoch, total_steps = values[1], values[-1]
        if not has_length(dataloader):
            if args.steps_per_epoch is None:
                raise ValueError("the data have no length: set steps_per_epoch, the epoch of the schedules")
            steps_per_epoch = self.steps_per_endless_epoch = args.steps_per_epoch
        self._steps_per_epoch = steps_per_epoch
        if self.budget is not None:
            self.budget.reset()
            return values
        if args.warmup_epochs * steps_per_epoch > total_steps:
            logger.warning(
                f"the warm-up of {args.warmup_epochs} epochs is longer than the run of "
                f"{total_steps / steps_per_epoch:.1f}: the learning rate never reaches its peak"
            )
        self.schedules = epoch_schedules(args, total_steps, steps_per_epoch)
        return values

    def pace(self, steps: int | None) -> tuple[float, float]:
        """Optimizer steps per epoch of the schedules, and the warm-up in epochs, for a run of `steps` steps."""
        length, self.pace_note = fitting_epoch(self.args, steps, self._steps_per_epoch)
        return length, self.args.warmup_epochs

    def follow_plan(self, plan: Plan) -> None:
        before, self.schedules = self.schedules, planned_schedules(self.args, plan)
        if before is not None and plan.start <= len(before.learning_rate):  # the current step keeps its values
            self.schedules = self.schedules.after(before, plan.start)


@dataclass
class _Pass:
    """One forward pass of a step: its loss, the values to log, and the files of its clips."""

    loss: torch.Tensor
    values: dict[str, torch.Tensor]
    files: list[str]


class _OptimizerStepHooks(TrainerCallback):
    """Trainer announces optimizer steps to callbacks only; this one calls the trainer's own methods."""

    def __init__(self, trainer: ASiTPreTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.before_optimizer_step()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.after_optimizer_step()


def _waveforms(inputs: dict[str, Any], kind: str) -> torch.Tensor:
    """The `"global"` or `"local"` crops; those that arrive as int16 with a scale each become float32."""
    waveforms, scales = inputs[f"{kind}_waveforms"], inputs.get(f"{kind}_scales")
    return waveforms if scales is None else waveforms * (scales * 2**-15)[..., None]


def _free_memory(device: torch.device) -> int | None:
    """Bytes; `None` if the device does not report them."""
    mem_get_info = getattr(torch.get_device_module(device), "mem_get_info", None)
    return mem_get_info(device)[0] if mem_get_info else None
