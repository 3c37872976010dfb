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

VIT_MODEL_TYPES = ("vit", "deit", "vit_mae", "vit_msn", "dinov2", "dinov2_with_registers")
# Fields that the weights determine; both configurations have them under the same names.
_SHARED_FIELDS = (*SIZES["base"], "hidden_act", "layer_norm_eps", "qkv_bias")
# Parts of weight names in DINOv2, and in the ViTs of older transformers, and ASiT's; replaced in this order.
_NAMES = {
    "encoder.layer.": "layers.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".attention.attention.": ".attention.",
    ".query.": ".q_proj.",
    ".key.": ".k_proj.",
    ".value.": ".v_proj.",
    ".attention.output.dense.": ".attention.o_proj.",
    ".intermediate.dense.": ".mlp.fc1.",
    ".output.dense.": ".mlp.fc2.",
}
_SCALED = {"layer_scale1.lambda1": "attention.o_proj", "layer_scale2.lambda1": "mlp.fc2"}
_PATCHES = "embeddings.patch_embeddings.projection.weight"
_POSITIONS = "embeddings.position_embeddings"


def encoder_from_vit(
    name_or_path: str | os.PathLike,
    num_frames: int = 592,
    num_mel_bins: int = 128,
    patch_size: int | None = None,
    **fields: Any,
) -> ASiTModel:
    """
    An encoder that starts from a ViT checkpoint of transformers, as the authors' 2024 release does from ImageNet.

    The image's height becomes the time axis and its width the mel axis. Position embeddings are resized bicubically to
    `(time_patches, mel_patches)`, patch weights are summed over the colors, DINOv2's LayerScale is folded into the
    layers before it. Classifier, pooler, DeiT's distillation token and DINOv2's register tokens are dropped.

    Args:
        name_or_path: folder or Hub name of a checkpoint of type `vit`, `deit`, `vit_mae`, `vit_msn`, `dinov2` or
            `dinov2_with_registers`, with or without a head.
        num_frames (`int`, defaults to 592): frames of the input that the positions are resized for.
        num_mel_bins (`int`, defaults to 128): mel bins of the input.
        patch_size (`int`, *optional*): side of the patches, to which the patch weights are resized. `None` keeps the
            checkpoint's if `num_mel_bins` is a multiple of it, and is 16 otherwise (DINOv2: 14), with a warning.
        fields: other fields of [`ASiTConfig`]. Width, depth, heads, MLP, activation, layer norm epsilon and bias come
            from the checkpoint.

    Raises:
        OSError: the checkpoint does not exist.
        ValueError: another type of model, patches that are not square, a SwiGLU, a missing tensor, or a field that
            contradicts the checkpoint.
    """
    model_type = read_model_type(name_or_path)
    if model_type not in VIT_MODEL_TYPES:
        raise ValueError(f"{name_or_path}: expected model_type {', '.join(VIT_MODEL_TYPES)}, got {model_type!r}")
    vit_config = AutoConfig.from_pretrained(name_or_path)
    patch, image = _pair(vit_config.patch_size), _pair(vit_config.image_size)
    if patch[0] != patch[1]:
        raise ValueError(f"{name_or_path}: expected square patches, got {patch[0]} x {patch[1]}")
    decided = _read_fields(name_or_path, vit_config)
    for name, value in decided.items():
        if fields.get(name, value) != value:
            raise ValueError(f"{name}: expected {value}, the value of {name_or_path}, got {fields[name]}")
    if patch_size is None:
        patch_size = patch[0]
        if num_mel_bins % patch_size:
            patch_size = ASiTConfig.patch_size
            logger.warning(
                f"{name_or_path}: patches are resized from {patch[0]} x {patch[0]} to {patch_size} x {patch_size}, as "
                f"{num_mel_bins} mel bins are not a multiple of {patch[0]}"
            )
    chosen = {"num_frames": num_frames, "num_mel_bins": num_mel_bins, "patch_size": patch_size}
    config = ASiTConfig(**{**fields, **decided, **chosen})
    tensors = _load_tensors(name_or_path, vit_config)
    grid = (image[0] // patch[0], image[1] // patch[1])
    tensors[_POSITIONS] = resize_positions(tensors[_POSITIONS], grid, config.position_grid)
    tensors[_PATCHES] = resize_patches(tensors[_PATCHES].sum(1, keepdim=True), patch_size)
    encoder = ASiTModel(config)
    encoder.load_state_dict(tensors)
    return encoder


def resize_patches(weight: torch.Tensor, patch_size: int) -> torch.Tensor:
    """
    Resizes patch weights `(hidden_size, colors, height, width)` bicubically to `patch_size` x `patch_size`, and scales
    them by the ratio of the areas, so that the response to a constant patch stays about the same.
    """
    height, width = weight.shape[2:]
    if height == width == patch_size:
        return weight
    resized = F.interpolate(weight.float(), size=(patch_size, patch_size), mode="bicubic", align_corners=False)
    return resized * (height * width / patch_size**2)


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


def _read_fields(name_or_path: str | os.PathLike, vit_config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of [`ASiTConfig`] that the checkpoint determines."""
    values = vit_config.to_dict()
    if values.get("use_swiglu_ffn"):
        raise ValueError(f"{name_or_path}: expected a plain MLP, got SwiGLU: use a smaller DINOv2 than giant")
    if "mlp_ratio" in values:
        values["intermediate_size"] = int(values["hidden_size"] * values["mlp_ratio"])
    return {name: values[name] for name in _SHARED_FIELDS}


def _load_tensors(name_or_path: str | os.PathLike, vit_config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """The weights of the encoder alone, under ASiT's names."""
    without_pooler = {"add_pooling_layer": False} if vit_config.model_type in ("vit", "deit") else {}
    vit, info = AutoModel.from_pretrained(
        name_or_path, config=vit_config, dtype=torch.float32, output_loading_info=True, **without_pooler
    )
    unneeded = ("pooler.", *(f"embeddings.{name}" for name in ("mask_token", "distillation_token", "register_tokens")))
    if missing := sorted(key for key in info["missing_keys"] if not key.startswith(unneeded)):
        raise ValueError(f"{name_or_path}: {len(missing)} tensors are missing: {missing[0]}, ...")
    tensors = {_rename(key): value for key, value in vit.state_dict().items() if not key.startswith(unneeded)}
    if hasattr(vit.embeddings, "distillation_token"):
        logger.warning("%s: the distillation token and its position embedding are dropped", name_or_path)
        positions = tensors[_POSITIONS]
        tensors[_POSITIONS] = torch.cat((positions[:, :1], positions[:, 2:]), dim=1)
    if number := getattr(vit_config, "num_register_tokens", 0):
        logger.warning(
            "%s: its %d register tokens are dropped, so the outputs differ from the checkpoint's", name_or_path, number
        )
    for scale in [key for key in tensors if key.endswith(tuple(_SCALED))]:
        layer, index, name = scale.split(".", 2)
        factors, linear = tensors.pop(scale), f"{layer}.{index}.{_SCALED[name]}"
        tensors[f"{linear}.weight"] = tensors[f"{linear}.weight"] * factors[:, None]
        tensors[f"{linear}.bias"] = tensors[f"{linear}.bias"] * factors
    return tensors


def _rename(name: str) -> str:
    for old, new in _NAMES.items():
        name = name.replace(old, new)
    return name


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
