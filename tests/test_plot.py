"""Curves of several runs in one picture."""

import json
import math

import pytest
from PIL import Image

from common.run.plot import Args, main, method_curves, smooth


def history(folder, rewards):
    folder.mkdir(parents=True)
    lines = [{"step": i, "reward": r, "noise/0.30/reward": r, "kl": None} for i, r in enumerate(rewards)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_smoothing_is_the_mean_of_a_window_without_gaps():
    assert smooth([1, 2, 3, 4], half=1) == [1.5, 2, 3, 3.5]
    assert smooth([1, math.nan, 3], half=1) == [1, 2, 3]
    assert math.isnan(smooth([math.nan])[0])


def test_a_pattern_names_a_line_a_metric_and_method():
    runs = {"a": [[{"x/1": 1.0, "x/2": 2.0}], [{"x/1": 3.0}]], "b": [[{"y": 1.0}]]}
    curves = method_curves(runs, "x/*")
    assert list(curves) == [("a", "x/1"), ("a", "x/2")]
    assert curves["a", "x/1"] == [[1.0], [3.0]]
    assert math.isnan(curves["a", "x/2"][1][0]), "a step without the metric"


def test_runs_of_several_seeds_are_one_line_of_a_picture(tmp_path):
    runs = [history(tmp_path / f"grpo-seed{seed}", [0.1 * seed] * (3 + seed)) for seed in (1, 2)]
    runs.append(history(tmp_path / "other", [0.5] * 4))
    main(Args(runs=tuple(runs), metrics=("reward", "noise/*/reward"), out=str(tmp_path / "out.png")))
    assert Image.open(tmp_path / "out.png").width > 900


def test_what_is_missing_is_one_line(tmp_path):
    run = history(tmp_path / "run", [1.0])
    for args, message in (
        (Args(runs=(str(tmp_path / "none"),)), "--runs .*none: no metrics.jsonl with a step in it"),
        (Args(runs=(run,), metrics=("rewrad",)), "--metrics rewrad: no run has such a metric"),
        (Args(runs=(run,), out=str(tmp_path / "no" / "x.png")), "--out .*: its folder does not exist"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(args)
