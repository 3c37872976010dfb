"""What the commands `predict` and `embed` share: options, outputs in one file or in parts, progress and messages."""

import argparse
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..utils.device import choices_for
from ..utils.files import check_writable, is_file
from .engine import Job, Task, check_run_options, run
from .parts import (
    SETTINGS_NAME,
    Parts,
    Tables,
    default_part_clips,
    one_file,
    parts_folder,
    process_share,
    read_settings,
    share_out,
)
from .sources import Clip, Corpus

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = ("auto", "cpu", "cuda")
_SHOWN = 10


HELP_ON_PROCESSES = (
    "On 4 GPUs, or in 4 processes: torchrun --nproc_per_node 4 instead of python, and a folder as --output. "
    "The same command resumes an interrupted run. More: asit_hf/corpus/README.md in the repository"
)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """The options of `open_corpus`."""
    what = "files, folders, manifests, parquet or tar shards, data sets, or URLs of these"
    parser.add_argument("data", nargs="+", help=what)
    parser.add_argument("--split", help="split of a data set or manifest")
    parser.add_argument("--audio_column", help="column of the audio or its path (default: audio, file, ...)")
    parser.add_argument("--root", help="folder that the paths of a manifest are relative to (default: its own)")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--batch_size", type=int, help="windows in one forward pass (default: 8 on a CPU, 64 on a GPU)")
    workers = "threads on a CPU, or processes that read for a GPU (default: from the number of cores)"
    add("--num_workers", type=int, help=workers)
    precision = "type of the weights (default: float32 on a CPU; bfloat16, or else float16, on a GPU)"
    add("--dtype", choices=["auto", *DTYPES], default="auto", help=precision)
    add("--device", choices=DEVICES, default="auto", help="where to compute (default: cuda if available)")
    add("--part_clips", type=int, help="clips in each part (default: a 64th of them, at most 1024)")
    add("--strict", action="store_true", help="exit with 1 if a file cannot be read")


