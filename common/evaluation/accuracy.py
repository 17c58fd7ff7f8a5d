"""Accuracy on held-out examples, with a 95 % interval, over all and for each group; and under corrupted pictures.

    python -m common.evaluation --model tiny --split test
    python -m common.evaluation --model tiny runs/grpo-tiny-seed1 --split shifted --samples 4 --temperature 1
    python -m common.evaluation --model runs/grpo-tiny-seed1 runs/roma-tiny-seed1 --corruptions seen unseen --out r.json

With `--corruptions` every example is answered clean and under each corruption at each severity (a cell), with the same
pixels for every model. Finished cells are kept in `--out`: the same command goes on where it was stopped, and one with
other models, corruptions or severities adds to the file. A file of other settings, examples or weights is refused.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.corruptions import SEEN, UNSEEN, choose, corrupt
from common.data.examples import TEMPLATE, Example, build_messages, check_template, load_examples
from common.data.sets import SOURCES, special_scores
from common.model.load import TINY, Policy, check_model, encode_prompts, load_policy, replace_images
from common.model.sampling import decode, sample, uniform_numbers
from common.model.scoring import Scorer
from common.rewards.answers import score
from common.run.folder import check_least, checksum, memory_advice, write


@dataclass
class Args:
    model: tuple[str, ...] = ("tiny",)
    """models to compare: tiny, a run folder (its newest checkpoint), a checkpoint, a folder or a hub id"""
    data: str = "puzzles"
    """puzzles, a short name of common/data/sets.py, a .jsonl or .parquet file, a folder, or a hub id"""
    benchmark: tuple[str, ...] = ()
    """instead of one `data`: several benchmarks of common/data/sets.py, each `NAME` or `NAME=FOLDER`"""
    split: str = "test"
    """which part of it"""
    limit: int | None = None
    """examples, the first of the split (default: 500 puzzles, all of any other set; 0: all)"""
    samples: int = 1
    """completions an example; their mean accuracy counts"""
    temperature: float = 0.0
    """0: greedy"""
    max_completion_length: int = 0
    """longest completion in tokens (default: 72 for the built-in model and its runs, else 2048)"""
    prompt_template: str = ""
    """what the model reads (default: what the run trained with, else the standard one)"""
    image_column: str = ""
    question_column: str = ""
    answer_column: str = ""
    kind: str = ""
    """how answers are checked: math, int, letter, ..."""
    max_pixels: int = 0
    """bound on an image's area after resizing (0: as the checkpoint says)"""
    batch_prompts: int = 64
    """examples decoded together; lower it when memory runs out"""
    seed: int = 1
    """of the sampling, where the temperature is above 0"""
    corruptions: tuple[str, ...] | None = None
    """also corrupt the pictures: names, `seen`, `unseen`, `all` (see common/corruptions.py)"""
    severities: tuple[int, ...] | None = None
    """severities of these corruptions, 1 to 5 (default: 1 3 5)"""
    out: str = ""
    """.json file for settings and results; what it holds is kept; a plot of the same name comes with --corruptions"""


