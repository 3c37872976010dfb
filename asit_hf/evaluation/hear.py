"""
The common API of the HEAR benchmark (https://hearbenchmark.com/hear-api.html):

    hear-validator asit_hf.evaluation.hear --model CHECKPOINT
    python -m heareval.embeddings.runner asit_hf.evaluation.hear --model CHECKPOINT --tasks-dir TASKS
"""

from os import PathLike

import torch
from torch import nn
from transformers.utils import logging

from ..configuration_asit import ASiTConfig
from ..feature_extraction_asit import ASiTFeatureExtractor
from ..loading import load_encoder, load_feature_extractor
from ..modeling_asit import ASiTModel
from .embeddings import embedding_size, pool_tokens, time_patch_centers, time_patch_means, window_time_patches

logger = logging.get_logger(__name__)

SAMPLING_RATES = (16000, 22050, 32000, 44100, 48000)  # of HEAR's data sets
# Timestamps are a quarter of a patch apart, 40 ms; HEAR requires 50 ms at most.
SHIFTS = 4


class HearModel(nn.Module):
    """
    An encoder and its feature extractor, with the attributes that HEAR requires: `sample_rate` in Hz,
    `scene_embedding_size` and `timestamp_embedding_size`.
    """

    def __init__(
        self,
        encoder: ASiTModel,
        feature_extractor: ASiTFeatureExtractor,
        pooling: str = "mean_std_time",
        window_seconds: float | None = None,
    ):
        if feature_extractor.sampling_rate not in SAMPLING_RATES:
            raise ValueError(
                f"expected a model for one of HEAR's sampling rates ({', '.join(map(str, SAMPLING_RATES))} Hz), "
                f"got {feature_extractor.sampling_rate} Hz"
            )
        super().__init__()
        self.encoder = encoder.eval()
        self.feature_extractor = feature_extractor
        self.pooling = pooling
        self.sample_rate = feature_extractor.sampling_rate
        self.scene_embedding_size = embedding_size(encoder, pooling)
        self.timestamp_embedding_size = encoder.config.hidden_size
        patch_size, time_patches = encoder.config.patch_size, encoder.config.num_frames // encoder.config.patch_size
        if window_seconds is not None:
            time_patches = window_time_patches(window_seconds, self.sample_rate, patch_size)
        self.window_frames = time_patches * patch_size

    def log_mel(self, audio: torch.Tensor) -> torch.Tensor:
        """Waveforms `(sounds, samples)` to model input `(sounds, frames, mel)` on the model's device."""
        if audio.dim() != 2:
            raise ValueError(f"expected audio of shape (sounds, samples), got {tuple(audio.shape)}")
        audio = audio.to(self.encoder.device)
        features = self.feature_extractor(audio, sampling_rate=self.sample_rate, return_tensors="pt")
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


def load_model(
    model_file_path: str | PathLike = "", pooling: str = "mean_std_time", window_seconds: float | None = None
) -> HearModel:
    """
    Args:
        model_file_path (`str`): folder or Hub name of an encoder, a classifier or a pretraining checkpoint (its
            teacher). Empty: a tiny encoder with random weights, the same ones every time.
        pooling (`str`): pooling of the scene embeddings, see [`~asit_hf.evaluation.embeddings.embed`]. The default
            concatenates mel patches, which improves linear probes.
        window_seconds (`float`, *optional*): longer sounds are encoded in windows of this length, cut to whole time
            patches. By default the length of the pretraining crops, `config.num_frames`.

    Raises:
        ValueError: a model for a sampling rate that HEAR does not have, or an unknown pooling.
    """
    if model_file_path:
        encoder, extractor = load_encoder(model_file_path), load_feature_extractor(model_file_path)
        return HearModel(encoder, extractor, pooling, window_seconds)
    logger.warning("expected a model_file_path, got none: the encoder has random weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = ASiTModel(ASiTConfig.from_size("tiny"))
    return HearModel(encoder, ASiTFeatureExtractor(), pooling, window_seconds)


@torch.no_grad()
def get_scene_embeddings(audio: torch.Tensor, model: HearModel) -> torch.Tensor:
    """
    Args:
        audio (`torch.Tensor` of shape `(sounds, samples)`): mono, at `model.sample_rate`, in [-1, 1].

    Returns:
        `torch.Tensor` of shape `(sounds, scene_embedding_size)`, float32, pooled over all windows.
    """
    tokens = model.encode(model.log_mel(audio))
    time_patches = (tokens.shape[1] - 1) // model.encoder.config.position_grid[1]
    return pool_tokens(tokens, torch.full((len(tokens),), time_patches, device=tokens.device), model.pooling)


@torch.no_grad()
def get_timestamp_embeddings(audio: torch.Tensor, model: HearModel) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The mean over mel of each time patch, every 40 ms: the spectrogram is encoded four times, each time shifted by a
    quarter of a patch.

    Args:
        audio, model: as in [`get_scene_embeddings`].

    Returns:
        embeddings `(sounds, timestamps, timestamp_embedding_size)` and their centers in milliseconds
        `(sounds, timestamps)`; float32.
    """
    config = model.encoder.config
    hop_frames = max(1, config.patch_size // SHIFTS)
    input_values = model.log_mel(audio)
    shifted = []
    for shift in range(0, config.patch_size, hop_frames):
        if shift == 0 or input_values.shape[1] - shift >= config.patch_size:
            shifted.append(time_patch_means(model.encode(input_values[:, shift:]), config.position_grid[1]))
    # interleaved; later shifts may have one time patch less
    count = sum(means.shape[1] for means in shifted)
    embeddings = shifted[0].new_empty(len(input_values), count, config.hidden_size)
    for turn, means in enumerate(shifted):
        embeddings[:, turn :: len(shifted)] = means
    times = torch.from_numpy(time_patch_centers(count, model.sample_rate, config.patch_size, hop_frames))
    return embeddings, times.to(embeddings.device).expand(len(embeddings), -1)
