"""
Pretrain on a folder in which a tenth of the files are damaged or unusual; every unreadable file is reported once.

    python examples/benchmarks/damaged_files.py --output_dir runs/damaged_files

Writes 1000 short files, pretrains a tiny model on them for an epoch with 0 and 2 loader workers, and checks that clips
trained on + files in `bad_files.jsonl` = files in the folder, and that `strict` runs stop at an unreadable file. The
exit status is 1 if a check fails.
"""

import argparse
import io
import json
import math
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import torch
from training_step import TOY, build_trainer

from asit_hf import ASiTConfig, ASiTForPreTraining
from asit_hf.data import AudioReadError, PretrainingCrops, load_audio_dataset
from asit_hf.pretraining.trainer import ASiTPreTrainer

RATE = 16000
# A crop is as long as the longest clip, so that every crop reads the whole file, including its damage.
CROP_SECONDS = 0.5


def sound(generator: np.random.Generator, rate: int = RATE) -> np.ndarray:
    time = np.arange(round(rate * generator.uniform(0.3, CROP_SECONDS))) / rate
    return 0.3 * np.sin(2 * np.pi * generator.uniform(100, 2000) * time) + 0.02 * generator.standard_normal(len(time))


def encode(samples: np.ndarray, rate: int = RATE, format: str = "WAV", subtype: str | None = None) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, samples, rate, subtype, format=format)
    return content.getvalue()


