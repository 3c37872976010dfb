import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import soundfile
import torch
from tiny import MEL, build
from transformers import pipeline

from asit_hf import (
    ASiTFeatureExtractor,
    ASiTForAudioClassification,
    ASiTForAudioFrameClassification,
    ASiTForPreTraining,
    ASiTModel,
)
from asit_hf.configuration_asit import SENTENCE_TRANSFORMERS_FILES
from asit_hf.hub import onnx as onnx_files
from asit_hf.hub.__main__ import main
from asit_hf.hub.export import export_model
from asit_hf.hub.onnx import OPSET, describe, export_onnx, is_onnx_export, log_mel_graph

RATE = 8000  # windows of 200 samples every 80, patches of 16 windows
PATCH = 200 + 15 * 80
LENGTHS = [1, 199, 200, 201, PATCH - 1, PATCH, PATCH + 1, 16 * 80 + PATCH - 1, 16 * 80 + PATCH, RATE, 10 * RATE + 7]
PAGE = Path(onnx_files.__file__).with_name("README.md")
GOLDEN = np.load(Path(__file__).parents[1] / "fixtures" / "fbank.npz")


def sounds(samples: int, rate: int) -> dict[str, np.ndarray]:
    time, noise = np.arange(samples) / rate, np.random.default_rng(0).normal(size=samples)
    waveforms = {
        "noise": 0.1 * noise,
        "quiet": 1e-5 * noise,
        "silent": 0 * noise,
        "constant": 0 * noise + 0.5,
        "offset": 0.5 + 0.01 * noise,
        "loud": np.sign(np.sin(1000 * time)),
        "fading": np.round(2**15 * np.exp(-5 * time) * np.sin(5000 * time)) / 2**15,
    }
    return {name: waveform.astype(np.float32) for name, waveform in waveforms.items()}


def session(model: onnx.ModelProto | Path) -> onnxruntime.InferenceSession:
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampling_rate": 8000, "num_mel_bins": 64, "mean": -5.5, "std": 3.25},
        {"sampling_rate": 32000, "do_normalize": False},
        {"sampling_rate": 44100, "num_mel_bins": 33},
        {"sampling_rate": 22050},
    ],
)
def test_log_mel_graph_equals_the_extractor(options):
    extractor = ASiTFeatureExtractor(**options)
    rate, window = extractor.sampling_rate, int(0.025 * extractor.sampling_rate)
    graph = log_mel_graph(extractor, OPSET, 10)
    onnx.checker.check_model(graph, full_check=True)
    run, differences = session(graph), []
    waveforms = [
        one for samples in (1, window - 1, window, window + 1, rate) for one in sounds(samples, rate).values()
    ]
    for case in {name.split("/")[0] for name in GOLDEN.files}:
        if GOLDEN[f"{case}/sampling_rate"] == rate:
            waveforms.append(GOLDEN[f"{case}/waveform"].astype(np.float32))
    for waveform in waveforms:
        (values,) = run.run(None, {"waveform": waveform[None]})
        expected = extractor(waveform, sampling_rate=rate, return_tensors="np")["input_values"]
        assert values.shape == expected.shape
        differences.append(np.abs(values - expected) * (2 * extractor.std if extractor.do_normalize else 1))
    # in log-mel; only bins near the floor of float32 differ
    assert max(one.max() for one in differences) < 0.02
    assert max(one.mean() for one in differences) < 5e-4


def extract(model, extractor: ASiTFeatureExtractor, waveforms: np.ndarray) -> np.ndarray:
    """What the extractor and the model give: logits, or an encoder's embedding."""
    with torch.no_grad():
        outputs = model(**extractor(list(waveforms), sampling_rate=extractor.sampling_rate, return_tensors="pt"))
    return (outputs.logits if "logits" in outputs else outputs.pooler_output).numpy()


def save(cls, folder: Path, **options) -> tuple:
    model, extractor = build(cls, **options), ASiTFeatureExtractor(sampling_rate=RATE, num_mel_bins=MEL, std=3.5)
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return model, extractor


NAMES = {0: "dog", 1: "чайка", 2: "rain", 3: "a, b", 4: '"'}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> tuple:
    """A classifier, its extractor, and the folder that the command exported it to, in place."""
    folder = tmp_path_factory.mktemp("classifier")
    model, extractor = save(
        ASiTForAudioClassification, folder, id2label=NAMES, problem_type="multi_label_classification"
    )
    assert main(["export", str(folder), str(folder), "--onnx", "--int8"]) == 0
    return model, extractor, folder / "onnx"


def assert_waveforms_agree(model, extractor: ASiTFeatureExtractor, file: Path, tolerance: float = 1e-3) -> None:
    run = session(file)
    for samples in LENGTHS:
        names, waveforms = zip(*sounds(samples, RATE).items())
        (outputs,) = run.run(None, {"waveform": np.stack(waveforms)})
        expected = extract(model, extractor, waveforms)
        assert outputs.shape == expected.shape
        assert np.abs(outputs - expected).max() < tolerance, (samples, names)
        (alone,) = run.run(None, {"waveform": waveforms[0][None]})
        assert np.abs(alone - outputs[:1]).max() < 1e-4


