"""Every data set of the table, as its hub repository holds it, in a few rows: read, asked, and its answers checked."""

import io
import json
from types import SimpleNamespace

import datasets
import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from PIL import Image

from common.data.examples import load_examples
from common.data.sets import BLINK, SOURCES, lettered, special_scores
from common.rewards.answers import check
from common.tiny.recipe import accuracy as evaluation


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def png(mode="RGB", size=(40, 30), colour=0):
    image, file = Image.new("RGB", size, (10 * colour, 120, 200)).convert(mode), io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


IMAGE, IMAGES = datasets.Image(), datasets.List(datasets.Image())


def save(root, split, rows, config="default", **types):
    """A parquet file and its entry in the README, as the hub's repositories have them; `types` names image columns."""
    folder = root / config
    folder.mkdir(parents=True, exist_ok=True)
    features = datasets.Dataset.from_list(rows).features | types
    table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    entries = "".join(
        f"- config_name: {path.name}\n  data_files:\n"
        + "".join(
            f"  - split: {file.name.split('-')[0]}\n    path: {path.name}/{file.name.split('-')[0]}-*.parquet\n"
            for file in sorted(path.glob("*.parquet"))
        )
        for path in sorted(root.iterdir())
        if path.is_dir()
    )
    (root / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")


def only(name, folder, split="test", **options):
    return list(load_examples(f"{name}={folder}", split, **options))


def answered(example, right, wrong):
    """The right answer counts and the wrong one does not."""
    assert check(f"<answer>{right}</answer>", example.answer, example.kind, example.choices).correct
    assert not check(f"<answer>{wrong}</answer>", example.answer, example.kind, example.choices).correct


def test_geometry3k(tmp_path, capsys):
    rows = [
        {"images": [png()], "problem": "<image>Find x.", "answer": r"2 \sqrt { 3 }", "id": 7, "choices": ["1", "2"],
         "ground_truth": "B"},
        {"images": [png("P")], "problem": "<image>Find y.", "answer": "48", "id": 8, "choices": ["4"],
         "ground_truth": "A"},
    ]  # fmt: skip
    save(tmp_path, "train", rows, images=IMAGES)
    save(tmp_path, "validation", rows[:1], images=IMAGES)
    save(tmp_path, "test", rows[1:], images=IMAGES)
    first, second = only("geometry3k", tmp_path, "train")
    assert first.question == "<image>Find x." and first.kind == "math" and first.id == "7"
    answered(first, r"\sqrt{12}", "12")
    answered(second, "48", "84")
    assert [e.id for e in only("geometry3k", tmp_path)] == ["8"]
    assert [e.id for e in only("geometry3k", tmp_path, "validation")] == ["7"], "not what the final test asks"
    assert capsys.readouterr().out == ""


def test_large_sets_are_read_as_far_as_a_run_draws(tmp_path, capsys):
    rows = [
        {"image": png(colour=n % 9), "problem": f"How many? {n}", "solution": "<answer> 3 </answer>"} for n in range(40)
    ]
    save(tmp_path, "train", rows, image=IMAGE)
    examples = only("clevr-count", tmp_path, "train", draws=8, seed=3)
    assert len(examples) == len({example.question for example in examples}) == 8
    assert "a large set; 8 of its 70,000 rows are read" in capsys.readouterr().out
    answered(examples[0], "3", "4")
    assert len(only("clevr-count", tmp_path, "train")) == 40


def test_virl39k_is_a_named_file_beside_unpacked_pictures(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for n in range(2):
        (tmp_path / "images" / f"{n}.png").write_bytes(png(colour=n)["bytes"])
    common = {"PassRate_32BTrained": 0.5, "PassRate_7BBase": -1.0, "category": "STEM", "source": "x"}
    rows = [
        {"question": "<image>What?", "answer": r"\boxed{B}", "qid": "a", "image": ["images/0.png"], **common},
        {"question": "Both?", "answer": r"\boxed{\frac{1}{2}}", "qid": "b", "image": ["images/0.png", "images/1.png"],
         **common},
        {"question": "No picture?", "answer": r"\boxed{30^\circ}", "qid": "c", "image": [], **common},
    ]  # fmt: skip
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "39Krelease.parquet")
    (tmp_path / "images.zip").write_bytes(b"not a table")
    one, two, none = only("virl39k", tmp_path, "train")
    assert [e.kind for e in (one, two, none)] == ["letter", "math", "math"]
    assert two.question == "<image><image>Both?" and len(two.images) == 2 and not none.images
    answered(one, "(B)", "A")
    answered(two, "0.5", "2")
    answered(none, "30", "31")
    with pytest.raises(
        SystemExit, match=r"--data virl39k: its pictures are in images.zip; run `hf download TIGER-Lab/"
    ):
        load_examples("virl39k", "train")
    rows.append({"question": "?", "answer": r"\boxed{\left\{ x", "qid": "d", "image": [], **common})
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "39Krelease.parquet")
    assert len(load_examples(f"virl39k={tmp_path}", "train", max_bad=0.5)) == 3
    assert "1 of 4 rows cannot be used: row 3: no answer inside" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["virl39k-vppo", "virl39k-papo"])
