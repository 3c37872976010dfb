"""Rows of labels from the scores of windows."""

import numpy as np
import pytest
from tiny import MEL, build

from asit_hf import ASiTAudioClassificationPipeline, ASiTFeatureExtractor, ASiTForAudioClassification
from asit_hf.corpus.labels import label_rows

NAMES = ("dog", "rain, heavy", "bell")
FILE = "a/b.wav"
EMPTY = {"file": FILE, "start": None, "end": None, "label": None, "score": None}


def rows_of(windows: list[tuple], **options) -> list[dict]:
    """Rows of one clip, `windows` being (start, end, scores)."""
    clip = label_rows(NAMES, **options).clip(FILE)
    rows = [row for start, end, scores in windows for row in clip.add(start, end, (np.float32(scores),))]
    return rows + clip.finish()


def labels(**scores: float) -> list[dict]:
    names = {"rain": "rain, heavy"}
    return [{"label": names.get(name, name), "score": pytest.approx(score)} for name, score in scores.items()]


def events(rows: list[dict]) -> list[tuple]:
    return [(row["start"], row["end"], row["label"], pytest.approx(row["score"])) for row in rows]


WINDOWS = [(0.0, 2.0, [0.7, 0.2, 0.1]), (1.0, 3.0, [0.5, 0.2, 0.3]), (1.5, 3.5, [0.1, 0.6, 0.3])]


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification", "regression"])
@pytest.mark.parametrize("options", [{"top_k": 2}, {"aggregate": "max", "top_k": None}, {}])
def test_scores_are_those_of_the_pipeline(problem_type, options):
    model = build(ASiTForAudioClassification, num_labels=7, problem_type=problem_type)
    classifier = ASiTAudioClassificationPipeline(model=model, feature_extractor=ASiTFeatureExtractor(num_mel_bins=MEL))
    sound = np.random.default_rng(0).standard_normal(40000).astype(np.float32) * np.linspace(0, 1, 40000)
    cut = {"window_seconds": 1.0, "return_timeline": True}
    expected = classifier(sound.astype(np.float32), **cut, **options)
    scores = classifier(sound.astype(np.float32), **cut, top_k=None)["timeline"]
    names = tuple(model.config.id2label[index] for index in range(7))
    function = {"single_label_classification": "softmax", "multi_label_classification": "sigmoid"}.get(problem_type)
    clip = label_rows(names, function or "none", unit="timeline", **{"top_k": 5, **options}).clip("a.wav")
    for window in scores:
        by_name = {one["label"]: one["score"] for one in window["labels"]}
        value = np.float32([by_name[name] for name in names])
        assert clip.add(window["start"], window["end"], (value,)) == []
    (row,) = clip.finish()
    assert row["timeline"] == expected["timeline"]
    assert [one["label"] for one in row["labels"]] == [one["label"] for one in expected["labels"]]
    assert [one["score"] for one in row["labels"]] == pytest.approx([one["score"] for one in expected["labels"]])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, labels(dog=1.3 / 3, rain=1 / 3, bell=0.7 / 3)),
        ({"top_k": 1}, labels(dog=1.3 / 3)),
        ({"threshold": 0.3}, labels(dog=1.3 / 3, rain=1 / 3)),
        ({"threshold": 0.3, "top_k": 1}, labels(dog=1.3 / 3)),
        ({"threshold": 0.9}, []),
        ({"aggregate": "max"}, labels(dog=0.7, rain=0.6, bell=0.3)),
        ({"aggregate": "max", "threshold": 0.6}, labels(dog=0.7, rain=0.6)),
        ({"function": "sigmoid", "threshold": 0.4}, labels(dog=1.3 / 3)),
    ],
)
def test_a_row_per_clip(options, expected):
    assert rows_of(WINDOWS, **options) == [{"file": FILE, "labels": expected}]


