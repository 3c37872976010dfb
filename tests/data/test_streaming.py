import io
import subprocess
import sys
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import streams
import torch
from datasets import Audio, Dataset
from streams import RATE, SHORT, clip_of, make_trainer, stream_of
from torch.utils.data import DataLoader

from asit_hf.data import AudioReadError, StreamingCrops, collate_crops, load_audio_dataset, load_unlabelled
from asit_hf.data.crops import CropSettings

NUM_CLIPS = 22


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """datasets waits 5 s at the end of every pass over interleaved parquet files."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.01)


def flac(index: int) -> bytes:
    """A clip that holds its own level, so that a crop tells which clip it is from."""
    content = io.BytesIO()
    sf.write(content, np.full(2400, (index + 1) / 2**6), RATE, format="FLAC")
    return content.getvalue()


def write_source(folder: Path, kind: str, num_shards: int, bad: tuple[int, ...] = ()) -> Path:
    """Clips as files, or in shards of unequal sizes."""
    folder.mkdir()
    contents = [b"no audio" if index in bad else flac(index) for index in range(NUM_CLIPS)]
    if kind == "files":
        for index, content in enumerate(contents):
            (folder / f"{index:02d}.flac").write_bytes(content)
        return folder
    for shard, indices in enumerate(np.array_split(np.arange(NUM_CLIPS), num_shards)):
        path = folder / f"clips-{shard:05d}.{kind}"
        if kind == "parquet":
            rows = [{"path": f"{index:02d}.flac", "bytes": contents[index]} for index in indices]
            Dataset.from_dict({"audio": rows}).cast_column("audio", Audio(decode=False)).to_parquet(path)
            continue
        with tarfile.open(path, "w") as archive:
            for index in indices:
                for name, content in ((f"{index:02d}.flac", contents[index]), (f"{index:02d}.json", b"{}")):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return folder


def batches_of(stream: StreamingCrops, num_workers: int = 0, batch_size: int = 2):
    return iter(DataLoader(stream, batch_size, num_workers=num_workers, collate_fn=collate_crops))


def clips_of(batches) -> list[int]:
    return [clip_of(waveforms) for batch in batches for waveforms in batch["global_waveforms"]]


@pytest.mark.parametrize(("kind", "num_shards"), [("files", 0), ("parquet", 8), ("parquet", 3), ("tar", 4)])
def test_two_processes_of_two_workers_see_each_clip_once_an_epoch(tmp_path, kind, num_shards):
    folder = write_source(tmp_path / "source", kind, num_shards)
    streams = [stream_of(folder, rank=rank, world_size=2) for rank in (0, 1)]
    orders = []
    for epoch in (0, 1):
        for stream in streams:
            stream.set_epoch(epoch)
        shares = [clips_of(batches_of(stream, num_workers=2)) for stream in streams]
        assert sorted(shares[0] + shares[1]) == list(range(NUM_CLIPS))
        assert min(map(len, shares)) >= NUM_CLIPS // 2 - 4
        orders.append(shares)
    assert orders[0] != orders[1]


def test_a_process_decodes_its_own_share_alone(tmp_path, monkeypatch):
    folder = write_source(tmp_path / "source", "parquet", 3)
    read, decoded = CropSettings.read, []
    monkeypatch.setattr(CropSettings, "read", lambda self, *args: (decoded.append(1), read(self, *args))[1])
    assert len(list(stream_of(folder, rank=1, world_size=2))) == len(decoded) == NUM_CLIPS // 2


def test_the_crops_of_a_clip_depend_on_seed_epoch_and_clip_alone(tmp_path):
    folder = write_source(tmp_path / "source", "files", 0)

    def crops(num_workers, **kwargs):
        stream = stream_of(folder, **kwargs)
        stream.set_epoch(kwargs.get("epoch", 0))
        return {key for batch in batches_of(stream, num_workers) for key in batch["sample_keys"].tolist()}

    alone = crops(0)
    assert len(alone) == NUM_CLIPS
    assert crops(2) == alone
    assert crops(0, rank=0, world_size=2) | crops(0, rank=1, world_size=2) == alone
    assert crops(0, seed=1).isdisjoint(alone)
    stream = stream_of(folder)
    stream.set_epoch(1)
    assert {item["sample_key"] for item in stream}.isdisjoint(alone)


def test_in_place_of_a_bad_clip_the_next_comes_twice(tmp_path, caplog):
    folder = write_source(tmp_path / "source", "files", 0, bad=(3, 4, NUM_CLIPS - 1))
    items = list(stream_of(folder, shuffle=False))
    assert [clip_of(item["global_waveforms"]) for item in items] == [0, 1, 2, 5, 5, *range(5, NUM_CLIPS - 1)]
    reported = [path for item in items for path, _ in item["bad_files"]]
    assert reported == [str(folder / "03.flac"), str(folder / "04.flac")]
    assert len({item["sample_key"] for item in items}) == len(items)
    assert f"{folder / '21.flac'}: Format not recognised" in caplog.text
    with pytest.raises(AudioReadError, match=r"03\.flac"):
        list(stream_of(folder, shuffle=False, strict=True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_repeated_stream_goes_on_with_the_next_epoch(tmp_path, num_workers):
    folder = write_source(tmp_path / "source", "parquet", 4)
    batches = batches_of(stream_of(folder, repeat=True), num_workers)
    clips = clips_of(islice(batches, 3 * NUM_CLIPS // 2))
    counts = np.bincount(clips, minlength=NUM_CLIPS)
    # Two workers need not be in the same pass: one has fewer clips.
    assert counts.tolist() == [3] * NUM_CLIPS if num_workers == 0 else set(counts) <= {2, 3, 4}
    assert clips[:NUM_CLIPS] != clips[NUM_CLIPS : 2 * NUM_CLIPS]


def test_a_repeated_stream_without_clips_ends(tmp_path):
    stream = load_unlabelled(str(write_source(tmp_path / "source", "files", 0)), streaming=True)
    nothing = stream.filter(lambda row: False)
    assert list(StreamingCrops(nothing, RATE, repeat=True, **SHORT)) == []


@pytest.mark.parametrize(("num_workers", "num_batches"), [(0, 1), (0, 19), (2, 1), (2, 19), (3, 5)])
def test_skipping_leads_to_the_batches_that_would_have_come(tmp_path, num_workers, num_batches):
    folder = write_source(tmp_path / "source", "tar", 4, bad=(2, 3, 9, 15))
    options = {"repeat": True, "rank": 1, "world_size": 2}
    expected = list(islice(batches_of(stream_of(folder, **options), num_workers), num_batches + 6))
    stream = stream_of(folder, **options)
    stream.skip(num_batches, batch_size=2)
    batches = list(islice(batches_of(stream, num_workers), num_batches + 6))
    assert batches[:num_batches] == [{"skipped": 2}] * num_batches
    for batch, other in zip(batches[num_batches:], expected[num_batches:], strict=True):
        assert batch["sample_keys"].tolist() == other["sample_keys"].tolist()
        assert torch.equal(batch["global_waveforms"], other["global_waveforms"])
        assert torch.equal(batch["local_waveforms"], other["local_waveforms"])


def test_skipped_clips_are_not_decoded(tmp_path, monkeypatch):
    stream = stream_of(write_source(tmp_path / "source", "files", 0))
    stream.skip(5, batch_size=4)
    read, decoded = CropSettings.read, []
    monkeypatch.setattr(CropSettings, "read", lambda self, *args: (decoded.append(1), read(self, *args))[1])
    assert len(list(stream)) == NUM_CLIPS
    assert len(decoded) == 2


def test_streamed_bytes_without_a_path(tmp_path):
    rows = [{"bytes": flac(index), "path": None} for index in range(3)]
    dataset = Dataset.from_dict({"audio": rows}).cast_column("audio", Audio(decode=False)).to_iterable_dataset()
    stream = StreamingCrops(dataset, RATE, **SHORT)
    first, again = list(stream), list(stream)
    assert len({item["index"] for item in first}) == 3
    assert [item["sample_key"] for item in first] == [item["sample_key"] for item in again]


def test_joined_streams_bring_all_their_shards(tmp_path):
    sources = [write_source(tmp_path / kind, kind, 3) for kind in ("tar", "parquet")]
    joined = load_unlabelled([str(source) for source in sources], streaming=True)
    assert joined.num_shards == 6
    clips = [clip_of(item["global_waveforms"]) for item in StreamingCrops(joined, RATE, **SHORT)]
    assert sorted(clips) == sorted([*range(NUM_CLIPS)] * 2)
    first = clips_of(islice(batches_of(StreamingCrops(joined.shuffle(seed=0), RATE, **SHORT)), 5))
    assert first != clips[:10]


def test_what_cannot_be_streamed(tmp_path):
    folder = write_source(tmp_path / "source", "tar", 2)
    with pytest.raises(ValueError, match=r"load .*00000\.tar with streaming=True"):
        load_audio_dataset(folder)
    cut = folder / "clips-00001.tar"
    cut.write_bytes(cut.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cannot read .*00001\.tar: damaged or truncated tar file"):
        list(load_unlabelled(str(folder), streaming=True))
    with pytest.raises(ValueError, match="rank from 0 to 1, got 2"):
        stream_of(folder, rank=2, world_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"dataloader_num_workers": 2}, {"gradient_accumulation_steps": 2}])
def test_a_run_resumed_in_its_second_pass_equals_an_uninterrupted_one(tmp_path, settings):
    folder = write_source(tmp_path / "source", "parquet", 4, bad=(5,))
    whole = make_trainer(stream_of(folder), tmp_path / "whole", **settings)
    whole.train()
    resumed = make_trainer(stream_of(folder), tmp_path / "resumed", seed=1, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-13"))
    assert resumed.state.global_step == 16
    expected, rows = (
        [row["loss"] for row in trainer.state.log_history if "loss" in row] for trainer in (whole, resumed)
    )
    assert rows[-3:] == expected[-3:]
    for (name, value), other in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
        assert torch.equal(value, other), name


@pytest.mark.slow
def test_two_processes_under_torchrun_share_a_stream_and_resume_exactly(tmp_path):
    """Shards of unequal sizes, so that the processes start their second passes at different steps."""
    write_source(tmp_path / "source", "parquet", 4)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run([*launcher, streams.__file__, tmp_path], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    whole, resumed = ([torch.load(tmp_path / f"{name}-{rank}.pt") for rank in (0, 1)] for name in ("whole", "resumed"))
    # Every worker has a shard of 5 or 6 clips: 4 steps of 2 clips are within the first pass of each.
    assert len({*whole[0]["clips"][:8], *whole[1]["clips"][:8]}) == 16
    for before, after in zip(whole, resumed):
        assert after["clips"] == before["clips"][26:]
        for name, value in before["weights"].items():
            assert torch.equal(value, after["weights"][name]), name
