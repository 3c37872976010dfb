import pytest
from datasets import Dataset

from asit_hf.data.datasets import load_audio_dataset
from asit_hf.data.filters import filter_rows


def file_names(dataset):
    return [row["path"].rsplit("/", 1)[-1] for row in dataset["audio"]]


@pytest.fixture(scope="module")
def filterable():
    columns = {
        "audio": [f"{row}.wav" for row in range(5)],
        "label": ["Male speech, man speaking", "dog", "cat", "dog", None],
        "tags": [["a", "b"], ["b"], [], ["c, d"], None],
        "fold": [1.0, 2.0, 2.0, 10.0, None],
        "level": [0.5, 1.0, 2.0, 0.25, 3.0],
        "speaker": ["007", "7", "08", "x y", "true"],
        "clean": [True, False, True, None, False],
        "calls": ["['song', 'call']", "[]", "['call']", None, "song"],
    }
    return load_audio_dataset(Dataset.from_dict(columns))


@pytest.mark.parametrize(
    ("filters", "rows"),
    [
        (["fold=1, 2"], [0, 1, 2]),
        (["fold = 1 ,10.0"], [0, 3]),
        (["fold=02,1"], [0]),
        (["level=.5,1"], [0, 1]),
        (["level=5e-1"], [0]),
        (["speaker=007"], [0]),
        (["speaker=7"], [1]),
        (["speaker=x y, 08"], [2, 3]),
        (["clean=true"], [0, 2]),
        (["speaker=true"], [4]),
        (["label=Male speech, man speaking"], [0]),
        (['label="Male speech, man speaking", dog'], [0, 1, 3]),
        (["label=cat,Male speech,man speaking"], [0, 2]),
        (["tags=b"], [0, 1]),
        (["tags=c, d,a"], [0, 3]),
        (["label=dog", "fold=2"], [1]),
        (["calls=call"], [0, 2]),
        (["calls=song"], [0, 4]),
        (["calls=[]"], [1]),
    ],
)
def test_filters(filterable, filters, rows):
    assert file_names(filter_rows(filterable, filters)) == [f"{row}.wav" for row in rows]


def test_filters_of_streams(filterable):
    stream = filterable.to_iterable_dataset()
    kept = [
        row["audio"]["path"] for row in filter_rows(stream, ['label="Male speech, man speaking",dog', "fold=1, 2"])
    ]
    assert kept == ["0.wav", "1.wav"]
    assert [row["fold"] for row in filter_rows(stream, ["label=Male speech, man speaking"])] == [1.0]


def test_values_that_no_row_has_are_reported(filterable, caplog):
    assert len(filter_rows(filterable, ["fold=1,3"], "t.csv")) == 1
    assert all(word in caplog.text for word in ["t.csv", "fold 3", "1, 10, 2"])
    for filters in (["fold=3"], ["label=wolf, bear"], ["fold=1", "label=cat"]):
        with pytest.raises(ValueError) as error:
            filter_rows(filterable, filters, "t.csv")
        assert all(word in str(error.value) for word in ["t.csv", *filters])
