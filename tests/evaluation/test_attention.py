import numpy as np
import pytest
import torch

from asit_hf import ASiTConfig, ASiTForAudioClassification, ASiTForPreTraining, ASiTModel
from asit_hf.evaluation.attention import attention_rollout
from asit_hf.pretraining.masking import GMML
from asit_hf.pretraining.reconstruction import reconstruct

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SMALL |= {"num_mel_bins": 32, "num_frames": 96, "initializer_range": 0.3}
HEADS = {"num_prototypes": 16, "distillation_hidden_size": 16, "distillation_bottleneck_size": 8}


def make_model(model_class=ASiTModel, **options):
    torch.manual_seed(0)
    return model_class(ASiTConfig(**{**SMALL, **options})).eval()


def written_out(model: ASiTModel, input_values: torch.Tensor) -> np.ndarray:
    """The tokens' rollout in numpy, weights taken from the layers' own projections."""
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


def test_a_token_that_all_layers_look_at_gets_the_attention():
    model = make_model(num_hidden_layers=1)
    attention = model.layers[0].attention
    with torch.no_grad():
        input_values = torch.randn(96, 32)
        states = model.layers[0].layernorm_before(model.embeddings(input_values[None]))[0]
        loud = states[1 + 3 * 2 + 1]  # column 3, upper row
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.zero_()
            projection.bias.zero_()
        attention.q_proj.bias.fill_(50.0)
        attention.k_proj.weight[:] = loud / loud.norm()
    shares = attention_rollout(model, input_values)
    assert shares.argmax() == 3 * 2 + 1
    assert shares.max() > 0.9


def test_a_model_is_left_as_it_was():
    model = make_model(ASiTForAudioClassification, num_labels=3).train()
    model.set_attn_implementation("sdpa")
    shares = attention_rollout(model, torch.randn(1, 96, 32))
    assert shares.shape == (6, 2)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(attention_rollout(model.asit, torch.randn(8, 32)).sum(), torch.tensor(1.0))


def test_reconstruction_is_what_pretraining_computes():
    model = make_model(ASiTForPreTraining, **HEADS)
    views = reconstruct(model, torch.randn(70, 32))
    assert {tuple(values.shape) for values in views.values()} == {(64, 32)}
    assert views["mask"].float().mean() >= 0.5
    torch.testing.assert_close(views["corrupted"], views["clean"].masked_fill(views["mask"], 0.0))
    inputs = [views[name].expand(1, 2, -1, -1) for name in ("clean", "corrupted", "mask")]
    with torch.no_grad():
        expected = model(*inputs).reconstruction[0, 0]
    torch.testing.assert_close(views["reconstruction"], expected)


def test_the_seed_and_the_corruption_decide_the_mask():
    model, clip = make_model(ASiTForPreTraining, **HEADS), torch.randn(96, 32)
    masks = [reconstruct(model, clip, seed=seed)["mask"] for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    bands = reconstruct(model, clip, GMML(pattern="time"))["mask"]
    assert torch.equal(bands.all(1), bands.any(1))


def test_wrong_input_is_named():
    with pytest.raises(TypeError, match="got ASiTModel"):
        reconstruct(make_model(), torch.randn(96, 32))
    pretraining = make_model(ASiTForPreTraining, **HEADS)
    with pytest.raises(ValueError, match="at least 16 frames, one patch, got 10"):
        reconstruct(pretraining, torch.randn(10, 32))
    with pytest.raises(ValueError, match=r"one clip .* got \(2, 96, 32\)"):
        attention_rollout(pretraining, torch.randn(2, 96, 32))
    unrestoring = make_model(ASiTForPreTraining, **HEADS, reconstruction_loss_weight=0.0)
    with pytest.raises(ValueError, match="reconstruction_loss_weight 0"):
        reconstruct(unrestoring, torch.randn(96, 32))
