"""Is a completion's answer right? Extracted, normalized, read as an answer of its kind, and compared with the gold one.

Text work runs here and in `reading.py`, in time linear in the text, without `eval` and without patterns that backtrack.
Symbolic equality alone goes to math-verify, in a process that can be killed (`math_worker.py`); it is started when
first needed, which the built-in puzzles never do.
"""

import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction

from common.rewards import reading
from common.rewards.math_worker import WORKERS, same_expression
from common.rewards.reading import RELATION, for_algebra, is_name, normalize, quantity, same_text, without_name

KINDS = ("int", "math", "float3", "rounded", "relaxed", "letter", "letters", "choice", "time", "yesno", "exact")
STATUSES = ("ok", "no_answer", "hedge", "unparsed", "too_long", "timeout", "error")
LONGEST_COMPLETION, LONGEST_ANSWER = 65_536, 2_048  # characters


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
    for worker in WORKERS:
        worker.timeouts = 0

    def verdict(text: str, example) -> Verdict:
        return check(text, example.answer, example.kind, example.choices, answer_format)

    if len(completions) != len(examples):
        raise ValueError(f"{len(completions)} completions for {len(examples)} examples")
    with ThreadPoolExecutor(len(WORKERS) if any(e.kind == "math" for e in examples) else 1) as threads:
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
    if kind == "choice" and not choices:
        raise ValueError("an answer of kind choice needs the options in a column choices or options")
    if isinstance(gold, list | tuple) and len(gold) == 1:
        gold = gold[0]
    if isinstance(gold, list | tuple | dict):
        raise ValueError(f"the answer is a {type(gold).__name__} ({str(gold)[:60]}); write it as one text")
    if gold is None or gold != gold or not str(gold).strip():  # NaN is how tables say that there is none
        raise ValueError(f"no answer ({gold!r})")
    text = str(gold).strip()
    if "\\boxed" in text or "<answer>" in text.lower():
        found, _ = extract(text, "auto")
        if found is None:
            raise ValueError(f"no answer inside {text[:60]!r}")
        text = found
    plain = normalize(text)
    if kind == "choice":
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
    if answer_format in ("tag", "auto"):  # a second opening marker starts the pair again
        pairs = re.finditer(r"<answer>((?:(?!</?answer>).)*)</answer>", lower, re.DOTALL)
        found = {opened_in_place(text[pair.start(1) : pair.end(1)]) for pair in pairs} - {""}
        if found:
            return (found.pop(), "ok") if len(found) == 1 else (None, "hedge")
    if answer_format in ("boxed", "auto"):
        contents = dict.fromkeys(unbox(text[begin:end]) for begin, end in last_boxes(text))
        if answer := ", ".join(filter(None, contents)):
            return answer, "ok"
    return None, "no_answer"


def opened_in_place(text: str) -> str:
    """What stands between two markers: its box where only words are around it, else all of it, boxes opened."""
    spans = box_spans(text)
    if not spans:
        return text.strip()
    before, after = text[: spans[0][0]], text[spans[-1][1] :]
    if len(spans) == 1 and only_words(before) and only_words(after) and not reading.unit_of(after.strip(" $.*")):
        return unbox(text[slice(*spans[0])])
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


def box_spans(text: str) -> list[tuple[int, int]]:
    """Where each \\boxed{...} begins and ends; one that is never closed is dropped, with everything after it."""
    boxes, position = [], 0
    while (begin := text.find("\\boxed{", position)) >= 0:
        depth = 0
        for brace in re.finditer(r"\\[{}\\]|[{}]", text[begin + 6 :]):
            depth += (brace[0] == "{") - (brace[0] == "}")
            if depth == 0 and brace[0] == "}":
                break
        else:
            break
        position = begin + 6 + brace.end()
        boxes.append((begin, position))
    return boxes


def last_boxes(text: str) -> list[tuple[int, int]]:
    """The last \\boxed{...} and those before it that only an "or" or the like separates from it."""
    boxes = box_spans(text)
    joined = boxes[-1:]
    for box in reversed(boxes[:-1]):
        between = text[box[1] : joined[0][0]]
        words = re.sub(r"[\s$\\()\[\],;/.:*&]+", " ", between).lower().split()
        if len(between) > 40 or re.search(r"[.!?](\s|$)", between) or not set(words) <= _CONNECTIVES:
            break
        joined.insert(0, box)
    return joined


