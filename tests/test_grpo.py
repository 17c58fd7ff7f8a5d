"""GRPO's arithmetic: worked numbers, an independent float64 computation, gradients by finite differences."""

import itertools
import math
import os
import random

import pytest
import torch

import grpo
from common.run.folder import start_run
from grpo import Args, group_advantages, k3_divergence, kept_groups, policy_loss, token_weights
from tests import commands
from tests.one_step import gradient_norm, one_step, standardized

REWARDS = torch.tensor([1, 0, 0, 0, 0.98, 0.18, 0.94, 0.10])

# Two rows of three tokens, the last of row 2 being padding that holds nonsense.
NEW = torch.tensor([[-1.0, -0.9, -1.9], [-0.3, -1.6, 55.0]], dtype=torch.float64)
OLD = torch.tensor([[-1.2, -0.5, -2.0], [-0.7, -1.5, -77.0]], dtype=torch.float64)
REF = torch.tensor([[-1.1, -0.6, -2.3], [-0.8, -1.4, 13.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, True, False]])
A = torch.tensor([[1.0], [-0.8]], dtype=torch.float64)
LIMIT = 4


def loss(logprobs, old=OLD, mask=MASK, rows=2, **settings):
    """The whole loss as the training loop puts it together."""
    args = Args(**{"clip_high": 0.2, **settings})
    losses, _ = policy_loss(logprobs, old, A[: len(logprobs)], mask, args)
    if args.kl_coef:
        losses = losses + args.kl_coef * k3_divergence(logprobs, REF)
    weights = token_weights(mask, args.loss_type, rows, int(mask.sum()), LIMIT)
    return (torch.where(mask, losses, 0) * weights).sum()


def gradient(**settings):
    logprobs = NEW.clone().requires_grad_()
    loss(logprobs, **settings).backward()
    return logprobs.grad


# ---------------------------------------------------------------- advantages


@pytest.mark.parametrize(
    "scale, eps, expected",
    [
        ("none", 1e-4, [0.75, -0.25, -0.25, -0.25, 0.43, -0.37, 0.39, -0.45]),
        ("group", 1e-4, [1.499700, -0.499900, -0.499900, -0.499900, 0.905390, -0.779057, 0.821168, -0.947501]),
        ("group", 1e-6, [1.499997, -0.499999, -0.499999, -0.499999, 0.905579, -0.779219, 0.821339, -0.947699]),
        ("batch", 1e-4, [1.565283, -0.521761, -0.521761, -0.521761, 0.897429, -0.772206, 0.813947, -0.939170]),
    ],
)
def test_advantages_of_two_groups(scale, eps, expected):
    advantages = group_advantages(REWARDS, 4, scale, eps)
    torch.testing.assert_close(advantages, torch.tensor(expected), atol=2e-6, rtol=0)
    torch.testing.assert_close(advantages.view(2, 4).sum(1), torch.zeros(2), atol=1e-6, rtol=0)


def test_advantages_against_plain_python():
    generator = random.Random(0)
    for _ in range(50):
        group = [generator.choice([0, 0.1, 0.9, 1.0]) for _ in range(5)]
        mean = sum(group) / 5
        deviation = math.sqrt(sum((r - mean) ** 2 for r in group) / 4)
        expected = [(r - mean) / (deviation + 1e-4) if max(group) > min(group) else 0.0 for r in group]
        advantages = group_advantages(torch.tensor(group), 5, "group", 1e-4)
        assert advantages.tolist() == pytest.approx(expected, abs=1e-5)


def test_equal_rewards_have_advantage_exactly_zero():
    for scale, eps in itertools.product(("group", "batch", "none"), (1e-4, 1e-6, 0.0)):
        assert (group_advantages(torch.full((8,), 0.761594), 8, scale, eps) == 0).all()


def test_statistics_are_in_double_precision():
    rewards = torch.tensor([0.761594, 0.761598, 0.761601, 0.761594])
    exact = [float(r) for r in rewards]
    mean = sum(exact) / 4
    deviation = math.sqrt(sum((r - mean) ** 2 for r in exact) / 3)
    expected = [(r - mean) / (deviation + 1e-8) for r in exact]
    assert group_advantages(rewards, 4, "group", 1e-8).tolist() == pytest.approx(expected, abs=1e-5)


def test_small_differences_between_wrong_answers_are_as_loud_as_the_document_says():
    rewards = torch.tensor([0.199267, 0.199524, 0.199901, 0.199011])
    for eps, expected in [(1e-4, [-0.330, 0.205, 0.990, -0.865]), (1e-6, [-0.416, 0.258, 1.248, -1.090])]:
        assert group_advantages(rewards, 4, "group", eps).tolist() == pytest.approx(expected, abs=3e-3)


