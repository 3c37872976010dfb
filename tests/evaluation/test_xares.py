import importlib.util
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import MEL, build

from asit_hf import ASiTFeatureExtractor, ASiTForAudioClassification, ASiTForPreTraining, ASiTModel
from asit_hf.data.audio import audio_info, encode_audio, read_audio, resample
from asit_hf.evaluation import xares
from asit_hf.evaluation.embeddings import timestamp_embeddings

needs_xares = pytest.mark.skipif(
    importlib.util.find_spec("xares") is None, reason="xares is not installed: make xares installs it"
)


def save(folder: Path, cls: type = ASiTModel, rate: int = 16000, **kwargs) -> str:
    build(cls, **kwargs).save_pretrained(folder)
    ASiTFeatureExtractor(sampling_rate=rate, num_mel_bins=kwargs.get("num_mel_bins", MEL)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("encoder"))


def noise(sounds: int, samples: int) -> torch.Tensor:
    return torch.rand(sounds, samples, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(
    ("cls", "rate", "mel", "hop", "concatenate"),
    [
        (ASiTModel, 16000, 32, None, True),
        (ASiTForAudioClassification, 8000, 64, 40, False),
        (ASiTForPreTraining, 32000, 64, 80, True),
        (ASiTModel, 22050, 32, None, False),
    ],
)
@pytest.mark.parametrize("seconds", [0.001, 0.17, 0.7, 3.125])
def test_frames_fit_the_hop(tmp_path, cls, rate, mel, hop, concatenate, seconds):
    encoder = xares.ASiTEncoder(save(tmp_path, cls, rate, num_mel_bins=mel), hop, concatenate)
    assert encoder.sampling_rate == rate
    assert encoder.hop_size_in_ms == pytest.approx(hop or 160, rel=0.01)
    audio = noise(2, round(seconds * rate))
    frames = encoder(audio)
    assert frames.shape[2] == encoder.output_dim == 48 * (mel // 16 if concatenate else 1)
    # of each clip, up to two hops and the log-mel window are missing at its end
    assert max(1, 1000 * seconds // encoder.hop_size_in_ms - 1) <= frames.shape[1]
    assert frames.shape[1] <= max(1000 * seconds / encoder.hop_size_in_ms, 160 / encoder.hop_size_in_ms)
    assert frames.dtype == torch.float32
    assert frames.isfinite().all()
    torch.testing.assert_close(frames[1], encoder(audio[1])[0], rtol=0, atol=1e-4)


def test_frames_are_the_time_patches(checkpoint):
    """Without a hop those of the encoder; with one, also those in between, each in the middle of its patch."""
    audio = noise(1, 12000)
    encoder = xares.ASiTEncoder(checkpoint, concatenate_mel=False, window_seconds=30)
    expected, centers = timestamp_embeddings(encoder.encoder, encoder.feature_extractor, audio[0])
    torch.testing.assert_close(encoder(audio)[0], torch.from_numpy(expected), rtol=0, atol=1e-4)
    assert centers[1] == pytest.approx(1.5 * encoder.hop_size_in_ms + 7.5)

    encoder = xares.ASiTEncoder(checkpoint, 40, window_seconds=0.16)  # each time patch is encoded alone
    frames = encoder(audio)
    log_mel = encoder.log_mel(audio)
    for frame in (2, 5, frames.shape[1] - 3):
        patch = log_mel[:, 4 * frame - 6 : 4 * frame + 10]  # centered on the 4 frames of the hop
        with torch.no_grad():
            alone = encoder.encoder(patch).last_hidden_state[:, 1:].flatten()
        torch.testing.assert_close(frames[0, frame], alone, rtol=0, atol=1e-4)


def test_every_model_and_option_is_a_class_of_its_own(checkpoint, tmp_path, monkeypatch, caplog):
    """X-ARES reuses the results of a class of the same name."""
    other = save(tmp_path, seed=1)
    encoders = [
        *(xares.ASiTEncoder(one) for one in (checkpoint, other)),
        xares.ASiTEncoder(other, 40),
        xares.ASiTEncoder(other, concatenate_mel=False),
        xares.ASiTEncoder(other, window_seconds=0.5),
    ]
    names = [type(encoder).__name__ for encoder in encoders]
    assert len(set(names)) == 5
    assert all(name.endswith("Encoder") and name.isidentifier() for name in names)
    monkeypatch.setenv("ASIT_XARES_MODEL", other)
    assert type(xares.ASiTEncoder()).__name__ == names[1]
    monkeypatch.delenv("ASIT_XARES_MODEL")
    assert "random weights" not in caplog.text
    assert xares.ASiTEncoder().output_dim == 192 * 8
    assert "random weights" in caplog.text


def test_the_module_has_one_encoder():
    """The runner builds the attribute whose name ends with "Encoder", and refuses two."""
    assert [name for name in dir(xares) if name.endswith("Encoder")] == ["ASiTEncoder"]


@pytest.mark.parametrize("hop", [0, 50, 320])
def test_a_hop_that_does_not_divide_a_patch(checkpoint, hop):
    with pytest.raises(ValueError, match=f"one of 10, 20, 40, 80, 160, got {hop}"):
        xares.ASiTEncoder(checkpoint, hop)


@needs_xares
@pytest.mark.parametrize("hop", [None, 40])
def test_the_public_checker_passes(checkpoint, monkeypatch, hop):
    """xares 0.1.3, as its runner finds the class."""
    from xares.audio_encoder_checker import check_audio_encoder
    from xares.utils import attr_from_py_path

    monkeypatch.setenv("ASIT_XARES_MODEL", checkpoint)
    encoder_class = attr_from_py_path("asit_hf/evaluation/xares.py", endswith="Encoder")
    assert check_audio_encoder(encoder_class(hop_size_in_ms=hop))


@needs_xares
def test_a_task_of_the_public_runner(checkpoint, tmp_path, monkeypatch):
    """
    Embeddings, linear probe and kNN of a task in X-ARES's format. Its module imports torchaudio, which is several
    times this package and not needed here: a stub decodes and resamples.
    """
    (tmp_path / "torchaudio.py").write_text("class functional:\n    resample = None\nload = None\n")
    monkeypatch.syspath_prepend(tmp_path)
    import torchaudio
    from xares.task import TaskConfig, XaresTask

    def load(path: str) -> tuple[torch.Tensor, int]:
        rate = audio_info(path).sampling_rate
        return torch.from_numpy(read_audio(path, rate))[None], rate

    def resample_rows(audio: torch.Tensor, from_rate: int, to_rate: int) -> torch.Tensor:
        return torch.from_numpy(resample(audio[0].numpy(), from_rate, to_rate))[None]

    monkeypatch.setattr(torchaudio, "load", load)
    monkeypatch.setattr(torchaudio.functional, "resample", staticmethod(resample_rows))

    draw = np.random.default_rng(0)
    folder = tmp_path / "env" / "tones"
    folder.mkdir(parents=True)
    clips = {}
    for split, count in (("train", 24), ("valid", 8), ("test", 16)):
        with tarfile.open(folder / f"{split}-0.tar", "w") as tar:
            for index in range(count):
                label = index % 2
                tone = np.sin(2 * np.pi * (300 + 60 * label) * np.arange(11025) / 22050)
                content = encode_audio(0.015 * tone + 0.05 * draw.normal(size=11025), 22050, "WAV", "FLOAT")
                clips.setdefault(split, []).append((read_audio(content, 16000), label))
                for name, data in (("wav", content), ("json", json.dumps({"label": label}).encode())):
                    member = tarfile.TarInfo(f"{split}{index:03d}.{name}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    (folder / ".audio_tar_ready").touch()

    encoder = xares.ASiTEncoder(checkpoint)
    config = TaskConfig(
        name="tones",
        encoder=encoder,
        env_root=tmp_path / "env",
        label_processor=lambda item: item["label"],
        output_dim=2,
        eval_weight=16,
        num_encoder_workers=0,
        torch_num_threads=1,
        epochs=20,
        batch_size_train=8,
        learning_rate=1e-2,
    )
    task = XaresTask(config=config)
    task.make_encoded_tar()
    linear, knn = task.run_mlp(), task.run_knn()

    embeddings, labels = {}, {}
    for split, pairs in clips.items():
        embeddings[split] = encoder(torch.from_numpy(np.stack([waveform for waveform, _ in pairs]))).mean(1)
        labels[split] = torch.tensor([label for _, label in pairs])
    # X-ARES normalizes every test embedding, but of the training embeddings every feature
    train = torch.nn.functional.normalize(embeddings["train"], dim=0)
    similarities, neighbors = (torch.nn.functional.normalize(embeddings["test"], dim=1) @ train.T).topk(10)
    votes = torch.nn.functional.one_hot(labels["train"][neighbors]) * (similarities / 0.07).softmax(1)[..., None]
    with torch.no_grad():
        logits, _ = task.trainer.model(embeddings["test"])
    for (score, clips_scored), predicted in ((knn, votes.sum(1)), (linear, logits)):
        assert score == pytest.approx(float((predicted.argmax(1) == labels["test"]).double().mean()))
        assert 0.6 < score < 1  # the sounds can be told apart, and not too easily
        assert clips_scored == 16
