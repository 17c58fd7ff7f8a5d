"""Runs of one step on a small model, in the settings that take different ways through the scripts."""

import importlib
import json

from common.run.settings import parse
from tests.small_models import small_folder

STEPS_OF_NOTHING = "--test-examples 0 --eval-every 0 --robust-examples 0 --no-preflight".split()
SMALL = "--data puzzles --steps 1 --prompts-per-step 2 --group-size 4 --max-completion-length 8".split()
SETTINGS = {
    "grpo": "--kl-coef 0.1 --updates-per-rollout 2 --soft-punish-cache 4",
    "grpo with adapters": "--lora-rank 2 --kl-coef 0.1 --importance-sampling-level sequence",
    "grpo in slots": "--slots 3 --micro-batch-tokens 300 --filter-groups reward --top-p 0.9 --top-k 20 --tis-cap 2",
    "roma": "--kl-coef 0.1",
    "roma of whole completions": "--kl-worst-case sequence --updates-per-rollout 2 --view-gate none",
    "vppo over the vocabulary": "--filter-groups none --dependency kl --mask-per row",
    "vppo": "--updates-per-rollout 2",
    "vgpo": "--updates-per-rollout 2 --schedule step --kl-coef 0.1",
    "noisy_grpo": "",
    "noisy_grpo on noisy images": "--update-image noisy --noise-draw uniform --anneal --posterior fixed --slots 3",
}


def train(script: str, out, *flags: str, model: str = "") -> list[dict]:
    """The metrics of a run on a small model."""
    module = importlib.import_module(script)
    model = model or small_folder("qwen3_vl")
    module.main(parse(module.Args, ["--model", model, *SMALL, *STEPS_OF_NOTHING, "--out", str(out), *flags]))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def find_some_right(script: str, monkeypatch) -> None:
    """So that every term of the loss is there."""
    module = importlib.import_module(script)
    reward = module.reward_completions

    def some_right(*args):
        found = reward(*args)
        right = [float(n % 3 == 0) for n in range(len(found.rewards))]
        return found._replace(rewards=right, accuracy=right)

    monkeypatch.setattr(module, "reward_completions", some_right)
