import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge

from asit_hf.evaluation.probes import fit_linear, knn_probe, linear_probe, logistic_regression, ridge_probe


def gaussians(seed: int, clips: int = 400, classes: int = 4, distance: float = 2.0, noise: int = 20):
    """Classes around their own centers, plus dimensions of noise on very different scales."""
    centers = np.random.default_rng(99).normal(size=(classes, 8)) * distance
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, clips)
    signal = centers[labels] + generator.normal(size=(clips, 8))
    scales = np.logspace(-3, 3, noise)
    return np.concatenate([signal, generator.normal(size=(clips, noise)) * scales], axis=1), labels


TRAIN_X, TRAIN_Y = TRAIN = gaussians(0)
TEST_X, TEST_Y = TEST = gaussians(1)


def one_hot(labels: np.ndarray) -> np.ndarray:
    return np.eye(4, dtype=int)[labels]


@pytest.mark.parametrize("probe", [linear_probe, ridge_probe])
def test_separable_classes_are_found_at_any_scale(probe):
    result = probe(TRAIN, TEST, seed=0)
    assert result["accuracy"] > 0.95
    assert result["validation_accuracy"] > 0.9
    scaled = probe((TRAIN_X * 1000 + 5, TRAIN_Y), (TEST_X * 1000 + 5, TEST_Y), seed=0)
    assert scaled["accuracy"] == pytest.approx(result["accuracy"], abs=0.01)


@pytest.mark.parametrize("probe", [linear_probe, ridge_probe])
def test_a_probe_is_deterministic(probe):
    first = probe(TRAIN, TEST, seed=3)
    assert probe(TRAIN, TEST, seed=3) == first


def test_the_seed_draws_the_validation_part():
    train_x, train_y = gaussians(0, distance=0.5)
    scores = {
        linear_probe((train_x, train_y), TEST, seed, weight_decays=[0.1])["validation_accuracy"] for seed in range(4)
    }
    assert len(scores) > 1


def test_the_fit_is_logistic_regression():
    train_x, train_y = gaussians(0, distance=0.5)
    test_x, test_y = gaussians(1, distance=0.5)
    decay = 0.01
    result = linear_probe((train_x, train_y), (test_x, test_y), weight_decays=[decay])
    mean, std = train_x.mean(0), train_x.std(0)
    reference = LogisticRegression(C=1 / (decay * len(train_x)), max_iter=2000, tol=1e-8)
    reference.fit((train_x - mean) / std, train_y)
    assert result["accuracy"] == pytest.approx(reference.score((test_x - mean) / std, test_y), abs=0.006)


@pytest.mark.parametrize("clips", [40, 400], ids=["wide", "tall"])
def test_the_closed_form_is_ridge_regression(clips):
    train_x, train_y = gaussians(0, clips=clips, distance=0.5, noise=60)
    test_x, test_y = gaussians(1, distance=0.5, noise=60)
    result = ridge_probe((train_x, train_y), (test_x, test_y), weight_decays=[0.1])
    mean, std = train_x.mean(0), train_x.std(0)
    reference = Ridge(alpha=0.1 * clips).fit((train_x - mean) / std, one_hot(train_y))
    accuracy = (reference.predict((test_x - mean) / std).argmax(-1) == test_y).mean()
    assert result["accuracy"] == pytest.approx(accuracy, abs=1e-6)


@pytest.mark.parametrize("probe", [linear_probe, ridge_probe])
def test_regularization_is_chosen_on_the_training_set(probe):
    """Few clips in many dimensions of noise: a strong decay is right, and the test labels cannot change the choice."""
    train_x, train_y = gaussians(0, clips=200, distance=0.7, noise=200)
    test_x, test_y = gaussians(1, distance=0.7, noise=200)
    chosen = probe((train_x, train_y), (test_x, test_y))
    weak = probe((train_x, train_y), (test_x, test_y), weight_decays=[1e-6])
    assert chosen["weight_decay"] > 1e-3
    assert chosen["accuracy"] > weak["accuracy"] + 0.02
    shuffled = probe((train_x, train_y), (test_x, np.random.default_rng(0).permutation(test_y)))
    assert shuffled["weight_decay"] == chosen["weight_decay"]


