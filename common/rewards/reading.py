"""Numbers, units, relations and clock times as models write them: one spelling for each, and readers of their values.

Values are exact fractions, nothing is computed, and each reader takes time linear in its text. Units are pint's, which
is imported when the first one is read and is only handed products of names that it knows.
"""

import re
import unicodedata
from fractions import Fraction
from functools import cache, lru_cache

LONGEST_NUMBER = 200  # characters of a number and its unit

# ------------------------------------------------------------------------------------------------- one spelling

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SIGNS = str.maketrans({
    "−": "-", "–": "-", "⁄": "/", "÷": "/", "∕": "/", "∶": ":", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ",
    "π": r"\pi ", "∞": r"\infty ", "±": r"\pm ", "≈": r"\approx ", "√": " sqrt", "≤": r"\le ", "≥": r"\ge ",
    "≠": r"\neq ", "∈": r"\in ", "∪": r"\cup ", "∅": r"\emptyset ", "∠": r"\angle ",
})  # fmt: skip
_TEXT = r"text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|operatorname|mbox|emph|boldsymbol|underline|fbox"
_SPELLINGS = [(re.compile(pattern), spelling) for pattern, spelling in (
    # In this order. A backslash behind a backslash is not a command's but ends a matrix's row.
    (r"(?<!\\)\\!|\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![a-zA-Z])|\\\\ ?$", ""),
    (r"(?<!\\)\\(?:[,;:> ()\[\]]|q?quad(?![a-zA-Z]))|[~$]", " "),
    (r"\\%", "%"),
    (r"\{,\}", ","),
    (r"\^ ?(?:\\circ(?![a-zA-Z])|\{ ?\\circ ?\})|\\degree(?![a-zA-Z])", "°"),
    *[(rf"\\(?:{_TEXT})\s?\{{([^{{}}]*)\}}", r"\1")] * 3,
    (r"^(?:minus|negative) (?=\d)", "-"),
    (r" ?° ?(?=[CF]\b)| ?\bdegrees? (?=(?:[CF]|[Cc]elsius|[Ff]ahrenheit)\b)", "°"),
    (r"\\(?:leq|leqslant|leqq)(?![a-zA-Z])|<=", r"\\le "),
    (r"\\(?:geq|geqslant|geqq)(?![a-zA-Z])|>=", r"\\ge "),
    (r"\\ne(?![a-zA-Z])|!=|\\not ?=", r"\\neq "),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"\\lbrace(?![a-zA-Z])", r"\\{"),
    (r"\\rbrace(?![a-zA-Z])", r"\\}"),
    (r"^\{([^{},]*)\}$", r"\1"),
    (r"\\varnothing|\\\{ ?\\\}", r"\\emptyset"),
    (r"\\(?:[dtc]|nice|s)frac(?![a-zA-Z])", r"\\frac"),
    (r"\\over(?:line|rightarrow) ?\{ ?([A-Z] ?[A-Z]) ?\}", r"\1"),  # a segment; over digits the line says repeat
    (r"\bper cent\b", "percent"),
    (r"(?<=[\w)}])\*\*(?=[-+\w({])", "^"),  # a power; elsewhere emphasis
    (r"\*\*", ""),
    (r"\^ ?\(([^(){}]*)\)|\^ ?([+-]?\d+)", r"^{\1\2}"),
    # From left to right, as it is written: the parser would take 4/3\pi for 4/(3\pi).
    (r"(?<![\w.^/)\]}])(\d+) ?/ ?(\d+)(?= ?\\[a-z])", r"\\frac{\1}{\2}"),
    (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
    (r"(?<![\\a-zA-Z])sqrt ?(?:\(([^(){}]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|[a-zA-Z](?![a-zA-Z])))", r"\\sqrt{\1\2\3}"),
)]  # fmt: skip


