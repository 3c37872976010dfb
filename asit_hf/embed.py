"""Embeds any amount of audio: `python -m asit_hf.embed MODEL DATA --output FOLDER`."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .corpus.commands import (
    HELP_ON_PROCESSES,
    add_data_options,
    add_run_options,
    choose_device,
    choose_dtype,
    run_command,
    write_corpus,
)
from .corpus.embeddings import (
    DTYPES,
    ROWS,
    EmbeddingSettings,
    EmbeddingWriter,
    embedding_schema,
    join_embedding_tables,
)
from .corpus.sources import Clip, open_corpus
from .data.clips import MAX_SECONDS
from .evaluation.embeddings import (
    POOLINGS,
    PooledWindows,
    embedding_size,
    embedding_windows,
    last_tokens,
    pool_tokens,
    time_patch_means,
)
from .fbank_asit import window_and_hop
from .feature_extraction_asit import ASiTFeatureExtractor
from .loading import ENCODERS, load_encoder, load_feature_extractor
from .modeling_asit import ASiTModel
from .utils.files import is_file
from .utils.weights import model_hash

if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbeddingTables:
    """Parquet tables of one schema."""

    schema: "pyarrow.Schema"
    suffix: str = ".parquet"

    def open(self, path: Path) -> EmbeddingWriter:
        return EmbeddingWriter(path, self.schema)

    def join(self, parts: Sequence[Path], path: Path) -> None:
        join_embedding_tables(parts, path)


class EmbeddingJob:
    """
    Embeddings of clips, of their windows, or of time patches, for `corpus.engine.run`.

    Args:
        encoder, feature_extractor: of one checkpoint.
        rows (`str`): `"clip"`, `"window"` or `"time_patch"`: what a row is of.
        pooling, num_layers: as in [`~asit_hf.evaluation.embeddings.embed`]; time patches are of the last layer.
        window_seconds, max_seconds: as in [`~asit_hf.evaluation.embeddings.embed_files`].
    """

    def __init__(
        self,
        encoder: ASiTModel,
        feature_extractor: ASiTFeatureExtractor,
        rows: str = "clip",
        pooling: str = "cls",
        num_layers: int = 1,
        window_seconds: float = MAX_SECONDS,
        max_seconds: float | None = None,
    ):
        if rows not in ROWS:
            raise ValueError(f"expected rows to be one of {', '.join(ROWS)}, got {rows!r}")
        size = embedding_size(encoder, pooling, num_layers)
        self.encoder, self.feature_extractor, self.device = encoder.eval(), feature_extractor, encoder.device
        self.unit, self.pooling, self.num_layers = rows, pooling, num_layers
        self.dim = encoder.config.hidden_size if rows == "time_patch" else size
        self.windows = embedding_windows(encoder, feature_extractor, window_seconds, max_seconds)

    def forward(self, input_values: torch.Tensor, attention_mask: torch.Tensor | None, frames: list[int]) -> tuple:
        time_patches = torch.tensor(frames).div(self.encoder.config.patch_size, rounding_mode="floor").clamp_min(1)
        tokens = last_tokens(self.encoder, input_values, attention_mask, self.num_layers)
        mel_patches = self.encoder.config.position_grid[1]
        if self.unit == "time_patch":
            values = time_patch_means(tokens[-1], mel_patches)
        else:
            counts = time_patches.to(self.device, non_blocking=True)
            values = torch.cat([pool_tokens(layer, counts, self.pooling, mel_patches) for layer in tokens], dim=-1)
        return values.float(), time_patches

    def rows(self, clip: Clip) -> "EmbeddingRows":
        return EmbeddingRows(self, clip)


class EmbeddingRows:
    """The rows of one clip, from its windows in order: `file`, `label`, `start`, `end` and `embedding` or `error`."""

    def __init__(self, job: EmbeddingJob, clip: Clip):
        self.job, self.clip = job, clip
        self.pooled = PooledWindows(job.pooling, job.num_layers)
        self.end = 0.0

    def add(self, start: float, end: float, value: tuple[np.ndarray, np.ndarray]) -> list[dict[str, Any]]:
        """Takes a window's embedding `(dim,)`, or those of its time patches, and the number of its time patches."""
        embedding, time_patches = value
        self.end = end
        if self.job.unit == "clip":
            self.pooled.add(embedding, int(time_patches))
            return []
        if self.job.unit == "window":
            return [self._row(start, end, embedding)]
        rate, patch_size = self.job.feature_extractor.sampling_rate, self.job.encoder.config.patch_size
        window, hop = window_and_hop(rate)
        starts = start + np.arange(int(time_patches)) * patch_size * hop / rate
        length = ((patch_size - 1) * hop + window) / rate
        return [self._row(first, min(first + length, end), one) for first, one in zip(starts.tolist(), embedding)]

    def finish(self) -> list[dict[str, Any]]:
        return [self._row(0.0, self.end, self.pooled.value())] if self.job.unit == "clip" else []

    def fail(self, reason: str) -> list[dict[str, Any]]:
        return [{"file": self.clip.file, "label": self.clip.label, "error": reason}]

    def _row(self, start: float, end: float, embedding: np.ndarray) -> dict[str, Any]:
        row = {"file": self.clip.file, "label": self.clip.label, "start": start, "end": end}
        if not np.isfinite(embedding).all():  # weights that are damaged, or too large for float16
            return {**row, "error": "expected finite values, got others: try --dtype float32"}
        # a copy, as a view would keep the batch
        return {**row, "embedding": embedding.copy()}


