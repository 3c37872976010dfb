"""Telling a data set which epoch it is."""

from typing import Any

from transformers import TrainerCallback


class EpochCallback(TrainerCallback):
    """
    Calls `dataset.set_epoch` at the start of every epoch. accelerate does so only in a run of one process that was
    not resumed within an epoch.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self.epoch = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.epoch = int(state.epoch or 0)

    def on_epoch_begin(self, args, state, control, **kwargs):
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(self.epoch)
        self.epoch += 1
