"""Sampling and scoring beside transformers' own: `model.generate`, and forward and backward over padded rows.

    python -m tests.benchmarks.parts --image 128 --lengths 16 64 256

Both sides do the same work on the same rows in turn; a ratio above 1 says how many times faster ours is (medians).
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from PIL import Image

from common.model.inputs import encode_prompts
from common.model.load import load_policy
from common.model.sampling import sample, uniform_numbers
from common.model.scoring import Scorer


@dataclass
class Options:
    model: str = "tiny"
    """built-in `tiny`, a folder or a hub id"""
    prompts: int = 8
    group: int = 8
    image: int = 128
    """side of each image in pixels"""
    question: str = "How many red shapes are there?"
    lengths: tuple[int, ...] = (16, 64, 256)
    """tokens of each completion"""
    rounds: int = 5
    """timed calls of each side, after one that is not"""
    cuda: bool = False
    threads: int = 2
    """CPU threads"""


def in_turn(ours: Callable, theirs: Callable, rounds: int, cuda: bool) -> tuple[float, float]:
    """Median seconds of each side."""
    seconds = {ours: [], theirs: []}
    for _ in range(rounds + 1):
        for side in seconds:
            start = time.perf_counter()
            side()
            if cuda:
                torch.cuda.synchronize()
            seconds[side].append(time.perf_counter() - start)
    return tuple(statistics.median(times[1:]) for times in seconds.values())


def main(options: Options) -> None:
    if not options.cuda:
        torch.set_num_threads(options.threads)
    policy = load_policy(options.model, device="cuda" if options.cuda else "cpu")
    policy.end_token_ids = [-1]  # no token ends a completion, so that each has its full length
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": options.question}]}]
    images = [[Image.effect_noise((options.image,) * 2, 80).convert("RGB")] for _ in range(options.prompts)]
    prompts = encode_prompts(policy, [message] * options.prompts, images)
    rows = options.prompts * options.group
    every = prompts.select([n for n in range(options.prompts) for _ in range(options.group)])  # a prompt a row
    grids = every.image_grid_thw.to(policy.device)
    image_token = policy.base.config.image_token_id
    scorer = Scorer(policy, gradient_checkpointing=options.cuda)
    print(f"{rows} rows, {prompts.input_ids.shape[1]} prompt tokens; seconds ours / theirs")
    print(f"{'tokens':>6}{'sampling':>22}{'scoring, backward':>26}")
    for tokens in options.lengths:
        noise = uniform_numbers(0, 0, range(rows), tokens)
        ids = sample(policy, prompts, options.group, tokens, noise).completion_ids
        mask = torch.ones_like(ids, dtype=torch.bool)

        def generate(tokens=tokens):
            with torch.no_grad(), policy.autocast():
                policy.model.generate(
                    input_ids=every.input_ids, attention_mask=every.attention_mask.long(),
                    pixel_values=every.pixel_values, image_grid_thw=grids,
                    mm_token_type_ids=(every.input_ids == image_token).int(),
                    do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=tokens, min_new_tokens=tokens,
                )  # fmt: skip

        def padded(ids=ids):
            both = torch.cat([every.input_ids, ids], dim=1)
            with policy.autocast():
                logits = policy.model(
                    input_ids=both, pixel_values=every.pixel_values, image_grid_thw=grids,
                    mm_token_type_ids=(both == image_token).int(), logits_to_keep=ids.shape[1] + 1,
                ).logits[:, :-1]  # fmt: skip
            logprobs = logits.float().masked_fill(policy.banned, -1e30).log_softmax(-1)
            logprobs.gather(-1, ids[..., None]).mean().backward()
            policy.model.zero_grad()

        def shared(ids=ids, mask=mask):
            scorer(prompts, ids, mask).logprobs.mean().backward()
            policy.model.zero_grad()

        sampling = in_turn(
            lambda tokens=tokens, noise=noise: sample(policy, prompts, options.group, tokens, noise),
            generate, options.rounds, options.cuda,
        )  # fmt: skip
        scoring = in_turn(shared, padded, options.rounds, options.cuda)
        cells = [f"{a:.3f} / {b:.3f} = {b / a:.1f} x" for a, b in (sampling, scoring)]
        print(f"{tokens:6}{cells[0]:>26}{cells[1]:>26}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
