import csv
import itertools
import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import pipeline

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForAudioClassification, ASiTForPreTraining
from asit_hf.data.labelled import load_labelled
from examples import run_audio_classification as script

SCRIPT = Path(__file__).parents[2] / "examples" / "run_audio_classification.py"
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SMALL |= {"num_frames": 48, "num_prototypes": 16, "distillation_hidden_size": 16, "distillation_bottleneck_size": 8}
CLASSES = {"low": 200, "middle": 900, "high": 3500}


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sounds")
    generator = np.random.default_rng(0)
    lines = ["audio,category,fold,tags,pitch"]
    for name, hertz in CLASSES.items():
        (folder / name).mkdir()
        for index in range(10):
            time = np.arange(int(generator.integers(6000, 10000))) / 16000
            tone = np.sin(2 * np.pi * hertz * generator.uniform(0.9, 1.1) * time)
            path = f"{name}/{index}.flac"
            soundfile.write(folder / path, 0.3 * tone + generator.normal(0, 0.01, len(time)), 16000)
            lines.append(f"{path},{name},{index % 5 + 1},{f'tone;{name}' if index % 2 else name},{hertz / 1000}")
    (folder / "meta.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    ASiTForPreTraining(ASiTConfig(**SMALL)).save_pretrained(folder)
    ASiTFeatureExtractor(mean=-6.0, std=5.0).save_pretrained(folder)
    return folder


def arguments(sounds: Path, checkpoint: Path, output: Path, **options) -> list[str]:
    options = {
        "model_name_or_path": checkpoint,
        "train_data": sounds / "meta.csv",
        "train_filter": "fold=1,2,3,4",
        "eval_filter": "fold=5",
        "label_column": "category",
        "output_dir": output,
        "num_train_epochs": 6,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 8,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    } | options
    given = {name: str(value).split() for name, value in options.items() if value is not None}
    return [part for name, values in given.items() for part in (f"--{name}", *values)]


def read_predictions(folder: Path) -> list[dict[str, str]]:
    with open(folder / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_single_label(sounds, encoder, tmp_path):
    metrics = script.main(arguments(sounds, encoder, tmp_path))
    assert metrics["eval_accuracy"] > 0.8
    saved = json.loads((tmp_path / "eval_results.json").read_text())
    assert saved["eval_accuracy"] == metrics["eval_accuracy"]
    assert 0 <= saved["eval_ece_percent"] <= 100
    assert saved["eval_in_sample_temperature"] > 0
    card = (tmp_path / "README.md").read_text()
    assert f"| ece_percent | {saved['eval_ece_percent']} |" in card
    assert card.count("in_sample_temperature`:") == 1  # its note

    rows = read_predictions(tmp_path)
    assert len(rows) == 6
    assert np.mean([row["label"] == row["prediction"] for row in rows]) == pytest.approx(metrics["eval_accuracy"])

    config = ASiTConfig.from_pretrained(tmp_path)
    assert config.id2label == {0: "high", 1: "low", 2: "middle"}
    assert config.label2id == {"high": 0, "low": 1, "middle": 2}
    assert config.problem_type == "single_label_classification"
    assert ASiTFeatureExtractor.from_pretrained(tmp_path).mean == -6.0
    classify = pipeline("audio-classification", model=str(tmp_path), device="cpu")
    for row in rows:
        waveform, rate = soundfile.read(row["file"], dtype="float32")
        best = classify({"raw": waveform, "sampling_rate": rate})[0]
        assert best["label"] == row["prediction"]
        assert best["score"] == pytest.approx(float(row["score"]), abs=1e-3)


def test_the_best_checkpoint_is_kept(sounds, encoder, tmp_path, monkeypatch):
    """The second of three epochs is the best; an equally good result later does not replace it."""
    scores = iter([0.5, 0.75, 0.75, 0.75])
    monkeypatch.setattr(script, "compute_metrics_for", lambda *_: lambda _: {"accuracy": next(scores)})
    script.main(arguments(sounds, encoder, tmp_path, num_train_epochs=3, save_total_limit=3))
    kept = ASiTForAudioClassification.from_pretrained(tmp_path).state_dict()
    for step, best in ((3, False), (6, True), (9, False)):
        weights = ASiTForAudioClassification.from_pretrained(tmp_path / f"checkpoint-{step}").state_dict()
        assert all(torch.equal(weights[name], kept[name]) for name in kept) == best


def test_multi_label(sounds, encoder, tmp_path):
    metrics = script.main(arguments(sounds, encoder, tmp_path, label_column="tags", num_train_epochs=8))
    assert "eval_ece_percent" not in metrics
    assert metrics["eval_mAP"] > 0.6
    assert ASiTConfig.from_pretrained(tmp_path).problem_type == "multi_label_classification"
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["best_metric"] == max(entry["eval_mAP"] for entry in state["log_history"] if "eval_mAP" in entry)
    assert {row["label"] for row in read_predictions(tmp_path)} >= {"low;tone", "high"}


def test_single_labels_trained_as_multi_label(sounds, encoder, tmp_path):
    options = {"problem_type": "multi_label_classification", "max_steps": 2}
    assert "eval_mAP" in script.main(arguments(sounds, encoder, tmp_path, **options))


def test_regression(sounds, encoder, tmp_path):
    metrics = script.main(arguments(sounds, encoder, tmp_path, label_column="pitch", num_train_epochs=8))
    labels = [float(row["label"]) for row in read_predictions(tmp_path)]
    assert metrics["eval_mse"] < np.var(labels)


@pytest.mark.parametrize("column", ["category", "tags", "pitch"])
def test_a_trained_classifier_is_evaluated_without_training(sounds, encoder, tmp_path, monkeypatch, column):
    trained = script.main(arguments(sounds, encoder, tmp_path / "run", label_column=column, max_steps=4))
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    monkeypatch.setattr(script.FinetuningTrainer, "train", lambda *args, **kwargs: pytest.fail("trained"))
    options = {"train_data": None, "train_filter": None, "eval_data": sounds / "meta.csv", "learning_rate": None}
    options |= {"label_column": column, "do_train": False, "do_eval": True, "num_train_epochs": None}
    metrics = script.main(arguments(sounds, tmp_path / "run", tmp_path / "scores", **options))
    for name, value in trained.items():
        if not name.endswith(("_runtime", "_per_second")):
            assert metrics[name] == pytest.approx(value, rel=1e-4, nan_ok=True), name
    assert json.loads((tmp_path / "scores" / "eval_results.json").read_text()) == metrics
    for row, expected in zip(*(read_predictions(tmp_path / name) for name in ("scores", "run")), strict=True):
        assert [row[name] for name in ("file", "label")] == [expected[name] for name in ("file", "label")]
        assert column == "pitch" or row == expected
    tables = {"per_class.csv", "confusion.png", "predictions.csv"}
    tables = {name for name in tables if (tmp_path / "run" / name).exists()}
    assert {path.name for path in (tmp_path / "scores").iterdir()} == {"eval_results.json", *tables}
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("column", "metric"), [("category", "accuracy"), pytest.param("tags", "mAP", marks=pytest.mark.slow)]
)
def test_a_finished_run_is_calibrated_on_its_validation_data(sounds, encoder, tmp_path, caplog, column, metric):
    options = {"label_column": column, "validation_fraction": 0.25, "group_column": "fold", "num_train_epochs": 3}
    options["resume_from_checkpoint"] = True
    plain = script.main(arguments(sounds, encoder, tmp_path, **options))
    before = ASiTForAudioClassification.from_pretrained(tmp_path).state_dict()
    rows = read_predictions(tmp_path)
    metrics = script.main(arguments(sounds, encoder, tmp_path, calibrate=True, **options))
    temperature = metrics["validation_temperature"]
    assert temperature != pytest.approx(1, abs=0.01)
    for name, value in ASiTForAudioClassification.from_pretrained(tmp_path).state_dict().items():
        torch.testing.assert_close(value * temperature if name.startswith("classifier") else value, before[name])
    assert metrics[f"eval_{metric}"] == plain[f"eval_{metric}"]
    assert [row["prediction"] for row in read_predictions(tmp_path)] == [row["prediction"] for row in rows]
    assert [row["score"] for row in read_predictions(tmp_path)] != [row["score"] for row in rows] or column == "tags"
    assert (metrics["validation_clips"], metrics["eval_clips"]) == (6, 6)
    assert metrics["validation_nll"] <= metrics["validation_nll_before"]
    assert metrics["eval_nll"] == pytest.approx(metrics["eval_loss"], rel=1e-4)
    assert metrics["eval_nll_before"] == pytest.approx(plain["eval_loss"], rel=1e-4)
    if column == "category":
        assert metrics["eval_ece_percent_before"] == pytest.approx(plain["eval_ece_percent"], rel=1e-3)
    for number in (f"{temperature:.4g}", f"{metrics['eval_nll_before']:.4f} -> {metrics['eval_nll']:.4f}"):
        assert number in caplog.text
    assert json.loads((tmp_path / "eval_results.json").read_text()) == metrics
    card = (tmp_path / "README.md").read_text()
    fitted, others = "meta.csv (validation, 6 clips on which the temperature was fitted)", "meta.csv (fold=5)"
    for data, name in ((fitted, "validation_temperature"), (fitted, "validation_nll"), (others, "eval_ece_percent")):
        assert f"| {data} | {name.partition('_')[2]} | {metrics[name]} |" in card
    caplog.clear()
    assert script.main(arguments(sounds, encoder, tmp_path, calibrate=True, **options)) == pytest.approx(metrics)
    assert "nothing to do" in caplog.text


def test_a_trained_classifier_is_calibrated_without_training(sounds, encoder, tmp_path, monkeypatch):
    script.main(arguments(sounds, encoder, tmp_path / "run", train_filter="fold=1,2,3"))
    # a classifier in 16 bits is calibrated in 32, so that no weight is rounded again
    ASiTForAudioClassification.from_pretrained(tmp_path / "run").to(torch.bfloat16).save_pretrained(tmp_path / "run")
    before = ASiTForAudioClassification.from_pretrained(tmp_path / "run").state_dict()
    lines = (sounds / "meta.csv").read_text().splitlines()
    held_out = [lines[0], *(line for line in lines if line.split(",")[2] == "4")]
    (tmp_path / "validation.csv").write_text("\n".join(held_out) + "\n")
    monkeypatch.setattr(script.FinetuningTrainer, "train", lambda *args, **kwargs: pytest.fail("trained"))
    options = {"train_data": None, "train_filter": None, "validation_data": tmp_path / "validation.csv"}
    options |= {"root": sounds, "do_train": False, "do_eval": True, "calibrate": True}
    with_test = options | {"eval_data": sounds / "meta.csv"}
    metrics = script.main(arguments(sounds, tmp_path / "run", tmp_path / "calibrated", **with_test))
    temperature = metrics["validation_temperature"]
    calibrated = ASiTForAudioClassification.from_pretrained(tmp_path / "calibrated")
    weight = before["classifier.weight"]
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(calibrated.classifier.weight * temperature, weight.float())
    assert (metrics["validation_clips"], metrics["eval_clips"]) == (6, 6)
    row = read_predictions(tmp_path / "calibrated")[0]
    best = pipeline("audio-classification", model=str(tmp_path / "calibrated"), device="cpu")(row["file"])[0]
    assert (best["label"], round(best["score"], 3)) == (
        row["prediction"],
        pytest.approx(float(row["score"]), abs=2e-3),
    )

    run = json.loads((tmp_path / "calibrated" / "run.json").read_text())
    trained = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["recipe"] == trained["recipe"]
    values = {(row["dataset"], row["metric"]): row["value"] for row in run["results"]}
    assert values["meta.csv (fold=5)", "accuracy"] == trained["results"][0]["value"]
    assert values["meta.csv (fold=5)", "ece_percent"] == metrics["eval_ece_percent"]
    assert ("meta.csv (fold=5)", "in_sample_temperature") not in values  # of the model before
    assert str(temperature) in (tmp_path / "calibrated" / "README.md").read_text()

    without = script.main(arguments(sounds, tmp_path / "run", tmp_path / "again", eval_filter=None, **options))
    assert without["validation_temperature"] == pytest.approx(temperature)
    assert "eval_accuracy" in without
    assert "eval_ece_percent" not in without  # the clips would be those that it was fitted on
    for wrong, message in (
        ({"output_dir": tmp_path / "run"}, "another --output_dir"),
        ({"validation_data": None}, "--validation_data"),
        ({"eval_filter": None}, "6 of 6 files in common"),
        ({"calibrate": False}, "validation_data.*without calibrate"),
    ):
        with pytest.raises(ValueError, match=message):
            script.main(arguments(sounds, tmp_path / "run", tmp_path / "no", **with_test | wrong))


def test_evaluation_needs_a_classifier_and_its_classes(sounds, encoder, tmp_path):
    only_evaluate = {"do_train": False, "do_eval": True}
    with pytest.raises(ValueError, match="ASiTForAudioClassification, got .*ASiTForPreTraining"):
        script.main(arguments(sounds, encoder, tmp_path, **only_evaluate))
    labels = {"id2label": {0: "high", 1: "low"}, "label2id": {"high": 0, "low": 1}}
    ASiTForAudioClassification(ASiTConfig(**SMALL, **labels)).save_pretrained(tmp_path)
    ASiTFeatureExtractor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="middle"):
        script.main(arguments(sounds, tmp_path, tmp_path / "scores", **only_evaluate))