def test_advantages_shift_scale_and_permute_with_the_rewards():
    one = group_advantages(REWARDS, 4, "group", 1e-4)
    torch.testing.assert_close(group_advantages(REWARDS + 3, 4, "group", 1e-4), one, atol=1e-5, rtol=0)
    torch.testing.assert_close(group_advantages(REWARDS * 10, 4, "group", 1e-4), one, atol=0, rtol=1e-3)
    none = group_advantages(REWARDS, 4, "none", 1e-4)
    torch.testing.assert_close(group_advantages(REWARDS * 10, 4, "none", 1e-4), 10 * none)
    order = torch.tensor([2, 0, 3, 1, 7, 6, 5, 4])
    torch.testing.assert_close(group_advantages(REWARDS[order], 4, "group", 1e-4), one[order])


def test_filters_keep_the_groups_that_they_should():
    accuracy = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).float().flatten()
    mixed = [0.98, 0.10, 0.18, 0.98]
    rewards = torch.tensor([mixed, [0.19, 0.18, 0.10, 0.19], [0.98] * 4, [0.0] * 4]).flatten()
    assert kept_groups(rewards, accuracy, 4, "none").tolist() == [True] * 4
    assert kept_groups(rewards, accuracy, 4, "reward").tolist() == [True, True, False, False]
    assert kept_groups(rewards, accuracy, 4, "accuracy").tolist() == [True, False, False, False]


# ---------------------------------------------------------------- token losses


def test_surrogate_of_each_token():
    losses, ratio = policy_loss(NEW, OLD, A, MASK, Args(clip_high=0.2))
    expected = [-1.2, -0.670320, -1.105171, 1.193460, 0.723870]
    assert losses[MASK].tolist() == pytest.approx(expected, abs=1e-6)
    assert ratio[MASK].tolist() == pytest.approx([1.221403, 0.670320, 1.105171, 1.491825, 0.904837], abs=1e-6)
    expected[0] = -1.221403
    for settings in ({"clip_high": 0.28}, {"clip_high": 0.3, "delta": 3.0}):
        losses, _ = policy_loss(NEW, OLD, A, MASK, Args(**settings))
        assert losses[MASK].tolist() == pytest.approx(expected, abs=1e-6)


def test_delta_bounds_the_loss_of_an_unlikely_token_made_likely():
    one = torch.ones(1, 1, dtype=torch.bool)
    for delta, expected in [(0.0, 3.585351), (3.0, 2.4)]:
        args = Args(clip_high=0.2, delta=delta)
        losses, _ = policy_loss(torch.tensor([[1.5]]), torch.zeros(1, 1), torch.tensor([[-0.8]]), one, args)
        assert losses.item() == pytest.approx(expected, abs=1e-6)


def test_sequence_level_ratio():
    args = Args(importance_sampling_level="sequence", clip_high=0.2)
    losses, ratio = policy_loss(NEW, OLD, A, MASK, args)
    assert ratio[:, 0].tolist() == pytest.approx([0.967216, 1.161834], abs=1e-6)
    assert losses[:, 0].tolist() == pytest.approx([-0.967216, 0.929467], abs=1e-6)
    assert loss(NEW, loss_type="grpo", importance_sampling_level="sequence").item() == pytest.approx(
        -0.018874, abs=1e-6
    )
    narrow = dict(clip_low=3e-4, clip_high=4e-4, importance_sampling_level="sequence")
    assert loss(NEW, loss_type="dapo", **narrow).item() == pytest.approx(-0.208543, abs=1e-6)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_a_sequences_ratio_has_the_gradient_of_its_formula(loss_type):
    """GSPO, eq. 5: one ratio a row, with its gradient through every token; clipped rows get none."""
    settings = dict(loss_type=loss_type, importance_sampling_level="sequence", clip_low=0.01, clip_high=0.2)
    logprobs = NEW.clone().requires_grad_()
    ratio = (torch.where(MASK, logprobs - OLD, 0).sum(1) / MASK.sum(1)).exp()[:, None]
    surrogate = -torch.minimum(ratio * A, ratio.clamp(0.99, 1.2) * A)
    weights = token_weights(MASK, loss_type, 2, 5, 4).double()
    (expected,) = torch.autograd.grad((surrogate * weights).sum(), logprobs)
    (found,) = torch.autograd.grad((policy_loss(logprobs, OLD, A, MASK, Args(**settings))[0] * weights).sum(), logprobs)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)
    assert expected.abs().max() > 0.01


