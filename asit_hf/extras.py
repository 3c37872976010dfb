"""What an installation without extras lacks, and how to get it."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """For imports that need more than inference does: names the extra to install where one of them is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).split(".")[0]
        raise ModuleNotFoundError(
            f"{package} is not installed, which comes with the extra {name!r}: pip install 'asit-hf[{name}]'",
            name=error.name,
        ) from error
