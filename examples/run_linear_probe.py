r"""
Probes the frozen embeddings of an encoder on labelled audio: logistic regression (`linear`), least squares (`ridge`,
the faster one for wide embeddings), k nearest neighbors (`knn`) and, if named, a learned average of layers with
attention pooling over time (`attentive`, the slowest).

    python examples/run_linear_probe.py --model_name_or_path CHECKPOINT --train train.csv --test test.csv
    python examples/run_linear_probe.py --random_init --size tiny --train esc50.csv --root audio \
        --label_column category --train_filter fold=1,2,3 --test_filter fold=4

With `--shots 8` it fits on 8 training clips per class instead, drawn at random 10 times, as the leaderboard MAEB does
(https://github.com/embeddings-benchmark/mteb), and tests each draw on all test clips; `--shots 1 2 4 8 16` gives a
curve. A smaller draw is a part of the larger one with the same number. The clip of several classes counts for each of
them: clips are drawn, in random order, if one of their classes lacks some. Draws pay no regard to groups, such as
speakers, as MAEB's; cross-validation does, if the drawn clips have two. MAEB's own classifier is a logistic regression
on raw embeddings with a fixed penalty; here each probe chooses its weight decay by cross-validation within the drawn
clips, or takes the strongest if there is one clip per class.
"""

import argparse
import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import HfArgumentParser

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTModel
from asit_hf.configuration_asit import SIZES
from asit_hf.data.audio import source_name
from asit_hf.data.clips import MAX_SECONDS, LabelledClips, warn_of_longer
from asit_hf.data.labelled import DatasetArguments, check_classes, problem_type_of, targets
from asit_hf.data.labels import label_names
from asit_hf.data.splits import find_group_column, group_ids
from asit_hf.evaluation.attentive_probe import attentive_probe
from asit_hf.evaluation.embeddings import POOLINGS, embed, embed_tokens, window_time_patches
from asit_hf.evaluation.probes import PROBES, check_folds
from asit_hf.loading import ENCODERS, load_config, load_encoder, load_feature_extractor
from asit_hf.utils.arguments import run_script
from asit_hf.utils.files import check_writable

logger = logging.getLogger(__name__)

