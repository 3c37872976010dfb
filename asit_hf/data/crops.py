"""What a loader worker does: read, crop, resample. Log-mel and masking follow on the device, in batch."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .audio import AudioReader, AudioReadError, source_name
from .randomness import sample_key

logger = logging.getLogger(__name__)

MAX_FAILURES = 100
# Windows of one file that lie nearer than this are read as one: a seek costs about as much as decoding the gap.
_MERGE_SECONDS = 0.5


@dataclass(frozen=True)
class CropSettings:
    """How many crops of how many seconds are drawn from a clip, and how.

    Args:
        sampling_rate: of the crops, in Hz.
        global_seconds, num_global_crops: of the crops that teacher and student see.
        local_seconds, num_local_crops: of the crops that only the student sees; none with 0.
        roll_probability: of shifting the clip in a circle by a random amount first.
    """

    sampling_rate: int
    global_seconds: float = 6.0
    num_global_crops: int = 2
    local_seconds: float = 2.0
    num_local_crops: int = 4
    roll_probability: float = 0.0

    def __post_init__(self):
        if self.num_global_crops < 1 or self.num_local_crops < 0:
            raise ValueError(
                f"expected >= 1 global and >= 0 local crops, got {self.num_global_crops}, {self.num_local_crops}"
            )
        if self.global_samples < 1 or (self.num_local_crops and self.local_samples < 1):
            raise ValueError(
                f"expected crops of some length, got {self.global_seconds} and {self.local_seconds} seconds"
            )
        if not 0 <= self.roll_probability <= 1:
            raise ValueError(f"expected a roll_probability in [0, 1], got {self.roll_probability}")

    @property
    def global_samples(self) -> int:
        return round(self.global_seconds * self.sampling_rate)

    @property
    def local_samples(self) -> int:
        return round(self.local_seconds * self.sampling_rate)

    def read(self, source: Any, key: int) -> dict[str, torch.Tensor]:
        """Draw the crops of one clip from the random numbers of `key`: uniform over the clip, each by itself.

        Returns:
            `global_waveforms` (num_global_crops, samples) float32, `global_lengths` (num_global_crops,) int64: the
            samples that are audio, the rest of a short clip's crop being zeros; the same with `local_` where there
            are local crops.
        """
        lengths = [self.global_samples] * self.num_global_crops + [self.local_samples] * self.num_local_crops
        with AudioReader(source) as reader:
            crops = _draw(reader, self.sampling_rate, lambda total: self._read(reader, total, lengths, key))
        item = _stack("global", crops[: self.num_global_crops], self.global_samples)
        if self.num_local_crops:
            item |= _stack("local", crops[self.num_global_crops :], self.local_samples)
        return item

    def _read(self, reader: AudioReader, total: int, lengths: list[int], key: int) -> list[list[np.ndarray]]:
        generator = np.random.default_rng(key)
        starts = [int(generator.integers(0, max(0, total - length) + 1)) for length in lengths]
        shift = int(generator.integers(0, total)) if generator.random() < self.roll_probability else 0
        starts = [(start - shift) % total for start in starts]
        stops = [start + min(length, total) for start, length in zip(starts, lengths)]
        # A crop that runs over the end of a shifted clip goes on at its beginning.
        parts = [[(start, min(stop, total)), (0, stop - total)] for start, stop in zip(starts, stops)]
        parts = [[(first, last) for first, last in pair if first < last] for pair in parts]
        windows = _merge([part for pair in parts for part in pair], gap=round(_MERGE_SECONDS * self.sampling_rate))
        audio = {(first, last): reader.read(self.sampling_rate, first, last - first) for first, last in windows}
        return [[_cut(audio, *part) for part in pair] for pair in parts]


class PretrainingCrops(Dataset):
    """Random crops of unlabelled audio: item `i` of an epoch depends on (seed, epoch, i) and the audio alone.

    Args:
        dataset: rows with an `audio` column, or a sequence of sources (see `asit_hf.data.audio.AudioReader`).
        sampling_rate, global_seconds, num_global_crops, local_seconds, num_local_crops, roll_probability: see
            `CropSettings`.
        seed: of the crops.
        strict: raise for a clip that cannot be read; otherwise report it in `bad_files` and take another clip, drawn
            anew.

    Items: the tensors of `CropSettings.read`, the numbers `sample_key` and `index` (the row that was read), `file`,
    and `bad_files`, a list of (path, reason).

    Raises, from `[]`:
        AudioReadError: with `strict`, for a clip that cannot be read.
        RuntimeError: 100 clips in a row could not be read.
    """

    def __init__(
        self,
        dataset: Sequence,
        sampling_rate: int,
        global_seconds: float = 6.0,
        num_global_crops: int = 2,
        local_seconds: float = 2.0,
        num_local_crops: int = 4,
        seed: int = 0,
        roll_probability: float = 0.0,
        strict: bool = False,
    ):
        self.settings = CropSettings(
            sampling_rate, global_seconds, num_global_crops, local_seconds, num_local_crops, roll_probability
        )
        self.sources = _audio_only(dataset)
        if len(self.sources) == 0:
            raise ValueError("expected some audio to crop, got an empty data set")
        self.seed = seed
        self.strict = strict
        self._epoch = _shared_counter()

    def __len__(self) -> int:
        return len(self.sources)

    def set_epoch(self, epoch: int) -> None:
        """Draw other crops from the next item on, in running loader workers too."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch = int(self._epoch)
        if index < 0:
            index += len(self)
        key = sample_key(self.seed, epoch, index)
        bad_files: list[tuple[str, str]] = []
        row = index
        while True:
            try:
                crops = self.settings.read(_source(self.sources[row]), key)
                name = source_name(_source(self.sources[row]))
                return {**crops, "sample_key": key, "index": row, "file": name, "bad_files": bad_files}
            except AudioReadError as error:
                if self.strict:
                    raise
                _report(bad_files, error)
                row = sample_key(self.seed, epoch, index, len(bad_files)) % len(self)


