import json
import math

import pytest
import soundfile
import torch
from huggingface_hub import ModelCard
from transformers import TrainingArguments

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForAudioClassification
from asit_hf.cards import CardArguments, describe_run, read_run, record_run, write_model_card
from asit_hf.finetuning.trainer import FinetuningArguments, FinetuningTrainer

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture
def trainer(tmp_path) -> FinetuningTrainer:
    torch.manual_seed(0)
    model = ASiTForAudioClassification(ASiTConfig(**SMALL, num_mel_bins=32, num_frames=96, num_labels=2))
    args = FinetuningArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=1,
        per_device_train_batch_size=2,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        report_to="none",
        use_cpu=True,
        hub_model_id="someone/dogs",
    )
    data = [{"input_values": torch.randn(96, 32), "labels": index % 2} for index in range(4)]
    trainer = FinetuningTrainer(
        model=model, args=args, train_dataset=data, processing_class=ASiTFeatureExtractor(num_mel_bins=32)
    )
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.fixture
def sounds(tmp_path) -> list[str]:
    paths = [str(tmp_path / f"{index}.wav") for index in range(3)]
    for path in paths[:2]:
        soundfile.write(path, torch.zeros(16000 * 9).numpy(), 16000)
    (tmp_path / "2.wav").write_bytes(b"not a sound")
    return paths


def test_a_run_tells_its_data_recipe_and_results(trainer, sounds, tmp_path):
    card = CardArguments(card_license="cc-by-4.0", card_datasets=["ashraq/esc50"], card_emissions=12.5)
    command = ["examples/run.py", "--train_data", f"{tmp_path}/private/train.csv", "--max_steps", "1"]
    describe_run(trainer, command, card, sounds, [("ESC-50", "accuracy", 0.5), ("ESC-50", "mAP", math.nan)])
    folder = tmp_path / "run"
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert card.data.datasets == ["ashraq/esc50"]
    assert card.data.co2_eq_emissions["emissions"] == 12.5
    assert [(one.dataset_name, one.metric_type, one.metric_value) for one in card.data.eval_results] == [
        ("ESC-50", "accuracy", 0.5)  # a metadata of NaN would not be valid
    ]
    for text in (
        "3 clips, 0.01 hours, at 16000 Hz.",  # the clip that cannot be read counts no time
        "| optimiser steps | 1 |",
        "| clips a step | 2 |",
        "python examples/run.py --train_data train.csv --max_steps 1",
        "| audio-classification | ESC-50 | accuracy | 0.5 |",
        f"torch {torch.__version__}",
    ):
        assert text in card.text, text
    assert str(tmp_path) not in card.content + (folder / "run.json").read_text()


def test_what_is_given_goes_before_what_was_recorded(trainer, tmp_path):
    folder = tmp_path / "run"
    record_run(folder, ["train.py"], {"learning rate": 0.1, "seed": 3}, seconds=90.0)
    assert read_run(folder)["recipe"]["duration"] == "1.5 minutes"
    write_model_card(folder, training_data="Two hours of dogs.", recipe={"learning rate": 0.2})
    text = (folder / "README.md").read_text()
    assert "Two hours of dogs." in text
    assert "a stream of clips" not in text
    assert "| learning rate | 0.2 |" in text
    assert "| seed | 3 |" in text
    assert read_run(tmp_path) == {}


def test_a_card_that_is_there_stays_when_a_trainer_pushes(trainer, tmp_path):
    path = tmp_path / "run" / "README.md"
    trainer.create_model_card(model_name="dogs")
    assert "# dogs" in path.read_text()
    assert "someone/dogs" in path.read_text()
    path.write_text("mine")
    trainer.create_model_card(model_name="dogs")
    assert path.read_text() == "mine"


def test_sounds_for_the_page(trainer, tmp_path):
    widget = [{"example_title": "A dog", "src": "dog.flac"}]
    write_model_card(tmp_path / "run", widget=widget)
    assert ModelCard.load(tmp_path / "run" / "README.md").data.widget == widget


def test_options_are_arguments_of_the_card():
    assert set(CardArguments().facts()) <= set(write_model_card.__kwdefaults__)
    assert json.dumps(CardArguments().facts())
    assert not set(vars(CardArguments())) & set(vars(TrainingArguments(output_dir="x")))