@lru_cache(maxsize=10_000)
def normalize(answer: str) -> str:
    """One spelling for what means the same: Unicode digits and signs, LaTeX spacing and commands, powers, degrees.

    Single blanks stay, since `1 2` is not `12`. A dollar sign that is no mathematics becomes `＄`.
    """
    if re.fullmatch(r"[A-Za-z0-9\s,.'-]*", answer) and not re.search("pi|sqrt|per cent|degree|minus|negative", answer):
        return " ".join(answer.split()).removesuffix(".").strip()  # nothing below would change it
    # Before NFKC, which would turn 10 squared into 102 and three and a half into 31/2.
    answer = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", answer).replace("º", "°")
    for char in set(answer):
        if unicodedata.category(char) == "No" and "⁄" in (parts := unicodedata.normalize("NFKC", char)):
            answer = answer.replace(char, " " + parts.replace("⁄", "/"))
    answer = unicodedata.normalize("NFKC", answer).translate(_SIGNS)
    answer = "".join(
        str(unicodedata.decimal(c)) if c.isdecimal() else c for c in answer if unicodedata.category(c) != "Cf"
    )
    answer = answer.replace("\\$", "＄")
    answer = answer.replace("$", "＄") if answer.count("$") == 1 else answer
    answer = answer.replace("**", "") if answer.startswith("**") else answer
    for pattern, spelling in _SPELLINGS:
        answer = pattern.sub(spelling, answer)
    answer = " ".join(answer.split())
    return answer.removesuffix(".").strip() if answer != "." else ""


def same_text(one: str, other: str) -> bool:
    """Equal but for case and for blanks that separate nothing: between two digits they do."""
    one, other = (re.sub(r"(?<![\d.]) | (?![\d.])", "", " ".join(text.casefold().split())) for text in (one, other))
    return one == other


def for_algebra(text: str) -> str:
    """As a computer algebra system reads it: degrees behind a sine as radians, elsewhere dropped, no currencies."""
    text = re.sub(r"(\\?(?:sin|cos|tan)) ?\(?(\d+)°\)?", r"\1{\\frac{\2\\pi}{180}}", text)
    return re.sub(f"°|{_CURRENCY}", "", text)


# ------------------------------------------------------------------------------------------------- numbers

DECIMAL = r"(?:\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?![\d,]|[ .]\d{3}\b)(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
_POWER = r"10 ?\^\{ ?([+-]?\d{1,3}) ?\}"
_PLAIN = re.compile(
    rf"([+-]?) ?(?:{_POWER}|({DECIMAL})(?:[eE]([+-]?\d{{1,3}})(?!\d)| ?(?:\\times|\\cdot|[*x]) ?{_POWER})?)"
)
_FRACTION = re.compile(
    rf"([+-]?) ?(?:(?:(\d+) ?)?\\frac ?(?:\{{ ?([+-]?{DECIMAL}) ?\}} ?\{{ ?([+-]?{DECIMAL}) ?\}}|(\d) ?(\d))"
    rf"|(?:(\d+) (?:and )?)?({DECIMAL}) ?/ ?({DECIMAL}))"
)
_REPEATING = re.compile(r"([+-]?)(\d*)\.(\d*)\\overline ?\{ ?(\d+) ?\}")
_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = dict(zip("twenty thirty forty fifty sixty seventy eighty ninety".split(), range(20, 100, 10), strict=True))
_WORDS = {word: n for n, word in enumerate(_ONES)} | _TENS
_WORDS |= {f"{ten}{mark}{_ONES[n]}": _TENS[ten] + n for ten in _TENS for n in range(1, 10) for mark in " -"}
_WORD = "|".join(sorted(_WORDS, key=len, reverse=True))
_SPELLED = re.compile(rf"(minus |negative )?({_WORD})(?: (hundred)(?: (?:and )?({_WORD}))?)?(?![\w-])", re.IGNORECASE)
_MULTIPLIERS = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# Words beside a number that make another one of it, or none.
CHANGE = re.compile(
    r"\b(?:not|nor|than|least|most|up to|over|under|above|below|between|half|twice|double|dozens?|squared|cubed|plus|"
    rf"minus|times(?! ?$)|divided|negative|except|or|{'|'.join(_MULTIPLIERS)})\b",
    re.IGNORECASE,
)


