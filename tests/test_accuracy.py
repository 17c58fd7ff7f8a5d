"""Evaluation: figures, intervals, tables, and the built-in model answering built-in puzzles."""

import json
import shutil
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, norm

import common.evaluation.accuracy
import grpo
from common.corruptions import SEEN, UNSEEN
from common.data.examples import PUZZLE_COUNT, Example, load_examples
from common.data.messages import TEMPLATE
from common.evaluation import __main__ as command
from common.evaluation.__main__ import Args, main, mark
from common.evaluation.accuracy import evaluate, interval, pass_at, summarize, table
from common.evaluation.probes import image_reliance
from common.evaluation.robustness import bootstrap, keep_robustness, robustness, robustness_summary, robustness_table
from common.evaluation.training import Evaluations
from common.model.load import TINY, load_policy, newest_checkpoint
from common.run.checkpoints import settings_of
from tests.small_models import picture, small_folder, small_policy, watch_loading


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
    means = [0.25, 0.5, 1.0, 0.75, 0.0, 0.5]
    deviation = torch.tensor(means, dtype=torch.float64).std() / 6**0.5
    theirs = norm.interval(0.95, loc=0.5, scale=float(deviation))
    assert interval(means, binary=False) == pytest.approx(theirs, abs=1e-6)
    assert interval([1.0] * 5, binary=False) == interval([1.0] * 5, binary=True), "five right answers prove little"


def test_of_several_samples_one_may_be_enough():
    """Two of four right: of the six pairs one is wrong twice."""
    result = summarize([row("", 1, 1, 0, 0), row("", 0, 0, 0, 0)])
    assert result["accuracy"] == 0.25 and result["pass@2"] == pytest.approx(5 / 12) and result["pass@4"] == 0.5
    header, line = table({"a": result}).splitlines()
    assert header.split()[5:7] == ["pass@2", "pass@4"] and line.split()[5:7] == ["41.7", "50.0"]
    assert "pass@1" not in summarize([row("", 1)])


def test_pass_at_k_is_the_mean_over_every_choice_of_k_samples():
    verdicts = [[float(i < right) for i in range(6)] for right in (0, 1, 2, 5, 6)]
    found = pass_at(verdicts)
    assert list(found) == ["pass@2", "pass@4", "pass@6"]
    for k in (2, 4, 6):
        chosen = [np.mean([any(choice) for choice in combinations(v, k)]) for v in verdicts]
        assert found[f"pass@{k}"] == pytest.approx(np.mean(chosen))


def test_groups_and_table():
    result = summarize([row("sum", 1), row("sum", 0), row("bars", 1)])
    assert result["groups"]["sum"]["accuracy"] == 0.5 and result["groups"]["bars"]["count"] == 1
    text = table({"before": result, "after": summarize([row("sum", 1)])})
    header, before, after = text.splitlines()
    assert header.split() == ["model", "accuracy", "95", "%", "interval", "bars", "sum", "tokens", "cut", "off"]
    assert before.split() == ["before", "66.7", "20.8", "-", "93.9", "100.0", "50.0", "10.0", "0.0"]
    assert after.startswith("after      100.0")
    assert len({len(line) for line in (header, before, after)}) == 1, "numbers stand right-aligned"
    assert summarize([row("", 1)])["groups"] == {}, "a set without groups has no table of them"


def test_newest_complete_checkpoint_of_a_run(tmp_path):
    assert newest_checkpoint("tiny") == "tiny" and settings_of("tiny")["max_completion_length"] == 72
    (tmp_path / "args.json").write_text('{"max_completion_length": 33, "prompt_template": "{question}!"}')
    with pytest.raises(SystemExit, match="no complete checkpoint"):
        newest_checkpoint(str(tmp_path))
    for step in (1, 2, 3):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    for step in (1, 2):
        (tmp_path / "checkpoints" / f"step-{step:06d}" / "complete").write_text("{}")
    newest = newest_checkpoint(str(tmp_path))
    known, usual = settings_of(newest), settings_of("tiny")
    assert newest.endswith("step-000002") and known["max_completion_length"] == 33
    assert known["prompt_template"] == "{question}!" and "<answer>" in usual["prompt_template"]
    for step in (999_999, 1_000_000):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir()
        (tmp_path / "checkpoints" / f"step-{step:06d}" / "complete").write_text("{}")
    assert newest_checkpoint(str(tmp_path)).endswith("step-1000000")
    with pytest.raises(SystemExit, match="runs/gone: no such run folder"):
        newest_checkpoint("runs/gone")


