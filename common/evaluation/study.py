"""Train methods with several seeds at equal budget, evaluate every run on the same pictures, and compare in pairs.

    python -m common.evaluation.study --methods "grpo: grpo.py" "roma: roma.py" --corruptions seen --out studies/roma

Each method is `NAME: SCRIPT FLAGS`; differences are to the first. Evaluated is on the data that the methods train on,
which must be one set, with each run's own template, picture size and lengths. A run is skipped where it is finished and
continued where it was interrupted, and finished cells of an evaluation are kept, so the same command goes on where it
stopped. Written are the runs, results.json (a number a seed and figure, curves, versions, date) and plots.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from tqdm import tqdm

from common.corruptions import SEEN, UNSEEN, check_corruptions, choose
from common.data.puzzles import SPLITS
from common.evaluation.accuracy import COLUMNS
from common.evaluation.comparison import (
    AREA,
    NORM,
    SECONDS,
    area,
    compare,
    comparison_table,
    made_with,
    plot_curves,
    step_costs,
)
from common.evaluation.look import FIGURES, summarize, summary_table
from common.evaluation.robustness import CLEAN, mean_over_cells, plot_robustness, robustness_summary, robustness_table
from common.run.files import one_line, read_arguments, write
from common.run.page import read_lines
from common.run.settings import Settings, command_line, parse

ROOT = Path(__file__).parents[2]
DATA = ("data", *COLUMNS)  # flags that name a set


@dataclass
class Args:
    methods: tuple[str, ...]
    """what to compare, each `NAME: SCRIPT FLAGS`; differences are to the first"""
    out: str
    """folder for the runs and the results"""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """training seeds; runs of the same seed are compared with each other"""
    splits: tuple[str, ...] = ()
    """splits to evaluate on (default: test and shifted of the puzzles, the runs' test split of any other set)"""
    corruptions: tuple[str, ...] = ()
    """also corrupt the pictures of the first split: names, `seen`, `unseen`, `all`"""
    severities: tuple[int, ...] = (1, 3, 5)
    """severities of these corruptions"""
    limit: int = 500
    """examples of a split, answered greedily"""
    samples: int = 0
    """also answer each of them so many times at temperature 1 (0: not)"""
    curve: int = 0
    """also evaluate on validation examples every so many steps of training (0: not)"""
    probes: int = 0
    """examples of the first split to probe, see common/evaluation/probes.py (0: none)"""
    look: int = 0
    """examples to measure visual dependency and focus on, see common/evaluation/look.py (0: none)"""
    jobs: int = 0
    """runs at a time, each on one CPU thread where there are several (0: two, or one where there is a GPU)"""


def execute(args: Args, name: str, seed: int, arguments: list[str], log: Path) -> None:
    """A command of this project in a process of its own, its output behind what `log` holds.

    Raises:
        SystemExit: it ended with an error; its last line, and where its output is.
    """
    environment = dict(os.environ) | ({"OMP_NUM_THREADS": "1"} if args.jobs > 1 else {})
    with log.open("a") as output:
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, stdout=output, stderr=output)
    if done.returncode:
        last = said(log.read_text(errors="replace"))[-1:]
        raise SystemExit(f"{name}, seed {seed}: stopped with {done.returncode}: {''.join(last)} (see {log})")


def train_and_evaluate(args: Args, name: str, command: list[str], seed: int) -> dict[str, dict]:
    """One run and its evaluations: accuracy of every example in every cell, a split; figures of every example looked at
    as `look`; one number a figure as `figures`; validation accuracy by step as `curve`."""
    folder = Path(args.out) / f"{name}-seed{seed}"
    trained_by, log = Path(f"{folder}.command"), Path(f"{folder}.log")
    if not (folder / "args.json").is_file():  # what never began, say for a mistyped flag, binds nobody
        trained_by.write_text(shlex.join(command))
    if not (folder / "summary.json").is_file():
        begun = any(folder.glob("checkpoints/step-*/complete"))
        flags = ["--seed", str(seed), "--test-examples", "0", "--eval-every", str(args.curve), "--no-preflight"]
        place = ["--resume" if begun else "--out", str(folder.resolve())]
        execute(args, name, seed, [*command, *flags, *place], log)
        if not (folder / "summary.json").is_file():  # a run that was told to stop has saved and ends without an error
            raise SystemExit(f"{name}, seed {seed}: stopped before its end; the same command goes on")
    run = lambda arguments: execute(args, name, seed, arguments, log)
    found = evaluate_policy(args, folder.resolve(), str(folder.resolve()), read_settings(args, folder), run)
    lines = read_lines(folder / "metrics.jsonl")
    found["curve"] = [(line["step"], line["eval/accuracy"]) for line in lines if "eval/accuracy" in line]
    if args.curve and found["curve"]:
        found["figures"][AREA] = area(found["curve"])
    if lines:
        found["figures"][SECONDS] = mean(line["seconds"] for line in lines)
    if norms := [line["grad_norm"] for line in lines if line.get("grad_norm") is not None]:
        found["figures"][NORM] = mean(norms)
    return found


