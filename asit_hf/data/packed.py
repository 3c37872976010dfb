"""
Packed audio: all clips of a pool in one raw file with an index, for pretraining without decoding.

A folder holds `audio.int16` (16-bit little-endian mono PCM at one sampling rate, one clip after another) and
`index.json` (format version, sampling rate, and each clip's number of samples, name and optionally part of the pool).
The file is memory-mapped on a CPU and copied to an accelerator, which cuts the crops itself.
`python -m examples.tools.make_shards --format packed` writes such a folder. Reading needs torch and numpy only.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..utils.device import choices_for
from ..utils.files import whole_file
from .collators import collate_crops
from .crops import CropSettings
from .randomness import Seeded, mix_keys, sample_key, uniform_noise

AUDIO, INDEX = "audio.int16", "index.json"
FORMAT, VERSION = "asit packed audio", 1
FULL_SCALE = 32768
# mixed with a sample key, so that crops are independent of the masks drawn with the same key
_CROPS, _ROLL, _SHIFT, _FIRST_CROP = 0x63726F70, 0, 1, 2


def is_packed(folder: str | os.PathLike) -> bool:
    """Whether a folder holds packed audio; `PackedAudio.load` checks that it is complete."""
    return os.path.isfile(os.path.join(folder, AUDIO))  # False for any string that cannot be a path


def to_pcm(waveform: np.ndarray) -> np.ndarray:
    """Float waveform of any shape, clipped to [-1, 1], as int16 PCM."""
    return np.clip(np.rint(waveform * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)


@dataclass(frozen=True)
class PackedAudio:
    """The clips of a packed pool.

    Args:
        folder: folder it was loaded from.
        sampling_rate: in Hz.
        audio (samples,): int16 PCM, one clip after another.
        offsets, lengths (clips,): int64, each clip's first sample in `audio` and its number of samples.
        names: names of the clips.
        parts: part of the pool that each clip comes from, if the pool was packed with parts.
    """

    folder: Path
    sampling_rate: int
    audio: Tensor
    offsets: Tensor
    lengths: Tensor
    names: list[str]
    parts: list[str] | None = None

    @classmethod
    def load(
        cls, folder: str | os.PathLike, device: str | torch.device = "cpu", sampling_rate: int | None = None
    ) -> "PackedAudio":
        """Open a folder of packed audio: memory-mapped on a CPU, copied to any other device.

        Args:
            sampling_rate: required rate in Hz; packed audio is never resampled.

        Raises:
            FileNotFoundError: no packed audio in this folder.
            ValueError: a damaged or truncated pool, or one without clips, of another version or of another rate.
        """
        folder = Path(folder)
        index = read_index(folder / INDEX, FORMAT)
        rate = index["sampling_rate"]
        if sampling_rate not in (None, rate):
            what = f"expected {sampling_rate} Hz, got {rate} Hz in {folder}"
            raise ValueError(f"{what}: packed audio cannot be resampled, pack it again at the expected rate")
        lengths = torch.tensor(index["lengths"], dtype=torch.int64)
        audio, offsets = _map(folder, int(lengths.sum())), lengths.cumsum(0) - lengths
        return cls(folder, rate, audio, offsets, lengths, index["names"], index.get("parts")).to(device)

    def to(self, device: str | torch.device) -> "PackedAudio":
        """The same pool with its tensors on `device`."""
        return replace(self, **{name: getattr(self, name).to(device) for name in ("audio", "offsets", "lengths")})

    def repeat(self, times: dict[str, int]) -> "PackedAudio":
        """The same audio, with each clip of a part listed `times[part]` times; clips of other parts are listed once.

        Raises:
            ValueError: a part that the pool does not have, or a number below 1.
        """
        if unknown := sorted(set(times) - set(self.parts or [])):
            raise ValueError(f"expected parts of {self.folder}, {sorted(set(self.parts or []))}, got {unknown}")
        if wrong := {part: number for part, number in times.items() if number < 1}:
            raise ValueError(f"expected parts to be repeated at least 1 time, got {wrong}")
        order = [index for index, part in enumerate(self.parts or self.names) for _ in range(times.get(part, 1))]
        lists = {name: [getattr(self, name)[index] for index in order] for name in ("names", "parts") if times}
        return replace(self, offsets=self.offsets[order], lengths=self.lengths[order], **lists)

    @property
    def hours(self) -> float:
        """Of all clips, each as often as it is listed."""
        return int(self.lengths.sum()) / self.sampling_rate / 3600

    @property
    def num_bytes(self) -> int:
        return self.audio.nbytes

    def __len__(self) -> int:
        return len(self.names)

    def __getstate__(self) -> dict[str, Any]:
        # a spawned loader worker maps the file itself, even if the audio is on an accelerator
        return {**vars(self), "audio": len(self.audio), "offsets": self.offsets.cpu(), "lengths": self.lengths.cpu()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, audio=_map(state["folder"], state["audio"]))


class PackedCrops(Seeded, Dataset):
    """Random crops of a packed pool: item `i` of an epoch depends only on (seed, epoch, i) and the audio.

    Items have no audio, only what `gather` needs to cut a batch's crops: `sample_key` and `index`, the clip's name
    `file`, and `bad_files`, an empty list. `collate_crops` batches them.

    Args:
        pool: packed audio, or a folder of it.
        sampling_rate, crops: see `CropSettings`. `PretrainingCrops` draws other crops of the same clips.
        seed: of the crops.

    Raises:
        FileNotFoundError, ValueError: see `PackedAudio.load`.
    """

    def __init__(self, pool: PackedAudio | str | os.PathLike, sampling_rate: int, *, seed: int = 0, **crops: Any):
        super().__init__(seed)
        self.settings = CropSettings(sampling_rate, **crops)
        self.sources = pool if isinstance(pool, PackedAudio) else PackedAudio.load(pool, sampling_rate=sampling_rate)
        if self.sources.sampling_rate != sampling_rate:
            raise ValueError(f"expected audio of {sampling_rate} Hz, got {self.sources.sampling_rate} Hz")

    def __len__(self) -> int:
        return len(self.sources)

    def to(self, device: str | torch.device) -> "PackedCrops":
        """Move the audio, in place; crops are gathered where it is."""
        self.sources = self.sources.to(device)
        return self

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        key = sample_key(self.seed, self.epoch, index)
        return {"sample_key": key, "index": index, "file": self.sources.names[index], "bad_files": []}

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """`collate_crops` with the crops; for loader workers, if the audio is not on the model's device."""
        batch = collate_crops(items)
        return batch | self.gather(batch["indices"], batch["sample_keys"])

    @torch.no_grad()
    def gather(self, indices: Tensor, sample_keys: Tensor) -> dict[str, Tensor]:
        """The crops of a batch, cut on the audio's device and bit-identical on every device.

        Args:
            indices (batch,): int64, the clips.
            sample_keys (batch,): int64, the seeds of their crops.

        Returns:
            As `CropSettings.read`, with a batch dimension first and the waveforms as int16 PCM.
        """
        settings, pool = self.settings, self.sources
        device = pool.audio.device
        cut = _cut_by_slices if choices_for(device).crops_by_slices else _cut_by_index
        indices, keys = indices.to(device), mix_keys(sample_keys.to(device), _CROPS)
        offsets, totals = pool.offsets[indices], pool.lengths[indices]
        rolls = uniform_noise(mix_keys(keys, _ROLL), 1)[:, 0] < settings.roll_probability
        shifts = _below(mix_keys(keys, _SHIFT), totals) * rolls
        crops, first = {}, _FIRST_CROP
        for kind, count, size in (
            ("global", settings.num_global_crops, settings.global_samples),
            ("local", settings.num_local_crops, settings.local_samples),
        ):
            if count == 0:
                continue
            numbers = mix_keys(keys[:, None], torch.arange(first, first + count, device=device))
            starts = _below(numbers, (totals - size).clamp_min(0)[:, None] + 1) - shifts[:, None]
            crops[f"{kind}_waveforms"] = cut(pool.audio, offsets, totals, starts % totals[:, None], size)
            crops[f"{kind}_lengths"] = totals.clamp_max(size)[:, None].repeat(1, count)
            first += count
        return crops


