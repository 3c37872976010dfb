"""
What compiled layers do to our training step on a processor. Not part of a plain `run.py`: compiling alone takes
minutes, and needs a C++ compiler.

    python examples/benchmarks/compiled_step.py
"""

from common import Report, Row, medians, run_alone, spread, time_interleaved
from training_step import BATCH, Contestant


def measure(quick: bool = False) -> Report:
    """Preset 2023 in bf16, with `compile_layers=True` and without."""
    report = Report("compiled step")
    runs = {
        "as it is": Contestant("ours bf16", "2023", [BATCH], quick),
        "compiled": Contestant("ours bf16", "2023", [BATCH], quick, compile_layers=True),
    }
    seconds = time_interleaved(runs, rounds=1 if quick else 5, warm_up=2)
    for run in runs.values():
        run.stop()
    found = medians(seconds)
    report.add(Row("2023, bf16, compiled layers against without", found["compiled"], found["as it is"]))
    report.notes.append(f"2023 in bf16: {spread(seconds)}.")
    return report


if __name__ == "__main__":
    run_alone(measure)
