"""Spans of labels from windows."""

import pytest

from asit_hf.corpus.timeline import Timeline


def window(start: float, end: float, **scores: float) -> dict:
    labels = [{"score": score, "label": label} for label, score in scores.items()]
    return {"start": start, "end": end, "labels": sorted(labels, key=lambda one: -one["score"])}


def spans_of(timeline: Timeline) -> list[tuple]:
    return [(span["start"], span["end"], span["label"], pytest.approx(span["score"])) for span in timeline.finish()]


def test_a_timeline_joins_windows_of_one_label():
    timeline = Timeline(threshold=0.5)
    changes = [
        timeline.add(one)
        for one in (
            window(0, 1, dog=0.8, rain=0.1),
            window(0.5, 1.5, dog=0.6, rain=0.4),
            window(1, 2, dog=0.2, rain=0.7),
            window(1.5, 2.5, dog=0.4, rain=0.3),
            window(4.5, 5.5, dog=0.9),  # windows before it were skipped
        )
    ]
    assert changes[0] == (0, {"dog": 0.8}, [])
    assert changes[1][1:] == ({}, [])
    assert changes[2] == (1.25, {"rain": 0.7}, ["dog"])
    assert changes[3] == (1.75, {}, ["rain"])
    assert changes[4] == (4.5, {"dog": 0.9}, [])
    assert spans_of(timeline) == [(0, 1.25, "dog", 0.7), (1.25, 1.75, "rain", 0.7), (4.5, 5.5, "dog", 0.9)]


def test_labels_of_a_multi_label_timeline_overlap():
    timeline = Timeline(threshold=0.5, top_k=None)
    timeline.add(window(0, 1, dog=0.8, rain=0.6, wind=0.1))
    timeline.add(window(1, 2, dog=0.6, rain=0.4, wind=0.5))
    assert timeline.add(window(2, 3, dog=0.1, rain=0.4, wind=0.7)) == (2, {}, ["dog"])
    assert spans_of(timeline) == [(0, 1, "rain", 0.6), (0, 2, "dog", 0.7), (1, 3, "wind", 0.6)]