Clip = tuple[str, str | None, np.ndarray]  # name, part and samples


def write_packed(folder: str | os.PathLike, clips: Iterable[Clip], sampling_rate: int) -> None:
    """Write clips as packed audio, which cannot be loaded until all clips are written.

    Args:
        clips: name, part of the pool (`None` if there are no parts) and int16 PCM `(samples,)` of each clip.
        sampling_rate: of all clips, in Hz.

    Raises:
        FileExistsError: `folder` already holds packed audio.
        ValueError: no clips, or one that is empty or not int16.
    """
    folder = new_folder(folder)
    names, parts, lengths = [], [], []
    with whole_file(folder / AUDIO) as unfinished, unfinished.open("wb") as file:
        for name, part, samples in clips:
            if samples.dtype != np.int16 or samples.ndim != 1 or len(samples) == 0:
                got = f"{samples.dtype} {samples.shape} of {name}"
                raise ValueError(f"expected int16 samples of shape (samples,), got {got}")
            file.write(samples.astype("<i2", copy=False).tobytes())
            names.append(name)
            parts.append(part)
            lengths.append(len(samples))
        if not names:
            raise ValueError(f"expected at least one clip to write to {folder}, got none")
    write_index(folder / INDEX, FORMAT, sampling_rate, names, parts, lengths)


