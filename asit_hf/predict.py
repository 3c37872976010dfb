"""Classifies a folder of audio files: `python -m asit_hf.predict MODEL FOLDER --output predictions.csv`."""

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm.auto import tqdm
from transformers import pipeline

from .data.audio import AudioReadError, audio_info
from .data.datasets import find_audio_files
from .loading import load_trained
from .modeling_asit import ASiTForAudioClassification
from .pipeline import ASiTAudioClassificationPipeline
from .utils.files import check_writable
from .utils.names import path_text


def load_classifier(model: str | os.PathLike, device: str = "auto") -> ASiTAudioClassificationPipeline:
    """
    The pipeline of an ASiT classifier, a folder, adapter or Hub name, on `device`: `"cpu"`, `"cuda"`, or
    `"auto"`, which takes cuda if available.

    Raises:
        FileNotFoundError: no such folder or Hub name.
        ValueError: `model` is not a trained classifier.
    """
    trained, feature_extractor = load_trained(model, ASiTForAudioClassification, dtype="auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return pipeline(
        "audio-classification",
        model=trained,
        feature_extractor=feature_extractor,
        device=device,
        pipeline_class=ASiTAudioClassificationPipeline,
    )


def predict_folder(
    classifier: ASiTAudioClassificationPipeline,
    folder: str | os.PathLike,
    batch_size: int = 8,
    progress: bool = True,
    **options: Any,
) -> list[dict[str, Any]]:
    """
    Classifies every audio file below `folder`, or one file. Files of similar length share a batch, and only the
    windows of one batch are in memory.

    Args:
        classifier: the pipeline, see `load_classifier`.
        folder: a folder, searched recursively, or a file.
        batch_size (`int`, defaults to 8): windows in one forward pass.
        progress (`bool`, defaults to `True`): whether to show a progress bar.
        options: options of the pipeline: `top_k`, `window_seconds`, `overlap`, `aggregate`, `return_timeline`, ...

    Returns:
        One dict per file, sorted by `"file"`, its path relative to `folder` (see `path_text`). It has `"labels"`, a
        list of `{"score", "label"}`, and with `return_timeline` a `"timeline"`; or `"error"`, the reason.

    Raises:
        FileNotFoundError: no such folder, or no audio in it.
        ValueError: an option out of range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    folder = Path(folder)
    root, files = (folder.parent, [folder]) if folder.is_file() else (folder, find_audio_files(folder))
    predictions, seconds = {}, {}
    for file in files:
        try:
            seconds[file] = audio_info(file).duration
        except AudioReadError as error:
            predictions[file] = {"error": error.reason}
    by_length = sorted(seconds, key=lambda file: (seconds[file], file))
    with tqdm(total=len(files), initial=len(predictions), unit="file", disable=not progress) as bar:
        for start in range(0, len(by_length), batch_size):
            batch = by_length[start : start + batch_size]
            predictions.update(_classify(classifier, batch, batch_size, options))
            bar.update(len(batch))
    return [{"file": path_text(file.relative_to(root).as_posix()), **predictions[file]} for file in sorted(files)]


def _classify(
    classifier: ASiTAudioClassificationPipeline, files: list[Path], batch_size: int, options: dict[str, Any]
) -> dict[Path, dict[str, Any]]:
    """Classifies files in one batch, or one by one if a file turns out to be damaged."""
    try:
        outputs = classifier(files, batch_size=batch_size, **options)
    except AudioReadError as error:
        if len(files) == 1:
            return {files[0]: {"error": error.reason}}
        return {file: _classify(classifier, [file], batch_size, options)[file] for file in files}
    return {file: output if isinstance(output, dict) else {"labels": output} for file, output in zip(files, outputs)}


def write_predictions(predictions: list[dict[str, Any]], file: TextIO, format: str = "csv") -> None:
    """
    Writes the result of `predict_folder` as `"json"`, or as `"csv"`: one row per label (`file, rank, label, score,
    error`), best first; with a timeline, one row per window and label, with `start` and `end` in seconds.
    """
    if format == "json":
        json.dump(predictions, file, indent=2, ensure_ascii=False)
        file.write("\n")
        return
    span = ["start", "end"] if any("timeline" in prediction for prediction in predictions) else []
    writer = csv.DictWriter(file, ["file", *span, "rank", "label", "score", "error"], lineterminator="\n")
    writer.writeheader()
    for prediction in predictions:
        writer.writerows(_rows(prediction))


def _rows(prediction: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "error" in prediction:
        yield {"file": prediction["file"], "error": prediction["error"]}
        return
    for window in prediction.get("timeline", [prediction]):
        span = {name: f"{window[name]:.3f}" for name in ("start", "end") if name in window}
        for rank, label in enumerate(window["labels"], start=1):
            score = f"{label['score']:.6f}"
            yield {"file": prediction["file"], **span, "rank": rank, "label": label["label"], "score": score}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m asit_hf.predict", description=__doc__.split(":")[0])
    parser.add_argument("model", help="folder or Hub name of an ASiT classifier")
    parser.add_argument("folder", type=Path, help="folder of audio files, searched recursively, or one file")
    parser.add_argument("--output", type=Path, help=".csv or .json file to write (default: csv to standard output)")
    parser.add_argument("--top_k", type=int, default=5, help="labels per file (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="windows in one forward pass (default: %(default)s)")
    parser.add_argument("--window_seconds", type=float, help="window length for longer clips (default: 30)")
    parser.add_argument("--overlap", type=float, default=0.5, help="overlap of windows, [0, 1) (default: %(default)s)")
    parser.add_argument("--aggregate", choices=["mean", "max"], default="mean", help="combination of window scores")
    parser.add_argument("--timeline", action="store_true", help="add the labels of every window")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: cuda if available")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a file cannot be read")
    args = parser.parse_args(arguments)
    if args.output is not None and args.output.suffix not in (".csv", ".json"):
        parser.error(f"--output must end in .csv or .json, got {args.output}")
    try:
        if args.output is not None:
            check_writable(args.output)
        names = ("batch_size", "top_k", "window_seconds", "overlap", "aggregate")
        options = {name: getattr(args, name) for name in names}
        classifier = load_classifier(args.model, args.device)
        predictions = predict_folder(classifier, args.folder, return_timeline=args.timeline, **options)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.output is None:
        if hasattr(sys.stdout, "reconfigure"):  # names and labels may have characters that a terminal lacks
            sys.stdout.reconfigure(errors="backslashreplace")
        write_predictions(predictions, sys.stdout)
    else:
        with args.output.open("w", newline="", encoding="utf-8") as file:
            write_predictions(predictions, file, args.output.suffix[1:])
    failed = [prediction for prediction in predictions if "error" in prediction]
    for prediction in failed:
        print(f"cannot read {prediction['file']}: {prediction['error']}", file=sys.stderr)
    print(f"{len(predictions) - len(failed)} files classified, {len(failed)} unreadable", file=sys.stderr)
    return 1 if failed and args.strict else 0


if __name__ == "__main__":
    sys.exit(main())
