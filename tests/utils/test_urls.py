import multiprocessing

import fsspec
import numpy as np
import pytest
import soundfile
from loopback_files import serve

from asit_hf.data.audio import AudioReader, AudioReadError, read_audio
from asit_hf.utils.urls import is_url, join_url, list_url, open_url, split_url, url_path


@pytest.fixture
def memory():
    """A file system in memory, empty at the end."""
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


@pytest.mark.parametrize(
    ("folder", "name", "url"),
    [
        ("s3://bucket/clips", "rain/a.wav", "s3://bucket/clips/rain/a.wav"),
        ("s3://bucket/", "a.wav", "s3://bucket/a.wav"),
        ("zip://clips::s3://bucket/b.zip", "a.wav", "zip://clips/a.wav::s3://bucket/b.zip"),
        ("zip://::b.zip", "a.wav", "zip://a.wav::b.zip"),
        ("s3://bucket", "https://host/a.wav", "https://host/a.wav"),
    ],
)
def test_names_in_folders(folder, name, url):
    assert join_url(folder, name) == url
    assert split_url(url)[1] == "a.wav"
    assert join_url(*split_url(url)) == url


def test_paths_and_urls():
    assert [is_url(one) for one in ("memory://a", "zip://a::b", "/a/b", "C:\\a", "file:///a")] == [True] * 2 + [
        False
    ] * 3
    assert url_path("https://host/clips/a.wav?token=b/c.txt") == "/clips/a.wav"
    assert url_path("zip://clips/a.wav::s3://b.zip") == "clips/a.wav"
    assert url_path("clips/a?.wav") == "clips/a?.wav"


def test_listing(memory):
    for name in ("b.wav", "a/z.wav", "a-b.wav", ".hidden/c.wav", "a/.c.wav"):
        memory.pipe(f"/clips/{name}", b"1")
    assert list_url("memory://clips") == ["a/z.wav", "a-b.wav", "b.wav"]
    assert list_url("memory://clips/a/") == ["z.wav"]
    assert list_url("memory://clips/b.wav") is None


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("memory://nothing", FileNotFoundError, "memory://nothing"),
        ("http://127.0.0.1:9/a.wav", FileNotFoundError, "127.0.0.1:9"),
        ("nosuch://a", ValueError, "nosuch"),
        ("smb://host/a", ModuleNotFoundError, "smb"),
    ],
)
def test_what_cannot_be_listed_says_why(url, error, message):
    with pytest.raises(error, match=message):
        list_url(url)


def test_errors_of_a_protocol(memory, monkeypatch):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(type(memory), "info", refuse)
    for error, expected in (
        (PermissionError("403"), (PermissionError, "403.*credentials")),
        (RuntimeError("Unable to locate credentials"), (OSError, "locate credentials.*memory://a.wav")),
        (ConnectionError("no route"), (OSError, "no route.*network")),
    ):
        with pytest.raises(expected[0], match=expected[1]):
            open_url("memory://a.wav")
        with pytest.raises(AudioReadError, match=str(error)):
            read_audio("memory://a.wav", 8000)


@pytest.fixture(scope="module")
def long_file(tmp_path_factory):
    """A wav of 600 s, 19 MB."""
    path = tmp_path_factory.mktemp("long") / "long.wav"
    soundfile.write(path, np.arange(9_600_000, dtype=np.int32).astype(np.int16), 16000)
    return path


@pytest.mark.parametrize("with_blocks", [True, False])
def test_a_window_of_a_long_remote_file(long_file, with_blocks):
    expected = read_audio(long_file, 16000, 300.0, 1.0)
    with serve(long_file.parent, with_blocks) as server, AudioReader(f"{server.url}/long.wav") as reader:
        assert reader.info.num_samples == 9_600_000
        np.testing.assert_array_equal(reader.read(16000, 4_800_000, 16000), expected)
        assert (server.sent < 14_000_000) == with_blocks  # blocks of 4 MiB: first, middle and last


def test_a_long_remote_file_in_another_format(tmp_path, monkeypatch):
    monkeypatch.setattr("asit_hf.utils.urls._WHOLE", 0)
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 8000)
    for name in ("a.flac", "a.ogg", "a.mp3", "a.au"):
        soundfile.write(tmp_path / name, samples, 8000)
        with serve(tmp_path) as server:
            read = read_audio(f"{server.url}/{name}", 8000, 0.25, 0.5)
        np.testing.assert_array_equal(read, read_audio(tmp_path / name, 8000, 0.25, 0.5))


def read_remote(url):
    return len(read_audio(url, 8000))


def test_forked_processes_read_urls_that_their_parent_has_listed(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(100), 8000)
    with serve(tmp_path) as server:
        assert list_url(server.url) == ["a.wav"]
        assert read_remote(f"{server.url}/a.wav") == 100
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map_async(read_remote, [f"{server.url}/a.wav"] * 4).get(timeout=60) == [100] * 4
