"""Where a policy looks: how much each token of its completions depends on the image, and how close it stays to it.

    python -m common.evaluation.look --model tiny runs/vgpo-tiny-seed1 --out look

    dependency  the k3 estimate of KL(image || masked image) on the token, a random half of the patches black
                (VPPO, arXiv 2510.09285, eq. 3), mean over some masks
    focus       (1 + cosine of the token's last hidden state and the mean state of the image's tokens) / 2
                (VGPO, arXiv 2604.09349, eq. 4)

Written are index.html (each token coloured by both, the picture beside it), tokens.png (the same as a picture, of the
first tokens of long completions), curves.png (both against the place in the completion: a fall is visual forgetting)
and look.json. Every model sees the same pictures under the same masks; colours share one scale.
"""

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.data.examples import Example
from common.data.messages import TEMPLATE, build_messages, check_template
from common.evaluation.accuracy import aligned, asked_examples, at_most
from common.evaluation.robustness import bootstrap
from common.model.inputs import encode_prompts, process_images
from common.model.load import Policy, load_policy, newest_checkpoint
from common.model.sampling import decode, sample, uniform_numbers
from common.model.scoring import Scorer
from common.rewards.answers import score
from common.run.checkpoints import settings_of
from common.run.files import one_line, write
from common.run.progress import counted
from common.run.settings import Count, Natural, PositiveShare, Weight, check_ranges, command_line

LATE = 0.5  # a completion's last half is late
PLACES = 10  # of the curves
DRAWN = 300  # tokens of a completion in the picture; the page has all
FIGURES = ("dependency", "focus", "late dependency", "late focus")


@dataclass
class Args:
    model: tuple[str, ...] = ("tiny",)
    """models to compare: tiny, a run folder (its newest checkpoint), a checkpoint, a folder or a hub id"""
    data: str = "puzzles"
    """puzzles, a .jsonl or .parquet file, a folder, or a hub id"""
    split: str = "test"
    """which part of it"""
    image_column: str = ""
    question_column: str = ""
    answer_column: str = ""
    kind: str = ""
    """how answers are checked: math, int, letter, ..."""
    image_root: str = ""
    """folder that image paths are relative to and must lie in (default: the data set's own)"""
    limit: Count = 100
    """examples, the first of the split"""
    show: Count = 6
    """examples on the page and in the picture"""
    temperature: Weight = 0.0
    """0: greedy completions"""
    masks: Count = 4
    """masked views an example"""
    mask_prob: PositiveShare = 0.5
    """share of the patches that a mask blackens"""
    max_completion_length: Natural = 0
    """longest completion in tokens (default: what the run trained with)"""
    max_prompt_length: Natural = 0
    """longest prompt in tokens, of the first model; examples with longer ones are left out (0: none)"""
    prompt_template: str = ""
    """what the model reads (default: what the run trained with, else the standard one)"""
    max_pixels: Natural = 0
    """bound on an image's area after resizing (0: as the checkpoint says)"""
    batch_prompts: Count = 32
    """examples decoded together; lower it when memory runs out"""
    seed: Natural = 1
    """of the masks, and of the sampling where the temperature is above 0"""
    out: str = "look"
    """folder to write"""


@dataclass
class Look:
    """One completion of T tokens, token by token."""

    tokens: list[str]
    dependency: np.ndarray  # [T] in [0, 10]
    focus: np.ndarray  # [T] in [0, 1]
    right: bool

    def means(self) -> dict[str, float]:
        """Mean dependency and focus over all tokens and over the late ones."""
        late = slice(int((1 - LATE) * len(self.tokens)), None)
        parts = (self.dependency, self.focus, self.dependency[late], self.focus[late])
        return dict(zip(FIGURES, (float(part.mean()) for part in parts), strict=True))


def visual_dependency(logprobs: torch.Tensor, masked_logprobs: torch.Tensor) -> torch.Tensor:
    """k3 estimate on the sampled tokens, in [0, 10], of any shape (VPPO, eq. 3 by appendix B)."""
    d = (masked_logprobs - logprobs).clamp(-20, 20)
    return (d.expm1() - d).clamp(0, 10)


def visual_focus(states: torch.Tensor, prompt_states: torch.Tensor, image_mask: torch.Tensor) -> torch.Tensor:
    """Focus [N, T] of tokens with states [N, T, H] on the image tokens `image_mask` [N, P] of prompts [N, P, H]."""
    count = image_mask.sum(1, keepdim=True).clamp(min=1)
    prototype = (prompt_states.float() * image_mask[..., None]).sum(1) / count  # [N, H]
    return (1 + torch.cosine_similarity(states.float(), prototype[:, None], dim=-1)) / 2


