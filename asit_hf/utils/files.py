"""Files and folders that are written completely or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_writable(path: Path) -> None:
    """Raises `OSError` if a file cannot be written at `path`, before the work whose result it is to hold."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"expected a file to write, got the folder {path}")
    unfinished = path.with_name(f".{path.name}.unfinished")  # if a kill leaves it, `whole_file` replaces it
    unfinished.touch()
    unfinished.unlink(missing_ok=True)


def is_file(output: Path) -> bool:
    """Whether an output is a file rather than a folder: it has an extension, not a number as in v1.0."""
    return output.suffix[1:].isalnum() and not output.suffix[1:].isdigit() and not output.is_dir()


@contextmanager
def whole_file(path: Path, by: str = "") -> Iterator[Path]:
    """
    A path to write to, `.{name}.{by}.unfinished`. The file replaces `path` on exit; after an error it is removed and
    `path` stays. `by` is the name of the writer, if there may be several.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{f'{by}.' if by else ''}unfinished")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def whole_folder(output_dir: Path) -> Iterator[Path]:
    """A folder to create. It replaces `output_dir` on exit; after an error it is removed and `output_dir` stays."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as scratch:
        folder = Path(scratch) / output_dir.name
        yield folder
        replace_folder(folder, output_dir)


def replace_folder(folder: Path, target: Path) -> None:
    """Renames `folder` to `target`; an earlier `target` is moved to `replaced` beside `folder`."""
    if target.exists():
        os.replace(target, folder.with_name("replaced"))
    os.replace(folder, target)
