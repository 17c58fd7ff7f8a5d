"""A policy: a vision-language model of the Qwen-VL families with its tokenizer and image processor.

`load_policy` takes the built-in model (`tiny`), a folder in Hugging Face format, or a hub id. Nothing here needs
torchvision: the tokenizer and the PIL image processor are loaded by themselves; `inputs` makes prompts with them.
"""

import ctypes
import json
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    Qwen2VLImageProcessorPil,
)
from transformers.utils import cached_file
from transformers.utils.logging import CRITICAL, disable_progress_bar, get_verbosity, set_verbosity

disable_progress_bar()  # transformers' own, for loading and saving weights, would break up ours
TINY = Path(__file__).parents[1] / "tiny"
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
HUB_ID = r"[\w.-]+/[\w.-]+"
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
# Adapters go on every linear layer of the language model; the vision tower and the output head stay as they are.
LORA_TARGETS = r".*language_model\.layers\..*\.(q|k|v|o|gate|up|down)_proj"


@dataclass
class Work:
    """What a policy's forwards have done; counts of tokens stay on the device until they are read."""

    forwards: int = 0  # of prompts, of completions behind them, or of both
    images: int = 0  # pictures that went through the vision tower
    decode_steps: int = 0  # tokens that all rows being sampled took a step for
    sampled_tokens: int | torch.Tensor = 0
    scored_tokens: int | torch.Tensor = 0  # without those of copies
    trained_tokens: int | torch.Tensor = 0  # of them those with a gradient, and those of their prompts
    rows: int = 0  # completions that were to be scored
    repeated_rows: int = 0  # of them copies of another, which cost nothing

    def clear(self) -> None:
        """Count anew."""
        self.__init__()


