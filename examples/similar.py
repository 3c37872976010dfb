"""
Find the sounds that are most similar to a query: in a folder, with sentence-transformers, or in a table of embeddings.

    python examples/similar.py MODEL FOLDER QUERY --top_k 5 --picture similar.png
    python examples/similar.py --embeddings FOLDER_OR_FILE.parquet --query QUERY --top_k 5

Sounds are compared by the cosine of their embeddings; the query itself is left out if it is among them. Unreadable
files are reported and skipped. MODEL is the folder or Hub name of any saved model; an encoder is best.

Tables are those of `python -m asit_hf.embed`, of clips, windows or time patches, of any size: some megabytes are in
memory at a time. The query is embedded by the model that made the table, with the same settings, and pooled over its
own windows; MODEL says where that model is now if it has moved.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm.auto import tqdm

from asit_hf import ASiTFeatureExtractor
from asit_hf.corpus.embeddings import EmbeddingSettings, iter_embeddings, read_settings
from asit_hf.data import AudioReadError, find_audio_files, read_audio
from asit_hf.evaluation.embeddings import embed_files
from asit_hf.loading import load_config, load_encoder, load_feature_extractor, resolve_checkpoint
from asit_hf.utils.arguments import run_script
from asit_hf.utils.extras import extra
from asit_hf.utils.names import local_path
from asit_hf.utils.weights import model_hash

if TYPE_CHECKING:  # slow to import
    from sentence_transformers import SentenceTransformer

SECONDS = 10  # of each sound in the picture


def embed_sounds(
    model: "SentenceTransformer", files: Sequence[Path], batch_size: int = 16
) -> tuple[list[Path], np.ndarray]:
    """The readable files, and their embeddings `(files, dim)` of length 1; a `ValueError` if there are none."""
    rate, kept, embeddings = model[0].processor.sampling_rate, [], []
    for start in tqdm(range(0, len(files), batch_size), desc="Embedding", unit="batch"):
        clips = []
        for file in files[start : start + batch_size]:
            try:
                clips.append({"array": read_audio(file, rate), "sampling_rate": rate})
                kept.append(file)
            except AudioReadError as error:
                tqdm.write(f"skipped: {error}")
        if clips:
            embeddings.append(model.encode(clips, batch_size=batch_size, normalize_embeddings=True))
    if not kept:
        raise ValueError(f"expected readable audio, got {len(files)} unreadable files")
    return kept, np.concatenate(embeddings)


def nearest(embeddings: np.ndarray, query: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and cosines of the `top_k` embeddings `(rows, dim)` that are nearest to `query`, `(dim,)`, best first."""
    cosines = embeddings @ query
    order = np.argsort(-cosines, kind="stable")[:top_k]
    return order, cosines[order]


