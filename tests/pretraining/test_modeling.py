import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TINY
from torch import nn
from transformers import AutoModel, AutoModelForAudioClassification, AutoModelForPreTraining

from asit_hf import ASiTConfig, ASiTForAudioClassification, ASiTForPreTraining, ASiTModel
from asit_hf.pretraining.masking import GMML, corrupt
from asit_hf.pretraining.modeling import corrupted_patches

TINY = {**TINY, "initializer_range": 0.02}
PRESETS = {
    "2024": {},
    "2023": {
        "num_patch_prototypes": 32,
        "reconstruction_hidden_size": 40,
        "reconstruction_bottleneck_size": 24,
        "global_loss_weight": 1.0,
        "local_loss_weight": 1.0,
        "reconstruction_loss_weight": 2.0,
    },
}
LOSSES = ["global_loss", "local_loss", "reconstruction_loss"]


def build(seed: int = 0, preset: str = "2024", **kwargs) -> ASiTForPreTraining:
    torch.manual_seed(seed)
    return ASiTForPreTraining(ASiTConfig(**{**TINY, **PRESETS[preset], **kwargs})).train()


def inputs(batch: int = 3, frames: int = 96, crops: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(batch, 2, frames, 32, generator=generator)
    corrupted, mask = corrupt(clean, torch.arange(batch), seed, GMML())
    local = torch.randn(batch, crops, 48, 32, generator=generator) if crops else None
    return {
        "input_values": clean,
        "corrupted_values": corrupted,
        "corruption_mask": mask,
        "local_values": local,
        "teacher_temperature": 0.06,
    }


def move_student(model: ASiTForPreTraining, seed: int = 1) -> None:
    """Makes student, teacher and centers differ, as in the middle of training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in [*model.asit.parameters(), *model.heads.parameters()]:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        for center in (model.cls_center.center, model.patch_center.center):
            center.add_(torch.randn(center.shape, generator=generator) * 0.1)


# --- the forward pass ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", list(PRESETS))
def test_loss_is_the_weighted_sum(preset):
    model = build(preset=preset)
    outputs = model(**inputs())
    weights = [getattr(model.config, f"{name}_weight") for name in LOSSES]
    expected = sum(weight * outputs[name] for weight, name in zip(weights, LOSSES))
    torch.testing.assert_close(outputs.loss, expected)
    assert outputs.reconstruction.shape == (3, 2, 96, 32)
    assert all(torch.isfinite(outputs[name]) for name in LOSSES)


def test_monitored_values():
    model = build()
    outputs = model(**inputs(batch=8))
    assert 0 < outputs.cls_entropy <= np.log(64) + 1e-5
    assert 0 < outputs.patch_entropy <= np.log(64) + 1e-5
    assert 0 < outputs.feature_std < 1.5 / 48**0.5
    same = {name: value[:1].expand_as(value) for name, value in inputs(batch=8).items() if torch.is_tensor(value)}
    same["input_values"] = same["input_values"][:, :1].expand(-1, 2, -1, -1)
    assert model(**same).feature_std < 1e-5  # equal clips, as after a collapse


def test_trailing_frames_are_cut():
    model = build()
    batch = inputs(frames=105)
    outputs = model(**batch)
    assert outputs.reconstruction.shape == (3, 2, 96, 32)
    cut = {
        name: value[:, :, :96] if name != "local_values" else value for name, value in batch.items() if name[0] != "t"
    }
    torch.testing.assert_close(outputs.loss, model(**cut, teacher_temperature=0.06).loss)


def test_without_local_crops():
    model = build()
    outputs = model(**inputs(crops=0))
    assert outputs.global_loss > 0


def test_tuple_output():
    model = build()
    assert torch.equal(model(**inputs(), return_dict=False)[0], model(**inputs()).loss)


def test_autocast_keeps_losses_and_centers_in_float32():
    model = build()
    move_student(model)
    model.update_centers()
    expected = model(**inputs())
    model.update_centers()
    centers = [model.cls_center.center.clone(), model.patch_center.center.clone()]
    other = build()
    move_student(other)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = other(**inputs())
    other.update_centers()
    for name in (*LOSSES, "loss"):
        assert outputs[name].dtype == torch.float32
        assert outputs[name].item() == pytest.approx(expected[name].item(), rel=0.03)
    for center, reference in zip((other.cls_center.center, other.patch_center.center), centers):
        assert center.dtype == torch.float32
        assert (center - reference).abs().max() < 5e-4


def test_the_teachers_mean_logits_are_not_rounded_under_autocast():
    model = build()
    move_student(model)
    with torch.no_grad():
        center_before = model.patch_center.center.clone()
        features = {}
        model.teacher["heads"].distillation.register_forward_hook(
            lambda module, args, output: features.setdefault(output.shape[2] if output.dim() == 4 else 0, output)
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**inputs())
        model.update_centers()
        rows = features[12].flatten(0, 2)
        expected = 0.9 * center_before + 0.1 * (rows @ model.teacher["heads"].distillation.patch_weight().T).mean(0)
    torch.testing.assert_close(model.patch_center.center, expected, rtol=0, atol=1e-6)


# --- losses of weight zero -----------------------------------------------------------------------------------------


def count_calls(module: nn.Module) -> list:
    calls = []
    module.register_forward_hook(lambda *args: calls.append(1))
    return calls


@pytest.mark.parametrize(
    "off", [["global_loss"], ["local_loss"], ["reconstruction_loss"], ["global_loss", "local_loss"]]
)
@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_loss_of_weight_zero_is_not_computed(off, preset):
    batch = inputs()
    reference = build(preset=preset)(**batch)
    model = build(preset=preset, **{f"{name}_weight": 0.0 for name in off})
    student, teacher = count_calls(model.asit), count_calls(model.teacher["asit"])
    head = count_calls(model.heads.reconstruction)
    outputs = model(**batch)
    for name in LOSSES:
        if name in off:
            assert getattr(outputs, name) is None
        else:
            torch.testing.assert_close(getattr(outputs, name), reference[name])
    assert len(teacher) == (0 if {"global_loss", "local_loss"} <= set(off) else 1)
    assert len(student) == (1 if "global_loss" in off else 2)
    assert len(head) == (0 if "reconstruction_loss" in off else 1)
    outputs.loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_corrupted_patches_have_at_least_half_of_their_pixels_corrupted():
    mask = torch.zeros(1, 1, 48, 32, dtype=torch.bool)
    mask[0, 0, :16, :8] = True  # half of patch 0
    mask[0, 0, 16:32, 16:23] = True  # less than half of patch 3
    mask[0, 0, 32:, 16:] = True  # all of patch 5
    assert corrupted_patches(mask, 16).tolist() == [[[True, False, False, False, False, True]]]


def test_local_loss_on_corrupted_patches_only():
    batch = inputs()
    everything = batch | {"corruption_mask": torch.ones_like(batch["corruption_mask"])}
    nothing = batch | {"corruption_mask": torch.zeros_like(batch["corruption_mask"])}
    model, other = build(), build(local_loss_patches="corrupted")
    for each in (model, other):
        move_student(each)
    full = model(**batch).local_loss
    torch.testing.assert_close(other(**everything).local_loss, full)
    outputs = other(**nothing)
    assert outputs.local_loss == 0
    outputs.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in other.parameters() if p.grad is not None)

    # the loss is the mean of the losses of single patches
    terms = []
    for patch in range(12):
        mask = torch.zeros_like(batch["corruption_mask"])
        time, mel = (16 * index for index in divmod(patch, 2))
        mask[:, :, time : time + 16, mel : mel + 16] = True
        terms.append(other(**batch | {"corruption_mask": mask}).local_loss.item())
    assert len({round(term, 6) for term in terms}) == 12
    assert np.mean(terms) == pytest.approx(full.item(), rel=1e-4)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_only_the_student_gets_gradients(preset):
    model = build(preset=preset)
    model(**inputs()).loss.backward()
    for name, parameter in model.named_parameters():
        frozen = name.startswith("teacher.") or (preset == "2023" and name.endswith("weight_g"))
        assert parameter.requires_grad is not frozen, name
        assert (parameter.grad is None) is frozen, name


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = build(drop_path_rate=0.3)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**inputs(), drop_path_keys=torch.arange(3)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


# --- randomness ----------------------------------------------------------------------------------------------------


def test_drop_path_affects_only_the_student_and_follows_the_keys():
    model = build(drop_path_rate=0.5)
    keys, batch = torch.arange(3), inputs()
    outputs = model(**batch, drop_path_keys=keys)
    assert torch.equal(model(**batch, drop_path_keys=keys).loss, outputs.loss)
    assert not torch.equal(model(**batch, drop_path_keys=keys + 10).loss, outputs.loss)
    assert torch.equal(model(**batch, drop_path_keys=keys + 10).cls_entropy, outputs.cls_entropy)  # of the teacher
    without = build()(**batch)
    assert torch.equal(model.eval()(**batch, drop_path_keys=keys).loss, without.loss)


def test_drop_path_of_a_clip_depends_on_its_key_alone():
    model = build(drop_path_rate=0.5, global_loss_weight=0.0, local_loss_weight=0.0)
    batch = inputs(batch=5)
    keys = torch.arange(5)
    together = model(**batch, drop_path_keys=keys).reconstruction
    part = {name: value[3:] if torch.is_tensor(value) else value for name, value in batch.items()}
    alone = model(**part, drop_path_keys=keys[3:]).reconstruction
    torch.testing.assert_close(alone, together[3:], rtol=0, atol=1e-5)


# --- teacher and centers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", list(PRESETS))
def test_the_teacher_is_a_moving_average(preset):
    model = build(preset=preset)
    student = {name: value.clone() for name, value in model.asit.state_dict().items()}
    assert all(torch.equal(value, model.teacher["asit"].state_dict()[name]) for name, value in student.items())
    move_student(model)
    before = copy.deepcopy(model.teacher.state_dict())
    model.update_teacher(0.9)
    for name, value in model.teacher.state_dict().items():
        torch.testing.assert_close(value, 0.9 * before[name] + 0.1 * model.state_dict()[name])
    model.update_teacher(0.0)
    for name, value in model.teacher.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    move_student(model)
    frozen = copy.deepcopy(model.teacher.state_dict())
    model.update_teacher(1.0)
    assert all(torch.equal(value, frozen[name]) for name, value in model.teacher.state_dict().items())


def test_the_teacher_stays_in_evaluation_mode():
    model = build(drop_path_rate=0.5)
    assert model.asit.training
    assert not any(module.training for module in model.teacher.modules())
    assert not model.eval().asit.training


def test_centers_of_micro_batches_equal_those_of_the_batch():
    whole, parts = build(), build()
    batch = inputs(batch=6)
    whole(**batch)
    for rows in (slice(0, 2), slice(2, 6)):
        parts(**{name: value[rows] if torch.is_tensor(value) else value for name, value in batch.items()})
    for model in (whole, parts):
        assert (model.cls_center.center == 0).all()
        model.update_centers()
    for name in ("cls_center", "patch_center"):
        ours, reference = getattr(parts, name).center, getattr(whole, name).center
        assert reference.abs().max() > 0
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-7)


def test_evaluation_does_not_move_the_centers():
    model = build().eval()
    with torch.no_grad():
        model(**inputs())
    model.update_centers()
    assert (model.cls_center.center == 0).all()
    assert (model.patch_center.center == 0).all()


def test_a_few_steps_lower_the_loss():
    model = build(initializer_range=0.1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    batch, losses = inputs(batch=2, crops=0), []
    for _ in range(20):
        outputs = model(**batch)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_centers()
        model.update_teacher(0.99)
        losses.append(outputs.reconstruction_loss.item())
    assert losses[-1] < 0.95 * losses[0]


# --- saving and loading --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A pretraining checkpoint whose student, teacher and centers differ."""
    model = build()
    move_student(model)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("preset", list(PRESETS))
def test_save_and_load_are_bit_identical(preset, tmp_path):
    model = build(preset=preset)
    move_student(model)
    model.save_pretrained(tmp_path)
    loaded, info = ASiTForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    state = loaded.state_dict()
    assert set(state) == set(model.state_dict())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, parameter in loaded.named_parameters() if not parameter.requires_grad}


