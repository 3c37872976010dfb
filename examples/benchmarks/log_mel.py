"""
Log-mel of 32 clips of 10 s at 16 kHz: ours against transformers' ASTFeatureExtractor without torchaudio and against
kaldi-native-fbank.

    python examples/benchmarks/log_mel.py

kaldi-native-fbank is optional: `pip install "kaldi-native-fbank>=1.20,<1.23"`; later ones reject 128 bins at 16 kHz.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import torch
from common import Report, Row, medians, ranges, run_alone, threads, time_interleaved
from transformers import ASTFeatureExtractor
from transformers.models.audio_spectrogram_transformer import feature_extraction_audio_spectrogram_transformer as ast

from asit_hf import ASiTFeatureExtractor

RATE = 16000
TARGETS = {"ASTFeatureExtractor": 8.0, "kaldi-native-fbank": 3.0}


def kaldi_log_mel(clips: list[np.ndarray], num_threads: int) -> list[np.ndarray]:
    """Log-mel `(frames, 128)` of each clip by kaldi-native-fbank, clips in parallel threads."""
    import kaldi_native_fbank

    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = RATE
    options.frame_opts.dither = 0.0
    options.frame_opts.window_type = "hanning"
    options.mel_opts.num_bins = 128

    def extract(clip: np.ndarray) -> np.ndarray:
        fbank = kaldi_native_fbank.OnlineFbank(options)
        fbank.accept_waveform(RATE, clip - clip.mean())
        fbank.input_finished()
        return np.stack([fbank.get_frame(index) for index in range(fbank.num_frames_ready)])

    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(extract, clips))


def has_kaldi() -> bool:
    try:
        import kaldi_native_fbank  # noqa: F401
    except ImportError:
        return False
    return True


def build_calls(clips: list[np.ndarray], num_threads: int) -> dict[str, Callable[[], object]]:
    """The available implementations by name, ours first."""
    extractor = ASiTFeatureExtractor()
    with mock.patch.object(ast, "is_speech_available", return_value=False):
        baseline = ASTFeatureExtractor()  # computes its filters here

    def transformers_log_mel():
        with mock.patch.object(ast, "is_speech_available", return_value=False):
            return baseline(clips, sampling_rate=RATE, return_tensors="pt")

    calls = {
        "ours": lambda: extractor(clips, sampling_rate=RATE, return_tensors="pt"),
        "ASTFeatureExtractor": transformers_log_mel,
    }
    if has_kaldi():
        calls["kaldi-native-fbank"] = lambda: kaldi_log_mel(clips, num_threads)
    return calls


def measure(quick: bool = False) -> Report:
    """On one thread, and on torch's number of threads."""
    report = Report("log-mel")
    generator = np.random.default_rng(0)
    clips = list(generator.uniform(-0.5, 0.5, (2 if quick else 32, RATE * (1 if quick else 10))).astype(np.float32))
    for count in sorted({1, torch.get_num_threads()}):
        with threads(count):
            seconds = time_interleaved(build_calls(clips, count), rounds=1 if quick else 5)
        found = medians(seconds)
        for name in list(found)[1:]:
            report.add(Row(f"{name}, threads: {count}", found["ours"], found[name], target=TARGETS[name]))
        report.notes.append(f"threads: {count}: {ranges(seconds)}.")
    if not has_kaldi():
        report.notes.append("kaldi-native-fbank is not installed and was skipped.")
    return report


if __name__ == "__main__":
    run_alone(measure)
