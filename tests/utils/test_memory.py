import platform
from pathlib import Path

import numpy as np
import pytest

from asit_hf.utils.memory import return_freed_memory


def resident() -> int:
    """Memory in use, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1000 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps memory in this way")
def test_memory_below_something_in_use_is_returned():
    blocks = [np.ones(60000, np.uint8) for _ in range(2000)]
    last = blocks[-1]
    before = resident()
    del blocks
    return_freed_memory()
    assert resident() < before - 80_000_000
    assert last.all()
