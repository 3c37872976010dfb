import json
import os
import pickle
import subprocess
import sys
import tarfile
from threading import Thread

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
from datasets import Audio, ClassLabel, Dataset, IterableDataset, List
from loopback_files import serve
from loopback_hub import Hub, run
from odd_names import copy_with_odd_names

from asit_hf.corpus.sources import open_corpus
from asit_hf.data.audio import read_audio

NAMES = ("rain/a.wav", "rain/b.flac", "wind/c.wav")  # of 100, 200 and 300 samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "sounds"
    for index, name in enumerate(NAMES, 1):
        write(folder / name, 100 * index)
    (folder / "rain/.hidden.wav").touch()
    return folder


def write(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(samples, 0.5), 8000)


def clips_of(corpus):
    return [clip for shard in range(corpus.num_shards) for clip in corpus.clips(shard)]


def files(corpus):
    return [clip.file for clip in clips_of(corpus)]


def labels(corpus):
    return [clip.label for clip in clips_of(corpus)]


def lengths(corpus):
    """Samples of every clip, by which the files are told apart."""
    return [len(read_audio(clip.source, 8000)) for clip in clips_of(corpus)]


def stored(folder, names=NAMES, rows=1):
    """The audio column of a data set that holds its audio."""
    return [{"path": os.path.basename(name), "bytes": (folder / name).read_bytes()} for name in names] * rows


def write_shards(folder, target):
    """Two parquet files with class ids, of two and one rows."""
    target.mkdir(parents=True)
    dataset = Dataset.from_dict({"audio": stored(folder), "label": [1, 1, 0]})
    dataset = dataset.cast_column("audio", Audio(decode=False)).cast_column(
        "label", ClassLabel(names=["wind", "rain"])
    )
    for shard, rows in enumerate(((0, 1), (2,))):
        dataset.select(rows).to_parquet(target / f"train-{shard:05d}-of-00002.parquet")
    return dataset


def write_tars(folder, target):
    target.mkdir(parents=True)
    for shard, names in enumerate((NAMES[:2], NAMES[2:])):
        with tarfile.open(target / f"{shard}.tar", "w") as archive:
            for name in names:
                archive.add(folder / name, name)


def test_a_folder(folder):
    corpus = open_corpus(folder)
    assert (corpus.num_clips, corpus.num_shards) == (3, 1)
    assert files(corpus) == list(NAMES)
    assert lengths(corpus) == [100, 200, 300]
    assert labels(corpus) == [None] * 3


@pytest.mark.parametrize(("start", "stop"), [(0, None), (1, None), (1, 2), (2, 9), (3, None), (0, 0), (0, 1)])
@pytest.mark.parametrize("kind", ["folder", "several", "rows", "stream", "parquet", "tar"])
def test_a_range_of_clips(folder, tmp_path, kind, start, stop):
    dataset = write_shards(folder, tmp_path / "parquet")
    write_tars(folder, tmp_path / "tar")
    data = {
        "folder": folder,
        "several": [folder / "rain", folder / NAMES[2]],
        "rows": dataset,
        "stream": dataset.to_iterable_dataset(num_shards=2),
        "parquet": tmp_path / "parquet",
        "tar": tmp_path / "tar",
    }
    corpus = open_corpus(data[kind])
    whole = list(corpus.clips())
    assert list(corpus.clips(0, start, stop)) == whole[start:stop]
    assert list(pickle.loads(pickle.dumps(corpus)).clips(0, start, stop)) == whole[start:stop]


@pytest.mark.slow
def test_a_folder_is_opened_without_heavy_packages(folder):
    code = "import sys; from asit_hf.corpus.sources import open_corpus; print(open_corpus(sys.argv[1]).num_clips)"
    code += "; print([name for name in ('datasets', 'pyarrow', 'pandas', 'fsspec') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["3", "[]"]


def test_one_file(folder):
    corpus = open_corpus(str(folder / "rain/a.wav"))
    assert (files(corpus), lengths(corpus)) == (["a.wav"], [100])


def test_names_of_several_inputs_lead_to_the_files(folder, monkeypatch):
    monkeypatch.chdir(folder)
    corpus = open_corpus(["rain", "wind", "./rain/a.wav", folder / "wind/c.wav"])
    assert files(corpus) == ["rain/a.wav", "rain/b.flac", "wind/c.wav", "./rain/a.wav", str(folder / "wind/c.wav")]
    assert [len(read_audio(name, 8000)) for name in files(corpus)] == lengths(corpus) == [100, 200, 300, 100, 300]


