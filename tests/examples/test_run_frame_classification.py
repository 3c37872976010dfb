import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForAudioFrameClassification, ASiTModel
from asit_hf.data.event_tables import Event, read_strong_labels, write_strong_labels
from asit_hf.evaluation.sound_events import segment_metrics
from examples import run_frame_classification as script

SCRIPT = Path(__file__).parents[2] / "examples" / "run_frame_classification.py"
TONES = {"high": 3500, "low": 200}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    ASiTModel(ASiTConfig(**sizes, num_frames=96)).save_pretrained(folder)
    ASiTFeatureExtractor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    """Clips of 1.5 to 2.5 s of noise with a low and a high tone at random times."""
    folder = tmp_path_factory.mktemp("sounds")
    generator = np.random.default_rng(0)
    tables: dict[str, dict[str, list[Event]]] = {"train": {}, "test": {}}
    for index in range(24):
        seconds = float(generator.uniform(1.5, 2.5))
        time = np.arange(int(seconds * 16000)) / 16000
        waveform, events = generator.normal(0, 0.01, len(time)), []
        for name, hertz in TONES.items():
            onset = round(float(generator.uniform(0, seconds - 0.8)), 3)
            offset = onset + 0.6
            waveform += np.where((time >= onset) & (time < offset), 0.3 * np.sin(2 * np.pi * hertz * time), 0)
            events.append(Event(onset, offset, name))
        soundfile.write(folder / f"{index}.flac", waveform, 16000)
        tables["test" if index >= 16 else "train"][f"{index}.flac"] = events
    for split, events in tables.items():
        write_strong_labels(folder / f"{split}.tsv", events)
    return folder


def arguments(sounds: Path, encoder: Path, output: Path, **options: object) -> list[str]:
    options = {
        "model_name_or_path": encoder,
        "train_labels": sounds / "train.tsv",
        "eval_labels": sounds / "test.tsv",
        "data": sounds,
        "output_dir": output,
        "num_train_epochs": 12,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "eval_strategy": "no",
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    } | options
    return [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]


@pytest.mark.slow
def test_it_learns_to_detect_events(sounds, encoder, tmp_path):
    metrics = script.main(arguments(sounds, encoder, tmp_path, segment_seconds=0.2, per_device_eval_batch_size=3))
    assert metrics["eval_mAP"] > 0.8
    assert metrics["eval_segment_f1"] > 0.7
    # strict scores: in so short a time one false alarm is more than 100 an hour
    assert 0 <= metrics["eval_psds1"] <= metrics["eval_psds2"] <= 1
    assert metrics["eval_psds2"] > 0.3
    saved = json.loads((tmp_path / "eval_results.json").read_text())
    assert saved["eval_segment_f1"] == metrics["eval_segment_f1"]

    found, reference = read_strong_labels(tmp_path / "events.tsv"), read_strong_labels(sounds / "test.tsv")
    assert list(found) == list(reference)
    durations = {name: soundfile.info(sounds / name).duration for name in reference}
    again = segment_metrics(reference, found, list(TONES), durations, segment_seconds=0.2)
    assert again["segment_f1"] == pytest.approx(metrics["eval_segment_f1"], abs=0.02)  # times in whole milliseconds
    model = ASiTForAudioFrameClassification.from_pretrained(tmp_path)
    assert model.config.id2label == {0: "high", 1: "low"}
    assert ASiTFeatureExtractor.from_pretrained(tmp_path).sampling_rate == 16000


def test_crops_resume_and_bad_files(sounds, encoder, tmp_path, caplog):
    labels = tmp_path / "train.tsv"
    labels.write_text((sounds / "train.tsv").read_text() + "gone.flac\t0.0\t1.0\tlow\n")
    options = {"train_labels": labels, "max_seconds": 1.0, "save_strategy": "steps", "save_steps": 2}
    options |= {"eval_strategy": "steps", "eval_steps": 1}
    script.main(arguments(sounds, encoder, tmp_path / "run", max_steps=2, **options))
    assert "1 of 17 files" in caplog.text
    assert "no training event" not in caplog.text
    resumed = {"max_steps": 4, "resume_from_checkpoint": "True"}
    script.main(arguments(sounds, encoder, tmp_path / "run", **options, **resumed))
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_segment_f1" in entry] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"gone\.flac"):
        script.main(arguments(sounds, encoder, tmp_path / "strict", max_steps=5, strict=True, train_labels=labels))


