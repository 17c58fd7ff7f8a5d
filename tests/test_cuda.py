"""What is particular to a GPU, where there is one: `python -m pytest tests/on_cuda.py`."""

import os
import shutil
import subprocess

import pytest

from tests import commands

HIDDEN = ("CUDA_VISIBLE_DEVICES", "ACCELERATE_")  # by which the other tests stay on the CPU


def has_gpu() -> bool:
    return (
        bool(shutil.which("nvidia-smi")) and b"GPU" in subprocess.run(["nvidia-smi", "-L"], capture_output=True).stdout
    )


@pytest.mark.skipif(not has_gpu(), reason="no GPU here")
def test_everything_runs_on_a_gpu(tmp_path):
    output, seen = tmp_path / "output", {k: v for k, v in os.environ.items() if not k.startswith(HIDDEN)}
    tests = ["-m", "pytest", "-p", "no:cacheprovider", "--noconftest", "tests/on_cuda.py"]
    assert commands.run(tests, output, seen) == 0, output.read_text()[-10000:]
