"""What is held in memory, and for how long: traced on small models on the CPU, where it is the same as on a GPU."""

from dataclasses import replace
from types import SimpleNamespace
from weakref import ref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import grpo
import noisy_grpo
import roma
import vppo
from common.evaluation import __main__ as command
from common.model.decoder import Decoder, SlotDecoder
from common.model.inputs import encode_prompts
from common.model.load import load_policy
from common.model.memory import Work, find_shape, held, on_host, sampling, shape_of, update
from common.model.plan import Machine, parse_machine, plan
from common.model.sampling import sample, uniform_numbers
from common.model.scoring import Scorer, forward_completions, forward_prompts, token_logprobs
from common.run import folder
from common.run.settings import longest_prompt, memory_advice, plan_of
from tests.peak_bytes import PeakBytes
from tests.small_models import FAMILIES, larger_folder, picture, small_folder, small_policy, small_prompts

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
    monkeypatch.setattr("common.model.decoder.Decoder.step", step_without_prefix)
    sample(policy, prompts, 1, TOKENS, None, temperature=0)


def test_rows_that_ended_are_dropped_layer_by_layer():
    policy = small_policy()
    prompts, _, _ = small_prompts(policy)
    with torch.inference_mode():
        decoder = Decoder(policy.base, forward_prompts(policy.base, prompts), GROUP, TOKENS)
        with AliveAtEach(torch.ops.aten.index.Tensor, decoder.caches + decoder.prompts) as held:
            decoder.keep(torch.tensor([0, 1, GROUP]))  # the third prompt has no row left
    assert set(held.counts) == set(range(7)), "each tensor is gone when the next one's rows are copied"


def test_memory_of_sampling_is_bounded_by_the_slots(monkeypatch):
    policy = small_policy()
    policy.end_token_ids = list(range(20))
    prompts, _, _ = small_prompts(policy, sizes=((32, 32),) * 3)
    prompts, group, limit, slots = prompts.select([0, 1] * 32), 4, 64, 8
    monkeypatch.setattr("common.model.decoder.BLOCK_TOKENS", 4)
    blocks, rooms, step = set(), set(), SlotDecoder.step

    def watched(self, tokens):
        hidden = step(self, tokens)
        blocks.add(self.caches[0].shape[2])
        rooms.add(self.prompts[0].shape[2])
        return hidden

    def peak(slots: int) -> tuple[int, float]:
        uniforms = uniform_numbers(0, 0, range(len(prompts) * group), limit)
        with PeakBytes() as memory:
            rollout = sample(policy, prompts, group, limit, uniforms, slots=slots)
        return memory.most, float(rollout.completion_mask.sum(1).double().mean())

    monkeypatch.setattr("common.model.decoder.SlotDecoder.step", watched)
    whole, mean_length = peak(slots=0)
    assert peak(slots)[0] < whole / 3
    assert max(rooms) <= slots, "a prompt for each slot at the most"
    assert mean_length < 20 and max(blocks) < 1 + slots * limit / 4 * 0.7, "rows that stay short hold little"


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

    monkeypatch.setattr("common.evaluation.accuracy.load_examples", load_examples)
    advice = "out of memory: lower --micro-batch-tokens .*--max-completion-length or --group-size"
    with pytest.raises(SystemExit, match=advice) as of_training:
        train()
    with pytest.raises(SystemExit, match="out of memory: lower --batch-prompts") as of_evaluation:
        command.main(command.Args())
    for line in map(str, (of_training.value, of_evaluation.value)):
        assert "\n" not in line and not line.endswith("()")


GPU = parse_machine("80 GB x 1")
WORK = Work(prompts=8, group_size=8, completion=2048)
SETTLED = replace(WORK, slots=64, micro_batch_tokens=16384, offload_optimizer=False)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("Qwen2-VL-2B", 2.209), ("Qwen2.5-VL-7B", 8.292), ("Qwen3-VL-4B", 4.438), ("Qwen3-VL-8B", 8.767)],
)
def test_published_sizes_have_the_parameters_that_they_are_published_with(name, billions):
    assert find_shape(f"Qwen/{name}-Instruct").parameters / 1e9 == pytest.approx(billions, abs=1e-3)


