"""Examples from files, folders and hub-like sets; images of every kind; the order in which they are drawn."""

import base64
import io
import json

import datasets
import numpy as np
import pytest
from PIL import Image

from common.data import (
    REQUEST,
    TEMPLATE,
    Example,
    batch_indices,
    build_messages,
    check_template,
    load_examples,
    open_image,
    to_rgb,
)
from tests.small_models import picture


def png(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "PNG", **options})
    return buffer.getvalue()


def write_jsonl(folder, rows, name="rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_puzzles():
    examples = load_examples("puzzles", "test", limit=7)
    assert len(examples) == 7 and examples[6].group == examples[1].group
    assert examples[0].images[0].size == (128, 128) and examples[0].question.startswith("<image>")
    assert len(load_examples("puzzles", "shifted")) == 2000
    with pytest.raises(SystemExit, match="no split 'dev': choose one of train"):
        load_examples("puzzles", "dev")


def test_jsonl_with_image_paths_beside_it(tmp_path):
    picture(40, 30, 0).save(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "question": "How many?", "answer": "3", "kind": "int", "subject": "counting"},
        {"image": None, "question": "1 + 1?", "answer": 2},
        {"image": ["a.png", "a.png"], "question": "Same? <image 1>", "answer": r"\boxed{yes}", "kind": "exact"},
    ]
    one, two, three = load_examples(write_jsonl(tmp_path, rows))
    assert one.images[0].size == (40, 30) and one.question == "<image>How many?"
    assert (one.answer, one.kind, one.group) == ("3", "int", "counting")
    assert (two.images, two.answer, two.kind) == ((), "2", "math")
    assert len(three.images) == 2 and three.question == "<image>Same? <image>" and three.answer == "yes"


def test_parquet_as_hub_sets_have_it(tmp_path):
    """The schema of geometry3k: a list of images, `<image>` in the problem, a LaTeX answer."""
    rows = [
        {"images": [picture(32, 32, i)], "problem": f"<image>Find x. {i}", "answer": r"2\sqrt{3}"} for i in range(3)
    ]
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "problem": datasets.Value("string"),
            "answer": datasets.Value("string"),
        }
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "train.parquet")
    for data in (str(tmp_path), str(tmp_path / "train.parquet")):
        examples = load_examples(data, "train")
        assert len(examples) == 3 and examples[2].question == "<image>Find x. 2"
        assert np.array_equal(np.asarray(examples[1].images[0]), np.asarray(picture(32, 32, 1)))


def test_columns_can_be_named(tmp_path):
    path = write_jsonl(tmp_path, [{"ask": "1 + 1?", "gold": "2"}])
    with pytest.raises(SystemExit, match="no question column; pass --question-column, one of ask, gold"):
        load_examples(path)
    with pytest.raises(SystemExit, match=r"--answer-column say: .* has the columns ask, gold"):
        load_examples(path, question_column="ask", answer_column="say")
    assert load_examples(path, question_column="ask", answer_column="gold", kind="int")[0].answer == "2"


def test_rows_that_cannot_be_used_are_left_out_counted_and_named(tmp_path, capsys):
    good = {"question": "1 + 1?", "answer": "2"}
    path = write_jsonl(tmp_path, [good] * 150 + [{"question": "?", "answer": None}])
    assert len(load_examples(path)) == 150
    assert "1 of 151 rows left out; row 150: no answer" in capsys.readouterr().out

    (tmp_path / "broken.png").write_bytes(b"no picture")
    bad = [{"image": "broken.png", **good}, {"image": "gone.png", **good}, {**good, "question": "<image>?"}]
    with pytest.raises(SystemExit, match=r"3 of 153 rows cannot be used: row 150: cannot identify") as error:
        load_examples(write_jsonl(tmp_path, [{"image": None, **good}] * 150 + bad))
    assert "row 151: no image file 'gone.png'" in str(error.value)
    assert "row 152: 1 image markers for 0 images" in str(error.value)


def test_what_cannot_be_loaded_says_so_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "bad.jsonl").write_text('{"question": 1}\n{oops\n')
    with pytest.raises(SystemExit, match="line 2 is not JSON"):
        load_examples(str(tmp_path / "bad.jsonl"))
    with pytest.raises(SystemExit, match="no such file or folder"):
        load_examples("nowhere.jsonl")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit, match="hf download hiyouga/geometry3k --repo-type dataset") as error:
        load_examples("hiyouga/geometry3k")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16", "F"])
def test_every_mode_becomes_rgb(mode):
    grey = Image.new("L", (5, 4), 128)
    image = Image.fromarray(np.full((4, 5), 128 * 256, dtype=np.uint16)) if mode == "I;16" else grey.convert(mode)
    assert to_rgb(image).mode == "RGB" and to_rgb(image).size == (5, 4)


def test_transparency_is_white():
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 0)
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)


def test_pictures_are_turned_upright_and_animations_stand_still():
    exif = Image.Exif()
    exif[0x0112] = 6  # lying on its side
    turned = open_image(png(picture(10, 20, 0), format="JPEG", exif=exif), None)
    assert turned.size == (20, 10)
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    moving = png(frames[0], format="GIF", save_all=True, append_images=frames[1:])
    assert open_image(moving, None).getpixel((0, 0))[0] > 200


def test_images_in_every_form_that_sets_hold_them(tmp_path):
    image, data = picture(12, 8, 0), png(picture(12, 8, 0))
    image.save(tmp_path / "x.png")
    text = base64.b64encode(data).decode()
    stored = [image, data, {"bytes": data, "path": None}, {"bytes": None, "path": str(tmp_path / "x.png")}, "x.png"]
    for item in [*stored, text, "data:image/png;base64," + text]:
        assert np.array_equal(np.asarray(open_image(item, tmp_path)), np.asarray(image))


@pytest.mark.parametrize(
    "item, message",
    [
        (png(picture(64, 64, 0))[:-3000], "."),
        (png(Image.new("RGB", (1, 300))), "200 times as long"),
        (png(Image.new("1", (20_000, 10_000))), "pixels"),
        (7, "type int"),
        ("", "type str"),
    ],
)
def test_pictures_that_cannot_be_used(item, message):
    with pytest.raises((ValueError, OSError, Image.DecompressionBombError), match=message):
        open_image(item, None)


def test_one_pixel_is_a_picture():
    assert open_image(png(Image.new("L", (1, 1))), None).size == (1, 1)


def test_messages():
    example = Example((picture(8, 8, 0),) * 2, "<image>Left of <image>?", "red")
    content = build_messages(example, TEMPLATE)[0]["content"]
    assert content[0] == {"type": "image"} == content[2]
    assert content[3]["text"] == f"?\n\n{REQUEST}"
    assert check_template(r"Q: {question}\n") == "Q: {question}\n"
    with pytest.raises(SystemExit, match=r"must contain \{question\}"):
        check_template("Answer!")


def test_batches_walk_through_every_example_once_an_epoch():
    epoch = [i for step in range(5) for i in batch_indices(seed=1, step=step, size=4, length=20)]
    assert sorted(epoch) == list(range(20)) and epoch != sorted(epoch)
    assert batch_indices(1, 3, 4, 20) == epoch[12:16], "a resumed run draws what comes next"
    following = [i for step in range(5, 10) for i in batch_indices(1, step, 4, 20)]
    assert sorted(following) == list(range(20)) and following != epoch
    across = [i for step in range(10) for i in batch_indices(1, step, 7, 20)]
    assert sorted(across[:20]) == sorted(across[20:40]) == list(range(20))
    assert len(batch_indices(0, 0, 8, 3)) == 8
