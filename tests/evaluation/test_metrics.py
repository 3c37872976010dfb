import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import EvalPrediction

from asit_hf.evaluation.evaluate_metrics import MultiLabelMetrics, SingleLabelMetrics
from asit_hf.evaluation.metrics import (
    MAIN_METRIC,
    average_precisions,
    calibration_metrics,
    compute_metrics_for,
    confidences,
    confusion_counts,
    d_prime,
    expected_calibration_error,
    fit_temperature,
    held_out_temperature,
    label_probabilities,
    log_likelihoods,
    multi_label_metrics,
    per_class_report,
    regression_metrics,
    roc_aucs,
    score,
    single_label_metrics,
    temperature_metrics,
    top_k_accuracy,
)

SCORES = np.array([[0.9, 0.1, 0.0], [0.2, 0.5, 0.3], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])
LABELS = np.array([0, 1, 2, 0])
# class 0: positives ranked 1 and 3; class 1: no positive; class 2: everything positive
TARGET_SCORES = np.array([[0.9, 0.5, 0.1], [0.8, 0.4, 0.2], [0.7, 0.3, 0.3], [0.1, 0.2, 0.4]])
TARGETS = np.array([[1, 0, 1], [0, 0, 1], [1, 0, 1], [0, 0, 1]])


def test_top_k_accuracy():
    assert top_k_accuracy(SCORES, LABELS) == 0.5
    assert top_k_accuracy(SCORES, LABELS, k=2) == top_k_accuracy(SCORES, LABELS, k=9) == 1.0
    with pytest.raises(ValueError, match="k of at least 1, got 0"):
        top_k_accuracy(SCORES, LABELS, k=0)


def test_equal_scores_do_not_count_as_right():
    scores = np.zeros((10, 5))
    assert top_k_accuracy(scores, np.full(10, 4)) == 0
    assert top_k_accuracy(scores, np.full(10, 0)) == 1


def test_top5_needs_more_than_five_classes():
    assert set(single_label_metrics(SCORES, LABELS)) == {"accuracy"}
    assert single_label_metrics(np.eye(6), np.arange(6)) == {"accuracy": 1.0, "top5_accuracy": 1.0}


def test_average_precision_by_hand_and_classes_without_positives():
    precisions = average_precisions(TARGET_SCORES, TARGETS)
    assert precisions[0] == pytest.approx((1 + 2 / 3) / 2)
    assert np.isnan(precisions[1])
    assert precisions[2] == 1
    areas = roc_aucs(TARGET_SCORES, TARGETS)
    assert areas[0] == pytest.approx(0.75)
    assert np.isnan(areas[1:]).all()


def test_multi_label_metrics_exclude_and_count_classes_without_positives():
    metrics = multi_label_metrics(TARGET_SCORES, TARGETS)
    assert metrics["mAP"] == pytest.approx((5 / 6 + 1) / 2)
    assert metrics["mAUC"] == pytest.approx(0.75)
    assert metrics["d_prime"] == pytest.approx(d_prime(0.75))
    assert metrics["classes_without_positives"] == 1


def test_d_prime_of_known_areas():
    assert d_prime(0.5) == pytest.approx(0)
    # two unit normals one apart: the area is Phi(1 / sqrt(2))
    assert d_prime(0.7602499) == pytest.approx(1, abs=1e-5)
    assert (d_prime(1.0), d_prime(0.0)) == (np.inf, -np.inf)
    assert np.isnan(d_prime(float("nan")))
    assert d_prime(1e-9) == pytest.approx(-d_prime(1 - 1e-9), rel=1e-6)


