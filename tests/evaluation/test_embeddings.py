import numpy as np
import pytest
import soundfile
import torch

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForAudioClassification, ASiTModel
from asit_hf.data.audio import AudioReadError, read_audio
from asit_hf.evaluation.embeddings import (
    POOLINGS,
    embed,
    embed_files,
    embed_tokens,
    embedding_size,
    timestamp_embeddings,
)

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SMALL |= {"num_frames": 64, "num_prototypes": 16, "distillation_hidden_size": 16, "distillation_bottleneck_size": 8}


@pytest.fixture(scope="module")
def model() -> ASiTModel:
    torch.manual_seed(0)
    return ASiTModel(ASiTConfig(**SMALL))


@pytest.fixture(scope="module")
def feature_extractor() -> ASiTFeatureExtractor:
    return ASiTFeatureExtractor()


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    lengths = (16000, 3000, 24000, 8000, 200, 16000, 12345)
    return [generator.normal(0, 0.1, length).astype(np.float32) for length in lengths]


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("sort_by_length", [True, False])
def test_embeddings_do_not_depend_on_the_batch(model, feature_extractor, clips, pooling, sort_by_length):
    options = {"pooling": pooling, "progress": False, "num_layers": 2}
    alone = np.concatenate([embed(model, feature_extractor, [clip], **options) for clip in clips])
    for batch_size in (2, 7):
        together = embed(
            model, feature_extractor, clips, batch_size=batch_size, sort_by_length=sort_by_length, **options
        )
        np.testing.assert_allclose(together, alone, atol=1e-5)
    width = {"cls": 32, "mean": 32, "cls_mean": 64, "mean_time": 8 * 32, "mean_std_time": 16 * 32}[pooling]
    assert together.shape == (len(clips), 2 * width)
    assert together.dtype == np.float32


