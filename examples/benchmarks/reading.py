"""
Reading audio: crops from an hour against crops from a minute, the loader against the authors' data path, a packed pool
against flac files, and the time that a training step waits for its data.

    python examples/benchmarks/reading.py

The files are generated in a temporary folder; if ASIT_REAL_AUDIO is set, the loader reads ESC-50 from there instead.
"""

import logging
import os
import random
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from common import Report, Row, medians, ranges, run_alone, time_interleaved
from official_loop import replace_in_python, zeros_in_python
from torch.utils.data import DataLoader, Dataset, default_collate
from training_step import PRESETS, build_model, build_trainer
from transformers import TrainerCallback
from transformers.audio_utils import mel_filter_bank

from asit_hf import ASiTFeatureExtractor
from asit_hf.data import PackedCrops, PretrainingCrops
from asit_hf.data.audio import read_audio
from asit_hf.data.collators import collate_crops
from asit_hf.data.packed import to_pcm, write_packed
from asit_hf.pretraining.masking import corrupt
from asit_hf.pretraining.presets import get_preset
from asit_hf.utils.cpu import keep_freed_memory

RATE = 16000
LONG_RATE = 24000  # of the files that crops are cut from, so that crops are resampled
FORMATS = ("wav", "flac", "ogg", "mp3")
LENGTH_TARGET, LOADER_TARGET, WAITING_TARGET, PACKED_TARGET = 2.0, 5.0, 0.05, 10.0
WORKERS = 2
with warnings.catch_warnings(action="ignore"):  # some of the lowest filters fall between two bins and are empty
    MEL_FILTERS = mel_filter_bank(257, 128, 20.0, RATE / 2, RATE, mel_scale="kaldi", triangularize_in_mel_space=True)


