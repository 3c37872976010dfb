import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
    ViTMSNConfig,
    ViTMSNModel,
)

from asit_hf import ASiTModel
from asit_hf.pretraining.initialization import encoder_from_vit, resize_patches, resize_positions

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 64,
    "patch_size": 16,
}
DINOV2_SIZES = {**SIZES, "mlp_ratio": 2, "layerscale_value": 0.5}
del DINOV2_SIZES["intermediate_size"]


def save(model_class, config, folder: Path, seed: int = 0):
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # initial biases are 0 and norm gains 1, which could hide a mistake
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def gray_outputs(vit, values: torch.Tensor, **kwargs) -> torch.Tensor:
    """What the ViT returns for spectrograms `(batch, frames, mel)` as gray images."""
    return vit(values[:, None].expand(-1, 3, -1, -1), **kwargs).last_hidden_state


@pytest.mark.parametrize("frames", [64, 96, 160])
@pytest.mark.parametrize("options", [{}, {"qkv_bias": False, "layer_norm_eps": 1e-3, "hidden_act": "relu"}])
def test_the_encoder_equals_the_vit_on_a_gray_image(tmp_path, frames, options):
    vit = save(ViTModel, ViTConfig(**SIZES, **options), tmp_path)
    encoder = encoder_from_vit(tmp_path, num_frames=frames, num_mel_bins=32).eval()
    values = torch.randn(2, frames, 32)
    with torch.no_grad():
        expected = gray_outputs(vit, values, interpolate_pos_encoding=True)
        torch.testing.assert_close(encoder(values).last_hidden_state, expected, rtol=0, atol=1e-5)
    assert encoder.config.position_grid == (frames // 16, 2)
    assert encoder.config.layer_norm_eps == vit.config.layer_norm_eps


def test_a_saved_classifier_works_and_the_result_saves(tmp_path):
    vit = save(ViTForImageClassification, ViTConfig(**SIZES), tmp_path / "vit")
    encoder = encoder_from_vit(tmp_path / "vit", num_frames=96, num_mel_bins=32, drop_path_rate=0.2, num_prototypes=64)
    assert (encoder.config.drop_path_rate, encoder.config.num_prototypes) == (0.2, 64)
    encoder.save_pretrained(tmp_path / "asit")
    state = ASiTModel.from_pretrained(tmp_path / "asit").state_dict()
    expected = vit.vit.state_dict()
    patches = "embeddings.patch_embeddings.projection.weight"
    torch.testing.assert_close(state[patches][:, 0], expected[patches].sum(1))
    for name in set(state) - {patches, "embeddings.position_embeddings"}:
        assert torch.equal(state[name], expected[name]), name


@pytest.mark.parametrize(("model_class", "config"), [(ViTMAEModel, ViTMAEConfig), (ViTMSNModel, ViTMSNConfig)])
def test_other_vit_types_work(tmp_path, model_class, config):
    vit = save(model_class, config(**SIZES), tmp_path)
    state = encoder_from_vit(tmp_path, num_frames=64, num_mel_bins=64).state_dict()
    for name, value in vit.state_dict().items():
        if name in state and "projection.weight" not in name:
            torch.testing.assert_close(state[name], value, rtol=0, atol=1e-6)
    assert set(state) <= set(vit.state_dict())


@pytest.mark.parametrize("shape", [(64, 64), (96, 32)])
@pytest.mark.parametrize("options", [{}, {"qkv_bias": False, "layer_norm_eps": 1e-3, "hidden_act": "relu"}])
def test_the_encoder_equals_dinov2_on_a_gray_image(tmp_path, caplog, shape, options):
    dinov2 = save(Dinov2Model, Dinov2Config(**DINOV2_SIZES, **options), tmp_path)
    encoder = encoder_from_vit(tmp_path, *shape).eval()
    values = torch.randn(2, *shape)
    with torch.no_grad():
        expected = gray_outputs(dinov2, values)
        torch.testing.assert_close(encoder(values).last_hidden_state, expected, rtol=0, atol=1e-5)
    assert encoder.config.intermediate_size == 64
    assert "resized" not in caplog.text


def test_a_sharded_bf16_dinov2_with_a_head_works(tmp_path):
    config = Dinov2Config(**DINOV2_SIZES, num_labels=3)
    classifier = save(Dinov2ForImageClassification, config, tmp_path / "float32").to(torch.bfloat16)
    classifier.save_pretrained(tmp_path / "head", max_shard_size="20KB")
    assert len(list((tmp_path / "head").glob("*.safetensors"))) > 1
    classifier.float().dinov2.save_pretrained(tmp_path / "backbone")  # the same rounded values
    state, expected = (encoder_from_vit(tmp_path / name, 64, 64).state_dict() for name in ("head", "backbone"))
    for name, value in expected.items():
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name], value), name


def test_registers_are_dropped_with_a_warning(tmp_path, caplog):
    config = Dinov2WithRegistersConfig(**DINOV2_SIZES, num_register_tokens=3)
    vit = save(Dinov2WithRegistersModel, config, tmp_path)
    encoder = encoder_from_vit(tmp_path, 64, 64).eval()
    assert "3 register tokens are dropped" in caplog.text
    plain = Dinov2Model(Dinov2Config(**DINOV2_SIZES)).eval()
    plain.load_state_dict({name: value for name, value in vit.state_dict().items() if "register" not in name})
    values = torch.randn(1, 64, 64)
    with torch.no_grad():
        expected = gray_outputs(plain, values)
        torch.testing.assert_close(encoder(values).last_hidden_state, expected, rtol=0, atol=1e-5)


