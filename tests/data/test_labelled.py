import pytest
from sounds import write_csv

from asit_hf.data import AudioReadError, label_names
from asit_hf.data.labelled import DatasetArguments, check_classes, load_labelled, problem_type_of, readable_rows


def test_folders_and_manifests_are_filtered_and_encoded(folder):
    dataset = load_labelled(folder)
    assert (label_names(dataset), dataset["label"][:]) == (["bird", "dog", "rain"], [0, 0, 1, 1, 2])
    rows = [
        {"file": "bird/a.wav", "kind": "a"},
        {"file": "dog/a.flac", "kind": "b"},
        {"file": "rain/r.wav", "kind": "c"},
    ]
    table = write_csv(folder / "table.csv", rows)
    kept = load_labelled(table, ["kind=a,c"], label_column="kind")
    assert (label_names(kept), kept["label"][:]) == (["a", "c"], [0, 1])
    assert problem_type_of(kept) == "single_label_classification"
    assert load_labelled(table, ["kind=a,c"], ["c", "b", "a"], label_column="kind")["label"][:] == [2, 0]
    with pytest.raises(ValueError, match=r"no row of .*table\.csv has the label d"):
        load_labelled(table, ["kind=d"], label_column="kind")
    (folder / "class.csv").write_text("file,class,label_2\nbird/a.wav,a,x\ndog/a.flac,b,x\n")
    for options in ({}, {"label_column": "class"}):  # found by default, or named
        assert label_names(load_labelled(folder / "class.csv", ["class=b"], **options)) == ["b"]
    with pytest.raises(ValueError, match="columns .*label.*class.*got 'category=b'"):
        load_labelled(folder / "class.csv", ["category=b"])
    with pytest.raises(ValueError, match="expected a label column in .*got file, kind|audio, kind"):
        load_labelled(table)


def test_unreadable_files_are_reported_counted_and_skipped(folder, caplog):
    (folder / "dog" / "a.flac").write_bytes(b"no audio")
    assert len(load_labelled(folder)) == 4
    assert "a.flac: Format not recognised" in caplog.text
    assert "1 of 5 files" in caplog.text
    assert len(load_labelled(folder, check_files=False)) == 5
    with pytest.raises(AudioReadError, match=r"a\.flac"):
        load_labelled(folder, strict=True)
    with pytest.raises(ValueError, match=r"none of the 1 files .*gone\.wav"):
        readable_rows([str(folder / "gone.wav")])


def test_options_of_scripts(folder):
    options = DatasetArguments()
    assert options.load(folder, ["label=dog"])["label"][:] == [0, 0]
    assert "label" not in options.load_audio(folder).column_names
    table = write_csv(folder / "table.csv", [{"file": "bird/a.wav", "kind": "a"}, {"file": "dog/a.flac", "kind": "b"}])
    assert len(DatasetArguments(label_column="kind").load_audio(table, ["kind=b"])) == 1
    assert len(list(options.load_audio(folder, streaming=True))) == 5
    with pytest.raises(ValueError, match="audio_column cannot be used with the corpus esc50"):
        DatasetArguments(corpus="esc50", audio_column="clip").load_audio(folder)


def test_one_class_teaches_nothing(folder):
    check_classes(load_labelled(folder), folder)
    with pytest.raises(ValueError, match="2, all of 'dog'"):
        check_classes(load_labelled(folder, ["label=dog"]), folder)


def table(folder, labels, name="t.csv"):
    files = ["bird/a.wav", "bird/b.wav", "dog/a.flac", "rain/r.wav"]
    return write_csv(folder / name, [{"file": file, "label": label} for file, label in zip(files, labels)])


def test_whole_numbers_are_classes_or_targets(folder):
    for labels in (["1.0", "0.0", "1.0"], ["1", "0", "1"]):
        path = table(folder, labels)
        assert problem_type_of(load_labelled(path)) == "single_label_classification"
        assert label_names(load_labelled(path)) == ["0", "1"]
        numbers = load_labelled(path, ["label=1"], problem_type="regression")
        assert (problem_type_of(numbers), numbers["label"][:]) == ("regression", [1.0, 1.0])
    for labels in (["1", "x"], ["1;2", "2"]):
        with pytest.raises(ValueError, match="expected one number .* of each clip"):
            load_labelled(table(folder, labels), problem_type="regression")


