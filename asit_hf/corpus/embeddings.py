"""
Tables of embeddings that people can keep: parquet files that say which model and settings made them.

`EmbeddingWriter` writes a table and `join_embedding_tables` makes one of several; `read_embeddings` and
`iter_embeddings` read one, or a folder of parts. pandas, polars, DuckDB and datasets read them too.
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.extras import extra
from .parts import count_missing

with extra():
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet

logger = logging.getLogger(__name__)

DTYPES = ("float32", "float16")
ROWS = ("clip", "window", "time_patch")
# of the embeddings of a row group, which is what readers and writers have in memory
GROUP_BYTES = 1 << 24
# in pandas, `DataFrame.attrs` is what a file has under this key
_SETTINGS_KEY = b"PANDAS_ATTRS"


def _package_version() -> str | None:
    try:
        return version("asit-hf")
    except PackageNotFoundError:  # a copy of the code that is not installed
        return None


@dataclass(frozen=True)
class EmbeddingSettings:
    """
    What made the rows of a table.

    Attributes:
        model: folder or Hub name of the checkpoint.
        model_hash: of the encoder's weights, see [`~asit_hf.utils.weights.model_hash`].
        encoder: `"teacher"` or `"student"`, of a pretraining checkpoint.
        dtype: of the weights, such as `"bfloat16"`.
        pooling, num_layers: as in [`~asit_hf.evaluation.embeddings.embed`].
        rows: what a row is of, `"clip"`, `"window"` or `"time_patch"`.
        window_seconds: length of the windows that longer clips are cut into.
        max_seconds: how much is used of longer clips; `None` for all.
        sampling_rate: of the model, Hz.
        hidden_size: of the model.
        data: name of what was embedded.
        asit_hf: version of this package.
    """

    model: str
    model_hash: str
    encoder: str
    dtype: str
    pooling: str
    num_layers: int
    rows: str
    window_seconds: float
    max_seconds: float | None
    sampling_rate: int
    hidden_size: int
    data: str
    asit_hf: str | None = field(default_factory=_package_version)

    def __post_init__(self):
        if self.rows not in ROWS:
            raise ValueError(f"expected rows to be one of {', '.join(ROWS)}, got {self.rows!r}")


def embedding_schema(
    dim: int, settings: EmbeddingSettings, dtype: str = "float32", has_labels: bool = False
) -> pyarrow.Schema:
    """
    The columns of a table: `file`, `start` and `end` (seconds), `label` with `has_labels`, `embedding` `(dim,)` of
    type `dtype`, NaN in rows with an `error`, the last column. The metadata has every setting by name, as text, and
    all as json under `PANDAS_ATTRS`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"expected dtype to be one of {', '.join(DTYPES)}, got {dtype!r}")
    values = asdict(settings)
    metadata = {name: str(value) for name, value in values.items() if value is not None}
    metadata[_SETTINGS_KEY] = json.dumps(values)
    columns = {"file": pyarrow.string(), "start": pyarrow.float64(), "end": pyarrow.float64()}
    columns |= {"label": pyarrow.string()} if has_labels else {}
    element = pyarrow.field("element", getattr(pyarrow, dtype)())  # the name that parquet gives it
    columns |= {"embedding": pyarrow.list_(element, dim), "error": pyarrow.string()}
    return pyarrow.schema(columns, metadata=metadata)


class EmbeddingWriter:
    """
    Writes a table at `path` with the columns and settings of `schema`. Up to one row group, of `GROUP_BYTES`, waits in
    memory. Equal rows make equal files, however many are written at once.
    """

    def __init__(self, path: str | os.PathLike, schema: pyarrow.Schema):
        self.schema = schema
        self._group_rows = _group_rows(schema)
        self._waiting: list[pyarrow.Table] = []
        self._num_waiting = 0
        others = [name for name in schema.names if name != "embedding"]
        self._writer = pyarrow.parquet.ParquetWriter(
            path,
            self.schema,
            compression="zstd",
            use_dictionary=[name for name in others if name not in ("start", "end")],
            write_statistics=others,
        )

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """
        Rows of `file`, `start`, `end`, `label`, `embedding` `(dim,)` and `error`; what a row lacks is null, but an
        embedding NaN.

        Raises:
            ValueError: an embedding of another width, or with values that float16 cannot hold.
        """
        columns = {name: [row.get(name) for row in rows] for name in self.schema.names}
        columns["embedding"] = _embedding_column(rows, self.schema.field("embedding").type)
        self.write_table(pyarrow.table(columns, schema=self.schema))

    def write_table(self, table: pyarrow.Table) -> None:
        """Rows of a table with the same columns."""
        self._waiting.append(table)
        self._num_waiting += len(table)
        if self._num_waiting >= self._group_rows:
            table = pyarrow.concat_tables(self._waiting)
            rest = len(table) % self._group_rows
            self._writer.write_table(table[: len(table) - rest], row_group_size=self._group_rows)
            self._waiting, self._num_waiting = [table[len(table) - rest :]], rest

    def close(self) -> None:
        if self._num_waiting:
            self._writer.write_table(pyarrow.concat_tables(self._waiting), row_group_size=self._group_rows)
        self._writer.close()

    def __enter__(self) -> "EmbeddingWriter":
        return self

    def __exit__(self, error: type[BaseException] | None, *details: Any) -> None:
        if error is not None:
            self._num_waiting = 0
        self.close()


