"""Arguments of pretraining."""

from dataclasses import dataclass, field, replace

from transformers import TrainingArguments

from ..utils.time_budget import TimeBudgetArguments
from .masking import FILLS, GMML, PATTERNS
from .presets import get_preset

_SET_BY_ASIT = {"warmup_steps": 0, "lr_scheduler_type": "linear", "label_smoothing_factor": 0.0}


@dataclass
class ASiTPreTrainingArguments(TimeBudgetArguments, TrainingArguments):
    """
    TrainingArguments with ASiT's schedules. `None` means: as the chosen objective has it.

    The learning rate is `base_learning_rate * global batch / 256` unless `learning_rate` is given.
    """

    preset: str = field(default="2024", metadata={"help": "The authors' release to follow: 2024 or 2023."})
    base_learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate for a global batch of 256."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate; overrides base_learning_rate."}
    )
    encoder_learning_rate_scale: float = field(
        default=1.0,
        metadata={
            "help": "Factor of the learning rate of the student's encoder, above 0. Below 1, such as 0.02, where it "
            "is trained already and the heads are not."
        },
    )
    min_learning_rate: float = field(default=1e-6, metadata={"help": "Learning rate at the end of the cosine."})
    warmup_epochs: float = field(default=10.0, metadata={"help": "Epochs of linear warm-up of the learning rate."})
    weight_decay: float = field(default=0.04, metadata={"help": "Weight decay at the start; cosine to the end."})
    weight_decay_end: float = field(default=0.4, metadata={"help": "Weight decay at the end."})
    teacher_momentum: float = field(default=0.996, metadata={"help": "Teacher's EMA momentum at the start."})
    teacher_momentum_end: float = field(default=1.0, metadata={"help": "Teacher's EMA momentum at the end."})
    warmup_teacher_temperature: float = field(default=0.04, metadata={"help": "Teacher temperature at the start."})
    teacher_temperature: float = field(default=0.07, metadata={"help": "Teacher temperature after its warm-up."})
    warmup_teacher_temperature_epochs: int | None = field(
        default=None, metadata={"help": "Epochs over which the teacher temperature rises (2024: 5, 2023: 30)."}
    )
    freeze_last_layer_epochs: int | None = field(
        default=None, metadata={"help": "Epochs during which the prototypes get no gradient (2024: 1, 2023: 0)."}
    )
    max_tensor_grad_norm: float = field(
        default=3.0, metadata={"help": "Clips the gradient norm of every parameter tensor by itself; 0: off."}
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clips the global gradient norm; 0: off."})
    mask_ratio_min: float | None = field(default=None, metadata={"help": "Least share of pixels set to zero."})
    mask_ratio_max: float | None = field(default=None, metadata={"help": "Largest share of pixels set to zero."})
    replace_ratio: float | None = field(
        default=None, metadata={"help": "Share of pixels replaced by those of another clip."}
    )
    replace_probability: float | None = field(
        default=None, metadata={"help": "How often pixels are replaced instead of set to zero."}
    )
    max_block_ratio: float | None = field(default=None, metadata={"help": "Longest side of a block, as a share."})
    mask_alignment: int | None = field(default=None, metadata={"help": "Pixels that blocks are aligned to."})
    mask_pattern: str = field(
        default="blocks", metadata={"help": f"What is corrupted together, one of {', '.join(PATTERNS)}."}
    )
    mask_fill: str = field(
        default="zeros", metadata={"help": f"What stands where nothing replaces, one of {', '.join(FILLS)}."}
    )
    steps_per_epoch: int | None = field(
        default=None, metadata={"help": "For data without a length: the optimizer steps that count as an epoch."}
    )
    plot_steps: int = field(
        default=500, metadata={"help": "Draws a reconstruction and the curves every so many steps; 0: never."}
    )
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Leaves out the epoch's last batch if it is not full (others each epoch)."}
    )
    max_skipped_steps: int = field(
        default=20,
        metadata={"help": "Stop after so many steps in a row whose loss or gradient is not finite; they are skipped."},
    )
    mean_over_all: bool = field(
        default=True,
        metadata={
            "help": "Over several processes: reconstruction loss as the mean over the pixels of all of them; "
            "False: each takes the mean over its own, as the authors do."
        },
    )
    keep_freed_memory: bool = field(
        default=True,
        metadata={"help": "On a processor: the process keeps what a step frees, for the next one (glibc only)."},
    )
    compile_layers: bool = field(
        default=False,
        metadata={
            "help": "Compile the layers of student and teacher and the body of the local loss, which takes minutes "
            "at the start. Batches must all have one shape, as crops have."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Trainer's filter of non-finite losses, which are skipped here anyway; it synchronizes every step."
        },
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Search for unused parameters in every pass under DDP; there are none."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Not used: the data room names its own."})

    def __post_init__(self):
        preset = get_preset(self.preset)
        for name, default in _SET_BY_ASIT.items():
            if getattr(self, name) != default:
                raise ValueError(f"{name} has no effect here: ASiT's own schedules and losses are used")
        if self.accelerator_config is None and self.dataloader_pin_memory and not self.use_cpu:
            self.accelerator_config = {"non_blocking": True}  # from pinned memory, while the device computes
        super().__post_init__()
        if self.torch_compile:
            raise ValueError(
                "torch_compile is not supported: it compiles the whole model and unrolls the loop of its local loss. "
                "Set compile_layers instead"
            )
        if self.warmup_teacher_temperature_epochs is None:
            self.warmup_teacher_temperature_epochs = preset.warmup_teacher_temperature_epochs
        if self.freeze_last_layer_epochs is None:
            self.freeze_last_layer_epochs = preset.freeze_last_layer_epochs
        if self.learning_rate is None:
            self.learning_rate = self.base_learning_rate * self.global_batch_size / 256
        if not self.encoder_learning_rate_scale > 0:
            raise ValueError(f"expected encoder_learning_rate_scale above 0, got {self.encoder_learning_rate_scale}")
        self.gmml  # noqa: B018  raises for values that no mask can be drawn from

    @property
    def global_batch_size(self) -> int:
        """Clips per optimizer step over all processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def gmml(self) -> GMML:
        """The corruption: the objective's, with what was set here."""
        default = get_preset(self.preset).gmml
        low, high = default.mask_ratio
        low = low if self.mask_ratio_min is None else self.mask_ratio_min
        high = max(low, high) if self.mask_ratio_max is None else self.mask_ratio_max
        chosen = {
            "replace_ratio": self.replace_ratio,
            "replace_probability": self.replace_probability,
            "max_block_ratio": self.max_block_ratio,
            "alignment": self.mask_alignment,
            "pattern": self.mask_pattern,
            "fill": self.mask_fill,
        }
        return replace(
            default, mask_ratio=(low, high), **{name: value for name, value in chosen.items() if value is not None}
        )
