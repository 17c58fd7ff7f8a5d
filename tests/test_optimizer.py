"""The learning rate's course, and a vision tower that is not trained."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import grpo
from common.model.load import TINY, Policy, load_policy
from common.model.processes import distribute, gather_weights, whole
from common.model.scoring import Scorer
from common.model.training import Batch, micro_batches, rate_at
from common.run.checkpoints import masters
from common.run.settings import check_settings
from tests.parallel_worker import question
from tests.small_models import FAMILIES, small_folder, small_prompts
from tests.test_training import QUICK, assert_same_gradients, assert_same_weights, train, train_in_two
from tests.train_worker import record


@pytest.mark.parametrize("kind, rates", [
    ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1]),
    ("linear", [0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25]),
    ("cosine", [0.25, 0.5, 0.75, 1, 0.853553, 0.5, 0.146447]),
])  # fmt: skip
def test_the_learning_rate_rises_and_falls(kind, rates):
    args = grpo.Args(steps=7, warmup_steps=4, lr_scheduler_type=kind, learning_rate=2e-5)
    assert [rate_at(args, step) / 2e-5 for step in range(7)] == pytest.approx(rates, abs=1e-6)


def test_without_a_warm_up_the_first_step_has_the_highest_rate():
    args = grpo.Args(steps=300, lr_scheduler_type="cosine")
    rates = [rate_at(args, step) for step in range(300)]
    assert rates[0] == args.learning_rate and rates == sorted(rates, reverse=True) and rates[-1] > 0
    with pytest.raises(SystemExit, match="--warmup-steps 301: must be at most --steps 300"):
        check_settings(replace(args, warmup_steps=301))


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoints/step-{step:06d}/model.safetensors")


def test_a_resumed_run_goes_on_at_the_rate_of_its_step(tmp_path):
    """As if it had been killed after step 1 of 3; to the bit, also with a frozen tower."""
    flags = ["--steps", "3", "--save-every", "1", "--keep-checkpoints", "3", "--warmup-steps", "2"]
    flags += ["--lr-scheduler-type", "linear", "--freeze", "vision"]
    train(tmp_path / "whole", *flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for step in (2, 3):
        shutil.rmtree(tmp_path / f"killed/checkpoints/step-{step:06d}")
    record("grpo", [*QUICK, *flags, "--resume", str(tmp_path / "killed")])
    one, other = (weights(tmp_path / name, 3) for name in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    lines = (tmp_path / "killed/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["lr"] for line in lines] == pytest.approx([1.5e-5, 3e-5, 1.5e-5])


def test_a_frozen_tower_stays_and_the_rest_learns_as_before(tmp_path):
    """On one process; on two, which hold parts of what is trained, and then on one; with masters off the device."""
    flags, once = ["--freeze", "vision"], ["--steps", "1"]
    whole, alone = train(tmp_path / "whole", *once), train(tmp_path / "alone", *flags)
    rest = {name: g for name, g in whole["gradients"][0].items() if ".visual." not in name}
    assert len(rest) < len(whole["gradients"][0])
    assert_same_gradients({"gradients": [rest]}, {"gradients": alone["gradients"][:1]})
    offloaded = train(tmp_path / "offloaded", *flags, *once, "--offload-optimizer")
    assert_same_gradients({"gradients": alone["gradients"][:1]}, offloaded)
    together = train_in_two(tmp_path / "together", *flags, *once)
    assert together["sharded"] and offloaded["sharded"] and not alone["sharded"]
    record("grpo", [*QUICK, "--resume", str(tmp_path / "together"), *flags])
    before, last = load_file(TINY / "model.safetensors"), weights(tmp_path / "together", 2)
    assert_same_weights({"weights": weights(tmp_path / "alone", 2)}, {"weights": last})
    for after in (last, weights(tmp_path / "offloaded", 1)):
        assert after.keys() == before.keys()
        same = {name for name in after if torch.equal(after[name], before[name])}
        assert same >= {name for name in after if ".visual." in name}
        assert "model.language_model.embed_tokens.weight" not in same


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_tower_is_not_rounded_with_the_copy_that_is_computed_with(family, monkeypatch):
    """Under bfloat16 arithmetic, masters off the device: what is saved of the tower is what was loaded."""
    monkeypatch.setattr(Policy, "autocast", lambda self: torch.autocast("cpu", dtype=torch.bfloat16))
    before = load_policy(small_folder(family)).model.state_dict()
    policy = load_policy(small_folder(family), freeze_vision=True, offload_optimizer=True)
    scorer = Scorer(policy, gradient_checkpointing=True)
    try:
        trained_scorer, parameters = distribute(scorer, Accelerator(cpu=True), offload_optimizer=True)
        gather_weights(scorer)
        trained_scorer(*question(policy, 0)).logprobs.sum().backward()
        saved = whole(masters(policy, torch.optim.AdamW(parameters)), keep=True)
    finally:
        torch.distributed.destroy_process_group()
    assert policy.model.get_output_embeddings().weight.dtype == torch.bfloat16
    assert all(p.grad is not None for p in parameters) and len(parameters) < len(saved)
    assert all(torch.equal(value, before[name]) for name, value in saved.items())


def test_with_masters_off_the_device_gradients_are_moved_once():
    """They are summed up before, in float32, and the sum is that of all rows together."""

    def learn(offload: bool, budget: int) -> tuple[list[bool], list[torch.Tensor]]:
        policy = load_policy(small_folder("qwen3_vl"), offload_optimizer=offload)
        trained, parameters = distribute(Scorer(policy), Accelerator(cpu=True), offload)
        gather_weights(trained)
        prompts, _, _ = small_prompts(policy)
        ids = torch.randint(0, 256, (2 * len(prompts), 5), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids, dtype=torch.bool)
        batch = Batch(prompts=prompts, ids=ids, completion_mask=mask, trained=mask[:, 0])
        there = []
        for mb in micro_batches(batch, 2, budget, trained):
            trained(mb.prompts, mb.ids, mb.completion_mask).logprobs.sum().backward()
            there.append(parameters[0].grad is not None)
        return there, [p.grad.full_tensor() if offload else p.grad for p in parameters]

    there, once = learn(offload=False, budget=10_000)
    assert there == [True]
    try:
        there, summed = learn(offload=True, budget=60)
    finally:
        torch.distributed.destroy_process_group()
    assert there == [False, False, True]
    for one, other in zip(once, summed, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