def test_odd_names(folder, tmp_path, monkeypatch):
    texts = copy_with_odd_names(folder / "rain/a.wav", tmp_path / "odd")
    corpus = open_corpus(tmp_path / "odd")
    assert (files(corpus), lengths(corpus)) == (texts, [100] * len(texts))
    monkeypatch.chdir(tmp_path)
    corpus = open_corpus(["odd", folder])
    assert [len(read_audio(name, 8000)) for name in files(corpus)] == lengths(corpus)


ROWS = [("wind/c.wav", "wind"), ("rain/a.wav", "rain;drops"), ("wind/c.wav", None)]
TABLE = "path,label,split\n" + "".join(f"{name},{label or ''},test\n" for name, label in ROWS) + "gone.wav,x,train\n"
OBJECTS = [{"path": name, "label": label, "split": "test"} for name, label in ROWS] + [{"path": "x", "split": "train"}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", TABLE),
        ("t.tsv", TABLE.replace(",", "\t")),
        ("t.txt", TABLE),
        ("t.jsonl", "\n".join(map(json.dumps, OBJECTS))),
        ("t.json", json.dumps(OBJECTS, indent=1)),
        ("t.json", json.dumps({"data": OBJECTS})),
    ],
)
def test_manifests(folder, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    corpus = open_corpus(tmp_path / name, split="test", root=folder)
    assert (corpus.num_clips, corpus.num_shards) == (3, 1)
    assert files(corpus) == [name for name, _ in ROWS]
    assert labels(corpus) == ["wind", "rain;drops", None]
    assert lengths(corpus) == [300, 100, 300]


@pytest.mark.parametrize(
    ("cells", "texts"),
    [
        (["dog", " cat ", ""], ["dog", "cat", None]),
        (["dog;cat", "cat", "dog"], ["dog;cat", "cat", "dog"]),
        (["Male speech, man", "dog", "dog"], ["Male speech, man", "dog", "dog"]),
        (["1", "0", ""], ["1", "0", None]),
        (["1.0", "2.0", "nan"], ["1", "2", None]),
        (["0.5", "1", ""], ["0.5", "1.0", None]),
        (["007", "7", "7"], ["007", "7", "7"]),
    ],
)
def test_labels_as_text(folder, tmp_path, cells, texts):
    rows = "".join(f'{name},"{cell}"\n' for name, cell in zip(NAMES, cells))
    (tmp_path / "t.csv").write_text(f"file,label\n{rows}")
    assert labels(open_corpus(tmp_path / "t.csv", root=folder)) == texts


def test_labels_in_json(folder, tmp_path):
    for of_rows, texts in ((["a", ["b", "c"], []], ["a", "b;c", None]), ([1, "b", None], ["1", "b", None])):
        rows = [{"file": name, "label": label} for name, label in zip(NAMES, of_rows)]
        (tmp_path / "t.json").write_text(json.dumps(rows))
        assert labels(open_corpus(tmp_path / "t.json", root=folder)) == texts


def test_labels_that_are_objects_are_refused(folder, tmp_path):
    (tmp_path / "t.json").write_text(json.dumps([{"file": NAMES[0], "label": {"a": 1}}]))
    with pytest.raises(ValueError, match="row 0 of .*t.json.*'a'"):
        open_corpus(tmp_path / "t.json", root=folder)


def test_files_found_below_the_working_directory(folder, monkeypatch, caplog):
    monkeypatch.chdir(folder.parent)
    (folder.parent / "moved.csv").write_text("file\na.wav\n")
    assert files(open_corpus("moved.csv")) == [f"{folder.name}/rain/a.wav"]
    assert "found below the working directory" in caplog.text


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "paths", "saved", "stream"])
def test_without_labels(folder, tmp_path, kind, caplog):
    data, names = tmp_path / f"data.{kind}", [str(folder / name) for name in NAMES]
    columns = {"category": ["dog"] * 3, "target": [1] * 3}
    if kind == "csv":
        data.write_text("file,category,target\n" + "".join(f"{name},dog,1\n" for name in names))
    elif kind == "jsonl":  # labels that could not be read
        data.write_text("".join(json.dumps({"file": name, "label": {"of": ["dog"]}}) + "\n" for name in names))
    elif kind == "paths":
        data = data.with_suffix(".parquet")
        Dataset.from_dict({"file": names, **columns}).to_parquet(data)
    elif kind == "parquet":
        Dataset.from_dict({"audio": stored(folder), **columns}).to_parquet(data)
    elif kind == "saved":
        Dataset.from_dict({"audio": stored(folder), **columns}).save_to_disk(data)
    else:
        data = Dataset.from_dict({"audio": stored(folder), "label": [1, 1, 0]}).to_iterable_dataset()
    corpus = open_corpus(data, labels=False)
    assert not corpus.has_labels
    assert labels(corpus) == [None] * 3
    assert lengths(corpus) == [100, 200, 300]
    assert "label" not in caplog.text


