"""The record of a training run, `run.json`."""

import json
import math
import os
import platform
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..utils.names import path_text

RUN_NAME = "run.json"


def record_run(
    folder: str | os.PathLike,
    command: Sequence[str],
    recipe: Mapping[str, Any],
    seconds: float,
    clips: int | None = None,
    hours: float | None = None,
    sampling_rate: int | None = None,
    results: Iterable[tuple[str, str, float]] = (),
) -> None:
    """
    Writes `run.json`, the facts of a training run for its model card. Absolute paths are cut to their last part, and
    `--hub_token` is dropped.

    Args:
        folder: the saved model's folder.
        command: the script and its arguments.
        recipe: hyperparameters by name.
        seconds: duration of the training.
        clips, hours, sampling_rate: size and sampling rate in Hz of the training data.
        results: data set, metric and value, measured by the command.
    """
    written = _written(command)
    parts = [f"{clips} clips" if clips else "a stream of clips", f"{hours:.2f} hours" if hours else ""]
    parts += [f"at {sampling_rate} Hz" if sampling_rate else ""]
    facts = {
        "training_data": ", ".join(filter(None, parts)) + ".",
        "recipe": {
            **recipe,
            "duration": f"{seconds / 60:.1f} minutes",
            "hardware": _hardware(),
            "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers")),
            "command": written,
        },
        "results": _rows(results, written),
    }
    _write(folder, facts)


def add_results(
    folder: str | os.PathLike,
    source: str | os.PathLike,
    command: Sequence[str],
    results: Iterable[tuple[str, str, float]],
    replaced: Sequence[str] = (),
) -> None:
    """
    Writes the `run.json` of a model that was changed without training: that of `source`, the folder or Hub name of
    what it was, without the results of the `replaced` metrics and with `results` of `command`, as in [`record_run`].
    """
    run = read_run(source)
    kept = [row for row in run.get("results") or () if row["metric"] not in replaced]
    _write(folder, {**run, "results": [*kept, *_rows(results, _written(command))]})


def _written(command: Sequence[str]) -> str:
    return f"`{shlex.join(['python', *(path_text(_without_folders(one)) for one in _without_token(command))])}`"


def _rows(results: Iterable[tuple[str, str, float]], command: str) -> list[dict[str, Any]]:
    measured = {"task": "audio-classification", "command": command}
    return [
        {"dataset": path_text(data), "metric": metric, "value": value if is_number(value) else str(value), **measured}
        for data, metric, value in results
    ]


def _write(folder: str | os.PathLike, facts: Mapping[str, Any]) -> None:
    Path(folder, RUN_NAME).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def read_run(folder: str | os.PathLike) -> dict[str, Any]:
    """What [`record_run`] wrote into a folder; empty if there is no `run.json` or an empty one."""
    path = Path(folder, RUN_NAME)
    text = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    return json.loads(text or "{}") or {}


def _without_token(command: Sequence[str]) -> list[str]:
    """Drops `--hub_token`, which may be abbreviated, and its value."""
    kept, is_value = [], False
    for argument in command:
        token = None if is_value else re.fullmatch(r"--hub[_-]t\w*(=.*)?", argument)
        if not is_value and token is None:
            kept.append(argument)
        is_value = token is not None and token[1] is None
    return kept


def _without_folders(value: Any) -> Any:
    """Cuts absolute paths to their last part, also after `name=` or `::` and inside JSON."""
    if isinstance(value, dict):
        return {key: _without_folders(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_folders(one) for one in value]
    if not isinstance(value, str):
        return value
    if value.startswith(("{", "[")):
        with suppress(json.JSONDecodeError):
            return json.dumps(_without_folders(json.loads(value)), ensure_ascii=False)
    parts = [value] if os.path.isabs(value) else re.split(r"(=|::)", value)
    return "".join(Path(part).name if os.path.isabs(part) else part for part in parts)


def _hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} cores, {platform.machine()}"


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
