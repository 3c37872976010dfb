import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import soundfile

from asit_hf.data import (
    AudioReadError,
    PackedAudio,
    is_packed,
    label_names,
    load_audio_dataset,
    load_unlabelled,
    read_audio,
)
from examples.tools import make_shards as script

COMMAND = [sys.executable, "-m", "examples.tools.make_shards"]
ROOT = Path(__file__).parents[3]
NUM_CLIPS = 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips of two classes, several rates and lengths; numbers 2 and 7 cannot be read. One name has dots in it."""
    folder = tmp_path_factory.mktemp("clips")
    generator = np.random.default_rng(0)
    for index in range(NUM_CLIPS):
        path = folder / "ab"[index % 2] / f"{index:02d}.v1.wav"
        path.parent.mkdir(exist_ok=True)
        rate = (8000, 16000)[index % 2]
        sound = np.sin(np.arange(rate // 2 + 100 * index) * generator.uniform(0.05, 0.5))
        soundfile.write(path, 0.5 * sound, rate)
    for index in (2, 7):
        (folder / "ab"[index % 2] / f"{index:02d}.v1.wav").write_bytes(b"no audio")
    return folder


def options(folder, output, **more):
    given = {"data": folder, "output_dir": output, "clips_per_shard": 4, "sampling_rate": 8000} | more
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def files_of(folder):
    """In the order of the data set: by class, then name."""
    return [path for path in sorted(folder.rglob("*.wav")) if path.stat().st_size > 100]


def shards_of(output):
    return sorted(path for path in output.iterdir() if path.suffix in (".parquet", ".tar"))


@pytest.mark.parametrize(("format", "streaming"), [("parquet", False), ("parquet", True), ("tar", True)])
def test_flac_shards_read_back_as_the_same_clips(folder, tmp_path, format, streaming):
    counts = script.main(options(folder, tmp_path, format=format))
    assert counts == {"shards": 3, "clips": NUM_CLIPS - 2, "bad": 2}
    shards = shards_of(tmp_path)
    assert [shard.name for shard in shards] == [f"clips-{index:05d}-of-00003.{format}" for index in range(3)]
    rows = list(load_unlabelled(str(tmp_path), streaming=streaming))
    assert len(rows) == NUM_CLIPS - 2
    for row, path in zip(rows, files_of(folder), strict=True):
        waveform = read_audio(row["audio"], 8000)
        np.testing.assert_allclose(waveform, read_audio(path, 8000), atol=2**-15)
        if soundfile.info(path).samplerate == 8000:
            np.testing.assert_array_equal(waveform, read_audio(path, 8000))


@pytest.mark.slow
def test_two_processes_write_what_one_writes(folder, tmp_path):
    script.main(options(folder, tmp_path / "one", format="tar"))
    more = options(folder, tmp_path / "two", format="tar", num_workers=2)
    result = subprocess.run([*COMMAND, *more], capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert "3 shards in" in result.stdout, result.stderr
    assert result.stderr.count("skipped ") == 2
    for one, two in zip(shards_of(tmp_path / "one"), shards_of(tmp_path / "two"), strict=True):
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(("codec", "extension"), [("opus", ".opus"), ("vorbis", ".ogg")])
def test_lossy_codecs_keep_the_sound(folder, tmp_path, codec, extension):
    script.main(options(folder, tmp_path, codec=codec))
    rows = list(load_unlabelled(str(tmp_path)))
    assert len(rows) == NUM_CLIPS - 2
    for row, path in zip(rows, files_of(folder)):
        original, waveform = read_audio(path, 8000), read_audio(row["audio"], 8000)
        assert len(waveform) == len(original)
        assert np.corrcoef(original, waveform)[0, 1] > 0.9
        assert row["audio"]["path"].endswith(extension)


def test_other_columns_and_the_original_path_stay(folder, tmp_path):
    dataset = load_audio_dataset(folder, labels_from_folders=True)
    script.make_shards(dataset, tmp_path, clips_per_shard=4, sampling_rate=8000, progress=False)
    shards = load_audio_dataset(tmp_path)
    assert shards["original_path"][:] == [str(path) for path in files_of(folder)]
    names = label_names(shards)
    assert [names[label] for label in shards["label"]] == [path.parent.name for path in files_of(folder)]


def test_tar_shards_have_webdatasets_layout(folder, tmp_path):
    script.main(options(folder, tmp_path, format="tar"))
    with tarfile.open(shards_of(tmp_path)[0]) as archive:
        names = archive.getnames()
        first = json.load(archive.extractfile(names[1]))
    assert names[:2] == ["000000000.flac", "000000000.json"]
    assert [Path(name).stem for name in names[::2]] == [Path(name).stem for name in names[1::2]]
    assert first == {"original_path": str(files_of(folder)[0])}


def test_bad_files_are_reported_once(folder, tmp_path):
    script.main(options(folder, tmp_path))
    shards_of(tmp_path)[0].unlink()
    script.main(options(folder, tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "bad_files.jsonl").read_text().splitlines()]
    assert [Path(row["file"]).name for row in rows] == ["02.v1.wav", "07.v1.wav"]
    assert {row["reason"] for row in rows} == {"Format not recognised"}


@pytest.mark.parametrize("format", ["parquet", "tar"])
def test_a_stopped_run_goes_on_and_keeps_whole_shards(folder, tmp_path, monkeypatch, format):
    script.main(options(folder, tmp_path / "whole", format=format))
    encode, calls = script.encode, []

    def stop_in_the_second_shard(*args):
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(script, "encode", stop_in_the_second_shard)
    with pytest.raises(KeyboardInterrupt):
        script.main(options(folder, tmp_path / "cut", format=format))
    assert len(shards_of(tmp_path / "cut")) == 1
    kept = shards_of(tmp_path / "cut")[0].stat().st_mtime_ns
    monkeypatch.setattr(script, "encode", encode)
    script.main(options(folder, tmp_path / "cut", format=format))
    assert shards_of(tmp_path / "cut")[0].stat().st_mtime_ns == kept
    for cut, whole in zip(shards_of(tmp_path / "cut"), shards_of(tmp_path / "whole"), strict=True):
        assert cut.name == whole.name
        if format == "tar":
            assert cut.read_bytes() == whole.read_bytes()
        else:
            assert pyarrow.parquet.read_table(cut).equals(pyarrow.parquet.read_table(whole))


@pytest.mark.parametrize("format", ["parquet", "tar"])
def test_a_half_written_shard_is_never_named_as_whole(folder, tmp_path, monkeypatch, format):
    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        script.main(options(folder, tmp_path, format=format))
    assert shards_of(tmp_path) == []
    monkeypatch.undo()
    assert script.main(options(folder, tmp_path, format=format))["clips"] == NUM_CLIPS - 2
    assert len(list(load_unlabelled(str(tmp_path), streaming=True))) == NUM_CLIPS - 2
    assert not list(tmp_path.glob(".*unfinished*"))


@pytest.mark.parametrize("format", ["parquet", "packed"])
def test_strict_stops_at_an_unreadable_file(folder, tmp_path, format):
    given = (
        [*options(folder, tmp_path), "--strict"] if format == "parquet" else [*packing(folder, tmp_path), "--strict"]
    )
    with pytest.raises(AudioReadError, match=r"02\.v1\.wav"):
        script.main(given)
    assert shards_of(tmp_path) == []
    assert not is_packed(tmp_path)


def test_a_shard_of_bad_files_alone_is_empty(tmp_path):
    (tmp_path / "clips").mkdir()
    for index in range(4):
        (tmp_path / "clips" / f"{index}.wav").write_bytes(b"no audio")
    soundfile.write(tmp_path / "clips" / "4.wav", np.zeros(800), 8000)
    script.main(options(tmp_path / "clips", tmp_path / "shards", clips_per_shard=2))
    assert len(shards_of(tmp_path / "shards")) == 3
    assert len(list(load_unlabelled(str(tmp_path / "shards"), streaming=True))) == 1


def test_wrong_requests(folder, tmp_path):
    with pytest.raises(ValueError, match=r"\(8000, .*opus, got 22050"):
        script.main(options(folder, tmp_path, codec="opus", sampling_rate=22050))
    with pytest.raises(ValueError, match="at least 1 clip"):
        script.main(options(folder, tmp_path, clips_per_shard=0))
    script.main(options(folder, tmp_path))
    with pytest.raises(ValueError, match="'sampling_rate': 8000.*got .*'sampling_rate': 16000"):
        script.main(options(folder, tmp_path, sampling_rate=16000))


def packing(source, output, **more):
    given = {"data": source, "output_dir": output, "format": "packed", "sampling_rate": 8000} | more
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def test_a_packed_pool_holds_every_clip_that_can_be_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "ROWS_AT_ONCE", 4)
    assert script.main(packing(folder, tmp_path)) == {"clips": NUM_CLIPS - 2, "bad": 2, "clipped": 0}
    pool = PackedAudio.load(tmp_path, sampling_rate=8000)
    assert pool.names == [str(path) for path in files_of(folder)]
    assert pool.parts is None
    for path, first, length in zip(files_of(folder), pool.offsets, pool.lengths, strict=True):
        expected = read_audio(path, 8000)
        found = pool.audio[first : first + length].numpy() / 32768
        np.testing.assert_allclose(found, expected, atol=0 if soundfile.info(path).samplerate == 8000 else 2**-16)
    rows = [json.loads(line) for line in (tmp_path / script.BAD_FILES).read_text().splitlines()]
    assert {Path(row["file"]).name[:2] for row in rows} == {"02", "07"}


def test_parquet_shards_are_packed_with_their_parts(folder, tmp_path):
    lines = [f"{path},{path.parent.name}" for path in files_of(folder)]
    (tmp_path / "clips.csv").write_text("\n".join(["file,origin", *lines]) + "\n")
    script.main(options(tmp_path / "clips.csv", tmp_path / "shards"))
    script.main(packing(tmp_path / "shards", tmp_path / "pool", part_column="origin"))
    pool = PackedAudio.load(tmp_path / "pool")
    assert pool.parts == [path.parent.name for path in files_of(folder)]
    assert pool.lengths.tolist() == [len(read_audio(path, 8000)) for path in files_of(folder)]


@pytest.mark.slow
def test_two_processes_pack_what_one_packs(folder, tmp_path):
    script.main(packing(folder, tmp_path / "one"))
    more = packing(folder, tmp_path / "two", num_workers=2)
    result = subprocess.run([*COMMAND, *more], capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert "2 unreadable" in result.stdout, result.stderr
    for name in ("audio.int16", "index.json", script.BAD_FILES):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_clips_beyond_full_scale_are_counted(tmp_path):
    for name, peak in (("loud", 1.5), ("quiet", 0.5)):
        soundfile.write(tmp_path / f"{name}.wav", peak * np.sin(np.arange(4000)), 8000, subtype="FLOAT")
    assert script.main(packing(tmp_path, tmp_path / "pool")) == {"clips": 2, "bad": 0, "clipped": 1}
    assert PackedAudio.load(tmp_path / "pool").audio.max() == 32767


def test_wrong_requests_for_a_packed_pool(folder, tmp_path, capsys):
    for more in ({"codec": "flac"}, {"clips_per_shard": 4}):
        with pytest.raises(SystemExit):
            script.main(packing(folder, tmp_path, **more))
        assert "packed" in capsys.readouterr().err
    for more in ({"part_column": "audio"}, {"format": "tar", "label_column": "label"}):
        with pytest.raises(SystemExit):
            script.main(options(folder, tmp_path, **more))
    with pytest.raises(ValueError, match="part_column.*'nothing'"):
        script.main(packing(folder, tmp_path, part_column="nothing"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.wav").write_bytes(b"no audio")
    with pytest.raises(ValueError, match="at least one clip"):
        script.main(packing(tmp_path / "bad", tmp_path / "pool"))
    assert not is_packed(tmp_path / "pool")
    script.main(packing(folder, tmp_path / "pool"))
    with pytest.raises(FileExistsError, match=r"index\.json"):
        script.main(packing(folder, tmp_path / "pool"))
