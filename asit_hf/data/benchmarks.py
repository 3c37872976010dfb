"""The paper's data sets as they lie on disk: AudioSet, ESC-50, Speech Commands and VoxCeleb1."""

import csv
import io
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..extras import extra
from .audio import audio_info, read_audio
from .datasets import find_audio_files

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

AUDIOSET_URL = "https://research.google.com/audioset/download.html"
ESC50_URL = "https://github.com/karolpiczak/ESC-50"
SPEECH_COMMANDS_URL = "http://download.tensorflow.org/data/speech_commands_v0.0{version}.tar.gz"
SPEECH_COMMANDS_TEST_URL = "http://download.tensorflow.org/data/speech_commands_test_set_v0.0{version}.tar.gz"
VOXCELEB1_URL = "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/meta/iden_split.txt"
VOXCELEB1_AUDIO_URL = "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/vox1.html"

KEYWORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
_OTHER_WORDS_V1 = (
    *("bed", "bird", "cat", "dog", "eight", "five", "four", "happy", "house", "marvin"),
    *("nine", "one", "seven", "sheila", "six", "three", "tree", "two", "wow", "zero"),
)
# sorted, as class ids count them
SPEECH_COMMANDS_WORDS = {
    1: tuple(sorted((*KEYWORDS, *_OTHER_WORDS_V1))),
    2: tuple(sorted((*KEYWORDS, *_OTHER_WORDS_V1, "backward", "follow", "forward", "learn", "visual"))),
}
UNKNOWN, SILENCE = "unknown", "silence"
_NOISE_FOLDER = "_background_noise_"
# Each split's silence is cut from its own stretch of every recording of noise.
_NOISE_SHARES = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}
_SILENCE_RATE = 16000

_SEGMENTS = {
    "balanced_train": "balanced_train_segments.csv",
    "unbalanced_train": "unbalanced_train_segments.csv",
    "eval": "eval_segments.csv",
}
_CLASSES = "class_labels_indices.csv"
# The first that a shard's path matches: unbalanced/train-00.parquet is unbalanced.
_SHARDS = {
    "eval": re.compile(r"(^|/)(eval|test)"),
    "unbalanced_train": re.compile(r"(^|/)unbal"),
    "balanced_train": re.compile(r"(^|/)(bal|train)"),
}
_SPLITS = ("train", "validation", "test")
_VOXCELEB1_FOLDERS = ("", "wav", "dev/wav", "test/wav", "vox1_dev_wav/wav", "vox1_test_wav/wav")
_VOXCELEB1_SPLITS = {"train": "1", "validation": "2", "test": "3"}


def load_audioset(root: str | os.PathLike, parts: Sequence[str]) -> "Dataset":
    """AudioSet, clips as files or in parquet shards.

    Args:
        root: a folder with `class_labels_indices.csv` and, anywhere below it, either the official segment lists with
            audio files called `YTID`, `YYTID`, `YTID_START` or `YTID_START_END` (seconds or milliseconds), or parquet
            shards with the columns `audio` and `labels` (mids) or `human_labels` (names), whose paths begin with
            `bal` or `train`, `unbal`, and `eval` or `test`.
        parts: of "balanced_train", "unbalanced_train" and "eval", those to join.

    Returns:
        `audio`, `label` (a list of the 527 classes, in the order of `class_labels_indices.csv`) and `video_id`. Clips
        that are listed but not on disk are left out and counted in one warning.

    Raises:
        FileNotFoundError: a list is missing, or there is no clip of these parts at all.
    """
    unknown = [part for part in parts if part not in _SEGMENTS]
    if unknown or not parts:
        raise ValueError(f"expected parts of AudioSet, {', '.join(_SEGMENTS)}; got {parts!r}")
    root = _folder(root)
    classes = _table(_published(root, _CLASSES, AUDIOSET_URL), ("index", "mid", "display_name"))
    classes.sort(key=lambda row: int(row["index"]))
    names = [row["display_name"] for row in classes]
    ids = {name: index for index, row in enumerate(classes) for name in (row["mid"], row["display_name"])}
    shards = sorted(root.rglob("*.parquet"))
    if shards:
        return _audioset_shards(root, shards, parts, ids, names)

    rows = [row for part in parts for row in _segments(_published(root, _SEGMENTS[part], AUDIOSET_URL))]
    files = {file.stem: file for file in reversed(_audio_files(root, AUDIOSET_URL))}
    found = [(row, file) for row in rows if (file := _segment_file(row, files)) is not None]
    missing = len(rows) - len(found)
    if not found:
        raise FileNotFoundError(
            f"none of the {len(rows)} clips of AudioSet's {' and '.join(parts)} is below {root}: expected files named "
            f"like {rows[0][0]}.wav or {rows[0][0]}_{float(rows[0][1]):.0f}.flac; the lists are published at "
            f"{AUDIOSET_URL}"
        )
    if missing:
        logger.warning("AudioSet %s: %d of %d listed clips are not on disk", "+".join(parts), missing, len(rows))
    return _dataset(
        audio=[str(file) for _, file in found],
        labels=[_ids([mid.strip() for mid in row[3].split(",")], ids, root / _CLASSES) for row, _ in found],
        names=names,
        video_id=[row[0] for row, _ in found],
    )


