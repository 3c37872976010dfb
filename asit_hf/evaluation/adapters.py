"""What the adapters of benchmarks, `hear`, `mteb` and `xares`, share."""

import hashlib
import json
from os import PathLike
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..configuration_asit import ASiTConfig
from ..feature_extraction_asit import ASiTFeatureExtractor
from ..loading import load_encoder, load_feature_extractor
from ..modeling_asit import ASiTModel
from ..utils.weights import model_hash
from .embeddings import window_time_patches

logger = logging.get_logger(__name__)


def load_or_random(path: str | PathLike = "", **kwargs: Any) -> tuple[ASiTModel, ASiTFeatureExtractor]:
    """
    The encoder of any checkpoint, in evaluation mode, and its feature extractor.

    Args:
        path: see [`~asit_hf.loading.load_encoder`]. Empty: a tiny encoder with random weights, the same ones every
            time, with a warning.
        kwargs: passed to `from_pretrained`, for instance `revision`.
    """
    if path:
        return load_encoder(path, **kwargs).eval(), load_feature_extractor(path, **kwargs)
    logger.warning("expected a checkpoint, got none: the encoder has random weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ASiTModel(ASiTConfig.from_size("tiny")).eval(), ASiTFeatureExtractor()


def window_frames(
    encoder: ASiTModel, feature_extractor: ASiTFeatureExtractor, window_seconds: float | None = None
) -> int:
    """Frames of a window, cut to whole time patches; by default of the pretraining crops, `config.num_frames`."""
    patch_size = encoder.config.patch_size
    if window_seconds is None:
        return encoder.config.num_frames // patch_size * patch_size
    return window_time_patches(window_seconds, feature_extractor.sampling_rate, patch_size) * patch_size


def fingerprint(encoder: ASiTModel, feature_extractor: ASiTFeatureExtractor, **options: Any) -> str:
    """
    12 hexadecimal digits of the weights, the feature extractor and the options. Benchmarks store results under a
    model's name and reuse them, so that another checkpoint, or other options, must not have the same name.
    """
    of_options = json.dumps(options, sort_keys=True, default=str)
    parts = (of_options, feature_extractor.to_json_string(), model_hash(encoder))
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:12]


class WindowedModel(nn.Module):
    """
    An encoder and its feature extractor, which encode batches of waveforms of one length in windows.

    Args:
        encoder, feature_extractor: of one checkpoint.
        window_seconds (`float`, *optional*): longer sounds are encoded in windows of this length, cut to whole time
            patches. By default the length of the pretraining crops, `config.num_frames`.
    """

    def __init__(
        self, encoder: ASiTModel, feature_extractor: ASiTFeatureExtractor, window_seconds: float | None = None
    ):
        super().__init__()
        self.encoder = encoder.eval()
        self.feature_extractor = feature_extractor
        self.window_frames = window_frames(encoder, feature_extractor, window_seconds)

    def log_mel(self, audio: torch.Tensor) -> torch.Tensor:
        """Waveforms `(sounds, samples)` to model input `(sounds, frames, mel)` on the model's device."""
        if audio.dim() != 2:
            raise ValueError(f"expected audio of shape (sounds, samples), got {tuple(audio.shape)}")
        audio, rate = audio.to(self.encoder.device), self.feature_extractor.sampling_rate
        features = self.feature_extractor(audio, sampling_rate=rate, return_tensors="pt")
        return features["input_values"].to(self.encoder.dtype)

    def encode(self, input_values: torch.Tensor) -> torch.Tensor:
        """Tokens `(sounds, 1 + patches, hidden)`, float32, of all windows; the CLS token is their weighted mean."""
        config = self.encoder.config
        pieces = input_values.split(self.window_frames, dim=1)
        pieces = [piece for piece in pieces if piece.shape[1] >= config.patch_size] or [input_values]
        windows = [
            self.encoder(piece).last_hidden_state.float() for piece in pieces
        ]  # sums over minutes overflow fp16
        patches = torch.cat([tokens[:, 1:] for tokens in windows], dim=1)
        cls_token = sum(tokens[:, :1] * (tokens.shape[1] - 1) for tokens in windows) / patches.shape[1]
        return torch.cat((cls_token, patches), dim=1)

    def time_patches(
        self, input_values: torch.Tensor, hop_frames: int | None = None, concatenate_mel: bool = False
    ) -> torch.Tensor:
        """
        Time patches every `hop_frames`, by default a whole patch: the spectrogram is encoded once for every multiple
        of `hop_frames` in a patch, shifted by it, and the time patches are interleaved.

        Args:
            input_values (`torch.Tensor` of shape `(sounds, frames, mel)`): see `log_mel`.
            hop_frames (`int`, *optional*): a divisor of the patch size.
            concatenate_mel (`bool`): concatenate the mel patches of a time patch instead of averaging them.

        Returns:
            `torch.Tensor` of shape `(sounds, timestamps, dim)`, float32; at least one timestamp.
        """
        patch_size, mel_patches = self.encoder.config.patch_size, self.encoder.config.position_grid[1]
        hop_frames = hop_frames or patch_size
        if patch_size % hop_frames:
            raise ValueError(f"expected hop_frames to divide the patch size, {patch_size}, got {hop_frames}")
        shifted = []
        for shift in range(0, patch_size, hop_frames):
            if shift == 0 or input_values.shape[1] - shift >= patch_size:
                patches = self.encode(input_values[:, shift:])[:, 1:].unflatten(1, (-1, mel_patches))
                shifted.append(patches.flatten(2) if concatenate_mel else patches.mean(2))
        # later shifts may have one time patch less
        count = sum(patches.shape[1] for patches in shifted)
        interleaved = shifted[0].new_empty(len(input_values), count, shifted[0].shape[-1])
        for turn, patches in enumerate(shifted):
            interleaved[:, turn :: len(shifted)] = patches
        return interleaved