def evaluate(
    policy: Policy,
    examples: Sequence[Example],
    *,
    template: str = TEMPLATE,
    samples: int = 1,
    temperature: float = 0.0,
    max_new_tokens: int,
    batch_prompts: int = 64,
    seed: int = 0,
    corruption: tuple[str, int] | None = None,
    accelerator=None,
) -> dict:
    """Answer every example `samples` times, with pictures corrupted by name and severity if asked; check the answers.

    With an accelerator of several processes each takes every W-th example and all return the same result:
    accuracy, ci_low, ci_high, count, mean_length, truncated, groups (the same figures a group) and rows.

    Raises:
        ValueError: there are no examples.
    """
    if not len(examples):
        raise ValueError("no examples to evaluate on")
    processes = accelerator.num_processes if accelerator else 1
    # Prompts of a like length pad each other little; the longest first, so that memory runs out at once or never.
    sizes = getattr(examples, "sizes", [0] * len(examples))
    order = sorted(range(len(examples)), key=lambda n: -sizes[n])
    mine = order[accelerator.process_index if accelerator else 0 :: processes]
    rows = []
    for start in range(0, len(mine), batch_prompts):
        numbers = mine[start : start + batch_prompts]
        batch = [examples[n] for n in numbers]
        pictures = [list(e.images) for e in batch]
        if corruption:  # seeds are the examples' places, so that every model sees the same pixels
            pictures = [
                [corrupt(image, *corruption, (n, i)) for i, image in enumerate(images)]
                for n, images in zip(numbers, pictures, strict=True)
            ]
        prompts = encode_prompts(policy, [build_messages(e, template) for e in batch], pictures)
        places = [n * samples + k for n in numbers for k in range(samples)]
        noise = uniform_numbers(seed, 0, places, max_new_tokens) if temperature else None
        rollout = sample(policy, prompts, samples, max_new_tokens, noise, temperature=temperature)
        texts = decode(policy, rollout)
        right, _ = score(texts, [e for e in batch for _ in range(samples)])
        lengths = rollout.completion_mask.sum(1).tolist()
        for i, (number, example) in enumerate(zip(numbers, batch, strict=True)):
            own = slice(i * samples, (i + 1) * samples)
            rows.append(
                {
                    "number": number,
                    "id": example.id,
                    "group": example.group,
                    "question": example.question,
                    "answer": example.answer,
                    "completions": texts[own],
                    "correct": right[own],
                    "lengths": lengths[own],
                    "truncated": (~rollout.ended[own]).tolist(),
                }
            )
    if processes > 1:
        from accelerate.utils import gather_object

        rows = gather_object(rows)
    rows.sort(key=lambda row: row["number"])
    return summarize(rows)


def summarize(rows: list[dict]) -> dict:
    """Figures over all rows and over those of each group."""

    def figures(rows: list[dict]) -> dict:
        means = [sum(row["correct"]) / len(row["correct"]) for row in rows]
        low, high = interval(means, binary=all(len(row["correct"]) == 1 for row in rows))
        return {"accuracy": sum(means) / len(means), "ci_low": low, "ci_high": high, "count": len(rows)}

    groups = {
        name: figures([row for row in rows if row["group"] == name]) for name in sorted({r["group"] for r in rows})
    }
    lengths = [length for row in rows for length in row["lengths"]]
    cut = [flag for row in rows for flag in row["truncated"]]
    return {
        **figures(rows),
        "mean_length": sum(lengths) / len(lengths),
        "truncated": sum(cut) / len(cut),
        "groups": groups if set(groups) != {""} else {},
        "rows": rows,
    }


def interval(means: list[float], binary: bool) -> tuple[float, float]:
    """95 % interval of a mean accuracy over examples: Wilson's where each has one verdict, else the normal one of the
    examples' means, since several samples of one example are not independent. Means that are all the same would give
    the normal interval no width; they get Wilson's, too.

    >>> [round(x, 3) for x in interval([1.0] * 8 + [0.0] * 2, binary=True)]
    [0.49, 0.943]
    """
    n, z = len(means), 1.959964
    p = sum(means) / n
    if binary or len(set(means)) == 1:
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    else:
        variance = sum((m - p) ** 2 for m in means) / max(n - 1, 1)
        centre, half = p, z * math.sqrt(variance / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def table(results: dict[str, dict]) -> str:
    """A plain-text table, a line a model: accuracy in percent with its interval, each group, length."""
    groups = list(dict.fromkeys(g for result in results.values() for g in result["groups"]))
    header = ["model", "accuracy", "95 % interval", *groups, "tokens", "cut off"]
    lines = [header]
    for name, result in results.items():
        by_group = [f"{100 * result['groups'][g]['accuracy']:.1f}" if g in result["groups"] else "" for g in groups]
        spread = f"{100 * result['ci_low']:.1f} - {100 * result['ci_high']:.1f}"
        ends = [f"{result['mean_length']:.1f}", f"{100 * result['truncated']:.1f}"]
        lines.append([name, f"{100 * result['accuracy']:.1f}", spread, *by_group, *ends])
    return aligned(lines)


def aligned(lines: list[list[str]]) -> str:
    """Lines of cells as text, the first column to the left, the others to the right."""
    first, *widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join([line[0].ljust(first), *map(str.rjust, line[1:], widths)]) for line in lines)


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
    for name, severity in [("clean", 0), *product(corruptions, severities)]:
        cell = f"{name}/{severity}"
        if cell not in cells:
            corruption = (name, severity) if severity else None
            rows = evaluate(policy, examples, corruption=corruption, **options)["rows"]
            cells[cell] = [sum(row["correct"]) / len(row["correct"]) for row in rows]
            keep(cells)
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


