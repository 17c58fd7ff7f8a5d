"""Loading: the built-in model, folders, hub names; encoding prompts without a processor."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from common.model.inputs import encode_prompts
from common.model.load import check_model, load_policy, save_policy
from common.model.scoring import Scorer
from tests.small_models import FAMILIES, picture, small_folder, small_policy, small_prompts


def scores(policy):
    prompts, _, _ = small_prompts(policy)
    ids = torch.arange(30).view(6, 5) + 60
    return Scorer(policy)(prompts, ids, torch.ones_like(ids, dtype=torch.bool)).logprobs


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_policy_loads_to_the_same_scores(family, tmp_path):
    policy = small_policy(family)
    save_policy(policy, tmp_path)
    again = load_policy(str(tmp_path))
    assert torch.equal(scores(policy), scores(again))
    assert again.end_token_ids == [256, 258], "both <|endoftext|> and <|im_end|> end a completion"
    assert not any(p.suffix in (".bin", ".pt", ".pkl") for p in tmp_path.iterdir())


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_given_are_saved_in_place_of_the_models_rounded_copy(family, tmp_path):
    policy, rounded = small_policy(family), small_policy(family)
    rounded.model.bfloat16()
    save_policy(rounded, tmp_path, dict(policy.model.named_parameters()))
    assert torch.equal(scores(policy), scores(load_policy(str(tmp_path))))
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32", "what other tools load it in"


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_trains_adapters_only_and_loads_from_its_folder(family, tmp_path):
    policy = small_policy(family, lora_rank=4)
    trained = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name and "language_model" in name for name in trained)
    with torch.no_grad():
        for name, p in policy.model.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(len(name)))
    adapted = scores(policy)
    with policy.model.disable_adapter():
        assert torch.equal(scores(policy), scores(small_policy(family)))
    assert not torch.allclose(adapted, scores(small_policy(family)), atol=1e-3)
    save_policy(policy, tmp_path)
    torch.testing.assert_close(scores(load_policy(str(tmp_path))), adapted)
    with pytest.raises(SystemExit, match=r"--lora-rank 8: --model .* is an adapter, which is trained on"):
        load_policy(str(tmp_path), lora_rank=8)


def test_an_adapter_of_the_output_head_is_refused(tmp_path):
    policy = small_policy()
    model = get_peft_model(policy.base, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    model.peft_config["default"].base_model_name_or_path = small_folder("qwen3_vl")
    model.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="its adapter changes the output head"):
        load_policy(str(tmp_path))


def test_image_tokens_fill_the_grid_of_each_image():
    policy = small_policy()
    prompts, _, _ = small_prompts(policy)
    image_tokens = (prompts.input_ids == policy.base.config.image_token_id).sum(1)
    assert image_tokens.tolist() == [2 * 3, 4 * 2, 3 * 3 + 2 * 2]  # 16 pixels a token each way
    assert prompts.attention_mask[:, -1].all() and not prompts.attention_mask[:2, 0].any()


def test_a_prompt_needs_as_many_image_tokens_as_images():
    policy = small_policy()
    message = [{"role": "user", "content": [{"type": "text", "text": "no image"}]}]
    with pytest.raises(ValueError, match="0 image tokens and 1 images"):
        encode_prompts(policy, [message], [[picture(32, 32, 0)]])


def test_prompts_without_images_are_scored_too():
    policy = small_policy()
    message = [{"role": "user", "content": [{"type": "text", "text": "no image"}]}]
    prompts = encode_prompts(policy, [message], [[]])
    ids = torch.full((2, 3), 70)
    assert Scorer(policy)(prompts, ids, ids > 0).logprobs.isfinite().all()


def test_max_pixels_bounds_the_image():
    policy = small_policy(max_pixels=32 * 32)
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    prompts = encode_prompts(policy, [message], [[picture(128, 64, 0)]])
    assert int(prompts.image_grid_thw.prod()) * 8 * 8 <= 32 * 32


def test_an_adapter_sees_pictures_as_small_as_in_its_training(tmp_path):
    save_policy(small_policy(lora_rank=2, max_pixels=32 * 32), tmp_path)
    assert load_policy(str(tmp_path)).image_processor.size["longest_edge"] == 32 * 32
    (tmp_path / "preprocessor_config.json").unlink()  # peft alone writes none
    assert load_policy(str(tmp_path)).image_processor.size["longest_edge"] == 128 * 128


def test_the_vision_template_is_found_beside_a_text_only_one(tmp_path):
    """Qwen2.5-VL's tokenizer holds a text-only template; the one with images lies in chat_template.json."""
    folder = tmp_path / "model"
    shutil.copytree(small_folder("qwen2_5_vl"), folder)
    vision = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": vision}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_policy(str(folder)).tokenizer.chat_template == vision


