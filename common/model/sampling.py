"""Sampling G completions per prompt.

Each prompt is forwarded once, images included, and its keys and values serve all its G rows. All rows are decoded
together, and those that have ended are dropped; or, where memory does not allow that, a fixed number of slots is: a row
that has ended gives its slot to the next in line. Nothing of a checkpoint's own generation settings is used:
temperature, top-p and top-k are arguments, and every end token of the model ends a row.

The draws are a pure function of uniform numbers given per row and token, so a row samples the same completion whichever
rows stand beside it, in one process or several, in a first run or a resumed one.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.model.decoder import Decoder, SlotDecoder
from common.model.inputs import Prompts
from common.model.layers import precision
from common.model.load import Policy
from common.model.scoring import forward_prompts

# Ended rows are looked for every so many tokens, which costs a wait for the device, and are dropped when no more than
# this share of the rows goes on, which costs a copy of the cache and, where steps are recorded, another recording.
DROP_EVERY = 4
DROP_BELOW, DROP_RECORDED_BELOW = 0.75, 0.5
REFILL_FROM = 0.125  # share of the slots that must be free for new rows to come, so that their prompts come in batches
BLOCK = 128  # words of a large vocabulary whose probabilities are summed first; the families' sizes are multiples


@dataclass
class Rollout:
    """R = N * G completions of at most T tokens; rows of a prompt stand together."""

    completion_ids: torch.Tensor  # [R, T] int64, right-padded
    completion_mask: torch.Tensor  # [R, T] bool, true up to and including the end token
    logprobs: torch.Tensor  # [R, T] float32, of the sampling policy at the sampling temperature, 0 on padding
    ended: torch.Tensor  # [R] bool, false where the length limit cut the completion

    def __len__(self) -> int:
        return len(self.completion_ids)


def uniform_numbers(
    seed: int, step: int, rows: Sequence[int | tuple[int, int]], length: int | Sequence[int]
) -> torch.Tensor:
    """Numbers [R, T] float64 in [0, 1): a pure function of seed, step and each row's place in the whole step.

    What else a method draws for a prompt of a step has a number above 0 behind the prompt's place, as (place, 1): 0
    there, or none, would be a row's stream again. With a length a row they are packed, row after row, in one dimension.
    """
    streams = [np.random.default_rng([seed, step, *(row if isinstance(row, tuple) else (row,))]) for row in rows]
    if isinstance(length, int):
        return torch.from_numpy(np.stack([stream.random(length) for stream in streams]))
    return torch.from_numpy(np.concatenate([s.random(n) for s, n in zip(streams, length, strict=True)]))


def sample(
    policy: Policy,
    prompts: Prompts,
    group_size: int,
    max_new_tokens: int,
    uniforms: torch.Tensor | None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    slots: int = 0,
) -> Rollout:
    """Sample `group_size` completions for each of N prompts, of at most `max_new_tokens` tokens.

    `uniforms` [R, max_new_tokens] holds a number in [0, 1) for each token to draw; temperature 0 is greedy and needs
    none. `top_p` < 1 and `top_k` > 0 restrict which tokens may be drawn; the log-probabilities returned stay those of
    the whole distribution at that temperature, which are the ones that scoring computes (at temperature 0: those at 1).
    `slots` bounds how many rows are decoded at a time, and with them memory (0: all).
    """
    model, device = policy.base, policy.device
    rows, limit, width = len(prompts) * group_size, max_new_tokens, prompts.input_ids.shape[1]
    together = min(slots or rows, rows)
    # Behind the limit is one place more, for what is drawn in a slot whose row has ended.
    ids = torch.full((rows, limit + 1), policy.tokenizer.pad_token_id, device=device)  # [R, T + 1]
    logprobs = torch.zeros(rows, limit + 1, device=device)  # [R, T + 1]
    ends = torch.tensor(policy.end_token_ids, device=device)
    uniforms = None if uniforms is None else uniforms.to(device)

    was_training = model.training
    model.eval()
    with torch.inference_mode(), policy.autocast():
        active = torch.arange(together, device=device)  # [A] the row in each slot
        lengths = torch.zeros_like(active)  # [A] tokens drawn of it
        going = torch.ones_like(active, dtype=torch.bool)  # [A] whether it has not ended
        waiting = range(together, rows)  # rows that have had no slot yet
        if waiting:
            positions = int(prompts.position_ids.max()) + 1 + limit
            decoder = SlotDecoder(model, together, group_size, limit, width, positions)
            prefix = forward_prompts(model, prompts.select(range(-(-together // group_size))))
            hidden = decoder.admit(list(range(together)), list(range(together)), prefix)  # [A, H]
        else:
            prefix = forward_prompts(model, prompts)
            decoder = Decoder(model, prefix, group_size, limit)
            hidden = prefix.states[:, -1].repeat_interleave(group_size, dim=0)  # [A, H]
        head = model.get_output_embeddings().weight
        head = head.to(precision(head))  # [V, H]
        bias = torch.zeros(len(head), dtype=head.dtype, device=device).masked_fill(policy.banned, -1e30)  # [V]
        del prefix  # all that is still needed of it has been copied
        torch.clear_autocast_cache()  # a copy of the weights, which the decoder has in its own arrangement
        last = limit  # step after which every row in flight has reached the limit
        for step in itertools.count(1):
            logits = torch.nn.functional.linear(hidden, head, bias)  # [A, V]
            draw = None if uniforms is None else uniforms[active, lengths.clamp(max=limit - 1)]  # [A]
            tokens, token_logprobs = draw_tokens(logits, draw, temperature, top_p, top_k)
            place = lengths.clamp(max=limit)
            ids[active, place] = tokens
            logprobs[active, place] = token_logprobs
            lengths += 1
            going &= ~torch.isin(tokens, ends) & (lengths < limit)
            if step == last and not waiting:
                break
            free = []
            if step % DROP_EVERY == 0:
                keep = going.nonzero()[:, 0]
                if waiting:
                    if (len(active) - len(keep)) >= REFILL_FROM * len(active):
                        free = (~going).nonzero()[: len(waiting), 0].tolist()
                elif len(keep) == 0:
                    break
                elif len(keep) <= (DROP_RECORDED_BELOW if decoder.recording else DROP_BELOW) * len(active):
                    active, tokens, lengths, going = (x[keep] for x in (active, tokens, lengths, going))
                    decoder.keep(keep)
            hidden = decoder.step(tokens)
            if free:
                admitted, waiting = waiting[: len(free)], waiting[len(free) :]
                # Prompts are forwarded with their first row, in order.
                new = range(-(-admitted[0] // group_size), -(-waiting.start // group_size))
                prefix = forward_prompts(model, prompts.select(new)) if new else None
                hidden[free] = decoder.admit(free, list(admitted), prefix)
                del prefix
                torch.clear_autocast_cache()
                active[free] = torch.tensor(admitted, device=device)
                lengths[free], going[free], last = 0, True, step + limit
    model.train(was_training)

    ids, logprobs = ids[:, :limit], logprobs[:, :limit]
    if not bool(logprobs.isfinite().all()):
        raise SystemExit("sampling: the model's predictions are not numbers; its weights are damaged or have diverged")
    # A completion goes up to its first end token; what was drawn behind it before the row was dropped is forgotten.
    is_end = torch.isin(ids, ends)
    ended = is_end.any(1)
    lengths = torch.where(ended, is_end.int().argmax(1) + 1, max_new_tokens)  # [R]
    longest = int(lengths.max())
    mask = torch.arange(longest, device=device) < lengths[:, None]  # [R, T]
    work = policy.work
    work.forwards, work.images = work.forwards + 1, work.images + len(prompts.image_grid_thw)
    work.decode_steps, work.sampled_tokens = work.decode_steps + longest, work.sampled_tokens + lengths.sum()
    ids = ids[:, :longest].masked_fill(~mask, policy.tokenizer.pad_token_id)
    return Rollout(ids, mask, logprobs[:, :longest] * mask, ended)


def draw_tokens(
    logits: torch.Tensor,
    uniforms: torch.Tensor | None,
    temperature: float,
    top_p: float,
    top_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row from logits [A, V] by inverting its distribution function at `uniforms` [A].

    Returns tokens [A] and their log-probabilities [A] float32 under the whole distribution.
    """
    if temperature not in (0.0, 1.0):
        logits = logits.float() / temperature
    whole = logits.softmax(-1, dtype=torch.float32)  # [A, V]
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        probabilities = whole
        if 0 < top_k < whole.shape[-1]:
            smallest = probabilities.topk(top_k, dim=-1).values[:, -1:]
            probabilities = probabilities.where(probabilities >= smallest, 0)
        if top_p < 1:
            ranked, order = probabilities.sort(dim=-1, descending=True)
            before = ranked.cumsum(-1) - ranked  # a token stays if what stands before it is less than top_p
            ranked = ranked.where(before < top_p * ranked.sum(-1, keepdim=True), 0)
            probabilities = torch.zeros_like(probabilities).scatter(-1, order, ranked)
        tokens = find(probabilities, uniforms)
    return tokens, whole.gather(-1, tokens[:, None])[:, 0].log()


