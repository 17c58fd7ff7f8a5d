"""Before the first step: does everything fit together, and is there anything to learn from?

Every process does the same on the same examples, so that all of them stop or go on; nothing that training depends on is
changed: no number of a global generator is drawn, no weight or state of the optimizer moves, gradients are cleared.

What cannot be right stops the run with a line that names the flag, file or row; what is doubtful is a remark.
"""

import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from common.data.examples import Example
from common.data.messages import build_messages
from common.data.prompts import batch_indices
from common.model.decoder import Decoder, can_record
from common.model.inputs import Prompts, encode_prompts
from common.model.layers import precision
from common.model.load import Policy, load_policy, save_policy
from common.model.sampling import Rollout, decode, sample, uniform_numbers
from common.model.scoring import Scorer
from common.model.training import cut_by_tokens, rows_of, sum_on_device
from common.rewards.answers import check, extract, score
from common.rewards.designs import DESIGNS, design_rewards
from common.run.doctor import endings_of

SHOWN = 3  # examples that are printed
MOST_PROMPTS = 128  # examples that are answered
COMPARED = 16  # of these, whose completions are scored in several ways
STEP = 2**31  # stands for a step in the seeds of what is drawn here, beyond any of training
# Sampling's and scoring's log-probabilities of a token may lie so far apart, in nats, mean over tokens: some thousand
# times and some ten times what rounding does (1e-7 in float32, 0.005 in bf16).
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 0.05}
BLIND = 0.01  # nats a token between the real picture and a grey one, below which a policy does not look
LARGEST_COPY = 2 * 2**30  # bytes of weights that are written and read again; of more only the disk's space is looked at


def preflight(
    args,
    policy: Policy,
    scorer: Scorer,
    optimizer: torch.optim.Optimizer,
    train: Sequence[Example],
    folder: Path,
    processes: int = 1,
    say: Callable[[str], None] = print,
) -> list[dict]:
    """Check a run that is set up; `args` are a script's, `folder` is where checkpoints go, `say` shows a line.

    Returns remarks: `{"step": 0, "rule": ..., "text": ...}`.

    Raises:
        SystemExit: one line, on every process alike, that names what to change.
    """
    numbers = batch_indices(args.seed, 0, prompts_answered(args, processes), len(train))
    examples = [train[n] for n in dict.fromkeys(numbers)]
    devices = [policy.device] if policy.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        remarks = [*weights_remarks(args, policy)]
        say(f"preflight: {len(examples)} of {len(train):,} examples of {args.data}")
        remarks += reference_remarks(args, examples)
        remarks += picture_remarks(args, examples)
        prompts = encode(args, policy, examples)
        for line in describe(policy, examples[:SHOWN], prompts):
            say(line)
        rollout = answer(args, policy, prompts, processes)
        remarks += answer_remarks(args, policy, examples, rollout, say)
        remarks += comparison_remarks(args, policy, scorer, examples, rollout, say)
        dry_step(args, scorer, optimizer, train, processes, say)
        checkpoint_returns(args, policy, optimizer, folder, say)
    return [{"step": 0, "rule": rule, "text": text} for rule, text in remarks]


