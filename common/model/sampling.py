"""Sampling G completions per prompt.

Each prompt is forwarded once, images included, and its keys and values serve all its G rows. All rows are decoded
together; rows that have ended are dropped as the batch shrinks. Nothing of a checkpoint's own generation settings is
used: temperature, top-p and top-k are arguments, and every end token of the model ends a row.

The draws are a pure function of uniform numbers given per row and token, so a row samples the same completion whichever
rows stand beside it, in one process or several, in a first run or a resumed one.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.model.layers import fused, normalize, precision, rms_norm, rotary_tables
from common.model.load import Policy, Prompts
from common.model.scoring import Prefix, forward_prompts

# Ended rows are looked for every so many tokens, which costs a wait for the device, and are dropped when no more than
# this share of the rows goes on, which costs a copy of the cache and, where steps are recorded, another recording.
DROP_EVERY = 4
DROP_BELOW, DROP_RECORDED_BELOW = 0.75, 0.5
BLOCK = 128  # words of a large vocabulary whose probabilities are summed first; the families' sizes are multiples
GRAPH_TOKENS = 128  # a CUDA graph reads so many places of the cache more than the one before


@dataclass
class Rollout:
    """R = N * G completions of at most T tokens; rows of a prompt stand together."""

    completion_ids: torch.Tensor  # [R, T] int64, right-padded
    completion_mask: torch.Tensor  # [R, T] bool, true up to and including the end token
    old_logprobs: torch.Tensor  # [R, T] float32, of the sampling policy at the sampling temperature, 0 on padding
    ended: torch.Tensor  # [R] bool, false where the length limit cut the completion

    def __len__(self) -> int:
        return len(self.completion_ids)


def uniform_numbers(seed: int, step: int, rows: Sequence[int | tuple[int, int]], length: int) -> torch.Tensor:
    """Numbers [R, T] float64 in [0, 1): a pure function of seed, step and each row's place in the whole step.

    What else a method draws for a prompt of a step has a number above 0 behind the prompt's place, as (place, 1): 0
    there, or none, would be a row's stream again.
    """
    streams = [[seed, step, *(row if isinstance(row, tuple) else (row,))] for row in rows]
    return torch.from_numpy(np.stack([np.random.default_rng(stream).random(length) for stream in streams]))


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
        head = head.to(precision(head))  # [V, H]
        bias = torch.zeros(len(head), dtype=head.dtype, device=device).masked_fill(policy.banned, -1e30)  # [V]
        del prefix  # all that is still needed of it has been copied
        torch.clear_autocast_cache()  # a copy of the weights, which the decoder has in its own arrangement
        for t in range(max_new_tokens):
            logits = torch.nn.functional.linear(hidden, head, bias)  # [A, V]
            draw = None if uniforms is None else uniforms[active, t]  # [A]
            tokens, token_logprobs = draw_tokens(logits, draw, temperature, top_p, top_k)
            ids[active, t] = tokens
            logprobs[active, t] = token_logprobs
            if t + 1 == max_new_tokens:
                break
            if t % DROP_EVERY == DROP_EVERY - 1:
                keep = (~torch.isin(ids[active, : t + 1], ends).any(1)).nonzero()[:, 0]
                if len(keep) == 0:
                    break
                if len(keep) <= (DROP_RECORDED_BELOW if decoder.recording else DROP_BELOW) * len(active):
                    active, tokens = active[keep], tokens[keep]
                    decoder.keep(keep)
            hidden = decoder.step(tokens)
    model.train(was_training)

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


class Decoder:
    """The language model, laid out for one token a row at a time behind forwarded prompts.

    `layers.decoder_layer` with the model's weights in fewer and larger operations, for with one token a row the
    operations' number costs as much as their arithmetic: queries, keys and values come from one matrix product, gate
    and up from another; the norms' weights and the scale of the scores are multiplied into the rotary factors.

    The keys and values of a prompt are taken out of the prefix, kept once and read once for all its rows, whose queries
    stand side by side; a row has only those of its own tokens. On CUDA a step is recorded once as a graph and replayed,
    with no Python between its kernels, for as long as the shapes stay: for `GRAPH_TOKENS` tokens, or until rows are
    dropped.
    """

    may_record = True  # until a recording fails: then no decoder of this process tries again

    def __init__(self, model: torch.nn.Module, prefix: Prefix, group_size: int, max_new_tokens: int):
        self.text = model.model.language_model
        attentions, mlps = zip(*((layer.self_attn, layer.mlp) for layer in self.text.layers), strict=True)
        self.qkv = [fused(a.q_proj, a.k_proj, a.v_proj) for a in attentions]
        self.out = [fused(a.o_proj) for a in attentions]
        self.gate_up = [fused(m.gate_proj, m.up_proj, features_first=True) for m in mlps]
        self.down = [fused(m.down_proj) for m in mlps]
        # Heads stand in front of rows, so that a prompt's rows lie side by side and are a matrix without a copy.
        prompts, heads, _, size = prefix.values[0].shape
        dtype = prefix.values[0].dtype
        self.prompts = []
        while prefix.keys:  # out of the prefix, a layer at a time, so that they are not held twice
            pair = torch.stack([prefix.keys.pop(0), prefix.values.pop(0)])
            self.prompts.append(pair.transpose(1, 2).contiguous())
        shape = (2, heads, prompts * group_size, max_new_tokens, size)
        # A layer: keys and values, [2, key heads, N, P, D] above and [2, key heads, A, T, D] here, zeros at first, for
        # what is not written yet has weight 0, and 0 times it must be 0.
        self.caches = [torch.zeros(shape, dtype=dtype, device=prefix.states.device) for _ in self.prompts]
        self.prompt_bias = None
        if not bool(prefix.attention_mask.all()):
            bias = torch.zeros(prefix.attention_mask.shape, device=prefix.attention_mask.device)
            self.prompt_bias = bias.masked_fill(~prefix.attention_mask, -torch.inf)[:, None]  # [N, 1, P]
        self.prompt_of_row = torch.arange(prompts, device=prefix.states.device).repeat_interleave(group_size)  # [A]
        self.row_of_slot = self.slot_of_row = None  # each prompt has as many rows, in order
        self.slots = group_size
        self.positions = prefix.next_positions.repeat_interleave(group_size)  # [A] of the next token
        self.length = 0  # tokens fed
        self.at = torch.zeros(1, dtype=torch.int64, device=prefix.states.device)  # the same, where a graph reads it
        every = torch.arange(int(self.positions.max()) + max_new_tokens, device=self.positions.device)
        self.rotary = [table[0] for table in rotary_tables(self.text, every.expand(3, 1, -1))]  # cos, sin: [S, D]
        self.weights = torch.stack([head_weights(a) for a in attentions])  # [layers, query and key heads, D]
        # Rotating rolls the heads by half, and their weights with them.
        self.rolled_weights = self.weights.roll(size // 2, -1)
        self.graph, self.recording = None, Decoder.may_record and can_record(prefix.states.device)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feed one token a row [A]; returns the hidden states [A, H] that predict the next, good until it is fed."""
        span = min((self.length // GRAPH_TOKENS + 1) * GRAPH_TOKENS, self.caches[0].shape[3])
        if self.recording and (self.graph is None or span != self.span):
            try:
                self.record(tokens, span)
            except RuntimeError as error:  # slower, but the same
                self.recording, self.graph, Decoder.may_record = False, None, False
                warnings.warn(
                    f"sampling goes on without CUDA graphs: {' '.join(str(error).split())[:200]}", stacklevel=2
                )
        if self.recording:
            self.tokens.copy_(tokens)
            self.graph.replay()
            hidden = self.hidden
        else:
            hidden = self.forward(tokens, self.length + 1)
        self.length += 1
        self.at += 1
        self.positions += 1
        return hidden

    def record(self, tokens: torch.Tensor, span: int) -> None:
        """Record `forward` as a CUDA graph over the first `span` places of the cache."""
        self.graph, self.span, self.tokens = None, span, tokens.clone()
        self.forward(self.tokens, span)  # loads kernels; running it again writes the same at the same place
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # thread_local: the thread that prepares the next images may go on meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.hidden = self.forward(self.tokens, span)
        finally:
            torch.cuda.set_stream(stream)  # a recording that fails leaves the thread on its own stream
        self.graph = graph

    def forward(self, tokens: torch.Tensor, span: int) -> torch.Tensor:
        """Hidden states of tokens [A], which look at the first `span` places of the cache, as far as those are filled.

        Nothing in it depends on what the host knows of the step but `span`, and it changes nothing but the place `at`
        of the caches, so that it can be recorded, and run twice.
        """
        hidden = self.text.embed_tokens(tokens)  # [A, H]
        cos, sin = (table.index_select(0, self.positions)[:, None, None] for table in self.rotary)
        cosines, sines = cos * self.weights, sin * self.rolled_weights  # [A, layers, query and key heads, D]
        future = None
        if span > self.length + 1 or self.recording:
            places = torch.arange(span, device=tokens.device)
            future = torch.zeros(span, device=tokens.device).masked_fill(places > self.at, -torch.inf)  # [span]
        for number, (layer, cache) in enumerate(zip(self.text.layers, self.caches, strict=True)):
            heads = self.qkv[number](rms_norm(hidden, layer.input_layernorm))
            heads = heads.unflatten(-1, (-1, layer.self_attn.head_dim))  # [A, query, key and value heads, D]
            rotated = heads[:, : cosines.shape[2]]
            if hasattr(layer.self_attn, "q_norm"):  # Qwen3
                eps = layer.self_attn.q_norm.variance_epsilon
                rotated = normalize(rotated, eps)
            rolled = rotated.roll(rotated.shape[-1] // 2, -1)
            # `out`: to the caches' precision and into place at once
            turned = heads[:, : cosines.shape[2]]
            torch.addcmul(rotated * cosines[:, number], rolled, sines[:, number], out=turned)
            stored = cache.flatten(0, 1)  # [key and value heads, A, T, D]
            q, new = heads.split([heads.shape[1] - len(stored), len(stored)], dim=1)
            stored.index_copy_(2, self.at, new.transpose(0, 1)[:, :, None])
            gathered = self.attend(q, *self.prompts[number], *cache[:, :, :, :span], future)
            hidden = hidden + self.out[number](gathered)
            gate, up = self.gate_up[number](rms_norm(hidden, layer.post_attention_layernorm)).chunk(2, dim=-1)
            hidden = hidden + self.down[number](layer.mlp.act_fn(gate) * up)
        return rms_norm(hidden, self.text.norm)

    def attend(self, q, prompt_keys, prompt_values, keys, values, future) -> torch.Tensor:
        """What queries [A, query heads, D] gather [A, query heads * D] from their prompts' keys and values
        [key heads, N, P, D] and from their own [key heads, A, span, D]."""
        q = q.unflatten(1, (len(keys), -1)).transpose(0, 1).contiguous()  # [key heads, A, queries, D]
        theirs = products(self.by_prompt(q), prompt_keys.mT)  # [key heads, N, slots * queries, P]
        theirs = theirs if self.prompt_bias is None else theirs + self.prompt_bias
        own = products(q, keys.mT)  # [key heads, A, queries, span]
        own = own if future is None else own + future
        weights = torch.cat([self.by_row(theirs), own], dim=-1).softmax(-1).to(values.dtype)
        theirs, own = weights.split([prompt_keys.shape[2], keys.shape[2]], dim=-1)
        gathered = self.by_row(self.by_prompt(theirs) @ prompt_values)  # [key heads, A, queries, D]
        gathered.view(-1, *gathered.shape[2:]).baddbmm_(own.flatten(0, 1), values.flatten(0, 1))
        return gathered.transpose(0, 1).flatten(1)

    def by_prompt(self, x: torch.Tensor) -> torch.Tensor:
        """[heads, A, queries, X], a row each, as [heads, N, slots * queries, X], a prompt each."""
        x = x if self.row_of_slot is None else x.index_select(1, self.row_of_slot)
        return x.unflatten(1, (-1, self.slots)).flatten(2, 3)

    def by_row(self, x: torch.Tensor) -> torch.Tensor:
        """The way back."""
        x = x.unflatten(2, (self.slots, -1)).flatten(1, 2)
        return x if self.slot_of_row is None else x.index_select(1, self.slot_of_row)

    def keep(self, rows: torch.Tensor) -> None:
        """Keep only `rows` [A'], ascending, of the rows in flight, and of the prompts those that have one."""
        self.graph = None
        for number in range(len(self.caches)):  # one by one, so that no more than one layer is held twice
            self.caches[number] = self.caches[number][:, :, rows]
        self.positions = self.positions[rows]
        left, self.prompt_of_row = self.prompt_of_row[rows].unique(return_inverse=True)
        if len(left) < self.prompts[0].shape[2]:
            for number in range(len(self.prompts)):
                self.prompts[number] = self.prompts[number][:, :, left]
            self.prompt_bias = None if self.prompt_bias is None else self.prompt_bias[left]
        counts = self.prompt_of_row.bincount()  # [N]
        self.slots = int(counts.max())
        row = torch.arange(len(rows), device=rows.device)
        before = counts.cumsum(0) - counts
        self.slot_of_row = self.prompt_of_row * self.slots + row - before[self.prompt_of_row]  # [A]
        # A slot without a row repeats row 0; nobody reads what comes of it.
        self.row_of_slot = row.new_zeros(len(left) * self.slots).scatter(0, self.slot_of_row, row)


def can_record(device: torch.device) -> bool:
    return device.type == "cuda"


def products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Matrix products [B, heads, X, Y]. On CUDA scores stay in float32, as in the fused kernels that scoring uses."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32).unflatten(0, a.shape[:2])
    return a @ b


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
