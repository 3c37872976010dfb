import json
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import ASTFeatureExtractor, AutoFeatureExtractor, AutoProcessor

from asit_hf import ASiTConfig, ASiTFeatureExtractor, feature_extraction_asit
from asit_hf.configuration_asit import AUTO_MAP, HUB_FILES
from asit_hf.data.audio import resample
from asit_hf.fbank_asit import num_fbank_frames

GOLDEN = np.load(Path(__file__).parent / "fixtures" / "fbank.npz")
RATE = 16000
extractor = ASiTFeatureExtractor()


def clips(*lengths: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [(generator.standard_normal(length) * 0.1).astype(np.float32) for length in lengths]


@pytest.mark.parametrize("case", [name.split("/")[0] for name in GOLDEN.files if name.endswith("normalized")])
def test_equals_the_official_input(case):
    rate = int(GOLDEN[f"{case}/sampling_rate"])
    output = ASiTFeatureExtractor(sampling_rate=rate)(GOLDEN[f"{case}/waveform"], rate, return_tensors="np")
    np.testing.assert_allclose(output["input_values"][0], GOLDEN[f"{case}/normalized"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("lengths", [(RATE,), (8000, 12000)])
def test_log_mel_equals_transformers_ast(lengths):
    ast = ASTFeatureExtractor(do_normalize=False, max_length=20)
    for clip in clips(*lengths):
        clip = clip - clip.mean()  # AST does not remove the mean
        expected = ast(clip, sampling_rate=RATE, return_tensors="np")["input_values"][0]
        ours = ASiTFeatureExtractor(mean=0.0, std=0.5)(clip, RATE, return_tensors="np")["input_values"][0]
        np.testing.assert_allclose(ours[:20], expected, rtol=0, atol=2e-3)


@pytest.fixture(params=["of asit_hf", "of the Hub files"])
def resampling(request, monkeypatch) -> ASiTFeatureExtractor:
    """An extractor with the reader that `import asit_hf` sets, and with the one it has without the package."""
    if request.param == "of the Hub files":
        monkeypatch.setattr(ASiTFeatureExtractor, "read_audio", staticmethod(feature_extraction_asit.read_audio))
    return partial(extractor, resample=True, return_tensors="pt")


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_resampling_reads_files_channels_and_any_rate(resampling, rate, tmp_path):
    stereo = np.stack([clips(rate)[0], np.zeros(rate, np.float32)], axis=1)
    soundfile.write(tmp_path / "clip.wav", stereo, rate, subtype="FLOAT")
    soundfile.write(tmp_path / "clip.flac", stereo, rate, subtype="PCM_16")
    expected = extractor(resample(stereo.mean(1), rate, RATE), RATE, return_tensors="pt")["input_values"]
    content = (tmp_path / "clip.wav").read_bytes()
    sources = [tmp_path / "clip.wav", str(tmp_path / "clip.wav"), content, stereo, stereo.T, torch.tensor(stereo)]
    for source in sources:
        for batch in (source, [source]):
            found = resampling(batch, rate)["input_values"]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    # one batch of files with rates of their own
    soundfile.write(tmp_path / "other.wav", clips(4000)[0], 4000)
    both = resampling([tmp_path / "clip.flac", tmp_path / "other.wav"])
    assert both["attention_mask"].sum(-1).tolist() == [98, 98]
    # 16 bits move the log of the quietest bands
    torch.testing.assert_close(both["input_values"][0], expected[0], rtol=0, atol=0.1)


def test_resampling_scales_pcm_and_assumes_the_models_rate_for_bare_waveforms(resampling):
    (clip,) = clips(RATE // 2)
    expected = extractor(clip, RATE, return_tensors="pt")["input_values"]
    torch.testing.assert_close(resampling(clip)["input_values"], expected)
    torch.testing.assert_close(resampling(clip.tolist())["input_values"], expected)
    pcm = resampling([(clip * 2**31).astype(np.int32)])["input_values"]
    torch.testing.assert_close(pcm, expected, rtol=0, atol=1e-4)
    half = torch.tensor(clip).bfloat16()
    torch.testing.assert_close(
        resampling(half)["input_values"], extractor(half, RATE, return_tensors="pt")["input_values"]
    )
    unscaled = [(clip * 2**31).astype(np.int64)]
    for wrong in (
        [],
        [np.zeros(0, np.float32)],
        [np.zeros((3, 4, 5), np.float32)],
        unscaled,
        [np.stack(unscaled * 2)],
    ):
        with pytest.raises((ValueError, OSError)):
            resampling(wrong, 8000)


def test_normalization():
    (clip,) = clips(4000)
    plain = ASiTFeatureExtractor(mean=0.0, std=0.5)(clip, RATE, return_tensors="pt")["input_values"]
    scaled = ASiTFeatureExtractor(mean=-6.0, std=2.0)(clip, RATE, return_tensors="pt")["input_values"]
    torch.testing.assert_close(scaled, (plain + 6) / 4)


def test_batch_equals_single_and_pads_on_the_right():
    waveforms = clips(8000, 3333, 16000, 401)
    batch = ASiTFeatureExtractor(padding_value=-7.5)(waveforms, RATE, return_tensors="pt")
    assert batch["input_values"].shape == (4, 98, 128)
    assert batch["attention_mask"].dtype == torch.long
    for clip, values, mask in zip(waveforms, batch["input_values"], batch["attention_mask"]):
        frames = num_fbank_frames(len(clip), RATE)
        single = extractor(clip, RATE, return_tensors="pt")
        assert single["attention_mask"].tolist() == [[1] * frames]
        torch.testing.assert_close(values[:frames], single["input_values"][0], rtol=0, atol=1e-5)
        assert (values[frames:] == -7.5).all()
        assert mask.tolist() == [1] * frames + [0] * (98 - frames)


def test_array_batch_equals_list():
    waveforms = clips(4000, 4000)
    as_list = extractor(waveforms, RATE, return_tensors="pt")["input_values"]
    assert torch.equal(extractor(np.stack(waveforms), RATE, return_tensors="pt")["input_values"], as_list)
    assert torch.equal(extractor(tuple(waveforms), RATE, return_tensors="pt")["input_values"], as_list)


@pytest.mark.parametrize(
    "convert",
    [torch.from_numpy, np.ndarray.tolist, lambda x: x.astype(np.float64), lambda x: x[::-1][::-1], lambda x: [x]],
    ids=["torch", "list", "float64", "negative strides", "batch of one"],
)
def test_input_types(convert):
    (clip,) = clips(4000)
    expected = extractor(clip, RATE, return_tensors="pt")["input_values"]
    output = extractor(convert(clip), RATE, return_tensors="pt")["input_values"]
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.int16, np.int32])
@pytest.mark.parametrize("as_torch", [False, True])
def test_integer_pcm_is_scaled(dtype, as_torch):
    (clip,) = clips(4000)
    pcm = (clip * -np.iinfo(dtype).min).astype(dtype)
    expected = extractor(pcm / -np.float64(np.iinfo(dtype).min), RATE, return_tensors="pt")["input_values"]
    output = extractor(torch.from_numpy(pcm) if as_torch else pcm, RATE, return_tensors="pt")["input_values"]
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-4)


def test_extract_scales_int16_pcm():
    pcm = torch.from_numpy((clips(4000)[0] * 32768).astype(np.int16)).repeat(2, 3, 1)
    pcm[1, :, 3000:] = 0
    lengths = torch.tensor([4000, 3000])[:, None].expand(2, 3)
    for given in (None, lengths):
        assert torch.equal(extractor.extract(pcm, given), extractor.extract(pcm.float() / 32768, given))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_give_float32(dtype):
    clip = torch.from_numpy(clips(4000)[0]).to(dtype)
    output = extractor(clip, RATE, return_tensors="pt")["input_values"]
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, extractor(clip.float(), RATE, return_tensors="pt")["input_values"])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16])
def test_read_only_arrays_are_accepted_without_a_warning(dtype):
    clip = (clips(4000)[0] * (2**15 if dtype == np.int16 else 1)).astype(dtype)
    expected = extractor(clip, RATE, return_tensors="pt")["input_values"]
    clip.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(extractor(clip, RATE, return_tensors="pt")["input_values"], expected)


