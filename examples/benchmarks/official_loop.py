"""
The authors' pretraining loop, restated without optimization: the baseline of `training_step.py` and `gpu.py`.

Attention is a pair of matrix products, logits are kept in memory as a whole, gradient norms are read and teacher
weights updated one tensor at a time, and masks are drawn by a loop in Python.
"""

import copy
import math
import random
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from asit_hf import ASiTConfig, ASiTForPreTraining
from asit_hf.pretraining.masking import GMML


class Attention(nn.Module):
    def __init__(self, size: int, num_heads: int, fused: bool):
        super().__init__()
        self.num_heads, self.fused = num_heads, fused
        self.qkv = nn.Linear(size, 3 * size)
        self.output = nn.Linear(size, size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, length, size = tokens.shape
        heads = self.qkv(tokens).view(batch, length, 3, self.num_heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        if self.fused:
            attended = F.scaled_dot_product_attention(query, key, value)
        else:
            scores = query @ key.transpose(-1, -2) * (size // self.num_heads) ** -0.5
            attended = scores.softmax(-1) @ value
        return self.output(attended.transpose(1, 2).reshape(batch, length, size))


class Block(nn.Module):
    def __init__(self, config: ASiTConfig, drop_path: float, fused: bool):
        super().__init__()
        size, hidden = config.hidden_size, config.intermediate_size
        self.drop_path = drop_path
        self.norm_1 = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.attention = Attention(size, config.num_attention_heads, fused)
        self.norm_2 = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.mlp = nn.Sequential(nn.Linear(size, hidden), nn.GELU(), nn.Linear(hidden, size))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens + self._drop(self.attention(self.norm_1(tokens)))
        return tokens + self._drop(self.mlp(self.norm_2(tokens)))

    def _drop(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        keeps = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch / (1 - self.drop_path) * keeps.to(branch.dtype)


class Encoder(nn.Module):
    def __init__(self, config: ASiTConfig, drop_path_rate: float, fused: bool):
        super().__init__()
        self.grid = config.position_grid
        time_patches, mel_patches = self.grid
        self.patches = nn.Conv2d(1, config.hidden_size, config.patch_size, config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.positions = nn.Parameter(torch.zeros(1, 1 + time_patches * mel_patches, config.hidden_size))
        rates = torch.linspace(0, drop_path_rate, config.num_hidden_layers).tolist()
        self.blocks = nn.Sequential(*(Block(config, rate, fused) for rate in rates))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, spectrograms: torch.Tensor) -> torch.Tensor:
        """(batch, 1, frames, mel) -> (batch, 1 + patches, size)."""
        patches = self.patches(spectrograms)
        positions = self._positions(patches.shape[2])
        tokens = torch.cat((self.cls_token.expand(len(patches), -1, -1), patches.flatten(2).transpose(1, 2)), dim=1)
        return self.norm(self.blocks(tokens + positions))

    def _positions(self, time_patches: int) -> torch.Tensor:
        if time_patches == self.grid[0]:
            return self.positions
        grid = self.positions[:, 1:].transpose(1, 2).unflatten(2, self.grid)
        resized = F.interpolate(grid, size=(time_patches, self.grid[1]), mode="bicubic", align_corners=False)
        return torch.cat((self.positions[:, :1], resized.flatten(2).transpose(1, 2)), dim=1)


class Prototypes(nn.Module):
    """A weight-normalized linear layer."""

    def __init__(self, count: int, size: int, trainable_gain: bool):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(count, 1), requires_grad=trainable_gain)
        self.direction = nn.Parameter(torch.empty(count, size))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.linear(features, self.gain * self.direction / self.direction.norm(dim=1, keepdim=True))


class DistillationHead(nn.Module):
    def __init__(self, config: ASiTConfig):
        super().__init__()
        hidden, bottleneck = config.distillation_hidden_size, config.distillation_bottleneck_size
        shared = config.num_patch_prototypes is None
        self.mlp = _mlp(config.hidden_size, hidden, bottleneck)
        self.cls = Prototypes(config.num_prototypes, bottleneck, trainable_gain=shared)
        self.patch = self.cls if shared else Prototypes(config.num_patch_prototypes, bottleneck, trainable_gain=False)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = F.normalize(self.mlp(tokens), dim=-1)
        return self.cls(features[:, 0]), self.patch(features[:, 1:])


class ReconstructionHead(nn.Module):
    def __init__(self, config: ASiTConfig):
        super().__init__()
        hidden = config.reconstruction_hidden_size or config.hidden_size
        bottleneck = config.reconstruction_bottleneck_size or config.hidden_size
        self.grid = config.position_grid
        self.mlp = nn.Sequential(_mlp(config.hidden_size, hidden, bottleneck), nn.GELU())
        self.pixels = nn.ConvTranspose2d(bottleneck, 1, config.patch_size, config.patch_size)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.pixels(self.mlp(patches).transpose(1, 2).unflatten(2, self.grid))


class Network(nn.Module):
    def __init__(self, config: ASiTConfig, drop_path_rate: float, fused: bool):
        super().__init__()
        self.encoder = Encoder(config, drop_path_rate, fused)
        self.distillation = DistillationHead(config)
        self.reconstruction = ReconstructionHead(config)


class OfficialLoop:
    """
    Student, teacher, centers and optimizer, updated by `step`.

    Args:
        model ([`ASiTForPreTraining`]): provides sizes, loss weights, initial weights and device.
        gmml ([`GMML`]): corruption settings.
        bf16 (`bool`): whether to autocast the forward passes; the authors' default is float32.
        max_norm (`float`): largest gradient norm of a tensor.
        attention (`str`): "eager" for matrix products, or "sdpa" for torch's fused attention.
    """

    def __init__(
        self,
        model: ASiTForPreTraining,
        gmml: GMML,
        bf16: bool = False,
        max_norm: float = 3.0,
        attention: Literal["eager", "sdpa"] = "eager",
    ):
        if attention not in ("eager", "sdpa"):
            raise ValueError(f"expected attention 'eager' or 'sdpa', got {attention!r}")
        self.config, self.gmml, self.bf16, self.max_norm = model.config, gmml, bf16, max_norm
        self.student = Network(model.config, model.config.drop_path_rate, fused=attention == "sdpa").to(model.device)
        self.student.load_state_dict(restate_weights(model.asit, model.heads))
        self.teacher = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.teacher.load_state_dict(restate_weights(model.teacher["asit"], model.teacher["heads"]))
        self.cls_center = model.cls_center.center.clone()
        self.patch_center = model.patch_center.center.clone()
        trainable = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in trainable if parameter.dim() > 1]
        vectors = [parameter for parameter in trainable if parameter.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.04}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-6)

    def step(
        self,
        clean: torch.Tensor,
        local: torch.Tensor | None = None,
        momentum: float = 0.996,
        corruption: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> dict[str, float]:
        """
        One step on `clean` (batch, views, frames, mel) and `local` (batch, crops, frames, mel). Masks are drawn unless
        `corruption` provides corrupted views and masks, both of `clean`'s shape.
        """
        views = _split(clean)
        corrupted, masks = corrupt_in_python(views, self.gmml) if corruption is None else map(_split, corruption)
        crops = [] if local is None else _split(local)
        with torch.autocast(clean.device.type, torch.bfloat16, enabled=self.bf16):
            losses = self.losses(views, corrupted, masks, crops)
        loss = losses["loss"]
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"loss is {loss.item()}")
        self.optimizer.zero_grad()
        loss.backward()
        self._clip()
        self.optimizer.step()
        with torch.no_grad():
            for teacher, student in zip(self.teacher.parameters(), self.student.parameters()):
                teacher.mul_(momentum).add_((1 - momentum) * student)
        return {name: value.item() for name, value in losses.items()}

    def losses(
        self,
        clean: list[torch.Tensor],
        corrupted: list[torch.Tensor],
        masks: list[torch.Tensor],
        local: list[torch.Tensor],
        temperature: float = 0.04,
    ) -> dict[str, torch.Tensor]:
        """Losses of lists of views, each (batch, 1, frames, mel). Updates the centers after their use."""
        with torch.no_grad():
            teacher_cls, teacher_patch = self.teacher.distillation(self.teacher.encoder(torch.cat(clean)))
        tokens = self.student.encoder(torch.cat(corrupted))
        student_cls, student_patch = self.student.distillation(tokens)
        pixels = self.student.reconstruction(tokens[:, 1:])
        if local:
            local_tokens = self.student.encoder(torch.cat(local))[:, :1]
            student_cls = torch.cat((student_cls, self.student.distillation(local_tokens)[0]))

        views = len(clean)
        targets = ((teacher_cls - self.cls_center) / temperature).softmax(-1).chunk(views)
        predictions = (student_cls / self.config.student_temperature).chunk(views + len(local))
        terms = [
            -(target * prediction.log_softmax(-1)).sum(-1).mean()
            for first, target in enumerate(targets)
            for second, prediction in enumerate(predictions)
            if first != second
        ]
        cls_loss = sum(terms) / len(terms)
        target = ((teacher_patch - self.patch_center) / temperature).softmax(-1)
        prediction = (student_patch / self.config.student_temperature).log_softmax(-1)
        patch_loss = -(target * prediction).sum(-1).mean()
        distance = F.l1_loss(pixels, torch.cat(clean), reduction="none")
        pixel_loss = distance[torch.cat(masks) == 1].mean()

        self.cls_center = 0.9 * self.cls_center + 0.1 * teacher_cls.mean(0)
        self.patch_center = 0.9 * self.patch_center + 0.1 * teacher_patch.mean((0, 1))
        config = self.config
        loss = (
            config.global_loss_weight * cls_loss
            + config.local_loss_weight * patch_loss
            + config.reconstruction_loss_weight * pixel_loss
        )
        return {"loss": loss, "global_loss": cls_loss, "local_loss": patch_loss, "reconstruction_loss": pixel_loss}

    def _clip(self) -> None:
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                norm = parameter.grad.norm().item()
                if norm > self.max_norm:
                    parameter.grad.mul_(self.max_norm / (norm + 1e-6))


def _split(views: torch.Tensor) -> list[torch.Tensor]:
    """(batch, views, frames, mel) -> a list of views of shape (batch, 1, frames, mel)."""
    return [view[:, None] for view in views.unbind(1)]


def corrupt_in_python(views: list[torch.Tensor], gmml: GMML) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Corrupts views (batch, 1, frames, mel) clip by clip: first with zeros, then some of them with another clip."""
    corrupted, masks = [], []
    for view in views:
        pairs = [zeros_in_python(clip, gmml) for clip in view]
        corrupted.append(torch.stack([pair[0] for pair in pairs]))
        masks.append(torch.stack([pair[1] for pair in pairs]))
        replace_in_python(view, corrupted[-1], masks[-1], gmml)
    return corrupted, masks


def zeros_in_python(clip: torch.Tensor, gmml: GMML) -> tuple[torch.Tensor, torch.Tensor]:
    """One clip (1, frames, mel) corrupted with zeros, and its mask."""
    return draw_in_python(clip, torch.zeros_like(clip), random.uniform(*gmml.mask_ratio), gmml)


def replace_in_python(clean: torch.Tensor, corrupted: torch.Tensor, masks: torch.Tensor, gmml: GMML) -> None:
    """Corrupts some clips of a view (batch, 1, frames, mel) with another clip of the batch instead, in place."""
    for row, clip in enumerate(clean):
        donor = clean[random.randrange(len(clean))]
        if random.random() < gmml.replace_probability:
            corrupted[row], masks[row] = draw_in_python(clip, donor, gmml.replace_ratio, gmml)


def draw_in_python(
    clip: torch.Tensor, filling: torch.Tensor, share: float, gmml: GMML
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies rectangles of `filling` into one clip (1, frames, mel) until a fraction `share` of it is replaced."""
    generator = np.random.default_rng()  # the authors also reseed for every mask
    _, frames, mel = clip.shape
    clip, mask = clip.clone(), torch.zeros_like(clip)
    while mask.sum() < share * frames * mel:
        top, left = generator.integers(frames - 1), generator.integers(mel - 1)
        height = min(generator.integers(1, int(frames * gmml.max_block_ratio)), frames - top)
        width = min(generator.integers(1, int(mel * gmml.max_block_ratio)), mel - left)
        block = (slice(None), slice(top, top + height), slice(left, left + width))
        clip[block] = filling[block].clone()
        mask[block] = 1
    return clip, mask


def restate_weights(encoder: nn.Module, heads: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of our encoder and heads under the names of this file's modules."""
    state = {
        "encoder.cls_token": encoder.embeddings.cls_token,
        "encoder.positions": encoder.embeddings.position_embeddings,
        **_prefixed("encoder.patches", encoder.embeddings.patch_embeddings.projection),
        **_prefixed("encoder.norm", encoder.layernorm),
        **_prefixed("reconstruction.pixels", heads.reconstruction.projection),
    }
    for index, layer in enumerate(encoder.layers):
        block, attention = f"encoder.blocks.{index}", layer.attention
        for kind in ("weight", "bias"):
            parts = [getattr(part, kind) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
            state[f"{block}.attention.qkv.{kind}"] = torch.cat(parts)
        state |= _prefixed(f"{block}.attention.output", attention.o_proj)
        state |= _prefixed(f"{block}.norm_1", layer.layernorm_before)
        state |= _prefixed(f"{block}.norm_2", layer.layernorm_after)
        state |= _prefixed(f"{block}.mlp.0", layer.mlp.fc1) | _prefixed(f"{block}.mlp.2", layer.mlp.fc2)
    for name, mlp in (("distillation.mlp", heads.distillation), ("reconstruction.mlp.0", heads.reconstruction)):
        for index, linear in enumerate((mlp.fc1, mlp.fc2, mlp.fc3)):
            state |= _prefixed(f"{name}.{2 * index}", linear)
    head = heads.distillation
    patch_prototypes = head.cls_prototypes if head.shared else head.patch_prototypes
    for name, prototypes in (("cls", head.cls_prototypes), ("patch", patch_prototypes)):
        state[f"distillation.{name}.gain"] = prototypes.weight_g
        state[f"distillation.{name}.direction"] = prototypes.weight_v
    return {name: value.detach() for name, value in state.items()}


def _prefixed(prefix: str, module: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{name}": value for name, value in module.named_parameters()}


def _mlp(size: int, hidden: int, bottleneck: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(size, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
    )
