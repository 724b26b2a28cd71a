"""The rehearsals themselves, small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def rehearse(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rehearsals", *arguments]
    root = Path(__file__).parents[1]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def figures(done: subprocess.CompletedProcess[str]) -> dict[str, float]:
    """By what they are of."""
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["bench"]: line["value"] for line in lines}


def test_a_small_study_goes_through_the_rehearsal_of_scale():
    """To its last figure; whether they reach their bars is not looked at, for they are times."""
    done = rehearse("scale", "--layers", "1", "--ranges", "2")
    assert "peak memory of the process" in figures(done), done.stderr[-2000:]


@pytest.mark.slow
def test_a_study_that_is_killed_twice_passes_its_rehearsal():
    done = rehearse("faults", "kills", "--kills", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert figures(done)["kill -9: runs killed"] == 2
