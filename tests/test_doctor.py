"""The doctor: each rule speaks up in the run that it is about, and in no healthy one."""

import json
import random

import pytest

from common.run.doctor import RULES, Doctor, endings_of

ARGS = {
    "prompts_per_step": 8, "group_size": 8, "max_completion_length": 72, "learning_rate": 3e-5, "kl_coef": 0.0,
    "max_grad_norm": 1.0, "kind": "", "eval_examples": 200, "importance_sampling_level": "token",
}  # fmt: skip


def healthy(steps: int = 60, **settings) -> list[dict]:
    """Metrics of a run that learns: the reward climbs from 0.3 to 0.6, with the noise of 64 completions a step."""
    dice = random.Random(0)
    lines = []
    for step in range(steps):
        gain = 0.3 * min(step, 60) / 60
        reward = 0.3 + gain + dice.gauss(0, 0.1)
        lines.append(
            {
                "reward": reward, "reward_std": 0.4, "accuracy": reward,
                "frac_reward_zero_std": dice.choice([0.25, 0.5]), "frac_accuracy_constant": 0.25,
                "completions/mean_length": 40 + dice.gauss(0, 3),
                "completions/clipped_ratio": dice.choice([0.0, 0.05]), "loss": 0.0,
                "entropy": 0.6 + dice.gauss(0, 0.05), "kl": 0.05, "clip_ratio/low_mean": 0.0,
                "clip_ratio/high_mean": 0.001, "mismatch": 0.005, "grad_norm": 0.3 + abs(dice.gauss(0, 0.3)),
                "updates_skipped": 0, "lr": 3e-5, "verdicts/ok": 60.0, "verdicts/no_answer": 4.0,
                **({"eval/accuracy": 0.4 + gain, "eval/image_reliance": 1.2} if step % 10 == 9 else {}),
            }
        )  # fmt: skip
        lines[-1].update({k: v(step) if callable(v) else v for k, v in settings.items()})
    return lines


def examine(lines: list[dict], endings=(), **args) -> dict[str, dict]:
    """Remarks by rule."""
    doctor = Doctor(ARGS | args)
    return {r["rule"]: r for step, line in enumerate(lines) for r in doctor.examine(step, line, endings)}


def test_a_healthy_run_gets_no_remark():
    assert examine(healthy(300)) == {}


# A run, the rule that must speak within 20 steps, and words that the remark must have.
SICK = {
    "no_reward": (dict(reward=0.0, accuracy=0.0, reward_std=0.0, frac_reward_zero_std=1.0), "easier examples"),
    "no_reward ": (
        {"reward": 0.0, "accuracy": 0.0, "verdicts/ok": 1.0, "verdicts/no_answer": 63.0},
        "--prompt-template",
    ),
    "no_reward   ": ({"reward": 0.0, "accuracy": 0.0, "verdicts/ok": 1.0, "verdicts/unparsed": 63.0}, "--kind"),
    "no_reward  ": ({"reward": 0.0, "accuracy": 0.0, "completions/clipped_ratio": 0.9}, "--max-completion-length"),
    "constant_reward": (dict(reward=0.5, reward_std=0.0, frac_reward_zero_std=1.0), "--reward"),
    "no_variance": (dict(frac_reward_zero_std=0.95, reward=0.97, accuracy=0.97), "too easy"),
    "no_variance ": (dict(frac_reward_zero_std=0.95, reward=0.02, accuracy=0.02), "too hard"),
    "length_limit": ({"completions/clipped_ratio": 0.4}, "--max-completion-length"),
    "checks_fail": ({"verdicts/timeout": 3.0, "verdicts/error": 1.0}, "--kind"),
    "not_understood": ({"verdicts/ok": 10.0, "verdicts/no_answer": 54.0}, "--prompt-template"),
    "entropy_collapse": (
        dict(entropy=lambda step: 0.6 if step < 5 else 0.01, frac_reward_zero_std=lambda step: min(1, step / 5)),
        "--clip-high",
    ),
    "entropy_explosion": (dict(entropy=lambda step: 0.6 + 0.2 * step), "--learning-rate"),
    "kl_explosion": (dict(kl=lambda step: 0.3 * step), "--kl-coef"),
    "gradients_clipped": (dict(grad_norm=12.0), "--max-grad-norm"),
    "clip_always": ({"clip_ratio/low_mean": 0.1, "clip_ratio/high_mean": 0.2}, "--updates-per-rollout"),
    "sampling_mismatch": (dict(mismatch=0.3), "--tis-cap"),
    "image_ignored": ({"eval/image_reliance": lambda step: 0.001}, "grey"),
    "learning_rate_too_high": (dict(reward=lambda step: 0.5 if step < 4 else 0.05), "--learning-rate"),
    "no_change": (dict(lr=0.0), "--learning-rate"),
    "overfitting": (
        {"eval/accuracy": lambda step: [0.6, 0.3][step > 9], "reward": lambda step: 0.3 + 0.02 * step + step % 2 / 50},
        "held-out",
    ),
}


