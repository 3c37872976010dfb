"""
Opus parcels: a packed pool compressed to about a sixteenth of its size, to copy it to another machine.

    python -m asit_hf.data.parcels encode POOL PARCELS
    python -m asit_hf.data.parcels decode PARCELS POOL

A folder of parcels holds Ogg Opus files, each with consecutive clips of one part of the pool, and `index.json`. Clips
keep their exact lengths and nearly their sound. Needs soundfile 0.13 or later, torch and numpy.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np

from ..utils.files import whole_file
from .audio import encode_audio
from .packed import INDEX, Clip, PackedAudio, new_folder, read_index, to_pcm, write_index, write_packed

FORMAT = "asit opus parcels"
RATES = (8000, 12000, 16000, 24000, 48000)
FRAMES_PER_SECOND = 50  # of Opus as libsndfile writes it


def is_parcels(folder: str | os.PathLike) -> bool:
    """Whether a folder holds Opus parcels."""
    path = os.path.join(folder, INDEX)
    if not os.path.isfile(path):  # False for any string that cannot be a path
        return False
    with open(path, encoding="utf-8", errors="replace") as file:
        return FORMAT in file.read(1000)


def encode_parcels(
    pool: PackedAudio, folder: str | Path, kilobits: float = 16.0, max_megabytes: float = 16.0, num_threads: int = 0
) -> int:
    """Write a packed pool as Opus parcels, which cannot be decoded until all files are written.

    Args:
        kilobits: average bit rate in kb/s that the encoder aims at, 6 to 256 (libsndfile's levels 1 to 0).
        max_megabytes: size of the largest file in MiB.
        num_threads: files encoded in parallel; 0 for the number of processors.

    Returns:
        The total size in bytes.

    Raises:
        FileExistsError: `folder` already holds parcels, or other files with an index.
        ValueError: a sampling rate that Opus does not support, a bit rate out of range, or a clip that alone exceeds
            the size of a file.
    """
    if pool.sampling_rate not in RATES:
        raise ValueError(f"expected one of Opus' sampling rates {RATES}, got a pool of {pool.sampling_rate} Hz")
    if not 6 <= kilobits <= 256:
        raise ValueError(f"expected 6 to 256 kilobits per second, got {kilobits}")
    folder = new_folder(folder)
    max_bytes = int(max_megabytes * 2**20)
    # files that exceed the limit even so, at more than twice the bit rate, are split in half
    ranges = _split(pool, max_samples=int(max_bytes * 8 / (2000 * kilobits) * pool.sampling_rate))

    def encode(clips: range) -> list[tuple[str, int]]:
        name = f"{clips.start:09d}.opus"
        first, last = int(pool.offsets[clips[0]]), int(pool.offsets[clips[-1]] + pool.lengths[clips[-1]])
        samples = pool.audio[first:last].numpy()
        content = encode_audio(samples, pool.sampling_rate, "OGG", "OPUS", compression_level=1 - (kilobits - 6) / 250)
        if len(content) <= max_bytes:
            with whole_file(folder / name) as unfinished:
                unfinished.write_bytes(content)
            return [(name, len(clips))]
        if len(clips) == 1:
            got = f"{len(content) / 2**20:.3g} MiB for the clip {pool.names[clips[0]]}"
            raise ValueError(f"expected at most {max_megabytes:.3g} MiB, got {got}: raise max_megabytes")
        middle = len(clips) // 2
        return encode(clips[:middle]) + encode(clips[middle:])

    with ThreadPoolExecutor(num_threads or os.cpu_count()) as threads:  # libsndfile releases the GIL
        files = list(chain.from_iterable(threads.map(encode, ranges)))
    write_index(folder / INDEX, FORMAT, pool.sampling_rate, pool.names, pool.parts, pool.lengths.tolist(), files=files)
    return sum((folder / name).stat().st_size for name, _ in files)


def decode_parcels(parcels: str | Path, folder: str | Path, num_threads: int = 0) -> PackedAudio:
    """Write parcels as a packed pool, decoding `num_threads` files in parallel, and open it.

    Raises:
        FileNotFoundError: no parcels, or a missing file.
        FileExistsError: `folder` already holds packed audio.
        ValueError: a damaged index, or a file whose length differs from that of its clips by more than one frame of
            Opus (20 ms).
    """
    parcels = Path(parcels)
    index = read_index(parcels / INDEX, FORMAT)
    rate, names, lengths = index["sampling_rate"], index["names"], index["lengths"]
    if sum(count for _, count in index["files"]) != len(names):
        raise ValueError(f"{parcels / INDEX} is damaged: expected files with {len(names)} clips in total")
    parts = index.get("parts") or [None] * len(names)
    stops = np.cumsum([count for _, count in index["files"]])
    jobs = [(parcels / name, lengths[stop - count : stop]) for (name, count), stop in zip(index["files"], stops)]

    def clips() -> Iterator[Clip]:
        at_once = num_threads or os.cpu_count() or 1
        with ThreadPoolExecutor(at_once) as threads:
            # in groups, as decoded files wait in memory until they are written
            groups = (jobs[start : start + at_once] for start in range(0, len(jobs), at_once))
            files = (file for group in groups for file in threads.map(lambda job: _decode(*job, rate), group))
            yield from zip(names, parts, chain.from_iterable(files))

    write_packed(folder, clips(), rate)
    return PackedAudio.load(folder)


def _split(pool: PackedAudio, max_samples: int) -> list[range]:
    """Ranges of consecutive clips of one part, with at most `max_samples` together or of one clip."""
    starts, samples = [0], 0
    for clip, length in enumerate(pool.lengths.tolist()):
        other_part = pool.parts is not None and pool.parts[clip] != pool.parts[starts[-1]]
        if clip > starts[-1] and (other_part or samples + length > max_samples):
            starts.append(clip)
            samples = 0
        samples += length
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(pool)])]


def _decode(path: Path, lengths: list[int], sampling_rate: int) -> list[np.ndarray]:
    """The clips of one file, int16."""
    import soundfile

    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, but listed in {INDEX}")
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            samples = np.concatenate([to_pcm(block) for block in file.blocks(1 << 20, dtype="float32")])
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} is damaged: {error.error_string}") from error
    expected = sum(lengths)
    if rate != sampling_rate or abs(len(samples) - expected) > sampling_rate // FRAMES_PER_SECOND:
        got = f"{len(samples)} at {rate} Hz"
        raise ValueError(f"{path} is damaged: expected {expected} samples at {sampling_rate} Hz, got {got}")
    samples = np.pad(samples[:expected], (0, max(0, expected - len(samples))))
    return np.split(samples, np.cumsum(lengths)[:-1])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    encode = commands.add_parser("encode", help="convert a packed pool to Opus parcels")
    encode.add_argument("pool", help="folder of packed audio")
    encode.add_argument("parcels", help="folder to write")
    encode.add_argument("--kilobits", type=float, default=16.0, help="average bit rate in kb/s (default: %(default)s)")
    encode.add_argument("--max_megabytes", type=float, default=16.0, help="largest file in MiB (default: %(default)s)")
    decode = commands.add_parser("decode", help="convert Opus parcels to a packed pool")
    decode.add_argument("parcels", help="folder of parcels")
    decode.add_argument("pool", help="folder to write")
    for command in (encode, decode):
        command.add_argument("--num_threads", type=int, default=0, help="files in parallel; 0: one per processor")
    options = vars(parser.parse_args(arguments))
    command, folder, parcels = (options.pop(name) for name in ("command", "pool", "parcels"))
    if command == "encode":
        pool = PackedAudio.load(folder)
        size = encode_parcels(pool, parcels, **options)
        bit_rate = size * 8 / (pool.hours * 3600) / 1000
        print(f"{pool.hours:.2f} hours in {size / 2**20:.1f} MiB, {bit_rate:.1f} kb/s, in {parcels}")
    else:
        pool = decode_parcels(parcels, folder, **options)
        print(f"{len(pool)} clips, {pool.hours:.2f} hours, {pool.num_bytes / 2**20:.1f} MiB in {folder}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
