"""Audio as it comes: samples on a pipe, a file in real time, and a microphone that is simulated."""

import io
import logging
import struct
import sys
from types import ModuleType

import numpy as np
import pytest
import soundfile

from asit_hf.data.audio import AudioReadError, read_audio, resample
from asit_hf.data.live import BLOCK_SECONDS, microphones, play, read_pcm, record, stream_resampler

RATE = 8000
SOUND = (0.5 * np.sin(np.arange(1200) ** 1.2)).astype(np.float32)
STEREO = np.stack([SOUND, 0.25 * SOUND], axis=1)


def wav(samples: np.ndarray, subtype: str, format: str = "WAV", rate: int = RATE) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, samples, rate, format=format, subtype=subtype)
    return content.getvalue()


def reader(content: bytes, most: int = 1 << 16):
    """`read` of a pipe that gives at most so many bytes at once."""
    file = io.BytesIO(content)
    return lambda count: file.read(min(count, most))


def read_all(*args, **kwargs) -> tuple[int, np.ndarray]:
    rate, chunks = read_pcm(*args, **kwargs)
    return rate, np.concatenate(list(chunks))


@pytest.mark.parametrize("most", [1, 7, 1 << 16])
@pytest.mark.parametrize("samples", [SOUND, STEREO], ids=["mono", "stereo"])
@pytest.mark.parametrize(
    ("name", "subtype"),
    [
        *[("u8", "PCM_U8"), ("s16le", "PCM_16"), ("s24le", "PCM_24"), ("s32le", "PCM_32")],
        *[("f32le", "FLOAT"), ("f64le", "DOUBLE")],
    ],
)
def test_samples_are_those_of_the_file(name, subtype, samples, most):
    content, raw = wav(samples, subtype), wav(samples, subtype, "RAW")
    expected = read_audio(content, RATE)
    rate, with_header = read_all(reader(content, most), 44100, 1, "s16le")
    assert rate == RATE  # the header's
    rate, without = read_all(reader(raw, most), RATE, samples.ndim, name)
    assert rate == RATE
    for found in (with_header, without):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-7)


@pytest.mark.parametrize("size", [0, 0x7FFFFFFF, 0xFFFFFFFF - 36])
@pytest.mark.parametrize("format", ["WAV", "WAVEX"])
def test_the_length_in_a_streams_header_does_not_matter(size, format):
    content = bytearray(wav(SOUND, "PCM_16", format))
    place = content.index(b"data") + 4
    content[place : place + 4] = struct.pack("<I", size)
    assert len(read_all(reader(bytes(content)), RATE)[1]) == len(SOUND)


def test_what_follows_the_samples_of_a_wav_file_is_no_audio():
    content = wav(SOUND, "PCM_16") + b"LIST" + struct.pack("<I", 400) + b"\x7f" * 400
    assert len(read_all(reader(content), RATE)[1]) == len(SOUND)


def test_samples_arrive_as_soon_as_the_pipe_has_them():
    content, given = wav(SOUND, "PCM_16", "RAW"), []

    def read(count: int) -> bytes:
        given.append(content[sum(map(len, given)) :][: min(count, 100)])
        return given[-1]

    chunks = read_pcm(read, RATE)[1]
    assert len(next(chunks)) == (4 + 100) // 2  # the four bytes that might have been those of a header
    assert len(next(chunks)) == 50


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "no samples"),
        (b"RIFF", "no samples.*0|ends"),
        (wav(SOUND, "PCM_16")[:30], "ends after"),
        (wav(SOUND, "ULAW"), "format 7"),
        (wav(SOUND, "PCM_16", "FLAC"), "FLAC.*ffmpeg"),
        (b"RIFF\0\0\0\0AVI " + bytes(100), "RIFF"),
        (b"RIFF\0\0\0\0WAVEdata\0\0\0\0" + bytes(100), "without its format"),
    ],
)
def test_what_is_neither_samples_nor_wav_is_refused(content, match):
    with pytest.raises(AudioReadError, match=match):
        read_pcm(reader(content), RATE)


def test_integers_taken_for_floats_are_refused():
    raw = np.random.default_rng(0).integers(-(2**15), 2**15, 4000).astype("<i2").tobytes()
    with pytest.raises(AudioReadError, match="f32le"):
        read_all(reader(raw), RATE, 1, "f32le")


def test_the_shortest_input_is_audio(caplog):
    raw = np.array([-16384, 16384], "<i2").tobytes()  # as long as the beginning that tells wav from samples
    assert read_all(reader(raw), RATE)[1].tolist() == [-0.5, 0.5]
    assert "not a whole sample" not in caplog.text


def test_a_sample_that_is_cut_off_is_reported(caplog):
    content = wav(STEREO, "PCM_16", "RAW")
    assert len(read_all(reader(content[:-1]), RATE, 2)[1]) == len(SOUND) - 1
    assert "3 bytes" in caplog.records[-1].getMessage()


@pytest.mark.parametrize(("from_rate", "to_rate"), [(44100, 16000), (8000, 16000), (RATE, RATE)])
def test_blocks_are_resampled_as_the_whole(from_rate, to_rate):
    sound = np.tile(SOUND, 10)
    resampled = stream_resampler(from_rate, to_rate)
    blocks = [resampled(sound[first : first + 777]) for first in range(0, len(sound), 777)]
    blocks.append(resampled(np.zeros(0, np.float32), last=True))
    whole = resample(sound, from_rate, to_rate)
    np.testing.assert_allclose(np.concatenate(blocks), whole, atol=1e-6)