@pytest.mark.parametrize("probe", [linear_probe, ridge_probe])
def test_groups_are_not_split(probe):
    """Clips of one group are copies: split by clip they are recognized, split by group they are at chance."""
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 5)
    train_x, train_y = generator.normal(size=(40, 64))[groups], generator.integers(0, 4, 40)[groups]
    options = {"weight_decays": [1e-3], "seed": 0}
    leaky = probe((train_x, train_y), (TEST_X[:, :8].repeat(8, 1), TEST_Y), **options)
    honest = probe((train_x, train_y), (TEST_X[:, :8].repeat(8, 1), TEST_Y), groups=groups, **options)
    assert leaky["validation_accuracy"] > 0.9
    assert honest["validation_accuracy"] < 0.6


def test_a_constant_dimension_does_no_harm():
    def with_constant(x: np.ndarray, value: float) -> np.ndarray:
        return np.concatenate([x, np.full((len(x), 1), value)], axis=1)

    plain = linear_probe(TRAIN, TEST)
    other = linear_probe((with_constant(TRAIN_X, 0.1), TRAIN_Y), (with_constant(TEST_X, 100.0), TEST_Y))
    assert other["accuracy"] == pytest.approx(plain["accuracy"], abs=0.01)


def test_multi_label_probes():
    linear = linear_probe((TRAIN_X, one_hot(TRAIN_Y)), (TEST_X, one_hot(TEST_Y)))
    assert linear["mAP"] > 0.95
    assert linear["validation_mAP"] > 0.9
    assert ridge_probe((TRAIN_X, one_hot(TRAIN_Y)), (TEST_X, one_hot(TEST_Y)))["mAP"] > 0.95
    knn = knn_probe((TRAIN_X[:, :8], one_hot(TRAIN_Y)), (TEST_X[:, :8], one_hot(TEST_Y)))
    assert knn["mAP"] > 0.9


def test_few_clips_of_a_class():
    train_x, train_y = gaussians(0, clips=12)
    assert linear_probe((train_x, train_y), TEST)["accuracy"] > 0.25


@pytest.mark.parametrize(("probe", "strongest"), [(linear_probe, 1.25), (ridge_probe, 1.5)])
def test_one_clip_per_class_takes_the_strongest_weight_decay(probe, strongest, caplog):
    first = [list(TRAIN_Y).index(label) for label in range(4)]
    result = probe((TRAIN_X[first], TRAIN_Y[first]), TEST, weight_decays=[0.1, strongest, 0.01])
    assert result["weight_decay"] == strongest
    assert "validation_accuracy" not in result
    assert str(strongest) in caplog.text  # said once for each value
    assert result["accuracy"] > 0.25


def test_more_dimensions_than_clips_give_the_same_logistic_regression():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(30, 8))
    wide = np.concatenate([x, np.zeros((30, 60))], axis=1) @ np.linalg.qr(generator.normal(size=(68, 68)))[0]
    for labels in (np.arange(30) % 3, generator.integers(0, 2, (30, 3))):
        fits = [logistic_regression(torch.tensor(one, dtype=torch.float32), labels, 3) for one in (x, wide)]
        for decay in (1.0, 0.01):
            (weight, bias), (wide_weight, wide_bias) = (fit(decay) for fit in fits)
            assert wide_weight.shape == (3, 68)
            np.testing.assert_allclose(wide @ wide_weight.numpy().T, x @ weight.numpy().T, atol=2e-3)
            np.testing.assert_allclose(wide_bias, bias, atol=2e-3)


def test_fit_linear_is_logistic_regression_for_the_features_as_they_are():
    x, y = gaussians(0, clips=60, distance=0.5, noise=0)
    found = fit_linear(x * 3 + 7, y, weight_decays=[0.1], temperatures=[1.0])
    scale = np.sqrt((x * 3).var(0).mean())
    reference = LogisticRegression(C=1 / (0.1 * len(x)), max_iter=2000, tol=1e-8).fit(x * 3 / scale, y)
    logits = (x * 3 + 7) @ found.weight.T + found.bias
    np.testing.assert_allclose(
        logits - logits.mean(1, keepdims=True), reference.decision_function(x * 3 / scale), atol=2e-3
    )


