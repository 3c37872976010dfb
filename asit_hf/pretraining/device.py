"""
What pretraining does in one way on a processor and in another on an accelerator, and why.

A processor is fast where its caches hold the data, and may look at a value at no cost. An accelerator is fast where
few large operations follow each other without the host ever waiting for a value. What the files on the Hub choose by
device stands in them, as they import nothing from here: chunks of frames in `fbank_asit`, one clip at a time in
`feature_extraction_asit`, blockwise attention and dropped branches in `modeling_asit`.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DeviceChoices:
    """
    Args:
        loss_rows (`int`): patches whose logits over all prototypes exist at one time in the local loss. Those of 256
            stay in a processor's cache; on an accelerator each chunk costs a dozen kernel launches, so few and large
            ones are better (16384 rows of 8192 logits are 0.5 GiB in float32).
        masks_block_by_block (`bool`): GMML covers the pixels of one block after the other, and stops when a mask has
            its share, instead of all masks of a batch at once. A processor does 20 times less work so; an accelerator
            would have to tell the host how far each mask is.
    """

    loss_rows: int
    masks_block_by_block: bool


PROCESSOR = DeviceChoices(loss_rows=256, masks_block_by_block=True)
ACCELERATOR = DeviceChoices(loss_rows=16384, masks_block_by_block=False)


def choices_for(device: torch.device) -> DeviceChoices:
    """What is best on a device."""
    return PROCESSOR if device.type == "cpu" else ACCELERATOR
