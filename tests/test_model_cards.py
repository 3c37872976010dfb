"""The folders of model_cards/: each is a Hub repository that loads as it is."""

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
from asit_hf.cards import write_model_card
from asit_hf.configuration_asit import HUB_FILES

FOLDERS = sorted(path.parent for path in (Path(__file__).parents[1] / "model_cards").glob("*/config.json"))
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


@pytest.mark.real_audio
@pytest.mark.parametrize("folder", CLASSIFIERS, ids=lambda folder: folder.name)
def test_the_classifier_names_sounds_it_never_heard(folder, real_audio):
    """Fold 4 of ESC-50 was in no training; the card's accuracy is of all of it, chance is 2 %."""
    rows = (real_audio / "esc50-16k" / "esc50.csv").read_text().splitlines()
    columns = rows[0].split(",")
    clips = [dict(zip(columns, row.split(","))) for row in rows[1:]]
    clips = [clip for clip in clips if clip["fold"] == "4"][::8]
    classifier = pipeline("audio-classification", model=str(folder))
    paths = [str(real_audio / "esc50-16k" / "audio" / clip["filename"]) for clip in clips]
    found = [labels[0]["label"] for labels in classifier(paths, top_k=1)]
    right = sum(label == clip["category"] for label, clip in zip(found, clips)) / len(clips)
    said = next(one.metric_value for one in ModelCard.load(folder / "README.md").data.eval_results)
    assert abs(right - said) < 0.2, (right, said)
