"""A study: two methods, trained, evaluated on the same pictures and compared in pairs, by one command."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.evaluation.study import Args, main
from tests import commands


def run_command(command: list[str], env: dict, stdout, **_) -> SimpleNamespace:
    """`subprocess.run` in a process that has torch imported already."""
    return SimpleNamespace(returncode=commands.run(command[1:], stdout.name, env))


def test_a_small_study(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("subprocess.run", run_command)
    short = "--steps 1 --test-examples 4 --no-preflight"
    args = Args(
        methods=(f"grpo: grpo.py {short}", f"dapo: grpo.py {short} --filter-groups reward"),
        out=str(tmp_path), seeds=(3,), corruptions=("fog",), severities=(5,), limit=4, look=3,
        samples=2, curve=1, probes=3,
    )  # fmt: skip
    main(args)
    text = capsys.readouterr().out
    assert "test: 4 examples, seeds 3, mean over seeds" in text and "shifted: 4 examples" in text
    assert "against grpo" in text and (tmp_path / "robustness.png").is_file()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["splits"]["test"]["dapo"]["unseen"]["difference_ci"]
    assert "3 examples of test, late: the last half of a completion" in text
    assert results["splits"]["look"]["dapo"]["late focus"]["difference_ci"]
    assert set(results["splits"]["shifted"]["grpo"]) == {"clean", "cells"}
    figures = results["figures"]
    assert set(figures) == {"before", "grpo", "dapo"} and results["versions"]["torch"] and results["date"]
    assert figures["grpo"]["test, sampled"]["seeds"] == [pytest.approx(figures["grpo"]["test, sampled"]["mean"])]
    assert (
        figures["dapo"]["test, greedy"]["difference"] == 0 and figures["dapo"]["test, greedy"]["difference_ci"] is None
    )
    assert {"test, unseen corruptions", "accuracy, right hint", "purple read right"} < set(figures["dapo"])
    assert "area under the validation curve" not in figures["before"], "which has no steps"
    assert [step for step, _ in results["curves"]["grpo"][0]] == [1] and (tmp_path / "curves.png").is_file()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    main(args)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}, (
        "nothing trained again"
    )
    assert capsys.readouterr().out == text
    with pytest.raises(SystemExit, match=rf"dapo-seed3.command says it was `grpo.py {short} --filter-groups reward`"):
        main(replace(args, methods=("dapo: grpo.py --steps 2",)))
    main(replace(args, limit=5, look=0, splits=("test",)))  # the same runs on more examples
    assert "test: 5 examples, seeds 3" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}


def test_a_study_goes_on_with_fewer_corruptions_and_a_new_seed(tmp_path, monkeypatch):
    """The first seed's file holds cells that nobody asks for any more, and that the new seed does not have."""
    monkeypatch.setattr("subprocess.run", lambda *args, **kwargs: SimpleNamespace(returncode=0))
    monkeypatch.setattr("common.evaluation.study.evaluate_before", lambda *_: {})
    for seed, held in ((1, ("clean/0", "fog/3", "fog/5", "contrast/5")), (2, ("clean/0", "fog/5"))):
        run = tmp_path / f"grpo-seed{seed}"
        (run / "evaluations").mkdir(parents=True)
        (run / "summary.json").write_text("{}")
        (run / "args.json").write_text('{"data": "puzzles", "max_pixels": 0}')
        evaluated = {"models": {str(run): {"cells": {cell: [1.0, 0.0] for cell in held}}}}
        (run / "evaluations" / "test-2.json").write_text(json.dumps(evaluated))
    args = Args(methods=("grpo: grpo.py",), out=str(tmp_path), seeds=(1, 2), splits=("test",), severities=(5,), limit=2)
    for corruptions, cells in ((("fog",), {"clean/0", "fog/5"}), ((), {"clean/0"})):
        main(replace(args, corruptions=corruptions))
        results = json.loads((tmp_path / "results.json").read_text())
        assert set(results["splits"]["test"]["grpo"]["cells"]) == cells


