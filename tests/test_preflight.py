"""Preflight: set-ups that are broken on purpose are named before the first step; a sound one is let pass, untouched."""

import json
import random
import re

import pytest
import torch
from PIL import Image

import grpo
from common.data.examples import Example, load_examples
from common.model.load import load_policy
from common.model.scoring import Scorer
from common.run import preflight as module
from common.run.preflight import chance_level, exchanged, preflight, reference_remarks
from tests.small_models import picture, small_folder

ROWS = 100  # of a set, each of which is asked once


def setup(tmp_path, damage=lambda model: None, **settings):
    """What preflight takes: arguments, policy, scorer, optimizer, examples, folder."""
    usual = {"prompts_per_step": 4, "group_size": 4, "seed": 3}
    args = grpo.Args(**{**usual, **settings})
    policy = load_policy(args.model, lora_rank=args.lora_rank)
    with torch.no_grad():
        damage(policy.model)
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate)
    scorer = Scorer(policy, slice_tokens=args.micro_batch_tokens)
    return args, policy, scorer, optimizer, load_examples(args.data, args.train_split), tmp_path


def run(tmp_path, **settings) -> dict[str, str]:
    """Texts of the remarks by rule."""
    return {r["rule"]: r["text"] for r in preflight(*setup(tmp_path, **settings), say=lambda line: None)}


def puzzles(folder, change=lambda rows: None, kind: str = "") -> str:
    """A data set of puzzles with `change` made to its rows."""
    examples = load_examples("puzzles", "train")
    examples = [examples[n] for n in range(ROWS)]
    rows = [
        {"image": e.images[0], "question": e.question, "answer": e.answer, "kind": kind or e.kind, "group": e.group,
         "id": e.id} for e in examples
    ]  # fmt: skip
    change(rows)
    folder.mkdir()
    for n, row in enumerate(rows):
        row["image"].save(folder / f"{n}.png")
        row["image"] = f"{n}.png"
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_a_sound_set_up_gets_no_remark_and_is_shown(tmp_path):
    said = []
    args = setup(tmp_path)
    assert preflight(*args, say=said.append) == []
    text = "\n".join(said)
    example = re.search(r"train/\d+ +128 x 128 px: \d+ of \d+ tokens, answer '(.*?)' \((\w+)\)", text)
    assert example, text
    agreement = float(re.search(r"agree to (\S+) nats", text)[1])
    assert 0 < agreement < 1e-5
    assert re.search(r"policy as it is: \d+ of \d+ answers right \(\d+% if checked with other rows' answers\)", text)
    assert re.search(r"right \(.*\), \d+ \(\d+%\) in the form that is asked for, \d+ cut off", text)
    assert "4 completions of 72 each" in text and "same when it is read again" in text


def test_nothing_that_training_depends_on_changes(tmp_path):
    args, policy, scorer, optimizer, train, folder = setup(tmp_path)
    random_before = torch.get_rng_state(), random.getstate()
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    for training in (True, False):
        policy.model.train(training)
        preflight(args, policy, scorer, optimizer, train, folder, say=lambda line: None)
        assert policy.model.training is training
    assert all(torch.equal(p, before[name]) for name, p in policy.model.named_parameters())
    assert all(p.grad is None for p in policy.model.parameters()) and not optimizer.state
    assert torch.equal(torch.get_rng_state(), random_before[0]) and random.getstate() == random_before[1]
    assert list(folder.iterdir()) == []


def test_an_adapter_and_a_random_model_of_another_family_are_let_pass(tmp_path):
    run(tmp_path, lora_rank=4)
    random_model = run(tmp_path, model=small_folder("qwen2_5_vl"), data="puzzles", max_completion_length=24)
    assert "none_right" in random_model


