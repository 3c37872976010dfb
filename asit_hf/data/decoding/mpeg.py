"""MPEG audio (mp3, mp2, mp1) whose header does not state its length: its frames are counted.

A file has a length only if its first frame is an Xing or Info header, which files from encoders that write to a
pipe lack. libsndfile then takes the bit rate of the first frame for that of all; of joined files it reads the first.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import BinaryIO, NamedTuple

import numpy as np

from .decoder import AudioInfo, Decoder
from .headers import Pieces, audio_end, read_at, skip_id3

_FIRST_BLOCK, _BLOCK = 1 << 12, 1 << 22  # bytes that are read at once
# bit rates in kbit/s by version (1, otherwise 2 and 2.5) and layer (ISO 11172-3, 13818-3)
_BIT_RATES = {
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}  # Hz, by bits of the version
_SYNC = re.compile(rb"\xff[\xe2-\xff]|ID3")
_INITIALS = frozenset(b"XIV")  # of Xing, Info and VBRI
_LARGEST = 2881  # bytes of a frame (layer 2, 384 kbit/s at 32 kHz: 1728), with much room
_HEADER_REACH = 200  # bytes of a frame up to the end of such a header
_RESERVOIR = 511  # bytes before a frame that it may need
_DECODER_DELAY = 529  # samples by which a decoder of layer 3 lags, not counted in the encoder's delay


class _Format(NamedTuple):
    layer: int
    samples: int  # per frame
    sampling_rate: int
    is_mono: bool


@cache
def _frame(second: int, third: int, is_mono: bool) -> tuple[int, _Format] | None:
    """Bytes and format of the frame whose header has this second and third byte, if they are valid."""
    version, layer, bit_rate, rate = second >> 3 & 3, 4 - (second >> 1 & 3), third >> 4, third >> 2 & 3
    if second < 0xE0 or version == 1 or layer == 4 or not 0 < bit_rate < 15 or rate == 3:
        return None
    kilobits, sampling_rate = _BIT_RATES[version == 3, layer][bit_rate], _RATES[version][rate]
    samples = 384 if layer == 1 else 576 if layer == 3 and version != 3 else 1152
    unit = 4 if layer == 1 else 1  # bytes
    size = (samples // 8 // unit * 1000 * kilobits // sampling_rate + (third >> 1 & 1)) * unit
    return size, _Format(layer, samples, sampling_rate, is_mono)


@dataclass
class _Header:
    """What an Xing or Info frame states: 0 for what it does not, but no `delay` without an encoder's tag."""

    num_frames: int = 0
    num_bytes: int = 0
    delay: int | None = None
    padding: int = 0


@dataclass
class Stretch:
    """Frames of one format that follow one another, and the header before them."""

    format: _Format
    header: _Header | None
    starts: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    @property
    def num_skipped(self) -> int:
        """Samples at the beginning that the encoder and the decoder add."""
        return 0 if self.header is None or self.header.delay is None else self.header.delay + _DECODER_DELAY

    @property
    def num_samples(self) -> int:
        samples = len(self.starts) * self.format.samples - self.num_skipped
        if self.num_skipped and self.header.num_frames == len(self.starts):  # the end, which was padded, is there
            samples -= max(0, self.header.padding - _DECODER_DELAY)
        return max(0, samples)


def begins_with_frame(file: BinaryIO) -> bool:
    """Whether a file begins with what may be a frame, after its tags."""
    head = read_at(file, skip_id3(file), 4)
    return len(head) == 4 and _frame_at(head, 0) is not None


def is_recording(file: BinaryIO) -> bool:
    """Whether a file begins in the middle of a frame, as recordings of streams do, and several others follow it."""
    block = read_at(file, 0, 1 << 14)
    for sync in _SYNC.finditer(block, 0, _LARGEST):
        index, format, count = sync.start(), None, 0
        while index + 4 <= len(block) and (found := _frame_at(block, index)) and format in (None, found[1]):
            index, format, count = index + found[0], found[1], count + 1
        if count > 3:
            return True
    return False


