import io
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile as sf
import torch
from torch.utils.data import DataLoader

from asit_hf.data import LabelledClips
from asit_hf.data.audio import (
    AudioReader,
    AudioReadError,
    audio_info,
    encode_audio,
    read_audio,
    resample,
    to_mono_float,
)

FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}


def sweep(seconds: float, rate: int) -> np.ndarray:
    """A rising tone with a beat: no two windows of it are alike."""
    time = np.arange(round(seconds * rate)) / rate
    return (0.4 * np.sin(2 * np.pi * (150 * time + 40 * time**2)) * (0.6 + 0.4 * np.cos(3 * time))).astype(np.float32)


def write(path, samples: np.ndarray, rate: int, extension: str = "wav"):
    kind, subtype = FORMATS[extension]
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    with sf.SoundFile(path, "w", rate, channels, subtype, format=kind) as file:
        for start in range(0, len(samples), 4096):
            file.write(samples[start : start + 4096])
    return path


@pytest.fixture(scope="module", params=FORMATS)
def encoded(request, tmp_path_factory):
    rate = 48000 if request.param == "opus" else 44100
    path = tmp_path_factory.mktemp("audio") / f"sweep.{request.param}"
    return write(path, sweep(12, rate), rate, request.param)


def test_every_format_reads_from_path_and_bytes(encoded):
    expected = sweep(12, 16000)
    content = encoded.read_bytes()
    waveform = read_audio(encoded, 16000)
    assert waveform.dtype == np.float32
    assert waveform.shape == (12 * 16000,)
    # Lossy coders change the samples, not the tone.
    assert np.corrcoef(waveform, expected)[0, 1] > 0.98
    sources = (
        str(encoded),
        content,
        bytearray(content),
        {"path": str(encoded), "bytes": None},
        {"path": "x", "bytes": content},
    )
    for source in (*sources, f"file://{encoded}"):
        np.testing.assert_array_equal(read_audio(source, 16000), waveform)


def test_info(encoded):
    info = audio_info(encoded)
    assert info.sampling_rate in (44100, 48000)
    assert info.num_channels == 1
    assert info.num_samples == 12 * info.sampling_rate
    assert info.duration == 12.0


@pytest.mark.parametrize("rate", [16000, 22050, 48000])
def test_a_window_equals_the_same_seconds_of_the_whole(encoded, rate):
    whole = read_audio(encoded, rate)
    offsets = [0.0, 0.01, 3.3333, 7.7, 10.99, 11.5, 11.9, *np.random.default_rng(0).uniform(0, 11.9, 5)]
    for offset in offsets:
        start, stop = round(offset * rate), round((offset + 0.7) * rate)
        np.testing.assert_allclose(read_audio(encoded, rate, offset, 0.7), whole[start:stop], atol=1e-3)


def test_odd_rates_keep_windows_in_step(tmp_path):
    path = write(tmp_path / "odd.wav", sweep(6, 11127), 11127)
    whole = read_audio(path, 16000)
    np.testing.assert_allclose(read_audio(path, 16000, 3.21, 1.0), whole[51360:67360], atol=1e-3)


def test_long_files_cost_by_the_window(tmp_path, monkeypatch):
    decoded = []
    read = sf.SoundFile.read
    monkeypatch.setattr(sf.SoundFile, "read", lambda self, n=-1, *a, **k: decoded.append(n) or read(self, n, *a, **k))
    path = write(tmp_path / "long.flac", sweep(60, 8000), 8000, "flac")
    assert len(read_audio(path, 16000, 40.0, 2.0)) == 32000
    assert sum(decoded) < 3 * 8000


def test_windows_past_the_end(encoded):
    assert len(read_audio(encoded, 16000, 11.5, 5.0)) == 8000
    for offset in (12.0, 30.0):
        with pytest.raises(AudioReadError, match=r"it lasts 12\.000 s"):
            read_audio(encoded, 16000, offset, 1.0)


