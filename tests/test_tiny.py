"""The built-in model: a real Qwen3-VL folder, small enough to ship."""

import pytest
from transformers import AutoConfig, Qwen3VLForConditionalGeneration

from common.data.examples import load_examples
from common.data.prompts import build_messages
from common.data.puzzles import puzzle
from common.model.load import TINY, VISION_TOKENS, encode_prompts, load_policy
from common.rewards.designs import REQUEST
from common.tiny import recipe


@pytest.fixture(scope="module")
def policy():
    return load_policy("tiny")


def test_it_is_a_qwen3_vl_of_about_two_million_parameters(policy):
    assert isinstance(policy.model, Qwen3VLForConditionalGeneration)
    assert AutoConfig.from_pretrained(TINY).vision_config.deepstack_visual_indexes
    assert 1.5e6 < sum(p.numel() for p in policy.model.parameters()) < 3e6
    assert (TINY / "model.safetensors").stat().st_size <= 8 * 2**20
    assert recipe.REQUEST == REQUEST, "it was trained on the request that the scripts make"


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


def test_demonstrations_take_twenty_to_sixty_tokens(policy):
    ids, mask = recipe.completions(policy, recipe.demonstrations([puzzle("train", i) for i in range(300)]))
    lengths = mask.sum(1)
    assert 20 <= lengths.min() and lengths.float().quantile(0.99) <= 72
    assert all(ids[r, n - 1] in policy.end_token_ids for r, n in enumerate(lengths.tolist()))


def test_the_recipe_trains(tmp_path):
    args = recipe.Args(out=str(tmp_path), describe_steps=2, steps=2, more_steps=1, batch=4)
    fresh = recipe.build(str(tmp_path), 0)
    before = fresh.model.lm_head.weight.clone()
    for stage in range(3):
        recipe.train(args, fresh, stage)
    assert not before.equal(fresh.model.lm_head.weight)


def test_it_looks_at_the_picture(policy):
    """With blank pictures it is hardly better than a guess."""
    sighted = recipe.accuracy(policy, "test", 100, 0.0, "<think>Look:")["accuracy"]
    blank = recipe.accuracy(policy, "test", 100, 0.0, "<think>Look:", blank=True)["accuracy"]
    assert blank < 0.3 < sighted - 0.2
