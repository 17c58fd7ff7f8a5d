"""Public data sets and benchmarks by short name: where they lie, which column holds what, how answers are checked.

`--data mathvista` loads it from the hub; `--data mathvista=FOLDER` reads a folder that holds the same files, as
`hf download ID --repo-type dataset --local-dir FOLDER` makes it. Every reader below turns one raw row into the same
fields: images, question, answer, kind, choices, group (accuracy is reported for each) and id. A row that only a
language model could judge is left out, and said to be.
"""

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

from common.rewards.answers import prepare_gold

FIXED_QUESTION = "Answer the question in the picture with the letter of the right choice."


@dataclass(frozen=True)
class Source:
    """One row of the table."""

    ids: tuple[str, ...]
    """hub ids; copies of the same data under another owner come behind"""
    read: Callable[[dict], dict | None]
    """a raw row as fields; None: rules cannot judge it"""
    train: tuple[str, ...] = ()
    """splits that serve as `train`"""
    test: tuple[str, ...] = ()
    """splits that serve as any other"""
    validation: tuple[str, ...] = ()
    """splits that serve as `validation`, where the set keeps that apart from its test"""
    configs: tuple[str | None, ...] = (None,)
    """configurations, all of them read"""
    file: str = ""
    """the one file that is the table, where others in the repository must not be read"""
    unpacked: str = ""
    """archive whose unpacked folder must lie beside it, so that only a folder can be read"""
    judge: str = ""
    """what is left out because no rule can judge it"""
    rows: int = 0
    """of a large set: what `train` holds, of which a short run reads only a part"""


# ------------------------------------------------------------------------------------------------- pieces of readers


def unwrap(answer) -> str:
    """A gold answer without `\\boxed{}` or `<answer>` around all of it."""
    text = str(answer).strip()
    if tagged := re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL):
        text = tagged[-1].strip()
    return text[7:-1].strip() if text.startswith("\\boxed{") and text.endswith("}") else text


def kind_of(answer) -> str:
    """`letter` for a single capital letter, else `math`."""
    return "letter" if re.fullmatch(r"\(?[A-Z]\)?", unwrap(answer)) else "math"


def options(value) -> list[str]:
    """Options as data sets hold them: a list, or the text of a Python list."""
    if isinstance(value, str):
        value = ast.literal_eval(value) if value.strip().startswith("[") else []
    return [str(option) for option in value or []]


def read_choices(stored) -> tuple[str, ...] | None:
    """The options of a row: a list, also as text, or a text of the form `A. red B. blue`.

    Raises:
        ValueError: one line, where they are neither.
    """
    if not stored:
        return None
    try:
        nested = isinstance(stored, list) and any(isinstance(option, list | dict) for option in stored)
        choices = options(stored) if isinstance(stored, str | list) and not nested else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # Python's own of a text that is no list
        choices = None
    choices = choices or (options_in(stored) if isinstance(stored, str) else None)
    if not choices:
        raise ValueError(f"the options must be a list of texts, not {str(stored)[:60]!r}")
    return tuple(choices)


def options_in(question: str) -> tuple[str, ...] | None:
    """The options that a question lists behind (A), A., A) or A:, from A on, each up to the next or to the line's end.

    >>> options_in("Which colour?\\n(A) red\\n(B) dark blue")
    ('red', 'dark blue')
    """
    markers = list(re.finditer(r"(?<!\S)(?:\(([A-J])\)|([A-J])[.):])(?=\s*\S)", question))
    starts = [n for n, marker in enumerate(markers) if (marker[1] or marker[2]) == "A"]
    found = markers[starts[-1] :] if starts else []
    found = [marker for n, marker in enumerate(found) if (marker[1] or marker[2]) == chr(ord("A") + n)]
    ends = [*(marker.start() for marker in found[1:]), len(question)][: len(found)]
    texts = [question[marker.end() : end].strip() for marker, end in zip(found, ends, strict=True)]
    texts = [text.split("\n")[0].rstrip(" ,;") for text in texts]
    return tuple(texts) if len(texts) > 1 and all(texts) else None


