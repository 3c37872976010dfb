import io
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from datasets import Audio, Dataset, DatasetDict
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    AudioClassificationPipeline,
    pipeline,
)
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.pt_utils import KeyDataset

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForAudioClassification, ASiTForPreTraining, ASiTModel
from asit_hf.data.audio import AudioReadError, read_audio, resample
from asit_hf.pipeline import MAX_SECONDS, ASiTAudioClassificationPipeline, register_pipeline

RATE = 16000


def tiny_config(**kwargs) -> ASiTConfig:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    heads = {"distillation_hidden_size": 16, "distillation_bottleneck_size": 8, "num_prototypes": 16}
    # a wide initialization, so that different sounds get different scores
    return ASiTConfig(**{**sizes, **heads, "num_mel_bins": 32, "num_frames": 96, "initializer_range": 0.3, **kwargs})


def make_classifier(folder: Path, **kwargs) -> Path:
    torch.manual_seed(0)
    labels = {0: "dog", 1: "rain", 2: "bell", 3: "siren", 4: "wind", 5: "clock"}
    model = ASiTForAudioClassification(tiny_config(**{"id2label": labels, **kwargs}))
    model.save_pretrained(folder)
    ASiTFeatureExtractor(num_mel_bins=32).save_pretrained(folder)
    return folder


def asit_pipeline(folder: Path, **kwargs) -> ASiTAudioClassificationPipeline:
    return pipeline(
        "audio-classification", model=str(folder), pipeline_class=ASiTAudioClassificationPipeline, **kwargs
    )