def leading_number(text: str) -> tuple[Fraction, str] | None:
    """The literal number at the start of a text (decimal, power of ten, fraction, mixed, in words) and the rest."""
    if match := _REPEATING.match(text):
        sign, whole, first, again = match.groups()
        value = Fraction(
            int(whole + first + again) - int(whole + first or 0), (10 ** len(again) - 1) * 10 ** len(first)
        )
    elif match := _FRACTION.match(text):
        sign, *parts = match.groups()
        top, bottom = (_decimal(part) for part in (*parts[1:5], *parts[6:]) if part is not None)
        if not bottom:
            return None
        value = int(parts[0] or parts[5] or 0) + top / bottom
    elif match := _PLAIN.match(text):
        sign, alone, digits, exponent, power = match.groups()
        value = _decimal(digits or "1") * Fraction(10) ** int(alone or exponent or power or 0)
    elif match := _SPELLED.match(text):
        sign, first, hundred, more = match.groups()
        value = Fraction(_WORDS[first.lower()] * (100 if hundred else 1) + (_WORDS[more.lower()] if more else 0))
    else:
        return None
    rest = text[match.end() :]
    while (match := re.match(r" ?([a-z]+)\b", rest, re.IGNORECASE)) and match[1].lower() in _MULTIPLIERS:
        value, rest = value * _MULTIPLIERS[match[1].lower()], rest[match.end() :]
    return (-value if sign and sign != "+" else value), rest


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", "").replace(" ", "").rstrip(".") or "0")


def number(text: str) -> Fraction | None:
    """A literal number in digits: a decimal, a fraction, or a mixed number. Nothing is computed."""
    found = leading_number(text) if len(text) <= LONGEST_NUMBER and not _SPELLED.match(text) else None
    return found[0] if found and not found[1] else None


def integer(text: str) -> int | None:
    """The one whole number that a text states: a literal, or a sentence with a single number and no operator."""
    text = re.sub(rf"(?<=[a-zA-Z])(?:\^\{{[23]\}}|[23]\b)|(?<=\d) ?°[CF]?|{_CURRENCY}", "", without_name(text))
    start = (
        re.search(rf"^[+-] ?{DECIMAL}|(?<![\w.,])-?{DECIMAL}", text) if re.search(r"\d", text) else _SPELLED.match(text)
    )
    if start is None or len(text[start.start() :]) > 10 * LONGEST_NUMBER or _FRACTION.match(text):
        return None
    before, (value, rest) = text[: start.start()], leading_number(text[start.start() :])
    glued = re.match(r"[^\W\d_]+", rest)
    if (
        re.search(r"\d|[+*/^=\\\[\]{}<>!]| - ", before)
        or re.search(r"\d|[+*^=\\\[\]{}<>!]| - |^ ?/|/ ?$", rest)
        or CHANGE.search(f"{before} {rest}")
        or (glued and len(glued[0]) < 3 and not is_symbol(glued[0]))  # 2a and 4n are algebra
    ):
        return None
    return int(value) if value.denominator == 1 else None


# ------------------------------------------------------------------------------------------------- units

# Abbreviations that count as units behind a number; what they are is pint's to say. Others are algebra, as 2a and 3xy.
_SI = set("m g s A K L l N J W V C F T Ω ohm Pa Hz eV cal bar mol Wh".split())
_SYMBOLS = _SI | set(
    "h hr hrs min mins sec secs day atm rad deg in ft yd yds mi lb lbs oz gal mph kph rpm ha USD EUR GBP".split()
)
_SPECIAL = {"°": "degree", "%": "percent", "°c": "degree_Celsius", "°f": "degree_Fahrenheit", "kgs": "kg"}
_CURRENCIES = {"＄": "dollar", "€": "euro", "£": "sterling", "¥": "yen", "₹": "rupee"}
_CURRENCY = f"[{''.join(_CURRENCIES)}]"
_UNIT = re.compile(
    r" ?(/|\\cdot|\*|per\b)? ?(?:(square|sq\.?|cubic|cu\.?) )?(°(?:[Cc]elsius|[Ff]ahrenheit|[CF])|[^\W\d_]+|[%°€])\.?"
    r"(?: ?\^ ?\{([+-]?\d)\}|([23])\b| (squared|cubed)\b)?"
)
# A bare degree or letter behind a number may mean a temperature's.
_TEMPERATURES = {"degree_Celsius": ("degree", "coulomb"), "degree_Fahrenheit": ("degree", "farad")}


