"""Training that is ended in bad ways; `tools/torture.py` does it hundreds of times, at every place that is written."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("way", ["kill", "term", "enospc", "eio"])
def test_nothing_is_lost(way):
    command = [sys.executable, "-m", "tools.torture", way, "--rounds", "2", "--seed", "1"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all equal bit for bit" in done.stdout
