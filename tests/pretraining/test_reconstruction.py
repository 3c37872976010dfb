import pytest
import torch
from tiny import build

from asit_hf import ASiTForPreTraining
from asit_hf.pretraining.masking import GMML
from asit_hf.pretraining.reconstruction import reconstruct


def test_reconstruction_equals_that_of_pretraining():
    model = build(ASiTForPreTraining)
    views = reconstruct(model, torch.randn(70, 32))
    assert {tuple(values.shape) for values in views.values()} == {(64, 32)}
    assert views["mask"].float().mean() >= 0.5
    torch.testing.assert_close(views["corrupted"], views["clean"].masked_fill(views["mask"], 0.0))
    inputs = [views[name].expand(1, 2, -1, -1) for name in ("clean", "corrupted", "mask")]
    with torch.no_grad():
        expected = model(*inputs).reconstruction[0, 0]
    torch.testing.assert_close(views["reconstruction"], expected)


def test_the_seed_and_the_corruption_decide_the_mask():
    model, clip = build(ASiTForPreTraining), torch.randn(96, 32)
    masks = [reconstruct(model, clip, seed=seed)["mask"] for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    bands = reconstruct(model, clip, GMML(pattern="time"))["mask"]
    assert torch.equal(bands.all(1), bands.any(1))


def test_wrong_input():
    with pytest.raises(TypeError, match="got ASiTModel"):
        reconstruct(build(), torch.randn(96, 32))
    pretraining = build(ASiTForPreTraining)
    with pytest.raises(ValueError, match="at least 16 frames.*got 10"):
        reconstruct(pretraining, torch.randn(10, 32))
    without_loss = build(ASiTForPreTraining, reconstruction_loss_weight=0.0)
    with pytest.raises(ValueError, match="reconstruction_loss_weight"):
        reconstruct(without_loss, torch.randn(96, 32))