def test_a_run_is_evaluated_on_its_own_data(tmp_path, monkeypatch, capsys):
    """By its own columns and picture sizes, on its test split."""
    seen = []

    def evaluated(command, **_):
        if "--split" in command:
            seen.append(command)
            run, out = (command[command.index(flag) + 1] for flag in ("--model", "--out"))
            rows = [{"correct": [1.0]}, {"correct": [0.0]}]
            Path(out).write_text(json.dumps({"models": {run: {"rows": rows}}}))
        else:
            run = Path(command[command.index("--out") + 1])
            (run / "evaluations").mkdir(parents=True)
            (run / "summary.json").write_text("{}")
            trained = {"data": "shapes.jsonl", "kind": "int", "max_pixels": 4096, "max_prompt_length": 300}
            trained |= {"model": "tiny", "prompt_template": "{question}", "max_completion_length": 9}
            (run / "args.json").write_text(json.dumps(trained))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr("subprocess.run", evaluated)
    flags = "--data shapes.jsonl --kind int --test-split exam --max-pixels 4096 --max-prompt-length 300"
    main(Args(methods=(f"grpo: grpo.py {flags}",), out=str(tmp_path), seeds=(1,)))
    for command in seen:
        assert command[command.index("--split") + 1] == "exam"
        assert "--data shapes.jsonl --kind int --max-pixels 4096 --max-prompt-length 300" in " ".join(command)
    _, before = seen
    assert before[before.index("--model") + 1] == "tiny", "the policy that the run began with, asked in its words"
    assert before[-2:] == ["--prompt-template={question}", "--max-completion-length=9"]
    assert "exam: 2 examples, seeds 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ("grpo.py",)}, "--methods 'grpo.py': must be `NAME: SCRIPT FLAGS`"),
        ({"methods": ("x: nothere.py",)}, "--methods 'x: nothere.py': must be "),
        ({"methods": ("a: grpo.py", "a: roma.py")}, "--methods 'a: roma.py': there are two of the name 'a'"),
        ({"corruptions": ("rain",)}, "--corruptions: corruption 'rain' is not one of"),
        ({"corruptions": ("fog",), "severities": (0, 6)}, "--severities 0 6: each must be one of 1 to 5"),
        ({"jobs": -1}, "--limit, --methods, --seeds: at least one of each; the other numbers: at least 0"),
        (
            {"methods": ("a: grpo.py --stepz 3",)},
            r"--methods 'a: grpo.py --stepz 3': Unrecognized options: --stepz, 3$",
        ),
        (
            {"methods": ("a: grpo.py --steps x",)},
            "--methods 'a: grpo.py --steps x': Error parsing --steps: invalid lit",
        ),
        (
            {"methods": ("a: grpo.py", "b: vppo.py --data x.jsonl")},
            "different data .a on puzzles test; b on x.jsonl test",
        ),
        ({"methods": ("a: grpo.py", "b: grpo.py --kind int")}, "a study compares on one set"),
        (
            {"methods": ("a: grpo.py", "b: grpo.py --max-prompt-length 300")},
            "a on puzzles test; b on puzzles test --max-prompt-length 300",
        ),
        ({"seeds": (1, 2, 1)}, "--seeds 1 2 1: each only once"),
        ({"splits": ("test", "exam")}, "--splits exam: choose among train, validation, test, shifted"),
        ({"methods": ("a/b: grpo.py",)}, "the name 'a/b' must be letters, digits"),
        ({"methods": (": grpo.py",)}, "the name '' must be letters, digits"),
    ],
)
def test_bad_flags_are_one_line(settings, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main(Args(**{"methods": ("grpo: grpo.py",), "out": str(tmp_path)} | settings))


def test_a_run_that_fails_says_where_to_look(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"bad, seed 1: stopped with 1: --group-size 1: .* \(see .*bad-seed1.log\)$"):
        main(Args(methods=("bad: grpo.py --group-size 1",), out=str(tmp_path), seeds=(1,)))
    monkeypatch.setattr("subprocess.run", run_command)
    with pytest.raises(SystemExit, match=r"bad, seed 1: stopped with 1: --group-size 0"):  # nothing binds it to a typo
        main(Args(methods=("bad: grpo.py --group-size 0",), out=str(tmp_path), seeds=(1,)))


def test_a_run_that_was_stopped_is_not_evaluated_as_if_it_had_ended(tmp_path, monkeypatch):
    """Ctrl-C reaches the runs too; they save and end without an error."""
    monkeypatch.setattr("subprocess.run", lambda *args, **kwargs: SimpleNamespace(returncode=0))
    with pytest.raises(SystemExit, match="a, seed 1: stopped before its end; the same command goes on"):
        main(Args(methods=("a: grpo.py",), out=str(tmp_path), seeds=(1,)))

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("common.evaluation.study.train_and_evaluate", interrupted)
    with pytest.raises(SystemExit, match="interrupted; the same command goes on"):
        main(Args(methods=("a: grpo.py",), out=str(tmp_path), seeds=(1,)))
