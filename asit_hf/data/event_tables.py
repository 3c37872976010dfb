"""Tables of events with onset and offset: DCASE, AudioSet, Raven, BirdNET, Audacity and their like."""

import csv
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from .formats import AUDIO_EXTENSIONS
from .tables import TABLE_EXTENSIONS, Table, read_table

logger = logging.getLogger(__name__)

# Names of columns, in order of preference, in lower case and without spaces and signs. Times may end in a unit.
_COLUMNS = {
    "file": "filename segmentid file beginfile audiofilename audiofile infile fname audio path filepath audiopath "
    "beginpath recording recordingid soundfile wav wavfile clip clipname clipid audioid fileid",
    "onset": "onset start begin starttime begintime onsettime eventonset eventstart timestart tstart tmin xmin from",
    "offset": "offset end stop endtime stoptime offsettime eventoffset eventend timeend tend tmax xmax to",
    "duration": "duration length eventduration deltatime",
    "label": "eventlabel label labels class classname eventclass soundevent event category commonname species "
    "annotation annotations tag tags primarylabel calltype soundtype manualid speciesname scientificname speciescode",
    "file offset": "fileoffset",  # onset in the file, where Raven's other times count from the first of several files
}
_COLUMNS = {role: names.split() for role, names in _COLUMNS.items()}
_UNITS = dict.fromkeys(
    ("", "s", "sec", "secs", "second", "seconds", "mmss", "hhmmss", "hhmmssms", "ssmsec"), 1.0
)  # the last two are ELAN's
_UNITS |= dict.fromkeys(("ms", "msec", "millisecond", "milliseconds"), 1e-3)
_TIME = re.compile(r"[+-]?(\d+:){0,2}(\d+[.,]?\d*|[.,]\d+)([eE][+-]?\d+)?")
# what Raven and BirdNET append to the name of the audio file
_SUFFIX = re.compile(r"(\.table\.\d+)?(\.selections?(\.table)?)?$|\.birdnet\..*$", re.IGNORECASE)
_FREQUENCIES = "\\"  # begins Audacity's lines of frequencies
_HEADER = ("filename", "onset", "offset", "event_label")
POINT_SECONDS = 0.16


class Event(NamedTuple):
    """`onset` and `offset` in seconds, and the class name."""

    onset: float
    offset: float
    label: str


class _Row(NamedTuple):
    file: str
    event: Event | None
    place: str


def read_strong_labels(path: str | os.PathLike, label_column: str | None = None) -> dict[str, list[Event]]:
    """Events by file, in the order of the table, sorted by onset within each file.

    Tables have columns for the file, the onset, the offset or the duration, and the label, under the names of DCASE
    (`filename onset offset event_label`), AudioSet (`segment_id start_time_seconds end_time_seconds label`), Raven
    (`Begin Time (s)`, `Begin File`, ...), BirdNET (`Start (s)`, `Common name`, ...) and similar ones. Times are in
    seconds, or in milliseconds if the column's name says so (`onset_ms`). Tables without a header have onset, offset
    and label in this order, as Audacity writes them, and before them the file or none. Other columns are ignored.

    A row with only a file name denotes a clip without events. An event without duration gets `POINT_SECONDS` around
    it, and rows that repeat an event, such as Raven's views, count once; both are counted in a warning.

    Args:
        path: a table (csv, tsv, txt), or a folder of tables. A table that names no files belongs to the audio file of
            its own name: `a.txt` or `a.Table.1.selections.txt` to `a.wav`. Files of a folder without rows of times,
            such as `README.txt`, are left out with a warning.
        label_column: name of the labels' column; by default the first of the usual names.

    Raises:
        ValueError: a missing column, or times that are not numbers or not in order; the message has the line.
    """
    path, tables = Path(path), [Path(path)]
    if path.is_dir():
        tables = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in TABLE_EXTENSIONS]
        tables = [file for file in tables if not file.name.startswith(".")]
    events: dict[str, list[Event]] = {}
    points, seen, repeated, left_out = [], set(), [], []
    for table in tables:
        stem = table.relative_to(path).with_suffix("").as_posix() if path.is_dir() else table.stem
        try:
            rows = _read_rows(table, _SUFFIX.sub("", stem), label_column, path.is_dir())
        except ValueError as error:
            if not path.is_dir() or _has_times(table):
                raise
            left_out.append(str(error))
            continue
        for file, event, place in rows:
            of_file = events.setdefault(file, [])
            if event is None:
                continue
            if event.onset == event.offset:
                points.append(f"{event.label} at {event.onset:g} s in {place}")
                onset = max(0.0, event.onset - POINT_SECONDS / 2)
                event = Event(onset, onset + POINT_SECONDS, event.label)
            if (file, event) in seen:
                repeated.append(place)
                continue
            seen.add((file, event))
            of_file.append(event)
    if not events:
        raise ValueError(left_out[0] if left_out else f"no rows in {path}")
    if left_out:
        logger.warning(
            "%d of %d files of %s hold no events and are left out: %s", len(left_out), len(tables), path, left_out[0]
        )
    if points:
        logger.warning("%d events have no duration and get %g s, first %s", len(points), POINT_SECONDS, points[0])
    if repeated:
        logger.warning("%d rows that repeat an event count once, first %s", len(repeated), repeated[0])
    return {file: sorted(of_file) for file, of_file in events.items()}


