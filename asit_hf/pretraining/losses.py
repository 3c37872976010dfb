"""The three losses of ASiT and the centers of the teacher's outputs."""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from ..utils.device import choices_for

# Rows whose logits over all prototypes exist at one time in `patch_distillation_loss`; `None`: as the device has it.
CHUNK_ROWS: int | None = None


class Center(nn.Module):
    """
    Moving average of the teacher's logits, subtracted from them so that no prototype wins always.

    `accumulate` is called once a forward pass, `update` once an optimizer step: the mean is over all passes and all
    processes since the last update.
    """

    def __init__(self, num_prototypes: int, momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(num_prototypes))
        self._sum: torch.Tensor | None = None

    @torch.no_grad()
    def accumulate(self, mean_logits: torch.Tensor, count: int) -> None:
        """Adds `count` rows whose mean is `mean_logits` of shape `(num_prototypes,)`."""
        # sum and count travel in one tensor, so that one all-reduce suffices
        rows = torch.cat((mean_logits.float() * count, mean_logits.new_full((1,), count, dtype=torch.float32)))
        self._sum = rows if self._sum is None else self._sum + rows

    @torch.no_grad()
    def update(self) -> None:
        """Moves the center towards the accumulated mean."""
        if self._sum is None:
            return
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._sum)
        mean = self._sum[:-1] / self._sum[-1]
        self.center.mul_(self.momentum).add_(mean.to(self.center.dtype), alpha=1 - self.momentum)
        self._sum = None

    def forget(self) -> None:
        """Drops what was accumulated."""
        self._sum = None


def view_distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    center: torch.Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> torch.Tensor:
    """
    Global self-distillation: every teacher view teaches every other student view; mean over pairs and clips.

    Args:
        student_logits (`torch.Tensor` of shape `(batch, student views, prototypes)`): the teacher's views come first.
        teacher_logits (`torch.Tensor` of shape `(batch, teacher views, prototypes)`).
        center (`torch.Tensor` of shape `(prototypes,)`): subtracted from the teacher's logits.
    """
    targets = ((teacher_logits.float() - center) / teacher_temperature).softmax(-1)
    log_probabilities = (student_logits.float() / student_temperature).log_softmax(-1)
    with torch.autocast(targets.device.type, enabled=False):  # it would round the product's inputs
        targets, log_probabilities = (rows.transpose(0, 1).flatten(1) for rows in (targets, log_probabilities))
        cross_entropies = -(targets @ log_probabilities.T) / len(student_logits)
    teachers, students = cross_entropies.shape
    if students < 2:
        raise ValueError("global self-distillation needs at least two student views")
    others = 1 - torch.eye(teachers, students, device=cross_entropies.device)
    return (cross_entropies * others).sum() / others.sum()


def patch_distillation_loss(
    student_features: torch.Tensor,
    student_prototypes: torch.Tensor,
    teacher_features: torch.Tensor,
    teacher_prototypes: torch.Tensor,
    center: torch.Tensor,
    student_temperature: float,
    teacher_temperature: float,
    weights: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
    distill: Callable | None = None,
) -> torch.Tensor:
    """
    Local self-distillation: cross-entropy between the teacher's and the student's prototype distributions of the same
    patch, mean over patches. The logits never stand whole in memory: rows are taken in chunks, and the gradient of a
    chunk is computed beside its loss.

    Args:
        student_features (`torch.Tensor` of shape `(patches, bottleneck)`): L2-normalized.
        student_prototypes (`torch.Tensor` of shape `(prototypes, bottleneck)`): logits are their products.
        teacher_features, teacher_prototypes: the teacher's, same shapes; no gradient flows into them.
        center (`torch.Tensor` of shape `(prototypes,)`): subtracted from the teacher's logits.
        weights (`torch.Tensor` of shape `(patches,)`, *optional*): a factor for each patch's term, 0 to leave it out.
        count (`torch.Tensor` of shape `()`, *optional*): what the sum is divided by instead of the number of patches,
            or of the sum of their weights.
        distill (`Callable`, *optional*): [`distill_rows`], compiled.
    """
    total = _PatchDistillation.apply(
        student_features,
        student_prototypes,
        teacher_features,
        teacher_prototypes,
        center,
        student_temperature,
        teacher_temperature,
        weights,
        distill or distill_rows,
    )
    if count is None:
        count = max(len(student_features), 1) if weights is None else weights.sum().clamp_min(1)
    return total / count


