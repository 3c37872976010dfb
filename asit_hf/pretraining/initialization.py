"""Initializes the encoder from a vision transformer trained on images."""

import os
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.utils import logging

from ..configuration_asit import ASiTConfig
from ..loading import read_model_type
from ..modeling_asit import ASiTModel

logger = logging.get_logger(__name__)

VIT_MODEL_TYPES = ("vit", "deit", "vit_mae", "vit_msn")
# What the weights decide, by the names that both configurations have.
_SHARED_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "layer_norm_eps",
    "qkv_bias",
)


def encoder_from_vit(
    name_or_path: str | os.PathLike, num_frames: int = 592, num_mel_bins: int = 128, **fields: Any
) -> ASiTModel:
    """
    An encoder that starts from a ViT checkpoint of transformers, as the authors' 2024 release does from ImageNet.

    An image's height becomes time and its width mel, without turning patches or positions: positions are resized
    bicubically to the patch grid, patch weights summed over the colors. Classifier, pooler and DeiT's distillation
    token have no place in ASiT.

    Args:
        name_or_path: a folder or Hub name, of model type `vit`, `deit`, `vit_mae` or `vit_msn`, with or without a
            head.
        num_frames (`int`, defaults to 592): frames to resize the positions for.
        num_mel_bins (`int`, defaults to 128): mel bins of the input.
        fields: other fields of [`ASiTConfig`]. Width, depth, heads, MLP, activation, layer norm epsilon, bias and
            patch size are the checkpoint's.

    Raises:
        OSError: no such checkpoint.
        ValueError: another type of model, patches that are not square, weights that lack a tensor, or a field that
            contradicts the checkpoint.
    """
    model_type = read_model_type(name_or_path)
    if model_type not in VIT_MODEL_TYPES:
        raise ValueError(
            f"{name_or_path}: expected a ViT checkpoint, model_type {', '.join(VIT_MODEL_TYPES)}, got {model_type!r}"
        )
    vit_config = AutoConfig.from_pretrained(name_or_path)
    patch, image = _pair(vit_config.patch_size), _pair(vit_config.image_size)
    if patch[0] != patch[1]:
        raise ValueError(f"{name_or_path}: expected square patches, got {patch[0]} x {patch[1]}")
    decided = {**{name: getattr(vit_config, name) for name in _SHARED_FIELDS}, "patch_size": patch[0]}
    for name, value in decided.items():
        if fields.get(name, value) != value:
            raise ValueError(f"{name} is {value} in {name_or_path}, which cannot become {fields[name]}")
    config = ASiTConfig(**{**fields, **decided, "num_frames": num_frames, "num_mel_bins": num_mel_bins})
    tensors = _load_tensors(name_or_path, vit_config)
    tensors["embeddings.position_embeddings"] = resize_positions(
        tensors["embeddings.position_embeddings"], (image[0] // patch[0], image[1] // patch[1]), config.position_grid
    )
    patches = "embeddings.patch_embeddings.projection.weight"
    tensors[patches] = tensors[patches].sum(1, keepdim=True)
    encoder = ASiTModel(config)
    encoder.load_state_dict(tensors)
    return encoder


def resize_positions(positions: torch.Tensor, grid: tuple[int, int], target: tuple[int, int]) -> torch.Tensor:
    """
    Resizes position embeddings bicubically in two dimensions; that of the CLS token, the first, stays.

    Args:
        positions (`torch.Tensor` of shape `(1, 1 + rows * columns, hidden_size)`).
        grid (`tuple[int, int]`): rows and columns that the patch positions are read as, row after row.
        target (`tuple[int, int]`): rows and columns wanted.

    Returns:
        `torch.Tensor` of shape `(1, 1 + target rows * target columns, hidden_size)`.

    Raises:
        ValueError: another number of positions than `grid` has.
    """
    if positions.shape[1] - 1 != grid[0] * grid[1]:
        raise ValueError(f"expected {grid[0]} x {grid[1]} patch positions, got {positions.shape[1] - 1}")
    patches = positions[:, 1:].float().unflatten(1, grid).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=target, mode="bicubic", align_corners=False)
    return torch.cat((positions[:, :1].float(), patches.flatten(2).transpose(1, 2)), dim=1)


def _load_tensors(name_or_path: str | os.PathLike, vit_config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """The weights of the encoder alone."""
    vit, info = AutoModel.from_pretrained(
        name_or_path, config=vit_config, dtype=torch.float32, output_loading_info=True
    )
    unneeded = ("pooler.", "embeddings.mask_token", "embeddings.distillation_token")
    if missing := sorted(key for key in info["missing_keys"] if not key.startswith(unneeded)):
        raise ValueError(f"{name_or_path}: {len(missing)} tensors are missing: {missing[0]}, ...")
    tensors = {key: value for key, value in vit.state_dict().items() if not key.startswith(unneeded)}
    if hasattr(vit.embeddings, "distillation_token"):
        logger.warning("%s: the distillation token and its position are left out", name_or_path)
        positions = tensors["embeddings.position_embeddings"]
        tensors["embeddings.position_embeddings"] = torch.cat((positions[:, :1], positions[:, 2:]), dim=1)
    return tensors


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
