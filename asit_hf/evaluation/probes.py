"""What frozen embeddings are worth: linear probes (logistic, ridge) and one of nearest neighbors."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ..utils.extras import extra
from .metrics import multi_label_metrics, single_label_metrics

# Strong to weak: each fit starts from the one before.
WEIGHT_DECAYS = tuple(10.0 ** np.arange(0, -6.5, -0.5))
# Of least squares: all come out of one decomposition.
RIDGE_WEIGHT_DECAYS = tuple(10.0 ** np.arange(2, -6.5, -0.5))
# The search ends when so many weaker ones in a row were no better: the weak ones take longest to fit.
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
    Logistic regression on standardized features. The weight decay is the one that scores best in cross-validation
    within the training set; then all of the training set is fitted with it. The test set takes no part in any choice.

    Args:
        train_x, test_x (`np.ndarray` of shape `(clips, dim)`): embeddings.
        train_y, test_y (`np.ndarray`): class ids `(clips,)` for multinomial regression, or 0-1 targets
            `(clips, classes)` for one binary regression a class.
        seed (`int`): draws the folds of the cross-validation; the same seed gives the same result.
        groups (`Sequence` of length `clips`, *optional*): of the training clips, such as speaker or fold: a group is
            either fitted or validated on.
        weight_decays (`Sequence[float]`): to choose from; the loss is the mean over clips + weight_decay / 2 * |W|^2.
        num_folds (`int`): of the cross-validation; fewer where there are fewer groups.

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
    best_score, best_decay, failures = -np.inf, None, 0
    for decay in sorted(weight_decays, reverse=True):
        weights = [_fit(x, y, num_classes, decay, start) for (x, _, y, _), start in zip(folds, weights)]
        scores = [metrics(_predict(fit, x), y)[name] for (_, x, _, y), fit in zip(folds, weights)]
        score = float(np.mean(scores))
        if score > best_score:
            best_score, best_decay, failures = score, float(decay), 0
        else:
            failures += 1
        if failures == PATIENCE:
            break

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
    As `linear_probe`, by least squares on 0-1 targets instead of logistic regression: in closed form, so it takes
    seconds where there are thousands of dimensions. The loss is half the mean over clips of the squared error, summed
    over classes, + weight_decay / 2 * |W|^2.
    """
    train_x, train_y, test_x, test_y = _check(train_x, train_y, test_x, test_y)
    name, metrics = _metric(train_y)
    num_classes, decays = _num_classes(train_y, test_y), sorted(weight_decays, reverse=True)
    scores = np.zeros(len(decays))
    folds = _folds(train_y, groups, num_folds, seed)
    for fitted, held_out in folds:
        x, other_x = _standardize(train_x[fitted], train_x[held_out])
        predictions = _ridge_predictions(x, train_y[fitted], other_x, num_classes, decays)
        scores += [metrics(prediction, train_y[held_out])[name] / len(folds) for prediction in predictions]
    best = int(scores.argmax())
    x, test_x = _standardize(train_x, test_x)
    (prediction,) = _ridge_predictions(x, train_y, test_x, num_classes, decays[best : best + 1])
    result = metrics(prediction, test_y)
    return {**result, f"validation_{name}": float(scores[best]), "weight_decay": float(decays[best])}


def knn_probe(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    k: int = 20,
    temperature: float = 0.07,
) -> dict[str, float]:
    """
    Vote of the `k` training clips nearest by cosine, weighted by exp(cosine / temperature). Arguments and result as in
    `linear_probe`; nothing is fitted or drawn.
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
        raise ValueError("embeddings hold values that are not finite (NaN or infinity)")
    return train_x, train_y, test_x, test_y


def _metric(labels: np.ndarray) -> tuple[str, Callable[[np.ndarray, np.ndarray], dict[str, float]]]:
    return ("accuracy", single_label_metrics) if labels.ndim == 1 else ("mAP", multi_label_metrics)


def _num_classes(train_y: np.ndarray, test_y: np.ndarray) -> int:
    return train_y.shape[1] if train_y.ndim == 2 else int(max(train_y.max(), test_y.max())) + 1


def _folds(
    labels: np.ndarray, groups: Sequence | None, num_folds: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Indices to fit on and to validate on, for every fold."""
    with extra("train"):
        from sklearn.model_selection import StratifiedGroupKFold
    groups = np.arange(len(labels)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    if len(groups) != len(labels):
        raise ValueError(f"expected a group for each of {len(labels)} clips, got {len(groups)}")
    num_groups = len(np.unique(groups))
    if num_groups < 2:
        raise ValueError("expected at least two groups, to validate on one, got 1")
    classes = labels if labels.ndim == 1 else np.zeros(len(labels), dtype=int)
    num_folds = max(2, min(num_folds, num_groups, int(np.bincount(classes).max())))
    splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
    return list(splitter.split(classes, classes, groups))


def _standardize(train_x: np.ndarray, other_x: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Both by the mean and spread of the first; a constant dimension becomes 0."""
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
        else:  # a sum over classes, so that each one's regression is as if alone
            loss = F.binary_cross_entropy_with_logits(logits, targets) * num_classes
        loss = loss + weight_decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def _ridge_predictions(
    x: torch.Tensor, labels: np.ndarray, other_x: torch.Tensor, num_classes: int, weight_decays: Sequence[float]
) -> list[np.ndarray]:
    """Scores `(other clips, classes)` of the fit with every weight decay; `x` is centerd."""
    targets = torch.as_tensor(labels)
    targets = (F.one_hot(targets, num_classes) if targets.dim() == 1 else targets).double()
    bias = targets.mean(0)
    x, other_x = x.double(), other_x.double()
    # of the two Gram matrices the smaller one; both have the same eigenvalues but zeros
    wide = x.shape[1] > x.shape[0]
    eigenvalues, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    projected = (other_x @ x.T if wide else other_x) @ vectors
    coordinates = vectors.T @ ((targets - bias) if wide else x.T @ (targets - bias))
    return [
        (projected @ (coordinates / (eigenvalues.clamp_min(0) + len(x) * decay)[:, None]) + bias).numpy()
        for decay in weight_decays
    ]


def _predict(weights: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor) -> np.ndarray:
    return F.linear(x, *weights).numpy()
