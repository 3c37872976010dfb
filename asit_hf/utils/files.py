"""Files and folders that are written whole or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(output_dir: Path) -> Iterator[Path]:
    """A folder to write, which takes the place of `output_dir` at the end, or leaves nothing behind after an error."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as scratch:
        folder = Path(scratch) / output_dir.name
        yield folder
        if output_dir.exists():
            output_dir.rename(Path(scratch) / "replaced")
        folder.rename(output_dir)
