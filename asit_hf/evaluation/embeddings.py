"""Embeddings of whole clips and of every time patch, from any ASiT checkpoint."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data.audio import AudioReader, AudioReadError
from ..data.clips import MAX_SECONDS, audio_of, undecoded
from ..data.windows import Windows
from ..fbank_asit import window_and_hop
from ..feature_extraction_asit import ASiTFeatureExtractor
from ..modeling_asit import ASiTModel, ASiTPreTrainedModel

POOLINGS = ("cls", "mean", "cls_mean", "mean_time", "mean_std_time")
# Clips are sorted by length within this many batches, so that a data set need not fit in memory; windows of files,
# which may be longer, within fewer.
_SORTED_BATCHES, _SORTED_WINDOW_BATCHES = 32, 4


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
    window_seconds: float | None = MAX_SECONDS,
) -> np.ndarray:
    """
    One embedding per clip, independent of the other clips in its batch. For the most accurate linear probe,
    concatenate several layers and keep the mel patches apart:
    `embed(model, feature_extractor, clips, "mean_std_time", num_layers=6, window_seconds=1)`.

    Args:
        model ([`ASiTModel`], or a model that has one as `asit`).
        feature_extractor ([`ASiTFeatureExtractor`]): the one the model was trained with.
        clips: waveforms `(samples,)` at the extractor's rate, or items with such a `waveform`
            ([`~asit_hf.data.clips.LabelledClips`]).
        pooling (`str`): `"cls"`, `"mean"` of the patch tokens, `"cls_mean"` both concatenated, or `"mean_time"`: the
            mean over time only, mel patches concatenated, so `num_mel_bins / patch_size` times as wide; or
            `"mean_std_time"`: that and the standard deviation over time, twice as wide again.
        device: device to compute on; by default the model's.
        sort_by_length (`bool`): batch clips of similar length together, which pads less.
        num_layers (`int`): concatenate the embeddings of this many last layers, each after the final layer norm.
        window_seconds (`float`, defaults to 30): embed longer clips in windows of this length, cut to whole time
            patches, and pool over all of them; the CLS tokens are averaged. The length of the pretraining crops often
            works best. `None`: every clip is one window, whatever memory that takes.

    Returns:
        `np.ndarray` of shape `(clips, dim)`, float32, in the order of `clips`.
    """
    windows = None if window_seconds is None else embedding_windows(model, feature_extractor, window_seconds)
    windows = _clip_windows(clips, windows)
    options = {"sorted_batches": _SORTED_BATCHES if sort_by_length else 1, "num_layers": num_layers}
    embedded = _embed_windows(windows, model, feature_extractor, pooling, batch_size, device, **options)
    total = len(clips) if hasattr(clips, "__len__") else None
    progress_bar = tqdm(embedded, total=total, desc="Embedding", unit="clip", disable=not progress)
    scenes = [clip.scene for clip in progress_bar]
    if not scenes:
        raise ValueError("expected at least one clip, got none")
    return np.stack(scenes)


def embed_tokens(
    model: ASiTPreTrainedModel,
    feature_extractor: ASiTFeatureExtractor,
    clips: Iterable,
    num_layers: int | None = None,
    batch_size: int = 16,
    device: str | torch.device | None = None,
    progress: bool = True,
    window_seconds: float | None = MAX_SECONDS,
) -> list[np.ndarray]:
    """
    The time patches of every clip from several layers, each the mean over its mel patches, for
    [`~asit_hf.evaluation.attentive_probe.attentive_probe`]. A clip of 5 s has 31, which in 12 layers of width 384
    take 0.29 MB: 460 MB for 1600 such clips.

    Args:
        num_layers (`int`, *optional*): this many last layers, each after the final layer norm; by default all.
        model, feature_extractor, clips, batch_size, device, window_seconds: as in [`embed`]. The time patches of a
            clip's windows are concatenated.

    Returns:
        `np.ndarray` of shape `(layers, time_patches, hidden_size)`, float16, for every clip.
    """
    encoder = encoder_of(model)
    num_layers = len(encoder.layers) if num_layers is None else num_layers
    embedding_size(encoder, "mean", num_layers)  # raises for a wrong number
    windows = None if window_seconds is None else embedding_windows(model, feature_extractor, window_seconds)

    def reduce(tokens: list[torch.Tensor], counts: torch.Tensor) -> list[np.ndarray]:
        means = torch.stack([time_patch_means(layer, encoder.config.position_grid[1]) for layer in tokens], dim=1)
        means = means.half().cpu().numpy()
        return [of_clip[:, :count].copy() for of_clip, count in zip(means, counts.tolist())]

    batches = {"batch_size": batch_size, "sorted_batches": _SORTED_BATCHES}
    embedded = _per_clip(
        _clip_windows(clips, windows), encoder, feature_extractor, reduce, device, num_layers, **batches
    )
    total = len(clips) if hasattr(clips, "__len__") else None
    progress_bar = tqdm(embedded, total=total, desc="Embedding", unit="clip", disable=not progress)
    return [np.concatenate(windows, axis=1) for windows in progress_bar]


def timestamp_embeddings(
    model: ASiTPreTrainedModel,
    feature_extractor: ASiTFeatureExtractor,
    waveform: np.ndarray | torch.Tensor,
    device: str | torch.device | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """
    One embedding per time patch of a clip, the mean over its mel patches. With patches of 16 frames of 10 ms the hop
    is 160 ms. Last frames that do not fill a patch are dropped; a clip shorter than one patch gives one embedding.

    Args:
        model, feature_extractor, device: as in [`embed`].
        waveform (`np.ndarray` of shape `(samples,)`): at the extractor's rate.

    Returns:
        embeddings `(time_patches, hidden_size)` and the centers in milliseconds `(time_patches,)`; float32.
    """
    (clip,) = _embed_windows(iter([(0, waveform)]), model, feature_extractor, device=device)
    return clip.timestamps, clip.milliseconds


@dataclass(frozen=True)
class ClipEmbeddings:
    """
    One clip's `scene` `(dim,)`, `timestamps` `(time_patches, hidden_size)` and their centers `milliseconds`
    `(time_patches,)`; all float32.
    """

    scene: np.ndarray
    timestamps: np.ndarray
    milliseconds: np.ndarray


def embed_files(
    model: ASiTPreTrainedModel,
    feature_extractor: ASiTFeatureExtractor,
    sources: Iterable,
    pooling: str = "cls",
    batch_size: int = 16,
    device: str | torch.device | None = None,
    num_layers: int = 1,
    window_seconds: float = MAX_SECONDS,
    max_seconds: float | None = None,
) -> Iterator[ClipEmbeddings | AudioReadError]:
    """
    Embeddings of files of any length, in the order of `sources`; only a few windows are in memory at a time.

    Args:
        model, feature_extractor, pooling, batch_size, device, num_layers: as in [`embed`]; timestamps come from the
            last layer.
        sources: see [`~asit_hf.data.audio.AudioReader`]; or a data set with a column `audio`, or one of its columns.
        window_seconds (`float`, defaults to 30): longer clips are read and embedded in windows of this length, cut to
            whole time patches, and pooled over all of them as in [`embed`].
        max_seconds (`float`, *optional*): use only the beginning of longer clips.

    Yields:
        [`ClipEmbeddings`] for every source, or the error if it cannot be read.
    """
    windows = embedding_windows(model, feature_extractor, window_seconds, max_seconds)
    windows = _file_windows(map(audio_of, undecoded(sources)), windows)
    yield from _embed_windows(
        windows, model, feature_extractor, pooling, batch_size, device, num_layers, _SORTED_WINDOW_BATCHES
    )


def time_patch_means(tokens: torch.Tensor, mel_patches: int) -> torch.Tensor:
    """Tokens `(clips, 1 + time_patches * mel_patches, hidden)` to means over mel `(clips, time_patches, hidden)`."""
    return tokens[:, 1:].unflatten(1, (-1, mel_patches)).mean(2)


def time_patch_centers(
    num_time_patches: int, sampling_rate: int, patch_size: int, hop_frames: int | None = None
) -> np.ndarray:
    """
    Centers of time patches in milliseconds, `(num_time_patches,)`, float32: 87.5, 247.5, ... at 16 kHz. `hop_frames`
    is their distance, by default `patch_size`.
    """
    window, hop = window_and_hop(sampling_rate)
    first_frames = np.arange(num_time_patches) * (patch_size if hop_frames is None else hop_frames)
    centers = (first_frames + (patch_size - 1) / 2) * hop + window / 2
    return (1000 * centers / sampling_rate).astype(np.float32)


def embedding_size(encoder: ASiTModel, pooling: str, num_layers: int = 1) -> int:
    """Width of the clip embeddings. Raises `ValueError` for an unknown pooling or a wrong number of layers."""
    if pooling not in POOLINGS:
        raise ValueError(f"expected pooling to be one of {POOLINGS}, got {pooling!r}")
    if not 1 <= num_layers <= len(encoder.layers):
        raise ValueError(f"expected num_layers from 1 to {len(encoder.layers)}, got {num_layers}")
    mel_patches = encoder.config.position_grid[1]
    vectors = {"cls_mean": 2, "mean_time": mel_patches, "mean_std_time": 2 * mel_patches}.get(pooling, 1)
    return vectors * encoder.config.hidden_size * num_layers


def embedding_windows(
    model: ASiTPreTrainedModel,
    feature_extractor: ASiTFeatureExtractor,
    window_seconds: float = MAX_SECONDS,
    max_seconds: float | None = None,
) -> Windows:
    """
    Windows of whole time patches, one after the other; a last one with at least one patch is kept. Options as in
    [`embed_files`].
    """
    if max_seconds is not None and max_seconds <= 0:
        raise ValueError(f"expected max_seconds above 0, got {max_seconds}")
    rate, patch_size = feature_extractor.sampling_rate, encoder_of(model).config.patch_size
    window, hop = window_and_hop(rate)
    frames = window_time_patches(window_seconds, rate, patch_size) * patch_size
    limit = None if max_seconds is None else max(1, round(max_seconds * rate))
    return Windows(rate, (frames - 1) * hop + window, frames * hop, (patch_size - 1) * hop + window, limit)


def window_time_patches(window_seconds: float, sampling_rate: int, patch_size: int) -> int:
    """Number of whole time patches in a window. Raises `ValueError` if there is none."""
    samples = round(window_seconds * sampling_rate, 3)  # 32.16 * 16000 is just below a whole number
    time_patches = int(samples // (patch_size * window_and_hop(sampling_rate)[1]))
    if time_patches < 1:
        raise ValueError(f"expected window_seconds of at least one time patch, got {window_seconds}")
    return time_patches


def _clip_windows(clips: Iterable, windows: Windows | None) -> Iterator[tuple[int, np.ndarray | torch.Tensor]]:
    """(index of the clip, waveform) of every window; by default a clip is one window."""
    # by index if there is a length: a data set need not raise IndexError at its end
    items = (clips[index] for index in range(len(clips))) if hasattr(clips, "__len__") else clips
    for index, item in enumerate(items):
        if isinstance(item, dict) and "waveform" not in item:
            raise ValueError(f"expected a waveform in clip {index}, got {item.get('bad_files', sorted(item))}")
        waveform = item["waveform"] if isinstance(item, dict) else item
        whole = max(1, len(waveform))
        length, shortest, step = (windows.length, windows.shortest, windows.step) if windows else (whole,) * 3
        # later windows need a whole time patch; the first may be shorter
        for start in range(0, max(1, len(waveform) - shortest + 1), step):
            yield index, waveform[start : start + length]


def _file_windows(sources: Iterable, windows: Windows) -> Iterator[tuple[int, np.ndarray | AudioReadError]]:
    """(index of the source, waveform) of every window, or an error, which ends the source."""
    for index, source in enumerate(sources):
        try:
            with AudioReader(source) as reader:
                for _, waveform, _ in windows.read(reader):
                    yield index, waveform
        except AudioReadError as error:
            yield index, error


def _embed_windows(
    windows: Iterator[tuple[int, np.ndarray | torch.Tensor | AudioReadError]],
    model: ASiTPreTrainedModel,
    feature_extractor: ASiTFeatureExtractor,
    pooling: str = "cls",
    batch_size: int = 1,
    device: str | torch.device | None = None,
    num_layers: int = 1,
    sorted_batches: int = 1,
) -> Iterator[ClipEmbeddings | AudioReadError]:
    """Embeddings of every clip from its consecutive windows, or its error."""
    encoder = encoder_of(model)
    mel_patches = encoder.config.position_grid[1]
    embedding_size(encoder, pooling, num_layers)  # raises for wrong options

    def reduce(tokens: list[torch.Tensor], counts: torch.Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
        scenes = torch.cat([pool_tokens(layer, counts, pooling, mel_patches) for layer in tokens], dim=-1)
        scenes, means = scenes.float().cpu().numpy(), time_patch_means(tokens[-1], mel_patches).float().cpu().numpy()
        # copies, as a view would keep the batch
        return [(scene, part[:count].copy()) for scene, part, count in zip(scenes, means, counts.tolist())]

    for results in _per_clip(
        windows, encoder, feature_extractor, reduce, device, num_layers, batch_size, sorted_batches
    ):
        if isinstance(results, AudioReadError):
            yield results
            continue
        pooled = PooledWindows(pooling, num_layers)
        for scene, part in results:
            pooled.add(scene, len(part))
        timestamps = np.concatenate([part for _, part in results])
        centers = time_patch_centers(len(timestamps), feature_extractor.sampling_rate, encoder.config.patch_size)
        yield ClipEmbeddings(pooled.value(), timestamps, centers)


def _per_clip(
    windows: Iterator[tuple[int, np.ndarray | torch.Tensor | AudioReadError]],
    encoder: ASiTModel,
    feature_extractor: ASiTFeatureExtractor,
    reduce: Callable[[list[torch.Tensor], torch.Tensor], list[Any]],
    device: str | torch.device | None,
    num_layers: int,
    batch_size: int,
    sorted_batches: int,
) -> Iterator[list[Any] | AudioReadError]:
    """What `reduce`, from a batch's `_tokens` to a list, makes of each of a clip's windows; or the clip's error."""
    if batch_size < 1:
        raise ValueError(f"expected batch_size of at least 1, got {batch_size}")

    def reduced() -> Iterator[tuple[int, Any]]:
        while buffer := list(islice(windows, batch_size * sorted_batches)):
            results: list[Any] = [item for _, item in buffer]
            order = [place for place, item in enumerate(results) if not isinstance(item, AudioReadError)]
            order.sort(key=lambda place: len(results[place]))
            for start in range(0, len(order), batch_size):
                places = order[start : start + batch_size]
                waveforms = [results[place] for place in places]
                of_windows = reduce(*_tokens(encoder, feature_extractor, waveforms, device, num_layers))
                for place, result in zip(places, of_windows):
                    results[place] = result
            yield from ((index, result) for (index, _), result in zip(buffer, results))

    for _, parts in groupby(reduced(), key=lambda part: part[0]):
        results = [result for _, result in parts]
        yield results[-1] if isinstance(results[-1], AudioReadError) else results


