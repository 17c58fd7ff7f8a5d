"""Whole runs of the training loop: cut, spread, killed, resumed, stopped, and still the same training."""

import importlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import grpo
from tests import commands
from tests.commands import ROOT
from tests.train_worker import record

# Small and quick, yet with groups of mixed rewards.
QUICK = "--prompts-per-step 4 --group-size 4 --steps 2 --eval-every 0 --test-examples 0 --seed 3 --no-preflight".split()


SCRIPTS = ("grpo", "noisy_grpo", "vgpo", "vppo", "roma")


def train(folder, *flags: str, script: str = "grpo") -> dict:
    return record(script, [*QUICK, "--out", str(folder), *flags])


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def assert_same_gradients(one: dict, other: dict, tolerance: float = 1e-4) -> None:
    """Equal up to rounding, which is measured against the largest entry of the whole gradient."""
    for before, after in zip(one["gradients"], other["gradients"], strict=True):
        assert before.keys() == after.keys()
        scale = max(g.abs().max() for g in before.values())
        for name in before:
            assert (before[name] - after[name]).abs().max() <= tolerance * scale, name


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "run"
    result = train(folder)
    assert any(line["reward_std"] > 0 for line in metrics(folder)), "the comparison needs something to compare"
    return folder, result


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_gradients_do_not_depend_on_micro_batches(loss_type, tmp_path):
    flags = ["--loss-type", loss_type, "--steps", "1"]
    whole = train(tmp_path / "whole", *flags)
    cut = train(tmp_path / "cut", *flags, "--micro-batch-tokens", "1")
    assert_same_gradients(whole, cut)


def test_groups_without_variance_may_be_skipped(tmp_path):
    """A penalty of practically nothing makes every group be scored; the gradient stays what it was."""
    skipping = train(tmp_path / "skipping", "--steps", "1")
    scoring = train(tmp_path / "scoring", "--steps", "1", "--kl-coef", "1e-12")
    assert_same_gradients(skipping, scoring)
    assert metrics(tmp_path / "scoring")[0]["frac_reward_zero_std"] > 0


def train_in_two(folder, *flags: str, script: str = "grpo", launcher: bool = False) -> dict:
    """As `train`, in two processes; with the launcher these are new ones, whose interpreters are taken down at the end,
    at which threads of a group have hung."""
    seen, output = folder.with_suffix(".pt"), folder.with_suffix(".log")
    command = ["tests/train_worker.py", script, seen, *QUICK, "--out", folder, *flags]
    if launcher:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
        torchrun += ["--master_port", commands.free_port()]
        subprocess.run([*torchrun, *command], cwd=ROOT, env=commands.environment(), check=True, timeout=300)
    else:
        assert commands.run(command, output, processes=2) == 0, output.read_text()
    return torch.load(seen, weights_only=True)


def assert_same_metrics(folder, other) -> None:
    for one, two in zip(metrics(folder), metrics(other), strict=True):
        assert one.keys() == two.keys()
        measured = ("seconds", "tokens_per_second", "memory_gib", "cost/")  # what depends on the cut or the machine
        for name in (name for name in one if not name.startswith(measured)):
            numbers = [math.nan if line[name] is None else line[name] for line in (one, two)]
            assert numbers[0] == pytest.approx(numbers[1], rel=1e-3, abs=1e-5, nan_ok=True), name


def assert_same_weights(one: dict, other: dict) -> None:
    rate = grpo.Args().learning_rate
    for name, weight in one["weights"].items():
        difference = (weight - other["weights"][name]).abs()
        # Adam turns rounding in a gradient that is almost 0 into a step of its own; elsewhere the weights agree.
        assert difference.max() <= 6 * rate and (difference > rate / 100).float().mean() < 0.01, name


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_and_small_micro_batches_train_as_one(script, tmp_path):
    alone = train(tmp_path / "alone", script=script)
    together = train_in_two(tmp_path / "together", script=script, launcher=script == "grpo")
    cut = train(tmp_path / "cut", "--micro-batch-tokens", "300", script=script)

    assert (alone["processes"], together["processes"]) == (1, 2)
    assert (alone["sharded"], together["sharded"]) == (False, True)
    assert_same_gradients(alone, together)
    assert_same_gradients(alone, cut)
    assert_same_metrics(tmp_path / "alone", tmp_path / "together")
    assert_same_metrics(tmp_path / "alone", tmp_path / "cut")
    assert_same_weights(alone, together)