def is_symbol(name: str) -> bool:
    return name in _SYMBOLS or (name[0] in "kMGTmμnpcd" and name[1:] in (_SI | {"B"}))


@cache
def registry():
    import pint

    units = pint.UnitRegistry()
    for line in ("dollar = [dollar] = USD", "cent = dollar / 100", "euro = [euro] = EUR = €", "yen = [yen] = JPY",
                 "sterling = [sterling] = GBP", "rupee = [rupee] = INR", "unit = [unit]"):  # fmt: skip
        units.define(line)
    return units


def unit_name(word: str) -> str | None:
    """Pint's name of a unit: an abbreviation of those above, or a word with its prefix in full (`cats` is none)."""
    for name in (word, word.lower()):
        name = _SPECIAL.get(name[:2] if name[0] == "°" else name, name)
        found = registry().parse_unit_name(name) if is_symbol(name) or len(name) > 3 or name == "€" else ()
        for prefix, unit, _ in found:
            if is_symbol(name) or name.startswith(prefix):
                return prefix + unit
    return "percent" if word == "%" else "degree" if word == "°" else None


@lru_cache(maxsize=10_000)
def unit_of(text: str) -> tuple[str, float, str] | None:
    """What a unit behind a number is: its name (of a single one), its scale, and the base units that it measures.

    `cm^2`, `square meters`, `km/h`, `meters per second`, `m s^{-2}`, `J/(kg K)`; None where it is not one.
    """
    text = re.sub(r"\\frac ?\{([^{}]+)\} ?\{([^{}]+)\}", r"\1/\2", text.strip())
    text = re.sub(r"/ ?\(([^()]*)\)", lambda m: "/" + re.sub(r" ?(?:\\cdot|\*| ) ?", "/", m[1].strip()), text)
    text = re.sub(r"\\mu ?", "μ", text.replace("\\Omega", "Ω"))
    factors, place = [], 0
    while place < len(text) <= LONGEST_NUMBER:
        match = _UNIT.match(text, place)
        if not match or (match[1] and not factors) or (name := unit_name(match[3])) is None:
            return None
        power = match[4] or match[5] or {"s": 2, "c": 3}.get((match[2] or match[6] or " ")[0].lower(), 1)
        factors.append((name, -int(power) if match[1] in ("/", "per") else int(power)))
        place = match.end()
    if not factors or place < len(text):
        return None
    single = factors[0][0] if len(factors) == 1 and factors[0][1] == 1 else ""
    if single in (*_TEMPERATURES, "percent"):
        return single, 1.0, single
    scale, base = registry().get_root_units(" * ".join(f"{name} ** {power}" for name, power in factors))
    return single, float(scale), str(base)


# ------------------------------------------------------------------------------------------------- quantities

Quantity = tuple[Fraction, tuple[str, float, str] | None]  # a number and its unit


def quantity(text: str) -> Quantity | None:
    """A literal number and its unit (None: no unit, or counted things as in `12 people`)."""
    if len(text) > LONGEST_NUMBER:
        return None
    unit, money = None, re.match(rf"([+-]?) ?({_CURRENCY}) ?", text)
    if money:
        unit, text = unit_of(_CURRENCIES[money[2]]), money[1] + text[money.end() :]
    found = leading_number(text)
    if found is None or not found[1].strip():
        return found and (found[0], unit)
    value, rest = found
    if unit or (rest[0].isalpha() and CHANGE.search(rest)):
        return None
    if unit := unit_of(rest):
        return value, unit
    counted = re.fullmatch(r" (?:(?!and )[A-Za-z]{3,}(?: |$)){1,3}", rest) and not CHANGE.search(rest)
    return (value, None) if counted else None


