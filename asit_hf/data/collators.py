"""Collators: items of the data sets to batches."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

logger = logging.getLogger(__name__)


def collate_crops(items: Sequence[dict[str, Any]], int16: bool = False) -> dict[str, Any]:
    """Batch the items of `PretrainingCrops`, `StreamingCrops` or `PackedCrops`.

    Args:
        int16: return waveforms as 16-bit numbers with one scale per crop, the smallest power of 2 above its peak. No
            sample is clipped, a quiet crop keeps 16 bits, and 16-bit audio is unchanged.

    Returns:
        `global_waveforms` (batch, crops, samples) float32, `global_lengths` (batch, crops) int64, and with `int16`
        `global_scales` (batch, crops) float32, the value of an int16 sample of 2^15; the same with `local_` if there
        are local crops; `sample_keys` (batch,) int64, `indices` (batch,) int64, `files`, a list of names, and
        `bad_files`, a list of (path, reason). Items of `PackedCrops` have no crops. A resumed stream begins with items
        without audio: their batch is `{"skipped": items}`.
    """
    if "skipped" in items[0]:
        return {"skipped": len(items)}
    names = ("global_waveforms", "global_lengths", "local_waveforms", "local_lengths")
    tensors = {name: [item[name] for item in items] for name in names if name in items[0]}
    for kind in ("global", "local") if int16 else ():
        if f"{kind}_waveforms" in tensors:
            pairs = [_to_int16(waveforms) for waveforms in tensors[f"{kind}_waveforms"]]
            tensors[f"{kind}_waveforms"], tensors[f"{kind}_scales"] = zip(*pairs)
    # torch's collate stacks directly into shared memory in a loader worker
    batch: dict[str, Any] = {name: default_collate(values) for name, values in tensors.items()}
    batch["sample_keys"] = torch.tensor([item["sample_key"] for item in items], dtype=torch.int64)
    batch["indices"] = torch.tensor([item["index"] for item in items], dtype=torch.int64)
    batch["files"] = [item["file"] for item in items]
    batch["bad_files"] = [bad for item in items for bad in item["bad_files"]]
    return batch


def _to_int16(waveforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(crops, samples)` as int16, and the scale of each crop, `(crops,)`."""
    # the largest int16 is one step below full scale
    peaks = torch.maximum(-waveforms.amin(-1), waveforms.amax(-1) * (2**15 / (2**15 - 0.5)))
    mantissas, exponents = torch.frexp(peaks)
    exponents = exponents - (mantissas == 0.5).to(exponents.dtype)  # a power of 2 is its own scale
    scales = torch.ldexp(torch.ones_like(peaks), exponents)
    samples = (waveforms * (2**15 / scales)[:, None]).round_().clamp_(-(2**15), 2**15 - 1)
    return samples.to(torch.int16), scales


def readable_items(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items of `LabelledClips` that have a waveform; the others are reported.

    Raises:
        ValueError: no items, or none that could be read.
    """
    for path, reason in (bad for item in items for bad in item.get("bad_files", ())):
        logger.warning("skipped %s: %s", path, reason)
    if len(items) == 0:
        raise ValueError("expected a batch of at least one clip, got none")
    readable = [item for item in items if "waveform" in item]
    if not readable:
        raise ValueError(f"none of the {len(items)} clips of this batch can be read: {items[0]['bad_files']}, ...")
    return readable


@dataclass
class ClassificationCollator:
    """Batch the items of `LabelledClips` for a classifier.

    Args:
        feature_extractor: called as `(waveforms, sampling_rate=..., padding=True, return_tensors="pt")`.
        num_labels: number of classes; required for classification.
        problem_type: "single_label_classification", "multi_label_classification" or "regression".
        augment: called as `augment(values (frames, mel), numpy generator)` on the spectrograms of items with a
            `sample_key`, which training items have (`asit_hf.finetuning.augmentation.TrainingClips`).

    Returns, when called:
        `input_values` (batch, frames, mel) and `attention_mask` (batch, frames) of the extractor, and `labels` if
        items have labels: class ids (batch,) int64, 0 or 1 per class (batch, num_labels) float32, or for regression
        the numbers, float32. Items with a `mixture` give the weighted sum of its labels, float32: (batch, num_labels)
        for either classification type.

    Raises, when called:
        ValueError: a label that is missing or not in [0, num_labels), or a batch without a readable clip.
    """

    feature_extractor: Callable[..., Any]
    num_labels: int | None = None
    problem_type: str = "single_label_classification"
    augment: Callable[[torch.Tensor, np.random.Generator], torch.Tensor] | None = None

    def __post_init__(self):
        known = ("single_label_classification", "multi_label_classification", "regression")
        if self.problem_type not in known:
            raise ValueError(f"expected problem_type to be one of {', '.join(known)}, got {self.problem_type!r}")
        if self.num_labels is None and self.problem_type != "regression":
            raise ValueError(f"expected num_labels for {self.problem_type}, got None")

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        readable = readable_items(items)
        rate, waveforms = self.feature_extractor.sampling_rate, [item["waveform"] for item in readable]
        batch = dict(self.feature_extractor(waveforms, sampling_rate=rate, padding=True, return_tensors="pt"))
        for row, item in enumerate(readable):
            if self.augment is not None and "sample_key" in item:
                # each clip's frames in place, without its padding
                frames = int(batch["attention_mask"][row].sum()) if "attention_mask" in batch else None
                values = batch["input_values"][row, :frames]
                values[:] = self.augment(values, np.random.default_rng([item["sample_key"], 2]))
        if "mixture" in readable[0]:
            batch["labels"] = self._mixed_labels([item["mixture"] for item in readable])
        elif "label" in readable[0]:
            batch["labels"] = self._labels([item["label"] for item in readable])
        return batch

    def _mixed_labels(self, mixtures: list[list[tuple[Any, float]]]) -> torch.Tensor:
        labels = [label for mixture in mixtures for label, _ in mixture]
        shares = torch.tensor([share for mixture in mixtures for _, share in mixture])
        rows = torch.tensor([row for row, mixture in enumerate(mixtures) for _ in mixture])
        targets = self._labels(labels)
        if targets.dtype == torch.int64:
            targets = torch.nn.functional.one_hot(targets, self.num_labels).float()
        shares = shares.view(-1, *[1] * (targets.dim() - 1))
        return targets.new_zeros(len(mixtures), *targets.shape[1:]).index_add(0, rows, shares * targets)

    def _labels(self, labels: list[Any]) -> torch.Tensor:
        if any(label is None for label in labels):
            raise ValueError(f"expected a label for every clip, got {labels}")
        if self.problem_type == "regression":
            return torch.tensor(labels, dtype=torch.float32)
        if self.problem_type == "single_label_classification":
            return torch.tensor([self._checked(label) for label in labels])
        targets = torch.zeros(len(labels), self.num_labels)
        for row, label in enumerate(labels):
            for one in label if isinstance(label, (list, tuple)) else [label]:
                targets[row, self._checked(one)] = 1.0
        return targets

    def _checked(self, label: Any) -> int:
        if isinstance(label, (list, tuple, float, str)) or not 0 <= int(label) < self.num_labels:
            raise ValueError(f"expected a class id from 0 to {self.num_labels - 1}, got {label!r}")
        return int(label)