@pytest.mark.parametrize("pooling", ["cls", "mean", "cls_mean"])
def test_pooling_is_that_of_the_model(feature_extractor, clips, pooling):
    torch.manual_seed(0)
    model = ASiTModel(ASiTConfig(**SMALL, pooling_mode=pooling)).eval()
    features = feature_extractor(clips, sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        expected = model(**features).pooler_output.numpy()
    np.testing.assert_allclose(embed(model, feature_extractor, clips, pooling, progress=False), expected, atol=1e-5)


def test_mean_over_time_keeps_mel_patches(model, feature_extractor, clips):
    by_row = embed(model, feature_extractor, clips, "mean_time", progress=False)
    mean = embed(model, feature_extractor, clips, "mean", progress=False)
    np.testing.assert_allclose(by_row.reshape(len(clips), 8, 32).mean(1), mean, atol=1e-5)


def test_deviation_over_time(model, feature_extractor, clips):
    clip = clips[0]
    both = embed(model, feature_extractor, [clip], "mean_std_time", progress=False).reshape(2, 8, 32)
    with torch.no_grad():
        tokens = model(**feature_extractor(clip, sampling_rate=16000, return_tensors="pt")).last_hidden_state
    patches = tokens[0, 1:].unflatten(0, (-1, 8)).numpy()
    np.testing.assert_allclose(both[0], patches.mean(0), atol=1e-5)
    np.testing.assert_allclose(both[1], patches.std(0), atol=1e-5)


def test_items_and_streams_of_clips(model, feature_extractor, clips):
    class Items:
        """As a data set: no IndexError past its end."""

        def __len__(self):
            return len(clips)

        def __getitem__(self, index):
            return {"waveform": clips[index % len(clips)], "index": index}

    expected = embed(model, feature_extractor, clips, progress=False)
    np.testing.assert_array_equal(embed(model, feature_extractor, Items(), progress=False), expected)
    np.testing.assert_array_equal(embed(model, feature_extractor, iter(clips), progress=False), expected)


def test_the_model_is_unchanged(model, feature_extractor, clips):
    classifier = ASiTForAudioClassification(ASiTConfig(**SMALL, drop_path_rate=0.5)).train()
    first = embed(classifier, feature_extractor, clips[:2], progress=False)
    assert classifier.training
    assert classifier.asit.layers[0].training
    np.testing.assert_array_equal(embed(classifier, feature_extractor, clips[:2], progress=False), first)


def test_wrong_input(model, feature_extractor, clips):
    with pytest.raises(ValueError, match="pooling to be one of"):
        embed(model, feature_extractor, clips, "max", progress=False)
    with pytest.raises(ValueError, match="batch_size of at least 1, got 0"):
        embed(model, feature_extractor, clips, batch_size=0, progress=False)
    with pytest.raises(ValueError, match="num_layers from 1 to 2"):
        embed(model, feature_extractor, clips, num_layers=3, progress=False)
    with pytest.raises(ValueError, match="at least one clip"):
        embed(model, feature_extractor, [], progress=False)
    item = {"index": 0, "bad_files": [("a.wav", "cut short")]}
    with pytest.raises(ValueError, match="clip 0, got .*cut short"):
        embed(model, feature_extractor, [item], progress=False)


def test_timestamp_embeddings(model, feature_extractor, clips):
    embeddings, times = timestamp_embeddings(model, feature_extractor, clips[0])
    assert embeddings.shape == (98 // 16, 32)
    np.testing.assert_allclose(np.diff(times), 160)
    # frames 0 to 15 see the samples from 0 to 175 ms
    assert times[0] == pytest.approx(87.5)
    mean = embed(model, feature_extractor, clips[:1], "mean", progress=False)
    np.testing.assert_allclose(embeddings.mean(0), mean[0], atol=1e-5)
    assert timestamp_embeddings(model, feature_extractor, clips[4])[0].shape == (1, 32)


@pytest.mark.parametrize("window_seconds", [None, 0.5])
def test_tokens_of_layers(model, feature_extractor, clips, window_seconds):
    """Their mean over time is the embedding pooled so; short clips in a batch of longer ones have no padding."""
    options = {"batch_size": 3, "window_seconds": window_seconds, "progress": False}
    tokens = embed_tokens(model, feature_extractor, iter(clips), **options)
    assert [clip.shape for clip in tokens] == [(2, max(1, (len(clip) // 160 - 2) // 16), 32) for clip in clips]
    assert {clip.dtype for clip in tokens} == {np.dtype(np.float16)}
    pooled = embed(model, feature_extractor, clips, "mean", num_layers=2, **options)
    means = [clip.astype(np.float32).mean(1).flatten() for clip in tokens]
    np.testing.assert_allclose(means, pooled, atol=2e-3)
    last = embed_tokens(model, feature_extractor, clips, num_layers=1, **options)
    np.testing.assert_array_equal(np.concatenate(last, axis=1)[0], np.concatenate(tokens, axis=1)[1])
    with pytest.raises(ValueError, match="num_layers from 1 to 2, got 3"):
        embed_tokens(model, feature_extractor, clips, num_layers=3)
    with pytest.raises(ValueError, match="batch_size of at least 1, got 0"):
        embed_tokens(model, feature_extractor, clips, batch_size=0)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_long_clips_in_windows(model, feature_extractor, pooling):
    """Pooled over the patches of all windows, the CLS tokens averaged; short clips are unchanged."""
    rng = np.random.default_rng(0)
    clips = [rng.normal(0, 0.1, samples).astype(np.float32) for samples in (16000, 40000, 41000, 9000)]
    options = {"pooling": pooling, "batch_size": 2, "num_layers": 2, "progress": False}
    found = embed(model, feature_extractor, iter(clips), window_seconds=1.3, **options)
    whole = embed(model, feature_extractor, clips, **options)
    np.testing.assert_allclose(found[[0, 3]], whole[[0, 3]], atol=1e-5)
    for clip, embedding in zip(clips[1:3], found[1:3]):  # 2.5 s are 248 frames: windows of 8 and 7 time patches
        parts = [clip[: 127 * 160 + 400], clip[128 * 160 :]]
        inputs = [feature_extractor(part, sampling_rate=16000, return_tensors="pt").input_values for part in parts]
        with torch.no_grad():
            outputs = [model(values, output_hidden_states=True) for values in inputs]
            lower = [model.layernorm(output.hidden_states[-2])[0] for output in outputs]
        layers = []
        for tokens in (lower, [output.last_hidden_state[0] for output in outputs]):
            cls_token = (8 * tokens[0][0] + 7 * tokens[1][0]) / 15
            patches = torch.cat([part[1:] for part in tokens]).unflatten(0, (15, 8))
            by_row, deviation = patches.mean(0).flatten(), patches.std(0, unbiased=False).flatten()
            layers.append(
                {
                    "cls": cls_token,
                    "mean": patches.mean((0, 1)),
                    "cls_mean": torch.cat((cls_token, patches.mean((0, 1)))),
                    "mean_time": by_row,
                    "mean_std_time": torch.cat((by_row, deviation)),
                }[pooling]
            )
        np.testing.assert_allclose(embedding, torch.cat(layers), atol=1e-5)
    with pytest.raises(ValueError, match="at least one time patch, got 0.1"):
        embed(model, feature_extractor, clips, window_seconds=0.1, **options)


def test_timestamps_find_where_something_happens(model, feature_extractor):
    waveform = np.zeros(32000, dtype=np.float32)
    waveform[20000:20400] = np.random.default_rng(0).normal(0, 0.5, 400)
    quiet, _ = timestamp_embeddings(model, feature_extractor, np.zeros(32000, dtype=np.float32))
    embeddings, times = timestamp_embeddings(model, feature_extractor, waveform)
    changed = np.abs(embeddings - quiet).mean(1).argmax()
    assert abs(times[changed] - 1000 * 20200 / 16000) < 100


def write(path, samples, rate=16000, seed=0):
    soundfile.write(path, np.random.default_rng(seed).normal(0, 0.1, samples).clip(-1, 1), rate)
    return path


def test_files_of_any_length(model, feature_extractor, tmp_path):
    """Short ones as `embed` and `timestamp_embeddings` have them, long ones in windows, bad ones as errors."""
    files = [write(tmp_path / f"{samples}.wav", samples, seed=samples) for samples in (16000, 300, 40000)]
    files.insert(1, tmp_path / "gone.wav")
    options = {"pooling": "cls_mean", "num_layers": 2}
    found = list(embed_files(model, feature_extractor, files, batch_size=2, window_seconds=1.3, **options))
    assert isinstance(found[1], AudioReadError)
    for index in (0, 2):
        clip = read_audio(files[index], 16000)
        expected = embed(model, feature_extractor, [clip], progress=False, **options)[0]
        np.testing.assert_allclose(found[index].scene, expected, atol=1e-5)
        columns, times = timestamp_embeddings(model, feature_extractor, clip)
        np.testing.assert_allclose(found[index].timestamps, columns, atol=1e-5)
        np.testing.assert_array_equal(found[index].milliseconds, times)
    # 2.5 s are 248 frames: windows of 8 and 7 time patches
    long, clip = found[3], read_audio(files[3], 16000)
    assert long.timestamps.shape == (15, 32)
    np.testing.assert_allclose(np.diff(long.milliseconds), 160)
    parts = [clip[: 127 * 160 + 400], clip[128 * 160 :]]
    scenes = embed(model, feature_extractor, parts, progress=False, **options)
    np.testing.assert_allclose(long.scene, np.average(scenes, axis=0, weights=[8, 7]), atol=1e-5)
    second, _ = timestamp_embeddings(model, feature_extractor, parts[1])
    np.testing.assert_allclose(long.timestamps[8:], second, atol=1e-5)
    (cut,) = embed_files(model, feature_extractor, files[3:], max_seconds=1.0, **options)
    np.testing.assert_allclose(
        cut.scene, embed(model, feature_extractor, [clip[:16000]], progress=False, **options)[0], atol=1e-5
    )


def test_files_are_read_lazily(model, feature_extractor, tmp_path):
    file = write(tmp_path / "a.wav", 3000)
    asked = []

    def sources():
        for index in range(1000):
            asked.append(index)
            yield file

    embedded = embed_files(model, feature_extractor, sources(), batch_size=2)
    next(embedded)
    assert len(asked) < 20


def test_embed_files_wrong_input(model, feature_extractor):
    for options, message in (
        ({"pooling": "max"}, "pooling to be one of"),
        ({"num_layers": 3}, "num_layers from 1 to 2"),
        ({"batch_size": 0}, "batch_size of at least 1, got 0"),
        ({"window_seconds": 0.1}, "at least one time patch"),
        ({"max_seconds": 0.0}, "max_seconds above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            next(embed_files(model, feature_extractor, [], **options))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_embedding_size(model, feature_extractor, clips, pooling):
    for num_layers in (1, 2):
        found = embed(model, feature_extractor, clips[:1], pooling, progress=False, num_layers=num_layers)
        assert found.shape[1] == embedding_size(model, pooling, num_layers)


def test_files_that_end_early(model, feature_extractor, tmp_path):
    """A damaged flac is one error however much of it could be read; a cut mp3 is used as far as it goes."""
    flac, mp3, whole = (write(tmp_path / name, 80000) for name in ("a.flac", "a.mp3", "a.wav"))
    for file in (flac, mp3):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    options = {"window_seconds": 0.5, "batch_size": 1}
    bad, cut, good = embed_files(model, feature_extractor, [flac, mp3, whole], **options)
    assert isinstance(bad, AudioReadError)
    assert "a.flac" in str(bad)
    assert len(good.timestamps) == 498 // 16
    assert 10 < len(cut.timestamps) < 17