def test_virl39k_as_the_papers_repacked_it(name, tmp_path):
    save(tmp_path, "train", [{"images": [png()], "problem": "<image>?", "answer": "C"}], images=IMAGES)
    (example,) = only(name, tmp_path, "train")
    assert example.kind == "letter"
    answered(example, "C", "D")


def test_mmk12(tmp_path, capsys):
    row = {"id": "m1", "question": "How long?", "answer": "$2$ cm", "subject": "math", "image": png("RGBA")}
    save(tmp_path, "train", [row], image=IMAGE)
    save(tmp_path, "test", [row | {"question": "Which?\nA. 1\nB. 2", "answer": "B", "subject": "physics"}], image=IMAGE)
    (train,), (test,) = only("mmk12", tmp_path, "train"), only("mmk12", tmp_path)
    assert train.question == "<image>How long?" and test.group == "physics" and test.kind == "letter"
    answered(train, "2", "3")
    answered(test, "B", "A")
    capsys.readouterr()
    assert only("mmk12", tmp_path, "validation")[0].question == test.question
    assert capsys.readouterr().out == "--data mmk12: 'validation' is its test\n"


@pytest.mark.parametrize(
    ("name", "solution", "kind", "right", "wrong"),
    [("open-r1-8k", "<think>x</think> <answer>\\frac{1}{4}</answer>", "math", "0.25", "4"),
     ("open-r1-8k", "<think>x</think>\n<answer>C</answer>", "letter", "C", "A"),
     ("clevr-count", "<answer> 3 </answer>", "int", "3", "4"),
     ("geoqa", "<answer> 140° </answer>", "math", "140", "40")],
)  # fmt: skip
def test_sets_whose_solution_holds_the_answer(name, solution, kind, right, wrong, tmp_path):
    row = {"image": png("RGBA"), "problem": "?", "solution": solution, "original_question": "", "original_answer": ""}
    save(tmp_path, "train", [row], image=IMAGE)
    (example,) = only(name, tmp_path, "train")
    assert example.kind == kind and example.images[0].mode == "RGB"
    answered(example, right, wrong)


@pytest.mark.parametrize("name", ["puzzlevqa", "algopuzzle"])
@pytest.mark.parametrize("form", ["parquet", "disk"])
def test_puzzle_sets_whatever_their_split_is_called(name, form, tmp_path):
    rows = [{"image": png("RGBA"), "question": "Which?", "options": ["1", "2", "3"], "answer": "2", "caption": "c"}]
    if form == "parquet":
        save(tmp_path, "anything", rows, image=IMAGE)
    else:
        table = datasets.Dataset.from_list(rows)
        table.cast_column("image", IMAGE).save_to_disk(tmp_path)
    for split in ("train", "test"):
        (example,) = only(name, tmp_path, split)
        assert example.question == "<image>Which?\n(A) 1\n(B) 2\n(C) 3"
        answered(example, "B", "(C)")
        answered(example, "2", "3")


