"""When a policy stops looking: what a misleading, no, and a right hint do to its accuracy, by training step.

    python -m tests.benchmarks.onset --out studies/onset      # docs/studies/onset.json is one of these

GRPO and the oracle that leaves out the first word are trained where "somebody says" an answer that is right in 75 %;
every checkpoint is probed on the same puzzles.
"""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from common.evaluation import probes
from common.evaluation.comparison import made_with
from common.run.files import write
from common.run.page import read_lines

ROOT = Path(__file__).parents[2]
SCRIPTS = {"GRPO": "grpo.py", "all but the first word": "tests/benchmarks/oracles.py undecided"}
FIGURES = ("accuracy, misleading hint", "accuracy, real picture", "accuracy, right hint", "misleading hint repeated")


@dataclass
class Options:
    out: Path
    """folder for the runs, the probes and onset.json"""
    steps: int = 150
    every: int = 15
    """steps between the checkpoints that are probed"""
    limit: int = 200
    """puzzles to probe"""
    seed: int = 1


def by_step(options: Options, run: Path) -> dict[int, dict[str, float]]:
    """The figures of the model before training, as step 0, and of each checkpoint of a run."""
    found = {}
    for step in range(0, options.steps + 1, options.every):
        model = str(run / f"checkpoints/step-{step:06d}") if step else "tiny"
        args = probes.Args(model=(model,), limit=options.limit, out=str(options.out / "probes" / run.name / str(step)))
        (summary,) = probes.main(args).values()
        found[step] = {figure: summary[figure]["mean"] for figure in FIGURES}
    return found


def main(options: Options) -> None:
    if options.every < 1 or options.steps < 1 or options.steps % options.every:
        raise SystemExit(f"--every {options.every}: must divide --steps {options.steps}")
    flags = f"--data puzzles:hint=75 --steps {options.steps} --save-every {options.every}"
    flags += f" --keep-checkpoints {options.steps // options.every}"
    methods = {name: f"{script} {flags}" for name, script in SCRIPTS.items()}
    runs, rewards = {}, {}
    for number, (name, command) in enumerate(methods.items()):
        run = (options.out / f"run-{number + 1}").resolve()
        if not (run / "summary.json").is_file():
            more = ["--seed", str(options.seed), "--eval-every", "0", "--test-examples", "0", "--no-preflight"]
            command = [sys.executable, *shlex.split(command), *more, "--out", str(run)]
            subprocess.run(command, cwd=ROOT, check=True)
        runs[name] = by_step(options, run)
        rewards[name] = [line["reward"] for line in read_lines(run / "metrics.jsonl")]
    args = {"seeds": [options.seed], "limit": options.limit}
    content = {**made_with(), "methods": methods, "args": args, "runs": runs, "reward": rewards}
    write(options.out / "onset.json", json.dumps(content, indent=1))
    print(f"{options.out}/onset.json")


if __name__ == "__main__":
    main(tyro.cli(Options))
