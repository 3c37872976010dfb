"""
Probes of frozen embeddings: linear (logistic regression), ridge (least squares) and k nearest neighbors.

They are not scikit-learn's estimators: LogisticRegression with `warm_start` took 27 s of one core where `linear_probe`
took 12 s (1200 x 384 embeddings of ESC-50, 50 classes) for an accuracy of 0.513 against 0.518, RidgeCV validates
without groups unless it solves anew for every weight decay, and pretraining runs `knn_probe` without scikit-learn.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ..utils.extras import extra
from .metrics import multi_label_metrics, single_label_metrics

# From strong to weak: each fit starts from the previous one.
WEIGHT_DECAYS = tuple(10.0 ** np.arange(0, -6.5, -0.5))
RIDGE_WEIGHT_DECAYS = tuple(10.0 ** np.arange(2, -6.5, -0.5))
FLOAT32_WEIGHT_DECAY = 0.01
# The search ends after this many weaker values in a row without a gain: weak ones take longest to fit.
PATIENCE = 3


def linear_probe(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    seed: int = 0,
    groups: Sequence | None = None,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    num_folds: int = 3,
) -> dict[str, float]:
    """
    Logistic regression on standardized features. Cross-validation within the training set chooses the weight decay,
    with which the whole training set is then fitted. The test set takes no part in any choice.

    Args:
        train_x, test_x (`np.ndarray` of shape `(clips, dim)`): embeddings.
        train_y, test_y (`np.ndarray`): class ids `(clips,)` for multinomial regression, or 0-1 targets
            `(clips, classes)` for one binary regression a class.
        seed (`int`): draws the folds of the cross-validation; the same seed gives the same result.
        groups (`Sequence` of length `clips`, *optional*): group of each training clip, such as its speaker; clips of
            one group are never split between fitting and validation.
        weight_decays (`Sequence[float]`): candidates; the loss is the mean over clips + weight_decay / 2 * |W|^2.
        num_folds (`int`): number of folds; fewer if there are fewer groups.

    Returns:
        The metrics of `asit_hf.evaluation.metrics` on the test set, `weight_decay`, and `validation_accuracy` or
        `validation_mAP`.

    Raises:
        ValueError: shapes that do not fit, or fewer than two groups.
    """
    train_x, train_y, test_x, test_y = _check(train_x, train_y, test_x, test_y)
    name, metrics = _metric(train_y)
    num_classes = _num_classes(train_y, test_y)
    folds = [
        (*_standardize(train_x[fitted], train_x[held_out]), train_y[fitted], train_y[held_out])
        for fitted, held_out in _folds(train_y, groups, num_folds, seed)
    ]
    weights = [None] * len(folds)

    def validate(decay: float) -> float:
        weights[:] = [_fit(x, y, num_classes, decay, start) for (x, _, y, _), start in zip(folds, weights)]
        return float(np.mean([metrics(_predict(fit, x), y)[name] for (_, x, _, y), fit in zip(folds, weights)]))

    best_decay, best_score = _choose_weight_decay(weight_decays, validate)
    x, test_x = _standardize(train_x, test_x)
    result = metrics(_predict(_fit(x, train_y, num_classes, best_decay), test_x), test_y)
    return {**result, f"validation_{name}": best_score, "weight_decay": best_decay}


def ridge_probe(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    seed: int = 0,
    groups: Sequence | None = None,
    weight_decays: Sequence[float] = RIDGE_WEIGHT_DECAYS,
    num_folds: int = 3,
) -> dict[str, float]:
    """
    The linear probe fitted by least squares on 0-1 targets, in closed form: the faster one for thousands of
    dimensions. The loss is half the squared error, summed over classes and averaged over clips,
    + weight_decay / 2 * |W|^2. Features are standardized once, by all training clips. Arguments and result as in
    `linear_probe`.
    """
    train_x, train_y, test_x, test_y = _check(train_x, train_y, test_x, test_y)
    name, metrics = _metric(train_y)
    num_clips, num_classes = len(train_x), _num_classes(train_y, test_y)
    x = torch.cat(_standardize(train_x, test_x)).double()
    # Wide: products of clips, computed once for all folds. Tall: the products of dimensions are the smaller matrix.
    gram = x @ x[:num_clips].T if x.shape[1] > num_clips else None
    targets = torch.as_tensor(train_y)
    targets = (F.one_hot(targets, num_classes) if targets.dim() == 1 else targets).double()

    folds = [
        (_ridge_solver(x, gram, targets, fitted, held_out), train_y[held_out])
        for fitted, held_out in _folds(train_y, groups, num_folds, seed)
    ]

    def validate(decay: float) -> float:
        return float(np.mean([metrics(predict(decay), labels)[name] for predict, labels in folds]))

    best_decay, best_score = _choose_weight_decay(weight_decays, validate)
    everything, test = np.arange(num_clips), np.arange(num_clips, len(x))
    result = metrics(_ridge_solver(x, gram, targets, everything, test)(best_decay), test_y)
    return {**result, f"validation_{name}": best_score, "weight_decay": best_decay}


def knn_probe(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    k: int = 20,
    temperature: float = 0.07,
) -> dict[str, float]:
    """
    Vote of the `k` training clips with the highest cosine similarity, weighted by exp(cosine / temperature).
    Arguments and result as in `linear_probe`; nothing is fitted or drawn.
    """
    train_x, train_y, test_x, test_y = _check(train_x, train_y, test_x, test_y)
    if not 1 <= k <= len(train_x):
        raise ValueError(f"k must be from 1 to the {len(train_x)} training clips, got {k}")
    _, metrics = _metric(train_y)
    targets = torch.as_tensor(train_y)
    if targets.dim() == 1:
        targets = F.one_hot(targets, _num_classes(train_y, test_y))
    train = F.normalize(torch.as_tensor(train_x), dim=-1)
    votes = []
    for batch in F.normalize(torch.as_tensor(test_x), dim=-1).split(1024):
        cosines, nearest = (batch @ train.T).topk(k)
        weights = (cosines / temperature).softmax(-1)
        votes.append((weights[..., None] * targets[nearest]).sum(1))
    return metrics(torch.cat(votes).numpy(), test_y)


def _check(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    train_x, test_x = np.asarray(train_x, dtype=np.float32), np.asarray(test_x, dtype=np.float32)
    train_y, test_y = np.asarray(train_y).astype(np.int64), np.asarray(test_y).astype(np.int64)
    if train_x.ndim != 2 or train_x.shape[1:] != test_x.shape[1:]:
        raise ValueError(f"expected embeddings (clips, dim) of one width, got {train_x.shape} and {test_x.shape}")
    if len(train_x) != len(train_y) or len(test_x) != len(test_y) or train_y.shape[1:] != test_y.shape[1:]:
        raise ValueError(
            "expected labels (clips,) or (clips, classes) of the embeddings' clips, "
            f"got {train_y.shape} for {train_x.shape} and {test_y.shape} for {test_x.shape}"
        )
    if not (np.isfinite(train_x).all() and np.isfinite(test_x).all()):
        raise ValueError("expected finite embeddings, got NaN or infinity")
    return train_x, train_y, test_x, test_y


def _metric(labels: np.ndarray) -> tuple[str, Callable[[np.ndarray, np.ndarray], dict[str, float]]]:
    return ("accuracy", single_label_metrics) if labels.ndim == 1 else ("mAP", multi_label_metrics)


def _choose_weight_decay(weight_decays: Sequence[float], validate: Callable[[float], float]) -> tuple[float, float]:
    """The best weight decay and its score, from strong to weak until `PATIENCE` in a row are no better."""
    best_decay, best_score, failures = None, -np.inf, 0
    for decay in sorted(map(float, weight_decays), reverse=True):
        score = validate(decay)
        if score > best_score:
            best_decay, best_score, failures = decay, score, 0
        else:
            failures += 1
        if failures == PATIENCE:
            break
    return best_decay, best_score


def _num_classes(train_y: np.ndarray, test_y: np.ndarray) -> int:
    return train_y.shape[1] if train_y.ndim == 2 else int(max(train_y.max(), test_y.max())) + 1


def _folds(
    labels: np.ndarray, groups: Sequence | None, num_folds: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Indices of the clips to fit and to validate on, for every fold."""
    with extra("train"):
        from sklearn.model_selection import StratifiedGroupKFold
    groups = np.arange(len(labels)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    if len(groups) != len(labels):
        raise ValueError(f"expected a group for each of {len(labels)} clips, got {len(groups)}")
    num_groups = len(np.unique(groups))
    if num_groups < 2:
        raise ValueError("expected at least two groups, one to validate on, got 1")
    classes = labels if labels.ndim == 1 else np.zeros(len(labels), dtype=int)
    num_folds = max(2, min(num_folds, num_groups, int(np.bincount(classes).max())))
    splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
    return list(splitter.split(classes, classes, groups))


def _standardize(train_x: np.ndarray, other_x: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Both by the mean and std of the first. A dimension that varies by float32 rounding only becomes 0, where
    StandardScaler would scale the rounding errors up.
    """
    mean, std = train_x.mean(0), train_x.std(0)
    scale = np.where(std > 1e-6 * (np.abs(mean) + 1e-6), std, np.inf)
    return torch.as_tensor((train_x - mean) / scale), torch.as_tensor((other_x - mean) / scale)


def _fit(
    x: torch.Tensor,
    labels: np.ndarray,
    num_classes: int,
    weight_decay: float,
    start: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight `(classes, dim)` and bias `(classes,)` at the minimum, by full-batch L-BFGS."""
    if start is None:
        start = torch.zeros(num_classes, x.shape[1]), torch.zeros(num_classes)
    weight, bias = (tensor.clone().requires_grad_() for tensor in start)
    targets = torch.as_tensor(labels) if labels.ndim == 1 else torch.as_tensor(labels, dtype=x.dtype)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=500,
        history_size=20,
        tolerance_grad=1e-5,
        tolerance_change=1e-6,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logits = F.linear(x, weight, bias)
        if targets.dim() == 1:
            loss = F.cross_entropy(logits, targets)
        else:  # a sum over classes, so that each regression is independent of the others
            loss = F.binary_cross_entropy_with_logits(logits, targets) * num_classes
        loss = loss + weight_decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def _ridge_solver(
    x: torch.Tensor, gram: torch.Tensor | None, targets: torch.Tensor, fitted: np.ndarray, others: np.ndarray
) -> Callable[[float], np.ndarray]:
    """
    Function from a weight decay to scores `(others, classes)` of the fit on `fitted`; both are indices of rows of `x`
    `(clips, dim)` and, in the wide case, of `gram` `(clips, training clips)`, their inner products.
    """
    bias = targets[fitted].mean(0)
    if gram is None:
        inputs, other_inputs = x[fitted], x[others]
        center = inputs.mean(0)
        inputs, other_inputs = inputs - center, other_inputs - center
        matrix, right = inputs.T @ inputs, inputs.T @ (targets[fitted] - bias)
    else:  # inner products of features that the fitted clips center
        matrix, other_inputs = gram[fitted][:, fitted], gram[others][:, fitted]
        mean = matrix.mean(0)
        matrix, other_inputs = matrix - mean - mean[:, None] + mean.mean(), other_inputs - mean
        right = targets[fitted] - bias

    def predict(decay: float) -> np.ndarray:
        # float32 is twice as fast and resolves the condition number of a strong decay
        system = matrix.float() if decay >= FLOAT32_WEIGHT_DECAY else matrix.clone()
        system.diagonal().add_(len(fitted) * decay)
        solution = torch.cholesky_solve(right.to(system.dtype), torch.linalg.cholesky(system))
        return (other_inputs @ solution.double() + bias).numpy()

    return predict


def _predict(weights: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor) -> np.ndarray:
    return F.linear(x, *weights).numpy()
