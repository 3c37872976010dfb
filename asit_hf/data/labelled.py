"""Audio with labels, from any source: filtered, encoded, and without the files that cannot be read."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .audio import AudioReadError, audio_info
from .corpora.registry import CORPORA, load_corpus
from .datasets import load_audio_dataset
from .labels import encode_labels, label_names

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


@dataclass
class DatasetArguments:
    """How labelled audio is read, as options of a script."""

    corpus: str | None = field(
        default=None, metadata={"help": f"Published data set with its own splits and classes: {', '.join(CORPORA)}."}
    )
    audio_column: str | None = field(default=None, metadata={"help": "Column that holds the audio or its path."})
    label_column: str | None = field(default=None, metadata={"help": "Column that holds the labels."})
    root: str | None = field(default=None, metadata={"help": "Folder that the paths of a manifest are relative to."})
    strict: bool = field(default=False, metadata={"help": "Stop at the first file that cannot be read."})

    def load(self, data: str | PathLike, filters: Sequence[str] = (), **kwargs: Any) -> "Dataset":
        """As [`load_labelled`], with these options."""
        options = {one.name: getattr(self, one.name) for one in fields(DatasetArguments)}
        return load_labelled(data, filters, **options, **kwargs)


def load_labelled(
    source: str | PathLike,
    filters: Sequence[str] = (),
    names: Sequence[str] | None = None,
    strict: bool = False,
    corpus: str | None = None,
    check_files: bool = True,
    **kwargs: Any,
) -> "Dataset":
    """
    Audio with labels, from any source of [`~asit_hf.data.datasets.load_audio_dataset`]; the files of a plain folder
    are labelled with the folders they lie in.

    Args:
        source (`str`): folder, manifest, or Hub name; the root of a data set of a `corpus`.
        filters (`Sequence[str]`): `"COLUMN=VALUE,VALUE"`: keep the rows with one of these values; all must hold.
        names (`Sequence[str]`, *optional*): the class names by id, as a model has them; a label outside them is an
            error. By default those that the kept rows use, sorted.
        strict (`bool`): raise for a file that cannot be opened. Otherwise such files are reported and left out.
        corpus (`str`, *optional*): a name of [`~asit_hf.data.corpora.registry.CORPORA`]: a published data set with
            classes of its own.
        check_files (`bool`): open every file beforehand to find those that cannot be.
        kwargs: passed to `load_audio_dataset`; with a `corpus` only `split` has a meaning.

    Returns:
        `datasets.Dataset` with `audio` and `label`: a `ClassLabel`, a list of them, or a float.

    Raises:
        ValueError: no labels, no such column, no rows left, or an unknown label.
        AudioReadError: with `strict`, a file that cannot be opened.
    """
    if corpus is not None:
        unused = sorted(name for name, value in kwargs.items() if value is not None and name != "split")
        if unused:
            raise ValueError(f"{' and '.join(unused)} cannot be used with the corpus {corpus}")
        dataset = load_corpus(corpus, source, kwargs.get("split"))
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


def load_unlabelled(specs: "list[str | dict] | str | dict", **defaults: Any):
    """
    Loads and joins sources of audio; of each, the rows that its filter keeps, and of those the audio only.

    Args:
        specs: a path or name, a dictionary (or its JSON) with the key `source`, any keyword of
            [`load_audio_dataset`] and `filter`, a list of `COLUMN=VALUE[,VALUE...]`; or a list of such.
        defaults: keywords for every source that does not say otherwise.

    Returns:
        A `datasets.Dataset` with the column `audio`; with `streaming=True` an `IterableDataset`, one source after
        another until `shuffle` mixes their shards.
    """
    from datasets import concatenate_datasets

    specs = specs if isinstance(specs, (list, tuple)) else [specs]
    if not specs:
        raise ValueError("expected at least one source of audio, got none")
    loaded = [_load(spec, defaults).select_columns("audio") for spec in specs]
    plain = [dataset.features["audio"] for dataset in loaded if isinstance(dataset.features["audio"], dict)]
    if plain:  # tar files among other streams: all get their kind of column
        loaded = [dataset.cast_column("audio", plain[0]) for dataset in loaded]
    return concatenate_datasets(loaded)


def filter_rows(dataset, filters: list[str]):
    """Rows whose columns have one of the wanted values: every filter is `COLUMN=VALUE[,VALUE...]`, all must hold."""
    for condition in filters:
        column, separator, values = condition.partition("=")
        if not separator or not values:
            raise ValueError(f"a filter must read COLUMN=VALUE[,VALUE...], got {condition!r}")
        if column not in dataset.column_names:
            raise ValueError(f"cannot filter by column {column!r}: the data have {dataset.column_names}")
        names = getattr(dataset.features[column], "names", None)
        wanted = set(values.split(","))
        dataset = dataset.filter(_keep, input_columns=column, fn_kwargs={"wanted": wanted, "names": names})
    return dataset


def _keep(value: Any, wanted: set[str], names: list[str] | None) -> bool:
    return str(names[value] if names is not None else value) in wanted


def _load(spec: "str | dict", defaults: dict[str, Any]):
    if isinstance(spec, str):
        spec = json.loads(spec) if spec.lstrip().startswith("{") else {"source": spec}
    options = {**defaults, **spec}
    if "source" not in options:
        raise ValueError(f"a source of audio needs the key 'source', got {sorted(spec)}")
    filters = options.pop("filter", None) or []
    dataset = load_audio_dataset(options.pop("source"), **options)
    kept = filter_rows(dataset, [filters] if isinstance(filters, str) else filters)
    if filters and hasattr(kept, "__len__") and len(kept) == 0:
        raise ValueError(f"no row of {spec} is left by its filter {filters}")
    return kept
