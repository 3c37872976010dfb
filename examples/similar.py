"""
Find the sounds of a folder that are most similar to a query, with sentence-transformers.

    python examples/similar.py MODEL FOLDER QUERY --top_k 5 --picture similar.png

Sounds are compared by the cosine of their embeddings; the query itself is left out if it is in the folder. Unreadable
files are reported and skipped. MODEL is the folder or Hub name of any saved model; an encoder is best.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from asit_hf import ASiTFeatureExtractor
from asit_hf.data import AudioReadError, find_audio_files, read_audio
from asit_hf.loading import load_config, resolve_checkpoint
from asit_hf.utils.arguments import run_script
from asit_hf.utils.extras import extra

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


def draw(sounds: dict[str, Path], extractor: ASiTFeatureExtractor, picture: Path) -> None:
    """Log-mel spectrograms of the first seconds of each sound, by title."""
    with extra("train"):
        from asit_hf.plotting import plot_log_mels

    clips = [read_audio(file, extractor.sampling_rate, duration=SECONDS) for file in sounds.values()]
    features = extractor(clips, extractor.sampling_rate, padding=False)["input_values"]
    plot_log_mels(dict(zip(sounds, features))).savefig(picture, dpi=100)


def main(arguments: list[str] | None = None) -> list[tuple[Path, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub name of a saved model")
    parser.add_argument("folder", type=Path, help="folder of audio, searched with its subfolders")
    parser.add_argument("query", type=Path, help="audio file to compare with")
    parser.add_argument("--top_k", type=int, default=5, help="number of sounds to show (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, help="sounds per batch (default: %(default)s)")
    parser.add_argument(
        "--picture", type=Path, help=f"png file for the log-mel of the first {SECONDS} s of each sound"
    )
    args = parser.parse_args(arguments)
    for name in ("top_k", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if not args.query.is_file():
        parser.error(f"no such file: {args.query}")
    files = [file for file in find_audio_files(args.folder) if file.resolve() != args.query.resolve()]
    if not files:
        parser.error(f"expected other sounds in {args.folder} than the query")
    with extra("sentence-transformers"):
        from sentence_transformers import SentenceTransformer
    load_config(args.model)  # its error is one line if there is no such model
    model = SentenceTransformer(str(resolve_checkpoint(args.model)))
    _, (query,) = embed_sounds(model, [args.query])
    files, embeddings = embed_sounds(model, files, args.batch_size)
    found = [(files[row], float(cosine)) for row, cosine in zip(*nearest(embeddings, query, args.top_k))]
    names = {file: file.relative_to(args.folder) for file, _ in found}
    for file, cosine in found:
        print(f"{cosine:.3f}  {names[file]}")
    if args.picture is not None:
        titles = {f"query: {args.query.name}": args.query} | {f"{one:.3f}  {names[file]}": file for file, one in found}
        draw(titles, model[0].processor, args.picture)
    return found


if __name__ == "__main__":
    run_script(main)