def unbox(answer: str) -> str:
    """An answer that is itself one \\boxed{...} is what stands in it."""
    for _ in range(9):  # each time the whole text is read
        if box_spans(answer) != [(0, len(answer))]:
            break
        answer = answer[7:-1].strip()
    return answer


# ------------------------------------------------------------------------------------------------- options and words

_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore),? )?(?:the |my )?(?:correct |final |right |best )?"
    r"(?:answer|ans|options?|choice|letter)(?: is)?[:.]? (?:option |choice )?",
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
    return same_text(one, other) or (all(numbers) and reading.same_quantity(*numbers))


def by_letter(choices: Sequence[str] | None) -> dict[str, str]:
    """The options of a question by their letters."""
    return {chr(ord("A") + place): normalize(str(choice)) for place, choice in enumerate(choices or ())}


def letter(text: str, choices: Sequence[str] | None = None) -> str | None:
    """The one option that a text names: `B`, `(B)`, `Option B`, `B. its text`, or its text alone.

    Behind the letter the text may be put otherwise, but not be another option's, and no second letter may follow.
    """
    options, spoken = by_letter(choices), without_lead(text)
    if match := re.fullmatch(r"[\"'`*_(\[{\\]{0,3}([a-zA-Z])[\"'`*_)\]}\\]{0,3}[.:,;]?", spoken):
        return match[1].upper()
    for same in (same_text, same_option):
        named = [name for name, o in options.items() if same(o, text) or same(o, without_name(spoken))]
        if len(named) == 1:
            return named[0]
    # An A before other words is an article: without a mark behind it only with that option's text, as `B 12 cm`.
    match = re.fullmatch(r"(?:(?i:\(([a-z])\)[.:]?|([a-z])[.:)]) ?|([A-Z])(?: ?[-,] | ))(.+)", spoken)
    if not match:
        return None
    name, rest = (match[1] or match[2] or match[3]).upper(), match[4]
    if match[3]:
        rest = rest[1:-1] if rest.startswith("(") and rest.endswith(")") else rest
        return name if [other for other, option in options.items() if same_option(option, rest)] == [name] else None
    own = options.pop(name, None)
    if own is not None and same_text(own, rest):
        return name
    parts = [without_name(part.strip()) for part in re.split(r"[,;]| or | and ", rest)]  # `B. 60 or 75`
    if (choices and own is None) or any(same_option(option, part) for part in parts for option in options.values()):
        return None
    return None if _OTHER_LETTER.search(rest if spoken.strip("(")[0].isupper() else rest.upper()) else name


def letters(text: str, _choices=None) -> frozenset[str] | None:
    """The set of letters in `A, C`, `AC` or `(A) and (C)`, or the one of `A. its text`."""
    spoken = without_lead(text)
    parts = list(spoken) if re.fullmatch(r"[A-H]{2,8}", spoken) else re.split(r"[,;&{}\[\]\\\s]+|and", spoken)
    found = [re.fullmatch(r"\(?([A-Za-z])\)?\.?", part) for part in parts if part]
    if found and all(found):
        return frozenset(match[1].upper() for match in found)
    one = letter(text)
    return frozenset(one) if one else None


def yes_or_no(text: str, _choices=None) -> str | None:
    """The first word, unless another yes or no stands behind it as an answer of its own."""
    words = re.findall(r"[a-z]+|[^a-z\s]", re.sub("[*_\"'`]", "", without_lead(text).lower()))
    said = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
    found = said.get(words[0]) if words else None
    for before, word, after in zip(words, words[1:], [*words[2:], "."], strict=False):
        if said.get(word, found) != found and (not after.isalpha() or before in ("or", "and", "/")):
            return None
    return found


def real(text: str, _choices=None) -> reading.Quantity | None:
    """The one number of a text, with its unit."""
    return quantity(without_name(without_lead(text)))


READERS = {
    "int": lambda text, _choices=None: reading.integer(without_lead(text)),
    "letter": letter,
    "letters": letters,
    "time": lambda text, _choices=None: reading.clock(without_lead(text)),
    "yesno": yes_or_no,
    "float3": real,
    "rounded": real,
}


# ------------------------------------------------------------------------------------------------- comparison