def test_label_separator(folder, tmp_path):
    (tmp_path / "t.csv").write_text("file,label\nrain/a.wav,a;b\nrain/b.flac,a+b\n")
    assert labels(open_corpus(tmp_path / "t.csv", root=folder, label_separator="none")) == ["a;b", "a+b"]
    assert labels(open_corpus(tmp_path / "t.csv", root=folder, label_separator="+")) == ["a;b", "a;b"]


def test_names_in_a_manifest(folder, tmp_path):
    """Files are named as in the table, relative to its folder; files found elsewhere by where they are."""
    table = folder.parent / "elsewhere.csv"
    table.write_text(f"file\nsounds/rain/a.wav\n{folder}/wind/c.wav\nb\n")
    corpus = open_corpus(table)
    assert files(corpus) == ["sounds/rain/a.wav", "sounds/wind/c.wav", "sounds/rain/b.flac"]
    assert lengths(corpus) == [100, 300, 200]
    several = open_corpus([table, folder / "wind"])
    assert [len(read_audio(name, 8000)) for name in files(several)] == lengths(several) == [100, 300, 200, 300]


@pytest.mark.parametrize("place", ["sounds", "./sounds", "sounds/", "wind/../sounds", "."])
def test_files_found_elsewhere_by_relative_paths(tmp_path, monkeypatch, place):
    for index, name in enumerate(("train/a.wav", "test/b.wav"), 1):
        write(tmp_path / "sounds" / name, 100 * index)
    (tmp_path / "sounds/metadata.csv").write_text("file\na\nb\n")
    (tmp_path / "wind").mkdir()
    monkeypatch.chdir(tmp_path / "sounds" if place == "." else tmp_path)
    for corpus in (open_corpus(place), open_corpus(f"{place}/metadata.csv", root=place)):
        assert (files(corpus), lengths(corpus)) == (["train/a.wav", "test/b.wav"], [100, 200])
    assert files(open_corpus(place, split="test")) == ["test/b.wav"]
    assert [len(read_audio(name, 8000)) for name in files(open_corpus([place, place]))] == [100, 200] * 2


def test_a_folder_with_metadata(folder, tmp_path):
    for name in NAMES:
        write(tmp_path / "data/train" / name, 10)
        write(tmp_path / "data/test" / name, 20)
    (tmp_path / "data/metadata.csv").write_text("file_name,label\ntrain/rain/a.wav,x\ntest/wind/c.wav,y\n")
    assert files(open_corpus(tmp_path / "data")) == ["train/rain/a.wav", "test/wind/c.wav"]
    corpus = open_corpus(tmp_path / "data", split="test")
    assert (files(corpus), labels(corpus), lengths(corpus)) == (["test/wind/c.wav"], ["y"], [20])
    (tmp_path / "data/metadata.csv").unlink()
    assert files(open_corpus(tmp_path / "data", split="test")) == [f"test/{name}" for name in NAMES]
    (tmp_path / "data/train.csv").write_text("file_name\nrain/a.wav\n")
    (tmp_path / "data/test.csv").write_text("file_name\nwind/c.wav\n")
    corpus = open_corpus(tmp_path / "data", split="test")
    assert (files(corpus), lengths(corpus)) == (["wind/c.wav"], [20])


