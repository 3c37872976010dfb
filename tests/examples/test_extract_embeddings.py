import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import soundfile
import torch
from datasets import load_dataset
from odd_names import copy_with_odd_names

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForPreTraining
from asit_hf.data import read_audio
from asit_hf.evaluation.embeddings import embed, timestamp_embeddings
from asit_hf.loading import load_encoder
from asit_hf.utils.names import local_path
from examples import extract_embeddings as script

SCRIPT = Path(__file__).parents[2] / "examples" / "extract_embeddings.py"
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SMALL |= {"num_frames": 64, "num_prototypes": 16, "distillation_hidden_size": 16, "distillation_bottleneck_size": 8}
LENGTHS = {"a.flac": 16000, "b.flac": 4000, "c.flac": 40000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sounds")
    generator = np.random.default_rng(0)
    for name, samples in LENGTHS.items():
        soundfile.write(folder / name, generator.normal(0, 0.1, samples).clip(-1, 1), 16000)
    (folder / "broken.flac").write_bytes(b"not audio")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    ASiTForPreTraining(ASiTConfig(**SMALL)).save_pretrained(folder)
    ASiTFeatureExtractor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(checkpoint, folder) -> dict:
    model, feature_extractor = load_encoder(checkpoint), ASiTFeatureExtractor()
    clips = [read_audio(folder / name, 16000) for name in LENGTHS]
    scenes = embed(model, feature_extractor, clips, "cls_mean", progress=False)
    columns = [timestamp_embeddings(model, feature_extractor, clip) for clip in clips]
    return {"scenes": scenes, "columns": columns, "files": [str(folder / name) for name in LENGTHS]}


def options(checkpoint: Path, data: Path, *more: object) -> list[str]:
    fixed = ["--model_name_or_path", checkpoint, "--data", data, "--device", "cpu"]
    if "--scenes" in more:
        fixed += ["--pooling", "cls_mean"]
    return [str(option) for option in (*fixed, *more)]


def test_parquet(folder, checkpoint, expected, tmp_path, capfd):
    scenes, timestamps = tmp_path / "new" / "scenes.parquet", tmp_path / "new" / "timestamps.parquet"
    counts = script.main(options(checkpoint, folder, "--scenes", scenes, "--timestamps", timestamps))
    assert counts == {"clips": 3, "unreadable": 1}
    assert capfd.readouterr().err.count("broken.flac") == 1
    rows = load_dataset("parquet", data_files=str(scenes), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.column_names == ["file", "embedding"]
    assert rows["file"][:] == expected["files"]
    np.testing.assert_allclose(rows["embedding"][:], expected["scenes"], atol=1e-5)
    settings = json.loads(pyarrow.parquet.read_schema(scenes).metadata[b"settings"])
    assert (settings["pooling"], settings["sampling_rate"]) == ("cls_mean", 16000)
    table = pyarrow.parquet.read_table(timestamps).to_pydict()
    assert [table["file"].count(file) for file in expected["files"]] == [6, 1, 15]
    times = np.concatenate([times for _, times in expected["columns"]])
    np.testing.assert_array_equal(table["milliseconds"], times)
    columns = np.concatenate([columns for columns, _ in expected["columns"]])
    np.testing.assert_allclose(table["embedding"], columns, atol=1e-5)
    assert sorted(path.name for path in scenes.parent.iterdir()) == ["scenes.parquet", "timestamps.parquet"]


def test_npz_and_labels(folder, checkpoint, expected, tmp_path):
    manifest = folder / "meta.csv"
    manifest.write_text("file,tags\na.flac,rain;wind\nbroken.flac,rain\nb.flac,wind\nc.flac,rain\n")
    scenes, timestamps = tmp_path / "scenes.npz", tmp_path / "timestamps.npz"
    more = ["--label_column", "tags", "--scenes", scenes, "--timestamps", timestamps]
    script.main(options(checkpoint, manifest, *more))
    with np.load(scenes) as arrays:
        assert set(arrays) == {"embeddings", "files", "labels", "settings"}
        assert arrays["labels"].tolist() == ["rain;wind", "wind", "rain"]
        np.testing.assert_allclose(arrays["embeddings"], expected["scenes"], atol=1e-5)
        assert json.loads(str(arrays["settings"]))["num_layers"] == 1
    with np.load(timestamps) as arrays:
        assert set(arrays) == {"embeddings", "files", "clips", "milliseconds", "settings"}
        assert arrays["files"].tolist() == expected["files"]
        assert np.bincount(arrays["clips"]).tolist() == [6, 1, 15]
        columns = np.concatenate([columns for columns, _ in expected["columns"]])
        np.testing.assert_allclose(arrays["embeddings"], columns, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scenes.npz", "timestamps.npz"]


def test_row_groups_hold_all_rows(folder, checkpoint, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "GROUP_ROWS", 4)
    script.main(options(checkpoint, folder, "--timestamps", tmp_path / "columns.parquet"))
    file = pyarrow.parquet.ParquetFile(tmp_path / "columns.parquet")
    assert file.num_row_groups > 3
    columns = np.concatenate([columns for columns, _ in expected["columns"]])
    np.testing.assert_allclose(file.read().to_pydict()["embedding"], columns, atol=1e-5)


def test_a_run_that_fails_leaves_the_old_output(folder, checkpoint, tmp_path):
    for name in ("scenes.npz", "scenes.parquet"):
        (tmp_path / name).write_text("old")
        with pytest.raises(ValueError, match=r"broken\.flac"):
            script.main(options(checkpoint, folder, "--strict", "--scenes", tmp_path / name))
        assert (tmp_path / name).read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scenes.npz", "scenes.parquet"]


def test_nothing_readable(checkpoint, tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"not audio")
    with pytest.raises(ValueError, match="got 1 unreadable files"):
        script.main(options(checkpoint, tmp_path, "--scenes", tmp_path / "scenes.npz"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--scenes or --timestamps"),
        (["--scenes", "a.csv"], "ends in .parquet or .npz"),
        (["--scenes", "a.npz", "--timestamps", "a.npz"], "different files"),
        (["--timestamps", "a.npz", "--pooling", "mean"], "--pooling has no effect"),
        (["--timestamps", "a.npz", "--num_layers", "2"], "--num_layers has no effect"),
    ],
)
def test_wrong_options(more, message, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--model_name_or_path", "m", "--data", "d", *more])
    assert message in capsys.readouterr().err


def test_names_of_any_bytes(folder, checkpoint, tmp_path, capfd):
    texts = copy_with_odd_names(folder / "b.flac", tmp_path / "odd")
    (tmp_path / "odd" / os.fsdecode(b"\xff.wav")).write_text("not audio")
    outputs = ("--scenes", tmp_path / "scenes.parquet", "--timestamps", tmp_path / "timestamps.npz")
    assert script.main(options(checkpoint, tmp_path / "odd", *outputs))["clips"] == len(texts)
    files = pyarrow.parquet.read_table(tmp_path / "scenes.parquet")["file"].to_pylist()
    assert files == np.load(tmp_path / "timestamps.npz")["files"].tolist()
    assert [local_path(file) for file in files] == [str(tmp_path / "odd" / local_path(text)) for text in texts]
    assert "/odd/%FF.wav: " in capfd.readouterr().err
