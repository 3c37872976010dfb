"""
Start of a fresh process: what `import asit_hf` adds to the import of transformers' AST; how much longer than import
and loading the first label takes, from the pipeline and from `python -m asit_hf.predict`; and its memory.

    python examples/benchmarks/startup.py    # five minutes

Ratios are between processor times: on a busy machine, elapsed times of processes that take seconds vary severalfold.
What elapsed is in the notes. OMP_NUM_THREADS=1 leaves no thread that waits for another.
"""

import subprocess
import sys
import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from statistics import median
from time import process_time

import numpy as np
import soundfile
from common import Report, Row, medians, ranges, run_alone, time_interleaved

from asit_hf import ASiTAudioClassificationPipeline, ASiTConfig, ASiTFeatureExtractor, ASiTForAudioClassification
from asit_hf.predict import load_classifier

LABELS = 50
CLIP_SECONDS, CLIP_RATE = 5, 44100
IMPORT_LIMIT = 0.3  # seconds
LABEL_TARGETS = {"small": 1.1, "base": None}  # base: the inference itself is longer than a tenth of the start
MEMORY_TARGETS = {"small": None, "base": 1.25}  # small: its weights are not much larger than the activations
TOY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}

IMPORTS = """
from time import perf_counter, process_time
start = process_time()
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification, ASTModel, pipeline
between, elapsed = process_time(), perf_counter()
import asit_hf
print(between - start, process_time() - between, perf_counter() - elapsed)
"""
LOADING = """
import sys
import asit_hf
from asit_hf.loading import load_trained
load_trained(sys.argv[1], asit_hf.ASiTForAudioClassification, dtype="auto")
"""
FIRST_LABEL = """
import sys
from transformers import pipeline
import asit_hf
def peak():
    status = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(status.split()[1]) / 1024
before = peak()
pipeline("audio-classification", model=sys.argv[1])(sys.argv[2])
print(before, peak())
"""


def run(*arguments: str) -> tuple[float, list[float]]:
    """Runs Python to its end: the processor time it takes, in seconds, and the numbers that a script prints."""
    before = getrusage(RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{arguments}: {done.stderr}")
    after = getrusage(RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, [float(word) for word in done.stdout.split()] if "-c" in arguments else []


def save(size: str, folder: Path, quick: bool) -> None:
    config = ASiTConfig(num_labels=LABELS, **TOY) if quick else ASiTConfig.from_size(size, num_labels=LABELS)
    ASiTForAudioClassification(config).save_pretrained(folder)
    ASiTFeatureExtractor().save_pretrained(folder)


def label_again(classifier: ASiTAudioClassificationPipeline, clip: str) -> tuple[float, list[float]]:
    """As `run`, in this process."""
    start = process_time()
    classifier(clip)
    return process_time() - start, []


def measure(quick: bool = False) -> Report:
    """Times in seconds and memory in MiB, medians of processes that take turns."""
    report = Report("startup")
    rounds, warm_up = (1, 0) if quick else (5, 1)
    sizes = list(LABEL_TARGETS)[: 1 if quick else None]
    runs: dict[str, list[tuple[float, list[float]]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        clip = str(Path(folder, "clip.wav"))
        noise = np.random.default_rng(0).normal(0, 0.1, CLIP_SECONDS * CLIP_RATE)
        soundfile.write(clip, noise, CLIP_RATE)
        measured = {"imports": partial(run, "-c", IMPORTS)}
        for size in sizes:
            model = str(Path(folder, size))
            save(size, Path(model), quick)
            measured |= {
                f"{size}, import and loading": partial(run, "-c", LOADING, model),
                f"{size}, pipeline": partial(run, "-c", FIRST_LABEL, model, clip),
                f"{size}, predict": partial(run, "-m", "asit_hf.predict", model, clip),
                f"{size}, a label of a warm pipeline": partial(label_again, load_classifier(model), clip),
            }
        calls = {name: lambda name=name, call=call: runs[name].append(call()) for name, call in measured.items()}
        elapsed = time_interleaved(calls, rounds, warm_up)
        weights = {size: Path(folder, size, "model.safetensors").stat().st_size / 2**20 for size in sizes}
    seconds = medians({name: [one for one, _ in kept[warm_up:]] for name, kept in runs.items()})
    printed = {
        name: [median(values) for values in zip(*(one for _, one in kept[warm_up:]))] for name, kept in runs.items()
    }
    theirs, added, added_elapsed = printed["imports"]
    report.add(Row("added by import asit_hf, against 0.3 s", added, IMPORT_LIMIT, target=1.0))
    report.add(Row("added by import asit_hf, against the import of AST", added, theirs, at_most=True))
    for size in sizes:
        for name in ("pipeline", "predict"):
            what = f"{size}, first label of {name} against import and loading"
            ours, theirs = seconds[f"{size}, {name}"], seconds[f"{size}, import and loading"]
            report.add(Row(what, ours, theirs, target=LABEL_TARGETS[size], at_most=True))
    for size in sizes:
        before, after = printed[f"{size}, pipeline"]
        what = f"{size}, peak memory of the first label beyond that of the import, against the weights"
        report.add(Row(what, after - before, weights[size], "MiB", MEMORY_TARGETS[size], at_most=True))
    report.notes.append(f"Elapsed while import asit_hf added to the import of AST: {added_elapsed:.3f} s.")
    report.notes += [
        f"{name}: processor time {seconds[name]:.2f} s; {ranges({'elapsed': times})}."
        for name, times in elapsed.items()
    ]
    return report


if __name__ == "__main__":
    run_alone(measure)
