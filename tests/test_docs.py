"""The documentation names only commands, options, make targets, files and headings that exist, and its code runs."""

import importlib
import json
import re
import statistics
import sys
from argparse import ArgumentParser
from functools import cache
from pathlib import Path

import pytest
import soundfile
import torch

ROOT = Path(__file__).parents[1]
FOLDERS = ("asit_hf", "examples", "model_cards", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
SOURCES = sorted(
    path for folder in FOLDERS[:2] for kind in ("py", "yaml") for path in (ROOT / folder).rglob(f"*.{kind}")
)
CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md"]  # the changelog also names what is gone
# a script or module of the project and what follows it: the rest of the line, or lines, or of the code in backticks
COMMAND = re.compile(r"(-m (?:asit_hf|examples)[\w.]*|\bexamples/[\w/]+\.py)((?:\\\n|[^\n`])*)")
OPTION = re.compile(r"(?<![\w-])--([a-z]\w*)")
# options of pip, venv, torchrun, accelerate, hf, X-ARES (max-jobs), http.server and the page in the browser
OTHER_OPTIONS = {"help", "max", "model", "multi_gpu", "nproc_per_node", "num_processes", "repo", "sdk", "type"}
OTHER_OPTIONS |= {"bind", "directory", "system"}
# files that a command writes or that come from elsewhere
NOT_IN_THE_REPOSITORY = re.compile(r"[$*<{]|\.\.\.|NAME|results/encoder")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def exists(file: str, page: Path) -> bool:
    """Whether a file or folder exists, named from the repository root or from the page."""
    return (ROOT / file).exists() or (page.parent / file).exists()


def commands(text: str) -> list[tuple[str, str]]:
    """Pairs of a script, as `examples/NAME.py` or `-m MODULE`, and its arguments."""
    found = [(script, re.sub(r"\\\n\W*?(?=\S)", " ", rest)) for script, rest in COMMAND.findall(text)]
    return [(script, rest.split(" #")[0]) for script, rest in found]


@cache
def usage_of(script: str, subcommand: str | None = None) -> str:
    """The usage line of the parser that answers `--help`: optional arguments are in brackets."""
    module = script.removeprefix("-m ") if script.startswith("-m ") else script.removesuffix(".py").replace("/", ".")
    parsers: list[ArgumentParser] = []
    with pytest.MonkeyPatch.context() as patch:
        if not script.startswith("-m "):
            patch.syspath_prepend((ROOT / script).parent)  # as python does for a script
        try:
            main = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != "gradio":
                raise
            pytest.skip(f"{script} needs gradio")
        if not hasattr(main, "main"):  # a package that is run by its __main__
            main = importlib.import_module(f"{module}.__main__")
        patch.setattr(ArgumentParser, "print_help", lambda parser, file=None: parsers.append(parser))
        patch.setattr(sys, "argv", [script, *([subcommand] if subcommand else []), "--help"])
        with pytest.raises(SystemExit):
            main.main()
    assert parsers, f"{script} has no command {subcommand}"
    parser = parsers[0]
    takes_recipes, parser.usage = "--recipe" in (parser.usage or ""), None  # else the one that argparse makes
    return parser.format_usage() + (" [--recipe]" if takes_recipes else "")


def options_of(script: str, subcommand: str | None = None) -> set[str]:
    return set(OPTION.findall(usage_of(script, subcommand)))


def required_options_of(script: str, subcommand: str | None = None) -> set[str]:
    usage, brackets = usage_of(script, subcommand), 1
    while brackets:
        usage, brackets = re.subn(r"\[[^\[\]]*\]", "", usage)
    return set(OPTION.findall(usage))


def subcommand_of(script: str, arguments: str) -> str | None:
    if script not in ("-m asit_hf.hub", "-m asit_hf.data.parcels"):
        return None
    word = re.match(r" ([a-z]+)\b", arguments)
    return word and word[1]


@pytest.mark.parametrize("path", [*CURRENT, *SOURCES], ids=name)
def test_commands_have_these_options(path):
    for script, arguments in commands(path.read_text(encoding="utf-8")):
        wanted = set(OPTION.findall(arguments))
        if wanted or subcommand_of(script, arguments):
            assert not wanted - options_of(script, subcommand_of(script, arguments)), (script, arguments)
        elif script.startswith("examples/"):
            assert exists(script, path)


@pytest.mark.parametrize("path", [page for page in CURRENT if "```bash" in page.read_text()], ids=name)
def test_commands_have_what_is_required(path):
    """In blocks of commands, but for those with dots or a recipe."""
    for block in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
        for script, arguments in commands(block):
            if "..." not in arguments and "--recipe" not in arguments:
                required = required_options_of(script, subcommand_of(script, arguments))
                assert not required - set(OPTION.findall(arguments)), (script, arguments)


@pytest.mark.parametrize("path", CURRENT, ids=name)
def test_options_in_the_text_exist(path):
    """Options that are named in a sentence or a table, without a script."""
    scripts = [*(ROOT / "examples").glob("*.py"), *(ROOT / "examples" / "tools").glob("*.py")]
    scripts += [*(ROOT / "examples" / "experiments").glob("*.py"), *(ROOT / "examples" / "benchmarks").glob("*.py")]
    known = set(OTHER_OPTIONS)
    for script in scripts:
        if re.search(r"^def main\(", script.read_text(), re.MULTILINE):
            known |= options_of(name(script))
    for module in ("asit_hf.predict", "asit_hf.embed", "asit_hf.listen", "asit_hf.fit", "asit_hf.convert_original"):
        known |= options_of(f"-m {module}")
    known |= options_of("-m asit_hf.hub", "export") | options_of("-m asit_hf.data.parcels", "encode")
    assert not set(OPTION.findall(path.read_text(encoding="utf-8"))) - known


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text):
        target, _, anchor = link.partition("#")
        if "://" in link:
            continue
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings], link


