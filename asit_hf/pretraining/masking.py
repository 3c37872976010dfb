"""
Group masked model learning (GMML): the corruption of the student's input.

Blocks of time and mel are drawn until they cover the masking ratio. Covered pixels are set to zero (or to noise), or
replaced by the same region of another clip. Bands of time or mel and single patches are alternatives to blocks for
ablations. Every random number is a hash of the clip's key, so a mask does not depend on the batch, the device, the
number of workers or a generator's state.
"""

from dataclasses import dataclass
from functools import lru_cache
from operator import length_hint

import numpy as np
import torch

from ..data.randomness import mix_keys, uniform_noise
from ..utils.device import choices_for

BLOCKS_PER_ROUND = 62
BLOCKS_PER_WORD = 31  # one bit each of a signed 32-bit integer
MAX_ROUNDS = 64
TRIALS = 256
PATTERNS = ("blocks", "time", "frequency", "patches")
FILLS = ("zeros", "noise")
NOISE_STD = 0.5  # standard deviation of spectrograms normalized by (x - mean) / (2 std)
NOT_COVERED = 2**15 - 1  # instead of a block's number


@dataclass(frozen=True)
class GMML:
    """
    Parameters of the corruption.

    Args:
        mask_ratio (`tuple[float, float]`): range of the masking ratio of views with zeros, drawn uniformly per view.
        replace_ratio (`float`): masking ratio of views with pixels of another clip.
        replace_probability (`float`): probability that a view is corrupted by another clip instead of zeros.
        max_block_ratio (`float`): longest side of a block, as a fraction of the time and mel extents.
        alignment (`int`): blocks start and end at multiples of this many pixels; 1 in both official releases.
        pattern (`str`): `"blocks"` of time and mel (official), bands of `"time"` over all mel bins, bands of
            `"frequency"` over all frames, or single `"patches"` chosen uniformly (no groups).
        fill (`str`): value of masked pixels that are not replaced: `"zeros"` (official) or Gaussian `"noise"` with the
            standard deviation of normalized spectrograms (the official noise option ignores the normalization).
        patch_size (`int`): side of a square of `"patches"`.
    """

    mask_ratio: tuple[float, float] = (0.5, 0.5)
    replace_ratio: float = 0.3
    replace_probability: float = 0.5
    max_block_ratio: float = 0.3
    alignment: int = 1
    pattern: str = "blocks"
    fill: str = "zeros"
    patch_size: int = 16

    def __post_init__(self):
        object.__setattr__(self, "mask_ratio", tuple(self.mask_ratio))  # a list could not be hashed
        low, high = self.mask_ratio
        for name, is_valid, expected in (
            ("mask_ratio", 0 < low <= high < 1, "a range inside (0, 1)"),
            ("replace_ratio", 0 < self.replace_ratio < 1, "inside (0, 1)"),
            ("replace_probability", 0 <= self.replace_probability <= 1, "in [0, 1]"),
            ("max_block_ratio", 0 < self.max_block_ratio <= 1, "in (0, 1]"),
            ("alignment", self.alignment >= 1, "at least 1 pixel"),
            ("patch_size", self.patch_size >= 1, "at least 1 pixel"),
            ("pattern", self.pattern in PATTERNS, f"one of {PATTERNS}"),
            ("fill", self.fill in FILLS, f"one of {FILLS}"),
        ):
            if not is_valid:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")


