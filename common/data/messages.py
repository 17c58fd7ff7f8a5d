"""An example as the conversation that the model reads."""

import re

from common.data.examples import Example
from common.rewards.designs import REQUEST

TEMPLATE = "{question}\n\n{request}"


def build_messages(example: Example, template: str = TEMPLATE) -> list[dict]:
    """The conversation that the model reads: one user message, pictures where the markers stand.

    >>> build_messages(Example((), "How many?", "3"), "{question} Be brief.")
    [{'role': 'user', 'content': [{'type': 'text', 'text': 'How many? Be brief.'}]}]
    """
    text = check_template(template).replace("{request}", REQUEST).replace("{question}", example.question)
    content = []
    for piece in re.split(r"(<image>)", text):
        if piece == "<image>":
            content.append({"type": "image"})
        elif piece:
            content.append({"type": "text", "text": piece})
    return [{"role": "user", "content": content}]


def check_template(template: str) -> str:
    """The template with `\\n` typed on a command line made a line break.

    Raises:
        SystemExit: it has no place for the question, or one for pictures, which come with the question.
    """
    template = template.replace("\\n", "\n")
    if "{question}" not in template or "<image>" in template:
        raise SystemExit(f"--prompt-template {template!r}: must contain {{question}} and not <image>")
    return template