def count_frames(file: BinaryIO) -> list[Stretch]:
    """The stretches of frames of an MPEG file; none if its header states its length rightly or it has no frame.

    What is before, between and after frames, such as tags, is skipped.
    """
    position, end = skip_id3(file), audio_end(file)
    block, begin = b"", 0
    stretches: list[Stretch] = []
    format = None  # of the frame that ends at `position`
    while position + 4 <= end:
        index = position - begin
        if index + _HEADER_REACH > len(block) and begin + len(block) < end:
            count = _BLOCK if block else _FIRST_BLOCK
            block, begin, index = read_at(file, position, min(count, end - position)), position, 0
        found = _frame_at(block, index)
        if found is None or (found[1] != format and not _is_followed(file, position, found, end)):
            format = None
            if block[index : index + 3] == b"ID3" and (after := skip_id3(file, position)) > position:
                position = after
            else:
                sync = _SYNC.search(block, index + 1)
                position = begin + (sync.start() if sync else max(index + 1, len(block) - 2))
            continue
        size, format = found
        header = _header(block, index, format)
        if not stretches and header and header.num_frames and end - position - header.num_bytes in (0, size):
            return []
        if not stretches or header or format != stretches[-1].format:
            stretches.append(Stretch(format, header))
        if header is None and position + size <= end:
            stretches[-1].starts.append(position)
            stretches[-1].sizes.append(size)
            position = begin + _add_frames(stretches[-1], block, index + size, begin)
        else:
            position += size
    stretches = [stretch for stretch in stretches if stretch.num_samples > 0]
    if len(stretches) == 1 and stretches[0].header and stretches[0].header.num_frames == len(stretches[0].starts):
        return []
    return stretches


def _add_frames(stretch: Stretch, block: bytes, index: int, begin: int) -> int:
    """Add the frames from `index` on that begin as the one before, without checks; returns where others begin."""
    second, is_mono = block[stretch.starts[-1] - begin + 1], stretch.format.is_mono
    size_of, place = _sizes(second, stretch.format), _header_place(stretch.format)
    starts, sizes = stretch.starts, stretch.sizes
    last = len(block) - _LARGEST
    while index < last and block[index] == 0xFF and block[index + 1] == second:
        size = size_of[block[index + 2]]
        if size == 0 or (block[index + 3] >= 0xC0) != is_mono:
            break
        if _INITIALS.intersection((block[index + place], block[index + place + 2], block[index + 36])):
            break
        starts.append(begin + index)
        sizes.append(size)
        index += size
    return index


@cache
def _sizes(second: int, format: _Format) -> list[int]:
    """Bytes of a frame of this format by the third byte of its header; 0 for other formats."""
    found = [_frame(second, third, format.is_mono) for third in range(256)]
    return [frame[0] if frame and frame[1] == format else 0 for frame in found]


