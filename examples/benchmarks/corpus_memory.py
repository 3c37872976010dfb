"""
Peak memory of `python -m asit_hf.predict` and `asit_hf.embed`: of 100 clips against 10,000, of a file of 10 minutes
against one of 10 hours, and of a manifest of 10,000 rows against one of 1,000,000.

    python examples/benchmarks/corpus_memory.py

Files are generated in a temporary folder, and the model is a toy. Each command runs in a process of its own; the peaks
are VmHWM of the main process and of its largest loader worker (Linux only). A run that exceeds `--max_seconds` is
stopped, and its peak so far is reported.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from common import Report, Row, machine_facts, to_markdown

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForAudioClassification

TOY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
RATE = 8000
MORE_MEMORY = 1.25  # largest allowed ratio of the peaks
COMMANDS = ("predict", "embed")


@dataclass
class Peak:
    """Peaks in MB of a main process and of its largest worker, and how the run ended."""

    main: float
    worker: float
    seconds: float
    finished: bool

    def __str__(self) -> str:
        end = f"in {self.seconds:.0f} s" if self.finished else f"stopped after {self.seconds:.0f} s"
        return f"main process {self.main:.0f} MB, largest worker {self.worker:.0f} MB, {end}"


def peak_of(command: list[str], max_seconds: float) -> Peak:
    """Runs a command and watches its process and all children."""
    began, peaks = time.monotonic(), {}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None and time.monotonic() - began < max_seconds:
            for pid in [process.pid, *children_of(process.pid)]:
                peaks[pid] = max(peaks.get(pid, 0.0), peak_memory(pid))
            time.sleep(0.02)
        finished = process.poll() is not None
        process.kill()
        process.wait()
        if finished and process.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)} failed: {errors.read().decode()[-2000:]}")
    main = peaks.pop(process.pid)
    return Peak(main, max(peaks.values(), default=0.0), time.monotonic() - began, finished)


def children_of(pid: int) -> list[int]:
    """Process ids of all descendants."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            direct = [int(word) for word in path.read_text().split()]
        except OSError:  # it has just ended
            continue
        found += [one for child in direct for one in (child, *children_of(child))]
    return found


def peak_memory(pid: int) -> float:
    """VmHWM in MB; 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM")), 0.0)


def write_model(folder: Path) -> Path:
    torch.manual_seed(0)
    ASiTForAudioClassification(ASiTConfig(num_labels=3, **TOY)).save_pretrained(folder)
    ASiTFeatureExtractor().save_pretrained(folder)
    return folder


def write_clips(folder: Path, count: int, seconds: float = 0.5) -> Path:
    """A folder of flac clips, of which every hundredth has a content of its own."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index in range(count):
        path = folder / f"{index:05d}.flac"
        if index < 100:
            soundfile.write(path, generator.uniform(-0.3, 0.3, round(RATE * seconds)), RATE)
        else:
            path.write_bytes((folder / f"{index % 100:05d}.flac").read_bytes())
    return folder


def write_recording(path: Path, minutes: int) -> Path:
    """A flac file that repeats one minute of noise."""
    minute = np.random.default_rng(0).uniform(-0.02, 0.02, 60 * RATE)
    with soundfile.SoundFile(path, "w", samplerate=RATE, channels=1) as file:
        for _ in range(minutes):
            file.write(minute)
    return path


def write_manifest(path: Path, clips: Path, rows: int) -> Path:
    """A csv manifest of `rows` rows that repeat the files of a folder."""
    files = sorted(path.name for path in clips.iterdir())
    with path.open("w") as file:
        file.write("file\n")
        file.writelines(f"{clips.name}/{files[index % len(files)]}\n" for index in range(rows))
    return path


def measure(quick: bool = False, max_seconds: float = 300.0) -> Report:
    report = Report("corpus, memory")
    clips, minutes, rows = ((10, 30), (1, 3), (20, 60)) if quick else ((100, 10000), (10, 600), (10000, 1000000))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_model(folder / "model")
        short = write_clips(folder / "short", min(100, rows[0]), seconds=0.1)
        kinds: dict[str, tuple[tuple[int, int], Callable[[int], Path], list[str]]] = {
            "clips of 0.5 s": (clips, lambda size: write_clips(folder / f"clips-{size}", size), []),
            "minutes in one file": (minutes, lambda size: write_recording(folder / f"{size}.flac", size), []),
            "rows of a manifest": (rows, lambda size: write_manifest(folder / f"{size}.csv", short, size), []),
        }
        for what, (sizes, write, options) in kinds.items():
            data = {size: write(size) for size in sizes}
            for command in COMMANDS:
                suffix = {"predict": ".csv", "embed": ".parquet"}[command]
                peaks = {}
                for size in sizes:
                    output = folder / f"{command}-{what.replace(' ', '-')}-{size}{suffix}"
                    arguments = [str(model), str(data[size]), "--output", str(output), *options]
                    peaks[size] = peak_of([sys.executable, "-m", f"asit_hf.{command}", *arguments], max_seconds)
                    report.notes.append(f"{command}, {size} {what}: {peaks[size]}.")
                few, many = (peaks[size] for size in sizes)
                name = f"{command}, {what}: {sizes[1]} against {sizes[0]}"
                options_of_row = {"unit": "MB", "target": None if quick else MORE_MEMORY, "at_most": True}
                report.add(Row(f"{name}, main process", many.main, few.main, **options_of_row))
                if few.worker and many.worker:
                    report.add(Row(f"{name}, largest worker", many.worker, few.worker, **options_of_row))
    return report


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="run at toy sizes, to check that everything runs")
    parser.add_argument(
        "--max_seconds", type=float, default=300.0, help="time limit of each run in seconds (default: 300)"
    )
    args = parser.parse_args(arguments)
    facts = machine_facts()
    print(to_markdown([measure(args.quick, args.max_seconds)], facts))


if __name__ == "__main__":
    main()
