"""
Runs all benchmarks, prints one table of ratios with their targets, and writes it to `results/`.

    python examples/benchmarks/run.py            # about 8 minutes on two cores
    python examples/benchmarks/run.py --quick    # toy sizes: shows that it runs
    python examples/benchmarks/run.py --parts inference        # from array to label, some minutes more
    python examples/benchmarks/run.py --parts compiled_step    # what compiled layers do
    python examples/benchmarks/run.py --parts exported         # onnxruntime and int8; needs the extras onnx and int8

Every ratio is of medians of interleaved runs on the same threads. Set OMP_NUM_THREADS to choose how many.
"""

import argparse
from importlib import import_module
from pathlib import Path

from common import RESULTS, machine_facts, to_markdown, write_results

PARTS = ("training_step", "log_mel", "masks", "reading")
MORE_PARTS = ("inference", "compiled_step", "exported")  # longer, or in need of what is not everywhere


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS + MORE_PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that it runs, measures nothing")
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="where the json and the md file go")
    chosen = parser.parse_args(arguments)
    name = "results" if tuple(chosen.parts) == PARTS else "-".join(chosen.parts)
    facts = machine_facts()  # its date is the start
    reports = []
    for part in chosen.parts:
        reports.append(import_module(part).measure(chosen.quick))
        write_results(reports, facts, chosen.output_dir, name)  # after each part: the whole takes minutes
    print(to_markdown(reports, facts))


if __name__ == "__main__":
    main()
