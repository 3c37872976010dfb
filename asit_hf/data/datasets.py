"""Loading audio as Hugging Face `datasets`: folders, manifests, shards, saved and Hub data sets, streams."""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.extras import extra
from ..utils.names import path_text
from ..utils.urls import is_url
from .clips import undecoded
from .files import join_path, resolve_paths, walk
from .filters import filter_rows
from .formats import AUDIO_EXTENSIONS
from .inputs import METADATA, Input, check_options, choose_shards, find_input, find_split_paths
from .labels import NO_SEPARATOR, divide_labels, encode_labels
from .manifests import (
    AUDIO_COLUMNS,
    LABEL_COLUMNS,
    MANIFEST_EXTENSIONS,
    Manifest,
    find_column,
    load_manifest,
)
from .splits import check_class_folders, match_split, split_kind
from .tars import read_tar

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

_TEXT = ("string", "large_string")


def load_audio_dataset(
    data: "str | os.PathLike | Dataset | IterableDataset",
    split: str | None = None,
    audio_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    config_name: str | None = None,
    root: str | os.PathLike | None = None,
    labels_from_folders: bool = False,
    label_separator: str | None = None,
    names: Sequence[str] | None = None,
) -> "Dataset | IterableDataset":
    """Load audio as a column `audio` (`datasets.Audio(decode=False)`), with `label` if there are labels.

    Args:
        data: an audio file; a folder of audio files (searched recursively, sorted, without hidden files); a csv, tsv,
            json or jsonl manifest, or a folder with one called `metadata` (csv, jsonl, parquet, ...); a parquet file
            or folder; a tar file or a folder of tar files (webdataset's layout; only the audio is read, as a stream);
            a folder written by `save_to_disk`; the name of a data set on the Hub; or a `datasets` object. A parquet
            file may hold paths. Other columns stay.
        split: the split of a Hub, parquet or saved data set; for a manifest, the value of its `split` column; for a
            folder of audio, the subfolder or the manifest (train.csv), see `find_splits`. Another case or the usual
            other names (val, dev, Training) are found if only one fits. By default a folder's audio of all splits.
        audio_column, label_column: names of the columns; by default the first of the usual names. A manifest's audio
            column holds paths. An unused column called `audio` or `label` is renamed to `original_audio` or
            `original_label`.
        streaming: return an `IterableDataset`. Strings read from a stream stay strings: see `encode_labels`.
        config_name: configuration of a Hub or parquet data set.
        root: folder that a manifest's paths are relative to; by default the manifest's folder.
        labels_from_folders: label each file of a folder with the name of the first-level subfolder it is in; folders
            such as `_background_noise_` are left out.
        label_separator: of several labels in a cell of text, or "none" to keep all cells whole. By default found from
            the column, see [`~asit_hf.data.labels.find_lists`].
        names: class names that are known, to find the labels in such cells; other labels are no error.

    Labels become `ClassLabel`, or `List(ClassLabel)` if a row has several. The class names are sorted. Floating-point
    labels stay floats, for regression, unless all are whole.

    Raises:
        FileNotFoundError: no such file, folder or data set, or a folder without audio.
        ValueError: a missing column or split, a damaged manifest, an option that does not apply to this kind of data,
            or, with `labels_from_folders`, first-level folders that are splits or folds.
    """
    arguments = data, split, audio_column, label_column, streaming, config_name, root, labels_from_folders
    return load_with_names(*arguments, label_separator, names)[0]


