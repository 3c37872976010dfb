"""What an installation without extras, or a bare copy of the code, lacks, and how to get it."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str | None = None) -> Iterator[None]:
    """
    For imports that need more than inference does: names the extra to install where one of them is missing. `None`:
    for those of the package's own dependencies that training on decoded audio does without.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).split(".")[0]
        if name is None:
            source = f"asit-hf itself: pip install asit-hf, or only {package}"
        else:
            source = f"the extra {name!r}: pip install 'asit-hf[{name}]'"
        raise ModuleNotFoundError(f"{package} is not installed, which comes with {source}", name=error.name) from error
