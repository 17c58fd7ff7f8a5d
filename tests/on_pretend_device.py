"""All scripts on an accelerator that is not there: they take CUDA's branches and obey its rules."""

import importlib

import pytest
import torch
from safetensors.torch import load_file

from common.model.decoder import Decoder
from common.model.load import load_policy
from common.model.plan import Machine
from common.model.sampling import DROP_EVERY, sample, uniform_numbers
from common.model.scoring import Scorer
from common.run import folder
from common.run.settings import plan_of
from tests.pretend_device import CUDA, pretended
from tests.small_models import larger_folder, puzzle_prompts, small_folder
from tests.small_runs import SETTINGS, find_some_right, train

READS_A_STEP = 268  # 8 of them when the device is measured at the start


@pytest.fixture
def device(monkeypatch):
    with pretended(monkeypatch) as there:
        monkeypatch.setattr(folder, "this_machine", lambda accelerator: Machine(4e9))
        monkeypatch.setattr("common.run.rates.SIZES", {"cuda": (8, 64)})  # which would outweigh a small model
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # which peft would ask about the model
        yield there


def test_the_device_refuses_what_cuda_refuses(device):
    here, there = torch.ones(3, device=CUDA), torch.ones(3)
    assert here.device == CUDA and here.is_cuda
    for mixed in (lambda: here + there, lambda: there * here, lambda: torch.cat([here, there])):
        with pytest.raises(RuntimeError, match=r"a CPU tensor .* among tensors on cuda:0"):
            mixed()
    assert (here + torch.tensor(2.0)).tolist() == [3, 3, 3], "a number is allowed"
    assert here[torch.tensor([0, 1])].shape == (2,) and (there.to(CUDA) + here).cpu().tolist() == [2, 2, 2]
    reads = device.reads
    assert bool((here > 0).all()) and here.sum().item() == 3 and here[here > 0].shape == (3,)
    assert device.reads == reads + 3
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            here.sum().item()


def test_the_device_counts_what_it_holds(device):
    before = device.now
    here = torch.zeros(1000, device=CUDA)
    view, more = here[:10], here + 1
    assert device.now == before + 8000
    del here, more
    assert device.now == before + 4000, "a view keeps all"
    del view
    assert device.now == before and device.most >= before + 8000


@pytest.mark.parametrize("slots", [0, 3])
def test_sampling_is_recorded_as_graphs_that_say_the_same(slots, device, monkeypatch):
    """Also that in bfloat16 sampling and scoring stay together, and that the host seldom waits."""
    policy = load_policy("tiny", device=CUDA)
    prompts = puzzle_prompts(policy, 5)
    limit, found = 16, []
    for record in (True, False):
        monkeypatch.setattr(Decoder, "may_record", record)
        reads, replays = device.reads, device.replays
        found.append(sample(policy, prompts, 1, limit, uniform_numbers(0, 0, range(5), limit), slots=slots))
        forwards = 2 if slots else 1  # of prompts, of whose waits the vision tower's own are 17
        assert device.reads - reads <= forwards * (25 + limit // DROP_EVERY), "waits, for all rows together"
        assert (device.replays > replays) == record
    recorded, plain = found
    assert torch.equal(recorded.completion_ids.cpu(), plain.completion_ids.cpu())
    assert torch.equal(recorded.logprobs.cpu(), plain.logprobs.cpu())
    with torch.no_grad():
        logprobs = Scorer(policy)(prompts, plain.completion_ids, plain.completion_mask).logprobs
    apart = (logprobs - plain.logprobs).abs()[plain.completion_mask].mean()
    assert 0 < float(apart) < 0.01, "rounding, and no more"


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_mixes_no_devices_and_seldom_waits(name, device, tmp_path, monkeypatch):
    script = name.split()[0]
    find_some_right(script, monkeypatch)
    (metrics,) = train(script, tmp_path / "run", *SETTINGS[name].split())
    assert metrics["grad_norm"] > 0 and metrics["loss"] is not None
    assert device.reads <= READS_A_STEP, "with those of saving, and 17 of each forward of pictures"
    assert (tmp_path / "run" / "plan.json").is_file()


def test_a_run_goes_on_where_it_stopped(device, tmp_path):
    """With all that a run does: preflight, evaluations, the page, checkpoints."""
    flags = ["--micro-batch-tokens", "500"]
    more = ["--preflight", "--test-examples", "2", "--eval-every", "2", "--eval-examples", "2"]
    whole = train("grpo", tmp_path / "whole", *flags, *more, "--steps", "2", model="tiny")
    train("grpo", tmp_path / "parts", *flags, "--steps", "1", model="tiny")
    parts = train("grpo", tmp_path / "parts", *flags, "--steps", "2", "--resume", str(tmp_path / "parts"), model="tiny")
    measured = ("seconds", "tokens_per_second", "memory_gib", "cost/")
    for one, other in zip(parts, whole, strict=True):
        assert {k: v for k, v in one.items() if not k.startswith(measured)}.items() <= other.items()
    weights, again = (
        load_file(tmp_path / name / "checkpoints" / "step-000002" / "model.safetensors") for name in ("whole", "parts")
    )
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())


EVALUATIONS = {
    "__main__": {"corruptions": ("motion_blur",), "severities": (3,)},
    "look": {"show": 1, "masks": 1},
    "probes": {},
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluations_run_there_with_weights_in_bfloat16(name, device, tmp_path, monkeypatch):
    module = importlib.import_module(f"common.evaluation.{name}")
    loaded = []
    monkeypatch.setattr(module, "load_policy", lambda *a, **k: loaded.append(load_policy(*a, **k)) or loaded[0])
    out = tmp_path / ("result.json" if name == "__main__" else "result")
    model = (small_folder("qwen3_vl"),)
    args = module.Args(model=model, data="puzzles", limit=4, max_completion_length=6, out=str(out), **EVALUATIONS[name])
    module.main(args)
    assert out.exists() and loaded[0].model.dtype == torch.bfloat16 and loaded[0].device == CUDA


@pytest.mark.parametrize(
    ("layers", "settings"),
    [
        (6, "--lora-rank 0"),
        (6, "--lora-rank 8"),
        (6, "--freeze vision"),
        (3, "--lora-rank 0"),
        (3, "--micro-batch-tokens 800"),  # two of them, so that the second one finds all gradients there
    ],
)
def test_the_plan_counts_what_a_run_holds(layers, settings, device, tmp_path, monkeypatch):
    """Weights, gradients, Adam's moments, pictures, and the larger of sampling and update: within a tenth above."""
    model = larger_folder(layers)
    for module in ("memory", "scoring"):
        monkeypatch.setattr(f"common.model.{module}.LOGIT_BUDGET", 2**16)
    monkeypatch.setattr("common.run.settings.longest_prompt", lambda *args: (200, 64))  # of a puzzle
    find_some_right("grpo", monkeypatch)
    plans = []
    monkeypatch.setattr(folder, "plan_of", lambda *args: plans.append(plan_of(*args)) or plans[0])
    flags = f"{settings} --prompts-per-step 4 --max-completion-length 24 --steps 2".split()
    train("grpo", tmp_path / "run", *flags, model=model)
    computed = sum(plans[0].kept.values()) + max(plans[0].phases["sampling"], plans[0].phases["update"])
    assert 0.5 * computed < device.most < 1.1 * computed, (device.most, plans[0].kept, plans[0].phases)
