"""One clear error for a loader worker that was killed."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

# Where a worker's batch is unpacked: an error from here means that the worker is no more.
_UNPACKING = ("multiprocessing/reductions.py", "multiprocessing/queues.py", "multiprocessing/resource_sharer.py")
_DIED = "DataLoader worker (pid"


@contextmanager
def clear_worker_errors() -> Iterator[None]:
    """
    Within it, a `DataLoader` worker that is killed raises one error that says so. torch has several, by the moment of
    the kill, down to a bare `ConnectionResetError`; and it raises from a signal, so anywhere, not only where a batch
    is taken.

    Raises:
        RuntimeError: a worker was killed. Other errors, those raised within a worker too, pass unchanged.
    """
    try:
        try:
            yield
        except (OSError, EOFError) as error:  # the signal may still come while this is dealt with
            if not _comes_from_unpacking(error):
                raise
            raise RuntimeError(f"{_DIED} unknown): {type(error).__name__}: {error}") from error
    except RuntimeError as error:
        if not str(error).startswith(_DIED):
            raise
        raise RuntimeError(
            "a DataLoader worker was killed by the system, usually for want of memory: lower dataloader_num_workers "
            f"and resume from the last checkpoint ({error})"
        ) from error


def _comes_from_unpacking(error: Exception) -> bool:
    return any(frame.filename.endswith(_UNPACKING) for frame in traceback.extract_tb(error.__traceback__))
