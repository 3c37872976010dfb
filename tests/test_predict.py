import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from odd_names import copy_with_odd_names

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForAudioClassification, ASiTModel
from asit_hf.corpus.timeline import Timeline
from asit_hf.data import load_audio_dataset, read_audio
from asit_hf.data.event_tables import read_strong_labels
from asit_hf.predict import load_classifier, main, predict_folder
from asit_hf.utils.names import local_path

RATE = 16000
GOOD = ["a.wav", "b/c.flac", "b/d.wav", "long.wav", "z.ogg"]
BAD = ["b/cut.wav", "empty.wav", "text.mp3"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    config = ASiTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_mel_bins=32,
        num_frames=96,
        initializer_range=0.3,
        id2label={0: "dog", 1: "rain, heavy", 2: "bell"},
    )
    ASiTForAudioClassification(config).save_pretrained(folder)
    ASiTFeatureExtractor(num_mel_bins=32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(model_folder):
    return load_classifier(model_folder, device="cpu")


@pytest.fixture
def sounds(tmp_path) -> Path:
    """Five readable files of several lengths and rates, three that are not, and a text file."""
    folder = tmp_path / "sounds"
    (folder / "b").mkdir(parents=True)
    files = {
        "z.ogg": (0.9, RATE),
        "a.wav": (0.5, 8000),
        "b/d.wav": (1.4, RATE),
        "b/c.flac": (0.5, 44100),
        "long.wav": (2.6, RATE),
    }
    for seed, (name, (seconds, rate)) in enumerate(files.items()):
        time = np.arange(round(seconds * rate)) / rate
        sound = 0.3 * np.sin(2 * np.pi * (200 + 300 * seed) * time * (1 + time))
        soundfile.write(folder / name, sound, rate)
    (folder / "empty.wav").touch()
    (folder / "text.mp3").write_text("not audio")
    whole = (folder / "b/d.wav").read_bytes()
    (folder / "b/cut.wav").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("not audio")
    return folder


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_every_file_gets_the_scores_it_gets_alone(classifier, sounds, batch_size):
    predictions = predict_folder(classifier, sounds, batch_size=batch_size, progress=False, top_k=None)
    assert [prediction["file"] for prediction in predictions] == sorted(GOOD + BAD)
    for prediction in predictions:
        if prediction["file"] in BAD:
            assert set(prediction) == {"file", "error"}
            assert prediction["error"]
            continue
        alone = {item["label"]: item["score"] for item in classifier(sounds / prediction["file"], top_k=None)}
        scores = {item["label"]: item["score"] for item in prediction["labels"]}
        assert scores == pytest.approx(alone, abs=1e-5)


def test_a_file_damaged_inside_does_not_affect_its_batch(classifier, sounds):
    # the header is whole, so only decoding finds the damage
    content = bytearray((sounds / "b/c.flac").read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    (sounds / "b/damaged.flac").write_bytes(content)
    assert soundfile.info(sounds / "b/damaged.flac").frames > 0
    predictions = predict_folder(classifier, sounds, progress=False)
    failed = [prediction["file"] for prediction in predictions if "error" in prediction]
    assert failed == sorted([*BAD, "b/damaged.flac"])
    assert sorted(prediction["file"] for prediction in predictions if "labels" in prediction) == GOOD


def test_a_single_file(classifier, sounds):
    predictions = predict_folder(classifier, sounds / "b" / "d.wav", progress=False)
    assert predictions == [{"file": "d.wav", "labels": classifier(sounds / "b" / "d.wav")}]


def test_timeline(classifier, sounds):
    options = {"window_seconds": 1.0, "return_timeline": True}
    predictions = predict_folder(classifier, sounds, progress=False, **options)
    windows = {prediction["file"]: len(prediction.get("timeline", [])) for prediction in predictions}
    assert windows == {"a.wav": 1, "b/c.flac": 1, "b/d.wav": 2, "long.wav": 5, "z.ogg": 1, **dict.fromkeys(BAD, 0)}


def test_wrong_arguments(classifier, sounds, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        predict_folder(classifier, tmp_path / "nowhere")
    (tmp_path / "no audio").mkdir()
    with pytest.raises(FileNotFoundError, match="no audio"):
        predict_folder(classifier, tmp_path / "no audio")
    with pytest.raises(ValueError, match="batch_size"):
        predict_folder(classifier, sounds, batch_size=0)
    with pytest.raises(ValueError, match="overlap"):
        predict_folder(classifier, sounds, progress=False, overlap=2)


def test_csv(model_folder, classifier, sounds, tmp_path, capsys):
    output = tmp_path / "new folder" / "predictions.csv"
    assert main([str(model_folder), str(sounds), "--output", str(output), "--top_k", "2", "--device", "cpu"]) == 0
    rows = read_csv(output)
    assert list(rows[0]) == ["file", "rank", "label", "score", "error"]
    first = classifier(sounds / "a.wav", top_k=1)[0]
    assert rows[0] | {"score": ""} == {"file": "a.wav", "rank": "1", "label": first["label"], "score": "", "error": ""}
    assert float(rows[0]["score"]) == pytest.approx(first["score"], abs=1e-5)
    assert [row["file"] for row in rows if row["label"]] == [name for name in GOOD for _ in range(2)]
    assert {row["file"]: bool(row["error"]) for row in rows if not row["label"]} == dict.fromkeys(BAD, True)
    errors = capsys.readouterr().err
    assert "5 files classified, 3 unreadable" in errors
    assert all(f"cannot read {name}: " in errors for name in BAD)

    before = output.read_bytes()
    main([str(model_folder), str(sounds), "--output", str(output), "--top_k", "2", "--device", "cpu"])
    assert output.read_bytes() == before


def test_csv_timeline_on_standard_output(model_folder, sounds, capsys):
    arguments = [str(model_folder), str(sounds / "long.wav"), "--top_k", "1", "--timeline"]
    assert main([*arguments, "--window_seconds", "1", "--overlap", "0"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [(row["start"], row["end"]) for row in rows] == [("0.000", "1.000"), ("1.000", "2.000"), ("1.600", "2.600")]
    assert all(row["file"] == "long.wav" and row["label"] and row["rank"] == "1" for row in rows)


def test_json(model_folder, classifier, sounds, tmp_path):
    output = tmp_path / "predictions.json"
    assert main([str(model_folder), str(sounds), "--output", str(output), "--timeline"]) == 0
    expected = predict_folder(classifier, sounds, progress=False, return_timeline=True)
    assert json.loads(output.read_text()) == expected


def test_strict_exits_with_an_error_and_still_writes(model_folder, sounds, tmp_path):
    output = tmp_path / "predictions.json"
    assert main([str(model_folder), str(sounds), "--output", str(output), "--strict"]) == 1
    assert len(json.loads(output.read_text())) == len(GOOD + BAD)
    for name in BAD:
        (sounds / name).unlink()
    assert main([str(model_folder), str(sounds), "--output", str(output), "--strict"]) == 0


def test_command_line_errors(model_folder, sounds, tmp_path, capsys):
    (tmp_path / "no audio").mkdir()
    assert main([str(model_folder), str(tmp_path / "no audio")]) == 1
    assert "no audio" in capsys.readouterr().err
    assert main([str(model_folder), str(sounds), "--output", "predictions.xlsx"]) == 1
    assert "predictions.xlsx" in capsys.readouterr().err

    encoder = ASiTModel(ASiTConfig.from_pretrained(model_folder))
    encoder.save_pretrained(tmp_path / "encoder")
    assert main([str(tmp_path / "encoder"), str(sounds)]) == 1
    assert "ASiTModel" in capsys.readouterr().err
    assert main([str(sounds), str(model_folder)]) == 1
    assert "exchange" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert main([str(tmp_path), str(sounds)]) == 1
    assert "'bert'" in capsys.readouterr().err


def test_names_of_any_bytes(model_folder, classifier, sounds, tmp_path, capsys):
    texts = copy_with_odd_names(sounds / "a.wav", tmp_path / "odd")
    (tmp_path / "odd" / os.fsdecode(b"\xff.wav")).write_text("not audio")
    for name in ("predictions.csv", "predictions.json"):
        assert main([str(model_folder), str(tmp_path / "odd"), "--output", str(tmp_path / name), "--top_k", "1"]) == 0
    rows = read_csv(tmp_path / "predictions.csv")
    assert [row["file"] for row in rows] == [*texts, "file:%FF.wav"]
    assert [bool(row["error"]) for row in rows] == [False] * len(texts) + [True]
    assert [row["file"] for row in json.loads((tmp_path / "predictions.json").read_text("utf-8"))] == [
        row["file"] for row in rows
    ]
    assert all((tmp_path / "odd" / local_path(row["file"])).is_file() for row in rows)
    assert "cannot read file:%FF.wav" in capsys.readouterr().err
    assert main([str(model_folder), str(tmp_path / "odd"), "--top_k", "1"]) == 0
    assert "\nfile:na%EFve.wav,1," in capsys.readouterr().out
    again = load_audio_dataset(tmp_path / "predictions.csv", root=tmp_path / "odd", audio_column="file")
    assert len({len(read_audio(row["audio"], RATE)) for row in again.select(range(len(texts)))}) == 1


def test_recordings_of_phones_and_browsers(classifier, sounds, monkeypatch):
    from av_files import encode, tone

    (sounds / "memo.m4a").write_bytes(encode(tone(1.2, 44100), 44100, "ipod", "aac"))
    (sounds / "b" / "browser.webm").write_bytes(encode(tone(1, 48000), 48000, "webm", "libopus", {"live": "1"}))
    predictions = {row["file"]: row for row in predict_folder(classifier, sounds, progress=False)}
    assert sorted(predictions) == sorted([*GOOD, *BAD, "memo.m4a", "b/browser.webm"])
    assert [row["label"] for row in predictions["memo.m4a"]["labels"]] == [
        row["label"] for row in classifier(sounds / "memo.m4a")
    ]
    assert "labels" in predictions["b/browser.webm"]
    monkeypatch.setitem(sys.modules, "av", None)
    (failed,) = predict_folder(classifier, sounds / "memo.m4a", progress=False)
    assert "asit-hf[av]" in failed["error"]


@pytest.mark.parametrize("format", ["raven", "audacity", "csv"])
def test_event_tables(model_folder, sounds, tmp_path, format, caplog):
    """The events of a clip are the timeline that `listen` prints of it."""
    command, output = [str(model_folder), str(sounds), "--format", format], tmp_path / "events"
    assert main([*command, "--events", "--output", str(output), "--part_clips", "3"]) == 0
    assert "1 s" in caplog.text  # the windows; training crops are shorter
    timeline = Timeline()
    for window in load_classifier(model_folder)(sounds / "long.wav", window_seconds=1.0, return_timeline=True)[
        "timeline"
    ]:
        timeline.add(window)
    spans = [(round(one["start"], 3), round(one["end"], 3), one["label"]) for one in timeline.finish()]
    events = read_strong_labels(output)
    assert [tuple(event) for event in events["long.wav"]] == spans
    assert events.keys() >= set(GOOD)
    parts = sorted(path.name for path in output.glob("part-*"))
    if format != "csv":
        assert sorted(path.relative_to(output).as_posix() for path in output.rglob("*.txt")) == [
            f"{name}.txt" for name in GOOD
        ]
        rows = [json.loads(line) for part in parts for line in (output / part).open()]
        assert [row["file"] for row in rows if "error" in row] == BAD
    assert len(parts) == 3


def test_one_event_table_of_one_clip(model_folder, sounds, tmp_path, capsys):
    arguments = ["--format", "raven", "--output", str(tmp_path / "clip.txt")]
    assert main([str(model_folder), str(sounds / "b" / "cut.wav"), *arguments]) == 1
    assert "cut.wav" in capsys.readouterr().err.splitlines()[-1]
    assert os.listdir(tmp_path) == ["sounds"]  # nothing that a repaired clip would inherit
    assert main([str(model_folder), str(sounds / "long.wav"), *arguments]) == 0
    (events,) = read_strong_labels(tmp_path / "clip.txt").values()
    assert events[-1].offset == 2.6
    assert main([str(model_folder), str(sounds), *arguments]) == 1
    assert "8 clips" in capsys.readouterr().err


def test_outputs_that_are_links_or_of_the_other_kind(model_folder, sounds, tmp_path, capsys):
    (tmp_path / "link.csv").symlink_to("target.csv")
    assert main([str(model_folder), str(sounds / GOOD[0]), "--output", str(tmp_path / "link.csv")]) == 0
    assert (tmp_path / "link.csv").is_symlink()
    assert len(read_csv(tmp_path / "target.csv")) > 0
    (tmp_path / "file").write_text("kept")
    capsys.readouterr()
    assert main([str(model_folder), str(sounds / GOOD[0]), "--output", str(tmp_path / "file")]) == 1
    assert f"got the file {tmp_path / 'file'}" in capsys.readouterr().err


def test_a_process_of_several_labels_all_clips_in_python_alone(model_folder, classifier, sounds, monkeypatch, capsys):
    alone = predict_folder(classifier, sounds, progress=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert predict_folder(classifier, sounds, progress=False) == alone
    assert main([str(model_folder), str(sounds)]) == 1  # both would print all rows
    assert "--output" in capsys.readouterr().err
