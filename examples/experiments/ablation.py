"""
Pretrains every row of an ablation with several seeds, probes the encoders, and writes a table and a plot.

    python -m examples.experiments.ablation --recipe examples/recipes/esc50-asc-ablations.yaml --output_dir runs

A row is a recipe of `run_pretraining.py` with the options that differ from `--base`, or `random`: the same encoder
with random weights. A probe is a set of options of `run_linear_probe.py`. Repeat the command to resume: finished runs
are not repeated, and pretraining resumes from its last checkpoint.

The output folder holds `table.md`, `table.csv`, `results.json` and `plot.png`, rewritten after every run, and
`ROW/seed-N` with each model. `std` is the standard deviation over seeds (n - 1), `seconds` the time of pretraining
on this machine.
"""

import csv
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from asit_hf.loading import ENCODERS
from asit_hf.plotting import plot_scores
from asit_hf.utils.arguments import option_arguments, parse_arguments, recipe_arguments
from asit_hf.utils.files import whole_file
from examples import run_linear_probe, run_pretraining

logger = logging.get_logger(__name__)

RANDOM = "random"
PRETRAINING_GROUPS = (
    run_pretraining.ModelArguments,
    run_pretraining.DataArguments,
    run_pretraining.CardArguments,
    run_pretraining.ASiTPreTrainingArguments,
)


