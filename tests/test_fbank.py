from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from asit_hf import fbank_asit
from asit_hf.fbank_asit import log_mel_spectrogram, num_fbank_frames, window_and_hop

GOLDEN = np.load(Path(__file__).parent / "fixtures" / "fbank.npz")
CASES = sorted({name.split("/")[0] for name in GOLDEN.files})
FLOOR = float(np.log(np.finfo(np.float32).eps))


def golden(case: str) -> tuple[torch.Tensor, int, torch.Tensor]:
    waveform = torch.from_numpy(GOLDEN[f"{case}/waveform"] - GOLDEN[f"{case}/mean"])
    return waveform, int(GOLDEN[f"{case}/sampling_rate"]), torch.from_numpy(GOLDEN[f"{case}/log_mel"])


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.1


@pytest.mark.parametrize("case", CASES)
def test_equals_the_official_features(case):
    waveform, rate, expected = golden(case)
    log_mel = log_mel_spectrogram(waveform, rate)
    assert log_mel.shape == expected.shape
    difference = (log_mel - expected).abs()
    assert difference[expected > FLOOR + 1e-3].max() < 2e-3
    # CPUs round FFT and products differently, in quiet bins at 44.1 kHz by 1.1e-5 or 2.1e-5 on average
    assert difference.mean() < 5e-5
    assert difference[expected > expected.max() - 10].max() < 1e-4


@pytest.mark.parametrize(("rate", "window", "hop"), [(16000, 400, 160), (8000, 200, 80), (44100, 1102, 441)])
def test_window_and_hop(rate, window, hop):
    assert window_and_hop(rate) == (window, hop)
    assert num_fbank_frames(window - 1, rate) == 0
    assert num_fbank_frames(window, rate) == 1
    assert num_fbank_frames(window + 3 * hop - 1, rate) == 3


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 2), (0,)])
def test_leading_dimensions_are_kept_and_clips_are_independent(shape):
    waveforms = noise(*shape, 2000)
    log_mel = log_mel_spectrogram(waveforms, 16000)
    assert log_mel.shape == (*shape, num_fbank_frames(2000, 16000), 128)
    for clip, features in zip(waveforms.reshape(-1, 2000), log_mel.reshape(-1, 11, 128)):
        torch.testing.assert_close(log_mel_spectrogram(clip, 16000), features, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_do_not_change_the_result(monkeypatch, chunk):
    waveforms = noise(2, 48000)
    expected = log_mel_spectrogram(waveforms, 16000)
    monkeypatch.setattr(fbank_asit, "CHUNK_FRAMES", chunk)
    torch.testing.assert_close(log_mel_spectrogram(waveforms, 16000), expected, rtol=0, atol=1e-4)


def test_non_contiguous_waveforms():
    waveforms = noise(2000, 3).T
    torch.testing.assert_close(
        log_mel_spectrogram(waveforms, 16000), log_mel_spectrogram(waveforms.contiguous(), 16000), rtol=0, atol=1e-3
    )


def test_autocast_does_not_lower_the_precision():
    waveform = noise(4000)
    expected = log_mel_spectrogram(waveform, 16000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_mel = log_mel_spectrogram(waveform, 16000)
    assert log_mel.dtype == torch.float32
    assert torch.equal(log_mel, expected)


def test_result_is_float32_for_other_input_types():
    waveform = noise(4000)
    expected = log_mel_spectrogram(waveform, 16000)
    torch.testing.assert_close(log_mel_spectrogram(waveform.double(), 16000), expected, rtol=0, atol=0)
    assert log_mel_spectrogram(waveform.half(), 16000).dtype == torch.float32


def test_torchs_default_dtype_does_not_matter():
    waveform = noise(4000)
    expected = log_mel_spectrogram(waveform, 16000)
    fbank_asit.mel_filters.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        log_mel = log_mel_spectrogram(waveform, 16000)
    finally:
        torch.set_default_dtype(torch.float32)
        fbank_asit.mel_filters.cache_clear()
    torch.testing.assert_close(log_mel, expected, rtol=0, atol=1e-4)


def test_silence_is_the_floor_and_an_offset_is_removed():
    assert torch.allclose(log_mel_spectrogram(torch.zeros(800), 16000), torch.tensor(FLOOR))
    waveform = noise(4000)
    torch.testing.assert_close(
        log_mel_spectrogram(waveform + 0.5, 16000), log_mel_spectrogram(waveform, 16000), rtol=0, atol=1e-2
    )


def test_a_pure_tone_peaks_in_the_bin_of_its_frequency():
    time = torch.arange(16000) / 16000
    low, high = (log_mel_spectrogram(torch.sin(2 * torch.pi * hertz * time), 16000).mean(0) for hertz in (300, 4000))
    assert low.argmax() < 30
    assert 85 < high.argmax() < 100


@pytest.mark.parametrize("num_mel_bins", [40, 64])
def test_other_numbers_of_mel_bins(num_mel_bins):
    assert log_mel_spectrogram(noise(2, 4000), 16000, num_mel_bins).shape == (2, 23, num_mel_bins)


def test_input_is_not_changed():
    waveform = noise(2000)
    copy = waveform.clone()
    log_mel_spectrogram(waveform, 16000)
    assert torch.equal(waveform, copy)


def test_a_waveform_shorter_than_one_window_is_an_error():
    with pytest.raises(ValueError, match="400.*399"):
        log_mel_spectrogram(torch.zeros(2, 399), 16000)


def test_accelerators_compute_the_same_without_chunks():
    waveforms = torch.rand(2, 3, 16000, generator=torch.Generator().manual_seed(0)) - 0.5
    filters, window = fbank_asit.mel_filters(16000, 128, 512), torch.hann_window(400, periodic=False)
    frames = waveforms.unfold(-1, 400, 160)
    output = torch.empty(2 * 3 * 98, 128)
    fbank_asit._log_mel_of_frames(frames.flatten(0, 2), window, 512, filters, output)
    torch.testing.assert_close(output.view(2, 3, 98, 128), log_mel_spectrogram(waveforms, 16000), rtol=0, atol=1e-5)


def test_constants_of_a_tracer_are_not_cached(monkeypatch):
    waveform = torch.randn(1, 9000, generator=torch.Generator().manual_seed(0))
    expected = log_mel_spectrogram(waveform, 22050, 40)
    monkeypatch.setattr(fbank_asit, "_CONSTANTS", {})
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        log_mel_spectrogram(mode.from_tensor(waveform), 22050, 40)
    features = log_mel_spectrogram(waveform, 22050, 40)
    assert type(features) is torch.Tensor
    assert torch.equal(features, expected)
