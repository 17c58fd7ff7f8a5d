"""Reward designs: worked completions, what each section earns, what prompts ask for, and anything a model writes."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo
from common.model.load import load_policy
from common.rewards.answers import score
from common.rewards.designs import (
    DESIGNS,
    check_markers,
    check_tokenizer,
    design_rewards,
    load_encoder,
    overlong_penalty,
    partial_credit,
    request_for,
    reward_completions,
    section_scores,
    semantic_score,
    sentence_score,
    sentences,
    similarities,
)
from common.run.checkpoints import settings_of
from tests.small_models import small_policy

PAPERS = ("vanilla", "only_accuracy", "mixture", "continuous", "visual_fusion", "no_accuracy")
DESC = (
    "<image description>The clock is round. The hour hand is between 2 and 3. The minute hand is at 9."
    "</image description>"
)
THINK = "<think>The time is 2:45. Adding 1 hour 10 minutes gives 3:55.</think>"
RE = "<rethink>2:45 plus 70 minutes is 3:55.</rethink>"
RIGHT = "<answer>3:55</answer>"
VISUAL = (
    "<think><visual>The hour hand is near 3. The minute hand is on 9.</visual> So it is 2:45. Then it becomes 3:55."
    "</think>"
)
WORKED = [
    (DESC + THINK + RE + RIGHT, (0.996403, 1, 0.978472, 0.978472, 0.896403, 0.916203)),
    (DESC + THINK + RE + "<answer>3:45</answer>", (0.096403, 0, 0.178472, 0.778472, 0.096403, 0.916203)),
    (THINK + RIGHT, (0.996403, 1, 0.857842, 0.857842, 0.896403, 0.389208)),
    ("3:55", (0, 0, 0, 0, 0, 0)),
    (RIGHT, (0.9, 1, 0.8, 0.8, 0.8, 0.1)),
    ("<think>I look. I look. I look.</think>" + RIGHT, (0.879757, 1, 0.787854, 0.787854, 0.779757, 0.039270)),
    (VISUAL + RIGHT, (0.999933, 1, 0.859960, 0.859960, 0.996336, 0.399799)),
    ("<think>The clock shows", (0, 0, 0, 0, 0, 0)),
    ("<think>One.</think><think>Two.</think>" + RIGHT, (0.9, 1, 0.8, 0.8, 0.8, 0.1)),
    (RIGHT + THINK, (0.096403, 0, 0.057842, 0.057842, 0.096403, 0.289208)),
    (DESC + THINK + RE, (0.096403, 0, 0.178472, 0.178472, 0.096403, 0.816203)),
    (DESC + THINK + RE + "<answer>3:55 or 3:45</answer>", (0.096403, 0, 0.178472, 0.178472, 0.096403, 0.916203)),
    ("<think></think><answer>2:50</answer>", (0, 0, 0, 0.62, 0, 0.1)),
]


def rewards(design, completions, gold="3:55", kind="time"):
    examples = [SimpleNamespace(answer=gold, kind=kind, choices=None)] * len(completions)
    accuracy, _ = score(completions, examples, "tag")
    return design_rewards(design, completions, examples, accuracy)


@pytest.mark.parametrize("number", range(len(WORKED)))
def test_worked_completions(number):
    completion, expected = WORKED[number]
    for design, reward in zip(PAPERS, expected, strict=True):
        (got,), terms = rewards(design, [completion])
        assert got == pytest.approx(reward, abs=1e-6), design
        assert got == pytest.approx(sum(DESIGNS[design][name] * terms[name][0] for name in terms))


def test_worked_advantages_of_a_group():
    group = [WORKED[i][0] for i in (0, 1, 2, 11)]
    expected = {
        "vanilla": (0.865859, -0.865859, 0.865859, -0.865859),
        "only_accuracy": (0.865875, -0.865875, 0.865875, -0.865875),
        "mixture": (1.000396, -0.860124, 0.719851, -0.860124),
        "continuous": (0.786335, 0.224983, 0.447754, -1.459072),
        "visual_fusion": (0.865838, -0.865838, 0.865838, -0.865838),
        "no_accuracy": (0.499810, 0.499810, -1.499431, 0.499810),
    }
    for design, advantages in expected.items():
        got = grpo.group_advantages(torch.tensor(rewards(design, group)[0]), 4, "group", 1e-4)
        torch.testing.assert_close(got, torch.tensor(advantages), atol=5e-6, rtol=0)


def test_equal_rewards_give_no_advantage_and_small_differences_a_large_one():
    assert (grpo.group_advantages(torch.full((8,), 0.761594), 8, "group", 0.0) == 0).all()
    small = torch.tensor([0.199267, 0.199524, 0.199901, 0.199011])
    for eps, expected in ((1e-4, (-0.330, 0.205, 0.990, -0.865)), (1e-6, (-0.416, 0.258, 1.248, -1.090))):
        torch.testing.assert_close(
            grpo.group_advantages(small, 4, "group", eps), torch.tensor(expected), atol=3e-3, rtol=0
        )


def test_weights_sum_to_one():
    for design in PAPERS:
        assert sum(DESIGNS[design].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("distinct", "repeated", "expected"),
    [(0, 0, 0), (1, 0, 0.761594), (2, 0, 0.964028), (3, 0, 0.995055), (4, 0, 0.999329), (1, 1, 0), (1, 2, -0.202434),
     (2, 1, 0.202434), (3, 3, 0)],
)  # fmt: skip
def test_section_scores_have_the_worked_numbers(distinct, repeated, expected):
    text = " ".join(f"Sentence {n}." for n in range(distinct)) + " Sentence 0." * repeated
    assert sentence_score(text) == pytest.approx(expected, abs=1e-6)


def test_how_sentences_are_counted():
    assert sentences("It is 2.5 cm. Yes!\n1. First\n- second one") == ["it is 2.5 cm", "yes", "first", "second one"]
    assert sentences("看。再看！") == ["看", "再看"]
    assert sentences("A  dog.\n\ta DOG?\n...\n!") == ["a dog", "a dog"]
    assert sentences("Here <visual>a cat.</visual> sits.") == ["here a cat", "sits"]


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [("3:55", "3:55", 1), ("3:55", "3:45", 0.75), ("3:55", "2:55", 0.9), ("3:55", "4:05", 0.65), ("3:55", "5:55", 0.8),
     ("3:55", "6:55", 0.5), ("3:55", "3:44", 0.5), ("3:55", "9:25", 0), ("0:37", "11:40", 0.825), ("0:37", "12:37", 1),
     ("11:58", "0:02", 0.8), ("3:00", "2:59", 0.875), ("3:55", "noon", 0)],
)  # fmt: skip
def test_partial_credit_of_times(gold, answer, expected):
    assert partial_credit(answer, gold, "time") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("7", 1), ("8", 0.5), ("5", 1 / 3), ("6.5", 2 / 3), ("12", 1 / 6), ("13", 0), ("-7", 0), ("seven", 0), ("1e9", 0)],
)
def test_partial_credit_of_numbers(answer, expected):
    for kind in ("int", "float3", "math"):
        assert partial_credit(answer, "7", kind) == pytest.approx(expected)
    assert partial_credit(answer, "7", "exact") == 0


def test_overlong_penalty_is_part_of_the_reward():
    lengths = torch.tensor([10, 16, 17, 18, 20, 21])
    assert overlong_penalty(lengths, 20, 4).tolist() == [0, 0, -0.25, -0.5, -1, -1]


# ----------------------------------------------------------------------------------------------------------- properties

PIECES = st.sampled_from(
    ["<think>", "</think>", "<THINK>", "<rethink>", "</rethink>", "<visual>", "</visual>", "<answer>", "</answer>",
     "<image description>", "</image description>", "3:55", "\\boxed{", "}", "{", "$", "^", "\\", "İ", "９", "。", "a.",
     " b! ", "\n- ", "𝟛", "\u200b"]
)  # fmt: skip
TEXTS = st.lists(PIECES, max_size=14).map("".join)


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_any_text_is_scored_within_bounds(text):
    low = {"vanilla": -0.024, "only_accuracy": 0, "mixture": -0.048, "continuous": -0.048, "visual_fusion": -0.048,
           "no_accuracy": -0.215}  # fmt: skip
    accuracy, _ = score([text], [SimpleNamespace(answer="3:55", kind="time", choices=None)], "tag")
    for design in PAPERS:
        (reward,), terms = rewards(design, [text])
        assert low[design] - 1e-9 <= reward <= 1 + 1e-9
        if design == "only_accuracy":
            assert reward == accuracy[0]
        if design == "vanilla":
            (other,), _ = rewards(design, [text], gold="9:99x", kind="exact")
            assert reward - 0.9 * accuracy[0] == pytest.approx(other), "the rest does not depend on the gold"
        assert set(terms) == set(DESIGNS[design])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["A cat.", "A dog.", "Two birds.", "Nothing."]), max_size=6))
def test_repeating_never_pays_and_something_new_never_costs(said):
    score_of = sentence_score(" ".join(said))
    if said:
        assert sentence_score(" ".join([*said, said[0]])) <= score_of
    assert sentence_score(" ".join([*said, "Something new."])) >= score_of


def test_swapping_golds_moves_the_answers_of_their_groups_only():
    completions = [THINK + RIGHT, RIGHT, THINK, THINK + "<answer>1:00</answer>"]

    def terms(golds):
        examples = [SimpleNamespace(answer=g, kind="time", choices=None) for g in golds]
        accuracy, _ = score(completions, examples, "tag")
        return design_rewards("mixture", completions, examples, accuracy)[1]

    one, other = terms(["3:55", "3:55", "1:00", "1:00"]), terms(["1:00", "1:00", "3:55", "3:55"])
    assert one["answer"] == [1, 1, 0, 1] and other["answer"] == [0, 0, 0, 0]
    assert all(one[name] == other[name] for name in one if name != "answer")


# -------------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("design", ["accuracy", *DESIGNS])
def test_the_prompt_asks_for_what_is_paid(design):
    check_markers(design, "{question} {request}")
    assert request_for(design) in grpo.Args(model="some/hub-model", reward=design).prompt_template
    assert request_for(design, tiny=True) in grpo.Args(model="tiny", reward=design).prompt_template
    assert ("<" in request_for(design)) == (design != "accuracy"), "tags only where they are paid for"
    asked = [request_for(design).rfind(f"<{name}>") for name in ("image description", "think", "rethink", "answer")]
    assert [place for place in asked if place >= 0] == sorted(place for place in asked if place >= 0)


def test_hub_models_are_asked_for_plain_words_and_a_box():
    """What they can do from the start; and an evaluation asks the same as training."""
    asked = grpo.Args(model="some/hub-model").prompt_template
    assert asked == "{question}\n\nReason step by step, then give only the final answer in \\boxed{}."
    assert settings_of("some/hub-model")["prompt_template"] == asked
    example = SimpleNamespace(answer="7", kind="int", choices=None)
    assert reward_completions("accuracy", ["3 + 4 = 7, so \\boxed{7}."], [example]).rewards == [1.0]


def test_a_template_without_a_paid_marker_is_refused():
    with pytest.raises(SystemExit, match=r"--prompt-template .*: --reward mixture pays for <rethink>, which it lacks"):
        check_markers("mixture", "{question} <image description> <think> <answer>")
    check_markers("accuracy", "{question}")


def test_tokenizers_write_every_marker():
    for policy in (small_policy(), load_policy("tiny")):
        for design in DESIGNS:
            check_tokenizer(design, policy.tokenizer)
    lossy = SimpleNamespace(encode=lambda text, add_special_tokens: [1], decode=lambda ids, skip_special_tokens: "a")
    with pytest.raises(SystemExit, match="--reward vanilla: the tokenizer makes 'a' of '<think>a</think>'"):
        check_tokenizer("vanilla", lossy)


# ---------------------------------------------------------------------------------------------- answers in free words


class Encoder:
    """Texts with the same first letter mean the same."""

    def encode(self, texts, normalize_embeddings):
        assert normalize_embeddings
        return np.array([np.eye(27)[ord(t[0].lower()) - 96 if t else 0] for t in texts])


def test_semantic_rewards(monkeypatch):
    monkeypatch.setattr("common.rewards.designs.load_encoder", lambda name: Encoder())
    examples = [SimpleNamespace(answer=a, kind="exact", choices=c) for a, c in (
        ("a dog", None), ("a dog", None), ("a dog", None), ("yes", None), ("cat", ["cat", "dog"]), ("a dog", None)
    )]  # fmt: skip
    completions = [
        "<think>x</think> <answer>an animal</answer>", "<think>x</think><answer>bird</answer>",
        "<answer>a dog</answer>", "<think>x</think><answer>Yes, it is</answer>", "<think>x</think><answer>A</answer>",
        "nothing",
    ]  # fmt: skip
    got, terms = design_rewards("semantic", completions, examples, [0.0] * 6, "any")
    assert terms["answer"] == [1, 0, 1, 1, 1, 0] and terms["format"] == [1, 1, 0, 1, 1, 0]
    assert got == [2, 1, 1, 2, 2, 0]
    assert similarities(["ant"], ["ape"], Encoder()) == [1.0]


@pytest.mark.parametrize("answer", ["b", "(B)", "B. cat", "cat"])
def test_a_right_letter_is_right_in_any_form_for_semantic_rewards_too(answer):
    example = SimpleNamespace(answer="B", kind="letter", choices=["dog", "cat", "cow", "pig"])
    assert semantic_score(answer, example, 0.3) == 1 and semantic_score("cow", example, 0.3) == 0
    example.choices = None  # as where a question brings its options in its text
    assert semantic_score("(B)", example, 0.3) == 1


def test_without_the_package_it_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    load_encoder.cache_clear()
    with pytest.raises(SystemExit, match="--reward semantic: needs the package sentence-transformers"):
        load_encoder("any")


@pytest.mark.parametrize("script", ["grpo", "roma"])
def test_a_run_logs_its_sections(script, tmp_path):
    module = __import__(script)
    args = module.Args(
        reward="mixture", steps=1, prompts_per_step=2, group_size=4, test_examples=0, eval_every=0,
        soft_punish_cache=30, out=str(tmp_path / "run"),
    )  # fmt: skip
    module.main(args)
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(line)
    names = {f"rewards/{name}/mean" for name in DESIGNS["mixture"]}
    assert names < set(metrics) and 0 <= metrics["frac_accuracy_constant"] <= 1
    earned = sum(DESIGNS["mixture"][name] * metrics[f"rewards/{name}/mean"] for name in DESIGNS["mixture"])
    assert metrics["reward"] <= earned + 1e-6, "some completions come near the limit"
    assert section_scores("vanilla", THINK + RIGHT, None, True)["answer"] == 1