def test_rows_of_a_data_set(folder, tmp_path):
    dataset = write_shards(folder, tmp_path / "parquet")
    dataset.save_to_disk(tmp_path / "saved")
    for data in (dataset, tmp_path / "saved"):
        corpus = open_corpus(data)
        assert (corpus.num_clips, corpus.num_shards) == (3, 1)
        assert files(corpus) == ["a.wav", "b.flac", "c.wav"]
        assert labels(corpus) == ["rain", "rain", "wind"]
        assert lengths(corpus) == [100, 200, 300]
    several = dataset.remove_columns("label").add_column("label", [[0, 1], [], [0]])
    several = several.cast_column("label", List(ClassLabel(names=["x", "y"])))
    for format in (None, "numpy", "arrow", "pandas"):
        assert labels(open_corpus(several.with_format(format))) == ["x;y", None, "x"]
    assert (
        files(open_corpus(dataset.with_transform(lambda rows: {"audio": ["x.wav"] * len(rows["audio"])})))[0]
        == "x.wav"
    )
    missing = dataset.remove_columns("label").add_column("label", [1, -1, 0], feature=ClassLabel(names=["x", "y"]))
    assert labels(open_corpus(missing)) == ["y", None, "x"]


def test_a_stream_without_features(folder):
    def rows():
        yield {"audio": str(folder / NAMES[0]), "label": "x"}
        yield {"audio": {"array": np.zeros(50), "sampling_rate": 8000}, "label": "y"}

    corpus = open_corpus(IterableDataset.from_generator(rows))
    assert (files(corpus), labels(corpus), lengths(corpus)) == (
        [f"{folder}/{NAMES[0]}", "data#1"],
        ["x", "y"],
        [100, 50],
    )


@pytest.mark.parametrize("kind", ["parquet", "tar", "stream"])
def test_streams_of_shards(folder, tmp_path, kind):
    dataset = write_shards(folder, tmp_path / "parquet" / "data")
    write_tars(folder, tmp_path / "tar")
    corpus = open_corpus(dataset.to_iterable_dataset(num_shards=2) if kind == "stream" else tmp_path / kind)
    assert (corpus.num_clips, corpus.num_shards) == (None, 2)
    assert [len(list(corpus.clips(shard))) for shard in (0, 1)] == [2, 1]
    tars = ["0.tar/rain/a.wav", "0.tar/rain/b.flac", "1.tar/wind/c.wav"]
    assert files(corpus) == (tars if kind == "tar" else ["a.wav", "b.flac", "c.wav"])
    assert labels(corpus) == ([None] * 3 if kind == "tar" else ["rain", "rain", "wind"])
    assert lengths(corpus) == [100, 200, 300]


def test_shards_are_skipped_by_row_groups(folder, tmp_path):
    table = pyarrow.table({"audio": stored(folder, rows=20), "n": range(60)})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=7)
    whole = clips_of(open_corpus(tmp_path / "x.parquet"))
    assert len(whole) == 60
    for start, stop in ((0, 60), (7, 9), (13, 50), (55, None), (60, None)):
        assert list(open_corpus(tmp_path / "x.parquet").clips(0, start, stop)) == whole[start:stop]


def test_audio_without_a_path_is_named_by_its_row(folder, tmp_path):
    content = [(folder / name).read_bytes() for name in NAMES]
    pyarrow.parquet.write_table(pyarrow.table({"audio": content}), tmp_path / "x.parquet")
    corpus = open_corpus(tmp_path / "x.parquet")
    assert (files(corpus), lengths(corpus)) == ([f"x.parquet#{row}" for row in range(3)], [100, 200, 300])
    assert [clip.file for clip in corpus.clips(0, 2)] == ["x.parquet#2"]
    dataset = Dataset.from_dict({"audio": content})
    assert files(open_corpus(dataset)) == ["data#0", "data#1", "data#2"]
    names = files(open_corpus([dataset, dataset, dataset.to_iterable_dataset(num_shards=2), tmp_path / "x.parquet"]))
    assert len(set(names)) == 12


def test_parquet_files_of_paths_are_lists(folder, tmp_path):
    table = pyarrow.table({"file": list(NAMES), "label": ["a;b", "b", None]})
    categories = pyarrow.table({name: table[name].dictionary_encode() for name in table.column_names})  # of pandas
    for one in (table, categories):
        pyarrow.parquet.write_table(one, tmp_path / "x.parquet")
        corpus = open_corpus(tmp_path / "x.parquet", split="train", root=folder)
        assert (corpus.num_clips, files(corpus), lengths(corpus)) == (3, list(NAMES), [100, 200, 300])
        assert labels(corpus) == ["a;b", "b", None]


