"""How finetuning steps: learning rates by layer, AST's step decay, smoothed labels, averaged weights."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from ..modeling_asit import ASiTPreTrainedModel

# Positions and the CLS token are few numbers that say where, not how: decaying them is no regularization.
_NOT_DECAYED = ("position_embeddings", "cls_token")


def param_groups_layer_decay(
    model: ASiTPreTrainedModel, learning_rate: float, weight_decay: float = 0.0, layer_decay: float = 1.0
) -> list[dict]:
    """
    Groups of trainable parameters for an optimizer. The classifier and the last norm have the full `learning_rate`,
    the last layer `layer_decay` times that, and so on down to the embeddings, `layer_decay ** (layers + 1)`. Weight
    decay is on matrices, without the positions and the CLS token.

    Args:
        model ([`ASiTForAudioClassification`] or another model with the encoder as `asit`).
        learning_rate (`float`): of the classifier.
        weight_decay (`float`): of matrices.
        layer_decay (`float`): above 0, at most 1, which means one learning rate for all.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be above 0 and at most 1, got {layer_decay}")
    num_layers = model.config.num_hidden_layers
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() > 1 and not name.endswith(_NOT_DECAYED)
            groups.setdefault((_depth(name, num_layers), decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * layer_decay ** (num_layers + 1 - depth),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (depth, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def step_decay(step: int, steps_per_epoch: int, start: int, every: int, gamma: float, warmup_steps: int = 0) -> float:
    """
    AST's schedule as a factor of the peak learning rate at an optimizer step: linear warm-up from 0, and `gamma` once
    after `start` epochs and once more after every further `every` epochs.
    """
    epoch = step // steps_per_epoch
    decays = 0 if epoch < start else 1 + (epoch - start) // every
    warmup = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    return warmup * gamma**decays


def smooth_labels(labels: torch.Tensor, num_labels: int, factor: float) -> torch.Tensor:
    """
    Targets `(batch, num_labels)` with a share of `factor` spread evenly over all classes.

    Args:
        labels (`torch.Tensor` of shape `(batch,)` or `(batch, num_labels)`): class ids, or targets, soft ones too.
    """
    if not labels.is_floating_point():
        labels = nn.functional.one_hot(labels, num_labels)
    if labels.dim() != 2:
        raise ValueError(f"expected class ids, or targets (batch, {num_labels}), to smooth; got {tuple(labels.shape)}")
    return (1 - factor) * labels.float() + factor / num_labels


def average_checkpoints(folders: Sequence[str | PathLike]) -> dict[str, torch.Tensor]:
    """
    The mean of the weights of several checkpoints of one model, as a state dict; summed in float64.

    Args:
        folders: as `save_pretrained` writes them.

    Raises:
        ValueError: no folder, or checkpoints with other weights.
    """
    from safetensors.torch import load_file

    if not folders:
        raise ValueError("expected at least one checkpoint to average, got none")
    sums: dict[str, torch.Tensor] = {}
    for folder in folders:
        weights = load_file(Path(folder) / "model.safetensors")
        if sums and {name: value.shape for name, value in sums.items()} != {
            name: value.shape for name, value in weights.items()
        }:
            raise ValueError(f"expected the weights of {folders[0]} in {folder}, their names or shapes differ")
        for name, value in weights.items():
            sums[name] = sums.get(name, 0) + value.double()
    return {name: (value / len(folders)).to(weights[name].dtype) for name, value in sums.items()}


def _depth(name: str, num_layers: int) -> int:
    """0 for the embeddings, 1 for the first layer, `num_layers + 1` for what follows the last one."""
    parts = name.removeprefix("asit.").split(".")
    if parts[0] == "embeddings":
        return 0
    return int(parts[1]) + 1 if parts[0] == "layers" else num_layers + 1
