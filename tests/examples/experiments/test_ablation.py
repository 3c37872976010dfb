import csv
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml

from asit_hf import ASiTForPreTraining
from asit_hf.data.epochs import EpochCallback
from asit_hf.utils.arguments import recipe_arguments
from examples.experiments import ablation as script

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[3] / "examples"
RECIPES = EXAMPLES / "recipes"
SMALL = (
    "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32,num_mel_bins=32,"
    "distillation_hidden_size=16,distillation_bottleneck_size=8,num_prototypes=16"
)


@pytest.fixture
def recipe(tmp_path) -> Path:
    """An ablation of one step a run, on made sounds."""
    generator = np.random.default_rng(0)
    lines = ["file,label,split"]
    for index in range(24):
        name = ("low", "high")[index % 2]
        tone = np.sin(2 * np.pi * {"low": 200, "high": 3000}[name] * np.arange(6000) / 16000)
        soundfile.write(tmp_path / f"{index}.flac", 0.3 * tone + generator.normal(0, 0.02, 6000), 16000)
        lines.append(f"{index}.flac,{name},{'test' if index >= 16 else 'train'}")
    (tmp_path / "meta.csv").write_text("\n".join(lines) + "\n")
    base = {
        "train_data": [json.dumps({"data": str(tmp_path / "meta.csv"), "split": "train"})],
        "size": "tiny",
        "config_overrides": SMALL,
        "global_seconds": 0.25,
        "num_local_crops": 0,
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "warmup_epochs": 0,
        "learning_rate": 0.001,
        "save_strategy": "steps",
        "save_steps": 1,
        "plot_steps": 0,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "card_license": "mit",
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    probe = {"name": "tones", "train": str(tmp_path / "meta.csv"), "train_split": "train", "test_split": "test"}
    ablation = {
        "base": str(tmp_path / "base.yaml"),
        "rows": ["random", str(RECIPES / "ablation-full.yaml"), str(RECIPES / "ablation-reconstruction.yaml")],
        "probes": [{**probe, "k": 3, "device": "cpu"}],
        "seeds": [0, 1],
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "ablation.yaml").write_text(yaml.safe_dump(ablation))
    return tmp_path / "ablation.yaml"


def edit(recipe: Path, **options: object) -> None:
    recipe.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), **options}))


