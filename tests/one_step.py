"""One training step with given rewards, and what is needed to compute its loss and gradient apart from the loop."""

import json
from dataclasses import replace

import torch

from common.data.messages import build_messages
from common.model.inputs import encode_prompts
from common.model.load import load_policy
from common.model.scoring import Scorer


def one_step(script, monkeypatch, folder, correct: list, rewards: list, **settings):
    """Run one step of 3 groups of 4 from the built-in model, with these verdicts and rewards for its 12 rows.

    Returns the run's arguments and metrics, a fresh policy, the clean prompts, token ids and mask [12, T], and the
    fresh policy's log-probabilities [12, T] of them, with gradient.
    """
    seen, reward = {}, script.reward_completions
    for name in ("sample", "draw_prompts"):
        original = getattr(script, name)
        monkeypatch.setattr(
            script, name, lambda *a, name=name, original=original, **k: seen.setdefault(name, original(*a, **k))
        )
    given = {"rewards": [float(r) for r in rewards], "accuracy": [float(c) for c in correct], "terms": {}}
    monkeypatch.setattr(script, "reward_completions", lambda *a: reward(*a)._replace(**given))
    usual = {"steps": 1, "prompts_per_step": 3, "group_size": 4, "max_completion_length": 40, "seed": 8}
    usual |= {"test_examples": 0, "eval_every": 0, "preflight": False, "out": str(folder / "run")}
    args = script.Args(**usual | settings)
    script.main(args)
    metrics = json.loads((folder / "run" / "metrics.jsonl").read_text())
    policy, rollout, prompts = load_policy("tiny"), seen["sample"], seen["draw_prompts"][1]
    logprobs = Scorer(policy)(prompts, rollout.completion_ids, rollout.completion_mask).logprobs
    return args, metrics, policy, prompts, rollout.completion_ids, rollout.completion_mask, logprobs


def without_a_picture(draw, places: list[int]):
    """`draw_prompts`, but that the examples at some places of the step are of their text alone."""

    def drawn(args, policy, train, *where):
        examples, _ = draw(args, policy, train, *where)
        for n in places:
            examples[n] = replace(examples[n], images=(), question=examples[n].question.replace("<image>", ""))
        messages = [build_messages(example, args.prompt_template) for example in examples]
        return examples, encode_prompts(policy, messages, [list(example.images) for example in examples])

    return drawn


def standardized(rewards: list) -> torch.Tensor:
    """Advantages [12, 1] of 3 groups of 4."""
    groups = torch.tensor(rewards, dtype=torch.float32).view(3, 4)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(12, 1)


def gradient_norm(policy, loss: torch.Tensor) -> float:
    loss.backward()
    return torch.stack([p.grad.norm() for p in policy.model.parameters() if p.grad is not None]).norm().item()
