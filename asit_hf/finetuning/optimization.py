"""Optimization of finetuning: layer-wise learning rates, AST's step decay, label smoothing, averaged checkpoints."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from ..modeling_asit import ASiTPreTrainedModel

_NO_WEIGHT_DECAY = ("position_embeddings", "cls_token")


def param_groups_layer_decay(
    model: ASiTPreTrainedModel, weight_decay: float = 0.05, layer_decay: float = 0.75
) -> list[dict]:
    """
    Parameter groups with layer-wise learning rates, as timm's function of this name returns them. `lr_scale` is 1 for
    the classifier and the last norm, `layer_decay` for the last layer, and so on down to `layer_decay ** (layers + 1)`
    for the embeddings. Frozen parameters are excluded.

    Args:
        model ([`ASiTForAudioClassification`] or another model with the encoder as `asit`).
        weight_decay (`float`): of matrices; vectors, position embeddings and the CLS token have none.
        layer_decay (`float`): above 0 and at most 1, which gives all layers one learning rate.

    Returns:
        `list[dict]` with `params`, `lr_scale` and `weight_decay`; the caller sets `lr` from `lr_scale`.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be above 0 and at most 1, got {layer_decay}")
    num_layers = model.config.num_hidden_layers
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() > 1 and not name.endswith(_NO_WEIGHT_DECAY)
            groups.setdefault((_depth(name, num_layers), decays), []).append(parameter)
    return [
        {
            "params": groups[depth, decays],
            "lr_scale": layer_decay ** (num_layers + 1 - depth),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for depth, decays in sorted(groups)
    ]


def step_decay(step: int, steps_per_epoch: int, start: int, every: int, gamma: float, warmup_steps: int = 0) -> float:
    """
    Factor of the peak learning rate at an optimizer step, as in AST: linear warm-up from 0, then one factor of `gamma`
    after `start` epochs and another after every further `every` epochs.
    """
    epoch = step // steps_per_epoch
    decays = 0 if epoch < start else 1 + (epoch - start) // every
    warmup = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    return warmup * gamma**decays


def smooth_labels(labels: torch.Tensor, num_labels: int, factor: float) -> torch.Tensor:
    """
    Targets `(batch, num_labels)` of which a share of `factor` is divided equally among all classes.

    Args:
        labels (`torch.Tensor` of shape `(batch,)` or `(batch, num_labels)`): class ids, or hard or soft targets.
    """
    if not labels.is_floating_point():
        labels = nn.functional.one_hot(labels, num_labels)
    if labels.dim() != 2:
        raise ValueError(f"expected class ids or targets (batch, {num_labels}), got {tuple(labels.shape)}")
    return (1 - factor) * labels.float() + factor / num_labels


def average_checkpoints(folders: Sequence[str | PathLike]) -> dict[str, torch.Tensor]:
    """
    The mean of the weights of several checkpoints of one model, summed in float64, as a state dict. `folders` were
    written by `save_pretrained`; `ValueError` without any, or if names or shapes of the weights differ.
    """
    from safetensors.torch import load_file

    if not folders:
        raise ValueError("expected at least one checkpoint to average, got none")
    sums: dict[str, torch.Tensor] = {}
    for folder in folders:
        weights = load_file(Path(folder) / "model.safetensors")
        before, shapes = ({name: value.shape for name, value in one.items()} for one in (sums, weights))
        if before and before != shapes:
            raise ValueError(f"cannot average {folders[0]} and {folder}: names or shapes of their weights differ")
        for name, value in weights.items():
            sums[name] = sums.get(name, 0) + value.double()
    return {name: (value / len(folders)).to(weights[name].dtype) for name, value in sums.items()}


def _depth(name: str, num_layers: int) -> int:
    """0 for the embeddings, 1 for the first layer, `num_layers + 1` for the last norm and the classifier."""
    parts = name.removeprefix("asit.").split(".")
    if parts[0] == "embeddings":
        return 0
    return int(parts[1]) + 1 if parts[0] == "layers" else num_layers + 1
