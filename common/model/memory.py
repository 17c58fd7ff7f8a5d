"""What a run will hold on each device, computed from shapes before anything is loaded, and settings with which it fits.

    plan("Qwen/Qwen3-VL-4B", parse_machine("80 GB x 1"), Work(prompts=8, group_size=8, completion=2048))

Counted are weights (float32 masters of what is trained, bfloat16 of what is frozen, bfloat16 copies under autocast),
gradients and Adam's two moments in float32, and the largest of three phases. Sampling: keys and values of prompts and
of completions at the limit, the distributions of one token, the prompts' own forward. Evaluation: the same for one
completion a prompt. Update: one micro-batch with recomputation, that is a state a layer and token, the prompts' keys
and values with their gradients, one layer's insides with keys, values and mask spread over rows, one chunk of logits.
Gradients are counted in all phases: while sampling, which has none, its own copies of the weights take no more room.
A tenth of the device is left free, for its context, kernels' workspaces and what fragments.
"""

import itertools
import re
from dataclasses import dataclass, replace
from functools import cache

import torch
from transformers import AutoModelForImageTextToText, PretrainedConfig, Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig

from common.model.decoder import BLOCK_TOKENS
from common.model.load import LORA_TARGETS, adapter_base, loading, read_config, resolve_name
from common.model.scoring import LOGIT_BUDGET

FREE_SHARE = 0.1
DRAW_BYTES = 24  # a row and word while a token is drawn: logits, probabilities, and both sorted where top-p wants it
MICRO_BATCHES = (16384, 8192, 4096, 2048, 1024)  # tokens, in the order in which they are tried
FEWEST_SLOTS = 8  # below, the weights are read for too little
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
        MLP's width; with gradients also queries and what they gather, and one more of the MLP's; with adapters what
        each of them reads, in float32."""
        width = self.heads * self.head_size
        adapters = (5 * self.hidden + width + self.mlp) * 4 if lora else 0
        return (4 * self.hidden + 3 * self.mlp + gradients * (3 * width + self.mlp)) * 2 + adapters

    def vision(self, tokens: int) -> int:
        """Bytes of pictures of so many tokens, float32 patches, and of one layer of the vision tower."""
        patch = self.patch_values * 4 + (8 * self.vision_width + 2 * self.vision_mlp) * 2
        return tokens * self.patches_a_token * patch


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
        outside=count(model) - layers,
        read=layers + model.get_output_embeddings().weight.numel(),
        lora_a_rank=sum(m.in_features + m.out_features for m in adapted),
    )


@cache
def find_shape(name: str) -> Shape:
    """That of `--model`; see `find_config`."""
    return shape_of(find_config(name))


@dataclass(frozen=True)
class Machine:
    """Devices of `device` bytes each that are free, and the machine's own memory (0: not known)."""

    device: float
    count: int = 1
    host: float = 0

    def __str__(self) -> str:
        return f"{self.device / 1e9:.0f} GB x {self.count}"


def parse_machine(text: str) -> Machine:
    """A machine as it is written for `--plan`; its own memory may follow.

    >>> parse_machine("80 GB x 8"), parse_machine("24 GB x 1, 128 GB").host
    (Machine(device=80000000000.0, count=8, host=0), 128000000000.0)
    """
    found = re.fullmatch(r"\s*(\d+)\s*GB\s*(?:x\s*(\d+)\s*)?(?:,\s*(\d+)\s*GB\s*)?", text, re.IGNORECASE)
    if not found or not int(found[1]) or not int(found[2] or 1):
        raise SystemExit(f"--plan {text}: write it like '80 GB x 1' or, with the machine's memory, '24 GB x 8, 256 GB'")
    return Machine(int(found[1]) * 1e9, int(found[2] or 1), int(found[3] or 0) * 1e9)


def this_machine(processes: int) -> Machine | None:
    """The one that this process runs on, with as many devices as there are processes; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    return Machine(torch.cuda.mem_get_info()[0], processes, available)


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
    """forwards of its prompts that one update holds: more where a loss compares several pictures"""
    lora_rank: int = 0
    reference: bool = False
    """whether a frozen copy of the model is held"""
    evaluation_prompts: int = 64
    """examples that an evaluation answers together, at the most"""
    slots: int | None = None
    """rows decoded together (None: chosen)"""
    micro_batch_tokens: int | None = None
    """None: chosen"""
    offload_optimizer: bool | None = None
    """None: chosen"""

    @property
    def width(self) -> int:
        return self.prompt + self.image_tokens

    @property
    def rows(self) -> int:
        return self.prompts * self.group_size

    @property
    def evaluated(self) -> int:
        """Examples of one batch of an evaluation."""
        return max(1, min(self.evaluation_prompts, self.micro_batch_tokens // self.completion))


def held(shape: Shape, work: Work, processes: int) -> dict[str, float]:
    """Bytes on a device that stay: weights with their bfloat16 copies, gradients with Adam's moments, the reference."""
    if work.lora_rank:  # the same on each process
        trained = work.lora_rank * shape.lora_a_rank
        kept = {"weights": shape.parameters * 2 + trained * 6, "gradients, Adam": trained * 12}
    elif work.offload_optimizer:
        kept = {"weights": shape.parameters * 2, "gradients, Adam": shape.parameters * 2}
    else:
        masters, moments = shape.parameters * 4 / processes, shape.parameters * 12 / processes
        kept = {"weights": shape.parameters * 2 + masters, "gradients, Adam": moments}
        if processes > 1:
            kept["gradients, Adam"] += shape.parameters * 2  # whole and in bfloat16, before they are averaged
    if work.reference and not work.lora_rank:
        kept["reference"] = shape.parameters * 2
    return kept


