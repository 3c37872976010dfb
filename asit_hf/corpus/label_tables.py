"""Tables of labels: csv, jsonl, json and parquet, and per audio file the tables of Raven and Audacity."""

import csv
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, TextIO

from ..utils.extras import extra
from ..utils.files import is_file, whole_file

# extensions of a single output file
EXTENSIONS = {
    "csv": ".csv",
    "jsonl": ".jsonl",
    "json": ".json",
    "parquet": ".parquet",
    "raven": ".txt",
    "audacity": ".txt",
}
FORMATS = tuple(EXTENSIONS)
EVENT_FORMATS = ("raven", "audacity")
_COLUMNS = {
    "clip": ("file", "rank", "label", "score", "error"),
    "window": ("file", "start", "end", "rank", "label", "score", "error"),
    "event": ("file", "start", "end", "label", "score", "error"),
}
# as Raven names them; Begin Path and File Offset are those of BirdNET-Analyzer
_RAVEN = ("Selection", "View", "Channel", "Begin Time (s)", "End Time (s)", "Low Freq (Hz)", "High Freq (Hz)")
_RAVEN += ("Begin Path", "File Offset (s)", "Annotation", "Score")
_ROW_GROUP = 2**16
_UTF8 = {"encoding": "utf-8", "errors": "backslashreplace"}  # labels and messages may have lone surrogates
_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029]")
_LEADS_ELSEWHERE = re.compile(r"[\\\0-\x1f]|(?<=^[A-Za-z]):")
_NAME_BYTES = 240  # of a file name; `whole_file` needs some of the 255 that file systems allow


class Table(Protocol):
    """Takes rows of `asit_hf.corpus.labels.ClipRows`."""

    def write(self, rows: Iterable[dict[str, Any]]) -> None: ...


def choose_format(output: Path | None, format: str | None, num_clips: int | None) -> str:
    """
    The format of the output, which is a folder if it has no extension, or standard output if it is `None`.

    Args:
        output, format: as given by the user, or `None`; the format then follows from the extension, or else is csv.
        num_clips (`int`, *optional*): of the corpus, if known.

    Raises:
        ValueError: an output that cannot have the format.
    """
    suffix = output.suffix.lower() if output is not None and is_file(output) else ""
    known = [name for name in FORMATS if EXTENSIONS[name] == suffix]
    if suffix and not known:
        extensions = ", ".join(dict.fromkeys(EXTENSIONS.values()))
        raise ValueError(f"expected a folder for --output, or a file with one of {extensions}, got {output}")
    if format is None and len(known) > 1:
        raise ValueError(f"expected --format {' or '.join(known)} for {output}, got none")
    format = format or (known[0] if known else "csv")
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if suffix and format not in known:
        folder = "" if format == "json" else " or a folder"
        raise ValueError(f"expected a file {EXTENSIONS[format]}{folder} for {format} tables, got {output}")
    if output is None and format not in ("csv", "jsonl"):
        raise ValueError(f"expected --output for {format} tables, got none; standard output is csv or jsonl")
    if not suffix and format == "json":
        raise ValueError(f"expected a file .json, got the folder {output}; the parts of a folder can be jsonl")
    if suffix and format in EVENT_FORMATS and num_clips != 1:
        got = "a stream of clips" if num_clips is None else f"{num_clips} clips"
        raise ValueError(f"expected a folder for --output, for one {format} table per clip, got {output} for {got}")
    return format


def choose_unit(format: str, timeline: bool = False, events: bool = False) -> str:
    """
    What a row is about, see `asit_hf.corpus.labels.ClipRows`: a clip, a window with `timeline` (json holds both in one
    object per clip), or an event, always in tables of Raven and Audacity.

    Raises:
        ValueError: windows in a table of events.
    """
    events = events or format in EVENT_FORMATS
    if events and timeline:
        raise ValueError(f"expected either events or a timeline of all windows, got both; {format} tables hold events")
    return "event" if events else ("timeline" if format == "json" else "window") if timeline else "clip"


