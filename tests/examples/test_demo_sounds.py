import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from examples import demo_sounds

SCRIPT = Path(__file__).parents[2] / "examples" / "demo_sounds.py"


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and modification time of every file, which change when a file is rewritten."""
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_at_least_twelve_classes():
    assert len(demo_sounds.CLASSES) >= 12


@pytest.mark.parametrize("name", demo_sounds.CLASSES)
def test_clips_are_finite_in_range_and_reproducible(name):
    for index in range(4):
        clip = demo_sounds.make_clip(name, seed=3, index=index)
        assert clip.dtype == np.float32
        assert clip.shape == (32000,)
        assert np.isfinite(clip).all()
        assert 0.05 < np.abs(clip).max() < 1.0
        np.testing.assert_array_equal(clip, demo_sounds.make_clip(name, seed=3, index=index))


@pytest.mark.parametrize("name", demo_sounds.CLASSES)
@pytest.mark.parametrize(("sampling_rate", "seconds"), [(8000, 1.0), (44100, 1.5)])
def test_other_rates_and_lengths(name, sampling_rate, seconds):
    clip = demo_sounds.make_clip(name, 0, 0, sampling_rate, seconds)
    assert clip.shape == (round(sampling_rate * seconds),)
    assert np.isfinite(clip).all()
    assert clip.std() > 0


def test_no_clip_is_a_scaled_copy_of_another():
    clips = [
        demo_sounds.make_clip(name, seed, index)
        for name in demo_sounds.CLASSES
        for seed in (0, 1)
        for index in range(3)
    ]
    unit = np.stack([clip / np.linalg.norm(clip) for clip in clips])
    similarity = np.abs(unit @ unit.T) - np.eye(len(unit))
    assert similarity.max() < 0.9


def test_level_does_not_identify_the_class():
    level = np.array([[np.abs(demo_sounds.make_clip(n, 0, i)).max() for i in range(10)] for n in demo_sounds.CLASSES])
    decibels = 20 * np.log10(level)
    assert decibels.std(axis=1).min() > 2
    assert decibels.mean(axis=1).std() < decibels.std(axis=1).mean() / 2


def test_glides_rise_and_fall_as_named():
    def centroids(name: str, index: int) -> list[float]:
        clip = demo_sounds.make_clip(name, 0, index)
        active = np.flatnonzero(np.abs(clip) > 0.3 * np.abs(clip).max())
        halves = np.array_split(clip[active[0] : active[-1]], 2)
        power = [np.abs(np.fft.rfft(half, 32000)) ** 2 for half in halves]
        return [float(np.average(np.arange(len(p)), weights=p)) for p in power]

    rising = [np.log2(last / first) for first, last in (centroids("rising_glide", i) for i in range(10))]
    falling = [np.log2(last / first) for first, last in (centroids("falling_glide", i) for i in range(10))]
    assert np.median(rising) > 0.2
    assert np.median(falling) < -0.2


def test_the_folder_contains_class_folders_of_16_bit_flac_files(tmp_path):
    folder = demo_sounds.write_sounds(tmp_path / "new" / "sounds", clips_per_class=2, seed=5)
    assert folder == tmp_path / "new" / "sounds"
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set(demo_sounds.CLASSES)
    assert [path.name for path in folder.parent.iterdir()] == ["sounds"]
    for name in demo_sounds.CLASSES:
        paths = sorted((folder / name).iterdir())
        assert [path.name for path in paths] == [f"{name}_0000.flac", f"{name}_0001.flac"]
        for index, path in enumerate(paths):
            assert soundfile.info(path).subtype == "PCM_16"
            samples, rate = soundfile.read(path, dtype="float32")
            assert rate == 16000
            np.testing.assert_allclose(samples, demo_sounds.make_clip(name, 5, index), atol=2**-14)


def test_an_identical_set_is_not_rewritten(tmp_path):
    folder = demo_sounds.write_sounds(tmp_path / "sounds", clips_per_class=1)
    before = _state(folder)
    demo_sounds.write_sounds(folder, clips_per_class=1)
    assert _state(folder) == before


def test_an_incomplete_or_different_set_is_replaced(tmp_path):
    folder = demo_sounds.write_sounds(tmp_path / "sounds", clips_per_class=2)
    missing = folder / "bell" / "bell_0001.flac"
    content = missing.read_bytes()
    missing.unlink()
    demo_sounds.write_sounds(folder, clips_per_class=2)
    assert missing.read_bytes() == content

    demo_sounds.write_sounds(folder, clips_per_class=1, seed=1)
    assert len(list(folder.rglob("*.flac"))) == len(demo_sounds.CLASSES)
    assert (folder / "bell" / "bell_0000.flac").read_bytes() != content
    assert [path.name for path in tmp_path.iterdir()] == ["sounds"]


def test_files_of_the_user_are_never_deleted(tmp_path):
    demo_sounds.write_sounds(tmp_path / "sounds", clips_per_class=1)
    mine = tmp_path / "sounds" / "bell" / "holiday.flac"
    mine.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="holiday.flac"):
        demo_sounds.write_sounds(tmp_path / "sounds", clips_per_class=1, seed=1)
    assert mine.read_bytes() == b"mine"

    recordings = tmp_path / "recordings" / "bell"
    recordings.mkdir(parents=True)
    (recordings / "bell_0000.flac").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="bell_0000.flac"):
        demo_sounds.write_sounds(recordings.parent, clips_per_class=1)
    assert (recordings / "bell_0000.flac").read_bytes() == b"mine"

    with pytest.raises(FileExistsError, match="is a file"):
        demo_sounds.write_sounds(mine)


def test_a_failed_run_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError("disk full")

    monkeypatch.setattr(demo_sounds.soundfile, "write", fail)
    with pytest.raises(OSError, match="disk full"):
        demo_sounds.write_sounds(tmp_path / "sounds", clips_per_class=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "trombone"}, "trombone"),
        ({"sampling_rate": 4000}, "4000 Hz"),
        ({"seconds": 0.1}, "0.1 s"),
    ],
)
def test_wrong_clip_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        demo_sounds.make_clip(**{"name": "bell", "seed": 0, "index": 0, **arguments})


def test_wrong_number_of_clips(tmp_path):
    with pytest.raises(ValueError, match="got 0"):
        demo_sounds.write_sounds(tmp_path / "sounds", clips_per_class=0)


@pytest.mark.slow
def test_command_line_writes_the_same_set_as_the_function(tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path / "a"), "--clips_per_class", "1", "--seed", "2"]
    run = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": "7"}
    )
    assert str(tmp_path / "a") in run.stdout
    written = demo_sounds.write_sounds(tmp_path / "b", clips_per_class=1, seed=2)
    for path in written.rglob("*.flac"):
        assert path.read_bytes() == (tmp_path / "a" / path.relative_to(written)).read_bytes()