@pytest.mark.parametrize(("offset", "duration"), [(-1.0, None), (0.0, 0.0), (0.0, -2.0)])
def test_impossible_windows(encoded, offset, duration):
    with pytest.raises(ValueError, match="offset >= 0 and duration > 0"):
        read_audio(encoded, 16000, offset, duration)


def test_stereo_is_averaged(tmp_path):
    left, right = sweep(1, 16000), np.full(16000, 0.25, np.float32)
    path = write(tmp_path / "stereo.wav", np.stack([left, right], axis=1), 16000)
    np.testing.assert_allclose(read_audio(path, 16000), (left + right) / 2, atol=1e-4)
    assert audio_info(path).num_channels == 2


def test_float_files_and_offsets_are_left_as_they_are(tmp_path):
    samples = sweep(0.5, 16000) * 5 + 1
    sf.write(tmp_path / "loud.wav", samples, 16000, subtype="FLOAT")
    np.testing.assert_array_equal(read_audio(tmp_path / "loud.wav", 16000), samples)


def test_arrays_and_decoders():
    samples = sweep(1, 8000)
    expected = resample(samples, 8000, 16000)
    decoder = SimpleNamespace(
        get_all_samples=lambda: SimpleNamespace(data=torch.from_numpy(np.stack([samples, samples])), sample_rate=8000)
    )
    for source in (
        {"array": samples, "sampling_rate": 8000},
        {"raw": samples.tolist(), "sampling_rate": 8000},
        {"array": torch.from_numpy(samples).double(), "sampling_rate": 8000, "path": None},
        decoder,
    ):
        np.testing.assert_allclose(read_audio(source, 16000), expected, atol=1e-6)
    assert audio_info(decoder).num_channels == 2
    np.testing.assert_allclose(
        read_audio({"array": samples, "sampling_rate": 8000}, 16000, 0.25, 0.5), expected[4000:12000], atol=1e-3
    )


def promising(ogg: bytes, samples: int) -> bytes:
    """With a last page that says the stream is `samples` longer than it is."""
    page = bytearray(ogg[(start := ogg.rindex(b"OggS")) :])
    page[6:14] = (int.from_bytes(page[6:14], "little") + samples).to_bytes(8, "little")
    page[22:26] = bytes(4)
    checksum = 0
    for byte in page:
        checksum ^= byte << 24
        for _ in range(8):
            checksum = (checksum << 1 ^ 0x04C11DB7 * (checksum >> 31)) & 0xFFFFFFFF
    page[22:26] = checksum.to_bytes(4, "little")
    return ogg[:start] + page


def test_vorbis_that_declares_a_little_more_than_it_has(tmp_path):
    ogg = write(tmp_path / "a.ogg", sweep(20, 44100), 44100, "ogg").read_bytes()
    whole, longer = read_audio(ogg, 44100), promising(ogg, 1105)
    with AudioReader(longer) as reader:
        assert reader.info.num_samples == len(whole) + 1105
    np.testing.assert_array_equal(read_audio(longer, 44100)[: len(whole)], whole)
    with pytest.raises(AudioReadError, match="none from 88"):
        read_audio(promising(ogg, 100000), 44100)