def test_mathvista(tmp_path, capsys):
    common = {"image": "images/1.jpg", "decoded_image": png(), "metadata": {"task": "figure QA"}}
    rows = [
        {"pid": "1", "question": "Which?", "choices": ["red", "blue"], "unit": None, "precision": None,
         "answer": "blue", "question_type": "multi_choice", "answer_type": "text", **common},
        {"pid": "2", "question": "How far?", "choices": None, "unit": "m", "precision": 1.0, "answer": "1.2",
         "question_type": "free_form", "answer_type": "float", **common},
        {"pid": "3", "question": "How many?", "choices": None, "unit": None, "precision": None, "answer": "4",
         "question_type": "free_form", "answer_type": "integer", **common},
        {"pid": "4", "question": "Which years?", "choices": None, "unit": None, "precision": None,
         "answer": "[2005, 2007]", "question_type": "free_form", "answer_type": "list", **common},
    ]  # fmt: skip
    save(tmp_path, "testmini", rows, decoded_image=IMAGE)
    choice, far, many, years = only("mathvista", tmp_path)
    assert choice.question == "<image>Which?\n(A) red\n(B) blue" and choice.group == "figure QA"
    assert far.question == "<image>How far? (Unit: m) Round to 1 decimals."
    answered(choice, "B", "red")
    answered(far, "1.2", "1.3")
    answered(far, "1.24", "1.26")  # what is given too exactly is rounded, as the benchmark does
    answered(far, "1.16 m", "1.14")
    answered(many, "4", "5")
    answered(years, "[2005, 2007]", "[2005]")
    assert "--data mathvista: 'test' is its testmini" in capsys.readouterr().out


def test_mathverse_leaves_free_form_out_and_says_so(tmp_path, capsys):
    common = {"image": png(), "question_for_eval": "", "query_cot": "", "query_wo": "", "problem_index": "1"}
    rows = [
        {"sample_index": "1", "question": "Angle?\nChoices:\nA:30\nB:60", "question_type": "multi-choice",
         "answer": "B", "problem_version": "Text Lite", **common},
        {"sample_index": "2", "question": "", "question_type": "multi-choice", "answer": "A",
         "problem_version": "Vision Only", **common},
        {"sample_index": "3", "question": "Length?", "question_type": "free-form", "answer": "about 3",
         "problem_version": "Text Lite", **common},
    ]  # fmt: skip
    save(tmp_path, "testmini", rows, "testmini", image=IMAGE)
    lite, vision = only("mathverse", tmp_path)
    assert vision.question == "<image>Answer the question in the picture with the letter of the right choice."
    answered(lite, "B", "A")
    assert "--data mathverse: 1 free-form questions are left out" in capsys.readouterr().out


def test_mathvision(tmp_path):
    common = {"image": "images/1.jpg", "decoded_image": png("P"), "subject": "counting", "solution": None}
    rows = [
        {"id": "1", "question": "Which?\n<image1>", "options": ["A", "B", "C"], "answer": "C", "level": 2, **common},
        {"id": "2", "question": "<image1>How many?", "options": [], "answer": "7", "level": 5, **common},
    ]
    save(tmp_path, "test", rows, decoded_image=IMAGE)
    options, free = only("mathvision", tmp_path)
    assert options.question == "Which?\n<image>\n(A) A\n(B) B\n(C) C" and free.group == "5"
    answered(options, "C", "A")
    answered(free, "7", "6")


def test_wemath(tmp_path):
    row = {"ID": "1", "split": "testmini", "knowledge concept": "x", "question": "Area?", "answer": "B",
           "key": "2steps_1", "option": "A. 1; B. 2; C. 3", "image_path": png(), "question number": 1,
           "knowledge concept description": "y"}  # fmt: skip
    save(tmp_path, "testmini", [row], image_path=IMAGE)
    (example,) = only("wemath", tmp_path)
    assert example.question == "<image>Area?\nA. 1; B. 2; C. 3" and example.group == "2steps_1"
    answered(example, "B", "C")


