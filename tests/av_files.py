"""Files in formats of ffmpeg, encoded with PyAV."""

import io
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip("av", reason="needs PyAV, the extra `av`")


def tone(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """A rising tone (channels, samples)."""
    times = np.arange(round(seconds * rate)) / rate
    samples = 0.3 * np.sin(2 * np.pi * (200 + 200 * times / seconds) * times)
    return np.tile(samples.astype(np.float32), (channels, 1))


def encode(
    samples: np.ndarray,
    rate: int,
    format: str,
    codec: str,
    options: dict[str, str] | None = None,
    codec_options: dict[str, str] | None = None,
    video: bool = False,
    tracks: int = 1,
    pauses: dict[int, int] | None = None,
    path: Path | None = None,
) -> bytes:
    """The content of a file with `samples` (channels, samples) in each of its `tracks`.

    Args:
        format, codec: ffmpeg's names.
        options, codec_options: of the format and of the encoder.
        video: whether the file has a video track before those of audio.
        pauses: by number of a packet, the time stamp units that it and later ones are delayed by.
        path: where to write, for formats that are read again when they are finished.
    """
    if codec not in av.codecs_available:
        pytest.skip(f"this build of PyAV cannot encode {codec}")
    layout = "mono" if len(samples) == 1 else "stereo"
    target = io.BytesIO() if path is None else str(path)
    with av.open(target, "w", format=format, options=options or {}) as container:
        if video:
            stream = container.add_stream("mpeg4", rate=25)
            stream.width = stream.height = 32
        streams = [
            container.add_stream(codec, rate=rate, layout=layout, options=codec_options or {}) for _ in range(tracks)
        ]
        if video:
            for index in range(round(25 * samples.shape[1] / rate)):
                picture = av.VideoFrame.from_ndarray(np.full((32, 32, 3), index, np.uint8), format="rgb24")
                picture.pts = index
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))
        for number, stream in enumerate(streams):
            for index, packet in enumerate(_packets(samples / (number + 1), rate, layout, stream)):
                delay = sum(ticks for first, ticks in (pauses or {}).items() if index >= first)
                packet.pts, packet.dts = packet.pts + delay, packet.dts + delay
                container.mux(packet)
    return target.getvalue() if path is None else path.read_bytes()


def _packets(samples, rate, layout, stream):
    resampler = av.AudioResampler(format=stream.codec_context.format.name, layout=layout, rate=rate)
    for start in range(0, samples.shape[1], 4096):
        block = np.ascontiguousarray(samples[:, start : start + 4096], np.float32)
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        for converted in resampler.resample(frame):
            yield from stream.encode(converted)
    yield from stream.encode(None)
