"""Clips with their events, and targets per time patch."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..fbank_asit import window_and_hop
from ..utils.names import local_path
from .audio import AudioReadError, audio_info
from .clips import LabelledClips
from .collators import readable_items
from .event_tables import Event
from .files import resolve_paths
from .inputs import find_audio_files
from .labelled import readable_rows

logger = logging.getLogger(__name__)

ROUNDING_SECONDS = 0.01
IGNORED = -100.0


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
        root: folder of the files, which are found as by [`~asit_hf.data.files.resolve_paths`].
        sampling_rate, options: as in `LabelledClips`; events are cut to the crop.

    Items: those of `LabelledClips`, with `events` in seconds from the waveform's first sample and its `duration` in
    seconds.

    Raises:
        FileNotFoundError: none of the files exists.
    """

    def __init__(self, events: Mapping[str, Sequence[Event]], root: str | Path, sampling_rate: int, **options: Any):
        self.root = Path(root)
        try:
            files = resolve_paths(list(events), root, "the events")
        except FileNotFoundError as error:
            hint = "a table without a column of files belongs to the audio file of the same name"
            raise FileNotFoundError(f"{error} ({hint})") from None
        clips: dict[Path, tuple[str, list[Event]]] = {}  # tables may name a file in several ways
        for (name, of_file), file in zip(events.items(), files):
            clips.setdefault(Path(local_path(file)), (name, []))[1].extend(of_file)
        super().__init__(list(clips), sampling_rate, **options)
        self.names = [name for name, _ in clips.values()]
        self.events = [sorted(of_file) for _, of_file in clips.values()]

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
        """Removes the clips that do not exist, with their number, and those that cannot be opened, with each name."""
        there = [index for index, file in enumerate(self.sources) if file.exists()]
        if missing := sorted(set(range(len(self))) - set(there)):
            first = self.names[missing[0]]
            logger.warning("skipped %d of %d files, not in %s, first %s", len(missing), len(self), self.root, first)
            self._keep(there)
        self._keep(readable_rows(self.sources))

    def cut_to_durations(self) -> None:
        """Cuts the events that end after their clip and drops those that begin after it, with a warning of each kind.

        Raises:
            ValueError: there are events, and all begin after their clips.
        """
        beyond, cut, total = [], [], 0
        for index, file in enumerate(self.sources):
            try:
                duration = audio_info(file).duration
            except AudioReadError:  # is reported when it is read
                continue
            total += len(self.events[index])
            for event in self.events[index]:
                if event.onset >= duration or event.offset > duration + ROUNDING_SECONDS:
                    example = f"{self.names[index]}: {event.onset:g} to {event.offset:g} s, clip of {duration:g} s"
                    (beyond if event.onset >= duration else cut).append(example)
            self.events[index] = cut_events(self.events[index], 0.0, duration)
        if beyond and len(beyond) == total:
            raise ValueError(
                f"all {total} events begin after the end of their clips, for instance {beyond[0]}: expected seconds "
                "from the beginning of the clip; columns in milliseconds are called onset_ms and offset_ms"
            )
        if beyond:
            logger.warning(
                "dropped %d of %d events beyond their clips, for instance %s", len(beyond), total, beyond[0]
            )
        if cut:
            logger.warning("cut %d of %d events that end after their clips, for instance %s", len(cut), total, cut[0])

    def _keep(self, kept: Sequence[int]) -> None:
        self.names, self.events, self.sources = (
            [values[index] for index in kept] for values in (self.names, self.events, self.sources)
        )


def warn_of_unlabelled_files(*sets: StronglyLabelledClips) -> None:
    """Counts the audio files in the folders of some clips that none of the tables names."""
    named = {file.resolve() for clips in sets for file in clips.files}
    for root in dict.fromkeys(clips.root for clips in sets):
        if others := [file for file in find_audio_files(root) if file.resolve() not in named]:
            logger.warning(
                "%d audio files of %s are in no table and are left out, first %s", len(others), root, others[0]
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
