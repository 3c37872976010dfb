"""Shared by the scripts that train with a Trainer: recipes, resuming, console output and one-line errors."""

import argparse
import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import get_token
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from tqdm import tqdm
from transformers import HfArgumentParser, TrainerState, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as transformers_logging

from .time_budget import STATE_KEY

logger = logging.getLogger(__name__)


class OptionError(ValueError):
    """A command line or recipe that cannot be used."""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> None:  # without the usage, which lists every option of Trainer
        raise OptionError(message)


class _ConsoleHandler(logging.Handler):
    """Prints above a progress bar instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def parse_arguments(dataclass_types: tuple[type, ...], arguments: list[str] | None = None) -> tuple[Any, ...]:
    """
    Parses a command line into dataclasses. `--recipe FILE ...` (yaml or json, anywhere) supplies options; a later file
    overrides an earlier one, and the command line overrides both. `$NAME` in a recipe is an environment variable.

    Without an accelerator, `--use_cpu true` is implied: Trainer would otherwise refuse `--bf16` there.

    Raises:
        OptionError: an unknown option, a wrong value, or options that a dataclass refuses.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    recipe_parser = _Parser([], add_help=False, allow_abbrev=False)
    recipe_parser.add_argument("--recipe", metavar="FILE", nargs="+", action="extend", default=[])
    # no abbreviations: a misspelled option must not be taken for another one
    usage = "%(prog)s [--recipe FILE ...] [--OPTION VALUE ...]  (recipes are yaml or json files with options)"
    parser = _Parser(
        dataclass_types,
        allow_abbrev=False,
        usage=usage,
        description=sys.modules["__main__"].__doc__,
        formatter_class=_HelpFormatter,
    )
    _rewrite_help(parser, {name for one in dataclass_types for name in getattr(one, "without_effect", ())})
    trains = any(issubclass(one, TrainingArguments) for one in dataclass_types)
    implied = ["--use_cpu", "true"] if trains and not torch.accelerator.is_available() else []
    try:
        chosen, arguments = recipe_parser.parse_known_args(arguments)
        arguments = [one for path in chosen.recipe for one in recipe_arguments(path)] + arguments
        _check_names(arguments, parser)
        return parser.parse_args_into_dataclasses(implied + arguments)
    except ValueError as error:
        raise OptionError(str(error)) from error


def _rewrite_help(parser: _Parser, hidden: set[str]) -> None:
    """Hides options without effect, and says what transformers' help leaves open."""
    for action in parser._actions:
        if action.dest in hidden:
            action.help = argparse.SUPPRESS
        elif action.dest == "resume_from_checkpoint":
            action.help = "True: continue from the last checkpoint in --output_dir. Or the folder of a checkpoint."
        elif action.option_strings and action.option_strings[0].startswith("--no_"):
            action.help = f"Opposite of --{action.dest}."
        elif action.required:
            action.help = f"{action.help} Required."


def _check_names(arguments: list[str], parser: _Parser) -> None:
    """Raises a `ValueError` for an unknown option, before the parser misses the one that was meant."""
    known = ["--recipe", *parser._option_string_actions]
    for option in (one.partition("=")[0] for one in arguments):
        if option.startswith("--") and option not in known:
            close = get_close_matches(option, [name for name in known if "-" not in name[2:]], n=1)
            raise ValueError(f"unknown option {option}" + (f", did you mean {close[0]}?" if close else ""))


def refuse_without_effect(options: Any, names: Sequence[str], condition: str) -> None:
    """Raises a `ValueError` if a named field is not at its default, when `condition` ("without folds") disables it."""
    changed = [one.name for one in fields(options) if one.name in names and getattr(options, one.name) != one.default]
    if changed:
        raise ValueError(f"{' and '.join(changed)} cannot be used {condition}")


def check_inherited(
    args: TrainingArguments, without_effect: Mapping[str, str], allowed: Mapping[str, tuple[Any, ...]]
) -> None:
    """
    Raises a `ValueError` for options of `TrainingArguments` that this training cannot follow, before anything is read.

    Args:
        args: before transformers' own `__post_init__`, which changes some of them.
        without_effect: names of options that must keep transformers' default, separated by spaces, by the reason.
        allowed: the values of options of which only some work.
    """
    defaults = {
        one.name: one.default if one.default_factory is MISSING else one.default_factory()
        for one in fields(TrainingArguments)
    }
    for reason, names in without_effect.items():
        # the parser gives an empty list for an empty default
        changed = [name for name in names.split() if (getattr(args, name) or None) != (defaults[name] or None)]
        if changed:
            raise ValueError(f"{' and '.join(changed)} cannot be used here: {reason}")
    for name, values in allowed.items():
        if (value := getattr(args, name)) not in values:
            raise ValueError(f"expected {name} {' or '.join(map(str, values))} here, got {value}")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(args, name)}")
    if not args.dataloader_num_workers:
        names = ["dataloader_persistent_workers", "dataloader_multiprocessing_context"]
        refuse_without_effect(args, names, "without dataloader_num_workers")


