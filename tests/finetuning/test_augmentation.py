from functools import partial

import numpy as np
import pytest
import soundfile
import torch
from datasets import Audio, ClassLabel, Dataset, List, Value
from torch.utils.data import DataLoader

from asit_hf import ASiTFeatureExtractor
from asit_hf.data import ClassificationCollator, LabelledClips
from asit_hf.finetuning.augmentation import Augmentation, TrainingClips
from asit_hf.finetuning.sampling import balanced_weights

RATE = 16000
SECONDS = (0.5, 0.3, 0.7, 0.4)
SINGLE = ClassLabel(num_classes=4)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    """Sines of 1, 2, 3 and 4 kHz, whose shares in a mixture can be measured."""
    folder = tmp_path_factory.mktemp("tones")
    for index, length in enumerate(SECONDS):
        tone = 0.2 * np.sin(2 * np.pi * 1000 * (index + 1) * np.arange(int(RATE * length)) / RATE)
        soundfile.write(folder / f"{index}.wav", tone, RATE, subtype="FLOAT")
    return sorted(str(path) for path in folder.iterdir())


def make_clips(files, labels=(0, 1, 2, 3), feature=SINGLE, **kwargs) -> LabelledClips:
    dataset = Dataset.from_dict({"audio": files}).cast_column("audio", Audio(decode=False))
    return LabelledClips(dataset.add_column("label", list(labels), feature=feature), RATE, train=True, **kwargs)


def amount(waveform: np.ndarray, tone: int) -> float:
    """The amplitude of a clip's tone at the beginning of a waveform."""
    part = waveform[: int(0.3 * RATE)]
    return 2 * float(np.mean(part * np.sin(2 * np.pi * 1000 * (tone + 1) * np.arange(len(part)) / RATE)))


def test_no_augmentation_by_default(files):
    clips = make_clips(files, max_seconds=0.2)
    items = TrainingClips(clips)
    assert len(items) == 4
    for index in range(4):
        np.testing.assert_array_equal(items[index]["waveform"], clips[index]["waveform"])
        assert items[index]["label"] == index
        assert "mixture" not in items[index]
    values = torch.randn(50, 32)
    assert torch.equal(Augmentation().spectrogram(values, np.random.default_rng(0)), values)


def test_waveforms_and_labels_are_mixed_in_the_same_proportion(files):
    items = TrainingClips(make_clips(files), Augmentation(mixup_rate=1.0))
    shares = []
    for epoch in range(30):
        items.set_epoch(epoch)
        for index in range(4):
            item = items[index]
            assert len(item["waveform"]) == int(RATE * SECONDS[index])
            (label, share), (other, rest) = item["mixture"]
            assert label == index
            assert share + rest == pytest.approx(1)
            if other != label:
                shares.append(share)
                assert amount(item["waveform"], label) == pytest.approx(0.2 * share, abs=1e-3)
                assert amount(item["waveform"], other) == pytest.approx(0.2 * rest, abs=1e-3)
    # Beta(10, 10) has mean 1/2 and standard deviation 1 / sqrt(84) = 0.109
    assert np.mean(shares) == pytest.approx(0.5, abs=0.04)
    assert np.std(shares) == pytest.approx(0.109, abs=0.025)


def test_the_mixup_rate_is_the_share_of_mixed_clips(files):
    items = TrainingClips(make_clips(files), Augmentation(mixup_rate=0.25))
    mixed = []
    for epoch in range(100):
        items.set_epoch(epoch)
        mixed += [len(items[index]["mixture"]) == 2 for index in range(4)]
    assert np.mean(mixed) == pytest.approx(0.25, abs=0.07)


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
def test_soft_labels(files, problem_type):
    multiple = problem_type == "multi_label_classification"
    labels, feature = ([[0, 1], [1], [], [3]], List(SINGLE)) if multiple else ((0, 1, 2, 3), SINGLE)
    items = TrainingClips(make_clips(files, labels, feature), Augmentation(mixup_rate=0.7))
    batch = [items[index] for index in range(4)]
    targets = ClassificationCollator(ASiTFeatureExtractor(), 4, problem_type)(batch)["labels"]
    assert targets.dtype == torch.float32
    expected = np.zeros((4, 4))
    for row, item in enumerate(batch):
        for label, share in item["mixture"]:
            expected[row, label] += share
    np.testing.assert_allclose(targets.numpy(), expected, atol=1e-6)
    assert {len(item["mixture"]) for item in batch} == {1, 2}


