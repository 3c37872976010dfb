"""
Run the benchmarks, print a table of ratios with their targets, and write it to `results/`.

    python examples/benchmarks/run.py            # about 8 minutes on two cores
    python examples/benchmarks/run.py --quick    # toy sizes, to check that everything runs
    python examples/benchmarks/run.py --parts inference        # from array to label; some minutes
    python examples/benchmarks/run.py --parts live             # latency of live listening; three minutes
    python examples/benchmarks/run.py --parts startup          # imports and the first label; five minutes
    python examples/benchmarks/run.py --parts corpus           # predict and embed on many files; a quarter of an hour
    python examples/benchmarks/run.py --parts corpus_memory    # their peak memory; half an hour
    python examples/benchmarks/run.py --parts compiled_step    # training steps with compiled layers
    python examples/benchmarks/run.py --parts exported         # onnxruntime and int8; needs the extras onnx and int8

Every ratio is between medians of interleaved runs on the same number of threads, which OMP_NUM_THREADS sets.
"""

import argparse
from importlib import import_module
from pathlib import Path

from common import RESULTS, machine_facts, to_markdown, write_results

PARTS = ("training_step", "log_mel", "masks", "reading")
MORE_PARTS = ("inference", "live", "startup", "compiled_step", "exported")  # slower, or with more requirements


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS + MORE_PARTS,
        default=PARTS,
        help=f"benchmarks to run (default: {' '.join(PARTS)})",
    )
    parser.add_argument("--quick", action="store_true", help="run at toy sizes, to check that everything runs")
    parser.add_argument(
        "--output_dir", type=Path, default=RESULTS, help="folder for the json and md files (default: results/)"
    )
    chosen = parser.parse_args(arguments)
    name = "results" if tuple(chosen.parts) == PARTS else "-".join(chosen.parts)
    facts = machine_facts()  # includes the start time
    reports = []
    for part in chosen.parts:
        reports.append(import_module(part).measure(chosen.quick))
        write_results(reports, facts, chosen.output_dir, name)  # an interrupted run keeps these
    print(to_markdown(reports, facts))


if __name__ == "__main__":
    main()
