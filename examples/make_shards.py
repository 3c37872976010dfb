"""
Turns audio into shards that stream fast: few large files, resampled and encoded once.

    python examples/make_shards.py --source AUDIO_FOLDER --output_dir shards --format parquet --codec flac \
        --sampling_rate 16000 --clips_per_shard 2000 --num_workers 8
    python examples/run_pretraining.py --train_data shards --streaming True ...

`--source` is a folder, a manifest, parquet files or a Hub data set. parquet shards have an `audio` column of encoded
bytes beside the other columns of the source; tar shards have webdataset's layout, a sound and a json file for each
clip. Both hold the clip's `original_path`. Stopped? The same command goes on with the shards that are missing. What
cannot be read is left out and listed in `bad_files.jsonl`.

To stream on N processes of W loader workers, make a multiple of N shards, at least N x W.
"""

import argparse
import io
import json
import os
import sys
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import soundfile
from datasets import Audio, Dataset, Features, Value
from tqdm.auto import tqdm

from asit_hf.data import AudioReadError, load_audio_dataset, read_audio
from asit_hf.data.audio import source_name

# File extension, libsndfile's format and subtype.
CODECS = {"flac": (".flac", "FLAC", "PCM_16"), "opus": (".opus", "OGG", "OPUS"), "vorbis": (".ogg", "OGG", "VORBIS")}
OPUS_RATES = (8000, 12000, 16000, 24000, 48000)
BAD_FILES = "bad_files.jsonl"
SETTINGS = ".make_shards.json"
ROWS_IN_MEMORY = 100  # of a parquet shard, when it is read


def encode(source: Any, sampling_rate: int, codec: str) -> bytes:
    """The whole clip, mono, at `sampling_rate`; samples beyond [-1, 1] are clipped."""
    _, format, subtype = CODECS[codec]
    waveform = read_audio(source, sampling_rate)
    content = io.BytesIO()
    with soundfile.SoundFile(content, "w", sampling_rate, 1, subtype, format=format) as file:
        for start in range(0, len(waveform), 1 << 16):  # libsndfile's ogg encoder crashes on long blocks
            file.write(np.clip(waveform[start : start + (1 << 16)], -1, 1))
    return content.getvalue()


def encode_or_reason(source: Any, sampling_rate: int, codec: str) -> bytes | str:
    try:
        return encode(source, sampling_rate, codec)
    except AudioReadError as error:
        return error.reason


