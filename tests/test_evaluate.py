"""Evaluation: figures, intervals, tables, and the built-in model answering built-in puzzles."""

import json

import pytest
from scipy.stats import binomtest

from common.data import load_examples
from common.evaluate import Args, evaluate, interval, main, newest_checkpoint, summarize, table, usual_length
from common.model import load_policy


def row(group: str, *correct: float) -> dict:
    n = len(correct)
    return {"group": group, "correct": list(correct), "lengths": [10] * n, "truncated": [False] * n}


def test_interval_of_single_verdicts_is_wilsons():
    for right, n in ((0, 5), (8, 10), (250, 500)):
        theirs = binomtest(right, n).proportion_ci(method="wilson")
        ours = interval([1.0] * right + [0.0] * (n - right), binary=True)
        assert ours == pytest.approx((theirs.low, theirs.high), abs=1e-6)


def test_several_samples_of_an_example_count_as_one_observation():
    rows = [row("a", 1, 1, 1, 1), row("a", 0, 0, 0, 0)] * 50
    result = summarize(rows)
    assert result["accuracy"] == 0.5 and result["count"] == 100
    assert result["ci_high"] - result["ci_low"] == pytest.approx(2 * 1.96 * 0.5 / 99**0.5, rel=1e-3)


def test_groups_and_table():
    result = summarize([row("sum", 1), row("sum", 0), row("bars", 1)])
    assert result["groups"]["sum"]["accuracy"] == 0.5 and result["groups"]["bars"]["count"] == 1
    text = table({"before": result, "after": summarize([row("sum", 1)])})
    header, before, after = text.splitlines()
    assert header.split() == ["model", "accuracy", "95", "%", "interval", "bars", "sum", "tokens", "cut", "off"]
    assert before.split() == ["before", "66.7", "20.8", "-", "93.9", "100.0", "50.0", "10.0", "0.0"]
    assert after.startswith("after   100.0")


def test_newest_complete_checkpoint_of_a_run(tmp_path):
    assert newest_checkpoint("tiny") == "tiny" and usual_length("tiny") == 72
    (tmp_path / "args.json").write_text('{"max_completion_length": 33}')
    with pytest.raises(SystemExit, match="no complete checkpoint"):
        newest_checkpoint(str(tmp_path))
    for step in (1, 2, 3):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    for step in (1, 2):
        (tmp_path / "checkpoints" / f"step-{step:06d}" / "complete").write_text("{}")
    newest = newest_checkpoint(str(tmp_path))
    assert newest.endswith("step-000002") and usual_length(newest) == 33


def test_the_built_in_model_answers_puzzles(tmp_path):
    results = main(Args(limit=40, out=str(tmp_path / "out.json")))
    result = results["tiny"]
    assert result["count"] == 40 and 0.2 < result["accuracy"] < 0.95
    assert json.loads((tmp_path / "out.json").read_text())["tiny"]["rows"][3]["completions"]


def test_batches_and_order_change_nothing():
    policy, examples = load_policy("tiny"), load_examples("puzzles", "test", limit=12)
    whole = evaluate(policy, examples, max_new_tokens=72, samples=2, temperature=1.0)
    cut = evaluate(policy, examples, max_new_tokens=72, samples=2, temperature=1.0, batch_prompts=5)
    assert [r["completions"] for r in whole["rows"]] == [r["completions"] for r in cut["rows"]]
    assert whole["mean_length"] == cut["mean_length"]
