import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "kill_corpus.py"


@pytest.mark.slow
def test_a_killed_command_run_again_writes_the_same_files():
    # the second case, embeddings in one file, has all three kinds of kills
    command = [sys.executable, str(SCRIPT), "--kills", "2", "--cases", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["kills at file operations"] == 2
    assert counts["kills at random moments"] + counts["kills while joining"] >= 1
    assert counts["runs equal to the undisturbed one"] == counts["runs"] == 3
    assert counts["unfinished files under final names"] == 0