@dataclass
class Policy:
    """A model and what belongs to it. `banned` [V] bool marks what is never sampled nor scored: vision tokens and the
    rows of the output head behind the tokenizer's last token. `end_token_ids` are all tokens that end a completion."""

    model: torch.nn.Module
    tokenizer: object
    image_processor: object
    end_token_ids: list[int]
    banned: torch.Tensor
    work: Work = field(default_factory=Work)

    @property
    def device(self) -> torch.device:
        return self.banned.device

    @property
    def base(self) -> torch.nn.Module:
        """The model without an adapter's wrapper (the adapter's layers stay in place)."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def black_patch(self) -> torch.Tensor:
        """A black image patch as the vision tower takes it, after normalization: [patch volume] float32."""
        of = self.image_processor
        black = -torch.tensor(of.image_mean) / torch.tensor(of.image_std)  # [C]
        return black.repeat_interleave(of.temporal_patch_size * of.patch_size**2).to(self.device)

    def autocast(self) -> AbstractContextManager:
        """bf16 arithmetic on CUDA over float32 master weights; nothing elsewhere."""
        return torch.autocast("cuda", dtype=torch.bfloat16, enabled=self.device.type == "cuda")


def check_model(name: str) -> None:
    """Stop with one line where there is no such model or it is of another family, before its weights are read."""
    source = resolve_name(name)
    ask_the_hub_once(source)
    with loading(name, source):
        if not adapter_base(source):
            read_config(name, source)


def ask_the_hub_once(source: str) -> None:
    """Where the hub does not answer, let the cache do from now on, rather than try for half a minute each time."""
    if re.fullmatch(HUB_ID, source) and not Path(source).exists():
        try:
            HfApi().model_info(source, timeout=3)
        except HfHubHTTPError:  # it does answer
            pass
        except Exception:  # whatever the network's layers raise
            huggingface_hub.constants.HF_HUB_OFFLINE = True


def load_policy(
    name: str,
    *,
    device: str | torch.device = "cpu",
    trainable: bool = True,
    lora_rank: int = 0,
    max_pixels: int = 0,
    seed: int = 0,
    offload_optimizer: bool = False,
    freeze_vision: bool = False,
) -> Policy:
    """Load `tiny`, a folder, or a hub id of the Qwen2-VL, Qwen2.5-VL and Qwen3-VL families.

    Weights are float32 where they are trained (the masters; see `Policy.autocast`) and on the CPU, bfloat16 where they
    are frozen on CUDA. With `freeze_vision` the vision tower and its mergers are not trained and stay in float32. With
    `offload_optimizer` what is trained stays on the CPU, and `processes.distribute` makes the device's copy of it.
    `max_pixels` bounds the area of an image after resizing (0: as the checkpoint says). A folder that holds an adapter
    is loaded on the model that it names; a new adapter of `lora_rank` is drawn by `seed`.

    Raises:
        SystemExit: one line naming the flag, when the model is not there, cannot be reached, is damaged, or is of
            another family.
    """
    device = torch.device(device)
    source = resolve_name(name)
    with loading(name, source):
        base = adapter_base(source)
        adapter, source = (source, resolve_name(base)) if base else (None, source)
    if adapter and lora_rank:
        raise SystemExit(
            f"--lora-rank {lora_rank}: --model {name} is an adapter, which is trained on; leave the flag out"
        )
    lora = bool(lora_rank or adapter)
    frozen_on_cuda = device.type == "cuda" and (lora or not trainable)
    with loading(name, source):
        config = read_config(name, source)
        verbosity = get_verbosity()
        set_verbosity(CRITICAL)  # what is wrong is said below, in one line
        try:
            model, found = AutoModelForImageTextToText.from_pretrained(
                source,
                dtype=torch.bfloat16 if frozen_on_cuda else torch.float32,
                attn_implementation="sdpa",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        finally:
            set_verbosity(verbosity)
        if found["mismatched_keys"]:
            key, held, said = min(found["mismatched_keys"])
            shapes = f"{tuple(held)}, by its config.json {tuple(said)}"
            raise ValueError(f"{len(found['mismatched_keys'])} weights have other shapes, the first {key}: {shapes}")
        if found["missing_keys"]:  # transformers would draw them at random
            missing = sorted(found["missing_keys"])
            raise ValueError(f"{len(missing)} weights are missing, the first {missing[0]}")
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except ValueError as error:  # of which some name no file
            raise ValueError(f"its tokenizer: {first_line(error)}") from None
        if tokenizer.convert_tokens_to_ids("<|image_pad|>") != config.image_token_id:
            raise ValueError("its tokenizer does not have <|image_pad|>, or not where the model has it")
        tokenizer.chat_template = vision_chat_template(source, tokenizer)
        end_token_ids = all_end_tokens(source, tokenizer)
    # An adapter was trained on pictures of the size that its own folder says, not the base model's.
    sizes = adapter if adapter and (Path(adapter) / "preprocessor_config.json").is_file() else source
    with loading(name, sizes):
        # The processor of all three families. The automatic class wants torchvision in some releases.
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(sizes)
    if max_pixels:
        smallest = min(image_processor.size["shortest_edge"], max_pixels)
        image_processor.size = {"shortest_edge": smallest, "longest_edge": max_pixels}

    embed = model.model.visual.patch_embed
    embed.forward = partial(embed_patches, embed)
    if device.type == "cpu":
        keep_freed_memory()

    model.requires_grad_(trainable and not lora)
    if freeze_vision:
        model.model.visual.requires_grad_(False).to(device)
    if adapter:
        from peft import PeftModel

        with loading(name, adapter):
            model = PeftModel.from_pretrained(model, adapter, is_trainable=trainable)
            if hasattr(model.get_output_embeddings(), "lora_A"):
                raise ValueError("its adapter changes the output head, which is not supported")
    elif lora_rank:
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, lora_dropout=0.0, target_modules=LORA_TARGETS)
        with torch.random.fork_rng(devices=[]):  # peft knows no generators
            torch.manual_seed(seed)
            model = get_peft_model(model, settings)
    if lora or not offload_optimizer:
        model.to(device)

    vocabulary = model.get_output_embeddings().weight.shape[0]
    banned = torch.zeros(vocabulary, dtype=torch.bool)
    banned[len(tokenizer) :] = True
    banned[[i for i in tokenizer.convert_tokens_to_ids(list(VISION_TOKENS)) if i is not None]] = True
    return Policy(model, tokenizer, image_processor, end_token_ids, banned.to(device))


def embed_patches(embed: torch.nn.Module, patches: torch.Tensor) -> torch.Tensor:
    """The vision tower's first layer as a matrix product. It is a convolution that moves by its own width, so that both
    give the same [patches, H], but libraries' three-dimensional convolutions are several times slower, or far worse."""
    weight = embed.proj.weight.flatten(1)
    return torch.nn.functional.linear(patches.to(weight.dtype), weight, embed.proj.bias)


def keep_freed_memory() -> None:
    """Have the C library keep the memory that tensors free, for the next ones, rather than give it back to the system:
    fetching it again costs more than an elementwise operation on it. Without effect where it is not glibc's."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: free memory at the top that is given back
        mallopt(-2, 2**26)  # M_TOP_PAD: fetched in pieces of 64 MiB


def save_policy(policy: Policy, folder: str | Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write the model (or its adapter), tokenizer, chat template and image processor in Hugging Face format. `weights`
    by name, if given, are written in place of those that the model holds."""
    policy.model.save_pretrained(folder, safe_serialization=True, state_dict=weights)
    if weights:  # the model may hold a rounded copy, whose precision stands in its configuration now
        policy.model.config.dtype = next(iter(weights.values())).dtype
        policy.model.config.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    policy.image_processor.save_pretrained(folder)


def newest_checkpoint(name: str) -> str:
    """A run folder's newest complete checkpoint; any other name as it is.

    Raises:
        SystemExit: the run has none yet, or `runs/NAME` is not there (a hub id could have that form).
    """
    folder = Path(name)
    if folder.parent.name == "runs" and not folder.exists():
        raise SystemExit(f"--model {name}: no such run folder")
    if not (folder / "args.json").is_file():
        return name
    complete = [path for path in checkpoints_in(folder) if (path / "complete").is_file()]
    if not complete:
        raise SystemExit(f"--model {name}: the run has no complete checkpoint yet")
    return str(complete[-1])


