"""What a policy reads: chat messages and pictures as padded token ids, positions and image patches.

The image token is expanded by the image's grid, which is all that the families' processors do for still pictures.
"""

from dataclasses import dataclass, replace

import torch
from PIL import Image

from common.model.load import Policy


@dataclass
class Prompts:
    """N prompts, left-padded to P tokens, their images packed as the vision tower takes them."""

    input_ids: torch.Tensor  # [N, P] int64
    attention_mask: torch.Tensor  # [N, P] bool, false on the padding at the left
    position_ids: torch.Tensor  # [3, N, P] int64: time, height, width
    pixel_values: torch.Tensor | None  # [patches of all images, channels * patch volume] float32
    image_grid_thw: torch.Tensor  # [images, 3] int64: patches in time, height, width
    images_per_prompt: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def patches(self) -> list[int]:
        """How many image patches each prompt has."""
        return [int(grids.prod(-1).sum()) for grids in self.image_grid_thw.split(self.images_per_prompt)]

    def select(self, rows: list[int]) -> "Prompts":
        """The prompts `rows`, in that order (repetition allowed), trimmed to their longest."""
        first_image = torch.tensor([0, *self.images_per_prompt]).cumsum(0).tolist()
        images = [i for r in rows for i in range(first_image[r], first_image[r + 1])]
        pixels = None
        if images:
            blocks = self.pixel_values.split(self.image_grid_thw.prod(-1).tolist())
            pixels = torch.cat([blocks[i] for i in images])
        width = int(self.attention_mask[rows].sum(1).max())
        return Prompts(
            self.input_ids[rows, -width:],
            self.attention_mask[rows, -width:],
            self.position_ids[:, rows, -width:],
            pixels,
            self.image_grid_thw[images],
            [self.images_per_prompt[r] for r in rows],
        )

    def with_images(self, policy: Policy, images: list[list[Image.Image]]) -> "Prompts":
        """The same prompts seeing other pictures of the same sizes: another view for teacher forcing.

        Raises:
            ValueError: the new pictures do not fill the same grids, so that the prompt's tokens would not fit them.
        """
        pixels, grids = process_images(policy, [image for row in images for image in row])
        if not torch.equal(grids, self.image_grid_thw):
            raise ValueError(f"the new images have grids {grids.tolist()}, the prompts {self.image_grid_thw.tolist()}")
        return replace(self, pixel_values=None if pixels is None else pixels.to(policy.device))


def encode_prompts(policy: Policy, messages: list[list[dict]], images: list[list[Image.Image]]) -> Prompts:
    """Render chat messages, expand each image token by its image's grid, pad on the left.

    `messages[n]` is one conversation with structured content; `images[n]` its pictures in order of appearance.

    Raises:
        ValueError: a prompt whose rendered text does not hold exactly one image token per image.
    """
    texts = [policy.tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in messages]
    pixels, grids = process_images(policy, [image for row in images for image in row])
    merge = policy.image_processor.merge_size**2
    tokens_per_image = iter((grids.prod(-1) // merge).tolist())
    image_token = "<|image_pad|>"
    for n, text in enumerate(texts):
        pieces = text.split(image_token)
        if len(pieces) - 1 != len(images[n]):
            raise ValueError(
                f"prompt {n} has {len(pieces) - 1} image tokens and {len(images[n])} images: {text[:200]!r}"
            )
        texts[n] = pieces[0] + "".join(image_token * next(tokens_per_image) + piece for piece in pieces[1:])

    encoded = policy.tokenizer(texts, add_special_tokens=False)["input_ids"]
    width = max(map(len, encoded))
    input_ids = torch.full((len(texts), width), policy.tokenizer.pad_token_id)  # [N, P]
    attention_mask = torch.zeros(len(texts), width, dtype=torch.bool)  # [N, P]
    for n, ids in enumerate(encoded):
        input_ids[n, width - len(ids) :] = torch.tensor(ids)
        attention_mask[n, width - len(ids) :] = True
    image_tokens = input_ids == policy.base.config.image_token_id
    position_ids, _ = policy.base.model.get_rope_index(
        input_ids=input_ids,
        mm_token_type_ids=image_tokens.int(),
        image_grid_thw=grids if len(grids) else None,
        attention_mask=attention_mask,
    )
    device = policy.device
    return Prompts(
        input_ids.to(device),
        attention_mask.to(device),
        position_ids.to(device),
        None if pixels is None else pixels.to(device),
        grids,
        [len(row) for row in images],
    )


def join(parts: list[Prompts]) -> Prompts:
    """Prompts of several batches as one, padded on the left to the longest."""
    width = max(part.input_ids.shape[1] for part in parts)

    def widen(x: torch.Tensor, part: Prompts) -> torch.Tensor:
        return torch.nn.functional.pad(x, (width - part.input_ids.shape[1], 0))

    pixels = [part.pixel_values for part in parts if part.pixel_values is not None]
    return Prompts(
        torch.cat([widen(part.input_ids, part) for part in parts]),
        torch.cat([widen(part.attention_mask, part) for part in parts]),
        torch.cat([widen(part.position_ids, part) for part in parts], dim=1),
        torch.cat(pixels) if pixels else None,
        torch.cat([part.image_grid_thw for part in parts]),
        [count for part in parts for count in part.images_per_prompt],
    )


def process_images(policy: Policy, images: list[Image.Image]) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Pixels [patches, patch volume] float32 and grids [images, 3] int64 of some pictures."""
    if not images:
        return None, torch.zeros(0, 3, dtype=torch.long)
    features = policy.image_processor(images=images, return_tensors="pt")
    return features["pixel_values"].float(), features["image_grid_thw"]
