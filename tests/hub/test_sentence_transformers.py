"""Saved models as `SentenceTransformer`, by sentence-transformers' own code."""

import json
import re

import numpy as np
import pytest
import soundfile
import torch
from loopback_hub import run
from tiny import MEL, TINY, build

from asit_hf import (
    ASiTFeatureExtractor,
    ASiTForAudioClassification,
    ASiTForAudioFrameClassification,
    ASiTForPreTraining,
    ASiTModel,
    load_encoder,
    modeling_asit,
)
from asit_hf.configuration_asit import HUB_FILES, SENTENCE_TRANSFORMERS_FILES
from asit_hf.evaluation.embeddings import embed
from asit_hf.hub.cards import write_model_card
from asit_hf.hub.export import export_encoder

SentenceTransformer = pytest.importorskip("sentence_transformers").SentenceTransformer
RATE = 16000


def save(folder, cls=ASiTModel, rate=RATE, **config):
    model = build(cls, **config)
    if cls is ASiTForPreTraining:  # whose teacher is not its student
        with torch.no_grad():
            model.teacher.asit.layernorm.weight.mul_(3)
    model.save_pretrained(folder)
    ASiTFeatureExtractor(num_mel_bins=config.get("num_mel_bins", MEL), sampling_rate=rate).save_pretrained(folder)
    return folder


def noise(*lengths: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.normal(0, 0.1, length).astype(np.float32) for length in lengths]


def with_rate(clips: list, rate: int = RATE) -> list[dict]:
    return [{"array": clip, "sampling_rate": rate} for clip in clips]


def expected(folder, clips: list, pooling: str, rate: int = RATE, mel: int = MEL) -> np.ndarray:
    extractor = ASiTFeatureExtractor(num_mel_bins=mel, sampling_rate=rate)
    return embed(load_encoder(folder), extractor, clips, pooling=pooling, progress=False)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> SentenceTransformer:
    return SentenceTransformer(str(save(tmp_path_factory.mktemp("encoder"), pooling_mode="mean")), device="cpu")


@pytest.mark.parametrize(
    ("cls", "pooling", "config"),
    [
        (ASiTModel, "cls", {}),
        (ASiTModel, "mean", {"rate": 8000, "num_mel_bins": 64}),
        (ASiTModel, "cls_mean", {"rate": 32000}),
        (ASiTForAudioClassification, "cls_mean", {"problem_type": "multi_label_classification"}),
        (ASiTForAudioFrameClassification, "mean", {}),
        (ASiTForPreTraining, "cls_mean", {}),  # the teacher
    ],
)
def test_every_saved_model_gives_its_encoders_embeddings(cls, pooling, config, tmp_path):
    config = dict(config)
    rate, mel = config.pop("rate", RATE), config.get("num_mel_bins", MEL)
    save(tmp_path, cls, rate, pooling_mode=pooling, **config)
    sentence_transformer = SentenceTransformer(str(tmp_path), device="cpu")
    # less than one window of 25 ms, less than one patch of 160 ms, and up to 6 s
    clips = noise(10, rate // 50, rate // 10, rate, 6 * rate, rate // 2)
    found = sentence_transformer.encode(with_rate(clips, rate))
    assert found.shape == (6, sentence_transformer.get_embedding_dimension())
    assert found.shape[1] == TINY["hidden_size"] * (2 if pooling == "cls_mean" else 1)
    np.testing.assert_allclose(found, expected(tmp_path, clips, pooling, rate, mel), rtol=0, atol=1e-5)
    for clip, row in zip(clips, found):
        np.testing.assert_allclose(sentence_transformer.encode(with_rate([clip], rate)[0]), row, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "cls_mean"])
