"""What checking answers costs, and how often it errs: seconds of many different answers, and the verdicts on the table
of answers as models write them, `tests/answer_cases.jsonl`, against those that were reasoned one by one.

python -m tests.benchmarks.answers --count 10000
"""

import json
import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import tyro

from common.rewards.answers import KINDS, score

TABLE = Path(__file__).parents[1] / "answer_cases.jsonl"


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


def verdicts(rows: list[dict]) -> None:
    """Wrong that counted as right and right that counted as wrong, by kind; each by name."""
    examples = [SimpleNamespace(answer=row["gold"], kind=row["kind"], choices=row["choices"]) for row in rows]
    right, _ = score([row["completion"] for row in rows], examples)
    outcomes = Counter()
    for row, verdict in zip(rows, right, strict=True):
        outcome = (row["kind"], bool(verdict), row["expected"])
        outcomes[outcome] += 1
        if verdict != row["expected"]:
            print(f"{'false positive' if verdict else 'false negative'}: {row['completion']} for {row['gold']}")
    print(f"{'kind':10}{'cases':>8}{'right':>8}{'false positives':>18}{'false negatives':>18}")
    for kind in (*KINDS, ""):
        cases = {outcome: count for outcome, count in outcomes.items() if not kind or outcome[0] == kind}
        counts = [sum(cases.values()), sum(count for (_, _, expected), count in cases.items() if expected)]
        counts += [sum(c for (_, v, e), c in cases.items() if (v, e) == wrong) for wrong in ((1, 0), (0, 1))]
        print(f"{kind or 'all':10}{counts[0]:8}{counts[1]:8}{counts[2]:18}{counts[3]:18}")


def main(options: Options) -> None:
    verdicts([json.loads(line) for line in TABLE.read_text("utf-8").splitlines()])
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
