"""Pretraining on two processes under torchrun (gloo), as users start it."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from tiny_pretraining import assert_close, launch, load_result, write_clips

from asit_hf.data.randomness import sample_key

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parent / "two_processes.py"
MODES = "given", "corrupted", "per_process", "whole", "resumed", "spoiled", "terminated", "packed", "minutes"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    output = tmp_path_factory.mktemp("alone")
    main = runpy.run_path(str(SCRIPT))["main"]
    for mode in ("given", "corrupted"):
        main(mode, output, [])
    return output


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    output = tmp_path_factory.mktemp("two")
    launch(SCRIPT, MODES, output, *write_clips(tmp_path_factory.mktemp("clips")))
    return output


def results(output, mode):
    return [load_result(output, mode, rank) for rank in (0, 1)]


@pytest.mark.parametrize("mode", ["given", "corrupted"])
def test_two_processes_equal_one_with_twice_the_batch(alone, two, mode):
    whole, (first, second) = load_result(alone, mode), results(two, mode)
    assert whole["steps"] == first["steps"] == 4
    assert_close(first["state"], second["state"], 0)
    assert_close(whole["state"], first["state"], 5e-6)  # the weights move by up to 4e-3
    for name in ("loss", "global_loss", "local_loss", "reconstruction_loss"):
        values = [[row[name] for row in one["logs"]] for one in (whole, first)]
        np.testing.assert_allclose(*values, atol=2e-6)


def test_the_mean_within_each_process_differs(two):
    ours, theirs = (
        np.array([row["reconstruction_loss"] for row in results(two, mode)[0]["logs"]])
        for mode in ("given", "per_process")
    )
    assert (abs(ours - theirs) > 1e-4).any()


def test_resumed_equals_uninterrupted_bit_for_bit(two):
    whole, resumed = results(two, "whole"), results(two, "resumed")
    assert whole[0]["steps"] == 6
    for before, after in zip(whole, resumed):
        assert_close(before["state"], after["state"], 0)
    assert whole[0]["logs"][3:] == resumed[0]["logs"][3:]


def test_a_non_finite_step_in_one_process_is_skipped_by_both(two):
    first, second = results(two, "spoiled")
    assert first["skipped"] == second["skipped"] == 1
    assert_close(first["state"], second["state"], 0)
    assert all(value.isfinite().all() for value in first["state"].values())
    assert [row.get("skipped_steps", 0) for row in first["logs"]] == [0, 1, 1, 1, 1, 1]


def test_sigterm_to_one_process_stops_both_with_a_checkpoint(two):
    first, second = results(two, "terminated")
    assert first["terminated"]
    assert second["terminated"]
    assert first["steps"] == second["steps"] == 2
    files = {path.name for path in (two / "terminated" / "checkpoint-2").iterdir()}
    assert {"model.safetensors", "optimizer.pt", "rng_state_0.pth", "rng_state_1.pth"} <= files


def test_processes_share_a_packed_pool(two):
    first, second = results(two, "packed")
    assert first["steps"] == second["steps"] == 6
    assert_close(first["state"], second["state"], 0)
    for epoch in range(2):
        shares = [one["gathered"][6 * epoch : 6 * epoch + 6] for one in (first, second)]
        crops = sorted(crop for share in shares for crop in share)
        assert crops == [(index, sample_key(0, epoch, index)) for index in range(12)]


def test_both_processes_plan_their_steps_by_the_clock_of_the_first(two):
    first, second = results(two, "minutes")
    assert first["steps"] == second["steps"] == 15
    assert_close(first["state"], second["state"], 0)
    assert first["logs"][-1]["learning_rate"] < 1e-4
