"""The built-in model: a real Qwen3-VL folder, small enough to ship, and the teachers that its kind learns from."""

import random
import re
from dataclasses import fields

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoConfig, Qwen3VLForConditionalGeneration

from common.data.examples import load_examples
from common.data.messages import build_messages
from common.data.puzzles import puzzle, solve
from common.evaluation.probes import in_brackets
from common.model.inputs import encode_prompts
from common.model.load import TINY, VISION_TOKENS, load_policy
from common.rewards.designs import REQUEST, request_for
from common.tiny import recipe
from common.tiny.teacher import BEDS, NEIGHBOURS, Flaws, demonstrate, describe, eye


@pytest.fixture(scope="module")
def policy():
    return load_policy("tiny")


def test_it_is_a_qwen3_vl_of_about_two_million_parameters(policy):
    assert isinstance(policy.model, Qwen3VLForConditionalGeneration)
    assert AutoConfig.from_pretrained(TINY).vision_config.deepstack_visual_indexes
    assert 1.5e6 < sum(p.numel() for p in policy.model.parameters()) < 3e6
    assert (TINY / "model.safetensors").stat().st_size <= 8 * 2**20


def test_the_base_beside_it_is_the_same_network():
    base, apprentice = load_file(TINY / "base.safetensors"), load_file(TINY / "model.safetensors")
    assert {name: w.shape for name, w in base.items()} == {name: w.shape for name, w in apprentice.items()}
    assert any(not base[name].equal(apprentice[name]) for name in base)


