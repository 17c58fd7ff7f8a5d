"""Examples (images, question, answer) from the built-in puzzles, a local file or folder, or a hub data set.

Rows are checked when a set is loaded and images are decoded when an example is drawn, so that a large set's pixels
never lie in memory. A row that cannot be used is left out, counted and reported; more than 1 % of them stop the run.
Of a large set a run that draws only few examples reads only so many, as a stream.

Columns that are read of a file, a folder or a hub set; all but question and answer may be missing:

| column | holds |
| --- | --- |
| `problem`, `question`, `prompt`, `query` (`--question-column`) | the question; `<image>` or `<image 2>` mark places |
| `answer`, `solution`, `label`, `ground_truth` (`--answer-column`) | the answer, also in `\\boxed{}` or `<answer>` |
| `images`, `decoded_image`, `image`, `image_path`, `file_name` (`--image-column`) | one picture or a list: pixels, \
bytes, base64 text, or paths beneath the set's folder (`--image-root`) |
| `kind` (`--kind`) | how the answer is checked: int, math, float3, rounded, relaxed, letter, letters, choice, time, \
yesno, exact |
| `choices`, `options` | the options, a list; where there is none, those that the question lists behind (A), B. or C: |
| `group`, `category`, `subject` | what accuracy is also reported for |
| `id` | a name for the row (else its number from 0) |

Of a name in two spellings the first is taken. A row without `kind` is of kind `choice` where the answer is one of the
options' texts, `letter` where it is one of their letters, else `math`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image

from common.data.images import hub_caches, one_line, open_image
from common.data.puzzles import SPLITS, ask, hint, puzzle
from common.data.sets import SOURCES, Readable, likely_kind, options_in, read_choices
from common.rewards.answers import KINDS, prepare_gold

# Where data sets keep what; the first of these that a set has is taken.
IMAGE_COLUMNS = ("images", "decoded_image", "image", "image_path", "file_name")
QUESTION_COLUMNS = ("problem", "question", "prompt", "query")
ANSWER_COLUMNS = ("answer", "solution", "label", "ground_truth")
PUZZLE_COUNT = {"train": 1_000_000, "validation": 2_000, "test": 2_000, "shifted": 2_000}
LARGE = 20_000  # rows of a set that is worth a stream
SMALL = 1_000  # rows of a set whose pictures are all decoded at the start
SHUFFLED_ROWS = 1_000  # among which a stream draws the next
T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """One question about some pictures. `question` holds an `<image>` marker for each picture."""

    images: tuple[Image.Image, ...]
    question: str
    answer: str
    kind: str = "math"
    """how an answer is checked; see `common.rewards.answers.check`"""
    choices: tuple[str, ...] | None = None
    group: str = ""
    """puzzle family or subject: accuracy is reported for each"""
    id: str = ""


def load_examples(
    data: str,
    split: str = "train",
    *,
    image_column: str = "",
    question_column: str = "",
    answer_column: str = "",
    kind: str = "",
    image_root: str = "",
    limit: int | None = None,
    max_bad: float = 0.01,
    draws: int | None = None,
    seed: int = 0,
) -> Sequence[Example]:
    """Examples of a split: `puzzles`, or `puzzles:hint=75`, whose questions carry a hint that is right in 75 % (0: it
    always misleads); a short name of data/sets.py, `=FOLDER` behind it where a folder holds the set;
    a .jsonl or .parquet file; a folder with metadata.jsonl, metadata.parquet or a data set of its own; or a hub id.
    `@config` behind a folder or an id names one of its configurations.

    A file has no splits: it serves as any, and says so, unless files named after splits lie in a folder. Pictures are
    read from beneath the set's folder only, or from beneath `image_root`, which paths are then relative to.
    `limit` takes the first so many usable rows; `max_bad` is the share of unusable ones that is put up with. `draws`
    says how many examples will be drawn: where that is less than a quarter of a large set, only so many of its rows
    are read, as a stream in an order drawn from `seed`.

    Raises:
        SystemExit: one line, when the data is not there, columns are missing, or too many rows cannot be used.
    """
    if kind and kind not in KINDS:
        raise SystemExit(f"--kind {kind}: choose one of {', '.join(KINDS)}")
    if image_root and not Path(image_root).is_dir():
        raise SystemExit(f"--image-root {image_root}: no such folder")
    if data.split(":")[0] == "puzzles":
        dial = re.fullmatch(r"puzzles(?::hint=(100|\d{1,2}))?", data)
        if not dial:
            raise SystemExit(f"--data {data}: must be puzzles, or puzzles:hint=N with N from 0 to 100")
        if split not in SPLITS:
            raise SystemExit(f"--data {data} has no split {split!r}: choose one of {', '.join(SPLITS)}")
        hint_right = int(dial[1]) / 100 if dial[1] else None
        return Puzzles(split, min(limit or PUZZLE_COUNT[split], PUZZLE_COUNT[split]), hint_right)
    if data.split("=")[0] in SOURCES:
        rows, root = open_source(data, split, draws, seed)
        columns = {"image": "images", "question": "question", "answer": "answer"}
        return Rows(data, rows, Path(image_root) if image_root else root, columns, kind, limit, max_bad)
    data, rows, root = open_rows(data, split, draws, seed)
    if not len(rows):
        raise SystemExit(f"--data {data}: no rows")
    names = list(dict.fromkeys(key for row in rows for key in row)) if isinstance(rows, list) else rows.column_names
    columns = {
        "image": find_column(data, names, "image", image_column, IMAGE_COLUMNS, required=False),
        "question": find_column(data, names, "question", question_column, QUESTION_COLUMNS),
        "answer": find_column(data, names, "answer", answer_column, ANSWER_COLUMNS),
    }
    return Rows(data, rows, Path(image_root) if image_root else root, columns, kind, limit, max_bad)


@dataclass(frozen=True)
class Puzzles(Sequence):
    """The first `count` built-in puzzles of a split; with `hint_right` their questions carry a hint, which is right for
    that share."""

    split: str
    count: int
    hint_right: float | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.count:
            raise IndexError(index)
        p = puzzle(self.split, index)
        question = ask(p, "" if self.hint_right is None else hint(p, self.hint_right))
        return Example((p.image,), f"<image>{question}", p.answer, p.kind, None, p.family, f"{self.split}/{index}")


@dataclass
class Rows(Sequence):
    """The usable rows of a table. Text, answers and what shows without decoding an image are checked at once.

    `sizes` holds the area of each example's images in pixels, by which an evaluation sorts them, `shapes` the width and
    height of each image, and `text_bytes` the length of each question.
    """

    name: str
    rows: Sequence[dict]
    root: Path
    columns: dict[str, str]
    kind: str
    limit: int | None
    max_bad: float

    def __post_init__(self):
        self.usable, self.shapes, self.text_bytes, self.bad = [], [], [], {}
        # In a small set one broken picture is a large share: it must not come to light in the middle of training.
        decode = len(self.rows) <= SMALL
        for number in range(len(self.rows)):
            try:
                example = self.read(number, pixels=decode)
                self.shapes.append([image.size for image in example.images])
                self.text_bytes.append(len(example.question.encode()))
                self.usable.append(number)
            except ValueError as error:
                self.bad[number] = str(error)
            if self.limit and len(self.usable) == self.limit:
                break
        if self.bad:
            self.report()

    @property
    def sizes(self) -> list[int]:
        return [sum(width * height for width, height in shapes) for shapes in self.shapes]

    def keep(self, places: list[int]) -> None:
        """Leave out all examples but those."""
        self.usable, self.shapes, self.text_bytes = (
            [values[place] for place in places] for values in (self.usable, self.shapes, self.text_bytes)
        )

    def report(self) -> None:
        """Say which rows are left out; stop where they are too many."""
        checked = max([*self.bad, *self.usable]) + 1
        named = "; ".join(f"row {number}: {reason}" for number, reason in list(self.bad.items())[:3])
        counted = f"--data {self.name}: {len(self.bad)} of {checked} rows cannot be used: {named} (counted from row 0)"
        if len(self.bad) > self.max_bad * checked or len(self.bad) == checked:
            raise SystemExit(f"{counted}; that is too many: mend or remove them")
        print(counted, flush=True)

    def __len__(self) -> int:
        return len(self.usable)

    def __getitem__(self, index: int) -> Example:
        """Example `index`; if its image turns out to be broken only now, the next sound one stands in, the same on
        every draw, and the row is reported."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        while True:
            number = self.usable[index]
            try:
                return self.read(number)
            except ValueError as error:
                if number not in self.bad:
                    self.bad[number] = str(error)
                    self.report()
            index = (index + 1) % len(self)

    def read(self, number: int, pixels: bool = True) -> Example:
        """One row as an example. Raises ValueError, a line that says what is wrong with it."""
        row = self.rows[number]
        stored = row.get(self.columns["image"])
        stored = [] if stored is None else stored if isinstance(stored, list) else [stored]
        asked = row.get(self.columns["question"])
        if isinstance(asked, list | dict):
            raise ValueError(f"the question is a {type(asked).__name__} ({str(asked)[:60]}); write it as one text")
        question = str(asked or "").strip()
        if not question:
            raise ValueError("no question")
        if token := re.search(r"<\|\w+\|>", question):
            raise ValueError(f"the question holds {token[0]}, which models read as a token of their own")
        images = tuple(open_image(item, self.root, pixels) for item in stored)
        question, images = place_images(question, images)
        kind, answer = self.kind or row.get("kind") or "", row.get(self.columns["answer"])
        choices = read_choices(row.get("choices") or row.get("options"))
        if not choices and kind in ("", "choice"):
            choices = options_in(question)
        if not kind:
            kind = likely_kind(answer, choices)
            choices = choices if kind != "math" else None
        answer = prepare_gold(answer, kind, choices)
        group = str(row.get("group") or row.get("category") or row.get("subject") or "")
        name = row.get("id")
        return Example(images, question, answer, kind, choices, group, str(number if name is None else name))