def test_fit_linear_chooses_calibrated_scores():
    x, y = gaussians(0, clips=80, distance=0.6, noise=0)
    test_x, test_y = gaussians(1, distance=0.6, noise=0)
    found = fit_linear(x, y)
    scores = torch.tensor(test_x @ found.weight.T + found.bias).softmax(-1).numpy()
    accuracy = (scores.argmax(1) == test_y).mean()
    assert 0.4 < accuracy < 0.9
    assert scores.max(1).mean() == pytest.approx(accuracy, abs=0.1)
    assert found.validation["accuracy"] == pytest.approx(accuracy, abs=0.15)
    assert found.validation["confidence"] == pytest.approx(accuracy, abs=0.15)


def test_fit_linear_tells_classes_apart_that_are_hidden_by_what_clips_share():
    """As speakers hide digits: a strong decay would win by its caution alone, and guess."""
    draw = np.random.default_rng(0)
    speakers, digits = 6 * draw.normal(size=(5, 64)), draw.normal(size=(10, 64))

    def clips(count: int) -> tuple[np.ndarray, np.ndarray]:
        y = np.repeat(np.arange(10), count)
        return speakers[draw.integers(5, size=len(y))] + digits[y] + 3 * draw.normal(size=(len(y), 64)), y

    (x, y), (test_x, test_y) = clips(5), clips(20)
    found, cautious = fit_linear(x, y), fit_linear(x, y, temperatures=[1.0])
    right, guessed = ((test_x @ one.weight.T + one.bias).argmax(1) == test_y for one in (found, cautious))
    assert guessed.mean() < 0.2 < right.mean()
    assert found.temperature > 1
    assert found.validation["log_likelihood"] > cautious.validation["log_likelihood"]


def test_two_clips_are_compared_by_what_they_differ_in_most():
    """Scaled one by one, the 49 dimensions in which they hardly differ would outvote the first."""
    x = np.zeros((2, 50))
    x[:, 0], x[:, 1:] = (-1, 1), np.outer((-1, 1), np.full(49, 1e-3))
    test = np.array([[1.0, *[-0.5] * 49]])
    found = fit_linear(x, [0, 1])
    assert found.validation == {}
    assert (test @ found.weight.T + found.bias).argmax() == 1
    for probe in (linear_probe, ridge_probe):
        assert probe((x, [0, 1]), (test, [1]))["accuracy"] == 1


def test_identical_clips_and_classes_of_one_clip_give_finite_weights():
    for y in ([0, 1, 0, 1], [0, 0, 0, 1], [[1, 0], [1, 1], [1, 0], [1, 1]]):
        found = fit_linear(np.ones((4, 3)), y)
        assert np.isfinite(found.weight).all()
        assert np.isfinite([*found.bias, *found.validation.values()]).all()


def test_knn_by_hand():
    train_x = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    test_x = np.array([[5.0, 0.1], [0.1, 5.0]])
    assert knn_probe((train_x, [0, 1, 1]), (test_x, [0, 1]), k=1)["accuracy"] == 1
    # a low temperature follows the nearest, a high one the majority
    assert knn_probe((train_x, [0, 1, 1]), (test_x[:1], [0]), k=3, temperature=0.01)["accuracy"] == 1
    assert knn_probe((train_x, [0, 1, 1]), (test_x[:1], [0]), k=3, temperature=100.0)["accuracy"] == 0


@pytest.mark.parametrize("probe", [linear_probe, ridge_probe, knn_probe])
def test_wrong_input(probe):
    with pytest.raises(ValueError, match="of one width"):
        probe(TRAIN, (TEST_X[:, 1:], TEST_Y))
    with pytest.raises(ValueError, match="of the embeddings' clips"):
        probe((TRAIN_X, TRAIN_Y[1:]), TEST)
    with pytest.raises(ValueError, match="finite"):
        probe((TRAIN_X * np.nan, TRAIN_Y), TEST)


def test_wrong_options():
    with pytest.raises(ValueError, match="k from 1 to 400"):
        knn_probe(TRAIN, TEST, k=401)
    with pytest.raises(ValueError, match="at least two groups"):
        linear_probe(TRAIN, TEST, groups=["a"] * len(TRAIN_X))
    with pytest.raises(ValueError, match="a group for each"):
        linear_probe(TRAIN, TEST, groups=["a", "b"])
