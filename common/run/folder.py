"""A run is a folder: arguments, metrics, completions, checkpoints, plots. Everything in it is plain text, safetensors
or a tensor file that is read without running code.

    args.json          what the run was started with
    plan.json          what it has chosen on a GPU, so that it fits
    machine.json       what the device does at its best, for the cost card
    metrics.jsonl      a line a step
    completions.jsonl  some completions of each step
    remarks.jsonl      what preflight and doctor have found
    pictures/          small copies of the pictures of some steps
    index.html         all of it as a page, written anew as the run goes
    evaluations/       evaluations before and after training, every answer kept
    checkpoints/       step-000100/ and the like, in Hugging Face format, with the optimizer's state beside the weights
    learning_curve.png, summary.json   at the end
"""

import fcntl
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list

from common.data.examples import Example
from common.model.load import Policy, checkpoints_in
from common.model.plan import this_machine
from common.model.processes import end_processes, start_processes, whole
from common.model.sampling import Rollout
from common.model.training import Batch
from common.run.card import check_hub, upload
from common.run.checkpoints import drop_old, load_checkpoint, masters, newest_whole, write_checkpoint
from common.run.doctor import Doctor, endings_of
from common.run.files import append, drop_lines_after, one_line, read_arguments, write
from common.run.meter import Meter
from common.run.page import keep_pictures, read_lines, read_object, write_page
from common.run.plot import plot_learning_curve
from common.run.preflight import preflight
from common.run.progress import Progress, step_text
from common.run.rates import rates
from common.run.settings import plan_of

BAD_STEPS_IN_A_ROW = 5
PICTURED = 20  # steps of a run whose completions are kept with pictures, and shown on the page
PAGE_EVERY = 60.0  # seconds after which the page is written anew, whatever the step
# What may change between a run and its continuation; anything else would make it another run.
MAY_CHANGE = {"resume", "out", "steps", "track", "save_every", "keep_checkpoints", "micro_batch_tokens"}
MAY_CHANGE |= {"eval_every", "eval_examples", "preflight", "push_to_hub"}
TRACKERS = ("tensorboard", "wandb", "trackio")


