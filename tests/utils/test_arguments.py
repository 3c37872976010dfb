import json
import runpy
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import TrainingArguments

from asit_hf.utils.arguments import (
    OptionError,
    checkpoint_to_resume,
    parse_arguments,
    recipe_arguments,
    refuse_without_effect,
    run_script,
)
from asit_hf.utils.extras import extra

EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclass
class Options:
    data: list[str] = field(default_factory=list)
    rate: float = 0.1
    flag: bool = False
    name: str | None = None


def test_the_command_line_overrides_the_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: [a, b]\nrate: 2.0e-3\nflag: true\nname: null\n")
    for given in (["--recipe", str(recipe)], [f"--recipe={recipe}"]):
        (options,) = parse_arguments((Options,), ["--rate", "0.5", *given, "--data", "c"])
        assert options == Options(data=["c"], rate=0.5, flag=True, name=None)


def test_later_recipes_override_earlier_ones(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("data: [a, b]\nrate: 0.2\nname: x\n")
    second.write_text("data: [c]\nrate: 0.3\n")
    expected = Options(data=["c"], rate=0.3, flag=True, name="x")
    for given in (["--recipe", str(first), str(second)], ["--recipe", str(first), "--recipe", str(second)]):
        (options,) = parse_arguments((Options,), [*given, "--flag", "true"])
        assert options == expected


def test_json_recipes_and_nested_values(tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text('{"data": [{"source": "a.csv", "filter": ["fold=1"]}, "b"]}')
    assert recipe_arguments(recipe) == ["--data", '{"source": "a.csv", "filter": ["fold=1"]}', "b"]


def test_environment_variables_are_filled_in(tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: [$FOLDER_OF_AUDIO/x]\n")
    monkeypatch.setenv("FOLDER_OF_AUDIO", "here")
    assert recipe_arguments(recipe) == ["--data", "here/x"]
    monkeypatch.delenv("FOLDER_OF_AUDIO")
    with pytest.raises(ValueError, match=r"not set.*FOLDER_OF_AUDIO"):
        recipe_arguments(recipe)


@pytest.mark.parametrize("content", ["- a\n- b\n", "rate: [1\n", "no_such_option: 1\n", "rat: 1\n", "rate: high\n"])
def test_wrong_recipes_are_refused(tmp_path, content):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content)
    with pytest.raises(OptionError):
        parse_arguments((Options,), ["--recipe", str(recipe)])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe"], ["--recipe", "argument"]),
        (["--nmae", "x"], ["--nmae", "--name"]),
        (["--recipes", "x"], ["--recipes", "--recipe"]),
        (["--zzzz=1"], ["--zzzz"]),
        (["stray", "--rate", "0.5"], ["stray"]),
        (["--rate", "high"], ["--rate", "high"]),
    ],
)
def test_wrong_options_are_named(arguments, words):
    with pytest.raises(OptionError) as error:
        parse_arguments((Options,), arguments)
    assert all(word in str(error.value) for word in words)


def test_options_that_have_no_effect_are_named():
    refuse_without_effect(Options(data=["a"], rate=0.1), ["rate", "flag"], "without data")
    with pytest.raises(ValueError, match="rate and flag .*without data"):
        refuse_without_effect(Options(rate=0.2, flag=True, name="x"), ["rate", "flag"], "without data")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OptionError("unknown option --x"), 2),
        (ValueError("expected 16000 Hz, got 8000"), 1),
        (FileNotFoundError(2, "No such file", "meta.csv"), 1),
    ],
)
def test_a_script_ends_with_one_line(capsys, monkeypatch, error, code):
    def main():
        raise error

    monkeypatch.setitem(main.__globals__, "__name__", "__main__")
    with pytest.raises(SystemExit) as stopped:
        run_script(main)
    assert stopped.value.code == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_an_error_of_another_library_keeps_its_traceback():
    with pytest.raises(ValueError, match="Expecting"):
        run_script(lambda: json.loads("{"))


@pytest.mark.slow
def test_the_package_speaks_and_transformers_does_not(tmp_path):
    script = f"""
from transformers import TrainingArguments
from transformers.utils import logging
from asit_hf.utils.arguments import logger, start_run
start_run(TrainingArguments(output_dir={str(tmp_path)!r}, use_cpu=True, report_to="none"))
logger.info("a decision")
logging.get_logger("transformers").info("a configuration")
"""
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert "a decision" in output.stderr.splitlines()
    assert "a configuration" not in output.stderr + output.stdout


def test_without_an_accelerator_a_recipe_in_bf16_trains_on_the_cpu(tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output_dir: {tmp_path}\nbf16: true\nreport_to: none\n")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    (args,) = parse_arguments((TrainingArguments,), ["--recipe", str(recipe)])
    assert args.use_cpu
    assert args.bf16
    (options,) = parse_arguments((Options,), [])  # no option of its own
    assert options == Options()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    (args,) = parse_arguments((TrainingArguments,), ["--recipe", str(recipe), "--bf16", "false"])
    assert not args.use_cpu


@pytest.mark.parametrize("asked", ["True", "true"])
def test_a_run_is_resumed_from_its_last_checkpoint(tmp_path, caplog, asked):
    args = TrainingArguments(output_dir=str(tmp_path / "run"), resume_from_checkpoint=asked, use_cpu=True)
    assert checkpoint_to_resume(args) is None
    assert str(tmp_path / "run") in caplog.text  # a misspelled folder must not pass for a new run
    for step in (2, 10):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
    assert checkpoint_to_resume(args) == str(tmp_path / "run" / "checkpoint-10")
    args.resume_from_checkpoint = "elsewhere"
    assert checkpoint_to_resume(args) == "elsewhere"
    args.resume_from_checkpoint = None
    assert checkpoint_to_resume(args) is None


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("similar.py", ["{folder}", "{folder}/none", "{sound}"]),
        ("similar.py", ["{folder}/none", "{folder}", "{sound}"]),
    ],
)
def test_a_wrong_path_is_one_line(tmp_path, monkeypatch, capsys, script, arguments):
    if script == "similar.py":
        pytest.importorskip("sentence_transformers")
    for name in ("sound.wav", "other.wav"):
        soundfile.write(tmp_path / name, np.zeros(1600), 16000)
    arguments = [one.format(folder=tmp_path, sound=tmp_path / "sound.wav") for one in arguments]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    assert exit.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert str(tmp_path / "none") in line


def test_a_missing_package_is_one_line(capsys):
    def main():
        with extra("mteb"):
            import no_such_package  # noqa: F401

    with pytest.raises(SystemExit):
        run_script(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert "no_such_package" in line
    assert "mteb" in line
