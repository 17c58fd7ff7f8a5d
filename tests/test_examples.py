"""Examples from files, folders and hub-like sets; images of every kind; the order in which they are drawn."""

import base64
import contextlib
import io
import json
import math
import threading

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from common.data.examples import Example, load_examples, place_images
from common.data.images import open_image, to_rgb
from common.data.messages import TEMPLATE, build_messages, check_template
from common.data.prompts import batch_indices, prefetch
from common.rewards.answers import check
from common.rewards.designs import REQUEST
from tests.small_models import picture


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory, monkeypatch):
    """What `datasets` keeps of the files that the tests write goes where they go."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


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


def test_jsonl_as_editors_and_other_programs_write_it(tmp_path):
    """With a byte order mark, empty lines, line separators inside of strings, and columns that only some rows have."""
    picture(40, 30, 0).save(tmp_path / "a.png")
    rows = ['{"question": "1\u2028+ 1?", "answer": "2"}', "", '{"question": "?", "answer": "3", "image": "a.png"}']
    (tmp_path / "rows.jsonl").write_text("\ufeff" + "\r\n".join(rows), encoding="utf-8")
    first, second = load_examples(str(tmp_path / "rows.jsonl"))
    assert first.question == "1\u2028+ 1?" and second.images[0].size == (40, 30)


def test_image_folder_with_metadata(tmp_path, capsys):
    picture(40, 30, 0).save(tmp_path / "a.png")
    write_jsonl(tmp_path, [{"file_name": "a.png", "question": "How many?", "answer": "3"}], "metadata.jsonl")
    assert load_examples(str(tmp_path), "train")[0].images[0].size == (40, 30)
    assert capsys.readouterr().out == ""
    load_examples(str(tmp_path), "test")
    assert "a file has no splits; all of it serves as 'test'" in capsys.readouterr().out


def test_files_named_after_splits(tmp_path):
    for split, answer in (("train", "1"), ("test", "2")):
        write_jsonl(tmp_path, [{"question": "?", "answer": answer}], f"{split}.jsonl")
    assert [load_examples(str(tmp_path), split)[0].answer for split in ("train", "test")] == ["1", "2"]


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
        assert examples.sizes == [32 * 32] * 3
    with pytest.raises(SystemExit, match=r"no dev.jsonl or dev.parquet beside train.parquet; add one, or name a split"):
        load_examples(str(tmp_path), "dev")


@pytest.mark.parametrize("form", ["save_to_disk", "parquet"])
def test_a_set_is_read_where_it_lies_and_not_copied(form, tmp_path):
    rows = [{"image": picture(32, 24, n), "images": [picture(8, 8, n)], "question": "?", "answer": n} for n in range(3)]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table = table.cast_column("images", datasets.List(datasets.Image()))
    if form == "save_to_disk":
        table.save_to_disk(tmp_path)
    else:
        table.to_parquet(tmp_path / "train.parquet")
    before = sorted(tmp_path.rglob("*"))
    for column, size in (("image", (32, 24)), ("images", (8, 8))):
        examples = load_examples(str(tmp_path), "train", image_column=column)
        row = examples.rows[0]
        assert row["image"].keys() == row["images"][0].keys() == {"bytes", "path"}, "not decoded until it is drawn"
        assert [example.images[0].size for example in examples] == [size] * 3
    assert sorted(tmp_path.rglob("*")) == before
    cached = [path.name for path in datasets.config.HF_DATASETS_CACHE.rglob("*.arrow")]
    assert cached == ([] if form == "save_to_disk" else ["parquet-train.arrow"]), "what Parquet is read through, once"


def test_parquet_from_other_programs(tmp_path):
    """Images as plain structs or bytes, as pandas and pyarrow write them."""
    data = png(picture(32, 24, 0))
    for name, stored in (("structs", {"bytes": data, "path": "a.png"}), ("bytes", data), ("lists", [{"bytes": data}])):
        table = pyarrow.Table.from_pylist([{"image": stored, "question": "How many?", "answer": 3}])
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
        example = load_examples(str(tmp_path / f"{name}.parquet"), kind="int")[0]
        assert example.images[0].size == (32, 24) and example.answer == "3"


def test_configurations_of_a_downloaded_set(tmp_path):
    folder = tmp_path / "set"
    for config in ("easy", "hard"):
        (folder / config).mkdir(parents=True)
        write_jsonl(folder / config, [{"problem": config, "solution": "<answer> 1 </answer>"}], "train.jsonl")
    card = "---\nconfigs:\n- config_name: easy\n  data_files: easy/*\n- config_name: hard\n  data_files: hard/*\n---\n"
    (folder / "README.md").write_text(card)
    example = load_examples(f"{folder}@hard", "train")[0]
    assert (example.question, example.answer) == ("hard", "1")
    with pytest.raises(SystemExit, match=r"pick one among .*'easy', 'hard'"):
        load_examples(str(folder), "train")


def test_of_a_large_set_a_short_run_reads_only_what_it_draws(tmp_path, monkeypatch, capsys):
    """Its card states its size, as the hub's cards do."""
    folder = tmp_path / "set"
    folder.mkdir()
    for shard in range(4):
        rows = [{"image": picture(32, 32, n), "problem": f"{shard}/{n}", "answer": "1"} for n in range(50)]
        table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
        table.to_parquet(folder / f"train-{shard}-of-4.parquet")
    features = "features:\n  - name: image\n    dtype: image\n" + "".join(
        f"  - name: {name}\n    dtype: string\n" for name in ("problem", "answer")
    )
    splits = "splits:\n  - name: train\n    num_bytes: 600000\n    num_examples: 200\n"
    (folder / "README.md").write_text(f"---\ndataset_info:\n  {features}  {splits}---\n")

    monkeypatch.setattr("common.data.examples.LARGE", 200)

    def questions(draws, seed):
        examples = load_examples(str(folder), draws=draws, seed=seed)
        assert all(example.images[0].size == (32, 32) for example in examples)
        return [example.question for example in examples]

    first = questions(20, seed=1)
    assert "a large set; 20 of its 200 rows are read" in capsys.readouterr().out
    assert len(set(first)) == 20 and len({question[:8] for question in first}) == 4, "drawn from every shard"
    assert first == questions(20, seed=1) != questions(20, seed=2)
    assert len(questions(51, seed=1)) == 200, "a long run reads all of it"
    monkeypatch.setattr("common.data.examples.LARGE", 201)
    assert len(questions(20, seed=1)) == 200, "and a small set is read as a whole"


