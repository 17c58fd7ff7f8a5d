"""`python -m tests.results_page` writes the results in README.md and docs/, and their plots, from docs/studies/*.json:
what the commands named there have written. No table is typed."""

import json
import re
from pathlib import Path

import numpy as np

from common.evaluation.comparison import AREA, NORM, at_equal_time, plot_curves, scale_of, step_costs

ROOT = Path(__file__).parents[1]
MISLED, UNHINTED, HINTED = "accuracy, misleading hint", "accuracy, real picture", "accuracy, right hint"
REPEATED = "misleading hint repeated"
SHORTCUT = {"hint misleads": MISLED, "no hint": UNHINTED, "hint right": HINTED, "misleading hint repeated": REPEATED}
DEFAULT = {
    "greedy": "test, greedy",
    "sampled": "test, sampled",
    "area under the curve": AREA,
    "other picture, accuracy lost": "reliance on other, accuracy",
    "last look right": "last read right",
    "entropy": "entropy",
}
SHORT = {title: DEFAULT[title] for title in ("greedy", "sampled", "area under the curve")}
RARITY = SHORT | {"purple read right": "purple read right", "ring read right": "ring read right"}
FORGETTING = SHORT | {
    "first look right": "first read right",
    "middle": "middle read right",
    "last look": "last read right",
}
CHATTER = SHORT | {
    "colours read right": "colour read right",
    "shapes": "shape read right",
    "entropy of chatter": "entropy of chatter",
    "gradient norm": NORM,
}
REWARDS = {
    "greedy": "test, greedy",
    "sampled": "test, sampled",
    "described": "description, share",
    "facts marked": "visual, share",
    "second look": "rethink, share",
}
SUMMARY = (  # flaw, study, what is measured, methods that promise to mend it, a control
    ("misreading, forgetting", "default", "sampled", "test, sampled", ("VPPO", "VGPO"), "oracle checked"),
    (
        "forgetting",
        "forgetting",
        "last look right",
        "last read right",
        ("VGPO", "VGPO one state earlier"),
        "oracle checked",
    ),
    (
        "shortcut",
        "shortcut_75",
        "hint misleads",
        MISLED,
        ("VPPO as published", "VPPO 0.1 shaping 0.5"),
        "oracle readings",
    ),
    ("chatter", "chatter", "sampled", "test, sampled", ("VPPO",), "oracle checked"),
    ("rarity", "rarity", "area under the curve", AREA, ("NoisyGRPO", "NoisyGRPO 0 to 0.3"), "oracle checked"),
    ("fragility", "robustness", "unseen corruptions", "test, unseen corruptions", ("ROMA",), ""),
    ("untold sections", "rewards", "sampled", "test, sampled", ("mixture", "visual fusion"), ""),
)
INSIDE = (
    "answers, described",
    "answers, described and second look",
    "description, things",
    "think, not described, as asked",
    "think, described, as asked",
    "second look, as asked",
    "think, described, readings",
    "second look, readings",
    "think, described, concluded",
    "second look, concluded",
    "think, described, answered",
    "second look, answered",
)
LEVELS = SHORT | {"gradient norm": NORM}
FLAWS = {  # what the default bed's teacher does wrong, and how much of it is left
    "colours read right": "colour read right",
    "shapes": "shape read right",
    "heights": "height read right",
    "first look right": "first read right",
    "middle": "middle read right",
    "last look": "last read right",
}
FIRST = ("before", "GRPO", "VPPO as published", "VGPO", "ROMA", "NoisyGRPO", "oracle undecided")
SCRIPTS = {"grpo": "GRPO", "roma": "ROMA", "vppo": "VPPO", "vgpo": "VGPO", "noisy_grpo": "NoisyGRPO"}


def study(name: str) -> dict:
    return json.loads((ROOT / f"docs/studies/{name}.json").read_text())


def number(figure: str, value: float, sign: bool = False) -> str:
    scale, digits = scale_of(figure)
    return f"{scale * value:{'+' if sign else ''}.{min(digits, 2)}f}".replace("-", "−")


