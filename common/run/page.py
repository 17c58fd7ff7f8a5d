"""A run as one page: curves with the doctor's remarks, completions with their pictures, cost, configuration.

    python -m common.run.page runs/grpo-tiny-seed1      # writes runs/grpo-tiny-seed1/index.html

The page is made from the run folder's files alone, as the run goes and again whenever asked for. It needs no server, no
network and no script, and its size is bounded: curves are thinned, of few steps a few completions are shown, texts are
cut in the middle. Everything that a model or a data set has written is escaped.
"""

import base64
import contextlib
import html
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from io import BytesIO
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image

from common.run.cost import against, cost_card, count, duration
from common.run.files import one_line, write

POINTS = 240  # of a curve
SHOWN_STEPS = 24
SHOWN_ROWS = 8  # completions of a step
LONGEST_TEXT = 3000  # characters of a completion or question
SIDE = 320  # pixels of a kept picture
LEVELS = 6  # shades of a token

# Charts in their order: title, unit, and the metrics drawn in it, * standing for any text. Those of one method are in
# its runs only.
CHARTS = (
    ("Reward", "", ("reward", "accuracy", "eval/accuracy")),
    ("Terms of the reward", "", ("rewards/*/mean",)),
    ("Groups of equal rewards", "share", ("frac_reward_zero_std",)),
    ("Length", "tokens", ("completions/mean_length",)),
    ("Cut off at the length limit", "share", ("completions/clipped_ratio",)),
    ("Entropy", "nats a token", ("entropy",)),
    ("Divergence from the reference", "nats a token", ("kl",)),
    ("Gradient norm", "before clipping", ("grad_norm",)),
    ("Beyond the clip", "share of tokens", ("clip_ratio/*_mean",)),
    ("Sampling against scoring", "nats a token", ("mismatch",)),
    ("Dependency on the picture", "a token", ("dependency", "dependency/kept", "dependency/dropped")),
    ("Focus on the picture, right", "cosine", ("focus/right/early", "focus/right/late")),
    ("Focus on the picture, wrong", "cosine", ("focus/wrong/early", "focus/wrong/late")),
    ("Reward by noise level", "", ("noise/*/reward",)),
    ("Divergence of corrupted views", "nats a token", ("view/kl", "view/kl_mean")),
    ("Reliance on the picture", "nats a token", ("eval/image_reliance",)),
    ("Speed", "tokens a second", ("tokens_per_second",)),
)
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # nothing is loaded, nothing runs
STYLE = Path(__file__).with_suffix(".css")
QUIET = {"kl", "mismatch", "clip_ratio/*_mean", "completions/clipped_ratio"}  # no chart where it is never above 1e-4
SERIES = 4  # lines of a chart
# What two runs must have in common for their seconds a step to be compared.
ALIKE = ("model", "data", "max_pixels", "lora_rank", "freeze", "prompts_per_step", "group_size")
ALIKE += ("max_completion_length", "updates_per_rollout", "epochs_per_rollout", "micro_batch_tokens", "slots")


@dataclass
class Args:
    run: Annotated[str, tyro.conf.Positional]
    """run folder"""


# ------------------------------------------------------------------------------------------------ what a run leaves


def parsed(lines: Iterable[str]) -> list[dict]:
    """The objects of some lines of JSON; torn or strange lines are left out."""
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            found += [value] if isinstance(value, dict) else []
    return found


def read_lines(path: Path) -> list[dict]:
    """The objects of a JSONL file; none where there is no file."""
    return parsed(path.read_text(encoding="utf-8", errors="replace").split("\n")) if path.is_file() else []


