"""How good the gradient of each method is at the start, before anything is trained.

    python -m common.evaluation.gradients --methods "grpo: grpo.py" "vppo: vppo.py" --out gradients

Each method is `NAME: SCRIPT FLAGS`. Its script runs as it is, on the policy that training would start from, but every
optimizer step is only looked at and not taken: a hook reads the gradient and sets the learning rate to 0. The truth is
the gradient of the expected reward from very many rollouts: GRPO without its biases (rewards against the group's mean,
a sum over tokens divided by a constant) on other prompts in larger groups. Reported a method, with
g_k its gradients and t the truth:

    cosine      mean of cos(g_k, t)
    noise       1 - |E g|^2 / E |g|^2: what share of a step's squared length is luck
    direction   cos(E g, E t), corrected for the noise that is left in both means: 1 is no bias, up to length
    gain        change of the expected reward on other examples, in points, after a step of a fixed length along the
                mean gradient, both sampled with the same random numbers

Written are gradients.json and gradients.png; a table is printed. What a method anneals over its steps is annealed over
`--steps` here.
"""

import contextlib
import json
import math
import re
import runpy
import shlex
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from common.data.examples import load_examples
from common.evaluation.accuracy import aligned, evaluate
from common.evaluation.comparison import made_with
from common.evaluation.robustness import bootstrap
from common.evaluation.study import DATA, settings_of_method
from common.model.load import load_policy
from common.run.files import one_line, write
from common.run.settings import Count, Group, Natural, Settings, check_ranges, command_line

ROOT = Path(__file__).parents[2]
TRUTH = "grpo.py --scale-rewards none --loss-type dr_grpo"


@dataclass
class Args:
    methods: tuple[str, ...] = (
        "grpo: grpo.py",
        "noisy_grpo: noisy_grpo.py",
        "vgpo: vgpo.py",
        "vppo: vppo.py",
        "roma: roma.py",
    )
    """what to look at, each `NAME: SCRIPT FLAGS`"""
    model: str = "tiny"
    """the policy at the start: tiny, a run folder (its newest checkpoint), a folder or a hub id"""
    data: str = "puzzles"
    """what it is trained on"""
    flags: str = ""
    """more flags for every script, say --max-completion-length 128"""
    steps: Group = 60
    """ordinary steps a method"""
    truth_steps: Group = 100
    """steps that the truth is the mean of"""
    truth_group_size: Group = 32
    """completions a prompt in these"""
    step_norm: float = 0.1
    """length of the step along the mean gradient whose gain is measured"""
    limit: Natural = 500
    """validation examples that the gain is measured on (0: not measured)"""
    samples: Count = 4
    """completions an example"""
    max_completion_length: Count | None = None
    """longest completion in tokens (default: 72 for the built-in model and its runs, else 2048)"""
    seed: Natural = 1
    """of the methods; the truth has another"""
    out: str = "gradients"
    """folder to write"""


@dataclass
class Sums:
    """What is kept of a script's gradients g_k: enough for all figures, without holding them all."""

    count: int = 0
    total: torch.Tensor | None = None  # [P] float64, the sum of g_k
    squares: float = 0.0  # sum of |g_k|^2
    dots: list[float] = field(default_factory=list)  # cos(g_k, truth)

    def add(self, gradient: torch.Tensor, truth: torch.Tensor | None) -> None:
        """One more gradient [P] float32."""
        gradient = gradient.double()
        self.count += 1
        self.total = gradient if self.total is None else self.total + gradient
        self.squares += float(gradient @ gradient)
        if truth is not None and float(gradient.norm()):
            self.dots.append(float(gradient @ truth / gradient.norm() / truth.norm()))

    @property
    def mean(self) -> torch.Tensor:
        return self.total / self.count

    @property
    def signal(self) -> float:
        """|E g|^2 without bias, from products of different steps only; negative where it drowns in noise."""
        return (float(self.total @ self.total) - self.squares) / (self.count * (self.count - 1))


