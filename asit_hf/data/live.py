"""Audio as it comes, from a microphone, a pipe, or a file in real time, and the rolling windows of it."""

import logging
import os
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from math import isfinite
from queue import Empty, Queue
from threading import Event, Thread
from typing import Any

import numpy as np

from ..utils.extras import extra
from .audio import AudioReader, AudioReadError, to_mono_float

logger = logging.getLogger(__name__)

BLOCK_SECONDS = 0.02
_READ_SECONDS = 10  # of a file, read at once: each read may decode some context anew
# names as in ffmpeg -> numpy's; 24-bit samples have three bytes, for which numpy has no type
SAMPLE_FORMATS = {"u8": "u1", "s16le": "<i2", "s24le": "<i4", "s32le": "<i4", "f32le": "<f4", "f64le": "<f8"}
_WAV_FORMATS = {(1, 8): "u8", (1, 16): "s16le", (1, 24): "s24le", (1, 32): "s32le", (3, 32): "f32le", (3, 64): "f64le"}
_WAV_EXTENSIBLE = 0xFFFE
_UNKNOWN_SIZE = 0x7FFF0000  # recorders that cannot know the size declare one near 2^31 or 2^32, or 0
_FILES = {b"fLaC": "FLAC", b"OggS": "Ogg", b"ID3": "mp3", b"FORM": "AIFF", b".snd": "au", b"caff": "CAF"}
_LOUDEST = 1e4  # float samples beyond that are something else
# Windows that have waited for longer are skipped, or for two hops if the model is slower than real time. A live source
# may deliver in bursts (PulseAudio: 2 s); one that delivers this much in less than half of it is a file, and waits.
PATIENCE_SECONDS = 3.0
_MOST_CHUNKS = 1000  # that wait in memory; then the source waits, too
_CLOSING_SECONDS = 0.5  # a microphone returns within a block, a pipe perhaps never
_END = object()
_PIPE = "standard input"
_PORTAUDIO = "apt install libportaudio2 (Debian, Ubuntu), dnf install portaudio, brew install portaudio"


def microphones() -> list[dict[str, Any]]:
    """
    The devices that record: dicts of `index`, `name`, `max_input_channels`, `default_samplerate` and more.

    Raises:
        ModuleNotFoundError, OSError: sounddevice or PortAudio is not installed.
    """
    devices = _sounddevice().query_devices()
    return [{"index": index, **device} for index, device in enumerate(devices) if device["max_input_channels"] > 0]


def record(sampling_rate: int, device: int | str | None = None, channels: int = 1) -> tuple[int, Iterator[np.ndarray]]:
    """
    Opens a microphone.

    Args:
        sampling_rate (`int`): preferred rate in Hz.
        device (`int` or `str`, *optional*): index or part of the name; by default the system's microphone.
        channels (`int`, defaults to 1): recorded channels, whose mean is taken.

    Returns:
        The rate in Hz, which is the device's own where it does not support `sampling_rate`, and an endless iterator of
        blocks `(samples,)` of 20 ms. Closing the iterator closes the microphone.

    Raises:
        ModuleNotFoundError, OSError: sounddevice or PortAudio is not installed, or no such device, or it is in use.
    """
    sounddevice = _sounddevice()
    try:
        info = sounddevice.query_devices(device, "input")
        options = {"device": device, "channels": channels, "dtype": "float32"}
        try:
            sounddevice.check_input_settings(samplerate=sampling_rate, **options)
        except sounddevice.PortAudioError:
            sampling_rate = int(info["default_samplerate"])
        block = round(BLOCK_SECONDS * sampling_rate)
        stream = sounddevice.InputStream(samplerate=sampling_rate, blocksize=block, **options)
        stream.start()
    except (sounddevice.PortAudioError, ValueError) as error:
        names = ", ".join(f"{one['index']} {one['name']}" for one in microphones()) or "none"
        raise OSError(f"cannot open the microphone: {error}; devices that record: {names}") from error
    logger.info("microphone: %s, %d Hz, channels: %d", info["name"], sampling_rate, channels)
    return sampling_rate, _recorded(stream, block, sounddevice.PortAudioError)


