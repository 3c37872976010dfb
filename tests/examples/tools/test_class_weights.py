import csv
from pathlib import Path

import pytest

from asit_hf.finetuning.sampling import class_weights
from examples.tools import class_weights as script


@pytest.fixture
def table(tmp_path) -> Path:
    """Four clips, of which only the labels can be read."""
    for name in "abcd":
        (tmp_path / f"{name}.wav").write_bytes(b"no audio")
    rows = ["a.wav,dog;rain,1,0.5", "b.wav,dog,1,1.5", "c.wav,dog,1,2.5", "d.wav,rain,2,3.5"]
    path = tmp_path / "table.csv"
    path.write_text("\n".join(["file,tags,fold,pitch", *rows]) + "\n")
    return path


def test_weights_of_a_manifest(table, tmp_path, capsys):
    options = ["--data", str(table), "--label_column", "tags"]
    rows = script.main(options)
    assert [(row["index"], row["label"], row["clips"]) for row in rows] == [(0, "dog", 3), (1, "rain", 2)]
    assert [row["weight"] for row in rows] == class_weights([[0, 1], [0], [0], [1]], 2).tolist()
    printed = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    script.main([*options, "--output", str(tmp_path / "out" / "weights.csv")])
    with open(tmp_path / "out" / "weights.csv", newline="") as file:
        assert list(csv.DictReader(file)) == printed
    assert [row["clips"] for row in script.main([*options, "--filter", "fold=1"])] == [3, 1]


def test_all_classes_of_a_corpus_count(tmp_path):
    (tmp_path / "wav" / "id1" / "v").mkdir(parents=True)
    (tmp_path / "wav" / "id1" / "v" / "1.wav").write_bytes(b"not read")
    (tmp_path / "iden_split.txt").write_text("1 id1/v/1.wav\n3 id2/v/1.wav\n")
    rows = script.main(["--data", str(tmp_path), "--corpus", "voxceleb1", "--split", "train"])
    assert [(row["label"], row["clips"]) for row in rows] == [("id1", 1), ("id2", 0)]
    assert rows[1]["weight"] == pytest.approx(1000 / 0.01)


def test_wrong_requests(table):
    with pytest.raises(ValueError, match="expected classes as labels"):
        script.main(["--data", str(table), "--label_column", "pitch"])
    with pytest.raises(SystemExit):
        script.main(["--data", str(table), "--label_column", "tags", "--strict"])
