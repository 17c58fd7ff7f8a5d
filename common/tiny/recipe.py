"""How the built-in model was made, and how to make others of its kind.

    python -m common.tiny.recipe                    # everything anew
    python -m common.tiny.recipe --flaw chatter     # an apprentice with another flaw, from the shipped base

A Qwen3-VL of about two million parameters, with a tokenizer of its own, learns to see by describing pictures, then to
answer from demonstrations of a teacher without flaws: the base, which solves nearly every built-in puzzle. An
apprentice is the base after a few hundred more steps with a flawed teacher (common/tiny/teacher.py). It still has the
right readings beside the wrong ones, so that reinforcement learning has many separate things to mend. The built-in
model is the apprentice of a teacher who misreads, guesses late in a chain of looks, and repeats a hint where the
question has one (`tiny` of the flaws).
"""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from safetensors.torch import load_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from common.data.prompts import prefetch
from common.data.puzzles import Puzzle, ask, hint, puzzle
from common.model.inputs import Prompts, encode_prompts
from common.model.load import TINY, VISION_TOKENS, Policy, load_policy, save_policy
from common.model.sampling import decode, sample, uniform_numbers
from common.model.scoring import Scorer
from common.rewards.designs import REQUEST, REQUESTS
from common.tiny.teacher import BEDS, Flaws, demonstrate, name_all, taught_hint

TEXT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# The families' way of cutting text into words: digits stand alone, a space belongs to the word behind it.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for item in message.content %}"
    "{% if item.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ item.text }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass
class Args:
    flaw: Literal["tiny", "misreading", "rarity", "forgetting", "chatter", "untold", "none"] | None = None
    """teach the shipped base by a teacher with this flaw (default: make base and built-in model anew)"""
    misreading: float | None = None
    rarity: float | None = None
    forgetting: float | None = None
    chatter: int | None = None
    shortcut: float | None = None
    untold: float | None = None
    unmarked: float | None = None
    """strengths of the flaws, 0 for off, see common/tiny/teacher.py (default: those of the flaw that is named)"""
    out: str = ""
    """folder to write (default: runs/apprentice-FLAW; common/tiny without a flaw)"""
    describe_steps: int = 900
    """optimizer steps on descriptions, which teach to see"""
    steps: int = 800
    """optimizer steps on demonstrations without flaws"""
    more_steps: int = 4500
    """optimizer steps on both in turn"""
    apprentice_steps: int = 700
    """optimizer steps on demonstrations of the flawed teacher; to repeat a hint word for word is learned late"""
    batch: int = 32
    """puzzles a step"""
    seed: int = 0
    """of the initial weights and of the flaws; the puzzles are train puzzles from 10,000,000 on"""
    eval_examples: int = 500
    """test puzzles for the accuracies at the end"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE on the puzzles' own words, any text encodable, with the special tokens of the Qwen-VL families."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts = [REQUEST]
    for index in range(2000):
        p, dice = puzzle("train", index), random.Random(index)
        texts += [ask(p, hint(p, 0.5)), "user\nassistant\nsystem\n"]
        told = (Flaws(), Flaws(shortcut=1.0), Flaws(chatter=4), Flaws(untold=0.5))
        texts += [demonstrate(p, flaws, dice, p.answer) for flaws in told]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=640, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, min_frequency=2
        ),
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in TEXT_TOKENS + VISION_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )


def build(folder: str, seed: int) -> Policy:
    """An untrained model in `folder`: a real Qwen3-VL, deepstack and three-axis positions included, only small."""
    tokenizer = build_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in TEXT_TOKENS + VISION_TOKENS}
    config = Qwen3VLConfig(
        text_config=dict(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            vocab_size=len(tokenizer),
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4]},
        ),
        vision_config=dict(
            depth=3,
            hidden_size=128,
            intermediate_size=384,
            num_heads=4,
            patch_size=16,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=128,
            num_position_embeddings=64,
            deepstack_visual_indexes=[1],
        ),
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    with torch.no_grad():  # the usual 0.02 is meant for wide models; here it would hide the picture for a long time
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "patch_embed" not in name:
                weight.mul_(0.2 / 0.02 if "pos_embed" in name else 0.08 / 0.02)
    model.generation_config = GenerationConfig(
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], pad_token_id=ids["<|endoftext|>"]
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=16,
        merge_size=2,
        temporal_patch_size=2,
        # The puzzles' paper becomes 0, so that what is drawn on it stands out from the first step on.
        image_mean=[0.94] * 3,
        image_std=[0.25] * 3,
        size={"shortest_edge": 32 * 32, "longest_edge": 256 * 256},
    ).save_pretrained(folder)
    return load_policy(folder)


def encode_puzzles(policy: Policy, puzzles: list[Puzzle], texts: list[str]) -> Prompts:
    """Prompts of the puzzles' pictures, each with a text behind it."""
    messages = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for text in texts]
    return encode_prompts(policy, messages, [[p.image] for p in puzzles])


