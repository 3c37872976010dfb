"""Audio data sets as Hugging Face `datasets` objects: folders, manifests, shards, saved and Hub sets, streaming."""

import csv
import json
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..extras import extra
from .audio import source_name

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

AUDIO_EXTENSIONS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64")
_UNREADABLE_EXTENSIONS = (".aac", ".ac3", ".amr", ".ape", ".m4a", ".m4b", ".mp4", ".mka", ".webm", ".wma", ".wv")
_MANIFEST_EXTENSIONS = (".csv", ".tsv", ".json", ".jsonl")
_AUDIO_COLUMNS = ("audio", "file", "path", "filename", "file_name", "filepath", "file_path", "audio_path", "wav")
_LABEL_COLUMNS = ("label", "labels", "class", "category", "target")
_GROUP_COLUMNS = ("speaker", "speaker_id", "src_file", "source", "source_id", "recording", "recording_id", "fold")
_LABEL_SEPARATOR = ";"
_INTEGER = re.compile(r"-?(0|[1-9]\d*)")
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def load_audio_dataset(
    source: "str | os.PathLike | Dataset | IterableDataset",
    split: str | None = None,
    audio_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    config_name: str | None = None,
    root: str | os.PathLike | None = None,
    labels_from_folders: bool = False,
) -> "Dataset | IterableDataset":
    """Load audio from wherever it lies, with columns `audio` (`datasets.Audio(decode=False)`), `label` where there are
    labels, and every other column as it was.

    Args:
        source: an audio file; a folder of audio files (searched recursively, sorted; names that begin with a dot are
            left out); a csv, tsv, json or jsonl manifest, or a folder with `metadata.csv` or `metadata.jsonl`; a
            parquet file or folder; a tar file or a folder of them (webdataset's layout, of which the audio alone is
            read, as a stream); a folder written by `save_to_disk`; the name of a data set on the Hub; or a `datasets`
            object.
        split: of a Hub, parquet or saved data set: the split; of a manifest: rows whose `split` column says so; of a
            folder of audio: the subfolder.
        audio_column, label_column: the columns to take; by default the first of the usual names. A manifest's audio
            column holds paths. A column already called `audio` or `label` is kept as `original_audio`,
            `original_label`.
        streaming: return an `IterableDataset`. Strings read from a stream stay strings: see `encode_labels`.
        config_name: of a Hub or parquet data set.
        root: the folder that a manifest's paths are relative to (default: the manifest's own).
        labels_from_folders: label each file of a folder with the name of the first-level folder it is in.

    Labels become `ClassLabel`, or `List(ClassLabel)` where a row has several: a list in json, "a;b" in csv. The class
    names are sorted. Floating-point labels stay floats, for regression.

    Raises:
        FileNotFoundError: no such file, folder or data set, or a folder without audio.
        ValueError: a missing column or split, a damaged manifest, or an option that this kind of source does not have.
    """
    with extra("train"):
        from datasets import Audio, Dataset, IterableDataset

    if isinstance(source, (Dataset, IterableDataset)):
        _refuse(
            "a loaded data set",
            split=split,
            config_name=config_name,
            root=root,
            labels_from_folders=labels_from_folders,
        )
        dataset, name = source, "the data set"
    else:
        dataset = _open_source(
            source, split, audio_column, label_column, streaming, config_name, root, labels_from_folders
        )
        name = os.fspath(source)
    columns = dataset.column_names or list(next(iter(dataset)))
    audio_column = _find_column(columns, audio_column, _AUDIO_COLUMNS, "audio", name)
    label_column = _find_column(columns, label_column, _LABEL_COLUMNS, "label", name)
    dataset = _rename(dataset, columns, audio_column, "audio")
    dataset = _rename(dataset, columns, label_column, "label")
    if not _is_tar_stream(dataset):
        dataset = dataset.cast_column("audio", Audio(decode=False))
    if isinstance(dataset, Dataset):
        if label_column is not None:
            dataset = encode_labels(dataset)
        if streaming:
            dataset = dataset.to_iterable_dataset(num_shards=max(1, min(64, len(dataset))))
    return dataset


