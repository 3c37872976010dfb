"""
Opus parcels: a packed pool in about a sixteenth of its size, to carry it to another machine.

    python -m asit_hf.data.parcels encode POOL PARCELS
    python -m asit_hf.data.parcels decode PARCELS POOL

A folder of parcels holds Ogg Opus files, each with consecutive clips of one part of the pool, and `index.json`. Clips
come back at their exact lengths, and sound nearly the same. Needs soundfile 0.13 or later beside torch and numpy.
"""

import argparse
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np

from ..utils.files import whole_file
from .packed import INDEX, PackedAudio, read_index, to_pcm, write_index, write_packed

FORMAT = "asit opus parcels"
RATES = (8000, 12000, 16000, 24000, 48000)
FRAMES_PER_SECOND = 50  # of Opus as libsndfile writes it
BLOCK = 1 << 16  # libsndfile's Ogg encoder crashes on long blocks


def is_parcels(folder: str | os.PathLike) -> bool:
    """Whether a folder holds Opus parcels."""
    path = os.path.join(folder, INDEX)
    if not os.path.isfile(path):  # False for what is too long or odd to be a path
        return False
    with open(path, encoding="utf-8", errors="replace") as file:
        return FORMAT in file.read(1000)


def encode_parcels(
    pool: PackedAudio,
    folder: str | os.PathLike,
    kilobits: float = 16.0,
    max_megabytes: float = 16.0,
    num_threads: int | None = None,
) -> int:
    """
    Write a packed pool as Opus parcels; until all files are there, `decode_parcels` finds none.

    Args:
        kilobits: the bit rate that the encoder aims at, in kb/s (6 to 256). It varies with the sound.
        max_megabytes: the largest file, in MiB.
        num_threads: files encoded at once (default: as many as there are processors).

    Returns:
        The bytes of all files.

    Raises:
        FileExistsError: `folder` holds parcels, or other files with an index, already.
        ValueError: a sampling rate that Opus does not have, a bit rate out of range, or a clip that alone is larger
            than a file may be.
    """
    folder = Path(folder)
    if (folder / INDEX).exists():
        raise FileExistsError(f"{folder} holds {INDEX} already: remove it, or write to another folder")
    if pool.sampling_rate not in RATES:
        raise ValueError(f"expected a pool of one of Opus' sampling rates {RATES}, got {pool.sampling_rate} Hz")
    if not 6 <= kilobits <= 256:
        raise ValueError(f"expected 6 to 256 kilobits a second, got {kilobits}")
    folder.mkdir(parents=True, exist_ok=True)
    max_bytes = int(max_megabytes * 2**20)
    # at twice the bit rate aimed at, files are still small enough; those that are not are halved
    ranges = _split(pool, max_samples=int(max_bytes * 8 / (2000 * kilobits) * pool.sampling_rate))

    def encode(clips: range) -> list[tuple[str, int]]:
        name = f"{clips.start:09d}.opus"
        first, last = int(pool.offsets[clips[0]]), int(pool.offsets[clips[-1]] + pool.lengths[clips[-1]])
        content = _encode(pool.audio[first:last].numpy(), pool.sampling_rate, kilobits)
        if len(content) <= max_bytes:
            with whole_file(folder / name) as unfinished:
                unfinished.write_bytes(content)
            return [(name, len(clips))]
        if len(clips) == 1:
            raise ValueError(
                f"expected files of at most {max_megabytes:.3g} MiB, got {len(content) / 2**20:.3g} MiB for the clip "
                f"{pool.names[clips[0]]}: raise max_megabytes or lower kilobits"
            )
        middle = len(clips) // 2
        return encode(clips[:middle]) + encode(clips[middle:])

    with ThreadPoolExecutor(num_threads or os.cpu_count()) as threads:  # libsndfile lets go of Python's lock
        files = list(chain.from_iterable(threads.map(encode, ranges)))
    write_index(folder / INDEX, FORMAT, pool.sampling_rate, pool.names, pool.parts, pool.lengths.tolist(), files=files)
    return sum((folder / name).stat().st_size for name, _ in files)


