"""
Probes of frozen embeddings: linear (logistic regression), ridge (least squares) and k nearest neighbors.

Pretraining runs `knn_probe` without scikit-learn, and the others are faster than its grid search: with 1600 x 384
training embeddings of 50 classes, `linear_probe` took 0.7 s of one core and LogisticRegression 1.5 s, `ridge_probe`
0.2 s and Ridge 0.9 s, with accuracies within 0.3 points (`examples/benchmarks/probes.py`). With 7200 x 9216,
`ridge_probe` took 40 s. `attentive_probe` is the probe of token sequences.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F

from ..utils.extras import extra
from .metrics import confidences, log_likelihoods, multi_label_metrics, single_label_metrics

logger = logging.getLogger(__name__)

WEIGHT_DECAYS = tuple(10.0 ** np.arange(0, -6.5, -0.5))
RIDGE_WEIGHT_DECAYS = tuple(10.0 ** np.arange(2, -6.5, -0.5))
FLOAT32_WEIGHT_DECAY = 0.01
FEW_SHOT_WEIGHT_DECAYS = tuple(10.0 ** np.arange(1, -2.5, -0.5))
FEW_SHOT_TEMPERATURES = tuple(2.0 ** np.arange(0, 3.5, 0.5))
# For one clip per class: near the best log-likelihood for 2 to 10 classes of ESC-50; accuracy hardly depends on it.
UNVALIDATED_WEIGHT_DECAY = 3.0
Labelled = tuple[np.ndarray, np.ndarray]  # embeddings and labels
Candidate = float | tuple[float, ...]  # a weight decay, or several settings
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
        `validation_mAP`. If every class has a single training clip, nothing can be validated: the weight decay is the
        largest candidate.

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


@dataclass(frozen=True)
class LinearClassifier:
    """
    Its logits are `x @ weight.T + bias`, with `weight` `(classes, dim)` and `bias` `(classes,)`, float32. They are
    those of the regression with this `weight_decay`, divided by `temperature`.
    `validation`: means over the folds of `accuracy`, `confidence` (the mean probability of what is predicted) and
    `log_likelihood`; empty if every class has a single clip.
    """

    weight: np.ndarray
    bias: np.ndarray
    weight_decay: float
    temperature: float
    validation: dict[str, float]


def fit_linear(
    x: np.ndarray,
    y: np.ndarray,
    seed: int = 0,
    groups: Sequence | None = None,
    weight_decays: Sequence[float] = FEW_SHOT_WEIGHT_DECAYS,
    num_folds: int = 5,
    temperatures: Sequence[float] = FEW_SHOT_TEMPERATURES,
) -> LinearClassifier:
    """
    Logistic regression for a classifier to keep, from two clips on. Cross-validation chooses the weight decay and the
    temperature by the log-likelihood, for scores that are probabilities; without a temperature, it would choose a
    decay that is too strong to tell the classes apart where a weaker one is too sure of itself. Features are centered
    and divided by one common scale: the standard deviations of single dimensions say little about a handful of clips.
    Arguments as in `linear_probe`.

    Raises:
        ValueError: non-finite embeddings, shapes that do not fit, or fewer than two groups.
    """
    x, y = np.asarray(x), np.asarray(y)
    x, y, num_clips, num_classes = _check((x, y), (x[:0], y[:0]))
    if num_clips < 2:
        raise ValueError(f"expected at least two clips, got {num_clips}")

    def fit(rows: np.ndarray) -> Callable[[float], tuple[np.ndarray, np.ndarray]]:
        mean = x[rows].mean(0)
        scale = np.sqrt(x[rows].var(0).mean()) or 1.0
        regression = logistic_regression(torch.as_tensor((x[rows] - mean) / scale), y[rows], num_classes)

        @cache
        def of_plain_features(decay: float) -> tuple[np.ndarray, np.ndarray]:
            weight, bias = (values.numpy() for values in regression(decay))
            return weight / scale, bias - (weight / scale) @ mean

        return of_plain_features

    def solver(fitted: np.ndarray, others: np.ndarray) -> Callable[[tuple[float, float]], np.ndarray]:
        classifier = fit(fitted)

        def predict(candidate: tuple[float, float]) -> np.ndarray:
            decay, temperature = candidate
            weight, bias = classifier(decay)
            return (x[others] @ weight.T + bias) / temperature

        return predict

    candidates = [(float(decay), float(temperature)) for decay in weight_decays for temperature in temperatures]
    (decay, temperature), validation = choose(
        *(solver, y, seed, groups, candidates, num_folds, PATIENCE * len(temperatures)),
        metrics=_probability_metrics,
        by="log_likelihood",
    )
    if not validation:
        decay, temperature = UNVALIDATED_WEIGHT_DECAY if len(weight_decays) > 1 else decay, min(temperatures)
    weight, bias = fit(np.arange(len(x)))(decay)
    return LinearClassifier(weight / temperature, bias / temperature, decay, temperature, validation)


def _probability_metrics(fitted: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The `validation` of a `LinearClassifier`. Classes without a fitted clip do not count in the likelihood."""
    known = _zero_one(fitted, scores.shape[1]).bool().any(0).numpy()
    counted = known[labels] if labels.ndim == 1 else np.broadcast_to(known, labels.shape)
    confidence, right = confidences(scores, labels)
    return {
        "accuracy": float(right.mean()),
        "confidence": float(confidence.mean()),
        "log_likelihood": float(log_likelihoods(scores, labels)[counted].sum() / max(counted.sum(), 1)),
    }


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
    training clips come first.
    """
    name, metrics = _metric(y)
    search = (y[:num_train], seed, groups, [*map(float, candidates)], num_folds, patience)
    best, validation = choose(solver, *search, metrics=lambda _, scores, labels: metrics(scores, labels), by=name)
    train, test = np.split(np.arange(len(y)), [num_train])
    result = metrics(solver(train, test)(best), y[test])
    if validation:
        result[f"validation_{name}"] = validation[name]
    else:
        logger.warning_once(f"every class has a single training clip: {chosen} is the largest candidate, {best:g}")
    return {**result, chosen: best}


def choose(
    solver: Callable[[np.ndarray, np.ndarray], Callable[[Candidate], np.ndarray]],
    labels: np.ndarray,
    seed: int,
    groups: Sequence | None,
    candidates: Sequence[Candidate],
    num_folds: int,
    patience: int,
    metrics: Callable[[np.ndarray, np.ndarray, np.ndarray], dict[str, float]],
    by: str,
) -> tuple[Candidate, dict[str, float]]:
    """
    The candidate with the best metric `by`, and the means over folds of all `metrics(fitted labels, scores, labels)`.
    The search goes from the largest candidate down. If every class has a single clip, nothing can be validated: the
    largest candidate, and no metrics. `solver` and the other arguments are as in `cross_validate`.
    """
    folds = [
        (solver(fitted, held_out), labels[fitted], labels[held_out])
        for fitted, held_out in _folds(labels, groups, num_folds, seed)
    ]
    candidates = sorted(candidates, reverse=True)
    best, validation, failures = candidates[0], {}, 0
    for candidate in candidates if folds else ():
        rows = [metrics(fitted, predict(candidate), held_out) for predict, fitted, held_out in folds]
        means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        if not validation or means[by] > validation[by]:
            best, validation, failures = candidate, means, 0
        else:
            failures += 1
        if failures == patience:
            break
    return best, validation


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
    """Indices of the clips to fit and to validate on, for every fold; no fold if every class has a single clip."""
    with extra("train"):
        from sklearn.model_selection import StratifiedGroupKFold
    groups = np.arange(len(labels)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    if len(groups) != len(labels):
        raise ValueError(f"expected a group for each of {len(labels)} clips, got {len(groups)}")
    num_groups = len(np.unique(groups))
    if num_groups < 2 <= len(labels):
        raise ValueError("expected at least two groups, one to validate on, got 1")
    classes = labels if labels.ndim == 1 else np.zeros(len(labels), dtype=int)
    largest = int(np.bincount(classes).max())
    if largest < 2:
        return []
    num_folds = max(2, min(num_folds, num_groups, largest))
    splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():  # of classes with fewer clips than folds
        warnings.simplefilter("ignore", UserWarning)
        return list(splitter.split(classes, classes, groups))


def _standardize(train_x: np.ndarray, other_x: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Both by the mean and std of the first. A dimension that varies by float32 rounding only becomes 0, where
    StandardScaler would scale the rounding errors up.
    """
    mean, std = train_x.mean(0), train_x.std(0)
    scale = np.where(std > 1e-6 * (np.abs(mean) + 1e-6), std, np.inf)
    if len(train_x) == 2:  # else every dimension would be -1 and 1, whether the clips differ much in it or hardly
        scale[scale < np.inf] = np.sqrt(np.square(std).mean())
    return torch.as_tensor((train_x - mean) / scale), torch.as_tensor((other_x - mean) / scale)