def load_esc50(root: str | os.PathLike) -> "Dataset":
    """ESC-50: `meta/esc50.csv` and `audio/`; the table may also lie in `root` itself, and files may be flac.

    Returns:
        `audio`, `label` (in the official order), `fold` (1 to 5) and `src_file`.

    Raises:
        FileNotFoundError: the table or a file of it is missing.
    """
    root = _folder(root)
    table = root / "esc50.csv"
    table = table if table.is_file() else _published(root, "meta/esc50.csv", ESC50_URL)
    rows = _table(table, ("filename", "fold", "target", "category", "src_file"))
    names = {int(row["target"]): row["category"] for row in rows}
    ids = {target: index for index, target in enumerate(sorted(names))}
    files = {file.stem: file for file in _audio_files(root / "audio", ESC50_URL)}
    absent = [row["filename"] for row in rows if Path(row["filename"]).stem not in files]
    if absent:
        raise _incomplete(f"{root / 'audio'} lacks {len(absent)} of {len(rows)} clips of ESC-50", absent, ESC50_URL)
    return _dataset(
        audio=[str(files[Path(row["filename"]).stem]) for row in rows],
        labels=[ids[int(row["target"])] for row in rows],
        names=[names[target] for target in ids],
        fold=[int(row["fold"]) for row in rows],
        src_file=[row["src_file"] for row in rows],
    )