@dataclass(frozen=True)
class LabelTables:
    """
    Parts of tables, and one table of all parts.

    Args:
        format (`str`): one of `FORMATS`.
        unit (`str`): what a row is about, see `choose_unit`.
        folder (`Path`, *optional*): for the tables of Raven and Audacity, one per clip, see `clip_table`. Others have
            no use for it.
        high_frequency (`float`): upper edge of Raven's selections in Hz: half the model's sampling rate.
    """

    format: str
    unit: str = "clip"
    folder: Path | None = None
    high_frequency: float = 8000.0

    @property
    def suffix(self) -> str:
        """Extension of a part. Those of json, Raven and Audacity are jsonl, which has a place for errors."""
        return EXTENSIONS[self.format] if self.format in ("csv", "parquet") else ".jsonl"

    @contextmanager
    def open(self, path: Path | TextIO) -> Iterator[Table]:
        """
        A table for the rows of a part; csv and jsonl may also go to an open text file. With `folder`, the tables of
        its clips are written at the end, each whole or absent, and empty for a clip without events. A clip with an
        error has none: its row in the part says why.
        """
        if self.format == "parquet":
            with closing(_ParquetTable(path, self.unit)) as table:
                yield table
        else:
            with _text_file(path) as file:
                yield _CsvTable(file, self.unit) if self.format == "csv" else _JsonLines(file)
        if self.format in EVENT_FORMATS and self.folder is not None:
            self._write_clip_tables(path)

    def join(self, parts: Sequence[Path], path: Path) -> None:
        """
        Writes one table of all parts, in order.

        Raises:
            ValueError: for Raven and Audacity, more or less than one clip, or one that cannot be read.
        """
        if self.format == "parquet":
            with closing(_ParquetTable(path, self.unit)) as table:
                for part in parts:
                    table.copy(part)
        elif self.format == "json":
            _write_json(_read_rows(parts), path)
        elif self.format in EVENT_FORMATS:
            clips = [self._write_clip_table(rows, path) or file for file, rows in _by_clip(parts)]
            if len(clips) != 1:
                raise ValueError(f"expected one clip for {path}, got {len(clips)}")
        else:
            with path.open("wb") as joined:
                for number, part in enumerate(parts):
                    with part.open("rb") as file:
                        if number and self.format == "csv":
                            file.readline()  # the header
                        shutil.copyfileobj(file, joined)

    def _write_clip_tables(self, part: Path) -> None:
        for file, rows in _by_clip([part]):
            path = clip_table(self.folder, file)
            try:
                with whole_file(path) as unfinished:
                    self._write_clip_table(rows, unfinished)
            except _UnreadableClip:
                path.unlink(missing_ok=True)

    def _write_clip_table(self, rows: Iterable[dict[str, Any]], path: Path) -> None:
        with path.open("w", newline="", **_UTF8) as file:
            if self.format == "raven":
                file.write("\t".join(_RAVEN) + "\n")
            number = 0
            for row in rows:
                if "error" in row:
                    raise _UnreadableClip(f"cannot read {row['file']}: {row['error']}")
                if row["label"] is None:
                    continue
                number += 1
                start, end, label = f"{row['start']:.6f}", f"{row['end']:.6f}", _CONTROL.sub(" ", row["label"])
                cells = (start, end, label)
                if self.format == "raven":
                    frequencies = "0.0", f"{self.high_frequency:.1f}"
                    place = _CONTROL.sub(" ", row["file"]), start
                    cells = (str(number), "Spectrogram 1", "1", start, end, *frequencies, *place, label)
                    cells += (f"{row['score']:.6f}",)
                file.write("\t".join(cells) + "\n")


def clip_table(folder: Path, file: str) -> Path:
    """
    The table of a clip: `a/b/clip.wav.txt` in `folder` for `a/b/clip.wav`. What leads elsewhere is escaped as in URLs:
    `..`, the `/` of absolute names and URLs, backslashes and drives. Names that are too long end in a hash.
    """
    *parents, name = file.split("/")
    return folder.joinpath(*(_escaped(parent) for parent in parents), _escaped(name, ".txt"))


class _UnreadableClip(ValueError):
    pass


class _CsvTable:
    def __init__(self, file: TextIO, unit: str):
        self._writer = csv.DictWriter(file, _COLUMNS[unit], lineterminator="\n")
        self._writer.writeheader()

    def write(self, rows: Iterable[dict[str, Any]]) -> None:
        for row in _flat(rows):
            texts = {name: f"{row[name]:.3f}" for name in ("start", "end") if row.get(name) is not None}
            if row.get("score") is not None:
                texts["score"] = f"{row['score']:.6f}"
            self._writer.writerow({**row, **texts})