def test_writable_arrays_are_not_copied():
    clip = clips(4000)[0]
    assert extractor._to_tensor(clip, 0).data_ptr() == clip.ctypes.data


def test_tensors_stay_on_their_device():
    output = extractor(torch.from_numpy(clips(4000)[0]), RATE, return_tensors="pt")
    assert {value.device.type for value in output.values()} == {"cpu"}
    if torch.cuda.is_available():
        output = extractor(torch.from_numpy(clips(4000)[0]).cuda(), RATE, return_tensors="pt")
        assert {value.device.type for value in output.values()} == {"cuda"}


def test_waveforms_that_require_gradients_are_accepted():
    clip = torch.from_numpy(clips(4000)[0])
    expected = extractor(clip, RATE, return_tensors="np")["input_values"]
    np.testing.assert_array_equal(
        extractor(clip.requires_grad_(), RATE, return_tensors="np")["input_values"], expected
    )


def test_output_types():
    waveforms = clips(4000, 4000)
    lists = extractor(waveforms, RATE)
    assert isinstance(lists["input_values"], list)
    assert [values.shape for values in lists["input_values"]] == [(23, 128)] * 2
    arrays = extractor(waveforms, RATE, return_tensors="np")
    assert isinstance(arrays["input_values"], np.ndarray)
    np.testing.assert_array_equal(np.stack(lists["input_values"]), arrays["input_values"])
    np.testing.assert_array_equal(
        extractor(waveforms, RATE, return_tensors="pt")["input_values"].numpy(), arrays["input_values"]
    )


