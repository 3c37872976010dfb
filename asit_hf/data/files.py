"""Audio files on disk: walking a folder, and the files that the names in a table mean."""

import glob
import logging
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from ..utils.names import local_path, path_text
from ..utils.urls import is_url, join_url, url_size
from .formats import AUDIO_EXTENSIONS

logger = logging.getLogger(__name__)

_CHECKED = 10000


def walk(folder: Path) -> list[Path]:
    """All files below `folder`, sorted, without hidden ones. Links to folders are followed, each folder once."""
    return [folder / name for name in walk_names(folder)]


def walk_names(folder: str | os.PathLike) -> Iterator[str]:
    """The files that [`walk`] finds, relative to `folder`, one after another in the same order."""
    return _walk(os.fspath(folder), "", set())


def _walk(folder: str, prefix: str, seen: set[str]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        logger.warning("%s is left out: %s", path_text(folder), error.strerror)
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():  # a link can lead to itself
            yield from _walk(entry.path, f"{prefix}{entry.name}/", seen)
        else:
            yield prefix + entry.name


def resolve_paths(values: Sequence[Any], root: str | os.PathLike, source: str | os.PathLike) -> list[str]:
    """Full paths of the files that a table names, relative to `root`, see `path_text`. URLs stay as they are.

    If files are not there, all files below `root` are searched: for the name in another folder, for the name plus an
    extension (`64760` for `64760.wav`), and for the name with another extension. Several such files are told apart by
    the folders in the table; what is found so is reported with its number and an example. Names that remain are left
    to the reader of the files.

    Args:
        values: names by row; whole numbers are names too.
        root: folder that the names are relative to.
        source: of the names, for messages.

    Raises:
        ValueError: a row without a name.
        FileNotFoundError: no file at all is found.
    """
    names = [name_in_row(value, row, source) for row, value in enumerate(values)]
    moved = find_moved(names, root, source)
    return [path_text(join_path(os.fspath(root), moved.get(name, name))) for name in names]


def name_in_row(value: Any, row: int, source: str | os.PathLike) -> str:
    """The name of a file in a cell of the table `source`; `ValueError` if it has none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise ValueError(f"expected a path in row {row} of {source}, got {value or None!r}")
    return local_path(str(value))


def join_path(folder: str, name: str) -> str:
    """The path or URL of `name` in `folder`, both of which may be URLs."""
    if is_url(folder) and not os.path.isabs(name):
        return join_url(folder, name)
    return name if is_url(name) else os.path.join(folder, name)


def find_root(names: Sequence[str], roots: Sequence[str], source: str) -> tuple[str, dict[str, str]]:
    """The first of the folders in which all files are, or else the last, and what [`find_moved`] finds there."""
    for root in roots[:-1]:
        try:
            moved = find_moved(names, root, source)
        except FileNotFoundError:
            continue
        if is_url(root) or all(os.path.isfile(join_path(root, moved.get(name, name))) for name in names):
            return root, moved
    return roots[-1], find_moved(names, roots[-1], source)


def find_moved(names: Sequence[str], root: str | os.PathLike, source: str | os.PathLike) -> dict[str, str]:
    """Paths, relative to `root`, of the files that are not where their names say, by name, see [`resolve_paths`]; of
    many names, a sample tells whether there are such files. Of URLs, it is only found out whether the first and the
    last one exist.
    """
    root = os.fspath(root)
    local = [row for row, name in enumerate(names) if not is_url(name)]
    if local and is_url(root):
        _check_urls([join_path(root, names[row]) for row in {local[0], local[-1]}], len(local), source)
        return {}
    sample = local[:: max(1, len(local) // _CHECKED)]
    if all(os.path.isfile(os.path.join(root, names[row])) for row in sample):
        return {}
    missing, taken = Counter(), set()
    for row in local:
        path = os.path.join(root, names[row])
        if os.path.isfile(path):
            taken.add(os.path.normpath(path))
        else:
            missing[names[row]] += 1
    found = _search(Path(root), sorted(missing), taken)
    first = next(iter(missing), None)
    if not found and missing.total() == len(local):
        what = f"none of the {len(local)} files of {source} exists, for instance {os.path.join(root, first)}"
        folder = _folder_beside(Path(root), first)
        raise FileNotFoundError(f"{what}: set root to {folder or 'the folder that the paths are relative to'}")
    moved = [name for name in missing if name in found]
    if moved:
        count, example = sum(missing[name] for name in moved), f"{moved[0]} as {found[moved[0]]}"
        below = f"below {os.path.join(root, '') or 'the working directory'}"
        logger.warning_once(f"{count} of {len(names)} files of {source} were found {below}, such as {example}")
    return found


def _check_urls(urls: Sequence[str], count: int, source: str | os.PathLike) -> None:
    for url in urls:
        try:
            url_size(url)
            return
        except FileNotFoundError:
            continue
    what = f"neither the first nor the last of the {count} files of {source} exists, for instance {urls[0]}"
    raise FileNotFoundError(f"{what}: set root to the folder or URL that the paths are relative to")


def _search(root: Path, names: Sequence[str], taken: set[str]) -> dict[str, str]:
    """Files below `root`, relative to it, by the names that mean them. A file in other folders than a name says has to
    be the only one, and neither `taken` nor meant by another name.
    """
    by_name, by_stem = defaultdict(list), defaultdict(list)
    for file in walk(root):
        by_name[_composed(file.name)].append(file)
        if file.suffix.lower() in AUDIO_EXTENSIONS:
            by_stem[_composed(file.stem)].append(file)
    found, uncertain = {}, set()
    for name in names:
        *folders, last = PureWindowsPath(_composed(name)).parts  # divided at / and at \
        stem, extension = os.path.splitext(last)
        files = by_name.get(last) or by_stem.get(last)
        files = files or (by_stem.get(stem) if extension.lower() in AUDIO_EXTENSIONS else None) or []
        shared = [_common_end(file.parts[:-1], folders) for file in files]
        nearest = [file for file, count in zip(files, shared) if count == max(shared)]
        if len({file.parent for file in nearest}) == 1:
            found[name] = min(nearest, key=_preference)
            if max(shared) < len(folders):
                uncertain.add(name)
    counts = Counter(found.values())
    return {
        name: str(file.relative_to(root))
        for name, file in found.items()
        if name not in uncertain or (counts[file] == 1 and os.path.normpath(file) not in taken)
    }


def _folder_beside(root: Path, name: str) -> str | None:
    """The folder above `root`, or one beside it, that holds a file, as with `meta/esc50.csv` and `audio/`."""
    above = Path(os.path.abspath(root)).parent
    if os.path.isabs(name):
        return None
    folders = (above, *(file.parents[len(Path(name).parts) - 1] for file in above.glob(f"*/{glob.escape(name)}")))
    return next((path_text(folder) for folder in sorted(folders) if (folder / name).is_file()), None)


def _preference(file: Path) -> int:
    extension = file.suffix.lower()
    return AUDIO_EXTENSIONS.index(extension) if extension in AUDIO_EXTENSIONS else len(AUDIO_EXTENSIONS)


def _composed(name: str) -> str:
    """One spelling of accented letters, which some systems store as two characters."""
    return unicodedata.normalize("NFC", name)


def _common_end(first: Sequence[str], second: Sequence[str]) -> int:
    pairs = zip(reversed(first), reversed(second))
    return next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))