def _recorded(stream: Any, block: int, failure: type[Exception]) -> Iterator[np.ndarray]:
    with stream:
        said = False
        while True:
            try:
                samples, overflowed = stream.read(block)
            except failure as error:
                raise OSError(f"the microphone stopped: {error}") from error
            if overflowed and not said:
                logger.warning("the microphone's buffer overflowed: some audio is lost")
                said = True
            yield samples.mean(axis=1)


def _sounddevice() -> Any:
    with extra("microphone"):
        try:
            import sounddevice
        except OSError as error:
            raise OSError(f"{error}; install it, for example: {_PORTAUDIO}") from error
    return sounddevice


def read_pcm(
    read: Callable[[int], bytes], sampling_rate: int, channels: int = 1, sample_format: str = "s16le"
) -> tuple[int, Iterator[np.ndarray]]:
    """
    Reads samples without a header, or with that of a wav file, which in a stream may declare any length.

    Args:
        read: like `read` of an unbuffered binary file: returns at least one byte, at most as many as asked for, and
            none at the end.
        sampling_rate (`int`): in Hz; like the others, it is overridden by a wav header.
        channels (`int`, defaults to 1): interleaved channels, whose mean is taken.
        sample_format (`str`, defaults to `"s16le"`): one of `SAMPLE_FORMATS`, named as in ffmpeg.

    Returns:
        The rate in Hz and an iterator of blocks `(samples,)`, float32 in [-1, 1], as they arrive.

    Raises:
        AudioReadError: another kind of file, a damaged header, or float samples out of range.
    """
    head = _exactly(read, 4)
    size, kind = 0, "raw"
    if head in (b"RIFF", b"RF64"):
        sampling_rate, channels, sample_format, size = _wav_header(read)
        head, kind = b"", "wav"
    elif found := next((kind for magic, kind in _FILES.items() if head.startswith(magic)), None):
        hint = f"decode it first: ffmpeg -i FILE -f s16le -ac 1 -ar {sampling_rate} - | ..."
        raise AudioReadError(_PIPE, f"expected raw samples or wav, got {found}: name the file instead, or {hint}")
    logger.info("%s: %s, %s, %d Hz, channels: %d", _PIPE, kind, sample_format, sampling_rate, channels)
    return sampling_rate, _decoded(read, head, sampling_rate, channels, sample_format, size)


def _decoded(
    read: Callable[[int], bytes], head: bytes, sampling_rate: int, channels: int, sample_format: str, size: int
) -> Iterator[np.ndarray]:
    width = (3 if sample_format == "s24le" else np.dtype(SAMPLE_FORMATS[sample_format]).itemsize) * channels
    block = max(1, round(BLOCK_SECONDS * sampling_rate)) * width
    left = size or float("inf")
    ended = False
    while not ended:
        new = read(min(block, left) if size else block)
        ended = not new
        left -= len(new)
        head += new
        whole = len(head) - len(head) % width
        if whole:
            yield _to_mono(head[:whole], channels, sample_format)
        head = head[whole:]
    if head:
        logger.warning("%s: its last %d bytes are not a whole sample of %d bytes", _PIPE, len(head), width)


