import copy

import numpy as np
import pytest
import soundfile
import tiny
import torch
from transformers import ASTConfig, ASTForAudioClassification, pipeline

from asit_hf import (
    ASiTFeatureExtractor,
    ASiTForAudioClassification,
    ASiTForAudioFrameClassification,
    calibrate_classifier,
    read_audio,
)
from asit_hf.finetuning.calibration import calibrate_layer, last_linear
from asit_hf.loading import load_trained

NAMES = ("cat", "dog", "owl")
LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}
EXTRACTOR = ASiTFeatureExtractor(num_mel_bins=tiny.MEL, sampling_rate=8000)


def build(cls=ASiTForAudioClassification, scale=1.0, **fields):
    model = tiny.build(cls, num_labels=3, **LABELS, **fields)
    model.classifier.weight.data *= scale
    return model


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Twelve clips of noise, at a rate that is not the model's. The best class of `build()` is right for nine."""
    folder, generator = tmp_path_factory.mktemp("sounds"), np.random.default_rng(0)
    lines = ["file,label,tags"]
    for index in range(12):
        noise = generator.normal(0, 0.1, int(generator.integers(2000, 6000))).cumsum() * index / 12
        soundfile.write(folder / f"{index}.wav", noise.clip(-1, 1), 16000)
        inputs = EXTRACTOR(read_audio(folder / f"{index}.wav", 8000), sampling_rate=8000, return_tensors="pt")
        with torch.no_grad():
            logits = build()(**inputs).logits[0]
        best, worst = NAMES[logits.argmax()], NAMES[logits.argmin()]
        tags = f"{best};{worst}" if index % 4 == 0 else best
        lines.append(f"{index}.wav,{worst if index % 4 == 0 else best},{tags}")
    (folder / "meta.csv").write_text("\n".join(lines) + "\n")
    return folder / "meta.csv"


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_a_trained_classifier_is_calibrated(table, tmp_path, kind):
    model = build(problem_type=f"{kind}_label_classification", scale=5.0)
    before = copy.deepcopy(model.state_dict())
    column = "label" if kind == "single" else "tags"
    found = calibrate_classifier(model, EXTRACTOR, table, label_column=column, batch_size=5)
    temperature = found["temperature"]
    assert temperature > 1  # of random weights
    assert found["clips"] == 12
    assert found["nll"] < found["nll_before"]
    for name, value in model.state_dict().items():
        expected = before[name] / temperature if name.startswith("classifier.") else before[name]
        assert torch.equal(value, expected), name
    assert not model.training

    again = calibrate_classifier(model, EXTRACTOR, table, label_column=column)
    assert again["temperature"] == pytest.approx(1, abs=1e-3)
    assert again["nll_before"] == pytest.approx(found["nll"], rel=1e-4)
    assert again["ece_percent_before"] == pytest.approx(found["ece_percent"], rel=1e-3)
    model.save_pretrained(tmp_path)
    EXTRACTOR.save_pretrained(tmp_path)
    classifier = pipeline("audio-classification", model=str(tmp_path), device="cpu")
    logits = {row["label"]: np.log(row["score"]) for row in classifier(str(table.parent / "3.wav"))}
    model.load_state_dict(before)
    unlike = pipeline("audio-classification", model=model, feature_extractor=EXTRACTOR, device="cpu")
    uncalibrated = {row["label"]: np.log(row["score"]) for row in unlike(str(table.parent / "3.wav"))}
    if kind == "single":
        for name in NAMES[1:]:
            odds, odds_before = (scores[name] - scores[NAMES[0]] for scores in (logits, uncalibrated))
            assert odds_before == pytest.approx(temperature * odds, rel=1e-3, abs=1e-3)
    assert max(logits, key=logits.get) == max(uncalibrated, key=uncalibrated.get)