ATTENTIVE = "attentive"  # takes tokens, the others pooled embeddings
ALL_PROBES = (*PROBES, ATTENTIVE)
MAX_NEIGHBORS = 20


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = HfArgumentParser(
        DatasetArguments, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model_name_or_path", help="folder or Hub name of an encoder, classifier or pretraining checkpoint"
    )
    parser.add_argument("--encoder", choices=ENCODERS, help="encoder of a pretraining checkpoint (default: teacher)")
    parser.add_argument(
        "--random_init",
        action="store_true",
        help="random weights, in the architecture of the checkpoint or of --size",
    )
    parser.add_argument(
        "--size", choices=tuple(SIZES), help="model size with --random_init and no checkpoint (default: tiny)"
    )
    parser.add_argument(
        "--train",
        required=True,
        help="folder of class folders, csv or json manifest, or Hub data set; with --corpus, its root folder",
    )
    parser.add_argument("--test", help="test data in the same form (default: --train)")
    parser.add_argument(
        "--train_split",
        help="split of --train to fit on; without any test data named, the splits that it has are used",
    )
    parser.add_argument("--test_split", help="split of --test to test on")
    parser.add_argument(
        "--train_filter", nargs="+", metavar="COLUMN=V1,V2", help="keep training rows with these values"
    )
    parser.add_argument("--test_filter", nargs="+", metavar="COLUMN=V1,V2", help="keep test rows with these values")
    parser.add_argument(
        "--group_column",
        help='column of groups that cross-validation does not split, "" for none (default: speaker, source, fold, ... '
        "if its groups can be divided with nearly all classes on both sides)",
    )
    parser.add_argument("--max_seconds", type=float, help="use only the beginning of longer clips")
    parser.add_argument("--pooling", choices=POOLINGS, help="pooling of the tokens (default: cls)")
    parser.add_argument(
        "--num_layers",
        type=int,
        help="number of last layers to concatenate (default: 1) or, by the attentive probe, to average (default: all)",
    )
    parser.add_argument(
        "--window_seconds",
        type=float,
        help="embed longer clips in windows of this length and pool over them (default: 30)",
    )
    parser.add_argument(
        "--probes",
        nargs="+",
        choices=ALL_PROBES,
        default=list(PROBES),
        help=f"probes to fit (default: {' '.join(PROBES)})",
    )
    parser.add_argument(
        "--k", type=int, help="number of neighbors of the knn probe (default: 20, or all training clips if fewer)"
    )
    parser.add_argument(
        "--shots", type=int, nargs="+", metavar="N", help="fit on N training clips per class (default: on all clips)"
    )
    parser.add_argument("--draws", type=int, help="random draws of the clips for every --shots (default: 10)")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        help="seeds of cross-validation, draws and random weights (default: 0 1 2; with --shots: 0)",
    )
    parser.add_argument("--batch_size", type=int, default=16, help="clips per batch (default: 16)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device of the encoder"
    )
    parser.add_argument("--bf16", action="store_true", help="compute the encoder in bf16, which rounds the embeddings")
    parser.add_argument("--output", help="json file for the results")
    args = parser.parse_args(argv)
    if not args.model_name_or_path and not args.random_init:
        parser.error("expected --model_name_or_path or --random_init")
    if args.test is None and args.test_split is None and args.test_filter is None:
        use_splits(args)
    if args.test is None and args.test_split is None and args.test_filter is None:
        parser.error("expected --test, --test_split or --test_filter: the test clips must not be the training clips")
    if args.size and args.model_name_or_path:
        parser.error("--size has no effect with --model_name_or_path, whose architecture is used")
    if args.encoder and args.random_init:
        parser.error("--encoder has no effect with --random_init, which reads no weights")
    if args.k is not None and "knn" not in args.probes:
        parser.error("--k has no effect without the knn probe")
    if args.group_column and set(args.probes) == {"knn"}:
        parser.error("--group_column has no effect on the knn probe, which is not cross-validated")
    if args.pooling and set(args.probes) == {ATTENTIVE}:
        parser.error("--pooling has no effect on the attentive probe, which learns its own")
    if args.draws and not args.shots:
        parser.error("--draws has no effect without --shots")
    for name in ("k", "num_layers", "batch_size", "max_seconds", "window_seconds", "shots", "draws"):
        value = getattr(args, name)
        if value is not None and not min(value if name == "shots" else [value]) > 0:
            parser.error(f"--{name} must be above 0, got {value}")
    args.pooling = args.pooling or "cls"
    args.encoder, args.size = args.encoder or "teacher", args.size or "tiny"
    args.draws = args.draws or 10
    args.seeds = args.seeds or ([0] if args.shots else [0, 1, 2])
    return args


def use_splits(args: argparse.Namespace) -> None:
    """Fits on the training split of local data or a corpus, and tests on its test split, or else on its validation."""
    splits = DatasetArguments.of(args).default_splits(args.train)
    test = splits.get("test") or splits.get("validation")
    if args.train_split or not test:
        return
    args.train_split, args.test_split = splits["train"], test
    logger.warning(f"fits on the split {args.train_split} of {args.train} and tests on {test} (--test_split)")


def check_options(args: argparse.Namespace, train: Dataset, groups: Sequence | None, fewest: int) -> None:
    """
    Raises `ValueError` or `OSError` for what would fail after the clips are embedded. `fewest`: the number of clips of
    the smallest fit.
    """
    path = args.model_name_or_path
    config = load_config(path) if path else ASiTConfig.from_size(args.size)
    if args.num_layers is not None and args.num_layers > config.num_hidden_layers:
        raise ValueError(f"expected --num_layers from 1 to {config.num_hidden_layers}, got {args.num_layers}")
    if args.window_seconds is not None:
        feature_extractor = load_feature_extractor(path) if path else ASiTFeatureExtractor()
        window_time_patches(args.window_seconds, feature_extractor.sampling_rate, config.patch_size)
    if args.k is not None and args.k > fewest:
        raise ValueError(f"expected --k from 1 to {fewest}, the number of training clips, got {args.k}")
    if "knn" in args.probes and args.k is None and fewest < MAX_NEIGHBORS:
        logger.info("knn: the neighbors are all training clips, %d at least (--k)", fewest)
    if set(args.probes) != {"knn"}:
        check_folds(targets(train), groups)
    torch.empty(0, device=args.device)
    if args.output:
        check_writable(Path(args.output))
    if args.window_seconds is None:
        args.window_seconds = MAX_SECONDS
        if args.max_seconds is None:
            warn_of_longer(train, MAX_SECONDS, "they are embedded in windows of this length (--window_seconds)")


