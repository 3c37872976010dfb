import subprocess
import sys

import pytest

SCRIPT = """
import resource
import torch
from asit_hf.pretraining.memory import keep_freed_memory

kept = keep_freed_memory()
faults = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * 2**20)  # 64 MiB: 16384 pages
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(kept), *faults)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's setting")
def test_memory_is_got_from_the_system_once():
    output = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True).stdout
    kept, first, *_, last = map(int, output.split())
    if not kept:
        pytest.skip("another C library")
    assert first > 10000
    assert last < 1000
