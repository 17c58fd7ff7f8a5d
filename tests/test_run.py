"""The run folder: checkpoints that survive, metrics that do not lie."""

import json
import math
import os
import resource
import signal
import time
from dataclasses import dataclass

import pytest
import torch
from accelerate import Accelerator

import grpo
from common.data.examples import Example
from common.run.checkpoints import find_damage, load_weights
from common.run.files import drop_lines_after
from common.run.folder import Run
from common.run.plot import plot_learning_curve
from common.run.settings import check_ranges, memory_advice
from tests import commands
from tests.small_models import FAMILIES, small_folder, small_policy


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
    prompts_per_step: int = 1
    group_size: int = 2
    eval_every: int = 0
    eval_examples: int = 200
    push_to_hub: str = ""
    anneal: bool = False


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
import common.run.checkpoints as checkpoints
from tests.test_run import new_run, policy_and_optimizer
policy, optimizer = policy_and_optimizer()
r = new_run(sys.argv[1])
r.save(1, policy, optimizer)
checkpoints.checksum = lambda path: os.kill(os.getpid(), signal.SIGKILL)
r.save(2, policy, optimizer)
"""
    killed = commands.run(["-c", code, tmp_path / "run"], tmp_path / "output")
    assert killed == -signal.SIGKILL
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-000001", "writing-step-000002"}
    policy, optimizer = policy_and_optimizer()
    assert new_run(tmp_path / "run", resume=str(tmp_path / "run")).restore(policy, optimizer) == 1
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-000001"}, "the rest is cleared"


@pytest.mark.parametrize("limit, part", [(200_000, "weights"), (1_000_000, "optimizer")])
def test_a_disk_that_is_full_costs_no_checkpoint(limit, part, tmp_path):
    policy, optimizer = policy_and_optimizer()
    one_update(policy, optimizer, 0)
    run = new_run(tmp_path / "run", keep_checkpoints=1)
    run.save(1, policy, optimizer)
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "run" / "checkpoints" / "step-000001").iterdir()}
    assert (sizes["model.safetensors"] > limit) == (part == "weights") and sizes["trainer.pt"] > limit

    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # a file that grows beyond fails as on a full disk
    try:
        with pytest.raises(SystemExit, match=r"step-000002: cannot be written \([^\n]*\); what was there stays"):
            run.save(2, policy, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]
    assert find_damage(tmp_path / "run" / "checkpoints" / "step-000001") is None


def test_a_folder_that_cannot_be_written_is_named_in_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit, match=r"--out .*file/run: cannot be written \([^\n]*Not a directory"):
        new_run(tmp_path / "file" / "run")


def test_the_newest_checkpoints_are_kept(tmp_path):
    policy, optimizer = policy_and_optimizer()
    run = new_run(tmp_path / "run", keep_checkpoints=2)
    for step in (1, 2, 3, 10):
        run.save(step, policy, optimizer)
    assert [p.name for p in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["step-000003", "step-000010"]
    with pytest.raises(SystemExit, match="--keep-checkpoints 0"):
        check_ranges(grpo.Args(keep_checkpoints=0))


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(tmp_path):
    policy, optimizer = policy_and_optimizer()
    run = new_run(tmp_path / "run")
    for step in (2, 6):
        run.save(step, policy, optimizer)
    (tmp_path / "run" / "checkpoints" / "step-000006" / "model.safetensors").write_bytes(b"")
    resumed = new_run(tmp_path / "run", resume=str(tmp_path / "run"), keep_checkpoints=1)
    assert resumed.restore(policy, optimizer) == 2
    resumed.save(4, policy, optimizer)
    left = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["damaged-step-000006", "step-000004"]


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_over(tmp_path):
    policy, optimizer = policy_and_optimizer()
    run = new_run(tmp_path / "run")
    run.log(0, LINE)
    run.save(1, policy, optimizer)
    (tmp_path / "run" / "checkpoints" / "step-000001" / "complete").unlink()
    with pytest.raises(SystemExit, match="none of its checkpoints is whole"):
        new_run(tmp_path / "run", resume=str(tmp_path / "run")).restore(policy, optimizer)
    assert (tmp_path / "run" / "metrics.jsonl").read_text(), "its metrics stand"


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
    assert [line["step"] for line in lines] == [1, 2], "counted from 1, as checkpoints are"
    assert lines[0]["grad_norm"] is None and lines[1]["entropy"] is None
    plot_learning_curve(tmp_path / "run")
    assert (tmp_path / "run" / "learning_curve.png").stat().st_size > 10_000


def test_lines_of_steps_that_will_be_done_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n[1]\n{"other": 1}\n{"step": "2"}\nnothing\n{"step": 2}\n{"step": 3}\n{"ste')
    drop_lines_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    drop_lines_after(path, 0)
    assert not path.read_text(), "also what preflight remarked at step 0, which looks again"


def test_no_step_stands_twice_after_a_resumption(tmp_path):
    policy, optimizer = policy_and_optimizer()
    shown = [Example((), "\u2028 三?", "3")], None, ["3", "3"], {}, torch.ones(2), torch.ones(2), None
    run = new_run(tmp_path / "run")
    for step in range(5):  # killed in the fifth step, after a checkpoint at the third
        run.log(step, LINE)
        run.show(step, *shown)
        if step == 2:
            run.save(step + 1, policy, optimizer)
    run = new_run(tmp_path / "run", resume=str(tmp_path / "run"))
    for step in range(run.restore(policy, optimizer), 6):
        run.log(step, LINE)
        run.show(step, *shown)
    for name, rows in (("metrics.jsonl", 1), ("completions.jsonl", 2)):
        lines = (tmp_path / "run" / name).read_text().strip("\n").split("\n")
        assert [json.loads(line)["step"] for line in lines] == [s + 1 for s in range(6) for _ in range(rows)]


def test_a_completion_is_printed_readably(tmp_path, capsys):
    asked, rewards, advantages = [Example((), "How many?", "2")], torch.tensor([1.0]), torch.tensor([0.5])
    new_run(tmp_path / "run").show(0, asked, None, ["<think>two</think>"], {}, rewards, advantages, None)
    said = capsys.readouterr().out
    assert "step 1, reward 1.00, advantage +0.50, answer 2\nHow many?\n<think>two</think>" in said


def test_signals_ask_for_a_stop_and_the_second_interrupts(tmp_path, capfd):
    handler = signal.getsignal(signal.SIGINT)
    run = new_run(tmp_path / "run")
    assert not run.should_stop()
    os.kill(os.getpid(), signal.SIGTERM)
    assert run.should_stop()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    run.stopped(3)
    said = capfd.readouterr()
    assert said.err.count("stopping: this step is finished and saved first") == 1
    assert f"stopped after step 3 and saved; go on with test.py --resume {tmp_path / 'run'}" in said.out
    assert signal.getsignal(signal.SIGINT) is handler, "signals are the caller's again"


def test_tensorboard_gets_every_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    policy, optimizer = policy_and_optimizer()
    run = new_run(tmp_path / "run", track="tensorboard")
    run.restore(policy, optimizer)
    for step in range(3):
        run.log(step, {**LINE, "reward": 0.25 * step})
    run.save(2, policy, optimizer)
    run.close()
    run = new_run(tmp_path / "run", track="tensorboard", resume=str(tmp_path / "run"))
    run.restore(policy, optimizer)
    run.log(2, {**LINE, "reward": 0.75})
    run.finish({})
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(1, 0.0), (2, 0.25), (3, 0.75)]


@pytest.mark.parametrize("track, line", [("wandb", "the package wandb is not installed"), ("paper", "not one of")])
def test_a_tracker_that_is_not_there_is_named(track, line, tmp_path, monkeypatch):
    monkeypatch.setattr("common.run.folder.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=f"--track {track}: {line}"):
        new_run(tmp_path / "run", track=track)
    assert not (tmp_path / "run").exists()


def test_gradients_that_are_not_finite_are_counted(tmp_path):
    run = new_run(tmp_path / "run")
    nan, fine = torch.tensor(float("inf")), torch.tensor(1.0)
    assert [run.check_gradients(g) for g in (nan, nan, nan, nan, fine, nan)] == [False] * 4 + [True, False]
    assert run.bad_steps == 5
    policy, optimizer = policy_and_optimizer()
    run.save(1, policy, optimizer)
    resumed = new_run(run.folder, resume=str(run.folder))
    resumed.restore(policy, optimizer)
    assert resumed.bad_steps == 5, "the summary counts those of the whole run"
    with pytest.raises(SystemExit, match="not finite in 5 steps in a row"):
        for _ in range(5):
            run.check_gradients(nan)


def test_an_evaluation_is_done_once(tmp_path):
    result = {"accuracy": 0.5, "ci_low": 0.4, "ci_high": 0.6}
    assert new_run(tmp_path / "run").once("before", lambda: result) == result
    resumed = new_run(tmp_path / "run", resume=str(tmp_path / "run"))
    assert resumed.once("before", lambda: pytest.fail("it was done again")) == result
    (tmp_path / "run" / "evaluations" / "before.json").write_text('{"accuracy": 0.')
    assert resumed.once("before", lambda: result) == result, "damaged, and the policy is still the initial one"
    (tmp_path / "run" / "evaluations" / "before.json").write_text("")
    resumed.first_step = 3
    assert not resumed.once("before", lambda: pytest.fail("of a policy that has been trained"))


def test_the_results_are_kept_and_drawn(tmp_path):
    run = new_run(tmp_path / "run")
    for step in range(10):
        run.log(step, {**LINE, "reward": 2 * step - 5.0, **({"eval/accuracy": 0.5} if step % 5 == 4 else {})})
    result = {"accuracy": 0.5, "ci_low": 0.4, "ci_high": 0.6, "count": 100, "groups": {}, "mean_length": 9.0}
    result |= {"truncated": 0.0, "samples": 1, "rows": [{"id": "a"}]}
    run.finish({"before": result})
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["before"]["accuracy"] == 0.5 and "rows" not in summary["before"] and "after" not in summary
    assert json.loads((tmp_path / "run" / "evaluations" / "before.json").read_text()) == result
    assert (tmp_path / "run" / "learning_curve.png").stat().st_size > 10_000
    assert new_run(tmp_path / "no steps").finish({}) == {}


TWO_PROCESSES = """
import os, signal, sys, torch
from accelerate import Accelerator
import common.run.folder
from common.model.load import load_policy
from tests.test_run import Args, one_update, weights
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
policy = load_policy(sys.argv[2])
optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-3)
run = common.run.folder.Run(Args(sys.argv[1]), accelerator, "test")
assert run.restore(policy, optimizer) == 0 and not run.should_stop()
one_update(policy, optimizer, 0)
run.save(1, policy, optimizer)
saved = weights(policy)
one_update(policy, optimizer, 1)
assert run.restore(policy, optimizer) == 1
assert all(torch.equal(w, saved[n]) for n, w in weights(policy).items())
if not accelerator.is_main_process:  # one process is told twice at once, as by a terminal and by a launcher
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
assert run.should_stop()
def full(*args):
    raise OSError(28, "No space left on device")