def compare(answer: str, gold: str, kind: str, choices: Sequence[str] | None = None) -> tuple[bool, str]:
    """Whether two normalized answers agree as answers of that kind, and the status."""
    if kind not in KINDS:
        return False, "error"
    if kind == "math":
        return same_math(answer, gold)
    if kind == "exact":
        wanted, *found = (text.casefold().strip("\"'`*_") for text in (gold, answer, without_lead(answer)))
        return wanted in found, "ok"
    if kind == "choice":
        found, options = letter(answer, choices), by_letter(choices)
        # Options may be letters or numbers themselves: their text goes before their place.
        for said in filter(None, (answer, found)):
            if any(same_text(option, said) for option in options.values()):
                return same_text(said, gold), "ok"
        return same_text(options.get(found, ""), gold), "ok" if found else "unparsed"
    read = READERS.get(kind, real)
    found, target = read(answer, choices), read(gold, choices)
    if kind == "relaxed" and not (found and target and target[0]):
        return same_text(answer, gold), "ok"
    if found is None or target is None:
        return False, "unparsed"
    if read is real:
        within = {"float3": Fraction(1, 1000), "relaxed": abs(target[0]) / 20}
        within = within.get(kind, reading.half_a_place(gold))  # to the decimals that the gold answer is written with
        return any(abs(value - target[0]) <= within for value in reading.in_unit_of(found, target)), "ok"
    if kind == "time":  # where both say which half of the day it is, the same
        halves = [re.findall(r"\b([ap])\.?m\b", text.lower()) for text in (answer, gold)]
        return found == target and (not all(halves) or halves[0] == halves[1]), "ok"
    return found == target, "ok"


def same_math(answer: str, gold: str, depth: int = 0) -> tuple[bool, str]:
    """Equal text, quantities, relations, lists, sets, tuples, intervals and matrices by element, or expressions."""
    if same_text(answer, gold):
        return True, "ok"
    if re.fullmatch(r"\(?[A-Z]\)?", gold):  # the letter of an option, or a point
        return letter(answer) == letter(gold), "ok"
    answer = reading.relations_as_signs(without_lead(answer))
    if gold.startswith("("):  # `P(3, 2)`
        answer = re.sub(r"^[A-Z]'{0,2} ?(?=\()", "", answer)
    exact, about, rounded = (part.strip() for part in answer.partition(r"\approx"))
    if about and exact and not is_name(exact):
        return same_about(exact, rounded, gold, depth)
    listed = "," in as_list(answer)
    if "=" in gold and "=" in answer and not listed:
        names = [text.split("=")[0].strip() for text in (answer, gold)]
        if not all(map(is_name, names)) or (len(names[0]) == len(names[1]) == 1 and names[0] != names[1]):
            return same_expression(answer, gold)  # equations
    if "=" in answer and not listed and len(sides := reading.values(answer)) > 1:  # `x = 5 + 7 = 12`
        return all(same_math(side, gold, depth)[0] for side in sides), "ok"
    answer, gold = (without_name(text) if text.count("=") < 2 else text for text in (answer, gold))
    related = [RELATION.search(text) is not None for text in (answer, gold)]
    if any(related):
        intervals = [reading.as_interval(t) if r else t for t, r in zip((answer, gold), related, strict=True)]
        if all(intervals):
            return same_math(*intervals, depth)
        return same_expression(answer, gold) if all(related) else (False, "ok")
    numbers = quantity(answer), quantity(gold)
    if all(numbers):
        return reading.same_quantity(*numbers), "ok"
    if all(re.fullmatch(r"[A-Za-z ]{3,}", text) for text in (answer, gold)):
        return same_text(answer, gold), "ok"  # words, or letters in order, which algebra would take for products
    (answer, unit), (gold, gold_unit) = reading.without_unit(answer), reading.without_unit(gold)
    if unit and gold_unit and unit[1:] != gold_unit[1:]:
        return False, "ok"
    parts, gold_parts = elements(as_list(answer)), elements(as_list(gold))
    if (parts or gold_parts) and depth < 3:
        if parts and not parts[0] and not gold_parts and " or " in answer:  # `5/2 or 2.5`
            return all(same_math(part, gold, depth + 1)[0] for part in parts[1]), "ok"
        return bool(parts and gold_parts) and same_elements(parts, gold_parts, depth + 1), "ok"
    return (True, "ok") if same_text(answer, gold) else same_expression(for_algebra(answer), for_algebra(gold))


