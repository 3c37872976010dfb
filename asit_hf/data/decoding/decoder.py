"""What decodes audio: the interface of a decoder, and one for samples that are decoded already."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO, Protocol

import numpy as np

from ...utils.names import local_path


class AudioReadError(ValueError):
    """Audio that cannot be read: `source` is the file name (or "bytes", "array"), `reason` the cause."""

    def __init__(self, source: str, reason: str | None = None):
        if reason is None:  # DataLoader re-raises a worker's error from the text of its traceback
            text = source.rstrip().rpartition("cannot read ")[2]
            ends = [match.start() for match in re.finditer(": ", text)]  # a name may have colons too
            end = next((end for end in ends if os.path.exists(local_path(text[:end]))), ends[0])
            source, reason = text[:end], text[end + 2 :]
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


class Links:
    """Decoder of the `links` of a chained or joined file, one after another; closes the `file` that they read.

    Raises:
        AudioReadError: links of different sampling rates.
    """

    def __init__(self, links: Sequence[Decoder], file: BinaryIO, name: str):
        rates = sorted({link.info.sampling_rate for link in links})
        if len(rates) > 1:
            raise AudioReadError(name, f"{len(links)} parts of different sampling rates, {rates} Hz: split it")
        self._links = links
        self._file = file

    @property
    def info(self) -> AudioInfo:
        infos = [link.info for link in self._links]
        channels = {info.num_channels for info in infos}
        num_channels = channels.pop() if len(channels) == 1 else 1
        return AudioInfo(infos[0].sampling_rate, sum(info.num_samples for info in infos), num_channels)

    def read(self, first: int, last: int) -> np.ndarray:
        parts, num_channels = [], self.info.num_channels
        for link in self._links:
            length = link.info.num_samples
            if first < length and last > 0:
                part = link.read(max(0, first), min(last, length))
                parts.append(part if part.shape[1] == num_channels else part.mean(axis=1, keepdims=True))
            first, last = first - length, last - length
        return np.concatenate(parts) if parts else np.zeros((0, num_channels), np.float32)

    def close(self) -> None:
        for link in self._links:
            link.close()
        self._file.close()
