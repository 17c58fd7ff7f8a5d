"""The worked example of docs/own_method.md: its diff, applied to grpo.py, trains."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch

import grpo
from tests.commands import ROOT
from tests.test_grpo import MASK, NEW, OLD, A
from tests.test_training import train

PAGE = (ROOT / "docs/own_method.md").read_text()


def apply(diff: str, text: str) -> str:
    """`text` with each hunk of a unified diff applied where its lines stand, wherever that is."""
    for hunk in re.split(r"^@@.*@@.*\n", diff, flags=re.M)[1:]:
        lines = hunk.splitlines()
        old, new = ("\n".join(line[1:] for line in lines if not line.startswith(sign)) + "\n" for sign in "+-")
        assert text.count(old) == 1, f"docs/own_method.md: not in grpo.py, or several times:\n{old}"
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def cispo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("method")
    (diff,) = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)
    (folder / "cispo.py").write_text(apply(diff, Path(grpo.__file__).read_text()))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield importlib.import_module("cispo")


def test_it_is_a_method_in_under_forty_changed_lines():
    changed = len(re.findall(r"^[+-](?![+-])", re.search(r"```diff\n(.*?)```", PAGE, re.DOTALL)[1], re.M))
    assert changed < 40 and f"\n{changed} lines removed and added" in PAGE
    assert f"in {changed} changed lines" in (ROOT / "README.md").read_text()


def test_its_gradient_is_that_of_weighted_log_likelihood(cispo):
    """Also where GRPO's clip takes it."""
    args = cispo.Args(clip_high=0.05)
    logprobs = NEW.clone().requires_grad_()
    loss, ratio = cispo.policy_loss(logprobs, OLD, A, MASK, args)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    weights = (NEW.double() - OLD.double()).exp().clamp(max=1.05)
    assert torch.allclose(gradient.double(), torch.where(MASK, -weights * A.double(), 0.0), atol=1e-6)
    theirs = NEW.clone().requires_grad_()
    grpos, _ = grpo.policy_loss(theirs, OLD, A, MASK, grpo.Args(clip_high=0.05))
    (gone,) = torch.autograd.grad(grpos.sum(), theirs)
    taken = MASK & (ratio > 1.05) & (A > 0)
    assert taken.any() and not gone[taken].any() and gradient[taken].all()


def test_it_trains(cispo, tmp_path):
    train(
        tmp_path / "run", "--updates-per-rollout", "2", "--learning-rate", "1e-3", "--clip-high", "0.01", script="cispo"
    )
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and any(line["clip_ratio/high_mean"] > 0 for line in lines)
    assert json.loads((tmp_path / "run/args.json").read_text())["script"] == "cispo"
