"""A folder with a Qwen3-VL model of a real size and random weights, to time and fit without a download.

    python -m tests.benchmarks.random_model 4B random-4B
    python -m tests.benchmarks.grpo_step --model random-4B --cuda --tokens 512 --image 1024 --lora-rank 64

Tokenizer and image processor are the built-in model's, so that a prompt has few text tokens, and of the output head's
151,936 rows all but the first 503 are never sampled; what is computed is the same. The weights are bfloat16, as the
hub's are; 4B takes 9 GB of disk.
"""

import json
import shutil
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from common.model.load import TINY
from common.model.memory import SHAPES, build_config

SMALL = ((64, 2, 2, 1, 96, 151936, True), (2, 64, 96, [0]))  # as `SHAPES`: a real vocabulary and little else
MAX_PIXELS = 2048 * 2048  # of an image: 4,096 tokens


def write_random_model(config: Qwen3VLConfig, folder: Path) -> None:
    """Draw the weights on the GPU where there is one, and write a folder in Hugging Face format."""
    tiny = Qwen3VLConfig.from_pretrained(TINY)
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(config, name, getattr(tiny, name))
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = Qwen3VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder)
    for file in TINY.iterdir():
        if file.suffix in (".json", ".jinja") and file.name != "config.json":
            shutil.copy(file, folder)
    settings = folder / "preprocessor_config.json"
    sizes = {"shortest_edge": 32**2, "longest_edge": MAX_PIXELS}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"size": sizes}))


def main(
    size: Annotated[Literal["small", "2B", "4B", "8B"], tyro.conf.Positional],
    folder: Annotated[Path, tyro.conf.Positional],
) -> None:
    write_random_model(build_config("Qwen3-VL", *SHAPES.get(f"Qwen3-VL-{size}", SMALL)), folder)
    print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:,.0f} MB")


if __name__ == "__main__":
    tyro.cli(main)
