"""The run folder: checkpoints that survive, metrics that do not lie."""

import json
import math
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from common.run import Run, drop_lines_from, find_damage, load_weights, plot_learning_curve
from tests.small_models import FAMILIES, small_policy


@dataclass
class Args:
    out: str
    model: str = "small"
    resume: str = ""
    track: str = ""
    seed: int = 0
    steps: int = 10
    keep_checkpoints: int = 2
    save_every: int = 1
    learning_rate: float = 1e-3


def new_run(folder, **kwargs) -> Run:
    return Run(Args(str(folder), **kwargs), Accelerator(cpu=True), "test")


def policy_and_optimizer(family="qwen3_vl", **kwargs):
    policy = small_policy(family, **kwargs)
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    return policy, torch.optim.AdamW(parameters, lr=1e-3)


def one_update(policy, optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in policy.model.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def weights(policy):
    return {name: p.detach().clone() for name, p in policy.model.named_parameters()}


LINE = {"reward": 0.5, "completions/mean_length": 10.0, "entropy": 1.0, "tokens_per_second": 100.0}


@pytest.mark.parametrize("family, kwargs", [*((f, {}) for f in FAMILIES), ("qwen3_vl", {"lora_rank": 4})])
def test_a_checkpoint_restores_weights_and_optimizer_bit_for_bit(family, kwargs, tmp_path):
    policy, optimizer = policy_and_optimizer(family, **kwargs)
    run = new_run(tmp_path / "run")
    one_update(policy, optimizer, 0)
    run.save(1, policy, optimizer)
    one_update(policy, optimizer, 1)
    expected = weights(policy)

    again, fresh = policy_and_optimizer(family, **kwargs)
    resumed = new_run(tmp_path / "run", resume=str(tmp_path / "run"))
    assert resumed.restore(again, fresh) == 1
    one_update(again, fresh, 1)
    for name, weight in weights(again).items():
        assert torch.equal(weight, expected[name]), name


def test_damage_is_found_and_the_older_checkpoint_taken(tmp_path, capsys):
    policy, optimizer = policy_and_optimizer()
    run = new_run(tmp_path / "run", keep_checkpoints=3)
    for step in (1, 2, 3):
        run.save(step, policy, optimizer)
    older, middle, newest = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert find_damage(newest) is None
    (newest / "trainer.pt").write_bytes((newest / "trainer.pt").read_bytes()[:100])
    (middle / "model.safetensors").unlink()
    assert new_run(tmp_path / "run", resume=str(tmp_path / "run"), keep_checkpoints=3).restore(policy, optimizer) == 1
    said = capsys.readouterr().out
    assert "trainer.pt is truncated or damaged" in said and "model.safetensors is missing" in said
    (older / "complete").unlink()
    assert find_damage(older) == "it was not written to the end"


def test_a_kill_while_saving_leaves_the_older_checkpoint(tmp_path):
    code = """
import os, signal, sys
import common.run as run
from tests.test_run import new_run, policy_and_optimizer
policy, optimizer = policy_and_optimizer()
r = new_run(sys.argv[1])
r.save(1, policy, optimizer)
run.checksum = lambda path: os.kill(os.getpid(), signal.SIGKILL)
r.save(2, policy, optimizer)
"""
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], cwd=Path(__file__).parents[1])
    assert killed.returncode == -signal.SIGKILL
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-000001", "writing-step-000002"}
    policy, optimizer = policy_and_optimizer()
    assert new_run(tmp_path / "run", resume=str(tmp_path / "run")).restore(policy, optimizer) == 1
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-000001"}, "the rest is cleared"


def test_a_disk_that_is_full_costs_no_checkpoint(tmp_path, monkeypatch):
    policy, optimizer = policy_and_optimizer()
    run = new_run(tmp_path / "run")
    run.save(1, policy, optimizer)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("common.run.save_policy", full)
    with pytest.raises(SystemExit, match=r"step-000002: cannot be written .*No space left"):
        run.save(2, policy, optimizer)
    assert find_damage(tmp_path / "run" / "checkpoints" / "step-000001") is None


def test_weights_of_another_model_are_refused(tmp_path):
    policy, optimizer = policy_and_optimizer("qwen2_vl")
    new_run(tmp_path / "run").save(1, policy, optimizer)
    with pytest.raises(SystemExit, match="weights"):
        load_weights(small_policy("qwen3_vl"), tmp_path / "run" / "checkpoints" / "step-000001")


def test_metrics_are_lines_of_json_without_nan(tmp_path):
    run = new_run(tmp_path / "run")
    run.log(0, {**LINE, "grad_norm": math.nan})
    run.log(1, {**LINE, "entropy": math.nan, "eval/accuracy": 0.25})
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert lines[0]["grad_norm"] is None and lines[1]["entropy"] is None
    plot_learning_curve(tmp_path / "run")
    assert (tmp_path / "run" / "learning_curve.png").stat().st_size > 10_000


def test_lines_of_steps_that_will_be_done_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"ste')
    drop_lines_from(path, 2)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'


def test_signals_ask_for_a_stop_and_the_second_interrupts(tmp_path):
    run = new_run(tmp_path / "run")
    assert not run.should_stop()
    signal.raise_signal(signal.SIGTERM)
    assert run.should_stop()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_gradients_that_are_not_finite_are_counted(tmp_path):
    run = new_run(tmp_path / "run")
    nan, fine = torch.tensor(float("inf")), torch.tensor(1.0)
    assert [run.check_gradients(g) for g in (nan, nan, nan, nan, fine, nan)] == [False] * 4 + [True, False]
    assert run.bad_steps == 5
    with pytest.raises(SystemExit, match="not finite in 5 steps in a row"):
        for _ in range(5):
            run.check_gradients(nan)


def test_an_evaluation_is_done_once(tmp_path):
    result = {"accuracy": 0.5, "ci_low": 0.4, "ci_high": 0.6}
    assert new_run(tmp_path / "run").once("before", lambda: result) == result
    resumed = new_run(tmp_path / "run", resume=str(tmp_path / "run"))
    assert resumed.once("before", lambda: pytest.fail("it was done again")) == result


def test_another_runs_folder_is_refused(tmp_path):
    new_run(tmp_path / "run")
    with pytest.raises(SystemExit, match="--resume"):
        new_run(tmp_path / "run")
    with pytest.raises(SystemExit, match=r"--learning-rate was 0\.001 there and is 0\.1 now"):
        new_run(tmp_path / "run", resume=str(tmp_path / "run"), learning_rate=0.1)
    new_run(tmp_path / "run", resume=str(tmp_path / "run"), steps=20)