def _to_mono(content: bytes, channels: int, sample_format: str) -> np.ndarray:
    if sample_format == "s24le":
        padded = np.zeros((len(content) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(content, np.uint8).reshape(-1, 3)
        content = padded.tobytes()
    samples = np.frombuffer(content, SAMPLE_FORMATS[sample_format])
    if samples.dtype.kind == "f":
        if not np.abs(samples).max() < _LOUDEST:
            raise AudioReadError(_PIPE, f"expected float samples in [-1, 1], got others: is it not {sample_format}?")
        samples = samples.astype(np.float32)
    else:
        limit = np.float32(2 ** (8 * samples.itemsize - 1))
        samples = samples.astype(np.float32) / limit - np.float32(samples.dtype.kind == "u")
    return samples if channels == 1 else samples.reshape(-1, channels).mean(axis=1)


def _wav_header(read: Callable[[int], bytes]) -> tuple[int, int, str, int]:
    """Rate, channels, sample format and size of the samples in bytes, 0 if unknown. The first four bytes are read."""
    if _exactly(read, 8)[4:] != b"WAVE":
        raise AudioReadError(_PIPE, "expected raw samples or wav, got another RIFF file")
    form = None
    while True:
        name, size = struct.unpack("<4sI", _exactly(read, 8))
        if name == b"data":
            break
        chunk = _exactly(read, size + size % 2)
        if name == b"fmt " and size >= 16:
            tag, channels, rate, _, _, bits = struct.unpack("<HHIIHH", chunk[:16])
            if tag == _WAV_EXTENSIBLE and size >= 26:
                tag = struct.unpack("<H", chunk[24:26])[0]
            form = _WAV_FORMATS.get((tag, bits))
            if form is None or channels == 0 or rate == 0:
                what = f"format {tag}, {bits} bits, {channels} channels, {rate} Hz"
                raise AudioReadError(_PIPE, f"expected wav of integers or floats, got {what}")
    if form is None:
        raise AudioReadError(_PIPE, "a wav header without its format")
    return rate, channels, form, size if size < _UNKNOWN_SIZE else 0


def _exactly(read: Callable[[int], bytes], count: int) -> bytes:
    content = b""
    while len(content) < count:
        new = read(count - len(content))
        if not new:
            what = f"ends after {len(content)} of {count} bytes" if content else "ends"
            raise AudioReadError(_PIPE, f"no samples: it {what}")
        content += new
    return content


def play(
    path: str | os.PathLike,
    sampling_rate: int,
    speed: float = 1.0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[np.ndarray]:
    """
    Yields a file's audio in blocks `(samples,)` of 20 ms at `sampling_rate` Hz, each when its last sample would have
    been heard; with `speed` infinite, at once.

    Raises:
        AudioReadError: unreadable audio.
    """
    block, size = round(BLOCK_SECONDS * sampling_rate), round(_READ_SECONDS * sampling_rate)
    with AudioReader(path) as reader:
        began, start = clock(), 0
        while start < reader.num_samples(sampling_rate):
            waveform = reader.read(sampling_rate, start, size)
            for first in range(0, len(waveform), block):
                samples = waveform[first : first + block]
                due = began + (start + first + len(samples)) / sampling_rate / speed
                if isfinite(speed) and (wait := due - clock()) > 0:
                    sleep(wait)
                yield samples
            if len(waveform) < size:
                return
            start += size


def stream_resampler(from_rate: int, to_rate: int) -> Callable[..., np.ndarray]:
    """
    A function of `(samples, last=False)` that resamples one block `(samples,)` after another: together the results are
    the whole resampled, without a seam at the blocks. It holds back up to 0.1 s until the next block.
    """
    if from_rate == to_rate:
        return lambda samples, last=False: samples
    with extra():
        import soxr
    return soxr.ResampleStream(from_rate, to_rate, 1, dtype="float32", quality="HQ").resample_chunk


def rolling_windows(
    chunks: Iterable[Any], chunk_rate: int, rate: int, window: int, hop: int, live: bool, clock: Callable[[], float]
) -> Iterator[tuple[int, np.ndarray, float, int]]:
    """
    Yields windows of `window` samples at `rate` Hz, one every `hop` samples, of `chunks` at `chunk_rate`: the number
    of its first sample, its waveform `(samples,)`, the time at which the chunk with its end arrived, and the number of
    windows skipped before it. The other arguments, and errors, are those of `asit_hf.listen.listen`.
    """
    resampled = stream_resampler(chunk_rate, rate)
    buffer, first = np.zeros(0, np.float32), 0  # samples from number `first` on
    received, arrivals = 0, deque()  # numbers of samples of `chunks`, and when they had arrived
    waited, waits = 0.0, deque([(0, 0.0)])  # seconds for which the source was waited for, up to numbers of samples
    start = skipped = done = 0  # the next window, windows skipped before it, and where the last one ended
    chunk, ended, busy = None, False, 0.0

    def waiting() -> int:  # complete windows after the next one; -1 if that is not complete
        return (first + len(buffer) - window - start) // hop

    def is_ahead() -> bool:
        while received - waits[0][0] > PATIENCE_SECONDS * chunk_rate and len(waits) > 1:
            waits.popleft()
        return not live or waited - waits[0][1] < (received - waits[0][0]) / chunk_rate / 2

    def arrival(end: int) -> float:
        while len(arrivals) > 1 and arrivals[0][0] * rate < end * chunk_rate:
            arrivals.popleft()
        return clock() if is_ahead() else arrivals[0][1]

    with _arriving(chunks, live, clock) as take:
        while not ended or waiting() >= 0:
            pieces = [buffer]
            for chunk, now, seconds in [] if ended or (is_ahead() and waiting() >= 0) else take(waiting() < 0):
                ended = chunk is _END or isinstance(chunk, BaseException)
                if not ended and len(chunk) == 0:
                    continue
                samples = np.zeros(0, np.float32) if ended else to_mono_float(chunk)
                received += len(samples)
                waited += seconds
                arrivals.append((received, now))
                waits.append((received, waited))
                pieces.append(resampled(samples, last=ended))
            buffer = np.concatenate(pieces) if len(pieces) > 1 else buffer
            patience = min(PATIENCE_SECONDS, 2 * hop / rate) if busy > hop / rate else PATIENCE_SECONDS
            if waiting() * hop > patience * rate and not is_ahead():
                skipped, start = skipped + waiting(), start + waiting() * hop
            if waiting() >= 0:
                done = start + window
                given = clock()
                yield start, buffer[start - first : done - first], arrival(done), skipped
                busy = clock() - given
                skipped, start = 0, start + hop
                # the last window may begin anywhere after the one before
                buffer, first = buffer[start - hop - first :], start - hop
    if isinstance(chunk, BaseException):
        raise chunk
    total = first + len(buffer)
    if total == 0:
        raise AudioReadError("the input", "no samples")
    if done < total:
        start = max(0, total - window)
        yield start, buffer[start - first :], arrival(total), skipped


@contextmanager
def _arriving(
    chunks: Iterable[Any], live: bool, clock: Callable[[], float]
) -> Iterator[Callable[[bool], list[tuple[Any, float, float]]]]:
    """
    A function that returns the chunks that have arrived since its last call, with the times of their arrival and for
    which `chunks` was waited for. If its argument is true, there is at least one. The last one is `_END`, or the error
    that `chunks` raised in its thread.
    """
    if not live:
        iterator = iter(chunks)
        yield lambda wait: [(next(iterator, _END), clock(), 0.0)] if wait else []
        return
    arrived, stopped = Queue(_MOST_CHUNKS), Event()

    def read() -> None:
        last, began = _END, clock()
        try:
            for chunk in chunks:
                arrived.put((chunk, now := clock(), now - began))
                if stopped.is_set():
                    break
                began = clock()
            getattr(chunks, "close", lambda: None)()
        except BaseException as error:
            last = error
        arrived.put((last, clock(), 0.0))

    thread = Thread(target=read, daemon=True)
    thread.start()
    try:
        yield lambda wait: [arrived.get() for _ in range(max(int(wait), arrived.qsize()))]
    finally:
        stopped.set()
        with suppress(Empty):
            while True:
                arrived.get_nowait()
        thread.join(_CLOSING_SECONDS)
