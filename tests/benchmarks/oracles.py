"""Positive controls: GRPO with knowledge that no method has, to see whether a bed can part methods at all.

    python tests/benchmarks/oracles.py readings --model runs/apprentice-chatter --data puzzles     # any flag of grpo.py

    readings    only tokens that read the picture are trained
    late        only those of the last look
    undecided   all but the first word, with which a completion decides to look or to repeat a hint
    others      as a check of the checks: all tokens but these
    random      a tenth of each completion's tokens, at random: what training so few tokens does by itself
    checked     all tokens; those of a reading have the advantage of that reading's being right, not of the answer's

They are scripts like the five, so that `common.evaluation.study` and `common.evaluation.gradients` take them by name:
--methods "grpo: grpo.py" "oracle: tests/benchmarks/oracles.py readings".
"""

import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import grpo
from common.data.examples import Example
from common.data.puzzles import COLOURS, SHAPES, STEPS, puzzle, solve
from common.run.settings import parse

COLOUR, SHAPE, STEP = ("|".join(words) for words in (COLOURS, SHAPES, STEPS))
READ = re.compile(
    rf"(?<!it )\bis ({COLOUR}|{SHAPE})\b|\bat ([a-d]?\d)|\bis bar (\d)|\bbar \d ({COLOUR}) (\d)|, ({STEP})\b"
)
ORACLES = ("readings", "late", "undecided", "others", "random", "checked")


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
    for r, row in enumerate(completion_ids):
        found = readings_of(tokenizer, row)
        for _, tokens in found[-1:] if oracle == "late" else found:
            mask[r, tokens] = True
    return ~mask if oracle == "others" else mask


def readings_of(tokenizer, ids: torch.Tensor) -> list[tuple[str, list[int]]]:
    """What a completion `ids` [T] has read, and the positions of the tokens that say it."""
    pieces = tokenizer.batch_decode([[token] for token in ids.tolist()])
    text, ends = "".join(pieces), torch.tensor([len(piece) for piece in pieces]).cumsum(0).tolist()
    inside = lambda t, start, end: ends[t] - len(pieces[t]) < end and ends[t] > start
    return [(text[a:b], [t for t in range(len(ends)) if inside(t, a, b)]) for a, b in reading_spans(text)]


def true_readings(example: Example) -> list[str]:
    """What there is to read in a built-in puzzle, in the order of its chain of looks."""
    split, index = example.id.split("/")
    text = solve(puzzle(split, int(index))).text
    return [text[a:b] for a, b in reading_spans(text)]


def checked_advantages(
    tokenizer, completion_ids: torch.Tensor, examples: list[Example], advantages: torch.Tensor, group_size: int
) -> torch.Tensor:
    """Advantages [R, T]: a row's own `advantages` [R, 1], but where its k-th reading stands 1 or 0 for its being right,
    standardized over the group's k-th readings."""
    result = advantages.expand(completion_ids.shape).clone()
    for start in range(0, len(completion_ids), group_size):
        by_place = {}  # k -> (right, row, positions) of the group's completions
        truth = true_readings(examples[start])
        for r in range(start, start + group_size):
            for k, (read, tokens) in enumerate(readings_of(tokenizer, completion_ids[r])[: len(truth)]):
                by_place.setdefault(k, []).append((float(read == truth[k]), r, tokens))
        for found in by_place.values():
            right = torch.tensor([x for x, _, _ in found])
            z = (right - right.mean()) / (right.std(correction=0) + 1e-4)
            for value, (_, r, tokens) in zip(z.tolist(), found, strict=True):
                result[r, tokens] = value
    return result


def main(oracle: str) -> None:
    plain, seen = (grpo.prepare, grpo.micro_batches, grpo.policy_loss, grpo.reward_completions, grpo.Batch), {}
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
        if oracle == "checked":
            return losses, ratio
        if oracle == "random":
            return losses * random_mask(seen["mask"].cpu(), 0.1, generator).to(losses.device), ratio
        return losses * reading_mask(seen["tokenizer"], seen["ids"], oracle), ratio

    def reward_completions(reward, completions, examples, encoder):
        seen["examples"] = examples
        return plain[3](reward, completions, examples, encoder)

    def batch(**fields):
        if oracle == "checked":
            own = (seen["tokenizer"], fields["ids"], seen["examples"], fields["advantages"], args.group_size)
            fields["advantages"] = checked_advantages(*own)
            nothing = (fields["advantages"] == 0).view(len(fields["kept"]) // args.group_size, -1).all(1)
            fields["trained"] = fields["kept"] & ~nothing.repeat_interleave(args.group_size)
        return plain[4](**fields)

    grpo.prepare, grpo.micro_batches, grpo.policy_loss = prepare, micro_batches, policy_loss
    grpo.reward_completions, grpo.Batch = reward_completions, batch
    try:
        grpo.main(args)
    finally:  # the next script of this process is another
        grpo.prepare, grpo.micro_batches, grpo.policy_loss, grpo.reward_completions, grpo.Batch = plain


if __name__ == "__main__":
    if sys.argv[1:2] == [] or sys.argv[1] not in ORACLES:
        raise SystemExit(f"name one of {', '.join(ORACLES)} first; the flags of grpo.py follow")
    main(sys.argv.pop(1))
