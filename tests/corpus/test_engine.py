import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import soundfile
import torch
from tiny import MEL, build

from asit_hf import ASiTFeatureExtractor
from asit_hf.corpus import engine
from asit_hf.corpus.parts import share_out
from asit_hf.corpus.sources import Clip, open_corpus
from asit_hf.data.audio import AudioReader
from asit_hf.data.windows import Windows
from asit_hf.utils.device import ACCELERATOR, CPU

RATE = 16000
SECONDS = {"a.wav": 0.6, "b.flac": 2.3, "c.wav": 0.02, "d.wav": 0.61, "e.wav": 0.6, "f.wav": 1.9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds")
    for seed, (name, seconds) in enumerate(SECONDS.items()):
        soundfile.write(folder / name, np.random.default_rng(seed).normal(0, 0.1, round(seconds * RATE)), RATE)
    (folder / "bad.wav").write_text("not audio")
    damaged = bytearray((folder / "b.flac").read_bytes())
    damaged[len(damaged) // 2 :] = bytes(len(damaged) - len(damaged) // 2)
    (folder / "damaged.flac").write_bytes(damaged)
    return folder


class Sums:
    """A job whose value is the mean of a window's features, and whose rows are all windows and their number."""

    def __init__(self):
        self.windows = Windows(RATE, 8000, 8000, shortest=2800)
        self.feature_extractor = ASiTFeatureExtractor(num_mel_bins=MEL)
        self.device = torch.device("cpu")
        self.batches = []

    def forward(self, input_values, attention_mask, frames):
        assert input_values.shape == (len(frames), max(frames), MEL)
        assert (attention_mask is None) == (len(set(frames)) == 1)
        if attention_mask is not None:
            assert attention_mask.sum(1).tolist() == frames
        self.batches.append(len(frames))
        return (torch.stack([one[:count].mean() for one, count in zip(input_values, frames)]),)

    def rows(self, clip):
        return SumRows(clip.file)


class SumRows:
    def __init__(self, file):
        self.file, self.count = file, 0

    def add(self, start, end, value):
        self.count += 1
        return [{"file": self.file, "start": start, "end": end, "mean": float(value[0])}]

    def finish(self):
        return [{"file": self.file, "windows": self.count}]

    def fail(self, reason):
        return [{"file": self.file, "windows": self.count, "error": reason}]


def run(corpus, part_clips=3, **options):
    """Rows by part, and the job."""
    job, parts, clips = Sums(), {}, []

    class Part(list):
        write = list.extend

        def __init__(self, *number):
            self.number = number

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            parts[self.number] = list(self)

    tasks = share_out(corpus, part_clips)
    engine.run(job, corpus, tasks, Part, lambda *clip: clips.append(clip), **options)
    return dict(sorted(parts.items())), job, clips


def test_tables_of_complete_parts_are_released(folder):
    open_tables, most = weakref.WeakSet(), []

    class Table(list):
        __hash__ = object.__hash__
        write = list.extend

    @contextmanager
    def open_part(shard, number):
        table = Table()
        open_tables.add(table)
        most.append(len(open_tables))
        yield table

    corpus = open_corpus(folder)
    engine.run(Sums(), corpus, share_out(corpus, 1), open_part, lambda *clip: None, num_workers=1)
    assert most == [1] * len(SECONDS) + [1, 1]


def test_rows_are_those_of_each_clip_alone(folder):
    parts, job, clips = run(open_corpus(folder), batch_size=2)
    assert list(parts) == [(0, 0), (0, 1), (0, 2)]
    names = sorted([*SECONDS, "bad.wav", "damaged.flac"])
    assert [clip.file for clip, _ in clips] == names
    assert [clip.file for clip, reason in clips if reason] == ["bad.wav", "damaged.flac"]
    assert all(clip.source is None for clip, _ in clips)
    rows = [row for part in parts.values() for row in part]
    expected = []
    for name in names:
        count = 0
        try:
            with AudioReader(folder / name) as reader:
                for start, waveform, _ in job.windows.read(reader):
                    count += 1
                    values = job.feature_extractor(waveform, sampling_rate=RATE, return_tensors="pt")["input_values"]
                    span = {"start": start / RATE, "end": (start + len(waveform)) / RATE}
                    expected.append({"file": name, **span, "mean": pytest.approx(float(values.mean()), abs=1e-5)})
            expected.append({"file": name, "windows": count})
        except ValueError as error:
            expected.append({"file": name, "windows": count, "error": error.reason})
    assert rows == expected
    assert max(job.batches) == 2


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_make_no_difference(folder, workers, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    parts, _, clips = run(open_corpus(folder), 2, num_workers=workers)
    alone, _, _ = run(open_corpus(folder), 2, num_workers=1)
    assert parts == alone
    assert len(clips) == 8


@pytest.mark.parametrize("workers", [0, 2])
def test_the_way_of_an_accelerator(folder, workers, monkeypatch):
    """Batches of int16 from other processes, features in one batch, results one batch later."""
    expected, _, _ = run(open_corpus(folder))
    monkeypatch.setattr(engine, "choices_for", lambda device: ACCELERATOR)
    parts, _, clips = run(open_corpus(folder), num_workers=workers)
    assert len(clips) == 8
    for one, other in zip((row for rows in parts.values() for row in rows), sum(expected.values(), [])):
        assert one == {**other, "mean": pytest.approx(other["mean"], abs=1e-3)} if "mean" in other else one == other


def test_an_accelerator_gets_what_a_cpu_gets(tmp_path, monkeypatch):
    """Also of a clip shorter than a log-mel window, and of bands that upsampling has left empty."""
    noise = np.random.default_rng(0).normal(0, 0.1, (8000, 2))
    for name, samples, rate in (("short.wav", 0.1 + noise[:160, 0], RATE), ("upsampled.wav", noise, 8000)):
        soundfile.write(tmp_path / name, samples, rate)
    expected, _, _ = run(open_corpus(tmp_path), 1)
    monkeypatch.setattr(engine, "choices_for", lambda device: ACCELERATOR)
    parts, _, _ = run(open_corpus(tmp_path), 1)
    for number, (row, *_) in parts.items():
        assert row["mean"] == pytest.approx(expected[number][0]["mean"], abs=1e-5)


def test_windows_of_like_length_share_a_batch():
    lengths = {0: 100, 1: 5, 2: 99, 3: 6, 4: 5, 5: 98}
    assert list(engine._similar(lengths, 8)) == [[1, 4, 3], [5, 2, 0]]
    assert list(engine._similar(dict.fromkeys(range(5), 7), 2)) == [[0, 1], [2, 3], [4]]
    assert list(engine._similar({}, 2)) == []


def test_a_long_clip_is_read_as_it_is_computed(tmp_path, monkeypatch):
    """Not more than two buffers of windows are ever read ahead of the rows."""
    monkeypatch.setattr(engine, "_MAX_SAMPLES", 3 * 8000)
    soundfile.write(tmp_path / "long.wav", np.random.default_rng(0).normal(0, 0.1, 40 * 8000), RATE)
    read, ahead = [], []
    original = AudioReader.read
    monkeypatch.setattr(AudioReader, "read", lambda *args: (read.append(1), original(*args))[1])
    add = SumRows.add
    monkeypatch.setattr(
        SumRows, "add", lambda self, *args: (ahead.append(len(read) - self.count), add(self, *args))[1]
    )
    parts, _, _ = run(open_corpus(tmp_path / "long.wav"))
    assert parts[0, 0][-1] == {"file": "long.wav", "windows": 40}
    assert max(ahead) <= 4


def test_an_error_ends_the_run(folder):
    def fail(clip, reason):
        raise RuntimeError(f"no space left for {clip.file}")

    tasks = share_out(open_corpus(folder), 2)
    opened, left = [], []

    class Part(list):
        write = list.extend

        def __init__(self, *number):
            opened.append(number)

        def __enter__(self):
            return self

        def __exit__(self, kind, *exception):
            left.append(kind)

    with pytest.raises(RuntimeError, match=r"a\.wav"):
        engine.run(Sums(), open_corpus(folder), tasks, Part, fail, num_workers=1)
    assert (opened, left) == ([(0, 0)], [RuntimeError])


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"num_workers": -1}])
def test_options_out_of_range(folder, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        run(open_corpus(folder), **options)


def test_tasks_take_every_part_once():
    class Stream:
        num_clips, num_shards = None, 3

        def clips(self, shard, start=0, stop=None):
            return iter([Clip(f"{shard}/{row}", None) for row in range([7, 0, 4][shard])][start:stop])

    def taken(rank, world_size, done=()):
        tasks = share_out(Stream(), 2, rank, world_size, done)
        return {
            (task.shard, number): [clip.file for clip in clips]
            for task in tasks
            for number, clips in task.parts(Stream())
        }

    whole = taken(0, 1)
    assert whole[0, 3] == ["0/6"]
    assert list(whole) == [(0, 0), (0, 1), (0, 2), (0, 3), (2, 0), (2, 1)]
    for world_size in (2, 3, 5):  # fewer, as many, and more processes than shards
        shares = [taken(rank, world_size) for rank in range(world_size)]
        assert sum(map(len, shares)) == len(whole)
        assert {number: files for share in shares for number, files in share.items()} == whole
    assert list(taken(0, 1, [(0, 1), (2, 0)])) == [(0, 0), (0, 2), (0, 3), (2, 1)]
    done = [(0, 0), (0, 1), (0, 3), (2, 0)]
    assert [task.first for task in share_out(Stream(), 2, done=done)] == [2, 0, 1]  # what is done is not read again


def test_a_model_gives_the_embeddings_it_gives_alone(folder):
    """Padding and batches change nothing but the last digits."""
    from asit_hf.embed import EmbeddingJob
    from asit_hf.evaluation.embeddings import embed_files

    model, feature_extractor = build(), ASiTFeatureExtractor(num_mel_bins=MEL)
    rows = []
    job = EmbeddingJob(model, feature_extractor, pooling="mean_std_time", num_layers=2, window_seconds=0.8)

    class Part(list):
        write = list.extend

        def __init__(self, *number):
            pass

        def __enter__(self):
            return rows_writer

        def __exit__(self, *exception):
            pass

    rows_writer = type("Rows", (), {"write": staticmethod(rows.extend)})
    corpus = open_corpus([folder / name for name in SECONDS])
    engine.run(job, corpus, share_out(corpus, 6), Part, lambda *clip: None, batch_size=4)
    options = {"pooling": "mean_std_time", "num_layers": 2, "window_seconds": 0.8}
    alone = embed_files(model, feature_extractor, [folder / name for name in SECONDS], batch_size=1, **options)
    for row, one in zip(rows, alone, strict=True):
        np.testing.assert_allclose(row["embedding"], one.scene, atol=2e-5)


@pytest.mark.parametrize("choices", [CPU, ACCELERATOR])
def test_a_damaged_shard_does_not_stop_the_others(folder, choices, monkeypatch):
    class Shards:
        name, num_clips, num_shards = "shards", None, 3

        def clips(self, shard, start=0, stop=None):
            for row, name in enumerate(list(SECONDS)[start:stop]):
                if shard == 1 and row == 3:
                    raise ValueError("cannot read 1.tar, truncated")
                yield Clip(f"{shard}/{name}", folder / name)

    monkeypatch.setattr(engine, "choices_for", lambda device: choices)
    rows, written = {}, []

    class Part(list):
        write = list.extend

        def __init__(self, *number):
            rows[number] = self

        def __enter__(self):
            return self

        def __exit__(self, kind, *exception):
            if kind is None:
                written.append(next(number for number, part in rows.items() if part is self))

    with pytest.raises(ValueError, match=r"1\.tar"):
        engine.run(Sums(), Shards(), share_out(Shards(), 2), Part, lambda *clip: None, num_workers=0)
    assert sorted(written) == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1), (2, 2)]


def test_loud_audio_is_not_clipped(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "loud.wav", 40 * np.random.default_rng(0).normal(0, 1, 8000), RATE, subtype="FLOAT")
    expected, _, _ = run(open_corpus(tmp_path / "loud.wav"))
    monkeypatch.setattr(engine, "choices_for", lambda device: ACCELERATOR)
    parts, _, _ = run(open_corpus(tmp_path / "loud.wav"))
    assert parts[0, 0][0]["mean"] == pytest.approx(expected[0, 0][0]["mean"], abs=1e-3)
