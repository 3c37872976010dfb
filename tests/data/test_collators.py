import numpy as np
import pytest
import torch

from asit_hf.data.collators import ClassificationCollator, collate_crops
from asit_hf.data.crops import PretrainingCrops


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
    with pytest.raises(ValueError, match="num_labels is needed for single_label_classification"):
        ClassificationCollator(Frames())


def test_clips_that_could_not_be_read_are_left_out_with_a_warning(caplog):
    bad = {"label": 1, "index": 9, "bad_files": [("gone.wav", "no such file")]}
    batch = ClassificationCollator(Frames(), 3)([bad, *items(2, 0)])
    assert batch["labels"].tolist() == [2, 0]
    assert len(batch["input_values"]) == 2
    assert "left out gone.wav: no such file" in caplog.text
    with pytest.raises(ValueError, match=r"none of the 1 clips of this batch can be read: .*gone\.wav"):
        ClassificationCollator(Frames(), 3)([bad])


@pytest.mark.parametrize("num_local_crops", [0, 3])
def test_collate_crops(num_local_crops, tmp_path):
    clip = {"array": np.linspace(-1, 1, 8000), "sampling_rate": 8000}
    missing = str(tmp_path / "gone.wav")
    crops = PretrainingCrops([clip, missing, clip], 8000, 0.5, 2, 0.2, num_local_crops)
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


def test_crops_as_16_bits_are_rounded_to_the_nearest_step():
    generator = np.random.default_rng(0)
    clips = [{"array": generator.uniform(-0.99, 0.99, 8000), "sampling_rate": 8000} for _ in range(3)]
    crops = PretrainingCrops(clips, 8000, 0.5, 2, 0.2, 3)
    items = [crops[index] for index in range(3)]
    plain, batch = collate_crops(items), collate_crops(items, int16=True)
    assert batch.keys() == plain.keys()
    for name in ("global_waveforms", "local_waveforms"):
        assert batch[name].dtype == torch.int16
        assert (batch[name].float() * 2**-15 - plain[name]).abs().max() <= 2**-16
    assert torch.equal(batch["global_lengths"], plain["global_lengths"])


@pytest.mark.parametrize("peak", [32767 / 32768, 1.0, 1.5, -1.0, -1.5])
def test_crops_beyond_full_scale_are_not_clipped(peak):
    waveform = np.zeros(4000, np.float32)
    waveform[7] = peak
    quiet, loud = ({"array": array, "sampling_rate": 8000} for array in (np.zeros(4000, np.float32), waveform))
    crops = PretrainingCrops([quiet, loud], 8000, 0.5, 2, 0.2, 0)
    batch = collate_crops([crops[0], crops[1]], int16=True)["global_waveforms"]
    assert batch.dtype == (torch.int16 if peak in (32767 / 32768, -1.0) else torch.float32)
    scale = 2**-15 if batch.dtype == torch.int16 else 1
    assert batch[1, 0, 7].item() * scale == peak
