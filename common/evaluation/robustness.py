"""Accuracy under corrupted pictures: what a policy keeps of its accuracy on clean ones, and how policies differ.

Every example is answered clean and under each corruption at each severity (a cell, `fog/3`), with the same pixels for
every policy, so that differences are paired.
"""

import json
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numpy as np

from common.corruptions import SEEN, UNSEEN
from common.data.examples import Example
from common.evaluation.accuracy import aligned, at_most, evaluate
from common.model.load import Policy
from common.run.files import one_line, write
from common.run.progress import Progress

CLEAN = "clean/0"


def robustness(
    policy: Policy,
    examples: Sequence[Example],
    corruptions: Sequence[str],
    severities: Sequence[int],
    *,
    known: dict[str, list[float]] | None = None,
    keep: Callable[[dict], None] = lambda cells: None,
    **options,
) -> dict[str, list[float]]:
    """Accuracy of every example in every cell, `{"clean/0": [...], "fog/3": [...], ...}`.

    Cells that are `known` are not computed again; `keep` is called with all cells after each new one; the other options
    are those of `evaluate`.
    """
    cells = dict(known or {})
    wanted = [("clean", 0), *product(corruptions, severities)]
    missing = [cell for cell in wanted if "{}/{}".format(*cell) not in cells]
    accelerator, progress = options.get("accelerator"), None
    if not accelerator or accelerator.is_main_process:
        text = at_most(len(missing) * len(examples) * options.get("samples", 1), options["max_new_tokens"])
        progress = Progress(len(missing) * len(examples), name=f"{len(missing)} cells", text=text)
    try:
        for name, severity in missing:
            corruption = (name, severity) if severity else None
            rows = evaluate(policy, examples, corruption=corruption, progress=progress, **options)["rows"]
            cells[f"{name}/{severity}"] = [sum(row["correct"]) / len(row["correct"]) for row in rows]
            keep(cells)
    finally:
        if progress is not None:
            progress.close()
    return cells


def mean_over_cells(cells: dict[str, list[float]], names: Sequence[str]) -> np.ndarray | None:
    """Each example's mean accuracy [E] (or [S, E]) over the cells of some corruptions; None without any. Cells weigh
    alike, so a mean over severities of means over corruptions is the same number."""
    chosen = [values for cell, values in cells.items() if cell.rsplit("/", 1)[0] in names]
    return np.mean(chosen, axis=0) if chosen else None


def bootstrap(differences: np.ndarray | list[np.ndarray], draws: int = 10_000) -> tuple[float, float]:
    """95 % interval of the mean of paired differences [E], or [S, E] over training seeds and examples: both are drawn
    again with replacement (percentiles, too narrow for few seeds where these vary more than the examples). The same
    examples stand in every row, so they are drawn once for all rows. Of a list, a table a benchmark, it is the interval
    of the mean of their means: the same seeds, each its examples."""
    tables = [np.atleast_2d(d) for d in (differences if isinstance(differences, list) else [differences])]
    dice, seeds = np.random.default_rng(0), len(tables[0])
    means = np.empty(draws)
    for draw in range(draws):
        chosen = dice.integers(0, seeds, seeds) if seeds > 1 else None
        rows = [table[chosen].mean(0) if seeds > 1 else table[0] for table in tables]
        means[draw] = sum(row[dice.integers(0, len(row), len(row))].mean() for row in rows) / len(rows)
    return tuple(np.quantile(means, [0.025, 0.975]).tolist())


def robustness_summary(*benchmarks: dict[str, dict[str, list[float]]]) -> dict[str, dict]:
    """Figures a model, from the cells of every model on one benchmark or on each of several (then means over these):
    accuracy clean, on seen and unseen corruptions (and on others), the drop from clean, what share of clean is retained
    (None where clean is 0), and the difference to the first model; paired 95 % bootstrap intervals of drop and
    difference."""
    sets = {"clean": ("clean",), "seen": SEEN, "unseen": UNSEEN}
    rest = {cell.rsplit("/", 1)[0] for cells in benchmarks[0].values() for cell in cells} - {"clean", *SEEN, *UNSEEN}
    sets |= {"others": tuple(sorted(rest))}
    average = lambda tables: float(np.mean([np.mean(table) for table in tables]))
    first, summary = next(iter(benchmarks[0])), {}
    for model in benchmarks[0]:
        own = [models[model] for models in benchmarks]
        clean = [mean_over_cells(cells, ("clean",)) for cells in own]
        figures = summary[model] = {}
        for title, names in sets.items():
            values = [mean_over_cells(cells, names) for cells in own]  # a benchmark: [E] or [S, E]
            if values[0] is None:
                continue
            drops = [c - v for c, v in zip(clean, values, strict=True)]
            figures[title] = {"accuracy": average(values), "drop": average(drops)}
            if title != "clean":
                figures[title]["drop_ci"] = bootstrap(drops)
            kept = [v.mean() / c.mean() for c, v in zip(clean, values, strict=True) if c.any()]
            figures[title]["retained"] = average(kept) if len(kept) == len(clean) else None
            against = [mean_over_cells(models[first], names) for models in benchmarks]
            if model != first and against[0] is not None:
                differences = [v - a for v, a in zip(values, against, strict=True)]
                figures[title]["difference"] = average(differences)
                figures[title]["difference_ci"] = bootstrap(differences)
        figures["cells"] = {cell: average([cells[cell] for cells in own]) for cell in own[0]}
    return summary


