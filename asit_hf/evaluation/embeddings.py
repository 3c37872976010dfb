"""Embeddings of whole clips and of every patch column, from any ASiT checkpoint."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from os import PathLike
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..configuration_asit import ASiTConfig
from ..fbank_asit import window_and_hop
from ..feature_extraction_asit import ASiTFeatureExtractor
from ..modeling_asit import ASiTModel, ASiTPreTrainedModel
from ..pretraining.modeling import ASiTForPreTraining

POOLINGS = ("cls", "mean", "cls_mean", "mean_time")
# Clips are put in order of length within this many batches, so that a data set need not fit in memory.
_SORTED_BATCHES = 32


def load_encoder(path: str | PathLike, source: str = "teacher", **kwargs: Any) -> ASiTModel:
    """
    The encoder of any ASiT checkpoint.

    Args:
        path (`str`): folder or Hub name of an encoder, a classifier or a pretraining checkpoint.
        source (`str`, defaults to `"teacher"`): which encoder of a pretraining checkpoint, `"teacher"` or `"student"`;
            the others have only one.
        kwargs: passed to `from_pretrained`.

    Raises:
        ValueError: another `source`, or a checkpoint that lacks weights of the encoder.
    """
    if source not in ("teacher", "student"):
        raise ValueError(f"source must be 'teacher' or 'student', got {source!r}")
    config = ASiTConfig.from_pretrained(path)
    if source == "teacher" and config.architectures == [ASiTForPreTraining.__name__]:
        model, info = ASiTForPreTraining.from_pretrained(path, output_loading_info=True, **kwargs)
        missing = [key for key in info["missing_keys"] if key.startswith("teacher.asit.")]
        encoder = model.teacher["asit"].requires_grad_(True)
    else:
        encoder, info = ASiTModel.from_pretrained(path, output_loading_info=True, **kwargs)
        missing = info["missing_keys"]
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} weights of the encoder, first {sorted(missing)[0]}")
    return encoder


def embed(
    model: ASiTPreTrainedModel,
    feature_extractor: ASiTFeatureExtractor,
    clips: Iterable,
    pooling: str = "cls",
    batch_size: int = 16,
    device: str | torch.device | None = None,
    sort_by_length: bool = True,
    progress: bool = True,
    num_layers: int = 1,
) -> np.ndarray:
    """
    One embedding a clip. It does not depend on the other clips: batches are padded and masked.

    Args:
        model ([`ASiTModel`], or a model that has one as `asit`).
        feature_extractor ([`ASiTFeatureExtractor`]): the one the model was trained with.
        clips: waveforms `(samples,)` at the extractor's rate, or items with such a `waveform`
            ([`~asit_hf.data.crops.LabelledClips`]).
        pooling (`str`): `"cls"`, `"mean"` of the patch tokens, `"cls_mean"` both concatenated, or `"mean_time"`: the
            mean over time alone, mel rows concatenated, so `num_mel_bins / patch_size` times as wide.
        device: where to compute; by default where the model is.
        sort_by_length (`bool`): batch clips of similar length together, which pads less.
        num_layers (`int`): concatenate the embeddings of this many last layers, each after the final layer norm.

    Returns:
        `np.ndarray` of shape `(clips, dim)`, float32, in the order of `clips`.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {POOLINGS}, got {pooling!r}")
    encoder = _encoder_of(model)
    if not 1 <= num_layers <= len(encoder.layers):
        raise ValueError(f"num_layers must be from 1 to {len(encoder.layers)}, got {num_layers}")
    total = len(clips) if hasattr(clips, "__len__") else None
    embeddings: dict[int, np.ndarray] = {}
    with tqdm(total=total, desc="Embedding", unit="clip", disable=not progress) as bar:
        for indices, waveforms in _batches(clips, batch_size, sort_by_length):
            tokens, columns = _tokens(encoder, feature_extractor, waveforms, device, num_layers)
            pooled = torch.cat([_pool(layer, columns, pooling) for layer in tokens], dim=-1)
            embeddings.update(zip(indices, pooled.float().cpu().numpy()))
            bar.update(len(indices))
    if not embeddings:
        raise ValueError("expected at least one clip, got none")
    return np.stack([embeddings[index] for index in range(len(embeddings))])


