"""The rehearsals themselves, small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_study_that_is_killed_twice_passes_its_rehearsal():
    command = [sys.executable, "-m", "rehearsals", "faults", "kills", "--kills", "2"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = [json.loads(line) for line in done.stdout.splitlines()]
    assert {figure["bench"]: figure["value"] for figure in figures}["kill -9: runs killed"] == 2
