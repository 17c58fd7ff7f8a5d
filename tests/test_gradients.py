"""The check of gradients before training: what is measured, and that a script's gradient is what its optimizer gets."""

import json
import math
import re

import numpy as np
import pytest
import torch

from common.evaluation import gradients
from common.evaluation.gradients import Sums, figures
from common.model.load import load_policy

FLAGS = ["--prompts-per-step", "4", "--group-size", "4", "--max-completion-length", "48"]


def sums_of(steps: np.ndarray, truth: torch.Tensor | None = None) -> Sums:
    sums = Sums()
    for step in steps:
        sums.add(torch.tensor(step, dtype=torch.float32), truth)
    return sums


def test_signal_noise_and_direction_of_made_up_gradients():
    """Gradients with a known mean and known noise, of which a method's mean points 60 degrees off the truth."""
    dice = np.random.default_rng(0)
    aim, off = np.zeros(200), np.zeros(200)
    aim[0], off[0], off[1] = 1.0, 0.5, math.sqrt(0.75)
    truth = sums_of(aim + 0.1 * dice.standard_normal((400, 200)))
    assert truth.signal == pytest.approx(1, abs=0.05), "|E g|^2; the mean's own square would add the noise of the mean"
    measured = figures(sums_of(off + 0.1 * dice.standard_normal((400, 200)), truth.mean), truth)
    assert measured["direction"] == pytest.approx(0.5, abs=0.03)
    assert measured["noise"] == pytest.approx(200 * 0.01 / (1 + 200 * 0.01), abs=0.02)
    assert measured["cosine"] == pytest.approx(0.5 / math.sqrt(3), abs=0.03)


def test_a_direction_that_drowns_in_noise_is_not_a_number():
    steps = np.array([[1.0, 0.0], [-1.0, 0.0]])
    own = sums_of(steps, torch.tensor([1.0, 1.0], dtype=torch.float64))
    assert own.signal == -1 and math.isnan(figures(own, sums_of(np.ones((3, 2))))["direction"])


def test_a_scripts_gradient_is_what_its_optimizer_gets(tmp_path):
    """Adam's first moment after one real step is a tenth of the gradient."""
    import grpo

    command = ["grpo.py", *FLAGS, "--seed", "3"]
    looked = gradients.gradients_of(command, 1, tmp_path / "log")
    args = grpo.Args(steps=1, prompts_per_step=4, group_size=4, max_completion_length=48, seed=3, eval_every=0,
                     test_examples=0, out=str(tmp_path / "run"))  # fmt: skip
    grpo.main(args)
    state = torch.load(tmp_path / "run/checkpoints/step-000001/trainer.pt", weights_only=True)["optimizer"]["state"]
    moments = torch.cat([state[n]["exp_avg"].flatten() for n in sorted(state)])
    torch.testing.assert_close(looked.mean.float(), moments / 0.1, rtol=1e-4, atol=1e-7)


def test_steps_are_looked_at_and_not_taken(tmp_path):
    """Two steps of a run and the same run again; were the first one taken, the policy would have moved."""
    command = ["grpo.py", *FLAGS, "--learning-rate", "1", "--seed", "3"]
    one, two = (gradients.gradients_of(command, steps, tmp_path / "log") for steps in (1, 2))
    assert one.count == 1 and two.count == 2
    small = gradients.gradients_of([*command[:-4], "--learning-rate", "1e-9", "--seed", "3"], 2, tmp_path / "log")
    torch.testing.assert_close(small.total, two.total, rtol=1e-3, atol=1e-6)


def test_the_command_compares_methods_with_the_truth(tmp_path, capsys):
    args = gradients.Args(
        methods=("grpo: grpo.py", *(f"{name}: tests/benchmarks/oracles.py {name}" for name in ("readings", "others"))),
        flags="--prompts-per-step 4 --group-size 4",
        steps=2,
        truth_steps=2,
        truth_group_size=4,
        limit=4,
        samples=1,
        out=str(tmp_path / "gradients"),
    )
    summary = gradients.main(args)
    assert set(summary) == {"truth", "grpo", "readings", "others"} and -1 <= summary["grpo"]["cosine"] <= 1
    parts = [summary[name]["cosine"] for name in ("grpo", "readings", "others")]
    assert len(set(parts)) == 3 and np.isfinite(parts).all(), "an oracle is let go of before the next one"
    held = json.loads((tmp_path / "gradients" / "gradients.json").read_text())
    assert set(held["summary"]["grpo"]) == {"cosine", "noise", "direction", "cosine_ci", "gain", "gain_ci"}
    assert (tmp_path / "gradients" / "gradients.png").is_file()
    assert re.search(r"readings +-?\d\.\d{3} \(", capsys.readouterr().out)


def test_a_run_is_looked_at_with_its_newest_weights_and_its_flags(tmp_path, monkeypatch):
    """What the gain is measured on is what the scripts were given, of the model, the data and the prompt."""
    import grpo

    run = tmp_path / "run"
    flags = {"eval_every": 0, "test_examples": 0, "prompts_per_step": 1, "group_size": 2, "max_completion_length": 4}
    grpo.main(grpo.Args(steps=1, seed=3, preflight=False, out=str(run), **flags))
    seen = []

    def looked(policy, examples, **options):
        seen.append((policy.model.name_or_path, examples[0].kind, options["template"], options["max_new_tokens"]))
        return {"rows": [{"correct": [1.0]} for _ in range(len(examples))]}

    monkeypatch.setattr(gradients, "evaluate", looked)
    (tmp_path / "rows.jsonl").write_text('{"question": "How many?", "answer": "3"}\n' * 4)
    args = gradients.Args(
        methods=("grpo: grpo.py",), model=str(run), data=str(tmp_path / "rows.jsonl"), steps=2, truth_steps=2,
        truth_group_size=2, flags="--kind int --prompt-template {question}! --prompts-per-step 1 --group-size 2",
        max_completion_length=4, limit=2, out=str(tmp_path / "gradients"),
    )  # fmt: skip
    monkeypatch.setattr(gradients, "gradients_of", fake_gradients)
    gradients.main(args)
    assert set(seen) == {(str(run / "checkpoints" / "step-000001"), "int", "{question}!", 4)} and len(seen) == 3


def fake_gradients(command, steps, log, truth=None):
    size = sum(p.numel() for p in load_policy("tiny").model.parameters())
    return sums_of(np.random.default_rng(0).standard_normal((2, size)), truth)


@pytest.mark.parametrize(
    ("method", "line"),
    [("grpo", "must be `NAME: SCRIPT FLAGS`"), ("a: none.py", "must be"), ("truth: grpo.py", "is taken")],
)
def test_mistyped_methods_are_named(method, line, tmp_path):
    with pytest.raises(SystemExit, match=line):
        gradients.main(gradients.Args(methods=(method,), out=str(tmp_path / "x")))


def test_a_script_that_stops_is_named_with_its_log(tmp_path):
    with pytest.raises(SystemExit, match=r"grpo.py --group-size 0.*\(see .*log\)"):
        gradients.gradients_of(["grpo.py", "--group-size", "0"], 1, tmp_path / "log")
