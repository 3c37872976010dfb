"""
Writes the number of clips of each class, and its weight in `--balanced_sampling`, as csv.

    python -m examples.tools.class_weights --data ESC-50 --corpus esc50 --filter fold=1,2,3,4
    python -m examples.tools.class_weights --data AUDIOSET --corpus audioset-20k --split train --output weights.csv

Columns: `index`, `label`, `clips` and `weight`, 1000 / (clips + 0.01). A clip is sampled by the sum of its labels'
weights. Only labels are read, no audio.
"""

import csv
import sys
from collections import Counter
from pathlib import Path
from typing import TextIO

from asit_hf.data import label_names
from asit_hf.data.labelled import DatasetArguments, problem_type_of
from asit_hf.finetuning.sampling import class_weights
from asit_hf.utils.files import whole_file


def main(argv: list[str] | None = None) -> list[dict[str, int | str | float]]:
    parser = DatasetArguments.parser(__doc__)
    help = "keep rows with one of these values"
    parser.add_argument("--filter", nargs="+", default=[], metavar="COLUMN=V1,V2", help=help)
    parser.add_argument("--output", type=Path, help="csv file to write; default: standard output")
    args = parser.parse_args(argv)
    if args.strict:
        parser.error("--strict has no effect: only labels are read, no audio")
    dataset = DatasetArguments.of(args).load(args.data, args.filter, split=args.split, check_files=False)
    if problem_type_of(dataset) == "regression":
        raise ValueError(f"expected classes as labels of {args.data}, got floating-point numbers")
    labels, names = dataset["label"][:], label_names(dataset)
    counts = Counter(one for label in labels for one in (label if isinstance(label, list) else [label]))
    rows = [
        {"index": index, "label": name, "clips": counts[index], "weight": float(weight)}
        for index, (name, weight) in enumerate(zip(names, class_weights(labels, len(names))))
    ]
    if args.output:
        with whole_file(args.output) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as file:
            write(rows, file)
    else:
        write(rows, sys.stdout)
    return rows


def write(rows: list[dict[str, int | str | float]], file: TextIO) -> None:
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