def decode_parcels(
    parcels: str | os.PathLike, folder: str | os.PathLike, num_threads: int | None = None
) -> PackedAudio:
    """
    Write parcels as a packed pool, and open it.

    Args:
        num_threads: files decoded at once (default: as many as there are processors).

    Raises:
        FileNotFoundError: no parcels, or a missing file.
        FileExistsError: `folder` holds packed audio already.
        ValueError: a damaged index, or a file that is more than one frame of Opus (20 ms) shorter or longer than its
            clips.
    """
    parcels = Path(parcels)
    index = read_index(parcels / INDEX, FORMAT)
    rate, names, lengths = index["sampling_rate"], index["names"], index["lengths"]
    if sum(count for _, count in index["files"]) != len(names):
        raise ValueError(f"{parcels / INDEX} is damaged: its files do not hold its {len(names)} clips")
    parts = index.get("parts") or [None] * len(names)
    stops = np.cumsum([count for _, count in index["files"]])
    jobs = [
        (parcels / name, lengths[stop - count : stop]) for (name, count), stop in zip(index["files"], stops.tolist())
    ]

    def clips() -> Iterator[tuple[str, str | None, np.ndarray]]:
        at_once = num_threads or os.cpu_count() or 1
        with ThreadPoolExecutor(at_once) as threads:
            # so many files at a time: what is decoded waits in memory until it is written
            groups = (jobs[start : start + at_once] for start in range(0, len(jobs), at_once))
            files = (file for group in groups for file in threads.map(lambda job: _decode(*job, rate), group))
            yield from zip(names, parts, chain.from_iterable(files))

    write_packed(folder, clips(), rate)
    return PackedAudio.load(folder)


def _split(pool: PackedAudio, max_samples: int) -> list[range]:
    """Consecutive clips of one part, together of at most so many samples, or one clip."""
    starts, samples = [0], 0
    for clip, length in enumerate(pool.lengths.tolist()):
        other_part = pool.parts is not None and pool.parts[clip] != pool.parts[starts[-1]]
        if clip > starts[-1] and (other_part or samples + length > max_samples):
            starts.append(clip)
            samples = 0
        samples += length
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(pool)])]


def _encode(samples: np.ndarray, sampling_rate: int, kilobits: float) -> bytes:
    import soundfile

    level = 1 - (kilobits - 6) / 250  # libsndfile's scale from 256 kb/s to 6 kb/s
    content = io.BytesIO()
    with soundfile.SoundFile(content, "w", sampling_rate, 1, "OPUS", format="OGG", compression_level=level) as file:
        for start in range(0, len(samples), BLOCK):
            file.write(samples[start : start + BLOCK])
    return content.getvalue()


def _decode(path: Path, lengths: list[int], sampling_rate: int) -> list[np.ndarray]:
    """The clips of one file, int16."""
    import soundfile

    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, which the index beside it names")
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            samples = np.concatenate([to_pcm(block) for block in file.blocks(1 << 20, dtype="float32")])
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} is damaged: {error.error_string}") from error
    expected = sum(lengths)
    if rate != sampling_rate or abs(len(samples) - expected) > sampling_rate // FRAMES_PER_SECOND:
        raise ValueError(
            f"{path} is damaged: expected {expected} samples at {sampling_rate} Hz, got {len(samples)} at {rate}"
        )
    samples = np.pad(samples[:expected], (0, max(0, expected - len(samples))))
    return np.split(samples, np.cumsum(lengths)[:-1])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    encode = commands.add_parser("encode", help="packed pool to Opus parcels")
    encode.add_argument("source", help="folder of packed audio")
    encode.add_argument("target", help="folder to write")
    encode.add_argument("--kilobits", type=float, default=16.0, help="bit rate aimed at (default: %(default)s kb/s)")
    encode.add_argument("--max_megabytes", type=float, default=16.0, help="largest file (default: %(default)s MiB)")
    decode = commands.add_parser("decode", help="Opus parcels to packed pool")
    decode.add_argument("source", help="folder of parcels")
    decode.add_argument("target", help="folder to write")
    for command in (encode, decode):
        command.add_argument("--num_threads", type=int, help="files at once (default: number of processors)")
    options = vars(parser.parse_args(arguments))
    command, source, target = (options.pop(name) for name in ("command", "source", "target"))
    if command == "encode":
        pool = PackedAudio.load(source)
        size = encode_parcels(pool, target, **options)
        bit_rate = size * 8 / (pool.hours * 3600) / 1000
        print(f"{pool.hours:.2f} hours in {size / 2**20:.1f} MiB, {bit_rate:.1f} kb/s, in {target}")
    else:
        pool = decode_parcels(source, target, **options)
        print(f"{len(pool)} clips, {pool.hours:.2f} hours, {pool.num_bytes / 2**20:.1f} MiB in {target}")


if __name__ == "__main__":
    main()
