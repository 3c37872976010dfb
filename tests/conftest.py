import os
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_audio() -> Path:
    """Folder of real labelled audio; skips the test if it does not exist."""
    folder = Path(os.environ.get("ASIT_REAL_AUDIO", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real audio in {folder}: set ASIT_REAL_AUDIO to its folder")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if shutil.which("g++") is None:
        for item in items:
            if item.get_closest_marker("needs_compiler"):
                item.add_marker(pytest.mark.skip(reason="needs g++, which is not installed"))
