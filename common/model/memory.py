"""What a run holds on each device, computed from shapes before anything is loaded; `common.model.plan` chooses by it.

Counted are weights (float32 masters of what is trained, bfloat16 of what is frozen, bfloat16 copies under autocast),
gradients and Adam's two moments in float32, the pictures of a step and of the next one, which is prepared meanwhile,
and the largest of three phases. Sampling: keys and values of prompts and of completions at the limit, the distributions
of one token, the prompts' own forward. Evaluation: the same for one completion a prompt. Update: one micro-batch with
recomputation, that is a state a layer and token, the prompts' keys and values with their gradients, one layer's insides
with keys, values and mask spread over rows, one chunk of logits.

Gradients are counted in all phases: while sampling, which has none, its own copies of the weights take no more room.
"""

import re
from dataclasses import dataclass
from functools import cache

import torch
from transformers import AutoModelForImageTextToText, PretrainedConfig, Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig

from common.model.decoder import BLOCK_TOKENS
from common.model.load import LORA_TARGETS, adapter_base, loading, read_config, resolve_name
from common.model.scoring import LOGIT_BUDGET

DRAW_BYTES = 24  # a row and word while a token is drawn: logits, probabilities, and both sorted where top-p wants it
IMAGE_TOKENS = 1024  # of a prompt whose pictures have no bound of their own
# hidden size, layers, heads, key heads, MLP, vocabulary, shared output head; vision: depth, width, MLP, deepstack
SHAPES = {
    "Qwen2-VL-2B": ((1536, 28, 12, 2, 8960, 151936, True), (32, 1280, 5120)),
    "Qwen2-VL-7B": ((3584, 28, 28, 4, 18944, 152064, False), (32, 1280, 5120)),
    "Qwen2-VL-72B": ((8192, 80, 64, 8, 29568, 152064, False), (32, 1280, 5120)),
    "Qwen2.5-VL-3B": ((2048, 36, 16, 2, 11008, 151936, True), (32, 1280, 3420)),
    "Qwen2.5-VL-7B": ((3584, 28, 28, 4, 18944, 152064, False), (32, 1280, 3420)),
    "Qwen2.5-VL-32B": ((5120, 64, 40, 8, 27648, 152064, False), (32, 1280, 3456)),
    "Qwen2.5-VL-72B": ((8192, 80, 64, 8, 29568, 152064, False), (32, 1280, 3456)),
    "Qwen3-VL-2B": ((2048, 28, 16, 8, 6144, 151936, True), (24, 1024, 4096, [5, 11, 17])),
    "Qwen3-VL-4B": ((2560, 36, 32, 8, 9728, 151936, True), (24, 1024, 4096, [5, 11, 17])),
    "Qwen3-VL-8B": ((4096, 36, 32, 8, 12288, 151936, False), (27, 1152, 4304, [8, 16, 24])),
    "Qwen3-VL-32B": ((5120, 64, 64, 8, 25600, 151936, False), (27, 1152, 4304, [8, 16, 24])),
}


