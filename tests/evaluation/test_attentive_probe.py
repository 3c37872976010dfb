import numpy as np
import pytest
import torch

from asit_hf.evaluation.attentive_probe import (
    AttentiveClassifier,
    attentive_probe,
    fit_attentive_classifier,
    pad_tokens,
)

LAYERS, DIM, CLASSES = 3, 16, 4
OPTIONS = {"num_heads": 2, "num_epochs": 20}
SIGNAL_LAYER, MARK = 1, 0  # the class is in this layer, at the one time patch whose dimension MARK is high


def clips(seed: int, count: int = 120, lengths: tuple[int, ...] = (5, 9)) -> tuple[list[np.ndarray], np.ndarray, list]:
    """Noise but for one time patch of one layer; tokens, labels and the place of that time patch."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, CLASSES, count)
    tokens, places = [], []
    for label in labels:
        clip = generator.normal(size=(LAYERS, generator.choice(lengths), DIM)).astype(np.float16)
        place = int(generator.integers(clip.shape[1]))
        clip[SIGNAL_LAYER, place, MARK] += 8
        clip[SIGNAL_LAYER, place, 1 + label] += 8
        tokens.append(clip)
        places.append(place)
    return tokens, labels, places


TRAIN_X, TRAIN_Y, _ = clips(0)
TEST_X, TEST_Y, PLACES = clips(1, 60)


@pytest.fixture(scope="module")
def classifier() -> AttentiveClassifier:
    tokens = [torch.as_tensor(clip) for clip in TRAIN_X]
    return fit_attentive_classifier(tokens, TRAIN_Y, CLASSES, 0.03, num_heads=2, num_epochs=60)


def test_a_class_in_one_layer_at_one_time_is_found():
    options = {"learning_rates": [3e-2, 1e-4], **OPTIONS}
    result = attentive_probe((TRAIN_X, TRAIN_Y), (TEST_X, TEST_Y), **options)
    assert result["accuracy"] > 0.95
    assert result["validation_accuracy"] > 0.9
    assert result["learning_rate"] == 3e-2  # 1e-4 is too low for so few steps
    assert sum(result["layer_weights"]) == pytest.approx(1, abs=1e-5)
    assert np.argmax(result["layer_weights"]) == SIGNAL_LAYER
    again = attentive_probe((TRAIN_X, TRAIN_Y), (TEST_X, np.random.default_rng(0).permutation(TEST_Y)), **options)
    same = ("learning_rate", "validation_accuracy", "layer_weights")  # the test labels take no part in the fit
    assert [again[name] for name in same] == [result[name] for name in same]


def test_layer_weights_and_attention_are_where_the_class_is(classifier):
    assert classifier.layer_logits.softmax(0)[SIGNAL_LAYER] > 0.5
    with torch.no_grad():
        tokens, real = pad_tokens([torch.as_tensor(clip) for clip in TEST_X])
        attention = classifier.attention(classifier.mix(tokens), real)
    torch.testing.assert_close(attention.sum(-1), torch.ones(len(TEST_X), 2))
    assert (attention[~real[:, None].expand_as(attention)] == 0).all()
    assert (attention.mean(1).argmax(-1) == torch.tensor(PLACES)).float().mean() > 0.95
    assert attention[range(len(TEST_X)), :, PLACES].mean() > 0.4  # 1/5 or 1/9 if uniform


def test_a_padded_clip_gets_the_logits_it_gets_alone(classifier):
    chosen = [torch.as_tensor(clip) for clip in TEST_X[:8]]
    assert len({clip.shape[1] for clip in chosen}) > 1
    with torch.no_grad():
        together = classifier(*pad_tokens(chosen))
        alone = torch.cat([classifier(*pad_tokens([clip])) for clip in chosen])
    torch.testing.assert_close(together, alone)


def test_the_seed_decides_the_result():
    options = {"learning_rates": [1e-2], "num_folds": 2, "num_heads": 2, "num_epochs": 2}
    global_state = torch.get_rng_state()
    first, again, other = (
        attentive_probe((TRAIN_X, TRAIN_Y), (TEST_X, TEST_Y), seed, **options)["layer_weights"] for seed in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), global_state)


def test_multi_label():
    train_y, test_y = np.eye(CLASSES, dtype=int)[TRAIN_Y], np.eye(CLASSES, dtype=int)[TEST_Y]
    result = attentive_probe((TRAIN_X, train_y), (TEST_X, test_y), learning_rates=[3e-2], **OPTIONS)
    assert result["mAP"] > 0.95
    assert result["validation_mAP"] > 0.9


def test_the_scale_and_a_constant_dimension_do_not_matter():
    def changed(tokens: list[np.ndarray]) -> list[np.ndarray]:
        scaled = [clip.astype(np.float32) * 100 + 5 for clip in tokens]
        return [np.concatenate([clip, np.full_like(clip[..., :2], 7.0)], axis=-1) for clip in scaled]

    options = {"learning_rates": [3e-2], "num_folds": 2, **OPTIONS}
    assert attentive_probe((changed(TRAIN_X), TRAIN_Y), (changed(TEST_X), TEST_Y), **options)["accuracy"] > 0.95


def test_wrong_input():
    with pytest.raises(ValueError, match="of the embeddings' clips"):
        attentive_probe((TRAIN_X, TRAIN_Y[1:]), (TEST_X, TEST_Y))
    with pytest.raises(ValueError, match="same layers and dim"):
        attentive_probe((TRAIN_X, TRAIN_Y), ([clip[:2] for clip in TEST_X], TEST_Y))
    with pytest.raises(ValueError, match="same layers and dim"):
        attentive_probe((TRAIN_X, TRAIN_Y), ([clip[0] for clip in TEST_X], TEST_Y))
    with pytest.raises(ValueError, match="finite"):
        attentive_probe((TRAIN_X, TRAIN_Y), ([clip * np.nan for clip in TEST_X], TEST_Y))
    with pytest.raises(ValueError, match="num_heads that divides the width 16, got 3"):
        attentive_probe((TRAIN_X, TRAIN_Y), (TEST_X, TEST_Y), num_heads=3)
    with pytest.raises(ValueError, match="at least two groups"):
        attentive_probe((TRAIN_X, TRAIN_Y), (TEST_X, TEST_Y), groups=["a"] * len(TRAIN_X))