def read_object(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def keep_pictures(folder: Path, step: int, images: Sequence[Image.Image]) -> list[str]:
    """Small copies of an example's pictures in `folder`/pictures, PNG or JPEG, the smaller; returns their names."""
    names = []
    for number, image in enumerate(images[:4]):
        small = image.convert("RGB")
        small.thumbnail((SIDE, SIDE))
        files = {}
        for ending, options in (("png", {"optimize": True}), ("jpg", {"format": "JPEG", "quality": 82})):
            files[ending] = BytesIO()
            small.save(files[ending], **({"format": "PNG"} | options))
        ending = min(files, key=lambda e: len(files[e].getvalue()))
        names.append(f"{step:06d}-{number}.{ending}")
        (folder / "pictures").mkdir(exist_ok=True)
        (folder / "pictures" / names[-1]).write_bytes(files[ending].getvalue())
    return names


def shown_completions(folder: Path) -> dict[int, list[dict]]:
    """A few completions of a few steps: of those whose pictures were kept, or, in a run without, of any. Of a long file
    few lines are taken apart."""
    file, with_pictures, every = folder / "completions.jsonl", {}, {}
    for line in file.open(encoding="utf-8", errors="replace") if file.is_file() else ():
        if found := re.match(r'{"step": (\d+),', line):
            for steps in (every, with_pictures) if '"pictures": [' in line else (every,):
                steps.setdefault(int(found[1]), []).append(line)
    steps = with_pictures or every
    numbers = sorted(steps)
    if len(numbers) > SHOWN_STEPS:  # the first, the last, and evenly between
        numbers = [numbers[round(i * (len(numbers) - 1) / (SHOWN_STEPS - 1))] for i in range(SHOWN_STEPS)]
    return {step: rows for step in numbers if (rows := parsed(steps[step][:SHOWN_ROWS]))}


def grpo_beside(folder: Path, args: dict) -> Path | None:
    """A finished run of grpo.py in the same parent folder, on the same machine with the same model, data, batch and
    lengths; one of the same seed if there is one."""
    if args.get("script") in (None, "grpo"):
        return None
    device = read_object(folder / "machine.json").get("device")
    found = []
    for summary in sorted(folder.resolve().parent.glob("*/summary.json")):
        other = read_object(summary.with_name("args.json"))
        same = all(other.get(name) == args.get(name) for name in ALIKE)
        same = same and read_object(summary.with_name("machine.json")).get("device") == device
        if other.get("script") == "grpo" and same:
            found.append((other.get("seed") != args.get("seed"), summary.parent))
    return min(found)[1] if found else None


# ------------------------------------------------------------------------------------------------ pieces of the page


def plain(text: object, longest: int = LONGEST_TEXT) -> str:
    """Text for HTML: escaped, cut in the middle, without what UTF-8 cannot hold."""
    text = str(text).encode("utf-8", "backslashreplace").decode()
    if len(text) > longest:
        half = longest // 2
        text = f"{text[:half]} … {len(text) - longest:,} characters left out … {text[-half:]}"
    return html.escape(text)


def flags(text: str) -> str:
    """Escaped text with the flags that it names kept in one piece."""
    return re.sub(r"--[a-z][a-z-]*", r"<code>\g<0></code>", text)


def number(value: float | None) -> str:
    """
    >>> number(0.7312), number(5479.2), number(1.2e-7), number(None)
    ('0.731', '5,479', '1.2e-07', '–')
    """
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def thinned(points: list[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """At most so many points, each the mean of neighbours."""
    size = math.ceil(len(points) / most)
    cuts = [points[i : i + size] for i in range(0, len(points), size or 1)]
    return [(sum(x for x, _ in cut) / len(cut), sum(y for _, y in cut) / len(cut)) for cut in cuts]


def smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over a tenth of the curve, at most 21 steps, around each point."""
    half = min(10, len(points) // 20)
    windows = (points[max(0, i - half) : i + half + 1] for i in range(len(points)))
    return [(x, sum(y for _, y in w) / len(w)) for (x, _), w in zip(points, windows, strict=True)]


def ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Round numbers between two values.

    >>> ticks(0, 0.83), ticks(0, 300)
    ([0.0, 0.25, 0.5, 0.75], [0.0, 100.0, 200.0, 300.0])
    """
    rough = (high - low) / most or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def chart(title: str, unit: str, series: dict[str, list[tuple[float, float]]], marks: list[tuple[int, float]]) -> str:
    """A figure of some curves, points (step, value) each, and the numbers of remarks at their steps."""
    width, height, left, right, top, bottom = 360, 172, 38, 8, 16, 22
    every = [point for points in series.values() for point in points]
    xs, ys = [x for x, _ in every] + [x for _, x in marks], [y for _, y in every]
    first, final = min(xs), max(max(xs), min(xs) + 1)
    low, high = min(0.0, *ys), max(ys)
    if low >= 0 and 0.3 < high <= 1 and unit in ("", "share"):
        high = 1.0  # rewards and shares fill 0 to 1
    high = high if high > low else low + 1
    high = high if high == 1.0 else high + 0.04 * (high - low)
    at = lambda x, y: (
        left + (x - first) / (final - first) * (width - left - right),
        height - bottom - (y - low) / (high - low) * (height - top - bottom),
    )
    line = lambda points: " ".join("{:.1f},{:.1f}".format(*at(*point)) for point in points)
    parts = []
    for y in ticks(low, high):
        _, py = at(first, y)
        parts.append(f"<path class=grid d='M{left} {py:.1f}H{width - right}'/>")
        parts.append(f"<text x={left - 5} y={py + 3.5:.1f} text-anchor=end>{number(y)}</text>")
    for x in (x for x in ticks(first, final, 5) if x == int(x)):
        px, _ = at(x, low)
        anchor = "end" if px > width - right - 12 else "middle"
        parts.append(f"<text x={px:.1f} y={height - 6} text-anchor={anchor}>{number(x)}</text>")
    for n, x in marks:
        px, _ = at(x, low)
        parts.append(f"<path class=mark d='M{px:.1f} {top - 2}V{height - bottom}'/>")
        parts.append(f"<text class=mark x={px:.1f} y={top - 5} text-anchor=middle>{n}</text>")
    labels = []
    for n, (name, points) in enumerate(series.items()):
        if len(points) > 30:  # points that stand apart, as of evaluations, are shown as they are
            parts.append(f"<polyline class='raw s{n}' points='{line(thinned(points))}'/>")
            points = smoothed(points)
        thin = thinned(points)
        parts.append(f"<polyline class=s{n} points='{line(thin)}'/>")
        if len(thin) <= 30:
            parts += ["<circle class=s{} cx={:.1f} cy={:.1f} r=2 />".format(n, *at(*point)) for point in thin]
        labels.append(f"<span class=s{n}>{plain(name, 40)}</span>")
    latest = number(next(iter(series.values()))[-1][1])
    legend = f"<p class=legend>{''.join(labels)}</p>" if len(labels) > 1 else ""
    name = f"{plain(title)} <small>{plain(unit)}</small>" if unit else plain(title)
    return (
        f"<figure><figcaption><b>{name}</b><output>{latest}</output></figcaption>"
        f"<svg viewBox='0 0 {width} {height}' role=img aria-label='{plain(title)}'>{''.join(parts)}</svg>"
        f"{legend}</figure>"
    )


def charts(lines: list[dict], remarks: list[dict]) -> str:
    marks = [(n, remark["step"]) for n, remark in enumerate(remarks, 1) if isinstance(remark.get("step"), int)]
    names = list(dict.fromkeys(name for line in lines for name in line))
    drawn = []
    for title, unit, patterns in CHARTS:
        series = {}
        for name in (name for pattern in patterns for name in names if fnmatch(name, pattern)):
            values = [(line["step"], line[name]) for line in lines if finite(line.get(name))]
            same = values and any(values == other for other in series.values())  # an accuracy that is the reward
            if values and not same and len(series) < SERIES:
                series[name] = values
        if not series or (QUIET & set(patterns) and max(y for points in series.values() for _, y in points) < 1e-4):
            continue
        drawn.append(chart(title, unit, series, marks))
    return "".join(drawn)


def finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def scale_of(rows: Iterable[dict], name: str) -> tuple[float, float] | None:
    """The values of tokens that are drawn palest and strongest: their 5th and 95th percentile over the page."""
    values = sorted(v for row in rows for v in row.get(name) or () if finite(v))
    return (values[len(values) // 20], values[len(values) * 19 // 20]) if values else None


def coloured(tokens: Sequence[str], values: Sequence[float], scale: tuple[float, float]) -> str:
    """Tokens on shades of a colour; neighbours of one shade are one piece. As many as a text may have characters."""
    pieces, length = [], 0
    for token, value in zip(tokens, values, strict=False):
        share = (value - scale[0]) / (scale[1] - scale[0] + 1e-12) if finite(value) else 0
        level = round(min(max(share, 0), 1) * (LEVELS - 1))
        if pieces and pieces[-1][0] == level:
            pieces[-1][1].append(token)
        else:
            pieces.append((level, [token]))
        length += len(token)
        if length > LONGEST_TEXT:
            pieces.append((0, [f" … {len(tokens):,} tokens in all"]))
            break
    return "".join(f"<i class=t{level}>{plain(''.join(texts))}</i>" for level, texts in pieces)


def completion(row: dict, scales: dict[str, tuple[float, float]]) -> str:
    reward, advantage = row.get("reward"), row.get("advantage")
    sign = "" if not finite(advantage) or not advantage else " up" if advantage > 0 else " down"
    signed = f"{advantage:+.2f}" if finite(advantage) else "–"
    facts = [
        f"<span>reward <b>{number(reward)}</b></span>",
        f"<span class='advantage{sign}'>advantage <b>{signed}</b></span>",
    ]
    terms = row.get("terms") if isinstance(row.get("terms"), dict) else {}
    facts += [f"<span>{plain(name, 40)} {number(value)}</span>" for name, value in terms.items()]
    tokens = row.get("tokens")
    texts = [
        f"<div class='text {name}' dir=auto title='colour: {name}'>{coloured(tokens, row[name], scale)}</div>"
        for name, scale in scales.items()
        if isinstance(tokens, list) and isinstance(row.get(name), list)
    ] or [f"<div class=text dir=auto>{plain(row.get('completion', ''))}</div>"]
    return f"<li><p class=facts>{''.join(facts)}</p>{''.join(texts)}</li>"


def picture(folder: Path, name: object) -> str:
    """A kept picture as part of the page; nothing where that is not one."""
    file = folder / "pictures" / Path(str(name)).name
    if file.suffix not in (".png", ".jpg") or not file.is_file():
        return ""
    kind = "png" if file.suffix == ".png" else "jpeg"
    return f"<img alt='' src='data:image/{kind};base64,{base64.b64encode(file.read_bytes()).decode()}'>"


def completions(folder: Path) -> str:
    shown = shown_completions(folder)
    every = [row for rows in shown.values() for row in rows]
    scales = {name: scale for name in ("dependency", "focus") if (scale := scale_of(every, name))}
    parts = [
        f"<p class=note>Token colours: {name}, from {number(low)} <span class='ramp {name}'>"
        f"{''.join(f'<i class=t{level}></i>' for level in range(LEVELS))}</span> to {number(high)}.</p>"
        for name, (low, high) in scales.items()
    ]
    for step, rows in shown.items():
        first = rows[0]
        rewards = [row["reward"] for row in rows if finite(row.get("reward"))]
        pictures = "".join(picture(folder, name) for name in first.get("pictures") or () if isinstance(name, str))
        question = plain(str(first.get("question", "")).replace("<image>", "").strip())
        headline = plain(" ".join(str(first.get("question", "")).replace("<image>", "").split()), 160)
        parts.append(
            f"<details{' open' if step == max(shown) else ''}><summary><b>step {step}</b> <span>{headline}</span>"
            f"<output>{number(sum(rewards) / len(rewards) if rewards else None)}</output></summary>"
            f"<div class=example><aside>{pictures}<p dir=auto>{question}</p>"
            f"<p class=note>reference <b>{plain(first.get('answer', ''), 300)}</b></p></aside>"
            f"<ol>{''.join(completion(row, scales) for row in rows)}</ol></div></details>"
        )
    return "".join(parts)


def table(values: dict[str, object], longest: int = 400) -> str:
    return (
        "<dl>"
        + "".join(f"<div><dt>{plain(k, 80)}</dt><dd>{plain(v, longest)}</dd></div>" for k, v in values.items())
        + "</dl>"
    )


def figures(folder: Path, lines: list[dict]) -> str:
    """The figures on top: the mean of the last ten steps, and tests before and after."""
    recent = lambda name: [line[name] for line in lines[-10:] if finite(line.get(name))]
    average = lambda name: number(sum(recent(name)) / len(recent(name))) if recent(name) else "–"
    held_out = [line["eval/accuracy"] for line in lines if finite(line.get("eval/accuracy"))]
    shown = {"reward": average("reward"), "accuracy": average("accuracy")}
    shown |= {"held-out": f"{held_out[-1]:.1%}"} if held_out else {}
    for name in ("before", "after"):
        accuracy = read_object(folder / "evaluations" / f"{name}.json").get("accuracy")
        shown |= {f"test {name}": f"{accuracy:.1%}"} if finite(accuracy) else {}
    shown |= {"tokens": average("completions/mean_length"), "entropy": average("entropy")}
    shown |= {"tokens / s": average("tokens_per_second")}
    return "".join(f"<div><span>{plain(name)}</span><b>{value}</b></div>" for name, value in shown.items())


def shades() -> str:
    """The style of tokens' colours: the stronger, the less of the ground shines through."""
    return "".join(
        f".{name} .t{level}{{background:rgba(var(--{name}),{level / (LEVELS - 1) * 0.75:.2f})}}"
        for name in ("dependency", "focus")
        for level in range(LEVELS)
    )


def page(folder: Path) -> str:
    """The page of a run folder, complete or under way."""
    args, lines = read_object(folder / "args.json"), read_lines(folder / "metrics.jsonl")
    lines = [line for line in lines if isinstance(line.get("step"), int)]
    remarks, summary = read_lines(folder / "remarks.jsonl"), read_object(folder / "summary.json")
    steps = args.get("steps")
    state = "finished" if summary else "under way or stopped; reload the page for later steps"
    spent = duration(sum(line["seconds"] for line in lines if finite(line.get("seconds"))))
    name = folder.resolve().name
    cost = cost_card(lines, read_object(folder / "machine.json"))
    if other := grpo_beside(folder, args):
        cost |= against(lines, other.name, read_lines(other / "metrics.jsonl"))
    said = "".join(
        f"<li><small>{n} · step {plain(remark.get('step'))} · {plain(remark.get('rule')).replace('_', ' ')}</small>"
        f"{flags(plain(remark.get('text')))}</li>"
        for n, remark in enumerate(remarks, 1)
    )
    sections = {
        "Remarks": said and f"<ol class=remarks>{said}</ol>",
        "Curves": lines and f"<div class=charts>{charts(lines, remarks)}</div>",
        "Completions": completions(folder),
        "Cost": lines and table(cost),
        "Configuration": args and table({key: "" if value is None else value for key, value in args.items()}),
    }
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections.items() if content)
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f'<meta http-equiv=Content-Security-Policy content="{POLICY}">'
        f"<title>{plain(name)}</title><style>{STYLE.read_text()}{shades()}</style><header><h1>{plain(name)}</h1>"
        f"<p>{plain(args.get('script', ''))} · {plain(args.get('model', ''))} · {plain(args.get('data', ''))}</p>"
        f"<p>{count(len(lines))} of {plain(steps)} steps in {spent}, {state}</p>"
        f"<div class=figures>{figures(folder, lines)}</div></header>{body}</html>\n"
    )


def write_page(folder: Path) -> None:
    """Write `folder`/index.html, whole or not at all."""
    with one_line(f"page {folder / 'index.html'}"):
        write(folder / "index.html", page(folder))


def main(args: Args) -> None:
    folder = Path(args.run)
    if not read_object(folder / "args.json"):
        raise SystemExit(f"{args.run}: no run there (args.json is missing or damaged)")
    write_page(folder)
    print(f"{folder / 'index.html'}: {(folder / 'index.html').stat().st_size / 2**20:.2f} MB")


if __name__ == "__main__":
    main(tyro.cli(Args))