class PooledWindows:
    """
    The embedding of a clip from those of its windows, equal to pooling all patches at once, but that CLS tokens are
    averaged. Only sums are in memory.
    """

    def __init__(self, pooling: str, num_layers: int = 1):
        self.has_deviations, self.num_layers = pooling == "mean_std_time", num_layers
        self.time_patches, self.sum = 0, 0.0

    def add(self, embedding: np.ndarray, time_patches: int) -> None:
        """A window's embedding `(dim,)`, see `pool_tokens`, with its number of time patches."""
        parts = embedding.astype(np.float64).reshape(self.num_layers, 2 if self.has_deviations else 1, -1)
        if self.has_deviations:  # sums of variances and squared means, from which the total variance follows
            parts = np.stack([parts[:, 0], parts[:, 1] ** 2 + parts[:, 0] ** 2], axis=1)
        self.sum = self.sum + time_patches * parts
        self.time_patches += time_patches

    def value(self) -> np.ndarray:
        """`(dim,)`, float32."""
        mean = self.sum / self.time_patches
        if self.has_deviations:
            mean[:, 1] = np.sqrt(np.maximum(mean[:, 1] - mean[:, 0] ** 2, 0.0))
        return mean.reshape(-1).astype(np.float32)


def encoder_of(model: ASiTPreTrainedModel) -> ASiTModel:
    """The encoder of a model that has one as `asit`, or the model itself."""
    return getattr(model, model.base_model_prefix, model)