@pytest.mark.slow
def test_a_waveform_gives_the_logits_of_extractor_and_model(classifier):
    model, extractor, folder = classifier
    assert_waveforms_agree(model, extractor, folder / "waveform.onnx")
    assert is_onnx_export(folder)  # which another export may replace
    assert not {path.name for path in folder.rglob("*")} & {*SENTENCE_TRANSFORMERS_FILES}


@pytest.mark.slow
def test_int8_weights_change_little(classifier):
    model, extractor, folder = classifier
    assert_waveforms_agree(model, extractor, folder / "waveform_int8.onnx", tolerance=0.5)
    graph = onnx.load(folder / "waveform_int8.onnx").graph
    stored = {one.name: onnx.TensorProto.DataType.Name(one.data_type) for one in graph.initializer}
    assert stored["log_mel/filters"] == stored["log_mel/hann"] == "FLOAT"
    assert list(stored.values()).count("INT8") == 6 * 2  # q, k, v, o, fc1 and fc2 of two layers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["waveform.onnx", "waveform_int8.onnx"])
def test_one_standard_file_states_all_that_its_user_needs(classifier, name):
    model = onnx.load(classifier[-1] / name, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert [(one.domain, one.version) for one in model.opset_import] == [("", OPSET)]
    assert {node.domain for node in model.graph.node} == {""}
    assert all(one.data_location == onnx.TensorProto.DEFAULT for one in model.graph.initializer)
    facts = session(classifier[-1] / name).get_modelmeta().custom_metadata_map
    assert facts["sampling_rate"] == str(RATE)
    assert json.loads(facts["labels"]) == list(NAMES.values())
    assert facts["problem_type"] == "multi_label_classification"
    run = session(classifier[-1] / name)
    assert [(one.name, one.shape) for one in run.get_inputs()] == [("waveform", ["batch", "samples"])]
    assert [(one.name, one.shape) for one in run.get_outputs()] == [("logits", ["batch", 5])]


@pytest.mark.slow
def test_an_encoder_gives_its_embedding_and_the_command_says_what_it_wrote(tmp_path, capfd, recwarn):
    source, copy = tmp_path / "encoder", tmp_path / "copy"
    model, extractor = save(ASiTModel, source, pooling_mode="cls_mean")
    capfd.readouterr()
    assert main(["export", str(source), str(copy), "--onnx"]) == 0
    printed = capfd.readouterr()
    lines = printed.out.strip().splitlines()
    assert lines[0] == str(copy)
    assert [line.split(":")[0].split("copy/")[1] for line in lines[1:]] == ["onnx/model.onnx", "onnx/waveform.onnx"]
    assert re.search(r"MB, waveform \(batch, samples\) -> embedding \(batch, 96\)", lines[2])
    assert not re.search(r"torch\.onnx|torchvision|onnxscript|xperimental", printed.err)
    assert not recwarn.list
    assert_waveforms_agree(model, extractor, copy / "onnx" / "waveform.onnx")
    assert main(["export", str(source), str(copy)]) == 0  # replaces it, with its ONNX files
    assert not (copy / "onnx").exists()


@pytest.mark.slow
def test_a_frame_classifier_gives_logits_for_every_time_patch(tmp_path):
    model, extractor = save(ASiTForAudioFrameClassification, tmp_path / "saved", num_hidden_layers=1)
    export_onnx(model, extractor, tmp_path)
    assert_waveforms_agree(model, extractor, tmp_path / "waveform.onnx")
    (output,) = session(tmp_path / "waveform.onnx").get_outputs()
    assert (output.name, output.shape) == ("logits", ["batch", "time_patches", 5])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnx", "onnx/int8"])
def test_the_pipeline_runs_an_exported_model(classifier, name):
    from transformers.exporters import ExportedModel

    folder = classifier[-1].parent
    expected = pipeline("audio-classification", model=str(folder))
    exported = pipeline("audio-classification", model=ExportedModel.from_pretrained(folder / name))
    for samples in (100, PATCH - 1, 3 * RATE):  # shorter than a window, shorter than a patch
        waveform = sounds(samples, RATE)["noise"]
        scores, others = (
            {one["label"]: one["score"] for one in run(waveform, top_k=None)} for run in (expected, exported)
        )
        assert set(scores) == set(NAMES.values())
        assert others == pytest.approx(scores, abs=1e-5 if name == "onnx" else 0.1)


@pytest.mark.slow
def test_the_example_of_the_documentation_needs_only_onnxruntime(classifier, tmp_path):
    model, extractor, folder = classifier
    waveform = sounds(2 * RATE, RATE)["noise"]
    soundfile.write(tmp_path / "sound.wav", waveform, RATE, subtype="FLOAT")
    (code,) = (
        one
        for one in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
        if "soundfile" in one
    )
    code = code.replace("runs/classifier/onnx/waveform.onnx", str(folder / "waveform.onnx"))
    blocked = "import sys\nfor name in ('torch', 'transformers', 'asit_hf', 'onnx'):\n    sys.modules[name] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", blocked + code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    scores = torch.from_numpy(extract(model, extractor, waveform[None]))[0].sigmoid()
    assert done.stdout.split()[0] == NAMES[int(scores.argmax())]
    assert float(done.stdout.split()[1]) == pytest.approx(float(scores.max()), abs=1e-3)


# --- without exporting ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "options", "expected"),
    [
        (ASiTModel, {}, {"output": "embedding"}),
        (ASiTForAudioClassification, {}, {"output": "logits", "problem_type": "single_label_classification"}),
        (ASiTForAudioClassification, {"num_labels": 1}, {"problem_type": "regression"}),
        (ASiTForAudioFrameClassification, {}, {"time_patch_seconds": "0.16"}),
    ],
)
def test_facts_of_every_model(cls, options, expected):
    facts = describe(build(cls, **options), ASiTFeatureExtractor(sampling_rate=RATE, num_mel_bins=MEL))
    for name, value in {"sampling_rate": str(RATE), **expected}.items():
        assert facts[name].split(" ")[0] == value
    assert ("labels" in facts) == (cls is not ASiTModel)


