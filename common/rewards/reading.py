"""Numbers, units, relations and clock times as models write them: one spelling for each, and readers of their values.

Values are exact fractions, nothing is computed, and each reader takes time linear in its text. Units are pint's, which
is imported when the first one is read; it is asked for single names, never for expressions.
"""

import re
import unicodedata
from fractions import Fraction
from functools import cache, lru_cache

LONGEST_NUMBER = 200  # characters of a number and its unit

# ------------------------------------------------------------------------------------------------- one spelling

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SIGNS = str.maketrans({
    "−": "-", "–": "-", "⁄": "/", "÷": "/", "∶": ":", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ",
    "π": r"\pi ", "∞": r"\infty ", "±": r"\pm ", "≈": r"\approx ", "√": " sqrt", "≤": r"\le ", "≥": r"\ge ",
    "≠": r"\neq ", "∈": r"\in ", "∪": r"\cup ", "∅": r"\emptyset ", "∠": r"\angle ",
})  # fmt: skip
_TEXT = r"text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|operatorname|mbox|emph|boldsymbol|underline|fbox"
_SPELLINGS = [  # in this order; a backslash before a backslash is the end of a matrix's row
    (r"(?<!\\)\\!|\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![a-zA-Z])", ""),
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
    (r"\\\\ ?$", ""),
    (r"^\{([^{},]*)\}$", r"\1"),
    (r"\\([lr])brace(?![a-zA-Z])", lambda m: {"l": r"\{", "r": r"\}"}[m[1]]),
    (r"\\varnothing|\\\{ ?\\\}", r"\\emptyset"),
    (r"\\(?:[dtc]|nice|s)frac(?![a-zA-Z])", r"\\frac"),
    (r"\\over(?:line|rightarrow) ?\{ ?([A-Z] ?[A-Z]) ?\}", r"\1"),  # a segment by its ends; digits repeat under a line
    (r"\bper cent\b", "percent"),
    (r"(?<=[\w)}])\*\*(?=[-+\w({])", "^"),  # a power; elsewhere emphasis
    (r"\*\*", ""),
    (r"\^ ?\(([^(){}]*)\)|\^ ?([+-]?\d+)", r"^{\1\2}"),
    # From left to right, as it is written: the parser would take 4/3\pi for 4/(3\pi).
    (r"(?<![\w.^/)\]}])(\d+) ?/ ?(\d+)(?= ?\\[a-z])", r"\\frac{\1}{\2}"),
    (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
    (r"(?<![\\a-zA-Z])sqrt ?(?:\(([^(){}]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|[a-zA-Z](?![a-zA-Z])))", r"\\sqrt{\1\2\3}"),
]
_SPELLINGS = [(re.compile(pattern), spelling) for pattern, spelling in _SPELLINGS]


@lru_cache(maxsize=10_000)
def normalize(answer: str) -> str:
    """One spelling for what means the same: Unicode digits and signs, LaTeX spacing and commands, powers, degrees.

    Blanks stay, one at a time, since `1 2` is not `12`. A dollar sign that is no mathematics becomes `＄`.
    """
    # Before NFKC, which would turn 10 squared into 102 and three and a half into 31/2.
    answer = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", answer).replace("º", "°")
    for char in set(answer):
        if unicodedata.category(char) == "No" and "⁄" in (parts := unicodedata.normalize("NFKC", char)):
            answer = answer.replace(char, " " + parts.replace("⁄", "/"))
    answer = unicodedata.normalize("NFKC", answer).translate(_SIGNS)
    answer = "".join(
        str(unicodedata.decimal(c)) if c.isdecimal() else c for c in answer if unicodedata.category(c) != "Cf"
    )
    if not answer.isalnum():
        answer = answer.replace("\\$", "＄")
        answer = answer.replace("$", "＄") if answer.count("$") == 1 else answer
        if answer.startswith("**"):
            answer = answer.replace("**", "")
    for pattern, spelling in _SPELLINGS:
        answer = pattern.sub(spelling, answer)
    answer = " ".join(answer.split())
    return answer.removesuffix(".").strip() if answer != "." else ""


def same_text(one: str, other: str) -> bool:
    """Equal but for case and for blanks that separate nothing: between two digits they do."""
    return _tight(one) == _tight(other)


def _tight(text: str) -> str:
    return re.sub(r"(?<![\d.]) | (?![\d.])", "", " ".join(text.casefold().split()))


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
_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
_ONES += "seventeen eighteen nineteen".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_WORDS = {word: n for n, word in enumerate(_ONES)} | {word: 10 * n for n, word in enumerate(_TENS, 2)}
_WORDS |= {f"{tens}{mark}{one}": _WORDS[tens] + _WORDS[one] for tens in _TENS for one in _ONES[1:10] for mark in " -"}
WORD = "|".join(sorted(_WORDS, key=len, reverse=True))
_SPELLED = re.compile(rf"(?:(minus|negative) )?({WORD})(?: (hundred)(?: (?:and )?({WORD}))?)?(?![\w-])", re.IGNORECASE)
_MULTIPLIERS = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# Words beside a number that make another one of it, or none.
_CHANGE = re.compile(
    r"\b(?:not|nor|than|least|most|up to|over|under|above|below|between|half|twice|double|dozens?|squared|cubed|plus|"
    rf"minus|times(?! ?$)|divided|negative|except|or|{'|'.join(_MULTIPLIERS)})\b",
    re.IGNORECASE,
)


def word_to_int(word: str) -> int | None:
    """`12` and `twelve`."""
    return int(word) if word.isdecimal() else _WORDS.get(word.lower())


def leading_number(text: str) -> tuple[Fraction, str] | None:
    """The literal number at the start of a text (decimal, power of ten, fraction, mixed, in words) and the rest."""
    if match := _REPEATING.match(text):
        sign, whole, first, again = match.groups()
        value = Fraction(int(whole + first + again or 0) - int(whole + first or 0), (10 ** len(again) - 1))
        value /= 10 ** len(first)
    elif match := _FRACTION.match(text):
        sign, *parts = match.groups()
        whole = parts[0] or parts[5]
        top, bottom = (_decimal(part) for part in (*parts[1:5], *parts[6:]) if part is not None)
        if not bottom:
            return None
        value = int(whole or 0) + top / bottom
    elif match := _PLAIN.match(text):
        sign, alone, digits, exponent, power = match.groups()
        value = _decimal(digits or "1") * Fraction(10) ** int(alone or exponent or power or 0)
    elif match := _SPELLED.match(text):
        sign, first, hundred, more = match.groups()
        value = Fraction(_WORDS[first.lower()] * (100 if hundred else 1) + (_WORDS[more.lower()] if more else 0))
    else:
        return None
    return (-value if sign and sign != "+" else value), text[match.end() :]


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", "").replace(" ", "").rstrip(".") or "0")


def number(text: str) -> Fraction | None:
    """A literal number: a decimal, a fraction, or a mixed number. Nothing is computed."""
    found = leading_number(text) if len(text) <= LONGEST_NUMBER else None
    return found[0] if found and not found[1] and not _SPELLED.match(text) else None


def integer(text: str) -> int | None:
    """The one whole number that a text states: a literal, or a sentence with a single number and no operator."""
    text = re.sub(rf"(?<=[a-zA-Z])(?:\^\{{[23]\}}|[23]\b)|(?<=\d) ?°[CF]?|{_CURRENCY}", "", without_name(text))
    value = number(text) if "/" not in text and "\\frac" not in text else None
    if value is None and (found := _SPELLED.match(text) and leading_number(text)) and not re.search(r"\d", found[1]):
        value = times_words(*found)[0] if not _CHANGE.search(times_words(*found)[1]) else None
    elif value is None:
        literal = re.search(rf"(?<![\w.,])-?{DECIMAL}", text)
        rest = text[literal.end() :] if literal else ""
        if not literal or re.search(r"\d", text[: literal.start()]):
            return None
        value, rest = times_words(_decimal(literal[0]), rest)
        glued = re.match(r"[^\W\d_]+", rest)
        if (
            re.search(r"\d|[+*^=\\\[\]{}<>!]| - |^ ?/|/ ?$", rest)
            or re.search(r"[+*/^=\\\[\]{}<>!]| - ", text[: literal.start()])
            or _CHANGE.search(text[: literal.start()] + " " + rest)
            or (glued and len(glued[0]) < 3 and not is_symbol(glued[0]))  # 2a and 4n are algebra
        ):
            return None
    return int(value) if value is not None and value.denominator == 1 else None


def times_words(value: Fraction, rest: str) -> tuple[Fraction, str]:
    """`5` and ` million people` as 5,000,000 and ` people`."""
    while (match := re.match(r" ?([a-z]+)\b", rest, re.IGNORECASE)) and match[1].lower() in _MULTIPLIERS:
        value, rest = value * _MULTIPLIERS[match[1].lower()], rest[match.end() :]
    return value, rest


# ------------------------------------------------------------------------------------------------- units

# Abbreviations that count as units behind a number; what they are is pint's to say. Others are algebra, as 2a and 3xy.
_SI = set("m g s A K L l N J W V C F T Ω ohm Pa Hz eV cal bar mol Wh".split())
_SYMBOLS = _SI | set(
    "h hr hrs min mins sec secs day atm rad deg in ft yd yds mi lb lbs kgs oz gal mph kph rpm ha USD EUR GBP".split()
)
_PREFIXES = tuple("kMGTmµμnpcd")
_CURRENCIES = {"＄": "dollar", "€": "euro", "£": "sterling", "¥": "yen", "₹": "rupee"}
_CURRENCY = f"[{''.join(_CURRENCIES)}]"
_UNIT = re.compile(
    r" ?(/|\\cdot|\*|per\b)? ?(?:(square|sq\.?|cubic|cu\.?) )?(°(?:[Cc]elsius|[Ff]ahrenheit|[CF])|[^\W\d_]+|[%°])\.?"
    r"(?: ?\^ ?\{([+-]?\d)\}|([23])\b| (squared|cubed)\b)?"
)
# A bare degree or letter behind a number may mean a temperature's.
_TEMPERATURES = {"degree_Celsius": ("degree", "coulomb"), "degree_Fahrenheit": ("degree", "farad")}


def is_symbol(name: str) -> bool:
    return name in _SYMBOLS or (len(name) > 1 and name[0] in _PREFIXES and name[1:] in (_SI | {"B"}))


@cache
def registry():
    import pint

    units = pint.UnitRegistry()
    for line in ("dollar = [dollar] = USD", "cent = dollar / 100", "euro = [euro] = EUR", "yen = [yen] = JPY",
                 "sterling = [sterling] = GBP", "rupee = [rupee] = INR", "unit = [unit]"):  # fmt: skip
        units.define(line)
    return units


@lru_cache(maxsize=10_000)
def unit_named(name: str) -> tuple[str, float, dict[str, int]] | None:
    """Pint's name of a unit, and how many of which base units it is; None where the text names no unit."""
    if name[0] in "°%":
        name = {"°": "degree", "%": "percent"}.get(
            name
        ) or f"degree_{ {'c': 'Celsius', 'f': 'Fahrenheit'}[name[1].lower()] }"
    elif not is_symbol(name):
        name = name if len(name) > 3 else name.lower()
        if is_symbol(name):
            pass
        elif len(name) < 4 or not any(
            not prefix or name.lower().startswith(prefix) for prefix, *_ in registry().parse_unit_name(name.lower())
        ):
            return None
        else:
            name = name.lower()
    name = "kilogram" if name == "kgs" else name
    _, unit, _ = registry().parse_unit_name(name)[0]
    if unit in (*_TEMPERATURES, "percent"):
        return unit, 1.0, {unit: 1}
    scale, base = registry().get_root_units(name)
    return unit, float(scale), {str(part): int(power) for part, power in base._units.items()}


def unit_of(text: str) -> tuple[str, float, dict[str, int]] | None:
    """What a unit behind a number is: its name (if it is a single one), scale, and base units with their powers.

    `cm^2`, `square meters`, `km/h`, `meters per second`, `m s^{-2}`, `J/(kg K)`; None where it is not one.
    """
    if len(text) > LONGEST_NUMBER:
        return None
    text = re.sub(r"\\frac ?\{([^{}]+)\} ?\{([^{}]+)\}", r"\1/\2", text.strip())
    text = re.sub(r"\\mu ?", "μ", text.replace("\\Omega", "Ω"))
    text = re.sub(r"/ ?\(([^()]*)\)", lambda m: "/" + re.sub(r" ?(?:\\cdot|\*| ) ?", "/", m[1].strip()), text)
    names, total, dimensions, place = [], 1.0, {}, 0
    while place < len(text):
        match = _UNIT.match(text, place)
        if not match or (match[1] and not names):
            return None
        over, power, word, exponent, *spoken = match.groups()
        named = unit_named(word)
        if named is None:
            return None
        exponent = int(exponent or spoken[0] or {"s": 2, "c": 3}.get((power or spoken[1] or " ")[0].lower(), 1))
        exponent = -exponent if over in ("/", "per") else exponent
        names.append(named[0] if exponent == 1 else "")
        total *= named[1] ** exponent
        for base, count in named[2].items():
            dimensions[base] = dimensions.get(base, 0) + count * exponent
        place = match.end()
    if not names:
        return None
    return names[0] if len(names) == 1 else "", total, {base: count for base, count in dimensions.items() if count}


# ------------------------------------------------------------------------------------------------- quantities


def quantity(text: str):
    """A literal number and its unit (None: none, or counted things as in `12 people`)."""
    if len(text) > LONGEST_NUMBER:
        return None
    unit, sign = None, re.match(rf"([+-]?) ?({_CURRENCY})", text)
    if sign:
        unit, text = _CURRENCIES[sign[2]], sign[1] + text[sign.end() :].strip()
    found = leading_number(text)
    if found is None:
        return None
    value, rest = times_words(*found)
    if not rest.strip():
        return value, unit_of(unit) if unit else None
    if unit or (re.match(r"[a-zA-Z]", rest) and _CHANGE.search(rest)):
        return None
    if unit := unit_of(rest):
        return value, unit
    counted = re.fullmatch(r" (?:[A-Za-z]{3,}(?: |$)){1,3}", rest) and not _CHANGE.search(rest)
    return (value, None) if counted and " and" not in rest else None


def in_unit_of(one, gold) -> list[Fraction]:
    """The values, in the gold quantity's unit, that a quantity may mean: none where the units do not fit.

    A unit that only one side has is ignored; a per cent that only one side has may also be hundredths.
    """
    (value, unit), (_, gold_unit) = one, gold
    name, gold_name = (u[0] if u else "" for u in (unit, gold_unit))
    if (name == "percent") != (gold_name == "percent"):
        return [] if name and gold_name else [value, value / 100 if name == "percent" else value * 100]
    if not unit or not gold_unit:
        return [value]
    if name in _TEMPERATURES.get(gold_name, ()) or gold_name in _TEMPERATURES.get(name, ()):
        return [value]
    return [value * Fraction(unit[1] / gold_unit[1])] if unit[2] == gold_unit[2] else []


def same_quantity(one, gold) -> bool:
    """Equal to one in a million, converted where both sides have a unit."""
    return any(abs(value - gold[0]) <= abs(gold[0]) / 1_000_000 for value in in_unit_of(one, gold))


def half_a_place(gold: str) -> Fraction:
    """Half a unit of the last decimal of `1.50` and `12 cm`; nothing beside fractions and powers of ten."""
    match = re.match(rf"[+-]? ?{DECIMAL}(?! ?(?:[\d.,/e]|\\))", gold)
    return Fraction(1, 2 * 10 ** len(match[0].partition(".")[2])) if match else Fraction(0)


def without_unit(text: str):
    """`12\\sqrt{3} cm^2` as `12\\sqrt{3}` and its unit. Of single letters only an `m` set apart is a unit here."""
    for end in re.finditer(r"(?:(?<=[})\d])|(?<=\\pi))( ?)(?=[a-zA-Z°])", text):
        rest = text[end.end() :]
        if rest[1:2].isalpha() or rest[0] == "°" or (rest[0] == "m" and end[1]):
            if unit := unit_of(rest):
                return text[: end.start()], unit
    return text, None


# ------------------------------------------------------------------------------------------------- names and relations

_ABOUT = r"(?:\\approx|\\sim(?:eq)?|about|approximately|approx\.?|roughly|around|nearly)"
_SENTENCE = re.compile(r"(?:[A-Za-z][A-Za-z' ,]{0,80} )?(?:is|are|equals)(?: equal to)?:? (?=[-+\d\\√(\[{＄€£¥.])")


def without_name(text: str) -> str:
    """`x = 5`, `m\\angle A = 5`, `Area = 5`, `5 = x`, `the angle is 5` and `about 5` as `5`."""
    sides = [side.strip() for side in text.split("=")]
    if len(sides) == 2 and all(sides):
        sides = [side for side in sides if not is_name(side)] or sides[1:]
    text = sides[0] if len(sides) == 1 else text
    if (match := _SENTENCE.match(text)) and not _CHANGE.search(match[0]):
        text = text[match.end() :]
    if match := re.match(rf"(.*?) ?(?={_ABOUT}(?![a-z]))", text[:80]):
        text = text[match.end() :] if is_name(match[1]) else text
    return re.sub(rf"^{_ABOUT} ?(?=[-+\d.\\＄€£¥])", "", text)


def is_name(text: str) -> bool:
    """What an equation gives a value to: `x`, `AB`, `f(2)`, `m\\angle ABC`; not `2x` or `y^2`."""
    plain = re.sub(r"\\(?:angle|triangle|Delta|overline|sin|cos|tan|alpha|beta|gamma|theta|phi)(?![a-zA-Z])", "a", text)
    return len(text) <= 60 and bool(re.match(r"[A-Za-z(|]", plain) and not re.search(r"[-+*/^!<>\\=]", plain))


RELATION = re.compile(r"\\(?:le|ge|neq|in)(?![a-zA-Z])|[<>]")
_SPOKEN = [
    (r"(?:greater|more) than or equal to|at least|no less than", r"\\ge"),
    (r"(?:less|fewer|smaller) than or equal to|at most|no more than|up to", r"\\le"),
    (r"(?:greater|more|larger) than|above|over", ">"),
    (r"(?:less|fewer|smaller) than|below|under", "<"),
    (r"not equal to|(?:is )?not(?= -?\d)", r"\\neq"),
]
_SPOKEN = [(re.compile(rf"\b(?:is )?(?:{words})(?![a-z])", re.IGNORECASE), sign) for words, sign in _SPOKEN]
_MIRROR = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}