def test_a_row_per_window_also_without_labels():
    rows = rows_of(WINDOWS, unit="window", threshold=0.55)
    assert [(row["start"], row["end"]) for row in rows] == [(0.0, 2.0), (1.0, 3.0), (1.5, 3.5)]
    assert [row["labels"] for row in rows] == [labels(dog=0.7), [], labels(rain=0.6)]
    assert {row["file"] for row in rows} == {FILE}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # the middle of the overlap of 1.5 s to 3 s
        ({}, [(0, 2.25, "dog", 0.6), (2.25, 3.5, "rain, heavy", 0.6)]),
        ({"aggregate": "max"}, [(0, 2.25, "dog", 0.7), (2.25, 3.5, "rain, heavy", 0.6)]),
        ({"threshold": 0.6}, [(0, 1.5, "dog", 0.7), (2.25, 3.5, "rain, heavy", 0.6)]),
        ({"function": "sigmoid"}, [(0, 2.25, "dog", 0.6), (2.25, 3.5, "rain, heavy", 0.6)]),
        ({"function": "sigmoid", "threshold": 0.3, "top_k": 2}, [(0, 2.25, "dog", 0.6), (1.5, 3.5, "bell", 0.3)]),
        ({"top_k": 2, "threshold": 0.3}, [(0, 2.25, "dog", 0.6), (1.5, 3.5, "bell", 0.3)]),
    ],
)
def test_events(options, expected):
    rows = rows_of(WINDOWS, unit="event", **options)
    rain = [(2.25, 3.5, "rain, heavy", 0.6)] if options.get("top_k") else []
    assert events(rows) == [(*span, pytest.approx(score)) for *span, score in expected + rain]


def test_a_clip_without_events_has_a_row():
    assert rows_of(WINDOWS, unit="event", threshold=0.9) == [EMPTY]
    assert rows_of([(0.0, 1.0, [0.4, 0.3, 0.2])], unit="event", function="sigmoid") == [EMPTY]


def test_events_are_known_when_they_end():
    """No list of windows is kept: each event comes with the first window that lacks its label."""
    clip = label_rows(NAMES, unit="event").clip(FILE)
    for index in range(2000):
        scores = np.zeros(3, np.float32)
        scores[index % 2] = 0.9
        rows = clip.add(index / 2, index / 2 + 1, (scores,))
        assert len(rows) == (index > 0)
    assert (rows[0]["start"], rows[0]["end"]) == (999.25, 999.75)
    assert len(clip.finish()) == 1


@pytest.mark.parametrize("options", [{}, {"function": "sigmoid"}, {"top_k": 2, "threshold": 0.2}])
def test_events_are_in_order_and_every_window_is_in_those_of_its_labels(options):
    generator = np.random.default_rng(0)
    windows = [(index / 2, index / 2 + 1, generator.random(3)) for index in range(60)]
    rows = rows_of(windows, unit="event", **options)
    assert [(row["start"], row["end"]) for row in rows] == sorted((row["start"], row["end"]) for row in rows)
    per_window = rows_of(windows, unit="window", **{"top_k": 1, "threshold": 0.0, **options})
    per_window = per_window if "function" not in options else rows_of(windows, unit="window", threshold=0.5)
    for window in per_window:
        middle = (window["start"] + window["end"]) / 2
        now = {row["label"] for row in rows if row["start"] <= middle < row["end"]}
        assert now == {one["label"] for one in window["labels"]}


def test_default_of_event_tables_is_said(caplog):
    label_rows(NAMES, "sigmoid", "event")
    label_rows(NAMES, "sigmoid", "event", threshold=0.3)
    label_rows(NAMES, "sigmoid", "clip")
    (message,) = caplog.messages
    assert "0.5" in message
    assert "--threshold" in message


@pytest.mark.parametrize("unit", ["clip", "window", "event", "timeline"])
def test_scores_that_are_not_numbers_are_an_error_of_their_clip(unit):
    rows = rows_of([WINDOWS[0], (1.0, 3.0, [0.5, np.nan, 0.3])], unit=unit)
    assert set(rows[-1]) == {"file", "error"}
    assert "nan" in rows[-1]["error"]
    assert not any("nan" in str(row) for row in rows[:-1])


def test_values_of_regression_are_all_in_the_rows():
    names = [f"value {index}" for index in range(7)]
    clip = label_rows(names, "none").clip(FILE)
    clip.add(0.0, 1.0, (np.arange(7, dtype=np.float32) - 3,))
    (row,) = clip.finish()
    assert {one["label"]: one["score"] for one in row["labels"]} == {
        name: index - 3 for index, name in enumerate(names)
    }


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"threshold": 1.5}, "threshold.*1.5"),
        ({"threshold": float("nan")}, "threshold.*nan"),
        ({"top_k": 0}, "top_k.*0"),
        ({"unit": "second"}, "unit.*second"),
        ({"aggregate": "median"}, "aggregate.*median"),
        ({"function": "none", "threshold": 0.5}, "0.5.*regression"),
        ({"function": "none", "unit": "event"}, "events.*regression"),
    ],
)
def test_options_out_of_range(options, match):
    with pytest.raises(ValueError, match=match):
        label_rows(NAMES, **options)
