"""Two processes that share out the training of all weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from common.model.processes import part_of, whole
from tests.small_models import FAMILIES, small_folder
from tests.test_training import free_port


def two_processes(folder: str, precision: str) -> dict:
    """What the first of two processes found out."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    command += ["tests/parallel_worker.py", folder, precision]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("family", "precision"), [*((family, "float32") for family in FAMILIES), ("qwen3_vl", "bfloat16")]
)
def test_sharded_training_equals_that_of_one_process(family, precision):
    """With questions of which some have pictures, and more of them on one process than on the other. Under bfloat16
    arithmetic the masters stay in float32, and gradients are summed in it."""
    found = two_processes(small_folder(family), precision)
    assert found["sharded"] and found["dtype"] == f"torch.{precision}" and found["copy is rounded master"]
    assert 0.45 < found["own part"] < 0.55, "each process keeps half of the weights"
    assert max(found["gradient"]) < 1e-5 and found["norm"] == pytest.approx(1, abs=1e-5)
    assert max(found["weights"]) < 1e-4 and found["same samples"]


def test_what_is_not_sharded_stays_as_it_is():
    tensor = torch.arange(3.0)
    assert whole({"a": [tensor, 1]}, keep=False) == {"a": [tensor, 1]}
    assert part_of(tensor, torch.zeros(3)) is tensor and not isinstance(tensor, DTensor)
