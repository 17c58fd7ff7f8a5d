"""Methods compared over training seeds: figures a run, paired differences to the first method, curves.

A figure is one number a run. Runs of the same seed see the same prompts in the same order, so differences are paired:
their interval is Student's, over seeds, which says what another seed would do; what other examples would do is said by
the bootstrap of robustness.py.
"""

import platform
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from common.evaluation.accuracy import aligned

AREA = "area under the validation curve"
SECONDS = "seconds a step"
NORM = "gradient norm"


def made_with() -> dict:
    """Today's date, versions and the kind of machine, as they stand in files of results."""
    return {
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers")},
        "machine": f"{platform.machine()}, {'CUDA' if torch.cuda.is_available() else 'CPU'}",
    }


def area(curve: Sequence[tuple[int, float]]) -> float:
    """Mean height of a curve of (step, accuracy) between its first and last step, by trapezoids.

    >>> area([(0, 0.0), (50, 1.0), (100, 1.0)])
    0.75
    """
    steps, values = np.array(curve, dtype=float).T
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0])) if len(steps) > 1 else float(values[0])


def seed_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean of some seeds' values, by Student's t; None of fewer than two.

    >>> [round(x, 3) for x in seed_interval([1.0, 2.0, 3.0])]
    [-0.484, 4.484]
    """
    if len(values) < 2:
        return None
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def compare(figures: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, dict]]:
    """Of `figures[method][name]`, a number a seed: mean, and mean paired difference to the first method with its
    interval."""
    first, summary = next(iter(figures.values())), {}
    for method, own in figures.items():
        summary[method] = {name: {"mean": float(np.mean(values)), "seeds": values} for name, values in own.items()}
        for name in own.keys() & first.keys() if own is not first else ():
            differences = np.subtract(own[name], first[name]).tolist()
            summary[method][name] |= {
                "difference": float(np.mean(differences)),
                "difference_ci": seed_interval(differences),
            }
    return summary


def scale_of(name: str) -> tuple[float, int]:
    """What a figure is multiplied by to be shown, and its decimals: shares in percent, others as they are."""
    return (1.0, 3) if any(word in name for word in ("nats", "entropy", "seconds", "norm")) else (100.0, 1)


def comparison_rows(summary: dict[str, dict[str, dict]]) -> list[list[str]]:
    """Cells of a table, a line a figure, a column a method: means, and differences with their intervals where there
    are some."""
    rows = [["", *summary]]
    for name in dict.fromkeys(n for figures in summary.values() for n in figures):
        if "share" in name and not any(f[name]["mean"] for f in summary.values() if name in f):
            continue  # nobody wrote such a section
        scale, digits = scale_of(name)
        row = [name]
        for figures in summary.values():
            f = figures.get(name)
            text = "" if f is None else f"{scale * f['mean']:.{digits}f}"
            if f is not None and f.get("difference_ci"):
                low, high = (scale * x for x in f["difference_ci"])
                text += f" ({low:+.{digits}f} to {high:+.{digits}f})"
            row.append(text)
        rows.append(row)
    return rows


def comparison_table(summary: dict[str, dict[str, dict]]) -> str:
    """These as plain text."""
    return aligned(comparison_rows(summary))


def step_costs(figures: dict[str, dict[str, dict]]) -> dict[str, float]:
    """How long a step of each method takes, in steps of the first: by the least time of its seeds, for other work on a
    machine only adds.

    >>> step_costs({"a": {SECONDS: {"seeds": [0.5, 0.9]}}, "b": {SECONDS: {"seeds": [4.0, 1.0]}}})
    {'a': 1.0, 'b': 2.0}
    """
    least = {name: min(own[SECONDS]["seeds"]) for name, own in figures.items() if SECONDS in own}
    first = next(iter(least.values()), 1.0)
    return {name: seconds / first for name, seconds in least.items()}


def at_equal_time(curve: Sequence[tuple[int, float]], cost: float) -> float:
    """The accuracy of a curve of (step, accuracy) when the first method has taken all its steps, between evaluations
    on a straight line; of a method whose step costs less, its last.

    >>> at_equal_time([(100, 0.4), (200, 0.6), (300, 0.8)], cost=2.0)
    0.5
    """
    steps, values = np.array(curve, dtype=float).T
    return float(np.interp(steps[-1] / cost, steps, values))


def plot_curves(curves: dict[str, list[list[tuple[int, float]]]], path: str | Path, costs: dict[str, float]) -> None:
    """Validation accuracy by step, and by time where a step's `costs` are known: a line a method, the mean over seeds,
    in a band from the lowest to the highest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = {"optimizer steps": dict.fromkeys(curves, 1.0)}
    if len(curves) > 1 and costs.keys() >= curves.keys():
        panels[f"time, in steps of {next(iter(curves))}"] = costs
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3 + 5 * len(panels), 4), sharey=True, squeeze=False, layout="constrained"
    )
    last = max(runs[0][-1][0] for runs in curves.values())
    for axis, (title, scale) in zip(axes[0], panels.items(), strict=True):
        for method, runs in curves.items():
            steps = [scale[method] * step for step, _ in runs[0]]
            values = 100 * np.array([[value for _, value in run] for run in runs])
            label = f"{method} ({len(runs)} seed{'s' * (len(runs) > 1)})"
            (line,) = axis.plot(steps, values.mean(0), label=label, linewidth=1.8)
            axis.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.12)
        axis.set(xlabel=title, xlim=(0, 1.03 * last))
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("greedy accuracy on validation examples (%)")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))  # beside the curves, which fill the picture
    figure.savefig(path, dpi=130)
    plt.close(figure)
