"""Mean and standard deviation of a data set's log-mel values, which normalize its spectrograms."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from ..feature_extraction_asit import ASiTFeatureExtractor


@dataclass(frozen=True)
class LogMelStatistics:
    """Sums over the log-mel values of some clips, in float64. `+` gives the statistics of two disjoint sets of clips,
    equal in any order up to rounding.
    """

    clips: int = 0
    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def __add__(self, other: "LogMelStatistics") -> "LogMelStatistics":
        return LogMelStatistics(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values())))

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def std(self) -> float:
        """Population standard deviation."""
        return max(0.0, self.squares / self.count - self.mean**2) ** 0.5


def log_mel_statistics(
    waveforms: Iterable[np.ndarray], sampling_rate: int = 16000, num_mel_bins: int = 128
) -> LogMelStatistics:
    """Statistics of the frames of all clips, without padding, one clip in memory at a time.

    Args:
        waveforms: mono `(samples,)`, at `sampling_rate` Hz.
        sampling_rate, num_mel_bins: those of the [`ASiTFeatureExtractor`] that will use the statistics.

    Raises:
        ValueError: no clip, or a clip that is empty or not finite.
    """
    # mean 0 and std 1/2 do not change the log-mel values
    extractor = ASiTFeatureExtractor(sampling_rate=sampling_rate, num_mel_bins=num_mel_bins, mean=0.0, std=0.5)
    statistics = LogMelStatistics()
    for waveform in waveforms:
        features = extractor(waveform, sampling_rate=sampling_rate, return_tensors="pt")
        values = features["input_values"].to(torch.float64)
        statistics += LogMelStatistics(1, values.numel(), float(values.sum()), float(values.square().sum()))
    if statistics.clips == 0:
        raise ValueError("expected at least one clip, got none")
    return statistics