def evaluate_before(args: Args, name: str, seed: int) -> dict[str, float]:
    """The same figures of the policy that a run began with, asked in the run's words."""
    trained, folder = read_settings(args, Path(args.out) / f"{name}-seed{seed}"), Path(args.out) / "before"
    folder.mkdir(exist_ok=True)
    words = [f"--prompt-template={trained['prompt_template']}"]
    words += [f"--max-completion-length={trained['max_completion_length']}"]
    run = lambda arguments: execute(args, "before", seed, [*arguments, *words], folder / "log")
    args = replace(args, corruptions=(), look=0)
    return evaluate_policy(args, folder.resolve(), trained["model"], trained, run)["figures"]


def read_settings(args: Args, folder: Path) -> dict:
    return read_arguments(f"--out {args.out}", folder)


def evaluate_policy(
    args: Args, folder: Path, model: str, trained: dict, run: Callable[[list[str]], None]
) -> dict[str, dict]:
    """What a study measures of a policy on the data of the settings `trained`; `run` executes a command, and what it
    finds is kept in `folder`."""
    columns = [word for key in DATA if trained.get(key) for word in (f"--{key.replace('_', '-')}", trained[key])]
    more = []
    for key in ("max_pixels", "max_prompt_length"):
        more += [f"--{key.replace('_', '-')}", str(trained.get(key, 0))]
    cells, figures = {}, {}
    for split in args.splits:
        file = folder / "evaluations" / f"{split}-{args.limit}.json"
        corrupted = args.corruptions if split == args.splits[0] else ()
        flags = ["--corruptions", *corrupted, "--severities", *map(str, args.severities)] if corrupted else []
        asked = ["-m", "common.evaluation", "--model", model, "--split", split, "--limit", str(args.limit)]
        if corrupted or not file.is_file():
            file.parent.mkdir(exist_ok=True)
            run([*asked, "--out", str(file), *columns, *more, *flags])
        result = read_result(file, "models", model)
        held = result.get("cells") or {CLEAN: [mean(row["correct"]) for row in result["rows"]]}
        # An earlier command may have asked for more of this run than of those that came later.
        wanted = [CLEAN, *(f"{name}/{level}" for name in choose(corrupted) for level in args.severities)]
        cells[split] = {cell: held[cell] for cell in wanted}
        figures[f"{split}, greedy"] = mean(held[CLEAN])
        for title, names in (("seen", SEEN), ("unseen", UNSEEN)):
            if (values := mean_over_cells(cells[split], names)) is not None:
                figures[f"{split}, {title} corruptions"] = float(values.mean())
        if args.samples:
            file = file.with_stem(f"{split}-{args.limit}-sampled-{args.samples}")
            drawn = ["--samples", str(args.samples), "--temperature", "1"]
            if not file.is_file():
                run([*asked, *drawn, "--out", str(file), *columns, *more])
            figures[f"{split}, sampled"] = read_result(file, "models", model, "accuracy")
    if args.probes:
        file = folder / "probes" / "probes.json"
        if not file.is_file() or read_result(file, "args", "limit") != args.probes:
            # Of puzzles without a hint: the probe adds hints of its own.
            plain = [re.sub("^puzzles:.*", "puzzles", word) for word in columns]
            run(["-m", "common.evaluation.probes", "--model", model, "--split", args.splits[0],
                 "--limit", str(args.probes), "--out", str(file.parent), *plain, *more])  # fmt: skip
        figures |= {figure: value["mean"] for figure, value in read_result(file, "summary", model).items()}
        for part in read_result(file, "readings").get(model, {}).values():
            figures |= {f"{what} read right": value for what, value in part.items() if value is not None}
    if args.look:
        file = folder / "look" / "look.json"
        if not file.is_file() or len(next(iter(read_result(file, "examples").values()))) != args.look:
            run(["-m", "common.evaluation.look", "--model", model, "--split", args.splits[0],
                 "--limit", str(args.look), "--out", str(file.parent), *columns, *more])  # fmt: skip
        (rows,) = read_result(file, "examples").values()
        cells["look"] = {figure: [row[figure] for row in rows] for figure in FIGURES}
    return cells | {"figures": figures}


