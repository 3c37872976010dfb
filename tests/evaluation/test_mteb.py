import importlib.util
import io
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from datasets import Audio, Dataset, Value
from tiny import MEL, build
from torch.utils.data import DataLoader

from asit_hf import ASiTFeatureExtractor, ASiTForAudioClassification, ASiTForPreTraining, ASiTModel
from asit_hf.data.audio import AudioReadError, encode_audio, read_audio
from asit_hf.evaluation.embeddings import embed
from asit_hf.evaluation.mteb import load_model

needs_mteb = pytest.mark.skipif(
    importlib.util.find_spec("mteb") is None, reason="mteb is not installed: make mteb installs it"
)


def save(folder: Path, cls: type = ASiTModel, rate: int = 16000, **kwargs) -> Path:
    build(cls, **kwargs).save_pretrained(folder)
    ASiTFeatureExtractor(sampling_rate=rate, num_mel_bins=kwargs.get("num_mel_bins", MEL)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("encoder"))


def wav(samples: np.ndarray, rate: int) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, samples, rate, format="WAV", subtype="FLOAT")
    return content.getvalue()


def noise_files() -> list[bytes]:
    """Clips of several lengths and rates, the second one stereo."""
    draw = np.random.default_rng(0)
    shapes = [((40000,), 16000), ((30000, 2), 44100), ((100,), 16000), ((9000,), 8000), ((23000,), 22050)]
    return [wav(draw.uniform(-1, 1, shape).astype(np.float32), rate) for shape, rate in shapes]


def loader(files: list[bytes], **columns: list) -> DataLoader:
    """A loader as mteb makes it, whose rows torchcodec would decode."""
    rows = Dataset.from_dict({"audio": [{"bytes": content, "path": None} for content in files], **columns})
    stored = {"bytes": Value("binary"), "path": Value("string")}
    return DataLoader(rows.cast_column("audio", stored).cast_column("audio", Audio()), batch_size=2)


@pytest.mark.parametrize(
    ("cls", "rate", "mel", "options", "window"),
    [
        (ASiTModel, 16000, 32, {}, 0.96),
        (ASiTForAudioClassification, 8000, 64, {"pooling": "cls", "num_layers": 2}, 0.96),
        (ASiTForPreTraining, 32000, 64, {"pooling": "cls_mean", "window_seconds": 0.5}, 0.48),
        (ASiTModel, 16000, 32, {"pooling": "mean_time", "window_seconds": 30}, 30),
    ],
)
def test_clips_are_embedded_in_windows(tmp_path, cls, rate, mel, options, window):
    model = load_model(save(tmp_path, cls, rate, num_mel_bins=mel), device="cpu", **options)
    files = noise_files()
    embeddings = model.encode(loader(files, label=[0] * 5), batch_size=3, show_progress_bar=False, task_metadata=None)
    waveforms = [read_audio(content, rate) for content in files]
    settings = {"pooling": "mean_std_time", **options, "window_seconds": window}
    expected = embed(model.encoder, model.feature_extractor, waveforms, progress=False, **settings)
    assert embeddings.dtype == np.float32
    assert embeddings.shape == (5, model.embed_dim)
    np.testing.assert_allclose(embeddings, expected, rtol=0, atol=1e-3)  # files are resampled window by window


def test_rows_that_hold_arrays_or_paths(checkpoint, tmp_path):
    model = load_model(checkpoint, device="cpu")
    samples = np.random.default_rng(0).uniform(-1, 1, (2, 9000)).astype(np.float32)
    (tmp_path / "clip.wav").write_bytes(wav(samples.T, 16000))
    sources = [{"array": samples, "sampling_rate": 16000}, str(tmp_path / "clip.wav"), wav(samples.mean(0), 16000)]
    rows = DataLoader([{"audio": source, "label": 0} for source in sources])
    embeddings = model.encode(rows, show_progress_bar=False)
    np.testing.assert_allclose(embeddings[1:], embeddings[:1].repeat(2, 0), rtol=0, atol=1e-5)


def test_wrong_input(checkpoint):
    model = load_model(checkpoint, device="cpu")
    with pytest.raises(AudioReadError):
        model.encode(loader([noise_files()[0], b"no audio"]), show_progress_bar=False)
    with pytest.raises(ValueError, match="audio column, got .'text'"):
        model.encode(DataLoader(Dataset.from_dict({"text": ["a"]})))
    with pytest.raises(ValueError, match="float32, got int8"):
        model.encode(loader(noise_files()), precision="int8")
    with pytest.raises(TypeError, match="window_seconds"):  # an option of `load_model`
        model.encode(loader(noise_files()), window_seconds=1)
    with pytest.raises(ValueError, match="num_layers from 1 to 2, got 3"):
        load_model(checkpoint, num_layers=3)