def load_speech_commands(
    root: str | os.PathLike, split: str, version: int = 2, num_classes: int | None = None
) -> "Dataset":
    """Speech Commands: a folder for each word, `validation_list.txt` and `testing_list.txt`.

    Args:
        root: the unpacked archive; for 12 or 11 classes and `split="test"` also the separate test archive, which has
            the folders `_unknown_` and `_silence_` and no lists.
        split: "train" (what neither list names), "validation" or "test".
        version: 1 or 2.
        num_classes: all words (30 or 35; the default), 12 (ten keywords, `unknown`, `silence`) or 11 (no `silence`).
            There are as many clips of `unknown`, drawn from the other words, and of `silence`, 1 s windows of
            `_background_noise_`, as of a keyword on average; the draws are fixed, and every split has its own part of
            each recording of noise.

    Returns:
        `audio`, `label` and `speaker`.

    Raises:
        FileNotFoundError: a list, a word's folder or the noise is missing.
        ValueError: no such split, version or number of classes, or a folder of the other version.
    """
    if version not in SPEECH_COMMANDS_WORDS:
        raise ValueError(f"expected version 1 or 2 of Speech Commands, got {version!r}")
    _check_split(split, "Speech Commands")
    root = _folder(root)
    url = SPEECH_COMMANDS_URL.format(version=version)
    words = SPEECH_COMMANDS_WORDS[version]
    num_classes = len(words) if num_classes is None else num_classes
    names = {len(words): words, 11: (*KEYWORDS, UNKNOWN), 12: (*KEYWORDS, UNKNOWN, SILENCE)}.get(num_classes)
    if names is None:
        raise ValueError(
            f"Speech Commands V{version} has {len(words)}, 12 or 11 classes, got num_classes={num_classes}"
        )
    if (root / f"_{UNKNOWN}_").is_dir():
        return _speech_commands_test_archive(root, split, names, SPEECH_COMMANDS_TEST_URL.format(version=version))

    for folder in (*words, *([_NOISE_FOLDER] if SILENCE in names else [])):
        if not (root / folder).is_dir():
            raise FileNotFoundError(f"no folder {folder} in {root}: Speech Commands V{version} is published as {url}")
    later = next((word for word in SPEECH_COMMANDS_WORDS[2] if word not in words and (root / word).is_dir()), None)
    if later:  # V2 has all words of V1, but other clips and lists
        raise ValueError(f"{root} is Speech Commands V2, for it has a folder {later}: expected V1, published as {url}")
    listed = {
        name: set(_published(root, file, url).read_text().split())
        for name, file in (("validation", "validation_list.txt"), ("test", "testing_list.txt"))
    }
    clips = [f"{word}/{file.name}" for word in words for file in sorted((root / word).glob("*.wav"))]
    absent = sorted(listed.get(split, set()).difference(clips))
    if absent:
        raise _incomplete(f"{root} lacks {len(absent)} clips of its {split} list", absent, url)
    clips = [clip for clip in clips if clip in listed[split]] if split in listed else _not_in(clips, listed.values())
    if not clips:
        raise FileNotFoundError(f"{root} has no clips for {split}: Speech Commands V{version} is published as {url}")
    words_of = [clip.split("/")[0] for clip in clips]
    if num_classes == len(words):
        chosen = list(zip(clips, words_of))
        silence = []
    else:
        keywords = [(clip, word) for clip, word in zip(clips, words_of) if word in KEYWORDS]
        others = [clip for clip, word in zip(clips, words_of) if word not in KEYWORDS]
        count = round(len(keywords) / len(KEYWORDS))
        drawn = np.random.default_rng(0).permutation(len(others))[:count]
        chosen = keywords + [(others[index], UNKNOWN) for index in sorted(drawn)]
        noise = _audio_files(root / _NOISE_FOLDER, url) if SILENCE in names else []
        silence = list(_silence_clips(noise, split, count)) if noise else []
    return _dataset(
        audio=[str(root / clip) for clip, _ in chosen] + silence,
        labels=[names.index(word) for _, word in chosen] + [names.index(SILENCE) for _ in silence],
        names=names,
        speaker=[Path(clip).name.split("_")[0] for clip, _ in chosen] + [SILENCE for _ in silence],
    )


def load_voxceleb1(root: str | os.PathLike, split: str) -> "Dataset":
    """VoxCeleb1 for speaker identification: `iden_split.txt` and clips `id10001/VIDEO/00001.wav` in `root`, its
    subfolder `wav`, or those of the archives (`dev/wav` and `test/wav`, `vox1_dev_wav/wav` and `vox1_test_wav/wav`).

    Args:
        root: the folder.
        split: "train", "validation" or "test": the lines marked 1, 2 or 3.

    Returns:
        `audio`, `label` (one of all speakers that the list names: 1251) and `video`.

    Raises:
        FileNotFoundError: the list or a clip of it is missing.
        ValueError: no such split, or a line of the list that is not a mark and a path.
    """
    _check_split(split, "VoxCeleb1")
    root = _folder(root)
    table = _published(root, "iden_split.txt", VOXCELEB1_URL)
    rows = [line.split() for line in table.read_text().split("\n") if line.strip()]
    wrong = next((row for row in rows if len(row) != 2 or row[0] not in _VOXCELEB1_SPLITS.values()), None)
    if wrong:
        raise ValueError(f"expected lines of 1, 2 or 3 and a path in {table}, got {' '.join(wrong)!r}")
    names = sorted({path.split("/")[0] for _, path in rows})
    ids = {name: index for index, name in enumerate(names)}
    clips = [path for mark, path in rows if mark == _VOXCELEB1_SPLITS[split]]
    if not clips:
        raise ValueError(f"no line of {table} is marked {_VOXCELEB1_SPLITS[split]}, {split}")
    folders: dict[str, Path] = {}
    for folder in map(root.joinpath, reversed(_VOXCELEB1_FOLDERS)):
        folders |= {name: folder for name in names if (folder / name).is_dir()}
    paths = [folders.get(clip.split("/")[0], root) / clip for clip in clips]
    absent = [clip for clip, path in zip(clips, paths) if not path.is_file()]
    if absent:
        what = f"{root} lacks {len(absent)} of {len(clips)} clips of the {split} list"
        raise _incomplete(what, absent, VOXCELEB1_AUDIO_URL)
    return _dataset(
        audio=[str(path) for path in paths],
        labels=[ids[clip.split("/")[0]] for clip in clips],
        names=names,
        video=["/".join(clip.split("/")[:2]) for clip in clips],
    )


