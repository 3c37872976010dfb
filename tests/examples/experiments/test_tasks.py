import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTModel
from examples.experiments import tasks as script

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    ASiTModel(ASiTConfig(**sizes)).save_pretrained(folder)
    ASiTFeatureExtractor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Two tasks: tones of two pitches by file name, said by three speakers, and the same with a manifest."""
    folder = tmp_path_factory.mktemp("audio")
    generator, rows = np.random.default_rng(0), ["name,pitch,part"]
    for speaker in "abc":
        for index in range(12):
            label = index % 2
            time = np.arange(8000) / 16000
            wave = 0.3 * np.sin(2 * np.pi * (300 + 3000 * label) * time) + 0.01 * generator.standard_normal(8000)
            name = f"{label}_{speaker}_{index}.wav"
            soundfile.write(folder / name, wave, 16000)
            rows.append(f"{folder / name},{'low' if label == 0 else 'high'},{'test' if speaker == 'c' else 'train'}")
    (folder.parent / "pitch.csv").write_text("\n".join(rows))
    finetuning = "{num_train_epochs: 1, per_device_train_batch_size: 8, max_seconds: 0.5, use_cpu: true}"
    text = f"""
digits:
  folder: {folder}
  pattern: (?P<label>\\d)_(?P<speaker>[a-c])_(?P<index>\\d+)\\.wav
  folds: {{column: speaker, values: [a, b, c]}}
  finetuning: {finetuning}
pitch:
  train: {folder.parent / "pitch.csv"}
  audio_column: name
  label_column: pitch
  train_filter: part=train
  test_filter: part=test
  parts: {{low tones: pitch=low, high tones: pitch=high}}
  finetuning: {finetuning}