def build_config(family: str, text: tuple, vision: tuple) -> PretrainedConfig:
    """The configuration of a model of a family (`Qwen3-VL`) and a shape as those of `SHAPES`."""
    hidden, layers, heads, key_heads, mlp, vocabulary, tied = text
    depth, width, vision_mlp, *deepstack = vision
    language = dict(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_heads,
        intermediate_size=mlp, vocab_size=vocabulary, tie_word_embeddings=tied,
    )  # fmt: skip
    tower = dict(depth=depth, num_heads=16)
    if family == "Qwen2-VL":
        tower |= dict(embed_dim=width, mlp_ratio=vision_mlp // width, hidden_size=hidden)
        return Qwen2VLConfig(text_config=language, vision_config=tower, tie_word_embeddings=tied)
    tower |= dict(hidden_size=width, intermediate_size=vision_mlp, out_hidden_size=hidden)
    if family == "Qwen2.5-VL":
        return Qwen2_5_VLConfig(text_config=language, vision_config=tower, tie_word_embeddings=tied)
    tower |= dict(patch_size=16, num_position_embeddings=2304, deepstack_visual_indexes=deepstack[0])
    return Qwen3VLConfig(text_config={**language, "head_dim": 128}, vision_config=tower, tie_word_embeddings=tied)


def find_config(name: str) -> PretrainedConfig:
    """The configuration of `--model`: for the published sizes from `SHAPES`, without a network; else from its folder or
    the hub.

    Raises:
        SystemExit: one line, when there is no such model or it is of another family.
    """
    size = re.fullmatch(r"Qwen/(Qwen[\d.]*-VL)-(\d+B)(-Instruct|-Thinking)?", name)
    if size and f"{size[1]}-{size[2]}" in SHAPES:
        return build_config(size[1], *SHAPES[f"{size[1]}-{size[2]}"])
    source = resolve_name(name)
    with loading(name, source):
        base = adapter_base(source)
    if base:
        return find_config(base)
    with loading(name, source):
        return read_config(name, source)


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that memory depends on."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    head_size: int
    mlp: int
    vocabulary: int
    vision_depth: int
    vision_width: int
    vision_mlp: int
    patches_a_token: int
    patch_values: int
    """numbers of a patch, float32"""
    pixels_a_token: int
    parameters: int
    """all, one that is used in two places once"""
    tower: int
    """those of the vision tower, its mergers included"""
    outside: int
    """those outside of the language model's layers"""
    read: int
    """those that a token of a completion takes: the layers' and the output head's"""
    lora_a_rank: int
    """those of adapters, for each rank"""

    @property
    def cached(self) -> int:
        """Bytes of a token's keys and values, all layers, bfloat16."""
        return 2 * self.layers * self.key_heads * self.head_size * 2

    def inside(self, gradients: bool, lora: bool = False) -> int:
        """Bytes a token of what one layer holds while it is run, bfloat16: the states and their norms, three of the
        MLP's width; with gradients also queries and what they gather, and the gradients of those three; with adapters
        what each of them reads, in float32."""
        width = self.heads * self.head_size
        adapters = (5 * self.hidden + width + self.mlp) * 4 if lora else 0
        return (4 * self.hidden + 3 * self.mlp + gradients * 3 * (width + self.mlp)) * 2 + adapters

    def pixels(self, tokens: int) -> int:
        """Bytes of pictures of so many tokens: float32 patches."""
        return tokens * self.patches_a_token * self.patch_values * 4

    def vision(self, tokens: int) -> int:
        """Bytes of the part of these pictures that is forwarded, and of one layer of the vision tower."""
        layer = (8 * self.vision_width + 2 * self.vision_mlp) * 2
        return self.pixels(tokens) + tokens * self.patches_a_token * layer


def shape_of(config: PretrainedConfig) -> Shape:
    """Parameters are counted on a model that is built without memory."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()

    def count(module: torch.nn.Module) -> int:
        return sum({id(p): p.numel() for p in module.parameters()}.values())

    text, vision = config.text_config, config.vision_config
    layers = count(model.model.language_model.layers)
    adapted = [m for name, m in model.named_modules() if re.fullmatch(LORA_TARGETS, name)]
    wide = getattr(vision, "embed_dim", None)  # Qwen2-VL calls by `hidden_size` what its tower gives out
    return Shape(
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        key_heads=text.num_key_value_heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        mlp=text.intermediate_size,
        vocabulary=text.vocab_size,
        vision_depth=vision.depth,
        vision_width=wide or vision.hidden_size,
        vision_mlp=int(wide * vision.mlp_ratio) if wide else vision.intermediate_size,
        patches_a_token=vision.spatial_merge_size**2,
        patch_values=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        pixels_a_token=(vision.spatial_merge_size * vision.patch_size) ** 2,
        parameters=count(model),
        tower=count(model.model.visual),
        outside=count(model) - layers,
        read=layers + model.get_output_embeddings().weight.numel(),
        lora_a_rank=sum(m.in_features + m.out_features for m in adapted),
    )


@cache
def find_shape(name: str) -> Shape:
    """That of `--model`; see `find_config`."""
    return shape_of(find_config(name))


@dataclass(frozen=True)
class Work:
    """What a run does in a step; `prompts` are those of one process."""

    prompts: int
    group_size: int
    completion: int
    """tokens of the longest one"""
    prompt: int = 256
    """text tokens of a prompt"""
    image_tokens: int = IMAGE_TOKENS
    """of a prompt"""
    views: int = 1
    """forwards of a prompt and its completions that one update holds: more where a loss compares several pictures"""
    pictures: int = 2
    """pictures of a prompt that are held: those of a step, and of the next, which is prepared meanwhile"""
    prompt_a_row: bool = False
    """whether each completion is sampled behind a picture of its own"""
    lora_rank: int = 0
    freeze_vision: bool = False
    """whether the vision tower is left as it is where all other weights are trained"""
    reference: bool = False
    """whether a frozen copy of the model is held"""
    evaluation_prompts: int = 128
    """examples that preflight or an evaluation answers together, at the most"""
    slots: int = 0
    """rows decoded together, at the most (0: all)"""
    micro_batch_tokens: int = 16384
    """at the most"""
    offload_optimizer: bool = False
    """whether masters and moments leave the device in any case"""

    @property
    def frozen_tower(self) -> bool:
        """Whether the vision tower alone is not trained."""
        return self.freeze_vision and not self.lora_rank

    @property
    def width(self) -> int:
        return self.prompt + self.image_tokens

    @property
    def rows(self) -> int:
        return self.prompts * self.group_size

    @property
    def together(self) -> int:
        """Rows decoded at a time."""
        return min(self.slots or self.rows, self.rows)

    @property
    def evaluated(self) -> int:
        """Examples of one batch of an evaluation."""
        return max(1, min(self.evaluation_prompts, self.micro_batch_tokens // self.completion))


def trained_parameters(shape: Shape, work: Work) -> int:
    """Parameters that are trained where no adapters are."""
    return shape.parameters - shape.tower * work.frozen_tower


def held(shape: Shape, work: Work, processes: int) -> dict[str, float]:
    """Bytes on a device that stay: weights with their bfloat16 copies, gradients with Adam's moments, the reference,
    and the pictures of a step and of the next. Of a frozen vision tower every device has all, in float32."""
    parameters, tower = trained_parameters(shape, work), shape.tower * 4 * work.frozen_tower
    if work.lora_rank:  # the same on each process
        trained = work.lora_rank * shape.lora_a_rank
        kept = {"weights": shape.parameters * 2 + trained * 6, "gradients, Adam": trained * 12}
    elif work.offload_optimizer:
        kept = {"weights": parameters * 2 + tower, "gradients, Adam": parameters * 2}
    else:
        masters, moments = parameters * 4 / processes, parameters * 12 / processes
        kept = {"weights": parameters * 2 + masters + tower, "gradients, Adam": moments}
        if processes > 1:
            kept["gradients, Adam"] += parameters * 2  # whole and in bfloat16, before they are averaged
    if work.reference and not work.lora_rank:
        kept["reference"] = shape.parameters * 2
    kept["pictures"] = shape.pixels(work.prompts * work.pictures * work.image_tokens)
    return kept


def on_host(shape: Shape, work: Work) -> float:
    """Bytes of the machine's memory, all processes together, that masters off the device take: with gradients and
    moments."""
    return trained_parameters(shape, work) * 16 if work.offload_optimizer and not work.lora_rank else 0


def sampling(shape: Shape, prompts: int, group_size: int, slots: int, work: Work) -> float:
    """Bytes of sampling: the largest of the vision tower, the prompts' forward, and decoding; in slots prompts are
    forwarded while others are decoded."""
    rows, width = prompts * group_size, work.width
    places, forwarded, together = work.completion, prompts, min(slots, rows)
    seats = rows  # for which scores over the prompts are computed
    if slots < rows:  # whole blocks and a spare one, and room for prompts that grows by a quarter
        block = min(BLOCK_TOKENS, work.completion)
        places = -(-work.completion // block) * block + block / slots
        prompts, forwarded = min(prompts, slots) * 1.25, -(-slots // group_size)
        seats = prompts * group_size
    forward = forwarded * width * (shape.cached + shape.inside(False))
    forward = max(shape.vision(forwarded * work.image_tokens), forward)
    kept = (prompts * width + together * places) * shape.cached
    growing = kept / shape.layers  # a layer is held twice when it grows or rows are dropped
    scores = (seats * width + together * places) * shape.heads * 16  # one layer's, in two precisions
    token = max(scores, growing) + together * shape.vocabulary * DRAW_BYTES
    numbers = rows * work.completion * 40  # the rollout's own
    return numbers + (kept + max(token, forward) if slots < rows else max(kept + token, forward))


def update(shape: Shape, work: Work, processes: int) -> float:
    """Bytes of one micro-batch with its backward pass; a group above the micro-batch goes in slices of rows."""
    full, budget = not work.lora_rank, work.micro_batch_tokens
    state = shape.hidden * (4 if full and processes == 1 and not work.offload_optimizer else 2)
    tokens = work.group_size * work.completion * work.views  # of a group
    groups = max(1, min(work.prompts, budget // (work.width * work.views + tokens)))
    rows = min(groups * work.group_size * work.views, max(1, budget // work.completion))  # at a time
    before, own = groups * work.views * work.width, rows * work.completion
    kept = (before + own) * shape.layers * state + 2 * groups * tokens * state  # and the scores' states
    head_gradient = 0  # of a chunk, and the sum over chunks before it is added to the others
    if full and not work.frozen_tower:  # with adapters the tower is frozen too; nothing is kept of a frozen one
        kept += (
            groups
            * work.views
            * work.image_tokens
            * shape.patches_a_token
            * shape.vision_depth
            * (shape.vision_width * 4)
        )
    if full and processes == 1 and work.offload_optimizer:  # gradients are summed up here before they are moved
        kept += trained_parameters(shape, work) * 4
    if full:
        head_gradient = shape.vocabulary * shape.hidden * (2 + 4)
    seen, width = work.width + work.completion, shape.key_heads * shape.head_size
    spread, mask = rows * seen * 2 * width * 2, rows * work.completion * seen * 3
    if work.completion <= width:  # as `common.model.layers.attention` decides
        mask *= shape.heads // shape.key_heads
    else:
        spread += rows * seen * 2 * shape.heads * shape.head_size * 2
    inside = max(before * shape.inside(True, not full), own * shape.inside(True, not full) + 2 * spread + mask)
    backward = 2 * before * shape.cached + max(inside, head_gradient + 3 * LOGIT_BUDGET * 4)
    pixels = shape.vision(groups * work.views * work.image_tokens)
    # Where masters are sharded or off the device: the largest group of gradients in float32, before and after.
    group = (shape.outside - shape.tower * work.frozen_tower) * 4
    averaged = group * (1 + 1 / processes) if full and (processes > 1 or work.offload_optimizer) else 0
    return max(kept + max(pixels, backward), averaged)


def phases(shape: Shape, work: Work, processes: int) -> dict[str, float]:
    """Bytes of each phase on top of what stays."""
    of_rows = (work.rows, 1) if work.prompt_a_row else (work.prompts, work.group_size)
    return {
        "sampling": sampling(shape, *of_rows, work.together, work),
        "evaluation": sampling(shape, work.evaluated, 1, work.evaluated, work),
        "update": update(shape, work, processes),
    }