def draw_keys(count: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """`count` random keys, for masks outside a training run."""
    return torch.randint(2**62, (count,), generator=generator)


def corrupt(clean: torch.Tensor, keys: torch.Tensor, donor_key: int, gmml: GMML) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Corrupts a batch of spectrograms.

    Args:
        clean (`torch.Tensor` of shape `(batch, views, frames, mel)`): clean spectrograms.
        keys (`torch.Tensor` of shape `(batch,)`): one int64 key per clip, which decides its masks.
        donor_key (`int`): decides, with the position in the batch, which other clip replaces a clip's pixels. A batch
            of one has no other clip and is corrupted by zeros (or noise).
        gmml ([`GMML`]): parameters of the corruption.

    Returns:
        The corrupted spectrograms and the boolean mask of corrupted pixels, both of the shape of `clean`.
    """
    batch, views, frames, mel = clean.shape
    if keys.shape != (batch,):
        raise ValueError(f"expected one key for each of the {batch} clips, got keys of shape {tuple(keys.shape)}")
    keys = mix_keys(keys.to(clean.device)[:, None], torch.arange(views, device=clean.device))
    choice, position = uniform_noise(mix_keys(keys, 0), 2).unbind(-1)
    low, high = gmml.mask_ratio
    replaces = choice < (gmml.replace_probability if batch > 1 else 0.0)
    ratios = (low + (high - low) * position).masked_fill(replaces, gmml.replace_ratio)
    max_ratio = max(high, gmml.replace_ratio)
    mask = draw_masks(mix_keys(keys, 1).flatten(), frames, mel, ratios.flatten(), gmml, max_ratio).view(clean.shape)
    donors = draw_donors(batch, donor_key, clean.device)
    blank = _gaussian_noise(mix_keys(keys, 2), clean) if gmml.fill == "noise" else clean.new_zeros(()).expand_as(clean)
    if not choices_for(clean.device).masks_block_by_block:
        fill = torch.where(replaces[:, :, None, None], clean[donors], blank)
        return torch.where(mask, fill, clean), mask
    corrupted = torch.empty_like(clean)
    for clip, donor in enumerate(donors.tolist()):  # view by view, in a CPU's cache
        views = zip(clean[clip], clean[donor], blank[clip], mask[clip], replaces[clip].tolist(), corrupted[clip])
        for view, other, nothing, is_masked, is_replaced, output in views:
            torch.where(is_masked, other if is_replaced else nothing, view, out=output)
    return corrupted, mask


def draw_donors(batch: int, key: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Index of another clip for every clip of a batch, `(batch,)`. In a batch of one it is the clip itself."""
    index = torch.arange(batch, device=device)
    noise = uniform_noise(mix_keys(torch.full((1,), key, device=device), index), 1)[:, 0]
    shift = 1 + (noise * (batch - 1)).long().clamp_max(max(batch - 2, 0))
    return (index + shift) % batch


def draw_masks(
    keys: torch.Tensor,
    num_frames: int,
    num_mel_bins: int,
    ratios: torch.Tensor,
    gmml: GMML,
    max_ratio: float | None = None,
) -> torch.Tensor:
    """
    Masks of the pattern `gmml.pattern`, each with its own masking ratio.

    A block's corner is uniform over the plane, and its sides are uniform up to `max_block_ratio` of each extent, cut
    at the far edges. The first frames and the lowest mel bins are therefore covered less, as in the official code.

    Blocks are drawn in two ways, which give the same masks: one after the other on a CPU, which is 8 to 34 times as
    fast there, and all at once on an accelerator, so that the host never waits for it.

    Args:
        keys (`torch.Tensor` of shape `(masks,)`): int64 keys.
        ratios (`torch.Tensor` of shape `(masks,)`): fraction of the pixels that each mask covers, at least.
        gmml ([`GMML`]): pattern and sizes of the blocks.
        max_ratio (`float`, *optional*): upper bound of `ratios`. Without it, the host waits for their maximum.

    Returns:
        Boolean `torch.Tensor` of shape `(masks, num_frames, num_mel_bins)`, `True` where corrupted.

    Raises:
        ValueError: there are not as many ratios as keys, or blocks of this kind do not cover the ratio.
    """
    if keys.shape != ratios.shape:
        got = f"{tuple(keys.shape)} keys and {tuple(ratios.shape)} ratios"
        raise ValueError(f"expected one ratio for each key, got {got}")
    if gmml.pattern == "patches":
        return _draw_patches(keys, num_frames, num_mel_bins, ratios, gmml)
    if choices_for(keys.device).masks_block_by_block:
        return _draw_block_by_block(keys, num_frames, num_mel_bins, ratios, gmml)[0]
    return _draw_at_once(keys, num_frames, num_mel_bins, ratios, gmml, max_ratio or ratios.max().item())


def _gaussian_noise(keys: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Noise of the shape and type of `like`, `(batch, views, frames, mel)`, from keys `(batch, views)`."""
    frames, mel = like.shape[-2:]
    uniform = uniform_noise(keys, frames * mel) + 2**-25  # never 0, whose quantile is infinite
    return (torch.special.ndtri(uniform) * NOISE_STD).view(like.shape).to(like.dtype)


def _draw_patches(keys: torch.Tensor, num_frames: int, num_mel_bins: int, ratios: torch.Tensor, gmml: GMML):
    """Squares of the patch grid chosen uniformly; those at the far edges may be cut."""
    patch_size = gmml.patch_size
    time_patches, mel_patches = -(-num_frames // patch_size), -(-num_mel_bins // patch_size)
    noise = uniform_noise(keys, time_patches * mel_patches)
    ranks = noise.argsort(stable=True, dim=-1).argsort(-1)  # stable: equal numbers in the same order on every device
    chosen = (ranks < (ratios[:, None] * time_patches * mel_patches).ceil()).view(-1, time_patches, mel_patches)
    pixels = chosen.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)
    return pixels[:, :num_frames, :num_mel_bins]


def _draw_at_once(
    keys: torch.Tensor, num_frames: int, num_mel_bins: int, ratios: torch.Tensor, gmml: GMML, max_ratio: float
) -> torch.Tensor:
    """
    Draws all masks in a few operations whose sizes are known in advance. Every pixel gets the number of the first
    block that covers it; a mask is the pixels up to the block that reaches its ratio, which is found by bisection.
    """
    rounds = rounds_for(num_frames, num_mel_bins, max_ratio, gmml)
    num_blocks, numbers = rounds * BLOCKS_PER_ROUND, torch.arange(rounds, device=keys.device)
    times, mels = _draw_blocks(keys[:, None], numbers, (num_frames, num_mel_bins), gmml)
    time_bits, mel_bits = _block_bits(*times, num_frames), _block_bits(*mels, num_mel_bins)
    first = torch.full((len(keys), num_frames, num_mel_bins), NOT_COVERED, dtype=torch.int16, device=keys.device)
    for index in range(time_bits.shape[1]):
        bits = time_bits[:, index, :, None] & mel_bits[:, index, None, :]
        # a float's exponent is the position of the lowest bit: 0 without any bit, else 127 + the block
        exponents = (bits & -bits).float().view(torch.int16)[..., 1::2] >> 7
        blocks = (exponents + (index * BLOCKS_PER_WORD - 127)).masked_fill_(exponents == 0, NOT_COVERED)
        first = torch.minimum(first, blocks)

    targets = ratios * (num_frames * num_mel_bins)
    low = torch.zeros(len(keys), 1, 1, dtype=torch.int16, device=keys.device)
    high = torch.full_like(low, num_blocks)  # one more than the last block, if none is enough
    for _ in range(num_blocks.bit_length()):
        middle = (low + high) // 2
        is_enough = ((first <= middle).sum((1, 2)) >= targets)[:, None, None]
        low, high = torch.where(is_enough, low, middle + 1), torch.where(is_enough, middle, high)
    torch._assert_async((high < num_blocks).all(), "the blocks of a mask do not cover its ratio")
    return first <= high


@lru_cache(maxsize=64)
def rounds_for(num_frames: int, num_mel_bins: int, ratio: float, gmml: GMML) -> int:
    """
    Number of rounds of blocks that suffices for every mask. Beyond the median, the number of blocks that a mask needs
    falls off exponentially or faster. Its rate follows from the maximum of `TRIALS` masks; one of 10^12 masks then
    needs more than the median plus five times the distance to that maximum.

    Raises:
        ValueError: blocks of this kind do not cover the ratio.
    """
    keys, ratios = mix_keys(torch.arange(TRIALS, device="cpu"), 0), torch.full((TRIALS,), ratio, device="cpu")
    _, needed = _draw_block_by_block(keys, num_frames, num_mel_bins, ratios, gmml)
    median = sorted(needed)[TRIALS // 2]
    blocks = median + 5 * (max(needed) - median) + 1
    return min(MAX_ROUNDS, -(-blocks // BLOCKS_PER_ROUND))


def _draw_block_by_block(
    keys: torch.Tensor, num_frames: int, num_mel_bins: int, ratios: torch.Tensor, gmml: GMML
) -> tuple[torch.Tensor, list[int]]:
    """Draws the same masks one block after the other. Also returns the number of blocks of each mask."""
    masks = torch.zeros(len(keys), num_frames, num_mel_bins, dtype=torch.bool, device="cpu")
    planes, missing = list(masks.numpy()), (ratios * (num_frames * num_mel_bins)).tolist()
    counts, pending = [0] * len(keys), list(range(len(keys)))
    for index in range(MAX_ROUNDS):
        times, mels = _draw_blocks(keys[pending], index, masks.shape[1:], gmml)
        blocks = torch.stack((*times, *mels), dim=-1).tolist()
        for mask, mask_blocks in zip(pending, blocks):
            missing[mask], count = _add_blocks(planes[mask], mask_blocks, missing[mask])
            counts[mask] += count
        pending = [mask for mask in pending if missing[mask] > 0]
        if not pending:
            return masks, counts
    raise ValueError(
        f"{MAX_ROUNDS * BLOCKS_PER_ROUND} blocks with max_block_ratio {gmml.max_block_ratio} and alignment "
        f"{gmml.alignment} do not cover {ratios.max().item():.2f} of {num_frames} x {num_mel_bins} pixels"
    )


def _add_blocks(mask: np.ndarray, blocks: list[list[int]], missing: float) -> tuple[float, int]:
    """
    Adds blocks to a mask in place until it covers `missing` more pixels. Returns the number of pixels that are still
    missing and the number of blocks added. Covered pixels are counted only when the blocks could have been enough.
    """
    wanted = missing + np.count_nonzero(mask)
    added = 0  # upper bound of the pixels added since the last count, because blocks overlap
    remaining = iter(blocks)
    for top, bottom, left, right in remaining:
        mask[top:bottom, left:right] = True
        added += (bottom - top) * (right - left)
        if added >= missing:
            missing, added = wanted - np.count_nonzero(mask), 0
            if missing <= 0:
                return missing, len(blocks) - length_hint(remaining)
    return wanted - np.count_nonzero(mask), len(blocks)


def _draw_blocks(
    keys: torch.Tensor, index: int | torch.Tensor, extents: tuple[int, int], gmml: GMML
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """
    Blocks of round `index`: starts and stops along time, and along mel, each of shape `(..., BLOCKS_PER_ROUND)` with
    the shape that `keys` and `index` broadcast to.
    """
    noise = uniform_noise(mix_keys(keys, index), 4 * BLOCKS_PER_ROUND).unflatten(-1, (4, -1)).unbind(-2)
    times, mels = (_block_sides(*noise[axis : axis + 2], extents[axis // 2], gmml) for axis in (0, 2))
    if gmml.pattern == "time":
        mels = (torch.zeros_like(mels[0]), torch.full_like(mels[1], extents[1]))
    elif gmml.pattern == "frequency":
        times = (torch.zeros_like(times[0]), torch.full_like(times[1], extents[0]))
    return times, mels


def _block_sides(start_noise: torch.Tensor, size_noise: torch.Tensor, extent: int, gmml: GMML) -> tuple:
    """Starts and stops of blocks along one axis, in pixels, from noise of the same shape."""
    alignment = gmml.alignment
    starts = (start_noise * (extent - alignment + 1)).long() // alignment * alignment
    longest = max(int(extent * gmml.max_block_ratio), alignment + 1)
    sizes = alignment + (size_noise * (longest - alignment)).long()  # half-open, as in the official code
    return starts, starts + _nearest_multiple(torch.minimum(sizes, extent - starts), alignment)


def _nearest_multiple(numbers: torch.Tensor, step: int) -> torch.Tensor:
    """Rounds to a multiple of `step`, half to even, in integers because devices round quotients differently."""
    if step == 1:
        return numbers
    quotients, remainders = numbers // step, numbers % step
    rounds_up = (2 * remainders > step) | ((2 * remainders == step) & (quotients % 2 == 1))
    return (quotients + rounds_up) * step


def _block_bits(starts: torch.Tensor, stops: torch.Tensor, extent: int) -> torch.Tensor:
    """
    Blocks that cover each pixel of one axis, as the bits of int32 words of `BLOCKS_PER_WORD` blocks: starts and stops
    `(masks, rounds, BLOCKS_PER_ROUND)` to `(masks, words, extent)`.
    """
    starts, stops = (sides.unflatten(-1, (-1, BLOCKS_PER_WORD)).flatten(1, 2) for sides in (starts, stops))
    bits = (1 << torch.arange(BLOCKS_PER_WORD, device=starts.device)).expand_as(starts)
    changes = starts.new_zeros(*starts.shape[:-1], extent + 1)
    changes.scatter_add_(-1, starts, bits).scatter_add_(-1, stops, -bits)
    return changes.cumsum(-1)[..., :extent].to(torch.int32)