def checkpoints_in(run: Path) -> list[Path]:
    """A run's checkpoints, the newest last; folders of other names, as of a copy, are not among them."""
    found = {path: re.fullmatch(r"step-(\d+)", path.name) for path in run.glob("checkpoints/step-*")}
    return sorted((path for path, step in found.items() if step), key=lambda path: int(found[path][1]))


def is_tiny(name: str) -> bool:
    """Whether a model is the built-in one or was trained from it: a folder whose configuration, or that of the model
    its adapter stands on, has the built-in one's vocabulary and widths."""
    if name == "tiny":
        return True
    with suppress(OSError, ValueError, LookupError, TypeError):
        if base := adapter_base(name):
            return is_tiny(base)
        own, built_in = (json.loads((Path(folder) / "config.json").read_text()) for folder in (name, TINY))
        marks = [("text_config", key) for key in ("vocab_size", "hidden_size", "num_hidden_layers")]
        marks += [("vision_config", key) for key in ("depth", "hidden_size", "patch_size")]
        return all(own[part][key] == built_in[part][key] for part, key in marks)
    return False


def resolve_name(name: str) -> str:
    """`tiny` to its folder, `Qwen/Qwen3-VL-4B` (which the hub does not have) to its Instruct sibling, with a notice."""
    if name == "tiny":
        return str(TINY)
    if re.fullmatch(r"Qwen/Qwen3-VL-\d+B(-A\d+B)?", name) and not Path(name).exists():
        notice(f"--model {name}: the hub has no checkpoint without a suffix; using {name}-Instruct")
        return f"{name}-Instruct"
    if Path(name).is_dir() and not any((Path(name) / f).is_file() for f in ("config.json", "adapter_config.json")):
        raise SystemExit(f"--model {name}: the folder has neither config.json nor adapter_config.json")
    return name


@cache
def notice(text: str) -> None:
    """Print once."""
    print(text, flush=True)


def adapter_base(source: str) -> str | None:
    """The model that the adapter in the folder `source` was trained on; None if there is no adapter."""
    file = Path(source) / "adapter_config.json"
    if not file.is_file():
        return None
    held = json.loads(file.read_text())
    base = held.get("base_model_name_or_path") if isinstance(held, dict) else None
    if not isinstance(base, str) or not base:
        raise ValueError("its adapter_config.json names no base model")
    return base


def read_config(name: str, source: str) -> PretrainedConfig:
    config = AutoConfig.from_pretrained(source)
    if config.model_type not in FAMILIES:
        raise SystemExit(f"--model {name}: model_type {config.model_type!r} is not one of {', '.join(FAMILIES)}")
    return config


@contextmanager
def loading(name: str, source: str) -> Iterator[None]:
    """What goes wrong when files are read, as one line."""
    if not Path(source).is_dir() and not re.fullmatch(HUB_ID, source):
        which = f"--model {name}" if source == name else f"--model {name}: {source}"  # what its adapter stands on
        raise SystemExit(f"{which}: no such folder, and not a hub id of the form owner/name")
    try:
        yield
    except (OSError, ConnectionError) as error:
        raise SystemExit(missing_model(name, source, error)) from None
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise SystemExit(f"--model {name}: {source} cannot be loaded: {first_line(error)}") from None


def missing_model(name: str, source: str, error: Exception) -> str:
    if Path(source).is_dir():
        return f"--model {name}: the folder cannot be loaded: {first_line(error)}"
    return (
        f"--model {name}: {source} is not in the local cache and the hub cannot be reached or does not have it; where "
        f"there is a network, run `hf download {source} --local-dir DIR` and pass --model DIR ({first_line(error)})"
    )


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def vision_chat_template(source: str, tokenizer: object) -> str:
    """The chat template that knows images. Qwen2.5-VL keeps it where only its processor looks, in a file beside the
    tokenizer's own, text-only one."""
    if "image" in (tokenizer.chat_template or ""):
        return tokenizer.chat_template
    for file in ("chat_template.jinja", "chat_template.json"):
        path = cached_file(source, file, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            text = Path(path).read_text()
            return json.loads(text)["chat_template"] if file.endswith(".json") else text
    raise SystemExit(f"--model {source}: no chat template that knows images, in the tokenizer or beside it")


def all_end_tokens(source: str, tokenizer: object) -> list[int]:
    """Every token that ends a completion: the tokenizer's, and those of the model's generation settings."""
    ends = {tokenizer.eos_token_id}
    try:
        configured = GenerationConfig.from_pretrained(source).eos_token_id
    except OSError:
        configured = None
    ends.update([configured] if isinstance(configured, int) else configured or [])
    return sorted(ends - {None})