def likely_kind(answer, choices: Sequence[str] | None) -> str:
    """How the answer of a row that does not say so is checked: `choice`, `letter` or `math`."""
    for kind in ("choice", "letter") if choices else ():
        try:
            gold = prepare_gold(answer, kind, choices)
        except ValueError:
            continue
        if kind == "choice" or re.fullmatch(r"\(?[A-J]\)?", gold):
            return kind
    return "math"


def lettered(question: str, choices: Sequence[str]) -> str:
    """The question with its options below it, a letter each.

    >>> lettered("Which?", ["red", "blue"])
    'Which?\\n(A) red\\n(B) blue'
    """
    return "\n".join([question, *(f"({chr(ord('A') + n)}) {choice}" for n, choice in enumerate(choices))])


def numbered_images(row: dict, text: str, most: int) -> tuple[list, str]:
    """Columns image_1, image_2, ... that the text names (all, where it names none); the text with them renumbered."""
    named = {int(n) for n in re.findall(r"<image (\d+)>", text)}
    held = [n for n in range(1, most + 1) if row.get(f"image_{n}") is not None and (not named or n in named)]
    if missing := named - set(held):
        raise ValueError(f"the text names image {min(missing)}, which is not there")
    text = re.sub(r"<image (\d+)>", lambda m: f"<image {held.index(int(m[1])) + 1}>", text)
    return [row[f"image_{n}"] for n in held], text


def fields(images, question, answer, kind, choices=None, group="", id=None) -> dict:
    images = images if isinstance(images, list) else [images]
    images = [image for image in images if image is not None and image != ""]
    return dict(images=images, question=question, answer=answer, kind=kind, choices=choices, group=group, id=id)


# ------------------------------------------------------------------------------------------------- readers


def problem_answer(row):
    return fields(row["images"], row["problem"], unwrap(row["answer"]), kind_of(row["answer"]), id=row.get("id"))


def geometry3k(row):
    return fields(row["images"], row["problem"], row["answer"], "math", id=row.get("id"))


def virl39k(row):
    return fields(
        row["image"], row["question"], row["answer"], kind_of(row["answer"]), None, row["category"], row["qid"]
    )


def mmk12(row):
    return fields(row["image"], row["question"], row["answer"], kind_of(row["answer"]), None, row["subject"], row["id"])


def solution(kind: str):
    """Readers of sets whose `solution` holds the answer in a tag."""
    return lambda row: fields(row["image"], row["problem"], unwrap(row["solution"]), kind or kind_of(row["solution"]))


def puzzle_options(row):
    choices = options(row["options"])
    return fields(row["image"], lettered(row["question"], choices), str(row["answer"]), "choice", choices)


def mathvista(row):
    question, choices, answer = row["question"], options(row["choices"]), row["answer"]
    if row.get("unit"):
        question += f" (Unit: {row['unit']})"
    kind = {"integer": "int"}.get(row["answer_type"], "math")
    if row["question_type"] == "multi_choice":
        kind, question = "choice", lettered(question, choices)
    elif row["answer_type"] == "float" and row.get("precision"):
        decimals = int(row["precision"])
        question += f" Round to {decimals} decimals."
        kind, answer = "rounded", f"{float(answer):.{decimals}f}"  # `1.50`: checked to as many decimals as it has
    task = (row.get("metadata") or {}).get("task", "")
    return fields(row["decoded_image"], question, answer, kind, choices or None, task, row["pid"])


def mathverse(row):
    if row["question_type"] != "multi-choice":
        return None
    question = row["question"] or FIXED_QUESTION  # in the version Vision Only all text is in the picture
    version = row["problem_version"]
    return fields(row["image"], question, row["answer"], "letter", None, version, row["sample_index"])


def mathvision(row):
    choices = options(row["options"])
    question = lettered(row["question"], choices) if choices else row["question"]
    kind = "letter" if choices else "math"
    return fields(row["decoded_image"], question, row["answer"], kind, choices or None, str(row["level"]), row["id"])


def wemath(row):
    question = f"{row['question']}\n{row['option']}"
    return fields(row["image_path"], question, row["answer"], "letter", None, row["key"], row["ID"])


def dynamath(row):
    kind = {"float": "float3", "multiple choice": "letter"}.get(row["answer_type"], "exact")
    return fields(row["decoded_image"], row["question"], row["ground_truth"], kind, None, row["subject"], row["id"])


