"""What is particular to a GPU, where there is one: `python -m pytest --noconftest tests/on_cuda.py`."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.commands import ROOT

HIDING = ("CUDA_VISIBLE_DEVICES", "ACCELERATE_")  # variables that keep the other tests on the CPU


def has_gpu() -> bool:
    return (
        bool(shutil.which("nvidia-smi")) and b"GPU" in subprocess.run(["nvidia-smi", "-L"], capture_output=True).stdout
    )


@pytest.mark.skipif(not has_gpu(), reason="no GPU here")
def test_everything_runs_on_a_gpu():
    variables = {name: value for name, value in os.environ.items() if not name.startswith(HIDING)}
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--noconftest", "tests/on_cuda.py"]
    done = subprocess.run(words, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10000:]