def find(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The first places [A] where the running sum of weights [A, V] exceeds that share [A] of the whole: never one of
    weight 0 (and any place where weights are NaN). Running sums are in float64, for that of 150,000 probabilities must
    not swallow the small ones; of many weights blocks are summed up first and one block is gone through, since running
    sums are slow.
    """

    def place(sums, shares):
        wanted = shares.clamp(0, 1 - 2**-52) * sums[:, -1:]
        return wanted, torch.searchsorted(sums, wanted, right=True).clamp(max=sums.shape[1] - 1)  # [A, 1] both

    def running(weights):
        return weights.cumsum(-1, dtype=torch.float64)

    size = weights.shape[-1]
    if size <= 8 * BLOCK:
        return place(running(weights), uniforms[:, None])[1][:, 0]
    if short := -size % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, short))
    blocks = weights.unflatten(-1, (-1, BLOCK))
    totals = blocks.sum(-1)  # [A, blocks]
    sums = running(totals)
    wanted, block = place(sums, uniforms[:, None])
    inside = running(blocks.take_along_dim(block[..., None], 1)[:, 0])  # [A, BLOCK]
    left = (sums.gather(-1, block) - wanted) / totals.gather(-1, block)  # share of the block behind what is wanted
    return (block * BLOCK + place(inside, 1 - left)[1])[:, 0].clamp(max=size - 1)


def decode(policy: Policy, rollout: Rollout) -> list[str]:
    """The completions as text, special tokens left out (`<think>` and the like are not special). Where the prompt opens
    `<think>`, as the chat template of thinking models does, it stands in front."""
    ids = [row[mask].tolist() for row, mask in zip(rollout.completion_ids, rollout.completion_mask, strict=True)]
    dummy = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    prompt = policy.tokenizer.apply_chat_template(dummy, tokenize=False, add_generation_prompt=True)
    opening = "<think>" if prompt.rstrip().endswith("<think>") else ""
    return [opening + text for text in policy.tokenizer.batch_decode(ids, skip_special_tokens=True)]
