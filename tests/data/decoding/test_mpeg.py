"""MPEG files without a header that states their length, or with a wrong one."""

import io
import struct

import numpy as np
import pytest
import soundfile as sf

from asit_hf.data.audio import AudioReader, AudioReadError, audio_info, read_audio

DELAY = 1105  # samples that LAME's header takes away at the beginning


def sound(seconds: float, rate: int) -> np.ndarray:
    """Silence and noise in turn, so that bit rates vary."""
    noise = np.random.default_rng(0).normal(0, 0.2, round(seconds * rate))
    return noise * (np.arange(len(noise)) // rate % 2)


def mp3(seconds: float = 3.0, rate: int = 44100, channels: int = 1, mode: str = "VARIABLE") -> bytes:
    content = io.BytesIO()
    samples = np.tile(sound(seconds, rate)[:, None], channels)
    with sf.SoundFile(
        content, "w", rate, channels, "MPEG_LAYER_III", format="MP3", bitrate_mode=mode, compression_level=0.3
    ) as file:
        for start in range(0, len(samples), 4096):
            file.write(samples[start : start + 4096])
    return content.getvalue()


def without_header(content: bytes) -> bytes:
    """Without the first frame, an Xing or Info header; the second begins like it up to the bit rate."""
    tag = min(place for place in (content.find(b"Xing"), content.find(b"Info")) if place >= 0)
    return content[content.index(content[:2], tag) :]


def check(content: bytes, num_samples: int, path=None) -> np.ndarray:
    sources = [content] if path is None else [content, path]
    if path is not None:
        path.write_bytes(content)
    for source in sources:
        info = audio_info(source)
        whole = read_audio(source, info.sampling_rate)
        assert info.num_samples == len(whole) == num_samples
        with AudioReader(source) as reader:
            for start, length in ((0, 1), (0, 1200), (num_samples // 3, 1), (num_samples // 2, 1200)):
                window = reader.read(info.sampling_rate, start, length)
                np.testing.assert_allclose(window, whole[start : start + length], rtol=0, atol=1e-6)
            np.testing.assert_allclose(reader.read(info.sampling_rate, num_samples - 1000), whole[-1000:], atol=1e-6)
            assert reader.info == info
    return whole


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [44100, 32000, 22050, 16000, 8000])
@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT"])
def test_without_a_header_frames_are_counted(mode, rate, channels, tmp_path, capfd):
    content = mp3(rate=rate, channels=channels, mode=mode)
    intact = read_audio(content, rate)
    assert len(intact) == 3 * rate
    per_frame = 1152 if rate >= 32000 else 576
    bare = without_header(content)
    with AudioReader(bare) as reader:
        num_samples = reader.info.num_samples
    assert num_samples % per_frame == 0
    assert 0 <= num_samples - 3 * rate - DELAY < 3 * per_frame
    found = check(bare, num_samples, tmp_path / "a.mp3")
    # the same sound, later by what the header takes away
    np.testing.assert_allclose(found[DELAY:][: len(intact)], intact, rtol=0, atol=1e-6)
    assert capfd.readouterr() == ("", "")  # nor a line of libmpg123


def test_a_single_frame():
    bare = without_header(mp3())
    frame = bare[: bare.index(bare[:2], 4)]
    assert len(read_audio(frame, 44100)) == 1152
    check(bare + frame[:1] + frame[1:] + without_header(mp3(channels=2)), 2 * len(read_audio(bare, 44100)) + 1152)


def test_joined_files_are_read_whole(tmp_path):
    first, second = mp3(), mp3(2.0, mode="CONSTANT")
    parts = [read_audio(part, 44100) for part in (first, second)]
    whole = check(first + second, 5 * 44100, tmp_path / "a.mp3")
    np.testing.assert_allclose(whole, np.concatenate(parts), rtol=0, atol=1e-6)
    bare = without_header(first) + without_header(second)
    check(bare, sum(audio_info(without_header(part)).num_samples for part in (first, second)))


def test_what_is_no_frame_is_skipped():
    bare = without_header(mp3())
    whole = read_audio(bare, 44100)
    id3 = b"ID3\4\0\0\0\0\x08\0" + bytes(range(256)) * 4
    ape = b"APETAGEX" + bytes(4) + (32).to_bytes(4, "little") + bytes(16)
    for content in (id3 + bare, bare + b"TAG" + bytes(125), bare + ape, id3 + bare + ape + b"TAG" + bytes(125)):
        np.testing.assert_array_equal(check(content, len(whole)), whole)
    np.testing.assert_array_equal(check(bare + id3 + bare, 2 * len(whole))[: len(whole)], whole)
    junk = np.random.default_rng(1).integers(0, 255, 300, np.uint8).tobytes()
    check(bare + junk + bare, 2 * len(whole))


def test_a_vbri_header_is_no_sound():
    bare = without_header(mp3())
    frame = bytearray(b"\xff\xfb\x90" + bare[3:4] + bytes(413))
    frame[36:62] = b"VBRI" + struct.pack(">HHHIIHHHH", 1, 2304, 75, len(bare) + 417, 10, 0, 1, 2, 1)
    whole = read_audio(bare, 44100)
    np.testing.assert_array_equal(check(bytes(frame) + bare, len(whole)), whole)


def test_an_intact_header_is_trusted():
    content = mp3()
    with sf.SoundFile(io.BytesIO(content)) as file:
        expected = file.read(dtype="float32")
    checked = content[:1] + bytes([content[1] & 0xFE]) + content[2:]  # a checksum in the frame of the header
    for source in (content, checked, content + b"TAG" + bytes(125)):
        np.testing.assert_array_equal(read_audio(source, 44100), expected)


def test_a_header_that_states_more_than_there_is():
    content = mp3()
    cut = content[: len(content) * 2 // 3]
    num_samples = audio_info(cut).num_samples
    assert 44100 < num_samples < 3 * 44100
    whole = check(cut, num_samples)
    np.testing.assert_allclose(whole, read_audio(content, 44100)[:num_samples], rtol=0, atol=1e-6)


def test_a_recording_that_begins_within_a_frame(tmp_path):
    bare = without_header(mp3())
    whole = read_audio(bare, 44100)
    cut = bare[70:]
    found = check(cut, len(whole) - 1152, tmp_path / "a.mp3")
    np.testing.assert_allclose(found[4 * 1152 :], whole[5 * 1152 :], rtol=0, atol=1e-6)


def test_parts_of_different_rates_are_refused():
    with pytest.raises(AudioReadError, match="22050, 44100"):
        read_audio(mp3() + mp3(rate=22050), 16000)


def test_mp3_in_wav(tmp_path):
    bare = without_header(mp3())
    format = struct.pack("<HHIIHHHHIHHH", 0x55, 1, 44100, 16000, 1, 0, 12, 1, 2, 417, 1, 1393)
    content = b"WAVEfmt " + struct.pack("<I", len(format)) + format + b"data" + struct.pack("<I", len(bare)) + bare
    content = b"RIFF" + struct.pack("<I", len(content)) + content
    whole = read_audio(bare, 44100)
    for source in (content, content.replace(struct.pack("<I", len(bare)), b"\xff\xff\xff\xff")):
        np.testing.assert_array_equal(check(source, len(whole), tmp_path / "a.wav"), whole)
