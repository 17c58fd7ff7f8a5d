"""What is held in memory, and for how long: traced on small models on the CPU, where it is the same as on a GPU."""

from weakref import finalize, ref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.model.sampling import Decoder, sample
from common.model.scoring import Scorer, forward_completions, forward_prompts, token_logprobs
from common.run.settings import memory_advice
from common.tiny.recipe import accuracy as evaluate
from tests.benchmarks.memory import Options, sampling, update
from tests.small_models import FAMILIES, small_policy, small_prompts

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


class PeakBytes(TorchDispatchMode):
    """The most bytes that results of operations hold at a time."""

    def __init__(self):
        super().__init__()
        self.held, self.now, self.most = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.held:  # a view has another's
                self.held.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                finalize(storage, self.free, storage._cdata, storage.nbytes())
        return result

    def free(self, key, nbytes):
        self.held.remove(key)
        self.now -= nbytes


def score_and_go_back(policy, group: int, slice_tokens: int, tokens: int = 48):
    """Scores of random completions, a gradient through all of them, and the most bytes that these took."""
    prompts, _, _ = small_prompts(policy)
    ids, mask = random_completions(len(prompts) * group, tokens)
    weights = torch.randn(ids.shape, generator=torch.Generator().manual_seed(1))
    scorer = Scorer(policy, gradient_checkpointing=True, slice_tokens=slice_tokens)
    policy.model.zero_grad()
    with PeakBytes() as memory:
        scores = scorer(prompts, ids, mask)
        ((scores.logprobs * weights).sum() + scores.hidden.mean() + scores.states.square().mean()).backward()
    return scores, {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}, memory.most


@pytest.mark.parametrize("family", FAMILIES)
def test_slices_of_rows_change_neither_scores_nor_gradients(family):
    policy = small_policy(family)
    policy.model.double()  # a tolerance of 1e-6 is then far from rounding
    whole, gradients, _ = score_and_go_back(policy, group=4, slice_tokens=10**6)
    sliced, sliced_gradients, _ = score_and_go_back(
        policy, group=4, slice_tokens=5 * 48
    )  # 5, 5 and 2 rows of 3 prompts
    for name in ("logprobs", "entropy", "hidden", "states"):
        torch.testing.assert_close(getattr(sliced, name), getattr(whole, name), atol=1e-6, rtol=1e-6)
    assert gradients.keys() == sliced_gradients.keys() and any("visual" in name for name in gradients)
    for name in gradients:
        torch.testing.assert_close(sliced_gradients[name], gradients[name], atol=1e-6, rtol=1e-6, msg=name)


def test_with_slices_a_larger_group_needs_hardly_more_memory():
    policy = small_policy()
    small, large = (score_and_go_back(policy, group, slice_tokens=10**6)[2] for group in (4, 8))
    small_sliced, large_sliced = (score_and_go_back(policy, group, slice_tokens=2 * 48)[2] for group in (4, 8))
    assert small_sliced < small / 2
    assert large_sliced - small_sliced < (large - small) / 5, "its scores, but not its activations"


def test_the_head_holds_a_few_chunks_of_logits_at_a_time(monkeypatch):
    vocabulary, chunk, chunks = 1000, 16, 20
    monkeypatch.setattr("common.model.scoring.LOGIT_BUDGET", chunk * vocabulary)
    hidden = torch.randn(1, chunk * chunks, 8, requires_grad=True)
    head = torch.randn(vocabulary, 8, requires_grad=True)
    ids, mask = random_completions(1, chunk * chunks)
    with PeakBytes() as memory:
        logprobs, _ = token_logprobs(hidden, head, ids, mask, torch.zeros(vocabulary, dtype=torch.bool), 1.0)
        logprobs.sum().backward()
    assert memory.most < 5 * chunk * vocabulary * 4, "five of 20 chunks"


class AliveAtEach(TorchDispatchMode):
    """How many of some tensors are still held each time that `operation` begins."""

    def __init__(self, operation, tensors):
        super().__init__()
        self.operation, self.refs, self.counts = operation, [ref(x) for x in tensors], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is self.operation:
            self.counts.append(sum(x() is not None for x in self.refs))
        return function(*args, **(kwargs or {}))


def test_sampling_takes_the_prompts_keys_and_values_over_layer_by_layer():
    policy = small_policy()
    prompts, _, _ = small_prompts(policy)
    with torch.inference_mode():
        prefix = forward_prompts(policy.base, prompts)
        layers = len(prefix.keys)
        with AliveAtEach(torch.ops.aten.zeros.default, prefix.keys + prefix.values) as held:
            Decoder(policy.base, prefix, GROUP, TOKENS)
    assert held.counts[:layers] == [0] * layers, "nothing of the prefix is left when room for completions is made"


def test_sampling_holds_nothing_of_the_prefix_while_it_decodes(monkeypatch):
    policy = small_policy()
    prompts, _, _ = small_prompts(policy)
    refs, step = [], Decoder.step

    def forward_and_watch(*args):
        prefix = forward_prompts(*args)
        refs.extend(map(ref, [prefix, prefix.states]))
        return prefix

    def step_without_prefix(self, tokens):
        assert len(refs) == 2 and not any(x() is not None for x in refs)
        return step(self, tokens)

    monkeypatch.setattr("common.model.sampling.forward_prompts", forward_and_watch)
    monkeypatch.setattr("common.model.sampling.Decoder.step", step_without_prefix)
    sample(policy, prompts, 1, TOKENS, None, temperature=0)


def test_rows_that_ended_are_dropped_layer_by_layer():
    policy = small_policy()
    prompts, _, _ = small_prompts(policy)
    with torch.inference_mode():
        decoder = Decoder(policy.base, forward_prompts(policy.base, prompts), GROUP, TOKENS)
        with AliveAtEach(torch.ops.aten.index.Tensor, decoder.caches + decoder.prompts) as held:
            decoder.keep(torch.tensor([0, 1, GROUP]))  # the third prompt has no row left
    assert set(held.counts) == set(range(7)), "each tensor is gone when the next one's rows are copied"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
        MemoryError("Unable to allocate 2.00 GiB for an array"),
        MemoryError(),
    ],
)
def test_every_form_of_running_out_of_memory_ends_in_one_line(error, monkeypatch):
    @memory_advice()
    def train():
        raise error

    def load_examples(*args, **kwargs):
        raise error

    monkeypatch.setattr(evaluate, "load_examples", load_examples)
    advice = "out of memory: lower --micro-batch-tokens .*--max-completion-length or --group-size"
    with pytest.raises(SystemExit, match=advice) as of_training:
        train()
    with pytest.raises(SystemExit, match="out of memory: lower --batch-prompts") as of_evaluation:
        evaluate.main(evaluate.Args())
    for line in map(str, (of_training.value, of_evaluation.value)):
        assert "\n" not in line and not line.endswith("()")


def test_the_computed_table_counts_evaluation_and_a_prompt_once_a_group():
    options = Options(prompts=1, completion=1, image_tokens=4000)
    one_row, many_rows = (sampling("4B", 1, rows, options) for rows in (1, 64))
    assert many_rows == one_row, "a short completion takes less than the forward of its prompt, however large the group"
    assert sampling("4B", 64, 64, options) > 20 * many_rows, "an evaluation's 64 prompts are 64 forwards"
    small, large = (update("4B", True, Options(group_size=size, completion=2048)) for size in (8, 64))
    assert large < 2 * small, "a group of 131,072 tokens in slices of the micro-batch's 16,384"
