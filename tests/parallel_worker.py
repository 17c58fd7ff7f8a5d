"""What each of some processes does in tests/test_processes.py. The first one prints what it found."""

import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.model.inputs import encode_prompts
from common.model.load import Policy, load_policy
from common.model.processes import distribute, end_processes, gather_weights, part_of, whole
from common.model.sampling import sample, uniform_numbers
from common.model.scoring import Scorer
from tests.small_models import picture

LEARNING_RATE = 1e-3


def question(policy: Policy, number: int):
    """A prompt, the odd ones without a picture, and two completions."""
    pictures = [] if number % 2 else [picture(48, 64, number)]
    content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": f"question {number}"}]
    prompts = encode_prompts(policy, [[{"role": "user", "content": content}]], [pictures])
    ids = torch.randint(0, 256, (2, 4 + number), generator=torch.Generator().manual_seed(number))
    return prompts, ids, torch.ones_like(ids, dtype=torch.bool)


def backward(scorer: torch.nn.Module, policy: Policy, number: int, factor: float) -> None:
    (scorer(*question(policy, number)).logprobs.sum() * factor).backward()


def main(folder: str, bfloat16: bool, offload: bool) -> None:
    torch.set_num_threads(1)
    if bfloat16:
        Policy.autocast = lambda self: torch.autocast("cpu", dtype=torch.bfloat16)
    accelerator = Accelerator(cpu=True)
    policy, alone = load_policy(folder), load_policy(folder)
    found = {"dtype": None}

    scorer = Scorer(policy, gradient_checkpointing=bfloat16)
    with patch("common.model.processes.fully_shard", wraps=fully_shard) as sharded:
        trained_scorer, parameters = distribute(scorer, accelerator, offload)
    found["offloaded"] = all(isinstance(c.kwargs["offload_policy"], CPUOffloadPolicy) for c in sharded.call_args_list)
    found["sharded"] = all(isinstance(p, DTensor) for p in parameters)
    found["own part"] = sum(p.to_local().numel() for p in parameters) / sum(p.numel() for p in parameters)
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    gather_weights(scorer)
    found["dtype"] = str(policy.model.get_output_embeddings().weight.dtype)

    # The same without processes: masters, their rounded copy in the model, and gradients summed in float32.
    reference, copies = Scorer(alone, gradient_checkpointing=bfloat16), list(alone.model.parameters())
    masters = [torch.nn.Parameter(p.detach().clone()) for p in copies]
    for copy in copies:
        copy.data = copy.data.bfloat16() if bfloat16 else copy.data
    lone_optimizer = torch.optim.AdamW(masters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    found["gradient"], found["weights"] = [], []
    for step in range(2):
        # The first process has three questions, the second one, which has no picture. A single one has all four. Each
        # backward call averages over processes, so the second one goes on with questions that weigh nothing.
        shares = [[(0, 1), (1, 1), (2, 1)], [(3, 1), (5, 0), (5, 0)]]
        if accelerator.num_processes == 1:
            shares = [[(0, 1), (1, 1), (2, 1), (3, 1)]]
        for number, weight in shares[accelerator.process_index]:
            backward(trained_scorer, policy, number + 4 * step, weight * accelerator.num_processes)
        for master in masters:
            master.grad = torch.zeros_like(master)
        for number in range(4):
            backward(reference, alone, number + 4 * step, 1.0)
            for master, copy in zip(masters, copies, strict=True):
                master.grad += copy.grad
                copy.grad = None
        gradients = whole([p.grad for p in parameters], keep=True)
        scale = max(m.grad.abs().max() for m in masters)
        gaps = [(g - m.grad).abs().max() / scale for g, m in zip(gradients, masters, strict=True)]
        found["gradient"].append(float(max(gaps)))
        norms = [accelerator.clip_grad_norm_(p, 1.0) for p in (parameters, masters)]
        found["norm"] = float(norms[0]) / float(norms[1])
        for one in (optimizer, lone_optimizer):
            one.step()
            one.zero_grad()
        gather_weights(scorer)
        for master, copy in zip(masters, copies, strict=True):
            copy.data.copy_(master.data)
        gathered = whole([p.detach() for p in parameters], keep=True)
        pairs = zip(policy.model.parameters(), gathered, strict=True)
        found["copy is rounded master"] = all(torch.equal(copy, master.to(copy.dtype)) for copy, master in pairs)
        gaps = [(one - other).detach().abs().max() for one, other in zip(gathered, masters, strict=True)]
        found["weights"].append(float(max(gaps)))

    state = whole(optimizer.state_dict(), keep=True)
    for number, moments in state["state"].items():
        moments |= {name: part_of(value, parameters[number]) for name, value in moments.items()}
    resumed = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    resumed.load_state_dict(state)
    pairs = [(optimizer.state[p], resumed.state[p]) for p in parameters]
    same = [torch.equal(whole(a[name], True), whole(b[name], True)) for a, b in pairs for name in a]
    found["optimizer restored"] = all(same) and len(same) == 3 * len(parameters)

    numbers = uniform_numbers(0, 0, range(2), 6)
    found["same samples"] = all(
        torch.equal(a, b)
        for a, b in zip(
            *(vars(sample(p, question(p, 0)[0], 2, 6, numbers)).values() for p in (policy, alone)), strict=True
        )
        if a.dtype != torch.float32
    )
    if not accelerator.is_main_process:
        assert whole(parameters, keep=False) == [None] * len(parameters), "only what is kept is held"
    else:
        whole(parameters, keep=False)
        print(json.dumps(found))
    end_processes(accelerator)


if __name__ == "__main__":
    main(sys.argv[1], "bfloat16" in sys.argv, "offload" in sys.argv)