@pytest.mark.parametrize("name", ["num_frames", "max_length"])
def test_padding_and_truncation_to_a_length(name):
    waveforms = clips(4000, 16000)
    padded = extractor(waveforms[0], RATE, padding="max_length", return_tensors="pt", **{name: 50})
    assert padded["input_values"].shape == (1, 50, 128)
    assert padded["attention_mask"].sum() == 23
    cut = extractor(waveforms, RATE, truncation=True, return_tensors="pt", **{name: 30})
    assert cut["input_values"].shape == (2, 30, 128)
    assert cut["attention_mask"].sum(1).tolist() == [23, 30]
    exact = extractor(waveforms, RATE, padding="max_length", truncation=True, return_tensors="pt", **{name: 64})
    assert exact["input_values"].shape == (2, 64, 128)
    whole = extractor(waveforms[1], RATE, return_tensors="pt")["input_values"]
    torch.testing.assert_close(exact["input_values"][1], whole[0, :64], rtol=0, atol=1e-5)


def test_num_frames_alone_neither_pads_nor_truncates():
    assert extractor(clips(16000)[0], RATE, num_frames=10, return_tensors="pt")["input_values"].shape[1] == 98


def test_pad_to_multiple_of():
    output = extractor(clips(4000, 16000), RATE, pad_to_multiple_of=16, return_tensors="pt")
    assert output["input_values"].shape == (2, 112, 128)
    assert output["attention_mask"].sum(1).tolist() == [23, 98]


def test_no_padding():
    output = extractor(clips(4000, 16000), RATE, padding=False)
    assert [values.shape for values in output["input_values"]] == [(23, 128), (98, 128)]
    with pytest.raises(ValueError, match=r"\[23, 98\].*padding=True"):
        extractor(clips(4000, 16000), RATE, padding=False, return_tensors="pt")


def test_attention_mask_is_optional():
    assert set(extractor(clips(4000), RATE, return_attention_mask=False)) == {"input_values"}
    assert set(ASiTFeatureExtractor(return_attention_mask=False)(clips(4000), RATE)) == {"input_values"}


def test_a_clip_shorter_than_a_window_is_one_frame():
    short = clips(150)[0]
    output = extractor([short, *clips(4000)], RATE, return_tensors="pt")
    assert output["attention_mask"].sum(1).tolist() == [1, 23]
    centered = np.pad(short - short.mean(), (0, 250))
    expected = extractor.extract(torch.from_numpy(centered), torch.tensor(400))
    alone = extractor(short, RATE, return_tensors="pt")["input_values"]
    torch.testing.assert_close(output["input_values"][0, :1], alone[0], rtol=0, atol=1e-5)
    # removing the mean again, as `expected` does, changes nothing
    torch.testing.assert_close(alone[0], expected, rtol=0, atol=1e-3)


def test_extract_removes_each_clips_mean_over_its_length():
    waveforms = torch.zeros(2, 8000)
    for row, clip in zip(waveforms, clips(8000, 5000)):
        row[: len(clip)] = torch.from_numpy(clip) + 0.3
    features = extractor.extract(waveforms, torch.tensor([8000, 5000]))
    alone = extractor.extract(waveforms[1, :5000])
    torch.testing.assert_close(features[1, : len(alone)], alone, rtol=0, atol=1e-4)
    assert extractor.extract(waveforms.view(2, 1, 8000)).shape == (2, 1, 48, 128)


