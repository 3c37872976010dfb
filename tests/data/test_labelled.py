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
