"""The ASiT pretraining model: student, EMA teacher, heads and centers."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

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

# The teacher's entropy over patches is watched on this many of them.
MONITORED_PATCHES = 256


@dataclass
class ASiTForPreTrainingOutput(ModelOutput):
    """
    Output of [`ASiTForPreTraining`].

    Args:
        loss (`torch.Tensor` of shape `()`): weighted sum of the losses.
        global_loss, local_loss, reconstruction_loss (`torch.Tensor` of shape `()`): unweighted; `None` where
            switched off.
        reconstruction (`torch.Tensor` of shape `(batch, views, frames, mel)`): the student's clean-up of its input.
        cls_entropy, patch_entropy (`torch.Tensor` of shape `()`): mean entropy of the teacher's distributions, in
            nats. At log(prototypes) they are uniform, at 0 one-hot.
        cls_logit_std, patch_logit_std (`torch.Tensor` of shape `()`): standard deviation over clips, or patches, of
            the teacher's centerd logits, mean over prototypes; 0 when all get the same distribution.
        feature_std (`torch.Tensor` of shape `()`): standard deviation over clips of the teacher's L2-normalized CLS
            features, mean over dimensions; 1 / sqrt(dimensions) when they are spread out, 0 when collapsed.
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

    def __init__(self, num_prototypes: int, bottleneck_size: int, trainable_gain: bool):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(num_prototypes, 1), requires_grad=trainable_gain)
        self.weight_v = nn.Parameter(torch.empty(num_prototypes, bottleneck_size))

    @property
    def weight(self) -> torch.Tensor:
        return self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.linear(features, self.weight)


class ASiTDistillationHead(nn.Module):
    """MLP to L2-normalized features `(..., bottleneck)`, and the prototypes they are compared with."""

    def __init__(self, config: ASiTConfig):
        super().__init__()
        hidden, bottleneck = config.distillation_hidden_size, config.distillation_bottleneck_size
        shared = config.num_patch_prototypes is None
        self.activation = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, bottleneck)
        self.cls_prototypes = ASiTPrototypes(config.num_prototypes, bottleneck, trainable_gain=shared)
        if not shared:
            self.patch_prototypes = ASiTPrototypes(config.num_patch_prototypes, bottleneck, trainable_gain=False)
        self.shared = shared

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        features = self.fc3(self.activation(self.fc2(self.activation(self.fc1(hidden_states)))))
        return F.normalize(features.float(), dim=-1)

    def patch_weight(self) -> torch.Tensor:
        """Effective prototypes of patch tokens, `(prototypes, bottleneck)`."""
        return self.cls_prototypes.weight if self.shared else self.patch_prototypes.weight