@pytest.mark.parametrize("name", SICK)
def test_a_sick_run_is_named_within_twenty_steps(name):
    changes, words = SICK[name]
    remarks = examine(healthy(20, **changes))
    assert name.strip() in remarks, remarks
    text = remarks[name.strip()]["text"]
    assert words.lower() in text.lower() and "nan" not in text, text


def test_every_rule_is_shown_a_sick_run():
    assert {name.strip() for name in SICK} == set(RULES)


@pytest.mark.parametrize(
    "changes, rule",
    [
        (dict(frac_reward_zero_std=0.8), "no_variance"),  # one group in five still teaches
        ({"completions/clipped_ratio": 0.15}, "length_limit"),
        (dict(entropy=0.02), "entropy_collapse"),  # sure from the start
        (dict(entropy=lambda step: 0.6 + 0.02 * step), "entropy_explosion"),
        (dict(kl=lambda step: 40.0 if step % 5 == 0 else 0.5), "kl_explosion"),  # single tokens
        (dict(grad_norm=2.5), "gradients_clipped"),
        (dict(reward=lambda step: 0.4 + 0.15 * (-1) ** step), "learning_rate_too_high"),
        ({"verdicts/ok": lambda step: 6 + 3 * step, "verdicts/no_answer": 60.0}, "not_understood"),  # being learned
        ({"eval/accuracy": lambda step: [0.6, 0.55][step > 9]}, "overfitting"),  # within the noise of 200 examples
        (dict(lr=lambda step: 3e-5 * (1 - step / 20)), "no_change"),  # a schedule that ends at 0
    ],
)
def test_what_is_not_yet_sick_gets_no_remark(changes, rule):
    assert rule not in examine(healthy(20, **changes))


def test_methods_that_differ_on_purpose_get_no_remark():
    """NoisyGRPO samples on other pictures than it scores; sequence ratios are clipped for most completions (GSPO)."""
    assert "sampling_mismatch" not in examine(healthy(20, mismatch=1.0, kl=0.6, grad_norm=2.0), noise_images=True)
    clipped = healthy(20, **{"clip_ratio/low_mean": 0.3, "clip_ratio/high_mean": 0.3})
    assert "clip_always" not in examine(clipped, importance_sampling_level="sequence")


def test_steps_that_were_not_scored_have_no_values():
    nothing = dict.fromkeys(("entropy", "kl", "mismatch", "grad_norm", "clip_ratio/low_mean"), float("nan"))
    remarks = examine(healthy(20, reward=0.0, accuracy=0.0, reward_std=0.0, frac_reward_zero_std=1.0, **nothing))
    assert set(remarks) == {"no_reward"}


def test_a_script_that_logs_less_is_judged_by_what_it_logs():
    assert examine([{} for _ in range(30)]) == {}
    assert set(examine([{"completions/clipped_ratio": 0.5}] * 30)) == {"length_limit"}


def test_a_remark_is_made_once_also_when_a_run_is_continued():
    lines = healthy(40, **{"completions/clipped_ratio": 0.5})
    doctor = Doctor(ARGS)
    first = [r for step, line in enumerate(lines[:20]) for r in doctor.examine(step, line)]
    assert [r["rule"] for r in first] == ["length_limit"] and first[0]["step"] == 4
    continued = Doctor(ARGS, json.loads(json.dumps(lines[:20])), json.loads(json.dumps(first)))
    assert [r for step, line in enumerate(lines[20:], 20) for r in continued.examine(step, line)] == []


def test_a_continued_run_is_judged_as_one_that_went_on():
    lines = healthy(20, **{"reward": lambda step: 0.5 if step < 6 else 0.05})
    whole = examine(lines)["learning_rate_too_high"]
    continued = Doctor(ARGS, lines[:8])
    assert whole in [r for step, line in enumerate(lines[8:], 8) for r in continued.examine(step, line)]


def test_endings_that_were_not_understood_are_shown_most_frequent_first():
    completions = ["the answer is 7", "the answer is 12", "I do not\n know", "<answer>3</answer>", "a picture"]
    assert endings_of(completions) == ["the answer is #", "the answer is #", "I do not know", "a picture"]
    assert endings_of(["x" * 100_000 + " end"]) == ["x" * 36 + " end"]
    sick = healthy(20, **{"reward": 0.0, "accuracy": 0.0, "verdicts/ok": 0.0, "verdicts/no_answer": 64.0})
    text = examine(sick, endings_of(completions))["no_reward"]["text"]
    assert text.endswith("10 times …'the answer is #'; 5 times …'I do not know'; 5 times …'a picture'.")