def test_random_scores_are_at_chance():
    generator = np.random.default_rng(0)
    scores, targets = generator.random((4000, 3)), (generator.random((4000, 3)) < 0.2).astype(int)
    metrics = multi_label_metrics(scores, targets)
    assert metrics["mAP"] == pytest.approx(0.2, abs=0.03)
    assert metrics["mAUC"] == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("function", "scores", "targets", "message"),
    [
        (single_label_metrics, SCORES, np.array([0, 1, 2, 3]), "class ids from 0 to 2"),
        (single_label_metrics, SCORES, np.array([0, 1]), "for each of 4 clips"),
        (single_label_metrics, SCORES * np.nan, LABELS, "finite"),
        (single_label_metrics, SCORES[:0], LABELS[:0], "expected scores of shape"),
        (multi_label_metrics, TARGET_SCORES, TARGETS * 0.5, "0 and 1 only"),
        (multi_label_metrics, TARGET_SCORES, TARGETS[:, :2], "shape"),
        (regression_metrics, np.zeros((4, 2)), np.zeros(4), "one shape"),
    ],
)
def test_wrong_input(function, scores, targets, message):
    with pytest.raises(ValueError, match=message):
        function(scores, targets)


def test_clips_without_any_label_are_reported(caplog):
    metrics = multi_label_metrics(TARGET_SCORES, TARGETS * 0)
    assert np.isnan([metrics["mAP"], metrics["mAUC"], metrics["d_prime"]]).all()
    assert metrics["classes_without_positives"] == TARGETS.shape[1]
    assert f"none of {len(TARGETS)} clips" in caplog.text


def test_calibration_error_by_hand():
    # two clips in (14/15, 1], one right: |0.97 - 0.5|; one in (8/15, 9/15], right: 1 - 0.6
    probabilities = np.array([[0.98, 0.02], [0.04, 0.96], [0.6, 0.4]])
    assert expected_calibration_error(probabilities, [0, 0, 0]) == pytest.approx((2 * 0.47 + 0.4) / 3)
    # in one bin, mean confidence against accuracy
    assert expected_calibration_error(probabilities, [0, 0, 0], num_bins=1) == pytest.approx((2.54 - 2) / 3)
    # an edge belongs to the bin below it
    edge = np.array([[0.5, 0.5], [0.75, 0.25]])
    assert expected_calibration_error(edge, [0, 1], num_bins=2) == pytest.approx((0.5 + 0.75) / 2)
    assert expected_calibration_error(np.eye(3), [0, 1, 2]) == 0
    with pytest.raises(ValueError, match="expected probabilities, got -1"):
        expected_calibration_error(np.array([[2.0, -1.0]]), [0])


@pytest.mark.parametrize(("right", "of"), [(3, 4), (9, 10), (6, 10)])
def test_temperature_by_hand(right, of):
    """Of logits (2, 0), the best probability is the share of right clips, so 2 / T is its log-odds."""
    logits, labels = np.tile([2.0, 0.0], (of, 1)), (np.arange(of) >= right).astype(int)
    temperature = 2 / np.log(right / (of - right))
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=1e-4)
    assert fit_temperature(10 * logits - 3, labels) == pytest.approx(10 * temperature, rel=1e-4)


def test_temperature_without_an_optimum_is_a_bound():
    logits = np.array([[3.0, 1.0], [0.0, 2.0]], dtype=np.float32)
    assert fit_temperature(logits, [0, 1]) == pytest.approx(0.01, rel=1e-4)
    assert fit_temperature(logits, [1, 0]) == pytest.approx(100, rel=1e-4)


def test_calibration_metrics():
    logits = np.tile([np.log(4.0), 0.0], (5, 1))  # probabilities 0.8 and 0.2
    perfect, worse = calibration_metrics(logits, [0, 0, 0, 0, 1]), calibration_metrics(logits, [0, 0, 0, 1, 1])
    assert perfect == {"ece_percent": pytest.approx(0, abs=1e-4), "in_sample_temperature": pytest.approx(1, rel=1e-4)}
    assert worse["ece_percent"] == pytest.approx(20)
    assert worse["in_sample_temperature"] == pytest.approx(np.log(4) / np.log(1.5), rel=1e-4)


def test_regression():
    assert regression_metrics([[1.0], [3.0]], [0.0, 0.0]) == {"mse": 5.0, "mae": 2.0}