def distill_rows(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_matrix: torch.Tensor,
    teacher_matrix: torch.Tensor,
    bias: torch.Tensor,
    weights: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The sum of the cross-entropies of some rows, and its gradients.

    Args:
        student, teacher (`torch.Tensor` of shape `(rows, bottleneck)`).
        student_matrix, teacher_matrix (`torch.Tensor` of shape `(prototypes, bottleneck)`): divided by temperatures.
        bias (`torch.Tensor` of shape `(prototypes,)`): subtracted from the teacher's logits.
        weights (`torch.Tensor` of shape `(rows,)`, *optional*).

    Returns:
        The sum `()` in float32, and its gradients with respect to `student`, `(rows, bottleneck)`, and
        `student_matrix`, `(prototypes, bottleneck)`.
    """
    # softmax and cross-entropy in float32: in half precision the tail of 8192 prototypes is lost
    targets = (teacher @ teacher_matrix.T).float().sub_(bias).softmax(-1)
    log_probabilities = (student @ student_matrix.T).float().log_softmax(-1)
    terms = torch.linalg.vecdot(targets, log_probabilities)
    difference = log_probabilities.exp_().sub_(targets)
    if weights is not None:
        terms, difference = terms * weights, difference.mul_(weights[:, None])
    difference = difference.to(student.dtype)
    return -terms.sum(), difference @ student_matrix, difference.T @ student


class _PatchDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        student,
        student_prototypes,
        teacher,
        teacher_prototypes,
        center,
        student_temp,
        teacher_temp,
        weights,
        distill,
    ):
        device_type = student.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else student.dtype
        student, teacher = student.to(dtype), teacher.to(dtype)
        # the temperatures are folded into the small matrices instead of the large logits
        student_matrix = (student_prototypes / student_temp).to(dtype)
        teacher_matrix = (teacher_prototypes / teacher_temp).to(dtype)
        bias = (center / teacher_temp).float()
        loss = torch.zeros((), device=student.device, dtype=torch.float32)
        features_grad = torch.empty_like(student)
        prototypes_grad = torch.zeros_like(student_prototypes, dtype=torch.float32)
        size = chunk_rows(len(student), student.device)
        with torch.autocast(device_type, enabled=False):
            for start in range(0, len(student), size):
                rows = slice(start, start + size)
                factors = None if weights is None else weights[rows]
                terms, features_grad[rows], matrix_grad = distill(
                    student[rows], teacher[rows], student_matrix, teacher_matrix, bias, factors
                )
                loss += terms
                prototypes_grad += matrix_grad.float()
        ctx.features_grad = features_grad
        ctx.prototypes_grad = prototypes_grad
        ctx.student_temp = student_temp
        ctx.dtype = student_prototypes.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        features_grad = prototypes_grad = None
        if ctx.needs_input_grad[0]:
            features_grad = ctx.features_grad * grad
        if ctx.needs_input_grad[1]:
            prototypes_grad = (ctx.prototypes_grad * (grad / ctx.student_temp)).to(ctx.dtype)
        ctx.features_grad = ctx.prototypes_grad = None  # whoever holds on to the loss does not hold on to these
        return features_grad, prototypes_grad, *(None,) * 7


def chunk_rows(num_rows: int, device: torch.device) -> int:
    """
    Rows in each chunk: at most as many as suit the device, and on an accelerator the same number in every chunk if
    `num_rows` can be divided so.
    """
    choices = choices_for(device)
    most = choices.loss_rows if CHUNK_ROWS is None else CHUNK_ROWS
    if not choices.equal_chunks:
        return most
    fewest = -(-num_rows // most)
    return next((num_rows // chunks for chunks in range(fewest, 2 * fewest) if num_rows % chunks == 0), most)


def reconstruction_loss(
    reconstruction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, count: torch.Tensor | None = None
) -> torch.Tensor:
    """
    L1 distance, mean over the corrupted pixels only.

    Args:
        reconstruction, target (`torch.Tensor` of any equal shape): the student's output and the clean spectrogram.
        mask (`torch.Tensor` of the same shape): true where the student's input was corrupted.
        count (`torch.Tensor` of shape `()`, *optional*): what the sum is divided by instead of the mask's pixels.
    """
    mask = mask.to(torch.float32)
    distance = F.l1_loss(reconstruction.float(), target.float(), reduction="none")
    return (distance * mask).sum() / (mask.sum().clamp_min(1) if count is None else count)


def mean_over_processes(count: torch.Tensor) -> torch.Tensor:
    """
    A count, at least 1 in all, averaged over the processes. Divided by it, and with gradients averaged over the
    processes, a sum becomes the mean over all of them, however unevenly they share what is counted.
    """
    count, processes = count.to(torch.float32), 1
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count)
        processes = dist.get_world_size()
    return count.clamp_min(1) / processes