def test_splits_of_parquet_files(folder, tmp_path):
    for name in ("data/train-00000-of-00001", "data/test-00000-of-00002", "data/test-00001-of-00002"):
        (tmp_path / "data").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"audio": stored(folder, NAMES[:1])}), tmp_path / f"{name}.parquet")
    assert open_corpus(tmp_path, split="test").num_shards == 2
    assert open_corpus(tmp_path, split="train").num_shards == 1
    for split in (None, "validation"):
        with pytest.raises(ValueError, match="train, test|test, train"):
            open_corpus(tmp_path, split=split)


def test_lists_and_streams_together(folder, tmp_path):
    write_tars(folder, tmp_path / "tar")
    corpus = open_corpus([folder, tmp_path / "tar", tmp_path / "tar/1.tar"])
    assert (corpus.num_clips, corpus.num_shards) == (None, 4)
    assert lengths(corpus) == [100, 200, 300, 100, 200, 300, 300]
    assert files(corpus)[2:4] == [f"{folder}/wind/c.wav", f"{tmp_path}/tar/0.tar/rain/a.wav"]


@pytest.fixture(params=["memory", "http"])
def remote(request, folder, tmp_path):
    """The URL of a copy of `folder` in `sounds`, a manifest, tar and parquet files."""
    write_shards(folder, tmp_path / "parquet")
    write_tars(folder, tmp_path / "tar")
    (tmp_path / "t.csv").write_text("".join(f"{line}\n" for line in ("file,label", "wind/c.wav,x", "rain/a.wav,y;z")))
    for name in NAMES:
        write(tmp_path / "sounds" / name, 100 * NAMES.index(name) + 100)
    if request.param == "http":
        with serve(tmp_path) as server:
            yield server.url
        return
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), "/copy", recursive=True)
    yield "memory://copy"
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


def test_urls(remote, tmp_path):
    corpus = open_corpus(f"{remote}/sounds")
    assert (corpus.num_clips, files(corpus), lengths(corpus)) == (3, list(NAMES), [100, 200, 300])
    corpus = open_corpus([f"{remote}/sounds/rain/a.wav", f"{remote}/sounds/wind"])
    assert [len(read_audio(name, 8000)) for name in files(corpus)] == lengths(corpus) == [100, 300]
    corpus = open_corpus(f"{remote}/t.csv", root=f"{remote}/sounds")
    assert (files(corpus), labels(corpus), lengths(corpus)) == (["wind/c.wav", "rain/a.wav"], ["x", "y;z"], [300, 100])
    for kind in ("tar", "parquet"):
        corpus = open_corpus(f"{remote}/{kind}")
        assert (corpus.num_shards, lengths(corpus)) == (2, [100, 200, 300])
        assert len(corpus.fingerprint) == 32
    (tmp_path / "sounds/t.csv").write_text("file,label\nwind/c.wav,x\n")
    with serve(tmp_path) as server:
        corpus = open_corpus(f"{server.url}/sounds/t.csv?download=true")
        assert (files(corpus), lengths(corpus)) == (["wind/c.wav"], [300])
    with pytest.raises(FileNotFoundError, match=r"gone\.wav"):
        open_corpus(f"{remote}/gone.wav")
    with pytest.raises(FileNotFoundError, match="root"):
        open_corpus(f"{remote}/t.csv")


READ_HUB = """
import json, sys
from asit_hf.corpus.sources import open_corpus
from asit_hf.data.audio import read_audio

for data, split in json.loads(sys.argv[1]):
    corpus = open_corpus(data, split=split)
    clips = [clip for shard in range(corpus.num_shards) for clip in corpus.clips(shard)]
    rows = [[clip.file, clip.label, len(read_audio(clip.source, 8000))] for clip in clips]
    print(json.dumps([corpus.num_clips, corpus.num_shards, rows]))
"""


