"""Small audio files whose samples tell where they come from, and tables of them."""

import csv
from pathlib import Path

import numpy as np
import soundfile
from datasets import Audio, Dataset

from asit_hf.data import find_audio_files

RATE = 8000
CLASS_FILES = ("bird/b.wav", "bird/a.wav", "dog/a.flac", "dog/deep/c.wav", "rain/.hidden.wav", "rain/r.wav")


def ramp(seconds: float) -> np.ndarray:
    """Sample `i` is exactly i / 2^20, so that a crop shows its start."""
    return np.arange(round(seconds * RATE), dtype=np.float32) / 2**20


def write_ramps(folder: Path) -> list[str]:
    """Twelve clips of 2 s, at levels of their own; number 3 is damaged, number 7 missing."""
    paths = [folder / f"{index:02d}.wav" for index in range(12)]
    for index, path in enumerate(paths):
        soundfile.write(path, ramp(2) + np.float32(index / 2**4), RATE, subtype="FLOAT")
    paths[3].write_bytes(b"no audio at all")
    paths[7].unlink()
    return [str(path) for path in paths]


def write_class_folders(root: Path) -> Path:
    """Six clips in class folders, one of them hidden, beside a text file. Each clip has its own constant level."""
    for index, name in enumerate(CLASS_FILES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(root / name, np.full(800, 0.1 * index), RATE)
    (root / "notes.txt").write_text("not audio")
    return root


def write_csv(path: Path, rows: list[dict], delimiter: str = ",") -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def names_of(dataset) -> list[str]:
    """The folder and file name of each row."""
    return ["/".join(row["audio"]["path"].rsplit("/", 2)[-2:]) for row in dataset]


def embedded(folder: Path, labels=("bird", "bird", "dog", "dog", "rain")) -> Dataset:
    """The clips of `write_class_folders` as bytes, like data sets on the Hub."""
    files = find_audio_files(folder)
    rows = {"audio": [{"path": file.name, "bytes": file.read_bytes()} for file in files], "label": list(labels)}
    return Dataset.from_dict(rows).cast_column("audio", Audio(decode=False))
