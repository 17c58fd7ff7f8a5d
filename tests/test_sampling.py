"""Sampling: the right distribution, the right log-probabilities, nothing inherited from a checkpoint."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from scipy.stats import chisquare

from common.model.decoder import Blocks, SlotDecoder
from common.model.layers import low_rank
from common.model.load import LORA_TARGETS
from common.model.sampling import BLOCK, decode, draw_tokens, find, sample, uniform_numbers
from common.model.scoring import Scorer, forward_prompts
from tests.small_models import FAMILIES, small_policy, small_prompts

GROUP, TOKENS = 3, 12
RANK = {"r": 4, "lora_alpha": 8}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate(family):
    policy = small_policy(family)
    prompts, _, _ = small_prompts(policy)
    ours = sample(policy, prompts, 1, TOKENS, None, temperature=0)
    for n in range(len(prompts)):
        one = prompts.select([n])
        theirs = policy.model.generate(
            input_ids=one.input_ids,
            attention_mask=one.attention_mask.long(),
            pixel_values=one.pixel_values,
            image_grid_thw=one.image_grid_thw,
            mm_token_type_ids=(one.input_ids == policy.base.config.image_token_id).int(),
            do_sample=False,
            max_new_tokens=TOKENS,
            suppress_tokens=policy.banned.nonzero()[:, 0].tolist(),
        )[0, one.input_ids.shape[1] :]
        assert ours.completion_ids[n][ours.completion_mask[n]].tolist() == theirs.tolist()


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.6}, {"top_p": 0.8}, {"top_k": 5}])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_logprobs_equal_teacher_forced_ones(family, settings):
    policy = small_policy(family)
    prompts, _, _ = small_prompts(policy)
    rollout = sample(policy, prompts, GROUP, TOKENS, uniform_numbers(0, 0, range(9), TOKENS), **settings)
    scores = Scorer(policy)(prompts, rollout.completion_ids, rollout.completion_mask, settings.get("temperature", 1.0))
    torch.testing.assert_close(rollout.logprobs, scores.logprobs.detach(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "adapter, folded",
    [
        (LoraConfig(target_modules=LORA_TARGETS, **RANK), True),
        (LoraConfig(target_modules=["q_proj", "v_proj", "up_proj"], use_rslora=True, **RANK), True),
        (LoraConfig(target_modules=LORA_TARGETS, use_dora=True, **RANK), False),
        (LoraConfig(target_modules=LORA_TARGETS, lora_bias=True, **RANK), False),
        (AdaLoraConfig(target_modules=LORA_TARGETS, init_r=4, total_step=9), False),
    ],
)
def test_adapters_are_part_of_the_sampling_policy(adapter, folded):
    """Few operations for an adapter of two matrices; peft's own for what does more."""
    policy = small_policy()
    plain = sample_small(policy)
    policy = replace(policy, model=get_peft_model(policy.base, adapter))
    draw_adapters(policy)
    rollout = sample_small(policy)
    assert_scored_as_sampled(policy, rollout)
    assert (rollout.logprobs[:, 0] - plain.logprobs[:, 0]).abs().max() > 0.01
    assert (low_rank(policy.base.model.language_model.layers[0].self_attn.q_proj) is not None) == folded
    with policy.model.disable_adapter():
        assert torch.equal(sample_small(policy).completion_ids, plain.completion_ids)


def test_merged_and_several_adapters_are_left_to_peft():
    policy = small_policy()
    policy = replace(policy, model=get_peft_model(policy.base, LoraConfig(target_modules=LORA_TARGETS, **RANK)))
    draw_adapters(policy)
    policy.model.merge_adapter()
    assert_scored_as_sampled(policy, sample_small(policy))
    policy.model.unmerge_adapter()
    policy.model.add_adapter("second", LoraConfig(target_modules=LORA_TARGETS, **RANK))
    draw_adapters(policy)
    policy.model.base_model.set_adapter(["default", "second"])
    assert_scored_as_sampled(policy, sample_small(policy))


