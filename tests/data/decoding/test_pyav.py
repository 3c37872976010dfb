import functools
import logging
import struct
import sys

import numpy as np
import pytest
import soundfile as sf
from av_files import encode, tone

from asit_hf.data.audio import AudioReader, AudioReadError, audio_info, read_audio

EXACT_AAC = {"aac_pns": "0"}  # noise substitution draws other noise after a seek
LIVE = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "frag_duration": "200000"}
# format, codec, rate, options of format and codec: what is written; samples that the codec adds before and after;
# difference between a window and the same part of the whole file
FORMATS = {
    "m4a": ("ipod", "aac", 44100, {}, EXACT_AAC, 0, 0, 0),
    "m4a, alac": ("ipod", "alac", 44100, {}, {}, 0, 0, 0),
    "mp4, mp3": ("mp4", "libmp3lame", 44100, {}, {}, 0, 1152, 1e-6),
    "mp4, fragments": ("mp4", "aac", 44100, LIVE, EXACT_AAC, 1024, 0, 0),
    "mov, pcm": ("mov", "pcm_s16be", 22050, {}, {}, 0, 0, 0),
    "mov, planar pcm": ("mov", "pcm_s24le", 22050, {}, {}, 0, 0, 0),
    "aac": ("adts", "aac", 16000, {}, EXACT_AAC, 1024, 1024, 0),
    "webm": ("webm", "libopus", 48000, {}, {}, 0, 0, 1e-6),
    "webm of MediaRecorder": ("webm", "libopus", 48000, {"live": "1"}, {}, 0, 0, 1e-6),
    "webm, vorbis": ("webm", "vorbis", 44100, {}, {"strict": "-2"}, 0, 192, 1e-6),
    "mka": ("matroska", "aac", 44100, {}, EXACT_AAC, 0, 1024, 0),
    "wma": ("asf", "wmav2", 44100, {}, {"b": "128000"}, -2048, 2048, 0),
    "3gp": ("3gp", "libopencore_amrnb", 8000, {}, {}, 0, 0, 1e-4),
    "amr": ("amr", "libopencore_amrnb", 8000, {}, {}, 0, 160, 1e-4),
    "avi, mp3": ("avi", "libmp3lame", 44100, {}, {}, 1105, 1152, 1e-6),
    "mpg, mp2": ("mpeg", "mp2", 44100, {}, {}, 481, 1152, 1e-4),
    "flv": ("flv", "aac", 44100, {}, EXACT_AAC, 1024, 1024, 0),
    "ts": ("mpegts", "aac", 44100, {}, EXACT_AAC, 1024, 1024, 0),
    "wavpack": ("wv", "wavpack", 44100, {}, {}, 0, 0, 0),
    "tta": ("tta", "tta", 44100, {}, {}, 0, 0, 0),
    "ac3": ("ac3", "ac3", 44100, {}, {}, 256, 1536, 1e-4),
    "wav, g722": ("wav", "g722", 16000, {}, {}, 22, 256, 0),
    "flac in ogg": ("ogg", "flac", 44100, {}, {}, 0, 0, 0),
    "alac in caf": ("caf", "alac", 44100, {}, {}, 0, 4096, 0),
}


@functools.cache
def file_of(name):
    format, codec, rate, of_format, of_codec, *_ = FORMATS[name]
    samples = tone(2.5, rate, channels=2 if codec in ("vorbis", "wmav2") else 1)
    if "amr" in codec:  # whose decoder never forgets the start of a tone
        samples = np.random.default_rng(0).normal(0, 0.1, samples.shape)
    return encode(samples, rate, format, codec, of_format, of_codec)


@pytest.mark.parametrize("name", FORMATS)
def test_lengths_and_samples(name):
    *_, before, after, _ = FORMATS[name]
    rate = FORMATS[name][2]
    samples = tone(2.5, rate)[0]
    info = audio_info(file_of(name))
    assert info.sampling_rate == rate
    assert abs(info.num_samples - len(samples) - before) <= max(after, 2048)  # a packet
    whole = read_audio(file_of(name), rate)
    assert abs(len(whole) - len(samples) - before) <= max(after, 32)
    if "amr" not in FORMATS[name][1]:
        begin, end = rate // 2, 2 * rate
        assert np.std(whole[begin + before : end + before] - samples[begin:end]) < 0.02


