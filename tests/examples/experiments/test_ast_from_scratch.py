from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTModel
from examples.experiments import ast_from_scratch

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    ASiTModel(ASiTConfig(**SMALL, num_frames=64, num_mel_bins=64)).save_pretrained(folder)
    ASiTFeatureExtractor(num_mel_bins=64).save_pretrained(folder)
    return folder


def build(encoder: Path, seconds: float):
    args = SimpleNamespace(model_name_or_path=str(encoder)), SimpleNamespace(max_seconds=seconds)
    return ast_from_scratch.build_ast(*args, "single_label_classification", ["a", "b", "c"])


@pytest.mark.parametrize("seconds", [1, 5])
def test_the_input_is_as_long_as_the_clips(encoder, tmp_path, seconds):
    model, extractor = build(encoder, seconds)
    frames = 100 * seconds - 2
    patches = ((frames - 16) // 10 + 1) * ((64 - 16) // 10 + 1)
    embeddings = model.audio_spectrogram_transformer.embeddings.position_embeddings
    assert embeddings.shape == (1, patches + 2, 32)
    # clips of the whole length are taken whole; shorter and longer ones are padded and cut
    whole = ASiTFeatureExtractor.from_pretrained(encoder)
    clip = np.random.default_rng(0).normal(0, 0.1, 16000 * seconds).astype(np.float32)
    extractor.save_pretrained(tmp_path)
    for one in (extractor, ast_from_scratch.OneLength.from_pretrained(tmp_path)):
        inputs = one(clip, sampling_rate=16000, return_tensors="pt")
        expected = whole(clip, sampling_rate=16000, return_tensors="pt")
        torch.testing.assert_close(inputs["input_values"], expected["input_values"], rtol=0, atol=0)
        for samples in (8000, 96000):
            other = one(np.zeros(samples, dtype=np.float32), sampling_rate=16000, return_tensors="pt")
            assert other["input_values"].shape == (1, frames, 64)
    assert model(**inputs).logits.shape == (1, 3)


def test_length_and_size_are_required(encoder):
    with pytest.raises(ValueError, match="--max_seconds"):
        build(encoder, None)
    with pytest.raises(ValueError, match="--model_name_or_path"):
        ast_from_scratch.build_ast(SimpleNamespace(model_name_or_path=None), SimpleNamespace(max_seconds=1), "", [])
