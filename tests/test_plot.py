"""Curves of several runs in one picture."""

import json
import math

import pytest
from PIL import Image

from common.run.plot import Args, main, method_curves, plot_learning_curve, read_metrics, smooth, unit_of


def history(folder, rewards):
    folder.mkdir(parents=True)
    lines = [{"step": i + 1, "reward": r, "noise/0.30/reward": r, "kl": None} for i, r in enumerate(rewards)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_smoothing_is_the_mean_of_a_window_without_gaps():
    assert smooth([1, 2, 3, 4], half=1) == [1.5, 2, 3, 3.5]
    assert smooth([1, math.nan, 3], half=1) == [1, 2, 3]
    assert math.isnan(smooth([math.nan], half=3)[0])


def test_a_pattern_names_a_line_a_metric_and_method():
    runs = {"a": [[{"x/1": 1.0, "x/2": 2.0}], [{"x/1": 3.0}]], "b": [[{"y": 1.0}]]}
    curves = method_curves(runs, "x/*")
    assert list(curves) == [("a", "x/1"), ("a", "x/2")]
    assert curves["a", "x/1"] == [[1.0], [3.0]]
    assert math.isnan(curves["a", "x/2"][1][0]), "a step without the metric"


def test_short_curves_are_drawn_as_they_are_and_steps_count_from_1(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **k: drawn.append(a) or plot(self, *a, **k))
    folder = history(tmp_path / "run", [0.0, 1.0, 0.0])
    main(Args(runs=(folder,), metrics=("reward",), out=str(tmp_path / "out.png")))
    assert list(drawn[0][0]) == [1, 2, 3] and drawn[0][1] == [0.0, 1.0, 0.0]


def test_evaluations_are_joined_and_not_smoothed(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **k: drawn.append((a, k)) or plot(self, *a, **k))
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [{"step": n, "reward": 0.5} | ({"eval/accuracy": n / 60} if n % 20 == 0 else {}) for n in range(1, 61)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    main(Args(runs=(str(folder),), metrics=("eval/accuracy", "reward"), out=str(tmp_path / "out.png")))
    (points, kept), (reward, _) = drawn
    assert points == ([20, 40, 60], [20 / 60, 40 / 60, 1.0]) and kept["marker"] == "o"
    assert len(reward[1]) == 60


def test_curves_that_coincide_are_seen_and_runs_of_two_experiments_are_two(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    styles, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **k: styles.append(k) or plot(self, *a, **k))
    runs = tuple(history(tmp_path / one / "grpo-seed1", [0.5] * 4) for one in ("first", "second"))
    main(Args(runs=(*runs, runs[0] + "/"), metrics=("reward",), out=str(tmp_path / "out.png")))
    assert [style["label"] for style in styles] == ["first/grpo", "second/grpo"], "a run named twice counts once"
    assert len({(style["linestyle"], style["linewidth"]) for style in styles}) == 2


def test_metrics_have_the_units_of_the_page():
    assert (unit_of("entropy"), unit_of("completions/mean_length"), unit_of("of my own")) == (
        "nats a token",
        "tokens",
        "",
    )


def test_foreign_lines_are_left_out(tmp_path):
    folder = history(tmp_path / "run", [0.5, 0.6])
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('[1]\n"text"\n{"reward": 3}\n{"step": 3, "reward": "much"}\n{"step": 4, "rew')
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3]
    main(Args(runs=(folder,), metrics=("reward",), out=str(tmp_path / "out.png")))
    plot_learning_curve(tmp_path / "run")


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