def markdown(lines: list[list[str]]) -> str:
    head, *rows = lines
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def span(figure: str, cell: dict, first: dict) -> str:
    """Difference to the first method with its interval; of fewer than three seeds each seed's difference."""
    if "difference" not in cell:
        return ""
    if len(cell["seeds"]) < 3:
        pairs = zip(cell["seeds"], first["seeds"], strict=True)
        return ", ".join(number(figure, own - other, True) for own, other in pairs)
    ends = " to ".join(number(figure, x, True) for x in cell["difference_ci"])
    return f"{number(figure, cell['difference'], True)} ({ends})"


def methods_table(name: str, columns: dict[str, str], main: str, only: tuple[str, ...] = ()) -> str:
    """A line a method: means over seeds, and the paired difference to the first method in figure `main`."""
    figures, first = study(name)["figures"], next(iter(study(name)["methods"]))
    against = f"{next(title for title, f in columns.items() if f == main)}, against {first}"
    lines = [["", *columns, against]]
    for method, own in figures.items():
        if not only or method in only:
            cells = [number(f, own[f]["mean"]) if f in own else "" for f in columns.values()]
            lines.append([method, *cells, span(main, own.get(main, {}), figures[first][main])])
    return markdown(lines)


def summary_table() -> str:
    """For each flaw what the method that promises to mend it, and a control that knows the puzzle, have over GRPO."""
    lines = [["flaw", "measured", "method", "against GRPO", "control", "against GRPO"]]
    for flaw, name, title, figure, methods, control in SUMMARY:
        figures = study(name)["figures"]
        first = figures[next(iter(study(name)["methods"]))]
        over = {method: span(figure, own[figure], first[figure]) for method, own in figures.items() if figure in own}
        for n, method in enumerate(methods):
            whole = (flaw, title, method, over[method], control, over.get(control, ""))
            lines.append(["" if n and column not in (2, 3) else cell for column, cell in enumerate(whole)])
    return markdown(lines)


def hints_table() -> str:
    """GRPO where the hint is right more and more often; of the seed that all of these have."""
    lines = [["hint right in training", *SHORTCUT, "raw"]]
    for rate in (30, 40, 50, 75):
        own = study(f"shortcut_{rate}")["figures"]["GRPO"]
        cells = [number(figure, own[figure]["seeds"][0]) for figure in SHORTCUT.values()]
        lines.append([f"{rate} %", *cells, f"[study](studies/shortcut_{rate}.json)"])
    return markdown(lines)


def time_table(name: str) -> str:
    """Validation accuracy at equal steps and at equal time, means over seeds, and what a step costs."""
    lines, curves = [["", "a step's time", "validation, all steps", "validation, equal time"]], study(name)["curves"]
    for method, cost in step_costs(study(name)["figures"]).items():
        ends = (
            np.mean([run[-1][1] for run in curves[method]]),
            np.mean([at_equal_time(r, cost) for r in curves[method]]),
        )
        lines.append([method, f"{cost:.2f}", *(number("", float(end)) for end in ends)])
    return markdown(lines)


def provenance(name: str) -> str:
    """What made a study: seeds, versions, date, and the commands of its methods."""
    s = study(name)
    versions = ", ".join(f"{key} {value}" for key, value in s["versions"].items())
    commands = "\n".join(f"    {method}: {command}" for method, command in s["methods"].items())
    seeds = ", ".join(map(str, s["args"].get("seeds", [s["args"].get("seed")])))
    return f"Seeds {seeds}; {versions}; {s['date']}; [raw](studies/{name}.json).\n\n{commands}"


def gradients_rows(name: str) -> str:
    lines = [["", "cosine with the truth", "noise", "direction", "gain of a step (points)"]]
    for method, f in study(name)["summary"].items():
        cosine = "{:.3f} ({:.3f} to {:.3f})".format(f["cosine"], *f["cosine_ci"]) if "cosine" in f else ""
        direction = f"{f['direction']:.2f}" if f.get("direction") is not None else ""
        gain = "{} ({} to {})".format(*(number("", x, True) for x in (f["gain"], *f["gain_ci"])))
        lines.append([method, cosine, f"{f['noise']:.3f}", direction, gain])
    return markdown(lines)


