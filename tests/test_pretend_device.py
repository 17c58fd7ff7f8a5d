"""What runs on CUDA runs on the accelerator that is not there (`pretend_device.py`)."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_everything_runs_on_the_pretend_accelerator():
    """In a process of its own: torch counts the devices once, at the first backward pass of a process.

    And without what accelerate leaves in the environment of this one, such as that it is to stay on the CPU.
    """
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", HERE / "on_pretend_device.py"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    done = subprocess.run(tests, cwd=HERE.parent, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
