import re
import shutil
import subprocess
import sys
import zipfile
from inspect import getdoc, signature
from pathlib import Path

import pytest
import yaml

import asit_hf
from asit_hf import (
    ASiTConfig,
    ASiTFeatureExtractor,
    ASiTForAudioClassification,
    ASiTForAudioFrameClassification,
    ASiTForPreTraining,
    ASiTModel,
)

ROOT = Path(__file__).parents[1]

FIVE_LINES = """
import sys
import numpy as np
import asit_hf
from transformers import pipeline

assert asit_hf.__file__.startswith(sys.argv[1]), asit_hf.__file__
config = asit_hf.ASiTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
asit_hf.ASiTForAudioClassification(config).save_pretrained("classifier")
asit_hf.ASiTFeatureExtractor().save_pretrained("classifier")
classifier = pipeline("audio-classification", model="classifier")
print(len(classifier(np.zeros(16000, np.float32))))
import asit_hf.pretraining.trainer, asit_hf.finetuning.trainer, asit_hf.predict
import asit_hf.evaluation.hear, asit_hf.evaluation.mteb, asit_hf.evaluation.xares
"""


@pytest.mark.parametrize(
    ("documented", "names"),
    [
        (ASiTConfig, [name for name in vars(ASiTConfig)["__annotations__"] if name != "model_type"]),
        (ASiTFeatureExtractor, signature(ASiTFeatureExtractor).parameters),
        (ASiTFeatureExtractor.__call__, signature(ASiTFeatureExtractor.__call__).parameters),
        (ASiTModel, signature(ASiTModel).parameters),
        (ASiTModel.forward, signature(ASiTModel.forward).parameters),
        (ASiTForAudioClassification, signature(ASiTForAudioClassification).parameters),
        (ASiTForAudioClassification.forward, signature(ASiTForAudioClassification.forward).parameters),
        (ASiTForAudioFrameClassification, signature(ASiTForAudioFrameClassification).parameters),
        (ASiTForAudioFrameClassification.forward, signature(ASiTForAudioFrameClassification.forward).parameters),
        (ASiTForPreTraining.forward, signature(ASiTForPreTraining.forward).parameters),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_every_argument_is_documented(documented, names):
    described = getdoc(documented).partition("Args:")[2]
    missing = [
        name for name in set(names) - {"self", "kwargs"} if not re.search(rf"^\s+{name}[ :(]", described, re.MULTILINE)
    ]
    assert len(names) > 0
    assert not missing


@pytest.mark.slow
def test_import_needs_no_extras():
    """Neither `import asit_hf` nor `import *` imports what only training needs."""
    code = "import sys; sys.modules['accelerate'] = None\nfrom asit_hf import *\nprint(ASiTModel, load_encoder)\n"
    code += "print(sorted({'datasets', 'sklearn', 'evaluate', 'matplotlib'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_readme_names_the_supported_versions():
    oldest = re.search(r'"transformers>=([\d.]+),', (ROOT / "pyproject.toml").read_text())[1]
    newest, torch_version = (
        re.search(rf"^{name}==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
        for name in ("transformers", "torch")
    )
    readme = (ROOT / "README.md").read_text()
    assert re.search(rf"transformers {re.escape(oldest)}\b.* to {re.escape(newest)}\b", readme)
    assert re.search(rf"torch {re.escape(torch_version)}\b", readme)


def test_the_citation_file_has_the_version_of_the_package():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == asit_hf.__version__


@pytest.mark.slow
def test_the_wheel_is_complete(tmp_path):
    """A wheel built from a copy of the sources, unpacked, and used without them."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    sources = tmp_path / "sources"
    shutil.copytree(ROOT / "asit_hf", sources / "asit_hf", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, sources)
    for name in ("tests", "examples", "model_cards"):  # not part of the wheel
        (sources / name).mkdir()
        (sources / name / "__init__.py").touch()
    built = subprocess.run([*command, "--wheel-dir", tmp_path, sources], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob(f"asit_hf-{asit_hf.__version__}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        folders = {name.split("/")[0] for name in archive.namelist()}
        assert folders == {"asit_hf", f"{wheel.stem.split('-py')[0]}.dist-info"}
        archive.extractall(tmp_path / "installed")
    assert (tmp_path / "installed" / "asit_hf" / "py.typed").is_file()
    installed = str(tmp_path / "installed")
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {installed!r})\n{FIVE_LINES}", installed],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2"
