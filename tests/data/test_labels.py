import pytest
from sounds import embedded

from asit_hf.data.datasets import load_audio_dataset
from asit_hf.data.labels import encode_labels, label_names


def test_encode_labels_against_a_models_names(folder):
    dataset = embedded(folder)
    encoded = encode_labels(dataset, ["rain", "dog", "bird", "cat"])
    assert encoded["label"][:] == [2, 2, 1, 1, 0]
    assert label_names(encoded) == ["rain", "dog", "bird", "cat"]
    # From one set of names to another.
    assert encode_labels(encoded, ["bird", "dog", "rain"])["label"][:] == [0, 0, 1, 1, 2]
    integers = dataset.remove_columns("label").add_column("label", [7, 7, 30, 30, 4])
    assert label_names(encode_labels(integers)) == ["4", "7", "30"]
    assert encode_labels(integers, ["30", "7", "4"])["label"][:] == [1, 1, 0, 0, 2]


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_label_is_named_with_its_place(folder, stream):
    dataset = embedded(folder)
    place = "r.wav" if stream else r"row 4 \(r\.wav\)"
    with pytest.raises(ValueError, match=f"expected a label among bird, dog; got 'rain' in .*{place}"):
        list(encode_labels(dataset.to_iterable_dataset() if stream else dataset, ["bird", "dog"]))


def test_encoding_needs_labels_and_a_stream_needs_names(folder):
    with pytest.raises(ValueError, match="expected names"):
        encode_labels(embedded(folder).to_iterable_dataset())
    with pytest.raises(ValueError, match=r"expected a label column, got \['audio'\]"):
        encode_labels(load_audio_dataset(folder))
    with pytest.raises(ValueError, match=r"expected a label column with class names.*\['audio'\]"):
        label_names(load_audio_dataset(folder))