def prompts_answered(args, processes: int) -> int:
    """As many prompts as are sampled for at once in an evaluation, at least those of a step."""
    at_once = args.micro_batch_tokens // args.max_completion_length
    return max(args.prompts_per_step // processes, min(MOST_PROMPTS, at_once), 2)


def encode(args, policy: Policy, examples: Sequence[Example], pictures: list | None = None) -> Prompts:
    messages = [build_messages(e, args.prompt_template) for e in examples]
    return encode_prompts(policy, messages, pictures or [list(e.images) for e in examples])


def name_of(args, example: Example) -> str:
    return f"--data {args.data}, row {example.id or '(without an id)'}"


def weights_remarks(args, policy: Policy) -> Iterable[tuple[str, str]]:
    """Damaged weights; a learning rate that is nothing or everything to them."""
    sizes = []
    for name, parameter in policy.model.named_parameters():
        values = parameter.detach()
        values = values.to_local() if isinstance(values, DTensor) else values
        if bad := int((~values.isfinite()).sum()):
            raise SystemExit(
                f"preflight: --model {args.model}: {bad:,} values of {name} are not numbers: the weights are damaged"
            )
        if values.ndim > 1 and "lora_" not in name:
            if values.numel() and not values.any():
                yield "zero_weights", f"--model {args.model}: {name} is all zeros: the weights may be damaged."
            if parameter.requires_grad:
                sizes.append(float(values.float().square().mean().sqrt()))
    if not args.learning_rate:
        yield "no_change", "--learning-rate 0: nothing will change."
    elif sizes:
        # AdamW moves a weight by at most about the learning rate a step.
        size = sorted(sizes)[len(sizes) // 2]
        share = args.learning_rate / size
        # Float32 numbers are 2^-24 to 2^-23 of their size apart: half of that is rounded away, every step anew.
        if share < 2**-25:
            yield (
                "no_change",
                f"--learning-rate {args.learning_rate:g}: lost in rounding beside weights of a typical size of "
                f"{size:.2g}: nothing will change.",
            )
        # Usual rates move a weight by a thousandth of its size or less; at a hundredth a hundred steps replace it.
        elif share > 0.01:
            yield (
                "learning_rate_too_high",
                f"--learning-rate {args.learning_rate:g}: a step moves weights by up to {share:.1%} of their typical "
                f"size of {size:.2g}; a rate of {0.001 * size:.0e} moves them by a thousandth.",
            )


def reference_remarks(args, examples: Sequence[Example]) -> Iterable[tuple[str, str]]:
    """The reward must give its full marks for a right verdict to the reference answer itself."""
    given = [f"<think></think><answer>{e.answer}</answer>" for e in examples]
    verdicts, _ = score(given, examples, "tag")
    failed = [n for n, right in enumerate(verdicts) if not right]
    if failed:
        first = examples[failed[0]]
        status = check(given[failed[0]], first.answer, first.kind, first.choices).status
        text = (
            f"{name_of(args, first)}: the reference answer {first.answer!r} is not judged right itself (kind "
            f"{first.kind}: {status}); {len(failed)} of {len(examples)} are so. Pass another --kind or mend the rows."
        )
        if len(failed) > len(examples) // 20:
            raise SystemExit(f"preflight: {text}")
        yield "reference_not_right", text
    pays = design_rewards(args.reward, [given[0], ""], [examples[0]] * 2, [1.0, 0.0], args.encoder)[0]
    if pays[0] <= pays[1]:
        yield (
            "constant_reward",
            f"--reward {args.reward} pays {pays[0]:g} for the reference answer of {name_of(args, examples[0])} and "
            f"{pays[1]:g} for an empty completion: it does not tell right from wrong.",
        )


def picture_remarks(args, examples: Sequence[Example]) -> Iterable[tuple[str, str]]:
    """Pictures of a single colour, and one picture for several rows that ask the same and answer otherwise."""
    blank = [e for e in examples if any(low == high for low, high in extremes(e))]
    if len(blank) > len(examples) // 10:
        yield (
            "blank_pictures",
            f"The pictures of {len(blank)} of {len(examples)} rows are of a single colour, the first "
            f"{name_of(args, blank[0])}: see whether --image-column is right and the files are whole.",
        )


def extremes(example: Example) -> list[tuple[tuple, tuple]]:
    """The darkest and the brightest value of each channel of each picture."""
    return [tuple(zip(*channels, strict=True)) for channels in map(Image.Image.getextrema, example.images)]


def describe(policy: Policy, examples: Sequence[Example], prompts: Prompts) -> Iterable[str]:
    """A line an example: picture, tokens, reference answer."""
    of_images = (prompts.input_ids == policy.base.config.image_token_id).sum(1).tolist()
    lengths = prompts.attention_mask.sum(1).tolist()
    for n, example in enumerate(examples):
        sizes = ", ".join(f"{i.width} x {i.height}" for i in example.images) or "no picture"
        question = " ".join(example.question.replace("<image>", "").split())
        yield (
            f"  {example.id:<14.14} {sizes} px: {of_images[n]} of {lengths[n]} tokens, answer {example.answer!r:.30} "
            f"({example.kind})  {question:.60}"
        )


def answer(args, policy: Policy, prompts: Prompts, processes: int) -> Rollout:
    """Completions of some prompts, as many rows as a step has, at the run's own settings."""
    each = max(1, args.prompts_per_step // processes * args.group_size // len(prompts))
    draws = uniform_numbers(args.seed, STEP, list(range(len(prompts) * each)), args.max_completion_length)
    how = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k, "slots": args.slots}
    return sample(policy, prompts, each, args.max_completion_length, draws, **how)


def answer_remarks(args, policy, examples, rollout: Rollout, say) -> Iterable[tuple[str, str]]:
    """How many answers of the policy can be read, how many are right, and how many would be right in other rows."""
    completions = decode(policy, rollout)
    each = len(completions) // len(examples)
    asked = [e for e in examples for _ in range(each)]
    verdicts, counts = score(completions, asked, "tag" if args.reward in DESIGNS else "auto")
    count, right, read = len(asked), int(sum(verdicts)), counts["ok"]
    cut = int((~rollout.ended).sum())
    chance = chance_level(completions[::each], examples)
    elsewhere = "" if chance is None else f" ({chance:.0%} if checked with other rows' answers)"
    form = f"{read} ({read / count:.0%}) in the form that is asked for"
    say(f"  policy as it is: {right} of {count} answers right{elsewhere}, {form}, {cut} cut off")
    shown = "; ".join(f"{n} times …{end!r}" for end, n in Counter(endings_of(completions)).most_common(3))
    if not right:
        most = 3 / count  # 95 %: the rule of three
        signal = 1 - (1 - most) ** args.group_size
        given = Counter(found for text in completions if (found := extract(text)[0]) is not None)
        answers = ", ".join(repr(a) for a, _ in given.most_common(3)) or "none"
        references = ", ".join(repr(e.answer) for e in examples[:3])
        if given.total() < count / 2:
            hint = "Ask for the form in --prompt-template or train on demonstrations first"
        else:
            hint = "See whether --answer-column and --kind fit; easier examples, a better model, a larger --group-size"
        if cut > count / 2:
            hint = "Most completions were cut off: raise --max-completion-length"
        yield (
            "none_right",
            f"None of {count} completions is right, {read} could be understood: a group of {args.group_size} has a "
            f"right one with a chance of at most {signal:.0%}, and without one it teaches nothing. The policy's "
            f"commonest answers: {answers}; references: {references}. {hint}."
            + (f" Endings that were not understood: {shown}." if shown else ""),
        )
    if right and cut > count / 4:
        yield (
            "length_limit",
            f"{cut} of {count} completions are cut off at {args.max_completion_length} tokens: raise "
            "--max-completion-length.",
        )
    if right and read < count / 2:
        yield (
            "not_understood",
            f"Only {read} of {count} completions have an answer that is understood. Ask for the form in "
            f"--prompt-template. Endings: {shown}.",
        )
    if right > 0.95 * count:
        yield "too_easy", f"{right} of {count} completions are right before any training: take harder examples."
    # A policy that reads its pictures is right more often than by chance; one standard error above it is the line.
    spread = math.sqrt(chance * (1 - chance) / len(examples)) if chance is not None else 0
    if right and chance is not None and len(examples) >= 64 and right / count <= chance + 2 * spread:
        yield (
            "answers_fit_other_rows",
            f"{right / count:.0%} of the completions are right, and {chance:.0%} would be with the answers of other "
            "rows of their kind: the pictures may belong to other rows (look at some), or the policy cannot read them "
            "yet.",
        )


def chance_level(completions: Sequence[str], examples: Sequence[Example]) -> float | None:
    """The share of completions that the answers of other rows of the same group and kind would find right; None where
    there are no such rows, or comparing costs more than text work."""
    pairs = [
        (text, other)
        for text, own in zip(completions, examples, strict=True)
        for other in examples
        if other is not own and (other.group, other.kind) == (own.group, own.kind) and other.kind != "math"
    ]
    if not pairs:
        return None
    return sum(check(text, e.answer, e.kind, e.choices).correct for text, e in pairs) / len(pairs)


@torch.no_grad()
def comparison_remarks(args, policy, scorer, examples, rollout: Rollout, say) -> Iterable[tuple[str, str]]:
    """Scores of the same completions: as they were sampled, with pictures exchanged, with grey ones."""
    each = len(rollout) // len(examples)
    some = examples[:COMPARED]
    rows = [n * each for n in range(len(some))]
    length = int(rollout.completion_mask[rows].sum(1).max())
    ids, mask = rollout.completion_ids[rows, :length], rollout.completion_mask[rows, :length]  # [COMPARED, T]
    prompts = encode(args, policy, some)

    def scores(prompts: Prompts) -> torch.Tensor:
        """Log-probabilities [tokens] of all completions, a few prompts at a time."""
        parts = []
        width = prompts.input_ids.shape[1]
        for batch in cut_by_tokens(mask.sum(1).tolist(), width, 1, args.micro_batch_tokens):
            parts.append((batch, scorer(prompts.select(batch), ids[batch], mask[batch], args.temperature).logprobs))
        order = torch.tensor([n for batch, _ in parts for n in batch], device=ids.device).argsort()
        return torch.cat([logprobs for _, logprobs in parts])[order][mask]

    own = scores(prompts)
    apart = float((own - rollout.logprobs[rows, :length][mask]).abs().mean())
    with policy.autocast():
        allowed = AGREEMENT.get(precision(next(policy.model.parameters())), 0.05)
    if not apart <= allowed:
        raise SystemExit(
            f"preflight: sampling's and scoring's log-probabilities lie {apart:.2g} nats a token apart (at most "
            f"{allowed:g}): --model {args.model} is not computed alike by both, and training would be wrong"
        )
    say(f"  sampling and scoring agree to {apart:.1g} nats a token")
    if can_record(policy.device) and Decoder.may_record:
        recorded_equals_plain(args, policy, prompts, allowed, say)

    if prompts.pixel_values is None:
        return
    pictures = [list(e.images) for e in some]
    turned = [pictures[other] for other in exchanged(pictures)]
    if turned != pictures:
        moved = float((own - scores(encode(args, policy, some, turned))).abs().max())
        if moved < 1e-6:
            raise SystemExit(
                f"preflight: exchanging the pictures of {name_of(args, some[0])} and others changes no "
                f"log-probability: --model {args.model} does not get its pictures"
            )
    grey = [[Image.new("RGB", image.size, (128, 128, 128)) for image in row] for row in pictures]
    reliance = float((own - scores(prompts.with_images(policy, grey))).mean())
    say(f"  a grey picture in place of the real one costs {reliance:.2f} nats a token")
    if reliance < BLIND:
        yield (
            "image_ignored",
            f"Completions are {reliance:.3f} nats a token likelier with their pictures than with grey ones: the "
            "policy hardly looks. Do the answers follow from the questions alone? See whether the pictures are right.",
        )


def exchanged(pictures: list[list[Image.Image]]) -> list[int]:
    """For each prompt the next one with as many other pictures, itself where there is none."""
    return [
        next(
            (m % len(pictures) for m in range(n + 1, n + len(pictures)) if differ(own, pictures[m % len(pictures)])), n
        )
        for n, own in enumerate(pictures)
    ]


def differ(one: list[Image.Image], other: list[Image.Image]) -> bool:
    return len(one) == len(other) and any(a.tobytes() != b.tobytes() for a, b in zip(one, other, strict=True))


def recorded_equals_plain(args, policy: Policy, prompts: Prompts, allowed: float, say) -> None:
    """On CUDA the decoder's steps are recorded as graphs: with the same draws they sample what plain steps do."""
    length = min(64, args.max_completion_length)
    draws = uniform_numbers(args.seed, STEP + 1, list(range(len(prompts))), length)
    recorded = sample(policy, prompts, 1, length, draws, temperature=args.temperature)
    Decoder.may_record = False
    try:
        plain = sample(policy, prompts, 1, length, draws, temperature=args.temperature)
    finally:
        Decoder.may_record = True
    # Behind the first token that differs, by rounding, there is nothing to compare.
    width = min(recorded.completion_ids.shape[1], plain.completion_ids.shape[1])
    same = (recorded.completion_ids[:, :width] == plain.completion_ids[:, :width]).cumprod(1).bool()
    same &= recorded.completion_mask[:, :width] & plain.completion_mask[:, :width]
    apart = float((recorded.logprobs[:, :width] - plain.logprobs[:, :width])[same].abs().mean())
    if not apart <= allowed:
        raise SystemExit(
            f"preflight: the recorded decoder's log-probabilities lie {apart:.2g} nats a token from the plain one's "
            f"(at most {allowed:g}): report this, with the GPU's and torch's names"
        )
    say(f"  recorded and plain decoding agree to {apart:.1g} nats a token")


def dry_step(args, scorer: Scorer, optimizer, train: Sequence[Example], processes: int, say) -> None:
    """Sample, and go forward and backward, at the largest shapes that flags and data allow, and clear the gradients:
    where memory runs out, it does so here. The prompts are those with the largest pictures."""
    policy, size = scorer.policy, args.group_size
    count = args.prompts_per_step // processes
    sizes = getattr(train, "sizes", ())  # puzzles are all of one size
    largest = sorted(range(len(sizes) or count), key=lambda n: -sizes[n] if sizes else 0)[:count]
    prompts = encode(args, policy, [train[n] for n in largest])
    draws = uniform_numbers(args.seed, STEP, list(range(len(prompts) * size)), args.max_completion_length)
    endless = replace(policy, end_token_ids=[-1])  # no token ends a row: all go to the limit
    how = {"temperature": args.temperature, "slots": args.slots}
    ids = sample(endless, prompts, size, args.max_completion_length, draws, **how).completion_ids  # [R, T]
    moments = [torch.empty_like(p) for p in optimizer.param_groups[0]["params"] for _ in range(2)]  # Adam's
    # All rows at full length, and as short as can be, so that as many pictures as can be are in one micro-batch.
    for length in (args.max_completion_length, 1):
        mask = torch.ones(len(prompts) * size, length, dtype=torch.bool, device=policy.device)
        width = prompts.input_ids.shape[1]
        batch = max(cut_by_tokens([length] * len(prompts), width, size, args.micro_batch_tokens), key=len)
        own = rows_of(batch, size)
        sum_on_device(scorer, length > 1)
        scores = scorer(prompts.select(batch), ids[own, :length], mask[own], args.temperature)
        (0 * scores.logprobs.sum()).backward()
    optimizer.zero_grad()
    del moments
    peak = ""
    if policy.device.type == "cuda":
        peak = f", {torch.cuda.max_memory_allocated(policy.device) / 2**30:.1f} GiB at most"
    say(
        f"  the largest step fits: {len(prompts)} prompts of {width} tokens, {size} completions of "
        f"{args.max_completion_length} each{peak}"
    )


def checkpoint_returns(args, policy: Policy, optimizer, folder: Path, say) -> None:
    """A checkpoint that is written and read again holds the same weights; of a large one, the disk has room."""
    masters = optimizer.param_groups[0]["params"]
    size = sum(p.numel() for p in masters) * 4
    free = shutil.disk_usage(folder).free
    needed = 3 * size * (args.keep_checkpoints + 1)  # weights and two moments, of the kept and of the one being written
    if needed > free:
        raise SystemExit(
            f"preflight: --out {folder}: checkpoints take up to {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB "
            "are free; name a folder on another disk or lower --keep-checkpoints"
        )
    if size > LARGEST_COPY or isinstance(masters[0], DTensor):
        return
    with tempfile.TemporaryDirectory(prefix="preflight-", dir=folder) as copy:
        save_policy(policy, copy)
        if hasattr(policy.model, "peft_config"):
            from peft import get_peft_model_state_dict

            held, read = get_peft_model_state_dict(policy.model), load_file(Path(copy) / "adapter_model.safetensors")
        else:
            held, read = policy.model.state_dict(), load_policy(copy, trainable=False).model.state_dict()
        changed = [
            n for n, value in held.items() if n not in read or not torch.equal(value.cpu().float(), read[n].float())
        ]
    if changed:
        raise SystemExit(
            f"preflight: --model {args.model}: {changed[0]} is not the same when a checkpoint is read again"
        )
    say(f"  a checkpoint of {size / 2**20:.0f} MiB is the same when it is read again")
