"""
Group masked model learning (GMML): what the student sees instead of the clean spectrogram.

Rectangles of time and mel are drawn until a share of the pixels is covered; the covered pixels are set to zero (or to
noise) or replaced by the same region of another clip. Bands of time or of mel, and single patches, stand beside the
rectangles for comparison. Every random number is a hash of a clip's key, so a mask depends on that
key alone: not on the batch, the device, the number of workers or the state of any generator.
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
NOISE_STD = 0.5  # that of a spectrogram normalized by (x - mean) / (2 std)
NOT_COVERED = 2**15 - 1  # in place of a block's number


@dataclass(frozen=True)
class GMML:
    """
    The corruption's parameters.

    Args:
        mask_ratio (`tuple[float, float]`): range of the share of pixels covered by zeros, drawn per view.
        replace_ratio (`float`): share of pixels replaced by another clip's.
        replace_probability (`float`): how often a view is corrupted by replacement instead of zeros.
        max_block_ratio (`float`): longest side of a block, as a share of the time and mel extents.
        alignment (`int`): blocks start and end at multiples of this many pixels; 1 is what the authors run.
        pattern (`str`): `"blocks"` of time and mel (the authors'), bands of `"time"` over all mel bins, bands of
            `"frequency"` over all frames, or single `"patches"` chosen uniformly (no groups).
        filling (`str`): what stands in for zeros: `"zeros"` (the authors' choice) or Gaussian `"noise"` with the
            standard deviation of a normalized spectrogram. The authors' own noise is drawn at another scale.
        patch_size (`int`): side of the squares of `"patches"`.
    """

    mask_ratio: tuple[float, float] = (0.5, 0.5)
    replace_ratio: float = 0.3
    replace_probability: float = 0.5
    max_block_ratio: float = 0.3
    alignment: int = 1
    pattern: str = "blocks"
    filling: str = "zeros"
    patch_size: int = 16

    def __post_init__(self):
        low, high = self.mask_ratio
        if not 0 < low <= high < 1:
            raise ValueError(f"mask_ratio must be a range inside (0, 1), got {self.mask_ratio}")
        if not 0 < self.replace_ratio < 1:
            raise ValueError(f"replace_ratio must be inside (0, 1), got {self.replace_ratio}")
        if not 0 <= self.replace_probability <= 1:
            raise ValueError(f"replace_probability must be in [0, 1], got {self.replace_probability}")
        if not 0 < self.max_block_ratio <= 1:
            raise ValueError(f"max_block_ratio must be in (0, 1], got {self.max_block_ratio}")
        if self.alignment < 1 or self.patch_size < 1:
            raise ValueError(
                f"alignment and patch_size must be at least 1 pixel, got {self.alignment} and {self.patch_size}"
            )
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern must be one of {PATTERNS}, got {self.pattern!r}")
        if self.filling not in FILLS:
            raise ValueError(f"filling must be one of {FILLS}, got {self.filling!r}")


def draw_keys(count: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """`count` keys from a torch generator, for masks outside a training run."""
    return torch.randint(2**62, (count,), generator=generator)


def draw_masks(
    keys: torch.Tensor,
    num_frames: int,
    num_mel_bins: int,
    shares: torch.Tensor,
    config: GMML,
    max_share: float | None = None,
) -> torch.Tensor:
    """
    Masks of the configured pattern, each of its own share of the pixels.

    Args:
        keys (`torch.Tensor` of shape `(masks,)`): int64 keys.
        shares (`torch.Tensor` of shape `(masks,)`): share of the pixels to cover, at least.
        max_share (`float`, *optional*): see [`draw_block_masks`].

    Returns:
        Boolean `torch.Tensor` of shape `(masks, num_frames, num_mel_bins)`, `True` where corrupted.
    """
    _check_shares(keys, shares)
    if config.pattern == "patches":
        return _draw_patches(keys, num_frames, num_mel_bins, shares, config.patch_size)
    kind = (config.max_block_ratio, config.alignment, config.pattern)
    return draw_block_masks(keys, num_frames, num_mel_bins, shares, *kind, max_share)


def draw_block_masks(
    keys: torch.Tensor,
    num_frames: int,
    num_mel_bins: int,
    shares: torch.Tensor,
    max_block_ratio: float,
    alignment: int = 1,
    pattern: str = "blocks",
    max_share: float | None = None,
) -> torch.Tensor:
    """
    Masks made of rectangles (or bands) added until each covers its share of the pixels; see [`draw_masks`].

    A rectangle's corner is uniform over the plane and its sides are uniform up to `max_block_ratio` of each extent, cut at
    the far edges: the first frames and the lowest bins are therefore covered less, as in the authors' masks.

    Args:
        max_share (`float`, *optional*): no share is larger. Without it an accelerator has to be asked for the largest.
    """
    _check_shares(keys, shares)
    kind = (max_block_ratio, alignment, pattern)
    if choices_for(keys.device).masks_block_by_block:
        return _draw_block_by_block(keys, num_frames, num_mel_bins, shares, *kind)[0]
    if max_share is None:
        max_share = shares.max().item()
    return _draw_at_once(keys, num_frames, num_mel_bins, shares, max_share, *kind)


def corrupt(
    clean: torch.Tensor, keys: torch.Tensor, donor_key: int, config: GMML
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Corrupts a batch of spectrograms.

    Args:
        clean (`torch.Tensor` of shape `(batch, views, frames, mel)`).
        keys (`torch.Tensor` of shape `(batch,)`): one int64 key per clip; decides its masks.
        donor_key (`int`): decides, with the position in the batch, which other clip replaces a clip's pixels. A batch
            of one has no other clip and is corrupted by zeros (or noise).

    Returns:
        The corrupted spectrograms and the boolean mask of what was corrupted, both of the shape of `clean`.
    """
    batch, views, frames, mel = clean.shape
    if keys.shape != (batch,):
        raise ValueError(f"expected one key for each of the {batch} clips, got keys of shape {tuple(keys.shape)}")
    keys = mix_keys(keys.to(clean.device)[:, None], torch.arange(views, device=clean.device))
    choice, share = uniform_noise(mix_keys(keys, 0), 2).unbind(-1)
    low, high = config.mask_ratio
    shares = low + (high - low) * share
    replaces = choice < (config.replace_probability if batch > 1 else 0.0)
    shares = shares.masked_fill(replaces, config.replace_ratio)
    max_share = max(high, config.replace_ratio)
    mask = draw_masks(mix_keys(keys, 1).flatten(), frames, mel, shares.flatten(), config, max_share).view(clean.shape)
    donors = draw_donors(batch, donor_key, clean.device)
    blank = _gaussian_noise(mix_keys(keys, 2), clean) if config.filling == "noise" else clean.new_zeros(())
    if not choices_for(clean.device).masks_block_by_block:
        filling = torch.where(replaces[:, :, None, None], clean[donors], blank)
        return torch.where(mask, filling, clean), mask
    corrupted = torch.empty_like(clean)
    donors = (donors[:, None] * views + torch.arange(views)).flatten().tolist()
    planes = [tensor.flatten(0, 1).unbind() for tensor in (clean, mask, blank.expand_as(clean), corrupted)]
    # plane by plane, in a processor's cache
    for source, where, nothing, out, donor, is_replaced in zip(*planes, donors, replaces.flatten().tolist()):
        torch.where(where, planes[0][donor] if is_replaced else nothing, source, out=out)
    return corrupted, mask


def draw_donors(batch: int, key: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """For every clip of a batch the index of another one, never itself (a batch of one: itself): `(batch,)`."""
    index = torch.arange(batch, device=device)
    noise = uniform_noise(mix_keys(torch.full((1,), key, device=device), index), 1)[:, 0]
    shift = 1 + (noise * (batch - 1)).long().clamp_max(max(batch - 2, 0))
    return (index + shift) % batch


def _check_shares(keys: torch.Tensor, shares: torch.Tensor) -> None:
    if keys.shape != shares.shape:
        raise ValueError(
            f"expected one share for every key, got {tuple(keys.shape)} keys and {tuple(shares.shape)} shares"
        )


def _gaussian_noise(keys: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(batch, views) keys to noise of the shape and type of `like`, (batch, views, frames, mel)."""
    frames, mel = like.shape[-2:]
    uniform = uniform_noise(keys, frames * mel) + 2**-25  # never 0, whose quantile is infinite
    return (torch.special.ndtri(uniform) * NOISE_STD).view(like.shape).to(like.dtype)


def _draw_patches(
    keys: torch.Tensor, num_frames: int, num_mel_bins: int, shares: torch.Tensor, patch_size: int
) -> torch.Tensor:
    """Squares of the patch grid chosen uniformly; those at the far edges may be cut."""
    rows, columns = -(-num_frames // patch_size), -(-num_mel_bins // patch_size)
    noise = uniform_noise(keys, rows * columns)
    ranks = noise.argsort(stable=True, dim=-1).argsort(-1)  # stable: equal numbers in the same order on every device
    chosen = (ranks < (shares[:, None] * rows * columns).ceil()).view(-1, rows, columns)
    pixels = chosen.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)
    return pixels[:, :num_frames, :num_mel_bins]


def _draw_at_once(
    keys: torch.Tensor,
    num_frames: int,
    num_mel_bins: int,
    shares: torch.Tensor,
    max_share: float,
    longest: float,
    alignment: int,
    pattern: str,
) -> torch.Tensor:
    """
    All masks in a few operations whose sizes are known beforehand, so that the host never waits for an accelerator.
    Every pixel gets the number of the first block that covers it; a mask is the pixels up to the block that reaches
    its share, which is found by bisection.
    """
    rounds = rounds_for(num_frames, num_mel_bins, max_share, longest, alignment, pattern)
    numbers = torch.arange(rounds, device=keys.device)
    rows, columns = _draw_blocks(keys[:, None], numbers, (num_frames, num_mel_bins), longest, alignment, pattern)
    row_bits, column_bits = _block_bits(*rows, num_frames), _block_bits(*columns, num_mel_bins)
    first = torch.full((len(keys), num_frames, num_mel_bins), NOT_COVERED, dtype=torch.int16, device=keys.device)
    for index in range(row_bits.shape[1]):
        bits = row_bits[:, index, :, None] & column_bits[:, index, None, :]
        # the float's own exponent is that of the lowest bit: 0 where there is none, else 127 + its block
        exponents = (bits & -bits).float().view(torch.int16)[..., 1::2] >> 7
        blocks = (exponents + (index * BLOCKS_PER_WORD - 127)).masked_fill_(exponents == 0, NOT_COVERED)
        first = torch.minimum(first, blocks)

    targets = shares * (num_frames * num_mel_bins)
    low = torch.zeros(len(keys), 1, 1, dtype=torch.int16, device=keys.device)
    high = torch.full_like(low, rounds * BLOCKS_PER_ROUND)  # one more than the last block, as if none were enough
    for _ in range((rounds * BLOCKS_PER_ROUND).bit_length()):
        middle = (low + high) // 2
        is_enough = ((first <= middle).sum((1, 2)) >= targets)[:, None, None]
        low, high = torch.where(is_enough, low, middle + 1), torch.where(is_enough, middle, high)
    torch._assert_async((high < rounds * BLOCKS_PER_ROUND).all(), "a mask's blocks do not cover its share")
    return first <= high


@lru_cache(maxsize=64)
def rounds_for(num_frames: int, num_mel_bins: int, share: float, longest: float, alignment: int, pattern: str) -> int:
    """
    Rounds of blocks after which no mask will need another. How many blocks a mask needs falls off exponentially or
    faster beyond the median; that `TRIALS` masks need at most so many gives the rate, at which one of 10^12 masks
    needs more than the median and five times the distance to the most.

    Raises:
        ValueError: blocks of this kind do not cover the share.
    """
    keys = mix_keys(torch.arange(TRIALS, device="cpu"), 0)
    shares = torch.full((TRIALS,), share, device="cpu")
    _, needed = _draw_block_by_block(keys, num_frames, num_mel_bins, shares, longest, alignment, pattern)
    median = sorted(needed)[TRIALS // 2]
    blocks = median + 5 * (max(needed) - median) + 1
    return min(MAX_ROUNDS, -(-blocks // BLOCKS_PER_ROUND))


def _draw_block_by_block(
    keys: torch.Tensor, num_frames: int, num_mel_bins: int, shares: torch.Tensor, longest: float, *kind: int | str
) -> tuple[torch.Tensor, list[int]]:
    """
    The same masks, and how many blocks each of them took. A processor is faster so, as most blocks need no count of
    what is covered; `longest` and `kind` as for [`_draw_blocks`].
    """
    masks = torch.zeros(len(keys), num_frames, num_mel_bins, dtype=torch.bool, device="cpu")
    planes = list(masks.numpy())
    missing = (shares * (num_frames * num_mel_bins)).tolist()
    counts = [0] * len(keys)
    pending = list(range(len(keys)))
    for index in range(MAX_ROUNDS):
        rows, columns = _draw_blocks(keys[pending], index, masks.shape[1:], longest, *kind)
        blocks = torch.stack((*rows, *columns), dim=-1).tolist()
        for mask, mask_blocks in zip(pending, blocks):
            missing[mask], count = _add_blocks(planes[mask], mask_blocks, missing[mask])
            counts[mask] += count
        pending = [mask for mask in pending if missing[mask] > 0]
        if not pending:
            return masks, counts
    raise ValueError(
        f"{MAX_ROUNDS * BLOCKS_PER_ROUND} blocks of at most {longest} of each side, aligned to {kind[0]} pixels, "
        f"do not cover {shares.max().item():.2f} of {num_frames} x {num_mel_bins} pixels"
    )


def _add_blocks(mask: np.ndarray, blocks: list[list[int]], missing: float) -> tuple[float, int]:
    """
    Adds blocks to a mask in place until it has `missing` pixels more. Returns how many are missing then, and the
    number of blocks that were added.
    """
    wanted = missing + np.count_nonzero(mask)
    added = 0  # pixels since the last count, at most: blocks overlap
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
    keys: torch.Tensor,
    index: int | torch.Tensor,
    extents: tuple[int, int],
    longest: float,
    alignment: int,
    pattern: str,
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """
    Round `index` of blocks: starts and stops along time, and along mel, each `(..., BLOCKS_PER_ROUND)` with the shape
    that `keys` and `index` broadcast to.
    """
    noise = uniform_noise(mix_keys(keys, index), 4 * BLOCKS_PER_ROUND).unflatten(-1, (4, -1)).unbind(-2)
    rows = _block_sides(noise[0], noise[1], extents[0], longest, alignment)
    columns = _block_sides(noise[2], noise[3], extents[1], longest, alignment)
    if pattern == "time":
        columns = (torch.zeros_like(columns[0]), torch.full_like(columns[1], extents[1]))
    elif pattern == "frequency":
        rows = (torch.zeros_like(rows[0]), torch.full_like(rows[1], extents[0]))
    return rows, columns


def _block_sides(
    start_noise: torch.Tensor, size_noise: torch.Tensor, extent: int, max_block_ratio: float, alignment: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where every block starts and stops along one axis, in pixels; all of one shape."""
    starts = (start_noise * (extent - alignment + 1)).long() // alignment * alignment
    longest = max(int(extent * max_block_ratio), alignment + 1)
    sizes = alignment + (size_noise * (longest - alignment)).long()  # half-open, as the authors' range is
    return starts, starts + _nearest_multiple(torch.minimum(sizes, extent - starts), alignment)


def _nearest_multiple(numbers: torch.Tensor, step: int) -> torch.Tensor:
    """Of two that are as near, the even one. In integers: devices round quotients in different ways."""
    if step == 1:
        return numbers
    quotients, remainders = numbers // step, numbers % step
    rounds_up = (2 * remainders > step) | ((2 * remainders == step) & (quotients % 2 == 1))
    return (quotients + rounds_up) * step


def _block_bits(starts: torch.Tensor, stops: torch.Tensor, extent: int) -> torch.Tensor:
    """
    Which pixels of one axis every block covers, `BLOCKS_PER_WORD` blocks as the bits of a number: two
    `(masks, rounds, BLOCKS_PER_ROUND)` -> `(masks, words, extent)` int32.
    """
    starts, stops = (sides.unflatten(-1, (-1, BLOCKS_PER_WORD)).flatten(1, 2) for sides in (starts, stops))
    bits = (1 << torch.arange(BLOCKS_PER_WORD, device=starts.device)).expand_as(starts)
    changes = starts.new_zeros(*starts.shape[:-1], extent + 1)
    changes.scatter_add_(-1, starts, bits).scatter_add_(-1, stops, -bits)
    return changes.cumsum(-1)[..., :extent].to(torch.int32)
