"""
Throughput of `predict` and `embed` over many files: the share of the time that the bare forward passes need, against a
loop of transformers' AST pipeline, and against ASiT's own pipeline. Models have random weights.

    python examples/benchmarks/corpus.py
    python examples/benchmarks/corpus.py --sizes base --clips 1000 --files 100 --minutes 10    # hours

The clips, of 5 s, and the recordings are flac at 44.1 kHz and wav at 16 kHz in turn, generated in a temporary folder.
The bare forward passes repeat those of the run: same shapes, masks and threads, but no reading and no log-mel. Models
are loaded beforehand, so the start of a process is not included.
"""

import argparse
import inspect
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from common import Report, Row, machine_facts, medians, ranges, time_interleaved, to_markdown, write_results
from inference import LABELS, build_pipelines, classify
from torch import nn

from asit_hf import ASiTFeatureExtractor, ASiTForAudioClassification
from asit_hf.configuration_asit import SIZES
from asit_hf.corpus.commands import emit_corpus
from asit_hf.corpus.engine import Job
from asit_hf.corpus.labels import label_rows
from asit_hf.corpus.sources import open_corpus
from asit_hf.embed import EmbeddingJob
from asit_hf.predict import LabelJob

RATE = 16000
RATES = {"flac": 44100, "wav": RATE}
CLIP_SECONDS = 5
TARGETS = {"base": 0.85}  # smallest share of the bare forward passes
BATCHES = (1, 8)  # of the pipelines
Call = tuple[torch.Size, torch.dtype, torch.device, dict[str, Any]]


