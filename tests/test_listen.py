"""Windows of audio that goes on arriving, and the command that prints their labels."""

import csv
import io
import json
import os
import signal
import sys
import threading
from datetime import datetime, timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from tiny import MEL, build
from transformers.pipelines import audio_utils

from asit_hf import ASiTAudioClassificationPipeline, ASiTFeatureExtractor, ASiTForAudioClassification
from asit_hf.data.audio import AudioReadError, read_audio
from asit_hf.listen import default_window_seconds, listen, main

RATE = 8000
LABELS = {0: "dog", 1: "rain, heavy", 2: "bell", 3: "siren", 4: "wind"}


def make_classifier(rate: int = RATE, **config) -> ASiTAudioClassificationPipeline:
    model = build(ASiTForAudioClassification, id2label=LABELS, **config)
    return ASiTAudioClassificationPipeline(
        model=model, feature_extractor=ASiTFeatureExtractor(num_mel_bins=MEL, sampling_rate=rate)
    )


def make_sound(seconds: float, rate: int = RATE) -> np.ndarray:
    """A rising tone with pulses of noise: its windows differ."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(0).standard_normal(len(time)) * (time % 1 < 0.3)
    return (0.3 * np.sin(2 * np.pi * (300 + 150 * time) * time) + 0.1 * noise).astype(np.float32)


def in_chunks(sound: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    """Chunks of these sizes, in turn."""
    borders, index = [0], 0
    while borders[-1] < len(sound):
        borders.append(borders[-1] + sizes[index % len(sizes)])
        index += 1
    return [sound[first:last] for first, last in zip(borders, borders[1:])]


def assert_same_windows(windows: list[dict], timeline: list[dict], tolerance: float = 1e-6) -> None:
    assert [(one["start"], one["end"]) for one in windows] == [(one["start"], one["end"]) for one in timeline]
    for one, expected in zip(windows, timeline):
        scores = {label["label"]: label["score"] for label in expected["labels"]}
        assert {label["label"]: label["score"] for label in one["labels"]} == pytest.approx(scores, abs=tolerance)
        assert [label["score"] for label in one["labels"]] == sorted(
            (label["score"] for label in one["labels"]), reverse=True
        )


@pytest.fixture(scope="module")
def classifier() -> ASiTAudioClassificationPipeline:
    return make_classifier()


@pytest.fixture(scope="module")
def folder(classifier, tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier")
    classifier.model.save_pretrained(path)
    classifier.feature_extractor.save_pretrained(path)
    return path


class FakeClassifier:
    """Every window takes `seconds` of a fake clock, after which `during` is called; the rehearsal does not count."""

    def __init__(self, seconds: float, during=lambda: None):
        self.feature_extractor = SimpleNamespace(sampling_rate=RATE)
        self.model = SimpleNamespace(config=SimpleNamespace(num_frames=100))
        self.seconds, self.during, self.now, self.windows = seconds, during, 0.0, -1

    def __call__(self, sound, **options):
        self.windows += 1
        if self.windows > 0:
            self.now += self.seconds
            self.during()
        return [{"score": 1.0, "label": "rain"}]


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize(
    ("seconds", "window", "hop", "sizes"),
    [
        (3.0, 1.0, 0.5, [400]),
        (2.987, 0.7, 0.25, [1, 333, 5000, 17]),
        (2.5, 1.0, 1.0, [100000]),
        (0.6, 1.0, 0.5, [100]),
        (1.0, 1.0, 0.1, [8000]),
    ],
)
def test_windows_are_those_of_the_pipeline(classifier, seconds, window, hop, sizes, live):
    sound = make_sound(seconds)
    options = {"window_seconds": window, "overlap": 1 - hop / window, "return_timeline": True, "top_k": None}
    chunks = in_chunks(sound, sizes)
    windows = listen(classifier, chunks, window_seconds=window, hop_seconds=hop, live=live, clock=lambda: 0.0)
    assert_same_windows(list(windows), classifier(sound, **options)["timeline"])


@pytest.mark.parametrize(
    ("rate", "chunk_rate", "config"),
    [(16000, 16000, {}), (32000, 44100, {}), (16000, 8000, {"problem_type": "multi_label_classification"})],
)
def test_chunks_of_any_rate_and_kind_are_resampled_without_seams(rate, chunk_rate, config):
    classifier = make_classifier(rate, **config)
    pcm = np.round(make_sound(2.2, chunk_rate) * 32767).astype(np.int16)
    whole = {"array": pcm, "sampling_rate": chunk_rate}
    timeline = classifier(whole, window_seconds=1.0, overlap=0.5, return_timeline=True, top_k=None)["timeline"]
    for chunks in (in_chunks(pcm, [chunk_rate // 20]), map(torch.from_numpy, in_chunks(pcm, [999, 1])), [[], pcm, []]):
        windows = list(listen(classifier, chunks, chunk_rate, 1.0, live=False))
        assert_same_windows(windows, timeline, 1e-4)


def test_windows_are_as_long_as_training_crops_but_at_least_a_second(classifier):
    assert default_window_seconds(classifier.model.config) == 1.0
    assert default_window_seconds(make_classifier(num_frames=208).model.config) == pytest.approx(2.08)
    spans = [(one["start"], one["end"]) for one in listen(classifier, [make_sound(2)], live=False)]
    assert spans == [(0.0, 1.0), (0.5, 1.5), (1.0, 2.0)]


@pytest.mark.parametrize("live", [False, True])
def test_input_without_samples_is_an_error(classifier, live):
    with pytest.raises(AudioReadError, match="no samples"):
        list(listen(classifier, [np.zeros(0, np.float32)], live=live))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"window_seconds": 0.01}, "window_seconds.*0.025.*0.01"),
        ({"window_seconds": float("nan")}, "window_seconds"),
        ({"hop_seconds": 0}, "hop_seconds.*0"),
        ({"window_seconds": 1.0, "hop_seconds": 1.5}, "hop_seconds.*1.0.*1.5"),
        ({"smoothing": 0}, "smoothing.*0"),
        ({"sampling_rate": 8000.5}, "8000.5"),
    ],
)
def test_options_out_of_range_are_refused(classifier, options, match):
    with pytest.raises(ValueError, match=match):
        next(listen(classifier, [make_sound(2)], live=False, **options))


def test_smoothing_averages_the_latest_windows(classifier):
    sound = [make_sound(3)]
    single, smooth = (list(listen(classifier, sound, smoothing=count, live=False)) for count in (1, 3))
    scores = [{label["label"]: label["score"] for label in one["labels"]} for one in single]
    for index, window in enumerate(smooth):
        latest = scores[max(0, index - 2) : index + 1]
        means = {label: np.mean([one[label] for one in latest]) for label in LABELS.values()}
        assert {one["label"]: one["score"] for one in window["labels"]} == pytest.approx(means)
        assert window["labels"][0]["label"] == max(means, key=means.get)


def test_a_slow_model_skips_to_the_newest_window():
    """A window takes 4 s, in which 8 chunks of 0.5 s arrive; a window begins every 0.5 s."""
    due, taken = threading.Semaphore(0), threading.Semaphore(0)

    def source():
        for index in range(26):
            if index < 2:
                slow.now += 0.5
            else:
                due.acquire()
            yield np.ones(RATE // 2, np.float32)
            if index >= 2:
                taken.release()

    def deliver():
        for _ in range(8):
            slow.now += 0.5
            if slow.windows < 4:  # there are no more chunks
                due.release()
                taken.acquire()

    slow = FakeClassifier(0.0, deliver)
    windows = list(listen(slow, source(), clock=lambda: slow.now))
    assert [(one["start"], one["skipped"]) for one in windows] == [(0.0, 0), (4.0, 7), (8.0, 7), (12.0, 7)]
    assert [one["latency"] for one in windows] == [4.0] * 4


def test_bursts_do_not_skip_windows():
    """Two seconds arrive at once, every two seconds, as from PulseAudio; a window takes 0.1 s."""
    idle = threading.Condition()

    def classified():
        with idle:
            idle.notify()

    fast = FakeClassifier(0.1, classified)

    def source():
        for index in range(1, 7):
            fast.now = 2.0 * index
            yield np.ones(2 * RATE, np.float32)
            with idle:
                idle.wait_for(lambda: fast.windows == 4 * index - 1)  # noqa: B023

    windows = list(listen(fast, source(), clock=lambda: fast.now))
    assert [one["start"] for one in windows] == [0.5 * index for index in range(23)]
    assert not any(one["skipped"] for one in windows)
    assert max(one["latency"] for one in windows) == pytest.approx(0.4)


@pytest.mark.parametrize("seconds", [0.01, 2.0])
def test_audio_faster_than_real_time_waits(seconds):
    """As from a file in a pipe: nothing is skipped, also if a window takes longer than a hop."""
    exhausted = threading.Event()

    def source():
        yield from in_chunks(np.ones(60 * RATE, np.float32), [RATE])
        exhausted.set()

    def classified():
        exhausted.wait()
        waits.now += seconds

    waits = FakeClassifier(0.0, classified)
    windows = list(listen(waits, source(), clock=lambda: waits.now))
    assert [one["start"] for one in windows] == [0.5 * index for index in range(119)]
    assert not any(one["skipped"] for one in windows)
    assert [one["latency"] for one in windows] == pytest.approx([seconds] * 119)  # without the time in the queue


@pytest.mark.parametrize("live", [False, True])
def test_an_error_of_the_source_comes_after_the_windows_before_it(classifier, live):
    def source():
        yield make_sound(2.2)
        raise AudioReadError("the microphone", "unplugged")

    windows = listen(classifier, source(), live=live, clock=lambda: 0.0)
    assert [next(windows)["start"] for _ in range(3)] == [0.0, 0.5, 1.0]
    with pytest.raises(AudioReadError, match="unplugged"):
        next(windows)


def test_a_source_is_closed_with_the_windows(classifier):
    closed = threading.Event()

    def endless():
        try:
            while True:
                yield make_sound(0.5)
        finally:
            closed.set()

    windows = listen(classifier, endless())
    next(windows)
    windows.close()
    assert closed.wait(10)


def test_samples_that_are_not_finite_are_an_error(classifier):
    with pytest.raises(ValueError, match="not finite"):
        list(listen(classifier, [np.full(RATE, np.nan)], live=False))


def test_digital_silence_is_reported_once(classifier, caplog):
    sound = np.concatenate([make_sound(1), np.zeros(3 * RATE, np.float32)])
    assert len(list(listen(classifier, [sound], live=False))) == 7
    assert [record.getMessage().count("1.00 s") for record in caplog.records] == [1]


def window(start: float, end: float, **scores: float) -> dict:
    labels = [{"score": score, "label": label} for label, score in scores.items()]
    return {"start": start, "end": end, "labels": sorted(labels, key=lambda one: -one["score"])}


@pytest.fixture
def recording(tmp_path):
    path = tmp_path / "recording.wav"
    soundfile.write(path, make_sound(2.4), RATE)
    return path


def test_the_command_writes_every_window(folder, classifier, recording, tmp_path, capsys):
    timeline = classifier(read_audio(recording, RATE), window_seconds=1, return_timeline=True, top_k=None)["timeline"]
    arguments = [str(folder), str(recording), "--speed", "inf", "--top_k", "2", "--output"]
    assert main([*arguments, str(tmp_path / "windows.csv")]) == 0
    assert main([*arguments, str(tmp_path / "windows.jsonl")]) == 0
    with (tmp_path / "windows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (tmp_path / "windows.jsonl").read_text().splitlines()]
    assert [float(row["start"]) for row in rows] == [one["start"] for one in timeline for _ in range(2)]
    expected = [label for one in timeline for label in one["labels"][:2]]
    assert [(row["label"], float(row["score"])) for row in rows] == [
        (label["label"], pytest.approx(label["score"], abs=1e-6)) for label in expected
    ]
    assert [row["rank"] for row in rows] == ["1", "2"] * len(timeline)
    assert_same_windows(lines, [{**one, "labels": one["labels"][:2]} for one in timeline])
    printed = capsys.readouterr()
    assert f"{len(timeline)} windows of 1 s" in printed.err
    assert " 0 skipped" in printed.err
    assert printed.out.splitlines()[0].endswith(timeline[0]["labels"][0]["label"])
    assert "\r" not in printed.out


def test_the_file_is_complete_after_every_window(folder, recording, tmp_path, monkeypatch):
    """A kill at any time loses nothing: each window is in the file before the next one is classified."""
    output, seen = tmp_path / "windows.csv", []

    def watched(*args, **kwargs):
        for one in listen(*args, **kwargs):
            yield one
            seen.append(output.read_text().count("\n"))

    monkeypatch.setattr("asit_hf.listen.listen", watched)
    assert main([str(folder), str(recording), "--speed", "inf", "--top_k", "1", "--output", str(output)]) == 0
    assert seen == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("options", "form", "subtype"),
    [
        ([], "WAV", "PCM_16"),
        (["--channels", "2", "--sampling_rate", "11025", "--sample_format", "f32le"], "RAW", "FLOAT"),
    ],
)
def test_standard_input(folder, classifier, monkeypatch, capsys, tmp_path, options, form, subtype):
    sound = make_sound(1.4, 11025)
    contents = {"RAW": io.BytesIO(), "WAV": io.BytesIO()}
    for kind, content in contents.items():
        soundfile.write(content, np.stack([sound, 0.5 * sound], axis=1), 11025, format=kind, subtype=subtype)
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as pipe:
        writer = threading.Thread(target=lambda: (os.write(writing, contents[form].getvalue()), os.close(writing)))
        writer.start()
        monkeypatch.setattr(sys, "stdin", pipe)
        assert main([str(folder), "-", *options, "--output", str(tmp_path / "windows.jsonl")]) == 0
        writer.join()
    lines = [json.loads(line) for line in (tmp_path / "windows.jsonl").read_text().splitlines()]
    whole = classifier(contents["WAV"].getvalue(), window_seconds=1, return_timeline=True)
    assert_same_windows(lines, whole["timeline"], 1e-4)
    assert "2 windows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--output", "windows.txt"], "windows.txt"),
        (["--channels", "0"], "channels.*0"),
        (["file.wav", "--speed", "0"], "speed.*0"),
        (["file.wav", "--top_k", "0", "--output", "windows.csv"], "top_k.*0"),
        (["file.wav", "--top_k", "2"], "top_k.*output"),
        (["-", "--speed", "2"], "speed.*standard input"),
        (["file.wav", "--microphone", "1"], "microphone.*file.wav"),
        (["file.wav", "--channels", "2"], "channels.*file.wav"),
        (["file.wav", "--threshold", "1.5"], "threshold.*1.5"),
        (["--sample_format", "u8"], "sample_format.*microphone"),
        (["no_such_file.wav"], "no_such_file.wav"),
        (["file.wav", "--hop_seconds", "9"], "hop_seconds.*9"),
        (["--sampling_rate", "-1"], "-1"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(folder, arguments, match, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    soundfile.write("file.wav", make_sound(1), RATE)
    assert main([str(folder), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ")
    for part in match.split(".*"):
        assert part in error


def test_the_command_refuses_a_regression_model(tmp_path, capsys):
    classifier = make_classifier(problem_type="regression")
    classifier.model.save_pretrained(tmp_path)
    classifier.feature_extractor.save_pretrained(tmp_path)
    assert main([str(tmp_path), "-"]) == 1
    assert "regression" in capsys.readouterr().err


def test_what_was_heard_before_an_error_is_shown(folder, recording, tmp_path, capsys, monkeypatch):
    def damaged(*args, **kwargs):
        yield make_sound(1.2)
        raise AudioReadError("recording.wav", "damaged")

    monkeypatch.setattr("asit_hf.listen.play", damaged)
    assert main([str(folder), str(recording)]) == 1
    printed = capsys.readouterr()
    assert "timeline" in printed.out
    assert "1 windows" in printed.err
    assert printed.err.splitlines()[-1] == "error: cannot read recording.wav: damaged"


@pytest.mark.parametrize(
    ("options", "expected"),
    [([], (RATE, None, 1)), (["--microphone", "3", "--channels", "2", "--sampling_rate", "44100"], (44100, 3, 2))],
)
def test_the_microphone(folder, monkeypatch, capsys, options, expected):
    def record(*args):
        assert args == expected
        return 44100, iter(in_chunks(make_sound(1.2, 44100), [2205]))

    monkeypatch.setattr("asit_hf.listen.record", record)
    assert main([str(folder), *options]) == 0
    assert "2 windows" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_with_the_timeline(folder, recording, monkeypatch, capsys, number):
    def interrupted(*args, **kwargs):
        yield window(0, 1, dog=0.8) | {"latency": 0.5, "skipped": 3}
        os.kill(os.getpid(), number)
        yield window(0, 1, rain=0.8) | {"latency": 0.5, "skipped": 0}

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("asit_hf.listen.listen", interrupted)
    # a process in the background ignores Ctrl-C
    ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main([str(folder), str(recording)]) == 0
    finally:
        signal.signal(signal.SIGINT, ctrl_c)
    printed = capsys.readouterr()
    assert printed.out.splitlines()[1:] == ["timeline:", "0:00:00.00 - 0:00:01.00  0.80  dog"]
    assert "3 skipped" in printed.err
    assert "500 ms" in printed.err
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_closed_output_ends_the_command(folder, recording, monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert main([str(folder), str(recording), "--speed", "inf"]) == 0
    assert "1 windows" in capsys.readouterr().err


def test_output_that_closes_before_the_timeline_ends_the_command(folder, recording, monkeypatch, capsys):
    """As `| head -1` does it, for a label that does not change."""
    reading, writing = os.pipe()

    def closing(*args, **kwargs):
        yield window(0, 1, dog=0.8) | {"latency": 0.5, "skipped": 0}
        os.close(reading)

    monkeypatch.setattr("asit_hf.listen.listen", closing)
    with os.fdopen(writing, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert main([str(folder), str(recording)]) == 0
    printed = capsys.readouterr().err
    assert "1 windows" in printed
    assert "error" not in printed


def test_labels_of_a_multi_label_classifier_rise_and_fall(tmp_path, recording, monkeypatch, capsys):
    classifier = make_classifier(problem_type="multi_label_classification")
    classifier.model.save_pretrained(tmp_path)
    classifier.feature_extractor.save_pretrained(tmp_path)
    windows = [window(0, 1, dog=0.8, rain=0.6), window(1, 2, dog=0.7, rain=0.4), window(2, 3, dog=0.1, rain=0.5)]
    facts = {"latency": 0.01, "skipped": 0}
    monkeypatch.setattr("asit_hf.listen.listen", lambda *args: (one | facts for one in windows))
    assert main([str(tmp_path), str(recording)]) == 0
    changes = capsys.readouterr().out.split("timeline:")[0].splitlines()
    assert [line.split()[-2:] for line in changes] == [
        ["+", "dog"],
        ["+", "rain"],
        ["-", "rain"],
        ["-", "dog"],
        ["+", "rain"],
    ]


@pytest.mark.parametrize("options", [{}, {"stride_length_s": (0.2, 0.1)}, {"format_for_conversion": "s16le"}])
def test_the_pipeline_takes_the_chunks_of_transformers_microphone(classifier, monkeypatch, options):
    """`ffmpeg_microphone_live` itself, but for ffmpeg: partial chunks, with strides, in two sample formats."""
    sound = make_sound(1.25)
    pulled = []
    if "format_for_conversion" in options:
        sound = np.round(sound * 32767).astype(np.int16)

    def stream(command, size):
        content = sound.tobytes()
        for first in range(0, len(content), size):
            pulled.append(first)
            yield content[first : first + size]

    monkeypatch.setattr(audio_utils, "_ffmpeg_stream", stream)
    now = datetime(2026, 1, 1)  # the generator leaves out chunks when it is late
    clock = SimpleNamespace(datetime=SimpleNamespace(now=lambda: now), timedelta=timedelta)
    monkeypatch.setattr(audio_utils, "datetime", clock)
    make = lambda: audio_utils.ffmpeg_microphone_live(RATE, 0.75, stream_chunk_s=0.25, **options)  # noqa: E731
    chunks = list(make())
    assert any(chunk["partial"] for chunk in chunks)
    assert not all(chunk["partial"] for chunk in chunks)
    pulled.clear()
    results = []
    for result in classifier(make(), top_k=None):
        results.append(result)
        assert len(pulled) <= len(results)  # no chunk is awaited before the labels of the one before
    assert results == classifier(chunks, top_k=None)
    assert results == [
        classifier({"array": np.array(one["raw"]), "sampling_rate": RATE}, top_k=None) for one in chunks
    ]
