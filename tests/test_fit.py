import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoModelForAudioClassification, pipeline

from asit_hf import (
    ASiTFeatureExtractor,
    ASiTForAudioClassification,
    ASiTForAudioFrameClassification,
    ASiTForPreTraining,
    ASiTModel,
    fit,
    fit_classifier,
)
from asit_hf.data.audio import AudioReadError
from asit_hf.predict import load_classifier, predict_folder
from tests.tiny import MEL, build

HERTZ = {"low": 200, "middle": 900, "high": 3500}


def write_tone(path: Path, hertz: float, seed: int, seconds: float = 0.5, rate: int = 16000) -> Path:
    generator = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate)) / rate
    tone = np.sin(2 * np.pi * hertz * generator.uniform(0.95, 1.05) * time)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.3 * tone + generator.normal(0, 0.01, len(time)), rate)
    return path


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    """A folder of three class folders, with clips of several rates and lengths."""
    folder = tmp_path_factory.mktemp("sounds")
    for name, hertz in HERTZ.items():
        for index, (seconds, rate) in enumerate([(0.5, 16000), (1.3, 44100), (0.3, 8000), (0.9, 22050)]):
            write_tone(folder / name / f"{index}.flac", hertz, index, seconds, rate)
    return folder


def save_encoder(folder: Path, cls: type = ASiTModel, rate: int = 16000, **fields) -> Path:
    build(cls, **fields).save_pretrained(folder)
    mels = fields.get("num_mel_bins", MEL)
    ASiTFeatureExtractor(num_mel_bins=mels, sampling_rate=rate).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


def scores(labels: list[dict]) -> dict[str, float]:
    return {row["label"]: row["score"] for row in labels}


def test_a_fitted_classifier_is_saved_as_an_ordinary_one(encoder, sounds, tmp_path, caplog):
    classifier = fit_classifier(encoder, sounds)
    assert "12 clips of 3 classes" in caplog.text
    assert classifier.validation["accuracy"] > 0.9
    new = write_tone(tmp_path / "new.wav", 900, seed=9, seconds=2)
    expected = scores(classifier(new))
    assert max(expected, key=expected.get) == "middle"
    classifier.save_pretrained(tmp_path / "mine")

    saved = tmp_path / "mine"
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == ["ASiTForAudioClassification"]
    assert config["id2label"] == {"0": "high", "1": "low", "2": "middle"}
    assert config["problem_type"] == "single_label_classification"
    assert "AutoModelForAudioClassification" in config["auto_map"]
    assert {"README.md", "run.json", "preprocessor_config.json", "modeling_asit.py"} <= {
        path.name for path in saved.iterdir()
    }
    assert "high, low, middle" in (saved / "README.md").read_text()
    run = json.loads((saved / "run.json").read_text())
    assert run["training_data"].startswith("12 clips")
    assert run["results"][0]["value"] == classifier.validation["accuracy"]
    assert type(AutoModelForAudioClassification.from_pretrained(saved)) is ASiTForAudioClassification
    assert scores(pipeline("audio-classification", model=str(saved))(new)) == pytest.approx(expected, abs=1e-5)
    predicted = predict_folder(load_classifier(saved, "cpu"), sounds, progress=False)
    assert all(row["labels"][0]["label"] == Path(row["file"]).parent.name for row in predicted)


def test_the_classifier_gives_the_scores_that_were_fitted(encoder, sounds, monkeypatch):
    """The head's logits are those of logistic regression on the pooled output of the pipeline's windows."""
    fitted = {}

    def fit_linear(x, y, *args):
        fitted.update(x=x, y=y, linear=original(x, y, *args))
        return fitted["linear"]

    original = fit.fit_linear
    monkeypatch.setattr(fit, "fit_linear", fit_linear)
    classifier = fit_classifier(encoder, sounds)
    logits = fitted["x"] @ fitted["linear"].weight.T + fitted["linear"].bias
    files = sorted(sounds.glob("*/*.flac"))
    for file, row in zip(files, logits):
        found = scores(classifier(file, function_to_apply="none"))
        assert list(map(found.get, ("high", "low", "middle"))) == pytest.approx(row.tolist(), abs=1e-4)
    probabilities = [max(scores(classifier(file)).values()) for file in files]
    assert min(probabilities) > 0.5


