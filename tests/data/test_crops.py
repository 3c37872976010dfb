import numpy as np
import pytest
import soundfile as sf
import torch
from sounds import RATE, ramp
from torch.utils.data import DataLoader

from asit_hf.data.audio import AudioReadError, read_audio
from asit_hf.data.clips import LabelledClips
from asit_hf.data.collators import collate_crops
from asit_hf.data.crops import PretrainingCrops
from asit_hf.data.datasets import load_audio_dataset
from asit_hf.data.randomness import sample_key

SHORT = {"global_seconds": 0.5, "local_seconds": 0.2, "num_local_crops": 3}


def starts_of(waveforms: torch.Tensor) -> np.ndarray:
    return np.round(waveforms[:, 0].numpy() * 2**20).astype(int)


def assert_same(first: dict, second: dict):
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[name]), name
        else:
            assert value == second[name], name


def test_an_item(clips):
    item = PretrainingCrops(clips, RATE, **SHORT)[1]
    assert item["global_waveforms"].shape == (2, 4000)
    assert item["local_waveforms"].shape == (3, 1600)
    assert item["global_waveforms"].dtype == torch.float32
    assert item["global_lengths"].tolist() == [4000, 4000]
    assert item["local_lengths"].tolist() == [1600] * 3
    assert (item["index"], item["bad_files"], item["sample_key"]) == (1, [], sample_key(0, 0, 1))
    clip = read_audio(clips[1], RATE)
    for crop in (*item["global_waveforms"], *item["local_waveforms"]):
        start = round((float(crop[0]) - 1 / 2**4) * 2**20)
        np.testing.assert_array_equal(crop, clip[start : start + len(crop)])


def test_no_local_crops(clips):
    item = PretrainingCrops(clips, RATE, global_seconds=0.5, num_local_crops=0)[0]
    assert "local_waveforms" not in item
    assert "local_lengths" not in item


def test_crops_are_uniform_and_independent():
    crops = PretrainingCrops([{"array": ramp(2), "sampling_rate": RATE}] * 600, RATE, **SHORT)
    starts = np.stack(
        [
            np.r_[starts_of(item["global_waveforms"]), starts_of(item["local_waveforms"])]
            for item in map(crops.__getitem__, range(600))
        ]
    )
    ends = np.array([12000] * 2 + [14400] * 3)
    assert (starts >= 0).all()
    assert (starts <= ends).all()
    quarters = np.stack([np.histogram(column / end, 4, (0, 1))[0] for column, end in zip(starts.T, ends)])
    assert np.abs(quarters - 150).max() < 50
    correlation = np.corrcoef(starts.T)
    assert np.abs(correlation - np.eye(5)).max() < 0.15


def test_crops_depend_on_seed_epoch_and_index_alone(clips):
    crops = PretrainingCrops(clips, RATE, **SHORT)
    first = [crops[index] for index in range(12)]
    for index in reversed(range(12)):
        assert_same(crops[index], first[index])
    assert_same(crops[-1], first[11])
    assert_same(PretrainingCrops(clips, RATE, **SHORT)[4], first[4])
    other_seed = PretrainingCrops(clips, RATE, seed=1, **SHORT)[4]
    crops.set_epoch(1)
    for other in (other_seed, crops[4]):
        assert other["sample_key"] != first[4]["sample_key"]
        assert not torch.equal(other["global_waveforms"], first[4]["global_waveforms"])
    crops.set_epoch(0)
    assert_same(crops[4], first[4])


def test_short_clips_are_padded_with_zeros_at_the_end():
    item = PretrainingCrops([{"array": ramp(0.3) + 1, "sampling_rate": RATE}], RATE, **SHORT)[0]
    assert item["global_lengths"].tolist() == [2400, 2400]
    assert item["local_lengths"].tolist() == [1600] * 3
    np.testing.assert_array_equal(item["global_waveforms"][0, :2400], ramp(0.3) + 1)
    assert not item["global_waveforms"][:, 2400:].any()


def test_roll_shifts_the_clip_in_a_circle():
    source = [{"array": ramp(0.8), "sampling_rate": RATE}] * 200
    never, always = (PretrainingCrops(source, RATE, roll_probability=p, **SHORT) for p in (0.0, 1.0))
    wrapped = 0
    for index in range(200):
        waveforms = always[index]["global_waveforms"]
        positions = np.round(waveforms.numpy() * 2**20).astype(int)
        np.testing.assert_array_equal(positions, (positions[:, :1] + np.arange(4000)) % 6400)
        # One shift for all crops of a clip.
        difference = (starts_of(waveforms) - starts_of(never[index]["global_waveforms"])) % 6400
        assert difference[0] == difference[1]
        wrapped += int((positions[:, -1] < positions[:, 0]).any())
    assert wrapped > 100
    half = PretrainingCrops(source, RATE, roll_probability=0.5, **SHORT)
    rolled = sum(not torch.equal(half[i]["global_waveforms"], never[i]["global_waveforms"]) for i in range(200))
    assert 70 < rolled < 130


def test_a_rolled_short_clip_keeps_all_its_samples():
    item = PretrainingCrops([{"array": ramp(0.3), "sampling_rate": RATE}], RATE, roll_probability=1.0, **SHORT)[0]
    positions = np.round(item["global_waveforms"][0, :2400].numpy() * 2**20).astype(int)
    assert positions[0] != 0
    assert sorted(positions) == list(range(2400))


