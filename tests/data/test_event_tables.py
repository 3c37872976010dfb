import pytest

from asit_hf.data.event_tables import Event, event_names, read_strong_labels, write_strong_labels

DCASE = "filename\tonset\toffset\tevent_label\na.wav\t1.5\t2.25\tDog\na.wav\t0.0\t1.0\tSpeech\nquiet.wav\t\t\t\n"
AUDIOSET = "segment_id\tstart_time_seconds\tend_time_seconds\tlabel\nYx_30000\t0.5\t10.0\t/m/04rlf\n"
BIRDNET = """Start (s),End (s),Scientific name,Common name,Confidence,File
0.0,3.0,Troglodytes troglodytes,Wren,0.9,a.wav
3.0,6.0,Erithacus rubecula,Robin,0.8,a.wav
"""
# two views of each selection; begin and end count from the first of the files
RAVEN = "\t".join(["Selection", "View", "Begin Time (s)", "End Time (s)", "Begin File", "File Offset (s)", "Species"])
for selection in ("{}\t{}\t1.0\t2.0\ta.wav\t1.0\tdog", "{}\t{}\t10.5\t11.5\tb.wav\t0.5\tdog"):
    RAVEN += "".join("\n" + selection.format(len(RAVEN), view) for view in ("Waveform 1", "Spectrogram 1"))
DOG = {"a.wav": [Event(1.0, 2.0, "dog")]}
EVENTS = {"a.wav": [Event(0.0, 1.0, "Speech"), Event(1.5, 2.25, "Dog")], "quiet.wav": []}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (DCASE, EVENTS),
        (DCASE.replace("\t", ","), EVENTS),
        (DCASE.replace("wav\t\t\t", "wav\tnan\tNaN\tnan"), EVENTS),
        ("\ufeff" + DCASE, EVENTS),
        (DCASE.replace("\t", ";").replace(".", ",").replace(",wav", ".wav"), EVENTS),
        (DCASE.split("\n", 1)[1], EVENTS),
        (AUDIOSET, {"Yx_30000": [Event(0.5, 10.0, "/m/04rlf")]}),
        ("File,Start,End,Label\na.wav,1,2,dog\n", DOG),
        ("path,start_time,duration,class\na.wav,1,1,dog\n", DOG),
        ("audio_filename,Onset (ms),Offset [ms],category\na.wav,1000,2000,dog\n", DOG),
        ("file_name,onset_ms,duration_ms,label\na.wav,1000,1000,dog\n", DOG),
        ("fname,startTime,endTime,event\na.wav,00:01,0:00:02.0,dog\n", DOG),
        (BIRDNET, {"a.wav": [Event(0.0, 3.0, "Wren"), Event(3.0, 6.0, "Robin")]}),
        (RAVEN, {"a.wav": [Event(1.0, 2.0, "dog")], "b.wav": [Event(0.5, 1.5, "dog")]}),
        ("INDIR,IN FILE,OFFSET,DURATION,MANUAL ID\nx,a.wav,1.0,1.0,dog\n", DOG),
        ("12\t1\t2\tdog\n", {"12": [Event(1, 2, "dog")]}),
        ("a.wav\thome\t1\t2\tdog\tmixture\n", DOG),
        ("a.wav 1 2 dog\n", DOG),
        ("onset offset label\n1 2 big dog\n", {"labels": [Event(1.0, 2.0, "big dog")]}),
        ("slice_file_name,fsID,start,end,class\na.wav,9,1,2,dog\n", DOG),
        ("a.wav\t1\t2\tstart\n", {"a.wav": [Event(1.0, 2.0, "start")]}),
        ("clip;From;To;Tags\na.wav;1,0;2,0;dog\n", DOG),
        ("File Path\tBegin Time - hh:mm:ss.ms\tEnd Time - ss.msec\tLabel\na.wav\t00:00:01.000\t2.000\tdog\n", DOG),
    ],
)
def test_tables_are_read(tmp_path, text, expected):
    path = tmp_path / "labels.tsv"
    path.write_text(text, encoding="utf-8")
    assert read_strong_labels(path) == expected


