"""ESC-50 (Piczak 2015)."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from .files import audio_files, build_dataset, check_folder, incomplete, published_file, read_rows

if TYPE_CHECKING:
    from datasets import Dataset

ESC50_URL = "https://github.com/karolpiczak/ESC-50"


def load_esc50(root: str | os.PathLike) -> "Dataset":
    """ESC-50: `meta/esc50.csv` or `esc50.csv`, and the clips in `audio/`, as wav or flac.

    Returns:
        `audio`, `label` (in the official order), `fold` (1 to 5) and `src_file`.

    Raises:
        FileNotFoundError: a missing table or clip.
    """
    root = check_folder(root)
    table = root / "esc50.csv"
    table = table if table.is_file() else published_file(root, "meta/esc50.csv", ESC50_URL)
    rows = read_rows(table, ("filename", "fold", "target", "category", "src_file"))
    names = {int(row["target"]): row["category"] for row in rows}
    ids = {target: index for index, target in enumerate(sorted(names))}
    files = {file.stem: file for file in audio_files(root / "audio", ESC50_URL)}
    absent = [row["filename"] for row in rows if Path(row["filename"]).stem not in files]
    if absent:
        what = f"{len(absent)} of {len(rows)} clips of ESC-50 are missing in {root / 'audio'}"
        raise incomplete(what, absent, ESC50_URL)
    return build_dataset(
        audio=[str(files[Path(row["filename"]).stem]) for row in rows],
        labels=[ids[int(row["target"])] for row in rows],
        names=[names[target] for target in ids],
        fold=[int(row["fold"]) for row in rows],
        src_file=[row["src_file"] for row in rows],
    )
