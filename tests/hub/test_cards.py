import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import soundfile
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import httpx, validate_repo_id
from tiny import MEL, build
from transformers import TrainingArguments
from transformers.pipelines import SUPPORTED_TASKS

from asit_hf import (
    ASiTConfig,
    ASiTFeatureExtractor,
    ASiTForAudioClassification,
    ASiTForAudioFrameClassification,
    ASiTForPreTraining,
    ASiTModel,
)
from asit_hf.finetuning.trainer import FinetuningArguments, FinetuningTrainer
from asit_hf.hub.cards import CardArguments, describe_run, write_model_card
from asit_hf.hub.export import export_model
from asit_hf.hub.run_record import read_run, record_run

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


def test_a_card_reports_data_recipe_and_results_of_a_run(trainer, sounds, tmp_path):
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
        "| optimizer steps | 1 |",
        "| batch size | 2 |",
        "python examples/run.py --train_data train.csv --max_steps 1",
        "| audio-classification | ESC-50 | accuracy | 0.5 |",
        f"torch {torch.__version__}",
    ):
        assert text in card.text, text
    assert str(tmp_path) not in card.content + (folder / "run.json").read_text()


@pytest.mark.parametrize(
    ("argument", "recorded"),
    [
        ("--max_steps=1", "--max_steps=1"),
        ("/home/me/my data/a=b.csv", "a=b.csv"),
        ("--train_data=/home/me/train.csv", "--train_data=train.csv"),
        (
            '{"source": "/home/me/a.csv", "filter": ["fold=1"], "n": 2}',
            '{"source": "a.csv", "filter": ["fold=1"], "n": 2}',
        ),
        ('[{"source": "/home/me/clips/", "root": "data/b"}]', '[{"source": "clips", "root": "data/b"}]'),
        ("zip://*.wav::/home/me/a.zip", "zip://*.wav::a.zip"),
        ("https://host/a/b.csv", "https://host/a/b.csv"),
        ("{no json", "{no json"),
        (os.fsdecode(b"/home/me/caf\xe9"), "file:caf%E9"),
    ],
)
def test_local_folders_are_cut_from_recorded_commands(tmp_path, argument, recorded):
    record_run(tmp_path, ["run.py", argument], {}, seconds=1.0)
    assert shlex.split(read_run(tmp_path)["recipe"]["command"].strip("`")) == ["python", "run.py", recorded]


@pytest.mark.parametrize("token", [["--hub_token", "hf_1"], ["--hub-token=hf_1"], ["--hub_tok", "hf_1"]])
def test_tokens_are_not_recorded(tmp_path, token):
    record_run(tmp_path, ["run.py", "--hub_model_id", "me/a", *token, "--seed", "1"], {}, seconds=1.0)
    assert read_run(tmp_path)["recipe"]["command"] == "`python run.py --hub_model_id me/a --seed 1`"


def test_hours_count_readable_clips(trainer, sounds):
    """Both for paths and for rows of a data set."""
    for sources in (sounds, [{"audio": {"path": path}} for path in sounds]):
        describe_run(trainer, ["run.py"], CardArguments(), sources * 100)
        assert "300 clips, 0.50 hours" in read_run(trainer.args.output_dir)["training_data"]


@pytest.mark.parametrize("run", ["", "null", "{}", '{"recipe": null, "results": null, "training_data": null}'])
def test_an_empty_record_is_none(trainer, tmp_path, run):
    (tmp_path / "run" / "run.json").write_text(run)
    write_model_card(tmp_path / "run", results=None)
    text = (tmp_path / "run" / "README.md").read_text()
    assert text.count("Unknown: it was not recorded.") == 2
    assert "None recorded." in text


class HubChecks:
    """Answers `validate-yaml` by the rules for a card's metadata in the Hub's documentation."""

    def post(self, url: str, json: dict, **kwargs) -> httpx.Response:
        assert url.endswith("/api/validate-yaml")
        errors = self.errors(yaml.safe_load(json["content"].split("---\n")[1]))
        return httpx.Response(400 if errors else 200, text="\n".join(errors), request=httpx.Request("POST", url))

    def errors(self, data: dict) -> list[str]:
        emissions = data.get("co2_eq_emissions", {"emissions": 0.0, "training_type": "fine-tuning"})
        results = [result for model in data.get("model-index", ()) for result in model["results"]]
        metrics = [metric for result in results for metric in result["metrics"]]
        for name in [*data.get("datasets", ()), data.get("base_model", "someone/model")]:
            validate_repo_id(name)
        checks = {
            "library": data.get("library_name") == "transformers",
            "task": data.get("pipeline_tag") in SUPPORTED_TASKS,
            "license": re.fullmatch(r"[a-z0-9.-]+", data.get("license", "none")),
            "emissions": isinstance(emissions["emissions"], (int, float)),
            "training": emissions["training_type"] in ("pre-training", "fine-tuning"),
            "widget": all({"src", "example_title"} == set(one) for one in data.get("widget", ())),
            "tags": all(isinstance(tag, str) for tag in data["tags"]),
            "results": all(
                one["task"]["type"] and one["dataset"]["type"] and one["dataset"]["name"] for one in results
            ),
            "metrics": all(metric["type"] and math.isfinite(metric["value"]) for metric in metrics),
        }
        return [f"wrong {name}: {data}" for name, passed in checks.items() if not passed]