def test_the_column_with_pixels_is_taken_where_another_has_paths(tmp_path):
    """The schema of MathVista."""
    features = datasets.Features(
        {"image": datasets.Value("string"), "decoded_image": datasets.Image()}
        | {name: datasets.Value("string") for name in ("question", "answer")}
    )
    row = {"image": "images/1.jpg", "decoded_image": picture(32, 24, 0), "question": "?", "answer": "1"}
    datasets.Dataset.from_list([row], features=features).to_parquet(tmp_path / "testmini.parquet")
    assert load_examples(str(tmp_path), "testmini")[0].images[0].size == (32, 24)


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
    assert f"{path}: 1 of 151 rows cannot be used: row 150: no answer" in capsys.readouterr().out

    (tmp_path / "broken.png").write_bytes(b"no picture")
    bad = [{"image": "broken.png", **good}, {"image": "gone.png", **good}, {**good, "question": "<image>?"}]
    with pytest.raises(SystemExit, match=r"3 of 153 rows cannot be used: row 150: image .*broken.png") as error:
        load_examples(write_jsonl(tmp_path, [{"image": None, **good}] * 150 + bad))
    assert "row 151: no image file 'gone.png'" in str(error.value)
    assert "row 152: 1 image markers for 0 images" in str(error.value)
    few = write_jsonl(tmp_path, [{"image": None, **good}] * 150 + bad)
    assert len(load_examples(few, max_bad=0.05)) == 150


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"question": "1 + 1?"}, "no answer"),
        ({"answer": "2"}, "no question"),
        ({"question": "1 + 1?", "answer": r"\boxed{"}, "no answer inside"),
        ({"question": "1 + 1?", "answer": "a few", "kind": "int"}, "not of kind int"),
        ({"question": "1 + 1?", "answer": "2", "kind": "sum"}, "unknown answer kind 'sum'"),
        ({"question": "<image 3>?", "answer": "2"}, "numbered 3 for 0 images"),
        ({"question": "<|image_pad|>?", "answer": "2"}, "token of their own"),
        ({"question": "?", "answer": "2", "image": "https://example.org/" + "a" * 60 + ".png"}, "no image file"),
        ({"question": "?", "answer": "2", "image": ["x.png", None]}, "no image"),
        ({"question": "?", "answer": ["1", "2"]}, r"the answer is a list \(\['1', '2'\]\); write it as one text"),
        ({"question": "?", "answer": {"x": 1}}, "the answer is a dict"),
        ({"question": "?", "answer": math.nan}, r"no answer \(nan\)"),
        ({"question": ["1 + 1?"], "answer": "2"}, r"the question is a list \(\['1 \+ 1\?'\]\); write it as one text"),
        (
            {"question": "Which?", "answer": "B", "choices": [["red"], ["blue"]]},
            "options must be a list of texts, not ",
        ),
        ({"question": "Which?", "answer": "B", "kind": "choice"}, "kind choice needs the options in a column choices"),
        ({"question": "Which?", "answer": "B", "choices": "red, blue"}, "options must be a list of texts, not 'red, b"),
        ({"question": "Which?", "answer": "B", "options": {"A": "red"}}, "options must be a list of texts, not "),
    ],
)
def test_reasons(tmp_path, row, reason):
    path = write_jsonl(tmp_path, [row, {"question": "1 + 1?", "answer": "2"}])
    with pytest.raises(SystemExit, match=f"1 of 2 rows cannot be used: row 0: .*{reason}"):
        load_examples(path)


