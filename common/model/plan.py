"""Settings with which a run fits its machine: rows decoded together, tokens of a micro-batch, where masters live.

    plan("Qwen/Qwen3-VL-4B", parse_machine("80 GB x 1"), Work(prompts=8, group_size=8, completion=2048))

None of the three changes what is computed, but for what floating-point numbers round differently, so that a run may
choose them. What it would hold is computed in `common.model.memory`. A tenth of the device is left free, for its
context, kernels' workspaces and what fragments.
"""

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator

from common.model.memory import Shape, Work, find_shape, held, on_host, phases

FREE_SHARE = 0.1
FEWEST_TOKENS = 1024  # of a micro-batch
FEWEST_SLOTS = 8  # below, the weights are read for too little
ENOUGH_TOKENS, ENOUGH_SLOTS = 4096, 32  # below, a step loses more than an optimizer off the device takes


@dataclass(frozen=True)
class Machine:
    """Devices of `device` bytes each that are free, and the machine's own memory (0: not known)."""

    device: float
    count: int = 1
    host: float = 0

    def __str__(self) -> str:
        return f"{self.device / 1e9:.0f} GB x {self.count}"


def parse_machine(text: str) -> Machine:
    """A machine as it is written for `--plan`; its own memory may follow.

    >>> parse_machine("80 GB x 8"), parse_machine("24 GB x 1, 128 GB").host
    (Machine(device=80000000000.0, count=8, host=0.0), 128000000000.0)
    """
    found = re.fullmatch(r"\s*(\d+)\s*GB\s*(?:x\s*(\d+)\s*)?(?:,\s*(\d+)\s*GB\s*)?", text, re.IGNORECASE)
    if not found or not int(found[1]) or not int(found[2] or 1):
        raise SystemExit(f"--plan {text}: write it like '80 GB x 1' or, with the machine's memory, '24 GB x 8, 256 GB'")
    return Machine(int(found[1]) * 1e9, int(found[2] or 1), int(found[3] or 0) * 1e9)


def this_machine(accelerator: Accelerator) -> Machine | None:
    """The one that these processes run on, by what is free where least is: the same on all of them; None on the CPU."""
    device = accelerator.device
    if device.type != "cuda":
        return None
    with open("/proc/meminfo") as file:
        host = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    free, _ = torch.cuda.mem_get_info(device)
    least = accelerator.gather(torch.tensor([[free, host]], device=device)).amin(0).tolist()
    nodes = accelerator.num_processes // int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    return Machine(least[0], accelerator.num_processes, least[1] * nodes)


@dataclass(frozen=True)
class Plan:
    """What a run holds, in bytes a device, with the settings that were chosen in `work`."""

    model: str
    machine: Machine
    work: Work
    kept: dict[str, float]
    phases: dict[str, float]
    host: float

    @property
    def peak(self) -> float:
        return sum(self.kept.values()) + max(self.phases.values())

    @property
    def fits(self) -> bool:
        room = self.peak <= self.machine.device * (1 - FREE_SHARE)
        return room and (not self.machine.host or self.host <= self.machine.host * (1 - FREE_SHARE))

    def __str__(self) -> str:
        work, rows = self.work, self.work.rows
        lines = [f"{self.model} on {self.machine}, GB a device"]
        notes = {
            "weights": "all trained but the vision tower" if work.frozen_tower else "all trained",
            "reference": "frozen",
            "pictures": "of this step and of the next",
            "sampling": f"{work.slots} of {rows} rows at a time" if work.slots < rows else f"{rows} rows",
            "evaluation": f"{work.evaluated} prompts at a time",
            "update": f"micro-batches of {work.micro_batch_tokens:,} tokens",
        }
        if work.lora_rank:
            notes["weights"] = f"adapters of rank {work.lora_rank}"
        elif work.offload_optimizer:
            notes["gradients, Adam"] = "masters and moments off the device"
        elif self.machine.count > 1:
            notes["gradients, Adam"] = f"masters and moments shared out among {self.machine.count}"
        for name, size in [*self.kept.items(), *self.phases.items()]:
            lines.append(f"  {name:18}{size / 1e9:7.1f}  {notes.get(name, '')}".rstrip())
        lines.append(f"  {'peak':18}{self.peak / 1e9:7.1f}  of {self.machine.device / 1e9:.1f}, a tenth left free")
        if self.host:
            there = f"of {self.machine.host / 1e9:.0f} " if self.machine.host else ""
            lines.append(f"  {'machine':18}{self.host / 1e9:7.1f}  {there}of its own memory")
        text = f"prompts of {work.prompt} tokens and pictures of {work.image_tokens}"
        lines.append(f"  for {text}, completions of {work.completion}")
        return "\n".join(lines)


