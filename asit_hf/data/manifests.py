"""
Manifests in csv, tsv, json and jsonl: paths of audio files, labels, and any other columns.

The readers of `datasets` infer other types: speaker "007" becomes 7, and labels "a;b" stay one label.
"""

import csv
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.names import local_path, path_text

if TYPE_CHECKING:
    from datasets import Dataset

MANIFEST_EXTENSIONS = (".csv", ".tsv", ".json", ".jsonl")
AUDIO_COLUMNS = ("audio", "file", "path", "filename", "file_name", "filepath", "file_path", "audio_path", "wav")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target")
_LABEL_SEPARATOR = ";"
INTEGER = re.compile(r"-?(0|[1-9]\d*)")
NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")


def load_manifest(
    path: Path, split: str | None, audio_column: str | None, label_column: str | None, root: Path
) -> "Dataset":
    """The rows of a manifest with full paths; arguments as in [`~asit_hf.data.datasets.load_audio_dataset`]."""
    from datasets import Dataset

    columns = _read_table(path) if path.suffix.lower() in (".csv", ".tsv") else _read_json(path)
    rows = len(next(iter(columns.values()), []))
    if rows == 0:
        raise ValueError(f"no rows in {path}")
    if split is not None:
        if "split" not in columns:
            raise ValueError(f"no split {split!r} in {path}: expected a column 'split' among {list(columns)}")
        kept = [row for row in range(rows) if columns["split"][row] == split]
        if not kept:
            raise ValueError(f"no split {split!r} in {path}: expected one of {sorted(set(columns['split']), key=str)}")
        columns = {name: [values[row] for row in kept] for name, values in columns.items()}
    audio = find_column(columns, audio_column, AUDIO_COLUMNS, "audio", str(path))
    label = find_column(columns, label_column, LABEL_COLUMNS, "label", str(path))
    columns[audio] = _resolve_paths(columns[audio], root, path)
    if label is not None and any(isinstance(value, str) and _LABEL_SEPARATOR in value for value in columns[label]):
        lists = [[] if value is None else str(value).split(_LABEL_SEPARATOR) for value in columns[label]]
        columns[label] = [[name.strip() for name in names if name.strip()] for names in lists]
    return Dataset.from_dict(columns)


def _read_table(path: Path) -> dict[str, list]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        rows = []
        for row in reader:
            if None in row:
                raise ValueError(f"line {reader.line_num} of {path} has more fields than the header")
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
        raise ValueError(f"expected a json list of rows or one json object per line in {path}: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"expected every row of {path} to be a json object with named columns")
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def _typed(values: list[str | None]) -> list:
    """The column as numbers if all its values are ("007" is a name); an empty field is None."""
    values = [value or None for value in values]
    present = [value for value in values if value is not None]
    for pattern, convert in ((INTEGER, int), (NUMBER, float)):
        if present and all(pattern.fullmatch(value) for value in present):
            return [None if value is None else convert(value) for value in values]
    return values


def _resolve_paths(values: list, root: Path, manifest: Path) -> list[str]:
    paths = []
    for row, value in enumerate(values):
        if not isinstance(value, (str, int)):
            raise ValueError(f"expected a path in row {row} of {manifest}, got {value!r}")
        paths.append(str(value) if "://" in str(value) else path_text(os.path.join(root, local_path(str(value)))))
    first = [path for path in map(local_path, paths[:20]) if "://" not in path]
    if first and not any(os.path.exists(path) for path in first):
        what = f"none of the first {len(first)} files of {manifest} exists, for instance {first[0]}"
        raise FileNotFoundError(f"{what}: set root to the folder that the paths are relative to")
    return paths


def find_column(columns: Iterable[str], wanted: str | None, usual: tuple, kind: str, source: str) -> str | None:
    """The column `wanted`, or else the first of the usual names; labels may be absent, audio may not."""
    columns = list(columns)
    if wanted is not None:
        if wanted not in columns:
            raise ValueError(f"no {kind} column {wanted!r} in {source}: expected one of {', '.join(columns)}")
        return wanted
    found = next((name for name in usual if name in columns), None)
    if found is None and kind == "audio":
        got = f"{', '.join(columns)}; set audio_column"
        raise ValueError(f"no audio column in {source}: expected one of {', '.join(usual)}; got {got}")
    return found