def test_regression_labels_are_mixed(files):
    items = TrainingClips(make_clips(files, (0.0, 1.0, 2.0, 3.0), Value("float64")), Augmentation(mixup_rate=1.0))
    batch = [items[index] for index in range(4)]
    targets = ClassificationCollator(ASiTFeatureExtractor(), problem_type="regression")(batch)["labels"]
    expected = [sum(label * share for label, share in item["mixture"]) for item in batch]
    np.testing.assert_allclose(targets.numpy(), expected, rtol=1e-6)


def test_a_clip_is_not_mixed_with_an_unreadable_one(files, tmp_path):
    items = TrainingClips(
        make_clips([files[0], str(tmp_path / "gone.wav")], (0, 1), strict=False), Augmentation(mixup_rate=1.0)
    )
    seen = set()
    for epoch in range(10):
        items.set_epoch(epoch)
        item = items[0]
        seen.add("bad_files" in item)
        if "bad_files" in item:
            assert item["mixture"] == [(0, 1.0)]
            assert amount(item["waveform"], 0) == pytest.approx(0.2, abs=1e-3)
    assert seen == {True, False}


def same(first: dict, second: dict) -> bool:
    if not torch.equal(first["labels"], second["labels"]):
        return False
    return torch.equal(first["input_values"], second["input_values"])


def test_augmentation_is_a_function_of_seed_epoch_and_position(files):
    augmentation = Augmentation(0.5, 10.0, True, True, 8, 10, 0.2, True)
    collate = ClassificationCollator(ASiTFeatureExtractor(num_mel_bins=32), 4, augment=augmentation.spectrogram)

    def batches(seed=0, epoch=0, workers=0, size=2):
        items = TrainingClips(make_clips(files, max_seconds=0.2, seed=seed), augmentation, np.array([1.0, 2, 3, 4]))
        items.set_epoch(epoch)
        return list(DataLoader(items, batch_size=size, collate_fn=collate, num_workers=workers))

    first = batches()
    assert all(same(*pair) for pair in zip(first, batches(workers=2)))
    assert torch.equal(torch.cat([batch["input_values"] for batch in first]), batches(size=4)[0]["input_values"])
    assert not same(first[0], batches(seed=1)[0])
    assert not same(first[0], batches(epoch=1)[0])


def test_clips_sampled_twice_are_augmented_differently(files):
    items = TrainingClips(make_clips(files), Augmentation(roll=True), np.array([0.0, 1.0, 0.0, 0.0]))
    drawn = [items[position] for position in range(4)]
    assert [item["label"] for item in drawn] == [1] * 4
    assert len({item["waveform"].tobytes() for item in drawn}) > 1


def test_sampling_follows_the_weights(files):
    labels = [0] * 12 + [1] * 3 + [2]
    items = TrainingClips(make_clips([files[1]] * 16, labels, max_seconds=0.05), weights=balanced_weights(labels, 4))
    counts = np.zeros(4)
    for epoch in range(60):
        items.set_epoch(epoch)
        counts += np.bincount([items[position]["label"] for position in range(16)], minlength=4)
    np.testing.assert_allclose(counts / counts.sum(), [1 / 3, 1 / 3, 1 / 3, 0], atol=0.05)


