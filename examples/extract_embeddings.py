r"""
Writes embeddings of a folder of audio, a manifest or a Hub data set as parquet or npz.

    python examples/extract_embeddings.py --model_name_or_path CHECKPOINT --data FOLDER --scenes clips.parquet
    python examples/extract_embeddings.py --model_name_or_path CHECKPOINT --data meta.csv --root audio \
        --scenes clips.npz --timestamps patches.npz --pooling cls_mean

Scenes: one embedding per clip. Timestamps: one per time patch (160 ms with patches of 16 frames), the mean over mel
patches of the last layer, with the milliseconds of its center.

parquet: rows of `file`, `label` (scenes of labelled data), `milliseconds` (timestamps) and `embedding`; read it with
`datasets.load_dataset("parquet", data_files=...)` or pandas. npz: `embeddings` (rows, dim), `files` (clips,) and, for
timestamps, `clips` (rows,), the index of each row in `files`, and `milliseconds` (rows,). Both hold `settings`, JSON.

Clips are read and written one by one, so that any number and length fits in memory. An output appears under its name
when it is complete. Unreadable files are reported, counted and skipped.
"""

import argparse
import json
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from tqdm.auto import tqdm

from asit_hf.data import AudioReadError, label_names, load_audio_dataset
from asit_hf.data.audio import source_name
from asit_hf.evaluation.embeddings import POOLINGS, embed_files, embedding_size
from asit_hf.loading import ENCODERS, load_encoder, load_feature_extractor
from asit_hf.utils.arguments import run_script
from asit_hf.utils.files import whole_file

