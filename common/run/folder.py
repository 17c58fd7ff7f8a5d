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
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from common.model.load import Policy, load_policy, save_policy
from common.model.processes import end_processes, part_of, whole
from common.run.plot import plot_learning_curve

BAD_STEPS_IN_A_ROW = 5
# What may change between a run and its continuation; anything else would make it another run.
MAY_CHANGE = {"resume", "out", "steps", "track", "save_every", "keep_checkpoints", "micro_batch_tokens"}
MAY_CHANGE |= {"eval_every", "eval_examples"}
TRACKERS = ("tensorboard", "wandb", "trackio")


class Run:
    """The folder of one training run and what is written there. Only the main process writes; all processes call.

    A script calls `restore` once before its first step, also in a new run, and `finish` or `stopped` at the end.
    """

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
        self.settings = {**asdict(args), "script": script}
        if args.keep_checkpoints < 1:
            raise SystemExit(f"--keep-checkpoints {args.keep_checkpoints}: keep at least 1")
        if args.track and args.track not in TRACKERS:
            raise SystemExit(f"--track {args.track}: not one of {', '.join(TRACKERS)}")
        if args.track and find_spec(args.track) is None:
            raise SystemExit(f"--track {args.track}: the package {args.track} is not installed")
        on_main(accelerator, self.open_folder)
        self.stop_requested_at = 0.0
        self.handlers = {n: signal.signal(n, self.request_stop) for n in (signal.SIGINT, signal.SIGTERM)}

    def open_folder(self) -> None:
        if self.args.resume:
            if self.args.out and Path(self.args.out).resolve() != self.folder.resolve():
                raise SystemExit(f"--resume {self.folder}: goes on in that folder; leave out --out {self.args.out}")
            self.compare_settings(self.settings)
            done = max((int(p.name.removeprefix("step-")) for p in self.folder.glob("checkpoints/step-*")), default=0)
            if self.args.steps < done:
                raise SystemExit(f"--steps {self.args.steps}: {self.folder} has done {done} already")
        with one_line(f"--out {self.folder}"):
            # A run that ended before it wrote anything but its arguments (a mistyped flag) is in nobody's way.
            if not self.args.resume and any(p.is_file() for p in self.folder.rglob("*") if p.name != "args.json"):
                raise SystemExit(
                    f"--out {self.folder}: the folder is not empty; continue that run with --resume {self.folder}, or "
                    "name another folder with --out"
                )
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            (self.folder / "evaluations").mkdir(exist_ok=True)
            write(self.folder / "args.json", json.dumps(self.settings, indent=1))
            for leftover in self.folder.glob("checkpoints/writing-*"):
                shutil.rmtree(leftover)

    def compare_settings(self, settings: dict) -> None:
        try:
            before = json.loads((self.folder / "args.json").read_text())
        except OSError:
            raise SystemExit(f"--resume {self.folder}: no run there (args.json is missing)") from None
        for name, value in json.loads(json.dumps(settings)).items():
            if name not in MAY_CHANGE and name in before and before[name] != value:
                flag = "--" + name.replace("_", "-")
                raise SystemExit(f"--resume {self.folder}: {flag} was {before[name]!r} there and is {value!r} now")

    def start_tracker(self, step: int) -> None:
        from accelerate.tracking import filter_trackers

        self.accelerator.project_configuration.set_directories(str(self.folder))
        self.accelerator.log_with = filter_trackers([self.args.track], str(self.folder))
        options = {
            "tensorboard": {"purge_step": step or None},  # hides what was logged of steps that will be done again
            "wandb": {"name": self.folder.name, "dir": str(self.folder)},
            "trackio": {"name": self.folder.name},
        }
        flat = {k: v for k, v in self.settings.items() if isinstance(v, int | float | str | bool)}
        # For TensorBoard the project is a folder in the run's folder, for the others it groups runs.
        project = "tensorboard" if self.args.track == "tensorboard" else self.settings["script"]
        self.accelerator.init_trackers(project, config=flat, init_kwargs=options)

    def request_stop(self, number: int, frame) -> None:
        """SIGINT and SIGTERM: finish the step, save, exit. A second SIGINT interrupts at once."""
        now = time.monotonic()
        if self.stop_requested:
            # Launchers pass on a Ctrl-C that the terminal has already sent to every process: that is not a second one.
            echo = self.accelerator.num_processes > 1 and now - self.stop_requested_at < 1
            if number == signal.SIGINT and not echo:
                raise KeyboardInterrupt
            return
        self.stop_requested, self.stop_requested_at = True, now
        if self.main:  # not print: a signal may come in the middle of one
            os.write(2, b"\nstopping: this step is finished and saved first; Ctrl-C again stops at once\n")

    def should_stop(self) -> bool:
        """Whether any process was told to stop; all processes get the same answer."""
        flag = torch.tensor([int(self.stop_requested)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag).item())

    # --- what a step leaves behind

    def once(self, name: str, compute: Callable[[], dict]) -> dict:
        """The evaluation `name`, from its file where a run that is continued has it already."""
        file = self.folder / "evaluations" / f"{name}.json"
        known = on_main(self.accelerator, lambda: json.loads(file.read_text()) if file.is_file() else None)
        if known is not None:
            return known
        result = compute()
        if self.main:
            if "accuracy" in result:
                low, high = 100 * result["ci_low"], 100 * result["ci_high"]
                print(f"{name}: accuracy {100 * result['accuracy']:.1f} % (95 % interval {low:.1f} to {high:.1f})")
                sys.stdout.flush()
            with one_line(str(file)):
                write(file, json.dumps(result, indent=1))
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
        append(self.folder / "metrics.jsonl", [{"step": step, **dict.fromkeys(metrics), **finite}])
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
        append(self.folder / "completions.jsonl", [{"step": step, **row} for row in rows])
        if step % max(1, self.args.steps // 5) == 0:
            row = rows[0]  # not the best one, which would flatter the model
            tqdm.write(
                f"--- step {step + 1}, reward {row['reward']:.2f}, advantage {row['advantage']:+.2f}, "
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
        """Checkpoint after `step` steps, under a temporary name until every byte is on the disk.

        Raises:
            SystemExit: one line, on every process, when it cannot be written; older checkpoints are not touched.
        """
        weights = whole(masters(policy, optimizer), keep=self.main)
        state = whole(optimizer.state_dict(), keep=self.main)
        on_main(self.accelerator, lambda: self.write_checkpoint(step, policy, weights, state))

    def write_checkpoint(self, step: int, policy: Policy, weights: dict | None, optimizer_state: dict) -> None:
        final = self.folder / "checkpoints" / f"step-{step:06d}"
        writing = final.with_name(f"writing-{final.name}")
        try:
            with one_line(f"checkpoint {final}"):
                shutil.rmtree(writing, ignore_errors=True)
                writing.mkdir()
                save_policy(policy, writing, weights)
                trainer = {"step": step, "optimizer": optimizer_state, "non_finite_gradients": self.bad_steps}
                torch.save(trainer, writing / "trainer.pt")
                files = sorted(p for p in writing.rglob("*") if p.is_file())
                for path in files:
                    sync(path)
                write(writing / "complete", json.dumps({str(p.relative_to(writing)): checksum(p) for p in files}))
                sync(writing)
                if final.exists():
                    shutil.rmtree(final)
                writing.rename(final)
                sync(final.parent)
        except SystemExit:
            shutil.rmtree(writing, ignore_errors=True)
            raise
        for old in sorted(final.parent.glob("step-*"))[: -self.args.keep_checkpoints]:
            shutil.rmtree(old, ignore_errors=True)

    def restore(self, policy: Policy, optimizer: torch.optim.Optimizer) -> int:
        """Load the newest checkpoint that is whole into policy and optimizer; returns the step to go on with."""
        folder = on_main(self.accelerator, self.newest_whole_checkpoint)
        step = 0
        if folder:
            load_weights(policy, folder, masters(policy, optimizer))
            # On the CPU: load_state_dict moves what belongs on the device, and Adam's step counters do not. Mapped: the
            # processes of a machine share the memory that it takes.
            state = torch.load(folder / "trainer.pt", weights_only=True, map_location="cpu", mmap=True)
            parameters = optimizer.param_groups[0]["params"]
            for number, moments in state["optimizer"]["state"].items():
                moments |= {name: part_of(value, parameters[number]) for name, value in moments.items()}
            optimizer.load_state_dict(state["optimizer"])
            step, self.bad_steps = state["step"], state["non_finite_gradients"]
        self.accelerator.wait_for_everyone()  # lines are dropped when all processes have their weights
        if self.main and self.args.resume:
            print(f"continuing {self.folder} at step {step}", flush=True)
            with one_line(str(self.folder)):
                for name in ("metrics.jsonl", "completions.jsonl"):
                    drop_lines_from(self.folder / name, step)
        if self.args.track:
            self.start_tracker(step)
        return step

    def newest_whole_checkpoint(self) -> Path | None:
        """Damaged ones above it are set aside: were they to stay, they would count among the newest that are kept."""
        found = sorted(self.folder.glob("checkpoints/step-*"), reverse=True)
        for number, folder in enumerate(found):
            damage = find_damage(folder)
            if damage is None:
                for damaged in found[:number]:
                    aside = damaged.with_name(f"damaged-{damaged.name}")
                    shutil.rmtree(aside, ignore_errors=True)
                    damaged.rename(aside)
                return folder
            print(f"checkpoint {folder}: {damage}; trying the one before", flush=True)
        if found:  # starting over would throw away the metrics of a run that may be mended by hand
            raise SystemExit(f"--resume {self.folder}: none of its checkpoints is whole; start again with --out")
        return None

    # --- the end

    def stopped(self, step: int) -> dict:
        """Say how to go on after a stop that was asked for."""
        self.close()
        if self.main:
            print(
                f"stopped after step {step} and saved; go on by the same command with --resume {self.folder}",
                flush=True,
            )
        return {}

    def finish(self, results: dict[str, dict | None]) -> dict:
        """Print and keep the results, draw the learning curve."""
        self.close()
        results = {name: result for name, result in results.items() if result}
        if self.main:
            if results:
                from common.evaluation.accuracy import table

                print(table(results))
            summary = {name: {k: v for k, v in r.items() if k != "rows"} for name, r in results.items()}
            summary["non_finite_gradients"] = self.bad_steps
            with one_line(str(self.folder)):
                write(self.folder / "summary.json", json.dumps(summary, indent=1))
                for name, result in results.items():
                    write(self.folder / "evaluations" / f"{name}.json", json.dumps(result, indent=1))
                plot_learning_curve(self.folder)
            print(f"run folder: {self.folder}")
        return results

    def close(self) -> None:
        """End progress bar, tracker and process group; signals do again what they did before the run."""
        if self.bar:
            self.bar.close()
        end_processes(self.accelerator)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


# The least that the flags of every script take.
LEAST = {
    "lora_rank": 0, "max_pixels": 0, "soft_punish_cache": 0, "steps": 1, "eval_every": 0, "eval_examples": 1,
    "test_examples": 0, "save_every": 1, "keep_checkpoints": 1, "seed": 0, "prompts_per_step": 1, "group_size": 2,
    "max_completion_length": 1, "top_k": 0, "learning_rate": 0, "updates_per_rollout": 1, "epochs_per_rollout": 1,
    "micro_batch_tokens": 1, "advantage_eps": 0, "clip_low": 0, "clip_high": 0, "delta": 0, "tis_cap": 0, "kl_coef": 0,
}  # fmt: skip


def check_least(args: object, least: dict[str, float]) -> None:
    """Stop with one line where a flag that is given is below its least value or not a number."""
    for name, lowest in least.items():
        value = getattr(args, name)
        if value is not None and not lowest <= value < float("inf"):
            raise SystemExit(f"--{name.replace('_', '-')} {value}: must be at least {lowest}")


def check_flags(args: object, **least: float) -> None:
    """Stop with one line where a flag is less than `LEAST` or `least` has it, out of its range, or not a number."""
    check_least(args, LEAST | least)
    for name, highest in (("temperature", float("inf")), ("top_p", 1.0), ("max_grad_norm", float("inf"))):
        if not 0 < getattr(args, name) <= highest:
            upper = "" if highest == float("inf") else f" and at most {highest:g}"
            raise SystemExit(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0{upper}")
    if 0 < args.max_completion_length <= args.soft_punish_cache:
        raise SystemExit(
            f"--soft-punish-cache {args.soft_punish_cache}: must be below --max-completion-length "
            f"{args.max_completion_length}, or every completion is punished"
        )


def check_accelerate(accelerator: Accelerator) -> None:
    """Stop with one line where accelerate is configured for what the loops do not do."""
    kind, precision = accelerator.distributed_type, accelerator.mixed_precision
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise SystemExit(
            f"accelerate is configured for {kind.value}: leave that out; all weights, where trained, are "
            "shared out among processes as it is"
        )
    if precision not in ("no", "bf16"):
        raise SystemExit(f"accelerate is configured for {precision}: arithmetic is bf16; pass --mixed_precision no")
    pieces = accelerator.gradient_accumulation_steps
    if pieces != 1:
        raise SystemExit(
            f"accelerate is configured for {pieces} gradient accumulation steps: not done; use --micro-batch-tokens"
        )


# How running out of memory reads: as torch, the CUDA runtime or its libraries, and the CPU's allocator put it.
OUT_OF_MEMORY = ("out of memory", "STATUS_ALLOC_FAILED", "can't allocate memory")
TRAINING_ADVICE = (
    "--micro-batch-tokens (scoring and update), --prompts-per-step (sampling), --max-completion-length or --group-size "
    "(all of it) or --max-pixels (images), or train with --lora-rank"
)


@contextlib.contextmanager
def memory_advice(advice: str = TRAINING_ADVICE) -> Iterator[None]:
    """Out of memory ends in one line that names what to lower; saved checkpoints stay. Also a decorator."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = " ".join(str(error).split())
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(x in text for x in OUT_OF_MEMORY):
            raise
        raise SystemExit(f"out of memory: lower {advice} ({text[:160] or type(error).__name__})") from None


def on_main(accelerator: Accelerator, work: Callable[[], object]) -> object:
    """What `work` returns on the main process, on all of them; where it ends the run with a line, all of them end."""
    result = [None, None]
    if accelerator.is_main_process:
        try:
            result[0] = work()
        except SystemExit as error:
            result[1] = error.code
    broadcast_object_list(result)
    if result[1] is not None:
        end_processes(accelerator)
        raise SystemExit(result[1] if accelerator.is_main_process else 1)
    return result[0]


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """A full disk or a folder that cannot be written ends the run with a line instead of a traceback."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # as torch.save and safetensors report a failed write
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise SystemExit(f"{what}: cannot be written ({reason}); checkpoints that are there stay") from None


def append(path: Path, rows: list[dict]) -> None:
    """Add lines to a JSONL file; each is there before the next step begins."""
    with one_line(str(path)), path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path: Path, text: str) -> None:
    """Write a whole file and wait until it is on the disk, or leave the old one."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text, encoding="utf-8")
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


def masters(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor] | None:
    """The sharded weights by name; None where none are sharded and the model holds all there is."""
    parameters = optimizer.param_groups[0]["params"]
    if not isinstance(parameters[0], DTensor):
        return None
    return dict(zip((name for name, _ in policy.model.named_parameters()), parameters, strict=True))


def load_weights(policy: Policy, folder: Path, sharded: dict[str, torch.Tensor] | None = None) -> None:
    """Put a checkpoint's weights, or its adapter's, into the model in place, or into the sharded weights."""
    try:
        if (folder / "adapter_model.safetensors").is_file():
            from peft import set_peft_model_state_dict

            outcome = set_peft_model_state_dict(policy.model, load_file(folder / "adapter_model.safetensors"))
            strange = outcome.unexpected_keys
        else:
            # Loaded as any checkpoint is, since the names in a file are not always those in the model.
            weights = load_policy(str(folder)).model.state_dict()
            strange = [] if sharded else policy.model.load_state_dict(weights).unexpected_keys
            with torch.no_grad():
                for name, parameter in (sharded or {}).items():
                    parameter.copy_(part_of(weights[name], parameter))
    except RuntimeError as error:
        strange = [str(error).splitlines()[-1].strip()[:200]]
    if strange:
        raise SystemExit(f"checkpoint {folder}: weights of another model: {strange[0]}")


def drop_lines_from(path: Path, step: int) -> None:
    """Drop the lines of `step` and later, and a last line that was cut off: those steps will be done again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] < step:
                kept.append(line + "\n")
    write(path, "".join(kept))
