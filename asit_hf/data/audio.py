"""Reading audio in any format of libsndfile: mono, resampled, decoding only the requested seconds."""

import io
import os
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from math import gcd
from typing import TYPE_CHECKING, Any

import numpy as np

from ..fbank_asit import whole_rate
from ..utils.extras import extra

if TYPE_CHECKING:  # imported where used: arrays need neither soundfile nor soxr
    import soundfile

# samples of context on each side of a window for the resampling filter, at the lower of the two rates
_RESAMPLING_CONTEXT = 256
# After a seek, the first mp3 frames lack data from earlier frames: up to 511 bytes, several frames at low bit rates.
_MPEG_LEAD_IN = 16 * 1152
# A seek into the last page of an Ogg Vorbis stream can be some samples off. A page has at most 255 packets of 1024
# samples (at the usual block size): a seek to before the last page is exact, and so is reading on from there.
_VORBIS_PAGE = 255 * 1024
# The last page of some intact files (Debian's naev-data) declares up to a block more than its packets hold.
_VORBIS_BLOCK = 8192
_BLOCK = 1 << 16  # libsndfile's Ogg encoder crashes on long blocks
# clearer words for messages of libsndfile; it reports any damaged mp3 with the first one
_REASONS = {
    "File does not exist or is not a regular file (possibly a pipe?)": "Format not recognised",
    "Unspecified internal error": "damaged: decoding failed",
}
# Programs that write wav to a pipe leave a placeholder of about this size in the header.
_UNKNOWN_WAV_SIZE = 0x7FFFF000
_WAV_DATA_CHUNK = re.compile(r"^data : (\d+) \(should be (\d+)\)", re.MULTILINE)


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


@dataclass(frozen=True)
class AudioInfo:
    """Format of a file: its `sampling_rate` in Hz, and at that rate its `num_samples` per channel."""

    sampling_rate: int
    num_samples: int
    num_channels: int

    @property
    def duration(self) -> float:  # in seconds
        return self.num_samples / self.sampling_rate


