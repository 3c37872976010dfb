import numpy as np
import pytest

from asit_hf.finetuning.sampling import balanced_weights, class_weights

LABELS = [[0], [0, 1], [0], []]


def test_weights_by_hand():
    np.testing.assert_allclose(class_weights(LABELS, 3), [1000 / 3.01, 1000 / 1.01, 1000 / 0.01])
    np.testing.assert_allclose(balanced_weights(LABELS, 3), [1000 / 3.01, 1000 / 3.01 + 1000 / 1.01, 1000 / 3.01, 0.0])


def test_single_labels_equal_lists_of_one():
    np.testing.assert_array_equal(balanced_weights([2, 0, 2], 3), balanced_weights([[2], [0], [2]], 3))


@pytest.mark.parametrize("label", [3, -1, None])
def test_wrong_labels(label):
    with pytest.raises(ValueError, match=f"0 to 2, got {label}"):
        class_weights([0, label], 3)


def test_clips_without_labels():
    with pytest.raises(ValueError, match="2 clips"):
        balanced_weights([[], []], 3)
