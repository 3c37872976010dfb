"""Reading the published files of a corpus."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...utils.names import path_text
from ..inputs import find_audio_files
from ..tables import read_table

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "validation", "test")


def check_folder(root: str | os.PathLike) -> Path:
    """The root folder of a corpus, which must exist."""
    root = Path(root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder: {root}")
    return root


def check_split(split: str, name: str) -> None:
    """Raises ValueError if the corpus `name` has no such split."""
    if split not in SPLITS:
        raise ValueError(f"expected a split of {name}, {', '.join(SPLITS)}; got {split!r}")


def audio_files(folder: Path, url: str) -> list[Path]:
    """`find_audio_files`, with an error that names the `url` the corpus is published at."""
    try:
        return find_audio_files(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; download it from {url}") from None


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a table with a header; no rows, or a missing one of `columns`, is an error."""
    table = read_table(path)
    if not table.rows or not set(columns).issubset(table.names):
        wanted, got = ", ".join(columns), f"{len(table.rows)} with {', '.join(table.names)}"
        raise ValueError(f"expected rows with the columns {wanted} in {path}, got {got}")
    return [dict(zip(table.names, row)) for row in table.rows]


def published_file(root: Path, name: str, url: str) -> Path:
    """The path of a file of the corpus, which must exist; the error has its `url`."""
    if not (root / name).is_file():
        raise FileNotFoundError(f"{root / name} is missing: download it from {url}")
    return root / name


def incomplete(what: str, absent: list[str], url: str) -> FileNotFoundError:
    return FileNotFoundError(f"{what}, first {absent[0]}: download them from {url}")


def build_dataset(audio: list, labels: list, names: Sequence[str], **columns: list) -> "Dataset":
    """A data set of paths or `{"path", "bytes"}`, class ids (or lists of them) and other columns."""
    from datasets import Audio, ClassLabel, Dataset, List

    label = ClassLabel(names=list(names))
    feature = List(label) if labels and isinstance(labels[0], list) else label
    rows = [one if isinstance(one, dict) else {"path": path_text(one), "bytes": None} for one in audio]
    dataset = Dataset.from_dict({"audio": rows, **columns}).cast_column("audio", Audio(decode=False))
    return dataset.add_column("label", labels, feature=feature)