def read_result(file: Path, *keys: str) -> dict:
    """What an evaluation has written under these keys.

    Raises:
        SystemExit: the file is damaged.
    """
    try:
        value = json.loads(file.read_text())
        for key in keys:
            value = value[key]
        return value
    except (ValueError, LookupError, TypeError):
        raise SystemExit(f"{file}: damaged; remove it, and the same command makes it again") from None


def said(text: str) -> list[str]:
    """The lines of an output that say something, without the frame of an error of the command line."""
    lines = [line.strip("│| ") for line in text.splitlines()]
    return [line for line in lines if re.search(r"\w", line) and "--help" not in line]


def settings_of_method(method: str, command: list[str]) -> Settings | None:
    """What a method's script makes of its flags; None of a script that is built otherwise.

    Raises:
        SystemExit: one line, where a flag is unknown or has no such value.
    """
    spec = importlib.util.spec_from_file_location(f"study_{Path(command[0]).stem}", ROOT / command[0])
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not issubclass(getattr(module, "Args", object), Settings):
        return None
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            return parse(module.Args, command[1:])
    except SystemExit as error:
        reason = error.code if isinstance(error.code, str) else " ".join(said(output.getvalue())[1:2])
        raise SystemExit(f"--methods {method!r}: {reason}") from None


def common_data(methods: dict[str, Settings | None]) -> tuple[str, str]:
    """The one set that all methods train on, and their test split.

    Raises:
        SystemExit: they train on several, or leave out other prompts of one, so that nothing they could be compared on
            would be every method's own.
    """
    sets = {}
    for name, settings in methods.items():
        if settings is not None:
            key = tuple(getattr(settings, flag) for flag in (*DATA, "test_split"))
            bound = f"--max-prompt-length {settings.max_prompt_length}" if settings.max_prompt_length else ""
            sets.setdefault((*key, bound), []).append(name)
    if len(sets) > 1:
        texts = [f"{names[0]} on " + " ".join(map(str, filter(None, key))) for key, names in sets.items()]
        raise SystemExit(f"--methods: they train on different data ({'; '.join(texts)}); a study compares on one set")
    (key,) = sets or [("puzzles", "test", "")]
    if "," in key[0]:
        raise SystemExit(f"--methods: they train on several sets ({key[0]}); a study compares on one set")
    return key[0], key[-2]


