"""Labelled clips, read whole or cropped, and how every data set of clips reads its audio."""

import copy
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Dataset

from ..fbank_asit import whole_rate
from .audio import AudioReader, AudioReadError, audio_info
from .randomness import Seeded, sample_key

logger = logging.getLogger(__name__)

# Default bound of a waveform's length: the cost of attention grows with its square, and a batch is padded to its
# longest clip.
MAX_SECONDS = 30.0


class LabelledClips(Seeded, Dataset):
    """Clips with their labels, for finetuning, probing and prediction.

    Args:
        dataset: rows with an `audio` column and optionally a `label` column, or a sequence of sources (see
            `asit_hf.data.audio.AudioReader`).
        sampling_rate: of the waveforms, in Hz.
        max_seconds: longest waveform; from a longer clip, a random crop with `train`, otherwise the beginning. By
            default, and with infinity, clips are whole.
        train: draw crops at random, as a function of (seed, epoch, index).
        seed: of the crops.
        strict: raise for an unreadable clip; otherwise its item has `bad_files`, [(path, reason)], instead of a
            waveform, and the collator skips it with a warning.

    Items: `waveform` (samples,) float32, `start` in seconds from the clip's beginning, `label` as in the data set,
    `index`.
    """

    def __init__(
        self,
        dataset: Sequence,
        sampling_rate: int,
        max_seconds: float | None = None,
        train: bool = False,
        seed: int = 0,
        strict: bool = True,
    ):
        super().__init__(seed)
        if max_seconds is not None and max_seconds <= 0:
            raise ValueError(f"expected max_seconds above 0, got {max_seconds}")
        self.sources = select_audio(dataset)
        labelled = "label" in (getattr(dataset, "column_names", None) or ())
        self.labels = dataset["label"][:] if labelled else None
        self.sampling_rate = whole_rate(sampling_rate)
        self.max_seconds = None if max_seconds == math.inf else max_seconds
        self.train = train
        self.strict = strict

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        return self.item(index, sample_key(self.seed, self.epoch, index))

    def item(self, index: int, key: int) -> dict[str, Any]:
        """The item at `index`, with its crop drawn from the random numbers of `key`."""
        item: dict[str, Any] = {"index": index}
        if self.labels is not None:
            item["label"] = self.labels[index]
        try:
            start, item["waveform"] = self._read(audio_of(self.sources[index]), key)
            item["start"] = start / self.sampling_rate
        except AudioReadError as error:
            if self.strict:
                raise
            item["bad_files"] = [(error.source, error.reason)]
        return item

    def _read(self, source: Any, key: int) -> tuple[int, np.ndarray]:
        """First sample and waveform."""
        with AudioReader(source) as reader:
            if self.max_seconds is None:
                return 0, reader.read(self.sampling_rate)
            length = max(1, round(self.max_seconds * self.sampling_rate))
            if not self.train:
                return 0, reader.read(self.sampling_rate, 0, length)

            def crop(total: int) -> tuple[int, np.ndarray]:
                start = int(np.random.default_rng(key).integers(0, max(0, total - length) + 1))
                return start, reader.read(self.sampling_rate, start, length)

            return draw_crops(reader, self.sampling_rate, crop)


def warn_of_longer(sources: Sequence, seconds: float, consequence: str) -> int:
    """Number of clips whose header says that they are longer than `seconds`, reported with the `consequence`."""
    longer = 0
    for source in map(audio_of, select_audio(sources)):
        try:
            longer += audio_info(source).duration > seconds
        except AudioReadError:  # reported where it is read
            continue
    if longer:
        logger.warning("%d of %d clips are longer than %g s: %s", longer, len(sources), seconds, consequence)
    return longer


def draw_crops(reader: AudioReader, sampling_rate: int, draw: Callable[[int], Any]) -> Any:
    """`draw(samples of the clip)`, repeated if reading shows that an mp3 is shorter than its header states."""
    total = reader.num_samples(sampling_rate)
    try:
        drawn = draw(total)
        if reader.num_samples(sampling_rate) == total:
            return drawn
    except AudioReadError:
        if reader.num_samples(sampling_rate) == total:
            raise
    return draw(reader.num_samples(sampling_rate))


def select_audio(dataset: Any) -> Any:
    """The `audio` column of a data set, so that reading a row reads nothing else; other sequences are unchanged."""
    dataset = undecoded(dataset)
    if not hasattr(dataset, "select_columns"):
        return dataset
    if dataset.column_names is not None and "audio" not in dataset.column_names:
        raise ValueError(f"expected an audio column, got {dataset.column_names}")
    return dataset.select_columns("audio")


def undecoded(data: Any) -> Any:
    """
    A `datasets` object, one of its columns, or a torch data set around some (`KeyDataset`, `Subset`, `ConcatDataset`),
    with all its audio as paths and bytes for `AudioReader`: decoding it would need torchcodec. Anything else is
    unchanged. Raises `TypeError` for several splits, a `DatasetDict`.
    """
    if hasattr(data, "source") and hasattr(data, "column_name"):  # data["audio"], also nested
        return type(data)(undecoded(data.source), data.column_name)
    if isinstance(data, dict) and hasattr(data, "select_columns"):
        raise TypeError(f"expected one split, got {type(data).__name__} of {', '.join(data)}: pass one, data[name]")
    if isinstance(data, ConcatDataset):
        data = copy.copy(data)
        data.datasets = [undecoded(one) for one in data.datasets]
        return data
    if not hasattr(data, "select_columns"):
        if (inner := getattr(data, "dataset", None)) is None or (read := undecoded(inner)) is inner:
            return data
        data = copy.copy(data)
        data.dataset = read
        return data
    if not data.features or not _decodes(data.features):
        return data
    from datasets import Audio, Features

    if hasattr(data, "decode"):  # a stream, which may also decode in threads
        return data.decode(False)
    features = Features({name: _as_stored(feature) for name, feature in data.features.items()})
    for name, feature in data.features.items():
        if isinstance(feature, Audio):
            data = data.cast_column(name, features[name])
    if _decodes(data.features):  # nested: `cast` would rewrite the table, whose stored type is the same
        data = copy.deepcopy(data)
        data.info.features = features
    return data


def _decodes(feature: Any) -> bool:
    """Whether reading a feature decodes audio."""
    if isinstance(feature, (dict, list, tuple)):
        return any(map(_decodes, feature.values() if isinstance(feature, dict) else feature))
    return _decodes(feature.feature) if hasattr(feature, "feature") else _is_decoded_audio(feature)


def _as_stored(feature: Any) -> Any:
    """The feature with its audio undecoded."""
    if isinstance(feature, dict):
        return {name: _as_stored(one) for name, one in feature.items()}
    if isinstance(feature, (list, tuple)):
        return [_as_stored(one) for one in feature]
    feature = copy.copy(feature)
    if hasattr(feature, "feature"):
        feature.feature = _as_stored(feature.feature)
    elif _is_decoded_audio(feature):
        feature.decode = False
    return feature


def _is_decoded_audio(feature: Any) -> bool:
    return type(feature).__name__ == "Audio" and feature.decode


def audio_of(row: Any) -> Any:
    """The audio of a data set's row; any other source is unchanged."""
    return row["audio"] if isinstance(row, dict) and "audio" in row else row
