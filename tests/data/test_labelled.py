import json

import numpy as np
import pytest
import soundfile

from asit_hf.data import filter_rows, load_audio_dataset, load_unlabelled


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    (folder / "audio").mkdir()
    (folder / "plain").mkdir()
    for index in range(6):
        soundfile.write(folder / "audio" / f"{index}.wav", np.full(800, 0.1 * index), 16000)
    soundfile.write(folder / "plain" / "x.flac", np.zeros(800), 16000)
    rows = [f"{index}.wav,{index % 3},{'ab'[index % 2]}" for index in range(6)]
    (folder / "meta.csv").write_text("filename,fold,category\n" + "\n".join(rows) + "\n")
    return folder


def names(dataset):
    return [row["path"].rsplit("/", 1)[-1] for row in dataset["audio"]]


def test_sources_with_options_of_their_own_are_joined(folder):
    spec = {"source": str(folder / "meta.csv"), "root": str(folder / "audio"), "filter": ["fold=0,2", "label=a"]}
    dataset = load_unlabelled([spec, str(folder / "plain")])
    assert dataset.column_names == ["audio"]
    assert names(dataset) == ["0.wav", "2.wav", "x.flac"]
    assert names(load_unlabelled([json.dumps(spec), str(folder / "plain")])) == names(dataset)


def test_filters_work_by_label_name(folder):
    dataset = load_audio_dataset(folder / "meta.csv", root=folder / "audio", label_column="category")
    assert names(filter_rows(dataset, ["label=b"])) == ["1.wav", "3.wav", "5.wav"]
    assert names(filter_rows(dataset, [])) == names(dataset)


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        ([], ["at least one source"]),
        ([{"root": "x"}], ["'source'", "root"]),
        (['{"filter": []}'], ["'source'", "filter"]),
    ],
)
def test_wrong_sources_are_refused(specs, words):
    with pytest.raises(ValueError) as error:
        load_unlabelled(specs)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("condition", "words"),
    [("fold", ["COLUMN=VALUE", "fold"]), ("speaker=1", ["speaker", "fold"]), ("fold=", ["COLUMN=VALUE"])],
)
def test_wrong_filters_are_refused(folder, condition, words):
    dataset = load_audio_dataset(folder / "meta.csv", root=folder / "audio")
    with pytest.raises(ValueError) as error:
        filter_rows(dataset, [condition])
    assert all(word in str(error.value) for word in words)


def test_a_filter_that_keeps_nothing_is_refused(folder):
    with pytest.raises(ValueError, match="fold=9"):
        load_unlabelled({"source": str(folder / "meta.csv"), "root": str(folder / "audio"), "filter": ["fold=9"]})