# rows of a parquet row group, which are in memory until it is written
GROUP_ROWS = 1024


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model_name_or_path",
        required=True,
        help="folder or Hub name of an encoder, classifier or pretraining checkpoint",
    )
    parser.add_argument(
        "--encoder", choices=ENCODERS, default="teacher", help="encoder of a pretraining checkpoint (default: teacher)"
    )
    parser.add_argument("--data", required=True, help="folder of audio, csv or json manifest, parquet or Hub data set")
    parser.add_argument("--split", help="split of a data set or manifest")
    parser.add_argument("--audio_column", help="column of the audio or its path")
    parser.add_argument("--label_column", help="column of the labels")
    parser.add_argument("--label_separator", help="separator of several labels in a cell; none keeps cells whole")
    parser.add_argument("--root", help="folder that the paths of a manifest are relative to")
    parser.add_argument("--scenes", type=Path, help="output of clip embeddings, .parquet or .npz")
    parser.add_argument("--timestamps", type=Path, help="output of time patch embeddings, .parquet or .npz")
    parser.add_argument("--pooling", choices=POOLINGS, help="pooling of the scenes (default: cls)")
    parser.add_argument("--num_layers", type=int, help="number of last layers to concatenate for scenes (default: 1)")
    parser.add_argument("--max_seconds", type=float, help="use only the beginning of longer clips")
    parser.add_argument(
        "--window_seconds", type=float, default=30.0, help="window length for longer clips (default: 30)"
    )
    parser.add_argument("--batch_size", type=int, default=16, help="windows per batch (default: 16)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device of the encoder"
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first unreadable file")
    args = parser.parse_args(argv)
    outputs = [path for path in (args.scenes, args.timestamps) if path is not None]
    if not outputs:
        parser.error("expected --scenes or --timestamps, or both")
    for name in ("pooling", "num_layers"):
        if args.scenes is None and getattr(args, name) is not None:
            parser.error(f"--{name} has no effect without --scenes")
    args.pooling, args.num_layers = args.pooling or "cls", 1 if args.num_layers is None else args.num_layers
    for path in outputs:
        if path.suffix not in WRITERS:
            parser.error(f"expected an output that ends in .parquet or .npz, got {path}")
    if len(set(outputs)) < len(outputs):
        parser.error(f"expected different files for scenes and timestamps, got {args.scenes} for both")
    return args


class ParquetOutput:
    """Writes rows of embeddings in groups."""

    def __init__(self, path: Path, dim: int, columns: dict[str, pyarrow.DataType], settings: dict[str, Any]):
        self.columns: dict[str, list] = {name: [] for name in ("file", *columns, "embedding")}
        types = {"file": pyarrow.string(), **columns, "embedding": pyarrow.list_(pyarrow.float32(), dim)}
        metadata = {"settings": json.dumps(settings)}
        self.writer = pyarrow.parquet.ParquetWriter(path, pyarrow.schema(types, metadata=metadata))

    def write(self, file: str, embeddings: np.ndarray, **values: list) -> None:
        """`embeddings` of shape `(rows, dim)`, and one value per row for every other column."""
        for start in range(0, len(embeddings), GROUP_ROWS):
            rows = embeddings[start : start + GROUP_ROWS]
            self.columns["file"] += [file] * len(rows)
            self.columns["embedding"] += list(rows)
            for name, of_column in values.items():
                self.columns[name] += of_column[start : start + GROUP_ROWS]
            if len(self.columns["file"]) >= GROUP_ROWS:
                self._flush()

    def close(self) -> None:
        self._flush()
        self.writer.close()

    def _flush(self) -> None:
        if not self.columns["file"]:
            return
        self.writer.write_table(pyarrow.table(self.columns, schema=self.writer.schema))
        for values in self.columns.values():
            values.clear()


class NpzOutput:
    """Writes arrays; rows go to a temporary file, because their number precedes them in the output."""

    def __init__(self, path: Path, dim: int, columns: dict[str, Any], settings: dict[str, Any]):
        self.path, self.dim, self.settings = path, dim, settings
        self.rows = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115  closed by close
        self.num_rows = 0
        self.files: list[str] = []
        self.columns: dict[str, list] = {name: [] for name in columns}
        self.counts: list[int] = []

    def write(self, file: str, embeddings: np.ndarray, **values: list) -> None:
        self.rows.write(np.ascontiguousarray(embeddings, dtype="<f4").tobytes())
        self.num_rows += len(embeddings)
        self.files.append(file)
        self.counts.append(len(embeddings))
        for name, of_column in values.items():
            self.columns[name] += of_column

    def close(self) -> None:
        arrays = {name: np.asarray(values) for name, values in self.columns.items()}
        if "milliseconds" in arrays:
            arrays["clips"] = np.repeat(np.arange(len(self.files)), self.counts)
        elif "label" in arrays:
            arrays["labels"] = arrays.pop("label")
        arrays |= {"files": np.asarray(self.files), "settings": np.asarray(json.dumps(self.settings))}
        with zipfile.ZipFile(self.path, "w") as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
            header = {"descr": "<f4", "fortran_order": False, "shape": (self.num_rows, self.dim)}
            with archive.open("embeddings.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                self.rows.seek(0)
                shutil.copyfileobj(self.rows, member, 1 << 20)
        self.rows.close()


WRITERS = {".parquet": ParquetOutput, ".npz": NpzOutput}


def main(argv: list[str] | None = None) -> dict[str, int]:
    args = parse_args(argv)
    columns = {name: getattr(args, name) for name in ("audio_column", "label_column", "label_separator")}
    dataset = load_audio_dataset(args.data, split=args.split, root=args.root, **columns)
    encoder = load_encoder(args.model_name_or_path, args.encoder)
    feature_extractor = load_feature_extractor(args.model_name_or_path)
    embedded = embed_files(
        encoder,
        feature_extractor,
        (row["audio"] for row in dataset.select_columns("audio")),
        pooling=args.pooling,
        batch_size=args.batch_size,
        device=args.device,
        num_layers=args.num_layers,
        window_seconds=args.window_seconds,
        max_seconds=args.max_seconds,
    )
    settings = {"model": args.model_name_or_path, "sampling_rate": feature_extractor.sampling_rate}
    settings |= {name: getattr(args, name) for name in ("encoder", "window_seconds", "max_seconds")}
    labels = class_names_of(dataset) if "label" in dataset.column_names else None
    outputs: dict[str, ParquetOutput | NpzOutput] = {}
    with ExitStack() as stack:
        paths = {
            name: stack.enter_context(whole_file(getattr(args, name)))
            for name in ("scenes", "timestamps")
            if getattr(args, name)
        }
        if args.scenes:
            dim = embedding_size(encoder, args.pooling, args.num_layers)
            kinds = {} if labels is None else {"label": pyarrow.string()}
            settings_of_scenes = {**settings, "pooling": args.pooling, "num_layers": args.num_layers}
            outputs["scenes"] = WRITERS[args.scenes.suffix](paths["scenes"], dim, kinds, settings_of_scenes)
        if args.timestamps:
            dim = encoder.config.hidden_size
            kinds = {"milliseconds": pyarrow.float32()}
            outputs["timestamps"] = WRITERS[args.timestamps.suffix](paths["timestamps"], dim, kinds, settings)
        counts = write_all(embedded, dataset, labels, outputs, args.strict)
        for output in outputs.values():
            output.close()
    print(f"{counts['clips']} clips embedded, {counts['unreadable']} unreadable", file=sys.stderr)
    return counts


def write_all(embedded: Iterator, dataset: Any, labels: list[str | None] | None, outputs: dict, strict: bool) -> dict:
    """Writes embeddings as they arrive; returns the counts of `clips` and `unreadable` files."""
    counts = {"clips": 0, "unreadable": 0}
    rows = zip(dataset.select_columns("audio"), embedded, strict=True)
    for index, (row, result) in enumerate(tqdm(rows, total=len(dataset), desc="Embedding", unit="clip")):
        if isinstance(result, AudioReadError):
            if strict:
                raise result
            tqdm.write(str(result), file=sys.stderr)
            counts["unreadable"] += 1
            continue
        counts["clips"] += 1
        file = source_name(row["audio"])
        if "scenes" in outputs:
            values = {} if labels is None else {"label": [labels[index]]}
            outputs["scenes"].write(file, result.scene[None], **values)
        if "timestamps" in outputs:
            milliseconds = result.milliseconds.tolist()
            outputs["timestamps"].write(file, result.timestamps, milliseconds=milliseconds)
    if not counts["clips"]:
        raise ValueError(f"expected readable audio, got {len(dataset)} unreadable files")
    return counts


def class_names_of(dataset: Any) -> list[str]:
    """The label of every row as text; multiple labels are joined by `;`."""
    labels = dataset["label"][:]
    if str(getattr(dataset.features["label"], "dtype", "")).startswith("float"):
        return [str(label) for label in labels]
    names = label_names(dataset)
    ids = [label if isinstance(label, list) else [label] for label in labels]
    return [";".join(names[one] for one in of_row if one is not None) for of_row in ids]


if __name__ == "__main__":
    run_script(main)
