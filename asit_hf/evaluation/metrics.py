"""
Classification metrics as functions, which need neither evaluate nor datasets, so that pretraining computes kNN
accuracy without them. In `evaluate_metrics` they are `evaluate.Metric` classes, which score in Trainer.
"""

import logging
from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np
from transformers import EvalPrediction

from ..utils.extras import extra

logger = logging.getLogger(__name__)

TOP_K = 5


def top_k_accuracy(scores: np.ndarray, labels: np.ndarray, k: int = 1) -> float:
    """
    Share of clips whose class is among the `k` best-scored ones; among equal scores the lower class id comes first.
    Unlike scikit-learn's `top_k_accuracy_score`, it breaks ties as `argmax` does, and pretraining needs it without
    scikit-learn.

    Args:
        scores (`np.ndarray` of shape `(clips, classes)`): logits or probabilities.
        labels (`np.ndarray` of shape `(clips,)`): class ids.
        k (`int`): at least 1; values above the number of classes count all of them.
    """
    scores, labels = _check_class_ids(scores, labels)
    if k < 1:
        raise ValueError(f"expected k of at least 1, got {k}")
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return float((best == labels[:, None]).any(axis=1).mean())


def average_precisions(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """
    Average precision of every class, `(classes,)`, from scores (logits or probabilities) and 0-1 targets, both
    `(clips, classes)`; NaN for a class without positives, where scikit-learn gives 0.
    """
    scores, targets = _check_targets(scores, targets)
    return _per_class(_sklearn_metrics().average_precision_score, scores, targets, targets.any(axis=0))


def roc_aucs(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of every class, `(classes,)`; NaN for one without positives or without negatives."""
    scores, targets = _check_targets(scores, targets)
    return _per_class(_sklearn_metrics().roc_auc_score, scores, targets, targets.any(axis=0) & ~targets.all(axis=0))


def d_prime(auc: float) -> float:
    """The sensitivity index d' of an area under the ROC curve: infinite for 1, minus infinity for 0, NaN for NaN."""
    with extra("train"):
        from scipy.special import ndtri
    return float(np.sqrt(2) * ndtri(auc))


def single_label_metrics(scores: np.ndarray, labels: np.ndarray, k: int = TOP_K) -> dict[str, float]:
    """`accuracy` and, for more than `k` classes, `top{k}_accuracy`; arguments as in `top_k_accuracy`."""
    metrics = {"accuracy": top_k_accuracy(scores, labels)}
    if np.shape(scores)[-1] > k:
        metrics[f"top{k}_accuracy"] = top_k_accuracy(scores, labels, k)
    return metrics


def expected_calibration_error(probabilities: np.ndarray, targets: np.ndarray, num_bins: int = 15) -> float:
    """
    Mean distance between the confidence (highest probability) and the accuracy in bins of equal width of confidence,
    weighted by their clips; from 0 to 1 (Guo et al. 2017, https://arxiv.org/abs/1706.04599, equation 3). For 0-1
    targets, every label of every clip counts, with its probability as the confidence that it is present.

    Args:
        probabilities (`np.ndarray` of shape `(clips, classes)`): from 0 to 1.
        targets (`np.ndarray` of shape `(clips,)` or `(clips, classes)`): class ids, or 0-1 targets.
        num_bins (`int`): number of bins; bin i holds confidences above (i - 1) / num_bins up to i / num_bins.
    """
    probabilities, targets = _check_labels(probabilities, targets)
    if probabilities.min() < 0 or probabilities.max() > 1 + 1e-6:
        needed = "softmax" if targets.ndim == 1 else "sigmoid"
        raise ValueError(f"expected probabilities, got {probabilities.min()} to {probabilities.max()}: use {needed}")
    confidences, right = probabilities.ravel(), targets.ravel()
    if targets.ndim == 1:
        confidences, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == targets
    bins = np.ceil(confidences.clip(max=1) * num_bins).astype(int)
    return float(np.abs(np.bincount(bins, weights=confidences - right)).sum() / len(right))


def label_probabilities(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """
    `(clips, classes)` float64: the softmax of logits for class ids `(clips,)`, their sigmoid for 0-1 targets
    `(clips, classes)`.
    """
    logits = np.asarray(logits, dtype=float)
    if np.ndim(targets) == 2:
        return np.exp(-np.logaddexp(0, -logits))
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def log_likelihoods(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """
    The logarithm of the probability of the label of every clip, `(clips,)`, by softmax for class ids; for 0-1 targets
    that of every label, present or absent, `(clips, classes)`, by sigmoid. Arguments as in `fit_temperature`.
    """
    logits, targets = _check_labels(logits, targets)
    if targets.ndim == 2:
        return -np.logaddexp(0, np.where(targets, -logits, logits))
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits[np.arange(len(targets)), targets] - np.log(np.exp(logits).sum(axis=1))


def confidences(logits: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    The probability of what is predicted, and whether it is right: of the best class of every clip, both `(clips,)`,
    or of every label, present or absent, both `(clips, classes)`. Arguments as in `fit_temperature`.
    """
    logits, targets = _check_labels(logits, targets)
    probabilities = label_probabilities(logits, targets)
    if targets.ndim == 2:
        return np.maximum(probabilities, 1 - probabilities), (logits > 0) == targets
    return probabilities.max(axis=1), logits.argmax(axis=1) == targets


TEMPERATURE_BOUNDS = (0.01, 100.0)


def fit_temperature(
    logits: np.ndarray, targets: np.ndarray, bounds: tuple[float, float] = TEMPERATURE_BOUNDS
) -> float:
    """
    The temperature by which to divide logits for the lowest mean negative log-likelihood of the labels. It is one of
    the `bounds` if the optimum is beyond, such as 0 for clips that are all classified correctly.

    Args:
        logits (`np.ndarray` of shape `(clips, classes)`): before the softmax or sigmoid.
        targets (`np.ndarray` of shape `(clips,)` or `(clips, classes)`): class ids, for the softmax, or 0-1 targets,
            for the sigmoid.
    """
    logits, targets = _check_labels(logits, targets)
    zero_one = targets if targets.ndim == 2 else np.arange(logits.shape[1]) == targets[:, None]
    if targets.ndim == 1:
        logits = logits - logits.max(axis=1, keepdims=True)
    # the loss is convex in 1 / temperature: bisection of its slope
    return _bisect(lambda one: ((label_probabilities(logits / one, targets) - zero_one) * logits).sum() > 0, bounds)


def held_out_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """
    `fit_temperature` for a model to keep, from few clips too. By Laplace's rule of succession, n predictions support a
    mean confidence from 1 / (n + 2) to (n + 1) / (n + 2), even if all of them are wrong or right: the temperature
    raises or lowers it no further, with a warning. Arguments as in `fit_temperature`.
    """
    logits, targets = _check_labels(logits, targets)
    fitted = fit_temperature(logits, targets)
    confidence, right = confidences(logits / fitted, targets)
    supported = np.clip(confidence.mean(), 1 / (right.size + 2), (right.size + 1) / (right.size + 2))
    temperature = fitted
    if supported != confidence.mean():
        bound = _bisect(lambda one: confidences(logits / one, targets)[0].mean() > supported, TEMPERATURE_BOUNDS)
        temperature = float(np.clip(bound, *sorted([fitted, 1.0])))
    if temperature != fitted or np.isclose(fitted, TEMPERATURE_BOUNDS, rtol=1e-5).any():
        logger.warning(
            f"the temperature is bounded at {temperature:.3g} (optimum for these clips: {fitted:.3g} or beyond), as "
            f"{right.sum()} of {right.size} predictions for the {len(logits)} held-out clips are right: hold out more "
            "clips for a better one"
        )
    return temperature


def calibration_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """
    `ece_percent`, the expected calibration error of the softmax in percent, and `in_sample_temperature`, fitted on the
    same clips: its calibration error on them would be optimistic. Arguments as in `fit_temperature`.
    """
    return {
        "ece_percent": 100 * expected_calibration_error(label_probabilities(logits, labels), labels),
        "in_sample_temperature": fit_temperature(logits, labels),
    }


def temperature_metrics(logits: np.ndarray, targets: np.ndarray, temperature: float) -> dict[str, float]:
    """
    The number of `clips`, `ece_percent` and `nll`, the mean negative log-likelihood, of calibrated logits, and as
    `ece_percent_before` and `nll_before` of what they were before the division by `temperature`. Arguments as in
    `fit_temperature`.
    """
    metrics = {"clips": len(logits)}
    for suffix, factor in (("_before", temperature), ("", 1)):
        scores = factor * np.asarray(logits, dtype=float)
        error = expected_calibration_error(label_probabilities(scores, targets), targets)
        metrics[f"ece_percent{suffix}"] = 100 * error
        metrics[f"nll{suffix}"] = -float(log_likelihoods(scores, targets).mean())
    return metrics


def multi_label_metrics(scores: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """
    `mAP` and `mAUC`, means over classes, and `d_prime` of mAUC, as AudioSet results are reported. Classes that cannot
    be scored are excluded from the means; `classes_without_positives` counts them. If no class has a positive, the
    means are NaN, with a warning. Arguments as in `average_precisions`.

    Raises:
        ValueError: wrong shapes or values.
    """
    precisions = average_precisions(scores, targets)
    if np.isnan(precisions).all():
        logger.warning("none of %d clips has a label: mAP and mAUC are NaN", len(targets))
    areas = roc_aucs(scores, targets)
    mean_precision, mean_area = (
        float("nan") if np.isnan(values).all() else float(np.nanmean(values)) for values in (precisions, areas)
    )
    return {
        "mAP": mean_precision,
        "mAUC": mean_area,
        "d_prime": d_prime(mean_area),
        "classes_without_positives": int(np.isnan(precisions).sum()),
    }


def regression_metrics(predictions: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """`mse` and `mae` of predictions and targets of one shape, up to a last axis of size 1."""
    predictions, targets = np.asarray(predictions, dtype=float), np.asarray(targets, dtype=float)
    if predictions.shape == (*targets.shape, 1):
        predictions = predictions[..., 0]
    if predictions.shape != targets.shape:
        raise ValueError(f"expected predictions and targets of one shape, got {predictions.shape}, {targets.shape}")
    errors = predictions - targets
    return {"mse": float(np.square(errors).mean()), "mae": float(np.abs(errors).mean())}


# The metric that chooses the best checkpoint, and whether greater is better.
MAIN_METRIC = {
    "single_label_classification": ("accuracy", True),
    "multi_label_classification": ("mAP", True),
    "regression": ("mse", False),
}


def score(scores: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """
    Scores with `SingleLabelMetrics` or `MultiLabelMetrics`, for class ids `(clips,)` or 0-1 targets
    `(clips, classes)`. They work in memory, so that parallel runs share no cache file.
    """
    from .evaluate_metrics import MultiLabelMetrics, SingleLabelMetrics

    one_label = np.ndim(targets) == 1
    scores, targets = (_check_class_ids if one_label else _check_targets)(scores, targets)
    metric = (SingleLabelMetrics if one_label else MultiLabelMetrics)(keep_in_memory=True)
    return metric.compute(predictions=scores, references=targets.astype(np.int64))


def compute_metrics_for(problem_type: str, label_names: Sequence[str]) -> Callable[[EvalPrediction], dict[str, float]]:
    """
    The `compute_metrics` of a Trainer. If every clip has exactly one label, single-label metrics are added to the
    multi-label ones: binary cross-entropy may train a task that is scored by accuracy.

    Args:
        problem_type (`str`): as in the model's config.
        label_names (`Sequence[str]`): the classes, by id; scores of another width raise `ValueError`.
    """
    if problem_type not in MAIN_METRIC:
        raise ValueError(f"expected problem_type to be one of {sorted(MAIN_METRIC)}, got {problem_type!r}")

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        scores = prediction.predictions
        if scores.shape[-1] != len(label_names):
            raise ValueError(f"expected scores of {len(label_names)} classes, got shape {scores.shape}")
        targets = prediction.label_ids
        if problem_type == "regression":
            return regression_metrics(scores, targets)
        metrics = score(scores, targets)
        if problem_type == "multi_label_classification" and (targets.sum(-1) == 1).all():
            metrics |= score(scores, targets.argmax(-1))
        return metrics

    return compute_metrics


def confusion_counts(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """
    Number of clips by class (rows) and best-scored class (columns), `(classes, classes)` int64, for
    [`~asit_hf.plotting.plot_confusion`]. Arguments as in `top_k_accuracy`.
    """
    scores, labels = _check_class_ids(scores, labels)
    return _sklearn_metrics().confusion_matrix(labels, scores.argmax(axis=1), labels=range(scores.shape[1]))


def per_class_report(
    scores: np.ndarray, targets: np.ndarray, label_names: Sequence[str]
) -> list[dict[str, str | int | float]]:
    """
    One row per class, in the order of `label_names`; NaN for undefined values.

    Args:
        scores (`np.ndarray` of shape `(clips, classes)`): logits or probabilities.
        targets (`np.ndarray` of shape `(clips,)` or `(clips, classes)`): class ids give the columns `label`, `clips`,
            `precision`, `recall`, `f1`; 0-1 targets give `label`, `clips`, `average_precision`, `auc`.
    """
    if np.shape(scores)[-1] != len(label_names):
        raise ValueError(f"expected scores of {len(label_names)} classes, got shape {np.shape(scores)}")
    if np.ndim(targets) == 1:
        scores, targets = _check_class_ids(scores, targets)
        precision, recall, f1, counts = _sklearn_metrics().precision_recall_fscore_support(
            targets, scores.argmax(axis=1), labels=range(len(label_names)), zero_division=np.nan
        )
        columns = {"clips": counts, "precision": precision, "recall": recall, "f1": f1}
    else:
        columns = {
            "clips": _check_targets(scores, targets)[1].sum(axis=0),
            "average_precision": average_precisions(scores, targets),
            "auc": roc_aucs(scores, targets),
        }
    rows = zip(label_names, *(values.tolist() for values in columns.values()))
    return [dict(zip(("label", *columns), row)) for row in rows]


def _sklearn_metrics() -> ModuleType:
    with extra("train"):
        import sklearn.metrics
    return sklearn.metrics


def _per_class(metric: Callable, scores: np.ndarray, targets: np.ndarray, scorable: np.ndarray) -> np.ndarray:
    values = np.full(scores.shape[1], np.nan)
    for index in np.flatnonzero(scorable):
        values[index] = metric(targets[:, index], scores[:, index])
    return values


def _check_scores(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores)
    if scores.ndim != 2 or len(scores) == 0:
        raise ValueError(f"expected scores of shape (clips, classes), got {scores.shape}")
    if not np.isfinite(scores).all():
        raise ValueError("expected finite scores, got NaN or infinity")
    return scores


def _bisect(is_below: Callable[[float], bool], bounds: tuple[float, float]) -> float:
    """The positive number up to which `is_below` is true; one of the `bounds` if it is beyond."""
    low, high = np.log(bounds)
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if is_below(np.exp(middle)) else (low, middle)
    return float(np.exp((low + high) / 2))


def _check_labels(scores: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores in float64, with class ids or 0-1 targets."""
    scores, targets = (_check_class_ids if np.ndim(targets) == 1 else _check_targets)(scores, targets)
    return scores.astype(float), targets


def _check_class_ids(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = _check_scores(scores), np.asarray(labels)
    if labels.shape != scores.shape[:1]:
        raise ValueError(f"expected one class id for each of {len(scores)} clips, got shape {labels.shape}")
    if labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise ValueError(f"expected class ids from 0 to {scores.shape[1] - 1}, got {labels.min()} to {labels.max()}")
    return scores, labels


def _check_targets(scores: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, targets = _check_scores(scores), np.asarray(targets)
    if targets.shape != scores.shape:
        raise ValueError(f"expected targets of the scores' shape {scores.shape}, got {targets.shape}")
    if not np.isin(targets, (0, 1)).all():
        raise ValueError("expected targets of 0 and 1 only")
    return scores, targets.astype(bool)
