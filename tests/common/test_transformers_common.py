"""
The common tests of transformers, from its source distribution, with the models and feature extractor of this package.
TRANSFORMERS_SOURCE is the folder of the source distribution; `make common` downloads it.
"""

import os
import sys
import unittest
from importlib import import_module
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto

from asit_hf import (
    ASiTConfig,
    ASiTFeatureExtractor,
    ASiTForAudioClassification,
    ASiTForAudioFrameClassification,
    ASiTModel,
)

SOURCE = os.environ.get("TRANSFORMERS_SOURCE")
if not SOURCE:
    pytest.skip("TRANSFORMERS_SOURCE is not set; run `make common`", allow_module_level=True)
FOLDER = Path(SOURCE, "tests").resolve()
if not (FOLDER / "test_modeling_common.py").is_file():
    pytest.skip(f"TRANSFORMERS_SOURCE: no test_modeling_common.py in {FOLDER}", allow_module_level=True)

# Imports of the common tests from files that are missing in the source distribution.
MISSING = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "return_dict": False,
            "output_hidden_states": True,
            "dtype": "float16",
            "chunk_size_feed_forward": 5,
            "architectures": ["ASiTModel"],
            "id2label": {0: "dog", 1: "rain"},
            "label2id": {"dog": 0, "rain": 1},
            "problem_type": "regression",
        }
    },
}


def common_tests(name: str) -> ModuleType:
    """Module `name` of the tests of transformers, in a package `transformers_tests`."""
    folders = {name.rpartition(".")[0] for name in MISSING}
    for package in ("", *sorted(folders)):
        module = ModuleType(f"transformers_tests.{package}".rstrip("."))
        module.__path__ = [] if package else [str(FOLDER)]
        sys.modules.setdefault(module.__name__, module)
    for missing, contents in MISSING.items():
        module = ModuleType(f"transformers_tests.{missing}")
        vars(module).update(contents)
        sys.modules.setdefault(module.__name__, module)
    # otherwise the tests look for transformers in their own folder
    with mock.patch("transformers.utils.direct_transformers_import", return_value=transformers):
        return import_module(f"transformers_tests.{name}")


modeling = common_tests("test_modeling_common")
configuration = common_tests("test_configuration_common")
feature_extraction = common_tests("test_sequence_feature_extraction_common")


class ModelTester:
    """A tiny model and its input."""

    batch_size = 3
    is_training = True
    num_frames = 64
    num_mel_bins = 32
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    num_time_patches = 4
    seq_length = 1 + num_time_patches * 2  # CLS token, 4 x 2 patches

    def get_config(self) -> ASiTConfig:
        return ASiTConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            num_frames=self.num_frames,
            num_mel_bins=self.num_mel_bins,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[ASiTConfig, dict[str, torch.Tensor]]:
        values = torch.randn(self.batch_size, self.num_frames, self.num_mel_bins)
        mask = torch.ones(self.batch_size, self.num_frames, dtype=torch.long)
        mask[-1, 40:] = 0
        return self.get_config(), {"input_values": values, "attention_mask": mask}


class ModelTest(modeling.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (ASiTModel, ASiTForAudioClassification, ASiTForAudioFrameClassification)
    test_resize_embeddings = False
    test_can_init_all_missing_weights_before_2023 = True  # it looks for a year in the file header

    def setUp(self):
        self.model_tester = ModelTester()
        listed = {
            "MODEL_MAPPING_NAMES": "ASiTModel",
            "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES": "ASiTForAudioClassification",
        }
        for mapping, name in listed.items():  # as for a model of transformers
            self.enterContext(mock.patch.dict(getattr(modeling_auto, mapping), {"asit": name}))

    def _prepare_for_class(self, inputs_dict: dict, model_class: type, return_labels: bool = False) -> dict:
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class is ASiTForAudioFrameClassification:
            inputs["labels"] = torch.zeros(self.model_tester.batch_size, self.model_tester.num_time_patches).long()
        return inputs

    def test_model_get_set_embeddings(self):
        """Replaces the common test, which expects token embeddings."""
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            assert model.get_input_embeddings() is model.base_model.embeddings.patch_embeddings
            replacement = torch.nn.Identity()
            model.set_input_embeddings(replacement)
            assert model.get_input_embeddings() is replacement
            assert model.get_output_embeddings() is None


class ConfigTest(unittest.TestCase):
    def test_config(self):
        tester = configuration.ConfigTester(self, ASiTConfig, has_text_modality=False, hidden_size=48)
        tester.run_common_tests()


class FeatureExtractionTester:
    """A tiny feature extractor and sequences of features."""

    batch_size = 3
    min_seq_length = 40
    max_seq_length = 80
    seq_length_diff = 20
    feature_size = 16

    def prepare_feat_extract_dict(self) -> dict:
        return {"feature_size": self.feature_size, "num_mel_bins": 16, "mean": -4.0, "std": 4.0}

    def prepare_inputs_for_common(self, equal_length: bool = False, numpify: bool = False) -> list:
        lengths = [self.max_seq_length if equal_length else 40 + 20 * index for index in range(self.batch_size)]
        generator = np.random.default_rng(0)
        features = [generator.standard_normal((length, self.feature_size), dtype=np.float32) for length in lengths]
        return features if numpify else [feature.tolist() for feature in features]


class FeatureExtractionTest(feature_extraction.SequenceFeatureExtractionTestMixin, unittest.TestCase):
    feature_extraction_class = ASiTFeatureExtractor

    def setUp(self):
        self.feat_extract_tester = FeatureExtractionTester()