@pytest.mark.parametrize("rate", [8000, 11025])
def test_long_files_are_read_in_windows(tmp_path, monkeypatch, rate):
    path = tmp_path / "long.flac"
    time = np.arange(120 * RATE) / RATE
    sf.write(path, 0.5 * np.sin(2 * np.pi * (100 * time + 5 * time**2)), RATE)
    lengths = {"global_seconds": 1.0, "local_seconds": 0.5, "num_local_crops": 2}
    crops = PretrainingCrops([str(path)] * 5, rate, **lengths)
    whole = PretrainingCrops([{"array": sf.read(path)[0], "sampling_rate": RATE}] * 5, rate, **lengths)
    decoded = []
    read = sf.SoundFile.read
    monkeypatch.setattr(sf.SoundFile, "read", lambda self, n=-1, *a, **k: decoded.append(n) or read(self, n, *a, **k))
    for index in range(5):
        for name in ("global_waveforms", "local_waveforms"):
            np.testing.assert_allclose(crops[index][name], whole[index][name], atol=1e-3)
    assert sum(decoded) / 10 < 8 * RATE


def test_an_mp3_shorter_than_its_header_says(tmp_path):
    path = tmp_path / "cut.mp3"
    samples = np.random.default_rng(0).uniform(-0.3, 0.3, 20 * 44100)
    with sf.SoundFile(path, "w", 44100, 1, "MPEG_LAYER_III", format="MP3") as file:
        for start in range(0, len(samples), 4096):
            file.write(samples[start : start + 4096])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 5])
    present = read_audio(path, RATE)
    crops = PretrainingCrops([str(path)] * 10, RATE, global_seconds=1.0, local_seconds=0.5, num_local_crops=1)
    for index in range(10):
        item = crops[index]
        assert item["bad_files"] == []
        assert item["global_lengths"].tolist() == [RATE, RATE]
        assert item["global_waveforms"][:, -100:].abs().amax(dim=1).min() > 0.01
    assert len(present) < 8 * RATE
    drawn = LabelledClips([str(path)] * 10, RATE, max_seconds=1.0, train=True)
    assert [len(drawn[index]["waveform"]) for index in range(10)] == [RATE] * 10


def test_bad_files_are_reported_and_replaced(clips):
    crops = PretrainingCrops(clips, RATE, **SHORT)
    for epoch in range(3):
        crops.set_epoch(epoch)
        for index in (3, 7):
            item = crops[index]
            assert item["bad_files"][0][0] == clips[index]
            assert item["bad_files"][0][1] == ("no such file" if index == 7 else "Format not recognised")
            assert item["index"] not in (3, 7)
            assert item["sample_key"] == sample_key(0, epoch, index)
            assert_same(crops[index], item)
    replacements = set()
    for epoch in range(20):
        crops.set_epoch(epoch)
        replacements.add(crops[3]["index"])
    assert len(replacements) > 4


def test_strict_raises(clips):
    crops = PretrainingCrops(clips, RATE, strict=True, **SHORT)
    assert crops[0]["bad_files"] == []
    with pytest.raises(AudioReadError, match=r"07\.wav: no such file"):
        crops[7]


def test_nothing_but_bad_files(tmp_path):
    crops = PretrainingCrops([str(tmp_path / f"{i}.wav") for i in range(3)], RATE, **SHORT)
    with pytest.raises(RuntimeError, match=r"100 clips in a row cannot be read, the last one: .*no such file"):
        crops[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_global_crops": 0}, ">= 1 global"),
        ({"num_local_crops": -1}, ">= 0 local"),
        ({"global_seconds": 0}, "got 0 and"),
        ({"local_seconds": 0.0}, "got 6.0 and 0.0"),
        ({"roll_probability": 1.5}, "in [0, 1], got 1.5"),
    ],
)
def test_impossible_settings(clips, options, message):
    with pytest.raises(ValueError) as caught:
        PretrainingCrops(clips, RATE, **options)
    assert message in str(caught.value)


def test_empty_and_wrong_data_sets(clips):
    with pytest.raises(ValueError, match="got an empty data set"):
        PretrainingCrops([], RATE)
    wrong = load_audio_dataset(clips[0]).rename_column("audio", "sound")
    with pytest.raises(ValueError, match=r"expected an audio column, got \['sound'\]"):
        PretrainingCrops(wrong, RATE)


def test_workers_give_the_same_items_and_follow_the_epoch(clips, tmp_path):
    crops = PretrainingCrops(load_audio_dataset(tmp_path), RATE, **SHORT)
    loader = DataLoader(crops, 4, num_workers=2, persistent_workers=True, collate_fn=collate_crops)
    for epoch in (0, 1):
        crops.set_epoch(epoch)
        batches = list(loader)
        assert_same(batches[1], collate_crops([crops[index] for index in range(4, 8)]))
        assert batches[0]["sample_keys"].tolist() == [sample_key(0, epoch, index) for index in range(4)]


@pytest.mark.real_audio
def test_real_crops(real_audio):
    dataset = load_audio_dataset(real_audio / "fsdd-8k" / "recordings")
    crops = PretrainingCrops(dataset, 16000, global_seconds=1.0, local_seconds=0.25)
    batch = collate_crops([crops[index] for index in range(0, 3000, 300)])
    assert batch["global_waveforms"].shape == (10, 2, 16000)
    assert batch["local_waveforms"].shape == (10, 4, 4000)
    assert batch["bad_files"] == []
    assert torch.isfinite(batch["global_waveforms"]).all()
