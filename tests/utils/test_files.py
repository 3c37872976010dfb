import os

import pytest

from asit_hf.utils.files import check_writable, whole_file, whole_folder


def test_a_file_replaces_the_earlier_one_when_complete(tmp_path):
    path = tmp_path / "new" / "values.json"
    for content in (b"first", b"second"):
        with whole_file(path) as unfinished:
            unfinished.write_bytes(content)
            assert not path.exists() or path.read_bytes() == b"first"
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("fails", ["writing", "fsync"])
def test_a_failed_file_leaves_the_earlier_one_and_nothing_else(tmp_path, monkeypatch, fails):
    path = tmp_path / "values.json"
    path.write_text("first")

    def disk_full(*arguments):
        raise OSError(28, "No space left on device")

    def write():
        with whole_file(path) as unfinished:
            unfinished.write_text("second")
            if fails == "writing":
                disk_full()

    if fails == "fsync":
        monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        write()
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_replaces_the_earlier_one_or_leaves_it(tmp_path):
    target = tmp_path / "new" / "encoder"

    def write(content, error=None):
        with whole_folder(target) as folder:
            folder.mkdir()
            (folder / content).write_text(content)
            if error is not None:
                raise error

    write("first")
    write("second")
    assert [path.name for path in target.iterdir()] == ["second"]
    with pytest.raises(KeyboardInterrupt):
        write("third", KeyboardInterrupt)
    assert [path.name for path in target.iterdir()] == ["second"]
    assert list(target.parent.iterdir()) == [target]


def test_a_path_is_checked_without_a_trace(tmp_path):
    path = tmp_path / "tables" / "table.csv"
    check_writable(path)
    assert list(path.parent.iterdir()) == []
    path.write_text("old")
    check_writable(path)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(IsADirectoryError, match="tables"):
        check_writable(path.parent)
    with pytest.raises(OSError, match=r"table\.csv"):
        check_writable(path / "below.csv")
