"""Reading the published pieces of a corpus."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..datasets import find_audio_files

if TYPE_CHECKING:
    from datasets import Dataset


_SPLITS = ("train", "validation", "test")


def _folder(root: str | os.PathLike) -> Path:
    root = Path(root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder: {root}")
    return root


def _check_split(split: str, name: str) -> None:
    if split not in _SPLITS:
        raise ValueError(f"expected a split of {name}, {', '.join(_SPLITS)}; got {split!r}")


def _audio_files(folder: Path, url: str) -> list[Path]:
    try:
        return find_audio_files(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; the data set is published at {url}") from None


def _table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a csv with a header; there are some, and they have these columns."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        rows, found = list(reader), reader.fieldnames or []
    if not rows or not set(columns).issubset(found):
        wanted = ", ".join(columns)
        raise ValueError(f"expected rows with the columns {wanted} in {path}, got {len(rows)} with {', '.join(found)}")
    return rows


def _published(root: Path, name: str, url: str) -> Path:
    if not (root / name).is_file():
        raise FileNotFoundError(f"{root / name} is missing: it is published at {url}")
    return root / name


def _incomplete(what: str, absent: list[str], url: str) -> FileNotFoundError:
    return FileNotFoundError(f"{what}, first {absent[0]}: they are published at {url}")


def _dataset(audio: list, labels: list, names: Sequence[str], **columns: list) -> "Dataset":
    from datasets import Audio, ClassLabel, Dataset, List

    label = ClassLabel(names=list(names))
    feature = List(label) if labels and isinstance(labels[0], list) else label
    rows = [one if isinstance(one, dict) else {"path": one, "bytes": None} for one in audio]
    dataset = Dataset.from_dict({"audio": rows, **columns}).cast_column("audio", Audio(decode=False))
    return dataset.add_column("label", labels, feature=feature)
