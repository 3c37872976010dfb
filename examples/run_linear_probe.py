"""
What an encoder's frozen embeddings are worth: linear probes (`linear` is logistic regression, `ridge` least squares,
which suits wide embeddings) and one of k nearest neighbors, on labelled audio.

    python examples/run_linear_probe.py --model_name_or_path CHECKPOINT --train train.csv --test test.csv
    python examples/run_linear_probe.py --random_init --size tiny --train esc50.csv --root audio \
        --label_column category --train_filter fold=1,2,3 --test_filter fold=4
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTModel
from asit_hf.configuration_asit import SIZES
from asit_hf.data import CORPORA
from asit_hf.data.audio import AudioReadError, source_name
from asit_hf.data.clips import LabelledClips
from asit_hf.data.labelled import load_labelled, problem_type_of
from asit_hf.data.labels import label_names
from asit_hf.data.splits import find_group_column
from asit_hf.evaluation.embeddings import POOLINGS, embed
from asit_hf.evaluation.probes import knn_probe, linear_probe, ridge_probe
from asit_hf.loading import load_config, load_encoder, load_feature_extractor

METHODS = {"linear": linear_probe, "ridge": ridge_probe, "knn": knn_probe}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model_name_or_path", help="encoder, classifier or pretraining checkpoint, folder or Hub name"
    )
    parser.add_argument(
        "--source", choices=("teacher", "student"), default="teacher", help="of a pretraining checkpoint"
    )
    parser.add_argument(
        "--random_init",
        action="store_true",
        help="fresh weights, in the checkpoint's architecture or in that of --size",
    )
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny", help="with --random_init and no checkpoint")
    parser.add_argument(
        "--train", required=True, help="folder of class folders, csv or json manifest, or Hub data set"
    )
    parser.add_argument("--test", help="the same; by default --train")
    parser.add_argument(
        "--corpus",
        choices=tuple(CORPORA),
        help="--train is the root of such a data set, whose splits are chosen by --train_split and --test_split",
    )
    parser.add_argument("--train_split")
    parser.add_argument("--test_split")
    parser.add_argument("--train_filter", nargs="+", metavar="COLUMN=V1,V2", help="keep the rows with these values")
    parser.add_argument("--test_filter", nargs="+", metavar="COLUMN=V1,V2", help="the same for the test set")
    parser.add_argument("--audio_column")
    parser.add_argument("--label_column")
    parser.add_argument("--root", help="folder that a manifest's paths are relative to")
    parser.add_argument(
        "--group_column",
        help="rows alike here are validated on together; by default speaker, source or fold if present",
    )
    parser.add_argument("--strict", action="store_true", help="stop at a file that cannot be read")
    parser.add_argument("--max_seconds", type=float, help="use only the beginning of longer clips")
    parser.add_argument("--pooling", choices=POOLINGS, default="cls")
    parser.add_argument("--num_layers", type=int, default=1, help="concatenate this many last layers")
    parser.add_argument("--window_seconds", type=float, help="hear longer clips in windows, pooled over all of them")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS), help="these probes")
    parser.add_argument("--k", type=int, default=20, help="neighbors")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of cross-validation and fresh weights"
    )
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", help="json file to write")
    args = parser.parse_args(argv)
    if not args.model_name_or_path and not args.random_init:
        parser.error("give --model_name_or_path, or --random_init")
    if args.test is None and args.test_split is None and args.test_filter is None:
        parser.error(
            "give --test, --test_split or --test_filter: the probe is tested on other clips than it is fitted on"
        )
    return args


def main(argv: list[str] | None = None, known: dict[tuple, np.ndarray] | None = None) -> dict:
    """
    Probes, prints and returns the scores. `known` keeps embeddings by (seed of fresh weights, file) for further calls
    with the same model options, whose splits share clips.
    """
    args = parse_args(argv)
    known = {} if known is None else known
    reading = {name: getattr(args, name) for name in ("audio_column", "label_column", "root", "strict")}
    reading["corpus"] = args.corpus
    train = load_labelled(args.train, args.train_filter or (), split=args.train_split, **reading)
    if problem_type_of(train) == "regression":
        raise ValueError("a probe needs classes, the labels are floating-point numbers")
    test = load_labelled(
        args.test or args.train, args.test_filter or (), label_names(train), split=args.test_split, **reading
    )
    group_column = find_group_column(train) if args.group_column is None else args.group_column
    groups = train[group_column][:] if group_column else None
    train_y, test_y = targets(train), targets(test)

    runs = []
    embeddings, seconds = None, 0.0
    for seed in args.seeds:
        start = time.perf_counter()
        if embeddings is None or args.random_init:
            embeddings = embed_both(args, train, test, seed, known)
            seconds += time.perf_counter() - start
        train_x, test_x = embeddings
        options = {
            "linear": {"seed": seed, "groups": groups},
            "ridge": {"seed": seed, "groups": groups},
            "knn": {"k": args.k},
        }
        sets = (train_x, train_y, test_x, test_y)
        runs.append({"seed": seed, **{method: METHODS[method](*sets, **options[method]) for method in args.methods}})

    results = {
        "model": args.model_name_or_path if not args.random_init else f"random {args.model_name_or_path or args.size}",
        "source": args.source,
        "pooling": args.pooling,
        "num_layers": args.num_layers,
        "window_seconds": args.window_seconds,
        "embedding_size": train_x.shape[1],
        "train_clips": len(train),
        "test_clips": len(test),
        "classes": len(label_names(train)),
        "group_column": group_column,
        "embedding_seconds": round(seconds, 1),
        "summary": {probe: summary([run[probe] for run in runs]) for probe in args.methods},
        "runs": runs,
    }
    print_table(results)
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n")
    return results


def embed_both(
    args: argparse.Namespace, train: Dataset, test: Dataset, seed: int, known: dict[tuple, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings `(clips, dim)` of both sets; only the files that are not in `known` are read."""
    path = args.model_name_or_path
    feature_extractor = load_feature_extractor(path) if path else ASiTFeatureExtractor()
    if args.random_init:
        torch.manual_seed(seed)
        model = ASiTModel(load_config(path) if path else ASiTConfig.from_size(args.size))
    else:
        model = load_encoder(path, args.source)

    def embed_set(dataset: Dataset) -> np.ndarray:
        names = [source_name(row["audio"]) for row in dataset.select_columns("audio")]
        if len(set(names)) < len(names):  # bytes have no names
            names = [object() for _ in names]
        keys = [(seed if args.random_init else None, name) for name in names]
        new = [index for index, key in enumerate(keys) if key not in known]
        if new:
            embeddings = embed(
                model,
                feature_extractor,
                LabelledClips(dataset.select(new), feature_extractor.sampling_rate, args.max_seconds),
                pooling=args.pooling,
                batch_size=args.batch_size,
                device=args.device,
                num_layers=args.num_layers,
                window_seconds=args.window_seconds,
            )
            known.update(zip([keys[index] for index in new], embeddings))
        return np.stack([known[key] for key in keys])

    return embed_set(train), embed_set(test)


