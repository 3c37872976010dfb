import math

import pytest
import torch
from torch import nn

from asit_hf.pretraining import losses
from asit_hf.pretraining.losses import Center, patch_distillation_loss, reconstruction_loss, view_distillation_loss

STUDENT, TEACHER = 0.1, 0.05


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return nn.functional.normalize(normal(*shape, seed=seed), dim=-1)


def cross_entropy(student, teacher, center):
    """The definition in float64."""
    targets = ((teacher.double() - center.double()) / TEACHER).softmax(-1)
    return -(targets * (student.double() / STUDENT).log_softmax(-1)).sum(-1)


@pytest.mark.parametrize(("teachers", "students"), [(2, 2), (2, 6), (1, 3)])
def test_view_distillation_is_every_teacher_view_against_every_other_student_view(teachers, students):
    student, teacher, center = normal(4, students, 16), normal(4, teachers, 16, seed=1), normal(16, seed=2)
    student.requires_grad_()
    terms = [
        cross_entropy(student[:, s], teacher[:, t], center).mean()
        for t in range(teachers)
        for s in range(students)
        if s != t
    ]
    expected = torch.stack(terms).mean()
    loss = view_distillation_loss(student, teacher, center, STUDENT, TEACHER)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = [torch.autograd.grad(value, student)[0] for value in (loss, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def patch_inputs(patches: int = 50, prototypes: int = 24, bottleneck: int = 8) -> dict[str, torch.Tensor]:
    return {
        "student_features": unit(patches, bottleneck).requires_grad_(),
        "student_prototypes": unit(prototypes, bottleneck, seed=1).mul(1.5).requires_grad_(),
        "teacher_features": unit(patches, bottleneck, seed=2),
        "teacher_prototypes": unit(prototypes, bottleneck, seed=3),
        "center": normal(prototypes, seed=4) * 0.1,
    }


def plain_patch_loss(student_features, student_prototypes, teacher_features, teacher_prototypes, center):
    student = student_features.double() @ student_prototypes.double().T
    teacher = teacher_features.double() @ teacher_prototypes.double().T
    return cross_entropy(student, teacher, center).mean()


@pytest.mark.parametrize("chunk", [1, 7, 25, 50, 1000])
def test_patch_distillation_equals_its_definition(monkeypatch, chunk):
    monkeypatch.setattr(losses, "CHUNK_ROWS", chunk)
    inputs = patch_inputs()
    student = [inputs["student_features"], inputs["student_prototypes"]]
    expected = plain_patch_loss(**inputs)
    loss = patch_distillation_loss(**inputs, student_temperature=STUDENT, teacher_temperature=TEACHER)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours, theirs = (torch.autograd.grad(3 * value, student) for value in (loss, expected))
    for gradient, reference in zip(ours, theirs):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("wanted", ["student_features", "student_prototypes"])
def test_patch_distillation_with_a_single_trained_input(wanted):
    inputs = patch_inputs()
    expected = torch.autograd.grad(plain_patch_loss(**inputs), inputs[wanted])[0]
    for name, value in inputs.items():
        value.requires_grad_(name == wanted)
    loss = patch_distillation_loss(**inputs, student_temperature=STUDENT, teacher_temperature=TEACHER)
    loss.backward()
    torch.testing.assert_close(inputs[wanted].grad, expected, rtol=1e-4, atol=1e-6)
    assert all(value.grad is None for name, value in inputs.items() if name != wanted)


def test_patch_distillation_sends_no_gradient_to_the_teacher():
    inputs = patch_inputs()
    inputs["teacher_features"].requires_grad_()
    inputs["teacher_prototypes"].requires_grad_()
    patch_distillation_loss(**inputs, student_temperature=STUDENT, teacher_temperature=TEACHER).backward()
    assert inputs["student_features"].grad is not None
    assert inputs["teacher_features"].grad is None
    assert inputs["teacher_prototypes"].grad is None


def test_patch_distillation_refuses_a_second_derivative():
    inputs = patch_inputs()
    loss = patch_distillation_loss(**inputs, student_temperature=STUDENT, teacher_temperature=TEACHER)
    (gradient,) = torch.autograd.grad(loss.square(), inputs["student_features"], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), inputs["student_features"])


def test_patch_distillation_under_autocast_is_close():
    inputs = patch_inputs(patches=200, prototypes=64, bottleneck=32)
    student = [inputs["student_features"], inputs["student_prototypes"]]
    expected = plain_patch_loss(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = patch_distillation_loss(**inputs, student_temperature=STUDENT, teacher_temperature=TEACHER)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    for gradient, reference in zip(torch.autograd.grad(loss, student), torch.autograd.grad(expected, student)):
        assert gradient.dtype == torch.float32
        assert (gradient - reference).norm() < 0.05 * reference.norm()


def test_view_distillation_under_autocast_stays_in_float32():
    student, teacher, center = normal(4, 6, 64), normal(4, 2, 64, seed=1), normal(64, seed=2)
    expected = view_distillation_loss(student, teacher, center, STUDENT, TEACHER)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = view_distillation_loss(student, teacher, center, STUDENT, TEACHER)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_cross_entropy_of_equal_distributions_is_their_entropy():
    logits = torch.zeros(3, 2, 8)
    loss = view_distillation_loss(logits, logits, torch.zeros(8), STUDENT, TEACHER)
    assert loss.item() == pytest.approx(math.log(8), rel=1e-6)


def test_reconstruction_is_the_mean_over_corrupted_pixels():
    output, target = normal(2, 2, 8, 4), normal(2, 2, 8, 4, seed=1)
    mask = normal(2, 2, 8, 4, seed=2) > 0.3
    output.requires_grad_()
    loss = reconstruction_loss(output, target, mask)
    torch.testing.assert_close(loss, (output - target)[mask].abs().mean())
    loss.backward()
    assert (output.grad[~mask] == 0).all()
    assert reconstruction_loss(output, target, torch.zeros_like(mask)).item() == 0


def test_reconstruction_is_computed_in_float32():
    output, target = normal(2, 2, 64, 32).bfloat16(), normal(2, 2, 64, 32, seed=1).bfloat16()
    mask = torch.ones_like(output, dtype=torch.bool)
    loss = reconstruction_loss(output, target, mask)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (output.float() - target.float()).abs().mean())


def test_center_moves_towards_the_mean():
    center = Center(4, momentum=0.9)
    mean = torch.tensor([1.0, 2.0, 3.0, -4.0])
    center.accumulate(mean, 8)
    assert (center.center == 0).all()  # updated after use
    center.update()
    torch.testing.assert_close(center.center, 0.1 * mean)
    center.accumulate(mean, 8)
    center.update()
    torch.testing.assert_close(center.center, 0.19 * mean)


def test_center_of_micro_batches_equals_that_of_the_batch():
    rows = normal(12, 4)
    whole, parts = Center(4), Center(4)
    whole.accumulate(rows.mean(0), 12)
    for part in rows.split([3, 4, 5]):
        parts.accumulate(part.mean(0), len(part))
    whole.update()
    parts.update()
    torch.testing.assert_close(parts.center, whole.center)


def test_center_does_not_move_without_new_logits():
    center = Center(4)
    center.accumulate(torch.ones(4), 2)
    center.update()
    moved = center.center.clone()
    center.update()
    assert torch.equal(center.center, moved)


def test_center_is_part_of_the_state():
    assert set(Center(4).state_dict()) == {"center"}


def test_patches_of_weight_zero_are_excluded():
    inputs = patch_inputs()
    kept = torch.arange(50) % 3 == 0
    features = ("student_features", "teacher_features")
    some = {name: value.detach()[kept] if name in features else value for name, value in inputs.items()}
    some["student_features"].requires_grad_()
    expected = plain_patch_loss(**some)
    temperatures = {"student_temperature": STUDENT, "teacher_temperature": TEACHER}
    loss = patch_distillation_loss(**inputs, **temperatures, weights=kept.float())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours = torch.autograd.grad(loss, [inputs["student_features"], inputs["student_prototypes"]])
    theirs = torch.autograd.grad(expected, [some["student_features"], inputs["student_prototypes"]])
    torch.testing.assert_close(ours[0][kept], theirs[0], rtol=1e-4, atol=1e-6)
    assert (ours[0][~kept] == 0).all()
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("num_rows", "device", "expected"),
    [
        (75776, "cuda", 9472),  # 128 clips x 2 views x 296 patches: eight equal chunks
        (16384, "cuda", 16384),
        (100, "cuda", 100),
        (16411, "cuda", 16384),  # a prime number
        (75776, "cpu", 256),
    ],
)
def test_chunks_are_equal_on_accelerators_if_possible(num_rows, device, expected):
    assert losses.chunk_rows(num_rows, torch.device(device)) == expected
