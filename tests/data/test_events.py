import numpy as np
import pytest
import soundfile
import torch

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForAudioFrameClassification
from asit_hf.data.audio import AudioReadError
from asit_hf.data.events import (
    Event,
    FrameCollator,
    StronglyLabelledClips,
    cut_events,
    event_names,
    frame_targets,
    read_strong_labels,
    time_patch_edges,
    write_strong_labels,
)

DCASE = "filename\tonset\toffset\tevent_label\na.wav\t1.5\t2.25\tDog\na.wav\t0.0\t1.0\tSpeech\nquiet.wav\t\t\t\n"
AUDIOSET = "segment_id\tstart_time_seconds\tend_time_seconds\tlabel\nYx_30000\t0.5\t10.0\t/m/04rlf\n"
EVENTS = {"a.wav": [Event(0.0, 1.0, "Speech"), Event(1.5, 2.25, "Dog")], "quiet.wav": []}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (DCASE, EVENTS),
        (DCASE.replace("\t", ","), EVENTS),
        ("\ufeff" + DCASE, EVENTS),
        (AUDIOSET, {"Yx_30000": [Event(0.5, 10.0, "/m/04rlf")]}),
    ],
)
def test_tables_are_read(tmp_path, text, expected):
    path = tmp_path / "labels.tsv"
    path.write_text(text, encoding="utf-8")
    assert read_strong_labels(path) == expected


