"""
Mutate small audio files, tables, folders, configurations and checkpoints, and read them.

    python examples/benchmarks/fuzz.py --inputs 20000

Each input is a function of the seed and its number. It must be read, or refused with an error of its kind whose
message names the file: `AudioReadError` for audio, `ValueError` or `FileNotFoundError` for the rest. Anything else is
a failure: another error, a message without the file's name, more than 2 s of processor time, memory beyond 100 times
the file plus 32 MiB, or the death of the process. The inputs are read in a process of their own, which is replaced
when it hangs or dies. The exit status is 1 if an input failed; `--only NUMBER` reads one again and shows its
traceback.
"""

import argparse
import io
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

SECONDS = 2.0  # of processor time, so that a busy machine does not count
HANG_SECONDS = 30.0
MEMORY_FACTOR, MEMORY_FLOOR = 100, 32 << 20  # the floor covers what libraries load or cache when first used
START_SECONDS = 60.0  # of a new process, until it has imported everything
RATE = 16000

# format, subtype and extension of libsndfile's files
SNDFILE = (
    ("WAV", "PCM_16", ".wav"),
    ("WAV", "PCM_24", ".wav"),
    ("WAV", "FLOAT", ".wav"),
    ("WAV", "ULAW", ".wav"),
    ("WAV", "MS_ADPCM", ".wav"),
    ("RF64", "PCM_16", ".wav"),
    ("W64", "PCM_16", ".w64"),
    ("FLAC", "PCM_16", ".flac"),
    ("OGG", "VORBIS", ".ogg"),
    ("OGG", "OPUS", ".opus"),
    ("MP3", "MPEG_LAYER_III", ".mp3"),
    ("AIFF", "PCM_16", ".aiff"),
    ("AU", "PCM_16", ".au"),
    ("CAF", "PCM_16", ".caf"),
)
# container, codec and extension of ffmpeg's files, through PyAV
FFMPEG = (("mp4", "aac", ".m4a"), ("adts", "aac", ".aac"), ("webm", "libopus", ".webm"), ("asf", "wmav2", ".wma"))
TABLES = {
    "comma.csv": 'file,label,fold,split\na.wav,dog,1,train\nb.wav,cat,2,test\nc.wav,"Male speech, man",1,train\n',
    "semicolon.csv": "filename;class;speaker\na.wav; dog;s1\nb.wav; cat ;s2\n\nc.wav;dog;s1\n",
    "tab.tsv": "path\tlabels\na.wav\tdog;cat\nb.wav\tcat\nc.wav\tdog|cat\n",
    "list.json": '[{"audio": "a.wav", "label": ["dog", "cat"]}, {"audio": "b.wav", "label": "cat"}]',
    "ast.json": '{"data": [{"wav": "a.wav", "labels": "/m/01,/m/02"}, {"wav": "b.wav", "labels": "/m/01"}]}',
    "lines.jsonl": '{"file": "a.wav", "label": 1.0}\n{"file": "b.wav", "label": 0}\n{"file": "c.wav", "label": 1}\n',
}
EVENTS = {
    "dcase.tsv": "filename\tonset\toffset\tevent_label\na.wav\t0.1\t0.4\tdog\nb.wav\t\t\t\nc.wav\t0.0\t1.0\tcat\n",
    "audacity.txt": "0.100000\t0.400000\tdog\n0.5\t0.9\tcat\n",
    "raven.txt": "Selection\tView\tChannel\tBegin Time (s)\tEnd Time (s)\tBegin File\tAnnotation\n"
    "1\tSpectrogram 1\t1\t0.1\t0.4\ta.wav\tdog\n",
}


@dataclass(frozen=True)
class Sample:
    """A file to mutate: its name and content, and how it is read (`folder` holds the mutated file, and others)."""

    kind: str
    name: str
    content: bytes
    read: Callable[[Path], object]
    errors: tuple[type[Exception], ...]
    folder: Path | None = None  # with the other files that reading needs


def sound(seconds: float = 0.25) -> np.ndarray:
    return (0.3 * np.random.default_rng(0).standard_normal(round(seconds * RATE))).clip(-0.9, 0.9).astype(np.float32)