def make_sound(seconds: float, seed: int = 0, rate: int = RATE) -> np.ndarray:
    """A rising tone in noise: its windows differ."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).standard_normal(len(time))
    return (0.3 * np.sin(2 * np.pi * (300 + 200 * seed + 150 * time) * time) + 0.01 * noise).astype(np.float32)


def scores_of(labels: list[dict]) -> dict[str, float]:
    return {item["label"]: item["score"] for item in labels}


def assert_same_scores(labels: list[dict], expected: list[dict], tolerance: float = 1e-5) -> None:
    assert scores_of(labels) == pytest.approx(scores_of(expected), abs=tolerance)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def classifier(folder) -> ASiTAudioClassificationPipeline:
    return asit_pipeline(folder, top_k=None)


@pytest.fixture
def registered(monkeypatch) -> None:
    task = PIPELINE_REGISTRY.supported_tasks["audio-classification"]
    monkeypatch.setitem(task, "impl", task["impl"])
    register_pipeline()


def test_scores_are_the_models_own(folder, classifier):
    sound = make_sound(1.5)
    inputs = ASiTFeatureExtractor.from_pretrained(folder)(sound, sampling_rate=RATE, return_tensors="pt")
    with torch.no_grad():
        expected = ASiTForAudioClassification.from_pretrained(folder).eval()(**inputs).logits[0].softmax(-1)
    labels = classifier(sound)
    assert [item["score"] for item in labels] == sorted(expected.tolist(), reverse=True)
    assert labels[0]["label"] == classifier.model.config.id2label[int(expected.argmax())]


def test_all_forms_of_one_clip_agree(classifier, tmp_path):
    pcm = np.round(make_sound(1.2) * 32767).astype(np.int16)
    sound = pcm.astype(np.float32) / 32768
    path = tmp_path / "clip.wav"
    soundfile.write(path, pcm, RATE)
    row = Dataset.from_dict({"audio": [str(path)]}).cast_column("audio", Audio(decode=False))[0]["audio"]
    samples = SimpleNamespace(data=torch.from_numpy(sound)[None], sample_rate=RATE)
    forms = {
        "float64": sound.astype(np.float64),
        "int16": pcm,
        "tensor": torch.from_numpy(sound),
        "array": {"array": sound, "sampling_rate": RATE},
        "raw": {"raw": torch.from_numpy(sound), "sampling_rate": RATE},
        "array with path": {"path": None, "array": sound, "sampling_rate": RATE},
        "one row": sound[None],
        "channels last": np.stack([sound, sound], axis=1),
        "str": str(path),
        "Path": path,
        "bytes": path.read_bytes(),
        "row": row,
        "row of bytes": {"path": None, "bytes": path.read_bytes()},
        "bytearray": bytearray(path.read_bytes()),
        "memoryview": memoryview(path.read_bytes()),
        "data set row": {"audio": row, "label": 1},
        "decoder": SimpleNamespace(get_all_samples=lambda: samples),
    }
    expected = classifier(sound)
    for form, clip in forms.items():
        assert classifier(clip) == expected, form
    assert classifier(list(forms.values())) == [expected] * len(forms)


@pytest.mark.parametrize("rate", [8000, 22050, 44100])
def test_other_rates_are_resampled(classifier, tmp_path, rate):
    sound = make_sound(1.2, rate=rate)
    soundfile.write(tmp_path / "clip.wav", sound, rate, subtype="FLOAT")
    expected = classifier(resample(sound, rate, RATE))
    assert_same_scores(classifier({"array": sound, "sampling_rate": rate}), expected)
    assert_same_scores(classifier(tmp_path / "clip.wav"), expected)


@pytest.mark.parametrize("extension", ["flac", "ogg", "mp3"])
def test_compressed_files_need_neither_ffmpeg_nor_torchaudio(classifier, tmp_path, monkeypatch, extension):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    path = tmp_path / f"clip.{extension}"
    soundfile.write(path, make_sound(1.2), RATE)
    decoded, _ = soundfile.read(path, dtype="float32")
    assert_same_scores(classifier(path), classifier(decoded))


def test_stereo_is_averaged(classifier, tmp_path):
    left, right = make_sound(1.2, seed=1), make_sound(1.2, seed=2)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], axis=1), RATE, subtype="FLOAT")
    expected = classifier((left + right) / 2)
    assert_same_scores(classifier(tmp_path / "stereo.wav"), expected)
    channels = np.stack([left, right])
    assert_same_scores(classifier({"array": channels, "sampling_rate": RATE}), expected)
    assert_same_scores(classifier([channels])[0], expected)


def test_a_bare_array_of_rows_is_refused_as_the_extractor_takes_it_as_a_batch(classifier):
    rows = np.stack([make_sound(0.5, seed=1), make_sound(0.5, seed=2)])
    assert len(classifier.feature_extractor(rows, sampling_rate=RATE)["input_values"]) == 2
    for array in (rows, torch.from_numpy(rows)):
        with pytest.raises(ValueError, match=r"\(2, 8000\)"):
            classifier(array)
    assert classifier(list(rows)) == [classifier(row) for row in rows]
    one = classifier.feature_extractor(rows[:1], sampling_rate=RATE)["input_values"]
    np.testing.assert_array_equal(one, classifier.feature_extractor(rows[0], sampling_rate=RATE)["input_values"])


@pytest.fixture
def server():
    """Serves the clip below /clip.wav; everything else is missing."""
    buffer = io.BytesIO()
    soundfile.write(buffer, make_sound(1.0), RATE, format="WAV", subtype="FLOAT")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/clip.wav" else 404)
            self.end_headers()
            if self.path == "/clip.wav":
                self.wfile.write(buffer.getvalue())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_urls(classifier, server):
    assert classifier(f"{server}/clip.wav") == classifier(make_sound(1.0))
    with pytest.raises(AudioReadError, match="missing.wav.*404"):
        classifier(f"{server}/missing.wav")


def test_many_clips_in_every_container(classifier):
    sounds = [make_sound(seconds, seed) for seed, seconds in enumerate((0.7, 1.5, 0.3))]
    expected = [classifier(sound) for sound in sounds]
    rows = Dataset.from_dict({"audio": [{"array": sound.tolist(), "sampling_rate": RATE} for sound in sounds]})
    assert classifier(sounds) == expected
    assert classifier(tuple(sounds)) == expected
    assert list(classifier(sound for sound in sounds)) == expected
    assert classifier(rows["audio"]) == expected
    assert list(classifier(rows)) == expected
    assert list(classifier(rows.to_iterable_dataset())) == expected
    assert list(classifier(map(np.asarray, sounds), batch_size=2)) == list(classifier(sounds, batch_size=2))
    assert classifier([]) == []


def test_data_sets_that_would_decode_need_no_torchcodec(classifier, tmp_path):
    sounds = [make_sound(seconds, seed) for seed, seconds in enumerate((0.7, 0.4))]
    for index, sound in enumerate(sounds):
        soundfile.write(tmp_path / f"{index}.wav", sound, RATE, subtype="FLOAT")
    files = [str(tmp_path / f"{index}.wav") for index in range(2)]
    rows = Dataset.from_dict({"audio": files, "other": files}).cast_column("audio", Audio())
    rows = rows.cast_column("other", Audio())
    nested = Dataset.from_dict({"clip": [{"audio": {"path": file, "bytes": None}} for file in files]})
    nested.info.features["clip"] = {"audio": Audio()}
    expected = classifier(sounds)
    forms = {
        "data set": rows,
        "column": rows["audio"],
        "key": KeyDataset(rows, "audio"),
        "subset": torch.utils.data.Subset(rows, [0, 1]),
        "joined": torch.utils.data.ConcatDataset([rows.select([0]), KeyDataset(rows.select([1]), "audio")]),
        "stream": rows.to_iterable_dataset(),
        "column of a stream": rows.to_iterable_dataset()["audio"],
        "numpy": rows.with_format("numpy"),
        "tensors": rows.with_format("torch"),
        "another name": rows.select_columns("other"),
        "nested": nested["clip"]["audio"],
        "rows of a nested column": nested["clip"],
    }
    for form, clips in forms.items():
        assert list(classifier(clips)) == expected, form
    with pytest.raises(TypeError, match="train"):
        classifier(DatasetDict({"train": rows}))


def test_streams_that_decode_by_themselves_are_explained(classifier):
    def decoded():
        raise ImportError("To support decoding audio data, please install 'torchcodec'.")
        yield

    with pytest.raises(ImportError, match="decode=False"):
        list(classifier(decoded()))


@pytest.mark.parametrize("rate", [np.int64(8000), np.array(8000), np.array([8000]), torch.tensor(8000), 8000.0])
def test_rates_of_any_number_type(classifier, rate):
    sound = make_sound(0.4, rate=8000)
    assert classifier({"array": sound, "sampling_rate": rate}) == classifier({"array": sound, "sampling_rate": 8000})
    np.testing.assert_array_equal(read_audio({"array": sound, "sampling_rate": 8000}, rate), sound)
    extractor = ASiTFeatureExtractor(sampling_rate=rate)
    assert extractor.sampling_rate == 8000
    assert type(extractor.sampling_rate) is int
    assert len(extractor(sound, sampling_rate=rate)["input_values"]) == 1


@pytest.mark.parametrize("batch_size", [2, 3, 8])
@pytest.mark.parametrize("window_seconds", [None, 0.8])
def test_batched_scores_equal_those_of_each_clip_alone(classifier, batch_size, window_seconds):
    sounds = [make_sound(seconds, seed) for seed, seconds in enumerate((2.0, 0.31, 1.1, 0.01, 3.3, 0.8, 0.9))]
    together = classifier(sounds, batch_size=batch_size, window_seconds=window_seconds)
    for labels, sound in zip(together, sounds, strict=True):
        assert_same_scores(labels, classifier(sound, window_seconds=window_seconds))


def test_batches_mask_padding_whatever_the_extractors_default(folder):
    extractor = ASiTFeatureExtractor(num_mel_bins=32, return_attention_mask=False, padding_value=3.0)
    classifier = asit_pipeline(folder, feature_extractor=extractor, top_k=None)
    sounds = [make_sound(2.0), make_sound(0.6, seed=1)]
    for labels, sound in zip(classifier(sounds, batch_size=2), sounds, strict=True):
        assert_same_scores(labels, classifier(sound))


def test_windows_cover_the_clip(classifier):
    output = classifier(make_sound(3.1), window_seconds=1.0, overlap=0.5, return_timeline=True)
    starts, ends = ([window[name] for window in output["timeline"]] for name in ("start", "end"))
    assert starts == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0, 2.1])
    assert ends == pytest.approx([1.0, 1.5, 2.0, 2.5, 3.0, 3.1])


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("seconds", [0.2, 1.0, 1.05, 2.0, 2.37])
def test_windows_have_one_length_and_leave_no_gap(classifier, seconds, overlap):
    timeline = classifier(make_sound(seconds), window_seconds=1.0, overlap=overlap, return_timeline=True)["timeline"]
    starts, ends = ([window[name] for window in timeline] for name in ("start", "end"))
    assert starts[0] == 0
    assert ends[-1] == pytest.approx(seconds, abs=1 / RATE)
    assert all(end - start == pytest.approx(min(1.0, seconds), abs=1 / RATE) for start, end in zip(starts, ends))
    assert all(start <= end for start, end in zip(starts[1:], ends))
    assert starts == sorted(set(starts))


def test_a_windows_labels_are_those_of_its_seconds(classifier):
    sound = make_sound(2.5)
    for window in classifier(sound, window_seconds=1.0, return_timeline=True)["timeline"]:
        cut = sound[round(window["start"] * RATE) : round(window["end"] * RATE)]
        assert_same_scores(window["labels"], classifier(cut))


def test_windows_of_a_file_are_those_of_its_samples(classifier, tmp_path):
    sound = make_sound(2.5, rate=44100)
    soundfile.write(tmp_path / "clip.flac", sound, 44100, subtype="PCM_24")
    options = {"window_seconds": 0.7, "return_timeline": True}
    windows = classifier(tmp_path / "clip.flac", **options)["timeline"]
    expected = classifier(resample(sound, 44100, RATE), **options)["timeline"]
    for window, other in zip(windows, expected, strict=True):
        assert window["start"] == other["start"]
        assert_same_scores(window["labels"], other["labels"], tolerance=1e-3)


@pytest.mark.parametrize(("aggregate", "reduce"), [("mean", np.mean), ("max", np.max)])
def test_aggregates_are_over_the_windows_scores(classifier, aggregate, reduce):
    output = classifier(make_sound(3.0), window_seconds=1.0, aggregate=aggregate, return_timeline=True)
    windows = [scores_of(window["labels"]) for window in output["timeline"]]
    expected = {label: reduce([window[label] for window in windows]) for label in windows[0]}
    assert len(windows) > 1
    assert scores_of(output["labels"]) == pytest.approx(expected, abs=1e-6)


def test_a_clip_is_whole_up_to_the_limit(classifier):
    whole = classifier(make_sound(MAX_SECONDS), return_timeline=True)["timeline"]
    longer = classifier(make_sound(MAX_SECONDS + 1), return_timeline=True)["timeline"]
    assert [(window["start"], window["end"]) for window in whole] == [(0, MAX_SECONDS)]
    assert [(window["start"], window["end"]) for window in longer] == [(0, MAX_SECONDS), (1, MAX_SECONDS + 1)]


def test_top_k(folder):
    classifier = asit_pipeline(folder)
    sound = make_sound(1.0)
    every = classifier(sound, top_k=None)
    assert [item["score"] for item in every] == sorted((item["score"] for item in every), reverse=True)
    assert len(every) == 6
    assert classifier(sound) == every[:5]
    assert classifier(sound, top_k=2) == every[:2]
    assert classifier(sound, top_k=100) == every
    assert asit_pipeline(folder, top_k=3)(sound) == every[:3]


@pytest.mark.parametrize(
    ("problem_type", "function"),
    [
        ("single_label_classification", torch.nn.Softmax(-1)),
        (None, torch.nn.Softmax(-1)),
        ("multi_label_classification", torch.nn.Sigmoid()),
        ("regression", torch.nn.Identity()),
    ],
)
def test_the_problem_type_chooses_the_function(tmp_path, problem_type, function):
    classifier = asit_pipeline(make_classifier(tmp_path, problem_type=problem_type), top_k=None)
    sound = make_sound(1.0)
    logits = scores_of(classifier(sound, function_to_apply="none"))
    expected = dict(zip(logits, function(torch.tensor(list(logits.values()))).tolist()))
    assert scores_of(classifier(sound)) == pytest.approx(expected, abs=1e-6)


def test_one_output_without_a_problem_type_is_a_regression(tmp_path):
    classifier = asit_pipeline(make_classifier(tmp_path, id2label={0: "loudness"}))
    assert classifier(make_sound(1.0)) == classifier(make_sound(1.0), function_to_apply="none")


def test_half_precision(folder, classifier):
    half = asit_pipeline(folder, dtype=torch.bfloat16, top_k=None)
    assert half.model.dtype == torch.bfloat16
    assert_same_scores(half(make_sound(1.0)), classifier(make_sound(1.0)), tolerance=0.05)


@pytest.mark.parametrize(
    ("clip", "error", "message"),
    [
        (np.zeros(0, np.float32), AudioReadError, "no samples"),
        (np.array([0.0, np.nan] * 800, np.float32), AudioReadError, "not finite"),
        (np.zeros((2, 3, 4), np.float32), AudioReadError, r"\(2, 3, 4\)"),
        ({"array": np.zeros(1600, np.float32)}, AudioReadError, "sampling_rate"),
        ({"text": "rain"}, AudioReadError, r"neither a path nor bytes in \['text'\], nor array"),
        (io.BytesIO(b"RIFF"), TypeError, "BytesIO"),
        ("/nowhere/clip.wav", AudioReadError, "/nowhere/clip.wav: no such file"),
        (b"not audio at all", AudioReadError, "bytes"),
        (3.5, TypeError, "float"),
        (None, AudioReadError, "NoneType"),
    ],
)
def test_errors_of_wrong_clips(classifier, clip, error, message):
    with pytest.raises(error, match=message):
        classifier(clip)
    with pytest.raises(error, match=message):
        classifier([make_sound(0.5), clip], batch_size=2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"overlap": 1.0}, ValueError, "overlap"),
        ({"overlap": -0.1}, ValueError, "overlap"),
        ({"window_seconds": 0}, ValueError, "window_seconds"),
        ({"window_seconds": float("nan")}, ValueError, "window_seconds"),
        ({"aggregate": "median"}, ValueError, "median"),
        ({"function_to_apply": "tanh"}, ValueError, "tanh"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"window": 2.0}, TypeError, "window"),
    ],
)
def test_errors_of_wrong_options(folder, classifier, options, error, message):
    with pytest.raises(error, match=message):
        classifier(make_sound(0.5), **options)
    with pytest.raises(error, match=message):
        asit_pipeline(folder, **options)


def test_other_models_are_refused(folder):
    extractor = ASiTFeatureExtractor(num_mel_bins=32)
    with pytest.raises(ValueError, match="ASiTModel"):
        ASiTAudioClassificationPipeline(model=ASiTModel(tiny_config()), feature_extractor=extractor)
    with pytest.raises(ValueError, match="feature_extractor"):
        ASiTAudioClassificationPipeline(model=ASiTForAudioClassification(tiny_config()))


def test_the_registered_pipeline_is_the_default_for_asit(registered, folder, classifier, tmp_path):
    default = pipeline("audio-classification", model=str(folder), top_k=None)
    assert type(default) is ASiTAudioClassificationPipeline
    soundfile.write(tmp_path / "clip.wav", make_sound(1.0), RATE, subtype="FLOAT")
    assert default(tmp_path / "clip.wav") == classifier(make_sound(1.0))
    model = ASiTForAudioClassification.from_pretrained(folder)
    given = pipeline("audio-classification", model=model, feature_extractor=ASiTFeatureExtractor(num_mel_bins=32))
    assert type(given) is ASiTAudioClassificationPipeline


def test_the_registered_pipeline_leaves_other_models_alone(registered, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = ASTForAudioClassification(ASTConfig(**sizes, num_mel_bins=32, max_length=96))
    extractor = ASTFeatureExtractor(num_mel_bins=32, max_length=96)
    model.save_pretrained(tmp_path)
    extractor.save_pretrained(tmp_path)
    default = pipeline("audio-classification", model=str(tmp_path))
    assert type(default) is AudioClassificationPipeline
    stock = AudioClassificationPipeline(model=model.eval(), feature_extractor=extractor, task="audio-classification")
    assert default(make_sound(1.0)) == stock(make_sound(1.0))


def test_a_saved_pipeline_loads_again(registered, classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    again = pipeline("audio-classification", model=str(tmp_path), top_k=None)
    assert type(again) is ASiTAudioClassificationPipeline
    assert again(make_sound(1.0)) == classifier(make_sound(1.0))


def test_the_stock_pipeline_works_on_arrays(folder, classifier):
    stock = pipeline("audio-classification", model=str(folder), pipeline_class=AudioClassificationPipeline, top_k=None)
    sounds = [make_sound(1.0), make_sound(0.4, seed=1)]
    for labels, sound in zip(stock(sounds, batch_size=2), sounds, strict=True):
        assert_same_scores(labels, classifier(sound))


@pytest.mark.parametrize(
    ("clip", "error", "message"),
    [
        ("clip.wav", ValueError, "ffmpeg .*required"),
        (Path("clip.wav"), TypeError, "expect a numpy ndarray or torch tensor"),
        (np.zeros((2, RATE), np.float32), ValueError, "single channel"),
        ({"array": np.zeros(8000, np.float32), "sampling_rate": 8000}, ImportError, "pip install torchaudio"),
        (np.zeros(0, np.float32), ValueError, "empty"),
    ],
)
def test_the_stock_pipeline_names_what_it_lacks(folder, tmp_path, monkeypatch, clip, error, message):
    soundfile.write(tmp_path / "clip.wav", make_sound(0.5), RATE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    stock = pipeline("audio-classification", model=str(folder), pipeline_class=AudioClassificationPipeline)
    with pytest.raises(error, match=message):
        stock(clip)


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_the_stock_pipeline_chooses_the_same_function(tmp_path, problem_type):
    if signature(AudioClassificationPipeline.postprocess).parameters["function_to_apply"].default is not None:
        pytest.skip("the pipeline of this transformers takes softmax whatever the problem is")
    folder = make_classifier(tmp_path, problem_type=problem_type)
    stock = pipeline("audio-classification", model=str(folder), pipeline_class=AudioClassificationPipeline, top_k=None)
    assert_same_scores(stock(make_sound(1.0)), asit_pipeline(folder, top_k=None)(make_sound(1.0)))


FRESH_PROCESS = """
import sys
sys.modules["asit_hf"] = None
from pathlib import Path
import numpy as np, torch
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification, pipeline

