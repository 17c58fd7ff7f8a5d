"""ROMA: the worked numbers, the stop-gradient, the gate, and views that are scored as they should be."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import grpo
import roma
from common.corruptions import SEEN
from common.model.sampling import sample, uniform_numbers
from common.model.scoring import Scorer
from common.model.training import Batch, rows_of
from tests.one_step import gradient_norm, one_step, standardized
from tests.small_models import small_policy, small_prompts

PAD = (77.0, 55.0, -55.0)  # nonsense on padding, which must change nothing
OLD = [[-0.50, -1.20, -0.10], [-0.90, -0.30, PAD[0]]]
CLEAN = [[-0.40, -1.00, -0.15], [-1.20, -0.35, PAD[1]]]
VIEWS = [[[-0.60, -2.50, -0.12], [-1.00, -0.90, PAD[2]]], [[-1.40, -0.80, -0.16], [-1.25, -0.36, PAD[0]]]]
MASK = torch.tensor([[True, True, True], [True, True, False]])
ARGS = roma.Args(clip_low=0.2, clip_high=0.2)
close = lambda a, b: torch.testing.assert_close(torch.as_tensor(a), torch.tensor(b), atol=2e-6, rtol=0)


def losses(
    correct=(1, 0), how="token", aux_view=(1, 1), advantages=(1.0, -0.5), clean=CLEAN, views=VIEWS, old=OLD,
    args=ARGS, gate_aux=True, dtype=torch.float32,
):  # fmt: skip
    """The three terms, the total and the gradients of both sides, put together as roma.py does."""
    clean = torch.tensor(clean, dtype=dtype, requires_grad=True)
    views = torch.tensor(views, dtype=dtype, requires_grad=True)
    correct, advantages = torch.tensor(correct, dtype=torch.bool), torch.tensor(advantages, dtype=dtype)
    weights = MASK / 5
    token_loss, _ = roma.policy_loss(clean, torch.tensor(old, dtype=dtype), advantages[:, None], MASK, args)
    policy = (torch.where(MASK, token_loss, 0) * weights).sum()
    mask = MASK & correct[:, None]
    divergences = roma.surrogate_kl(clean, views, mask)
    worst, _ = roma.worst_case(divergences, mask, how)
    aux = roma.aux_loss(views, torch.tensor(aux_view), advantages[:, None], mask if gate_aux else MASK)
    kl, aux = (worst * weights).sum(), (aux * weights).sum()
    total = policy + 0.1 * kl + 0.1 * aux
    grad_clean, grad_views = torch.autograd.grad(total, (clean, views))
    return policy.item(), kl.item(), aux.item(), total.item(), grad_clean, grad_views


def test_divergences_have_the_worked_numbers():
    divergences = roma.surrogate_kl(torch.tensor(CLEAN), torch.tensor(VIEWS), MASK)
    close(divergences[0], [[0.018731, 0.723130, 0.000455], [0.021403, 0.126950, 0.0]])
    close(divergences[1], [[0.367879, 0.021403, 0.000050], [0.001229, 0.000050, 0.0]])
    worst, winner = roma.worst_case(divergences, MASK, "token")
    close(worst, [[0.367879, 0.723130, 0.000455], [0.021403, 0.126950, 0.0]])
    assert winner.tolist() == [[1, 0, 0], [0, 0, 0]]
    worst, winner = roma.worst_case(divergences, MASK, "sequence")
    assert winner.tolist() == [[0, 0, 0], [0, 0, 0]]
    close(worst, divergences[0].tolist())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (-0.476157, 0.218293, 0.472000, -0.407128)),
        ({"how": "sequence"}, (-0.476157, 0.148463, 0.472000, -0.414111)),
        ({"aux_view": (0, 0)}, (-0.476157, 0.218293, 0.644000, -0.389928)),
        ({"correct": (1, 1)}, (-0.476157, 0.247963, 0.311000, -0.420261)),
        ({"correct": (0, 0)}, (-0.476157, 0.0, 0.0, -0.476157)),
        ({"gate_aux": False}, (-0.476157, 0.218293, 0.311000, -0.423228)),
        ({"args": replace(ARGS, clip_high=0.28)}, (-0.480438, 0.218293, 0.472000, -0.411408)),
        ({"how": "mean"}, (-0.476157, 0.113165, 0.472000, -0.476157 + 0.0113165 + 0.0472)),
        ({"old": CLEAN, "advantages": (0.0, 0.0), "correct": (1, 1)}, (0.0, 0.247963, 0.0, 0.024796)),
        ({"old": CLEAN, "advantages": (0.7, -0.7), "correct": (0, 0)}, (-0.14, 0.0, 0.0, -0.14)),
        ({"old": CLEAN, "views": [CLEAN, CLEAN]}, (-0.4, 0.0, 0.31, -0.369)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_have_the_worked_numbers(settings, expected, dtype):
    close(losses(**settings, dtype=dtype)[:4], list(expected))


def test_gradients_have_the_worked_numbers_and_stop_at_the_clean_side():
    *_, clean, views = losses()
    # With the clean side not detached row 0 would be -0.208392, 0.015537, -0.190855.
    close(clean, [[-0.221034, 0.0, -0.190246], [0.0, 0.095123, 0.0]])
    close(views[0], [[0.0, -0.015537, 0.000609], [0.0, 0.0, 0.0]])
    close(views[1], [[-0.032642, -0.020000, -0.020000], [0.0, 0.0, 0.0]])
    *_, views = losses(how="sequence")
    close(views[0], [[-0.003625, -0.015537, 0.000609], [0.0, 0.0, 0.0]])
    close(views[1], [[-0.02, -0.02, -0.02], [0.0, 0.0, 0.0]])


def test_view_gradients_equal_finite_differences():
    views = torch.tensor(VIEWS, dtype=torch.float64)
    *_, gradient = losses(dtype=torch.float64)
    for place in np.ndindex(2, 2, 3):
        if MASK[place[1:]]:
            up, down = views.clone(), views.clone()
            up[place] += 1e-6
            down[place] -= 1e-6
            totals = [losses(views=moved.tolist(), dtype=torch.float64)[3] for moved in (up, down)]
            slope = (totals[0] - totals[1]) / 2e-6
            assert abs(slope - gradient[place]) < 1e-6


def test_clamps():
    gaps = torch.tensor([-3.0, -2.0, -1.0, 0.0, 1.0, 5.0, 10.9, 12.0, -30.0])
    views = (-gaps)[None, None].requires_grad_()
    divergence = roma.surrogate_kl(torch.zeros(1, 9), views, torch.ones(1, 9, dtype=torch.bool))
    close(divergence[0, 0], [10.0, 4.389056, 0.718282, 0.0, 0.367879, 4.006738, 9.900018, 10.0, 10.0])
    (gradient,) = torch.autograd.grad(divergence.sum(), views)
    # dD/dgap, of the opposite sign
    close(-gradient[0, 0], [0.0, -6.389056, -1.718282, 0.0, 0.632121, 0.993262, 0.999982, 0.0, 0.0])


def test_the_estimate_is_unbiased_for_the_divergence_and_its_gradient():
    clean = torch.tensor([0.50, 0.30, 0.15, 0.05], dtype=torch.float64)
    logits = torch.tensor([0.25, 0.25, 0.40, 0.10], dtype=torch.float64).log().requires_grad_()
    view = logits.log_softmax(-1)
    divergence = roma.surrogate_kl(clean.log()[None], view[None, None], torch.ones(1, 4, dtype=torch.bool))[0, 0]
    close(divergence.float(), [0.193147, 0.015655, 0.685837, 0.306853])
    expected = (clean * divergence).sum()
    close(expected.float(), 0.219488)
    (gradient,) = torch.autograd.grad(expected, logits)
    close(gradient.float(), [-0.25, -0.05, 0.25, 0.05])
    second = torch.tensor([0.55, 0.20, 0.20, 0.05], dtype=torch.float64).log()
    both = roma.surrogate_kl(clean.log()[None], torch.stack([view[None], second[None]]), torch.ones(1, 4).bool())
    worst, _ = roma.worst_case(both, torch.ones(1, 4).bool(), "token")
    close((clean * worst[0]).sum().float(), 0.236431)


def test_properties_of_the_view_terms():
    dice = torch.Generator().manual_seed(0)
    clean, views = -torch.rand(6, 9, generator=dice) * 3, -torch.rand(3, 6, 9, generator=dice) * 3
    mask = torch.rand(6, 9, generator=dice) < 0.7
    divergences = roma.surrogate_kl(clean, views, mask)
    assert (divergences >= 0).all() and (divergences[:, ~mask] == 0).all()
    token, sequence, mean = (roma.worst_case(divergences, mask, how)[0] for how in ("token", "sequence", "mean"))
    assert token.sum() >= sequence.sum() >= mean.sum()
    repeated = roma.worst_case(roma.surrogate_kl(clean, torch.cat([views, views]), mask), mask, "token")[0]
    assert torch.equal(repeated, token)
    permuted = roma.worst_case(divergences[[2, 0, 1]], mask, "sequence")[0]
    assert torch.equal(permuted, sequence)
    garbage = views.masked_fill(~mask, torch.nan).requires_grad_()
    assert torch.equal(roma.surrogate_kl(clean.masked_fill(~mask, torch.nan), garbage, mask), divergences)
    loss = roma.surrogate_kl(clean, garbage, mask).sum()
    loss = loss + roma.aux_loss(garbage, torch.ones(6).long(), clean[:, :1], mask).sum()
    assert torch.autograd.grad(loss, garbage)[0].isfinite().all()


def test_micro_batches_add_up():
    # Row 0 and row 1 alone, each with the global number of tokens.
    alone = [losses(correct=(1, 0))[3]]
    parts = []
    for row in (0, 1):
        advantages = [0.0, 0.0]
        advantages[row] = (1.0, -0.5)[row]
        parts.append(losses(correct=(1 - row, 0), advantages=tuple(advantages))[3])
    close(parts, [-0.582251, 0.175123])
    assert abs(sum(parts) - alone[0]) < 1e-6


# -------------------------------------------------------------------------------------------------------------- views


def test_views_are_drawn_by_prompt_and_step_with_different_names():
    args = roma.Args(num_views=4)
    drawn, aux = roma.draw_views(1, 5, 3, args)
    assert (drawn, aux) == roma.draw_views(1, 5, 3, args)
    assert (drawn, aux) != roma.draw_views(1, 6, 3, args) and (drawn, aux) != roma.draw_views(1, 5, 4, args)
    everything = [roma.draw_views(1, step, 0, args) for step in range(200)]
    for names in ({name for name, _ in drawn} for drawn, _ in everything):
        assert len(names) == 4 and names <= set(SEEN)
    assert {s for drawn, _ in everything for _, s in drawn} == {1, 2, 3} and {aux for _, aux in everything} == {
        0,
        1,
        2,
        3,
    }


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_packed_views_equal_each_view_scored_alone(family):
    policy = small_policy(family)
    prompts, _, images = small_prompts(policy)
    rollout = sample(policy, prompts, 3, 8, uniform_numbers(0, 0, range(9), 8))
    ids, mask = rollout.completion_ids, rollout.completion_mask
    viewed = [1, 6, 8]
    turns = (Image.Transpose.ROTATE_180, Image.Transpose.FLIP_LEFT_RIGHT)  # keep the size
    other = [[[image.transpose(turn) for image in images[n]] for n in range(len(images))] for turn in turns]
    views = [prompts.with_images(policy, pictures) for pictures in other]
    scorer, members = Scorer(policy), [2, 0]
    own = rows_of(members, 3)
    batch = Batch(prompts=prompts, views=views, ids=ids)
    packed, rows, prompt_of_row = batch.pack_views(own, viewed, group_size=3)
    assert rows == [6, 7, 8, 0, 1, 2, 1, 6, 8, 1, 6, 8]
    scores = scorer(packed, ids[rows], mask[rows], 1.0, prompt_of_row).logprobs
    clean = scorer(prompts.select(members), ids[own], mask[own]).logprobs
    torch.testing.assert_close(scores[:6], clean, atol=1e-5, rtol=0)
    for k in range(2):
        alone = [scorer(views[k].select([r // 3]), ids[[r]], mask[[r]]).logprobs[0] for r in viewed]
        torch.testing.assert_close(scores[6 + 3 * k : 9 + 3 * k], torch.stack(alone), atol=1e-5, rtol=0)
    assert (scores[6:9] - scores[9:12]).abs().max() > 1e-4, "views that show something else score something else"


def run(script, tmp_path, name, **settings):
    args = script.Args(
        steps=2, prompts_per_step=4, group_size=4, test_examples=0, eval_every=0, preflight=False,
        out=str(tmp_path / name), **settings
    )  # fmt: skip
    script.main(args)
    lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    weights = next((tmp_path / name / "checkpoints").glob("step-000002/*.safetensors")).read_bytes()
    return lines, weights


def test_without_coefficients_it_is_grpo_to_the_bit(tmp_path):
    assert run(grpo, tmp_path, "a")[1] == run(roma, tmp_path, "b", kl_view_coef=0.0, aux_coef=0.0)[1]


def test_a_step_descends_equation_7(monkeypatch, tmp_path):
    """The loss and the gradient of a whole step, from equations (2), (5), (6) and (7) on a freshly loaded policy."""
    correct = [1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0]  # the last two groups have no advantages
    rewards = [1.5, 0.5, 0, 1, 1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5]  # wrong answers in the right form pay too
    seen, drawn = {}, roma.corrupted_prompts
    monkeypatch.setattr("roma.corrupted_prompts", lambda *a: seen.setdefault("drawn", drawn(*a)))
    args, logged, policy, _, ids, mask, clean = one_step(
        roma, monkeypatch, tmp_path, correct, rewards, kl_view_coef=3.0, aux_coef=5.0, train_severities=(5,)
    )
    views = torch.stack([Scorer(policy)(view, ids, mask).logprobs for view in seen["drawn"][2]])
    advantages = standardized(rewards)
    auxiliary = [roma.draw_views(8, 0, n, args)[1] for n in range(3) for _ in range(4)]
    gap = clean.detach() - views
    worst = ((-gap).exp() - 1 + gap).clamp(max=10).amax(0)
    right = mask & (torch.tensor(correct) == 1)[:, None]
    terms = {
        "policy": (-advantages * (clean - clean.detach()).exp())[mask].sum() / mask.sum(),
        "view_kl": 3.0 * worst[right].sum() / mask.sum(),
        "view_aux": 5.0 * (-advantages * views[auxiliary, range(12)])[right].sum() / mask.sum(),
    }
    for name, term in terms.items():
        assert logged[f"loss/{name}"] == pytest.approx(term.item(), abs=1e-4)
    assert logged["loss"] == pytest.approx(sum(terms.values()).item(), abs=1e-4)
    assert min(abs(terms[name].item()) for name in ("view_kl", "view_aux")) > 1e-3
    assert logged["grad_norm"] == pytest.approx(gradient_norm(policy, sum(terms.values())), rel=1e-3)


def test_a_run_ends_with_the_table_and_watches_for_blindness(tmp_path, capsys):
    args = roma.Args(
        steps=1, prompts_per_step=2, group_size=2, eval_every=1, eval_examples=4, test_examples=4, robust_examples=2,
        out=str(tmp_path / "run"),
    )  # fmt: skip
    roma.main(args)
    header, before, after = capsys.readouterr().out.split("\n\n")[-4].splitlines()[:3]
    assert header.split()[:4] == ["model", "clean", "seen", "unseen"]
    assert before.split()[0] == "before" and after.split()[0] == "after"
    assert (tmp_path / "run" / "robustness.json").is_file() and (tmp_path / "run" / "robustness.png").is_file()
    assert "eval/image_reliance" in json.loads((tmp_path / "run" / "metrics.jsonl").read_text())


def test_each_ablation_trains_differently(tmp_path):
    settings = {
        "roma": {}, "no aux": {"aux_coef": 0.0}, "no kl": {"kl_view_coef": 0.0}, "mean": {"kl_worst_case": "mean"},
        "sequence": {"kl_worst_case": "sequence"}, "no gate": {"view_gate": "none"},
        "corrupt": {"corrupt_rollouts": True, "aux_coef": 0.0, "kl_view_coef": 0.0},
    }  # fmt: skip
    weights = {name: run(roma, tmp_path, name, **chosen)[1] for name, chosen in settings.items()}
    assert len(set(weights.values())) == len(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_corruptions": ("seen", "rain")}, "--train-corruptions: corruption 'rain' is not one of seen, "),
        ({"num_views": 6}, "--num-views 6: from 1 to 5, "),
        ({"train_severities": (0, 1)}, "--train-severities 0 1: each must be one of 1 to 5"),
        ({"train_corruptions": ()}, "--train-corruptions: nothing stands behind it"),
        ({"num_views": 0}, "--num-views 0: must be at least 1"),
        ({"kl_view_coef": -1.0}, "--kl-view-coef -1.0: must be at least 0"),
        ({"aux_coef": float("nan")}, "--aux-coef nan: must be at least 0"),
        ({"robust_examples": -1}, "--robust-examples -1: must be at least 0"),
        ({"corrupt_rollouts": True}, "--corrupt-rollouts: a baseline without views; "),
    ],
)
def test_bad_flags_are_one_line(settings, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        roma.main(roma.Args(out=str(tmp_path / "x"), **settings))


def test_the_coefficients_are_those_of_the_model():
    assert [roma.Args(model=m).kl_view_coef for m in ("tiny", "Qwen/Qwen3-VL-4B")] == [0.3, 0.1]
    assert roma.Args(model="Qwen/Qwen3-VL-4B", aux_coef=0.0).aux_coef == 0, "0 is a value"