def percent(f: dict) -> str:
    """A share and its interval, in percent."""
    return f"{number('', f['mean'])} ({' to '.join(number('', x) for x in f['ci'])})"


def sections_table() -> str:
    """How often the untold apprentice writes each section, and how often it is right when it does, in percent."""
    ((_, figures),) = study("untold")["summary"].items()
    lines = [["", "share of completions", "right"], ["all", "100", percent(figures["accuracy, real picture"])]]
    for title, name in (("described", "description"), ("facts marked", "visual"), ("second look", "rethink")):
        lines.append([title, percent(figures[f"{name}, share"]), percent(figures[f"{name}, accuracy with it"])])
    return markdown(lines)


def inside_table() -> str:
    """What is right inside the sections of completions, before training and after, in percent."""
    figures = study("sections")["figures"]
    lines = [["", *figures]]
    for title in INSIDE:
        lines.append([title, *(percent(own[title]) for own in figures.values())])
    return markdown(lines)


def exploration_table() -> str:
    """Shares of right readings and answers, in percent, behind noise and at higher temperatures."""
    lines = [["sampled with", "purple and ring read right", "other readings", "answers"]]
    for setting, own in study("exploration")["figures"].items():
        cells = (own[kind] for kind in ("rare", "others", "answers"))
        lines.append([setting, *map(percent, cells)])
    return markdown(lines)


def robustness_table() -> str:
    """Accuracy on clean and corrupted pictures, and what the other methods have over the first."""
    columns = {
        "clean": "test, greedy",
        "seen corruptions": "test, seen corruptions",
        "unseen corruptions": "test, unseen corruptions",
        "shifted puzzles": "shifted, greedy",
    }
    figures = study("robustness")["figures"]
    lines = [["", *columns]]
    methods = [method for method in figures if method != "before"]
    for method in methods:
        lines.append([method, *(number(f, figures[method][f]["mean"]) for f in columns.values())])
    for method in methods[1:]:
        differences = (span(f, figures[method][f], figures[methods[0]][f]) for f in columns.values())
        lines.append([f"{method}, against {methods[0]}", *differences])
    return markdown(lines)


def credit_table(name: str, only: tuple[str, ...] = ("",)) -> str:
    """What methods give to each kind of tokens and to right completions, with intervals over puzzles; of figures whose
    names begin with one of `only`."""
    figures = {title: parts for title, parts in study(name)["figures"].items() if title.startswith(only)}
    kinds = list(dict.fromkeys(kind for parts in figures.values() for kind in parts))
    lines = [["", *kinds]]
    for title, parts in figures.items():
        shown = {kind: "{:.3f} ({:.3f} to {:.3f})".format(f["mean"], *f["ci"]) for kind, f in parts.items()}
        lines.append([title, *(shown.get(kind, "") for kind in kinds)])
    return markdown(lines)


