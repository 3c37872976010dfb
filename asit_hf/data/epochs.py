"""A callback that sets the epoch of a data set, and each process's part of a stream."""

import logging
from typing import Any

from transformers import TrainerCallback

from ..utils.extras import extra
from .streaming import StreamingCrops

with extra("train"):
    from accelerate.data_loader import IterableDatasetShard

logger = logging.getLogger(__name__)


class EpochCallback(TrainerCallback):
    """Calls `dataset.set_epoch` at the start of every epoch; accelerate does so only in a run of one process that was
    not resumed within an epoch.

    A [`~asit_hf.data.StreamingCrops`] becomes one endless epoch: each process reads its own part of the stream, and a
    run resumed with the same numbers of processes and loader workers continues at the clip where it stopped.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self.epoch = 0

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if isinstance(self.dataset, StreamingCrops):
            self.epoch = 0
            self._share_stream(args, state, train_dataloader)
        else:
            self.epoch = int(state.epoch or 0)

    def on_epoch_begin(self, args, state, control, **kwargs):
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(self.epoch)
        self.epoch += 1

    def _share_stream(self, args, state, train_dataloader) -> None:
        stream = self.dataset
        stream.repeat = True
        stream.rank, stream.world_size = args.process_index, args.world_size
        num_batches = 0 if args.ignore_data_skip else state.global_step * args.gradient_accumulation_steps
        stream.skip(num_batches, args.train_batch_size)
        num_shards = stream.dataset.num_shards
        if num_shards % args.world_size:
            shards = f"the stream has {num_shards} shards, not a multiple of the {args.world_size} processes"
            logger.warning("%s: each process reads all shards and keeps its share of the clips", shards)
        # accelerate would let every process read and crop all clips and discard the other processes' share
        whole = getattr(train_dataloader, "dataset", None)
        if isinstance(whole, IterableDatasetShard):
            whole.num_processes, whole.process_index = 1, 0
