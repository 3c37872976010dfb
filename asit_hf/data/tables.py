"""Delimited tables (csv, tsv, txt) as people have them: any usual delimiter and encoding, checked row by row."""

import codecs
import csv
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..utils.texts import Texts
from ..utils.urls import is_url, stream_url, url_path

logger = logging.getLogger(__name__)

TABLE_EXTENSIONS = (".csv", ".tsv", ".txt")
_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
_OF_EXTENSION = {".csv": ",", ".tsv": "\t"}
# UTF-32 before UTF-16, whose mark begins in the same way
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_BINARY = {
    b"PK\x03\x04": "a zip file such as an Excel workbook",
    b"\xd0\xcf\x11\xe0": "an Excel workbook",
    b"\x1f\x8b": "a gzip file",
    b"PAR1": "a parquet file",
}
_LINE = re.compile("([^\r\n]*)(?:\r\n|\r|\n|\\Z)")
_Rows = Iterator[tuple[int, list[str]]]  # the number of a row's first line, and its cells


class _DamagedError(ValueError):
    """What is wrong with a row."""


@dataclass(frozen=True)
class Table:
    """Rows of stripped strings, without empty rows.

    Attributes:
        path: of the file.
        names: the header; empty if the table was read without one.
        rows: cells, as many in each row as there are names; without a header as many as the row has.
        lines: line number of each row in the file, from 1.
        delimiter: between cells.
    """

    path: Path | str
    names: list[str]
    rows: list[list[str]]
    lines: list[int]
    delimiter: str

    def column(self, name: str) -> list[str]:
        """The cells of a column, by row."""
        index = self.names.index(name)
        return [row[index] for row in self.rows]

    def place(self, row: int) -> str:
        """Line and path of a row, for errors."""
        return f"line {self.lines[row]} of {self.path}"


def read_table(path: str | os.PathLike, header: bool = True, fill: bool = False, comment: str | None = None) -> Table:
    """Read a delimited table.

    The delimiter is the comma, tab, semicolon or vertical bar that divides the header into several names and every row
    into as many cells; if several do, the extension's own (a comma in `.csv`, a tab in others), or else the first in
    this order. Cells may be quoted. Quotes that do not pair up are characters in a table with tabs, and an error in
    others. For encodings see `read_text`.

    Args:
        path: of the table.
        header: whether the first row names the columns. Without a header, rows may have different numbers of cells.
        fill: complete rows that are too short with empty cells. By default they are an error.
        comment: beginning of the lines to leave out.

    Raises:
        ValueError: a file that is not text, a header that repeats a name, or a row with fewer or more cells than the
            header, with its line. A table without rows is no error.
    """
    table = OpenTable(path, header, fill, comment)
    numbers, rows = [], []
    for number, cells in table.rows():
        numbers.append(number)
        rows.append(cells)
    return Table(table.path, table.names, rows, numbers, table.delimiter)


