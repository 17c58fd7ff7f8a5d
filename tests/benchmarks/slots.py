"""Sampling in slots against all rows at once and against `model.generate` in batches, with lengths as reasoning has.

    python -m tests.benchmarks.slots                     # 512 rows on the CPU, lengths and blocks of a real run by 16
    python -m tests.benchmarks.slots --paper             # arithmetic only: a 4B model on an H100 and an H200

Lengths are lognormal, by default of median 300 and cut at 2,048. A row ends where its drawn length says so, whatever
the model would like. Memory is what tensors hold at the peak, the weights' own left out, in a run of its own.

The second table is computed: for each token a step reads the weights, the keys and values of prompts once each, and
those of rows by blocks, at the card's bandwidth; or takes the matrix products' time at 60 % of its dense bfloat16 rate,
where that is longer; and prompts are forwarded at that rate. Slots run here as `common.model.sampling` runs them.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from PIL import Image
from transformers import LogitsProcessor

from common.model import decoder
from common.model.inputs import Prompts, encode_prompts
from common.model.load import Policy, load_policy
from common.model.memory import find_shape, sampling
from tests.peak_bytes import PeakBytes

CARDS = {"H100": (80e9, 3.35e12, 989e12), "H200": (141e9, 4.8e12, 989e12)}  # bytes, bytes a second, operations a second
RATE = 0.6


@dataclass
class Options:
    model: str = "tiny"
    """built-in `tiny`, a folder or a hub id"""
    prompts: int = 64
    group: int = 8
    slots: tuple[int, ...] = (32, 64, 128, 256)
    median: float = 300.0
    spread: float = 0.8
    """standard deviation of the logarithm of lengths"""
    limit: int = 2048
    scale: int = 16
    """lengths and blocks are divided by this"""
    image: int = 64
    """side of each image in pixels"""
    threads: int = 1
    cuda: bool = False
    memory: bool = True
    """also count bytes"""
    paper: bool = False
    """only the arithmetic"""
    paper_model: str = "Qwen/Qwen3-VL-4B-Instruct"
    paper_rows: int = 384
    """rows of one GPU: 384 prompts of 8 completions on 8 GPUs"""
    paper_width: int = 1100
    """tokens of a prompt, its image included"""


def draw_lengths(rows: int, options: Options, scale: int) -> np.ndarray:
    """Tokens of each row [R]."""
    normal = np.random.default_rng(0).normal(np.log(options.median / scale), options.spread, rows)
    return np.exp(normal).round().clip(1, options.limit // scale).astype(int)


def force_lengths(policy: Policy, lengths: np.ndarray, limit: int) -> torch.Tensor:
    """Numbers to sample by [R, T], in which a row's end is written as a 2, and sampling that obeys it."""
    end, draw = policy.end_token_ids[0], sampling.draw_tokens
    policy.end_token_ids = [end]
    policy.banned[end] = True  # nothing else ends a row

    def draw_or_end(logits, uniforms, *rest):
        tokens, logprobs = draw(logits, uniforms, *rest)
        return tokens.masked_fill(uniforms > 1, end), logprobs.masked_fill(uniforms > 1, 0)

    sampling.draw_tokens = draw_or_end
    uniforms = sampling.uniform_numbers(0, 0, range(len(lengths)), limit)
    short = np.flatnonzero(lengths < limit)
    uniforms[short, lengths[short] - 1] = 2
    return uniforms


class EndAt(LogitsProcessor):
    """Ends rows at given lengths, and not before."""

    def __init__(self, lengths: np.ndarray, width: int, end: int):
        self.lengths, self.width, self.end = torch.from_numpy(lengths), width, end

    def __call__(self, input_ids, scores):
        now = self.lengths.to(scores.device) == input_ids.shape[1] - self.width + 1
        scores[:, self.end] = torch.where(now, 1e9, -1e9)
        return scores


