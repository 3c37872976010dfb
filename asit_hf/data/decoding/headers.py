"""Lengths in the headers of audio files, checked against the file: placeholders and wrong lengths are replaced.

Programs that write to a pipe cannot go back to write the length in the header. libsndfile believes headers; `repaired`
gives it a file with the header as it should be.
"""

import io
import logging
import os
import re
import struct
from bisect import bisect_right
from collections.abc import Iterator
from functools import cache
from itertools import accumulate, pairwise
from typing import BinaryIO

from .decoder import AudioReadError

logger = logging.getLogger(__name__)

_MIB = 1 << 20
# first bytes of a file with chunks -> first chunk, format of a chunk's size, alignment of chunks
_CHUNKED = {
    b"RIFF": (12, "<I", 2),
    b"RIFX": (12, ">I", 2),
    b"RF64": (12, "<I", 2),
    b"BW64": (12, "<I", 2),
    b"FORM": (12, ">I", 2),
    b"caff": (8, ">q", 1),
    b"riff": (40, "<q", 8),  # W64: names of 16 bytes, and sizes that include name and size
}
_LARGEST_WAV = 0xFFFFFFFF  # bytes
_AUDIO_CHUNKS = (b"data", b"SSND", b"BODY")
_FLAC_BLOCKS = (0, 192, *(576 << code for code in range(4)), 0, 0, *(256 << code for code in range(8)))
_FLAC_SYNC = re.compile(rb"\xff[\xf8\xf9]")
_OGG_PAGE = 1 << 16  # bytes of the longest page, and more
_LONG = _MIB  # bytes of files that are searched through whatever their headers state
_FLAC_BEGINNING = re.compile(rb"fLaC\0\0\0\x22")
_OGG_BEGINNING = re.compile(rb"OggS\0[\2\3\6\7]")


class Pieces(io.RawIOBase):
    """A file made of `parts`: bytes, (start, stop) of `file`, or a number of zeros.

    `first_sample` is the number that the file has for its first sample.
    """

    first_sample = 0

    def __init__(self, file: BinaryIO, parts: list[bytes | tuple[int, int] | int]):
        self._file = file
        self._parts = parts
        self._ends = list(accumulate(map(_length, parts)))
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = max(0, offset + (0, self._position, self._ends[-1])[whence])
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        """Fills the buffer unless the file ends, across parts: libsndfile takes fewer bytes for the end."""
        filled = 0
        while filled < len(buffer) and (data := self._read_part(len(buffer) - filled)):
            buffer[filled : filled + len(data)] = data
            filled += len(data)
            self._position += len(data)
        return filled

    def _read_part(self, count: int) -> bytes:
        """At most `count` bytes of the part at the position."""
        index = bisect_right(self._ends, self._position)
        if index == len(self._ends):
            return b""
        part = self._parts[index]
        count = min(count, self._ends[index] - self._position)
        offset = self._position - (self._ends[index - 1] if index else 0)
        if isinstance(part, bytes):
            return part[offset : offset + count]
        return bytes(count) if isinstance(part, int) else read_at(self._file, part[0] + offset, count)


def open_binary(file: str | os.PathLike | bytes | BinaryIO) -> BinaryIO:
    """A path, content or open file as a file to read and seek in, whose closing leaves an open file open."""
    if isinstance(file, (str, os.PathLike)):
        return open(file, "rb")
    if isinstance(file, (bytes, bytearray, memoryview)):
        return io.BytesIO(file)
    return Pieces(file, [(0, file_size(file))])


def _length(part: bytes | tuple[int, int] | int) -> int:
    if isinstance(part, int):
        return part
    return len(part) if isinstance(part, bytes) else part[1] - part[0]


@cache
def warn(name: str, text: str) -> None:
    """Warn about the file `name`, once."""
    logger.warning("%s: %s", name, text)


def file_size(file: BinaryIO) -> int:
    return file.seek(0, io.SEEK_END)


def read_at(file: BinaryIO, position: int, count: int) -> bytes:
    file.seek(position)
    return file.read(count)


def repaired(file: BinaryIO, name: str) -> list[BinaryIO]:
    """Files to read one after another in place of `file`; none if its header is right or of another kind.

    Raises:
        AudioReadError: shorter than its header declares.
    """
    if (begin := skip_id3(file)) and read_at(file, begin, 4) in (*_CHUNKED, b"OggS", b"fLaC"):
        file = Pieces(file, [(begin, file_size(file))])
        return repaired(file, name) or [file]
    magic = read_at(file, 0, 4)
    if magic in _CHUNKED or magic in (b".snd", b"dns."):
        return _with_audio_size(file, magic, name)
    if magic == b"OggS":
        return _ogg_links(file, name)
    if magic == b"fLaC":
        return _flac_links(file, name)
    return []