@dataclass(frozen=True)
class Benchmark:
    """How a data set is read, and the splits it has: `load(root, split)`, or `load(root)` where it has folds."""

    load: Callable[..., "Dataset"]
    splits: tuple[str, ...] = ()


_AUDIOSET_PARTS = {
    "audioset-20k": {"train": ("balanced_train",), "test": ("eval",)},
    "audioset-2m": {"train": ("balanced_train", "unbalanced_train"), "test": ("eval",)},
}
BENCHMARKS = {
    **{
        name: Benchmark(lambda root, split, parts=parts: load_audioset(root, parts[split]), tuple(parts))
        for name, parts in _AUDIOSET_PARTS.items()
    },
    "esc50": Benchmark(load_esc50),
    **{
        f"speech-commands-v{version}{f'-{classes}' if classes else ''}": Benchmark(
            partial(load_speech_commands, version=version, num_classes=classes), _SPLITS
        )
        for version in (1, 2)
        for classes in (None, 12, 11)
    },
    "voxceleb1": Benchmark(load_voxceleb1, _SPLITS),
}


def load_benchmark(layout: str, root: str | os.PathLike, split: str | None = None) -> "Dataset":
    """A data set of `BENCHMARKS` by name; its class names are all that it has, whatever the split holds.

    Raises:
        ValueError: no such layout or split.
        FileNotFoundError: a piece is missing; the message names it and where it is published.
    """
    if layout not in BENCHMARKS:
        raise ValueError(f"expected a layout among {', '.join(BENCHMARKS)}, got {layout!r}")
    benchmark = BENCHMARKS[layout]
    if not benchmark.splits:
        if split is not None:
            raise ValueError(f"{layout} has folds, not splits: filter by its column fold; got split {split!r}")
        return benchmark.load(root)
    if split not in benchmark.splits:
        raise ValueError(f"expected a split of {layout}, {', '.join(benchmark.splits)}; got {split!r}")
    return benchmark.load(root, split)