def test_a_long_clip_is_fitted_by_the_mean_over_the_windows_of_the_pipeline(encoder, sounds, tmp_path, monkeypatch):
    for name in ("a", "b"):
        write_tone(tmp_path / "data" / name / "short.flac", 300, seed=ord(name))
    time = np.arange(35 * 16000) / 16000
    long = tmp_path / "data" / "a" / "a-long.flac"
    soundfile.write(long, 0.3 * np.sin(2 * np.pi * (100 + 60 * time) * time), 16000)
    inputs = []
    original = fit.fit_linear
    monkeypatch.setattr(fit, "fit_linear", lambda x, *args: (inputs.append(x), original(x, *args))[1])
    classifier = fit_classifier(encoder, tmp_path / "data")
    weight, bias = (value.detach().numpy() for value in classifier.model.classifier.parameters())
    timeline = classifier(long, function_to_apply="none", return_timeline=True)["timeline"]
    assert len(timeline) == 2
    mean = np.mean([[scores(window["labels"])[name] for name in ("a", "b")] for window in timeline], axis=0)
    np.testing.assert_allclose(inputs[0][0] @ weight.T + bias, mean, atol=1e-4)


def test_one_clip_per_class(encoder, tmp_path, caplog):
    for name, hertz in HERTZ.items():
        write_tone(tmp_path / name / "only.wav", hertz, seed=1)
    classifier = fit_classifier(encoder, tmp_path)
    assert classifier.validation == {}
    assert "not validated" in caplog.text
    assert all(classifier(tmp_path / name / "only.wav", top_k=1)[0]["label"] == name for name in HERTZ)
    write_tone(tmp_path / "low" / "second.wav", 200, seed=2)  # one class can be validated
    assert set(fit_classifier(encoder, tmp_path).validation) == {"accuracy", "confidence", "log_likelihood"}


def test_several_labels_give_independent_probabilities(encoder, sounds, tmp_path, caplog):
    rows = [
        f"{file},{file.parent.name}{';tone' if file.stem in '02' else ''}" for file in sorted(sounds.glob("*/*.flac"))
    ]
    (tmp_path / "table.csv").write_text("\n".join(["file,label", *rows]))
    classifier = fit_classifier(encoder, tmp_path / "table.csv")
    assert "labels, present or absent" in caplog.text
    assert classifier.model.config.problem_type == "multi_label_classification"
    found = scores(classifier(sounds / "low" / "0.flac"))
    assert set(found) == {*HERTZ, "tone"}
    assert found["low"] > 0.5 > max(found["middle"], found["high"])
    assert sum(found.values()) > 1


