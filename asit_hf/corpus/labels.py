"""The rows of a table of labels, from the scores of windows: one per clip, window or event."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np

from ..utils.names import path_text
from .timeline import EVENT_THRESHOLDS, Timeline

logger = logging.getLogger(__name__)

# what a row is about; a "timeline" is a clip with all its windows
UNITS = ("clip", "window", "event", "timeline")
AGGREGATES = ("mean", "max")
TOP_K = 5


@dataclass(frozen=True)
class LabelRows:
    """
    What the rows hold; see `label_rows`, which checks the options and completes them.

    Args:
        names: the model's labels by index.
        unit (`str`): `"clip"`, `"window"`, `"event"` or `"timeline"`.
        top_k (`int`, *optional*): labels of a clip or window; `None`: all.
        threshold (`float`, *optional*): lowest score; labels below it are left out.
        aggregate (`str`): `"mean"` or `"max"` over the windows of a clip or event.
    """

    names: tuple[str, ...]
    unit: str = "clip"
    top_k: int | None = TOP_K
    threshold: float | None = None
    aggregate: str = "mean"

    def clip(self, file: str) -> "ClipRows":
        return ClipRows(self, path_text(file))

    def best(self, scores: np.ndarray) -> list[dict[str, Any]]:
        """Labels of `scores` `(labels,)` as `{"label", "score"}`, best first."""
        order = np.argsort(-scores, kind="stable")[: self.top_k]
        if self.threshold is not None:
            order = order[scores[order] >= self.threshold]
        return [{"label": self.names[index], "score": float(scores[index])} for index in order]


class ClipRows:
    """
    The rows of one clip, from its windows in order, in memory that does not grow with their number (but for a
    `"timeline"`):

    - clip: `{"file", "labels"}`, labels as `{"label", "score"}`, best first; none if none reaches the threshold;
    - window: `{"file", "start", "end", "labels"}`, in seconds;
    - event: `{"file", "start", "end", "label", "score"}`, by start; of a clip without events one row of `None`;
    - timeline: `{"file", "labels", "timeline"}`, the latter a list of `{"start", "end", "labels"}`;
    - of a clip that cannot be classified: `{"file", "error"}`, after the rows of the windows before.
    """

    def __init__(self, options: LabelRows, file: str):
        self.options, self.file = options, file
        self._scores: np.ndarray | None = None
        self._count = 0
        self._windows: list[dict[str, Any]] = []
        self._timeline = Timeline(top_k=None, aggregate=options.aggregate)  # of the labels that `best` has chosen
        self._has_events = False
        self._error: str | None = None

    def add(self, start: float, end: float, value: tuple[np.ndarray]) -> list[dict[str, Any]]:
        """The rows that are known with the next window, from `start` to `end` in s; its `value` is `(scores,)`."""
        (scores,) = value
        if not np.isfinite(scores).all():
            self._error = f"expected finite scores, got {scores.min()} to {scores.max()} at {start:g} s"
            return []
        if self.options.unit in ("clip", "timeline"):
            self._aggregate(scores)
        if self.options.unit == "clip":
            return []
        window = {"start": start, "end": end, "labels": self.options.best(scores)}
        if self.options.unit == "window":
            return [{"file": self.file, **window}]
        if self.options.unit == "timeline":
            self._windows.append(window)
            return []
        self._timeline.add(window)
        return self._events(self._timeline.take())

    def finish(self) -> list[dict[str, Any]]:
        """The rows that need the whole clip."""
        rows = self._events(self._timeline.finish())
        if self._error is not None:
            return [*rows, *self.fail(self._error)]
        if self.options.unit == "event" and not self._has_events:
            return [{"file": self.file, **dict.fromkeys(("start", "end", "label", "score"))}]
        if self.options.unit in ("event", "window"):
            return rows
        mean = self._scores / self._count if self.options.aggregate == "mean" else self._scores
        row = {"file": self.file, "labels": self.options.best(mean.astype(np.float32))}
        return [{**row, "timeline": self._windows}] if self.options.unit == "timeline" else [row]

    def fail(self, reason: str) -> list[dict[str, Any]]:
        """The row of a clip that cannot be classified."""
        return [{"file": self.file, "error": reason}]

    def _aggregate(self, scores: np.ndarray) -> None:
        combine = np.add if self.options.aggregate == "mean" else np.maximum
        self._scores = scores.astype(np.float64) if self._scores is None else combine(self._scores, scores)
        self._count += 1

    def _events(self, spans: list[dict[str, Any]]) -> list[dict[str, Any]]:
        self._has_events = self._has_events or bool(spans)
        return [{"file": self.file, **span} for span in spans]


def label_rows(
    names: Sequence[str],
    function: str = "softmax",
    unit: str = "clip",
    top_k: int | str | None = "auto",
    threshold: float | None = None,
    aggregate: str = "mean",
) -> LabelRows:
    """
    Checks what the rows of a model's labels are to hold.

    Args:
        names: the model's labels by index.
        function (`str`, defaults to `"softmax"`): what makes scores of logits: `"softmax"` for single labels,
            `"sigmoid"` for several at once, `"none"` for regression, whose labels are the names of values.
        unit (`str`, defaults to `"clip"`): what a row is about, see `ClipRows`.
        top_k (`int`, *optional*): labels of a clip or window; `None`: all. Default, `"auto"`: 5; of an event table the
            best one of single labels and all of several; of regression all.
        threshold (`float`, *optional*): lowest score, in [0, 1]. Default: none; 0.5 for events of several labels.
        aggregate (`str`, defaults to `"mean"`): `"mean"` or `"max"` over the windows of a clip or event.

    Raises:
        ValueError: an option out of range, or one that a regression model has no use for.
    """
    for name, value, choices in (("unit", unit, UNITS), ("aggregate", aggregate, AGGREGATES)):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    if top_k not in ("auto", None) and not (isinstance(top_k, Integral) and top_k >= 1):
        raise ValueError(f"top_k must be at least 1, got {top_k!r}")
    if function == "none" and (unit == "event" or threshold is not None):
        what = "events" if unit == "event" else f"a threshold of {threshold}"
        raise ValueError(
            f"expected scores of softmax or sigmoid for {what}, got values of any size, as of a regression model; "
            "tables of values are csv, jsonl, json or parquet, without a threshold"
        )
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    if top_k == "auto":
        top_k = None if function == "none" else TOP_K
        if unit == "event":
            top_k = 1 if function == "softmax" else None
    if unit == "event" and threshold is None:
        threshold = EVENT_THRESHOLDS[function]
        what = "the best label of each window, whatever its score" if top_k == 1 else "labels whose score reaches 0.5"
        logger.warning("events are joined from %s; to change that, set --threshold", what)
    return LabelRows(tuple(names), unit, top_k, threshold, aggregate)
