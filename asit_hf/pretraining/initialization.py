"""Initializes the encoder from a vision transformer trained on images."""

import os
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.utils import logging

from ..configuration_asit import SIZES, ASiTConfig
from ..loading import read_model_type
from ..modeling_asit import ASiTModel

logger = logging.get_logger(__name__)

VIT_MODEL_TYPES = ("vit", "deit", "vit_mae", "vit_msn")
# Fields that the weights determine; both configurations have them under the same names.
_SHARED_FIELDS = (*SIZES["base"], "hidden_act", "layer_norm_eps", "qkv_bias")


def encoder_from_vit(
    name_or_path: str | os.PathLike, num_frames: int = 592, num_mel_bins: int = 128, **fields: Any
) -> ASiTModel:
    """
    An encoder that starts from a ViT checkpoint of transformers, as the authors' 2024 release does from ImageNet.

    The image's height becomes the time axis and its width the mel axis. Position embeddings are resized bicubically to
    `(time_patches, mel_patches)`, patch weights are summed over the colors; classifier, pooler and DeiT's distillation
    token are dropped.

    Args:
        name_or_path: folder or Hub name of a checkpoint of type `vit`, `deit`, `vit_mae` or `vit_msn`, with or without
            a head.
        num_frames (`int`, defaults to 592): frames of the input that the positions are resized for.
        num_mel_bins (`int`, defaults to 128): mel bins of the input.
        fields: other fields of [`ASiTConfig`]. Width, depth, heads, MLP, activation, layer norm epsilon, bias and
            patch size come from the checkpoint.

    Raises:
        OSError: the checkpoint does not exist.
        ValueError: another type of model, patches that are not square, a missing tensor, or a field that contradicts
            the checkpoint.
    """
    model_type = read_model_type(name_or_path)
    if model_type not in VIT_MODEL_TYPES:
        raise ValueError(f"{name_or_path}: expected model_type {', '.join(VIT_MODEL_TYPES)}, got {model_type!r}")
    vit_config = AutoConfig.from_pretrained(name_or_path)
    patch, image = _pair(vit_config.patch_size), _pair(vit_config.image_size)
    if patch[0] != patch[1]:
        raise ValueError(f"{name_or_path}: expected square patches, got {patch[0]} x {patch[1]}")
    decided = {**{name: getattr(vit_config, name) for name in _SHARED_FIELDS}, "patch_size": patch[0]}
    for name, value in decided.items():
        if fields.get(name, value) != value:
            raise ValueError(f"{name}: expected {value}, the value of {name_or_path}, got {fields[name]}")
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
    Resizes the position embeddings of patches, `(1, 1 + time_patches * mel_patches, hidden_size)`, bicubically from
    `grid` to `target`, both `(time_patches, mel_patches)`; that of the CLS token, the first, is kept.

    Raises:
        ValueError: the number of positions does not match `grid`.
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
        logger.warning("%s: the distillation token and its position embedding are dropped", name_or_path)
        positions = tensors["embeddings.position_embeddings"]
        tensors["embeddings.position_embeddings"] = torch.cat((positions[:, :1], positions[:, 2:]), dim=1)
    return tensors


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
