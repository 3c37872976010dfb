"""Sound event detection: events from scores of time patches, segment-based F1 and PSDS."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ..data.event_tables import Event
from ..utils.extras import extra

with extra("train"):
    from scipy.ndimage import median_filter

# The two scenarios of the DCASE challenge: the first stresses timing, the second confusion of classes.
PSDS_SCENARIOS = {
    "psds1": {"dtc": 0.7, "gtc": 0.7, "cttc": 0.3, "alpha_ct": 0.0, "alpha_st": 1.0, "max_efpr": 100.0},
    "psds2": {"dtc": 0.1, "gtc": 0.1, "cttc": 0.3, "alpha_ct": 0.5, "alpha_st": 1.0, "max_efpr": 100.0},
}
PSDS_THRESHOLDS = tuple((np.arange(50) + 0.5) / 50)
Events = Mapping[str, Sequence[Event]]


def decode_events(
    scores: np.ndarray, names: Sequence[str], edges: np.ndarray, threshold: float = 0.5, median_filter_size: int = 1
) -> list[Event]:
    """
    Runs of time patches with scores above a threshold, as events sorted by onset.

    Args:
        scores (`np.ndarray` of shape `(time_patches, classes)`): probabilities.
        names (`Sequence[str]`): the classes.
        edges (`np.ndarray` of shape `(time_patches + 1,)`): seconds, see [`~asit_hf.data.events.time_patch_edges`].
        threshold (`float`, defaults to 0.5): a class is active in time patches with a score above it.
        median_filter_size (`int`, defaults to 1): odd width in time patches of a median filter over the activity,
            which removes events and fills gaps shorter than half of it; 1 means no filter.
    """
    scores, edges = np.asarray(scores), np.asarray(edges)
    if scores.ndim != 2 or scores.shape != (len(edges) - 1, len(names)):
        raise ValueError(f"expected scores of shape {(len(edges) - 1, len(names))}, got {scores.shape}")
    if median_filter_size < 1 or median_filter_size % 2 == 0:
        raise ValueError(f"expected an odd median_filter_size, got {median_filter_size}")
    on = median_filter((scores > threshold).astype(np.int8), size=(median_filter_size, 1), mode="nearest")
    changes = np.diff(on, axis=0, prepend=0, append=0)
    events = []
    for index, name in enumerate(names):
        firsts, ends = (np.flatnonzero(changes[:, index] == step) for step in (1, -1))
        events += [Event(float(edges[first]), float(edges[end]), name) for first, end in zip(firsts, ends)]
    return sorted(events)


def segment_metrics(
    reference: Events,
    estimated: Events,
    names: Sequence[str],
    durations: Mapping[str, float] | None = None,
    segment_seconds: float = 1.0,
) -> dict[str, float]:
    """
    Segment-based scores: time is cut into segments, and a class is active in every segment that one of its events
    overlaps.

    Args:
        reference, estimated: events by file; `reference` has all files, with an empty list for one without events.
        names (`Sequence[str]`): the classes; events of other classes are an error.
        durations (`Mapping[str, float]`, *optional*): seconds by file, to which events are cut. By default a file ends
            with its last event.
        segment_seconds (`float`, defaults to 1): length of a segment.

    Returns:
        `segment_f1`, `segment_precision`, `segment_recall` over all segments and classes (micro), `segment_f1_macro`,
        the mean over classes that occur in either, and `segment_error_rate`: substitutions, deletions and insertions
        per reference segment. NaN where the denominator is 0.

    Raises:
        ValueError: an unknown label, or a file in `estimated` that is not in `reference`.
    """
    if others := set(estimated) - set(reference):
        raise ValueError(f"expected estimates of reference files only, got {len(others)} others, first {min(others)}")
    active = [np.zeros((2, 0, len(names)), dtype=bool)]
    for file, events in reference.items():
        spans = [_spans(one, names) for one in (events, estimated.get(file, ()))]
        duration = max(times.max(initial=0.0) for times, _ in spans) if durations is None else durations[file]
        active.append(np.stack([_segments(*one, len(names), duration, segment_seconds) for one in spans]))
    true, guessed = np.concatenate(active, axis=1)
    hit, false_alarm, miss = true & guessed, guessed & ~true, true & ~guessed
    # pairs of a false alarm and a miss in one segment are substitutions
    errors = np.maximum(false_alarm.sum(1), miss.sum(1)).sum()
    hits, false_alarms, misses = (np.sum(one, axis=0) for one in (hit, false_alarm, miss))
    total, wrong = hits.sum(), false_alarms.sum() + misses.sum()
    per_class = [_ratio(2 * hit, 2 * hit + bad) for hit, bad in zip(hits, false_alarms + misses) if hit + bad > 0]
    return {
        "segment_f1": _ratio(2 * total, 2 * total + wrong),
        "segment_precision": _ratio(total, total + false_alarms.sum()),
        "segment_recall": _ratio(total, total + misses.sum()),
        "segment_f1_macro": float(np.mean(per_class)) if per_class else float("nan"),
        "segment_error_rate": _ratio(errors, total + misses.sum()),
    }


def psds(
    reference: Events,
    scores: Mapping[str, np.ndarray],
    edges: Mapping[str, np.ndarray],
    names: Sequence[str],
    scenario: str = "psds1",
    median_filter_size: int = 1,
    thresholds: Sequence[float] = PSDS_THRESHOLDS,
) -> float:
    """
    Polyphonic sound detection score (arXiv 1910.08440), from 0 to 1: the area under the curve of detected events over
    false alarms per hour, drawn by many thresholds.

    Args:
        reference: events by file; a file without events is an empty list.
        scores: probabilities `(time_patches, classes)` of the same files.
        edges: `(time_patches + 1,)` by file, seconds; the last one is the file's duration.
        names, median_filter_size: as in `decode_events`. A class without reference events is excluded.
        scenario (`str`): `"psds1"` or `"psds2"` of the DCASE challenge.
        thresholds (`Sequence[float]`): detection thresholds; more of them give a finer curve.

    Returns:
        The score; NaN without a reference event.

    Raises:
        ValueError: an unknown label, or different files.
    """
    if scenario not in PSDS_SCENARIOS:
        raise ValueError(f"expected scenario to be one of {', '.join(PSDS_SCENARIOS)}, got {scenario!r}")
    if set(reference) != set(scores) or set(reference) != set(edges):
        counts = f"{len(reference)}, {len(scores)}, {len(edges)}"
        raise ValueError(f"expected reference, scores and edges of the same files, got {counts}")
    settings = PSDS_SCENARIOS[scenario]
    true = {file: _spans(events, names) for file, events in reference.items()}
    spans, classes = (np.concatenate(column) for column in zip(*true.values()))
    counts = np.bincount(classes, minlength=len(names))
    present = counts > 0
    if not present.any():
        return float("nan")
    class_hours = np.bincount(classes, np.diff(spans)[:, 0], len(names)) / 3600
    hours = sum(float(of_file[-1]) for of_file in edges.values()) / 3600

    points = []
    for threshold in thresholds:
        counted = []
        for file, of_file in scores.items():
            detected = _spans(decode_events(of_file, names, edges[file], threshold, median_filter_size), names)
            counted.append(_count_detections(true[file], detected, settings, len(names)))
        found, false_alarms, confused = (sum(of_files) for of_files in zip(*counted))
        # confusions with each other class that occurs, per hour of that class
        rates = confused[:, present] / class_hours[present]
        num_others = np.maximum(present.sum() - present, 1)
        costs = false_alarms / hours + settings["alpha_ct"] * rates.sum(1) / num_others
        points.append((costs[present], found[present] / counts[present]))
    costs, ratios = (np.stack(column) for column in zip(*points))

    limit = settings["max_efpr"]
    grid = np.unique(np.concatenate(([0.0, limit], costs[costs < limit])))
    # for each class the best threshold at this cost or less
    curves = np.stack([np.where(costs <= cost, ratios, 0.0).max(0) for cost in grid[:-1]])
    stable = np.maximum(curves.mean(1) - settings["alpha_st"] * curves.std(1), 0.0)
    return float((stable * np.diff(grid)).sum() / limit)


def _spans(events: Iterable[Event], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Onsets and offsets `(events, 2)`, and class ids `(events,)`."""
    events, ids = list(events), {name: index for index, name in enumerate(names)}
    for event in events:
        if event.label not in ids:
            raise ValueError(f"unknown label {event.label!r}; expected one of {', '.join(names)}")
    spans = np.array([(event.onset, event.offset) for event in events], dtype=float).reshape(-1, 2)
    return spans, np.array([ids[event.label] for event in events], dtype=np.int64)