@pytest.mark.parametrize("problem_type", sorted(MAIN_METRIC))
def test_compute_metrics_for_has_the_metric_that_chooses_checkpoints(problem_type):
    inputs = {
        "single_label_classification": (SCORES, LABELS, "abc"),
        "multi_label_classification": (TARGET_SCORES, TARGETS.astype(np.float32), "abc"),
        "regression": (np.zeros((4, 1), np.float32), np.ones(4, np.float32), "a"),
    }
    scores, labels, names = inputs[problem_type]
    compute_metrics = compute_metrics_for(problem_type, names)
    assert MAIN_METRIC[problem_type][0] in compute_metrics(EvalPrediction(predictions=scores, label_ids=labels))
    with pytest.raises(ValueError, match="expected scores of 7 classes"):
        compute_metrics_for(problem_type, "abcdefg")(EvalPrediction(predictions=scores, label_ids=labels))


def test_unknown_problem_type():
    with pytest.raises(ValueError, match="got 'ranking'"):
        compute_metrics_for("ranking", ["a"])


def test_per_class_report_of_class_ids():
    rows = per_class_report(SCORES, LABELS, ["a", "b", "c"])
    assert [row["label"] for row in rows] == ["a", "b", "c"]
    assert [row["clips"] for row in rows] == [2, 1, 1]
    assert rows[0]["precision"] == 1
    assert rows[0]["recall"] == 0.5
    assert rows[1]["precision"] == 0.5
    assert rows[1]["recall"] == 1


def test_per_class_report_of_targets():
    rows = per_class_report(TARGET_SCORES, TARGETS, ["a", "b", "c"])
    assert [row["clips"] for row in rows] == [2, 0, 4]
    assert rows[0]["average_precision"] == pytest.approx(5 / 6)
    assert np.isnan(rows[1]["average_precision"])
    assert np.isnan(rows[2]["auc"])
    with pytest.raises(ValueError, match="scores of 2 classes"):
        per_class_report(TARGET_SCORES, TARGETS, ["a", "b"])


def test_evaluate_metrics_equal_the_functions_and_take_batches(tmp_path):
    metric = MultiLabelMetrics(cache_dir=str(tmp_path))
    metric.add_batch(predictions=TARGET_SCORES[:2], references=TARGETS[:2])
    metric.add_batch(predictions=TARGET_SCORES[2:], references=TARGETS[2:])
    assert metric.compute() == pytest.approx(multi_label_metrics(TARGET_SCORES, TARGETS))
    metric = SingleLabelMetrics(cache_dir=str(tmp_path))
    assert metric.compute(predictions=SCORES, references=LABELS) == single_label_metrics(SCORES, LABELS)
    assert metric.compute(predictions=SCORES, references=LABELS, k=2) == {"accuracy": 0.5, "top2_accuracy": 1.0}


def test_scoring_leaves_no_cache_files(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path))
    assert score(SCORES, LABELS) == single_label_metrics(SCORES, LABELS)
    assert score(TARGET_SCORES, TARGETS.astype(np.float32)) == multi_label_metrics(TARGET_SCORES, TARGETS)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_multi_label_model_of_single_label_clips():
    one_hot = np.eye(3)[LABELS]
    metrics = compute_metrics_for("multi_label_classification", "abc")(EvalPrediction(SCORES, one_hot))
    assert metrics["accuracy"] == 0.5
    assert metrics["mAP"] == multi_label_metrics(SCORES, one_hot)["mAP"]
    several = compute_metrics_for("multi_label_classification", "abc")(EvalPrediction(TARGET_SCORES, TARGETS))
    assert "accuracy" not in several


def test_confusion_counts():
    assert confusion_counts(SCORES, LABELS).tolist() == [[1, 0, 1], [0, 1, 0], [0, 1, 0]]
    assert confusion_counts(np.eye(4)[:1], np.array([0])).shape == (4, 4)
    with pytest.raises(ValueError, match="class ids from 0 to 2"):
        confusion_counts(SCORES, np.array([0, 1, 2, 3]))


def test_calibration_error_of_several_labels_by_hand():
    # of 0.1, 0.1 and 0.1 none is present, of 0.9 one of two: |0.1 - 0| * 3 and |0.9 - 0.5| * 2; 0.5 is in its own bin
    probabilities = np.array([[0.1, 0.9], [0.1, 0.9], [0.1, 0.5]])
    error = expected_calibration_error(probabilities, [[0, 1], [0, 0], [0, 1]])
    assert error == pytest.approx((3 * 0.1 + 2 * 0.4 + 0.5) / 6)
    with pytest.raises(ValueError, match="sigmoid"):
        expected_calibration_error(np.array([[2.0, -1.0]]), [[0, 1]])