def sndfile_content(format: str, subtype: str) -> bytes:
    import soundfile

    content = io.BytesIO()
    soundfile.write(content, sound(), RATE, subtype, format=format)
    return content.getvalue()


def ffmpeg_content(container: str, codec: str) -> bytes:
    import av

    content = io.BytesIO()
    rate = 48000 if codec == "libopus" else RATE
    with av.open(content, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout="mono", bit_rate=64000)
        frame = av.AudioFrame.from_ndarray(sound()[None], format="flt", layout="mono")
        frame.rate = RATE
        for resampled in [*av.AudioResampler(stream.format, "mono", rate, 1024).resample(frame), None]:
            output.mux(stream.encode(resampled))
    return content.getvalue()


def read_sound(path: Path) -> None:
    """Reads a file as training does (a window) and as the pipeline does (all of it), from its path and from bytes."""
    from asit_hf.data import AudioReader, audio_info, read_audio

    info = audio_info(path)
    read_audio(path, RATE)
    with AudioReader({"path": str(path), "bytes": path.read_bytes()}) as reader:
        total = reader.num_samples(RATE)
        reader.read(RATE, total // 2, 1000)
        assert reader.info == info or info.num_samples >= reader.info.num_samples


def read_labels(path: Path) -> None:
    from asit_hf.data.labelled import load_labelled

    load_labelled(path, check_files=False)


def read_events(path: Path) -> None:
    from asit_hf.data.event_tables import event_names, read_strong_labels

    event_names(read_strong_labels(path))


def read_pool(path: Path) -> None:
    from asit_hf.data import PackedAudio

    PackedAudio.load(path.parent).audio.sum()


def read_stream(path: Path) -> None:
    from asit_hf.data import load_audio_dataset

    for _ in load_audio_dataset(path, streaming=True):
        pass


def read_encoder(path: Path) -> None:
    from asit_hf.loading import load_config, load_encoder, load_feature_extractor

    load_config(path.parent)
    load_feature_extractor(path.parent)
    load_encoder(path.parent)


def make_samples(folder: Path) -> list[Sample]:
    """The files to mutate; `folder` receives those that reading a mutated one needs beside it."""
    import soundfile
    import torch
    from datasets import Dataset

    from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTModel
    from asit_hf.data import AudioReadError
    from asit_hf.data.packed import to_pcm, write_packed

    samples = []
    for format, subtype, extension in SNDFILE:
        if soundfile.check_format(format, subtype):
            content = sndfile_content(format, subtype)
            samples.append(Sample(f"{format} {subtype}", f"sound{extension}", content, read_sound, (AudioReadError,)))
    try:
        contents = [(one, ffmpeg_content(*one[:2])) for one in FFMPEG]
    except ModuleNotFoundError:
        contents = []
    for (container, codec, extension), content in contents:
        samples.append(Sample(f"{container} {codec}", f"sound{extension}", content, read_sound, (AudioReadError,)))
    refused = (ValueError, FileNotFoundError)
    for name in ("a.wav", "b.wav", "c.wav"):
        soundfile.write(folder / name, sound(0.05), RATE)
    for tables, read in ((TABLES, read_labels), (EVENTS, read_events)):
        samples += [Sample(name, name, text.encode(), read, refused, folder) for name, text in tables.items()]
    shard = {"audio": [{"bytes": b"RIFF", "path": "a.wav"}] * 3, "label": ["dog", "cat", "dog"]}
    Dataset.from_dict(shard).to_parquet(folder / "clips.parquet")
    samples.append(Sample("parquet", "clips.parquet", (folder / "clips.parquet").read_bytes(), read_labels, refused))
    shutil.make_archive(str(folder / "clips"), "tar", folder, "a.wav")
    samples.append(Sample("tar", "clips.tar", (folder / "clips.tar").read_bytes(), read_stream, refused))
    pool = folder / "pool"
    write_packed(pool, [(name, None, to_pcm(sound(0.1))) for name in ("a", "b")], RATE)
    samples.append(Sample("packed pool", "index.json", (pool / "index.json").read_bytes(), read_pool, refused, pool))
    torch.manual_seed(0)
    encoder = folder / "encoder"
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ASiTModel(ASiTConfig(**config, num_frames=32, num_mel_bins=32)).save_pretrained(encoder)
    ASiTFeatureExtractor(num_mel_bins=32).save_pretrained(encoder)
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        content = (encoder / name).read_bytes()
        samples.append(Sample(name, name, content, read_encoder, (ValueError, OSError), encoder))
    return samples


def mutate(content: bytes, generator: np.random.Generator) -> bytes:
    """One or two changes: bits, bytes, numbers, and parts that are cut, repeated, moved or overwritten."""
    data = bytearray(content)
    for _ in range(generator.integers(1, 3)):
        if not data:
            break
        # half of the changes are in the first 200 bytes, where headers are
        place = int(generator.integers(0, min(len(data), 200) if generator.random() < 0.5 else len(data)))
        length = int(generator.integers(1, max(2, len(data) // 4)))
        match generator.integers(0, 9):
            case 0:
                data[place] ^= 1 << int(generator.integers(0, 8))
            case 1:
                data[place] = int(generator.integers(0, 256))
            case 2:
                size = int(generator.choice([2, 4, 8]))
                number = int(generator.choice([0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1)]))
                order = "little" if generator.random() < 0.5 else "big"
                data[place : place + size] = (number - 1 if number > 1 else number).to_bytes(size, order)
            case 3:
                del data[place:]
            case 4:
                del data[place : place + length]
            case 5:
                data[place:place] = data[place : place + length]
            case 6:
                data[place:place] = generator.bytes(length)
            case 7:
                data[place : place + length] = bytes(min(length, len(data) - place))
            case 8:
                words = (b",", b";", b"\t", b"\n", b'"', b"\xff", b"-1", b"1e999", b"nan", b"null", b"[", b"{}", b"\0")
                data[place : place + 1] = words[generator.integers(0, len(words))]
    return bytes(data)


def mutate_json(content: bytes, generator: np.random.Generator) -> bytes:
    """One or two values of a json object replaced by others."""
    data = json.loads(content)
    for name in generator.choice(list(data), min(len(data), int(generator.integers(1, 3))), replace=False):
        values = (None, True, -1, 0, 3, 7.5, 10**9, 2**63, 1e308, "", "text", [], [1], {}, {"a": 1})
        if generator.random() < 0.2:
            del data[name]
        else:
            data[name] = values[generator.integers(0, len(values))]
    return json.dumps(data).encode()


def write_input(samples: list[Sample], seed: int, number: int, folder: Path) -> tuple[Sample, Path]:
    """Writes input `number` to an empty `folder`, beside the files that it needs."""
    generator = np.random.default_rng([seed, number])
    sample = samples[number % len(samples)]
    if sample.folder is not None:
        for file in sample.folder.iterdir():
            if file.is_file() and file.name != sample.name:
                (folder / file.name).symlink_to(file)
    path = folder / sample.name
    is_object = sample.name.endswith(".json") and sample.content.startswith(b"{")
    change = mutate_json if is_object and generator.random() < 0.5 else mutate
    path.write_bytes(change(sample.content, generator))
    return sample, path


def peak_memory(reset: bool = False) -> int:
    """Peak resident memory of this process in bytes, since the last reset to what is resident."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def outcome_of(sample: Sample, path: Path) -> str:
    """How reading ends: "read", "refused", or what is wrong."""
    size, before = path.stat().st_size, peak_memory(reset=True)
    try:
        sample.read(path)
        outcome = "read"
    except sample.errors as error:
        named = path.name in str(error) or str(path.parent) in str(error)
        outcome = "refused" if named else f"message without the file: {type(error).__name__}: {error}"
    except Exception as error:
        *_, place = traceback.extract_tb(error.__traceback__)
        outcome = f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno}: {error}"
    used = peak_memory() - before
    if used > MEMORY_FACTOR * size + MEMORY_FLOOR:
        return f"memory: {used >> 20} MiB for a file of {size} bytes; {outcome}"
    return outcome.splitlines()[0][:200]


def work(connection: Connection, seed: int, first: int, last: int) -> None:
    """Reads the inputs from `first` on, and sends the outcome of each."""
    import logging
    import warnings

    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder, "shared")
        shared.mkdir()
        datasets.config.HF_DATASETS_CACHE = str(Path(folder, "cache"))
        samples = make_samples(shared)
        for sample in samples:  # which can be read, and so the first input does not pay for imports
            whole = Path(folder, "whole")
            shutil.copytree(sample.folder or shared, whole, dirs_exist_ok=True)
            (whole / sample.name).write_bytes(sample.content)
            sample.read(whole / sample.name)
            shutil.rmtree(whole)
        connection.send(True)
        for number in range(first, last):
            place = Path(folder, f"{number}")
            place.mkdir()
            sample, path = write_input(samples, seed, number, place)
            start = time.process_time()
            outcome = outcome_of(sample, path)
            if (seconds := time.process_time() - start) > SECONDS:
                outcome = f"takes {seconds:.1f} s; {outcome}"
            connection.send((sample.kind, outcome, seconds))
            shutil.rmtree(place)


def run(inputs: int, seed: int = 0, first: int = 0) -> list[tuple[int, str, str, float]]:
    """Reads the inputs; returns the number, kind, outcome and seconds of each."""
    context = multiprocessing.get_context("spawn")
    results: list[tuple[int, str, str, float]] = []
    last = first + inputs
    while (number := first + len(results)) < last:
        connection, other = context.Pipe()
        process = context.Process(target=work, args=(other, seed, number, last), daemon=True)
        process.start()
        other.close()
        try:
            try:
                started = connection.poll(START_SECONDS) and connection.recv()
            except EOFError:
                started = False
            if not started:
                raise RuntimeError("the process that reads the inputs did not start")
            while (number := first + len(results)) < last:
                if not connection.poll(HANG_SECONDS):
                    results.append((number, "", f"hangs for {HANG_SECONDS} s", HANG_SECONDS))
                    break
                results.append((number, *connection.recv()))
        except EOFError:
            process.join()
            results.append((number, "", f"kills the process, exit code {process.exitcode}", 0.0))
        finally:
            process.kill()
            process.join()
            connection.close()
    return results


def show(number: int, seed: int) -> None:
    """Reads one input in this process; a failure ends it with its traceback, and the file stays."""
    folder = Path(tempfile.mkdtemp())
    shared, place = folder / "shared", folder / "input"
    shared.mkdir()
    place.mkdir()
    sample, path = write_input(make_samples(shared), seed, number, place)
    print(f"{sample.kind}: {path}")
    sample.read(path)


def main(arguments: list[str] | None = None) -> list[tuple[int, str, str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20000, help="number of inputs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first input (default: %(default)s)")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="read this input in this process")
    parser.add_argument("--output", type=Path, help="json file for the counts and failures")
    args = parser.parse_args(arguments)
    if args.only is not None:
        show(args.only, args.seed)
        return []
    results = run(args.inputs, args.seed, args.first)
    failures = [result for result in results if result[2] not in ("read", "refused")]
    counts: dict[str, Counter] = {}
    for _, kind, outcome, _ in results:
        counts.setdefault(kind or "(unknown)", Counter())[outcome if outcome in ("read", "refused") else "failed"] += 1
    for kind, outcomes in counts.items():
        print(f"{kind:26} {outcomes['read']:6} read {outcomes['refused']:6} refused {outcomes['failed']:6} failed")
    for number, kind, outcome, _ in failures[:50]:
        print(f"  {number} {kind}: {outcome}")
    slowest = max(seconds for *_, seconds in results)
    print(f"{len(results)} inputs, {len(failures)} failed, slowest {slowest:.2f} s")
    if args.output:
        summary: dict[str, Any] = {"inputs": len(results), "seed": args.seed, "slowest_seconds": round(slowest, 2)}
        summary |= {"counts": counts, "failures": [list(one[:3]) for one in failures]}
        args.output.write_text(json.dumps(summary, indent=1) + "\n")
    return failures


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
