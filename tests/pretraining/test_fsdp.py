"""Pretraining under FSDP2, as users start it, on two processes (gloo, no GPU): sharded runs equal those of DDP."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_pretraining import assert_close, launch, load_result

from asit_hf import ASiTForPreTraining, ASiTModel

pytestmark = [pytest.mark.slow, pytest.mark.needs_cpu_fsdp]
SCRIPT = Path(__file__).parent / "fsdp_processes.py"
DDP = "plain_whole", "plain_accumulated", "plain_bf16", "plain_probed", "plain_spoiled"
KINDS = "whole", "resumed", "accumulated", "bf16", "probed", "spoiled", "compiled", "default", "refused"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    output = tmp_path_factory.mktemp("runs")
    launch(SCRIPT, [*DDP, *(f"fsdp_{kind}" for kind in KINDS)], output)
    return output


def column(run, name):
    return [row[name] for row in run["logs"]]


def test_the_recipe_shards_the_layers_of_both_encoders(runs):
    run = load_result(runs, "fsdp_whole")
    assert run["sharded"] == ["ASiTForPreTraining", "ASiTLayer", "ASiTPatchEmbeddings", "LayerNorm"]
    assert run["plugin"] == {
        "version": 2,
        "classes": ["ASiTLayer"],
        "reshard": True,
        "state_dict": "FULL_STATE_DICT",
        "offload": "OffloadPolicy",  # none
    }


def test_fsdp_without_a_configuration_equals_the_recipe(runs):
    recipe, default = load_result(runs, "fsdp_whole"), load_result(runs, "fsdp_default")
    assert (default["sharded"], default["plugin"]) == (recipe["sharded"], recipe["plugin"])
    assert_close(recipe["state"], default["state"], 0)


def test_two_processes_hold_half_the_weights_each(runs):
    whole, sizes = (
        load_result(runs, "plain_whole")["local_size"],
        [load_result(runs, "fsdp_whole", r)["local_size"] for r in (0, 1)],
    )
    assert sum(sizes) == whole
    assert max(sizes) < 0.6 * whole


def test_a_sharded_run_equals_one_of_ddp(runs):
    plain, sharded = load_result(runs, "plain_whole"), load_result(runs, "fsdp_whole")
    assert plain["sharded"] == []
    assert plain["steps"] == sharded["steps"] == 6
    assert any(name.startswith("teacher.") for name in plain["state"])
    assert "cls_center.center" in plain["state"]
    assert_close(plain["state"], sharded["state"], 2e-6)
    for name in ("loss", "global_loss", "local_loss", "reconstruction_loss", "grad_norm", "cls_entropy"):
        np.testing.assert_allclose(column(plain, name), column(sharded, name), rtol=1e-5)


def test_gradient_accumulation_equals_that_of_ddp(runs):
    plain, sharded = load_result(runs, "plain_accumulated"), load_result(runs, "fsdp_accumulated")
    assert sharded["steps"] == 6
    assert_close(plain["state"], sharded["state"], 2e-6)


def test_prototypes_are_frozen_in_the_first_epoch_and_move_in_the_second(runs):
    weights = load_result(runs, "fsdp_whole")["weights"]
    before, first_epoch, second_epoch = weights["prototypes"][0], weights["prototypes"][1:4], weights["prototypes"][4:]
    assert all(torch.equal(after, before) for after in first_epoch)
    assert not any(torch.equal(after, before) for after in second_epoch)
    assert not torch.equal(weights["student"][1], weights["student"][0])


def test_weight_decay_follows_its_schedule_on_matrices_alone(runs):
    plain, sharded = load_result(runs, "plain_whole"), load_result(runs, "fsdp_whole")
    assert sharded["groups"] == plain["groups"]
    assert [decays for decays, _ in sharded["groups"]] == [True, False]
    matrices, vectors = zip(*sharded["weight_decays"])
    np.testing.assert_allclose(matrices, column(sharded, "weight_decay"))
    assert matrices[0] < matrices[-1]
    assert set(vectors) == {0.0}


def test_resumed_equals_uninterrupted_bit_for_bit(runs):
    whole, resumed = load_result(runs, "fsdp_whole"), load_result(runs, "fsdp_resumed")
    assert len(resumed["weight_decays"]) == 2
    assert_close(whole["state"], resumed["state"], 0)
    assert whole["logs"] == resumed["logs"]


def test_checkpoints_load_without_fsdp(runs):
    state = load_result(runs, "fsdp_whole")["state"]
    checkpoint = runs / "fsdp_whole" / "checkpoint-6"
    assert not (runs / "fsdp_whole" / "unfinished").exists()
    model, info = ASiTForPreTraining.from_pretrained(checkpoint, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_close(state, model.state_dict(), 0)
    encoder, info = ASiTModel.from_pretrained(checkpoint, output_loading_info=True)
    assert not info["missing_keys"]
    assert_close({name: state[f"asit.{name}"] for name in encoder.state_dict()}, encoder.state_dict(), 0)


def test_a_non_finite_step_in_one_process_is_skipped_by_both(runs):
    plain, first, second = (
        load_result(runs, mode, rank)
        for mode, rank in (("plain_spoiled", 0), ("fsdp_spoiled", 0), ("fsdp_spoiled", 1))
    )
    assert first["skipped"] == second["skipped"] == 1
    assert torch.equal(*first["weights"]["student"][1:3])
    assert all(value.isfinite().all() for value in first["state"].values())
    assert_close(plain["state"], first["state"], 2e-6)


def test_the_knn_probe_does_not_change_the_run(runs):
    probed, whole = load_result(runs, "fsdp_probed"), load_result(runs, "fsdp_whole")
    accuracies = [row.get("knn_accuracy") for row in probed["logs"]]
    assert [accuracy is not None for accuracy in accuracies] == [False, True] * 3
    assert_close(whole["state"], probed["state"], 0)


def test_the_knn_probe_equals_that_of_ddp(runs):
    plain, sharded = (load_result(runs, mode)["logs"] for mode in ("plain_probed", "fsdp_probed"))
    assert [row.get("knn_accuracy") for row in plain] == [row.get("knn_accuracy") for row in sharded]


def test_bf16_rounds_neither_spectrograms_nor_losses_nor_teacher_nor_centers(runs):
    plain, sharded = load_result(runs, "plain_bf16"), load_result(runs, "fsdp_bf16")
    assert sharded["dtypes"] == ["loss torch.float32", "target torch.float32"]
    assert {value.dtype for value in sharded["state"].values()} == {torch.float32}
    for name in ("cls_center.center", "patch_center.center", "asit.layernorm.weight"):
        value = sharded["state"][name]
        assert not torch.equal(value, value.bfloat16().float())
    momenta, teacher, student = (
        column(sharded, "teacher_momentum"),
        *(sharded["weights"][w] for w in ("teacher", "student")),
    )
    for momentum, before, after, taught in zip(momenta, teacher, teacher[1:], student[1:]):
        torch.testing.assert_close(after, momentum * before + (1 - momentum) * taught, rtol=0, atol=1e-7)
    for name in ("loss", "global_loss", "local_loss", "reconstruction_loss"):
        np.testing.assert_allclose(column(plain, name), column(sharded, name), rtol=0.1)
    fp32 = load_result(runs, "fsdp_whole")
    assert column(fp32, "loss") != column(sharded, "loss")


def test_compiled_layers_can_be_sharded(runs):
    assert_close(load_result(runs, "fsdp_whole")["state"], load_result(runs, "fsdp_compiled")["state"], 2e-5)


def test_unsupported_options_are_refused_before_training(runs):
    errors = load_result(runs, "fsdp_refused")
    assert errors.keys() == {"version", "state_dict_type", "cpu_ram_efficient_loading", "fp16"}
    assert all(name in error for name, error in errors.items())
