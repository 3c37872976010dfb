import gzip
import io
import struct
import zipfile

import numpy as np
import pytest
import soundfile

from examples.tools import archives

RATE = 8000
SAMPLES = [np.arange(100, dtype=np.int16) * 300, np.arange(50, dtype=np.int16) - 25, np.full(64, 9, np.int16)]


def encoded(samples, format="WAV", subtype="PCM_16"):
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format=format, subtype=subtype)
    return file.getvalue()


def decoded(path):
    samples, rate = soundfile.read(path, dtype="int16")
    return rate, samples.tolist()


def chunk(name, content):
    return struct.pack("<4sI", name, len(content)) + content + b"\0" * (len(content) % 2)


def unpacked(path):
    """What `unpack` writes beside `path`, by name."""
    count = archives.unpack(path.parent)
    folder = path.with_name(path.name + ".unpacked")
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    assert len(files) == count
    return files


def test_a_soundfont_has_a_file_for_each_sample(tmp_path):
    audio, headers, rates = [], [], [8000, 22050, 44100]
    for number, (samples, rate) in enumerate(zip(SAMPLES, rates)):
        start = sum(len(part) for part in audio)
        kind = 0x8001 if number == 2 else 1  # the third is in the ROM of a sound card
        name = f"Piano {number}".encode()
        headers.append(struct.pack("<20s5IBbHH", name, start, start + len(samples), 0, 0, rate, 60, -7, 0, kind))
        audio += [samples, np.zeros(46, np.int16)]
    headers.append(struct.pack("<20s5IBbHH", b"EOS", 0, 0, 0, 0, 0, 0, 0, 0, 0))
    parts = [b"INFO" + chunk(b"isng", b"odd"), b"sdta" + chunk(b"smpl", np.concatenate(audio).tobytes())]
    parts.append(b"pdta" + chunk(b"phdr", bytes(38)) + chunk(b"shdr", b"".join(headers)))
    path = tmp_path / "grand.SF2"
    path.write_bytes(chunk(b"RIFF", b"sfbk" + b"".join(chunk(b"LIST", part) for part in parts)))
    files = unpacked(path)
    assert [*files] == ["0000-Piano_0.wav", "0001-Piano_1.wav"]
    for file, samples, rate in zip(files.values(), SAMPLES, rates):
        assert decoded(file) == (rate, samples.tolist())


@pytest.mark.parametrize(
    ("modes", "stored"),
    [
        (1, lambda samples: samples.astype("<i2")),
        (3, lambda samples: (samples.astype(np.int32) + 0x8000).astype("<u2")),
        (0, lambda samples: (samples >> 8).astype("i1")),
        (2, lambda samples: ((samples >> 8) + 128).astype("u1")),
    ],
)
def test_a_patch_may_have_8_or_16_bits_signed_or_not(tmp_path, modes, stored):
    content = b"GF1PATCH110\0" + bytes(227)
    for samples in SAMPLES:
        audio = stored(samples).tobytes()
        header = struct.pack("<7sBIIIH", b"Harp", 0, len(audio), 0, 0, RATE).ljust(55, b"\0") + bytes([modes])
        content += header.ljust(96, b"\0") + audio
    (tmp_path / "harp.pat").write_bytes(content)
    files = unpacked(tmp_path / "harp.pat")
    expected = [samples if modes & 1 else samples >> 8 << 8 for samples in SAMPLES]
    assert [decoded(file) for file in files.values()] == [(RATE, samples.tolist()) for samples in expected]
    assert all(name.endswith("-Harp.wav") for name in files)


def test_of_a_zip_archive_only_audio_is_unpacked_and_only_below_its_folder(tmp_path):
    with zipfile.ZipFile(tmp_path / "base.pk3", "w") as archive:
        archive.writestr("sound/door.wav", encoded(SAMPLES[0]))
        archive.writestr("maps/door.png", b"no audio")
        archive.writestr("../../etc/up.ogg", b"above")
    files = unpacked(tmp_path / "base.pk3")
    assert [*files] == ["etc/up.ogg", "sound/door.wav"]
    assert decoded(files["sound/door.wav"]) == (RATE, SAMPLES[0].tolist())


@pytest.mark.parametrize("name", ["sounds.cat", "sounds.ocg"])
def test_wav_and_ogg_files_are_found_in_other_bytes(tmp_path, name):
    wav, ogg = encoded(SAMPLES[0]), encoded(np.zeros(9000), "OGG", "VORBIS")
    nested = chunk(b"RIFF", b"WAVE" + chunk(b"note", wav))  # one file, whatever it holds
    content = b"head OggS" + ogg + ogg + b"RIFF between" + wav + nested + b"tail"
    packed = b"\x1e\x8c" + gzip.compress(content)[2:] if name.endswith("ocg") else content
    (tmp_path / name).write_bytes(packed)
    starts = [9, 9 + len(ogg), 21 + 2 * len(ogg), 21 + 2 * len(ogg) + len(wav)]
    files = unpacked(tmp_path / name)
    assert [*files] == [f"{start:010d}.{kind}" for start, kind in zip(starts, ("ogg", "ogg", "wav", "wav"))]
    assert [file.read_bytes() for file in files.values()] == [ogg, ogg, wav, nested]


def test_what_only_has_the_name_of_an_archive_is_skipped(tmp_path):
    for extension in archives.READERS:
        (tmp_path / f"other{extension}").write_bytes(b"something else")
    (tmp_path / "folder.zip").mkdir()
    (tmp_path / "link.zip").symlink_to("nowhere")
    assert archives.unpack(tmp_path) == 0
