"""Small random models of the three families, in real Hugging Face folders, for tests."""

import shutil
import weakref
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from common.data.examples import load_examples
from common.data.messages import build_messages
from common.model.inputs import Prompts, encode_prompts
from common.model.load import Policy, load_policy

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for item in message.content %}{% if item.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ item.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )


@cache
def small_folder(family: str) -> str:
    """A random model of about 50,000 parameters with weights large enough that its predictions differ."""
    folder = Path(mkdtemp(prefix=f"{family}-"))
    tokenizer = byte_tokenizer()
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    text = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=272, max_position_embeddings=1024, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    )  # fmt: skip
    shared = dict(
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    if family == "qwen3_vl":
        vision = dict(
            depth=3, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=8, spatial_merge_size=2,
            out_hidden_size=32, num_position_embeddings=64, deepstack_visual_indexes=[0, 1],
        )  # fmt: skip
        text |= dict(head_dim=16, rope_parameters={**text["rope_parameters"], "mrope_section": [4, 2, 2]})
        config, build = Qwen3VLConfig(text_config=text, vision_config=vision, **shared), Qwen3VLForConditionalGeneration
    elif family == "qwen2_5_vl":
        vision = dict(
            depth=3, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=8, spatial_merge_size=2,
            out_hidden_size=32, window_size=32, fullatt_block_indexes=[2],
        )  # fmt: skip
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **shared)
        build = Qwen2_5_VLForConditionalGeneration
    else:
        vision = dict(
            depth=2, embed_dim=32, hidden_size=32, num_heads=2, patch_size=8, spatial_merge_size=2, mlp_ratio=2
        )
        config, build = Qwen2VLConfig(text_config=text, vision_config=vision, **shared), Qwen2VLForConditionalGeneration
    torch.manual_seed(0)
    model = build(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.mul_(6.0 if "lm_head" in name or "embed" in name else 3.0)
    model.generation_config = GenerationConfig(
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], pad_token_id=ids["<|endoftext|>"]
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 128 * 128}
    ).save_pretrained(folder)
    return str(folder)


@cache
def larger_folder(layers: int = 6) -> str:
    """A Qwen3-VL large enough that what a run holds outweighs the rest."""
    folder = mkdtemp()
    shutil.copytree(small_folder("qwen3_vl"), folder, dirs_exist_ok=True)
    config = AutoConfig.from_pretrained(folder)
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.num_attention_heads = 128, 384, layers, 8
    text.num_key_value_heads, text.head_dim = 4, 16
    vision.hidden_size, vision.intermediate_size, vision.out_hidden_size = 64, 128, 128
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    return folder


def small_policy(family: str = "qwen3_vl", **kwargs) -> Policy:
    return load_policy(small_folder(family), **kwargs)


def picture(width: int, height: int, seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def small_prompts(policy: Policy, sizes=((32, 48), (64, 32), (48, 48)), seed: int = 0):
    """Prompts of different lengths with images of different sizes, the last one with two images."""
    images = [[picture(w, h, seed + i)] for i, (w, h) in enumerate(sizes)]
    images[-1].append(picture(32, 32, seed + 99))
    messages = [
        [{"role": "user", "content": [{"type": "image"}] * len(row) + [{"type": "text", "text": "what? " * (i + 1)}]}]
        for i, row in enumerate(images)
    ]
    return encode_prompts(policy, messages, images), messages, images


def puzzle_prompts(policy: Policy, count: int) -> Prompts:
    """The first training puzzles, as the built-in model is asked them."""
    examples = [load_examples("puzzles", "train")[n] for n in range(count)]
    return encode_prompts(policy, [build_messages(e) for e in examples], [list(e.images) for e in examples])


def watch_loading(module: str, monkeypatch) -> list[weakref.ref]:
    """Have a module's `load_policy` fail where an earlier model is still held; returns what it has loaded."""
    loaded = []

    def load_alone(*args, **kwargs):
        assert all(before() is None for before in loaded), "the last model is still held"
        policy = load_policy(*args, **kwargs)
        loaded.append(weakref.ref(policy.model))
        return policy

    monkeypatch.setattr(f"{module}.load_policy", load_alone)
    return loaded
