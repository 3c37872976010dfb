import json

import pytest
from datasets import ClassLabel, List
from sounds import names_of, write_csv

from asit_hf.data import manifests
from asit_hf.data.datasets import find_splits, load_audio_dataset
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


@pytest.mark.parametrize("text", ["{", "[1, 2]", '{"file": 1}\n{', '["a.wav",]', '["a.wav" "b.wav"]', '["a.wav"'])
def test_bad_json(tmp_path, text):
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"t\.json"):
        load_audio_dataset(path)


def test_a_single_missing_file_is_left_to_the_reader(folder):
    rows = [{"file": "bird/a.wav"}, {"file": "gone.wav"}]
    assert len(load_audio_dataset(write_csv(folder / "t.csv", rows))) == 2


ROWS = [{"wav": "bird/a.wav", "labels": "bird"}, {"wav": "dog/a.flac", "labels": "dog"}]


@pytest.mark.parametrize(
    "content",
    [
        {"data": ROWS},
        {"clips": ROWS, "version": 1},
        ROWS[0] | {"labels": ["bird"]},
        {"wav": {"0": "bird/a.wav", "1": "dog/a.flac"}, "labels": {"0": "bird", "1": "dog"}},
        {"wav": ["bird/a.wav", "dog/a.flac"], "labels": ["bird", "dog"]},
        {"0": ROWS[0], "1": ROWS[1]},
        {"columns": ["wav", "labels"], "index": [0, 1], "data": [["bird/a.wav", "bird"], ["dog/a.flac", "dog"]]},
        {"bird/a.wav": "bird", "dog/a.flac": "dog"},
        {"bird/a.wav": {"labels": "bird"}, "dog/a.flac": {"labels": "dog"}},
        [{" wav ": "bird/a.wav ", "labels": " bird"}, {"wav": "dog/a.flac", "labels": "dog"}],
    ],
)
def test_layouts_of_json(folder, content):
    (folder / "t.json").write_text(json.dumps(content, indent=1))
    dataset = load_audio_dataset(folder / "t.json")
    assert names_of(dataset) == ["bird/a.wav", "dog/a.flac"][: len(dataset)]
    assert label_names(dataset) == ["bird", "dog"][: len(dataset)]
    assert len(dataset) == (1 if "wav" in content and content["wav"] == "bird/a.wav" else 2)


def test_a_json_list_of_paths(folder):
    (folder / "t.json").write_text('["bird/a.wav", "dog/a.flac"]')
    assert names_of(load_audio_dataset(folder / "t.json")) == ["bird/a.wav", "dog/a.flac"]


def test_json_rows_of_mixed_types(folder, caplog):
    rows = [
        {"file": "bird/a.wav", "label": "song", "take": 1, "mixed": "x"},
        {"file": "dog/a.flac", "label": ["bark", 3], "take": 2.5, "mixed": 7.0},
        {"file": "rain/r.wav", "label": 3, "take": None, "mixed": float("nan")},
        {"file": "bird/b.wav", "label": None, "take": None, "mixed": "l\u2028s"},
    ]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "t.jsonl").write_text(text, encoding="utf-8")
    dataset = load_audio_dataset(folder / "t.jsonl")
    assert label_names(dataset) == ["3", "bark", "song"]
    assert dataset["label"][:] == [[2], [1, 0], [0], None]
    assert "column label" in caplog.text
    assert "int and str" in caplog.text
    assert dataset["take"][:] == [1.0, 2.5, None, None]
    assert dataset["mixed"][:] == ["x", "7", None, "l\u2028s"]


@pytest.mark.parametrize(
    ("header", "audio", "label"),
    [
        ("File,Label", "File", "Label"),
        ("File Name,CLASS", "File Name", "CLASS"),
        ("fname,labels", None, None),
        ("slice_file_name,class", None, None),
        ("wav,category", None, None),
        ("Filename,file", None, None),
    ],
)
def test_usual_names_of_columns(folder, caplog, header, audio, label):
    (folder / "t.csv").write_text(f"{header}\nbird/a.wav,dog/a.flac\n")
    dataset = load_audio_dataset(folder / "t.csv")
    assert names_of(dataset) == ["dog/a.flac" if header == "Filename,file" else "bird/a.wav"]
    assert all(f"{kind} column" in caplog.text and name in caplog.text for kind, name in
               (("audio", audio), ("label", label)) if name)  # fmt: skip


def test_a_column_of_audio_files_by_its_values(folder, caplog):
    table = folder / "t.csv"
    table.write_text("clip,singer,mp3 path,primary_label\n2,1,bird/a.wav,x\n3,0,dog/a.flac,y\n")
    dataset = load_audio_dataset(table)
    assert names_of(dataset) == ["bird/a.wav", "dog/a.flac"]
    assert label_names(dataset) == ["x", "y"]
    assert "mp3 path" in caplog.text
    table.write_text("one,other\nbird/a.wav,dog/a.flac\n")
    with pytest.raises(ValueError, match="got one, other; set audio_column"):
        load_audio_dataset(table)


