"""Doctor, preflight, page and cost card in real runs of the five scripts."""

import importlib
import json
from pathlib import Path

import pytest
import tyro

import grpo
from common.run.doctor import Doctor
from tests.test_page import Reader
from tests.train_worker import record

QUICK = "--prompts-per-step 4 --group-size 4 --eval-every 0 --test-examples 0 --seed 3".split()
SCRIPTS = ("grpo", "noisy_grpo", "vgpo", "vppo", "roma")


def train(folder, *flags: str, script: str = "grpo") -> Path:
    """A short run; returns its folder."""
    module = importlib.import_module(script)
    arguments = [*QUICK, "--no-preflight", "--out", str(folder / "run"), *flags]
    module.main(tyro.cli(module.Args, args=arguments))
    return folder / "run"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def remarks(folder: Path) -> dict[str, dict]:
    kept = lines(folder / "remarks.jsonl")
    assert json.loads((folder / "summary.json").read_text())["remarks"] == kept
    return {remark["rule"]: remark for remark in kept}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_healthy_run_gets_no_remark(script):
    """The metrics of the first 150 steps of each script at its defaults, as they were recorded, with its arguments."""
    recorded = json.loads((Path(__file__).parent / "healthy_runs.json").read_text())[script]
    doctor = Doctor(recorded["args"])
    names, steps = list(recorded["metrics"]), len(recorded["metrics"]["reward"])
    assert steps == 150
    for step in range(steps):
        assert doctor.examine(step, {name: recorded["metrics"][name][step] for name in names}) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_real_run_of_each_script_is_kept_as_a_page(script, tmp_path):
    folder = train(tmp_path, "--steps", "7", script=script)
    assert remarks(folder) == {}
    text = (folder / "index.html").read_text()
    reader = Reader(text)
    assert [tag for tag, _ in reader.elements].count("details") == 7  # a short run has every step
    assert "7 of 7 steps" in text and "finished" in text and "tokens scored" in text
    coloured = {"vppo": "dependency", "vgpo": "focus"}.get(script)
    assert [name for name in ("dependency", "focus") if f"<div class='text {name}'" in text] == [coloured][
        : bool(coloured)
    ]
    shown = lines(folder / "completions.jsonl")
    assert all((folder / "pictures" / name).is_file() for row in shown for name in row["pictures"])
    if coloured:
        tokens = [row for row in shown if "tokens" in row]
        assert tokens and all(len(row["tokens"]) == len(row[coloured]) for row in tokens)
        assert all("".join(row["tokens"]).startswith(row["completion"][:5]) for row in tokens)


@pytest.mark.parametrize(
    "flags, rule",
    [
        (["--max-completion-length", "5"], "no_reward"),
        (["--max-completion-length", "5"], "length_limit"),
        (["--learning-rate", "3e-3"], "learning_rate_too_high"),
        (["--learning-rate", "0"], "no_change"),
    ],
)
def test_a_broken_run_is_named_within_twenty_steps(flags, rule, tmp_path):
    groups = ["--prompts-per-step", "6", "--group-size", "6"]
    found = remarks(train(tmp_path, "--steps", "20", *groups, *flags))
    assert rule in found, found


def test_a_reward_that_is_a_constant_is_named(tmp_path, monkeypatch, capsys):
    reward = grpo.reward_completions
    monkeypatch.setattr(
        grpo, "reward_completions", lambda *a: (r := reward(*a))._replace(rewards=[0.5] * len(r.rewards))
    )
    folder = train(tmp_path, "--steps", "6")
    assert remarks(folder)["constant_reward"]["step"] == lines(folder / "metrics.jsonl")[4]["step"]
    assert capsys.readouterr().out.count("! constant reward: Each of the last 80 completions earned 0.5") == 1
    assert "constant reward" in (folder / "index.html").read_text()


@pytest.mark.parametrize("script", SCRIPTS)
def test_preflight_leaves_a_run_its_bits(script, tmp_path):
    flags = [*QUICK, "--steps", "1"]
    without = record(script, [*flags, "--no-preflight", "--out", str(tmp_path / "without")])
    checked = record(script, [*flags, "--out", str(tmp_path / "with")])
    for before, after in zip(without["gradients"], checked["gradients"], strict=True):
        assert all((before[name] == after[name]).all() for name in before)
    assert all((without["weights"][name] == checked["weights"][name]).all() for name in without["weights"])


def test_what_preflight_finds_is_said_kept_and_on_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("common.run.preflight.BLIND", 100.0)
    grpo.main(tyro.cli(grpo.Args, args=[*QUICK, "--steps", "1", "--out", str(tmp_path / "run")]))
    remark = remarks(tmp_path / "run")["image_ignored"]
    assert f"! image ignored: {remark['text']}" in capsys.readouterr().out
    assert "image ignored" in (tmp_path / "run" / "index.html").read_text()


def test_counts_of_work_are_those_of_the_step(tmp_path):
    folder = train(tmp_path, "--steps", "2", "--kl-coef", "0.1")
    for line in lines(folder / "metrics.jsonl"):
        sampled = line["completions/mean_length"] * 16
        assert line["cost/sampled_tokens"] == pytest.approx(sampled)
        # The reference and the update each see all four groups, with their four pictures, as sampling did.
        assert line["cost/images"] == 12 and line["cost/forwards"] == 3 and line["cost/rows"] == 32
        assert line["cost/scored_tokens"] <= 2 * sampled and line["cost/repeated_rows"] % 2 == 0
        if not line["cost/repeated_rows"]:
            assert line["cost/scored_tokens"] == pytest.approx(2 * sampled)
        assert line["cost/decode_steps"] <= 72 and line["memory_gib"] > 0.1


def test_a_run_that_is_continued_keeps_its_remarks_and_its_page(tmp_path):
    flags = ["--max-completion-length", "5", "--prompts-per-step", "6", "--group-size", "6"]
    folder = train(tmp_path, "--steps", "10", *flags)
    before = lines(folder / "remarks.jsonl")
    assert before
    module = importlib.import_module("grpo")
    again = [*QUICK, "--no-preflight", "--resume", str(folder), "--steps", "20", *flags]
    module.main(tyro.cli(module.Args, args=again))
    assert lines(folder / "remarks.jsonl") == before  # nothing is said twice
    assert "20 of 20 steps" in (folder / "index.html").read_text()
