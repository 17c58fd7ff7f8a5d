"""What the benchmarks build on; their figures are printed, never asserted."""

import json

import pytest
import torch
from PIL import Image

from common.data.examples import load_examples
from common.data.puzzles import puzzle, solve
from common.model.inputs import encode_prompts
from common.model.load import load_policy
from common.model.memory import build_config
from common.model.sampling import sample, uniform_numbers
from common.model.scoring import Scorer
from common.tiny.recipe import completions
from common.tiny.teacher import describe
from tests.benchmarks import credit, exploration, first_word, grpo_step, sections
from tests.benchmarks.earlier_focus import earlier
from tests.benchmarks.random_model import SMALL, write_random_model
from tests.small_models import small_policy, small_prompts


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    write_random_model(build_config("Qwen3-VL", *SMALL), folder)
    return folder


def test_a_random_model_of_a_real_vocabulary_loads_and_samples(random_folder):
    policy = load_policy(str(random_folder))
    assert len(policy.banned) == 151936 and int((~policy.banned).sum()) <= 507
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}]
    prompts = encode_prompts(policy, [message], [[Image.effect_noise((1024, 1024), 80).convert("RGB")]])
    assert (prompts.input_ids == policy.base.config.image_token_id).sum() == 1024, "32 pixels a token each way"
    rollout = sample(policy, prompts, 2, 3, uniform_numbers(0, 0, range(2), 3))
    assert not policy.banned[rollout.completion_ids].any()
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_step_is_timed_on_it(random_folder, lora_rank, capsys, monkeypatch):
    monkeypatch.setattr(grpo_step, "rates", lambda policy: (1e12, 1e12))
    grpo_step.main(grpo_step.Options(str(random_folder), prompts=2, group=2, tokens=4, steps=2, lora_rank=lora_rank))
    printed = capsys.readouterr().out
    assert "floor of score" in printed and float(printed.split("mismatch: ")[1].split(",")[0]) < 1e-4


def test_the_word_that_decides_to_look_or_not_is_among_the_most_dependent(capsys):
    figures = first_word.main(first_word.Args(prompts=8, group_size=4, fractions=(0.4,)))
    assert figures["repeat the hint"]["share"] + figures["look"]["share"] == 1
    assert figures["repeat the hint"]["dependency"] < figures["look"]["dependency"]
    assert "first word kept at 0.4" in capsys.readouterr().out


def test_what_methods_give_to_tokens_that_read_the_picture(tmp_path):
    credit.main(credit.Options(tmp_path / "credit.json", puzzles=6, group_size=2))
    figures = json.loads((tmp_path / "credit.json").read_text())["figures"]
    given, tokens, completions = credit.weights(credit.Options(tmp_path, puzzles=6, group_size=2))
    reads, right = tokens["readings"], completions["right"]
    assert 0 < reads.sum() < tokens["other tokens"].sum() and not (reads & tokens["other tokens"]).any()
    assert "chatter" not in tokens, "the built-in model says nothing in brackets"
    kept = given["VPPO: share that the filter keeps"]
    assert figures["VPPO: share that the filter keeps"]["readings"]["mean"] == pytest.approx(
        float(kept[reads].double().mean())
    )
    factor = given["VGPO: trajectory factor"]
    assert figures["VGPO: trajectory factor"]["right"]["mean"] == pytest.approx(float(factor[right].double().mean()))


def test_readings_that_are_rare_are_counted_apart(tmp_path):
    policy, examples = load_policy("tiny"), [load_examples("puzzles", "test", limit=1)[0]]
    chain = "<think>yellow circle at {}. 2 right is d4. 2 up is b4. b4 is {}.</think>"
    texts = [chain.format(*said) for said in (("d2", "purple"), ("d3", "purple"), ("d2", "blue"))]
    ids, _ = completions(policy, texts)
    found = exploration.counts(policy, examples, ids, size=3)
    assert found["rare"].tolist() == [[3, 2]] and not found["others"].any(), "of places nothing is counted"
    options = exploration.Options(
        tmp_path / "e.json", "tiny", noise=(0.0, 0.9), temperatures=(), puzzles=10, group_size=2
    )
    figures = exploration.main(options)
    assert figures["noise 0.9"]["answers"]["mean"] < figures["noise 0"]["answers"]["mean"]
    assert json.loads((tmp_path / "e.json").read_text())["figures"] == figures


def test_sections_are_judged_by_what_was_asked_read_and_concluded(tmp_path):
    p = puzzle("test", 0)
    truth, chain = solve(p), "yellow circle at d2. 1 right is d3. 2 up is b3. b3 is purple."
    described = f"<image description>{describe(p)}; d3 red star</image description>"
    texts = [
        f"{described}<think>{truth.text}</think><rethink>{chain}</rethink><answer>purple</answer>",
        f"<think>{chain.replace('d2', 'd1')}</think><answer>blue</answer>",
    ]
    found = {name: own.tolist() for name, own in sections.counts([p], texts).items()}
    things = len(p.things)
    assert found == {
        "answers, described and second look": [[1, 1]],
        "answers, neither": [[0, 1]],
        "description, things": [[things, things]],
        "think, described, as asked": [[1, 1]],
        "think, described, readings": [[2, 2]],
        "think, described, concluded": [[1, 1]],
        "think, described, answered": [[1, 1]],
        "second look, as asked": [[0, 1]],
        "second look, readings": [[2, 2]],
        "second look, concluded": [[1, 1]],
        "second look, answered": [[1, 1]],
        "think, not described, as asked": [[0, 1]],
        "think, not described, readings": [[1, 2]],
        "think, not described, concluded": [[1, 1]],
        "think, not described, answered": [[0, 1]],
    }
    for n in range(60):
        p = puzzle("test", n)
        assert all(right == count for right, count in sections.judge(p, solve(p).text).values()), solve(p).text
    options = sections.Options(("mine: tiny",), tmp_path / "s.json", puzzles=6, group_size=2)
    figures = sections.main(options)
    assert list(figures) == ["mine"] and json.loads((tmp_path / "s.json").read_text())["figures"] == figures


def test_an_interval_is_over_puzzles():
    """Each puzzle's rows agree, so that there are two draws and not eight: all of one kind with a chance of a half."""
    values = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    found = credit.mean(values, torch.ones(8, dtype=torch.bool), puzzles=2, seed=0)
    assert found == {"mean": 0.5, "ci": [0.0, 1.0]}


def test_the_earlier_states_are_those_that_predict_the_tokens():
    policy = small_policy()
    prompts, _, _ = small_prompts(policy)
    ids = torch.randint(0, 256, (2 * len(prompts), 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        scores = Scorer(policy)(prompts, ids, mask)
    assert torch.allclose(earlier(scores.states, scores.prompt_states), scores.hidden, atol=1e-5)
    assert not torch.allclose(scores.states, scores.hidden, atol=1e-2)
