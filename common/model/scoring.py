"""Teacher-forced scores of completions, with every prompt and its images forwarded once for its whole group.

The G completions of a prompt share its text and its images. The prompt goes through the model once; its keys and
values are put in front of each of its completions, whose tokens then run as a batch of their own with positions that
continue after the prompt. Gradients flow back through the shared keys and values, so the result equals that of G
separate padded rows, for a fraction of the work.

A policy that has grown sure samples the same completion several times in a group; such rows are forwarded once.

Nothing of size rows x tokens x vocabulary is ever kept: `token_logprobs` runs the output head over chunks of tokens
and, if they are more than one, runs it again in the backward pass.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from common.model.inputs import Prompts
from common.model.layers import attention, decoder_layer, precision, rms_norm, rotary_tables
from common.model.load import Policy

# Logits of this many entries may exist at a time (float32: 256 MiB).
LOGIT_BUDGET = 2**26


class Scores(NamedTuple):
    """What one forward says about R completions of T tokens. Entries outside the completion mask are 0."""

    logprobs: torch.Tensor  # [R, T] float32: log-probability of each token, at the sampling temperature
    entropy: torch.Tensor  # [R, T] float32: entropy of the distribution that the token was drawn from
    hidden: torch.Tensor  # [R, T, H] last hidden states (after the final norm) that predict each token
    states: torch.Tensor  # [R, T, H] last hidden states at each token's own position
    prompt_states: torch.Tensor  # [N, P, H] last hidden states of the prompts


@dataclass
class Prefix:
    """A forwarded prompt: what its completions need of it."""

    keys: list[torch.Tensor]  # a layer: [N, key heads, P, D], rotated, in the values' precision
    values: list[torch.Tensor]  # a layer: [N, key heads, P, D]
    states: torch.Tensor  # [N, P, H] last hidden states
    attention_mask: torch.Tensor  # [N, P] bool
    next_positions: torch.Tensor  # [N] position of the first token after the prompt


class Scorer(torch.nn.Module):
    """The scoring forward as a module, so that accelerate can wrap it for several processes."""

    def __init__(self, policy: Policy, gradient_checkpointing: bool = False, slice_tokens: int = 16384):
        """`gradient_checkpointing` drops activations and computes them again in the backward pass. Completions of more
        than `slice_tokens` tokens, padding counted, then run in slices of rows, no two of which are held together: a
        group that is larger than a micro-batch needs no more memory than one, for one more forward."""
        super().__init__()
        self.model = policy.model
        self.policy = policy
        self.gradient_checkpointing = gradient_checkpointing
        self.slice_tokens = slice_tokens
        if gradient_checkpointing:  # the vision tower has no cache, so transformers' own does for it
            policy.base.model.visual.gradient_checkpointing_enable({"use_reentrant": False})
            policy.model.train()

    def forward(
        self,
        prompts: Prompts,
        completion_ids: torch.Tensor,
        completion_mask: torch.Tensor,
        temperature: float = 1.0,
        prompt_of_row: list[int] | None = None,
    ) -> Scores:
        """Score completions [R, T] of N prompts; rows of a prompt stand together: row r belongs to prompt r // (R / N),
        unless `prompt_of_row` says to which.

        `completion_ids` int64 and `completion_mask` bool are right-padded; `temperature` is the sampling temperature.
        """
        policy, model = self.policy, self.policy.base
        if prompt_of_row is None:
            spread = partial(torch.repeat_interleave, repeats=len(completion_ids) // len(prompts), dim=0)
            place = spread(torch.arange(len(prompts), device=policy.device))  # [R]
        else:
            place = torch.tensor(prompt_of_row, device=policy.device)  # [R]
        # Completions that a group holds several times have the same scores: each is forwarded once.
        first, copy_of = distinct_rows(place, completion_ids, completion_mask)
        several = len(first) < len(place)
        if several:
            completion_ids, completion_mask, place = completion_ids[first], completion_mask[first], place[first]
        if several or prompt_of_row is not None:
            spread = partial(torch.index_select, dim=0, index=place)
        work = policy.work
        work.forwards, work.images = work.forwards + 1, work.images + len(prompts.image_grid_thw)
        work.rows, work.repeated_rows = work.rows + len(copy_of), work.repeated_rows + len(copy_of) - len(first)
        work.scored_tokens = work.scored_tokens + completion_mask.sum()
        if torch.is_grad_enabled():
            work.trained_tokens = work.trained_tokens + prompts.attention_mask.sum() + completion_mask.sum()
        with policy.autocast():
            prefix = forward_prompts(model, prompts, self.gradient_checkpointing)
            size = max(1, self.slice_tokens // completion_ids.shape[1])
            if self.gradient_checkpointing and len(place) > size:
                score = partial(checkpoint, self.score_rows, prefix, use_reentrant=False)
                slices = zip(*(x.split(size) for x in (place, completion_ids, completion_mask)), strict=True)
                parts = [score(partial(torch.index_select, dim=0, index=i), *rest, temperature) for i, *rest in slices]
                logprobs, entropy, hidden, states = (torch.cat(part) for part in zip(*parts, strict=True))
            else:
                logprobs, entropy, hidden, states = self.score_rows(
                    prefix, spread, completion_ids, completion_mask, temperature
                )
        if several:
            logprobs, entropy, hidden, states = (x[copy_of] for x in (logprobs, entropy, hidden, states))
        return Scores(logprobs, entropy, hidden, states, prefix.states)

    def score_rows(
        self,
        prefix: Prefix,
        spread: Callable[[torch.Tensor], torch.Tensor],
        completion_ids: torch.Tensor,
        completion_mask: torch.Tensor,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities, entropies, hidden and own states, as in `Scores`, of completions [R, T] behind forwarded
        prompts; `spread` makes rows [R, ...] out of prompts [N, ...]."""
        model = self.policy.base
        states = forward_completions(model, prefix, spread, completion_ids, self.gradient_checkpointing)
        last = spread(prefix.states[:, -1:])  # [R, 1, H]
        hidden = torch.cat([last, states[:, :-1]], dim=1)  # [R, T, H]
        head = model.get_output_embeddings().weight
        logprobs, entropy = token_logprobs(
            hidden, head, completion_ids, completion_mask, self.policy.banned, temperature
        )
        return logprobs, entropy, hidden, states


