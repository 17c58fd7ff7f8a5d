"""What a policy takes from the picture, and which flaws it still has.

    python -m common.evaluation.probes --model tiny runs/grpo-tiny-seed1 --out probes

For any model and any data set with pictures:

    accuracy    with the real picture, with a grey one, with another example's (the next of its group)
    reliance    real minus grey, real minus other: in accuracy, and in nats a token of the policy's own completions
    sensitivity share of answers that become others when the picture is another one
    swap        nats a token that the rest of a completion loses when it is scored behind another picture from 25, 50
                or 75 % of its tokens on: what is said late still depends on the picture, or follows from what was said
    hints       accuracy when the question ends in a right or in a misleading hint, and how often the latter is repeated
    entropy     nats a token of the policy's own completions, and of what it says between round brackets (chatter)
    sections    share of completions with a description or a second look, and accuracy of those that have one

For the built-in puzzles also the probability of right readings, teacher-forced on right chains of looks: by what is
read and by place in the chain. Written are probes.json and probes.png; a table is printed.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.data.examples import Example
from common.data.messages import TEMPLATE, build_messages, check_template
from common.data.puzzles import COLOURS, SHAPES, puzzle, solve
from common.evaluation.accuracy import aligned, asked_examples, at_most
from common.evaluation.comparison import made_with
from common.evaluation.robustness import bootstrap
from common.model.inputs import Prompts, encode_prompts
from common.model.load import Policy, load_policy, newest_checkpoint
from common.model.sampling import decode, sample, uniform_numbers
from common.model.scoring import Scorer
from common.rewards.answers import check, extract, score
from common.rewards.designs import MARKERS
from common.run.checkpoints import settings_of
from common.run.files import one_line, write
from common.run.progress import counted
from common.run.settings import Count, Natural, Weight, check_ranges, command_line

VIEWS = ("real", "grey", "other")
CUTS = (0.0, 0.25, 0.5, 0.75)  # of a completion's tokens
GREY = (128, 128, 128)
PLACES = ("first", "middle", "last")  # of a chain of looks


@dataclass
class Args:
    model: tuple[str, ...] = ("tiny",)
    """models to compare: tiny, a run folder (its newest checkpoint), a checkpoint, a folder or a hub id"""
    data: str = "puzzles"
    """puzzles, a short name of common/data/sets.py, a .jsonl or .parquet file, a folder, or a hub id"""
    split: str = "test"
    """which part of it"""
    image_column: str = ""
    question_column: str = ""
    answer_column: str = ""
    kind: str = ""
    """how answers are checked: math, int, letter, ..."""
    image_root: str = ""
    """folder that image paths are relative to and must lie in (default: the data set's own)"""
    limit: Count = 300
    """examples, the first of the split"""
    samples: Count = 1
    """completions an example"""
    temperature: Weight = 1.0
    """0: greedy completions"""
    max_completion_length: Natural = 0
    """longest completion in tokens (default: what the run trained with)"""
    max_prompt_length: Natural = 0
    """longest prompt in tokens, of the first model; examples with longer ones are left out (0: none)"""
    prompt_template: str = ""
    """what the model reads (default: what the run trained with, else the standard one)"""
    max_pixels: Natural = 0
    """bound on an image's area after resizing (0: as the checkpoint says)"""
    batch_prompts: Count = 64
    """examples decoded together; lower it when memory runs out"""
    seed: Natural = 1
    """of the sampling"""
    out: str = "probes"
    """folder to write"""


def neighbours(examples: Sequence[Example]) -> list[int]:
    """For each example the next one of its group that has as many pictures, round in a circle; itself where it is the
    only one."""
    groups = {}
    for n, example in enumerate(examples):
        groups.setdefault((example.group, len(example.images)), []).append(n)
    after = {n: members[(i + 1) % len(members)] for members in groups.values() for i, n in enumerate(members)}
    return [after[n] for n in range(len(examples))]


def views(policy: Policy, examples: Sequence[Example], others: Sequence[Example], template: str) -> dict[str, Prompts]:
    """The examples' prompts with real pictures, with grey ones, and with the others', brought to the same size."""
    real = encode_prompts(policy, [build_messages(e, template) for e in examples], [list(e.images) for e in examples])
    grey = [[Image.new("RGB", image.size, GREY) for image in e.images] for e in examples]
    other = [
        [theirs.resize(own.size) for own, theirs in zip(e.images, o.images, strict=True)]
        for e, o in zip(examples, others, strict=True)
    ]
    return {"real": real, "grey": real.with_images(policy, grey), "other": real.with_images(policy, other)}


@torch.no_grad()
def image_reliance(
    policy: Policy,
    examples: Sequence[Example],
    *,
    template: str,
    max_new_tokens: int,
    batch_prompts: int = 64,
    quiet: bool = False,
) -> dict[str, float]:
    """How much likelier the policy's own greedy completions are with their pictures than with grey ones and with other
    examples', in nats a token: a policy that goes blind comes to 0. Small enough for every evaluation of a training."""
    scorer, following = Scorer(policy), neighbours(examples)
    was_training, gaps, tokens = policy.model.training, {"grey": 0.0, "other": 0.0}, 0
    policy.model.eval()
    starts = range(0, len(examples), batch_prompts)
    if not quiet:
        text = at_most(len(examples), max_new_tokens)
        starts = counted(starts, len(examples), "image reliance", batch_prompts, text=text)
    for start in starts:
        numbers = range(start, min(start + batch_prompts, len(examples)))
        batch, others = [examples[n] for n in numbers], [examples[following[n]] for n in numbers]
        seen = views(policy, batch, others, template)
        rollout = sample(policy, seen["real"], 1, max_new_tokens, None, temperature=0)
        ids, mask = rollout.completion_ids, rollout.completion_mask
        real = scorer(seen["real"], ids, mask).logprobs
        for view in gaps:
            gaps[view] += float((real - scorer(seen[view], ids, mask).logprobs).sum())
        tokens += int(mask.sum())
    policy.model.train(was_training)
    return {f"reliance/{view}": gap / max(tokens, 1) for view, gap in gaps.items()}


def hinted(example: Example, answer: str) -> Example:
    """The example with a hint behind its question, worded as in `puzzles.ask`."""
    return replace(example, question=f"{example.question} Somebody says it is {answer}.")


@torch.no_grad()
def probe(
    policy: Policy,
    examples: Sequence[Example],
    *,
    template: str = TEMPLATE,
    samples: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int,
    batch_prompts: int = 64,
    seed: int = 1,
) -> dict[str, np.ndarray]:
    """Every figure of every example [E] float64, NaN where an example has none (no wrong hint to be had from its group,
    no such section). Each view and hint is answered under the same random numbers."""
    scorer, following = Scorer(policy), neighbours(examples)
    was_training = policy.model.training
    policy.model.eval()
    rows = []

    def answers(prompts: Prompts, numbers: Sequence[int]):
        places = [n * samples + k for n in numbers for k in range(samples)]
        noise = uniform_numbers(seed, 0, places, max_new_tokens) if temperature else None
        rollout = sample(policy, prompts, samples, max_new_tokens, noise, temperature=temperature)
        return rollout, decode(policy, rollout)

    text = at_most(len(examples) * samples * (len(VIEWS) + 2), max_new_tokens)  # and under two hints
    for start in counted(range(0, len(examples), batch_prompts), len(examples), "probing", batch_prompts, text=text):
        numbers = range(start, min(start + batch_prompts, len(examples)))
        batch, others = [examples[n] for n in numbers], [examples[following[n]] for n in numbers]
        asked = [e for e in batch for _ in range(samples)]  # rows of an example stand together
        seen = views(policy, batch, others, template)
        figures, texts = {}, {}  # name -> [N * samples]
        rollouts = {}
        for view in VIEWS:
            rollouts[view], texts[view] = answers(seen[view], numbers)
            figures[f"accuracy, {view} picture"] = score(texts[view], asked)[0]
        changed = [extract(a)[0] != extract(b)[0] for a, b in zip(texts["real"], texts["other"], strict=True)]
        right = np.array(figures["accuracy, real picture"])
        for view in VIEWS[1:]:
            figures[f"reliance on {view}, accuracy"] = right - np.array(figures[f"accuracy, {view} picture"])
        figures["sensitivity"] = changed

        ids, mask = rollouts["real"].completion_ids, rollouts["real"].completion_mask  # [R, T]
        scores = {view: scorer(seen[view], ids, mask, temperature or 1.0) for view in VIEWS}
        place = torch.arange(mask.shape[1], device=mask.device) / mask.sum(1, keepdim=True)  # [R, T]
        gaps = {view: scores["real"].logprobs - scores[view].logprobs for view in VIEWS[1:]}
        figures["reliance on grey, nats"] = token_means(gaps["grey"], mask)
        for cut in CUTS:
            name = f"other picture from {cut:.0%} on, nats" if cut else "reliance on other, nats"
            figures[name] = token_means(gaps["other"], mask & (place >= cut))
        figures["entropy"] = token_means(scores["real"].entropy, mask)
        figures["entropy of chatter"] = token_means(scores["real"].entropy, in_brackets(policy, ids, mask))
        for name, marker in MARKERS.items():
            if name not in ("think", "answer"):
                has = np.array([f"</{marker}>" in text for text in texts["real"]], dtype=float)
                figures[f"{name}, share"] = has
                figures[f"{name}, accuracy with it"] = np.where(has == 1, right, np.nan)

        for kind in ("right", "misleading"):
            hints = [e.answer if kind == "right" else o.answer for e, o in zip(batch, others, strict=True)]
            fits = [kind == "right" or not check(f"<answer>{h}</answer>", e.answer, e.kind, e.choices).correct
                    for h, e in zip(hints, batch, strict=True)]  # fmt: skip
            told = [hinted(e, h) for e, h in zip(batch, hints, strict=True)]
            prompts = encode_prompts(
                policy, [build_messages(e, template) for e in told], [list(e.images) for e in told]
            )
            _, said = answers(prompts, numbers)
            valid = np.repeat(fits, samples)
            figures[f"accuracy, {kind} hint"] = np.where(valid, score(said, asked)[0], np.nan)
            if kind == "misleading":
                follow = [replace(e, answer=h) for e, h in zip(batch, hints, strict=True) for _ in range(samples)]
                figures["misleading hint repeated"] = np.where(valid, score(said, follow)[0], np.nan)
        for i in range(len(batch)):
            own = slice(i * samples, (i + 1) * samples)
            rows.append({name: mean_of(np.asarray(values)[own]) for name, values in figures.items()})
    policy.model.train(was_training)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def mean_of(values: np.ndarray) -> float:
    """Mean of what is not NaN; NaN where nothing is left."""
    values = values.astype(float)
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def token_means(values: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    """Means [R] of token values [R, T] over a mask; NaN for a row without tokens."""
    return (torch.where(mask, values, 0).sum(1) / mask.sum(1)).double().cpu().numpy()


def in_brackets(policy: Policy, completion_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Which tokens [R, T] bool stand between round brackets."""
    inside = torch.zeros_like(mask)
    for r, (row, length) in enumerate(zip(completion_ids.tolist(), mask.sum(1).tolist(), strict=True)):
        depth = False
        for t, token in enumerate(policy.tokenizer.batch_decode([[token] for token in row[:length]])):
            if "(" in token:
                depth = True
            elif ")" in token:
                depth = False
            else:
                inside[r, t] = depth
    return inside


@torch.no_grad()
def readings(policy: Policy, examples: Sequence[Example], *, template: str = TEMPLATE, batch_prompts: int = 64) -> dict:
    """The probability of each right reading of built-in puzzles, teacher-forced on the flawless chain of looks: means
    by kind, by what is read, by place in chains of three looks and more (colours, shapes and heights)."""
    scorer, rows = Scorer(policy), []
    was_training = policy.model.training
    policy.model.eval()
    for start in counted(range(0, len(examples), batch_prompts), len(examples), "readings", batch_prompts):
        batch = [examples[n] for n in range(start, min(start + batch_prompts, len(examples)))]
        prompts = encode_prompts(policy, [build_messages(e, template) for e in batch], [list(e.images) for e in batch])
        shown = [solve(puzzle(e.id.split("/")[0], int(e.id.split("/")[1]))) for e in batch]
        opening = "<think>"
        texts = [f"{opening}{s.text}</think>" for s in shown]
        encoded = policy.tokenizer(texts, return_offsets_mapping=True, add_special_tokens=False)
        tokens = [torch.tensor(ids) for ids in encoded["input_ids"]]
        ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(policy.device)  # [N, T]
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(t) for t in tokens])[:, None]
        logprobs = scorer(prompts, ids, mask.to(policy.device)).logprobs.cpu()
        for n, demonstration in enumerate(shown):
            spans = demonstration.spans
            for start_at, end, read in spans:
                own = tokens_of(encoded["offset_mapping"][n], len(opening) + start_at, len(opening) + end)
                looks = spans[-1][2].look + 1
                rows.append((read.kind, read.truth, read.look, looks, float(logprobs[n, own].sum().exp())))
    policy.model.train(was_training)
    seen = [row for row in rows if row[0] in ("colour", "shape", "height")]
    long = [row for row in seen if row[3] >= 3]
    at = {"first": lambda look, looks: look == 0, "last": lambda look, looks: look == looks - 1}
    at["middle"] = lambda look, looks: 0 < look < looks - 1
    mean = lambda values: float(np.mean(values)) if values else None
    words = [*COLOURS, *SHAPES, *map(str, range(1, 7))]
    return {
        "kind": {kind: mean([r[4] for r in rows if r[0] == kind]) for kind in sorted({r[0] for r in rows})},
        "word": {word: mean([r[4] for r in seen if r[1] == word]) for word in words},
        "place": {place: mean([r[4] for r in long if at[place](r[2], r[3])]) for place in PLACES},
    }


def tokens_of(offsets: Sequence[tuple[int, int]], start: int, end: int) -> list[int]:
    """Which tokens hold any of the characters `start` to `end`.

    >>> tokens_of([(0, 2), (2, 6), (6, 7)], 3, 6)
    [1]
    """
    return [t for t, (first, last) in enumerate(offsets) if first < end and last > start]


def summarize(models: dict[str, dict[str, np.ndarray]]) -> dict[str, dict]:
    """A model: each figure's mean over the examples that have it, its 95 % bootstrap interval, and their number."""
    summary = {}
    for name, figures in models.items():
        summary[name] = {}
        for figure, values in figures.items():
            known = values[~np.isnan(values)]
            if len(known):
                summary[name][figure] = {"mean": float(known.mean()), "ci": bootstrap(known, 2000), "count": len(known)}
    return summary


def probes_table(summary: dict[str, dict], read: dict[str, dict]) -> str:
    """A plain-text table: a line a figure, a column a model. Shares are in percent, the rest in nats a token."""
    lines = [["", *summary]]
    for figure in dict.fromkeys(f for figures in summary.values() for f in figures):
        scale = 1 if "nats" in figure or "entropy" in figure else 100
        cells = [figures.get(figure) for figures in summary.values()]
        if "share" in figure and not any(cell["mean"] for cell in cells):
            continue  # nobody wrote such a section
        form = "{:.1f} ({:.1f} to {:.1f})" if scale == 100 else "{:.3f} ({:.3f} to {:.3f})"
        lines.append([figure, *(form.format(*(scale * x for x in (c["mean"], *c["ci"]))) if c else "" for c in cells)])
    for part in ("kind", "place", "word"):
        for name in dict.fromkeys(n for figures in read.values() for n in figures[part]):
            title = {"kind": f"{name}s read right", "place": f"{name} look right", "word": f"{name} read right"}[part]
            values = [figures[part].get(name) for figures in read.values()]
            lines.append([title, *("" if v is None else f"{100 * v:.1f}" for v in values)])
    return aligned(lines)


def plot_probes(summary: dict[str, dict], read: dict[str, dict], path: Path) -> None:
    """Accuracy by picture and hint; nats a token behind another picture from each cut on; of puzzles, readings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3 if read else 2, figsize=(15 if read else 10, 4), layout="constrained")
    bars = [f"accuracy, {what}" for what in ("real picture", "grey picture", "other picture", "right hint")]
    bars.append("accuracy, misleading hint")
    width = 0.8 / len(summary)
    for m, (name, figures) in enumerate(summary.items()):
        heights = [100 * figures[bar]["mean"] if bar in figures else 0 for bar in bars]
        axes[0].bar(np.arange(len(bars)) + m * width, heights, width, label=name)
        cuts = ["reliance on other, nats", *(f"other picture from {cut:.0%} on, nats" for cut in CUTS[1:])]
        known = [(100 * cut, figures[c]["mean"]) for cut, c in zip(CUTS, cuts, strict=True) if c in figures]
        axes[1].plot(*zip(*known, strict=True), marker="o", label=name)
        if read:
            words = [word for word, value in read[name]["word"].items() if value is not None]
            axes[2].plot(words, [100 * read[name]["word"][word] for word in words], "o", label=name)
    labels = [bar.removeprefix("accuracy, ").replace(" ", "\n") for bar in bars]
    axes[0].set_xticks(np.arange(len(bars)) + 0.4 - width / 2, labels)
    axes[0].set_ylabel("accuracy (%)")
    axes[1].set(xlabel="another picture from there on (% of the tokens)", ylabel="loss in nats a token")
    if read:
        axes[2].tick_params(axis="x", rotation=60)
        axes[2].set(ylabel="probability of the right reading (%)", ylim=(0, 103))
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(args: Args) -> dict[str, dict]:
    check_ranges(args)
    if args.prompt_template:
        check_template(args.prompt_template)
    folder = Path(args.out)
    if folder.exists() and not folder.is_dir():
        raise SystemExit(f"--out {args.out}: not a folder")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    examples = asked_examples(args, args.limit, device)
    with one_line(f"--out {args.out}"):
        folder.mkdir(parents=True, exist_ok=True)
    examples = [examples[n] for n in range(len(examples))]
    models, read = {}, {}
    for name in args.model:
        policy = None  # let go of the last model before the next is loaded
        policy = load_policy(newest_checkpoint(name), device=device, trainable=False, max_pixels=args.max_pixels)
        template = args.prompt_template or settings_of(name)["prompt_template"]
        models[name] = probe(
            policy,
            examples,
            template=template,
            samples=args.samples,
            temperature=args.temperature,
            max_new_tokens=args.max_completion_length or settings_of(name)["max_completion_length"],
            batch_prompts=args.batch_prompts,
            seed=args.seed,
        )
        if re.match(r"puzzles\b", args.data):
            read[name] = readings(policy, examples, template=template, batch_prompts=args.batch_prompts)
    summary = summarize(models)
    print(f"{args.data}, split {args.split}, {len(examples)} examples, {args.samples} samples at {args.temperature}")
    print(probes_table(summary, read), flush=True)
    with one_line(f"--out {args.out}"):
        content = {**made_with(), "args": vars(args), "summary": summary, "readings": read}
        write(folder / "probes.json", json.dumps(content, indent=1))
        plot_probes(summary, read, folder / "probes.png")
    print(f"{folder}: probes.json, probes.png")
    return summary


if __name__ == "__main__":
    command_line(main, Args)
