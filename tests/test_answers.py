"""Answer checking: the case table, attacks, and the process that does symbolic comparison."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.rewards import math_worker
from common.rewards.answers import KINDS, check, extract, prepare_gold, score
from common.rewards.reading import normalize, number


def answer(text: str) -> str:
    return f"<think>r.</think><answer>{text}</answer>"


# number, completion, gold, kind, choices, right?
CASES = [
    (1, answer("12"), "12", "int", None, True),
    (2, answer(" 12 \n"), "12", "int", None, True),
    (3, answer("12.0"), "12", "int", None, True),
    (4, answer("12.5"), "12", "int", None, False),
    (5, answer("1,234"), "1234", "int", None, True),
    (6, answer("The answer is 12"), "12", "int", None, True),
    (7, answer("3 or 4"), "4", "int", None, False),
    (8, answer("3 + 4"), "7", "int", None, False),
    (9, answer("12 pushes"), "12", "int", None, True),
    (10, answer("-3"), "3", "int", None, False),
    (11, answer("−3"), "-3", "int", None, True),
    (12, answer("３"), "3", "int", None, True),
    (13, answer("٣"), "3", "int", None, True),
    (14, answer("10²"), "102", "int", None, False),
    (15, "<think>12</think>", "12", "int", None, False),
    (16, "<think>so it is <answer>12</answer>", "12", "int", None, False),
    (17, "<think>try <answer>5</answer></think><answer>12</answer>", "12", "int", None, True),
    (18, "<think>r.</think><answer>5</answer><answer>12</answer>", "12", "int", None, False),
    (19, "<think>r.</think><answer>12</answer> so <answer>12</answer>", "12", "int", None, True),
    (20, "<think>r.</think>12", "12", "int", None, False),
    (21, "<think>r.</think><answer>12", "12", "int", None, False),
    (22, answer(""), "12", "int", None, False),
    (23, answer(r"\boxed{12}"), "12", "int", None, True),
    (24, r"The total is \boxed{12}.", "12", "int", None, True),
    (25, r"First \boxed{3}. Then it follows that the result is \boxed{12}", "12", "int", None, True),
    (26, r"\boxed{3} or \boxed{12}", "12", "int", None, False),
    (27, r"\boxed{12} or \boxed{12}", "12", "int", None, True),
    (28, r"\boxed{\frac{1}{2}}", "1/2", "math", None, True),
    (29, r"\boxed{\frac{1}{2}", "1/2", "math", None, False),
    (30, r"\boxed{7}}}}", "7", "math", None, True),
    (31, r"\boxed{\boxed{7}}", "7", "math", None, True),
    (32, "\\boxed{" * 3000, "7", "math", None, False),
    (33, r"\boxed{\left\{1,2\right\}}", r"\{2,1\}", "math", None, True),
    (34, r"\boxed{(2,1)}", "(1,2)", "math", None, False),
    (35, r"\boxed{[1,2)}", "[1,2]", "math", None, False),
    (36, r"\boxed{1} and \boxed{2}", "1,2", "math", None, True),
    (37, r"\boxed{0.5}", r"\frac{1}{2}", "math", None, True),
    (38, r"\boxed{0.333}", r"\frac{1}{3}", "math", None, False),
    (39, r"\boxed{0.33333333}", r"\frac{1}{3}", "math", None, True),
    (40, r"\boxed{3\frac{1}{2}}", "3.5", "math", None, True),
    (41, r"\boxed{3½}", "3.5", "math", None, True),
    (42, r"\boxed{0.0000002}", "0.0000001", "math", None, False),
    (43, r"\boxed{3.0000000001}", "3", "math", None, True),
    (44, r"\boxed{50\%}", "0.5", "math", None, True),
    (45, r"\boxed{50}", r"50\%", "math", None, True),
    (46, r"\boxed{5\%}", "50", "math", None, False),
    (47, r"\boxed{12\text{ cm}}", "12", "math", None, True),
    (48, r"\boxed{12 cm^2}", r"12\text{ cm}^2", "math", None, True),
    (49, r"\boxed{12 m}", "12 cm", "math", None, False),
    (50, r"\boxed{60°}", r"60^\circ", "math", None, True),
    (51, r"\boxed{x=5}", "5", "math", None, True),
    (52, r"\boxed{1.2\times10^{3}}", "1200", "math", None, True),
    (53, r"\boxed{1e999999999}", "1", "math", None, False),
    (54, r"\boxed{9^{9^{9^{9}}}}", "9", "math", None, False),
    (55, r"\boxed{(10^{10})!}", "1", "math", None, False),
    (56, "\\boxed{" + "9" * 100_000 + "}", "9", "math", None, False),
    (57, "\\boxed{" + "(" * 5000 + "1" + ")" * 5000 + "}", "1", "math", None, False),
    (58, r"\boxed{\frac{1}{0}}", "1", "math", None, False),
    (59, r"\boxed{2\sqrt{2}}", r"\sqrt{8}", "math", None, True),
    (60, r"\boxed{(x+1)^2}", "x^2+2x+1", "math", None, True),
    (61, r"\boxed{nan}", "1", "math", None, False),
    (62, answer("B"), "B", "letter", None, True),
    (63, answer("(B)"), "B", "letter", None, True),
    (64, answer("B. 9"), "B", "letter", ("7", "9", "4", "8"), True),
    (65, answer("B. 7"), "B", "letter", ("7", "9", "4", "8"), False),
    (66, answer("9"), "B", "letter", ("7", "9", "4", "8"), True),
    (67, answer("A or B"), "B", "letter", ("7", "9", "4", "8"), False),
    (68, answer("A, B, C, D"), "B", "letter", ("7", "9", "4", "8"), False),
    (69, answer(r"\text{B}"), "B", "letter", None, True),
    (70, answer("A cat"), "A", "letter", ("dog", "cat", "cow", "pig"), False),
    (71, r"\boxed{A} or \boxed{B}", "B", "letter", None, False),
    (72, r"\boxed{A} or \boxed{B}", "A", "letter", None, False),
    (73, answer("(C)"), "(C)", "letter", None, True),
    (74, answer("A, C"), "C, A", "letters", None, True),
    (75, answer("A"), "A, C", "letters", None, False),
    (76, answer("8"), "8", "choice", ("7", "9", "4", "8"), True),
    (77, answer("D"), "8", "choice", ("7", "9", "4", "8"), True),
    (78, answer("(D) 8"), "8", "choice", ("7", "9", "4", "8"), True),
    (79, answer("(D) 9"), "8", "choice", ("7", "9", "4", "8"), False),
    (80, answer("4:23"), "4:23", "time", None, True),
    (81, answer("4:59"), "4:23", "time", None, False),
    (82, answer("04:23 PM"), "4:23", "time", None, True),
    (83, answer("12:37"), "0:37", "time", None, True),
    (84, answer("4:63"), "5:03", "time", None, False),
    (85, answer("Yes, it is possible."), "Yes", "yesno", None, True),
    (86, answer("No"), "Yes", "yesno", None, False),
    (87, answer("yes and no"), "Yes", "yesno", None, False),
    (88, answer("Friday."), "friday", "exact", None, True),
    (89, answer("10.4"), "10", "relaxed", None, True),
    (90, answer("10.6"), "10", "relaxed", None, False),
    (91, answer("12 (not 13)"), "12", "int", None, False),
    (92, answer("3,12"), "312", "int", None, False),
    (93, answer("1\u200b2"), "12", "int", None, True),
    (94, "<think>İİİİ</think><answer>12</answer>", "12", "int", None, True),
    (95, "<THINK>r.</THINK><ANSWER>12</ANSWER>", "12", "int", None, True),
    (96, "reasoning without an opening tag</think><answer>12</answer>", "12", "int", None, True),
    (97, "&lt;answer&gt;12&lt;/answer&gt;", "12", "int", None, False),
    (98, answer("None"), "12", "int", None, False),
    (99, "", "12", "int", None, False),
    (100, "<answer>" * 20_000, "12", "int", None, False),
    (101, r"\boxed{17\times 23}", "391", "int", None, False),
    (102, r"\boxed{17\times 23}", "391", "math", None, True),
    (103, answer("about 12"), "12", "int", None, True),
    (104, answer("12/4"), "3", "int", None, False),
    (105, r"\boxed{5+7=12}", "12", "math", None, True),
    (106, r"\boxed{\frac{\pi}{2}}", r"\pi/2", "math", None, True),
    (107, r"\boxed{1,234}", "1234", "math", None, True),
    (108, r"\boxed{2}, \boxed{3}", "3", "math", None, False),
]


# As models write answers: completion's answer, gold, kind, choices, right?
ANGLES = (r"$45^\circ$", r"60°", r"$75^\circ$", r"90°")
SPELLINGS = [
    # a box inside the tags, alone or in a sentence
    *((rf"{before}\boxed{{5}}{after}", "5", "int", None, True) for before, after in (
        ("$", "$"), (r"\[", r"\]"), ("x = ", ""), ("The answer is ", "."))),
    (r"The answer is \boxed{B}", "B", "letter", None, True), (r"\boxed{4} or \boxed{5}", "5", "int", None, False),
    # letters with text, put otherwise or another option's; several letters
    *((text, "B", "letter", ANGLES, True) for text in (
        "B. 60", "B. $60^{\\circ}$", "(B) 60 degrees", "B: about 60°", "60°", "The answer is B", "Option B: 60°",
        "The correct option is (B).", "b) sixty degrees")),
    *((text, "B", "letter", ANGLES, False) for text in (
        "B. 75", r"B. $75^\circ$", "B. 60°, or C. 75°", "B. 60 (C) 75", "B. 60, C", "E. 60°", "not B")),
    *((text, "A", "letter", None, False) for text in (
        "(A) or (B)", "(A), (B)", "A. B. C. D.", "A.B.C.D", "(A)(B)(C)(D)", "A: x B: y", "a. x or b", "A. x, B",
        "A. 5 / B. 7", "A. x; B) y", "a. x b. y")),
    *((text, "A", "letter", None, True) for text in (
        "A. the point C", "A. it is vitamin C", "A: 5 cm and more", "(A) fruit, e.g. apples", "Answer: A",
        "A. I, II", "A. P, Q")),
    ("A. 1/2", r"$\frac{1}{2}$", "choice", (r"$\frac{1}{2}$", r"$\frac{1}{3}$"), True),
    ("A. 1/3", r"$\frac{1}{2}$", "choice", (r"$\frac{1}{2}$", r"$\frac{1}{3}$"), False),
    *((text, "A", "letters", None, True) for text in ("A. foo", "A: foo", "Option A", "The answer is A")),
    ("The answer is A, C", "A, C", "letters", None, True), ("A. foo or C", "A", "letters", None, False),
    ("The answer is yes", "yes", "yesno", None, True), ("The answer is not yes", "yes", "yesno", None, False),
    *((text, "3.14", "float3", None, True) for text in ("3.14 cm", "x = 3.14", "The answer is 3.14", "3.14")),
    ("60°", "60", "float3", None, True), ("50%", "0.5", "float3", None, True), ("3.2", "3.14", "float3", None, False),
    # mathematics: roots and infinity as characters, fractions before symbols
    ("√3", r"\sqrt{3}", "math", None, True), ("5√2", r"5\sqrt{2}", "math", None, True),
    ("√41", r"\sqrt{41}", "math", None, True), ("7√2/2", r"\frac{7\sqrt{2}}{2}", "math", None, True),
    ("√(x+1)", r"\sqrt{x+1}", "math", None, True), ("√3", r"\sqrt{5}", "math", None, False),
    ("(−∞, 3)", r"(-\infty, 3)", "math", None, True), ("(−∞, 3]", r"(-\infty, 3)", "math", None, False),
    (r"4/3\pi", r"\frac{4}{3}\pi", "math", None, True), (r"3/2\sqrt{3}", r"\frac{3\sqrt{3}}{2}", "math", None, True),
    (r"x^2/3\pi", r"\frac{x^2}{3\pi}", "math", None, True), (r"4/3\pi", r"\frac{4}{3\pi}", "math", None, False),
    # units: behind symbols, spelled in two ways, different ones
    (r"25\pi", r"25\pi \text{ cm}^2", "math", None, True), (r"25\pi\text{ cm}^2", r"25\pi", "math", None, True),
    (r"12\sqrt{3}\text{ cm}^2", r"12\sqrt{3}", "math", None, True), (r"25\pi m", r"25\pi", "math", None, True),
    (r"\frac{15\sqrt{3}}{2}\text{ m}^2", r"\frac{15\sqrt{3}}{2}", "math", None, True),
    (r"12\sqrt{3} cm^2", r"12\sqrt{3} cm", "math", None, False), (r"\sqrt{3}a", r"\sqrt{3}", "math", None, False),
    (r"\sqrt{3} a", r"\sqrt{3}", "math", None, False), (r"12\sqrt{3} cm", r"11\sqrt{3} cm", "math", None, False),
    *((one, other, "math", None, True) for one, other in (
        ("5 ft", "5 feet"), ("10 cm", "10 centimeters"), ("10 centimeter", "10 centimeters"), ("8 hours", "8 h"),
        ("5 m²", "5 square meters"), ("5 m^2", "5 sq. m"), ("5 kilograms", "5"), ("30°C", "30"),
        ("5 kg", "5 kilograms"), ("12m", "12"), ("60 km/h", "60 kilometers/hour"))),
    *((one, other, "math", None, False) for one, other in (
        ("5 ft", "5 inches"), ("5 m", "5 square meters"), ("2", "2a"), ("4", "4n"), ("2", "2b"), ("4n", "4"))),
    # lists in words, plus and minus
    *((text, "3,5", "math", None, True) for text in ("3 and 5", "5; 3", "3 or 5", "5, 3")),
    ("3 or -3", r"\pm 3", "math", None, True), ("±3", "3, -3", "math", None, True),
    ("3", r"\pm 3", "math", None, False),
    (r"2 \pm \sqrt{3}", r"2+\sqrt{3}, 2-\sqrt{3}", "math", None, True), ("3 or 5", "3", "math", None, False),
    # words and letters in order are not products
    ("ACB", "ABC", "math", None, False), ("CDAB", "ABCD", "math", None, False), ("felt", "left", "math", None, False),
    ("abc", "ABC", "math", None, True), (r"z \cdot y \cdot x", "xyz", "math", None, True),
    ("ba", "ab", "math", None, True),
    # boxes inside the tags: with what stands around them where that is more than words
    *((text, "3", "math", None, False) for text in (
        r"-\boxed{3}", r"2\boxed{3}", r"\boxed{3}\pi", r"\boxed{3}\times 10^4", r"\frac{\boxed{3}}{2}",
        r"(\boxed{3}, 5)", r"\boxed{3} or \boxed{5}")),
    (r"-\boxed{3}", "-3", "math", None, True), (r"\boxed{3}\pi", r"3\pi", "math", None, True),
    (r"x=\boxed{3}, y=\boxed{5}", "3,5", "math", None, True), (r"x=\boxed{3}, y=\boxed{5}", "5", "math", None, False),
    *((text, "B", "letter", None, False) for text in (
        r"A or \boxed{B}", r"A, C or \boxed{B}", r"\boxed{B} or C or A", r"\boxed{B} \quad \boxed{C}")),
    # options that are letters or numbers, and named by less than their whole text
    ("A", "A", "choice", ("B", "A"), True), ("A", "B", "choice", ("B", "A"), False),
    ("(B)", "B", "choice", ("C", "A", "B"), True), ("C", "B", "choice", ("C", "A", "B"), False),
    *((text, "B", "letter", ("10 cm", "12 cm", "14 cm"), True) for text in (
        "12", "12 centimeters", "x = 12", "B 12 cm", "B (12 cm)", "B - 12 cm", "**B** 12 cm", "[B]", '"B"', "*B*")),
    *((text, "B", "letter", ("10 cm", "12 cm", "14 cm"), False) for text in (
        "B. 12 or 14", "B. about 14", "B. x = 14 cm", "B 14 cm", "12 or 14")),
    *((text, "A, C", "letters", None, True) for text in ("{A, C}", "[A, C]", "A & C", "Options A and C")),
    # numbers: words that change them, about, counted things, a dotless i
    *((text, "12", "int", None, False) for text in ("12 million", "not 12", "less than 12", "12 squared", "5 mın")),
    *((text, "12", "math", None, False) for text in ("12 trillion", "5 mın", "12 squared", "11 people")),
    *((text, "12", "math", None, True) for text in ("about 12", "≈12", "12 people", r"12 \text{ sides}", "12 USD")),
    (r"x \approx 3.14 cm", "3.14", "math", None, True), ("The answer is 10.4", "10", "relaxed", None, True),
    ("The answer is 4:23", "4:23", "time", None, True), ("The answer is red", "red", "exact", None, True),
    *((text, "50%", "rounded", None, False) for text in ("0", "0.99", "40%")), ("50.4%", "50%", "rounded", None, True),
    ("1", "3/4", "rounded", None, False), ("1.24", "1.2 cm", "rounded", None, True),
    *((text, "1.2", "rounded", None, True) for text in ("1.2", "1.24", "1.16", r"x \approx 1.24")),
    *((text, "1.2", "rounded", None, False) for text in ("1.26", "1.14")), ("1.54", "1.50", "rounded", None, False),
    # pi and roots without a backslash, powers, names before tuples
    ("pi/2", r"\frac{\pi}{2}", "math", None, True), ("6.25*pi", r"6.25\pi", "math", None, True),
    ("sqrt(3)", r"\sqrt{3}", "math", None, True), ("2*sqrt5", r"2\sqrt{5}", "math", None, True),
    ("x√2", r"x\sqrt{2}", "math", None, True), ("2**10", "2^{10}", "math", None, True),
    ("**12**", "12", "math", None, True),
    ("(x,y)=(3,-2)", "(3, -2)", "math", None, True), ("P(3,-2)", "(3, -2)", "math", None, True),
    # lists: a comma before and or or; all of what is said to be the same; names tell elements apart
    *((text, "1,2,3", "math", None, True) for text in ("1, 2, and 3", "1,2, or 3", r"1,2,\text{ and }3")),
    *((text, "5 cm", "math", None, False) for text in ("3 cm, or 5 cm", "3 cm, and 5 cm", "5 cm or 3 cm")),
    ("2.5 or 5/2", r"\frac{5}{2}", "math", None, True), ("2.5 or 3/2", r"\frac{5}{2}", "math", None, False),
    ("x=3, y=2", "y=2, x=3", "math", None, True), ("x=3, y=2", "x=2, y=3", "math", None, False),
    ("y=3, x=2", "(3,2)", "math", None, False), ("y=2, x=3", "(3,2)", "math", None, True),
    ("2, 3", "x=3, y=2", "math", None, False),
]  # fmt: skip


@pytest.mark.parametrize("text, gold, kind, choices, right", SPELLINGS)
def test_answers_as_models_write_them(text, gold, kind, choices, right, monkeypatch):
    monkeypatch.setattr(math_worker, "DEADLINE", 30.0)
    verdict = check(answer(text), prepare_gold(gold, kind, choices), kind, choices)
    assert verdict.correct is right, verdict


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[3]}")
def test_case_table(case):
    _, completion, gold, kind, choices, right = case
    verdict = check(completion, prepare_gold(gold, kind, choices), kind, choices)
    assert verdict.correct is right, verdict
    assert verdict.status != "error"


TABLE = [json.loads(line) for line in (Path(__file__).parent / "answer_cases.jsonl").read_text("utf-8").splitlines()]
# Right, but in forms that the rules do not read.
NOT_READ = {r"<answer>{1 \over 2}</answer>", "<answer>5 ft 0 in</answer>", "<answer>one half</answer>",
            "<answer>a half</answer>"}  # fmt: skip


@pytest.mark.parametrize("kind", sorted({row["kind"] for row in TABLE}))
def test_table_of_answers(kind, monkeypatch):
    """Every case of the kind, the wrong ones by name; benchmarks/answers.py counts them."""
    monkeypatch.setattr(math_worker, "DEADLINE", 30.0)
    wrong = []
    for row in TABLE:
        if row["kind"] == kind:
            gold = prepare_gold(row["gold"], kind, row["choices"])
            verdict = check(row["completion"], gold, kind, row["choices"])
            if verdict.correct != (row["expected"] and row["completion"] not in NOT_READ) or verdict.status == "error":
                wrong.append((row["completion"], gold, row["why"], verdict))
    assert not wrong


def test_units_are_imported_only_where_a_unit_is_read():
    program = (
        "import sys\nfrom common.rewards.answers import check\n"
        "for kind, text, gold in (('int', '12 apples', '12'), ('int', '12 cm', '12'), ('exact', 'red', 'red'), "
        "('yesno', 'Yes.', 'yes'), ('math', '1/2', '0.5')):\n"
        "    assert check(f'<answer>{text}</answer>', gold, kind).correct\n"
        "assert 'pint' not in sys.modules and 'sympy' not in sys.modules\n"
        "assert check('<answer>5 km</answer>', '5000 m', 'math').correct and 'pint' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])


def test_statuses_say_why_an_answer_does_not_count():
    assert check("no answer at all", "12", "int").status == "no_answer"
    assert check("<think>cut off", "12", "int").status == "no_answer"
    assert check(answer("5") + "<answer>12</answer>", "12", "int").status == "hedge"
    assert check(answer("a dozen"), "12", "int").status == "unparsed"
    assert check(answer("9" * 3000), "12", "int").status == "too_long"
    assert check(answer("12"), "12", "no such kind").status == "error"


def test_formats():
    text = r"<answer>1</answer> or \boxed{2}"
    assert extract(text, "tag") == ("1", "ok") and extract(text, "auto") == ("1", "ok")
    assert extract(text, "boxed") == ("2", "ok")
    assert extract("<answer>1", "tag") == (None, "no_answer")


def test_normalization_keeps_what_unicode_normalization_would_lose():
    assert normalize("10²") == "10^{2}"
    assert number(normalize("3½")) == number("7/2") == number(r"3\frac{1}{2}") == 3.5
    assert normalize("\u200b１２ cm.") == "12 cm"
    assert number("1e9999") is None and number("1/0") is None and number("9" * 201) is None


@pytest.mark.parametrize(
    "gold, kind, choices, prepared",
    [
        (r"\boxed{\frac{1}{2}}", "math", None, r"\frac{1}{2}"),
        ("<answer> 3 </answer>", "int", None, "3"),
        ("<think>six, half</think><answer>3</answer>", "int", None, "3"),
        (48, "int", None, "48"),
        (["0.5"], "relaxed", None, "0.5"),
        ("(C)", "letter", None, "(C)"),
        ("cow", "choice", ("dog", "cow"), "cow"),
    ],
)
def test_gold_answers_are_prepared(gold, kind, choices, prepared):
    assert prepare_gold(gold, kind, choices) == prepared


@pytest.mark.parametrize(
    "gold, kind, choices, message",
    [
        (None, "math", None, "no answer"),
        ("  ", "exact", None, "no answer"),
        (["a", "b"], "exact", None, r"the answer is a list \(\['a', 'b'\]\); write it as one text"),
        ("A", "choice", None, "needs the options in a column choices or options"),
        (r"\boxed{\left\{ 1 \right.", "math", None, "no answer inside"),
        ("None", "int", None, "not of kind int"),
        ("maybe", "yesno", None, "not of kind yesno"),
        ("25:00", "time", None, "not of kind time"),
        ("horse", "choice", ("dog", "cow"), "not of kind choice"),
        ("12", "number", None, "unknown answer kind"),
    ],
)
def test_gold_answers_that_cannot_be_used_are_named(gold, kind, choices, message):
    with pytest.raises(ValueError, match=message):
        prepare_gold(gold, kind, choices)


def test_score_counts_what_came_up():
    examples = [SimpleNamespace(answer=a, kind="int", choices=None) for a in ("3", "3", "4", "4")]
    verdicts, counts = score([answer("3"), "none", answer("3 or 4"), answer("4")], examples)
    assert verdicts == [1.0, 0.0, 0.0, 1.0]
    assert {status: count for status, count in counts.items() if count} == {"ok": 2, "no_answer": 1, "unparsed": 1}


def test_swapping_golds_moves_exactly_the_verdicts_of_their_rows():
    texts = [answer("3"), answer("4"), answer("5")]
    one = [SimpleNamespace(answer=a, kind="int", choices=None) for a in ("3", "4", "5")]
    assert score(texts, one)[0] == [1, 1, 1]
    assert score(texts, [one[1], one[0], one[2]])[0] == [0, 0, 1]


ATTACKS = [
    "9**9**9**9", r"9^{9^{9^{9}}}", r"(10^{10})!", "100000!", "((9!)!)!", r"\int_0^1 x dx", "1e999999999",
    "{" * 100_000, "(" * 100_000, r"\frac{" * 300, "$" * 5000, r"\boxed{" * 5000, "__import__('os').system('true')",
    "\x00", "\ud800", r"\left\{1,\right.", r"x_{" * 100, "[" * 59 + "1", r"\sqrt{" * 50 + "2" + "}" * 50,
    r"\boxed{" * 4000 + "2" + "}" * 4000, "9 km**9**9**9", "9 m^{9}^{9}", "9 m" * 600, "9 " + "kg m " * 400,
    "9 m/(" * 400, "9 " + "a" * 2000, "9 __import__", "x < " * 500, "1 = " * 500, "x or " * 400, "9 hundred " * 200,
    "1e999 m", "9 m" + "²" * 300, "9 eval('1') m", "9 µ" * 500, "9 \\begin{pmatrix}" + "1&" * 900, "1 ≈ " * 400,
    "not " * 500 + "1", "three " * 300, "1" + " " * 1000 + "1", "-" * 1500 + "1", "1" + ",111" * 500, "1 or " * 500,
]  # fmt: skip


@pytest.mark.parametrize("attack", range(len(ATTACKS)))
def test_hostile_answers_are_wrong_and_cheap(attack):
    started = time.perf_counter()
    for kind in KINDS:
        choices = ("1", "2") if kind == "choice" else None
        for completion in (ATTACKS[attack], answer(ATTACKS[attack]), rf"\boxed{{{ATTACKS[attack]}}}"):
            verdict = check(completion, "1", kind, choices)
            assert not verdict.correct and verdict.status != "error"
    assert time.perf_counter() - started < 30  # a guard against hanging, not a measurement


ALPHABET = st.sampled_from(
    [
        *"{}\\()[]$^_!,.:/*+-=% 0123456789abexAB",
        "<answer>",
        "</answer>",
        r"\boxed{",
        r"\frac",
        "½",
        "²",
        "٣",
        "İ",
        "\u200b",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(ALPHABET, max_size=40).map("".join), st.sampled_from(KINDS))
def test_check_never_raises(text, kind):
    for completion in (text, answer(text)):
        assert check(completion, "12", kind, ("12", "13")).status != "error"


# ---------------------------------------------------------------- the worker


@pytest.fixture
def worker():
    worker = math_worker.Worker()
    yield worker
    worker.kill()


def test_a_comparison_that_hangs_is_killed_and_the_next_one_works(worker, monkeypatch):
    monkeypatch.setattr(math_worker, "DEADLINE", 30.0)
    assert worker.equal("x+1", "1+x") == (True, "ok")
    first = worker.process.pid
    worker.process.send_signal(signal.SIGSTOP)  # as one that computes for ever: it does not answer
    monkeypatch.setattr(math_worker, "DEADLINE", 0.1)
    assert worker.equal("x+2", "2+x") == (False, "timeout")
    assert worker.process is None
    monkeypatch.setattr(math_worker, "DEADLINE", 30.0)
    assert worker.equal("x+3", "3+x") == (True, "ok")
    assert worker.process.pid != first


def test_a_worker_that_dies_is_replaced(worker, monkeypatch):
    monkeypatch.setattr(math_worker, "DEADLINE", 30.0)
    assert worker.equal("y+1", "1+y") == (True, "ok")
    worker.process.kill()
    worker.process.wait()
    assert worker.equal("y+2", "2+y") == (True, "ok")


def test_after_some_timeouts_no_more_is_tried(worker, monkeypatch):
    worker.timeouts = math_worker.MOST_TIMEOUTS
    assert worker.equal("x+1", "1+x") == (False, "timeout")
    assert worker.process is None, "it was not even started"


def test_verdicts_are_remembered(worker, monkeypatch):
    monkeypatch.setattr(math_worker, "DEADLINE", 30.0)
    worker.equal("z+1", "1+z")
    worker.kill()
    assert worker.equal("z+1", "1+z") == (True, "ok") and worker.process is None


def test_comparison_works_off_the_main_thread():
    """math-verify's own time limits are alarms, which fail there: everything would score 0, in silence."""
    found = []
    thread = threading.Thread(target=lambda: found.append(check(r"\boxed{(a+1)^2}", "a^2+2a+1", "math")))
    thread.start()
    thread.join(60)
    assert found[0].correct


def test_the_worker_needs_nothing_of_the_training_program():
    source = Path(math_worker.__file__).read_text()
    assert "import torch" not in source and "from common" not in source


def test_kinds_of_the_puzzles_never_start_the_worker(monkeypatch):
    monkeypatch.setattr(math_worker.Worker, "start", lambda self: pytest.fail("the worker was started"))
    for kind, right in (("int", "12"), ("exact", "red"), ("yesno", "yes")):
        assert check(answer(right), right, kind).correct
    assert json.dumps(check(answer("x"), "12", "int").status)
