"""Command lines with recipes: files of options that a run can be repeated from."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

logger = logging.get_logger(__name__)


def parse_arguments(dataclass_types: tuple[type, ...], arguments: list[str] | None = None) -> tuple[Any, ...]:
    """
    Parses a command line into dataclasses. `--recipe FILE ...` (yaml or json, anywhere) supplies options; a later file
    overrides an earlier one, and the command line both. `$NAME` in a recipe is taken from the environment.

    Where there is no accelerator, `--use_cpu true` is understood: without it Trainer refuses `--bf16` there.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    recipe_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    recipe_parser.add_argument("--recipe", metavar="FILE", nargs="+", action="extend", default=[])
    chosen, arguments = recipe_parser.parse_known_args(arguments)
    recipe = [argument for path in chosen.recipe for argument in recipe_arguments(path)]
    # no abbreviations: a misspelt option of a recipe must not pass for another one
    parser = HfArgumentParser(
        dataclass_types, allow_abbrev=False, epilog="--recipe FILE ... reads options from yaml or json files."
    )
    trains = any(issubclass(one, TrainingArguments) for one in dataclass_types)
    implied = ["--use_cpu", "true"] if trains and not torch.accelerator.is_available() else []
    return parser.parse_args_into_dataclasses(implied + recipe + arguments)


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """What `resume_from_checkpoint` asks for: a folder, or with `True` the last checkpoint of `output_dir`, if any."""
    if args.resume_from_checkpoint not in (True, "True", "true"):
        return args.resume_from_checkpoint
    checkpoint = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
    if checkpoint is None:
        logger.warning(f"no checkpoint in {args.output_dir} to resume from: the run starts at its beginning")
    return checkpoint


def recipe_arguments(path: str | os.PathLike) -> list[str]:
    """The options of a recipe file as command-line arguments, see `option_arguments`."""
    text = Path(path).read_text()
    if Path(path).suffix == ".json":
        options = json.loads(text)
    else:
        import yaml

        options = yaml.safe_load(text)
    if not isinstance(options, dict):
        raise ValueError(f"{path} must hold options as `name: value`, got {type(options).__name__}")
    return option_arguments(options)


def option_arguments(options: dict[str, Any]) -> list[str]:
    """Options as command-line arguments: a list gives several values, a dictionary its JSON, `None` nothing."""
    arguments: list[str] = []
    for name, value in options.items():
        if value is None:  # as if it were not there
            continue
        values = value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *(_as_argument(one) for one in values)]
    return arguments


def _as_argument(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, dict) else str(value)
    expanded = os.path.expandvars(text)
    if "$" in expanded:
        raise ValueError(f"the recipe names an environment variable that is not set: {text}")
    return expanded
