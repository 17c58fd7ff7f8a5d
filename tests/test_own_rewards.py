"""Rewards of one's own: the functions in examples/, and what goes wrong in a file."""

import json

import pytest

import grpo
from common.data.examples import Example
from common.rewards.designs import check_reward, reward_completions
from common.run.settings import check_settings
from examples.rewards import box_iou, closeness, json_field
from tests.small_models import picture
from tests.test_training import train

BOX = Example((picture(40, 40, 0),), "<image>Where is the dog?", "0, 0, 10, 20", "exact")


def answers(*texts: str) -> list[str]:
    return [f"<think>a dog</think><answer>{text}</answer>" for text in texts]


def test_boxes_earn_their_overlap():
    """The same box; one half beside it, 100 of 300 pixels shared; one outside the picture; three numbers; nothing."""
    found = [*answers("[0, 0, 10, 20]", "5,0,15,20", "50, 0, 60, 20", "0, 0, 10"), "a dog"]
    rewards, terms = box_iou(found, [BOX] * 5)
    assert rewards == pytest.approx([1, 1 / 3, 0, 0, 0]) and terms == {"inside_picture": [1, 1, 0, 0, 0]}


def test_a_field_of_json_is_compared():
    example = Example((), "What is written?", "12 EUR", "exact")
    found = [
        '{"answer": "12 EUR"}',
        'It is\n```json\n{"answer": "12 USD", "sure": true}\n```',
        '{"answer": 12',
        "12 EUR",
    ]
    assert json_field(found, [example] * 4) == [1.0, 0.1, 0.0, 0.0]


def test_near_numbers_earn_more_than_far_ones():
    example = Example((), "How much?", "-8", "math")
    assert closeness(answers("-8", "-6", "-7.5", "8", "6 or 7", ""), [example] * 6) == [1, 0.75, 0.9375, 0, 0, 0]


def test_a_run_is_rewarded_by_a_function(tmp_path):
    """Of four files of boxes; terms are logged, and preflight finds nothing to stop for."""
    picture(40, 40, 0).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": "where is the circle?", "answer": f"0, 0, {n + 1}, 20"} for n in range(4)]
    (tmp_path / "boxes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data", str(tmp_path / "boxes.jsonl"), "--kind", "exact", "--reward", "examples/rewards.py:box_iou"]
    train(tmp_path / "run", *flags, "--steps", "1", "--preflight", "--max-completion-length", "8")
    (line,) = (json.loads(text) for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert 0 <= line["reward"] <= 1 and line["rewards/inside_picture/mean"] >= 0


@pytest.mark.parametrize("code, error", [
    ("def reward(c, e:", r"cannot be run: SyntaxError: .*"),
    ("import nothing_of_that_name", r"cannot be run: ModuleNotFoundError: .*\(.*own.py, line 1\)"),
    ("def rewards(c, e): pass", "has no function reward; it has rewards"),
    ("reward = 3", "has no function reward; it has none"),
    ("def reward(c, e):\n    return [e[0].picture] * 2", r"AttributeError: .*'picture' \(.*own.py, line 2\)"),
    ("def reward(c, e): return [1.0]", "rewards: 1 numbers for 2 completions"),
    ("def reward(c, e): return None", "rewards: 'NoneType' object is not iterable"),
    ("def reward(c, e): return [1, 'good']", "rewards: could not convert string to float: 'good'"),
    ("def reward(c, e): return [0, float('nan')]", "rewards: nan is not a finite number"),
    ("def reward(c, e): return [0, 1], [0, 1]", "its terms are a list, and must be a dictionary of lists"),
    ("def reward(c, e): return [0, 1], {'iou': [0]}", "the term iou: 1 numbers for 2 completions"),
])  # fmt: skip
def test_what_is_wrong_is_said_in_one_line_before_anything_starts(code, error, tmp_path):
    (tmp_path / "own.py").write_text(code)
    with pytest.raises(SystemExit, match=f"^--reward .*own.py:reward: .*{error}$"):
        check_reward(f"{tmp_path}/own.py:reward", BOX)


def test_other_names_are_named():
    with pytest.raises(SystemExit, match="there is no file nowhere"):
        check_settings(grpo.Args(reward="nowhere.py:reward"))
    with pytest.raises(SystemExit, match="--reward acuracy: must be one of accuracy, vanilla"):
        check_settings(grpo.Args(reward="acuracy"))


def test_rewards_and_terms_come_back_as_numbers(tmp_path):
    (tmp_path / "two.py").write_text("import torch\ndef r(c, e): return torch.tensor([1, 2]), {'half': [True, 0]}")
    found = reward_completions(f"{tmp_path}/two.py:r", answers("0, 0, 10, 20", "1"), [BOX] * 2)
    assert found.rewards == [1.0, 2.0] and found.terms == {"half": [1.0, 0.0]} and found.accuracy == [1.0, 0.0]