def start_run(args, script: str) -> "Run":
    """This process among those that the launcher started, or the only one, with the run's folder open.

    Raises:
        SystemExit: one line, when accelerate is configured for what the loops do not do, the prompts of a step cannot
            be shared out, or the folder cannot be used.
    """
    accelerator = start_processes()
    check_accelerate(accelerator)
    processes = accelerator.num_processes
    if args.prompts_per_step % (processes * args.updates_per_rollout):
        raise SystemExit(
            f"--prompts-per-step {args.prompts_per_step}: must be a multiple of {processes} processes times "
            f"--updates-per-rollout {args.updates_per_rollout}"
        )
    return Run(args, accelerator, script)


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
        self.meter = Meter(accelerator)
        model = re.sub(r"[^\w.-]+", "-", args.model).strip("-")
        self.folder = Path(args.resume or args.out or f"runs/{script}-{model}-seed{args.seed}")
        self.bad_steps = self.bad_in_a_row = 0
        self.stop_requested = False
        self.progress = Progress(0, name="loading") if self.main else None
        self.meter.begins = self.show_phase
        self.settings = {**asdict(args), "script": script}
        self.doctor, self.first_step, self.page_written = Doctor(self.settings), 0, time.monotonic()
        if args.track and args.track not in TRACKERS:
            raise SystemExit(f"--track {args.track}: not one of {', '.join(TRACKERS)}")
        if args.track and find_spec(args.track) is None:
            raise SystemExit(f"--track {args.track}: the package {args.track} is not installed")
        if args.push_to_hub:
            on_main(accelerator, lambda: check_hub(args.push_to_hub))
        on_main(accelerator, self.open_folder)
        self.stop_requested_at = 0.0
        self.handlers = {n: signal.signal(n, self.request_stop) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def open_folder(self) -> None:
        if self.args.resume:
            if self.args.out and Path(self.args.out).resolve() != self.folder.resolve():
                raise SystemExit(f"--resume {self.folder}: goes on in that folder; leave out --out {self.args.out}")
            self.compare_settings(self.settings)
            if any(line.get("step") == 0 for line in read_lines(self.folder / "metrics.jsonl")[:1]):
                raise SystemExit(
                    f"--resume {self.folder}: its metrics count steps from 0, as an earlier version of this code did; "
                    "continue it with that version"
                )
            names = [path.name.removeprefix("step-") for path in checkpoints_in(self.folder)]
            if self.args.steps < (done := int((names or [0])[-1])):
                raise SystemExit(f"--steps {self.args.steps}: {self.folder} has done {done} already")
        with one_line(f"--out {self.folder}"):
            # A run that ended before it wrote anything but its arguments (a mistyped flag) is in nobody's way.
            if not self.args.resume and any(
                p.is_file()
                for p in self.folder.rglob("*")
                if p.name not in ("args.json", ".args.json.writing", "plan.json", "machine.json", ".lock")
            ):
                raise SystemExit(
                    f"--out {self.folder}: the folder is not empty; continue that run with --resume {self.folder}, or "
                    "name another folder with --out"
                )
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            self.lock()
            (self.folder / "evaluations").mkdir(exist_ok=True)
            write(self.folder / "args.json", json.dumps(self.settings, indent=1))
            for leftover in self.folder.glob("checkpoints/writing-*"):
                shutil.rmtree(leftover)

    def lock(self) -> None:
        """Keep the folder for this process until it ends, however it does.

        Raises:
            SystemExit: another process writes there.
        """
        self.locked = open(self.folder / ".lock", "w")
        try:
            fcntl.lockf(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"--out {self.folder}: another process is training in this folder") from None

    def compare_settings(self, settings: dict) -> None:
        before = read_arguments(f"--resume {self.folder}", self.folder)
        for name, value in json.loads(json.dumps(settings)).items():
            bound = name not in MAY_CHANGE or (name == "steps" and settings.get("anneal"))  # whose levels follow them
            if bound and name in before and before[name] != value:
                flag = "--" + name.replace("_", "-")
                raise SystemExit(f"--resume {self.folder}: {flag} was {before[name]!r} there and is {value!r} now")

    def start_tracker(self, step: int) -> None:
        from accelerate.tracking import filter_trackers

        self.accelerator.project_configuration.set_directories(str(self.folder))
        self.accelerator.log_with = filter_trackers([self.args.track], str(self.folder))
        options = {
            "tensorboard": {
                "purge_step": step + 1 if step else None
            },  # hides what was logged of steps that will be done again
            "wandb": {"name": self.folder.name, "dir": str(self.folder)},
            "trackio": {"name": self.folder.name},
        }
        flat = {k: v for k, v in self.settings.items() if isinstance(v, int | float | str | bool)}
        # For TensorBoard the project is a folder in the run's folder, for the others it groups runs.
        project = "tensorboard" if self.args.track == "tensorboard" else self.settings["script"]
        self.accelerator.init_trackers(project, config=flat, init_kwargs=options)

    def request_stop(self, number: int, frame) -> None:
        """SIGINT, SIGTERM, SIGHUP (a lost connection): finish the step, save, exit. A second SIGINT interrupts."""
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

    def fit(self, splits: Sequence[Sequence[Example]]) -> None:
        """On a GPU say what the run will hold there, and lower what its settings bound to what fits; a run that is
        continued goes on with what it had chosen.

        Raises:
            SystemExit: one line, where nothing fits, with the smallest change that would.
        """
        machine, file = this_machine(self.accelerator), self.folder / "plan.json"
        if machine is None:
            return

        def choose() -> dict:
            if self.args.resume and file.is_file():
                vars(self.args).update(json.loads(file.read_text()))
            found = plan_of(self.args, machine, splits)
            self.say(str(found))
            chosen = {name: getattr(found.work, name) for name in ("slots", "micro_batch_tokens", "offload_optimizer")}
            with one_line(str(file)):
                write(file, json.dumps(chosen, indent=1))
            return chosen

        vars(self.args).update(on_main(self.accelerator, choose))

    # --- what a step leaves behind

    def once(self, name: str, compute: Callable[[], dict]) -> dict:
        """The evaluation `name` of the policy before its first step, from its file where a run that is continued has it
        already; nothing where such a run has lost it."""
        file = self.folder / "evaluations" / f"{name}.json"
        known = on_main(self.accelerator, lambda: read_object(file))
        if not known and self.first_step and self.main:  # it was of the policy before its first step, which is gone
            print(f"{file}: missing or damaged, and cannot be made again after step {self.first_step}", flush=True)
        if known or self.first_step:
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

    def show_phase(self, phase: str) -> None:
        """A phase of a step begins. The bar is there from the first step on, so that the rate is that of training."""
        if self.main and self.progress is None:
            self.progress = Progress(self.args.steps, self.first_step, leave=True)
        if self.main:
            self.progress.phase(phase)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl, the trackers, the progress bar, and what the doctor says. NaN and infinity are
        written as null. `step` counts from 0, as loops do; what is written and said counts from 1, as checkpoints do:
        the n-th step's line has `"step": n`."""
        if not self.main:
            return
        finite = {k: v for k, v in metrics.items() if math.isfinite(v)}
        step += 1
        append(self.folder / "metrics.jsonl", [{"step": step, **dict.fromkeys(metrics), **finite}])
        if self.args.track:
            self.accelerator.log(finite, step=step)
        if self.progress:
            self.progress.update(text=step_text(metrics))
        if "eval/accuracy" in metrics:
            self.say(f"step {step}: held-out accuracy {100 * metrics['eval/accuracy']:.1f} %")
        self.remark(self.doctor.examine(step, metrics))

    def show(
        self,
        step: int,
        asked: Sequence[Example],
        rollout: Rollout,
        completions: list[str],
        terms: dict[str, list[float]],
        rewards: torch.Tensor,
        advantages: torch.Tensor,
        batch: Batch,
    ) -> None:
        """Keep the completions of the step's first prompt with their rewards [R], advantages [R], terms of the reward,
        and what a method found out about tokens, `dependency` or `focus` [R, T] of `batch`; print one now and then, so
        that a person sees what the model writes."""
        if not self.main:
            return
        self.doctor.endings.update(endings_of(completions))
        told = step % max(1, self.args.steps // 5) == 0
        pictured = step % max(1, self.args.steps // PICTURED) == 0
        step += 1
        example, evaluated = asked[0], self.args.eval_every and step % self.args.eval_every == 0
        pictured = pictured or evaluated or step == self.args.steps
        rows = []
        for r, text in enumerate(completions[: self.args.group_size]):
            row = {"step": step, "question": example.question, "completion": text, "answer": example.answer}
            row |= {"reward": float(rewards[r]), "advantage": float(advantages[r])}
            row |= {"terms": {name: values[r] for name, values in terms.items()}} if terms else {}
            for name in ("dependency", "focus") if pictured else ():
                values = getattr(batch, name, None)
                if values is not None and values[r].any():  # else the row was not scored
                    inside = rollout.completion_mask[r]
                    ids = rollout.completion_ids[r][inside].tolist()
                    row |= {"tokens": [self.tokenizer.decode([token]) for token in ids]}
                    row |= {name: [round(x, 4) for x in values[r][inside].tolist()]}
            rows.append(row)
        if pictured:
            with one_line(str(self.folder / "pictures")):
                names = keep_pictures(self.folder, step, example.images)
            rows = [row | {"pictures": names} for row in rows]
        append(self.folder / "completions.jsonl", rows)
        if told:
            row = rows[0]  # not the best one, which would flatter the model
            self.say(
                f"--- step {step}, reward {row['reward']:.2f}, advantage {row['advantage']:+.2f}, "
                f"answer {row['answer']}\n{row['question']}\n{row['completion']}\n---"
            )
        if pictured or time.monotonic() - self.page_written > PAGE_EVERY:
            write_page(self.folder)
            self.page_written = time.monotonic()

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
        """Checkpoint after `step` steps.

        Raises:
            SystemExit: one line, on every process, when it cannot be written; older checkpoints are not touched.
        """
        if self.progress:
            self.progress.phase("checkpoint")
        weights = whole(masters(policy, optimizer), keep=self.main)
        trainer = {"step": step, "optimizer": whole(optimizer.state_dict(), keep=self.main)}
        trainer["non_finite_gradients"] = self.bad_steps
        folder = self.folder / "checkpoints" / f"step-{step:06d}"
        on_main(self.accelerator, lambda: write_checkpoint(folder, policy, weights, trainer))
        if self.main:
            drop_old(self.folder, self.args.keep_checkpoints)

    def save_when_due(self, step: int, policy: Policy, optimizer: torch.optim.Optimizer) -> bool:
        """Checkpoint after `step` steps, every `save_every`, at the end and before a stop. True: the run is to stop."""
        stopping = self.should_stop()
        if stopping or step % self.args.save_every == 0 or step == self.args.steps:
            self.save(step, policy, optimizer)
        return stopping

    def restore(self, policy: Policy, optimizer: torch.optim.Optimizer) -> int:
        """Load the newest checkpoint that is whole into policy and optimizer; returns the step to go on with."""
        folder = on_main(self.accelerator, lambda: newest_whole(self.folder))
        step = 0
        if folder:
            state = load_checkpoint(folder, policy, optimizer)
            step, self.bad_steps = state["step"], state["non_finite_gradients"]
        self.accelerator.wait_for_everyone()  # lines are dropped when all processes have their weights
        if self.main and self.args.resume:
            self.say(f"continuing {self.folder} at step {step}")
            with one_line(str(self.folder)):
                for name in ("metrics.jsonl", "completions.jsonl", "remarks.jsonl"):
                    drop_lines_after(self.folder / name, step)
        if self.args.track:
            self.start_tracker(step)
        self.tokenizer, self.meter.work = policy.tokenizer, policy.work
        if self.main:
            self.close_bar()
            known = (read_lines(self.folder / name) for name in ("metrics.jsonl", "remarks.jsonl"))
            self.doctor = Doctor(self.settings, *known)
            with one_line(str(self.folder)):
                write(self.folder / "machine.json", json.dumps(rates(policy, self.accelerator.num_processes), indent=1))
        self.first_step = step
        return step

    def preflight(
        self, policy: Policy, scorer: torch.nn.Module, optimizer: torch.optim.Optimizer, train: Sequence[Example]
    ) -> None:
        """Check a new run before anything long begins; see `common/run/preflight.py`."""
        if self.args.preflight and self.first_step == 0:
            self.progress = Progress(0, name="checking the set-up") if self.main else None
            scorer, processes = getattr(scorer, "module", scorer), self.accelerator.num_processes
            say = self.say if self.main else (lambda line: None)
            self.remark(preflight(self.args, policy, scorer, optimizer, train, self.folder, processes, say))
            self.close_bar()

    def remark(self, found: list[dict]) -> None:
        """Say and keep what preflight or doctor has found."""
        if self.main and found:
            for remark in found:
                self.say(f"\n! {remark['rule'].replace('_', ' ')}: {remark['text']}\n")
            self.doctor.remarks += [remark for remark in found if remark not in self.doctor.remarks]
            append(self.folder / "remarks.jsonl", found)

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.progress.say(text) if self.progress else print(text, flush=True)

    def close_bar(self) -> None:
        if self.progress:
            self.progress.close()
        self.progress = None

    # --- the end

    def stopped(self, step: int) -> dict:
        """Say how to go on after a stop that was asked for."""
        self.close()
        if self.main:
            print(
                f"stopped after step {step} and saved; go on with {self.settings['script']}.py --resume {self.folder}",
                flush=True,
            )
        return {}

    def finish(self, results: dict[str, dict], table: str = "") -> dict:
        """Keep the results of evaluations and print their table, draw the learning curve."""
        self.close()
        if self.main:
            print(table, end="\n" if table else "")
            summary = {name: {k: v for k, v in r.items() if k != "rows"} for name, r in results.items()}
            summary |= {"non_finite_gradients": self.bad_steps, "remarks": self.doctor.remarks}
            with one_line(str(self.folder)):
                write(self.folder / "summary.json", json.dumps(summary, indent=1))
                for name, result in results.items():
                    write(self.folder / "evaluations" / f"{name}.json", json.dumps(result, indent=1))
                plot_learning_curve(self.folder)
            write_page(self.folder)
            print(f"run folder: {self.folder}, its page: {self.folder / 'index.html'}")
            if self.args.push_to_hub:
                print(upload(self.folder, self.args.push_to_hub), flush=True)
        return results

    def close(self) -> None:
        """End progress bar, tracker and process group; signals do again what they did before the run."""
        self.close_bar()
        end_processes(self.accelerator)
        if self.main:
            self.locked.close()  # the folder is free again
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


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