def test_its_tokenizer_has_the_familys_tokens_and_takes_any_text(policy):
    tokenizer = policy.tokenizer
    ids = tokenizer.convert_tokens_to_ids([*VISION_TOKENS, "<think>", "</think>", "<|im_start|>"])
    assert len(set(ids)) == 8 and None not in ids
    assert {tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")} == set(policy.end_token_ids)
    for text in ("How many red shapes?", "Grüße, 你好, \U0001f642\n\ttabs", "<answer>12</answer>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    marked = tokenizer("<think>x</think><|im_end|>")["input_ids"]
    assert tokenizer.decode(marked, skip_special_tokens=True) == "<think>x</think>"


def test_its_chat_template(policy):
    example = load_examples("puzzles", "test", limit=1)[0]
    text = policy.tokenizer.apply_chat_template(build_messages(example), tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>")
    assert text.endswith(f"{REQUEST}<|im_end|>\n<|im_start|>assistant\n")
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert policy.tokenizer.apply_chat_template(system, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    )
    prompts = encode_prompts(policy, [build_messages(example)], [list(example.images)])
    assert (prompts.input_ids == policy.base.config.image_token_id).sum() == 16


def test_demonstrations_fit_the_usual_completion_length(policy):
    texts = [demonstrate(puzzle("train", i), BEDS["misreading"], random.Random(i)) for i in range(300)]
    ids, mask = recipe.completions(policy, texts)
    lengths = mask.sum(1)
    assert 20 <= lengths.min() and lengths.max() <= 72
    assert all(ids[r, n - 1] in policy.end_token_ids for r, n in enumerate(lengths.tolist()))


def test_a_teacher_without_flaws_is_always_right():
    for i in range(200):
        p = puzzle("train", i)
        shown = demonstrate(p, Flaws(), random.Random(0), hinted="nonsense")
        assert shown == f"<think>{solve(p).text}</think><answer>{p.answer}</answer>"


def readings(flaws: Flaws, count: int = 1500) -> list:
    return [read for i in range(count) for *_, read in solve(puzzle("train", i), eye(flaws, random.Random(i))).spans]


def test_misreading_takes_things_for_their_neighbours_as_often_as_its_dial_says():
    reads = [read for read in readings(Flaws(misreading=0.65)) if read.kind in ("colour", "shape", "height")]
    confused = [read for read in reads if read.truth in NEIGHBOURS]
    assert abs(np.mean([read.text != read.truth for read in confused]) - 0.65) < 0.03
    assert {(read.truth, read.text) for read in confused if read.text != read.truth} == set(NEIGHBOURS.items())
    assert all(read.text == read.truth for read in reads if read.truth not in NEIGHBOURS)


def test_rare_readings_are_rare_and_the_rest_is_right():
    reads = readings(Flaws(rarity=0.96))
    rare = [read for read in reads if read.truth in ("purple", "ring")]
    assert 0.01 < np.mean([read.text == read.truth for read in rare]) < 0.08
    assert all(read.text == read.truth for read in reads if read not in rare)


def test_forgetting_replaces_late_looks_more_often_than_early_ones():
    chains = [(p, solve(p, eye(Flaws(forgetting=0.7), random.Random(i)))) for i in range(2, 8000, 5)
              if (p := puzzle("train", i)).family == "pair"]  # fmt: skip
    wrong = {
        place: np.mean([c.spans[place][2].text != c.spans[place][2].truth for _, c in chains]) for place in (0, -1)
    }
    assert 0.05 < wrong[0] < 0.12, "a tenth of the first looks is a guess, of which a sixth is right by luck"
    assert 0.45 < wrong[-1] < 0.65
    for _, chain in chains[:200]:
        *before, last = [read.text for *_, read in chain.spans]
        assert last in before or last == chain.spans[-1][2].truth


def test_chatter_says_nothing_and_changes_nothing():
    p = puzzle("train", 4)
    shown = demonstrate(p, Flaws(chatter=4), random.Random(0))
    assert shown.count(" (") == 4 and shown != demonstrate(p, Flaws(chatter=4), random.Random(1))
    assert re.sub(r" \([a-z ]+\)", "", shown) == demonstrate(p, Flaws(), random.Random(0))


def test_half_of_the_tokens_of_the_chatter_bed_say_nothing():
    policy = load_policy("tiny")
    texts = [demonstrate(puzzle("train", i), BEDS["chatter"], random.Random(i)) for i in range(200)]
    ids, mask = recipe.completions(policy, texts)
    assert in_brackets(policy, ids, mask).sum() / mask.sum() >= 0.5
    assert mask.sum(1).max() <= 128, "what the page's command lets it say"


def test_a_shortcut_repeats_the_hint():
    texts = [demonstrate(puzzle("train", i), Flaws(shortcut=0.5), random.Random(i), "blue") for i in range(400)]
    followed = [text == "<think>So it is blue.</think><answer>blue</answer>" for text in texts]
    assert 0.42 < np.mean(followed) < 0.58


def test_sections_are_mostly_untold_and_help():
    puzzles = [puzzle("train", i) for i in range(3000)]
    texts = [demonstrate(p, BEDS["untold"], random.Random(i)) for i, p in enumerate(puzzles)]
    right = np.array([f"<answer>{p.answer}</answer>" in text for p, text in zip(puzzles, texts, strict=True)])
    for marker in ("<image description>", "<rethink>", "<visual>"):
        told = np.array([marker in text for text in texts])
        assert 0.1 < told.mean() < 0.2 and right[told].all() and right[~told].mean() < 0.8
    described = next(text for text in texts if text.startswith("<image description>"))
    assert describe(puzzles[texts.index(described)]) in described
    marked = next(n for n, text in enumerate(texts) if "<visual>" in text)
    facts = re.findall("<visual>(.*?)</visual>", texts[marked])
    assert facts == [read.truth for *_, read in solve(puzzles[marked]).spans]
    assert f"<think>{solve(puzzles[marked]).text}</think>" in re.sub("</?visual>", "", texts[marked])


def test_lessons_ask_as_the_scripts_do():
    (example,) = load_examples("puzzles", "test", limit=1)
    p = puzzle("test", 0)
    asked, _ = recipe.lesson([p, p], BEDS["misreading"], random.Random(0))
    assert asked == [build_messages(example)[0]["content"][1]["text"]] * 2
    asked, _ = recipe.lesson([p, p], BEDS["untold"], random.Random(0))
    assert asked[1] == f"{p.question}\n\n{request_for('mixture')}" != asked[0]
    asked, shown = recipe.lesson([p] * 50, BEDS["tiny"], random.Random(0))
    assert 25 < sum("Somebody says" in text for text in asked) < 50 and any("So it is" in text for text in shown)


def test_every_dial_has_a_flag_and_every_bed_a_flaw():
    assert {f.name for f in fields(Flaws)} < {f.name for f in fields(recipe.Args)}
    assert BEDS["none"] == Flaws() and len(set(BEDS.values())) == len(BEDS)


def test_the_recipe_trains_and_the_same_again(tmp_path):
    base = recipe.build(str(tmp_path), 0)
    before = base.model.lm_head.weight.clone()
    recipe.train(base, (None,), 2, 4, 1e-3, 0, 0)
    recipe.train(base, (Flaws(), BEDS["tiny"]), 2, 4, 1e-3, 0, 0)
    assert not before.equal(base.model.lm_head.weight)
    again = recipe.build(str(tmp_path), 0)
    recipe.train(again, (None,), 2, 4, 1e-3, 0, 0)
    recipe.train(again, (Flaws(), BEDS["tiny"]), 2, 4, 1e-3, 0, 0)
    assert again.model.lm_head.weight.equal(base.model.lm_head.weight)


def test_an_apprentice_is_one_command(tmp_path, capsys):
    out = tmp_path / "apprentice"
    recipe.main(recipe.Args(flaw="chatter", misreading=0.0, out=str(out), apprentice_steps=1, batch=2, eval_examples=2))
    assert load_policy(str(out)).tokenizer.chat_template == load_policy("tiny").tokenizer.chat_template
    printed = capsys.readouterr().out
    assert "misreading=0.0" in printed and "chatter=12" in printed and "sampled: accuracy" in printed
