import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForPreTraining, ASiTModel
from asit_hf.data.labelled import load_labelled
from examples import run_linear_probe as script

SCRIPT = Path(__file__).parents[2] / "examples" / "run_linear_probe.py"
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SMALL |= {"num_frames": 64, "num_prototypes": 16, "distillation_hidden_size": 16, "distillation_bottleneck_size": 8}
CLASSES = {"low": 200, "middle": 900, "high": 3500}


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    """A folder of class folders, and a manifest of it with folds and several labels a clip."""
    folder = tmp_path_factory.mktemp("sounds")
    generator = np.random.default_rng(0)
    lines = ["filename,category,fold,tags"]
    for name, hertz in CLASSES.items():
        (folder / "audio" / name).mkdir(parents=True)
        for index in range(10):
            time = np.arange(int(generator.integers(4000, 12000))) / 16000
            tone = np.sin(2 * np.pi * hertz * generator.uniform(0.9, 1.1) * time)
            path = f"{name}/{index}.flac"
            soundfile.write(folder / "audio" / path, 0.3 * tone + generator.normal(0, 0.01, len(time)), 16000)
            tags = f"tone;{name}" if index % 2 else name
            lines.append(f"{path},{name},{index % 5 + 1},{tags}")
    (folder / "meta.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    ASiTForPreTraining(ASiTConfig(**SMALL)).save_pretrained(folder)
    ASiTFeatureExtractor().save_pretrained(folder)
    return folder


def arguments(sounds: Path, *more: str) -> list[str]:
    manifest = ["--train", str(sounds / "meta.csv"), "--root", str(sounds / "audio"), "--audio_column", "filename"]
    folds = ["--train_filter", "fold=1,2,3", "--test_filter", "fold=4,5", "--group_column", "fold", "--k", "3"]
    return [*manifest, *folds, "--device", "cpu", *more]


def test_checkpoint(sounds, checkpoint, tmp_path, capsys):
    output = tmp_path / "probe" / "results.json"
    more = ["--model_name_or_path", str(checkpoint), "--label_column", "category", "--pooling", "cls_mean"]
    results = script.main(arguments(sounds, *more, "--output", str(output)))
    assert json.loads(output.read_text()) == results
    assert results["train_clips"] == 18
    assert results["test_clips"] == 12
    assert results["classes"] == 3
    assert results["embedding_size"] == 64
    assert [run["seed"] for run in results["runs"]] == [0, 1, 2]
    # any encoder separates tones this far apart
    assert results["summary"]["linear"]["accuracy"]["mean"] > 0.8
    assert results["summary"]["knn"]["accuracy"]["std"] == 0
    assert "linear" in capsys.readouterr().out


def test_random_encoders_differ_by_seed(sounds, checkpoint):
    more = ["--random_init", "--model_name_or_path", str(checkpoint), "--label_column", "category"]
    results = script.main(arguments(sounds, *more, "--seeds", "0", "1"))
    assert results["model"].startswith("random")
    again = script.main(arguments(sounds, *more, "--seeds", "1"))
    assert again["runs"][0] == results["runs"][1]
    args = script.parse_args(arguments(sounds, *more))
    dataset = load_labelled(sounds / "audio")
    first, second = (script.embed_both(args, dataset, dataset, seed, {})[0] for seed in (0, 1))
    assert not np.allclose(first, second, atol=1e-3)


def test_teacher_and_student_of_a_pretraining_checkpoint(sounds, tmp_path):
    """The student's last layer norm is zeroed: only the teacher's embeddings carry information."""
    torch.manual_seed(0)
    model = ASiTForPreTraining(ASiTConfig(**SMALL))
    with torch.no_grad():
        model.asit.layernorm.weight.zero_()
    model.save_pretrained(tmp_path)
    ASiTFeatureExtractor().save_pretrained(tmp_path)
    more = ["--model_name_or_path", str(tmp_path), "--label_column", "category", "--seeds", "0"]
    accuracy = {
        encoder: script.main(arguments(sounds, *more, "--encoder", encoder))["summary"]["linear"]["accuracy"]["mean"]
        for encoder in ("teacher", "student")
    }
    assert accuracy["teacher"] > 0.8
    assert accuracy["student"] < 0.5


def test_several_labels_give_map(sounds, checkpoint):
    more = ["--model_name_or_path", str(checkpoint), "--label_column", "tags", "--seeds", "0"]
    results = script.main(arguments(sounds, *more))
    assert results["classes"] == 4
    assert 0.5 < results["summary"]["linear"]["mAP"]["mean"] <= 1


def test_the_attentive_probe_weights_all_layers(sounds, checkpoint, capsys):
    more = ["--model_name_or_path", str(checkpoint), "--label_column", "category", "--seeds", "0"]
    options = [one for one in arguments(sounds, *more) if one not in ("--k", "3")]
    results = script.main([*options, "--probes", "attentive"])
    assert results["num_layers"] == len(results["runs"][0]["attentive"]["layer_weights"]) == 2
    assert results["summary"]["attentive"]["accuracy"]["mean"] > 0.8
    assert "layer_weights" not in results["summary"]["attentive"]
    assert "attentive layer weights" in capsys.readouterr().out
    both = script.main([*options, "--probes", "ridge", "attentive", "--num_layers", "1", "--window_seconds", "0.3"])
    assert both["runs"][0]["attentive"]["layer_weights"] == [1.0]
    assert both["embedding_size"] == 32
    assert set(script.parse_args(options).probes) == {"linear", "ridge", "knn"}  # the slow one must be named


def test_folders_and_max_seconds(sounds, checkpoint):
    folder = str(sounds / "audio")
    more = ["--model_name_or_path", str(checkpoint), "--max_seconds", "0.2", "--seeds", "0", "--k", "3"]
    results = script.main(["--train", folder, "--test", folder, "--device", "cpu", *more])
    assert results["classes"] == 3
    assert results["train_clips"] == results["test_clips"] == 30


def test_unreadable_files_are_skipped_or_an_error(sounds, checkpoint, tmp_path, caplog):
    lines = (sounds / "meta.csv").read_text().splitlines()
    (tmp_path / "broken.flac").write_bytes(b"not audio")
    manifest = tmp_path / "meta.csv"
    manifest.write_text("\n".join([*lines, f"{tmp_path / 'broken.flac'},low,1,low", "gone.flac,low,1,low"]) + "\n")
    more = ["--model_name_or_path", str(checkpoint), "--label_column", "category", "--seeds", "0"]
    options = arguments(sounds, *more)
    options[1] = str(manifest)
    assert script.main(options)["train_clips"] == 18
    assert "broken.flac" in caplog.text
    assert "2 of 20 files" in caplog.text
    with pytest.raises(ValueError, match="broken.flac"):
        script.main([*options, "--strict"])


def test_a_file_damaged_inside_stops_with_one_line(sounds, checkpoint, tmp_path, monkeypatch, capsys):
    shutil.copytree(sounds, tmp_path / "sounds")
    damaged = tmp_path / "sounds" / "audio" / "high" / "4.flac"
    content = damaged.read_bytes()
    damaged.write_bytes(content[: len(content) // 2] + bytes(len(content) // 2))  # the header is whole
    options = arguments(tmp_path / "sounds", "--model_name_or_path", str(checkpoint))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    with pytest.raises(SystemExit, match="1"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: cannot read {damaged}: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--label_column", "speaker"], "no label column 'speaker'"),
        (["--label_column", "category", "--test_filter", "year=1"], "year=1"),
        (["--label_column", "category", "--test_filter", "fold=9"], "no row of .*fold=9"),
        (["--label_column", "category", "--train_filter", "category=low,high"], "got 'middle'"),
    ],
)
def test_wrong_input(sounds, checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        script.main(arguments(sounds, "--model_name_or_path", str(checkpoint), *options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--k", "19"], "--k from 1 to 18.*got 19"),
        (["--k", "4", "--shots", "1", "2"], "--k from 1 to 3.*got 4"),
        (["--num_layers", "9"], "--num_layers from 1 to 2, got 9"),
        (["--train_filter", "fold=1"], "two groups.*got 1"),
        (["--window_seconds", "0.01"], "window_seconds.*0.01"),
        (["--output", "{sounds}"], "got the folder"),
        (["--output", "{sounds}/meta.csv/results.json"], "meta.csv"),
    ],
)
def test_what_would_fail_later_is_refused_before_embedding(sounds, checkpoint, monkeypatch, options, message):
    monkeypatch.setattr(script, "embed", lambda *args, **kwargs: pytest.fail("embedded"))
    options = [option.format(sounds=sounds) for option in options]
    with pytest.raises((ValueError, OSError), match=message):
        script.main(arguments(sounds, "--model_name_or_path", str(checkpoint), "--label_column", "category", *options))


def test_wrong_options(sounds, capsys):
    with pytest.raises(SystemExit):
        script.main(["--train", str(sounds), "--test", str(sounds)])
    assert "--random_init" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main(["--train", str(sounds), "--random_init"])
    assert "--test_filter" in capsys.readouterr().err


def test_splits_of_a_folder_are_used(sounds, tmp_path, caplog):
    for split in ("Training", "dev"):
        shutil.copytree(sounds / "audio", tmp_path / split)
    args = script.parse_args(["--train", str(tmp_path), "--random_init"])
    assert (args.train_split, args.test_split) == ("Training", "dev")
    assert "--test_split" in caplog.text
    shutil.copytree(sounds / "audio", tmp_path / "test")
    args = script.parse_args(["--train", str(tmp_path), "--random_init"])
    assert (args.train_split, args.test_split) == ("Training", "test")
    args = script.parse_args(
        ["--train", str(tmp_path), "--random_init", "--train_split", "dev", "--test_split", "test"]
    )
    assert (args.train_split, args.test_split) == ("dev", "test")


@pytest.mark.parametrize(
    "options",
    [
        ["--k", "3", "--probes", "linear"],
        ["--draws", "3"],
        ["--group_column", "fold", "--probes", "knn"],
        ["--pooling", "mean", "--probes", "attentive"],
        ["--size", "tiny", "--model_name_or_path", "checkpoint"],
        ["--encoder", "student", "--random_init"],
    ],
)
def test_options_without_effect_are_refused(options, capsys):
    model = [] if "--model_name_or_path" in options or "--random_init" in options else ["--random_init"]
    with pytest.raises(SystemExit):
        script.parse_args(["--train", "a.csv", "--test", "b.csv", *model, *options])
    assert f"{options[0]} has no effect" in capsys.readouterr().err


def test_shots(sounds, checkpoint, tmp_path, capsys, monkeypatch):
    embedded = []
    original = script.embed
    monkeypatch.setattr(
        script, "embed", lambda *args, **options: (embedded.append(len(args[2])), original(*args, **options))[1]
    )
    options = [one for one in arguments(sounds) if one not in ("--k", "3")]
    options += ["--model_name_or_path", str(checkpoint), "--label_column", "category", "--test_filter", "fold=5"]
    few = [*options, "--shots", "1", "3", "--draws", "2", "--output", str(tmp_path / "results.json")]
    results = script.main(few)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    runs = results["runs"]
    assert [(run["shots"], run["draw"], run["clips"]) for run in runs] == [(1, 0, 3), (1, 1, 3), (3, 0, 9), (3, 1, 9)]
    assert results["train_clips"] == embedded[0] < 18  # only what is drawn is embedded
    assert results["test_clips"] == 6
    accuracies = [run["linear"]["accuracy"] for run in runs[2:]]
    assert results["summary"]["3"]["linear"]["accuracy"]["mean"] == pytest.approx(np.mean(accuracies))
    assert results["summary"]["3"]["linear"]["accuracy"]["mean"] > 0.8
    assert "validation_accuracy" in results["summary"]["3"]["linear"]
    assert "validation_accuracy" not in results["summary"]["1"]["linear"]
    assert "3 per class" in capsys.readouterr().out
    assert script.main([*few, "--shots", "3", "--probes", "ridge"])["runs"][0]["ridge"] == runs[2]["ridge"]


@pytest.mark.parametrize("labels", ["category", "tags"])
def test_draws(sounds, labels, caplog):
    train = load_labelled(sounds / "meta.csv", root=sounds / "audio", audio_column="filename", label_column=labels)
    y = script.targets(train)
    args = script.parse_args(
        ["--random_init", "--train", "a", "--test", "b", "--shots", "2", "5", "12", "--draws", "3"]
    )
    draws = {(run["shots"], run["draw"]): rows for run, rows in script.draw_clips(args, train, 0)}
    assert len(draws) == 9
    for (shots, draw), rows in draws.items():
        assert len(set(rows)) == len(rows)
        counts = np.bincount(y[rows]) if y.ndim == 1 else y[rows].sum(0)
        sizes = np.bincount(y) if y.ndim == 1 else y.sum(0)
        assert (counts >= np.minimum(shots, sizes)).all()
        if y.ndim == 1:
            assert (counts == np.minimum(shots, sizes)).all()
        assert set(draws[2, draw]) <= set(rows)
    assert set(draws[2, 0]) != set(draws[2, 1])
    assert "fewer than 12" in caplog.text
    others = {run["draw"]: rows for run, rows in script.draw_clips(args, train, 1) if run["shots"] == 2}
    assert set(others[0]) != set(draws[2, 0])
    same = [rows.tolist() for _, rows in script.draw_clips(args, train, 0)]
    assert same == [rows.tolist() for rows in draws.values()]


def test_shots_of_the_attentive_probe_and_of_several_labels(sounds, checkpoint):
    options = arguments(sounds, "--model_name_or_path", str(checkpoint), "--shots", "2", "--draws", "1")
    results = script.main([*options, "--label_column", "tags", "--probes", "attentive", "ridge", "knn"])
    (run,) = results["runs"]
    assert 0.3 < run["ridge"]["mAP"] <= 1
    assert len(run["attentive"]["layer_weights"]) == 2


@pytest.mark.slow
@pytest.mark.real_audio
def test_real_audio(real_audio, tmp_path):
    """On a few classes of ESC-50, the linear probe of a random encoder is above chance."""
    ASiTFeatureExtractor().save_pretrained(tmp_path)
    ASiTModel(ASiTConfig(**SMALL)).save_pretrained(tmp_path)
    names = "dog,rain,siren,clapping"
    options = [
        "--train",
        str(real_audio / "esc50-16k" / "esc50.csv"),
        "--root",
        str(real_audio / "esc50-16k" / "audio"),
    ]
    options += ["--audio_column", "filename", "--label_column", "category", "--model_name_or_path", str(tmp_path)]
    options += ["--train_filter", "fold=1,2,3", f"category={names}", "--test_filter", "fold=4", f"category={names}"]
    results = script.main([*options, "--random_init", "--seeds", "0", "--device", "cpu"])
    assert results["train_clips"] == 96
    assert results["test_clips"] == 32
    assert results["group_column"] == "src_file"
    assert results["summary"]["linear"]["accuracy"]["mean"] > 0.4


def test_known_embeddings_are_not_computed_again(sounds, checkpoint, monkeypatch):
    args = script.parse_args(arguments(sounds, "--model_name_or_path", str(checkpoint)))
    dataset = load_labelled(sounds / "audio")
    known = {}
    first, _ = script.embed_both(args, dataset, dataset, 0, known)
    assert len(known) == len(dataset)
    monkeypatch.setattr(script, "embed", lambda *arguments, **options: pytest.fail("embedded again"))
    second, _ = script.embed_both(args, dataset.select([2, 0]), dataset, 0, known)
    assert np.array_equal(first[[2, 0]], second)


def test_long_clips_are_embedded_in_windows(sounds, checkpoint):
    dataset = load_labelled(sounds / "audio")
    model = ["--model_name_or_path", str(checkpoint), "--pooling", "cls_mean"]
    whole, windows, longer = (
        script.embed_both(script.parse_args(arguments(sounds, *model, *more)), dataset, dataset, 0, {})[0]
        for more in ([], ["--window_seconds", "0.2"], ["--window_seconds", "1"])
    )
    np.testing.assert_allclose(longer, whole, atol=1e-5)
    seconds = np.array([soundfile.info(path).duration for path in sorted((sounds / "audio").glob("*/*.flac"))])
    assert (np.abs(windows - whole).max(1)[seconds > 0.4] > 1e-4).all()


def test_bf16_rounds_the_embeddings(sounds, checkpoint):
    dataset = load_labelled(sounds / "audio").select(range(4))
    model = ["--model_name_or_path", str(checkpoint), "--pooling", "cls_mean"]
    exact, rounded = (
        script.embed_both(script.parse_args(arguments(sounds, *model, *more)), dataset, dataset, 0, {})[0]
        for more in ([], ["--bf16"])
    )
    assert not np.array_equal(rounded, exact)
    np.testing.assert_allclose(rounded, exact, atol=0.1)


def test_a_corpus(sounds, checkpoint, tmp_path):
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    (tmp_path / "audio").mkdir()
    for target, name in enumerate(CLASSES):
        for index in range(10):
            file = f"{index % 5 + 1}-{target}{index}-A-{target}.wav"
            samples, rate = soundfile.read(sounds / "audio" / name / f"{index}.flac")
            soundfile.write(tmp_path / "audio" / file, samples, rate)
            lines.append(f"{file},{index % 5 + 1},{target},{name},False,{target}{index},A")
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "esc50.csv").write_text("\n".join(lines) + "\n")
    options = ["--corpus", "esc50", "--train", str(tmp_path), "--model_name_or_path", str(checkpoint)]
    folds = ["--train_filter", "fold=1,2,3", "--test_filter", "fold=4", "--device", "cpu", "--k", "3"]
    results = script.main([*options, *folds, "--seeds", "0"])
    assert (results["train_clips"], results["test_clips"], results["classes"]) == (18, 6, 3)
    with pytest.raises(ValueError, match="root cannot be used with the corpus esc50"):
        script.main([*options, *folds, "--root", str(tmp_path)])