@pytest.mark.parametrize("known", [False, True], ids=["nothing known", "all known"])
@pytest.mark.parametrize(
    ("cls", "task", "training"),
    [
        (ASiTModel, "feature-extraction", "pre-training"),
        (ASiTForPreTraining, "feature-extraction", "pre-training"),
        (ASiTForAudioClassification, "audio-classification", "fine-tuning"),
        (ASiTForAudioFrameClassification, "audio-classification", "fine-tuning"),
    ],
)
def test_cards_of_all_checkpoints_pass_the_hubs_checks(tmp_path, monkeypatch, cls, task, training, known):
    build(cls).save_pretrained(tmp_path)
    ASiTFeatureExtractor(num_mel_bins=MEL).save_pretrained(tmp_path)
    facts = {}
    if known:
        results = [("ESC-50", "accuracy", 0.5), ("two: words", "mAP", math.nan), ("ESC-50", "loss", 1)]
        record_run(tmp_path, ["run.py"], {"seed": 1}, 60.0, clips=3, hours=0.5, sampling_rate=16000, results=results)
        facts = {"license": "cc-by-4.0", "datasets": ["ashraq/esc50"], "emissions": 3.5, "base_model": "me/asit"}
        facts |= {"widget": [{"example_title": "A dog: barks", "src": "dog.flac"}], "name": "me/model"}
    card = ModelCard.load(write_model_card(tmp_path, **facts))

    monkeypatch.setattr(huggingface_hub.repocard, "get_session", HubChecks)
    card.validate()
    assert metadata_load(tmp_path / "README.md") == card.data.to_dict()
    assert card.data.pipeline_tag == task
    if known:
        assert card.data.co2_eq_emissions == {"emissions": 3.5, "training_type": training}
        _, parsed = model_index_to_eval_results(card.data.to_dict()["model-index"])
        assert [(one.dataset_name, one.metric_type, one.metric_value) for one in parsed] == [
            ("ESC-50", "accuracy", 0.5),
            ("ESC-50", "loss", 1),
        ]


def test_two_rows_of_one_metric_have_their_own_names(tmp_path):
    build(ASiTModel).save_pretrained(tmp_path)
    ASiTFeatureExtractor(num_mel_bins=MEL).save_pretrained(tmp_path)
    row = {"task": "audio-classification", "dataset": "ESC-50", "metric": "accuracy", "command": "probe"}
    rows = [{**row, "value": 0.5, "metric_name": "accuracy, linear probe"}, {**row, "value": 0.25}]
    card = ModelCard.load(write_model_card(tmp_path, name="me/model", results=rows))
    assert [(one.metric_type, one.metric_name, one.metric_value) for one in card.data.eval_results] == [
        ("accuracy", "accuracy, linear probe", 0.5),
        ("accuracy", None, 0.25),
    ]
    assert "| ESC-50 | accuracy, linear probe | 0.5 | probe |" in card.text
    assert "| ESC-50 | accuracy | 0.25 | probe |" in card.text


def test_arguments_override_the_record(trainer, tmp_path):
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


def test_an_existing_card_stays_when_a_trainer_pushes(trainer, tmp_path):
    path = tmp_path / "run" / "README.md"
    trainer.create_model_card(model_name="dogs")
    assert "# dogs" in path.read_text()
    assert "someone/dogs" in path.read_text()
    path.write_text("mine")
    trainer.create_model_card(model_name="dogs")
    assert path.read_text() == "mine"


def test_example_sounds(trainer, tmp_path):
    widget = [{"example_title": "A dog", "src": "dog.flac"}]
    write_model_card(tmp_path / "run", widget=widget)
    assert ModelCard.load(tmp_path / "run" / "README.md").data.widget == widget
    describe_run(trainer, ["run.py"], CardArguments(card_widget=["https://host/a/dog.flac", "rain.wav"]))
    assert ModelCard.load(tmp_path / "run" / "README.md").data.widget == [
        {"example_title": "dog", "src": "https://host/a/dog.flac"},
        {"example_title": "rain", "src": "rain.wav"},
    ]


