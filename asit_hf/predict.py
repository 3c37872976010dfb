"""Labels any amount of audio: `python -m asit_hf.predict MODEL DATA --output predictions.csv`."""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import pipeline

from .corpus.commands import (
    HELP_ON_PROCESSES,
    add_data_options,
    add_run_options,
    choose_device,
    choose_dtype,
    emit_corpus,
    run_command,
    until_output_closes,
    write_corpus,
)
from .corpus.engine import check_run_options
from .corpus.label_tables import FORMATS, LabelTables, choose_format, choose_unit
from .corpus.labels import AGGREGATES, ClipRows, LabelRows, label_rows
from .corpus.parts import process_share
from .corpus.sources import Clip, open_corpus
from .corpus.timeline import default_window_seconds
from .feature_extraction_asit import ASiTFeatureExtractor
from .loading import load_trained
from .modeling_asit import ASiTForAudioClassification
from .pipeline import SCORE_FUNCTIONS, ASiTAudioClassificationPipeline, default_function, label_windows
from .utils.files import is_file
from .utils.weights import model_hash

logger = logging.getLogger(__name__)


def load_classifier(model: str | os.PathLike, device: str = "auto") -> ASiTAudioClassificationPipeline:
    """
    The pipeline of an ASiT classifier, a folder, adapter or Hub name, on `device`: `"cpu"`, `"cuda"`, or
    `"auto"`, which takes cuda if available.

    Raises:
        FileNotFoundError: no such folder or Hub name.
        ValueError: `model` is not a trained classifier.
    """
    trained, feature_extractor = load_trained(model, ASiTForAudioClassification, dtype="auto")
    return pipeline(
        "audio-classification",
        model=trained,
        feature_extractor=feature_extractor,
        device=choose_device(device),
        pipeline_class=ASiTAudioClassificationPipeline,
    )


class LabelJob:
    """
    Scores of windows, for `corpus.engine.run`.

    Args:
        model, feature_extractor: of one classifier.
        labels: what the rows hold.
        window_seconds, overlap: as in [`ASiTAudioClassificationPipeline`].
        function: that gives the scores, by default that of the pipeline.
    """

    def __init__(
        self,
        model: ASiTForAudioClassification,
        feature_extractor: ASiTFeatureExtractor,
        labels: LabelRows,
        window_seconds: float | None = None,
        overlap: float = 0.5,
        function: str | None = None,
    ):
        self.model, self.feature_extractor, self.device = model.eval(), feature_extractor, model.device
        self.labels = labels
        self.windows = label_windows(feature_extractor.sampling_rate, window_seconds, overlap)
        self.function = SCORE_FUNCTIONS[function or default_function(model.config)]

    def forward(self, input_values: torch.Tensor, attention_mask: torch.Tensor | None, frames: list[int]) -> tuple:
        return (self.function(self.model(input_values.to(self.model.dtype), attention_mask).logits.float()),)

    def rows(self, clip: Clip) -> ClipRows:
        return self.labels.clip(clip.file)


def predict_folder(
    classifier: ASiTAudioClassificationPipeline,
    folder: Any,
    batch_size: int | None = None,
    progress: bool = True,
    top_k: int | None = 5,
    function_to_apply: str | None = None,
    window_seconds: float | None = None,
    overlap: float = 0.5,
    aggregate: str = "mean",
    return_timeline: bool = False,
    threshold: float | None = None,
    num_workers: int | None = None,
) -> list[dict[str, Any]]:
    """
    Labels every audio file below `folder`. Windows of similar length share a batch, and few are in memory.

    Args:
        classifier: the pipeline, see `load_classifier`.
        folder: a folder, searched recursively, a file, or whatever [`~asit_hf.corpus.sources.open_corpus`] opens.
        batch_size, num_workers: see `corpus.engine.run`.
        progress (`bool`, defaults to `True`): whether to show a progress bar.
        top_k, function_to_apply, window_seconds, overlap, aggregate, return_timeline: as in the pipeline.
        threshold (`float`, *optional*): leave out labels with a lower score.

    Returns:
        One dict per clip, in order, with its name, `"file"`, relative to the folder (see `path_text`). It has
        `"labels"`, a list of `{"label", "score"}`, and with `return_timeline` a `"timeline"`; or an `"error"`.

    Raises:
        FileNotFoundError: no such folder, or no audio in it.
        ValueError: an option out of range.
    """
    check_run_options(batch_size, num_workers)
    config = classifier.model.config
    function = function_to_apply or default_function(config)
    unit = "timeline" if return_timeline else "clip"
    labels = label_rows(_names(config), function, unit, top_k, threshold, aggregate)
    job = LabelJob(classifier.model, classifier.feature_extractor, labels, window_seconds, overlap, function)
    predictions: list[dict[str, Any]] = []
    emit_corpus(job, open_corpus(folder, labels=False), predictions.extend, batch_size, num_workers, progress)
    return predictions


