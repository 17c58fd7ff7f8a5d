"""Procedural picture puzzles: any split, any index, always the same puzzle, nothing to download.

Five families; each answer needs several looks at the picture and a short computation:

    sum         "How many red shapes plus how many stars are there?"                  count twice, add
    difference  "How many more circles than rings are there?"                         count twice, subtract
    hop         "Start at the red star. Go 2 right, then 1 up. What colour is there?" find, move, move, read
    path        "Start at the black disc and follow the arrows. Which shape is at the end?"
    bars        "What is the red bar plus the blue bar?"                              read twice, compute

Splits. `train`, `validation` and `test` can never share a layout: a hash of what is drawn (which things, in which
cells, without jitter and noise) decides the one split that may show it, and drawing is repeated until the hash fits.
`shifted` tests generalization: more things than ever trained on, longer paths, and only the twelve colour-shape pairs
that no other split draws (`HELD_OUT`).

Answers are balanced by construction: the answer is drawn first, uniformly, then a picture that has it. The best
guess that reads the question but not the picture, fitted on train, is right on 17 % of test; the best constant on 10 %
(`blind_guess_accuracy()`).

Each puzzle comes with two demonstrations for supervised learning, a `careful` one that names every relevant thing
with its place, and a `hasty` one that jumps to an impression. Cells are named like a chess board: rows a, b, c, d
from the top, columns 1, 2, 3, 4 from the left.
"""

import hashlib
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageDraw

SPLITS = ("train", "validation", "test", "shifted")
SIZE = 128  # pixels, height and width
GRID = 4  # cells per side
CELL = SIZE // GRID  # pixels

COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 150, 62),
    "blue": (44, 88, 208),
    "yellow": (236, 200, 30),
    "purple": (134, 56, 160),
    "orange": (240, 130, 24),
}
SHAPES = {  # singular -> plural
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "cross": "crosses",
    "ring": "rings",
}
STEPS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}  # name -> (rows, columns)

Pair = tuple[str, str]  # (colour, shape)
# Two colours of each shape, two shapes of each colour, are kept for `shifted`.
HELD_OUT: frozenset[Pair] = frozenset(
    (colour, shape)
    for i, colour in enumerate(COLOURS)
    for j, shape in enumerate(SHAPES)
    if (i + j) % len(SHAPES) in (0, 2)
)
TRAINED: frozenset[Pair] = frozenset((c, s) for c in COLOURS for s in SHAPES) - HELD_OUT

# What share of layouts each split may show, in eighths: a layout's hash modulo 8 picks its only split.
_BUCKETS = {"train": {0, 1, 2, 3}, "validation": {4}, "test": {5, 6}, "shifted": {7}}

T = TypeVar("T")


class Thing(NamedTuple):
    """One drawn thing: a shape, an arrow (`right`, `left`, `down`, `up`; colour `grey` or `black`), or a bar.

    `row` is a grid row from the top; for a bar it is the bar's height in units instead.
    """

    colour: str
    shape: str
    row: int
    column: int

    @property
    def place(self) -> str:
        return "abcd"[self.row] + str(self.column + 1)


@dataclass(frozen=True)
class Puzzle:
    """A question about a picture, its answer, and two ways to reason. The picture is drawn when first asked for."""

    family: str
    question: str
    answer: str
    kind: str
    """How an answer is checked: `int` or `exact`."""
    careful: str
    """Names each relevant thing and its place, then computes. Always ends in `answer`."""
    hasty: str
    """An impression without naming anything; the answer it arrives at, often a wrong one, is `hasty_answer`."""
    hasty_answer: str
    things: tuple[Thing, ...]
    seed: str

    @cached_property
    def image(self) -> Image.Image:
        """RGB, 128 x 128."""
        return _draw(self)


