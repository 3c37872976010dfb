"""Audio files whose names no table or terminal holds as they are."""

import os
import shutil
from pathlib import Path

import pytest

NAMES = (
    "-dash.wav",
    'quote".wav',
    "line\nbreak.wav",
    "☂ 🎵.wav",
    os.fsdecode(b"na\xefve.wav"),
    "n" * 251 + ".wav",
)
TEXTS = (*NAMES[:2], "file:line%0Abreak.wav", NAMES[3], "file:na%EFve.wav", NAMES[5])


def copy_with_odd_names(file: Path, folder: Path) -> list[str]:
    """Copies of `file` with `NAMES`; returns their texts, sorted as the files are."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name in NAMES:
            shutil.copy(file, folder / name)
    except OSError:
        pytest.skip("this file system has no such names")
    return [text for _, text in sorted(zip(NAMES, TEXTS))]
