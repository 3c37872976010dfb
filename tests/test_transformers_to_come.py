"""
Versions of Transformers to come: SequenceFeatureExtractor becomes an audio processor, whose `pad` takes waveforms, or
is removed, and functions of audio_utils move. The files on the Hub must work with these too.
"""

import json
import sys
from importlib import import_module
from types import ModuleType

import numpy as np
import pytest
import torch
from tiny import MEL, build
from transformers import (
    DataCollatorWithPadding,
    FeatureExtractionMixin,
    SequenceFeatureExtractor,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import asit_hf
from asit_hf import ASiTFeatureExtractor, ASiTForAudioClassification
from asit_hf.configuration_asit import AUTO_MAP

SETTINGS = {"num_mel_bins": MEL, "mean": -5.0, "std": 3.0, "padding_value": -1.5}
WAVEFORMS = [0.1 * np.random.default_rng(0).standard_normal(length, np.float32) for length in (16000, 9000, 12345)]


def _must_not_be_used(*args, **kwargs):
    raise AssertionError("a method of an audio processor")


METHODS = dict.fromkeys(("__init__", "__call__", "pad", "fetch_audio"), _must_not_be_used)
FILES = dict.fromkeys(("from_pretrained", "from_dict", "to_dict", "save_pretrained"), _must_not_be_used)
TO_COME = {
    "an audio processor": type("SequenceFeatureExtractor", (), {**METHODS, **FILES}),
    "an audio processor with the files of a feature extractor": type(
        "SequenceFeatureExtractor", (FeatureExtractionMixin,), METHODS
    ),
    "removed": None,
}


@pytest.fixture(params=TO_COME)
def to_come(request, monkeypatch) -> type:
    """The feature extractor's class, imported with a version of Transformers to come."""
    if TO_COME[request.param] is None:
        monkeypatch.delattr(sys.modules["transformers"], "SequenceFeatureExtractor")
    else:
        monkeypatch.setattr(sys.modules["transformers"], "SequenceFeatureExtractor", TO_COME[request.param])
    for moved in ("audio_utils", "feature_extraction_sequence_utils"):
        monkeypatch.setitem(sys.modules, f"transformers.{moved}", None)
    package = ModuleType("asit_to_come")
    package.__path__ = list(asit_hf.__path__)
    before = set(sys.modules)
    sys.modules[package.__name__] = package
    yield import_module(f"{package.__name__}.feature_extraction_asit").ASiTFeatureExtractor
    for name in set(sys.modules) - before:
        if name.startswith(package.__name__):
            del sys.modules[name]


def features(extractor, **options) -> dict[str, torch.Tensor]:
    return dict(extractor(WAVEFORMS, sampling_rate=16000, return_tensors="pt", **options))


def assert_equal(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(dict(ours), dict(expected), rtol=0, atol=0)


def test_it_computes_and_pads_the_same(to_come):
    assert not issubclass(to_come, SequenceFeatureExtractor)
    extractor, today = to_come(**SETTINGS), ASiTFeatureExtractor(**SETTINGS)
    assert extractor.to_dict() == today.to_dict()
    for options in ({}, {"pad_to_multiple_of": 16}, {"num_frames": 64, "truncation": True}):
        assert_equal(features(extractor, **options), features(today, **options))
    clips = [{"input_values": torch.randn(frames, MEL), "labels": frames} for frames in (40, 96, 64)]
    assert_equal(extractor.pad(clips, pad_to_multiple_of=16), today.pad(clips, pad_to_multiple_of=16))


def test_it_loads_what_is_saved_today_and_saves_the_same(to_come, tmp_path):
    today = ASiTFeatureExtractor(**SETTINGS)
    today.save_pretrained(tmp_path / "today")
    loaded = to_come.from_pretrained(tmp_path / "today", mean=-4.5)
    assert (loaded.mean, loaded.std) == (-4.5, 3.0)
    to_come(**SETTINGS).save_pretrained(tmp_path / "to_come")
    saved = [json.loads((tmp_path / name / "preprocessor_config.json").read_text()) for name in ("today", "to_come")]
    assert saved[0] == saved[1]
    assert_equal(features(ASiTFeatureExtractor.from_pretrained(tmp_path / "to_come")), features(today))
    assert_equal(features(to_come.from_pretrained(tmp_path / "today")), features(today))


def test_its_code_loads_from_a_folder(to_come, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "transformers_modules", raising=False)
    folder = tmp_path / tmp_path.name  # the module's name: the code must be imported anew in each case
    to_come(**SETTINGS).save_pretrained(folder)
    remote = get_class_from_dynamic_module(AUTO_MAP["AutoFeatureExtractor"], folder)
    assert not issubclass(remote, (to_come, ASiTFeatureExtractor, SequenceFeatureExtractor))
    assert_equal(features(remote.from_pretrained(folder)), features(ASiTFeatureExtractor(**SETTINGS)))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_pipelines_classify_the_same(to_come, batch_size):
    model = build(ASiTForAudioClassification)
    today, to_come = (
        pipeline("audio-classification", model=model, feature_extractor=cls(**SETTINGS), device="cpu")(
            WAVEFORMS, batch_size=batch_size, top_k=None
        )
        for cls in (ASiTFeatureExtractor, to_come)
    )
    assert today == to_come


def test_trainer_with_a_collator_that_pads(to_come, tmp_path):
    clips = [{"input_values": torch.randn(frames, MEL), "labels": frames % 5} for frames in (40, 96, 64)]
    arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=3, use_cpu=True, report_to="none")
    logits = []
    for cls in (ASiTFeatureExtractor, to_come):
        options = {"processing_class": cls(**SETTINGS), "data_collator": DataCollatorWithPadding(cls(**SETTINGS))}
        trainer = Trainer(build(ASiTForAudioClassification), arguments, eval_dataset=clips, **options)
        logits.append(trainer.predict(clips).predictions)
        trainer.save_model(tmp_path / "saved")
    np.testing.assert_array_equal(*logits)
    assert ASiTFeatureExtractor.from_pretrained(tmp_path / "saved").std == 3.0
