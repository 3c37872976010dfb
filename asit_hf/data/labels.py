"""Class names and class ids of the `label` column."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .audio import source_name
from .manifests import INTEGER

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


def label_names(dataset: "Dataset | IterableDataset") -> list[str]:
    """Class names of the `label` column, by class id."""
    names = _class_names((dataset.features or {}).get("label"))
    if names is None:
        raise ValueError(f"expected a label column with class names among {dataset.column_names}: see encode_labels")
    return names


def encode_labels(dataset: Any, names: Sequence[str] | None = None) -> "Dataset | IterableDataset":
    """Turn the `label` column into class ids: `ClassLabel`, or `List(ClassLabel)` if it holds lists.

    Args:
        dataset: `Dataset` or `IterableDataset` with strings, integers (the class named "7"), class ids, or lists of
            them as `label`.
        names: class names by id, for instance a model's; by default the sorted labels of the data set. Required for a
            stream.

    Raises:
        ValueError: a label that is not among `names`, with its row; no label column; a stream without `names`.
    """
    from datasets import Dataset

    feature = (dataset.features or {}).get("label")
    if dataset.column_names is not None and "label" not in dataset.column_names:
        raise ValueError(f"expected a label column, got {dataset.column_names}")
    own_names = _class_names(feature)
    if own_names is not None and (names is None or list(names) == own_names):
        return dataset
    if str(getattr(getattr(feature, "feature", feature), "dtype", "")).startswith("float"):
        if names is not None:
            raise ValueError(f"expected labels among {_shortened(names)}, got floating-point numbers")
        return dataset
    if not isinstance(dataset, Dataset):
        return _encode_stream(dataset, names, own_names)
    labels = [_as_strings(label, own_names) for label in dataset["label"][:]]
    if names is None:
        found = {name for label in labels for name in (label if isinstance(label, list) else [label])} - {None}
        names = sorted(found, key=int if all(INTEGER.fullmatch(name) for name in found) else None)
    multiple = any(isinstance(label, list) for label in labels)

    def place(row: int) -> str:
        return f"row {row} ({source_name(dataset[row]['audio'])})"

    ids = _class_ids(labels, names, place)
    return dataset.remove_columns("label").add_column("label", ids, feature=_label_feature(names, multiple))


def _class_names(feature: Any) -> list[str] | None:
    names = getattr(getattr(feature, "feature", feature), "names", None)
    return None if names is None else list(names)


def _label_feature(names: Sequence[str], multiple: bool) -> Any:
    from datasets import ClassLabel, List

    label = ClassLabel(names=list(names))
    return List(label) if multiple else label


def _as_strings(label: Any, names: list[str] | None) -> Any:
    """A label or a list of labels as class names; None stays None."""
    if isinstance(label, (list, tuple, np.ndarray)):
        return [_as_strings(one, names) for one in label]
    if label is None or isinstance(label, str):
        return label
    return str(label) if names is None else names[label]


def _class_ids(labels: Iterable, names: Sequence[str], place: Callable[[int], str]) -> list:
    ids = {name: index for index, name in enumerate(names)}
    encoded = []
    for row, label in enumerate(labels):
        for name in label if isinstance(label, list) else [label]:
            if name is not None and name not in ids:
                raise ValueError(f"expected a label among {_shortened(names)}; got {name!r} in {place(row)}")
        encoded.append([ids[name] for name in label] if isinstance(label, list) else ids.get(label))
    return encoded


def _encode_stream(dataset: "IterableDataset", names: Sequence[str] | None, own_names: list[str] | None) -> Any:
    import pyarrow
    from datasets import Features

    if names is None:
        raise ValueError("expected names, which cannot be collected from the labels of a stream; got None")
    if dataset.features is None:
        raise ValueError("expected a stream with features, which show whether rows have lists of labels; got None")
    multiple = hasattr(dataset.features["label"], "feature")
    features = Features({**dataset.features, "label": _label_feature(names, multiple)})

    # tables, as encoding rows with an Audio column needs torchcodec
    def encode(table: "pyarrow.Table") -> "pyarrow.Table":
        labels = [_as_strings(label, own_names) for label in table["label"].to_pylist()]
        ids = _class_ids(labels, names, lambda row: f"the file {source_name(table['audio'][row].as_py())}")
        column = table.schema.get_field_index("label")
        return table.set_column(column, "label", pyarrow.array(ids, type=features.arrow_schema.field("label").type))

    return dataset.with_format("arrow").map(encode, batched=True, features=features).with_format(None)


def _shortened(names: Sequence[str], limit: int = 60) -> str:
    shown = ", ".join(names[:limit])
    return f"{shown}, ... ({len(names)} in total)" if len(names) > limit else shown
