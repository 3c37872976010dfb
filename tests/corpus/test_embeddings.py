"""Tables of embeddings: what is written is read, by this package and by others."""

import numpy as np
import pytest

from asit_hf.corpus import embeddings as tables
from asit_hf.corpus.embeddings import (
    EmbeddingSettings,
    EmbeddingWriter,
    embedding_schema,
    read_embeddings,
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


def some_rows(count: int, bad: tuple[int, ...] = (), seed: int = 0) -> list[dict]:
    matrix = np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)
    rows = [
        {"file": f"{i}.wav", "start": i / 2, "end": i / 2 + 1.5, "embedding": row, "error": None, "label": "rain"}
        for i, row in enumerate(matrix)
    ]
    return [{"file": f"{i}.wav", "error": "damaged"} if i in bad else row for i, row in enumerate(rows)]


def write(path, rows, pieces: int = 1, settings: EmbeddingSettings = SETTINGS, **options):
    with EmbeddingWriter(path, embedding_schema(DIM, settings, **options)) as writer:
        for start in range(0, len(rows), max(1, len(rows) // pieces)):
            writer.write(rows[start : start + max(1, len(rows) // pieces)])
    return path


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr(tables, "GROUP_BYTES", 4 * DIM * 4)  # four rows of float32


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("has_labels", [False, True])
def test_rows_are_read_as_written(tmp_path, dtype, has_labels, small_groups, caplog):
    rows = some_rows(11, bad=(0, 5, 10))
    path = write(tmp_path / "table.parquet", rows, pieces=3, dtype=dtype, has_labels=has_labels)
    read = read_embeddings(path)
    good = [row for row in rows if row.get("error") is None]
    assert read.files == [row["file"] for row in good]
    np.testing.assert_array_equal(read.starts, [row["start"] for row in good])
    np.testing.assert_array_equal(read.ends, [row["end"] for row in good])
    np.testing.assert_array_equal(read.matrix, np.stack([row["embedding"] for row in good]).astype(dtype))
    assert read.matrix.dtype == np.float32
    assert read.labels == (["rain"] * 8 if has_labels else None)
    assert read.settings == SETTINGS
    (record,) = caplog.records
    assert all(text in record.getMessage() for text in ("3 of 11", "0.wav: damaged", str(path)))
