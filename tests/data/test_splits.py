from collections import Counter

import pytest
from datasets import Dataset

from asit_hf.data.datasets import load_audio_dataset
from asit_hf.data.labels import label_names
from asit_hf.data.splits import default_splits, find_group_column, group_ids, match_split, split_dataset, split_kind


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


def classes_of(side) -> set:
    return set(side["label"])


def test_a_group_column_that_cannot_hold_out_the_share_yields(caplog):
    """Two sources hold half of the rows each, and other classes; the recordings divide every class."""
    dataset = rows(
        200,
        label=[i // 100 * 5 + i % 5 for i in range(200)],
        source=["ab"[i // 100] for i in range(200)],
        recording=[f"r{i // 5}" for i in range(200)],
    )
    train, test = split_dataset(dataset, 0.1)
    assert (len(train), len(test)) == (180, 20)
    assert classes_of(train) == classes_of(test) == set(range(10))
    assert set(train["recording"]).isdisjoint(test["recording"])
    assert "100 of 200 rows (50%)" in caplog.text
    assert "--group_column source" in caplog.text
    caplog.clear()
    train, test = split_dataset(dataset.remove_columns("recording"), 0.1)
    assert (len(train), classes_of(test)) == (180, set(range(10)))
    caplog.clear()
    train, test = split_dataset(dataset, 0.1, group_column="source")  # named, and therefore kept
    assert set(train["source"]).isdisjoint(test["source"])
    assert all(part in caplog.text for part in ("'source'", "(50%)", "no training rows of 5 classes", "held-out"))


def test_fractions_between_groups_are_the_nearest(caplog):
    """Groups of 60, 30, 8 and 2 rows with the same classes."""
    sizes = {"a": 60, "b": 30, "c": 8, "d": 2}
    speakers = [name for name, size in sizes.items() for _ in range(size)]
    dataset = rows(100, label=[i % 2 for i in range(100)], speaker=speakers)
    assert set(split_dataset(dataset, 0.1)[1]["speaker"]) == {"c", "d"}
    assert set(split_dataset(dataset, 0.3)[1]["speaker"]) == {"b"}
    assert "not split" not in caplog.text


def test_classes_of_one_row_or_group_stay_in_training(caplog):
    labels = ["common"] * 40 + ["usual"] * 40 + ["rare"]
    for seed in range(5):
        train, test = split_dataset(rows(81, label=labels), 0.5, seed=seed)
        assert (classes_of(train), classes_of(test)) == ({"common", "usual", "rare"}, {"common", "usual"})
    assert "no held-out rows of 1 classes: rare" in caplog.text
    one_each = rows(12, label=[f"{i}" for i in range(12)])
    assert len(split_dataset(one_each, 0.25)[1]) == 3
    # one class in twenty is of one speaker
    dataset = rows(
        400, label=[i % 20 for i in range(400)], speaker=[-1 if i % 20 == 7 else i // 40 for i in range(400)]
    )
    caplog.clear()
    train, test = split_dataset(dataset, 0.2)
    assert set(train["speaker"]).isdisjoint(test["speaker"])
    assert classes_of(test) == set(range(20)) - {7}
    assert "no held-out rows of 1 classes: 7" in caplog.text


def test_rows_without_a_group_are_groups_of_their_own():
    dataset = rows(40, label=[i % 2 for i in range(40)], speaker=[None] * 30 + [f"s{i // 2}" for i in range(10)])
    assert len(split_dataset(dataset, 0.2)[1]) == 8


def test_numbers_are_no_classes(caplog):
    train, test = split_dataset(rows(40, label=[i / 7 for i in range(40)]), 0.25)
    assert (len(train), len(test)) == (30, 10)
    assert "classes" not in caplog.text


def test_groups_for_cross_validation(caplog):
    dataset = rows(60, label=[i // 30 for i in range(60)], source=["ab"[i // 30] for i in range(60)])
    assert find_group_column(dataset) is None  # each class has a source of its own
    assert "--group_column source" in caplog.text
    caplog.clear()
    assert find_group_column(dataset, "source") == "source"
    assert "in one group only: 0, 1" in caplog.text
    assert find_group_column(dataset, "") is None
    with pytest.raises(ValueError, match="who"):
        find_group_column(dataset, "who")
    assert find_group_column(rows(5, label=[0, 0, 1, 1, 2])) is None
    assert "one row cannot be both fitted and validated: 2" in caplog.text
    assert group_ids(rows(4, speaker=["b", None, "a", "b"]), "speaker") == [1, 2, 0, 1]
    dataset = dataset.add_column("fold", [i % 3 for i in range(60)])
    assert find_group_column(dataset) == "fold"
    assert find_group_column(rows(4, label=[0, 1, 0, 1], speaker=["a"] * 4)) is None


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("train", ["train", "Training", "TRAIN", "audio_train", "train_labels", "train-set"]),
        ("validation", ["val", "valid", "Validation", "dev", "dev_audio"]),
        ("test", ["test", "testing", "eval", "Evaluation", "metadata_test"]),
        (None, ["dog", "train_station", "tested", "audio", "contest", "", "training_dog", "train_test"]),
    ],
)
def test_names_of_splits(kind, names):
    assert [split_kind(name) for name in names] == [kind] * len(names)


def test_splits_are_found_by_other_names():
    assert match_split("train", ["Training", "test"]) == "Training"
    assert match_split("TEST", ["test", "eval"]) == "test"
    assert match_split("validation", ["val", "dev"]) is None
    assert match_split("dog", ["train", "test"]) is None
    found = default_splits(["training", "dev", "Test"], "DIR")
    assert found == {"train": "training", "validation": "dev", "test": "Test"}
    for names, words in ((["dev", "test"], "none for training"), (["train", "test", "eval"], "test, eval")):
        with pytest.raises(ValueError, match=f"DIR.*{words}"):
            default_splits(names, "DIR")


@pytest.mark.real_audio
def test_real_manifests(real_audio):
    esc = load_audio_dataset(real_audio / "esc50-16k" / "esc50.csv", root=real_audio / "esc50-16k" / "audio")
    assert (len(esc), len(label_names(esc))) == (1600, 50)
    train, test = split_dataset(esc, 0.25)
    assert set(train["src_file"]).isdisjoint(test["src_file"])
    assert min(Counter(test["label"]).values()) >= 6
    speakers = load_audio_dataset(real_audio / "asc-16k" / "speaker_id.csv", split="test", label_column="speaker")
    assert len(label_names(speakers)) == 24
