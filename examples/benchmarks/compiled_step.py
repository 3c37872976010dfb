"""
Our training step on a CPU with and without compiled layers. `run.py` does not include it by default, because compiling
takes minutes and needs a C++ compiler.

    python examples/benchmarks/compiled_step.py
"""

from common import Report, Row, medians, ranges, run_alone, time_interleaved
from training_step import BATCH, Contestant


def measure(quick: bool = False) -> Report:
    """Preset 2023 in bf16, with and without `compile_layers`."""
    report = Report("compiled step")
    runs = {
        "eager": Contestant("ours bf16", "2023", [BATCH], quick),
        "compiled": Contestant("ours bf16", "2023", [BATCH], quick, compile_layers=True),
    }
    seconds = time_interleaved(runs, rounds=1 if quick else 5, warm_up=2)
    for run in runs.values():
        run.stop()
    found = medians(seconds)
    report.add(Row("2023, bf16, compiled layers against eager ones", found["compiled"], found["eager"]))
    report.notes.append(f"2023 in bf16: {ranges(seconds)}.")
    return report


if __name__ == "__main__":
    run_alone(measure)