"""
    path = tmp_path_factory.mktemp("tasks") / "tasks.yaml"
    path.write_text(text)
    return path


@pytest.mark.slow
def test_every_method_gets_a_row_and_is_not_run_twice(encoder, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(script.mfcc, "TREES", 20)
    options = ["--tasks", str(tasks), "--model_name_or_path", str(encoder), "--output_dir", str(tmp_path)]
    options += ["--seeds", "0", "1"]
    every = script.main([*options, "--only", "pitch"])
    rows = [row for row in every if row["task"] == "pitch"]
    assert [row["method"] for row in rows] == list(script.METHODS)
    scores = {row["method"]: row for row in rows}
    assert all(0 <= row["mean"] <= 1 and row["splits"] == 1 for row in rows)
    assert scores["mfcc"]["mean"] == scores["probe"]["mean"] == 1.0  # two tones
    assert scores["probe"]["seeds"] == 2
    assert scores["finetuned"]["seeds"] == 1
    table = (tmp_path / "tasks.md").read_text()
    assert table.startswith("| | pitch | pitch, low tones | pitch, high tones |\n")
    assert all(f"| {method} | " in table for method in script.METHODS)
    for row in rows:  # each part has half of the test clips, and the classifier is the same
        parts = [one for one in every if one["method"] == row["method"] and one["task"] != "pitch"]
        assert len(parts) == 2
        assert {one["score"] for one in parts} == {row["score"]}
        assert np.mean([one["mean"] for one in parts]) == pytest.approx(row["mean"])

    kept = tmp_path / "pitch" / "test" / "probe" / "result.json"
    kept.write_text(json.dumps({"linear": [0.25, 0.75]}))
    row, *_ = script.main([*options, "--only", "pitch", "--methods", "probe"])
    assert (row["mean"], row["std"]) == (0.5, 0.25)
    with pytest.raises(ValueError, match="run with other settings"):
        script.main([*options, "--only", "pitch", "--methods", "probe", "--pooling", "mean"])


def test_the_probe_embeds_windows(encoder, tasks, tmp_path, monkeypatch):
    asked = []
    probe = script.run_linear_probe.main
    monkeypatch.setattr(
        script.run_linear_probe, "main", lambda options, known: asked.append(options) or probe(options, known)
    )
    options = ["--tasks", str(tasks), "--model_name_or_path", str(encoder), "--output_dir", str(tmp_path)]
    script.main([*options, "--only", "pitch", "--methods", "probe", "--seeds", "0", "--window_seconds", "0.5"])
    parsed = [script.run_linear_probe.parse_args(given) for given in asked]
    assert [args.window_seconds for args in parsed] == [0.5] * 3
    parts = [["part=test"], ["part=test", "pitch=low"], ["part=test", "pitch=high"]]
    assert [args.test_filter for args in parsed] == parts
    with pytest.raises(ValueError, match="run with other settings"):
        script.main([*options, "--only", "pitch", "--methods", "probe", "--seeds", "0"])


def test_folds_leave_one_out_and_labels_come_from_names(encoder, tasks, tmp_path):
    options = ["--tasks", str(tasks), "--model_name_or_path", str(encoder), "--output_dir", str(tmp_path)]
    (row,) = script.main([*options, "--only", "digits", "--methods", "probe", "--seeds", "0"])
    assert row["splits"] == 3
    assert list(row["by_split"]) == ["speaker-a", "speaker-b", "speaker-c"]
    assert np.mean(list(row["by_split"].values())) == pytest.approx(row["mean"])
    cell = ", ".join(f"{100 * mean:.1f}" for mean in row["by_split"].values())
    table = (tmp_path / "tasks.md").read_text()
    assert table.startswith("| | digits (speaker-a, speaker-b, speaker-c) |\n")
    assert f"| probe | {100 * row['mean']:.1f} ({cell}) |" in table
    assert {path.name for path in (tmp_path / "digits").iterdir()} == {"speaker-a", "speaker-b", "speaker-c"}
    assert len((tmp_path / "digits.csv").read_text().splitlines()) == 37


def test_another_encoder_gets_rows_of_its_own(encoder, tasks, tmp_path, monkeypatch):
    def probe(options, cache):
        args = script.run_linear_probe.parse_args(options)
        score = 0.5 if args.model_name_or_path == str(encoder) else 0.25
        return {"runs": [{name: {"accuracy": score} for name in args.probes}]}

    monkeypatch.setattr(script.run_linear_probe, "main", probe)
    options = ["--tasks", str(tasks), "--model_name_or_path", str(encoder), "--output_dir", str(tmp_path)]
    options += ["--only", "pitch", "--seeds", "0", "--methods", "probe-random", "probe", "probe-attentive"]
    rows = script.main([*options, "--baseline", "image=elsewhere"])
    assert [(row["method"], row["mean"]) for row in rows if row["task"] == "pitch"] == [
        ("probe-random", 0.5),
        ("probe-image", 0.25),
        ("probe", 0.5),
        ("probe-attentive-image", 0.25),
        ("probe-attentive", 0.5),
    ]
    assert "| probe-image | 25.0 |" in (tmp_path / "tasks.md").read_text()
    for wrong in ("image", "random=elsewhere", "attentive=elsewhere"):  # the last is the name of another row
        with pytest.raises(SystemExit):
            script.main([*options, "--baseline", wrong])


def test_wrong_tasks_are_refused(encoder, tasks, tmp_path):
    options = ["--tasks", str(tasks), "--model_name_or_path", str(encoder), "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match=r"\(digits, pitch\), got music"):
        script.main([*options, "--only", "music"])
    with pytest.raises(ValueError, match="expected files named as"):
        script.manifest_of("x", {"pattern": "[a-z]+", "folder": Path(tasks).parent}, tmp_path)
    with pytest.raises(ValueError, match="NO_SUCH_FOLDER"):
        script.expand({"train": "$NO_SUCH_FOLDER/x.csv"})


def test_the_recipe_names_what_it_needs(monkeypatch):
    monkeypatch.setenv("ASIT_REAL_AUDIO", "/audio")
    import yaml

    recipe = script.expand(yaml.safe_load((EXAMPLES / "recipes" / "tasks-real-audio.yaml").read_text()))
    assert list(recipe) == ["esc50", "asc-keywords", "asc-speakers", "fsdd"]
    assert len(list(script.splits(recipe["esc50"]))) == 4
    assert len(list(script.splits(recipe["fsdd"]))) == 6
    parts = [condition.removeprefix("speaker=").split(",") for condition in recipe["asc-speakers"]["parts"].values()]
    assert [len(set(speakers)) for speakers in parts] == [18, 6]
    assert not set(parts[0]) & set(parts[1])
    name, train, test = next(script.splits(recipe["esc50"]))
    assert (name, train, test) == ("fold-1", ["fold=2,3,4"], ["fold=1"])