def skip_id3(file: BinaryIO, position: int = 0) -> int:
    """Where ID3v2 tags at `position` end."""
    while (head := read_at(file, position, 10))[:3] == b"ID3" and len(head) == 10:
        size = 0
        for byte in head[6:]:
            size = size << 7 | byte & 127
        position += 10 + size + 10 * (head[5] >> 4 & 1)
    return position


def audio_end(file: BinaryIO) -> int:
    """Where the tags at the end of a file begin: ID3v1, APE and Lyrics3."""
    end = file_size(file)
    while True:
        tail = read_at(file, max(0, end - 128), min(end, 128))
        if tail.startswith(b"TAG") and len(tail) == 128:
            end -= 128
        elif tail[-32:-24] == b"APETAGEX":
            size, _, flags = struct.unpack("<III", tail[-20:-8])
            end -= size + (32 if flags >> 31 else 0)
        elif tail.endswith(b"LYRICS200") and tail[-15:-9].isdigit():
            end -= int(tail[-15:-9]) + 15
        else:
            return max(0, end)


def is_placeholder(size: int) -> bool:
    """Whether programs write `size` where they do not know it: the largest numbers, or somewhat below them."""
    return size in (-1, 1 << 31) or any(0 < (1 << bits) - size <= 16 * _MIB for bits in (31, 32, 63, 64))


def _with_audio_size(file: BinaryIO, magic: bytes, name: str) -> list[BinaryIO]:
    """Files of chunks (wav, rf64, w64, aiff, caf) and au, with the size of the chunk of samples."""
    size = file_size(file)
    block = 0  # bytes of a frame, in wav and its kin
    field, form = 8, ">I" if magic == b".snd" else "<I"
    if magic in _CHUNKED:
        big_sizes = None
        for kind, start, declared, form in _chunks(file, magic, size):  # noqa: B007, the last one is used
            if kind == b"fmt ":
                block = struct.unpack(form[0] + "H", read_at(file, start + 12, 2))[0]
            elif kind == b"ds64":
                big_sizes = start + 8
            elif kind in _AUDIO_CHUNKS:
                break
        else:
            return []
        field = start - struct.calcsize(form)
        if big_sizes is not None and declared == 0xFFFFFFFF:
            field, form = big_sizes, "<Q"
            declared = struct.unpack(form, read_at(file, field, 8))[0]
    else:
        start, declared = struct.unpack(form[0] + "II", read_at(file, 4, 8))
    found = size - start
    follow = [at for at in (start + declared, start + declared + declared % 2) if _is_chunk(file, at, magic, size)]
    is_unknown = is_placeholder(declared) or (declared <= 0 and not follow)
    if magic == b"RIFF" and found > _LARGEST_WAV and not follow:
        header = struct.pack("<4sI4s4sIQQQI", b"RF64", _LARGEST_WAV, b"WAVE", b"ds64", 28, size + 28, found, 0, 0)
        return [Pieces(file, [header, (12, field), b"\xff" * 4, (start, size)])]
    if not is_unknown and declared <= found:
        return _after_audio(file, magic, start + declared, bool(follow), name)
    if not is_unknown and not (block and declared - found <= start and found % block == 0):
        raise AudioReadError(name, f"truncated: its header declares {declared} bytes of audio, it has {found}")
    true = found + (24 if magic == b"riff" else 0)
    return [_patched(file, field, struct.pack(form, true), size)] if found > 0 else []


def _after_audio(file: BinaryIO, magic: bytes, end: int, is_followed: bool, name: str) -> list[BinaryIO]:
    """Nothing is to be repaired if chunks or little else follow the samples; another file of the kind may follow."""
    size = file_size(file)
    for start in (end, end + end % 2):
        if start < size and read_at(file, start, 4) == magic:
            second = Pieces(file, [(start, size)])
            return [Pieces(file, [(0, start)]), *(repaired(second, name) or [second])]
    if not is_followed and magic != b"riff" and size - end > 1024:
        warn(name, f"{size - end} of its {size} bytes follow the audio that its header declares; they are not read")
    return []