def open_rows(data: str, split: str, draws: int | None = None, seed: int = 0) -> tuple[str, Sequence[dict], Path]:
    """The file or set that `data` stands for, its table, and the folder that image paths in it are relative to."""
    stream = {"draws": draws, "seed": seed}
    files = (f"{split}.jsonl", f"{split}.parquet", "metadata.jsonl", "metadata.parquet")
    path = next((Path(data) / name for name in files if (Path(data) / name).is_file()), Path(data))
    if path.suffix in (".jsonl", ".parquet") and path.is_file():
        if path.stem != split and split != "train":
            print(
                f"--data {path}: a file has no splits; all of it serves as {split!r}, also what is trained on (a "
                "folder with train.jsonl and test.jsonl keeps them apart)",
                flush=True,
            )
        if path.suffix == ".jsonl":
            return str(path), read_jsonl(path), path.parent
        return str(path), load_table(str(path), "parquet", "train", data_files=str(path)), path.parent
    name, config = (data, None) if path.exists() or "@" not in data else data.rsplit("@", 1)
    if Path(name).is_dir():
        return data, load_table(data, name, split, config, **stream), Path(name)
    if Path(name).suffix in (".jsonl", ".parquet") or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise SystemExit(f"--data {data}: no such .jsonl or .parquet file or folder, nor a hub id owner/name")
    return data, load_table(data, name, split, config, hub=True, **stream), hub_caches()[0]


