import copy
import pickle

import pytest
import torch
from tiny import MEL, TINY, build
from torch import nn
from transformers import AutoModel, AutoModelForAudioClassification, AutoModelForAudioFrameClassification

from asit_hf import ASiTConfig, ASiTForAudioClassification, ASiTForAudioFrameClassification, ASiTModel
from asit_hf.modeling_asit import bicubic_resize_matrix

CLASSES = [ASiTModel, ASiTForAudioClassification, ASiTForAudioFrameClassification]
MEL_PATCHES = MEL // 16


def spectrograms(batch: int, frames: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, frames, MEL, generator=torch.Generator().manual_seed(seed))


def padded_batch(lengths: list[int], value: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    clips = [spectrograms(1, length, seed=length) for length in lengths]
    batch = torch.full((len(clips), max(lengths), MEL), value)
    mask = torch.zeros(len(clips), max(lengths), dtype=torch.long)
    for index, clip in enumerate(clips):
        batch[index, : clip.shape[1]] = clip[0]
        mask[index, : clip.shape[1]] = 1
    return batch, mask, clips


@pytest.mark.parametrize(
    ("frames", "time_patches"), [(1, 1), (15, 1), (16, 1), (96, 6), (98, 6), (298, 18), (998, 62), (1998, 124)]
)
def test_shapes_of_clips_from_one_frame_to_20_seconds(frames, time_patches):
    outputs = build()(spectrograms(2, frames))
    assert outputs.last_hidden_state.shape == (2, 1 + time_patches * MEL_PATCHES, 48)
    assert outputs.pooler_output.shape == (2, 48)
    logits = build(ASiTForAudioFrameClassification)(spectrograms(2, frames)).logits
    assert logits.shape == (2, time_patches, 5)
    assert build(ASiTForAudioClassification)(spectrograms(2, frames)).logits.shape == (2, 5)


def test_trailing_frames_are_cut_and_short_clips_are_padded_with_zeros():
    model = build()
    long = spectrograms(1, 110)
    assert torch.equal(model(long).last_hidden_state, model(long[:, :96]).last_hidden_state)
    short = spectrograms(1, 9)
    padded = torch.cat([short, torch.zeros(1, 7, MEL)], dim=1)
    assert torch.equal(model(short).last_hidden_state, model(padded).last_hidden_state)


def test_patches_are_time_major():
    model = build(num_hidden_layers=0)
    values = spectrograms(1, 96)
    changed = values.clone()
    changed[:, 32:48, 16:32] += 1  # time patch 2, mel patch 1
    difference = (model(values).last_hidden_state - model(changed).last_hidden_state).abs().sum(-1)[0]
    assert difference.nonzero().flatten().tolist() == [1 + 2 * MEL_PATCHES + 1]


@pytest.mark.parametrize("pooling_mode", ["cls", "mean", "cls_mean"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [0.0, 3.0])
def test_padding_does_not_change_a_clip(pooling_mode, attention, padding):
    model = build(ASiTForAudioClassification, pooling_mode=pooling_mode, attn_implementation=attention)
    batch, mask, clips = padded_batch([96, 40, 16, 250, 130], padding)
    logits = model(batch, attention_mask=mask).logits
    for row, clip in zip(logits, clips):
        torch.testing.assert_close(row, model(clip).logits[0], rtol=0, atol=1e-5)
    assert (logits[0] - model(batch).logits[0]).abs().max() > 1e-3  # but without the mask it does


def test_padding_does_not_change_a_clip_shorter_than_a_patch():
    model = build(ASiTForAudioClassification)
    batch, mask, clips = padded_batch([96, 9])
    torch.testing.assert_close(
        model(batch, attention_mask=mask).logits[1], model(clips[1]).logits[0], rtol=0, atol=1e-5
    )


def test_padding_does_not_change_frame_logits():
    model = build(ASiTForAudioFrameClassification)
    batch, mask, clips = padded_batch([96, 40, 250])
    logits = model(batch, attention_mask=mask).logits
    for row, clip in zip(logits, clips):
        alone = model(clip).logits[0]
        torch.testing.assert_close(row[: len(alone)], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("frames", [9, 96, 98, 250])
@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_a_mask_of_ones_equals_no_mask(frames, dtype):
    model = build(ASiTForAudioClassification, pooling_mode="cls_mean")
    values = spectrograms(3, frames)
    masked = model(values, attention_mask=torch.ones(3, frames, dtype=dtype)).logits
    torch.testing.assert_close(masked, model(values).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_sdpa_equals_eager(masked):
    batch, mask, _ = padded_batch([96, 40, 250])
    outputs = [
        build(attn_implementation=name)(batch, attention_mask=mask if masked else None).last_hidden_state
        for name in ("sdpa", "eager")
    ]
    real = (
        torch.tensor([1 + 6 * MEL_PATCHES, 1 + 2 * MEL_PATCHES, 1 + 15 * MEL_PATCHES])
        if masked
        else torch.full((3,), 31)
    )
    for sdpa, eager, tokens in zip(*outputs, real):
        torch.testing.assert_close(sdpa[:tokens], eager[:tokens], rtol=0, atol=1e-5)


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_is_close_to_float32(autocast):
    model = build(ASiTForAudioClassification, initializer_range=0.02)
    batch, mask, _ = padded_batch([96, 40, 250])
    expected = model(batch, attention_mask=mask).logits
    if autocast:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(batch, attention_mask=mask).logits
    else:
        logits = model.bfloat16()(batch.bfloat16(), attention_mask=mask).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).abs().max() < 0.02 * expected.std() + 0.02


@pytest.mark.parametrize("cls", CLASSES)
def test_hidden_states_and_attentions_are_recorded(cls):
    model = build(cls, attn_implementation="eager")
    outputs = model(spectrograms(2, 96), output_hidden_states=True, output_attentions=True)
    tokens = 1 + 6 * MEL_PATCHES
    assert [state.shape for state in outputs.hidden_states] == [(2, tokens, 48)] * 3
    assert [weights.shape for weights in outputs.attentions] == [(2, 3, tokens, tokens)] * 2
    torch.testing.assert_close(outputs.attentions[0].sum(-1), torch.ones(2, 3, tokens))
    plain = model(spectrograms(2, 96))
    assert plain.hidden_states is None
    assert plain.attentions is None


def test_padding_gets_no_attention():
    batch, mask, _ = padded_batch([96, 40])
    weights = build(attn_implementation="eager")(batch, attention_mask=mask, output_attentions=True).attentions[0]
    assert (weights[1, :, :, 1 + 2 * MEL_PATCHES :] == 0).all()
    assert (weights[0] > 0).all()


@pytest.mark.parametrize("cls", CLASSES)
def test_tuple_output(cls):
    model = build(cls)
    values = spectrograms(2, 96)
    assert torch.equal(model(values, return_dict=False)[0], model(values)[0])


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = build(ASiTForAudioClassification, drop_path_rate=0.5).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        noise = torch.rand(2, 2, 4, generator=torch.Generator().manual_seed(0))
        model(spectrograms(4, 96), labels=torch.arange(4), drop_path_noise=noise).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[1].values())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)


def test_drop_path_follows_the_noise():
    model = build(drop_path_rate=0.6).train()
    values = spectrograms(4, 96)
    kept, dropped = torch.full((2, 2, 4), 0.99), torch.zeros(2, 2, 4)
    assert torch.equal(
        model(values, drop_path_noise=dropped).last_hidden_state,
        model(values, drop_path_noise=dropped).last_hidden_state,
    )
    mixed = kept.clone()
    mixed[:, :, 1] = 0  # drop only the branches of the second clip
    difference = (
        model(values, drop_path_noise=mixed).last_hidden_state - model(values, drop_path_noise=kept).last_hidden_state
    )
    assert (difference.abs().amax((1, 2)) > 1e-3).tolist() == [False, True, False, False]
    # the first layer has rate 0, so its branches are never dropped
    only_first = build(num_hidden_layers=1, drop_path_rate=0.6).train()
    assert torch.equal(
        only_first(values, drop_path_noise=dropped[:1]).last_hidden_state, only_first(values).last_hidden_state
    )


def test_drop_path_keeps_the_expectation_and_is_off_in_evaluation():
    values = spectrograms(1, 32)
    model = build(drop_path_rate=0.5, initializer_range=0.02)
    expected = build(initializer_range=0.02)(values).last_hidden_state
    assert torch.equal(model(values).last_hidden_state, expected)
    states = []
    layer = model.layers[1]
    layer.register_forward_hook(lambda module, inputs, output: states.append(output))
    model(values)
    model.train()(values.expand(4000, -1, -1))
    assert (states[1].std(0) > 0).any()
    torch.testing.assert_close(states[1].mean(0), states[0][0], rtol=0, atol=0.02)


@pytest.mark.parametrize("source", [1, 6, 37])
@pytest.mark.parametrize("target", [1, 2, 6, 12, 37, 62, 124])
def test_bicubic_resize_equals_torch(source, target):
    values = torch.randn(1, 3, source, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = nn.functional.interpolate(values, size=(target, 4), mode="bicubic", align_corners=False)
    weights = bicubic_resize_matrix(source, torch.tensor([target]), target + 3, dtype=torch.float64)
    assert weights.shape == (1, target + 3, source)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    resized = torch.einsum("ts,bcsf->bctf", weights[0, :target], values)
    torch.testing.assert_close(resized, expected)


@pytest.mark.parametrize("target", [6, 31, 62, 124])
def test_bicubic_resize_in_float32_equals_torch_up_to_rounding(target):
    values = 0.5 * torch.randn(1, 3, 37, 4, generator=torch.Generator().manual_seed(target))
    expected = nn.functional.interpolate(values, size=(target, 4), mode="bicubic", align_corners=False)
    resized = torch.einsum("ts,bcsf->bctf", bicubic_resize_matrix(37, torch.tensor([target]), target)[0], values)
    torch.testing.assert_close(resized, expected, rtol=0, atol=6e-6)


def test_bicubic_resize_of_many_sizes_at_once():
    sizes = torch.tensor([1, 5, 6, 9])
    together = bicubic_resize_matrix(6, sizes, 9)
    for size, weights in zip(sizes, together):
        torch.testing.assert_close(weights, bicubic_resize_matrix(6, size[None], 9)[0])
    torch.testing.assert_close(together[2, :6], torch.eye(6))


def test_resized_positions_get_gradients():
    model = build()
    model(spectrograms(1, 250)).pooler_output[:, 0].sum().backward()
    assert (model.embeddings.position_embeddings.grad[0].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("cls", CLASSES)
def test_save_and_load_are_bit_identical(cls, tmp_path):
    model = build(cls)
    model.save_pretrained(tmp_path)
    loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert not loaded.training
    values = spectrograms(2, 130)
    torch.testing.assert_close(loaded(values)[0], model(values)[0], rtol=0, atol=1e-6)  # memory alignment may differ
    state = loaded.state_dict()
    assert set(state) == set(model.state_dict())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("auto", "cls"),
    [
        (AutoModel, ASiTModel),
        (AutoModelForAudioClassification, ASiTForAudioClassification),
        (AutoModelForAudioFrameClassification, ASiTForAudioFrameClassification),
    ],
)
def test_auto_classes(auto, cls, tmp_path):
    model = build(cls)
    assert type(auto.from_config(model.config)) is cls
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is cls
    values = spectrograms(1, 96)
    torch.testing.assert_close(loaded(values)[0], model(values)[0], rtol=0, atol=1e-6)


def test_encoder_loads_from_a_classifier_and_back(tmp_path):
    classifier = build(ASiTForAudioClassification)
    classifier.save_pretrained(tmp_path / "classifier")
    encoder = AutoModel.from_pretrained(tmp_path / "classifier")
    values = spectrograms(1, 96)
    state = classifier.asit.state_dict()
    assert all(torch.equal(state[name], value) for name, value in encoder.state_dict().items())
    encoder.save_pretrained(tmp_path / "encoder")
    again, info = ASiTForAudioClassification.from_pretrained(
        tmp_path / "encoder", num_labels=7, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    torch.testing.assert_close(
        again.asit(values).last_hidden_state, encoder(values).last_hidden_state, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("cls", CLASSES)
def test_every_parameter_is_initialized_by_rule(cls, tmp_path):
    """A checkpoint without weights leaves every parameter to `_init_weights`."""
    config = ASiTConfig(**{**TINY, "initializer_range": 0.02, "num_labels": 5})
    config.save_pretrained(tmp_path)
    from safetensors.torch import save_file

    save_file({"unrelated": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = cls.from_pretrained(tmp_path)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.isfinite(value).all(), name
        if "layernorm" in name and name.endswith("weight"):
            assert (value == 1).all(), name
        elif name.endswith("bias") and "projection" not in name:
            assert (value == 0).all(), name
        elif "patch_embeddings.projection" in name:
            assert 0 < value.abs().max() <= 1 / 16 + 1e-6, name  # 16 x 16 inputs
        else:
            assert value.abs().max() <= 2  # truncated
            assert 0.01 < value.std() < 0.03, name


def test_initialization_is_reproducible():
    state, again, other = (build(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert not torch.equal(state["embeddings.cls_token"], other["embeddings.cls_token"])


def test_single_label_loss():
    model = build(ASiTForAudioClassification)
    labels = torch.tensor([1, 4, 0])
    outputs = model(spectrograms(3, 96), labels=labels)
    expected = -outputs.logits.log_softmax(-1)[torch.arange(3), labels].mean()
    torch.testing.assert_close(outputs.loss, expected)
    assert model.config.problem_type == "single_label_classification"
    hard = model(spectrograms(3, 96), labels=nn.functional.one_hot(labels, 5).float()).loss
    torch.testing.assert_close(hard, expected)


def test_soft_labels():
    model = build(ASiTForAudioClassification, problem_type="single_label_classification")
    targets = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)).softmax(-1)
    outputs = model(spectrograms(3, 96), labels=targets)
    torch.testing.assert_close(outputs.loss, -(targets * outputs.logits.log_softmax(-1)).sum(-1).mean())


@pytest.mark.parametrize("explicit", [True, False])
def test_multi_label_loss(explicit):
    model = build(ASiTForAudioClassification, problem_type="multi_label_classification" if explicit else None)
    targets = (torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    outputs = model(spectrograms(3, 96), labels=targets)
    probabilities = outputs.logits.sigmoid()
    expected = -(targets * probabilities.log() + (1 - targets) * (1 - probabilities).log()).mean()
    torch.testing.assert_close(outputs.loss, expected)
    if explicit:
        torch.testing.assert_close(model(spectrograms(3, 96), labels=targets.long()).loss, expected)


@pytest.mark.parametrize("num_labels", [1, 3])
def test_regression_loss(num_labels):
    model = build(ASiTForAudioClassification, num_labels=num_labels, problem_type="regression")
    targets = torch.randn(4, num_labels, generator=torch.Generator().manual_seed(0))
    outputs = model(spectrograms(4, 96), labels=targets)
    torch.testing.assert_close(outputs.loss, (outputs.logits - targets).square().mean())
    if num_labels == 1:
        torch.testing.assert_close(model(spectrograms(4, 96), labels=targets[:, 0]).loss, outputs.loss)


def test_one_label_means_regression():
    model = build(ASiTForAudioClassification, num_labels=1)
    model(spectrograms(2, 96), labels=torch.rand(2))
    assert model.config.problem_type == "regression"


def test_losses_are_float32_under_autocast():
    model = build(ASiTForAudioClassification)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(spectrograms(3, 96), labels=torch.tensor([0, 1, 2]))
    assert outputs.loss.dtype == torch.float32
    torch.testing.assert_close(outputs.loss, nn.functional.cross_entropy(outputs.logits.float(), torch.arange(3)))


def test_loss_does_not_take_trainers_item_count():
    """`accepts_loss_kwargs` keeps Trainer from scaling the loss itself because `forward` has `**kwargs`."""
    for cls in (ASiTForAudioClassification, ASiTForAudioFrameClassification):
        assert cls.accepts_loss_kwargs is False


def test_frame_loss_ignores_padding_and_unlabelled_time_patches():
    model = build(ASiTForAudioFrameClassification)
    batch, mask, _ = padded_batch([96, 40])
    labels = torch.tensor([[0, 1, 2, 3, -100, 4], [3, 1, 0, 0, 0, 0]])
    outputs = model(batch, attention_mask=mask, labels=labels)
    counted = torch.tensor([[1, 1, 1, 1, 0, 1], [1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    expected = nn.functional.cross_entropy(outputs.logits[counted], labels[counted])
    torch.testing.assert_close(outputs.loss, expected)
    labels[1, 2:] = 2
    assert torch.equal(model(batch, attention_mask=mask, labels=labels).loss, outputs.loss)
    assert not torch.equal(model(batch, labels=labels).loss, outputs.loss)


def test_frame_loss_of_multi_label_targets():
    model = build(ASiTForAudioFrameClassification)
    batch, mask, _ = padded_batch([96, 40])
    targets = (torch.rand(2, 6, 5, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    outputs = model(batch, attention_mask=mask, labels=targets)
    logits = torch.cat((outputs.logits[0], outputs.logits[1, :2]))
    expected = nn.functional.binary_cross_entropy_with_logits(logits, torch.cat((targets[0], targets[1, :2])))
    torch.testing.assert_close(outputs.loss, expected)


def test_frame_loss_without_labels_is_zero():
    model = build(ASiTForAudioFrameClassification)
    loss = model(spectrograms(2, 96), labels=torch.full((2, 6), -100)).loss
    assert loss.item() == 0
    loss.backward()


@pytest.mark.parametrize("cls", CLASSES)
def test_every_parameter_gets_a_gradient(cls):
    model = build(cls, pooling_mode="cls_mean").train()
    model(spectrograms(2, 96))[0].square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_equal_and_independent(duplicate):
    model = build(ASiTForAudioClassification)
    values = spectrograms(1, 96)
    twin = duplicate(model)
    assert torch.equal(twin(values).logits, model(values).logits)
    with torch.no_grad():
        twin.classifier.bias.add_(1)
    assert not torch.equal(twin(values).logits, model(values).logits)


def test_another_number_of_labels_must_be_requested_explicitly(tmp_path):
    build(ASiTForAudioClassification).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError):
        ASiTForAudioClassification.from_pretrained(tmp_path, num_labels=6)
    model = ASiTForAudioClassification.from_pretrained(tmp_path, num_labels=6, ignore_mismatched_sizes=True)
    assert model(spectrograms(1, 96)).logits.shape == (1, 6)


@pytest.mark.parametrize("frames", [96, 50, 16])
def test_patch_projection_on_accelerators_equals_the_convolution(frames):
    projection = build().embeddings.patch_embeddings.projection
    values = spectrograms(2, frames)[:, None]
    multiplied, convolved = projection.multiply(values), projection(values)
    assert multiplied.shape == convolved.shape
    torch.testing.assert_close(multiplied, convolved, rtol=1e-5, atol=1e-5)
    gradients = [
        torch.autograd.grad(output.square().sum(), projection.weight)[0] for output in (multiplied, convolved)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)
