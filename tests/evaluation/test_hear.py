import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForAudioClassification, ASiTForPreTraining, ASiTModel
from asit_hf.evaluation import hear
from asit_hf.evaluation.embeddings import embed, timestamp_embeddings
from asit_hf.loading import load_encoder

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SMALL |= {"num_frames": 64, "num_prototypes": 16, "distillation_hidden_size": 16, "distillation_bottleneck_size": 8}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """A folder of every kind of checkpoint."""
    torch.manual_seed(0)
    folders = {}
    for cls in (ASiTModel, ASiTForAudioClassification, ASiTForPreTraining):
        folders[cls.__name__] = folder = tmp_path_factory.mktemp(cls.__name__)
        cls(ASiTConfig(**SMALL)).save_pretrained(folder)
        ASiTFeatureExtractor(mean=-5.0).save_pretrained(folder)
    return folders


@pytest.fixture(scope="module")
def model(checkpoints) -> hear.HearModel:
    return hear.load_model(str(checkpoints["ASiTModel"]))


def noise(sounds: int, samples: int) -> torch.Tensor:
    return torch.rand(sounds, samples, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("kind", ["ASiTModel", "ASiTForAudioClassification", "ASiTForPreTraining"])
def test_the_rules_of_the_api(checkpoints, kind):
    model = hear.load_model(str(checkpoints[kind]))
    assert isinstance(model, torch.nn.Module)
    assert not model.encoder.training
    assert model.sample_rate == 16000
    audio = noise(3, 12345)
    scenes = hear.get_scene_embeddings(audio, model)
    assert scenes.shape == (3, model.scene_embedding_size)
    embeddings, times = hear.get_timestamp_embeddings(audio, model)
    assert embeddings.shape == (*times.shape, model.timestamp_embedding_size)
    assert times.shape[0] == 3
    for tensor in (scenes, embeddings, times):
        assert tensor.dtype == torch.float32
        assert not tensor.requires_grad
    gaps = times.diff()
    assert 0 < float(gaps.min()) == float(gaps.max()) <= 50
    assert float(times[0, -1]) < 1000 * 12345 / 16000


@pytest.mark.parametrize("window_seconds", [None, 0.5, 30])
def test_scenes_are_those_of_the_encoder(checkpoints, window_seconds):
    """Without `window_seconds`, in windows of `num_frames`, the length of the pretraining crops."""
    encoder, extractor = load_encoder(checkpoints["ASiTModel"]), ASiTFeatureExtractor(mean=-5.0)
    audio = noise(2, 20000)
    for pooling in ("cls_mean", "mean_time", "mean_std_time"):
        model = hear.load_model(checkpoints["ASiTModel"], pooling, window_seconds)
        options = {"progress": False, "window_seconds": window_seconds or 0.64}
        expected = torch.from_numpy(embed(encoder, extractor, list(audio), pooling, **options))
        # `load_model` centers the whole waveform, `embed` every window
        torch.testing.assert_close(
            hear.get_scene_embeddings(audio, model), expected, rtol=0, atol=1e-5 if window_seconds == 30 else 1e-4
        )
    with pytest.raises(ValueError, match="pooling to be one of"):
        hear.load_model(checkpoints["ASiTModel"], "max")


@pytest.mark.parametrize("samples", [200, 3000, 3900, 16000, 16640, 20000])
def test_timestamps_are_interleaved(checkpoints, samples):
    """Every fourth timestamp equals that of a clip shifted by quarters of a patch."""
    model = hear.load_model(checkpoints["ASiTModel"], window_seconds=30)
    audio = noise(1, samples)
    embeddings, times = hear.get_timestamp_embeddings(audio, model)
    for turn in range(min(4, embeddings.shape[1])):
        # the whole waveform is centered
        shifted = audio[0] - audio[0].mean()
        shifted = shifted[turn * 640 :]
        columns, middles = timestamp_embeddings(model.encoder, model.feature_extractor, shifted - shifted.mean())
        torch.testing.assert_close(embeddings[0, turn::4], torch.from_numpy(columns), rtol=0, atol=2e-3)
        torch.testing.assert_close(times[0, turn::4], torch.from_numpy(middles) + 40 * turn)


def test_timestamps_of_patches_without_quarters():
    """The hop divides the patch, so that every timestamp is at its patch's center."""
    encoder = ASiTModel(ASiTConfig(**{**SMALL, "patch_size": 9, "num_frames": 9, "num_mel_bins": 36})).eval()
    model = hear.HearModel(encoder, ASiTFeatureExtractor(num_mel_bins=36))
    audio = noise(1, 8000)
    embeddings, times = hear.get_timestamp_embeddings(audio, model)
    assert set(times[0].diff().round().tolist()) == {10}
    log_mel = model.log_mel(audio)
    with torch.no_grad():
        alone = [encoder(log_mel[:, start : start + 9]).last_hidden_state[0, 1:].mean(0) for start in (0, 7, 30)]
    torch.testing.assert_close(embeddings[0, [0, 7, 30]], torch.stack(alone), rtol=0, atol=1e-4)


def test_long_sounds_are_encoded_in_windows(checkpoints):
    audio = noise(2, 48000)
    model = hear.load_model(checkpoints["ASiTModel"], window_seconds=30)
    whole = hear.get_scene_embeddings(audio, model)
    _, times = hear.get_timestamp_embeddings(audio, model)
    model = hear.load_model(checkpoints["ASiTModel"], window_seconds=1)
    # windows of 96 frames: three in 298 frames, and the last 10 are shorter than a patch
    log_mel = model.log_mel(audio)
    tokens = model.encode(log_mel)
    assert tokens.shape[1] == 1 + 3 * 6 * 8
    with torch.no_grad():
        windows = [model.encoder(log_mel[:, start : start + 96]).last_hidden_state for start in (0, 96, 192)]
    torch.testing.assert_close(tokens[:, 97:], windows[2][:, 1:])
    torch.testing.assert_close(tokens[:, 0], torch.stack(windows).mean(0)[:, 0])
    pieces = hear.get_scene_embeddings(audio, model)
    assert not torch.allclose(pieces, whole, atol=1e-4)
    embeddings, again = hear.get_timestamp_embeddings(audio, model)
    torch.testing.assert_close(again, times, rtol=0, atol=0)
    assert embeddings.isfinite().all()


def test_without_a_file_the_weights_are_random_but_fixed(caplog):
    state = torch.random.get_rng_state()
    first, second = hear.load_model(), hear.load_model("")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.encoder.embeddings.cls_token, second.encoder.embeddings.cls_token)
    assert first.timestamp_embedding_size == 192
    assert "random weights" in caplog.text


