"""Checkpoints that are whole or absent, whatever stops the run."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..utils.files import replace_folder

logger = logging.get_logger(__name__)

# Where a checkpoint is written before it gets its name; no search for checkpoints matches it.
UNFINISHED = "unfinished"


def publish(staged: Path, final: Path) -> None:
    """Gives a folder that is whole its name; one of that name from before is replaced."""
    replace_folder(staged, final)
    shutil.rmtree(staged.parent)


def describe_failed_save(error: Exception, run_dir: Path, step: int) -> str:
    """What a user needs to know when a checkpoint could not be written."""
    free = shutil.disk_usage(run_dir).free / 2**20
    last = get_last_checkpoint(str(run_dir))
    kept = f"the last whole checkpoint is {last}: go on from it" if last else "there is no earlier checkpoint"
    return f"the checkpoint of step {step} could not be saved in {run_dir} ({free:.0f} MiB free): {error}; {kept}"


@contextmanager
def on_termination(ask_to_stop: Callable[[], None]) -> Iterator[None]:
    """Calls `ask_to_stop` on SIGTERM instead of dying, in this process alone: loader workers still die of it."""
    process = os.getpid()

    def handle(number: int, frame: object) -> None:
        if os.getpid() == process:
            ask_to_stop()
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    try:
        previous = signal.signal(signal.SIGTERM, handle)
    except ValueError:  # not the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