@pytest.mark.parametrize("speed", [1.0, 4.0])
def test_a_file_is_played_in_real_time(tmp_path, speed):
    path = tmp_path / "sound.wav"
    soundfile.write(path, np.tile(SOUND, 80), RATE)  # 12 s, more than is read at once
    now = [100.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    times, blocks = [], []
    for block in play(path, 16000, speed, clock=lambda: now[0], sleep=sleep):
        blocks.append(block)
        times.append(now[0] - 100)
    assert times == pytest.approx([BLOCK_SECONDS * count / speed for count in range(1, 601)])
    np.testing.assert_allclose(np.concatenate(blocks), read_audio(path, 16000), atol=1e-6)


def test_a_player_that_is_late_does_not_sleep(tmp_path):
    path = tmp_path / "sound.wav"
    soundfile.write(path, SOUND, RATE)
    clock = iter(range(0, 1000, 10))
    assert len(list(play(path, RATE, clock=lambda: next(clock), sleep=pytest.fail))) == 8


def test_a_file_is_played_at_once(tmp_path):
    path = tmp_path / "sound.wav"
    soundfile.write(path, SOUND, RATE)
    assert len(np.concatenate(list(play(path, RATE, float("inf"), sleep=pytest.fail)))) == len(SOUND)


class PortAudioError(Exception):
    pass


class InputStream:
    """A recording whose third block comes after a loss; it is unplugged after the seventh."""

    opened: list["InputStream"] = []

    def __init__(self, samplerate, blocksize, device, channels, dtype):
        assert dtype == "float32"
        if device == "broken":
            raise PortAudioError("Device unavailable")
        self.samplerate, self.channels, self.device = samplerate, channels, device
        self.started, self.closed, self.blocks = False, False, 0
        self.opened.append(self)

    def start(self):
        self.started = True

    def read(self, frames):
        assert self.started
        self.blocks += 1
        if self.blocks > 7:
            raise PortAudioError("Device unplugged")
        levels = np.arange(self.channels, dtype=np.float32)
        return np.tile(levels, (frames, 1)), self.blocks >= 3

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.closed = True


DEVICES = [
    {"name": "Speakers", "max_input_channels": 0, "default_samplerate": 48000.0},
    {"name": "Built-in microphone", "max_input_channels": 2, "default_samplerate": 44100.0},
    {"name": "broken", "max_input_channels": 1, "default_samplerate": 44100.0},
]


@pytest.fixture
def sounddevice(monkeypatch):
    def query_devices(device=None, kind=None):
        if kind is None:
            return DEVICES
        found = [one for one in DEVICES[1:] if device is None or str(device) in one["name"]]
        if not found:
            raise ValueError(f"No input device matching {device!r}")
        return found[0]

    def check_input_settings(device, channels, dtype, samplerate):
        if samplerate not in (16000, 44100):
            raise PortAudioError("Invalid sample rate")

    module = ModuleType("sounddevice")
    module.query_devices, module.check_input_settings = query_devices, check_input_settings
    module.InputStream, module.PortAudioError = InputStream, PortAudioError
    monkeypatch.setattr(InputStream, "opened", [])
    monkeypatch.setitem(sys.modules, "sounddevice", module)


@pytest.mark.parametrize(("rate", "actual"), [(16000, 16000), (8000, 44100)])
def test_a_microphone_records_at_the_models_rate_or_its_own(sounddevice, caplog, rate, actual):
    caplog.set_level(logging.INFO)
    found, blocks = record(rate, channels=2)
    assert found == actual
    assert "Built-in microphone" in caplog.records[-1].getMessage()
    block = next(blocks)
    assert block.shape == (round(BLOCK_SECONDS * actual),)
    assert (block == 0.5).all()  # the mean of its channels
    blocks.close()
    assert InputStream.opened[0].closed


def test_audio_that_a_microphone_lost_is_reported_once_and_its_end_is_an_error(sounddevice, caplog):
    blocks = record(16000)[1]
    for _ in range(7):
        next(blocks)
    with pytest.raises(OSError, match="unplugged"):
        next(blocks)
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert "overflowed" in caplog.records[-1].getMessage()


def test_devices_that_record_are_listed(sounddevice):
    assert [(one["index"], one["name"]) for one in microphones()] == [(1, "Built-in microphone"), (2, "broken")]


@pytest.mark.parametrize("device", ["broken", "another"])
def test_a_microphone_that_cannot_be_opened_is_an_error_that_names_the_others(sounddevice, device):
    with pytest.raises(OSError, match="1 Built-in microphone"):
        record(16000, device)


def test_what_is_missing_for_a_microphone_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(ModuleNotFoundError, match=r"sounddevice.*asit-hf\[microphone\]"):
        record(16000)
    monkeypatch.delitem(sys.modules, "sounddevice")

    class WithoutPortAudio:
        def find_spec(self, name, path=None, target=None):
            if name == "sounddevice":
                raise OSError("PortAudio library not found")

    monkeypatch.setattr(sys, "meta_path", [WithoutPortAudio(), *sys.meta_path])
    with pytest.raises(OSError, match="PortAudio.*libportaudio2"):
        microphones()
