"""
Probes of frozen embeddings: linear (logistic regression), ridge (least squares) and k nearest neighbors.

Pretraining runs `knn_probe` without scikit-learn, and the others are faster than its grid search: with 1600 x 384
training embeddings of 50 classes, `linear_probe` took 0.7 s of one core and LogisticRegression 1.5 s, `ridge_probe`
0.2 s and Ridge 0.9 s, with accuracies within 0.3 points (`examples/benchmarks/probes.py`). With 7200 x 9216,
`ridge_probe` took 40 s. `attentive_probe` is the probe of token sequences.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F

from ..utils.extras import extra
from .metrics import multi_label_metrics, single_label_metrics

WEIGHT_DECAYS = tuple(10.0 ** np.arange(0, -6.5, -0.5))
RIDGE_WEIGHT_DECAYS = tuple(10.0 ** np.arange(2, -6.5, -0.5))
FLOAT32_WEIGHT_DECAY = 0.01
Labelled = tuple[np.ndarray, np.ndarray]  # embeddings and labels
# The search ends after this many weaker values in a row without a gain: weak ones take longest to fit.
PATIENCE, RIDGE_PATIENCE = 3, 6


def linear_probe(
    train: Labelled,
    test: Labelled,
    seed: int = 0,
    groups: Sequence | None = None,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    num_folds: int = 3,
) -> dict[str, float]:
    """
    Logistic regression on standardized features. Cross-validation within the training set chooses the weight decay,
    with which the whole training set is then fitted. The test set takes no part in any choice.

    Args:
        train, test (`tuple[np.ndarray, np.ndarray]`): embeddings `(clips, dim)` and their labels: class ids `(clips,)`
            for multinomial regression, or 0-1 targets `(clips, classes)` for one binary regression per class.
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
    x, y, num_train, num_classes = _check(train, test)
    solver = partial(_logistic_solver, x, y, num_classes)
    return cross_validate(solver, y, num_train, seed, groups, weight_decays, num_folds, PATIENCE)


