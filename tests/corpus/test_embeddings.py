"""Tables of embeddings: what is written is read, by this package and by others."""

from dataclasses import asdict, replace

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from datasets import List, Value, load_dataset

from asit_hf.corpus import embeddings as tables
from asit_hf.corpus.embeddings import (
    EmbeddingSettings,
    EmbeddingWriter,
    embedding_schema,
    iter_embeddings,
    join_embedding_tables,
    read_embeddings,
    read_settings,
)

DIM = 6
SETTINGS = EmbeddingSettings(
    model="models/tiny",
    model_hash="0123456789abcdef",
    encoder="teacher",
    dtype="float32",
    pooling="cls_mean",
    num_layers=2,
    rows="window",
    window_seconds=1.5,
    max_seconds=None,
    sampling_rate=16000,
    hidden_size=3,
    data="sounds",
)


def make_rows(count: int, bad: tuple[int, ...] = ()) -> list[dict]:
    matrix = np.random.default_rng(0).normal(size=(count, DIM)).astype(np.float32)
    rows = [
        {"file": f"{i}.wav", "start": i / 2, "end": i / 2 + 1.5, "embedding": row, "error": None, "label": "rain"}
        for i, row in enumerate(matrix)
    ]
    return [{"file": f"{i}.wav", "error": "damaged"} if i in bad else row for i, row in enumerate(rows)]


def write(path, rows, at_once: int = 1000, settings: EmbeddingSettings = SETTINGS, **options):
    with EmbeddingWriter(path, embedding_schema(DIM, settings, **options)) as writer:
        for start in range(0, len(rows), at_once):
            writer.write(rows[start : start + at_once])
    return path


@pytest.fixture
def four_rows(monkeypatch):
    """Groups of four rows of float32."""
    monkeypatch.setattr(tables, "GROUP_BYTES", 4 * DIM * 4)


@pytest.fixture(params=["float32", "float16"])
def table(tmp_path, request):
    """Eleven rows, of which three are bad."""
    return write(tmp_path / "table.parquet", make_rows(11, bad=(0, 5, 10)), dtype=request.param)


def expected_matrix(table) -> np.ndarray:
    dtype = pyarrow.parquet.read_schema(table).field("embedding").type.value_type.to_pandas_dtype()
    return np.stack([row["embedding"] for row in make_rows(11, bad=(0, 5, 10)) if "embedding" in row]).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("has_labels", [False, True])
def test_rows_are_read_as_written(tmp_path, dtype, has_labels, four_rows, caplog):
    rows = make_rows(11, bad=(0, 5, 10))
    path = write(tmp_path / "table.parquet", rows, at_once=3, dtype=dtype, has_labels=has_labels)
    read = read_embeddings(path)
    good = [row for row in rows if "embedding" in row]
    assert read.files == [row["file"] for row in good]
    np.testing.assert_array_equal(read.starts, [row["start"] for row in good])
    np.testing.assert_array_equal(read.ends, [row["end"] for row in good])
    np.testing.assert_array_equal(read.matrix, np.stack([row["embedding"] for row in good]).astype(dtype))
    assert read.matrix.dtype == np.float32
    assert read.labels == (["rain"] * 8 if has_labels else None)
    assert read.settings == SETTINGS
    (record,) = caplog.records
    assert all(text in record.getMessage() for text in ("3 of 11", "0.wav: damaged", str(path)))


def test_the_file_depends_on_the_rows_alone(tmp_path, four_rows):
    """Not on how many are written at once, nor on the parts that it is joined from; groups have a bounded size."""
    rows = make_rows(11, bad=(5,))
    whole = write(tmp_path / "whole.parquet", rows).read_bytes()
    assert write(tmp_path / "again.parquet", rows, at_once=1).read_bytes() == whole
    bounds = [(0, 2), (2, 2), (2, 10), (10, 11)]
    parts = [write(tmp_path / f"part-{i}.parquet", rows[slice(*ends)]) for i, ends in enumerate(bounds)]
    join_embedding_tables(parts, tmp_path / "joined.parquet")
    assert (tmp_path / "joined.parquet").read_bytes() == whole
    metadata = pyarrow.parquet.read_metadata(tmp_path / "joined.parquet")
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [4, 4, 3]


