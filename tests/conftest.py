import os
import shutil
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def real_audio() -> Path:
    """Folder of real labelled audio; skips the test if it does not exist."""
    folder = Path(os.environ.get("ASIT_REAL_AUDIO", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real audio in {folder}: set ASIT_REAL_AUDIO to its folder")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {}
    if shutil.which("g++") is None:
        missing["needs_compiler"] = "needs g++, which is not installed"
    if not hasattr(torch.cpu.Stream, "record_event"):
        missing["needs_cpu_fsdp"] = f"torch {torch.__version__} has no FSDP2 on a CPU"
    for item in items:
        for marker in missing:
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=missing[marker]))