def same_about(exact: str, rounded: str, gold: str, depth: int) -> tuple[bool, str]:
    """`\\sqrt{2} \\approx 1.41` as either of its sides, where one is the other rounded."""
    numbers = quantity(exact), quantity(rounded)
    if all(numbers) and abs(numbers[0][0] - numbers[1][0]) > abs(numbers[0][0]) / 100:
        return False, "ok"  # `12 \approx 13`
    if r"\approx" in rounded:
        return False, "unparsed"
    if same_math(exact, gold, depth)[0]:
        return True, "ok"
    right, status = same_math(rounded, gold, depth)
    digits = len(rounded.partition(".")[2])
    return right and same_expression(for_algebra(exact), for_algebra(rounded), digits)[0], status


def as_list(text: str) -> str:
    """`3 and 5`, `3; 5` and `3 or 5` as `3, 5`, `a \\pm b` as `a + b, a - b`, a matrix as a list of its rows."""
    matrix = re.fullmatch(r"[\[(]? ?\\begin ?\{([pb]?matrix|array)\} ?(?:\{[clr| ]+\})?(.*)\\end ?\{\1\} ?[\])]?", text)
    if matrix and "\\end" not in matrix[2]:
        rows = [row.replace("&", ",") for row in matrix[2].split("\\\\") if row.strip()]
        return f"[[{'], ['.join(rows)}]]"
    if text.count(r"\pm") == 1 and "," not in text:
        plus, minus = (text.replace(r"\pm", sign).strip() for sign in "+-")
        text = f"{plus.removeprefix('+')}, {minus}"
    return re.sub(r"[,;]? (?:and|or) |;", ",", text)


def elements(text: str) -> tuple[str, list[str]] | None:
    """The brackets around a list (`()`, `[)`, `{}` or none) and what stands between its outer commas, or unions."""
    brackets, inner, comma = "", text, ","
    for opening, closing in (("\\{", "\\}"), ("{", "}"), ("(", ")"), ("(", "]"), ("[", ")"), ("[", "]")):
        if len(text) > 2 and text.startswith(opening) and text.endswith(closing):
            brackets, inner = opening[-1] + closing[-1], text[len(opening) : -len(closing)]
            break
    if r"\cup" in text:
        brackets, inner, comma = "{}", text.replace(r"\cup", "\0"), "\0"
    parts, depth = [""], 0
    for char in inner:
        depth += (char in "([{") - (char in ")]}")
        if depth < 0:
            return None
        if char == comma and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    parts = [part.strip() for part in parts if part.strip()]
    if depth or (len(parts) == 1 and brackets not in ("{}", "[]")) or not 0 < len(parts) <= 32:
        return None
    return brackets, parts


def by_name(parts: list[str]) -> dict[str, str] | None:
    """`x = 3` and `y = 2` as a table; none where one has no name or two have the same letter, as `x_1` and `x_2`."""
    found = [re.fullmatch(r"([a-zA-Z])\w{0,10} ?= ?([^=]+)", part) for part in parts]
    table = {match[1]: match[2] for match in found if match}
    return table if len(table) == len(parts) else None


def same_elements(one: tuple[str, list[str]], gold: tuple[str, list[str]], depth: int) -> bool:
    (brackets, parts), (gold_brackets, targets) = one, gold
    either = not (brackets and gold_brackets) and gold_brackets not in ("[)", "(]")
    if len(parts) != len(targets) or (brackets != gold_brackets and not either):
        return False
    named, gold_named = by_name(parts), by_name(targets)
    if named and gold_named:
        return named.keys() == gold_named.keys() and all(same_math(named[n], gold_named[n], depth)[0] for n in named)
    ordered = bool(gold_brackets or gold_named) and gold_brackets != "{}"
    if ordered and named and named.keys() <= set("xyz"):
        parts = [named[name] for name in sorted(named)]
    if ordered:
        return all(same_math(*pair, depth)[0] for pair in zip(parts, targets, strict=True))
    left = list(targets)
    for part in parts:
        match = next((target for target in left if same_math(part, target, depth)[0]), None)
        if match is None:
            return False
        left.remove(match)
    return True
