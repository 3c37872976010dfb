"""Gradient norms and clipping of each tensor separately, sharded by FSDP or not."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Partial


@torch.no_grad()
def gradient_norms(model: nn.Module) -> torch.Tensor:
    """Gradient norms of the parameters that have a gradient, in the model's order: `(parameters,)`."""
    gradients = [gradient for _, gradient in _named_gradients(model)]
    norms = torch.stack(torch._foreach_norm([_local(gradient) for gradient in gradients]))
    if isinstance(gradients[0], DTensor):  # norms of this process's shards: sum the squares over all processes
        placements = [Partial() if place.is_shard() else place for place in gradients[0].placements]
        squares = DTensor.from_local(norms.square(), gradients[0].device_mesh, placements)
        norms = squares.full_tensor().sqrt()
    return norms


@torch.no_grad()
def clip_tensor_norms(model: nn.Module, max_norm: float, norms: torch.Tensor | None = None) -> torch.Tensor:
    """
    Scales the gradient of each parameter down to a norm of at most `max_norm` (0: no clipping). The query, key and
    value projections of a layer are clipped as one tensor, which they are in the authors' code.

    Args:
        norms (`torch.Tensor` of shape `(parameters,)`, *optional*): the result of [`gradient_norms`], if available.

    Returns:
        `torch.Tensor` of shape `()`: the norm of all gradients before clipping, finite only if every gradient is.
    """
    norms = gradient_norms(model) if norms is None else norms
    if max_norm > 0:
        names, gradients = zip(*_named_gradients(model))
        # gather and sum in a fixed order: index_add_ is not deterministic on an accelerator
        squares = F.pad(norms.square(), (0, 1))[_parts_of_tensors(names, norms.device)].sum(1)
        scales = (max_norm / (squares.sqrt() + 1e-6)).clamp_max(1.0)
        torch._foreach_mul_([_local(gradient) for gradient in gradients], scales.unbind())
    return norms.norm()


def _named_gradients(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor, or the tensor if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@lru_cache(maxsize=8)
def _parts_of_tensors(names: tuple[str, ...], device: torch.device) -> torch.Tensor:
    """
    For each parameter, the indices of those that form one tensor with it in the authors' code: `(parameters, 3)`,
    padded with the number of parameters.
    """
    merged = [name.replace("q_proj", "qkv").replace("k_proj", "qkv").replace("v_proj", "qkv") for name in names]
    parts: dict[str, list[int]] = {}
    for index, name in enumerate(merged):
        parts.setdefault(name, []).append(index)
    return torch.tensor([(parts[name] + [len(names)] * 3)[:3] for name in merged], device=device)