@torch.no_grad()
def look(
    policy: Policy,
    examples: Sequence[Example],
    *,
    template: str = TEMPLATE,
    max_new_tokens: int,
    temperature: float = 0.0,
    masks: int = 4,
    mask_prob: float = 0.5,
    batch_prompts: int = 32,
    seed: int = 1,
) -> list[Look]:
    """Answer every example once and look at each token. Log-probabilities are taken at the sampling temperature."""
    scorer, looks = Scorer(policy), []
    was_training = policy.model.training
    policy.model.eval()
    black = process_images(policy, [Image.new("RGB", (64, 64))])[0][:1].to(policy.device)  # [1, patch volume]
    text = at_most(len(examples), max_new_tokens)
    for start in counted(range(0, len(examples), batch_prompts), len(examples), "looking", batch_prompts, text=text):
        numbers = range(start, min(start + batch_prompts, len(examples)))
        batch = [examples[n] for n in numbers]
        prompts = encode_prompts(policy, [build_messages(e, template) for e in batch], [list(e.images) for e in batch])
        noise = uniform_numbers(seed, 0, list(numbers), max_new_tokens) if temperature else None
        rollout = sample(policy, prompts, 1, max_new_tokens, noise, temperature=temperature)
        ids, mask = rollout.completion_ids, rollout.completion_mask  # [N, T]
        clean = scorer(prompts, ids, mask, temperature or 1.0)
        image_mask = prompts.input_ids == policy.base.config.image_token_id  # [N, P]
        focus = visual_focus(clean.states, clean.prompt_states, image_mask)
        dependency = torch.zeros_like(clean.logprobs)
        counts = iter(prompts.image_grid_thw.prod(-1).tolist())  # patches an image
        patches = [sum(next(counts) for _ in range(images)) for images in prompts.images_per_prompt]
        for k in range(masks if prompts.pixel_values is not None else 0):
            draws = [np.random.default_rng([seed, n, k]).random(p) for n, p in zip(numbers, patches, strict=True)]
            hidden = torch.from_numpy(np.concatenate(draws) < mask_prob).to(policy.device)  # [patches]
            pixels = torch.where(hidden[:, None], black, prompts.pixel_values)
            masked = scorer(replace(prompts, pixel_values=pixels), ids, mask, temperature or 1.0)
            dependency += visual_dependency(clean.logprobs, masked.logprobs) / masks
        verdicts, _ = score(decode(policy, rollout), batch)
        for n, right in enumerate(verdicts):
            own = mask[n]
            tokens = [policy.tokenizer.decode([token]) for token in ids[n][own].tolist()]
            looks.append(Look(tokens, dependency[n][own].cpu().numpy(), focus[n][own].cpu().numpy(), bool(right)))
    policy.model.train(was_training)
    return looks


def example_figures(looks: list[Look]) -> dict[str, np.ndarray]:
    """Each figure of every example [E]."""
    means = [look.means() for look in looks]
    return {figure: np.array([m[figure] for m in means]) for figure in FIGURES}


def summarize(models: dict[str, dict[str, np.ndarray]]) -> dict[str, dict]:
    """A model: each figure's mean with its 95 % bootstrap interval, and the paired difference to the first model's with
    its own, from figures [E], or [S, E] over training seeds and examples."""
    first, summary = next(iter(models.values())), {}
    for name, values in models.items():
        summary[name] = {f: {"mean": float(v.mean()), "ci": bootstrap(v)} for f, v in values.items()}
        if values is not first:
            for f, v in values.items():
                summary[name][f] |= {
                    "difference": float((v - first[f]).mean()),
                    "difference_ci": bootstrap(v - first[f]),
                }
    return summary


def summary_table(summary: dict[str, dict]) -> str:
    """A plain-text table: a line a model, its means, and below each the difference to the first model."""
    lines = [["model", *FIGURES]]
    for name, figures in summary.items():
        lines.append([name, *(f"{f['mean']:.4f} ({f['ci'][0]:.4f} to {f['ci'][1]:.4f})" for f in figures.values())])
        if "difference" in figures[FIGURES[0]]:
            cells = [(f["difference"], *f["difference_ci"]) for f in figures.values()]
            lines.append(["  difference", *(f"{d:+.4f} ({low:+.4f} to {high:+.4f})" for d, low, high in cells)])
    return aligned(lines)


# ------------------------------------------------------------------------------------------------------------- the page