@needs_mteb
def test_the_public_metadata(checkpoint, tmp_path):
    from mteb.models import EncoderProtocol

    model = load_model(checkpoint, pooling="cls")
    assert isinstance(model, EncoderProtocol)
    meta = model.mteb_model_meta
    assert meta.name == f"asit_hf/{checkpoint.name}"
    assert meta.embed_dim == model.embed_dim == 48
    assert meta.n_parameters == sum(parameter.numel() for parameter in build().parameters())
    assert meta.modalities == ["audio"]
    assert meta.license is None
    # mteb reuses results of the same name, experiment and revision
    same, other = load_model(checkpoint).mteb_model_meta, load_model(save(tmp_path, seed=1)).mteb_model_meta
    assert same.experiment_name is None
    assert meta.experiment_name == "pooling_cls"
    assert meta.revision == same.revision != other.revision
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-4.0\n---\nA model.\n")
    assert load_model(tmp_path, name="user/model").mteb_model_meta.license == "cc-by-4.0"
    loaded = meta.loader(meta.name, revision=meta.revision, **meta.experiment_kwargs)  # as mteb loads a ModelMeta
    assert (loaded.mteb_model_meta.name, loaded.mteb_model_meta.revision) == (meta.name, meta.revision)
    assert loaded.options["pooling"] == "cls"


@needs_mteb
def test_the_public_mock_tasks_pass(checkpoint, monkeypatch):
    """
    mteb 2.26.24's check of a model on its audio tasks: classification, also with several labels and cross-validated,
    clustering, pair classification, retrieval, reranking. They store their clips with torchcodec, whose encoder is
    replaced; our model reads them without it.
    """
    import mteb

    class AudioEncoder:
        def __init__(self, samples: torch.Tensor, *, sample_rate: int):
            self.content = encode_audio(samples.numpy(), sample_rate, "WAV", "FLOAT")

        def to_file_like(self, file: io.BytesIO, format: str, num_channels: int | None = None) -> None:
            file.write(self.content)

    torchcodec, encoders = types.ModuleType("torchcodec"), types.ModuleType("torchcodec.encoders")
    encoders.AudioEncoder = AudioEncoder
    monkeypatch.setitem(sys.modules, "torchcodec", torchcodec)
    monkeypatch.setitem(sys.modules, "torchcodec.encoders", encoders)
    results = mteb.mock_run(load_model(checkpoint, device="cpu"))
    ran = {name: result for name, result in results.items() if result is not None}
    assert len(ran) == 7
    assert {name: result for name, result in ran.items() if not isinstance(result, mteb.TaskResult)} == {}


@needs_mteb
def test_a_public_task_scores_like_a_probe(checkpoint, tmp_path):
    """ESC-50's protocol, cross-validated logistic regression on 8 clips per class, on sounds of our own."""
    import mteb
    from mteb.tasks.classification.zxx.esc50 import ESC50Classification
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import KFold

    draw = np.random.default_rng(0)
    labels = [index % 2 for index in range(40)]
    tones = [np.sin(2 * np.pi * (300 + 60 * label) * np.arange(11025) / 22050) for label in labels]
    files = [wav(0.02 * tone + 0.05 * draw.normal(size=11025), 22050) for tone in tones]

    class LocalTask(ESC50Classification):
        def load_data(self, **kwargs) -> None:
            self.dataset = {"train": loader(files, target=labels).dataset}
            self.data_loaded = True

    model = load_model(checkpoint, device="cpu")
    task = LocalTask()
    results = mteb.evaluate(model, task, cache=mteb.ResultCache(tmp_path), encode_kwargs={"batch_size": 8})
    (scores,) = results.task_results[0].scores["train"]
    assert list(tmp_path.rglob("ESC50.json"))  # under the model's name and revision

    waveforms = [read_audio(content, 16000) for content in files]
    features = embed(model.encoder, model.feature_extractor, waveforms, "mean_std_time", window_seconds=0.96)
    clips, labels, drawn, accuracies = loader(files, target=labels).dataset, np.array(labels), None, []
    for fold, (train, test) in enumerate(KFold(5, shuffle=True, random_state=task.seed).split(labels)):
        _, drawn, chosen = task._undersample_data(clips.select(train), fold, drawn)
        probe = LogisticRegression(max_iter=100).fit(features[train[chosen]], labels[train[chosen]])
        accuracies.append(probe.score(features[test], labels[test]))
    assert scores["accuracy"] == pytest.approx(np.mean(accuracies), abs=0.03)  # one of 40 clips may be on the border
    assert 0.6 < scores["accuracy"] < 1