def test_roll_and_gain():
    waveform = np.arange(1, 101, dtype=np.float32)
    rolled = Augmentation(roll=True).waveform(waveform, np.random.default_rng(1))
    assert rolled[0] != 1
    np.testing.assert_array_equal(np.sort(rolled), waveform)
    np.testing.assert_array_equal(np.roll(rolled, int(rolled[0]) - 1), waveform)
    gains = [
        float(Augmentation(random_gain=True).waveform(waveform, np.random.default_rng(seed))[0]) for seed in range(300)
    ]
    assert np.mean(gains) == pytest.approx(1, abs=0.03)
    assert 0.5 < min(gains) < 0.8
    assert 1.2 < max(gains) < 1.5


def test_spec_augment_masks_one_band_of_bins_and_one_of_frames():
    widths, heights = [], []
    for seed in range(300):
        values = Augmentation(frequency_mask=12, time_mask=20).spectrogram(
            torch.ones(100, 32), np.random.default_rng(seed)
        )
        columns, rows = (values == 0).all(0), (values == 0).all(1)
        assert torch.equal(values == 0, rows[:, None] | columns[None, :])
        for masked, sizes in ((rows, widths), (columns, heights)):
            sizes.append(int(masked.sum()))
            assert int(masked.int().diff().abs().sum()) <= 2  # contiguous
    assert (min(widths), max(widths)) == (0, 19)
    assert (min(heights), max(heights)) == (0, 11)


def test_masks_longer_than_the_clip():
    values = Augmentation(time_mask=192).spectrogram(torch.ones(20, 32), np.random.default_rng(3))
    assert 0 < int((values == 0).all(1).sum()) < 20


def test_patch_masks_cover_whole_patches():
    values = Augmentation(patch_mask_rate=0.25).spectrogram(torch.ones(70, 64), np.random.default_rng(0))
    patches = (values[:64] == 0).reshape(4, 16, 4, 16).float().mean((1, 3))
    assert set(patches.flatten().tolist()) == {0.0, 1.0}
    assert int(patches.all(1).sum()) == 1
    assert int(patches.all(0).sum()) == 1


def test_noise_and_its_roll():
    ramp = torch.arange(100.0)[:, None].expand(100, 16)
    shifts, levels = set(), []
    for seed in range(200):
        values = Augmentation(noise=True).spectrogram(ramp, np.random.default_rng(seed))
        shift = round((int(values[0, 0]) + 50) % 100 - 50)
        noise = values.roll(shift, 0) - ramp
        assert noise.min() >= 0
        levels.append(float(noise.max()))
        shifts.add(shift)
    assert max(levels) <= 0.1
    assert np.mean(levels) == pytest.approx(0.05, abs=0.01)
    assert shifts == set(range(-9, 11))


def test_padding_and_evaluation_are_not_augmented(files):
    """Only the real frames of a padded training batch change."""
    extractor = ASiTFeatureExtractor(num_mel_bins=32)
    augment = partial(Augmentation(noise=True).spectrogram, patch_size=16)
    collate = ClassificationCollator(extractor, 4, augment=augment)
    clips = make_clips(files)
    plain = ClassificationCollator(extractor, 4)([clips[index] for index in range(4)])
    evaluated = collate([clips[index] for index in range(4)])
    assert torch.equal(evaluated["input_values"], plain["input_values"])
    trained = collate([TrainingClips(clips)[index] for index in range(4)])
    changed = (trained["input_values"] != plain["input_values"]).any(-1)
    assert torch.equal(changed, plain["attention_mask"].bool())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup_rate": 1.5}, "mixup_rate.*got 1.5"),
        ({"patch_mask_rate": -0.1}, "patch_mask_rate.*got -0.1"),
        ({"time_mask": -1}, "time_mask.*-1"),
        ({"mixup_rate": 0.5, "mixup_alpha": 0}, "mixup_alpha.*and 0"),
        ({"mixup_alpha": 2.0}, "mixup_alpha .*without mixup_rate"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)


@pytest.mark.parametrize("weights", [[1.0, 2.0], [0.0] * 4, [1.0, -1.0, 1.0, 1.0], [np.nan, 1.0, 1.0, 1.0]])
def test_wrong_weights(files, weights):
    with pytest.raises(ValueError, match="expected 4"):
        TrainingClips(make_clips(files), weights=np.array(weights))
