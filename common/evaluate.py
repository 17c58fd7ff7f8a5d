"""Accuracy on held-out examples, with a 95 % interval, over all and for each group; and under corrupted pictures.

    python -m common.evaluate --model tiny --split test
    python -m common.evaluate --model tiny runs/grpo-tiny-seed1 --split shifted --samples 4 --temperature 1
    python -m common.evaluate --model runs/grpo-tiny-seed1 runs/roma-tiny-seed1 --corruptions seen unseen --out r.json

With `--corruptions` every example is answered clean and under each corruption at each severity (a cell), with the same
pixels for every model. Finished cells are kept in `--out`: the same command goes on where it was stopped.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image

from common.corruptions import SEEN, UNSEEN, choose, corrupt
from common.data import TEMPLATE, Example, build_messages, check_template, load_examples
from common.forward import Scorer
from common.model import Policy, encode_prompts, load_policy, replace_images
from common.rewards import score
from common.rollout import decode, sample, uniform_numbers
from common.run import memory_advice, write
from common.sets import SOURCES, special_scores


@dataclass
class Args:
    model: tuple[str, ...] = ("tiny",)
    """models to compare: tiny, a run folder (its newest checkpoint), a checkpoint, a folder or a hub id"""
    data: str = "puzzles"
    """puzzles, a short name of common/sets.py, a .jsonl or .parquet file, a folder, or a hub id"""
    benchmark: tuple[str, ...] = ()
    """instead of one `data`: several benchmarks of common/sets.py, each `NAME` or `NAME=FOLDER`"""
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
    corruptions: tuple[str, ...] = ()
    """also corrupt the pictures: names, `seen`, `unseen`, `all` (see common/corruptions.py)"""
    severities: tuple[int, ...] = (1, 3, 5)
    """severities of these corruptions, 1 to 5"""
    out: str = ""
    """JSON file for settings and results; a plot of the same name comes with --corruptions"""


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


def bootstrap(differences: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """95 % interval of the mean of paired differences [E], or [S, E] over training seeds and examples: both are drawn
    again with replacement (percentiles). The same examples stand in every row, so they are drawn once for all rows."""
    dice, table = np.random.default_rng(0), np.atleast_2d(differences)
    seeds, examples = table.shape
    means = np.empty(draws)
    for draw in range(draws):
        rows = table[dice.integers(0, seeds, seeds)].mean(0) if seeds > 1 else table[0]
        means[draw] = rows[dice.integers(0, examples, examples)].mean()
    return tuple(np.quantile(means, [0.025, 0.975]).tolist())


def robustness_summary(models: dict[str, dict[str, list[float]]]) -> dict[str, dict]:
    """Figures a model: accuracy clean, on seen and unseen corruptions (and on others), the drop from clean, what share
    of clean is retained, and the paired difference to the first model with its 95 % bootstrap interval."""
    sets = {"clean": ("clean",), "seen": SEEN, "unseen": UNSEEN}
    rest = {cell.rsplit("/", 1)[0] for cells in models.values() for cell in cells} - {"clean", *SEEN, *UNSEEN}
    sets |= {"others": tuple(sorted(rest))}
    first, summary = next(iter(models.values())), {}
    for model, cells in models.items():
        clean = mean_over_cells(cells, ("clean",)).mean()
        figures = summary[model] = {}
        for title, names in sets.items():
            values = mean_over_cells(cells, names)
            if values is None:
                continue
            figures[title] = {"accuracy": values.mean(), "drop": clean - values.mean()}
            figures[title]["retained"] = values.mean() / clean if clean else float("nan")
            against = mean_over_cells(first, names)
            if cells is not first and against is not None:
                figures[title]["difference"] = (values - against).mean()
                figures[title]["difference_ci"] = bootstrap(values - against)
        figures["cells"] = {cell: float(np.mean(values)) for cell, values in cells.items()}
    return summary


def robustness_table(summary: dict[str, dict]) -> str:
    """A plain-text table in percent: the sets with their drops and differences, then every corruption, mean over its
    severities."""
    percent = lambda x: f"{100 * x:.1f}"
    first = next(iter(summary.values()))
    titles = [title for title in first if title != "cells"]
    header = ["model", *titles, *(f"drop {t}" for t in titles[1:]), *(f"kept {t}" for t in titles[1:])]
    lines = [header]
    for model, figures in summary.items():
        line = [model, *(percent(figures[t]["accuracy"]) for t in titles)]
        line += [percent(figures[t]["drop"]) for t in titles[1:]]
        lines.append(line + [percent(figures[t]["retained"]) for t in titles[1:]])
    text = aligned(lines)
    if len(summary) > 1:
        lines = [[f"against {next(iter(summary))}", *titles]]
        for model, figures in list(summary.items())[1:]:
            spans = [(100 * figures[t]["difference"], *(100 * x for x in figures[t]["difference_ci"])) for t in titles]
            lines.append([model, *(f"{d:+.1f} ({low:+.1f} to {high:+.1f})" for d, low, high in spans)])
        text += "\n\n" + aligned(lines)
    names = list(dict.fromkeys(cell.rsplit("/", 1)[0] for cell in first["cells"]))
    lines = [["corruption", *summary]]
    for name in names:
        values = [[v for c, v in f["cells"].items() if c.rsplit("/", 1)[0] == name] for f in summary.values()]
        lines.append([name, *(percent(float(np.mean(v))) for v in values)])
    return text + "\n\n" + aligned(lines)


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
    write(folder / "robustness.json", json.dumps({"summary": summary, "cells": models}, indent=1))
    plot_robustness(summary, folder / "robustness.png")


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
    for name, least in (("limit", 0), ("samples", 1), ("temperature", 0), ("batch_prompts", 1)):
        if (getattr(args, name) or 0) < least:
            raise SystemExit(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    if args.samples > 1 and not args.temperature:
        raise SystemExit(f"--samples {args.samples}: greedy answers are all the same; pass a --temperature above 0")
    if args.out and not (Path(args.out).parent.is_dir() and not Path(args.out).is_dir()):
        raise SystemExit(f"--out {args.out}: not a file in a folder that exists")
    if args.prompt_template:
        check_template(args.prompt_template)
    for name in args.benchmark:
        if name.split("=")[0] not in SOURCES:
            raise SystemExit(f"--benchmark {name}: choose among {', '.join(SOURCES)}, with =FOLDER behind for a folder")
    try:
        choose(args.corruptions)
    except ValueError as error:
        raise SystemExit(f"--corruptions: {error}") from None
    if not args.severities or not set(args.severities) <= {1, 2, 3, 4, 5}:
        raise SystemExit(f"--severities {' '.join(map(str, args.severities))}: each must be one of 1 to 5")


@memory_advice("--batch-prompts, --samples, --max-completion-length or --max-pixels")
def main(args: Args) -> dict[str, dict]:
    check(args)
    return benchmarks(args) if args.benchmark else evaluate_on(args)


def benchmarks(args: Args) -> dict[str, dict]:
    """Every model on every benchmark; each benchmark's results are kept in a file of their own beside `--out`, so that
    the same command goes on where it stopped."""
    results = {}
    for name in args.benchmark:
        out = ""
        if args.out:
            path = Path(args.out)
            out = str(path.with_name(f"{path.stem}-{name.split('=')[0]}{path.suffix}"))
        results[name.split("=")[0]] = evaluate_on(replace(args, data=name, benchmark=(), out=out))
        print()
    if not args.corruptions:
        lines = [["model", *results]]
        for model in args.model:
            cells = [result[model] for result in results.values()]
            spans = [(100 * c["accuracy"], 100 * c["ci_low"], 100 * c["ci_high"]) for c in cells]
            lines.append([model, *(f"{mean:.1f} ({low:.1f}-{high:.1f})" for mean, low, high in spans)])
        print(aligned(lines))
        for name, result in results.items():
            for title in next(iter(result.values()))["special"]:
                figures = ", ".join(f"{model} {100 * result[model]['special'][title]:.1f}" for model in args.model)
                print(f"{name}, {title}: {figures}")
    if args.out:
        write(Path(args.out), json.dumps({"benchmarks": results}, indent=1, ensure_ascii=False))
    return results


def evaluate_on(args: Args) -> dict[str, dict]:
    """Every model on one set: tables printed and results kept in `--out`."""
    checkpoints = {name: newest_checkpoint(name) for name in args.model}
    columns = {name: getattr(args, name) for name in ("image_column", "question_column", "answer_column", "kind")}
    limit = (500 if args.data == "puzzles" else 0) if args.limit is None else args.limit
    examples = load_examples(args.data, args.split, limit=limit or None, **columns)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Settings that change what a cell holds; the models and the cells asked for may differ from what a file has.
    settings = asdict(args) | dict.fromkeys(("model", "corruptions", "severities", "out", "batch_prompts"))
    resumable = args.corruptions or args.data.split("=")[0] in SOURCES
    results = known_results(args.out, settings, checkpoints) if resumable else {}
    for name, checkpoint in checkpoints.items():
        if not args.corruptions and "accuracy" in results.get(name, ()):
            continue
        policy = load_policy(checkpoint, device=device, trainable=False, max_pixels=args.max_pixels)
        options = dict(
            template=args.prompt_template or usual(name)["prompt_template"],
            samples=args.samples,
            temperature=args.temperature,
            max_new_tokens=args.max_completion_length or usual(name)["max_completion_length"],
            batch_prompts=args.batch_prompts,
            seed=args.seed,
        )
        result = results.setdefault(name, {"checkpoint": checkpoint})

        def save(cells: dict | None = None, result=result):
            result.update({"cells": cells} if cells else {})
            if args.out:
                text = json.dumps({"args": settings, "models": results}, indent=1, ensure_ascii=False)
                write(Path(args.out), text)

        if args.corruptions:
            names = choose(args.corruptions)
            robustness(policy, examples, names, args.severities, known=result.get("cells"), keep=save, **options)
        else:
            result.update(evaluate(policy, examples, **options))
            rows = [(row["id"], row["group"], sum(row["correct"]) / len(row["correct"])) for row in result["rows"]]
            result["special"] = special_scores(args.data.split("=")[0], rows)
            save()
    answered = f"{args.samples} samples each at temperature {args.temperature}" if args.temperature else "greedy"
    print(f"{args.data}, split {args.split}, {len(examples)} examples, {answered}")
    if not args.corruptions:
        print(table(results))
        return results
    wanted = [CLEAN, *(f"{name}/{severity}" for name, severity in product(names, args.severities))]
    summary = robustness_summary({m: {c: results[m]["cells"][c] for c in wanted} for m in checkpoints})
    print(f"severities {', '.join(map(str, args.severities))}")
    print(robustness_table(summary))
    if args.out:
        plot_robustness(summary, Path(args.out).with_suffix(".png"))
    return summary


def known_results(out: str, settings: dict, checkpoints: dict[str, str]) -> dict[str, dict]:
    """What an earlier, perhaps interrupted run of the same settings left in `out`.

    Raises:
        SystemExit: the file holds something else, or figures of another checkpoint.
    """
    if not out or not Path(out).is_file():
        return {}
    try:
        held = json.loads(Path(out).read_text())
        before, models = held["args"], held["models"]
    except (ValueError, KeyError, TypeError):
        raise SystemExit(f"--out {out}: holds something else; name another file") from None
    for key, value in json.loads(json.dumps(settings)).items():
        if before.get(key) != value:
            flag = "--" + key.replace("_", "-")
            raise SystemExit(
                f"--out {out}: {flag} was {before.get(key)!r} there and is {value!r} now; name another file"
            )
    for name, checkpoint in checkpoints.items():
        if name in models and models[name]["checkpoint"] != checkpoint:
            raise SystemExit(f"--out {out}: {name} was {models[name]['checkpoint']} there and is {checkpoint} now")
    return {name: models[name] for name in models if name in checkpoints}


if __name__ == "__main__":
    main(tyro.cli(Args))