def timestamp_embeddings(
    model: ASiTPreTrainedModel,
    feature_extractor: ASiTFeatureExtractor,
    waveform: np.ndarray | torch.Tensor,
    device: str | torch.device | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """
    One embedding for every patch column of a clip, the mean of its patches over mel. With patches of 16 frames of
    10 ms the hop is 160 ms. The last frames short of a patch have none; a clip shorter than one patch has one.

    Args:
        model, feature_extractor, device: as in [`embed`].
        waveform (`np.ndarray` of shape `(samples,)`): at the extractor's rate.

    Returns:
        embeddings `(columns, hidden_size)`, and the middles of the columns in milliseconds `(columns,)`; float32.
    """
    encoder = _encoder_of(model)
    (tokens,), columns = _tokens(encoder, feature_extractor, [waveform], device)
    embeddings = tokens[0, 1:].unflatten(0, (int(columns), -1)).mean(1)
    window, hop = window_and_hop(feature_extractor.sampling_rate)
    first_frames = np.arange(int(columns)) * encoder.config.patch_size
    middles = (first_frames + (encoder.config.patch_size - 1) / 2) * hop + window / 2
    times = 1000 * middles / feature_extractor.sampling_rate
    return embeddings.float().cpu().numpy(), times.astype(np.float32)


def _encoder_of(model: ASiTPreTrainedModel) -> ASiTModel:
    return getattr(model, model.base_model_prefix, model)


def _batches(clips: Iterable, batch_size: int, sort_by_length: bool) -> Iterator[tuple[Sequence[int], list]]:
    """Indices and waveforms of every batch."""
    # by index where there is a length: a data set need not know where to stop
    items = (clips[index] for index in range(len(clips))) if hasattr(clips, "__len__") else clips
    waveforms = ((index, _waveform(item, index)) for index, item in enumerate(items))
    while window := list(islice(waveforms, batch_size * (_SORTED_BATCHES if sort_by_length else 1))):
        if sort_by_length:
            window.sort(key=lambda pair: len(pair[1]))
        for start in range(0, len(window), batch_size):
            indices, batch = zip(*window[start : start + batch_size])
            yield indices, list(batch)


def _waveform(clip: Any, index: int) -> np.ndarray | torch.Tensor:
    if not isinstance(clip, dict):
        return clip
    if "waveform" not in clip:
        raise ValueError(f"clip {index} has no waveform: {clip.get('bad_files', sorted(clip))}")
    return clip["waveform"]


@torch.inference_mode()
def _tokens(
    encoder: ASiTModel,
    feature_extractor: ASiTFeatureExtractor,
    waveforms: list,
    device: str | torch.device | None,
    num_layers: int = 1,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Tokens `(clips, 1 + patches, hidden)` of the last layers, in order, and each clip's columns `(clips,)`."""
    device = encoder.device if device is None else torch.device(device)
    encoder = encoder.to(device)
    was_training = encoder.training
    encoder.eval()
    waveforms = [torch.as_tensor(waveform, device=device) for waveform in waveforms]
    features = feature_extractor(waveforms, sampling_rate=feature_extractor.sampling_rate, return_tensors="pt")
    outputs = encoder(
        features["input_values"].to(encoder.dtype),
        attention_mask=features["attention_mask"],
        output_hidden_states=num_layers > 1,
    )
    encoder.train(was_training)
    tokens = [outputs.last_hidden_state]
    if num_layers > 1:
        tokens = [encoder.layernorm(hidden) for hidden in outputs.hidden_states[-num_layers:-1]] + tokens
    columns = (features["attention_mask"].sum(-1) // encoder.config.patch_size).clamp_min(1)
    return tokens, columns


def _pool(tokens: torch.Tensor, columns: torch.Tensor, pooling: str) -> torch.Tensor:
    """`(clips, 1 + patches, hidden)` to `(clips, dim)`, over each clip's own columns."""
    cls_token = tokens[:, 0]
    if pooling == "cls":
        return cls_token
    num_columns = int(columns.max())
    patches = tokens[:, 1:].unflatten(1, (num_columns, -1))
    real = torch.arange(num_columns, device=columns.device) < columns[:, None]
    rows = (patches * real[..., None, None]).sum(1) / columns[:, None, None]
    if pooling == "mean_time":
        return rows.flatten(1)
    return rows.mean(1) if pooling == "mean" else torch.cat((cls_token, rows.mean(1)), dim=-1)