def distinct_rows(
    place: torch.Tensor, completion_ids: torch.Tensor, completion_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first of each set of rows with equal prompt and completion, in order, and the place of each row [R] there.

    >>> ids = torch.tensor([[5, 6], [5, 7], [5, 7], [5, 7]])
    >>> distinct_rows(torch.tensor([0, 0, 0, 1]), ids, torch.ones(4, 2, dtype=torch.bool))
    (tensor([0, 1, 3]), tensor([0, 1, 1, 2]))
    """
    keys = torch.cat([place[:, None], completion_ids.masked_fill(~completion_mask, -1)], dim=1)
    unique, number = keys.unique(dim=0, return_inverse=True)
    rows = torch.arange(len(place), device=place.device)
    first = rows.new_full((len(unique),), len(place)).scatter_reduce(0, number, rows, "amin")
    order = first.argsort()
    return first[order], order.argsort()[number]


def forward_prompts(model: torch.nn.Module, prompts: Prompts, recompute: bool = False) -> Prefix:
    """Run the vision tower and the prompts through the model; `recompute` drops activations until the backward pass."""
    inner, text = model.model, model.model.language_model
    embeds = text.embed_tokens(prompts.input_ids)  # [N, P, H]
    image_tokens = prompts.input_ids == model.config.image_token_id  # [N, P]
    deepstack = []
    if prompts.pixel_values is not None:
        features = inner.get_image_features(prompts.pixel_values, prompts.image_grid_thw.to(embeds.device))
        embeds = embeds.masked_scatter(image_tokens[..., None], torch.cat(features.pooler_output).to(embeds.dtype))
        # Qwen3-VL also adds features of earlier vision layers to its first text layers.
        # Some releases cut them into images.
        levels = getattr(features, "deepstack_features", None) or []
        deepstack = [level if isinstance(level, torch.Tensor) else torch.cat(level) for level in levels]
    elif torch.is_grad_enabled():  # the gradient of the vision tower is 0, not missing: processes average theirs
        unused = [p.sum() for p in inner.visual.parameters() if p.requires_grad]
        embeds = embeds + 0 * sum(unused) if unused else embeds

    mask = None
    if not bool(prompts.attention_mask.all()):
        width = prompts.input_ids.shape[1]
        causal = prompts.attention_mask.new_ones(width, width).tril()
        # A padded query sees itself: a row of a softmax may not be empty.
        mask = causal & prompts.attention_mask[:, None, None] | torch.eye(width, dtype=torch.bool, device=embeds.device)
    rotary = rotary_tables(text, prompts.position_ids)

    keys, values, hidden = [], [], embeds
    for level, layer in enumerate(text.layers):
        hidden, new_keys, new_values = run_layer(layer, hidden, mask, rotary, (), recompute)
        keys.append(new_keys)
        values.append(new_values)
        if level < len(deepstack):
            hidden = hidden.masked_scatter(
                image_tokens[..., None], (hidden[image_tokens] + deepstack[level]).to(hidden.dtype)
            )
    next_positions = prompts.position_ids.amax(dim=(0, 2)) + 1  # [N]
    return Prefix(keys, values, rms_norm(hidden, text.norm), prompts.attention_mask, next_positions)


def forward_completions(
    model: torch.nn.Module,
    prefix: Prefix,
    spread: Callable[[torch.Tensor], torch.Tensor],
    completion_ids: torch.Tensor,
    recompute: bool,
) -> torch.Tensor:
    """Last hidden states [R, T, H] of completions [R, T]; `spread` makes rows [R, ...] out of prompts [N, ...]."""
    text = model.model.language_model
    tokens, width = completion_ids.shape[1], prefix.attention_mask.shape[1]
    embeds = text.embed_tokens(completion_ids)  # [R, T, H]
    steps = torch.arange(tokens, device=embeds.device)
    positions = spread(prefix.next_positions)[:, None] + steps  # [R, T]
    rotary = rotary_tables(text, positions.expand(3, -1, -1))
    mask = None
    if not bool(prefix.attention_mask.all()):
        padded = torch.nn.functional.pad(prefix.attention_mask, (0, tokens), value=True)  # [N, P + T]
        causal = padded.new_ones(tokens, width + tokens).tril(width)
        mask = causal & spread(padded)[:, None, None]  # [R, 1, T, P + T]

    hidden = embeds
    for level, layer in enumerate(text.layers):
        past = prefix.keys[level], prefix.values[level]
        hidden, _, _ = run_layer(layer, hidden, mask, rotary, past, recompute, spread)
    return rms_norm(hidden, text.norm)


def run_layer(layer, hidden, mask, rotary, past, recompute: bool, spread=None):
    """One decoder layer: its output, new keys and new values; `past` holds the prompts' keys and values, which `spread`
    makes rows of, inside of what is recomputed: what is kept are those of N prompts, not a copy for each row."""

    def step(hidden, *past):
        new = []

        def attend(q, k, v):
            new.extend((k, v))
            if past:
                k, v = (torch.cat([spread(old), own], dim=2) for old, own in zip(past, (k, v), strict=True))
            return attention(q, k, v, mask, layer.self_attn.scaling)

        return decoder_layer(layer, hidden, rotary, attend), *new

    if recompute and torch.is_grad_enabled():
        return checkpoint(step, hidden, *past, use_reentrant=False)
    return step(hidden, *past)


def token_logprobs(
    hidden: torch.Tensor,
    head: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    banned: torch.Tensor,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies [R, T] float32 of tokens from hidden states [R, T, H] and the head [V, H].

    Only tokens inside the mask are computed. The softmax is over the vocabulary without `banned` [V], as in sampling.
    """
    rows = (hidden[completion_mask] / temperature).to(precision(head))  # [Z, H]
    bias = torch.zeros(len(head), dtype=rows.dtype, device=rows.device).masked_fill(banned, -1e30)  # [V] costs no pass
    with torch.autocast(rows.device.type, enabled=False):  # which would round the entropy's products
        values = TokenLogprobs.apply(rows, head, bias, completion_ids[completion_mask])
    zeros = torch.zeros(completion_mask.shape, device=hidden.device)
    return tuple(zeros.masked_scatter(completion_mask, value) for value in values)


class TokenLogprobs(torch.autograd.Function):
    """Log-probabilities and entropies [Z] float32 of tokens [Z] from rows [Z, H], the head [V, H] and a bias [V].

    Logits are made for `LOGIT_BUDGET // V` rows at a time. The gradient of a token's log-probability in its logits is
    one-hot minus their softmax p, that of the entropy H is -p (log p + H), so that the backward pass needs nothing but
    p: of a single chunk it is kept, of more the logits are computed again. For a head that is not trained it is one
    matrix product more, otherwise two. A loss without the entropy pays nothing for its gradient.
    """

    @staticmethod
    def forward(ctx, rows, head, bias, targets):
        weight, size = head.to(rows.dtype), max(1, LOGIT_BUDGET // len(head))
        single = len(rows) <= size

        def chunk(rows, targets):
            logprobs = torch.nn.functional.linear(rows, weight, bias).float().log_softmax(-1)  # [C, V]
            p = logprobs.exp()
            kept, terms = (p, p * logprobs) if single else (None, p.mul_(logprobs))
            return logprobs.gather(-1, targets[:, None])[:, 0], -terms.sum(-1), kept

        logprobs, entropy, kept = zip(*map(chunk, rows.split(size), targets.split(size)), strict=True)
        logprobs, entropy = torch.cat(logprobs), torch.cat(entropy)
        ctx.save_for_backward(rows, head, bias, targets, kept[0])
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, entropy_grad):
        rows, head, bias, targets, kept = ctx.saved_tensors
        grad = entropy_grad.new_zeros(len(targets)) if grad is None else grad  # None: the loss does without them
        weight, size = head.to(rows.dtype), max(1, LOGIT_BUDGET // len(head))
        grad_rows = torch.empty_like(rows)
        grad_head = None
        for i in range(0, max(1, len(rows)), size):
            own, g = rows[i : i + size], grad[i : i + size, None]  # [C, H], [C, 1]
            p = torch.nn.functional.linear(own, weight, bias).float().softmax(-1) if kept is None else kept.clone()
            if entropy_grad is None:
                grad_logits = p.mul_(-g)
            else:
                h, terms = entropy_grad[i : i + size, None], torch.xlogy(p, p)  # [C, 1], [C, V]
                grad_logits = p.mul_(h * terms.sum(-1, keepdim=True) - g).addcmul_(terms, h, value=-1)
                del terms
            grad_logits = grad_logits.scatter_add_(-1, targets[i : i + size, None], g).to(rows.dtype)  # [C, V]
            grad_rows[i : i + size] = grad_logits @ weight
            if ctx.needs_input_grad[1]:
                product = grad_logits.mT @ own  # [V, H]
                grad_head = product.float() if grad_head is None else grad_head.add_(product)
            del p, grad_logits  # before the next ones are made
        return grad_rows, None if grad_head is None else grad_head.to(head.dtype), None, None