class StreamingCrops(IterableDataset):
    """Random crops of a stream: the items of `PretrainingCrops`, `index` being the sample's hash.

    Args:
        dataset: a `datasets.IterableDataset` with an `audio` column.
        others: as in `PretrainingCrops`.
        rank, world_size: this process and how many there are. Each reads shards of its own where the number of shards
            is a multiple of `world_size`; otherwise each reads all of them and keeps every `world_size`-th row. Loader
            workers share a process's shards among them. `EpochCallback` sets these two and `repeat` within a trainer.
        repeat: start over at the end, in the next epoch, so that the stream has none: processes whose shards hold
            different numbers of clips then still take equally many batches.

    A pass gives each clip once. The crops of a clip depend on (seed, epoch, its path, or its bytes where it has no
    path), not on the order or the number of workers. In place of a clip that cannot be read the next readable one
    comes twice, masked differently by its `sample_key`, and reports it; those at the very end are logged.
    """

    def __init__(
        self,
        dataset: Any,
        sampling_rate: int,
        global_seconds: float = 6.0,
        num_global_crops: int = 2,
        local_seconds: float = 2.0,
        num_local_crops: int = 4,
        seed: int = 0,
        roll_probability: float = 0.0,
        strict: bool = False,
        rank: int = 0,
        world_size: int = 1,
        repeat: bool = False,
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"expected a rank from 0 to {world_size - 1}, got {rank}")
        self.settings = CropSettings(
            sampling_rate, global_seconds, num_global_crops, local_seconds, num_local_crops, roll_probability
        )
        self.dataset = _audio_only(dataset)
        self.seed = seed
        self.strict = strict
        self.rank, self.world_size = rank, world_size
        self.repeat = repeat
        self._skipped = (0, 1)
        self._epoch = _shared_counter()

    def set_epoch(self, epoch: int) -> None:
        """Draw other crops, and another order of a shuffled stream, from the next pass on, in running workers too."""
        self._epoch.fill_(epoch)

    def skip(self, num_batches: int, batch_size: int) -> None:
        """Fast-forward the next loader of this stream: its first batches come without audio, as `{"skipped": clips}`.

        What follows is what would have followed them. Rows are read on the way, but nothing is decoded.
        """
        self._skipped = (num_batches, batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch = int(self._epoch)
        rows = self._rows(epoch)
        num_skipped = self._num_skipped_rows(rows.num_shards)
        bad_files: list[tuple[str, str]] = []
        while True:
            is_empty = True
            for row in rows:
                is_empty = False
                if num_skipped > 0:
                    num_skipped -= 1
                    yield {"skipped": 1}
                else:
                    yield from self._items(_source(row), epoch, bad_files)
            if is_empty or not self.repeat:
                break
            epoch += 1
            rows = self._rows(epoch)
        for path, reason in bad_files:
            logger.warning("left out %s: %s", path, reason)

    def _rows(self, epoch: int) -> Any:
        from datasets.distributed import split_dataset_by_node

        # A fresh object: the epoch of one is shared by all workers, which need not be in the same.
        rows = split_dataset_by_node(self.dataset, self.rank, self.world_size)
        rows.set_epoch(epoch)
        return rows

    def _num_skipped_rows(self, num_shards: int) -> int:
        """Workers that have shards take turns, a batch each."""
        num_batches, batch_size = self._skipped
        worker = get_worker_info()
        if worker is None:
            return num_batches * batch_size
        num_working = min(worker.num_workers, num_shards)
        return (num_batches // num_working + (worker.id < num_batches % num_working)) * batch_size

    def _items(self, source: Any, epoch: int, bad_files: list[tuple[str, str]]) -> list[dict[str, Any]]:
        """One item of `source` and one in place of each of `bad_files`; or none, and one bad file more."""
        index = _source_hash(source)
        try:
            crops = self.settings.read(source, sample_key(self.seed, epoch, index))
        except AudioReadError as error:
            if self.strict:
                raise
            _report(bad_files, error)
            return []
        # The clip's own item comes last, so that a run resumed between these items goes on with the same.
        attempts = range(len(bad_files), -1, -1)
        keys = [sample_key(self.seed, epoch, index, attempt) for attempt in attempts]
        crops |= {"index": index, "file": source_name(source)}
        items = [{**crops, "sample_key": key, "bad_files": []} for key in keys]
        items[0]["bad_files"] = bad_files.copy()
        bad_files.clear()
        return items


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


def _source_hash(source: Any) -> int:
    if isinstance(source, dict) and not source.get("path"):
        source = source.get("bytes") or np.asarray(source.get("array", source.get("raw"))).tobytes()
    content = source if isinstance(source, (bytes, bytearray)) else source_name(source).encode()
    return int.from_bytes(blake2b(content, digest_size=8).digest()) >> 1


def _report(bad_files: list[tuple[str, str]], error: AudioReadError) -> None:
    bad_files.append((error.source, error.reason))
    if len(bad_files) >= MAX_FAILURES:
        raise RuntimeError(f"{len(bad_files)} clips in a row cannot be read, the last one: {error}") from error


def _merge(windows: list[tuple[int, int]], gap: int) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for first, last in sorted(windows):
        if merged and first <= merged[-1][1] + gap:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged


def _cut(audio: dict[tuple[int, int], np.ndarray], first: int, last: int) -> np.ndarray:
    start, stop = next(window for window in audio if window[0] <= first and last <= window[1])
    return audio[start, stop][first - start : last - start]


def _stack(name: str, crops: list[list[np.ndarray]], length: int) -> dict[str, torch.Tensor]:
    """Crops, each in the parts it was read in, as rows that end in zeros."""
    waveforms, lengths = np.empty((len(crops), length), np.float32), [sum(map(len, parts)) for parts in crops]
    for row, parts, filled in zip(waveforms, crops, lengths):
        np.concatenate(parts, out=row[:filled])
        row[filled:] = 0
    return {f"{name}_waveforms": torch.from_numpy(waveforms), f"{name}_lengths": torch.tensor(lengths)}