common.run.checkpoints.save_policy = full
run.save(2, policy, optimizer)
"""


def test_two_processes_restore_stop_and_fail_together(tmp_path):
    command = ["-c", TWO_PROCESSES, tmp_path / "run", small_folder("qwen3_vl")]
    outputs = [tmp_path / "first", tmp_path / "second"]
    both = [
        commands.begin(command, output, commands.environment() | variables)
        for output, variables in zip(outputs, commands.group(2), strict=True)
    ]
    assert [commands.finish(process) for process in both] == [1, 1]
    first, second = (output.read_text() for output in outputs)
    assert "Traceback" not in first + second, first + second
    assert "step-000002: cannot be written" in first and "cannot be written" not in second


def test_a_run_that_never_began_is_in_nobodys_way(tmp_path):
    new_run(tmp_path / "run")  # and then, say, --model was mistyped
    new_run(tmp_path / "run", learning_rate=0.1)


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    code = "import sys, time; from tests.test_run import new_run; new_run(sys.argv[1]); print('open', flush=True); "
    output = tmp_path / "output"
    first = commands.begin(["-c", code + "time.sleep(300)", tmp_path / "run"], output, commands.environment())
    while not (output.is_file() and "open" in output.read_text()):
        assert first.is_alive()
        time.sleep(0.05)
    with pytest.raises(SystemExit, match="another process is training in this folder"):
        new_run(tmp_path / "run")
    first.kill()
    commands.finish(first)
    new_run(tmp_path / "run")


def test_another_runs_folder_is_refused(tmp_path):
    new_run(tmp_path / "run").log(0, LINE)
    with pytest.raises(SystemExit, match="--resume"):
        new_run(tmp_path / "run")
    with pytest.raises(SystemExit, match=r"--learning-rate was 0\.001 there and is 0\.1 now"):
        new_run(tmp_path / "run", resume=str(tmp_path / "run"), learning_rate=0.1)
    with pytest.raises(SystemExit, match="no run there"):
        new_run("", resume=str(tmp_path / "nothing"))
    with pytest.raises(SystemExit, match="leave out --out"):
        new_run(tmp_path / "other", resume=str(tmp_path / "run"))
    new_run(tmp_path / "run", resume=str(tmp_path / "run"), steps=20)
    new_run(tmp_path / "annealed", anneal=True)
    with pytest.raises(SystemExit, match="--steps was 10 there and is 20 now"):  # levels would jump
        new_run(tmp_path / "annealed", resume=str(tmp_path / "annealed"), steps=20, anneal=True)
    (tmp_path / "annealed" / "metrics.jsonl").write_text('{"step": 0, "reward": 0.5}\n')
    with pytest.raises(SystemExit, match="its metrics count steps from 0"):  # lines would be kept of steps done again
        new_run(tmp_path / "annealed", resume=str(tmp_path / "annealed"), anneal=True)
    (tmp_path / "run" / "checkpoints" / "step-000007").mkdir()
    with pytest.raises(SystemExit, match=r"--steps 6: .*run has done 7 already"):
        new_run(tmp_path / "run", resume=str(tmp_path / "run"), steps=6)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nTried"),
        RuntimeError("can't allocate memory"),
        RuntimeError("could not create a primitive"),
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_out_of_memory_names_what_to_lower(error):
    @memory_advice()
    def main():
        raise error

    with pytest.raises(SystemExit, match=r"out of memory: lower --micro-batch-tokens \(scoring and update\)") as caught:
        main()
    assert "\n" not in str(caught.value)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes differ"), memory_advice():
        raise RuntimeError("shapes differ")
