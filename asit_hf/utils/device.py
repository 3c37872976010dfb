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
    The defaults are a CPU's choices.

    Args:
        loss_rows (`int`): patches in each chunk of the local loss. The logits of 256 patches fit a CPU's cache; on an
            accelerator each chunk costs a dozen kernel launches (16384 x 8192 logits are 0.5 GiB in float32).
        bf16_attention (`str`): attention implementation of bf16 training that asks for sdpa. torch's fused CPU kernel
            is slow in bfloat16, so a CPU uses `attention_cpu`.
        equal_chunks (`bool`): chunks of the local loss have equal sizes where possible, so that a compiled body sees
            one shape; a CPU gains nothing by it.
        masks_block_by_block (`bool`): GMML draws one block after the other until a mask reaches its ratio, instead of
            all masks of a batch at once; see `pretraining.masking.draw_masks`.
        crops_by_slices (`bool`): copy crops of packed audio one by one, the fastest way on a CPU; on an accelerator
            each copy would launch a kernel, so all crops are gathered by one index.
        int16_batches (`bool`): the loader sends waveform crops as int16, half the bytes through shared memory and over
            the bus. On a CPU the conversion would only cost time.
        windows_per_batch (`int`): in one forward pass of `predict` and `embed`. A CPU is as fast with few.
        threads (`bool`): `predict` and `embed` read and compute in threads, each with its share of the cores. For an
            accelerator, processes read, since one of Python's threads at a time is too slow for it.
    """

    loss_rows: int = 256
    bf16_attention: str = "blockwise"
    equal_chunks: bool = False
    masks_block_by_block: bool = True
    crops_by_slices: bool = True
    int16_batches: bool = False
    windows_per_batch: int = 8
    threads: bool = True


CPU = DeviceChoices()
ACCELERATOR = DeviceChoices(
    loss_rows=16384,
    bf16_attention="sdpa",
    equal_chunks=True,
    masks_block_by_block=False,
    crops_by_slices=False,
    int16_batches=True,
    windows_per_batch=64,
    threads=False,
)


def choices_for(device: torch.device) -> DeviceChoices:
    """The choices for a device."""
    return CPU if device.type == "cpu" else ACCELERATOR
