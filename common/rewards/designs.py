"""Reward designs: what a completion earns beyond a right answer, and the prompt that asks for it.

"From Sight to Insight" (Sharif et al. 2026, arXiv 2601.00215) asks completions for sections between markers and pays a
bounded score for each; only the answer is verified. The paper's names and weights; how sentences are counted and what a
well-formed section is are ours. `semantic` is NoisyGRPO's reward for answers that no rule can check (2510.21122).

    R = sum over sections of weight * score
    score of a section = tanh(distinct sentences) - tanh(repeated sentences), of the answer: right or wrong

Nothing but the answer is checked for truth: with `no_accuracy` rewards can rise while accuracy falls.
"""

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from typing import NamedTuple

import torch

from common.rewards.answers import LONGEST_ANSWER, READERS, check, extract, score
from common.rewards.own import is_own, load_reward, own_rewards
from common.rewards.reading import normalize, number

REQUEST = "Think between <think> and </think>, then give only the final answer between <answer> and </answer>."
# Instruct models of the families do this from the start, and write <think> hardly ever.
PLAIN_REQUEST = "Reason step by step, then give only the final answer in \\boxed{}."
# Weights of the sections, in the order in which they are to be written (2601.00215, table 6).
DESIGNS = {
    "vanilla": {"think": 0.10, "answer": 0.90},
    "only_accuracy": {"answer": 1.00},
    "mixture": {"description": 0.06, "think": 0.06, "rethink": 0.08, "answer": 0.80},
    "continuous": {"description": 0.06, "think": 0.06, "rethink": 0.08, "answer": 0.80},
    "visual_fusion": {"think": 0.10, "visual": 0.10, "answer": 0.80},
    "no_accuracy": {"description": 0.30, "think": 0.30, "rethink": 0.30, "answer": 0.10},
    "semantic": {"format": 1.00, "answer": 1.00},
}
MARKERS = {
    "description": "image description", "think": "think", "visual": "visual", "rethink": "rethink", "answer": "answer"
}  # fmt: skip
_STAGES = (
    "First describe everything in the picture that matters between <image description> and </image description>, then "
    "reason between <think> and </think>, then check the reasoning against the picture between <rethink> and "
    "</rethink>, then give only the final answer between <answer> and </answer>: <image description></image "
    "description><think></think><rethink></rethink><answer></answer>"
)
REQUESTS = {
    "vanilla": REQUEST,
    "semantic": REQUEST,
    "only_accuracy": "Reason step by step, then give only the final answer between <answer> and </answer>.",
    "mixture": _STAGES,
    "continuous": _STAGES,
    "no_accuracy": _STAGES,
    "visual_fusion": (
        "Reason between <think> and </think>; inside, put each fact that you take from the picture between <visual> "
        "and </visual>. Then give only the final answer between <answer> and </answer>: "
        "<think><visual></visual></think><answer></answer>"
    ),
}


def request_for(design: str, tiny: bool = False) -> str:
    """What {request} in a prompt template stands for: reasoning in plain words and a boxed answer, or the markers that
    a design pays for.

    The built-in model has read nothing but `REQUEST` in its life and answers others with nonsense: it gets that always.
    """
    return REQUEST if tiny else REQUESTS.get(design, PLAIN_REQUEST)


def check_reward(design: str, example=None) -> None:
    """Stop where there is no such design, or where a function of one's own fails on the right answer to `example` or
    on an empty completion.

    Raises:
        SystemExit: one line.
    """
    if not is_own(design) and design not in ("accuracy", *DESIGNS):
        names = ", ".join(("accuracy", *DESIGNS))
        raise SystemExit(f"--reward {design}: must be one of {names}, or a function, as path/to/file.py:function")
    if is_own(design):
        load_reward(design)
        if example is not None:
            own_rewards(design, [f"<think></think><answer>{example.answer}</answer>", ""], [example] * 2)


def check_markers(design: str, template: str) -> None:
    """Stop where a template does not ask for a section that has weight.

    Raises:
        SystemExit: one line that names the marker.
    """
    for section in DESIGNS.get(design, {}):
        marker = f"<{MARKERS.get(section, 'think')}>"
        if marker not in template.replace("{request}", request_for(design)):
            raise SystemExit(f"--prompt-template {template!r}: --reward {design} pays for {marker}, which it lacks")


def check_tokenizer(design: str, tokenizer) -> None:
    """Stop where a tokenizer cannot write a marker so that it is read again.

    Raises:
        SystemExit: one line that names the marker.
    """
    for section in DESIGNS.get(design, {}):
        name = MARKERS.get(section, "think")
        text = f"<{name}>a</{name}>"
        again = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=True)
        if again != text:
            raise SystemExit(f"--reward {design}: the tokenizer makes {again!r} of {text!r}")