@pytest.mark.parametrize("path", CURRENT, ids=name)
def test_files_and_make_targets_exist(path):
    text = path.read_text(encoding="utf-8")
    for file in re.findall(r"`((?:asit_hf|examples|tests|model_cards)/[^`\s:]*)", text):
        assert NOT_IN_THE_REPOSITORY.search(file) or exists(file, path), file
    for recipe in re.findall(r"--recipe (examples/\S+)", text):
        assert NOT_IN_THE_REPOSITORY.search(recipe) or (ROOT / recipe).is_file(), recipe
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert not set(re.findall(r"(?:`|^)make ([a-z0-9-]+)", text, re.MULTILINE)) - targets


def test_every_recipe_has_a_result():
    text = (ROOT / "examples" / "RESULTS.md").read_text(encoding="utf-8")
    table = text[text.index("## Recipes") : text.index("## The tiny checkpoints")]
    assert set(re.findall(r"\(recipes/([\w.-]+)\)", table)) == {
        recipe.name for recipe in (ROOT / "examples" / "recipes").iterdir()
    }


def test_results_are_those_of_the_files():
    text = (ROOT / "examples" / "RESULTS.md").read_text(encoding="utf-8")
    folder = ROOT / "examples" / "results"
    probes, tasks, ablations, finetuned = (
        json.loads((folder / f"{file}.json").read_text())
        for file in ("probes", "tasks", "evidence", "evidence-finetuned")
    )
    measured = [(row["accuracy"]["mean"], row["accuracy"]["std"]) for row in probes]
    measured += [(row["mean"], row["std"] if row["seeds"] > 1 else None) for row in tasks]
    measured += [(row["mean"], row["std"]) for row in ablations["summary"]]
    measured += [(statistics.mean(row["accuracy"]), statistics.stdev(row["accuracy"])) for row in finetuned]
    assert len(measured) > 90
    for mean, std in measured:
        assert f" {100 * mean:.1f}" + ("" if std is None else f" ± {100 * std:.1f}") in text.replace("*", "")


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    """From the repository root, on a recording of the name that it uses."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    recording = tmp_path / "recording.wav"
    soundfile.write(recording, torch.rand(3 * 44100, generator=torch.Generator().manual_seed(0)).numpy() - 0.5, 44100)
    monkeypatch.chdir(ROOT)
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(code.replace("recording.mp3", str(recording)), {})
    labels, shape = capsys.readouterr().out.strip().splitlines()
    assert labels.count("'label'") == 3
    assert shape == re.search(r"print\(embeddings\.shape\)  # (\([^)]*\))", text)[1]