# What is broken, how, the rule that names it, and words that its remark must have.
BROKEN = {
    "completions too short": (dict(max_completion_length=4), "none_right", "--max-completion-length"),
    "learning rate 100 times too high": (dict(learning_rate=3e-3), "learning_rate_too_high", "--learning-rate"),
    "learning rate next to nothing": (dict(learning_rate=1e-12), "no_change", "--learning-rate"),
    "a layer lost": (
        dict(damage=lambda model: model.model.language_model.layers[1].mlp.up_proj.weight.zero_()),
        "zero_weights",
        "layers.1.mlp.up_proj",
    ),
    "weights overwritten with noise": (
        dict(damage=lambda model: [p.normal_(generator=torch.Generator().manual_seed(0)) for p in model.parameters()]),
        "none_right",
        "teaches nothing",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_setting_is_named(name, tmp_path):
    settings, rule, words = BROKEN[name]
    assert words in run(tmp_path, **settings)[rule]


def wrong_numbers(rows):
    for row in rows:
        row["answer"], row["kind"] = "9071", "int"


def letters(rows):
    for n, row in enumerate(rows):
        row["answer"], row["kind"] = "ABCD"[n % 4], "letter"


def blank(rows):
    for row in rows:
        row["image"] = Image.new("RGB", row["image"].size, "white")


def swapped(rows):
    pictures = [row["image"] for row in rows]
    for row, other in zip(rows, pictures[1:] + pictures[:1], strict=True):
        row["image"] = other


@pytest.mark.parametrize(
    "change, rule, words",
    [
        (wrong_numbers, "none_right", "references: '9071'"),  # all too hard
        (letters, "none_right", "--kind"),  # reference answers of another kind than the model's
        (blank, "blank_pictures", "row train/"),
        (swapped, "answers_fit_other_rows", "other rows"),
    ],
)
def test_broken_data_are_named(change, rule, words, tmp_path):
    remarks = run(tmp_path, data=puzzles(tmp_path / "data", change))
    assert words in remarks[rule], remarks


def test_the_same_data_unbroken_get_no_remark(tmp_path):
    assert run(tmp_path, data=puzzles(tmp_path / "data")) == {}


def test_a_policy_that_writes_answers_in_another_form_is_named(tmp_path, monkeypatch):
    original = module.decode
    monkeypatch.setattr(module, "decode", lambda *a: [re.sub(r"</?answer>", " ", text) for text in original(*a)])
    text = run(tmp_path)["none_right"]
    assert "0 could be understood" in text and "--prompt-template" in text
    assert re.search(r"Endings that were not understood: \d+ times …'", text)


def test_examples_that_are_all_too_easy_are_named(tmp_path, monkeypatch):
    original = module.answer_remarks

    def answered(args, policy, examples, rollout, say):
        each = len(rollout) // len(examples)
        texts = [f"<answer>{e.answer}</answer>" for e in examples for _ in range(each)]
        monkeypatch.setattr(module, "decode", lambda *a: texts)
        return list(original(args, policy, examples, rollout, say))

    monkeypatch.setattr(module, "answer_remarks", answered)
    assert "harder" in run(tmp_path)["too_easy"]


def test_a_reward_that_does_not_tell_right_from_wrong_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "design_rewards", lambda design, texts, *a: ([0.5] * len(texts), {}))
    assert "--reward accuracy pays 0.5" in run(tmp_path)["constant_reward"]


def test_damaged_weights_stop_the_run(tmp_path):
    with pytest.raises(SystemExit, match=r"--model tiny: 1 values of .*norm.weight are not numbers"):
        run(tmp_path, damage=lambda model: model.model.language_model.norm.weight[3].fill_(float("nan")))


def test_pictures_that_do_not_reach_the_model_stop_the_run(tmp_path, monkeypatch):
    original = module.encode_prompts

    def same_picture(policy, messages, images):
        return original(policy, messages, [[Image.new("RGB", i.size) for i in row] for row in images])

    monkeypatch.setattr(module, "encode_prompts", same_picture)
    with pytest.raises(SystemExit, match=r"exchanging the pictures of --data puzzles, row train/\d+ and others"):
        run(tmp_path)


def test_sampling_and_scoring_that_disagree_stop_the_run(tmp_path, monkeypatch):
    original = module.sample

    def shifted(*args, **kwargs):
        rollout = original(*args, **kwargs)
        rollout.logprobs -= 0.01
        return rollout

    monkeypatch.setattr(module, "sample", shifted)
    with pytest.raises(SystemExit, match=r"lie 0\.01 nats a token apart"):
        run(tmp_path)


@pytest.mark.parametrize("error", [0.0, 0.1])
def test_recorded_and_plain_decoding_are_compared_where_decoders_record(error, tmp_path, monkeypatch):
    original = module.sample

    def recorded(*args, **kwargs):
        rollout = original(*args, **kwargs)
        if not module.Decoder.may_record:
            rollout.logprobs -= error
        return rollout

    monkeypatch.setattr(module, "can_record", lambda device: True)
    monkeypatch.setattr(module, "sample", recorded)
    said = []
    if error:
        with pytest.raises(SystemExit, match=r"recorded decoder's log-probabilities lie 0\.1 nats"):
            preflight(*setup(tmp_path), say=said.append)
    else:
        assert preflight(*setup(tmp_path), say=said.append) == []
        assert any("recorded and plain decoding agree to 0 nats" in line for line in said)
    assert module.Decoder.may_record


def test_a_checkpoint_that_comes_back_changed_stops_the_run(tmp_path, monkeypatch):
    original = module.save_policy

    def rounded(policy, folder):
        original(policy, folder, {n: p.bfloat16().float() for n, p in policy.model.state_dict().items()})

    monkeypatch.setattr(module, "save_policy", rounded)
    with pytest.raises(SystemExit, match="not the same when a checkpoint is read again"):
        run(tmp_path)


def test_a_disk_without_room_for_checkpoints_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10_000_000}))
    with pytest.raises(SystemExit, match=r"--out .*: checkpoints take up to .* --keep-checkpoints"):
        run(tmp_path)


