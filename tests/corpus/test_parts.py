import os
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from asit_hf.corpus.engine import Task
from asit_hf.corpus.parts import (
    SETTINGS_NAME,
    Parts,
    default_part_clips,
    one_file,
    parts_folder,
    process_share,
    share_out,
)

SETTINGS = {"model": "a", "part_clips": 2}


class Lines:
    suffix = ".txt"

    @contextmanager
    def open(self, path):
        with path.open("w") as file:
            yield file

    def join(self, parts, path):
        path.write_text("".join(part.read_text() for part in parts))


def listed(num_clips):
    return SimpleNamespace(num_clips=num_clips, num_shards=1)


def write(parts, number, text):
    with parts.open(0, number) as file:
        file.write(text)


def fail_in_part(parts):
    with parts.open(0, 0) as file:
        file.write("zero")
        assert list(parts.done()) == [(0, 1)]
        raise KeyError


def fail_after_one_part(path):
    with one_file(path, Lines(), SETTINGS) as parts:
        parts.start(SETTINGS)
        write(parts, 1, "one ")
        raise KeyError


def test_a_part_is_whole_or_absent(tmp_path):
    parts = Parts(tmp_path / "parts", Lines())
    parts.start(SETTINGS)
    write(parts, 1, "one")
    with pytest.raises(KeyError):
        fail_in_part(parts)
    assert sorted(os.listdir(tmp_path / "parts")) == [".run.json", "part-00001.txt"]
    assert parts.done() == {(0, 1): tmp_path / "parts" / "part-00001.txt"}
    assert [task.first for task in share_out(listed(5), 2, done=parts.done())] == [0, 2]


def test_names_by_shard(tmp_path):
    parts = Parts(tmp_path / "parts", Lines(), by_shard=True)
    for number in ((2, 0), (0, 11), (0, 2)):
        with parts.open(*number):
            pass
    (tmp_path / "parts" / "part-00001.txt").touch()
    assert list(parts.done()) == [(0, 2), (0, 11), (2, 0)]
    assert parts.path(0, 11).name == "part-00000-00011.txt"


def test_a_folder_belongs_to_one_run(tmp_path):
    parts = Parts(tmp_path / "parts", Lines())
    parts.start(SETTINGS)
    parts.start(SETTINGS)
    with pytest.raises(ValueError, match="model 'a' instead of 'b'"):
        parts.start({**SETTINGS, "model": "b"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"notes\.txt"):
        Parts(tmp_path / "other", Lines()).start(SETTINGS)


def test_what_killed_processes_have_left_is_removed(tmp_path):
    parts = Parts(tmp_path, Lines())
    parts.start(SETTINGS)
    with parts.open(0, 0):
        (mine,) = tmp_path.glob(".*.unfinished")
        others = [
            mine.with_name(mine.name.replace(f"-{os.getpid()}.", f"-{pid}.")) for pid in (2**22 + 1, os.getppid())
        ]
        elsewhere = mine.with_name(f".part-00001.txt.elsewhere-{2**22 + 1}.unfinished")
        for path in (*others, elsewhere):
            path.touch()
        parts.start(SETTINGS)
        assert set(tmp_path.glob(".*.unfinished")) == {mine, others[1], elsewhere}


def test_one_file(tmp_path):
    path = tmp_path / "table.txt"
    path.write_text("old")
    with pytest.raises(KeyError):
        fail_after_one_part(path)
    assert path.read_text() == "old"
    with one_file(path, Lines(), SETTINGS) as parts:
        parts.start(SETTINGS)
        assert list(parts.done()) == [(0, 1)]
        write(parts, 0, "zero ")
    assert path.read_text() == "zero one "
    assert os.listdir(tmp_path) == ["table.txt"]


def test_two_runs_that_write_one_file(tmp_path):
    """The one that ends last does not replace a complete file by the parts that it alone has written."""
    path = tmp_path / "table.txt"

    def run(meanwhile):
        with one_file(path, Lines(), SETTINGS) as parts:
            parts.start(SETTINGS)
            write(parts, 0, "zero ")
            meanwhile()
            write(parts, 1, "one ")

    with pytest.raises(ValueError, match="part-00000"):
        run(lambda: run(lambda: None))
    assert path.read_text() == "zero one "


def test_one_file_after_a_kill_while_its_parts_were_removed(tmp_path):
    path = tmp_path / "table.txt"
    with pytest.raises(KeyError):
        fail_after_one_part(path)
    (parts_folder(path) / SETTINGS_NAME).unlink()
    with one_file(path, Lines(), SETTINGS) as parts:
        parts.start(SETTINGS)
        assert parts.done() == {}
        write(parts, 0, "zero")
    assert path.read_text() == "zero"
    assert os.listdir(tmp_path) == ["table.txt"]


def test_one_file_starts_anew_with_other_settings(tmp_path, caplog):
    path = tmp_path / "table.txt"
    with pytest.raises(KeyError):
        fail_after_one_part(path)
    assert parts_folder(path).is_dir()
    with one_file(path, Lines(), {**SETTINGS, "model": "b"}) as parts:
        parts.start({**SETTINGS, "model": "b"})
        assert parts.done() == {}
    assert "'a' instead of 'b'" in caplog.text


def test_share_of_processes(monkeypatch):
    assert process_share() == (0, 1)
    for rank, world_size, expected in (("1", "4", (1, 4)), ("0", "1", (0, 1))):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world_size)
        assert process_share() == expected
    for rank, world_size in (("4", "4"), ("-1", "2"), ("one", "2"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world_size)
        with pytest.raises(ValueError, match="WORLD_SIZE"):
            process_share()
    shares = [share_out(listed(11), 2, rank, 4) for rank in range(4)]
    assert [[task.first for task in tasks] for tasks in shares] == [[0, 4], [1, 5], [2], [3]]
    assert shares[0][1] == Task(0, 2, 4, 5)


@pytest.mark.parametrize(
    ("num_clips", "batch_size", "clips"),
    [(1, 8, 1), (100, 8, 1), (300, 8, 4), (1000, 8, 16), (10**6, 8, 1024), (10**6, 64, 1024), (None, 8, 256)],
)
def test_clips_in_a_part(num_clips, batch_size, clips):
    assert default_part_clips(listed(num_clips), batch_size) == clips
