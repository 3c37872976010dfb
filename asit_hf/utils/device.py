"""
What training does in one way on a CPU and in another on an accelerator, and why.

A CPU is fast where its caches hold the data, and may look at a value at no cost. An accelerator is fast where few
large operations follow each other without the host ever waiting for a value. The files that travel to the Hub import
nothing from here, so what they choose by device stands in them: chunks of frames in `fbank_asit`, one clip at a time
in `feature_extraction_asit`; the patches' matrix product, blockwise attention and dropped branches in `modeling_asit`.
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
        equal_chunks (`bool`): chunks of the local loss are as large as each other where they can be, so that a
            compiled body has one shape; a CPU gains nothing by it.
        masks_block_by_block (`bool`): GMML adds one block after the other and stops when a mask has reached its ratio,
            instead of computing all masks of a batch at once. This is 20 times less work on a CPU; on an accelerator
            the host would wait for the ratio after every block.
        crops_by_slices (`bool`): copy crops of packed audio one by one, the fastest way on a CPU; on an accelerator
            each copy would launch a kernel, so all crops are gathered by one index.
        int16_batches (`bool`): the loader sends waveform crops as int16, half the bytes through shared memory and over
            the bus. On a CPU the conversion would only cost time.
    """

    loss_rows: int
    equal_chunks: bool
    masks_block_by_block: bool
    crops_by_slices: bool
    int16_batches: bool


CPU = DeviceChoices(
    loss_rows=256, equal_chunks=False, masks_block_by_block=True, crops_by_slices=True, int16_batches=False
)
ACCELERATOR = DeviceChoices(
    loss_rows=16384, equal_chunks=True, masks_block_by_block=False, crops_by_slices=False, int16_batches=True
)


def choices_for(device: torch.device) -> DeviceChoices:
    """The choices for a device."""
    return CPU if device.type == "cpu" else ACCELERATOR
