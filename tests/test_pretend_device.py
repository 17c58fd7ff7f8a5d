"""What runs on CUDA runs on the accelerator that is not there (`pretend_device.py`)."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_everything_runs_on_the_pretend_accelerator():
    """In a process of its own: torch counts the devices once, at the first backward pass of a process.

    Peaks against the plan are for a run by hand, `pytest tests/on_pretend_device.py`: they were once counted as 0 here.
    """
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", HERE / "on_pretend_device.py"]
    tests += ["-k", "not plan_counts"]
    done = subprocess.run(tests, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
