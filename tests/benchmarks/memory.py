"""What training should need on one GPU, computed from shapes and not measured: which model fits on which card.

    python -m tests.benchmarks.memory --group-size 8 --prompts 8 --completion 512 --image-tokens 1000

Counted: weights as this project holds them (float32 masters of what is trained, bfloat16 of what is frozen), their
bfloat16 copies under autocast, gradients and Adam's two moments in float32; the larger of sampling's cache (bfloat16)
and of one micro-batch's activations with recomputation (a float32 state a layer and token, one layer's insides, the
prompts' keys and values); the logits of one chunk. 10 % are kept free.
"""

from dataclasses import dataclass

import torch
import tyro
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from common.forward import LOGIT_BUDGET

GIB = 2**30
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


def configuration(name: str) -> Qwen3VLConfig:
    (hidden, layers, heads, key_heads, mlp, tied), (depth, width, vision_mlp, deepstack) = SHAPES[name]
    return Qwen3VLConfig(
        text_config=dict(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_heads,
            intermediate_size=mlp, head_dim=128, vocab_size=151936, tie_word_embeddings=tied,
        ),
        vision_config=dict(
            depth=depth, hidden_size=width, intermediate_size=vision_mlp, num_heads=16, out_hidden_size=hidden,
            patch_size=16, num_position_embeddings=2304, deepstack_visual_indexes=deepstack,
        ),
        tie_word_embeddings=tied,
    )  # fmt: skip


def parameters(name: str) -> int:
    """Counted on the model itself, built without memory."""
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(configuration(name))
    model.tie_weights()
    return sum({id(p): p.numel() for p in model.parameters()}.values())


def adapter_parameters(name: str, rank: int) -> int:
    (hidden, layers, heads, key_heads, mlp, _), _ = SHAPES[name]
    sizes = [(hidden, heads * 128), (hidden, key_heads * 128), (hidden, key_heads * 128), (heads * 128, hidden)]
    sizes += [(hidden, mlp), (hidden, mlp), (mlp, hidden)]
    return layers * rank * sum(inputs + outputs for inputs, outputs in sizes)


def gibibytes(name: str, lora: bool, options: Options) -> dict[str, float]:
    """Memory by what needs it."""
    (hidden, layers, heads, key_heads, mlp, _), _ = SHAPES[name]
    weights = parameters(name)
    trained = adapter_parameters(name, options.lora_rank) if lora else weights
    rows, width = options.prompts * options.group_size, options.prompt + options.image_tokens
    kept = weights * 2 + trained * 4 if lora else weights * 4
    cache = 2 * layers * key_heads * 128 * 2 * (options.prompts * width + rows * options.completion)
    tokens = max(options.micro_batch_tokens, width + options.group_size * options.completion)
    inside = tokens * (2 * mlp + 2 * heads * 128 + 4 * hidden) * 2
    activations = tokens * layers * hidden * 4 + inside + 2 * layers * key_heads * 128 * 2 * tokens
    return {
        "weights": (kept + trained * 2) / GIB,
        "gradients, Adam": trained * 12 / GIB,
        "sampling or activations": max(cache, activations) / GIB,
        "logits": 3 * LOGIT_BUDGET * 4 / GIB,
    }


def main(options: Options) -> None:
    parts = list(gibibytes("2B", True, options))
    print(f"{'GiB':12}" + "".join(f"{part:>25}" for part in parts) + f"{'sum':>8}  fits on")
    for name in SHAPES:
        for lora in (True, False):
            need = gibibytes(name, lora, options)
            total = sum(need.values())
            cards = [f"{card} GB" for card in options.cards if total * 1.1 <= card * 1e9 / GIB]
            title = f"{name} {'LoRA' if lora else 'full'}"
            cells = "".join(f"{need[part]:25.1f}" for part in parts)
            print(f"{title:12}{cells}{total:8.1f}  {', '.join(cards) or 'none of these'}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
