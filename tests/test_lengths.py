"""Prompts that are too long: measured as they are encoded, left out, counted and named."""

import json

import pytest

from common.data.examples import load_examples
from common.data.lengths import leave_out_long, prompt_length
from common.data.messages import TEMPLATE, build_messages
from common.evaluation import __main__ as evaluation
from common.evaluation import look
from common.model.inputs import encode_prompts
from common.model.load import load_policy
from tests.small_models import picture


@pytest.fixture(scope="module")
def policy():
    return load_policy("tiny")


def write(folder, *rows):
    for number, size in enumerate(((40, 30), (300, 200), (33, 500))):
        picture(*size, number).save(folder / f"{number}.png")
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps({"answer": "1", **row}) + "\n" for row in rows))
    return str(path)


SHORT = {"image": "0.png", "question": "How many?"}
LARGE = {"image": ["1.png", "2.png"], "question": "Is <image 2> like <image 1>?"}
LONG = {"image": None, "question": "how many circles? " * 300}


def test_a_prompt_is_as_long_as_it_is_encoded(policy, tmp_path):
    accents = {"image": None, "question": "é\u0301\u0958\u0344 " * 50}  # the tokenizer's NFC changes their bytes
    examples = load_examples(write(tmp_path, SHORT, LARGE, LONG, accents))
    for example in examples:
        prompts = encode_prompts(policy, [build_messages(example)], [list(example.images)])
        assert prompt_length(policy, example, TEMPLATE) == prompts.input_ids.shape[1]


def test_prompts_above_the_limit_are_left_out_counted_and_named(policy, tmp_path, capsys):
    path = write(tmp_path, SHORT, LONG, LARGE)
    lengths = [prompt_length(policy, example, TEMPLATE) for example in load_examples(path)]
    short, long, large = lengths
    assert short < large < long
    examples = leave_out_long(load_examples(path), policy, TEMPLATE, large, 8)
    assert [len(example.images) for example in examples] == [1, 2] and examples.sizes == [1200, 60_000 + 16_500]
    line = f"--data {path}: 1 of 3 prompts have more than {large:,} tokens (row 1: {long:,}) and are left out"
    assert line in capsys.readouterr().out
    assert len(leave_out_long(load_examples(path), policy, TEMPLATE, large - 1, 8)) == 1
    with pytest.raises(SystemExit, match=rf"3 of 3 prompts .*\(row 0: {short}, .* raise --max-prompt-length"):
        leave_out_long(load_examples(path), policy, TEMPLATE, short - 1, 8)


def test_without_a_limit_it_is_what_the_context_leaves_beside_a_completion(policy, tmp_path, capsys):
    path = write(tmp_path, SHORT, LONG)
    length = prompt_length(policy, load_examples(path)[1], TEMPLATE)
    context = policy.base.config.get_text_config().max_position_embeddings
    assert len(leave_out_long(load_examples(path), policy, TEMPLATE, 0, context - length)) == 2
    assert capsys.readouterr().out == ""
    assert len(leave_out_long(load_examples(path), policy, TEMPLATE, 0, context - length + 1)) == 1
    with pytest.raises(SystemExit, match=f"--max-completion-length {context}: the model's context has {context}"):
        leave_out_long(load_examples(path), policy, TEMPLATE, 0, context)


def test_puzzles_are_short(policy):
    puzzles = load_examples("puzzles")
    assert leave_out_long(puzzles, policy, TEMPLATE, 0, 72) is puzzles
    assert leave_out_long([], policy, TEMPLATE, 0, 72) == [], "no evaluation, no examples"


def test_evaluations_leave_them_out_where_asked_to(policy, tmp_path, capsys):
    """By the tokens of the first model, so that all models answer the same examples."""
    path = write(tmp_path, SHORT, LONG, LARGE)
    asked = {"data": path, "max_completion_length": 2, "prompt_template": TEMPLATE}
    asked |= {"max_prompt_length": prompt_length(policy, load_examples(path)[0], TEMPLATE)}
    out = tmp_path / "r.json"
    result = evaluation.main(evaluation.Args(**asked, out=str(out)))
    assert [row["id"] for row in result["tiny"]["rows"]] == ["0"]
    assert "2 of 3 prompts have more than" in capsys.readouterr().out
    looked = look.main(look.Args(**asked, out=str(tmp_path / "look")))
    assert looked and "1 examples; late" in capsys.readouterr().out

    held = json.loads(out.read_text())
    del held["args"]["max_prompt_length"]  # as before there was such a flag, when none were left out
    out.write_text(json.dumps(held))
    with pytest.raises(SystemExit, match="--max-prompt-length was 0 there and is"):
        evaluation.main(evaluation.Args(**asked, out=str(out)))
    evaluation.main(evaluation.Args(**asked | {"max_prompt_length": 0}, limit=1, out=str(out)))
