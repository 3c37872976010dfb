"""Batched Kaldi log-mel filter banks in torch."""

import math
from functools import lru_cache
from numbers import Real
from typing import Any

import torch

WINDOW_SECONDS = 0.025
HOP_SECONDS = 0.010
LOW_FREQUENCY = 20.0
PREEMPHASIS = 0.97
# Frames per chunk on a CPU, so that buffers stay in its cache; one pass over a large batch is slower.
CHUNK_FRAMES = 512


def whole_rate(rate: Any) -> int:
    """
    A sampling rate in whole Hz above 0 as `int`. It may be a number, also with a fraction of 0, or an array or tensor
    of one, as data sets in other formats and loaders give it. Raises `ValueError` for anything else.
    """
    number = rate.item() if hasattr(rate, "item") and math.prod(rate.shape) == 1 else rate
    if isinstance(number, bool) or not isinstance(number, Real) or number <= 0 or number % 1:
        raise ValueError(f"sampling_rate: expected a sampling rate in whole Hz above 0, got {rate!r}")
    return int(number)


def window_and_hop(sampling_rate: int) -> tuple[int, int]:
    """Window and hop in samples at `sampling_rate` Hz."""
    return int(sampling_rate * WINDOW_SECONDS), int(sampling_rate * HOP_SECONDS)


def num_fbank_frames(num_samples: int, sampling_rate: int) -> int:
    """Number of whole windows in `num_samples` samples (Kaldi's `snip_edges`)."""
    window, hop = window_and_hop(sampling_rate)
    return 0 if num_samples < window else 1 + (num_samples - window) // hop


@lru_cache(maxsize=32)
def mel_filters(sampling_rate: int, num_mel_bins: int, fft_size: int) -> list[tuple[slice, torch.Tensor]]:
    """
    Kaldi's triangular filters from 20 Hz to Nyquist, without the Nyquist bin. The low and the high half are each a
    slice of frequency bins and a matrix of shape (bins, filters), because the full matrix is mostly zeros.
    """
    low, high = (1127.0 * math.log1p(hertz / 700.0) for hertz in (LOW_FREQUENCY, sampling_rate / 2))
    step = (high - low) / (num_mel_bins + 1)
    index = torch.arange(num_mel_bins, dtype=torch.float32, device="cpu")
    left, center, right = (low + (index + offset) * step for offset in (0.0, 1.0, 2.0))
    hertz = sampling_rate / fft_size * torch.arange(fft_size // 2, dtype=torch.float32, device="cpu")
    bins = 1127.0 * (1.0 + hertz / 700.0).log()[:, None]
    filters = torch.minimum((bins - left) / (center - left), (right - bins) / (right - center)).clamp_min(0)
    halves = []
    for half in filters.chunk(2, dim=1):
        used = half.any(1).nonzero().flatten().tolist() or [0]
        bins = slice(used[0], used[-1] + 1)
        halves.append((bins, half[bins].contiguous()))
    return halves


_CONSTANTS: dict[tuple, tuple[torch.Tensor, list[tuple[slice, torch.Tensor]]]] = {}


def _constants(
    sampling_rate: int, num_mel_bins: int, window_size: int, fft_size: int, device: torch.device
) -> tuple[torch.Tensor, list[tuple[slice, torch.Tensor]]]:
    """The window and the filters, cached for each device, because a copy in every call would make the host wait."""
    key = (sampling_rate, num_mel_bins, window_size, fft_size, device)
    if key not in _CONSTANTS or torch.compiler.is_compiling():
        with torch.inference_mode(False):
            window = torch.hann_window(window_size, periodic=False, dtype=torch.float32, device="cpu").to(device)
            filters = mel_filters(sampling_rate, num_mel_bins, fft_size)
            constants = window, [(bins, half.to(device)) for bins, half in filters]
        if not is_real(window):
            return constants
        _CONSTANTS[key] = constants
    return _CONSTANTS[key]


def is_real(tensor: torch.Tensor) -> bool:
    """Whether a tensor has values that can be cached; tensors of a tracer have none."""
    return type(tensor) is torch.Tensor and not torch.compiler.is_compiling()


def log_mel_spectrogram(waveforms: torch.Tensor, sampling_rate: int, num_mel_bins: int = 128) -> torch.Tensor:
    """
    Kaldi-compatible log-mel filter banks: 25 ms symmetric Hann ("hanning") windows every 10 ms, DC removed from each
    window, pre-emphasis 0.97, power spectrum, mel filters from 20 Hz to Nyquist, natural logarithm floored at
    float32's epsilon; no dither and no energy. They are computed in float32, because half precision loses quiet bins.

    Args:
        waveforms (`torch.Tensor` of shape `(..., samples)`): in [-1, 1], on any device.
        sampling_rate (`int`): in Hz.
        num_mel_bins (`int`, defaults to 128): number of mel filters.

    Returns:
        `torch.Tensor` of shape `(..., frames, num_mel_bins)`, float32, with [`num_fbank_frames`] frames.
    """
    window_size, hop = window_and_hop(sampling_rate)
    if waveforms.shape[-1] < window_size:
        expected = f"{window_size} samples at {sampling_rate} Hz"
        raise ValueError(f"expected waveforms of at least one window, {expected}, got {waveforms.shape[-1]}")
    device = waveforms.device
    with torch.autocast(device.type, enabled=False):
        fft_size = 2 ** math.ceil(math.log2(window_size))
        window, filters = _constants(sampling_rate, num_mel_bins, window_size, fft_size, device)
        frames = waveforms.float().unfold(-1, window_size, hop)
        shape = frames.shape[:-1]
        outputs = torch.empty(shape.numel(), num_mel_bins, dtype=torch.float32, device=device)
        clips, start = frames.reshape(-1, *frames.shape[-2:]), 0
        if device.type == "cpu":  # frames are views into the waveform, so only one chunk is copied
            chunks = [chunk for clip in clips for chunk in clip.split(CHUNK_FRAMES)]
        else:
            chunks = [clips.flatten(0, 1)]
        for chunk in chunks:
            _log_mel_of_frames(chunk, window, fft_size, filters, outputs[start : start + len(chunk)])
            start += len(chunk)
    return outputs.view(*shape, num_mel_bins)


def _log_mel_of_frames(frames: torch.Tensor, window: torch.Tensor, fft_size: int, filters: list, output: torch.Tensor):
    """Frames `(frames, samples)` to `output` of shape `(frames, mel)`."""
    frames = frames - frames.mean(-1, keepdim=True)
    size = frames.shape[-1]
    emphasized = frames.new_empty(len(frames), fft_size)
    emphasized[:, 0] = (1 - PREEMPHASIS) * frames[:, 0]  # Kaldi repeats the first sample
    # round twice as Kaldi does; a fused multiply-add changes quiet bins by up to 2e-3
    torch.mul(frames[:, :-1], -PREEMPHASIS, out=emphasized[:, 1:size])
    emphasized[:, 1:size] += frames[:, 1:]
    emphasized[:, :size] *= window
    emphasized[:, size:] = 0
    squares = torch.view_as_real(torch.fft.rfft(emphasized)).square_()
    power = squares[..., 0] + squares[..., 1]
    for (bins, half), part in zip(filters, output.chunk(len(filters), dim=1)):
        torch.mm(power[:, bins], half, out=part)
    output.clamp_min_(torch.finfo(torch.float32).eps).log_()
