"""One clear error for a loader worker that was killed."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

# modules that unpack a worker's batch: an error from them means that the worker has died
_UNPACKING = ("multiprocessing/reductions.py", "multiprocessing/queues.py", "multiprocessing/resource_sharer.py")
_DIED = "DataLoader worker (pid"


@contextmanager
def clear_worker_errors() -> Iterator[None]:
    """Turns the errors of torch for a killed `DataLoader` worker into one clear error. The error of torch depends on
    the moment (it may be a bare `ConnectionResetError`) and is raised by a signal handler, anywhere in the block.

    Raises:
        RuntimeError: a worker was killed. All other errors, also those raised in a worker, pass unchanged.
    """
    try:
        try:
            yield
        except (OSError, EOFError) as error:  # the signal may still arrive while this is handled
            if not any(frame.filename.endswith(_UNPACKING) for frame in traceback.extract_tb(error.__traceback__)):
                raise
            raise RuntimeError(f"{_DIED} unknown): {type(error).__name__}: {error}") from error
    except RuntimeError as error:
        if not str(error).startswith(_DIED):
            raise
        cause = "a DataLoader worker was killed by the system, usually for lack of memory"
        remedy = "lower the number of workers and run again from the last checkpoint or part"
        raise RuntimeError(f"{cause}: {remedy} ({error})") from error
