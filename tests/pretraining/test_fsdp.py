"""
Pretraining under FSDP2, through Trainer and Accelerate as users start it, on one and on two processes (gloo, no GPU):
sharded runs equal those that are not.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from asit_hf import ASiTForPreTraining, ASiTModel

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parent / "fsdp_processes.py"
ONE = (
    "plain_whole,plain_accumulated,plain_bf16,plain_probed,"
    "fsdp_whole,fsdp_resumed,fsdp_accumulated,fsdp_bf16,fsdp_probed,fsdp_compiled,fsdp_default,fsdp_refused"
)
TWO = "plain_whole,plain_spoiled,fsdp_whole,fsdp_resumed,fsdp_spoiled,fsdp_probed"


def launch(modes, output, processes):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(SCRIPT), modes, str(output)], capture_output=True, text=True, timeout=300, env=environment
    )
    (output / "stderr").write_text(done.stderr)
    return output


def result(output, mode, rank=0):
    path = output / f"{mode}-{rank}.pt"
    assert path.is_file(), f"{mode} did not finish: {(output / 'stderr').read_text()[-3000:]}"
    loaded = torch.load(path, weights_only=True)
    return {**loaded, "logs": json.loads(loaded["logs"])} if "logs" in loaded else loaded


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return launch(ONE, tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launch(TWO, tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(params=[1, 2])
def runs(request):
    return request.getfixturevalue({1: "one", 2: "two"}[request.param])


def assert_close(first, second, atol=2e-6):
    assert first.keys() == second.keys()
    for name, value in first.items():
        # the keys' bias has no gradient but rounding errors, and AdamW makes large steps of those
        allowed = 1e-4 if atol and name.endswith("k_proj.bias") else atol
        torch.testing.assert_close(value, second[name], rtol=0, atol=allowed)


def column(run, name):
    return [row[name] for row in run["logs"]]


def test_the_recipe_shards_the_layers_of_both_encoders(runs):
    run = result(runs, "fsdp_whole")
    assert run["sharded"] == ["ASiTForPreTraining", "ASiTLayer", "ASiTPatchEmbeddings", "LayerNorm"]
    assert run["plugin"] == {
        "version": 2,
        "classes": ["ASiTLayer"],
        "reshard": True,
        "state_dict": "FULL_STATE_DICT",
        "offload": "OffloadPolicy",  # none
    }


def test_fsdp_without_a_configuration_is_that_of_the_recipe(one):
    recipe, default = result(one, "fsdp_whole"), result(one, "fsdp_default")
    assert (default["sharded"], default["plugin"]) == (recipe["sharded"], recipe["plugin"])
    assert_close(recipe["state"], default["state"], 0)


def test_two_processes_hold_half_the_weights_each(two):
    whole, sizes = (
        result(two, "plain_whole")["local_size"],
        [result(two, "fsdp_whole", r)["local_size"] for r in (0, 1)],
    )
    assert sum(sizes) == whole
    assert max(sizes) < 0.6 * whole


def test_sharded_run_equals_the_one_that_is_not(runs):
    plain, sharded = result(runs, "plain_whole"), result(runs, "fsdp_whole")
    assert plain["sharded"] == []
    assert plain["steps"] == sharded["steps"] == 6
    assert any(name.startswith("teacher.") for name in plain["state"])
    assert "cls_center.center" in plain["state"]
    assert_close(plain["state"], sharded["state"])
    for name in ("loss", "global_loss", "local_loss", "reconstruction_loss", "grad_norm", "cls_entropy"):
        np.testing.assert_allclose(column(plain, name), column(sharded, name), rtol=1e-5)


def test_accumulated_passes_equal_those_of_a_model_that_is_not_sharded(one):
    plain, sharded = result(one, "plain_accumulated"), result(one, "fsdp_accumulated")
    assert sharded["steps"] == 6
    assert_close(plain["state"], sharded["state"])


def test_prototypes_are_frozen_in_the_first_epoch_and_move_in_the_second(runs):
    weights = result(runs, "fsdp_whole")["weights"]
    before, first_epoch, second_epoch = weights["prototypes"][0], weights["prototypes"][1:4], weights["prototypes"][4:]
    assert all(torch.equal(after, before) for after in first_epoch)
    assert not any(torch.equal(after, before) for after in second_epoch)
    assert not torch.equal(weights["student"][1], weights["student"][0])


def test_weight_decay_follows_its_schedule_on_matrices_alone(one):
    plain, sharded = result(one, "plain_whole"), result(one, "fsdp_whole")
    assert sharded["groups"] == plain["groups"]
    assert [decays for decays, _ in sharded["groups"]] == [True, False]
    matrices, vectors = zip(*sharded["weight_decays"])
    np.testing.assert_allclose(matrices, column(sharded, "weight_decay"))
    assert matrices[0] < matrices[-1]
    assert set(vectors) == {0.0}


def test_resumed_equals_uninterrupted_bit_for_bit(runs):
    whole, resumed = result(runs, "fsdp_whole"), result(runs, "fsdp_resumed")
    assert len(resumed["weight_decays"]) == 2
    assert_close(whole["state"], resumed["state"], 0)
    assert whole["logs"] == resumed["logs"]


def test_checkpoints_load_without_fsdp(runs):
    state = result(runs, "fsdp_whole")["state"]
    checkpoint = runs / "fsdp_whole" / "checkpoint-6"
    assert not (runs / "fsdp_whole" / "unfinished").exists()
    model, info = ASiTForPreTraining.from_pretrained(checkpoint, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_close(state, model.state_dict(), 0)
    encoder, info = ASiTModel.from_pretrained(checkpoint, output_loading_info=True)
    assert not info["missing_keys"]
    assert_close({name: state[f"asit.{name}"] for name in encoder.state_dict()}, encoder.state_dict(), 0)


def test_a_step_that_is_not_finite_in_one_process_is_skipped_by_both(two):
    plain, first, second = (
        result(two, mode, rank) for mode, rank in (("plain_spoiled", 0), ("fsdp_spoiled", 0), ("fsdp_spoiled", 1))
    )
    assert first["skipped"] == second["skipped"] == 1
    assert torch.equal(*first["weights"]["student"][1:3])
    assert all(value.isfinite().all() for value in first["state"].values())
    assert_close(plain["state"], first["state"])


def test_knn_probe_of_the_teacher_leaves_the_run_as_it_is(runs):
    probed, whole = result(runs, "fsdp_probed"), result(runs, "fsdp_whole")
    accuracies = [row.get("knn_accuracy") for row in probed["logs"]]
    assert [accuracy is not None for accuracy in accuracies] == [False, True] * 3
    assert_close(whole["state"], probed["state"], 0)


def test_knn_probe_equals_that_of_a_model_that_is_not_sharded(one):
    plain, sharded = (result(one, mode)["logs"] for mode in ("plain_probed", "fsdp_probed"))
    assert [row.get("knn_accuracy") for row in plain] == [row.get("knn_accuracy") for row in sharded]


def test_bf16_rounds_neither_spectrograms_nor_losses_nor_teacher_nor_centers(one):
    plain, sharded = result(one, "plain_bf16"), result(one, "fsdp_bf16")
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
    fp32 = result(one, "fsdp_whole")
    assert column(fp32, "loss") != column(sharded, "loss")


def test_layers_compiled_in_place_shard(one):
    assert_close(result(one, "fsdp_whole")["state"], result(one, "fsdp_compiled")["state"], 2e-5)


def test_what_does_not_work_is_refused_before_training(one):
    said = result(one, "fsdp_refused")
    assert said.keys() == {"version", "state_dict_type", "cpu_ram_efficient_loading", "fp16"}
    assert all(name in line for name, line in said.items())
