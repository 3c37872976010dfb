"""
What torch.compile does to our training step. Not part of a plain `run.py`: compiling alone takes minutes, and needs a
C++ compiler.

    python examples/benchmarks/compiled_step.py
"""

import logging
import tempfile

from common import Report, Row, medians, run_alone, spread, time_interleaved
from training_step import BATCH, Batches, SteppedRun, build_batch, build_model, build_trainer


def measure(quick: bool = False) -> Report:
    """Objective 2023 in bf16, with `torch_compile=True` and without."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    report = Report("compiled step")
    with tempfile.TemporaryDirectory() as folder:
        batches = Batches(build_batch(build_model("2023", quick).config, "2023", BATCH))
        runs = {
            name: SteppedRun(
                build_trainer(build_model("2023", quick), "2023", batches, folder, bf16=True, torch_compile=compiles)
            )
            for name, compiles in (("as it is", False), ("compiled", True))
        }
        seconds = time_interleaved({name: run.step for name, run in runs.items()}, rounds=1 if quick else 5, warm_up=2)
        for run in runs.values():
            run.stop()
    found = medians(seconds)
    report.add(Row("2023, bf16, torch.compile against without", found["compiled"], found["as it is"]))
    report.notes.append(f"2023 in bf16: {spread(seconds)}.")
    return report


if __name__ == "__main__":
    run_alone(measure)
