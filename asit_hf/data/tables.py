"""Delimited tables (csv, tsv, txt) as people have them: any usual delimiter and encoding, checked row by row."""

import codecs
import csv
import logging
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

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
_Lines = list[tuple[int, str]]  # line numbers and lines
_Rows = list[tuple[int, list[str]]]  # line numbers and cells


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

    path: Path
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
    path = Path(path)
    lines = list(enumerate(re.split("\r\n|\r|\n", read_text(path)), 1))
    own = _OF_EXTENSION.get(path.suffix.lower(), "\t")
    if mark := re.fullmatch('"?sep=(.)"?', lines[0][1].strip(" ")):  # Excel's
        own, lines = mark[1], lines[1:]
    lines = [(number, line) for number, line in lines if not (comment and line.lstrip().startswith(comment))]
    delimiter, rows = _divide(lines, own, header, fill, path)
    if delimiter != _OF_EXTENSION.get(path.suffix.lower(), delimiter):
        logger.warning_once(f"the cells of {path} are separated by {_DELIMITERS.get(delimiter, repr(delimiter))}")
    numbers, cells = [number for number, _ in rows], [row for _, row in rows]
    if not header or not rows:
        return Table(path, [], cells, numbers, delimiter)
    width = max(map(len, cells))
    cells = [row + [""] * (width - len(row)) for row in cells]
    used = [index for index in range(width) if any(row[index] for row in cells)]  # Excel writes empty columns
    cells = [[row[index] for index in used] for row in cells]
    names = [name or f"Unnamed: {index}" for index, name in zip(used, cells[0])]  # as pandas calls its index
    repeated = next((name for name, count in Counter(names).items() if count > 1), None)
    if repeated:
        what = f"expected the first row of {path} to name the columns"
        raise ValueError(f"{what}, each differently; got {repeated!r} more than once in {', '.join(names)}")
    return Table(path, names, cells[1:], numbers[1:], delimiter)


def read_text(path: str | os.PathLike) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark; other text is read as Windows-1252,
    of which Latin-1 is a part, with a warning.

    Raises:
        ValueError: a file that is not text.
    """
    content = Path(path).read_bytes()
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


def _divide(lines: _Lines, own: str, header: bool, fill: bool, path: Path) -> tuple[str, _Rows]:
    """The delimiter of a table, and its rows with the header."""
    error = None  # by the first delimiter that divides the header
    for split in (_split_quoted, _split_plainly):
        for delimiter in (own, *(other for other in _DELIMITERS if other != own)):
            rows, wrong = split(lines, delimiter)
            wrong = wrong or (_check_widths(rows, fill) if header else None)
            if rows and len(rows[0][1]) > 1:
                if wrong is None:
                    if error and split is _split_plainly:
                        logger.warning_once(f"quotes in {path} do not pair up and are read as characters: {error}")
                    return delimiter, rows
                error = error or wrong
    rows, wrong = _split_quoted(lines, own)  # one column
    error = error or wrong or (_check_widths(rows, fill) if header else None)
    if error:
        raise ValueError(f"{error} of {path}")
    return own, rows


def _split_quoted(lines: _Lines, delimiter: str) -> tuple[_Rows, str | None]:
    """Rows of the format that the csv module calls strict, up to the first error, and that error."""
    text = (f"{line}\n" for _, line in lines)
    reader = csv.reader(text, delimiter=delimiter, skipinitialspace=True, strict=True)
    rows: _Rows = []
    while True:
        start = reader.line_num
        try:
            cells = [cell.strip() for cell in next(reader)]
        except StopIteration:
            return rows, None
        except csv.Error as error:
            return rows, f"{error} in the row that begins in line {lines[start][0]}"
        if any(cells):
            rows.append((lines[start][0], cells))


def _split_plainly(lines: _Lines, delimiter: str) -> tuple[_Rows, str | None]:
    """Rows divided at every delimiter; quotes around a whole cell are removed, spaces beside them too."""
    rows: _Rows = []
    for number, line in lines:
        cells = [cell.strip() for cell in line.split(delimiter)]
        if delimiter != "\t" and any(cell.startswith('"') != cell.endswith('"') for cell in cells):
            return rows, f"quotes that do not pair up in line {number}"
        quoted = [len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in cells]
        cells = [cell[1:-1].replace('""', '"').strip() if inside else cell for inside, cell in zip(quoted, cells)]
        if any(cells):
            rows.append((number, cells))
    return rows, None


def _check_widths(rows: _Rows, fill: bool) -> str | None:
    """What is wrong with the first row that has fewer or more cells than the header, without empty ones at the end."""
    if not rows:
        return None
    header = rows[0][1]
    least = max(index for index, name in enumerate(header, 1) if name)
    for number, cells in rows:
        filled = max(index for index, cell in enumerate(cells, 1) if cell)
        if filled > len(header) or (len(cells) < least and not fill):
            return f"expected {len(header)} cells as in the header, got {len(cells)} in line {number}"
    return None
