"""What is held in memory, and for how long: traced on small models on the CPU, where it is the same as on a GPU."""

import torch

from common.forward import forward_completions, forward_prompts
from tests.small_models import small_policy, small_prompts

GROUP, TOKENS = 8, 7


def random_completions(rows: int, tokens: int = TOKENS):
    ids = torch.randint(0, 256, (rows, tokens), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids, dtype=torch.bool)


def in_bfloat16(policy, monkeypatch):
    """What CUDA does, on the CPU."""
    monkeypatch.setattr(type(policy), "autocast", lambda self: torch.autocast("cpu", dtype=torch.bfloat16))


def kept_for_backward(work):
    """The result of `work` and the tensors that autograd keeps for its backward pass."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        return work(), kept


def test_scoring_keeps_the_prompts_keys_and_values_once_a_group(monkeypatch):
    policy = small_policy()
    in_bfloat16(policy, monkeypatch)
    prompts, _, _ = small_prompts(policy)
    place = torch.arange(len(prompts)).repeat_interleave(GROUP)
    ids, _ = random_completions(len(place))
    with policy.autocast():
        prefix = forward_prompts(policy.base, prompts, recompute=True)
        _, kept = kept_for_backward(
            lambda: forward_completions(policy.base, prefix, lambda x: x[place], ids, recompute=True)
        )
    assert {x.dtype for x in prefix.keys + prefix.values} == {torch.bfloat16}, "as attention reads them"
    once = prefix.keys[0].numel()
    assert [x.numel() for x in kept].count(once) == 2 * len(prefix.keys), "keys and values of each layer"
    assert max(x.numel() for x in kept) < GROUP * once, [tuple(x.shape) for x in kept]