def test_dynamath_is_right_where_every_variant_is(tmp_path):
    for variant in range(1, 11):
        row = {"id": "1", "question": "Value?", "image": "x.png", "decoded_image": png(),
               "ground_truth": f"{variant}.5", "answer_type": "float", "subject": "algebra",
               "knowledge_level": "high school"}  # fmt: skip
        other = row | {"id": "2", "answer_type": "multiple choice", "ground_truth": "A"}
        save(tmp_path, f"sample_variant{variant}", [row, other], decoded_image=IMAGE)
    found = only("dynamath", tmp_path)
    assert len(found) == 20
    answered(found[0], "1.5004", "1.51")
    answered(found[1], "A", "B")
    rows = [(e.id, e.group, float(e.id == "1" or n > 4)) for n, e in enumerate(found)]
    assert special_scores("dynamath", rows) == {"right in every variant": 0.5}


def test_logicvista_compares_sets_of_letters(tmp_path):
    row = {"id": "1", "question": "Which two?", "answer": "A, C", "reasoning": "", "skill": ["inductive"],
           "broad_capability": [], "specific_capability": [], "imagesource": "", "sourcelink": "", "liscenced": "",
           "image": png()}  # fmt: skip
    save(tmp_path, "test", [row], image=IMAGE)
    (example,) = only("logicvista", tmp_path)
    assert example.group == "inductive"
    answered(example, "C and A", "A")


def test_mmmu_takes_the_pictures_that_are_named_in_their_order(tmp_path, capsys):
    columns = {f"image_{n}": None for n in range(1, 8)}
    row = {"id": "validation_Art_Theory_3", "question": "Is <image 2> before <image 1>?", "answer": "B",
           "options": "['yes', 'see <image 3>']", "question_type": "multiple-choice", "explanation": "", **columns,
           "image_1": png(colour=1), "image_2": png(colour=2), "image_3": png(colour=3)}  # fmt: skip
    rows = [row, row | {"question_type": "open", "options": "[]", "answer": "a fugue", "question": "<image 1>?"}]
    images = {f"image_{n}": IMAGE for n in range(1, 8)}
    save(tmp_path, "validation", rows, **images)
    (example,) = only("mmmu", tmp_path)
    assert example.question == "Is <image> before <image>?\n(A) yes\n(B) see <image>" and example.group == "Art_Theory"
    assert [image.getpixel((0, 0))[0] for image in example.images] == [20, 10, 30]
    answered(example, "B", "A")
    assert "1 open questions are left out" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["1", "2", "3"], "['1', '2', '3']"])
def test_mmmu_pro(options, tmp_path):
    images = {f"image_{n}": None for n in range(1, 8)} | {"image_1": png(size=(20, 300))}
    row = {"id": "test_Math_1", "question": "<image 1> Which?", "options": options, "answer": "C", "subject": "Math"}
    config = "standard (10 options)"
    save(tmp_path, "test", [row | images], config, **{f"image_{n}": IMAGE for n in range(1, 8)})
    vision = {"id": "test_Math_1", "options": options, "answer": "C", "subject": "Math", "image": png()}
    save(tmp_path, "test", [vision], "vision", image=IMAGE)
    (standard,), (seen) = only("mmmu-pro", tmp_path), only("mmmu-pro-vision", tmp_path)
    assert standard.question == "<image> Which?\n(A) 1\n(B) 2\n(C) 3" and standard.group == "Math"
    assert seen[0].question.startswith("<image>Answer the question in the picture")
    answered(standard, "3", "2")
    answered(seen[0], "C", "A")


def test_mmstar_reports_the_mean_of_its_categories(tmp_path):
    rows = [{"index": n, "question": "Which? A: x, B: y", "image": png(), "answer": "A", "category": category,
             "l2_category": "z", "meta_info": {"source": "s"}}
            for n, category in enumerate(("math", "math", "fine"))]  # fmt: skip
    save(tmp_path, "val", rows, image=IMAGE)
    found = only("mmstar", tmp_path)
    answered(found[0], "A", "B")
    scores = special_scores("mmstar", [(e.id, e.group, float(e.group == "fine")) for e in found])
    assert scores == {"mean of categories": 0.5}


