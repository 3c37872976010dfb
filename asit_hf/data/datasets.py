"""Loading audio as Hugging Face `datasets`: folders, manifests, shards, saved and Hub data sets, streams."""

import json
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.extras import extra
from ..utils.names import path_text
from .formats import AUDIO_EXTENSIONS, LeftOut, why_left_out
from .labels import encode_labels
from .manifests import AUDIO_COLUMNS, LABEL_COLUMNS, MANIFEST_EXTENSIONS, find_column, load_manifest

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def load_audio_dataset(
    data: "str | os.PathLike | Dataset | IterableDataset",
    split: str | None = None,
    audio_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    config_name: str | None = None,
    root: str | os.PathLike | None = None,
    labels_from_folders: bool = False,
) -> "Dataset | IterableDataset":
    """Load audio as a column `audio` (`datasets.Audio(decode=False)`), with `label` if there are labels.

    Args:
        data: an audio file; a folder of audio files (searched recursively, sorted, without hidden files); a csv, tsv,
            json or jsonl manifest, or a folder with `metadata.csv` or `metadata.jsonl`; a parquet file or folder; a
            tar file or a folder of tar files (webdataset's layout; only the audio is read, as a stream); a folder
            written by `save_to_disk`; the name of a data set on the Hub; or a `datasets` object. Other columns stay.
        split: the split of a Hub, parquet or saved data set; for a manifest, the value of its `split` column; for a
            folder of audio, the subfolder.
        audio_column, label_column: names of the columns; by default the first of the usual names. A manifest's audio
            column holds paths. An unused column called `audio` or `label` is renamed to `original_audio` or
            `original_label`.
        streaming: return an `IterableDataset`. Strings read from a stream stay strings: see `encode_labels`.
        config_name: configuration of a Hub or parquet data set.
        root: folder that a manifest's paths are relative to; by default the manifest's folder.
        labels_from_folders: label each file of a folder with the name of the first-level subfolder it is in.

    Labels become `ClassLabel`, or `List(ClassLabel)` if a row has several: a list in json, "a;b" in csv. The class
    names are sorted. Floating-point labels stay floats, for regression.

    Raises:
        FileNotFoundError: no such file, folder or data set, or a folder without audio.
        ValueError: a missing column or split, a damaged manifest, or an option that does not apply to this kind of
            data.
    """
    with extra("train"):
        from datasets import Audio, Dataset, IterableDataset

    options = {"split": split, "config_name": config_name, "root": root, "labels_from_folders": labels_from_folders}
    if isinstance(data, (Dataset, IterableDataset)):
        _check_options("a loaded data set", options)
        dataset, name = data, "the data set"
    else:
        dataset, name = _open(data, audio_column, label_column, streaming, options), os.fspath(data)
    columns = dataset.column_names or list(next(iter(dataset)))
    audio_column = find_column(columns, audio_column, AUDIO_COLUMNS, "audio", name)
    label_column = find_column(columns, label_column, LABEL_COLUMNS, "label", name)
    dataset = _rename(dataset, columns, audio_column, "audio")
    dataset = _rename(dataset, columns, label_column, "label")
    if isinstance(dataset, Dataset) or not isinstance((dataset.features or {}).get("audio"), dict):  # not a tar stream
        dataset = dataset.cast_column("audio", Audio(decode=False))
    if isinstance(dataset, Dataset):
        if label_column is not None:
            dataset = encode_labels(dataset)
        if streaming:
            dataset = dataset.to_iterable_dataset(num_shards=max(1, min(64, len(dataset))))
    return dataset