@pytest.mark.parametrize("name", FORMATS)
def test_a_window_is_the_part_of_the_whole(name):
    content, rate, tolerance = file_of(name), FORMATS[name][2], FORMATS[name][-1]
    with AudioReader(content) as reader:
        whole = reader.read(rate)
        for start in (1.4, 0.3, 2.1, 0.0, 1.9):  # backwards too
            first = round(start * rate) + 7
            window = reader.read(rate, first, rate // 4)
            np.testing.assert_allclose(window, whole[first : first + rate // 4], atol=tolerance, rtol=0)
    window = read_audio(content, rate, 2.1, 0.25)
    np.testing.assert_allclose(window, whole[round(2.1 * rate) :][: len(window)], atol=tolerance, rtol=0)


def test_every_source_and_any_name(tmp_path):
    expected = read_audio(file_of("m4a"), 16000)
    path = tmp_path / "misnamed.wav"
    path.write_bytes(file_of("m4a"))
    for source in (path, str(path), {"path": "x", "bytes": file_of("m4a")}, f"file://{path}"):
        np.testing.assert_array_equal(read_audio(source, 16000), expected)
    np.testing.assert_allclose(read_audio(path, 16000, 1.2, 0.5), expected[19200:27200], atol=1e-5)


def test_libsndfile_reads_what_it_knows(tmp_path, monkeypatch):
    sf.write(tmp_path / "a.m4a", tone(0.1, 16000)[0], 16000, format="WAV")
    monkeypatch.setitem(sys.modules, "av", None)
    assert len(read_audio(tmp_path / "a.m4a", 16000)) == 1600


@pytest.mark.parametrize("name", ["m4a", "webm", "aac", "wma", "amr"])
def test_without_the_extra_the_error_names_it(tmp_path, monkeypatch, name):
    (tmp_path / "clip").write_bytes(file_of(name))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(AudioReadError, match=r"asit-hf\[av\]") as caught:
        read_audio(tmp_path / "clip", 16000)
    assert caught.value.source == str(tmp_path / "clip")
    with pytest.raises(AudioReadError) as caught:  # nothing that PyAV reads
        read_audio(b"no audio at all" * 40, 16000)
    assert "av" not in caught.value.reason


@pytest.mark.parametrize("name", ["a.raw", "a.PCM"])
def test_samples_without_a_header(tmp_path, name):
    (tmp_path / name).write_bytes(np.random.default_rng(0).bytes(4000))
    with pytest.raises(AudioReadError, match="header"):
        read_audio(tmp_path / name, 16000)


def test_channels_of_all_layouts_are_mixed():
    left = np.stack([tone(1, 44100)[0], np.zeros(44100, np.float32)])
    for format, codec in (("mov", "pcm_s16le"), ("mov", "pcm_f32le"), ("mov", "pcm_u8"), ("ipod", "alac")):
        content = encode(left, 44100, format, codec)
        assert audio_info(content).num_channels == 2
        np.testing.assert_allclose(read_audio(content, 44100), left[0] / 2, atol=0.01)
    mono, stereo = (encode(tone(1, 16000, channels), 16000, "adts", "aac", {}, EXACT_AAC) for channels in (1, 2))
    joined = read_audio(mono + stereo, 16000)
    np.testing.assert_allclose(joined[17408:20480], read_audio(stereo, 16000)[:3072], atol=1e-3)


def test_a_video_file(caplog):
    content = encode(tone(2, 48000), 48000, "matroska", "aac", codec_options=EXACT_AAC, video=True)
    for format, codec in (("avi", "libmp3lame"), ("matroska", "aac"), ("mp4", "aac")):
        cut = encode(tone(4, 48000), 48000, format, codec, video=True)
        with pytest.raises(AudioReadError):
            read_audio(cut[: len(cut) * 3 // 5], 48000)
    whole = read_audio(content, 48000)
    assert np.std(whole[24000:90000] - tone(2, 48000)[0][24000:90000]) < 0.02
    np.testing.assert_array_equal(read_audio(content, 48000, 1.5, 0.25), whole[72000:84000])
    assert not caplog.records


def test_one_of_several_tracks(caplog, monkeypatch):
    monkeypatch.setattr("asit_hf.data.decoding.pyav._said", set())
    content = encode(tone(1, 44100), 44100, "ipod", "alac", tracks=2)
    for _ in range(2):
        np.testing.assert_allclose(read_audio(content, 44100), tone(1, 44100)[0], atol=1e-4)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "2 audio tracks" in record.getMessage()


def test_pauses_are_silence(caplog, monkeypatch):
    monkeypatch.setattr("asit_hf.data.decoding.pyav._said", set())
    paused = encode(tone(2, 48000), 48000, "webm", "libopus", pauses={50: 24000})
    plain = read_audio(encode(tone(2, 48000), 48000, "webm", "libopus"), 48000)
    whole = read_audio(paused, 48000)
    pause = 50 * 960 - 312
    assert abs(len(whole) - 120000) <= 960
    np.testing.assert_array_equal(whole[:pause], plain[:pause])
    np.testing.assert_array_equal(whole[pause : pause + 24000], 0)
    np.testing.assert_allclose(whole[pause + 24000 : 119000], plain[pause:95000], atol=1e-6)
    np.testing.assert_array_equal(read_audio(paused, 48000, 1.25, 0.2), 0)
    np.testing.assert_allclose(read_audio(paused, 48000, 1.3, 0.5), whole[62400:86400], atol=1e-6)
    assert len(caplog.records) == 1
    hours = encode(tone(1, 48000), 48000, "webm", "libopus", pauses={20: 48000 * 7200})
    with pytest.raises(AudioReadError, match="nothing from"):
        read_audio(hours, 48000)


def damaged(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, 3000, dtype=np.uint8).tobytes()

    def with_noise(content):
        return content[: len(content) // 2] + noise + content[len(content) // 2 + len(noise) :]

    fast = encode(tone(2, 44100), 44100, "mp4", "aac", {"movflags": "faststart"}, path=tmp_path / "fast.mp4")
    whole = file_of("webm")
    place = whole.index(b"\x44\x89\x88") + 3  # of the duration
    video = encode(np.zeros((1, 44100), np.float32), 44100, "mp4", "aac", video=True, tracks=0)
    rates = file_of("aac") + encode(tone(1, 44100), 44100, "adts", "aac")
    return {
        "mp4 without its index": file_of("m4a")[: len(file_of("m4a")) // 2],
        "mp4 that was cut": fast[: len(fast) // 2],
        "mp4 that was cut within its last packet": fast[:-100],
        "webm that was cut": file_of("webm")[: len(file_of("webm")) // 2],
        "avi that was cut": file_of("avi, mp3")[: len(file_of("avi, mp3")) // 2],
        "wma that was cut": file_of("wma")[: len(file_of("wma")) // 2],
        "m4a with noise inside": with_noise(file_of("m4a")),
        "aac with noise inside": with_noise(file_of("aac")),
        "flac in ogg with noise inside": with_noise(file_of("flac in ogg")),
        "wavpack with noise inside": with_noise(file_of("wavpack")),
        "wma with noise inside": with_noise(file_of("wma")),
        "more samples declared": whole[:place] + struct.pack(">d", 1e12) + whole[place + 8 :],
        "no audio track": video,
        "sampling rate changes": rates,
        "the signature alone": file_of("webm")[:60],
    }


def test_damaged_files_are_errors_that_name_them(tmp_path, capfd):
    path = tmp_path / "clip.m4a"
    for kind, content in damaged(tmp_path).items():
        path.write_bytes(content)
        with pytest.raises(AudioReadError) as caught:
            read_audio(path, 16000)
        assert caught.value.source == str(path), kind
    assert capfd.readouterr() == ("", "")  # nor a line of ffmpeg


def test_a_cut_file_without_declared_length_is_read_as_far_as_it_goes():
    for name in ("webm of MediaRecorder", "aac", "amr", "ac3"):
        content = file_of(name)
        cut, rate = content[: len(content) * 3 // 5 - 11], FORMATS[name][2]
        with AudioReader(cut) as reader:
            found = reader.read(rate)
            assert len(found) == reader.info.num_samples
        assert 1 < len(found) / rate < 2
        np.testing.assert_allclose(found[:rate], read_audio(content, rate)[:rate], atol=1e-6)


def test_windows_before_the_damage_still_read():
    content = bytearray(file_of("m4a"))
    content[len(content) // 2 : len(content) // 2 + 3000] = bytes(3000)
    with AudioReader(bytes(content)) as reader:
        with pytest.raises(AudioReadError, match="damaged"):
            reader.read(44100)
        np.testing.assert_array_equal(reader.read(44100, 4000, 8000), read_audio(file_of("m4a"), 44100)[4000:12000])
