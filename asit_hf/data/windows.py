"""The windows that long clips are cut into."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .audio import AudioReader, AudioReadError


@dataclass(frozen=True)
class Windows:
    """
    Windows of a clip, all numbers in samples at `sampling_rate`.

    Args:
        sampling_rate (`int`): in Hz.
        length (`int`): of a window. A shorter clip is one window.
        step (`int`): from the start of a window to that of the next.
        shortest (`int`, *optional*): a last window with at least so many samples is kept as it is, and a shorter one
            is dropped. By default the last window has the full length and ends with the clip.
        limit (`int`, *optional*): use only so many samples from the beginning of a clip.
    """

    sampling_rate: int
    length: int
    step: int
    shortest: int | None = None
    limit: int | None = None

    def read(self, reader: AudioReader) -> Iterator[tuple[int, np.ndarray, bool]]:
        """
        Yields the first sample, the waveform, and whether it is the last, of every window; two are in memory. What a
        window repeats of the one before is not read again.

        Raises:
            AudioReadError: see `AudioReader.read`. That the file is shorter than its header states is none.
        """
        start, window = 0, None
        while start is not None:
            repeated = np.zeros(0, np.float32) if window is None else window[1][start - window[0] :]
            first = start + len(repeated)
            try:
                fresh = reader.read(self.sampling_rate, first, min(start + self.length, self._total(reader)) - first)
            except AudioReadError:
                if window is not None and first >= reader.num_samples(self.sampling_rate):
                    break
                if window is not None:
                    yield *window, False
                raise
            if window is not None:
                yield *window, False
            window = start, np.concatenate([repeated, fresh]) if len(repeated) else fresh
            start = self._next(start, len(window[1]), self._total(reader))
        yield *window, True

    def _total(self, reader: AudioReader) -> int:
        total = reader.num_samples(self.sampling_rate)
        return total if self.limit is None else min(total, self.limit)

    def _next(self, start: int, length: int, total: int) -> int | None:
        """First sample of the next window, if there is one."""
        if self.shortest is not None:
            return start + self.step if start + self.step + self.shortest <= total else None
        if start + self.length >= total or length < self.length:
            return None
        return min(start + self.step, total - self.length)
