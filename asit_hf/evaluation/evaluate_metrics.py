"""The functions of `metrics` as `evaluate.Metric` classes, in a file of their own because they need evaluate."""

from collections.abc import Callable

import numpy as np

from ..utils.extras import extra
from .metrics import TOP_K, multi_label_metrics, single_label_metrics

with extra("train"):
    import datasets
    import evaluate


class SingleLabelMetrics(evaluate.Metric):
    """
    `single_label_metrics` of `predictions` (scores) and `references` (class ids); `compute` also accepts `k`.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _metric_info(single_label_metrics, datasets.Value("int64"))

    def _compute(self, predictions: list, references: list, k: int = TOP_K) -> dict[str, float]:
        return single_label_metrics(np.asarray(predictions), np.asarray(references), k)


class MultiLabelMetrics(evaluate.Metric):
    """`multi_label_metrics` of `predictions` (scores) and `references` (0-1 targets)."""

    def _info(self) -> evaluate.MetricInfo:
        return _metric_info(multi_label_metrics, datasets.List(datasets.Value("int64")))

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        return multi_label_metrics(np.asarray(predictions), np.asarray(references))


def _metric_info(function: Callable, references: object) -> evaluate.MetricInfo:
    features = {"predictions": datasets.List(datasets.Value("float64")), "references": references}
    return evaluate.MetricInfo(
        description=function.__doc__, citation="", inputs_description="", features=datasets.Features(features)
    )
