"""
Group masked model learning (GMML): what the student sees instead of the clean spectrogram.

Rectangles of time and mel are drawn until a share of the pixels is covered; the covered pixels are set to zero (or to
noise) or replaced by the same region of another clip. Bands of time or of mel, and single patches, stand beside the
rectangles for comparison. Every random number is a hash of a clip's key, so a mask depends on that
key alone: not on the batch, the device, the number of workers or the state of any generator.
"""

from dataclasses import dataclass

import torch

BLOCKS_PER_ROUND = 62  # one bit each of a signed 64-bit word
MAX_ROUNDS = 64
PATTERNS = ("blocks", "time", "frequency", "patches")
FILLINGS = ("zeros", "noise")
NOISE_STD = 0.5  # that of a spectrogram normalised by (x - mean) / (2 std)
_SAMPLES_PER_CHUNK = 4  # fits a processor's cache
# splitmix64's constants 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB as signed integers
_GOLDEN_GAMMA, _MIX_1, _MIX_2 = -7046029254386353131, -4658895280553007687, -7723592293110705685


@dataclass(frozen=True)
class GMML:
    """
    The corruption's parameters.

    Args:
        zero_share (`tuple[float, float]`): range of the share of pixels covered by zeros, drawn per view.
        replace_share (`float`): share of pixels replaced by another clip's.
        replace_probability (`float`): how often a view is corrupted by replacement instead of zeros.
        max_block (`float`): longest side of a block, as a share of the time and mel extents.
        alignment (`int`): blocks start and end at multiples of this many pixels; 1 is what the authors run.
        pattern (`str`): `"blocks"` of time and mel (the authors'), bands of `"time"` over all mel bins, bands of
            `"frequency"` over all frames, or single `"patches"` chosen uniformly (no groups).
        filling (`str`): what stands in for zeros: `"zeros"` (the authors' choice) or Gaussian `"noise"` with the
            standard deviation of a normalised spectrogram. The authors' own noise is drawn at another scale.
        patch_size (`int`): side of the squares of `"patches"`.
    """

    zero_share: tuple[float, float] = (0.5, 0.5)
    replace_share: float = 0.3
    replace_probability: float = 0.5
    max_block: float = 0.3
    alignment: int = 1
    pattern: str = "blocks"
    filling: str = "zeros"
    patch_size: int = 16

    def __post_init__(self):
        low, high = self.zero_share
        if not 0 < low <= high < 1:
            raise ValueError(f"zero_share must be a range inside (0, 1), got {self.zero_share}")
        if not 0 < self.replace_share < 1:
            raise ValueError(f"replace_share must be inside (0, 1), got {self.replace_share}")
        if not 0 <= self.replace_probability <= 1:
            raise ValueError(f"replace_probability must be in [0, 1], got {self.replace_probability}")
        if not 0 < self.max_block <= 1:
            raise ValueError(f"max_block must be in (0, 1], got {self.max_block}")
        if self.alignment < 1 or self.patch_size < 1:
            raise ValueError(
                f"alignment and patch_size must be at least 1 pixel, got {self.alignment} and {self.patch_size}"
            )
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern must be one of {PATTERNS}, got {self.pattern!r}")
        if self.filling not in FILLINGS:
            raise ValueError(f"filling must be one of {FILLINGS}, got {self.filling!r}")


def mix_keys(keys: torch.Tensor, *values: int | torch.Tensor) -> torch.Tensor:
    """Hashes int64 keys with further integers (splitmix64's finaliser); broadcasts. The same on every device."""
    for value in values:
        keys = _finalise(keys + (torch.as_tensor(value, device=keys.device) + 1) * _GOLDEN_GAMMA)
    return keys


def uniform_noise(keys: torch.Tensor, count: int) -> torch.Tensor:
    """`count` numbers in [0, 1) for every key: `(...)` -> `(..., count)`, float32."""
    bits = mix_keys(keys[..., None], torch.arange(count, device=keys.device))
    return ((bits >> 40) & 0xFFFFFF).float() * 2**-24


