import os
import pickle

import numpy as np
import pytest
import soundfile

from asit_hf.corpus.sources import open_corpus
from asit_hf.data.audio import read_audio


@pytest.fixture
def folder(tmp_path):
    """rain/a.wav, rain/b.flac and wind/c.wav, of 100, 200 and 300 samples."""
    for index, name in enumerate(("rain/a.wav", "rain/b.flac", "wind/c.wav"), 1):
        write(tmp_path / "sounds" / name, 100 * index)
    return tmp_path / "sounds"


def write(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(samples, 0.5), 8000)


def files(corpus, *args):
    return [clip.file for clip in corpus.clips(*args)]


def lengths(corpus):
    """Samples of every clip, by which the files above are told apart."""
    return [len(read_audio(clip.source, 8000)) for shard in range(corpus.num_shards) for clip in corpus.clips(shard)]


def test_a_folder(folder):
    corpus = open_corpus(folder)
    assert (corpus.num_clips, corpus.num_shards) == (3, 1)
    assert files(corpus) == ["rain/a.wav", "rain/b.flac", "wind/c.wav"]
    assert lengths(corpus) == [100, 200, 300]
    assert files(corpus, 0, 1) == ["rain/b.flac", "wind/c.wav"]
    assert files(corpus, 0, 1, 2) == ["rain/b.flac"]
    assert files(corpus, 0, 2, 9) == ["wind/c.wav"]
    assert files(pickle.loads(pickle.dumps(corpus))) == files(corpus)


def test_one_file(folder):
    corpus = open_corpus(folder / "rain/a.wav")
    assert (files(corpus), lengths(corpus)) == (["a.wav"], [100])


def test_names_of_several_inputs_lead_to_the_files(folder, monkeypatch):
    write(folder / "wind/a.wav", 50)
    monkeypatch.chdir(folder)
    corpus = open_corpus(["rain", "wind", "rain/a.wav"])
    assert files(corpus) == ["rain/a.wav", "rain/b.flac", "wind/a.wav", "wind/c.wav", "rain/a.wav"]
    assert files(corpus, 0, 1, 3) == ["rain/b.flac", "wind/a.wav"]
    assert [os.path.getsize(name) for name in files(corpus)] == [os.path.getsize(c.source) for c in corpus.clips()]


def test_a_manifest(folder, tmp_path):
    manifest = tmp_path / "meta.csv"
    manifest.write_text("path,label\nsounds/wind/c.wav,wind\nsounds/rain/a.wav,rain;drops\nsounds/wind/c.wav,wind\n")
    corpus = open_corpus(manifest)
    assert files(corpus) == ["sounds/wind/c.wav", "sounds/rain/a.wav", "sounds/wind/c.wav"]
    assert [clip.label for clip in corpus.clips()] == ["wind", "rain;drops", "wind"]
    assert lengths(corpus) == [300, 100, 300]


def test_fingerprint(folder):
    first = open_corpus(folder).fingerprint
    assert open_corpus(str(folder)).fingerprint == first
    (folder / "wind/c.wav").rename(folder / "wind/d.wav")
    assert open_corpus(folder).fingerprint != first