def find_audio_files(folder: str | os.PathLike) -> list[Path]:
    """All files below `folder` with one of `AUDIO_EXTENSIONS`, sorted; names that begin with a dot are left out.

    Raises:
        FileNotFoundError: no such folder, or no audio in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    files = _walk(folder)
    audio = [file for file in files if file.suffix.lower() in AUDIO_EXTENSIONS]
    others = Counter(file.suffix.lower() or "(no extension)" for file in files) - Counter(
        file.suffix.lower() for file in audio
    )
    if not audio:
        found = ", ".join(f"{count} {extension}" for extension, count in sorted(others.items())) or "no files at all"
        raise FileNotFoundError(f"no audio in {folder}: looked for {' '.join(AUDIO_EXTENSIONS)}, found {found}")
    unreadable = {extension: others[extension] for extension in _UNREADABLE_EXTENSIONS if others[extension]}
    if unreadable:
        logger.warning("%s holds audio that cannot be read, left out (files by extension): %s", folder, unreadable)
    return audio


def label_names(dataset: "Dataset | IterableDataset") -> list[str]:
    """The class names of the `label` column, by class id."""
    names = _class_names((dataset.features or {}).get("label"))
    if names is None:
        columns = dataset.column_names
        raise ValueError(f"expected a label column with class names (see encode_labels), got the columns {columns}")
    return names


def encode_labels(
    dataset: "Dataset | IterableDataset", names: Sequence[str] | None = None
) -> "Dataset | IterableDataset":
    """Turn the `label` column into class ids: `ClassLabel`, or `List(ClassLabel)` where it holds lists.

    Args:
        dataset: with `label` strings, integers (which stand for the class of that name, "7"), class ids, or lists of
            them.
        names: the class names by id, as a model has them; by default those of the data set, sorted. A stream needs
            them.

    Raises:
        ValueError: a label that is not among `names`, with its place; no label column; a stream without `names`.
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
        names = _sorted_names({name for label in labels for name in (label if isinstance(label, list) else [label])})
    multiple = any(isinstance(label, list) for label in labels)

    def place(row: int) -> str:
        return f"row {row} ({source_name(dataset[row]['audio'])})"

    ids = _class_ids(labels, names, place)
    return dataset.remove_columns("label").add_column("label", ids, feature=_label_feature(names, multiple))


def find_group_column(dataset: "Dataset") -> str | None:
    """The first of the usual columns (speaker, source file, recording, fold) that tells at least two groups apart."""
    for column in _GROUP_COLUMNS:
        if column in dataset.column_names and len(set(dataset[column][:])) > 1:
            return column
    return None


