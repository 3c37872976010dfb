"""
Run all GPU measurements in one command: checks against the CPU, speed and memory, and training for the remaining time.

    python examples/benchmarks/gpu.py --train_data POOL --output_dir DIR    # 12 minutes on a GPU
    python examples/benchmarks/gpu.py --quick                               # toy sizes, with or without a GPU

Every measurement runs in a worker process with a time limit. If one fails, hangs or crashes, the error is reported and
the next measurement runs in a new process. `DIR/gpu.json` and `DIR/gpu.md` are rewritten after each measurement,
`DIR/encoder` every minute of training. Only torch, transformers, accelerate and numpy are required.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "examples" / "benchmarks" / "results"
PHASES = ("checks", "figures", "training")
# Fraction of the remaining time that each phase may use.
SHARES = {"checks": 0.25, "figures": 0.55, "training": 1.0}
NO_GPU = "no GPU"  # ends the run
NOTES = [
    "2024 and 2023 are the presets of the authors' two releases. *Ours* is `ASiTPreTrainer`; *plain* is the loop of",
    "`official_loop.py`: one tensor at a time, whole logits in memory, precomputed spectrograms and masks. The share",
    "of log-mel and GMML is relative to a step's time; the share of a bf16 product's rate is the operations per",
    "second of a step relative to those of one large matrix product.",
    "",
]
FINE = ("passed", "measured", "needs CUDA", "skipped")
# Seconds: reserved for the last results; allowed for a worker's start; least remaining time to start a measurement.
RESERVE, START, LEAST = 10, 60, 5
SIZES, PRESETS = ("small", "base"), ("2024", "2023")
SIDES = {
    "ours": {"function": "gpu_figures:ours", "fallback": {"compiled": False}},
    "plain fp32": {"function": "gpu_figures:plain", "options": {"bf16": False, "attention": "eager"}},
    "plain bf16 sdpa": {"function": "gpu_figures:plain", "options": {"bf16": True, "attention": "sdpa"}},
}
# Targets on an H100 with preset 2024 in bf16 at batch 128: clips per second, and ratios of ours to the plain loop.
CLIPS_PER_SECOND = {"small": 1200, "base": 520}
SPEED_RATIOS = {"plain fp32": 6.0, "plain bf16 sdpa": 1.8}
MEMORY_RATIO, PREPARATION_SHARE, SYNCHRONIZATIONS = 0.4, 0.1, 1
CORPUS_SHARE = 0.7  # of the forward passes in the time of `predict` on files
# Columns of the table of training steps.
STEP = ("batch", "layers", "ms per step", "clips/s", "peak GiB", "MB per clip", "ms of log-mel and GMML")


@dataclass
class Measurement:
    """
    One row of the results.

    Args:
        phase, name (`str`): phase and name of the row.
        function (`str`): `"module:function"`, called as `function(run, **options)` with a [`Run`]; returns the row's
            `value` or `values`, `detail`, and `status` if it is not "measured".
        seconds (`float`): time limit, after which the process is killed; a minute more if the worker has to start.
        bound (`float`, *optional*): largest allowed `value`, which makes the measurement a check.
        options (`dict`): keyword arguments of the function.
        fallback (`dict`, *optional*): options of a second attempt, in a new process, if the first one fails.
        alone (`bool`): whether to use a separate process, because the function changes its state.
    """

    phase: str
    name: str
    function: str
    seconds: float = 60
    bound: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    fallback: dict[str, Any] | None = None
    alone: bool = False


@dataclass
class Run:
    """Settings that a measurement receives; it may call `update` to replace its row while it runs."""

    output_dir: Path
    scratch: Path
    quick: bool = False
    train_data: str | None = None
    init: str | None = None
    end: float = float("inf")  # when the process is killed, in `time.monotonic()` seconds
    update: Callable[[dict[str, Any]], None] = lambda row: None


def plan(quick: bool) -> list[Measurement]:
    """All measurements, the most important first within each phase."""
    found = [
        Measurement("machine", "machine", "gpu_checks:facts"),
        Measurement("machine", "pool", "gpu_training:pool", seconds=120),
    ]

    def check(name: str, function: str, bound: float | None, **more: Any) -> None:
        found.append(Measurement("checks", name, f"gpu_checks:{function}", bound=bound, **more))

    for preset in PRESETS:
        options = {"preset": preset}
        check(f"{preset}, masks and donors: pixels that differ from the CPU", "masks", 0, options=options)
    check("log-mel: largest difference from the CPU in loud bins", "log_mel", 1e-4)
    for name, bf16, bound in (("fp32", False, 1e-4), ("bf16", True, 2e-2)):
        for preset in PRESETS:
            options = {"preset": preset, "bf16": bf16}
            check(f"{preset}, loss and gradients in {name} against the CPU", "gradients", bound, options=options)
    check("three steps in fp16 against fp32, loss", "half_precision", 2e-2)
    check("compiled layers against eager ones, loss", "compiled", 1e-4, seconds=120)
    check("gradient checkpointing against none, loss", "checkpointing", 1e-4)
    check("resumed run against an uninterrupted one, loss", "resumed", 1e-4)
    check("FSDP2 with one process, loss and gradients", "sharded", 1e-4, alone=True)
    check("FSDP2 through the trainer, loss", "sharded_trainer", 1e-4, alone=True)
    check("host synchronizations of one step", "synchronizations", None)

    found.append(Measurement("figures", "bf16 product", "gpu_figures:product"))
    for preset in PRESETS:
        for size in SIZES:
            for side, measured in SIDES.items():
                options = {"size": size, "preset": preset, **measured.get("options", {})}
                found.append(
                    Measurement(
                        "figures",
                        f"{size}, {preset}, {side}",
                        measured["function"],
                        seconds=120,
                        options=options,
                        fallback=measured.get("fallback"),
                    )
                )
        if preset == PRESETS[0]:
            for size in SIZES:
                options = {"size": size}
                found.append(
                    Measurement("figures", f"{size}, inference", "gpu_figures:inference", 60, options=options)
                )
            found += [
                Measurement("figures", f"{size}, corpus", "gpu_figures:corpus", 60, options={"size": size})
                for size in SIZES
            ]
            found.append(Measurement("figures", "packed pool", "gpu_figures:packed_pool", 60))
            found.append(Measurement("figures", "flac files", "gpu_figures:flac_files", 60))
    found.append(
        Measurement(
            "training",
            "training",
            "gpu_training:train",
            seconds=60 if quick else float("inf"),
            fallback={"compiled": False},
        )
    )
    return found


class Report:
    """Collects rows and rewrites the result files after each one, atomically."""

    def __init__(self, folder: Path, head: dict[str, Any]):
        self.folder, self.head = folder, head
        self.rows: dict[str, dict[str, Any]] = {}

    def add(self, measurement: Measurement, row: dict[str, Any]) -> None:
        row = {"phase": measurement.phase, "name": measurement.name, "bound": measurement.bound, **row}
        self.rows[measurement.name] = row
        if row["status"] != NO_GPU:  # do not overwrite earlier results
            self.write()
        shown = _shown(row["value"]) if row.get("value") is not None else _joined(row.get("values", {}))
        print(f"{row['phase']}: {row['name']}: {row['status']} {shown} {row.get('detail', '')[-300:]}", flush=True)

    def facts(self) -> dict[str, Any]:
        return {**self.head, **self.rows.get("machine", {}).get("values", {})}

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = list(self.rows.values())
        content = {"machine": self.facts(), "rows": rows, "targets": targets(self.rows, self.head["quick"])}
        from asit_hf.utils.files import whole_file  # imports torch, for which no fresh worker should wait

        with whole_file(self.folder / "gpu.json") as unfinished:
            unfinished.write_text(json.dumps(content, indent=1) + "\n")
        with whole_file(self.folder / "gpu.md") as unfinished:
            unfinished.write_text(to_markdown(rows, content["targets"], content["machine"]))


class Worker:
    """Runs measurements in a separate process, which is started on demand and again after `stop`."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "output.log"
        self.process: BaseProcess | None = None
        self.connection: Connection | None = None

    def start(self) -> None:
        context = get_context("spawn")  # CUDA does not work in a forked process
        self.log.write_text("")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, str(self.log)))
        self.process.start()
        theirs.close()

    def measure(self, function: str, run: Run, options: dict[str, Any], seconds: float, end: float) -> dict[str, Any]:
        """
        Runs a call for at most `seconds` and not beyond `end`; returns its row, where `failed` is true if the process
        must not be used again. Passes intermediate rows to `run.update`.
        """
        start = time.monotonic()
        if self.process is None:
            self.start()
            seconds += START
        end = min(start + seconds, end)
        row: dict[str, Any] = {}
        try:
            self.connection.send((function, {**vars(run), "end": end, "update": None}, options))
            while self.connection.poll(max(0, end - time.monotonic())):
                row = self.connection.recv()
                if row["status"] != "running":
                    return row
                run.update(row)
        except (EOFError, OSError):
            self.process.join(5)
            reason = f"the process ended with exit code {self.process.exitcode}: {self._last_output()}"
            return {**row, "status": "error", "detail": reason, "failed": True}
        self.kill()
        reason = f"killed after {end - start:.0f} s: {self._last_output()}"
        return {**row, "status": "timed out", "detail": reason, "failed": True}

    def stop(self) -> None:
        """Asks the process to end, and kills it if it does not."""
        if self.process is not None:
            with suppress(OSError):
                self.connection.send(None)
            self.process.join(5)
            self.kill()
            self.connection.close()
            self.process = None

    def kill(self) -> None:
        for end in (os.killpg, os.kill):  # its group includes its children
            with suppress(ProcessLookupError, PermissionError):
                end(self.process.pid, signal.SIGKILL)
        self.process.join()

    def _last_output(self) -> str:
        return _without_paths(self.log.read_text(errors="replace"))[-600:].strip() or "it printed nothing"