def targets(dataset: Dataset) -> np.ndarray:
    """Class ids `(clips,)`, or 0-1 targets `(clips, classes)` where a clip has several labels."""
    labels = dataset["label"][:]
    if problem_type_of(dataset) == "single_label_classification":
        return np.asarray(labels)
    rows = np.zeros((len(labels), len(label_names(dataset))), dtype=np.int64)
    for row, ids in zip(rows, labels):
        row[ids] = 1
    return rows


def summary(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over seeds of every metric."""
    names = [name for name in runs[0] if name not in ("weight_decay", "classes_without_positives")]
    return {
        name: {"mean": float(np.mean([run[name] for run in runs])), "std": float(np.std([run[name] for run in runs]))}
        for name in names
    }


def print_table(results: dict) -> None:
    print(
        f"{results['model']} | {results['pooling']} x {results['num_layers']}, {results['embedding_size']} dimensions "
        f"| {results['train_clips']} -> {results['test_clips']} clips, {results['classes']} classes | "
        f"{len(results['runs'])} seeds, embedded in {results['embedding_seconds']} s"
    )
    for probe, metrics in results["summary"].items():
        for name, value in metrics.items():
            print(f"{probe:7} {name:26} {value['mean']:8.4f} +- {value['std']:.4f}")


if __name__ == "__main__":
    try:
        main()
    except AudioReadError as error:
        sys.exit(f"error: {error}; repair this file or take it out of the data")