@pytest.mark.slow
def test_the_hub(folder, tmp_path):
    """By name and by URL, with the Hub's own file system."""
    write_shards(folder, tmp_path / "parquet")
    shards = {f"data/{path.name}": path.read_bytes() for path in (tmp_path / "parquet").iterdir()}
    clips = {f"clips/{name}": (folder / name).read_bytes() for name in NAMES}
    server = Hub()
    server.repositories = {"me/shards": shards, "me/clips": clips | {"meta.csv": b"path,label\nclips/rain/b.flac,x\n"}}
    Thread(target=server.serve_forever, daemon=True).start()
    names = ["me/shards", "hf://datasets/me/shards", "hf://datasets/me/clips/clips", "hf://datasets/me/clips/meta.csv"]
    tries = list(zip(names, ["train", "train", None, None]))
    by_name, by_url, files, manifest = map(json.loads, run(READ_HUB, server, tmp_path, json.dumps(tries)).splitlines())
    server.shutdown()
    server.server_close()
    assert by_name == by_url == [None, 2, [["a.wav", "rain", 100], ["b.flac", "rain", 200], ["c.wav", "wind", 300]]]
    assert files == [3, 1, [[name, None, 100 * index] for index, name in enumerate(NAMES, 1)]]
    assert manifest == [1, 1, [["clips/rain/b.flac", "x", 200]]]


def test_fingerprints(folder, tmp_path):
    dataset = write_shards(folder, tmp_path / "parquet")
    write_tars(folder, tmp_path / "tar")
    fingerprints = [
        open_corpus(data).fingerprint
        for data in (folder, [folder, folder], folder / "rain", dataset, tmp_path / "parquet", tmp_path / "tar")
    ]
    assert len(set(fingerprints)) == 6
    assert open_corpus(str(folder)).fingerprint == fingerprints[0]
    assert open_corpus(Dataset.from_dict(dataset[:])).fingerprint == fingerprints[3]
    assert open_corpus(dataset.select([0, 1])).fingerprint != fingerprints[3]
    (tmp_path / "tar/1.tar").unlink()
    assert open_corpus(tmp_path / "tar").fingerprint != fingerprints[5]


@pytest.mark.parametrize("kind", ["saved", "parquet", "tar"])
def test_fingerprints_differ_if_names_do(folder, tmp_path, kind):
    for name in ("x", "y"):
        Dataset.from_dict({"audio": [b"", b""]}).save_to_disk(tmp_path / name / "saved")
        write_shards(folder, tmp_path / name / "parquet")
        write_tars(folder, tmp_path / name / "tar")
    one, other = (open_corpus([tmp_path / name / kind, folder / "rain/a.wav"]) for name in ("x", "y"))
    assert files(one) != files(other)
    assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("nothing/at/all", {}, FileNotFoundError, "nothing/at/all"),
        ("empty", {}, FileNotFoundError, r"no audio in .*empty.*1 \.doc"),
        ("x.doc", {}, ValueError, r"\.wav .*x\.doc"),
        ("sounds", {"split": "test"}, ValueError, r"'test'.*\['rain', 'wind'\]"),
        ("sounds", {"root": "x"}, ValueError, "root"),
        ("sounds/rain/a.wav", {"split": "test"}, ValueError, "split"),
        ("t.csv", {"split": "test"}, ValueError, "'test'"),
        ("t.csv", {"audio_column": "clip"}, ValueError, "'clip'.*file, label"),
        ("t.csv", {"label_column": "class"}, ValueError, "'class'.*file, label"),
        ("t.csv", {}, ValueError, "path in row 1 of .*t.csv"),
        ("x.parquet", {}, ValueError, r"wav of x\.parquet.*list"),
    ],
)
def test_errors(folder, tmp_path, monkeypatch, name, options, error, message):
    (tmp_path / "sounds").symlink_to(folder)
    (tmp_path / "empty").mkdir()
    for path in ("x.doc", "empty/x.doc"):
        (tmp_path / path).touch()
    (tmp_path / "t.csv").write_text("file,label\nsounds/rain/a.wav,x\n,y\n")
    pyarrow.parquet.write_table(pyarrow.table({"wav": [[0.5, 0.5]]}), tmp_path / "x.parquet")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        open_corpus(name, **options)


def test_no_inputs():
    with pytest.raises(ValueError, match="empty list"):
        open_corpus([])


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_damaged_shard_is_named(folder, tmp_path, kind):
    write_shards(folder, tmp_path / "parquet")
    write_tars(folder, tmp_path / "tar")
    path = sorted((tmp_path / kind).iterdir())[0]
    corpus = open_corpus(tmp_path / kind)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match=str(path)):
        clips_of(corpus)
