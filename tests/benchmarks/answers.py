"""Seconds that checking answers takes: numbers, letters, lists, and LaTeX that only symbolic comparison can judge.

python -m tests.benchmarks.answers --count 10000
"""

import random
import time
from dataclasses import dataclass
from types import SimpleNamespace

import tyro

from common.rewards.answers import score


@dataclass
class Options:
    count: int = 10_000
    """answers, all different"""
    symbolic: float = 0.3
    """share that needs symbolic comparison"""
    seed: int = 0


def answer(dice: random.Random, symbolic: bool) -> tuple[str, str, str]:
    """A completion's answer, its gold and its kind; about half are right."""
    a, b, right = dice.randrange(2, 400), dice.randrange(2, 400), dice.random() < 0.5
    off = 0 if right else 1
    if symbolic:
        return rf"\frac{{{a}\sqrt{{{b}}}}}{{{a + b}}}", rf"\frac{{{a + off}}}{{{a + b}}}\sqrt{{{b}}}", "math"
    return dice.choice(
        [
            (f"{a}.{b}", f"{a + off}.{b}0", "math"),
            (f"{a}", f"{a + off}", "int"),
            (f"({a}, {b}]", f"({a + off}, {b}]", "math"),
            (dice.choice("ABCD"), dice.choice("ABCD"), "letter"),
        ]
    )


def main(options: Options) -> None:
    dice = random.Random(options.seed)
    rows = [answer(dice, dice.random() < options.symbolic) for _ in range(options.count)]
    completions = [f"<think>some reasoning</think><answer>{text}</answer>" for text, _, _ in rows]
    examples = [SimpleNamespace(answer=gold, kind=kind, choices=None) for _, gold, kind in rows]
    score([r"<answer>\sqrt{2}</answer>"], [SimpleNamespace(answer=r"\sqrt{3}", kind="math", choices=None)])  # starts it
    start = time.perf_counter()
    right, statuses = score(completions, examples)
    seconds = time.perf_counter() - start
    counted = ", ".join(f"{count} {status}" for status, count in statuses.items() if count)
    print(f"{options.count} answers in {seconds:.1f} s, {sum(right):.0f} right ({counted})")


if __name__ == "__main__":
    main(tyro.cli(Options))
