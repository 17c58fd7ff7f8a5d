"""Accuracy on examples, with a 95 % interval, over all and for each group."""

import math
from collections.abc import Sequence

from common.corruptions import corrupt
from common.data.examples import Example, load_examples
from common.data.lengths import leave_out_long
from common.data.messages import TEMPLATE, build_messages
from common.model.inputs import encode_prompts
from common.model.load import Policy, load_policy, newest_checkpoint
from common.model.sampling import decode, sample, uniform_numbers
from common.rewards.answers import score
from common.run.checkpoints import settings_of
from common.run.progress import Progress, counted

COLUMNS = ("image_column", "question_column", "answer_column", "kind", "image_root")  # flags beside `data`


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
    progress: Progress | None = None,
) -> dict:
    """Answer every example `samples` times, with pictures corrupted by name and severity if asked; check the answers.

    What it comes to is said before it begins, and how it goes, unless a `progress` counts these examples among others.
    With an accelerator of several processes each takes every W-th example and all return the same result:
    accuracy, ci_low, ci_high, count, those of `pass_at`, mean_length, truncated, groups (of the first four) and rows.

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
    starts = range(0, len(mine), batch_prompts)
    if progress is None and (not accelerator or accelerator.is_main_process):
        text = at_most(len(examples) * samples, max_new_tokens)
        starts = counted(starts, len(examples), "evaluating", batch_prompts * processes, text=text)
    for start in starts:
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
        if progress is not None:
            progress.update(min(batch_prompts * processes, len(examples) - start * processes))
    if processes > 1:
        from accelerate.utils import gather_object

        rows = gather_object(rows)
    rows.sort(key=lambda row: row["number"])
    return summarize(rows)


def asked_examples(args, limit: int | None, device: str) -> Sequence[Example]:
    """The examples that an evaluation's flags name, without those whose prompts have more than `args.max_prompt_length`
    tokens (0: all of them): of the first of `args.model`, so that every model answers the same."""
    columns = {name: getattr(args, name) for name in COLUMNS}
    examples = load_examples(args.data, args.split, limit=limit, **columns)
    if not args.max_prompt_length:
        return examples
    name = args.model[0]
    policy = load_policy(newest_checkpoint(name), device=device, trainable=False, max_pixels=args.max_pixels)
    template = args.prompt_template or settings_of(name)["prompt_template"]
    return leave_out_long(examples, policy, template, args.max_prompt_length, 0)


def at_most(completions: int, max_new_tokens: int) -> str:
    """What an evaluation comes to, as it is said before it begins.

    >>> at_most(500, 72)
    '500 completions, 36,000 tokens at most'
    """
    return f"{completions:,} completions, {completions * max_new_tokens:,} tokens at most"


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
        **pass_at([row["correct"] for row in rows]),
        "mean_length": sum(lengths) / len(lengths),
        "truncated": sum(cut) / len(cut),
        "groups": groups if set(groups) != {""} else {},
        "rows": rows,
    }


def pass_at(verdicts: list[list[float]]) -> dict[str, float]:
    """The chance that at least one of k answers to an example is right, mean over examples, for k = 2, 4, 8, ... and n,
    from the verdicts on n answers each: 1 - C(n - c, k) / C(n, k) where c are right, which is unbiased (Chen et al.
    2021, arXiv 2107.03374, eq. 1).

    >>> pass_at([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    {'pass@2': 0.25, 'pass@4': 0.5}
    """
    n, found = len(verdicts[0]), {}
    for k in sorted({2**i for i in range(1, n.bit_length())} | {n} - {1}):
        missed = [math.comb(n - int(sum(v)), k) / math.comb(n, k) for v in verdicts]
        found[f"pass@{k}"] = 1 - sum(missed) / len(missed)
    return found


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
    """A plain-text table, a line a model: accuracy in percent with its interval, pass@k, each group, length."""
    held = [[name for name in result if name.startswith("pass@")] for result in results.values()]
    several = [name for name in held[0] if all(name in names for names in held)]
    groups = list(dict.fromkeys(g for result in results.values() for g in result["groups"]))
    header = ["model", "accuracy", "95 % interval", *several, *groups, "tokens", "cut off"]
    lines = [header]
    for name, result in results.items():
        by_group = [f"{100 * result['groups'][g]['accuracy']:.1f}" if g in result["groups"] else "" for g in groups]
        spread = f"{100 * result['ci_low']:.1f} - {100 * result['ci_high']:.1f}"
        passed = [f"{100 * result[k]:.1f}" for k in several]
        ends = [f"{result['mean_length']:.1f}", f"{100 * result['truncated']:.1f}"]
        lines.append([name, f"{100 * result['accuracy']:.1f}", spread, *passed, *by_group, *ends])
    return aligned(lines)


def aligned(lines: list[list[str]]) -> str:
    """Lines of cells as text, the first column to the left, the others to the right."""
    first, *widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join([line[0].ljust(first), *map(str.rjust, line[1:], widths)]) for line in lines)
