import csv
import json
from collections import Counter

import numpy as np
import pytest
import soundfile as sf
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, IterableDataset, List, Value

from asit_hf.data.audio import read_audio
from asit_hf.data.datasets import find_audio_files, load_audio_dataset
from asit_hf.data.labels import encode_labels, label_names
from asit_hf.data.splits import find_group_column, split_dataset

CLIPS = ("bird/b.wav", "bird/a.wav", "dog/a.flac", "dog/deep/c.wav", "rain/.hidden.wav", "rain/r.wav")


@pytest.fixture
def folder(tmp_path):
    """Six clips in class folders, one of them hidden, beside a text file. Each clip holds its own level."""
    root = tmp_path / "clips"
    for index, name in enumerate(CLIPS):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        sf.write(root / name, np.full(800, 0.1 * index), 8000)
    (root / "notes.txt").write_text("not audio")
    return root


def write_csv(path, rows, delimiter=","):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def names_of(dataset):
    return ["/".join(row["audio"]["path"].rsplit("/", 2)[-2:]) for row in dataset]


def embedded(folder, labels=("bird", "bird", "dog", "dog", "rain")):
    """The clips as bytes, as data sets on the Hub hold them."""
    files = find_audio_files(folder)
    rows = {"audio": [{"path": file.name, "bytes": file.read_bytes()} for file in files], "label": list(labels)}
    return Dataset.from_dict(rows).cast_column("audio", Audio(decode=False))


def test_folder(folder):
    dataset = load_audio_dataset(folder)
    assert dataset.column_names == ["audio"]
    assert dataset.features["audio"] == Audio(decode=False)
    assert names_of(dataset) == ["bird/a.wav", "bird/b.wav", "dog/a.flac", "deep/c.wav", "rain/r.wav"]
    np.testing.assert_allclose(read_audio(dataset[2]["audio"], 8000), 0.2, atol=1e-4)


def test_class_folders(folder):
    dataset = load_audio_dataset(str(folder), labels_from_folders=True)
    assert label_names(dataset) == ["bird", "dog", "rain"]
    assert dataset["label"][:] == [0, 0, 1, 1, 2]
    sf.write(folder / "stray.wav", np.zeros(80), 8000)
    with pytest.raises(ValueError, match=r"1 lie directly in it, first stray\.wav"):
        load_audio_dataset(folder, labels_from_folders=True)


def test_split_of_a_folder_is_its_subfolder(folder):
    assert names_of(load_audio_dataset(folder, split="dog")) == ["dog/a.flac", "deep/c.wav"]
    with pytest.raises(ValueError, match=r"no split 'test' .* found \['bird', 'dog', 'rain'\]"):
        load_audio_dataset(folder, split="test")


def test_links_to_folders_are_followed_once(folder, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "dog").symlink_to(folder / "dog")
    (folder / "dog" / "loop").symlink_to(folder / "dog")
    assert [file.name for file in find_audio_files(tmp_path / "links")] == ["a.flac", "c.wav"]


def test_single_file(folder):
    dataset = load_audio_dataset(folder / "bird" / "a.wav")
    assert names_of(dataset) == ["bird/a.wav"]


def test_folder_without_audio(tmp_path, folder):
    for child in folder.rglob("*"):
        if child.suffix in (".wav", ".flac"):
            child.rename(child.with_suffix(".m4a"))
    with pytest.raises(FileNotFoundError, match=r"no audio in .*looked for \.wav .*, found 5 \.m4a, 1 \.txt"):
        load_audio_dataset(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="found no files at all"):
        load_audio_dataset(tmp_path / "empty")


def test_audio_that_cannot_be_read_is_named(folder, caplog):
    (folder / "dog" / "x.m4a").touch()
    assert len(find_audio_files(folder)) == 5
    assert "'.m4a': 1" in caplog.text


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
    with pytest.raises(ValueError, match=r"its splits are \['test', 'train'\]"):
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
        ("a,b\nx,y\n", {}, ValueError, "no audio column in .*: name one of a, b"),
        (
            "file,b\nx,y\n",
            {"audio_column": "clip"},
            ValueError,
            "no audio column 'clip' in .*: its columns are file, b",
        ),
        ("file,b\nx,y\n", {"label_column": "c"}, ValueError, "no label column 'c' in .*: its columns are file, b"),
        ("file,b\nx,y\n", {}, FileNotFoundError, "none of the first 1 files .* set root"),
        ("file,b\nx,y\n", {"split": "test"}, ValueError, "no split 'test' in .*: expected a column 'split'"),
        ("file,b\nx,y,z\n", {}, ValueError, "line 2 of .* has more fields than its header"),
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


