"""`pad` and what relies on it, compared with the feature extractors of Transformers."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from tiny import build
from transformers import BatchFeature, DataCollatorWithPadding, SequenceFeatureExtractor, Trainer, TrainingArguments

from asit_hf import ASiTFeatureExtractor, ASiTForAudioClassification

CONVERSIONS = (
    lambda array: array,
    lambda array: array.astype(np.float16),
    lambda array: array.tolist(),
    lambda array: tuple(array.tolist()),
    lambda array: torch.from_numpy(array),
    lambda array: torch.from_numpy(array).float(),
    lambda array: [torch.from_numpy(row).float() for row in array] if array.ndim > 1 else array,
)
LABELS = (None, 2, 0.25, [0.0, 1.0], torch.tensor([1, 0]), np.float64(0.5))
# each with few enough values that 300 draws contain most pairs
OPTIONS = {
    "padding": (True, "longest", "max_length", False, "do_not_pad"),
    "max_length": (None, 2, 6, 10),
    "truncation": (False, False, True),
    "pad_to_multiple_of": (None, None, 3, 8),
    "return_attention_mask": (None, True, False),
    "return_tensors": (None, "np", "pt"),
}


def draw(generator: np.random.Generator) -> tuple[ASiTFeatureExtractor, object, dict]:
    """A feature extractor, features of one to three clips, and options of `pad`."""

    def one_of(values):
        return values[generator.integers(len(values))]

    options = {name: one_of(values) for name, values in OPTIONS.items()}
    extractor = ASiTFeatureExtractor(
        feature_size=one_of([1, 4]),
        num_mel_bins=4,
        padding_value=one_of([0.0, -1.5]),
        return_attention_mask=one_of([True, False]),
    )
    if options["return_attention_mask"] is None and not extractor.return_attention_mask:
        options["return_attention_mask"] = False
    lengths = [one_of([1, 5, 5, 12]) for _ in range(generator.integers(1, 4))]
    convert, label, has_mask = one_of(CONVERSIONS), one_of(LABELS), one_of([True, False])
    clips = []
    for length in lengths:
        shape = (length, 4) if extractor.feature_size > 1 else (length,)
        clip = {"input_values": convert(generator.standard_normal(shape))}
        # the inherited method leaves the masks that it was not asked for as they are
        if has_mask and options["return_attention_mask"] is not False:
            clip["attention_mask"] = (np.arange(length) < length - 1).astype(one_of([np.int32, np.int64]))
        if label is not None:
            clip["labels"] = label
        clips.append(clip)
    if one_of([True, False]):
        return extractor, [one_of([dict, BatchFeature])(clip) for clip in clips], options
    return extractor, {name: [clip[name] for clip in clips] for name in clips[0]}, options


def outcome(pad, features: object, options: dict) -> dict | None:
    try:
        return dict(pad(deepcopy(features), **options))
    except (ValueError, TypeError):
        return None


def assert_same(ours: object, theirs: object) -> None:
    assert type(ours) is type(theirs)
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    for one, other in zip(ours, theirs) if ours.dtype == object else [(ours, theirs)]:
        np.testing.assert_array_equal(one, other)


@pytest.mark.skipif(not issubclass(ASiTFeatureExtractor, SequenceFeatureExtractor), reason="it pads waveforms")
def test_pad_equals_that_of_transformers():
    generator, padded = np.random.default_rng(0), 0
    for _ in range(300):
        extractor, features, options = draw(generator)
        inherited = outcome(super(ASiTFeatureExtractor, extractor).pad, features, options)
        ours = outcome(extractor.pad, features, options)
        assert (ours is None) == (inherited is None), (features, options)
        if ours is not None:
            assert ours.keys() == inherited.keys()
            for name in ours:
                assert_same(ours[name], inherited[name])
            padded += 1
    assert padded > 100


def test_pad_gives_what_a_call_gives():
    extractor, generator = ASiTFeatureExtractor(num_mel_bins=32, padding_value=-3.0), np.random.default_rng(0)
    waveforms = [generator.standard_normal(samples).astype(np.float32) for samples in (4000, 1600, 2000)]
    clips = [{name: value[0] for name, value in extractor(one, 16000).items()} for one in waveforms]
    for options in ({}, {"padding": "max_length", "max_length": 30}, {"pad_to_multiple_of": 16}):
        together = extractor(waveforms, 16000, return_tensors="pt", **options)
        padded = extractor.pad(clips, return_tensors="pt", **options)
        assert padded.keys() == together.keys()
        for name in padded:
            assert torch.equal(padded[name], together[name])


def test_pad_keeps_the_type_of_its_features_and_changes_none():
    extractor = ASiTFeatureExtractor(num_mel_bins=4)
    features = {"input_values": [torch.zeros(3, 4, requires_grad=True), torch.zeros(1, 4)]}
    before = list(features["input_values"])
    padded = extractor.pad(features)
    assert all(one is other for one, other in zip(features["input_values"], before))
    assert isinstance(padded["input_values"], torch.Tensor)
    assert not padded["input_values"].requires_grad
    assert isinstance(extractor.pad({"input_values": [np.zeros((2, 4))]})["input_values"], np.ndarray)
    read_only = np.zeros((2, 4), ">f4")
    read_only.flags.writeable = False
    assert extractor.pad([{"input_values": read_only}], return_tensors="pt")["input_values"].shape == (1, 2, 4)


@pytest.mark.parametrize(
    ("features", "named"),
    [
        ([{"values": np.zeros((2, 4))}], "input_values.*values"),
        ([], "input_values"),
        ([{"input_values": np.zeros((1, 2, 4))}], r"\(frames, 4\).*\(1, 2, 4\)"),
        ({"input_values": np.zeros((2, 4))}, r"\(frames, 4\).*\(4,\)"),
        ({"input_values": [np.zeros((2, 4))], "labels": [1, 2]}, "labels.*2"),
        ([{"input_values": np.zeros((2, 4)), "file": "rain.wav"}], "file"),
    ],
)
def test_pad_names_what_is_wrong(features, named):
    with pytest.raises(ValueError, match=named):
        ASiTFeatureExtractor(num_mel_bins=4).pad(features)


def test_trainer_and_its_collator_pad_clips_of_different_lengths(tmp_path):
    extractor = ASiTFeatureExtractor(num_mel_bins=32, padding_value=-3.0)
    clips = [{"input_values": torch.randn(frames, 32), "label": index} for index, frames in enumerate((40, 96, 64))]
    expected = extractor.pad([{"input_values": clip["input_values"]} for clip in clips])
    trainer = Trainer(
        build(ASiTForAudioClassification),
        TrainingArguments(str(tmp_path), per_device_train_batch_size=3, use_cpu=True, report_to="none"),
        train_dataset=clips,
        processing_class=extractor,
    )
    for collator in (trainer.data_collator, DataCollatorWithPadding(extractor)):
        batch = collator(clips)
        assert torch.equal(batch["input_values"], expected["input_values"])
        assert batch["attention_mask"].sum(1).tolist() == [40, 96, 64]
        assert batch["labels"].tolist() == [0, 1, 2]
    assert next(iter(trainer.get_train_dataloader()))["input_values"].shape == (3, 96, 32)
