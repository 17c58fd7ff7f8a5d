"""VGPO: the worked numbers, their properties, and states taken at the right positions."""

from dataclasses import replace

import pytest
import torch

import grpo
import vgpo
from common.model.sampling import sample, uniform_numbers
from common.model.scoring import Scorer
from tests.small_models import small_policy, small_prompts

ARGS = vgpo.Args(group_size=2)
close = lambda a, b: torch.testing.assert_close(
    torch.as_tensor(a, dtype=torch.float32), torch.tensor(b), atol=2e-6, rtol=0
)
STATES = torch.tensor(
    [
        [[2.0, 0, 0], [0, 3, 0], [0, 0, 1], [1, 1, 1]],
        [[1.0, 2, 0], [-1, 0, 0], [0, 1, 1], [1, 0, 2]],
    ]
)
PROMPT = torch.tensor([[[7.0, 7, 7], [1, 0, 0], [0, 2, 0], [9, 9, 9]]])
IMAGE = torch.tensor([[False, True, True, False]])
EVERYTHING = torch.ones(2, 4, dtype=torch.bool)


def rows(*cosines):
    """Right-padded cosines [R, T] and their mask."""
    width = max(map(len, cosines))
    values = torch.tensor([[*row, *[99.0] * (width - len(row))] for row in cosines])
    return values, torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in cosines])


def factors_of(values, mask, args=ARGS):
    weights, gate = vgpo.compensate((values + 1) / 2, mask, args)
    token, trajectory = vgpo.token_factors(weights, mask), vgpo.trajectory_factors(weights, args.group_size)
    return weights, gate, token, trajectory


def test_the_main_example_has_the_worked_numbers():
    cosine = vgpo.cosines(STATES, PROMPT, IMAGE)
    close(vgpo.cosines(torch.eye(3)[None], PROMPT, IMAGE), [[0.447214, 0.894427, 0.0]])  # the prototype is 0.5, 1, 0
    close(cosine, [[0.447214, 0.894427, 0.0, 0.774597], [1.0, -0.447214, 0.632456, 0.2]])
    weights, gate, token, trajectory = factors_of(cosine, EVERYTHING)
    assert gate.int().tolist() == [[0, 0, 0, 1], [0, 0, 1, 0]]
    close(weights, [[0.723607, 0.947214, 0.5, 1.153488], [1.0, 0.276393, 0.999879, 0.6]])
    close(token, [[0.835544, 1.177718, 0.493369, 1.493369], [1.388238, 0.388238, 1.388071, 0.835452]])
    close(trajectory, [1.5, 0.5])
    found = vgpo.advantage_factors(STATES, PROMPT, IMAGE, EVERYTHING, ARGS)
    advantages = vgpo.group_advantages(torch.tensor([1.0, 0.0]), 2, "group", 1e-6)[:, None] * found["factor"]
    close(advantages, [[0.886227, 1.249157, 0.523296, 1.583955], [-0.490816, -0.137263, -0.490757, -0.295376]])

    moved = torch.tensor([[0.0, 0.3, -0.3, 0.1], [0.1, -0.3, 0.4, 0.0]], requires_grad=True)
    losses, _ = vgpo.policy_loss(moved, torch.zeros(2, 4), advantages, EVERYTHING, ARGS)
    loss = (losses * vgpo.token_weights(EVERYTHING, "dapo", 2, 8, 4)).sum()
    close(loss.item(), -0.367951)
    (gradient,) = torch.autograd.grad(loss, moved)
    close(gradient, [[-0.110778, 0.0, -0.048458, -0.218818], [0.067804, 0.0, 0.091515, 0.036922]])


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.0, [0.908494, 1.408494, 0.408494, 1.274519]),
        (0.1, [0.867434, 1.337168, 0.397699, 1.397699]),
        (0.5, [0.817275, 1.086373, 0.548176, 1.548176]),
    ],
)
def test_the_bonus_has_the_worked_numbers(beta, expected):
    cosine = vgpo.cosines(STATES, PROMPT, IMAGE)
    close(factors_of(cosine, EVERYTHING, replace(ARGS, compensation=beta))[2][0], expected)


def test_unequal_lengths_and_two_prompts_have_the_worked_numbers():
    values, mask = rows([0.2, 0.4, 0.1, 0.5], [0.3, -0.1], [0.6, 0.0, 0.3], [0.25])
    weights, gate, token, trajectory = factors_of(values, mask)
    assert gate.int().tolist() == [[0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]]
    close(weights.sum(1), [2.825, 1.235, 2.145, 0.8125])
    close(trajectory, [1.5, 0.5, 1.5, 0.5])
    expected = [
        [1.125, 1.477941, 0.948529, 2.448529], [0.75, 0.25, 0.5, 0.5],
        [1.869565, 0.565217, 2.065217, 1.5], [0.5, 0.5, 0.5, 0.5],
    ]  # fmt: skip
    close(token * trajectory[:, None], expected)
    advantages = vgpo.group_advantages(torch.tensor([1.0, 0, 0, 1]), 2, "group", 1e-6)[:, None] * token
    advantages = torch.where(mask, advantages * trajectory[:, None], 0)
    logprobs = torch.zeros(4, 4, requires_grad=True)
    losses, _ = vgpo.policy_loss(logprobs, torch.zeros(4, 4), advantages, mask, ARGS)
    loss = (torch.where(mask, losses, 0) / 10).sum()
    close(loss.item(), -0.070711)
    close(torch.autograd.grad(loss, logprobs)[0], (-advantages / 10).tolist())