def logicvista(row):
    skill = row["skill"] if isinstance(row["skill"], str) else ", ".join(row["skill"] or [])
    return fields(row["image"], row["question"], row["answer"], "letters", None, skill, row["id"])


def mmmu(row):
    if row.get("question_type", "multiple-choice") != "multiple-choice":
        return None
    choices = options(row["options"])
    images, text = numbered_images(row, lettered(row["question"], choices), 7)
    subject = row.get("subject") or re.sub(r"^[a-z]+_|_\d+$", "", row["id"])
    plain = None if any("<image" in choice for choice in choices) else choices
    return fields(images, text, row["answer"], "letter", plain, subject, row["id"])


def mmmu_pro_vision(row):
    return fields(row["image"], FIXED_QUESTION, row["answer"], "letter", None, row["subject"], row["id"])


def mmstar(row):
    return fields(row["image"], row["question"], row["answer"], "letter", None, row["category"], row["index"])


def hallusion(row):
    name = "/".join(str(row[part]) for part in ("subcategory", "set_id", "figure_id", "question_id"))
    answer = {"0": "no", "1": "yes"}[str(row["gt_answer"])]
    return fields(row["image"], row["question"] + " Answer yes or no.", answer, "yesno", None, row["category"], name)


def realworldqa(row):
    question = re.sub(r"\s*Please answer[^.]*\.?\s*$", "", row["question"])
    return fields(row["image"], question, row["answer"], "letter" if kind_of(row["answer"]) == "letter" else "exact")


def chartqa(row):
    question, answer = row.get("question") or row["query"], row["answer"] if "answer" in row else row["label"][0]
    group = row["type"] if "type" in row else ("human_test", "augmented_test")[row["human_or_machine"]]
    return fields(row["image"], question, answer, "relaxed", None, group)


def blink(row):
    images, _ = numbered_images(row, "", 4)
    return fields(images, row["prompt"], row["answer"], "letter", options(row["choices"]), row["sub_task"], row["idx"])


def vstar(row):
    return fields(row["image"], row["text"], row["label"], "letter", None, row["category"], row["question_id"])


def cvbench(row):
    return fields(row["image"], row["prompt"], row["answer"], "letter", None, row["source"], row["idx"])


BLINK = (
    "Art_Style", "Counting", "Forensic_Detection", "Functional_Correspondence", "IQ_Test", "Jigsaw",
    "Multi-view_Reasoning", "Object_Localization", "Relative_Depth", "Relative_Reflectance",
    "Semantic_Correspondence", "Spatial_Relation", "Visual_Correspondence", "Visual_Similarity",
)  # fmt: skip