class Sheep:
    """Stands in for a model: answers "3" to everything, a token a character, and notes which prompts came together."""

    def __init__(self, monkeypatch):
        self.batches = []
        monkeypatch.setattr(common.evaluation.accuracy, "encode_prompts", lambda policy, messages, images: images)
        monkeypatch.setattr(common.evaluation.accuracy, "sample", self.sample)
        monkeypatch.setattr(
            common.evaluation.accuracy, "decode", lambda policy, rollout: ["<answer>3</answer>"] * len(rollout.ended)
        )

    def sample(self, policy, prompts, group_size, max_new_tokens, uniforms, temperature):
        self.batches.append([image.width for (image,) in prompts])
        rows = len(prompts) * group_size
        assert uniforms is None or uniforms.shape == (rows, max_new_tokens)
        mask = torch.ones(rows, 5, dtype=torch.bool)
        return SimpleNamespace(completion_mask=mask, ended=torch.arange(rows) % group_size == 0)


class Pictures(list):
    @property
    def sizes(self):
        return [example.images[0].width for example in self]


WIDTHS = (10, 40, 20, 30)
EXAMPLES = Pictures(
    Example(
        (picture(w, 1, 0),), "<image>?", "3" if w < 25 else "4", "int", group="small" if w < 25 else "big", id=str(w)
    )
    for w in WIDTHS
)


def test_large_prompts_are_answered_first_and_rows_come_back_in_order(monkeypatch):
    sheep = Sheep(monkeypatch)
    result = evaluate(None, EXAMPLES, max_new_tokens=8, samples=2, temperature=1.0, batch_prompts=3)
    assert sheep.batches == [[40, 30, 20], [10]]
    assert [row["id"] for row in result["rows"]] == ["10", "40", "20", "30"]
    assert result["rows"][0] == {
        "number": 0,
        "id": "10",
        "group": "small",
        "question": "<image>?",
        "answer": "3",
        "completions": ["<answer>3</answer>"] * 2,
        "correct": [1.0, 1.0],
        "lengths": [5, 5],
        "truncated": [False, True],
    }
    assert (result["accuracy"], result["count"], result["mean_length"], result["truncated"]) == (0.5, 4, 5.0, 0.5)
    assert result["groups"]["small"]["accuracy"] == 1.0 and result["groups"]["big"]["count"] == 2


def test_processes_share_the_examples_out(monkeypatch):
    Sheep(monkeypatch)
    shares = []

    def gather(rows):
        shares.append(rows)
        return [row for share in shares for row in share]

    monkeypatch.setattr("accelerate.utils.gather_object", gather)
    for rank in range(3):
        accelerator = SimpleNamespace(is_main_process=False, num_processes=3, process_index=rank)
        result = evaluate(None, EXAMPLES, max_new_tokens=8, accelerator=accelerator)
    assert [len(share) for share in shares] == [2, 1, 1]
    assert result == evaluate(None, EXAMPLES, max_new_tokens=8)


def test_no_examples():
    with pytest.raises(ValueError, match="no examples"):
        evaluate(None, [], max_new_tokens=8)