def main(argv: list[str] | None = None, cache: dict[tuple, np.ndarray] | None = None) -> dict:
    """
    Probes, prints and returns the scores. `cache` keeps embeddings by (seed of random weights, file) across calls
    with the same model options.
    """
    args = parse_args(argv)
    cache = {} if cache is None else cache
    reading = DatasetArguments.of(args)
    train = reading.load(args.train, args.train_filter or (), split=args.train_split)
    if problem_type_of(train) == "regression":
        raise ValueError("expected classes to probe, got floating-point labels")
    check_classes(train, args.train)
    like = {"names": label_names(train), "problem_type": problem_type_of(train)}
    test = reading.load(args.test or args.train, args.test_filter or (), split=args.test_split, **like)
    group_column = None
    if set(args.probes) != {"knn"}:
        group_column = find_group_column(train, args.group_column)
    draws = [(run, rows) for seed in args.seeds for run, rows in draw_clips(args, train, seed)]
    drawn = sorted({row for _, rows in draws for row in rows})
    if len(drawn) < len(train):
        train, draws = train.select(drawn), [(run, np.searchsorted(drawn, rows)) for run, rows in draws]
    groups = np.asarray(group_ids(train, group_column)) if group_column else None
    check_options(args, train, groups, fewest=min(len(rows) for _, rows in draws))
    train_y, test_y = targets(train), targets(test)

    pooled = set(args.probes) != {ATTENTIVE}
    inputs, seconds, last_seed = {}, 0.0, None  # embeddings, and tokens if the key is true
    for run, rows in draws:
        if args.random_init and run["seed"] != last_seed:
            inputs.clear()
        last_seed = run["seed"]
        of_rows = None if groups is None or len(set(groups[rows])) < 2 else groups[rows]
        for probe in args.probes:
            as_tokens = probe == ATTENTIVE
            if as_tokens not in inputs:
                start = time.perf_counter()
                inputs[as_tokens] = embed_both(args, train, test, run["seed"], cache, as_tokens)
                seconds += time.perf_counter() - start
            train_x, test_x = inputs[as_tokens]
            train_x = [train_x[row] for row in rows] if as_tokens else train_x[rows]
            options = {"seed": run["seed"], "groups": of_rows}
            if probe == "knn":
                options = {"k": args.k or min(MAX_NEIGHBORS, len(rows))}
            if as_tokens:
                options["device"] = args.device
            fit = attentive_probe if as_tokens else PROBES[probe]
            run[probe] = fit((train_x, train_y[rows]), (test_x, test_y), **options)
    runs, example = [run for run, _ in draws], inputs[not pooled][0][0]

    results = {
        "model": args.model_name_or_path if not args.random_init else f"random {args.model_name_or_path or args.size}",
        "encoder": args.encoder,
        "pooling": args.pooling if pooled else ATTENTIVE,
        "num_layers": args.num_layers or (1 if pooled else len(example)),
        "window_seconds": args.window_seconds,
        "bf16": args.bf16,
        "embedding_size": example.shape[-1],
        "train_clips": len(train),
        "shots": args.shots,
        "test_clips": len(test),
        "classes": len(label_names(train)),
        "group_column": group_column,
        "embedding_seconds": round(seconds, 1),
        "summary": summarize(args, runs),
        "runs": runs,
    }
    print_table(results)
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n")
    return results


