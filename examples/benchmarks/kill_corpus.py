"""
Kill `python -m asit_hf.predict` and `asit_hf.embed` with SIGKILL, run them again, and compare with an undisturbed run.

    python examples/benchmarks/kill_corpus.py --kills 20

Each case, one command on a folder of clips of which one is unreadable, is killed in two ways, `--kills` times each: at
random moments of one run, which is resumed every time, and in a new run each at one of its file operations (opening,
renaming, removing), which include those of parts that are being written and joined. Afterwards the output folder must
have the files of the undisturbed run, bit for bit and no other; and after every kill the files that have their final
names must be whole. Prints counts as JSON; the exit status is 1 if a check fails.
"""

import argparse
import csv
import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pyarrow.parquet
import soundfile
import torch

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForAudioClassification

TOY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
RATE = 16000
CLIPS_OF_A_PART = 2
OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")  # audit events of Python
PRELOADED = ["asit_hf.predict", "asit_hf.embed"]  # imported once, not after every kill


@dataclass(frozen=True)
class Case:
    """A command, `predict` or `embed`, its output inside the folder of the run, and the number of its processes."""

    command: str
    output: str
    options: tuple[str, ...] = ()
    processes: int = 1

    @property
    def name(self) -> str:
        return " ".join((self.command, self.output, *self.options, f"processes: {self.processes}"))

    def arguments(self, model: Path, clips: Path, folder: Path) -> list[str]:
        fixed = ["--part_clips", str(CLIPS_OF_A_PART), "--batch_size", "2", "--output", str(folder / self.output)]
        return [str(model), str(clips), *fixed, *self.options]


CASES = (
    Case("embed", "parts", ("--num_workers", "0")),
    Case("embed", "clips.parquet", ("--num_workers", "1")),
    Case("predict", "labels.csv", ("--num_workers", "0")),
    Case("predict", "parts", ("--num_workers", "0", "--format", "parquet")),
    Case("embed", "parts", ("--num_workers", "0", "--windows"), processes=2),
)


def make_inputs(folder: Path, count: int) -> tuple[Path, Path]:
    """A toy classifier, and a folder of clips of 0.3 to 1.5 s, of which one is unreadable."""
    torch.manual_seed(0)
    model, clips = folder / "model", folder / "clips"
    ASiTForAudioClassification(ASiTConfig(num_labels=3, **TOY)).save_pretrained(model)
    ASiTFeatureExtractor().save_pretrained(model)
    clips.mkdir()
    generator = np.random.default_rng(0)
    for index in range(count):
        noise = generator.uniform(-0.3, 0.3, int(RATE * generator.uniform(0.3, 1.5)))
        soundfile.write(clips / f"{index:04d}.wav", noise, RATE)
    (clips / f"{count // 2:04d}.wav").write_bytes(b"no audio")
    return model, clips


def work(
    case: Case, arguments: list[str], rank: int, folder: Path, last_operation: int | None, counted: Path | None
) -> None:
    """
    Runs a command in this process. Before operation number `last_operation` on files below `folder` it kills itself;
    into the file `counted` it writes the number of its operations.
    """
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    torch.set_num_threads(1)
    if case.processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.processes)}
    pid, below, operations = os.getpid(), str(folder), 0

    def audit(event: str, values: tuple) -> None:
        nonlocal operations
        if event not in OPERATIONS or os.getpid() != pid or not str(values[0]).startswith(below):
            return
        operations += 1
        if operations == last_operation:
            os.kill(pid, signal.SIGKILL)

    if last_operation or counted:
        sys.addaudithook(audit)
    status = import_module(f"asit_hf.{case.command}").main(arguments)
    if counted:
        counted.write_text(str(operations))
    sys.exit(status)