classifier_folder, pretraining_folder, resaved = sys.argv[1:]
remote = {"trust_remote_code": True}
sound = np.load("sound.npy")
extractor = AutoFeatureExtractor.from_pretrained(classifier_folder, **remote)
inputs = extractor(sound, sampling_rate=16000, return_tensors="pt")
outputs = {}
with torch.no_grad():
    outputs["encoder of classifier"] = AutoModel.from_pretrained(classifier_folder, **remote)(**inputs).pooler_output
    outputs["encoder of pretraining"] = AutoModel.from_pretrained(pretraining_folder, **remote)(**inputs).pooler_output
    classifier = AutoModelForAudioClassification.from_pretrained(classifier_folder, **remote)
    outputs["classifier"] = classifier(**inputs).logits
    fresh_head = AutoModelForAudioClassification.from_pretrained(pretraining_folder, **remote)
    outputs["student"] = fresh_head.asit(**inputs).pooler_output
outputs["pipeline"] = pipeline("audio-classification", model=classifier_folder, top_k=None, **remote)(sound)

classifier.save_pretrained(resaved)
extractor.save_pretrained(resaved)
again = AutoModelForAudioClassification.from_pretrained(resaved, **remote)
with torch.no_grad():
    outputs["resaved"] = again(**AutoFeatureExtractor.from_pretrained(resaved, **remote)(
        sound, sampling_rate=16000, return_tensors="pt")).logits
    outputs["encoder of resaved"] = AutoModel.from_pretrained(resaved, **remote)(**inputs).pooler_output
