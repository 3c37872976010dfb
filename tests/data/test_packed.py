import json
import os
import pickle
import signal
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from asit_hf.data import PackedAudio, PackedCrops, collate_crops, is_packed
from asit_hf.data import packed as module
from asit_hf.data.packed import AUDIO, INDEX, to_pcm, write_packed
from asit_hf.data.randomness import sample_key

RATE = 1000
SETTINGS = {"global_seconds": 0.5, "local_seconds": 0.2, "num_local_crops": 3, "seed": 5}


def ramps(lengths):
    """Clips whose samples say which clip and which place they come from."""
    return [np.arange(length, dtype=np.int16) + 2000 * index for index, length in enumerate(lengths)]


LENGTHS = (100, 500, 501, 1999, 1, 700)  # shorter than, as long as and longer than a crop


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    clips = [(f"{index}.wav", "ab"[index % 2], clip) for index, clip in enumerate(ramps(LENGTHS))]
    write_packed(folder, clips, RATE)
    return folder


def batch(crops, indices, device="cpu"):
    items = collate_crops([crops[index] for index in indices])
    return crops.gather(items["indices"], items["sample_keys"])


def test_a_pool_reads_back_as_it_was_written(folder):
    pool = PackedAudio.load(folder, sampling_rate=RATE)
    assert (len(pool), pool.sampling_rate, pool.audio.dtype) == (len(LENGTHS), RATE, torch.int16)
    assert pool.names == [f"{index}.wav" for index in range(len(LENGTHS))]
    assert pool.parts == ["a", "b"] * 3
    assert pool.hours == pytest.approx(sum(LENGTHS) / RATE / 3600)
    for clip, offset, length in zip(ramps(LENGTHS), pool.offsets, pool.lengths, strict=True):
        assert pool.audio[offset : offset + length].tolist() == clip.tolist()
    assert (folder / AUDIO).read_bytes() == np.concatenate(ramps(LENGTHS)).astype("<i2").tobytes()


def test_pcm_is_exact_for_16_bits_and_clips_beyond_full_scale():
    values = np.arange(-32768, 32768)
    assert (to_pcm((values / 32768).astype(np.float32)) == values).all()
    assert to_pcm(np.array([1.0, 1.7, -1.7])).tolist() == [32767, 32767, -32768]


def damage(folder, name, change):
    path = folder / name
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda folder: (folder / INDEX).unlink(), FileNotFoundError, INDEX),
        (lambda folder: (folder / AUDIO).unlink(), FileNotFoundError, AUDIO),
        (lambda folder: os.truncate(folder / AUDIO, 2 * sum(LENGTHS) - 2), ValueError, "truncated"),
        (lambda folder: (folder / INDEX).write_text("{"), ValueError, "damaged"),
        (lambda folder: (folder / INDEX).write_text("[1]"), ValueError, "another kind"),
        (lambda folder: damage(folder, INDEX, lambda index: {**index, "version": 99}), ValueError, "99"),
        (lambda folder: damage(folder, INDEX, lambda index: {**index, "format": "other"}), ValueError, "another kind"),
        (lambda folder: damage(folder, INDEX, lambda index: {**index, "names": ["one"]}), ValueError, "damaged"),
        (lambda folder: damage(folder, INDEX, lambda index: {**index, "names": 7}), ValueError, "damaged"),
        (lambda folder: damage(folder, INDEX, lambda index: {**index, "lengths": None}), ValueError, "damaged"),
        (lambda folder: damage(folder, INDEX, lambda index: {**index, "parts": [1] * 6}), ValueError, "damaged"),
        (lambda folder: damage(folder, INDEX, lambda index: {**index, "sampling_rate": "8k"}), ValueError, "damaged"),
        (
            lambda folder: damage(folder, INDEX, lambda index: {**index, "lengths": [0, *index["lengths"][1:]]}),
            ValueError,
            "damaged",
        ),
        (
            lambda folder: damage(folder, INDEX, lambda index: {k: v for k, v in index.items() if k != "names"}),
            ValueError,
            "names",
        ),
        (
            lambda folder: damage(folder, INDEX, lambda index: {**index, "lengths": [], "names": []}),
            ValueError,
            "at least one clip",
        ),
    ],
)
def test_what_is_not_a_whole_pool_is_a_clear_error(tmp_path, change, error, said):
    write_packed(tmp_path, [(f"{index}", None, clip) for index, clip in enumerate(ramps(LENGTHS))], RATE)
    change(tmp_path)
    with pytest.raises(error, match=said):
        PackedAudio.load(tmp_path)


def test_another_rate_is_an_error_that_names_both(folder):
    with pytest.raises(ValueError, match=r"16000 Hz.*1000 Hz"):
        PackedCrops(folder, 16000)
    with pytest.raises(ValueError, match=r"16000 Hz.*1000 Hz"):
        PackedCrops(PackedAudio.load(folder), 16000)