def relations_as_signs(text: str) -> str:
    """`at least 12` as `\\ge 12`."""
    for pattern, sign in _SPOKEN:
        text = pattern.sub(sign, text)
    return text


def as_interval(text: str) -> str | None:
    """What a relation says of one name, as intervals: `x \\le 2` as `(-\\infty,2]`; None where it says more."""
    alternatives = re.split(r",? or |\\lor|\\cup", text)
    if len(alternatives) > 1:
        intervals = [as_interval(part.strip()) if RELATION.search(part) else None for part in alternatives]
        return r"\cup".join(intervals) if all(intervals) else None
    signs = [match[0] for match in RELATION.finditer(text)]
    sides = [side.strip() for side in RELATION.split(text)]
    if signs == [r"\in"]:
        return sides[1]
    if len(signs) == 1 and is_name(sides[1]) and not sides[0].isalpha():
        sides, signs = sides[::-1], [_MIRROR.get(signs[0], signs[0])]
    if len(signs) == 1 and (not sides[0] or is_name(sides[0])) and sides[1]:
        bound = sides[1]
        return {"<": rf"(-\infty,{bound})", r"\le": rf"(-\infty,{bound}]", ">": rf"({bound},\infty)",
                r"\ge": rf"[{bound},\infty)", r"\neq": rf"(-\infty,{bound})\cup({bound},\infty)"}[signs[0]]  # fmt: skip
    if len(signs) == 2 and is_name(sides[1]) and all(sides):
        if all(sign in (">", r"\ge") for sign in signs):
            sides, signs = sides[::-1], [_MIRROR[sign] for sign in signs[::-1]]
        if all(sign in ("<", r"\le") for sign in signs):
            return f"{'(['[signs[0] != '<']}{sides[0]},{sides[2]}{')]'[signs[1] != '<']}"
    return None


