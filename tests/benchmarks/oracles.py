"""Positive controls: GRPO with knowledge that no method has, to see whether a bed can part methods at all.

    python tests/benchmarks/oracles.py readings --model runs/apprentice-chatter --data puzzles     # any flag of grpo.py

    readings    only tokens that read the picture are trained
    late        only those of the last look
    undecided   all but the first word, with which a completion decides to look or to repeat a hint
    others      as a check of the checks: all tokens but these
    random      a tenth of each completion's tokens, at random: what training so few tokens does by itself

They are scripts like the five, so that `common.evaluation.study` and `common.evaluation.gradients` take them by name:
--methods "grpo: grpo.py" "oracle: tests/benchmarks/oracles.py readings".
"""

import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import grpo
from common.data.puzzles import COLOURS, SHAPES, STEPS
from common.run.settings import parse

COLOUR, SHAPE, STEP = ("|".join(words) for words in (COLOURS, SHAPES, STEPS))
READ = re.compile(
    rf"(?<!it )\bis ({COLOUR}|{SHAPE})\b|\bat ([a-d]?\d)|\bis bar (\d)|\bbar \d ({COLOUR}) (\d)|, ({STEP})\b"
)
ORACLES = ("readings", "late", "undecided", "others", "random")


def reading_spans(text: str) -> list[tuple[int, int]]:
    """Which characters of a chain of looks, right or wrong, were read off the picture (`puzzles.solve` says how it is
    worded).

    >>> [text[a:b] for text in ["<think>red star at b2. 1 left is b1. b1 is blue."] for a, b in reading_spans(text)]
    ['b2', 'blue']
    >>> [text[a:b] for text in ["<think>disc at a1, up (so) b1. b1 is ring."] for a, b in reading_spans(text)]
    ['a1', 'up', 'ring']
    >>> [text[a:b] for text in ["<think>bar 1 red 5, bar 2 blue 3. Lowest: blue."] for a, b in reading_spans(text)]
    ['red', '5', 'blue', '3']
    """
    found = READ.finditer(text.split("</think>")[0])
    return [match.span(g) for match in found for g in range(1, READ.groups + 1) if match[g]]


def random_mask(completion_mask: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    """ceil(share n) of each completion's n tokens [R, T] bool, drawn without replacement."""
    drawn = torch.rand(completion_mask.shape, generator=generator).masked_fill(~completion_mask, -1)
    count = (share * completion_mask.sum(1) - 1e-6).ceil()
    return (drawn.argsort(dim=1, descending=True).argsort(dim=1) < count[:, None]) & completion_mask


def reading_mask(tokenizer, completion_ids: torch.Tensor, oracle: str) -> torch.Tensor:
    """Which tokens [R, T] bool an oracle trains."""
    mask = torch.zeros_like(completion_ids, dtype=torch.bool)
    if oracle == "undecided":
        mask[:, 2:] = True  # behind <think> and that word
        return mask
    for r, row in enumerate(completion_ids.tolist()):
        pieces = tokenizer.batch_decode([[token] for token in row])
        ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0)
        spans = reading_spans("".join(pieces))
        for start, end in spans[-1:] if oracle == "late" else spans:
            for t, last in enumerate(ends.tolist()):
                mask[r, t] |= last - len(pieces[t]) < end and last > start
    return ~mask if oracle == "others" else mask


def main(oracle: str) -> None:
    plain, seen = (grpo.prepare, grpo.micro_batches, grpo.policy_loss), {}
    args = parse(grpo.Args)
    generator = torch.Generator().manual_seed(args.seed)

    def prepare(*arguments):
        found = plain[0](*arguments)
        seen["tokenizer"] = found[0].tokenizer
        return found

    def micro_batches(*arguments):
        for mb in plain[1](*arguments):
            seen["ids"], seen["mask"] = mb.ids, mb.completion_mask  # what the loss is about to be taken of
            yield mb

    def policy_loss(*arguments):
        losses, ratio = plain[2](*arguments)
        if oracle == "random":
            return losses * random_mask(seen["mask"].cpu(), 0.1, generator).to(losses.device), ratio
        return losses * reading_mask(seen["tokenizer"], seen["ids"], oracle), ratio

    grpo.prepare, grpo.micro_batches, grpo.policy_loss = prepare, micro_batches, policy_loss
    try:
        grpo.main(args)
    finally:  # the next script of this process is another
        grpo.prepare, grpo.micro_batches, grpo.policy_loss = plain


if __name__ == "__main__":
    if sys.argv[1:2] == [] or sys.argv[1] not in ORACLES:
        raise SystemExit(f"name one of {', '.join(ORACLES)} first; the flags of grpo.py follow")
    main(sys.argv.pop(1))