def main(args: Args) -> None:
    commands, methods = {}, {}
    for method in args.methods:
        name, _, command = method.partition(":")
        script = shlex.split(command)[:1]
        if not script or not (ROOT / script[0]).is_file():
            raise SystemExit(f"--methods {method!r}: must be `NAME: SCRIPT FLAGS`, with a script of this project")
        name = name.strip()
        if not re.fullmatch(r"[\w. +-]+", name):
            raise SystemExit(
                f"--methods {method!r}: the name {name!r} must be letters, digits, spaces and any of . _ + -"
            )
        if name in (*commands, "before"):
            raise SystemExit(f"--methods {method!r}: there are two of the name {name!r}")
        commands[name] = shlex.split(command)
        methods[name] = settings_of_method(method, commands[name])
        for seed in args.seeds:
            file = Path(args.out) / f"{name}-seed{seed}.command"
            begun = (file.with_suffix("") / "args.json").is_file() and file.exists()
            if begun and file.read_text() != shlex.join(commands[name]):
                raise SystemExit(f"--methods {method!r}: {file} says it was `{file.read_text()}`; use another --out")
    if args.corruptions:
        check_corruptions(args.corruptions, args.severities)
    if (
        args.jobs < 0
        or args.limit < 1
        or not args.methods
        or not args.seeds
        or min(args.look, args.samples, args.curve, args.probes) < 0
    ):
        raise SystemExit("--limit, --methods, --seeds: at least one of each; the other numbers: at least 0")
    if len(set(args.seeds)) < len(args.seeds):
        raise SystemExit(f"--seeds {' '.join(map(str, args.seeds))}: each only once")
    data, test = common_data(methods)
    puzzles = data.split(":")[0] == "puzzles"
    splits = args.splits or (("test", "shifted") if puzzles else (test,))
    if unknown := set(splits) - set(SPLITS) if puzzles else ():
        raise SystemExit(f"--splits {' '.join(sorted(unknown))}: choose among {', '.join(SPLITS)}")
    args = replace(args, splits=splits, jobs=args.jobs or (1 if torch.cuda.is_available() else 2))
    with one_line(f"--out {args.out}"):
        Path(args.out).mkdir(parents=True, exist_ok=True)

    # Seeds outside, so that an unfinished study has all methods of its first seeds.
    runs = [(name, seed) for seed in args.seeds for name in commands]
    form = "{n_fmt}/{total_fmt} runs {bar:12} {elapsed} so far"  # a rate would be that of runs found finished
    bar = tqdm(total=len(runs), bar_format=form, ascii=" ━", mininterval=0)
    task: Callable = lambda run: (train_and_evaluate(args, run[0], commands[run[0]], run[1]), bar.update())[0]
    pool = ThreadPoolExecutor(args.jobs)
    try:
        results = dict(zip(runs, pool.map(task, runs), strict=True))
    except KeyboardInterrupt:
        print("stopping: runs under way are saved first; Ctrl-C again stops at once", file=sys.stderr, flush=True)
        raise SystemExit(f"--out {args.out}: interrupted; the same command goes on") from None
    finally:
        pool.shutdown(cancel_futures=True)  # what is running is waited for
        bar.close()

    summaries = {}
    for split in args.splits:
        models = {}  # a method, a cell: [seeds, examples]
        for name in commands:
            runs = [results[name, seed][split] for seed in args.seeds]
            models[name] = {cell: [run[cell] for run in runs] for cell in runs[0]}
        counts = {name: len(cells[CLEAN][0]) for name, cells in models.items()}
        if len(set(counts.values())) > 1:  # of models whose tokens are not the same
            raise SystemExit(
                f"{split}: --max-prompt-length leaves examples by method {counts}: nothing to compare in pairs"
            )
        summaries[split] = robustness_summary(models)
        count, seeds = len(models[name][CLEAN][0]), ", ".join(map(str, args.seeds))
        print(f"\n{split}: {count} examples, seeds {seeds}, mean over seeds")
        print(robustness_table(summaries[split]))
    if args.look:
        figures = {
            name: {f: np.array([results[name, seed]["look"][f] for seed in args.seeds]) for f in FIGURES}
            for name in commands
        }
        summaries["look"] = summarize(figures)
        print(f"\n{args.look} examples of {args.splits[0]}, late: the last half of a completion")
        print(summary_table(summaries["look"]))
    figures = {}  # method -> figure -> a number a seed
    for name in commands:
        own = [results[name, seed]["figures"] for seed in args.seeds]
        figures[name] = {figure: [run[figure] for run in own] for figure in own[0] if all(figure in run for run in own)}
    summary = compare(figures)
    try:
        before = evaluate_before(args, next(iter(commands)), args.seeds[0])
        summary = {"before": {name: {"mean": value} for name, value in before.items()}, **summary}
    except SystemExit as error:  # say the checkpoint that they began with is gone
        print(f"without the policy before training: {error}")
    print(f"\nmeans over seeds; in brackets the paired difference to {next(iter(commands))}, 95 % over seeds")
    print(comparison_table(summary))
    curves = {name: [results[name, seed]["curve"] for seed in args.seeds] for name in commands}
    content = {
        **made_with(),
        "args": {name: value for name, value in asdict(args).items() if name not in ("methods", "out", "jobs")},
        "methods": {name: shlex.join(command) for name, command in commands.items()},
        "figures": summary,
        "curves": curves,
        "splits": summaries,
    }
    with one_line(f"--out {args.out}"):
        write(Path(args.out) / "results.json", json.dumps(content, indent=1))
        if args.curve:
            plot_curves(curves, Path(args.out) / "curves.png", step_costs(summary))
        if args.corruptions:
            plot_robustness(summaries[args.splits[0]], Path(args.out) / "robustness.png")


if __name__ == "__main__":
    command_line(main, Args)