def show_robustness(folder: Path, models: dict[str, dict[str, list[float]]]) -> None:
    """Print the table of some models' cells; keep figures, cells and plot in `folder`."""
    summary = robustness_summary(models)
    print(robustness_table(summary))
    write_results(folder / "robustness.json", {"summary": summary, "cells": models})
    plot_robustness(summary, folder / "robustness.png")


def write_results(path: str | Path, content: dict) -> None:
    """Write strict JSON, which knows no NaN."""
    write(Path(path), json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False))


def image_reliance(
    policy: Policy, examples: Sequence[Example], *, template: str, max_new_tokens: int, batch_prompts: int = 64
) -> float:
    """How much likelier the policy's own greedy completions are with their pictures than with mid-grey ones, in nats a
    token (ROMA's collapse watch: a policy that goes blind comes to 0)."""
    scorer, gaps, tokens = Scorer(policy), 0.0, 0
    was_training = policy.model.training
    policy.model.eval()
    for start in range(0, len(examples), batch_prompts):
        batch = [examples[n] for n in range(start, min(start + batch_prompts, len(examples)))]
        pictures = [list(e.images) for e in batch]
        prompts = encode_prompts(policy, [build_messages(e, template) for e in batch], pictures)
        grey = [[Image.new("RGB", image.size, (128, 128, 128)) for image in images] for images in pictures]
        blank = replace_images(policy, prompts, grey)
        rollout = sample(policy, prompts, 1, max_new_tokens, None, temperature=0)
        ids, mask = rollout.completion_ids, rollout.completion_mask
        with torch.no_grad():
            gaps += float((scorer(prompts, ids, mask).logprobs - scorer(blank, ids, mask).logprobs).sum())
        tokens += int(mask.sum())
    policy.model.train(was_training)
    return gaps / max(tokens, 1)


def newest_checkpoint(name: str) -> str:
    """A run folder's newest complete checkpoint; any other name as it is.

    Raises:
        SystemExit: the run has none yet, or `runs/NAME` is not there (a hub id could have that form).
    """
    folder = Path(name)
    if folder.parent.name == "runs" and not folder.exists():
        raise SystemExit(f"--model {name}: no such run folder")
    if not (folder / "args.json").is_file():
        return name
    complete = [path.parent for path in folder.glob("checkpoints/step-*/complete")]
    if not complete:
        raise SystemExit(f"--model {name}: the run has no complete checkpoint yet")
    return str(max(complete, key=lambda path: int(path.name.removeprefix("step-"))))


def usual(name: str) -> dict:
    """What a run, or a checkpoint's run, trained with; for any other model the standard template and a completion
    length of 2048, 72 for the built-in one."""
    usual = {"max_completion_length": 72 if name == "tiny" else 2048, "prompt_template": TEMPLATE}
    for folder in (Path(name), Path(name).parent.parent):
        if (folder / "args.json").is_file():
            return usual | json.loads((folder / "args.json").read_text())
    return usual


