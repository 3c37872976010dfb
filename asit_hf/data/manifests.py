"""
Manifests in csv, tsv, txt, json and jsonl: paths of audio files, labels, and any other columns.

The readers of `datasets` infer other types: speaker "007" becomes 7, and labels "a;b" stay one label.
"""

import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..utils.names import local_path, path_text
from ..utils.texts import Categories
from ..utils.urls import url_path
from .files import find_root, join_path, name_in_row
from .formats import AUDIO_EXTENSIONS
from .splits import match_split, split_kind
from .tables import TABLE_EXTENSIONS, OpenTable, read_text

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


class Manifest:
    """A manifest of which only the text is in memory; columns are read from it when they are asked for.

    Args:
        path: of the file.
        audio_column: whose cells are names also if they look like numbers.

    Raises:
        ValueError: a damaged file.
    """

    def __init__(self, path: str | os.PathLike, audio_column: str | None = None):
        self.path = path
        self._names_of_files = {audio_column, *AUDIO_COLUMNS}
        is_table = os.path.splitext(url_path(os.fspath(path)))[1].lower() in TABLE_EXTENSIONS
        self._rows = OpenTable(path) if is_table else _JsonRows(path, audio_column)
        self.names = self._rows.names

    def rows(self, names: Sequence[str]) -> Iterator[list[Any]]:
        """The cells of some columns as they are written, row by row; missing ones are None or empty."""
        if isinstance(self._rows, OpenTable):
            return (cells for _, cells in self._rows.rows(names))
        return ([row.get(name) for name in names] for row in self._rows)

    def cells(self, name: str) -> Iterator[Any]:
        """The cells of a column, see `rows`."""
        return (cells[0] for cells in self.rows([name]))

    def typed(self, cells: Sequence[Any], name: str) -> list[Any]:
        """Cells of a column, or the different ones among them, as numbers if all are; missing ones are None."""
        if not isinstance(self._rows, OpenTable):
            return list(cells)
        if name in self._names_of_files:  # file names that are numbers stay text
            return [cell or None for cell in cells]
        return _typed(cells, name, self._rows.delimiter, self.path)

    def find_audio(self, wanted: str | None = None) -> str:
        """The column of files: `wanted`, one of the usual names, or the only one of names of audio files.

        Raises:
            ValueError: no such column, or no rows.
        """
        columns = ", ".join(self.names)
        if not self.names or next(self.cells(self.names[0]), self) is self:
            raise ValueError(f"no rows in {self.path}" + (f" below its first row {columns}" if columns else ""))
        named = any(name.lower().endswith(AUDIO_EXTENSIONS) for name in self.names)  # a row instead of names
        if wanted is None and not any(_plain(name) in AUDIO_COLUMNS for name in self.names):
            found = [name for name in self.names if all(map(_is_audio, self.cells(name)))]
            if len(found) == 1 and not found[0].lower().endswith(AUDIO_EXTENSIONS):
                logger.warning_once(f"audio column of {self.path}: {found[0]} (audio_column)")
                return found[0]
        try:
            return find_column(self.names, wanted, AUDIO_COLUMNS, "audio", str(self.path))
        except ValueError as error:
            if wanted is None and named:
                message = f"{error}; or put a first row with names above the files in {self.path}"
                raise ValueError(message) from None
            raise

    def find_label(self, wanted: str | None = None) -> str | None:
        """The column of labels: `wanted` or one of the usual names."""
        return find_column(self.names, wanted, LABEL_COLUMNS, "label", str(self.path))

    def in_split(self, split: str) -> np.ndarray:
        """Which rows are in a split, `(rows,)`.

        Raises:
            ValueError: no such split.
        """
        column = self._split_column()
        if column is None:
            raise ValueError(f"no split {split!r} in {self.path}: expected a column 'split' among {self.names}")
        cells, names = self._splits(column)
        found = sorted({name for name in names if name is not None})
        wanted = match_split(str(split), found)
        if wanted is None:
            raise ValueError(f"no split {split!r} in {self.path}: expected one of {found}")
        name_of_row = np.array(names, object)[cells.codes]
        if without := int((name_of_row == None).sum()):  # noqa: E711  by element
            logger.warning_once(
                f"{without} of {len(cells)} rows of {self.path} have no {column}: they are in no split"
            )
        return name_of_row == wanted

    def splits(self) -> list[str]:
        """The values of the column of splits, if there is one."""
        column = self._split_column()
        return [] if column is None else sorted({name for name in self._splits(column)[1] if name is not None})

    def _splits(self, column: str) -> tuple[Categories, list[str | None]]:
        cells = Categories(str(cell) if isinstance(cell, (list, dict)) else cell for cell in self.cells(column))
        return cells, [None if one is None else as_text(one) for one in self.typed(cells.values, column)]

    def _split_column(self) -> str | None:
        """The column of splits by its name, or else the only one of names of splits, one of them for training."""
        if found := find_column(self.names, None, SPLIT_COLUMNS, "split", str(self.path)):
            return found
        found = [name for name in self.names if self._holds_splits(name)]
        if len(found) != 1:
            return None
        logger.warning_once(f"split column of {self.path}: {found[0]}")
        return found[0]

    def _holds_splits(self, name: str) -> bool:
        kinds = {}
        for cell in self.cells(name):
            if cell and isinstance(cell, str) and cell not in kinds:
                kinds[cell] = split_kind(cell)
                if kinds[cell] is None or len(kinds) == 10:
                    return False
        return {"train"} < set(kinds.values())


