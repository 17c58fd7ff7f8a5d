"""Accuracy on held-out examples, with a 95 % interval, over all and for each group; and under corrupted pictures.

    python -m common.evaluation --model tiny --split test
    python -m common.evaluation --model tiny runs/grpo-tiny-seed1 --split shifted --samples 4 --temperature 1
    python -m common.evaluation --model runs/grpo-tiny-seed1 runs/roma-tiny-seed1 --corruptions seen unseen --out r.json

With `--corruptions` every example is answered clean and under each corruption at each severity (a cell), with the same
pixels for every model. Finished cells are kept in `--out`: the same command goes on where it was stopped, and one with
other models, corruptions or severities adds to the file. A file of other settings, examples or weights is refused.
"""

import json
import sys
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch

from common.corruptions import check_corruptions, choose
from common.data.messages import check_template
from common.data.sets import SOURCES, special_scores
from common.evaluation.accuracy import aligned, asked_examples, evaluate, table
from common.evaluation.robustness import (
    CLEAN,
    plot_robustness,
    robustness,
    robustness_summary,
    robustness_table,
    write_results,
)
from common.model.load import TINY, check_model, load_policy, newest_checkpoint
from common.run.checkpoints import settings_of
from common.run.files import checksum, one_line
from common.run.settings import Count, Natural, Weight, check_ranges, command_line, memory_advice


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
    limit: Natural | None = None
    """examples, the first of the split (default: 500 puzzles, all of any other set; 0: all)"""
    samples: Count = 1
    """completions an example; their mean accuracy counts, and pass@k stands beside it"""
    temperature: Weight = 0.0
    """0: greedy"""
    max_completion_length: Natural = 0
    """longest completion in tokens (default: 72 for the built-in model and its runs, else 2048)"""
    max_prompt_length: Natural = 0
    """longest prompt in tokens, of the first model; examples with longer ones are left out (0: none)"""
    prompt_template: str = ""
    """what the model reads (default: what the run trained with, else the standard one)"""
    image_column: str = ""
    question_column: str = ""
    answer_column: str = ""
    image_root: str = ""
    """folder that image paths are relative to and must lie in (default: the data set's own)"""
    kind: str = ""
    """how answers are checked: math, int, letter, ..."""
    max_pixels: Natural = 0
    """bound on an image's area after resizing (0: as the checkpoint says)"""
    batch_prompts: Count = 64
    """examples decoded together; lower it when memory runs out"""
    seed: Natural = 1
    """of the sampling, where the temperature is above 0"""
    corruptions: tuple[str, ...] | None = None
    """also corrupt the pictures: names, `seen`, `unseen`, `all` (see common/corruptions.py)"""
    severities: tuple[int, ...] | None = None
    """severities of these corruptions, 1 to 5 (default: 1 3 5)"""
    out: str = ""
    """.json file for settings and results; what it holds is kept; a plot of the same name comes with --corruptions"""


def check(args: Args) -> None:
    """Stop with one line before anything long starts."""
    check_ranges(args)
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
    names = ("seen",) if args.corruptions is None else args.corruptions
    severities = (1, 3, 5) if args.severities is None else args.severities
    check_corruptions(names, severities)
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
    keep(args, content)
    return results


def evaluate_on(args: Args) -> tuple[dict[str, dict], dict[str, dict]]:
    """Every model on one set: tables printed and results kept in `--out`. Returns figures a model and, under
    corruptions, the cells that they are made of."""
    marks = {name: mark(newest_checkpoint(name)) for name in args.model}
    for held in marks.values():  # before the first one is evaluated
        check_model(held["checkpoint"])
    limit = (500 if args.data.split(":")[0] == "puzzles" else 0) if args.limit is None else args.limit
    device = "cuda" if torch.cuda.is_available() else "cpu"
    examples = asked_examples(args, limit or None, device)
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
            template=args.prompt_template or settings_of(name)["prompt_template"],
            samples=args.samples,
            temperature=args.temperature,
            max_new_tokens=args.max_completion_length or settings_of(name)["max_completion_length"],
            batch_prompts=args.batch_prompts,
            seed=args.seed,
        )
        result = held["models"][name] = result | marks[name]

        def save(cells: dict | None = None, result=result) -> None:
            result.update({"cells": cells} if cells else {})
            try:
                keep(args, held)
            except SystemExit as error:  # it is computed: it shall be printed all the same
                print(error, flush=True)

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
        keep(args, held)
        return results, {}
    cells = {name: {cell: result["cells"][cell] for cell in wanted} for name, result in results.items()}
    held["summary"] = robustness_summary(cells)
    print(robustness_table(held["summary"]))
    keep(args, held)
    return held["summary"], cells


def keep(args: Args, content: dict) -> None:
    """Write the results, and the picture of a summary, where `--out` names a file; what is printed stands before."""
    if args.out:
        sys.stdout.flush()
        with one_line(f"--out {args.out}"):
            write_results(args.out, content)
            if args.corruptions and "summary" in content:
                plot_robustness(content["summary"], Path(args.out).with_suffix(".png"))


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
        before = held["args"].get(key, getattr(Args, key))  # a file from before there was such a flag
        # Of the limit the file's examples tell more than what was asked for.
        if value is not None and before != value and key != "limit":
            flag = "--" + key.replace("_", "-")
            raise SystemExit(f"--out {out}: {flag} was {before!r} there and is {value!r} now; name another file")
    try:
        kept = [part for m in held["models"].values() for part in (*m.get("cells", {}).values(), m.get("rows"))]
        counts = {len(part) for part in kept if part}
    except (AttributeError, TypeError):
        raise SystemExit(f"--out {out}: holds something else; name another file") from None
    if others := counts - {settings["limit"]}:
        counts = f"{others.pop()} examples, there are {settings['limit']} now (--data, --limit)"
        raise SystemExit(f"--out {out}: holds figures of {counts}; name another file")
    for name in marks.keys() & held["models"].keys():
        before = {key: held["models"][name].get(key, value) for key, value in marks[name].items()}
        if before != marks[name]:
            weights = f"other weights of {name} ({before['checkpoint']})"
            raise SystemExit(f"--out {out}: holds figures of {weights}; name another file")
    return held | {"args": settings}


if __name__ == "__main__":
    command_line(main, Args)