def damaged_sources(tmp_path):
    wav = write(tmp_path / "a.wav", sweep(2, 16000), 16000).read_bytes()
    flac = write(tmp_path / "a.flac", sweep(2, 16000), 16000, "flac").read_bytes()
    ogg = write(tmp_path / "a.ogg", sweep(20, 44100), 44100, "ogg").read_bytes()
    noise = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes()
    middle = len(ogg) // 2
    broken = io.BytesIO()
    sf.write(broken, np.array([0.1, np.nan, 0.2]), 16000, subtype="FLOAT", format="WAV")
    empty = io.BytesIO()
    sf.write(empty, np.zeros(0), 16000, format="WAV")
    return {
        "no such file": tmp_path / "missing.wav",
        "directory": tmp_path,
        "empty$": b"",
        "ormat": noise,
        "no samples": empty.getvalue(),
        "64000 bytes of audio, it has 31978": wav[: len(wav) // 2],
        "lost sync": flac[: len(flac) // 2],
        "882000 samples": ogg[:middle] + noise + ogg[middle + len(noise) :],
        "not finite": broken.getvalue(),
        "neither a path nor bytes": {"path": None, "bytes": None},
        "a sampling_rate": {"array": [0.0, 0.1]},
        "no samples ": {"array": [], "sampling_rate": 16000},
        "not finite ": {"array": [0.0, float("inf")], "sampling_rate": 16000},
        "(3, 3)": {"array": np.zeros((3, 3)), "sampling_rate": 16000},
        "Protocol not known": "nosuch://a.wav",
    }


def test_what_cannot_be_read_says_why(tmp_path):
    for reason, source in damaged_sources(tmp_path).items():
        with pytest.raises(AudioReadError) as caught:
            read_audio(source, 16000)
        reason = reason.strip()
        assert (
            caught.value.reason.endswith(reason[:-1])
            if reason[-1] == "$"
            else reason in caught.value.reason.replace("Is a directory", "directory")
        ), caught.value
        assert str(caught.value) == f"cannot read {caught.value.source}: {caught.value.reason}"


def test_an_empty_file_and_none(tmp_path):
    (tmp_path / "empty.wav").touch()
    with pytest.raises(AudioReadError, match=r"empty\.wav: empty file"):
        read_audio(tmp_path / "empty.wav", 16000)
    with pytest.raises(AudioReadError, match="neither a path nor bytes"):
        read_audio(None, 16000)
    with pytest.raises(TypeError, match="got int"):
        read_audio(7, 16000)


def test_windows_before_the_damage_still_read(tmp_path):
    flac = write(tmp_path / "a.flac", sweep(12, 16000), 16000, "flac").read_bytes()
    cut = flac[: len(flac) // 2]
    np.testing.assert_array_equal(read_audio(cut, 16000, 1.0, 1.0), read_audio(flac, 16000, 1.0, 1.0))
    with pytest.raises(AudioReadError, match="lost sync"):
        read_audio(cut, 16000, 11.0, 0.5)


def test_piped_wav_headers_are_no_damage(tmp_path):
    wav = write(tmp_path / "a.wav", sweep(1, 16000), 16000).read_bytes()
    size = wav.index(b"data") + 4
    piped = wav[:size] + b"\xff\xff\xff\xff" + wav[size + 4 :]
    np.testing.assert_array_equal(read_audio(piped, 16000), read_audio(wav, 16000))


def test_cut_mp3_is_read_as_far_as_it_goes(tmp_path):
    mp3 = write(tmp_path / "a.mp3", sweep(12, 44100), 44100, "mp3").read_bytes()
    waveform = read_audio(mp3[: len(mp3) // 2], 16000)
    assert 4 * 16000 < len(waveform) < 8 * 16000
    np.testing.assert_allclose(waveform[:48000], read_audio(mp3, 16000)[:48000], atol=1e-3)


def test_a_failing_seek_falls_back_to_decoding(encoded, monkeypatch):
    expected = read_audio(encoded, 16000, 5.0, 1.0)

    seek = sf.SoundFile.seek

    def fail(self, frame, *args):
        if frame and self.tell() == 0:
            raise sf.LibsndfileError(1)
        return seek(self, frame, *args)

    monkeypatch.setattr(sf.SoundFile, "seek", fail)
    np.testing.assert_allclose(read_audio(encoded, 16000, 5.0, 1.0), expected, atol=1e-3)


def test_one_reader_reads_windows_in_any_order(encoded):
    whole = read_audio(encoded, 16000)
    with AudioReader(encoded) as reader:
        assert reader.num_samples(16000) == len(whole)
        for start in (150000, 20, 90000, 190000, 0):
            np.testing.assert_allclose(reader.read(16000, start, 2000), whole[start : start + 2000], atol=1e-3)


def test_vorbis_windows_do_not_depend_on_those_before():
    seconds = np.arange(7 * 48000) / 48000
    content = encode_audio(0.3 * np.sin(2 * np.pi * (300 + 190 * seconds) * seconds), 48000, "OGG", "VORBIS")
    whole = read_audio(content, 48000)
    with AudioReader(content) as reader:
        for start in (11675, 48293, 18133, 49553, 27320, 73699, 14710, 68085):
            window = reader.read(48000, start, 1000)
            np.testing.assert_allclose(window, whole[start : start + 1000], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([0, 16384, -32768], np.int16), [0.0, 0.5, -1.0]),
        (np.array([128, 192, 0], np.uint8), [0.0, 0.5, -1.0]),
        (np.array([0, 2**30, -(2**31)], np.int32), [0.0, 0.5, -1.0]),
        ([0.0, 3.0, -0.5], [0.0, 3.0, -0.5]),
        (np.array([[0.0, 1.0, 0.5], [1.0, 0.0, 0.5]]), [0.5, 0.5, 0.5]),
        (np.array([[0.0, 1.0, 0.5], [1.0, 0.0, 0.5]]).T, [0.5, 0.5, 0.5]),
        (np.array([[16384, -16384, 0]], np.int16), [0.5, -0.5, 0.0]),
        (torch.tensor([0.25, -0.25], dtype=torch.bfloat16, requires_grad=True), [0.25, -0.25]),
    ],
)
def test_to_mono_float(array, expected):
    waveform = to_mono_float(array)
    assert waveform.dtype == np.float32
    np.testing.assert_allclose(waveform, expected)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        ([], "no samples"),
        ([0, 1000], "got int64"),
        ([True, False], "got bool"),
        ([0j], "got complex128"),
        (np.zeros((2, 3, 4)), r"got shape \(2, 3, 4\)"),
        (0.5, r"got shape \(\)"),
        ([0.0, np.nan], "not finite"),
    ],
)
def test_to_mono_float_refuses(array, message):
    with pytest.raises(ValueError, match=message):
        to_mono_float(array)


def test_resample_keeps_a_tone():
    waveform = resample(sweep(2, 44100), 44100, 16000)
    assert waveform.shape == (32000,)
    np.testing.assert_allclose(waveform[200:-200], sweep(2, 16000)[200:-200], atol=2e-3)
    with pytest.raises(ValueError, match="sampling rate in whole Hz above 0, got 0"):
        resample(waveform, 16000, 0)


def test_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(AudioReadError("a.wav", "empty file")))
    assert (error.source, error.reason, str(error)) == ("a.wav", "empty file", "cannot read a.wav: empty file")