BLOCKS = {
    "credit": lambda: credit_table("credit"),
    "robustness": lambda: robustness_table(),
    "robustness-made-by": lambda: provenance("robustness"),
    "summary": lambda: summary_table(),
    "time": lambda: time_table("default"),
    "default": lambda: methods_table("default", DEFAULT, "test, sampled"),
    "flaws": lambda: methods_table("default", FLAWS, "last read right"),
    "rarity": lambda: methods_table("rarity", RARITY, AREA),
    "rarity-made-by": lambda: provenance("rarity"),
    "forgetting": lambda: methods_table("forgetting", FORGETTING, "last read right"),
    "forgetting-made-by": lambda: provenance("forgetting"),
    "chatter": lambda: methods_table("chatter", CHATTER, "test, sampled"),
    "chatter-made-by": lambda: provenance("chatter"),
    "credit-chatter": lambda: credit_table("credit_chatter", ("entropy", "VPPO: share")),
    "exploration": lambda: exploration_table(),
    "untold": lambda: sections_table(),
    "inside": lambda: inside_table(),
    "rewards": lambda: methods_table("rewards", REWARDS, "test, sampled"),
    "rewards-made-by": lambda: provenance("rewards"),
    "rates": lambda: methods_table("rates", SHORT, "test, sampled"),
    "rates-made-by": lambda: provenance("rates"),
    "parts": lambda: methods_table("parts", DEFAULT, "test, sampled"),
    "parts-made-by": lambda: provenance("parts"),
    "default-made-by": lambda: provenance("default"),
    "filter": lambda: methods_table("oracle_readings", DEFAULT, "test, sampled", ("GRPO", "oracle readings")),
    "shortcut": lambda: methods_table("shortcut_75", SHORTCUT, MISLED),
    "shortcut-short": lambda: methods_table("shortcut_75", SHORTCUT, MISLED, FIRST),
    "shortcut-made-by": lambda: provenance("shortcut_75"),
    "hints": lambda: hints_table(),
    "noisy-levels": lambda: methods_table("noisy_levels", LEVELS, "test, sampled"),
    "noisy-levels-made-by": lambda: provenance("noisy_levels"),
    "gradients-made-by": lambda: provenance("gradients"),
    "gradients": lambda: gradients_rows("gradients"),
}


def filled(text: str) -> str:
    """A page with the blocks that its comments name."""
    return re.sub(
        r"(<!-- results ([\w-]+) -->\n)(?:.*?\n)??(<!-- end -->)",
        lambda m: f"{m[1]}\n{BLOCKS[m[2]]()}\n\n{m[3]}",
        text,
        flags=re.S,
    )


def readme(text: str) -> str:
    """README.md with its blocks and, in the table of methods, each one's effect."""
    lines = text.split("\n")
    own = {method: found["test, sampled"] for method, found in study("default")["figures"].items()}
    for script, method in SCRIPTS.items():
        (n,) = (n for n, line in enumerate(lines) if line.startswith(f"| `{script}.py` |"))
        cells = lines[n].split(" | ")
        mean = f"{number('', own[method]['mean'])} %"
        cells[5] = mean if method == "GRPO" else span("", own[method], own["GRPO"])
        lines[n] = " | ".join(cells)
    return filled("\n".join(lines))


def plot_onset(path: Path) -> None:
    """Accuracy with a right, a misleading and no hint by training step, a panel a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    runs = study("onset")["runs"]
    figure, axes = plt.subplots(1, len(runs), figsize=(4.6 * len(runs), 3.6), sharey=True, layout="constrained")
    for axis, (method, by_step) in zip(np.atleast_1d(axes), runs.items(), strict=True):
        steps = sorted(map(int, by_step))
        for title, name, style in (
            ("right hint", HINTED, "--"),
            ("no hint", UNHINTED, "-"),
            ("misleading hint", MISLED, "-"),
            ("misleading hint repeated", REPEATED, ":"),
        ):
            values = [100 * by_step[str(step)][name] for step in steps]
            axis.plot(steps, values, style, label=title, linewidth=1.8)
        rewards = np.array(study("onset")["reward"][method])
        smooth = np.convolve(rewards, np.ones(10) / 10, "valid")
        axis.plot(np.arange(len(smooth)) + 10, 100 * smooth, color="0.6", label="training reward", linewidth=1)
        axis.set(title=method, xlabel="optimizer steps", ylim=(0, 102))
        axis.grid(alpha=0.3)
    np.atleast_1d(axes)[0].set_ylabel("%")
    np.atleast_1d(axes)[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    for path in (ROOT / "docs").glob("*.md"):
        path.write_text(filled(path.read_text()))
    (ROOT / "README.md").write_text(readme((ROOT / "README.md").read_text()))
    default = study("default")
    plot_curves(default["curves"], ROOT / "assets/study_default.png", step_costs(default["figures"]))
    plot_onset(ROOT / "assets/shortcut_onset.png")