def load_unlabelled(specs: "list[str | dict] | str | dict", **defaults: Any) -> "Dataset | IterableDataset":
    """Load and join the audio of several data sets, without their labels.

    Args:
        specs: one or a list of: a path or name; or a dictionary (or its JSON) with the key `data`, any keyword of
            [`load_audio_dataset`] and `filter`, the conditions of [`filter_rows`].
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


def filter_rows(dataset: Any, filters: Sequence[str]) -> Any:
    """The rows that match all filters, each `COLUMN=VALUE[,VALUE...]`; labels are compared by class name."""
    for condition in filters:
        column, separator, values = condition.partition("=")
        if not separator or not values:
            raise ValueError(f"expected a filter COLUMN=VALUE[,VALUE...], got {condition!r}")
        if column not in dataset.column_names:
            raise ValueError(f"expected a filter by one of the columns {dataset.column_names}, got {condition!r}")
        names = getattr(dataset.features[column], "names", None)
        wanted = set(values.split(","))
        dataset = dataset.filter(_matches, input_columns=column, fn_kwargs={"wanted": wanted, "names": names})
    return dataset


def find_audio_files(folder: str | os.PathLike) -> list[Path]:
    """All files below `folder` with one of `AUDIO_EXTENSIONS`, sorted, without hidden files.

    Raises:
        FileNotFoundError: no such folder, or no audio in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    files = _walk(folder)
    audio = [file for file in files if file.suffix.lower() in AUDIO_EXTENSIONS]
    left_out = LeftOut(folder)
    for file in files:
        if file.suffix.lower() not in AUDIO_EXTENSIONS:
            left_out.add(file.name, lambda file=file: file)
    left_out.report()
    if not audio:
        counts = Counter(file.suffix.lower() or "(no extension)" for file in files)
        found = ", ".join(f"{count} {extension}" for extension, count in sorted(counts.items())) or "no files at all"
        raise FileNotFoundError(f"no audio in {folder}: expected {' '.join(AUDIO_EXTENSIONS)}, got {found}")
    return audio


def _open(
    data: str | os.PathLike, audio_column: str | None, label_column: str | None, streaming: bool, options: dict
) -> "Dataset | IterableDataset":
    from datasets import Dataset

    path, split = Path(data).expanduser(), options["split"]
    if path.is_dir():
        manifests = [file for file in (path / "metadata.csv", path / "metadata.jsonl") if file.exists()]
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            _check_options("a saved data set", options, "split")
            return _load_saved(path, split)
        if manifests and not options["labels_from_folders"]:
            path = manifests[0]
        elif tars := _find_shards(path, ".tar"):
            return _load_tars(tars, streaming, options)
        elif not _find_shards(path, ".parquet"):
            _check_options("a folder of audio", options, "split", "labels_from_folders")
            return _load_folder(path, split, options["labels_from_folders"])
    extension = path.suffix.lower()
    if path.is_file() and extension in MANIFEST_EXTENSIONS:
        _check_options("a manifest", options, "split", "root")
        return load_manifest(path, split, audio_column, label_column, Path(options["root"] or path.parent))
    if path.is_file() and extension in AUDIO_EXTENSIONS:
        _check_options("one audio file", options)
        return Dataset.from_dict({"audio": [path_text(path)]})
    if path.is_file() and extension == ".tar":
        return _load_tars([path], streaming, options)
    if path.is_file() and extension != ".parquet":
        expected = " ".join((*AUDIO_EXTENSIONS, *MANIFEST_EXTENSIONS, ".parquet", ".tar"))
        reason = why_left_out(extension, lambda: path)
        raise ValueError(f"expected a file with one of the extensions {expected}; got {path}: {reason or 'no audio'}")
    _check_options("a parquet or Hub data set", options, "split", "config_name")
    if not path.exists() and not _HUB_NAME.fullmatch(os.fspath(data)):
        raise FileNotFoundError(f"no such file or folder: {path}")
    return _load_hub(os.fspath(data), path, options["config_name"], split, streaming)


def _load_hub(name: str, path: Path, config_name: str | None, split: str | None, streaming: bool) -> Any:
    from datasets import load_dataset

    try:
        if path.is_file():
            loaded = load_dataset("parquet", config_name, data_files=str(path), streaming=streaming)
        else:
            loaded = load_dataset(str(path) if path.exists() else name, config_name, streaming=streaming)
    except (FileNotFoundError, ConnectionError) as error:
        if path.exists():
            raise
        reason = f"{type(error).__name__}: {error}"
        raise FileNotFoundError(f"{name!r} is neither a local file or folder nor on the Hub ({reason})") from error
    return _choose_split(loaded, split, name)


def _load_saved(path: Path, split: str | None) -> "Dataset":
    from datasets import Dataset, load_from_disk

    loaded = load_from_disk(str(path))
    if isinstance(loaded, Dataset):
        _check_options("a saved data set without splits", {"split": split})
        return loaded
    return _choose_split(loaded, split, str(path))


