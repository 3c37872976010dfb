"""Sizes that headers of rare formats declare: libsndfile reads what there is of a truncated file without a word."""

import math
import struct
from collections.abc import Callable
from typing import BinaryIO

from .headers import file_size, read_at


def declared_size(file: BinaryIO, format: str) -> int:
    """Bytes of a whole file of libsndfile's `format` according to its header; 0 for formats that do not declare it."""
    return _SIZES[format](file) if format in _SIZES else 0


def _avr(file: BinaryIO) -> int:
    is_stereo, bits, _, num_samples = struct.unpack(">HH10sI", read_at(file, 12, 18))
    return 128 + num_samples * (2 if is_stereo else 1) * bits // 8


def _mat4(file: BinaryIO) -> int:
    def matrix(position: int) -> int:
        head = read_at(file, position, 20)
        order = "<" if head[0] or not any(head[:4]) else ">"
        kind, rows, columns, _, name_size = struct.unpack(order + "5I", head)
        return position + 20 + name_size + rows * columns * (8, 4, 4, 2, 2, 1)[kind // 10 % 10 % 6]

    return _walk(file, 0, 20, matrix)


def _mat5(file: BinaryIO) -> int:
    order = "<" if read_at(file, 126, 2) == b"IM" else ">"
    end = _walk(file, 128, 8, lambda at: at + 8 + struct.unpack(order + "I", read_at(file, at + 4, 4))[0])
    return end - 8  # libsndfile writes 8 too many


def _mpc2k(file: BinaryIO) -> int:
    is_stereo, num_samples = struct.unpack("<B8xI", read_at(file, 21, 13))
    return 42 + 2 * num_samples * (2 if is_stereo else 1)


def _nist(file: BinaryIO) -> int:
    lines = read_at(file, 0, 1024).decode("latin-1").split("\n")
    fields = {words[0]: words[2] for words in map(str.split, lines[2:]) if len(words) == 3 and words[1] == "-i"}
    counts = [int(fields.get(name, 1)) for name in ("sample_count", "channel_count", "sample_n_bytes")]
    return int(lines[1]) + math.prod(counts)


def _sds(file: BinaryIO) -> int:
    """A block of 127 bytes has 120 bytes of samples; numbers have 7 bits a byte."""
    head = read_at(file, 0, 21)
    num_samples = head[10] | head[11] << 7 | head[12] << 14
    per_block = 120 // -(-head[6] // 7)
    return 21 + -(-num_samples // per_block) * 127


def _voc(file: BinaryIO) -> int:
    """Up to the end of the first block of samples (types 1 and 9): SoX misplaces what is after it."""
    position, kind = int.from_bytes(read_at(file, 20, 2), "little"), -1
    while kind not in (0, 1, 9) and len(head := read_at(file, position, 4)) == 4:
        kind, position = head[0], position + 4 + int.from_bytes(head[1:], "little")
    return position if kind else 0


def _wve(file: BinaryIO) -> int:
    return 32 + int.from_bytes(read_at(file, 18, 4), "big")


def _walk(file: BinaryIO, position: int, header: int, end_of: Callable[[int], int]) -> int:
    """Where the last of the parts from `position` on, with headers of `header` bytes, ends."""
    size = file_size(file)
    while position + header <= size:
        position = end_of(position)
    return position


_SIZES = {
    "AVR": _avr,
    "MAT4": _mat4,
    "MAT5": _mat5,
    "MPC2K": _mpc2k,
    "NIST": _nist,
    "SDS": _sds,
    "VOC": _voc,
    "WVE": _wve,
}