def draw_keys(count: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """`count` keys from a torch generator, for masks outside a training run."""
    return torch.randint(2**62, (count,), generator=generator)


def draw_masks(
    keys: torch.Tensor, num_frames: int, num_mel_bins: int, shares: torch.Tensor, config: GMML
) -> torch.Tensor:
    """
    Masks of the configured pattern, each of its own share of the pixels.

    Args:
        keys (`torch.Tensor` of shape `(masks,)`): int64 keys.
        shares (`torch.Tensor` of shape `(masks,)`): share of the pixels to cover, at least.

    Returns:
        Boolean `torch.Tensor` of shape `(masks, num_frames, num_mel_bins)`, `True` where corrupted.
    """
    if keys.shape != shares.shape:
        raise ValueError(
            f"expected one share for every key, got {tuple(keys.shape)} keys and {tuple(shares.shape)} shares"
        )
    if config.pattern == "patches":
        return _draw_patches(keys, num_frames, num_mel_bins, shares, config.patch_size)
    return draw_block_masks(keys, num_frames, num_mel_bins, shares, config.max_block, config.alignment, config.pattern)


def draw_block_masks(
    keys: torch.Tensor,
    num_frames: int,
    num_mel_bins: int,
    shares: torch.Tensor,
    max_block: float,
    alignment: int = 1,
    pattern: str = "blocks",
) -> torch.Tensor:
    """
    Masks made of rectangles (or bands) added until each covers its share of the pixels; see [`draw_masks`].

    A rectangle's corner is uniform over the plane and its sides are uniform up to `max_block` of each extent, cut at
    the far edges: the first frames and the lowest bins are therefore covered less, as in the authors' masks.
    """
    # an accelerator takes all at once: it waits for the host once a chunk
    size = _SAMPLES_PER_CHUNK if keys.device.type == "cpu" else max(len(keys), 1)
    chunks = zip(keys.split(size), shares.split(size))
    masks = [_draw_chunk(k, num_frames, num_mel_bins, s, max_block, alignment, pattern) for k, s in chunks]
    return torch.cat(masks)


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
    low, high = config.zero_share
    shares = low + (high - low) * share
    replaces = choice < (config.replace_probability if batch > 1 else 0.0)
    shares = torch.where(replaces, config.replace_share, shares)
    mask = draw_masks(mix_keys(keys, 1).flatten(), frames, mel, shares.flatten(), config).view(clean.shape)
    blank = _gaussian_noise(mix_keys(keys, 2), clean) if config.filling == "noise" else 0.0
    filling = torch.where(replaces[..., None, None], clean[draw_donors(batch, donor_key, clean.device)], blank)
    return torch.where(mask, filling, clean), mask


def draw_donors(batch: int, key: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """For every clip of a batch the index of another one, never itself (a batch of one: itself): `(batch,)`."""
    index = torch.arange(batch, device=device)
    noise = uniform_noise(mix_keys(torch.full((1,), key, device=device), index), 1)[:, 0]
    shift = 1 + (noise * (batch - 1)).long().clamp_max(max(batch - 2, 0))
    return (index + shift) % batch


def _finalise(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift; torch's own shift of signed integers keeps the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


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
    ranks = uniform_noise(keys, rows * columns).argsort(-1).argsort(-1)
    chosen = (ranks < (shares[:, None] * rows * columns).ceil()).view(-1, rows, columns)
    pixels = chosen.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)
    return pixels[:, :num_frames, :num_mel_bins]


def _draw_chunk(
    keys: torch.Tensor,
    num_frames: int,
    num_mel_bins: int,
    shares: torch.Tensor,
    max_block: float,
    alignment: int,
    pattern: str,
) -> torch.Tensor:
    targets = shares * (num_frames * num_mel_bins)
    mask = torch.zeros(len(keys), num_frames, num_mel_bins, dtype=torch.bool, device=keys.device)
    for round_index in range(MAX_ROUNDS):
        noise = uniform_noise(mix_keys(keys, round_index), 4 * BLOCKS_PER_ROUND).unflatten(-1, (4, -1))
        rows = _block_bits(noise[:, 0], noise[:, 1], num_frames, max_block, alignment)
        columns = _block_bits(noise[:, 2], noise[:, 3], num_mel_bins, max_block, alignment)
        if pattern == "time":
            columns = torch.full_like(columns, 2**BLOCKS_PER_ROUND - 1)
        elif pattern == "frequency":
            rows = torch.full_like(rows, 2**BLOCKS_PER_ROUND - 1)
        mask, covered = _add_blocks(mask, rows, columns, targets)
        if bool((covered >= targets).all()):
            return mask
    raise ValueError(
        f"{MAX_ROUNDS * BLOCKS_PER_ROUND} blocks of at most {max_block} of each side, aligned to {alignment} pixels, "
        f"do not cover {shares.max().item():.2f} of {num_frames} x {num_mel_bins} pixels"
    )


def _block_bits(
    start_noise: torch.Tensor, size_noise: torch.Tensor, extent: int, max_block: float, alignment: int
) -> torch.Tensor:
    """Which pixels of one axis every block covers, block k as bit k: two `(masks, blocks)` -> `(masks, extent)`."""
    starts = (start_noise * (extent - alignment + 1)).long() // alignment * alignment
    longest = max(int(extent * max_block), alignment + 1)
    sizes = alignment + (size_noise * (longest - alignment)).long()  # half-open, as the authors' range is
    sizes = (torch.minimum(sizes, extent - starts) / alignment).round().long() * alignment
    pixels = torch.arange(extent, device=starts.device)[:, None]
    inside = (pixels >= starts[:, None]) & (pixels < (starts + sizes)[:, None])
    return (inside.long() << torch.arange(starts.shape[-1], device=starts.device)).sum(-1)


def _add_blocks(
    mask: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds blocks in their order to every mask that has not reached its target yet; also returns the coverage."""
    covering = (rows[:, :, None] & columns[:, None, :]).masked_fill(mask, 0)
    lowest = covering & -covering  # the first block that covers a pixel, as a power of two
    exponents = torch.frexp(lowest.double())[1]  # 0: none; k + 1: block k
    counts = torch.zeros(len(mask), BLOCKS_PER_ROUND + 1, device=mask.device, dtype=torch.float32)
    counts.scatter_add_(1, exponents.flatten(1).long(), torch.ones_like(lowest.flatten(1), dtype=torch.float32))
    before = mask.flatten(1).sum(1, dtype=torch.float32)
    covered = before[:, None] + counts[:, 1:].cumsum(1)
    needed = (covered < targets[:, None]).sum(1) + 1  # blocks up to the one that reaches the target
    needed = torch.where(before >= targets, 0, needed)
    added = (exponents > 0) & (exponents <= needed[:, None, None])
    mask = mask | added
    return mask, mask.flatten(1).sum(1, dtype=torch.float32)
