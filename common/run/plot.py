"""Pictures of training: a run's learning curve, and metrics of several runs side by side.

    python -m common.run.plot --runs runs/grpo-tiny-seed1 runs/noisy_grpo-tiny-seed1 \
        --metrics reward reward_std "noise/*/reward" "noise/*/advantage" --out noise.png

A panel a pattern, a line a metric and method: runs whose folders differ only in a last `-seedN`, and stand in the same
folder, are one line, the mean over them, with a band from the least to the largest.
"""

import math
import os
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from common.corruptions import check_out
from common.run.files import one_line
from common.run.page import CHARTS, finite, read_lines, read_object
from common.run.settings import command_line

HALF = 10  # long curves are means over so many steps to either side


@dataclass
class Args:
    runs: tuple[str, ...]
    """run folders"""
    metrics: tuple[str, ...] = ("reward", "reward_std", "completions/mean_length", "entropy")
    """names in metrics.jsonl, or patterns of them with * in place of any text; a panel each"""
    out: str = "metrics.png"
    """picture to write"""


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, without strange ones; none where there is no such file."""
    return [line for line in read_lines(folder / "metrics.jsonl") if isinstance(line.get("step"), int)]


def method_names(folders: list[Path]) -> list[str]:
    """A name for each run's method: its folder without a last `-seedN`, with those above it as far as runs of different
    experiments are of the same name.

    >>> method_names([Path("a/grpo-seed1"), Path("a/grpo-seed2"), Path("b/grpo-seed1"), Path("b/roma-seed1")])
    ['a/grpo', 'a/grpo', 'b/grpo', 'roma']
    """
    paths = [Path(re.sub(r"-seed\d+$", "", str(folder))) for folder in folders]
    names = {}
    for path in paths:
        tails = [Path(*path.parts[-depth:]) for depth in range(1, len(path.parts) + 1)]
        alone = (t for t in tails if not any(o.parts[-len(t.parts) :] == t.parts for o in paths if o != path))
        names[path] = str(next(alone, path))
    return [names[path] for path in paths]


def method_curves(runs: dict[str, list[list[dict]]], pattern: str) -> dict[tuple[str, str], list[list[float]]]:
    """Curves by (method, metric), one a run, of the metrics that match; NaN where a step lacks the metric."""
    curves = {}
    for method, histories in runs.items():
        names = sorted({name for lines in histories for line in lines for name in line if fnmatch(name, pattern)})
        for name in names:
            values = [[line.get(name) for line in lines] for lines in histories]
            curves[method, name] = [[v if finite(v) else math.nan for v in one] for one in values]
    return curves


def plot_metrics(runs: dict[str, list[list[dict]]], patterns: tuple[str, ...], out: str) -> None:
    """A panel a pattern; `runs` holds for each method the lines of metrics.jsonl of each of its runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(patterns), figsize=(4.5 * len(patterns), 3.8), layout="constrained", squeeze=False
    )
    for axis, pattern in zip(axes[0], patterns, strict=True):
        curves = method_curves(runs, pattern)
        if not curves:
            raise SystemExit(f"--metrics {pattern}: no run has such a metric")
        half = half_window(max(len(line) for lines in curves.values() for line in lines))
        for n, ((method, name), lines) in enumerate(curves.items()):
            columns = list(zip(*(smooth(line, half) for line in lines), strict=False))  # as far as every run has come
            steps = range(1, len(columns) + 1)
            rare = [n for n, values in enumerate(zip(*lines, strict=False)) if not any(map(math.isnan, values))]
            evaluated = 0 < 2 * len(rare) < len(columns)
            if evaluated:  # as they are, and joined
                columns, steps = [[line[n] for line in lines] for n in rare], [n + 1 for n in rare]
            mean = [sum(column) / len(column) for column in columns]
            label = method if name == pattern else f"{method}: {name}"
            # Curves that lie on each other are told apart: the later the thinner, and broken.
            style = {"linestyle": ("-", "--", "-.", ":")[n % 4], "linewidth": max(1.0, 2.6 - 0.4 * n)}
            style["marker"] = "o" if evaluated else None
            (line,) = axis.plot(steps, mean, label=label, **style)
            if len(lines) > 1:
                low, high = zip(*((min(column), max(column)) for column in columns), strict=True)
                axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set(title=pattern, xlabel="step" if evaluated else step_label(half), ylabel=unit_of(next(iter(curves))[1]))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def unit_of(name: str) -> str:
    """The unit of a metric, as the run's page has it; nothing where it has none."""
    units = [unit for _, unit, patterns in CHARTS if any(fnmatch(name, pattern) for pattern in patterns)]
    return units[0] if units else ""


