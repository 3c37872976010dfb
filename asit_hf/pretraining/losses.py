"""
The losses of ASiT ([arXiv 2211.13189](https://arxiv.org/abs/2211.13189)): global and local self-distillation and group
masked reconstruction. Equations and differences are those of the two official releases of the code, 2023 and 2024.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from ..utils.device import choices_for

# Patches in each chunk of `patch_distillation_loss`; `None`: the device's choice.
CHUNK_ROWS: int | None = None


class Center(nn.Module):
    """
    Moving average of the teacher's mean logits, which is subtracted from them so that no prototype dominates, as in
    [DINO](https://arxiv.org/abs/2104.14294), equation 4. Call `accumulate` in every forward pass and `update` once per
    optimizer step, which averages over all passes and processes.
    """

    def __init__(self, num_prototypes: int, momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(num_prototypes))
        self._sum: torch.Tensor | None = None

    @torch.no_grad()
    def accumulate(self, mean_logits: torch.Tensor, count: int) -> None:
        """Adds the mean of `count` rows of logits, `(num_prototypes,)`."""
        # sum and count in one tensor need only one all-reduce
        rows = torch.cat((mean_logits.float() * count, mean_logits.new_full((1,), count, dtype=torch.float32)))
        self._sum = rows if self._sum is None else self._sum + rows

    @torch.no_grad()
    def update(self) -> None:
        """Moves the center towards the accumulated mean and resets it."""
        if self._sum is None:
            return
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._sum)
        mean = self._sum[:-1] / self._sum[-1]
        self.center.mul_(self.momentum).add_(mean.to(self.center.dtype), alpha=1 - self.momentum)
        self._sum = None

    def forget(self) -> None:
        """Discards the accumulated logits."""
        self._sum = None


def view_distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    center: torch.Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> torch.Tensor:
    """
    Global self-distillation of CLS tokens: `-sum_k p_t[k] log p_s[k]` with
    `p_t = softmax((teacher_logits - center) / teacher_temperature)` and
    `p_s = softmax(student_logits / student_temperature)`, averaged over clips and over all pairs of a teacher view and
    a different student view: 2 pairs in 2023, and 10 in 2024, where the student also gets four local crops.

    Args:
        student_logits (`torch.Tensor` of shape `(batch, student views, prototypes)`): the teacher's views come first.
        teacher_logits (`torch.Tensor` of shape `(batch, teacher views, prototypes)`): logits of the teacher.
        center (`torch.Tensor` of shape `(prototypes,)`): subtracted from the teacher's logits.

    ```python
    >>> student, teacher = torch.randn(4, 6, 8192), torch.randn(4, 2, 8192)
    >>> loss = view_distillation_loss(student, teacher, torch.zeros(8192), 0.1, 0.04)
    ```
    """
    targets = ((teacher_logits.float() - center) / teacher_temperature).softmax(-1)
    log_probabilities = (student_logits.float() / student_temperature).log_softmax(-1)
    with torch.autocast(targets.device.type, enabled=False):  # half precision would round the product's inputs
        targets, log_probabilities = (rows.transpose(0, 1).flatten(1) for rows in (targets, log_probabilities))
        cross_entropies = -(targets @ log_probabilities.T) / len(student_logits)
    teachers, students = cross_entropies.shape
    if students < 2:
        raise ValueError(f"global self-distillation expects at least two student views, got {students}")
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
    Local self-distillation of patch tokens: the cross-entropy of [`view_distillation_loss`] between teacher and
    student for the same patch of the same view, averaged over all patches. Patches have 1024 prototypes of their own
    in 2023 and share the 8192 of the CLS token in 2024.

    Features are processed in chunks, whose gradients are computed together with their loss, so that the logits of all
    patches never exist at the same time.

    Args:
        student_features (`torch.Tensor` of shape `(patches, bottleneck)`): L2-normalized.
        student_prototypes (`torch.Tensor` of shape `(prototypes, bottleneck)`): logits are their dot products.
        teacher_features, teacher_prototypes: the teacher's, of the same shapes; they get no gradient.
        center, student_temperature, teacher_temperature: as in [`view_distillation_loss`].
        weights (`torch.Tensor` of shape `(patches,)`, *optional*): weight of each patch; 0 excludes it.
        count (`torch.Tensor` of shape `()`, *optional*): divisor of the sum instead of the sum of the weights.
        distill (`Callable`, *optional*): a compiled [`distill_rows`].

    ```python
    >>> features, prototypes = (F.normalize(torch.randn(n, 256), dim=-1) for n in (592, 1024))
    >>> loss = patch_distillation_loss(features, prototypes, features, prototypes, torch.zeros(1024), 0.1, 0.04)
    ```
    """
    total = _PatchDistillation.apply(
        student_features,
        student_prototypes,
        teacher_features,
        teacher_prototypes,
        center,
        (student_temperature, teacher_temperature),
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
    Sum of the cross-entropies of a chunk of patches in float32, and its gradients with respect to `student` and
    `student_matrix`. Features are `(rows, bottleneck)`, matrices the prototypes divided by the temperature,
    `(prototypes, bottleneck)`; `bias`, `(prototypes,)`, is subtracted from the teacher's logits.
    """
    # softmax and cross-entropy in float32, because half precision loses the tail of 8192 prototypes
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
    def forward(ctx, student, student_prototypes, teacher, teacher_prototypes, center, temperatures, weights, distill):
        student_temp, teacher_temp = temperatures
        device_type = student.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else student.dtype
        student, teacher = student.to(dtype), teacher.to(dtype)
        # divide the small matrices by the temperatures instead of the large logits
        student_matrix = (student_prototypes / student_temp).to(dtype)
        teacher_matrix = (teacher_prototypes / teacher_temp).to(dtype)
        bias = (center / teacher_temp).float()
        loss = torch.zeros((), device=student.device, dtype=torch.float32)
        ctx.features_grad = torch.empty_like(student)
        ctx.prototypes_grad = torch.zeros_like(student_prototypes, dtype=torch.float32)
        ctx.student_temp, ctx.dtype = student_temp, student_prototypes.dtype
        size = chunk_rows(len(student), student.device)
        with torch.autocast(device_type, enabled=False):
            for start in range(0, len(student), size):
                rows = slice(start, start + size)
                factors = None if weights is None else weights[rows]
                terms, ctx.features_grad[rows], matrix_grad = distill(
                    student[rows], teacher[rows], student_matrix, teacher_matrix, bias, factors
                )
                loss += terms
                ctx.prototypes_grad += matrix_grad.float()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        features_grad = prototypes_grad = None
        if ctx.needs_input_grad[0]:
            features_grad = ctx.features_grad * grad
        if ctx.needs_input_grad[1]:
            prototypes_grad = (ctx.prototypes_grad * (grad / ctx.student_temp)).to(ctx.dtype)
        ctx.features_grad = ctx.prototypes_grad = None  # free them even if the loss is kept
        return features_grad, prototypes_grad, *(None,) * 6


def chunk_rows(num_rows: int, device: torch.device) -> int:
    """Rows of each chunk: the device's maximum, or on an accelerator the same for all chunks if possible."""
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
    Reconstruction loss of group masked model learning: `sum(mask * |reconstruction - target|) / sum(mask)`, the L1
    distance averaged over corrupted pixels only, in both releases.

    Args:
        reconstruction, target (`torch.Tensor` of any equal shape): the student's output and the clean spectrogram.
        mask (`torch.Tensor` of the same shape): true for corrupted pixels.
        count (`torch.Tensor` of shape `()`, *optional*): divisor of the sum instead of the number of corrupted pixels.

    ```python
    >>> clean, mask = torch.randn(4, 2, 592, 128), torch.rand(4, 2, 592, 128) < 0.5
    >>> loss = reconstruction_loss(torch.zeros_like(clean), clean, mask)
    ```
    """
    mask = mask.to(torch.float32)
    distance = F.l1_loss(reconstruction.float(), target.float(), reduction="none")
    return (distance * mask).sum() / (mask.sum().clamp_min(1) if count is None else count)


def mean_over_processes(count: torch.Tensor) -> torch.Tensor:
    """
    Mean of a count (at least 1 in total) over processes. A sum divided by it, with gradients averaged over processes,
    is the mean over all of them, however unevenly the count is distributed.
    """
    count, processes = count.to(torch.float32), 1
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count)
        processes = dist.get_world_size()
    return count.clamp_min(1) / processes
