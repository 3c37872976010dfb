"""The folders of model_cards/: each loads by its path, and as a Hub repository once it is uploaded."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from loopback_hub import run
from safetensors import safe_open
from transformers import AutoFeatureExtractor, AutoModel, pipeline

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTModel
from asit_hf.configuration_asit import HUB_FILES, sentence_transformers_files
from asit_hf.hub.cards import write_model_card

ROOT = Path(__file__).parents[2] / "model_cards"
FOLDERS = sorted(path.parent for path in ROOT.glob("*/config.json"))
CLASSIFIERS = [
    folder
    for folder in FOLDERS
    if json.loads((folder / "config.json").read_text())["architectures"] == ["ASiTForAudioClassification"]
]
LARGEST = 16e6  # bytes of a weight file
# The classes of ESC-50 in the official order: the last number of a clip's name is the index of its class.
ESC50 = """\
dog rooster pig cow frog cat hen insects sheep crow rain sea_waves crackling_fire crickets chirping_birds water_drops
wind pouring_water toilet_flush thunderstorm crying_baby sneezing clapping breathing coughing footsteps laughing
brushing_teeth snoring drinking_sipping door_wood_knock mouse_click keyboard_typing door_wood_creaks can_opening
washing_machine vacuum_cleaner clock_alarm clock_tick glass_breaking helicopter chainsaw siren car_horn engine train
church_bells airplane fireworks hand_saw
"""


def test_the_template_is_what_the_code_writes(tmp_path):
    folder = tmp_path / "template"
    ASiTConfig(architectures=["ASiTModel"]).save_pretrained(folder)
    ASiTFeatureExtractor().save_pretrained(folder)
    assert (ROOT / "template" / "README.md").read_text() == write_model_card(folder).read_text()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_card_is_what_the_code_writes(folder, tmp_path):
    copy = tmp_path / folder.name
    copy.mkdir()
    for name in ("config.json", "preprocessor_config.json", "run.json"):
        shutil.copy(folder / name, copy)
    assert (folder / "README.md").read_text() == write_model_card(copy).read_text()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_checkpoint_loads_by_its_path(folder):
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}  # noqa: SIM118
        assert file.stat().st_size <= LARGEST
    assert not list(folder.glob("*.py"))
    for name, content in sentence_transformers_files(["ASiTModel"]).items():
        assert (folder / name).read_text() == content
    extractor, model = AutoFeatureExtractor.from_pretrained(folder), AutoModel.from_pretrained(folder)
    assert type(extractor) is ASiTFeatureExtractor
    assert type(model) is ASiTModel
    assert model.dtype == torch.float32
    inputs = extractor(torch.randn(16000).numpy(), sampling_rate=16000, return_tensors="pt")
    pooled = model.eval()(**inputs).pooler_output
    assert pooled.isfinite().all()
    if folder not in CLASSIFIERS:
        assert f"# ({pooled.shape[0]}, {pooled.shape[1]}), the clip's embedding" in (folder / "README.md").read_text()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_card_is_complete_and_names_no_local_path(folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.license
    assert card.data.library_name == "transformers"
    assert card.data.model_name == folder.name
    assert card.data.eval_results, "no result was recorded"
    assert "nknown" not in card.text
    assert not re.search(r"(?<![\w.])/(root|home|tmp|work|mnt)/", (folder / "README.md").read_text())
    assert not re.search(r'"/(root|home|tmp|work|mnt)/', json.dumps([p.read_text() for p in folder.glob("*.json")]))


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_an_uploaded_checkpoint_runs_its_card_without_the_package(hub, folder, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    upload = "import sys\nfrom asit_hf.hub.upload import upload_model\nupload_model(*sys.argv[1:])"
    run(upload, hub, tmp_path, str(folder), f"me/{folder.name}")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert {*HUB_FILES, *before} <= set(hub.repositories[f"me/{folder.name}"])
    card = hub.repositories[f"me/{folder.name}"]["README.md"].decode()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert f'"me/{folder.name}"' in code
    out = run(code, hub, tmp_path, package=False)
    dim = 2 * json.loads((folder / "config.json").read_text())["hidden_size"]
    assert "'label'" in out if folder in CLASSIFIERS else f"torch.Size([1, {dim}])" in out


@pytest.fixture(params=CLASSIFIERS, ids=lambda folder: folder.name)
def predictions(request):
    """A classifier's folder, and its predictions for ESC-50 fold 4, which was held out."""
    with (request.param / "predictions_fold4.csv").open(newline="") as file:
        return request.param, list(csv.DictReader(file))


def test_the_results_of_a_card_are_those_of_its_predictions(predictions):
    folder, clips = predictions
    right = [clip["label"] == ESC50.split()[int(Path(clip["file"]).stem.split("-")[-1])] for clip in clips]
    assert len(clips) == 400
    assert {clip["file"].split("-")[0] for clip in clips} == {"4"}
    scores = np.array([float(clip["score"]) for clip in clips])
    bins = np.minimum((scores * 15).astype(int), 14)
    calibration_error = np.abs(np.bincount(bins, right - scores)).sum() / len(clips)
    results = ModelCard.load(folder / "README.md").data.eval_results
    assert {one.metric_type: one.metric_value for one in results} == {
        "accuracy": np.mean(right),
        "expected calibration error": pytest.approx(calibration_error, abs=5e-5),
    }


@pytest.mark.real_audio
def test_a_classifier_reproduces_its_predictions(predictions, real_audio):
    folder, clips = predictions
    clips = clips[::8]
    classifier = pipeline("audio-classification", model=str(folder))
    found = classifier([real_audio / "esc50-16k" / "audio" / clip["file"] for clip in clips], top_k=1)
    differing = [clip["file"] for clip, (top,) in zip(clips, found) if top["label"] != clip["label"]]
    assert len(differing) <= 1, differing  # one may be a tie, which another processor rounds the other way
