"""Errors for wrong input: rows of (call, exception, words that its message must contain)."""

import sys
from importlib import import_module
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from huggingface_hub.errors import StrictDataclassError

import asit_hf
from asit_hf import (
    ASiTAudioClassificationPipeline,
    ASiTConfig,
    ASiTFeatureExtractor,
    ASiTForAudioClassification,
    ASiTForAudioFrameClassification,
    ASiTForPreTraining,
    ASiTModel,
    read_audio,
)
from asit_hf.data import (
    AudioReadError,
    ClassificationCollator,
    encode_labels,
    filter_rows,
    load_audio_dataset,
    resample,
)
from asit_hf.evaluation import metrics
from asit_hf.evaluation.probes import linear_probe
from asit_hf.fbank_asit import log_mel_spectrogram
from asit_hf.finetuning.sampling import class_weights
from asit_hf.loading import find_checkpoint
from asit_hf.modeling_asit import classification_loss
from asit_hf.predict import load_classifier, predict_folder
from asit_hf.pretraining.losses import view_distillation_loss
from asit_hf.pretraining.masking import GMML, corrupt, draw_masks
from asit_hf.pretraining.presets import get_preset

RATE = 16000
TINY = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_frames": 32,
    "num_mel_bins": 32,
    "distillation_hidden_size": 8,
    "distillation_bottleneck_size": 8,
    "num_prototypes": 8,
}
extract = ASiTFeatureExtractor()
noise = np.random.default_rng(0).standard_normal(1600).astype(np.float32)
spectrogram = torch.randn(2, 32, 32)
views = torch.randn(2, 2, 32, 32)


def model(cls=ASiTModel, **kwargs):
    return cls(ASiTConfig(**{**TINY, **kwargs})).eval()


def classify(labels: torch.Tensor, problem_type: str | None = None):
    return model(ASiTForAudioClassification, num_labels=3, problem_type=problem_type)(spectrogram, labels=labels)


def collate(items: list[dict]):
    return ClassificationCollator(extract, num_labels=3)(items)


def read(source, **kwargs):
    return read_audio(source, sampling_rate=RATE, **kwargs)


def labels_of(files: Path, names: list[str]):
    return encode_labels(load_audio_dataset(files / "table.csv"), names)


def pipe(clips, **kwargs):
    extractor = ASiTFeatureExtractor(num_mel_bins=32)
    return ASiTAudioClassificationPipeline(model=model(ASiTForAudioClassification), feature_extractor=extractor)(
        clips, **kwargs
    )