# ------------------------------------------------------------------------------------------------- times


def clock(text: str) -> tuple[int, int] | None:
    """Hours on a twelve-hour dial, and minutes: `4:23 PM`, `16:23`, `half past four`, `4 o'clock`."""
    text = re.sub(r"^(?:it|it's|the time)(?: is|'s)? ", "", text, flags=re.IGNORECASE)
    if match := re.fullmatch(r"(\d{1,2}):(\d{2})(?::00)?(?: ?[ap]\.?m\.?| o'clock)?", text, re.IGNORECASE):
        hours, minutes = int(match[1]), int(match[2])
    elif match := re.fullmatch(rf"(\d{{1,2}}|{WORD})(?: ?[ap]\.?m\.?| o'clock)", text, re.IGNORECASE):
        hours, minutes = word_to_int(match[1]), 0
    else:
        match = re.fullmatch(
            rf"(?:a )?(half|quarter|\d{{1,2}}|{WORD})(?: minutes?)? (past|after|to|before) (\d{{1,2}}|{WORD})",
            text,
            re.IGNORECASE,
        )
        if not match:
            return None
        hours = word_to_int(match[3])
        minutes = {"half": 30, "quarter": 15}.get(match[1].lower()) or word_to_int(match[1])
        if match[2].lower() in ("to", "before"):
            hours, minutes = hours + 11, 60 - minutes
    if not (0 <= hours <= 24 and 0 <= minutes <= 59):
        return None
    return hours % 12, minutes


def for_algebra(text: str) -> str:
    """As math-verify reads it: degrees behind a sine as radians, elsewhere dropped, no currencies."""
    text = re.sub(r"(\\?(?:sin|cos|tan)) ?\(?(\d+)°\)?", r"\1{\\frac{\2\\pi}{180}}", text)
    return re.sub(f"°|{_CURRENCY}", "", text)
