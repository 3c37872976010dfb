"""Labels sound as it comes, from a microphone, a pipe or a file: `python -m asit_hf.listen MODEL [SOURCE]`."""

import argparse
import csv
import json
import logging
import math
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from io import FileIO
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

import numpy as np

from .corpus.commands import until_output_closes
from .corpus.timeline import EVENT_THRESHOLDS, Timeline, default_window_seconds
from .data.audio import AudioReadError
from .data.live import SAMPLE_FORMATS, microphones, play, read_pcm, record, rolling_windows
from .fbank_asit import WINDOW_SECONDS, whole_rate
from .pipeline import ASiTAudioClassificationPipeline
from .predict import load_classifier
from .utils.files import check_writable

logger = logging.getLogger(__name__)

_SOURCE_OPTIONS = {
    "speed": ("a file",),
    "microphone": ("the microphone",),
    "sampling_rate": ("the microphone", "standard input"),
    "channels": ("the microphone", "standard input"),
    "sample_format": ("standard input",),
}


def listen(
    classifier: ASiTAudioClassificationPipeline,
    chunks: Iterable[Any],
    sampling_rate: int | None = None,
    window_seconds: float | None = None,
    hop_seconds: float | None = None,
    smoothing: int = 1,
    live: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[dict[str, Any]]:
    """
    Labels windows of audio while it arrives. They are the windows of `classifier(audio, window_seconds=...,
    overlap=1 - hop_seconds / window_seconds, return_timeline=True)`, with the same scores: the last one ends with the
    audio, and audio that is shorter than a window is one window.

    ```python
    >>> from asit_hf.data.live import record
    >>> from asit_hf.listen import listen
    >>> from asit_hf.predict import load_classifier

    >>> rate, chunks = record(16000)
    >>> for window in listen(load_classifier("path/to/asit"), chunks, rate):
    ...     print(window["end"], window["labels"][0])
    ```

    Args:
        classifier: the pipeline, see `asit_hf.predict.load_classifier`.
        chunks: waveforms `(samples,)` of any length, arrays or tensors of floats or integers.
        sampling_rate (`int`, *optional*): of the chunks, in Hz; default: the model's. Others are resampled.
        window_seconds (`float`, *optional*): default: the length of the training crops, at least 1 s.
        hop_seconds (`float`, *optional*): from the start of a window to that of the next; default: half a window.
        smoothing (`int`, defaults to 1): number of latest windows over which scores are averaged.
        live (`bool`, defaults to `True`): a thread reads `chunks`, and windows that have waited for more than 3 s are
            skipped, up to the newest, and so are those that have waited for two hops if a window takes longer than a
            hop; but chunks that arrive faster than real time wait. Otherwise all chunks wait.
        clock: the time in seconds.

    Yields:
        dicts of `start` and `end` in seconds from the beginning, `labels`, all as `{"score", "label"}`, best first,
        `latency`, the seconds from the arrival of the chunk with the window's end to its labels, without the time for
        which chunks wait, and `skipped`, the number of windows skipped before this one.

    Raises:
        AudioReadError: no samples, or whatever `chunks` raises.
        ValueError: an option out of range, or a chunk that is not audio.
    """
    rate = classifier.feature_extractor.sampling_rate
    window_seconds = default_window_seconds(classifier.model.config) if window_seconds is None else window_seconds
    hop_seconds = window_seconds / 2 if hop_seconds is None else hop_seconds
    if not WINDOW_SECONDS <= window_seconds < math.inf:
        raise ValueError(f"window_seconds must be at least {WINDOW_SECONDS}, got {window_seconds}")
    if not 0 < hop_seconds <= window_seconds:
        raise ValueError(f"hop_seconds must be above 0 and at most a window ({window_seconds}), got {hop_seconds}")
    if smoothing < 1:
        raise ValueError(f"smoothing must be at least 1 window, got {smoothing}")
    window, hop = round(window_seconds * rate), max(1, round(hop_seconds * rate))
    scores: deque[dict[str, float]] = deque(maxlen=smoothing)

    def classify(waveform: np.ndarray) -> list[dict[str, Any]]:
        return classifier({"array": waveform, "sampling_rate": rate}, window_seconds=window / rate, top_k=None)

    if live:
        classify(np.zeros(window, np.float32))  # the first forward pass is slower than the others
    silent, chunk_rate = False, rate if sampling_rate is None else whole_rate(sampling_rate)
    for start, waveform, arrived, skipped in rolling_windows(chunks, chunk_rate, rate, window, hop, live, clock):
        if not silent and not waveform.any():
            message = "the window at %.2f s is digital silence, whose labels mean nothing: is the microphone muted?"
            logger.warning(message, start / rate)
            silent = True
        labels = classify(waveform)
        if smoothing > 1:
            scores.append({one["label"]: one["score"] for one in labels})
            means = {label: sum(one[label] for one in scores) / len(scores) for label in scores[0]}
            labels = [{"score": means[label], "label": label} for label in sorted(means, key=means.get, reverse=True)]
        span = {"start": start / rate, "end": (start + len(waveform)) / rate}
        yield {**span, "labels": labels, "latency": clock() - arrived, "skipped": skipped}


@contextmanager
def window_writer(path: Path | None, top_k: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """
    A function that adds a window to a .csv or .jsonl file, in which it is complete when the function returns: a csv
    row for each label (`start, end, rank, label, score`), or a json object of `start`, `end`, `latency` and `labels`.
    """
    if path is None:
        yield lambda window: None
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        if path.suffix == ".csv":
            rows.writerow(["start", "end", "rank", "label", "score"])

        def write(window: dict[str, Any]) -> None:
            labels, span = window["labels"][:top_k], [f"{window[name]:.3f}" for name in ("start", "end")]
            if path.suffix == ".csv":
                rows.writerows(
                    [*span, rank, one["label"], f"{one['score']:.6f}"] for rank, one in enumerate(labels, start=1)
                )
            else:
                kept = {name: window[name] for name in ("start", "end", "latency")}
                file.write(json.dumps({**kept, "labels": labels}, ensure_ascii=False) + "\n")
            file.flush()

        yield write


def _clock_text(seconds: float) -> str:
    minutes, hundredths = divmod(round(100 * seconds), 6000)
    return f"{minutes // 60}:{minutes % 60:02}:{hundredths / 100:05.2f}"


class _ListMicrophones(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        try:
            devices = microphones()
        except (OSError, ImportError) as error:
            parser.exit(1, f"error: {error}\n")
        for one in devices:
            print(f"{one['index']:3} {one['name']} ({one['max_input_channels']} channels)")
        parser.exit(0 if devices else 1, "" if devices else "no microphones\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m asit_hf.listen",
        description="Prints a line when the label of a sound changes, and a timeline at its end or after Ctrl-C.",
    )
    add = parser.add_argument
    add("model", help="folder or Hub name of an ASiT classifier")
    add("source", nargs="?", help="audio file, or - for samples on standard input (default: the microphone)")
    add("--window_seconds", type=float, help="window length (default: that of the training crops, at least 1)")
    add("--hop_seconds", type=float, help="time from one window to the next (default: half a window)")
    add("--threshold", type=float, help="lowest score of a label (default: 0; 0.5 for a multi-label classifier)")
    add("--smoothing", type=int, default=1, help="windows over which scores are averaged (default: %(default)s)")
    add("--output", type=Path, help=".csv or .jsonl file of all windows, complete up to the last one at any time")
    add("--top_k", type=int, help="labels per window in the output file (default: 5)")
    add("--speed", type=float, help="speed of a file; inf: as fast as possible (default: 1, real time)")
    add("--microphone", help="number of a microphone or part of its name (default: the system's)")
    add("--list_microphones", action=_ListMicrophones, nargs=0, help="print the microphones and exit")
    add("--sampling_rate", type=int, help="rate of the microphone or standard input in Hz (default: the model's)")
    add("--channels", type=int, help="channels of the microphone or standard input, averaged (default: 1)")
    formats = "samples of standard input without a wav header, named as in ffmpeg (default: s16le)"
    add("--sample_format", choices=list(SAMPLE_FORMATS), help=formats)
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: cuda if available")
    return parser


def _check(args: argparse.Namespace) -> None:
    if args.output is not None and args.output.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"--output must end in .csv or .jsonl, got {args.output}")
    if args.top_k is not None and args.output is None:
        raise ValueError(f"--top_k is for the file of --output, got {args.top_k} without one")
    source = {None: "the microphone", "-": "standard input"}.get(args.source, "a file")
    for name, sources in _SOURCE_OPTIONS.items():
        if getattr(args, name) is not None and source not in sources:
            raise ValueError(f"--{name} is for {' or '.join(sources)}, got {source}, {args.source}")
    for name in ("channels", "top_k", "smoothing"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if args.speed is not None and not args.speed > 0:
        raise ValueError(f"--speed must be above 0, got {args.speed}")
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold must be in [0, 1], got {args.threshold}")
    if args.sampling_rate is not None:
        whole_rate(args.sampling_rate)


def _open_source(args: argparse.Namespace, rate: int) -> tuple[int, Iterator[np.ndarray], bool]:
    """Rate in Hz, chunks, and whether they are live."""
    preferred, channels = args.sampling_rate or rate, args.channels or 1
    if args.source is None:
        name = args.microphone
        return *record(preferred, int(name) if name and name.isdecimal() else name, channels), True
    if args.source != "-":
        speed = args.speed or 1.0
        return rate, play(args.source, rate, speed), speed < math.inf
    if sys.stdin is None or sys.stdin.isatty():
        raise AudioReadError("standard input", "expected a pipe of samples, got a terminal")
    pipe = FileIO(sys.stdin.fileno(), closefd=False)  # a buffered file's lock would be kept by a waiting thread
    return *read_pcm(pipe.read, preferred, channels, args.sample_format or "s16le"), True


def _show_change(time: float, begun: dict[str, float], ended: list[str], multi_label: bool) -> None:
    for label in ended if multi_label else []:
        print(f"{_clock_text(time)}        - {label}", flush=True)
    for label, score in begun.items():
        print(f"{_clock_text(time)}  {score:.2f}  {'+ ' if multi_label else ''}{label}", flush=True)
    if ended and not begun and not multi_label:
        print(f"{_clock_text(time)}        -", flush=True)


def _skip_message(window: dict[str, Any], hop_seconds: float) -> str:
    what = f"slower than real time: {window['skipped']} windows before that at {window['start']:.2f} s are skipped"
    late = f"its labels come {window['latency']:.2f} s late, a new window every {hop_seconds:.2f} s"
    return f"{what}; {late}: a longer --hop_seconds or a shorter --window_seconds takes less time"


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    if current_thread() is not main_thread():  # which alone may handle signals
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("asit_hf").setLevel(logging.INFO)
    if hasattr(sys.stdout, "reconfigure"):  # labels may have characters that a terminal lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _terminated_as_interrupted():
            return _run(args)
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    _check(args)
    if args.output is not None:
        check_writable(args.output)
    classifier = load_classifier(args.model, args.device)
    problem_type = classifier.model.config.problem_type
    if problem_type == "regression" or (problem_type is None and classifier.model.config.num_labels == 1):
        raise ValueError(f"expected a classifier with labels, got a regression model: {args.model}")
    multi_label = problem_type == "multi_label_classification"
    threshold = EVENT_THRESHOLDS["sigmoid" if multi_label else "softmax"]
    timeline = Timeline(threshold if args.threshold is None else args.threshold, None if multi_label else 1)
    window_seconds = (
        default_window_seconds(classifier.model.config) if args.window_seconds is None else args.window_seconds
    )
    hop_seconds = window_seconds / 2 if args.hop_seconds is None else args.hop_seconds
    sampling_rate, chunks, live = _open_source(args, classifier.feature_extractor.sampling_rate)
    windows = listen(classifier, chunks, sampling_rate, window_seconds, hop_seconds, args.smoothing, live)
    latencies, skipped, failure = [], 0, None
    try:
        with until_output_closes(), window_writer(args.output, args.top_k or 5) as write, closing(windows):
            for window in windows:
                write(window)
                if window["skipped"] and not skipped:
                    logger.warning(_skip_message(window, hop_seconds))
                latencies.append(window["latency"])
                skipped += window["skipped"]
                _show_change(*timeline.add(window), multi_label)
    except KeyboardInterrupt:
        pass
    except (OSError, ValueError) as error:
        failure = error
    with until_output_closes():
        if spans := timeline.finish():
            print("timeline:")
        for span in spans:
            times = f"{_clock_text(span['start'])} - {_clock_text(span['end'])}"
            print(f"{times}  {span['score']:.2f}  {span['label']}", flush=True)
    summary = f"{len(latencies)} windows of {window_seconds:g} s, one every {hop_seconds:g} s; {skipped} skipped"
    if latencies:
        milliseconds = [1000 * value for value in (*np.percentile(latencies, [50, 95]), max(latencies))]
        what = "from a window's end to its labels" if live else "per window"
        summary += "; {}: median {:.0f} ms, 95th percentile {:.0f} ms, longest {:.0f} ms".format(what, *milliseconds)
    print(summary, file=sys.stderr)
    if failure is not None:
        raise failure
    return 0


if __name__ == "__main__":
    sys.exit(main())
