"""Pictures of training: a run's learning curve, and metrics of several runs side by side.

    python -m common.run.plot --runs runs/grpo-tiny-seed1 runs/noisy_grpo-tiny-seed1 \
        --metrics reward reward_std "noise/*/reward" "noise/*/advantage" --out noise.png

A panel a pattern, a line a metric and method: runs whose folders differ only in a last `-seedN` are one line, the mean
over them, with a band from the least to the largest.
"""

import json
import math
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import tyro

from common.corruptions import check_out

HALF = 10  # curves are means over so many steps to either side


@dataclass
class Args:
    runs: tuple[str, ...]
    """run folders"""
    metrics: tuple[str, ...] = ("reward", "reward_std", "completions/mean_length", "entropy")
    """names in metrics.jsonl, or patterns of them with * in place of any text; a panel each"""
    out: str = "metrics.png"
    """picture to write"""


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, none where there is no such file."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def method_curves(runs: dict[str, list[list[dict]]], pattern: str) -> dict[tuple[str, str], list[list[float]]]:
    """Smoothed curves by (method, metric), one a run, of the metrics that match; NaN where a step lacks the metric."""
    curves = {}
    for method, histories in runs.items():
        names = sorted({name for lines in histories for line in lines for name in line if fnmatch(name, pattern)})
        for name in names:
            values = [[math.nan if line.get(name) is None else line[name] for line in lines] for lines in histories]
            curves[method, name] = [smooth(v) for v in values]
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
        for (method, name), lines in curves.items():
            columns = list(zip(*lines, strict=False))  # as far as every run has come
            mean = [sum(column) / len(column) for column in columns]
            label = method if name == pattern else f"{method}: {name}"
            steps = range(1, len(mean) + 1)
            (line,) = axis.plot(steps, mean, label=label)
            if len(lines) > 1:
                low, high = zip(*((min(column), max(column)) for column in columns), strict=True)
                axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set(title=pattern, xlabel=f"step (mean of {2 * HALF + 1} around it)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def plot_learning_curve(folder: Path) -> None:
    """learning_curve.png from metrics.jsonl: reward and accuracy, completion length, entropy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = read_metrics(folder)
    if not lines:
        return
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    steps = [line["step"] + 1 for line in lines]
    for axis, name, label in zip(
        axes, ("reward", "completions/mean_length", "entropy"), ("mean reward", "tokens", "nats a token"), strict=True
    ):
        values = [float("nan") if line.get(name) is None else line[name] for line in lines]
        axis.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.8)
        axis.plot(steps, smooth(values), color="tab:blue", label={"reward": "training reward"}.get(name))
        axis.set_xlabel(f"step (dark line: mean of {2 * HALF + 1} around it)")
        axis.set_ylabel(label)
        axis.set_title(
            {"completions/mean_length": "completion length", "reward": "reward and accuracy"}.get(name, name)
        )
        axis.grid(alpha=0.3)
    held_out = [(line["step"] + 1, line["eval/accuracy"]) for line in lines if "eval/accuracy" in line]
    if held_out:
        axes[0].plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="held-out accuracy (greedy)")
    for name, place in (("before", 0), ("after", steps[-1])):
        file = folder / "evaluations" / f"{name}.json"
        if file.is_file():
            result = json.loads(file.read_text())
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


def smooth(values: list[float], half: int = HALF) -> list[float]:
    """Mean over a window of up to 2 * half + 1 steps, NaN left out."""
    result = []
    for i in range(len(values)):
        window = [v for v in values[max(0, i - half) : i + half + 1] if not math.isnan(v)]
        result.append(sum(window) / len(window) if window else float("nan"))
    return result


def main(args: Args) -> None:
    runs = {}
    for name in args.runs:
        lines = read_metrics(Path(name))
        if not lines:
            raise SystemExit(f"--runs {name}: no metrics.jsonl with a step in it")
        runs.setdefault(re.sub(r"-seed\d+$", "", Path(name).name), []).append(lines)
    if not args.runs or not args.metrics:
        raise SystemExit("--runs, --metrics: at least one of each")
    check_out(args.out)
    plot_metrics(runs, args.metrics, args.out)
    print(f"{args.out}: {len(args.metrics)} panels, {len(args.runs)} runs")


if __name__ == "__main__":
    main(tyro.cli(Args))
