"""The prompts that each step of a training draws."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator

from common.data.examples import Example, load_examples
from common.data.lengths import leave_out_long
from common.data.messages import build_messages
from common.data.mixture import load_mixture
from common.model.inputs import Prompts, encode_prompts
from common.model.load import Policy
from common.rewards.designs import check_reward

T = TypeVar("T")


def load_splits(args) -> tuple[Sequence[Example], Sequence[Example], Sequence[Example]]:
    """The examples to train on, to evaluate on during training, and to test on before and after; empty where a script's
    settings `args` ask for no such evaluation."""
    columns = {
        name: getattr(args, name) for name in ("image_column", "question_column", "answer_column", "kind", "image_root")
    }
    draws = args.steps * args.prompts_per_step

    def load(split: str, weights: Sequence[float] | None = None, **counts: int) -> Sequence[Example]:
        return load_mixture(
            args.data, weights, partial(load_examples, split=split, seed=args.seed, **columns), **counts
        )

    train = load(args.train_split, args.data_weights, draws=draws)
    check_reward(args.reward, train[0])
    held_out = load(args.eval_split, limit=args.eval_examples) if args.eval_every else []
    test = load(args.test_split, limit=args.test_examples) if args.test_examples else []
    return train, held_out, test


def fitting_prompts(args, policy: Policy, splits: Sequence[Sequence[Example]]) -> list[Sequence[Example]]:
    """The splits without examples whose prompts are above `max_prompt_length`, which are counted and named."""
    limits = policy, args.prompt_template, args.max_prompt_length, args.max_completion_length
    return [leave_out_long(examples, *limits) for examples in splits]


def local_places(args, accelerator: Accelerator) -> list[int]:
    """The places of this process's prompts among those of a step, for each optimizer step its share: an optimizer step
    sees the same prompts on any number of processes."""
    shares = torch.arange(args.prompts_per_step).view(args.updates_per_rollout, accelerator.num_processes, -1)
    return shares[:, accelerator.process_index].flatten().tolist()


def draw_prompts(
    args, policy: Policy, train: Sequence[Example], step: int, places: list[int]
) -> tuple[list[Example], Prompts]:
    """The examples that stand at `places` of a step, a pure function of seed and step, and their prompts."""
    indices = batch_indices(args.seed, step, args.prompts_per_step, len(train))
    examples = [train[indices[place]] for place in places]
    messages = [build_messages(example, args.prompt_template) for example in examples]
    return examples, encode_prompts(policy, messages, [list(example.images) for example in examples])


def batch_indices(seed: int, step: int, size: int, length: int) -> list[int]:
    """Which examples step `step` draws: a pure function, so that a resumed run goes on where it stopped.

    Steps walk through one random order of the set after another; within an epoch no example comes twice. A batch that
    reaches over the end of an epoch takes its rest from the next.
    """
    indices = []
    while len(indices) < size:
        epoch, start = divmod(step * size + len(indices), length)
        indices += epoch_order(seed, epoch, length)[start : start + size - len(indices)].tolist()
    return indices


def prefetch(work: Callable[[int], T], steps: range, in_thread: bool) -> Iterator[tuple[int, Callable[[], T]]]:
    """Each step with a function that returns `work(step)`; in a thread the next step's work is done meanwhile.

    Opening and processing images takes processor time that is free while a GPU trains. Where the processor itself
    trains, a thread beside it would only slow both down.
    """
    if not in_thread:
        yield from ((step, partial(work, step)) for step in steps)
        return
    with ThreadPoolExecutor(1) as pool:
        coming = [pool.submit(work, step) for step in steps[:1]]
        for step in steps:
            coming += [pool.submit(work, after) for after in steps[step - steps.start + 1 :][:1]]
            yield step, coming.pop(0).result


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(length)
