"""What is to be read: clips by index, of files, folders, manifests, shards, data sets and streams."""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.datasets import find_audio_files, load_with_names
from ..data.formats import AUDIO_EXTENSIONS
from ..data.labels import class_names
from ..data.manifests import MANIFEST_EXTENSIONS, as_text
from ..utils.names import local_path, path_text

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# rows of a data set that are read at once; their audio is in memory if it is stored in the data set
_BLOCK = 16


@dataclass(frozen=True)
class Clip:
    """One source of audio.

    Attributes:
        file: name in tables, see `open_corpus`.
        source: for [`~asit_hf.data.audio.AudioReader`].
        label: of the data, as text; several are joined by `;`.
    """

    file: str
    source: Any
    label: str | None = None


class Corpus:
    """Clips by shard and index. It can be pickled, and used by several processes at once.

    Args:
        name: for messages.
        shards: what is read, in order. If the number of clips of each is known, they are one shard.

    Attributes:
        num_clips: of all shards; None for streams, whose clips are not counted before they are read.
        num_shards: 1 if the number of clips is known, because any range of them can then be read.
    """

    def __init__(self, name: str, shards: Sequence[Any]):
        self.name = name
        self._shards = list(shards)
        counts = [shard.num_clips for shard in self._shards]
        self.num_clips = None if None in counts else sum(counts)
        self.num_shards = 1 if self.num_clips is not None else len(self._shards)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the names of all clips in order; of streams, of the names and sizes of their shards."""
        digest = blake2b(digest_size=16)
        for shard in self._shards:
            shard.update(digest)
        return digest.hexdigest()

    def clips(self, shard: int = 0, start: int = 0, stop: int | None = None) -> Iterator[Clip]:
        """Clips `start` to `stop` of a shard; those before `start` are not decoded."""
        if not 0 <= shard < self.num_shards:
            raise IndexError(f"expected a shard from 0 to {self.num_shards - 1} of {self.name}, got {shard}")
        if self.num_clips is None:
            yield from self._shards[shard].clips(start, stop)
            return
        stop = self.num_clips if stop is None else min(stop, self.num_clips)
        first = 0
        for one in self._shards:
            if first < stop and start < first + one.num_clips:
                yield from one.clips(max(0, start - first), min(one.num_clips, stop - first))
            first += one.num_clips


def open_corpus(
    data: Any,
    split: str | None = None,
    audio_column: str | None = None,
    label_column: str | None = None,
    label_separator: str | None = None,
    root: str | os.PathLike | None = None,
) -> Corpus:
    """Open what is to be read, without reading audio.

    Args:
        data: anything that [`~asit_hf.data.datasets.load_audio_dataset`] takes, or a list of several.
        split, audio_column, label_column, label_separator, root: as there.

    Clips are named by their path relative to the folder that was passed, or to the manifest's; if `data` is a list, by
    the path that leads to them from the working directory. Audio without a path is called by the data and its row.

    Raises:
        FileNotFoundError: no such file, folder or data set, or a folder without audio.
        ValueError: a missing column or split, a row without a path, or an option that does not apply.
    """
    several = isinstance(data, (list, tuple))
    inputs = list(data) if several else [data]
    if not inputs:
        raise ValueError("expected files, folders or data sets, got an empty list")
    options = {
        "split": split,
        "audio_column": audio_column,
        "label_column": label_column,
        "label_separator": label_separator,
        "root": root,
    }
    shards = [shard for one in inputs for shard in _open(one, len(inputs) > 1, options)]
    names = [_name_of(one) for one in inputs]
    return Corpus(names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more", shards)


def _name_of(data: Any) -> str:
    return path_text(data) if isinstance(data, (str, os.PathLike)) else "data"


def _open(data: Any, prefixed: bool, options: dict[str, Any]) -> list[Any]:
    name = _name_of(data)
    if isinstance(data, (str, os.PathLike)):
        path = Path(data).expanduser()
        plain = not any(options.values())
        if plain and path.is_file() and path.suffix.lower() in AUDIO_EXTENSIONS:
            return [_Files(str(path.parent), [path.name], prefixed)]
        if plain and path.is_dir() and not _is_described(path):
            return [_Files(str(path), [str(file.relative_to(path)) for file in find_audio_files(path)], prefixed)]
    dataset, _ = load_with_names(data, **options)
    rows = _Rows(dataset, name, prefixed)
    if isinstance(data, (str, os.PathLike)) and path.suffix.lower() in (*MANIFEST_EXTENSIONS, ".txt"):
        folder = os.path.join(options["root"] or path.parent, "")
        names = [local_path(clip.file).removeprefix(folder) for clip in rows.clips(0, None)]
        return [_Files(folder, names, prefixed, [clip.label for clip in rows.clips(0, None)])]
    return [rows]


def _is_described(folder: Path) -> bool:
    """Whether a folder holds more than files of audio: a table of them, or a saved data set."""
    return (
        any(folder.glob("metadata.*")) or (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()
    )


class Texts(Sequence):
    """Strings in one piece of memory: a million of them cost little more than their characters."""

    def __init__(self, texts: Sequence[str]):
        encoded = [text.encode() for text in texts]
        self._ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        self._content = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        return self._content[self._ends[index - 1] if index else 0 : self._ends[index]].decode()

    def update(self, digest: Any) -> None:
        digest.update(self._ends)
        digest.update(self._content)


class _Files:
    """Files by their names below a folder."""

    def __init__(self, root: str, names: Sequence[str], prefixed: bool, labels: Sequence[str | None] | None = None):
        self.root, self.prefix = root, root if prefixed else ""
        self.names, self.labels = Texts([path_text(name) for name in names]), labels
        self.num_clips = len(names)

    def update(self, digest: Any) -> None:
        digest.update(path_text(self.prefix).encode())
        self.names.update(digest)

    def clips(self, start: int, stop: int | None) -> Iterator[Clip]:
        for row in range(self.num_clips)[start:stop]:
            name = local_path(self.names[row])
            label = self.labels[row] if self.labels is not None else None
            file = path_text(os.path.join(self.prefix, name))
            yield Clip(file, path_text(os.path.join(self.root, name)), label)


class _Rows:
    """Rows of a data set in Arrow."""

    def __init__(self, dataset: "Dataset", name: str, prefixed: bool):
        self.dataset, self.name, self.prefix = dataset, name, name if prefixed else ""
        self.num_clips = len(dataset)
        self.classes = class_names(dataset.features.get("label"))

    def update(self, digest: Any) -> None:
        for clip in self.clips(0, None):
            digest.update(clip.file.encode() + b"\0")

    def clips(self, start: int, stop: int | None) -> Iterator[Clip]:
        rows = range(self.num_clips)[start:stop]
        for first in range(rows.start, rows.stop, _BLOCK):
            block = self.dataset[first : min(first + _BLOCK, rows.stop)]
            labels = block.get("label") or [None] * len(block["audio"])
            for row, (source, label) in enumerate(zip(block["audio"], labels), first):
                path = source.get("path") if isinstance(source, dict) else None
                yield Clip(path or f"{self.name}#{row}", source, label_text(label, self.classes))


def label_text(label: Any, classes: Sequence[str] | None) -> str | None:
    """A label, class id, or list of them, as text."""
    if isinstance(label, (list, tuple, np.ndarray)):
        return ";".join(filter(None, (label_text(one, classes) for one in label)))
    if label is None or (isinstance(label, float) and np.isnan(label)):
        return None
    return as_text(label) if classes is None else classes[label]