def open_source(data: str, split: str, draws: int | None = None, seed: int = 0) -> tuple[Readable, Path]:
    """The rows of a set of common/data/sets.py, and the folder that image paths in it are relative to."""
    name, _, folder = data.partition("=")
    source = SOURCES[name]
    if folder and not Path(folder).is_dir():
        raise SystemExit(f"--data {data}: no such folder")
    if source.unpacked and not folder:
        raise SystemExit(
            f"--data {name}: its pictures are in {source.unpacked}; run `hf download {source.ids[0]} --repo-type "
            f"dataset --local-dir DIR`, unpack {source.unpacked} in DIR and pass --data {name}=DIR"
        )
    own = {"train": source.train, "validation": source.validation}.get(split)
    splits = own or source.test or source.train or ("",)
    if split not in (*splits, "train"):
        print(f"--data {name}: {split!r} is its {' and '.join(splits) or 'only split'}", flush=True)
    # Where the hub cannot be asked the first will do; where it has none of them, loading the first says so.
    place = folder or next((name for name in source.ids if hub_has(name) is not False), source.ids[0])
    options = {"data_files": str(Path(folder) / source.file)} if source.file else {}
    options |= {"draws": draws, "seed": seed, "rows": source.rows} if source.rows else {}
    tables = [
        load_table(data, "parquet" if source.file else place, part, config, hub=not folder, **options)
        for config in source.configs
        for part in splits
    ]
    rows = Readable(tables, source.read)
    if rows.left_out:
        left_out = (
            f"{rows.left_out} {source.judge or 'rows'} are left out, since only a language model could judge them"
        )
        print(f"--data {name}: {left_out}", flush=True)
    if not len(rows):
        raise SystemExit(f"--data {data}: no rows")
    return rows, Path(folder) if folder else hub_caches()[0]


def read_jsonl(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):  # str.splitlines cuts at more than line ends
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # not UTF-8, not JSON
                raise SystemExit(f"--data {path}: line {number} is not a JSON object: {error}") from None
            if not isinstance(row, dict):
                raise SystemExit(f"--data {path}: line {number} is not a JSON object: it is a {type(row).__name__}")
            rows.append(row)
    return rows