def test_auto_class(checkpoint):
    loaded = AutoModelForPreTraining.from_pretrained(checkpoint)
    assert type(loaded) is ASiTForPreTraining
    assert type(AutoModelForPreTraining.from_config(loaded.config)) is ASiTForPreTraining


@pytest.mark.parametrize(
    ("auto", "new"), [(AutoModel, set()), (AutoModelForAudioClassification, {"classifier.weight", "classifier.bias"})]
)
def test_encoder_and_classifier_load_the_students_encoder(checkpoint, auto, new):
    trained = ASiTForPreTraining.from_pretrained(checkpoint)
    loaded, info = auto.from_pretrained(checkpoint, output_loading_info=True)
    assert set(info["missing_keys"]) == new
    assert not info["unexpected_keys"]
    encoder = getattr(loaded, "asit", loaded)
    student, teacher = trained.asit.state_dict(), trained.teacher["asit"].state_dict()
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, student[name])
        assert not torch.equal(value, teacher[name])


def assert_fresh(model: ASiTForPreTraining) -> None:
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.isfinite(value).all(), name
        assert value.abs().max() < 3, name
    for name, value in model.teacher.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    for head in (model.heads, model.teacher["heads"]):
        assert (head.distillation.cls_prototypes.weight_g == 1).all()
        assert (head.distillation.cls_prototypes.weight_v.std() > 0.05).all()
        assert (head.distillation.fc1.bias == 0).all()
    for center in (model.cls_center.center, model.patch_center.center):
        assert (center == 0).all()