def load_with_names(
    data: "str | os.PathLike | Dataset | IterableDataset",
    split: str | None = None,
    audio_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    config_name: str | None = None,
    root: str | os.PathLike | None = None,
    labels_from_folders: bool = False,
    label_separator: str | None = None,
    names: Sequence[str] | None = None,
    labels: bool = True,
) -> "tuple[Dataset | IterableDataset, dict[str, str]]":
    """
    As [`load_audio_dataset`], and the column `label` by the name that it has in the data, if that is another. With
    `labels=False`, labels are not looked for.
    """
    with extra("train"):
        from datasets import Audio, Dataset, IterableDataset

    options = {"split": split, "config_name": config_name, "root": root, "labels_from_folders": labels_from_folders}
    if isinstance(data, (Dataset, IterableDataset)):
        check_options("a loaded data set", options)
        dataset, name = data, "the data set"
    else:
        dataset, name = _open(data, audio_column, label_column, streaming, options), os.fspath(data)
    dataset = undecoded(dataset)
    columns = dataset.column_names or list(next(iter(dataset)))
    audio_column = find_column(columns, audio_column, AUDIO_COLUMNS, "audio", name)
    label_column = find_column(columns, label_column, LABEL_COLUMNS, "label", name) if labels else None
    dataset = _rename(dataset, columns, audio_column, "audio")
    dataset = _rename(dataset, columns, label_column, "label")
    # the type of a stream of tar files stays, and that of one without features
    if isinstance(dataset, Dataset) or not isinstance((dataset.features or {"audio": {}})["audio"], dict):
        dataset = dataset.cast_column("audio", Audio(decode=False))
    if isinstance(dataset, Dataset):
        if label_column is not None:
            dataset = encode_labels(divide_labels(dataset, names, label_separator, name))
        if streaming:
            dataset = dataset.to_iterable_dataset(num_shards=max(1, min(64, len(dataset))))
    return dataset, {} if label_column in (None, "label") else {label_column: "label"}


def load_unlabelled(specs: "list[str | dict] | str | dict", **defaults: Any) -> "Dataset | IterableDataset":
    """Load and join the audio of several data sets, without their labels.

    Args:
        specs: one or a list of: a path or name; or a dictionary (or its JSON) with the key `data`, any keyword of
            [`load_audio_dataset`] and `filter`, the conditions of [`~asit_hf.data.filters.filter_rows`].
        defaults: keywords for all data sets that do not set them.

    Returns:
        A `datasets.Dataset` with the column `audio`; with `streaming=True` an `IterableDataset`, one data set after
        another until `shuffle` mixes their shards.
    """
    from datasets import concatenate_datasets

    specs = specs if isinstance(specs, (list, tuple)) else [specs]
    if not specs:
        raise ValueError("expected at least one data set of audio, got none")
    loaded = [_load_spec(spec, defaults).select_columns("audio") for spec in specs]
    plain = [dataset.features["audio"] for dataset in loaded if isinstance(dataset.features["audio"], dict)]
    if plain:  # all streams must have the type of column that tar files have
        loaded = [dataset.cast_column("audio", plain[0]) for dataset in loaded]
    return concatenate_datasets(loaded)


def find_splits(data: str | os.PathLike) -> dict[str, Path | None]:
    """The splits of local data by name; none for a Hub data set, other files, and data without splits.

    Splits are first-level folders, if all of them have names of splits (train, val, Test, eval, ...); or manifests
    with such names in the folder (train.csv, test.csv), one of them for training; each with its path. Or they are the
    splits of a folder written by `save_to_disk`, of parquet files, or of a manifest's column `split`; each with None.
    """
    path = Path(data).expanduser()
    manifest = _metadata_file(path) or path
    if manifest.is_file() and manifest.suffix.lower() in (*MANIFEST_EXTENSIONS, ".txt"):
        names = Manifest(manifest).splits()
        if all(map(split_kind, names)) and "train" in map(split_kind, names):
            return dict.fromkeys(names)
    if (path / "dataset_dict.json").exists():
        return dict.fromkeys(json.loads((path / "dataset_dict.json").read_text())["splits"])
    if path.is_dir() and not (path / "state.json").exists():
        if _find_shards(path, ".parquet"):
            from datasets import load_dataset

            shards = load_dataset(str(path), streaming=True)
            return dict.fromkeys(shards) if len(shards) > 1 else {}
        return find_split_paths(path)
    return {}


