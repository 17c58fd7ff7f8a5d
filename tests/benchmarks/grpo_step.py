"""Seconds of one GRPO step, every completion at its full length, with the time of each phase.

    python -m tests.benchmarks.grpo_step --prompts 8 --group 8 --tokens 64 --image 64

A step is what grpo.py does between two batches: process images, sample, decode, reward, score, backward, update.
To measure against another trainer, run both in turn on the same machine and compare the medians.
"""

import statistics
import time
from dataclasses import dataclass

import torch
import tyro
from PIL import Image

from common.data import ahead
from common.forward import Scorer, micro_batches, rows_of
from common.model import Policy, encode_prompts, load_policy
from common.rollout import decode, sample, uniform_numbers
from grpo import Args, group_advantages, policy_loss, token_weights


@dataclass
class Options:
    model: str = "tiny"
    """built-in `tiny`, a folder or a hub id"""
    prompts: int = 8
    """prompts a step"""
    group: int = 8
    """completions a prompt"""
    tokens: int = 64
    """tokens of each completion"""
    image: int = 64
    """side of each image in pixels"""
    steps: int = 5
    """steps that are timed, after one that is not"""
    question: str = "How many red shapes are there?"
    micro_batch_tokens: int = 16384
    """tokens of one forward and backward"""
    cuda: bool = False
    threads: int = 2
    """CPU threads"""


def open_policy(options: Options) -> Policy:
    if not options.cuda:
        torch.set_num_threads(options.threads)
    policy = load_policy(options.model, device="cuda" if options.cuda else "cpu")
    policy.end_token_ids = [-1]  # no token ends a completion, so that each has its full length
    return policy


def measure(policy: Policy, options: Options) -> tuple[list[float], dict[str, float]]:
    """Seconds of each step, and of each phase the median."""
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    scorer = Scorer(policy, gradient_checkpointing=options.cuda)
    args, rows, device = Args(), options.prompts * options.group, policy.device
    messages = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": options.question}]}]]
    totals, phases = [], {}

    def mark(name: str, since: float) -> float:
        if options.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        phases.setdefault(name, []).append(now - since)
        return now

    images = [[Image.effect_noise((options.image,) * 2, 80).convert("RGB")] for _ in range(options.prompts)]
    draw = lambda step: encode_prompts(policy, messages * options.prompts, images)
    for step, drawn in ahead(draw, range(options.steps + 1), in_thread=options.cuda):
        start = now = time.perf_counter()
        prompts = drawn()
        now = mark("images", now)
        noise = uniform_numbers(0, step, range(rows), options.tokens)
        rollout = sample(policy, prompts, options.group, options.tokens, noise)
        now = mark("sample", now)
        rewards = torch.tensor([float(len(text) % 3) for text in decode(policy, rollout)], device=device)
        advantages = group_advantages(rewards, options.group, "group", 1e-4)
        now = mark("reward", now)
        mask, width = rollout.completion_mask, prompts.input_ids.shape[1]
        for batch in micro_batches(mask, width, options.group, options.micro_batch_tokens):
            own = rows_of(batch, options.group)
            scores = scorer(prompts.select(batch), rollout.completion_ids[own], mask[own])
            losses, _ = policy_loss(scores.logprobs, scores.logprobs.detach(), advantages[own, None], mask[own], args)
            (losses * token_weights(mask[own], "dapo", rows, int(mask.sum()), options.tokens)).sum().backward()
        now = mark("score", now)
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        totals.append(mark("update", now) - start)
        assert int(mask.sum()) == rows * options.tokens
    return totals[1:], {name: statistics.median(seconds[1:]) for name, seconds in phases.items()}


def main(options: Options) -> None:
    totals, phases = measure(open_policy(options), options)
    print("seconds a phase: " + ", ".join(f"{name} {seconds:.3f}" for name, seconds in phases.items()))
    print(f"seconds a step: min {min(totals):.3f} median {statistics.median(totals):.3f} max {max(totals):.3f}")
    if options.cuda:
        print(f"peak memory GiB: {torch.cuda.max_memory_allocated() / 2**30:.1f}")


if __name__ == "__main__":
    main(tyro.cli(Options))
