"""
Runs all benchmarks, prints one table of ratios with their targets, and writes it to `results/`.

    python examples/benchmarks/run.py            # about 8 minutes on two cores
    python examples/benchmarks/run.py --quick    # toy sizes: shows that it runs
    python examples/benchmarks/run.py --parts inference        # from array to label, some minutes more
    python examples/benchmarks/run.py --parts compiled_step    # what torch.compile does

Every ratio is of medians of interleaved runs on the same threads. Set OMP_NUM_THREADS to choose how many.
"""

import argparse
from pathlib import Path

import compiled_step
import inference
import log_mel
import masks
import reading
import training_step
from common import RESULTS, machine_facts, to_markdown, write_results

PARTS = {
    "training_step": training_step,
    "log_mel": log_mel,
    "masks": masks,
    "reading": reading,
    "inference": inference,
    "compiled_step": compiled_step,
}
DEFAULT = ["training_step", "log_mel", "masks", "reading"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=DEFAULT)
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that it runs, measures nothing")
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="where the json and the md file go")
    chosen = parser.parse_args(arguments)
    name = "results" if chosen.parts == DEFAULT else "-".join(chosen.parts)
    facts = machine_facts()  # its date is the start
    reports = []
    for part in chosen.parts:
        reports.append(PARTS[part].measure(chosen.quick))
        write_results(reports, facts, chosen.output_dir, name)  # after each part: the whole takes minutes
    print(to_markdown(reports, facts))


if __name__ == "__main__":
    main()
