"""Tables of a classifier's predictions, and the summary of a cross-validation."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..data.audio import source_name
from ..data.labelled import problem_type_of
from ..evaluation.metrics import confusion_counts, per_class_report

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers.trainer_utils import PredictionOutput

MAX_CONFUSION_CLASSES = 100


def write_reports(
    folder: Path, dataset: "Dataset", output: "PredictionOutput", problem_type: str, names: Sequence[str] | None
) -> None:
    """
    Writes `per_class.csv` and, for up to 100 classes of single labels, `confusion.png`, both not for regression; then
    `predictions.csv`, a row per clip of `file`, `label`, `prediction` and its `score`, multiple labels joined by `;`.

    `output` are the predictions for `dataset`, in its order, of a model trained as `problem_type`; `names` are the
    classes by id, `None` for regression.
    """
    if names is not None:
        single = problem_type_of(dataset) == "single_label_classification"
        targets = np.asarray(dataset["label"][:]) if single else output.label_ids
        classes = per_class_report(output.predictions, targets, names)
        _write_csv(folder / "per_class.csv", classes[0], (row.values() for row in classes))
        if single and len(names) <= MAX_CONFUSION_CLASSES:
            from ..plotting import plot_confusion

            figure = plot_confusion(confusion_counts(output.predictions, targets), names)
            figure.savefig(folder / "confusion.png", dpi=120)
    rows = _predictions(dataset, output, problem_type, names)
    files = map(source_name, dataset["audio"][:])
    header = ("file", "label", "prediction", "score")
    _write_csv(folder / "predictions.csv", header, ((file, *row) for file, row in zip(files, rows, strict=True)))


def _predictions(
    dataset: "Dataset", output: "PredictionOutput", problem_type: str, names: Sequence[str] | None
) -> Iterable[tuple]:
    """The label, the prediction and its score of each clip."""
    logits = torch.as_tensor(output.predictions).float()
    if problem_type == "regression":
        yield from ((label, guess, "") for label, guess in zip(output.label_ids.flatten(), logits.flatten().tolist()))
        return
    probabilities = logits.softmax(-1) if problem_type == "single_label_classification" else logits.sigmoid()
    single = problem_type_of(dataset) == "single_label_classification"
    for label, row in zip(dataset["label"][:], probabilities):
        labels = [label] if single else sorted(label)
        guesses = [int(row.argmax())] if single else (row > 0.5).nonzero().flatten().tolist()
        joined = (";".join(names[index] for index in chosen) for chosen in (labels, guesses))
        yield (*joined, ";".join(f"{row[index]:.4f}" for index in guesses))


def _write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def summarize_folds(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over folds, and as `..._std` its standard deviation."""
    names = [name for name in next(iter(results.values())) if not name.endswith(("_per_second", "_runtime"))]
    columns = {name: [metrics[name] for metrics in results.values()] for name in names}
    means = {name: float(np.mean(values)) for name, values in columns.items()}
    with np.errstate(invalid="ignore"):  # d' of a perfect score is infinite, its deviation NaN
        return means | {f"{name}_std": float(np.std(values)) for name, values in columns.items()}


def best_common_epoch(histories: list[list[dict]], metric: str, greater_is_better: bool) -> dict[str, float]:
    """
    AST's rule for ESC-50: the evaluation at which the mean over folds is best, as `best_common_epoch`, and that mean.
    It is optimistic, since the clips that it scores also select it. Evaluations that some folds lack are skipped.
    """
    key = f"eval_{metric.removeprefix('eval_')}"
    rows = [[row for row in history if key in row] for history in histories]
    means = np.array([np.mean([row[key] for row in evaluated]) for evaluated in zip(*rows)])
    if means.size == 0:
        return {}
    best = int(means.argmax() if greater_is_better else means.argmin())
    return {"best_common_epoch": rows[0][best]["epoch"], f"best_common_{key}": float(means[best])}
