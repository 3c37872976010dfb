"""Strong labels: events with a beginning and an end, their files, and targets for every patch column."""

import csv
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from ..fbank_asit import window_and_hop
from .audio import AudioReader, AudioReadError, audio_info
from .clips import _draw, _shared_counter
from .randomness import sample_key

logger = logging.getLogger(__name__)

# DCASE's names first, then those of AudioSet's strong labels.
_COLUMNS = {
    "file": ("filename", "segment_id", "file"),
    "onset": ("onset", "start_time_seconds"),
    "offset": ("offset", "end_time_seconds"),
    "label": ("event_label", "label"),
}
IGNORED = -100.0


class Event(NamedTuple):
    """`onset` and `offset` in seconds, and the class name."""

    onset: float
    offset: float
    label: str


def read_strong_labels(path: str | os.PathLike) -> dict[str, list[Event]]:
    """
    Events by file, in the order of the table; each file's by onset.

    Args:
        path: a tsv or csv table with a header: `filename onset offset event_label` (DCASE), or `segment_id
            start_time_seconds end_time_seconds label` (AudioSet's strong labels); more columns do no harm. A row with
            nothing but a file says that nothing happens in it.

    Raises:
        ValueError: a missing column, times that are no numbers, or an offset that is not after the onset, with the
            line.
    """
    events: dict[str, list[Event]] = {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        header = file.readline()
        file.seek(0)
        reader = csv.DictReader(file, delimiter="\t" if "\t" in header else ",")
        names = {kind: _column(reader.fieldnames or [], kind, path) for kind in _COLUMNS}
        for row in reader:
            values = {kind: (row[name] or "").strip() for kind, name in names.items()}
            place = f"line {reader.line_num} of {path}"
            if not values["file"]:
                raise ValueError(f"{place} names no file")
            of_file = events.setdefault(values["file"], [])
            if values["onset"] or values["offset"] or values["label"]:
                of_file.append(_event(values, place))
    if not events:
        raise ValueError(f"no rows in {path}")
    return {name: sorted(of_file) for name, of_file in events.items()}


def write_strong_labels(path: str | os.PathLike, events: Mapping[str, Iterable[Event]]) -> None:
    """Writes what `read_strong_labels` reads: a tsv in DCASE's columns, times to the millisecond."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow([names[0] for names in _COLUMNS.values()])
        for name, of_file in events.items():
            rows = [(name, f"{event.onset:.3f}", f"{event.offset:.3f}", event.label) for event in of_file]
            writer.writerows(rows or [(name, "", "", "")])


def event_names(events: Mapping[str, Iterable[Event]]) -> list[str]:
    """The class names that occur, sorted."""
    return sorted({event.label for of_file in events.values() for event in of_file})


def time_patch_edges(
    num_time_patches: int, duration: float | None = None, sampling_rate: int = 16000, patch_size: int = 16
) -> np.ndarray:
    """
    Where in time the patch columns of a clip lie. A column is `patch_size` frames of 10 ms, 160 ms in all; its frames'
    windows are centerd in it, so that the second column begins at 167.5 ms. The first begins at 0, and the last ends
    with the clip, for the few frames after it have no column of their own.

    Args:
        num_time_patches (`int`): columns of the clip, at least 1.
        duration (`float`, *optional*): of the clip in seconds; by default the columns' own end.

    Returns:
        `np.ndarray` of shape `(num_time_patches + 1,)`, seconds: column `i` lasts from `edges[i]` to `edges[i + 1]`.
    """
    if num_time_patches < 1:
        raise ValueError(f"expected at least one column, got {num_time_patches}")
    window, hop = window_and_hop(sampling_rate)
    edges = (np.arange(num_time_patches + 1) * patch_size * hop + (window - hop) / 2) / sampling_rate
    edges[0] = 0.0
    if duration is not None:
        edges[-1] = max(duration, edges[-2])
    return edges


def frame_targets(events: Iterable[Event], names: Sequence[str], edges: np.ndarray) -> np.ndarray:
    """
    0-1 targets `(columns, classes)`, float32. A class is on in the columns that one of its events covers by half the
    usual width or more, and at least in the one that the event covers most: no event is lost.

    Args:
        events: of one clip.
        names (`Sequence[str]`): the classes.
        edges (`np.ndarray` of shape `(columns + 1,)`): see `time_patch_edges`.

    Raises:
        ValueError: a label that is not among `names`.
    """
    targets = np.zeros((len(edges) - 1, len(names)), dtype=np.float32)
    ids = {name: index for index, name in enumerate(names)}
    half = np.median(np.diff(edges)) / 2
    for event in events:
        if event.label not in ids:
            raise ValueError(f"unknown label {event.label!r}; the known labels are {', '.join(names)}")
        covered = np.minimum(edges[1:], event.offset) - np.maximum(edges[:-1], event.onset)
        targets[covered >= half, ids[event.label]] = 1
        targets[covered.argmax(), ids[event.label]] = 1
    return targets


class StronglyLabelledClips(Dataset):
    """
    Clips with their events, for frame classification.

    Args:
        events: by file, as `read_strong_labels` gives them.
        root: the folder that the files are relative to. A file that is not there is looked for with `.wav`, `.flac`,
            `.ogg` or `.mp3` added, as tables of segment ids need it.
        sampling_rate: of the waveforms, in Hz.
        max_seconds: read at most so much of a clip: a random crop with `train`, else its beginning; events are cut to
            it.
        train: draw crops at random, as a function of (seed, epoch, index).
        seed: of the crops.
        strict: raise for a clip that cannot be read; otherwise its item has no waveform but `bad_files`, [(path,
            reason)], and `FrameCollator` leaves it out with a warning.

    Items: `waveform` (samples,) float32, `events` in seconds from its first sample, `duration` in seconds, `index`.

    Raises:
        FileNotFoundError: none of the files is there.
    """

    def __init__(
        self,
        events: Mapping[str, Sequence[Event]],
        root: str | os.PathLike,
        sampling_rate: int,
        max_seconds: float | None = None,
        train: bool = False,
        seed: int = 0,
        strict: bool = True,
    ):
        if max_seconds is not None and max_seconds <= 0:
            raise ValueError(f"expected max_seconds above 0, got {max_seconds}")
        self.names = list(events)
        self.events = [list(of_file) for of_file in events.values()]
        self.files = [_find_file(Path(root), name) for name in self.names]
        if not any(file.exists() for file in self.files):
            raise FileNotFoundError(f"none of the {len(self.files)} files is in {root}, for instance {self.files[0]}")
        self.sampling_rate = sampling_rate
        self.max_seconds = max_seconds
        self.train = train
        self.seed = seed
        self.strict = strict
        self._epoch = _shared_counter()

    def __len__(self) -> int:
        return len(self.files)

    def set_epoch(self, epoch: int) -> None:
        """Draw other crops from the next item on, in running loader workers too."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            start, waveform = self._read(index)
        except AudioReadError as error:
            if self.strict:
                raise
            return {"index": index, "bad_files": [(error.source, error.reason)]}
        duration = len(waveform) / self.sampling_rate
        events = cut_events(self.events[index], start / self.sampling_rate, duration)
        return {"waveform": waveform, "events": events, "duration": duration, "index": index}

    def drop_unreadable(self) -> None:
        """Leaves out the clips that cannot be opened, each of which is reported."""
        kept, reasons = {}, []
        for name, events, file in zip(self.names, self.events, self.files):
            try:
                audio_info(file)
                kept[name] = (events, file)
            except AudioReadError as error:
                reasons.append(str(error))
        for reason in reasons:
            logger.warning("left out: %s", reason)
        if not kept:
            raise ValueError(f"none of the {len(self)} files can be read, first: {reasons[0]}")
        if reasons:
            logger.warning("left out %d of %d files that cannot be read", len(reasons), len(self))
        self.names = list(kept)
        self.events, self.files = (list(column) for column in zip(*kept.values()))

    def _read(self, index: int) -> tuple[int, np.ndarray]:
        """First sample and waveform of the clip or its crop."""
        rate = self.sampling_rate
        with AudioReader(self.files[index]) as reader:
            if self.max_seconds is None:
                return 0, reader.read(rate)
            length = max(1, round(self.max_seconds * rate))
            if not self.train:
                return 0, reader.read(rate, 0, length)

            def crop(total: int) -> tuple[int, np.ndarray]:
                generator = np.random.default_rng(sample_key(self.seed, int(self._epoch), index))
                start = int(generator.integers(0, max(0, total - length) + 1))
                return start, reader.read(rate, start, length)

            return _draw(reader, rate, crop)


def cut_events(events: Iterable[Event], start: float, duration: float) -> list[Event]:
    """The parts of events within a crop, in seconds from its beginning."""
    moved = (Event(max(onset - start, 0.0), min(offset - start, duration), label) for onset, offset, label in events)
    return [event for event in moved if event.onset < event.offset]


@dataclass
class FrameCollator:
    """
    Batch the items of `StronglyLabelledClips` for [`ASiTForAudioFrameClassification`].

    Args:
        feature_extractor: called as `feature_extractor(waveforms, sampling_rate=..., padding=True,
            return_tensors="pt")`.
        names: the classes.
        patch_size: of the model.

    Returns, when called:
        `input_values` (batch, frames, mel), `attention_mask` (batch, frames) and `labels` (batch, columns, classes)
        float32: 0 or 1, and -100 in the columns that are padding.

    Raises, when called:
        ValueError: a label that is not among `names`, or no clip of the batch could be read.
    """

    feature_extractor: Callable[..., Any]
    names: Sequence[str]
    patch_size: int = 16

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        for path, reason in (bad for item in items for bad in item.get("bad_files", ())):
            logger.warning("left out %s: %s", path, reason)
        readable = [item for item in items if "waveform" in item]
        if not readable:
            raise ValueError(f"none of the {len(items)} clips of this batch can be read: {items[0]['bad_files']}, ...")
        rate = self.feature_extractor.sampling_rate
        waveforms = [item["waveform"] for item in readable]
        batch = dict(self.feature_extractor(waveforms, sampling_rate=rate, padding=True, return_tensors="pt"))
        counts = (batch["attention_mask"].sum(-1) // self.patch_size).clamp_min(1).tolist()
        batch["labels"] = torch.full((len(readable), max(counts), len(self.names)), IGNORED)
        for row, item, columns in zip(batch["labels"], readable, counts):
            edges = time_patch_edges(columns, item["duration"], rate, self.patch_size)
            row[:columns] = torch.from_numpy(frame_targets(item["events"], self.names, edges))
        return batch


def _column(columns: Sequence[str], kind: str, path: str | os.PathLike) -> str:
    found = next((name for name in _COLUMNS[kind] if name in columns), None)
    if found is None:
        raise ValueError(f"no column {' or '.join(_COLUMNS[kind])} in {path}: its columns are {', '.join(columns)}")
    return found


def _event(values: dict[str, str], place: str) -> Event:
    try:
        onset, offset = float(values["onset"]), float(values["offset"])
    except ValueError:
        got = f"{values['onset']!r} and {values['offset']!r}"
        raise ValueError(f"expected an onset and an offset in seconds, got {got} in {place}") from None
    if not 0 <= onset < offset < float("inf"):
        raise ValueError(f"expected 0 <= onset < offset, got {onset} and {offset} in {place}")
    if not values["label"]:
        raise ValueError(f"{place} has an event without a label")
    return Event(onset, offset, values["label"])


def _find_file(root: Path, name: str) -> Path:
    file = root / name
    if file.exists():
        return file
    others = (root / f"{name}{extension}" for extension in (".wav", ".flac", ".ogg", ".mp3"))
    return next((other for other in others if other.exists()), file)
