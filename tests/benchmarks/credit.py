"""Which tokens and completions VPPO and VGPO weigh up: those that read the picture, those that are right, or others?

    python -m tests.benchmarks.credit --out docs/studies/credit.json

At the built-in model or an apprentice of the recipe, without training. A token reads the picture where the puzzle says
so (`oracles.reading_spans`), and is chatter between round brackets.
Means over tokens and completions, with 95 % intervals from a bootstrap over puzzles.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

import vgpo
import vppo
from common.data.examples import load_examples
from common.data.messages import build_messages
from common.evaluation.comparison import made_with
from common.evaluation.probes import in_brackets
from common.model.inputs import encode_prompts
from common.model.load import load_policy
from common.model.sampling import decode, sample, uniform_numbers
from common.model.scoring import Scorer
from common.rewards.designs import reward_completions
from common.run.files import write
from tests.benchmarks.oracles import reading_mask


@dataclass
class Options:
    out: Path
    """file for the results"""
    puzzles: int = 200
    group_size: int = 8
    seed: int = 1
    model: str = "tiny"


def weights(options: Options) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What each method gives tokens [R, T] or completions [R]; kinds of tokens [R, T] bool; and of completions [R]."""
    policy = load_policy(options.model, trainable=False)
    examples = [load_examples("puzzles", "train")[n] for n in range(options.puzzles)]
    prompts = encode_prompts(policy, [build_messages(e) for e in examples], [list(e.images) for e in examples])
    size, limit = options.group_size, 128
    draws = uniform_numbers(options.seed, 0, range(size * len(prompts)), limit)
    rollout = sample(policy, prompts, size, limit, draws)
    ids, mask = rollout.completion_ids, rollout.completion_mask
    of_vgpo, of_vppo = vgpo.Args(group_size=size), vppo.Args(group_size=size, seed=options.seed)
    masked = vppo.masked_prompts(prompts, policy, 0, list(range(len(prompts))), of_vppo)
    with torch.no_grad():
        scores, unseen = Scorer(policy)(prompts, ids, mask), Scorer(policy)(masked, ids, mask).logprobs
    dependency = vppo.visual_dependency(scores.logprobs, unseen, mask)
    row_dependency = (dependency * mask).sum(1) / mask.sum(1).clamp(min=1)
    image_mask = prompts.input_ids == policy.base.config.image_token_id
    found, before = (
        vgpo.advantage_factors(states, scores.prompt_states, image_mask, mask, of_vgpo)
        for states in (scores.states, scores.hidden)  # a token's own, and the one that predicts it
    )
    given = {
        "entropy, nats": scores.entropy,
        "VPPO: share that the filter keeps": vppo.token_filter(dependency, mask, of_vppo.keep_fraction),
        "VPPO: shaping factor": vppo.shaping_factors(row_dependency, row_dependency, of_vppo),
        "VGPO: share that gets the bonus": found["gate"],
        "VGPO: token factor": vgpo.token_factors(found["weight"], mask).clamp(*of_vgpo.token_clamp),
        "VGPO, one state earlier: share that gets the bonus": before["gate"],
        "VGPO, one state earlier: token factor": vgpo.token_factors(before["weight"], mask).clamp(*of_vgpo.token_clamp),
        "VGPO: trajectory factor": vgpo.trajectory_factors(found["weight"], size).clamp(*of_vgpo.trajectory_clamp),
    }
    asked = [example for example in examples for _ in range(size)]
    right = torch.tensor(reward_completions("accuracy", decode(policy, rollout), asked, "").accuracy) == 1
    reads, chatter = reading_mask(policy.tokenizer, ids, "readings") & mask, in_brackets(policy, ids, mask)
    tokens = {"readings": reads, "chatter": chatter, "other tokens": mask & ~reads & ~chatter}
    return given, {kind: at for kind, at in tokens.items() if at.any()}, {"right": right, "wrong": ~right}


def mean(values: torch.Tensor, inside: torch.Tensor, puzzles: int, seed: int) -> dict:
    """Mean of values over the places `inside`, both [R] or [R, T], with an interval over puzzles."""
    return share(
        *((x * inside).double().view(puzzles, -1).sum(1).numpy() for x in (values, torch.ones_like(inside))), seed
    )


def share(sums: np.ndarray, counts: np.ndarray, seed: int) -> dict:
    """Sum over all puzzles of `sums` [E] by that of `counts` [E], with an interval over puzzles."""
    drawn = np.random.default_rng(seed).integers(len(sums), size=(2000, len(sums)))
    with np.errstate(invalid="ignore"):  # puzzles drawn that hold none
        ends = np.nanpercentile(sums[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5])
    return {"mean": sums.sum() / counts.sum(), "ci": ends.tolist()}


def main(options: Options) -> None:
    given, tokens, completions = weights(options)
    figures = {}
    for name, values in given.items():
        parts = tokens if values.ndim == 2 else completions
        figures[name] = {part: mean(values, inside, options.puzzles, options.seed) for part, inside in parts.items()}
        print(f"{name:36}" + "".join(f"{part:>14} {figure['mean']:.3f}" for part, figure in figures[name].items()))
    save(options, figures)


def save(options, figures: dict) -> None:
    """Write figures with what made them."""
    args = {name: value for name, value in vars(options).items() if name not in ("out", "seed")}
    args["seeds"] = [options.seed]
    write(options.out, json.dumps({**made_with(), "args": args, "figures": figures}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Options))