torch.save(outputs, "outputs.pt")
"""


@pytest.mark.slow
def test_a_fresh_process_without_the_package(folder, classifier, tmp_path):
    torch.manual_seed(1)
    student = ASiTForPreTraining(tiny_config())
    student.save_pretrained(tmp_path / "pretraining")
    sound = make_sound(1.3)
    np.save(tmp_path / "sound.npy", sound)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    folders = [str(folder), str(tmp_path / "pretraining"), str(tmp_path / "resaved")]
    command = [sys.executable, "-W", "error::FutureWarning", "-c", FRESH_PROCESS, *folders]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    inputs = ASiTFeatureExtractor(num_mel_bins=32)(sound, sampling_rate=RATE, return_tensors="pt")
    with torch.no_grad():
        model = classifier.model
        expected = {
            "encoder of classifier": model.asit(**inputs).pooler_output,
            "encoder of resaved": model.asit(**inputs).pooler_output,
            "encoder of pretraining": student.asit.eval()(**inputs).pooler_output,
            "student": student.asit(**inputs).pooler_output,
            "classifier": model(**inputs).logits,
            "resaved": model(**inputs).logits,
        }
    outputs = torch.load(tmp_path / "outputs.pt")
    assert_same_scores(outputs.pop("pipeline"), classifier(sound))
    for name, tensor in expected.items():
        torch.testing.assert_close(outputs.pop(name), tensor, rtol=0, atol=1e-6)
    assert not outputs
    for name in ("configuration_asit.py", "fbank_asit.py", "feature_extraction_asit.py", "modeling_asit.py"):
        assert (tmp_path / "resaved" / name).read_text() == (folder / name).read_text()