def make_shards(
    dataset: Dataset,
    output_dir: Path,
    format: str = "parquet",
    codec: str = "flac",
    sampling_rate: int = 16000,
    clips_per_shard: int = 2000,
    num_workers: int = 0,
    progress: bool = True,
) -> dict[str, int]:
    """
    Writes `clips-00000-of-N.parquet` (or `.tar`), ...; shards that are there already are kept.

    Args:
        dataset: with an `audio` column, see `load_audio_dataset`.
        codec: "flac" (16 bit), "opus" or "vorbis".
        clips_per_shard: rows of `dataset` for each shard, in order; unreadable ones are missing from it.
        num_workers: processes that decode and encode; 0: this one.

    Returns:
        The number of `shards`, and of the `clips` and `bad` files of those written by this call.

    Raises:
        ValueError: a rate that the codec does not have, or an `output_dir` with shards of other settings or data.
    """
    if codec == "opus" and sampling_rate not in OPUS_RATES:
        raise ValueError(f"opus has the sampling rates {OPUS_RATES}, got {sampling_rate}")
    if clips_per_shard < 1 or len(dataset) == 0:
        raise ValueError(f"expected clips for shards of at least 1, got {len(dataset)} for {clips_per_shard}")
    output_dir.mkdir(parents=True, exist_ok=True)
    settings = {"format": format, "codec": codec, "sampling_rate": sampling_rate, "clips_per_shard": clips_per_shard}
    check_settings(output_dir, dataset, **settings)
    num_shards = -(-len(dataset) // clips_per_shard)
    counts = {"shards": num_shards, "clips": 0, "bad": 0}
    work = partial(encode_or_reason, sampling_rate=sampling_rate, codec=codec)
    write = write_parquet if format == "parquet" else write_tar
    with mapper(num_workers) as map_in_order, tqdm(total=len(dataset), unit="clip", disable=not progress) as bar:
        for shard in range(num_shards):
            path = output_dir / f"clips-{shard:05d}-of-{num_shards:05d}.{format}"
            rows = dataset.select(range(shard * clips_per_shard, min((shard + 1) * clips_per_shard, len(dataset))))
            if path.exists():
                bar.update(len(rows))
                continue
            clips: dict[int, bytes] = {}
            bad_files = []
            for row, content in enumerate(map_in_order(work, (row["audio"] for row in rows))):
                if isinstance(content, bytes):
                    clips[row] = content
                else:
                    bad_files.append((source_name(rows[row]["audio"]), content))
                bar.update()
            report(output_dir / BAD_FILES, bad_files)
            names = [f"{shard * clips_per_shard + row:09d}" for row in clips]
            half = path.with_name(f".{path.name}.half")
            write(half, rows.select(list(clips)), list(clips.values()), names, CODECS[codec][0])
            with half.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(half, path)
            counts["clips"] += len(clips)
            counts["bad"] += len(bad_files)
    return counts


def check_settings(output_dir: Path, dataset: Dataset, **settings: Any) -> None:
    """Shards of one folder belong together: the settings of the first call are kept beside them."""
    first, last = (source_name(dataset[row]["audio"]) for row in (0, len(dataset) - 1))
    mine = {"clips": len(dataset), "first": first, "last": last, **settings}
    path = output_dir / SETTINGS
    if not path.exists():
        path.write_text(json.dumps(mine) + "\n")
    elif (theirs := json.loads(path.read_text())) != mine:
        raise ValueError(f"{output_dir} holds shards of {theirs}; asked for were {mine}")


@contextmanager
def mapper(num_workers: int) -> Iterator[Callable]:
    """`map`, in this process or in several."""
    if num_workers == 0:
        yield map
        return
    with ProcessPoolExecutor(num_workers, get_context("spawn")) as pool:
        yield partial(pool.map, chunksize=4)


def write_parquet(path: Path, rows: Dataset, contents: list[bytes], names: list[str], extension: str) -> None:
    """A row for each clip, with the other columns of `rows`."""
    original = [source_name(row["audio"]) for row in rows]
    columns = {name: rows[name][:] for name in rows.column_names}
    columns["audio"] = [{"bytes": content, "path": name + extension} for name, content in zip(names, contents)]
    columns["original_path"] = original
    features = Features({**rows.features, "audio": Audio(decode=False), "original_path": Value("string")})
    table = pyarrow.Table.from_pydict(columns, features.arrow_schema)
    with pyarrow.parquet.ParquetWriter(path, table.schema) as writer:
        if len(table):  # datasets cannot read a row group without rows
            writer.write_table(table, row_group_size=ROWS_IN_MEMORY)


def write_tar(path: Path, rows: Dataset, contents: list[bytes], names: list[str], extension: str) -> None:
    """Two files for each clip, of one name without dots, which webdataset takes for extensions."""
    with tarfile.open(path, "w") as archive:
        for row, content, name in zip(rows, contents, names):
            columns = json.dumps({"original_path": source_name(row["audio"])}).encode()
            for member_name, data in ((name + extension, content), (name + ".json", columns)):
                member = tarfile.TarInfo(member_name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def report(path: Path, bad_files: list[tuple[str, str]]) -> None:
    """Adds those that are not in the report yet: a shard that was not finished is read again."""
    known = {json.loads(line)["file"] for line in path.read_text().splitlines()} if path.exists() else set()
    with path.open("a") as file:
        for name, reason in bad_files:
            if name not in known:
                known.add(name)
                tqdm.write(f"left out {name}: {reason}", file=sys.stderr)
                file.write(json.dumps({"file": name, "reason": reason}) + "\n")


def main(arguments: list[str] | None = None) -> dict[str, int]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="folder, manifest, parquet file or Hub data set")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--format", choices=("parquet", "tar"), default="parquet")
    parser.add_argument("--codec", choices=tuple(CODECS), default="flac", help="flac is 16 bit, the others lose some")
    parser.add_argument("--sampling_rate", type=int, default=16000, help="of the shards, in Hz (default: %(default)s)")
    parser.add_argument("--clips_per_shard", type=int, default=2000, help="(default: %(default)s)")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that decode and encode; 0: this one")
    parser.add_argument("--split", help="of a Hub data set, or rows of a manifest with this in their column `split`")
    parser.add_argument("--audio_column")
    parser.add_argument("--root", help="folder that a manifest's paths are relative to")
    args = parser.parse_args(arguments)
    dataset = load_audio_dataset(args.source, split=args.split, audio_column=args.audio_column, root=args.root)
    counts = make_shards(
        dataset, args.output_dir, args.format, args.codec, args.sampling_rate, args.clips_per_shard, args.num_workers
    )
    print(
        f"{counts['shards']} shards in {args.output_dir}; this time {counts['clips']} clips written, "
        f"{counts['bad']} left out"
    )
    return counts


if __name__ == "__main__":
    main()