@pytest.mark.slow
def test_every_row_is_pretrained_probed_and_in_the_table(recipe, capsys):
    results = script.main(["--recipe", str(recipe)])
    assert [(result["row"], result["seed"]) for result in results] == [
        (row, seed) for row in ("random", "full", "reconstruction") for seed in (0, 1)
    ]
    assert [result["steps"] for result in results] == [0, 0, 1, 1, 1, 1]
    assert all((result["seconds"] > 0) == (result["steps"] > 0) for result in results)

    out = recipe.parent / "out"
    saved = json.loads((out / "results.json").read_text())
    assert saved["runs"] == results
    accuracies = [result["probes"]["tones"]["linear"]["accuracy"] for result in results if result["row"] == "full"]
    with open(out / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 3
    (line,) = [row for row in rows if (row["row"], row["probe"]) == ("full", "linear")]
    assert float(line["mean"]) == pytest.approx(np.mean(accuracies))
    assert float(line["std"]) == pytest.approx(np.std(accuracies, ddof=1))
    assert (line["seeds"], line["steps"], line["metric"]) == ("2", "1", "accuracy")
    table = (out / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert table.splitlines()[0].startswith(
        "| row | tones, linear accuracy | tones, ridge accuracy | tones, knn accuracy | seeds | steps |"
    )
    assert f"{100 * np.mean(accuracies):.1f} ± {100 * np.std(accuracies, ddof=1):.1f}" in table
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")

    def weights(row: str, seed: int) -> torch.Tensor:
        model = ASiTForPreTraining.from_pretrained(out / row / f"seed-{seed}" / "pretraining")
        return model.asit.layers[0].mlp.fc1.weight, model.config

    start, config = weights("random", 0)
    assert not torch.equal(start, weights("random", 1)[0])
    trained, full = weights("full", 0)
    assert 0 < float((trained - start).detach().abs().max()) < 0.01  # one step from the untrained one
    assert config.local_loss_weight == full.local_loss_weight == 0.5
    assert weights("reconstruction", 0)[1].local_loss_weight == 0


@pytest.mark.slow
def test_finished_runs_are_not_repeated(recipe, monkeypatch):
    edit(recipe, rows=["random", str(RECIPES / "ablation-full.yaml")], seeds=[0])
    pretrained, probed = [], []
    pretrain, probe = script.run_pretraining.main, script.run_linear_probe.main
    monkeypatch.setattr(script.run_pretraining, "main", lambda argv: pretrained.append(argv) or pretrain(argv))
    monkeypatch.setattr(script.run_linear_probe, "main", lambda argv: probed.append(argv) or probe(argv))
    first = script.main(["--recipe", str(recipe)])
    assert (len(pretrained), len(probed)) == (1, 2)
    assert script.main(["--recipe", str(recipe)]) == first
    assert (len(pretrained), len(probed)) == (1, 2)
    # interrupted while probing, and one more seed
    (recipe.parent / "out" / "full" / "seed-0" / "result.json").unlink()
    again = script.main(["--recipe", str(recipe), "--seeds", "0", "1"])
    assert (len(pretrained), len(probed)) == (2, 5)
    assert [result for result in again if result["seed"] == 0] == first
    base = recipe.parent / "base.yaml"
    base.write_text(base.read_text().replace("max_steps: 1", "max_steps: 2"))
    with pytest.raises(ValueError, match="seed-0 was run with other settings"):
        script.main(["--recipe", str(recipe)])


def test_pretraining_resumes_from_its_checkpoint(recipe):
    edit(recipe, rows=[str(RECIPES / "ablation-full.yaml")], seeds=[0])
    base = recipe.parent / "base.yaml"
    base.write_text(base.read_text().replace("max_steps: 1", "max_steps: 3"))
    (whole,) = script.main(["--recipe", str(recipe), "--output_dir", str(recipe.parent / "whole")])
    edit(recipe, output_dir=str(recipe.parent / "stopped"))

    class Stopped(Exception):
        pass

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EpochCallback, "on_step_begin", stop)
        with pytest.raises(Stopped):
            script.main(["--recipe", str(recipe)])
    (resumed,) = script.main(["--recipe", str(recipe)])
    assert resumed["steps"] == whole["steps"] == 3
    assert resumed["probes"] == whole["probes"]
    assert resumed["seconds"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "both"}, "teacher, student, got 'both'"),
        ({"rows": ["random", "random"]}, "distinct names, got random, random"),
        ({"probes": [{"train": "a.csv"}]}, "name for every probe"),
        ({"seeds": [1, 1]}, r"distinct seeds, got \[1, 1\]"),
    ],
)
def test_wrong_options(recipe, options, message):
    edit(recipe, **options)
    with pytest.raises(ValueError, match=message):
        script.main(["--recipe", str(recipe)])


def test_errors_of_the_last_row_are_raised_before_the_first_runs(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "run_cell", lambda *_: pytest.fail("a row was run"))
    rows = yaml.safe_load(recipe.read_text())["rows"]
    edit(recipe, rows=[*rows, str(tmp_path / "gone.yaml")])
    with pytest.raises(FileNotFoundError, match=r"gone\.yaml"):
        script.main(["--recipe", str(recipe)])
    (tmp_path / "typo.yaml").write_text("learning_rat: 0.1\n")
    edit(recipe, rows=[*rows, str(tmp_path / "typo.yaml")])
    with pytest.raises(ValueError, match="--learning_rat"):
        script.main(["--recipe", str(recipe)])
    edit(recipe, rows=rows, probes=[{"name": "tones", "train": "a.csv"}])
    with pytest.raises(SystemExit):
        script.main(["--recipe", str(recipe)])
    assert "--test, --test_split or --test_filter" in capsys.readouterr().err


def test_the_recipe_of_real_audio_is_whole(monkeypatch):
    monkeypatch.setenv("ASIT_REAL_AUDIO", "/audio")
    monkeypatch.chdir(EXAMPLES.parent)
    classes = (script.AblationArguments,)
    arguments = ["--recipe", str(RECIPES / "esc50-asc-ablations.yaml"), "--output_dir", "out"]
    (args,) = script.parse_arguments(classes, arguments)
    assert {path.stem for path in RECIPES.glob("ablation-*.yaml")} == {Path(row).stem for row in args.rows} - {
        "random"
    }
    for row in args.rows:
        assert row == "random" or recipe_arguments(row)
    for command in script.read_probes(args.probes).values():
        probe = script.run_linear_probe.parse_args([*command, "--model_name_or_path", "model"])
        assert probe.train.startswith("/audio/")
