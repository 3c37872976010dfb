import json
import os
import tarfile

import fsspec
import numpy as np
import pytest
import soundfile as sf
from datasets import Audio, Dataset, DatasetDict, Features, IterableDataset, Value
from odd_names import copy_with_odd_names
from sounds import embedded, names_of

from asit_hf.data import inputs, tars
from asit_hf.data.audio import read_audio
from asit_hf.data.datasets import load_audio_dataset, load_unlabelled
from asit_hf.data.filters import filter_rows
from asit_hf.data.inputs import find_audio_files
from asit_hf.data.labelled import DatasetArguments, load_labelled
from asit_hf.data.labels import encode_labels, label_names


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
    with pytest.raises(ValueError, match=r"got 1 directly in it, first stray\.wav"):
        load_audio_dataset(folder, labels_from_folders=True)


def test_split_of_a_folder_is_its_subfolder(folder):
    assert names_of(load_audio_dataset(folder, split="dog")) == ["dog/a.flac", "deep/c.wav"]
    with pytest.raises(ValueError, match=r"no split 'test' .*\['bird', 'dog', 'rain'\]"):
        load_audio_dataset(folder, split="test")


def write_clips(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        sf.write(root / name, np.zeros(80), 8000)
    return root


SPLIT_CLIPS = [
    f"{split}/{name}/{i}.wav" for split in ("Training", "val", "test") for name in ("cat", "dog") for i in "12"
]


@pytest.mark.parametrize(
    "kind", ["folders", "csv", "jsonl", "parquet", "one csv", "manifests", "manifests in folders", "shards"]
)
def test_split_folders(tmp_path, kind):
    """Twelve clips of two classes in three splits, whose names are found in other spellings."""
    root = write_clips(tmp_path / "set", *SPLIT_CLIPS, "docs/readme/../../docs/.keep.wav")
    for split in ("Training", "val", "test"):
        rows = [(f"{name}/{i}.wav", name) for name in ("cat", "dog") for i in "12"]
        if kind == "shards":
            rows = [{"audio": (root / split / path).read_bytes(), "label": name} for path, name in rows]
            (tmp_path / "shards" / "data").mkdir(parents=True, exist_ok=True)
            part = {"Training": "train", "val": "validation"}.get(split, split)
            Dataset.from_list(rows).to_parquet(tmp_path / "shards" / "data" / f"{part}-00000-of-00001.parquet")
            continue
        rows = [{"file_name": path, "label": name.upper()} for path, name in rows]
        if kind.startswith("manifests"):
            folder = f"{split}/" if kind == "manifests" else ""
            lines = [f"{folder}{row['file_name']},{row['label']}" for row in rows]
            (root / f"{split}.csv").write_text("\n".join(["file_name,label", *lines]))
        elif kind == "csv":
            lines = [",".join(row.values()) for row in rows]
            (root / split / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
        elif kind == "one csv":
            lines = [f"{split}/{row['file_name']},{row['label']}" for row in rows]
            with open(root / "metadata.csv", "a") as file:
                file.write("\n".join(["" if file.tell() else "file_name,label", *lines]))
        elif kind == "jsonl":
            (root / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        elif kind == "parquet":
            Dataset.from_list(rows).to_parquet(root / split / "metadata.parquet")
    root = tmp_path / "shards" if kind == "shards" else root
    splits = DatasetArguments().default_splits(root)
    assert {name: split_name.lower()[:3] for name, split_name in splits.items()} == {
        "train": "tra",
        "validation": "val",
        "test": "tes",
    }
    for split in (splits["train"], "train", "TEST", "dev"):
        dataset = load_labelled(root, split=split)
        assert [name.lower() for name in label_names(dataset)] == ["cat", "dog"]
        assert (label_names(dataset)[0] == "CAT") == (kind not in ("folders", "shards"))
        assert dataset["label"][:] == [0, 0, 1, 1]
        stream = load_audio_dataset(root, split=split, streaming=True)
        assert len([row["audio"] for row in stream]) == 4
    assert len(load_unlabelled(str(root))) == 12
    if kind != "one csv":
        with pytest.raises(ValueError, match="splits .*" + ".*".join(sorted(splits.values()))):
            load_labelled(root)


def test_folders_with_underscores_are_no_classes(tmp_path, caplog):
    root = write_clips(tmp_path, "yes/1.wav", "no/1.wav", "_background_noise_/1.wav", "_background_noise_/2.wav")
    assert label_names(load_labelled(root)) == ["no", "yes"]
    assert "_background_noise_ (2 files)" in caplog.text
    assert len(load_unlabelled(str(root))) == 4


@pytest.mark.parametrize(
    ("clips", "words"),
    [
        (["dog/1.wav", "cat/1.wav", "test/dog/1.wav", "test/cat/1.wav"], ["splits from classes", "test (2 files)"]),
        (["dog/1.wav", "cat/1.wav", "test/1.wav", "train/1.wav"], ["splits from classes", "test, train"]),
        (["audio/dog/1.wav", "audio/cat/1.wav"], ["audio, that holds cat, dog"]),
        (["wav/train/dog/1.wav", "wav/test/cat/1.wav"], ["wav, that holds test, train"]),
        (["fold1/1.wav", "fold2/1.wav", "fold10/1.wav"], ["folds", "fold10 (1 files)"]),
        (["train/1.wav", "test/1.wav"], ["splits", "test, train"]),
        (["_noise/1.wav"], ["_noise only"]),
        (["train_curated/1.wav", "train_noisy/1.wav", "test/1.wav"], ["splits from classes", "train_noisy (1 files)"]),
        (["dev-clean/84/1.wav", "train-clean-100/9/1.wav"], ["splits from classes", "dev-clean, train-clean-100"]),
    ],
)
def test_folders_that_are_no_classes_are_refused(tmp_path, clips, words):
    root = write_clips(tmp_path, *clips)
    with pytest.raises(ValueError) as error:
        load_labelled(root)
    assert all(word in str(error.value) for word in words)
    assert len(load_unlabelled(str(root))) == len(clips)


def test_splits_below_the_classes_are_named(tmp_path, caplog):
    assert len(load_labelled(write_clips(tmp_path, "bus/train/1.wav", "bus/test/1.wav", "car/train/1.wav"))) == 3
    assert "test, train" in caplog.text


def test_a_class_may_be_called_train(tmp_path, caplog):
    assert label_names(load_labelled(write_clips(tmp_path, "bus/1.wav", "train/1.wav", "car/1.wav"))) == [
        "bus",
        "car",
        "train",
    ]
    assert "the folder train" in caplog.text


def test_folders_without_audio_are_named(tmp_path, caplog):
    (tmp_path / "cat" / "empty").mkdir(parents=True)
    assert len(load_labelled(write_clips(tmp_path, "bus/1.wav", "car/1.wav"))) == 2
    assert f"1 folders of {tmp_path} hold no audio and are no classes: cat" in caplog.text


def test_links_to_folders_are_followed_once(folder, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "dog").symlink_to(folder / "dog")
    (folder / "dog" / "loop").symlink_to(folder / "dog")
    (folder / "dog" / "itself").symlink_to("itself")
    assert [file.name for file in find_audio_files(tmp_path / "links")] == ["a.flac", "c.wav"]


def test_single_file(folder):
    dataset = load_audio_dataset(folder / "bird" / "a.wav")
    assert names_of(dataset) == ["bird/a.wav"]


def test_folder_without_audio(tmp_path, folder):
    for child in folder.rglob("*"):
        if child.suffix in (".wav", ".flac"):
            child.write_text("no audio")
            child.rename(child.with_suffix(".doc"))
    with pytest.raises(FileNotFoundError, match=r"no audio in .*expected \.wav .*, got 5 \.doc, 1 \.txt"):
        load_audio_dataset(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="got no files at all"):
        load_audio_dataset(tmp_path / "empty")


FORMATS = {
    "WAV": (".wav", ".WAVE", ".bwf"),
    "RF64": (".rf64",),
    "W64": (".w64",),
    "FLAC": (".flac",),
    "OGG": (".ogg", ".oga"),
    "MP3": (".mp3",),
    "AIFF": (".aif", ".aiff", ".aifc"),
    "AU": (".au", ".snd"),
    "CAF": (".caf",),
    "NIST": (".sph", ".nist"),
    "VOC": (".voc",),
    "AVR": (".avr",),
    "HTK": (".htk",),
    "IRCAM": (".ircam", ".sf"),
    "PAF": (".paf", ".fap"),
    "PVF": (".pvf",),
    "SDS": (".sds",),
    "SVX": (".svx", ".8svx", ".iff"),
    "MPC2K": (".snd",),
}


def test_every_format_of_libsndfile_is_found_and_read(tmp_path, caplog):
    samples = 0.3 * np.sin(np.arange(4000) / 9)
    count = 0
    for format, extensions in FORMATS.items():
        for extension in extensions:
            count += 1
            sf.write(tmp_path / f"{format}{extension}", samples, 16000, format=format)
    dataset = load_audio_dataset(tmp_path)
    assert len(dataset) == count
    for row in dataset:
        waveform = read_audio(row["audio"], 16000)
        assert np.std(waveform[500:3500] - samples[500:3500]) < 0.02, row
    assert not caplog.records


def messages(caplog, *words):
    return [record.getMessage() for record in caplog.records if all(word in record.getMessage() for word in words)]


def test_audio_that_is_left_out_is_counted_once(folder, caplog):
    for name in ("a.raw", "b.raw", "c.pcm"):
        (folder / "dog" / name).write_bytes(bytes(100))
    for name in ("one.take", "two.take", "nothing"):
        (folder / "dog" / name).write_bytes((folder / "bird" / "a.wav").read_bytes())
    (folder / "dog" / "list.doc").write_text("no audio")
    for _ in range(2):
        assert len(find_audio_files(folder)) == 5
    assert len(caplog.records) == 2
    assert messages(caplog, "3 audio", "2 .raw", "1 .pcm")
    assert messages(caplog, "3 audio", "2 .take", "1 without extension")


def test_without_pyav_its_formats_are_counted(folder, tmp_path, monkeypatch, caplog):
    extensions = (".wav", ".flac")
    monkeypatch.setattr(tars, "AUDIO_EXTENSIONS", extensions)
    monkeypatch.setattr(inputs, "_KINDS", dict.fromkeys(extensions, "audio"))
    monkeypatch.setattr(inputs, "_FILES", (*extensions, ".tar"))
    for name in ("x.m4a", "y.M4A", "z.webm"):
        (folder / "dog" / name).touch()
    assert len(find_audio_files(folder)) == 5
    assert messages(caplog, "3 audio", str(folder), "2 .m4a", "1 .webm", "asit-hf[av]")
    with pytest.raises(ValueError, match=r"x\.m4a.*asit-hf\[av\]"):
        load_audio_dataset(folder / "dog" / "x.m4a")
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "x.m4a").touch()
    with pytest.raises(FileNotFoundError, match=r"1 \.m4a.*asit-hf\[av\]"):
        load_audio_dataset(tmp_path / "phone")
    with tarfile.open(tmp_path / "clips.tar", "w") as archive:
        archive.add(folder, "clips")
    assert len(list(load_audio_dataset(tmp_path / "clips.tar", streaming=True))) == 6
    assert messages(caplog, "3 audio", "clips.tar", "2 .m4a", "1 .webm", "asit-hf[av]")


def test_missing_files_and_unknown_extensions(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no such file or folder: .*/nothing/here/at/all"):
        load_audio_dataset(tmp_path / "nothing/here/at/all")
    (tmp_path / "a.doc").touch()
    with pytest.raises(ValueError, match=r"expected a file with one of .*\.wav .*got .*a\.doc"):
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
    with pytest.raises(ValueError, match="expected one of the splits of .*, train, test; got None"):
        load_audio_dataset(tmp_path / "two")
    assert len(load_audio_dataset(tmp_path, split="one")) == 5


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


def test_a_column_of_raw_bytes_is_audio(folder):
    content = find_audio_files(folder)[2].read_bytes()
    dataset = Dataset.from_dict({"audio": [content]}, features=Features(audio=Value("binary")))
    np.testing.assert_allclose(read_audio(load_audio_dataset(dataset)[0]["audio"], 8000), 0.2, atol=1e-4)


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    """A manifest of clips in `audio`, and another folder of audio."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "audio").mkdir()
    (folder / "plain").mkdir()
    for index in range(6):
        sf.write(folder / "audio" / f"{index}.wav", np.full(800, 0.1 * index), 16000)
    sf.write(folder / "plain" / "x.flac", np.zeros(800), 16000)
    rows = [f"{index}.wav,{index % 3},{'ab'[index % 2]}" for index in range(6)]
    (folder / "meta.csv").write_text("filename,fold,category\n" + "\n".join(rows) + "\n")
    return folder


def file_names(dataset):
    return [row["path"].rsplit("/", 1)[-1] for row in dataset["audio"]]


def test_data_sets_with_their_own_options_are_joined(joined):
    spec = {"data": str(joined / "meta.csv"), "root": str(joined / "audio"), "filter": ["fold=0,2", "label=a"]}
    dataset = load_unlabelled([spec, str(joined / "plain")])
    assert dataset.column_names == ["audio"]
    assert file_names(dataset) == ["0.wav", "2.wav", "x.flac"]
    assert file_names(load_unlabelled([json.dumps(spec), str(joined / "plain")])) == file_names(dataset)


def test_labels_are_filtered_by_class_name(joined):
    dataset = load_audio_dataset(joined / "meta.csv", root=joined / "audio", label_column="category")
    assert file_names(filter_rows(dataset, ["label=b"])) == ["1.wav", "3.wav", "5.wav"]
    assert file_names(filter_rows(dataset, [])) == file_names(dataset)


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        ([], ["at least one"]),
        ([{"root": "x"}], ["'data'", "root"]),
        (['{"filter": []}'], ["'data'", "filter"]),
    ],
)
def test_wrong_descriptions_of_data_sets_are_refused(specs, words):
    with pytest.raises(ValueError) as error:
        load_unlabelled(specs)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("condition", "words"),
    [("fold", ["COLUMN=VALUE", "fold"]), ("speaker=1", ["speaker", "fold"]), ("fold=", ["COLUMN=VALUE"])],
)
def test_wrong_filters_are_refused(joined, condition, words):
    dataset = load_audio_dataset(joined / "meta.csv", root=joined / "audio")
    with pytest.raises(ValueError) as error:
        filter_rows(dataset, [condition])
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("streaming", [False, True])
def test_texts_of_parquet_files_are_lists_too(folder, tmp_path, streaming):
    embedded(folder, ["Speech,Music", "Speech", "['Music', 'dog']", "Music", "Speech"]).to_parquet(
        tmp_path / "t.parquet"
    )
    dataset = load_audio_dataset(tmp_path / "t.parquet", streaming=streaming)
    if streaming:
        assert [row["label"] for row in dataset][:2] == ["Speech,Music", "Speech"]
    else:
        assert label_names(dataset) == ["Music", "Speech", "dog"]
        assert dataset["label"][:] == [[1, 0], [1], [0, 2], [0], [1]]


def test_labels_that_are_not_used_are_not_reported(joined, caplog):
    rows = "filename,category\n0.wav,a;b\n1.wav,a\n"
    (joined / "lists.csv").write_text(rows)
    spec = {"data": str(joined / "lists.csv"), "root": str(joined / "audio"), "audio_column": "filename"}
    assert file_names(load_unlabelled(spec)) == ["0.wav", "1.wav"]
    assert not caplog.records
    assert file_names(load_unlabelled({**spec, "filter": "label=b"})) == ["0.wav"]
    assert "a;b" in caplog.text


def test_a_filter_that_keeps_nothing_is_refused(joined):
    with pytest.raises(ValueError, match="fold=9"):
        load_unlabelled({"data": str(joined / "meta.csv"), "root": str(joined / "audio"), "filter": ["fold=9"]})


def test_names_of_any_bytes_are_rows_that_can_be_read(folder, tmp_path):
    texts = copy_with_odd_names(folder / "bird" / "a.wav", tmp_path / "odd" / os.fsdecode(b"caf\xe9"))
    dataset = load_audio_dataset(tmp_path / "odd", labels_from_folders=True)
    assert label_names(dataset) == ["caf%E9"]
    names = [row["path"].rsplit("/", 1)[-1] for row in dataset["audio"]]
    assert names == [text.removeprefix("file:") for text in texts]
    expected = read_audio(folder / "bird" / "a.wav", 8000)
    for row in dataset:
        np.testing.assert_array_equal(read_audio(row["audio"], 8000), expected)
    (odd,) = load_audio_dataset(tmp_path / "odd" / os.fsdecode(b"caf\xe9/na\xefve.wav"))
    np.testing.assert_array_equal(read_audio(odd["audio"], 8000), expected)
    with tarfile.open(tmp_path / "odd.tar", "w") as archive:
        archive.add(tmp_path / "odd", "odd")
    names = [row["audio"]["path"] for row in load_audio_dataset(tmp_path / "odd.tar", streaming=True)]
    assert len(names) == len(texts)
    assert "file:odd.tar/odd/caf%E9/na%EFve.wav" in names


def test_urls(folder):
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/copy/clips", recursive=True)
    memory.pipe("/copy/t.csv", b"file,label\nclips/dog/a.flac,dog\n")
    table = Dataset.from_dict({"audio": [{"path": "a.flac", "bytes": (folder / "dog/a.flac").read_bytes()}]})
    with memory.open("/copy/shards/train-0.parquet", "wb") as file:
        table.to_parquet(file)
    with memory.open("/copy/x.tar", "wb") as file, tarfile.open(fileobj=file, mode="w") as archive:
        archive.add(folder / "dog/a.flac", "a.flac")
    expected = read_audio(folder / "dog/a.flac", 8000)
    try:
        rows = load_audio_dataset("memory://copy/clips")
        local = [
            row["audio"]["path"].replace(str(folder), "memory://copy/clips") for row in load_audio_dataset(folder)
        ]
        assert [row["audio"]["path"] for row in rows] == local
        for data, streaming in (("t.csv", False), ("shards", True), ("x.tar", True), ("clips/dog/a.flac", False)):
            row = next(iter(load_audio_dataset(f"memory://copy/{data}", streaming=streaming)))
            np.testing.assert_array_equal(read_audio(row["audio"], 8000), expected)
    finally:
        memory.rm("/copy", recursive=True)