def test_a_regression_model_is_evaluated_on_whole_numbers(sounds, tmp_path):
    only_evaluate = {"do_train": False, "do_eval": True, "train_data": None, "train_filter": None}
    ASiTForAudioClassification(ASiTConfig(**SMALL, num_labels=1)).save_pretrained(tmp_path)
    ASiTFeatureExtractor().save_pretrained(tmp_path)
    options = only_evaluate | {"label_column": "fold", "eval_data": sounds / "meta.csv"}
    metrics = script.main(arguments(sounds, tmp_path, tmp_path / "scores", **options))
    errors = [float(row["prediction"]) - 5 for row in read_predictions(tmp_path / "scores")]
    assert metrics["eval_mse"] == pytest.approx(np.square(errors).mean(), rel=1e-4)
    options |= {"problem_type": "multi_label_classification"}
    with pytest.raises(ValueError, match="problem_type regression.*multi_label"):
        script.main(arguments(sounds, tmp_path, tmp_path / "scores", **options))


def test_longer_clips_are_bounded_by_default_and_counted(sounds, encoder, tmp_path, monkeypatch, caplog):
    lengths = {"train": set(), "eval": set()}
    original = script.LabelledClips.item

    def item(self, index, key):
        found = original(self, index, key)
        lengths["train" if self.train else "eval"].add(len(found["waveform"]))
        return found

    monkeypatch.setattr(script.LabelledClips, "item", item)
    monkeypatch.setattr(script, "MAX_SECONDS", 0.4)
    short = {"max_steps": 3, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    script.main(arguments(sounds, encoder, tmp_path / "default", **short))
    assert "of 24 clips are longer than 0.4 s" in caplog.text
    assert "of 6 clips are longer than 0.4 s" in caplog.text
    assert max(lengths["train"]) == max(lengths["eval"]) == 6400
    caplog.clear()
    script.main(arguments(sounds, encoder, tmp_path / "whole", **short, max_seconds="inf"))
    assert "longer" not in caplog.text
    assert min(max(lengths["train"]), max(lengths["eval"])) > 8000


def test_frozen_encoder(sounds, encoder, tmp_path):
    script.main(arguments(sounds, encoder, tmp_path, max_steps=3, freeze_encoder=True))
    trained = ASiTForAudioClassification.from_pretrained(tmp_path)
    teacher = ASiTForPreTraining.from_pretrained(encoder).teacher["asit"].state_dict()
    for name, weight in trained.asit.state_dict().items():
        torch.testing.assert_close(weight, teacher[name], rtol=0, atol=0)
    assert trained.classifier.weight.abs().max() > 0


@pytest.mark.slow
def test_from_scratch_with_two_workers_and_random_crops(sounds, encoder, tmp_path):
    options = {"random_init": True, "max_seconds": 0.2, "dataloader_num_workers": 2, "max_steps": 4}
    metrics = script.main(arguments(sounds, encoder, tmp_path, **options))
    assert 0 <= metrics["eval_accuracy"] <= 1
    trained = ASiTForAudioClassification.from_pretrained(tmp_path)
    teacher = ASiTForPreTraining.from_pretrained(encoder).teacher["asit"]
    assert not torch.allclose(trained.asit.embeddings.cls_token, teacher.embeddings.cls_token, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_equals_uninterrupted(sounds, encoder, tmp_path, workers):
    common = {"max_seconds": 0.3, "num_train_epochs": 3, "save_total_limit": 3, "load_best_model_at_end": False}
    common["dataloader_num_workers"] = workers
    script.main(arguments(sounds, encoder, tmp_path / "whole", **common))
    whole = ASiTForAudioClassification.from_pretrained(tmp_path / "whole").state_dict()
    checkpoints = sorted((tmp_path / "whole").glob("checkpoint-*"))
    assert len(checkpoints) == 3
    script.main(arguments(sounds, encoder, tmp_path / "resumed", resume_from_checkpoint=checkpoints[0], **common))
    resumed = ASiTForAudioClassification.from_pretrained(tmp_path / "resumed").state_dict()
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=0)


def test_crops_change_with_the_epoch(sounds, encoder, tmp_path, monkeypatch):
    """The training data get the epoch, so that every epoch draws new crops."""
    seen = []

    class Spy(script.LabelledClips):
        def set_epoch(self, epoch):
            seen.append(epoch)
            super().set_epoch(epoch)

    monkeypatch.setattr(script, "LabelledClips", Spy)
    script.main(arguments(sounds, encoder, tmp_path, max_seconds=0.2, num_train_epochs=2))
    assert {0, 1} <= set(seen)


def test_validation_fraction_selects_and_eval_data_are_evaluated(sounds, encoder, tmp_path):
    options = {"validation_fraction": 0.25, "group_column": "fold", "num_train_epochs": 2}
    script.main(arguments(sounds, encoder, tmp_path, **options))
    assert len(read_predictions(tmp_path)) == 6
    args = script.DataArguments(
        train_data=str(sounds / "meta.csv"),
        train_filter=["fold=1,2,3,4"],
        eval_filter=["fold=5"],
        label_column="category",
        validation_fraction=0.25,
        group_column="fold",
    )
    train, validation, evaluation = script.load_data(args, seed=0)
    folds = [set(part["fold"][:]) for part in (train, validation, evaluation)]
    assert folds[2] == {5}
    assert folds[0] | folds[1] == {1, 2, 3, 4}
    assert not folds[0] & folds[1]


@pytest.fixture(scope="module")
def split_folder(tmp_path_factory) -> Path:
    """Class folders in Train, val and test, with 8, 4 and 2 clips."""
    folder = tmp_path_factory.mktemp("splits")
    for split, count in (("Train", 4), ("val", 2), ("test", 1)):
        for name in ("low", "high"):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                soundfile.write(folder / split / name / f"{index}.wav", np.zeros(1600), 16000)
    return folder


def test_splits_of_a_folder_train_select_and_evaluate(split_folder, caplog):
    def sizes(**options) -> list[int]:
        return [len(part) for part in script.load_data(script.DataArguments(**options), seed=0)]

    data = str(split_folder)
    caplog.set_level("INFO")
    assert sizes(train_data=data) == [8, 4, 2]
    for part in ("8 clips of Train", "4 clips of val", "2 clips of test", "--train_split"):
        assert part in caplog.text
    assert sizes(train_data=data, validation_fraction=0.25) == [6, 2, 2]
    assert sizes(train_data=data, train_split="train", eval_split="dev") == [8, 4, 4]  # named: nothing is added
    assert sizes(train_data=data, eval_data=f"{data}/test") == [8, 4, 2]
    assert sizes(train_data=data, validation_data=f"{data}/test") == [8, 2, 2]
    assert sizes(train_data=data, validation_data=data, validation_split="val") == [8, 4, 2]
    assert sizes(train_data=f"{data}/Train", validation_fraction=0.25) == [6, 2, 2]
    with pytest.raises(ValueError, match="splits Train, test, val"):
        sizes(train_data=data, eval_filter=["label=low"])
    with pytest.raises(ValueError, match="all of 'low'"):
        sizes(train_data=data, train_filter=["label=low"])
    table = "\n".join(
        f"{split}/{name}/0.wav,{name},{split}" for split in ("Train", "test") for name in ("low", "high")
    )
    (split_folder / "list.csv").write_text(f"file,label,split\n{table}\n")
    assert sizes(train_data=f"{data}/list.csv") == [2, 2, 2]
    assert sizes(train_data=f"{data}/list.csv", train_filter=["split=test"], eval_data=f"{data}/val") == [2, 4, 4]
    assert sizes(train_data=f"{data}/list.csv", eval_filter=["label=low"]) == [4, 2, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_filter": "fold=9"}, "fold=9"),
        ({"train_data": None, "eval_data": "meta.csv", "train_filter": None}, "--train_data"),
        ({"metric_for_best_model": "f1"}, "metric_for_best_model among loss, accuracy.*'f1'"),
        ({"do_train": False}, "do_eval"),
        ({"do_train": False, "do_eval": True, "model_name_or_path": None, "random_init": True}, "random_init"),
        ({"train_filter": "category=low"}, "10, all of 'low'"),
        ({"label_column": "tags", "problem_type": "single_label_classification"}, "problem_type.*single"),
        ({"label_column": "speaker"}, "speaker"),
        ({"encoder": "average"}, "average"),
        ({"eval_filter": None}, "--eval_data"),
        ({"model_name_or_path": None}, "--random_init"),
        ({"label_column": "pitch", "balanced_sampling": True}, "need classes"),
        ({"validation_split": "a", "validation_fraction": 0.1}, "exclude each other"),
        ({"size": "tiny"}, "size"),
        ({"random_init": True, "encoder": "student"}, "encoder .*random_init"),
        ({"freeze_encoder": True, "drop_path_rate": 0.1}, "drop_path_rate .*freeze_encoder"),
        ({"freeze_encoder": True, "layer_decay": 0.75}, "layer_decay .*freeze_encoder"),
        ({"fold_column": "speaker"}, "fold_column .*without folds"),
        ({"group_column": "fold"}, "group_column .*without validation_fraction"),
        ({"mixup_alpha": 0.5}, "mixup_alpha .*without mixup_rate"),
        ({"calibrate": True}, "--validation_data, --validation_split or --validation_fraction"),
        ({"calibrate": True, "eval_filter": None, "folds": "1,2"}, "--validation_fraction"),
        ({"calibrate": True, "label_column": "pitch", "validation_fraction": 0.2}, "calibrate need classes"),
        ({"calibrate": True, "validation_data": "meta.csv"}, "24 of 30 files in common"),
        ({"validation_data": "a.csv", "validation_fraction": 0.1}, "validation_data .*exclude each other"),
    ],
)
def test_wrong_input(sounds, encoder, tmp_path, options, message):
    options = {name: sounds / value if value == "meta.csv" else value for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        script.main(arguments(sounds, encoder, tmp_path, **options))


def test_an_encoder_in_16_bits_is_trained_in_32(encoder, tmp_path):
    ASiTForPreTraining.from_pretrained(encoder).asit.to(torch.bfloat16).save_pretrained(tmp_path)
    ASiTFeatureExtractor().save_pretrained(tmp_path)
    args = script.ModelArguments(model_name_or_path=str(tmp_path))
    model, _ = script.build_model(args, script.InputArguments(), "single_label_classification", ["a", "b"])
    assert {value.dtype for value in model.parameters()} == {torch.float32}


def test_student_is_refused_where_there_is_one_encoder(sounds, encoder, tmp_path):
    ASiTForPreTraining.from_pretrained(encoder).asit.save_pretrained(tmp_path / "encoder")
    ASiTFeatureExtractor().save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="encoder .*not a pretraining checkpoint"):
        script.main(arguments(sounds, tmp_path / "encoder", tmp_path / "run", encoder="student"))