def _serve(connection: Connection, log: str) -> None:
    """Main loop of a worker: receives calls and sends back their rows."""
    os.setpgid(0, 0)
    Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)

    def update(row: dict[str, Any]) -> None:
        connection.send({**row, "status": "running"})

    while (message := connection.recv()) is not None:
        function, run, options = message
        try:
            module, _, name = function.partition(":")
            call = getattr(import_module(module), name)
            row = {"status": "measured", **call(Run(**{**run, "update": update}), **options)}
        except Exception as error:
            text = _without_paths("".join(traceback.format_exception(error)))
            # after a device error all later calls fail; after running out of memory some of it may stay allocated
            failed = any(word in text for word in ("CUDA", "cuDNN", "NCCL", "OutOfMemory"))
            row = {"status": "error", "detail": text[-1500:], "failed": failed}
        connection.send(row)
        with suppress(Exception):
            _clean_up()


def _end_with(parent: int) -> None:
    """Ends this process when its parent is killed; otherwise it would keep running on the GPU."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _without_paths(text: str) -> str:
    """Removes folders of this machine from a text."""
    for folder in (f"{ROOT}{os.sep}", f"{sys.prefix}{os.sep}"):
        text = text.replace(folder, "")
    return text


def _clean_up() -> None:
    """Frees memory and compiled code before the next measurement."""
    import gc

    gc.collect()
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def run_all(measurements: list[Measurement], report: Report, run: Run, end: float) -> bool:
    """Runs all measurements until `end` in `time.monotonic()` seconds. Returns whether none failed or was skipped."""
    phases = list(dict.fromkeys(measurement.phase for measurement in measurements))
    worker = Worker(run.scratch)
    try:
        for phase in phases:
            share = 1.0 if phase == phases[-1] else SHARES.get(phase, 1.0)
            phase_end = time.monotonic() + share * (end - time.monotonic())
            for measurement in measurements:
                if measurement.phase == phase:
                    _measure(measurement, worker, report, run, phase_end)
                    if any(row["status"] == NO_GPU for row in report.rows.values()):
                        return False
    finally:
        worker.stop()
    return all(row["status"] in FINE for row in report.rows.values())


def _measure(measurement: Measurement, worker: Worker, report: Report, run: Run, phase_end: float) -> None:
    """Runs one measurement, with a second attempt if it has a fallback, and adds its row."""
    tries = [measurement.options]
    if measurement.fallback is not None:
        tries.append({**measurement.options, **measurement.fallback})
    before = ""
    run = replace(run, update=lambda row: report.add(measurement, row))
    for options in tries:
        if phase_end - time.monotonic() < LEAST:
            detail = f"no time left in phase {measurement.phase}"
            row = {"status": "not measured", "detail": before + detail}
            break
        if measurement.alone:
            worker.stop()
        row = worker.measure(measurement.function, run, options, measurement.seconds, phase_end)
        if row.pop("failed", False) or measurement.alone:
            worker.stop()
        if row["status"] not in ("error", "timed out"):
            break
        before = f"{before}with {options}: {row.get('detail', '')} "
    if row["status"] == "measured" and measurement.bound is not None:
        # NaN fails
        row["status"] = "passed" if row["value"] <= measurement.bound else "failed"
    if before and row["status"] in FINE:
        row["detail"] = f"{row.get('detail', '')} second attempt; the first failed {before[-400:]}".strip()
    report.add(measurement, row)


def targets(rows: dict[str, dict[str, Any]], quick: bool) -> list[dict[str, Any]]:
    """Results with targets; `None` for values that were not measured, and for all targets at toy sizes."""
    found = []

    def value(name: str, key: str) -> float | None:
        return rows.get(name, {}).get("values", {}).get(key)

    def add(name: str, got: float | None, target: float | None = None, at_most: bool = False) -> None:
        target = None if quick else target
        reached = None
        if target is not None and got is not None:
            reached = got <= target if at_most else got >= target
        found.append({"name": name, "value": got, "target": target, "at_most": at_most, "reached": reached})

    for preset in PRESETS:
        counts = preset == "2024"
        for size in SIZES:
            ours = f"{size}, {preset}, ours"
            speed = value(ours, "clips/s")
            add(f"{ours}: clips/s", speed, CLIPS_PER_SECOND[size] if counts else None)
            for side, ratio in SPEED_RATIOS.items():
                got = _ratio(speed, value(f"{size}, {preset}, {side}", "clips/s"))
                add(f"{ours} against {side}: clips/s", got, ratio if counts else None)
            got = _ratio(value(ours, "MB per clip"), value(f"{size}, {preset}, plain fp32", "MB per clip"))
            add(f"{ours} against plain fp32: memory per clip", got, MEMORY_RATIO if counts else None, at_most=True)
            got = _ratio(value(ours, "ms of log-mel and GMML"), value(ours, "ms per step"))
            add(f"{ours}: share of log-mel and GMML", got, PREPARATION_SHARE if counts else None, at_most=True)
            flops, product = value(ours, "GFLOP per clip"), value("bf16 product", "TFLOP/s")
            got = None if None in (flops, speed) else _ratio(flops * speed / 1000, product)
            add(f"{ours}: share of the rate of a bf16 product", got)
    for size in SIZES:
        name = f"{size}, corpus"
        got = value(name, "share of the forward passes")
        add(f"{name}: share of the forward passes", got, CORPUS_SHARE if size == "base" else None)
    got = rows.get("host synchronizations of one step", {}).get("value")
    add("host synchronizations of one step", got, SYNCHRONIZATIONS, at_most=True)
    return found


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or not theirs else ours / theirs


def to_markdown(rows: list[dict[str, Any]], held_to: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The report: checks, targets, training steps, other figures, training, and the machine."""
    lines = ["# On a GPU", "", *NOTES]
    if facts.get("quick"):
        lines += ["**A rehearsal at toy sizes, to check that everything runs; the numbers are meaningless.**", ""]
    lines += [*_table("Checks", ("check", "value", "at most", "status", "detail"), _checks(rows))]
    reached = {None: "", True: "yes", False: "**no**"}
    targets_of = [
        (
            row["name"],
            _shown(row["value"]),
            "" if row["target"] is None else f"{'at most' if row['at_most'] else 'at least'} {row['target']:g}",
            reached[row["reached"]],
        )
        for row in held_to
    ]
    lines += _table("Targets: one H100, batch 128, bf16", ("what", "value", "target", "reached"), targets_of)
    names = [f"{size}, {preset}, {side}" for preset in PRESETS for size in SIZES for side in SIDES]
    steps = [
        (row["name"], *(_shown(row.get("values", {}).get(name), "") for name in STEP), row["status"], _cell(row))
        for row in rows
        if row["name"] in names
    ]
    lines += _table("Training steps", ("what", *STEP, "status", "detail"), steps)
    for phase, title in (("figures", "Other figures"), ("training", "Training"), ("machine", "Data")):
        chosen = [row for row in rows if row["phase"] == phase and row["name"] not in (*names, "machine")]
        cells = [(row["name"], _joined(row.get("values", {})), row["status"], _cell(row)) for row in chosen]
        lines += _table(title, ("what", "values", "status", "detail"), cells)
    return "\n".join([*lines, "## Machine", "", *(f"- {name}: {value}" for name, value in facts.items()), ""])


