"""What runs on CUDA runs on the accelerator that is not there (`pretend_device.py`)."""

import os

from tests import commands


def test_everything_runs_on_the_pretend_accelerator(tmp_path):
    """In a process of its own: torch counts the devices once, at the first backward pass of a process.

    And without what accelerate leaves in the environment of this one, such as that it is to stay on the CPU.
    """
    tests, output = ["-m", "pytest", "-p", "no:cacheprovider", "tests/on_pretend_device.py"], tmp_path / "output"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    assert commands.run(tests, output, clean) == 0, output.read_text()[-10000:]
