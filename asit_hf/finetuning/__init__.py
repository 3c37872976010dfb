"""Training classifiers on ASiT encoders."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


def load_labelled_dataset(
    source: str | PathLike, rows: str | None = None, names: Sequence[str] | None = None, **kwargs: Any
) -> "Dataset":
    """
    Audio with labels, from any source of [`~asit_hf.data.datasets.load_audio_dataset`]; the files of a plain folder
    are labelled with the folders they lie in.

    Args:
        source (`str`): folder, manifest, or Hub name.
        rows (`str`, *optional*): keep only rows where a column has one of some values: `"COLUMN=VALUE,VALUE"`.
        names (`Sequence[str]`, *optional*): the class names by id, as a model has them; a label outside them is an
            error. By default those that the kept rows use, sorted.
        kwargs: passed to `load_audio_dataset`.

    Returns:
        `datasets.Dataset` with `audio` and `label`: a `ClassLabel`, a list of them, or a float.

    Raises:
        ValueError: no labels, no such column, no rows left, or an unknown label.
    """
    from ..data.datasets import encode_labels, label_names, load_audio_dataset

    dataset = load_audio_dataset(source, **kwargs)
    if "label" not in dataset.column_names and Path(source).is_dir():
        dataset = load_audio_dataset(source, labels_from_folders=True, **kwargs)
    if "label" not in dataset.column_names:
        raise ValueError(f"no label column in {source}: name one of {', '.join(dataset.column_names)}")
    if rows is not None:
        dataset = _keep_rows(dataset, rows)
    if names is None and problem_type_of(dataset) != "regression":
        all_names = label_names(dataset)
        names = [all_names[index] for index in sorted(_used_ids(dataset["label"][:]))]
    return dataset if names is None else encode_labels(dataset, names)


def problem_type_of(dataset: "Dataset") -> str:
    """The `problem_type` that the `label` column of a labelled data set stands for."""
    feature = dataset.features["label"]
    if hasattr(feature, "names"):
        return "single_label_classification"
    return "multi_label_classification" if hasattr(feature, "feature") else "regression"


def _keep_rows(dataset: "Dataset", rows: str) -> "Dataset":
    column, separator, values = rows.partition("=")
    if not separator:
        raise ValueError(f"expected rows as COLUMN=VALUE,VALUE, got {rows!r}")
    if column not in dataset.column_names:
        raise ValueError(f"no column {column!r} to keep rows by, there are {', '.join(dataset.column_names)}")
    wanted = set(values.split(","))
    present = [_as_text(dataset, column, value) for value in dataset[column][:]]
    missing = wanted.difference(present)
    if missing:
        raise ValueError(f"no row has {sorted(missing)} in column {column!r}, which has {sorted(set(present))[:20]}")
    return dataset.select([index for index, value in enumerate(present) if value in wanted])


def _as_text(dataset: "Dataset", column: str, value: Any) -> str:
    names = getattr(dataset.features[column], "names", None)
    return str(value) if names is None or value is None else names[value]


def _used_ids(labels: list) -> set[int]:
    ids = {one for label in labels for one in (label if isinstance(label, list) else [label])}
    if None in ids:
        missing = [index for index, label in enumerate(labels) if label is None]
        raise ValueError(f"expected a label in every row, {len(missing)} have none, first row {missing[0]}")
    return ids