def load_manifest(
    path: str,
    split: str | None,
    audio_column: str | None,
    label_column: str | None,
    roots: Sequence[str],
    inside: str | None = None,
) -> "Dataset":
    """The rows of a manifest with full paths.

    Args:
        path: of the manifest, or its URL.
        split, audio_column, label_column: as in [`~asit_hf.data.datasets.load_audio_dataset`].
        roots, inside: as in [`~asit_hf.data.inputs.Input`].
    """
    from datasets import Dataset

    manifest = Manifest(path, audio_column)
    audio = manifest.find_audio(audio_column)
    manifest.find_label(label_column)
    cells = zip(*manifest.rows(manifest.names))  # read once, however many columns there are
    columns = {name: manifest.typed(of_column, name) for name, of_column in zip(manifest.names, cells)}
    if split is not None:
        in_split = manifest.in_split(split)
        columns = {name: list(compress(values, in_split)) for name, values in columns.items()}
    names = [name_in_row(value, row, path) for row, value in enumerate(columns[audio])]
    root, moved = find_root(names, roots, path)
    columns[audio] = [path_text(join_path(root, moved.get(name, name))) for name in names]
    if inside is not None:
        is_inside = [local_path(file).startswith(os.path.join(inside, "")) for file in columns[audio]]
        columns = {name: list(compress(values, is_inside)) for name, values in columns.items()}
    if audio_column is None and _plain(audio) not in AUDIO_COLUMNS:
        columns = {"audio" if name == audio else name: values for name, values in columns.items()}
    return Dataset.from_dict({name: _uniform(values, name, path) for name, values in columns.items()})


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


def _is_audio(cell: Any) -> bool:
    return isinstance(cell, str) and cell.lower().endswith(AUDIO_EXTENSIONS)


def _typed(values: Sequence[str], name: str, delimiter: str, path: str | os.PathLike) -> list:
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


class _JsonRows:
    """The rows of a json file. If they follow one another, as a list or in lines, one at a time is in memory."""

    def __init__(self, path: str | os.PathLike, audio_column: str | None):
        self.path = path
        text, errors = read_text(path), []
        in_lines = os.fspath(path).lower().endswith(".jsonl")
        for way in (in_lines, not in_lines):
            try:
                self._values = _json_values(text, way, audio_column)
                self.names = list(dict.fromkeys(name for row in self for name in row))
                return
            except json.JSONDecodeError as error:
                errors.append(error)
        what = f"expected a json list of rows or one json object per line in {path}"
        raise ValueError(f"{what}: {errors[0]}") from errors[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self._values():
            row = {"audio": row} if isinstance(row, str) else row
            if not isinstance(row, dict):
                what = f"expected every row of {self.path} to be a json object with named columns"
                raise ValueError(f"{what}, got {row!r}")
            yield {str(name).strip(): _clean(value) for name, value in row.items()}


def _json_values(text: str, in_lines: bool, audio_column: str | None) -> Callable[[], Iterable[Any]]:
    """A function that returns the rows as json values."""
    if in_lines:
        return lambda: (json.loads(line[0]) for line in re.finditer("[^\n]+", text) if line[0].strip())
    if text.lstrip().startswith("["):
        return lambda: _json_items(text)
    rows = _rows(json.loads(text), audio_column)
    return lambda: rows


def _json_items(text: str) -> Iterator[Any]:
    """The items of a json list, one after another."""
    decode, space = json.JSONDecoder().raw_decode, re.compile(r"\s*").match
    position = space(text, text.index("[") + 1).end()
    is_end = text.startswith("]", position)
    while not is_end:
        value, position = decode(text, position)
        yield value
        position = space(text, position).end()
        is_end = text.startswith("]", position)
        if not is_end and not text.startswith(",", position):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
        position = position if is_end else space(text, position + 1).end()
    if text[position + 1 :].strip():
        raise json.JSONDecodeError("Extra data", text, position + 1)


def _rows(content: Any, audio_column: str | None) -> list:
    """Rows of any usual layout but a list: a list of them as the value of a key such as "data"; columns or rows by
    name or number, as pandas writes them; records or labels by path.
    """
    usual = {audio_column, *AUDIO_COLUMNS}

    def has_audio(names: Iterable) -> bool:
        return any(name in usual or str(name).strip().lower() in usual for name in names)

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
