r"""
Rewrites audio for fast reading: as a few large shards, resampled and encoded once, or as one packed pool.

    python -m examples.tools.make_shards --data AUDIO_FOLDER --output_dir shards --format parquet --codec flac \
        --sampling_rate 16000 --clips_per_shard 2000 --num_workers 8
    python examples/run_pretraining.py --train_data shards --streaming True ...
    python -m examples.tools.make_shards --data AUDIO_FOLDER --output_dir pool --format packed --num_workers 8
    python examples/run_pretraining.py --train_data pool ...

parquet shards have an `audio` column of encoded bytes beside the other columns of the data; tar shards have
webdataset's layout, an audio and a json file per clip. Both keep the clip's `original_path`. After an interruption the
same command writes the missing shards. Unreadable files are skipped and listed in `bad_files.jsonl`.

A packed pool is one file of 16-bit samples with an index (`asit_hf.data.packed`): 115 MB per hour at 16 kHz, read
without decoding, and held in an accelerator's memory if it fits. An interrupted pool is written anew.

To stream on N processes with W loader workers each, write a multiple of N shards, at least N x W.
"""

import argparse
import io
import json
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
from datasets import Audio, Dataset, Features, Value
from tqdm.auto import tqdm

from asit_hf.data import AudioReadError, read_audio
from asit_hf.data.audio import encode_audio, source_name
from asit_hf.data.labelled import DatasetArguments
from asit_hf.data.packed import Clip, to_pcm, write_packed
from asit_hf.data.parcels import RATES as OPUS_RATES
from asit_hf.utils.files import whole_file

# File extension, libsndfile's format and subtype.
CODECS = {"flac": (".flac", "FLAC", "PCM_16"), "opus": (".opus", "OGG", "OPUS"), "vorbis": (".ogg", "OGG", "VORBIS")}
BAD_FILES = "bad_files.jsonl"
SETTINGS = ".make_shards.json"
ROWS_IN_MEMORY = 100  # when a parquet shard is read
ROWS_AT_ONCE = 1000  # when a packed pool is written
CODEC, CLIPS_PER_SHARD = "flac", 2000


def encode(source: Any, sampling_rate: int, codec: str) -> bytes:
    """The whole clip, mono, at `sampling_rate`; samples beyond [-1, 1] are clipped."""
    return encode_audio(read_audio(source, sampling_rate).clip(-1, 1), sampling_rate, *CODECS[codec][1:])


def encode_or_reason(source: Any, sampling_rate: int, codec: str) -> bytes | str:
    """The encoded clip, or why it cannot be read."""
    try:
        return encode(source, sampling_rate, codec)
    except AudioReadError as error:
        return error.reason


def make_shards(
    dataset: Dataset,
    output_dir: Path,
    format: str = "parquet",
    codec: str = CODEC,
    sampling_rate: int = 16000,
    clips_per_shard: int = CLIPS_PER_SHARD,
    num_workers: int = 0,
    progress: bool = True,
    strict: bool = False,
) -> dict[str, int]:
    """Writes `clips-00000-of-N.parquet` (or `.tar`), ...; existing shards are kept.

    Args:
        dataset: with an `audio` column, see `load_audio_dataset`.
        codec: "flac" (16 bit), "opus" or "vorbis".
        clips_per_shard: consecutive rows of `dataset` per shard, of which unreadable ones are skipped.
        num_workers: processes that decode and encode; 0 for this one.
        strict: raise for an unreadable file.

    Returns:
        The number of `shards`, and of `clips` and `bad` files in the shards that this call wrote.

    Raises:
        AudioReadError: an unreadable file, with `strict`.
        ValueError: a rate that the codec does not have, or an `output_dir` with shards of other settings or data.
    """
    if codec == "opus" and sampling_rate not in OPUS_RATES:
        raise ValueError(f"expected one of the sampling rates {OPUS_RATES} of opus, got {sampling_rate}")
    if clips_per_shard < 1 or len(dataset) == 0:
        raise ValueError(f"expected at least 1 clip and 1 per shard, got {len(dataset)} and {clips_per_shard}")
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
                    if strict:
                        raise AudioReadError(*bad_files[-1])
                bar.update()
            report(output_dir / BAD_FILES, bad_files)
            names = [f"{shard * clips_per_shard + row:09d}" for row in clips]
            with whole_file(path) as unfinished:
                write(unfinished, rows.select(list(clips)), list(clips.values()), names, CODECS[codec][0])
            counts["clips"] += len(clips)
            counts["bad"] += len(bad_files)
    return counts


