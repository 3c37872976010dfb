import pytest

from asit_hf.data.files import resolve_paths


def place(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def resolved(root, *names):
    return [path.removeprefix(f"{root}/") for path in resolve_paths(names, root, "t.csv")]


def test_files_that_are_there_and_urls_stay(tmp_path, caplog):
    place(tmp_path, "a.wav", "x/b.flac")
    names = ["a.wav", "x/b.flac", "hf://set/c.wav", str(tmp_path / "a.wav")]
    assert resolved(tmp_path, *names) == ["a.wav", "x/b.flac", "hf://set/c.wav", "a.wav"]
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("64760", "64760.wav"),
        (64760, "64760.wav"),
        (64760.0, "64760.wav"),
        ("Y1_30.000", "Y1_30.000.flac"),
        ("101-2.wav", "fold1/101-2.wav"),
        ("fold1\\101-2.wav", "fold1/101-2.wav"),
        ("C:\\sounds\\fold1\\101-2.wav", "fold1/101-2.wav"),
        ("/home/me/sounds/b.wav", "b.wav"),
        ("dev/64760", "audio/dev/64760.ogg"),
        ("clip.wav", "clip.flac"),
        ("caf\u00e9.wav", "cafe\u0301.wav"),
    ],
)
def test_files_are_found_below_the_root(tmp_path, caplog, name, file):
    place(tmp_path, "other.wav", "other/notes.txt", file)
    assert resolved(tmp_path, "other.wav", name) == ["other.wav", file]
    assert "1 of 2 files of t.csv" in caplog.text
    assert file in caplog.text


def test_files_of_the_same_name_are_told_apart_by_their_folders(tmp_path):
    place(tmp_path, "audio/id1/v/1.wav", "audio/id2/v/1.wav", "audio/id3/w/1.wav")
    assert resolved(tmp_path, "id1/v/1.wav", "id2/v/1") == ["audio/id1/v/1.wav", "audio/id2/v/1.wav"]
    with pytest.raises(FileNotFoundError, match=r"none of the 1 files of t\.csv .*1\.wav.* root"):
        resolved(tmp_path, "1.wav")


def test_no_row_gets_the_file_of_another(tmp_path):
    place(tmp_path, "id1/v/1.wav", "z.wav")
    assert resolved(tmp_path, "id1/v/1.wav", "id2/v/1.wav") == ["id1/v/1.wav", "id2/v/1.wav"]  # which is missing
    assert resolved(tmp_path, "z.wav", "a/id3/v/1.wav", "a/id2/v/1.wav")[1:] == ["a/id3/v/1.wav", "a/id2/v/1.wav"]
    assert resolved(tmp_path, "z", "z.wav") == ["z.wav", "z.wav"]  # one file with two names


@pytest.mark.parametrize("value", [None, ["a.wav"], True, 1.5])
def test_a_row_without_a_name_is_an_error(tmp_path, value):
    with pytest.raises(ValueError, match=r"row 1 of t\.csv"):
        resolve_paths(["a.wav", value], tmp_path, "t.csv")


@pytest.mark.parametrize(("name", "folder"), [("1.wav", "audio"), ("audio/1.wav", "")])
def test_a_folder_beside_the_table_is_named(tmp_path, name, folder):
    (tmp_path / "meta").mkdir()
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "1.wav").write_bytes(b"")
    with pytest.raises(FileNotFoundError) as error:
        resolve_paths([name], tmp_path / "meta", "t.csv")
    assert str(error.value).endswith(f"set root to {tmp_path / folder}")