def _open(
    data: str | os.PathLike, audio_column: str | None, label_column: str | None, streaming: bool, options: dict
) -> "Dataset | IterableDataset":
    from datasets import Dataset

    options = dict(options)
    found = find_input(data, options.pop("split"), options.pop("root"), options["labels_from_folders"])
    if found.kind == "saved":
        check_options("a saved data set", options)
        return _load_saved(Path(found.place), found.split)
    if found.kind == "manifest":
        check_options("a manifest", options, *(["labels_from_folders"] if found.folder else []))
        return load_manifest(found.place, found.split, audio_column, label_column, found.roots, found.inside)
    files = [join_path(found.place, name) for name in found.names]
    if found.kind == "audio" and not found.folder:
        check_options("one audio file", options)
    if found.kind == "audio":
        check_options("a folder of audio", options, "labels_from_folders")
        if options["labels_from_folders"]:
            return _load_classes(found)
        return Dataset.from_dict({"audio": [path_text(file) for file in files]})
    if found.kind == "tar":
        return _load_tars(files, streaming, options)
    check_options("a parquet or Hub data set", options, "config_name")
    name = found.folder or (found.place if found.kind == "hub" else files[0])
    dataset = _load_hub(found, options["config_name"], streaming)
    columns = dataset.column_names or []
    column = find_column(columns, audio_column, AUDIO_COLUMNS, "audio", name) if columns else None
    if found.kind == "hub" or getattr((dataset.features or {}).get(column), "dtype", None) not in _TEXT:
        return dataset
    if streaming:  # a table of paths is small
        dataset = _load_hub(found, options["config_name"], False)
    paths = resolve_paths(dataset[column][:], found.roots[0], name)
    return dataset.remove_columns(column).add_column(column, paths)