@pytest.mark.parametrize(
    ("row", "kind", "choices", "right"),
    [
        ({"question": "Which?\n(A) red\n(B) dark blue", "answer": "B"}, "letter", ("red", "dark blue"), "dark blue"),
        ({"question": "Which? A. 1; B. 2; C. 3", "answer": "(C)"}, "letter", ("1", "2", "3"), "C. 3"),
        ({"question": "Which? A: red, B: blue", "answer": "blue"}, "choice", ("red", "blue"), "B"),
        ({"question": "Which?\nA) 1\nB) 2\nAnswer with a letter.", "answer": "A"}, "letter", ("1", "2"), "1"),
        ({"question": "Which?", "options": ["red", "blue"], "answer": "A"}, "letter", ("red", "blue"), "red"),
        ({"question": "Which?", "choices": "['red', 'blue']", "answer": "blue"}, "choice", ("red", "blue"), "(B)"),
        ({"question": "Which?", "options": "A. red B. blue", "answer": "B"}, "letter", ("red", "blue"), "blue"),
        ({"question": "A: 5 or B: 7?", "answer": "B", "kind": "choice"}, None, None, None),
        ({"question": "A: 5, B: 7. Their sum?", "answer": "12"}, "math", None, "12"),
        ({"question": "Is A. left of B?", "answer": "B"}, "math", None, "B"),
    ],
)
def test_multiple_choice_is_recognized(tmp_path, row, kind, choices, right):
    """Options in a column or in the question's text; the answer by its letter or its text; no kind given."""
    path = write_jsonl(tmp_path, [row])
    if kind is None:
        with pytest.raises(SystemExit, match="the answer 'B' is not of kind choice"):
            load_examples(path)
        return
    example = load_examples(path)[0]
    assert (example.kind, example.choices) == (kind, choices)
    assert check(f"<answer>{right}</answer>", example.answer, example.kind, example.choices).correct
    assert not check("<answer>D</answer>", example.answer, example.kind, example.choices).correct


