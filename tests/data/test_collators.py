import numpy as np
import pytest
import torch

from asit_hf.data.collators import ClassificationCollator, collate_crops
from asit_hf.data.crops import PretrainingCrops

SHORT = {"global_seconds": 0.5, "local_seconds": 0.2}


class Frames:
    """An extractor of the same call: ten samples a frame, no mel scale."""

    sampling_rate = 8000

    def __call__(self, raw_speech, sampling_rate, padding, return_tensors):
        assert (sampling_rate, padding, return_tensors) == (8000, True, "pt")
        frames = [torch.as_tensor(waveform)[: len(waveform) // 10 * 10].reshape(-1, 10) for waveform in raw_speech]
        pad = torch.nn.utils.rnn.pad_sequence
        mask = pad([torch.ones(len(clip), dtype=torch.int64) for clip in frames], batch_first=True)
        return {"input_values": pad(frames, batch_first=True), "attention_mask": mask}


def items(*labels, samples=(40, 25, 60)):
    return [
        {"waveform": np.full(count, index + 1, np.float32), "label": label, "index": index}
        for index, (count, label) in enumerate(zip(samples, labels))
    ]


def test_features_and_class_ids():
    batch = ClassificationCollator(Frames(), num_labels=5)(items(4, 0, 2))
    assert batch.keys() == {"input_values", "attention_mask", "labels"}
    assert batch["input_values"].shape == (3, 6, 10)
    assert batch["attention_mask"].sum(dim=1).tolist() == [4, 2, 6]
    assert batch["labels"].tolist() == [4, 0, 2]
    assert batch["labels"].dtype == torch.int64


def test_several_labels_become_targets():
    batch = ClassificationCollator(Frames(), 4, "multi_label_classification")(items([3, 1], [], 2))
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]]


def test_regression_keeps_numbers():
    batch = ClassificationCollator(Frames(), problem_type="regression")(items(0.5, -2, 3))
    assert batch["labels"].tolist() == [0.5, -2.0, 3.0]
    assert batch["labels"].dtype == torch.float32


def test_items_without_labels():
    unlabelled = [{"waveform": item["waveform"], "index": 0} for item in items(0, 0, 0)]
    assert "labels" not in ClassificationCollator(Frames(), 2)(unlabelled)


@pytest.mark.parametrize(
    ("problem_type", "label", "message"),
    [
        ("single_label_classification", 3, "from 0 to 2, got 3"),
        ("single_label_classification", -1, "from 0 to 2, got -1"),
        ("single_label_classification", [1, 2], r"from 0 to 2, got \[1, 2\]"),
        ("single_label_classification", "dog", "from 0 to 2, got 'dog'"),
        ("single_label_classification", None, "a label for every clip"),
        ("multi_label_classification", [0, 3], "from 0 to 2, got 3"),
    ],
)
def test_wrong_labels(problem_type, label, message):
    with pytest.raises(ValueError, match=message):
        ClassificationCollator(Frames(), 3, problem_type)(items(1, label))


def test_wrong_options():
    with pytest.raises(ValueError, match="expected problem_type to be one of .*, got 'other'"):
        ClassificationCollator(Frames(), 3, "other")
    with pytest.raises(ValueError, match="num_labels for single_label_classification"):
        ClassificationCollator(Frames())


def test_unreadable_clips_are_skipped_with_a_warning(caplog):
    bad = {"label": 1, "index": 9, "bad_files": [("gone.wav", "no such file")]}
    batch = ClassificationCollator(Frames(), 3)([bad, *items(2, 0)])
    assert batch["labels"].tolist() == [2, 0]
    assert len(batch["input_values"]) == 2
    assert "gone.wav: no such file" in caplog.text
    with pytest.raises(ValueError, match=r"none of the 1 clips of this batch can be read: .*gone\.wav"):
        ClassificationCollator(Frames(), 3)([bad])


@pytest.mark.parametrize("num_local_crops", [0, 3])
def test_collate_crops(num_local_crops, tmp_path):
    clip = {"array": np.linspace(-1, 1, 8000), "sampling_rate": 8000}
    missing = str(tmp_path / "gone.wav")
    crops = PretrainingCrops([clip, missing, clip], 8000, **SHORT, num_local_crops=num_local_crops)
    batch = collate_crops([crops[index] for index in range(3)])
    assert batch["global_waveforms"].shape == (3, 2, 4000)
    assert batch["global_lengths"].shape == (3, 2)
    if num_local_crops:
        assert batch["local_waveforms"].shape == (3, 3, 1600)
        assert batch["local_lengths"].shape == (3, 3)
    else:
        assert "local_waveforms" not in batch
        assert "local_lengths" not in batch
    assert batch["sample_keys"].dtype == torch.int64
    assert batch["sample_keys"].tolist() == [crops[index]["sample_key"] for index in range(3)]
    assert batch["indices"][0] == 0
    assert batch["indices"][1] in (0, 2)
    assert set(batch["bad_files"]) == {(missing, "no such file")}


def restored(batch: dict, kind: str = "global") -> torch.Tensor:
    return batch[f"{kind}_waveforms"] * (batch[f"{kind}_scales"] * 2**-15)[..., None]


@pytest.mark.parametrize("level", [0.99, 1e-4, 3.0])
def test_crops_in_16_bits_are_as_near_as_16_bits_of_their_own_peak(level):
    generator = np.random.default_rng(0)
    clips = [{"array": generator.uniform(-level, level, 8000), "sampling_rate": 8000} for _ in range(3)]
    crops = PretrainingCrops(clips, 8000, **SHORT, num_local_crops=3)
    items = [crops[index] for index in range(3)]
    plain, batch = collate_crops(items), collate_crops(items, int16=True)
    assert batch.keys() - plain.keys() == {"global_scales", "local_scales"}
    for kind in ("global", "local"):
        assert batch[f"{kind}_waveforms"].dtype == torch.int16
        assert batch[f"{kind}_scales"].shape == plain[f"{kind}_lengths"].shape
        assert (restored(batch, kind) - plain[f"{kind}_waveforms"]).abs().max() <= 2 * level * 2**-16
    assert torch.equal(batch["global_lengths"], plain["global_lengths"])


@pytest.mark.parametrize("peak", [32767, -32768, 16384, -16384, 1, 0])
def test_16_bit_audio_stays_as_it_is(peak):
    samples = np.random.default_rng(0).integers(-abs(peak) // 2, abs(peak) // 2 + 1, 4000)
    samples[7] = peak
    clip = {"array": (samples / 2**15).astype(np.float32), "sampling_rate": 8000}
    crops = PretrainingCrops([clip], 8000, **SHORT, num_local_crops=0)
    batch = collate_crops([crops[0]], int16=True)
    assert torch.equal(restored(batch), collate_crops([crops[0]])["global_waveforms"])


@pytest.mark.parametrize("peak", [1.0, 1.5, -1.0, -1.5, 700.0])
def test_crops_beyond_full_scale_are_not_clipped(peak):
    waveform = np.zeros(4000, np.float32)
    waveform[7] = peak
    quiet, loud = ({"array": array, "sampling_rate": 8000} for array in (np.zeros(4000, np.float32), waveform))
    crops = PretrainingCrops([quiet, loud], 8000, **SHORT, num_local_crops=0)
    batch = restored(collate_crops([crops[0], crops[1]], int16=True))
    assert batch[1, 0, 7].item() == peak
    assert batch[0].abs().max() == 0