def _metadata_file(folder: Path) -> Path | None:
    """The manifest called `metadata` that describes the files of a folder."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def _load_hub(found: Input, config_name: str | None, streaming: bool) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, split = found.folder or found.place, found.split
    try:
        if found.kind == "hub" or (found.folder and not is_url(name)):
            loaded = load_dataset(name, config_name, streaming=streaming)
        else:
            names, split = (choose_shards(found), None) if found.folder else (found.names, split)
            files = [join_path(found.place, one) for one in names]
            name = files[0]
            loaded = load_dataset("parquet", config_name, data_files=files, streaming=streaming)
    except (FileNotFoundError, ConnectionError) as error:
        if found.kind != "hub":
            raise
        reason = f"{type(error).__name__}: {error}"
        raise FileNotFoundError(f"{name!r} is neither a local file or folder nor on the Hub ({reason})") from error
    except (OSError, ValueError, DatasetsError) as error:  # pyarrow's are of all kinds, and name no file
        if found.kind == "hub":
            raise
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"cannot read {name}, damaged or not of this format: {reason}") from error
    return _choose_split(loaded, split, name)


def _load_saved(path: Path, split: str | None) -> "Dataset":
    from datasets import Dataset, load_from_disk

    loaded = load_from_disk(str(path))
    if isinstance(loaded, Dataset):
        check_options("a saved data set without splits", {"split": split})
        return loaded
    return _choose_split(loaded, split, str(path))


def _choose_split(splits: dict[str, Any], split: str | None, name: str) -> Any:
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    found = None if split is None else match_split(split, splits)
    if found is None:
        raise ValueError(f"expected one of the splits of {name}, {', '.join(splits)}; got {split!r}")
    return splits[found]


def _load_classes(found: Input) -> "Dataset":
    from datasets import Dataset

    if is_url(found.folder):
        raise ValueError(f"expected class folders on this machine, got {found.folder}: copy it, or pass a manifest")
    folder = Path(found.folder)
    files = [Path(found.place, name) for name in found.names]
    if splits := find_split_paths(folder):
        example = next((path for name, path in splits.items() if split_kind(name) == "train"), folder)
        raise ValueError(
            f"expected class folders or a manifest in {folder}, got the splits {', '.join(splits)}: name one of them "
            f"(split, --train_split, ...), or pass one, such as {example}"
        )
    parts = [file.relative_to(folder).parts for file in files]
    if outside := [names[0] for names in parts if len(names) == 1]:
        got = f"{len(outside)} directly in it, first {outside[0]}"
        raise ValueError(f"expected every file in a class folder of {folder}, got {got}")
    kept = [row for row, names in enumerate(parts) if not names[0].startswith("_")]
    left_out = Counter(names[0] for names in parts if names[0].startswith("_"))
    if left_out:
        counts = ", ".join(f"{name} ({count} files)" for name, count in left_out.items())
        logger.warning("folders that begin with _ are no classes, left out of %s: %s", folder, counts)
    if not kept:
        raise ValueError(f"expected class folders in {folder}, got {', '.join(left_out)} only")
    check_class_folders(folder, [files[row] for row in kept])
    labels = [path_text(parts[row][0]).removeprefix("file:") for row in kept]
    return Dataset.from_dict({"audio": [path_text(files[row]) for row in kept], "label": labels})


def _find_shards(folder: Path, extension: str) -> list[Path]:
    """The files with `extension` below `folder`; none if there are audio files too, which take precedence."""
    files = walk(folder)
    if any(file.suffix.lower() in AUDIO_EXTENSIONS for file in files):
        return []
    return [file for file in files if file.suffix.lower() == extension]


def _load_tars(files: list[str], streaming: bool, options: dict) -> "IterableDataset":
    from datasets import Features, IterableDataset, Value

    check_options("tar files", options)
    if not streaming:
        raise ValueError(f"tar files can only be streamed: load {files[0]} with streaming=True")
    # not an Audio feature, which needs torchcodec in a stream of rows, even undecoded
    features = Features({"audio": {"bytes": Value("binary"), "path": Value("string")}})
    return IterableDataset.from_generator(_read_tars, features, gen_kwargs={"paths": files})


def _read_tars(paths: list[str]) -> Iterator[dict[str, Any]]:
    for path in paths:
        for name, content in read_tar(path):
            yield {"audio": {"bytes": content(), "path": path_text(f"{os.path.basename(path)}/{name}")}}


def _load_spec(spec: "str | dict", defaults: dict[str, Any]) -> "Dataset | IterableDataset":
    if isinstance(spec, str):
        spec = json.loads(spec) if spec.lstrip().startswith("{") else {"data": spec}
    options = {**defaults, **spec}
    if "data" not in options:
        raise ValueError(f"expected the key 'data' in the description of a data set, got {sorted(spec)}")
    filters = options.pop("filter", None) or []
    if not filters:  # the labels are not used
        options.setdefault("label_separator", NO_SEPARATOR)
    dataset, renamed = _load_all_splits(options)
    return filter_rows(dataset, [filters] if isinstance(filters, str) else filters, options["data"], renamed)


def _load_all_splits(options: dict[str, Any]) -> "tuple[Dataset | IterableDataset, dict[str, str]]":
    """The data of all splits if none is named; those of a folder of audio are read in one go anyway."""
    from datasets import concatenate_datasets

    path = Path(options["data"]).expanduser()
    found = find_splits(path) if path.is_dir() and not _metadata_file(path) and not options.get("split") else {}
    names = [name for name, path in found.items() if path is None]
    if not names:
        return load_with_names(**options)
    parts, renamed = zip(*(load_with_names(**{**options, "split": name}) for name in names))
    logger.info("audio of all splits of %s: %s", options["data"], ", ".join(names))
    return concatenate_datasets(parts), renamed[0]


def _rename(dataset: Any, columns: list[str], column: str | None, name: str) -> Any:
    if column is None or column == name:
        return dataset
    if name in columns:
        dataset = dataset.rename_column(name, f"original_{name}")
    return dataset.rename_column(column, name)