def _chunks(file: BinaryIO, magic: bytes, size: int) -> Iterator[tuple[bytes, int, int, str]]:
    """(name, first byte, declared size, format of the size) of each chunk."""
    position, form, alignment = _CHUNKED[magic]
    name_size = 16 if magic == b"riff" else 4
    header = name_size + struct.calcsize(form)
    while position + header <= size:
        head = read_at(file, position, header)
        declared = struct.unpack(form, head[name_size:])[0]
        if magic == b"riff" and not is_placeholder(declared):
            declared -= header
        yield head[:4], position + header, declared, form
        position += header + max(0, declared)
        position += -position % alignment


def _is_chunk(file: BinaryIO, position: int, magic: bytes, size: int) -> bool:
    """Whether a chunk with a readable name and a size that fits in the file is at `position`."""
    if magic not in _CHUNKED or not 0 <= position < size:
        return False
    form = _CHUNKED[magic][1]
    head = read_at(file, position, 4 + struct.calcsize(form))
    if len(head) < 4 + struct.calcsize(form) or not all(32 <= byte < 127 for byte in head[:4]):
        return False
    return 0 <= struct.unpack(form, head[4:])[0] <= size - position - len(head)


def _patched(file: BinaryIO, position: int, new: bytes, size: int) -> Pieces:
    return Pieces(file, [(0, position), new, (position + len(new), size)])


def _flac_links(file: BinaryIO, name: str) -> list[BinaryIO]:
    """The parts of joined FLAC files, with their lengths; a long file is searched if its length is not as declared."""
    size = file_size(file)
    if size > _LONG and (not (stated := _flac_stated(file))[1] or _flac_end(file, *stated)[0] == stated[1]):
        return _with_flac_length(file, name)
    starts = list(_find(file, _FLAC_BEGINNING))
    if len(starts) < 2:
        return _with_flac_length(file, name)
    flacs = [Pieces(file, [bound]) for bound in zip(starts, [*starts[1:], size])]
    return [link for flac in flacs for link in _with_flac_length(flac, name) or [flac]]


def _flac_stated(file: BinaryIO) -> tuple[int, int]:
    """Samples of a frame and of the file according to the header of a FLAC file."""
    header = read_at(file, 8, 18)
    return int.from_bytes(header[2:4], "big"), int.from_bytes(header[10:18], "big") & (1 << 36) - 1


def _with_flac_length(file: BinaryIO, name: str) -> list[BinaryIO]:
    """FLAC with the number of samples that its last frame ends at."""
    size = file_size(file)
    block, declared = _flac_stated(file)
    fields = int.from_bytes(read_at(file, 18, 8), "big")
    first = _flac_begin(file, block)
    total, is_whole = _flac_end(file, block, declared)
    # a file that ends in the middle of a frame is damaged: reading up to there is possible, past it is an error
    if total <= first or (first == 0 and (total == declared or (declared > total and not is_whole))):
        return []
    if declared not in (0, total - first):
        warn(name, f"its header declares {declared} samples, it has {total - first}; all of them are read")
    repaired = _patched(file, 18, (fields - declared + total).to_bytes(8, "big"), size)
    repaired.first_sample = first
    return [repaired]


def _flac_begin(file: BinaryIO, block: int) -> int:
    """Sample that the first frame begins with: not 0 in a recording of a part of a stream."""
    position, is_last = 4, False
    while not is_last and len(head := read_at(file, position, 4)) == 4:
        is_last, position = head[0] >= 0x80, position + 4 + int.from_bytes(head[1:], "big")
    frame = _flac_frame(read_at(file, position, 16), 0, block)
    return frame[0] if frame else 0


def _flac_end(file: BinaryIO, block: int, declared: int) -> tuple[int, bool]:
    """Samples up to the end of the last whole frame, 0 if there is none, and whether the file ends there."""
    end = audio_end(file)
    reach = 1 << 15
    while True:
        start = max(0, end - reach)
        tail = read_at(file, start, end - start)
        stops = [len(tail)]  # where the frame that is looked for may end
        for sync in reversed(list(_FLAC_SYNC.finditer(tail))):
            frame = _flac_frame(tail, sync.start(), block)
            if frame is None:
                continue
            if frame[1] == declared:
                return declared, True
            for stop in stops[:4]:
                if _crc16(tail[sync.start() : stop]) == 0:
                    return frame[1], stop == len(tail)
            stops.insert(0, sync.start())
        if start == 0 or reach > 16 * _MIB:
            return 0, False
        reach *= 4


