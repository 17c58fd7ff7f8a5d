"""NoisyGRPO: the worked numbers of noise and posterior, their limits, and what is conditioned on which image."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import grpo
import noisy_grpo
from common.model import training
from noisy_grpo import ABAR, Args, group_z, levels_of, noisy_image, posterior_advantages
from tests.one_step import gradient_norm, one_step, standardized, without_a_picture

LADDER = [0.0, 0.3, 0.6, 0.9]
ARGS = Args(group_size=4)
close = lambda a, b, atol=1e-5: torch.testing.assert_close(
    torch.as_tensor(a).float(), torch.tensor(b), atol=atol, rtol=0
)


def advantages(rewards, levels=LADDER, args=ARGS):
    args = replace(args, group_size=len(levels))
    return posterior_advantages(torch.tensor(rewards), torch.tensor(levels), args)


# --------------------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize(
    ("step", "signal", "noise"),
    [(0, 0.999989, 0.004726), (100, 0.998293, 0.058406), (300, 0.980984, 0.194089), (450, 0.910737, 0.412987),
     (500, 0.863017, 0.505175), (600, 0.734246, 0.678883), (900, 0.364888, 0.931051), (999, 0.285042, 0.958515)],
)  # fmt: skip
def test_the_schedule_has_the_worked_numbers(step, signal, noise):
    assert np.sqrt(ABAR[step]) == pytest.approx(signal, abs=1e-6)
    assert np.sqrt(1 - ABAR[step]) == pytest.approx(noise, abs=1e-6)


@pytest.mark.parametrize(
    ("step", "clamped", "wrapped"),
    [(0, [0, 64, 127, 205, 255], [255, 64, 127, 205, 0]), (300, [0, 87, 112, 255, 255], [207, 87, 112, 18, 43]),
     (600, [0, 133, 50, 255, 255], [83, 133, 50, 153, 104]), (900, [0, 141, 0, 255, 255], [19, 141, 244, 174, 74])],
)  # fmt: skip
def test_bytes_have_the_worked_numbers(step, clamped, wrapped):
    x, eps = np.array([0, 0.25, 0.5, 0.8, 1]), np.array([-1, 0.5, -0.25, 1.5, 1])
    dice = SimpleNamespace(standard_normal=lambda shape: eps[None])
    for to_bytes, expected in (("clamp", clamped), ("wrap", wrapped)):
        noisy = noisy_image(255 * x[None], max(step / 1000, 1e-9), dice, to_bytes)
        assert np.asarray(noisy).tolist() == [expected]


def test_noise_has_the_variance_of_its_level():
    image = Image.new("RGB", (200, 200), (128, 128, 128))
    for level, step in ((0.12, 120), (0.29, 290), (0.33, 330)):
        noisy = np.asarray(noisy_image(image, level, np.random.default_rng(0), "wrap")) / 255
        kept = noisy[np.abs(noisy - 0.5) < 0.5]
        assert noisy.shape == (200, 200, 3)
        expected = np.sqrt(1 - ABAR[step])
        if expected < 0.1:  # else some of it wraps
            assert kept.std() == pytest.approx(expected, rel=0.02)
    assert noisy_image(image, 0.0, None, "clamp") is image
    white = np.asarray(noisy_image(Image.new("RGB", (600, 600), "white"), 1e-9, np.random.default_rng(0), "wrap"))
    assert (white <= 10).mean() == pytest.approx(0.202680, abs=0.003)
    assert noisy_image(image, 1.0, np.random.default_rng(0), "clamp").size == (200, 200)


def test_levels_are_a_ladder_or_drawn_and_fall_when_annealed():
    assert levels_of(0, 0, Args(group_size=8)).tolist() == LADDER * 2
    drawn = Args(group_size=8, noise_draw="uniform")
    assert levels_of(3, 1, drawn).tolist() == levels_of(3, 1, drawn).tolist() != levels_of(4, 1, drawn).tolist()
    annealed = Args(group_size=2, noise_levels=(0.0, 0.5), anneal=True, steps=60)
    for step, expected in ((1, 1.0), (20, 0.999955), (35, 0.924142), (40, 0.5), (45, 0.075858), (60, 0.000045)):
        assert levels_of(step - 1, 0, annealed)[1] == pytest.approx(0.5 * expected, abs=1e-6)


# ----------------------------------------------------------------------------------------------------------- advantages


def test_the_prior_has_the_worked_numbers():
    close(group_z(1 - torch.tensor([LADDER], dtype=torch.float64), 1e-4)[0], [1.161595, 0.387198, -0.387198, -1.161595])
    assert (group_z(torch.full((1, 4), 0.7), 1e-4) == 0).all()


@pytest.mark.parametrize(
    ("rewards", "weight", "expected"),
    [
        ([2.0, 2, 1, 1], 0.225564, [0.950354, 0.772349, -0.772349, -0.950354]),
        ([1.0, 1, 1, 1], 0.909091, [1.161767, 0.387256, -0.387256, -1.161767]),
        ([1.0, 1, 1, 2], 0.277778, [-0.071510, -0.472363, -0.873215, 1.417088]),
        ([1.72, 1.81, 1.65, 1.70], 0.873617, [1.086345, 0.544036, -0.503609, -1.126772]),
        ([1.90, 1.00, 0.00, 1.75], 0.115523, [0.965290, -0.131608, -1.339535, 0.505852]),
        ([2.0, 1, 1, 2], 0.225564, [1.156226, -0.723094, -0.939660, 0.506528]),
    ],
)
def test_posterior_advantages_have_the_worked_numbers(rewards, weight, expected):
    found, prior_weight = advantages(rewards)
    close(found, expected)
    close(prior_weight, [weight])


def test_other_levels_have_the_worked_numbers():
    close(advantages([2.0, 1, 1, 2], [0.3] * 4)[0], [0.865914, -0.865914, -0.865914, 0.865914])
    # The released code rescales the prior first, which standardizing undoes but for 3e-5.
    uniform = advantages([2.0, 1, 2, 1], [0.12, 0.47, 0.85, 0.33])[0]
    close(uniform, [1.176237, -0.895631, 0.481856, -0.762462], atol=5e-5)
    eight, weight = advantages([2.0, 1, 2, 1, 1, 1, 0, 1], [0, 0, 0.3, 0.3, 0.6, 0.6, 0.9, 0.9])
    close(eight, [1.422842, 0.088278, 1.252776, -0.081788, -0.251853, -0.251853, -1.756483, -0.421919])
    close(weight, [0.192044])


@pytest.mark.parametrize(("spread", "weight"), [(0.0, 0.909091), (0.1, 0.833333), (0.3, 0.5), (1.0, 0.090090)])
def test_the_wider_rewards_lie_apart_the_less_the_prior_weighs(spread, weight):
    half = spread / 2**0.5  # two rewards whose standard deviation is the spread
    close(advantages([1 - half, 1 + half], [0.0, 0.9])[1], [weight])


def test_loss_and_gradient_have_the_worked_numbers():
    logprobs = torch.tensor([[-0.5, -1.0, -0.2], [-0.7, -0.1, -2.0]], requires_grad=True)
    ref_logprobs = torch.tensor([[-0.6, -0.8, -0.2], [-0.5, -0.3, -9.9]])
    mask, weighed = torch.tensor([[True] * 3, [True, True, False]]), torch.tensor([[0.772349], [-0.950354]])
    weights = noisy_grpo.token_weights(mask, "grpo", 2, 5, 3)

    def total(old_logprobs):
        losses, _ = noisy_grpo.policy_loss(logprobs, old_logprobs, weighed, mask, replace(ARGS, clip_high=0.2))
        losses = losses + 0.04 * noisy_grpo.k3_divergence(logprobs, ref_logprobs)
        return (torch.where(mask, losses, 0) * weights).sum()

    loss = total(logprobs.detach())
    close(loss.detach(), 0.089579)
    expected = [[-0.128090, -0.130201, -0.128725], [0.235374, 0.239401, 0.0]]
    close(torch.autograd.grad(loss, logprobs)[0], expected)
    wrong = total(torch.tensor([[-1.2, -1.1, -0.9], [-0.9, -0.6, -2.5]]))
    close(wrong.detach(), 0.231282), "the sampler's log-probabilities must not be the old ones"


def test_properties_of_the_posterior():
    dice = torch.Generator().manual_seed(0)
    for _ in range(50):
        rewards, levels = torch.rand(4, generator=dice).tolist(), torch.rand(4, generator=dice).tolist()
        found, weight = advantages(rewards, levels)
        assert abs(found.mean()) < 1e-6
        torch.testing.assert_close(advantages([r + 3 for r in rewards], levels)[0], found, atol=1e-5, rtol=0)
        assert advantages([2 * r for r in rewards], levels)[1] < weight
        order = [2, 0, 3, 1]
        permuted = advantages([rewards[i] for i in order], [levels[i] for i in order])[0]
        torch.testing.assert_close(permuted, found[order])
        # The posterior mean lies between what the prior and what the rewards say.
        z = [group_z(torch.tensor([x], dtype=torch.float64), 1e-4)[0] for x in (rewards, [1 - n for n in levels])]
        mean = (1 - float(weight)) * z[0] + float(weight) * z[1]
        assert ((mean >= torch.minimum(*z) - 1e-9) & (mean <= torch.maximum(*z) + 1e-9)).all()
    # Of two completions of equal reward the noisier never gets the higher advantage.
    equal = advantages([1.0, 0.0, 1.0, 0.0], [0.1, 0.9, 0.8, 0.2])[0]
    assert equal[0] > equal[2] and equal[3] > equal[1]
    assert (advantages([0.0] * 4)[0].diff() < 0).all()
    tied = {mode: advantages([1.0] * 4, args=replace(ARGS, tie_mode=mode))[0] for mode in ("keep", "skip", "shrink")}
    assert (tied["skip"] == 0).all() and all(found.isfinite().all() for found in tied.values())
    close(tied["shrink"], [1.055992, 0.351997, -0.351997, -1.055992])
    assert (advantages([1.0] * 4, [0.5] * 4)[0] == 0).all()


def test_limits_of_the_variances():
    rewards = [1.0, 0.0, 0.0, 1.0]
    prior_only = advantages(rewards, args=replace(ARGS, prior_var=1e-12))
    close(prior_only[1], [1.0])
    close(prior_only[0], [1.161595, 0.387198, -0.387198, -1.161595], atol=2e-4)
    rewards_only = advantages(rewards, args=replace(ARGS, lik_alpha=1e-12))
    close(rewards_only[1], [0.0])
    close(rewards_only[0], grpo.group_advantages(torch.tensor(rewards), 4, "group", 1e-4).tolist(), atol=2e-4)
    close(advantages(rewards, args=replace(ARGS, posterior="fixed", lik_var=0.3))[1], [0.75])


# ------------------------------------------------------------------------------------------------------------- training


def run(script, tmp_path, name, **settings):
    small = {"steps": 2, "prompts_per_step": 4, "group_size": 4, "test_examples": 0, "eval_every": 0}
    settings = small | {"preflight": False} | settings
    script.main(script.Args(out=str(tmp_path / name), **settings))
    return next((tmp_path / name / "checkpoints").glob("step-*/*.safetensors")).read_bytes()


def test_without_noise_and_posterior_it_is_grpo_to_the_bit(tmp_path):
    off = {"noise_images": False, "posterior": "none", "kl_coef": 0.0}
    assert run(grpo, tmp_path, "a") == run(noisy_grpo, tmp_path, "b", **off)


def test_each_setting_trains_differently(tmp_path):
    settings = {
        "noisy": {}, "noise only": {"posterior": "none"}, "posterior only": {"noise_images": False},
        "fixed": {"posterior": "fixed"}, "skip": {"tie_mode": "skip"}, "wrap": {"to_bytes": "wrap"},
        "uniform": {"noise_draw": "uniform"}, "update": {"update_image": "noisy"}, "twice": {"epochs_per_rollout": 2},
        "rollout": {"noise_levels": (0.0, 0.5), "posterior": "none", "anneal": True},
    }  # fmt: skip
    assert len({run(noisy_grpo, tmp_path, name, **chosen) for name, chosen in settings.items()}) == len(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_levels": (0.0, 1.5)}, "--noise-levels 0.0 1.5: each must be from 0 to 1"),
        ({"prior_var": 0.0}, "--prior-var 0.0: must be above 0"),
        ({"scale_rewards": "none"}, "--scale-rewards none: needs --posterior none"),
        ({"lik_alpha": float("nan")}, "--lik-alpha nan: must be above 0"),
    ],
)
def test_bad_flags_are_one_line(settings, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        noisy_grpo.main(Args(out=str(tmp_path / "x"), **settings))


def test_metrics_of_annealed_levels_stand_under_the_levels_that_were_given(monkeypatch, tmp_path):
    settings = {"noise_levels": (0.0, 0.5), "posterior": "none", "anneal": True}
    monkeypatch.setattr("common.rewards.designs.design_rewards", lambda *a: ([0.0, 1.0] * 8, {}))  # 1 under noise
    run(noisy_grpo, tmp_path, "a", **settings)  # in the last step both levels round to 0.00
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert {name: value for name, value in line.items() if name.startswith("noise/")} == pytest.approx({
            "noise/0.00/reward": 0, "noise/0.50/reward": 1,
            "noise/0.00/advantage": -0.865875, "noise/0.50/advantage": 0.865875,
        })  # fmt: skip


def test_micro_batches_count_the_noisy_prompt_of_every_row(monkeypatch, tmp_path):
    """Trained on noisy images a group has a prompt a row."""
    sizes, original = [], training.cut_by_tokens
    monkeypatch.setattr(training, "cut_by_tokens", lambda n, size, *a: sizes.append(size) or original(n, size, *a))
    for name in ("clean", "noisy"):
        run(noisy_grpo, tmp_path, name, update_image=name, steps=1)
    assert sizes[-1] == 4 * sizes[1], "the last cut of each run is that of the update"


def test_a_group_without_a_picture_is_grpos(monkeypatch, tmp_path):
    """No noise was applied: levels are 0, the posterior is of the rewards alone, and no level's metrics have it."""
    rewards = [1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 1, 0]
    monkeypatch.setattr(noisy_grpo, "draw_prompts", without_a_picture(noisy_grpo.draw_prompts, [0, 1, 2]))
    _, logged, policy, _, _, mask, logprobs = one_step(noisy_grpo, monkeypatch, tmp_path, [1] * 12, rewards)
    loss = (-standardized(rewards) * (logprobs - logprobs.detach()).exp())[mask].sum() / mask.sum()
    assert logged["loss"] == pytest.approx(loss.item(), abs=1e-4) and abs(loss) > 1e-3
    assert logged["grad_norm"] == pytest.approx(gradient_norm(policy, loss), rel=2e-3)  # standardized twice
    assert logged["noise/0.90/reward"] is None and logged["noise/0.90/advantage"] is None


def test_a_step_uses_the_posterior_advantages_on_clean_images(monkeypatch, tmp_path):
    rewards = [1.5, 0.5, 0, 1, 1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5]
    args, logged, policy, _, _, mask, logprobs = one_step(noisy_grpo, monkeypatch, tmp_path, [1] * 12, rewards)
    levels = torch.from_numpy(np.stack([noisy_grpo.levels_of(0, place, args) for place in range(3)])).float().flatten()
    advantages, _ = noisy_grpo.posterior_advantages(torch.tensor(rewards), levels, args)
    ratio = (logprobs - logprobs.detach()).exp()
    loss = (-advantages[:, None] * ratio)[mask].sum() / mask.sum()  # the policy still is its reference
    assert logged["loss"] == pytest.approx(loss.item(), abs=1e-4) and abs(loss) > 1e-3
    assert logged["grad_norm"] == pytest.approx(gradient_norm(policy, loss), rel=1e-3)