def test_longer_clips_are_averaged_over_windows_of_30_s(pooling, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(modeling_asit.logger, "warning_once", said.append)
    sentence_transformer = SentenceTransformer(str(save(tmp_path, pooling_mode=pooling)), device="cpu")
    # the second has 2992 frames, one window; the third some frames more, which do not fill a patch
    clips = noise(65 * RATE, 2991 * 160 + 400, 3000 * 160 + 400, RATE, 95 * RATE)
    found = sentence_transformer.encode(with_rate(clips))
    np.testing.assert_allclose(found, expected(tmp_path, clips, pooling), rtol=0, atol=1e-5)
    assert [re.findall(r"\d+\.\d\d", text) for text in said] == [["29.92", "94.98"]]


@pytest.mark.parametrize("rate", [8000, 44100])
def test_files_and_waveforms_of_any_rate(encoder, tmp_path, rate):
    (clip,) = noise(rate)
    stereo = np.stack([clip, 0.5 * clip], axis=1)
    (reference,) = encoder.encode(with_rate([stereo.mean(1)], rate))
    waveforms = [stereo, stereo.T, torch.tensor(stereo), stereo.astype(np.float64)]
    for source in [*with_rate(waveforms, rate), {"audio": with_rate([stereo], rate)[0]}]:
        np.testing.assert_allclose(encoder.encode(source), reference, rtol=0, atol=1e-5)
    for name, tolerance in {"a.wav": 1e-3, "a.flac": 1e-3, "a.ogg": 0.5, "a.mp3": 0.5}.items():
        soundfile.write(tmp_path / name, stereo, rate)
        file = str(tmp_path / name)
        by_path = encoder.encode(file)
        np.testing.assert_allclose(by_path, reference, rtol=0, atol=tolerance)
        for source in ({"audio": file}, {"audio": tmp_path / name}, {"audio": (tmp_path / name).read_bytes()}):
            np.testing.assert_array_equal(encoder.encode(source), by_path)
    # files of several rates in one call
    soundfile.write(tmp_path / "b.wav", clip, 22050)
    both = encoder.encode([str(tmp_path / "b.wav"), str(tmp_path / "a.wav")])
    np.testing.assert_allclose(both[1], encoder.encode(str(tmp_path / "a.wav")), rtol=0, atol=1e-5)


def test_a_waveform_without_a_rate_is_at_the_models(encoder):
    (clip,) = noise(RATE)
    expected = encoder.encode(with_rate([clip])[0])
    np.testing.assert_array_equal(encoder.encode(clip), expected)
    np.testing.assert_array_equal(encoder.encode(torch.tensor(clip)), expected)


def test_options_of_encode(encoder):
    clips = with_rate(noise(RATE, 3000, 20000))
    plain = encoder.encode(clips)
    unit = encoder.encode(clips, normalize_embeddings=True, batch_size=1, convert_to_tensor=True, prompt="a prompt")
    torch.testing.assert_close(unit, torch.nn.functional.normalize(torch.tensor(plain)), rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder.similarity(plain, plain), unit @ unit.T, rtol=0, atol=1e-5)
    assert encoder.encode(clips, truncate_dim=8).shape == (3, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, tmp_path):
    clips = with_rate(noise(31 * RATE, 3000))
    full = SentenceTransformer(str(save(tmp_path)), device="cpu").encode(clips)
    half = SentenceTransformer(str(tmp_path), device="cpu", model_kwargs={"dtype": dtype})
    embeddings = half.encode(clips, convert_to_tensor=True)
    assert embeddings.dtype == dtype
    similarity = torch.cosine_similarity(embeddings.float(), torch.tensor(full))
    assert similarity.min() > 0.999


def test_what_it_saves_loads_again_with_its_prompts(encoder, tmp_path):
    clips = with_rate(noise(RATE, 3000))
    encoder.prompts = {"query": "a prompt"}
    encoder.save_pretrained(str(tmp_path), create_model_card=False)
    again = SentenceTransformer(str(tmp_path), device="cpu")
    assert again.prompts["query"] == "a prompt"
    np.testing.assert_array_equal(again.encode(clips), encoder.encode(clips))
    assert {*HUB_FILES, *SENTENCE_TRANSFORMERS_FILES} <= {path.name for path in tmp_path.iterdir()}
    settings = {name: json.loads((tmp_path / name).read_text()) for name in SENTENCE_TRANSFORMERS_FILES}
    ASiTModel.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert {name: json.loads((tmp_path / name).read_text()) for name in SENTENCE_TRANSFORMERS_FILES} == settings


def test_a_folder_saved_again_gives_the_encoder_of_what_is_in_it(tmp_path):
    clips = noise(RATE)
    for cls in (ASiTForPreTraining, ASiTForAudioClassification, ASiTForPreTraining, ASiTModel):
        save(tmp_path, cls)
        sentence_transformer = SentenceTransformer(str(tmp_path), device="cpu")
        found = sentence_transformer.encode(with_rate(clips))
        np.testing.assert_allclose(found, expected(tmp_path, clips, "cls"), rtol=0, atol=1e-5)
        sentence_transformer.save_pretrained(str(tmp_path), create_model_card=False)


def test_an_export_is_a_sentence_transformer_and_can_be_replaced(tmp_path):
    save(tmp_path / "run", ASiTForPreTraining)
    for _ in range(2):
        export_encoder(tmp_path / "run", tmp_path / "encoder")
    clips = noise(RATE)
    found = SentenceTransformer(str(tmp_path / "encoder"), device="cpu").encode(with_rate(clips))
    np.testing.assert_allclose(found, expected(tmp_path / "run", clips, "cls"), rtol=0, atol=1e-5)


def test_an_adapter_with_its_settings_is_a_sentence_transformer(tmp_path):
    peft = pytest.importorskip("peft")
    save(tmp_path / "encoder", pooling_mode="cls_mean")
    base = ASiTForAudioClassification.from_pretrained(tmp_path / "encoder", num_labels=3)
    targets = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, init_lora_weights=False, **targets))
    model.save_pretrained(tmp_path / "adapter")
    model.get_base_model().config.save_pretrained(tmp_path / "adapter")
    ASiTFeatureExtractor(num_mel_bins=MEL).save_pretrained(tmp_path / "adapter")
    clips = noise(RATE)
    found = SentenceTransformer(str(tmp_path / "adapter"), device="cpu").encode(with_rate(clips))
    np.testing.assert_allclose(found, expected(tmp_path / "adapter", clips, "cls_mean"), rtol=0, atol=1e-5)
    assert abs(found - expected(tmp_path / "encoder", clips, "cls_mean")).max() > 0.1


@pytest.mark.slow
def test_a_pushed_encoder_runs_its_card_without_the_package(hub, tmp_path):
    save(tmp_path / "encoder", pooling_mode="cls_mean")
    write_model_card(tmp_path / "encoder")
    upload = "import sys\nfrom asit_hf.hub.upload import upload_model\nupload_model(*sys.argv[1:])"
    run(upload, hub, tmp_path, str(tmp_path / "encoder"), "me/encoder")
    card = hub.repositories["me/encoder"]["README.md"].decode()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "SentenceT" in block)
    for name, (clip,) in {"dog.wav": noise(RATE), "rain.mp3": noise(44100)}.items():
        soundfile.write(tmp_path / name, clip, RATE if name == "dog.wav" else 44100)
    code += "import json\nprint(json.dumps(embeddings.tolist()))"
    shape, *_, embeddings = run(code, hub, tmp_path, package=False).splitlines()
    assert shape == "(2, 96)"
    with_package = SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    files = [str(tmp_path / name) for name in ("dog.wav", "rain.mp3")]
    np.testing.assert_allclose(json.loads(embeddings), with_package.encode(files), rtol=0, atol=1e-5)
