import numpy as np
import pytest
from sounds import RATE, ramp

from asit_hf.data.audio import AudioReadError
from asit_hf.data.clips import LabelledClips
from asit_hf.data.datasets import load_audio_dataset


def labelled(clips, labels):
    return load_audio_dataset(clips[0]).from_dict({"audio": clips, "label": labels})


def test_labelled_clips(clips):
    dataset = LabelledClips(labelled(clips[:3], [2, 0, 1]), RATE)
    assert len(dataset) == 3
    item = dataset[1]
    assert (item["label"], item["index"]) == (0, 1)
    np.testing.assert_array_equal(item["waveform"], ramp(2) + np.float32(1 / 2**4))
    assert "label" not in LabelledClips(clips[:3], RATE)[0]


def test_labelled_clips_of_at_most_some_seconds(clips):
    beginning = LabelledClips(clips[:1] * 50, RATE, max_seconds=0.5)
    np.testing.assert_array_equal(beginning[0]["waveform"], ramp(0.5))
    drawn = LabelledClips(clips[:1] * 50, RATE, max_seconds=0.5, train=True)
    starts = [round(float(drawn[index]["waveform"][0]) * 2**20) for index in range(50)]
    assert all(len(drawn[index]["waveform"]) == 4000 for index in range(50))
    assert len(set(starts)) > 40
    assert max(starts) > 9000
    np.testing.assert_array_equal(drawn[5]["waveform"], drawn[5]["waveform"])
    before = drawn[5]["waveform"]
    drawn.set_epoch(1)
    assert not np.array_equal(drawn[5]["waveform"], before)
    assert len(LabelledClips(clips[:1], RATE, max_seconds=5, train=True)[0]["waveform"]) == 16000
    with pytest.raises(ValueError, match="max_seconds above 0, got -1"):
        LabelledClips(clips, RATE, max_seconds=-1)


def test_labelled_clips_that_cannot_be_read(clips):
    with pytest.raises(AudioReadError, match=r"03\.wav"):
        LabelledClips(labelled(clips, list(range(12))), RATE)[3]
    item = LabelledClips(labelled(clips, list(range(12))), RATE, strict=False)[3]
    assert item == {"index": 3, "label": 3, "bad_files": [(clips[3], "Format not recognised")]}
