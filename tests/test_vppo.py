"""VPPO: the worked numbers, what is constant, and a token that cannot see the image."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import grpo
import vppo
from common.model.inputs import process_images
from common.model.layers import attention
from common.model.sampling import sample, uniform_numbers
from common.model.scoring import Scorer
from tests.one_step import gradient_norm, one_step, standardized, without_a_picture
from tests.small_models import small_policy, small_prompts

close = lambda a, b: torch.testing.assert_close(
    torch.as_tensor(a, dtype=torch.float32), torch.tensor(b), atol=1e-5, rtol=0
)
row_mean = lambda dependency, mask: (dependency * mask).sum(1) / mask.sum(1)  # as main computes it
ARGS = vppo.Args(delta=3.0)
CLEAN = torch.tensor(
    [
        [[2.0, 0.5, -1.0], [0.0, 2.0, 0.4], [-0.5, 1.5, 0.0], [1.0, 0.9, -2.0]],
        [[0.3, 1.1, -0.4], [1.8, -0.6, 0.2], [0.0, 0.0, 2.2], [3.0, 0.0, 0.0]],
    ]
)
MASKED = torch.tensor(
    [
        [[0.5, 0.5, 0.0], [2.0, 0.0, 0.4], [1.0, 0.2, 0.0], [0.8, 1.2, -2.0]],
        [[0.4, 1.0, -0.2], [0.9, 0.3, 0.1], [0.2, -0.1, 1.9], [0.0, 0.0, 3.0]],
    ]
)
TOKENS = torch.tensor([[0, 2, 1, 0], [1, 0, 2, 0]])
MASK = torch.tensor([[True] * 4, [True, True, True, False]])
MOVED = torch.tensor([[0.2, -0.3, 3.0, 0.1], [-0.8, 0.2, 0.5, 0.0]])  # of the sampled tokens' logits since sampling


def chosen(logits):
    return logits.log_softmax(-1).gather(-1, TOKENS[..., None])[..., 0]


def current_logits():
    return CLEAN + torch.zeros_like(CLEAN).scatter(-1, TOKENS[..., None], MOVED[..., None])


def statistics(values, args=ARGS):
    return vppo.shaping_factors(values, values, args)


def loss_of(logprobs, args=ARGS, dependency=None, rows=slice(None)):
    """L_PG, L_H, L of rows [2, 4], put together as vppo.py does, with the statistics of both rows."""
    if dependency is None:
        dependency = vppo.visual_dependency(chosen(CLEAN), chosen(MASKED), MASK)
    keep = vppo.token_filter(dependency, MASK, args.keep_fraction)
    advantages = vppo.group_advantages(torch.tensor([1.0, 0.0]), 2, "group", 1e-6)
    shaped = statistics(row_mean(dependency, MASK), args) * advantages if args.beta_min < 1 else advantages
    losses, _ = vppo.policy_loss(logprobs, chosen(CLEAN), shaped[:, None], MASK, args)
    weights = vppo.token_weights(MASK, "dapo", 2, 7, 4)
    policy, entropy = losses * keep * weights, -torch.where(MASK, logprobs, 0) * weights
    policy, entropy = policy[rows].sum(), entropy[rows].sum()
    return policy, entropy, policy + args.entropy_coef * entropy


def test_dependency_has_the_worked_numbers_and_no_gradient():
    old = torch.tensor([[-0.10, -1.20, -3.00, -0.05, -6.00, -0.01, -0.70]])
    masked = torch.tensor([[-2.30, -1.20, -0.50, -12.05, -0.20, -30.01, -0.90]], requires_grad=True)
    everything = torch.ones(1, 7, dtype=torch.bool)
    dependency = vppo.visual_dependency(old, masked, everything)
    close(dependency, [[1.310803, 0.0, 8.682494, 10.0, 10.0, 10.0, 0.018731]])
    close(row_mean(dependency, everything), [5.716004])
    assert not dependency.requires_grad
    garbage = masked.detach().clone()
    garbage[0, 3:] = torch.tensor([torch.nan, torch.inf, -torch.inf, 5.0])
    part = everything.clone()
    part[0, 3:] = False
    close(vppo.visual_dependency(old, garbage, part)[0], [1.310803, 0.0, 8.682494, 0.0, 0.0, 0.0, 0.0])


def test_two_rows_have_the_worked_numbers():
    dependency = vppo.visual_dependency(chosen(CLEAN), chosen(MASKED), MASK)
    close(dependency, [[0.205066, 0.0, 0.426844, 0.032656], [0.004923, 0.082459, 0.002814, 0.0]])
    close(row_mean(dependency, MASK), [0.166142, 0.030065])
    keep = vppo.token_filter(dependency, MASK, 0.4)
    assert keep.int().tolist() == [[1, 0, 1, 0], [1, 1, 0, 0]]
    worse = dependency.clone()
    worse[1, 3] = torch.nan  # padding is never kept, whatever stands there
    assert torch.equal(vppo.token_filter(worse, MASK, 0.4), keep)


def test_the_divergence_over_the_vocabulary_has_the_worked_numbers():
    head, none = torch.eye(3), torch.zeros(3, dtype=torch.bool)
    full = vppo.vocabulary_divergence(CLEAN.flatten(0, 1), MASKED.flatten(0, 1), head, none, 1.0).view(2, 4)
    close(full[0], [0.355992, 1.293216, 0.598472, 0.030373])
    close(full[1, :3], [0.007137, 0.184269, 0.012471])
    keep = vppo.token_filter(full, MASK, 0.4)
    assert keep.int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 0]]
    close(row_mean(full, MASK), [0.569513, 0.067959])
    # The estimate on the sampled token is unbiased for it.
    p, q = CLEAN.double().log_softmax(-1), MASKED.double().log_softmax(-1)
    estimate = ((q - p).exp() - (q - p) - 1) * p.exp()
    torch.testing.assert_close(estimate.sum(-1), full.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.931579, 1.005263, 0.963158, 1.194737, 0.900000, 0.973684, 1.036842, 0.994737]),
        ({"beta_min": 0.8}, [0.863158, 1.010526, 0.926316, 1.389474, 0.800000, 0.947368, 1.073684, 0.989474]),
        ({"beta_max": 1.1}, [0.921429, 0.971429, 0.942857, 1.100000, 0.900000, 0.950000, 0.992857, 0.964286]),
    ],
)
def test_shaping_has_the_worked_numbers(settings, expected):
    values = torch.tensor([0.05, 0.12, 0.08, 0.30, 0.02, 0.09, 0.15, 0.11])
    factors = statistics(values, replace(ARGS, **settings))
    close(factors, expected)
    if "beta_max" not in settings:
        assert factors.mean().item() == pytest.approx(1, abs=1e-6)
        close(statistics(values * 7, replace(ARGS, **settings)), expected)
        advantages = vppo.group_advantages(torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0]), 8, "group", 1e-6)
        assert torch.equal((factors * advantages).sign(), advantages.sign())
    assert torch.equal(statistics(torch.full((8,), 0.07)), torch.ones(8))
    assert torch.equal(vppo.shaping_factors(values, values[:0], ARGS), torch.ones(8)), "a step of nothing but text"


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [(1.25, 1, -1.25, -1.25), (1.5, 1, -1.28, 0), (0.5, 1, -0.5, -0.5), (1.5, -1, 1.5, 1.5), (0.5, -1, 0.8, 0),
     (2.9, -1, 2.9, 2.9), (4.0, -1, 3.0, 0)],
)  # fmt: skip
def test_surrogate_has_the_worked_numbers(ratio, advantage, loss, gradient):
    logprob = torch.tensor([[ratio]]).log().requires_grad_()
    one = torch.ones(1, 1, dtype=torch.bool)
    losses, _ = vppo.policy_loss(logprob, torch.zeros(1, 1), torch.tensor([[float(advantage)]]), one, ARGS)
    close(losses.item(), float(loss))
    close(torch.autograd.grad(losses.sum(), logprob)[0].item(), float(gradient))


def test_loss_and_gradient_have_the_worked_numbers():
    logits = current_logits().requires_grad_()
    logprobs = chosen(logits)
    logprobs.retain_grad()
    policy, entropy, total = loss_of(logprobs)
    close([policy.item(), entropy.item(), total.item()], [-0.090304, 0.606922, -0.053889])
    total.backward()
    close(logprobs.grad[0], [-0.124181, -0.008571, -0.008571, -0.008571])
    close(logprobs.grad[1], [-0.008571, 0.086232, -0.008571, 0.0])
    close(logits.grad[:, 0], [[-0.022680, 0.018543, 0.004137], [0.003433, -0.005138, 0.001705]])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"keep_fraction": 1.0, "beta_min": 1.0}, -0.123290),
        ({"beta_min": 1.0}, -0.048249),
        ({"keep_fraction": 1.0}, -0.194605),
    ],
)
def test_each_part_can_be_turned_off(settings, expected):
    close(loss_of(chosen(current_logits()), replace(ARGS, **settings))[0].item(), expected)


def test_the_divergence_as_dependency_and_micro_batches():
    head, none = torch.eye(3), torch.zeros(3, dtype=torch.bool)
    full = vppo.vocabulary_divergence(CLEAN.flatten(0, 1), MASKED.flatten(0, 1), head, none, 1.0).view(2, 4) * MASK
    close(loss_of(chosen(current_logits()), dependency=full)[0].item(), -0.035193)
    parts = [loss_of(chosen(current_logits()), rows=[row])[2].item() for row in (0, 1)]
    assert sum(parts) == pytest.approx(-0.053889, abs=1e-6)


def test_equal_views_keep_the_first_tokens_and_change_no_advantage():
    dependency = vppo.visual_dependency(chosen(CLEAN), chosen(CLEAN), MASK)
    assert (dependency == 0).all() and torch.equal(statistics(row_mean(dependency, MASK)), torch.ones(2))
    assert vppo.token_filter(dependency, MASK, 0.4).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]


def test_the_filter_keeps_the_ceiling_of_its_share():
    lengths = torch.arange(1, 601)
    mask = torch.arange(600) < lengths[:, None]
    values = torch.rand(600, 600, generator=torch.Generator().manual_seed(0))
    for fraction in (0.3, 0.4, 0.6, 1.0):
        exact = [-(-int(n) * round(fraction * 10) // 10) for n in lengths]
        kept = vppo.token_filter(values, mask, fraction)
        assert kept.sum(1).tolist() == exact and not (kept & ~mask).any()
        assert values.masked_fill(~kept, 2).amin(1).ge(values.masked_fill(kept | ~mask, -1).amax(1)).all()


# ------------------------------------------------------------------------------------------------------------ the image


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_black_patches_are_those_of_a_picture_with_black_cells(family):
    policy, size = small_policy(family), small_policy(family).image_processor.patch_size
    pixels = np.random.default_rng(0).integers(0, 256, (4 * size, 6 * size, 3), dtype=np.uint8)
    clean, grid = process_images(policy, [Image.fromarray(pixels)])
    assert grid.tolist() == [[1, 4, 6]]
    marks = torch.rand(24, generator=torch.Generator().manual_seed(1))
    masked = vppo.blacken_patches(clean, marks, 0.5, policy.black_patch)
    # The processor lays patches out in blocks of 2 x 2: rows of blocks, blocks, rows in a block, patches.
    cells = (marks < 0.5).view(2, 3, 2, 2).transpose(1, 2).reshape(4, 6).numpy()
    pixels[np.kron(cells, np.ones((size, size), bool))] = 0
    torch.testing.assert_close(masked, process_images(policy, [Image.fromarray(pixels)])[0], atol=1e-6, rtol=0)
    black = policy.black_patch
    assert torch.equal(vppo.blacken_patches(clean, marks, 0.0, black), clean)
    assert torch.equal(vppo.blacken_patches(clean, torch.full((24,), 0.5), 0.5, black), clean), "strictly below"


def test_a_token_that_cannot_see_the_image_does_not_depend_on_it(monkeypatch):
    """Attention from the last completion tokens to everything before them but text is cut: their dependency is 0."""
    policy = small_policy("qwen3_vl")
    prompts, _, _ = small_prompts(policy)
    prompts = prompts.select([0])
    rollout = sample(policy, prompts, 4, 6, uniform_numbers(0, 0, range(4), 6))
    ids, mask = rollout.completion_ids, rollout.completion_mask
    mask = torch.ones_like(mask)
    marks = torch.rand(len(prompts.pixel_values), generator=torch.Generator().manual_seed(0))
    black = policy.black_patch
    masked = replace(prompts, pixel_values=vppo.blacken_patches(prompts.pixel_values, marks, 0.5, black))
    scorer = Scorer(policy)

    def dependency():
        with torch.no_grad():
            return vppo.visual_dependency(scorer(prompts, ids, mask).logprobs, scorer(masked, ids, mask).logprobs, mask)

    assert (dependency() > 1e-7).all()
    width = prompts.input_ids.shape[1]

    def blind(q, k, v, allowed, scale):
        if k.shape[2] > width:  # completions: only their own tokens are seen
            allowed = torch.ones(q.shape[0], 1, q.shape[2], k.shape[2], dtype=torch.bool).tril(width)
            allowed[..., :width] = False
        return attention(q, k, v, allowed, scale)

    monkeypatch.setattr("common.model.scoring.attention", blind)
    seen = dependency()
    assert (seen[:, 1:] < 1e-9).all() and (seen[:, 0] > 1e-7).all(), "only the first is predicted by a prompt token"


def run(script, tmp_path, name, **settings):
    args = script.Args(
        steps=2, prompts_per_step=4, group_size=4, test_examples=0, eval_every=0, preflight=False,
        out=str(tmp_path / name), **settings
    )  # fmt: skip
    script.main(args)
    return next((tmp_path / name / "checkpoints").glob("step-000002/*.safetensors")).read_bytes()


def test_without_its_parts_it_is_dapo_to_the_bit(tmp_path):
    off = {"keep_fraction": 1.0, "beta_min": 1.0, "entropy_coef": 0.0}
    assert run(grpo, tmp_path, "a", filter_groups="accuracy") == run(vppo, tmp_path, "b", **off)


def test_each_setting_trains_differently(tmp_path):
    settings = {
        "vppo": {}, "no filter": {"keep_fraction": 1.0}, "no shaping": {"beta_min": 1.0}, "row": {"mask_per": "row"},
        "kl": {"dependency": "kl"}, "twice": {"epochs_per_rollout": 2}, "fixed": {"beta_max": 1.5},
        "neither": {"keep_fraction": 1.0, "beta_min": 1.0},
        "only above 1": {"keep_fraction": 1.0, "beta_min": 1.0, "beta_max": 1.5},
    }  # fmt: skip
    assert len({run(vppo, tmp_path, name, **chosen) for name, chosen in settings.items()}) == len(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_fraction": 0.0}, "--keep-fraction 0.0: must be above 0 and at most 1"),
        ({"entropy_coef": float("nan")}, "--entropy-coef nan: must be at least 0"),
        ({"mask_prob": 1.5}, "--mask-prob 1.5: must be from 0 to 1"),
        ({"beta_max": 0.5}, "--beta-max 0.5: must exceed --beta-min 0.9"),
    ],
)
def test_bad_flags_are_one_line(settings, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        vppo.main(vppo.Args(out=str(tmp_path / "x"), **settings))


def test_text_and_truncated_rows_are_not_shaped_and_a_second_epoch_shapes_no_more_than_the_first(monkeypatch, tmp_path):
    """The loss of one step of three groups, the second without a picture, some rows cut by the length limit, computed
    apart from the loop: text keeps all its tokens at factor 1; least and mean dependency are those of the others."""
    rewards = [1.5, 0.5, 0, 1] * 3
    monkeypatch.setattr(vppo, "draw_prompts", without_a_picture(vppo.draw_prompts, [1]))
    ended = torch.arange(12) % 3 > 0
    sampled, seen, original = vppo.sample, {}, vppo.token_dependency
    monkeypatch.setattr(vppo, "sample", lambda *a: replace(sampled(*a), ended=ended))
    monkeypatch.setattr(vppo, "token_dependency", lambda *a: seen.setdefault("dependency", original(*a)))
    _, logged, policy, _, _, mask, logprobs = one_step(
        vppo, monkeypatch, tmp_path, [1] * 12, rewards, beta_min=0.5, keep_fraction=0.3, entropy_coef=0.0, clip_low=50,
        clip_high=50, filter_groups="none", mask_truncated_completions=True, epochs_per_rollout=2, learning_rate=0.0,
    )  # fmt: skip
    text = torch.arange(12).div(4, rounding_mode="floor") == 1
    dependency = seen["dependency"]
    row = row_mean(dependency, mask)
    counted = row[ended & ~text]
    shaping = 0.5 + 0.5 * (row - counted.min()) / (counted.mean() - counted.min())
    shaping[text] = 1
    keep = vppo.token_filter(dependency, mask, 0.3) | text[:, None]
    inside = mask & ended[:, None]
    ratio = (logprobs - logprobs.detach()).exp()
    loss = -(standardized(rewards) * shaping[:, None] * keep * ratio)[inside].sum() / inside.sum()
    assert logged["loss"] == pytest.approx(loss.item(), abs=1e-5) and abs(loss) > 1e-3
    assert logged["grad_norm"] == pytest.approx(gradient_norm(policy, loss), rel=1e-3)
    assert logged["dependency/no_picture"] == pytest.approx(1 / 3)
    assert logged["shaping/mean"] == pytest.approx(1, abs=1e-5)


def test_a_step_pays_for_likely_tokens(monkeypatch, tmp_path):
    """VPPO's entropy penalty is the mean negative log-likelihood of all tokens, filtered out or not."""
    rewards = [1.5, 0.5, 0, 1, 1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5]
    _, logged, policy, _, _, mask, logprobs = one_step(
        vppo, monkeypatch, tmp_path, [1] * 12, rewards, keep_fraction=1.0, beta_min=1.0, entropy_coef=0.5,
        filter_groups="none",
    )  # fmt: skip
    ratio = (logprobs - logprobs.detach()).exp()
    loss = (-standardized(rewards) * ratio - 0.5 * logprobs)[mask].sum() / mask.sum()
    assert logged["loss"] == pytest.approx(loss.item(), abs=1e-4)
    assert logged["grad_norm"] == pytest.approx(gradient_norm(policy, loss), rel=1e-3)
