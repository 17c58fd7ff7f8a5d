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


def plot_curves(curves: dict[str, list[list[tuple[int, float]]]], path: str | Path) -> None:
    """Validation accuracy by step: a line a method, the mean over seeds, in a band from the lowest to the highest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    for method, runs in curves.items():
        steps = [step for step, _ in runs[0]]
        values = 100 * np.array([[value for _, value in run] for run in runs])
        (line,) = axis.plot(
            steps, values.mean(0), label=f"{method} ({len(runs)} seed{'s' * (len(runs) > 1)})", linewidth=1.8
        )
        axis.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.12)
    axis.set(xlabel="optimizer steps", ylabel="greedy accuracy on validation examples (%)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))  # beside the curves, which fill the picture
    figure.savefig(path, dpi=130)
    plt.close(figure)
