"""Prompts that are too long for the model or its memory: measured exactly, left out, counted and named.

Only the pictures' sizes are needed, and of nearly all rows not even the tokens: a text has no more of them than bytes.
"""

from collections.abc import Sequence

from common.data.examples import Example, Rows
from common.data.messages import build_messages
from common.model.load import Policy


def prompt_length(policy: Policy, example: Example, template: str) -> int:
    """Tokens of an example's prompt as `encode_prompts` makes it: the chat template's, the text's and the pictures'."""
    tokens = policy.tokenizer(render(policy, example, template), add_special_tokens=False)["input_ids"]
    shapes = [image.size for image in example.images]
    return len(tokens) - len(shapes) + image_tokens(policy, shapes)  # the text has one token for each picture


def render(policy: Policy, example: Example, template: str) -> str:
    messages = build_messages(example, template)
    return policy.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def image_tokens(policy: Policy, shapes: Sequence[tuple[int, int]]) -> int:
    """Tokens that pictures of these sizes (width, height) take in a prompt."""
    processor = policy.image_processor
    patches = sum(processor.get_number_of_image_patches(height, width) for width, height in shapes)
    return patches // processor.merge_size**2


def leave_out_long(
    examples: Sequence[Example], policy: Policy, template: str, max_prompt_length: int, max_completion_length: int
) -> Sequence[Example]:
    """The same examples without those whose prompts have more than `max_prompt_length` tokens (0: what the model's
    context leaves beside a completion), which are counted and named. Only a table's rows can be so long; it is changed
    in place.

    Raises:
        SystemExit: one line, where the context is shorter than a completion or no example is left.
    """
    for part in getattr(examples, "parts", ()):  # of several sets
        leave_out_long(part, policy, template, max_prompt_length, max_completion_length)
    if not isinstance(examples, Rows):
        return examples
    context = policy.base.config.get_text_config().max_position_embeddings
    limit = max_prompt_length or context - max_completion_length
    if limit <= 0:
        raise SystemExit(f"--max-completion-length {max_completion_length}: the model's context has {context} tokens")
    around = len(render(policy, Example((), "", ""), template).encode())
    kept, long = [], {}
    for place, number in enumerate(examples.usable):
        # At most: a token has a byte at least, and the tokenizer's NFC makes a character's bytes three times as many.
        at_most = 3 * (around + examples.text_bytes[place]) + image_tokens(policy, examples.shapes[place])
        length = 0 if at_most <= limit else prompt_length(policy, examples.read(number, pixels=False), template)
        if length > limit:
            long[number] = length
        else:
            kept.append(place)
    if long:
        named = ", ".join(f"row {number}: {length:,}" for number, length in list(long.items())[:3])
        counted = f"{len(long)} of {len(examples)} prompts have more than {limit:,} tokens ({named})"
        if not kept:
            raise SystemExit(f"--data {examples.name}: {counted}; raise --max-prompt-length or lower --max-pixels")
        print(f"--data {examples.name}: {counted} and are left out; --max-prompt-length is their limit", flush=True)
        examples.keep(kept)
    return examples