def _flac_frame(data: bytes, start: int, block: int) -> tuple[int, int] | None:
    """The sample that the frame at `start` begins with and the one it ends before, or `None` if there is no frame
    header; `block` is the usual number of samples of a frame (RFC 9639, section 9.1)."""
    head = data[start : start + 16]
    if len(head) < 6 or head[1] not in (0xF8, 0xF9):
        return None
    code, rate = head[2] >> 4, head[2] & 15
    if code == 0 or rate == 15 or head[3] >> 4 > 10 or head[3] & 1 or (head[3] >> 1) & 7 == 3:
        return None
    ones = 8 - (~head[4] & 0xFF).bit_length()  # a number as in UTF-8
    length = max(1, ones)
    if ones in (1, 8):
        return None
    number = head[4] & (0x7F >> ones)
    for byte in head[5 : 4 + length]:
        number = number << 6 | byte & 0x3F
    place = 4 + length
    if code in (6, 7):
        count = int.from_bytes(head[place : place + code - 5], "big") + 1
        place += code - 5
    else:
        count = _FLAC_BLOCKS[code]
    place += {12: 1, 13: 2, 14: 2}.get(rate, 0)
    if place >= len(head) or _crc8(head[: place + 1]) != 0:
        return None
    first = number if head[1] == 0xF9 else number * block
    return first, first + count


def _crc8(data: bytes) -> int:
    return _crc(data, 0x07, 8)


def _crc16(data: bytes) -> int:
    return _crc(data, 0x8005, 16)


def _crc(data: bytes, polynomial: int, bits: int) -> int:
    """Cyclic redundancy check, most significant bit first; 0 for data that end with their check."""
    table, shift, mask = _crc_table(polynomial, bits), bits - 8, (1 << bits) - 1
    value = 0
    for byte in data:
        value = (value << 8 & mask) ^ table[value >> shift ^ byte]
    return value


@cache
def _crc_table(polynomial: int, bits: int) -> list[int]:
    table = []
    for byte in range(256):
        value = byte << bits - 8
        for _ in range(8):
            value = value << 1 ^ (polynomial | 1 << bits) * (value >> bits - 1)
        table.append(value)
    return table


def _ogg_links(file: BinaryIO, name: str) -> list[BinaryIO]:
    """The links of a chained Ogg stream; FLAC without its Ogg pages, as libsndfile may lack Ogg FLAC."""
    size = file_size(file)
    starts = []
    previous = -1  # end of the page before
    for start in [0] if size > _LONG and _is_one_stream(file, size) else _find(file, _OGG_BEGINNING):
        if start != previous:  # several streams that begin together are one link
            starts.append(start)
        previous = _page_end(read_at(file, start, 27 + 255), start)
    bounds = list(zip(starts, [*starts[1:], size]))
    if starts and read_at(file, starts[0] + 28, 5) == b"\x7fFLAC":
        flacs = [Pieces(file, list(_ogg_payloads(file, *bound))) for bound in bounds]
        return [repaired for flac in flacs for repaired in _with_flac_length(flac, name) or [flac]]
    return [Pieces(file, [bound]) for bound in bounds] if len(bounds) > 1 else []


def _find(file: BinaryIO, pattern: re.Pattern) -> Iterator[int]:
    """Positions of a pattern of at most 8 bytes."""
    for position in range(0, file_size(file), _MIB):
        data = read_at(file, position, _MIB + 7)
        yield from (position + found.start() for found in pattern.finditer(data) if found.start() < _MIB)


def _is_one_stream(file: BinaryIO, size: int, num_places: int = 16) -> bool:
    """Whether pages all over the file are of one stream, in order: cheaper than to look at all of a long file."""
    serials, numbers = set(), []
    for place in range(num_places + 1):
        position = min(size * place // num_places, size - _OGG_PAGE)
        data = read_at(file, position, _OGG_PAGE + 27)
        start = data.rfind(b"OggS\0") if place == num_places else data.find(b"OggS\0")
        if start < 0 or start + 22 > len(data):
            return False
        serial, number = struct.unpack("<II", data[start + 14 : start + 22])
        serials.add(serial)
        numbers.append(number)
    return len(serials) == 1 and all(before < after for before, after in pairwise(numbers))


def _page_end(head: bytes, start: int) -> int:
    return start + 27 + head[26] + sum(head[27 : 27 + head[26]]) if len(head) > 26 else start


def _ogg_payloads(file: BinaryIO, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of what the pages contain."""
    skipped = 9  # of the first page: its type, version and number of headers, before the FLAC header
    while (head := read_at(file, start, 27 + 255))[:4] == b"OggS" and start < stop:
        end = min(_page_end(head, start), stop)
        yield start + 27 + head[26] + skipped, end
        start, skipped = end, 0
