"""Tests, options and fields named in the pretraining README exist."""

import re
from pathlib import Path

from transformers import HfArgumentParser

from asit_hf import ASiTConfig, ASiTFeatureExtractor
from examples import run_pretraining

ROOT = Path(__file__).parents[2]
README = (ROOT / "asit_hf" / "pretraining" / "README.md").read_text()


def test_tests_exist():
    names = set(re.findall(r"::(test_\w+)", README))
    assert len(names) > 20
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name in names if f"def {name}(" not in tests]
    files = {f"tests/{name}" for name in re.findall(r"`((?:\w+/)?test_\w+\.py)", README)}
    assert not [name for name in files if not (ROOT / name).is_file()]


def test_options_exist():
    parser = HfArgumentParser(
        (run_pretraining.ModelArguments, run_pretraining.DataArguments, run_pretraining.ASiTPreTrainingArguments)
    )
    known = {option for action in parser._actions for option in action.option_strings}
    known |= {"--recipe", "--checkpoint", "--pretraining", "--kills", "--help", "--position_grid"}  # other scripts
    options = set(re.findall(r"`(--\w+)", README))
    assert len(options) > 25
    assert options <= known


def test_fields_exist():
    table = README[README.index("| item |") : README.index("## Alternatives")]
    cells = [line.split("|")[4] for line in table.splitlines() if line.startswith("|")]
    fields = {field for cell in cells for field in re.findall(r"`([a-z]\w+)`", cell)}
    assert len(fields) > 8
    assert not [field for field in fields if field not in ASiTConfig().to_dict() | ASiTFeatureExtractor().to_dict()]
