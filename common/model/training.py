"""What a training loop needs of the model: set up, the rows of a step as batches, and their micro-batches."""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather
from torch.distributed.fsdp import FSDPModule

from common.model.inputs import Prompts, join
from common.model.load import Policy, load_policy
from common.model.processes import distribute, gather_weights
from common.model.scoring import Scorer, Scores


def prepare(args, accelerator: Accelerator) -> tuple[Policy, torch.nn.Module, Callable | None, torch.optim.Optimizer]:
    """The policy; what scores completions under it; the same for the initial policy, None without `kl_coef`; AdamW.

    `args` are a script's settings. Gradients of scores are averaged over processes. Where weights are sharded over
    these, the whole copy that the policy computes with follows the optimizer's steps and a checkpoint that it loads.
    """
    device = accelerator.device
    if args.offload_optimizer and device.type == "cuda":  # the step is taken there, and launchers leave one thread each
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    policy = load_policy(
        args.model,
        device=device,
        lora_rank=args.lora_rank,
        max_pixels=args.max_pixels,
        seed=args.seed,
        offload_optimizer=args.offload_optimizer,
        freeze_vision=args.freeze == "vision",
    )
    scorer = Scorer(policy, gradient_checkpointing=device.type == "cuda", slice_tokens=args.micro_batch_tokens)
    trained_scorer, parameters = distribute(scorer, accelerator, args.offload_optimizer)
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    gather_weights(scorer)
    for register in (optimizer.register_step_post_hook, optimizer.register_load_state_dict_post_hook):
        register(lambda *_: gather_weights(scorer))
    reference = None
    if args.kl_coef and args.lora_rank:  # the initial policy is the one without its adapter

        def reference(*rows):
            with policy.model.disable_adapter():
                return scorer(*rows)

    elif args.kl_coef:
        frozen = load_policy(args.model, device=device, max_pixels=args.max_pixels, trainable=False)
        frozen.work = policy.work
        reference = Scorer(frozen)
    return policy, trained_scorer, reference, optimizer