def _count_detections(
    true: tuple[np.ndarray, np.ndarray],
    detected: tuple[np.ndarray, np.ndarray],
    settings: Mapping[str, float],
    num_classes: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    One file's detected reference events `(classes,)`, false alarms `(classes,)`, and false alarms on another class
    `(classes, classes)`.
    """
    (spans, classes), (guesses, guessed) = true, detected
    shared = np.minimum(guesses[:, None, 1], spans[:, 1]) - np.maximum(guesses[:, None, 0], spans[:, 0])
    shared = np.maximum(shared, 0.0)
    same = guessed[:, None] == classes
    lengths, guess_lengths = np.diff(spans)[:, 0], np.diff(guesses)[:, 0]
    wrong = (shared * same).sum(1) < settings["dtc"] * guess_lengths
    covered = (shared * same * ~wrong[:, None]).sum(0) >= settings["gtc"] * lengths
    confused = np.zeros((num_classes, num_classes))
    for other in np.unique(classes):
        overlap = shared[:, classes == other].sum(1)
        on_other = wrong & (guessed != other) & (overlap >= settings["cttc"] * guess_lengths)
        confused[:, other] = np.bincount(guessed[on_other], minlength=num_classes)
    found, false_alarms = (np.bincount(ids, minlength=num_classes) for ids in (classes[covered], guessed[wrong]))
    return found, false_alarms, confused


def _segments(spans: np.ndarray, ids: np.ndarray, num_classes: int, duration: float, seconds: float) -> np.ndarray:
    """Active classes `(segments, classes)`, bool."""
    # times are rounded first: 0.3 / 0.1 is 2.9999999999999996
    active = np.zeros((int(np.ceil(round(duration / seconds, 6))), num_classes), dtype=bool)
    for (first, last), index in zip(np.round(spans / seconds, 6), ids):
        active[int(first) : int(np.ceil(last)), index] = True
    return active


def _ratio(count: float, total: float) -> float:
    return float(count / total) if total > 0 else float("nan")