@pytest.mark.parametrize("flags", [["--lora-rank", "4"], ["--kl-coef", "0.1", "--updates-per-rollout", "2"]])
def test_two_processes_with_different_numbers_of_micro_batches(flags, tmp_path):
    """A micro-batch a group that is trained, of which processes have different numbers; adapters are not sharded."""
    alone = train(tmp_path / "alone", *flags)
    adapters = "--lora-rank" in flags
    together = train_in_two(tmp_path / "together", *flags, "--micro-batch-tokens", "300", launcher=adapters)
    assert together["sharded"] == (not adapters)
    assert_same_gradients(alone, together)
    assert_same_metrics(tmp_path / "alone", tmp_path / "together")


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    """A checkpoint does not show how many wrote it."""
    alone = train(tmp_path / "alone", "--steps", "3")
    train_in_two(tmp_path / "two", "--steps", "2")
    train(tmp_path / "one", "--steps", "2")
    in_one = record("grpo", [*QUICK, "--resume", str(tmp_path / "two"), "--steps", "3"])
    in_two = train_in_two(tmp_path / "one", "--resume", str(tmp_path / "one"), "--steps", "3")
    for folder, other in (("two", in_one), ("one", in_two)):
        assert_same_metrics(tmp_path / "alone", tmp_path / folder)
        assert_same_weights(alone, other)


def test_sampling_and_training_agree_so_that_importance_weights_change_nothing(plain, tmp_path):
    folder, result = plain
    assert all(line["mismatch"] < 1e-4 for line in metrics(folder))
    assert_same_gradients(result, train(tmp_path / "weighed", "--tis-cap", "2"), tolerance=1e-3)


@pytest.mark.parametrize("script, flags", [
    ("grpo", ""), ("noisy_grpo", "--noise-draw uniform"), ("vgpo", ""), ("vppo", ""), ("vppo", "--mask-per row"),
    ("roma", ""),
])  # fmt: skip
def test_no_two_things_are_drawn_from_the_same_random_stream(script, flags, monkeypatch, tmp_path):
    seeds, default_rng = [], np.random.default_rng
    monkeypatch.setattr("numpy.random.default_rng", lambda s=None: seeds.append(s) or default_rng(s))
    record(script, [*QUICK, "--seed", "77", "--out", str(tmp_path / "run"), *flags.split()])
    monkeypatch.undo()
    of_a_step = [s for s in seeds if isinstance(s, list) and s[:2] == [77, 1]]
    firsts = {default_rng(s).random() for s in of_a_step}  # streams, for numpy takes [77, 1, 2] and [77, 1, 2, 0] alike
    assert len(firsts) == len(of_a_step) >= 16


def test_several_updates_a_rollout(tmp_path):
    result = train(tmp_path / "run", "--steps", "1", "--updates-per-rollout", "2", "--epochs-per-rollout", "2")
    assert 2 <= len(result["gradients"]) <= 4
    line = metrics(tmp_path / "run")[0]
    assert len(result["gradients"]) + line["updates_skipped"] == 4
    assert line["clip_ratio/low_mean"] >= 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_clip_ratios_are_shares_of_tokens_whose_gradient_was_taken(script, monkeypatch, tmp_path):
    """Every ratio is far below its bound: what counts is where the advantage is negative and, of vppo.py, kept."""
    module, seen = importlib.import_module(script), []

    def tiny_ratios(logprobs, old_logprobs, advantages, loss_mask, args):
        losses, ratio = policy_loss(logprobs, old_logprobs, advantages, loss_mask, args)
        seen.append((advantages < 0).expand_as(loss_mask)[loss_mask].float().mean().item())
        return losses, ratio / 2

    policy_loss = module.policy_loss
    monkeypatch.setattr(module, "policy_loss", tiny_ratios)
    flags = ["--posterior", "none"] if script == "noisy_grpo" else []
    flags += ["--filter-groups", "none", "--keep-fraction", "1"] if script == "vppo" else []
    train(tmp_path / "run", "--steps", "1", "--kl-coef", "0.01", *flags, script=script)  # also groups of equal rewards
    line = metrics(tmp_path / "run")[0]
    assert len(seen) == 1 and 0 < seen[0] < 1 and line["frac_reward_zero_std"] > 0
    assert line["clip_ratio/low_mean"] == pytest.approx(seen[0]) and line["clip_ratio/high_mean"] == 0


@pytest.mark.parametrize("flags", [[], ["--lora-rank", "4"]])
def test_the_penalty_to_the_reference_starts_at_zero_and_grows(flags, tmp_path):
    train(tmp_path / "run", "--kl-coef", "0.1", "--learning-rate", "1e-3", *flags)
    kl = [line["kl"] for line in metrics(tmp_path / "run")]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[1] > 1e-6


def test_the_end_token_is_trained(monkeypatch, tmp_path):
    """The gradient of the loss reaches the log-probability of the token that ends a completion."""
    seen = []

    def watch(logprobs, old_logprobs, advantages, loss_mask, args):
        logprobs.register_hook(lambda gradient: seen.append((gradient, advantages, loss_mask)))
        return policy_loss(logprobs, old_logprobs, advantages, loss_mask, args)

    policy_loss = grpo.policy_loss
    monkeypatch.setattr(grpo, "policy_loss", watch)
    train(tmp_path / "run", "--steps", "1")
    gradient, advantages, mask = seen[0]
    last = mask.sum(1) - 1
    at_the_end = gradient[torch.arange(len(mask)), last]
    assert ((at_the_end != 0) == (advantages[:, 0] != 0))[last >= 0].all() and (at_the_end != 0).any()


