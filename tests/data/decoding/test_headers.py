"""Files whose headers state no length or a wrong one are read whole; files shorter than they state are refused."""

import io
import os
import struct

import numpy as np
import pytest
import soundfile as sf

from asit_hf.data.audio import AudioReader, AudioReadError, audio_info, read_audio, source_name

RATE = 16000


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    time = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.default_rng(seed).normal(0, 0.01, len(time))
    return (0.3 * np.sin(2 * np.pi * (200 + 100 * seed) * time) + noise).astype(np.float32)


def encode(samples: np.ndarray, format: str, subtype: str | None = None, rate: int = RATE) -> bytes:
    content = io.BytesIO()
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    with sf.SoundFile(content, "w", rate, channels, subtype, format=format) as file:
        for start in range(0, len(samples), 4096):
            file.write(samples[start : start + 4096])
    return content.getvalue()


def put(content: bytes, position: int, new: bytes) -> bytes:
    return content[:position] + new + content[position + len(new) :]


def check(content: bytes, expected: np.ndarray, path=None, atol: float = 0) -> None:
    """The whole, its length and its windows, from bytes, a row and a path."""
    rate = audio_info(content).sampling_rate
    sources = [content, {"path": "x", "bytes": content}]
    if path is not None:
        path.write_bytes(content)
        sources.append(path)
    for source in sources:
        assert audio_info(source).num_samples == len(expected)
        np.testing.assert_array_equal(read_audio(source, rate), expected)
        with AudioReader(source) as reader:
            for start in (0, max(0, len(expected) // 2 - 500), max(0, len(expected) - 900)):
                window = reader.read(rate, start, 1000)
                np.testing.assert_allclose(window, expected[start : start + 1000], rtol=0, atol=atol)


def flac_with_total(flac: bytes, total: int) -> bytes:
    fields = int.from_bytes(flac[18:26], "big") & ~((1 << 36) - 1)
    return put(flac, 18, (fields | total).to_bytes(8, "big"))


@pytest.mark.parametrize("seconds", [2.0, 0.05])
@pytest.mark.parametrize("total", [0, 400, 5_000_000_000])
def test_flac_of_unknown_or_wrong_length(total, seconds, tmp_path):
    flac = encode(sound(seconds), "FLAC")
    check(flac_with_total(flac, total), read_audio(flac, RATE), tmp_path / "a.flac")


def test_flac_with_tags_around_it():
    flac = encode(sound(1), "FLAC")
    id3 = b"ID3\4\0\0\0\0\0\x0a" + bytes(10)
    for content in (id3 + flac, flac + b"TAG" + bytes(125), id3 + flac + b"TAG" + bytes(125)):
        check(flac_with_total(flac, 0).join(content.split(flac)), read_audio(flac, RATE))


def test_flac_of_unknown_length_that_was_cut_ends_with_its_last_whole_frame():
    flac = encode(sound(2), "FLAC")
    whole, cut = read_audio(flac, RATE), flac_with_total(flac, 0)[: len(flac) * 3 // 4]
    found = read_audio(cut, RATE)
    assert RATE < len(found) < 2 * RATE
    check(cut, whole[: len(found)])


@pytest.mark.parametrize("total", [0, 3 * RATE])
def test_a_part_of_a_flac_stream_keeps_its_frame_numbers(total, tmp_path):
    flac = encode(sound(3), "FLAC")
    whole = read_audio(flac, RATE)
    begin = flac.index(b"\xff\xf8", 42)
    starts = [at for at in range(begin, len(flac)) if flac[at : at + 4] == flac[begin : begin + 4]]
    part = flac_with_total(flac[:begin] + flac[starts[5] :], total)
    length = audio_info(part).num_samples
    assert RATE < length < 2.6 * RATE
    check(part, whole[-length:], tmp_path / "a.flac")


@pytest.mark.parametrize("seconds", [(1.5, 1.5), (1.5, 0.7), (0.7, 1.5)])
def test_joined_flac_files_are_read_one_after_another(seconds, tmp_path):
    first, second = (encode(sound(length, seed), "FLAC") for seed, length in enumerate(seconds))
    expected = np.concatenate([read_audio(first, RATE), read_audio(second, RATE)])
    check(first + second, expected, tmp_path / "a.flac")
    check(flac_with_total(first, 0) + second, expected)


def ogg_page(packet: bytes, kind: int, granule: int, number: int) -> bytes:
    sizes = bytes([255] * (len(packet) // 255) + [len(packet) % 255])
    return b"OggS\0" + struct.pack("<BqIII", kind, granule, 7, number, 0) + bytes([len(sizes)]) + sizes + packet


def in_ogg(flac: bytes, step: int = 3000) -> bytes:
    """With pages of `step` bytes, which split frames; checksums are left out."""
    packets = [b"\x7fFLAC\1\0\0\0" + flac[:42], *(flac[at : at + step] for at in range(42, len(flac), step))]
    return b"".join(ogg_page(packet, 2 * (n == 0), 0, n) for n, packet in enumerate(packets))


def test_flac_in_ogg(tmp_path):
    flac = encode(sound(2), "FLAC")
    whole = read_audio(flac, RATE)
    for content in (flac, flac_with_total(flac, 0)):
        check(in_ogg(content), whole, tmp_path / "a.oga")
    check(in_ogg(flac) + in_ogg(flac), np.concatenate([whole, whole]))


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_every_link_of_a_chained_ogg_is_read(subtype, tmp_path):
    links = [encode(sound(1.5, seed), "OGG", subtype) for seed in (1, 2)]
    expected = np.concatenate([read_audio(link, RATE) for link in (*links, links[0])])
    check(links[0] + links[1] + links[0], expected, tmp_path / "a.ogg", atol=1e-3)


def test_links_of_a_long_ogg_are_found():
    """Only some pages of a long file are looked at."""
    noise = np.random.default_rng(0).uniform(-0.9, 0.9, 3 * 48000).astype(np.float32)
    link = encode(noise, "OGG", "VORBIS", 48000)
    short = encode(noise[:48000], "OGG", "VORBIS", 48000)
    times = 2 * 2**20 // len(link)
    assert audio_info(link * times).num_samples == times * 3 * 48000
    assert audio_info(short + link * times + short).num_samples == (times * 3 + 2) * 48000


def test_links_of_different_rates_are_refused_and_of_different_channels_mixed():
    first, second = (encode(sound(1), "OGG", subtype, rate) for subtype, rate in (("OPUS", 48000), ("VORBIS", RATE)))
    with pytest.raises(AudioReadError, match="16000, 48000"):
        read_audio(first + second, RATE)
    stereo = encode(np.tile(sound(1)[:, None], 2), "OGG", "VORBIS")
    check(second + stereo, np.concatenate([read_audio(second, RATE), read_audio(stereo, RATE)]), atol=1e-3)


@pytest.mark.parametrize("format", ["WAV", "AU", "CAF", "AIFF"])
def test_joined_files_are_read_one_after_another(format, tmp_path):
    first, second = encode(sound(1, 1), format, "PCM_16"), encode(sound(0.5, 2), format, "PCM_16")
    check(first + second, np.concatenate([read_audio(first, RATE), read_audio(second, RATE)]), tmp_path / "a.wav")


# where the size of the samples is written, and how
SIZE_FIELDS = {
    "WAV": (b"data", 4, "<I"),
    "WAVEX": (b"data", 4, "<I"),
    "AIFF": (b"SSND", 4, ">I"),
    "SVX": (b"BODY", 4, ">I"),
    "AU": (b".snd", 8, ">I"),
    "CAF": (b"data", 4, ">q"),
    "W64": (b"data\xf3\xac", 16, "<q"),
    "RF64": (b"ds64", 16, "<q"),
}


def with_size(content: bytes, format: str, size: int) -> bytes:
    name, offset, kind = SIZE_FIELDS[format]
    place = content.index(name) + offset
    return put(content, place, struct.pack(kind.upper() if size >= 0 else kind, size))


@pytest.mark.parametrize(
    ("format", "size"),
    [
        *(("WAV", size) for size in (0, 0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000, 0x7FFFFFD8, 0x80000000, 0xFFFFFFDB)),
        *(("WAV", 16000 + more) for more in (44, 36, 8, 2)),
        ("WAVEX", 16080),
        *(("AIFF", size) for size in (0, 0x7F000008, 0xFFFFFFFF)),
        *(("AU", size) for size in (0, 0xFFFFFFFF)),
        *(("CAF", size) for size in (-1, 0)),
        *(("W64", size) for size in (0, -1, 0x7FFFFFFFFFFFFFFF)),
        *(("RF64", size) for size in (0, -1, 16080)),
    ],
)
def test_placeholders_and_sizes_off_by_a_header(format, size, tmp_path):
    content = encode(sound(0.5), format, "PCM_16")
    if format == "CAF":  # what follows would be taken for samples
        content = content[: content.index(b"data") + 12 + 4 + 16000]
    check(with_size(content, format, size), read_audio(encode(sound(0.5), "WAV"), RATE), tmp_path / "a")


@pytest.mark.parametrize("riff", [0, 36, 8000, 0x7FFFFFFF, 0xFFFFFFFF])
def test_the_size_of_the_whole_does_not_matter(riff):
    wav = encode(sound(0.5), "WAV")
    check(put(wav, 4, struct.pack("<I", riff)), read_audio(wav, RATE))
    check(put(with_size(wav, "WAV", 0), 4, struct.pack("<I", riff)), read_audio(wav, RATE))


def test_chunks_after_the_samples_are_no_samples():
    wav = encode(sound(0.5), "WAV")
    check(wav + b"LIST\4\0\0\0INFO", read_audio(wav, RATE))


def test_a_wav_that_states_too_little_is_warned_of(caplog):
    wav = encode(sound(0.5), "WAV")
    assert len(read_audio(with_size(wav, "WAV", 8000), RATE)) == 4000
    assert "8000 of its 16044 bytes" in caplog.text


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 3_000_000])
def test_a_wav_of_more_than_4_gib(size, tmp_path):
    wav = with_size(encode(np.zeros(8), "WAV", "PCM_16"), "WAV", size)
    with open(tmp_path / "a.wav", "wb") as file:  # with a hole, which takes no space
        file.write(wav[:44])
        file.seek(44 + 6_000_000_000)
        file.write(np.arange(1000, dtype="<i2").tobytes())
    with AudioReader(tmp_path / "a.wav") as reader:
        assert reader.info.num_samples == 3_000_001_000
        np.testing.assert_array_equal(reader.read(RATE, 3_000_000_000), np.arange(1000) / 32768)


@pytest.mark.parametrize("cut", [43, 1, 200, 8000])
def test_a_cut_wav_is_refused(cut):
    wav = encode(sound(0.5), "WAV", "PCM_16")
    with pytest.raises(AudioReadError, match=f"truncated.* 16000 .* {16000 - cut}"):
        read_audio(wav[:-cut], RATE)


# formats whose headers state no length: what is there is read
OPEN_ENDED = {"OGG", "MP3", "IRCAM", "PAF", "PVF", "XI"}


@pytest.mark.parametrize("format", sorted(set(sf.available_formats()) - OPEN_ENDED - {"RAW", "SD2"}))
def test_half_a_file_is_refused(format):
    for subtype in sf.available_subtypes(format):
        for channels in (1, 2):
            samples = np.tile(sound(0.5)[:, None], channels)
            try:
                content = encode(samples, format, subtype, 8000 if format == "WVE" else RATE)
            except sf.LibsndfileError:  # a subtype that is only read, or only mono
                continue
            assert len(read_audio(content, RATE)) > 0
            with pytest.raises(AudioReadError):
                read_audio(content[: len(content) // 2], RATE)


def test_what_decoders_raise_names_the_source(tmp_path):
    (tmp_path / "a.raw").write_bytes(b"junk" * 500)
    os.mkfifo(tmp_path / "pipe.wav")
    sources = [tmp_path / "a.raw", {"path": str(tmp_path / "a.raw"), "bytes": None}, tmp_path / "pipe.wav", "a\0.wav"]
    for source in sources:
        with pytest.raises(AudioReadError) as caught:
            read_audio(source, RATE)
        assert caught.value.source == source_name(source)


def test_a_wav_called_raw_is_read(tmp_path):
    path = tmp_path / "a.raw"
    path.write_bytes(encode(sound(0.5), "WAV"))
    assert len(read_audio(path, RATE)) == 8000


def test_memory_is_not_allocated_by_what_a_header_promises():
    flac = encode(sound(0.5), "FLAC")
    absurd = flac_with_total(flac, (1 << 36) - 1)[:-200]
    with pytest.raises(AudioReadError, match=r"68719476735|lost sync"):
        read_audio(absurd, RATE)
    np.testing.assert_array_equal(read_audio(absurd, RATE, 0.0, 0.1), read_audio(flac, RATE, 0.0, 0.1))