@dataclass
class AblationArguments:
    base: list[str] = field(metadata={"help": "Recipes of run_pretraining.py that all rows share."})
    rows: list[str] = field(
        metadata={"help": "One recipe per row with the options it changes, or 'random' for random weights."}
    )
    probes: list[str] = field(
        metadata={"help": 'JSON: {"name": "ESC-50", "train": "esc50.csv", ...}, options of run_linear_probe.py.'}
    )
    output_dir: str = field(metadata={"help": "Output folder of the runs and the table."})
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of pretraining and probes. Default: 0 1 2."}
    )
    encoder: str = field(default="teacher", metadata={"help": "Encoder to probe: teacher or student."})

    def __post_init__(self):
        if self.encoder not in ENCODERS:
            raise ValueError(f"expected encoder to be one of {', '.join(ENCODERS)}, got {self.encoder!r}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"expected distinct seeds, got {self.seeds}")
        names = [row_name(row) for row in self.rows]
        if len(set(names)) < len(names):
            raise ValueError(f"expected rows with distinct names, got {', '.join(names)}")
        read_probes(self.probes)


def row_name(row: str) -> str:
    return Path(row).stem.removeprefix("ablation-")


def read_probes(probes: list[str]) -> dict[str, list[str]]:
    """The command line of every probe, by name."""
    commands = {}
    for text in probes:
        options = json.loads(text)
        name = options.pop("name", None)
        if name is None or name in commands:
            raise ValueError(f"expected a distinct name for every probe, got {text}")
        commands[name] = option_arguments(options)
    return commands


def run_cell(args: AblationArguments, row: str, seed: int) -> dict[str, Any]:
    """Pretrains and probes one row with one seed, or reads the result of an earlier run."""
    folder = Path(args.output_dir) / row_name(row) / f"seed-{seed}"
    options = pretraining_options(args, row, seed)
    check_settings(folder, {"options": options, "probes": read_probes(args.probes), "encoder": args.encoder})
    finished = folder / "result.json"
    if finished.is_file():
        return json.loads(finished.read_text())

    logger.warning("%s, seed %d", row_name(row), seed)
    options += ["--output_dir", str(folder / "pretraining")]
    pretrained = folder / "pretrained.json"
    if not pretrained.is_file():
        write_json(pretrained, make_untrained(options) if row == RANDOM else pretrain(options))
    result = {"row": row_name(row), "seed": seed, **json.loads(pretrained.read_text()), "probes": {}}
    for name, command in probe_commands(args, folder, seed).items():
        (run,) = run_linear_probe.main(command)["runs"]
        result["probes"][name] = {method: run[method] for method in run_linear_probe.ALL_PROBES if method in run}
    write_json(finished, result)
    return result


def pretraining_options(args: AblationArguments, row: str, seed: int) -> list[str]:
    recipes = args.base if row == RANDOM else [*args.base, row]
    return [argument for path in recipes for argument in recipe_arguments(path)] + ["--seed", str(seed)]


def probe_commands(args: AblationArguments, folder: Path, seed: int) -> dict[str, list[str]]:
    model = ["--model_name_or_path", str(folder / "pretraining"), "--encoder", args.encoder, "--seeds", str(seed)]
    return {name: [*command, *model] for name, command in read_probes(args.probes).items()}


def check_options(args: AblationArguments) -> None:
    """Raises for a missing recipe or a wrong option in any row before hours of pretraining."""
    for row in args.rows:
        folder = Path(args.output_dir) / row_name(row)
        options = pretraining_options(args, row, args.seeds[0])
        parse_arguments(PRETRAINING_GROUPS, [*options, "--output_dir", str(folder)])
    for command in probe_commands(args, Path(args.output_dir), args.seeds[0]).values():
        if run_linear_probe.parse_args(command).shots:
            raise ValueError("a probe of an ablation is one fit per seed: expected no --shots")


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raises if `folder` holds results of other settings."""
    path = folder / "settings.json"
    if not path.is_file():
        write_json(path, settings)
    elif json.loads(path.read_text()) != settings:
        raise ValueError(f"{folder} was run with other settings ({path}): remove it, or choose another output_dir")


def pretrain(options: list[str]) -> dict[str, float | None]:
    """`steps` and their `seconds`; for a resumed run, extrapolated from the pace after resuming."""
    output_dir = options[options.index("--output_dir") + 1]
    checkpoint = get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
    first_step = int(checkpoint.rpartition("-")[2]) if checkpoint else 0
    state = run_pretraining.main([*options, "--resume_from_checkpoint", "True"]).state
    steps = state.global_step
    runtime = next((entry["train_runtime"] for entry in state.log_history[::-1] if "train_runtime" in entry), None)
    measured = runtime is not None and steps > first_step
    return {"steps": steps, "seconds": runtime / (steps - first_step) * steps if measured else None}


def make_untrained(options: list[str]) -> dict[str, float]:
    """Saves the initial model of a run with these options."""
    model_args, data_args, _, args = parse_arguments(PRETRAINING_GROUPS, options)
    set_seed(args.seed)
    model = run_pretraining.build_model(model_args, data_args, args)
    model.save_pretrained(args.output_dir)
    num_mel_bins = model.config.num_mel_bins
    run_pretraining.build_feature_extractor(model_args, data_args, num_mel_bins).save_pretrained(args.output_dir)
    return {"steps": 0, "seconds": 0.0}


def summarize(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for every row, task and probe: mean, standard deviation and cost over the finished seeds."""
    lines = []
    for row in dict.fromkeys(result["row"] for result in results):
        of_row = [result for result in results if result["row"] == row]
        seconds = [result["seconds"] for result in of_row if result["seconds"] is not None]
        for task, probes in of_row[0]["probes"].items():
            for probe in probes:
                metric = "accuracy" if "accuracy" in probes[probe] else "mAP"
                values = [result["probes"][task][probe][metric] for result in of_row]
                lines.append(
                    {
                        "row": row,
                        "task": task,
                        "probe": probe,
                        "metric": metric,
                        "mean": float(np.mean(values)),
                        "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                        "seeds": len(values),
                        "steps": max(result["steps"] for result in of_row),
                        "seconds": float(np.mean(seconds)) if seconds else None,
                    }
                )
    return lines


def markdown(lines: list[dict[str, Any]]) -> str:
    """The table with scores in %."""
    columns = list(dict.fromkeys((line["task"], line["probe"], line["metric"]) for line in lines))
    scored = [f"{task}, {probe} {metric}" for task, probe, metric in columns]
    header = ["row", *scored, "seeds", "steps", "seconds"]
    table = [header, ["---"] * len(header)]
    for row in dict.fromkeys(line["row"] for line in lines):
        of_row = {(line["task"], line["probe"], line["metric"]): line for line in lines if line["row"] == row}
        first = next(iter(of_row.values()))
        seconds = "-" if first["seconds"] is None else f"{first['seconds']:.0f}"
        scores = [score(of_row[column]) for column in columns]
        table.append([row, *scores, str(first["seeds"]), str(first["steps"]), seconds])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def score(line: dict[str, Any]) -> str:
    deviation = "" if line["std"] is None else f" ± {100 * line['std']:.1f}"
    return f"{100 * line['mean']:.1f}{deviation}"


def write_tables(folder: Path, results: list[dict[str, Any]]) -> str:
    lines = summarize(results)
    write_json(folder / "results.json", {"summary": lines, "runs": results})
    with open(folder / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    table = markdown(lines)
    (folder / "table.md").write_text(table)
    panels: dict[str, dict[str, list[float]]] = {}
    for line in lines:
        values = [
            100 * result["probes"][line["task"]][line["probe"]][line["metric"]]
            for result in results
            if result["row"] == line["row"]
        ]
        panels.setdefault(f"{line['task']}, {line['probe']} {line['metric']}", {})[line["row"]] = values
    plot_scores(panels).savefig(folder / "plot.png", dpi=110)
    return table


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    (args,) = parse_arguments((AblationArguments,), arguments)
    check_options(args)
    results: list[dict[str, Any]] = []
    order = [row_name(row) for row in args.rows]
    for seed in args.seeds:  # so that the first seed already gives a full table
        for row in args.rows:
            results.append(run_cell(args, row, seed))
            results.sort(key=lambda result: (order.index(result["row"]), result["seed"]))
            table = write_tables(Path(args.output_dir), results)
    print(table, end="")
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
