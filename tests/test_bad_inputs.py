"""Bad inputs, each answered by one line that names what to change, at once, with nothing half-written.

A case is what stands on the command line (or in a file that it names) and words that the line must have. All are called
in this process: what is slow to start is started once.
"""

import importlib
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.data.examples import load_examples
from common.evaluation.__main__ import known_results
from common.model.load import TINY, load_policy
from common.run.settings import parse
from tests.small_models import small_folder
from tests.test_run import new_run

MODULES = {
    "evaluation": "common.evaluation.__main__", "look": "common.evaluation.look", "probes": "common.evaluation.probes",
    "study": "common.evaluation.study", "plot": "common.run.plot", "corruptions": "common.corruptions",
}  # fmt: skip

# What a script refuses before anything is loaded: flags, and words of the line.
FLAGS = [
    ("grpo --steps 0", "--steps 0: must be at least 1"),
    ("grpo --steps -5", "--steps -5: must be at least 1"),
    ("grpo --group-size 1", "--group-size 1: must be at least 2"),
    ("grpo --group-size 0", "--group-size 0: must be at least 2"),
    ("grpo --prompts-per-step 0", "--prompts-per-step 0: must be at least 1"),
    ("grpo --max-completion-length 0", "--max-completion-length 0: must be at least 1"),
    ("grpo --max-completion-length -3", "--max-completion-length -3: must be at least 1"),
    ("grpo --temperature 0", "--temperature 0.0: must be above 0"),
    ("grpo --temperature -1", "--temperature -1.0: must be above 0"),
    ("grpo --temperature nan", "--temperature nan: must be above 0, and finite"),
    ("grpo --temperature inf", "--temperature inf: must be above 0, and finite"),
    ("grpo --learning-rate -1e-6", "--learning-rate -1e-06: must be at least 0"),
    ("grpo --learning-rate inf", "--learning-rate inf: must be at least 0, and finite"),
    ("grpo --learning-rate nan", "--learning-rate nan: must be at least 0, and finite"),
    ("grpo --max-grad-norm 0", "--max-grad-norm 0.0: must be above 0"),
    ("grpo --updates-per-rollout 0", "--updates-per-rollout 0: must be at least 1"),
    ("grpo --epochs-per-rollout 0", "--epochs-per-rollout 0: must be at least 1"),
    ("grpo --advantage-eps -1", "--advantage-eps -1.0: must be at least 0"),
    ("grpo --clip-low -0.1", "--clip-low -0.1: must be at least 0"),
    ("grpo --clip-high -0.1", "--clip-high -0.1: must be at least 0"),
    ("grpo --delta 1.2", "--delta 1.2: must exceed 1 + --clip-high 0.28"),
    ("grpo --delta -3", "--delta -3.0: must be at least 0"),
    ("grpo --tis-cap -2", "--tis-cap -2.0: must be at least 0"),
    ("grpo --kl-coef -0.04", "--kl-coef -0.04: must be at least 0"),
    ("grpo --kl-coef inf", "--kl-coef inf: must be at least 0, and finite"),
    ("grpo --top-p 0", "--top-p 0.0: must be above 0 and at most 1"),
    ("grpo --top-p 1.5", "--top-p 1.5: must be above 0 and at most 1"),
    ("grpo --top-k -1", "--top-k -1: must be at least 0"),
    ("grpo --lora-rank -8", "--lora-rank -8: must be at least 0"),
    ("grpo --max-pixels -1", "--max-pixels -1: must be at least 0"),
    ("grpo --max-prompt-length -1", "--max-prompt-length -1: must be at least 0"),
    ("grpo --seed -1", "--seed -1: must be at least 0"),
    ("grpo --slots -1", "--slots -1: must be at least 0"),
    ("grpo --micro-batch-tokens 0", "--micro-batch-tokens 0: must be at least 1"),
    ("grpo --save-every 0", "--save-every 0: must be at least 1"),
    ("grpo --keep-checkpoints 0", "--keep-checkpoints 0: must be at least 1"),
    ("grpo --eval-every -1", "--eval-every -1: must be at least 0"),
    ("grpo --eval-examples 0", "--eval-examples 0: must be at least 1"),
    ("grpo --test-examples -1", "--test-examples -1: must be at least 0"),
    ("grpo --robust-examples -1", "--robust-examples -1: must be at least 0"),
    ("grpo --soft-punish-cache 72", "--soft-punish-cache 72: must be below --max-completion-length 72"),
    ("grpo --soft-punish-cache -1", "--soft-punish-cache -1: must be at least 0"),
    ("grpo --prompt-template 'Look.'", "must contain {question}"),
    ("grpo --prompt-template '<image>{question}'", "must contain {question} and not <image>"),
    ("grpo --prompt-template ''", "must contain {question}"),
    ("grpo --plan '80 TB'", "--plan 80 TB: write it like '80 GB x 1'"),
    ("grpo --plan '0 GB x 1'", "--plan 0 GB x 1: write it like"),
    ("grpo --plan '80 GB x 0'", "--plan 80 GB x 0: write it like"),
    ("grpo --model nowhere", "--model nowhere: no such folder, and not a hub id of the form owner/name"),
    ("grpo --model ''", "--model"),
    ("grpo --model .", "--model .: the folder has neither config.json nor adapter_config.json"),
    ("grpo --model runs/gone", "--model runs/gone: no such run folder"),
    ("grpo --model /a/b/c", "--model /a/b/c: no such folder"),
    ("grpo --model Qwen/No-Such-Model", "is not in the local cache and the hub cannot be reached or does not have it"),
    ("grpo --resume gone", "--resume gone: no run there (args.json is missing)"),
    ("noisy_grpo --noise-levels 0 1.5", "--noise-levels 0.0 1.5: each must be from 0 to 1"),
    ("noisy_grpo --noise-levels -0.1 0", "--noise-levels -0.1 0.0: each must be from 0 to 1"),
    ("noisy_grpo --noise-levels nan", "--noise-levels nan: each must be from 0 to 1"),
    ("noisy_grpo --noise-levels", "--noise-levels: nothing stands behind it"),
    ("noisy_grpo --prior-var 0", "--prior-var 0.0: must be above 0"),
    ("noisy_grpo --lik-alpha 0", "--lik-alpha 0.0: must be above 0"),
    ("noisy_grpo --lik-var -1", "--lik-var -1.0: must be above 0"),
    ("noisy_grpo --scale-rewards batch", "--scale-rewards batch: needs --posterior none"),
    ("noisy_grpo --scale-rewards none --posterior fixed", "--scale-rewards none: needs --posterior none"),
    ("noisy_grpo --delta 1", "--delta 1.0: must exceed 1 + --clip-high"),
    ("vppo --keep-fraction 0", "--keep-fraction 0.0: must be above 0 and at most 1"),
    ("vppo --keep-fraction 1.1", "--keep-fraction 1.1: must be above 0 and at most 1"),
    ("vppo --beta-min 2", "--beta-min 2.0: must be from 0 to 1"),
    ("vppo --beta-max 0.9", "--beta-max 0.9: must exceed --beta-min 0.9"),
    ("vppo --beta-max -1", "--beta-max -1.0: must be at least 0"),
    ("vppo --mask-prob -0.5", "--mask-prob -0.5: must be from 0 to 1"),
    ("vppo --entropy-coef nan", "--entropy-coef nan: must be at least 0, and finite"),
    ("roma --num-views 0", "--num-views 0: must be at least 1"),
    ("roma --num-views 6", "--num-views 6: from 1 to 5, the --train-corruptions to draw from"),
    ("roma --kl-view-coef -1", "--kl-view-coef -1.0: must be at least 0"),
    ("roma --aux-coef inf", "--aux-coef inf: must be at least 0, and finite"),
    ("roma --robust-examples -1", "--robust-examples -1: must be at least 0"),
    ("roma --train-corruptions rain", "--train-corruptions: corruption 'rain' is not one of"),
    ("roma --train-corruptions", "--train-corruptions: nothing stands behind it"),
    ("roma --train-severities 0", "--train-severities 0: each must be one of 1 to 5"),
    ("roma --train-severities 6", "--train-severities 6: each must be one of 1 to 5"),
    ("roma --train-severities", "--train-severities: nothing stands behind it"),
    ("roma --corrupt-rollouts", "--corrupt-rollouts: a baseline without views"),
    ("vgpo --token-clamp 2 1", "--token-clamp 2.0 1.0"),
    ("vgpo --trajectory-clamp -1 1", "--trajectory-clamp -1.0 1.0"),
    ("evaluation --samples 0", "--samples 0: must be at least 1"),
    ("evaluation --samples 4", "--samples 4: greedy answers are all the same"),
    ("evaluation --temperature -1", "--temperature -1.0: must be at least 0"),
    ("evaluation --limit -1", "--limit -1: must be at least 0"),
    ("evaluation --batch-prompts 0", "--batch-prompts 0: must be at least 1"),
    ("evaluation --out gone/r.json", "--out gone/r.json: not a file in a folder that exists"),
    ("evaluation --out .", "--out .: not a file in a folder that exists"),
    ("evaluation --out r.txt", "--out r.txt: must end in .json"),
    ("evaluation --prompt-template Look", "must contain {question}"),
    ("evaluation --benchmark mathvisto", "--benchmark mathvisto: choose among"),
    ("evaluation --corruptions rain", "--corruptions: corruption 'rain' is not one of"),
    ("evaluation --corruptions fog --severities 7", "--severities 7: each must be one of 1 to 5"),
    ("evaluation --severities 1", "--severities 1: of what? Pass --corruptions with it"),
    ("evaluation --model gone", "--model gone: no such folder"),
    ("evaluation --model tiny runs/gone", "--model runs/gone: no such run folder"),
    ("evaluation --split exam", "has no split 'exam': choose one of train"),
    ("evaluation --data gone.jsonl", "--data gone.jsonl: no such .jsonl or .parquet file"),
    ("look --limit 0", "--limit 0: must be at least 1"),
    ("look --masks 0", "--masks 0: must be at least 1"),
    ("look --mask-prob 0", "--mask-prob 0.0: must be above 0"),
    ("look --prompt-template Look", "must contain {question}"),
    ("look --split exam", "has no split 'exam'"),
    ("probes --limit 0", "--limit 0: must be at least 1"),
    ("probes --temperature nan", "--temperature nan: must be at least 0, and finite"),
    ("probes --data puzzles:hint=200", "--data puzzles:hint=200: must be puzzles, or puzzles:hint=N"),
    ("study --methods grpo.py --out s", "--methods 'grpo.py': must be `NAME: SCRIPT FLAGS`"),
    ("study --methods 'a: gone.py' --out s", "--methods 'a: gone.py': must be `NAME: SCRIPT FLAGS`, with a script"),
    ("study --methods 'a: grpo.py --stepz 1' --out s", "Unrecognized options: --stepz"),
    ("study --methods 'a: grpo.py --loss-type x' --out s", "--methods 'a: grpo.py --loss-type x': "),
    ("study --methods 'a: grpo.py' 'a: vppo.py' --out s", "there are two of the name 'a'"),
    ("study --methods 'a: grpo.py' 'b: grpo.py --data x.jsonl' --out s", "a study compares on one set"),
    ("study --methods 'a: grpo.py --data x.jsonl,y.jsonl' --out s", "they train on several sets (x.jsonl,y.jsonl); a"),
    ("study --methods 'a: grpo.py' --seeds 1 1 --out s", "--seeds 1 1: each only once"),
    ("study --methods 'a: grpo.py' --splits exam --out s", "--splits exam: choose among"),
    ("study --methods 'a: grpo.py' --limit 0 --out s", "--limit, --methods, --seeds: at least one of each"),
    ("study --methods 'a: grpo.py' --corruptions rain --out s", "--corruptions: corruption 'rain' is not one of"),
    ("plot --runs gone", "--runs gone: no metrics.jsonl with a step in it"),
    ("plot --runs .", "--runs .: no metrics.jsonl with a step in it"),
    ("corruptions --side 0", "--side 0: must be at least 1"),
    ("corruptions --seed -1", "--seed -1: must be at least 0"),
    ("corruptions --names rain", "--names: corruption 'rain' is not one of"),
    ("corruptions --image gone.png", "--image gone.png: "),
    ("corruptions --out gone/c.png", "--out gone/c.png: its folder does not exist"),
    ("corruptions --out c.txt", "--out c.txt: '.txt' is no ending of pictures"),
]