def test_a_choice_among_columns_is_reported(folder, caplog):
    (folder / "t.csv").write_text("filename,path,category,target,label2\nx,bird/a.wav,dog,3,y\n")
    assert label_names(load_audio_dataset(folder / "t.csv")) == ["dog"]
    assert "path, not filename" in caplog.text
    assert "category, not target" in caplog.text
    assert "label2" not in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("t.csv", "clips/a.wav,dog\nclips/b.wav,cat\n", ["clips/a.wav, dog", "audio", "first row"]),
        ("t.csv", "64760,dog\n64761,cat\n", ["64760, dog", "audio_column"]),
        ("t.csv", "a.wav,dog\n", ["no rows", "a.wav, dog"]),
        ("t.txt", "a.wav\nb.wav\n", ["a.wav", "first row"]),
        ("t.json", '[["a.wav", "dog"]]', ["['a.wav', 'dog']", "object"]),
        ("t.json", '{"data": []}', ["no rows"]),
        ("t.json", "", ["no rows"]),
        ("t.json", "3", ["object", "3"]),
    ],
)
def test_manifests_without_names_or_rows(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as error:
        load_audio_dataset(tmp_path / name)
    assert all(word in str(error.value) for word in [*words, name])


def test_numbers_of_a_table(folder, caplog):
    (folder / "t.csv").write_text("fname;dose;fold;half;id;big\nbird/a.wav;0,5;1.0;.5;007;12345678901234567890\n"
                                  "dog/a.flac;2;;nan;010;1\n")  # fmt: skip
    dataset = load_audio_dataset(folder / "t.csv", label_column="dose")
    assert dataset["label"][:] == [0.5, 2.0]
    assert "0,5 is 0.5" in caplog.text
    assert dataset["fold"][:] == [1.0, None]
    assert dataset["half"][:] == [0.5, None]
    assert dataset["id"][:] == ["007", "010"]
    assert dataset["big"][:] == ["12345678901234567890", "1"]


@pytest.mark.parametrize("column", ["split", "Subset"])
def test_splits_of_a_manifest(folder, column, caplog):
    (folder / "t.csv").write_text(f"file,{column}\nbird/a.wav,1.0\ndog/a.flac,2.0\nrain/r.wav,\n")
    assert names_of(load_audio_dataset(folder / "t.csv", split="2")) == ["dog/a.flac"]
    assert f"1 of 3 rows of {folder / 't.csv'} have no {column}" in caplog.text
    (folder / "t.csv").write_text(f"file,{column}\nbird/a.wav,Training\ndog/a.flac,Test\n")
    assert names_of(load_audio_dataset(folder / "t.csv", split="train")) == ["bird/a.wav"]
    (folder / "t.json").write_text(
        json.dumps([{"file": "bird/a.wav", "split": {}}, {"file": "rain/r.wav", "split": ["a"]}])
    )
    assert names_of(load_audio_dataset(folder / "t.json", split="['a']")) == ["rain/r.wav"]


def test_a_column_of_splits_by_its_values(folder, caplog):
    table = folder / "t.csv"
    table.write_text("file,Set,usage\nbird/a.wav,train,a\ndog/a.flac,dev,b\nrain/r.wav,,c\n")
    assert find_splits(table) == {"dev": None, "train": None}
    assert names_of(load_audio_dataset(table, split="train")) == ["bird/a.wav"]
    assert "Set" in caplog.text
    assert len(load_audio_dataset(table)) == 3
    for others in ("train,train", "train,other", "dev,test"):  # one split, no splits, none for training
        one, other = others.split(",")
        table.write_text(f"file,kind\nbird/a.wav,{one}\ndog/a.flac,{other}\n")
        assert find_splits(table) == {}


def test_tables_in_any_encoding(folder):
    (folder / "t.txt").write_bytes("file\tlabel\r\nbird/a.wav\tKäuzchen\r\n".encode("utf-16"))
    assert label_names(load_audio_dataset(folder / "t.txt")) == ["Käuzchen"]
    (folder / "t.json").write_bytes(json.dumps(ROWS).encode("utf-16"))
    assert len(load_audio_dataset(folder / "t.json")) == 2


def test_a_table_is_divided_as_often_for_many_columns_as_for_few(folder, monkeypatch):
    passes, read = [], manifests.OpenTable.rows
    monkeypatch.setattr(manifests.OpenTable, "rows", lambda *args: passes.append(1) or read(*args))
    counts = []
    for columns in (1, 40):
        names = ",".join(f"x{index}" for index in range(columns))
        (folder / "t.csv").write_text(f"file,{names}\nbird/a.wav{',1' * columns}\n")
        passes.clear()
        assert len(load_audio_dataset(folder / "t.csv").column_names) == columns + 1
        counts.append(len(passes))
    assert counts[0] == counts[1]
