r"""
Evaluates an encoder on a list of labelled tasks (probes, finetuning and baselines) and writes one table.

    python -m examples.experiments.tasks --tasks examples/recipes/tasks-real-audio.yaml \
        --model_name_or_path CHECKPOINT --output_dir runs/tasks

The yaml file names the tasks, their data and splits, and `parts` of the test clips that are also scored separately.
Each split is a run of run_linear_probe.py (`probe`, `probe-attentive`), of run_audio_classification.py (`finetuned`),
each also with random weights (`probe-random` and so on), of ast_from_scratch.py (`ast`) or of mfcc.py (`mfcc`).
`--baseline NAME=PATH` adds the rows `probe-NAME`, `probe-attentive-NAME` and `finetuned-NAME` of another encoder.
Results are cached in `--output_dir` and not computed again; `tasks.md` and `tasks.json` hold the table: mean over the
splits ± std over seeds, and the mean of each split.
"""

import argparse
import csv
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from transformers.utils import logging

from asit_hf.data.audio import source_name
from asit_hf.data.labelled import DatasetArguments
from asit_hf.evaluation.embeddings import POOLINGS
from asit_hf.utils.arguments import run_script
from examples import run_audio_classification, run_linear_probe
from examples.experiments import ast_from_scratch, mfcc
from examples.experiments.ablation import check_settings

METHODS = ("mfcc", "probe-random", "probe", "probe-attentive-random", "probe-attentive")
METHODS += ("ast", "finetuned-random", "finetuned")
OF_ENCODERS = ("probe", "probe-attentive", "finetuned")


def splits(task: dict[str, Any]) -> Iterator[tuple[str, list[str], list[str]]]:
    """(name, filters of the training clips, filters of the test clips) for every split of a task."""
    if "folds" not in task:
        yield "test", as_list(task.get("train_filter")), as_list(task.get("test_filter"))
        return
    column, values = task["folds"]["column"], [str(value) for value in task["folds"]["values"]]
    for value in values:
        others = ",".join(other for other in values if other != value)
        yield f"{column}-{value}", [f"{column}={others}"], [f"{column}={value}"]


def as_list(value: Any) -> list[str]:
    return [] if value is None else value if isinstance(value, list) else [value]


def expand(value: Any) -> Any:
    """A yaml value with environment variables filled in."""
    if isinstance(value, dict):
        return {name: expand(one) for name, one in value.items()}
    if not isinstance(value, str):
        return value
    text = os.path.expandvars(value)
    if "$" in text:
        raise ValueError(f"expected every environment variable of the tasks to be set, got {value}")
    return text


def manifest_of(name: str, task: dict[str, Any], folder: Path) -> str:
    """Writes the manifest of a task whose labels are part of the file names, as matched by `pattern`."""
    pattern, root = re.compile(task["pattern"]), Path(task["folder"])
    files = sorted(path for path in root.rglob("*") if path.is_file())
    rows = [(path, pattern.fullmatch(path.name)) for path in files]
    if not rows or not all(match for _, match in rows):
        odd = next((str(path) for path, match in rows if not match), "no file")
        raise ValueError(f"task {name}: expected files named as {task['pattern']} in {root}, got {odd}")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}.csv"
    with target.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", *pattern.groupindex])
        writer.writerows([str(path), *(match[group] for group in pattern.groupindex)] for path, match in rows)
    return str(target)