def test_a_folder_has_its_own_shape():
    policy = small_policy(lora_rank=4)
    shape = find_shape(small_folder("qwen3_vl"))
    trained = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    assert shape.lora_a_rank * 4 == trained
    assert shape.parameters + trained == sum(p.numel() for p in policy.model.parameters())
    assert shape.cached == 2 * 3 * 2 * 16 * 2
    frozen = small_policy(freeze_vision=True)
    assert shape.tower == sum(p.numel() for p in frozen.model.parameters() if not p.requires_grad)


def test_a_machine_is_written_in_words():
    assert parse_machine("24 GB x 8, 256 GB") == Machine(24e9, 8, 256e9)
    assert parse_machine("80GB") == Machine(80e9, 1, 0)
    for text in ("80", "80 GB x 0", "0 GB x 1", "x 8"):
        with pytest.raises(SystemExit, match=r"--plan .*: write it like '80 GB x 1'"):
            parse_machine(text)


def test_what_stays_is_bytes_a_parameter():
    shape, cost = find_shape("Qwen/Qwen3-VL-4B"), {}
    for name, work, processes in (
        ("alone", SETTLED, 1),
        ("eight", SETTLED, 8),
        ("offload", replace(SETTLED, offload_optimizer=True), 1),
        ("reference", replace(SETTLED, reference=True), 1),
    ):
        kept = held(shape, work, processes)
        assert kept.pop("pictures") == 2 * 8 * 1024 * 4 * (3 * 2 * 16 * 16) * 4, "float32, of two steps"
        cost[name] = sum(kept.values()) / shape.parameters
    assert cost == {"alone": 18, "eight": 2 + 16 / 8 + 2, "offload": 4, "reference": 20}
    assert on_host(shape, replace(SETTLED, offload_optimizer=True)) == 16 * shape.parameters
    frozen = replace(SETTLED, freeze_vision=True)
    for work, processes, bytes_a_parameter in (
        (frozen, 1, 18), (frozen, 8, 6), (replace(frozen, offload_optimizer=True), 1, 4),
    ):  # fmt: skip
        kept = held(shape, work, processes)
        trained = shape.parameters - shape.tower
        assert kept["weights"] + kept["gradients, Adam"] == bytes_a_parameter * trained + 4 * shape.tower
        assert on_host(shape, work) == (16 * trained if work.offload_optimizer else 0)
        assert update(shape, work, processes) < update(shape, replace(work, freeze_vision=False), processes)
    adapters = replace(SETTLED, lora_rank=64, reference=True)
    assert held(shape, adapters, 1) == held(shape, replace(adapters, freeze_vision=True), 1), "frozen anyway"
    assert "reference" not in held(shape, adapters, 1), "the model without its adapters"


def test_a_plan_takes_what_is_fastest_and_fits():
    def chosen(machine, **settings):
        found = plan("Qwen/Qwen3-VL-4B", parse_machine(machine), replace(WORK, **settings))
        assert found.fits and found.peak < 0.9 * found.machine.device
        return found.work.offload_optimizer, found.work.slots, found.work.micro_batch_tokens

    assert chosen("141 GB x 1") == (False, 64, 16384)
    assert chosen("80 GB x 1") == (True, 64, 16384), "masters leave the device before anything gets smaller"
    offload, slots, _ = chosen("80 GB x 8", prompts=48)
    assert not offload and 64 < slots < 384 and slots % 8 == 0
    assert chosen("80 GB x 8", prompts=48, slots=16)[1] == 16, "what is given is a bound"
    assert chosen("80 GB x 8", prompts=48, slots=300)[1] == slots
    assert chosen("141 GB x 1", micro_batch_tokens=3000) == (False, 64, 3000)
    assert chosen("141 GB x 1", offload_optimizer=True)[0], "what is asked for is done"
    assert chosen("24 GB x 1", lora_rank=64)[0] is False
    smaller = plan("Qwen/Qwen3-VL-2B", parse_machine("48 GB x 1"), WORK).work
    assert smaller.offload_optimizer and smaller.slots == 64, "rather than 8 rows at a time"


