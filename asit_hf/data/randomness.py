"""Random numbers as hashes of keys: the same on every device, in every worker, and in a resumed run."""

import torch


def _signed(x):
    """An integer's lowest 64 bits as int64; a tensor is int64 and wraps around by itself."""
    return ((x + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63) if isinstance(x, int) else x


# splitmix64 (Steele, Lea, Flood 2014): the increment of its state, and the shifts and multipliers of its finalizer.
_GOLDEN_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))


def sample_key(seed: int, epoch: int, index: int, attempt: int = 0) -> int:
    """A hash of the arguments in [0, 2^63), from which everything random about one sample is drawn."""
    key = 0
    for part in (seed, epoch, index, attempt):
        key = _finalize(_signed((key ^ int(part)) + _GOLDEN_GAMMA))
    return _shift_right(key, 1)


def mix_keys(keys: torch.Tensor, *values: int | torch.Tensor) -> torch.Tensor:
    """Hash int64 keys together with further integers; broadcasts."""
    for value in values:
        # integers stay in Python: as a tensor they would be copied to the device
        value = value if isinstance(value, torch.Tensor) else int(value)
        keys = _finalize(keys + _signed((value + 1) * _GOLDEN_GAMMA))
    return keys


def uniform_noise(keys: torch.Tensor, count: int) -> torch.Tensor:
    """`count` numbers in [0, 1) for every key: `(...)` -> `(..., count)`, float32."""
    bits = mix_keys(keys[..., None], torch.arange(count, device=keys.device))
    return ((bits >> 40) & 0xFFFFFF).float() * 2**-24


class Seeded:
    """Mixin for data sets whose random draws are a function of (seed, epoch, sample)."""

    def __init__(self, seed: int):
        self.seed = seed
        # in shared memory, so that running loader workers see the epoch change
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw other random numbers from the next item (of a stream: its next pass) on, in running workers too."""
        self._epoch.fill_(epoch)


def _finalize(x):
    """The finalizer of splitmix64, of an int64 tensor or an integer in the range of int64."""
    for bits, factor in _MIX:
        x = _signed((x ^ _shift_right(x, bits)) * factor)
    return x ^ _shift_right(x, 31)


def _shift_right(x, bits: int):
    """Logical shift of 64-bit integers; Python's and torch's own shifts keep the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
