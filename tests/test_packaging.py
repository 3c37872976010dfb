import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from inspect import getdoc, signature
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from tiny import MEL, build

import asit_hf
import asit_hf.data
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

# accelerate is missing because transformers imports it wherever it is installed
FIRST_LABELS = """
import json, sys

EVENTS, connections = ("socket.connect", "socket.getaddrinfo"), []
sys.addaudithook(lambda event, _: event in EVENTS and connections.append(event))
sys.modules["accelerate"] = None
import asit_hf, asit_hf.data
from asit_hf.predict import main
from transformers import pipeline

print(len(pipeline("audio-classification", model=sys.argv[1])(sys.argv[2])), "labels")
main(sys.argv[1:])
unneeded = ["av", "datasets", "evaluate", "matplotlib", "pandas", "pyarrow", "sklearn", "tensorboard"]
unneeded += ["transformers.trainer", *(f"asit_hf.{room}" for room in ("evaluation", "finetuning", "hub", "plotting"))]
unneeded += ["asit_hf.pretraining.arguments", "asit_hf.pretraining.trainer"]
imported = [name for name in sys.modules if f"{name}.".startswith(tuple(f"{one}." for one in unneeded))]
from asit_hf import *
print(json.dumps({"connections": connections, "imported": imported}))
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


@pytest.mark.parametrize("package", [asit_hf, asit_hf.data], ids=lambda package: package.__name__)
def test_every_exported_name_exists(package):
    assert {*package.__all__} <= {*dir(package)}
    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        package.no_such_name  # noqa: B018


@pytest.mark.slow
def test_inference_imports_only_what_it_needs(tmp_path):
    """The first label of a local model needs no extra, no module of training and no connection."""
    build(ASiTForAudioClassification).save_pretrained(tmp_path / "model")
    ASiTFeatureExtractor(num_mel_bins=MEL).save_pretrained(tmp_path / "model")
    wav = tmp_path / "clip.wav"
    soundfile.write(wav, np.random.default_rng(0).normal(0, 0.1, 22050), 22050)
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", FIRST_LABELS, tmp_path / "model", wav],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, *rows, last = done.stdout.splitlines()
    assert first == "5 labels"
    assert len(rows) == 1 + 5  # a header, and the labels of `predict`
    assert json.loads(last) == {"connections": [], "imported": []}


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