def choose_device(name: str = "auto") -> torch.device:
    """
    `"cpu"`, `"cuda"`, or `"auto"`, cuda if available. Of several processes on a machine each has its own.

    Raises:
        ValueError: `"cuda"` is not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("expected a GPU for the device cuda, got none that torch can use: set --device cpu")
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


def write_corpus(
    job: Job,
    corpus: Corpus,
    output: Path,
    tables: Tables,
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
        output: a file, if it has an extension, or a folder of parts.
        tables: the kind of table.
        settings: all that rows depend on; an earlier run's must be equal.
        batch_size, num_workers: see `engine.run`.
        part_clips: clips in a part; default: those of an earlier run, or see `default_part_clips`.
        progress: whether to show a progress bar.

    Returns:
        Numbers of `clips` and `unreadable` clips of this run, and of `parts` that were there before.

    Raises:
        ValueError: an option out of range, or the output of a run with other settings.
    """
    check_run_options(batch_size, num_workers)
    rank, world_size = process_share()
    in_file = is_file(output)
    if in_file and world_size > 1:
        raise ValueError(f"expected a folder as --output for the parts of {world_size} processes, got {output}")
    if output.is_symlink():  # written where it leads, as by `open`
        output = output.resolve()
    if in_file:
        check_writable(output)
    elif output.exists() and not output.is_dir():
        raise ValueError(f"expected a folder or a name with an extension as --output, got the file {output}")
    folder = parts_folder(output) if in_file else output
    if part_clips is None and (folder / SETTINGS_NAME).is_file():
        part_clips = read_settings(folder).get("part_clips")
    if part_clips is None:
        part_clips = default_part_clips(corpus, batch_size or choices_for(job.device).windows_per_batch)
    if part_clips < 1:
        raise ValueError(f"part_clips must be at least 1, got {part_clips}")
    size = {"part_clips": part_clips, "num_clips": corpus.num_clips, "fingerprint": corpus.fingerprint}
    settings = json.loads(json.dumps({**settings, "data": corpus.name, **size}, default=os.fspath))
    num_parts = -(-(corpus.num_clips or 0) // part_clips)
    if rank == 0 and part_clips > 1 and 0 < num_parts < world_size:
        what = "%d parts for %d processes, so that some have nothing to do; --part_clips 1 would make %d parts"
        logger.warning(what, num_parts, world_size, corpus.num_clips)
    by_shard = corpus.num_shards > 1
    with (
        one_file(output, tables, settings, by_shard)
        if in_file
        else nullcontext(Parts(output, tables, by_shard)) as parts
    ):
        parts.start(settings)
        if done := parts.done():
            logger.info("%s: %d parts are there already", folder, len(done))
        tasks = share_out(corpus, part_clips, rank, world_size, done)
        with report_clips(corpus, tasks, progress) as report:
            run(job, corpus, tasks, parts.open, report.take, batch_size, num_workers)
        if not parts.done() and world_size == 1:
            (folder / SETTINGS_NAME).unlink()
            with suppress(OSError):  # of a folder that has hidden files
                folder.rmdir()
            raise ValueError(f"expected audio in {corpus.name}, got none")
    return {"clips": report.clips, "unreadable": report.unreadable, "parts": len(done)}


def emit_corpus(
    job: Job,
    corpus: Corpus,
    emit: Callable[[list[dict[str, Any]]], None],
    batch_size: int | None = None,
    num_workers: int | None = None,
    progress: bool = True,
) -> dict[str, int]:
    """
    Passes the rows of a corpus to `emit`, in order, part by part; arguments and result as of `write_corpus`. Each of
    several processes has all rows.
    """
    check_run_options(batch_size, num_workers)
    if corpus.num_clips is None:  # one shard after the other
        num_workers = 1
    tasks = share_out(corpus, default_part_clips(corpus, batch_size or choices_for(job.device).windows_per_batch))
    in_order = _InOrder(emit)
    with report_clips(corpus, tasks, progress) as report:
        run(job, corpus, tasks, in_order.open, report.take, batch_size, num_workers)
    if not report.clips:
        raise ValueError(f"expected audio in {corpus.name}, got none")
    return {"clips": report.clips, "unreadable": report.unreadable}


class _InOrder:
    """Rows of parts that are complete in any order, if they are numbered without gaps."""

    def __init__(self, emit: Callable[[list[dict[str, Any]]], None]):
        self.emit, self.next, self.waiting, self.lock = emit, 0, {}, threading.Lock()

    @contextmanager
    def open(self, shard: int, number: int) -> Iterator["_RowList"]:
        rows = _RowList()
        yield rows
        with self.lock:
            self.waiting[number if shard == 0 else self.next] = rows
            while self.next in self.waiting:
                self.emit(self.waiting.pop(self.next))
                self.next += 1


class _RowList(list):
    write = list.extend


class ClipReport:
    """Counts clips, and names on the console those that cannot be read. Several threads may share it."""

    def __init__(self, bar: tqdm):
        self.bar, self.clips, self.unreadable, self.lock = bar, 0, 0, threading.Lock()

    def take(self, clip: Clip, reason: str | None) -> None:
        with self.lock:
            self._take(clip, reason)

    def _take(self, clip: Clip, reason: str | None) -> None:
        self.clips += 1
        self.bar.update()
        if reason is None:
            return
        self.unreadable += 1
        if self.unreadable <= _SHOWN:
            tqdm.write(f"cannot read {clip.file}: {reason}", file=sys.stderr)
        elif self.unreadable == _SHOWN + 1:
            tqdm.write("more files cannot be read: see the column error of the output", file=sys.stderr)


@contextmanager
def report_clips(corpus: Corpus, tasks: list[Task], progress: bool = True) -> Iterator[ClipReport]:
    """A progress bar of the clips of `tasks`."""
    total = None
    if corpus.num_clips is not None:
        ends = [(task.first * task.part_clips, task.last * task.part_clips) for task in tasks]
        total = sum(min(end, corpus.num_clips) - start for start, end in ends)
    with tqdm(total=total, unit="clip", disable=not progress, smoothing=0) as bar:
        yield ClipReport(bar)


@contextmanager
def until_output_closes() -> Iterator[None]:
    """Ends when whoever reads the output has enough, as `head` does; what is left of it must not fail at the end."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_order(model: str, data: list[str]) -> None:
    """Refuses a model where the data are expected, and data where the model is."""
    is_model = [os.path.isfile(os.path.join(one, "config.json")) for one in (model, data[0])]
    if os.path.exists(model) and is_model == [False, True]:
        raise ValueError(f"expected a model and then data, got {model} and then {data[0]}, a model: exchange them")


def run_command(parser: argparse.ArgumentParser, arguments: list[str] | None, command: Callable[..., int]) -> int:
    """Parses and runs; returns the exit status. What is wrong with files and options is one line."""
    args = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("asit_hf").setLevel(logging.INFO)
    try:
        _check_order(args.model, args.data)
        return command(args)
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