def _folder(root: str | os.PathLike) -> Path:
    root = Path(root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder: {root}")
    return root


def _check_split(split: str, name: str) -> None:
    if split not in _SPLITS:
        raise ValueError(f"expected a split of {name}, {', '.join(_SPLITS)}; got {split!r}")


def _audio_files(folder: Path, url: str) -> list[Path]:
    try:
        return find_audio_files(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; the data set is published at {url}") from None


def _table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a csv with a header; there are some, and they have these columns."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        rows, found = list(reader), reader.fieldnames or []
    if not rows or not set(columns).issubset(found):
        wanted = ", ".join(columns)
        raise ValueError(f"expected rows with the columns {wanted} in {path}, got {len(rows)} with {', '.join(found)}")
    return rows


def _published(root: Path, name: str, url: str) -> Path:
    if not (root / name).is_file():
        raise FileNotFoundError(f"{root / name} is missing: it is published at {url}")
    return root / name


def _incomplete(what: str, absent: list[str], url: str) -> FileNotFoundError:
    return FileNotFoundError(f"{what}, first {absent[0]}: they are published at {url}")


def _dataset(audio: list, labels: list, names: Sequence[str], **columns: list) -> "Dataset":
    from datasets import Audio, ClassLabel, Dataset, List

    label = ClassLabel(names=list(names))
    feature = List(label) if labels and isinstance(labels[0], list) else label
    rows = [one if isinstance(one, dict) else {"path": one, "bytes": None} for one in audio]
    dataset = Dataset.from_dict({"audio": rows, **columns}).cast_column("audio", Audio(decode=False))
    return dataset.add_column("label", labels, feature=feature)


def _segments(path: Path) -> list[list[str]]:
    """(video id, start, end, comma-separated mids) of every line that is not a comment."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        lines = (line for line in file if line.strip() and not line.startswith("#"))
        rows = list(csv.reader(lines, skipinitialspace=True))
    wrong = next((row for row in rows if len(row) != 4 or not (_is_number(row[1]) and _is_number(row[2]))), None)
    if wrong or not rows:
        raise ValueError(f"expected lines of id, start, end and labels in {path}, got {wrong or 'none'}")
    return rows


def _is_number(text: str) -> bool:
    try:
        return np.isfinite(float(text))
    except ValueError:
        return False


def _segment_file(row: list[str], files: dict[str, Path]) -> Path | None:
    name, start, end = row[0], float(row[1]), float(row[2])
    spans = [""]
    for first, last in ((f"{start:.0f}", f"{end:.0f}"), (f"{1000 * start:.0f}", f"{1000 * end:.0f}"), row[1:3]):
        spans += [f"_{first}", f"_{first}_{last}"]
    stems = (f"{prefix}{name}{span}" for span in spans for prefix in ("", "Y"))
    return next((files[stem] for stem in stems if stem in files), None)


def _audioset_shards(
    root: Path, shards: list[Path], parts: Sequence[str], ids: dict[str, int], names: list[str]
) -> "Dataset":
    from datasets import Audio, ClassLabel, List, load_dataset

    chosen = [str(shard) for shard in shards if _part_of(shard.relative_to(root).as_posix()) in parts]
    if not chosen:
        raise FileNotFoundError(
            f"none of the {len(shards)} parquet files below {root} is of AudioSet's {' and '.join(parts)}: expected "
            "paths that begin with bal or train, unbal, and eval or test"
        )
    dataset = load_dataset("parquet", data_files=chosen, split="train")
    column = next((name for name in ("labels", "human_labels") if name in dataset.column_names), None)
    if column is None or "audio" not in dataset.column_names:
        raise ValueError(
            f"expected the columns audio and labels or human_labels in {chosen[0]}, got {dataset.column_names}"
        )
    labels = [_ids(row or (), ids, root / _CLASSES) for row in dataset[column][:]]
    kept = [name for name in ("audio", "video_id") if name in dataset.column_names]
    dataset = dataset.select_columns(kept).cast_column("audio", Audio(decode=False))
    return dataset.add_column("label", labels, feature=List(ClassLabel(names=names)))


def _part_of(shard: str) -> str | None:
    return next((part for part, pattern in _SHARDS.items() if pattern.search(shard)), None)


def _ids(labels: Sequence[str], ids: dict[str, int], table: Path) -> list[int]:
    unknown = [label for label in labels if label not in ids]
    if unknown:
        raise ValueError(f"label {unknown[0]!r} is not in {table}")
    return [ids[label] for label in labels]


def _not_in(clips: list[str], lists: Any) -> list[str]:
    listed = set().union(*lists)
    return [clip for clip in clips if clip not in listed]


def _speech_commands_test_archive(root: Path, split: str, names: Sequence[str], url: str) -> "Dataset":
    if split != "test" or UNKNOWN not in names:
        raise ValueError(
            f"{root} is the test archive of the 12-class task: it has the split test of 12 or 11 classes, got {split} "
            f"of {len(names)}"
        )
    folders = {name: root / (f"_{name}_" if name in (UNKNOWN, SILENCE) else name) for name in names}
    files = [(file, name) for name, folder in folders.items() for file in _audio_files(folder, url)]
    return _dataset(
        audio=[str(file) for file, _ in files],
        labels=[names.index(name) for _, name in files],
        names=names,
        speaker=[file.name.split("_")[0] for file, _ in files],
    )


def _silence_clips(files: list[Path], split: str, count: int) -> Iterator[dict[str, Any]]:
    """`count` windows of 1 s as wav bytes, from this split's stretch of every recording in turn."""
    with extra():
        import soundfile
    durations = [audio_info(file).duration for file in files]
    low, high = _NOISE_SHARES[split]
    generator = np.random.default_rng(0)
    for index in range(count):
        file, seconds = files[index % len(files)], durations[index % len(files)]
        length = min(1.0, (high - low) * seconds)
        start = generator.uniform(low * seconds, high * seconds - length)
        content = io.BytesIO()
        window = read_audio(file, _SILENCE_RATE, start, length)
        soundfile.write(content, window, _SILENCE_RATE, format="WAV", subtype="PCM_16")
        yield {"path": f"{file}@{start:.3f}s", "bytes": content.getvalue()}


__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "load_audioset",
    "load_benchmark",
    "load_esc50",
    "load_speech_commands",
    "load_voxceleb1",
]