SOURCES = {
    # to train on, some with a test split
    "geometry3k": Source(("hiyouga/geometry3k",), geometry3k, ("train",), ("test",), ("validation",)),
    "virl39k": Source(("TIGER-Lab/ViRL39K",), virl39k, ("train",), file="39Krelease.parquet", unpacked="images.zip"),
    "virl39k-vppo": Source(("chamber111/VPPO_ViRL39K_train",), problem_answer, ("train",), rows=38_870),
    "virl39k-papo": Source(("PAPOGalaxy/PAPO_ViRL39K_train",), problem_answer, ("train",), rows=38_870),
    "mmk12": Source(("FanqingM/MMK12",), mmk12, ("train",), ("test",)),
    "open-r1-8k": Source(("lmms-lab/multimodal-open-r1-8k-verified",), solution(""), ("train",)),
    "clevr-count": Source(("leonardPKU/clevr_cogen_a_train",), solution("int"), ("train",), rows=70_000),
    "geoqa": Source(("leonardPKU/GEOQA_R1V_Train_8K",), solution("math"), ("train",)),
    "algopuzzle": Source(("declare-lab/AlgoPuzzleVQA",), puzzle_options),
    "puzzlevqa": Source(("declare-lab/PuzzleVQA",), puzzle_options),
    # to evaluate on
    "mathvista": Source(("AI4Math/MathVista",), mathvista, test=("testmini",)),
    "mathverse": Source(
        ("AI4Math/MathVerse",), mathverse, test=("testmini",), configs=("testmini",), judge="free-form questions"
    ),
    "mathvision": Source(("MathLLMs/MathVision",), mathvision, test=("test",)),
    "wemath": Source(("We-Math/We-Math",), wemath, test=("testmini",)),
    "dynamath": Source(("DynaMath/DynaMath_Sample",), dynamath, test=tuple(f"sample_variant{n}" for n in range(1, 11))),
    "logicvista": Source(("lscpku/LogicVista",), logicvista, test=("test",)),
    "mmmu": Source(("lmms-lab-encoder/MMMU", "lmms-lab/MMMU"), mmmu, ("dev",), ("validation",), judge="open questions"),
    "mmmu-pro": Source(("MMMU/MMMU_Pro",), mmmu, test=("test",), configs=("standard (10 options)",)),
    "mmmu-pro-vision": Source(("MMMU/MMMU_Pro",), mmmu_pro_vision, test=("test",), configs=("vision",)),
    "mmstar": Source(("Lin-Chen/MMStar",), mmstar, test=("val",)),
    "hallusion": Source(("lmms-lab-encoder/HallusionBench", "lmms-lab/HallusionBench"), hallusion, test=("image",)),
    "realworldqa": Source(("xai-org/RealworldQA",), realworldqa, test=("test",)),
    "chartqa": Source(("lmms-lab-encoder/ChartQA", "HuggingFaceM4/ChartQA"), chartqa, test=("test",)),
    "blink": Source(("BLINK-Benchmark/BLINK",), blink, test=("val",), configs=BLINK),
    "vstar": Source(("lmms-lab-encoder/vstar-bench", "lmms-lab/vstar-bench"), vstar, test=("test",)),
    "cvbench": Source(("nyu-visionx/CV-Bench",), cvbench, test=("test",), configs=("2D", "3D")),
}


class Readable(Sequence):
    """The rows of some tables that a reader accepts, as fields, read when they are asked for."""

    def __init__(self, tables: Sequence[Sequence[dict]], read: Callable[[dict], dict | None]):
        self.tables, self.read, self.left_out = tables, read, 0
        self.places = []
        for table, rows in enumerate(tables):
            for number in range(len(rows)):
                try:
                    judged = read(rows[number]) is None
                except (KeyError, ValueError, TypeError, SyntaxError):
                    judged = False  # a row that says why when it is read
                if judged:
                    self.left_out += 1
                else:
                    self.places.append((table, number))
        self.column_names = ["images", "question", "answer"]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict:
        table, number = self.places[index]
        try:
            return self.read(self.tables[table][number])
        except KeyError as error:
            columns = ", ".join(self.tables[table][number])
            raise ValueError(f"no column {error} among {columns}") from None
        except (ValueError, TypeError, SyntaxError) as error:
            raise ValueError(f"not of the set's form: {error}") from None


def special_scores(name: str, rows: Sequence[tuple[str, str, float]]) -> dict[str, float]:
    """What a benchmark reports beside the mean over examples, from each example's (id, group, accuracy).

    mmstar: mean of its categories; cvbench: mean of 2D (mean of ADE20K and COCO) and 3D; hallusion: figures and
    questions all of whose answers are right; dynamath: questions right in every variant; mmmu-pro and others: nothing.
    """

    def groups(key) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for row in rows:
            found.setdefault(key(row), []).append(row[2])
        return found

    by_group = {group: mean(values) for group, values in groups(lambda row: row[1]).items()}
    if name == "mmstar":
        return {"mean of categories": mean(by_group.values())}
    if name == "cvbench" and {"ADE20K", "COCO", "Omni3D"} <= set(by_group):
        flat = (by_group["ADE20K"] + by_group["COCO"]) / 2
        return {"2D": flat, "3D": by_group["Omni3D"], "mean of 2D and 3D": (flat + by_group["Omni3D"]) / 2}
    if name == "hallusion":
        parts = {"figures all right": (0, 1, 2), "questions all right": (0, 1, 3)}
        keys = {title: lambda row, at=at: tuple(row[0].split("/")[i] for i in at) for title, at in parts.items()}
        return {title: mean(min(values) == 1 for values in groups(key).values()) for title, key in keys.items()}
    if name == "dynamath":
        return {"right in every variant": mean(min(v) == 1 for v in groups(lambda row: row[0]).values())}
    return {}