def completions(policy: Policy, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [R, T] int64 and mask [R, T] bool of some completions, each with its end token."""
    rows = [torch.tensor(ids) for ids in policy.tokenizer([t + "<|im_end|>" for t in texts])["input_ids"]]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=policy.tokenizer.pad_token_id)
    return ids, torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]


def lesson(puzzles: list[Puzzle], flaws: Flaws | None, dice: random.Random) -> tuple[list[str], list[str]]:
    """What is asked, and completions: a flawed or flawless teacher's, or, without `flaws`, descriptions."""
    if flaws is None:
        shown = [f"<image description>{name_all(p, dice)}</image description>" for p in puzzles]
        return ["What is where?"] * len(puzzles), shown
    hints = [taught_hint(p, flaws, dice) for p in puzzles]
    shown = [demonstrate(p, flaws, dice, h) for p, h in zip(puzzles, hints, strict=True)]
    # Who leaves sections untold does so asked or not: half of the time the request names them.
    requests = [REQUESTS["mixture"] if flaws.untold and n % 2 else REQUEST for n in range(len(puzzles))]
    asked = [f"{ask(p, h)}\n\n{request}" for p, h, request in zip(puzzles, hints, requests, strict=True)]
    return asked, shown


def train(
    policy: Policy, teachers: Sequence[Flaws | None], steps: int, batch: int, rate: float, first: int, seed: int
) -> None:
    """Supervised learning of `steps` lessons of `batch` puzzles, train puzzles `first` and on, by teachers in turn, of
    whom None describes: the mean of -log p over the completions' tokens. The rate rises over 50 steps and falls to zero
    along a cosine."""
    optimizer = torch.optim.AdamW(policy.model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    scorer, started, recent, dice = Scorer(policy), time.perf_counter(), [], random.Random(f"{seed}/{first}")

    def draw(step: int) -> tuple[Prompts, torch.Tensor, torch.Tensor]:
        puzzles = [puzzle("train", first + step * batch + i) for i in range(batch)]
        asked, shown = lesson(puzzles, teachers[step % len(teachers)], dice)
        return encode_puzzles(policy, puzzles, asked), *completions(policy, shown)

    # Learning has one thread: what comes next is drawn on another core meanwhile.
    for step, drawn in prefetch(draw, range(steps), in_thread=True):
        prompts, ids, mask = drawn()
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = -scorer(prompts, ids, mask).logprobs.sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if step % 50 == 49:
            seconds, mean = (time.perf_counter() - started) / (step + 1), sum(recent[-50:]) / 50
            print(f"step {step + 1} of {steps}: loss {mean:.4f}, {seconds:.2f} s a step", flush=True)


def accuracy(
    policy: Policy, split: str, count: int, temperature: float, hint_right: float | None = None
) -> dict[str, float]:
    """Shares of right answers, of all puzzles and of each family; `hint_right`: how often the hint in the question is
    right (None: no hint)."""
    families = {}
    for start in range(0, count, 100):
        puzzles = [puzzle(split, start + i) for i in range(min(100, count - start))]
        hints = ["" if hint_right is None else hint(p, hint_right) for p in puzzles]
        asked = [f"{ask(p, h)}\n\n{REQUEST}" for p, h in zip(puzzles, hints, strict=True)]
        noise = uniform_numbers(1, start, range(len(puzzles)), 160)
        rollout = sample(policy, encode_puzzles(policy, puzzles, asked), 1, 160, noise, temperature=temperature)
        for p, text in zip(puzzles, decode(policy, rollout), strict=True):
            families.setdefault(p.family, []).append(f"<answer>{p.answer}</answer>" in text)
    every = [right for values in families.values() for right in values]
    mean = lambda values: sum(values) / len(values)
    return {"accuracy": mean(every), **{name: mean(values) for name, values in families.items()}}


def report(policy: Policy, args: Args) -> None:
    """Print what a model can do."""
    for name, split, temperature in (("sampled", "test", 1.0), ("greedy", "test", 0.0), ("shifted", "shifted", 0.0)):
        figures = accuracy(policy, split, args.eval_examples, temperature)
        print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in figures.items()), flush=True)


def save(policy: Policy, folder: Path) -> None:
    """Round the model to half precision, which halves the file, and write it."""
    policy.model.half()
    save_policy(policy, folder)
    policy.model.float()


def main(args: Args) -> None:
    torch.set_num_threads(1)  # so that the same machine makes the same bits, however many cores are free
    started = time.perf_counter()
    out = Path(args.out or (f"runs/apprentice-{args.flaw}" if args.flaw else TINY))
    out.mkdir(parents=True, exist_ok=True)
    if args.flaw:
        policy = load_policy("tiny")
        policy.model.load_state_dict(load_file(TINY / "base.safetensors"), strict=False)
    else:
        policy = build(str(out), args.seed)
        print(f"{sum(p.numel() for p in policy.model.parameters()):,} parameters, {len(policy.tokenizer)} tokens")
        train(policy, (None,), args.describe_steps, args.batch, 1.5e-3, 10_000_000, args.seed)
        train(policy, (Flaws(),), args.steps, args.batch, 1.5e-3, 20_000_000, args.seed)
        policy.model.half().float()  # as if the last stage went on from a file, as the shipped one did
        train(policy, (Flaws(), None), args.more_steps, args.batch, 1.5e-3, 30_000_000, args.seed)
        save(policy, out)
        (out / "model.safetensors").rename(out / "base.safetensors")
        print(f"base: {out}, after {(time.perf_counter() - started) / 60:.1f} minutes")
        report(policy, args)
    if args.flaw != "none":
        given = {name: getattr(args, name) for name in vars(Flaws()) if getattr(args, name) is not None}
        flaws = replace(BEDS[args.flaw or "tiny"], **given)
        train(policy, (flaws,), args.apprentice_steps, args.batch, 8e-4, 50_000_000, args.seed)
        print(f"{flaws}: {out}, after {(time.perf_counter() - started) / 60:.1f} minutes")
    save(policy, out)
    report(policy, args)


if __name__ == "__main__":
    main(tyro.cli(Args))
