"""Sampling G completions per prompt.

Each prompt is forwarded once, images included, and its keys and values repeated for its G rows. All rows are decoded
together; rows that have ended are dropped as the batch shrinks. Nothing of a checkpoint's own generation settings is
used: temperature, top-p and top-k are arguments, and every end token of the model ends a row.

The draws are a pure function of uniform numbers given per row and token, so a row samples the same completion whichever
rows stand beside it, in one process or several, in a first run or a resumed one.
"""

from dataclasses import dataclass

import numpy as np
import torch

from common.forward import Prefix, forward_prompts
from common.layers import attention, fused, rms_norm, rotary_tables
from common.model import Policy, Prompts

# Ended rows are looked for every so many tokens, which costs a wait for the device, and are dropped when a quarter of
# the rows has ended, which costs a copy of the cache.
DROP_EVERY = 4
DROP_BELOW = 0.75


@dataclass
class Rollout:
    """R = N * G completions of at most T tokens; rows of a prompt stand together."""

    completion_ids: torch.Tensor  # [R, T] int64, right-padded
    completion_mask: torch.Tensor  # [R, T] bool, true up to and including the end token
    old_logprobs: torch.Tensor  # [R, T] float32, of the sampling policy at the sampling temperature, 0 on padding
    ended: torch.Tensor  # [R] bool, false where the length limit cut the completion

    def __len__(self) -> int:
        return len(self.completion_ids)


def uniform_numbers(seed: int, step: int, rows: list[int], length: int) -> torch.Tensor:
    """Numbers [R, T] float64 in [0, 1): a pure function of seed, step and each row's place in the whole step."""
    return torch.from_numpy(np.stack([np.random.default_rng([seed, step, row]).random(length) for row in rows]))


