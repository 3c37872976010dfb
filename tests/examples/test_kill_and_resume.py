import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "kill_and_resume.py"


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--kills", "3", "--steps", "10"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["kills"] >= 1
    assert counts["checkpoints_that_do_not_load"] == 0
    assert counts["equal_to_an_uninterrupted_run"] is True