def test_a_missing_file_among_others_is_left_to_the_reader(folder):
    rows = [{"file": "bird/a.wav"}, {"file": "gone.wav"}]
    assert len(load_audio_dataset(write_csv(folder / "t.csv", rows))) == 2


def test_what_does_not_exist(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no such file or folder: .*/nothing/here/at/all"):
        load_audio_dataset(tmp_path / "nothing/here/at/all")
    (tmp_path / "a.doc").touch()
    with pytest.raises(ValueError, match=r"cannot tell what .*a\.doc is: expected a file with one of .*\.wav"):
        load_audio_dataset(tmp_path / "a.doc")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="'no-one/no-set' is neither a local file or folder .* on the Hub"):
        load_audio_dataset("no-one/no-set")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("whole_folder", [False, True])
def test_parquet(folder, tmp_path, streaming, whole_folder):
    target = tmp_path / "set" / "data" / "train-00000-of-00001.parquet"
    target.parent.mkdir(parents=True)
    embedded(folder).to_parquet(target)
    dataset = load_audio_dataset(tmp_path / "set" if whole_folder else target, streaming=streaming)
    assert isinstance(dataset, IterableDataset if streaming else Dataset)
    if streaming:
        dataset = encode_labels(dataset, ["rain", "dog", "bird"])
    names = label_names(dataset)
    rows = list(dataset)
    assert [names[row["label"]] for row in rows] == ["bird", "bird", "dog", "dog", "rain"]
    np.testing.assert_allclose(read_audio(rows[2]["audio"], 8000), 0.2, atol=1e-4)


def test_saved_data_sets_and_their_splits(folder, tmp_path):
    dataset = embedded(folder)
    dataset.save_to_disk(tmp_path / "one")
    assert label_names(load_audio_dataset(tmp_path / "one")) == ["bird", "dog", "rain"]
    DatasetDict(train=dataset, test=dataset.select([0])).save_to_disk(tmp_path / "two")
    assert len(load_audio_dataset(tmp_path / "two", split="test")) == 1
    with pytest.raises(ValueError, match="expected one of the splits of .*, train, test; none was named"):
        load_audio_dataset(tmp_path / "two")


def test_loaded_data_sets(folder):
    dataset = embedded(folder).rename_columns({"audio": "file", "label": "class"})
    assert load_audio_dataset(dataset)["label"][:] == [0, 0, 1, 1, 2]
    with pytest.raises(ValueError, match="split and root cannot be used with a loaded data set"):
        load_audio_dataset(dataset, split="train", root=folder)


def test_streaming_a_folder_keeps_order_and_labels(folder):
    stream = load_audio_dataset(folder, streaming=True, labels_from_folders=True)
    assert isinstance(stream, IterableDataset)
    assert stream.num_shards > 1
    assert label_names(stream) == ["bird", "dog", "rain"]
    assert [row["label"] for row in stream] == [0, 0, 1, 1, 2]


def test_encode_labels_against_a_models_names(folder):
    dataset = embedded(folder)
    encoded = encode_labels(dataset, ["rain", "dog", "bird", "cat"])
    assert encoded["label"][:] == [2, 2, 1, 1, 0]
    assert label_names(encoded) == ["rain", "dog", "bird", "cat"]
    # From one set of names to another.
    assert encode_labels(encoded, ["bird", "dog", "rain"])["label"][:] == [0, 0, 1, 1, 2]
    integers = dataset.remove_columns("label").add_column("label", [7, 7, 30, 30, 4])
    assert label_names(encode_labels(integers)) == ["4", "7", "30"]
    assert encode_labels(integers, ["30", "7", "4"])["label"][:] == [1, 1, 0, 0, 2]


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_label_is_named_with_its_place(folder, stream):
    dataset = embedded(folder)
    place = "r.wav" if stream else r"row 4 \(r\.wav\)"
    with pytest.raises(ValueError, match=f"unknown label 'rain' in .*{place}.*; the known labels are bird, dog"):
        list(encode_labels(dataset.to_iterable_dataset() if stream else dataset, ["bird", "dog"]))