def test_pictures_come_from_beneath_the_folder_of_the_set(tmp_path):
    """A set from elsewhere must not put a file of this machine on a page that is shared."""
    folder, other = tmp_path / "set", tmp_path / "other"
    for path in (folder / "images", other):
        path.mkdir(parents=True)
        picture(40, 30, 0).save(path / "x.png")
    (folder / "link.png").symlink_to(other / "x.png")
    (folder / "inner.png").symlink_to(folder / "images" / "x.png")

    def load(image, **options):
        path = write_jsonl(folder, [{"image": image, "question": "?", "answer": "1"}])
        return load_examples(path, **options)[0].images[0].size

    for image in ("images/x.png", "images/../images/x.png", str(folder / "images" / "x.png"), "inner.png"):
        assert load(image) == (40, 30)
    for image in ("../other/x.png", str(other / "x.png"), "link.png", {"path": str(other / "x.png"), "bytes": None}):
        with pytest.raises(SystemExit, match=r"row 0: image .* lies outside of .*set; --image-root names another"):
            load(image)
        if image != "link.png":  # found where the root is that was named
            assert load("x.png" if image == "../other/x.png" else image, image_root=str(other)) == (40, 30)
    with pytest.raises(SystemExit, match=r"row 0: image .* lies outside of .*other"):
        load(str(folder / "images" / "x.png"), image_root=str(other))
    with pytest.raises(SystemExit, match="--image-root /nothere: no such folder"):
        load("x.png", image_root="/nothere")


def test_pictures_of_a_hub_set_come_from_where_it_is_kept(tmp_path, monkeypatch):
    """Without a folder of its own a set cannot name files at all, but for what `datasets` itself unpacked."""
    picture(40, 30, 0).save(tmp_path / "x.png")
    rows = [{"image": {"path": str(tmp_path / "x.png"), "bytes": None}, "question": "?", "answer": "1"}]
    table = datasets.Dataset.from_list(rows)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: table)
    monkeypatch.setattr("common.data.examples.hub_has", lambda name: True)
    with pytest.raises(SystemExit, match=r"row 0: image .* lies outside of"):
        load_examples("owner/set")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    assert load_examples("owner/set")[0].images[0].size == (40, 30)


def test_a_folder_without_a_split_says_what_is_missing_and_what_to_pass(tmp_path):
    for split in ("train", "test"):
        write_jsonl(tmp_path, [{"question": "?", "answer": "1"}], f"{split}.jsonl")
    line = (
        f"--data {tmp_path}: no validation.jsonl or validation.parquet beside test.jsonl, train.jsonl; add one, or "
        "name a split that is there by --train-split, --eval-split or --test-split"
    )
    with pytest.raises(SystemExit) as error:
        load_examples(str(tmp_path), "validation")
    assert str(error.value) == line


def test_an_image_that_is_found_broken_only_when_drawn(tmp_path, capsys, monkeypatch):
    """Another row stands in, always the same, and the run goes on; too many of them stop it. In a small set all are
    decoded at the start, so that none stops it midway."""
    whole = bytearray(png(picture(64, 64, 0)))
    whole[len(whole) // 2] ^= 255  # in the middle of the pixels: the file's ends look sound
    (tmp_path / "damaged.png").write_bytes(whole)
    rows = [{"image": None, "question": f"{i}?", "answer": str(i)} for i in range(200)]
    rows[7]["image"] = "damaged.png"
    file = write_jsonl(tmp_path, rows)
    assert len(load_examples(file)) == 199 and "1 of 200 rows cannot be used" in capsys.readouterr().out
    monkeypatch.setattr("common.data.examples.SMALL", 0)
    examples = load_examples(file)
    assert capsys.readouterr().out == ""
    assert examples[7].answer == examples[7].answer == "8" and len(examples) == 200
    assert capsys.readouterr().out.count("1 of 200 rows cannot be used: row 7: image") == 1
    with pytest.raises(SystemExit, match=r"1 of 50 rows.*that is too many: mend or remove them"):
        load_examples(file, limit=50)[7]


def test_what_cannot_be_loaded_says_so_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "bad.jsonl").write_text('{"question": 1}\n{oops\n')
    with pytest.raises(SystemExit, match="line 2 is not a JSON object"):
        load_examples(str(tmp_path / "bad.jsonl"))
    (tmp_path / "bad.jsonl").write_bytes(b'{"question": "\xe9", "answer": "2"}')
    with pytest.raises(SystemExit, match="line 1 is not a JSON object: 'utf-8' codec"):
        load_examples(str(tmp_path / "bad.jsonl"))
    (tmp_path / "bad.jsonl").write_text("\n")
    with pytest.raises(SystemExit, match="no rows"):
        load_examples(str(tmp_path / "bad.jsonl"))
    (tmp_path / "bad.parquet").write_text("?")
    with pytest.raises(SystemExit, match="split 'train' cannot be loaded") as error:
        load_examples(str(tmp_path / "bad.parquet"))
    assert "hf download" not in str(error.value), "a file is not a hub id"
    with pytest.raises(SystemExit, match=r"nowhere.jsonl: no such .jsonl or .parquet file or folder, nor a hub id"):
        load_examples("nowhere.jsonl")
    with pytest.raises(SystemExit, match="--kind sum: choose one of int"):
        load_examples("puzzles", kind="sum")


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_a_hub_set_says_what_to_download(monkeypatch, offline):
    """Whether the user has said so or the attempt to reach the hub shows it."""

    def unreachable(*args, **kwargs):
        assert not offline
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    command = "hf download owner/set --repo-type dataset --local-dir DIR` and pass --data DIR@small"
    with pytest.raises(SystemExit, match=command) as error:
        load_examples("owner/set@small")
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


