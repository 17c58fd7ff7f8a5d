"""Several data sets as one."""

import json
from collections import Counter

import pytest

import grpo
from common.data.lengths import leave_out_long
from common.data.messages import TEMPLATE
from common.data.mixture import Mixture
from common.data.prompts import load_splits
from common.model.load import load_policy


def file(folder, name: str, count: int) -> str:
    rows = [{"question": f"{name} {n}?", "answer": "1", "category": "theirs"} for n in range(count)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / f"{name}.jsonl")


def splits(*names: str, **settings):
    return load_splits(grpo.Args(data=", ".join(names), steps=1, **settings))


def test_weights_are_shares_and_every_example_is_drawn(tmp_path):
    """The set of 12 stands there once, that of 3 twice: 12 to 6."""
    large, small = file(tmp_path, "large", 12), file(tmp_path, "small", 3)
    train, held_out, test = splits(large, small, data_weights=(2, 1), eval_examples=4)
    assert Counter(e.question for e in train) == {f"large {n}?": 1 for n in range(12)} | {
        f"small {n}?": 2 for n in range(3)
    }
    assert {e.group for e in train} == {large, small} and train[17].id == f"{small} 2"
    # Evaluations take as many examples of each, and every one once.
    assert [e.question for e in held_out] == ["large 0?", "large 1?", "small 0?", "small 1?"]
    assert len(test) == 15 and test.sizes == [0] * 15
    with pytest.raises(IndexError):
        train[18]


def test_without_weights_sets_stand_one_behind_the_other(tmp_path):
    train, *_ = splits("puzzles", file(tmp_path, "own", 2))
    assert len(train) == 1_000_002 and train[1_000_000].question == "own 0?" and len(train[0].images) == 1
    assert len(train.sizes) == len(train) and train.sizes[-1] == 0


def test_as_many_weights_as_sets(tmp_path):
    with pytest.raises(SystemExit, match=r"--data-weights 1: 1 for 2 sets in --data puzzles, puzzles:hint=75"):
        splits("puzzles", "puzzles:hint=75", data_weights=(1,))


def test_long_prompts_are_left_out_of_each_set(tmp_path, capsys):
    path = file(tmp_path, "one", 3)
    (tmp_path / "two.jsonl").write_text(
        json.dumps({"question": "how many? " * 300, "answer": "1"})
        + "\n"
        + json.dumps({"question": "?", "answer": "1"})
    )
    train, *_ = splits(path, str(tmp_path / "two.jsonl"))
    assert isinstance(train, Mixture) and len(train) == 5
    leave_out_long(train, load_policy("tiny"), TEMPLATE, 100, 72)
    assert len(train) == 4 and "two.jsonl: 1 of 2 prompts have more than 100 tokens" in capsys.readouterr().out
