"""What the commands `predict` and `embed` share: options, outputs in one file or in parts, progress and messages."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..utils.device import choices_for
from ..utils.files import check_writable
from .engine import Job, Table, run
from .parts import SETTINGS_NAME, Parts, default_part_clips, one_file, process_share, read_settings
from .sources import Clip, Corpus

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = ("auto", "cpu", "cuda")
_SHOWN = 10


@dataclass(frozen=True)
class Format:
    """
    A kind of table.

    Args:
        suffix: of its files.
        open_table: a context manager with a table at a path.
        join: writes the rows of tables at a path.
    """

    suffix: str
    open_table: Callable[[Path], AbstractContextManager[Table]]
    join: Callable[[list[Path], Path], None]


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """The options of `open_corpus`."""
    what = "files, folders, manifests, parquet or tar shards, data sets, or URLs of these"
    parser.add_argument("data", nargs="+", help=what)
    parser.add_argument("--split", help="split of a data set or manifest")
    parser.add_argument("--audio_column", help="column of the audio or its path (default: audio, file, ...)")
    parser.add_argument("--root", help="folder that the paths of a manifest are relative to")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--batch_size", type=int, help="windows in one forward pass (default: 8 on a CPU, 64 on an accelerator)")
    workers = "threads on a CPU, or processes that read for an accelerator (default: from the number of cores)"
    add("--num_workers", type=int, help=workers)
    precision = "of the weights (default: float32 on a CPU; bfloat16, or else float16, on an accelerator)"
    add("--dtype", choices=["auto", *DTYPES], default="auto", help=precision)
    add("--device", choices=DEVICES, default="auto", help="default: cuda if available")
    add("--part_clips", type=int, help="clips in each part of a folder (default: a 64th of them, at most 1024)")
    add("--strict", action="store_true", help="exit with 1 if a file cannot be read")


def choose_device(name: str = "auto") -> torch.device:
    """`"cpu"`, `"cuda"`, or `"auto"`, cuda if available. Of several processes on a machine each has its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device(name, int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """One of `DTYPES`, or for `"auto"` the fastest that the device computes in without loss of range, if it can."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def is_file(output: Path, suffixes: tuple[str, ...]) -> bool:
    """
    Whether `--output` names a file rather than a folder.

    Raises:
        ValueError: another extension than `suffixes`.
    """
    if output.suffix in suffixes:
        return True
    if output.suffix[1:].isalnum() and not output.suffix[1:].isdigit() and not output.is_dir():
        raise ValueError(
            f"expected a folder, or a file that ends in {' or '.join(suffixes)}, as --output, got {output}"
        )
    return False


def write_corpus(
    job: Job,
    corpus: Corpus,
    output: Path,
    table: Format,
    settings: Mapping[str, Any],
    batch_size: int | None = None,
    num_workers: int | None = None,
    part_clips: int | None = None,
    progress: bool = True,
) -> dict[str, int]:
    """
    Writes the tables of a corpus, or what an earlier run has left to do.

    Args:
        job, corpus: what is computed of which clips.
        output: a file with the suffix of `table`, or a folder of parts.
        table: the kind of table.
        settings: all that rows depend on; an earlier run's must be equal.
        batch_size, num_workers: see `engine.run`.
        part_clips: clips in a part; default: those of an earlier run, or see `default_part_clips`.
        progress: whether to show a progress bar.

    Returns:
        Numbers of `clips` and `unreadable` clips of this run, and of `parts` that were there before.

    Raises:
        ValueError: an option out of range, or the output of a run with other settings.
    """
    rank, world_size = process_share()
    in_file = output.suffix == table.suffix
    if in_file and world_size > 1:
        raise ValueError(
            f"{world_size} processes write parts into a folder: expected a folder as --output, got {output}"
        )
    if in_file:
        check_writable(output)
    folder = output.with_name(f".{output.name}.parts") if in_file else output
    if part_clips is None and (folder / SETTINGS_NAME).is_file():
        part_clips = read_settings(folder).get("part_clips")
    if part_clips is None:
        part_clips = default_part_clips(corpus, batch_size or choices_for(job.device).windows_per_batch)
    if part_clips < 1:
        raise ValueError(f"part_clips must be at least 1, got {part_clips}")
    settings = {**settings, "part_clips": part_clips, "num_clips": corpus.num_clips, "fingerprint": corpus.fingerprint}
    by_shard = corpus.num_shards > 1
    if in_file:
        context = one_file(output, table.open_table, table.join, settings, by_shard)
    else:
        context = nullcontext(Parts(output, table.suffix, table.open_table, by_shard))
    with context as parts:
        parts.start(settings)
        before = len(parts.done())
        tasks = parts.tasks(corpus, part_clips, rank, world_size)
        clips = (
            sum(min(part_clips, corpus.num_clips - task.first * part_clips) for task in tasks)
            if corpus.num_clips
            else None
        )
        if before:
            logger.info("%s: %d parts are there already", output, before)
        with report_clips(clips, progress) as report:
            run(job, corpus, tasks, parts.open, report.take, batch_size, num_workers)
    return {"clips": report.clips, "unreadable": report.unreadable, "parts": before}


class ClipReport:
    """Counts clips, and names on the console those that cannot be read."""

    def __init__(self, bar: tqdm):
        self.bar, self.clips, self.unreadable = bar, 0, 0

    def take(self, clip: Clip, reason: str | None) -> None:
        self.clips += 1
        self.bar.update()
        if reason is None:
            return
        self.unreadable += 1
        if self.unreadable <= _SHOWN:
            tqdm.write(f"cannot read {clip.file}: {reason}", file=sys.stderr)
        elif self.unreadable == _SHOWN + 1:
            tqdm.write("more files cannot be read: see the column of errors", file=sys.stderr)


@contextmanager
def report_clips(total: int | None, progress: bool = True) -> Iterator[ClipReport]:
    """A progress bar of clips."""
    with tqdm(total=total, unit="clip", disable=not progress, smoothing=0) as bar:
        yield ClipReport(bar)


def run_command(parser: argparse.ArgumentParser, arguments: list[str] | None, command: Callable[..., int]) -> int:
    """Parses and runs; returns the exit status. What is wrong with files and options is one line."""
    args = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("asit_hf").setLevel(logging.INFO)
    try:
        return command(args)
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