def lay_out(model: str, machine: Machine, work: Work, shape: Shape) -> Plan:
    """The plan of settings as they are, with slots by their number."""
    work = replace(work, slots=work.together)
    kept = held(shape, work, machine.count)
    return Plan(model, machine, work, kept, phases(shape, work, machine.count), on_host(shape, work))


def choose(model: str, machine: Machine, work: Work, shape: Shape | None = None) -> Plan | None:
    """The fastest settings that fit, within the bounds that `work` gives; None where none does.

    Masters leave the device where micro-batches and slots would else be small. These two have their memory one after
    the other, so that each is the largest that fits by itself.
    """
    shape = shape or find_shape(model)
    offloads = [False, True] if not work.offload_optimizer and not work.lora_rank else [work.offload_optimizer]
    tokens, slots = work.micro_batch_tokens, work.together
    budgets = [tokens // 2**n for n in range(20) if n == 0 or tokens // 2**n >= FEWEST_TOKENS]
    multiples = range((slots - 1) // FEWEST_SLOTS * FEWEST_SLOTS, 0, -FEWEST_SLOTS)
    every = list(itertools.product(offloads, budgets, [slots, *multiples]))

    def small(given: tuple) -> bool:
        return given[1] < min(ENOUGH_TOKENS, tokens) or given[2] < min(ENOUGH_SLOTS, slots)

    for given in sorted(every, key=small):  # in this order otherwise
        names = ("offload_optimizer", "micro_batch_tokens", "slots")
        tried = lay_out(model, machine, replace(work, **dict(zip(names, given, strict=True))), shape)
        if tried.fits:
            return tried
    return None


def plan(model: str, machine: Machine, work: Work) -> Plan:
    """The fastest settings that fit, within the bounds that `work` gives.

    Raises:
        SystemExit: one line, where nothing fits, that names the smallest change that would.
    """
    shape = find_shape(model)
    if found := choose(model, machine, work, shape):
        return found
    least = dict(slots=min(FEWEST_SLOTS, work.together), micro_batch_tokens=min(FEWEST_TOKENS, work.micro_batch_tokens))
    closest = lay_out(model, machine, replace(work, offload_optimizer=not work.lora_rank, **least), shape)
    need = closest.peak / (1 - FREE_SHARE) / 1e9
    line = f"--model {model}: needs {need:.0f} GB a device at the least, {machine.device / 1e9:.0f} are there"
    if closest.peak <= machine.device * (1 - FREE_SHARE):
        line = f"--model {model}: masters off the device need {closest.host / 1e9:.0f} GB of the machine's memory, "
        line += f"{machine.host / 1e9:.0f} are there"
    for advice, changed, larger in changes(work, machine, shape):
        if choose(model, larger, changed, shape):
            raise SystemExit(f"{line}; it fits with {advice}")
    raise SystemExit(f"{line}; no single flag mends that: take a smaller model or larger devices")


def changes(work: Work, machine: Machine, shape: Shape) -> Iterator[tuple[str, Work, Machine]]:
    """Single changes, those that cost least first: advice, what the run then does, and on which machine."""
    for part in (2, 4, 8):
        if work.image_tokens // part >= 64:
            smaller = replace(work, image_tokens=work.image_tokens // part)
            pixels = smaller.image_tokens * shape.pixels_a_token
            yield f"--max-pixels {pixels} (pictures of {smaller.image_tokens} tokens)", smaller, machine
    for part in (2, 4):
        if work.completion // part >= 256:
            shorter = replace(work, completion=work.completion // part)
            yield f"--max-completion-length {shorter.completion}", shorter, machine
    if work.reference and not work.lora_rank:
        yield "--kl-coef 0", replace(work, reference=False), machine
    if not work.lora_rank:
        yield "--lora-rank 64", replace(work, lora_rank=64, offload_optimizer=False), machine
    for count in (2, 4, 8, 16):
        if count > machine.count and work.prompts * machine.count % count == 0:
            fewer = replace(work, prompts=work.prompts * machine.count // count)
            yield f"{count} devices", fewer, replace(machine, count=count)