def test_gradients_that_are_not_finite_are_skipped_and_then_stop_the_run(monkeypatch, tmp_path):
    broken = lambda *a, **k: torch.tensor(float("nan"))
    monkeypatch.setattr("accelerate.Accelerator.clip_grad_norm_", broken)
    with pytest.raises(SystemExit, match="not finite in 5 steps in a row"):
        train(tmp_path / "run", "--steps", "30")
    assert all(line["grad_norm"] is None for line in metrics(tmp_path / "run"))


# ---------------------------------------------------------------- killed, stopped, resumed


def begin_script(folder: Path, *flags: str):
    """A run of six steps, or its continuation where it has begun; what it says is in a file beside its folder."""
    command = ["grpo.py", *QUICK, "--steps", "6", "--save-every", "1", *flags]
    command += ["--resume" if (folder / "args.json").is_file() else "--out", folder]
    folder.with_suffix(".log").unlink(missing_ok=True)
    return commands.begin(command, folder.with_suffix(".log"), commands.environment())


def output_of(process, folder: Path) -> str:
    """What a run has said when it has ended as it should."""
    code = commands.finish(process)
    assert code == 0, folder.with_suffix(".log").read_text()
    return folder.with_suffix(".log").read_text()


def wait_for_step(process, folder: Path, step: int) -> None:
    for _ in range(6000):
        if any(line["step"] >= step for line in (metrics(folder) if (folder / "metrics.jsonl").is_file() else [])):
            return
        assert process.is_alive(), folder.with_suffix(".log").read_text()
        time.sleep(0.05)
    raise AssertionError("the run did not get there in five minutes")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    output_of(begin_script(folder), folder)
    return folder


def assert_same_run(folder, reference) -> None:
    one, other = (f / "checkpoints" / "step-000006" / "model.safetensors" for f in (folder, reference))
    assert one.read_bytes() == other.read_bytes()
    drawn = [(line["step"], line["reward"], line["completions/mean_length"]) for line in metrics(folder)]
    assert drawn == [(line["step"], line["reward"], line["completions/mean_length"]) for line in metrics(reference)]
    assert [step for step, *_ in drawn] == list(range(1, 7)), "no step twice, none left out"


def test_a_killed_run_resumes_bit_for_bit(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    process = begin_script(folder)
    wait_for_step(process, folder, random.randrange(2, 5))
    time.sleep(random.random() * 0.3)
    process.kill()
    commands.finish(process)
    assert "continuing" in output_of(begin_script(folder), folder)
    assert_same_run(folder, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_saves_and_exits_cleanly(number, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    process = begin_script(folder, "--save-every", "100")
    wait_for_step(process, folder, 2)
    os.kill(process.pid, number)
    assert "--resume" in output_of(process, folder)
    output_of(begin_script(folder, "--save-every", "100"), folder)
    assert_same_run(folder, uninterrupted)


def test_a_truncated_checkpoint_falls_back_to_the_one_before(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    output_of(begin_script(folder), folder)
    newest = folder / "checkpoints" / "step-000006" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1000])
    output = output_of(begin_script(folder), folder)
    assert "model.safetensors is truncated or damaged; trying the one before" in output
    assert "at step 5" in output
    assert_same_run(folder, uninterrupted)


def test_a_run_folder_is_not_written_over(plain):
    folder, _ = plain
    with pytest.raises(SystemExit, match="continue that run with --resume"):
        train(folder)
    with pytest.raises(SystemExit, match="--group-size was 4 there and is 2 now"):
        record("grpo", [*QUICK, "--resume", str(folder), "--group-size", "2"])
    with pytest.raises(SystemExit, match="no run there"):
        record("grpo", [*QUICK, "--resume", str(folder / "nowhere")])


def test_tracking_with_tensorboard(tmp_path):
    train(tmp_path / "run", "--steps", "1", "--track", "tensorboard")
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))
    with pytest.raises(SystemExit, match="--track nothing"):
        train(tmp_path / "other", "--track", "nothing")


def test_what_a_run_leaves_behind(tmp_path):
    folder = tmp_path / "run"
    flags = ["--eval-every", "1", "--eval-examples", "4", "--test-examples", "6", "--keep-checkpoints", "1"]
    train(folder, *flags, "--save-every", "1")
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-000002"], "the newest one is kept"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["before"]["count"] == summary["after"]["count"] == 6
    assert set(summary["after"]["groups"]) == {"hop", "path", "pair", "bars", "extreme"}
    assert 0 <= metrics(folder)[0]["eval/accuracy"] <= 1
    assert (folder / "learning_curve.png").stat().st_size > 10_000
    rows = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert {"step", "question", "completion", "answer", "reward", "advantage"} <= rows[0].keys()