def ridge_probe(
    train: Labelled,
    test: Labelled,
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
    x, y, num_train, num_classes = _check(train, test)
    x = torch.cat(_standardize(x[:num_train], x[num_train:]))
    # Wide: inner products of clips, computed once for all folds. Tall: those of dimensions are the smaller matrix.
    gram = cache(lambda dtype: _gram(x.to(dtype), num_train)) if x.shape[1] > num_train else None
    solver = partial(_ridge_solver, x, gram, _zero_one(y, num_classes))
    return cross_validate(solver, y, num_train, seed, groups, weight_decays, num_folds, RIDGE_PATIENCE)


def knn_probe(train: Labelled, test: Labelled, k: int = 20, temperature: float = 0.07) -> dict[str, float]:
    """
    Vote of the `k` training clips with the highest cosine similarity, weighted by exp(cosine / temperature).
    Arguments and result as in `linear_probe`; nothing is fitted or drawn.
    """
    x, y, num_train, num_classes = _check(train, test)
    if not 1 <= k <= num_train:
        raise ValueError(f"expected k from 1 to {num_train}, the number of training clips, got {k}")
    targets, x = _zero_one(y, num_classes), F.normalize(torch.as_tensor(x), dim=-1)
    votes = []
    for batch in x[num_train:].split(1024):
        cosines, nearest = (batch @ x[:num_train].T).topk(k)
        weights = (cosines / temperature).softmax(-1)
        votes.append((weights[..., None] * targets[nearest]).sum(1))
    return _metric(y)[1](torch.cat(votes).numpy(), y[num_train:])


PROBES = {"linear": linear_probe, "ridge": ridge_probe, "knn": knn_probe}


def _check(train: Labelled, test: Labelled) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Embeddings and labels of training, then test clips; the number of training clips, and that of classes."""
    xs = [np.asarray(x, dtype=np.float32) for x, _ in (train, test)]
    if xs[0].ndim != 2 or xs[0].shape[1:] != xs[1].shape[1:]:
        raise ValueError(f"expected embeddings (clips, dim) of one width, got {xs[0].shape} and {xs[1].shape}")
    labels = check_labels(train, test)
    x = np.concatenate(xs)
    if not np.isfinite(x).all():
        raise ValueError("expected finite embeddings, got NaN or infinity")
    return x, *labels


def check_labels(train: tuple[Sequence, np.ndarray], test: tuple[Sequence, np.ndarray]) -> tuple[np.ndarray, int, int]:
    """Labels of training, then test clips; the number of training clips, and that of classes."""
    counts = [len(x) for x, _ in (train, test)]
    ys = [np.asarray(y).astype(np.int64) for _, y in (train, test)]
    if counts != [*map(len, ys)] or ys[0].shape[1:] != ys[1].shape[1:]:
        raise ValueError(
            "expected labels (clips,) or (clips, classes) of the embeddings' clips, "
            f"got {ys[0].shape} for {counts[0]} clips and {ys[1].shape} for {counts[1]} clips"
        )
    y = np.concatenate(ys)
    if y.min() < 0:
        raise ValueError(f"expected class ids or 0-1 targets, got {y.min()}")
    return y, counts[0], y.shape[1] if y.ndim == 2 else int(y.max()) + 1


def _metric(labels: np.ndarray) -> tuple[str, Callable[[np.ndarray, np.ndarray], dict[str, float]]]:
    return ("accuracy", single_label_metrics) if labels.ndim == 1 else ("mAP", multi_label_metrics)


def _zero_one(labels: np.ndarray, num_classes: int) -> torch.Tensor:
    labels = torch.as_tensor(labels)
    return F.one_hot(labels, num_classes) if labels.dim() == 1 else labels


def cross_validate(
    solver: Callable[[np.ndarray, np.ndarray], Callable[[float], np.ndarray]],
    y: np.ndarray,
    num_train: int,
    seed: int,
    groups: Sequence | None,
    candidates: Sequence[float],
    num_folds: int,
    patience: int,
    chosen: str = "weight_decay",
) -> dict[str, float]:
    """
    The result of `linear_probe`. `solver(fitted, others)` returns a function from a candidate (a weight decay, or what
    `chosen` names) to the scores of clips `others` after a fit on clips `fitted`; both are indices of `y`, where
    training clips come first. The search goes from the largest candidate down.
    """
    name, metrics = _metric(y)
    splits = _folds(y[:num_train], groups, num_folds, seed)
    folds = [(solver(fitted, held_out), y[held_out]) for fitted, held_out in splits]
    best, best_score, failures = None, -np.inf, 0
    for candidate in sorted(map(float, candidates), reverse=True):
        score = float(np.mean([metrics(predict(candidate), labels)[name] for predict, labels in folds]))
        if score > best_score:
            best, best_score, failures = candidate, score, 0
        else:
            failures += 1
        if failures == patience:
            break
    del folds
    train, test = np.split(np.arange(len(y)), [num_train])
    result = metrics(solver(train, test)(best), y[test])
    return {**result, f"validation_{name}": best_score, chosen: best}


def check_folds(labels: np.ndarray, groups: Sequence | None = None) -> None:
    """
    Raises `ValueError` if the cross-validation of a probe cannot hold out clips and fit others, whose `labels` are as
    in `linear_probe`.
    """
    if len(labels) < 2:
        raise ValueError(f"expected at least two training clips, one to validate on, got {len(labels)}")
    for fitted, held_out in _folds(labels, groups, num_folds=3, seed=0):
        if not len(fitted) or not len(held_out):
            raise ValueError("expected training clips in every fold of the cross-validation, got an empty fold")


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
    largest = int(np.bincount(classes).max())
    if largest < 2:
        raise ValueError(f"expected two training clips of a class, one to validate on, got {len(labels)} of one each")
    num_folds = max(2, min(num_folds, num_groups, largest))
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


def _logistic_solver(
    x: np.ndarray, labels: np.ndarray, num_classes: int, fitted: np.ndarray, others: np.ndarray
) -> Callable[[float], np.ndarray]:
    """A solver for `cross_validate`, from features `x` `(clips, dim)`, by full-batch L-BFGS."""
    fitted_x, other_x = _standardize(x[fitted], x[others])
    targets = torch.as_tensor(labels[fitted])
    weight = torch.zeros(num_classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    tolerances = {"tolerance_grad": 1e-5, "tolerance_change": 1e-6}

    def predict(decay: float) -> np.ndarray:  # starts from the minimum at the previous decay
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=500, history_size=20, line_search_fn="strong_wolfe", **tolerances
        )

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            logits = F.linear(fitted_x, weight, bias)
            if targets.dim() == 1:
                loss = F.cross_entropy(logits, targets)
            else:  # a sum over classes, so that each regression is independent of the others
                loss = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype)) * num_classes
            loss = loss + decay / 2 * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return F.linear(other_x, weight, bias).detach().numpy()

    return predict


def _gram(x: torch.Tensor, num_clips: int) -> torch.Tensor:
    """Inner products `(clips, num_clips)` of all clips and the first ones, whose own are computed once per pair."""
    gram = x.new_empty(len(x), num_clips)
    for start in range(0, num_clips, 1024):
        block = slice(start, min(start + 1024, num_clips))
        gram[start:, block] = x[start:] @ x[block].T
        gram[block, block.stop :] = gram[block.stop : num_clips, block].T
    return gram


def _ridge_solver(
    x: torch.Tensor, gram: Callable | None, targets: torch.Tensor, fitted: np.ndarray, others: np.ndarray
) -> Callable[[float], np.ndarray]:
    """
    A solver for `cross_validate`, from features `x` `(clips, dim)` and, in the wide case, their inner products
    `gram(dtype)` `(clips, training clips)`.
    """

    @cache
    def system(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        bias = targets[fitted].to(dtype).mean(0)
        right = targets[fitted] - bias
        if gram is None:
            inputs, other_inputs = x[fitted].to(dtype), x[others].to(dtype)
            center = inputs.mean(0)
            inputs, other_inputs = inputs - center, other_inputs - center
            return inputs.T @ inputs, inputs.T @ right, other_inputs, bias
        matrix, other_inputs = gram(dtype)[fitted][:, fitted], gram(dtype)[others][:, fitted]
        mean = matrix.mean(0)  # subtracted so that the features of the fitted clips are centered
        return matrix - mean - mean[:, None] + mean.mean(), right, other_inputs - mean, bias

    def predict(decay: float) -> np.ndarray:
        # float32 is twice as fast and resolves the condition number of a strong decay
        matrix, right, other_inputs, bias = system(torch.float32 if decay >= FLOAT32_WEIGHT_DECAY else torch.float64)
        matrix = matrix.clone()
        matrix.diagonal().add_(len(fitted) * decay)
        return (other_inputs @ torch.cholesky_solve(right, torch.linalg.cholesky(matrix)) + bias).numpy()

    return predict
