import numpy as np
import pytest
import torch

from asit_hf import ASiTConfig, ASiTForAudioClassification
from asit_hf.finetuning.optimization import average_checkpoints, param_groups_layer_decay, smooth_labels, step_decay


def make_model(seed: int = 0, **kwargs) -> ASiTForAudioClassification:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return ASiTForAudioClassification(ASiTConfig(**sizes, num_frames=32, num_mel_bins=32, num_labels=3, **kwargs))


def test_learning_rates_fall_from_the_classifier_to_the_embeddings():
    model = make_model()
    groups = param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.5)
    of_parameter = {id(parameter): group for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(of_parameter) == len(list(model.parameters()))
    rates = {name: of_parameter[id(parameter)]["lr_scale"] for name, parameter in model.named_parameters()}
    expected = {"asit.embeddings.": 1 / 8, "asit.layers.0.": 1 / 4, "asit.layers.1.": 1 / 2}
    expected |= {"asit.layernorm.": 1, "classifier.": 1}
    for name, rate in rates.items():
        assert rate == next(value for prefix, value in expected.items() if name.startswith(prefix)), name


def test_weight_decay_is_on_matrices_without_positions_and_cls():
    model = make_model()
    decayed = {
        id(p) for group in param_groups_layer_decay(model, 0.1) if group["weight_decay"] for p in group["params"]
    }
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert "classifier.weight" in names
    assert "asit.embeddings.patch_embeddings.projection.weight" in names
    assert not any(
        name.endswith(("bias", "cls_token", "position_embeddings")) or "layernorm" in name for name in names
    )
    assert len(names) == 2 * 6 + 2


def test_frozen_parameters_are_excluded():
    model = make_model()
    model.asit.requires_grad_(False)
    assert sum(len(group["params"]) for group in param_groups_layer_decay(model)) == 2


@pytest.mark.parametrize("layer_decay", [0, 1.1])
def test_wrong_layer_decay(layer_decay):
    with pytest.raises(ValueError, match=f"layer_decay .*got {layer_decay}"):
        param_groups_layer_decay(make_model(), layer_decay=layer_decay)


def test_step_decay_equals_multi_step_lr():
    """AST uses torch's MultiStepLR, stepped once an epoch, with milestones start, start + every, ..."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = torch.optim.lr_scheduler.MultiStepLR(optimizer, range(10, 1000, 5), gamma=0.5)
    for epoch in range(25):
        factors = {step_decay(step, 7, start=10, every=5, gamma=0.5) for step in range(7 * epoch, 7 * epoch + 7)}
        assert factors == {reference.get_last_lr()[0]}
        optimizer.step()
        reference.step()


def test_step_decay_with_warm_up():
    factors = [step_decay(step, 10, 1, 1, 0.5, warmup_steps=4) for step in range(12)]
    np.testing.assert_allclose(factors, [0, 0.25, 0.5, 0.75, *[1.0] * 6, 0.5, 0.5])


def test_smoothed_labels_keep_their_sum():
    ids = smooth_labels(torch.tensor([0, 2]), 4, 0.1)
    torch.testing.assert_close(ids, torch.tensor([[0.925, 0.025, 0.025, 0.025], [0.025, 0.025, 0.925, 0.025]]))
    soft = smooth_labels(torch.tensor([[0.4, 0.6, 0.0, 0.0]]), 4, 0.2)
    torch.testing.assert_close(soft, torch.tensor([[0.37, 0.53, 0.05, 0.05]]))
    # equal to torch's smoothing of class ids
    logits = torch.randn(2, 4)
    torch.testing.assert_close(
        torch.nn.functional.cross_entropy(logits, ids),
        torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2]), label_smoothing=0.1),
    )
    with pytest.raises(ValueError, match=r"got \(2,\)"):
        smooth_labels(torch.tensor([0.5, 1.5]), 1, 0.1)


def test_averaged_weights(tmp_path):
    models = [make_model(seed) for seed in range(3)]
    for index, model in enumerate(models):
        model.save_pretrained(tmp_path / str(index))
    average = average_checkpoints([tmp_path / str(index) for index in range(3)])
    for name, value in average.items():
        expected = torch.stack([model.state_dict()[name].double() for model in models]).mean(0)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected.float(), rtol=0, atol=0)
    assert average.keys() == models[0].state_dict().keys()


def test_average_of_unlike_checkpoints_is_refused(tmp_path):
    make_model().save_pretrained(tmp_path / "a")
    make_model(pooling_mode="cls_mean").save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match="names or shapes"):
        average_checkpoints([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ValueError, match="at least one checkpoint"):
        average_checkpoints([])
