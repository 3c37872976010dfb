"""
One engine behind `predict` and `embed`: windows of many clips in batches of similar length, rows of clips in order.

A part is a run of consecutive clips. Batches never mix parts, so that rows depend on neither the number of workers nor
that of processes.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..data.audio import AudioReader, AudioReadError
from ..data.windows import Windows
from ..data.workers import clear_worker_errors
from ..fbank_asit import num_fbank_frames, window_and_hop
from ..feature_extraction_asit import ASiTFeatureExtractor
from ..utils.device import choices_for
from ..utils.memory import return_freed_memory
from .sources import Clip, Corpus

# Batches that windows are sorted by length within, and their samples: 32 MiB, 8.7 minutes at 16 kHz.
_SORTED_BATCHES, _MAX_SAMPLES = 4, 2**23
# A batch of windows of unlike lengths is divided rather than padded by more than this share.
_MAX_PADDING = 0.2
_MAX_THREADS, _MAX_WORKERS = 8, 16


class Rows(Protocol):
    """The rows of one clip."""

    def add(self, start: float, end: float, value: tuple) -> list[dict[str, Any]]:
        """Takes what `Job.forward` gives for the next window, from `start` to `end` in seconds; rows now complete."""

    def finish(self) -> list[dict[str, Any]]:
        """The rows that need the whole clip."""

    def fail(self, reason: str) -> list[dict[str, Any]]:
        """The rows of a clip that cannot be read, also after windows that could be."""


class Job(Protocol):
    """What is computed of every window, and the rows it becomes."""

    windows: Windows
    feature_extractor: ASiTFeatureExtractor
    device: torch.device

    def forward(self, input_values: torch.Tensor, attention_mask: torch.Tensor | None, frames: list[int]) -> tuple:
        """
        Tensors with one row per window, on any device, from `input_values` of shape `(windows, frames, mel)`, float32,
        their mask, `None` without padding, and each window's number of `frames`.
        """

    def rows(self, clip: Clip) -> Rows: ...


class Table(Protocol):
    """A part's table, into which rows go."""

    def write(self, rows: list[dict[str, Any]]) -> None: ...


@dataclass(frozen=True)
class Task:
    """
    Parts of a shard of the corpus.

    Args:
        shard (`int`): of the corpus.
        part_clips (`int`): clips in a part; the last one may have fewer.
        first, last (`int`): numbers of the first part, and of the one after the last; `None`: until the shard ends.
        done (`frozenset`): numbers of parts to leave out.
        rank, world_size (`int`): of the others, every `world_size`-th is taken, counted over shards and parts.
    """

    shard: int
    part_clips: int
    first: int = 0
    last: int | None = None
    done: frozenset[int] = frozenset()
    rank: int = 0
    world_size: int = 1

    def parts(self, corpus: Corpus) -> Iterator[tuple[int, Iterator[Clip]]]:
        """Number and clips of every part that is to be done."""
        stop = None if self.last is None else self.last * self.part_clips
        clips = iter(corpus.clips(self.shard, self.first * self.part_clips, stop))
        number = self.first
        while (first := next(clips, None)) is not None:
            part = chain([first], islice(clips, self.part_clips - 1))
            if number not in self.done and (self.shard + number) % self.world_size == self.rank:
                yield number, part
            deque(part, maxlen=0)
            number += 1


@dataclass
class Batch:
    """
    Windows of one part that a model takes at once, and the bookkeeping of its buffer of windows with the last batch.

    Args:
        task, part (`int`): number of the task, and of the part within its shard.
        waveforms (`torch.Tensor` of shape `(windows, samples)`): zero beyond each window's length; float32, or
            int16 if that is the same.
        lengths (`list`): samples of each window.
        places (`list`): of the windows in the buffer.
        items (`list`, *optional*): `(clip, start, end, is last or error)` of every place in the buffer, in order; the
            clip without its source, start and end in seconds. Only with the last batch of a buffer.
        ends_part (`bool`): whether nothing of the part follows.
        error (`str`, *optional*): why the shard cannot be read any further, which ends the task without the part.
    """

    task: int
    part: int
    waveforms: torch.Tensor | None = None
    lengths: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    items: list[tuple[Clip, float, float, bool | str]] | None = None
    ends_part: bool = False
    error: str | None = None

    def pin_memory(self) -> "Batch":
        return self if self.waveforms is None else replace(self, waveforms=self.waveforms.pin_memory())