def test_swiglu_is_refused(tmp_path):
    Dinov2Config(**DINOV2_SIZES, use_swiglu_ffn=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="SwiGLU"):
        encoder_from_vit(tmp_path)


def test_resizing_patches():
    weight = torch.randn(5, 1, 14, 14)
    assert torch.equal(resize_patches(weight, 14), weight)
    expected = F.interpolate(weight, size=(16, 16), mode="bicubic", align_corners=False) * (14 / 16) ** 2
    torch.testing.assert_close(resize_patches(weight, 16), expected)
    ramp = torch.linspace(-1, 1, 14)
    plane = 0.3 + 2 * ramp[:, None] - ramp  # a smooth kernel
    resized = resize_patches(plane[None, None], 16)
    torch.testing.assert_close(resized.sum(), plane.sum(), rtol=1e-5, atol=0)  # the response to a constant patch


def test_patches_of_14_become_16_where_mel_bins_are_no_multiple(tmp_path, caplog):
    vit = save(Dinov2Model, Dinov2Config(**{**DINOV2_SIZES, "image_size": 56, "patch_size": 14}), tmp_path)
    encoder = encoder_from_vit(tmp_path, num_frames=64, num_mel_bins=32)
    assert "14 x 14 to 16 x 16" in caplog.text
    assert (encoder.config.patch_size, encoder.config.position_grid) == (16, (4, 2))
    weights = vit.embeddings.patch_embeddings.projection.weight.sum(1, keepdim=True)
    patches = "embeddings.patch_embeddings.projection.weight"
    torch.testing.assert_close(encoder.state_dict()[patches], resize_patches(weights, 16))
    caplog.clear()
    kept = encoder_from_vit(tmp_path, num_frames=56, num_mel_bins=28)
    assert torch.equal(kept.state_dict()[patches], weights)
    chosen = encoder_from_vit(tmp_path, num_frames=56, num_mel_bins=28, patch_size=7)
    assert torch.equal(chosen.state_dict()[patches], resize_patches(weights, 7))
    assert chosen.config.position_grid == (8, 4)
    assert "resized" not in caplog.text


def test_the_distillation_token_is_dropped_with_a_warning(tmp_path, caplog):
    vit = save(DeiTModel, DeiTConfig(**SIZES), tmp_path)
    with caplog.at_level(logging.WARNING):
        encoder = encoder_from_vit(tmp_path, num_frames=64, num_mel_bins=64)
    assert "distillation token" in caplog.text
    positions = vit.embeddings.position_embeddings
    expected = torch.cat((positions[:, :1], positions[:, 2:]), dim=1)
    torch.testing.assert_close(encoder.embeddings.position_embeddings, expected, rtol=0, atol=1e-6)


def test_positions_of_an_oblong_image(tmp_path):
    sizes = {**SIZES, "image_size": (96, 32)}
    vit = save(ViTModel, ViTConfig(**sizes), tmp_path)
    encoder = encoder_from_vit(tmp_path, num_frames=96, num_mel_bins=32).eval()
    values = torch.randn(1, 96, 32)
    with torch.no_grad():
        expected = gray_outputs(vit, values)
        torch.testing.assert_close(encoder(values).last_hidden_state, expected, rtol=0, atol=1e-5)


def test_resizing_positions():
    positions = torch.randn(1, 1 + 12, 5)
    assert torch.equal(resize_positions(positions, (3, 4), (3, 4)), positions)
    resized = resize_positions(positions, (3, 4), (7, 2))
    grid = positions[0, 1:].T.reshape(1, 5, 3, 4)
    expected = F.interpolate(grid, size=(7, 2), mode="bicubic", align_corners=False)
    assert torch.equal(resized[:, 0], positions[:, 0])
    for time in range(7):
        for mel in range(2):
            torch.testing.assert_close(resized[0, 1 + 2 * time + mel], expected[0, :, time, mel])
    with pytest.raises(ValueError, match="5 x 2 patch positions, got 12"):
        resize_positions(positions, (5, 2), (3, 4))


def test_other_model_types_are_refused(tmp_path):
    BertConfig(hidden_size=32).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="vit, deit, .*, got 'bert'"):
        encoder_from_vit(tmp_path / "bert")
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text('{"model_type": "unknown_type"}')
    with pytest.raises(ValueError, match="got 'unknown_type'"):
        encoder_from_vit(tmp_path / "unknown")
    with pytest.raises(OSError, match="nowhere"):
        encoder_from_vit(tmp_path / "nowhere")


def test_fields_that_contradict_the_checkpoint_are_refused(tmp_path):
    save(ViTModel, ViTConfig(**SIZES), tmp_path)
    assert encoder_from_vit(tmp_path, hidden_size=32).config.hidden_size == 32
    with pytest.raises(ValueError, match="hidden_size.*32.*64"):
        encoder_from_vit(tmp_path, hidden_size=64)


def test_incomplete_weights_and_oblong_patches_are_refused(tmp_path):
    save(ViTModel, ViTConfig(**SIZES), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if "fc2.weight" in name or "output.dense.weight" in name)
    save_file(
        {name: value for name, value in weights.items() if name != lost},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match="1 tensors are missing"):
        encoder_from_vit(tmp_path)
    ViTConfig(**{**SIZES, "patch_size": (16, 8)}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="square patches, got 16 x 8"):
        encoder_from_vit(tmp_path)