def load_table(
    data: str,
    name: str,
    split: str,
    config: str | None = None,
    hub: bool = False,
    draws: int | None = None,
    seed: int = 0,
    rows: int = 0,
    **files,
) -> Sequence[dict]:
    """A `datasets` table whose images stay encoded until they are drawn; or, as a list, the `draws` rows of a large
    one. `rows` is the split's size, where it is known."""
    import datasets

    if hub and not datasets.config.HF_HUB_OFFLINE and hub_has(name) is None:
        datasets.config.HF_HUB_OFFLINE = True  # the cache is asked at once, without half a minute of trying the hub
    try:
        if Path(name, "dataset_info.json").is_file() or Path(name, "dataset_dict.json").is_file():
            table = datasets.load_from_disk(name)  # as `save_to_disk` leaves a set
            table = table[split or next(iter(table))] if isinstance(table, dict) else table
        else:
            if draws and not rows:
                stated = datasets.load_dataset_builder(name, config, **files).info.splits or {}
                rows = stated[split].num_examples if split in stated else 0
            # What was downloaded before is there as a whole only.
            stream = bool(draws) and rows >= max(LARGE, 4 * draws) and not (hub and datasets.config.HF_HUB_OFFLINE)
            table = datasets.load_dataset(name, config, split=split or None, streaming=stream, **files)
            table = next(iter(table.values())) if isinstance(table, dict) else table  # its only split
            if stream:
                table = table.decode(False) if table.features else table
                print(f"--data {data}: a large set; {draws:,} of its {rows:,} rows are read, by --seed", flush=True)
                return list(table.shuffle(seed=seed, buffer_size=SHUFFLED_ROWS).take(draws))
    except Exception as error:  # of the many that readers of files raise, each is a line for the user
        line = f"--data {data}: split {split!r} cannot be loaded ({one_line(error)})"
        if hub and datasets.config.HF_HUB_OFFLINE:
            folder = f"{data}=DIR" if data in SOURCES else f"DIR@{config}" if config else "DIR"
            line += (
                f"; where there is a network, run `hf download {name} --repo-type dataset --local-dir DIR` and pass "
                f"--data {folder}"
            )
        elif Path(name).is_dir() and data not in SOURCES:
            held = sorted(path.name for path in Path(name).iterdir() if path.suffix in (".jsonl", ".parquet"))
            if held and not any(split in file for file in held):
                line = (
                    f"--data {data}: no {split}.jsonl or {split}.parquet beside {', '.join(held[:6])}; add one, or "
                    "name a split that is there by --train-split, --eval-split or --test-split"
                )
        raise SystemExit(line) from None
    encoded = {}
    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            feature = datasets.Image(decode=False)
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            feature = datasets.List(datasets.Image(decode=False))
        encoded[column] = feature
    # Said, not cast: the stored columns are the same, and a cast would write a copy of the whole set beside it.
    table.info.features = datasets.Features(encoded)
    return table


def hub_has(name: str) -> bool | None:
    """Whether the hub has a data set of that id; None where it cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        HfApi().dataset_info(name, timeout=10)
    except HfHubHTTPError as error:
        # A gated set counts as not found, but is there. Of any other refusal loading will say why.
        return isinstance(error, GatedRepoError) or not isinstance(error, RepositoryNotFoundError)
    except Exception:  # whatever the network's layers raise
        return None
    return True


def find_column(data: str, names: list[str], what: str, given: str, usual: tuple[str, ...], required=True) -> str:
    if given and given not in names:
        raise SystemExit(f"--{what}-column {given}: {data} has the columns {', '.join(names)}")
    found = given or next((name for name in usual if name in names), "")
    if not found and required:
        raise SystemExit(f"--data {data}: no {what} column; pass --{what}-column, one of {', '.join(names)}")
    return found


def place_images(question: str, images: tuple) -> tuple[str, tuple]:
    """The question with one `<image>` a picture and the pictures in the markers' order. Pictures that no marker names
    come first; numbered markers (`<image1>`, `<image 2>`) name theirs, in any order.

    >>> place_images("Is <image 2> left of <image 1>?", ("a", "b", "c"))
    ('<image>Is <image> left of <image>?', ('c', 'b', 'a'))
    """
    markers = re.findall(r"<image ?(\d*)>", question)
    if any(markers):
        if not all(m and 1 <= int(m) <= len(images) for m in markers):
            raise ValueError(
                f"image markers numbered {', '.join(m or 'not' for m in markers)} for {len(images)} images"
            )
        numbers = [int(m) - 1 for m in markers]
        images = (*(i for n, i in enumerate(images) if n not in numbers), *(images[n] for n in numbers))
        question = re.sub(r"<image ?\d+>", "<image>", question)
    if len(markers) > len(images):
        raise ValueError(f"{len(markers)} image markers for {len(images)} images")
    return "<image>" * (len(images) - len(markers)) + question, images
