"""Models that are small enough to build in every test."""

import torch

from asit_hf import ASiTConfig, ASiTModel

MEL = 32
TINY = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "num_frames": 96,
    "num_mel_bins": MEL,
    "initializer_range": 0.2,  # large, so that positions and attention affect the outputs
    "distillation_hidden_size": 64,
    "distillation_bottleneck_size": 32,
    "num_prototypes": 64,
}


def build(cls=ASiTModel, seed: int = 0, **kwargs):
    """A model of class `cls` in evaluation mode, with weights that depend on `seed` alone."""
    torch.manual_seed(seed)
    return cls(ASiTConfig(**{**TINY, "num_labels": 5, **kwargs})).eval()