def in_unit_of(one: Quantity, gold: Quantity) -> list[Fraction]:
    """The values, in the gold quantity's unit, that a quantity may mean: none where the units do not fit.

    A unit that only one side has is ignored; a per cent that only one side has may also be hundredths.
    """
    (value, unit), (_, gold_unit) = one, gold
    (name, scale, base), (gold_name, gold_scale, gold_base) = unit or ("", 1, ""), gold_unit or ("", 1, "")
    if (name == "percent") != (gold_name == "percent"):
        return [] if name and gold_name else [value, value / 100 if name == "percent" else value * 100]
    if (
        not unit
        or not gold_unit
        or name in _TEMPERATURES.get(gold_name, ())
        or gold_name in _TEMPERATURES.get(name, ())
    ):
        return [value]
    return [value * Fraction(scale / gold_scale)] if base == gold_base else []


def same_quantity(one: Quantity, gold: Quantity) -> bool:
    """Equal to one in a million, converted where both sides have a unit."""
    return any(abs(value - gold[0]) <= abs(gold[0]) / 1_000_000 for value in in_unit_of(one, gold))


def half_a_place(gold: str) -> Fraction:
    """Half a unit of the last decimal of `1.50` and `12 cm`; nothing beside fractions and powers of ten."""
    match = re.match(rf"[+-]? ?{DECIMAL}(?! ?(?:[\d.,/e]|\\))", gold)
    return Fraction(1, 2 * 10 ** len(match[0].partition(".")[2])) if match else Fraction(0)


def without_unit(text: str) -> tuple[str, tuple[str, float, str] | None]:
    """`12\\sqrt{3} cm^2` as `12\\sqrt{3}` and its unit. Of single letters only an `m` set apart is a unit here."""
    for end in re.finditer(
        r"(?:(?<=[})\d])|(?<=\\pi))( ?)(?=[a-zA-Z°])", "" if re.search("sin|cos|tan", text) else text
    ):
        rest = text[end.end() :]
        if rest[1:2].isalpha() or rest[0] == "°" or (rest[0] == "m" and end[1]):
            if unit := unit_of(rest):
                return text[: end.start()], unit
    return text, None


# ------------------------------------------------------------------------------------------------- names and relations

_ABOUT = r"(?:\\approx|\\sim(?:eq)?|about|approximately|approx\.?|roughly|around|nearly)"
_SENTENCE = re.compile(r"(?:[A-Za-z][A-Za-z' ,]{0,80} )?(?:is|are|equals)(?: equal to)?:? (?=[-+\d\\√(\[{＄€£¥.])")
RELATION = re.compile(r"\\(?:le|ge|neq|in)(?![a-zA-Z])|[<>]")
_SPOKEN = [(re.compile(rf"\b(?:is )?(?:{words})(?![a-z])", re.IGNORECASE), sign) for words, sign in (
    (r"(?:greater|more) than or equal to|at least|no less than", r"\\ge"),
    (r"(?:less|fewer|smaller) than or equal to|at most|no more than|up to", r"\\le"),
    (r"(?:greater|more|larger) than|above|over", ">"),
    (r"(?:less|fewer|smaller) than|below|under", "<"),
    (r"not equal to|(?:is )?not(?= -?\d)", r"\\neq"),
)]  # fmt: skip
_MIRROR = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}


def is_name(text: str) -> bool:
    """What an equation gives a value to: `x`, `AB`, `f(2)`, `m\\angle ABC`; not `2x` or `y^2`."""
    plain = re.sub(r"\\(?:angle|triangle|Delta|overline|sin|cos|tan|alpha|beta|gamma|theta|phi)(?![a-zA-Z])", "a", text)
    return len(text) <= 60 and bool(re.match(r"[A-Za-z(|]", plain) and not re.search(r"[-+*/^!<>\\=]", plain))


