"""
Prints the mean and standard deviation of a data set's log-mel values, for `--mean` and `--std` of the other scripts.

    python -m examples.tools.normalization_statistics --data FOLDER
    python -m examples.tools.normalization_statistics --data ESC-50 --corpus esc50 --filter fold=1,2,3,4
    python -m examples.tools.normalization_statistics --data HUB_NAME --split train --streaming --max_clips 5000

Clips are read one at a time. Unreadable clips are reported and counted.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from asit_hf.data import AudioReadError, LabelledClips, read_audio
from asit_hf.data.labelled import DatasetArguments
from asit_hf.data.statistics import log_mel_statistics
from asit_hf.utils.files import whole_file

logger = logging.getLogger(__name__)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = DatasetArguments.parser(__doc__)
    help = "keep rows with one of these values"
    parser.add_argument("--filter", nargs="+", default=[], metavar="COLUMN=V1,V2", help=help)
    parser.add_argument("--streaming", action="store_true", help="read the data as a stream")
    parser.add_argument("--max_clips", type=int, help="number of clips, drawn at random; the first ones of a stream")
    parser.add_argument("--max_seconds", type=float, help="use only the beginning of longer clips")
    parser.add_argument("--sampling_rate", type=int, default=16000, help="rate in Hz to resample to (default: 16000)")
    parser.add_argument("--num_mel_bins", type=int, default=128, help="mel bins (default: 128)")
    help = "processes that read files (default: 0, the main process)"
    parser.add_argument("--num_workers", type=int, default=0, help=help)
    parser.add_argument("--output", type=Path, help="json file to write")
    args = parser.parse_args(argv)
    if args.corpus and (args.audio_column or args.label_column or args.root or args.streaming):
        parser.error("--audio_column, --label_column, --root and --streaming cannot be used with --corpus")
    if args.streaming and args.num_workers:
        parser.error("--num_workers has no effect with --streaming, which reads in the main process")
    return args


def load(args: argparse.Namespace) -> Any:
    dataset = DatasetArguments.of(args).load_audio(args.data, args.filter, args.split, args.streaming)
    if args.max_clips is None:
        return dataset
    if args.streaming:
        return dataset.take(args.max_clips)
    return dataset.shuffle(seed=0).select(range(min(args.max_clips, len(dataset))))


def read(dataset: Any, args: argparse.Namespace, bad_files: list[tuple[str, str]]) -> Iterator:
    """Waveforms of the readable clips; (path, reason) of the others is added to `bad_files`."""
    if args.streaming:
        for row in tqdm(dataset, unit="clip"):
            try:
                yield read_audio(row["audio"], args.sampling_rate, duration=args.max_seconds)
            except AudioReadError as error:
                if args.strict:
                    raise
                bad_files.append((error.source, error.reason))
        return
    clips = LabelledClips(dataset.select_columns("audio"), args.sampling_rate, args.max_seconds, strict=args.strict)
    for item in tqdm(DataLoader(clips, batch_size=None, num_workers=args.num_workers), unit="clip"):
        if "waveform" in item:
            yield item["waveform"]
        bad_files += item.get("bad_files", [])


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = parse_args(argv)
    bad_files: list[tuple[str, str]] = []
    statistics = log_mel_statistics(read(load(args), args, bad_files), args.sampling_rate, args.num_mel_bins)
    for path, reason in bad_files:
        logger.warning("skipped %s: %s", path, reason)
    results = {
        "mean": statistics.mean,
        "std": statistics.std,
        "clips": statistics.clips,
        "unreadable_clips": len(bad_files),
        "frames": statistics.count // args.num_mel_bins,
        "sampling_rate": args.sampling_rate,
        "num_mel_bins": args.num_mel_bins,
    }
    print(
        f"--mean {statistics.mean:.7f} --std {statistics.std:.7f}   ({statistics.clips} clips, "
        f"{results['frames']} frames; {len(bad_files)} unreadable clips)"
    )
    if args.output:
        with whole_file(args.output) as unfinished:
            unfinished.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
