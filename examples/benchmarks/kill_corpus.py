"""
Kill `python -m asit_hf.predict` and `asit_hf.embed` with SIGKILL, run them again, and compare with an undisturbed run.

    python examples/benchmarks/kill_corpus.py --kills 20

Each case, one command on a folder of clips of which one is unreadable, is killed in three ways, `--kills` times each:
at random moments of one run, which is resumed every time; while its parts are joined to one file; and, in a new run
each, at one of its file operations (opening, renaming, removing). Afterwards the output folder must have the files of
the undisturbed run, bit for bit and no other; after every kill the files that have their final names must be whole.
Prints counts as JSON; the exit status is 1 if a check fails.
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
from collections.abc import Callable
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
FEW_PARTS = 6  # of the runs that are killed at their file operations
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
        fixed = ["--part_clips", str(CLIPS_OF_A_PART), "--batch_size", "2", "--num_workers", "2"]
        return [str(model), str(clips), "--output", str(folder / self.output), *fixed, *self.options]


CASES = (
    Case("embed", "parts"),
    Case("embed", "clips.parquet"),
    Case("predict", "labels.csv"),
    Case("predict", "parts", ("--format", "parquet")),
    Case("embed", "parts", ("--windows",), processes=2),
)


def write_model(folder: Path) -> Path:
    torch.manual_seed(0)
    ASiTForAudioClassification(ASiTConfig(num_labels=3, **TOY)).save_pretrained(folder)
    ASiTFeatureExtractor().save_pretrained(folder)
    return folder


def write_clips(folder: Path, count: int) -> Path:
    """A folder of clips of 0.3 to 1.5 s, of which one is unreadable."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(count):
        noise = generator.uniform(-0.3, 0.3, int(RATE * generator.uniform(0.3, 1.5)))
        soundfile.write(folder / f"{index:04d}.wav", noise, RATE)
    (folder / f"{count // 2:04d}.wav").write_bytes(b"no audio")
    return folder


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
    """Starts, kills and repeats one case on the clips of a folder, and counts what happens."""

    def __init__(self, case: Case, model: Path, clips: Path, scratch: Path, counts: Counter[str]):
        self.case, self.model, self.clips, self.scratch, self.counts = case, model, clips, scratch, counts
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        self.whole = self.undisturbed()

    def undisturbed(self) -> dict[str, str]:
        """The content of a run of the command in a process of its own, in which every clip must be once."""
        folder = self.scratch / "undisturbed"
        command = [sys.executable, "-m", f"asit_hf.{self.case.command}"]
        arguments = self.case.arguments(self.model, self.clips, folder)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, *arguments], check=True, capture_output=True, env=environment)
        found, expected = files_in(folder), Counter(path.name for path in self.clips.iterdir())
        if found != expected:
            raise SystemExit(f"{self.case.name}: lost {expected - found}, twice {found - expected}")
        return contents(folder)

    def start(
        self, folder: Path, rank: int = 0, last_operation: int | None = None, counted: Path | None = None
    ) -> BaseProcess:
        arguments = self.case.arguments(self.model, self.clips, folder)
        process = self.context.Process(target=work, args=(self.case, arguments, rank, folder, last_operation, counted))
        process.start()
        return process

    def start_all(self, folder: Path) -> list[BaseProcess]:
        return [self.start(folder, rank) for rank in range(self.case.processes)]

    def finish(self, folder: Path) -> None:
        """Runs the command to its end and counts whether the result equals that of the undisturbed run."""
        processes = self.start_all(folder)
        for process in processes:
            process.join()
        failed = any(process.exitcode for process in processes)
        self.counts["runs"] += 1
        self.counts["runs equal to the undisturbed one"] += not failed and contents(folder) == self.whole

    def kill(self, process: BaseProcess, kind: str) -> None:
        self.counts[f"kills {kind}" if process.is_alive() else "ended before the kill"] += 1
        process.kill()
        process.join()

    def check(self, folder: Path) -> None:
        """Counts files that have their final names but not their final content."""
        found = contents(folder)
        self.counts["unfinished files under final names"] += sum(
            found[name] != self.whole[name] for name in found.keys() & self.whole.keys()
        )

    def kill_at_random(self, kills: int, generator: random.Random) -> None:
        """Kills each process at a random moment after it has written something, and resumes them every time."""
        folder = self.scratch / "random"
        for _ in range(kills):
            before = len(list(folder.rglob("*")))
            processes = self.start_all(folder)
            wait_until(lambda before=before: len(list(folder.rglob("*"))) > before, processes)
            for process in generator.sample(processes, len(processes)):
                process.join(generator.uniform(0, 0.2))
                self.kill(process, "at random moments")
            self.check(folder)
        if Path(self.case.output).suffix:
            for _ in range(kills):
                process = self.start(folder)
                wait_until(lambda: any(folder.glob(f".{self.case.output}.*unfinished")), [process])
                process.join(generator.uniform(0, 0.005))
                self.kill(process, "while joining")
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
            self.counts["kills at file operations"] += process.exitcode == -signal.SIGKILL
            self.check(folder)
            self.finish(folder)


def wait_until(condition: Callable[[], bool], processes: list[BaseProcess]) -> None:
    """Returns when a condition holds, or one of the processes has ended."""
    while all(process.is_alive() for process in processes) and not condition():
        time.sleep(0.001)


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
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_model(folder / "model")
        many = write_clips(folder / "many", CLIPS_OF_A_PART * (4 * args.kills + 4))
        few = write_clips(folder / "few", CLIPS_OF_A_PART * FEW_PARTS)
        for index in args.cases:
            counts: Counter[str] = Counter()
            case, scratch = CASES[index], folder / str(index)
            Killer(case, model, many, scratch / "many", counts).kill_at_random(
                args.kills, random.Random(args.seed + index)
            )
            Killer(case, model, few, scratch / "few", counts).kill_at_operations(args.kills)
            print(json.dumps({"case": case.name, **counts}), flush=True)
            fine &= counts["runs"] == counts["runs equal to the undisturbed one"]
            fine &= not counts["unfinished files under final names"]
    return int(not fine)


if __name__ == "__main__":
    sys.exit(main())
