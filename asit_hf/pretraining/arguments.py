"""Arguments of pretraining."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import TrainingArguments

from ..utils.arguments import check_inherited
from ..utils.time_budget import TimeBudgetArguments
from .masking import FILLS, GMML, PATTERNS
from .presets import PRESETS, Preset, get_preset


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field of a dataclass of options; `metadata` goes to `ArgumentParser.add_argument`, for example `choices`."""
    return field(default=default, metadata={"help": help, **metadata})


def by_preset(value: Callable[[Preset], float]) -> str:
    """For the help of an option whose default depends on the preset."""
    values = ", ".join(f"{name}: {value(preset):g}" for name, preset in PRESETS.items())
    return f"(default: set by --preset: {values})"


# Options of TrainingArguments that have no effect in pretraining, by the reason.
_NO_EFFECT = {
    "ASiT has its own schedules and losses": "lr_scheduler_type lr_scheduler_kwargs warmup_steps "
    "label_smoothing_factor",
    "pretraining has no evaluation; KnnProbeCallback (knn_train in run_pretraining.py) measures kNN accuracy": (
        "eval_strategy eval_steps eval_delay eval_on_start eval_accumulation_steps eval_use_gather_object "
        "eval_do_concat_batches per_device_eval_batch_size batch_eval_metrics prediction_loss_only bf16_full_eval "
        "fp16_full_eval include_for_metrics do_eval do_predict load_best_model_at_end metric_for_best_model "
        "greater_is_better"
    ),
    "batches are crops without labels, columns or tokens": (
        "label_names length_column_name neftune_noise_alpha use_cache use_liger_kernel liger_kernel_config"
    ),
}
# Options of which only some values work.
_ALLOWED = {
    "do_train": (True,),
    "include_num_input_tokens_seen": ("no", False),  # the parser takes its default for false
    "remove_unused_columns": (False,),
    "train_sampling_strategy": ("random", "sequential"),
    "save_strategy": ("no", "steps", "epoch"),
}
# The learning rate that new heads need destroys what a trained encoder has learned: examples/RESULTS.md.
TRAINED_ENCODER_SCALE = 0.02
STANDARDIZATION_CLIPS = 256