def join_embedding_tables(parts: Sequence[str | os.PathLike], path: str | os.PathLike) -> None:
    """
    Writes the rows of all `parts`, in order, as one table at `path`; one row group is in memory at a time.

    Raises:
        ValueError: no parts, or parts with other columns or settings than the first.
    """
    if not parts:
        raise ValueError("expected at least one table to join, got none")
    schema = _common_schema(parts)
    with EmbeddingWriter(path, schema) as writer:
        for part in parts:
            for batch in _batches(part, schema):
                writer.write_table(pyarrow.Table.from_batches([batch]))


@dataclass(frozen=True)
class Embeddings:
    """
    Rows of a table, without those that have an error.

    Attributes:
        files: name of the clip of each row.
        starts, ends: `(rows,)`, float64, seconds.
        matrix: `(rows, dim)`, float32.
        labels: of each row; `None` if the table has no labels.
        settings: what made the rows; `None` if a program has written the table anew without them.
    """

    files: list[str]
    starts: np.ndarray
    ends: np.ndarray
    matrix: np.ndarray
    labels: list[str | None] | None
    settings: EmbeddingSettings | None


def read_embeddings(path: str | os.PathLike) -> Embeddings:
    """
    All rows of a table, or of all tables in a folder. For tables that do not fit in memory see `iter_embeddings`.

    Raises:
        FileNotFoundError, ValueError: as `iter_embeddings`; or there is no row without an error.
    """
    files, labels, starts, ends, matrix = [], [], [], [], None
    for rows in iter_embeddings(path):
        if matrix is None:
            num_rows = sum(pyarrow.parquet.read_metadata(table).num_rows for table in embedding_tables(path))
            matrix = np.empty((num_rows, rows.matrix.shape[1]), np.float32)
        matrix[len(files) : len(files) + len(rows.files)] = rows.matrix
        files += rows.files
        labels += rows.labels or []
        starts.append(rows.starts)
        ends.append(rows.ends)
    if matrix is None:
        raise ValueError(f"expected embeddings in {path}, got no row without an error")
    times = np.concatenate(starts), np.concatenate(ends)
    return Embeddings(files, *times, matrix[: len(files)], None if rows.labels is None else labels, rows.settings)


def iter_embeddings(path: str | os.PathLike) -> Iterator[Embeddings]:
    """
    The rows of a table, or of all tables in a folder, sorted by name, some megabytes at a time. Warnings count the
    parts that an unfinished folder lacks, and at the end the rows with an error, which are left out.

    Raises:
        FileNotFoundError: no such file or folder, or no table in it.
        ValueError: not a table of embeddings, or tables with different columns or settings.
    """
    tables = embedding_tables(path)
    schema = _common_schema(tables)
    settings = _settings_of(schema)
    num_rows, num_bad, example = 0, 0, ""
    for table in tables:
        for batch in _batches(table, schema):
            is_good = batch["embedding"].is_valid()
            if "error" in schema.names:
                is_good = pyarrow.compute.and_(is_good, batch["error"].is_null())
            good = batch.filter(is_good)
            if len(good) < len(batch) and not num_bad:
                row = batch.filter(pyarrow.compute.invert(is_good)).slice(0, 1).to_pylist()[0]
                example = f"{row['file']}: {row.get('error')}"
            num_rows += len(batch)
            num_bad += len(batch) - len(good)
            if len(good):
                yield Embeddings(
                    good["file"].to_pylist(),
                    good["start"].to_numpy(zero_copy_only=False, writable=True),
                    good["end"].to_numpy(zero_copy_only=False, writable=True),
                    _matrix(good["embedding"], table),
                    good["label"].to_pylist() if "label" in schema.names else None,
                    settings,
                )
    if num_bad:
        logger.warning("%s: left out %d of %d rows, which have an error, such as %s", path, num_bad, num_rows, example)