def split_dataset(
    dataset: "Dataset", test_fraction: float, seed: int = 0, group_column: str | None = None, stratify: bool = True
) -> "tuple[Dataset, Dataset]":
    """Split into (train, test), the same way for the same rows and seed.

    Args:
        dataset: rows, with `label` where `stratify` is to have an effect.
        test_fraction: aim for the test part, between 0 and 1; whole groups move, so the share is approximate.
        seed: of the draw.
        group_column: rows with the same value here stay on one side. By default `find_group_column`; "" splits by row.
        stratify: keep each label's share alike on both sides, as far as the groups allow.

    Raises:
        ValueError: one side would be empty, or no such column.
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"expected a test_fraction between 0 and 1, got {test_fraction}")
    if group_column is None:
        group_column = find_group_column(dataset)
    if group_column and group_column not in dataset.column_names:
        raise ValueError(f"no column {group_column!r} to split by, there are {dataset.column_names}")
    groups = dataset[group_column][:] if group_column else list(range(len(dataset)))
    labels = dataset["label"][:] if stratify and "label" in dataset.column_names else [None] * len(dataset)
    test_groups = _draw_test_groups(groups, labels, test_fraction, seed)
    in_test = np.array([group in test_groups for group in groups], dtype=bool)
    if in_test.all() or not in_test.any():
        by = f"{len(set(groups))} groups of column {group_column!r}" if group_column else f"{len(groups)} rows"
        raise ValueError(f"cannot put {test_fraction:.0%} of {by} aside: one side would be empty")
    logger.info("split by %s: %d train, %d test rows", group_column or "row", (~in_test).sum(), in_test.sum())
    return dataset.select(np.flatnonzero(~in_test)), dataset.select(np.flatnonzero(in_test))


def _open_source(
    source: str | os.PathLike,
    split: str | None,
    audio_column: str | None,
    label_column: str | None,
    streaming: bool,
    config_name: str | None,
    root: str | os.PathLike | None,
    labels_from_folders: bool,
) -> "Dataset | IterableDataset":
    path = Path(source).expanduser()
    if path.is_dir():
        manifest = next(
            (path / f"metadata{ext}" for ext in (".csv", ".jsonl") if (path / f"metadata{ext}").exists()), None
        )
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            _refuse("a saved data set", config_name=config_name, root=root, labels_from_folders=labels_from_folders)
            return _load_saved(path, split)
        if manifest is not None and not labels_from_folders:
            path = manifest
        elif tars := _find_shards(path, ".tar"):
            _refuse(
                "tar files", split=split, config_name=config_name, root=root, labels_from_folders=labels_from_folders
            )
            return _load_tars(tars, streaming)
        elif not _find_shards(path, ".parquet"):
            _refuse("a folder of audio", config_name=config_name, root=root)
            return _load_folder(path, split, labels_from_folders)
    extension = path.suffix.lower()
    if path.is_file() and extension in _MANIFEST_EXTENSIONS:
        _refuse("a manifest", config_name=config_name, labels_from_folders=labels_from_folders)
        return _load_manifest(path, split, audio_column, label_column, Path(root) if root else path.parent)
    if path.is_file() and extension in AUDIO_EXTENSIONS:
        _refuse(
            "one audio file", split=split, config_name=config_name, root=root, labels_from_folders=labels_from_folders
        )
        return _from_columns({"audio": [str(path)]})
    if path.is_file() and extension == ".tar":
        _refuse("a tar file", split=split, config_name=config_name, root=root, labels_from_folders=labels_from_folders)
        return _load_tars([path], streaming)
    if path.is_file() and extension != ".parquet":
        expected = " ".join((*AUDIO_EXTENSIONS, *_MANIFEST_EXTENSIONS, ".parquet", ".tar"))
        raise ValueError(f"cannot tell what {path} is: expected a file with one of the extensions {expected}")
    _refuse("a parquet or Hub data set", root=root, labels_from_folders=labels_from_folders)
    if not path.exists() and not _HUB_NAME.fullmatch(os.fspath(source)):
        raise FileNotFoundError(f"no such file or folder: {path}")
    return _load_hub(os.fspath(source), path, config_name, split, streaming)


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
        raise FileNotFoundError(
            f"{name!r} is neither a local file or folder ({path.absolute()} does not exist) nor a data set on the Hub "
            f"({type(error).__name__}: {error})"
        ) from error
    return _choose_split(loaded, split, name)


def _load_saved(path: Path, split: str | None) -> "Dataset":
    from datasets import Dataset, load_from_disk

    loaded = load_from_disk(str(path))
    if isinstance(loaded, Dataset):
        _refuse("a saved data set without splits", split=split)
        return loaded
    return _choose_split(loaded, split, str(path))


def _choose_split(splits: dict[str, Any], split: str | None, name: str) -> Any:
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split not in splits:
        got = "none was named" if split is None else f"got {split!r}"
        raise ValueError(f"expected one of the splits of {name}, {', '.join(splits)}; {got}")
    return splits[split]


def _load_folder(folder: Path, split: str | None, labels_from_folders: bool) -> "Dataset":
    if split is not None:
        if not (folder / split).is_dir():
            found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
            raise ValueError(f"no split {split!r} in {folder}: expected a subfolder of that name, found {found}")
        folder = folder / split
    files = find_audio_files(folder)
    columns: dict[str, list] = {"audio": [str(file) for file in files]}
    if labels_from_folders:
        outside = [file for file in files if file.parent == folder]
        if outside:
            raise ValueError(
                f"labels_from_folders expects every file in a class folder of {folder}, "
                f"{len(outside)} lie directly in it, first {outside[0].name}"
            )
        columns["label"] = [file.relative_to(folder).parts[0] for file in files]
    return _from_columns(columns)


def _load_manifest(
    path: Path, split: str | None, audio_column: str | None, label_column: str | None, root: Path
) -> "Dataset":
    columns = _read_table(path) if path.suffix.lower() in (".csv", ".tsv") else _read_json(path)
    rows = len(next(iter(columns.values()), []))
    if rows == 0:
        raise ValueError(f"no rows in {path}")
    if split is not None:
        if "split" not in columns:
            raise ValueError(
                f"no split {split!r} in {path}: expected a column 'split', its columns are {list(columns)}"
            )
        kept = [row for row in range(rows) if columns["split"][row] == split]
        if not kept:
            raise ValueError(f"no split {split!r} in {path}, its splits are {sorted(set(columns['split']), key=str)}")
        columns = {name: [values[row] for row in kept] for name, values in columns.items()}
    audio = _find_column(columns, audio_column, _AUDIO_COLUMNS, "audio", str(path))
    label = _find_column(columns, label_column, _LABEL_COLUMNS, "label", str(path))
    columns[audio] = _resolve_paths(columns[audio], root, path)
    if label is not None and any(isinstance(value, str) and _LABEL_SEPARATOR in value for value in columns[label]):
        columns[label] = [_split_labels(value) for value in columns[label]]
    return _from_columns(columns)


def _read_table(path: Path) -> dict[str, list]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        rows = []
        for row in reader:
            if None in row:
                raise ValueError(f"line {reader.line_num} of {path} has more fields than its header")
            rows.append(row)
        return {name: _typed([row[name] for row in rows]) for name in reader.fieldnames or []}


def _read_json(path: Path) -> dict[str, list]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is neither a json list of rows nor one json object a line: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"expected every row of {path} to be a json object with named columns")
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def _typed(values: list[str | None]) -> list:
    """Numbers where all values are; "007" is a name. An empty field is None."""
    values = [value or None for value in values]
    present = [value for value in values if value is not None]
    for pattern, convert in ((_INTEGER, int), (_NUMBER, float)):
        if present and all(pattern.fullmatch(value) for value in present):
            return [None if value is None else convert(value) for value in values]
    return values


def _split_labels(value: Any) -> list[str]:
    return [] if value is None else [name.strip() for name in str(value).split(_LABEL_SEPARATOR) if name.strip()]


def _resolve_paths(values: list, root: Path, manifest: Path) -> list[str]:
    paths = []
    for row, value in enumerate(values):
        if not isinstance(value, (str, int)):
            raise ValueError(f"expected a path in row {row} of {manifest}, got {value!r}")
        paths.append(str(value) if "://" in str(value) else os.path.join(root, str(value)))
    first = [path for path in paths[:20] if "://" not in path]
    if first and not any(os.path.exists(path) for path in first):
        raise FileNotFoundError(
            f"none of the first {len(first)} files of {manifest} exists, for instance {first[0]}: "
            "set root to the folder that its paths are relative to"
        )
    return paths


def _from_columns(columns: dict[str, list]) -> "Dataset":
    from datasets import Dataset

    return Dataset.from_dict(columns)


def _walk(folder: Path) -> list[Path]:
    """All files below `folder`, sorted, through links to folders too (each folder once), without dot files."""
    files, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if real not in seen else []
        if real not in seen:
            files += [Path(parent, name) for name in names if not name.startswith(".")]
        seen.add(real)
    return sorted(files)


def _find_shards(folder: Path, extension: str) -> list[Path]:
    """The files with `extension` below `folder`; none where there is audio too, which is what is meant then."""
    files = _walk(folder)
    if any(file.suffix.lower() in AUDIO_EXTENSIONS for file in files):
        return []
    return [file for file in files if file.suffix.lower() == extension]


def _load_tars(files: list[Path], streaming: bool) -> "IterableDataset":
    from datasets import Features, IterableDataset, Value

    if not streaming:
        raise ValueError(f"tar files are read one after another: load {files[0]} with streaming=True")
    # Not an Audio feature: that of a stream of rows needs torchcodec, even undecoded.
    features = Features({"audio": {"bytes": Value("binary"), "path": Value("string")}})
    return IterableDataset.from_generator(_read_tars, features, gen_kwargs={"paths": [str(file) for file in files]})


def _read_tars(paths: list[str]) -> Iterator[dict[str, Any]]:
    for path in paths:
        try:
            with tarfile.open(path, "r|*") as archive:
                for member in archive:
                    if member.isfile() and Path(member.name).suffix.lower() in AUDIO_EXTENSIONS:
                        name = f"{os.path.basename(path)}/{member.name}"
                        yield {"audio": {"bytes": archive.extractfile(member).read(), "path": name}}
        except tarfile.TarError as error:
            raise ValueError(f"cannot read {path}: damaged or truncated tar file ({error})") from error


def _is_tar_stream(dataset: Any) -> bool:
    return not hasattr(dataset, "__len__") and isinstance((dataset.features or {}).get("audio"), dict)


def _find_column(
    columns: Iterable[str], wanted: str | None, usual: tuple[str, ...], kind: str, source: str
) -> str | None:
    columns = list(columns)
    if wanted is not None:
        if wanted not in columns:
            raise ValueError(f"no {kind} column {wanted!r} in {source}: its columns are {', '.join(columns)}")
        return wanted
    found = next((name for name in usual if name in columns), None)
    if found is None and kind == "audio":
        expected = ", ".join(usual)
        raise ValueError(f"no audio column in {source}: name one of {', '.join(columns)} (looked for {expected})")
    return found


def _rename(dataset: Any, columns: list[str], column: str | None, name: str) -> Any:
    if column is None or column == name:
        return dataset
    if name in columns:
        dataset = dataset.rename_column(name, f"original_{name}")
    return dataset.rename_column(column, name)


def _refuse(kind: str, **options: Any) -> None:
    given = [name for name, value in options.items() if value]
    if given:
        raise ValueError(f"{' and '.join(given)} cannot be used with {kind}")


def _class_names(feature: Any) -> list[str] | None:
    feature = getattr(feature, "feature", feature)
    names = getattr(feature, "names", None)
    return None if names is None else list(names)


def _label_feature(names: Sequence[str], multiple: bool) -> Any:
    from datasets import ClassLabel, List

    label = ClassLabel(names=list(names))
    return List(label) if multiple else label


def _sorted_names(names: Iterable[str | None]) -> list[str]:
    known = [name for name in names if name is not None]
    numeric = all(_INTEGER.fullmatch(name) for name in known)
    return sorted(known, key=int) if numeric else sorted(known)


def _as_strings(label: Any, names: list[str] | None) -> Any:
    """A label, or a list of them, as class names; None stays None."""
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
                raise ValueError(f"unknown label {name!r} in {place(row)}; the known labels are {_shortened(names)}")
        encoded.append([ids[name] for name in label] if isinstance(label, list) else ids.get(label))
    return encoded


def _encode_stream(dataset: "IterableDataset", names: Sequence[str] | None, own_names: list[str] | None) -> Any:
    import pyarrow
    from datasets import Features

    if names is None:
        raise ValueError("the labels of a stream are not known beforehand: pass names")
    if dataset.features is None:
        raise ValueError("expected a stream with known features, to tell labels from lists of labels")
    multiple = hasattr(dataset.features["label"], "feature")
    features = Features({**dataset.features, "label": _label_feature(names, multiple)})

    # Tables, not rows: encoding rows with an Audio column needs torchcodec.
    def encode(table: "pyarrow.Table") -> "pyarrow.Table":
        labels = [_as_strings(label, own_names) for label in table["label"].to_pylist()]
        ids = _class_ids(labels, names, lambda row: f"the file {source_name(table['audio'][row].as_py())}")
        column = table.schema.get_field_index("label")
        return table.set_column(column, "label", pyarrow.array(ids, type=features.arrow_schema.field("label").type))

    return dataset.with_format("arrow").map(encode, batched=True, features=features).with_format(None)


def _shortened(names: Sequence[str], limit: int = 60) -> str:
    shown = ", ".join(names[:limit])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > limit else shown


def _draw_test_groups(groups: Sequence[Hashable], labels: Sequence[Any], fraction: float, seed: int) -> set[Hashable]:
    """Groups for the test side: first those that bring each label nearer to its share, then, where the total is still
    short, those that disturb the shares least."""
    counts: dict[Hashable, Counter] = {}
    for group, label in zip(groups, labels):
        counts.setdefault(group, Counter()).update(label if isinstance(label, list) else [label])
    sizes = Counter(groups)
    totals = sum(counts.values(), Counter())
    order = sorted(counts, key=lambda group: (str(type(group)), group))
    np.random.default_rng(seed).shuffle(order)
    taken: Counter = Counter()
    rows, chosen = 0, set()

    def cost(group: Hashable) -> float:
        change = 0.0
        for label, count in counts[group].items():
            missing = fraction * totals[label] - taken[label]
            change += (missing - count) ** 2 - missing**2
        return change

    def take(group: Hashable) -> None:
        nonlocal rows
        taken.update(counts[group])
        chosen.add(group)
        rows += sizes[group]

    for group in order:
        if cost(group) < 0:
            take(group)
    aim = fraction * len(groups)
    rest = [group for group in order if group not in chosen]
    while rest and rows < aim:
        best = min(rest, key=cost)
        if abs(rows + sizes[best] - aim) >= aim - rows and chosen:
            break
        take(best)
        rest.remove(best)
    return chosen
