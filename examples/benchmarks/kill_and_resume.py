"""
Kill a pretraining run with SIGKILL at random moments, also while it saves, and resume it each time.

    python examples/benchmarks/kill_and_resume.py --kills 20

The run saves a checkpoint every step, so that many kills interrupt a save. After every kill the last checkpoint must
be complete (model, optimizer, schedules and random state load), and the final weights must equal those of an
uninterrupted run bit for bit. Prints counts as JSON; the exit status is 1 if a check fails.
"""

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from training_step import TOY, build_trainer
from transformers.trainer_utils import get_last_checkpoint

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForPreTraining
from asit_hf.data import PretrainingCrops

SIZES = TOY | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_frames": 48,
    "drop_path_rate": 0.1,
    "distillation_hidden_size": 64,
    "distillation_bottleneck_size": 32,
    "num_prototypes": 256,
}
PRELOADED = ["asit_hf.pretraining.trainer", "asit_hf.data"]  # imported once, not after every kill


def train(clips: list[str], output_dir: str, steps: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = PretrainingCrops(clips, 16000, global_seconds=0.5, local_seconds=0.25, num_local_crops=2)
    options = {"per_device_train_batch_size": 4, "max_steps": steps, "warmup_epochs": 1, "learning_rate": 1e-3}
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    trainer = build_trainer(ASiTForPreTraining(ASiTConfig(**SIZES)), data, output_dir, **options, **saving)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(output_dir))


def check_checkpoint(folder: str) -> None:
    """Raises an error unless all files needed to resume load from the last checkpoint."""
    last = get_last_checkpoint(folder)
    if last is None:
        return
    ASiTForPreTraining.from_pretrained(last)
    ASiTFeatureExtractor.from_pretrained(last)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.load(Path(last) / name, weights_only=False)
    json.loads((Path(last) / "trainer_state.json").read_text())


def make_clips(folder: Path, count: int = 16) -> list[str]:
    generator = np.random.default_rng(0)
    for index in range(count):
        soundfile.write(folder / f"{index:02d}.wav", generator.uniform(-0.3, 0.3, 16000), 16000)
    return sorted(str(path) for path in folder.glob("*.wav"))


def kill_and_resume(kills: int, steps: int, seed: int, folder: Path) -> dict[str, int | bool]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    clips = make_clips(folder)

    def start(target, *arguments):
        process = context.Process(target=target, args=arguments)
        process.start()
        return process

    def finish(target, *arguments) -> bool:
        process = start(target, *arguments)
        process.join()
        return process.exitcode == 0

    def start_training(output_dir: Path) -> multiprocessing.Process:
        """Starts training and returns after the first checkpoint."""
        output_dir.mkdir(exist_ok=True)
        seen = checkpoints(output_dir)
        process = start(train, clips, str(output_dir), steps)
        while process.is_alive() and checkpoints(output_dir) <= seen:
            time.sleep(0.002)
        return process

    process, began = start_training(folder / "whole"), time.perf_counter()
    process.join()
    seconds_a_step = (time.perf_counter() - began) / (steps - 1)
    if process.exitcode:
        raise SystemExit("the uninterrupted run failed")

    generator = random.Random(seed)
    killed, ended, in_saving, broken = folder / "killed", 0, 0, 0
    for _ in range(kills):
        process = start_training(killed)
        process.join(generator.uniform(0, 2 * seconds_a_step))
        ended += not process.is_alive()
        process.kill()
        process.join()
        in_saving += (killed / "unfinished").exists()
        broken += not finish(check_checkpoint, str(killed))
    if not finish(train, clips, str(killed), steps):
        raise SystemExit("the killed run cannot be resumed")
    same = (killed / f"checkpoint-{steps}" / "model.safetensors").read_bytes() == (
        folder / "whole" / f"checkpoint-{steps}" / "model.safetensors"
    ).read_bytes()
    return {
        "kills": kills - ended,
        "kills_while_saving": in_saving,
        "checkpoints_that_do_not_load": broken,
        "equal_to_an_uninterrupted_run": same,
        "steps": steps,
    }


def checkpoints(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("checkpoint-*")}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="number of kills (default: 20)")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps of the run (default: 3 per kill + 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills (default: 0)")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        counts = kill_and_resume(args.kills, args.steps or 3 * args.kills + 4, args.seed, Path(folder))
    print(json.dumps(counts))
    return int(counts["checkpoints_that_do_not_load"] > 0 or not counts["equal_to_an_uninterrupted_run"])


if __name__ == "__main__":
    sys.exit(main())