def test_16_bits_keep_their_brightness():
    dark = Image.fromarray(np.full((2, 2), 6554, dtype=np.uint16))  # a tenth of white
    assert open_image(png(dark), None).getpixel((0, 0)) == (25, 25, 25)
    levels = Image.fromarray(np.array([[0, 257 * 100, 257 * 200]], dtype=np.uint16))
    clear = open_image(png(levels, transparency=257 * 100), None)  # one level of a grey PNG
    assert np.asarray(clear)[0, :, 0].tolist() == [0, 255, 200]


def test_32_bits_and_floats_keep_their_brightness():
    # White is the first of 1, 255 and 65535 that no value exceeds, or else the highest value.
    for levels, expected in (
        ([0, 0.5, 0.8], [0, 127, 204]),
        ([0, 100, 200], [0, 100, 200]),
        ([0, 257 * 100, 257 * 200], [0, 100, 200]),
        ([0, 100_000, 200_000], [0, 127, 255]),
        ([-5, np.nan, 1, np.inf], [0, 0, 255, 255]),
        ([np.nan, np.nan], [0, 0]),
    ):
        image = to_rgb(Image.fromarray(np.array([levels], np.float32)))
        assert np.asarray(image)[0, :, 0].tolist() == expected
    whole = Image.fromarray(np.array([[0, 100, 200]], np.int32))
    assert whole.mode == "I" and np.asarray(to_rgb(whole))[0, :, 0].tolist() == [0, 100, 200]


def test_broken_exif_data_does_not_matter():
    image = picture(8, 8, 0)
    image.info["exif"] = b"Exif\0\0nonsense"
    assert to_rgb(image).size == (8, 8)


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
    (tmp_path / ("a" * 80)).write_bytes(data)
    text = base64.b64encode(data).decode()
    dicts = [{"bytes": data, "path": None}, {"bytes": None, "path": str(tmp_path / "x.png")}]
    stored = [image, data, *dicts, "x.png", "a" * 80]
    for item in [*stored, text, "data:image/png;base64," + text]:
        assert np.array_equal(np.asarray(open_image(item, tmp_path)), np.asarray(image))
    black = base64.b64encode(png(Image.new("RGB", (10, 8)), format="BMP")).decode()
    assert 255 < len(black) < 1024 and "/" not in black, "longer than a file's name can be"
    assert open_image(black, tmp_path).size == (10, 8)


@pytest.mark.parametrize(
    "item, message",
    [
        (png(picture(64, 64, 0))[:-3000], "truncated"),
        (b"no picture", "not in a known format"),
        (png(Image.new("RGB", (1, 300))), "200 times as long"),
        (png(Image.new("1", (11_000, 10_000))), "more than 100,000,000"),
        (png(Image.new("1", (20_000, 10_000))), "decompression bomb"),
        (7, "type int"),
        ("", "type str"),
    ],
)
def test_pictures_that_cannot_be_used(item, message):
    for pixels in (True, False):  # when it is drawn, and already when the set is loaded
        with pytest.raises(ValueError, match=message):
            open_image(item, None, pixels)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM"])
