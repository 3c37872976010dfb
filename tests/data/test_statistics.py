from functools import reduce

import numpy as np
import pytest
import torch

from asit_hf import ASiTFeatureExtractor
from asit_hf.data.statistics import LogMelStatistics, log_mel_statistics


@pytest.fixture(scope="module")
def waveforms() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    sizes = generator.integers(400, 9000, size=12)
    return [10 ** generator.uniform(-4, 0) * generator.standard_normal(size, dtype=np.float32) for size in sizes]


def test_the_statistics_normalize_the_data_to_mean_0_and_std_one_half(waveforms):
    statistics = log_mel_statistics(iter(waveforms), num_mel_bins=32)
    extractor = ASiTFeatureExtractor(num_mel_bins=32, mean=statistics.mean, std=statistics.std)
    features = extractor(waveforms, sampling_rate=16000, padding=False)["input_values"]
    values = np.concatenate([np.ravel(clip) for clip in features]).astype(np.float64)
    assert statistics.clips == 12
    assert statistics.count == values.size
    assert values.mean() == pytest.approx(0, abs=1e-6)
    assert values.std() == pytest.approx(0.5, abs=1e-6)


def test_parts_add_up_to_the_whole(waveforms):
    whole = log_mel_statistics(waveforms)
    parts = [log_mel_statistics(part) for part in (waveforms[7:], waveforms[:1], waveforms[1:7])]
    merged = reduce(LogMelStatistics.__add__, parts)
    assert (merged.clips, merged.count) == (whole.clips, whole.count)
    assert merged.mean == pytest.approx(whole.mean, rel=1e-13)
    assert merged.std == pytest.approx(whole.std, rel=1e-13)
    # not the mean of means: the parts are of different sizes
    assert abs(np.mean([part.mean for part in parts]) - whole.mean) > 1e-2


def test_silence_and_nothing():
    silent = log_mel_statistics([np.zeros(16000, np.float32)])
    assert silent.mean == pytest.approx(np.log(torch.finfo(torch.float32).eps))
    assert silent.std == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="at least one clip"):
        log_mel_statistics([])