class MpegDecoder:
    """Decoder of a stretch of frames, which opens a file of the frames of each window with `open_frames`."""

    def __init__(self, file: BinaryIO, stretch: Stretch, open_frames: Callable[[BinaryIO], Decoder]):
        self._file = file
        self._stretch = stretch
        self._open_frames = open_frames
        self.info = AudioInfo(stretch.format.sampling_rate, stretch.num_samples, 1 if stretch.format.is_mono else 2)

    def read(self, first: int, last: int) -> np.ndarray:
        stretch, per_frame = self._stretch, self._stretch.format.samples
        first, last = first + stretch.num_skipped, min(last, self.info.num_samples) + stretch.num_skipped
        begin, exact = self._lead_in(first // per_frame)
        starts, sizes = (part[begin : -(-last // per_frame)] for part in (stretch.starts, stretch.sizes))
        content = read_at(self._file, starts[0], starts[-1] + sizes[-1] - starts[0])
        frames = [content[at - starts[0] : at - starts[0] + size] for at, size in zip(starts, sizes)]
        if stretch.format.layer == 3:
            self._silence(frames, exact - begin)
        content = b"".join(frames) * (2 if len(frames) == 1 else 1)  # libsndfile does not recognize a single frame
        # libsndfile takes the bit rate of the first frame for that of all, and what follows from it for the length
        window = self._open_frames(Pieces(io.BytesIO(content), [(0, len(content)), 64 * len(content)]))
        samples = window.read(0, last - begin * per_frame)
        window.close()
        if len(samples) < last - begin * per_frame:
            found = begin * per_frame + len(samples) - stretch.num_skipped
            self.info = replace(self.info, num_samples=max(0, found))
        return samples[first - begin * per_frame :]

    def close(self) -> None:
        pass

    def _lead_in(self, frame: int) -> tuple[int, int]:
        """The frame to begin with so that `frame` is decoded as in the whole file, and the first one to decode: those
        before it are there for the data that later frames take from them.
        """
        around, held = _header_place(self._stretch.format) + 2, 0
        exact = frame = max(0, frame - 2)  # for the overlap of frames and the filter's memory
        while frame > 0 and held < _RESERVOIR:
            frame -= 1
            held += max(0, self._stretch.sizes[frame] - around)
        return frame, exact

    def _silence(self, frames: list[bytes], count: int) -> None:
        """Replace what the first `count` frames sound like, keeping the data in them that later frames take: decoders
        complain of frames that take data from before the first one.
        """
        bits, held = (9 if self._stretch.format.samples == 1152 else 8), 0
        for index, frame in enumerate(frames[:count]):
            place = 4 if frame[1] & 1 else 6  # after a checksum
            size = _header_place(self._stretch.format) - 4
            taken = min(held, (1 << bits) - 1)  # all that there is, as decoders keep no more than a frame takes
            side = (taken << 8 * size - bits).to_bytes(size, "big")
            frames[index] = frame[:place] + side + frame[place + size :]
            held += len(frame) - place - size


def _frame_at(block: bytes, index: int) -> tuple[int, _Format] | None:
    """Size and format of the frame whose header is at `index`."""
    if block[index] != 0xFF:
        return None
    return _frame(block[index + 1], block[index + 2], block[index + 3] >= 0xC0)


def _is_followed(file: BinaryIO, position: int, found: tuple[int, _Format], end: int) -> bool:
    """Whether the file ends after the frame `found` or another frame of its format follows, or a tag."""
    following = read_at(file, position + found[0], 4) if position + found[0] + 4 <= end else b""
    if len(following) < 4 or following[:3] == b"ID3":
        return position + found[0] <= end
    other = _frame_at(following, 0)
    return other is not None and other[1] == found[1]


def _header_place(format: _Format) -> int:
    """Bytes of a frame before an Xing or Info header: the frame's header and side information."""
    return 4 + {(1152, False): 32, (576, True): 9}.get((format.samples, format.is_mono), 17)


def _header(block: bytes, index: int, format: _Format) -> _Header | None:
    """The header in the frame at `index`, if it is one."""
    if format.layer != 3:
        return None
    if block[index + 36 : index + 40] == b"VBRI":
        return _Header()  # libsndfile does not read it
    place = index + _header_place(format)
    names = (b"Xing", b"Info")
    if block[place : place + 4] not in names:
        place += 2  # some programs count the checksum of a frame, others do not
    if block[place : place + 4] not in names:
        return None
    header = _Header()
    flags = block[place + 7]
    place += 8
    if flags & 1:
        header.num_frames = int.from_bytes(block[place : place + 4], "big")
        place += 4
    if flags & 2:
        header.num_bytes = int.from_bytes(block[place : place + 4], "big")
        place += 4
    place += 100 * (flags >> 2 & 1) + 4 * (flags >> 3 & 1)
    if any(block[place : place + 4]):  # name of the encoder
        delays = int.from_bytes(block[place + 21 : place + 24], "big")
        header.delay, header.padding = delays >> 12, delays & 0xFFF
    return header
