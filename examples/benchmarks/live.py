"""
Latency of live listening on one core: from the arrival of a window's last samples to its labels, for windows of 1, 2,
5 and 10 s, models of tiny and small size with random weights, and input at 16 kHz or resampled from 44.1 kHz.

    python examples/benchmarks/live.py    # three minutes
"""

import time
from collections.abc import Iterator

import numpy as np
from common import Report, Row, run_alone, threads

from asit_hf import ASiTAudioClassificationPipeline, ASiTConfig, ASiTFeatureExtractor, ASiTForAudioClassification
from asit_hf.data.live import BLOCK_SECONDS
from asit_hf.listen import listen

LABELS = 50
LIMIT = 100  # milliseconds, above which a label seems late
WINDOWS = (1.0, 2.0, 5.0, 10.0)
HOP_SECONDS = 0.25
CASES = [("tiny", 16000, 1.0), ("small", 16000, None), ("tiny", 44100, None)]  # size, rate of the source, target
TOY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def build_classifier(size: str, quick: bool) -> ASiTAudioClassificationPipeline:
    config = ASiTConfig(num_labels=LABELS, **TOY) if quick else ASiTConfig.from_size(size, num_labels=LABELS)
    model = ASiTForAudioClassification(config).eval()
    return ASiTAudioClassificationPipeline(model=model, feature_extractor=ASiTFeatureExtractor())


def noise(rate: int, seconds: float) -> Iterator[np.ndarray]:
    """Blocks of 20 ms in real time."""
    generator, began = np.random.default_rng(0), time.monotonic()
    for count in range(1, round(seconds / BLOCK_SECONDS) + 1):
        time.sleep(max(0.0, began + count * BLOCK_SECONDS - time.monotonic()))
        yield generator.uniform(-0.5, 0.5, round(BLOCK_SECONDS * rate)).astype(np.float32)


def measure(quick: bool = False) -> Report:
    report = Report("live")
    more = 0.5 if quick else 10.0  # seconds after the first window
    with threads(1):
        for size, rate, target in CASES:
            classifier = build_classifier(size, quick)
            for seconds in WINDOWS[:1] if quick else WINDOWS:
                windows = list(listen(classifier, noise(rate, seconds + more), rate, seconds, HOP_SECONDS))
                latencies = [1000 * window["latency"] for window in windows]
                skipped = sum(window["skipped"] for window in windows)
                half, most = np.percentile(latencies, [50, 95])
                what = f"{size}, {rate / 1000:g} kHz, windows of {seconds:g} s"
                limit = target if seconds <= 5 else None
                report.add(Row(f"{what}, median against {LIMIT} ms", float(half), LIMIT, "ms", limit))
                report.notes.append(
                    f"{what}: median {half:.1f} ms, 95th percentile {most:.1f} ms, longest {max(latencies):.1f} ms; "
                    f"{len(windows)} windows, {skipped} skipped."
                )
    return report


if __name__ == "__main__":
    run_alone(measure)
