"""What is to be read: clips by index, of files, folders, manifests, shards, data sets and streams."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ..data.datasets import load_with_names
from ..data.files import resolve_paths
from ..data.inputs import Input, find_input, join_path
from ..data.manifests import AUDIO_COLUMNS, LABEL_COLUMNS, find_column, load_manifest
from ..data.splits import match_split, split_kind
from ..utils.names import local_path, path_text
from ..utils.texts import Texts
from ..utils.urls import is_url
from .shards import Clip, Files, ParquetShard, Rows, Stream, TarShard, label_text, open_parquet, parquet_classes

_SHARD_NUMBER = re.compile(r"[-_.]\d+([-_]of[-_]\d+)?$")


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
    inputs = list(data) if isinstance(data, (list, tuple)) else [data]
    if not inputs:
        raise ValueError("expected files, folders or data sets, got an empty list")
    options = _Options(split, audio_column, label_column, label_separator, root)
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
    if isinstance(dataset, Dataset):
        return [Rows(dataset, name, prefix)]
    return [Stream(dataset, index, name, prefix, options.label_separator) for index in range(dataset.num_shards)]


def _open_manifest(found: Input, is_prefixed: bool, options: _Options) -> Files:
    path = Path(found.place)
    dataset = load_manifest(path, found.split, options.audio_column, options.label_column, Path(found.roots[0]))
    dataset, _ = load_with_names(
        dataset,
        audio_column=options.audio_column,
        label_column=options.label_column,
        label_separator=options.label_separator,
    )
    rows = Rows(dataset, found.place)
    folder = found.roots[0]
    paths = (local_path(clip.file) for clip in rows.clips(0, None))
    names = Texts(path_text(one.removeprefix(os.path.join(folder, ""))) for one in paths)
    labels = [clip.label for clip in rows.clips(0, None)] if "label" in dataset.column_names else None
    return Files(folder, names, labels, folder if is_prefixed else "")


def _open_parquet(found: Input, is_prefixed: bool, options: _Options) -> list[Any]:
    """Shards of audio; or, if they hold paths, the files."""
    names = _choose_shards(found)
    with open_parquet(join_path(found.place, names[0])) as file:
        schema, source = file.schema_arrow, path_text(join_path(found.place, names[0]))
    audio = find_column(schema.names, options.audio_column, AUDIO_COLUMNS, "audio", source)
    label = find_column(schema.names, options.label_column, LABEL_COLUMNS, "label", source)
    if str(schema.field(audio).type) in ("string", "large_string", "string_view"):
        return [_read_paths(found, one, audio, label, is_prefixed) for one in names]
    prefixes = [join_path(found.place, one) if is_prefixed else "" for one in names]
    separator = options.label_separator
    return [ParquetShard(found.place, one, audio, label, prefix, separator) for one, prefix in zip(names, prefixes)]


def _read_paths(found: Input, name: str, audio: str, label: str | None, is_prefixed: bool) -> Files:
    source, folder = join_path(found.place, name), os.path.join(found.roots[0], "")
    with open_parquet(source) as file:
        table, classes = file.read([audio, *filter(None, [label])]), parquet_classes(file, label)
    paths = resolve_paths(table[audio].to_pylist(), folder, source)
    labels = [label_text(one, classes) for one in table[label].to_pylist()] if label else None
    names = Texts(path_text(local_path(one).removeprefix(folder)) for one in paths)
    return Files(folder, names, labels, folder if is_prefixed else "")


def _choose_shards(found: Input) -> Sequence[str]:
    """The parquet files of a split, by their names: `data/train-00000-of-00002.parquet`, `train/0.parquet`."""
    splits: dict[str, list[str]] = {}
    for name in found.names:
        *folders, stem = Path(name).with_suffix("").parts
        candidates = (_SHARD_NUMBER.sub("", stem), *reversed(folders))
        split = next((one for one in candidates if split_kind(one) or one == found.split), "")
        splits.setdefault(split, []).append(name)
    if found.split is None and len(splits) == 1:
        return found.names
    chosen = None if found.split is None else match_split(found.split, splits)
    if chosen is None:
        named = ", ".join(filter(None, splits)) or "none"
        raise ValueError(f"expected one of the splits of {found.place}, {named}; got {found.split!r}")
    return splits[chosen]