def test_a_missing_rate_is_accepted_with_a_warning(caplog):
    fresh = ASiTFeatureExtractor(sampling_rate=16000 + 8)  # another rate, because each message is logged once
    with caplog.at_level("WARNING"):
        fresh(clips(4000)[0])
    assert "16008 Hz" in caplog.text


def test_input_is_not_changed():
    clip = clips(4000)[0]
    copy = clip.copy()
    extractor([clip, *clips(100)], RATE)
    np.testing.assert_array_equal(clip, copy)


def test_save_and_load(tmp_path):
    saved = ASiTFeatureExtractor(sampling_rate=8000, num_mel_bins=64, mean=-5.0, std=3.0, padding_value=-1.0)
    saved.save_pretrained(tmp_path)
    loaded = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert isinstance(loaded, ASiTFeatureExtractor)
    assert loaded.to_dict() == {**saved.to_dict(), "feature_extractor_type": "ASiTFeatureExtractor"}
    waveforms = clips(4000, 1000)
    expected = saved(waveforms, 8000, return_tensors="pt")
    torch.testing.assert_close(dict(loaded(waveforms, 8000, return_tensors="pt")), dict(expected), rtol=0, atol=0)


def test_settings_that_are_scalars_of_numpy_or_torch_are_saved(tmp_path):
    scalars = {"num_mel_bins": np.int64(64), "mean": np.float32(-5), "std": torch.tensor(3.0)}
    ASiTFeatureExtractor(**scalars, do_normalize=np.bool_(False), padding_value=np.float32(1)).save_pretrained(
        tmp_path
    )
    loaded = ASiTFeatureExtractor.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in scalars} == {"num_mel_bins": 64, "mean": -5.0, "std": 3.0}
    assert (loaded.do_normalize, loaded.padding_value) == (False, 1.0)


@pytest.mark.parametrize("with_config", [True, False])
def test_auto_processor_gives_the_extractor_without_asking(tmp_path, monkeypatch, with_config):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked"))
    ASiTFeatureExtractor(num_mel_bins=64, mean=-5.0).save_pretrained(tmp_path)
    if with_config:
        ASiTConfig(num_mel_bins=64).save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, ASiTFeatureExtractor)
    assert processor.to_dict() == AutoFeatureExtractor.from_pretrained(tmp_path).to_dict()


def test_without_normalization_features_are_the_log_mel_values(tmp_path):
    extractor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    del settings["do_normalize"]  # as in folders saved by earlier versions
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert ASiTFeatureExtractor.from_pretrained(tmp_path).do_normalize
    plain = AutoFeatureExtractor.from_pretrained(tmp_path, do_normalize=False)
    waveforms = clips(4000, 1000)
    normalized, values = (one(waveforms, RATE, return_tensors="pt")["input_values"] for one in (extractor, plain))
    torch.testing.assert_close(extractor.normalize(values[0]), normalized[0])
    assert torch.equal(plain.normalize(values), values)
    assert (values[1, -1] == plain.padding_value).all()
    assert (normalized[1, -1] == plain.padding_value).all()
    torch.testing.assert_close(plain.extract(torch.from_numpy(waveforms[0])), values[0])
    plain.save_pretrained(tmp_path)
    assert AutoFeatureExtractor.from_pretrained(tmp_path).do_normalize is False


@pytest.mark.parametrize("name", ["n_mels", "max_length", "sample_rate"])
def test_unknown_options_give_a_warning_that_names_them(tmp_path, caplog, name):
    extractor.save_pretrained(tmp_path)
    for build in (partial(ASiTFeatureExtractor.from_pretrained, tmp_path), ASiTFeatureExtractor):
        caplog.clear()
        build(**{name: 100})
        assert name in caplog.text
    caplog.clear()
    AutoFeatureExtractor.from_pretrained(tmp_path, mean=-3.0, padding_side="right", trust_remote_code=True)
    assert not caplog.records
    with pytest.raises(TypeError, match=name.replace("max_length", "xyz")):
        extractor(clips(4000)[0], RATE, **{name.replace("max_length", "xyz"): 100})


def test_saved_folder_contains_the_code_named_by_its_auto_map(tmp_path):
    extractor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["auto_map"] == AUTO_MAP
    assert {path.name for path in tmp_path.glob("*.py")} == set(HUB_FILES)
