"""The search for similar sounds, with a model from random weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import soundfile
from tiny import MEL, build

from asit_hf import ASiTFeatureExtractor
from asit_hf.corpus.embeddings import EmbeddingSettings, EmbeddingWriter, embedding_schema
from asit_hf.evaluation.embeddings import embed_files, embedding_size
from asit_hf.loading import load_encoder
from asit_hf.utils.weights import model_hash
from examples import similar

RATE = 16000


@pytest.fixture
def sounds(tmp_path) -> Path:
    """Tones of 300 and 3000 Hz, of several lengths and rates, and a file that is no audio."""
    rng = np.random.default_rng(0)
    for index, hertz in enumerate((300, 300, 300, 3000, 3000)):
        rate, seconds = (RATE, 8000)[index % 2], 1 + 0.1 * index
        tone = np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate) + rng.normal(0, 0.01)
        (tmp_path / "sounds" / str(hertz)).mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / "sounds" / str(hertz) / f"{index}.wav", 0.5 * tone, rate)
    (tmp_path / "sounds" / "damaged.wav").write_bytes(b"not a sound")
    build(pooling_mode="cls_mean").save_pretrained(tmp_path / "model")
    ASiTFeatureExtractor(num_mel_bins=MEL).save_pretrained(tmp_path / "model")
    return tmp_path / "sounds"


def write_table(sounds: Path, rows: str = "clip", pooling: str = "mean", **settings) -> Path:
    """A table of the sounds above, in parts of four rows, of a model from random weights."""
    model, extractor = load_encoder(sounds.parent / "model"), ASiTFeatureExtractor(num_mel_bins=MEL)
    made = EmbeddingSettings(
        model=str(sounds.parent / "model"),
        model_hash=model_hash(model),
        encoder="teacher",
        dtype="float32",
        pooling=pooling,
        num_layers=1,
        rows=rows,
        window_seconds=30.0,
        max_seconds=None,
        sampling_rate=RATE,
        hidden_size=model.config.hidden_size,
        data=str(sounds),
    )
    files = sorted(sounds.rglob("*.wav"))
    table = []
    for file, embedded in zip(files, embed_files(model, extractor, files, pooling)):
        name = str(file.relative_to(sounds))
        if isinstance(embedded, Exception):
            table.append({"file": name, "error": str(embedded)})
            continue
        matrix = embedded.timestamps if rows == "time_patch" else embedded.scene[None]
        table += [
            {"file": name, "start": i / 10, "end": i / 10 + 0.25, "embedding": row} for i, row in enumerate(matrix)
        ]
    folder = sounds.parent / "table"
    folder.mkdir()
    dim = model.config.hidden_size if rows == "time_patch" else embedding_size(model, pooling)
    for number, start in enumerate(range(0, len(table), 4)):
        schema = embedding_schema(dim, replace(made, **settings))
        with EmbeddingWriter(folder / f"part-{number:05}.parquet", schema) as writer:
            writer.write(table[start : start + 4])
    return folder


def test_the_nearest_sounds_are_those_of_the_querys_pitch(sounds, capsys):
    pytest.importorskip("sentence_transformers")
    picture, query = sounds.parent / "similar.png", sounds / "300" / "0.wav"
    arguments = [str(sounds.parent / "model"), str(sounds), str(query), "--batch_size", "2"]
    found = similar.main([*arguments, "--top_k", "3", "--picture", str(picture)])
    assert [one.path.parent.name for one in found] == ["300", "300", "3000"]
    assert query not in [one.path for one in found]
    cosines = [one.cosine for one in found]
    assert cosines == sorted(cosines, reverse=True)
    assert 1 + 1e-6 > cosines[0] > cosines[2] > -1
    out, err = capsys.readouterr()
    assert [line.split()[1] for line in out.splitlines() if "/" in line and "damaged" not in line] == [
        str(one.path.relative_to(sounds)) for one in found
    ]
    assert "damaged.wav" in out + err
    assert picture.stat().st_size > 1000
    assert len(similar.main([*arguments, "--top_k", "100"])) == 4


@pytest.mark.parametrize(
    ("rows", "pooling"), [("clip", "mean_std_time"), ("window", "cls_mean"), ("time_patch", "cls")]
)
def test_a_table_is_searched_as_its_model_embeds(sounds, capsys, rows, pooling):
    table, query = write_table(sounds, rows, pooling), sounds / "300" / "0.wav"
    picture = sounds.parent / "similar.png"
    arguments = ["--embeddings", str(table), "--query", str(query), "--index", "sklearn", "--top_k"]
    found = similar.main([*arguments, "2", "--picture", str(picture)])
    assert [one.path.parent.name for one in found] == ["300", "300"]
    assert query not in [one.path for one in found]
    assert found[0].cosine >= found[1].cosine > 0.9
    assert picture.stat().st_size > 1000
    everything = similar.main([*arguments, "100"])
    assert everything[:2] == found
    assert len(everything) == (4 if rows != "time_patch" else 7 + 7 + 7 + 8)
    assert {one.name for one in everything} == {"300/1.wav", "300/2.wav", "3000/3.wav", "3000/4.wav"}
    lines = capsys.readouterr().out.splitlines()
    assert sum(" s" in line and "0.00-0.25" in line for line in lines[-len(everything) :]) == (
        4 if rows != "clip" else 0
    )


def test_rows_are_those_of_the_clips(sounds):
    """The cosine of a row with its own sound, under another name, is 1."""
    table, query = write_table(sounds, "clip", "cls_mean"), sounds / "300" / "1.wav"
    copy = query.rename(sounds.parent / "query.wav")
    (first, *_) = similar.search_table(table, copy, 3)
    assert (first.name, first.path) == ("300/1.wav", None)
    assert first.cosine == pytest.approx(1, abs=1e-5)
    with pytest.raises(FileNotFoundError, match=r"300/1\.wav"):
        similar.main(["--embeddings", str(table), "--query", str(copy), "--picture", str(sounds.parent / "a.png")])


def test_a_query_is_embedded_by_the_model_of_the_table_only(sounds):
    table, query = write_table(sounds), sounds / "300" / "0.wav"
    expected = similar.search_table(table, query, 3)
    (sounds.parent / "model").rename(sounds.parent / "moved")
    with pytest.raises(FileNotFoundError, match="model"):
        similar.search_table(table, query, 3)
    assert similar.search_table(table, query, 3, model=str(sounds.parent / "moved")) == expected
    build(seed=1).save_pretrained(sounds.parent / "moved")
    hashes = model_hash(build(pooling_mode="cls_mean")), model_hash(build(seed=1))
    with pytest.raises(ValueError, match=f"{hashes[0]}.*{hashes[1]}"):
        similar.search_table(table, query, 3, model=str(sounds.parent / "moved"))


def test_a_table_without_settings(sounds):
    table, query = write_table(sounds), sounds / "300" / "0.wav"
    part = table / "part-00000.parquet"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(part).replace_schema_metadata(), part)
    with pytest.raises(ValueError, match="settings"):
        similar.search_table(part, query, 3)


@pytest.mark.parametrize("index", ["sklearn", "faiss"])
@pytest.mark.parametrize("top_k", [1, 7, 60])
def test_every_index_finds_the_same_rows(index, top_k):
    """`make tables` installs faiss."""
    if index == "faiss":
        pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(50, 24)).astype(np.float32)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    query = 2 * matrix[3] + matrix[20]
    query /= np.linalg.norm(query)
    expected, found = similar.nearest(matrix, query, top_k), similar.SEARCHES[index](matrix, query, top_k)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=1e-6)
    assert len(found[0]) == min(top_k, 50)


@pytest.mark.parametrize(
    ("query", "options", "said"),
    [
        ("none.wav", [], "none.wav"),
        ("300/0.wav", ["--top_k", "0"], "top_k"),
        ("300/0.wav", ["--batch_size", "-1"], "-1"),
        ("300/0.wav", ["--index", "sklearn"], "--embeddings"),
        ("300/0.wav", ["--query", "other.wav"], "other.wav"),
        ("300/0.wav", ["--embeddings", "table"], "folder"),
    ],
)
def test_wrong_arguments(sounds, capsys, query, options, said):
    with pytest.raises(SystemExit):
        similar.main([str(sounds.parent / "model"), str(sounds), str(sounds / query), *options])
    assert said in capsys.readouterr().err


def test_an_unreadable_query(sounds, capsys):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(ValueError, match="1 unreadable"):
        similar.main([str(sounds.parent / "model"), str(sounds), str(sounds / "damaged.wav")])
    assert "damaged.wav" in "".join(capsys.readouterr())
