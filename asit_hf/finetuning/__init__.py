"""Training classifiers on ASiT encoders."""

import logging
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


def load_labelled_dataset(
    source: str | PathLike,
    filters: Sequence[str] = (),
    names: Sequence[str] | None = None,
    strict: bool = False,
    layout: str | None = None,
    check_files: bool = True,
    **kwargs: Any,
) -> "Dataset":
    """
    Audio with labels, from any source of [`~asit_hf.data.datasets.load_audio_dataset`]; the files of a plain folder
    are labelled with the folders they lie in.

    Args:
        source (`str`): folder, manifest, or Hub name; the root of a data set where there is a `layout`.
        filters (`Sequence[str]`): `"COLUMN=VALUE,VALUE"`: keep the rows with one of these values; all must hold.
        names (`Sequence[str]`, *optional*): the class names by id, as a model has them; a label outside them is an
            error. By default those that the kept rows use, sorted.
        strict (`bool`): raise for a file that cannot be opened. Otherwise such files are reported and left out.
        layout (`str`, *optional*): a name of [`~asit_hf.data.benchmarks.BENCHMARKS`]: a published data set with
            classes of its own.
        check_files (`bool`): open every file beforehand to find those that cannot be.
        kwargs: passed to `load_audio_dataset`; with a `layout` only `split` has a meaning.

    Returns:
        `datasets.Dataset` with `audio` and `label`: a `ClassLabel`, a list of them, or a float.

    Raises:
        ValueError: no labels, no such column, no rows left, or an unknown label.
        AudioReadError: with `strict`, a file that cannot be opened.
    """
    from ..data import encode_labels, filter_rows, label_names, load_audio_dataset, load_benchmark

    if layout is not None:
        unused = sorted(name for name, value in kwargs.items() if value is not None and name != "split")
        if unused:
            raise ValueError(f"{' and '.join(unused)} cannot be used with the layout {layout}")
        dataset = load_benchmark(layout, source, kwargs.get("split"))
        names = label_names(dataset) if names is None else names
    else:
        dataset = load_audio_dataset(source, **kwargs)
        if "label" not in dataset.column_names and Path(source).is_dir():
            dataset = load_audio_dataset(source, labels_from_folders=True, **kwargs)
        if "label" not in dataset.column_names:
            raise ValueError(f"no label column in {source}: name one of {', '.join(dataset.column_names)}")
    # the label column has been renamed
    renamed = f"{kwargs.get('label_column')}="
    filters = ["label=" + one.removeprefix(renamed) if one.startswith(renamed) else one for one in filters]
    dataset = filter_rows(dataset, filters)
    if len(dataset) == 0:
        raise ValueError(f"no row of {source} is left by the filters {filters}")
    if check_files:
        dataset = _drop_unreadable(dataset, strict)
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


def _drop_unreadable(dataset: "Dataset", strict: bool) -> "Dataset":
    """Left out before anything counts rows, so that predictions stay beside their files."""
    from ..data import AudioReadError, audio_info

    readable = []
    for index, row in enumerate(dataset.select_columns("audio")):
        try:
            audio_info(row["audio"])
        except AudioReadError as error:
            if strict:
                raise
            logger.warning("left out: %s", error)
        else:
            readable.append(index)
    if not readable:
        raise ValueError(f"none of the {len(dataset)} files can be read")
    if len(readable) < len(dataset):
        logger.warning("left out %d of %d files that cannot be read", len(dataset) - len(readable), len(dataset))
    return dataset.select(readable)


def _used_ids(labels: list) -> set[int]:
    missing = [index for index, label in enumerate(labels) if label is None]
    if missing:
        raise ValueError(f"expected a label in every row, {len(missing)} have none, first row {missing[0]}")
    return {one for label in labels for one in (label if isinstance(label, list) else [label])}