class AudioReader(AbstractContextManager):
    """An open audio source, from which windows are read; a context manager.

    Args:
        source: a path, `bytes`, a `{"path", "bytes"}` row of `datasets.Audio(decode=False)`, an
            `{"array", "sampling_rate"}` or `{"raw", "sampling_rate"}` dict, or a decoder with `get_all_samples()`
            (torchcodec). Paths that contain `://` are opened with fsspec (`hf://`, `zip://...::`).

    Raises:
        AudioReadError: missing, empty, damaged or truncated file, or no samples. Truncated mp3 and ogg files, whose
            headers have no reliable length, are read as far as possible.
        TypeError: a source of another type.
    """

    def __init__(self, source: Any):
        self._file: soundfile.SoundFile | None = None
        self._samples: np.ndarray | None = None
        self.name = source_name(source)
        if hasattr(source, "get_all_samples"):
            self._open_decoder(source)
        elif isinstance(source, dict) and ("array" in source or "raw" in source):
            self._open_array(source)
        else:
            self._open_file(source)
        if self.info.num_samples == 0:
            self.close()
            raise AudioReadError(self.name, "no samples")

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def num_samples(self, sampling_rate: int) -> int:
        """Samples of the whole source at `sampling_rate`; of an mp3, an estimate until a `read` finds fewer."""
        sampling_rate = whole_rate(sampling_rate)
        return (2 * self.info.num_samples * sampling_rate + self.info.sampling_rate) // (2 * self.info.sampling_rate)

    def read(self, sampling_rate: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Mono float32 `(samples,)` from `start`, at `sampling_rate`: `length` samples, or fewer at the end.

        They equal, up to rounding, those of the whole source resampled.

        Raises:
            AudioReadError: no samples at `start`, a damaged file, or samples that are not finite.
        """
        rate, sampling_rate = self.info.sampling_rate, whole_rate(sampling_rate)
        total = self.num_samples(sampling_rate)
        stop = total if length is None else min(start + length, total)
        if start >= stop:
            raise self._nothing_at(start / sampling_rate)
        if rate == sampling_rate:
            return self._decode(start, stop)
        # start at an instant that both rates share, so that the samples coincide with those of the whole source
        step = rate // gcd(rate, sampling_rate)
        context = _RESAMPLING_CONTEXT * max(1, -(-rate // sampling_rate))
        first = max(0, start * rate // sampling_rate - context) // step * step
        last = min(self.info.num_samples, -(-stop * rate // sampling_rate) + context)
        skipped = start - first * sampling_rate // rate
        waveform = resample(self._decode(first, last), rate, sampling_rate)[skipped : skipped + stop - start]
        if waveform.size == 0:
            raise self._nothing_at(start / sampling_rate)
        return waveform

    def _nothing_at(self, seconds: float) -> AudioReadError:
        return AudioReadError(self.name, f"nothing to read at {seconds:.3f} s, it lasts {self.info.duration:.3f} s")

    def _open_decoder(self, decoder: Any) -> None:
        try:
            samples = decoder.get_all_samples()
        except Exception as error:
            raise AudioReadError(self.name, f"decoding failed: {error}") from error
        channels = np.asarray(samples.data, dtype=np.float32)
        self._samples = _checked(channels.mean(axis=0), self.name)
        self.info = AudioInfo(int(samples.sample_rate), channels.shape[-1], channels.shape[0])

    def _open_array(self, source: dict) -> None:
        if source.get("sampling_rate") is None:
            raise AudioReadError(self.name, f"expected a sampling_rate with the array, got the keys {sorted(source)}")
        array = source["array"] if "array" in source else source["raw"]
        try:
            self._samples = to_mono_float(array)
        except ValueError as error:
            raise AudioReadError(self.name, str(error)) from error
        num_channels = int(np.prod(np.shape(array))) // self._samples.size
        self.info = AudioInfo(whole_rate(source["sampling_rate"]), self._samples.size, num_channels)

    def _open_file(self, source: Any) -> None:
        path, content = source, None
        if isinstance(source, (bytes, bytearray, memoryview)):
            path, content = None, source
        elif isinstance(source, dict):
            path, content = source.get("path"), source.get("bytes")
        elif source is not None and not isinstance(source, (str, os.PathLike)):
            expected = "a path, bytes, a dict with path, bytes, or array and sampling_rate, or a decoder as audio"
            raise TypeError(f"expected {expected}, got {type(source).__name__}")
        if path is None and content is None:
            keys = f" in {sorted(map(str, source))}, nor array and sampling_rate" if isinstance(source, dict) else ""
            raise AudioReadError(self.name, f"neither a path nor bytes{keys}")
        self._path, self._content = path, content
        self._file = self._open()
        self.info = AudioInfo(self._file.samplerate, self._file.frames, self._file.channels)
        cut = _WAV_DATA_CHUNK.search(self._file.extra_info) if self._file.format.startswith(("WAV", "RF64")) else None
        if cut and int(cut[1]) < _UNKNOWN_WAV_SIZE and int(cut[1]) > int(cut[2]):
            self.close()
            raise AudioReadError(self.name, f"truncated: its header declares {cut[1]} bytes of audio, it has {cut[2]}")

    def _open(self) -> "soundfile.SoundFile":
        with extra():
            import soundfile
        try:
            if self._content is None and "://" in os.fspath(self._path):
                self._content = _fetch(self._path)
            if self._content is not None:
                if len(self._content) == 0:
                    raise AudioReadError(self.name, "empty")
                return soundfile.SoundFile(io.BytesIO(self._content))
            with open(self._path, "rb") as file:
                if not file.read(1):
                    raise AudioReadError(self.name, "empty file")
            return soundfile.SoundFile(self._path)
        except FileNotFoundError as error:
            raise AudioReadError(self.name, "no such file") from error
        except OSError as error:
            raise AudioReadError(self.name, error.strerror or str(error)) from error
        except soundfile.LibsndfileError as error:
            raise AudioReadError(self.name, _reason(error)) from error

    def _decode(self, first: int, last: int) -> np.ndarray:
        """Samples `first` to `last` at the source's own rate."""
        if self._samples is not None:
            return self._samples[first:last]
        import soundfile

        # one call for lead-in and window, as soundfile seeks after every call
        try:
            begin = self._seek(max(0, first - self._lead_in(first)))
            frames = self._file.read(last - begin, dtype="float32", always_2d=True)[first - begin :]
        except soundfile.LibsndfileError as error:
            raise AudioReadError(self.name, _reason(error)) from error
        if len(frames) < last - first:
            self._ended_early(first, len(frames))
        return _checked(frames[:, 0] if frames.shape[1] == 1 else frames.mean(axis=1), self.name)

    def _ended_early(self, first: int, count: int) -> None:
        """Fewer samples than declared: an error, except in mp3 and vorbis' last block, where `info` is corrected."""
        missing = self.info.num_samples - first - count
        if not self._is_mpeg() and not (self._file.subtype == "VORBIS" and missing <= _VORBIS_BLOCK):
            declared = f"its header declares {self.info.num_samples} samples"
            raise AudioReadError(self.name, f"damaged or truncated: {declared}, got none from {first + count} on")
        total = first + count
        if count == 0:
            self._seek(0)
            total = sum(iter(lambda: len(self._file.read(1 << 20, dtype="float32")), 0))
        self.info = replace(self.info, num_samples=total)
        if count == 0:
            raise self._nothing_at(first / self.info.sampling_rate)

    def _lead_in(self, first: int) -> int:
        """Samples to decode before `first` so that those from `first` on are decoded as in the whole file."""
        if self._is_mpeg():
            return _MPEG_LEAD_IN
        if self._file.subtype == "VORBIS":
            return max(0, first - (self.info.num_samples - _VORBIS_PAGE))
        return 0

    def _is_mpeg(self) -> bool:
        return self._file.subtype.startswith("MPEG")

    def _seek(self, frame: int) -> int:
        """Seek to `frame`, or to the beginning if the file cannot be sought; return the position."""
        import soundfile

        try:
            if self._file.tell() == frame or self._file.seek(frame) == frame:
                return frame
        except soundfile.LibsndfileError:
            pass
        self._file.close()
        self._file = self._open()
        return 0


def audio_info(source: Any) -> AudioInfo:
    """Rate, length and channels of `source` (see `AudioReader`); of a file, only the header is read."""
    with AudioReader(source) as reader:
        return reader.info


def read_audio(source: Any, sampling_rate: int, offset: float = 0.0, duration: float | None = None) -> np.ndarray:
    """Read seconds `offset` to `offset + duration` of `source` (see `AudioReader`) as mono float32 `(samples,)`.

    Only these seconds are decoded. The result is at `sampling_rate` Hz and in [-1, 1], but float audio beyond that
    range is not clipped. A DC offset is kept. A window that passes the end is shorter.

    Raises:
        AudioReadError: unreadable audio, or an offset at or past its end.
        ValueError: a negative offset, or a duration that is not positive.
    """
    sampling_rate = whole_rate(sampling_rate)
    if offset < 0 or (duration is not None and duration <= 0):
        raise ValueError(f"expected offset >= 0 and duration > 0 seconds, got {offset} and {duration}")
    start = round(offset * sampling_rate)
    length = None if duration is None else max(1, round((offset + duration) * sampling_rate) - start)
    with AudioReader(source) as reader:
        return reader.read(sampling_rate, start, length)


def to_mono_float(array: Any) -> np.ndarray:
    """Mono float32 `(samples,)` from an array, list or tensor: the mean of the channels, which are the shorter axis.

    Integers of 8 to 32 bits are scaled by the range of their type, unsigned ones after centering; floats are not.

    Raises:
        ValueError: no samples, samples that are not finite, 64-bit integers, or a shape that is not `(samples,)`,
            `(channels, samples)` or `(samples, channels)`.
    """
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array
    array = np.asarray(array)
    if array.size == 0:
        raise ValueError("no samples")
    if array.dtype.kind in "iu" and array.dtype.itemsize <= 4:
        limit = 2.0 ** (8 * array.dtype.itemsize - 1)
        array = array / limit - (1.0 if array.dtype.kind == "u" else 0.0)
    elif array.dtype.kind != "f":
        raise ValueError(f"expected floats or integers of 8 to 32 bits, got {array.dtype}")
    if array.ndim == 2 and (array.shape[0] != array.shape[1] or array.size == 1):
        array = array.mean(axis=int(np.argmin(array.shape)))
    elif array.ndim != 1:
        raise ValueError(f"expected (samples,), (channels, samples) or (samples, channels), got shape {array.shape}")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError("samples that are not finite")
    return array


def resample(waveform: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Resample `(samples,)` from one rate in Hz to another: `round(samples * to_rate / from_rate)` samples."""
    from_rate, to_rate = whole_rate(from_rate), whole_rate(to_rate)
    if from_rate == to_rate:
        return waveform
    with extra():
        import soxr
    return soxr.resample(waveform, from_rate, to_rate, quality="HQ")


def encode_audio(samples: np.ndarray, sampling_rate: int, format: str, subtype: str, **options: Any) -> bytes:
    """Mono `(samples,)` as the content of a file in one of libsndfile's formats, for instance "OGG" and "OPUS"."""
    with extra():
        import soundfile
    content = io.BytesIO()
    with soundfile.SoundFile(content, "w", sampling_rate, 1, subtype, format=format, **options) as file:
        for start in range(0, len(samples), _BLOCK):
            file.write(samples[start : start + _BLOCK])
    return content.getvalue()


def source_name(source: Any) -> str:
    """Name of a source in messages and reports: its path, or "bytes", "array" or its type."""
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, dict):
        if source.get("path"):
            return os.fspath(source["path"])
        return "array" if "array" in source or "raw" in source else "bytes"
    return "bytes" if isinstance(source, (bytes, bytearray, memoryview)) else type(source).__name__


def _fetch(url: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(url, "rb") as remote:
            return remote.read()
    except OSError:
        raise
    except Exception as error:  # each protocol has its own errors
        raise AudioReadError(url, f"{type(error).__name__}: {error}") from error


def _checked(waveform: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(waveform).all():
        raise AudioReadError(name, "samples that are not finite")
    return waveform


def _reason(error: "soundfile.LibsndfileError") -> str:
    reason = error.error_string.removeprefix("Error : ").rstrip(".")
    return _REASONS.get(reason, reason)