def test_a_folder_of_parts_is_one_table(tmp_path, four_rows, caplog):
    rows = make_rows(11, bad=(1, 10))
    for number, start in enumerate((0, 3, 10)):
        end = (3, 10, 11)[number]
        write(tmp_path / f"part-{number:05}.parquet", rows[start:end], has_labels=True)
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / ".part-00003.parquet.unfinished").write_text("half a table")
    (tmp_path / ".part-00003.parquet").write_text("half a table")
    read = read_embeddings(tmp_path)
    assert read.files == [f"{i}.wav" for i in (0, *range(2, 10))]
    assert read.labels == ["rain"] * 9
    blocks = list(iter_embeddings(tmp_path))
    assert [len(one.files) for one in blocks] == [2, 4, 3]
    assert all(array.flags.writeable for one in blocks for array in (one.matrix, one.starts, one.ends))
    assert all("2 of 11" in record.getMessage() for record in caplog.records)
    assert read_settings(tmp_path) == SETTINGS


def test_parts_of_another_run_are_not_joined(tmp_path):
    first = write(tmp_path / "0.parquet", make_rows(2))
    for options, said in (
        (
            {"settings": replace(SETTINGS, model_hash="f" * 16, max_seconds=2.0)},
            "model_hash 0123456789abcdef, got ffff",
        ),
        ({"settings": replace(SETTINGS, max_seconds=2.0)}, "max_seconds None, got 2.0"),
        ({"dtype": "float16"}, r"embedding .*float.*, got .*halffloat"),
        ({"has_labels": True}, "label None, got string"),
    ):
        second = write(tmp_path / "1.parquet", make_rows(2), **options)
        with pytest.raises(ValueError, match=f"1.parquet.*0.parquet.*{said}"):
            join_embedding_tables([first, second], tmp_path / "joined.parquet")
        with pytest.raises(ValueError, match=said):
            read_embeddings(tmp_path)
        assert not (tmp_path / "joined.parquet").exists()
    with pytest.raises(ValueError, match="none"):
        join_embedding_tables([], tmp_path / "joined.parquet")


def test_metadata_are_readable(table):
    metadata = pyarrow.parquet.read_schema(table).metadata
    assert metadata[b"model"] == b"models/tiny"
    assert metadata[b"window_seconds"] == b"1.5"
    assert b"max_seconds" not in metadata
    assert metadata.keys() >= {name.encode() for name, value in asdict(SETTINGS).items() if value is not None}
    group = pyarrow.parquet.read_metadata(table).row_group(0)
    columns = [group.column(index) for index in range(group.num_columns)]
    assert {column.compression for column in columns} == {"ZSTD"}
    assert [column.path_in_schema for column in columns if column.statistics is None] == ["embedding.list.element"]


def test_pandas(table, tmp_path):
    rows = pandas.read_parquet(table)
    assert rows.attrs == asdict(SETTINGS)
    assert rows[rows.error.notna()].file.tolist() == ["0.wav", "5.wav", "10.wav"]
    assert np.isnan(np.stack(rows.embedding[rows.error.notna()])).all()
    np.testing.assert_array_equal(np.stack(rows.embedding[rows.error.isna()]), expected_matrix(table))
    rows[rows.error.isna()].to_parquet(tmp_path / "again.parquet")
    again = read_embeddings(tmp_path / "again.parquet")  # whose type has no width
    assert again.settings == SETTINGS
    np.testing.assert_array_equal(again.matrix, expected_matrix(table))


def test_datasets(table, tmp_path):
    rows = load_dataset("parquet", data_files=str(table), split="train", cache_dir=str(tmp_path / "cache"))
    dtype = expected_matrix(table).dtype.name
    assert rows.features["embedding"] == List(Value(dtype), length=DIM)
    assert [row["file"] for row in rows if row["error"] is not None] == ["0.wav", "5.wav", "10.wav"]
    good = rows.filter(lambda error: error is None, input_columns="error").with_format("numpy")
    np.testing.assert_array_equal(np.stack(good["embedding"][:]).astype(dtype), expected_matrix(table))
    good.to_parquet(tmp_path / "again.parquet")
    again = read_embeddings(tmp_path / "again.parquet")
    assert (len(again.files), again.settings) == (8, None)


