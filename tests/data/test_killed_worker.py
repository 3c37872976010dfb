import subprocess
import sys

import pytest
from torch.utils.data import DataLoader

from asit_hf.data import AudioReadError, PretrainingCrops
from asit_hf.data.workers import clear_worker_errors

SCRIPT = """
import os, signal, sys, time
import numpy as np
from torch.utils.data import DataLoader
from asit_hf.data import PretrainingCrops, collate_crops
from asit_hf.data.workers import clear_worker_errors

clip = {"array": np.zeros(8000, np.float32), "sampling_rate": 8000}
crops = PretrainingCrops([clip] * 10**6, 8000, global_seconds=0.5, local_seconds=0.2)
for worker in (0, 1):
    batches = iter(DataLoader(crops, 8, num_workers=2, collate_fn=collate_crops))
    next(batches)
    os.kill(batches._workers[worker].pid, signal.SIGKILL)
    start = time.monotonic()
    try:
        with clear_worker_errors():
            for _ in batches:
                pass
    except RuntimeError as error:
        print(f"{time.monotonic() - start:.1f}", error)
    del batches
"""


@pytest.mark.slow
def test_a_killed_worker_is_one_clear_error_within_seconds():
    """Neither a hang nor an epoch that ends early."""
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        seconds, message = line.split(maxsplit=1)
        assert float(seconds) < 30
        assert message.startswith("a DataLoader worker was killed by the system, usually for lack of memory")


def test_other_errors_pass_unchanged(tmp_path):
    loader = DataLoader(PretrainingCrops([str(tmp_path / "gone.wav")], 8000, strict=True), num_workers=1)
    with pytest.raises(AudioReadError, match=r"gone\.wav: no such file"), clear_worker_errors():
        next(iter(loader))
    with pytest.raises(FileNotFoundError), clear_worker_errors():
        (tmp_path / "gone.txt").read_text()
    with pytest.raises(RuntimeError, match="^shapes"), clear_worker_errors():
        raise RuntimeError("shapes do not fit")