@pytest.mark.parametrize(
    "name, message",
    [
        ("Qwen/Qwen3-VL-4B", r"hf download Qwen/Qwen3-VL-4B-Instruct --local-dir DIR"),
        ("no-such-folder/with/parts", "no such folder"),
    ],
)
def test_what_cannot_be_loaded_says_so_in_one_line(name, message, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit, match=message) as error:
        load_policy(name)
    assert "\n" not in str(error.value)
    if "Qwen3" in name:
        assert "using Qwen/Qwen3-VL-4B-Instruct" in capsys.readouterr().out


def test_a_folder_of_another_family_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(SystemExit, match="'gpt2' is not one of qwen2_vl"):
        load_policy(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(SystemExit, match=r"neither config\.json nor adapter_config\.json"):
        load_policy(str(tmp_path))


def test_a_damaged_folder_is_one_line_and_no_weight_is_drawn_at_random(tmp_path):
    def damaged(name: str, change) -> str:
        folder = shutil.copytree(small_folder("qwen3_vl"), tmp_path / name)
        change(folder)
        with pytest.raises(SystemExit) as error:
            load_policy(str(folder))
        assert str(error.value).startswith(f"--model {folder}: ") and "\n" not in str(error.value)
        return str(error.value)

    def without_a_weight(folder):
        weights = load_file(folder / "model.safetensors")
        del weights["model.language_model.layers.0.self_attn.q_proj.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    text = damaged("missing", without_a_weight)
    assert "1 weights are missing, the first model.language_model.layers.0.self_attn.q_proj.weight" in text
    damaged("cut", lambda folder: (folder / "model.safetensors").write_bytes(b"cut short"))
    damaged("config", lambda folder: (folder / "config.json").write_text("{}"))
    damaged("tokenizer", lambda folder: (folder / "tokenizer.json").write_text("{"))
    damaged("no tokenizer", lambda folder: [file.unlink() for file in folder.glob("tokenizer*")])
    (tmp_path / "adapter").mkdir()
    for text in ("{", "{}", json.dumps({"base_model_name_or_path": "tiny"})):
        (tmp_path / "adapter" / "adapter_config.json").write_text(text)
        with pytest.raises(SystemExit, match=r"^--model .*adapter"):
            load_policy(str(tmp_path / "adapter"))


def test_a_model_is_looked_for_before_its_weights_are_read(tmp_path):
    check_model("tiny")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(SystemExit, match="'gpt2' is not one of qwen2_vl"):
        check_model(str(tmp_path))


def test_a_new_adapter_is_drawn_by_the_seed():
    drawn = [
        {name: p for name, p in small_policy(lora_rank=2, seed=seed).model.named_parameters() if "lora_A" in name}
        for seed in (1, 1, 2)
    ]
    for name in drawn[0]:
        assert torch.equal(drawn[0][name], drawn[1][name]) and not torch.equal(drawn[0][name], drawn[2][name])


@pytest.mark.parametrize("family", FAMILIES)
def test_patches_are_embedded_as_by_the_convolution(family):
    policy = small_policy(family)
    embed, (prompts, _, _) = policy.base.model.visual.patch_embed, small_prompts(policy)
    ours, theirs = embed(prompts.pixel_values), type(embed).forward(embed, prompts.pixel_values)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