def test_written_tables_are_read_back(tmp_path):
    write_strong_labels(tmp_path / "labels.tsv", EVENTS)
    assert read_strong_labels(tmp_path / "labels.tsv") == EVENTS
    assert event_names(EVENTS) == ["Dog", "Speech"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("event_label", "what", "event_label.*labels.tsv, got filename, onset, offset, what"),
        ("onset", "t", "onset.*labels.tsv, got filename, t, offset"),
        ("\t2.25", "\t1.25", r"0 <= onset <= offset, got 1.5 and 1.25 in line 2 of"),
        ("\t2.25", "\tnan", "got '1.5' and 'nan' in line 2 of"),
        ("\t1.5", "\t-1", "got -1 and 2.25 in line 2 of"),
        ("\t2.25", "\tlater", "in seconds, got '1.5' and 'later' in line 2 of"),
        ("\tDog", "\t", "label for the event in line 2 of"),
        ("a.wav\t0", "\t0", "file name in line 3 of"),
    ],
)
def test_damaged_tables(tmp_path, old, new, message):
    path = tmp_path / "labels.tsv"
    path.write_text(DCASE.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_strong_labels(path)
    path.write_text(DCASE.splitlines()[0])
    with pytest.raises(ValueError, match="no rows"):
        read_strong_labels(path)


def test_more_than_two_times_need_a_header(tmp_path):
    path = tmp_path / "elan.txt"
    path.write_text("tier\t00:00:01.000\t1.000\t00:00:02.000\t2.000\tdog\n")
    with pytest.raises(ValueError, match=r"line 1 of .*elan\.txt"):
        read_strong_labels(path)


def test_rows_that_count_once_and_points(tmp_path, caplog):
    path = tmp_path / "labels.txt"
    path.write_text(RAVEN)
    assert read_strong_labels(path)["a.wav"] == [Event(1.0, 2.0, "dog")]
    assert "2 rows that repeat an event" in caplog.text
    path.write_text("1.0\t1.0\tclick\n0.05\t0.05\tclick\n3.0\t4.0\tdog\n")
    assert read_strong_labels(path) == {
        "labels": [Event(0.0, 0.16, "click"), Event(0.92, 1.08, "click"), Event(3.0, 4.0, "dog")]
    }
    assert "2 events have no duration and get 0.16 s, first click at 1 s in line 1" in caplog.text


def test_a_folder_of_tables_one_per_clip(tmp_path):
    tables = {
        "audacity.txt": "0.5\t1.5\tdog barks\n\\\t100.0\t2000.0\n2\t3\tcat\n",
        "in/raven.Table.1.selections.txt": "Selection\tBegin Time (s)\tEnd Time (s)\tAnnotation\n1\t1\t2\tdog\n",
        "comma.csv": "onset,offset,label\n1,2,dog\n",
        "quiet.txt": "",
        "bird.BirdNET.results.csv": "Start (s),End (s),Common name\n0,3,Wren\n",
        "named.tsv": "filename\tonset\toffset\tlabel\nother.wav\t1\t2\tdog\n",
    }
    for name, text in tables.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read_strong_labels(tmp_path) == {
        "audacity": [Event(0.5, 1.5, "dog barks"), Event(2.0, 3.0, "cat")],
        "in/raven": [Event(1.0, 2.0, "dog")],
        "comma": [Event(1.0, 2.0, "dog")],
        "quiet": [],
        "bird": [Event(0.0, 3.0, "Wren")],
        "other.wav": [Event(1.0, 2.0, "dog")],
    }


def test_files_without_times_in_a_folder_are_left_out(tmp_path, caplog):
    tables = {
        "a.txt": "0.5\t1.5\tdog\n",
        "README.txt": "The start and the end of each event,\nin seconds, as of May 2024\n",
        "classes.txt": "dog\ncat\n",
        "counts.csv": "class,count\ndog,1\n",
    }
    for name, text in tables.items():
        (tmp_path / name).write_text(text)
    assert read_strong_labels(tmp_path) == {"a": [Event(0.5, 1.5, "dog")]}
    assert "3 of 4 files" in caplog.text
    assert "README.txt" in caplog.text
    (tmp_path / "b.csv").write_text("onset,offset\n1,2\n")
    with pytest.raises(ValueError, match=r"b\.csv"):
        read_strong_labels(tmp_path)


def test_the_column_of_labels_can_be_named(tmp_path):
    path = tmp_path / "birds.csv"
    path.write_text(BIRDNET)
    assert event_names(read_strong_labels(path, "Scientific name")) == [
        "Erithacus rubecula",
        "Troglodytes troglodytes",
    ]
    with pytest.raises(ValueError, match="kind.*got Start"):
        read_strong_labels(path, "kind")