def run(
    method: str,
    task: dict[str, Any],
    train: list[str],
    test: list[str],
    args: argparse.Namespace,
    out: Path,
    cache: dict[tuple, np.ndarray],
) -> dict[str, list[float]]:
    """The accuracies of one split, one per seed. `cache` keeps embeddings for the task's other splits."""
    shared = [text for name, value in reading_of(task).items() for text in (f"--{name}", str(value))]
    test_data = task.get("test") or task["train"]
    if method == "mfcc" or method.startswith("probe"):
        options = [*shared, "--train", task["train"], "--test", test_data, "--seeds", *map(str, args.seeds)]
        options += [*(["--train_filter", *train] if train else []), *(["--test_filter", *test] if test else [])]
        if method == "mfcc":
            return {name: [result["mean"]] for name, result in mfcc.main(options).items()}
        options += ["--model_name_or_path", args.model_name_or_path, "--batch_size", "32"]
        options += ["--num_layers", str(args.num_layers)] if args.num_layers is not None else []
        options += ["--window_seconds", str(args.window_seconds)] if args.window_seconds is not None else []
        options += ["--bf16"] if args.bf16 else []
        options += ["--random_init"] if method.endswith("-random") else []
        probes = ["attentive"] if method.startswith("probe-attentive") else args.probes
        options += [] if probes == ["attentive"] else ["--pooling", args.probe_pooling or args.pooling]
        results = run_linear_probe.main([*options, "--probes", *probes], cache)
        return {probe: [seed[probe]["accuracy"] for seed in results["runs"]] for probe in probes}
    options = [*shared, "--model_name_or_path", args.model_name_or_path, "--output_dir", str(out / "run")]
    options += ["--train_data", task["train"], "--eval_data", test_data, "--seed", str(args.seeds[0])]
    options += [*(["--train_filter", *train] if train else []), *(["--eval_filter", *test] if test else [])]
    settings = {**task["finetuning"], **(task.get("ast", {}) if method == "ast" else {})}
    options += [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    options += ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
    options += ["--report_to", "none", "--disable_tqdm", "true", "--logging_steps", "50"]
    if method == "ast":
        return {"accuracy": [ast_from_scratch.main(options)["eval_accuracy"]]}
    options += ["--pooling_mode", args.pooling, *(["--random_init"] if method == "finetuned-random" else [])]
    return {"accuracy": [run_audio_classification.main(options)["eval_accuracy"]]}


def reading_of(task: dict[str, Any]) -> dict[str, Any]:
    return {name: task[name] for name in ("audio_column", "label_column", "label_separator", "root") if name in task}


def run_part(
    method: str,
    task: dict[str, Any],
    train: list[str],
    test: list[str],
    args: argparse.Namespace,
    out: Path,
    cache: dict[tuple, np.ndarray],
) -> dict[str, list[float]]:
    """
    As `run`, for part of the test clips that have been scored. A probe is fitted again, with the same result; the
    predictions of a trained classifier are read.
    """
    if method == "mfcc" or method.startswith("probe"):
        return run(method, task, train, test, args, out, cache)
    rows = DatasetArguments(**reading_of(task)).load_audio(task.get("test") or task["train"], test)
    files = {source_name(row["audio"]) for row in rows.select_columns("audio")}
    with (out / "run" / "predictions.csv").open(newline="") as file:
        right = [row["label"] == row["prediction"] for row in csv.DictReader(file) if row["file"] in files]
    return {"accuracy": [float(np.mean(right))]}


def cached(folder: Path, settings: dict[str, Any], compute: Callable, *arguments: Any) -> dict[str, list[float]]:
    """What `compute(*arguments)` returns, kept in `folder`."""
    check_settings(folder, settings)
    path = folder / "result.json"
    if not path.is_file():
        path.write_text(json.dumps(compute(*arguments)) + "\n")
    return json.loads(path.read_text())


def settings_of(method: str, task: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The settings that a method's results depend on."""
    if method == "mfcc":
        names = ["seeds"]
    elif method.startswith("probe-attentive"):
        names = ["model_name_or_path", "num_layers", "window_seconds", "seeds"]
    elif method.startswith("probe"):
        names = ["model_name_or_path", "pooling", "probe_pooling", "num_layers", "window_seconds", "probes", "seeds"]
    else:
        names = ["model_name_or_path", "pooling"]
    settings = {name: getattr(args, name) for name in names}
    if method in ("probe", "probe-random"):
        settings["num_layers"] = args.num_layers or 1
    if method.startswith("probe") and args.bf16:
        settings["bf16"] = True
    task = {name: value for name, value in task.items() if name != "parts"}  # scored after the fact
    return {"task": task, **settings, "seed": args.seeds[0]}


def summarize(
    task: str, method: str, results: dict[str, dict[str, list[float]]], score: str | None = None
) -> dict[str, Any]:
    """
    One of a method's scores, the best by default: mean and std over seeds of the mean over splits, and the mean over
    seeds of every split.
    """
    rows = []
    for name in next(iter(results.values())) if score is None else [score]:
        seeds = np.mean([result[name] for result in results.values()], axis=0)
        by_split = {split: float(np.mean(result[name])) for split, result in results.items()}
        row = {"mean": float(np.mean(seeds)), "std": float(np.std(seeds)), "seeds": len(seeds), "score": name}
        rows.append({**row, "by_split": by_split})
    return {"task": task, "method": method, "splits": len(results), **max(rows, key=lambda row: row["mean"])}


def write_table(rows: list[dict[str, Any]], folder: Path) -> str:
    """A line per method and a column per task, both in the order in which they first appear."""
    cells = {(row["task"], row["method"]): row for row in rows}
    tasks = {row["task"]: row["by_split"] for row in rows}
    titles = [f"{task} ({', '.join(splits)})" if len(splits) > 1 else task for task, splits in tasks.items()]
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(tasks) + 1) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        line = [_cell(cells.get((task, method))) for task in tasks]
        lines.append(f"| {method} | " + " | ".join(line) + " |")
    table = "\n".join(lines) + "\n"
    (folder / "tasks.md").write_text(table)
    (folder / "tasks.json").write_text(json.dumps(rows, indent=2) + "\n")
    return table


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    std = f" ± {100 * row['std']:.1f}" if row["seeds"] > 1 else ""
    splits = ", ".join(f"{100 * mean:.1f}" for mean in row["by_split"].values())
    return f"{100 * row['mean']:.1f}{std}" + (f" ({splits})" if row["splits"] > 1 else "")


def table_rows(args: argparse.Namespace) -> Iterator[tuple[str, str, argparse.Namespace]]:
    """(method, label, arguments) of every row of the table: other encoders before the pretrained one."""
    for method in args.methods:
        for name, path in args.baseline.items() if method in OF_ENCODERS else ():
            yield method, f"{method}-{name}", argparse.Namespace(**{**vars(args), "model_name_or_path": path})
        yield method, method, args


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", required=True, help="yaml file of tasks")
    parser.add_argument("--model_name_or_path", required=True, help="encoder or pretraining checkpoint")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the results and the table")
    parser.add_argument("--only", nargs="+", metavar="TASK", help="tasks to run (default: all)")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="methods to run (default: all)"
    )
    parser.add_argument("--pooling", default="cls_mean", help="pooling of probe and classifier (default: cls_mean)")
    parser.add_argument("--probe_pooling", choices=POOLINGS, help="pooling of the probe (default: --pooling)")
    parser.add_argument(
        "--baseline", nargs="+", default=[], metavar="NAME=PATH", help="further encoders, for rows of their own"
    )
    parser.add_argument(
        "--num_layers",
        type=int,
        help="number of last layers to concatenate (default: 1) or, by probe-attentive, to average (default: all)",
    )
    parser.add_argument("--window_seconds", type=float, help="window length of the probe for longer clips")
    parser.add_argument("--bf16", action="store_true", help="compute the probed encoders in bf16")
    parser.add_argument(
        "--probes",
        nargs="+",
        choices=("linear", "ridge"),
        default=["linear"],
        help="probes to fit; the table has the better one (default: linear)",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the probes; finetuning uses the first"
    )
    args = parser.parse_args(arguments)
    args.baseline = dict(one.partition("=")[::2] for one in args.baseline)
    labels = {f"{method}-{name}" for method in OF_ENCODERS for name in args.baseline}
    if not all(name and path for name, path in args.baseline.items()) or labels & set(METHODS):
        parser.error("expected --baseline NAME=PATH, with a name other than random and attentive")
    return args


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse_args(arguments)
    logging.set_verbosity_warning()
    tasks = expand(yaml.safe_load(Path(args.tasks).read_text()))
    unknown = set(args.only or ()) - set(tasks)
    if unknown:
        raise ValueError(f"expected tasks of {args.tasks} ({', '.join(tasks)}), got {', '.join(sorted(unknown))}")
    chosen, rows = args.only or list(tasks), []
    for method, label, args_of_row in table_rows(args):
        for name in chosen:
            task, results, cache = dict(tasks[name]), {}, {}
            parts = {part: {} for part in task.get("parts", ())}
            if "pattern" in task:
                task["train"] = manifest_of(name, task, args.output_dir)
            for split, train, test in splits(task):
                out = args.output_dir / name / split / label
                settings, rest = settings_of(method, task, args_of_row), (args_of_row, out, cache)
                results[split] = cached(out, settings, run, method, task, train, test, *rest)
                for part, condition in task.get("parts", {}).items():
                    of_part, filters = out / part.replace(" ", "-"), [*test, *as_list(condition)]
                    parts[part][split] = cached(
                        of_part, {"test": filters}, run_part, method, task, train, filters, *rest
                    )
            rows.append(summarize(name, label, results))
            score = rows[-1]["score"]
            rows += [summarize(f"{name}, {part}", label, of_part, score) for part, of_part in parts.items()]
            print(write_table(rows, args.output_dir), flush=True)
    return rows


if __name__ == "__main__":
    run_script(main)
