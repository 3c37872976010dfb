import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, sys, time
import numpy as np
from torch.utils.data import DataLoader
from asit_hf.data import PretrainingCrops, collate_crops

clip = {"array": np.zeros(8000, np.float32), "sampling_rate": 8000}
crops = PretrainingCrops([clip] * 10**6, 8000, 0.5, 2, 0.2, 2)
batches = iter(DataLoader(crops, 8, num_workers=2, collate_fn=collate_crops))
next(batches)
os.kill(batches._workers[int(sys.argv[1])].pid, signal.SIGKILL)
start = time.monotonic()
try:
    for _ in batches:
        pass
except RuntimeError as error:
    print(f"{time.monotonic() - start:.1f}", error)
"""


@pytest.mark.parametrize("worker", ["0", "1"])
def test_a_killed_worker_is_an_error_within_seconds(worker):
    """torch's own message; it must neither hang nor end the epoch early."""
    result = subprocess.run([sys.executable, "-c", SCRIPT, worker], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    seconds, message = result.stdout.split(maxsplit=1)
    assert float(seconds) < 30
    assert "DataLoader worker (pid" in message
    assert "is killed by signal: Killed" in message or "exited unexpectedly" in message