@pytest.mark.parametrize("cls", [ASiTModel, ASiTForAudioClassification])
def test_pretraining_starts_from_an_encoder(cls, tmp_path):
    torch.manual_seed(3)
    encoder = cls(ASiTConfig(**TINY))
    encoder.save_pretrained(tmp_path)
    model = ASiTForPreTraining.from_pretrained(tmp_path)
    assert_fresh(model)
    loaded = model.asit.state_dict()
    for name, value in getattr(encoder, "asit", encoder).state_dict().items():
        assert torch.equal(loaded[name], value)
    assert model.has_new_heads
    assert model.has_trained_encoder
    assert torch.isfinite(model.train()(**inputs()).loss)
    again = ASiTForPreTraining.from_encoder(getattr(encoder, "asit", encoder))
    assert_fresh(again)
    assert again.has_new_heads
    assert again.has_trained_encoder
    for name, value in again.asit.state_dict().items():
        assert torch.equal(loaded[name], value)


@pytest.mark.parametrize("preset", ["2024", "2023"])
def test_head_inputs_are_standardized_in_student_and_teacher(preset):
    model = build(preset=preset)
    tokens = 5 + torch.randn(50, TINY["hidden_size"]) * torch.arange(1, TINY["hidden_size"] + 1)
    before = copy.deepcopy(model.heads.distillation)
    model.standardize_head_inputs(tokens)
    standardized = (tokens - tokens.mean(0)) / tokens.std(0, correction=0)
    for heads in (model.heads, model.teacher["heads"]):
        torch.testing.assert_close(heads.distillation(tokens), before(standardized), atol=1e-5, rtol=0)


