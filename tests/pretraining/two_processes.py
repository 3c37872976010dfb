"""
Runs under torchrun for test_distributed.py: `two_processes.py MODE,MODE,... OUTPUT_DIR CLIPS...`, results in
`OUTPUT_DIR/MODE-RANK.pt`.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from tiny_pretraining import make_model, make_trainer, save_result, stack
from torch.utils.data import Dataset
from transformers import TrainerCallback

from asit_hf.data import PackedCrops
from asit_hf.data.collators import collate_crops
from asit_hf.data.packed import write_packed
from asit_hf.pretraining.masking import GMML, corrupt
from asit_hf.utils import time_budget

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
GLOBAL_BATCH = 4


class GivenViews(Dataset):
    """Batches with views and masks, of very different masking ratios."""

    def __init__(self, count: int = 16):
        generator = torch.Generator().manual_seed(0)
        clean = torch.randn(count, 2, 48, 32, generator=generator)
        self.items = {"input_values": clean, "local_values": torch.randn(count, 1, 16, 32, generator=generator)}
        corrupted, masks = [], []
        for index in range(count):
            share = 0.1 + 0.8 * index / count
            gmml = GMML(mask_ratio=(share, share), replace_probability=0.0)
            one, mask = corrupt(clean[index : index + 1], torch.tensor([index]), 0, gmml)
            corrupted.append(one)
            masks.append(mask)
        self.items |= {"corrupted_values": torch.cat(corrupted), "corruption_mask": torch.cat(masks)}

    def __len__(self) -> int:
        return len(self.items["input_values"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[index] for name, value in self.items.items()} | {"sample_keys": torch.tensor(index)}


class TerminateOne(TrainerCallback):
    """Sends SIGTERM to the second process only."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1 and RANK == 1:
            os.kill(os.getpid(), 15)


class RecordedCrops(PackedCrops):
    """Packed noise that records which crops were gathered from it."""

    def __init__(self, folder: Path, count: int = 12):
        noise = np.random.default_rng(0).integers(-9000, 9000, (count, 12000)).astype(np.int16)
        write_packed(folder, [(f"{index}.wav", None, clip) for index, clip in enumerate(noise)], 16000)
        super().__init__(folder, 16000, global_seconds=0.5, local_seconds=0.25, num_local_crops=1)
        self.gathered: list[tuple[int, int]] = []

    def gather(self, indices, sample_keys):
        self.gathered += zip(indices.tolist(), sample_keys.tolist())
        return super().gather(indices, sample_keys)


class Clock(TrainerCallback):
    """For `max_minutes`: a step takes 1 s by the clock of the first process and 2 s by that of the second."""

    seconds = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.seconds += 1.0 + RANK


def spoil(items: list[dict]) -> dict:
    batch = collate_crops(items)
    spoil.count += 1
    if spoil.count == 2 and RANK == 1:
        batch["global_waveforms"][0, 0, 10] = float("nan")
    return batch


spoil.count = 0


def main(mode: str, output: str, clips: list[str]) -> None:
    folder = Path(output) / ("whole" if mode == "resumed" else mode)
    given = mode in ("given", "corrupted", "per_process")
    dataset = GivenViews() if given else RecordedCrops(folder / f"pool-{RANK}") if mode == "packed" else clips
    trainer = make_trainer(
        dataset,
        folder,
        make_model(local_loss_patches="corrupted" if mode == "corrupted" else "all"),
        data_collator=stack if given else spoil if mode == "spoiled" else collate_crops,
        per_device_train_batch_size=GLOBAL_BATCH // WORLD,
        num_train_epochs=1 if given else 2,
        max_minutes=0.25 if mode == "minutes" else None,
        warmup_epochs=0,
        save_strategy="steps" if mode in ("whole", "resumed", "terminated") else "no",
        save_steps=3 if mode != "terminated" else 100,
        train_sampling_strategy="sequential" if given else "random",
        mean_over_all=mode != "per_process",
        dataloader_num_workers=1 if mode in ("whole", "resumed") else 0,
        ddp_backend="gloo" if WORLD > 1 else None,
    )
    if mode == "terminated":
        trainer.add_callback(TerminateOne())
    if mode == "minutes":
        clock = Clock()
        time_budget.now = lambda: clock.seconds
        trainer.add_callback(clock)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if mode == "resumed" else None)
    save_result(
        trainer,
        output,
        mode,
        RANK,
        state=trainer.accelerator.unwrap_model(trainer.model).state_dict(),
        terminated=trainer.terminated,
        gathered=getattr(dataset, "gathered", []),
    )


if __name__ == "__main__":
    for mode in sys.argv[1].split(","):
        main(mode, sys.argv[2], sys.argv[3:])
