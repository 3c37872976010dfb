"""Runs `fake_cuda_cases.py`, on fake CUDA tensors without values, in a separate process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("fake_cuda_cases.py")
BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.mark.slow
@pytest.mark.needs_compiler
def test_a_training_step_runs_on_a_cuda_device_without_waiting_for_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import fake_cuda

    environment = {**os.environ, "LD_PRELOAD": fake_cuda.build(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", str(CASES), "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=environment, cwd=CASES.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
