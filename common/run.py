"""A run is a folder: arguments, metrics, completions, checkpoints, plots. Everything in it is plain text, safetensors
or a tensor file that is read without running code.

    args.json          what the run was started with
    metrics.jsonl      a line a step
    completions.jsonl  some completions of each step
    evaluations/       evaluations before and after training, every answer kept
    checkpoints/       step-000100/ and the like, in Hugging Face format, with the optimizer's state beside the weights
    learning_curve.png, summary.json   at the end
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from common.model import Policy, load_policy, save_policy

BAD_STEPS_IN_A_ROW = 5
# What may change between a run and its continuation; anything else would make it another run.
MAY_CHANGE = {"resume", "out", "steps", "track", "save_every", "keep_checkpoints", "micro_batch_tokens"}


class Run:
    """The folder of one training run and what is written there. Only the main process writes; all may call."""

    def __init__(self, args, accelerator: Accelerator, script: str):
        """`args` is a script's dataclass of arguments.

        Raises:
            SystemExit: one line, when the folder holds another run, or is not the run that `--resume` names.
        """
        self.args, self.accelerator = args, accelerator
        self.main = accelerator.is_main_process
        model = re.sub(r"[^\w.-]+", "-", args.model).strip("-")
        self.folder = Path(args.resume or args.out or f"runs/{script}-{model}-seed{args.seed}")
        self.bad_steps = self.bad_in_a_row = 0
        self.stop_requested = False
        self.bar = None
        settings = {**asdict(args), "script": script}
        if args.resume:
            self.compare_settings(settings)
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise SystemExit(
                f"--out {self.folder}: the folder is not empty; continue that run with --resume {self.folder}, or name "
                "another folder with --out"
            )
        accelerator.wait_for_everyone()
        if self.main:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            (self.folder / "evaluations").mkdir(exist_ok=True)
            write(self.folder / "args.json", json.dumps(settings, indent=1))
            for leftover in self.folder.glob("checkpoints/writing-*"):
                shutil.rmtree(leftover)
        self.start_trackers(settings)
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self.request_stop)

    def compare_settings(self, settings: dict) -> None:
        try:
            before = json.loads((self.folder / "args.json").read_text())
        except OSError:
            raise SystemExit(f"--resume {self.folder}: no run there (args.json is missing)") from None
        for name, value in json.loads(json.dumps(settings)).items():
            if name not in MAY_CHANGE and name in before and before[name] != value:
                flag = "--" + name.replace("_", "-")
                raise SystemExit(f"--resume {self.folder}: {flag} was {before[name]!r} there and is {value!r} now")

    def start_trackers(self, settings: dict) -> None:
        if not self.args.track:
            return
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers

        if self.args.track not in LOGGER_TYPE_TO_CLASS or not filter_trackers([self.args.track], str(self.folder)):
            raise SystemExit(
                f"--track {self.args.track}: not a tracker that is installed (tensorboard, wandb, trackio)"
            )
        self.accelerator.log_with = filter_trackers([self.args.track], str(self.folder))
        flat = {k: v for k, v in settings.items() if isinstance(v, int | float | str | bool)}
        self.accelerator.init_trackers(self.folder.name, config=flat)

    def request_stop(self, number: int, frame) -> None:
        """SIGINT and SIGTERM: finish the step, save, exit. A second SIGINT interrupts at once."""
        if self.stop_requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop_requested = True

    def should_stop(self) -> bool:
        """Whether any process was told to stop; all processes get the same answer."""
        flag = torch.tensor([int(self.stop_requested)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag).item())

    # --- what a step leaves behind

    def once(self, name: str, compute: Callable[[], dict]) -> dict:
        """The evaluation `name`, from its file where a run that is continued has it already."""
        file = self.folder / "evaluations" / f"{name}.json"
        if file.is_file():
            return json.loads(file.read_text())
        result = compute()
        if self.main:
            write(file, json.dumps(result, indent=1))
            low, high = 100 * result["ci_low"], 100 * result["ci_high"]
            print(
                f"{name}: accuracy {100 * result['accuracy']:.1f} % (95 % interval {low:.1f} to {high:.1f})", flush=True
            )
        self.accelerator.wait_for_everyone()
        return result

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl, the trackers, and the progress bar. NaN and infinity are written as null."""
        if not self.main:
            return
        if self.bar is None:
            # Started at the first step, so that the rate is that of training.
            self.bar = tqdm(total=self.args.steps, initial=step, unit="step", dynamic_ncols=True, file=sys.stdout)
        finite = {k: v for k, v in metrics.items() if math.isfinite(v)}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **dict.fromkeys(metrics), **finite}) + "\n")
        if self.args.track:
            self.accelerator.log(finite, step=step)
        self.bar.set_postfix_str(
            f"reward {metrics['reward']:.3f}, length {metrics['completions/mean_length']:.1f}, "
            f"entropy {metrics['entropy']:.3f}, {metrics['tokens_per_second']:.0f} tokens/s",
            refresh=False,
        )
        self.bar.update()
        if "eval/accuracy" in metrics:
            tqdm.write(f"step {step + 1}: held-out accuracy {100 * metrics['eval/accuracy']:.1f} %", file=sys.stdout)

    def show(self, step: int, rows: list[dict]) -> None:
        """Keep some completions; print one now and then, so that a person sees what the model writes."""
        if not self.main:
            return
        with (self.folder / "completions.jsonl").open("a") as file:
            for row in rows:
                file.write(json.dumps({"step": step, **row}) + "\n")
        if step % max(1, self.args.steps // 5) == 0:
            row = max(rows, key=lambda row: row["reward"])
            tqdm.write(
                f"--- step {step}, reward {row['reward']:.2f}, advantage {row['advantage']:+.2f}, "
                f"answer {row['answer']}\n{row['question']}\n{row['completion']}\n---",
                file=sys.stdout,
            )

    def check_gradients(self, grad_norm: torch.Tensor) -> bool:
        """False where the gradient is not finite: the step is to be skipped.

        Raises:
            SystemExit: after five such steps in a row.
        """
        if bool(torch.isfinite(torch.as_tensor(grad_norm))):
            self.bad_in_a_row = 0
            return True
        self.bad_steps += 1
        self.bad_in_a_row += 1
        if self.bad_in_a_row == BAD_STEPS_IN_A_ROW:
            raise SystemExit(
                f"the gradient was not finite in {BAD_STEPS_IN_A_ROW} steps in a row (norm {float(grad_norm)}); "
                f"lower --learning-rate; the newest checkpoint is in {self.folder / 'checkpoints'}"
            )
        return False

    # --- checkpoints

    def save(self, step: int, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
        """Checkpoint after `step` steps, under a temporary name until every byte is on the disk."""
        if self.main:
            final = self.folder / "checkpoints" / f"step-{step:06d}"
            writing = final.with_name(f"writing-{final.name}")
            try:
                shutil.rmtree(writing, ignore_errors=True)
                writing.mkdir()
                save_policy(policy, writing)
                torch.save({"step": step, "optimizer": optimizer.state_dict()}, writing / "trainer.pt")
                files = sorted(p for p in writing.rglob("*") if p.is_file())
                write(writing / "complete", json.dumps({str(p.relative_to(writing)): checksum(p) for p in files}))
                for path in [*files, writing]:
                    sync(path)
                if final.exists():
                    shutil.rmtree(final)
                writing.rename(final)
                sync(final.parent)
            except OSError as error:
                shutil.rmtree(writing, ignore_errors=True)
                raise SystemExit(f"checkpoint {final}: cannot be written ({error}); older checkpoints stand") from None
            for old in sorted(final.parent.glob("step-*"))[: -self.args.keep_checkpoints]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def restore(self, policy: Policy, optimizer: torch.optim.Optimizer) -> int:
        """Load the newest checkpoint that is whole into policy and optimizer; returns the step to go on with."""
        step = 0
        for folder in sorted(self.folder.glob("checkpoints/step-*"), reverse=True):
            damage = find_damage(folder)
            if damage is None:
                load_weights(policy, folder)
                state = torch.load(folder / "trainer.pt", weights_only=True, map_location=policy.device)
                optimizer.load_state_dict(state["optimizer"])
                step = state["step"]
                break
            if self.main:
                print(f"checkpoint {folder}: {damage}; trying the one before", flush=True)
        if self.main:
            if self.args.resume:
                print(f"continuing {self.folder} at step {step}", flush=True)
            for name in ("metrics.jsonl", "completions.jsonl"):
                drop_lines_from(self.folder / name, step)
        self.accelerator.wait_for_everyone()
        return step

    def stopped(self, step: int) -> dict:
        """Say how to go on after a stop that was asked for."""
        if self.main:
            if self.bar:
                self.bar.close()
            print(f"stopped after step {step} and saved; continue with --resume {self.folder}", flush=True)
        if self.args.track:
            self.accelerator.end_training()
        return {}

    def finish(self, results: dict[str, dict | None]) -> dict:
        """Print and keep the results, draw the learning curve."""
        if self.main:
            if self.bar:
                self.bar.close()
            results = {name: result for name, result in results.items() if result}
            if results:
                from common.evaluate import table

                print(table(results))
            summary = {name: {k: v for k, v in r.items() if k != "rows"} for name, r in results.items()}
            summary["non_finite_gradients"] = self.bad_steps
            write(self.folder / "summary.json", json.dumps(summary, indent=1))
            for name, result in results.items():
                write(self.folder / "evaluations" / f"{name}.json", json.dumps(result, indent=1))
            plot_learning_curve(self.folder)
            print(f"run folder: {self.folder}")
        if self.args.track:
            self.accelerator.end_training()
        return results


def write(path: Path, text: str) -> None:
    """Write a whole file and wait until it is on the disk, or leave the old one."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text)
    sync(temporary)
    temporary.replace(path)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        expected = json.loads((folder / "complete").read_text())
    except (OSError, json.JSONDecodeError):
        return "it was not written to the end"
    for name, digest in expected.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if checksum(folder / name) != digest:
            return f"{name} is truncated or damaged"
    return None


def load_weights(policy: Policy, folder: Path) -> None:
    """Put a checkpoint's weights, or its adapter's, into the model in place.

    They are loaded as any checkpoint is, since the names in a file are not always those in the model.
    """
    weights = load_policy(str(folder)).model.state_dict()
    try:
        policy.model.load_state_dict(weights)
    except RuntimeError as error:
        raise SystemExit(
            f"checkpoint {folder}: weights of another model: {str(error).splitlines()[1].strip()}"
        ) from None


def drop_lines_from(path: Path, step: int) -> None:
    """Drop the lines of `step` and later, and a last line that was cut off: those steps will be done again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] < step:
                kept.append(line + "\n")
    write(path, "".join(kept))


def plot_learning_curve(folder: Path) -> None:
    """learning_curve.png from metrics.jsonl: reward and accuracy, completion length, entropy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if not lines:
        return
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    steps = [line["step"] + 1 for line in lines]
    for axis, name, label in zip(
        axes, ("reward", "completions/mean_length", "entropy"), ("mean reward", "tokens", "nats a token"), strict=True
    ):
        values = [float("nan") if line[name] is None else line[name] for line in lines]
        axis.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.8)
        axis.plot(steps, smooth(values), color="tab:blue", label={"reward": "training reward"}.get(name))
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.set_title({"completions/mean_length": "completion length"}.get(name, name))
        axis.grid(alpha=0.3)
    held_out = [(line["step"] + 1, line["eval/accuracy"]) for line in lines if "eval/accuracy" in line]
    if held_out:
        axes[0].plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="held-out accuracy (greedy)")
    for name, place in (("before", 0), ("after", steps[-1])):
        file = folder / "evaluations" / f"{name}.json"
        if file.is_file():
            result = json.loads(file.read_text())
            spread = [[result["accuracy"] - result["ci_low"]], [result["ci_high"] - result["accuracy"]]]
            label = "test accuracy before, after (greedy)" if name == "before" else None
            axes[0].errorbar(place, result["accuracy"], yerr=spread, fmt="s", color="tab:green", capsize=3, label=label)
    axes[0].set_ylim(-0.02, 1.02)
    axes[0].legend(fontsize=8, loc="lower right")
    axes[1].set_ylim(bottom=0)
    axes[2].set_ylim(bottom=0)
    figure.savefig(folder / "learning_curve.png", dpi=110)
    plt.close(figure)


def smooth(values: list[float], half: int = 10) -> list[float]:
    """Mean over a window of up to 2 * half + 1 steps, NaN left out."""
    result = []
    for i in range(len(values)):
        window = [v for v in values[max(0, i - half) : i + half + 1] if not math.isnan(v)]
        result.append(sum(window) / len(window) if window else float("nan"))
    return result
