"""Tables of labels, as other programs and the package's own readers open them."""

import csv
import io
import json
import os
from pathlib import Path

import pandas
import pyarrow.parquet
import pytest
from odd_names import TEXTS, copy_with_odd_names

from asit_hf.corpus import label_tables
from asit_hf.corpus.label_tables import LabelTables, choose_format, choose_unit, clip_table
from asit_hf.data.event_tables import Event, read_strong_labels
from asit_hf.data.files import resolve_paths
from asit_hf.utils.names import local_path, path_text

# what delimiters, quotes, spreadsheets and encodings make trouble of
ODD = ('dog, "big"', "rain;wind", "line\nbreak", "tab\tbed", "=1+1", "☂ été", "10", "'quoted'")
LABELS = [{"label": name, "score": 0.9 - 0.1 * index} for index, name in enumerate(ODD)]
ERROR = {"file": "bad.wav", "error": 'cannot be read: "\udcff", 2 bytes'}


def event(start, end, label, score=0.5, file="a.wav"):
    return {"file": file, "start": start, "end": end, "label": label, "score": score}


ROWS = {
    "clip": [{"file": name, "labels": LABELS[index:]} for index, name in enumerate(TEXTS)]
    + [{"file": "quiet.wav", "labels": []}, ERROR],
    "window": [
        {"file": "a.wav", "start": 0.0, "end": 1.0, "labels": LABELS},
        {"file": "a.wav", "start": 0.5, "end": 1.5, "labels": []},
        {"file": "b.wav", "start": 0.0, "end": 0.7, "labels": LABELS[:1]},
        ERROR,
    ],
    "event": [
        *(event(index / 3, index / 3 + 0.5, label, file="sub/a.wav") for index, label in enumerate(ODD)),
        event(0.0, 36000.123456, "dog", file="sub/a.flac"),
        event(None, None, None, None, file="quiet.wav"),
        ERROR,
    ],
}


