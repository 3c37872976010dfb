"""Reading audio: mono, resampled, decoding only the requested seconds."""

import io
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from math import gcd
from typing import Any, BinaryIO

import numpy as np

from ..fbank_asit import whole_rate
from ..utils.extras import extra
from ..utils.names import local_path, path_text
from ..utils.urls import is_url, open_url
from .decoding.decoder import AudioInfo, AudioReadError, DecodedSamples, Decoder, UnknownFormatError
from .decoding.pyav import PyAVDecoder, find_format
from .decoding.sndfile import open_sndfile

# A lower rate is a damaged header, of which resampling would make many times the file's size.
_MIN_RATE = 1000
# samples of context on each side of a window for the resampling filter, at the lower of the two rates
_RESAMPLING_CONTEXT = 256
HEADERLESS_EXTENSIONS = (".raw", ".pcm", ".g722")  # of files that hold samples and no header
_BLOCK = 1 << 16  # libsndfile's Ogg encoder crashes on long blocks


class AudioReader(AbstractContextManager):
    """An open audio source, from which windows are read; a context manager.

    Args:
        source: a path, `bytes`, a `{"path", "bytes"}` row of `datasets.Audio(decode=False)`, an
            `{"array", "sampling_rate"}` or `{"raw", "sampling_rate"}` dict, or a decoder with `get_all_samples()`
            (torchcodec). `file:` URIs are local paths; other paths that contain `://` are opened with fsspec (`hf://`,
            `zip://...::`). Remote files are fetched whole up to 16 MiB; of larger ones the blocks that are decoded.

    Raises:
        AudioReadError: missing, empty, damaged or truncated file, or no samples. Truncated files whose
            headers have no reliable length (mp3, ogg, aac, amr, ac3) are read as far as possible.
        TypeError: a source of another type.
    """

    def __init__(self, source: Any):
        self.name = source_name(source)
        self._files = ExitStack()  # that decoders read and do not close
        is_array = isinstance(source, dict) and ("array" in source or "raw" in source)
        decoded = _decode_all if hasattr(source, "get_all_samples") else _decode_array if is_array else None
        if decoded is None:
            self._decoder = _open_file(source, self.name, self._files)
        else:
            with _named_errors(self.name):
                self._decoder = decoded(source, self.name)
        if self.info.num_samples == 0 or self.info.sampling_rate < _MIN_RATE:
            self.close()
            too_low = f"expected a sampling rate of at least {_MIN_RATE} Hz, got {self.info.sampling_rate} Hz"
            raise AudioReadError(self.name, "no samples" if self.info.num_samples == 0 else too_low)

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._decoder.close()
        self._files.close()

    @property
    def info(self) -> AudioInfo:
        """Format and length of the source; the length of an mp3 is an estimate until a `read` finds fewer samples."""
        return self._decoder.info

    def num_samples(self, sampling_rate: int) -> int:
        """Samples of the whole source at `sampling_rate`; of an mp3, an estimate until a `read` finds fewer."""
        sampling_rate = whole_rate(sampling_rate)
        return (2 * self.info.num_samples * sampling_rate + self.info.sampling_rate) // (2 * self.info.sampling_rate)

    def read(self, sampling_rate: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Mono float32 `(samples,)` from `start`, at `sampling_rate`: `length` samples, or fewer at the end.

        They equal, up to rounding, those of the whole source resampled; of codecs whose decoders remember more than is
        decoded before a window, nearly: Opus at low bit rates, AAC with noise substitution, AMR (below 0.01).

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
        decoded = self._decode(first, last)
        with _named_errors(self.name):
            waveform = resample(decoded, rate, sampling_rate)[skipped : skipped + stop - start]
        if waveform.size == 0:
            raise self._nothing_at(start / sampling_rate)
        return waveform

    def _nothing_at(self, seconds: float) -> AudioReadError:
        return AudioReadError(self.name, f"nothing to read at {seconds:.3f} s, it lasts {self.info.duration:.3f} s")

    def _decode(self, first: int, last: int) -> np.ndarray:
        """Samples `first` to `last` at the source's own rate, mono; there is at least one."""
        with _named_errors(self.name):
            frames = self._decoder.read(first, last)
        if len(frames) == 0:
            raise self._nothing_at(first / self.info.sampling_rate)
        return _checked(frames[:, 0] if frames.shape[1] == 1 else frames.mean(axis=1), self.name)


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
    """Name of a source in messages and tables: its path (see `path_text`), or "bytes", "array" or its type."""
    if isinstance(source, (str, os.PathLike)):
        return path_text(source)
    if isinstance(source, dict):
        if source.get("path"):
            return path_text(source["path"])
        return "array" if "array" in source or "raw" in source else "bytes"
    return "bytes" if isinstance(source, (bytes, bytearray, memoryview)) else type(source).__name__


def _decode_all(decoder: Any, name: str) -> Decoder:
    samples = decoder.get_all_samples()
    channels = np.asarray(samples.data, dtype=np.float32)
    info = AudioInfo(int(samples.sample_rate), channels.shape[-1], channels.shape[0])
    return DecodedSamples(_checked(channels.mean(axis=0), name), info)


def _decode_array(source: dict, name: str) -> Decoder:
    if source.get("sampling_rate") is None:
        raise AudioReadError(name, f"expected a sampling_rate with the array, got the keys {sorted(source)}")
    array = source["array"] if "array" in source else source["raw"]
    samples = to_mono_float(array)
    num_channels = int(np.prod(np.shape(array))) // samples.size
    return DecodedSamples(samples, AudioInfo(whole_rate(source["sampling_rate"]), samples.size, num_channels))


def _open_file(source: Any, name: str, files: ExitStack) -> Decoder:
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
        raise AudioReadError(name, f"neither a path nor bytes{keys}")
    with _named_errors(name):
        path = path if path is None else local_path(path)
        if content is None and is_url(path):
            content = files.enter_context(open_url(path))
            content = content.getvalue() if isinstance(content, io.BytesIO) else content
        if content is None:
            mode = os.stat(path).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # of a pipe, opening would wait for a writer
                raise AudioReadError(name, "expected a file, got a pipe or device: write its content to a file first")
            with open(path, "rb") as file:
                if not file.read(1):
                    raise AudioReadError(name, "empty file")
        elif isinstance(content, (bytes, bytearray, memoryview)) and not len(content):
            raise AudioReadError(name, "empty")
        return _decode_file(path if content is None else content, name)


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Turn whatever opening or decoding raises into an `AudioReadError` of the source `name`."""
    try:
        yield
    except (AudioReadError, ModuleNotFoundError):
        raise
    except FileNotFoundError as error:
        raise AudioReadError(name, "no such file") from error
    except OSError as error:
        raise AudioReadError(name, error.strerror or str(error)) from error
    except struct.error as error:
        raise AudioReadError(name, f"truncated: its header is incomplete ({error})") from error
    except ValueError as error:
        raise AudioReadError(name, str(error)) from error
    except Exception as error:  # of decoders, and of headers that promise the impossible
        raise AudioReadError(name, f"{type(error).__name__}: {error}") from error


def _decode_file(file: str | os.PathLike | bytes | BinaryIO, name: str) -> Decoder:
    """libsndfile's decoder, or PyAV's for the formats that only ffmpeg knows, by content."""
    try:
        return open_sndfile(file, name)
    except UnknownFormatError as error:
        format = find_format(file)
        if format is None and name.lower().endswith(HEADERLESS_EXTENSIONS):
            raise AudioReadError(name, f"{error.reason}: samples without a header, convert them to wav") from error
        if format is None:
            raise
        try:
            return PyAVDecoder(file, format, name)
        except ModuleNotFoundError as missing:
            raise AudioReadError(name, f"{error.reason}: {missing}") from error


def _checked(waveform: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(waveform).all():
        raise AudioReadError(name, "samples that are not finite")
    return waveform
