"""Which weights a model has."""

import hashlib

import torch
from torch import nn


def model_hash(model: nn.Module, whole: bool = False) -> str:
    """
    16 hexadecimal digits of the encoder's weights: names, shapes, types and values.

    A classifier has the hash of the encoder in it. Copies of one checkpoint in other types, such as bfloat16, have
    other hashes; the device and the files that hold the weights make no difference. 344 MB take about 0.2 s.

    Args:
        model: an encoder, or a model that has one as `base_model_prefix`.
        whole: hash all weights of such a model instead of its encoder's.
    """
    hashed = model if whole else getattr(model, getattr(model, "base_model_prefix", ""), model)
    digest = hashlib.sha256()
    for name, tensor in sorted(hashed.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
