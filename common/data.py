"""Examples (images, question, answer) from the built-in puzzles, a local file or folder, or a hub data set.

Rows are checked when a set is loaded and images are decoded when an example is drawn, so that a large set never lies
in memory. A row that cannot be used is skipped, counted and reported; more than one in a hundred stop the run.
"""

import base64
import io
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from common.puzzles import SPLITS, puzzle
from common.rewards import prepare_gold

REQUEST = "Think between <think> and </think>, then give only the final answer between <answer> and </answer>."
TEMPLATE = "{question}\n\n{request}"
# Where data sets keep what; the first of these that a set has is taken.
IMAGE_COLUMNS = ("images", "image", "decoded_image", "image_path", "file_name")
QUESTION_COLUMNS = ("problem", "question", "prompt", "query")
ANSWER_COLUMNS = ("answer", "solution", "label", "ground_truth")
PUZZLE_COUNT = {"train": 1_000_000, "validation": 2_000, "test": 2_000, "shifted": 2_000}
MAX_ASPECT_RATIO = 200  # what the families' image processors accept
MAX_IMAGE_PIXELS = 100_000_000  # beyond it a small file that unpacks to gigabytes is likelier than a photograph
MOST_BAD_ROWS = 0.01


@dataclass(frozen=True)
class Example:
    """One question about some pictures. `question` holds an `<image>` marker for each picture."""

    images: tuple[Image.Image, ...]
    question: str
    answer: str
    kind: str = "math"
    """how an answer is checked; see `common.rewards.check`"""
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
    limit: int | None = None,
) -> Sequence[Example]:
    """Examples of a split: `puzzles`; a .jsonl or .parquet file; a folder with metadata.jsonl, metadata.parquet or a
    data set of its own; or a hub id, `id@config` where it has configurations.

    A local file is its own only split, whatever `split` says, unless files named after splits lie in a folder.
    `limit` takes the first so many usable rows.

    Raises:
        SystemExit: one line, when the data is not there, columns are missing, or too many rows cannot be used.
    """
    if data == "puzzles":
        if split not in SPLITS:
            raise SystemExit(f"--data puzzles has no split {split!r}: choose one of {', '.join(SPLITS)}")
        return Puzzles(split, min(limit or PUZZLE_COUNT[split], PUZZLE_COUNT[split]))
    rows, root = open_rows(data, split)
    columns = {
        "image": find_column(data, rows, "image", image_column, IMAGE_COLUMNS, required=False),
        "question": find_column(data, rows, "question", question_column, QUESTION_COLUMNS),
        "answer": find_column(data, rows, "answer", answer_column, ANSWER_COLUMNS),
    }
    return Rows(data, rows, root, columns, kind, limit)


@dataclass(frozen=True)
class Puzzles(Sequence):
    """The first `count` built-in puzzles of a split."""

    split: str
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.count:
            raise IndexError(index)
        p = puzzle(self.split, index)
        return Example((p.image,), f"<image>{p.question}", p.answer, p.kind, None, p.family, f"{self.split}/{index}")


class Rows(Sequence):
    """The usable rows of a table. Text, answers and image headers are checked at once, pixels when a row is drawn."""

    def __init__(self, name, rows, root: Path | None, columns: dict[str, str], kind: str, limit: int | None):
        self.rows, self.root, self.columns, self.kind = rows, root, columns, kind
        self.usable, bad = [], []
        for number in range(len(rows)):
            try:
                self.read(number, pixels=False)
                self.usable.append(number)
            except (ValueError, OSError, TypeError, Image.DecompressionBombError) as error:
                bad.append(f"row {number}: {str(error).splitlines()[0]}")
            if limit and len(self.usable) == limit:
                break
        if bad:
            print(f"--data {name}: {len(bad)} of {len(rows)} rows left out; {'; '.join(bad[:3])}", flush=True)
        if len(bad) > MOST_BAD_ROWS * (len(bad) + len(self.usable)):
            raise SystemExit(
                f"--data {name}: {len(bad)} of {len(bad) + len(self.usable)} rows cannot be used: {'; '.join(bad[:3])}"
            )
        if not self.usable:
            raise SystemExit(f"--data {name}: no rows")

    def __len__(self) -> int:
        return len(self.usable)

    def __getitem__(self, index: int) -> Example:
        return self.read(self.usable[index])

    def read(self, number: int, pixels: bool = True) -> Example:
        """One row as an example.

        Raises:
            ValueError: a line that says what is wrong with it.
        """
        row = self.rows[number]
        stored = row.get(self.columns["image"]) if self.columns["image"] else None
        stored = [] if stored is None else stored if isinstance(stored, list) else [stored]
        images = tuple(open_image(item, self.root, pixels) for item in stored)
        question = str(row[self.columns["question"]] or "").strip()
        if not question:
            raise ValueError("no question")
        question = mark_images(question, len(images))
        choices = row.get("choices") or row.get("options") or None
        choices = tuple(map(str, choices)) if isinstance(choices, list) else None
        kind = self.kind or row.get("kind") or "math"
        answer = prepare_gold(row[self.columns["answer"]], kind, choices)
        group = str(row.get("group") or row.get("category") or row.get("subject") or "")
        return Example(images, question, answer, kind, choices, group, str(row.get("id", number)))