def write_audio(folder: Path, count: int, seconds: int) -> Path:
    """A folder of `count` files of noise, flac at 44.1 kHz and wav at 16 kHz in turn."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(count):
        extension = list(RATES)[index % len(RATES)]
        rate = RATES[extension]
        with soundfile.SoundFile(folder / f"{index:05d}.{extension}", "w", samplerate=rate, channels=1) as file:
            for _ in range(seconds):
                file.write(0.3 * np.hanning(rate) * generator.uniform(-1, 1, rate))
    return folder


def build_jobs(model: ASiTForAudioClassification, extractor: ASiTFeatureExtractor) -> dict[str, Job]:
    """What `predict` and `embed` compute by default."""
    names = [model.config.id2label[index] for index in range(LABELS)]
    labels = label_rows(names, "softmax")
    return {"predict": LabelJob(model, extractor, labels), "embed": EmbeddingJob(model.asit, extractor)}


def run(job: Job, folder: Path) -> int:
    """The engine over a folder, with default options; returns the number of rows."""
    rows: list[dict[str, Any]] = []
    counts = emit_corpus(job, open_corpus(folder), rows.extend, progress=False)
    if counts["unreadable"]:
        raise SystemExit(f"expected readable files in {folder}, got {counts}")
    return len(rows)


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[int, list[Call]]]:
    """
    The forward passes within the block by thread: shape, type and device of the input, and the other arguments.
    """
    calls: dict[int, list[Call]] = defaultdict(list)

    def record(module: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
        named = dict(inspect.signature(module.forward).bind(*arguments, **keywords).arguments)
        values, others = named.pop("input_values"), named.pop("kwargs", {})
        call = (values.shape, values.dtype, values.device, {**named, **others})
        calls[threading.get_ident()].append(call)

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def repeat(model: nn.Module, calls: dict[int, list[Call]]) -> None:
    """The forward passes of `calls` in as many threads, on values that are not read from anywhere."""
    lock, waiting = threading.Lock(), iter([call for of_thread in calls.values() for call in of_thread])

    @torch.inference_mode()
    def work(num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        while True:
            with lock:
                call = next(waiting, None)
            if call is None:
                return
            shape, dtype, device, arguments = call
            model(torch.zeros(shape, dtype=dtype, device=device), **arguments)

    if len(calls) == 1:
        work(torch.get_num_threads())
    else:
        with ThreadPoolExecutor(len(calls)) as pool:
            for done in [pool.submit(work, max(1, torch.get_num_threads() // len(calls))) for _ in calls]:
                done.result()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(
    quick: bool = False,
    sizes: tuple[str, ...] = ("base", "small"),
    clips: int = 96,
    files: int = 4,
    minutes: int = 2,
    compared: int = 32,
    rounds: int = 2,
) -> Report:
    """Rows by size of the model: the two shares of both commands, then the comparisons with pipelines."""
    report = Report("corpus")
    if quick:
        clips, files, minutes, compared, rounds = 4, 1, 1, 2, 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = {
            f"{clips} clips of {CLIP_SECONDS} s": write_audio(folder / "clips", clips, CLIP_SECONDS),
            f"{files} files of {minutes} min": write_audio(folder / "files", files, 60 * minutes),
        }
        few = write_audio(folder / "few", compared, CLIP_SECONDS)
        for size in sizes:
            torch.manual_seed(0)
            pipelines = build_pipelines(torch.float32, quick, **SIZES[size])
            jobs = build_jobs(pipelines["ours"].model, pipelines["ours"].feature_extractor)
            for command, job in jobs.items():
                for what, audio in data.items():
                    target = None if quick else TARGETS.get(size)
                    _measure_share(
                        report, f"{size}, {command}, {what}", job, pipelines["ours"].model.asit, audio, rounds, target
                    )
            _measure_pipelines(report, size, jobs["predict"], pipelines, few, rounds)
    return report


def _measure_share(
    report: Report, name: str, job: Job, encoder: nn.Module, folder: Path, rounds: int, target: float | None
) -> None:
    with recorded(encoder) as calls:
        run(job, folder)
    cpu: dict[str, list[float]] = defaultdict(list)

    def timed(side: str, call: Callable[[], object]) -> None:
        start = time.process_time()
        call()
        cpu[side].append(time.process_time() - start)

    sides = {"bare forward passes": partial(repeat, encoder, calls), "engine": partial(run, job, folder)}
    timed_sides = {side: partial(timed, side, call) for side, call in sides.items()}
    seconds = time_interleaved(timed_sides, rounds, warm_up=0)
    bare, engine = medians(seconds).values()
    report.add(Row(f"{name}: share of the bare forward passes", engine, bare, target=target))
    bare, engine = medians(cpu).values()
    report.notes.append(f"{name}: {ranges(seconds)}. Of CPU time, {bare:.3g} of {engine:.3g} s: {bare / engine:.2f}.")


def _measure_pipelines(
    report: Report, size: str, job: Job, pipelines: dict[str, Any], folder: Path, rounds: int
) -> None:
    """The engine against the two pipelines, ASiT's on paths and AST's on arrays that soundfile reads."""
    paths = sorted(folder.iterdir())
    calls: dict[str, Callable[[], object]] = {"engine": partial(run, job, folder)}
    for batch in BATCHES:
        calls[f"ASiT pipeline, batch {batch}"] = partial(pipelines["ours"], [*map(str, paths)], batch_size=batch)
        calls[f"AST pipeline, batch {batch}"] = partial(_classify_files, pipelines["theirs"], paths, batch)
    seconds = time_interleaved(calls, rounds, warm_up=0)
    found = medians(seconds)
    what = f"{size}, predict, {len(paths)} clips of {CLIP_SECONDS} s"
    for name in list(calls)[1:]:
        report.add(Row(f"{what}: against {name}", found["engine"], found[name]))
    report.notes.append(f"{what}: {ranges(seconds)}.")


def _classify_files(classifier: Any, paths: list[Path], batch: int) -> list:
    return classify(classifier, (_read(path) for path in paths), batch)


def _read(path: Path) -> np.ndarray:
    waveform, rate = soundfile.read(path, dtype="float32")
    return soxr.resample(waveform, rate, RATE)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="run at toy sizes, to check that everything runs")
    add(
        "--sizes",
        nargs="+",
        choices=SIZES,
        default=("base", "small"),
        help="sizes of the models (default: base small)",
    )
    add("--clips", type=int, default=96, help="number of clips of 5 s (default: %(default)s)")
    add("--files", type=int, default=4, help="number of recordings (default: %(default)s)")
    add("--minutes", type=int, default=2, help="length of a recording in minutes (default: %(default)s)")
    add("--compared", type=int, default=32, help="number of clips for the pipelines (default: %(default)s)")
    add("--rounds", type=int, default=2, help="interleaved repetitions (default: %(default)s)")
    add("--output_dir", type=Path, help="folder for corpus.json and corpus.md (default: print only)")
    options = vars(parser.parse_args(arguments))
    output_dir, facts = options.pop("output_dir"), machine_facts()
    report = measure(**options)
    if output_dir is not None:
        write_results([report], facts, output_dir, "corpus")
    print(to_markdown([report], facts))


if __name__ == "__main__":
    main()