def test_truncated_files_are_found_when_a_set_is_loaded(tmp_path, form):
    data = png(picture(64, 64, 0), format=form)
    for length, usable in ((len(data), True), (len(data) // 2, False), (20, False)):
        (tmp_path / "x").write_bytes(data[:length])
        with contextlib.nullcontext() if usable else pytest.raises(ValueError, match="image 'x': "):
            assert open_image("x", tmp_path, pixels=False).size == (64, 64)
        with contextlib.nullcontext() if usable else pytest.raises(ValueError, match="image: "):
            assert open_image(data[:length], None, pixels=False).size == (64, 64)


def test_one_pixel_is_a_picture():
    assert open_image(png(Image.new("L", (1, 1))), None).size == (1, 1)


def test_each_marker_gets_its_picture():
    assert place_images("?", ("a", "b")) == ("<image><image>?", ("a", "b"))
    assert place_images("<image 2> or <image1>?", ("a", "b")) == ("<image> or <image>?", ("b", "a"))
    assert place_images("In <image 2>?", ("a", "b", "c")) == ("<image><image>In <image>?", ("a", "c", "b"))
    assert place_images("<image 1>, again <image 1>?", ("a",)) == ("<image>, again <image>?", ("a", "a"))
    for question in ("<image><image>?", "<image 2>?", "<image 0>?", "<image> or <image 1>?"):
        with pytest.raises(ValueError, match="for 1 images"):
            place_images(question, ("a",))


def test_messages():
    example = Example((picture(8, 8, 0),) * 2, "<image>Left of <image>?", "red")
    content = build_messages(example, TEMPLATE)[0]["content"]
    assert content[0] == {"type": "image"} == content[2]
    assert content[3]["text"] == f"?\n\n{REQUEST}"
    assert check_template(r"Q: {question}\n") == "Q: {question}\n"
    with pytest.raises(SystemExit, match=r"must contain \{question\}"):
        check_template("Answer!")
    with pytest.raises(SystemExit, match="and not <image>"):
        build_messages(example, "<image>{question}")
    assert build_messages(Example((), "{request}?", "1"), "{question}")[0]["content"][0]["text"] == "{request}?"


def test_batches_walk_through_every_example_once_an_epoch():
    epoch = [i for step in range(5) for i in batch_indices(seed=1, step=step, size=4, length=20)]
    assert sorted(epoch) == list(range(20)) and epoch != sorted(epoch)
    assert batch_indices(1, 3, 4, 20) == epoch[12:16], "a resumed run draws what comes next"
    following = [i for step in range(5, 10) for i in batch_indices(1, step, 4, 20)]
    assert sorted(following) == list(range(20)) and following != epoch
    across = [i for step in range(10) for i in batch_indices(1, step, 7, 20)]
    assert sorted(across[:20]) == sorted(across[20:40]) == list(range(20))
    assert len(batch_indices(0, 0, 8, 3)) == 8


def test_the_next_step_is_prepared_while_this_one_is_used():
    begun, go = [], threading.Event()

    def work(step):
        begun.append(step)
        if step == 4:
            go.set()
        if step == 6:
            raise SystemExit("--data: broken")
        return step * step

    results = []
    with pytest.raises(SystemExit, match="--data: broken"):  # where its result is asked for, not earlier
        for step, drawn in prefetch(work, range(3, 7), in_thread=True):
            results.append((step, drawn()))
            if step == 3:
                assert go.wait(10), "step 4 is prepared although nobody asked for it yet"
                assert max(begun) == 4, "and no step beyond"
    assert results == [(3, 9), (4, 16), (5, 25)] and begun == [3, 4, 5, 6]
    assert list(prefetch(work, range(5, 5), in_thread=True)) == []


def test_without_a_thread_the_work_is_done_when_it_is_asked_for():
    begun = []
    for step, drawn in prefetch(begun.append, range(3), in_thread=False):
        assert begun == list(range(step)), "nothing is done ahead"
        drawn()
    assert begun == [0, 1, 2]