def generate(policy: Policy, prompts: Prompts, lengths: np.ndarray, batch: int, options: Options) -> int:
    """transformers' own, a batch after the other; returns the tokens written."""
    end, written = policy.end_token_ids[0], 0
    for first in range(0, len(lengths), batch):
        rows = range(first, min(first + batch, len(lengths)))
        some = prompts.select([row // options.group for row in rows])
        with torch.no_grad(), policy.autocast():
            policy.model.generate(
                input_ids=some.input_ids, attention_mask=some.attention_mask.long(), pixel_values=some.pixel_values,
                image_grid_thw=some.image_grid_thw,
                mm_token_type_ids=(some.input_ids == policy.base.config.image_token_id).int(),
                do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=options.limit // options.scale,
                eos_token_id=end, pad_token_id=policy.tokenizer.pad_token_id,
                logits_processor=[EndAt(lengths[rows.start : rows.stop], some.input_ids.shape[1], end)],
            )  # fmt: skip
        written += int(lengths[rows.start : rows.stop].sum())
    return written


def measure(options: Options) -> None:
    torch.set_num_threads(options.threads)
    policy = load_policy(options.model, device="cuda" if options.cuda else "cpu")
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many red shapes?"}]}]
    images = [[Image.effect_noise((options.image,) * 2, 80).convert("RGB")] for _ in range(options.prompts)]
    prompts = encode_prompts(policy, [message] * options.prompts, images)
    rows, limit = options.prompts * options.group, options.limit // options.scale
    lengths = draw_lengths(rows, options, options.scale)
    uniforms = force_lengths(policy, lengths, limit)
    decoder.BLOCK_TOKENS //= options.scale
    print(
        f"{rows} rows, prompts of {prompts.input_ids.shape[1]} tokens; lengths: median {np.median(lengths):.0f}, ",
        end="",
    )
    print(f"mean {lengths.mean():.1f}, longest {lengths.max()}; {lengths.sum():,} tokens")
    print(f"{'':28}{'tokens/s':>10}{'seconds':>9}{'peak MB':>9}")

    def in_slots(slots: int) -> int:
        rollout = sampling.sample(policy, prompts, options.group, limit, uniforms, slots=slots)
        assert rollout.completion_mask.sum(1).tolist() == lengths.tolist()
        return int(rollout.completion_mask.sum())

    sides = {"all rows at once": lambda: in_slots(0)}
    for slots in options.slots:
        sides[f"{slots} slots"] = lambda slots=slots: in_slots(slots)
        sides[f"generate, batches of {slots}"] = lambda slots=slots: generate(policy, prompts, lengths, slots, options)
    for name, work in sides.items():
        start = time.perf_counter()
        tokens = work()
        if options.cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = ""
        if options.memory:
            with PeakBytes() as memory:
                for parameter in policy.model.parameters():
                    memory.held.add(parameter.untyped_storage()._cdata)
                work()
            peak = f"{memory.most / 1e6:9.1f}"
        print(f"{name:28}{tokens / seconds:10.0f}{seconds:9.2f}{peak}", flush=True)


def run_slots(lengths: np.ndarray, slots: int, group: int, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each step the slots decoded, the blocks that their rows hold, and the prompts of these rows."""
    slots = min(slots, len(lengths))
    row, age, waiting = np.arange(slots), np.zeros(slots, dtype=int), slots
    steps = []
    while True:
        steps.append((len(row), int((age // block + 1).sum()), len(np.unique(row // group))))
        age = age + 1
        if len(steps) % sampling.DROP_EVERY:
            continue
        ended = np.flatnonzero(age >= lengths[row])
        if waiting < len(lengths):
            if len(ended) >= sampling.REFILL_FROM * slots:
                ended = ended[: len(lengths) - waiting]
                row[ended], age[ended] = np.arange(waiting, waiting + len(ended)), 0
                waiting += len(ended)
        elif len(ended) == len(row):
            return tuple(np.array(steps).T)
        elif len(row) - len(ended) <= sampling.DROP_RECORDED_BELOW * len(row):
            row, age = np.delete(row, ended), np.delete(age, ended)


def compute(options: Options) -> None:
    shape = find_shape(options.paper_model)
    lengths = draw_lengths(options.paper_rows, options, 1)
    weights, token, block = shape.read * 2, shape.cached, decoder.BLOCK_TOKENS
    prompts = -(-options.paper_rows // options.group)
    print(
        f"\n{options.paper_model}, bfloat16: {weights / 1e9:.1f} GB of weights to read, {token / 1e3:.0f} kB a token; "
    )
    print(f"{options.paper_rows} rows of {prompts} prompts of {options.paper_width} tokens; lengths: median ", end="")
    print(f"{np.median(lengths):.0f}, mean {lengths.mean():.0f}, longest {lengths.max()}; {lengths.sum():,} tokens")
    print(f"{'':30}{'GB':>7}" + "".join(f"{name + ' tokens/s':>18}" for name in CARDS))

    def line(name: str, active, places, gigabytes: float, forwarded: int) -> None:
        cells = ""
        for memory, bandwidth, rate in CARDS.values():
            read = (weights + places * token) / bandwidth
            seconds = np.maximum(read, active * weights / (rate * RATE)).sum()  # a multiply-add and 2 bytes a weight
            seconds += forwarded * options.paper_width * weights / (rate * RATE)
            cells += (
                f"{lengths.sum() / seconds:18,.0f}" if gigabytes * 1e9 + 2 * shape.parameters < memory else f"{'-':>18}"
            )
        print(f"{name:30}{gigabytes:7.1f}{cells}", flush=True)

    last = int(lengths.max())
    left = np.array([(lengths > t).sum() for t in range(last)])
    active, decoded = options.paper_rows, []
    for t in range(last):  # rows are dropped when half of them have ended
        active = int(left[t]) if left[t] <= sampling.DROP_RECORDED_BELOW * active else active
        decoded.append(active)
    decoded, width = np.array(decoded), options.paper_width
    reserved = (prompts * width + options.paper_rows * options.limit) * token / 1e9
    spans = np.minimum((np.arange(last) // block + 1) * block, options.limit)
    line("all rows at once", decoded, decoded * spans + prompts * width, reserved, prompts)
    for slots in (32, 64, 128, 256):
        active, blocks, held = run_slots(lengths, slots, options.group, block)
        places = blocks * block + held * width
        line(f"{slots} slots", active, places, places.max() * token / 1e9, prompts)
        bound = slots * (options.limit + width) * token / 1e9
        print(f"{'  were all rows at the limit':30}{bound:7.1f}")
        active, places, most = [], [], 0
        for first in range(0, len(lengths), slots):
            own = lengths[first : first + slots]
            steps = np.arange(own.max())
            active.append(np.full(len(steps), len(own)))
            places.append(len(own) * (width + steps))
            most = max(most, len(own) * (width + int(own.max())))
        line(
            f"generate, batches of {slots}",
            np.concatenate(active),
            np.concatenate(places),
            most * token / 1e9,
            len(lengths),
        )


def main(options: Options) -> None:
    if not options.paper:
        measure(options)
    compute(options)


if __name__ == "__main__":
    main(tyro.cli(Options))