def test_only_a_base_model_on_the_hub_is_named(trainer, tmp_path):
    for base_model, named in (("someone/encoder", "someone/encoder"), (str(tmp_path), None), (None, None)):
        describe_run(trainer, ["run.py"], CardArguments(), base_model=base_model)
        assert ModelCard.load(tmp_path / "run" / "README.md").data.base_model == named


def test_card_options_are_arguments_of_write_model_card():
    assert set(CardArguments().facts()) <= set(write_model_card.__kwdefaults__)
    assert json.dumps(CardArguments().facts())
    assert not set(vars(CardArguments())) & set(vars(TrainingArguments(output_dir="x")))


SECTIONS = ["Model description", "Usage", "Training data", "Training recipe", "Measured results", "Limitations"]


def load_card(folder: Path) -> ModelCard:
    card = ModelCard.load(folder / "README.md")
    assert isinstance(card.data, ModelCardData)
    assert re.findall(r"^## (.+)$", card.text, re.MULTILINE) == SECTIONS
    return card


def save(cls, folder: Path, **kwargs) -> Path:
    build(cls, **kwargs).save_pretrained(folder)
    ASiTFeatureExtractor(num_mel_bins=MEL, sampling_rate=8000).save_pretrained(folder)
    return folder


def save_classifier(folder: Path) -> Path:
    return save(ASiTForAudioClassification, folder, num_labels=2, id2label={0: "dog", 1: "rain"})


def test_card_of_an_encoder(tmp_path):
    card = load_card(export_model(save(ASiTForPreTraining, tmp_path / "run"), tmp_path / "encoder"))
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "feature-extraction"
    assert {"asit", "audio", "self-supervised-learning"} <= set(card.data.tags)
    assert "license" not in card.data.to_dict()
    assert "8000 Hz" in card.text
    assert "license of the weights is unknown" in card.text
    assert "| encoder | teacher |" in card.text


def test_card_of_a_classifier(tmp_path):
    folder = save_classifier(tmp_path / "classifier")
    result = {"task": "events", "dataset": "ESC-50", "metric": "accuracy", "value": 0.5, "command": "python run.py"}
    path = write_model_card(
        folder,
        name="someone/asit: dogs & rain",
        license="cc-by-4.0",
        datasets=["ashraq/esc50"],
        training_data="Two hours of dogs.",
        recipe={"learning rate": 5e-4, "mask": "a|b"},
        results=[result],
        limitations="It fails on cats.",
        base_model="someone/asit-tiny",
    )
    assert path == folder / "README.md"
    card = load_card(folder)
    assert card.data.pipeline_tag == "audio-classification"
    assert card.data.license == "cc-by-4.0"
    assert card.data.datasets == ["ashraq/esc50"]
    assert card.data.base_model == "someone/asit-tiny"
    for text in ("Labels: dog, rain.", "Two hours of dogs.", "| learning rate | 0.0005 |", "| mask | a\\|b |"):
        assert text in card.text
    assert "| events | ESC-50 | accuracy | 0.5 | python run.py |" in card.text
    assert "It fails on cats." in card.text
    assert "nknown" not in card.text


def test_card_states_what_is_unknown(tmp_path):
    write_model_card(save_classifier(tmp_path / "classifier"))
    text = load_card(tmp_path / "classifier").text
    assert text.count("Unknown: it was not recorded.") == 2
    assert "None recorded." in text


def test_card_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        write_model_card(tmp_path)
    folder = save_classifier(tmp_path / "classifier")
    with pytest.raises(ValueError, match=r"command.*got \['task'\]"):
        write_model_card(folder, results=[{"task": "events"}])
    with pytest.raises(TypeError, match="hours"):
        write_model_card(folder, hours=3)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no preprocessor_config\.json"):
        write_model_card(folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="'bert'"):
        write_model_card(folder)


@pytest.mark.slow
def test_the_cards_code_runs_without_the_package(tmp_path):
    write_model_card(save(ASiTModel, tmp_path / "encoder"))
    write_model_card(save_classifier(tmp_path / "classifier"))
    code = 'import sys\nsys.modules["asit_hf"] = None\n'
    for folder in ("encoder", "classifier"):
        code += "".join(re.findall(r"```python\n(.*?)```", (tmp_path / folder / "README.md").read_text(), re.DOTALL))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pooled, tokens, labels = done.stdout.splitlines()
    assert pooled == "torch.Size([1, 48])"
    assert re.fullmatch(r"torch.Size\(\[1, \d+, 48\]\)", tokens)
    assert {"dog", "rain"} == set(re.findall(r"'label': '(\w+)'", labels))
