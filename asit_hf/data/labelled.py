"""Labelled audio from any data set or corpus: filtered, with class ids, without unreadable files."""

import argparse
import logging
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from .audio import AudioReadError, audio_info, source_name
from .corpora.registry import CORPORA, load_corpus
from .datasets import find_splits, load_with_names
from .filters import filter_rows
from .labels import encode_labels, label_names
from .manifests import NUMBER
from .splits import default_splits

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)


@dataclass
class DatasetArguments:
    """How a data set is read, as options of a script."""

    corpus: str | None = HfArg(default=None, help=f"Published data set with splits and classes: {', '.join(CORPORA)}.")
    audio_column: str | None = HfArg(default=None, help="Column of the audio or its path. Default: audio, file, ...")
    label_column: str | None = HfArg(default=None, help="Column of the labels. Default: label, class, category, ...")
    label_separator: str | None = HfArg(
        default=None,
        help="Separator of several labels in a cell, or none to keep cells whole. Default: from the column.",
    )
    root: str | None = HfArg(default=None, help="Base folder of relative paths. Default: the manifest's folder.")
    strict: bool = HfArg(default=False, help="Stop at the first unreadable file instead of skipping it.")

    @classmethod
    def parser(cls, description: str | None) -> HfArgumentParser:
        """An argparse parser of `--data`, `--split` and these options, for scripts that add their own."""
        style = argparse.RawDescriptionHelpFormatter
        parser = HfArgumentParser(cls, description=description, formatter_class=style, allow_abbrev=False)
        parser.add_argument("--data", required=True, help="folder, csv or json manifest, parquet, or Hub data set")
        parser.add_argument("--split", help="split of the data; default: the only one, or all rows of a manifest")
        return parser

    @classmethod
    def of(cls, args: argparse.Namespace) -> "DatasetArguments":
        """These options among the arguments that `parser` has parsed."""
        return cls(**{one.name: getattr(args, one.name) for one in fields(DatasetArguments)})

    def load(self, data: str | PathLike, filters: Sequence[str] = (), **kwargs: Any) -> "Dataset":
        """Calls [`load_labelled`] with these options."""
        options = {one.name: getattr(self, one.name) for one in fields(DatasetArguments)}
        return load_labelled(data, filters, **options, **kwargs)

    def default_splits(self, data: str | PathLike) -> dict[str, str]:
        """The names of the splits "train", "validation" and "test" of a corpus or local data, as far as there are any.

        Raises:
            ValueError: splits of which none is for training, or several are of one kind.
        """
        if self.corpus is not None:
            return {name: name for name in CORPORA[self.corpus].splits}
        splits = find_splits(data)
        return default_splits(splits, data) if splits else {}

    def load_audio(
        self, data: str | PathLike, filters: Sequence[str] = (), split: str | None = None, streaming: bool = False
    ) -> "Dataset | IterableDataset":
        """The filtered rows of a data set or corpus, with or without labels, including unreadable files."""
        columns = {name: getattr(self, name) for name in ("audio_column", "label_column", "label_separator", "root")}
        dataset, renamed = _load(data, self.corpus, split=split, streaming=streaming, **columns)
        return filter_rows(dataset, filters, data, renamed)


