"""Strong labels: tables of events with onset and offset, clips with their events, and targets per time patch."""

import csv
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..fbank_asit import window_and_hop
from .clips import LabelledClips
from .collators import readable_items
from .labelled import readable_rows

# file, onset, offset and label: column names of DCASE first, then of AudioSet's strong labels
_COLUMNS = (
    ("filename", "segment_id", "file"),
    ("onset", "start_time_seconds"),
    ("offset", "end_time_seconds"),
    ("event_label", "label"),
)
IGNORED = -100.0


class Event(NamedTuple):
    """`onset` and `offset` in seconds, and the class name."""

    onset: float
    offset: float
    label: str


def read_strong_labels(path: str | os.PathLike) -> dict[str, list[Event]]:
    """Events by file, in the order of the table, sorted by onset within each file.

    Args:
        path: a tsv or csv table with a header: `filename onset offset event_label` (DCASE), or `segment_id
            start_time_seconds end_time_seconds label` (AudioSet's strong labels); other columns are ignored. A row
            with only a file name denotes a clip without events.

    Raises:
        ValueError: a missing column, or times that are not numbers or not in order; the message has the line.
    """
    events: dict[str, list[Event]] = {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        header = file.readline()
        file.seek(0)
        reader = csv.DictReader(file, delimiter="\t" if "\t" in header else ",")
        names = [_column(reader.fieldnames or [], usual, path) for usual in _COLUMNS]
        for row in reader:
            name, *event = ((row[column] or "").strip() for column in names)
            place = f"line {reader.line_num} of {path}"
            if not name:
                raise ValueError(f"expected a file name in {place}, got an empty field")
            of_file = events.setdefault(name, [])
            if any(event):
                of_file.append(_event(*event, place))
    if not events:
        raise ValueError(f"no rows in {path}")
    return {name: sorted(of_file) for name, of_file in events.items()}


def write_strong_labels(path: str | os.PathLike, events: Mapping[str, Iterable[Event]]) -> None:
    """Writes events as a tsv with DCASE's columns and times in milliseconds, for `read_strong_labels` to read."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow([names[0] for names in _COLUMNS])
        for name, of_file in events.items():
            rows = [(name, f"{event.onset:.3f}", f"{event.offset:.3f}", event.label) for event in of_file]
            writer.writerows(rows or [(name, "", "", "")])


def event_names(events: Mapping[str, Iterable[Event]]) -> list[str]:
    """Sorted class names of all events."""
    return sorted({event.label for of_file in events.values() for event in of_file})


def time_patch_edges(
    num_time_patches: int, duration: float | None = None, sampling_rate: int = 16000, patch_size: int = 16
) -> np.ndarray:
    """Boundaries in time of a clip's patches. A time patch has `patch_size` frames of 10 ms, 160 ms in all, and its
    frames' windows are centered in it, so that the second one begins at 167.5 ms. The first begins at 0, and the last
    ends with the clip, because the few frames after it belong to no patch.

    Args:
        num_time_patches: at least 1.
        duration: of the clip in seconds; by default the end of the last patch.

    Returns:
        `edges (num_time_patches + 1,)`: time patch `i` lasts from `edges[i]` to `edges[i + 1]` s.
    """
    if num_time_patches < 1:
        raise ValueError(f"expected at least one time patch, got {num_time_patches}")
    window, hop = window_and_hop(sampling_rate)
    edges = (np.arange(num_time_patches + 1) * patch_size * hop + (window - hop) / 2) / sampling_rate
    edges[0] = 0.0
    if duration is not None:
        edges[-1] = max(duration, edges[-2])
    return edges


def frame_targets(events: Iterable[Event], names: Sequence[str], edges: np.ndarray) -> np.ndarray:
    """0-1 targets `(time_patches, classes)`, float32.

    A class is active in each time patch of which its event covers at least half the usual width, and always in the one
    that the event covers most, so that no event is lost.

    Args:
        events: of one clip.
        names: the classes.
        edges (time_patches + 1,): see `time_patch_edges`.

    Raises:
        ValueError: a label that is not among `names`.
    """
    targets = np.zeros((len(edges) - 1, len(names)), dtype=np.float32)
    ids = {name: index for index, name in enumerate(names)}
    half = np.median(np.diff(edges)) / 2
    for event in events:
        if event.label not in ids:
            raise ValueError(f"expected a label among {', '.join(names)}; got {event.label!r}")
        covered = np.minimum(edges[1:], event.offset) - np.maximum(edges[:-1], event.onset)
        targets[covered >= half, ids[event.label]] = 1
        targets[covered.argmax(), ids[event.label]] = 1
    return targets


class StronglyLabelledClips(LabelledClips):
    """Clips with their events, for frame classification.

    Args:
        events: by file, as returned by `read_strong_labels`.
        root: folder that the file names are relative to. Tables of segment ids name no extensions: if a file does not
            exist, `.wav`, `.flac`, `.ogg` and `.mp3` are tried.
        sampling_rate, options: as in `LabelledClips`; events are cut to the crop.

    Items: those of `LabelledClips`, with `events` in seconds from the waveform's first sample and its `duration` in
    seconds.

    Raises:
        FileNotFoundError: none of the files exists.
    """

    def __init__(self, events: Mapping[str, Sequence[Event]], root: str | Path, sampling_rate: int, **options: Any):
        files = [_find_file(Path(root), name) for name in events]
        if not any(file.exists() for file in files):
            raise FileNotFoundError(f"none of the {len(files)} files is in {root}, for instance {files[0]}")
        super().__init__(files, sampling_rate, **options)
        self.names = list(events)
        self.events = [list(of_file) for of_file in events.values()]

    @property
    def files(self) -> list[Path]:
        return self.sources

    def item(self, index: int, key: int) -> dict[str, Any]:
        item = super().item(index, key)
        if "waveform" in item:
            item["duration"] = len(item["waveform"]) / self.sampling_rate
            item["events"] = cut_events(self.events[index], item["start"], item["duration"])
        return item

    def drop_unreadable(self) -> None:
        """Removes the clips that cannot be opened and reports each of them."""
        kept = readable_rows(self.sources)
        self.names, self.events, self.sources = (
            [values[index] for index in kept] for values in (self.names, self.events, self.sources)
        )


def cut_events(events: Iterable[Event], start: float, duration: float) -> list[Event]:
    """The parts of events within a crop, in seconds from the crop's beginning."""
    moved = (Event(max(onset - start, 0.0), min(offset - start, duration), label) for onset, offset, label in events)
    return [event for event in moved if event.onset < event.offset]


@dataclass
class FrameCollator:
    """Batch the items of `StronglyLabelledClips` for [`ASiTForAudioFrameClassification`].

    Args:
        feature_extractor: as in `ClassificationCollator`.
        names: the classes.
        patch_size: of the model.

    Returns, when called:
        `input_values` (batch, frames, mel), `attention_mask` (batch, frames) and `labels` (batch, time_patches,
        classes) float32: 0 or 1, and -100 in padding.

    Raises, when called:
        ValueError: a label that is not among `names`, or a batch without a readable clip.
    """

    feature_extractor: Callable[..., Any]
    names: Sequence[str]
    patch_size: int = 16

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        readable = readable_items(items)
        rate = self.feature_extractor.sampling_rate
        waveforms = [item["waveform"] for item in readable]
        batch = dict(self.feature_extractor(waveforms, sampling_rate=rate, padding=True, return_tensors="pt"))
        counts = (batch["attention_mask"].sum(-1) // self.patch_size).clamp_min(1).tolist()
        batch["labels"] = torch.full((len(readable), max(counts), len(self.names)), IGNORED)
        for targets, item, count in zip(batch["labels"], readable, counts):
            edges = time_patch_edges(count, item["duration"], rate, self.patch_size)
            targets[:count] = torch.from_numpy(frame_targets(item["events"], self.names, edges))
        return batch


def _column(columns: Sequence[str], usual: Sequence[str], path: str | os.PathLike) -> str:
    for name in usual:
        if name in columns:
            return name
    raise ValueError(f"expected a column {' or '.join(usual)} in {path}, got {', '.join(columns)}")


def _event(onset: str, offset: str, label: str, place: str) -> Event:
    try:
        event = Event(float(onset), float(offset), label)
    except ValueError:
        raise ValueError(f"expected times in seconds, got {onset!r} and {offset!r} in {place}") from None
    if not 0 <= event.onset < event.offset < float("inf"):
        raise ValueError(f"expected 0 <= onset < offset, got {onset} and {offset} in {place}")
    if not label:
        raise ValueError(f"expected a label for the event in {place}, got an empty field")
    return event


def _find_file(root: Path, name: str) -> Path:
    file = root / name
    if file.exists():
        return file
    others = (root / f"{name}{extension}" for extension in (".wav", ".flac", ".ogg", ".mp3"))
    return next((other for other in others if other.exists()), file)
