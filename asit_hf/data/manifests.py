"""
Manifests in csv, tsv, txt, json and jsonl: paths of audio files, labels, and any other columns.

The readers of `datasets` infer other types: speaker "007" becomes 7, and labels "a;b" stay one label.
"""

import json
import logging
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import resolve_paths
from .formats import AUDIO_EXTENSIONS
from .splits import match_split, split_kind
from .tables import TABLE_EXTENSIONS, read_table, read_text

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# txt only if it is named: folders hold many that are no tables
MANIFEST_EXTENSIONS = (".csv", ".tsv", ".json", ".jsonl")
AUDIO_COLUMNS = (
    *("audio", "file", "path", "filename", "file_name", "filepath", "file_path", "audio_path", "wav", "fname"),
    *(
        "slice_file_name",
        "audio_file",
        "audio_filename",
        "audio_filepath",
        "wav_file",
        "wav_path",
        "filenames",
        "files",
    ),
)
LABEL_COLUMNS = (
    *(
        "label",
        "labels",
        "class",
        "category",
        "target",
        "classes",
        "categories",
        "targets",
        "class_name",
        "label_name",
    ),
    *("class_label", "scene_label", "primary_label"),
)
SPLIT_COLUMNS = ("split", "subset", "partition")
INTEGER = re.compile(r"-?(0|[1-9]\d{0,17})")
NUMBER = re.compile(r"-?((0|[1-9]\d{0,17})(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_DECIMAL_COMMA = re.compile(r"-?(0|[1-9]\d{0,14})(,\d+)?")


def load_manifest(
    path: Path, split: str | None, audio_column: str | None, label_column: str | None, root: Path
) -> "Dataset":
    """The rows of a manifest with full paths; arguments as in [`~asit_hf.data.datasets.load_audio_dataset`]."""
    from datasets import Dataset

    columns = _read(path, audio_column)
    rows = len(next(iter(columns.values()), []))
    if rows == 0:
        raise ValueError(f"no rows in {path}" + (f" below its first row {', '.join(columns)}" if columns else ""))
    if audio_column is None:
        columns = _with_audio(columns, path)
    try:
        audio = find_column(columns, audio_column, AUDIO_COLUMNS, "audio", str(path))
    except ValueError as error:
        if audio_column is None and any(name.lower().endswith(AUDIO_EXTENSIONS) for name in columns):
            raise ValueError(f"{error}; or put a first row with names above the files in {path}") from None
        raise
    find_column(columns, label_column, LABEL_COLUMNS, "label", str(path))
    if split is not None:
        columns = _select_split(columns, split, path)
    columns[audio] = resolve_paths(columns[audio], root, path)
    return Dataset.from_dict({name: _uniform(values, name, path) for name, values in columns.items()})


def _with_audio(columns: dict[str, list], path: Path) -> dict[str, list]:
    """The columns, the only one of names of audio files called "audio" if none has a usual name."""
    if any(_plain(name) in AUDIO_COLUMNS for name in columns):
        return columns
    found = [
        name
        for name, values in columns.items()
        if all(isinstance(value, str) and value.lower().endswith(AUDIO_EXTENSIONS) for value in values)
    ]
    if len(found) != 1 or found[0].lower().endswith(AUDIO_EXTENSIONS):  # a row instead of names
        return columns
    logger.warning_once(f"audio column of {path}: {found[0]} (audio_column)")
    return {"audio" if name == found[0] else name: values for name, values in columns.items()}


def manifest_splits(path: Path) -> list[str]:
    """The values of a manifest's column of splits, if there is one."""
    columns = _read(path, None)
    column = _split_column(columns, path)
    return sorted({as_text(value) for value in columns[column] if value is not None}) if column else []


def find_column(columns: Iterable[str], wanted: str | None, usual: tuple, kind: str, source: str) -> str | None:
    """The column `wanted`, or else the first of the usual names, in any case ("File Name" is file_name); labels may be
    absent, audio may not. A choice among several is reported.
    """
    columns = list(columns)
    if wanted is not None:
        if wanted not in columns:
            raise ValueError(f"no {kind} column {wanted!r} in {source}: expected one of {', '.join(columns)}")
        return wanted
    plain = {name: _plain(name) for name in columns}
    found = [name for name in usual if name in columns]
    found += [name for one in usual for name in columns if plain[name] == one and name not in found]
    if not found and kind == "audio":
        got = f"{', '.join(columns)}; set audio_column"
        raise ValueError(f"no audio column in {source}: expected one of {', '.join(usual)}; got {got}")
    if not found:
        return None
    others = found[1:] if found[0] != kind else []
    if others or found[0] not in usual:
        instead = f", not {' or '.join(others)}" if others else ""
        option = f" ({kind}_column)" if kind != "split" else ""  # which no option names
        logger.warning_once(f"{kind} column of {source}: {found[0]}{instead}{option}")
    return found[0]


def _plain(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def as_text(value: Any) -> str:
    """A cell as text: 1.0 is "1"."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _read(path: Path, audio_column: str | None) -> dict[str, list]:
    return (_read_columns if path.suffix.lower() in TABLE_EXTENSIONS else _read_json)(path, audio_column)


def _read_columns(path: Path, audio_column: str | None) -> dict[str, list]:
    table = read_table(path)
    columns = {name: table.column(name) for name in table.names}
    names = {audio_column, *AUDIO_COLUMNS}  # file names that are numbers stay text
    return {
        name: [value or None for value in values] if name in names else _typed(values, name, table.delimiter, path)
        for name, values in columns.items()
    }


def _typed(values: list[str], name: str, delimiter: str, path: Path) -> list:
    """The column as numbers if all its values are ("007" is a name); an empty field is None."""
    filled = [value for value in values if value and value.lower() != "nan"]
    if not filled:
        return [value or None for value in values]
    if all(INTEGER.fullmatch(value) for value in filled):
        return [int(value) if INTEGER.fullmatch(value) else None for value in values]
    if all(NUMBER.fullmatch(value) for value in filled):
        return [float(value) if NUMBER.fullmatch(value) else None for value in values]
    if delimiter == ";" and "," in "".join(filled) and all(_DECIMAL_COMMA.fullmatch(value) for value in filled):
        example = next(value for value in filled if "," in value)
        logger.warning_once(f"column {name} of {path} has decimal commas: {example} is {example.replace(',', '.')}")
        return [float(value.replace(",", ".")) if _DECIMAL_COMMA.fullmatch(value) else None for value in values]
    return [value or None for value in values]


def _read_json(path: Path, audio_column: str | None) -> dict[str, list]:
    text = read_text(path)
    try:
        content = json.loads(text) if path.suffix.lower() != ".jsonl" else _json_lines(text)
    except json.JSONDecodeError as error:
        try:
            content = _json_lines(text) if path.suffix.lower() != ".jsonl" else json.loads(text)
        except json.JSONDecodeError:
            what = f"expected a json list of rows or one json object per line in {path}"
            raise ValueError(f"{what}: {error}") from error
    rows = _rows(content, audio_column)
    if wrong := [row for row in rows if not isinstance(row, dict)]:
        raise ValueError(f"expected every row of {path} to be a json object with named columns, got {wrong[0]!r}")
    rows = [{str(name).strip(): _clean(value) for name, value in row.items()} for row in rows]
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def _json_lines(text: str) -> list:
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _rows(content: Any, audio_column: str | None) -> list:
    """Rows of any usual layout: a list of them, by itself or as the value of a key such as "data"; columns or rows by
    name or number, as pandas writes them; records or labels by path; a list of paths.
    """
    usual = {audio_column, *AUDIO_COLUMNS}

    def has_audio(names: Iterable) -> bool:
        return any(name in usual or str(name).strip().lower() in usual for name in names)

    if isinstance(content, list):
        return [{"audio": row} if isinstance(row, str) else row for row in content]
    if not isinstance(content, dict):
        return [content]
    values = list(content.values())
    if has_audio(content):
        if all(isinstance(value, dict) for value in values):  # {"file": {"0": "a.wav"}}
            numbers = dict.fromkeys(number for value in values for number in value)
            return [{name: value.get(number) for name, value in content.items()} for number in numbers]
        if all(isinstance(value, list) and len(value) == len(values[0]) for value in values):  # {"file": ["a.wav"]}
            return [dict(zip(content, row)) for row in zip(*values)]
        return [content]
    if isinstance(content.get("columns"), list) and isinstance(content.get("data"), list):
        return [dict(zip(content["columns"], row)) for row in content["data"]]
    lists = [value for value in values if isinstance(value, list) and all(isinstance(row, dict) for row in value)]
    if len(lists) == 1 and (lists[0] or len(content) == 1):  # {"data": [{"wav": "a.wav"}]}
        return lists[0]
    if values and all(isinstance(value, dict) for value in values):
        if all(has_audio(value) for value in values):  # {"0": {"file": "a.wav"}}
            return values
        return [{"audio": path, **value} for path, value in content.items()]
    return [{"audio": path, "label": value} for path, value in content.items()]


def _clean(value: Any) -> Any:
    """A json value with stripped text; an empty text and NaN are None."""
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, list):
        return [_clean(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _select_split(columns: dict[str, list], split: str, path: Path) -> dict[str, list]:
    column = _split_column(columns, path)
    if column is None:
        raise ValueError(f"no split {split!r} in {path}: expected a column 'split' among {list(columns)}")
    names = [None if value is None else as_text(value) for value in columns[column]]
    found = sorted({name for name in names if name is not None})
    wanted = match_split(str(split), found)
    if wanted is None:
        raise ValueError(f"no split {split!r} in {path}: expected one of {found}")
    kept = [row for row, name in enumerate(names) if name == wanted]
    if None in names:
        without = f"{names.count(None)} of {len(names)} rows of {path} have no {column}"
        logger.warning_once(f"{without}: they are in no split")
    return {name: [values[row] for row in kept] for name, values in columns.items()}


def _split_column(columns: dict[str, list], path: Path) -> str | None:
    """The column of splits by its name, or else the only one of names of splits alone, among them one for training."""
    if found := find_column(columns, None, SPLIT_COLUMNS, "split", str(path)):
        return found
    texts = {name: {value for value in values if isinstance(value, str)} for name, values in columns.items()}
    kinds = {name: set(map(split_kind, found)) for name, found in texts.items() if len(found) < 10}
    found = [name for name, of_column in kinds.items() if None not in of_column and {"train"} < of_column]
    if len(found) != 1:
        return None
    logger.warning_once(f"split column of {path}: {found[0]}")
    return found[0]


def _uniform(values: list, name: str, path: Path) -> list:
    """The column with one type, as Arrow needs it: lists if any value is one, text if any is text or types differ."""
    if any(isinstance(value, list) for value in values):
        values = [value if value is None or isinstance(value, list) else [value] for value in values]
        flat = iter(_uniform([one for value in values for one in value or ()], name, path))
        return [None if value is None else [next(flat) for _ in value] for value in values]
    types = {type(value) for value in values} - {type(None)}
    if len(types) <= 1 or types == {int, float}:
        return values
    if dict in types:
        raise ValueError(f"expected one type in column {name} of {path}, got objects and others")
    kinds = " and ".join(sorted(kind.__name__ for kind in types))
    logger.warning_once(f"column {name} of {path} holds {kinds}: all are read as text")
    return [None if value is None else as_text(value) for value in values]
