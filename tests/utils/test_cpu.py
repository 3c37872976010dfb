import subprocess
import sys

import pytest
import torch
from transformers import TrainingArguments

from asit_hf.utils import cpu

SCRIPT = """
import resource
import torch
from asit_hf.utils.cpu import keep_freed_memory

kept = keep_freed_memory()
faults = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * 2**20)  # 64 MiB: 16384 pages
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(kept), *faults)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's setting")
@pytest.mark.slow
def test_freed_memory_is_reused():
    output = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True).stdout
    kept, first, *_, last = map(int, output.split())
    if not kept:
        pytest.skip("another C library")
    assert first > 10000
    assert last < 1000


@pytest.mark.parametrize(
    ("bf16", "capabilities", "warned"),
    [
        (True, {"avx2": True, "avx512_bf16": False}, True),
        (True, {"avx2": True, "avx512_bf16": True}, False),
        (True, {"neon": True, "bf16": True}, False),
        (False, {"avx2": True}, False),
    ],
)
def test_bf16_without_instructions_for_it_is_warned_of(tmp_path, monkeypatch, bf16, capabilities, warned):
    warnings = []
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(cpu.logger, "warning", warnings.append)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=bf16, report_to="none")
    cpu.warn_of_emulated_bf16(args)
    assert bool(warnings) == warned
    if warned:
        assert "bf16" in warnings[0]
