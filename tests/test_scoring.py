"""Scoring on a shared prompt equals scoring each row as one padded sequence, in values and in gradients."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common.data.examples import load_examples
from common.data.messages import build_messages
from common.model.inputs import encode_prompts
from common.model.layers import RMSNorm, attention, normalize, rms_norm
from common.model.load import load_policy
from common.model.sampling import sample, uniform_numbers
from common.model.scoring import Scorer, distinct_rows, token_logprobs
from common.model.training import cut_by_tokens
from tests.small_models import FAMILIES, picture, small_folder, small_policy, small_prompts

GROUP = 3


def completions(policy, rows: int, tokens: int = 7, seed: int = 0):
    """Random completions of different lengths with nonsense behind them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (rows, tokens), generator=generator)
    lengths = torch.randint(1, tokens + 1, (rows,), generator=generator)
    lengths[0] = tokens
    return ids, torch.arange(tokens) < lengths[:, None]


def padded_logprobs(policy, prompts, ids, mask, temperature):
    """The slow way: every row is the model's own forward over prompt and completion."""
    model, rows = policy.base, []
    for r in range(len(ids)):
        one = prompts.select([r // GROUP])
        tokens = ids[r : r + 1, : int(mask[r].sum())]
        both = torch.cat([one.input_ids, tokens], dim=1)
        output = model(
            input_ids=both,
            pixel_values=one.pixel_values,
            image_grid_thw=one.image_grid_thw,
            mm_token_type_ids=(both == model.config.image_token_id).int(),
        )
        logits = (
            output.logits[0, one.input_ids.shape[1] - 1 : -1].float().masked_fill(policy.banned, -1e30) / temperature
        )
        logprobs = logits.log_softmax(-1).gather(-1, tokens[0, :, None])[:, 0]
        rows.append(torch.nn.functional.pad(logprobs, (0, ids.shape[1] - len(logprobs))))
    return torch.stack(rows)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prompt_equals_padded_rows(family, recompute):
    policy = small_policy(family)
    prompts, _, _ = small_prompts(policy)
    ids, mask = completions(policy, len(prompts) * GROUP)
    weights = torch.randn(ids.shape, generator=torch.Generator().manual_seed(1))

    scores = Scorer(policy, gradient_checkpointing=recompute)(prompts, ids, mask, temperature=0.7)
    (scores.logprobs * weights).sum().backward()
    shared = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    reference = padded_logprobs(policy, prompts, ids, mask, 0.7)
    (reference * weights).sum().backward()

    assert scores.logprobs.dtype == torch.float32
    torch.testing.assert_close(scores.logprobs, reference * mask, atol=1e-5, rtol=1e-5)
    for name, parameter in policy.model.named_parameters():
        if parameter.grad is not None:
            scale = parameter.grad.abs().max().clamp(min=1e-3)
            torch.testing.assert_close(shared[name] / scale, parameter.grad / scale, atol=1e-5, rtol=0, msg=name)
    assert any("visual" in name for name in shared), "the vision tower gets gradients through the shared prompt"


def test_rows_that_a_group_holds_twice_count_twice():
    policy = small_policy()
    prompts, _, _ = small_prompts(policy)
    ids, mask = completions(policy, len(prompts) * GROUP)
    ids[2], mask[2] = ids[0], mask[0]  # twice in the first group
    ids[GROUP], mask[GROUP] = ids[0], mask[0]  # another group's row stays apart
    first, copy_of = distinct_rows(torch.arange(len(ids)) // GROUP, ids, mask)
    assert 2 not in first.tolist() and GROUP in first.tolist() and copy_of[2] == copy_of[0] == 0
    weights = torch.randn(ids.shape, generator=torch.Generator().manual_seed(1))
    scores = Scorer(policy)(prompts, ids, mask)
    assert scores.hidden.shape[:2] == scores.states.shape[:2] == ids.shape
    (scores.logprobs * weights).sum().backward()
    shared = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    reference = padded_logprobs(policy, prompts, ids, mask, 1.0)
    (reference * weights).sum().backward()
    torch.testing.assert_close(scores.logprobs, reference * mask, atol=1e-5, rtol=1e-5)
    for name, parameter in policy.model.named_parameters():
        if parameter.grad is not None:
            scale = parameter.grad.abs().max().clamp(min=1e-3)
            torch.testing.assert_close(shared[name] / scale, parameter.grad / scale, atol=1e-5, rtol=0, msg=name)


def test_the_norm_has_the_gradient_of_its_formula():
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: RMSNorm.apply(x, weight, 1e-6), (x, weight))
    theirs = torch.nn.functional.rms_norm(x, (7,), weight, 1e-6)
    torch.testing.assert_close(RMSNorm.apply(x, weight, 1e-6), theirs)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "tokens, length",
    [(5, 5), (5, 7), (5, 9), (40, 70)],
    ids=["square", "few keys before", "many keys before", "many queries"],
)
def test_all_ways_to_attend_agree(monkeypatch, tokens, length, masked):
    shapes = (2, 6, tokens, 16), (2, 2, length, 16), (2, 2, length, 16)
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)
    weights = torch.randn(2, 6, tokens, 16)
    mask = torch.ones(2, 1, tokens, length, dtype=torch.bool).tril(length - tokens)
    mask = torch.rand(mask.shape) < 0.7 if masked else mask
    mask[..., 0] = True  # a row of a softmax may not be empty
    scores = 0.3 * q @ k.repeat_interleave(3, dim=1).mT
    expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v.repeat_interleave(3, dim=1)
    for plain_scores in (2**23, 0):
        monkeypatch.setattr("common.model.layers.PLAIN_SCORES", plain_scores)
        gathered = attention(q, k, v, mask if masked else None, 0.3)
        torch.testing.assert_close(gathered, expected, atol=1e-5, rtol=1e-5)
        gradients = (
            torch.autograd.grad((x * weights).sum(), (q, k, v), retain_graph=True) for x in (gathered, expected)
        )
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_neighbours_padding_and_order_change_nothing():
    policy = small_policy()
    prompts, _, _ = small_prompts(policy)
    ids, mask = completions(policy, len(prompts) * GROUP)
    scorer = Scorer(policy)
    together = scorer(prompts, ids, mask).logprobs
    for n in range(len(prompts)):
        rows = slice(n * GROUP, (n + 1) * GROUP)
        alone = scorer(prompts.select([n]), ids[rows], mask[rows]).logprobs
        torch.testing.assert_close(together[rows], alone, atol=1e-5, rtol=1e-5)
    nonsense = torch.where(mask, ids, 7)
    torch.testing.assert_close(scorer(prompts, nonsense, mask).logprobs, together)