class _JsonLines:
    def __init__(self, file: TextIO):
        self._file = file

    def write(self, rows: Iterable[dict[str, Any]]) -> None:
        self._file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class _ParquetTable:
    """The columns of csv with types; one row group waits in memory."""

    def __init__(self, path: Path, unit: str):
        with extra():
            import pyarrow
            import pyarrow.parquet
        types = {"start": pyarrow.float64(), "end": pyarrow.float64(), "rank": pyarrow.int32()}
        types["score"] = pyarrow.float32()
        self._schema = pyarrow.schema([(name, types.get(name, pyarrow.string())) for name in _COLUMNS[unit]])
        self._arrow = pyarrow
        self._writer = pyarrow.parquet.ParquetWriter(path, self._schema, compression="zstd")
        self._waiting: list[Any] = []
        self._num_waiting = 0

    def write(self, rows: Iterable[dict[str, Any]]) -> None:
        rows = [{name: _clean(value) for name, value in row.items()} for row in _flat(rows)]
        self._add(self._arrow.Table.from_pylist(rows, self._schema))

    def copy(self, part: Path) -> None:
        with self._arrow.parquet.ParquetFile(part) as file:
            for batch in file.iter_batches(_ROW_GROUP):
                self._add(self._arrow.Table.from_batches([batch], self._schema))

    def _add(self, table: Any) -> None:
        self._waiting.append(table)
        self._num_waiting += len(table)
        if self._num_waiting >= _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(self._arrow.concat_tables(self._waiting).combine_chunks())
        self._waiting, self._num_waiting = [], 0

    def close(self) -> None:
        self._flush()
        self._writer.close()


@contextmanager
def _text_file(path: Path | TextIO) -> Iterator[TextIO]:
    if not isinstance(path, (str, os.PathLike)):
        yield path
        return
    with open(path, "w", newline="", **_UTF8) as file:
        yield file


def _clean(value: Any) -> Any:
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _flat(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row per label; one without a label where there is none."""
    for row in rows:
        labels = row.get("labels")
        row = {name: value for name, value in row.items() if name != "labels"}
        yield from ({**row, "rank": rank, **label} for rank, label in enumerate(labels or [], start=1))
        if not labels:
            yield row


def _read_rows(parts: Iterable[Path]) -> Iterator[dict[str, Any]]:
    for part in parts:
        with part.open(encoding="utf-8") as file:
            yield from map(json.loads, file)


def _by_clip(parts: Iterable[Path]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """
    The events of each clip, which are in order; of clips with the same name, those of the last. A clip never has a
    label twice from the same start.
    """
    for file, rows in groupby(_read_rows(parts), key=lambda row: row["file"]):
        clip: list[dict[str, Any]] = []
        places: set[tuple[float, str | None]] = set()
        last = 0.0
        for row in rows:
            start, label = row.get("start") or 0.0, row.get("label")
            if start < last or (start, label) in places:
                clip, places = [], set()
            clip.append(row)
            places.add((start, label))
            last = start
        yield file, clip


def _write_json(rows: Iterator[dict[str, Any]], path: Path) -> None:
    """A list, as `json.dump` would write it with an indent of 2, one row in memory."""
    with path.open("w", **_UTF8) as file:
        separator = "["
        for row in rows:
            text = json.dumps(row, indent=2, ensure_ascii=False).replace("\n", "\n  ")
            file.write(f"{separator}\n  {text}")
            separator = ","
        file.write("[]\n" if separator == "[" else "\n]\n")


def _escaped(name: str, suffix: str = "") -> str:
    """One name of a path."""
    name = {"": "%2F", ".": "%2E", "..": "%2E%2E"}.get(name, name)
    name = _LEADS_ELSEWHERE.sub(lambda match: f"%{ord(match[0]):02X}", name)
    content = os.fsencode(name)
    if len(content) + len(suffix) > _NAME_BYTES:
        digest = blake2b(content, digest_size=8).hexdigest()
        name = content[: _NAME_BYTES - len(suffix) - len(digest) - 1].decode("utf-8", "ignore") + "-" + digest
    return name + suffix
