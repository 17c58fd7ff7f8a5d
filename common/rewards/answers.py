"""Is a completion's answer right? Extraction, normalization and comparison, one kind of answer at a time.

Text work runs here, in time linear in the text, without `eval` and without patterns that backtrack. Symbolic equality
alone goes to math-verify, in a separate process that can be killed (`math_worker.py`); it is started when first
needed, which the built-in puzzles never do.
"""

import json
import os
import re
import selectors
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from queue import LifoQueue

KINDS = ("int", "math", "float3", "rounded", "relaxed", "letter", "letters", "choice", "time", "yesno", "exact")
STATUSES = ("ok", "no_answer", "hedge", "unparsed", "too_long", "timeout", "error")
LONGEST_COMPLETION, LONGEST_ANSWER, LONGEST_EXPRESSION, LONGEST_NUMBER = 65_536, 2_048, 512, 200  # characters
DEADLINE, START_DEADLINE = 2.0, 60.0  # seconds, of one comparison and of the worker's imports
MOST_TIMEOUTS = 8  # of a worker in one call of `score`; its further comparisons are then false without being tried


@dataclass(frozen=True)
class Verdict:
    """`status` is `ok` where an answer was found and could be compared; with any other it is wrong."""

    correct: bool
    answer: str | None
    status: str


def check(
    completion: str, gold: str, kind: str, choices: Sequence[str] | None = None, answer_format: str = "auto"
) -> Verdict:
    """Compare a completion's final answer with the gold answer. Never raises, never runs what it reads.

    `answer_format` is `tag` (between <answer> and </answer>), `boxed` (\\boxed{...}), or `auto`: tag, else boxed.

    >>> check("<think>6 and 6</think><answer>12</answer>", "12", "int")
    Verdict(correct=True, answer='12', status='ok')
    """
    answer = None
    try:
        answer, status = extract(completion, answer_format)
        if answer is None:
            return Verdict(False, None, status)
        if len(answer) > LONGEST_ANSWER:
            return Verdict(False, None, "too_long")
        correct, status = compare(normalize(answer), normalize(gold), kind, choices)
        return Verdict(correct, answer, status)
    except Exception:  # a reward that raises is 0, is counted, and does not end the run
        return Verdict(False, answer, "error")


def score(
    completions: Sequence[str], examples: Sequence, answer_format: str = "auto"
) -> tuple[list[float], dict[str, int]]:
    """Verdicts 0.0 or 1.0 of completions, and how often each status came up. Example i belongs to completion i.

    Examples have `answer`, `kind` and `choices`.
    """
    for worker in _workers:
        worker.timeouts = 0

    def verdict(text: str, example) -> Verdict:
        return check(text, example.answer, example.kind, example.choices, answer_format)

    if len(completions) != len(examples):
        raise ValueError(f"{len(completions)} completions for {len(examples)} examples")
    with ThreadPoolExecutor(len(_workers) if any(e.kind == "math" for e in examples) else 1) as threads:
        verdicts = list(threads.map(verdict, completions, examples))  # a thread waits for each worker
    counts = Counter(verdict.status for verdict in verdicts)
    return [float(verdict.correct) for verdict in verdicts], {status: counts[status] for status in STATUSES}