def test_wrong_input(model):
    with pytest.raises(ValueError, match=r"of shape \(sounds, samples\), got \(16000,\)"):
        hear.get_scene_embeddings(torch.zeros(16000), model)
    with pytest.raises(ValueError, match="16000, .* Hz.*, got 8000 Hz"):
        hear.HearModel(model.encoder, ASiTFeatureExtractor(sampling_rate=8000, num_mel_bins=128))


@pytest.mark.parametrize("kind", [None, "ASiTForPreTraining"])
def test_the_public_validator_passes(checkpoints, kind, tmp_path):
    """hearvalidator 2021.0.2, installed without its dependencies: it uses only `tf.Module` of tensorflow."""
    if importlib.util.find_spec("hearvalidator") is None:
        pytest.skip("hearvalidator is not installed: make hear installs it")
    (tmp_path / "tensorflow.py").write_text("class Module:\n    pass\n")
    command = [sys.executable, "-m", "hearvalidator.validate", "asit_hf.evaluation.hear", "--device", "cpu"]
    path = os.pathsep.join([str(tmp_path), str(ROOT), *sys.path])
    done = subprocess.run(
        command + (["--model", str(checkpoints[kind])] if kind else []),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Looks good!" in done.stdout
    assert "We suggest" not in done.stderr  # printed for timestamps that are too far apart