def test_hallusion_counts_figures_and_questions(tmp_path):
    rows = [{"category": "VD", "subcategory": "chart", "visual_input": "1", "set_id": "0", "figure_id": str(figure),
             "question_id": str(question), "question": "Is it?", "gt_answer": str(figure), "image": png(),
             "gt_answer_details": "", "filename": "x"} for figure in (0, 1) for question in (0, 1)]  # fmt: skip
    save(tmp_path, "image", rows, image=IMAGE)
    found = only("hallusion", tmp_path)
    assert found[0].question == "<image>Is it? Answer yes or no." and found[0].answer == "no"
    answered(found[0], "No.", "Yes")
    scores = special_scores("hallusion", [(e.id, e.group, right) for e, right in zip(found, (1, 1, 1, 0), strict=True)])
    assert scores == {"figures all right": 0.5, "questions all right": 0.5}


def test_realworldqa_drops_the_instruction_at_the_end(tmp_path):
    rows = [
        {"image": png(), "question": "Which way?\nA. left\nB. right\nPlease answer directly with only the letter.",
         "answer": "B"},
        {"image": png(), "question": "What sign? Please answer directly with a single word or number.",
         "answer": "Stop"},
    ]  # fmt: skip
    save(tmp_path, "test", rows, image=IMAGE)
    letter, word = only("realworldqa", tmp_path)
    assert letter.question == "<image>Which way?\nA. left\nB. right" and word.question == "<image>What sign?"
    answered(letter, "B", "A")
    answered(word, "stop.", "go")


@pytest.mark.parametrize("copy", [0, 1])
def test_chartqa_of_either_owner(copy, tmp_path):
    row = [{"type": "human_test", "question": "How much?", "answer": "200", "image": png()},
           {"query": "How much?", "label": ["200"], "human_or_machine": 0, "image": png()}][copy]  # fmt: skip
    save(tmp_path, "test", [row], image=IMAGE)
    (example,) = only("chartqa", tmp_path)
    assert example.group == "human_test"
    answered(example, "209", "211")


def test_blink_has_several_pictures_and_a_configuration_a_task(tmp_path):
    for name in BLINK:
        row = {"idx": f"val_{name}_1", "question": "q", "sub_task": name, "prompt": "Which?\n(A) x\n(B) y",
               "answer": "(B)", "choices": ["x", "y"], "image_1": png(colour=1), "image_2": png(colour=2),
               "image_3": None, "image_4": None}  # fmt: skip
        save(tmp_path, "val", [row], name, **{f"image_{n}": IMAGE for n in range(1, 5)})
    found = only("blink", tmp_path)
    assert {e.group for e in found} == set(BLINK) and len(found[0].images) == 2
    answered(found[0], "B", "A")


def test_vstar(tmp_path):
    row = {"image": png(), "text": "Colour?\n(A) red\n(B) blue", "label": "A", "category": "direct", "question_id": "1"}
    save(tmp_path, "test", [row], image=IMAGE)
    (example,) = only("vstar", tmp_path)
    answered(example, "A", "B")


def test_cvbench_has_its_own_mean(tmp_path):
    for config, sources in (("2D", ("ADE20K", "COCO", "COCO")), ("3D", ("Omni3D",))):
        rows = [{"idx": n, "type": config, "task": "Count", "image": png(), "question": "q", "choices": ["1", "2"],
                 "answer": "(B)", "prompt": "How many?\n(A) 1\n(B) 2", "filename": "f", "source": source}
                for n, source in enumerate(sources)]  # fmt: skip
        save(tmp_path, "test", rows, config, image=IMAGE)
    found = only("cvbench", tmp_path)
    answered(found[0], "(B)", "(A)")
    scores = special_scores("cvbench", [(e.id, e.group, float(e.group != "COCO")) for e in found])
    assert scores == {"2D": 0.5, "3D": 1.0, "mean of 2D and 3D": 0.75}