@pytest.fixture
def fake_onnx(monkeypatch):
    """Writes the names of the files only."""

    def write(model, extractor, folder, int8=False):
        folder.mkdir()
        write.weights = model.state_dict()
        for name in ("waveform.onnx", "model.onnx", *(["waveform_int8.onnx"] if int8 else [])):
            (folder / name).touch()

    monkeypatch.setattr("asit_hf.hub.export.export_onnx", write)
    return write


def test_onnx_files_are_added_to_a_models_own_folder(tmp_path, fake_onnx):
    save(ASiTForAudioClassification, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    export_model(tmp_path, tmp_path, onnx=True, int8=True)
    export_model(tmp_path, tmp_path, onnx=True)
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == ["model.onnx", "waveform.onnx"]
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name != "onnx"}
    for options in ({}, {"onnx": True, "half": True}, {"onnx": True, "max_shard_size": "1MB"}):
        with pytest.raises(ValueError, match="folder"):
            export_model(tmp_path, tmp_path, overwrite=True, **options)
    (tmp_path / "onnx" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="onnx"):
        export_model(tmp_path, tmp_path, onnx=True)
    export_model(tmp_path, tmp_path, onnx=True, overwrite=True)
    assert not (tmp_path / "onnx" / "notes.txt").exists()


def test_the_encoder_of_a_pretraining_checkpoint_needs_its_own_folder(tmp_path, fake_onnx):
    save(ASiTForPreTraining, tmp_path / "run")
    with pytest.raises(ValueError, match="another folder"):
        export_model(tmp_path / "run", tmp_path / "run", onnx=True, overwrite=True)
    assert not (tmp_path / "run" / "onnx").exists()
    export_model(tmp_path / "run", tmp_path / "encoder", onnx=True)
    assert (tmp_path / "encoder" / "onnx" / "waveform.onnx").is_file()


def test_onnx_files_beside_halved_weights_compute_with_these(tmp_path, fake_onnx):
    save(ASiTModel, tmp_path / "model")
    folder = export_model(tmp_path / "model", tmp_path / "half", onnx=True, half=True)
    torch.testing.assert_close(fake_onnx.weights, ASiTModel.from_pretrained(folder).state_dict(), rtol=0, atol=0)


def test_a_failed_conversion_leaves_the_earlier_files(tmp_path, fake_onnx, monkeypatch):
    save(ASiTModel, tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "model", onnx=True)
    export_model(tmp_path / "model", tmp_path / "copy", onnx=True)

    def fail(model, extractor, folder, int8=False):
        fake_onnx(model, extractor, folder, int8)
        raise RuntimeError("no more memory")

    monkeypatch.setattr("asit_hf.hub.export.export_onnx", fail)
    before = sorted(tmp_path.rglob("*"))
    for folder in ("model", "copy"):
        with pytest.raises(RuntimeError):
            export_model(tmp_path / "model", tmp_path / folder, onnx=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_missing_is_named(tmp_path, monkeypatch, capsys):
    save(ASiTModel, tmp_path / "model")
    command = ["export", str(tmp_path / "model"), str(tmp_path / "copy"), "--onnx"]
    with monkeypatch.context() as patch:
        patch.setattr(onnx_files, "transformers_version", "5.22.2")
        assert main(command) == 1
        assert re.search(r"5\.23.*5\.22\.2", capsys.readouterr().err)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        assert main(command) == 1
        assert "asit-hf[onnx]" in capsys.readouterr().err
    monkeypatch.setattr(onnx_files, "MAX_BYTES", 1000)
    assert main(command) == 1
    assert "2 GB" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["model"]
