"""`asit_hf.loading`: the same weights by the short way as by building the whole checkpoint, and clear errors."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import MEL, build
from transformers.utils import logging as transformers_logging

from asit_hf import ASiTFeatureExtractor, ASiTForAudioClassification, ASiTForPreTraining, ASiTModel
from asit_hf.hub.export import halve_weights
from asit_hf.loading import (
    find_checkpoint,
    load_config,
    load_encoder,
    load_feature_extractor,
    load_model,
    resolve_checkpoint,
)
from asit_hf.predict import load_classifier

# A name that cannot be a Hub repository, and one that can.
MISSING = ["no/such/folder", "./nowhere", "model_cards/nowhere"]


def save_pretraining(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **options) -> Path:
    """A checkpoint whose teacher differs from its student, with its feature extractor."""
    model = build(ASiTForPreTraining, seed=seed)
    for parameter in model.teacher.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder, **options)
    ASiTFeatureExtractor(num_mel_bins=MEL, mean=-3.25).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_pretraining(tmp_path_factory.mktemp("pretraining"))


def encoder_of(folder: Path, encoder: str, **options) -> ASiTModel:
    """By way of the whole pretraining model."""
    model = ASiTForPreTraining.from_pretrained(folder, **options)
    return model.teacher["asit"] if encoder == "teacher" else model.asit


def assert_same_weights(found: ASiTModel, expected: ASiTModel) -> None:
    assert type(found) is ASiTModel
    weights = expected.state_dict()
    assert list(found.state_dict()) == list(weights)
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == weights[name].dtype
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("encoder", ["teacher", "student"])
def test_encoder_equals_that_of_the_whole_model(checkpoint, encoder):
    loaded = load_encoder(checkpoint, encoder)
    assert_same_weights(loaded, encoder_of(checkpoint, encoder))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training
    other = encoder_of(checkpoint, "student" if encoder == "teacher" else "teacher")
    assert not torch.equal(loaded.embeddings.cls_token, other.embeddings.cls_token)


@pytest.mark.parametrize("encoder", ["teacher", "student"])
def test_sharded_weights(tmp_path, encoder):
    save_pretraining(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_weights(load_encoder(tmp_path, encoder), encoder_of(tmp_path, encoder))
    next(iter(tmp_path.glob("model-*.safetensors"))).unlink()
    with pytest.raises(FileNotFoundError, match="no model-"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("encoder", ["teacher", "student"])
def test_dtypes(checkpoint, tmp_path, encoder):
    for dtype in (torch.bfloat16, torch.float16):
        loaded = load_encoder(checkpoint, encoder, dtype=dtype)
        assert loaded.dtype == dtype
        assert_same_weights(loaded, encoder_of(checkpoint, encoder, dtype=dtype))
    save_pretraining(tmp_path / "bf16", dtype=torch.bfloat16)
    assert load_encoder(tmp_path / "bf16", encoder).dtype == torch.bfloat16
    assert_same_weights(load_encoder(tmp_path / "bf16", encoder), encoder_of(tmp_path / "bf16", encoder))
    shutil.copytree(checkpoint, tmp_path / "half")
    halve_weights(tmp_path / "half")
    assert {tensor.dtype for tensor in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.float16}
    assert load_encoder(tmp_path / "half", encoder).dtype == torch.float32
    assert_same_weights(load_encoder(tmp_path / "half", encoder), encoder_of(tmp_path / "half", encoder))


@pytest.mark.parametrize("cls", [ASiTModel, ASiTForAudioClassification])
def test_other_checkpoints_have_one_encoder(tmp_path, cls):
    model = build(cls)
    model.save_pretrained(tmp_path)
    for encoder in ("teacher", "student"):
        assert_same_weights(load_encoder(tmp_path, encoder), getattr(model, "asit", model))


class Records(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def records():
    """What transformers logs; its loggers do not propagate to pytest's."""
    handler, logger, level = Records(), logging.getLogger("transformers"), transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()  # other tests may have changed it
    logger.addHandler(handler)
    yield handler.messages
    logger.removeHandler(handler)
    transformers_logging.set_verbosity(level)


def test_loading_is_quiet(checkpoint, tmp_path, records):
    build(ASiTForAudioClassification).save_pretrained(tmp_path)
    for encoder in ("teacher", "student"):
        load_encoder(checkpoint, encoder)
        load_encoder(tmp_path, encoder)
    assert records == []
    ASiTModel.from_pretrained(tmp_path)  # outside of load_encoder, transformers goes on reporting
    assert "classifier.weight" in records[0]