def write_strong_labels(path: str | os.PathLike, events: Mapping[str, Iterable[Event]]) -> None:
    """Writes events as a tsv with DCASE's columns and times in milliseconds, for `read_strong_labels` to read."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(_HEADER)
        for name, of_file in events.items():
            rows = [(name, f"{event.onset:.3f}", f"{event.offset:.3f}", event.label) for event in of_file]
            writer.writerows(rows or [(name, "", "", "")])


def event_names(events: Mapping[str, Iterable[Event]]) -> list[str]:
    """Sorted class names of all events."""
    return sorted({event.label for of_file in events.values() for event in of_file})


def _read_rows(path: Path, own_file: str, label_column: str | None, one_of_many: bool) -> list[_Row]:
    """The rows of a table. `own_file` is the file of all rows, if the table does not name files."""
    table = _divide_words(read_table(path, header=False, comment=_FREQUENCIES))
    first = table.rows[0] if table.rows else []
    if ("onset" in _find_columns(first) or len(first) > 2) and not any(map(_TIME.fullmatch, first)):
        table = read_table(path, fill=True)
        if len(table.names) == 1:
            table = _divide_words(table)
        rows = _rows_with_header(table, own_file, label_column)
    else:
        rows = _rows_without_header(table, own_file)
    return rows or [_Row(own_file, None, str(path))] if one_of_many else rows


def _has_times(path: Path) -> bool:
    """Whether any row has two times next to each other."""
    rows = _divide_words(read_table(path, header=False)).rows
    return any(_TIME.fullmatch(one) and _TIME.fullmatch(other) for row in rows for one, other in pairwise(row))


def _divide_words(table: Table) -> Table:
    """A table of one column divided at spaces, of which the last column may have some."""
    if any(len(row) > 1 for row in table.rows):
        return table
    if table.names:
        names = table.names[0].split()
        counts = [len(names) - 1] * len(table.rows)
    else:
        names, counts = [], [2 if _TIME.fullmatch(row[0].split()[0]) else 3 for row in table.rows]
    rows = [row[0].split(maxsplit=count) for row, count in zip(table.rows, counts)]
    rows = [row + [""] * (len(names) - len(row)) for row in rows]
    return replace(table, names=names, rows=rows)


def _find_columns(names: Sequence[str], label_column: str | None = None) -> dict[str, tuple[int, float]]:
    """Index and unit in seconds of each column that is found."""
    squeezed = [re.sub(r"[\W_]+", "", name.lower()) for name in names]
    found = {}
    for role, usual in _COLUMNS.items():
        units = {"": 1.0} if role in ("file", "label") else _UNITS
        hits = (
            (squeezed.index(name + unit), units[unit]) for name in usual for unit in units if name + unit in squeezed
        )
        if hit := next(hits, None):
            found[role] = hit
    if label_column is not None:
        found.pop("label", None)
        found |= {"label": (names.index(label_column), 1.0)} if label_column in names else {}
    if "onset" not in found and {"offset", "duration"} <= set(found):  # Kaleidoscope calls the onset OFFSET
        found["onset"] = found.pop("offset")
    return found


def _rows_with_header(table: Table, own_file: str, label_column: str | None) -> list[_Row]:
    columns = _find_columns(table.names, label_column)
    if "file" not in columns:
        is_audio = [all(cell.lower().endswith(AUDIO_EXTENSIONS) for cell in cells) for cells in zip(*table.rows)]
        if any(is_audio):
            columns["file"] = is_audio.index(True), 1.0
            logger.warning("files of %s: column %s", table.path, table.names[columns["file"][0]])
    end = "offset" if "offset" in columns else "duration"
    wanted = {"onset": "onset", end: "offset or duration", "label": label_column or "event_label or label"}
    for role, name in wanted.items():
        if role not in columns:
            raise ValueError(f"expected a column {name} in {table.path}, got {', '.join(table.names)}")
    roles = [role for role in ("onset", end, "file offset") if role in columns]
    rows = []
    for number, row in enumerate(table.rows):
        place = table.place(number)
        file = row[columns["file"][0]] if "file" in columns else own_file
        if not file:
            raise ValueError(f"expected a file name in {place}, got an empty field")
        texts, label = [row[columns[role][0]] for role in roles], row[columns["label"][0]]
        if all(cell.lower() in ("", "nan") for cell in (*texts, label)):
            rows.append(_Row(file, None, place))
            continue
        onset, offset, *moved = (
            time * columns[role][1] for role, time in zip(roles, _parse_times(texts, place), strict=True)
        )
        duration = offset if end == "duration" else offset - onset
        start = moved[0] if moved else onset
        stop = offset if end == "offset" and not moved else start + duration
        rows.append(_Row(file, _check_event(start, stop, label, place), place))
    return rows


def _rows_without_header(table: Table, own_file: str) -> list[_Row]:
    cells = table.rows
    onsets = [_find_onset(row) for row in cells]
    first = next((index for index in onsets if index is not None), None)
    if cells and first is None:
        got = ", ".join(cells[0])
        raise ValueError(f"expected a header, or onset, offset and label in each row, in {table.path}; got {got}")
    row = onsets.index(first) if cells else 0
    if first and first > 1 and all(map(_TIME.fullmatch, cells[row][first - 2 : first])):
        got = f"{', '.join(cells[row])} in {table.place(row)}"
        raise ValueError(f"expected onset, offset and label, got {got}: put a first row with names above the columns")
    rows = []
    for number, row in enumerate(cells):
        place, event = table.place(number), None
        if any(row[first:]):
            onset, offset, label = [*row[first:], "", "", ""][:3]
            event = _check_event(*_parse_times((onset, offset), place), label, place)
        rows.append(_Row(row[0] if first else own_file, event, place))
    return rows


def _find_onset(row: Sequence[str]) -> int | None:
    """The first of two times before a label; the file before them may be called by a number."""
    are_times = [bool(_TIME.fullmatch(cell)) for cell in row]
    pairs = [index for index in range(len(row) - 2) if are_times[index] and are_times[index + 1]]
    return next((index for index in pairs if not are_times[index + 2]), pairs[0] if pairs else None)


def _parse_times(texts: Sequence[str], place: str) -> list[float]:
    """Numbers, also with a decimal comma, or [hours:]minutes:seconds."""
    if not all(map(_TIME.fullmatch, texts)):
        raise ValueError(f"expected times in seconds, got {' and '.join(map(repr, texts))} in {place}")
    times = []
    for text in texts:
        seconds = 0.0
        for part in text.replace(",", ".").split(":"):
            seconds = 60 * seconds + float(part)
        times.append(seconds)
    return times


def _check_event(onset: float, offset: float, label: str, place: str) -> Event:
    if not 0 <= onset <= offset < float("inf"):
        raise ValueError(f"expected 0 <= onset <= offset, got {onset:g} and {offset:g} in {place}")
    if not label:
        raise ValueError(f"expected a label for the event in {place}, got an empty field")
    return Event(onset, offset, label)