def test_unreadable_and_damaged_files_are_reported_and_skipped(encoder, sounds, tmp_path, caplog):
    for file in sorted(sounds.glob("*/[01].flac")):
        target = tmp_path / file.relative_to(sounds)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file.read_bytes())
    (tmp_path / "low" / "broken.flac").write_bytes(b"not audio")
    content = (tmp_path / "high" / "1.flac").read_bytes()
    (tmp_path / "lost").mkdir()  # a class whose only clip has a whole header
    damaged = tmp_path / "lost" / "damaged.flac"
    damaged.write_bytes(content[: len(content) // 2] + bytes(len(content) // 2))
    classifier = fit_classifier(encoder, tmp_path)
    assert "broken.flac" in caplog.text
    assert "damaged.flac" in caplog.text
    assert set(classifier.model.config.label2id) == set(HERTZ)
    with pytest.raises(AudioReadError, match="broken.flac"):
        fit_classifier(encoder, tmp_path, strict=True)
    (tmp_path / "low" / "broken.flac").unlink()
    with pytest.raises(AudioReadError, match="damaged.flac"):
        fit_classifier(encoder, tmp_path, strict=True)


@pytest.mark.parametrize(
    ("cls", "fields", "pooling_mode"),
    [
        (ASiTForPreTraining, {"num_mel_bins": 64}, "mean"),
        (ASiTForAudioClassification, {"pooling_mode": "mean", "problem_type": "multi_label_classification"}, "cls"),
        (ASiTForAudioFrameClassification, {"rate": 32000}, "cls_mean"),
        (ASiTModel, {"rate": 8000, "pooling_mode": "cls_mean"}, "cls_mean"),
    ],
)
def test_any_checkpoint(cls, fields, pooling_mode, sounds, tmp_path):
    classifier = fit_classifier(save_encoder(tmp_path / "encoder", cls, **fields), sounds, pooling_mode=pooling_mode)
    classifier.save_pretrained(tmp_path / "mine")
    loaded = load_classifier(tmp_path / "mine", "cpu")
    assert loaded.model.config.pooling_mode == pooling_mode
    assert loaded.feature_extractor.sampling_rate == fields.get("rate", 16000)
    file = sounds / "high" / "1.flac"
    assert scores(loaded(file)) == pytest.approx(scores(classifier(file)), abs=1e-5)
    assert math.isclose(sum(scores(loaded(file)).values()), 1, abs_tol=1e-5)


def test_an_adapter_is_merged(encoder, sounds, tmp_path):
    peft = pytest.importorskip("peft")
    base = ASiTForAudioClassification.from_pretrained(encoder, num_labels=3)
    lora = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"], "init_lora_weights": False}
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, **lora)).eval()
    model.save_pretrained(tmp_path / "adapter")
    classifier = fit_classifier(tmp_path / "adapter", sounds, pooling_mode="cls")
    features = classifier.feature_extractor(np.ones(16000), sampling_rate=16000, return_tensors="pt")
    expected = model.get_base_model().asit(**features).pooler_output
    torch.testing.assert_close(classifier.model.asit(**features).pooler_output, expected, rtol=0, atol=1e-4)


def test_the_command(encoder, sounds, tmp_path, capsys):
    rows = [f"{file},{file.parent.name},{file.stem}" for file in sorted(sounds.glob("*/*.flac"))]
    (tmp_path / "table.csv").write_text("\n".join(["file,sound,take", *rows]))
    command = [str(encoder), str(tmp_path / "table.csv"), str(tmp_path / "mine"), "--label_column", "sound"]
    assert fit.main([*command, "--filters", "take=0,1", "--group_column", "take"]) == 0
    assert load_classifier(tmp_path / "mine", "cpu").model.config.label2id.keys() == set(HERTZ)
    written = json.loads((tmp_path / "mine" / "run.json").read_text())
    assert written["training_data"].startswith("6 clips")
    used = "python -m asit_hf.fit " + " ".join(Path(one).name for one in command[:3])
    assert used in written["recipe"]["command"]
    assert "--label_column sound --filters take=0,1" in written["recipe"]["command"]
    assert fit.main([str(encoder), str(sounds), str(encoder)]) == 1
    assert fit.main([str(encoder), str(tmp_path / "gone"), str(tmp_path / "mine")]) == 1
    errors = capsys.readouterr().err
    assert "another folder" in errors
    assert "gone" in errors


def test_what_cannot_be_fitted_is_refused(encoder, sounds, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    write_tone(tmp_path / "one" / "a" / "1.wav", 200, seed=1)
    with pytest.raises(ValueError, match="of several classes.*1, all of 'a'"):
        fit_classifier(encoder, tmp_path / "one")
    file = sounds / "low" / "0.flac"
    (tmp_path / "numbers.csv").write_text(f"file,label\n{file},0.5\n{file},1.5\n")
    with pytest.raises(ValueError, match="got numbers"):
        fit_classifier(encoder, tmp_path / "numbers.csv")