@pytest.mark.parametrize(
    ("schedule", "w7", "w9", "total", "token"),
    [
        ("linear", 0.877250, 0.920750, 6.823, [1.171068, 1.492609, 0.602527, 1.602527]),
        ("quadratic", 0.831575, 0.901175, 6.75775, [1.197315, 1.414169, 0.599189, 1.599189]),
        ("step", 0.942500, 0.942500, 6.91, [1.141317, 1.602395, 0.602395, 1.602395]),
    ],
)
def test_schedules_and_ties_have_the_worked_numbers(schedule, w7, w9, total, token):
    values, mask = rows([0.30, 0.10, 0.50, 0.20, 0.40, 0.35, 0.45, 0.05, 0.45, 0.15])
    args = replace(ARGS, schedule=schedule, group_size=1)
    weights, gate, factors, trajectory = factors_of(values, mask, args)
    assert gate[0].nonzero()[:, 0].tolist() == [6, 8], "a tie: both pass"
    close(weights[0, [6, 8]], [w7, w9])
    assert weights.sum().item() == pytest.approx(total, abs=1e-5)
    close(factors[0, [2, 6, 7, 8]], token)
    close(trajectory, [1.0])
    narrow = vgpo.compensate((values + 1) / 2, mask, replace(args, tail_share=0.3))[1]
    assert narrow[0].nonzero()[:, 0].tolist() == [8]


def test_gated_tokens_are_counted_by_the_tail():
    for length, count in (
        (1, 1),
        (2, 1),
        (3, 1),
        (5, 1),
        (9, 1),
        (11, 1),
        (20, 2),
        (21, 2),
        (99, 10),
        (100, 10),
        (2048, 204),
    ):
        values = torch.rand(1, length, generator=torch.Generator().manual_seed(length))
        gate = vgpo.compensate(values, torch.ones(1, length, dtype=torch.bool), ARGS)[1]
        assert gate.sum() == count and gate.nonzero()[:, 1].min() >= length // 2


def test_trajectory_factors_have_the_worked_numbers():
    totals = torch.tensor([310.0, 250, 420, 280, 500, 330, 260, 390])
    factors = vgpo.trajectory_factors(totals[:, None], 8)
    close(factors, [0.87, 0.63, 1.31, 0.75, 1.63, 0.95, 0.67, 1.19])
    close(factors.clamp(0.9, 2.0).mean().item(), 1.085)
    close(
        vgpo.trajectory_factors(torch.tensor([[12.5], [8], [10.25], [9.5]]), 4), [1.541667, 0.541667, 1.041667, 0.875]
    )


def test_degenerate_rows():
    values, mask = rows([0.3] * 4, [0.3] * 4)
    weights, gate, token, trajectory = factors_of(values, mask)
    close(weights[0], [0.65, 0.65, 0.79625, 0.845])
    close(token[1], [0.5625, 0.5625, 1.3125, 1.5625])
    assert torch.equal(trajectory, torch.ones(2)) and gate.int().tolist() == [[0, 0, 1, 1]] * 2
    blind = vgpo.advantage_factors(STATES, PROMPT, torch.zeros_like(IMAGE), EVERYTHING, ARGS)
    assert torch.equal(blind["factor"], torch.ones(2, 4)), "a prompt without image"
    off = replace(ARGS, token_clamp=(1.0, 1.0), trajectory_clamp=(1.0, 1.0))
    assert torch.equal(vgpo.advantage_factors(STATES, PROMPT, IMAGE, EVERYTHING, off)["factor"], torch.ones(2, 4))


def test_factors_do_not_depend_on_the_batch():
    expected = [0.75, 1.035714, 0.607143, 1.607143, 0.892857, 1.107143]
    for others in ([], [[-0.5, 0.1, 0.2, 0.3]], [[0.9] * 12]):
        values, mask = rows([0.2, 0.4, 0.1, 0.5, 0.3, 0.45], *others)
        close(factors_of(values, mask, replace(ARGS, group_size=1))[2][0, :6], expected)


def test_properties():
    dice = torch.Generator().manual_seed(0)
    values = torch.rand(12, 30, generator=dice) * 2 - 1
    mask = torch.arange(30) < torch.randint(1, 31, (12, 1), generator=dice)
    args = replace(ARGS, group_size=4)
    _, _, token, trajectory = factors_of(values, mask, args)
    close((token * mask).sum(1) / mask.sum(1), [1.0] * 12)
    close(trajectory.view(3, 4).mean(1), [1.0] * 3)
    assert (token > 0).all() and (token < 2).all() and (trajectory > 0).all() and (trajectory < 2).all()
    order = torch.tensor([2, 0, 3, 1, 5, 4, 7, 6, 8, 9, 11, 10])
    permuted = factors_of(values[order], mask[order], args)
    torch.testing.assert_close(permuted[2], token[order])
    torch.testing.assert_close(permuted[3], trajectory[order])
    plain = replace(args, compensation=0.0)
    torch.testing.assert_close(factors_of(values * 0.3 + 0.2, mask, plain)[2], factors_of(values, mask, plain)[2])
    assert (factors_of(values + 0.5, mask, args)[2] - token).abs().max() > 1e-3