class _Dice:
    """Draws built on `random()` alone, the one method whose stream Python promises to keep for ever."""

    def __init__(self, seed: str):
        self.random = random.Random(seed).random

    def between(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return low + int(self.random() * (high - low + 1))

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self.random() * len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        items = list(items)
        for i in range(len(items) - 1, 0, -1):
            j = int(self.random() * (i + 1))
            items[i], items[j] = items[j], items[i]
        return items


# What a family returns: (things, question, answer, careful, hasty, hasty_answer); None when a try does not work out.
Try = tuple[list[Thing], str, str, str, str, str] | None

_CELLS = [(row, column) for row in range(GRID) for column in range(GRID)]


def _place(dice: _Dice, pairs: Sequence[Pair]) -> list[Thing]:
    """Put the pairs into different cells; reading order."""
    cells = dice.shuffled(_CELLS)[: len(pairs)]
    return sorted((Thing(*pair, *cell) for pair, cell in zip(pairs, cells, strict=True)), key=lambda t: t[2:])


def _glance(dice: _Dice, value: int) -> int:
    """What a hasty counter sees: the truth, one too few, one too many, two too few."""
    r = dice.random()
    return abs(value + (0 if r < 0.37 else -1 if r < 0.71 else 1 if r < 0.90 else -2))


def _sum(goal: _Dice, dice: _Dice, allowed: list[Pair], shifted: bool) -> Try:
    colour, shape = goal.pick(list(COLOURS)), goal.pick(list(SHAPES))
    total = goal.between(2, 7)
    n_colour = dice.between(max(1, total - 5), min(5, total - 1))
    n_shape = total - n_colour
    n_both = dice.between(0, min(2, n_colour, n_shape)) if (colour, shape) in allowed else 0
    only_colour = [p for p in allowed if p[0] == colour and p[1] != shape]
    only_shape = [p for p in allowed if p[0] != colour and p[1] == shape]
    neither = [p for p in allowed if p[0] != colour and p[1] != shape]
    pairs = [(colour, shape)] * n_both
    pairs += [dice.pick(only_colour) for _ in range(n_colour - n_both)]
    pairs += [dice.pick(only_shape) for _ in range(n_shape - n_both)]
    size = dice.between(11, 14) if shifted else dice.between(max(5, len(pairs)), 9)
    things = _place(dice, pairs + [dice.pick(neither) for _ in range(size - len(pairs))])

    first = ", ".join(f"{t.shape} {t.place}" for t in things if t.colour == colour)
    second = ", ".join(f"{t.colour} {t.place}" for t in things if t.shape == shape)
    careful = f"Look: {colour}: {first} = {n_colour}. {shape}: {second} = {n_shape}. {n_colour} + {n_shape} = {total}."
    seen = _glance(dice, total)
    part = max(0, min(seen, n_colour))
    hasty = f"At a glance about {part} {colour} shapes and some {seen - part} {SHAPES[shape]}, so perhaps {seen}."
    question = f"How many {colour} shapes plus how many {SHAPES[shape]} are there?"
    return things, question, str(total), careful, hasty, str(seen)


def _difference(goal: _Dice, dice: _Dice, allowed: list[Pair], shifted: bool) -> Try:
    by_shape = goal.random() < 0.5
    one, other = goal.shuffled(list(SHAPES) if by_shape else list(COLOURS))[:2]
    result = goal.between(0, 4)
    n_other = dice.between(1, min(3, (8 - result) // 2))
    n_one = n_other + result
    key = 1 if by_shape else 0
    of_one, of_other = [p for p in allowed if p[key] == one], [p for p in allowed if p[key] == other]
    rest = [p for p in allowed if p[key] not in (one, other)]
    pairs = [dice.pick(of_one) for _ in range(n_one)] + [dice.pick(of_other) for _ in range(n_other)]
    size = dice.between(11, 14) if shifted else dice.between(max(5, len(pairs)), 9)
    things = _place(dice, pairs + [dice.pick(rest) for _ in range(size - len(pairs))])

    first = ", ".join(f"{t[1 - key]} {t.place}" for t in things if t[key] == one)
    second = ", ".join(f"{t[1 - key]} {t.place}" for t in things if t[key] == other)
    careful = f"Look: {one}: {first} = {n_one}. {other}: {second} = {n_other}. {n_one} - {n_other} = {result}."
    one, other = (SHAPES[one], SHAPES[other]) if by_shape else (f"{one} shapes", f"{other} shapes")
    seen = _glance(dice, result)
    hasty = f"At a glance there are about {n_other + seen} {one} and some {n_other} {other}, so perhaps {seen}."
    return things, f"How many more {one} than {other} are there?", str(result), careful, hasty, str(seen)


def _asked(goal: _Dice, allowed: list[Pair]) -> tuple[int, str, list[Pair]]:
    """What is asked for (0 colour, 1 shape), the answer, and the pairs that have it."""
    key = 0 if goal.random() < 0.5 else 1
    answer = goal.pick(list((COLOURS, SHAPES)[key]))
    return key, answer, [p for p in allowed if p[key] == answer]


def _mistake(dice: _Dice, things: Sequence[Thing], target: Thing, key: int) -> str:
    """What a hasty reader takes for the target: the target, or else a thing near it."""
    if dice.random() < 0.25:
        return target[key]
    near = [t for t in things if 0 < abs(t.row - target.row) + abs(t.column - target.column) <= 2 and t.shape in SHAPES]
    return dice.pick(near)[key] if near else target[key]


def _hop(goal: _Dice, dice: _Dice, allowed: list[Pair], shifted: bool) -> Try:
    key, answer, fits = _asked(goal, allowed)
    start = goal.pick(allowed)
    across, n_across = goal.pick(["right", "left"]), goal.between(1, 2)
    along, n_along = goal.pick(["down", "up"]), goal.between(1, 2)
    row, column = dice.pick(_CELLS)
    turn = Thing("", "", row, column + STEPS[across][1] * n_across)
    end = (row + STEPS[along][0] * n_along, turn.column)
    if end not in _CELLS:
        return None
    fits = [p for p in fits if p != start]
    others = [p for p in allowed if p != start]
    target = Thing(*dice.pick(fits), *end)
    size = dice.between(12, 14) if shifted else dice.between(7, 10)
    cells = dice.shuffled([c for c in _CELLS if c not in ((row, column), end)])[: size - 2]
    things = [Thing(*start, row, column), target] + [Thing(*dice.pick(others), *cell) for cell in cells]

    name = " ".join(start)
    careful = (
        f"Look: {name} at {things[0].place}. {n_across} {across} is {turn.place}. {n_along} {along} is {target.place}. "
        f"{target.place} is a {target.colour} {target.shape}."
    )
    seen = _mistake(dice, things, target, key)
    hasty = f"At a glance, going from the {name} that way I seem to see something like a {seen} one."
    ask = ("What colour", "Which shape")[key]
    question = f"Start at the {name}. Go {n_across} {across}, then {n_along} {along}. {ask} is there?"
    return things, question, answer, careful, hasty, seen


def _path(goal: _Dice, dice: _Dice, allowed: list[Pair], shifted: bool) -> Try:
    key, answer, fits = _asked(goal, allowed)
    length = dice.between(5, 6) if shifted else dice.between(2, 4)
    walk, names = [dice.pick(_CELLS)], []
    for _ in range(length):
        ways = [(n, (walk[-1][0] + r, walk[-1][1] + c)) for n, (r, c) in STEPS.items()]
        ways = [(n, cell) for n, cell in ways if cell in _CELLS and cell not in walk]
        if not ways:
            return None
        name, cell = dice.pick(ways)
        walk.append(cell)
        names.append(name)
    target = Thing(*dice.pick(fits), *walk[-1])
    things = [Thing("grey", name, *cell) for name, cell in zip(names, walk[:-1], strict=True)]
    things[0] = things[0]._replace(colour="black")
    places = [t.place for t in things] + [target.place]
    free = dice.shuffled([c for c in _CELLS if c not in walk])
    n_shapes, n_arrows = (5, 3) if shifted else (dice.between(3, 5), dice.between(1, 3))
    shapes = [Thing(*dice.pick(allowed), *cell) for cell in free[:n_shapes]]
    arrows = [Thing("grey", dice.pick(list(STEPS)), *cell) for cell in free[n_shapes : n_shapes + n_arrows]]
    things = [*things, target, *shapes, *arrows]

    steps = ", ".join(f"{name} {place}" for name, place in zip(names, places[1:], strict=True))
    careful = f"Look: disc at {places[0]}, {steps}. {target.place} is a {target.colour} {target.shape}."
    seen = _mistake(dice, things, target, key)
    hasty = f"At a glance, the arrows from the disc seem to lead me to something like a {seen} one."
    ask = ("What colour", "Which shape")[key]
    question = f"Start at the black disc and follow the arrows. {ask} is at the end?"
    return things, question, answer, careful, hasty, seen


def _bars(goal: _Dice, dice: _Dice, allowed: list[Pair], shifted: bool) -> Try:
    plus = goal.random() < 0.5
    one, other = goal.shuffled(list(COLOURS))[:2]
    result = goal.between(4, 12) if plus else goal.between(0, 5)
    high = dice.between(max(1, result - 8), min(8, result - 1)) if plus else dice.between(1 + result, 8)
    low = result - high if plus else high - result
    size = 6 if shifted else 4
    colours = [one, other, *dice.shuffled([c for c in COLOURS if c not in (one, other)])[: size - 2]]
    heights = [high, low] + [dice.between(1, 8) for _ in colours[2:]]
    bars = dice.shuffled(list(zip(colours, heights, strict=True)))
    things = [Thing(c, dice.pick([p[1] for p in allowed if p[0] == c]), h, i) for i, (c, h) in enumerate(bars)]

    rank = {t.colour: i + 1 for i, t in enumerate(things)}
    shape = {t.colour: t.shape for t in things}
    sign = "+" if plus else "-"
    careful = (
        f"Look: {one} is bar {rank[one]}, on a {shape[one]}, at {high}. "
        f"{other} is bar {rank[other]}, on a {shape[other]}, at {low}. {high} {sign} {low} = {result}."
    )
    seen = _glance(dice, result)
    hasty = f"At a glance the {one} bar and the {other} bar taken together give me perhaps {seen}."
    word = "plus" if plus else "minus"
    return things, f"What is the {one} bar {word} the {other} bar?", str(result), careful, hasty, str(seen)


_BUILD: dict[str, Callable[[_Dice, _Dice, list[Pair], bool], Try]] = {
    "sum": _sum,
    "difference": _difference,
    "hop": _hop,
    "path": _path,
    "bars": _bars,
}
FAMILIES: tuple[str, ...] = tuple(_BUILD)
_ALLOWED = {True: sorted(HELD_OUT), False: sorted(TRAINED)}


def content_hash(family: str, things: Sequence[Thing]) -> int:
    """A number that depends on what is drawn where, and on nothing else (no jitter, no noise, no question)."""
    text = family + ";" + ";".join(" ".join(map(str, t)) for t in sorted(things))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def puzzle(split: str, index: int) -> Puzzle:
    """The puzzle of that index: the same for ever. Families take turns; every index from 0 on exists."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if index < 0:
        raise ValueError(f"a puzzle index is 0 or more, not {index}")
    family = FAMILIES[index % len(FAMILIES)]
    shifted = split == "shifted"
    for attempt in count():
        # The goal (question and answer) is the same in every try, so rejecting layouts does not unbalance answers.
        goal, dice = _Dice(f"{split}/{index}"), _Dice(f"{split}/{index}/{attempt}")
        made = _BUILD[family](goal, dice, _ALLOWED[shifted], shifted)
        if made is not None and content_hash(family, made[0]) % 8 in _BUCKETS[split]:
            break
    things, question, answer, careful, hasty, hasty_answer = made
    return Puzzle(
        family=family,
        question=question,
        answer=answer,
        kind="exact" if family in ("hop", "path") else "int",
        careful=careful,
        hasty=hasty,
        hasty_answer=hasty_answer,
        things=tuple(things),
        seed=f"{split}/{index}",
    )


def blind_guess_accuracy(n_train: int = 20000, n_test: int = 2000, split: str = "test") -> dict[str, float]:
    """How often the best guesses without the picture are right, fitted on train, measured on `split`.

    `constant` always says the most frequent answer; `question` says the most frequent answer of that exact question,
    and where it is new, of its family.
    """
    by_question, by_family, every = defaultdict(Counter), defaultdict(Counter), Counter()
    for index in range(n_train):
        p = puzzle("train", index)
        for counter in (by_question[p.question], by_family[p.family], every):
            counter[p.answer] += 1
    constant = every.most_common(1)[0][0]
    right = Counter()
    for index in range(n_test):
        p = puzzle(split, index)
        guess = (by_question.get(p.question) or by_family[p.family]).most_common(1)[0][0]
        right["constant"] += p.answer == constant
        right["question"] += p.answer == guess
    return {name: right[name] / n_test for name in ("constant", "question")}


# ---- drawing: everything at twice the size, then averaged down, which smooths the edges ----

_ZOOM = 2
_STAR = [
    (math.sin(k * math.pi / 5) * r, -math.cos(k * math.pi / 5) * r) for k in range(10) for r in [1.1, 0.45][k % 2 :][:1]
]
_CROSS = [(-1, -0.35), (-0.35, -0.35), (-0.35, -1), (0.35, -1), (0.35, -0.35), (1, -0.35)]
_CROSS += [(-x, -y) for x, y in _CROSS]
_TRIANGLE = [(0, -1.05), (1.05, 0.85), (-1.05, 0.85)]
_ARROW = [(-1, -0.25), (0.15, -0.25), (0.15, -0.8), (1, 0), (0.15, 0.8), (0.15, 0.25), (-1, 0.25)]
_POLYGONS = {"star": _STAR, "cross": _CROSS, "triangle": _TRIANGLE}


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: tuple[int, ...]) -> None:
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=max(2, round(r * 0.42)))
    elif shape == "square":
        draw.rectangle((x - r * 0.88, y - r * 0.88, x + r * 0.88, y + r * 0.88), fill=fill)
    elif shape in STEPS:
        down, right = STEPS[shape]
        draw.polygon(
            [(x + right * a - down * b, y + down * a + right * b) for a, b in ((u * r, v * r) for u, v in _ARROW)],
            fill=fill,
        )
    else:
        draw.polygon([(x + a * r, y + b * r) for a, b in _POLYGONS[shape]], fill=fill)


def _draw(p: Puzzle) -> Image.Image:
    """Draw a puzzle with jitter in position, size, colour and background, all seeded by the puzzle."""
    dice = _Dice(p.seed + "/draw")
    jitter = lambda width: (2 * dice.random() - 1) * width
    z = _ZOOM
    paper = tuple(dice.between(232, 250) for _ in range(3))
    faint = tuple(v - 22 for v in paper)
    image = Image.new("RGB", (SIZE * z, SIZE * z), paper)
    draw = ImageDraw.Draw(image)
    tint = lambda colour: tuple(min(255, max(0, v + int(jitter(14)))) for v in COLOURS[colour])
    left, top = jitter(2.5), jitter(2.5)
    if p.family == "bars":
        unit, base, pitch = 12.5, 108 + top, SIZE / len(p.things)
        for level in range(1, 9):
            y = (base - level * unit) * z
            draw.line((0, y, SIZE * z, y), fill=faint, width=3 if level == 4 else 1)
        for t in p.things:
            x, fill = (pitch * (t.column + 0.5) + left + jitter(1.5)) * z, tint(t.colour)
            half = pitch * (0.26 + jitter(0.05)) * z
            draw.rectangle((x - half, (base - t.row * unit) * z, x + half, base * z), fill=fill)
            _draw_shape(draw, t.shape, x, (base + 10) * z, 7.5 * z, fill)
    else:
        for k in range(1, GRID):
            draw.line(((k * CELL + left) * z, 0, (k * CELL + left) * z, SIZE * z), fill=faint, width=1)
            draw.line((0, (k * CELL + top) * z, SIZE * z, (k * CELL + top) * z), fill=faint, width=1)
        for t in p.things:
            x, y = (CELL * (t.column + 0.5) + left + jitter(3)) * z, (CELL * (t.row + 0.5) + top + jitter(3)) * z
            r = (10 + jitter(1.8)) * z
            if t.colour == "black":
                draw.ellipse((x - r * 1.2, y - r * 1.2, x + r * 1.2, y + r * 1.2), fill=(20, 20, 20))
                _draw_shape(draw, t.shape, x, y, r, (250, 250, 250))
            else:
                _draw_shape(draw, t.shape, x, y, r, tint(t.colour) if t.colour in COLOURS else (110, 110, 110))
    pixels = np.asarray(image.reduce(z), dtype=np.int16)
    # RandomState keeps its stream for ever; numpy's newer generators do not promise to.
    grain = np.random.RandomState(dice.between(0, 2**31 - 1)).randint(-5, 6, (SIZE, SIZE, 1), dtype=np.int16)
    return Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))