def test_encoding_needs_labels_and_a_stream_needs_names(folder):
    with pytest.raises(ValueError, match="pass names"):
        encode_labels(embedded(folder).to_iterable_dataset())
    with pytest.raises(ValueError, match=r"expected a label column, got \['audio'\]"):
        encode_labels(load_audio_dataset(folder))
    with pytest.raises(ValueError, match=r"expected a label column with class names .*, got the columns \['audio'\]"):
        label_names(load_audio_dataset(folder))


def rows(count: int, **columns) -> Dataset:
    return Dataset.from_dict({"audio": [f"{i}.wav" for i in range(count)], **columns})


def test_split_keeps_groups_on_one_side():
    speakers = [f"s{i // 20}" for i in range(200)]
    dataset = rows(200, label=[i % 4 for i in range(200)], speaker=speakers)
    assert find_group_column(dataset) == "speaker"
    train, test = split_dataset(dataset, 0.3, seed=1)
    assert (len(train), len(test)) == (140, 60)
    assert set(train["speaker"]).isdisjoint(test["speaker"])
    again = split_dataset(dataset, 0.3, seed=1)[1]
    other = split_dataset(dataset, 0.3, seed=2)[1]
    assert again["audio"][:] == test["audio"][:] != other["audio"][:]


def test_split_is_stratified_with_and_without_groups():
    labels = [i % 5 for i in range(100)]
    sources = [f"{i % 5}-{i // 10}" for i in range(100)]
    for options in ({"group_column": "source"}, {"group_column": ""}):
        _, test = split_dataset(rows(100, label=labels, source=sources), 0.2, seed=3, **options)
        assert Counter(test["label"]) == dict.fromkeys(range(5), 4)


def test_small_classes_still_fill_the_test_side():
    train, test = split_dataset(rows(20, label=[i // 2 for i in range(20)]), 0.2)
    assert (len(train), len(test)) == (16, 4)
    assert max(Counter(test["label"]).values()) == 1


def test_split_of_several_labels_and_of_none():
    _, test = split_dataset(rows(40, label=[[i % 2, 2 + i % 4] for i in range(40)]), 0.25)
    assert Counter(label for labels in test["label"] for label in labels)[0] == 5
    assert len(split_dataset(rows(40), 0.25)[1]) == 10


def test_impossible_splits():
    with pytest.raises(ValueError, match="1 groups of column 'speaker' aside"):
        split_dataset(rows(4, speaker=["a"] * 4), 0.5, group_column="speaker")
    with pytest.raises(ValueError, match="no column 'who' to split by, there are"):
        split_dataset(rows(4), 0.5, group_column="who")
    with pytest.raises(ValueError, match="between 0 and 1, got 1.5"):
        split_dataset(rows(4), 1.5)


def test_a_column_of_raw_bytes_is_audio(folder):
    content = find_audio_files(folder)[2].read_bytes()
    dataset = Dataset.from_dict({"audio": [content]}, features=Features(audio=Value("binary")))
    np.testing.assert_allclose(read_audio(load_audio_dataset(dataset)[0]["audio"], 8000), 0.2, atol=1e-4)


@pytest.mark.real_audio
def test_real_manifests(real_audio):
    esc = load_audio_dataset(real_audio / "esc50-16k" / "esc50.csv", root=real_audio / "esc50-16k" / "audio")
    assert (len(esc), len(label_names(esc))) == (1600, 50)
    train, test = split_dataset(esc, 0.25)
    assert set(train["src_file"]).isdisjoint(test["src_file"])
    assert min(Counter(test["label"]).values()) >= 6
    speakers = load_audio_dataset(real_audio / "asc-16k" / "speaker_id.csv", split="test", label_column="speaker")
    assert len(label_names(speakers)) == 24
