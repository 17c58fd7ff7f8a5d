"""ROMA: multimodal reasoning that survives visual degradation. Page: docs/roma.md

    python roma.py    # built-in model; on GPUs: accelerate launch roma.py --model Qwen/Qwen3-VL-4B

For each prompt (image and question) sample G completions, score each with a rule, and take the group's own mean for a
baseline: a completion is reinforced as far as it beats its siblings.

    advantage    A_r = (R_r - mean of its group) / (standard deviation of its group + eps)
    ratio        rho_rt = exp(logprob_rt - old_logprob_rt)
    token loss   q_rt = -min(rho_rt A_r, clip(rho_rt, 1 - clip_low, 1 + clip_high) A_r) + kl_coef k3_rt
    view terms   v_rt = c_r (kl_view_coef max_k D^k_rt - aux_coef A_r view_logprob^j_rt), c_r = 1 for right answers
                 D^k_rt = e^-d - 1 + d, d = (logprob_rt without gradient) - view_logprob^k_rt, j one of the K at random
    loss         the mean of q + v over the tokens of the whole optimizer step (`loss_type` dapo; others below)

ROMA (Liu et al. 2026, arXiv 2605.09262; only its abstract was read, the rest is chosen) samples and compares on clean
images: on a degraded one it would pay to invent. Tokens are scored under K corrupted views too. In right answers, V
rows, the view that deviates most at a token is pulled to the clean one, and one view has a policy gradient.

GRPO is of DeepSeekMath (Shao et al. 2024, arXiv 2402.03300); its variants go by the field's names: token-level
loss and clip-higher (DAPO, 2503.14476), no length and no difficulty bias (Dr. GRPO, 2503.20783), sequence-level ratios
(GSPO, 2507.18071).

Symbols: N prompts a step over all processes, G completions a prompt, R = N G rows, rows of a prompt together, T tokens.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from common.corruptions import check_corruptions, choose, corrupt
from common.data.prompts import draw_prompts, fitting_prompts, load_splits, local_places, prefetch
from common.evaluation.training import Evaluations
from common.model.sampling import decode, sample, uniform_numbers
from common.model.training import Batch, micro_batches, prepare, rate_at, rows_of, score_rows, total_counts
from common.rewards.designs import check_tokenizer, overlong_penalty, reward_completions
from common.run.folder import start_run
from common.run.settings import Count, Group, Positive, Settings, Weight, check_settings, launch


@dataclass
class Args(Settings):
    prompts_per_step: Count = 8  # N: prompts of a rollout, over all processes
    group_size: Group = 8  # G: completions a prompt
    max_completion_length: Count | None = None  # in tokens (default: 72 for the built-in model, else 2048)
    temperature: Positive = 1.0  # of sampling; log-probabilities are taken at it
    learning_rate: Weight | None = None  # highest rate of AdamW (default: 3e-5 for the built-in model, else 1e-6)
    warmup_steps: Count = 1  # steps over which the rate rises to that (1: none)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"  # how it falls to 0 over the others
    max_grad_norm: Positive = 1.0  # gradients are clipped to this norm
    updates_per_rollout: Count = 1  # optimizer steps that a rollout's prompts are divided over
    epochs_per_rollout: Count = 1  # passes over a rollout
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """divide centred rewards by the standard deviation of the group, of the whole step, or not (Dr. GRPO)"""
    advantage_eps: Weight = 1e-4  # added to that standard deviation
    loss_type: Literal["grpo", "dapo", "dr_grpo", "bnpo"] = "dapo"  # how tokens are averaged; see `token_weights`
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """one ratio a token, or their geometric mean over the completion (GSPO)"""
    clip_low: Weight = 0.2  # a ratio below 1 - clip_low gives a token with negative advantage no further push
    clip_high: Weight = 0.28  # a ratio above 1 + clip_high gives one with positive advantage none (clip-higher, DAPO)
    delta: Weight = 0.0  # bound of the ratio where the advantage is negative, above 1 + clip_high (0: none)
    tis_cap: Weight = 0.0
    """weigh tokens by training over sampling probability, at most this, where the two forwards round apart (0: off)"""
    kl_coef: Weight = 0.0  # weight of the k3 penalty to the initial policy (0: no reference is loaded)
    mask_truncated_completions: bool = False
    """leave completions that hit the length limit out of the loss (overlong filtering, DAPO)"""
    filter_groups: Literal["none", "reward", "accuracy"] = "none"
    """leave groups without reward variance, or all right or all wrong, out of the loss's denominators too"""
    num_views: Count = 2  # K: corrupted views of each prompt's images
    kl_view_coef: Weight | None = None  # weight of the worst view's divergence (default: 0.3 built-in model, else 0.1)
    aux_coef: Weight | None = None  # weight of the policy gradient on one view (default: 0.3 built-in model, else 0.1)
    kl_worst_case: Literal["token", "sequence", "mean"] = "token"  # of views; `mean` over them is an ablation
    view_gate: Literal["correct", "none"] = "correct"  # rows that the terms act on: right ones, or (ablation) all
    train_corruptions: tuple[str, ...] = ("seen",)  # names of common/corruptions.py, `seen`, `unseen`, `all`
    train_severities: tuple[int, ...] = (1, 2, 3)  # severities that views are drawn with
    corrupt_rollouts: bool = False  # the paper's counterexample: sample and train on the first view, not clean images
    robust_examples: int | None = None  # of the table clean / seen / unseen (default: 100 built-in model, else 0)


