import logging

import pytest
from datasets import Dataset
from sounds import embedded

from asit_hf.data.datasets import load_audio_dataset
from asit_hf.data.labels import divide_labels, encode_labels, find_lists, label_names


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


AUDIOSET = ["Speech", "Male speech, man speaking", "Inside, small room", "Inside, large room or hall"]
AUDIOSET += ["Inside, public space", "Outside, rural or natural", "Outside, urban or manmade", "Boat, Water vehicle"]
AUDIOSET += ["Livestock, farm animals, working animals", "Roaring cats (lions, tigers)", "Music"]
# leaf classes occur only with their parents
FSD50K = ["Accordion,Keyboard_(musical),Musical_instrument,Music", "Bark,Dog,Animal", "Meow,Cat,Animal"]
FSD50K += ["Guitar,Plucked_string_instrument,Musical_instrument,Music"]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["dog", "cat"], {}),
        (["Speech,Music", "Speech", "Music"], {"Speech,Music": ["Speech", "Music"]}),
        (["Speech, Music", "Speech", "Music"], {"Speech, Music": ["Speech", "Music"]}),
        (["a|b", "c ; d", "e;e;"], {"a|b": ["a", "b"], "c ; d": ["c", "d"], "e;e;": ["e"]}),
        (["/m/09x0r,/t/dd00088", "/m/04rlf"], {"/m/09x0r,/t/dd00088": ["/m/09x0r", "/t/dd00088"]}),
        (["3,17", "17", "3"], {"3,17": ["3", "17"]}),
        (AUDIOSET, {}),
        (AUDIOSET[2:5], {}),
        (["Dog, barking", "Dog, growling", "Dog"], {}),
        (FSD50K, {text: text.split(",") for text in FSD50K}),
        (
            [*AUDIOSET, "Speech, Music", "Music,Inside, small room", "Boat, Water vehicle, Male speech, man speaking"],
            {
                "Speech, Music": ["Speech", "Music"],
                "Music,Inside, small room": ["Music", "Inside, small room"],
                "Boat, Water vehicle, Male speech, man speaking": ["Boat, Water vehicle", "Male speech, man speaking"],
            },
        ),
        (
            ["Speech,Male speech, man speaking", "Music,Speech"],
            {
                "Speech,Male speech, man speaking": ["Speech", "Male speech, man speaking"],
                "Music,Speech": ["Music", "Speech"],
            },
        ),
        (
            ["Guitar,Music", "Bass,Guitar,Music", "Speech", "Speech,Guitar,Music"],
            {
                "Guitar,Music": ["Guitar", "Music"],
                "Bass,Guitar,Music": ["Bass", "Guitar", "Music"],
                "Speech,Guitar,Music": ["Speech", "Guitar", "Music"],
            },
        ),
    ],
)  # fmt: skip
def test_texts_that_are_lists(texts, expected):
    assert find_lists(texts) == expected
    assert find_lists(reversed(texts)) == expected


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("['dog', 'cat']", ["dog", "cat"]),
        ('["dog", "cat"]', ["dog", "cat"]),
        ("['dog' 'cat']", ["dog", "cat"]),
        ("['dog'\n 'cat']", ["dog", "cat"]),
        ("('dog', 'cat')", ["dog", "cat"]),
        ("('dog',)", ["dog"]),
        ("{'dog'}", ["dog"]),
        ("[np.str_('dog'), np.str_('cat')]", ["dog", "cat"]),
        ("['Male speech, man speaking', \"cat's\"]", ["Male speech, man speaking", "cat's"]),
        (r"['cat\'s']", ["cat's"]),
        ("[1, 22]", ["1", "22"]),
        ("[ 1 22]", ["1", "22"]),
        ("[]", []),
    ],
)
def test_written_lists(text, items):
    assert find_lists([text, "other"]) == {text: items}


def test_brackets_without_quotes():
    assert find_lists(["['two\nlines']"]) == {}
    assert find_lists(["[dog, cat]", "[dog]"]) == {"[dog, cat]": ["dog", "cat"], "[dog]": ["dog"]}
    assert find_lists(["[noise]", "[laughter]", "(cough)"]) == {}


def test_known_names_decide():
    names = ["dog", "cat", "Male speech, man speaking", "a;b"]
    texts = ["dog,cat", "dog, Male speech, man speaking", "Male speech, man speaking", "a;b", "dog, wolf", "fox, bear"]
    assert find_lists(texts, names) == {
        "dog,cat": ["dog", "cat"],
        "dog, Male speech, man speaking": ["dog", "Male speech, man speaking"],
    }


def labelled(labels):
    return Dataset.from_dict({"audio": [f"{row}.wav" for row in range(len(labels))], "label": labels})


def test_cells_become_lists_with_a_report(caplog):
    dataset = divide_labels(labelled(["dog,cat", " dog", None, "cat"]), source="t.csv")
    assert dataset["label"][:] == [["dog", "cat"], ["dog"], [], ["cat"]]
    assert all(word in caplog.text for word in ["1 of 4", "t.csv", "'dog,cat'", "1 are empty", "label_separator"])


def test_a_separator_that_is_given(caplog):
    cells = ["dog,cat", "dog + cat", "a;b"]
    assert divide_labels(labelled(cells), separator="none")["label"][:] == cells
    assert divide_labels(labelled(cells), separator="+")["label"][:] == [["dog,cat"], ["dog", "cat"], ["a;b"]]
    assert divide_labels(labelled(cells), separator=",")["label"][:] == [["dog", "cat"], ["dog + cat"], ["a;b"]]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert divide_labels(labelled([1, 2, 3]))["label"][:] == [1, 2, 3]


def test_a_separator_after_single_labels_makes_no_lists(caplog):
    def divide(*cells, separator=None):
        return divide_labels(
            Dataset.from_dict({"audio": [""] * len(cells), "label": list(cells)}), separator=separator
        )

    assert divide("dog;", "cat", ";cat; ", None, ";")["label"][:] == ["dog", "cat", "cat", None, None]
    assert "'dog;'" in caplog.text
    assert divide("dog/", "cat", separator="/")["label"][:] == ["dog", "cat"]
    assert divide("dog;", "cat", "cat;dog")["label"][:] == [["dog"], ["cat"], ["cat", "dog"]]
    assert divide("['dog']", "[]")["label"][:] == [["dog"], []]


def test_spaces_and_missing_labels():
    dataset = encode_labels(labelled([" dog", "dog ", "", None, "cat"]))
    assert (label_names(dataset), dataset["label"][:]) == (["cat", "dog"], [1, 1, None, None, 0])
    lists = encode_labels(labelled([["dog ", "dog", None], []]))
    assert (label_names(lists), lists["label"][:]) == (["dog"], [[0], []])


def test_whole_numbers_are_classes(caplog):
    dataset = encode_labels(labelled([10.0, 9.0, None, float("nan")]))
    assert (label_names(dataset), dataset["label"][:]) == (["9", "10"], [1, 0, None, None])
    assert "9, 10" in caplog.text
    assert "regression" in caplog.text
    assert encode_labels(labelled([10.0, 9.0]), ["9", "10", "11"])["label"][:] == [1, 0]
    assert encode_labels(labelled([1.0, 0.5]))["label"][:] == [1.0, 0.5]


def test_classes_that_differ_in_case_are_reported(caplog):
    assert label_names(encode_labels(labelled(["Dog", "dog", "cat"]))) == ["Dog", "cat", "dog"]
    assert "Dog, dog" in caplog.text
    assert "cat" not in caplog.text