def scales(models: dict[str, list[Look]]) -> dict[str, tuple[float, float]]:
    """The values that are drawn palest and strongest, of all models' tokens: their 5th and 95th percentiles."""
    every = {f: np.concatenate([getattr(x, f) for looks in models.values() for x in looks]) for f in FIGURES[:2]}
    return {f: (float(np.quantile(v, 0.05)), float(np.quantile(v, 0.95))) for f, v in every.items()}


def shade(value: float, scale: tuple[float, float], figure: str) -> tuple[int, int, int]:
    """White for the palest to orange (dependency) or blue (focus) for the strongest."""
    share = float(np.clip((value - scale[0]) / (scale[1] - scale[0] + 1e-12), 0, 1))
    strongest = (255, 140, 40) if figure == "dependency" else (80, 150, 255)
    return tuple(round(255 + (s - 255) * share) for s in strongest)


def page(models: dict[str, list[Look]], examples: Sequence[Example]) -> str:
    """A page that needs nothing else: pictures as data, no script."""
    scale = scales(models)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Where the policy looks</title><style>"
        "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
        "section{display:flex;gap:1.5rem;border-top:1px solid #ccc;padding:1rem 0}"
        "img{width:224px;image-rendering:pixelated;border:1px solid #ddd;display:block;margin-bottom:.5rem}"
        ".tokens{font:14px/1.9 ui-monospace,monospace;white-space:pre-wrap;margin:.1rem 0 .6rem}"
        ".tokens span{padding:2px 0;border-radius:2px}h3{font-size:1rem;margin:.6rem 0 0}small{color:#777}"
        ".bar{display:inline-block;width:9rem;height:.8em;border:1px solid #ccc;margin:0 .4em}</style>"
        "<h1>Where the policy looks</h1>"
    ]
    for figure, (low, high) in scale.items():
        ends = ",".join("rgb({},{},{})".format(*shade(v, (low, high), figure)) for v in (low, high))
        bar = f"<i class=bar style='background:linear-gradient(90deg,{ends})'></i>"
        parts.append(f"<p>{figure}: {low:.3f} {bar} {high:.3f}</p>")
    for n, example in enumerate(examples):
        parts.append("<section><div>")
        for image in example.images:
            file = io.BytesIO()
            image.save(file, "PNG")
            parts.append(f"<img alt='' src='data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'>")
        question = html.escape(example.question.replace("<image>", ""))
        parts.append(f"</div><div><b>{question}</b> <small>answer {html.escape(example.answer)}</small>")
        for name, looks in models.items():
            verdict = "right" if looks[n].right else "wrong"
            parts.append(f"<h3>{html.escape(name)} <small>{verdict}</small></h3>")
            for figure in FIGURES[:2]:
                spans = []
                for token, value in zip(looks[n].tokens, getattr(looks[n], figure), strict=True):
                    colour = "rgb({},{},{})".format(*shade(value, scale[figure], figure))
                    title = f"{html.escape(token.strip(), quote=True)}: {value:.3f}"
                    spans.append(f'<span style="background:{colour}" title="{title}">{html.escape(token)}</span>')
                parts.append(f"<small>{figure}</small><div class=tokens>{''.join(spans)}</div>")
        parts.append("</div></section>")
    return "".join(parts) + "</html>\n"