def robustness_table(summary: dict[str, dict]) -> str:
    """Plain-text tables in percent: accuracy and what is kept of clean; drops from clean; differences to the first
    model; and, a line a corruption and model, every severity."""
    percent = lambda x: "" if x is None else f"{100 * x:.1f}"
    first, *others = summary
    titles = [title for title in summary[first] if title != "cells"]
    tables = [[["model", *titles, *(f"kept {t}" for t in titles[1:])]]]
    for model, figures in summary.items():
        kept = (percent(figures[t]["retained"]) for t in titles[1:])
        tables[0].append([model, *(percent(figures[t]["accuracy"]) for t in titles), *kept])

    def spans(head: str, key: str, models: list[str], titles: list[str]) -> list[list[str]]:
        lines = [[head, *titles]]
        for model in models:
            found = [(summary[model][t][key], *summary[model][t][f"{key}_ci"]) for t in titles]
            lines.append([model, *("{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * x for x in f)) for f in found)])
        return lines

    tables.append(spans("drop from clean", "drop", [first, *others], titles[1:]))
    tables.append(spans(f"against {first}", "difference", others, titles))
    cells = [cell.rsplit("/", 1) for cell in summary[first]["cells"] if cell != CLEAN]
    severities = sorted({severity for _, severity in cells})
    tables.append([["corruption", "model", *(f"severity {s}" for s in severities), "mean"]])
    for name, model in product(dict.fromkeys(name for name, _ in cells), summary):
        values = [summary[model]["cells"].get(f"{name}/{s}") for s in severities]
        mean = float(np.mean([v for v in values if v is not None]))
        tables[-1].append([name, model, *map(percent, values), percent(mean)])
    # Without corruptions there are no drops, with one model no differences: a head alone is not a table.
    return "\n\n".join(aligned(lines) for lines in tables if len(lines) > 1 and len(lines[0]) > 1)


def plot_robustness(summary: dict[str, dict], path: str | Path) -> None:
    """Accuracy against severity, one line a model, clean as the start; a panel each for seen, unseen and others."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = next(iter(summary.values()))["cells"]
    names = dict.fromkeys(cell.rsplit("/", 1)[0] for cell in cells if cell != CLEAN)
    panels = {"seen": [n for n in names if n in SEEN], "unseen": [n for n in names if n in UNSEEN]}
    panels["others"] = [n for n in names if n not in SEEN + UNSEEN]
    panels = {title: members for title, members in panels.items() if members}
    severities = sorted({int(cell.rsplit("/", 1)[1]) for cell in cells})
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.8), sharey=True, squeeze=False)
    for axis, (title, members) in zip(axes[0], panels.items(), strict=True):
        for model, figures in summary.items():
            line = [100 * np.mean([figures["cells"][f"{n}/{s}" if s else CLEAN] for n in members]) for s in severities]
            axis.plot(severities, line, marker="o", label=model)
        axis.set(title=f"{title}: {', '.join(members)}", xlabel="severity (0: clean)", xticks=severities)
        axis.title.set_size(8)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("accuracy (%)")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def keep_robustness(folder: Path, summary: dict[str, dict], models: dict[str, dict[str, list[float]]]) -> None:
    """Keep some models' figures, cells and plot in `folder`."""
    with one_line(str(folder)):
        write_results(folder / "robustness.json", {"summary": summary, "cells": models})
        plot_robustness(summary, folder / "robustness.png")


def write_results(path: str | Path, content: dict) -> None:
    """Write strict JSON, which knows no NaN."""
    write(Path(path), json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False))
