"""
The common API of the HEAR benchmark (https://hearbenchmark.com/hear-api.html):

    hear-validator asit_hf.evaluation.hear --model CHECKPOINT
    python -m heareval.embeddings.runner asit_hf.evaluation.hear --model CHECKPOINT --tasks-dir TASKS
"""

from os import PathLike

import torch

from ..feature_extraction_asit import ASiTFeatureExtractor
from ..modeling_asit import ASiTModel
from .adapters import WindowedModel, load_or_random
from .embeddings import embedding_size, pool_tokens, time_patch_centers

SAMPLING_RATES = (16000, 22050, 32000, 44100, 48000)  # of HEAR's data sets
# Timestamps are a quarter of a patch apart, 40 ms; HEAR requires 50 ms at most.
SHIFTS = 4


class HearModel(WindowedModel):
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
        super().__init__(encoder, feature_extractor, window_seconds)
        self.pooling = pooling
        self.sample_rate = feature_extractor.sampling_rate
        self.scene_embedding_size = embedding_size(encoder, pooling)
        self.timestamp_embedding_size = encoder.config.hidden_size


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
    return HearModel(*load_or_random(model_file_path), pooling, window_seconds)


@torch.no_grad()
def get_scene_embeddings(audio: torch.Tensor, model: HearModel) -> torch.Tensor:
    """
    Args:
        audio (`torch.Tensor` of shape `(sounds, samples)`): mono, at `model.sample_rate`, in [-1, 1].

    Returns:
        `torch.Tensor` of shape `(sounds, scene_embedding_size)`, float32, pooled over all windows.
    """
    tokens = model.encode(model.log_mel(audio))
    mel_patches = model.encoder.config.position_grid[1]
    time_patches = torch.full((len(tokens),), (tokens.shape[1] - 1) // mel_patches, device=tokens.device)
    return pool_tokens(tokens, time_patches, model.pooling, mel_patches)


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
    patch_size = model.encoder.config.patch_size
    hop_frames = max(hop for hop in range(1, max(1, patch_size // SHIFTS) + 1) if patch_size % hop == 0)
    embeddings = model.time_patches(model.log_mel(audio), hop_frames)
    times = time_patch_centers(embeddings.shape[1], model.sample_rate, patch_size, hop_frames)
    return embeddings, torch.from_numpy(times).to(embeddings.device).expand(len(embeddings), -1)