# --------------------------------------------------------------------------------------------------------- the states


def test_states_are_those_of_the_whole_sequence_at_the_tokens_own_positions():
    """Images of different sizes and prompts of different lengths in one batch, against the model's own forward."""
    policy = small_policy("qwen3_vl")
    prompts, _, _ = small_prompts(policy)
    rollout = sample(policy, prompts, 2, 6, uniform_numbers(0, 0, range(6), 6))
    ids, mask = rollout.completion_ids, rollout.completion_mask
    image_token = policy.base.config.image_token_id
    with torch.no_grad():
        scores = Scorer(policy)(prompts, ids, mask)
        args = replace(ARGS, group_size=2)
        found = vgpo.advantage_factors(
            scores.states, scores.prompt_states, prompts.input_ids == image_token, mask, args
        )
        for r in range(6):
            one, tokens = prompts.select([r // 2]), ids[r : r + 1, : int(mask[r].sum())]
            both = torch.cat([one.input_ids, tokens], dim=1)
            states = policy.base.model(
                input_ids=both, pixel_values=one.pixel_values, image_grid_thw=one.image_grid_thw,
                mm_token_type_ids=(both == image_token).int(),
            ).last_hidden_state[0]  # fmt: skip
            prototype = states[both[0] == image_token].mean(0)
            expected = torch.nn.functional.cosine_similarity(states[one.input_ids.shape[1] :], prototype[None])
            torch.testing.assert_close(found["cosine"][r, : len(expected)], expected, atol=1e-5, rtol=0)
            # The last state is behind the final norm: the output head makes the model's logits of it.
            logits = policy.base.get_output_embeddings()(states)
            own = logits[one.input_ids.shape[1] - 1 : -1].masked_fill(policy.banned, -1e30).log_softmax(-1)
            torch.testing.assert_close(
                scores.logprobs[r, : len(expected)], own.gather(-1, tokens[0, :, None])[:, 0], atol=1e-5, rtol=0
            )


def test_replacing_a_token_changes_its_own_score_and_none_before():
    policy = small_policy("qwen3_vl")
    prompts, _, _ = small_prompts(policy)
    prompts, mask = prompts.select([1]), torch.ones(1, 6, dtype=torch.bool)
    image_mask = prompts.input_ids == policy.base.config.image_token_id
    ids = torch.tensor([[40, 41, 42, 43, 44, 45]])

    def cosine(ids):
        with torch.no_grad():
            scores = Scorer(policy)(prompts, ids, mask)
        return vgpo.cosines(scores.states, scores.prompt_states, image_mask)[0]

    for place in (2, 5):  # the last token, too
        other = ids.clone()
        other[0, place] = 90
        difference = (cosine(other) - cosine(ids)).abs()
        assert (difference[:place] == 0).all() and difference[place] > 1e-4


def run(script, tmp_path, name, **settings):
    args = script.Args(
        steps=2, prompts_per_step=4, group_size=4, test_examples=0, eval_every=0, preflight=False,
        out=str(tmp_path / name), **settings
    )  # fmt: skip
    script.main(args)
    return next((tmp_path / name / "checkpoints").glob("step-000002/*.safetensors")).read_bytes()


def test_without_its_factors_it_is_grpo_to_the_bit(tmp_path):
    off = {"token_clamp": (1.0, 1.0), "trajectory_clamp": (1.0, 1.0)}
    assert run(grpo, tmp_path, "a") == run(vgpo, tmp_path, "b", **off)


def test_each_setting_trains_differently(tmp_path):
    settings = {
        "vgpo": {}, "no bonus": {"compensation": 0.0}, "token": {"trajectory_clamp": (1.0, 1.0)},
        "trajectory": {"token_clamp": (1.0, 1.0)}, "step": {"schedule": "step"}, "twice": {"epochs_per_rollout": 2},
    }  # fmt: skip
    assert len({run(vgpo, tmp_path, name, **chosen) for name, chosen in settings.items()}) == len(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compensation": float("nan")}, "--compensation nan: must be at least 0"),
        ({"tail_share": 0.0}, "--tail-share 0.0: must be above 0 and at most 1"),
        ({"gated_share": 1.5}, "--gated-share 1.5: must be above 0 and at most 1"),
        ({"token_clamp": (2.0, 1.0)}, "--token-clamp 2.0 1.0: each must be at least 0, in order"),
    ],
)
def test_bad_flags_are_one_line(settings, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        vgpo.main(vgpo.Args(out=str(tmp_path / "x"), **settings))
