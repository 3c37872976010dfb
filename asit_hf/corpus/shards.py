"""Clips of one file, list or data set, in order: what a `Corpus` consists of."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..data.files import join_path
from ..data.labels import NO_SEPARATOR, class_names, label_text
from ..data.tars import read_tar
from ..utils.extras import extra
from ..utils.names import local_path, path_text
from ..utils.texts import Texts
from ..utils.urls import is_url, open_url, url_size

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset, IterableDataset

# rows that are read at once, with their audio if it is stored in them
_BLOCK = 16


@dataclass(frozen=True)
class Clip:
    """One source of audio.

    Attributes:
        file: name in tables, see [`~asit_hf.corpus.sources.open_corpus`].
        source: for [`~asit_hf.data.audio.AudioReader`].
        label: of the data, as text; several are joined by `;`. None if there is none.
    """

    file: str
    source: Any
    label: str | None = None


class Files:
    """Files by name.

    Args:
        folder: path or URL that the names are relative to.
        names: of files, by clip.
        labels: by clip, if there are any.
        prefix: of the names in tables.
    """

    def __init__(self, folder: str, names: Texts, labels: Sequence[str | None] | None = None, prefix: str = ""):
        self.folder, self.names, self.labels, self.prefix = folder, names, labels, prefix
        self.num_clips, self.has_labels = len(names), labels is not None

    def update(self, digest: Any) -> None:
        digest.update(path_text(self.prefix).encode())
        digest.update(self.names.ends)
        digest.update(self.names.content)

    def clips(self, start: int, stop: int | None) -> Iterator[Clip]:
        for row in range(self.num_clips)[start:stop]:
            name = local_path(self.names[row])
            label = None if self.labels is None else self.labels[row]
            yield Clip(path_text(join_path(self.prefix, name)), path_text(join_path(self.folder, name)), label)


class Rows:
    """Rows of a `datasets.Dataset` with a column `audio`, and perhaps `label`.

    Args:
        dataset: as [`~asit_hf.data.datasets.load_audio_dataset`] returns it.
        name: of the data set, for audio without a path.
        prefix: of the names in tables.
    """

    def __init__(self, dataset: "Dataset", name: str, prefix: str = ""):
        columns = [column for column in ("audio", "label") if column in dataset.column_names]
        if dataset.format["type"] != "custom":  # a transform
            dataset = dataset.with_format(None)
        self.dataset, self.name, self.prefix = dataset.select_columns(columns), name, prefix
        self.num_clips, self.has_labels = len(dataset), "label" in columns

    def update(self, digest: Any) -> None:
        """Hashes the paths, without reading the audio beside them."""
        import pyarrow.compute as pc

        rows = self.dataset.select_columns("audio").with_format("arrow")
        for start in range(0, self.num_clips, 10000):
            column = rows[start : start + 10000]["audio"]
            paths = pc.struct_field(column, "path").to_pylist() if "path" in _fields(column) else [None] * len(column)
            names = (path or f"{self.name}#{row}" for row, path in enumerate(paths, start))
            digest.update("".join(f"{self.prefix}\0{name}\0" for name in names).encode(errors="surrogatepass"))

    def clips(self, start: int, stop: int | None) -> Iterator[Clip]:
        rows, classes = range(self.num_clips)[start:stop], class_names(self.dataset.features.get("label"))
        for first in range(rows.start, rows.stop, _BLOCK):
            block = self.dataset[first : min(first + _BLOCK, rows.stop)]
            labels = block.get("label", [None] * len(block["audio"]))
            for row, (source, label) in enumerate(zip(block["audio"], labels), first):
                yield _clip(source, label, classes, self.prefix, f"{self.name}#{row}")


class Stream:
    """A shard of a `datasets.IterableDataset` with a column `audio`, and perhaps `label`.

    Args:
        dataset: as [`~asit_hf.data.datasets.load_audio_dataset`] returns it.
        shard: its index among the shards of the data set.
        name: of the data set, for audio without a path.
        prefix: of the names in tables.
        separator: of several labels in a text.
    """

    num_clips = None

    def __init__(self, dataset: "IterableDataset", shard: int, name: str, prefix: str, separator: str | None):
        self.dataset, self.shard, self.prefix, self.separator = dataset, shard, prefix, separator
        self.name = name if dataset.num_shards == 1 else f"{name}#{shard}"
        self.has_labels = "label" in (dataset.column_names or next(iter(dataset), ()))

    def update(self, digest: Any) -> None:
        digest.update(f"{self.name} of {self.dataset.num_shards}".encode())

    def clips(self, start: int, stop: int | None) -> Iterator[Clip]:
        dataset = self.dataset
        if dataset.num_shards > 1:
            dataset = dataset.shard(dataset.num_shards, self.shard)
        classes = class_names((dataset.features or {}).get("label"))
        rows = dataset.skip(start) if start else dataset
        for row, one in enumerate(islice(rows, None if stop is None else max(0, stop - start)), start):
            label = _divided(one.get("label"), self.separator)
            yield _clip(one["audio"], label, classes, self.prefix, f"{self.name}#{row}")


class ParquetShard:
    """A parquet file with a column of audio, which is read as a stream.

    Args:
        folder, name: of the file; the name is relative to the folder, which may be a URL.
        audio_column, label_column: names of its columns.
        prefix: of the names in tables.
        separator: of several labels in a text.
    """

    num_clips = None

    def __init__(
        self,
        folder: str,
        name: str,
        audio_column: str,
        label_column: str | None = None,
        prefix: str = "",
        separator: str | None = None,
    ):
        self.folder, self.name, self.prefix, self.separator = folder, name, prefix, separator
        self.audio_column, self.label_column = audio_column, label_column
        self.has_labels = label_column is not None

    def update(self, digest: Any) -> None:
        digest.update(f"{self.prefix} {self.name} {_size(self.folder, self.name)}".encode(errors="surrogatepass"))

    def clips(self, start: int, stop: int | None) -> Iterator[Clip]:
        with open_parquet(join_path(self.folder, self.name)) as file:
            shard = path_text(join_path(self.prefix, self.name))
            inside = join_path(self.prefix, self.name) if self.prefix else ""
            row, groups = 0, []
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if groups or row + count > start:
                    groups.append(group)
                else:
                    row += count
            classes = parquet_classes(file, self.label_column)
            columns = [self.audio_column, *filter(None, [self.label_column])]
            for batch in file.iter_batches(_BLOCK, groups, columns, use_threads=False):
                if row + len(batch) <= start:
                    row += len(batch)
                    continue
                for one in batch.to_pylist():
                    if stop is not None and row >= stop:
                        return
                    if row >= start:
                        label = _divided(one.get(self.label_column), self.separator)
                        yield _clip(one[self.audio_column], label, classes, inside, f"{shard}#{row}")
                    row += 1


class TarShard:
    """A tar file of audio, which is read as a stream.

    Args:
        folder, name: of the file; the name is relative to the folder, which may be a URL.
        prefix: of the names in tables.
    """

    num_clips, has_labels = None, False

    def __init__(self, folder: str, name: str, prefix: str = ""):
        self.folder, self.name, self.prefix = folder, name, prefix

    def update(self, digest: Any) -> None:
        digest.update(f"{self.prefix} {self.name} {_size(self.folder, self.name)}".encode(errors="surrogatepass"))

    def clips(self, start: int, stop: int | None) -> Iterator[Clip]:
        for member, content in islice(read_tar(join_path(self.folder, self.name)), start, stop):
            file = path_text(join_path(self.prefix, f"{self.name}/{member}"))
            yield Clip(file, {"path": file, "bytes": content()})


@contextmanager
def open_parquet(path: str) -> Iterator["pyarrow.parquet.ParquetFile"]:
    """A parquet file, of which one page of a row group at a time is in memory.

    Raises:
        ValueError: a damaged file, also if that shows while it is read.
    """
    with extra():
        import pyarrow.parquet

    try:
        with open_url(path) if is_url(path) else open(path, "rb") as stream:
            yield pyarrow.parquet.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot read {path_text(path)}, damaged or not of this format: {reason}") from error


def parquet_classes(file: "pyarrow.parquet.ParquetFile", column: str | None) -> list[str] | None:
    """The class names of a column that `datasets` wrote."""
    metadata = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
    feature = metadata.get("info", {}).get("features", {}).get(column) or {}
    feature = feature[0] if isinstance(feature, list) else feature.get("feature", feature)
    return feature.get("names") if isinstance(feature, dict) else None


def _clip(source: Any, label: Any, classes: Sequence[str] | None, prefix: str, nameless: str) -> Clip:
    path = source.get("path") if isinstance(source, dict) else source if isinstance(source, str) else None
    if path and isinstance(source, dict) and source.get("bytes") is not None:  # the name of what is stored
        path = path_text(join_path(prefix, local_path(path)))
    return Clip(path_text(path or nameless), source, label_text(label, classes))


def _divided(label: Any, separator: str | None) -> Any:
    """The labels in a text that is a list."""
    if not separator or separator == NO_SEPARATOR or not isinstance(label, str):
        return label
    return [one.strip() for one in label.split(separator) if one.strip()]


def _size(folder: str, name: str) -> int | None:
    path = join_path(folder, name)
    return url_size(path) if is_url(path) else os.path.getsize(path)


def _fields(column: Any) -> list[str]:
    return [field.name for field in column.type] if hasattr(column.type, "fields") else []
