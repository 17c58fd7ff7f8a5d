"""How a step's time grows with the group, the completions' length, the image's size and the number of prompts.

    python -m tests.benchmarks.growth --out growth.png

One of the four changes at a time, the others stay as tests/benchmarks/grpo_step.py has them. Beside each curve lies
the line of proportional growth; below it is better, for what is shared or waits for nothing is paid once.
"""

import statistics
from dataclasses import dataclass, field, replace

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import tyro

from tests.benchmarks.grpo_step import Options as Step
from tests.benchmarks.grpo_step import measure, open_policy

TITLES = {
    "group": "completions a prompt",
    "tokens": "tokens of a completion",
    "image": "side of the image, pixels",
    "prompts": "prompts a step",
}


@dataclass
class Options:
    step: Step = field(default_factory=lambda: Step(image=128, steps=3, micro_batch_tokens=4096))
    """what stays the same"""
    group: tuple[int, ...] = (2, 4, 8, 16, 32)
    tokens: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    image: tuple[int, ...] = (64, 96, 128, 192, 256)
    prompts: tuple[int, ...] = (2, 4, 8, 16, 32)
    out: str = "growth.png"


def main(options: Options) -> None:
    policy = open_policy(options.step)
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), sharey=True, layout="constrained")
    for ax, (name, title) in zip(axes, TITLES.items(), strict=True):
        sizes, curves, peaks = getattr(options, name), {}, []
        for size in sizes:
            if options.step.cuda:
                torch.cuda.reset_peak_memory_stats()
            totals, phases, *_ = measure(policy, replace(options.step, **{name: size}))
            peaks.append(torch.cuda.max_memory_allocated() / 2**30 if options.step.cuda else None)
            phases = {"step": statistics.median(totals)} | {phase: phases[phase] for phase in ("sample", "score")}
            for phase, seconds in phases.items():
                curves.setdefault(phase, []).append(seconds)
            memory = f", peak {peaks[-1]:.1f} GiB" if options.step.cuda else ""
            print(f"{name} {size}: " + ", ".join(f"{k} {v:.3f} s" for k, v in phases.items()) + memory, flush=True)
        for phase, seconds in curves.items():
            ax.plot(sizes, seconds, marker="o", label=phase)
        power = 2 if name == "image" else 1  # an image's tokens grow with its area
        start = curves["step"][0]
        ax.plot(sizes, [start * (size / sizes[0]) ** power for size in sizes], ":", color="gray", label="in proportion")
        ax.set(xscale="log", yscale="log", xlabel=title, xticks=sizes, xticklabels=sizes)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("seconds")
    axes[0].legend()
    figure.savefig(options.out, dpi=110)
    print(f"written: {options.out}")


if __name__ == "__main__":
    main(tyro.cli(Options))
