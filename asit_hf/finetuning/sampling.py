"""Weights of classes and clips for imbalanced data."""

from collections.abc import Sequence

import numpy as np

# AST's values; a class without clips gets 1000 / 0.01, which no clip uses.
_NUMERATOR, _OFFSET = 1000.0, 0.01


def class_weights(labels: Sequence[int | Sequence[int]], num_classes: int) -> np.ndarray:
    """
    1000 / (count + 0.01) for each class, about the inverse of its frequency, `(num_classes,)` float64. `labels` are
    the class id of each clip, or a list of them; one that is missing or not in [0, num_classes) is a `ValueError`.
    """
    counts = np.bincount([one for label in labels for one in _ids(label, num_classes)], minlength=num_classes)
    return _NUMERATOR / (counts + _OFFSET)


def balanced_weights(labels: Sequence[int | Sequence[int]], num_classes: int) -> np.ndarray:
    """
    Sampling weight of each clip, `(clips,)` float64: the sum of `class_weights` over its labels. Sampling by it with
    replacement makes classes about equally frequent. Arguments and errors as in `class_weights`; also a `ValueError`
    if no clip has a label.
    """
    weights = class_weights(labels, num_classes)
    summed = np.array([weights[_ids(label, num_classes)].sum() for label in labels])
    if not summed.any():
        raise ValueError(f"expected clips with labels, got {len(summed)} clips without any")
    return summed


def _ids(label: int | Sequence[int], num_classes: int) -> list[int]:
    ids = list(label) if isinstance(label, (list, tuple, np.ndarray)) else [label]
    if any(one is None or not 0 <= one < num_classes for one in ids):
        raise ValueError(f"expected class ids from 0 to {num_classes - 1}, got {label!r}")
    return ids