def _checks(rows: list[dict[str, Any]]) -> list[tuple]:
    return [
        (row["name"], _shown(row.get("value")), _shown(row["bound"], ""), row["status"], _cell(row))
        for row in rows
        if row["phase"] == "checks"
    ]


def _table(title: str, columns: tuple, cells: list[tuple]) -> list[str]:
    rows = [f"| {' | '.join(map(str, row))} |" for row in (columns, ["---"] * len(columns), *cells)]
    return [f"## {title}", "", *(rows if cells else ["not measured"]), ""]


def _shown(value: Any, absent: str = "not measured") -> str:
    return absent if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _joined(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_shown(value)}" for name, value in values.items() if not isinstance(value, list))


def _cell(row: dict[str, Any]) -> str:
    """The detail as one table cell."""
    return " ".join(row.get("detail", "").split())[-600:].replace("|", "\\|")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="run at toy sizes, with or without a GPU, to check that everything runs"
    )
    parser.add_argument("--minutes", type=float, default=12.0, help="time limit for all phases (default: 12)")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES, help="phases to run (default: all)")
    parser.add_argument("--train_data", help="training audio: a folder of packed audio or of its opus parcels")
    parser.add_argument(
        "--init", help="ASiT encoder or image ViT from which training starts (default: random initialization)"
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="folder for results and encoder (default: examples/benchmarks/results, or runs/gpu-quick with --quick)",
    )
    given = sys.argv[1:] if arguments is None else arguments
    chosen = parser.parse_args(given)
    end = time.monotonic() + 60 * chosen.minutes - RESERVE
    head = {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "command": shlex.join(["python", "examples/benchmarks/gpu.py", *_without_folders(given)]),
        "quick": chosen.quick,
    }
    chosen.output_dir = chosen.output_dir or (ROOT / "runs" / "gpu-quick" if chosen.quick else RESULTS)
    measurements = [row for row in plan(chosen.quick) if row.phase in ("machine", *chosen.phases)]
    _remove_half_exports(chosen.output_dir)
    with tempfile.TemporaryDirectory(prefix="gpu-") as scratch:
        run = Run(chosen.output_dir.resolve(), Path(scratch), chosen.quick, chosen.train_data, chosen.init)
        report = Report(run.output_dir, head)
        fine = run_all(measurements, report, run, end)
    _remove_half_exports(chosen.output_dir)
    if any(row["status"] == NO_GPU for row in report.rows.values()):
        print("no GPU found, so nothing was measured; use --quick for a rehearsal at toy sizes on a CPU")
        return 1
    print(f"results: {run.output_dir / 'gpu.md'}")
    if not fine:
        bad = [f"{row['name']} ({row['status']})" for row in report.rows.values() if row["status"] not in FINE]
        print(f"failed or missing: {'; '.join(bad)}", file=sys.stderr)
    return 0 if fine else 1


def _without_folders(arguments: list[str]) -> list[str]:
    """Shortens paths to their last part."""
    return [Path(argument).name if os.sep in argument else argument for argument in arguments]


def _remove_half_exports(folder: Path) -> None:
    """Cleans up after a process that was killed during an export; restores the previous encoder if it was moved."""
    for leftover in folder.glob(".encoder-*"):
        if not (folder / "encoder").exists() and (leftover / "replaced").exists():
            os.replace(leftover / "replaced", folder / "encoder")
        shutil.rmtree(leftover, ignore_errors=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worker is stopped, too
    sys.exit(main())