class Rewards(NamedTuple):
    """What R completions earn, and why."""

    rewards: list[float]  # [R]
    accuracy: list[float]  # [R] 1.0 or 0.0: is the answer right
    terms: dict[str, list[float]]  # name of a section -> its score [R]
    verdicts: dict[str, int]  # how often answers were checked with which outcome


def reward_completions(design: str, completions: Sequence[str], examples: Sequence, encoder: str = "") -> Rewards:
    """Rewards of completions by a design of `DESIGNS`, by a function of one's own, or by `accuracy`: a right answer,
    tagged or boxed. Example i belongs to completion i; `encoder` names a sentence encoder, for `semantic` only."""
    accuracy, verdicts = score(completions, examples, "tag" if design in DESIGNS else "auto")
    rewards, terms = design_rewards(design, completions, examples, accuracy, encoder)
    return Rewards(rewards, accuracy, terms, verdicts)


def design_rewards(
    design: str, completions: Sequence[str], examples: Sequence, accuracy: Sequence[float], encoder: str = ""
) -> tuple[list[float], dict[str, list[float]]]:
    """The reward of each completion, and the scores of its sections by name. Example i belongs to completion i.

    `accuracy` holds the verdicts by the <answer> section; with `accuracy` as design it is the reward. `encoder` names a
    sentence encoder, for `semantic` only.
    """
    if design == "accuracy":
        return list(accuracy), {}
    if is_own(design):
        return own_rewards(design, completions, examples)
    pairs = list(zip(completions, examples, accuracy, strict=True))
    if design == "semantic":
        found = [
            re.search(r"<answer>(.*?)</answer>", text, re.DOTALL | re.IGNORECASE | re.ASCII) for text in completions
        ]
        answers = [match[1].strip() if match else "" for match in found]
        likeness = similarities(answers, [e.answer for e in examples], load_encoder(encoder))
        rows = [
            {"format": well_formed(text), "answer": semantic_score(answer, e, alike)}
            for text, e, answer, alike in zip(completions, examples, answers, likeness, strict=True)
        ]
    else:
        rows = [section_scores(design, text, example, bool(right)) for text, example, right in pairs]
    weights = DESIGNS[design]
    rewards = [sum(weights[name] * row[name] for name in weights) for row in rows]
    return rewards, {name: [row[name] for row in rows] for name in weights}


def section_scores(design: str, completion: str, example, right: bool) -> dict[str, float]:
    """The scores of a design's sections in one completion; `right` is its verdict."""
    scores, end = {}, 0
    for name in DESIGNS[design]:
        if name == "answer":
            scores[name] = answer_score(design, completion, example, right)
        elif name == "visual":
            thought, _ = section(completion, "think", 0)
            facts = re.findall(r"<visual>(.*?)</visual>", thought or "", re.DOTALL | re.IGNORECASE | re.ASCII)
            scores[name] = sentence_score("\n".join(facts))
        else:
            text, after = section(completion, name, end)
            scores[name] = sentence_score(text or "")
            end = after if text is not None else end
    return scores


def section(completion: str, name: str, start: int) -> tuple[str | None, int]:
    """The text of a section and where it ends; None unless it has exactly one opening and, behind it, one closing
    marker, and does not begin before `start`, the end of the section before it."""
    found = [
        list(re.finditer(f"<{slash}{MARKERS[name]}>", completion, re.IGNORECASE | re.ASCII)) for slash in ("", "/")
    ]
    if any(len(markers) != 1 for markers in found):
        return None, 0
    opening, closing = found[0][0], found[1][0]
    if opening.end() > closing.start() or opening.start() < start:
        return None, 0
    return completion[opening.end() : closing.start()], closing.end()


def sentence_score(text: str) -> float:
    """tanh(U) - tanh(D) of a text with U distinct and D repeated sentences: between -0.24 and 1.

    >>> [round(sentence_score(t), 6) for t in ("", "A dog.", "A dog. A cat.", "A dog. a dog!")]
    [0.0, 0.761594, 0.964028, 0.0]
    """
    pieces = sentences(text)
    distinct = len(set(pieces))
    return math.tanh(distinct) - math.tanh(len(pieces) - distinct)