# === The method ===


def group_advantages(rewards: torch.Tensor, group_size: int, scale_rewards: str, eps: float) -> torch.Tensor:
    """Advantages [R] float32 from rewards [R]: each row against the mean of its group (DeepSeekMath, section 4.1.2).

    Statistics are in float64, and a group whose rewards agree to 1e-6 gets exactly 0: in float32 the mean of equal
    rewards can miss them by a bit, which the division would blow up. Standard deviations divide by G - 1.

    >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4, "group", 1e-4)
    tensor([ 1.4997, -0.4999, -0.4999, -0.4999])
    """
    groups = rewards.double().view(-1, group_size)  # [N, G]
    centred = groups - groups.mean(1, keepdim=True)
    if scale_rewards == "group":
        centred = centred / (groups.std(1, keepdim=True) + eps)
    elif scale_rewards == "batch":
        centred = centred / (groups.std() + eps)
    varied = groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True) > 1e-6
    return torch.where(varied, centred, 0).flatten().float()


def kept_groups(rewards: torch.Tensor, accuracy: torch.Tensor, group_size: int, filter_groups: str) -> torch.Tensor:
    """Which groups [N] bool count in the loss: those with varied rewards, or neither all right nor all wrong (DAPO).

    >>> kept_groups(torch.tensor([0.1, 0.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 1.0, 0.0]), 2, "accuracy")
    tensor([False,  True])
    """
    if filter_groups == "none":
        return torch.ones(len(rewards) // group_size, dtype=torch.bool, device=rewards.device)
    groups = (rewards if filter_groups == "reward" else accuracy).view(-1, group_size)
    return groups.amax(1) - groups.amin(1) > 1e-6


def token_weights(
    loss_mask: torch.Tensor, loss_type: str, rows: int | float, tokens: int | float, max_completion_length: int
) -> torch.Tensor:
    """What each token counts in the loss, [R, T] float32, 0 outside `loss_mask`.

    `rows` and `tokens` are those of the whole optimizer step, over all micro-batches and processes, so that a gradient
    does not depend on how the step is cut.

        grpo           1 / (rows * tokens of the row)   a mean of row means (DeepSeekMath, eq. 3)
        dapo, bnpo     1 / tokens                       every token alike (DAPO, eq. 8)
        dr_grpo        1 / (rows * length limit)        a constant, also from step to step (Dr. GRPO, section 3.2)

    Trainers that tell bnpo from dapo divide by the tokens of each micro-batch, so that the gradient depends on the cut;
    where a step is one micro-batch the two agree, and that is what the name means here.

    >>> token_weights(torch.tensor([[True, True, True], [True, False, False]]), "grpo", 2, 4, 3)
    tensor([[0.1667, 0.1667, 0.1667],
            [0.5000, 0.0000, 0.0000]])
    """
    weights = loss_mask.float()
    if loss_type == "grpo":
        return weights / weights.sum(1, keepdim=True).clamp(min=1) / max(rows, 1)
    if loss_type == "dr_grpo":
        return weights / (max(rows, 1) * max_completion_length)
    return weights / max(tokens, 1)


def importance_weights(old_logprobs: torch.Tensor, sampled_logprobs: torch.Tensor, cap: float) -> torch.Tensor:
    """min(pi_old / pi_sampled, cap) of each token [R, T], without gradient: what the rounding of sampling and scoring,
    which are different forwards, does to importance (truncated importance sampling, Yao et al. 2025).

    >>> importance_weights(torch.tensor([-1.0, -1.0]), torch.tensor([-1.1, -2.0]), 2.0)
    tensor([1.1052, 2.0000])
    """
    return (old_logprobs - sampled_logprobs).detach().clamp(-20, 20).exp().clamp(max=cap)


def k3_divergence(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Estimate of KL(policy || reference) on sampled tokens, never negative (DeepSeekMath, eq. 4): e^d - d - 1.

    >>> k3_divergence(torch.tensor([-1.0, -1.0]), torch.tensor([-0.5, -1.5]))
    tensor([0.1487, 0.1065])
    """
    d = (ref_logprobs - logprobs).clamp(-20, 20)
    return d.exp() - d - 1


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    args: Args,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped surrogate of each token (PPO; DeepSeekMath, eq. 3; GSPO, eq. 5) and the ratios, [R, T] float32 each.

    `advantages` is [R, 1] or [R, T]. With a ratio of 1 the loss is -A and its gradient that of -A logprob. A sequence's
    ratio is in value the same for its tokens, in gradient each token's own, so that tokens may weigh differently (GSPO,
    section 4.3); where they weigh alike the sum's gradient is that of eq. 5.

    >>> args = Args()  # clip_low 0.2, clip_high 0.28
    >>> old, new, mask = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.1, -0.5]]), torch.tensor([[True, True]])
    >>> policy_loss(new, old, torch.tensor([[1.0]]), mask, args)
    (tensor([[-0.9048, -1.2800]]), tensor([[0.9048, 1.6487]]))
    """
    log_ratio = torch.where(loss_mask, logprobs - old_logprobs, 0)
    if args.importance_sampling_level == "sequence":
        mean = log_ratio.sum(1, keepdim=True) / loss_mask.sum(1, keepdim=True).clamp(min=1)
        log_ratio = mean.detach() + (log_ratio - log_ratio.detach())
    ratio = log_ratio.clamp(-20, 20).exp()
    clipped = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    bounded = ratio.clamp(max=args.delta) if args.delta else ratio
    return -torch.minimum(bounded * advantages, clipped * advantages), ratio.detach()


def draw_views(seed: int, step: int, place: int, args: Args) -> tuple[list[tuple[str, int]], int]:
    """K corruptions (name, severity), all of different names, and the view of the auxiliary term, for one prompt."""
    dice = np.random.default_rng([seed, step, place, 1])
    names = dice.permutation(choose(args.train_corruptions))[: args.num_views]
    return [(str(n), int(dice.choice(args.train_severities))) for n in names], int(dice.integers(args.num_views))


def surrogate_kl(logprobs: torch.Tensor, view_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Divergence D [K, V, T], k3 on the sampled tokens, at most 10, of views [K, V, T] from clean log-probabilities
    [V, T], 0 outside `mask`. The clean side is detached, or right tokens would fall where a corruption hurts them.

    >>> surrogate_kl(torch.tensor([[-1.0]], requires_grad=True), torch.tensor([[[-2.0]]]), torch.tensor([[True]]))
    tensor([[[0.3679]]])
    """
    gap = torch.where(mask, logprobs.detach() - view_logprobs, 0).clamp(-20, 20)
    return (torch.exp(-gap) - 1 + gap).clamp(max=10)


def worst_case(divergences: torch.Tensor, mask: torch.Tensor, how: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest divergence [V, T] of [K, V, T], at each token or by its mean over `mask` [V, T], and its view [V, T].

    >>> worst_case(torch.tensor([[[0.1, 0.5]], [[0.4, 0.3]]]), torch.tensor([[True, True]]), "token")
    (tensor([[0.4000, 0.5000]]), tensor([[1, 0]]))
    """
    winner = divergences.argmax(0)
    if how == "mean":
        return divergences.mean(0), winner
    if how == "sequence":  # the mean over a row's tokens divides every view by the same number
        winner = (divergences * mask).sum(-1).argmax(0)[:, None].expand_as(winner)
    return divergences.gather(0, winner[None])[0], winner


def aux_loss(view_logprobs, aux_view, advantages, mask: torch.Tensor) -> torch.Tensor:
    """-A logprob [V, T] under each row's view `aux_view` [V] of [K, V, T], A [V, 1] the clean one; 0 outside `mask`.

    >>> aux_loss(torch.tensor([[[-1.0, -2]], [[-3, -4]]]), torch.tensor([1]), 0.5, torch.tensor([[True, False]]))
    tensor([[1.5000, 0.0000]])
    """
    return torch.where(mask, -advantages * view_logprobs[aux_view, torch.arange(len(mask), device=mask.device)], 0)


def corrupted_prompts(policy, examples, prompts, step: int, places: list[int], args: Args):
    """Examples and prompts as drawn, K views of the prompts, and for each prompt its corruptions and auxiliary view."""
    corruptions, aux_views = zip(*(draw_views(args.seed, step, place, args) for place in places), strict=True)
    views = []
    for k in range(args.num_views if args.kl_view_coef or args.aux_coef else int(args.corrupt_rollouts)):
        row = zip(examples, corruptions, places, strict=True)
        pictures = [[corrupt(x, *c[k], (args.seed, step, p, k, i)) for i, x in enumerate(e.images)] for e, c, p in row]
        views.append(prompts.with_images(policy, pictures))
    prompts, views = (views[0], []) if args.corrupt_rollouts else (prompts, views)
    return examples, prompts, views, corruptions, aux_views


def score_with_views(scorer, batch: Batch, args: Args):
    """One forward for a micro-batch: its rows that have a policy gradient, their scores, and its rows that have views
    with `view_logprobs` [K, V, T] and `clean_logprobs` [V, T], which with one update per rollout are sampling's."""
    own, viewed = (rows.nonzero()[:, 0].tolist() for rows in (batch.clean, batch.regularized))
    own = own or ([] if viewed else list(range(len(batch.ids))))
    packed, rows, prompt_of_row = batch.pack_views(own, viewed, args.group_size)
    scores = scorer(packed, batch.ids[rows], batch.completion_mask[rows], args.temperature, prompt_of_row)
    logprobs, view_logprobs = scores.logprobs.split([len(own), len(rows) - len(own)])
    del batch.prompts, batch.views
    mb, seen = batch.rows(own), batch.rows(viewed)
    seen.view_logprobs = view_logprobs.view(args.num_views, len(viewed), -1) if viewed else None
    seen.clean_logprobs = seen.sampled_logprobs if mb.old_logprobs is None else logprobs[[own.index(r) for r in viewed]]
    return mb, scores._replace(logprobs=logprobs, entropy=scores.entropy[: len(own)]), seen


def measure_views(meter, seen: Batch, divergences, worst, winner, aux, corruptions: list, group_size: int) -> None:
    """Log the divergences of views, how much likelier tokens are clean, and how often a corruption was the worst."""
    meter.add("view/kl", worst, seen.mask)
    meter.add("view/kl_mean", divergences.mean(0), seen.mask)
    meter.add("view/clamped", divergences.amax(0) >= 10, seen.mask)
    meter.add("view/aux", aux, seen.mask)
    meter.add("view/advantage", seen.advantages.abs().expand_as(seen.mask), seen.mask)
    for k, view_logprobs in enumerate(seen.view_logprobs):
        names = ["/".join(map(str, corruptions[row // group_size][k])) for row in seen.number.tolist()]
        meter.add_rows([f"view/gap/{name}" for name in names], seen.clean_logprobs - view_logprobs, seen.mask)
        meter.add_rows([f"view/won/{name}" for name in names], winner == k, seen.mask)


# === The run ===


def main(args: Args) -> dict:
    # === Set up ===
    check(args)
    run = start_run(args, Path(__file__).stem)
    accelerator, meter, device = run.accelerator, run.meter, run.accelerator.device
    splits = load_splits(args)
    run.fit(splits)
    limit, sampling = args.max_completion_length, (args.temperature, args.top_p, args.top_k, args.slots)
    policy, scorer, reference, optimizer = prepare(args, accelerator)
    train, held_out, test = fitting_prompts(args, policy, splits)
    check_tokenizer(args.reward, policy.tokenizer)
    first_step = run.restore(policy, optimizer)
    run.preflight(policy, scorer, optimizer, train)
    evaluations = Evaluations(args, run, policy, held_out, test)
    places = local_places(args, accelerator)  # of this process's prompts among the step's N
    numbers = rows_of(places, args.group_size)  # of their rows among the step's R
    local = slice(accelerator.process_index * len(numbers), (accelerator.process_index + 1) * len(numbers))

    def draw(step):
        return corrupted_prompts(policy, *draw_prompts(args, policy, train, step, places), step, places, args)

    evaluations.before()
    # `drawn()` returns what `draw` makes of a step; on CUDA a thread works on it while the step before is trained.
    for step, drawn in prefetch(draw, range(first_step, args.steps), in_thread=device.type == "cuda"):
        # === Sample: N prompts, G completions each ===
        meter.start()
        examples, prompts, views, corruptions, aux_views = drawn()
        uniforms = uniform_numbers(args.seed, step, numbers, limit)  # [R, T] in [0, 1)
        rollout = sample(policy, prompts, args.group_size, limit, uniforms, *sampling)
        ids, completion_mask = rollout.completion_ids, rollout.completion_mask  # [R, T]
        completions = decode(policy, rollout)
        meter.add("completions/mean_length", completion_mask.sum(1))
        meter.add("completions/clipped_ratio", ~rollout.ended)
        meter.lap("sample")

        # === Reward: one number a row ===
        asked = [example for example in examples for _ in range(args.group_size)]  # rows of a prompt stand together
        scored = reward_completions(args.reward, completions, asked, args.encoder)
        rewards, accuracy = (torch.tensor(x, device=device) for x in (scored.rewards, scored.accuracy))  # [R] both
        if args.soft_punish_cache:
            rewards += overlong_penalty(completion_mask.sum(1), limit, args.soft_punish_cache)
        meter.add("reward", rewards)
        meter.add("reward_std", rewards.view(-1, args.group_size).std(1))
        meter.add("accuracy", accuracy)
        meter.add("frac_reward_zero_std", ~kept_groups(rewards, accuracy, args.group_size, "reward"))
        meter.add("frac_accuracy_constant", accuracy.view(-1, args.group_size).std(1) == 0)
        meter.add_terms(scored.terms, scored.verdicts)  # the reward's parts, and how answers were understood
        meter.lap("reward")

        # === Advantage: each row against its group ===
        all_rewards = accelerator.gather(rewards)
        advantages = group_advantages(all_rewards, args.group_size, args.scale_rewards, args.advantage_eps)
        advantages = advantages[local]  # [R]
        kept = kept_groups(rewards, accuracy, args.group_size, args.filter_groups)  # [N] groups that count
        mask = completion_mask & kept.repeat_interleave(args.group_size)[:, None]  # [R, T] tokens that count
        if args.mask_truncated_completions:
            mask = mask & rollout.ended[:, None]
        # Without a penalty a group of equal rewards has no gradient: it counts in the means but is not scored.
        trained = kept & ((advantages.view(-1, args.group_size) != 0).any(1) | bool(args.kl_coef))
        trained = trained & mask.view(len(kept), -1).any(1)  # [N]

        # === Views: everything else that the loss compares the scores with ===
        batch = Batch(
            prompts=prompts,
            ids=ids,
            completion_mask=completion_mask,
            mask=mask,
            advantages=advantages[:, None],
            sampled_logprobs=rollout.logprobs,
            old_logprobs=None,  # with one update those of the scores themselves
            ref_logprobs=None,
            kept=kept.repeat_interleave(args.group_size),
            trained=trained.repeat_interleave(args.group_size),
        )
        updates = args.updates_per_rollout * args.epochs_per_rollout
        batch.views, batch.aux_view = views, torch.tensor(aux_views, device=device).repeat_interleave(args.group_size)
        batch.regularized = ((accuracy == 1) | (args.view_gate == "none")) & mask.any(1) & bool(views)  # [R] have views
        active = trained | batch.regularized.view(len(kept), -1).any(1)  # [N] groups with any term of the loss
        batch.clean = batch.trained if updates == 1 else active.repeat_interleave(args.group_size)
        batch.trained = active.repeat_interleave(args.group_size)
        if updates > 1:
            batch.old_logprobs = score_rows(scorer, batch, args.temperature, args.micro_batch_tokens)
        if args.kl_coef:
            batch.ref_logprobs = score_rows(reference, batch, args.temperature, args.micro_batch_tokens)

        # === Update ===
        optimizer.param_groups[0]["lr"] = rate_at(args, step)
        for part in batch.split(args.updates_per_rollout) * args.epochs_per_rollout:
            rows, tokens, trained_rows = total_counts(part, accelerator)  # the means' denominators, over all processes
            meter.total("updates_skipped", (trained_rows == 0) / accelerator.num_processes)
            if not trained_rows:
                continue
            for both in micro_batches(part, args.group_size, args.micro_batch_tokens // (1 + len(views)), scorer):
                mb, scores, seen = score_with_views(scorer, both, args)
                old_logprobs = scores.logprobs.detach() if mb.old_logprobs is None else mb.old_logprobs
                losses, ratio = policy_loss(scores.logprobs, old_logprobs, mb.advantages, mb.mask, args)
                if args.tis_cap:
                    losses = losses * importance_weights(old_logprobs, mb.sampled_logprobs, args.tis_cap)
                if args.kl_coef:
                    kl = k3_divergence(scores.logprobs, mb.ref_logprobs)
                    losses = losses + args.kl_coef * kl
                    meter.add("kl", kl, mb.mask)
                weights = token_weights(mb.mask, args.loss_type, rows, tokens, limit)
                loss = (torch.where(mb.mask, losses, 0) * weights).sum()
                meter.total("loss/policy", loss / updates)
                if len(seen.ids):
                    divergences = surrogate_kl(seen.clean_logprobs, seen.view_logprobs, seen.mask)  # [K, V, T]
                    worst, winner = worst_case(divergences, seen.mask, args.kl_worst_case)  # [V, T] both
                    aux = aux_loss(seen.view_logprobs, seen.aux_view, seen.advantages, seen.mask)
                    weights = token_weights(seen.mask, args.loss_type, rows, tokens, limit)
                    view_kl = args.kl_view_coef * (worst * weights).sum()
                    view_aux = args.aux_coef * (aux * weights).sum()
                    loss = loss + view_kl + view_aux
                    meter.total("loss/view_kl", view_kl / updates)
                    meter.total("loss/view_aux", view_aux / updates)
                    measure_views(meter, seen, divergences, worst, winner, aux, corruptions, args.group_size)
                accelerator.backward(loss * accelerator.num_processes)  # which averages gradients; the loss is a sum
                meter.total("loss", loss / updates)
                meter.add("entropy", scores.entropy, mb.mask)
                meter.add("mismatch", (old_logprobs - mb.sampled_logprobs).abs(), mb.mask)
                meter.add("clip_ratio/low_mean", (ratio < 1 - args.clip_low) & (mb.advantages < 0), mb.mask)
                meter.add("clip_ratio/high_mean", (ratio > 1 + args.clip_high) & (mb.advantages > 0), mb.mask)
            grad_norm = accelerator.clip_grad_norm_(optimizer.param_groups[0]["params"], args.max_grad_norm)
            meter.add("grad_norm", float(grad_norm))
            if run.check_gradients(grad_norm):
                optimizer.step()
            optimizer.zero_grad()
        meter.lap("update")

        # === Log ===
        metrics = {**meter.reduce(), "lr": optimizer.param_groups[0]["lr"]}
        run.log(step, metrics | evaluations.during(step + 1))
        run.show(step, asked, rollout, completions, scored.terms, rewards, advantages, batch)

        # === Save ===
        if run.save_when_due(step + 1, policy, optimizer):
            return run.stopped(step + 1)

    return evaluations.finish()


def check(args: Args) -> None:
    """Stop with one line before anything long starts."""
    check_settings(args)
    if args.delta and args.delta <= 1 + args.clip_high:
        raise SystemExit(f"--delta {args.delta}: must exceed 1 + --clip-high {args.clip_high}")
    names = check_corruptions(args.train_corruptions, args.train_severities, "--train-")
    if args.num_views > len(names):
        raise SystemExit(f"--num-views {args.num_views}: from 1 to {len(names)}, the --train-corruptions to draw from")
    if args.corrupt_rollouts and (args.kl_view_coef or args.aux_coef):
        raise SystemExit("--corrupt-rollouts: a baseline without views; pass --kl-view-coef 0 --aux-coef 0 with it")


if __name__ == "__main__":
    launch(main, Args)