SOUND = {"image": "a.png", "question": "How many?", "answer": "3"}
# Files that --data names: their content, and words of the line. Rows are counted from 0, lines from 1.
DATA = {
    "not JSON": ("{'a': 1}", "line 1 is not a JSON object"),
    "cut off": ('{"question": "q", "ans', "line 1 is not a JSON object"),
    "a list": ('[["question", "q"], ["answer", "3"]]', "line 1 is not a JSON object: it is a list"),
    "a number": ("3", "line 1 is not a JSON object"),
    "a text": ('"abc"', "line 1 is not a JSON object"),
    "second line": ('{"question": "q", "answer": "3"}\nnothing', "line 2 is not a JSON object"),
    "not UTF-8": (b'{"question": "\xff", "answer": "3"}', "line 1 is not a JSON object"),
    "empty": ("", "no rows"),
    "blank lines": ("\n \n", "no rows"),
    "no question column": ({"image": "a.png", "answer": "3"}, "no question column; pass --question-column, one of"),
    "no answer column": ({"image": "a.png", "question": "q"}, "no answer column; pass --answer-column, one of"),
    "empty question": (SOUND | {"question": "  "}, "row 0: no question"),
    "no question in the row": (SOUND | {"question": None}, "row 0: no question"),
    "empty answer": (SOUND | {"answer": ""}, "row 0: no answer ('')"),
    "no answer in the row": (SOUND | {"answer": None}, "row 0: no answer (None)"),
    "several answers": (
        SOUND | {"answer": ["1", "2"]},
        "row 0: the answer is a list (['1', '2']); write it as one text",
    ),
    "an object as answer": (SOUND | {"answer": {"a": 1}}, "row 0: the answer is a dict"),
    "an empty box": (SOUND | {"answer": "\\boxed{}"}, "row 0: "),
    "an unknown kind": (SOUND | {"kind": "colour"}, "row 0: unknown answer kind 'colour': choose one of int"),
    "not of its kind": (SOUND | {"answer": "red", "kind": "int"}, "row 0: the answer 'red' is not of kind int"),
    "choice without choices": (SOUND | {"kind": "choice"}, "an answer of kind choice needs the options in a column"),
    "choices of no list": (SOUND | {"kind": "choice", "choices": 3}, "row 0: the options must be a list of texts"),
    "no such choice": (SOUND | {"answer": "red", "kind": "choice", "choices": ["a", "b"]}, "is not of kind choice"),
    "a letter of none": (SOUND | {"answer": "12", "kind": "letter"}, "row 0: the answer '12' is not of kind letter"),
    "a time of none": (SOUND | {"answer": "noon-ish", "kind": "time"}, "row 0: the answer 'noon-ish' is not of kind"),
    "yes or no": (SOUND | {"answer": "maybe", "kind": "yesno"}, "row 0: the answer 'maybe' is not of kind yesno"),
    "a special token": (SOUND | {"question": "<|im_end|>?"}, "row 0: the question holds <|im_end|>"),
    "an image token": (SOUND | {"question": "<|image_pad|>?"}, "row 0: the question holds <|image_pad|>"),
    "more markers than pictures": (SOUND | {"question": "<image> and <image>?"}, "row 0: 2 image markers for 1 images"),
    "a marker of none": (SOUND | {"question": "<image 2>?"}, "row 0: image markers numbered 2 for 1 images"),
    "a picture that is missing": (SOUND | {"image": "gone.png"}, "row 0: no image file 'gone.png'"),
    "a picture outside": (SOUND | {"image": "../outside.png"}, "lies outside of .; --image-root"),
    "a picture by its full path": (SOUND | {"image": "/etc/passwd"}, "lies outside of .; --image-root"),
    "a folder as picture": (SOUND | {"image": "."}, "row 0: "),
    "a text as picture": (SOUND | {"image": "rows.jsonl"}, "row 0: "),
    "a number as picture": (SOUND | {"image": 3}, "row 0: "),
    "an object as picture": (SOUND | {"image": {"bytes": 3}}, "row 0: "),
    "an empty picture": (SOUND | {"image": "empty.png"}, "row 0: image 'empty.png': not in a known format"),
    "half a picture": (SOUND | {"image": "half.png"}, "row 0: image 'half.png': image file is truncated"),
    "pictures and a missing one": (SOUND | {"image": ["a.png", "gone.png"]}, "row 0: "),
}
# Other words behind --data, and the flags beside it.
PLACES = [
    ({"data": "gone.jsonl"}, "--data gone.jsonl: no such .jsonl or .parquet file"),
    ({"data": "gone"}, "--data gone: no such .jsonl or .parquet file or folder, nor a hub id owner/name"),
    ({"data": "puzzle"}, "--data puzzle: no such"),
    ({"data": "puzzles:hint=x"}, "--data puzzles:hint=x: must be puzzles, or puzzles:hint=N"),
    ({"data": "puzzles", "split": "exam"}, "has no split 'exam': choose one of"),
    ({"data": "mathvista=gone"}, "--data mathvista=gone: no such folder"),
    ({"data": "virl39k"}, "its pictures are in images.zip"),
    ({"data": "rows.jsonl", "kind": "colour"}, "--kind colour: choose one of"),
    ({"data": "rows.jsonl", "image_root": "gone"}, "--image-root gone: no such folder"),
    ({"data": "rows.jsonl", "question_column": "ask"}, "--question-column ask: rows.jsonl has the columns"),
    ({"data": "rows.jsonl", "answer_column": "ask"}, "--answer-column ask: rows.jsonl has the columns"),
    ({"data": "rows.jsonl", "image_column": "ask"}, "--image-column ask: rows.jsonl has the columns"),
    ({"data": "table.parquet"}, "--data table.parquet: split 'train' cannot be loaded"),
    ({"data": "empty", "split": "train"}, "--data empty: split 'train' cannot be loaded"),
    ({"data": "splits", "split": "validation"}, "no validation.jsonl or validation.parquet beside train.jsonl"),
]


