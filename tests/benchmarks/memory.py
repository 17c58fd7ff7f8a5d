"""What training should need on one GPU, computed from shapes and not measured: which model fits on which card.

    python -m tests.benchmarks.memory --group-size 8 --prompts 8 --completion 512 --image-tokens 1000

A first table has every model on one GPU, a second one full training of each on `--processes`, and a third one what the
peak grows with: one number varied at a time.

Counted are weights as this project holds them (float32 masters of what is trained, bfloat16 of what is frozen), their
bfloat16 copies under autocast, gradients and Adam's two moments in float32, and the largest of three phases. Sampling:
the keys and values of prompts and completions, the distributions of one token. Evaluation: the same for a batch of
`--evaluation-prompts`, one completion each, where the prompts' own forward takes most. Update: one micro-batch with
recomputation, that is a state a layer and token, the prompts' keys and values with their gradients, one layer's
insides with keys, values and mask spread over rows, one chunk of logits; a group above the micro-batch in slices.
Gradients are counted in all phases: while sampling, which has none, its own copies of the weights take no more room.
10 % are kept free.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
import tyro
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from common.model.scoring import LOGIT_BUDGET

GIB = 2**30
HEAD, VOCABULARY = 128, 151936
PATCHES_A_TOKEN, PATCH_VOLUME = 4, 3 * 2 * 16 * 16
DRAW_BYTES = 24  # a row and word while a token is drawn: logits, probabilities, and both sorted where top-p wants it
# hidden size, layers, heads, key heads, MLP size, shared output head; vision tower: depth, hidden size, MLP, deepstack
SHAPES = {
    "2B": ((2048, 28, 16, 8, 6144, True), (24, 1024, 4096, [5, 11, 17])),
    "4B": ((2560, 36, 32, 8, 9728, True), (24, 1024, 4096, [5, 11, 17])),
    "8B": ((4096, 36, 32, 8, 12288, False), (27, 1152, 4304, [8, 16, 24])),
}


@dataclass
class Options:
    prompts: int = 8
    group_size: int = 8
    prompt: int = 100
    """text tokens of a prompt"""
    image_tokens: int = 1000
    completion: int = 512
    micro_batch_tokens: int = 16384
    lora_rank: int = 64
    cards: tuple[int, ...] = (24, 48, 80, 141)
    """GB of memory"""
    processes: int = 8
    """GPUs of the table of full training that is shared out among several; prompts are those of one of them"""
    growth_of: str = "4B"
    """model of the last table, with LoRA"""

    @property
    def width(self) -> int:
        return self.prompt + self.image_tokens

    @property
    def evaluation_prompts(self) -> int:
        """Examples that a script's evaluation answers together."""
        return max(1, min(64, self.micro_batch_tokens // self.completion))


def configuration(shape: tuple) -> Qwen3VLConfig:
    """The settings of a model of a shape as those of `SHAPES`."""
    (hidden, layers, heads, key_heads, mlp, tied), (depth, width, vision_mlp, deepstack) = shape
    return Qwen3VLConfig(
        text_config=dict(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_heads,
            intermediate_size=mlp, head_dim=HEAD, vocab_size=VOCABULARY, tie_word_embeddings=tied,
        ),
        vision_config=dict(
            depth=depth, hidden_size=width, intermediate_size=vision_mlp, num_heads=16, out_hidden_size=hidden,
            patch_size=16, num_position_embeddings=2304, deepstack_visual_indexes=deepstack,
        ),
        tie_word_embeddings=tied,
    )  # fmt: skip


@cache
def parameters(name: str) -> tuple[int, int]:
    """All parameters, and those outside of the language model's layers, counted on a model built without memory."""
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(configuration(SHAPES[name]))
    model.tie_weights()
    layers = sum(p.numel() for p in model.model.language_model.layers.parameters())
    every = sum({id(p): p.numel() for p in model.parameters()}.values())
    return every, every - layers


def adapter_parameters(name: str, rank: int) -> int:
    (hidden, layers, heads, key_heads, mlp, _), _ = SHAPES[name]
    sizes = [(hidden, heads * HEAD), (hidden, key_heads * HEAD), (hidden, key_heads * HEAD), (heads * HEAD, hidden)]
    sizes += [(hidden, mlp), (hidden, mlp), (mlp, hidden)]
    return layers * rank * sum(inputs + outputs for inputs, outputs in sizes)


def keys_and_values(name: str) -> int:
    """Bytes a token, all layers, bfloat16."""
    (_, layers, _, key_heads, _, _), _ = SHAPES[name]
    return 2 * layers * key_heads * HEAD * 2


def inside_layer(name: str, gradients: bool) -> int:
    """Bytes a token of what one layer holds while it is run, bfloat16: the states and their norms, three of the MLP's
    width; with gradients also queries and what they gather, and one more of the MLP's."""
    (hidden, _, heads, _, mlp, _), _ = SHAPES[name]
    return (4 * hidden + 3 * mlp + gradients * (3 * heads * HEAD + mlp)) * 2


def vision_inside(name: str, images: int, options: Options) -> int:
    """Bytes of images' patches, float32, and of one layer of the vision tower."""
    _, (_, width, mlp, _) = SHAPES[name]
    return images * options.image_tokens * PATCHES_A_TOKEN * (PATCH_VOLUME * 4 + (8 * width + 2 * mlp) * 2)


def sampling(name: str, prompts: int, rows: int, options: Options) -> int:
    """Bytes of sampling: the largest of the vision tower, the prompts' forward, and decoding."""
    before = prompts * options.width
    forward = before * (keys_and_values(name) + inside_layer(name, False))
    decoding = (before + rows * options.completion) * keys_and_values(name) + rows * VOCABULARY * DRAW_BYTES
    return max(vision_inside(name, prompts, options), forward, decoding)


def update(name: str, lora: bool, options: Options, processes: int = 1) -> int:
    """Bytes of one micro-batch with its backward pass."""
    (hidden, layers, heads, key_heads, _, _), (depth, vision_width, _, _) = SHAPES[name]
    tokens = options.group_size * options.completion  # of a group
    groups = max(1, min(options.prompts, options.micro_batch_tokens // (options.width + tokens)))
    rows = min(groups * options.group_size, max(1, options.micro_batch_tokens // options.completion))  # at a time
    before, own, state = groups * options.width, rows * options.completion, hidden * (2 if lora or processes > 1 else 4)
    kept = (before + own) * layers * state + 2 * groups * tokens * state  # and the scores' states
    head_gradient = 0  # of a chunk, and the sum over chunks before it is added to the others
    if not lora:  # with adapters the vision tower is frozen, and nothing of it is kept
        kept += groups * options.image_tokens * PATCHES_A_TOKEN * depth * vision_width * 4
        head_gradient = VOCABULARY * hidden * (2 + 4)
    seen = options.width + options.completion
    spread, mask = rows * seen * 2 * key_heads * HEAD * 2, rows * options.completion * seen * 3
    if options.completion <= key_heads * HEAD:  # as `common.model.layers.attention` decides
        mask *= heads // key_heads
    else:
        spread += rows * seen * 2 * heads * HEAD * 2
    inside = max(before * inside_layer(name, True), own * inside_layer(name, True) + 2 * spread + mask)
    backward = 2 * before * keys_and_values(name) + max(inside, head_gradient + 3 * LOGIT_BUDGET * 4)
    shared_out = 0  # where several processes train: a gradient in bfloat16, and in float32 what is averaged at a time
    if processes > 1:
        every, outside = parameters(name)
        shared_out = every * 2 + outside * 4
    return kept + shared_out + max(vision_inside(name, groups, options), backward)


def gibibytes(name: str, lora: bool, options: Options, processes: int = 1) -> dict[str, float]:
    """Memory of each of some processes by what needs it; `peak` is that of the largest phase. Full training on several
    keeps a part of masters, gradients and moments each, and a whole bfloat16 copy of the weights."""
    weights, _ = parameters(name)
    trained = adapter_parameters(name, options.lora_rank) if lora else weights
    kept = weights * 2 + trained * 4 if lora else weights * 4 // processes
    need = {
        "weights": kept + trained * 2,
        "gradients, Adam": trained * 12 // processes,
        "sampling": sampling(name, options.prompts, options.prompts * options.group_size, options),
        "evaluation": sampling(name, options.evaluation_prompts, options.evaluation_prompts, options),
        "update": update(name, lora, options, processes),
    }
    need["peak"] = need["weights"] + need["gradients, Adam"] + max(list(need.values())[2:])
    return {part: size / GIB for part, size in need.items()}


def main(options: Options) -> None:
    parts = list(gibibytes("2B", True, options))

    def row(title: str, need: dict[str, float]) -> None:
        cards = [f"{card} GB" for card in options.cards if need["peak"] * 1.1 <= card * 1e9 / GIB]
        cells = "".join(f"{need[part]:17.1f}" for part in parts)
        print(f"{title:20}{cells}  {', '.join(cards) or 'none of these'}", flush=True)

    print(f"{'GiB':20}" + "".join(f"{part:>17}" for part in parts) + "  fits on")
    for name in SHAPES:
        for lora in (True, False):
            row(f"{name} {'LoRA' if lora else 'full'}", gibibytes(name, lora, options))
    for name in SHAPES:
        row(f"{name} full, {options.processes} of these", gibibytes(name, False, options, options.processes))
    print(f"\n{options.growth_of} LoRA{'':23}" + "".join(f"{part:>12}" for part in parts[2:]))
    for field in ("group_size", "completion", "image_tokens"):
        for factor in (1, 2, 4, 8):
            value = getattr(options, field) * factor
            need = gibibytes(options.growth_of, True, replace(options, **{field: value}))
            cells = "".join(f"{need[part]:12.1f}" for part in parts[2:])
            print(f"{field.replace('_', ' '):20}{value:10}{cells}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