def new_folder(folder: str | os.PathLike) -> Path:
    """Creates the folder, which must not have an index yet."""
    folder = Path(folder)
    if (folder / INDEX).exists():
        raise FileExistsError(f"{folder} already holds {INDEX}: remove it or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_index(path: Path, format: str, sampling_rate: int, names: list, parts: list | None, lengths: list, **fields):
    """Writes an index for `read_index`, completely or not at all."""
    index = {"format": format, "version": VERSION, "sampling_rate": sampling_rate, "num_samples": sum(lengths)}
    index |= {"lengths": lengths, "names": names, **fields}
    if parts is not None and None not in parts:
        index["parts"] = parts
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(index) + "\n", encoding="utf-8")


def read_index(path: Path, format: str) -> dict[str, Any]:
    """The index of `write_index`: `sampling_rate`, `num_samples`, `lengths`, `names`, `parts` if any, other fields.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged index, or one of another format or version or without clips.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {format} in {path.parent}: expected a file {path.name} there")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(index, dict) or index.get("format") != format:
        raise ValueError(f"expected an index of {format} in {path}, got another kind of file")
    if index.get("version") != VERSION:
        expected = f"expected version {VERSION} of the format, got {index.get('version')} in {path}"
        raise ValueError(f"{expected}: update asit_hf or write the folder again")
    missing = {"sampling_rate", "num_samples", "lengths", "names"} - index.keys()
    if missing:
        raise ValueError(f"{path} is damaged: expected the keys {', '.join(sorted(missing))} too")
    lengths, names, parts = index["lengths"], index["names"], index.get("parts")
    if lengths == []:
        raise ValueError(f"expected at least one clip, got none in {path}")
    types = _is_list(lengths, int) and _is_list(names, str) and (parts is None or _is_list(parts, str))
    same = types and {len(names), len(names if parts is None else parts)} == {len(lengths)}
    positive = types and min(lengths) >= 1 and _is_list([index["sampling_rate"]], int) and index["sampling_rate"] >= 1
    if not (same and positive and sum(lengths) == index["num_samples"]):
        raise ValueError(f"{path} is damaged: expected a rate, and lengths, names and number of samples that agree")
    return index


def _is_list(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _map(folder: Path, num_samples: int) -> Tensor:
    """`(samples,)` int16, read lazily and never written to."""
    path = folder / AUDIO
    if not path.is_file():
        raise FileNotFoundError(f"no {FORMAT} in {folder}: expected a file {AUDIO} there")
    if (size := path.stat().st_size) != 2 * num_samples:
        raise ValueError(f"{path} is truncated or damaged: expected {2 * num_samples} bytes, got {size}")
    return torch.from_numpy(np.memmap(path, "<i2", mode="c"))  # "c", as torch warns of read-only arrays


def _below(numbers: Tensor, limits: Tensor) -> Tensor:
    """Hashes as uniform numbers in [0, limit); in integers, which are exact on every device."""
    return (numbers & (2**63 - 1)) % limits


def _cut_by_slices(audio: Tensor, offsets: Tensor, totals: Tensor, starts: Tensor, size: int) -> Tensor:
    """Crops `(batch, crops, size)` at `starts` (batch, crops), wrapping around at the end of a clip."""
    samples = audio.numpy()
    waveforms = np.empty((*starts.shape, size), np.int16)
    for rows, offset, total, row_starts in zip(waveforms, offsets.tolist(), totals.tolist(), starts.tolist()):
        clip = samples[offset : offset + total]
        filled = min(size, total)
        for crop, start in zip(rows, row_starts):
            before = min(filled, total - start)
            crop[:before] = clip[start : start + before]
            crop[before:filled] = clip[: filled - before]
            crop[filled:] = 0
    return torch.from_numpy(waveforms)


def _cut_by_index(audio: Tensor, offsets: Tensor, totals: Tensor, starts: Tensor, size: int) -> Tensor:
    """The same in a few operations that do not synchronize the device."""
    place = torch.arange(size, device=audio.device)
    totals = totals[:, None, None]
    positions = (starts[..., None] + place).remainder_(totals).add_(offsets[:, None, None])
    return audio[positions].masked_fill_(place >= totals, 0)
