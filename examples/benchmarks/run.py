"""
Runs all benchmarks, prints one table of ratios with their targets, and writes it to `results/`.

    python examples/benchmarks/run.py            # about 8 minutes on two cores
    python examples/benchmarks/run.py --quick    # toy sizes: shows that it runs
    python examples/benchmarks/run.py --parts compiled_step    # what torch.compile does, some minutes more
    python examples/benchmarks/run.py --parts exported    # onnxruntime and int8; needs the extras onnx and int8

Every ratio is of medians of interleaved runs on the same threads. Set OMP_NUM_THREADS to choose how many.
"""

import argparse
from importlib import import_module
from pathlib import Path

from common import RESULTS, machine_facts, to_markdown, write_results

PARTS = ("training_step", "log_mel", "masks", "reading")
MORE_PARTS = ("compiled_step", "exported")  # what they need is not everywhere


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS + MORE_PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that it runs, measures nothing")
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="where results.json and results.md go")
    chosen = parser.parse_args(arguments)
    facts = machine_facts()  # its date is the start
    reports = []
    for name in chosen.parts:
        reports.append(import_module(name).measure(chosen.quick))
        write_results(reports, facts, chosen.output_dir, "results")  # after each part: the whole takes minutes
    print(to_markdown(reports, facts))


if __name__ == "__main__":
    main()