def write(tables: LabelTables, path: Path, rows: list[dict], at_once: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tables.open(path) as table:
        for start in range(0, len(rows), at_once):
            table.write(rows[start : start + at_once])


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("unit", ROWS)
def test_csv_has_a_row_per_label_and_at_least_one_per_clip(tmp_path, unit):
    write(LabelTables("csv", unit), tmp_path / "labels.csv", ROWS[unit])
    rows = read_csv(tmp_path / "labels.csv")
    times = [] if unit == "clip" else ["start", "end"]
    assert list(rows[0]) == ["file", *times, *([] if unit == "event" else ["rank"]), "label", "score", "error"]
    assert list(dict.fromkeys(row["file"] for row in rows)) == list(dict.fromkeys(row["file"] for row in ROWS[unit]))
    assert [row["label"] for row in rows[: len(ODD)]] == list(ODD)
    assert float(rows[1]["score"]) == pytest.approx(0.5 if unit == "event" else 0.8)
    assert rows[-1]["error"] == r'cannot be read: "\udcff", 2 bytes'
    assert not any(value for name, value in rows[-1].items() if name not in ("file", "error"))
    assert sum(not row["label"] for row in rows) == 2
    table = pandas.read_csv(tmp_path / "labels.csv")
    assert table["score"].dtype == float
    assert table["label"].isna().sum() == 2
    assert table["label"].iloc[2] == "line\nbreak"


def test_numbers_of_csv(tmp_path):
    row = {"file": "a.wav", "start": 0.1, "end": 10.12345, "labels": [{"label": "dog", "score": 0.12345678}]}
    write(LabelTables("csv", "window"), tmp_path / "labels.csv", [row])
    assert (tmp_path / "labels.csv").read_text() == (
        "file,start,end,rank,label,score,error\na.wav,0.100,10.123,1,dog,0.123457,\n"
    )


@pytest.mark.parametrize("unit", ROWS)
def test_parquet_has_the_rows_of_csv_with_types(tmp_path, unit, monkeypatch):
    monkeypatch.setattr(label_tables, "_ROW_GROUP", 5)
    for format in ("csv", "parquet"):
        write(LabelTables(format, unit), tmp_path / f"labels.{format}", ROWS[unit])
    file = pyarrow.parquet.ParquetFile(tmp_path / "labels.parquet")
    rows, expected = file.read().to_pylist(), read_csv(tmp_path / "labels.csv")
    assert file.num_row_groups > 1
    assert list(rows[0]) == list(expected[0])
    texts = {name: [row[name] or "" for row in rows] for name in ("file", "label", "error")}
    assert texts == {name: [row[name] for row in expected] for name in texts}
    numbers = dict.fromkeys(("start", "end", "score"), float) | {"rank": int}
    for name in numbers.keys() & rows[0].keys():
        assert {type(row[name]) for row in rows} <= {numbers[name], type(None)}
        values = [None if row[name] is None else pytest.approx(row[name], abs=1e-3) for row in rows]
        assert values == [float(row[name]) if row[name] else None for row in expected]
    types = dict(zip(file.schema_arrow.names, map(str, file.schema_arrow.types)))
    assert (types["file"], types["score"], types["label"]) == ("string", "float", "string")


@pytest.mark.parametrize("unit", ROWS)
def test_jsonl_and_json_hold_the_rows_themselves(tmp_path, unit):
    write(LabelTables("jsonl", unit), tmp_path / "labels.jsonl", ROWS[unit])
    assert [json.loads(line) for line in (tmp_path / "labels.jsonl").open(encoding="utf-8")] == ROWS[unit]
    LabelTables("json", unit).join([tmp_path / "labels.jsonl"], tmp_path / "labels.json")
    text = (tmp_path / "labels.json").read_text("utf-8")
    assert json.loads(text) == ROWS[unit]
    assert text.replace(r"\udcff", "\udcff") == json.dumps(ROWS[unit], indent=2, ensure_ascii=False) + "\n"
    (tmp_path / "none.jsonl").touch()
    LabelTables("json", unit).join([tmp_path / "none.jsonl"], tmp_path / "none.json")
    assert json.loads((tmp_path / "none.json").read_text()) == []


@pytest.mark.parametrize("unit", ROWS)
@pytest.mark.parametrize("format", ["csv", "jsonl", "parquet"])
def test_parts_are_joined_to_the_table_of_all_rows(tmp_path, unit, format):
    tables, rows = LabelTables(format, unit, tmp_path / "for tables of clips"), ROWS[unit]
    parts = [tmp_path / f"part-{number}{tables.suffix}" for number in range(3)]
    for part, some in zip(parts, (rows[:1], [], rows[1:])):
        write(tables, part, some)
    tables.join(parts, tmp_path / "joined")
    write(tables, tmp_path / "whole", rows)
    if format == "parquet":
        joined, whole = (pyarrow.parquet.read_table(tmp_path / name) for name in ("joined", "whole"))
        assert joined.equals(whole)
    else:
        assert (tmp_path / "joined").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_text_files_that_are_open_stay_open(tmp_path, format):
    tables, text = LabelTables(format, "clip"), io.StringIO(newline="")
    with tables.open(text) as table:
        table.write(ROWS["clip"][:-1])
    write(tables, tmp_path / "table", ROWS["clip"][:-1])
    assert text.getvalue() == (tmp_path / "table").read_bytes().decode()


def expected_events(rows: list[dict], digits: int = 6) -> dict[str, list[Event]]:
    events: dict[str, list[Event]] = {}
    for row in rows:
        of_file = events.setdefault(row["file"], [])
        if row.get("label") is not None:
            label = row["label"].replace("\n", " ").replace("\t", " ")
            of_file.append(Event(round(row["start"], digits), round(row["end"], digits), label))
    return events


@pytest.mark.parametrize("format", ["raven", "audacity"])
def test_a_table_per_clip_is_read_back(tmp_path, format):
    tables = LabelTables(format, "event", tmp_path / "out")
    write(tables, tmp_path / "out" / f"part-00000{tables.suffix}", ROWS["event"])
    files = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    assert files == ["part-00000.jsonl", "quiet.wav.txt", "sub/a.flac.txt", "sub/a.wav.txt"]
    assert read_strong_labels(tmp_path / "out") == expected_events(ROWS["event"][:-1])
    part = [json.loads(line) for line in (tmp_path / "out" / "part-00000.jsonl").open(encoding="utf-8")]
    assert part == ROWS["event"]  # with the error


@pytest.mark.parametrize("format", ["raven", "audacity"])
def test_tables_lead_to_files_of_any_name(tmp_path, format):
    (tmp_path / "clip.wav").touch()
    names = copy_with_odd_names(tmp_path / "clip.wav", tmp_path / "sounds" / "in")
    names = [path_text(f"in/{local_path(name)}") for name in names]
    rows = [event(0.0, 1.0, str(index), file=name) for index, name in enumerate(names)]
    write(LabelTables(format, "event", tmp_path / "out"), tmp_path / "out" / "part.jsonl", rows)
    events = read_strong_labels(tmp_path / "out")
    if format == "audacity":  # a name that leaves no space for .txt is shortened, and Audacity's tables have no other
        (name,) = [name for name in events if len(name) > 200]
        del events[name], rows[[len(name) > 200 for name in names].index(True)]
    files = resolve_paths(list(events), tmp_path / "sounds", "the tables")
    found = {events[name][0].label: Path(local_path(file)) for name, file in zip(events, files)}
    assert found == {row["label"]: tmp_path / "sounds" / local_path(row["file"]) for row in rows}


def test_csv_of_events_is_read_back(tmp_path):
    write(LabelTables("csv", "event"), tmp_path / "events.csv", ROWS["event"][:-1])
    events = read_strong_labels(tmp_path / "events.csv")
    labels = {file: [one.label for one in of_file] for file, of_file in events.items()}
    assert labels == {
        "sub/a.wav": list(ODD),
        "sub/a.flac": ["dog"],
        "quiet.wav": [],
    }
    assert events["sub/a.flac"] == [Event(0.0, 36000.123, "dog")]


@pytest.mark.parametrize("format", ["raven", "audacity"])
def test_one_table_of_one_clip(tmp_path, format):
    tables, path = LabelTables(format, "event", high_frequency=16000.0), tmp_path / "clip.txt"
    rows = [event(0.5, 1.25, "dog"), event(1.0, 3.0, "cat", 0.75)]
    for number, row in enumerate(rows):
        write(tables, tmp_path / f"{number}.jsonl", [row])
    parts = [tmp_path / "0.jsonl", tmp_path / "1.jsonl"]
    tables.join(parts, path)
    assert not list(tmp_path.glob("*.wav.txt"))
    (events,) = read_strong_labels(path).values()
    assert events == [Event(0.5, 1.25, "dog"), Event(1.0, 3.0, "cat")]
    write(tables, tmp_path / "2.jsonl", [event(0.0, 1.0, "dog", file="b.wav")])
    with pytest.raises(ValueError, match="one clip.*2"):
        tables.join([*parts, tmp_path / "2.jsonl"], path)
    write(tables, tmp_path / "2.jsonl", [ERROR])
    with pytest.raises(ValueError, match="bad.wav"):
        tables.join([tmp_path / "2.jsonl"], path)


def test_audacity_labels_are_start_end_and_label(tmp_path):
    write(LabelTables("audacity", "event"), tmp_path / "part.jsonl", [event(0.5, 36000.123456, "dog")])
    LabelTables("audacity", "event").join([tmp_path / "part.jsonl"], tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "0.500000\t36000.123456\tdog\n"


def test_raven_selections(tmp_path):
    tables = LabelTables("raven", "event", tmp_path / "out", high_frequency=4000.0)
    write(tables, tmp_path / "out" / "part.jsonl", [event(0.5, 1.25, "dog"), event(1.0, 3.0, "cat", 0.75)])
    table = pandas.read_csv(tmp_path / "out" / "a.wav.txt", sep="\t")
    assert table.to_dict("list") == {
        "Selection": [1, 2],
        "View": ["Spectrogram 1"] * 2,
        "Channel": [1, 1],
        "Begin Time (s)": [0.5, 1.0],
        "End Time (s)": [1.25, 3.0],
        "Low Freq (Hz)": [0.0, 0.0],
        "High Freq (Hz)": [4000.0, 4000.0],
        "Begin Path": ["a.wav"] * 2,
        "File Offset (s)": [0.5, 1.0],
        "Annotation": ["dog", "cat"],
        "Score": [0.5, 0.75],
    }


@pytest.mark.parametrize("format", ["raven", "audacity"])
def test_a_clip_that_cannot_be_read_to_its_end_has_no_table(tmp_path, format):
    tables = LabelTables(format, "event", tmp_path)
    rows = [event(0.0, 1.0, "dog", file="bad.wav"), ERROR, event(0.0, 1.0, "dog", file="good.wav")]
    write(tables, tmp_path / "part.jsonl", [rows[0]])
    assert (tmp_path / "bad.wav.txt").exists()
    write(tables, tmp_path / "part.jsonl", rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.wav.txt", "part.jsonl"]


@pytest.mark.parametrize(
    "events",
    [
        [event(0.0, 1.0, "dog")],
        [event(0.0, 3.0, "dog"), event(0.0, 1.0, "rain"), event(1.0, 2.0, "bell")],
        [event(None, None, None, None)],
    ],
)
def test_a_clip_in_several_rows_of_the_data_has_its_events_once(tmp_path, events):
    tables = LabelTables("audacity", "event", tmp_path)
    write(tables, tmp_path / "once.jsonl", events)
    expected = (tmp_path / "a.wav.txt").read_text()
    write(tables, tmp_path / "part.jsonl", 3 * events)
    assert (tmp_path / "a.wav.txt").read_text() == expected
    write(tables, tmp_path / "part.jsonl", [*events, {**ERROR, "file": "a.wav"}, *events, {**ERROR, "file": "a.wav"}])
    assert not (tmp_path / "a.wav.txt").exists()


def test_a_part_that_fails_writes_no_tables_of_clips(tmp_path):
    def rows():
        yield event(0.0, 1.0, "dog")
        raise OSError("full")

    tables = LabelTables("raven", "event", tmp_path)
    with pytest.raises(OSError, match="full"), tables.open(tmp_path / "part") as table:
        table.write(rows())
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


NAMES = [
    *("clip.wav", "clip.flac", "clip", "a/clip.wav", "b/clip.wav", "../clip.wav", "a/../../clip.wav", "./clip.wav"),
    *(
        "/clip.wav",
        "//clip.wav",
        "a//clip.wav",
        "..",
        ".",
        "a/..",
        "s3://bucket/clip.wav",
        "https://host/clip.wav?x=1",
    ),
    *(r"..\clip.wav", r"C:\clip.wav", "C:clip.wav", "file:///a/..%2F..%2Fclip.wav", "n" * 255, "n" * 254 + "m"),
    *(f"{'ü' * 127}/{'ü' * 127}", *TEXTS, "a/", "zip/clip.wav#2"),
]


def test_tables_of_clips_are_in_the_folder_and_do_not_collide(tmp_path):
    folder = tmp_path / "out"
    paths = [clip_table(folder, name) for name in NAMES]
    assert len({os.path.normpath(path) for path in paths}) == len(NAMES)
    for path in paths:
        assert os.path.normpath(path).startswith(f"{folder}{os.sep}")
        assert ".." not in path.parts
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(exist_ok=False)
        path.with_name(f".{path.name}.unfinished").touch()
    assert clip_table(folder, "a/b/clip.wav") == folder / "a" / "b" / "clip.wav.txt"


@pytest.mark.parametrize(
    ("output", "format", "num_clips", "expected"),
    [
        (None, None, 5, "csv"),
        (None, "jsonl", None, "jsonl"),
        ("folder", None, None, "csv"),
        ("folder", "raven", None, "raven"),
        ("table.CSV", None, 3, "csv"),
        ("table.json", None, 3, "json"),
        ("table.parquet", "parquet", None, "parquet"),
        ("table.txt", "audacity", 1, "audacity"),
    ],
)
def test_formats(output, format, num_clips, expected):
    assert choose_format(output and Path(output), format, num_clips) == expected


@pytest.mark.parametrize(
    ("output", "format", "num_clips", "match"),
    [
        ("table.xlsx", None, 3, "table.xlsx"),
        ("table.csv", "xlsx", 3, "xlsx"),
        ("table.txt", None, 1, "raven or audacity.*table.txt"),
        ("table.csv", "raven", 1, r"\.txt.*table\.csv"),
        ("table.txt", "csv", 1, r"\.csv.*table\.txt"),
        (None, "parquet", 1, "--output"),
        (None, "raven", 1, "--output"),
        ("folder", "json", 1, "json.*folder"),
        ("table.txt", "raven", 3, "folder.*3 clips"),
        ("table.txt", "audacity", None, "folder.*stream"),
    ],
)
def test_outputs_that_cannot_have_a_format(output, format, num_clips, match):
    with pytest.raises(ValueError, match=match):
        choose_format(output and Path(output), format, num_clips)


def test_folders_may_have_a_dot(tmp_path):
    (tmp_path / "sounds.wav").mkdir()
    assert choose_format(tmp_path / "sounds.wav", "raven", None) == "raven"
    assert choose_format(tmp_path / "v1.0", None, None) == "csv"


def test_units():
    assert [choose_unit("csv"), choose_unit("csv", timeline=True), choose_unit("csv", events=True)] == [
        *("clip", "window", "event")
    ]
    assert [choose_unit("raven"), choose_unit("json", timeline=True)] == ["event", "timeline"]
    for options in ({"format": "raven", "timeline": True}, {"format": "csv", "timeline": True, "events": True}):
        with pytest.raises(ValueError, match="both"):
            choose_unit(**options)
