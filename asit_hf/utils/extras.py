"""Errors for optional dependencies that are not installed."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str | None = None) -> Iterator[None]:
    """
    Wraps optional imports: if a package is missing, the error names the extra that installs it. `None` is for required
    dependencies that a bare copy of the code can do without, such as audio decoders.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).split(".")[0]
        command = f"pip install 'asit-hf[{name}]'" if name else f"pip install asit-hf, or pip install {package}"
        message = f"{package} is not installed; install it with: {command}"
        raise ModuleNotFoundError(message, name=error.name) from error