def embed_corpus(
    model: str | os.PathLike,
    data: Any,
    output: str | os.PathLike,
    encoder: str = "teacher",
    rows: str = "clip",
    pooling: str = "cls",
    num_layers: int = 1,
    window_seconds: float = MAX_SECONDS,
    max_seconds: float | None = None,
    embedding_dtype: str = "float32",
    dtype: str = "auto",
    device: str = "auto",
    batch_size: int | None = None,
    num_workers: int | None = None,
    part_clips: int | None = None,
    progress: bool = True,
    **data_options: Any,
) -> dict[str, int]:
    """
    Writes embeddings as parquet, with the columns and metadata of [`~asit_hf.corpus.embeddings.embedding_schema`].

    Run again after a kill, it does what is missing. Under torchrun or accelerate, each process does its share.

    Args:
        model: folder or Hub name of any ASiT checkpoint.
        data, data_options: see [`~asit_hf.corpus.sources.open_corpus`].
        output: a file that ends in .parquet, or a folder for parts.
        encoder: `"teacher"` or `"student"`, of a pretraining checkpoint.
        rows: `"clip"`, `"window"` or `"time_patch"`: what a row is of.
        pooling, num_layers, window_seconds, max_seconds: see [`~asit_hf.evaluation.embeddings.embed_files`]; time
            patches are means over mel patches of the last layer.
        embedding_dtype: `"float32"` or `"float16"`, of the table.
        dtype: of the weights, `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"`: float32 on a CPU, otherwise
            bfloat16 or float16.
        device: `"cpu"`, `"cuda"` or `"auto"`.
        batch_size, num_workers, part_clips, progress: see [`~asit_hf.corpus.commands.write_corpus`].

    Returns:
        Numbers of `clips` and `unreadable` clips of this run, and of `parts` that were there before.

    Raises:
        FileNotFoundError: no such model or data.
        ValueError: an option out of range, or an output with other settings.
    """
    output = Path(output)
    if is_file(output) and output.suffix != ".parquet":
        raise ValueError(f"expected a folder, or a file that ends in .parquet, as output, got {output}")
    corpus = open_corpus(data, **data_options)
    device = choose_device(device)
    loaded = load_encoder(model, encoder, dtype=choose_dtype(dtype, device)).to(device)
    feature_extractor = load_feature_extractor(model)
    job = EmbeddingJob(loaded, feature_extractor, rows, pooling, num_layers, window_seconds, max_seconds)
    settings = EmbeddingSettings(
        model=os.fspath(model),
        model_hash=model_hash(loaded),
        encoder=encoder,
        dtype=str(loaded.dtype).removeprefix("torch."),
        pooling=pooling,
        num_layers=num_layers,
        rows=rows,
        window_seconds=window_seconds,
        max_seconds=max_seconds,
        sampling_rate=feature_extractor.sampling_rate,
        hidden_size=loaded.config.hidden_size,
        data=corpus.name,
    )
    schema = embedding_schema(job.dim, settings, embedding_dtype, corpus.has_labels)
    of_run = {"command": "embed", **asdict(settings), "embedding_dtype": embedding_dtype, **data_options}
    return write_corpus(
        job, corpus, output, EmbeddingTables(schema), of_run, batch_size, num_workers, part_clips, progress
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m asit_hf.embed", description=__doc__.split(":")[0] + ".", epilog=HELP_ON_PROCESSES
    )
    add = parser.add_argument
    add("model", help="folder or Hub name of an encoder, classifier or pretraining checkpoint")
    add_data_options(parser)
    add("--output", type=Path, required=True, help=".parquet file, or folder of parts that several processes share")
    add("--encoder", choices=ENCODERS, default="teacher", help="of a pretraining checkpoint (default: %(default)s)")
    pooling = "CLS token, mean of the patches, both concatenated, or mean (and standard deviation) over time of the "
    pooling += "concatenated mel patches (default: %(default)s)"
    add("--pooling", choices=POOLINGS, default="cls", help=pooling)
    add("--num_layers", type=int, default=1, help="number of last layers to concatenate (default: %(default)s)")
    unit = parser.add_mutually_exclusive_group()
    unit.add_argument("--windows", action="store_true", help="a row for each window, without overlap")
    unit.add_argument("--timestamps", action="store_true", help="a row for each time patch of 160 ms")
    windows = "window length for longer clips, rounded down to whole time patches (default: 30)"
    add("--window_seconds", type=float, default=MAX_SECONDS, help=windows)
    add("--max_seconds", type=float, help="length of the beginning of each clip to embed (default: all of it)")
    add("--embedding_dtype", choices=DTYPES, default="float32", help="type in the table (default: %(default)s)")
    add("--label_column", help="column of the labels (default: label, class, ...)")
    add("--label_separator", help="separator of several labels in a cell (default: guessed); none keeps cells whole")
    add_run_options(parser)
    return parser


def _run(args: argparse.Namespace) -> int:
    options = {name: value for name, value in vars(args).items() if name not in ("strict", "windows", "timestamps")}
    if args.timestamps and (args.pooling != "cls" or args.num_layers != 1):
        raise ValueError(
            "time patches are of the last layer, without pooling: --timestamps takes no --pooling or --num_layers"
        )
    rows = "window" if args.windows else "time_patch" if args.timestamps else "clip"
    if len(args.data) == 1:
        options["data"] = args.data[0]
    counts = embed_corpus(rows=rows, **options)
    print(
        f"{counts['clips'] - counts['unreadable']} clips embedded, {counts['unreadable']} unreadable", file=sys.stderr
    )
    return 1 if counts["unreadable"] and args.strict else 0


def main(arguments: list[str] | None = None) -> int:
    return run_command(_parser(), arguments, _run)


if __name__ == "__main__":
    sys.exit(main())
