"""Shared by the benchmarks: rows with targets, interleaved timing, facts about the machine, and result files."""

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    *("torch", "transformers", "accelerate", "numpy", "soundfile", "soxr", "kaldi-native-fbank"),
    *("onnxruntime", "torchao"),
)


@dataclass
class Row:
    """
    One comparison.

    Args:
        name (`str`): what is compared.
        ours, theirs (`float`): medians, in `unit`.
        unit (`str`): unit of both.
        target (`float`, *optional*): value that `ratio` must reach; `None` for a row without a target.
        higher_is_better (`bool`): whether larger medians are better: true of clips/s, false of seconds.
        at_most (`bool`): the ratio is ours / theirs and must not exceed the target, as for memory.
    """

    name: str
    ours: float
    theirs: float
    unit: str = "s"
    target: float | None = None
    higher_is_better: bool = False
    at_most: bool = False

    @property
    def ratio(self) -> float:
        """How many times better ours is, or with `at_most` ours as a fraction of theirs."""
        if self.at_most or self.higher_is_better:
            return self.ours / self.theirs
        return self.theirs / self.ours

    @property
    def reached(self) -> bool | None:
        if self.target is None:
            return None
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target


@dataclass
class Report:
    """Results of one part of the benchmark: its rows, and notes in sentences."""

    part: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Adds a row and prints it at once, since a part takes minutes."""
        self.rows.append(row)
        print(f"{self.part}: {row.name}: {row.ratio:.2f}", file=sys.stderr, flush=True)


def time_interleaved(calls: dict[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """
    Seconds of each call in each round. A round runs every call once, so that a temporary slowdown of the machine
    affects all of them. Warm-up rounds are not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(warm_up + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if index >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: median(values) for name, values in seconds.items()}


def ranges(seconds: dict[str, list[float]]) -> str:
    """`name median (minimum to maximum)` of every call, for the notes."""
    return "; ".join(f"{name} {median(v):.3g} s ({min(v):.3g} to {max(v):.3g})" for name, v in seconds.items())


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Sets torch's number of threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine_facts() -> dict[str, str | int]:
    """What the measurements depend on: processor, system, versions and the command."""
    facts: dict[str, str | int] = {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "processor": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "load at the start": f"{os.getloadavg()[0]:.1f} processes",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "capability": torch.backends.cpu.get_cpu_capability()
        + (", avx512_bf16" if "avx512_bf16" in _cpuinfo("flags").split() else ""),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "absent"
    return facts


def to_markdown(reports: Sequence[Report], facts: dict[str, str | int]) -> str:
    """One table of all rows, then the notes of each part, then the machine."""
    lines = [
        "# Benchmarks",
        "",
        "| part | what | ours | theirs | ratio | target | reached |",
        "|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        for row in report.rows:
            target = "" if row.target is None else f"{'at most' if row.at_most else 'at least'} {row.target:g}"
            reached = {None: "", True: "yes", False: "**no**"}[row.reached]
            lines.append(
                f"| {report.part} | {row.name} | {row.ours:.3g} {row.unit} | {row.theirs:.3g} {row.unit} | "
                f"{row.ratio:.2f} | {target} | {reached} |"
            )
    for report in reports:
        if report.notes:
            lines += ["", f"## {report.part}", "", *(f"- {note}" for note in report.notes)]
    return "\n".join([*lines, "", "## Machine", "", *(f"- {name}: {value}" for name, value in facts.items()), ""])


def write_results(reports: Sequence[Report], facts: dict[str, str | int], folder: Path, name: str) -> None:
    """Writes `folder/name.json` and `folder/name.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [
        {
            "part": report.part,
            "rows": [{**asdict(row), "ratio": row.ratio, "reached": row.reached} for row in report.rows],
            "notes": report.notes,
        }
        for report in reports
    ]
    (folder / f"{name}.json").write_text(json.dumps({"machine": facts, "parts": parts}, indent=2) + "\n")
    (folder / f"{name}.md").write_text(to_markdown(reports, facts))


def run_alone(measure: Callable[[bool], Report]) -> None:
    """Entry point of a part that is run as a script: measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="run at toy sizes, to check that everything runs")
    print(to_markdown([measure(parser.parse_args().quick)], machine_facts()))


def _cpuinfo(field: str) -> str:
    """A field of the first processor on Linux, or an empty string."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
