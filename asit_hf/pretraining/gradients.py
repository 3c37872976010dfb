"""Norms of gradients, tensor by tensor."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Partial


@torch.no_grad()
def gradient_norms(model: nn.Module) -> torch.Tensor:
    """Norms of the gradients of all parameters that have one, in their order: `(parameters,)`."""
    gradients = [gradient for _, gradient in _named_gradients(model)]
    norms = torch.stack(torch._foreach_norm([_local(gradient) for gradient in gradients]))
    if isinstance(gradients[0], DTensor):  # those of this process's parts, added up over all processes at once
        placements = [Partial() if place.is_shard() else place for place in gradients[0].placements]
        squares = DTensor.from_local(norms.square(), gradients[0].device_mesh, placements)
        norms = squares.full_tensor().sqrt()
    return norms


@torch.no_grad()
def clip_tensor_norms(model: nn.Module, max_norm: float, norms: torch.Tensor | None = None) -> torch.Tensor:
    """
    Scales every parameter's gradient down to a norm of at most `max_norm` (0: not at all), each by itself. The query,
    key and value projections of a layer count as one tensor, as they are one in the authors' code.

    Args:
        norms (`torch.Tensor` of shape `(parameters,)`, *optional*): [`gradient_norms`], where they are known.

    Returns:
        `torch.Tensor` of shape `()`: the norm of all gradients before, finite only if each of them is.
    """
    norms = gradient_norms(model) if norms is None else norms
    if max_norm > 0:
        names, gradients = zip(*_named_gradients(model))
        # summed in a fixed order, which adding up in place is not on an accelerator
        squares = F.pad(norms.square(), (0, 1))[_parts_of_tensors(names, norms.device)].sum(1)
        scales = (max_norm / (squares.sqrt() + 1e-6)).clamp_max(1.0)
        torch._foreach_mul_([_local(gradient) for gradient in gradients], scales.unbind())
    return norms.norm()


def _named_gradients(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that FSDP has sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@lru_cache(maxsize=8)
def _parts_of_tensors(names: tuple[str, ...], device: torch.device) -> torch.Tensor:
    """
    For each parameter the parameters that make one tensor with it in the authors' code: indices `(parameters, 3)`,
    filled up with the number of parameters.
    """
    merged = [name.replace("q_proj", "qkv").replace("k_proj", "qkv").replace("v_proj", "qkv") for name in names]
    parts: dict[str, list[int]] = {}
    for index, name in enumerate(merged):
        parts.setdefault(name, []).append(index)
    return torch.tensor([(parts[name] + [len(names)] * 3)[:3] for name in merged], device=device)