def test_log_likelihoods_are_those_of_torch():
    generator = np.random.default_rng(0)
    logits, labels = 20 * generator.normal(size=(30, 4)), generator.integers(0, 4, 30)
    targets = generator.integers(0, 2, (30, 4))
    single = -F.cross_entropy(torch.tensor(logits), torch.tensor(labels), reduction="none")
    several = -F.binary_cross_entropy_with_logits(
        torch.tensor(logits), torch.tensor(targets).double(), reduction="none"
    )
    np.testing.assert_allclose(log_likelihoods(logits, labels), single)
    np.testing.assert_allclose(log_likelihoods(logits, targets), several, atol=1e-12)
    np.testing.assert_allclose(label_probabilities(logits, labels), torch.tensor(logits).softmax(-1))
    np.testing.assert_allclose(label_probabilities(logits, targets), torch.tensor(logits).sigmoid())


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("true_temperature", [0.4, 1.0, 3.0])
def test_the_temperature_of_labels_drawn_from_scaled_logits_is_found(several, true_temperature):
    generator = np.random.default_rng(0)
    logits = 2 * generator.normal(size=(4000, 6)) - several
    if several:
        targets = (generator.random(logits.shape) < 1 / (1 + np.exp(-logits / true_temperature))).astype(int)
    else:
        targets = (logits / true_temperature + generator.gumbel(size=logits.shape)).argmax(axis=1)
    fitted = fit_temperature(logits, targets)
    assert fitted == pytest.approx(true_temperature, rel=0.1)
    assert held_out_temperature(logits, targets) == fitted
    metrics = temperature_metrics(logits / fitted, targets, fitted)
    for near in (0.98, 1.02):
        assert metrics["nll"] < temperature_metrics(logits / fitted / near, targets, fitted)["nll"]
    assert metrics["clips"] == 4000
    assert metrics["ece_percent"] < 2
    assert metrics["nll_before"] == pytest.approx(-log_likelihoods(logits, targets).mean())
    if true_temperature != 1:
        assert metrics["ece_percent_before"] > 2 * metrics["ece_percent"]
        assert metrics["nll_before"] > metrics["nll"]


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(("clips", "sign"), [(1, 1), (3, 1), (3, -1), (400, 1), (400, -1)])
def test_clips_that_are_all_right_or_wrong_bound_the_temperature(several, clips, sign, caplog):
    """The likelihood alone would take it to 0 or infinity, and the scores to 0 and 1 or to all equal ones."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(clips, 4))
    targets = (logits > 0) == (sign > 0) if several else logits.argmax(1) if sign > 0 else logits.argmin(1)
    temperature = held_out_temperature(logits, targets)
    assert 0.01 <= temperature <= 100
    if sign > 0:
        mean = confidences(logits / temperature, targets)[0].mean()
        assert temperature <= 1
        assert temperature == 1 or mean < (targets.size + 1) / (targets.size + 2) + 1e-5
        assert clips < 4 or mean > 0.99
    else:
        assert temperature >= 1
    assert f"{clips} held-out clips" in caplog.text


def test_one_class_and_equal_scores_have_a_temperature():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(50, 3)) + [1, 0, 0]
    assert 0.01 < held_out_temperature(logits, np.zeros(50, int)) < 100  # clips of one class
    assert 0.01 <= held_out_temperature(np.zeros((5, 3)), np.zeros(5, int)) <= 100
    assert 0.01 <= held_out_temperature(np.ones((5, 1)), np.zeros(5, int)) <= 100
    assert 0.01 <= held_out_temperature(np.array([[6e4, -6e4]], np.float16), np.array([1])) <= 100


def test_the_order_of_scores_is_kept():
    generator = np.random.default_rng(0)
    logits, targets = generator.normal(size=(300, 5)), generator.integers(0, 2, (300, 5))
    assert multi_label_metrics(logits / 1.7, targets) == multi_label_metrics(logits, targets)
    assert single_label_metrics(logits / 1.7, targets[:, 0]) == single_label_metrics(logits, targets[:, 0])