def _names(config: Any) -> list[str]:
    return [config.id2label[index] for index in range(config.num_labels)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m asit_hf.predict", description=__doc__.split(":")[0] + ".", epilog=HELP_ON_PROCESSES
    )
    add = parser.add_argument
    add("model", help="folder or Hub name of an ASiT classifier")
    add_data_options(parser)
    output = "file with the extension of its format, or folder of parts that several processes share "
    add("--output", type=Path, help=output + "(default: csv to standard output)")
    formats = "table format (default: by the extension of the file, or else csv); raven, audacity: events of each clip"
    add("--format", choices=FORMATS, help=formats)
    add("--top_k", type=int, help="labels per clip or window (default: 5; for events 1, or all of multi-label models)")
    add("--threshold", type=float, help="lowest score (default: none; 0.5 for events of multi-label models)")
    windows = "window length for longer clips (default: 30; for events that of the training crops, at least 1)"
    add("--window_seconds", type=float, help=windows)
    add("--overlap", type=float, default=0.5, help="overlap of windows, [0, 1) (default: %(default)s)")
    aggregate = "combination of window scores in a clip or event (default: %(default)s)"
    add("--aggregate", choices=AGGREGATES, default="mean", help=aggregate)
    unit = parser.add_mutually_exclusive_group()
    unit.add_argument("--timeline", action="store_true", help="rows for each window instead of each clip")
    unit.add_argument("--events", action="store_true", help="rows for events: neighboring windows with the same label")
    add_run_options(parser)
    return parser


def _run(args: argparse.Namespace) -> int:
    data = args.data[0] if len(args.data) == 1 else args.data
    corpus = open_corpus(data, args.split, args.audio_column, root=args.root, labels=False)
    format = choose_format(args.output, args.format, corpus.num_clips)
    unit = choose_unit(format, args.timeline, args.events)
    device = choose_device(args.device)
    model, feature_extractor = load_trained(
        args.model, ASiTForAudioClassification, dtype=choose_dtype(args.dtype, device)
    )
    top_k = "auto" if args.top_k is None else args.top_k
    labels = label_rows(
        _names(model.config), default_function(model.config), unit, top_k, args.threshold, args.aggregate
    )
    if unit == "event" and args.window_seconds is None:
        args.window_seconds = default_window_seconds(model.config)
        what = "events are joined from windows of %g s, the length of the training crops but at least 1 s; "
        what += "to change that, set --window_seconds"
        logger.warning(what, args.window_seconds)
    job = LabelJob(model.to(device), feature_extractor, labels, args.window_seconds, args.overlap)
    if args.output is None:
        if (world_size := process_share()[1]) > 1:
            raise ValueError(f"expected a folder as --output for the parts of {world_size} processes, got none")
        if hasattr(sys.stdout, "reconfigure"):  # names and labels may have characters that a terminal lacks
            sys.stdout.reconfigure(errors="backslashreplace")
        counts = None
        with until_output_closes(), LabelTables(format, unit).open(sys.stdout) as table:
            counts = emit_corpus(job, corpus, table.write, args.batch_size, args.num_workers)
        if counts is None:  # the output was closed before the end
            return 0
    else:
        tables = LabelTables(
            format, unit, None if is_file(args.output) else args.output, feature_extractor.sampling_rate / 2
        )
        names = ("model", "split", "audio_column", "root", "window_seconds", "overlap", "aggregate")
        settings = {"command": "predict", "format": format, "unit": unit, "model_hash": model_hash(model, whole=True)}
        settings |= {"top_k": labels.top_k, "threshold": labels.threshold} | {
            name: getattr(args, name) for name in names
        }
        settings["dtype"] = str(model.dtype).removeprefix("torch.")
        run_options = args.batch_size, args.num_workers, args.part_clips
        counts = write_corpus(job, corpus, args.output, tables, settings, *run_options)
    print(
        f"{counts['clips'] - counts['unreadable']} files classified, {counts['unreadable']} unreadable",
        file=sys.stderr,
    )
    return 1 if counts["unreadable"] and args.strict else 0


def main(arguments: list[str] | None = None) -> int:
    return run_command(_parser(), arguments, _run)


if __name__ == "__main__":
    sys.exit(main())