class OfficialDataset(Dataset):
    """
    The authors' data path restated: decode the whole file, cut crops, compute the log-mel of each, and draw masks in
    Python, all in loader workers. Replacement by other clips follows in `official_collate`, which sees the batch.
    """

    def __init__(self, files: list[str], preset: str):
        self.files = files
        self.preset = get_preset(preset)
        self.extractor = ASiTFeatureExtractor()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        waveform, rate = soundfile.read(self.files[index], dtype="float32", always_2d=True)
        waveform = torch.from_numpy(soxr.resample(waveform.mean(1), rate, RATE))
        if random.random() < self.preset.roll_probability:
            waveform = waveform.roll(random.randrange(len(waveform)))
        views = [self._spectrogram(waveform, 6.0) for _ in range(2)]
        pairs = [zeros_in_python(view, self.preset.gmml) for view in views]
        local = [self._spectrogram(waveform, 2.0) for _ in range(self.preset.num_local_crops)]
        return {"clean": views, "corrupted": [p[0] for p in pairs], "masks": [p[1] for p in pairs], "local": local}

    def _spectrogram(self, waveform: torch.Tensor, seconds: float) -> torch.Tensor:
        length = round(seconds * RATE)
        waveform = torch.nn.functional.pad(waveform, (0, max(0, length - len(waveform))))
        start = random.randrange(len(waveform) - length + 1)
        log_mel = plain_log_mel(waveform[start : start + length])
        return self.extractor.normalize(log_mel)[None, : len(log_mel) // 16 * 16]


def plain_log_mel(waveform: torch.Tensor) -> torch.Tensor:
    """`(samples,)` -> `(frames, 128)`: the definition of `asit_hf.fbank_asit`, each operation on the whole clip."""
    waveform = waveform - waveform.mean()
    frames = waveform.unfold(0, 400, 160)
    frames = frames - frames.mean(1, keepdim=True)
    previous = torch.cat((frames[:, :1], frames[:, :-1]), dim=1)
    frames = (frames - 0.97 * previous) * torch.hann_window(400, periodic=False)
    power = torch.fft.rfft(frames, n=512).abs() ** 2
    return (power @ torch.from_numpy(MEL_FILTERS).float()).clamp_min(torch.finfo(torch.float32).eps).log()


def official_collate(items: list[dict[str, Any]], preset: str) -> dict[str, Any]:
    batch = default_collate(items)
    for clean, corrupted, masks in zip(batch["clean"], batch["corrupted"], batch["masks"]):
        replace_in_python(clean, corrupted, masks, get_preset(preset).gmml)
    return batch


def measure(quick: bool = False) -> Report:
    """Crops from long files, loader throughput, and waiting time."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    report = Report("reading")
    keep_freed_memory()  # as the trainer does; both sides and their workers benefit
    with tempfile.TemporaryDirectory() as folder:
        _measure_length(report, Path(folder), quick)
        files = find_files(Path(folder), quick)
        pool = Path(folder) / "pool"
        write_packed(pool, ((file, None, to_pcm(read_audio(file, RATE))) for file in files), RATE)
        _measure_loader(report, files, pool, quick)
        _measure_waiting(report, files, folder, quick)
    return report


def find_files(folder: Path, quick: bool) -> list[str]:
    """200 flac files: from ESC-50 if there is real audio, else 10 s of noise each."""
    count = 8 if quick else 200
    real = os.environ.get("ASIT_REAL_AUDIO")
    if real:
        return [str(path) for path in sorted(Path(real, "esc50-16k", "audio").glob("*.flac"))[:count]]
    generator = np.random.default_rng(0)
    for index in range(count):
        write_noise(folder / f"{index}.flac", 7 if quick else 10, RATE, generator)
    return [str(folder / f"{index}.flac") for index in range(count)]


def write_noise(path: Path, seconds: int, rate: int, generator: np.random.Generator) -> None:
    """Noise with an envelope that rises and falls every second, written in blocks of a second."""
    envelope = np.hanning(rate)
    with soundfile.SoundFile(path, "w", samplerate=rate, channels=1) as file:
        for _ in range(seconds):
            file.write(0.3 * envelope * generator.uniform(-1, 1, rate))


def _measure_length(report: Report, folder: Path, quick: bool) -> None:
    """A crop of 6 s at a random offset: from an hour against from a minute, and against decoding the whole hour."""
    generator = np.random.default_rng(0)
    short, long = (10, 60) if quick else (60, 3600)
    for extension in FORMATS:
        paths = {seconds: folder / f"{seconds}.{extension}" for seconds in (short, long)}
        for seconds, path in paths.items():
            write_noise(path, seconds, LONG_RATE, generator)

        def crop(seconds: int, paths: dict[int, Path] = paths) -> None:
            read_audio(paths[seconds], RATE, offset=generator.uniform(0, seconds - 6), duration=6.0)

        seconds = time_interleaved({"short": lambda: crop(short), "long": lambda: crop(long)}, 1 if quick else 15)
        start = time.perf_counter()
        soxr.resample(soundfile.read(paths[long], dtype="float32")[0], LONG_RATE, RATE)
        whole = time.perf_counter() - start
        found = medians(seconds)
        target = None if extension == "mp3" else LENGTH_TARGET
        name = f"{extension}, crop of 6 s: file of {long} s against {short} s"
        report.add(Row(name, found["long"], found["short"], target=target, at_most=True))
        report.add(Row(f"{extension}, crop of 6 s against the whole {long} s", found["long"], whole))
        for path in paths.values():
            path.unlink()
    report.notes.append("An mp3 file has no index: its decoder reads the headers of all frames before a crop.")


def _measure_loader(report: Report, files: list[str], pool: Path, quick: bool) -> None:
    """
    Clips per second of the loader alone, and including log-mel and masks; then of a packed pool without workers
    against the loader of flac files.
    """
    batch, files, passes = (4, files, 1) if quick else (16, 3 * files, 3)
    for preset in PRESETS:
        calls = {
            "ours": lambda preset=preset: _count(our_batches(files, preset, batch)),
            "ours prepared": lambda preset=preset: _count(prepared_batches(files, preset, batch)),
            "theirs": lambda preset=preset: _count(official_batches(files, preset, batch)),
            "packed": lambda preset=preset: _count(packed_batches(pool, preset, batch, passes)),
        }
        seconds = time_interleaved(calls, rounds=1 if quick else 3, warm_up=0)
        found = {name: len(files) / value for name, value in medians(seconds).items()}
        options = {"unit": "clips/s", "higher_is_better": True}
        name = f"{preset}, loader with {WORKERS} workers"
        report.add(Row(name, found["ours"], found["theirs"], target=LOADER_TARGET, **options))
        report.add(Row(f"{name}, log-mel and masks included", found["ours prepared"], found["theirs"], **options))
        name = f"{preset}, packed pool without workers against {WORKERS} workers that read flac"
        report.add(Row(name, found["packed"], found["ours"], target=PACKED_TARGET, **options))
        report.notes.append(f"{preset}, loader, {len(files)} clips: {ranges(seconds)}.")


def _count(batches: Iterable) -> int:
    return sum(1 for _ in batches)


def our_batches(files: list[str], preset: str, batch: int) -> DataLoader:
    """Batches of waveform crops; log-mel and masks follow on the model's device."""
    chosen = get_preset(preset)
    crops = PretrainingCrops(
        files, RATE, num_local_crops=chosen.num_local_crops, roll_probability=chosen.roll_probability
    )
    return DataLoader(crops, batch_size=batch, num_workers=WORKERS, collate_fn=collate_crops)


def packed_batches(pool: Path, preset: str, batch: int, passes: int) -> Iterator[dict[str, torch.Tensor]]:
    """Crops of `passes` epochs of a packed pool, gathered as `ASiTPreTrainer` does."""
    chosen = get_preset(preset)
    crops = PackedCrops(pool, RATE, num_local_crops=chosen.num_local_crops, roll_probability=chosen.roll_probability)
    for epoch in range(passes):
        crops.set_epoch(epoch)
        for keys in DataLoader(crops, batch_size=batch, shuffle=True, collate_fn=collate_crops):
            yield keys | crops.gather(keys["indices"], keys["sample_keys"])


def prepared_batches(files: list[str], preset: str, batch: int) -> Iterator[dict[str, torch.Tensor]]:
    """The loader's batches with log-mel and masks, as in `ASiTPreTrainer.prepare_views`."""
    extractor, gmml = ASiTFeatureExtractor(), get_preset(preset).gmml
    for waveforms in our_batches(files, preset, batch):
        clean = extractor.extract(waveforms["global_waveforms"], waveforms["global_lengths"])
        clean = clean[:, :, : clean.shape[2] // 16 * 16]
        corrupted, masks = corrupt(clean, waveforms["sample_keys"], 0, gmml)
        views = {"clean": clean, "corrupted": corrupted, "masks": masks}
        if "local_waveforms" in waveforms:
            views["local"] = extractor.extract(waveforms["local_waveforms"], waveforms["local_lengths"])
        yield views


def official_batches(files: list[str], preset: str, batch: int) -> DataLoader:
    return DataLoader(
        OfficialDataset(files, preset),
        batch_size=batch,
        num_workers=WORKERS,
        collate_fn=partial(official_collate, preset=preset),
    )


class WaitingTime(TrainerCallback):
    """Seconds of each step, and between steps, when the loop waits for data."""

    def __init__(self):
        self.steps: list[float] = []
        self.waits: list[float] = []
        self._ended: float | None = None

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.perf_counter()
        if self._ended is not None:
            self.waits.append(self._began - self._ended)

    def on_step_end(self, args, state, control, **kwargs):
        self._ended = time.perf_counter()
        self.steps.append(self._ended - self._began)


def _measure_waiting(report: Report, files: list[str], folder: str, quick: bool) -> None:
    """Steps of the small model, preset 2023, batch 4, with loader workers."""
    model = build_model("2023", quick)
    seconds = 6.0 * model.config.num_frames / 592
    crops = PretrainingCrops(files, RATE, global_seconds=seconds + 0.025, num_local_crops=0)
    options = {"preset": "2023", "bf16": True, "warmup_epochs": 0, "max_steps": 2 if quick else 8}
    loading = {"per_device_train_batch_size": 4, "dataloader_num_workers": WORKERS}
    trainer = build_trainer(model, crops, folder, **options, **loading)
    waiting = WaitingTime()
    trainer.add_callback(waiting)
    trainer.train()
    name = f"waiting for data against the step, {WORKERS} workers"
    report.add(Row(name, median(waiting.waits), median(waiting.steps), target=WAITING_TARGET, at_most=True))


if __name__ == "__main__":
    run_alone(measure)