def make_packed(
    dataset: Dataset,
    output_dir: Path,
    sampling_rate: int = 16000,
    num_workers: int = 0,
    part_column: str | None = None,
    progress: bool = True,
    strict: bool = False,
) -> dict[str, int]:
    """Writes a packed pool, see `asit_hf.data.packed`.

    Args:
        dataset, num_workers, strict: as in `make_shards`.
        part_column: column with the name of the part of the pool that a clip comes from.

    Returns:
        The numbers of `clips` written, of `bad` files, and of `clipped` clips, with samples beyond [-1, 1].

    Raises:
        AudioReadError: an unreadable file, with `strict`.
        FileExistsError: `output_dir` already holds a packed pool.
        ValueError: no readable clip, or no such column.
    """
    if part_column is not None and part_column not in dataset.column_names:
        raise ValueError(f"expected part_column to be one of {dataset.column_names}, got {part_column!r}")
    counts = {"clips": 0, "bad": 0, "clipped": 0}

    def clips() -> Iterator[Clip]:
        output_dir.mkdir(parents=True, exist_ok=True)
        work = partial(decode_or_reason, sampling_rate=sampling_rate)
        with mapper(num_workers) as map_in_order, tqdm(total=len(dataset), unit="clip", disable=not progress) as bar:
            for first in range(0, len(dataset), ROWS_AT_ONCE):
                rows = dataset.select(range(first, min(first + ROWS_AT_ONCE, len(dataset))))
                bad_files = []
                for row, found in zip(rows, map_in_order(work, (row["audio"] for row in rows))):
                    bar.update()
                    name = source_name(row["audio"])
                    if isinstance(found, str):
                        bad_files.append((name, found))
                        if strict:
                            raise AudioReadError(name, found)
                        continue
                    samples, is_clipped = found
                    counts["clips"] += 1
                    counts["clipped"] += is_clipped
                    yield name, None if part_column is None else str(row[part_column]), samples
                counts["bad"] += len(bad_files)
                report(output_dir / BAD_FILES, bad_files)

    write_packed(output_dir, clips(), sampling_rate)
    return counts


def decode_or_reason(source: Any, sampling_rate: int) -> tuple[np.ndarray, bool] | str:
    """The clip as int16 and whether any sample was clipped; or why it cannot be read."""
    try:
        waveform = read_audio(source, sampling_rate)
    except AudioReadError as error:
        return error.reason
    return to_pcm(waveform), bool(np.abs(waveform).max() > 1)


def check_settings(output_dir: Path, dataset: Dataset, **settings: Any) -> None:
    """Raises if the folder has shards of other settings or data; the first call writes its own beside them."""
    first, last = (source_name(dataset[row]["audio"]) for row in (0, len(dataset) - 1))
    mine = {"clips": len(dataset), "first": first, "last": last, **settings}
    path = output_dir / SETTINGS
    if not path.exists():
        with whole_file(path) as unfinished:
            unfinished.write_text(json.dumps(mine) + "\n")
    elif (theirs := json.loads(path.read_text())) != mine:
        raise ValueError(f"expected the settings {theirs} of the shards in {output_dir}, got {mine}")


@contextmanager
def mapper(num_workers: int) -> Iterator[Callable]:
    """`map` in this process or in several."""
    if num_workers == 0:
        yield map
        return
    with ProcessPoolExecutor(num_workers, get_context("spawn")) as pool:
        yield partial(pool.map, chunksize=4)


