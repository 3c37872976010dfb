"""What decodes audio: the interface of a decoder, and one for samples that are decoded already."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np


class AudioReadError(ValueError):
    """Audio that cannot be read: `source` is the file name (or "bytes", "array"), `reason` the cause."""

    def __init__(self, source: str, reason: str | None = None):
        if reason is None:  # DataLoader re-raises a worker's error from the text of its traceback
            source, reason = source.rstrip().rpartition("cannot read ")[2].split(": ", 1)
        super().__init__(source, reason)
        self.source = source
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot read {self.source}: {self.reason}"


class UnknownFormatError(AudioReadError):
    """A file that a decoder does not recognize; another one may."""


@dataclass(frozen=True)
class AudioInfo:
    """Format of a file: its `sampling_rate` in Hz, and at that rate its `num_samples` per channel."""

    sampling_rate: int
    num_samples: int
    num_channels: int

    @property
    def duration(self) -> float:  # in seconds
        return self.num_samples / self.sampling_rate


class Decoder(Protocol):
    """An open audio file or array. `info` may change in a `read` that finds fewer samples than it states."""

    info: AudioInfo

    def read(self, first: int, last: int) -> np.ndarray:
        """Samples `first` to `last` at the file's own rate: float32 (samples, channels), fewer at the end.

        Raises:
            AudioReadError: damaged or truncated.
        """

    def close(self) -> None: ...


class DecodedSamples:
    """Decoder of mono `samples` (samples,) in memory; `info` is that of what they were made from."""

    def __init__(self, samples: np.ndarray, info: AudioInfo):
        self.samples = samples
        self.info = info

    def read(self, first: int, last: int) -> np.ndarray:
        return self.samples[first:last, None]

    def close(self) -> None:
        pass
