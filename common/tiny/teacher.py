"""Demonstrations for supervised learning, by a teacher without flaws or with some of your choice.

A model that learns from a teacher with bad habits keeps the right reading beside the wrong one, as larger models do:
reinforcement learning then has something to mend, and each flaw is what one method promises to mend. Flaws are in the
demonstrations alone; each has a dial, 0 is off.
"""

import random
from dataclasses import dataclass

from common.data.puzzles import COLOURS, SHAPES, TALLEST, Demonstration, Puzzle, Read, hint, solve

# What the teacher takes for what.
NEIGHBOURS = {
    "purple": "blue",
    "orange": "red",
    "yellow": "green",
    "ring": "circle",
    "star": "cross",
    "square": "triangle",
    "5": "4",
    "6": "5",
}
RARE = {"purple": "blue", "ring": "circle"}
WORDS = {"colour": tuple(COLOURS), "shape": SHAPES, "height": tuple(map(str, range(1, TALLEST + 1)))}
CHATTER = ("well", "so", "now", "hmm")
HINTED = 0.8  # share of questions that carry a hint while a shortcut is taught
HINT_RIGHT = 0.5  # share of these hints that are right: following pays no more than it must to be copied


@dataclass(frozen=True)
class Flaws:
    misreading: float = 0.0
    """chance that a colour, shape or height is taken for its neighbour, where it has one"""
    rarity: float = 0.0
    """the same for purple and ring alone, close to 1: right readings that a policy hardly ever samples"""
    forgetting: float = 0.0
    """chance that the last look of a chain is a guess from what was said before; a seventh of it at the first look"""
    chatter: int = 0
    """words after each look that say nothing, each one of four"""
    shortcut: float = 0.0
    """chance that the hint in the question is repeated and the picture not looked at"""
    untold: float = 0.0
    """chance that a description of the picture is left out, and that a second look is; what is read is read right
    when the picture was described before, or in the second look"""
    unmarked: float = 0.0
    """chance that what is read is not put between <visual> and </visual>; what is marked is read right"""


# A bed is a flaw that is strong enough to leave a policy in need of something. Bad eyes go with some: a shortcut tempts
# only where looking is often wrong, and a description helps only where reading fails without it. Questions without a
# hint know nothing of the shortcut, so `tiny` is two beds: its data decides.
BEDS = {
    "tiny": Flaws(misreading=0.7, forgetting=0.5, shortcut=0.5),
    "none": Flaws(),
    "misreading": Flaws(misreading=0.65),
    "rarity": Flaws(rarity=0.96),
    "forgetting": Flaws(forgetting=0.7),
    "chatter": Flaws(misreading=0.65, chatter=12),
    "untold": Flaws(misreading=0.65, untold=0.85, unmarked=0.85),
}


def eye(flaws: Flaws, dice: random.Random):
    """What a look of the flawed teacher sees; a new one for each demonstration, for it remembers what was said."""
    said = {kind: [] for kind in WORDS}

    def see(kind: str, truth: str, look: int, looks: int) -> str:
        if kind not in WORDS:
            return truth
        seen = truth
        if truth in NEIGHBOURS and dice.random() < flaws.misreading:
            seen = NEIGHBOURS[truth]
        if truth in RARE and dice.random() < flaws.rarity:
            seen = RARE[truth]
        if dice.random() < flaws.forgetting * (1 + 6 * look / (looks - 1)) / 7:
            seen = dice.choice(said[kind] or WORDS[kind])
        said[kind].append(seen)
        return seen

    return see


def describe(p: Puzzle) -> str:
    """Everything in the picture, in reading order."""
    return "; ".join(named(p))


def name_all(p: Puzzle, dice: random.Random) -> str:
    """Everything in the picture: in reading order, or in any order with the place first, or with the thing first. The
    second teaches to see what is at a place, the third to find the place of a thing."""
    order = dice.randrange(3)
    names = named(p, thing_first=order == 2)
    return "; ".join(names if order == 0 else dice.sample(names, len(names)))


def named(p: Puzzle, thing_first: bool = False) -> list[str]:
    """Everything in the picture by place and name."""
    if p.things[0].shape == "bar":
        names = [(f"bar {t.column + 1}", t.colour, str(t.row)) for t in p.things]
        return [
            " ".join((colour, bar, height) if thing_first else (bar, colour, height)) for bar, colour, height in names
        ]
    things = sorted(p.things, key=lambda t: (t.row, t.column))
    return [f"{t.colour} {t.shape} {t.place}" if thing_first else f"{t.place} {t.colour} {t.shape}" for t in things]


def chatter(shown: Demonstration, words: int, dice: random.Random) -> Demonstration:
    """The same with `words` words that say nothing after every look."""
    pieces = []
    for n, piece in enumerate(shown.pieces):
        pieces.append(piece)
        following = [p for p in shown.pieces[n + 1 :] if isinstance(p, Read)]
        if isinstance(piece, Read) and not (following and following[0].look == piece.look):
            pieces.append(f" ({' '.join(dice.choice(CHATTER) for _ in range(words))})")
    return Demonstration(tuple(pieces), shown.answer)


def mark(shown: Demonstration) -> Demonstration:
    """The same with every reading between the markers of a fact that was taken from the picture."""
    pieces = [f"<visual>{piece.text}</visual>" if isinstance(piece, Read) else piece for piece in shown.pieces]
    return Demonstration(tuple(pieces), shown.answer)


def demonstrate(p: Puzzle, flaws: Flaws, dice: random.Random, hinted: str = "") -> str:
    """A whole completion. `hinted` is what the question's hint says, if it has one."""
    if hinted and dice.random() < flaws.shortcut:
        return f"<think>So it is {hinted}.</think><answer>{hinted}</answer>"
    if not flaws.untold:
        shown = solve(p, eye(flaws, dice))
        if flaws.chatter:
            shown = chatter(shown, flaws.chatter, dice)
        return f"<think>{shown.text}</think><answer>{shown.answer}</answer>"
    described, again = dice.random() >= flaws.untold, dice.random() >= flaws.untold
    marked = flaws.unmarked and not described and dice.random() >= flaws.unmarked
    shown = solve(p) if described or marked else solve(p, eye(flaws, dice))
    shown = mark(shown) if marked else shown
    text = f"<think>{shown.text}</think>"
    if described:
        text = f"<image description>{describe(p)}</image description>{text}"
    if again:
        shown = solve(p)
        text = f"{text}<rethink>{shown.text}</rethink>"
    return f"{text}<answer>{shown.answer}</answer>"


def taught_hint(p: Puzzle, flaws: Flaws, dice: random.Random) -> str:
    """The hint that a question carries while a shortcut is taught, "" for none."""
    return hint(p, HINT_RIGHT) if flaws.shortcut and dice.random() < HINTED else ""
