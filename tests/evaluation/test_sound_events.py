import numpy as np
import pytest

from asit_hf.data.event_tables import Event
from asit_hf.data.events import frame_targets, time_patch_edges
from asit_hf.evaluation.sound_events import decode_events, psds, segment_metrics

NAMES = ["dog", "rain"]


def test_runs_of_time_patches_become_events():
    scores = np.zeros((6, 2))
    scores[[0, 1, 4], 0] = 0.9
    scores[3:, 1] = 0.7
    edges = time_patch_edges(6, duration=1.02)
    events = decode_events(scores, NAMES, edges)
    assert events == [Event(0.0, edges[2], "dog"), Event(edges[3], 1.02, "rain"), Event(edges[4], edges[5], "dog")]
    assert decode_events(scores, NAMES, edges, threshold=0.8) == [events[0], events[2]]
    assert decode_events(scores, NAMES, edges, threshold=0.95) == []


def test_the_median_filter_drops_blips_and_fills_gaps():
    on = np.array([0, 1, 1, 1, 0, 1, 1, 0, 0, 0, 1, 0, 0])
    edges = np.arange(14.0)
    assert decode_events(on[:, None], ["dog"], edges, median_filter_size=3) == [Event(1.0, 7.0, "dog")]


def test_events_survive_targets_and_decoding():
    edges = time_patch_edges(12, duration=2.0)
    events = [Event(0.0, edges[3], "rain"), Event(edges[2], edges[7], "dog"), Event(edges[9], 2.0, "rain")]
    assert decode_events(frame_targets(events, NAMES, edges), NAMES, edges) == events


def test_wrong_scores():
    with pytest.raises(ValueError, match=r"scores of shape \(3, 2\), got \(3, 1\)"):
        decode_events(np.zeros((3, 1)), NAMES, np.arange(4.0))
    with pytest.raises(ValueError, match="odd median_filter_size"):
        decode_events(np.zeros((3, 2)), NAMES, np.arange(4.0), median_filter_size=2)


def test_segment_metrics_by_hand():
    """
    Segments of 1 s:            0     1     2     3          0 (second file)
        reference             dog   dog     -  rain        dog
        estimated             dog  rain  rain  rain          -
    Hits: dog 1, rain 1. False alarms: rain 2. Misses: dog 2. Segment 1 is a substitution, 2 an insertion, and the
    second file a deletion: 3 errors for 4 reference segments.
    """
    reference = {"a": [Event(0.2, 1.9, "dog"), Event(3.0, 4.0, "rain")], "b": [Event(0.0, 0.5, "dog")]}
    estimated = {"a": [Event(0.0, 0.9, "dog"), Event(1.5, 3.2, "rain")]}
    expected = {
        "segment_f1": 2 * 2 / (2 * 2 + 2 + 2),
        "segment_precision": 2 / 4,
        "segment_recall": 2 / 4,
        "segment_f1_macro": (2 * 1 / (2 * 1 + 2) + 2 * 1 / (2 * 1 + 2)) / 2,
        "segment_error_rate": 3 / 4,
    }
    assert segment_metrics(reference, estimated, NAMES) == pytest.approx(expected)
    assert segment_metrics(reference, estimated, NAMES, {"a": 4.0, "b": 3.0}) == pytest.approx(expected)
    # only two seconds of the first file: one hit, one substitution
    cut = segment_metrics({"a": reference["a"]}, estimated, NAMES, {"a": 2.0})
    assert (cut["segment_f1"], cut["segment_error_rate"]) == (0.5, 0.5)


def test_segments_of_a_tenth_of_a_second_are_not_rounded_apart():
    events = {"a": [Event(0.3, 0.7, "dog")]}
    other = {"a": [Event(0.7, 0.9, "dog")]}
    assert segment_metrics(events, events, ["dog"], segment_seconds=0.1)["segment_f1"] == 1
    assert segment_metrics(events, other, ["dog"], segment_seconds=0.1)["segment_f1"] == 0


def test_segment_metrics_without_events_and_wrong_input():
    nothing = segment_metrics({"a": []}, {"a": []}, NAMES)
    assert all(np.isnan(value) for value in nothing.values())
    with pytest.raises(ValueError, match="got 1 others, first b"):
        segment_metrics({"a": []}, {"b": []}, NAMES)
    with pytest.raises(ValueError, match="unknown label 'cat'"):
        segment_metrics({"a": [Event(0, 1, "cat")]}, {}, NAMES)


