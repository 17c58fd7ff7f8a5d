"""Processes that share out the training of all weights, and masters that live off the device."""

import json

import pytest
import torch
from torch.distributed.tensor import DTensor

from common.model.processes import part_of, whole
from tests import commands
from tests.small_models import FAMILIES, small_folder


def train(processes: int, output, *settings: str) -> dict:
    """What the first of some processes found out."""
    code = commands.run(["tests/parallel_worker.py", *settings], output, processes=processes)
    assert code == 0, output.read_text()
    (found,) = (line for line in output.read_text().splitlines() if line.startswith("{"))
    return json.loads(found)


@pytest.mark.parametrize(
    ("family", "precision"), [*((family, "float32") for family in FAMILIES), ("qwen3_vl", "bfloat16")]
)
def test_sharded_training_equals_that_of_one_process(family, precision, tmp_path):
    """With questions of which some have pictures, and more of them on one process than on the other. Under bfloat16
    arithmetic the masters stay in float32, and gradients are summed in it."""
    found = train(2, tmp_path / "output", small_folder(family), precision)
    assert 0.45 < found["own part"] < 0.55, "each process keeps half of the weights"
    assert not found["offloaded"]
    assert_trained_as_masters_are(found, precision)


@pytest.mark.parametrize(("processes", "precision"), [(1, "bfloat16"), (1, "float32"), (2, "bfloat16")])
def test_training_is_the_same_with_masters_off_the_device(processes, precision, tmp_path):
    """Under bfloat16 arithmetic the device has bfloat16 weights only; the step is that of float32 masters."""
    found = train(processes, tmp_path / "output", small_folder("qwen3_vl"), precision, "offload")
    assert found["offloaded"] and found["own part"] == pytest.approx(1 / processes, abs=0.05)
    assert_trained_as_masters_are(found, precision)


def assert_trained_as_masters_are(found: dict, precision: str) -> None:
    assert found["sharded"] and found["dtype"] == f"torch.{precision}" and found["copy is rounded master"]
    assert max(found["gradient"]) < 1e-5 and found["norm"] == pytest.approx(1, abs=1e-5)
    assert max(found["weights"]) < 1e-4 and found["same samples"] and found["optimizer restored"]


def test_what_is_not_sharded_stays_as_it_is():
    tensor = torch.arange(3.0)
    assert whole({"a": [tensor, 1]}, keep=False) == {"a": [tensor, 1]}
    assert part_of(tensor, torch.zeros(3)) is tensor and not isinstance(tensor, DTensor)
