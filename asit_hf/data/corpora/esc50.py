"""ESC-50 as it lies on disk."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from .files import _audio_files, _dataset, _folder, _incomplete, _published, _table

if TYPE_CHECKING:
    from datasets import Dataset

ESC50_URL = "https://github.com/karolpiczak/ESC-50"


def load_esc50(root: str | os.PathLike) -> "Dataset":
    """ESC-50: `meta/esc50.csv` and `audio/`; the table may also lie in `root` itself, and files may be flac.

    Returns:
        `audio`, `label` (in the official order), `fold` (1 to 5) and `src_file`.

    Raises:
        FileNotFoundError: the table or a file of it is missing.
    """
    root = _folder(root)
    table = root / "esc50.csv"
    table = table if table.is_file() else _published(root, "meta/esc50.csv", ESC50_URL)
    rows = _table(table, ("filename", "fold", "target", "category", "src_file"))
    names = {int(row["target"]): row["category"] for row in rows}
    ids = {target: index for index, target in enumerate(sorted(names))}
    files = {file.stem: file for file in _audio_files(root / "audio", ESC50_URL)}
    absent = [row["filename"] for row in rows if Path(row["filename"]).stem not in files]
    if absent:
        raise _incomplete(f"{root / 'audio'} lacks {len(absent)} of {len(rows)} clips of ESC-50", absent, ESC50_URL)
    return _dataset(
        audio=[str(files[Path(row["filename"]).stem]) for row in rows],
        labels=[ids[int(row["target"])] for row in rows],
        names=[names[target] for target in ids],
        fold=[int(row["fold"]) for row in rows],
        src_file=[row["src_file"] for row in rows],
    )