def embed_both(
    args: argparse.Namespace,
    train: Dataset,
    test: Dataset,
    seed: int,
    cache: dict[tuple, np.ndarray],
    as_tokens: bool = False,
) -> tuple[Sequence[np.ndarray], Sequence[np.ndarray]]:
    """
    Embeddings `(clips, dim)` of both sets, or tokens `(layers, time_patches, dim)` of each clip; only files that are
    not in `cache` are read.
    """
    path = args.model_name_or_path
    feature_extractor = load_feature_extractor(path) if path else ASiTFeatureExtractor()
    if args.random_init:
        torch.manual_seed(seed)
        model = ASiTModel(load_config(path) if path else ASiTConfig.from_size(args.size))
    else:
        model = load_encoder(path, args.encoder)
    options = {name: getattr(args, name) for name in ("batch_size", "device", "window_seconds", "num_layers")}
    if not as_tokens:
        options |= {"pooling": args.pooling, "num_layers": args.num_layers or 1}

    def embed_set(dataset: Dataset) -> Sequence[np.ndarray]:
        names = [source_name(row["audio"]) for row in dataset.select_columns("audio")]
        if len(set(names)) < len(names):  # encoded bytes have no names
            names = [object() for _ in names]
        keys = [(seed if args.random_init else None, as_tokens, name) for name in names]
        new = [index for index, key in enumerate(keys) if key not in cache]
        if new:
            clips = LabelledClips(dataset.select(new), feature_extractor.sampling_rate, args.max_seconds)
            with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16):
                embedded = (embed_tokens if as_tokens else embed)(model, feature_extractor, clips, **options)
            cache.update(zip([keys[index] for index in new], embedded))
        rows = [cache[key] for key in keys]
        return rows if as_tokens else np.stack(rows)

    return embed_set(train), embed_set(test)


def draw_clips(args: argparse.Namespace, train: Dataset, seed: int) -> Iterator[tuple[dict[str, int], np.ndarray]]:
    """
    Every draw for one seed, as the beginning of its results and the rows of its training clips: all of them without
    `--shots`. The rows of a class with fewer clips than shots are all drawn.
    """
    if not args.shots:
        yield {"seed": seed}, np.arange(len(train))
        return
    y, names = targets(train), label_names(train)
    classes = [[label] if y.ndim == 1 else np.flatnonzero(label) for label in y]
    for shots in args.shots:
        sizes = np.bincount(np.concatenate(classes), minlength=len(names))
        if few := [f"{names[index]} ({sizes[index]})" for index in np.flatnonzero(sizes < shots)]:
            what = f"{len(few)} of {len(names)} classes have fewer than {shots} training clips"
            logger.warning_once(f"{what}, all of which are drawn: {', '.join(few[:8])}{', ...' * (len(few) > 8)}")
        for draw in range(args.draws):
            counts, rows = np.zeros(len(names), dtype=int), []
            for row in np.random.default_rng([seed, draw]).permutation(len(y)):
                if (counts[classes[row]] < shots).any():
                    rows.append(row)
                    counts[classes[row]] += 1
            yield {"seed": seed, "shots": shots, "draw": draw, "clips": len(rows)}, np.array(rows)


def summarize(args: argparse.Namespace, runs: list[dict]) -> dict:
    """The `summary` of each probe, by the number of shots if there are any."""

    def of(runs: list[dict]) -> dict:
        return {probe: summary([run[probe] for run in runs]) for probe in args.probes}

    if not args.shots:
        return of(runs)
    return {str(shots): of([run for run in runs if run["shots"] == shots]) for shots in args.shots}


def summary(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over runs of every metric."""
    no_metrics = ("weight_decay", "learning_rate", "layer_weights", "classes_without_positives")
    names = [name for name in runs[0] if name not in no_metrics and all(name in run for run in runs)]
    return {
        name: {"mean": float(np.mean([run[name] for run in runs])), "std": float(np.std([run[name] for run in runs]))}
        for name in names
    }


def print_table(results: dict) -> None:
    print(
        f"{results['model']} | {results['pooling']} x {results['num_layers']}, {results['embedding_size']} dimensions "
        f"| {results['train_clips']} -> {results['test_clips']} clips, {results['classes']} classes | "
        f"{len(results['runs'])} runs, embedded in {results['embedding_seconds']} s"
    )
    of_shots = results["summary"] if results["shots"] else {"": results["summary"]}
    for shots, of_probes in of_shots.items():
        for probe, metrics in of_probes.items():
            what = f"{probe:9} {shots:>3} per class" if shots else f"{probe:9}"
            for name, value in metrics.items():
                print(f"{what} {name:26} {value['mean']:8.4f} +- {value['std']:.4f}")
    if layers := [run[ATTENTIVE]["layer_weights"] for run in results["runs"] if ATTENTIVE in run]:
        weights = " ".join(f"{weight:.2f}" for weight in np.mean(layers, axis=0))
        print(f"{ATTENTIVE} layer weights, mean over runs: {weights}")


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("asit_hf").setLevel(logging.INFO)
    run_script(main)
