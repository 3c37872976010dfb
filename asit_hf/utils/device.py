"""
What the package computes differently on a CPU and on an accelerator, and why.

A CPU is fast while data fit its caches, and reads a value at no cost. An accelerator is fast when few large operations
follow each other and the host never waits for a value. Files that travel to the Hub cannot import this module and
choose in place: chunks of frames in `fbank_asit`, one clip at a time in `feature_extraction_asit`, the patch
projection and dropped branches in `modeling_asit`.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DeviceChoices:
    """
    Args:
        loss_rows (`int`): patches whose logits over all prototypes exist at one time in the local loss. Those of 256
            stay in a CPU's cache; on an accelerator each chunk costs a dozen kernel launches, so few and large ones
            are better (16384 rows of 8192 logits are 0.5 GiB in float32).
        bf16_attention (`str`): attention implementation of bf16 training that asks for sdpa. torch's fused CPU kernel
            is slow in bfloat16, so a CPU uses `pretraining.attention_cpu`.
        equal_chunks (`bool`): chunks of the local loss are as large as each other where they can be, so that a
            compiled body has one shape; a CPU gains nothing by it.
        masks_block_by_block (`bool`): GMML covers the pixels of one block after the other, and stops when a mask has
            its share, instead of all masks of a batch at once. A CPU does 20 times less work so; an accelerator would
            have to tell the host how far each mask is.
        crops_by_slices (`bool`): crops of packed audio are copied one by one, which is what a CPU does best; an
            accelerator would launch a kernel, and wait, for each.
        int16_batches (`bool`): waveform crops travel from the loader as int16: half the bytes through shared memory
            and over the bus. A CPU would only convert to and fro.
    """

    loss_rows: int
    bf16_attention: str
    equal_chunks: bool
    masks_block_by_block: bool
    crops_by_slices: bool
    int16_batches: bool


CPU = DeviceChoices(
    loss_rows=256,
    bf16_attention="blockwise",
    equal_chunks=False,
    masks_block_by_block=True,
    crops_by_slices=True,
    int16_batches=False,
)
ACCELERATOR = DeviceChoices(
    loss_rows=16384,
    bf16_attention="sdpa",
    equal_chunks=True,
    masks_block_by_block=False,
    crops_by_slices=False,
    int16_batches=True,
)


def choices_for(device: torch.device) -> DeviceChoices:
    """What is best on a device."""
    return CPU if device.type == "cpu" else ACCELERATOR
