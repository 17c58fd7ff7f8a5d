"""Procedural picture puzzles: any split, any index, always the same puzzle, nothing to download.

Five families. No answer can be had without the picture, and most take a chain of looks, each of which must be right:

    hop      "Start at the red star. Go 2 right, then 1 up. What colour is there?"        find, move, move, read
    path     "Start at the black disc and follow the arrows. Which shape is at the end?"  find, turn, turn, ..., read
    pair     "Look at b2, d1, a4 and c3. Which colour comes twice?"                       read three to five times
    bars     "What is the red bar plus the blue bar?"                                     find and read, twice
    extreme  "Which colour is the tallest bar?"                                           read every bar

Splits. `train`, `validation` and `test` can never share a layout: a hash of what is drawn (which things, in which
cells, without jitter and noise) decides the one split that may show it, and drawing is repeated until the hash fits.
`shifted` tests generalization: more things and longer chains than ever trained on, and on the grid only the twelve
colour-shape pairs that no other split draws (`HELD_OUT`).

Answers are balanced by construction: the answer is drawn first, uniformly, then a picture that has it;
`blind_guess_accuracy()` says how far the best guess without the picture comes.

`solve` writes a demonstration for supervised learning: every look at the picture said aloud, then the answer. It asks a
function what each look sees, so that a demonstrator with bad eyes is that function and nothing else, and it knows which
characters of the text were read off the picture.

`hint` is what "somebody says" the answer is; whether that is right is decided by a dial. Cells are named like a chess
board: rows a, b, c, d from the top, columns 1, 2, 3, 4 from the left.
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
TALLEST = 6  # units

COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 150, 62),
    "blue": (44, 88, 208),
    "yellow": (236, 200, 30),
    "purple": (134, 56, 160),
    "orange": (240, 130, 24),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
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
    """A question about a picture and its answer. The picture is drawn when first asked for."""

    family: str
    question: str
    answer: str
    kind: str
    """How an answer is checked: `int` or `exact`."""
    things: tuple[Thing, ...]
    asked: tuple
    """What `solve` must know of the question; each family has its own."""
    seed: str

    @cached_property
    def image(self) -> Image.Image:
        """RGB, 128 x 128."""
        return _draw(self)


class Read(NamedTuple):
    """Words of a demonstration that were read off the picture."""

    text: str
    kind: str
    """`colour`, `shape`, `height`, `place` or `direction`"""
    truth: str
    """what the picture shows"""
    look: int
    """which look at the picture it belongs to, from 0"""


class Demonstration(NamedTuple):
    """A chain of looks and the answer that it arrives at."""

    pieces: tuple[str | Read, ...]
    answer: str

    @property
    def text(self) -> str:
        """What the demonstrator says before the answer."""
        return "".join(piece if isinstance(piece, str) else piece.text for piece in self.pieces)

    @property
    def spans(self) -> list[tuple[int, int, Read]]:
        """Where in `text` the picture was read: first character, the one behind the last, and what was read."""
        spans, start = [], 0
        for piece in self.pieces:
            end = start + len(piece if isinstance(piece, str) else piece.text)
            if isinstance(piece, Read):
                spans.append((start, end, piece))
            start = end
        return spans


# What a look sees: what kind of thing, the truth, which look it is, of how many -> the word that is said.
Eye = Callable[[str, str, int, int], str]


def good_eye(kind: str, truth: str, look: int, looks: int) -> str:
    """Sees what there is."""
    return truth


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


# What a family returns: (things, question, answer, asked); None when a try does not work out.
Try = tuple[list[Thing], str, str, tuple] | None

_CELLS = [(row, column) for row in range(GRID) for column in range(GRID)]
_ASK = ("What colour", "Which shape")


def _goal(goal: _Dice, allowed: list[Pair]) -> tuple[int, str, list[Pair]]:
    """What is asked for (0 colour, 1 shape), the answer, and the pairs that have it."""
    key = 0 if goal.random() < 0.5 else 1
    answer = goal.pick(list((COLOURS, SHAPES)[key]))
    return key, answer, [p for p in allowed if p[key] == answer]


def _hop(goal: _Dice, dice: _Dice, allowed: list[Pair], shifted: bool) -> Try:
    key, answer, fits = _goal(goal, allowed)
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
    size = dice.between(11, 13) if shifted else dice.between(6, 9)
    cells = dice.shuffled([c for c in _CELLS if c not in ((row, column), end)])[: size - 2]
    things = [Thing(*start, row, column), target] + [Thing(*dice.pick(others), *cell) for cell in cells]
    name = " ".join(start)
    question = f"Start at the {name}. Go {n_across} {across}, then {n_along} {along}. {_ASK[key]} is there?"
    return things, question, answer, (key, f"{n_across} {across}", turn.place, f"{n_along} {along}")


def _path(goal: _Dice, dice: _Dice, allowed: list[Pair], shifted: bool) -> Try:
    key, answer, fits = _goal(goal, allowed)
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
    free = dice.shuffled([c for c in _CELLS if c not in walk])
    n_shapes, n_arrows = (5, 3) if shifted else (dice.between(2, 4), dice.between(1, 2))
    shapes = [Thing(*dice.pick(allowed), *cell) for cell in free[:n_shapes]]
    arrows = [Thing("grey", dice.pick(list(STEPS)), *cell) for cell in free[n_shapes : n_shapes + n_arrows]]
    question = f"Start at the black disc and follow the arrows. {_ASK[key]} is at the end?"
    return [*things, target, *shapes, *arrows], question, answer, (key, length)


def _pair(goal: _Dice, dice: _Dice, allowed: list[Pair], shifted: bool) -> Try:
    key, answer, _ = _goal(goal, allowed)
    looks = 6 if shifted else goal.between(3, 5)
    others = [name for name in (COLOURS, SHAPES)[key] if name != answer]
    names = dice.shuffled([answer, answer, *dice.shuffled(others)[: looks - 2]])
    pairs = [dice.pick([p for p in allowed if p[key] == name]) for name in names]
    extra = dice.between(4, 6) if shifted else dice.between(2, 4)
    pairs += [dice.pick(allowed) for _ in range(extra)]
    things = [Thing(*pair, *cell) for pair, cell in zip(pairs, dice.shuffled(_CELLS), strict=False)]
    places = [t.place for t in things[:looks]]
    word = ("colour", "shape")[key]
    question = f"Look at {', '.join(places[:-1])} and {places[-1]}. Which {word} comes twice?"
    return things, question, answer, (key, looks)


def _bars(goal: _Dice, dice: _Dice, allowed: list[Pair], shifted: bool) -> Try:
    plus = goal.random() < 0.5
    one, other = goal.shuffled(list(COLOURS))[:2]
    result = goal.between(3, 11) if plus else goal.between(0, 4)
    if plus:
        high = dice.between(max(1, result - TALLEST), min(TALLEST, result - 1))
    else:
        high = dice.between(1 + result, TALLEST)
    low = result - high if plus else high - result
    rest = dice.shuffled([c for c in COLOURS if c not in (one, other)])[: 3 if shifted else 2]
    bars = dice.shuffled([(one, high), (other, low), *((c, dice.between(1, TALLEST)) for c in rest)])
    things = [Thing(c, "bar", h, i) for i, (c, h) in enumerate(bars)]
    word = "plus" if plus else "minus"
    return things, f"What is the {one} bar {word} the {other} bar?", str(result), (one, "+" if plus else "-", other)


def _extreme(goal: _Dice, dice: _Dice, allowed: list[Pair], shifted: bool) -> Try:
    answer, word = goal.pick(list(COLOURS)), goal.pick(["tallest", "lowest"])
    rest = dice.shuffled([c for c in COLOURS if c != answer])[: 4 if shifted else dice.between(2, 3)]
    height = dice.between(2, TALLEST) if word == "tallest" else dice.between(1, TALLEST - 1)
    beyond = (1, height - 1) if word == "tallest" else (height + 1, TALLEST)
    bars = dice.shuffled([(answer, height), *((c, dice.between(*beyond)) for c in rest)])
    things = [Thing(c, "bar", h, i) for i, (c, h) in enumerate(bars)]
    return things, f"Which colour is the {word} bar?", answer, (word,)


_BUILD: dict[str, Callable[[_Dice, _Dice, list[Pair], bool], Try]] = {
    "hop": _hop,
    "path": _path,
    "pair": _pair,
    "bars": _bars,
    "extreme": _extreme,
}
FAMILIES: tuple[str, ...] = tuple(_BUILD)
_ALLOWED = {True: sorted(HELD_OUT), False: sorted(TRAINED)}


def content_hash(family: str, things: Sequence[Thing]) -> int:
    """A number that depends on what is drawn where, and on nothing else (no jitter, no noise, no question)."""
    drawn = "bars" if family in ("bars", "extreme") else "grid"
    text = drawn + ";" + ";".join(" ".join(map(str, t)) for t in sorted(things))
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
    things, question, answer, asked = made
    kind = "int" if family == "bars" else "exact"
    return Puzzle(family, question, answer, kind, tuple(things), asked, f"{split}/{index}")


def solve(p: Puzzle, eye: Eye = good_eye) -> Demonstration:
    """The chain of looks that answers a puzzle, as `eye` sees it; what follows from a look follows from what was said.

    >>> p = puzzle("test", 0)
    >>> p.question
    'Start at the yellow circle. Go 2 right, then 2 up. What colour is there?'
    >>> solve(p).text, solve(p).answer
    ('yellow circle at d2. 2 right is d4. 2 up is b4. b4 is purple.', 'purple')
    """
    if p.family == "hop":
        key, across, turn, along = p.asked
        start, end = p.things[:2]
        see = _Looks(eye, 2)
        name = f"{start.colour} {start.shape}"
        place = see("place", start.place, 0)
        moves = f". {across} is {turn}. {along} is {end.place}. {end.place} is "
        value = see(("colour", "shape")[key], end[key], 1)
        return Demonstration((f"{name} at ", place, moves, value, "."), value.text)
    if p.family == "path":
        key, length = p.asked
        see, (*arrows, end) = _Looks(eye, length + 2), p.things[: length + 1]
        pieces = ["disc at ", see("place", arrows[0].place, 0)]
        for n, (arrow, after) in enumerate(zip(arrows, p.things[1:], strict=False)):
            pieces += [", ", see("direction", arrow.shape, n + 1), f" {after.place}"]
        value = see(("colour", "shape")[key], end[key], length + 1)
        return Demonstration((*pieces, f". {end.place} is ", value, "."), value.text)
    if p.family == "pair":
        key, looks = p.asked
        see = _Looks(eye, looks)
        reads = [see(("colour", "shape")[key], t[key], n) for n, t in enumerate(p.things[:looks])]
        pieces = [x for t, read in zip(p.things, reads, strict=False) for x in (f", {t.place} is ", read)]
        said = [read.text for read in reads]
        # Bad eyes may see nothing twice; the last look then has to do.
        answer = next((word for n, word in enumerate(said) if word in said[:n]), said[-1])
        return Demonstration((pieces[0][2:], *pieces[1:], f". Twice: {answer}."), answer)
    if p.family == "bars":
        one, sign, other = p.asked
        see, pieces, heights = _Looks(eye, 2), [], []
        for look, name in enumerate((one, other)):
            bar = next(t for t in p.things if t.colour == name)
            place, height = see("place", str(bar.column + 1), look), see("height", str(bar.row), look)
            pieces += [f"{name} is bar ", place, ", at ", height, ". "]
            heights.append(int(height.text))
        result = heights[0] + heights[1] if sign == "+" else heights[0] - heights[1]
        return Demonstration((*pieces, f"{heights[0]} {sign} {heights[1]} = {result}."), str(result))
    (word,) = p.asked
    see, pieces, seen = _Looks(eye, len(p.things)), [], []
    for look, bar in enumerate(p.things):
        colour, height = see("colour", bar.colour, look), see("height", str(bar.row), look)
        pieces += [f"{', ' if look else ''}bar {look + 1} ", colour, " ", height]
        seen.append((int(height.text), colour.text))
    height = (max if word == "tallest" else min)(h for h, _ in seen)
    answer = next(colour for h, colour in seen if h == height)
    return Demonstration((*pieces, f". {word.capitalize()}: {answer}."), answer)


@dataclass
class _Looks:
    """Looks at one picture: asks the eye, notes what it says beside the truth."""

    eye: Eye
    looks: int

    def __call__(self, kind: str, truth: str, look: int) -> Read:
        return Read(self.eye(kind, truth, look, self.looks), kind, truth, look)


def hint(p: Puzzle, right: float) -> str:
    """An answer that somebody gives: the right one for a share `right` of puzzles, else another of its sort. A puzzle's
    hint that is right at some share is right at every larger one.

    >>> hint(puzzle("test", 0), 1.0) == puzzle("test", 0).answer
    True
    """
    dice = _Dice(p.seed + "/hint")
    if dice.random() < right:
        return p.answer
    sort = next((names for names in (COLOURS, SHAPES) if p.answer in names), [str(n) for n in range(12)])
    return dice.pick([name for name in sort if name != p.answer])


def ask(p: Puzzle, hinted: str = "") -> str:
    """The question, with what somebody says behind it."""
    return f"{p.question} Somebody says it is {hinted}." if hinted else p.question


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
    if p.things[0].shape == "bar":
        unit, base, pitch = 16, 112 + top, SIZE / len(p.things)
        for level in range(TALLEST + 1):
            y = (base - level * unit) * z
            draw.line((0, y, SIZE * z, y), fill=faint, width=3 if level % 3 == 0 else 1)
        for t in p.things:
            x, fill = (pitch * (t.column + 0.5) + left + jitter(1.5)) * z, tint(t.colour)
            half = pitch * (0.3 + jitter(0.05)) * z
            draw.rectangle((x - half, (base - t.row * unit) * z, x + half, base * z), fill=fill)
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
