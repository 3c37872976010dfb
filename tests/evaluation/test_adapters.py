import pytest
import torch
from tiny import MEL, build

from asit_hf import ASiTFeatureExtractor
from asit_hf.evaluation.adapters import WindowedModel, fingerprint, window_frames


@pytest.fixture(scope="module")
def extractor():
    return ASiTFeatureExtractor(num_mel_bins=MEL)


def test_a_fingerprint_is_of_weights_extractor_and_options(extractor):
    model = build()
    first = fingerprint(model, extractor, pooling="cls")
    assert first == fingerprint(build(), ASiTFeatureExtractor(num_mel_bins=MEL), pooling="cls")
    others = [
        fingerprint(build(seed=1), extractor, pooling="cls"),
        fingerprint(model, ASiTFeatureExtractor(num_mel_bins=MEL, mean=-3.0), pooling="cls"),
        fingerprint(model, extractor, pooling="mean"),
        fingerprint(model.half(), extractor, pooling="cls"),
    ]
    assert len({first, *others}) == 5


def test_windows_are_whole_time_patches(extractor):
    assert window_frames(build(num_frames=100), extractor) == 96
    assert window_frames(build(), extractor, 1.0) == 96
    assert all(window_frames(build(), extractor, patches * 0.16) == 16 * patches for patches in range(1, 300))


def test_time_patches_are_interleaved(extractor):
    """In windows of one time patch, each one is encoded alone."""
    model = WindowedModel(build(), extractor, window_seconds=0.16)
    input_values = torch.randn(2, 70, MEL, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for hop in (4, 8, 16):
            means, both = (model.time_patches(input_values, hop, concatenate_mel) for concatenate_mel in (False, True))
            starts = range(0, 70 - 16 + 1, hop)
            alone = [model.encoder(input_values[:, start : start + 16]).last_hidden_state[:, 1:] for start in starts]
            torch.testing.assert_close(both, torch.stack([tokens.flatten(1) for tokens in alone], 1))
            torch.testing.assert_close(means, torch.stack([tokens.mean(1) for tokens in alone], 1))
        with pytest.raises(ValueError, match="divide the patch size, 16, got 5"):
            model.time_patches(input_values, 5)