def figures(own: Sums, truth: Sums) -> dict[str, float]:
    """Cosine, noise and direction, as above; NaN for a direction without any signal.

    >>> a, b = Sums(), Sums()
    >>> for x in ([1.0, 1.0], [1.0, -1.0], [1.0, 1.0], [1.0, -1.0]):
    ...     b.add(torch.tensor(x), None)
    >>> for x in ([1.0, 1.0], [1.0, -1.0], [1.0, 1.0], [1.0, -1.0]):
    ...     a.add(torch.tensor(x), b.mean)
    >>> {name: round(value, 3) for name, value in figures(a, b).items()}
    {'cosine': 0.707, 'noise': 0.667, 'direction': 1.5}
    """
    both = own.signal * truth.signal
    return {
        "cosine": float(np.mean(own.dots)) if own.dots else math.nan,
        "noise": 1 - own.signal / (own.squares / own.count) if own.squares else math.nan,
        "direction": float(own.mean @ truth.mean) / math.sqrt(both) if min(own.signal, truth.signal) > 0 else math.nan,
    }


def gradients_of(command: list[str], steps: int, log: Path, truth: torch.Tensor | None = None) -> Sums:
    """Run a script for some steps that are looked at and not taken.

    Raises:
        SystemExit: the script ended with an error; its line, and where its output is.
    """
    sums, arguments = Sums(), sys.argv

    def look(optimizer: torch.optim.Optimizer, *_) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        sums.add(torch.cat([part.detach().float().flatten().cpu() for part in parts]), truth)
        for group in optimizer.param_groups:
            group["lr"] = 0.0

    hook = register_optimizer_step_pre_hook(look)
    with tempfile.TemporaryDirectory() as folder, log.open("w") as output:
        sys.argv = [*command, "--steps", str(steps), "--save-every", str(steps), "--eval-every", "0",
                    "--test-examples", "0", "--no-preflight", "--out", f"{folder}/run"]  # fmt: skip
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                runpy.run_path(str(ROOT / command[0]), run_name="__main__")
        except SystemExit as error:
            if error.code:
                raise SystemExit(f"{shlex.join(command)}: {error.code} (see {log})") from None
        finally:
            hook.remove()
            sys.argv = arguments
    if not sums.count:
        raise SystemExit(f"{shlex.join(command)}: not one step had a gradient (see {log})")
    return sums


def expected_rewards(args: Args, settings: Settings, direction: torch.Tensor | None) -> np.ndarray:
    """Accuracy of each validation example [E] at the start, or a step against the mean gradient `direction` [P].
    `settings` are those that the scripts share."""
    policy = load_policy(
        settings.model,
        device="cuda" if torch.cuda.is_available() else "cpu",
        lora_rank=settings.lora_rank,
        max_pixels=settings.max_pixels,
        seed=settings.seed,
        freeze_vision=settings.freeze == "vision",
    )
    if direction is not None:
        parameters = [p for p in policy.model.parameters() if p.requires_grad]
        step = (-args.step_norm * direction / direction.norm()).to(parameters[0].device)
        with torch.no_grad():
            for p, part in zip(parameters, step.split([p.numel() for p in parameters]), strict=True):
                p += part.view_as(p)
    columns = {flag: getattr(settings, flag) for flag in DATA[1:]}
    examples = load_examples(settings.data, settings.eval_split, limit=args.limit, **columns)
    result = evaluate(
        policy,
        examples,
        template=settings.prompt_template,
        samples=args.samples,
        temperature=1.0,
        max_new_tokens=settings.max_completion_length,
        seed=args.seed,
    )
    return np.array([np.mean(row["correct"]) for row in result["rows"]])


def gradients_table(summary: dict[str, dict]) -> str:
    """A plain-text table, a line a method; of the truth only what it has: noise and gain."""
    lines = [["method", "cosine", "noise", "direction", "gain (points)"]]
    for name, f in summary.items():
        cosine = "{:.3f} ({:.3f} to {:.3f})".format(f["cosine"], *f["cosine_ci"]) if "cosine" in f else ""
        direction = f"{f['direction']:.3f}" if "direction" in f else ""
        gain = (
            "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * x for x in (f["gain"], *f["gain_ci"]))) if "gain" in f else ""
        )
        lines.append([name, cosine, f"{f['noise']:.3f}", direction, gain])
    return aligned(lines)


