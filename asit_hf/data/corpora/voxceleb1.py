"""VoxCeleb1 (Nagrani et al. 2017)."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from .files import build_dataset, check_folder, check_split, incomplete, published_file

if TYPE_CHECKING:
    from datasets import Dataset

VOXCELEB1_URL = "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/meta/iden_split.txt"
VOXCELEB1_AUDIO_URL = "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/vox1.html"
_VOXCELEB1_FOLDERS = ("", "wav", "dev/wav", "test/wav", "vox1_dev_wav/wav", "vox1_test_wav/wav")
_VOXCELEB1_SPLITS = {"train": "1", "validation": "2", "test": "3"}


def load_voxceleb1(root: str | os.PathLike, split: str) -> "Dataset":
    """VoxCeleb1 for speaker identification.

    Args:
        root: folder with `iden_split.txt`, and clips `id10001/VIDEO/00001.wav` in it, its subfolder `wav`, or those of
            the archives (`dev/wav` and `test/wav`, `vox1_dev_wav/wav` and `vox1_test_wav/wav`).
        split: "train", "validation" or "test", which the list marks with 1, 2 or 3.

    Returns:
        `audio`, `label` (one of the 1251 speakers of the whole list) and `video`.

    Raises:
        FileNotFoundError: the list or one of its clips is missing.
        ValueError: no such split, or a line of the list that is not a mark and a path.
    """
    check_split(split, "VoxCeleb1")
    root = check_folder(root)
    table = published_file(root, "iden_split.txt", VOXCELEB1_URL)
    rows = [line.split() for line in table.read_text().split("\n") if line.strip()]
    wrong = next((row for row in rows if len(row) != 2 or row[0] not in _VOXCELEB1_SPLITS.values()), None)
    if wrong:
        raise ValueError(f"expected lines '1|2|3 PATH' in {table}, got {' '.join(wrong)!r}")
    names = sorted({path.split("/")[0] for _, path in rows})
    ids = {name: index for index, name in enumerate(names)}
    clips = [path for mark, path in rows if mark == _VOXCELEB1_SPLITS[split]]
    if not clips:
        raise ValueError(f"expected lines marked {_VOXCELEB1_SPLITS[split]} ({split}) in {table}, got none")
    folders: dict[str, Path] = {}
    for folder in map(root.joinpath, reversed(_VOXCELEB1_FOLDERS)):
        folders |= {name: folder for name in names if (folder / name).is_dir()}
    paths = [folders.get(clip.split("/")[0], root) / clip for clip in clips]
    absent = [clip for clip, path in zip(clips, paths) if not path.is_file()]
    if absent:
        what = f"{len(absent)} of {len(clips)} clips of the {split} list are missing in {root}"
        raise incomplete(what, absent, VOXCELEB1_AUDIO_URL)
    return build_dataset(
        audio=[str(path) for path in paths],
        labels=[ids[clip.split("/")[0]] for clip in clips],
        names=names,
        video=["/".join(clip.split("/")[:2]) for clip in clips],
    )
