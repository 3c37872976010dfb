"""Audio data sets as Hugging Face `datasets` objects: folders, manifests, shards, saved and Hub sets, streaming."""

import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.extras import extra
from .labels import encode_labels
from .manifests import _AUDIO_COLUMNS, _LABEL_COLUMNS, _MANIFEST_EXTENSIONS, find_column, load_manifest

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

AUDIO_EXTENSIONS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64")
_UNREADABLE_EXTENSIONS = (".aac", ".ac3", ".amr", ".ape", ".m4a", ".m4b", ".mp4", ".mka", ".webm", ".wma", ".wv")
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
    audio_column = find_column(columns, audio_column, _AUDIO_COLUMNS, "audio", name)
    label_column = find_column(columns, label_column, _LABEL_COLUMNS, "label", name)
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
    from datasets import Dataset

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
        return load_manifest(path, split, audio_column, label_column, Path(root) if root else path.parent)
    if path.is_file() and extension in AUDIO_EXTENSIONS:
        _refuse(
            "one audio file", split=split, config_name=config_name, root=root, labels_from_folders=labels_from_folders
        )
        return Dataset.from_dict({"audio": [str(path)]})
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
    from datasets import Dataset

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