def prepare_gold(gold, kind: str, choices: Sequence[str] | None = None) -> str:
    """A data set's answer as text that `check` can compare with: taken out of \\boxed{} or <answer>, trimmed.

    Raises:
        ValueError: one line, where there is no answer or it is not of that kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown answer kind {kind!r}: choose one of {', '.join(KINDS)}")
    if isinstance(gold, list | tuple) and len(gold) == 1:
        gold = gold[0]
    if gold is None or isinstance(gold, list | tuple | dict) or not str(gold).strip():
        raise ValueError(f"no answer ({gold!r})")
    text = str(gold).strip()
    if "\\boxed" in text or "<answer>" in text.lower():
        found, _ = extract(text, "auto")
        if found is None:
            raise ValueError(f"no answer inside {text[:60]!r}")
        text = found
    plain = normalize(text)
    if kind == "choice" and choices:
        usable = any(same_text(plain, normalize(choice)) for choice in choices)
    elif kind in READERS:
        usable = READERS[kind](plain, choices) is not None
    else:
        usable = bool(plain)
    if not usable:
        raise ValueError(f"the answer {text[:60]!r} is not of kind {kind}")
    return text


# ------------------------------------------------------------------------------------------------- extraction

_ASCII_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}  # unlike str.lower(), keeps the length
_CONNECTIVES = {"or", "and", "either", "maybe", "possibly", "perhaps", "alternatively"}


def extract(completion: str, answer_format: str = "auto") -> tuple[str | None, str]:
    """The final answer and its status: `ok`, `no_answer`, or `hedge` where several different ones are given."""
    text = completion[-LONGEST_COMPLETION:]
    lower = text.translate(_ASCII_LOWER)
    opened = max(lower.rfind("<think>"), lower.rfind("<rethink>"))
    closed = max(lower.rfind("</think>"), lower.rfind("</rethink>"))
    if opened > closed:
        return None, "no_answer"  # the reasoning was cut off
    if closed >= 0:
        start = lower.index(">", closed) + 1
        text, lower = text[start:], lower[start:]
    if answer_format in ("tag", "auto"):
        found = {opened_in_place(content) for content in tagged(text, lower)} - {""}
        if len(found) > 1:
            return None, "hedge"
        if found:
            return found.pop(), "ok"
    if answer_format in ("boxed", "auto"):
        answer = opened_boxes(text)
        if answer:
            return answer, "ok"
    return None, "no_answer"


def opened_boxes(text: str) -> str:
    """What stands in the last boxes of a text, different contents after commas; empty where there is none."""
    contents = dict.fromkeys(unbox(content.strip()) for content in last_boxes(text))
    return ", ".join(content for content in contents if content)


def opened_in_place(text: str) -> str:
    """What stands between two markers: its box where only words are around it, else all of it, boxes opened."""
    spans = box_spans(text)
    if not spans:
        return text.strip()
    before, after = text[: spans[0][0]], text[spans[-1][1] :]
    if len(spans) == 1 and only_words(before) and only_words(after) and not unit_of(" " + after.strip(" $.*")):
        return unbox(text[spans[0][0] : spans[0][1]])
    start = spans[0][0] if only_words(before) else 0
    pieces = []
    for begin, end in spans:
        pieces += [text[start:begin], unbox(text[begin:end])]
        start = end
    return "".join([*pieces, "" if re.fullmatch(r"(?:[\s$*.]|\\[)\]])*", after) else after]).strip()


def only_words(text: str) -> bool:
    """Nothing that could be an answer, nor a sign before one: `The answer is`, `x =`, `$`."""
    words = re.sub(r"\\[()\[\]]|[\s$*.:,]+", " ", text).split()
    return all(re.fullmatch(r"[A-Za-z']{2,}|[a-zI]|=", word) for word in words) and not (
        {word.lower() for word in words} & (_CONNECTIVES | {"not", "yes", "no"})
    )


def tagged(text: str, lower: str) -> list[str]:
    """What stands between <answer> and </answer>; a second opening marker starts the pair again."""
    contents, start = [], None
    for marker in re.finditer(r"</?answer>", lower):
        if marker[0] == "<answer>":
            start = marker.end()
        elif start is not None:
            contents.append(text[start : marker.start()])
            start = None
    return contents


def box_spans(text: str) -> list[tuple[int, int]]:
    """Where each \\boxed{...} begins and ends."""
    boxes, position = [], 0
    while (begin := text.find("\\boxed{", position)) >= 0:
        depth = 0
        for brace in re.finditer(r"\\[{}\\]|[{}]", text[begin + 6 :]):
            depth += (brace[0] == "{") - (brace[0] == "}")
            if depth == 0 and brace[0] == "}":
                break
        else:
            break  # never closed: dropped, with everything after it
        position = begin + 6 + brace.end()
        boxes.append((begin, position))
    return boxes


def last_boxes(text: str) -> list[str]:
    """Contents of the last \\boxed{...} and of those before it that only an "or" or the like separates from it."""
    boxes = box_spans(text)
    joined = boxes[-1:]
    for box in reversed(boxes[:-1]):
        between = text[box[1] : joined[0][0]]
        if len(between) > 40 or re.search(r"[.!?](\s|$)", between):
            break
        words = re.sub(r"[\s$\\()\[\],;/.:*&]+", " ", between).lower().split()
        if not set(words) <= _CONNECTIVES:
            break
        joined.insert(0, box)
    return [text[begin + 7 : end - 1] for begin, end in joined]


def unbox(answer: str) -> str:
    """An answer that is itself one \\boxed{...} is what stands in it."""
    for _ in range(8):  # each time the whole text is read
        if not (answer.startswith("\\boxed{") and answer.endswith("}")):
            break
        boxes = last_boxes(answer)
        if len(boxes) != 1 or len(boxes[0]) != len(answer) - 8:
            break
        answer = boxes[0].strip()
    return answer


# ------------------------------------------------------------------------------------------------- normalization

_SUPERSCRIPTS = {c: str(i) for i, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
_SIGNS = {
    "−": "-", "–": "-", "⁄": "/", "×": r"\times ", "·": r"\cdot ", "°": r"^\circ", "π": r"\pi ", "∞": r"\infty ",
    "±": r"\pm ", "≈": r"\approx ", "∶": ":", "√": " sqrt",
}  # fmt: skip
_ABOUT = r"(?:\\approx|\\sim|about|approximately|approx\.?|roughly|around)"
_TEXT = r"text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|operatorname|mbox|emph|boldsymbol|underline|fbox"


def normalize(answer: str) -> str:
    """One spelling for what means the same: Unicode digits and signs, LaTeX spacing and text commands."""
    # Before NFKC, which would turn 10 squared into 102 and three and a half into 31/2.
    answer = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda m: "^{" + "".join(map(_SUPERSCRIPTS.get, m[0])) + "}", answer)
    for char in set(answer):
        if unicodedata.category(char) == "No" and "⁄" in (parts := unicodedata.normalize("NFKC", char)):
            answer = answer.replace(char, " " + parts.replace("⁄", "/"))
    answer = unicodedata.normalize("NFKC", answer)
    answer = "".join(
        str(unicodedata.decimal(c)) if c.isdecimal() else _SIGNS.get(c, c)
        for c in answer
        if unicodedata.category(c) != "Cf"
    )
    if answer.count("**") == 1:
        answer = answer.replace("**", "^")  # a power, not emphasis
    answer = re.sub(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![a-zA-Z])|\\\$|\\[,!;:()\[\]]|\$|\*\*", "", answer)
    answer = answer.replace("\\ ", " ").replace("~", " ").replace("\\%", "%").replace("{,}", ",")
    answer = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", answer)
    # From left to right, as it is written: the parser would take 4/3\pi for 4/(3\pi).
    answer = re.sub(r"(?<![\w.^/)\]}])(\d+) ?/ ?(\d+)(?= ?\\[a-z])", r"\\frac{\1}{\2}", answer)
    for _ in range(3):
        answer = re.sub(rf"\\(?:{_TEXT})\s?\{{([^{{}}]*)\}}", r"\1", answer)
    answer = re.sub(r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi ", answer)
    answer = re.sub(
        r"(?<![\\a-zA-Z])sqrt ?(?:\(([^(){}]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|[a-zA-Z](?![a-zA-Z])))",
        lambda match: rf"\sqrt{{{match[1] or match[2] or match[3] or ''}}}",
        answer,
    )
    answer = " ".join(answer.split())
    return answer.removesuffix(".").strip() if answer != "." else ""


def same_text(one: str, other: str) -> bool:
    return "".join(one.casefold().split()) == "".join(other.casefold().split())


# ------------------------------------------------------------------------------------------------- numbers

_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
_POWER = r"e([+-]?\d{1,3})| ?\\(?:times|cdot) ?10\^(?:\{ ?([+-]?\d{1,3}) ?\}|(\d))"
_PLAIN = re.compile(rf"([+-]?) ?({_DECIMAL})(?:{_POWER})?", re.IGNORECASE)
_FRACTION = re.compile(
    rf"([+-]?) ?(?:(\d+) ?)??(?:\\frac ?(?:\{{ ?([+-]?{_DECIMAL}) ?\}} ?\{{ ?([+-]?{_DECIMAL}) ?\}}|(\d) ?(\d))"
    rf"|({_DECIMAL}) ?/ ?({_DECIMAL}))"
)
_SPELLINGS = (  # of units: the first of a line stands for all
    "mm millimeter millimeters millimetre millimetres", "cm centimeter centimeters centimetre centimetres", "dm",
    "m meter meters metre metres", "km kilometer kilometers kilometre kilometres", "in inch inches", "ft foot feet",
    "yd yds yard yards", "mi mile miles", "mg milligram milligrams", "g gram grams", "kg kgs kilogram kilograms",
    "lb lbs pound pounds", "oz ounce ounces", "ml milliliter milliliters", "l liter liters litre litres",
    "s sec secs second seconds", "min mins minute minutes", "h hr hrs hour hours", "day days", "week weeks",
    "month months", "year years", "unit units", "deg degree degrees", "rad radian radians", "dollar dollars",
    "cent cents", "euro euros", "mph", "% percent", "n newton newtons", "j joule joules", "w watt watts",
    "v volt volts", "a ampere amperes amp amps", "hz", "k kelvin", "c", "f", "pa", "kpa", "mol mole moles",
)  # fmt: skip
_UNIT = {spelling: line.split()[0] for line in _SPELLINGS for spelling in line.split()}
_UNITS = "|".join(spelling for spelling in _UNIT if spelling != "%")
_QUANTITY_END = re.compile(
    r" ?(?:(%)|(\^ ?(?:\\circ|\{ ?\\circ ?\}) ?[CF]?)"
    rf"|(square |sq\.? |cubic )?({_UNITS})(?: ?/ ?({_UNITS}))?(?: ?\^ ?\{{?([23])\}}?)?)\.?",
    re.IGNORECASE | re.ASCII,  # else a dotless i matches an i
)


def unit_of(text: str) -> str | None:
    """One spelling of the unit that stands behind a number: `m2` for `m^2`, `square meters` and the like."""
    match = _QUANTITY_END.fullmatch(text)
    if not match:
        return None
    percent, degrees, power, name, per, exponent = match.groups()
    if percent or degrees:
        return "%" if percent else "deg"
    if len(text) == 1 and text not in "mgslhACFJKLNVW":
        return None  # 2a and 4n are algebra
    exponent = exponent or {"s": "2", "c": "3"}.get((power or " ")[0].lower(), "")
    return _UNIT[name.lower()] + exponent + (f"/{_UNIT[per.lower()]}" if per else "")


def decimal(text: str) -> Fraction | None:
    """A decimal literal, thousands commas and powers of ten included, as an exact number."""
    match = _PLAIN.fullmatch(text) if len(text) <= LONGEST_NUMBER else None
    if not match:
        return None
    sign, digits, *exponents = match.groups()
    value = Fraction(digits.replace(",", "").rstrip(".") or "0")
    value *= Fraction(10) ** int(next((e for e in exponents if e), "0"))
    return -value if sign == "-" else value


def number(text: str) -> Fraction | None:
    """A literal number: a decimal, a fraction, or a mixed number. Nothing is computed."""
    value = decimal(text)
    if value is not None or len(text) > LONGEST_NUMBER:
        return value
    match = _FRACTION.fullmatch(text)
    if not match:
        return None
    sign, whole, *parts = match.groups()
    top, bottom = (decimal(part) for part in parts if part is not None)
    if not bottom:
        return None
    value = int(whole or 0) + top / bottom
    return -value if sign == "-" else value


def quantity(text: str) -> tuple[Fraction, str] | None:
    """A literal number and its unit (empty: none)."""
    text = text.strip().removeprefix("€").removeprefix("£").removeprefix("¥").strip()
    value = number(text)
    if value is not None:
        return value, ""
    if len(text) > LONGEST_NUMBER:
        return None
    for end in re.finditer(r"(?<=[\d}.]) ?(?=[%^a-zA-Z])", text):  # where a number may stop and a unit start
        unit = unit_of(text[end.start() :])
        if unit and (value := number(text[: end.start()].strip())) is not None:
            return value, unit
    return None


def without_unit(text: str) -> tuple[str, str]:
    """`12\\sqrt{3} cm^2` as `12\\sqrt{3}` and `cm2`. Of single letters only an `m` set apart is a unit here."""
    for end in re.finditer(r"(?:(?<=[})])|(?<=\\pi))( ?)(?=[a-zA-Z])", text):
        rest = text[end.end() :]
        unit = unit_of(rest)
        if unit and (rest[1:2].isalpha() or (rest[0] == "m" and end[1])):
            return text[: end.start()], unit
    return text, ""


def same_quantity(one: tuple[Fraction, str], gold: tuple[Fraction, str]) -> bool:
    """Equal to one in a million. A unit that only one side has is ignored; two different ones are not converted."""
    (value, unit), (target, gold_unit) = one, gold

    def close(a: Fraction, b: Fraction) -> bool:
        return abs(a - b) <= abs(b) / 1_000_000

    if unit and gold_unit and unit != gold_unit:
        return False
    if (unit == "%") != (gold_unit == "%"):
        return close(value, target) or close(value / 100 if unit == "%" else value * 100, target)
    return close(value, target)


def without_name(text: str) -> str:
    """`x = 5`, `x \\approx 5` and `about 5` as `5`."""
    text = re.sub(r"^\\?[a-zA-Z]\w{0,10} ?(?:= ?|(?=\\approx))", "", text)
    return re.sub(rf"^{_ABOUT} ?(?=[-+\d.\\])", "", text)


# Words beside a number that make another one of it.
_CHANGE = set("hundred thousand million billion trillion dozen squared cubed not".split())


def integer(text: str, _choices=None) -> int | None:
    """The one whole number that a text states: a literal, or a sentence with a single number and no operator."""
    text = without_name(text)
    value = decimal(text)
    if value is None and (with_unit := quantity(text)) and "/" not in text and "\\frac" not in text:
        value = with_unit[0]
    if value is None:
        numbers = re.findall(rf"(?<![\w.,])-?{_DECIMAL}(?![\d,]*\d)", text)
        digits = len(re.findall(r"\d+", text))
        if (
            len(numbers) != 1
            or {"than", *_CHANGE} & set(text.lower().split())
            or digits != len(re.findall(r"\d+", numbers[0]))
            or re.search(r"[+*/^=\\\[\]{}<>]| - ", text)
        ):
            return None
        value = decimal(numbers[0])
    return int(value) if value is not None and value.denominator == 1 else None


# ------------------------------------------------------------------------------------------------- the other readers


_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:correct |final |right |best )?"
    r"(?:answer|ans|options?|choice)(?: is)?[:.]? (?:option |choice )?",
    re.IGNORECASE,
)
_OTHER_LETTER = re.compile(  # behind a first one: `or B`, `, (B)`, `(B)`, `B.` and the like
    r"(?:^|\b(?:or|and|OR|AND)\b|[,/&;|]) ?\(?[A-H]\)?(?:[.,:;)]|$)|\([A-H]\)|(?<![A-Za-z])[A-H][.):](?![a-z])"
)


def without_lead(text: str) -> str:
    """`The answer is B` as `B`."""
    match = _LEAD.match(text)
    return text[match.end() :] if match else text


def same_option(one: str, other: str) -> bool:
    numbers = quantity(one), quantity(other)
    return same_text(one, other) or (all(numbers) and same_quantity(*numbers))


def by_letter(choices: Sequence[str] | None) -> dict[str, str]:
    """The options of a question by their letters."""
    return {chr(ord("A") + place): normalize(str(choice)) for place, choice in enumerate(choices or ())}


def letter(text: str, choices: Sequence[str] | None = None) -> str | None:
    """The one option that a text names: `B`, `(B)`, `Option B`, `B. its text`, or its text alone.

    Behind the letter the text may be put otherwise, but not be another option's, and no second letter may follow.
    """
    options = by_letter(choices)
    spoken = without_lead(text)
    match = re.fullmatch(r"[\"'`*_(\[{\\]{0,3}([a-zA-Z])[\"'`*_)\]}\\]{0,3}[.:,;]?", spoken)
    if match:
        return match[1].upper()
    for same in (same_text, same_option):
        named = [name for name, o in options.items() if same(o, text) or same(o, without_name(spoken))]
        if len(named) == 1:
            return named[0]
    match = re.fullmatch(r"([A-Z])(?: ?[-,] | )(.+)", spoken)
    if match:  # without a mark behind the letter only with that option's own text, as `B 12 cm` or `B (12 cm)`
        rest = match[2][1:-1] if match[2].startswith("(") and match[2].endswith(")") else match[2]
        named = [name for name, option in options.items() if same_option(option, rest)]
        return match[1] if named == [match[1]] else None
    match = re.fullmatch(r"(?:\(([a-z])\)[.:]?|([a-z])[.:)]) ?(.+)", spoken, re.IGNORECASE)
    if not match:
        return None  # an A before other words is an article, not an answer
    name, rest = match[1] or match[2], match[3]
    own = options.pop(name.upper(), None)
    if own is not None and same_text(own, rest):
        return name.upper()
    if (choices and own is None) or any(
        same_option(other, without_name(part.strip()))  # `B. 60 or 75`
        for part in re.split(r"[,;]| or | and ", rest)
        for other in options.values()
    ):
        return None
    return None if _OTHER_LETTER.search(rest if name.isupper() else rest.upper()) else name.upper()


def letters(text: str, _choices=None) -> frozenset[str] | None:
    """The set of letters in `A, C` or `(A) and (C)`, or the one of `A. its text`."""
    parts = [part for part in re.split(r"[,;&{}\[\]\\\s]+|and", without_lead(text)) if part]
    found = [re.fullmatch(r"\(?([A-Za-z])\)?\.?", part) for part in parts]
    if parts and all(found):
        return frozenset(m[1].upper() for m in found)
    one = letter(text)
    return frozenset(one) if one else None


def clock(text: str, _choices=None) -> tuple[int, int] | None:
    """Hours on a twelve-hour dial, and minutes."""
    text = re.sub(r"^(?:it|the time) is ", "", without_lead(text), flags=re.IGNORECASE)
    match = re.fullmatch(r"(\d{1,2}):(\d{2})(?::00)?(?: ?[ap]\.?m\.?| o'clock)?", text, re.IGNORECASE)
    if not match or int(match[1]) > 24 or int(match[2]) > 59:
        return None
    return int(match[1]) % 12, int(match[2])


def yes_or_no(text: str, _choices=None) -> str | None:
    words = re.findall(r"[a-z]+", without_lead(text).lower())
    if not words or words[0] not in ("yes", "no"):
        return None
    return None if {"yes", "no"} <= set(words) else words[0]


def real(text: str, _choices=None) -> Fraction | None:
    """The one number of a text, its unit dropped, per cent as hundredths."""
    value = quantity(without_name(without_lead(text)))
    return None if value is None else value[0] / 100 if value[1] == "%" else value[0]


READERS = {
    "int": integer,
    "letter": letter,
    "letters": letters,
    "time": clock,
    "yesno": yes_or_no,
    "float3": real,
    "rounded": real,
}


# ------------------------------------------------------------------------------------------------- comparison


def compare(answer: str, gold: str, kind: str, choices: Sequence[str] | None = None) -> tuple[bool, str]:
    """Whether two normalized answers agree as answers of that kind, and the status."""
    if kind == "math":
        return same_math(answer, gold)
    if kind == "exact":
        return gold.casefold() in (answer.casefold(), without_lead(answer).casefold()), "ok"
    if kind == "relaxed":
        value, target = real(answer), real(gold)
        if value is None or not target:
            return same_text(answer, gold), "ok"
        return abs(value - target) <= abs(target) / 20, "ok"
    if kind == "choice":
        found, options = letter(answer, choices), by_letter(choices)
        # Options may be letters or numbers themselves: their text goes before their place.
        for said in filter(None, (answer, found)):
            if any(same_text(option, said) for option in options.values()):
                return same_text(said, gold), "ok"
        return same_text(options.get(found, ""), gold), "ok" if found else "unparsed"
    if kind not in READERS:
        return False, "error"
    found, target = READERS[kind](answer, choices), READERS[kind](gold, choices)
    if found is None or target is None:
        return False, "unparsed"
    if kind == "float3":
        return abs(found - target) <= Fraction(1, 1000), "ok"
    if kind == "rounded":  # to the decimals that the gold answer is written with
        return abs(found - target) <= half_a_place(gold), "ok"
    return found == target, "ok"


def half_a_place(gold: str) -> Fraction:
    """Half a unit of the last decimal of `1.50`, `12 cm` and `50%`; nothing beside fractions and powers of ten."""
    match = re.match(rf"[+-]? ?{_DECIMAL}(?! ?[\d.,/\\e])", gold)
    if not match:
        return Fraction(0)
    return Fraction(1, 2 * 10 ** (len(match[0].partition(".")[2]) + 2 * (unit_of(gold[match.end() :]) == "%")))


def same_math(answer: str, gold: str, depth: int = 0) -> tuple[bool, str]:
    """Equal text, then equal quantities, then lists, sets, tuples and intervals by element, then symbolic equality."""
    if same_text(answer, gold):
        return True, "ok"
    answer = without_lead(answer)
    if gold.startswith("("):  # `(x, y) = (3, 2)`, `P(3, 2)`
        answer = re.sub(r"^(?:\([a-z], ?[a-z]\) ?=|[A-Z]'{0,2} ?=?) ?(?=\()", "", answer)
    if "=" not in gold and answer.count("=") < 2:  # with more, names may tell the elements of a list apart
        answer = without_name(answer)
    elif "=" not in answer and gold.count("=") < 2:
        gold = without_name(gold)
    if same_text(answer, gold):
        return True, "ok"
    value, target = quantity(answer), quantity(gold)
    if value and target:
        return same_quantity(value, target), "ok"
    words = re.fullmatch(rf"([-+]?{_DECIMAL}) ((?:[A-Za-z]{{3,}}(?: |$)){{1,3}})", answer) if target else None
    if words:  # `12 people`
        counted = not {"times", "plus", "minus", "over", "and", *_CHANGE} & set(words[2].lower().split())
        return counted and same_quantity((number(words[1]), ""), target), "ok"
    if all(re.fullmatch(r"[A-Za-z ]{3,}", text) for text in (answer, gold)):
        return False, "ok"  # words, or letters in order, which algebra would take for products
    (answer, unit), (gold, gold_unit) = without_unit(answer), without_unit(gold)
    if unit and gold_unit and unit != gold_unit:
        return False, "ok"
    parts, gold_parts = elements(as_list(answer)), elements(as_list(gold))
    if (parts or gold_parts) and depth == 0:
        if parts and not parts[0] and not gold_parts and " or " in answer:  # `5/2 or 2.5`
            return all(same_math(part, gold, depth=1)[0] for part in parts[1]), "ok"
        if not parts or not gold_parts or len(parts[1]) != len(gold_parts[1]):
            return False, "ok"
        return same_elements(parts, gold_parts)
    worker = _idle.get()
    try:
        return worker.equal(answer, gold)
    finally:
        _idle.put(worker)


def as_list(text: str) -> str:
    """`3 and 5`, `3; 5` and `3 or 5` as `3, 5`, `a \\pm b` as `a + b, a - b`."""
    if text.count(r"\pm") == 1 and "," not in text:
        plus, minus = (text.replace(r"\pm", sign).strip() for sign in "+-")
        text = f"{plus.removeprefix('+')}, {minus}"
    return re.sub(r"[,;]? (?:and|or) |;", ",", text)


def elements(text: str) -> tuple[str, list[str]] | None:
    """The brackets around a list (`()`, `[)`, `{}` or none) and what stands between its outer commas."""
    brackets = ""
    inner = text
    for opening, closing in (("\\{", "\\}"), ("{", "}"), ("(", ")"), ("(", "]"), ("[", ")"), ("[", "]")):
        if len(text) > 2 and text.startswith(opening) and text.endswith(closing):
            brackets, inner = opening[-1] + closing[-1], text[len(opening) : -len(closing)]
            break
    parts, depth, start = [], 0, 0
    for place, char in enumerate(inner):
        depth += (char in "([{") - (char in ")]}")
        if depth < 0:
            return None
        if char == "," and depth == 0:
            parts.append(inner[start:place].strip())
            start = place + 1
    parts.append(inner[start:].strip())
    parts = [part for part in parts if part]
    if depth or (len(parts) == 1 and brackets != "{}") or not 0 < len(parts) <= 32:
        return None
    return brackets, parts


def by_name(parts: list[str]) -> dict[str, str] | None:
    """`x = 3` and `y = 2` as a table; none where one has no name or two have the same letter, as `x_1` and `x_2`."""
    found = [re.fullmatch(r"([a-zA-Z])\w{0,10} ?= ?([^=]+)", part) for part in parts]
    table = {match[1]: match[2] for match in found if match}
    return table if len(table) == len(parts) else None


def same_elements(one: tuple[str, list[str]], gold: tuple[str, list[str]]) -> tuple[bool, str]:
    (brackets, parts), (gold_brackets, targets) = one, gold
    if brackets and gold_brackets and brackets != gold_brackets:
        return False, "ok"
    named, gold_named = by_name(parts), by_name(targets)
    if named and gold_named:
        return named.keys() == gold_named.keys() and all(same_math(named[n], gold_named[n], 1)[0] for n in named), "ok"
    ordered = bool(gold_brackets or gold_named) and gold_brackets != "{}"
    if ordered and named and named.keys() <= set("xyz"):
        parts = [named[name] for name in sorted(named)]
    left = list(targets)
    for i, part in enumerate(parts):
        for target in [targets[i]] if ordered else left:
            if same_math(part, target, depth=1)[0]:
                left.remove(target)
                break
        else:
            return False, "ok"
    return True, "ok"


# ------------------------------------------------------------------------------------------------- symbolic equality

_TOO_HEAVY = re.compile(
    r"\^ ?(?:[^{\s] ?|\{[^}]{0,60})\^"  # a power in an exponent
    r"|\d{16}|(?:e|\^ ?\{? ?[+-]?)\d{3}"  # numbers and exponents that are written to be large
    r"|(?:[)\]}!]|\d{3}) ?!"  # factorials of anything but a small number
    r"|\\(?:int|sum|prod|lim|binom)",
    re.IGNORECASE,
)


def symbolic_work_is_bounded(text: str) -> bool:
    """Refuse what could keep a computer algebra system busy, and what it would read although brackets are open."""
    opened, closed = sum(map(text.count, "([{")), sum(map(text.count, ")]}"))
    return len(text) <= LONGEST_EXPRESSION and opened == closed <= 60 and _TOO_HEAVY.search(text) is None


class _Worker:
    """The process that compares symbolically: started when first needed, killed when it takes too long."""

    def __init__(self):
        self.process, self.timeouts = None, 0
        self.ask_once = lru_cache(maxsize=100_000)(self.ask)

    def equal(self, answer: str, gold: str) -> tuple[bool, str]:
        if not (symbolic_work_is_bounded(answer) and symbolic_work_is_bounded(gold)):
            return False, "unparsed"
        if self.timeouts >= MOST_TIMEOUTS:
            return False, "timeout"
        try:
            return self.ask_once(answer, gold), "ok"
        except TimeoutError:
            self.timeouts += 1
            return False, "timeout"

    def ask(self, answer: str, gold: str) -> bool:
        if self.process is None or self.process.poll() is not None:
            self.start()
        try:
            self.process.stdin.write(json.dumps([answer, gold]) + "\n")
            self.process.stdin.flush()
            return self.read(DEADLINE)
        except (OSError, ValueError):  # it died under the question
            self.kill()
            raise TimeoutError from None

    def start(self) -> None:
        root = str(Path(__file__).parents[2])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "common.rewards.math_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=root,
            env={**os.environ, "PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""},
        )
        self.read(START_DEADLINE)

    def read(self, seconds: float):
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                self.kill()
                raise TimeoutError
        return json.loads(self.process.stdout.readline())

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


_workers = [_Worker() for _ in range(min(8, os.cpu_count() or 1))]
_idle: LifoQueue[_Worker] = LifoQueue()  # last in, first out: a second process starts when there is work for two
for _worker in _workers:
    _idle.put(_worker)
