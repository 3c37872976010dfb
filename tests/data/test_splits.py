from collections import Counter

import pytest
from datasets import Dataset

from asit_hf.data.datasets import load_audio_dataset
from asit_hf.data.labels import label_names
from asit_hf.data.splits import find_group_column, split_dataset


def rows(count: int, **columns) -> Dataset:
    return Dataset.from_dict({"audio": [f"{i}.wav" for i in range(count)], **columns})


def test_split_keeps_groups_on_one_side():
    speakers = [f"s{i // 20}" for i in range(200)]
    dataset = rows(200, label=[i % 4 for i in range(200)], speaker=speakers)
    assert find_group_column(dataset) == "speaker"
    train, test = split_dataset(dataset, 0.3, seed=1)
    assert (len(train), len(test)) == (140, 60)
    assert set(train["speaker"]).isdisjoint(test["speaker"])
    again = split_dataset(dataset, 0.3, seed=1)[1]
    other = split_dataset(dataset, 0.3, seed=2)[1]
    assert again["audio"][:] == test["audio"][:] != other["audio"][:]


def test_split_is_stratified_with_and_without_groups():
    labels = [i % 5 for i in range(100)]
    sources = [f"{i % 5}-{i // 10}" for i in range(100)]
    for options in ({"group_column": "source"}, {"group_column": ""}):
        _, test = split_dataset(rows(100, label=labels, source=sources), 0.2, seed=3, **options)
        assert Counter(test["label"]) == dict.fromkeys(range(5), 4)


def test_small_classes_still_fill_the_test_side():
    train, test = split_dataset(rows(20, label=[i // 2 for i in range(20)]), 0.2)
    assert (len(train), len(test)) == (16, 4)
    assert max(Counter(test["label"]).values()) == 1


def test_split_of_several_labels_and_of_none():
    _, test = split_dataset(rows(40, label=[[i % 2, 2 + i % 4] for i in range(40)]), 0.25)
    assert Counter(label for labels in test["label"] for label in labels)[0] == 5
    assert len(split_dataset(rows(40), 0.25)[1]) == 10


def test_impossible_splits():
    with pytest.raises(ValueError, match="1 groups of column 'speaker'"):
        split_dataset(rows(4, speaker=["a"] * 4), 0.5, group_column="speaker")
    with pytest.raises(ValueError, match="got 'who'"):
        split_dataset(rows(4), 0.5, group_column="who")
    with pytest.raises(ValueError, match="between 0 and 1, got 1.5"):
        split_dataset(rows(4), 1.5)


@pytest.mark.real_audio
def test_real_manifests(real_audio):
    esc = load_audio_dataset(real_audio / "esc50-16k" / "esc50.csv", root=real_audio / "esc50-16k" / "audio")
    assert (len(esc), len(label_names(esc))) == (1600, 50)
    train, test = split_dataset(esc, 0.25)
    assert set(train["src_file"]).isdisjoint(test["src_file"])
    assert min(Counter(test["label"]).values()) >= 6
    speakers = load_audio_dataset(real_audio / "asc-16k" / "speaker_id.csv", split="test", label_column="speaker")
    assert len(label_names(speakers)) == 24