def test_psds_by_hand():
    """
    One hour, one class, two events. Above 0.8 one is found; above 0.5 both, with 60 false alarms: with one class the
    curve is 1/2 up to 60 an hour and 1 from there to 100.
    """
    scores = np.zeros((3600, 1))
    scores[0:10] = 0.9
    scores[100:110] = 0.6
    scores[[200 + 50 * index for index in range(60)]] = 0.6
    reference = {"a": [Event(0, 10, "dog"), Event(100, 110, "dog")]}
    edges = {"a": np.arange(3601.0)}
    options = {"reference": reference, "edges": edges, "names": ["dog"]}
    assert psds(scores={"a": scores}, **options) == pytest.approx(0.6 * 0.5 + 0.4 * 1)
    assert psds(scores={"a": np.zeros((3600, 1))}, **options) == 0
    perfect = (scores > 0.8) | (np.arange(3600)[:, None] // 10 == 10)
    assert psds(scores={"a": perfect}, **options) == 1


def crowd(seed: int) -> dict:
    """Twelve minutes with events of three classes, and noisy scores of them."""
    generator = np.random.default_rng(seed)
    names = ["bird", "car", "dog"]
    reference, scores, edges = {}, {}, {}
    for file in ("a", "b", "c", "d"):
        edges[file] = np.arange(361) * 0.5
        truth = np.zeros((360, 3))
        for index in range(3):
            for start in range(int(generator.integers(5, 30)), 340, 40):
                truth[start : start + int(generator.integers(2, 14)), index] = 1
        reference[file] = decode_events(truth, names, edges[file])
        smooth = np.stack([np.convolve(column, np.ones(5) / 5, "same") for column in generator.normal(size=(3, 360))])
        scores[file] = 1 / (1 + np.exp(-(1.5 * truth - 2 + truth[:, [1, 2, 0]] + 2 * smooth.T)))
    return {"reference": reference, "scores": scores, "edges": edges, "names": names}


@pytest.mark.parametrize(
    ("seed", "median_filter_size", "scenario", "expected"),
    [
        (0, 1, "psds1", 0.10224581776177015),
        (0, 1, "psds2", 0.9146490154716582),
        (1, 5, "psds1", 0.21794670595753501),
        (3, 5, "psds2", 0.9610205101908511),
    ],
)
def test_psds_equals_psds_eval(seed, median_filter_size, scenario, expected):
    """Reference values of psds_eval 0.5.3 with numpy 1.26 and pandas 2.2 (it does not run with later ones)."""
    score = psds(**crowd(seed), scenario=scenario, median_filter_size=median_filter_size)
    assert score == pytest.approx(expected, abs=1e-9)


@pytest.mark.slow
def test_psds_with_all_thresholds_equals_sed_scores_eval():
    """
    Reference value of sed_scores_eval 0.0.4 (pandas 2.2.3), which evaluates every score as a threshold:
    intersection_based.psds(scores, reference, durations, dtc_threshold=0.7, gtc_threshold=0.7, alpha_st=1,
    unit_of_time="hour", max_efpr=100).
    """
    options = crowd(0)
    thresholds = np.unique(np.concatenate([scores.ravel() for scores in options["scores"].values()]))
    assert psds(**options, scenario="psds1", thresholds=thresholds) == pytest.approx(0.10863442999231729, abs=1e-9)


@pytest.mark.parametrize(
    ("seed", "f1", "f1_macro", "error_rate"),
    [
        (0, 0.637883008356546, 0.6416977190605239, 0.5558194774346793),
        (3, 0.5371120107962213, 0.5295296860002742, 0.6704545454545454),
    ],
)
def test_segment_metrics_equal_sed_eval(seed, f1, f1_macro, error_rate):
    """
    Reference values of sed_eval 0.2.1: SegmentBasedMetrics(names, time_resolution=1.0).evaluate(reference, estimated,
    evaluated_length_seconds=180) for each file.
    """
    options = crowd(seed)
    files, names = options["scores"], options["names"]
    estimated = {file: decode_events(files[file], names, options["edges"][file]) for file in files}
    found = segment_metrics(options["reference"], estimated, names, dict.fromkeys(files, 180.0))
    expected = {"segment_f1": f1, "segment_f1_macro": f1_macro, "segment_error_rate": error_rate}
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_psds_excludes_classes_without_events():
    options = crowd(0)
    wider = {**options, "names": [*options["names"], "zebra"]}
    wider["scores"] = {file: np.pad(scores, ((0, 0), (0, 1))) for file, scores in options["scores"].items()}
    assert psds(**wider) == psds(**options)


def test_psds_wrong_input():
    options = crowd(0)
    with pytest.raises(ValueError, match="one of psds1, psds2, got 'psds3'"):
        psds(**options, scenario="psds3")
    with pytest.raises(ValueError, match="of the same files, got 4, 3, 4"):
        psds(**{**options, "scores": {file: options["scores"][file] for file in "abc"}})
    assert np.isnan(psds(**{**options, "reference": {file: [] for file in "abcd"}}))