def load_labelled(
    data: str | PathLike,
    filters: Sequence[str] = (),
    names: Sequence[str] | None = None,
    strict: bool = False,
    corpus: str | None = None,
    check_files: bool = True,
    problem_type: str | None = None,
    **kwargs: Any,
) -> "Dataset":
    """Audio with labels, from a corpus or anything that [`~asit_hf.data.datasets.load_audio_dataset`] reads.

    Files of a folder without a manifest are labelled by their subfolder.

    Args:
        data: folder, manifest, or Hub name; with `corpus` the root folder of that corpus.
        filters: conditions that rows must meet, see [`~asit_hf.data.filters.filter_rows`].
        names: class names by id, for instance a model's or those of the training data; any other label is an error. By
            default the sorted names of the labels in the filtered rows.
        strict: raise for a file that cannot be opened instead of reporting and skipping it.
        corpus: one of [`~asit_hf.data.corpora.registry.CORPORA`].
        check_files: open every file beforehand to find the unreadable ones.
        problem_type: "regression" takes labels as numbers, also if they are whole. With `names`, the labels have the
            form that this type of training data has: a list per clip, or one label.
        kwargs: passed to `load_audio_dataset`; with `corpus` only `split` is accepted.

    Returns:
        `datasets.Dataset` with `audio` and `label`: a `ClassLabel`, a list of them, or a float.

    Raises:
        ValueError: no labels or a missing one, no such column, no rows after filtering, or a label outside `names`.
        AudioReadError: a file that cannot be opened, with `strict`.
    """
    like_training = names is not None
    if corpus is None:
        kwargs["names"] = names
    dataset, renamed = _load(data, corpus, **kwargs)
    if corpus is not None:
        names = label_names(dataset) if names is None else names
    elif "label" not in dataset.column_names and Path(data).is_dir():
        dataset, renamed = _load(data, None, labels_from_folders=True, **kwargs)
    if "label" not in dataset.column_names:
        got = f"{', '.join(dataset.column_names)}: set label_column"
        if classes := _classes_as_columns(dataset):
            got += f", or write the classes that have a 1 in {', '.join(classes[:3])}, ... into one, such as 'dog;cat'"
        raise ValueError(f"expected a label column in {data}, got {got}")
    dataset = filter_rows(dataset, filters, data, renamed)
    if len(dataset) == 0:
        raise ValueError(f"no rows in {data}")
    if check_files:
        # before anything counts rows, so that predictions stay aligned with their files
        dataset = dataset.select(readable_rows((row["audio"] for row in dataset.select_columns("audio")), strict))
    as_lists = like_training and problem_type == "multi_label_classification"
    if not as_lists:
        _check_present(dataset, data)
    _report_repeats(dataset, data)
    if problem_type == "regression":
        return _as_numbers(dataset, data)
    if names is None and problem_type_of(dataset) != "regression":
        all_names, labels = label_names(dataset), dataset["label"][:]
        used = {one for label in labels for one in (label if isinstance(label, list) else [label])}
        names = [all_names[index] for index in sorted(used)]
    dataset = dataset if names is None else encode_labels(dataset, names)
    return _with_form(dataset, problem_type, data) if like_training else _check_form(dataset, problem_type, data)


def problem_type_of(dataset: "Dataset") -> str:
    """The `problem_type` of a model for the `label` column of a labelled data set."""
    feature = dataset.features["label"]
    if hasattr(feature, "names"):
        return "single_label_classification"
    return "multi_label_classification" if hasattr(feature, "feature") else "regression"


def targets(dataset: "Dataset") -> np.ndarray:
    """Class ids `(clips,)` of a labelled data set, or 0-1 targets `(clips, classes)` for multi-label clips."""
    labels = dataset["label"][:]
    if problem_type_of(dataset) == "single_label_classification":
        return np.asarray(labels)
    rows = np.zeros((len(labels), len(label_names(dataset))), dtype=np.int64)
    for row, ids in zip(rows, labels):
        row[ids] = 1
    return rows


def audio_paths(dataset: "Dataset") -> list[str]:
    """The path of every clip; none for embedded audio, whose names may repeat, and which takes time to read."""
    if dataset[0]["audio"]["bytes"] is not None:
        return []
    return [audio["path"] for audio in dataset.select_columns("audio").with_format("arrow")[:]["audio"].to_pylist()]


def check_classes(dataset: "Dataset", data: str | PathLike) -> None:
    """Raise a `ValueError` for labelled clips of `data` that teach nothing, as all of them have the same one class."""
    if problem_type_of(dataset) == "regression" or len(names := label_names(dataset)) > 1:
        return
    if all(label in (0, [0]) for label in dataset["label"][:]):
        raise ValueError(f"expected clips of several classes in {data}, got {len(dataset)}, all of {names[0]!r}")


def readable_rows(sources: Iterable[Any], strict: bool = False) -> list[int]:
    """The indices of audio sources that can be opened. The others are reported and counted.

    Raises:
        AudioReadError: a source that cannot be opened, with `strict`.
        ValueError: no source can be opened.
    """
    readable, total, reason = [], 0, None
    for index, source in enumerate(sources):
        total += 1
        try:
            audio_info(source)
        except AudioReadError as error:
            if strict:
                raise
            reason = reason or str(error)
            logger.warning("skipped: %s", error)
        else:
            readable.append(index)
    if not readable:
        raise ValueError(f"none of the {total} files can be read, first: {reason}")
    if len(readable) < total:
        logger.warning("skipped %d of %d files, which cannot be read", total - len(readable), total)
    return readable