def draw_adapters(policy):
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name or "lora_E" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))


def assert_scored_as_sampled(policy, rollout):
    prompts, _, _ = small_prompts(policy)
    scores = Scorer(policy)(prompts, rollout.completion_ids, rollout.completion_mask)
    torch.testing.assert_close(rollout.logprobs, scores.logprobs.detach(), atol=1e-4, rtol=0)


def sample_small(policy):
    prompts, _, _ = small_prompts(policy)
    return sample(policy, prompts, GROUP, TOKENS, uniform_numbers(0, 0, range(9), TOKENS))


def test_token_frequencies_match_the_models_probabilities():
    logits = torch.tensor([1.5, 0.0, -1.0, 0.7, -3.0, 2.0])
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = logits.expand(len(uniforms), -1)
    for settings, probabilities in [
        ((1.0, 1.0, 0), logits.softmax(-1)),
        ((0.5, 1.0, 0), (logits / 0.5).softmax(-1)),
        ((1.0, 1.0, 2), torch.tensor([1.5, -torch.inf, -torch.inf, -torch.inf, -torch.inf, 2.0]).softmax(-1)),
        # 2.0 and 1.5 hold 0.75 of the mass, so a third token is needed for 0.8 and no fourth.
        ((1.0, 0.8, 0), torch.tensor([1.5, -torch.inf, -torch.inf, 0.7, -torch.inf, 2.0]).softmax(-1)),
    ]:
        tokens, logprobs = draw_tokens(rows, uniforms, *settings)
        counts = torch.bincount(tokens, minlength=6)
        possible = probabilities > 0
        assert counts[~possible].sum() == 0
        expected = probabilities[possible].double()
        expected *= len(uniforms) / expected.sum()
        assert chisquare(counts[possible].numpy(), expected.numpy()).pvalue > 1e-3
        torch.testing.assert_close(logprobs[:50], (logits / settings[0]).log_softmax(-1)[tokens[:50]])


@pytest.mark.parametrize("vocabulary", [48 * BLOCK, 6000])
def test_of_a_large_vocabulary_the_same_token_is_drawn_through_blocks(vocabulary):
    generator = torch.Generator().manual_seed(0)
    weights = (torch.randn(200, vocabulary, generator=generator) * 4).softmax(-1)
    weights = weights.where(weights > 1e-4, 0)  # whole blocks have no weight
    uniforms = torch.rand(200, generator=generator, dtype=torch.float64)
    uniforms[:4] = torch.tensor([0, 1 - 2**-53, 0.5, 1e-300], dtype=torch.float64)
    tokens = find(weights, uniforms)
    assert (weights.gather(-1, tokens[:, None]) > 0).all()
    sums = weights.double().cumsum(-1)
    wanted = uniforms.clamp(max=1 - 2**-52)[:, None] * sums[:, -1:]
    assert torch.equal(tokens, torch.searchsorted(sums, wanted, right=True)[:, 0])

    # Drawn often enough, frequencies are the weights.
    row, many = weights[:1], torch.rand(50_000, generator=generator, dtype=torch.float64)
    counts = torch.bincount(find(row.expand(len(many), -1), many), minlength=vocabulary)
    likely, shares = row[0] > 1e-3, row[0].double() / row[0].double().sum()
    observed = torch.cat([counts[likely], counts[~likely].sum()[None]])
    expected = torch.cat([shares[likely], shares[~likely].sum()[None]]) * len(many)
    assert chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("vocabulary", [1000, 6000])
def test_a_tail_of_small_weights_has_its_share(vocabulary):
    """Each is below the rounding of a float32 sum of 1."""
    small, words = 2.0**-25, torch.arange(1, vocabulary)
    weights = torch.full((vocabulary,), small)
    weights[0] = 1.0
    middles = (1 + (words.double() - 0.5) * small) / (1 + (vocabulary - 1) * small)
    assert torch.equal(find(weights.expand(len(words), -1), middles), words)