def plot_gradients(summary: dict[str, dict], path: Path) -> None:
    """A panel a figure, a bar a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in summary if name != "truth"]
    panels = [p for p in ("cosine", "noise", "direction", "gain") if p in summary[names[0]]]
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.8), layout="constrained")
    for axis, panel in zip(axes, panels, strict=True):
        values = np.array([summary[name][panel] for name in names])
        spans = [summary[name].get(f"{panel}_ci", (value, value)) for name, value in zip(names, values, strict=True)]
        axis.bar(names, values, yerr=np.abs(np.array(spans).T - values), capsize=3)
        axis.set_title("gain in expected reward" if panel == "gain" else panel)
        axis.tick_params(axis="x", rotation=45)
        axis.grid(alpha=0.3, axis="y")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(args: Args) -> dict[str, dict]:
    check_ranges(args)
    commands = {}
    for method in args.methods:
        name, _, command = method.partition(":")
        script, name = shlex.split(command)[:1], name.strip()
        if not script or not (ROOT / script[0]).is_file():
            raise SystemExit(f"--methods {method!r}: must be `NAME: SCRIPT FLAGS`, with a script of this project")
        if not re.fullmatch(r"[\w. +-]+", name) or name in (*commands, "truth"):
            raise SystemExit(f"--methods {method!r}: the name {name!r} is taken, or not of letters, digits and . _ + -")
        commands[name] = shlex.split(command)
    shared = ["--model", args.model, "--data", args.data]
    if args.max_completion_length:
        shared += ["--max-completion-length", str(args.max_completion_length)]
    shared += shlex.split(args.flags)
    seed = ["--seed", str(args.seed)]
    settings = settings_of_method(f"truth: {TRUTH}", [*shlex.split(TRUTH), *shared, *seed])
    folder = Path(args.out)
    with one_line(f"--out {args.out}"):
        folder.mkdir(parents=True, exist_ok=True)
    group = ["--group-size", str(args.truth_group_size), "--seed", str(args.seed + 1000)]
    truth = gradients_of([*shlex.split(TRUTH), *shared, *group], args.truth_steps, folder / "truth.log")
    kept = truth.signal / (truth.squares / truth.count)
    summary = {"truth": {"noise": 1 - kept}}
    print(f"truth: {args.truth_steps} steps, {1 - kept:.1%} of a step's squared length is noise", flush=True)
    start = expected_rewards(args, settings, None) if args.limit else None
    directions = {"truth": truth.mean}
    for name, command in commands.items():
        own = gradients_of([*command, *shared, *seed], args.steps, folder / f"{name}.log", truth.mean)
        summary[name] = figures(own, truth) | {"cosine_ci": bootstrap(np.array(own.dots or [math.nan]), 2000)}
        directions[name] = own.mean
    for name, direction in directions.items() if args.limit else ():
        gains = expected_rewards(args, settings, direction) - start
        summary[name] |= {"gain": float(gains.mean()), "gain_ci": bootstrap(gains, 2000)}
    asked = {name: value for name, value in asdict(args).items() if name not in ("methods", "out")}
    joined = {name: shlex.join(command) for name, command in commands.items()}
    text = json.dumps({**made_with(), "args": asked, "methods": joined, "summary": summary}, indent=1)
    print(gradients_table(summary), flush=True)
    with one_line(f"--out {args.out}"):
        write(folder / "gradients.json", text.replace("NaN", "null"))
        plot_gradients(summary, folder / "gradients.png")
    print(f"{folder}: gradients.json, gradients.png")
    return summary


if __name__ == "__main__":
    command_line(main, Args, "--limit, or --micro-batch-tokens in --flags")