def test_a_trained_model_is_evaluated_without_training(sounds, encoder, tmp_path, monkeypatch):
    trained = script.main(arguments(sounds, encoder, tmp_path / "run", max_steps=2))
    monkeypatch.setattr(script.SupervisedTrainer, "train", lambda *args, **kwargs: pytest.fail("trained"))
    options = {"train_labels": None, "do_train": False, "do_eval": True}
    metrics = script.main(arguments(sounds, tmp_path / "run", tmp_path / "scores", **options))
    for name, value in trained.items():
        if not name.endswith(("_runtime", "_per_second")):
            assert metrics[name] == pytest.approx(value, rel=1e-4, nan_ok=True), name
    assert (tmp_path / "scores" / "events.tsv").read_text() == (tmp_path / "run" / "events.tsv").read_text()
    model = ASiTForAudioFrameClassification.from_pretrained(tmp_path / "run").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "run")
    in_16_bits = script.main(arguments(sounds, tmp_path / "run", tmp_path / "scores", **options))
    assert in_16_bits["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=0.02)
    with pytest.raises(ValueError, match="ASiTForAudioFrameClassification"):
        script.main(arguments(sounds, encoder, tmp_path / "scores", **options))


def test_longer_clips_are_cropped_to_train_and_evaluated_one_by_one(sounds, encoder, tmp_path, monkeypatch, caplog):
    together = script.main(arguments(sounds, encoder, tmp_path / "together", max_steps=1, max_seconds=2.0))
    assert "longer" not in caplog.text
    monkeypatch.setattr(script, "MAX_SECONDS", 2.0)
    sizes = []
    collate = script.FrameCollator.__call__
    record = lambda self, items: (sizes.append(len(items)), collate(self, items))[1]  # noqa: E731
    monkeypatch.setattr(script.FrameCollator, "__call__", record)
    alone = script.main(arguments(sounds, encoder, tmp_path / "alone", max_steps=1))
    assert caplog.text.count("clips are longer than 2 s") == 2
    assert sizes[-8:] == [1] * 8
    for name, value in together.items():
        if not name.endswith(("_runtime", "_per_second", "_loss")):  # the loss is a mean over batches
            assert alone[name] == pytest.approx(value, rel=1e-3, nan_ok=True), name


def test_wrong_input(sounds, encoder, tmp_path, caplog):
    labels = tmp_path / "test.tsv"
    labels.write_text((sounds / "test.tsv").read_text().replace("low", "bell"))
    options = {"max_steps": 1, "eval_labels": labels}
    with pytest.raises(ValueError, match=r"train\.tsv in .*test\.tsv, got 1 others, first 'bell'"):
        script.main(arguments(sounds, encoder, tmp_path, **options))
    metrics = script.main(arguments(sounds, encoder, tmp_path, drop_unknown_labels=True, **options))
    assert metrics["eval_classes_without_positives"] == 1
    assert "dropped 8 evaluation events of 1 classes that training lacks: ['bell']" in caplog.text
    with pytest.raises(ValueError, match="--random_init"):
        script.main(arguments(sounds, None, tmp_path))
    with pytest.raises(ValueError, match="--size has no effect"):
        script.main(arguments(sounds, encoder, tmp_path, size="tiny"))
    with pytest.raises(ValueError, match="--encoder has no effect"):
        script.main([*arguments(sounds, encoder, tmp_path, random_init=True), "--encoder", "student"])


def test_an_evaluation_without_events_ends_with_results_and_card(sounds, encoder, tmp_path, caplog):
    """One evaluation clip has no event, the other is missing; two training events are beyond their clip."""
    (tmp_path / "test.tsv").write_text("filename\tonset\toffset\tevent_label\n16.flac\ngone.flac\t0\t1\tlow\n")
    rows = "0.flac\t3000\t4000\tbell\n0.flac\t1.4\t3000\tlow\n"
    (tmp_path / "train.tsv").write_text((sounds / "train.tsv").read_text() + rows)
    tables = {"train_labels": tmp_path / "train.tsv", "eval_labels": tmp_path / "test.tsv"}
    metrics = script.main(arguments(sounds, encoder, tmp_path / "run", max_steps=1, **tables))
    assert np.isnan([metrics["eval_mAP"], metrics["eval_psds1"]]).all()
    assert metrics["eval_classes_without_positives"] == 3
    assert "eval_mAP" in json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert "psds1" not in (tmp_path / "run" / "README.md").read_text()
    for part in (
        "dropped 1 of 34 events",
        "cut 1 of 34",
        "of 1 classes: bell",
        "no event is left in the 1 evaluation",
    ):
        assert part in caplog.text
    assert "7 audio files" in caplog.text  # in neither table


def test_an_unknown_metric_is_refused_before_training(sounds, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(script.SupervisedTrainer, "train", lambda *args, **kwargs: pytest.fail("trained"))
    with pytest.raises(ValueError, match="segment_f1.*got 'f1'"):
        script.main(arguments(sounds, encoder, tmp_path, metric_for_best_model="f1"))


def test_a_run_by_minutes(sounds, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "asit_hf.utils.time_budget.now", itertools.count(0, 2).__next__
    )  # every reading of the clock takes 2 s
    script.main(arguments(sounds, encoder, tmp_path, max_minutes=0.5))
    steps = json.loads((tmp_path / "trainer_state.json").read_text())["global_step"]
    assert 5 <= steps <= 15
    assert json.loads((tmp_path / "run.json").read_text())["recipe"]["optimizer steps"] == steps