def _check_present(dataset: "Dataset", data: str | PathLike) -> None:
    labels = dataset["label"][:]
    missing = [row for row, one in enumerate(labels) if one is None or (isinstance(one, float) and math.isnan(one))]
    if missing:
        first = source_name(dataset[missing[0]]["audio"])
        what = f"{len(missing)} of {len(labels)} rows of {data} have none, first row {missing[0]} ({first})"
        raise ValueError(f"expected a label in every row: {what}")


def _report_repeats(dataset: "Dataset", data: str | PathLike) -> None:
    """Counts the files that have several rows with different labels, as tables of one row per label do."""
    labels: dict[str, list] = {}
    for path, label in zip(audio_paths(dataset), dataset["label"][:]):
        labels.setdefault(path, []).append(label)
    if unlike := [path for path, found in labels.items() if any(label != found[0] for label in found)]:
        what = f"{len(unlike)} of {len(labels)} files of {data} have several rows with different labels"
        logger.warning_once(f"{what}, first {unlike[0]}: the labels of a clip belong in one cell, such as 'dog;cat'")


def _classes_as_columns(dataset: "Dataset") -> list[str]:
    """Columns of 0 and 1, if there are several."""
    found = [
        name for name in dataset.column_names if name != "audio" and set(map(str, dataset[name][:])) == {"0", "1"}
    ]
    return found if len(found) > 1 else []


def _check_form(dataset: "Dataset", problem_type: str | None, data: str | PathLike) -> "Dataset":
    """Reports labels that may be lists, if lists are wanted and every clip has one label."""
    if problem_type == "multi_label_classification" and problem_type_of(dataset) == "single_label_classification":
        names = label_names(dataset)
        unclear = [name for name in names if re.search("[,/+&]", name)]
        if unclear:
            what = f"every clip of {data} has one label, but {len(unclear)} of {len(names)} have a possible separator"
            logger.warning_once(f"{what}, such as {unclear[0]!r}: if they are lists, set label_separator")
    return dataset


def _with_form(dataset: "Dataset", problem_type: str | None, data: str | PathLike) -> "Dataset":
    """Single labels as lists for multi-label data; lists are an error for single-label data."""
    form, labels = problem_type_of(dataset), dataset["label"][:]
    if form == "multi_label_classification" and problem_type == "single_label_classification":
        row = max(range(len(labels)), key=lambda row: len(labels[row]))
        got = f"{[label_names(dataset)[one] for one in labels[row]]} for {source_name(dataset[row]['audio'])}"
        raise ValueError(f"expected one label per clip of {data}, as in the training data; got {got}")
    if form == "single_label_classification" and problem_type == "multi_label_classification":
        from datasets import List

        if None in labels:
            what = f"{labels.count(None)} of {len(labels)} label cells of {data} are empty"
            logger.warning_once(f"{what}, for clips without a label")
        feature, lists = List(dataset.features["label"]), [[] if one is None else [one] for one in labels]
        return dataset.remove_columns("label").add_column("label", lists, feature=feature)
    return dataset


def _as_numbers(dataset: "Dataset", data: str | PathLike) -> "Dataset":
    """The data set with labels that are numbers, for regression, instead of classes named by numbers."""
    if problem_type_of(dataset) == "regression":
        return dataset
    names = label_names(dataset)
    wrong = next((name for name in names if not NUMBER.fullmatch(name)), None)
    if wrong is not None or problem_type_of(dataset) == "multi_label_classification":
        got = "several in a cell" if wrong is None else repr(wrong)
        raise ValueError(f"expected one number as the label of each clip of {data} for regression, got {got}")
    values = [float(names[label]) for label in dataset["label"][:]]
    return dataset.remove_columns("label").add_column("label", values)


def _load(
    data: str | PathLike, corpus: str | None, **kwargs: Any
) -> "tuple[Dataset | IterableDataset, dict[str, str]]":
    """The rows, and the column `label` by its name in the data, which filters may use."""
    if corpus is None:
        return load_with_names(data, **kwargs)
    unused = sorted(name for name, value in kwargs.items() if value and name != "split")
    if unused:
        raise ValueError(f"{' and '.join(unused)} cannot be used with the corpus {corpus}")
    return load_corpus(corpus, data, kwargs.get("split")), {}