def test_a_set_of_another_form_says_which_column_is_missing(tmp_path):
    save(tmp_path, "val", [{"image": png(), "query": "?", "answer": "A"}], image=IMAGE)
    with pytest.raises(SystemExit, match="1 of 1 rows cannot be used: row 0: no column 'question' among image, query,"):
        load_examples(f"mmstar={tmp_path}", "test")


def test_what_is_not_there_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="--data mmstar=/nothere: no such folder"):
        load_examples("mmstar=/nothere", "test")
    monkeypatch.setattr("common.data.examples.hub_has", lambda name: None)
    with pytest.raises(SystemExit, match=r"`hf download Lin-Chen/MMStar .* and pass --data mmstar=DIR"):
        load_examples("mmstar", "test")
    with pytest.raises(SystemExit, match="--benchmark mmsta: choose among geometry3k"):
        evaluation.main(evaluation.Args(benchmark=("mmsta",)))


def test_a_copy_under_another_owner_is_taken_where_the_first_is_not_there(monkeypatch):
    first, second = SOURCES["vstar"].ids
    answers, tried = {}, []
    row = {"image": png(), "text": "Colour?", "label": "A", "category": "direct", "question_id": "1"}

    def dataset_info(self, name, **options):
        if name in answers:
            raise answers[name]("404", response=SimpleNamespace(headers={}, request=None))

    def load_dataset(name, *args, **options):
        tried.append(name)
        if name in answers:
            raise DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub or cannot be accessed.")
        return datasets.Dataset.from_list([row]).cast_column("image", IMAGE)

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    load_examples("vstar", "test")
    answers[first] = RepositoryNotFoundError
    assert load_examples("vstar", "test")[0].question == "<image>Colour?"
    assert tried == [first, second]
    answers[second] = RepositoryNotFoundError
    with pytest.raises(SystemExit, match=f"--data vstar: split 'test' cannot be loaded .*{first}.* doesn't exist"):
        load_examples("vstar", "test")
    answers[first] = GatedRepoError  # it is there, and its error says how to be let in
    with pytest.raises(SystemExit, match=f"cannot be loaded .*{first}"):
        load_examples("vstar", "test")


def test_every_set_of_the_table_is_tested_here():
    text = open(__file__, encoding="utf-8").read()
    assert all(f'"{name}"' in text for name in SOURCES)
    assert lettered("?", []) == "?"


def test_several_benchmarks_in_one_table_go_on_where_they_stopped(tmp_path, capsys, monkeypatch):
    for name in ("star", "chart"):
        (tmp_path / name).mkdir()
    picture = Image.new("RGB", (112, 112), "white")
    rows = [{"index": n, "question": "Which? A: x, B: y", "image": picture, "answer": "A", "category": "c" * n}
            for n in (1, 2, 3)]  # fmt: skip
    save(tmp_path / "star", "val", rows, image=IMAGE)
    chart = [{"type": "human_test", "question": "How much?", "answer": "3", "image": picture}]
    save(tmp_path / "chart", "test", chart, image=IMAGE)
    args = evaluation.Args(
        benchmark=(f"mmstar={tmp_path}/star", f"chartqa={tmp_path}/chart"), max_completion_length=8,
        out=str(tmp_path / "all.json"),
    )  # fmt: skip
    evaluation.main(args)
    text = capsys.readouterr().out
    assert "model  " in text and "mmstar" in text and "mmstar, mean of categories: tiny" in text
    results = json.loads((tmp_path / "all.json").read_text())["benchmarks"]
    assert results["mmstar"]["tiny"]["count"] == 3 and "accuracy" in results["chartqa"]["tiny"]
    monkeypatch.setattr(evaluation, "evaluate", lambda *a, **k: pytest.fail("finished benchmarks are kept"))
    evaluation.main(args)
    evaluation_of_one = evaluation.Args(
        data=f"mmstar={tmp_path}/star", corruptions=("fog",), severities=(5,), max_completion_length=8
    )
    monkeypatch.undo()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert "unseen" in evaluation.main(evaluation_of_one)["tiny"]