def check(args: Args) -> None:
    """Stop with one line before anything long starts."""
    least = {"limit": 0, "samples": 1, "temperature": 0, "batch_prompts": 1, "max_completion_length": 0}
    check_least(args, least | {"max_pixels": 0, "seed": 0})
    if args.samples > 1 and not args.temperature:
        raise SystemExit(f"--samples {args.samples}: greedy answers are all the same; pass a --temperature above 0")
    if args.out and not (Path(args.out).parent.is_dir() and not Path(args.out).is_dir()):
        raise SystemExit(f"--out {args.out}: not a file in a folder that exists")
    if args.out and Path(args.out).suffix != ".json":
        raise SystemExit(f"--out {args.out}: must end in .json")
    if args.prompt_template:
        check_template(args.prompt_template)
    for name in args.benchmark:
        if name.split("=")[0] not in SOURCES:
            raise SystemExit(f"--benchmark {name}: choose among {', '.join(SOURCES)}, with =FOLDER behind for a folder")
    try:
        choose(args.corruptions or ())
    except ValueError as error:
        raise SystemExit(f"--corruptions: {error}") from None
    for name in ("corruptions", "severities"):
        if getattr(args, name) == ():
            raise SystemExit(f"--{name}: nothing stands behind it")
    if not set(args.severities or ()) <= {1, 2, 3, 4, 5}:
        raise SystemExit(f"--severities {' '.join(map(str, args.severities))}: each must be one of 1 to 5")
    if args.severities and not args.corruptions:
        raise SystemExit(f"--severities {' '.join(map(str, args.severities))}: of what? Pass --corruptions with it")


@memory_advice("--batch-prompts, --samples, --max-completion-length or --max-pixels")
def main(args: Args) -> dict[str, dict]:
    check(args)
    return benchmarks(args) if args.benchmark else evaluate_on(args)[0]


def benchmarks(args: Args) -> dict[str, dict]:
    """Every model on every benchmark, and their means; each benchmark's results are kept in a file of their own beside
    `--out`, which is made from these, so that the same command goes on where it stopped."""
    results, cells = {}, {}
    read_results(args.out, "benchmarks")
    for data in args.benchmark:
        name, out = data.split("=")[0], ""
        if args.out:
            out = str(Path(args.out).with_name(f"{Path(args.out).stem}-{name}.json"))
        results[name], cells[name] = evaluate_on(replace(args, data=data, benchmark=(), out=out))
        print()
    content = {"benchmarks": results}
    if args.corruptions:
        content["summary"] = robustness_summary(*cells.values())
        print(f"mean over {', '.join(results)}")
        print(robustness_table(content["summary"]))
    else:
        lines = [["model", *results]]
        for model in args.model:
            figures = [result[model] for result in results.values()]
            spans = [(100 * f["accuracy"], 100 * f["ci_low"], 100 * f["ci_high"]) for f in figures]
            lines.append([model, *(f"{mean:.1f} ({low:.1f}-{high:.1f})" for mean, low, high in spans)])
        print(aligned(lines))
        for name, result in results.items():
            for title in next(iter(result.values()))["special"]:
                figures = ", ".join(f"{model} {100 * result[model]['special'][title]:.1f}" for model in args.model)
                print(f"{name}, {title}: {figures}")
    if args.out:
        write_results(args.out, content)
        if args.corruptions:
            plot_robustness(content["summary"], Path(args.out).with_suffix(".png"))
    return results