def change(name: str, how):
    """A damage: `how` makes another JSON content of a file of the model's folder, or other bytes."""

    def damage(folder: Path) -> None:
        path = folder / name
        if how is None:
            path.unlink()
        elif isinstance(how, bytes):
            path.write_bytes(how)
        else:
            path.write_text(json.dumps(how(json.loads(path.read_text()))))

    return damage


def with_shape(part: str, key: str, value):
    return change("config.json", lambda config: config | {part: config[part] | {key: value}})


# What is wrong with a model's folder, and words of the line.
MODELS = {
    "no config": (change("config.json", None), "the folder has neither config.json nor adapter_config.json"),
    "config cut off": (change("config.json", b'{"model_type": "qwen'), "--model "),
    "config empty": (change("config.json", b""), "--model "),
    "config a list": (change("config.json", lambda config: [1]), "--model "),
    "another family": (change("config.json", lambda config: {"model_type": "llama"}), "'llama' is not one of qwen2_vl"),
    "an unknown family": (change("config.json", lambda config: {"model_type": "sheep"}), "--model "),
    "weights missing": (change("model.safetensors", None), "--model "),
    "weights empty": (change("model.safetensors", b""), "--model "),
    "weights cut off": (change("model.safetensors", (1000).to_bytes(8, "little") + b"{}"), "--model "),
    "weights of another width": (
        with_shape("text_config", "intermediate_size", 50),
        "9 weights have other shapes, the",
    ),
    "layers missing": (with_shape("text_config", "num_hidden_layers", 4), "weights are missing, the first"),
    "another image token": (change("config.json", lambda c: c | {"image_token_id": 3}), "does not have <|image_pad|>"),
    "no tokenizer": (change("tokenizer.json", None), "its tokenizer: "),
    "tokenizer cut off": (change("tokenizer.json", b'{"version"'), "its tokenizer: "),
    "no image processor": (change("preprocessor_config.json", None), "--model "),
    "image processor cut off": (change("preprocessor_config.json", b"{"), "--model "),
    "adapter of nothing": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "names no base model"),
    "adapter of what is gone": (
        lambda folder: (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/gone/base"}'),
        "--model model: /gone/base: no such folder",
    ),
}