def nearest_by_faiss(embeddings: np.ndarray, query: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """As `nearest`, with the exact search of faiss."""
    with extra("faiss"):
        import faiss
    cosines, rows = faiss.knn(query[None], embeddings, min(top_k, len(embeddings)), metric=faiss.METRIC_INNER_PRODUCT)
    return rows[0], cosines[0]


def nearest_by_sklearn(embeddings: np.ndarray, query: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """As `nearest`, with the exact search of scikit-learn."""
    with extra("train"):
        from sklearn.neighbors import NearestNeighbors
    neighbors = NearestNeighbors(n_neighbors=min(top_k, len(embeddings)), metric="cosine", algorithm="brute")
    distances, rows = neighbors.fit(embeddings).kneighbors(query[None])
    return rows[0], 1 - distances[0]


SEARCHES = {"faiss": nearest_by_faiss, "sklearn": nearest_by_sklearn}


@dataclass(frozen=True)
class Found:
    """
    A sound that was found: its `name` in the folder or table, its `path` if it is still there, its `cosine` with the
    query and, in tables of windows or time patches, its `start` and `end` in the file, in seconds.
    """

    name: str
    path: Path | None
    cosine: float
    start: float = 0.0
    end: float | None = None

    def __str__(self) -> str:
        return f"{self.cosine:.3f}  {self.name}" + ("" if self.end is None else f"  {self.start:.2f}-{self.end:.2f} s")


def search_folder(model_name: str, folder: Path, query: Path, top_k: int, batch_size: int = 16) -> list[Found]:
    """The sounds of a folder that are nearest to the sound `query`, best first; it is an error if there are none."""
    files = [file for file in find_audio_files(folder) if file.resolve() != query.resolve()]
    if not files:
        raise ValueError(f"expected other sounds in {folder} than the query")
    with extra("sentence-transformers"):
        from sentence_transformers import SentenceTransformer
    load_config(model_name)  # its error is one line if there is no such model
    model = SentenceTransformer(str(resolve_checkpoint(model_name)))
    _, (embedding,) = embed_sounds(model, [query])
    files, embeddings = embed_sounds(model, files, batch_size)
    rows_and_cosines = zip(*nearest(embeddings, embedding, top_k))
    return [Found(str(files[row].relative_to(folder)), files[row], float(cosine)) for row, cosine in rows_and_cosines]


def search_table(
    table: Path, query: Path, top_k: int, search: Callable = nearest, model: str | None = None
) -> list[Found]:
    """
    The rows of a table, a file or a folder of parts, that are nearest to the sound `query`, best first.

    Args:
        query: the sound. Rows of the same file are left out.
        search: `nearest`, or one of `SEARCHES`.
        model: see `embed_query`, which also lists errors.
    """
    settings = read_settings(table)
    if settings is None:
        raise ValueError(f"{table}: expected the settings that python -m asit_hf.embed writes, got none")
    embedding, found = embed_query(settings, query, model), []
    for rows in tqdm(iter_embeddings(table), desc="Searching", unit="block"):
        is_query = {name: query.resolve() in paths(name, settings, query.name) for name in set(rows.files)}
        others = np.array([row for row, name in enumerate(rows.files) if not is_query[name]], int)
        if not len(others):
            continue
        matrix = rows.matrix[others]
        matrix /= np.maximum(np.sqrt(np.einsum("ij,ij->i", matrix, matrix)), 1e-12)[:, None]
        places, cosines = search(matrix, embedding, top_k)
        for row, cosine in zip(others[places], cosines):
            seconds = () if settings.rows == "clip" else (float(rows.starts[row]), float(rows.ends[row]))
            found.append(Found(rows.files[row], None, float(cosine), *seconds))
        found = sorted(found, key=lambda one: -one.cosine)[:top_k]
    return [replace(one, path=next(filter(Path.is_file, paths(one.name, settings)), None)) for one in found]


def embed_query(settings: EmbeddingSettings, query: Path, model: str | None = None) -> np.ndarray:
    """
    The embedding `(dim,)` of a sound, of length 1, by the model and with the settings that made a table.

    Raises:
        AudioReadError: `query` cannot be read.
        ValueError: the encoder of `model`, by default of the path or name in `settings`, has other weights.
    """
    model = model or settings.model
    encoder = load_encoder(model, settings.encoder, dtype=getattr(torch, settings.dtype))
    if (got := model_hash(encoder)) != settings.model_hash:
        raise ValueError(f"{model}: expected the encoder of the table, with hash {settings.model_hash}, got {got}")
    names = ("pooling", "num_layers", "window_seconds", "max_seconds")
    options = {name: getattr(settings, name) for name in names}
    (embedded,) = embed_files(encoder, load_feature_extractor(model), [query], **options)
    if isinstance(embedded, AudioReadError):
        raise embedded
    embedding = embedded.timestamps.mean(0) if settings.rows == "time_patch" else embedded.scene
    return embedding / np.linalg.norm(embedding)


def paths(name: str, settings: EmbeddingSettings, only: str | None = None) -> list[Path]:
    """Where a file of a table may be: at `name`, or relative to the folder or manifest; none if not called `only`."""
    path, data = Path(local_path(name)), Path(local_path(settings.data))
    return [] if only not in (None, path.name) else [(one / path).resolve() for one in (Path(), data, data.parent)]


def draw(sounds: dict[str, tuple[Path, float, float]], extractor: ASiTFeatureExtractor, picture: Path) -> None:
    """Log-mel spectrograms of each sound, given by title as file, start and seconds."""
    with extra("train"):
        from asit_hf.plotting import plot_log_mels

    clips = [read_audio(file, extractor.sampling_rate, *seconds) for file, *seconds in sounds.values()]
    features = extractor(clips, extractor.sampling_rate, padding=False)["input_values"]
    plot_log_mels(dict(zip(sounds, features))).savefig(picture, dpi=100)


def main(arguments: list[str] | None = None) -> list[Found]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder or Hub name of a saved model")
    parser.add_argument("folder", nargs="?", type=Path, help="folder of audio, searched with its subfolders")
    parser.add_argument("sound", nargs="?", metavar="query", type=Path, help="audio file to compare with")
    parser.add_argument("--query", type=Path, help="audio file to compare with")
    parser.add_argument(
        "--embeddings", type=Path, help="table to search instead of a folder: a parquet file or a folder of parts"
    )
    parser.add_argument(
        "--index", choices=SEARCHES, help="search in tables (default: faiss if it is installed, or else sklearn)"
    )
    parser.add_argument("--top_k", type=int, default=5, help="number of sounds to show (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, help="sounds of the folder per batch (default: 16)")
    parser.add_argument(
        "--picture", type=Path, help=f"png file for the log-mel of the first {SECONDS} s of each sound"
    )
    args = parser.parse_args(arguments)
    for name in ("top_k", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    query = args.sound or args.query
    if query is None or (args.sound and args.query):
        parser.error(f"expected one query, got {'none' if query is None else f'{args.sound} and {args.query}'}")
    if not query.is_file():
        parser.error(f"no such file: {query}")
    if args.embeddings is None:
        if args.folder is None:
            parser.error("expected MODEL and FOLDER, or --embeddings")
        if args.index is not None:
            parser.error("--index has no effect without --embeddings")
        found = search_folder(args.model, args.folder, query, args.top_k, args.batch_size or 16)
    else:
        for name in ("folder", "batch_size"):
            if (value := getattr(args, name)) is not None:
                parser.error(f"{name} has no effect with --embeddings, got {value}")
        index = args.index or ("faiss" if find_spec("faiss") else "sklearn")
        print(f"nearest neighbors by {index}")
        found = search_table(args.embeddings, query, args.top_k, SEARCHES[index], args.model)
    for one in found:
        print(one)
    if args.picture is not None:
        if lost := [one.name for one in found if one.path is None]:
            raise FileNotFoundError(f"expected all {len(found)} sounds for a picture, but {lost[0]} is not there")
        sounds = {f"query: {query.name}": (query, 0.0, SECONDS)}
        sounds |= {str(one): (one.path, one.start, min(SECONDS, (one.end or SECONDS) - one.start)) for one in found}
        draw(sounds, load_feature_extractor(args.model or read_settings(args.embeddings).model), args.picture)
    return found


if __name__ == "__main__":
    run_script(main)