@torch.inference_mode()
def _tokens(
    encoder: ASiTModel,
    feature_extractor: ASiTFeatureExtractor,
    waveforms: list,
    device: str | torch.device | None,
    num_layers: int,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Tokens `(clips, 1 + patches, hidden)` of the last layers, in order, and time patches per clip `(clips,)`."""
    device = encoder.device if device is None else torch.device(device)
    encoder = encoder.to(device)
    was_training = encoder.training
    encoder.eval()
    waveforms = [torch.as_tensor(waveform, device=device) for waveform in waveforms]
    features = feature_extractor(waveforms, sampling_rate=feature_extractor.sampling_rate, return_tensors="pt")
    tokens = last_tokens(encoder, features["input_values"], features["attention_mask"], num_layers)
    encoder.train(was_training)
    time_patches = (features["attention_mask"].sum(-1) // encoder.config.patch_size).clamp_min(1)
    return tokens, time_patches


def last_tokens(
    encoder: ASiTModel, input_values: torch.Tensor, attention_mask: torch.Tensor | None, num_layers: int = 1
) -> list[torch.Tensor]:
    """Tokens `(clips, 1 + patches, hidden)` of the last layers, in order, each after the final layer norm."""
    outputs = encoder(
        input_values.to(encoder.dtype), attention_mask=attention_mask, output_hidden_states=num_layers > 1
    )
    earlier = outputs.hidden_states[-num_layers:-1] if num_layers > 1 else ()
    return [*(encoder.layernorm(hidden) for hidden in earlier), outputs.last_hidden_state]


def pool_tokens(tokens: torch.Tensor, time_patches: torch.Tensor, pooling: str, mel_patches: int) -> torch.Tensor:
    """
    Tokens `(clips, 1 + time_patches * mel_patches, hidden)` to `(clips, dim)`, over each clip's own `time_patches`
    `(clips,)`.
    """
    cls_token = tokens[:, 0]
    if pooling == "cls":
        return cls_token
    patches = tokens[:, 1:].unflatten(1, (-1, mel_patches))
    real = (torch.arange(patches.shape[1], device=tokens.device) < time_patches[:, None])[..., None, None]
    means = (patches * real).sum(1) / time_patches[:, None, None]
    if pooling == "mean_time":
        return means.flatten(1)
    if pooling == "mean_std_time":
        variance = ((patches - means[:, None]).square() * real).sum(1) / time_patches[:, None, None]
        return torch.cat((means, variance.sqrt()), dim=1).flatten(1)
    return means.mean(1) if pooling == "mean" else torch.cat((cls_token, means.mean(1)), dim=-1)
