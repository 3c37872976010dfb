"""
Mean and standard deviation of a data set's log-mel values: what `--mean` and `--std` of the other scripts take.

    python -m examples.tools.normalization_statistics FOLDER
    python -m examples.tools.normalization_statistics ESC-50 --corpus esc50 --filter fold=1,2,3,4
    python -m examples.tools.normalization_statistics HUB_NAME --split train --streaming --max_clips 5000

One clip is in memory at a time. Clips that cannot be read are counted and reported.
"""

import argparse
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from asit_hf.data import (
    CORPORA,
    AudioReadError,
    LabelledClips,
    filter_rows,
    load_audio_dataset,
    load_corpus,
    read_audio,
)
from asit_hf.data.statistics import log_mel_statistics

logger = logging.getLogger(__name__)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder, csv or json manifest, parquet, or Hub data set")
    parser.add_argument("--corpus", choices=tuple(CORPORA), help="the source is the root of such a data set")
    parser.add_argument("--split")
    parser.add_argument(
        "--filter", nargs="+", default=[], metavar="COLUMN=V1,V2", help="keep the rows with these values"
    )
    parser.add_argument("--audio_column")
    parser.add_argument("--root", help="folder that a manifest's paths are relative to")
    parser.add_argument("--streaming", action="store_true", help="read the data as a stream")
    parser.add_argument("--max_clips", type=int, help="use so many clips, drawn at random; of a stream the first")
    parser.add_argument("--max_seconds", type=float, help="use only the beginning of longer clips")
    parser.add_argument("--sampling_rate", type=int, default=16000, help="in Hz; clips are resampled to it")
    parser.add_argument("--num_mel_bins", type=int, default=128)
    parser.add_argument("--num_workers", type=int, default=0, help="processes that read files; not of a stream")
    parser.add_argument("--output", help="json file to write")
    args = parser.parse_args(argv)
    if args.corpus and (args.audio_column or args.root or args.streaming):
        parser.error("a --corpus knows its files: leave out --audio_column, --root and --streaming")
    return args


def load(args: argparse.Namespace) -> Any:
    if args.corpus:
        dataset = load_corpus(args.corpus, args.source, args.split)
    else:
        dataset = load_audio_dataset(
            args.source, args.split, args.audio_column, streaming=args.streaming, root=args.root
        )
    dataset = filter_rows(dataset, args.filter)
    if args.max_clips is None:
        return dataset
    if args.streaming:
        return dataset.take(args.max_clips)
    return dataset.shuffle(seed=0).select(range(min(args.max_clips, len(dataset))))


def read(dataset: Any, args: argparse.Namespace, bad_files: list[tuple[str, str]]) -> Iterator:
    """Waveforms of the clips that can be read; the others are put into `bad_files`."""
    if args.streaming:
        for row in tqdm(dataset, unit="clip"):
            try:
                yield read_audio(row["audio"], args.sampling_rate, duration=args.max_seconds)
            except AudioReadError as error:
                bad_files.append((error.source, error.reason))
        return
    clips = LabelledClips(dataset.select_columns("audio"), args.sampling_rate, args.max_seconds, strict=False)
    for item in tqdm(DataLoader(clips, batch_size=None, num_workers=args.num_workers), unit="clip"):
        if "waveform" in item:
            yield item["waveform"]
        bad_files += item.get("bad_files", [])


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = parse_args(argv)
    bad_files: list[tuple[str, str]] = []
    statistics = log_mel_statistics(read(load(args), args, bad_files), args.sampling_rate, args.num_mel_bins)
    for path, reason in bad_files:
        logger.warning("left out %s: %s", path, reason)
    results = {
        "mean": statistics.mean,
        "std": statistics.std,
        "clips": statistics.clips,
        "clips_left_out": len(bad_files),
        "frames": statistics.count // args.num_mel_bins,
        "sampling_rate": args.sampling_rate,
        "num_mel_bins": args.num_mel_bins,
    }
    print(
        f"--mean {statistics.mean:.7f} --std {statistics.std:.7f}   ({statistics.clips} clips, "
        f"{results['frames']} frames; {len(bad_files)} clips left out)"
    )
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
