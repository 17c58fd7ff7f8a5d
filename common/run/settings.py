"""The settings that name a run, whatever the method: a script's `Args` extends `Settings` by what its method teaches.

A flag's range stands in its type, as in `steps: Count`; what several flags have to be together is checked in
`check_settings`, which a script calls before anything long starts and extends by its method's own checks.
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar, get_args, get_type_hints

import torch
import tyro

from common.data.messages import TEMPLATE, check_template
from common.model.load import check_model, is_tiny, newest_checkpoint
from common.model.memory import IMAGE_TOKENS, Shape, Work, find_shape
from common.model.plan import Machine, Plan, parse_machine, plan
from common.rewards.designs import check_markers, check_reward, request_for
from common.run.files import read_arguments
from common.run.progress import close_bars

T = TypeVar("T")


class Range(NamedTuple):
    """The values that a flag may have: finite numbers from `low` (or above it, where `open`) to `high`."""

    low: float
    high: float = math.inf
    open: bool = False
    ordered: bool = False  # several numbers, none below the one before

    def __str__(self) -> str:
        if self.high < math.inf and not self.open:
            return f"from {self.low:g} to {self.high:g}"
        upper = "" if self.high == math.inf else f" and at most {self.high:g}"
        return f"{'above' if self.open else 'at least'} {self.low:g}{upper}"


Natural = Annotated[int, Range(0)]
Count = Annotated[int, Range(1)]
Group = Annotated[int, Range(2)]
Weight = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, open=True)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, open=True)]
Bounds = Annotated[tuple[float, float], Range(0, ordered=True)]


@dataclass
class Settings:
    """What a run trains, on what, for how long, and what it keeps."""

    model: str = "tiny"
    """built-in `tiny`, the folder of a run or a model, or a hub id of the Qwen2-VL, Qwen2.5-VL and Qwen3-VL families"""
    lora_rank: Natural = 0  # train adapters of this rank instead of all weights (0: all weights)
    freeze: Literal["none", "vision"] = "none"  # `vision`: leave the vision tower, its mergers included, as it is
    max_pixels: Natural = 0  # bound on an image's area after resizing, in pixels (0: as the checkpoint says)
    data: str = ""
    """`puzzles`, a .jsonl or .parquet file, a folder, or a hub id (default: puzzles; geometry3k for a hub model);
    several with commas between them"""
    data_weights: tuple[Positive, ...] | None = None
    """of several `data` how often examples of each are drawn, as `3 1` (default: as often as any other example)"""
    train_split: str = "train"  # split to train on
    eval_split: str = "validation"  # split for the evaluations during training
    test_split: str = "test"  # split for the evaluations before and after training
    image_column: str = ""  # column that holds the images (default: found by the usual names)
    question_column: str = ""  # column that holds the question (default: found by the usual names)
    answer_column: str = ""  # column that holds the answer (default: found by the usual names)
    image_root: str = ""  # folder that image paths are relative to and must lie in (default: the data set's own)
    max_prompt_length: Natural = 0
    """longest prompt in tokens; longer ones are left out (0: what the model's context leaves beside a completion)"""
    kind: str = ""  # how answers are checked: math, int, letter, ... (default: math for data sets that do not say)
    prompt_template: str = TEMPLATE
    """what the model reads; {question} is filled in, and {request} with what the reward asks for"""
    reward: str = "accuracy"
    """a right answer, tagged or boxed; a design (vanilla, only_accuracy, mixture, continuous, visual_fusion,
    no_accuracy, semantic); or a function of your own, as path/to/file.py:function"""
    encoder: str = "sentence-transformers/all-mpnet-base-v2"
    """sentence encoder of `--reward semantic`, a hub id or a folder"""
    soft_punish_cache: Natural = 0
    """completions that come within so many tokens of the length limit lose up to 1 (DAPO; 0: none)"""
    top_p: PositiveShare = 1.0
    """nucleus sampling; below 1 the sampled distribution is no longer the one that is trained"""
    top_k: Natural = 0  # sample from the k likeliest tokens only (0: all), with the same caution
    steps: Count = 300  # rollouts to train for
    eval_every: Natural = 100  # steps between evaluations on `eval_split` (0: none)
    eval_examples: Count = 200  # examples of an evaluation during training
    test_examples: Natural = 500  # examples of the evaluations before and after training (0: none)
    robust_examples: Natural = 0  # test examples of the table clean / seen / unseen before and after training (0: none)
    save_every: Count = 100  # steps between checkpoints
    keep_checkpoints: Count = 2  # newest checkpoints that are kept
    out: str = ""  # run folder (default: runs/<script>-<model>-seed<seed>)
    resume: str = ""  # run folder to continue, by its own settings where no others are given
    track: str = ""  # also log to tensorboard, wandb or trackio
    push_to_hub: str = ""  # hub id owner/name to upload the last checkpoint to, with a model card
    preflight: bool = True  # before the first step check that everything fits together, and that there is a signal
    seed: Natural = 1  # everything random is a function of this, the step and the row
    slots: Natural = 0
    """rows decoded at a time, at the most, which bounds the memory of sampling (0: all); on a GPU fewer if need be"""
    offload_optimizer: bool = False
    """keep float32 masters and Adam's moments in the machine's memory, where the optimizer's step is then taken; done
    on a GPU anyway if need be"""
    micro_batch_tokens: Count = 16384
    """tokens, prompts and padding included, of one forward and backward, at the most; on a GPU fewer if need be"""
    plan: str = ""  # say what the run would hold on a machine, as "80 GB x 1" or "24 GB x 8, 256 GB", and end

    def __post_init__(self):
        """What was left open depends on the model, which of a run is its newest checkpoint."""
        self.model = newest_checkpoint(self.model)
        tiny = is_tiny(self.model)
        self.data = self.data or ("puzzles" if tiny else "hiyouga/geometry3k")
        self.prompt_template = self.prompt_template.replace("{request}", request_for(self.reward, tiny))
        usual = {"learning_rate": 3e-5 if tiny else 1e-6, "max_completion_length": 72 if tiny else 2048}
        usual |= dict.fromkeys(("kl_view_coef", "aux_coef"), 0.3 if tiny else 0.1)  # of roma.py, as the next one
        usual["robust_examples"] = 100 if tiny else 0  # 31 evaluations each time, of long completions hours
        for name, value in usual.items():
            if getattr(self, name, value) is None:
                setattr(self, name, value)


def launch(main: Callable[[T], object], settings: type[T]) -> None:
    """Run a script's `main` with its settings from the command line."""
    try:
        with memory_advice():
            main(parse(settings))
    except KeyboardInterrupt:
        close_bars()
        line = "interrupted; what was saved before stays, and --resume with the run's folder goes on from there"
        print(line, file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    finally:
        close_bars()  # a last line of error begins a line


def command_line(main: Callable[[T], object], arguments: type[T], advice: str = "--batch-prompts or --limit") -> None:
    """Run a module's `main` with its arguments from the command line; what interrupts it is a line."""
    try:
        with memory_advice(advice):
            main(tyro.cli(arguments))
    except KeyboardInterrupt:
        close_bars()
        print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    finally:
        close_bars()


def parse(settings: type[T], arguments: list[str] | None = None) -> T:
    """Settings from the command line. Those of the script come first in `--help`, in front of the inherited ones."""
    fields, own = settings.__dataclass_fields__, settings.__annotations__
    settings.__dataclass_fields__ = dict(sorted(fields.items(), key=lambda item: item[0] not in own))
    description = (sys.modules[settings.__module__].__doc__ or "").split("\n\n")[0]
    args = tyro.cli(settings, args=arguments, description=description)
    if args.resume:
        before = settings_before(settings, Path(args.resume))
        args = tyro.cli(settings, args=arguments, description=description, default=before)
    return args


def settings_before(settings: type[T], folder: Path) -> T:
    """The settings of the run in `folder`, as far as the script has them, to be continued wherever the folder is now.

    Raises:
        SystemExit: there is no run, or its args.json is damaged.
    """
    held, known = read_arguments(f"--resume {folder}", folder), {}
    for field in fields(settings):
        if field.name in held and field.name not in ("out", "resume", "plan"):
            value = held[field.name]
            known[field.name] = value = tuple(value) if isinstance(value, list) else value
            kind = (int, float) if isinstance(field.default, float) else type(field.default)
            if field.default is not None and not isinstance(value, kind):
                raise SystemExit(f"--resume {folder}: args.json is damaged ({field.name} is {value!r})")
    return settings(**known)


def check_settings(args: Settings) -> None:
    """Stop with one line where a flag is out of its range or flags contradict each other.

    Raises:
        SystemExit: names the flag and its value.
    """
    check_ranges(args)
    if args.plan:
        print(plan_of(args, parse_machine(args.plan)))
        raise SystemExit(0)
    check_model(args.model)
    check_reward(args.reward)
    args.prompt_template = check_template(args.prompt_template)
    if not is_tiny(args.model):
        check_markers(args.reward, args.prompt_template)
    if args.warmup_steps > args.steps:
        raise SystemExit(f"--warmup-steps {args.warmup_steps}: must be at most --steps {args.steps}")
    if args.max_completion_length <= args.soft_punish_cache:
        raise SystemExit(
            f"--soft-punish-cache {args.soft_punish_cache}: must be below --max-completion-length "
            f"{args.max_completion_length}, or every completion is punished"
        )


def plan_of(args: Settings, machine: Machine, splits: Sequence[Sequence] = ()) -> Plan:
    """What a run holds on a machine, from the shapes of its model and of the examples in `splits`, where those are
    known, with the largest settings that fit within the bounds of `args`.

    Raises:
        SystemExit: one line, where nothing fits, with the smallest change that would.
    """
    shape = find_shape(args.model)
    prompt, image_tokens = longest_prompt(splits, shape, args.max_pixels)
    views, noisy = 1 + getattr(args, "num_views", 0), getattr(args, "noise_images", False)
    pictures = 2 * (1 + args.group_size if noisy else views)  # those of the next step too
    if hasattr(args, "mask_per"):  # and one more of each prompt or row, made in the step
        pictures += args.group_size if args.mask_per == "row" else 1
    if noisy and args.update_image == "noisy":
        views = args.group_size
    work = Work(
        prompts=max(1, args.prompts_per_step // machine.count),
        group_size=args.group_size,
        completion=args.max_completion_length,
        prompt=prompt,
        image_tokens=image_tokens,
        views=views,
        pictures=pictures,
        prompt_a_row=noisy,
        lora_rank=args.lora_rank,
        freeze_vision=args.freeze == "vision",
        reference=bool(args.kl_coef) and not args.lora_rank,
        slots=args.slots,
        micro_batch_tokens=args.micro_batch_tokens,
        offload_optimizer=args.offload_optimizer,
    )
    return plan(args.model, machine, work)


def longest_prompt(splits: Sequence[Sequence], shape: Shape, max_pixels: int) -> tuple[int, int]:
    """About how many tokens the text of a prompt has at the most, and its pictures: those of the longest example where
    the splits tell without opening it, else usual ones."""
    most = max_pixels // shape.pixels_a_token or math.inf  # of one picture
    side = math.isqrt(shape.pixels_a_token)
    sizes = [size for examples in splits for size in getattr(examples, "shapes", ())]
    texts = [size for examples in splits for size in getattr(examples, "text_bytes", ())]
    tokens = [sum(min(-(-width // side) * -(-height // side), most) for width, height in size) for size in sizes]
    image_tokens = max(tokens) if tokens else min(IMAGE_TOKENS, most)
    return max([256, *(size // 3 + 64 for size in texts)]), image_tokens


def check_ranges(args: object) -> None:
    """Stop with one line where a flag of the dataclass `args` is out of the `Range` in its type. None is not checked.

    Raises:
        SystemExit: names the flag and its value.
    """
    classes = type(args).__mro__[:-1]  # a script that gives a setting another default keeps its range
    hints = [pair for one in classes for pair in get_type_hints(one, include_extras=True).items()]
    for name, hint in hints:
        value = getattr(args, name)
        for allowed in ranges_in(hint):
            if value == ():
                raise SystemExit(f"--{name.replace('_', '-')}: nothing stands behind it")
            for number in value if isinstance(value, tuple) else (value,):
                inside = number is None or (allowed.low <= number <= allowed.high and math.isfinite(number))
                ordered = not allowed.ordered or list(value) == sorted(value)
                if not inside or not ordered or (allowed.open and number == allowed.low):
                    given = " ".join(map(str, value)) if isinstance(value, tuple) else value
                    each = "each must be" if isinstance(value, tuple) else "must be"
                    finite = "" if math.isfinite(number) else ", and finite"
                    order = ", in order" if allowed.ordered else ""
                    raise SystemExit(f"--{name.replace('_', '-')} {given}: {each} {allowed}{finite}{order}")


def ranges_in(hint: object) -> list[Range]:
    """The ranges in a type and in what it is made of, as `tuple[Share, ...]` or `Count | None`."""
    found = [part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Range)]
    return found + [inner for part in get_args(hint) for inner in ranges_in(part)]


# How running out of memory reads: as torch, the CUDA runtime or its libraries, and the CPU's allocator put it.
OUT_OF_MEMORY = ("out of memory", "STATUS_ALLOC_FAILED", "can't allocate memory", "Cannot allocate memory", "bad_alloc")
OUT_OF_MEMORY += ("could not create a primitive", "could not create a memory")  # oneDNN's
TRAINING_ADVICE = (
    "--micro-batch-tokens (scoring and update), --prompts-per-step (sampling), --max-completion-length or --group-size "
    "(all of it) or --max-pixels (images), or train with --lora-rank"
)


@contextlib.contextmanager
def memory_advice(advice: str = TRAINING_ADVICE) -> Iterator[None]:
    """Out of memory ends in one line that names what to lower; saved checkpoints stay. Also a decorator."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        text = " ".join(str(error).split())
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(x in text for x in OUT_OF_MEMORY):
            raise
        raise SystemExit(f"out of memory: lower {advice} ({text[:160] or type(error).__name__})") from None