def test_a_model_knows_which_weights_are_trained(checkpoint):
    trained, new = ASiTForPreTraining.from_pretrained(checkpoint), ASiTForPreTraining(ASiTConfig(**TINY))
    assert trained.has_trained_encoder
    assert not trained.has_new_heads
    assert new.has_new_heads
    assert not new.has_trained_encoder
    more = ASiTForPreTraining.from_pretrained(checkpoint, num_patch_prototypes=trained.config.num_prototypes)
    assert more.has_trained_encoder
    assert not more.has_new_heads


def test_a_checkpoint_without_weights_gives_an_initialized_model(tmp_path):
    from safetensors.torch import save_file

    ASiTConfig(**TINY).save_pretrained(tmp_path)
    save_file({"unrelated": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = ASiTForPreTraining.from_pretrained(tmp_path)
    assert_fresh(model)
    assert not model.has_trained_encoder


def test_the_teacher_copies_heads_of_another_size(checkpoint):
    model = ASiTForPreTraining.from_pretrained(checkpoint, num_prototypes=16, ignore_mismatched_sizes=True)
    for name, value in model.teacher["heads"].distillation.cls_prototypes.state_dict().items():
        assert torch.equal(value, model.heads.distillation.cls_prototypes.state_dict()[name]), name


def test_unexpected_weights_are_reported(tmp_path):
    # the second model has no separate prototypes for patches
    build(preset="2023", num_patch_prototypes=64).save_pretrained(tmp_path)
    _, info = ASiTForPreTraining.from_pretrained(tmp_path, num_patch_prototypes=None, output_loading_info=True)
    assert any("patch_prototypes" in name for name in info["unexpected_keys"])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_equal_and_independent(duplicate):
    model = build()
    model(**inputs())  # accumulates logits for the centers
    twin = duplicate(model)
    assert torch.equal(twin(**inputs()).loss, model(**inputs()).loss)
    move_student(twin)
    assert not torch.equal(twin(**inputs()).loss, model(**inputs()).loss)


def test_prototypes_equal_torchs_weight_norm():
    prototypes = build().heads.distillation.cls_prototypes
    with torch.no_grad():
        prototypes.weight_g.uniform_(0.5, 2.0)
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(32, 64, bias=False))
    linear.parametrizations.weight.original0 = nn.Parameter(prototypes.weight_g.detach().clone())
    linear.parametrizations.weight.original1 = nn.Parameter(prototypes.weight_v.detach().clone())
    features = torch.randn(5, 32)
    torch.testing.assert_close(prototypes(features), linear(features))


def test_reconstruction_head_equals_a_transposed_convolution():
    head = build(preset="2023").heads.reconstruction
    tokens = torch.randn(2, 6 * 2, 48)
    hidden = tokens
    for layer in (head.fc1, head.fc2, head.fc3):
        hidden = nn.functional.gelu(layer(hidden))
    expected = head.projection(hidden.transpose(1, 2).unflatten(2, (6, 2)))[:, 0]
    torch.testing.assert_close(head(tokens), expected, rtol=1e-5, atol=1e-6)
