import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pyarrow.parquet
import pytest
import soundfile
import torch
from odd_names import copy_with_odd_names
from tiny import MEL, TINY

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForPreTraining
from asit_hf.corpus.embeddings import read_embeddings
from asit_hf.data import read_audio
from asit_hf.embed import embed_corpus, main
from asit_hf.evaluation.embeddings import embed, time_patch_centers, timestamp_embeddings
from asit_hf.loading import load_encoder
from asit_hf.utils.names import local_path

LENGTHS = {"a.flac": 16000, "b.flac": 4000, "deep/c.flac": 40000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sounds")
    (folder / "deep").mkdir()
    for seed, (name, samples) in enumerate(LENGTHS.items()):
        noise = np.random.default_rng(seed).normal(0, 0.1, samples).clip(-1, 1)
        soundfile.write(folder / name, noise, 16000)
    (folder / "broken.flac").write_bytes(b"not audio")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    ASiTForPreTraining(ASiTConfig(**TINY)).save_pretrained(folder)
    ASiTFeatureExtractor(num_mel_bins=MEL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_encoder(checkpoint), ASiTFeatureExtractor(num_mel_bins=MEL)


def command(checkpoint: Path, data: Path, output: Path, *more: object) -> int:
    return main([str(one) for one in (checkpoint, data, "--output", output, "--device", "cpu", *more)])


def test_one_row_per_clip(folder, checkpoint, loaded, tmp_path, capfd):
    output = tmp_path / "new" / "clips.parquet"
    assert command(checkpoint, folder, output, "--pooling", "cls_mean") == 0
    errors = capfd.readouterr().err
    assert errors.count("broken.flac") == 1
    assert "3 clips embedded, 1 unreadable" in errors
    table = pyarrow.parquet.read_table(output).to_pydict()
    assert table["file"] == ["a.flac", "b.flac", "broken.flac", "deep/c.flac"]
    assert [bool(error) for error in table["error"]] == [False, False, True, False]
    assert np.isnan(table["embedding"][2]).all()
    assert table["end"] == [1.0, 0.25, None, 2.5]
    found = read_embeddings(output)
    clips = [read_audio(folder / name, 16000) for name in LENGTHS]
    np.testing.assert_allclose(found.matrix, embed(*loaded, clips, "cls_mean", progress=False), atol=1e-5)
    assert (found.settings.pooling, found.settings.sampling_rate, found.settings.rows) == ("cls_mean", 16000, "clip")
    assert os.listdir(output.parent) == ["clips.parquet"]
    assert command(checkpoint, folder, output, "--strict") == 1


def test_a_row_per_time_patch(folder, checkpoint, loaded, tmp_path):
    assert command(checkpoint, folder, tmp_path / "patches.parquet", "--timestamps", "--window_seconds", "0.96") == 0
    found = read_embeddings(tmp_path / "patches.parquet")
    counts = [found.files.count(name) for name in LENGTHS]
    assert counts == [6, 1, 15]
    for name in ("a.flac", "b.flac"):
        embeddings, centers = timestamp_embeddings(*loaded, read_audio(folder / name, 16000))
        rows = [row for row, file in enumerate(found.files) if file == name]
        np.testing.assert_allclose(found.matrix[rows], embeddings, atol=1e-5)
        np.testing.assert_allclose(500 * (found.starts[rows] + found.ends[rows]), centers, atol=1e-3)
    long = [row for row, file in enumerate(found.files) if file == "deep/c.flac"]
    np.testing.assert_allclose(
        500 * (found.starts[long] + found.ends[long]), time_patch_centers(15, 16000, 16), atol=0.01
    )


def test_a_row_per_window(folder, checkpoint, loaded, tmp_path):
    options = ("--windows", "--window_seconds", "0.96", "--max_seconds", "2")
    assert command(checkpoint, folder / "deep/c.flac", tmp_path / "windows.parquet", *options) == 0
    found = read_embeddings(tmp_path / "windows.parquet")
    assert found.starts.tolist() == [0.0, 0.96]
    np.testing.assert_allclose(found.ends, [0.975, 1.935])
    clip = read_audio(folder / "deep/c.flac", 16000)
    windows = [clip[round(start * 16000) :][:15600] for start in found.starts]
    np.testing.assert_allclose(found.matrix, embed(*loaded, windows, progress=False), atol=1e-5)


def test_labels_and_float16(folder, checkpoint, loaded, tmp_path):
    manifest = tmp_path / "meta.csv"
    manifest.write_text("file,tags\na.flac,rain;wind\nbroken.flac,rain\nb.flac,wind\na.flac,\n")
    options = ("--root", folder, "--label_column", "tags", "--embedding_dtype", "float16")
    assert command(checkpoint, manifest, tmp_path / "clips.parquet", *options) == 0
    table = pyarrow.parquet.read_table(tmp_path / "clips.parquet")
    assert table["file"].to_pylist() == ["a.flac", "broken.flac", "b.flac", "a.flac"]
    assert table["label"].to_pylist() == ["rain;wind", "rain", "wind", None]
    assert table.schema.field("embedding").type == pyarrow.list_(pyarrow.float16(), 48)
    clip = read_audio(folder / "b.flac", 16000)
    found = read_embeddings(tmp_path / "clips.parquet").matrix
    np.testing.assert_allclose(found[1], embed(*loaded, [clip], progress=False)[0], atol=2e-3)
    np.testing.assert_array_equal(found[0], found[2])


def test_other_labels_are_other_settings(folder, checkpoint, tmp_path, capfd):
    manifest = tmp_path / "meta.csv"
    manifest.write_text("file,a,b\na.flac,rain,wind\n")
    assert command(checkpoint, manifest, tmp_path / "parts", "--root", folder, "--label_column", "a") == 0
    capfd.readouterr()
    assert command(checkpoint, manifest, tmp_path / "parts", "--root", folder, "--label_column", "b") == 1
    assert "label_column 'a' instead of 'b'" in capfd.readouterr().err


def test_processes_share_the_work_and_resume(folder, checkpoint, tmp_path, monkeypatch, caplog):
    options = ("--part_clips", "1", "--batch_size", "2")
    assert command(checkpoint, folder, tmp_path / "alone", *options) == 0
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert command(checkpoint, folder, tmp_path / "shared", *options) == 0
    assert "parts for" not in caplog.text
    names = sorted(os.listdir(tmp_path / "alone"))
    assert names == [".run.json", *(f"part-{number:05d}.parquet" for number in range(4))]
    contents = {name: (tmp_path / "alone" / name).read_bytes() for name in names}
    assert {name: (tmp_path / "shared" / name).read_bytes() for name in os.listdir(tmp_path / "shared")} == contents
    with pytest.raises(ValueError, match="folder"):
        embed_corpus(checkpoint, folder, tmp_path / "one.parquet")
    assert command(checkpoint, folder, tmp_path / "few", "--part_clips", "4") == 0
    assert "1 parts for 2 processes" in caplog.text
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")

    (tmp_path / "alone" / "part-00002.parquet").unlink()
    read_embeddings(tmp_path / "alone")
    assert "parts missing: 1" in caplog.text
    assert len(pandas.read_parquet(tmp_path / "alone")) == 3
    kept = (tmp_path / "alone" / "part-00001.parquet").stat().st_mtime_ns
    counts = embed_corpus(checkpoint, folder, tmp_path / "alone", device="cpu", progress=False)
    assert counts == {"clips": 1, "unreadable": 1, "parts": 3}
    assert {name: (tmp_path / "alone" / name).read_bytes() for name in names} == contents
    assert (tmp_path / "alone" / "part-00001.parquet").stat().st_mtime_ns == kept


def test_a_folder_of_other_embeddings_is_kept(folder, checkpoint, tmp_path, capfd):
    assert command(checkpoint, folder, tmp_path / "parts") == 0
    assert command(checkpoint, folder, tmp_path / "parts", "--encoder", "student") == 1
    assert "teacher" in capfd.readouterr().err
    assert command(checkpoint, folder / "deep", tmp_path / "parts") == 1
    assert "num_clips" in capfd.readouterr().err
    settings = json.loads((tmp_path / "parts" / ".run.json").read_text())
    assert (settings["encoder"], settings["num_clips"]) == ("teacher", 4)


@pytest.mark.slow
def test_under_torchrun(folder, checkpoint, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    arguments = [checkpoint, folder, "--output", tmp_path / "shared", "--part_clips", "1"]
    subprocess.run([*launcher, "asit_hf.embed", *map(str, arguments)], check=True, cwd=Path(__file__).parents[1])
    assert command(checkpoint, folder, tmp_path / "alone", "--part_clips", "1") == 0
    for name in os.listdir(tmp_path / "alone"):
        assert (tmp_path / "shared" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--output", "a.npz"], ".parquet"),
        (["--output", "a.parquet", "--timestamps", "--pooling", "mean"], "--pooling"),
        (["--output", "a.parquet", "--num_layers", "9"], "num_layers"),
        (["--output", "a.parquet", "--window_seconds", "0.01"], "window_seconds"),
        (["--output", "a.parquet", "--max_seconds", "0"], "max_seconds"),
        (["--output", "a.parquet", "--part_clips", "0"], "part_clips"),
        (["--output", "a.parquet", "--batch_size", "0"], "batch_size"),
    ],
)
def test_wrong_options(folder, checkpoint, more, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([str(checkpoint), str(folder), *more]) == 1
    assert message in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if path.suffix]


def test_names_of_any_bytes(folder, checkpoint, tmp_path, capfd):
    texts = copy_with_odd_names(folder / "b.flac", tmp_path / "odd")
    (tmp_path / "odd" / os.fsdecode(b"\xff.wav")).write_text("not audio")
    assert command(checkpoint, tmp_path / "odd", tmp_path / "clips.parquet") == 0
    files = pyarrow.parquet.read_table(tmp_path / "clips.parquet")["file"].to_pylist()
    assert files == [*texts, "file:%FF.wav"]
    assert all((tmp_path / "odd" / local_path(file)).is_file() for file in files)
    assert "file:%FF.wav: " in capfd.readouterr().err


def test_values_that_are_not_finite_are_an_error(folder, checkpoint, tmp_path):
    encoder = load_encoder(checkpoint)
    with torch.no_grad():
        encoder.layernorm.bias[3] = torch.inf
    encoder.save_pretrained(tmp_path / "damaged")
    ASiTFeatureExtractor(num_mel_bins=MEL).save_pretrained(tmp_path / "damaged")
    assert command(tmp_path / "damaged", folder / "a.flac", tmp_path / "clip.parquet") == 0
    (row,) = pyarrow.parquet.read_table(tmp_path / "clip.parquet").to_pylist()
    assert "finite" in row["error"]
    assert (row["start"], row["end"]) == (0.0, 1.0)