def test_images_swapped_between_prompts_change_the_scores():
    policy = small_policy()
    prompts, _, images = small_prompts(policy, sizes=((32, 32), (32, 32), (32, 32)))
    ids, mask = completions(policy, len(prompts) * GROUP)
    scorer = Scorer(policy)
    clean = scorer(prompts, ids, mask).logprobs
    swapped = scorer(prompts.with_images(policy, [images[1], images[0], images[2]]), ids, mask).logprobs
    moved = ((clean - swapped).abs() > 1e-3).any(1).view(-1, GROUP).all(1)
    assert moved.tolist() == [True, True, False]


def test_replaced_images_must_fill_the_same_grid():
    policy = small_policy()
    prompts, _, images = small_prompts(policy)
    with pytest.raises(ValueError, match="grids"):
        prompts.with_images(policy, [[picture(64, 64, 0)], *images[1:]])


def test_the_softmax_leaves_out_vision_tokens():
    policy = small_policy()
    prompts, _, _ = small_prompts(policy)
    ids = torch.arange(GROUP * len(prompts) * 30).remainder(256).view(-1, 30)
    mask = torch.ones_like(ids, dtype=torch.bool)
    scores = Scorer(policy)(prompts, ids, mask)
    hidden, head = scores.hidden.detach(), policy.base.get_output_embeddings().weight.detach()
    every_token = torch.arange(len(head)).expand(1, -1)
    logprobs, entropy = token_logprobs(
        hidden[:1, :1].expand(1, len(head), -1), head, every_token, every_token >= 0, policy.banned, 1.0
    )
    assert logprobs[0, ~policy.banned].exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert (logprobs[0, policy.banned].exp() == 0).all()
    allowed = logprobs[0, ~policy.banned]
    assert entropy[0, 0].item() == pytest.approx(-(allowed.exp() * allowed).sum().item(), abs=1e-4)