def test_at_the_level_of_sequences_tokens_keep_their_own_advantages():
    """GSPO, section 4.3: the gradient of a token's loss is its own, so that a method may weigh or leave out tokens."""
    logprobs = NEW.clone().requires_grad_()
    advantages = torch.tensor([[1.0, 0.0, 2.0], [0.0, -1.0, 0.0]])
    losses, ratio = policy_loss(logprobs, NEW, advantages, MASK, Args(importance_sampling_level="sequence"))
    losses.sum().backward()
    assert torch.equal(logprobs.grad, -advantages * MASK) and (ratio == 1).all()


def test_k3_of_each_token():
    k3 = k3_divergence(NEW, REF)
    assert k3[MASK].tolist() == pytest.approx([0.004837, 0.049859, 0.070320, 0.106531, 0.021403], abs=1e-6)
    assert k3[MASK].mean().item() == pytest.approx(0.050590, abs=1e-6)
    d = torch.linspace(-30, 30, 64)
    k3 = k3_divergence(torch.zeros(64), d)
    assert k3.isfinite().all() and (k3 > 0).all() and k3_divergence(d, d).abs().max() == 0
    assert k3_divergence(torch.zeros(1), torch.tensor([200.0])).isfinite().all(), (
        "far from the reference, still a number"
    )


@pytest.mark.parametrize(
    "loss_type, clip_high, kl_coef, expected",
    [
        ("grpo", 0.2, 0, -0.016583), ("grpo", 0.2, 0.04, -0.014470),
        ("grpo", 0.28, 0, -0.020150), ("grpo", 0.28, 0.04, -0.018037),
        ("dapo", 0.2, 0, -0.211632), ("dapo", 0.2, 0.04, -0.209609),
        ("dapo", 0.28, 0, -0.215913), ("dapo", 0.28, 0.04, -0.213889),
        ("bnpo", 0.2, 0, -0.211632),
        ("dr_grpo", 0.2, 0, -0.132270), ("dr_grpo", 0.2, 0.04, -0.131005),
        ("dr_grpo", 0.28, 0, -0.134946), ("dr_grpo", 0.28, 0.04, -0.133681),
    ],
)  # fmt: skip
def test_loss_of_two_rows(loss_type, clip_high, kl_coef, expected):
    value = loss(NEW, loss_type=loss_type, clip_high=clip_high, kl_coef=kl_coef)
    assert value.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "loss_type, kl_coef, expected",
    [
        ("grpo", 0, [[0, -0.111720, -0.184195], [0.298365, 0.180967, 0]]),
        ("grpo", 0.04, [[0.000634, -0.114052, -0.181997], [0.302300, 0.178753, 0]]),
        ("dapo", 0, [[0, -0.134064, -0.221034], [0.238692, 0.144774, 0]]),
        ("dapo", 0.04, [[0.000761, -0.136863, -0.218397], [0.241840, 0.143003, 0]]),
        ("dr_grpo", 0, [[0, -0.083790, -0.138146], [0.149182, 0.090484, 0]]),
        ("dr_grpo", 0.04, [[0.000476, -0.085539, -0.136498], [0.151150, 0.089377, 0]]),
    ],
)
def test_gradient_of_two_rows(loss_type, kl_coef, expected):
    settings = dict(loss_type=loss_type, kl_coef=kl_coef)
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(gradient(**settings), expected, atol=2e-6, rtol=0)
    for r, t in itertools.product(range(2), range(3)):  # and by central differences
        step = torch.zeros_like(NEW)
        step[r, t] = 1e-6
        difference = (loss(NEW + step, **settings) - loss(NEW - step, **settings)) / 2e-6
        assert difference.item() == pytest.approx(expected[r, t].item(), abs=2e-6)


def test_on_policy_the_gradient_is_that_of_reinforce():
    values = [loss(NEW, old=NEW, loss_type=name).item() for name in ("grpo", "dapo", "dr_grpo")]
    assert values == pytest.approx([-0.1, -0.28, -0.175], abs=1e-7)
    torch.testing.assert_close(gradient(old=NEW, loss_type="dapo"), -A * MASK / 5)


@pytest.mark.parametrize("loss_type, expected", [("grpo", 0.479332), ("dapo", 0.958665), ("dr_grpo", 0.239666)])
def test_a_truncated_row_is_left_out(loss_type, expected):
    mask = MASK & torch.tensor([[False], [True]])
    assert loss(NEW, mask=mask, loss_type=loss_type).item() == pytest.approx(expected, abs=1e-6)
    nothing = torch.zeros_like(MASK)
    assert (gradient(mask=nothing, loss_type=loss_type) == 0).all()


