"""What a path, URL or name of data means: files of audio, a manifest, shards, or a saved or Hub data set."""

import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from ..utils.names import local_path, path_text
from ..utils.urls import is_url, list_url, split_url, url_path, url_size
from .files import join_path, walk_names
from .formats import AUDIO_EXTENSIONS, LeftOut, why_left_out
from .manifests import MANIFEST_EXTENSIONS, Manifest
from .splits import match_split, split_kind, split_paths

logger = logging.getLogger(__name__)

_OTHER_FILES = dict.fromkeys((".xlsx", ".xls", ".ods"), "save the table as csv")
_OTHER_FILES |= dict.fromkeys((".gz", ".zip", ".7z", ".bz2", ".xz", ".tgz"), "unpack it")
_KINDS = dict.fromkeys(AUDIO_EXTENSIONS, "audio") | dict.fromkeys(MANIFEST_EXTENSIONS, "manifest")
_KINDS |= {".parquet": "parquet", ".tar": "tar"}
_FILES = (*AUDIO_EXTENSIONS, *MANIFEST_EXTENSIONS, ".txt", ".parquet", ".tar")
_SHARD_NUMBER = re.compile(r"[-_.]\d+([-_]of[-_]\d+)?$")
METADATA = tuple(f"metadata{extension}" for extension in (*MANIFEST_EXTENSIONS, ".parquet"))
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Input:
    """What was found.

    Attributes:
        kind: "audio" or "tar" or "parquet" (files), "manifest", "saved" (by `save_to_disk`) or "hub".
        place: folder of the files, the manifest, or the name on the Hub.
        names: of files, relative to `place`.
        folder: in which the files were found; None of a single file.
        split: yet to be chosen from the rows of a manifest, from parquet files or from a data set.
        roots: folders that the paths of a manifest may be relative to; the first one in which all files are.
        inside: folder in which the files of a manifest have to be.
    """

    kind: str
    place: str
    names: Sequence[str] = ()
    folder: str | None = None
    split: str | None = None
    roots: tuple[str, ...] = ()
    inside: str | None = None


def find_input(
    data: str | os.PathLike,
    split: str | None = None,
    root: str | os.PathLike | None = None,
    labels_from_folders: bool = False,
) -> Input:
    """Find out what `data` is; arguments as in [`~asit_hf.data.datasets.load_audio_dataset`].

    Raises:
        FileNotFoundError: no such file, folder or URL, or a folder without audio.
        ValueError: no such split, an option that does not apply, or a file of another kind.
    """
    text = os.fspath(data)
    place = text if is_url(text) else os.path.expanduser(local_path(text))
    root = None if root is None else os.fspath(root)
    if is_url(place):
        names = None if _extension(place) in _FILES else list_url(place)
        if names is None:
            url_size(place)
            return _find_file(place, split, root)
        return _find_in_folder(place, names, split, root, not labels_from_folders)
    if os.path.isdir(place):
        return _find_in_folder(place, walk_names(place), split, root, not labels_from_folders)
    if os.path.isfile(place):
        return _find_file(place, split, root)
    if not _HUB_NAME.fullmatch(text):
        raise FileNotFoundError(f"no such file or folder: {path_text(place)}")
    check_options("a Hub data set", {"root": root})
    return Input("hub", text, split=split)