def half_window(steps: int) -> int:
    """Curves are means over a tenth of them: so many steps to either side, at most `HALF`.

    >>> half_window(15), half_window(60), half_window(3000)
    (0, 3, 10)
    """
    return min(HALF, steps // 20)


def step_label(half: int) -> str:
    return f"step (mean of {2 * half + 1} around it)" if half else "step"


def plot_learning_curve(folder: Path) -> None:
    """learning_curve.png from metrics.jsonl: reward and accuracy, completion length, entropy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = read_metrics(folder)
    if not lines:
        return
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    steps, half = [line["step"] for line in lines], half_window(len(lines))
    for axis, name, label in zip(
        axes, ("reward", "completions/mean_length", "entropy"), ("mean reward", "tokens", "nats a token"), strict=True
    ):
        values = [line[name] if finite(line.get(name)) else math.nan for line in lines]
        if half:
            axis.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.8)
        axis.plot(steps, smooth(values, half), color="tab:blue", label={"reward": "training reward"}.get(name))
        axis.set_xlabel(step_label(half))
        axis.set_ylabel(label)
        axis.set_title(
            {"completions/mean_length": "completion length", "reward": "reward and accuracy"}.get(name, name)
        )
        axis.grid(alpha=0.3)
    held_out = [(line["step"], line["eval/accuracy"]) for line in lines if finite(line.get("eval/accuracy"))]
    if held_out:
        axes[0].plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="held-out accuracy (greedy)")
    for name, place in (("before", 0), ("after", steps[-1])):
        result = read_object(folder / "evaluations" / f"{name}.json")
        if all(finite(result.get(key)) for key in ("accuracy", "ci_low", "ci_high")):
            below, above = result["accuracy"] - result["ci_low"], result["ci_high"] - result["accuracy"]
            spread = [[max(0.0, below)], [max(0.0, above)]]  # rounding can make an interval miss its own 0 or 1
            label = "test accuracy before, after (greedy)" if name == "before" else None
            axes[0].errorbar(place, result["accuracy"], yerr=spread, fmt="s", color="tab:green", capsize=3, label=label)
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(min(low, -0.02), max(high, 1.02))  # accuracies fill 0 to 1; a reward may reach beyond
    axes[0].legend(fontsize=8, loc="lower right")
    axes[1].set_ylim(bottom=0)
    axes[2].set_ylim(bottom=0)
    figure.savefig(folder / "learning_curve.png", dpi=110)
    plt.close(figure)


def smooth(values: list[float], half: int) -> list[float]:
    """Mean over a window of up to 2 * half + 1 steps, NaN left out."""
    result = []
    for i in range(len(values)):
        window = [v for v in values[max(0, i - half) : i + half + 1] if not math.isnan(v)]
        result.append(sum(window) / len(window) if window else float("nan"))
    return result


def main(args: Args) -> None:
    runs, folders = {}, list(dict.fromkeys(Path(os.path.normpath(name)) for name in args.runs))
    for folder, method in zip(folders, method_names(folders), strict=True):
        lines = read_metrics(folder)
        if not lines:
            raise SystemExit(f"--runs {folder}: no metrics.jsonl with a step in it")
        runs.setdefault(method, []).append(lines)
    if not args.runs or not args.metrics:
        raise SystemExit("--runs, --metrics: at least one of each")
    check_out(args.out)
    with one_line(f"--out {args.out}"):
        plot_metrics(runs, args.metrics, args.out)
    print(f"{args.out}: {len(args.metrics)} panels, {len(args.runs)} runs")


if __name__ == "__main__":
    command_line(main, Args)