def write_parquet(path: Path, rows: Dataset, contents: list[bytes], names: list[str], extension: str) -> None:
    """A row for each clip, with the other columns of `rows`."""
    columns = {name: rows[name][:] for name in rows.column_names}
    columns["audio"] = [{"bytes": content, "path": name + extension} for name, content in zip(names, contents)]
    columns["original_path"] = [source_name(row["audio"]) for row in rows]
    features = Features({**rows.features, "audio": Audio(decode=False), "original_path": Value("string")})
    table = pyarrow.Table.from_pydict(columns, features.arrow_schema)
    with pyarrow.parquet.ParquetWriter(path, table.schema) as writer:
        if len(table):  # datasets cannot read a row group without rows
            writer.write_table(table, row_group_size=ROWS_IN_MEMORY)


def write_tar(path: Path, rows: Dataset, contents: list[bytes], names: list[str], extension: str) -> None:
    """Two files per clip with the same stem, without dots, at which webdataset splits names."""
    with tarfile.open(path, "w") as archive:
        for row, content, name in zip(rows, contents, names):
            columns = json.dumps({"original_path": source_name(row["audio"])}).encode()
            for member_name, data in ((name + extension, content), (name + ".json", columns)):
                member = tarfile.TarInfo(member_name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def report(path: Path, bad_files: list[tuple[str, str]]) -> None:
    """Adds the files that the report lacks; those of an interrupted shard may be in it."""
    known = {json.loads(line)["file"] for line in path.read_text().splitlines()} if path.exists() else set()
    with path.open("a") as file:
        for name, reason in bad_files:
            if name not in known:
                known.add(name)
                tqdm.write(f"skipped {name}: {reason}", file=sys.stderr)
                file.write(json.dumps({"file": name, "reason": reason}) + "\n")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = DatasetArguments.parser(__doc__)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    help = "shards in parquet or tar files, or one packed pool (default: parquet)"
    parser.add_argument("--format", choices=("parquet", "tar", "packed"), default="parquet", help=help)
    help = f"codec of shards: flac keeps 16 bits, others are lossy (default: {CODEC})"
    parser.add_argument("--codec", choices=tuple(CODECS), help=help)
    help = f"rate in Hz to resample to; for opus one of {OPUS_RATES} (default: 16000)"
    parser.add_argument("--sampling_rate", type=int, default=16000, help=help)
    parser.add_argument("--clips_per_shard", type=int, help=f"clips in each shard (default: {CLIPS_PER_SHARD})")
    help = "column with a clip's part of a packed pool, for instance `source` in make_pool's pools; default: no parts"
    parser.add_argument("--part_column", help=help)
    help = "processes that decode and encode (default: 0, the main process)"
    parser.add_argument("--num_workers", type=int, default=0, help=help)
    args = parser.parse_args(argv)
    if args.format == "packed" and (args.codec, args.clips_per_shard) != (None, None):
        parser.error("--codec and --clips_per_shard have no effect with --format packed")
    if args.format != "packed" and args.part_column:
        parser.error(f"--part_column has no effect with --format {args.format}, only with packed")
    given = next((name for name in ("label_column", "label_separator") if getattr(args, name)), None)
    if args.format != "parquet" and given:
        parser.error(f"--{given} has no effect with --format {args.format}, which has no labels")
    return args


def main(argv: list[str] | None = None) -> dict[str, int]:
    args = parse_args(argv)
    dataset = DatasetArguments.of(args).load_audio(args.data, split=args.split)
    options = {"sampling_rate": args.sampling_rate, "num_workers": args.num_workers, "strict": args.strict}
    if args.format == "packed":
        counts = make_packed(dataset, args.output_dir, part_column=args.part_column, **options)
        print(
            f"{counts['clips']} clips in {args.output_dir}, {counts['clipped']} of them clipped at full scale; "
            f"{counts['bad']} unreadable files"
        )
        return counts
    options |= {name: value for name in ("codec", "clips_per_shard") if (value := getattr(args, name)) is not None}
    counts = make_shards(dataset, args.output_dir, args.format, **options)
    print(
        f"{counts['shards']} shards in {args.output_dir}; this call wrote {counts['clips']} clips and skipped "
        f"{counts['bad']} unreadable files"
    )
    return counts


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