def find_audio_files(folder: str | os.PathLike) -> list[Path]:
    """All files below `folder` with one of `AUDIO_EXTENSIONS`, sorted, without hidden files.

    Raises:
        FileNotFoundError: no such folder, or no audio in it.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no such folder: {folder}")
    by_kind = defaultdict(list)
    for name in walk_names(folder):
        by_kind[_KINDS.get(_extension(name))].append(name)
    _report_others(os.fspath(folder), by_kind)
    return [Path(folder) / name for name in by_kind["audio"]]


def choose_shards(found: Input) -> Sequence[str]:
    """The parquet files of a split, by their names: `data/train-00000-of-00002.parquet`, `train/0.parquet`."""
    splits: dict[str, list[str]] = {}
    for name in found.names:
        *folders, stem = Path(name).with_suffix("").parts
        candidates = (_SHARD_NUMBER.sub("", stem), *reversed(folders))
        split = next((one for one in candidates if split_kind(one) or one == found.split), "")
        splits.setdefault(split, []).append(name)
    if set(splits) == {""}:  # as `datasets` calls it
        splits = {"train": splits[""]}
    if found.split is None and len(splits) == 1:
        return found.names
    chosen = None if found.split is None else match_split(found.split, splits)
    if chosen is None:
        named = ", ".join(filter(None, splits)) or "none"
        raise ValueError(f"expected one of the splits of {found.place}, {named}; got {found.split!r}")
    return splits[chosen]


def check_options(kind: str, options: dict[str, Any], *allowed: str) -> None:
    """Refuse options that have a value and no effect on this `kind` of data."""
    given = [name for name, value in options.items() if value and name not in allowed]
    if given:
        raise ValueError(f"{' and '.join(given)} cannot be used with {kind}")


def _find_file(place: str, split: str | None, root: str | None) -> Input:
    folder, name = split_url(place) if is_url(place) else os.path.split(place)
    extension, roots = _extension(place), (root or folder,)
    if extension in (*MANIFEST_EXTENSIONS, ".txt"):
        return Input("manifest", place, split=split, roots=roots)
    if is_url(place) and "?" in place:  # which a folder and a name cannot hold
        folder, name = "", place
    if extension == ".parquet":
        return Input("parquet", folder, [name], split=split, roots=roots)
    if extension not in _FILES:
        reason = _OTHER_FILES.get(extension) or why_left_out(extension, lambda: place) or "no audio"
        raise ValueError(f"expected a file with one of the extensions {' '.join(_FILES)}; got {place}: {reason}")
    check_options("a tar file" if extension == ".tar" else "one audio file", {"split": split, "root": root})
    return Input("tar" if extension == ".tar" else "audio", folder, [name])


def _find_in_folder(
    place: str, names: Iterable[str], split: str | None, root: str | None, with_metadata: bool = True
) -> Input:
    by_kind: dict[str | None, list[str]] = defaultdict(list)
    for name in names:
        by_kind[_KINDS.get(_extension(name))].append(name)
    tables = [name for name in (*by_kind["manifest"], *by_kind["parquet"]) if "/" not in name]
    saved = {"state.json", "dataset_dict.json"}.intersection(tables)
    if saved:
        check_options("a saved data set", {"root": root})
        return Input("saved", place, split=split)
    shards = [*by_kind["tar"], *by_kind["parquet"]]
    splits = _splits(by_kind["audio"] + shards, tables)
    part = None if split is None else _find_part(place, split, splits, chain(*by_kind.values()))
    metadata = next((name for name in METADATA if name in tables), None) if with_metadata else None
    if metadata:
        logger.info("the audio of %s is what %s lists", place, metadata)
        table = join_path(place, metadata)
        if part and part not in tables and not _has_split(table, split):
            return Input("manifest", table, folder=place, roots=(root or place,), inside=join_path(place, part))
        return _find_file(table, split, root)
    if part in tables:
        if root is None and _extension(part) != ".parquet":
            folders = {name.partition("/")[0] for name in by_kind["audio"] if "/" in name}
            beside = [name for name in sorted(folders) if split_kind(name) == split_kind(Path(part).stem)]
            roots = (place, join_path(place, beside[0])) if len(beside) == 1 else (place,)
            return Input("manifest", join_path(place, part), folder=place, roots=roots)
        found = _find_file(join_path(place, part), None, root)
        return replace(found, folder=place) if found.kind == "manifest" else found
    if part:
        inside = f"{part}/"
        below = (name.removeprefix(inside) for names in by_kind.values() for name in names if name.startswith(inside))
        found = _find_in_folder(join_path(place, part), sorted(below), None, root, with_metadata)
        if found.kind not in ("audio", "tar", "parquet"):
            return found
        return replace(found, place=place, names=[inside + name for name in found.names])
    kind = next((kind for kind in ("audio", "tar", "parquet") if by_kind[kind]), "audio")
    if kind == "parquet":
        return Input("parquet", place, by_kind["parquet"], place, split, (root or place,))
    if split is not None:
        found = sorted({name.partition("/")[0] for names in by_kind.values() for name in names if "/" in name})
        raise ValueError(f"no split {split!r} in {place}: expected one of its subfolders {found}")
    check_options("a folder of audio" if kind == "audio" else "tar files", {"root": root})
    if kind == "audio":
        _report_others(place, by_kind)
        if splits and with_metadata:
            counts = Counter(name.partition("/")[0] for name in by_kind["audio"] if "/" in name)
            shown = ", ".join(f"{name} ({count} files)" for name, count in counts.items())
            logger.info("audio of all splits of %s: %s", place, shown or f"{len(by_kind['audio'])} files")
    return Input(kind, place, by_kind[kind], place)


def _extension(name: str) -> str:
    return os.path.splitext(url_path(name) if is_url(name) else name)[1].lower()


def find_split_paths(folder: str | os.PathLike) -> dict[str, Path]:
    """The splits of a folder by name: a manifest each, or else the first-level folders if all are splits."""
    names = [name for name in walk_names(folder) if _extension(name) in _FILES]
    tables = [name for name in names if "/" not in name and _KINDS.get(_extension(name)) in ("manifest", "parquet")]
    audio = [name for name in names if _KINDS.get(_extension(name)) in ("audio", "tar", "parquet")]
    return {name: Path(folder) / path for name, path in _splits(audio, tables).items()}


def _splits(names: Iterable[str], tables: Iterable[str]) -> dict[str, Path]:
    firsts = {name.partition("/")[0] if "/" in name else "" for name in names}
    return split_paths(Path(), [Path(first, "name") for first in sorted(firsts) if first], list(map(Path, tables)))


def _find_part(place: str, split: str, splits: dict[str, Path], names: Iterable[str]) -> str | None:
    """The subfolder or manifest of a split, if there is one."""
    name = match_split(split, splits)
    if name is None:
        return split if any(one.startswith(f"{split}/") for one in names) else None
    if name != split:
        logger.info("split %s of %s: %s", split, place, splits[name])
    return splits[name].as_posix()


def _has_split(manifest: str, split: str) -> bool:
    return _extension(manifest) != ".parquet" and match_split(split, Manifest(manifest).splits()) is not None


def _report_others(place: str, by_kind: dict[str | None, list[str]]) -> None:
    """Say which audio is left out of a folder, and if nothing is left, that it holds none."""
    others = [name for kind, names in by_kind.items() if kind != "audio" for name in names]
    counts, left_out = Counter(map(_extension, others)), LeftOut(place)
    for name in {_extension(name): name for name in reversed(others)}.values():
        left_out.add(name, lambda name=name: join_path(place, name), counts[_extension(name)])
    left_out.report()
    if not by_kind["audio"]:
        found = ", ".join(f"{count} {extension or '(no extension)'}" for extension, count in sorted(counts.items()))
        reason = "".join(f"; {reason}" for reason in sorted(set(filter(None, left_out.reasons.values()))))
        expected = f"expected {' '.join(AUDIO_EXTENSIONS)}, got {found or 'no files at all'}{reason}"
        raise FileNotFoundError(f"no audio in {path_text(place)}: {expected}")
