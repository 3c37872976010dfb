"""Random numbers as hashes of keys: the same on every device, in every worker, and in a resumed run."""

import torch

# splitmix64: the increment of its state, and the multipliers of its finalizer.
_GOLDEN_GAMMA, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def sample_key(seed: int, epoch: int, index: int, attempt: int = 0) -> int:
    """A number in [0, 2^63) that is a good hash of its arguments: the seed of all randomness of one sample."""
    key = 0
    for part in (seed, epoch, index, attempt):
        key = ((key ^ (int(part) & _MASK)) + _GOLDEN_GAMMA) & _MASK
        key = ((key ^ (key >> 30)) * _MIX_1) & _MASK
        key = ((key ^ (key >> 27)) * _MIX_2) & _MASK
        key ^= key >> 31
    return key >> 1


def mix_keys(keys: torch.Tensor, *values: int | torch.Tensor) -> torch.Tensor:
    """Hash int64 keys together with further integers; broadcasts. The same on every device."""
    for value in values:
        if isinstance(value, torch.Tensor):
            increment = (value + 1) * _signed(_GOLDEN_GAMMA)
        else:  # in Python, as a tensor would be copied to the device
            increment = _signed((int(value) + 1) * _GOLDEN_GAMMA)
        keys = _finalize(keys + increment)
    return keys


def uniform_noise(keys: torch.Tensor, count: int) -> torch.Tensor:
    """`count` numbers in [0, 1) for every key: `(...)` -> `(..., count)`, float32."""
    bits = mix_keys(keys[..., None], torch.arange(count, device=keys.device))
    return ((bits >> 40) & 0xFFFFFF).float() * 2**-24


def _finalize(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ _shift_right(x, 31)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift; torch's own shift of signed integers keeps the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _signed(value: int) -> int:
    """The lowest 64 bits as the signed integer that torch has."""
    return ((value + (1 << 63)) & _MASK) - (1 << 63)
