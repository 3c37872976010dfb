"""Spans of time in which a label applies, from the labels of windows."""

import math
from collections.abc import Iterable
from heapq import heappop, heappush
from itertools import count
from typing import Any

from ..configuration_asit import ASiTConfig
from ..fbank_asit import HOP_SECONDS

# lowest score of a label, by the function that made it from the logits: softmax has a best label in every window
EVENT_THRESHOLDS = {"softmax": 0.0, "sigmoid": 0.5}


def default_window_seconds(config: ASiTConfig) -> float:
    """Length of the windows whose labels are joined: that of the training crops, at least 1 s."""
    return max(1.0, config.num_frames * HOP_SECONDS)


class Timeline:
    """
    The spans in which labels apply, from windows in order. A window's labels are those of its `top_k` best whose score
    reaches `threshold`. Two windows meet in the middle of their overlap; a gap between windows has no label.

    Args:
        threshold (`float`, defaults to 0): lowest score of a label.
        top_k (`int`, *optional*, defaults to 1): labels of a window; `None`: all that reach the threshold.
        aggregate (`str`, defaults to `"mean"`): whether a span's score is the `"mean"` or `"max"` over its windows.
    """

    def __init__(self, threshold: float = 0.0, top_k: int | None = 1, aggregate: str = "mean"):
        self.threshold, self.top_k, self.aggregate = threshold, top_k, aggregate
        self._closed: list[tuple[float, float, int, dict[str, Any]]] = []  # a heap by start, end and time of closing
        self._closings = count()
        self._open: dict[str, dict[str, Any]] = {}  # by start
        self._end: float | None = None

    def add(self, window: dict[str, Any]) -> tuple[float, dict[str, float], list[str]]:
        """
        Takes the next window, a dict of `start` and `end` in seconds and `labels`, `{"label", "score"}`, best first.

        Returns:
            The time in seconds at which labels change, those that begin, with their scores, and those that end.
        """
        best = window["labels"][: self.top_k]
        scores = {one["label"]: one["score"] for one in best if one["score"] >= self.threshold}
        end = window["start"] if self._end is None else self._end
        border = (end + window["start"]) / 2  # after skipped windows, the gap has no label
        ended = [label for label in self._open if label not in scores]
        self._close(ended, min(border, end))
        begun = {label: score for label, score in scores.items() if label not in self._open}
        for label, score in scores.items():
            span = {"start": max(border, window["start"]), "label": label, "sum": 0.0, "max": -math.inf, "windows": 0}
            span = self._open.setdefault(label, span)
            span["sum"] += score
            span["max"] = max(span["max"], score)
            span["windows"] += 1
        self._end = window["end"]
        return max(border, window["start"]), begun, ended

    def take(self) -> list[dict[str, Any]]:
        """
        Spans that have ended since the last call, `{"start", "end", "label", "score"}`. Those that begin after one
        that goes on wait for it, so that all calls together give the spans by start and end.
        """
        first = next((span["start"] for span in self._open.values()), math.inf)
        taken = []
        while self._closed and self._closed[0][0] <= first:
            taken.append(heappop(self._closed)[-1])
        return taken

    def finish(self) -> list[dict[str, Any]]:
        """All spans that have not been taken; those that go on end with the last window."""
        self._close(list(self._open), self._end or 0.0)
        return self.take()

    def _close(self, labels: Iterable[str], end: float) -> None:
        for label in labels:
            span = self._open.pop(label)
            score = span["sum"] / span["windows"] if self.aggregate == "mean" else span["max"]
            closed = {"start": span["start"], "end": end, "label": label, "score": score}
            heappush(self._closed, (closed["start"], end, next(self._closings), closed))
