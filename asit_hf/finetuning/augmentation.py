"""
Augmentation of labelled clips: mixing, rolling and scaling of waveforms, masks and noise on spectrograms.

All random draws are functions of (seed, epoch, position in the epoch), so that resuming a run or changing its number
of processes or loader workers does not change them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers.hf_argparser import HfArg

from ..data.clips import LabelledClips
from ..data.randomness import sample_key
from ..utils.arguments import refuse_without_effect

_GAIN_BETA, _GAIN_OFFSET = 10.0, 0.5  # Audio-MAE: a gain of 0.5 to 1.5, mostly near 1
_NOISE_LEVEL, _NOISE_ROLL = 0.1, 10  # AST: noise of up to 0.1 on the normalized scale, shifts of up to 10 frames


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of the training clips; none by default."""

    mixup_rate: float = HfArg(default=0.0, help="Share of clips mixed with another clip, including their labels.")
    mixup_alpha: float = HfArg(default=10.0, help="Mixing shares are drawn from Beta(alpha, alpha).")
    roll: bool = HfArg(default=False, help="Shift the waveform circularly by a random amount.")
    random_gain: bool = HfArg(default=False, help="Scale the waveform by Beta(10, 10) + 0.5.")
    frequency_mask: int = HfArg(default=0, help="SpecAugment: largest width of a mask in mel bins.")
    time_mask: int = HfArg(default=0, help="SpecAugment: largest length of a mask in frames.")
    patch_mask_rate: float = HfArg(default=0.0, help="Share of time patches, and of mel patches, that are masked.")
    noise: bool = HfArg(default=False, help="AST's noise of up to 0.1, and a roll of up to 10 frames.")

    def __post_init__(self):
        for name in ("mixup_rate", "patch_mask_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not self.mixup_rate:
            refuse_without_effect(self, ["mixup_alpha"], "without mixup_rate")
        if min(self.frequency_mask, self.time_mask) < 0 or self.mixup_alpha <= 0:
            raise ValueError(
                "frequency_mask and time_mask must be at least 0 and mixup_alpha above 0, got "
                f"{self.frequency_mask}, {self.time_mask} and {self.mixup_alpha}"
            )

    def waveform(self, waveform: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Rolls and scales a waveform `(samples,)`."""
        if self.roll:
            waveform = np.roll(waveform, generator.integers(len(waveform)))
        if self.random_gain:
            waveform = waveform * np.float32(generator.beta(_GAIN_BETA, _GAIN_BETA) + _GAIN_OFFSET)
        return waveform

    def spectrogram(self, values: torch.Tensor, generator: np.random.Generator, patch_size: int = 16) -> torch.Tensor:
        """
        Masks, adds noise to and rolls one normalized log-mel spectrogram.

        Args:
            values (`torch.Tensor` of shape `(frames, mel)`): without padding. Masked values become 0, the mean of the
                data; AST masks with 0 before normalization.
            patch_size (`int`): side of the patches masked by `patch_mask_rate`.
        """
        values = values.clone()
        frames, mel_bins = values.shape
        if self.frequency_mask:
            values[:, _stretch(mel_bins, self.frequency_mask, generator)] = 0
        if self.time_mask:
            values[_stretch(frames, self.time_mask, generator)] = 0
        if self.patch_mask_rate:
            values[_patch_mask(frames, patch_size, self.patch_mask_rate, generator)] = 0
            values[:, _patch_mask(mel_bins, patch_size, self.patch_mask_rate, generator)] = 0
        if self.noise:
            level = generator.random() * _NOISE_LEVEL
            values += torch.from_numpy(generator.random(values.shape, dtype=np.float32) * np.float32(level))
            values = values.roll(int(generator.integers(-_NOISE_ROLL, _NOISE_ROLL)), dims=0)
        return values


class TrainingClips(Dataset):
    """
    The labelled clips of an epoch: sampled by weight, augmented and mixed.

    Args:
        clips ([`~asit_hf.data.LabelledClips`]), augmentation ([`Augmentation`]): the clips, and how they vary.
        weights (`np.ndarray` of shape `(clips,)`, *optional*): non-negative. With weights, an epoch samples as many
            clips as there are with replacement; without, it has each clip once. The clip at a position is a function
            of (seed, epoch, position) only, so that all processes share one sequence.

    Items are those of `LabelledClips` with `sample_key`, for which [`~asit_hf.data.ClassificationCollator`] augments
    the spectrogram, and, with mixing, `mixture`: pairs of a label and its share, which sum to 1.
    """

    def __init__(
        self, clips: LabelledClips, augmentation: Augmentation = Augmentation(), weights: np.ndarray | None = None
    ):
        self.clips = clips
        self.augmentation = augmentation
        self._cumulative = None if weights is None else _cumulative(weights, len(clips))

    def __len__(self) -> int:
        return len(self.clips)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of all following items, also in running loader workers."""
        self.clips.set_epoch(epoch)

    def __getitem__(self, position: int) -> dict[str, Any]:
        position = range(len(self))[position]
        key = sample_key(self.clips.seed, self.clips.epoch, position)
        generator = np.random.default_rng([key, 1])
        row = position
        if self._cumulative is not None:
            row = int(np.searchsorted(self._cumulative, generator.random() * self._cumulative[-1], side="right"))
        item = {**self._clip(row, key, generator), "sample_key": key}
        if self.augmentation.mixup_rate:
            item["mixture"] = [(item["label"], 1.0)]
            if "waveform" in item and generator.random() < self.augmentation.mixup_rate:
                self._mix(item, sample_key(self.clips.seed, self.clips.epoch, position, 1), generator)
        return item

    def _clip(self, row: int, key: int, generator: np.random.Generator) -> dict[str, Any]:
        item = self.clips.item(row, key)
        if "waveform" in item:
            item["waveform"] = self.augmentation.waveform(item["waveform"], generator)
        return item

    def _mix(self, item: dict[str, Any], key: int, generator: np.random.Generator) -> None:
        """Mixes with a random clip, cut or padded with zeros to the length of this one."""
        other = self._clip(int(generator.integers(len(self))), key, generator)
        if "waveform" not in other:  # unreadable, so that the clip stays unmixed
            item["bad_files"] = other["bad_files"]
            return
        share = float(generator.beta(self.augmentation.mixup_alpha, self.augmentation.mixup_alpha))
        waveform, added = item["waveform"], other["waveform"][: len(item["waveform"])]
        # log-mel removes the mean anyway; a remaining offset would click where the shorter clip ends
        mixed = np.float32(share) * (waveform - waveform.mean())
        mixed[: len(added)] += np.float32(1 - share) * (added - added.mean())
        item["waveform"] = mixed
        item["mixture"] = [(item["label"], share), (other["label"], 1 - share)]


def _cumulative(weights: np.ndarray, count: int) -> np.ndarray:
    weights = np.asarray(weights, dtype=np.float64)
    if weights.shape != (count,) or not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise ValueError(f"expected {count} finite non-negative weights, not all 0; got shape {weights.shape}")
    return np.cumsum(weights)


def _stretch(size: int, longest: int, generator: np.random.Generator) -> slice:
    """SpecAugment: a uniform length up to `longest` or `size`, whichever is less, at a uniform start."""
    length = int(generator.uniform(0, min(longest, size)))
    start = int(generator.uniform(0, size - length))
    return slice(start, start + length)


def _patch_mask(size: int, patch_size: int, rate: float, generator: np.random.Generator) -> torch.Tensor:
    """Boolean `(size,)`: true in a share `rate` of the patches."""
    patches = size // patch_size
    masked = generator.permutation(patches)[: round(rate * patches)]
    return torch.from_numpy(np.isin(np.arange(size) // patch_size, masked))