def test_a_model_without_problem_type_takes_that_of_the_labels(table):
    assert calibrate_classifier(build(), EXTRACTOR, table, label_column="tags")["clips"] == 12
    with pytest.raises(ValueError, match="single_label"):
        calibrate_classifier(
            build(problem_type="single_label_classification"),
            EXTRACTOR,
            table,
            label_column="label",
            problem_type="multi_label_classification",
        )


@pytest.mark.parametrize(
    "model", [tiny.build(ASiTForAudioClassification, num_labels=1), build(problem_type="regression")]
)
def test_regression_and_unknown_labels_are_refused(table, model):
    with pytest.raises(ValueError, match="classifier.*regression"):
        calibrate_classifier(model, EXTRACTOR, table)


def test_labels_that_the_model_lacks_are_refused(table):
    with pytest.raises(ValueError, match="cat"):
        calibrate_classifier(tiny.build(ASiTForAudioClassification), EXTRACTOR, table)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_16_bits_are_divided_and_saved(table, tmp_path, dtype):
    model = build(scale=5.0).to(dtype)
    weight = model.classifier.weight.float()
    found = calibrate_classifier(model, EXTRACTOR, table, label_column="label")
    assert model.classifier.weight.dtype == dtype
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(
        model.classifier.weight.float(), weight / found["temperature"], rtol=rounding, atol=1e-6
    )
    model.save_pretrained(tmp_path)
    EXTRACTOR.save_pretrained(tmp_path)
    loaded = load_trained(tmp_path, ASiTForAudioClassification)[0]
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)
    again = calibrate_classifier(loaded, EXTRACTOR, table, label_column="label")
    assert again["temperature"] == pytest.approx(1, abs=0.1)


def test_an_adapter_saves_its_calibrated_classifier(table, tmp_path):
    peft = pytest.importorskip("peft")
    build().save_pretrained(tmp_path / "base")
    base = ASiTForAudioClassification.from_pretrained(tmp_path / "base")
    targets = {"target_modules": ["q_proj", "v_proj"]}
    config = peft.LoraConfig(r=4, modules_to_save=["classifier"], **targets)
    model = peft.get_peft_model(base, config).eval()
    frozen = base.classifier.original_module.weight.clone()
    base.classifier.modules_to_save["default"].weight.data *= 5
    before = base.classifier.modules_to_save["default"].weight.clone()
    found = calibrate_classifier(model, EXTRACTOR, table, label_column="label")
    assert found["temperature"] > 1
    assert torch.equal(base.classifier.modules_to_save["default"].weight, before / found["temperature"])
    assert torch.equal(base.classifier.original_module.weight, frozen)
    model.save_pretrained(tmp_path / "adapter")
    base.config.save_pretrained(tmp_path / "adapter")
    EXTRACTOR.save_pretrained(tmp_path / "adapter")
    merged, _ = load_trained(tmp_path / "adapter", ASiTForAudioClassification)
    assert torch.equal(merged.classifier.weight, before / found["temperature"])
    again = calibrate_classifier(merged, EXTRACTOR, table, label_column="label")
    assert again["temperature"] == pytest.approx(1, abs=1e-3)

    unsaved = peft.get_peft_model(build(), peft.LoraConfig(r=4, **targets))
    with pytest.raises(ValueError, match='modules_to_save=\\["classifier"\\]'):
        calibrate_classifier(unsaved, EXTRACTOR, table, label_column="label")


def test_the_last_layer_of_other_models():
    ast = ASTForAudioClassification(
        ASTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3)
    )
    assert last_linear(ast) is ast.classifier.dense
    frames = build(ASiTForAudioFrameClassification)
    assert last_linear(frames) is frames.classifier


def test_few_clips_leave_a_layer_with_finite_weights():
    layer = torch.nn.Linear(4, 3)
    inputs = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    logits = layer(inputs).detach()
    found = calibrate_layer(layer, logits.numpy(), logits.argmax(-1).numpy())
    assert layer.weight.isfinite().all()
    torch.testing.assert_close(layer(inputs).detach() * found["temperature"], logits)
    assert found["nll"] <= found["nll_before"]
    assert np.isfinite(list(found.values())).all()
