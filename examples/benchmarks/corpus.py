"""
Throughput of `predict` and `embed` over many files: the share of the time that the bare forward passes need, against a
loop of transformers' AST pipeline, and against ASiT's own pipeline. Models have random weights.

    python examples/benchmarks/corpus.py
    python examples/benchmarks/corpus.py --clips 1000 --files 100 --minutes 10 --rounds 1    # hours at base size

The clips, of 5 s, and the recordings are flac at 44.1 kHz and wav at 16 kHz in turn, generated in a temporary folder.
The bare forward passes repeat those of the run: same shapes and masks, same number of threads, but no reading and no
log-mel. Models are loaded beforehand, so the start of a process is not included.
"""

import argparse
import inspect
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from common import Report, Row, machine_facts, medians, ranges, time_interleaved, to_markdown, write_results
from inference import build_pipelines, classify
from torch import nn

from asit_hf.configuration_asit import SIZES

RATES = {"flac": 44100, "wav": 16000}
CLIP_SECONDS = 5
SHARE = 0.85  # target
TARGETS = {"base": SHARE, "small": None}
BATCHES = (1, 8)  # of the pipelines
Call = tuple[torch.Size, torch.dtype, torch.device, dict[str, Any]]


def write_audio(folder: Path, count: int, seconds: int) -> Path:
    """A folder of `count` files of noise, flac at 44.1 kHz and wav at 16 kHz in turn."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(count):
        extension = list(RATES)[index % len(RATES)]
        rate = RATES[extension]
        with soundfile.SoundFile(folder / f"{index:05d}.{extension}", "w", samplerate=rate, channels=1) as file:
            for _ in range(seconds):
                file.write(0.3 * np.hanning(rate) * generator.uniform(-1, 1, rate))
    return folder


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[Call]]:
    """The forward passes within the block: shape, type and device of the input, and the other arguments themselves."""
    calls: list[Call] = []

    def record(module: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
        named = dict(inspect.signature(module.forward).bind(*arguments, **keywords).arguments)
        values, others = named.pop("input_values"), named.pop("kwargs", {})
        calls.append((values.shape, values.dtype, values.device, {**named, **others}))

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@torch.inference_mode()
def repeat(model: nn.Module, calls: list[Call]) -> None:
    """The forward passes of `calls` on values that are not read from anywhere."""
    for shape, dtype, device, arguments in calls:
        model(torch.zeros(shape, dtype=dtype, device=device), **arguments)
    if device.type == "cuda":
        torch.cuda.synchronize()