def read_settings(path: str | os.PathLike) -> EmbeddingSettings | None:
    """The settings of a table, or of all tables in a folder, without its rows; see `iter_embeddings` for errors."""
    return _settings_of(_common_schema(embedding_tables(path)))


def embedding_tables(path: str | os.PathLike) -> list[Path]:
    """The file `path`, or the parquet files in the folder `path`, sorted; see `read_embeddings` for errors."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no such file or folder: {path}")
    tables = sorted(file for file in path.glob("*.parquet") if not file.name.startswith("."))
    if not tables:
        raise FileNotFoundError(f"expected parquet files in {path}, got none")
    if missing := count_missing(path):
        logger.warning_once(f"{path} is not complete, parts missing: {missing}; run its command again")
    return tables


def _group_rows(schema: pyarrow.Schema) -> int:
    """Rows with about `GROUP_BYTES` of embeddings; 1024 if another program has not kept their width in the type."""
    embeddings = schema.field("embedding").type
    if not pyarrow.types.is_fixed_size_list(embeddings):
        return 1024
    return max(1, 8 * GROUP_BYTES // (embeddings.list_size * embeddings.value_type.bit_width))


def _embedding_column(rows: Sequence[dict[str, Any]], embeddings: pyarrow.FixedSizeListType) -> pyarrow.Array:
    dtype = np.dtype(embeddings.value_type.to_pandas_dtype())
    # not null where there is none: pyarrow before 26 writes lists of a fixed size with nulls and cannot read them
    matrix = np.full((len(rows), embeddings.list_size), np.nan, dtype)
    for index, row in enumerate(rows):
        embedding = row.get("embedding")
        if embedding is None:
            continue
        if np.shape(embedding) != matrix.shape[1:]:
            raise ValueError(f"{row['file']}: expected {embeddings.list_size} values, got shape {np.shape(embedding)}")
        try:
            with np.errstate(over="raise"):
                matrix[index] = np.asarray(embedding).astype(dtype)
        except FloatingPointError:
            largest = np.abs(embedding).max()
            raise ValueError(f"{row['file']}: expected values that {dtype} can hold, got {largest:g}") from None
    return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(matrix.ravel()), type=embeddings)


def _batches(path: str | os.PathLike, schema: pyarrow.Schema) -> Iterator[pyarrow.RecordBatch]:
    with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:  # else it keeps all that was read in memory
        yield from file.iter_batches(_group_rows(schema))


def _common_schema(tables: Sequence[str | os.PathLike]) -> pyarrow.Schema:
    """The schema of the first table, which all others must have."""
    first, *others = [_schema_of(table) for table in tables]
    for table, schema in zip(tables[1:], others):
        if schema.equals(first, check_metadata=True):
            continue
        expected, got = ({**dict(zip(one.names, one.types)), **(one.metadata or {})} for one in (first, schema))
        names = [name for name in {**expected, **got} if name != _SETTINGS_KEY and expected.get(name) != got.get(name)]
        differences = [f"{_text(name)} {_text(expected.get(name))}, got {_text(got.get(name))}" for name in names]
        raise ValueError(f"{table}: expected, as in {tables[0]}, {'; '.join(differences) or 'the same settings'}")
    return first


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _schema_of(table: str | os.PathLike) -> pyarrow.Schema:
    try:
        schema = pyarrow.parquet.read_schema(table)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{table}: expected a parquet file: {error}") from error
    if missing := [name for name in ("file", "start", "end", "embedding") if name not in schema.names]:
        raise ValueError(f"{table}: expected a table of embeddings, got no {', '.join(missing)} in {schema.names}")
    return schema


def _settings_of(schema: pyarrow.Schema) -> EmbeddingSettings | None:
    values = json.loads((schema.metadata or {}).get(_SETTINGS_KEY, "{}"))
    names = [one.name for one in fields(EmbeddingSettings)]
    return EmbeddingSettings(**{name: values[name] for name in names}) if values.keys() >= set(names) else None


def _matrix(column: pyarrow.Array, table: str | os.PathLike) -> np.ndarray:
    """A column of lists as `(rows, dim)`, float32."""
    widths = set(pyarrow.compute.list_value_length(column).to_pylist())
    if len(widths) > 1:
        raise ValueError(f"{table}: expected embeddings of one width, got {sorted(widths)}")
    values = column.flatten().to_numpy(zero_copy_only=False, writable=True)
    return values.astype(np.float32, copy=False).reshape(len(column), -1)
