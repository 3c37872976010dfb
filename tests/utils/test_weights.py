import pytest
import torch
from tiny import build

from asit_hf import ASiTForAudioClassification, ASiTModel
from asit_hf.loading import load_encoder
from asit_hf.utils.weights import model_hash


def test_a_hash_is_that_of_the_encoders_weights(tmp_path):
    model = build()
    first = model_hash(model)
    assert first == model_hash(build())
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert first == model_hash(load_encoder(tmp_path))
    classifier = build(ASiTForAudioClassification, seed=3)
    assert model_hash(classifier) == model_hash(classifier.asit)


@pytest.mark.parametrize("change", ["value", "seed", "float16", "bfloat16", "order", "shape"])
def test_other_weights_have_another_hash(change):
    model, first = build(), model_hash(build())
    with torch.no_grad():
        if change == "value":
            model.layers[1].attention.q_proj.bias[3] += 1e-6
        elif change == "seed":
            model = build(seed=1)
        elif change == "order":
            model.layers = model.layers[::-1]
        elif change == "shape":
            model.layernorm.weight = torch.nn.Parameter(model.layernorm.weight[None])
        else:
            model.to(getattr(torch, change))
    assert model_hash(model) != first
    assert isinstance(model, ASiTModel)