@dataclass
class ASiTPreTrainingArguments(TimeBudgetArguments, TrainingArguments):
    """
    TrainingArguments with ASiT's schedules. `None` means: set by `preset`. The learning rate is
    `base_learning_rate * global batch size / 256` by default. Options without effect are refused.
    """

    without_effect = " ".join(_NO_EFFECT.values()).split()

    preset: str = option(
        "2024", "Release of the authors' code whose settings are the defaults.", choices=sorted(PRESETS)
    )
    base_learning_rate: float = option(5e-4, "Peak learning rate per 256 clips of the global batch.")
    learning_rate: float | None = option(None, "Peak learning rate; overrides base_learning_rate.")
    encoder_learning_rate_scale: float | None = option(
        None,
        "Factor on the learning rate of the student's encoder (default: 1; for a trained encoder with new heads, "
        f"{TRAINED_ENCODER_SCALE}).",
    )
    standardize_head_inputs: bool = option(
        False,
        f"Initialize new heads so that their inputs, the CLS tokens of about {STANDARDIZATION_CLIPS} clips, are "
        "standardized: with a trained encoder, the global loss starts to learn at once.",
    )
    min_learning_rate: float = option(1e-6, "Learning rate at the end of the cosine decay.")
    warmup_epochs: float = option(10.0, "Length of the learning rate's linear warm-up, in epochs.")
    weight_decay: float = option(0.04, "Weight decay at the first step; follows a cosine to weight_decay_end.")
    weight_decay_end: float = option(0.4, "Weight decay at the last step.")
    teacher_momentum: float = option(
        0.996, "Momentum of the teacher's EMA at the first step; follows a cosine to teacher_momentum_end."
    )
    teacher_momentum_end: float = option(1.0, "Momentum of the teacher's EMA at the last step.")
    warmup_teacher_temperature: float = option(0.04, "Teacher temperature at the start of its warm-up.")
    teacher_temperature: float = option(0.07, "Teacher temperature after its warm-up.")
    warmup_teacher_temperature_epochs: int | None = option(
        None,
        f"Epochs of the teacher temperature's warm-up {by_preset(lambda p: p.warmup_teacher_temperature_epochs)}.",
    )
    freeze_last_layer_epochs: int | None = option(
        None, f"First epochs, in which the prototypes are frozen {by_preset(lambda p: p.freeze_last_layer_epochs)}."
    )
    max_tensor_grad_norm: float = option(3.0, "Largest gradient norm of each parameter tensor; 0: no clipping.")
    max_grad_norm: float = option(0.0, "Largest gradient norm of all parameters together; 0: no clipping.")
    mask_ratio_min: float | None = option(
        None,
        f"Smallest masking ratio of a view, as a share of the pixels {by_preset(lambda p: p.gmml.mask_ratio[0])}.",
    )
    mask_ratio_max: float | None = option(
        None,
        f"Largest masking ratio of a view {by_preset(lambda p: p.gmml.mask_ratio[1])}; at least mask_ratio_min.",
    )
    replace_ratio: float | None = option(
        None, "Share of pixels replaced by those of another clip, in views with replacement (default: 0.3)."
    )
    replace_probability: float | None = option(
        None, "Probability that a view has pixels replaced instead of masked (default: 0.5)."
    )
    max_block_ratio: float | None = option(None, "Longest side of a block, as a share of its axis (default: 0.3).")
    mask_alignment: int | None = option(None, "Blocks start and end at multiples of this many pixels (default: 1).")
    mask_pattern: str = option(
        "blocks",
        "Shape of the corrupted regions: blocks, bands of time or of frequency, or single patches.",
        choices=list(PATTERNS),
    )
    mask_fill: str = option("zeros", "Fill value for masked pixels that are not replaced.", choices=list(FILLS))
    steps_per_epoch: int | None = option(None, "Steps per epoch in the schedules; required for data without a length.")
    plot_steps: int = option(500, "Optimizer steps between plots of a reconstruction and the curves; 0: no plots.")
    dataloader_drop_last: bool = option(True, "Drop the last batch of an epoch if it is incomplete.")
    max_skipped_steps: int = option(20, "Stop after this many steps in a row with a non-finite loss or gradient.")
    mean_over_all: bool = option(
        True,
        "With several processes: average the reconstruction loss over the masked pixels of all processes. False: "
        "average within each process first, as the authors' code does.",
    )
    keep_freed_memory: bool = option(True, "On a CPU with glibc: reuse the memory that a step frees, which is faster.")
    compile_layers: bool = option(
        False,
        "Compile the layers of student and teacher and the body of the local loss: faster steps after minutes of "
        "compilation. All batches must have the same shape, as crops do.",
    )
    logging_nan_inf_filter: bool = option(
        False,
        "Filter non-finite losses from logs. Not needed (such steps are skipped), and every step would wait for it.",
    )
    ddp_find_unused_parameters: bool | None = option(
        False, "Search for unused parameters in every pass under DDP. Not needed: all parameters are used."
    )
    do_train: bool = option(True, "Must be True: pretraining only trains.")
    remove_unused_columns: bool = option(False, "Must be False: the trainer needs what Trainer would remove.")

    def __post_init__(self):
        preset = get_preset(self.preset)
        self._check_inherited_options()
        if self.accelerator_config is None and self.dataloader_pin_memory and not self.use_cpu:
            self.accelerator_config = {"non_blocking": True}  # copy from pinned memory while the device computes
        super().__post_init__()
        for name in ("warmup_teacher_temperature_epochs", "freeze_last_layer_epochs"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(preset, name))
        if self.learning_rate is None:
            self.learning_rate = self.base_learning_rate * self.global_batch_size / 256
        if self.encoder_learning_rate_scale is not None and not self.encoder_learning_rate_scale > 0:
            raise ValueError(f"expected encoder_learning_rate_scale above 0, got {self.encoder_learning_rate_scale}")
        self.gmml  # noqa: B018  raises if no mask can be drawn with these values

    def _check_inherited_options(self) -> None:
        check_inherited(
            self, {f"no effect in pretraining; {reason}": names for reason, names in _NO_EFFECT.items()}, _ALLOWED
        )
        if self.torch_compile or self.torch_compile_backend or self.torch_compile_mode:
            raise ValueError("torch_compile unrolls the loop of the local loss: set compile_layers instead")

    @property
    def global_batch_size(self) -> int:
        """Clips per optimizer step over all processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def gmml(self) -> GMML:
        """The corruption: the preset's, with the options that were set."""
        default = get_preset(self.preset).gmml
        low, high = default.mask_ratio
        low = low if self.mask_ratio_min is None else self.mask_ratio_min
        high = max(low, high) if self.mask_ratio_max is None else self.mask_ratio_max
        chosen = {name: getattr(self, name) for name in ("replace_ratio", "replace_probability", "max_block_ratio")}
        chosen |= {"alignment": self.mask_alignment, "pattern": self.mask_pattern, "fill": self.mask_fill}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        return replace(default, mask_ratio=(low, high), **chosen)