@pytest.mark.slow
def test_a_finished_run_is_not_repeated(sounds, encoder, tmp_path, caplog):
    options = {"num_train_epochs": 2, "resume_from_checkpoint": True}
    metrics = script.main(arguments(sounds, encoder, tmp_path, **options))
    content = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    caplog.clear()
    assert script.main(arguments(sounds, encoder, tmp_path, **options)) == pytest.approx(metrics)
    assert "nothing to do" in caplog.text
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == content
    script.main(arguments(sounds, encoder, tmp_path, **options | {"num_train_epochs": 3}))
    assert json.loads((tmp_path / "trainer_state.json").read_text())["epoch"] == 3


def test_a_run_that_ended_by_max_steps_is_not_taken_for_one_by_epochs(sounds, encoder, tmp_path):
    options = {"resume_from_checkpoint": True, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "no"}
    options |= {"load_best_model_at_end": False}
    script.main(arguments(sounds, encoder, tmp_path, **options, max_steps=4))
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    epochs = state["num_train_epochs"]
    assert state["epoch"] < epochs
    script.main(arguments(sounds, encoder, tmp_path, **options, num_train_epochs=epochs))
    assert json.loads((tmp_path / "trainer_state.json").read_text())["epoch"] == epochs


def test_classes_are_those_of_the_kept_rows(sounds):
    dataset = load_labelled(sounds, labels_from_folders=True)
    assert dataset.features["label"].names == ["high", "low", "middle"]
    kept = load_labelled(sounds / "meta.csv", ["category=low,high"], label_column="category")
    assert kept.features["label"].names == ["high", "low"]
    assert len(kept) == 20


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_evaluation_file_stops_with_one_line(sounds, encoder, tmp_path, monkeypatch, capsys, workers):
    shutil.copytree(sounds, tmp_path / "sounds")
    damaged = tmp_path / "sounds" / "high" / "4.flac"
    content = damaged.read_bytes()
    damaged.write_bytes(content[: len(content) // 2] + bytes(len(content) // 2))  # the header is intact
    options = arguments(
        tmp_path / "sounds", encoder, tmp_path / "run", num_train_epochs=1, dataloader_num_workers=workers
    )
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stopped.value.code == 1
    (message,) = [line for line in capsys.readouterr().err.splitlines() if str(damaged) in line]
    assert message.startswith("error: ")
    assert "lost sync" in message


@pytest.mark.slow
def test_a_run_by_minutes_keeps_its_best_checkpoint(sounds, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "asit_hf.utils.time_budget.now", itertools.count(0, 2).__next__
    )  # each reading of the clock takes 2 s
    script.main(arguments(sounds, encoder, tmp_path, max_minutes=0.7))
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert 5 <= state["global_step"] <= 21
    evaluated = [row["step"] for row in state["log_history"] if "eval_accuracy" in row]
    assert evaluated[-1] == state["global_step"]
    assert state["best_global_step"] in evaluated
    recipe = json.loads((tmp_path / "run.json").read_text())["recipe"]
    assert recipe["optimizer steps"] == state["global_step"]
    assert recipe["epochs"] == round(state["epoch"], 2)
