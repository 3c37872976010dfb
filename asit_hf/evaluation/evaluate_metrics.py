"""The functions of `metrics` as `evaluate.Metric` classes, in a file of their own because they need evaluate."""

import numpy as np

from ..utils.extras import extra
from .metrics import multi_label_metrics, single_label_metrics

with extra("train"):
    import datasets
    import evaluate


class SingleLabelMetrics(evaluate.Metric):
    """`single_label_metrics` of `predictions` (scores) and `references` (class ids); `compute` also accepts `k`."""

    function, references = staticmethod(single_label_metrics), datasets.Value("int64")

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.List(datasets.Value("float64")), "references": self.references}
        description = self.function.__doc__
        return evaluate.MetricInfo(description, citation="", features=datasets.Features(features))

    def _compute(self, predictions: list, references: list, **options: int) -> dict[str, float]:
        return self.function(np.asarray(predictions), np.asarray(references), **options)


class MultiLabelMetrics(SingleLabelMetrics):
    """`multi_label_metrics` of `predictions` (scores) and `references` (0-1 targets)."""

    function, references = staticmethod(multi_label_metrics), datasets.List(datasets.Value("int64"))
