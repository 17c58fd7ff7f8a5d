"""How the built-in model was made: one command, about 35 minutes on two cores.

    python -m common.tiny.recipe --out common/tiny

A Qwen3-VL of about two million parameters, with a tokenizer of its own, learns the built-in puzzles from
demonstrations. Every puzzle is shown with two of them, whose opening words the loss weighs `1 - hasty` to `hasty`:

    careful    names each thing that counts and its place, then computes: slow and right
    hasty      an impression without naming anything, and an answer that is often wrong

Naming things teaches a small model to see; answers alone do not. Because the hasty demonstrator speaks more often, the
model starts by jumping to conclusions most of the time, although it knows how to look: there is room for reinforcement
learning, which has to find out that looking pays and then to look better. This is a property of the demonstrations, on
purpose, and it is why the first gains come fast.
"""

import math
import time
from dataclasses import dataclass

import torch
import tyro
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from common.data.puzzles import Puzzle, puzzle
from common.model.load import VISION_TOKENS, Policy, Prompts, encode_prompts, load_policy, save_policy
from common.model.sampling import decode, sample, uniform_numbers
from common.model.scoring import Scorer

REQUEST = "Think between <think> and </think>, then give only the final answer between <answer> and </answer>."
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
    out: str = "common/tiny"
    """folder to write"""
    describe_steps: int = 800
    """optimizer steps on descriptions, which teach to see"""
    steps: int = 2200
    """optimizer steps on demonstrations of reasoning"""
    more_steps: int = 1800
    """the same again, from a lower rate"""
    batch: int = 32
    """puzzles a step, two demonstrations each; twice as many when describing"""
    hasty: float = 0.505
    """share of the hasty demonstrations"""
    seed: int = 0
    """of the initial weights; the puzzles are train puzzles 0, 1, 2, ..."""
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
        p = puzzle("train", index)
        texts += [p.question, p.careful, p.hasty, f"<answer>{p.answer}</answer>", "user\nassistant\nsystem\n"]
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


def encode_puzzles(policy: Policy, puzzles: list[Puzzle], question: str = "", blank: bool = False) -> Prompts:
    """Prompts asking each puzzle's question, or another one; `blank` puts white paper in place of the pictures."""
    messages, images = [], []
    for p in puzzles:
        text = {"type": "text", "text": f"{question or p.question}\n\n{REQUEST}"}
        messages.append([{"role": "user", "content": [{"type": "image"}, text]}])
        images.append([Image.new("RGB", p.image.size, "white") if blank else p.image])
    return encode_prompts(policy, messages, images)


def describe(p: Puzzle) -> str:
    """Everything in the picture, in reading order."""
    if p.family == "bars":
        return "; ".join(f"bar {i + 1} {t.colour} {t.shape} {t.row}" for i, t in enumerate(p.things))
    things = sorted(p.things, key=lambda t: (t.row, t.column))
    return "; ".join(f"{t.place} {t.colour} {t.shape}" for t in things)