def test_sampled_completions_follow_the_models_own_probabilities():
    policy = small_policy()
    prompts, _, _ = small_prompts(policy)
    one, rows = prompts.select([0]), 4000
    rollout = sample(policy, one, rows, 1, uniform_numbers(1, 0, range(rows), 1))
    counts = torch.bincount(rollout.completion_ids[:, 0], minlength=272)
    every = torch.arange(272)[:, None]
    probabilities = Scorer(policy)(one, every, torch.ones_like(every, dtype=torch.bool)).logprobs.exp()[:, 0].detach()
    frequent = probabilities * rows >= 5
    observed = torch.cat([counts[frequent], counts[~frequent].sum()[None]])
    expected = torch.cat([probabilities[frequent], probabilities[~frequent].sum()[None]]).double()
    assert chisquare(observed.numpy(), (expected / expected.sum() * rows).numpy()).pvalue > 1e-3


def test_the_extreme_numbers_draw_possible_tokens():
    logits = torch.tensor([[-torch.inf, 0.0, -100.0, 0.0, -torch.inf, -1e30]])
    for u in (0.0, 1 - 2**-53):
        token, _ = draw_tokens(logits, torch.tensor([u], dtype=torch.float64), 1.0, 1.0, 0)
        assert token.item() in (1, 3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_predictions_that_are_not_numbers_end_the_run_with_one_line(temperature):
    policy = small_policy()
    policy.base.model.language_model.norm.weight.data[0] = torch.nan
    prompts, *_ = small_prompts(policy)
    with pytest.raises(SystemExit, match="predictions are not numbers; its weights are damaged or have diverged"):
        sample(policy, prompts, 2, 4, uniform_numbers(0, 0, range(6), 4), temperature=temperature)
    for vocabulary in (500, 2000):
        assert (find(torch.full((3, vocabulary), torch.nan), torch.rand(3).double()) < vocabulary).all()


def test_vision_tokens_cannot_be_sampled():
    policy = small_policy()
    prompts, _, _ = small_prompts(policy)
    head = policy.base.get_output_embeddings()
    with torch.no_grad():  # a head that wants nothing but vision tokens
        head.weight[policy.banned] *= 100
    rollout = sample(policy, prompts, 20, 8, uniform_numbers(0, 0, range(60), 8))
    assert not policy.banned[rollout.completion_ids[rollout.completion_mask]].any()
    assert rollout.logprobs.isfinite().all()
    assert policy.banned.nonzero()[:, 0].tolist() == [259, 260, 261, 262, 263, *range(264, 272)]


def test_a_row_is_the_same_whoever_stands_beside_it():
    policy = small_policy()
    prompts, _, _ = small_prompts(policy)
    uniforms = uniform_numbers(3, 7, range(9), TOKENS)
    together = sample(policy, prompts, GROUP, TOKENS, uniforms)
    for n in range(3):
        rows = slice(n * GROUP, (n + 1) * GROUP)
        alone = sample(policy, prompts.select([n]), GROUP, TOKENS, uniform_numbers(3, 7, range(9)[rows], TOKENS))
        assert decode(policy, alone) == decode(policy, together)[rows]


def test_rows_that_end_are_dropped_without_disturbing_the_others(monkeypatch):
    policy = small_policy()
    policy.end_token_ids = list(range(60))  # about a fifth of the tokens end a completion
    prompts, _, _ = small_prompts(policy)
    uniforms = uniform_numbers(0, 0, range(3 * 16), 30)
    dropping = sample(policy, prompts, 16, 30, uniforms)
    monkeypatch.setattr("common.model.sampling.DROP_BELOW", 0.0)
    whole = sample(policy, prompts, 16, 30, uniforms)
    assert torch.equal(dropping.completion_ids, whole.completion_ids)
    assert torch.equal(dropping.completion_mask, whole.completion_mask)
    torch.testing.assert_close(dropping.logprobs, whole.logprobs, atol=1e-5, rtol=0)
    assert len(set(dropping.completion_mask.sum(1).tolist())) > 5

    ids, mask, lengths = dropping.completion_ids, dropping.completion_mask, dropping.completion_mask.sum(1)
    last = ids[torch.arange(len(ids)), lengths - 1]
    assert (last[dropping.ended] < 60).all(), "the end token belongs to the completion"
    ends = (ids < 60) & mask
    assert (ends.sum(1) == dropping.ended).all(), "and nothing follows it"
    assert (lengths[~dropping.ended] == 30).all()


def of_many_lengths(family: str = "qwen3_vl"):
    """A policy whose completions end anywhere within 30 tokens, prompts, and numbers for 16 completions each."""
    policy = small_policy(family)
    policy.end_token_ids = list(range(20))
    prompts, _, _ = small_prompts(policy)
    return policy, prompts, uniform_numbers(0, 0, range(3 * 16), 30)


@pytest.mark.parametrize("block_tokens", [4, 128])
@pytest.mark.parametrize("family", FAMILIES)
def test_completions_do_not_depend_on_the_number_of_slots(family, block_tokens, monkeypatch):
    monkeypatch.setattr("common.model.decoder.BLOCK_TOKENS", block_tokens)
    policy, prompts, uniforms = of_many_lengths(family)
    together = sample(policy, prompts, 16, 30, uniforms)
    assert len(set(together.completion_mask.sum(1).tolist())) > 5 and not together.ended.all()
    for slots in (1, 5, 16, 47, 48, 100):
        rollout = sample(policy, prompts, 16, 30, uniforms, slots=slots)
        assert torch.equal(rollout.completion_ids, together.completion_ids)
        assert torch.equal(rollout.completion_mask, together.completion_mask)
        assert torch.equal(rollout.ended, together.ended)
        torch.testing.assert_close(rollout.logprobs, together.logprobs, atol=1e-5, rtol=0)
    again = sample(policy, prompts, 16, 30, uniforms, slots=5)
    first = sample(policy, prompts, 16, 30, uniforms, slots=5)
    assert torch.equal(again.logprobs, first.logprobs), "with one number of slots to the bit"


@pytest.mark.parametrize("max_new_tokens", [1, 3, 6])
def test_slots_are_refilled_where_every_row_reaches_the_limit(max_new_tokens):
    policy, prompts, uniforms = of_many_lengths()
    policy.end_token_ids = [-1]
    together = sample(policy, prompts, 4, max_new_tokens, uniforms)
    rollout = sample(policy, prompts, 4, max_new_tokens, uniforms, slots=3)
    assert torch.equal(rollout.completion_ids, together.completion_ids) and rollout.completion_mask.all()
    assert not rollout.ended.any()


def test_in_bfloat16_slots_sample_what_scoring_scores(monkeypatch):
    """What CUDA does, on the CPU, scores in float32 included."""
    monkeypatch.setattr("common.model.decoder.products", lambda a, b: a.float() @ b.float())
    monkeypatch.setattr("common.model.decoder.BLOCK_TOKENS", 4)
    policy, prompts, uniforms = of_many_lengths()
    monkeypatch.setattr(type(policy), "autocast", lambda self: torch.autocast("cpu", dtype=torch.bfloat16))
    gaps = []
    for slots in (0, 5):
        rollout = sample(policy, prompts, 16, 30, uniforms, slots=slots)
        scores = Scorer(policy)(prompts, rollout.completion_ids, rollout.completion_mask)
        gaps.append((scores.logprobs - rollout.logprobs)[rollout.completion_mask].abs().mean().item())
    assert gaps[1] < 1.2 * gaps[0], "blocks round no worse than all rows together"


def test_prompts_are_forwarded_once_with_their_first_row(monkeypatch):
    policy, prompts, uniforms = of_many_lengths()
    forwarded = []

    def watched(model, some):
        forwarded.append(len(some))
        return forward_prompts(model, some)

    monkeypatch.setattr("common.model.sampling.forward_prompts", watched)
    sample(policy, prompts, 16, 30, uniforms, slots=16)
    assert forwarded == [1, 1, 1]
    forwarded.clear()
    many = prompts.select([0, 1, 2] * 8)
    sample(policy, many, 2, 30, uniforms, slots=16)
    assert sum(forwarded) == 24 and forwarded[0] == 8, forwarded
    assert max(forwarded) > 1, "in batches, since a few slots are waited for"


class StaticGraphs(SlotDecoder):
    """Steps as a CUDA graph replays them: on the tensors that were there when it was recorded."""

    recordings = 0

    def record(self, tokens, span):
        self.tokens, self.span = tokens.clone(), span
        names = ["row_of_seat", "seat_of_row", "block_of_row", "row_of_block", "start_of_block", "place_of_block"]
        recorded = {name: getattr(self, name) for name in [*names, "at", "positions", "prompt_bias"]}
        lists = {name: list(getattr(self, name)) for name in ("caches", "prompts")}

        def replay():
            assert all(getattr(self, name) is there for name, there in recorded.items())
            for name, there in lists.items():
                assert all(one is other for one, other in zip(getattr(self, name), there, strict=True))
            self.hidden = self.forward(self.tokens, span)
            again = self.forward(self.tokens, span)
            assert torch.equal(self.hidden, again), "recording a step and replaying it is no second step"

        self.graph = SimpleNamespace(replay=replay)
        StaticGraphs.recordings += 1


def test_a_recorded_step_goes_on_when_rows_end_and_others_come(monkeypatch):
    policy, prompts, _ = of_many_lengths()
    many, rows = prompts.select([0, 1, 2] * 12), 36 * 4
    uniforms = uniform_numbers(0, 0, range(rows), 30)
    plain = sample(policy, many, 4, 30, uniforms, slots=12)
    monkeypatch.setattr("common.model.decoder.can_record", lambda device: True)
    monkeypatch.setattr("common.model.decoder.Decoder.may_record", True)
    monkeypatch.setattr("common.model.sampling.SlotDecoder", StaticGraphs)
    monkeypatch.setattr(StaticGraphs, "recordings", 0)
    recorded = sample(policy, many, 4, 30, uniforms, slots=12)
    assert torch.equal(plain.completion_ids, recorded.completion_ids)
    torch.testing.assert_close(plain.logprobs, recorded.logprobs, atol=1e-5, rtol=0)
    assert 1 <= StaticGraphs.recordings < 10, "once, where room for prompts grew, and where slots were left empty"


def test_blocks_belong_to_one_row_each_and_are_used_again():
    blocks, limit = Blocks(rows=5, limit=1000), 1000
    tokens, generator = np.ones(5, dtype=np.int64), np.random.default_rng(0)
    for _ in range(400):
        tokens += 20
        for row in np.flatnonzero((tokens > limit) | (generator.random(5) < 0.05)).tolist():
            blocks.release([row])
            tokens[row] = 1
        blocks.extend(tokens)
        assert (blocks.held == -(-tokens // 128)).all()
        used = blocks.table[blocks.table > 0].tolist()
        assert sorted(used + blocks.free) == list(range(1, blocks.count)), "each block has one owner, or none"
        tables = blocks.tables()
        for row in range(5):
            for number, block in enumerate(blocks.table[row, : blocks.held[row]]):
                assert tables["row_of_block"][block] == row and tables["start_of_block"][block] == 128 * number
                assert tables["block_of_row"].flatten()[tables["place_of_block"][block]] == block
        assert (tables["start_of_block"][[0, *blocks.free]] > limit).all()
    assert blocks.count <= 1 + 5 * 8, "never more than all rows at their limit need"
    kept = blocks.keep([1, 3])
    assert kept[0] == 0 and len(kept) == 1 + blocks.held.sum() == blocks.count and not blocks.free


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_cuda_graph_records_computes_the_same(family, monkeypatch):
    policy = small_policy(family)
    policy.end_token_ids = list(range(40))  # rows end and are dropped, so that prompts keep unequal numbers of them
    prompts, _, _ = small_prompts(policy)
    uniforms = uniform_numbers(0, 0, range(3 * 8), 20)
    plain = sample(policy, prompts, 8, 20, uniforms)

    def recorded_step(self, tokens):
        hidden = self.forward(tokens, span=20)  # the whole cache, whatever is filled, as a graph reads it
        assert torch.equal(hidden, self.forward(tokens, span=20)), "recording a step and replaying it is no second step"
        self.length, self.at, self.positions = self.length + 1, self.at + 1, self.positions + 1
        return hidden

    monkeypatch.setattr("common.model.decoder.Decoder.step", recorded_step)
    recorded = sample(policy, prompts, 8, 20, uniforms)
    assert torch.equal(plain.completion_ids, recorded.completion_ids)
    torch.testing.assert_close(plain.logprobs, recorded.logprobs, atol=1e-5, rtol=0)


class FakeGraphs:
    """What `Decoder.record` takes of `torch.cuda`. A recording fails at its end and, as torch's own does then, leaves
    the thread on the stream that it recorded."""

    def __init__(self, monkeypatch):
        self.stream, self.recordings = "usual", 0
        monkeypatch.setattr("common.model.decoder.can_record", lambda device: True)
        monkeypatch.setattr("common.model.decoder.Decoder.may_record", True)
        monkeypatch.setattr("torch.cuda.CUDAGraph", lambda: None)
        monkeypatch.setattr("torch.cuda.graph", self.recording)
        monkeypatch.setattr("torch.cuda.current_stream", lambda: self.stream)
        monkeypatch.setattr("torch.cuda.set_stream", lambda stream: setattr(self, "stream", stream))

    @contextmanager
    def recording(self, graph, capture_error_mode):
        self.recordings += 1
        self.stream = "recorded"
        yield
        raise RuntimeError("operation not permitted\nwhen stream is capturing")


def test_where_a_graph_cannot_be_recorded_sampling_goes_on_and_says_so_once(monkeypatch):
    policy = small_policy()
    prompts, _, _ = small_prompts(policy)
    uniforms = uniform_numbers(0, 0, range(9), TOKENS)
    plain = sample(policy, prompts, GROUP, TOKENS, uniforms)
    fake = FakeGraphs(monkeypatch)
    with pytest.warns(
        UserWarning, match="without CUDA graphs: operation not permitted when stream is capturing"
    ) as told:
        for _ in range(2):
            unrecorded = sample(policy, prompts, GROUP, TOKENS, uniforms)
            assert torch.equal(plain.completion_ids, unrecorded.completion_ids)
    assert len(told) == fake.recordings == 1, "what failed is not tried again"
    assert fake.stream == "usual"


def test_nothing_is_inherited_from_the_checkpoints_generation_settings():
    policy = small_policy()
    prompts, _, _ = small_prompts(policy)
    uniforms = uniform_numbers(0, 0, range(9), TOKENS)
    plain = sample(policy, prompts, GROUP, TOKENS, uniforms)
    settings = policy.model.generation_config
    settings.do_sample, settings.temperature, settings.top_k, settings.repetition_penalty = True, 0.1, 1, 1.5
    assert torch.equal(plain.completion_ids, sample(policy, prompts, GROUP, TOKENS, uniforms).completion_ids)


def test_a_prompt_that_opens_the_reasoning_lends_its_marker_to_the_completion(monkeypatch):
    policy = small_policy()
    prompts, _, _ = small_prompts(policy)
    rollout = sample(policy, prompts, 1, TOKENS, None, temperature=0)
    plain = decode(policy, rollout)
    thinking = policy.tokenizer.chat_template.replace("assistant\n", "assistant\n<think>\n")
    monkeypatch.setattr(policy.tokenizer, "chat_template", thinking)
    assert decode(policy, rollout) == ["<think>" + text for text in plain]