def sample(
    policy: Policy,
    prompts: Prompts,
    group_size: int,
    max_new_tokens: int,
    uniforms: torch.Tensor | None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> Rollout:
    """Sample `group_size` completions for each of N prompts, of at most `max_new_tokens` tokens.

    `uniforms` [R, max_new_tokens] holds a number in [0, 1) for each token to draw; temperature 0 is greedy and needs
    none. `top_p` < 1 and `top_k` > 0 restrict which tokens may be drawn; the log-probabilities returned stay those of
    the whole distribution at that temperature, which are the ones that scoring computes (at temperature 0: those at 1).
    """
    model, device = policy.base, policy.device
    rows = len(prompts) * group_size
    ids = torch.full((rows, max_new_tokens), policy.tokenizer.pad_token_id, device=device)  # [R, T]
    logprobs = torch.zeros(rows, max_new_tokens, device=device)  # [R, T]
    ends = torch.tensor(policy.end_token_ids, device=device)
    uniforms = None if uniforms is None else uniforms.to(device)

    was_training = model.training
    model.eval()
    with torch.inference_mode(), policy.autocast():
        prefix = forward_prompts(model, prompts)
        decoder = Decoder(model, prefix, group_size, max_new_tokens)
        active = torch.arange(rows, device=device)  # [A] the rows still decoded
        hidden = prefix.states[:, -1].repeat_interleave(group_size, dim=0)  # [A, H]
        head = model.get_output_embeddings().weight
        for t in range(max_new_tokens):
            logits = (hidden @ head.T.to(hidden.dtype)).float()  # [A, V]
            draw = None if uniforms is None else uniforms[active, t]  # [A]
            tokens, token_logprobs = draw_tokens(logits, draw, policy.banned, temperature, top_p, top_k)
            ids[active, t] = tokens
            logprobs[active, t] = token_logprobs
            if t + 1 == max_new_tokens:
                break
            if t % DROP_EVERY == DROP_EVERY - 1:
                keep = (~torch.isin(ids[active, : t + 1], ends).any(1)).nonzero()[:, 0]
                if len(keep) == 0:
                    break
                if len(keep) <= DROP_BELOW * len(active):
                    active, tokens = active[keep], tokens[keep]
                    decoder.keep(keep)
            hidden = decoder.step(tokens)
    model.train(was_training)

    # A completion goes up to its first end token; what was drawn behind it before the row was dropped is forgotten.
    is_end = torch.isin(ids, ends)
    ended = is_end.any(1)
    lengths = torch.where(ended, is_end.int().argmax(1) + 1, max_new_tokens)  # [R]
    longest = int(lengths.max())
    mask = torch.arange(longest, device=device) < lengths[:, None]  # [R, T]
    ids = ids[:, :longest].masked_fill(~mask, policy.tokenizer.pad_token_id)
    return Rollout(ids, mask, logprobs[:, :longest] * mask, ended)


def draw_tokens(
    logits: torch.Tensor,
    uniforms: torch.Tensor | None,
    banned: torch.Tensor,
    temperature: float,
    top_p: float,
    top_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row from logits [A, V] by inverting its distribution function at `uniforms` [A].

    Returns tokens [A] and their log-probabilities [A] float32 under the whole distribution without `banned` [V].
    """
    logits = logits.masked_fill(banned, torch.finfo(torch.float32).min)
    whole = (logits / (temperature or 1.0)).softmax(-1)  # [A, V]
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
        # float64: the sum of 150,000 probabilities must not swallow the small ones.
        cumulative = probabilities.cumsum(-1, dtype=torch.float64)
        # The first token whose cumulative probability exceeds u: never one of probability 0.
        tokens = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return tokens, whole.gather(-1, tokens[:, None])[:, 0].log()


class Decoder:
    """The language model, laid out for one token a row at a time behind forwarded prompts.

    `common.layers.decoder_layer` with the model's weights in fewer and larger operations, for with one token a row the
    operations' number costs as much as their arithmetic: queries, keys and values come from one matrix product, gate
    and up from another; the norms' weights and the scale of the scores lie in the rotary tables, which are computed
    once. Keys and values are written in place.
    """

    def __init__(self, model: torch.nn.Module, prefix: Prefix, group_size: int, max_new_tokens: int):
        self.text = model.model.language_model
        attentions, mlps = zip(*((layer.self_attn, layer.mlp) for layer in self.text.layers), strict=True)
        self.qkv = [fused(a.q_proj, a.k_proj, a.v_proj) for a in attentions]
        self.gate_up = [fused(m.gate_proj, m.up_proj) for m in mlps]
        self.caches = []  # a layer: [2, A, key heads, P + T, D], keys and values
        for keys, values in zip(prefix.keys, prefix.values, strict=True):
            # Under autocast keys may come in float32, but attention computes in the values' precision.
            both = torch.stack([keys.to(values.dtype), values])
            _, prompts, heads, self.length, size = both.shape
            cache = both.new_empty(2, prompts * group_size, heads, self.length + max_new_tokens, size)
            cache[..., : self.length, :] = both.repeat_interleave(group_size, dim=1)
            self.caches.append(cache)
        self.positions = prefix.next_positions.repeat_interleave(group_size)  # [A] of the next token
        every = torch.arange(int(self.positions.max()) + max_new_tokens, device=self.positions.device)
        cos, sin = (table[0, :, None, None] for table in rotary_tables(self.text, every.expand(3, 1, -1)))
        weights = torch.stack([head_weights(a) for a in attentions])  # [layers, query and key heads, D]
        # Rotating rolls the heads by half, and their weights with them.
        self.rotary = torch.stack([cos * weights, sin * weights.roll(cos.shape[-1] // 2, -1)], 1)  # [S, 2, layers, ...]
        padded = not bool(prefix.attention_mask.all())
        self.prompt_mask = prefix.attention_mask.repeat_interleave(group_size, dim=0) if padded else None  # [A, P]

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feed one token a row [A]; returns the hidden states [A, H] that predict the next."""
        hidden = self.text.embed_tokens(tokens)  # [A, H]
        cosines, sines = self.rotary.index_select(0, self.positions).unbind(1)  # [A, layers, query and key heads, D]
        self.positions = self.positions + 1
        at, self.length = self.length, self.length + 1
        mask = None
        if self.prompt_mask is not None:
            mask = torch.nn.functional.pad(self.prompt_mask, (0, self.length - self.prompt_mask.shape[1]), value=True)
            mask = mask[:, None, None]  # [A, 1, 1, P + t]
        for number, (layer, cache) in enumerate(zip(self.text.layers, self.caches, strict=True)):
            heads = self.qkv[number](rms_norm(hidden, layer.input_layernorm))
            heads = heads.unflatten(-1, (-1, layer.self_attn.head_dim))  # [A, query, key and value heads, D]
            rotated = heads[:, : cosines.shape[2]]
            if hasattr(layer.self_attn, "q_norm"):  # Qwen3
                eps = layer.self_attn.q_norm.variance_epsilon
                rotated = torch.nn.functional.rms_norm(rotated, rotated.shape[-1:], None, eps)
            rolled = rotated.roll(rotated.shape[-1] // 2, -1)
            rotated = torch.addcmul(rotated * cosines[:, number], rolled, sines[:, number])
            q, k = rotated.split([rotated.shape[1] - cache.shape[2], cache.shape[2]], dim=1)
            cache[0, :, :, at], cache[1, :, :, at] = k, heads[:, cosines.shape[2] :]
            keys, values = cache[:, :, :, : self.length]
            gathered = attention(q[:, :, None], keys, values, mask, 1.0)  # [A, query heads, 1, D]
            hidden = hidden + layer.self_attn.o_proj(gathered.flatten(1))
            gate, up = self.gate_up[number](rms_norm(hidden, layer.post_attention_layernorm)).chunk(2, dim=-1)
            hidden = hidden + layer.mlp.down_proj(layer.mlp.act_fn(gate) * up)
        return rms_norm(hidden, self.text.norm)

    def keep(self, rows: torch.Tensor) -> None:
        """Keep only `rows` [A'] of the rows in flight."""
        self.caches = [cache[:, rows] for cache in self.caches]
        self.positions = self.positions[rows]
        self.prompt_mask = None if self.prompt_mask is None else self.prompt_mask[rows]


def head_weights(attention: torch.nn.Module) -> torch.Tensor:
    """What a layer's normalized query and key heads are multiplied by, [query and key heads, D] float32: the weights of
    their norms (Qwen3; else 1), and for the queries the scale of the attention scores."""
    config, size = attention.config, attention.head_dim
    queries = torch.full((config.num_attention_heads, size), attention.scaling)
    keys = torch.ones(config.num_key_value_heads, size)
    device = attention.o_proj.weight.device
    weights = torch.cat([queries, keys]).to(device)
    if hasattr(attention, "q_norm"):
        norms = attention.q_norm.weight.expand(queries.shape), attention.k_norm.weight.expand(keys.shape)
        weights = weights * torch.cat(norms).float()
    return weights


def decode(policy: Policy, rollout: Rollout) -> list[str]:
    """The completions as text, special tokens left out (`<think>` and the like are not special). Where the prompt opens
    `<think>`, as the chat template of thinking models does, it stands in front."""
    ids = [row[mask].tolist() for row, mask in zip(rollout.completion_ids, rollout.completion_mask, strict=True)]
    dummy = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    prompt = policy.tokenizer.apply_chat_template(dummy, tokenize=False, add_generation_prompt=True)
    opening = "<think>" if prompt.rstrip().endswith("<think>") else ""
    return [opening + text for text in policy.tokenizer.batch_decode(ids, skip_special_tokens=True)]