def plot_tokens(models: dict[str, list[Look]], examples: Sequence[Example], path: Path, columns: int = 128) -> None:
    """The page's first examples as a picture: monospaced, so that a token's width is its length. Of a completion the
    first `DRAWN` tokens; a line says how many more there are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(dpi=130)
    # Data sets and models write $ for maths, which matplotlib would set, or stop at.
    plain, font = {"parse_math": False}, {"family": "monospace", "fontsize": 8}
    ruler = figure.text(0, 0, "0" * 100, **font)
    width = ruler.get_window_extent().width / 100 / figure.dpi  # inches of a column: what this font takes as drawn here
    ruler.remove()
    unit, picture = 0.165, 28  # inches a line; columns that the pictures take

    scale, rows, pictures = scales(models), [], []  # a row: a heading, or [(column, token, colour)]
    for n, example in enumerate(examples):
        top, height = len(rows), 0
        for image in example.images[:1]:
            height = (picture - 2) * width / unit * image.height / image.width
            pictures.append((image, (-picture + 1, -1, top + height - 0.5, top - 0.5)))
        rows.append(f"{example.question.replace('<image>', '').strip()}  (answer {example.answer})")
        for name, looks in models.items():
            for measure in FIGURES[:2]:
                rows.append(f"{name}, {'right' if looks[n].right else 'wrong'}: {measure}")
                line, column = [], 0
                for token, value in zip(looks[n].tokens[:DRAWN], getattr(looks[n], measure)[:DRAWN], strict=True):
                    token = token.replace("\n", "↵")
                    if column + len(token) > columns:
                        rows.append(line)
                        line, column = [], 0
                    line.append((column, token, [c / 255 for c in shade(value, scale[measure], measure)]))
                    column += len(token)
                rows.append(line)
                if (more := len(looks[n].tokens) - DRAWN) > 0:
                    rows.append(f"… and {more:,} more tokens, which the page shows")
        rows += [""] * max(1, math.ceil(top + height - len(rows)))  # the next picture stands below this one
    figure.set_size_inches((picture + columns + 1) * width, (len(rows) + 2) * unit)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    for y, row in enumerate(rows):
        if isinstance(row, str):
            weight = "bold" if row.endswith(")") else None
            axis.text(0, y, row, fontsize=7.5, weight=weight, color="#333", va="center", **plain)
            continue
        spans, colours = [(column, len(token)) for column, token, _ in row], [colour for *_, colour in row]
        axis.broken_barh(spans, (y - 0.5, 1), facecolors=colours, linewidth=0)
        for column, token, _ in row:
            axis.text(column, y + 0.25, token, va="baseline", **font, **plain)
    for image, extent in pictures:
        axis.imshow(image, extent=extent, aspect="auto", zorder=1)
    axis.set(xlim=(-picture, columns + 1), ylim=(len(rows) + 1, -1))
    figure.savefig(path)
    plt.close(figure)


def by_place(values: np.ndarray) -> np.ndarray:
    """Means [PLACES] of token values [T] over tenths of the completion; NaN where no token falls."""
    place = np.minimum(np.arange(len(values)) * PLACES // max(len(values), 1), PLACES - 1)
    return np.array([values[place == p].mean() if (place == p).any() else np.nan for p in range(PLACES)])


def plot_curves(models: dict[str, list[Look]], path: Path) -> None:
    """Mean dependency and focus against the place in the completion, with 95 % bands over examples."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    places = (np.arange(PLACES) + 0.5) / PLACES
    for axis, name in zip(axes, FIGURES[:2], strict=True):
        for model, looks in models.items():
            table = np.stack([by_place(getattr(x, name)) for x in looks])  # [examples, PLACES]
            spans = np.array([bootstrap(column[~np.isnan(column)], 1000) for column in table.T])
            (line,) = axis.plot(places, np.nanmean(table, 0), marker="o", label=model)
            axis.fill_between(places, spans[:, 0], spans[:, 1], color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set(title=f"visual {name}", xlabel="place in the completion (0: its beginning, 1: its end)")
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
    titles = [Path(name).name for name in args.model]
    titles = titles if len(set(titles)) == len(titles) else list(args.model)  # short where they stay distinct
    device = "cuda" if torch.cuda.is_available() else "cpu"
    examples = asked_examples(args, args.limit, device)
    with one_line(f"--out {args.out}"):
        folder.mkdir(parents=True, exist_ok=True)
    examples = [examples[n] for n in range(len(examples))]
    models = {}
    for title, name in zip(titles, args.model, strict=True):
        policy = None  # let go of the last model before the next is loaded
        policy = load_policy(newest_checkpoint(name), device=device, trainable=False, max_pixels=args.max_pixels)
        models[title] = look(
            policy,
            examples,
            template=args.prompt_template or settings_of(name)["prompt_template"],
            max_new_tokens=args.max_completion_length or settings_of(name)["max_completion_length"],
            temperature=args.temperature,
            masks=args.masks,
            mask_prob=args.mask_prob,
            batch_prompts=args.batch_prompts,
            seed=args.seed,
        )
    summary = summarize({name: example_figures(looks) for name, looks in models.items()})
    rows = {
        name: [{"right": x.right, "length": len(x.tokens), **x.means()} for x in looks]
        for name, looks in models.items()
    }
    print(f"{args.data}, split {args.split}, {len(examples)} examples; late: the last {LATE:.0%} of a completion")
    print(summary_table(summary), flush=True)
    with one_line(f"--out {args.out}"):
        write(folder / "look.json", json.dumps({"summary": summary, "examples": rows}, indent=1))
        write(folder / "index.html", page(models, examples[: args.show]))
        if args.show:
            plot_tokens(models, examples[: args.show], folder / "tokens.png")
        plot_curves(models, folder / "curves.png")
    print(f"{folder}: index.html, tokens.png, curves.png, look.json")
    return summary


if __name__ == "__main__":
    command_line(main, Args)