def test_an_error_read_from_text_knows_a_name_with_colons(tmp_path):
    path = tmp_path / "Bach: Air: live.wav"
    path.touch()
    for name in (str(path), "gone.wav"):
        error = AudioReadError(f"Traceback ...\n{AudioReadError(name, 'damaged: cut')}\n")
        assert (error.source, error.reason) == (name, "damaged: cut")


def test_a_loader_raises_its_workers_error_as_it_was(tmp_path):
    wav = write(tmp_path / "a.wav", sweep(2, 16000), 16000)
    wav.write_bytes(wav.read_bytes()[:32044])
    for num_workers in (0, 1):
        with pytest.raises(AudioReadError) as caught:
            next(iter(DataLoader(LabelledClips([str(wav)], 16000), num_workers=num_workers)))
        assert str(caught.value).startswith(f"cannot read {wav}: truncated")
        assert "64000" in str(caught.value)
        assert caught.value.source == str(wav)


def test_an_mp3_of_garbage_is_not_called_missing(tmp_path):
    (tmp_path / "a.mp3").write_bytes(b"hello " * 300)
    with pytest.raises(AudioReadError, match="Format not recognised"):
        read_audio(tmp_path / "a.mp3", 16000)


@pytest.mark.real_audio
def test_real_clips(real_audio):
    path = sorted((real_audio / "esc50-16k" / "audio").glob("*.flac"))[3]
    reference, rate = sf.read(path, dtype="float32")
    np.testing.assert_array_equal(read_audio(path, rate), reference)
    np.testing.assert_array_equal(read_audio(path, rate, 1.5, 2.0), reference[24000:56000])