def with_nan(samples: np.ndarray) -> np.ndarray:
    samples[len(samples) // 2] = np.nan
    return samples


def halved(content: bytes) -> bytes:
    return content[: len(content) // 2]


def with_junk(content: bytes, place: int, generator: np.random.Generator) -> bytes:
    return content[:place] + generator.bytes(300) + content[place:]


# Kinds of damaged or unusual files: extension, whether it can be read, and content.
KINDS: dict[str, tuple[str, bool, Callable[[np.random.Generator], bytes]]] = {
    "truncated wav": (".wav", False, lambda g: halved(encode(sound(g)))),
    "truncated flac": (".flac", False, lambda g: halved(encode(sound(g), format="FLAC"))),
    "zero bytes": (".wav", False, lambda g: b""),
    "random bytes": (".wav", False, lambda g: g.bytes(4000)),
    "random bytes as mp3": (".mp3", False, lambda g: g.bytes(4000)),
    "text as ogg": (".ogg", False, lambda g: b"not found\n" * 50),
    "zero samples": (".wav", False, lambda g: encode(np.zeros(0))),
    "NaN samples": (".wav", False, lambda g: encode(with_nan(sound(g)), subtype="FLOAT")),
    "zeros after half a flac": (".flac", False, lambda g: halved(encode(sound(g), format="FLAC")) + bytes(3000)),
    "flac as wav": (".wav", True, lambda g: encode(sound(g), format="FLAC")),
    "8 channels": (".wav", True, lambda g: encode(np.tile(sound(g)[:, None], 8))),
    "8 kHz": (".wav", True, lambda g: encode(sound(g, 8000), 8000)),
    "192 kHz": (".flac", True, lambda g: encode(sound(g, 192000), 192000, "FLAC")),
    "8 bit": (".wav", True, lambda g: encode(sound(g), subtype="PCM_U8")),
    "24 bit": (".aiff", True, lambda g: encode(sound(g), format="AIFF", subtype="PCM_24")),
    "float64": (".wav", True, lambda g: encode(sound(g), subtype="DOUBLE")),
    "mp3 after garbage": (".mp3", True, lambda g: with_junk(encode(sound(g), format="MP3"), 0, g)),
    "mp3 with garbage inside": (".mp3", True, lambda g: with_junk(encode(sound(g), format="MP3"), 900, g)),
}


def write_folder(folder: Path, num_files: int, odd_share: float = 0.1, seed: int = 0) -> dict[str, str]:
    """Writes the files, with the odd ones at random places; returns the kind of each by path, "sound" for the rest."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    odd = generator.permutation(num_files)[: round(num_files * odd_share)]
    kinds = {int(index): list(KINDS)[position % len(KINDS)] for position, index in enumerate(odd)}
    written = {}
    for index in range(num_files):
        kind = kinds.get(index, "sound")
        extension, _, content = KINDS.get(kind, (".wav", True, lambda g: encode(sound(g))))
        path = folder / f"{index:04d}{extension}"
        path.write_bytes(content(generator))
        written[str(path)] = kind
    return written


class RecordingTrainer(ASiTPreTrainer):
    """Records the indices of the clips that it trains on."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.trained_on: set[int] = set()

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.trained_on.update(inputs["indices"].tolist())
        return super().compute_loss(model, inputs, *args, **kwargs)


def make_trainer(folder: Path, output_dir: Path, num_workers: int, batch_size: int, strict: bool) -> RecordingTrainer:
    torch.manual_seed(0)
    model = ASiTForPreTraining(ASiTConfig(**TOY | {"num_frames": 48}))
    lengths = {"global_seconds": CROP_SECONDS, "local_seconds": 0.25}
    return build_trainer(
        model,
        PretrainingCrops(load_audio_dataset(folder), RATE, **lengths, num_local_crops=1, strict=strict),
        output_dir,
        RecordingTrainer,
        per_device_train_batch_size=batch_size,
        num_train_epochs=1,
        warmup_epochs=0.5,
        dataloader_num_workers=num_workers,
        dataloader_drop_last=False,
        logging_strategy="steps",
        logging_steps=1,
    )


def train(folder: Path, output_dir: Path, num_workers: int, batch_size: int = 50) -> dict:
    """Trains an epoch; returns the reported files (path -> reason), the report's lines and the clips trained on."""
    trainer = make_trainer(folder, output_dir, num_workers, batch_size, strict=False)
    trainer.train()
    lines = [json.loads(line) for line in (output_dir / "bad_files.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {
        "steps": trainer.state.global_step,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad),
        "finite_losses": sum(math.isfinite(loss) for loss in losses),
        "lines": len(lines),
        "reported": {line["file"]: line["reason"] for line in lines},
        "trained_on": trainer.trained_on,
    }


def strict_error(folder: Path, output_dir: Path, num_workers: int, batch_size: int = 50) -> AudioReadError | None:
    """The error that stops a strict run, or `None` if it finishes."""
    try:
        make_trainer(folder, output_dir, num_workers, batch_size, strict=True).train()
    except AudioReadError as error:
        return error


def main(arguments: list[str] | None = None) -> bool:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the audio and the runs; replaced")
    parser.add_argument("--num_files", type=int, default=1000, help="files to write (default: 1000)")
    args = parser.parse_args(arguments)
    if args.output_dir.exists():
        shutil.rmtree(args.output_dir)
    folder = args.output_dir / "audio"
    kinds = write_folder(folder, args.num_files)
    unreadable = {path for path, kind in kinds.items() if kind in KINDS and not KINDS[kind][1]}
    print(f"{len(kinds)} files, {sum(kind != 'sound' for kind in kinds.values())} odd, {len(unreadable)} unreadable")

    good = True
    for num_workers in (0, 2):
        run = train(folder, args.output_dir / f"run-{num_workers}", num_workers)
        exact = (
            set(run["reported"]) == unreadable
            and run["lines"] == len(unreadable)
            and run["lines"] + len(run["trained_on"]) == len(kinds)
            and run["finite_losses"] == run["steps"]
        )
        good &= exact
        print(
            f"{num_workers} workers: {run['steps']} steps of a model of {run['parameters']} parameters, "
            f"{run['finite_losses']} finite losses; {len(run['trained_on'])} clips trained on + {run['lines']} "
            f"reported = {run['lines'] + len(run['trained_on'])}: {'correct' if exact else 'WRONG'}"
        )
    table(kinds, run["reported"])
    for num_workers in (0, 2):
        error = strict_error(folder, args.output_dir / f"strict-{num_workers}", num_workers)
        good &= error is not None and error.source in unreadable
        print(f"strict, {num_workers} workers: {type(error).__name__}: {error}")
    return good


def table(kinds: dict[str, str], reported: dict[str, str]) -> None:
    counts = Counter(kinds.values())
    for kind in KINDS:
        reasons = Counter(reason for path, reason in reported.items() if kinds[path] == kind)
        example = reasons.most_common(1)[0][0] if reasons else ""
        print(f"  {kind:26} {counts[kind]:3} files {sum(reasons.values()):3} reported  {example}")


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
