"""The folders of model_cards/: each is a Hub repository that loads as it is."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoFeatureExtractor, AutoModel, pipeline

import asit_hf
from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTModel
from asit_hf.configuration_asit import HUB_FILES
from asit_hf.hub.cards import write_model_card

FOLDERS = sorted(path.parent for path in (Path(__file__).parents[2] / "model_cards").glob("*/config.json"))
CLASSIFIERS = [
    folder
    for folder in FOLDERS
    if json.loads((folder / "config.json").read_text())["architectures"] == ["ASiTForAudioClassification"]
]
LARGEST = 12e6


def test_the_template_is_what_the_code_writes(tmp_path):
    folder = tmp_path / "template"
    ASiTConfig(architectures=["ASiTModel"]).save_pretrained(folder)
    ASiTFeatureExtractor().save_pretrained(folder)
    written = write_model_card(folder).read_text()
    assert (FOLDERS[0].parent / "template" / "README.md").read_text() == written


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_checkpoint_is_a_whole_repository(folder):
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}  # noqa: SIM118
    assert (folder / "model.safetensors").stat().st_size <= LARGEST
    package = Path(asit_hf.__file__).parent
    for name in HUB_FILES:
        assert (folder / name).read_text() == (package / name).read_text(), f"{name} is of another version"
    extractor, model = AutoFeatureExtractor.from_pretrained(folder), AutoModel.from_pretrained(folder)
    assert isinstance(model, ASiTModel)
    assert model.dtype == torch.float32
    inputs = extractor(torch.randn(16000).numpy(), sampling_rate=16000, return_tensors="pt")
    assert model.eval()(**inputs).pooler_output.isfinite().all()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_its_card_says_what_one_must_know(folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.license
    assert card.data.library_name == "transformers"
    assert card.data.model_name == folder.name
    assert card.data.eval_results, "no result was recorded"
    assert "nknown" not in card.text
    assert not re.search(r"(?<![\w.])/(root|home|tmp|work|mnt)/", (folder / "README.md").read_text())
    assert not re.search(r'"/(root|home|tmp|work|mnt)/', json.dumps([p.read_text() for p in folder.glob("*.json")]))


@pytest.fixture(params=CLASSIFIERS, ids=lambda folder: folder.name)
def predictions(request):
    """A classifier's folder, and what it says of every clip of ESC-50's fold 4, which was in no training."""
    with (request.param / "predictions_fold4.csv").open(newline="") as file:
        return request.param, list(csv.DictReader(file))


def test_the_accuracy_of_a_card_is_that_of_its_predictions(predictions):
    folder, clips = predictions
    right = sum(clip["predicted"] == clip["label"] for clip in clips) / len(clips)
    assert len(clips) == 400
    assert [one.metric_value for one in ModelCard.load(folder / "README.md").data.eval_results] == [right]


@pytest.mark.real_audio
def test_a_classifier_predicts_what_its_folder_says(predictions, real_audio):
    folder, clips = predictions
    clips = clips[::8]
    classifier = pipeline("audio-classification", model=str(folder))
    found = classifier([real_audio / "esc50-16k" / "audio" / clip["file"] for clip in clips], top_k=1)
    differing = [clip["file"] for clip, (top,) in zip(clips, found) if top["label"] != clip["predicted"]]
    assert len(differing) <= 1, differing  # one may be a tie, which another processor rounds the other way