def test_writing_refuses_what_it_cannot_write(folder, tmp_path):
    with pytest.raises(FileExistsError, match=INDEX):
        write_packed(folder, [("a", None, np.zeros(3, np.int16))], RATE)
    for samples in (np.zeros(3, np.float32), np.zeros((3, 2), np.int16), np.zeros(0, np.int16)):
        with pytest.raises(ValueError, match="int16"):
            write_packed(tmp_path, [("a", None, samples)], RATE)
    with pytest.raises(ValueError, match="at least one clip"):
        write_packed(tmp_path, [], RATE)
    assert not is_packed("a" * 400)  # longer than names of files may be, as sources in JSON are
    assert not is_packed(tmp_path)


def test_a_kill_leaves_nothing_that_loads_and_the_next_call_writes_it_whole(tmp_path):
    def clips():
        yield "a", None, np.ones(100_000, np.int16)
        os.kill(os.getpid(), signal.SIGKILL)

    killed = get_context("fork").Process(target=write_packed, args=(tmp_path, clips(), RATE))
    killed.start()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    assert not is_packed(tmp_path)
    with pytest.raises(FileNotFoundError):
        PackedAudio.load(tmp_path)
    write_packed(tmp_path, [("b", None, np.ones(7, np.int16))], RATE)
    assert PackedAudio.load(tmp_path).names == ["b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [AUDIO, INDEX]


def test_on_a_cpu_the_file_is_mapped_and_never_written_to(folder):
    pool = PackedAudio.load(folder)
    if sys.platform == "linux":
        assert str(folder / AUDIO) in Path("/proc/self/maps").read_text()
    before = (folder / AUDIO).read_bytes()
    pool.audio[:10] = 7
    assert (folder / AUDIO).read_bytes() == before


def test_a_pickled_data_set_carries_no_audio(folder):
    crops = PackedCrops(folder, RATE, **SETTINGS)
    content = pickle.dumps(crops.sources)
    assert len(content) < 2 * sum(LENGTHS)
    again = pickle.loads(content)
    assert torch.equal(again.audio, crops.sources.audio)


def test_repeated_parts_give_more_crops_of_the_same_audio(folder):
    pool = PackedAudio.load(folder)
    repeated = pool.repeat({"b": 3})
    assert repeated.parts == ["a", *"bbb", "a", *"bbb", "a", *"bbb"]
    assert [int(name[0]) for name in repeated.names] == [0, 1, 1, 1, 2, 3, 3, 3, 4, 5, 5, 5]
    assert repeated.audio is pool.audio
    assert repeated.hours == pytest.approx((sum(LENGTHS) + 2 * sum(LENGTHS[1::2])) / RATE / 3600)
    crops = pickle.loads(pickle.dumps(PackedCrops(repeated, RATE, **SETTINGS)))
    first, *others = (batch(crops, [index])["global_waveforms"][0] for index in (5, 6, 7))
    for crop in (first, *others):  # clip 3 is a ramp: the crops are pieces of it, cut at other places
        assert (crop.diff() == 1).sum() >= crop.numel() - 3
        assert (crop >= 6000).all()
        assert (crop < 6000 + LENGTHS[3]).all()
    assert all((first != other).any() for other in others)
    assert pool.repeat({}).names == pool.names


@pytest.mark.parametrize(
    ("times", "error"), [({"c": 2}, r"\['a', 'b'\], got \['c'\]"), ({"a": 0}, "at least 1 time, got {'a': 0}")]
)
def test_only_parts_of_the_pool_are_repeated(folder, times, error):
    with pytest.raises(ValueError, match=error):
        PackedAudio.load(folder).repeat(times)


def test_crops_are_pieces_of_their_clip_filled_with_zeros(folder):
    crops = PackedCrops(folder, RATE, **SETTINGS)
    keys = torch.arange(6 * 50)
    indices = torch.arange(6).repeat(50)
    found = crops.gather(indices, keys)
    assert {name: (tuple(value.shape), value.dtype) for name, value in found.items()} == {
        "global_waveforms": ((300, 2, 500), torch.int16),
        "global_lengths": ((300, 2), torch.int64),
        "local_waveforms": ((300, 3, 200), torch.int16),
        "local_lengths": ((300, 3), torch.int64),
    }
    clips = ramps(LENGTHS)
    for kind, size in (("global", 500), ("local", 200)):
        starts = [set() for _ in LENGTHS]
        for index, rows, lengths in zip(indices, found[f"{kind}_waveforms"], found[f"{kind}_lengths"]):
            for crop, length in zip(rows, lengths):
                clip = clips[index]
                assert length == min(size, len(clip))
                start = int(crop[0]) - int(clip[0])
                starts[index].add(start)
                assert crop[:length].tolist() == clip[start : start + length].tolist()
                assert not crop[length:].any()
        for length, seen in zip(LENGTHS, starts):
            most = max(0, length - size)
            assert min(seen) >= 0
            assert max(seen) <= most
            assert len(seen) > 0.3 * min(most, 50)  # uniform, not always the same place
            assert max(seen) >= 0.8 * most


def test_a_rolled_clip_goes_on_at_its_beginning_and_all_its_crops_are_rolled_together(folder):
    crops = PackedCrops(folder, RATE, **{**SETTINGS, "num_local_crops": 0}, roll_probability=1.0)
    clip, index = ramps(LENGTHS)[1], 1  # as long as a crop: each is the whole clip, rolled
    found = crops.gather(torch.full((100,), index), torch.arange(100))
    assert "local_waveforms" not in found
    starts = set()
    for rows in found["global_waveforms"]:
        start = int(rows[0, 0]) - int(clip[0])
        starts.add(start)
        for crop in rows:
            assert crop.tolist() == np.roll(clip, -start).tolist()
    assert len(starts) > 50
    short = crops.gather(torch.zeros(100, dtype=torch.int64), torch.arange(100))["global_waveforms"]
    assert (short[..., :100].sort(-1).values == torch.arange(100)).all()
    assert not short[..., 100:].any()


def test_as_many_clips_are_rolled_as_asked_for(folder):
    crops = PackedCrops(folder, RATE, **SETTINGS, roll_probability=0.3)
    found = crops.gather(torch.full((2000,), 1), torch.arange(2000))["global_waveforms"]
    rolled = (found[:, 0, 0] != 2000).float().mean()
    assert rolled == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("roll_probability", [0.0, 0.5])
def test_an_accelerator_cuts_the_same_crops_bit_for_bit(folder, monkeypatch, roll_probability):
    crops = PackedCrops(folder, RATE, **SETTINGS, roll_probability=roll_probability)
    expected = batch(crops, range(6))
    monkeypatch.setattr(module, "_cut_by_slices", module._cut_by_index)
    for name, value in batch(crops, range(6)).items():
        assert torch.equal(value, expected[name]), name
        assert value.dtype == expected[name].dtype


def test_on_an_accelerator_no_size_depends_on_the_data(folder):
    """Tensors without data: any operation that waits for the device raises."""
    crops = PackedCrops(folder, RATE, **SETTINGS, roll_probability=0.5)
    shapes = {name: value.shape for name, value in batch(crops, range(4)).items()}
    found = batch(crops.to("meta"), range(4))
    assert {name: value.shape for name, value in found.items()} == shapes
    assert all(value.device.type == "meta" for value in found.values())


def test_items_depend_on_seed_epoch_and_index_alone(folder):
    crops = PackedCrops(folder, RATE, **SETTINGS)
    assert crops[2] == {"sample_key": sample_key(5, 0, 2), "index": 2, "file": "2.wav", "bad_files": []}
    assert crops[-1]["index"] == 5
    with pytest.raises(IndexError):
        crops[6]
    first = batch(crops, range(6))
    alone = batch(crops, [3])
    assert torch.equal(alone["global_waveforms"][0], first["global_waveforms"][3])
    crops.set_epoch(1)
    assert crops[2]["sample_key"] == sample_key(5, 1, 2)
    assert not torch.equal(batch(crops, range(6))["global_waveforms"], first["global_waveforms"])
    crops.set_epoch(0)
    assert torch.equal(batch(crops, range(6))["local_waveforms"], first["local_waveforms"])


def test_loader_workers_change_nothing(folder):
    crops = PackedCrops(folder, RATE, **SETTINGS)
    expected = [crops.collate([crops[index] for index in pair]) for pair in ((0, 1), (2, 3), (4, 5))]
    loader = DataLoader(crops, 2, num_workers=2, collate_fn=crops.collate)
    for found, wanted in zip(loader, expected, strict=True):
        assert found.keys() == wanted.keys()
        assert found["files"] == wanted["files"]
        for name in ("global_waveforms", "local_waveforms", "global_lengths", "sample_keys", "indices"):
            assert torch.equal(found[name], wanted[name]), name


@pytest.mark.slow
def test_packed_audio_needs_no_library_that_decodes(folder):
    script = (
        "import sys\n"
        "for name in ('datasets', 'evaluate', 'librosa', 'pyarrow'): sys.modules[name] = None\n"
        "from asit_hf.data.packed import PackedCrops\n"
        "import torch\n"
        f"crops = PackedCrops({str(folder)!r}, {RATE}, global_seconds=0.5)\n"
        "print(crops.gather(torch.tensor([1]), torch.tensor([crops[1]['sample_key']]))['global_lengths'].tolist())"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "[[500, 500]]", result.stderr
