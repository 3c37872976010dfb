import numpy as np
import pytest
import torch

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForAudioClassification, ASiTForPreTraining, ASiTModel
from asit_hf.evaluation.embeddings import POOLINGS, embed, load_encoder, timestamp_embeddings

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
def test_a_clip_has_the_embedding_that_it_has_alone(model, feature_extractor, clips, pooling, sort_by_length):
    options = {"pooling": pooling, "progress": False, "num_layers": 2}
    alone = np.concatenate([embed(model, feature_extractor, [clip], **options) for clip in clips])
    for batch_size in (2, 7):
        together = embed(
            model, feature_extractor, clips, batch_size=batch_size, sort_by_length=sort_by_length, **options
        )
        np.testing.assert_allclose(together, alone, atol=1e-5)
    width = {"cls": 32, "mean": 32, "cls_mean": 64, "mean_time": 8 * 32}[pooling]
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


def test_mean_over_time_keeps_the_mel_rows(model, feature_extractor, clips):
    by_row = embed(model, feature_extractor, clips, "mean_time", progress=False)
    mean = embed(model, feature_extractor, clips, "mean", progress=False)
    np.testing.assert_allclose(by_row.reshape(len(clips), 8, 32).mean(1), mean, atol=1e-5)


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


def test_the_model_is_left_as_it_was(model, feature_extractor, clips):
    classifier = ASiTForAudioClassification(ASiTConfig(**SMALL, drop_path_rate=0.5)).train()
    first = embed(classifier, feature_extractor, clips[:2], progress=False)
    assert classifier.training
    assert classifier.asit.layers[0].training
    np.testing.assert_array_equal(embed(classifier, feature_extractor, clips[:2], progress=False), first)


def test_wrong_input(model, feature_extractor, clips):
    with pytest.raises(ValueError, match="pooling must be one of"):
        embed(model, feature_extractor, clips, "max", progress=False)
    with pytest.raises(ValueError, match="num_layers must be from 1 to 2"):
        embed(model, feature_extractor, clips, num_layers=3, progress=False)
    with pytest.raises(ValueError, match="at least one clip"):
        embed(model, feature_extractor, [], progress=False)
    item = {"index": 0, "bad_files": [("a.wav", "cut short")]}
    with pytest.raises(ValueError, match="clip 0 has no waveform: .*cut short"):
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


def test_timestamps_find_where_something_happens(model, feature_extractor):
    waveform = np.zeros(32000, dtype=np.float32)
    waveform[20000:20400] = np.random.default_rng(0).normal(0, 0.5, 400)
    quiet, _ = timestamp_embeddings(model, feature_extractor, np.zeros(32000, dtype=np.float32))
    embeddings, times = timestamp_embeddings(model, feature_extractor, waveform)
    changed = np.abs(embeddings - quiet).mean(1).argmax()
    assert abs(times[changed] - 1000 * 20200 / 16000) < 100


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory):
    torch.manual_seed(0)
    model = ASiTForPreTraining(ASiTConfig(**SMALL))
    with torch.no_grad():
        for parameter in model.teacher["asit"].parameters():
            parameter.add_(0.01)
    path = tmp_path_factory.mktemp("pretraining")
    model.save_pretrained(path)
    return model, path


@pytest.mark.parametrize("source", ["teacher", "student"])
def test_load_encoder_of_a_pretraining_checkpoint(pretraining, source):
    model, path = pretraining
    expected = model.teacher["asit"] if source == "teacher" else model.asit
    loaded = load_encoder(path, source)
    assert type(loaded) is ASiTModel
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("cls", [ASiTModel, ASiTForAudioClassification])
def test_load_encoder_of_other_checkpoints(tmp_path, cls):
    model = cls(ASiTConfig(**SMALL))
    model.save_pretrained(tmp_path)
    expected = getattr(model, "asit", model).state_dict()
    for name, tensor in load_encoder(tmp_path).state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_load_encoder_refuses_what_is_not_whole(tmp_path):
    model = ASiTModel(ASiTConfig(**SMALL))
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="lacks 16 weights"):
        load_encoder(tmp_path)
    with pytest.raises(ValueError, match="source must be"):
        load_encoder(tmp_path, "average")