@pytest.mark.parametrize(("dropped", "encoder"), [("teacher.asit.layers.1.", "teacher"), ("asit.layers.1", "student")])
def test_incomplete_weights(checkpoint, tmp_path, records, dropped, encoder):
    model = ASiTForPreTraining.from_pretrained(checkpoint)
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(dropped)}
    model.save_pretrained(tmp_path, state_dict=weights)
    records.clear()
    with pytest.raises(ValueError, match=rf"{encoder}'s encoder, first layers\.1\."):
        load_encoder(tmp_path, encoder)
    assert records == []


def test_weights_of_another_shape(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "wider")
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "wider" / "config.json").write_text(json.dumps(config | {"num_frames": 192}))
    with pytest.raises(ValueError, match=r"position_embeddings of shape \(1, 25, 48\), got \(1, 13, 48\)"):
        load_encoder(tmp_path / "wider")


@pytest.mark.parametrize(
    "changed",
    [
        *({"num_hidden_layers": 10**9}, {"num_frames": 10**9}, {"intermediate_size": 10**9}, {"dtype": 7}),
        *({"hidden_size": "wide"}, {"num_mel_bins": -16}, {"hidden_size": None}),
    ],
    ids=str,
)
def test_a_damaged_configuration_is_named_before_memory_is_allocated(checkpoint, tmp_path, changed):
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    config = json.loads((checkpoint / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(ValueError, match="damaged"):
        load_encoder(folder)


@pytest.mark.parametrize("content", [b"\xff{}", b'{"num_mel_bins": []}', b'{"sampling_rate": "fast"}', b"[]"])
def test_a_damaged_feature_extractor_is_named(checkpoint, tmp_path, content):
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    (folder / "preprocessor_config.json").write_bytes(content)
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        load_feature_extractor(folder)


def test_an_unknown_encoder(checkpoint):
    with pytest.raises(ValueError, match="teacher, student, got 'average'"):
        load_encoder(checkpoint, "average")


def test_another_model_type(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="'asit', got 'vit'"):
        load_config(tmp_path)


def test_a_run_folder_means_its_last_complete_checkpoint(tmp_path, caplog):
    for seed, step in enumerate((9, 20, 30)):
        save_pretraining(tmp_path / f"checkpoint-{step}", seed=seed)
        (tmp_path / f"checkpoint-{step}" / "preprocessor_config.json").unlink()
    weights = tmp_path / "checkpoint-30" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-20"
    assert "checkpoint-30" in caplog.text
    assert_same_weights(load_encoder(tmp_path), encoder_of(tmp_path / "checkpoint-20", "teacher"))
    assert load_config(tmp_path).num_mel_bins == MEL
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json in .*checkpoint-20 or "):
        load_feature_extractor(tmp_path)
    ASiTFeatureExtractor(num_mel_bins=MEL, mean=-1.0).save_pretrained(tmp_path)
    assert load_feature_extractor(tmp_path).mean == -1.0
    ASiTFeatureExtractor(num_mel_bins=MEL, mean=-2.0).save_pretrained(tmp_path / "checkpoint-20")
    assert load_feature_extractor(tmp_path).mean == -2.0
    assert load_feature_extractor(tmp_path, std=2.0).std == 2.0


@pytest.mark.parametrize("load", [load_encoder, load_config, load_feature_extractor, load_classifier])
@pytest.mark.parametrize("name", MISSING)
def test_a_path_that_does_not_exist(tmp_path, monkeypatch, load, name):
    """Transformers alone would speak of repository names or of the connection."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=f"no such folder: {name}, and .*Hub"):
        load(name)


def test_a_file_is_not_a_checkpoint(tmp_path):
    (tmp_path / "official.pth").touch()
    with pytest.raises(ValueError, match=r"official\.pth.*convert_original"):
        resolve_checkpoint(tmp_path / "official.pth")


def test_a_classifier_without_its_classifier_is_refused(tmp_path):
    model = build(ASiTForAudioClassification)
    model.save_pretrained(tmp_path, state_dict=model.asit.state_dict(prefix="asit."))
    ASiTFeatureExtractor(num_mel_bins=MEL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="classifier"):
        load_model(tmp_path)
    assert type(load_encoder(tmp_path)) is ASiTModel