def start_run(args: TrainingArguments) -> None:
    """Sets the seed, and logs the package's decisions; transformers logs warnings only, unless `--log_level info`."""
    logging.basicConfig(format="%(message)s", handlers=[_ConsoleHandler()])
    if not are_progress_bars_disabled():
        transformers_logging.disable_progress_bar()  # of saving and loading weights, but of downloads too
        enable_progress_bars()
    for name in ("asit_hf", "examples", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO if args.should_log else logging.WARNING)
    set_seed(args.seed)
    if args.push_to_hub and not args.hub_token and get_token() is None:
        raise OptionError("push_to_hub needs a Hub token: run `hf auth login`, or set HF_TOKEN or --hub_token")


def run_script(main: Callable[[], Any]) -> None:
    """
    Runs the `main` of a script. An error that its user can mend is printed in one line instead of a traceback; the
    exit code is 2 for a wrong option and 1 for anything else, such as a file that is missing or cannot be read, or an
    extra that is not installed.
    """
    try:
        main()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if not (isinstance(error, OSError) or _is_deliberate(error)):
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2 if isinstance(error, OptionError) else 1)


def _is_deliberate(error: Exception) -> bool:
    """Whether an error is of the package's own types, or was raised by its code or by a script."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    modules = (type(error).__module__, frame.f_globals.get("__name__", ""))
    return any(module.split(".")[0] in ("asit_hf", "examples", "__main__") for module in modules)


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """The checkpoint of `resume_from_checkpoint`: a folder, or with `True` the last one of `output_dir`, if any."""
    checkpoint = args.resume_from_checkpoint
    if checkpoint in (True, "True", "true"):
        checkpoint = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
        if checkpoint is None:
            logger.warning(f"no checkpoint in {args.output_dir} to resume from: starting from the beginning")
    if checkpoint is not None:
        logger.info(f"resuming from {checkpoint}")
    return checkpoint


def finished_run(args: TrainingArguments, num_clips: int | None = None) -> TrainerState | None:
    """
    The state of the run in `output_dir` if `resume_from_checkpoint True` has nothing left to do, or `None`. Without
    `num_clips`, the number of training clips, a run by epochs whose data have grown counts as finished.
    """
    path = Path(args.output_dir) / TRAINER_STATE_NAME  # written after training, unlike those of checkpoints
    if args.resume_from_checkpoint not in (True, "True", "true") or not path.is_file():
        return None
    state = TrainerState.load_from_json(str(path))
    if (minutes := getattr(args, "max_minutes", None)) is not None:
        finished = state.stateful_callbacks.get(STATE_KEY, {}).get("minutes") == minutes
    elif args.max_steps > 0:
        finished = state.max_steps == args.max_steps
    else:
        finished = state.num_train_epochs == math.ceil(args.num_train_epochs) and state.epoch >= args.num_train_epochs
        if num_clips is not None:
            batches = math.ceil(num_clips / (args.train_batch_size * args.world_size))
            steps = math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))
            finished = finished and state.max_steps == steps
    return state if finished and state.global_step >= state.max_steps else None


def recipe_arguments(path: str | os.PathLike) -> list[str]:
    """The options of a recipe file as command-line arguments, see `option_arguments`."""
    text = Path(path).read_text()
    try:
        options = json.loads(text) if Path(path).suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not valid yaml or json: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"expected options as `name: value` in {path}, got {type(options).__name__}")
    return option_arguments(options)


def option_arguments(options: dict[str, Any]) -> list[str]:
    """Options as command-line arguments: a list gives several values, a dictionary its JSON, `None` nothing."""
    arguments: list[str] = []
    for name, value in options.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            arguments += [f"--{name}", *(_as_argument(one) for one in values)]
    return arguments


def _as_argument(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, dict) else str(value)
    expanded = os.path.expandvars(text)
    if "$" in expanded:
        raise ValueError(f"the recipe uses an environment variable that is not set: {text}")
    return expanded
