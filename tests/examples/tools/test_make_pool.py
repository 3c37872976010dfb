import io
import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import soundfile

from asit_hf.data import PackedAudio, load_unlabelled, read_audio, resample
from examples.tools import make_pool as script

EXAMPLES = Path(__file__).parents[3] / "examples"
RATE = 16000
PACKAGES = {"bells": ("bells", "CC0"), "bells-more": ("more bells", "GPL-2+")}


def sound(seed: int, seconds: float = 1.0) -> np.ndarray:
    """A few tones that come and go, other ones for each seed."""
    generator = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE)) / RATE
    tones = [
        np.sin(2 * np.pi * generator.uniform(100, 5000) * time)
        * (0.2 + np.abs(np.sin(np.pi * generator.uniform(1, 4) * time + generator.uniform(0, 3))))
        for _ in range(4)
    ]
    return (0.15 * sum(tones)).astype(np.float32)


def write(path: Path, waveform: np.ndarray, rate: int = RATE, **format: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, waveform, rate, **format)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Two clips for each of four folds of ESC-50, two train speakers and one other of ASC, three digits of FSDD."""
    folder = tmp_path_factory.mktemp("labelled")
    lines = ["filename,fold"]
    for seed in range(8):
        fold = 1 + seed // 2
        lines.append(f"{fold}-{seed}.flac,{fold}")
        write(folder / "esc50-16k" / "audio" / f"{fold}-{seed}.flac", sound(seed))
    (folder / "esc50-16k" / "esc50.csv").write_text("\n".join(lines) + "\n")
    (folder / "esc50-16k" / "LICENSE").write_text("credits of esc50\n")
    for split, seeds in (("train", (10, 11)), ("val", (12,))):
        names = [f"yes/{seed}.flac" for seed in seeds]
        (folder / "asc-16k").mkdir(exist_ok=True)
        (folder / "asc-16k" / f"{split}.csv").write_text("file,speaker\n" + "".join(f"{name},0\n" for name in names))
        for seed, name in zip(seeds, names):
            write(folder / "asc-16k" / name, sound(seed))
    (folder / "asc-16k" / "LICENSE").write_text("credits of asc\n")
    for seed in range(20, 23):
        write(folder / "fsdd-8k" / "recordings" / f"{seed}.flac", sound(seed)[::2], 8000)
    return folder


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """What two packages unpack to: new sounds, known ones in other formats, one kept back, and what is of no use."""
    folder = tmp_path_factory.mktemp("unpacked")
    bells = folder / "bells" / "usr" / "share" / "bells"
    write(bells / "new.wav", sound(30))
    write(bells / "long.ogg", sound(31, 7.0), format="OGG", subtype="VORBIS")
    write(bells / "copy.ogg", 0.4 * resample(sound(0), RATE, 44100), 44100, format="OGG", subtype="VORBIS")
    write(bells / "kept_back.mp3", sound(6), format="MP3", subtype="MPEG_LAYER_III")
    write(bells / "silent.wav", np.zeros(RATE))
    write(bells / "short.wav", sound(32, 0.1))
    (bells / "broken.wav").write_bytes(b"no audio")
    for name in ("bells", "bells-more"):
        (doc := folder / name / "usr" / "share" / "doc" / name).mkdir(parents=True)
        (doc / "copyright").write_text(f"license of {name}\n")
    more = folder / "bells-more" / "usr" / "share"
    for seed in range(40, 45):
        write(more / f"{seed}.wav", sound(seed))
    write(more / "again.flac", sound(31, 7.0))
    return folder


@pytest.fixture
def pool(labelled, unpacked, monkeypatch):
    """`make_pool` on these."""

    def fetch(package, work_dir):
        if not (unpacked / package).exists():
            raise FileNotFoundError(f"{package}: apt-get says no such package")
        return unpacked / package, "1.0"

    monkeypatch.setattr(script, "PACKAGES", PACKAGES)
    monkeypatch.setattr(script, "fetch", fetch)
    monkeypatch.setattr(script, "CLIPS_PER_SHARD", 2)

    def make(output_dir, **options):
        options = {
            "real_audio": labelled,
            "packages": tuple(PACKAGES),
            "seconds": 2.0,
            "seconds_per_file": 6.0,
        } | options
        return script.make_pool(output_dir, output_dir.parent / "work", **options)

    return make


def rows_of(folder):
    return [row for path in sorted(folder.glob("*.parquet")) for row in pyarrow.parquet.read_table(path).to_pylist()]


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".npz"  # zip files hold the time
    }


def test_what_is_written_is_what_training_reads(pool, tmp_path):
    result = pool(tmp_path / "pool")
    rows = rows_of(tmp_path / "pool")
    assert result == json.loads((tmp_path / "pool" / "pool.json").read_text())
    assert result["complete"]
    assert not result["missing"]
    dataset = load_unlabelled(str(tmp_path / "pool"))
    assert len(dataset) == len(rows) == sum(part["clips"] for part in result["parts"].values())
    for clip, row in zip(dataset, rows):
        waveform = read_audio(clip["audio"], RATE)
        assert len(waveform) == round(row["seconds"] * RATE) <= 2.0 * RATE
    chosen = load_unlabelled({"data": str(tmp_path / "pool"), "filter": ["source=esc50"]})
    assert len(chosen) == result["parts"]["esc50"]["clips"] == 6
    np.testing.assert_allclose(read_audio(chosen[0]["audio"], RATE), sound(0), atol=2**-14)
    assert (tmp_path / "pool" / "licenses" / "bells.txt").read_text() == "license of bells\n"
    assert (tmp_path / "pool" / "licenses" / "esc50.txt").read_text() == "credits of esc50\n"


def test_each_file_is_in_the_pool_or_has_a_reason(pool, tmp_path):
    result = pool(tmp_path / "pool")
    rows = rows_of(tmp_path / "pool")
    for name, part in result["parts"].items():
        written = {row["original_path"] for row in rows if row["source"] == name}
        if "kept-back" not in name:
            assert part["files"] == len(written) + sum(part[reason] for reason in script.REASONS)
    left_out = [json.loads(line) for line in (tmp_path / "pool" / "left_out.jsonl").read_text().splitlines()]
    assert {(line["source"], Path(line["file"]).name): (line["reason"], line["detail"]) for line in left_out} == {
        ("bells", "broken.wav"): ("unreadable", "Format not recognised"),
        ("bells", "copy.ogg"): ("duplicate", "esc50/audio/1-0.flac"),
        ("bells", "kept_back.mp3"): ("held out", "esc50-kept-back/audio/4-6.flac"),
        ("bells", "short.wav"): ("short", "0.10 s"),
        ("bells", "silent.wav"): ("silent", "0.00 s"),
        ("bells-more", "again.flac"): ("duplicate", "bells/usr/share/bells/long.ogg"),
    }
    table = (tmp_path / "pool" / "pool.md").read_text()
    assert all(f"| {name} |" in table for name in result["parts"])


def test_what_is_kept_back_is_not_written(pool, tmp_path):
    pool(tmp_path / "pool")
    paths = {row["original_path"] for row in rows_of(tmp_path / "pool")}
    assert not any(path.startswith("audio/4-") or path == "yes/12.flac" for path in paths)
    result = pool(tmp_path / "free", esc50_folds=())
    assert "esc50" not in result["parts"]
    assert not any(path.startswith("audio/") for path in (row["original_path"] for row in rows_of(tmp_path / "free")))
    assert result["parts"]["bells"]["held out"] == 2


def test_of_a_long_file_as_much_as_asked_for(pool, tmp_path):
    result = pool(tmp_path / "pool", seconds=1.0, seconds_per_file=3.0)
    clips = [row for row in rows_of(tmp_path / "pool") if row["original_path"].endswith("long.ogg")]
    assert [clip["start"] for clip in clips] == [0, 3, 6]
    assert result["parts"]["bells"]["hours_beyond_seconds_per_file"] == pytest.approx(4 / 3600, abs=1e-4)


def test_clips_join_to_the_whole():
    waveform = sound(0, 5.03)
    clips = list(script.cut_clips(waveform, 2.0, 60.0))
    assert [start for start, _ in clips] == list(np.cumsum([0] + [len(clip) for _, clip in clips])[:-1])
    np.testing.assert_array_equal(np.concatenate([clip for _, clip in clips]), waveform)
    assert max(len(clip) for _, clip in clips) - min(len(clip) for _, clip in clips) <= 1


@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize("level", [1.0, 0.01])
def test_long_silence_is_cut_and_pauses_stay(offset, level):
    silence = np.zeros(2 * RATE, np.float32)
    first, second, third = (sound(seed, 0.8) for seed in range(3))
    pause = silence[: RATE * 2 // 5]
    waveform = level * np.concatenate([silence, first, pause, second, silence, third, silence]) + np.float32(offset)
    cut = script.cut_silence(waveform)
    kept = level * np.concatenate([first, pause, second, silence[: RATE * 24 // 100], third]) + np.float32(offset)
    np.testing.assert_allclose(cut, kept, atol=1e-7)


@pytest.mark.parametrize("waveform", [np.zeros(RATE), np.full(RATE, 0.3), np.ones(100)])
def test_nothing_is_left_of_silence(waveform):
    assert len(script.cut_silence(waveform.astype(np.float32))) == 0


def test_a_quiet_recording_is_no_silence():
    waveform = 1e-3 * sound(0)
    np.testing.assert_array_equal(script.cut_silence(waveform), waveform)


def test_fingerprints_know_a_recording_again_and_no_other():
    prints = np.array([script.fingerprint(sound(seed)) for seed in range(30)])
    cosines = prints @ prints.T
    assert (cosines[~np.eye(30, dtype=bool)] < script.SAME).all()
    for seed in range(5):
        content = io.BytesIO()
        soundfile.write(content, 0.3 * sound(seed) + 0.01, RATE, format="OGG", subtype="VORBIS")
        assert prints[seed] @ script.fingerprint(read_audio(content.getvalue(), RATE)) >= script.SAME


def test_a_stopped_run_goes_on_to_the_same_pool(pool, tmp_path, monkeypatch):
    pool(tmp_path / "whole")
    encode, calls = script.encode, []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 6 + 2 + 3 + 4 + 3:  # within bells-more, after its first shard
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(script, "encode", stop)
    with pytest.raises(KeyboardInterrupt):
        pool(tmp_path / "stopped")
    half = json.loads((tmp_path / "stopped" / "pool.json").read_text())
    assert not half["complete"]
    assert "bells" in half["parts"]
    assert "bells-more" not in half["parts"]
    assert (tmp_path / "stopped" / "bells-more-00000.parquet").exists()
    (tmp_path / "stopped" / ".bells-more-00001.parquet.unfinished").write_bytes(b"half")
    (tmp_path / "stopped" / "bells-more-00007.parquet").write_bytes(b"of a part that is written anew")
    calls.clear()
    pool(tmp_path / "stopped")
    assert len(calls) == 5  # bells-more alone
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_a_missing_package_is_reported_and_added_later(pool, unpacked, tmp_path, capsys):
    (unpacked / "bells-more").rename(unpacked / "elsewhere")
    try:
        with pytest.raises(FileNotFoundError, match="bells-more: apt-get .*no such package"):
            pool(tmp_path / "strict", strict=True)
        result = pool(tmp_path / "pool")
    finally:
        (unpacked / "elsewhere").rename(unpacked / "bells-more")
    assert not result["complete"]
    assert list(result["missing"]) == ["bells-more"]
    assert "MISSING bells-more: apt-get" in capsys.readouterr().err
    assert "Missing: bells-more: apt-get" in (tmp_path / "pool" / "pool.md").read_text()
    assert pool(tmp_path / "pool")["complete"]


def test_another_pool_is_not_mixed_in(pool, tmp_path):
    pool(tmp_path / "pool", packages=())
    with pytest.raises(ValueError, match=r"esc50_folds.*got .*esc50_folds"):
        pool(tmp_path / "pool", packages=(), esc50_folds=(1, 2))


def test_wrong_inputs(pool, labelled, tmp_path):
    with pytest.raises(ValueError, match=r"folds of ESC-50 among \[1, 2, 3, 4\], got \[7\]"):
        pool(tmp_path / "pool", esc50_folds=(1, 7))
    with pytest.raises(ValueError, match="seconds 4.0 and seconds_per_file 3.0"):
        pool(tmp_path / "pool", seconds=4.0, seconds_per_file=3.0)
    shutil.copytree(labelled, tmp_path / "less")
    (tmp_path / "less" / "asc-16k" / "yes" / "10.flac").unlink()
    with pytest.raises(FileNotFoundError, match="1 files of the tables .*10.flac"):
        pool(tmp_path / "pool", real_audio=tmp_path / "less")


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb here")
def test_packages_are_fetched_and_unpacked_once(unpacked, tmp_path, monkeypatch):
    """With an `apt-get` that knows one package and counts its calls."""
    tree, commands, work = tmp_path / "tree", tmp_path / "commands", tmp_path / "work"
    shutil.copytree(unpacked / "bells", tree)
    with zipfile.ZipFile(tree / "usr/share/bells/sounds.pk3", "w") as archive:
        archive.write(tree / "usr/share/bells/new.wav", "sounds/one.wav")
    (tree / "DEBIAN").mkdir()
    control = "Package: bells\nVersion: 2.5-1\nArchitecture: all\nMaintainer: nobody <n@o.org>\nDescription: bells\n"
    (tree / "DEBIAN" / "control").write_text(control)
    deb = tmp_path / "bells_2.5-1_all.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", tree, deb], check=True, capture_output=True)
    commands.mkdir()
    (commands / "apt-get").write_text(
        f'#!/bin/sh\necho "$2" >> {tmp_path}/calls\n'
        f'[ "$2" = bells ] && cp {deb} . || {{ echo "E: Unable to locate package $2" >&2; exit 100; }}\n'
    )
    (commands / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    (work / ".bells-stopped").mkdir(parents=True)
    (work / ".bells-stopped" / "bells_2.5-1_all.deb").write_bytes(b"half")  # of a download that was stopped
    for _ in range(2):
        folder, version = script.fetch("bells", work)
        assert version == "2.5-1"
        for name in ("new.wav", "sounds.pk3.unpacked/sounds/one.wav"):
            assert (folder / "usr/share/bells" / name).read_bytes() == (tree / "usr/share/bells/new.wav").read_bytes()
    assert (tmp_path / "calls").read_text() == "bells\n"
    assert {path.name for path in work.iterdir()} == {".bells-stopped", "bells_2.5-1_all", "bells_2.5-1_all.deb"}
    with pytest.raises(FileNotFoundError, match="gongs: apt-get .*E: Unable to locate package gongs"):
        script.fetch("gongs", work)


def test_the_pool_is_packed_too(pool, labelled, tmp_path, capsys):
    pool(tmp_path / "pool")  # puts the stand-ins in place of packages
    command = ["--output_dir", tmp_path / "pool", "--work_dir", tmp_path / "work", "--real_audio", labelled]
    command += ["--packed_dir", tmp_path / "packed", "--seconds", 2, "--seconds_per_file", 6, "--packages", *PACKAGES]
    script.main([str(part) for part in command])
    packed = PackedAudio.load(tmp_path / "packed", sampling_rate=RATE)
    rows = rows_of(tmp_path / "pool")
    assert packed.names == [row["audio"]["path"] for row in rows]
    assert packed.parts == [row["source"] for row in rows]
    clips = packed.audio.split(packed.lengths.tolist())
    for row, clip in zip(rows, clips, strict=True):
        assert clip.tolist() == soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="int16")[0].tolist()
    with pytest.raises(SystemExit):
        script.main([str(part) for part in command])
    assert "packed" in capsys.readouterr().err
