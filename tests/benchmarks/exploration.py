"""What makes a policy say more often what it hardly ever says: noise on the pictures, or a higher temperature?

    python -m tests.benchmarks.exploration --model runs/apprentice-rarity --out docs/studies/exploration.json

Completions are sampled behind each of NoisyGRPO's noise levels, and at several temperatures without noise. Counted are
the readings of purple and ring that are right, which the `rarity` apprentice hardly ever samples, those of all other
colours, shapes and heights, and right answers, with 95 % intervals from a bootstrap over puzzles.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

import noisy_grpo
from common.data.examples import load_examples
from common.data.messages import build_messages
from common.evaluation.robustness import bootstrap
from common.model.inputs import encode_prompts
from common.model.load import load_policy
from common.model.sampling import decode, sample, uniform_numbers
from common.rewards.designs import reward_completions
from common.tiny.teacher import RARE, WORDS
from tests.benchmarks.credit import save, share
from tests.benchmarks.oracles import readings_of, true_readings


@dataclass
class Options:
    out: Path
    """file for the results"""
    model: str = "runs/apprentice-rarity"
    noise: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.6, 0.9)
    temperatures: tuple[float, ...] = (1.5, 2.0, 3.0)
    puzzles: int = 200
    group_size: int = 8
    seed: int = 1


def counts(policy, examples, ids: torch.Tensor, size: int) -> dict[str, np.ndarray]:
    """Of each example's `size` completions: readings of a kind, and how many of these are right, [E, 2] float64."""
    found = {"rare": np.zeros((len(examples), 2)), "others": np.zeros((len(examples), 2))}
    for n, example in enumerate(examples):
        truth = true_readings(example)
        for row in ids[n * size : (n + 1) * size]:
            for (said, _), true in zip(readings_of(policy.tokenizer, row), truth, strict=False):
                if any(true in words for words in WORDS.values()):
                    found["rare" if true in RARE else "others"][n] += 1, said == true
    return found


@torch.no_grad()
def main(options: Options) -> dict:
    policy = load_policy(options.model, trainable=False)
    examples = [load_examples("puzzles", "train")[n] for n in range(options.puzzles)]
    clean = encode_prompts(policy, [build_messages(e) for e in examples], [list(e.images) for e in examples])
    asked = [example for example in examples for _ in range(options.group_size)]
    dice, figures = np.random.default_rng(options.seed), {}
    settings = [(f"noise {level:g}", level, 1.0) for level in options.noise]
    settings += [(f"temperature {t:g}", 0.0, t) for t in options.temperatures]
    for name, level, temperature in settings:
        pictures = [
            [noisy_grpo.noisy_image(i.convert("RGB"), level, dice, "clamp") for i in e.images] for e in examples
        ]
        draws = uniform_numbers(options.seed, 0, range(len(asked)), 72)
        rollout = sample(
            policy, clean.with_images(policy, pictures), options.group_size, 72, draws, temperature=temperature
        )
        right = np.array(reward_completions("accuracy", decode(policy, rollout), asked, "").accuracy)
        right = right.reshape(options.puzzles, -1).mean(1)
        figures[name] = {"answers": {"mean": float(right.mean()), "ci": list(bootstrap(right, 2000))}}
        for kind, own in counts(policy, examples, rollout.completion_ids, options.group_size).items():
            figures[name][kind] = share(own[:, 1], own[:, 0], options.seed)
        print(f"{name:16}" + "".join(f"{kind:>9} {100 * f['mean']:5.1f} %" for kind, f in figures[name].items()))
    save(options, figures)
    return figures


if __name__ == "__main__":
    main(tyro.cli(Options))