@pytest.mark.parametrize(
    "args, message",
    [
        (dict(split="dev"), "no split 'dev': choose one of train, "),
        (dict(samples=0), "--samples 0: must be at least 1"),
        (dict(limit=-1), "--limit -1: must be at least 0"),
        (dict(max_completion_length=-3), "--max-completion-length -3: must be at least 0"),
        (dict(temperature=float("nan")), "--temperature nan: must be at least 0"),
        (dict(batch_prompts=0), "--batch-prompts 0"),
        (dict(samples=4), "--samples 4: greedy answers are all the same"),
        (dict(out="/nowhere/x.json"), "--out /nowhere/x.json: not a file in a folder that exists"),
        (dict(out="/tmp/r.png"), "--out /tmp/r.png: must end in .json"),
        (dict(prompt_template="?"), "--prompt-template '\\?': must contain"),
        (dict(corruptions=("seen", "rain")), "--corruptions: corruption 'rain' is not one of seen, "),
        (dict(corruptions=()), "--corruptions: nothing stands behind it"),
        (dict(corruptions=("fog",), severities=()), "--severities: nothing stands behind it"),
        (dict(severities=(1, 6)), "--severities 1 6: each must be one of 1 to 5"),
        (dict(severities=(1, 3, 5)), "--severities 1 3 5: of what\\? Pass --corruptions with it"),
        (dict(model=("tiny", "runs/gone")), "--model runs/gone: no such run folder"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(monkeypatch, args, message):
    monkeypatch.setattr(command, "load_policy", lambda *args, **kwargs: pytest.fail("too late"))
    with pytest.raises(SystemExit, match=message):
        main(Args(**args))


def test_several_models_in_one_table_and_one_file(tmp_path, capsys):
    """Two random models of other families on a local data set; what the first got is on the disk before the next."""
    picture(48, 32, 0).save(tmp_path / "a.png")
    lines = [json.dumps({"image": "a.png", "question": f"{i} é?", "answer": str(i)}) for i in range(3)]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    folders = (small_folder("qwen3_vl"), small_folder("qwen2_5_vl"))
    out = tmp_path / "out.json"
    args = Args(model=folders, data=str(tmp_path), out=str(out), max_completion_length=4, samples=2, temperature=1.0)
    results = main(args)
    kept = json.loads(out.read_text())
    assert kept["models"] == results and list(results) == list(folders)
    assert kept["args"]["samples"] == 2 and kept["models"][folders[0]]["checkpoint"] == folders[0]
    assert [len(r["completions"]) for r in results[folders[1]]["rows"]] == [2, 2, 2]
    title, header, *lines = capsys.readouterr().out.splitlines()[-4:]
    assert title.endswith("split test, 3 examples, 2 samples each at temperature 1.0")
    assert header.split()[0] == "model" and [line.split()[0] for line in lines] == list(folders)

    out.unlink()
    with pytest.raises(SystemExit, match="has neither config"):
        main(Args(model=(folders[0], str(tmp_path)), data=str(tmp_path), out=str(out), max_completion_length=4))
    assert not out.exists(), "a model that is not there is found before the first one is evaluated"
    shutil.copy(Path(folders[1]) / "config.json", tmp_path)
    with pytest.raises(SystemExit, match="cannot be loaded"):
        main(Args(model=(folders[0], str(tmp_path)), data=str(tmp_path), out=str(out), max_completion_length=4))
    assert list(json.loads(out.read_text())["models"]) == [folders[0]]


def test_batches_change_nothing_on_pictures_of_several_sizes(tmp_path):
    rows = []
    for i, (width, height) in enumerate([(32, 32), (96, 64), (48, 80), (64, 64), (32, 96)]):
        picture(width, height, i).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": "what? " * (i + 1), "answer": "1"})
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    policy, examples = small_policy(trainable=False), load_examples(str(tmp_path), "test")
    assert examples.sizes == [1024, 6144, 3840, 4096, 3072]
    whole, cut = (evaluate(policy, examples, max_new_tokens=6, batch_prompts=size) for size in (5, 2))
    assert [r["completions"] for r in whole["rows"]] == [r["completions"] for r in cut["rows"]]


def test_the_built_in_model_answers_puzzles(tmp_path):
    results = main(Args(limit=40, out=str(tmp_path / "out.json")))
    result = results["tiny"]
    assert result["count"] == 40 and 0.2 < result["accuracy"] < 0.95
    kept = json.loads((tmp_path / "out.json").read_text())["models"]["tiny"]
    assert kept["rows"][3]["completions"] and set(kept["groups"]) == {row["group"] for row in kept["rows"]}


def test_batches_and_order_change_nothing():
    policy, examples = load_policy("tiny"), load_examples("puzzles", "test", limit=12)
    whole = evaluate(policy, examples, max_new_tokens=72, samples=2, temperature=1.0)
    cut = evaluate(policy, examples, max_new_tokens=72, samples=2, temperature=1.0, batch_prompts=5)
    assert [r["completions"] for r in whole["rows"]] == [r["completions"] for r in cut["rows"]]
    assert whole["mean_length"] == cut["mean_length"]


# --------------------------------------------------------------------------------------------------------- robustness


def cells(clean: float, **corruptions: tuple[float, float, float]) -> dict[str, list[float]]:
    """Accuracies at severities 1, 3, 5, the same for each of four examples."""
    pairs = {f"{name}/{s}": v for name, values in corruptions.items() for s, v in zip((1, 3, 5), values, strict=True)}
    return {cell: [value] * 4 for cell, value in {"clean/0": clean, **pairs}.items()}


def test_means_over_cells_have_the_worked_numbers():
    one = cells(0.8, gaussian_noise=(0.78, 0.7, 0.5), jpeg_compression=(0.8, 0.74, 0.6), fog=(0.76, 0.66, 0.56))
    two = cells(0.5, gaussian_noise=(0.5, 0.44, 0.38), jpeg_compression=(0.48, 0.46, 0.4), fog=(0.47, 0.41, 0.32))
    summary = robustness_summary({"one": one, "two": two})
    assert summary["one"]["seen"]["accuracy"] == pytest.approx(0.686667, abs=1e-6)
    assert summary["two"]["seen"]["accuracy"] == pytest.approx(0.443333, abs=1e-6)
    both = [summary[name] for name in ("one", "two")]
    for title, expected in (("clean", 0.65), ("seen", 0.565), ("unseen", 0.53)):
        assert sum(f[title]["accuracy"] for f in both) / 2 == pytest.approx(expected, abs=1e-6)
    assert sum(f["seen"]["retained"] for f in both) / 2 == pytest.approx(0.8725, abs=1e-6)
    assert summary["one"]["unseen"]["drop"] == pytest.approx(0.14)
    assert summary["two"]["seen"]["difference"] == pytest.approx(0.443333 - 0.686667, abs=1e-6)
    text = robustness_table(summary).splitlines()
    assert "one     80.0  68.7    66.0       85.8         82.5" in text
    assert "one              +11.3 (+11.3 to +11.3)  +14.0 (+14.0 to +14.0)" in text
    assert "two          -30.0 (-30.0 to -30.0)  -24.3 (-24.3 to -24.3)  -26.0 (-26.0 to -26.0)" in text
    assert "corruption        model  severity 1  severity 3  severity 5  mean" in text
    assert "fog                 one        76.0        66.0        56.0  66.0" in text
    assert "fog                 two        47.0        41.0        32.0  40.0" in text


def test_the_table_of_two_runs_and_three_severities_is_readable():
    corruptions = dict.fromkeys((*SEEN, *UNSEEN, "frost"), (0.7, 0.6, 0.5))
    names = ("runs/grpo-tiny-seed1", "runs/roma-tiny-seed1")
    text = robustness_table(robustness_summary({name: cells(0.8, **corruptions) for name in names}))
    assert max(map(len, text.splitlines())) <= 120
    assert text.count("runs/roma-tiny-seed1") == 3 + 11, "sets, drops, differences, and a line a corruption"
    assert robustness_table(robustness_summary({"a": cells(0.8)})) == "model  clean\na       80.0", "no empty tables"


def test_a_single_model_has_intervals_of_its_drops():
    dice = np.random.default_rng(2)
    clean, fog = (dice.random(50) < 0.8).astype(float), (dice.random(50) < 0.5).astype(float)
    (figures,) = robustness_summary({"a": {"clean/0": clean.tolist(), "fog/3": fog.tolist()}}).values()
    assert figures["unseen"]["drop"] == pytest.approx((clean - fog).mean())
    assert figures["unseen"]["drop_ci"] == bootstrap(clean - fog) and "drop_ci" not in figures["clean"]


def test_a_model_that_is_never_right_retains_nothing_that_could_be_said(tmp_path, capsys):
    lost = cells(0.0, fog=(0.0, 0.0, 0.0))
    assert robustness_summary({"a": lost})["a"]["unseen"]["retained"] is None
    assert robustness_summary({"a": cells(0.5, fog=(0.5, 0.5, 0.5))}, {"a": lost})["a"]["unseen"]["retained"] is None
    keep_robustness(tmp_path, robustness_summary({"a": lost}), {"a": lost})
    out = tmp_path / "r.json"
    main(Args(limit=2, max_completion_length=1, corruptions=("fog",), severities=(5,), out=str(out)))
    for file in (tmp_path / "robustness.json", out):
        content = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert next(iter(content["summary"].values()))["unseen"]["retained"] is None


# A benchmark's accuracy clean and under each corruption, at severities 1, 3 and 5.
MMSTAR = dict(clean=0.8, gaussian_noise=(0.78, 0.7, 0.5), jpeg_compression=(0.8, 0.74, 0.6), fog=(0.76, 0.66, 0.56))
CHARTQA = dict(clean=0.5, gaussian_noise=(0.5, 0.44, 0.38), jpeg_compression=(0.48, 0.46, 0.4), fog=(0.47, 0.41, 0.32))


def test_figures_of_several_benchmarks_are_means_over_benchmarks(tmp_path, monkeypatch, capsys):
    """The worked numbers of ROMA's specification, equation (9); the sets are of unlike size, and weigh alike."""
    sizes = {"mmstar": 50, "chartqa": 100}

    def evaluate(policy, examples, corruption, **options):
        accuracies = {"mmstar": MMSTAR, "chartqa": CHARTQA}[examples[0]]
        accuracy = accuracies[corruption[0]][(1, 3, 5).index(corruption[1])] if corruption else accuracies["clean"]
        right = round(accuracy * len(examples))
        return {"rows": [{"correct": [float(n < right)]} for n in range(len(examples))]}

    monkeypatch.setattr("common.evaluation.robustness.evaluate", evaluate)
    monkeypatch.setattr("common.evaluation.accuracy.load_examples", lambda name, *args, **kwargs: [name] * sizes[name])
    monkeypatch.setattr(command, "load_policy", lambda *args, **kwargs: None)
    args = Args(
        benchmark=("mmstar", "chartqa"), corruptions=("gaussian_noise", "jpeg_compression", "fog"),
        out=str(tmp_path / "all.json"),
    )  # fmt: skip
    main(args)
    content = json.loads((tmp_path / "all.json").read_text())
    figures = content["summary"]["tiny"]
    assert figures["clean"]["accuracy"] == pytest.approx(0.65)
    assert figures["seen"]["accuracy"] == pytest.approx(0.565) and figures["unseen"]["accuracy"] == pytest.approx(0.53)
    # (0.686667 / 0.8 + 0.443333 / 0.5) / 2 and (0.66 / 0.8 + 0.4 / 0.5) / 2
    assert figures["seen"]["retained"] == pytest.approx(0.8725)
    assert figures["unseen"]["retained"] == pytest.approx(0.8125)
    assert figures["unseen"]["drop"] == pytest.approx(0.12) and figures["cells"]["fog/5"] == pytest.approx(0.44)
    low, high = figures["unseen"]["drop_ci"]
    assert low < 0.12 < high
    assert content["benchmarks"]["mmstar"]["tiny"]["seen"]["accuracy"] == pytest.approx(0.686667, abs=1e-6)
    text = capsys.readouterr().out
    assert "tiny    65.0  56.5    53.0" in text.split("mean over mmstar, chartqa")[1]
    assert (tmp_path / "all.png").is_file() and (tmp_path / "all-chartqa.png").is_file()
    (tmp_path / "all.json").write_text('{"args": {}, "models": {}}')
    with pytest.raises(SystemExit, match=r"all.json: holds something else"):
        main(args)


def test_bootstrap_of_paired_differences():
    dice = np.random.default_rng(1)
    differences = dice.normal(0.1, 0.5, 400)
    low, high = bootstrap(differences)
    assert low == pytest.approx(differences.mean() - 1.96 * differences.std() / 20, abs=0.005)
    assert high == pytest.approx(differences.mean() + 1.96 * differences.std() / 20, abs=0.005)
    # What differs from seed to seed counts, too: five equal rows are one, five unlike ones are less certain.
    assert bootstrap(np.stack([differences] * 5)) == pytest.approx((low, high), abs=0.005)
    apart = np.stack([differences + shift for shift in (-0.2, -0.1, 0, 0.1, 0.2)])
    assert np.subtract(*bootstrap(apart)[::-1]) > 1.5 * (high - low)
    # Of several benchmarks, large and small, the means weigh alike.
    assert bootstrap([differences]) == (low, high)
    few = dice.normal(0.3, 1.0, 100)
    spread = 1.96 * (differences.var() / 400 + few.var() / 100) ** 0.5 / 2
    centre = (differences.mean() + few.mean()) / 2
    assert bootstrap([differences, few]) == pytest.approx((centre - spread, centre + spread), abs=0.01)


def test_robustness_shows_every_model_the_same_pixels_and_keeps_finished_cells(monkeypatch):
    policy, seen = load_policy("tiny", trainable=False), []
    real = common.evaluation.accuracy.corrupt
    monkeypatch.setattr(
        common.evaluation.accuracy, "corrupt", lambda *a: seen.append((real(*a).tobytes(), a[1:])) or real(*a)
    )
    options = dict(max_new_tokens=8, batch_prompts=3)
    examples, kept = load_examples("puzzles", "test", limit=5), []
    result = robustness(policy, examples, ("fog", "pixelate"), (1, 5), keep=lambda c: kept.append(list(c)), **options)
    assert list(result) == ["clean/0", "fog/1", "fog/5", "pixelate/1", "pixelate/5"] == kept[-1] and len(kept) == 5
    assert all(len(values) == 5 for values in result.values()) and len({shown for shown, _ in seen}) == 20
    first, seen[:] = list(seen), []
    again = robustness(policy, examples, ("fog", "pixelate"), (1, 5), **options | {"batch_prompts": 5})
    assert sorted(seen) == sorted(first) and again == result
    seen.clear()
    known = {cell: result[cell] for cell in ("clean/0", "fog/1")}
    assert robustness(policy, examples, ("fog",), (1, 5), known=known, **options)["fog/5"] == result["fog/5"]
    assert {settings[:2] for _, settings in seen} == {("fog", 5)}


def test_robustness_from_the_command_line_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    args = dict(limit=3, max_completion_length=6, corruptions=("fog", "contrast"), out=str(tmp_path / "r.json"))
    real, calls = common.evaluation.accuracy.evaluate, []

    def stops(*positional, corruption, **options):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(corruption)
        return real(*positional, corruption=corruption, **options)

    monkeypatch.setattr("common.evaluation.robustness.evaluate", stops)
    with pytest.raises(KeyboardInterrupt):
        main(Args(**args, severities=(1, 5)))
    assert calls == [None, ("fog", 1), ("fog", 5)]
    count = lambda *positional, corruption, **options: (
        calls.append(corruption) or real(*positional, corruption=corruption, **options)
    )
    monkeypatch.setattr("common.evaluation.robustness.evaluate", count)
    summary = main(Args(**args, severities=(1, 5)))
    assert calls[3:] == [("contrast", 1), ("contrast", 5)] and set(summary["tiny"]) == {"clean", "unseen", "cells"}
    main(Args(**args, severities=(5, 3)))
    assert calls[5:] == [("fog", 3), ("contrast", 3)], "other severities are added to what is there"
    assert (tmp_path / "r.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match=r"holds figures of 3 examples, there are 4 now \(--data, --limit\)"):
        main(Args(**args | {"limit": 4}))
    with pytest.raises(SystemExit, match="--max-completion-length was 6 there and is 7 now"):
        main(Args(**args | {"max_completion_length": 7}))
    (tmp_path / "r.json").write_text("[]")
    with pytest.raises(SystemExit, match="holds something else"):
        main(Args(**args))


def test_a_file_keeps_what_it_holds(tmp_path, capsys):
    """Other models, then an evaluation without corruptions: cells, figures and summary of before stay."""
    other, out = str(tmp_path / "other"), tmp_path / "r.json"
    shutil.copytree(TINY, other)
    args = dict(limit=3, max_completion_length=6, out=str(out))
    main(Args(**args, corruptions=("fog",), severities=(5,)))
    first = json.loads(out.read_text())
    assert first["summary"]["tiny"]["unseen"]["drop_ci"] and first["args"]["limit"] == 3
    capsys.readouterr()
    main(Args(**args, model=(other,), corruptions=("fog",), severities=(5,)))
    second = json.loads(out.read_text())
    assert "tiny " not in capsys.readouterr().out, "only the models asked for are printed"
    assert list(second["models"]) == ["tiny", other] and list(second["summary"]) == [other]
    assert second["models"]["tiny"] == first["models"]["tiny"]
    for _ in range(2):  # again and again
        results = main(Args(**args, model=(other,)))
        third = json.loads(out.read_text())
        assert third["models"]["tiny"] == first["models"]["tiny"] and third["summary"] == second["summary"]
        assert third["models"][other]["cells"] == second["models"][other]["cells"]
        assert third["models"][other]["rows"] == results[other]["rows"]


def test_finished_cells_are_shown_without_a_model(tmp_path, monkeypatch):
    args = Args(limit=3, max_completion_length=6, corruptions=("fog",), severities=(5,), out=str(tmp_path / "r.json"))
    summary = main(args)
    monkeypatch.setattr(command, "load_policy", lambda *args, **kwargs: pytest.fail("nothing is to do"))
    assert main(args) == summary


@pytest.mark.parametrize("corruptions", [None, ("fog",)])
def test_one_model_at_a_time_stands_in_memory(corruptions, tmp_path, monkeypatch):
    other = str(tmp_path / "other")
    shutil.copytree(TINY, other)
    loaded = watch_loading("common.evaluation.__main__", monkeypatch)
    main(Args(model=("tiny", other), limit=2, max_completion_length=2, corruptions=corruptions))
    assert len(loaded) == 2


@pytest.mark.parametrize("corruptions", [None, ("fog",)])
@pytest.mark.parametrize("text", ["", "[]", '{"accuracy": 1}', '{"args": [], "models": {}}'])
def test_a_file_of_something_else_is_never_overwritten(text, corruptions, tmp_path):
    (tmp_path / "kept.json").write_text(text)
    with pytest.raises(SystemExit, match=r"kept.json: holds something else; name another file"):
        main(Args(limit=1, corruptions=corruptions, out=str(tmp_path / "kept.json")))
    assert (tmp_path / "kept.json").read_text() == text


@pytest.mark.parametrize("corruptions", [None, ("fog",)])
def test_figures_of_other_weights_are_not_taken_for_a_models_own(corruptions, tmp_path):
    """A folder retrained in place has the same name and even the same size."""
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    args = Args(
        model=(str(model),), limit=2, max_completion_length=6, corruptions=corruptions, out=str(tmp_path / "r.json")
    )
    main(args)
    main(args)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    before = (tmp_path / "r.json").read_text()
    with pytest.raises(
        SystemExit, match=r"r.json: holds figures of other weights of .*/model \(.*/model\); name another"
    ):
        main(args)
    assert (tmp_path / "r.json").read_text() == before


def test_the_mark_of_weights(tmp_path):
    (tmp_path / "complete").write_text('{"model.safetensors": "aa"}')
    before = mark(str(tmp_path))
    (tmp_path / "model.safetensors").write_text("touched, with the same checksum")
    assert mark(str(tmp_path)) == before, "a run's checkpoint may be copied"
    (tmp_path / "complete").write_text('{"model.safetensors": "bb"}')
    assert mark(str(tmp_path)) != before
    (tmp_path / "complete").unlink()
    assert mark(str(tmp_path))["weights"].startswith("model.safetensors 31 ")
    assert mark("owner/name") == {"checkpoint": "owner/name", "weights": ""} and len(mark("tiny")["weights"]) == 64


@pytest.mark.parametrize("corruptions", [None, ("fog",)])
def test_a_data_file_that_has_grown_is_one_line(corruptions, tmp_path):
    picture(48, 32, 0).save(tmp_path / "a.png")
    line = json.dumps({"image": "a.png", "question": "How many?", "answer": "1"}) + "\n"
    args = Args(
        data=str(tmp_path / "test.jsonl"),
        max_completion_length=4,
        corruptions=corruptions,
        out=str(tmp_path / "r.json"),
    )
    (tmp_path / "test.jsonl").write_text(2 * line)
    main(args)
    (tmp_path / "test.jsonl").write_text(3 * line)
    with pytest.raises(SystemExit, match=r"r.json: holds figures of 2 examples, there are 3 now \(--data, --limit\)"):
        main(args)


def test_a_limit_that_changes_nothing_and_an_older_file_are_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setitem(PUZZLE_COUNT, "test", 3)
    out = tmp_path / "r.json"
    args = dict(max_completion_length=6, corruptions=("fog",), severities=(5,), out=str(out))
    summary = main(Args(**args))
    older = json.loads(out.read_text())
    older["args"]["limit"] = None
    del older["models"]["tiny"]["weights"], older["summary"]
    monkeypatch.setattr(command, "load_policy", lambda *args, **kwargs: pytest.fail("nothing is to do"))
    assert main(Args(**args, limit=3)) == summary
    out.write_text(json.dumps(older))
    assert main(Args(**args)) == main(Args(**args, limit=500)) == summary
    older["models"]["tiny"]["checkpoint"] = "elsewhere"
    out.write_text(json.dumps(older))
    with pytest.raises(SystemExit, match=r"holds figures of other weights of tiny \(elsewhere\)"):
        main(Args(**args))


def test_reliance_on_the_image_is_zero_for_a_model_that_cannot_see():
    policy, examples = load_policy("tiny", trainable=False), load_examples("puzzles", "validation", limit=6)
    options = dict(template=TEMPLATE, max_new_tokens=40)
    assert image_reliance(policy, examples, **options)["reliance/grey"] > 0.2
    for parameter in policy.base.model.visual.parameters():
        parameter.zero_()
    assert image_reliance(policy, examples, **options)["reliance/grey"] == pytest.approx(0, abs=1e-6)


def test_an_evaluation_during_training_takes_about_as_many_rows_at_once_as_training_samples():
    run = SimpleNamespace(accelerator=SimpleNamespace(num_processes=2))

    def at_once(**settings) -> int:
        args = grpo.Args(**{"model": "Qwen/Qwen3-VL-4B", "max_completion_length": 2048} | settings)
        return Evaluations(args, run, None, [], []).options["batch_prompts"]

    assert at_once(prompts_per_step=16) == 32, "half of 8 x 8 rows a process"
    assert at_once(prompts_per_step=16, slots=20) == 10
    assert at_once(prompts_per_step=2, group_size=2) == 8, "what a micro-batch of 16,384 tokens holds"
    assert at_once(prompts_per_step=512) == 64


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("corruptions", [None, ("fog",)])
def test_on_a_full_disk_the_table_is_printed_all_the_same(corruptions, tmp_path, monkeypatch, capsys):
    sheep = Sheep(monkeypatch)
    monkeypatch.setattr(command, "load_policy", lambda *args, **kwargs: sheep)
    monkeypatch.setattr("common.evaluation.accuracy.load_examples", lambda *args, **kwargs: EXAMPLES)
    monkeypatch.setattr(command, "write_results", full)
    line = r"--out .*r.json: cannot be written \(No space left on device\); what was there stays"
    with pytest.raises(SystemExit, match=line):
        main(Args(out=str(tmp_path / "r.json"), corruptions=corruptions, severities=(1,) if corruptions else None))
    said = capsys.readouterr().out
    assert "tiny" in said.splitlines()[-1] and not list(tmp_path.iterdir())


def test_a_training_that_ends_on_a_full_disk_prints_its_tables(tmp_path, monkeypatch, capsys):
    from tests.test_run import new_run

    figures = {"accuracy": 0.5, "ci_low": 0.4, "ci_high": 0.6, "groups": {}, "mean_length": 9.0, "truncated": 0.0}
    evaluations = Evaluations(grpo.Args(), new_run(tmp_path / "run"), None, [], EXAMPLES)
    evaluations.robust = EXAMPLES
    monkeypatch.setattr(evaluations, "on", lambda examples: figures)
    monkeypatch.setattr(evaluations, "robustness", lambda: cells(0.5, fog=(0.5, 0.25, 0.0)))
    monkeypatch.setattr("common.run.folder.write", full)
    with pytest.raises(SystemExit, match="run: cannot be written"):
        evaluations.finish()
    said = capsys.readouterr().out
    assert "after      50.0" in said and "drop from clean" in said
