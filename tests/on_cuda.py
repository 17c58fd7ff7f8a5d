"""All scripts on a GPU: graphs, bfloat16, masters off the device, and what they hold against the plan.

python -m pytest --noconftest tests/on_cuda.py
"""

import warnings

import pytest
import torch

from common.model.decoder import Decoder
from common.model.inputs import Prompts
from common.model.load import Policy, load_policy
from common.model.sampling import Rollout, sample, uniform_numbers
from common.model.scoring import Scorer
from common.run import folder
from common.run.settings import plan_of
from tests.small_models import larger_folder, puzzle_prompts
from tests.small_runs import SETTINGS, find_some_right, train

LIMIT = 48


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def draw(policy: Policy, prompts: Prompts, slots: int = 0) -> Rollout:
    rows = 4 * len(prompts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a recording that fails is one
        return sample(policy, prompts, 4, LIMIT, uniform_numbers(0, 0, range(rows), LIMIT), slots=slots)


def apart(one: Rollout, other: Rollout) -> float:
    """Mean nats a token up to where a row's tokens differ: behind it there is nothing to compare."""
    width = min(one.completion_ids.shape[1], other.completion_ids.shape[1])
    both = one.completion_mask[:, :width] & other.completion_mask[:, :width]
    same = (one.completion_ids[:, :width] == other.completion_ids[:, :width]).cumprod(1).bool() & both
    assert same.sum() > 0.8 * both.sum(), "most rows are the same from end to end"
    return float((one.logprobs[:, :width] - other.logprobs[:, :width])[same].abs().mean())


def test_sampling_as_recorded_graphs_in_slots_and_scoring_agree(monkeypatch):
    policy = load_policy("tiny", device="cuda")
    prompts = puzzle_prompts(policy, 6)
    recorded, slots = draw(policy, prompts), draw(policy, prompts, slots=8)
    monkeypatch.setattr(Decoder, "may_record", False)
    plain = draw(policy, prompts)
    assert apart(recorded, plain) < 1e-4 and apart(slots, plain) < 0.01
    with torch.no_grad():
        logprobs = Scorer(policy)(prompts, plain.completion_ids, plain.completion_mask).logprobs
    mask = plain.completion_mask
    assert 0 < float((logprobs - plain.logprobs).abs()[mask].mean()) < 0.01, "rounding, and no more"
    there = load_policy("tiny")
    with torch.no_grad():
        exact = Scorer(there)(puzzle_prompts(there, 6), plain.completion_ids.cpu(), mask.cpu()).logprobs
    assert float((logprobs.cpu() - exact).abs()[mask.cpu()].mean()) < 0.01, "as on the CPU in float32"


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_in_every_setting(name, tmp_path, monkeypatch):
    script = name.split()[0]
    find_some_right(script, monkeypatch)
    (metrics,) = train(script, tmp_path / "run", *SETTINGS[name].split())
    assert metrics["grad_norm"] > 0 and metrics["loss"] is not None
    # Completions that are sampled behind noisy pictures and scored behind clean ones differ by more than rounding.
    assert metrics["mismatch"] < (0.05 if name != "noisy_grpo" else 1)


def test_masters_off_the_device_and_a_resumption_change_nothing(tmp_path, monkeypatch):
    """But for what bfloat16 gradients round: in one micro-batch they are summed up by themselves."""
    find_some_right("grpo", monkeypatch)
    flags = ["--micro-batch-tokens", "300", "--learning-rate", "1e-4"]
    both = train("grpo", tmp_path / "here", *flags, "--steps", "2")
    train("grpo", tmp_path / "off", *flags, "--offload-optimizer")
    off = train("grpo", tmp_path / "off", *flags, "--steps", "2", "--resume", str(tmp_path / "off"))
    for one, other in zip(both, off, strict=True):
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.02)
        assert other["entropy"] == pytest.approx(one["entropy"], rel=0.01)


@pytest.mark.parametrize("settings", ["--lora-rank 0", "--lora-rank 8", "--offload-optimizer --micro-batch-tokens 800"])
def test_the_plan_counts_what_a_run_holds(settings, tmp_path, monkeypatch):
    """Weights, gradients, Adam's moments, pictures, and the larger of sampling and update."""
    model = larger_folder()
    monkeypatch.setattr("common.run.settings.longest_prompt", lambda *args: (200, 64))  # of a puzzle
    find_some_right("grpo", monkeypatch)
    plans = []
    monkeypatch.setattr(folder, "plan_of", lambda *args: plans.append(plan_of(*args)) or plans[0])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    flags = f"{settings} --prompts-per-step 4 --max-completion-length 24".split()
    train("grpo", tmp_path / "run", *flags, model=model)
    computed = sum(plans[0].kept.values()) + max(plans[0].phases["sampling"], plans[0].phases["update"])
    most = torch.cuda.max_memory_allocated() - before
    print(f"{settings}: {most / 1e6:.0f} MB, planned {computed / 1e6:.0f}")
    assert 0.4 * computed < most < 1.15 * computed