def test_written_tables_are_read_back(tmp_path):
    write_strong_labels(tmp_path / "labels.tsv", EVENTS)
    assert read_strong_labels(tmp_path / "labels.tsv") == EVENTS
    assert event_names(EVENTS) == ["Dog", "Speech"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("event_label", "what", "column event_label or label in .*filename, onset, offset, what"),
        ("\t2.25", "\t1.5", r"expected 0 <= onset < offset, got 1.5 and 1.5 in line 2 of"),
        ("\t2.25", "\tnan", "0 <= onset < offset"),
        ("\t1.5", "\t-1", "0 <= onset < offset"),
        ("\t2.25", "\tlater", "in seconds, got '1.5' and 'later' in line 2 of"),
        ("\tDog", "\t", "label for the event in line 2 of"),
        ("a.wav\t0", "\t0", "file name in line 3 of"),
    ],
)
def test_damaged_tables(tmp_path, old, new, message):
    path = tmp_path / "labels.tsv"
    path.write_text(DCASE.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_strong_labels(path)
    path.write_text(DCASE.splitlines()[0])
    with pytest.raises(ValueError, match="no rows"):
        read_strong_labels(path)


def test_edges_of_time_patches():
    edges = time_patch_edges(3, duration=0.6)
    # frames 0 to 15 cover 0 to 175 ms, and the center of the second time patch is 160 ms after 87.5 ms
    np.testing.assert_allclose(edges, [0, 0.1675, 0.3275, 0.6])
    assert time_patch_edges(3)[-1] == pytest.approx(0.4875)
    np.testing.assert_allclose(time_patch_edges(1, 0.1), [0, 0.1])
    with pytest.raises(ValueError, match="at least one time patch"):
        time_patch_edges(0)


def test_targets():
    edges = time_patch_edges(6, 1.0)
    events = [
        Event(0.25, 0.5, "long"),  # 48 % of the second time patch, all of the third
        Event(0.3, 0.32, "short"),  # less than half of any time patch
        Event(0.99, 1.0, "late"),  # after the last time patch's frames
    ]
    targets = frame_targets(events, ["late", "long", "short"], edges)
    assert targets[:, 0].tolist() == [0, 0, 0, 0, 0, 1]
    assert targets[:, 1].tolist() == [0, 0, 1, 0, 0, 0]
    assert targets[:, 2].tolist() == [0, 1, 0, 0, 0, 0]
    assert frame_targets([], ["dog"], edges).sum() == 0
    with pytest.raises(ValueError, match="among long, short; got 'late'"):
        frame_targets(events, ["long", "short"], edges)


def test_events_of_a_crop():
    events = [Event(0.0, 1.0, "before"), Event(1.5, 2.5, "into"), Event(2.2, 2.4, "within"), Event(2.5, 9.0, "out")]
    assert cut_events(events, start=2.0, duration=2.0) == [
        Event(0.0, 0.5, "into"),
        Event(2.2 - 2.0, 2.4 - 2.0, "within"),
        Event(0.5, 2.0, "out"),
    ]


@pytest.fixture
def folder(tmp_path):
    """A tone from 1 to 2 s in each clip of 3 s."""
    time = np.arange(48000) / 16000
    tone = np.where((time >= 1) & (time < 2), np.sin(2 * np.pi * 440 * time), 0)
    for name in ("a.wav", "b.flac"):
        soundfile.write(tmp_path / name, 0.5 * tone, 16000)
    return tmp_path


TONES = {"a.wav": [Event(1.0, 2.0, "tone")], "b": [Event(1.0, 2.0, "tone")]}


def test_clips_and_crops_take_their_events_along(folder):
    clips = StronglyLabelledClips(TONES, folder, 16000)
    assert len(clips) == 2
    assert clips.files[1].name == "b.flac"  # found by a name without its extension
    assert clips[1]["waveform"].shape == (48000,)
    assert (clips[1]["events"], clips[1]["duration"]) == (TONES["b"], 3.0)
    crops = StronglyLabelledClips(TONES, folder, 16000, max_seconds=1.2, train=True, seed=1)
    starts = set()
    for epoch in range(5):
        crops.set_epoch(epoch)
        item = crops[0]
        np.testing.assert_array_equal(crops[0]["waveform"], item["waveform"])
        loud = np.flatnonzero(np.abs(item["waveform"]) > 0.01)
        ((onset, offset, _),) = item["events"]
        assert onset * 16000 == pytest.approx(loud[0], abs=2)
        assert offset * 16000 == pytest.approx(loud[-1], abs=2)
        starts.add(onset)
    assert len(starts) > 1
    assert StronglyLabelledClips(TONES, folder, 16000, max_seconds=1.5)[0]["events"] == [Event(1.0, 1.5, "tone")]


def test_bad_files(folder, caplog):
    (folder / "bad.wav").write_bytes(b"no audio")
    events = {**TONES, "bad.wav": [], "gone.wav": []}
    with pytest.raises(AudioReadError, match=r"bad\.wav"):
        StronglyLabelledClips(events, folder, 16000)[2]
    lax = StronglyLabelledClips(events, folder, 16000, strict=False)
    collate = FrameCollator(ASiTFeatureExtractor(), ["tone"])
    assert len(collate([lax[0], lax[2]])["labels"]) == 1
    assert "bad.wav: Format not recognised" in caplog.text
    with pytest.raises(ValueError, match="none of the 1 clips"):
        collate([lax[2]])
    lax.drop_unreadable()
    assert lax.names == ["a.wav", "b"]
    assert "2 of 4 files" in caplog.text
    assert lax[1]["events"] == TONES["b"]
    with pytest.raises(FileNotFoundError, match="none of the 1 files"):
        StronglyLabelledClips({"gone": []}, folder, 16000)


def test_a_batch_fits_the_model_and_padding_does_not_count(folder):
    torch.manual_seed(0)
    model = ASiTForAudioFrameClassification(
        ASiTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=2)
    ).eval()
    collate = FrameCollator(ASiTFeatureExtractor(), ["other", "tone"])
    clips = StronglyLabelledClips(TONES, folder, 16000)
    waveform = clips[0]["waveform"][:20000]
    short = {"waveform": waveform, "duration": 1.25, "events": [Event(1, 1.25, "tone")], "index": 1}
    batch = collate([clips[0], short])
    assert batch["labels"].shape == (2, 298 // 16, 2)
    assert (batch["labels"][1, 123 // 16 :] == -100).all()
    # the tone covers time patches 6 to 11, and less than half of 5 and 12
    assert batch["labels"][0, :, 1].nonzero().flatten().tolist() == list(range(6, 12))
    alone = [collate([item]) for item in (clips[0], short)]
    with torch.no_grad():
        together = model(**batch).loss
        losses = [float(model(**one).loss) for one in alone]
    time_patches = [298 // 16, 123 // 16]
    assert float(together) == pytest.approx(np.average(losses, weights=time_patches), abs=1e-5)