def test_memory_runs_out_now(tmp_path, monkeypatch):
    """The dry step samples and scores whole groups at the full length, and as many pictures as fit together."""
    args, _, scorer, optimizer, train, _ = setup(tmp_path, micro_batch_tokens=700)
    sampled, scored = [], []
    sample, forward = module.sample, Scorer.forward
    monkeypatch.setattr(module, "sample", lambda *a, **k: sampled.append(sample(*a, **k)) or sampled[-1])
    monkeypatch.setattr(
        Scorer, "forward", lambda self, prompts, ids, *a: scored.append((len(prompts), *ids.shape))
        or forward(self, prompts, ids, *a),
    )  # fmt: skip
    module.dry_step(args, scorer, optimizer, train, 1, lambda line: None)
    assert sampled[0].completion_mask.all() and sampled[0].completion_ids.shape == (16, 72)
    assert scored[0] == (1, 4, 72) and scored[1] == (4, 16, 1)


def example(answer: str, kind: str, n: int = 0) -> Example:
    return Example((picture(32, 32, n),), "<image>?", answer, kind, id=str(n))


def test_reference_answers_must_be_right_themselves():
    args = grpo.Args()
    sound = [example("7", "int", n) for n in range(30)]
    assert list(reference_remarks(args, sound)) == []
    ((rule, text),) = reference_remarks(args, [*sound, example("seven and a half", "int", 99)])
    assert (
        rule == "reference_not_right"
        and "row 99: the reference answer 'seven and a half'" in text
        and "1 of 31" in text
    )
    with pytest.raises(SystemExit, match=r"row 99: .* Pass another --kind or mend the rows"):
        list(reference_remarks(args, [*sound[:3], example("seven and a half", "int", 99)]))


def test_the_chance_level_counts_other_rows_of_the_same_kind():
    examples = [example("1", "int"), example("1", "int"), example("2", "int"), example("B", "letter")]
    completions = [f"<answer>{answer}</answer>" for answer in ("1", "2", "3", "B")]
    # The first fits the second row, the second the third; the others none: 2 of 6 pairs.
    assert chance_level(completions, examples) == pytest.approx(2 / 6)
    assert chance_level(completions[3:], examples[3:]) is None


def test_pictures_are_exchanged_with_others_that_differ():
    a, b = picture(32, 32, 0), picture(32, 32, 1)
    assert exchanged([[a], [a], [b], [a, b], []]) == [2, 2, 0, 3, 4]