def test_padding_may_hold_anything():
    for nonsense in (float("nan"), float("inf"), -float("inf")):
        for name in ("grpo", "dapo", "dr_grpo"):
            new, old = NEW.clone(), OLD.clone()
            new[1, 2], old[1, 2] = nonsense, nonsense
            new.requires_grad_()
            value = loss(new, old=old, loss_type=name)
            value.backward()
            assert value.item() == pytest.approx(loss(NEW, loss_type=name).item())
            torch.testing.assert_close(new.grad, gradient(loss_type=name))


def test_the_denominators_are_the_whole_steps():
    """Rows one at a time, with the step's own counts, add up to the loss of both together."""
    for name in ("grpo", "dapo", "dr_grpo"):
        parts = 0
        for r in range(2):
            losses, _ = policy_loss(NEW[[r]], OLD[[r]], A[[r]], MASK[[r]], Args(clip_high=0.2))
            weights = token_weights(MASK[[r]], name, 2, 5, LIMIT)
            parts += (torch.where(MASK[[r]], losses, 0) * weights).sum()
        assert parts.item() == pytest.approx(loss(NEW, loss_type=name).item(), abs=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"updates_per_rollout": 3}, "--prompts-per-step 8: must be a multiple of "),
        ({"delta": 1.1}, r"--delta 1\.1: must exceed 1 "),
        ({"prompt_template": "Say yes."}, "--prompt-template 'Say yes.'"),
        ({"model": "nowhere"}, "--model nowhere: no such folder"),
        ({"soft_punish_cache": 512}, "--soft-punish-cache 512: must be below --max-completion-length 72"),
        *(({name: value}, f"--{name.replace('_', '-')} {value}: must be a") for name, value in (
            ("group_size", 1), ("temperature", 0.0), ("temperature", math.nan), ("top_p", 0.0), ("top_p", 1.5),
            ("top_k", -1), ("max_grad_norm", 0.0), ("updates_per_rollout", 0), ("epochs_per_rollout", 0),
            ("save_every", 0), ("eval_every", -1), ("eval_examples", 0), ("test_examples", -1), ("steps", 0),
            ("prompts_per_step", 0), ("max_completion_length", -5), ("learning_rate", -1.0), ("clip_high", math.inf),
            ("seed", -1), ("lora_rank", -1), ("max_pixels", -1), ("tis_cap", -1.0), ("kl_coef", math.nan),
            ("clip_low", -1.0), ("advantage_eps", -1.0), ("soft_punish_cache", -4), ("micro_batch_tokens", 0),
        )),
    ],
)  # fmt: skip
def test_bad_settings_are_one_line(settings, message):
    with pytest.raises(SystemExit, match=message):
        grpo.check(Args(**settings))
        start_run(Args(**settings), "grpo")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("GRADIENT_ACCUMULATION_STEPS", "4", "configured for 4 gradient accumulation steps"),
        ("MIXED_PRECISION", "fp16", "configured for fp16: arithmetic is bf16"),
    ],
)
def test_what_accelerate_would_do_beside_the_loop_is_refused(name, value, message, tmp_path):
    # accelerate keeps its settings for the whole process, so this asks a new one
    code = "import grpo; from common.run.folder import start_run; start_run(grpo.Args(), 'grpo')"
    output = tmp_path / "output"
    assert commands.run(["-c", code], output, os.environ | {f"ACCELERATE_{name}": value}) == 1
    assert message in output.read_text() and "Traceback" not in output.read_text()


def test_importance_weights_are_capped_and_carry_no_gradient():
    old = torch.tensor([[-1.0, -2.0, -0.5]], requires_grad=True)
    sampled = torch.tensor([[-1.0, -1.0, -3.0]])
    weights = grpo.importance_weights(old, sampled, cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([[1.0, math.exp(-1), 2.0]]))
    assert not weights.requires_grad


def test_a_step_descends_the_objective(monkeypatch, tmp_path):
    rewards = [1.5, 0.5, 0, 1, 1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5]  # only the first group has advantages
    _, logged, policy, _, _, mask, logprobs = one_step(grpo, monkeypatch, tmp_path, [1] * 12, rewards)
    ratio = (logprobs - logprobs.detach()).exp()
    loss = (-standardized(rewards) * ratio)[mask].sum() / mask.sum()
    # Where completions are equally long the loss is 0, since advantages are; its gradient is not.
    norm = gradient_norm(policy, loss)
    assert logged["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert logged["grad_norm"] == pytest.approx(norm, rel=1e-3) and norm > 1e-2
