import numpy as np
import pytest
import soundfile

from asit_hf.data.audio import AudioReader, AudioReadError, read_audio
from asit_hf.data.windows import Windows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds")
    noise = np.random.default_rng(0).normal(0, 0.1, 44100)
    for name in ("a.wav", "a.flac", "a.mp3"):
        soundfile.write(folder / name, noise, 44100)
    return folder


def spans(path, *args, **options):
    with AudioReader(path) as reader:
        return [(start, len(samples), is_last) for start, samples, is_last in Windows(*args, **options).read(reader)]


def test_which_windows_a_clip_has(folder):
    path = folder / "a.wav"
    assert spans(path, 1000, 400, 200) == [(0, 400, False), (200, 400, False), (400, 400, False), (600, 400, True)]
    assert spans(path, 1000, 450, 450) == [(0, 450, False), (450, 450, False), (550, 450, True)]
    assert spans(path, 1000, 1000, 500) == [(0, 1000, True)]
    assert spans(path, 1000, 1500, 500) == [(0, 1000, True)]
    assert spans(path, 1000, 310, 300, shortest=100) == [
        (0, 310, False),
        (300, 310, False),
        (600, 310, False),
        (900, 100, True),
    ]
    assert spans(path, 1000, 310, 300, shortest=101) == [(0, 310, False), (300, 310, False), (600, 310, True)]
    assert spans(path, 1000, 310, 300, shortest=101, limit=450) == [(0, 310, False), (300, 150, True)]
    assert spans(path, 1000, 310, 300, limit=40, shortest=101) == [(0, 40, True)]


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
@pytest.mark.parametrize("rate", [44100, 16000])
def test_overlapping_windows_are_read_once(folder, name, rate, monkeypatch):
    whole, asked = read_audio(folder / name, rate), []
    read = AudioReader.read
    monkeypatch.setattr(AudioReader, "read", lambda *args: (asked.append(args[3]), read(*args))[1])
    with AudioReader(folder / name) as reader:
        for start, waveform, _ in Windows(rate, 6000, 1500).read(reader):
            np.testing.assert_allclose(waveform, whole[start : start + 6000], atol=1e-5)
    assert sum(asked) == rate


class Estimated:
    """A reader whose length is an estimate until a read has passed the end, as that of an mp3."""

    def __init__(self, estimate, total):
        self.estimate, self.total = estimate, total

    def num_samples(self, sampling_rate):
        return self.estimate

    def read(self, sampling_rate, start, length):
        if start + length > self.total:
            self.estimate = self.total
        if start >= self.total:
            raise AudioReadError("cut.mp3", "nothing to read")
        return np.arange(start, min(start + length, self.total), dtype=np.float32)


@pytest.mark.parametrize(
    ("total", "expected"),
    [
        (899, [(0, 400), (200, 400), (400, 400), (600, 299)]),
        (800, [(0, 400), (200, 400), (400, 400)]),
        (650, [(0, 400), (200, 400), (400, 250)]),
        (10, [(0, 10)]),
    ],
)
def test_files_that_end_before_their_header_says(total, expected):
    windows = list(Windows(1000, 400, 200).read(Estimated(2000, total)))
    assert [(start, len(waveform)) for start, waveform, _ in windows] == expected
    assert [is_last for _, _, is_last in windows] == [False] * (len(expected) - 1) + [True]
    for start, waveform, _ in windows:
        np.testing.assert_array_equal(waveform, np.arange(start, start + len(waveform)))


def test_damaged_files(folder, tmp_path):
    content = (folder / "a.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(content[: len(content) * 2 // 3])
    found = []
    with pytest.raises(AudioReadError, match=r"cut\.flac"), AudioReader(tmp_path / "cut.flac") as reader:
        found.extend(start for start, _, is_last in Windows(16000, 6000, 1500).read(reader) if not is_last)
    # all that can be read: 2/3 of 1 s, in blocks
    assert found == list(range(0, found[-1] + 1, 1500))
    with AudioReader(tmp_path / "cut.flac") as reader:
        reader.read(16000, found[-1], 6000)
    with pytest.raises(AudioReadError), AudioReader(tmp_path / "cut.flac") as reader:
        reader.read(16000, found[-1] + 1500, 6000)