def test_chunks_change_neither_values_nor_gradients(monkeypatch):
    policy = small_policy()
    prompts, _, _ = small_prompts(policy)
    ids, mask = completions(policy, len(prompts) * GROUP)

    def gradient():
        policy.model.zero_grad()
        scores = Scorer(policy)(prompts, ids, mask)
        scores.logprobs.sum().backward()
        return scores.logprobs.detach(), policy.base.lm_head.weight.grad.clone()

    whole = gradient()
    monkeypatch.setattr("common.model.scoring.LOGIT_BUDGET", 3 * 272)
    for one, other in zip(whole, gradient(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [2, 100])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_heads_own_gradient_is_autograds(frozen, chunk, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(*size, generator=generator) for size in ((3, 4, 8), (11, 8)))
    ids, weights = torch.randint(0, 9, (3, 4), generator=generator), torch.randn(3, 4, generator=generator)
    mask, banned = torch.arange(4) < torch.tensor([[4], [1], [3]]), torch.arange(11) >= 9
    monkeypatch.setattr("common.model.scoring.LOGIT_BUDGET", chunk * 11)
    inputs = [hidden.requires_grad_(), head.requires_grad_(not frozen)]
    logprobs, entropy = token_logprobs(*inputs, ids, mask, banned, 0.7)
    loss = (logprobs * weights).sum()
    once = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    loss.backward()
    torch.testing.assert_close(hidden.grad, once, msg="what is kept for the backward pass is not changed by it")

    exact = [x.detach().double().requires_grad_() for x in inputs]
    whole = (exact[0] @ exact[1].T / 0.7).masked_fill(banned, -torch.inf).log_softmax(-1)
    expected = whole.gather(-1, ids[..., None])[..., 0] * mask
    (expected * weights).sum().backward()
    torch.testing.assert_close(logprobs, expected.float())
    torch.testing.assert_close(entropy, (torch.distributions.Categorical(logits=whole).entropy() * mask).float())
    torch.testing.assert_close(hidden.grad, exact[0].grad.float())
    assert head.grad is None if frozen else torch.allclose(head.grad, exact[1].grad.float(), atol=1e-6)


@pytest.mark.parametrize("chunk", [2, 100])
@pytest.mark.parametrize("policy_weight", [0.0, 1.0])
def test_an_entropy_bonus_has_its_gradient(policy_weight, chunk, monkeypatch):
    """Against autograd on plain logits and against finite differences, both in float64."""
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(*size, generator=generator) for size in ((3, 4, 8), (11, 8)))
    hidden[0, 0] *= 100  # a sure token: most probabilities are 0, and 0 log 0 is 0
    ids = torch.randint(0, 9, (3, 4), generator=generator)
    weights, bonus = torch.randn(2, 3, 4, generator=generator)
    mask, banned = torch.arange(4) < torch.tensor([[4], [1], [3]]), torch.arange(11) >= 9
    monkeypatch.setattr("common.model.scoring.LOGIT_BUDGET", chunk * 11)
    inputs = [hidden.requires_grad_(), head.requires_grad_()]
    logprobs, entropy = token_logprobs(*inputs, ids, mask, banned, 0.7)
    loss = (entropy * bonus).sum()
    (loss + policy_weight * (logprobs * weights).sum() if policy_weight else loss).backward()

    def exact_loss(hidden, head):
        logits = (hidden @ head.T / 0.7).masked_fill(banned, -1e30)
        logprobs = logits.log_softmax(-1)
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        token = logprobs.gather(-1, ids[..., None])[..., 0]
        return ((entropy * bonus + policy_weight * token * weights) * mask).sum()

    exact = [x.detach().double().requires_grad_() for x in inputs]
    exact_loss(*exact).backward()
    for ours, theirs in zip(inputs, exact, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad.float(), atol=1e-4, rtol=1e-4)
        direction = torch.randn(theirs.shape, generator=generator, dtype=torch.float64)
        sides = [[x + sign * 1e-6 * direction if x is theirs else x for x in exact] for sign in (1, -1)]
        slope = (exact_loss(*sides[0]) - exact_loss(*sides[1])).item() / 2e-6
        assert (ours.grad * direction).sum().item() == pytest.approx(slope, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("slice_tokens", [10**6, 14])
def test_an_entropy_bonus_reaches_the_weights(slice_tokens):
    policy = small_policy()
    prompts, _, _ = small_prompts(policy)
    ids, mask = completions(policy, len(prompts) * GROUP)
    ids[2], mask[2] = ids[0], mask[0]  # a row that is forwarded once for two
    scorer = Scorer(policy, gradient_checkpointing=True, slice_tokens=slice_tokens)
    weight = policy.base.model.language_model.layers[0].mlp.up_proj.weight

    def entropy():
        return scorer(prompts, ids, mask).entropy.sum()

    (gradient,) = torch.autograd.grad(entropy(), weight)
    with torch.no_grad():
        step = 1e-2 * gradient / gradient.norm()
        weight += step
        above = entropy()
        weight -= 2 * step
        below = entropy()
    assert (above - below).item() == pytest.approx(2 * (gradient * step).sum().item(), rel=0.02)


def test_micro_batches_hold_every_prompt_once_within_the_budget():
    lengths = torch.tensor([5, 9, 2, 2, 7, 7, 1, 3])  # four prompts, two rows each
    mask = torch.arange(9) < lengths[:, None]
    longest = mask.sum(1).view(-1, 2).amax(1).tolist()
    batches = cut_by_tokens(longest, prompt_tokens=10, group_size=2, budget=40)
    assert batches == [[0], [2], [3, 1]]  # 28, 24, 2 * (10 + 6) tokens
    assert cut_by_tokens(longest, 10, 2, budget=1) == [[0], [2], [3], [1]]
    assert cut_by_tokens(longest, 10, 2, budget=10**6) == [[0, 2, 3, 1]]


class LargestLogits(TorchDispatchMode):
    """The most entries that any tensor with a place for every word of the vocabulary has had."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.most = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (self.vocabulary,):
                self.most = max(self.most, tensor.numel())
        return result


def test_no_tensor_of_rows_times_tokens_times_vocabulary(monkeypatch):
    policy = small_policy()
    prompts, _, _ = small_prompts(policy)
    ids, mask = completions(policy, len(prompts) * GROUP, tokens=24)
    vocabulary, width = policy.base.get_output_embeddings().weight.shape
    chunk = width + 1  # tokens; the head itself, transposed, is one of the tensors
    assert mask.sum() > 2 * chunk
    monkeypatch.setattr("common.model.scoring.LOGIT_BUDGET", chunk * vocabulary)
    with LargestLogits(vocabulary) as seen:
        Scorer(policy)(prompts, ids, mask).logprobs.sum().backward()
    assert seen.most == chunk * vocabulary, "scoring: a chunk of tokens at a time, also in the backward pass"
    with LargestLogits(vocabulary) as seen:
        sample(policy, prompts, GROUP, 12, uniform_numbers(0, 0, range(len(ids)), 12))
    assert seen.most <= max(len(ids), width) * vocabulary, "sampling: one token a row"


@pytest.mark.parametrize("float32_norms", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("name", [*FAMILIES, "tiny"])
def test_in_bfloat16_sampling_and_scoring_agree_within_a_bound(name, lora_rank, recompute, float32_norms, monkeypatch):
    """What CUDA does, on the CPU: bfloat16 arithmetic over float32 weights, and over a bfloat16 base with adapters.
    `mismatch` in a run's log is this gap. Norms may come in float32, as autocast has them on some releases."""

    def products(a, b):
        assert a.dtype == b.dtype == torch.bfloat16, "CUDA's product takes no two precisions"
        return a.float() @ b.float()

    monkeypatch.setattr("common.model.decoder.products", products)
    if float32_norms:
        for module in ("layers", "scoring", "decoder"):
            monkeypatch.setattr(f"common.model.{module}.rms_norm", lambda x, norm: rms_norm(x.float(), norm))
        monkeypatch.setattr("common.model.decoder.normalize", lambda x, eps: normalize(x.float(), eps))
    policy = load_policy(name if name == "tiny" else small_folder(name), lora_rank=lora_rank)
    for parameter in policy.model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    monkeypatch.setattr(type(policy), "autocast", lambda self: torch.autocast("cpu", dtype=torch.bfloat16))
    examples = load_examples("puzzles", "test", limit=3)
    prompts = encode_prompts(policy, [build_messages(e) for e in examples], [list(e.images) for e in examples])
    rollout = sample(policy, prompts, GROUP, 48, uniform_numbers(0, 0, range(9), 48))
    mask = rollout.completion_mask
    scores = Scorer(policy, gradient_checkpointing=recompute)(prompts, rollout.completion_ids, mask)
    gap = (scores.logprobs - rollout.logprobs)[mask].abs()
    assert scores.logprobs.dtype == torch.float32 and 0 < gap.mean() < 0.01, (gap.mean(), gap.max())
    scores.logprobs.sum().backward()
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in trained), "weights stay masters"
    assert all(p.grad.isfinite().all() for p in trained if p.grad is not None)


def test_a_small_update_is_not_lost():
    policy = small_policy()
    weight = policy.base.get_output_embeddings().weight
    with torch.no_grad():
        weight.fill_(1.0)
    optimizer = torch.optim.AdamW([weight], lr=1e-6, weight_decay=0.0, fused=True)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert ((weight - 1 + 1e-6).abs() < 1e-7).all()
    assert torch.tensor(1 - 1e-6).bfloat16() == 1, "as it would be in bfloat16"