@pytest.mark.parametrize("labels", [["x", "", "y", ""], ["0.5", "1", "", ""], ["1", "", "2", "3"]])
def test_missing_labels_are_named(folder, labels):
    first = labels.index("")
    with pytest.raises(ValueError) as error:
        load_labelled(table(folder, labels), names=["1", "2", "3"] if "2" in labels else None)
    words = [f"{labels.count('')} of 4", "t.csv", f"row {first}", ["bird/a.wav", "bird/b.wav", "dog/a.flac"][first]]
    assert all(word in str(error.value) for word in words)


def test_training_classes_decide_for_evaluation_data(folder):
    train = load_labelled(table(folder, ["dog,Male speech, man speaking", "dog", "Male speech, man speaking"]))
    names = label_names(train)
    assert names == ["Male speech, man speaking", "dog"]
    like = {"names": names, "problem_type": problem_type_of(train)}
    lists = load_labelled(
        table(folder, ["Male speech, man speaking", "dog, Male speech, man speaking"], "a.csv"), **like
    )
    assert lists["label"][:] == [[0], [1, 0]]
    single = load_labelled(table(folder, ["dog", "dog"], "b.csv"), **like)
    assert (problem_type_of(single), single["label"][:]) == ("multi_label_classification", [[1], [1]])
    like["problem_type"] = "single_label_classification"
    with pytest.raises(ValueError, match=r"expected one label .*a\.csv.*'dog', 'Male speech.*b\.wav"):
        load_labelled(folder / "a.csv", **like)


def test_evaluation_data_of_lists_may_have_no_labels(folder, caplog):
    (folder / "t.csv").write_text("file,label,split\nbird/a.wav,a;b,train\ndog/a.flac,,val\nrain/r.wav,,test\n"
                                  "bird/b.wav,b,test\n")  # fmt: skip
    like = {"names": ["a", "b"], "problem_type": "multi_label_classification"}
    for split, labels in (("val", [[]]), ("test", [[], [1]])):
        assert load_labelled(folder / "t.csv", split=split, **like)["label"][:] == labels
    assert "1 of 2 label cells" in caplog.text
    with pytest.raises(ValueError, match="1 of 2 rows"):
        load_labelled(folder / "t.csv", split="test", names=["a", "b"], problem_type="single_label_classification")


def test_rows_that_may_mean_something_else_are_reported(folder, caplog):
    table = folder / "t.csv"
    table.write_text("file,label\nbird/a.wav,cat\nbird/a.wav,NaN\ndog/a.flac,cat\ndog/a.flac,cat\n")
    assert len(load_labelled(table)) == 4
    assert "1 of 2 files" in caplog.text
    assert "NaN" in caplog.text
    table.write_text("file,dog,cat,length\nbird/a.wav,0,1,3\ndog/a.flac,1,0,1\n")
    with pytest.raises(ValueError, match="got audio, dog, cat, length.* a 1 in dog, cat, "):
        load_labelled(table)


def test_a_possible_separator_is_reported_if_lists_are_wanted(folder, caplog):
    path = table(folder, ["wind/rain", "dog", "fox,bear"])
    load_labelled(path)
    assert "separator" not in caplog.text
    load_labelled(path, problem_type="multi_label_classification")
    assert all(word in caplog.text for word in ["2 of 3", "label_separator", "t.csv"])
    assert DatasetArguments(label_separator="/").load(path)["label"][:] == [[3, 2], [0], [1]]


def test_predictions_are_read_as_labels(folder):
    rows = [
        {"file": "bird/a.wav", "label": "a, b;c", "prediction": "c"},
        {"file": "dog/a.flac", "label": "", "prediction": ""},
    ]
    dataset = load_labelled(write_csv(folder / "predictions.csv", rows))
    assert (label_names(dataset), dataset["label"][:]) == (["a, b", "c"], [[0, 1], []])
