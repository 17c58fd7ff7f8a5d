"""The language model laid out for one token a row at a time: all rows together, or a fixed number of slots."""

import warnings

import numpy as np
import torch

from common.model.layers import fused, normalize, rms_norm, rotary_tables
from common.model.scoring import Prefix

GRAPH_TOKENS = 128  # a CUDA graph reads so many places of the cache more than the one before
ALIGNED = 8  # bfloat16 numbers that CUDA's fast matrix products read at once: rows of other widths get slow ones
BLOCK_TOKENS = 128  # places of a block of the cache, where rows share it out


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
        self.read_weights(model)
        # Heads stand in front of rows, so that a prompt's rows lie side by side and are a matrix without a copy.
        prompts, heads, _, size = prefix.values[0].shape
        dtype = prefix.values[0].dtype
        width = prefix.attention_mask.shape[1]
        padding = aligned(width, self.device) - width
        mask = torch.nn.functional.pad(prefix.attention_mask, (padding, 0))  # [N, P]
        self.prompts = []
        while prefix.keys:  # out of the prefix, a layer at a time, so that they are not held twice
            pair = prefix.values[0].new_zeros(2, heads, prompts, padding + width, size)
            pair[0, :, :, padding:] = prefix.keys.pop(0).transpose(0, 1)
            pair[1, :, :, padding:] = prefix.values.pop(0).transpose(0, 1)
            self.prompts.append(pair)
        shape = (2, heads, prompts * group_size, max_new_tokens, size)
        # A layer: keys and values, [2, key heads, N, P, D] above and [2, key heads, A, T, D] here, zeros at first, for
        # what is not written yet has weight 0, and 0 times it must be 0.
        self.caches = [torch.zeros(shape, dtype=dtype, device=prefix.states.device) for _ in self.prompts]
        self.prompt_bias = None
        if not bool(mask.all()):
            self.prompt_bias = padding_bias(mask)  # [N, 1, P]
        self.prompt_of_row = torch.arange(prompts, device=prefix.states.device).repeat_interleave(group_size)  # [A]
        self.row_of_seat = self.seat_of_row = None  # each prompt has as many rows, in order
        self.seats = group_size
        self.positions = prefix.next_positions.repeat_interleave(group_size)  # [A] of the next token
        self.at = torch.zeros(1, dtype=torch.int64, device=prefix.states.device)  # tokens fed, where a graph reads it
        self.make_rotary(int(self.positions.max()) + max_new_tokens)

    def read_weights(self, model: torch.nn.Module) -> None:
        """Arrange the model's weights in fewer and larger matrices."""
        self.text = model.model.language_model
        attentions, mlps = zip(*((layer.self_attn, layer.mlp) for layer in self.text.layers), strict=True)
        self.qkv = [fused(a.q_proj, a.k_proj, a.v_proj) for a in attentions]
        self.out = [fused(a.o_proj) for a in attentions]
        self.gate_up = [fused(m.gate_proj, m.up_proj, features_first=True) for m in mlps]
        self.down = [fused(m.down_proj) for m in mlps]
        self.weights = torch.stack([head_weights(a) for a in attentions])  # [layers, query and key heads, D]
        # Rotating rolls the heads by half, and their weights with them.
        self.rolled_weights = self.weights.roll(self.weights.shape[-1] // 2, -1)
        self.device = self.weights.device
        self.length = 0  # steps so far
        self.graph, self.recording = None, Decoder.may_record and can_record(self.device)

    def make_rotary(self, positions: int) -> None:
        every = torch.arange(positions, device=self.device)
        self.rotary = [table[0] for table in rotary_tables(self.text, every.expand(3, 1, -1))]  # cos, sin: [S, D]

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feed one token a row [A]; returns the hidden states [A, H] that predict the next, good until it is fed."""
        span = self.reach()
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
            hidden = self.forward(tokens, self.reach())
        self.length += 1
        self.at += 1
        self.positions += 1
        return hidden

    def reach(self) -> int:
        """How many places of the cache a step looks at: those that are filled, and as a graph more of them."""
        if not self.recording:
            return self.length + 1
        return min((self.length // GRAPH_TOKENS + 1) * GRAPH_TOKENS, self.caches[0].shape[3])

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
        place, future = self.place_and_future(span)
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
            self.store(stored, place, new.transpose(0, 1))
            gathered = self.attend(q, *self.prompts[number], *cache[:, :, :, :span], future)
            hidden = hidden + self.out[number](gathered)
            gate, up = self.gate_up[number](rms_norm(hidden, layer.post_attention_layernorm)).chunk(2, dim=-1)
            hidden = hidden + self.down[number](layer.mlp.act_fn(gate) * up)
        return rms_norm(hidden, self.text.norm)

    def place_and_future(self, span: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Where the tokens' keys and values go, and a bias [span] of -inf on places that are not filled yet."""
        if span == self.length + 1 and not self.recording:
            return self.at, None
        places = torch.arange(span, device=self.device)
        return self.at, torch.zeros(span, device=self.device).masked_fill(places > self.at, -torch.inf)

    def store(self, cache: torch.Tensor, place: torch.Tensor, new: torch.Tensor) -> None:
        """Put new keys and values [heads, A, D] into the cache [heads, A, T, D]."""
        cache.index_copy_(2, place, new[:, :, None])

    def attend(self, q, prompt_keys, prompt_values, keys, values, future) -> torch.Tensor:
        """What queries [A, query heads, D] gather [A, query heads * D] from their prompts' keys and values
        [key heads, N, P, D] and from their own [key heads, A, span, D]."""
        q = q.unflatten(1, (len(keys), -1)).transpose(0, 1).contiguous()  # [key heads, A, queries, D]
        theirs = products(self.by_prompt(q), prompt_keys.mT)  # [key heads, N, seats * queries, P]
        theirs = theirs if self.prompt_bias is None else theirs + self.prompt_bias
        own = products(q, keys.mT)  # [key heads, A, queries, span]
        own = own if future is None else own + future
        weights = torch.cat([self.by_row(theirs), own], dim=-1).softmax(-1).to(values.dtype)
        theirs, own = weights.split([prompt_keys.shape[2], keys.shape[2]], dim=-1)
        gathered = self.by_row(self.by_prompt(theirs) @ prompt_values)  # [key heads, A, queries, D]
        gathered.view(-1, *gathered.shape[2:]).baddbmm_(own.flatten(0, 1), values.flatten(0, 1))
        return gathered.transpose(0, 1).flatten(1)

    def by_prompt(self, x: torch.Tensor) -> torch.Tensor:
        """[heads, A, queries, X], a row each, as [heads, N, seats * queries, X], a prompt each."""
        x = x if self.row_of_seat is None else x.index_select(1, self.row_of_seat)
        return x.unflatten(1, (-1, self.seats)).flatten(2, 3)

    def by_row(self, x: torch.Tensor) -> torch.Tensor:
        """The way back."""
        x = x.unflatten(2, (self.seats, -1)).flatten(1, 2)
        return x if self.seat_of_row is None else x.index_select(1, self.seat_of_row)

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
        self.seats = int(counts.max())
        row = torch.arange(len(rows), device=rows.device)
        before = counts.cumsum(0) - counts
        self.seat_of_row = self.prompt_of_row * self.seats + row - before[self.prompt_of_row]  # [A]
        # A seat without a row repeats row 0; nobody reads what comes of it.
        self.row_of_seat = row.new_zeros(len(left) * self.seats).scatter(0, self.seat_of_row, row)


class SlotDecoder(Decoder):
    """The same for a fixed number of slots: a row that has ended gives its slot to another (`admit`).

    A row's own keys and values stand in blocks of `BLOCK_TOKENS` places that it gets as it grows and gives back when it
    ends, so that rows that stay short hold little, wherever the limit is. A prompt is held while rows of it are in
    flight. Room for blocks and prompts grows to what was needed at a time and is used again: with it the shapes stay,
    so that a graph that was recorded goes on.

    Here A is the number of slots, E that of the prompts that there is room for, B that of blocks of C places each, and
    M that of the blocks of the longest row so far. Block 0 is nobody's: it fills up the tables of shorter rows.
    """

    def __init__(self, model, slots: int, group_size: int, max_new_tokens: int, prompt_width: int, positions: int):
        self.read_weights(model)
        self.make_rotary(positions)
        self.seats, self.width, self.prompt_bias = group_size, aligned(prompt_width, self.device), None
        self.row_in_slot = np.full(slots, -1)  # of all rows: row r belongs to prompt r // group_size
        self.prompt_in_room = np.full(0, -1)  # [E]
        self.started = np.zeros(slots, dtype=np.int64)  # [A] steps before the row came
        self.blocks = Blocks(slots, max_new_tokens)
        self.at, self.positions = torch.zeros(2, slots, dtype=torch.int64, device=self.device)  # [A] both

    def admit(self, slots: list[int], rows: list[int], prefix: Prefix | None) -> torch.Tensor:
        """Let `rows` of all have `slots`, whose own rows are forgotten; returns the hidden states [len(rows), H] that
        predict their first tokens. `prefix` holds those of their prompts that are not here yet, in order."""
        self.row_in_slot[slots], self.started[slots] = rows, self.length
        self.blocks.release(slots)
        wanted = np.unique(self.row_in_slot // self.seats)
        new = np.setdiff1d(wanted, self.prompt_in_room)
        if len(new):
            self.take(prefix, new, np.flatnonzero(~np.isin(self.prompt_in_room, wanted)))
        rooms = torch.from_numpy(self.seat_all()[slots] // self.seats).to(self.device)
        slots = torch.tensor(slots, device=self.device)
        self.at[slots], self.positions[slots] = 0, self.first_positions[rooms]
        return self.states[rooms]

    def take(self, prefix: Prefix, new: np.ndarray, free: np.ndarray) -> None:
        """Copy forwarded prompts with the numbers `new` to where there is room, or make more."""
        missing = len(new) - len(free)
        if not len(self.prompt_in_room):
            _, heads, _, size = prefix.values[0].shape
            empty = prefix.values[0].new_zeros(2, heads, 0, self.width, size)
            self.prompts = [empty for _ in prefix.values]  # [2, key heads, E, P, D] a layer
            self.caches = [empty.new_zeros(2, heads, self.blocks.count, self.blocks.size, size) for _ in prefix.values]
            self.prompt_bias = torch.zeros(0, 1, self.width, device=self.device)  # [E, 1, P]
            self.states = prefix.states.new_zeros(0, prefix.states.shape[-1])  # [E, H] the last one of each prompt
            self.first_positions = prefix.next_positions[:0]  # [E] of the first token after the prompt
        if missing > 0:
            room, self.graph = len(self.prompt_in_room), None
            more = max(missing, room // 4)
            free = np.append(free, np.arange(room, room + more))
            self.prompt_in_room = np.append(self.prompt_in_room, np.full(more, -1))
            for number in range(len(self.prompts)):
                self.prompts[number] = lengthened(self.prompts[number], 2, more)
            self.prompt_bias = lengthened(self.prompt_bias, 0, more)
            self.states, self.first_positions = (
                lengthened(self.states, 0, more),
                lengthened(self.first_positions, 0, more),
            )
        self.prompt_in_room[free[: len(new)]] = new
        free = torch.from_numpy(free[: len(new)]).to(self.device)
        padding = self.width - prefix.attention_mask.shape[1]
        for prompts in self.prompts:
            pair = torch.stack([prefix.keys.pop(0), prefix.values.pop(0)]).transpose(1, 2)
            prompts[:, :, free, padding:] = pair
        self.prompt_bias[free] = padding_bias(torch.nn.functional.pad(prefix.attention_mask, (padding, 0)))
        self.states[free], self.first_positions[free] = prefix.states[:, -1], prefix.next_positions

    def seat_all(self) -> np.ndarray:
        """Give each row its place among those of its prompt, [A]."""
        room_of_prompt = {int(prompt): room for room, prompt in enumerate(self.prompt_in_room)}
        rooms = np.array([room_of_prompt[int(row) // self.seats] for row in self.row_in_slot])
        seat_of_row = rooms * self.seats + self.row_in_slot % self.seats
        row_of_seat = np.zeros(len(self.prompt_in_room) * self.seats, dtype=np.int64)
        row_of_seat[seat_of_row] = np.arange(len(rooms))
        self.upload(seat_of_row=seat_of_row, row_of_seat=row_of_seat)
        return seat_of_row

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.blocks.extend(self.length - self.started + 1):
            if missing := self.blocks.count - self.caches[0].shape[2]:
                for number in range(len(self.caches)):  # one by one, so that no more than one layer is held twice
                    self.caches[number] = lengthened(self.caches[number], 2, missing)
            self.upload(**self.blocks.tables())
        hidden = super().step(tokens)
        # A row that has ended may go on for a while, unread.
        self.positions.clamp_(max=len(self.rotary[0]) - 1)
        return hidden

    def upload(self, **arrays: np.ndarray) -> None:
        """Put arrays where a graph reads them; one of another shape ends the graph."""
        for name, array in arrays.items():
            there = getattr(self, name, None)
            if there is not None and there.shape == array.shape:
                there.copy_(torch.from_numpy(array))
            else:
                setattr(self, name, torch.from_numpy(array).to(self.device))
                self.graph = None

    def reach(self) -> int:
        return self.blocks.size

    def place_and_future(self, span: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where in all blocks the tokens' keys and values go [A], and a bias [B, 1, C] of -inf on what is empty."""
        number = (self.at // span).clamp(max=self.block_of_row.shape[1] - 1)[:, None]
        place = self.block_of_row.gather(1, number)[:, 0] * span + self.at % span
        filled = self.at[self.row_of_block] - self.start_of_block  # [B] the last place that is filled
        places = torch.arange(span, device=self.device)
        bias = torch.zeros(len(filled), 1, span, device=self.device)
        return place, bias.masked_fill(places > filled[:, None, None], -torch.inf)

    def store(self, cache: torch.Tensor, place: torch.Tensor, new: torch.Tensor) -> None:
        cache.flatten(1, 2).index_copy_(1, place, new)

    def attend(self, q, prompt_keys, prompt_values, keys, values, future) -> torch.Tensor:
        """As above, with a row's own keys and values [key heads, B, C, D] in blocks."""
        q = q.unflatten(1, (len(keys), -1)).transpose(0, 1).contiguous()  # [key heads, A, queries, D]
        theirs = products(self.by_prompt(q), prompt_keys.mT) + self.prompt_bias  # [key heads, E, seats * queries, P]
        own = products(q.index_select(1, self.row_of_block), keys.mT) + future  # [key heads, B, queries, C]
        own = own.index_select(1, self.block_of_row.flatten()).unflatten(1, self.block_of_row.shape)
        own = own.transpose(2, 3).flatten(3)  # [key heads, A, queries, M * C]
        weights = torch.cat([self.by_row(theirs), own], dim=-1).softmax(-1).to(values.dtype)
        theirs, own = weights.split([prompt_keys.shape[2], own.shape[3]], dim=-1)
        gathered = self.by_row(self.by_prompt(theirs) @ prompt_values)  # [key heads, A, queries, D]
        own = own.unflatten(3, (-1, keys.shape[2])).transpose(2, 3).flatten(1, 2)  # [key heads, A * M, queries, C]
        parts = products(own.index_select(1, self.place_of_block), values)  # [key heads, B, queries, D]
        parts = parts.index_select(1, self.block_of_row.flatten()).unflatten(1, self.block_of_row.shape).sum(2)
        return (gathered + parts).to(values.dtype).transpose(0, 1).flatten(1)

    def keep(self, rows: torch.Tensor) -> None:
        """Keep only the slots `rows` [A'], ascending, when no rows wait for the others."""
        slots = rows.tolist()
        self.row_in_slot, self.started = self.row_in_slot[slots], self.started[slots]
        self.at, self.positions = self.at[rows], self.positions[rows]
        blocks = torch.from_numpy(self.blocks.keep(slots)).to(self.device)
        rooms = np.flatnonzero(np.isin(self.prompt_in_room, self.row_in_slot // self.seats))
        self.prompt_in_room, rooms = self.prompt_in_room[rooms], torch.from_numpy(rooms).to(self.device)
        for number in range(len(self.caches)):
            self.caches[number] = self.caches[number][:, :, blocks]
            self.prompts[number] = self.prompts[number][:, :, rooms]
        self.prompt_bias, self.states = self.prompt_bias[rooms], self.states[rooms]
        self.first_positions, self.graph = self.first_positions[rooms], None
        self.seat_all()
        self.upload(**self.blocks.tables())


class Blocks:
    """Whose keys and values stand in which block of a cache: `count` blocks of `size` places, the first of them spare.

    >>> blocks = Blocks(rows=2, limit=300)
    >>> blocks.extend(np.array([1, 129])), blocks.table.tolist(), blocks.count
    (True, [[1, 0], [2, 3]], 4)
    """

    def __init__(self, rows: int, limit: int):
        self.size = min(BLOCK_TOKENS, limit)
        self.most = -(-limit // self.size)  # that a row can have
        self.count = 1 + rows
        self.free = list(range(rows, 0, -1))
        self.table = np.zeros((rows, 1), dtype=np.int64)  # [A, M] block numbers in order, 0 behind a row's last one
        self.held = np.zeros(rows, dtype=np.int64)  # [A] blocks of each row

    def release(self, rows: list[int]) -> None:
        """Take back all blocks of some rows."""
        for row in rows:
            self.free += self.table[row, : self.held[row]].tolist()
        self.table[rows], self.held[rows] = 0, 0

    def extend(self, tokens: np.ndarray) -> bool:
        """Give each row the blocks that so many tokens [A] need; whether any was given."""
        needed = np.minimum(-(-tokens // self.size), self.most)
        short = np.flatnonzero(needed > self.held)
        if missing := max(0, int((needed - self.held)[short].sum()) - len(self.free)):
            more = max(missing, min(len(self.held) // 2, 1 + len(self.held) * self.most - self.count))
            self.free = list(range(self.count + more - 1, self.count - 1, -1)) + self.free
            self.count += more
        if (wider := int(needed.max()) - self.table.shape[1]) > 0:
            self.table = np.pad(self.table, ((0, 0), (0, wider)))
        for row in short:
            while self.held[row] < needed[row]:
                self.table[row, self.held[row]] = self.free.pop()
                self.held[row] += 1
        return len(short) > 0

    def keep(self, rows: list[int]) -> np.ndarray:
        """Forget all but some rows; returns the old numbers of the blocks that are left, in their new order."""
        self.held = self.held[rows]
        self.table = self.table[rows, : self.held.max()]
        old = np.append(0, self.table[self.table > 0])
        self.table[self.table > 0] = np.arange(1, len(old))
        self.count, self.free = len(old), []
        return old

    def tables(self) -> dict[str, np.ndarray]:
        """The blocks of each row [A, M]; of each block [B] its row, the row's token that stands first in it, and its
        place in the first table. What is nobody's begins behind every token."""
        row, number = np.nonzero(self.table)
        row_of_block, place_of_block = np.zeros((2, self.count), dtype=np.int64)
        start_of_block = np.full(self.count, np.iinfo(np.int64).max // 2)
        block = self.table[row, number]
        row_of_block[block], place_of_block[block] = row, row * self.table.shape[1] + number
        start_of_block[block] = number * self.size
        return dict(
            block_of_row=self.table.copy(), row_of_block=row_of_block, start_of_block=start_of_block,
            place_of_block=place_of_block,
        )  # fmt: skip


def aligned(width: int, device: torch.device) -> int:
    """The width of a row of bfloat16 numbers with which it begins where fast kernels can read it."""
    return width if device.type == "cpu" else -(-width // ALIGNED) * ALIGNED


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


def padding_bias(mask: torch.Tensor) -> torch.Tensor:
    """A bias [N, 1, P] of -inf on the padding of prompts, which have a mask [N, P]."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)[:, None]


def lengthened(x: torch.Tensor, dim: int, more: int) -> torch.Tensor:
    """With so many zeros behind it."""
    shape = list(x.shape)
    shape[dim] = more
    return torch.cat([x, x.new_zeros(shape)], dim)
