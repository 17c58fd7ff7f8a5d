"""Seconds and memory of each script beside grpo.py's: real training steps on the built-in model, run in turn.

    python -m tests.benchmarks.method_cost --steps 60 --rounds 2

Seconds are means over the steps behind the first three, evaluation left out; memory is the largest resident size of
the process, libraries included; the floor is what the method must cost: the ratio of the operations of all matrix
products, counted over a few steps of each script. Ratios are to grpo.py of the same round.
"""

import importlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[2]


@dataclass
class Options:
    scripts: tuple[str, ...] = (
        "grpo.py",
        "roma.py",
        "vppo.py",
        "vgpo.py",
        "vgpo.py --updates-per-rollout 2",
        "noisy_grpo.py",
    )
    """scripts to time, grpo.py first; flags may follow a script's name"""
    steps: int = 60
    """steps of each run"""
    rounds: int = 2
    """how often all are run in turn"""
    count: str = ""
    """only count the operations of this script, and print them"""


def flags(folder: str, steps: int) -> list[str]:
    return ["--steps", str(steps), "--test-examples", "0", "--eval-every", "0", "--out", f"{folder}/run"]


def timed(command: str, steps: int) -> dict[str, float]:
    """Mean seconds of a step and of its sampling, and the process's largest resident size in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [sys.executable, *shlex.split(command), *flags(folder, steps)]
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{command}: stopped with {os.waitstatus_to_exitcode(status)}")
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()][3:]
    mean = lambda name: statistics.mean(line[name] for line in lines)
    return {"seconds": mean("seconds"), "sample": mean("seconds/sample"), "memory": usage.ru_maxrss / 1024}


def count(command: str, steps: int) -> None:
    """Print the operations of a run's matrix products."""
    script, *own = shlex.split(command)
    module = importlib.import_module(script.removesuffix(".py"))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, FlopCounterMode(display=False) as counter:
        module.main(tyro.cli(module.Args, args=[*own, *flags(folder, steps)]))
    print(counter.get_total_flops())


def counted(command: str, steps: int) -> int:
    arguments = [sys.executable, "-m", "tests.benchmarks.method_cost", "--steps", str(steps), "--count", command]
    done = subprocess.run(arguments, cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return int(done.stdout.split()[-1])


def main(options: Options) -> None:
    if options.count:
        return count(options.count, options.steps)
    rounds = {script: [] for script in options.scripts}
    for number in range(options.rounds):
        for script in options.scripts:
            rounds[script].append(timed(script, options.steps))
            seconds, sample, _ = rounds[script][-1].values()
            print(f"round {number + 1}, {script}: {seconds:.3f} s a step, {sample:.3f} of it sampling", flush=True)
    floors = {script: counted(script, 12) for script in options.scripts}
    first = options.scripts[0]
    print(f"\n{'to ' + first:34}{'step':>8}{'least':>8}{'most':>8}{'floor':>8}{'memory':>8}")
    for script, results in rounds.items():
        pairs = list(zip(results, rounds[first], strict=True))
        steps = [own["seconds"] / base["seconds"] for own, base in pairs]
        memory = statistics.median(own["memory"] / base["memory"] for own, base in pairs)
        figures = [statistics.median(steps), min(steps), max(steps), floors[script] / floors[first], memory]
        print(f"{script:34}" + "".join(f"{figure:8.2f}" for figure in figures))


if __name__ == "__main__":
    main(tyro.cli(Options))