def on_host(shape: Shape, work: Work) -> float:
    """Bytes of the machine's memory, all processes together, that masters off the device take: with gradients and
    moments."""
    return shape.parameters * 16 if work.offload_optimizer and not work.lora_rank else 0


def sampling(shape: Shape, prompts: int, group_size: int, slots: int, work: Work) -> float:
    """Bytes of sampling: the largest of the vision tower, the prompts' forward, and decoding; in slots prompts are
    forwarded while others are decoded."""
    rows, width = prompts * group_size, work.width
    places, forwarded = work.completion, prompts
    if slots < rows:  # whole blocks, and room for prompts that grows by a quarter
        places = -(-work.completion // BLOCK_TOKENS) * BLOCK_TOKENS
        prompts, forwarded = min(prompts, slots) * 1.25, -(-slots // group_size)
    forward = forwarded * width * (shape.cached + shape.inside(False))
    forward = max(shape.vision(forwarded * work.image_tokens), forward)
    together = min(slots, rows)
    kept = prompts * width * shape.cached + together * places * shape.cached
    growing = kept / shape.layers  # a layer is held twice when it grows or rows are dropped
    scores = together * shape.heads * (width + places) * 16  # one layer's, in two precisions
    token = scores + growing + together * shape.vocabulary * DRAW_BYTES
    return kept + max(token, forward) if slots < rows else max(kept + token, forward)


def update(shape: Shape, work: Work, processes: int) -> float:
    """Bytes of one micro-batch with its backward pass; a group above the micro-batch goes in slices of rows."""
    full, budget = not work.lora_rank, work.micro_batch_tokens
    state = shape.hidden * (4 if full and processes == 1 and not work.offload_optimizer else 2)
    tokens = work.group_size * work.completion  # of a group
    groups = max(1, min(work.prompts, budget // (work.width * work.views + tokens)))
    rows = min(groups * work.group_size, max(1, budget // work.completion))  # at a time
    before, own = groups * work.views * work.width, rows * work.completion
    kept = (before + own) * shape.layers * state + 2 * groups * tokens * state  # and the scores' states
    head_gradient = 0  # of a chunk, and the sum over chunks before it is added to the others
    if full:  # with adapters the vision tower is frozen, and nothing of it is kept
        kept += (
            groups
            * work.views
            * work.image_tokens
            * shape.patches_a_token
            * shape.vision_depth
            * (shape.vision_width * 4)
        )
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
    averaged = shape.outside * 4 * (1 + 1 / processes) if full and (processes > 1 or work.offload_optimizer) else 0
    return max(kept + max(pixels, backward), averaged)


def phases(shape: Shape, work: Work, processes: int) -> dict[str, float]:
    """Bytes of each phase on top of what stays."""
    return {
        "sampling": sampling(shape, work.prompts, work.group_size, work.slots, work),
        "evaluation": sampling(shape, work.evaluated, 1, work.evaluated, work),
        "update": update(shape, work, processes),
    }


@dataclass(frozen=True)
class Plan:
    """What a run holds, in bytes a device, with the settings that were chosen in `work`."""

    model: str
    machine: Machine
    work: Work
    kept: dict[str, float]
    phases: dict[str, float]
    host: float

    @property
    def peak(self) -> float:
        return sum(self.kept.values()) + max(self.phases.values())

    @property
    def fits(self) -> bool:
        room = self.peak <= self.machine.device * (1 - FREE_SHARE)
        return room and (not self.machine.host or self.host <= self.machine.host * (1 - FREE_SHARE))

    def __str__(self) -> str:
        work, rows = self.work, self.work.rows
        lines = [f"{self.model} on {self.machine}, GB a device"]
        notes = {
            "weights": f"adapters of rank {work.lora_rank}" if work.lora_rank else "all trained",
            "gradients, Adam": "",
            "reference": "frozen",
            "sampling": f"{work.slots} of {rows} rows at a time" if work.slots < rows else f"{rows} rows",
            "evaluation": f"{work.evaluated} prompts at a time",
            "update": f"micro-batches of {work.micro_batch_tokens:,} tokens",
        }
        if work.offload_optimizer:
            notes["gradients, Adam"] = "masters and moments off the device"
        elif not work.lora_rank and self.machine.count > 1:
            notes["gradients, Adam"] = f"masters and moments shared out among {self.machine.count}"
        for name, size in [*self.kept.items(), *self.phases.items()]:
            lines.append(f"  {name:18}{size / 1e9:7.1f}  {notes[name]}".rstrip())
        lines.append(f"  {'peak':18}{self.peak / 1e9:7.1f}  of {self.machine.device / 1e9:.1f}, a tenth left free")
        if self.host:
            there = f" of {self.machine.host / 1e9:.0f}" if self.machine.host else ""
            lines.append(
                f"  {'machine':18}{self.host / 1e9:7.1f} {there} of its own memory".replace("  of its", " of its")
            )
        lines.append(
            f"  prompts of {work.prompt} tokens and pictures of {work.image_tokens}, completions of {work.completion}"
        )
        return "\n".join(lines)


def lay_out(model: str, machine: Machine, work: Work, shape: Shape | None = None) -> Plan:
    """The plan of settings that are all given."""
    shape = shape or find_shape(model)
    kept = held(shape, work, machine.count)
    return Plan(model, machine, work, kept, phases(shape, work, machine.count), on_host(shape, work))


def choose(model: str, machine: Machine, work: Work, shape: Shape | None = None) -> Plan | None:
    """The fastest settings that fit, where they are left open; None where none does.

    Masters leave the device only where nothing else helps. Slots and micro-batches have their memory one after the
    other, so that each is the largest that fits by itself.
    """
    shape = shape or find_shape(model)
    offloads = (
        [False, True] if work.offload_optimizer is None and not work.lora_rank else [bool(work.offload_optimizer)]
    )
    budgets = MICRO_BATCHES if work.micro_batch_tokens is None else [work.micro_batch_tokens]
    slots = [min(work.slots or work.rows, work.rows)]
    if work.slots is None:  # all rows, or else a multiple of FEWEST_SLOTS
        slots = [work.rows, *range((work.rows - 1) // FEWEST_SLOTS * FEWEST_SLOTS, 0, -FEWEST_SLOTS)]
    for given in itertools.product(offloads, budgets, slots):
        names = ("offload_optimizer", "micro_batch_tokens", "slots")
        tried = lay_out(model, machine, replace(work, **dict(zip(names, given, strict=True))), shape)
        if tried.fits:
            return tried
    return None


def plan(model: str, machine: Machine, work: Work) -> Plan:
    """The fastest settings that fit, where `work` leaves them open.

    Raises:
        SystemExit: one line, where nothing fits, that names the smallest change that would.
    """
    shape = find_shape(model)
    if found := choose(model, machine, work, shape):
        return found
    closest = lay_out(model, machine, smallest(work), shape)
    need = closest.peak / (1 - FREE_SHARE) / 1e9
    line = f"--model {model}: needs {need:.0f} GB a device at the least, {machine.device / 1e9:.0f} are there"
    if closest.peak <= machine.device * (1 - FREE_SHARE):
        line = f"--model {model}: masters off the device need {closest.host / 1e9:.0f} GB of the machine's memory, "
        line += f"{machine.host / 1e9:.0f} are there"
    for advice, changed, larger in changes(work, machine):
        if choose(model, larger, changed, shape):
            raise SystemExit(f"{line}; it fits with {advice}")
    raise SystemExit(f"{line}; no single flag mends that: take a smaller model or larger devices")


def smallest(work: Work) -> Work:
    """With everything that is open at its least."""
    return replace(
        work,
        slots=min(FEWEST_SLOTS, work.rows) if work.slots is None else min(work.slots or work.rows, work.rows),
        micro_batch_tokens=work.micro_batch_tokens or MICRO_BATCHES[-1],
        offload_optimizer=not work.lora_rank if work.offload_optimizer is None else work.offload_optimizer,
    )


def changes(work: Work, machine: Machine):
    """Single changes, those that cost least first: advice, what the run then does, and on which machine."""
    if work.micro_batch_tokens:
        yield "--micro-batch-tokens left out", replace(work, micro_batch_tokens=None), machine
    if work.slots is not None:
        yield "--slots left out", replace(work, slots=None), machine
    if work.offload_optimizer is False and not work.lora_rank:
        yield "--offload-optimizer", replace(work, offload_optimizer=True), machine
    for part in (2, 4, 8):
        if work.image_tokens // part >= 64:
            smaller = replace(work, image_tokens=work.image_tokens // part)
            yield f"--max-pixels for pictures of {smaller.image_tokens} tokens", smaller, machine
    for part in (2, 4):
        if work.completion // part >= 256:
            shorter = replace(work, completion=work.completion // part)
            yield f"--max-completion-length {shorter.completion}", shorter, machine
    if work.reference and not work.lora_rank:
        yield "--kl-coef 0", replace(work, reference=False), machine
    if not work.lora_rank:
        yield "--lora-rank 64", replace(work, lora_rank=64, offload_optimizer=None), machine
    for count in (2, 4, 8, 16):
        if count > machine.count and work.prompts * machine.count % count == 0:
            fewer = replace(work, prompts=work.prompts * machine.count // count)
            yield f"{count} devices", fewer, replace(machine, count=count)