def _logistic_solver(
    x: np.ndarray, labels: np.ndarray, num_classes: int, fitted: np.ndarray, others: np.ndarray
) -> Callable[[float], np.ndarray]:
    """A solver for `cross_validate`, from features `x` `(clips, dim)`."""
    fitted_x, other_x = _standardize(x[fitted], x[others])
    fit = logistic_regression(fitted_x, labels[fitted], num_classes)
    return lambda decay: F.linear(other_x, *fit(decay)).numpy()


def logistic_regression(
    x: torch.Tensor, labels: np.ndarray, num_classes: int
) -> Callable[[float], tuple[torch.Tensor, torch.Tensor]]:
    """
    Fits by full-batch L-BFGS. Returns a function from a weight decay to the weight `(classes, dim)` and the bias
    `(classes,)`, which starts from its previous result. Arguments as in `linear_probe`, with features `x`
    `(clips, dim)` on one scale.
    """
    # Wide: L-BFGS from 0 never leaves the span of the clips, whose coordinates are fewer.
    basis = torch.linalg.qr(x.T)[0] if x.shape[1] > len(x) else None
    inputs, targets = x if basis is None else x @ basis, torch.as_tensor(labels)
    weight = torch.zeros(num_classes, inputs.shape[1], requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    tolerances = {"tolerance_grad": 1e-5, "tolerance_change": 1e-6}

    def fit(decay: float) -> tuple[torch.Tensor, torch.Tensor]:
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=500, history_size=20, line_search_fn="strong_wolfe", **tolerances
        )

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            logits = F.linear(inputs, weight, bias)
            if targets.dim() == 1:
                loss = F.cross_entropy(logits, targets)
            else:  # a sum over classes, so that each regression is independent of the others
                loss = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype)) * num_classes
            loss = loss + decay / 2 * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            return weight.clone() if basis is None else weight @ basis.T, bias.clone()

    return fit


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
