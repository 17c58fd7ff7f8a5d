"""Seconds of one GRPO step, every completion at its full length, with the time of each phase.

    python -m tests.benchmarks.grpo_step --prompts 8 --group 8 --tokens 64 --image 64
    python -m tests.benchmarks.grpo_step --cuda --model Qwen/Qwen3-VL-4B-Instruct --tokens 512 --image 1024

A step is what grpo.py does between two batches: process images, sample, decode, reward, score, backward, update.
Beside the two large phases stand their floors: their matrix products at the rate of one large product on this machine
and, for sampling, the weights, keys and values to read for each token at the bandwidth of a large copy.
`mismatch` is how far the log-probabilities of sampling and scoring lie apart on average, as training logs it.
To measure against another trainer, run both in turn on the same machine and compare the medians.
"""

import statistics
import time
from dataclasses import dataclass

import torch
import tyro
from PIL import Image

from common.data.prompts import prefetch
from common.model.inputs import encode_prompts
from common.model.load import Policy, load_policy
from common.model.sampling import decode, sample, uniform_numbers
from common.model.scoring import Scorer
from common.model.training import Batch, micro_batches
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
    lora_rank: int = 0
    """train adapters of that rank (0: all weights)"""
    cuda: bool = False
    threads: int = 2
    """CPU threads"""


def open_policy(options: Options) -> Policy:
    if not options.cuda:
        torch.set_num_threads(options.threads)
    policy = load_policy(options.model, device="cuda" if options.cuda else "cpu", lora_rank=options.lora_rank)
    policy.end_token_ids = [-1]  # no token ends a completion, so that each has its full length
    return policy


def rates(policy: Policy) -> tuple[float, float]:
    """Operations a second of one large matrix product, bytes a second of one large copy, the best of ten each."""
    rows, dtype = (8192, torch.bfloat16) if policy.device.type == "cuda" else (1024, torch.float32)
    matrix = torch.randn(rows, 8192, device=policy.device, dtype=dtype)
    square, source = matrix.T.contiguous(), torch.zeros(2**26, device=policy.device)
    target = source.clone()

    def best(work) -> float:
        seconds = []
        for _ in range(10):
            start = time.perf_counter()
            work()
            if policy.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    product = best(lambda: matrix @ square)
    return 2 * matrix.numel() * len(matrix) / product, 2 * source.nbytes / best(lambda: target.copy_(source))


def needs(policy: Policy, width: int, options: Options) -> tuple[float, float, float]:
    """Operations of sampling's matrix products, bytes it reads, and operations of scoring's, forward and backward.

    Those of attention, of pictures and of recomputing are left out; of frozen weights there is no gradient.
    """
    config, text = policy.base.config.text_config, policy.base.model.language_model
    weights = sum(p.numel() for p in text.layers.parameters()) + policy.base.get_output_embeddings().weight.numel()
    rows, size = options.prompts * options.group, 2 if policy.device.type == "cuda" else 4
    cached = options.prompts * width + rows * options.tokens / 2  # places, on average over the tokens
    a_place = 2 * config.num_hidden_layers * config.num_key_value_heads * text.layers[0].self_attn.head_dim
    forward = 2 * weights * (rows * options.tokens + options.prompts * width)
    passes = 2 if options.lora_rank else 3
    return forward, options.tokens * size * (weights + cached * a_place), passes * forward


def measure(policy: Policy, options: Options) -> tuple[list[float], dict[str, float], int, float]:
    """Seconds of each step, of each phase the median; prompt tokens; mean mismatch."""
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.0, fused=True)
    scorer = Scorer(policy, gradient_checkpointing=options.cuda)
    args, rows, device = Args(), options.prompts * options.group, policy.device
    messages = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": options.question}]}]]
    totals, phases, gap = [], {}, 0.0

    def mark(name: str, since: float) -> float:
        if options.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        phases.setdefault(name, []).append(now - since)
        return now

    images = [[Image.effect_noise((options.image,) * 2, 80).convert("RGB")] for _ in range(options.prompts)]
    draw = lambda step: encode_prompts(policy, messages * options.prompts, images)
    for step, drawn in prefetch(draw, range(options.steps + 1), in_thread=options.cuda):
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
        batch = Batch(
            prompts=prompts,
            ids=rollout.completion_ids,
            completion_mask=mask,
            advantages=advantages[:, None],
            sampled_logprobs=rollout.logprobs,
            trained=torch.ones(rows, dtype=torch.bool, device=device),
        )
        for mb in micro_batches(batch, options.group, options.micro_batch_tokens):
            new = scorer(mb.prompts, mb.ids, mb.completion_mask).logprobs
            losses, _ = policy_loss(new, new.detach(), mb.advantages, mb.completion_mask, args)
            weights = token_weights(mb.completion_mask, "dapo", rows, int(mask.sum()), options.tokens)
            (losses * weights).sum().backward()
            gap += (new.detach() - mb.sampled_logprobs).abs().sum()
        now = mark("score", now)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        totals.append(mark("update", now) - start)
        assert int(mask.sum()) == rows * options.tokens
    medians = {name: statistics.median(times[1:]) for name, times in phases.items()}
    return totals[1:], medians, width, float(gap) / (len(totals) * rows * options.tokens)


def main(options: Options) -> None:
    policy = open_policy(options)
    totals, phases, width, mismatch = measure(policy, options)
    print("seconds a phase: " + ", ".join(f"{name} {seconds:.3f}" for name, seconds in phases.items()))
    print(f"seconds a step: min {min(totals):.3f} median {statistics.median(totals):.3f} max {max(totals):.3f}")
    rate, bandwidth = rates(policy)
    products, read, both = needs(policy, width, options)
    print(f"this machine: {rate / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s")
    for phase, amount, other in (("sample", products, read / bandwidth), ("score", both, 0.0)):
        floor = max(amount / rate, other)
        share = floor / phases[phase]
        print(f"floor of {phase}: {floor:.3f} s of {phases[phase]:.3f} ({share:.0%}), for {amount / 1e9:.1f} GFLOP")
    print(f"sampled tokens a second: {options.prompts * options.group * options.tokens / phases['sample']:.0f}")
    print(f"mismatch: {mismatch:.1e}, prompt tokens: {width}")
    if options.cuda:
        print(f"peak memory GiB: {torch.cuda.max_memory_allocated() / 2**30:.1f}")


if __name__ == "__main__":
    main(tyro.cli(Options))