@pytest.mark.parametrize(
    ("machine", "settings", "advice"),
    [
        ("24 GB x 1", {}, "it fits with --lora-rank 64"),
        (
            "24 GB x 1",
            {"lora_rank": 64, "image_tokens": 16000},
            "fits with --max-pixels 2048000 (pictures of 2000 tokens)",
        ),
        (
            "80 GB x 1, 32 GB",
            {},
            "need 71 GB of the machine's memory, 32 are there; it fits with",
        ),
    ],
)
def test_where_nothing_fits_one_line_names_the_smallest_change(machine, settings, advice):
    with pytest.raises(SystemExit, match="--model Qwen/Qwen3-VL-4B: ") as ended:
        plan("Qwen/Qwen3-VL-4B", parse_machine(machine), replace(WORK, **settings))
    assert advice in str(ended.value) and "\n" not in str(ended.value)


def test_a_plan_prints_as_a_table():
    text = str(plan("Qwen/Qwen3-VL-4B", GPU, WORK))
    frozen = str(plan_of(grpo.Args(model="Qwen/Qwen3-VL-4B", freeze="vision"), parse_machine("141 GB x 1")))
    assert "all trained but the vision tower" in frozen and "all trained but" not in text
    for part in ("80 GB x 1", "masters and moments off the device", "64 rows", "16,384 tokens", "peak", "own memory"):
        assert part in text
    assert max(map(len, text.splitlines())) < 100


def test_phases_grow_with_what_they_hold():
    shape = find_shape("Qwen/Qwen3-VL-4B")
    short = replace(SETTLED, completion=1, image_tokens=4000)
    assert sampling(shape, 1, 64, 64, short) < 1.2 * sampling(shape, 1, 1, 1, short), "a prompt once a group"
    assert sampling(shape, 64, 1, 64, short) > 20 * sampling(shape, 1, 1, 1, short), "64 prompts are 64 forwards"
    small, large = (update(shape, replace(SETTLED, group_size=size), 1) for size in (8, 64))
    assert large < 2 * small, "a group of 131,072 tokens in slices of the micro-batch's 16,384"