# What lies where an evaluation shall write, and words of the line.
RESULTS = {
    "not JSON": "nothing",
    "cut off": '{"args": {',
    "a list": "[]",
    "a number": "3",
    "other keys": '{"a": 1}',
    "models a list": '{"args": {}, "models": []}',
    "a model a number": '{"args": {}, "models": {"tiny": 3}}',
    "cells a number": '{"args": {}, "models": {"tiny": {"cells": 3}}}',
    "rows a number": '{"args": {}, "models": {"tiny": {"rows": 3}}}',
}


@pytest.fixture(scope="module", autouse=True)
def without_a_network():
    """As where the hub does not answer: no case waits for it."""
    import datasets
    import huggingface_hub

    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    yield
    huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path.parent / "cache")
    return tmp_path


def held(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


def assert_one_line(call, folder: Path, words: str) -> None:
    """The call ends the program with one line that has these words, exit code 1, and no file is new or another."""
    before = held(folder)
    with pytest.raises(SystemExit) as end:
        call()
    assert isinstance(end.value.code, str), f"exit code {end.value.code}"
    line = end.value.code
    assert words in line and "\n" not in line.strip() and len(line) < 700, line
    assert held(folder) == before


@pytest.mark.parametrize(("command", "words"), FLAGS, ids=[command for command, _ in FLAGS])
def test_flags(command, words, here):
    name, *flags = shlex.split(command)
    module = importlib.import_module(MODULES.get(name, name))

    def run():
        if name in MODULES:
            module.main(__import__("tyro").cli(module.Args, args=flags))
        else:
            module.check(parse(module.Args, flags))

    assert_one_line(run, here, words)


@pytest.mark.parametrize("flags", ["--stepz 3", "--steps x", "--loss-type mean", "--steps", "--temperature hot", "3"])
def test_what_the_command_line_cannot_read_has_exit_code_2(flags, here, capsys):
    with pytest.raises(SystemExit) as end:
        parse(importlib.import_module("grpo").Args, shlex.split(flags))
    assert end.value.code == 2 and shlex.split(flags)[0] in capsys.readouterr().err and not held(here)


@pytest.mark.parametrize("name", DATA)
def test_rows(name, here):
    content, words = DATA[name]
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(here / "a.png")
    shutil.copy(here / "a.png", here.parent / "outside.png")
    (here / "half.png").write_bytes((here / "a.png").read_bytes()[:50])
    (here / "empty.png").touch()
    content = json.dumps(content) if isinstance(content, dict) else content
    (here / "rows.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_one_line(lambda: load_examples("rows.jsonl"), here, words)


@pytest.mark.parametrize(("where", "words"), PLACES, ids=lambda value: value if isinstance(value, str) else "")
def test_places_of_data(where, words, here):
    (here / "rows.jsonl").write_text('{"question": "q", "answer": "3"}')
    (here / "table.parquet").write_text("no table")
    (here / "empty").mkdir()
    (here / "splits").mkdir()
    (here / "splits" / "train.jsonl").write_text('{"question": "q", "answer": "3"}')
    assert_one_line(lambda: load_examples(**where), here, words)


@pytest.mark.parametrize("name", MODELS)
def test_folders_of_models(name, here):
    damage, words = MODELS[name]
    shutil.copytree(small_folder("qwen3_vl"), here / "model")
    damage(here / "model")
    assert_one_line(lambda: load_policy("model"), here, words)


@pytest.mark.parametrize("name", RESULTS)
def test_files_of_results(name, here):
    (here / "r.json").write_text(RESULTS[name])
    marks = {"tiny": {"checkpoint": "tiny", "weights": ""}}
    words = "--out r.json: holds something else; name another file"
    assert_one_line(lambda: known_results("r.json", {"limit": 3}, marks), here, words)


@pytest.mark.parametrize("held_there", ["", "{", "[]", "3", "null", "\x00"])
def test_arguments_of_a_run(held_there, here):
    (here / "run").mkdir()
    (here / "run" / "args.json").write_text(held_there)
    assert_one_line(lambda: new_run("", resume="run"), here, "--resume run: run/args.json cannot be read")
    (here / "run" / "checkpoints" / "step-000001").mkdir(parents=True)
    assert_one_line(lambda: parse(importlib.import_module("grpo").Args, ["--resume", "run"]), here, "cannot be read")


def test_there_are_many():
    assert len(FLAGS) + 6 + len(DATA) + len(PLACES) + len(MODELS) + len(RESULTS) + 6 >= 150
    assert (TINY / "config.json").is_file()