def values(text: str) -> list[str]:
    """The sides of an equation that are no names: `12` of `x = 12`, `5 + 7` and `12` of `x = 5 + 7 = 12`."""
    sides = [side.strip() for side in text.split("=")]
    return [side for side in sides if not is_name(side)] or sides[-1:] if len(sides) > 1 else sides


def without_name(text: str) -> str:
    """`x = 5`, `m\\angle A = 5`, `Area = 5`, `5 = x`, `the angle is 5` and `about 5` as `5`."""
    sides = values(text) if text.count("=") == 1 else [text]
    text = sides[0] if len(sides) == 1 else text
    if (match := _SENTENCE.match(text)) and not CHANGE.search(match[0]):
        text = text[match.end() :]
    name, about, _ = text[:80].partition(r"\approx")
    text = text[len(name) :] if about and is_name(name.strip()) else text
    return re.sub(rf"^{_ABOUT} ?(?=[-+\d.\\＄€£¥])", "", text)


def relations_as_signs(text: str) -> str:
    """`at least 12` as `\\ge 12`."""
    for pattern, sign in _SPOKEN:
        text = pattern.sub(sign, text)
    return text


def as_interval(text: str) -> str | None:
    """What a relation says of one name, as intervals: `x \\le 2` as `(-\\infty,2]`; None where it says more."""
    parts = re.split(r",? or |\\lor|\\cup", text)
    if len(parts) > 1:
        intervals = [as_interval(part.strip()) for part in parts]
        return r"\cup".join(intervals) if all(intervals) else None
    signs, sides = RELATION.findall(text), [side.strip() for side in RELATION.split(text)]
    if len(signs) == 1 and is_name(sides[1]) and not is_name(sides[0]) and signs[0] in _MIRROR:
        sides, signs = sides[::-1], [_MIRROR[signs[0]]]
    if len(signs) == 1 and (not sides[0] or is_name(sides[0])) and (bound := sides[1]):
        return {"<": rf"(-\infty,{bound})", r"\le": rf"(-\infty,{bound}]", ">": rf"({bound},\infty)", r"\in": bound,
                r"\ge": rf"[{bound},\infty)", r"\neq": rf"(-\infty,{bound})\cup({bound},\infty)"}[signs[0]]  # fmt: skip
    if len(signs) == 2 and is_name(sides[1]) and set(signs) <= {">", r"\ge"}:
        sides, signs = sides[::-1], [_MIRROR[sign] for sign in signs[::-1]]
    if len(signs) == 2 and is_name(sides[1]) and set(signs) <= {"<", r"\le"} and all(sides):
        return f"{'(['[signs[0] != '<']}{sides[0]},{sides[2]}{')]'[signs[1] != '<']}"
    return None


# ------------------------------------------------------------------------------------------------- times


def clock(text: str) -> tuple[int, int] | None:
    """Hours on a twelve-hour dial, and minutes: `4:23 PM`, `16:23`, `half past four`, `4 o'clock`."""
    count, half = rf"(\d{{1,2}}|{_WORD})", r"(?: ?[ap]\.?m\.?| o'clock)"
    text = re.sub(r"^(?:it|it's|the time)(?: is|'s)? ", "", text.lower())
    if match := re.fullmatch(rf"(\d{{1,2}}):(\d{{2}})(?::00)?{half}?", text):
        hours, minutes = int(match[1]), int(match[2])
    elif match := re.fullmatch(count + half, text):
        hours, minutes = leading_number(match[1])[0], 0
    elif match := re.fullmatch(rf"(?:a )?(?:half|quarter|{count}(?: minutes?)?) (past|after|to|before) {count}", text):
        minutes = leading_number(match[1])[0] if match[1] else 30 if "half" in text else 15
        hours = leading_number(match[3])[0]
        hours, minutes = (hours, minutes) if match[2] in ("past", "after") else (hours + 11, 60 - minutes)
    else:
        return None
    return (int(hours % 12), int(minutes)) if 0 <= hours <= 24 and 0 <= minutes <= 59 else None