class Killer:
    """Starts, kills and repeats one case."""

    def __init__(self, case: Case, model: Path, clips: Path, scratch: Path):
        self.case, self.model, self.clips, self.scratch = case, model, clips, scratch
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        self.whole = contents(self.undisturbed())
        self.counts: Counter[str] = Counter()

    def undisturbed(self) -> Path:
        """The folder of a run of the command in a process of its own; raises an error unless every clip is in it."""
        folder = self.scratch / "undisturbed"
        command = [sys.executable, "-m", f"asit_hf.{self.case.command}"]
        subprocess.run(
            [*command, *self.case.arguments(self.model, self.clips, folder)], check=True, capture_output=True
        )
        found, expected = files_in(folder), Counter(path.name for path in self.clips.iterdir())
        if found != expected:
            raise SystemExit(f"{self.case.name}: lost {expected - found}, twice {found - expected}")
        return folder

    def start(
        self, folder: Path, rank: int = 0, last_operation: int | None = None, counted: Path | None = None
    ) -> BaseProcess:
        arguments = self.case.arguments(self.model, self.clips, folder)
        process = self.context.Process(
            target=work, args=(self.case, arguments, rank, folder, last_operation, counted)
        )
        process.start()
        return process

    def finish(self, folder: Path) -> None:
        """Runs the command to its end and counts whether the result equals that of the undisturbed run."""
        processes = [self.start(folder, rank) for rank in range(self.case.processes)]
        for process in processes:
            process.join()
        failed = any(process.exitcode for process in processes)
        self.counts["runs"] += 1
        self.counts["runs equal to the undisturbed one"] += not failed and contents(folder) == self.whole

    def check(self, folder: Path) -> None:
        """Counts files that have their final names but not their final content."""
        found = contents(folder)
        self.counts["unfinished files under final names"] += sum(
            found[name] != self.whole[name] for name in found.keys() & self.whole.keys()
        )

    def kill_at_random(self, kills: int, generator: random.Random) -> None:
        """Kills one of the processes after each part or two, at a random moment, and resumes it every time."""
        folder, seconds_of_a_part = self.scratch / "random", 0.1
        for _ in range(kills):
            processes = [self.start(folder, rank) for rank in range(self.case.processes)]
            process = generator.choice(processes)
            before, began = len(contents(folder)), time.perf_counter()
            while process.is_alive() and len(contents(folder)) == before and time.perf_counter() - began < 60:
                time.sleep(0.002)
            process.join(generator.uniform(0, 2 * seconds_of_a_part))
            self.counts["kills at random" if process.is_alive() else "ended before the kill"] += 1
            process.kill()
            for one in processes:  # the other one finishes its share
                one.join()
            self.check(folder)
        self.finish(folder)

    def kill_at_operations(self, kills: int) -> None:
        """Kills a new run at each of `kills` of its file operations, evenly chosen, and resumes it once."""
        counted = self.scratch / "operations"
        process = self.start(self.scratch / "counted", counted=counted)
        process.join()
        operations = int(counted.read_text())
        for index, last in enumerate(sorted({round(x) for x in np.linspace(1, operations, kills)})):
            folder = self.scratch / f"operation-{index}"
            process = self.start(folder, last_operation=last)
            process.join()
            self.counts["kills at operations"] += process.exitcode == -signal.SIGKILL
            self.check(folder)
            self.finish(folder)


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder, hidden ones included, by relative path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        try:
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
        except (FileNotFoundError, IsADirectoryError):  # replaced in the meantime
            continue
    return found


def files_in(folder: Path) -> Counter[str]:
    """How often each file is in the tables below a folder; a file with several rows in a row counts once."""
    names: list[str] = []
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".parquet":
            rows = pyarrow.parquet.read_table(path, columns=["file"]).column("file").to_pylist()
        elif path.suffix == ".csv":
            with path.open(newline="") as file:
                rows = [row["file"] for row in csv.DictReader(file)]
        else:
            continue
        names += [Path(row).name for index, row in enumerate(rows) if index == 0 or row != rows[index - 1]]
    return Counter(names)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="number of kills of each kind and case (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments (default: 0)")
    parser.add_argument(
        "--cases", type=int, nargs="+", default=range(len(CASES)), help="numbers of the cases, from 0 (default: all)"
    )
    args = parser.parse_args(arguments)
    fine = True
    with tempfile.TemporaryDirectory() as folder:
        model, clips = make_inputs(Path(folder), CLIPS_OF_A_PART * (2 * args.kills + 4))
        for index in args.cases:
            killer = Killer(CASES[index], model, clips, Path(folder) / str(index))
            killer.kill_at_random(args.kills, random.Random(args.seed + index))
            killer.kill_at_operations(args.kills)
            counts = killer.counts
            print(json.dumps({"case": CASES[index].name, **counts}), flush=True)
            fine &= counts["runs"] == counts["runs equal to the undisturbed one"]
            fine &= not counts["unfinished files under final names"]
    return int(not fine)


if __name__ == "__main__":
    sys.exit(main())