def test_the_longest_prompt_is_that_of_the_examples_where_they_are_known():
    shape = find_shape("Qwen/Qwen3-VL-4B")
    rows = SimpleNamespace(shapes=[[(640, 480), (64, 64)], [(100, 2000)]], text_bytes=[90, 3000])
    assert longest_prompt([rows, []], shape, max_pixels=0) == (3000 // 3 + 64, 20 * 15 + 4)
    assert longest_prompt([rows], shape, max_pixels=200 * 1024)[1] == 200 + 4, "one picture is bounded, not their sum"
    assert longest_prompt([], shape, max_pixels=0) == (256, 1024)
    assert longest_prompt([], shape, max_pixels=512 * 1024) == (256, 512)


def test_methods_hold_what_their_pictures_take():
    """Of 8 prompts: roma.py sees two more views of each, noisy_grpo.py one a completion, vppo.py a masked one."""

    def planned(script, **settings):
        args = script.Args(model="Qwen/Qwen3-VL-4B", kl_coef=0, **settings)
        return plan_of(args, parse_machine("400 GB x 1"))

    pictures = {script: planned(script).kept["pictures"] for script in (grpo, roma, noisy_grpo, vppo)}
    assert [pictures[script] / pictures[grpo] for script in pictures] == [1, 3, 9, 1.5]
    assert planned(noisy_grpo).phases["sampling"] > 1.4 * planned(grpo).phases["sampling"], "a prompt a completion"
    assert planned(roma, num_views=4).phases["update"] > planned(roma, num_views=1).phases["update"]


def test_on_a_gpu_a_run_chooses_says_and_keeps_what_fits(tmp_path, monkeypatch, capsys):
    def start(machine, **settings):
        monkeypatch.setattr(folder, "this_machine", lambda accelerator: machine and parse_machine(machine))
        args = grpo.Args(model="Qwen/Qwen3-VL-4B", prompts_per_step=48, **settings)
        run = folder.start_run(args, "grpo")
        run.fit([])
        run.close()
        return args.slots, args.micro_batch_tokens, args.offload_optimizer

    assert start(None, out=str(tmp_path / "cpu")) == (0, 16384, False)
    chosen = start("80 GB x 1", out=str(tmp_path / "run"))
    assert 64 < chosen[0] < 384 and chosen[1:] == (16384, True)
    said = capsys.readouterr().out
    assert f"{chosen[0]} of 384 rows at a time" in said and "masters and moments off the device" in said
    assert start("141 GB x 1", resume=str(tmp_path / "run")) == chosen, "a continued run goes on as it began"
    assert start("80 GB x 1", out=str(tmp_path / "run"))[0] == chosen[0], "nothing but a plan is in nobody's way"
    with pytest.raises(SystemExit, match="it fits with --lora-rank 64"):
        start("24 GB x 1", out=str(tmp_path / "small"))


def as_on_a_gpu(monkeypatch):
    """bfloat16 arithmetic, fused norms and attention that keeps no scores, on the CPU."""

    def norm(x, own):
        with torch.autocast("cpu", enabled=False):
            return torch.nn.functional.rms_norm(x, x.shape[-1:], own.weight.to(x.dtype), own.variance_epsilon)

    for module in ("layers", "scoring", "decoder"):
        monkeypatch.setattr(f"common.model.{module}.rms_norm", norm)
    monkeypatch.setattr("common.model.layers.PLAIN_SCORES", 0)
    for module in ("memory", "scoring"):
        monkeypatch.setattr(f"common.model.{module}.LOGIT_BUDGET", 2**16)
    for module in ("memory", "decoder"):
        monkeypatch.setattr(f"common.model.{module}.BLOCK_TOKENS", 16)


@pytest.mark.parametrize("lora_rank", [0, 8])
def test_the_plan_counts_what_is_really_allocated(lora_rank, monkeypatch):
    """Within a tenth above, which is what a plan leaves free."""
    as_on_a_gpu(monkeypatch)
    policy = load_policy(larger_folder(), lora_rank=lora_rank)
    in_bfloat16(policy, monkeypatch)
    policy.end_token_ids = [-1]
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    prompts = encode_prompts(policy, [message] * 8, [[picture(128, 128, n)] for n in range(8)])
    parameters = list(policy.model.parameters())
    for parameter in parameters:
        parameter.data = parameter.data if parameter.requires_grad else parameter.data.bfloat16()
    trained = [p for p in parameters if p.requires_grad]
    copies = 2 * sum(p.numel() for p in parameters)  # the plan has them among the weights
    work = Work(
        8, 4, 48, prompt=prompts.input_ids.shape[1] - 64, image_tokens=64, lora_rank=lora_rank, micro_batch_tokens=4096
    )
    shape = shape_of(policy.base.config)

    def most(work) -> int:
        with PeakBytes() as memory:
            memory.held.update(x.untyped_storage()._cdata for x in [*parameters, prompts.pixel_values])
            work()
        return memory.most

    uniforms = uniform_numbers(0, 0, range(32), 48)
    for slots in (32, 8):  # in slots prompts are forwarded again while the decoder has its own copies
        real = most(lambda slots=slots: sample(policy, prompts, 4, 48, uniforms, slots=slots))
        computed = sampling(shape, 8, 4, slots, work) + copies * (1 if slots == 32 or lora_rank else 2)
        assert 0.5 * computed < real < 1.1 * computed, (slots, real, computed)

    ids, mask = random_completions(32, 48)
    scorer = Scorer(policy, gradient_checkpointing=True, slice_tokens=4096)
    real = most(lambda: scorer(prompts, ids, mask).logprobs.sum().backward())
    gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
    real -= gradients + (0 if lora_rank else copies)
    computed = update(shape, replace(work, micro_batch_tokens=8 * (work.width + 4 * 48)), 1)
    assert 0.5 * computed < real < 1.1 * computed, (real, computed)