def open_rows(data: str, split: str):
    """A table with random access and the folder that its image paths are relative to."""
    path = Path(data)
    if path.suffix == ".jsonl" and path.is_file():
        return read_jsonl(path), path.parent
    if path.suffix == ".parquet" and path.is_file():
        return hub_rows(data, "parquet", "train", data_files=str(path)), path.parent
    if path.is_dir():
        for name in (f"{split}.jsonl", f"{split}.parquet", "metadata.jsonl", "metadata.parquet"):
            if (path / name).is_file():
                return open_rows(str(path / name), split)
        return hub_rows(data, str(path), split), path
    if path.suffix or not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.() -]+)?", data):
        raise SystemExit(f"--data {data}: no such file or folder, and not a hub id of the form owner/name")
    name, _, config = data.partition("@")
    return hub_rows(data, name, split, config or None), None


def read_jsonl(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise SystemExit(f"--data {path}: line {number} is not JSON: {error.msg}") from None
    return rows


def hub_rows(data: str, name: str, split: str, config: str | None = None, **files):
    """A `datasets` table whose images stay encoded until they are drawn."""
    from datasets import Features, List, load_dataset
    from datasets import Image as HubImage

    try:
        table = load_dataset(name, config, split=split, **files)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SystemExit(
            f"--data {data}: split {split!r} cannot be loaded ({reason}); without a network, fetch the set where "
            f"there is one with `hf download {name} --repo-type dataset --local-dir DIR` and pass --data DIR"
        ) from None
    encoded = {}
    for column, feature in table.features.items():
        if isinstance(feature, HubImage):
            feature = HubImage(decode=False)
        elif isinstance(feature, List) and isinstance(feature.feature, HubImage):
            feature = List(HubImage(decode=False))
        encoded[column] = feature
    return table.cast(Features(encoded)) if encoded != dict(table.features) else table


def find_column(data: str, rows, what: str, given: str, usual: tuple[str, ...], required: bool = True) -> str:
    names = list(rows[0]) if len(rows) else []
    if given and given not in names:
        raise SystemExit(f"--{what}-column {given}: {data} has the columns {', '.join(names)}")
    found = given or next((name for name in usual if name in names), "")
    if not found and required:
        raise SystemExit(f"--data {data}: no {what} column; pass --{what}-column, one of {', '.join(names)}")
    return found


def open_image(stored, root: Path | None, pixels: bool = True) -> Image.Image:
    """A picture as data sets hold them: decoded, bytes, {bytes, path}, a path, base64 text.

    With `pixels` false only the header is read. Raises ValueError or OSError where that is not a usable picture.
    """
    if isinstance(stored, dict):
        stored = stored.get("bytes") or stored.get("path")
    if isinstance(stored, Image.Image):
        image = stored
    elif isinstance(stored, bytes):
        image = Image.open(io.BytesIO(stored))
    elif isinstance(stored, str) and stored:
        path = (root or Path()) / stored
        if len(stored) < 1024 and path.is_file():
            image = Image.open(path)
        elif len(stored) < 64:
            raise ValueError(f"no image file {stored!r}")
        else:
            image = Image.open(io.BytesIO(base64.b64decode(stored.partition("base64,")[2] or stored, validate=True)))
    else:
        raise ValueError(f"no image in a value of type {type(stored).__name__}")
    width, height = image.size
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(f"an image of {width} x {height} pixels is more than {MAX_ASPECT_RATIO} times as long as wide")
    if width * height > MAX_IMAGE_PIXELS:
        raise ValueError(f"an image of {width} x {height} pixels is larger than {MAX_IMAGE_PIXELS:,} pixels")
    return to_rgb(image) if pixels else image


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, upright, transparency on white; of an animation the first frame. Raises OSError where data is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # broken EXIF data does not make a picture unusable
        image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode.startswith(("I", "F")):  # 16 bits and more: PIL would cut them off at 255
        values = np.asarray(image, dtype=np.float64)
        image = Image.fromarray((255 * values / max(values.max(), 1)).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def mark_images(question: str, images: int) -> str:
    """The question with one `<image>` a picture: other ways to write the marker are unified, missing ones prepended."""
    question = re.sub(r"<image ?\d+>", "<image>", question)
    markers = question.count("<image>")
    if markers > images:
        raise ValueError(f"{markers} image markers for {images} images")
    return "<image>" * (images - markers) + question


def build_messages(example: Example, template: str = TEMPLATE) -> list[dict]:
    """The conversation that the model reads: one user message, pictures where the markers stand.

    >>> build_messages(Example((), "How many?", "3"), "{question} Be brief.")
    [{'role': 'user', 'content': [{'type': 'text', 'text': 'How many? Be brief.'}]}]
    """
    text = template.replace("{request}", REQUEST).replace("{question}", example.question)
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
        SystemExit: it has no place for the question.
    """
    template = template.replace("\\n", "\n")
    if "{question}" not in template:
        raise SystemExit(f"--prompt-template {template!r}: must contain {{question}}")
    return template


def batch_indices(seed: int, step: int, size: int, length: int) -> list[int]:
    """Which examples step `step` draws: a pure function, so that a resumed run goes on where it stopped.

    Steps walk through one random order of the set after another; within an epoch no example comes twice. A batch that
    reaches over the end of an epoch takes its rest from the next.
    """
    indices, position = [], step * size
    while len(indices) < size:
        epoch, start = divmod(position + len(indices), length)
        order = np.random.default_rng([seed, epoch]).permutation(length)
        indices += order[start : start + size - len(indices)].tolist()
    return indices
