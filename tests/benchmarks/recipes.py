"""What the commands of docs/recipes.md hold and take, computed from shapes: the table that stands there.

    python -m tests.benchmarks.recipes

Memory is what `--plan` says. Seconds of a step are arithmetic, for cards of an H100's bandwidth and rate, of which
decoding is taken to reach 21 % and matrix products, recomputed ones counted, 20 %, as `grpo_step`'s seconds come to on
one with a model of 4B and adapters, and completions of 500 tokens on average, or half the limit:

    tokens       each step of decoding reads the weights and the slots' keys and values, 0.7 of the slots being in use
    prompts      2 operations a weight and token
    update       8 a weight and token of prompts and completions (forward, recomputed, and twice that backward), 2 more
                 for each further forward: of old and of reference log-probabilities, of a masked view
    optimizer    off the device: 24 bytes a parameter at 100 GB/s, and 4 over a bus of 25 GB/s, for each update

Loading, rewards, pictures, averaging gradients over devices, evaluations and checkpoints are not in it.
"""

import importlib
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from common.model.memory import Shape, find_shape
from common.model.plan import Plan, parse_machine
from common.run.settings import Settings, parse, plan_of

PAGE = Path(__file__).parents[2] / "docs/recipes.md"
BANDWIDTH, RATE = 0.21 * 3.35e12, 0.2 * 989e12  # bytes and operations a second
MEAN_LENGTH, IN_USE = 500, 0.7
HOST_BANDWIDTH, BUS = 100e9, 25e9


class Recipe(NamedTuple):
    """A command of the page, the machine in its heading, and what they come to."""

    name: str
    machine: str
    args: Settings
    plan: Plan


def read_recipes(text: str) -> list[Recipe]:
    """All of a page: `### NAME, on MACHINE`, with one command in the block beneath."""
    found = []
    for name, machine, body in re.findall(r"^### ([^\n]+), on ([^\n]+)\n(.*?)(?=^##|\Z)", text, re.M | re.S):
        (command,) = re.findall(r"^```bash\n(.*?)\n```$", body, re.M | re.S)
        words = shlex.split(command.replace("\\\n", " "))
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        args = parse(importlib.import_module(words[script][:-3]).Args, words[script + 1 :])
        found.append(Recipe(name, machine, args, plan_of(args, parse_machine(machine))))
    return found


def seconds_a_step(args: Settings, plan: Plan, shape: Shape) -> float:
    """See above."""
    work, weights = plan.work, shape.read
    mean = min(MEAN_LENGTH, work.completion / 2)
    steps = max(work.completion, work.rows * mean / (work.slots * IN_USE))
    cache = work.slots * IN_USE * mean / 2 + work.slots / work.group_size * work.width
    decoding = steps * (2 * weights + cache * shape.cached) / BANDWIDTH
    prompts = (work.rows if work.prompt_a_row else work.prompts) * work.width
    updates = args.updates_per_rollout * args.epochs_per_rollout
    further = (updates > 1) + bool(args.kl_coef) + hasattr(args, "mask_per")
    scored = work.prompts * work.width + work.rows * mean
    operations = 2 * prompts + (8 * work.views * args.epochs_per_rollout + 2 * further) * scored
    off_device = work.offload_optimizer * updates * shape.parameters * (24 / HOST_BANDWIDTH + 4 / BUS)
    return decoding + operations * weights / RATE + off_device


def rows(recipes: list[Recipe]) -> list[str]:
    """The lines of the table."""
    lines = [
        "| recipe | machine | peak, GB a device | rows at a time | off the device | seconds a step | steps | hours |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, machine, args, plan in recipes:
        seconds, work = seconds_a_step(args, plan, find_shape(args.model)), plan.work
        off = f"{plan.host / 1e9:.0f} GB" if plan.host else "–"
        lines.append(
            f"| {name} | {machine} | {plan.peak / 1e9:.0f} | {work.slots} of {work.rows} | {off} | {seconds:.0f} | "
            f"{args.steps} | {seconds * args.steps / 3600:.1f} |"
        )
    return lines


if __name__ == "__main__":
    print("\n".join(rows(read_recipes(PAGE.read_text()))))
