"""Speech Commands (Warden 2018)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..audio import audio_info, encode_audio, read_audio
from .files import audio_files, build_dataset, check_folder, check_split, incomplete, published_file

if TYPE_CHECKING:
    from datasets import Dataset

SPEECH_COMMANDS_URL = "http://download.tensorflow.org/data/speech_commands_v0.0{version}.tar.gz"
SPEECH_COMMANDS_TEST_URL = "http://download.tensorflow.org/data/speech_commands_test_set_v0.0{version}.tar.gz"
KEYWORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
_OTHER_WORDS_V1 = (
    *("bed", "bird", "cat", "dog", "eight", "five", "four", "happy", "house", "marvin"),
    *("nine", "one", "seven", "sheila", "six", "three", "tree", "two", "wow", "zero"),
)
# by class id
SPEECH_COMMANDS_WORDS = {
    1: tuple(sorted((*KEYWORDS, *_OTHER_WORDS_V1))),
    2: tuple(sorted((*KEYWORDS, *_OTHER_WORDS_V1, "backward", "follow", "forward", "learn", "visual"))),
}
UNKNOWN, SILENCE = "unknown", "silence"
_NOISE_FOLDER = "_background_noise_"
# the share of every noise recording from which a split's silence is cut
_NOISE_SHARES = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}
_SILENCE_RATE = 16000


def load_speech_commands(root: str | Path, split: str, version: int = 2, num_classes: int | None = None) -> "Dataset":
    """Speech Commands: a folder for each word, `validation_list.txt` and `testing_list.txt`.

    Args:
        root: the unpacked archive; for the test split of 12 or 11 classes alternatively the separate test archive,
            which has the folders `_unknown_` and `_silence_` and no lists.
        split: "train" (the clips of neither list), "validation" or "test".
        version: 1 or 2.
        num_classes: all words (30 or 35; the default), 12 (ten keywords, `unknown`, `silence`) or 11 (no `silence`).
            `unknown`, drawn from the other words, and `silence`, 1 s windows of `_background_noise_`, have as many
            clips as a keyword on average; the draws are fixed, and the splits use different parts of each noise
            recording.

    Returns:
        `audio`, `label` and `speaker`.

    Raises:
        FileNotFoundError: a missing list, word folder or noise folder.
        ValueError: no such split, version or number of classes, or a folder of the other version.
    """
    if version not in SPEECH_COMMANDS_WORDS:
        raise ValueError(f"expected version 1 or 2 of Speech Commands, got {version!r}")
    check_split(split, "Speech Commands")
    root = check_folder(root)
    url = SPEECH_COMMANDS_URL.format(version=version)
    words = SPEECH_COMMANDS_WORDS[version]
    num_classes = len(words) if num_classes is None else num_classes
    names = {len(words): words, 11: (*KEYWORDS, UNKNOWN), 12: (*KEYWORDS, UNKNOWN, SILENCE)}.get(num_classes)
    if names is None:
        got = f"got num_classes={num_classes}"
        raise ValueError(f"expected {len(words)}, 12 or 11 classes of Speech Commands V{version}, {got}")
    if (root / f"_{UNKNOWN}_").is_dir():
        return _speech_commands_test_archive(root, split, names, SPEECH_COMMANDS_TEST_URL.format(version=version))

    for folder in (*words, *([_NOISE_FOLDER] if SILENCE in names else [])):
        if not (root / folder).is_dir():
            raise FileNotFoundError(f"no folder {folder} in {root}: download Speech Commands V{version} from {url}")
    later = next((word for word in SPEECH_COMMANDS_WORDS[2] if word not in words and (root / word).is_dir()), None)
    if later:  # V2 has all words of V1, but other clips and lists
        raise ValueError(f"expected Speech Commands V1 ({url}) in {root}, got V2, which has the folder {later}")
    listed = {
        name: set(published_file(root, file, url).read_text().split())
        for name, file in (("validation", "validation_list.txt"), ("test", "testing_list.txt"))
    }
    clips = [f"{word}/{file.name}" for word in words for file in sorted((root / word).glob("*.wav"))]
    absent = sorted(listed.get(split, set()).difference(clips))
    if absent:
        raise incomplete(f"{len(absent)} clips of the {split} list are missing in {root}", absent, url)
    wanted = listed[split] if split in listed else set(clips).difference(*listed.values())
    clips = [clip for clip in clips if clip in wanted]
    if not clips:
        raise FileNotFoundError(f"no clips of the {split} split in {root}: download V{version} from {url}")
    chosen, silence = [(clip, clip.split("/")[0]) for clip in clips], []
    if num_classes != len(words):
        keywords = [(clip, word) for clip, word in chosen if word in KEYWORDS]
        others = [clip for clip, word in chosen if word not in KEYWORDS]
        count = round(len(keywords) / len(KEYWORDS))
        drawn = np.random.default_rng(0).permutation(len(others))[:count]
        chosen = keywords + [(others[index], UNKNOWN) for index in sorted(drawn)]
        noise = audio_files(root / _NOISE_FOLDER, url) if SILENCE in names else []
        silence = list(_silence_clips(noise, split, count)) if noise else []
    return build_dataset(
        audio=[str(root / clip) for clip, _ in chosen] + silence,
        labels=[names.index(word) for _, word in chosen] + [names.index(SILENCE) for _ in silence],
        names=names,
        speaker=[Path(clip).name.split("_")[0] for clip, _ in chosen] + [SILENCE for _ in silence],
    )


def _speech_commands_test_archive(root: Path, split: str, names: Sequence[str], url: str) -> "Dataset":
    if split != "test" or UNKNOWN not in names:
        got = f"got {split} with {len(names)}"
        raise ValueError(f"{root} is the test archive: expected split test with 12 or 11 classes, {got}")
    folders = {name: root / (f"_{name}_" if name in (UNKNOWN, SILENCE) else name) for name in names}
    files = [(file, name) for name, folder in folders.items() for file in audio_files(folder, url)]
    return build_dataset(
        audio=[str(file) for file, _ in files],
        labels=[names.index(name) for _, name in files],
        names=names,
        speaker=[file.name.split("_")[0] for file, _ in files],
    )


def _silence_clips(files: list[Path], split: str, count: int) -> Iterator[dict[str, Any]]:
    """`count` windows of 1 s as wav bytes, from this split's share of every recording in turn."""
    durations = [audio_info(file).duration for file in files]
    low, high = _NOISE_SHARES[split]
    generator = np.random.default_rng(0)
    for index in range(count):
        file, seconds = files[index % len(files)], durations[index % len(files)]
        length = min(1.0, (high - low) * seconds)
        start = generator.uniform(low * seconds, high * seconds - length)
        window = read_audio(file, _SILENCE_RATE, start, length)
        yield {"path": f"{file}@{start:.3f}s", "bytes": encode_audio(window, _SILENCE_RATE, "WAV", "PCM_16")}