class OpenTable:
    """A delimited table that is checked when it is opened and divided again whenever its rows are read, so that only
    its text is in memory. Arguments and errors as of [`read_table`].

    Attributes:
        names: the header; empty if the table is read without one.
    """

    def __init__(self, path: str | os.PathLike, header: bool = True, fill: bool = False, comment: str | None = None):
        self.path = path if is_url(path) else Path(path)
        extension = os.path.splitext(url_path(os.fspath(path)))[1].lower()
        self._text, self._comment, self._header, self._fill = read_text(path), comment, header, fill
        own = _OF_EXTENSION.get(extension, "\t")
        self._mark = re.match(' *"?sep=(.)"? *(?=[\r\n]|\\Z)', self._text)  # Excel's
        self.delimiter, self._split, self._used = self._divide(self._mark[1] if self._mark else own)
        if self.delimiter != _OF_EXTENSION.get(extension, self.delimiter):
            name = _DELIMITERS.get(self.delimiter, repr(self.delimiter))
            logger.warning_once(f"the cells of {path} are separated by {name}")
        self.names: list[str] = []
        first = next(self._split(self._lines(), self.delimiter), None)
        if not header or first is None:
            return
        cells = [*first[1], *[""] * (max(self._used) + 1 - len(first[1]))]
        self.names = [cells[index] or f"Unnamed: {index}" for index in self._used]  # as pandas calls its index
        repeated = next((name for name, count in Counter(self.names).items() if count > 1), None)
        if repeated:
            what = f"expected the first row of {path} to name the columns"
            raise ValueError(f"{what}, each differently; got {repeated!r} more than once in {', '.join(self.names)}")

    def rows(self, names: Sequence[str] | None = None) -> _Rows:
        """The number of each row's first line, and its cells: in the columns `names`, or all of them."""
        rows = self._split(self._lines(), self.delimiter)
        if not self._header:
            yield from rows
            return
        next(rows, None)
        used = self._used if names is None else [self._used[self.names.index(name)] for name in names]
        for number, cells in rows:
            yield number, [cells[index] if index < len(cells) else "" for index in used]

    def column(self, name: str) -> Texts:
        """The cells of a column, by row."""
        return Texts(cells[0] for _, cells in self.rows([name]))

    def _lines(self) -> Iterator[tuple[int, str]]:
        for number, match in enumerate(_LINE.finditer(self._text), 1):
            line = match[1]
            if not (self._comment and line.lstrip().startswith(self._comment)) and not (number == 1 and self._mark):
                yield number, line

    def _divide(self, own: str) -> tuple[str, Callable[..., _Rows], list[int]]:
        """The delimiter, how rows are divided by it, and the places of the cells that are not always empty."""
        error = None  # by the first delimiter that divides the header
        for split in (_split_quoted, _split_plainly):
            for delimiter in (own, *(other for other in _DELIMITERS if other != own)):
                try:
                    used = self._check(split(self._lines(), delimiter), at_least=2)
                except _DamagedError as wrong:
                    error = error or wrong
                    continue
                if used:
                    if error and split is _split_plainly:
                        logger.warning_once(
                            f"quotes in {self.path} do not pair up and are read as characters: {error}"
                        )
                    return delimiter, split, used
        try:  # one column
            if error is None:
                return own, _split_quoted, self._check(_split_quoted(self._lines(), own), at_least=0)
        except _DamagedError as wrong:
            error = wrong
        raise ValueError(f"{error} of {self.path}")

    def _check(self, rows: _Rows, at_least: int) -> list[int]:
        """The places of the cells that are not always empty; none if the first row has fewer cells than `at_least`."""
        try:
            first = next(rows, None)
        except _DamagedError:
            if at_least:
                return []
            raise
        if first is None or len(first[1]) < at_least:
            return []
        header = first[1]
        least = max(index for index, name in enumerate(header, 1) if name)
        filled = {index for index, name in enumerate(header) if name}
        for number, cells in rows:
            filled.update(index for index, cell in enumerate(cells) if cell)
            if not self._header or len(cells) == len(header):
                continue
            count = max(index for index, cell in enumerate(cells, 1) if cell)
            if count > len(header) or (len(cells) < least and not self._fill):
                raise _DamagedError(
                    f"expected {len(header)} cells as in the header, got {len(cells)} in line {number}"
                )
        return sorted(filled)


def read_text(path: str | os.PathLike) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark; other text is read as Windows-1252,
    of which Latin-1 is a part, with a warning.

    Raises:
        ValueError: a file that is not text.
    """
    with stream_url(path) if is_url(path) else open(path, "rb") as file:
        content = file.read()
    kind = next((kind for start, kind in _BINARY.items() if content.startswith(start)), None)
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8" or b"\0" in content:
            raise ValueError(
                f"expected text in {path}, got {kind or f'damaged {encoding} ({error.reason})'}"
            ) from None
        text = _decode_windows(content, path)
        line = content.count(b"\n", 0, error.start)
        example = text.split("\n")[line].strip()
        what = f"{path} is not in UTF-8 and is read as Windows-1252, line {line + 1} for instance as {example!r}"
        logger.warning_once(f"{what}: save it as UTF-8 if that is wrong")
    if kind or "\0" in text:
        raise ValueError(f"expected text in {path}, got {kind or 'bytes of value 0: save it as UTF-8'}")
    return text.lstrip("\ufeff")


def _decode_windows(content: bytes, path: str | os.PathLike) -> str:
    try:
        return content.decode("cp1252")
    except UnicodeDecodeError:
        raise ValueError(f"expected text in UTF-8 or Windows-1252 in {path}, got neither: save it as UTF-8") from None


def _split_quoted(lines: Iterator[tuple[int, str]], delimiter: str) -> _Rows:
    """Rows of the format that the csv module calls strict."""
    numbers: list[int] = []  # of the lines of a row

    def texts() -> Iterator[str]:
        for number, line in lines:
            numbers.append(number)
            yield f"{line}\n"

    reader = csv.reader(texts(), delimiter=delimiter, skipinitialspace=True, strict=True)
    while True:
        numbers.clear()
        try:
            cells = [cell.strip() for cell in next(reader)]
        except StopIteration:
            return
        except csv.Error as error:
            raise _DamagedError(f"{error} in the row that begins in line {numbers[0]}") from None
        if any(cells):
            yield numbers[0], cells


def _split_plainly(lines: Iterator[tuple[int, str]], delimiter: str) -> _Rows:
    """Rows divided at every delimiter; quotes around a whole cell are removed, spaces beside them too."""
    for number, line in lines:
        cells = [cell.strip() for cell in line.split(delimiter)]
        if delimiter != "\t" and any(cell.startswith('"') != cell.endswith('"') for cell in cells):
            raise _DamagedError(f"quotes that do not pair up in line {number}")
        quoted = [len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in cells]
        cells = [cell[1:-1].replace('""', '"').strip() if inside else cell for inside, cell in zip(quoted, cells)]
        if any(cells):
            yield number, cells