def sentences(text: str) -> list[str]:
    """Sentences in one spelling each: cut at line ends and after . ! ? where white space follows, list markers, case
    and final punctuation left out, and pieces without a letter or digit."""
    text = re.sub(r"</?visual>", "", text, flags=re.IGNORECASE | re.ASCII)
    pieces = []
    for line in text.splitlines():
        line = re.sub(r"^\s*(?:\d+[.)]|[-*•])\s+", "", line)
        pieces += re.split(r"(?<=[.!?])(?=\s|$)|(?<=[。！？])", line)
    pieces = [" ".join(piece.split()).rstrip(" .!?。！？").casefold() for piece in pieces]
    return [piece for piece in pieces if any(char.isalnum() for char in piece)]


def answer_score(design: str, completion: str, example, right: bool) -> float:
    """1 or 0; for `continuous` partial credit; for `no_accuracy` 1 for any answer."""
    answer, status = extract(completion, "tag")
    if design == "no_accuracy":
        return float(answer is not None or status == "hedge")
    if design == "continuous" and not right and answer is not None:
        return partial_credit(answer[:LONGEST_ANSWER], example.answer, example.kind)
    return float(right)


def partial_credit(answer: str, gold: str, kind: str) -> float:
    """Between 0 and 1 for times and numbers by their distance, else 0: what a wrong answer earns by `continuous`.

    Times: half for hours, 1 - d/5 up to 2 apart on the dial, half for minutes, 1 - d/20 up to 10 apart.
    Numbers: 1 / (1 + d) up to 5 apart.
    """
    answer, gold = normalize(answer), normalize(gold)
    if kind == "time":
        times = READERS["time"](answer), READERS["time"](gold)
        if None in times:
            return 0.0
        hours, minutes = (abs(a - b) for a, b in zip(*times, strict=True))
        hours, minutes = min(hours, 12 - hours), min(minutes, 60 - minutes)
        return 0.5 * (hours <= 2) * (1 - hours / 5) + 0.5 * (minutes <= 10) * (1 - minutes / 20)
    if kind in ("int", "float3", "math"):
        value, target = number(answer), number(gold)
        if value is None or target is None or abs(value - target) > 5:
            return 0.0
        return float(1 / (1 + abs(Fraction(value - target))))
    return 0.0


def overlong_penalty(lengths: torch.Tensor, limit: int, cache: int) -> torch.Tensor:
    """Reward [R] float32 of completions of `lengths` [R] tokens: 0 up to `cache` below the limit, then falling to -1 at
    it (DAPO, eq. 13).

    >>> overlong_penalty(torch.tensor([10, 16, 17, 18, 20, 21]), 20, 4)
    tensor([-0.0000, -0.0000, -0.2500, -0.5000, -1.0000, -1.0000])
    """
    return -((lengths - (limit - cache)) / cache).clamp(0, 1)


# ---------------------------------------------------------------------------------------------- answers in free words


def well_formed(completion: str) -> float:
    """1 where the whole completion is one think and one answer block (NoisyGRPO's format reward)."""
    return float(bool(re.fullmatch(r"<think>.*?</think>\s*<answer>.*?</answer>", completion, re.DOTALL)))


def semantic_score(answer: str, example, likeness: float) -> float:
    """Likeness in meaning from 0.6 upwards, and 1 for the right letter of a question with choices or the right yes or
    no (NoisyGRPO's accuracy reward, without the quirks of its patterns)."""
    kind = example.kind if example.kind in ("letter", "letters") else "choice" if example.choices else "yesno"
    if answer and (kind != "yesno" or normalize(example.answer).lower() in ("yes", "no")):
        if check(f"<answer>{answer}</answer>", example.answer, kind, example.choices, "tag").correct:
            return 1.0
    return likeness if answer and likeness >= 0.6 else 0.0


def similarities(answers: Sequence[str], references: Sequence[str], encoder) -> list[float]:
    """Cosines of sentence embeddings, clipped to [-1, 1]; the encoder's `encode` takes a list of texts."""
    ours, theirs = (encoder.encode(list(texts), normalize_embeddings=True) for texts in (answers, references))
    return [max(-1.0, min(1.0, float(x @ y))) for x, y in zip(ours, theirs, strict=True)]


@cache
def load_encoder(name: str):
    """A sentence encoder by its hub id or folder, from the package sentence-transformers, which only this needs.

    Raises:
        SystemExit: the package or the encoder is not there.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise SystemExit("--reward semantic: needs the package sentence-transformers (pip install it)") from None
    try:
        return SentenceTransformer(name)
    except Exception as error:  # whatever the hub's client and the package raise
        raise SystemExit(f"--encoder {name}: cannot be loaded ({' '.join(str(error).split())[:200]})") from None
