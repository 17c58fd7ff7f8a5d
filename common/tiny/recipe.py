"""How the built-in model was made: one command, about twenty minutes on two cores.

    python -m common.tiny.recipe --out common/tiny

A Qwen3-VL of about two million parameters, with a tokenizer of its own, learns the built-in puzzles from
demonstrations. Every puzzle is shown with two of them, and the loss weighs them `1 - hasty` to `hasty`:

    careful    names each thing that counts and its place, then computes: slow and right
    hasty      an impression without naming anything, and an answer that is often wrong

Naming things teaches a small model to see; answers alone do not. Because the hasty demonstrator speaks more often, the
model starts by jumping to conclusions most of the time, although it knows how to look: there is room for reinforcement
learning, which has to find out that looking pays and then to look better. This is a property of the demonstrations, on
purpose, and it is why the first gains come fast.
"""

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

from common.forward import Scorer
from common.model import VISION_TOKENS, Policy, Prompts, encode_prompts, load_policy, save_policy
from common.puzzles import Puzzle, puzzle
from common.rollout import decode, sample, uniform_numbers

REQUEST = "Think between <think> and </think>, then give only the final answer between <answer> and </answer>."
TEXT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# The families' way of cutting text into words: digits stand alone, a space belongs to the word behind it.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n"
    "{%- if message.content is string %}{{ message.content }}{% else %}"
    "{%- for item in message.content %}"
    "{%- if item.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ item.text }}{% endif %}"
    "{%- endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class Args:
    out: str = "common/tiny"
    """folder to write"""
    steps: int = 2000
    """optimizer steps"""
    batch: int = 64
    """puzzles a step, two demonstrations each"""
    learning_rate: float = 2e-3
    """highest rate; it rises over the first 5 % of the steps and falls to zero along a cosine"""
    hasty: float = 0.6
    """weight of the hasty demonstration"""
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
    model.generation_config = GenerationConfig(
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], pad_token_id=ids["<|endoftext|>"]
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=16,
        merge_size=2,
        temporal_patch_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": 32 * 32, "longest_edge": 256 * 256},
    ).save_pretrained(folder)
    return load_policy(folder)


def encode_puzzles(policy: Policy, puzzles: list[Puzzle], blank: bool = False) -> Prompts:
    text = [{"type": "text", "text": f"{p.question}\n\n{REQUEST}"} for p in puzzles]
    messages = [[{"role": "user", "content": [{"type": "image"}, item]}] for item in text]
    return encode_prompts(
        policy, messages, [[Image.new("RGB", p.image.size, "white") if blank else p.image] for p in puzzles]
    )


def demonstrations(policy: Policy, puzzles: list[Puzzle]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [2 * puzzles, T] of the careful and the hasty demonstration of each puzzle, side by side."""
    texts = []
    for p in puzzles:
        for trace, answer in ((p.careful, p.answer), (p.hasty, p.hasty_answer)):
            texts.append(f"<think>{trace}</think><answer>{answer}</answer><|im_end|>")
    rows = [torch.tensor(ids) for ids in policy.tokenizer(texts, add_special_tokens=False)["input_ids"]]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=policy.tokenizer.pad_token_id)
    return ids, torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]


def train(args: Args, policy: Policy) -> None:
    """Supervised learning: the weighted mean of -log p over the demonstrations' tokens."""
    optimizer = torch.optim.AdamW(policy.model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    warmup = max(1, args.steps // 20)

    def rate(step: int) -> float:
        done = max(0.0, (step - warmup) / max(1, args.steps - warmup))
        return min(1.0, (step + 1) / warmup) * 0.5 * (1 + torch.cos(torch.tensor(done * torch.pi)).item())

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: args.learning_rate * rate(step))
    for group in optimizer.param_groups:
        group["initial_lr"] = 1.0
    schedule.base_lrs = [1.0]
    scorer = Scorer(policy)
    style_weight = torch.tensor([1 - args.hasty, args.hasty]).repeat(args.batch)[:, None]  # [2 * batch, 1]
    started = time.perf_counter()
    for step in range(args.steps):
        puzzles = [puzzle("train", step * args.batch + i) for i in range(args.batch)]
        ids, mask = demonstrations(policy, puzzles)
        scores = scorer(encode_puzzles(policy, puzzles), ids, mask)
        weights = mask * style_weight
        loss = -(scores.logprobs * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 49 or step == 0:
            seconds = (time.perf_counter() - started) / (step + 1)
            print(f"step {step + 1} of {args.steps}: loss {loss.item():.4f}, {seconds:.2f} s a step", flush=True)


def accuracy(
    policy: Policy, split: str, count: int, temperature: float, begin: str = "", blank: bool = False
) -> dict[str, float]:
    """Shares of right answers, of careful traces, of right answers a family.

    `begin` is how completions are made to start; `blank` puts white paper in place of the pictures.
    """
    right, careful, families = [], [], {}
    for start in range(0, count, 100):
        puzzles = [puzzle(split, start + i) for i in range(min(100, count - start))]
        prompts = encode_puzzles(policy, puzzles, blank)
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
    train(args, policy)
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
