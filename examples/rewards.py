"""Rewards of one's own. Copy one, change it, and train with it:

    python grpo.py --data boxes.jsonl --kind exact --reward examples/rewards.py:box_iou

Lines of boxes.jsonl: {"image": "0.png", "question": "Where is the red box?", "answer": "10, 20, 60, 80"}.
A function gets R completions and their examples, and returns R numbers, or these and a dictionary of further terms for
the log. `example.answer` is the reference answer, `example.question` the question, `example.images` the pictures.
"""

import json
import re

from common.rewards.answers import extract


def box_iou(completions, examples):
    """Intersection over union of a box x1, y1, x2, y2, in pixels, with the reference answer's; 0 without a box."""
    overlaps, inside = [], []
    for completion, example in zip(completions, examples, strict=True):
        box, target = numbers(extract(completion)[0] or ""), numbers(example.answer)
        overlaps.append(iou(box, target) if len(box) == 4 else 0.0)
        width, height = example.images[0].size if example.images else (0, 0)
        inside.append(float(len(box) == 4 and 0 <= box[0] <= box[2] <= width and 0 <= box[1] <= box[3] <= height))
    return overlaps, {"inside_picture": inside}


def json_field(completions, examples):
    """1 where the completion's JSON object has the reference answer under the key `answer`, 0.1 for any JSON object."""
    rewards = []
    for completion, example in zip(completions, examples, strict=True):
        found = read_object(completion)
        right = found is not None and str(found.get("answer")).strip() == example.answer
        rewards.append(1.0 if right else 0.1 if found is not None else 0.0)
    return rewards


def closeness(completions, examples):
    """1 for the reference number, falling to 0 where the relative error reaches 1."""
    rewards = []
    for completion, example in zip(completions, examples, strict=True):
        found, (target,) = numbers(extract(completion)[0] or ""), numbers(example.answer)
        rewards.append(max(0.0, 1 - abs(found[0] - target) / max(abs(target), 1e-9)) if len(found) == 1 else 0.0)
    return rewards


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]


def iou(one: list[float], other: list[float]) -> float:
    def area(box):
        return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])

    corners = [max(a, b) for a, b in zip(one[:2], other[:2], strict=True)]
    corners += [min(a, b) for a, b in zip(one[2:], other[2:], strict=True)]
    shared = area(corners)
    return shared / max(area(one) + area(other) - shared, 1e-9)


def read_object(text: str) -> dict | None:
    """The JSON object from the first to the last brace of a text; None where there is none."""
    try:
        found = json.loads(text[text.index("{") : text.rindex("}") + 1])
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
