import json

import pytest
from datasets import ClassLabel, List
from sounds import names_of, write_csv

from asit_hf.data.datasets import load_audio_dataset
from asit_hf.data.labels import encode_labels, label_names


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_table(folder, delimiter):
    rows = [
        {"filename": "bird/a.wav", "category": "10", "speaker": "007", "fold": "1", "score": "0.5"},
        {"filename": "dog/a.flac", "category": "9", "speaker": "012", "fold": "2", "score": "2"},
    ]
    path = write_csv(folder / ("t.csv" if delimiter == "," else "t.tsv"), rows, delimiter)
    dataset = load_audio_dataset(path)
    assert names_of(dataset) == ["bird/a.wav", "dog/a.flac"]
    assert label_names(dataset) == ["9", "10"]
    assert dataset["label"][:] == [1, 0]
    assert dataset["speaker"][:] == ["007", "012"]
    assert dataset["fold"][:] == [1, 2]
    assert dataset["score"][:] == [0.5, 2.0]


def test_named_columns_root_and_split(folder, tmp_path):
    rows = [
        {"clip": "bird/a.wav", "label": "x", "who": "ann", "split": "train"},
        {"clip": "dog/a.flac", "label": "y", "who": "bob", "split": "test"},
    ]
    path = write_csv(tmp_path / "t.csv", rows)
    options = {"audio_column": "clip", "label_column": "who", "root": folder}
    dataset = load_audio_dataset(path, split="test", **options)
    assert names_of(dataset) == ["dog/a.flac"]
    assert label_names(dataset) == ["bob"]
    assert dataset["original_label"][:] == ["y"]
    with pytest.raises(ValueError, match=r"no split 'dev'.*\['test', 'train'\]"):
        load_audio_dataset(path, split="dev", **options)


@pytest.mark.parametrize("lines", [True, False])
def test_json(folder, lines):
    rows = [
        {"path": "bird/a.wav", "labels": ["song", "bird"], "note": None},
        {"path": str(folder / "dog/a.flac"), "labels": []},
    ]
    path = folder / ("t.jsonl" if lines else "t.json")
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    dataset = load_audio_dataset(path)
    assert names_of(dataset) == ["bird/a.wav", "dog/a.flac"]
    assert dataset.features["label"] == List(ClassLabel(names=["bird", "song"]))
    assert dataset["label"][:] == [[1, 0], []]


def test_metadata_file_of_a_folder(folder):
    write_csv(folder / "metadata.csv", [{"file_name": "dog/a.flac", "label": "wuff"}])
    dataset = load_audio_dataset(folder)
    assert names_of(dataset) == ["dog/a.flac"]
    assert label_names(dataset) == ["wuff"]
    assert len(load_audio_dataset(folder, labels_from_folders=True)) == 5


def test_several_labels_in_csv(folder):
    rows = [{"file": "bird/a.wav", "label": "song; bird"}, {"file": "dog/a.flac", "label": "dog"}]
    dataset = load_audio_dataset(write_csv(folder / "t.csv", rows))
    assert label_names(dataset) == ["bird", "dog", "song"]
    assert dataset["label"][:] == [[2, 0], [1]]


def test_floating_point_labels_stay(folder):
    rows = [{"file": "bird/a.wav", "label": "0.5"}, {"file": "dog/a.flac", "label": "-1e-2"}]
    dataset = load_audio_dataset(write_csv(folder / "t.csv", rows))
    assert dataset["label"][:] == [0.5, -0.01]
    with pytest.raises(ValueError, match="floating-point"):
        encode_labels(dataset, ["a"])


@pytest.mark.parametrize(
    ("text", "options", "error", "message"),
    [
        ("a,b\nx,y\n", {}, ValueError, "no audio column in .*got a, b"),
        (
            "file,b\nx,y\n",
            {"audio_column": "clip"},
            ValueError,
            "no audio column 'clip' in .*file, b",
        ),
        ("file,b\nx,y\n", {"label_column": "c"}, ValueError, "no label column 'c' in .*file, b"),
        ("file,b\nx,y\n", {}, FileNotFoundError, "none of the 1 files .* set root"),
        ("file,b\nx,y\n", {"split": "test"}, ValueError, "no split 'test' in .*: expected a column 'split'"),
        ("file,b\nx,y,z\n", {}, ValueError, "expected 2 cells .*got 3 in line 2 of"),
        ("file,b\n,y\n", {}, ValueError, "expected a path in row 0 of .*, got None"),
        ("file,b\n", {}, ValueError, "no rows in"),
        ("", {}, ValueError, "no rows in"),
        ("file,b\nx,y\n", {"config_name": "c"}, ValueError, "config_name cannot be used with a manifest"),
    ],
)
def test_bad_tables(tmp_path, text, options, error, message):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(error, match=message):
        load_audio_dataset(path, **options)


@pytest.mark.parametrize("text", ["{", "[1, 2]", '{"file": 1}\n{'])
def test_bad_json(tmp_path, text):
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"t\.json"):
        load_audio_dataset(path)


def test_a_single_missing_file_is_left_to_the_reader(folder):
    rows = [{"file": "bird/a.wav"}, {"file": "gone.wav"}]
    assert len(load_audio_dataset(write_csv(folder / "t.csv", rows))) == 2
