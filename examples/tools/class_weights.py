"""
How often each class of a data set is labelled, and the weight that `--balanced_sampling` gives it, as csv.

    python -m examples.tools.class_weights ESC-50 --corpus esc50 --filter fold=1,2,3,4
    python -m examples.tools.class_weights AUDIOSET --corpus audioset-20k --split train --output weights.csv

Columns: `index`, `label`, `clips` and `weight`, 1000 / (clips + 0.01). A clip is drawn by the sum over its labels.
Labels alone are read, no audio.
"""

import argparse
import csv
import sys
from collections import Counter
from pathlib import Path
from typing import TextIO

from asit_hf.data import CORPORA, label_names
from asit_hf.data.labelled import load_labelled, problem_type_of
from asit_hf.finetuning.sampling import class_weights


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder of class folders, csv or json manifest, parquet, or Hub data set")
    parser.add_argument("--corpus", choices=tuple(CORPORA), help="the source is the root of such a data set")
    parser.add_argument("--split")
    parser.add_argument(
        "--filter", nargs="+", default=[], metavar="COLUMN=V1,V2", help="keep the rows with these values"
    )
    parser.add_argument("--audio_column")
    parser.add_argument("--label_column")
    parser.add_argument("--root", help="folder that a manifest's paths are relative to")
    parser.add_argument("--output", type=Path, help="csv file to write; by default it is printed")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[dict[str, int | str | float]]:
    args = parse_args(argv)
    dataset = load_labelled(
        args.source,
        args.filter,
        corpus=args.corpus,
        check_files=False,
        split=args.split,
        audio_column=args.audio_column,
        label_column=args.label_column,
        root=args.root,
    )
    if problem_type_of(dataset) == "regression":
        raise ValueError("weights are of classes, the labels are floating-point numbers")
    labels, names = dataset["label"][:], label_names(dataset)
    counts = Counter(one for label in labels for one in (label if isinstance(label, list) else [label]))
    rows = [
        {"index": index, "label": name, "clips": counts[index], "weight": float(weight)}
        for index, (name, weight) in enumerate(zip(names, class_weights(labels, len(names))))
    ]
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with open(args.output, "w", newline="", encoding="utf-8") as file:
            write(rows, file)
    else:
        write(rows, sys.stdout)
    return rows


def write(rows: list[dict[str, int | str | float]], file: TextIO) -> None:
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


if __name__ == "__main__":
    main()
