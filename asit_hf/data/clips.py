"""Whole labelled clips, and what all data sets of clips share."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .audio import AudioReader, AudioReadError
from .randomness import sample_key


class LabelledClips(Dataset):
    """Whole clips with their labels, for finetuning, probing and prediction.

    Args:
        dataset: rows with an `audio` column and, where there are labels, a `label` column.
        sampling_rate: of the waveforms, in Hz.
        max_seconds: read at most so much of a clip: a random crop with `train`, else its beginning.
        train: draw crops at random, as a function of (seed, epoch, index).
        seed: of the crops.
        strict: raise for a clip that cannot be read; otherwise its item has no waveform but `bad_files`, [(path,
            reason)], and `ClassificationCollator` leaves it out with a warning.

    Items: `waveform` (samples,) float32, `label` as in the data set, `index`.
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
        if max_seconds is not None and max_seconds <= 0:
            raise ValueError(f"expected max_seconds above 0, got {max_seconds}")
        self.sources = _audio_only(dataset)
        labelled = "label" in (getattr(dataset, "column_names", None) or ())
        self.labels = dataset["label"][:] if labelled else None
        self.sampling_rate = sampling_rate
        self.max_seconds = max_seconds
        self.train = train
        self.seed = seed
        self.strict = strict
        self._epoch = _shared_counter()

    def __len__(self) -> int:
        return len(self.sources)

    def set_epoch(self, epoch: int) -> None:
        """Draw other crops from the next item on, in running loader workers too."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        return self.item(index, sample_key(self.seed, self.epoch, index))

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def item(self, index: int, key: int) -> dict[str, Any]:
        """The item at `index`, its random crop drawn from the random numbers of `key`."""
        item: dict[str, Any] = {"index": index}
        if self.labels is not None:
            item["label"] = self.labels[index]
        try:
            item["waveform"] = self._read(index, key)
        except AudioReadError as error:
            if self.strict:
                raise
            item["bad_files"] = [(error.source, error.reason)]
        return item

    def _read(self, index: int, key: int) -> np.ndarray:
        with AudioReader(_source(self.sources[index])) as reader:
            if self.max_seconds is None:
                return reader.read(self.sampling_rate)
            length = max(1, round(self.max_seconds * self.sampling_rate))
            if not self.train:
                return reader.read(self.sampling_rate, 0, length)

            def crop(total: int) -> np.ndarray:
                start = int(np.random.default_rng(key).integers(0, max(0, total - length) + 1))
                return reader.read(self.sampling_rate, start, length)

            return _draw(reader, self.sampling_rate, crop)


def _draw(reader: AudioReader, sampling_rate: int, draw: Callable[[int], Any]) -> Any:
    """`draw(samples of the clip)`; once more where that showed an mp3 to be shorter than its header says."""
    total = reader.num_samples(sampling_rate)
    try:
        drawn = draw(total)
    except AudioReadError:
        if reader.num_samples(sampling_rate) == total:
            raise
        drawn = None
    if drawn is not None and reader.num_samples(sampling_rate) == total:
        return drawn
    return draw(reader.num_samples(sampling_rate))


def _shared_counter() -> torch.Tensor:
    """A number that loader workers see change while they run."""
    return torch.zeros((), dtype=torch.int64).share_memory_()


def _audio_only(dataset: Any) -> Any:
    if not hasattr(dataset, "select_columns"):
        return dataset
    if dataset.column_names is not None and "audio" not in dataset.column_names:
        raise ValueError(f"expected an audio column, got {dataset.column_names}")
    return dataset.select_columns("audio")


def _source(row: Any) -> Any:
    return row["audio"] if isinstance(row, dict) and "audio" in row else row
