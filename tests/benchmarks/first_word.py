"""Which tokens of a shortcut VPPO's filter keeps: why it does not stop a policy from repeating hints.

    python tests/benchmarks/first_word.py

The built-in model answers questions with a hint. Printed, of completions that repeat it ("So it is red.") and of those
that look: the mean dependency, and how often the first word, with which a completion decides between the two, is among
the tokens that the filter keeps.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))
import vppo
from common.data.examples import load_examples
from common.data.messages import build_messages
from common.evaluation.accuracy import aligned
from common.model.inputs import encode_prompts
from common.model.load import load_policy
from common.model.sampling import decode, sample, uniform_numbers
from common.model.scoring import Scorer
from common.run.settings import parse


@dataclass
class Args:
    model: str = "tiny"
    prompts: int = 64
    group_size: int = 8
    fractions: tuple[float, ...] = (0.4, 0.2, 0.1)


@torch.no_grad()
def main(args: Args) -> dict[str, dict[str, float]]:
    settings = parse(vppo.Args, ["--group-size", str(args.group_size)])
    policy = load_policy(args.model, trainable=False)
    examples = load_examples("puzzles:hint=75", "train", limit=args.prompts)
    examples = [examples[n] for n in range(len(examples))]
    prompts = encode_prompts(policy, [build_messages(e) for e in examples], [list(e.images) for e in examples])
    uniforms = uniform_numbers(1, 0, range(args.prompts * args.group_size), 72)
    rollout = sample(policy, prompts, args.group_size, 72, uniforms)
    masked = vppo.masked_prompts(prompts, policy, 0, list(range(args.prompts)), settings)
    mask, score = rollout.completion_mask, Scorer(policy)
    clean, black = (score(p, rollout.completion_ids, mask).logprobs for p in (prompts, masked))
    dependency = vppo.visual_dependency(clean, black, mask)  # [R, T]
    shortcut = torch.tensor(["So it is" in text for text in decode(policy, rollout)])  # [R]
    figures, lines = {}, [["", "completions", "dependency", *(f"first word kept at {k}" for k in args.fractions)]]
    for name, rows in (("repeat the hint", shortcut), ("look", ~shortcut)):
        own = figures[name] = {
            "share": float(rows.float().mean()),
            "dependency": float((dependency.sum(1) / mask.sum(1))[rows].mean()),
        }
        for fraction in args.fractions:  # the first token is <think>
            own[f"kept at {fraction}"] = float(vppo.token_filter(dependency, mask, fraction)[rows, 1].float().mean())
        share, mean, *kept = own.values()
        lines.append([name, f"{share:.0%}", f"{mean:.3f}", *(f"{k:.0%}" for k in kept)])
    print(aligned(lines))
    return figures


if __name__ == "__main__":
    main(tyro.cli(Args))