def without(missing: str, call, *anew: str):
    """Calls without the module `missing`, after the modules `anew` are removed from the imported ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, missing, None)
        for module in anew:
            patch.delitem(sys.modules, module, raising=False)
        call()


def importing(module: str):
    return lambda: import_module(module), module


CLUSTERS = np.eye(2, dtype=np.float32)[[0, 1] * 4], np.array([0, 1] * 4)

WAVEFORMS = [
    (lambda: extract(noise, 22050), ValueError, ["16000", "22050"]),
    (lambda: extract(noise, 44100.0), ValueError, ["16000", "44100"]),
    (lambda: extract([], RATE), ValueError, ["at least one", "empty"]),
    (lambda: extract(np.zeros(0, np.float32), RATE), ValueError, ["waveform 0", "empty"]),
    (lambda: extract([noise, []], RATE), ValueError, ["waveform 1", "empty"]),
    (lambda: extract(np.zeros((0, 1600), np.float32), RATE), ValueError, ["at least one", "(0, 1600)"]),
    (lambda: extract([noise, np.append(noise, np.nan)], RATE), ValueError, ["waveform 1", "finite"]),
    (lambda: extract(torch.tensor([0.0, float("inf")]), RATE), ValueError, ["waveform 0", "finite"]),
    (lambda: extract(np.stack([noise, noise], -1), RATE), ValueError, ["mono", "(1600, 2)"]),
    (lambda: extract([np.stack([noise, noise])], RATE), ValueError, ["mono", "(2, 1600)"]),
    (lambda: extract(np.zeros((2, 2, 400)), RATE), ValueError, ["(batch, samples)", "(2, 2, 400)"]),
    (lambda: extract("clip.wav", RATE), ValueError, ["array", "str"]),
    (lambda: extract(["clip.wav"], RATE), ValueError, ["expected", "str"]),
    (lambda: extract(np.array(["clip.wav"]), RATE), ValueError, ["expected", "<U"]),
    (lambda: extract({"array": noise}, RATE), ValueError, ["array", "dict"]),
    (lambda: extract([{"array": noise}], RATE), ValueError, ["expected", "dict"]),
    (lambda: extract(None, RATE), ValueError, ["array", "NoneType"]),
    (lambda: extract([None], RATE), ValueError, ["expected", "NoneType"]),
    (lambda: extract([noise, 0.5], RATE), ValueError, ["waveform 1", "()"]),
    (lambda: extract(noise > 0, RATE), ValueError, ["floating point", "bool"]),
    (lambda: extract(noise.astype(np.uint8), RATE), ValueError, ["int16", "uint8"]),
    (lambda: extract([1000, -2000] * 400, RATE), ValueError, ["floating point", "int"]),
    (lambda: extract(noise.astype(np.complex64), RATE), ValueError, ["floating point", "complex64"]),
    (lambda: extract(noise, RATE, padding="max_length"), ValueError, ["max_length", "num_frames"]),
    (lambda: extract(noise, RATE, truncation=True), ValueError, ["truncation", "num_frames"]),
    (lambda: extract(noise, RATE, truncation=True, num_frames=0), ValueError, ["num_frames", "0"]),
    (lambda: extract(noise, RATE, truncation=True, num_frames=-3), ValueError, ["num_frames", "-3"]),
    (lambda: extract(noise, RATE, num_frames=20, max_length=30), ValueError, ["num_frames", "20", "30"]),
    (lambda: extract(noise, RATE, padding="left"), ValueError, ["left", "longest"]),
    (lambda: extract(noise, RATE, return_tensors="tf"), ValueError, ["tf", "pt"]),
    (lambda: extract(noise, RATE, do_normalize=True), TypeError, ["do_normalize"]),
    (lambda: extract([noise, noise[:800]], RATE, padding=False, return_tensors="pt"), ValueError, ["padding=True"]),
    (lambda: log_mel_spectrogram(torch.zeros(200), RATE), ValueError, ["400", "200"]),
    (lambda: ASiTFeatureExtractor(feature_size=64, num_mel_bins=128), ValueError, ["64", "128"]),
    (lambda: extract(noise, RATE, pad_to_multiple_of=-3), ValueError, ["pad_to_multiple_of", "at least 1", "-3"]),
    (lambda: extract(noise, RATE, max_length=20.5, truncation=True), ValueError, ["whole number", "20.5"]),
    (lambda: ASiTFeatureExtractor(std=0.0), ValueError, ["std", "0.0"]),
    (lambda: ASiTFeatureExtractor(std=float("nan")), ValueError, ["std", "nan"]),
    (lambda: ASiTFeatureExtractor(sampling_rate=0), ValueError, ["sampling_rate", "0"]),
    (lambda: ASiTFeatureExtractor(num_mel_bins=0), ValueError, ["num_mel_bins", "0"]),
    (lambda: ASiTFeatureExtractor(padding_side="left"), ValueError, ["right", "left"]),
]

CONFIGURATIONS = [
    (lambda: ASiTConfig.from_size("huge"), ValueError, ["base", "huge"]),
    (lambda: ASiTConfig(num_attention_heads=5), Exception, ["multiple of num_attention_heads", "768", "5"]),
    (lambda: ASiTConfig(num_attention_heads=0), Exception, ["num_attention_heads", "0"]),
    (lambda: ASiTConfig(patch_size=0), Exception, ["patch_size", "0"]),
    (lambda: ASiTConfig(num_prototypes=0), Exception, ["num_prototypes", "0"]),
    (lambda: ASiTConfig(num_frames=15), Exception, ["num_frames", "16", "15"]),
    (lambda: ASiTConfig(num_mel_bins=8), Exception, ["num_mel_bins", "16", "8"]),
    (lambda: ASiTConfig(num_mel_bins=100), Exception, ["num_mel_bins", "multiple", "100"]),
    (lambda: ASiTConfig(pooling_mode="max"), Exception, ["cls_mean", "max"]),
    (lambda: ASiTConfig(drop_path_rate=1.0), Exception, ["drop_path_rate", "1.0"]),
    (lambda: ASiTConfig(local_loss_weight=-1.0), Exception, ["local_loss_weight", "-1.0"]),
    (lambda: ASiTConfig(student_temperature=0.0), Exception, ["student_temperature", "0.0"]),
    (lambda: ASiTConfig(hidden_size="768"), Exception, ["hidden_size", "int", "str"]),
]

MODELS = [
    (lambda: model()(torch.randn(2, 32, 128)), ValueError, ["32 mel bins", "(2, 32, 128)"]),
    (lambda: model()(spectrogram[:0]), ValueError, ["(batch, frames, 32 mel bins)", "(0, 32, 32)"]),
    (lambda: model()(spectrogram.long()), ValueError, ["float32", "int64"]),
    (lambda: model()(spectrogram.double()), ValueError, ["float32", "float64"]),
    (lambda: model().bfloat16()(spectrogram), ValueError, ["bfloat16", "float32"]),
    (lambda: model()(torch.randn(32, 32)), ValueError, ["(batch, frames, 32 mel bins)", "(32, 32)"]),
    (lambda: model()(spectrogram, attention_mask=torch.ones(1, 32)), ValueError, ["(2, 32)", "(1, 32)"]),
    (
        lambda: model(drop_path_rate=0.1).train()(spectrogram, drop_path_noise=torch.rand(1, 2, 5)),
        ValueError,
        ["(1, 2, 2)", "(1, 2, 5)"],
    ),
    (lambda: classify(torch.tensor([0, 1]), "ranking"), Exception, ["multi_label", "ranking"]),
    (lambda: classify(torch.tensor([0, 1]), "multi_label_classification"), ValueError, ["(2, 3)", "(2,)"]),
    (lambda: classify(torch.rand(2, 2), "multi_label_classification"), ValueError, ["(2, 3)", "(2, 2)"]),
    (lambda: classify(torch.rand(2), "single_label_classification"), ValueError, ["(2, 3)", "(2,)"]),
    (lambda: classify(torch.rand(2, 2), "single_label_classification"), ValueError, ["(2, 3)", "(2, 2)"]),
    (lambda: classify(torch.tensor([0, 1, 2])), ValueError, ["class ids", "(2,)", "(3,)"]),
    (lambda: classify(torch.eye(3)[:2].long()), ValueError, ["floats of shape (2, 3)", "ids of shape (2, 3)"]),
    (lambda: classify(torch.rand(3, 2), "regression"), ValueError, ["(2, 3)", "(3, 2)"]),
    (lambda: classification_loss(torch.rand(2, 3), torch.zeros(2), "ranking"), ValueError, ["regression", "ranking"]),
    (
        lambda: model(ASiTForAudioFrameClassification)(spectrogram, labels=torch.zeros(2, 32, dtype=torch.long)),
        ValueError,
        ["(2, 2)", "(2, 32)"],
    ),
]

PRETRAINING = [
    (lambda: model(ASiTForPreTraining)(views, views, views[:1] > 0), ValueError, ["(2, 2, 32, 32)", "(1, 2, 32, 32)"]),
    (lambda: model(ASiTForPreTraining)(views[0], views[0], views[0] > 0), ValueError, ["views", "(2, 32, 32)"]),
    (
        lambda: model(ASiTForPreTraining)(views[:, :1], views[:, :1], views[:, :1] > 0),
        ValueError,
        ["two student views"],
    ),
    (
        lambda: model(
            ASiTForPreTraining, global_loss_weight=0.0, local_loss_weight=0.0, reconstruction_loss_weight=0.0
        ),
        ValueError,
        ["loss", "weight"],
    ),
    (
        lambda: view_distillation_loss(torch.rand(2, 1, 8), torch.rand(2, 1, 8), torch.zeros(8), 0.1, 0.04),
        ValueError,
        ["two student views"],
    ),
    (lambda: GMML(mask_ratio=(0.7, 0.5)), ValueError, ["mask_ratio", "(0.7, 0.5)"]),
    (lambda: GMML(mask_ratio=(0.5, 1.0)), ValueError, ["mask_ratio", "1.0"]),
    (lambda: GMML(mask_ratio=(0.0, 0.5)), ValueError, ["mask_ratio", "0.0"]),
    (lambda: GMML(replace_ratio=0.0), ValueError, ["replace_ratio", "0.0"]),
    (lambda: GMML(replace_probability=1.5), ValueError, ["replace_probability", "1.5"]),
    (lambda: GMML(max_block_ratio=0.0), ValueError, ["max_block_ratio", "0.0"]),
    (lambda: GMML(alignment=0), ValueError, ["alignment", "0"]),
    (lambda: get_preset("2022"), ValueError, ["2023", "2022"]),
    (lambda: corrupt(views, torch.arange(3), 0, GMML()), ValueError, ["2", "3"]),
    (
        lambda: draw_masks(torch.arange(8), 32, 32, torch.full((4,), 0.5), GMML()),
        ValueError,
        ["(8,)", "(4,)"],
    ),
    (
        lambda: draw_masks(torch.arange(1), 32, 40, torch.tensor([0.9]), GMML(alignment=32)),
        ValueError,
        ["0.90", "32 x 40"],
    ),
]

# calls with the folder of the fixture `files`
FILES = [
    (lambda files: read(files / "gone.wav"), AudioReadError, ["gone.wav", "no such file"]),
    (lambda files: read(files), AudioReadError, ["Is a directory"]),
    (lambda files: read(files / "text.wav"), AudioReadError, ["text.wav", "Format not recognised"]),
    (lambda files: read(files / "empty.wav"), AudioReadError, ["empty.wav", "empty file"]),
    (lambda files: read(files / "cut.wav"), AudioReadError, ["truncated", "3200 bytes", "1956"]),
    (lambda files: read(files / "cut.flac"), AudioReadError, ["cut.flac", "flac decoder"]),
    (lambda files: read(b"junk"), AudioReadError, ["bytes", "Format not recognised"]),
    (lambda files: read(files / "good.wav", offset=9.0), AudioReadError, ["9.000 s", "0.100 s"]),
    (lambda files: read(3), TypeError, ["path", "int"]),
    (lambda files: read({"array": noise}), AudioReadError, ["sampling_rate", "['array']"]),
    (lambda files: read({"array": noise, "sampling_rate": 0}), ValueError, ["whole Hz above 0", "0"]),
    (lambda files: read_audio(files / "good.wav", sampling_rate=16000.5), ValueError, ["whole Hz", "16000.5"]),
    (lambda files: read_audio(files / "good.wav", sampling_rate="16k"), ValueError, ["whole Hz", "'16k'"]),
    (lambda files: load_audio_dataset(files / "nowhere.csv"), FileNotFoundError, ["no such file", "nowhere.csv"]),
    (lambda files: load_audio_dataset(files / "header.csv"), ValueError, ["no rows", "header.csv"]),
    (lambda files: load_audio_dataset(files / "table.csv", audio_column="sound"), ValueError, ["'sound'", "file"]),
    (lambda files: load_audio_dataset(files / "lost.csv"), FileNotFoundError, ["lost.wav", "set root"]),
    (lambda files: labels_of(files, ["dog", "bird"]), ValueError, ["'cat'", "dog, bird", "good.wav"]),
    (
        lambda files: filter_rows(load_audio_dataset(files / "table.csv"), ["fold"]),
        ValueError,
        ["COLUMN=VALUE", "fold"],
    ),
    (lambda files: find_checkpoint(files), FileNotFoundError, ["saved model", "no config.json"]),
    (lambda files: load_classifier(files / "encoder"), ValueError, ["ASiTModel", "finetune it first"]),
    (lambda files: predict_folder(None, files, batch_size=0), ValueError, ["batch_size", "0"]),
]

BATCHES = [
    (lambda: collate([]), ValueError, ["at least one clip", "none"]),
    (lambda: collate([{"bad_files": [("a.wav", "empty")]}]), ValueError, ["none of the 1 clips", "a.wav"]),
    (lambda: collate([{"waveform": noise, "label": 7}]), ValueError, ["0 to 2", "7"]),
    (lambda: collate([{"waveform": noise, "label": "dog"}]), ValueError, ["0 to 2", "'dog'"]),
    (lambda: collate([{"waveform": noise, "label": None}]), ValueError, ["label for every clip", "None"]),
    (lambda: class_weights([0, 3], 3), ValueError, ["0 to 2", "3"]),
    (lambda: pipe([noise], batch_size=0), ValueError, ["from 1 to 65536", "0"]),
    (lambda: pipe([noise], batch_size=10**9), ValueError, ["from 1 to 65536", "1000000000"]),
    (lambda: pipe(noise, window_seconds=0.01), ValueError, ["0.025", "0.01"]),
    (lambda: pipe(noise, overlap=1.0), ValueError, ["[0, 1)", "1.0"]),
    (lambda: pipe(noise, top_k="3"), ValueError, ["at least 1", "'3'"]),
    (lambda: pipe(noise, aggregate="median"), ValueError, ["mean", "'median'"]),
    (lambda: pipe(noise, sampling_rate=RATE), TypeError, ["sampling_rate", "window_seconds"]),
    (lambda: pipe(noise * np.nan), AudioReadError, ["array", "finite"]),
    (lambda: pipe(b"junk"), AudioReadError, ["bytes", "Format not recognised"]),
    (lambda: ASiTAudioClassificationPipeline(model=model(), feature_extractor=extract), ValueError, ["ASiTModel"]),
]

EXTRAS = [
    (
        lambda: without("sklearn.model_selection", lambda: linear_probe(CLUSTERS, CLUSTERS)),
        ImportError,
        ["sklearn", "asit-hf[train]"],
    ),
    (
        lambda: without("sklearn.metrics", lambda: metrics.average_precisions(CLUSTERS[0], np.eye(2)[CLUSTERS[1]])),
        ImportError,
        ["sklearn is", "[train]"],
    ),
    (
        lambda: without("evaluate", *importing("asit_hf.evaluation.evaluate_metrics")),
        ImportError,
        ["evaluate is", "[train]"],
    ),
    (lambda: without("soundfile", lambda: read(__file__)), ImportError, ["soundfile is", "asit-hf"]),
    (lambda: without("soxr", lambda: resample(noise, 8000, RATE)), ImportError, ["soxr is", "asit-hf"]),
    (lambda: without("matplotlib.axes", *importing("asit_hf.plotting")), ImportError, ["matplotlib is", "[train]"]),
    (
        lambda: without("scipy.ndimage", *importing("asit_hf.evaluation.sound_events")),
        ImportError,
        ["scipy is", "[train]"],
    ),
    (
        lambda: without("accelerate.data_loader", *importing("asit_hf.data.epochs")),
        ImportError,
        ["accelerate is", "[train]"],
    ),
    (lambda: without("datasets", lambda: load_audio_dataset("folder")), ImportError, ["datasets", "[train]"]),
    (
        lambda: without(
            "accelerate.data_loader",
            lambda: asit_hf.ASiTPreTrainer,
            "asit_hf.pretraining.trainer",
            "asit_hf.data.epochs",
        ),
        ImportError,
        ["accelerate is", "[train]"],
    ),
]


TABLE = WAVEFORMS + CONFIGURATIONS + MODELS + PRETRAINING + FILES + BATCHES + EXTRAS


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name in ("good.wav", "cut.wav", "cut.flac"):
        soundfile.write(folder / name, noise, RATE)
    for name in ("cut.wav", "cut.flac"):
        (folder / name).write_bytes((folder / name).read_bytes()[:2000])
    for name, text in {
        "text.wav": "not a sound",
        "empty.wav": "",
        "header.csv": "file,label\n",
        "table.csv": "file,label\ngood.wav,cat\n",
        "lost.csv": "file,label\nlost.wav,cat\n",
    }.items():
        (folder / name).write_text(text)
    model().save_pretrained(folder / "encoder")
    return folder


@pytest.mark.parametrize(
    ("call", "exception", "words"), TABLE, ids=[f"{row}-{'-'.join(words)}" for row, (_, _, words) in enumerate(TABLE)]
)
def test_wrong_input(call, exception, words, files):
    with pytest.raises(exception) as error:
        call(*[files] * len(signature(call).parameters))
    # huggingface_hub wraps errors of the configuration's validation in lines of its own
    wrapped = isinstance(error.value, StrictDataclassError)
    message = str(error.value.__cause__ if wrapped else error.value)
    assert "\n" not in message
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"
