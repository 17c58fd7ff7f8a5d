"""Accuracy on held-out examples, with a 95 % interval, over all and for each group.

python -m common.evaluate --model tiny --split test
python -m common.evaluate --model tiny runs/grpo-tiny-seed1 --split shifted --samples 4 --temperature 1
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro

from common.data import TEMPLATE, Example, build_messages, check_template, load_examples
from common.model import Policy, encode_prompts, load_policy
from common.rewards import score
from common.rollout import decode, sample, uniform_numbers


@dataclass
class Args:
    model: tuple[str, ...] = ("tiny",)
    """models to compare: tiny, a run folder (its newest checkpoint), a checkpoint, a folder or a hub id"""
    data: str = "puzzles"
    """puzzles, a .jsonl or .parquet file, a folder, or a hub id"""
    split: str = "test"
    """which part of it"""
    limit: int = 500
    """examples, the first of the split (0: all)"""
    samples: int = 1
    """completions an example; their mean accuracy counts"""
    temperature: float = 0.0
    """0: greedy"""
    max_completion_length: int = 0
    """longest completion in tokens (default: 72 for the built-in model and its runs, else 2048)"""
    prompt_template: str = TEMPLATE
    """what the model reads"""
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
    out: str = ""
    """JSON file for settings and results, with every completion; written anew after each model"""


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
    accelerator=None,
) -> dict:
    """Answer every example `samples` times and check the answers.

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
        prompts = encode_prompts(policy, [build_messages(e, template) for e in batch], [list(e.images) for e in batch])
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
    first, *widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join([line[0].ljust(first), *map(str.rjust, line[1:], widths)]) for line in lines)


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


def usual_length(name: str) -> int:
    """The completion length that a run trained with; 72 for the built-in model, 2048 for any other."""
    for folder in (Path(name), Path(name).parent.parent):
        if (folder / "args.json").is_file():
            return json.loads((folder / "args.json").read_text())["max_completion_length"]
    return 72 if name == "tiny" else 2048


def check(args: Args) -> None:
    """Stop with one line before anything long starts."""
    for name, least in (("limit", 0), ("samples", 1), ("temperature", 0), ("batch_prompts", 1)):
        if getattr(args, name) < least:
            raise SystemExit(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    if args.samples > 1 and not args.temperature:
        raise SystemExit(f"--samples {args.samples}: greedy answers are all the same; pass a --temperature above 0")
    if args.out and not (Path(args.out).parent.is_dir() and not Path(args.out).is_dir()):
        raise SystemExit(f"--out {args.out}: not a file in a folder that exists")
    check_template(args.prompt_template)


def main(args: Args) -> dict[str, dict]:
    check(args)
    checkpoints = {name: newest_checkpoint(name) for name in args.model}
    columns = {name: getattr(args, name) for name in ("image_column", "question_column", "answer_column", "kind")}
    examples = load_examples(args.data, args.split, limit=args.limit or None, **columns)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = {}
    for name, checkpoint in checkpoints.items():
        policy = load_policy(checkpoint, device=device, trainable=False, max_pixels=args.max_pixels)
        results[name] = {"checkpoint": checkpoint} | evaluate(
            policy,
            examples,
            template=args.prompt_template,
            samples=args.samples,
            temperature=args.temperature,
            max_new_tokens=args.max_completion_length or usual_length(name),
            batch_prompts=args.batch_prompts,
            seed=args.seed,
        )
        if args.out:
            text = json.dumps({"args": asdict(args), "models": results}, indent=1, ensure_ascii=False)
            Path(args.out).write_text(text, encoding="utf-8")
    answered = f"{args.samples} samples each at temperature {args.temperature}" if args.temperature else "greedy"
    print(f"{args.data}, split {args.split}, {len(examples)} examples, {answered}")
    print(table(results))
    return results


if __name__ == "__main__":
    main(tyro.cli(Args))