class Batch(SimpleNamespace):
    """Prompts and the completions sampled for them: R rows of T tokens, the rows of a prompt together.

    `prompts` holds one prompt a group, or one a row. A list of `Prompts` is a list of other views of the same rows. All
    other attributes are tensors [R, ...] or None, by the names that the loss uses; a method adds its own.

        ids               [R, T] int64, right-padded
        completion_mask   [R, T] bool, true up to and including the end token
        mask              [R, T] bool, tokens that count in the loss
        advantages        [R, 1] or [R, T] float32
        sampled_logprobs  [R, T] float32, as sampling computed them
        old_logprobs      [R, T] float32 of the policy that sampled, as scoring computes them
        ref_logprobs      [R, T] float32 of the initial policy
        kept              [R] bool, rows that count in the denominators of means
        trained           [R] bool, rows of groups that have a gradient
        number            [R] int64, the rows' places in the rollout
    """

    def __init__(self, **attributes):
        super().__init__(**attributes)
        if "number" not in attributes:
            self.number = torch.arange(len(self.ids), device=self.ids.device)

    def rows(self, rows: list[int], length: int | None = None) -> "Batch":
        """These rows with their prompts, cut to `length` tokens."""
        size, tokens = self.ids.shape

        def part(value):
            if isinstance(value, list):
                return [part(view) for view in value]
            if isinstance(value, Prompts):
                return value.select(list(dict.fromkeys(row * len(value) // size for row in rows)))
            if value is None:
                return None
            whole = length is None or value.ndim < 2 or value.shape[1] != tokens
            return value[rows] if whole else value[rows, :length]

        return Batch(**{name: part(value) for name, value in vars(self).items()})

    def split(self, parts: int) -> list["Batch"]:
        """The rows in as many equal parts, in order."""
        shares = torch.arange(len(self.ids)).view(parts, -1).tolist()
        return [self.rows(share) for share in shares] if parts > 1 else [self]

    def pack_views(
        self, own: list[int], viewed: list[int], group_size: int
    ) -> tuple[Prompts, list[int], list[int] | None]:
        """One batch for one forward: the rows `own`, which are whole groups, then the rows `viewed` of any groups under
        each of the `views`.

        Returns prompts, the rows' numbers and each row's place among these prompts, as `Scorer` takes them.
        """
        members = [row // group_size for row in own[::group_size]]
        if not viewed:
            return self.prompts.select(members), own, None
        # A view's prompts stand in the rollout's order, whatever order the micro-batch has them in.
        seen = sorted({row // group_size for row in viewed}, key=lambda n: int(self.number[n * group_size]))
        parts = [self.prompts.select(members)] if members else []
        packed = join(parts + [view.select(seen) for view in self.views])
        prompt_of_row = [i // group_size for i in range(len(own))]
        for k in range(len(self.views)):
            prompt_of_row += [len(members) + k * len(seen) + seen.index(row // group_size) for row in viewed]
        return packed, own + viewed * len(self.views), prompt_of_row


def rate_at(args, step: int) -> float:
    """The learning rate of step `step`, from 0 to `args.steps` - 1: up in a straight line over `warmup_steps`, then
    constant, or down in a line or half a cosine that would be 0 one step after the last. No step has a rate of 0.

    A function of the step alone, so that a resumed run has the same.
    """
    risen = min(1, (step + 1) / args.warmup_steps)
    fallen = max(0, step + 1 - args.warmup_steps) / (args.steps + 1 - args.warmup_steps)  # from 0 to below 1
    left = {"constant": 1, "linear": 1 - fallen, "cosine": (1 + math.cos(math.pi * fallen)) / 2}[args.lr_scheduler_type]
    return args.learning_rate * risen * left


def rows_of(groups: Iterable[int], group_size: int) -> list[int]:
    """The rows of some groups: rows of a prompt stand together.

    >>> rows_of([0, 2], group_size=3)
    [0, 1, 2, 6, 7, 8]
    """
    return [n * group_size + g for n in groups for g in range(group_size)]


def total_counts(batch: Batch, accelerator: Accelerator) -> list[int]:
    """Rows and tokens that count in the loss, and rows that are trained, over all processes."""
    counts = torch.stack([batch.kept.sum(), batch.mask.sum(), batch.trained.sum()])
    return accelerator.reduce(counts).tolist()


def micro_batches(batch: Batch, group_size: int, budget: int, scorer: torch.nn.Module | None = None) -> Iterator[Batch]:
    """The trained groups of a batch in micro-batches of at most `budget` tokens, prompts and padding counted.

    Groups of similar length stand together, the longest first, so that memory runs out at once or never; a group is
    never parted, since its rows share the prompt's forward (`Scorer` cuts a group above the budget into slices).

    With the `scorer` that is trained on them every process gets as many: each backward call averages gradients over
    processes, so one with fewer goes on with single tokens outside the loss. A single process with masters off the
    device sums gradients up on the device, in float32, and moves them after the last.
    """
    groups = batch.trained.view(-1, group_size).any(1).nonzero()[:, 0].tolist()
    lengths = batch.completion_mask.sum(1)  # [R]
    prompt_tokens = batch.prompts.input_ids.shape[1] * len(batch.prompts) * group_size // len(batch.ids)
    longest = lengths.view(-1, group_size).amax(1)[groups].tolist()
    cuts = cut_by_tokens(longest, prompt_tokens, group_size, budget)
    calls = len(cuts)
    if scorer is not None and PartialState().num_processes > 1:  # before the first: DDP's forwards wait for each other
        calls = int(gather(torch.tensor([calls], device=lengths.device)).max())
    for number, cut in enumerate(cuts, 1):
        sum_on_device(scorer, number < calls)
        yield batch.rows(rows_of([groups[n] for n in cut], group_size), longest[cut[0]])
    for _ in range(calls - len(cuts)):
        idle = batch.rows(list(range(group_size)), 1)
        idle.mask = torch.zeros_like(idle.mask)
        yield idle


def sum_on_device(scorer: torch.nn.Module | None, more: bool) -> None:
    """Where a single process has its masters off the device, let gradients wait there for those of the next backward
    pass, if there are `more`: moving them takes longer than computing them."""
    if isinstance(scorer, FSDPModule) and PartialState().num_processes == 1:
        scorer.set_requires_gradient_sync(not more)


def cut_by_tokens(lengths: list[int], prompt_tokens: int, group_size: int, budget: int) -> list[list[int]]:
    """Places in `lengths`, of the longest completion of each group, in batches of at most `budget` tokens each.

    >>> cut_by_tokens([5, 9, 4], prompt_tokens=10, group_size=2, budget=60)
    [[1, 0], [2]]
    """
    batches = []
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if not batches or (len(batches[-1]) + 1) * (prompt_tokens + group_size * lengths[batches[-1][0]]) > budget:
            batches.append([])
        batches[-1].append(n)
    return batches


@torch.no_grad()
def score_rows(
    scorer: Callable[..., Scores],
    batch: Batch,
    temperature: float,
    budget: int,
    visit: Callable[[Batch, Scores], None] = lambda batch, scores: None,
) -> torch.Tensor:
    """Log-probabilities [R, T] float32 of the trained rows, without gradient, in micro-batches; 0 for other rows.

    `visit` is shown each micro-batch and its scores.
    """
    scorer = getattr(scorer, "module", scorer)  # not through DDP, which would wait for the other processes
    logprobs = torch.zeros(batch.ids.shape, device=batch.ids.device)
    for mb in micro_batches(batch, len(batch.ids) // len(batch.prompts), budget):
        scores = scorer(mb.prompts, mb.ids, mb.completion_mask, temperature)
        logprobs[mb.number, : mb.ids.shape[1]] = scores.logprobs
        visit(mb, scores)
    return logprobs
