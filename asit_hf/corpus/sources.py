"""What is to be read: clips by index, of files, folders, manifests, shards, data sets and streams."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from itertools import compress, repeat
from typing import Any

from ..data.datasets import load_with_names
from ..data.files import find_root, join_path, name_in_row
from ..data.inputs import Input, choose_shards, find_input
from ..data.labels import divide_cells, label_text
from ..data.manifests import AUDIO_COLUMNS, LABEL_COLUMNS, Manifest, as_text, find_column
from ..utils.names import path_text
from ..utils.texts import Categories, Texts
from ..utils.urls import is_url
from .shards import Clip, Files, ParquetShard, Rows, Stream, TarShard, open_parquet, parquet_classes


class Corpus:
    """Clips by shard and index. It can be pickled, and used by several processes at once.

    Args:
        name: for messages.
        shards: what is read, in order. If the number of clips of each is known, they are one shard.

    Attributes:
        num_clips: of all shards; None for streams, whose clips are not counted before they are read.
        num_shards: 1 if the number of clips is known, because any range of them can then be read.
        has_labels: whether clips may have a label.
    """

    def __init__(self, name: str, shards: Sequence[Any]):
        self.name = name
        self._shards = list(shards)
        counts = [shard.num_clips for shard in self._shards]
        self.num_clips = None if None in counts else sum(counts)
        self.num_shards = 1 if self.num_clips is not None else len(self._shards)
        self.has_labels = any(shard.has_labels for shard in self._shards)

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
    labels: bool = True,
) -> Corpus:
    """Open what is to be read, without reading audio.

    Args:
        data: anything that [`~asit_hf.data.datasets.load_audio_dataset`] takes, or a list of several.
        split, audio_column, label_column, label_separator, root: as there.
        labels: whether clips have the labels of the data.

    Clips are named by their path relative to the folder that was passed, or to the manifest's; if `data` is a list, by
    the path that leads to them from the working directory. Audio without a path is called by the data and its row.

    Raises:
        FileNotFoundError: no such file, folder or data set, or a folder without audio.
        ValueError: a missing column or split, a row without a path, or an option that does not apply.
    """
    inputs = list(data) if isinstance(data, (list, tuple)) else [data]
    if not inputs:
        raise ValueError("expected files, folders or data sets, got an empty list")
    options = _Options(split, audio_column, label_column, label_separator, root, labels)
    loaded = [f"data[{index}]" for index in range(len(inputs))] if len(inputs) > 1 else ["data"]
    is_path = [isinstance(one, (str, os.PathLike)) for one in inputs]
    names = [path_text(one) if named else other for one, named, other in zip(inputs, is_path, loaded)]
    shards = [shard for one, name in zip(inputs, names) for shard in _open(one, name, len(inputs) > 1, options)]
    return Corpus(names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more", shards)


@dataclass(frozen=True)
class _Options:
    split: str | None
    audio_column: str | None
    label_column: str | None
    label_separator: str | None
    root: str | os.PathLike | None
    labels: bool


def _open(data: Any, name: str, is_prefixed: bool, options: _Options) -> list[Any]:
    """The shards of one input. With a prefix, names lead to their files from the working directory."""
    if not isinstance(data, (str, os.PathLike)):
        return _open_loaded(data, name, "", options)
    found = find_input(data, options.split, options.root)
    prefix = found.place if is_prefixed else ""
    if found.kind == "audio":
        return [Files(found.place, Texts(map(path_text, found.names)), prefix=prefix)]
    if found.kind == "tar":
        return [TarShard(found.place, one, prefix) for one in found.names]
    if found.kind == "manifest":
        return [_open_manifest(found, is_prefixed, options)]
    if found.kind == "parquet":
        return _open_parquet(found, is_prefixed, options)
    if is_url(found.place):
        raise ValueError(f"expected a folder written by save_to_disk on this machine, got {found.place}: copy it")
    return _open_loaded(found.place, name, prefix, options)


def _open_loaded(data: Any, name: str, prefix: str, options: _Options) -> list[Any]:
    from datasets import Dataset

    is_hub = isinstance(data, str) and not os.path.exists(data)
    dataset, _ = load_with_names(data, **vars(options), streaming=is_hub)
    dataset = dataset if options.labels else dataset.select_columns("audio")
    if isinstance(dataset, Dataset):
        return [Rows(dataset, name, prefix)]
    return [Stream(dataset, index, name, prefix, options.label_separator) for index in range(dataset.num_shards)]


def _open_manifest(found: Input, is_prefixed: bool, options: _Options) -> Files:
    manifest = Manifest(found.place, options.audio_column)
    audio = manifest.find_audio(options.audio_column)
    label = manifest.find_label(options.label_column) if options.labels else None
    in_split = repeat(True) if found.split is None else manifest.in_split(found.split)

    def cells(column: str) -> Iterator[Any]:
        return compress(manifest.cells(column), in_split)

    names = Texts(name_in_row(cell, row, found.place) for row, cell in enumerate(cells(audio)))
    labels = None
    if label is not None:
        labels = Categories(_hashable(cell, row, found.place) for row, cell in enumerate(cells(label)))
        labels.values = manifest.typed(labels.values, label)
    return _listed(found, names, labels, is_prefixed, options)


def _hashable(label: Any, row: int, source: str) -> Any:
    label = tuple(label) if isinstance(label, list) else label
    if any(isinstance(one, (dict, list)) for one in (label if isinstance(label, tuple) else [label])):
        raise ValueError(f"expected text, numbers or a list of them as label in row {row} of {source}, got {label!r}")
    return label


def _open_parquet(found: Input, is_prefixed: bool, options: _Options) -> list[Any]:
    """Shards of audio; or, if they hold paths, the files."""
    names = choose_shards(found)
    first = join_path(found.place, names[0])
    with open_parquet(first) as file:
        schema = file.schema_arrow
    audio = find_column(schema.names, options.audio_column, AUDIO_COLUMNS, "audio", path_text(first))
    label = None
    if options.labels:
        label = find_column(schema.names, options.label_column, LABEL_COLUMNS, "label", path_text(first))
    kind = str(schema.field(audio).type).removeprefix("dictionary<values=")
    if not kind.startswith(("string", "large_string", "binary", "large_binary", "struct")):
        raise ValueError(f"expected paths, bytes or both in column {audio} of {path_text(first)}, got {kind}")
    if kind.startswith(("string", "large_string")):
        tables = [replace(found, place=join_path(found.place, name)) for name in names]
        return [_open_paths(table, audio, label, is_prefixed, options) for table in tables]
    prefix, separator = found.place if is_prefixed else "", options.label_separator
    return [ParquetShard(found.place, name, audio, label, prefix, separator) for name in names]


def _open_paths(found: Input, audio: str, label: str | None, is_prefixed: bool, options: _Options) -> Files:
    with open_parquet(found.place) as file:
        columns = {name: file.read([name])[name] for name in (audio, label) if name}
        classes = parquet_classes(file, label)
    names = Texts(name_in_row(one.as_py(), row, found.place) for row, one in enumerate(columns[audio]))
    labels = None
    if label is not None:
        labels = Categories(label_text(one.as_py(), classes) for one in columns[label])
    return _listed(found, names, labels, is_prefixed, options)


def _listed(found: Input, names: Texts, labels: Categories | None, is_prefixed: bool, options: _Options) -> Files:
    """The files that a table names."""
    folder, moved = find_root(names, found.roots, path_text(found.place))
    root = os.path.join(folder, "")

    def named(name: str) -> str:
        return path_text(moved.get(name, name).removeprefix(root))

    if found.inside is not None:
        inside = os.path.join(found.inside, "")
        kept = [join_path(folder, moved.get(name, name)).startswith(inside) for name in names]
        names = Texts(compress(names, kept))
        labels = labels and Categories(compress(labels, kept))
    if labels is not None:
        labels.values = _label_texts(labels.counts(), options.label_separator, path_text(found.place))
    return Files(folder, Texts(map(named, names)), labels, folder if is_prefixed else "")


def _label_texts(counts: dict[Any, int], separator: str | None, source: str) -> list[str | None]:
    """The text of each label, of which those that are lists are joined by `;`."""
    if any(isinstance(label, tuple) for label in counts):
        return [label_text(label) for label in counts]
    if any(isinstance(label, str) for label in counts):
        texts, cells = [None if label is None else as_text(label) for label in counts], Counter()
        for text, count in zip(texts, counts.values()):
            cells[text] += count
        divided = divide_cells(cells, separator=separator, source=source)
        return [label_text(divided[text]) for text in texts]
    is_whole = all(label is None or float(label).is_integer() for label in counts)
    return [None if label is None else as_text(label) if is_whole else str(float(label)) for label in counts]