class Batches(IterableDataset):
    """The batches of tasks, task after task; of a loader's workers, each takes every n-th task."""

    def __init__(self, corpus: Corpus, tasks: list[Task], windows: Windows, batch_size: int, int16: bool):
        super().__init__()
        self.corpus, self.tasks, self.windows = corpus, tasks, windows
        self.batch_size, self.int16 = batch_size, int16

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for number in range(first, len(self.tasks), step):
            yield from self.of_task(number)

    def of_task(self, number: int) -> Iterator[Batch]:
        try:
            yield from self._of_parts(number)
        except (ValueError, OSError) as error:  # of a damaged shard, or of the way to it
            yield Batch(number, 0, error=str(error))

    def _of_parts(self, number: int) -> Iterator[Batch]:
        for part, clips in self.tasks[number].parts(self.corpus):
            items: list[tuple[Clip, float, float, bool | str]] = []
            waveforms: dict[int, np.ndarray] = {}
            for clip, start, waveform, end in self._windows(clips):
                if waveform is not None:
                    waveforms[len(items)] = waveform
                rate = self.windows.sampling_rate
                stop = start + (0 if waveform is None else len(waveform))
                items.append((clip, start / rate, stop / rate, end))
                if (
                    len(waveforms) >= _SORTED_BATCHES * self.batch_size
                    or sum(map(len, waveforms.values())) >= _MAX_SAMPLES
                ):
                    yield from self._of_buffer(number, part, waveforms, items, False)
                    items, waveforms = [], {}
            yield from self._of_buffer(number, part, waveforms, items, True)

    def _windows(self, clips: Iterable[Clip]) -> Iterator[tuple[Clip, int, np.ndarray | None, bool | str]]:
        """Clip, first sample, waveform, whether it is the clip's last; or no waveform and why it cannot be read."""
        for clip in clips:
            named = Clip(clip.file, None, clip.label)
            try:
                with AudioReader(clip.source) as reader:
                    for start, waveform, is_last in self.windows.read(reader):
                        yield named, start, waveform, is_last
            except AudioReadError as error:
                yield named, 0, None, error.reason

    def _of_buffer(
        self, task: int, part: int, waveforms: dict[int, np.ndarray], items: list, ends_part: bool
    ) -> Iterator[Batch]:
        groups = list(_similar({place: len(waveform) for place, waveform in waveforms.items()}, self.batch_size))
        for places in groups[:-1]:
            yield Batch(task, part, *self._collate(places, waveforms))
        last = self._collate(groups[-1], waveforms) if groups else ()
        yield Batch(task, part, *last, items=items, ends_part=ends_part)

    def _collate(self, places: list[int], waveforms: dict[int, np.ndarray]) -> tuple[torch.Tensor, list[int], list]:
        lengths = [len(waveforms[place]) for place in places]
        batch = np.zeros((len(places), max(lengths)), np.float32)
        for row, place in zip(batch, places):
            row[: len(waveforms[place])] = waveforms[place]
        if self.int16:
            pcm = (batch * 2**15).clip(-(2**15), 2**15 - 1).astype(np.int16)
            if np.array_equal(pcm * np.float32(2**-15), batch):  # noise of rounding would fill bands that are empty
                batch = pcm
        return torch.from_numpy(batch), lengths, places


