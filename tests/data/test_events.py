import numpy as np
import pytest
import soundfile
import torch

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForAudioFrameClassification
from asit_hf.data.audio import AudioReadError
from asit_hf.data.event_tables import Event
from asit_hf.data.events import (
    FrameCollator,
    StronglyLabelledClips,
    cut_events,
    frame_targets,
    time_patch_edges,
    warn_of_unlabelled_files,
)


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
    assert "1 of 4 files" in caplog.text
    assert "1 of 3 files" in caplog.text
    assert lax[1]["events"] == TONES["b"]
    with pytest.raises(FileNotFoundError, match="none of the 1 files"):
        StronglyLabelledClips({"gone": []}, folder, 16000)


def test_times_beyond_the_clip_are_counted(folder, caplog):
    events = {
        "a.wav": [Event(1.0, 2.0, "in"), Event(2.5, 4.0, "over"), Event(3.0, 4.0, "out"), Event(1.0, 3.005, "in")]
    }
    clips = StronglyLabelledClips(events | {"b": []}, folder, 16000)
    clips.cut_to_durations()
    assert clips.events[0] == [Event(1.0, 2.0, "in"), Event(1.0, 3.0, "in"), Event(2.5, 3.0, "over")]
    assert "dropped 1 of 4" in caplog.text
    assert "a.wav: 3 to 4 s, clip of 3 s" in caplog.text
    assert "cut 1 of 4" in caplog.text
    assert "a.wav: 2.5 to 4 s" in caplog.text
    late = StronglyLabelledClips({"a.wav": [Event(1000, 2000, "ms")], "b": []}, folder, 16000)
    with pytest.raises(ValueError, match=r"all 1 events .*a\.wav: 1000 to 2000 s, clip of 3 s.*onset_ms"):
        late.cut_to_durations()
    StronglyLabelledClips({"a.wav": []}, folder, 16000).cut_to_durations()


def test_files_are_found_by_path_or_name(folder, caplog):
    for name in ("deep/c.wav", "one/d.wav", "two/d.wav", "e.wav"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((folder / "a.wav").read_bytes())
    names = ["c.wav", "one/d", "C:\\recordings\\b.flac", "/gone/a", "d.wav"]
    clips = StronglyLabelledClips({name: [Event(0, 1, name)] for name in names}, folder, 16000)
    files = [file.relative_to(folder).as_posix() for file in clips.files[:4]]
    assert files == ["deep/c.wav", "one/d.wav", "b.flac", "a.wav"]
    clips.drop_unreadable()
    assert "1 of 5 files" in caplog.text
    assert "first d.wav" in caplog.text  # in two folders
    warn_of_unlabelled_files(clips, clips)
    assert "2 audio files" in caplog.text
    assert str(folder / "e.wav") in caplog.text


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