class ASiTReconstructionHead(nn.Module):
    """Patch tokens `(batch, columns * rows, hidden_size)` to a spectrogram `(batch, frames, mel)`."""

    def __init__(self, config: ASiTConfig):
        super().__init__()
        hidden = config.reconstruction_hidden_size or config.hidden_size
        bottleneck = config.reconstruction_bottleneck_size or config.hidden_size
        self.rows = config.position_grid[1]
        self.patch_size = config.patch_size
        self.activation = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, bottleneck)
        self.projection = nn.ConvTranspose2d(bottleneck, 1, kernel_size=config.patch_size, stride=config.patch_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in (self.fc1, self.fc2, self.fc3):
            hidden_states = self.activation(layer(hidden_states))
        # the transposed convolution as one matrix product: its patches do not overlap
        pixels = F.linear(hidden_states, self.projection.weight.flatten(1).T) + self.projection.bias
        pixels = pixels.unflatten(-1, (self.patch_size, self.patch_size)).unflatten(1, (-1, self.rows))
        return pixels.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class ASiTPreTrainingHeads(nn.Module):
    def __init__(self, config: ASiTConfig):
        super().__init__()
        self.distillation = ASiTDistillationHead(config)
        self.reconstruction = ASiTReconstructionHead(config)


class ASiTForPreTraining(ASiTPreTrainedModel):
    """
    ASiT with everything its self-supervised pretraining needs. The student's encoder is `asit`, its heads `heads`; the
    teacher, a moving average of both, is `teacher`. All of it and the centers are saved, so a checkpoint resumes by
    itself; [`ASiTModel`] and the classifiers load the student's encoder from it.
    """

    accepts_loss_kwargs = False
    _distill = None  # the body of the local loss, once it is compiled

    def __init__(self, config: ASiTConfig):
        super().__init__(config)
        if not (self.distils or config.reconstruction_loss_weight > 0):
            raise ValueError(
                "pretraining needs a loss: global_loss_weight, local_loss_weight or reconstruction_loss_weight above 0"
            )
        self.asit = ASiTModel(config)
        self.heads = ASiTPreTrainingHeads(config)
        self.teacher = nn.ModuleDict({"asit": ASiTModel(config), "heads": ASiTPreTrainingHeads(config)})
        self.cls_center = Center(config.num_prototypes)
        self.patch_center = Center(config.num_patch_prototypes or config.num_prototypes)
        self._freeze()
        self.post_init()
        self._keys_to_ignore_on_load_unexpected = set()  # the encoder's list holds what this model has a place for
        self.reset_teacher()

    @property
    def distils(self) -> bool:
        """Whether any loss needs the teacher."""
        return self.config.global_loss_weight > 0 or self.config.local_loss_weight > 0

    def train(self, mode: bool = True) -> "ASiTForPreTraining":
        super().train(mode)
        self.teacher.eval()
        return self

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any):
        """As in other models; from a bare encoder, heads are fresh and the teacher starts as a copy of the student."""
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        fresh = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
        if any(key.startswith("teacher.") for key in fresh):
            model.reset_teacher()
        model._freeze()  # loading makes new parameters
        return (model, info) if wants_info else model

    @torch.no_grad()
    def reset_teacher(self) -> None:
        """Makes the teacher a copy of the student."""
        for teacher, student in self._teacher_and_student():
            teacher.copy_(student)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """One step of the moving average: teacher = momentum * teacher + (1 - momentum) * student."""
        teachers, students = zip(*self._teacher_and_student())
        torch._foreach_mul_(teachers, momentum)
        torch._foreach_add_(teachers, students, alpha=1 - momentum)

    def compile_layers(self, **options: Any) -> None:
        """
        Compiles every layer of student and teacher, in place, and the body of the local loss. Not the model: between
        the layers there are loops and choices, which would be unrolled or break the graph. All layers share three
        graphs, those of the student's global and local views and of the teacher's.

        Args:
            options: of `torch.compile`, over `fullgraph=True` and `dynamic=False`.
        """
        options = {"fullgraph": True, "dynamic": False, **options}
        for encoder in (self.asit, self.teacher["asit"]):
            for layer in encoder.layers:
                layer.compile(**options)
        self._distill = torch.compile(distill_rows, **options)

    def update_centers(self) -> None:
        """Moves both centers towards the mean teacher outputs since the last call, over all processes."""
        self.cls_center.update()
        self.patch_center.update()

    def forget_outputs(self) -> None:
        """Drops the teacher outputs since the last update of the centers, for a step that is skipped."""
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
            corrupted_values (`torch.Tensor` of the same shape): what the student sees.
            corruption_mask (`torch.Tensor` of the same shape): true where the two differ by corruption.
            local_values (`torch.Tensor` of shape `(batch, crops, local frames, mel)`, *optional*): clean short crops,
                seen by the student only; they enter the global loss only.
            teacher_temperature (`float`, defaults to 0.07): temperature of the teacher's softmax.
            drop_path_keys (`torch.Tensor` of shape `(batch,)`, *optional*): int64 keys that decide what stochastic
                depth drops for each clip; without them the global generator does.
            mean_over_all (`bool`, defaults to `True`): over several processes, the reconstruction loss (and the local
                one on corrupted patches) is the mean over the corrupted pixels of all of them; `False`: each process
                takes the mean over its own, as the authors do.
        """
        shape = input_values.shape
        if input_values.dim() != 4 or corrupted_values.shape != shape or corruption_mask.shape != shape:
            raise ValueError(
                "input_values, corrupted_values and corruption_mask must have one shape (batch, views, frames, mel), "
                f"got {tuple(shape)}, {tuple(corrupted_values.shape)} and {tuple(corruption_mask.shape)}"
            )
        config = self.config
        output = ASiTForPreTrainingOutput()
        if self.distils:  # first, while nothing is kept for the backward pass
            with torch.no_grad():
                teacher = self._encode(self.teacher["asit"], input_values)
        student = self._encode(self.asit, corrupted_values, self._drop_path_noise(drop_path_keys, shape[1], 0))
        patches = student[:, :, 1:].contiguous()  # a slice would cost every linear layer a copy

        if config.global_loss_weight > 0:
            cls_tokens = student[:, :, 0]
            if local_values is not None:
                noise = self._drop_path_noise(drop_path_keys, local_values.shape[1], 1)
                local_tokens = self._encode(self.asit, local_values, noise)[:, :, 0]
                cls_tokens = torch.cat((cls_tokens, local_tokens), dim=1)
            self._add_global_loss(output, cls_tokens, teacher[:, :, 0], teacher_temperature)
        if config.local_loss_weight > 0:
            counted = None
            if config.local_loss_patches == "corrupted":
                counted = corrupted_patches(corruption_mask, config.patch_size).flatten()
            teacher_patches = teacher[:, :, 1:].contiguous()
            self._add_local_loss(output, patches, teacher_patches, counted, mean_over_all, teacher_temperature)
        if config.reconstruction_loss_weight > 0:
            pixels = self.heads.reconstruction(patches.flatten(0, 1)).unflatten(0, shape[:2])
            frames = pixels.shape[2]  # the last frames short of a patch are cut
            output.reconstruction = pixels
            mask = corruption_mask[:, :, :frames]
            count = mean_over_processes(mask.sum()) if mean_over_all else None
            output.reconstruction_loss = reconstruction_loss(pixels, input_values[:, :, :frames], mask, count)
        terms = [
            (config.global_loss_weight, output.global_loss),
            (config.local_loss_weight, output.local_loss),
            (config.reconstruction_loss_weight, output.reconstruction_loss),
        ]
        loss = sum(weight * loss for weight, loss in terms if loss is not None)
        return ASiTForPreTrainingOutput(loss=loss, **output)  # the loss comes first in the tuple

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ASiTPrototypes):
            init.ones_(module.weight_g)
            init.kaiming_uniform_(module.weight_v, a=5**0.5)
        elif isinstance(module, Center):
            init.zeros_(module.center)

    def _freeze(self) -> None:
        """What no loss reaches gets no gradient, so that neither the optimizer nor DDP waits for it."""
        self.teacher.requires_grad_(False)
        head = self.heads.distillation
        if not head.shared:
            for prototypes in (head.cls_prototypes, head.patch_prototypes):
                prototypes.weight_g.requires_grad_(False)
        if not self.distils:
            head.requires_grad_(False)
        elif not head.shared and not self.config.global_loss_weight > 0:
            head.cls_prototypes.requires_grad_(False)
        elif not head.shared and not self.config.local_loss_weight > 0:
            head.patch_prototypes.requires_grad_(False)
        if not self.config.reconstruction_loss_weight > 0:
            self.heads.reconstruction.requires_grad_(False)

    def _teacher_and_student(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        students = [*self.asit.parameters(), *self.heads.parameters()]
        teachers = [*self.teacher["asit"].parameters(), *self.teacher["heads"].parameters()]
        return list(zip(teachers, students))

    @staticmethod
    def _encode(encoder: ASiTModel, views: torch.Tensor, drop_path_noise: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, views, frames, mel) -> tokens (batch, views, 1 + patches, hidden)."""
        tokens = encoder(views.flatten(0, 1), drop_path_noise=drop_path_noise).last_hidden_state
        return tokens.unflatten(0, views.shape[:2])

    @torch.compiler.disable  # the compiler's constants overflow where the hash wraps around
    def _drop_path_noise(self, keys: torch.Tensor | None, num_views: int, stream: int) -> torch.Tensor | None:
        """Noise of shape (layers, 2, batch * views) from one key a clip."""
        if keys is None or not self.training or self.config.drop_path_rate == 0:
            return None
        layers = self.config.num_hidden_layers
        view_keys = mix_keys(keys[:, None], stream, torch.arange(num_views, device=keys.device))
        return uniform_noise(view_keys.flatten(), layers * 2).T.reshape(layers, 2, -1)

    def _add_global_loss(
        self, output: ASiTForPreTrainingOutput, student: torch.Tensor, teacher: torch.Tensor, temperature: float
    ) -> None:
        with torch.no_grad():
            head = self.teacher["heads"].distillation
            teacher_features = head(teacher)
            teacher_logits = head.cls_prototypes(teacher_features)
        student_logits = self.heads.distillation.cls_prototypes(self.heads.distillation(student))
        center = self.cls_center.center
        output.global_loss = view_distillation_loss(
            student_logits, teacher_logits, center, self.config.student_temperature, temperature
        )
        output.cls_entropy = _entropy(teacher_logits, center, temperature)
        output.cls_logit_std = _spread(teacher_logits)
        output.feature_std = F.normalize(teacher.detach().float(), dim=-1).flatten(0, 1).std(0, correction=0).mean()
        if self.training:
            rows = teacher_logits.float().flatten(0, -2)
            self.cls_center.accumulate(rows.mean(0), len(rows))

    def _add_local_loss(
        self,
        output: ASiTForPreTrainingOutput,
        student: torch.Tensor,
        teacher: torch.Tensor,
        counted: torch.Tensor | None,
        mean_over_all: bool,
        temperature: float,
    ) -> None:
        with torch.no_grad():
            teacher_features = self.teacher["heads"].distillation(teacher).flatten(0, 2)
            teacher_weight = self.teacher["heads"].distillation.patch_weight()
        count = mean_over_processes(counted.sum()) if counted is not None and mean_over_all else None
        student_features = self.heads.distillation(student).flatten(0, 2)
        center = self.patch_center.center
        output.local_loss = patch_distillation_loss(
            student_features,
            self.heads.distillation.patch_weight(),
            teacher_features,
            teacher_weight,
            center,
            self.config.student_temperature,
            temperature,
            weights=None if counted is None else counted.float(),
            count=count,
            distill=self._distill,
        )
        stride = max(1, len(teacher_features) // MONITORED_PATCHES)
        some_logits = teacher_features[::stride] @ teacher_weight.T
        output.patch_entropy = _entropy(some_logits, center, temperature)
        output.patch_logit_std = _spread(some_logits)
        if self.training:
            # the mean of the logits is the logits of the mean: no second pass over all of them
            with torch.autocast(teacher_features.device.type, enabled=False):
                mean_logits = teacher_weight.float() @ teacher_features.mean(0)
            self.patch_center.accumulate(mean_logits, len(teacher_features))


def corrupted_patches(corruption_mask: torch.Tensor, patch_size: int) -> torch.Tensor:
    """
    Patches of which half the pixels or more are corrupted: a mask of shape (batch, views, frames, mel) to one of shape
    (batch, views, columns * rows), in the order of the tokens.
    """
    squares = corruption_mask.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)
    return (squares.float().mean((-2, -1)) >= 0.5).flatten(2)


@torch.no_grad()
def _entropy(logits: torch.Tensor, center: torch.Tensor, temperature: float) -> torch.Tensor:
    log_probabilities = ((logits.float() - center) / temperature).log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1).mean()


@torch.no_grad()
def _spread(logits: torch.Tensor) -> torch.Tensor:
    # centering moves every row alike and leaves the deviation as it is
    return logits.float().flatten(0, -2).std(0, correction=0).mean()


__all__ = ["ASiTForPreTraining", "ASiTForPreTrainingOutput"]