def evaluate_on(args: Args) -> tuple[dict[str, dict], dict[str, dict]]:
    """Every model on one set: tables printed and results kept in `--out`. Returns figures a model and, under
    corruptions, the cells that they are made of."""
    marks = {name: mark(newest_checkpoint(name)) for name in args.model}
    for held in marks.values():  # before the first one is evaluated
        check_model(held["checkpoint"])
    columns = {name: getattr(args, name) for name in ("image_column", "question_column", "answer_column", "kind")}
    limit = (500 if args.data == "puzzles" else 0) if args.limit is None else args.limit
    examples = load_examples(args.data, args.split, limit=limit or None, **columns)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Settings that change what a cell holds; the models and the cells asked for may differ from what a file has.
    settings = asdict(args) | dict.fromkeys(("model", "corruptions", "severities", "out", "batch_prompts"))
    held = known_results(args.out, settings | {"limit": len(examples)}, marks)
    names, severities = choose(args.corruptions or ()), args.severities or (1, 3, 5)
    wanted = [CLEAN, *(f"{name}/{severity}" for name, severity in product(names, severities))]
    for name in marks:
        result = held["models"].get(name, {})
        finished = "accuracy" in result and args.data.split("=")[0] in SOURCES
        if set(wanted) <= set(result.get("cells", ())) if args.corruptions else finished:
            continue
        policy = None  # let go of the last model before the next is loaded
        policy = load_policy(marks[name]["checkpoint"], device=device, trainable=False, max_pixels=args.max_pixels)
        options = dict(
            template=args.prompt_template or usual(name)["prompt_template"],
            samples=args.samples,
            temperature=args.temperature,
            max_new_tokens=args.max_completion_length or usual(name)["max_completion_length"],
            batch_prompts=args.batch_prompts,
            seed=args.seed,
        )
        result = held["models"][name] = result | marks[name]

        def save(cells: dict | None = None, result=result) -> None:
            result.update({"cells": cells} if cells else {})
            if args.out:
                write_results(args.out, held)

        if args.corruptions:
            robustness(policy, examples, names, severities, known=result.get("cells"), keep=save, **options)
        else:
            result.update(evaluate(policy, examples, **options))
            rows = [(row["id"], row["group"], sum(row["correct"]) / len(row["correct"])) for row in result["rows"]]
            result["special"] = special_scores(args.data.split("=")[0], rows)
            save()
    answered = f"{args.samples} samples each at temperature {args.temperature}" if args.temperature else "greedy"
    print(f"{args.data}, split {args.split}, {len(examples)} examples, {answered}")
    results = {name: held["models"][name] for name in marks}
    if not args.corruptions:
        print(table(results))
        return results, {}
    cells = {name: {cell: result["cells"][cell] for cell in wanted} for name, result in results.items()}
    held["summary"] = robustness_summary(cells)
    print(robustness_table(held["summary"]))
    if args.out:
        write_results(args.out, held)
        plot_robustness(held["summary"], Path(args.out).with_suffix(".png"))
    return held["summary"], cells


def mark(checkpoint: str) -> dict[str, str]:
    """A checkpoint's name, and what changes with its weights: the checksum of a run's list of checksums or of the
    built-in weights, else names, sizes and times of a folder's weight files; nothing for a hub id."""
    sealed = TINY / "model.safetensors" if checkpoint == "tiny" else Path(checkpoint) / "complete"
    if sealed.is_file():
        return {"checkpoint": checkpoint, "weights": checksum(sealed)}
    files = sorted(file for ending in ("safetensors", "bin") for file in Path(checkpoint).glob(f"*.{ending}"))
    weights = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return {"checkpoint": checkpoint, "weights": ", ".join(weights)}


def read_results(out: str, *keys: str) -> dict:
    """What an earlier command left in `out`, nothing where it is not there.

    Raises:
        SystemExit: the file is not JSON with these keys.
    """
    if not out or not Path(out).is_file():
        return {}
    try:
        held = json.loads(Path(out).read_bytes())
    except ValueError:
        held = None
    if not isinstance(held, dict) or not all(isinstance(held.get(key), dict) for key in keys):
        raise SystemExit(f"--out {out}: holds something else; name another file")
    return held


def known_results(out: str, settings: dict, marks: dict[str, dict]) -> dict:
    """What an earlier, perhaps interrupted command of the same settings left in `out`, with all its models. A file from
    before weights were marked goes by the checkpoints' names.

    Raises:
        SystemExit: the file holds something else, or figures of other settings, examples or weights.
    """
    held = read_results(out, "args", "models")
    if not held:
        return {"args": settings, "models": {}}
    for key, value in json.loads(json.dumps(settings)).items():
        before = held["args"].get(key)
        if before != value and key != "limit":  # of which the file's examples tell more than what was asked for
            flag = "--" + key.replace("_", "-")
            raise SystemExit(f"--out {out}: {flag} was {before!r} there and is {value!r} now; name another file")
    kept = [part for m in held["models"].values() for part in (*m.get("cells", {}).values(), m.get("rows"))]
    if others := {len(part) for part in kept if part} - {settings["limit"]}:
        counts = f"{others.pop()} examples, there are {settings['limit']} now (--data, --limit)"
        raise SystemExit(f"--out {out}: holds figures of {counts}; name another file")
    for name in marks.keys() & held["models"].keys():
        before = {key: held["models"][name].get(key, value) for key, value in marks[name].items()}
        if before != marks[name]:
            weights = f"other weights of {name} ({before['checkpoint']})"
            raise SystemExit(f"--out {out}: holds figures of {weights}; name another file")
    return held | {"args": settings}
