"""Seconds a step of each script, beside grpo.py's: real training steps on the built-in model, run in turn.

    python -m tests.benchmarks.method_cost --steps 60 --rounds 2

Means over the steps behind the first three, evaluation left out; the ratio is to grpo.py of the same round.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[2]


@dataclass
class Options:
    scripts: tuple[str, ...] = ("grpo.py", "roma.py", "vppo.py", "vgpo.py", "noisy_grpo.py")
    """scripts to time, grpo.py first; flags may follow a script's name"""
    steps: int = 60
    """steps of each run"""
    rounds: int = 2
    """how often all are run in turn"""


def seconds(command: str, steps: int) -> tuple[float, float]:
    """Mean seconds of a step and of its sampling."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--steps", str(steps), "--test-examples", "0", "--eval-every", "0", "--out", f"{folder}/run"]
        arguments = [sys.executable, *command.split(), *flags]
        subprocess.run(arguments, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()][3:]
    return statistics.mean(r["seconds"] for r in lines), statistics.mean(r["seconds/sample"] for r in lines)


def main(options: Options) -> None:
    ratios = {script: [] for script in options.scripts}
    for number in range(options.rounds):
        base = None
        for script in options.scripts:
            whole, sampling = seconds(script, options.steps)
            base = base or whole
            ratios[script].append(whole / base)
            print(f"round {number + 1}, {script}: {whole:.3f} s a step, {sampling:.3f} of it sampling", flush=True)
    for script, values in ratios.items():
        print(f"{script:16} {statistics.median(values):.2f} times {options.scripts[0]}")


if __name__ == "__main__":
    main(tyro.cli(Options))
