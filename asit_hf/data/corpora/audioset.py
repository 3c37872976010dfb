"""AudioSet (Gemmeke et al. 2017): segment lists with audio files, or parquet shards."""

import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..manifests import NUMBER
from ..tables import read_table
from .files import audio_files, build_dataset, check_folder, published_file, read_rows

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

AUDIOSET_URL = "https://research.google.com/audioset/download.html"
_PARTS = ("balanced_train", "unbalanced_train", "eval")
_CLASSES = "class_labels_indices.csv"
# the first match decides: unbalanced/train-00.parquet is unbalanced
_SHARDS = {
    "eval": re.compile(r"(^|/)(eval|test)"),
    "unbalanced_train": re.compile(r"(^|/)unbal"),
    "balanced_train": re.compile(r"(^|/)(bal|train)"),
}


def load_audioset(root: str | os.PathLike, parts: Sequence[str]) -> "Dataset":
    """AudioSet, from audio files or parquet shards.

    Args:
        root: a folder with `class_labels_indices.csv` and either the official segment lists and, anywhere below it,
            audio files named `YTID`, `YYTID`, `YTID_START` or `YTID_START_END` (seconds or milliseconds); or, anywhere
            below it, parquet shards with the columns `audio` and `labels` (mids) or `human_labels` (names), whose
            paths begin with `bal` or `train`, `unbal`, and `eval` or `test`.
        parts: the parts to join, of "balanced_train", "unbalanced_train" and "eval".

    Returns:
        `audio`, `label` (a list of the 527 classes, in the order of `class_labels_indices.csv`) and `video_id`. Listed
        clips that are not on disk are skipped and counted in one warning.

    Raises:
        FileNotFoundError: a missing list, or no clip of these parts at all.
    """
    if not parts or not set(parts).issubset(_PARTS):
        raise ValueError(f"expected parts of AudioSet, {', '.join(_PARTS)}; got {parts!r}")
    root = check_folder(root)
    classes = read_rows(published_file(root, _CLASSES, AUDIOSET_URL), ("index", "mid", "display_name"))
    classes.sort(key=lambda row: int(row["index"]))
    names = [row["display_name"] for row in classes]
    ids = {name: index for index, row in enumerate(classes) for name in (row["mid"], row["display_name"])}
    shards = sorted(root.rglob("*.parquet"))
    if shards:
        return _audioset_shards(root, shards, parts, ids, names)

    lists = [published_file(root, f"{part}_segments.csv", AUDIOSET_URL) for part in parts]
    rows = [row for segments in lists for row in _segments(segments)]
    files = {file.stem: file for file in reversed(audio_files(root, AUDIOSET_URL))}
    found = [(row, file) for row in rows if (file := _segment_file(row, files)) is not None]
    missing, joined = len(rows) - len(found), " and ".join(parts)
    if not found:
        files_like = f"{rows[0][0]}.wav or {rows[0][0]}_{float(rows[0][1]):.0f}.flac"
        what = f"none of the {len(rows)} clips of AudioSet's {joined} is in {root}"
        raise FileNotFoundError(f"{what}: expected files like {files_like}")
    if missing:
        logger.warning("AudioSet's %s: skipped %d of %d listed clips, not on disk", joined, missing, len(rows))
    return build_dataset(
        audio=[str(file) for _, file in found],
        labels=[_ids(map(str.strip, row[3].split(",")), ids, root / _CLASSES) for row, _ in found],
        names=names,
        video_id=[row[0] for row, _ in found],
    )


AUDIOSET_PARTS = {
    "audioset-20k": {"train": ("balanced_train",), "test": ("eval",)},
    "audioset-2m": {"train": ("balanced_train", "unbalanced_train"), "test": ("eval",)},
}


def _segments(path: Path) -> list[list[str]]:
    """(video id, start, end, comma-separated mids) of each line that is not a comment."""
    rows = read_table(path, header=False, comment="#").rows
    wrong = next((row for row in rows if len(row) != 4 or not all(map(NUMBER.fullmatch, row[1:3]))), None)
    if wrong or not rows:
        raise ValueError(f"expected lines of id, start, end and labels in {path}, got {wrong or 'none'}")
    return rows


def _segment_file(row: list[str], files: dict[str, Path]) -> Path | None:
    name, start, end = row[0], float(row[1]), float(row[2])
    spans = [""]
    for first, last in ((f"{start:.0f}", f"{end:.0f}"), (f"{1000 * start:.0f}", f"{1000 * end:.0f}"), row[1:3]):
        spans += [f"_{first}", f"_{first}_{last}"]
    stems = (f"{prefix}{name}{span}" for span in spans for prefix in ("", "Y"))
    return next((files[stem] for stem in stems if stem in files), None)


def _audioset_shards(
    root: Path, shards: list[Path], parts: Sequence[str], ids: dict[str, int], names: list[str]
) -> "Dataset":
    from datasets import Audio, ClassLabel, List, load_dataset

    chosen = [str(shard) for shard in shards if _part_of(shard.relative_to(root).as_posix()) in parts]
    if not chosen:
        what = f"none of the {len(shards)} parquet files in {root} belongs to AudioSet's {' and '.join(parts)}"
        raise FileNotFoundError(f"{what}: expected paths that begin with bal or train, unbal, and eval or test")
    dataset = load_dataset("parquet", data_files=chosen, split="train")
    column = next((name for name in ("labels", "human_labels") if name in dataset.column_names), None)
    if column is None or "audio" not in dataset.column_names:
        expected = "the columns audio and labels or human_labels"
        raise ValueError(f"expected {expected} in {chosen[0]}, got {dataset.column_names}")
    labels = [_ids(row or (), ids, root / _CLASSES) for row in dataset[column][:]]
    kept = [name for name in ("audio", "video_id") if name in dataset.column_names]
    dataset = dataset.select_columns(kept).cast_column("audio", Audio(decode=False))
    return dataset.add_column("label", labels, feature=List(ClassLabel(names=names)))


def _part_of(shard: str) -> str | None:
    return next((part for part, pattern in _SHARDS.items() if pattern.search(shard)), None)


def _ids(labels: Iterable[str], ids: dict[str, int], table: Path) -> list[int]:
    try:
        return [ids[label] for label in labels]
    except KeyError as error:
        raise ValueError(f"expected a label of {table}, got {error}") from None
