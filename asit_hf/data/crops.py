"""Random crops for pretraining, read and resampled in loader workers. Log-mel and masking follow on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .audio import AudioReader, AudioReadError, source_name
from .clips import audio_of, draw_crops, select_audio
from .randomness import Seeded, sample_key

MAX_FAILURES = 100
# Windows of one file with a smaller gap are read as one: a seek costs about as much as decoding the gap.
_MERGE_SECONDS = 0.5


@dataclass(frozen=True)
class CropSettings:
    """Number and length of the random crops of a clip.

    Args:
        sampling_rate: of the crops, in Hz.
        global_seconds, num_global_crops: length and number of the crops that teacher and student see.
        local_seconds, num_local_crops: length and number of the crops that only the student sees; 0 for none.
        roll_probability: probability of shifting the clip circularly by a random amount before cropping.
    """

    sampling_rate: int
    global_seconds: float = 6.0
    num_global_crops: int = 2
    local_seconds: float = 2.0
    num_local_crops: int = 4
    roll_probability: float = 0.0

    def __post_init__(self):
        if self.num_global_crops < 1 or self.num_local_crops < 0:
            got = f"{self.num_global_crops} and {self.num_local_crops}"
            raise ValueError(f"expected >= 1 global and >= 0 local crops, got {got}")
        if self.global_samples < 1 or (self.num_local_crops and self.local_samples < 1):
            got = f"{self.global_seconds} and {self.local_seconds} seconds"
            raise ValueError(f"expected crops of at least one sample, got {got}")
        if not 0 <= self.roll_probability <= 1:
            raise ValueError(f"expected a roll_probability in [0, 1], got {self.roll_probability}")

    @property
    def global_samples(self) -> int:
        return round(self.global_seconds * self.sampling_rate)

    @property
    def local_samples(self) -> int:
        return round(self.local_seconds * self.sampling_rate)

    def read(self, source: Any, key: int) -> dict[str, torch.Tensor]:
        """Draw the crops of one clip with the random numbers of `key`, each independently and uniformly.

        Returns:
            `global_waveforms` (num_global_crops, samples) float32; `global_lengths` (num_global_crops,) int64, the
            samples before the zero padding of clips shorter than a crop; and the same with `local_` if there are
            local crops.
        """
        lengths = [self.global_samples] * self.num_global_crops + [self.local_samples] * self.num_local_crops
        with AudioReader(source) as reader:
            crops = draw_crops(reader, self.sampling_rate, lambda total: self._read(reader, total, lengths, key))
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
        # A crop that passes the end of a shifted clip continues at its beginning.
        parts = [[(start, min(stop, total)), (0, stop - total)] for start, stop in zip(starts, stops)]
        parts = [[(first, last) for first, last in pair if first < last] for pair in parts]
        windows = _merge([part for pair in parts for part in pair], gap=round(_MERGE_SECONDS * self.sampling_rate))
        audio = {(first, last): reader.read(self.sampling_rate, first, last - first) for first, last in windows}
        return [[_cut(audio, *part) for part in pair] for pair in parts]


class PretrainingCrops(Seeded, Dataset):
    """Random crops of unlabelled audio: item `i` of an epoch depends only on (seed, epoch, i) and the audio.

    Args:
        dataset: rows with an `audio` column, or a sequence of sources (see `asit_hf.data.audio.AudioReader`).
        sampling_rate, crops: see `CropSettings`.
        seed: of the crops.
        strict: raise for an unreadable clip; otherwise report it in `bad_files` and draw another clip instead.

    Items: the tensors of `CropSettings.read`, the numbers `sample_key` and `index` (the row that was read), `file`,
    and `bad_files`, a list of (path, reason).

    Raises, from `[]`:
        AudioReadError: an unreadable clip, with `strict`.
        RuntimeError: 100 clips in a row are unreadable.
    """

    def __init__(self, dataset: Sequence, sampling_rate: int, *, seed: int = 0, strict: bool = False, **crops: Any):
        super().__init__(seed)
        self.settings = CropSettings(sampling_rate, **crops)
        self.sources = select_audio(dataset)
        if len(self.sources) == 0:
            raise ValueError("expected some audio to crop, got an empty data set")
        self.strict = strict

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, index = self.epoch, range(len(self))[index]
        key, row = sample_key(self.seed, epoch, index), index
        bad_files: list[tuple[str, str]] = []
        while True:
            source = audio_of(self.sources[row])
            try:
                crops = self.settings.read(source, key)
                return {**crops, "sample_key": key, "index": row, "file": source_name(source), "bad_files": bad_files}
            except AudioReadError as error:
                if self.strict:
                    raise
                add_bad_file(bad_files, error)
                row = sample_key(self.seed, epoch, index, len(bad_files)) % len(self)


def add_bad_file(bad_files: list[tuple[str, str]], error: AudioReadError) -> None:
    """Add to the unreadable clips in a row; too many of them are an error."""
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
    """Crops, each a list of consecutive parts, as zero-padded rows."""
    waveforms, lengths = np.empty((len(crops), length), np.float32), [sum(map(len, parts)) for parts in crops]
    for row, parts, filled in zip(waveforms, crops, lengths):
        np.concatenate(parts, out=row[:filled])
        row[filled:] = 0
    return {f"{name}_waveforms": torch.from_numpy(waveforms), f"{name}_lengths": torch.tensor(lengths)}
