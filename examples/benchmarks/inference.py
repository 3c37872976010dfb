"""
From array to label: ASiT's pipeline against that of transformers' AST, both of base size with random weights, on clips
of 10 s and 1 s, singly and in batches of 16. AST pads every clip to 10.24 s and uses overlapping patches.

    python examples/benchmarks/inference.py
"""

from collections.abc import Iterable
from functools import partial
from unittest import mock

import numpy as np
import torch
from common import Report, Row, medians, ranges, run_alone, time_interleaved
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    AudioClassificationPipeline,
    pipeline,
)
from transformers.models.audio_spectrogram_transformer import feature_extraction_audio_spectrogram_transformer as ast

import asit_hf  # noqa: F401  registers its pipeline
from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForAudioClassification
from asit_hf.utils.cpu import has_bf16_instructions

RATE = 16000
LABELS = 50
TARGETS = {10: 2.7, 1: 15.0}
BATCHES = (1, 16)
TOY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def build_pipelines(dtype: torch.dtype, quick: bool, **sizes: int) -> dict[str, AudioClassificationPipeline]:
    """The pipelines "ours" and "theirs", whose models have the same width, depth and precision; by default base."""
    sizes = TOY if quick else sizes
    ours = ASiTForAudioClassification(ASiTConfig(num_labels=LABELS, **sizes))
    theirs = ASTForAudioClassification(ASTConfig(num_labels=LABELS, **sizes))
    extractors = {"ours": ASiTFeatureExtractor(), "theirs": _without_torchaudio(ASTFeatureExtractor)}
    return {
        name: pipeline("audio-classification", model=model.to(dtype).eval(), feature_extractor=extractors[name])
        for name, model in (("ours", ours), ("theirs", theirs))
    }


def measure(quick: bool = False) -> Report:
    """In float32, and in bfloat16 if the CPU has instructions for it."""
    report = Report("inference")
    generator = np.random.default_rng(0)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        if precision == "bf16" and not has_bf16_instructions():
            report.notes.append("bf16: not measured, because this CPU has no instructions for it.")
            continue
        pipelines = build_pipelines(dtype, quick)
        for seconds, target in TARGETS.items():
            for batch in BATCHES:
                count = 1 if quick else batch
                clips = list(generator.uniform(-0.5, 0.5, (count, RATE * seconds)).astype(np.float32))
                calls = {name: partial(classify, one, clips, batch) for name, one in pipelines.items()}
                found = time_interleaved(calls, rounds=1 if quick else 5)
                what = f"{precision}, clips of {seconds} s, batch {batch}"
                chosen = medians(found)
                report.add(Row(f"{what}, against AST", chosen["ours"], chosen["theirs"], target=target))
                report.notes.append(f"{what}: {ranges(found)}.")
    return report


def classify(classifier: AudioClassificationPipeline, clips: Iterable[np.ndarray], batch: int) -> list:
    """The labels of clips. AST's feature extractor does without torchaudio."""
    with mock.patch.object(ast, "is_speech_available", return_value=False):
        return classifier([clip.copy() for clip in clips], batch_size=batch)


def _without_torchaudio(extractor_class: type[ASTFeatureExtractor]) -> ASTFeatureExtractor:
    with mock.patch.object(ast, "is_speech_available", return_value=False):
        return extractor_class()


if __name__ == "__main__":
    run_alone(measure)