def completions(policy: Policy, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [R, T] int64 and mask [R, T] bool of some completions, each with its end token."""
    rows = [torch.tensor(ids) for ids in policy.tokenizer([t + "<|im_end|>" for t in texts])["input_ids"]]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=policy.tokenizer.pad_token_id)
    return ids, torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]


def demonstrations(puzzles: list[Puzzle]) -> list[str]:
    """The careful and the hasty demonstration of each puzzle, side by side."""
    pairs = [((p.careful, p.answer), (p.hasty, p.hasty_answer)) for p in puzzles]
    return [f"<think>{trace}</think><answer>{answer}</answer>" for pair in pairs for trace, answer in pair]


def train(args: Args, policy: Policy, stage: int) -> None:
    """One stage of supervised learning, the mean of -log p over the completions' tokens: descriptions, or two of
    demonstrations. The rate rises over 50 steps and falls to zero along a cosine."""
    steps, rate = (args.describe_steps, args.steps, args.more_steps)[stage], (1.5e-3, 1.5e-3, 1e-3)[stage]
    count = 2 * args.batch if stage == 0 else args.batch
    first = stage * 10_000_000  # no stage sees another's puzzles
    optimizer = torch.optim.AdamW(policy.model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    scorer, started, recent = Scorer(policy), time.perf_counter(), []
    for step in range(steps):
        puzzles = [puzzle("train", first + step * count + i) for i in range(count)]
        if stage == 0:
            prompts = encode_puzzles(policy, puzzles, "What is where?")
            ids, mask = completions(policy, [f"<think>{describe(p)}</think>" for p in puzzles])
            weights = mask.float()
        else:
            prompts = encode_puzzles(policy, puzzles)
            ids, mask = completions(policy, demonstrations(puzzles))
            # The opening words decide the style, and so its frequency; what follows is worth learning when careful.
            weights = mask * torch.tensor([1.0, 0.3]).repeat(count)[:, None]
            weights[:, :3] = torch.tensor([1 - args.hasty, args.hasty]).repeat(count)[:, None]
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = -(scorer(prompts, ids, mask).logprobs * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if step % 50 == 49:
            seconds, mean = (time.perf_counter() - started) / (step + 1), sum(recent[-50:]) / 50
            print(f"stage {stage}, step {step + 1} of {steps}: loss {mean:.4f}, {seconds:.2f} s a step", flush=True)


def accuracy(
    policy: Policy, split: str, count: int, temperature: float, begin: str = "", blank: bool = False
) -> dict[str, float]:
    """Shares of right answers, of careful traces, of right answers a family.

    `begin` is how completions are made to start; `blank` puts white paper in place of the pictures.
    """
    right, careful, families = [], [], {}
    for start in range(0, count, 100):
        puzzles = [puzzle(split, start + i) for i in range(min(100, count - start))]
        prompts = encode_puzzles(policy, puzzles, blank=blank)
        if begin:
            extra = torch.tensor(policy.tokenizer(begin, add_special_tokens=False)["input_ids"])
            prompts = append_tokens(prompts, extra)
        noise = uniform_numbers(1, start, range(len(puzzles)), 80)
        texts = decode(policy, sample(policy, prompts, 1, 80, noise, temperature=temperature))
        for p, text in zip(puzzles, texts, strict=True):
            right.append(f"<answer>{p.answer}</answer>" in text)
            careful.append("Look:" in begin + text)
            families.setdefault(p.family, []).append(right[-1])
    mean = lambda values: sum(values) / len(values)
    return {"accuracy": mean(right), "careful": mean(careful), **{name: mean(v) for name, v in families.items()}}


def append_tokens(prompts: Prompts, extra: torch.Tensor) -> Prompts:
    """Prompts whose completions are made to start with the tokens `extra`."""
    rows = len(prompts)
    ids = torch.cat([prompts.input_ids, extra.expand(rows, -1)], dim=1)
    mask = torch.cat([prompts.attention_mask, torch.ones(rows, len(extra), dtype=torch.bool)], dim=1)
    after = prompts.position_ids.amax((0, 2))[:, None] + 1 + torch.arange(len(extra))
    positions = torch.cat([prompts.position_ids, after.expand(3, -1, -1)], dim=2)
    return Prompts(ids, mask, positions, prompts.pixel_values, prompts.image_grid_thw, prompts.images_per_prompt)


def main(args: Args) -> None:
    torch.set_num_threads(2)
    started = time.perf_counter()
    policy = build(args.out, args.seed)
    print(f"{sum(p.numel() for p in policy.model.parameters()):,} parameters, {len(policy.tokenizer)} tokens")
    for stage in range(3):
        train(args, policy, stage)
    # Half precision halves the file; the accuracies below are those of the file.
    policy.model.half()
    save_policy(policy, args.out)
    print(f"trained and saved in {(time.perf_counter() - started) / 60:.1f} minutes")
    policy = load_policy(args.out)
    for name, split, temperature, begin in (
        ("sampled", "test", 1.0, ""),
        ("greedy", "test", 0.0, ""),
        ("greedy, made to be careful", "test", 0.0, "<think>Look:"),
        ("greedy, made to be hasty", "test", 0.0, "<think>At a glance"),
        ("sampled, made to be careful", "test", 1.0, "<think>Look:"),
        ("sampled, made to be hasty", "test", 1.0, "<think>At a glance"),
        ("greedy, shifted puzzles", "shifted", 0.0, ""),
    ):
        figures = accuracy(policy, split, args.eval_examples, temperature, begin)
        print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in figures.items()), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