class _Progress:
    """The rows of a part, written as they become complete."""

    def __init__(self, job: Job, part: AbstractContextManager[Table], on_clip: Callable[[Clip, str | None], None]):
        self.job, self.on_clip = job, on_clip
        self.values: dict[int, tuple] = {}
        self.stack = ExitStack()
        self.table = self.stack.enter_context(part)
        self.rows: Rows | None = None

    def take(self, batch: Batch, values: list[tuple]) -> None:
        self.values.update(zip(batch.places, values))
        if batch.items is None:
            return
        written: list[dict[str, Any]] = []
        for place, (clip, start, end, last) in enumerate(batch.items):
            self.rows = self.rows or self.job.rows(clip)
            if isinstance(last, str):
                written += self.rows.fail(last)
            else:
                written += self.rows.add(start, end, self.values[place])
                written += self.rows.finish() if last else []
            if last:
                self.rows = None
                self.on_clip(clip, last if isinstance(last, str) else None)
        self.table.write(written)
        self.values.clear()
        return_freed_memory()


def check_run_options(batch_size: int | None, num_workers: int | None) -> None:
    """Raises `ValueError` for options of `run` that are out of range."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if num_workers is not None and num_workers < 0:
        raise ValueError(f"num_workers must be at least 0, got {num_workers}")


def run(
    job: Job,
    corpus: Corpus,
    tasks: list[Task],
    open_part: Callable[[int, int], AbstractContextManager[Table]],
    on_clip: Callable[[Clip, str | None], None],
    batch_size: int | None = None,
    num_workers: int | None = None,
) -> None:
    """
    Writes the rows of all tasks.

    Args:
        job, corpus, tasks: what is computed of which clips.
        open_part: a context with the table of a part, given its shard and its number; it is left when the part is
            complete, or with the error that ends the run.
        on_clip: called after each clip, with the reason if it cannot be read.
        batch_size (`int`, *optional*): windows in one forward pass; default: 8 on a CPU, 64 on an accelerator.
        num_workers (`int`, *optional*): on a CPU the threads that read and compute, each a task of its own; default:
            torch's number of threads, up to 8, which share these threads. On an accelerator, processes that read;
            default: the cores of the machine, up to 16, divided by the processes on it.

    Raises:
        ValueError: an option out of range; or, when all else is done, a shard that cannot be read.
        RuntimeError: a reading process was killed.
    """
    check_run_options(batch_size, num_workers)
    choices = choices_for(job.device)
    batch_size = choices.windows_per_batch if batch_size is None else batch_size
    batches = Batches(corpus, tasks, job.windows, batch_size, choices.int16_batches)
    parts: dict[int, _Progress] = {}  # that are being written, by task
    failed: list[ValueError] = []

    def take(batch: Batch, values: list[tuple]) -> None:
        if batch.error is not None:
            failed.append(ValueError(batch.error))
            if batch.task in parts:
                parts.pop(batch.task).stack.__exit__(ValueError, failed[-1], None)
            return
        if batch.task not in parts:
            parts[batch.task] = _Progress(job, open_part(tasks[batch.task].shard, batch.part), on_clip)
        parts[batch.task].take(batch, values)
        if batch.ends_part:
            parts.pop(batch.task).stack.close()

    try:
        run_tasks = _run_threads if choices.threads else _run_processes
        run_tasks(job, batches, take, num_workers)
    except BaseException:
        with ExitStack() as stack:
            for part in parts.values():
                stack.push(part.stack)  # which removes an unfinished part
            raise
    if failed:
        others = f", and {len(failed) - 1} more shards" if len(failed) > 1 else ""
        raise ValueError(f"{failed[0]}{others}: all else is done; the next run tries what is missing")


def _run_threads(
    job: Job, batches: Batches, take: Callable[[Batch, list[tuple]], None], num_workers: int | None
) -> None:
    """
    Whole tasks in threads, each reading and computing by turns. With one thread of torch in each, two threads take
    less time than one that computes with two, whose second would idle while the first reads.
    """
    available = torch.get_num_threads()
    count = min(available, _MAX_THREADS) if num_workers is None else num_workers
    count = max(1, min(count, len(batches.tasks)))
    stopped = threading.Event()
    queue = iter(range(len(batches.tasks)))
    lock = threading.Lock()

    def work() -> None:
        torch.set_num_threads(max(1, available // count))
        while True:
            with lock:
                number = next(queue, None)
            if number is None:
                return
            for batch in batches.of_task(number):
                if stopped.is_set():
                    return
                take(batch, _values(_compute(job, batch)))

    try:
        if count == 1:
            return work()
        with ThreadPoolExecutor(count, "corpus") as pool:
            futures = [pool.submit(work) for _ in range(count)]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            finally:
                stopped.set()
    finally:
        torch.set_num_threads(available)  # also for threads that start later


def _run_processes(
    job: Job, batches: Batches, take: Callable[[Batch, list[tuple]], None], num_workers: int | None
) -> None:
    """Processes read, and the results of a batch are fetched when the next one has been launched."""
    if num_workers is None:
        num_workers = min(_MAX_WORKERS, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    workers = {"prefetch_factor": 4} if num_workers and len(batches.tasks) > 1 else {}
    loader = DataLoader(
        batches,
        batch_size=None,
        num_workers=min(num_workers, len(batches.tasks)) if workers else 0,
        pin_memory=job.device.type == "cuda",
        **workers,
    )
    pending: tuple[Batch, tuple] | None = None
    with clear_worker_errors():
        for batch in loader:
            launched = batch, _compute(job, batch)
            if pending is not None:
                take(pending[0], _values(pending[1]))
            pending = launched
    if pending is not None:
        take(pending[0], _values(pending[1]))


@torch.inference_mode()
def _compute(job: Job, batch: Batch) -> tuple:
    """The job's tensors of a batch on their way to the host, and what tells that they have arrived."""
    if not batch.places:
        return (), None
    extractor, device = job.feature_extractor, job.device
    window, _ = window_and_hop(extractor.sampling_rate)
    frames = [num_fbank_frames(max(length, window), extractor.sampling_rate) for length in batch.lengths]
    mask = None
    if len(set(frames)) > 1:
        mask = (torch.arange(max(frames)) < torch.tensor(frames)[:, None]).long().to(device, non_blocking=True)
    if choices_for(device).threads:
        clips = [row[:length] for row, length in zip(batch.waveforms, batch.lengths)]
        features = extractor(clips, sampling_rate=extractor.sampling_rate, return_tensors="pt")["input_values"]
        return job.forward(features, mask, frames), None
    waveforms = batch.waveforms.to(device, non_blocking=True)
    if waveforms.shape[1] < window:
        waveforms = torch.nn.functional.pad(waveforms, (0, window - waveforms.shape[1]))
    is_padded = min(batch.lengths) < waveforms.shape[1]
    lengths = torch.tensor(batch.lengths).to(device, non_blocking=True) if is_padded else None
    features = extractor.extract(waveforms, lengths)
    if mask is not None:
        features = features.masked_fill(~mask.bool()[..., None], extractor.padding_value)
    values = job.forward(features, mask, frames)
    if device.type != "cuda":
        return values, None
    arrived = torch.cuda.Event()
    values = tuple(value.to("cpu", non_blocking=True) for value in values)
    arrived.record()
    return values, arrived


def _values(computed: tuple) -> list[tuple]:
    """What the job computed, one tuple of arrays per window."""
    values, arrived = computed
    if arrived is not None:
        arrived.synchronize()
    arrays = [value.cpu().numpy() for value in values]
    return list(zip(*arrays))


def _similar(lengths: dict[int, int], batch_size: int) -> Iterator[list[int]]:
    """Places by length, in groups of at most `batch_size` and with little padding."""
    group: list[int] = []
    total = 0
    for place in sorted(lengths, key=lengths.__getitem__):
        longest = lengths[place]
        padded = longest * (len(group) + 1)
        if group and (len(group) == batch_size or total + longest < (1 - _MAX_PADDING) * padded):
            yield group
            group, total = [], 0
        group.append(place)
        total += longest
    if group:
        yield group