def _choose_split(splits: dict[str, Any], split: str | None, name: str) -> Any:
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split not in splits:
        raise ValueError(f"expected one of the splits of {name}, {', '.join(splits)}; got {split!r}")
    return splits[split]


def _load_folder(folder: Path, split: str | None, labels_from_folders: bool) -> "Dataset":
    from datasets import Dataset

    if split is not None:
        if not (folder / split).is_dir():
            found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
            raise ValueError(f"no split {split!r} in {folder}: expected one of its subfolders {found}")
        folder = folder / split
    files = find_audio_files(folder)
    columns: dict[str, list] = {"audio": [path_text(file) for file in files]}
    if labels_from_folders:
        outside = [file for file in files if file.parent == folder]
        if outside:
            got = f"{len(outside)} directly in it, first {outside[0].name}"
            raise ValueError(f"expected every file in a class folder of {folder}, got {got}")
        columns["label"] = [path_text(file.relative_to(folder).parts[0]).removeprefix("file:") for file in files]
    return Dataset.from_dict(columns)


def _walk(folder: Path) -> list[Path]:
    """All files below `folder`, sorted, without hidden ones. Links to folders are followed, each folder once."""
    files, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and real not in seen)
        files += [Path(parent, name) for name in names if not name.startswith(".") and real not in seen]
        seen.add(real)
    return sorted(files)


def _find_shards(folder: Path, extension: str) -> list[Path]:
    """The files with `extension` below `folder`; none if there are audio files too, which take precedence."""
    files = _walk(folder)
    if any(file.suffix.lower() in AUDIO_EXTENSIONS for file in files):
        return []
    return [file for file in files if file.suffix.lower() == extension]


def _load_tars(files: list[Path], streaming: bool, options: dict) -> "IterableDataset":
    from datasets import Features, IterableDataset, Value

    _check_options("tar files", options)
    if not streaming:
        raise ValueError(f"tar files can only be streamed: load {files[0]} with streaming=True")
    # not an Audio feature, which needs torchcodec in a stream of rows, even undecoded
    features = Features({"audio": {"bytes": Value("binary"), "path": Value("string")}})
    return IterableDataset.from_generator(_read_tars, features, gen_kwargs={"paths": [str(file) for file in files]})


def _read_tars(paths: list[str]) -> Iterator[dict[str, Any]]:
    for path in paths:
        left_out = LeftOut(path)
        try:
            with tarfile.open(path, "r|*") as archive:
                for member in archive:
                    if member.isfile() and Path(member.name).suffix.lower() in AUDIO_EXTENSIONS:
                        name = path_text(f"{os.path.basename(path)}/{member.name}")
                        yield {"audio": {"bytes": archive.extractfile(member).read(), "path": name}}
                    elif member.isfile():
                        left_out.add(member.name, lambda member=member: archive.extractfile(member).read())
        except tarfile.TarError as error:
            raise ValueError(f"cannot read {path}: damaged or truncated tar file ({error})") from error
        left_out.report()


def _load_spec(spec: "str | dict", defaults: dict[str, Any]) -> "Dataset | IterableDataset":
    if isinstance(spec, str):
        spec = json.loads(spec) if spec.lstrip().startswith("{") else {"data": spec}
    options = {**defaults, **spec}
    if "data" not in options:
        raise ValueError(f"expected the key 'data' in the description of a data set, got {sorted(spec)}")
    filters = options.pop("filter", None) or []
    dataset = load_audio_dataset(**options)
    kept = filter_rows(dataset, [filters] if isinstance(filters, str) else filters)
    if filters and hasattr(kept, "__len__") and len(kept) == 0:
        raise ValueError(f"no row of {spec} matches its filter {filters}")
    return kept


def _matches(value: Any, wanted: set[str], names: list[str] | None) -> bool:
    return str(names[value] if names is not None else value) in wanted


def _rename(dataset: Any, columns: list[str], column: str | None, name: str) -> Any:
    if column is None or column == name:
        return dataset
    if name in columns:
        dataset = dataset.rename_column(name, f"original_{name}")
    return dataset.rename_column(column, name)


def _check_options(kind: str, options: dict[str, Any], *allowed: str) -> None:
    given = [name for name, value in options.items() if value and name not in allowed]
    if given:
        raise ValueError(f"{' and '.join(given)} cannot be used with {kind}")
