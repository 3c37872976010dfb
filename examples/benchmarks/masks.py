"""
GMML's corruption of 32 clips with two views of 592 x 128 each: our batched version against a Python loop over clips.

    python examples/benchmarks/masks.py
"""

import torch
from common import Report, Row, medians, ranges, run_alone, threads, time_interleaved
from official_loop import corrupt_in_python

from asit_hf.pretraining.masking import corrupt, draw_keys
from asit_hf.pretraining.presets import PRESETS
from asit_hf.utils.cpu import keep_freed_memory

TARGET = 20.0


def measure(quick: bool = False) -> Report:
    """Both presets, which differ in their masking ratios; on one thread, and on torch's number of threads."""
    report = Report("masks")
    keep_freed_memory()  # as the trainer does; both sides benefit
    torch.manual_seed(0)
    clean = torch.randn(2 if quick else 32, 2, 592, 128)
    views = [view[:, None] for view in clean.unbind(1)]
    for name, preset in PRESETS.items():
        calls = {
            "ours": lambda gmml=preset.gmml: corrupt(clean, draw_keys(len(clean)), 0, gmml),
            "theirs": lambda gmml=preset.gmml: corrupt_in_python(views, gmml),
        }
        for count in sorted({1, torch.get_num_threads()}):
            with threads(count):
                seconds = time_interleaved(calls, rounds=1 if quick else 5)
            found = medians(seconds)
            what = f"{name}, against a loop, threads: {count}"
            report.add(Row(what, found["ours"], found["theirs"], target=TARGET))
            report.notes.append(f"{name}, threads: {count}: {ranges(seconds)}.")
    return report


if __name__ == "__main__":
    run_alone(measure)
