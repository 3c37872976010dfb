"""
Unpacks the sounds of soundfonts and game archives to files, for `make_pool`.

A reader takes the path of an archive and yields the name and the content of its audio files. `READERS` has one for
each file extension: zip (also pk3, love, wz), SoundFont 2 (sf2) and 3 (sf3), Gravis patches (pat), the groups of
OpenClonk, and archives that hold wav and ogg files as they are (the sounds of OpenTTD, the resources of Qt).
"""

import gzip
import io
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

from asit_hf.data.formats import AUDIO_EXTENSIONS

Files = Iterator[tuple[str, bytes]]  # names and contents
UNPACKED = ".unpacked"


def read_zip(path: Path) -> Files:
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if Path(name).suffix.lower() in AUDIO_EXTENSIONS:
                yield "/".join(part for part in name.split("/") if part.strip(".")), archive.read(name)


def read_soundfont(path: Path) -> Files:
    """The samples of a SoundFont 2 as wav: a `LIST` chunk `sdta` with the audio and `pdta` with the headers."""
    content = path.read_bytes()
    lists = {content[start : start + 4]: (start + 4, end) for _, start, end in _chunks(content, 12, len(content))}
    chunks = {name: (start, end) for part in (b"sdta", b"pdta") for name, start, end in _chunks(content, *lists[part])}
    audio = np.frombuffer(content[slice(*chunks[b"smpl"])], "<i2")
    headers = list(struct.iter_unpack("<20s5I2B2H", content[slice(*chunks[b"shdr"])]))
    for number, (name, start, end, _, _, rate, *_, kind) in enumerate(headers[:-1]):  # the last one is a terminator
        if start < end <= len(audio) and not kind & 0x8000:  # else in the ROM of a sound card
            yield f"{number:04d}-{_plain(name)}.wav", _wav(audio[start:end], rate)


def read_patch(path: Path) -> Files:
    """The samples of a Gravis patch with one layer as wav: a header of 239 bytes, then 96 bytes before each sample."""
    content, at = path.read_bytes(), 239
    while at + 96 < len(content):
        name, size, rate, modes = struct.unpack_from("<7sxI8xH33xB", content, at)
        at += 96
        audio = np.frombuffer(content[at : at + size], "<i2" if modes & 1 else "i1").astype(np.int16)
        audio = audio if modes & 1 else audio << 8
        yield f"{at:08d}-{_plain(name)}.wav", _wav(audio ^ -0x8000 if modes & 2 else audio, rate)  # 2: unsigned
        at += size


def read_group(path: Path) -> Files:
    """The sounds of a group of OpenClonk, which is gzip with another magic number."""
    return _sounds(gzip.decompress(b"\x1f\x8b" + path.read_bytes()[2:]))


def read_uncompressed(path: Path) -> Files:
    """The wav and ogg files somewhere in a file, named by their position."""
    return _sounds(path.read_bytes())


def _sounds(content: bytes) -> Files:
    end = 0
    for match in re.finditer(rb"RIFF....WAVE|OggS\0\x02", content, re.DOTALL):
        if (start := match.start()) >= end:
            is_wav = content.startswith(b"RIFF", start)
            end = start + 8 + struct.unpack_from("<I", content, start + 4)[0] if is_wav else _ogg_end(content, start)
            yield f"{start:010d}{'.wav' if is_wav else '.ogg'}", content[start:end]


def _ogg_end(content: bytes, start: int) -> int:
    """End of the last page of the stream that begins at `start`: a page has its segments' sizes at byte 27."""
    last = False
    while not last and content.startswith(b"OggS", start):
        last = bool(content[start + 5] & 4)
        sizes = content[start + 27 : start + 27 + content[start + 26]]
        start += 27 + len(sizes) + sum(sizes)
    return start


def _chunks(content: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of the chunks of a RIFF file."""
    while start + 8 <= end:
        name, size = struct.unpack_from("<4sI", content, start)
        yield name, start + 8, start + 8 + size
        start += 8 + size + size % 2


def _plain(name: bytes) -> str:
    return re.sub(r"[^\w.-]+", "_", name.split(b"\0")[0].decode("ascii", "replace")).strip("_")


def _wav(audio: np.ndarray, rate: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, audio, rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


READERS = dict.fromkeys((".zip", ".pk3", ".love", ".wz"), (b"PK", read_zip))  # how they begin, reader
READERS |= dict.fromkeys((".ocd", ".ocf", ".ocg", ".ocs"), (b"\x1e\x8c", read_group))
READERS |= dict.fromkeys((".sf3", ".cat", ".rcc"), (b"", read_uncompressed))
READERS |= {".sf2": (b"RIFF", read_soundfont), ".pat": (b"GF1PATCH", read_patch)}


def unpack(folder: Path) -> int:
    """Writes the sounds of each archive below `folder` to `ARCHIVE.unpacked` beside it; returns their number."""
    count = 0
    for path in [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in READERS]:
        magic, reader = READERS[path.suffix.lower()]
        if path.is_symlink() or not path.is_file():
            continue
        with path.open("rb") as file:
            if file.read(len(magic)) != magic:
                continue
        for name, content in reader(path):
            target = path.with_name(path.name + UNPACKED) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            count += 1
    return count