def test_polars(table, tmp_path):
    """`make tables` installs polars and DuckDB."""
    polars = pytest.importorskip("polars")
    rows = polars.read_parquet(table)
    assert rows.filter(polars.col("error").is_not_null())["file"].to_list() == ["0.wav", "5.wav", "10.wav"]
    matrix = rows.filter(polars.col("error").is_null())["embedding"].to_numpy()
    np.testing.assert_array_equal(matrix, expected_matrix(table))
    assert polars.read_parquet_metadata(table)["pooling"] == "cls_mean"
    rows.write_parquet(tmp_path / "again.parquet")
    np.testing.assert_array_equal(read_embeddings(tmp_path / "again.parquet").matrix, expected_matrix(table))


def test_duckdb(table, tmp_path):
    duckdb = pytest.importorskip("duckdb")
    bad = duckdb.sql(f"select file from '{table}' where error is not null").fetchall()
    assert bad == [("0.wav",), ("5.wav",), ("10.wav",)]
    rows = duckdb.sql(f"select embedding from '{table}' where error is null").fetchnumpy()
    np.testing.assert_array_equal(np.stack(rows["embedding"]), expected_matrix(table))
    settings = f"select decode(key), decode(value) from parquet_kv_metadata('{table}')"
    assert dict(duckdb.sql(settings).fetchall())["pooling"] == "cls_mean"
    duckdb.sql(f"copy (from '{table}') to '{tmp_path / 'again.parquet'}'")
    np.testing.assert_array_equal(read_embeddings(tmp_path / "again.parquet").matrix, expected_matrix(table))


def test_null_embeddings_of_other_programs(tmp_path):
    columns = {"file": ["a", "b", "c"], "start": [0.0] * 3, "end": [1.0] * 3, "embedding": [[1.0, 2.0], None, [3, 4]]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "table.parquet")
    read = read_embeddings(tmp_path / "table.parquet")
    assert (read.files, read.matrix.tolist(), read.settings) == (["a", "c"], [[1, 2], [3, 4]], None)


def test_wrong_rows(tmp_path):
    (row,) = make_rows(1)
    for dtype, embedding, said in (
        ("float32", np.zeros(DIM + 1), rf"{DIM} values.*\({DIM + 1},\)"),
        ("float32", np.zeros((1, DIM)), rf"\(1, {DIM}\)"),
        ("float16", np.full(DIM, -70000.0), "float16.*70000"),
    ):
        with pytest.raises(ValueError, match=f"0.wav.*{said}"):
            write(tmp_path / "table.parquet", [{**row, "embedding": embedding}], dtype=dtype)
    with pytest.raises(ValueError, match="float64"):
        embedding_schema(DIM, SETTINGS, "float64")
    with pytest.raises(ValueError, match="clips"):
        replace(SETTINGS, rows="clips")


def test_wrong_tables(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        read_embeddings(tmp_path / "none.parquet")
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        read_embeddings(tmp_path)
    for rows in ([], make_rows(2, bad=(0, 1))):
        with pytest.raises(ValueError, match=r"table\.parquet"):
            read_embeddings(write(tmp_path / "table.parquet", rows))
    (tmp_path / "table.parquet").write_text("file,start,end,embedding\n")
    with pytest.raises(ValueError, match=r"table\.parquet"):
        read_embeddings(tmp_path / "table.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"file": ["a"], "label": ["b"]}), tmp_path / "table.parquet")
    with pytest.raises(ValueError, match="start, end, embedding"):
        read_embeddings(tmp_path / "table.parquet")
    columns = {"file": ["a", "b"], "start": [0.0, 0.0], "end": [1.0, 1.0], "embedding": [[1.0], [1.0, 2.0]]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "table.parquet")
    with pytest.raises(ValueError, match=r"table\.parquet.*\[1, 2\]"):
        read_embeddings(tmp_path / "table.parquet")
