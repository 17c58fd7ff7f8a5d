"""What training needs on one device and on several, computed from shapes and not measured: which model fits on which.

    python -m tests.benchmarks.memory --machines "24 GB x 1" "80 GB x 1" "80 GB x 8"

For every published size, with adapters and with all weights, what `common.model.memory` plans on each machine: rows
decoded together, tokens of a micro-batch, where masters and moments are, and the peak. A last table shows what the
phases grow with: one number varied at a time.
"""

from dataclasses import dataclass, replace

import tyro

from common.model.memory import SHAPES, Work, find_shape, phases
from common.model.plan import choose, parse_machine


@dataclass
class Options:
    machines: tuple[str, ...] = ("24 GB x 1", "48 GB x 1", "80 GB x 1", "141 GB x 1", "80 GB x 8")
    prompts: int = 8
    """of one process"""
    group_size: int = 8
    completion: int = 2048
    image_tokens: int = 1024
    lora_rank: int = 64
    growth_of: str = "Qwen3-VL-4B"
    """model of the last table, with adapters"""


def main(options: Options) -> None:
    work = Work(options.prompts, options.group_size, options.completion, image_tokens=options.image_tokens)
    print(f"{'':24}" + "".join(f"{machine:>26}" for machine in options.machines))
    for size in SHAPES:
        for rank in (options.lora_rank, 0):
            cells = []
            for text in options.machines:
                plan = choose(f"Qwen/{size}", parse_machine(text), replace(work, lora_rank=rank))
                if plan:
                    how = plan.work
                    offload = " offload" if how.offload_optimizer else ""
                    cells.append(f"{plan.peak / 1e9:.0f} GB, {how.slots}, {how.micro_batch_tokens // 1024}k{offload}")
                else:
                    cells.append("-")
            print(f"{size + (' LoRA' if rank else ' all'):24}" + "".join(f"{cell:>26}" for cell in cells), flush=True)
    print("peak, rows decoded together, thousands of tokens of a micro-batch, masters off the device")

    shape = find_shape(f"Qwen/{options.growth_of}")
    settled = replace(work, lora_rank=options.lora_rank)
    print(f"\n{options.growth_of + ' LoRA, GB':30}{'sampling':>12}{'evaluation':>12}{'update':>12}")
    for field in ("group_size", "completion", "image_tokens"):
        for factor in (1, 2, 4, 8):
            grown = replace(settled, **{field: getattr(settled, field) * factor})
            need = phases(shape, grown, 1)
            name = f"{field.replace('_', ' '):18}{getattr(grown, field):12}"
            print(name + "".join(f"{size / 1e9:12.1f}" for size in need.values()), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
