"""Does a policy that writes sections reason better in them? What is named, followed and read right in each.

    python -m tests.benchmarks.sections --models "before: runs/apprentice-untold" "mixture: RUN" --out sections.json

Of the sampled completions of built-in puzzles: answers by which sections stand before them; the share of things that a
description names rightly; and, for the thoughts without a description, those behind one, and the second look, how often
a chain does what was asked (the start and the moves, the cells, the bars: what the question says and no picture is
needed for), the share of its readings that are right, how often it concludes rightly, and how often what it concludes
is then answered. With 95 % intervals from a bootstrap over puzzles.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from common.data.examples import load_examples
from common.data.messages import build_messages
from common.data.puzzles import Puzzle, puzzle, solve
from common.model.inputs import encode_prompts
from common.model.load import load_policy, newest_checkpoint
from common.model.sampling import decode, sample, uniform_numbers
from common.rewards.designs import MARKERS, section
from common.tiny.teacher import named
from tests.benchmarks.credit import save, share
from tests.benchmarks.oracles import reading_spans

# What a chain takes from the question, as `puzzles.solve` words it: start, moves, cells, colours of bars.
ASKED = {
    "hop": r"^(\w+ \w+) at|(\d (?:right|left|down|up)) is",
    "path": r"^(disc) at",
    "pair": r"([a-d]\d) is",
    "bars": r"(\w+) is bar",
    "extreme": r"(Lowest|Tallest):",
}


@dataclass
class Options:
    models: tuple[str, ...]
    """models to compare, each `NAME: PATH` of a run, a checkpoint or a folder"""
    out: Path
    """file for the results"""
    puzzles: int = 400
    group_size: int = 2
    seed: int = 1


def concluded(chain: str) -> str:
    """The last word of a chain of looks."""
    return (re.findall(r"[\w-]+", chain) or [""])[-1]


def judge(p: Puzzle, chain: str) -> dict[str, tuple[float, float]]:
    """Rights and counts of a chain of looks: what was asked is followed, readings, what is concluded.

    >>> p = puzzle("test", 0)
    >>> solve(p).text
    'yellow circle at d2. 2 right is d4. 2 up is b4. b4 is purple.'
    >>> judge(p, "yellow circle at d2. 1 right is d3. 2 up is b3. b3 is purple.")
    {'as asked': (False, 1), 'readings': (2, 2), 'concluded': (True, 1)}
    """
    truth = solve(p)
    read, real = ([text[a:b] for a, b in reading_spans(text)] for text in (chain, truth.text))
    asked, own = (re.findall(ASKED[p.family], text) for text in (truth.text, chain))
    return {
        "as asked": (asked == own, 1),
        "readings": (sum(a == b for a, b in zip(read, real, strict=False)), len(real)),
        "concluded": (concluded(chain) == truth.answer, 1),
    }


def counts(puzzles: list[Puzzle], texts: list[str]) -> dict[str, np.ndarray]:
    """Of each puzzle's completions, which stand together: rights and counts by section and figure, [P, 2] float64."""
    found, size = {}, len(texts) // len(puzzles)

    def note(name: str, n: int, pair: tuple[float, float]) -> None:
        found.setdefault(name, np.zeros((len(puzzles), 2)))[n] += pair

    for place, text in enumerate(texts):
        n, p = place // size, puzzles[place // size]
        own = {name: section(text, name, 0)[0] for name in MARKERS}
        if own["description"]:
            things, real = own["description"].split("; "), named(p)
            note("description, things", n, (sum(thing in things for thing in real), len(real)))
        written = [title for title, name in (("described", "description"), ("second look", "rethink")) if own[name]]
        note(f"answers, {' and '.join(written) or 'neither'}", n, (own["answer"] == p.answer, 1))
        thoughts = "think, described" if own["description"] else "think, not described"
        for title, name in ((thoughts, "think"), ("second look", "rethink")):
            if chain := own[name]:
                for figure, pair in judge(p, chain).items():
                    note(f"{title}, {figure}", n, pair)
                note(f"{title}, answered", n, (concluded(chain) == own["answer"], 1))
    return found


@torch.no_grad()
def main(options: Options) -> dict:
    examples = [load_examples("puzzles", "test")[n] for n in range(options.puzzles)]
    puzzles = [puzzle("test", n) for n in range(options.puzzles)]
    messages = [build_messages(e) for e in examples]
    figures = {}
    for line in options.models:
        model, _, path = line.partition(": ")
        policy = load_policy(newest_checkpoint(path), trainable=False)
        prompts = encode_prompts(policy, messages, [list(e.images) for e in examples])
        draws = uniform_numbers(options.seed, 0, range(options.group_size * len(examples)), 160)
        texts = decode(policy, sample(policy, prompts, options.group_size, 160, draws))
        figures[model] = {
            name: share(own[:, 0], own[:, 1], options.seed) for name, own in sorted(counts(puzzles, texts).items())
        }
        print(model, *(f"{name:36} {100 * own['mean']:5.1f} %" for name, own in figures[model].items()), sep="\n")
    save(options, figures)
    return figures


if __name__ == "__main__":
    main(tyro.cli(Options))
