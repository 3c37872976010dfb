"""Checkpoints that are complete or absent, also if the run is killed."""

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

from ..utils.files import replace_folder

# Where a checkpoint is written before it gets its name; no search for checkpoints matches this one.
UNFINISHED = "unfinished"


class CompleteCheckpointsMixin:
    """
    For a Trainer: writes a checkpoint into the folder `unfinished` and renames it when it is complete, so that a
    killed run leaves no partial checkpoint.
    """

    _staging: Path | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        shutil.rmtree(Path(self.args.output_dir) / UNFINISHED, ignore_errors=True)  # left by a killed run
        return super().train(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step, run_dir = self.state.global_step, Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{step}"
        push, self.args.push_to_hub = self.args.push_to_hub, False  # pushed below, from its final folder
        self._staging = run_dir / UNFINISHED
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # every process has written its random state
            if self.args.should_save:
                replace_folder(self._staging / name, run_dir / name)
                shutil.rmtree(self._staging)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(self._staging, ignore_errors=True)
            raise OSError(_describe_failed_save(error, run_dir, step)) from error
        finally:
            self._staging, self.args.push_to_hub = None, push
        if push:
            self._push_from_checkpoint(str(run_dir / name))
        if self.args.should_save:
            rotate_checkpoints(str(run_dir), self.args.save_total_limit, self.state.best_model_checkpoint)


def _describe_failed_save(error: Exception, run_dir: Path, step: int) -> str:
    free = shutil.disk_usage(run_dir).free / 2**20
    last = get_last_checkpoint(str(run_dir))
    kept = f"resume from the last complete checkpoint, {last}" if last else "there is no earlier checkpoint"
    return f"the checkpoint of step {step} could not be saved in {run_dir} ({free:.0f} MiB free): {error}; {kept}"


@contextmanager
def on_termination(ask_to_stop: Callable[[], None]) -> Iterator[None]:
    """Calls `ask_to_stop` on SIGTERM instead of exiting, in this process only: loader workers still exit."""
    process = os.getpid()

    def handle(number: int, frame: object) -> None:
        if os.getpid() == process:
            ask_to_stop()
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield
        return
    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
