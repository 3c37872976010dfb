"""The ASiT pretraining model: student, EMA teacher, heads and centers."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.utils import ModelOutput, can_return_tuple

from ..configuration_asit import ASiTConfig
from ..data.randomness import mix_keys, uniform_noise
from ..modeling_asit import ASiTModel, ASiTPreTrainedModel
from .losses import (
    Center,
    distill_rows,
    mean_over_processes,
    patch_distillation_loss,
    reconstruction_loss,
    view_distillation_loss,
)

# Number of patches on which the teacher's patch distribution is monitored.
MONITORED_PATCHES = 256


@dataclass
class ASiTForPreTrainingOutput(ModelOutput):
    """
    Output of [`ASiTForPreTraining`].

    Args:
        loss (`torch.Tensor` of shape `()`): weighted sum of the losses.
        global_loss, local_loss, reconstruction_loss (`torch.Tensor` of shape `()`): unweighted losses; `None` for a
            weight of 0.
        reconstruction (`torch.Tensor` of shape `(batch, views, frames, mel)`): the student's reconstruction.
        cls_entropy, patch_entropy (`torch.Tensor` of shape `()`): mean entropy of the teacher's distributions in nats:
            log(prototypes) if they are uniform, 0 if they are one-hot.
        cls_logit_std, patch_logit_std (`torch.Tensor` of shape `()`): standard deviation of the teacher's logits over
            clips, or patches, averaged over prototypes; 0 if all have the same distribution.
        feature_std (`torch.Tensor` of shape `()`): standard deviation over clips of the teacher's L2-normalized CLS
            tokens, averaged over dimensions; 1 / sqrt(dimensions) for independent directions, 0 after a collapse.
    """

    loss: torch.FloatTensor | None = None
    global_loss: torch.FloatTensor | None = None
    local_loss: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    cls_entropy: torch.FloatTensor | None = None
    patch_entropy: torch.FloatTensor | None = None
    cls_logit_std: torch.FloatTensor | None = None
    patch_logit_std: torch.FloatTensor | None = None
    feature_std: torch.FloatTensor | None = None


class ASiTPrototypes(nn.Module):
    """Weight-normalized linear layer without bias: `weight` of shape `(prototypes, bottleneck)`."""

    def __init__(self, num_prototypes: int, bottleneck_size: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(num_prototypes, 1))
        self.weight_v = nn.Parameter(torch.empty(num_prototypes, bottleneck_size))

    @property
    def weight(self) -> torch.Tensor:
        return self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.linear(features, self.weight)


class ASiTDistillationHead(nn.Module):
    """MLP to L2-normalized features of shape `(..., bottleneck)`, and the prototypes that give their logits."""

    def __init__(self, config: ASiTConfig):
        super().__init__()
        hidden, bottleneck = config.distillation_hidden_size, config.distillation_bottleneck_size
        self.shared = config.num_patch_prototypes is None
        self.activation = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, bottleneck)
        self.cls_prototypes = ASiTPrototypes(config.num_prototypes, bottleneck)
        if not self.shared:
            self.patch_prototypes = ASiTPrototypes(config.num_patch_prototypes, bottleneck)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        features = self.fc3(self.activation(self.fc2(self.activation(self.fc1(hidden_states)))))
        return F.normalize(features.float(), dim=-1)

    def patch_weight(self) -> torch.Tensor:
        """Weight-normalized prototypes of patch tokens, `(prototypes, bottleneck)`."""
        return self.cls_prototypes.weight if self.shared else self.patch_prototypes.weight


class ASiTReconstructionHead(nn.Module):
    """Patch tokens `(batch, time_patches * mel_patches, hidden_size)` to a spectrogram `(batch, frames, mel)`."""

    def __init__(self, config: ASiTConfig):
        super().__init__()
        hidden = config.reconstruction_hidden_size or config.hidden_size
        bottleneck = config.reconstruction_bottleneck_size or config.hidden_size
        self.mel_patches, self.patch_size = config.position_grid[1], config.patch_size
        self.activation = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, bottleneck)
        self.projection = nn.ConvTranspose2d(bottleneck, 1, kernel_size=config.patch_size, stride=config.patch_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in (self.fc1, self.fc2, self.fc3):
            hidden_states = self.activation(layer(hidden_states))
        # the transposed convolution as one matrix product, since patches do not overlap
        pixels = F.linear(hidden_states, self.projection.weight.flatten(1).T) + self.projection.bias
        pixels = pixels.unflatten(-1, (self.patch_size, self.patch_size)).unflatten(1, (-1, self.mel_patches))
        return pixels.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class ASiTPreTrainingHeads(nn.Module):
    def __init__(self, config: ASiTConfig):
        super().__init__()
        self.distillation = ASiTDistillationHead(config)
        self.reconstruction = ASiTReconstructionHead(config)


class ASiTForPreTraining(ASiTPreTrainedModel):
    """
    ASiT for self-supervised pretraining. The student consists of the encoder `asit` and `heads`; `teacher` is a moving
    average of both. Checkpoints hold all of them and the centers; [`ASiTModel`] and the classifiers load the student's
    encoder from a checkpoint.
    """

    _distill = None  # `distill_rows`, if compiled
    has_trained_encoder, has_new_heads = False, True  # which weights come from a checkpoint, and which are random

    def __init__(self, config: ASiTConfig):
        super().__init__(config)
        if not (self.distills or config.reconstruction_loss_weight > 0):
            raise ValueError("expected at least one loss, got a weight of 0 for global, local and reconstruction loss")
        self.asit = ASiTModel(config)
        self.heads = ASiTPreTrainingHeads(config)
        self.teacher = nn.ModuleDict({"asit": ASiTModel(config), "heads": ASiTPreTrainingHeads(config)})
        self.cls_center = Center(config.num_prototypes)
        self.patch_center = Center(config.num_patch_prototypes or config.num_prototypes)
        self._freeze()
        self.post_init()
        self._keys_to_ignore_on_load_unexpected = set()  # the inherited list names modules of this model
        self.reset_teacher()

    @property
    def distills(self) -> bool:
        """Whether any loss needs the teacher."""
        return self.config.global_loss_weight > 0 or self.config.local_loss_weight > 0

    def train(self, mode: bool = True) -> "ASiTForPreTraining":
        super().train(mode)
        self.teacher.eval()
        return self

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any):
        """As in other models. From an encoder, heads are new and the teacher starts as a copy of the student."""
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        fresh = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
        if any(key.startswith("teacher.") for key in fresh):
            model.reset_teacher()
        model.has_trained_encoder = not any(key.startswith("asit.") for key in fresh)
        model.has_new_heads = "heads.distillation.fc1.weight" in fresh  # not if only prototypes are new
        model._freeze()  # loading creates new parameters
        return (model, info) if wants_info else model

    @classmethod
    def from_encoder(cls, encoder: ASiTModel) -> "ASiTForPreTraining":
        """A model with the configuration and weights of `encoder` in student and teacher, and new heads."""
        model = cls(encoder.config)
        model.asit.load_state_dict(encoder.state_dict())
        model.reset_teacher()
        model.has_trained_encoder = True
        return model

    @torch.no_grad()
    def reset_teacher(self) -> None:
        """Makes the teacher a copy of the student."""
        for teacher, student in self._teacher_and_student():
            teacher.copy_(student)

    @torch.no_grad()
    def standardize_head_inputs(self, cls_tokens: torch.Tensor) -> None:
        """
        Folds mean and standard deviation of `cls_tokens`, `(tokens, hidden_size)`, into the first layer of the
        distillation heads, so that new heads start with standardized inputs. The CLS tokens of a trained encoder are
        nearly the same for all clips, and the heads would take hundreds of steps to tell them apart.
        """
        std, mean = torch.std_mean(cls_tokens.float(), dim=0, correction=0)
        for heads in (self.heads, self.teacher["heads"]):
            layer = heads.distillation.fc1
            layer.weight.div_(std.clamp_min(1e-6))
            layer.bias.sub_(layer.weight @ mean)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Moving average: teacher = momentum * teacher + (1 - momentum) * student."""
        teachers, students = zip(*self._teacher_and_student())
        torch._foreach_mul_(teachers, momentum)
        torch._foreach_add_(teachers, students, alpha=1 - momentum)

    def compile_layers(self, **options: Any) -> None:
        """
        Compiles, in place, every layer of student and teacher and the body of the local loss. The loops between them
        would be unrolled or break the graph. All layers share three graphs: the student's global views, its local
        views, and the teacher's views. `options` of `torch.compile`: `fullgraph=True` and `dynamic=False` by default.
        """
        options = {"fullgraph": True, "dynamic": False, **options}
        for encoder in (self.asit, self.teacher["asit"]):
            for layer in encoder.layers:
                layer.compile(**options)
        self._distill = torch.compile(distill_rows, **options)

    def update_centers(self) -> None:
        """Moves both centers towards the mean of the teacher's logits since the last call, over all processes."""
        self.cls_center.update()
        self.patch_center.update()

    def forget_outputs(self) -> None:
        """Discards the teacher's logits since the last update of the centers, for a skipped step."""
        self.cls_center.forget()
        self.patch_center.forget()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        corrupted_values: torch.Tensor,
        corruption_mask: torch.Tensor,
        local_values: torch.Tensor | None = None,
        teacher_temperature: float = 0.07,
        drop_path_keys: torch.Tensor | None = None,
        mean_over_all: bool = True,
    ) -> ASiTForPreTrainingOutput:
        r"""
        Args:
            input_values (`torch.Tensor` of shape `(batch, views, frames, mel)`): clean global views.
            corrupted_values (`torch.Tensor` of the same shape): corrupted global views, the student's input.
            corruption_mask (`torch.Tensor` of the same shape): true for corrupted pixels.
            local_values (`torch.Tensor` of shape `(batch, crops, local frames, mel)`, *optional*): clean local crops;
                they enter the student and the global loss only.
            teacher_temperature (`float`, defaults to 0.07): temperature of the teacher's softmax.
            drop_path_keys (`torch.Tensor` of shape `(batch,)`, *optional*): int64 keys that decide which branches
                stochastic depth drops for each clip; by default torch's global generator decides.
            mean_over_all (`bool`, defaults to `True`): with several processes, average the reconstruction loss (and
                the local loss on corrupted patches) over the corrupted pixels of all of them; `False` averages per
                process, as the official code does.
        """
        shapes = [tuple(values.shape) for values in (input_values, corrupted_values, corruption_mask)]
        if len(set(shapes)) > 1 or len(shapes[0]) != 4:
            raise ValueError(
                "expected input_values, corrupted_values and corruption_mask of one shape (batch, views, frames, mel),"
                f" got {', '.join(map(str, shapes))}"
            )
        teacher = self.get_teacher_output(input_values)  # first, while no activations are kept for the backward pass
        student = self.get_student_output(corrupted_values, local_values, drop_path_keys)
        loss, losses = self.compute_losses(
            teacher, student, input_values, corruption_mask, teacher_temperature, mean_over_all
        )
        monitored = self._monitor(teacher, teacher_temperature)
        if self.training:
            self._accumulate_centers(teacher)
        return ASiTForPreTrainingOutput(loss=loss, **losses, reconstruction=student.get("reconstruction"), **monitored)

    @torch.no_grad()
    def get_teacher_output(self, input_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        The teacher's `cls_tokens` and `cls_logits`, `(batch, views, ...)`, if there is a global loss, and its
        `patch_features`, `(patches, bottleneck)`, and `patch_prototypes` if there is a local loss.
        """
        if not self.distills:
            return {}
        head, output = self.teacher["heads"].distillation, {}
        tokens = self._encode(self.teacher["asit"], input_values)
        if self.config.global_loss_weight > 0:
            output["cls_tokens"] = tokens[:, :, 0]
            output["cls_logits"] = head.cls_prototypes(head(tokens[:, :, 0]))
        if self.config.local_loss_weight > 0:
            output["patch_features"] = head(tokens[:, :, 1:].contiguous()).flatten(0, 2)
            output["patch_prototypes"] = head.patch_weight()
        return output

    def get_student_output(
        self,
        corrupted_values: torch.Tensor,
        local_values: torch.Tensor | None = None,
        drop_path_keys: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        As for the teacher, without `cls_tokens`, plus the `reconstruction`, `(batch, views, frames, mel)`; each only
        if its loss is used. In `cls_logits`, local crops follow the global views.
        """
        head, output = self.heads.distillation, {}
        views = corrupted_values.shape[:2]
        tokens = self._encode(self.asit, corrupted_values, self._drop_path_noise(drop_path_keys, views[1], 0))
        patches = tokens[:, :, 1:].contiguous()  # every linear layer would copy a slice
        if self.config.global_loss_weight > 0:
            cls_tokens = tokens[:, :, 0]
            if local_values is not None:
                noise = self._drop_path_noise(drop_path_keys, local_values.shape[1], 1)
                cls_tokens = torch.cat((cls_tokens, self._encode(self.asit, local_values, noise)[:, :, 0]), dim=1)
            output["cls_logits"] = head.cls_prototypes(head(cls_tokens))
        if self.config.local_loss_weight > 0:
            output["patch_features"] = head(patches).flatten(0, 2)
            output["patch_prototypes"] = head.patch_weight()
        if self.config.reconstruction_loss_weight > 0:
            output["reconstruction"] = self.heads.reconstruction(patches.flatten(0, 1)).unflatten(0, views)
        return output

    def compute_losses(
        self,
        teacher: dict[str, torch.Tensor],
        student: dict[str, torch.Tensor],
        input_values: torch.Tensor,
        corruption_mask: torch.Tensor,
        teacher_temperature: float,
        mean_over_all: bool = True,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The weighted sum of the losses, and the unweighted losses by name."""
        config, losses = self.config, {}
        temperatures = config.student_temperature, teacher_temperature
        if config.global_loss_weight > 0:
            losses["global_loss"] = view_distillation_loss(
                student["cls_logits"], teacher["cls_logits"], self.cls_center.center, *temperatures
            )
        if config.local_loss_weight > 0:
            weights = count = None
            if config.local_loss_patches == "corrupted":
                weights = corrupted_patches(corruption_mask, config.patch_size).flatten().float()
                count = mean_over_processes(weights.sum()) if mean_over_all else None
            patches = [output[f"patch_{part}"] for output in (student, teacher) for part in ("features", "prototypes")]
            losses["local_loss"] = patch_distillation_loss(
                *patches, self.patch_center.center, *temperatures, weights, count, self._distill
            )
        if config.reconstruction_loss_weight > 0:
            frames = student["reconstruction"].shape[2]  # without trailing frames that do not fill a patch
            target, mask = input_values[:, :, :frames], corruption_mask[:, :, :frames]
            count = mean_over_processes(mask.sum()) if mean_over_all else None
            losses["reconstruction_loss"] = reconstruction_loss(student["reconstruction"], target, mask, count)
        return sum(getattr(config, f"{name}_weight") * loss for name, loss in losses.items()), losses

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ASiTPrototypes):
            init.ones_(module.weight_g)
            init.kaiming_uniform_(module.weight_v, a=5**0.5)
        elif isinstance(module, Center):
            init.zeros_(module.center)

    def _freeze(self) -> None:
        """Freezes parameters that no loss reaches, so that neither the optimizer nor DDP expects their gradients."""
        self.teacher.requires_grad_(False)
        head = self.heads.distillation
        if not self.distills:
            head.requires_grad_(False)
        elif not head.shared:
            used = self.config.global_loss_weight > 0, self.config.local_loss_weight > 0
            for prototypes, is_used in zip((head.cls_prototypes, head.patch_prototypes), used):
                prototypes.weight_g.requires_grad_(False)
                prototypes.weight_v.requires_grad_(is_used)
        if not self.config.reconstruction_loss_weight > 0:
            self.heads.reconstruction.requires_grad_(False)

    def _teacher_and_student(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        students = [*self.asit.parameters(), *self.heads.parameters()]
        teachers = [*self.teacher["asit"].parameters(), *self.teacher["heads"].parameters()]
        return list(zip(teachers, students))

    @staticmethod
    def _encode(encoder: ASiTModel, views: torch.Tensor, drop_path_noise: torch.Tensor | None = None) -> torch.Tensor:
        """Views `(batch, views, frames, mel)` to tokens `(batch, views, 1 + patches, hidden_size)`."""
        tokens = encoder(views.flatten(0, 1), drop_path_noise=drop_path_noise).last_hidden_state
        return tokens.unflatten(0, views.shape[:2])

    @torch.compiler.disable  # the hash overflows in the compiler's constants
    def _drop_path_noise(self, keys: torch.Tensor | None, num_views: int, stream: int) -> torch.Tensor | None:
        """Noise of shape `(layers, 2, batch * views)` from one key per clip."""
        if keys is None or not self.training or self.config.drop_path_rate == 0:
            return None
        layers = self.config.num_hidden_layers
        view_keys = mix_keys(keys[:, None], stream, torch.arange(num_views, device=keys.device))
        return uniform_noise(view_keys.flatten(), layers * 2).T.reshape(layers, 2, -1)

    @torch.no_grad()
    def _monitor(self, teacher: dict[str, torch.Tensor], temperature: float) -> dict[str, torch.Tensor]:
        """The values by which a collapse of the distillation is recognized; see [`ASiTForPreTrainingOutput`]."""
        values = {}
        if "cls_logits" in teacher:
            directions = F.normalize(teacher["cls_tokens"].float(), dim=-1).flatten(0, 1)
            values["cls_entropy"] = _entropy(teacher["cls_logits"], self.cls_center.center, temperature)
            values["cls_logit_std"] = _logit_std(teacher["cls_logits"])
            values["feature_std"] = directions.std(0, correction=0).mean()
        if "patch_features" in teacher:
            stride = max(1, len(teacher["patch_features"]) // MONITORED_PATCHES)
            logits = teacher["patch_features"][::stride] @ teacher["patch_prototypes"].T
            values["patch_entropy"] = _entropy(logits, self.patch_center.center, temperature)
            values["patch_logit_std"] = _logit_std(logits)
        return values

    @torch.no_grad()
    def _accumulate_centers(self, teacher: dict[str, torch.Tensor]) -> None:
        if "cls_logits" in teacher:
            logits = teacher["cls_logits"].float().flatten(0, -2)
            self.cls_center.accumulate(logits.mean(0), len(logits))
        if "patch_features" in teacher:
            features, prototypes = teacher["patch_features"], teacher["patch_prototypes"]
            # the mean of the logits is the logits of the mean, which avoids a second pass over all of them
            with torch.autocast(features.device.type, enabled=False):
                mean_logits = prototypes.float() @ features.mean(0)
            self.patch_center.accumulate(mean_logits, len(features))


def corrupted_patches(corruption_mask: torch.Tensor, patch_size: int) -> torch.Tensor:
    """
    Patches with at least half of their pixels corrupted, in the order of the tokens: a mask of shape
    `(batch, views, frames, mel)` to one of shape `(batch, views, time_patches * mel_patches)`.
    """
    squares = corruption_mask.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)
    return (squares.float().mean((-2, -1)) >= 0.5).flatten(2)


def _entropy(logits: torch.Tensor, center: torch.Tensor, temperature: float) -> torch.Tensor:
    log_probabilities = ((logits.float() - center) / temperature).log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1).mean()


def _logit_std(logits: torch.Tensor) -> torch.Tensor:  # the center would not change it
    return logits.float().flatten(0, -2).std(0, correction=0).mean()


__all__ = ["ASiTForPreTraining", "ASiTForPreTrainingOutput"]
