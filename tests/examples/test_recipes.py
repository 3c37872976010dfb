"""Recipes: their options and published hyperparameters, and runs on miniature data sets."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForAudioClassification, ASiTModel
from asit_hf.data.corpora.speech_commands import KEYWORDS, SPEECH_COMMANDS_WORDS
from asit_hf.fbank_asit import num_fbank_frames
from asit_hf.finetuning.reports import best_common_epoch
from asit_hf.utils.arguments import parse_arguments
from examples import run_audio_classification as script
from examples.experiments import ablation, tasks

EXAMPLES = Path(__file__).parents[2] / "examples"
TASKS = ("audioset-20k", "audioset-2m", "esc50", "speech-commands-v1", "speech-commands-v2", "voxceleb1")
AUDIOSET = (-4.2677393, 4.5689974)
# lr, epochs (or steps), batch, accumulated, mixup, SpecAugment frequency and time, frames, mean and std, noise,
# decay start, step and gamma, warm-up, averaged epochs, balanced
PUBLISHED = {
    "audioset-20k": (5e-5, 25, 12, 1, 0.5, 48, 192, 1024, AUDIOSET, False, (10, 5, 0.5), 1000, 20, False),
    "audioset-2m": (1e-5, 5, 12, 1, 0.5, 48, 192, 1024, AUDIOSET, False, (2, 1, 0.5), 1000, 5, True),
    "esc50": (1e-4, 25, 48, 1, 0, 24, 96, 512, (-6.6268077, 5.358466), False, (5, 1, 0.85), 0, 0, False),
    "speech-commands-v2": (
        *(2.5e-4, 30, 128, 1, 0.6, 48, 48, 128, (-6.845978, 5.5654526), True, (5, 1, 0.85), 0, 0, False),
    ),
    "speech-commands-v1": (1e-4, 20000, 32, 1, 0, 0, 0, 100, AUDIOSET, False, None, 0, 0, False),
    "voxceleb1": (1e-4, 40000, 4, 8, 0, 0, 0, 1000, AUDIOSET, False, None, 0, 0, False),
}


def command(name: str, root: Path, output: Path, **options) -> list[str]:
    given = {"model_name_or_path": "checkpoint", "train_data": root, "output_dir": output, **options}
    recipe = EXAMPLES / "recipes" / f"{name}.yaml"
    return [
        "--recipe",
        str(recipe),
        *(part for option, value in given.items() for part in (f"--{option}", str(value))),
    ]


RECIPES = sorted((EXAMPLES / "recipes").glob("*.yaml"), key=lambda path: path.stem)


def names(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


def test_no_recipe_excludes_a_gpu():
    assert not [path.name for path in RECIPES if re.search(r"\b(use_cpu|no_cuda)\b", path.read_text())]


@pytest.mark.parametrize("path", RECIPES, ids=names(RECIPES))
def test_every_recipe_parses_with_the_script_of_its_command(path, tmp_path, monkeypatch):
    for name in ("ASIT_REAL_AUDIO", "ASIT_POOL", "ASIT_IMAGE_START"):
        monkeypatch.setenv(name, str(tmp_path))
    (command,) = re.findall(
        r"^# (?:ASIT_\w+=\S+ )*python (?:-m )?(examples[./](?:run|experiments)\S+)", path.read_text(), re.M
    )
    recipes, output = ["--recipe", str(path)], ["--output_dir", str(tmp_path / "run")]
    if command == "examples/run_audio_classification.py":
        data = [] if "train_data:" in path.read_text() else ["--train_data", str(tmp_path)]
        parse_arguments(script.GROUPS, [*recipes, *data, *output, "--model_name_or_path", "checkpoint"])
    elif command == "examples/run_pretraining.py":
        base = [str(EXAMPLES / "recipes" / "pretrain-evidence.yaml")] if path.stem.startswith("ablation-") else []
        data = ["--train_data", str(tmp_path)] if path.stem == "pretrain-gpu" else []
        parse_arguments(ablation.PRETRAINING_GROUPS, ["--recipe", *base, str(path), *data, *output])
    elif command == "examples.experiments.ablation":
        (args,) = parse_arguments((ablation.AblationArguments,), [*recipes, *output])
        assert all(row == "random" or (EXAMPLES.parent / row).is_file() for row in [*args.base, *args.rows])
    else:
        assert command == "examples.experiments.tasks"
        for task in tasks.expand(yaml.safe_load(path.read_text())).values():
            settings = [part for name, value in task["finetuning"].items() for part in (f"--{name}", str(value))]
            common = [*output, "--train_data", str(tmp_path), "--eval_data", str(tmp_path), "--random_init"]
            parse_arguments(script.GROUPS, [*settings, *common])


@pytest.mark.parametrize("path", RECIPES, ids=names(RECIPES))
def test_every_recipe_names_its_results(path):
    comment = " ".join(line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("# "))
    assert ("not measured" in comment.lower()) != ("in examples/RESULTS.md" in comment)
    assert f"examples/recipes/{path.stem}.yaml" in comment


@pytest.mark.parametrize("name", TASKS)
def test_recipes_have_the_published_hyperparameters(tmp_path, name):
    _, data, inputs, augmentation, _, args = parse_arguments(script.GROUPS, command(name, tmp_path, tmp_path))
    by_steps = args.max_steps > 0
    decay = None if args.lr_decay_start is None else (args.lr_decay_start, args.lr_decay_step, args.lr_decay_gamma)
    frames = [
        num_fbank_frames(round(seconds * 16000), 16000) for seconds in (inputs.max_seconds, inputs.max_eval_seconds)
    ]
    assert frames[0] == frames[1]
    assert (
        args.learning_rate,
        args.max_steps if by_steps else args.num_train_epochs,
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        augmentation.mixup_rate,
        augmentation.frequency_mask,
        augmentation.time_mask,
        frames[0],
        (inputs.mean, inputs.std),
        augmentation.noise,
        decay,
        args.warmup_steps,
        args.average_checkpoints,
        data.balanced_sampling,
    ) == PUBLISHED[name]
    assert (args.adam_beta1, args.adam_beta2, args.weight_decay) == (0.95, 0.999, 5e-7)
    assert augmentation.mixup_alpha == 10
    assert (args.layer_decay, args.label_smoothing, args.max_grad_norm) == (1, 0, 0)
    if decay is None:
        assert args.lr_scheduler_type == "constant"


def test_splits_and_model_selection(tmp_path):
    rules = {}
    for name in TASKS:
        for recipe in (name, f"{name}-modern"):
            _, data, _, _, _, args = parse_arguments(script.GROUPS, command(recipe, tmp_path, tmp_path))
            rules[recipe] = (
                data.corpus,
                data.problem_type,
                (data.train_split, data.validation_split, data.eval_split, data.folds),
                args.load_best_model_at_end,
            )
    with_validation = ("train", "validation", "test", None)
    assert {name: rules[name] for name in TASKS} == {
        "audioset-20k": ("audioset-20k", None, ("train", None, "test", None), False),
        "audioset-2m": ("audioset-2m", None, ("train", None, "test", None), False),
        "esc50": ("esc50", None, (None, None, None, "1,2,3,4,5"), False),
        "speech-commands-v1": ("speech-commands-v1-12", None, with_validation, True),
        "speech-commands-v2": ("speech-commands-v2", "multi_label_classification", with_validation, True),
        "voxceleb1": ("voxceleb1", None, with_validation, True),
    }
    assert all(rules[f"{name}-modern"] == rules[name] for name in TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_modern_recipes_use_modern_options(tmp_path, name):
    recipe = f"{name}-modern"
    model, _, inputs, augmentation, _, args = parse_arguments(script.GROUPS, command(recipe, tmp_path, tmp_path))
    assert 0.65 <= args.layer_decay <= 0.8
    assert model.drop_path_rate > 0
    assert augmentation.patch_mask_rate == 0.2
    assert augmentation.roll
    assert augmentation.random_gain
    assert args.label_smoothing == 0.1
    assert args.lr_decay_start is None
    assert (inputs.mean, inputs.std) == PUBLISHED[name][8]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    ASiTModel(ASiTConfig(**sizes, num_frames=48)).save_pretrained(folder)
    ASiTFeatureExtractor().save_pretrained(folder)
    return folder


TINY = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 6,
    "learning_rate": 3e-3,
    "dataloader_num_workers": 0,
    "warmup_steps": 2,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}


def write_tone(path: Path, hertz: float, generator: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(int(generator.integers(6000, 9000))) / 16000
    tone = 0.3 * np.sin(2 * np.pi * hertz * generator.uniform(0.9, 1.1) * time)
    soundfile.write(path, tone + generator.normal(0, 0.01, len(time)), 16000)


@pytest.fixture(scope="module")
def audioset(tmp_path_factory) -> Path:
    """Sixteen clips in each part, of the classes low and high; every third clip has both."""
    root = tmp_path_factory.mktemp("audioset")
    generator = np.random.default_rng(0)
    (root / "class_labels_indices.csv").write_text("index,mid,display_name\n0,/m/0,low\n1,/m/1,high\n2,/m/2,never\n")
    for part in ("balanced_train", "eval"):
        lines = ["# head", "# head", "# YTID, start_seconds, end_seconds, positive_labels"]
        for index in range(16):
            name = f"{part[0]}_{index:09d}"
            mids = ["/m/0,/m/1", "/m/0", "/m/1"][index % 3]
            write_tone(root / part / f"Y{name}.wav", 300 if mids == "/m/0" else 3000, generator)
            lines.append(f'{name}, 30.000, 40.000, "{mids}"')
        (root / f"{part}_segments.csv").write_text("\n".join(lines) + "\n")
    return root


def test_multi_label_recipe_with_mixup_and_averaging(encoder, audioset, tmp_path):
    options = {"average_checkpoints": 2, "balanced_sampling": True}
    metrics = script.main(
        command("audioset-20k", audioset, tmp_path, **TINY | {"model_name_or_path": encoder} | options)
    )
    assert metrics["eval_classes_without_positives"] == 1
    assert metrics["eval_mAP"] > 0.6
    config = ASiTConfig.from_pretrained(tmp_path)
    assert config.id2label == {0: "low", 1: "high", 2: "never"}
    weights = [
        ASiTForAudioClassification.from_pretrained(tmp_path / folder).classifier.weight
        for folder in ("epoch-02", "epoch-03", "")
    ]
    torch.testing.assert_close((weights[0] + weights[1]) / 2, weights[2])
    assert not torch.allclose(weights[0], weights[1])
    assert len((tmp_path / "per_class.csv").read_text().splitlines()) == 4
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 17


@pytest.mark.slow
def test_two_accumulating_processes_equal_one(encoder, audioset, tmp_path):
    """Same losses, gradient norms and weights with soft multi-label targets, balanced sampling, masks and noise."""
    options = TINY | {"model_name_or_path": encoder, "balanced_sampling": True, "logging_steps": 1}
    options |= {"max_grad_norm": 1.0, "noise": True, "average_checkpoints": 1}  # so that the norm is logged
    # 16 clips are evaluated in batches that two processes cannot share evenly
    runs = {"one": {"per_device_train_batch_size": 8}, "two": {"per_device_train_batch_size": 2}}
    runs["two"]["per_device_eval_batch_size"] = 3
    script.main(command("audioset-20k", audioset, tmp_path / "one", **options | runs["one"]))
    runs["two"]["gradient_accumulation_steps"] = 2
    arguments = command("audioset-20k", audioset, tmp_path / "two", **options | runs["two"])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, str(EXAMPLES / "run_audio_classification.py"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    logs = []
    for run in runs:
        history = json.loads((tmp_path / run / "trainer_state.json").read_text())["log_history"]
        rows = [row for row in history if "grad_norm" in row]
        logs.append([(row["loss"], row["grad_norm"], row["learning_rate"]) for row in rows])
    assert len(logs[0]) == 6
    np.testing.assert_allclose(logs[1], logs[0], rtol=1e-5)
    tables = [(tmp_path / run / "predictions.csv").read_text().splitlines() for run in runs]
    assert [row.split(",")[:2] for row in tables[1]] == [row.split(",")[:2] for row in tables[0]]
    scores = [json.loads((tmp_path / run / "eval_results.json").read_text()) for run in runs]
    for metric in ("eval_mAP", "eval_mAUC"):  # Trainer weighs the loss of an uneven last batch in its own way
        assert scores[1][metric] == pytest.approx(scores[0][metric], rel=1e-4)
    weights = [ASiTForAudioClassification.from_pretrained(tmp_path / run).state_dict() for run in runs]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def esc50(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("esc50")
    generator = np.random.default_rng(1)
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    for index in range(18):
        target, name, hertz = [(0, "dog", 300), (3, "cow", 3000)][index % 2]
        file = f"{index // 6 + 1}-{index:06d}-A-{target}.wav"
        write_tone(root / "audio" / file, hertz, generator)
        lines.append(f"{file},{index // 6 + 1},{target},{name},False,{index:06d},A")
    (root / "meta").mkdir()
    (root / "meta" / "esc50.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.slow
def test_single_label_recipe_over_folds(encoder, esc50, tmp_path):
    """Cross-entropy with soft labels from mixing; each fold is held out once and evaluated at the last epoch."""
    options = {"folds": "1,2,3", "num_train_epochs": 8, "mixup_rate": 0.5, "label_smoothing": 0.1, "layer_decay": 0.75}
    summary = script.main(command("esc50", esc50, tmp_path, **TINY | {"model_name_or_path": encoder} | options))
    written = json.loads((tmp_path / "fold_results.json").read_text())
    assert written["summary"] == summary
    assert list(written["folds"]) == ["1", "2", "3"]
    accuracies, curves = [], []
    for fold, metrics in written["folds"].items():
        assert (
            metrics["eval_accuracy"]
            == json.loads((tmp_path / f"fold-{fold}" / "eval_results.json").read_text())["eval_accuracy"]
        )
        rows = (tmp_path / f"fold-{fold}" / "predictions.csv").read_text().splitlines()[1:]
        assert len(rows) == 6
        assert all(f"/{fold}-0000" in row for row in rows)
        accuracies.append(metrics["eval_accuracy"])
        history = json.loads((tmp_path / f"fold-{fold}" / "trainer_state.json").read_text())["log_history"]
        curves.append([row["eval_accuracy"] for row in history if "eval_accuracy" in row])
        assert curves[-1][-1] == metrics["eval_accuracy"]
        assert (tmp_path / f"fold-{fold}" / "confusion.png").stat().st_size > 1000
    assert summary["eval_accuracy"] == pytest.approx(np.mean(accuracies))
    assert summary["eval_accuracy_std"] == pytest.approx(np.std(accuracies))
    assert summary["eval_accuracy"] > 0.6
    means = np.mean(curves, axis=0)
    assert summary["best_common_eval_accuracy"] == pytest.approx(means.max())
    assert summary["best_common_epoch"] == 1 + means.argmax()


def test_single_labels_with_binary_cross_entropy_are_evaluated_by_accuracy(encoder, esc50, tmp_path):
    options = {"folds": "1, 2", "problem_type": "multi_label_classification", "load_best_model_at_end": True}
    summary = script.main(command("esc50", esc50, tmp_path, **TINY | {"model_name_or_path": encoder} | options))
    assert {"eval_accuracy", "eval_mAP"} <= summary.keys()
    state = json.loads((tmp_path / "fold-1" / "trainer_state.json").read_text())
    assert state["best_metric"] == max(row["eval_accuracy"] for row in state["log_history"] if "eval_accuracy" in row)
    rows = (tmp_path / "fold-1" / "predictions.csv").read_text().splitlines()[1:]
    assert {row.split(",")[2] for row in rows} <= {"dog", "cow"}
    assert "precision" in (tmp_path / "fold-1" / "per_class.csv").read_text()


def test_a_filter_applies_to_training_and_to_the_held_out_fold(esc50, tmp_path):
    options = {"folds": "1,2", "train_filter": "label=dog"}
    data = parse_arguments(script.GROUPS, command("esc50", esc50, tmp_path, **options))[1]
    data.hold_out("1")
    train, _, evaluation = script.load_data(data, seed=0)
    assert (set(train["fold"][:]), set(evaluation["fold"][:])) == ({2}, {1})
    assert set(train["label"][:]) | set(evaluation["label"][:]) == {0}


def test_a_fold_without_clips_is_refused_before_training(encoder, esc50, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "finetune", lambda *args, **kwargs: pytest.fail("trained"))
    options = TINY | {"model_name_or_path": encoder, "folds": "1,9"}
    with pytest.raises(ValueError, match="fold 9"):
        script.main(command("esc50", esc50, tmp_path, **options))


def test_best_common_epoch_of_folds_with_unequal_numbers_of_evaluations():
    histories = [
        [{"loss": 1.0}, *({"epoch": epoch, "eval_accuracy": score} for epoch, score in enumerate(scores, 1))]
        for scores in ([0.1, 0.5, 0.2], [0.3, 0.4])
    ]
    found = best_common_epoch(histories, "accuracy", greater_is_better=True)
    assert found == {"best_common_epoch": 2, "best_common_eval_accuracy": pytest.approx(0.45)}
    assert best_common_epoch(histories, "eval_accuracy", False)["best_common_epoch"] == 1
    assert best_common_epoch([histories[0], []], "accuracy", True) == {}


def test_modern_recipe_with_keywords_unknown_and_silence(encoder, tmp_path):
    generator = np.random.default_rng(3)
    lists = {"validation_list.txt": [], "testing_list.txt": []}
    for index, word in enumerate(SPEECH_COMMANDS_WORDS[1]):
        for name, of_list in (("a", None), ("b", "validation_list.txt"), ("c", "testing_list.txt")):
            write_tone(tmp_path / word / f"{name}_nohash_0.wav", 200 + 100 * index, generator)
            if of_list:
                lists[of_list].append(f"{word}/{name}_nohash_0.wav")
    for name, clips in lists.items():
        (tmp_path / name).write_text("\n".join(clips) + "\n")
    (tmp_path / "_background_noise_").mkdir()
    soundfile.write(tmp_path / "_background_noise_" / "pink_noise.wav", generator.normal(0, 0.1, 160000), 16000)
    options = TINY | {"model_name_or_path": encoder, "max_steps": 2, "eval_steps": 1, "save_steps": 1}
    metrics = script.main(command("speech-commands-v1-modern", tmp_path, tmp_path / "run", **options))
    rows = [row.split(",") for row in (tmp_path / "run" / "predictions.csv").read_text().splitlines()[1:]]
    assert sorted(row[1] for row in rows) == sorted([*KEYWORDS, "unknown", "silence"])
    assert all("c_nohash" in row[0] for row in rows if row[1] != "silence")
    assert metrics["eval_top5_accuracy"] >= metrics["eval_accuracy"]
    assert "top5_accuracy" in (tmp_path / "run" / "README.md").read_text()


@pytest.fixture
def voxceleb1(tmp_path) -> Path:
    generator = np.random.default_rng(2)
    lines = []
    for speaker, hertz in (("id10001", 300), ("id10002", 3000)):
        for mark, video in ((1, "a"), (1, "b"), (2, "c"), (3, "d")):
            clip = f"{speaker}/{video}/00001.wav"
            write_tone(tmp_path / "wav" / clip, hertz, generator)
            lines.append(f"{mark} {clip}")
    (tmp_path / "iden_split.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_validation_list_selects_and_test_list_is_evaluated(encoder, voxceleb1, tmp_path):
    options = TINY | {"model_name_or_path": encoder, "max_steps": 2, "eval_steps": 1, "save_steps": 1}
    output = tmp_path / "run"
    script.main(command("voxceleb1", voxceleb1, output, **options))
    rows = (output / "predictions.csv").read_text().splitlines()[1:]
    assert [row.split("/")[-2] for row in rows] == ["d", "d"]
    _, data, *_ = parse_arguments(script.GROUPS, command("voxceleb1", voxceleb1, output))
    parts = script.load_data(data, seed=0)
    assert [{row["video"].split("/")[1] for row in part} for part in parts] == [{"a", "b"}, {"c"}, {"d"}]


def test_unchecked_unreadable_training_files_are_skipped_in_training(encoder, voxceleb1, tmp_path, caplog):
    (voxceleb1 / "wav" / "id10001" / "a" / "00001.wav").write_bytes(b"not audio")
    common = command("voxceleb1", voxceleb1, tmp_path / "run")
    for checked, count in ((True, 3), (False, 4)):
        _, data, *_ = parse_arguments(script.GROUPS, [*common, "--check_train_files", str(checked)])
        assert len(script.load_data(data, seed=0)[0]) == count
    options = TINY | {"model_name_or_path": encoder, "check_train_files": False, "max_steps": 1, "eval_steps": 1}
    script.main(command("voxceleb1", voxceleb1, tmp_path / "run", save_steps=1, **options))
    assert "Format not recognised" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": "3"}, "at least two.*got '3'"),
        ({"folds": "1,2,1"}, "got '1,2,1'"),
        ({"eval_filter": "fold=1"}, "folds are evaluated on each other"),
        ({"corpus": "gtzan"}, "corpus must be one of"),
        ({"label_column": "category"}, "label_column.*esc50"),
        ({"validation_split": "val"}, "--validation_split"),
        ({"push_to_hub": True}, "push the one you choose"),
    ],
)
def test_wrong_options(encoder, esc50, tmp_path, options, message):
    options = TINY | {"model_name_or_path": encoder} | options
    with pytest.raises(ValueError, match=message):
        script.main(command("esc50", esc50, tmp_path, **options))
