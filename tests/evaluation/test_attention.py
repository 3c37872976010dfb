import numpy as np
import pytest
import torch

from asit_hf import ASiTConfig, ASiTForAudioClassification, ASiTModel
from asit_hf.evaluation.attention import attention_rollout

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SMALL |= {"num_mel_bins": 32, "num_frames": 96, "initializer_range": 0.3}


def make_model(model_class=ASiTModel, **options):
    torch.manual_seed(0)
    return model_class(ASiTConfig(**{**SMALL, **options})).eval()


def written_out(model: ASiTModel, input_values: torch.Tensor) -> np.ndarray:
    """The rollout of all tokens in numpy, from the layers' own projections."""
    hidden = model.embeddings(input_values[None])
    rollout = np.eye(hidden.shape[1])
    for layer in model.layers:
        states, attention = layer.layernorm_before(hidden), layer.attention
        query, key = (
            projection(states).unflatten(-1, (2, -1)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj)
        )
        weights = (query @ key.transpose(2, 3) / 16**0.5).softmax(-1)[0].mean(0)
        rollout = (0.5 * weights.numpy() + 0.5 * np.eye(len(weights))) @ rollout
        hidden = layer(hidden)
    return rollout


@pytest.mark.parametrize("pooling_mode", ["cls", "mean", "cls_mean"])
@torch.no_grad()
def test_rollout_follows_attention_to_the_pooled_tokens(pooling_mode):
    model = make_model(pooling_mode=pooling_mode)
    input_values = torch.randn(70, 32)
    rollout = written_out(model, input_values)
    cls_token, mean = rollout[0, 1:], rollout[1:, 1:].mean(0)
    expected = {"cls": cls_token, "mean": mean, "cls_mean": cls_token / cls_token.sum() + mean / mean.sum()}
    expected = expected[pooling_mode] / expected[pooling_mode].sum()
    shares = attention_rollout(model, input_values)
    assert shares.shape == (4, 2)
    np.testing.assert_allclose(shares.numpy(), expected.reshape(4, 2), rtol=1e-4)


def test_a_token_that_all_tokens_attend_to_has_the_largest_share():
    model = make_model(num_hidden_layers=1)
    attention = model.layers[0].attention
    with torch.no_grad():
        input_values = torch.randn(96, 32)
        states = model.layers[0].layernorm_before(model.embeddings(input_values[None]))[0]
        loud = states[1 + 3 * 2 + 1]  # time patch 3, upper mel patch
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.zero_()
            projection.bias.zero_()
        attention.q_proj.bias.fill_(50.0)
        attention.k_proj.weight[:] = loud / loud.norm()
    shares = attention_rollout(model, input_values)
    assert shares.argmax() == 3 * 2 + 1
    assert shares.max() > 0.9


def test_the_model_is_unchanged():
    model = make_model(ASiTForAudioClassification, num_labels=3).train()
    model.set_attn_implementation("sdpa")
    shares = attention_rollout(model, torch.randn(1, 96, 32))
    assert shares.shape == (6, 2)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(attention_rollout(model.asit, torch.randn(8, 32)).sum(), torch.tensor(1.0))


def test_wrong_input():
    with pytest.raises(ValueError, match=r"one clip .* got \(2, 96, 32\)"):
        attention_rollout(make_model(), torch.randn(2, 96, 32))
