"""VGPO: advantages that follow the eye. Page: docs/vgpo.md

    python vgpo.py    # built-in model; on GPUs: accelerate launch vgpo.py --model Qwen/Qwen3-VL-4B

For each prompt (image and question) sample G completions, score each with a rule, and take the group's own mean for a
baseline: a completion is reinforced as far as it beats its siblings.

VGPO (Wang et al. 2026, arXiv 2604.09349) reads how visual a token is off the policy's own states. The most visual ones
late in a completion get a bonus. A token weighs by its completion, a completion by its group, in the advantage.

    focus        F_rt = (cosine(state_rt, mean state of the image tokens) + 1) / 2
    weight       w_rt = F_rt (1 + gate_rt beta t / T_r), gate: the top kappa of the last gamma of the completion, by F
    token        1 + psi_rt, psi = w scaled to [0, 1] over the completion, minus its mean
    trajectory   1 + phi_r, phi = the sum of w over the completion, scaled to [0, 1] over the group, minus its mean
    advantage    A_rt = (1 + psi_rt) (1 + phi_r) (R_r - mean of its group) / (standard deviation of its group + eps)
    ratio        rho_rt = exp(logprob_rt - old_logprob_rt)
    token loss   q_rt = -min(rho_rt A_rt, clip(rho_rt, 1 - clip_low, 1 + clip_high) A_rt) + kl_coef k3_rt
    loss         the mean of q over the tokens of the whole optimizer step (`loss_type` dapo; others below)

GRPO is of DeepSeekMath (Shao et al. 2024, arXiv 2402.03300); its variants go by the field's names: token-level
loss and clip-higher (DAPO, 2503.14476), no length and no difficulty bias (Dr. GRPO, 2503.20783), sequence-level ratios
(GSPO, 2507.18071).

Symbols: N prompts a step over all processes, G completions a prompt, R = N G rows, rows of a prompt together, T tokens.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from common.data.prompts import draw_prompts, fitting_prompts, load_splits, local_places, prefetch
from common.evaluation.training import Evaluations
from common.model.sampling import decode, sample, uniform_numbers
from common.model.training import Batch, micro_batches, prepare, rate_at, rows_of, score_rows, total_counts
from common.rewards.designs import check_tokenizer, overlong_penalty, reward_completions
from common.run.folder import start_run
from common.run.settings import Bounds, Count, Group, Positive, PositiveShare, Settings, Weight, check_settings, launch


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
    compensation: Weight = 0.3  # beta: strength of the bonus for visual tokens late in a completion (0: none)
    tail_share: PositiveShare = 0.5  # gamma: share of a completion, its end, in which tokens can get the bonus
    gated_share: PositiveShare = 0.2  # kappa: share of that tail, its most visual tokens, that gets it
    schedule: Literal["linear", "quadratic", "step"] = "linear"  # the bonus grows with t / T, its square, or at T / 2
    token_clamp: Bounds = (0.0, 2.0)  # of the token factor (the authors' code: 0.1 2; 1 1: no factor)
    trajectory_clamp: Bounds = (0.0, 2.0)  # of the trajectory factor (the authors' code: 0.9 2)


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


def cosines(states: torch.Tensor, prompt_states: torch.Tensor, image_mask: torch.Tensor) -> torch.Tensor:
    """Cosine [R, T] float32 of tokens' own states [R, T, H] and their prompts' mean image states (VGPO, eq. 4).

    >>> cosines(torch.tensor([[[9.0, 0.0]]]), torch.tensor([[[4.0, 0], [2, 8], [7, 7]]]), torch.tensor([[1, 1, 0]]))
    tensor([[0.6000]])
    """
    prototypes = (prompt_states.float() * image_mask[..., None]).sum(1) / image_mask.sum(1, keepdim=True).clamp(min=1)
    states, prototypes = states.float(), prototypes.repeat_interleave(len(states) // len(prototypes), dim=0)  # [R, H]
    dots = torch.einsum("rth,rh->rt", states, prototypes)
    return dots / (states.norm(dim=-1) * prototypes.norm(dim=-1)[:, None] + 1e-8)


def compensate(focus: torch.Tensor, mask: torch.Tensor, args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights w [R, T] of focus scores [R, T], 0 outside `mask`, and which tokens got the bonus (VGPO, eqs. 5, 6).

    >>> compensate(torch.tensor([[0.9, 0.5, 0.3, 0.4]]), torch.ones(1, 4).bool(), Args(compensation=0.5))[0]
    tensor([[0.9000, 0.5000, 0.3000, 0.6000]])
    """
    lengths, positions = mask.sum(1, keepdim=True), torch.arange(mask.shape[1], device=mask.device)  # [R, 1], [T]
    start = ((1 - args.tail_share) * lengths.double() + 1e-9).floor()
    tail = mask & (positions >= start)
    count = (args.gated_share * (lengths - start) + 1e-9).floor().clamp(min=1).long()  # [R, 1]
    ranked = focus.masked_fill(~tail, -torch.inf).sort(dim=1, descending=True).values
    gate = tail & (focus >= ranked.gather(1, count - 1))  # of equals all
    time = (positions + 1) / lengths.clamp(min=1)  # [R, T]
    growth = {"linear": time, "quadratic": time**2, "step": (time >= 0.5).float()}[args.schedule]
    return torch.where(mask, focus * (1 + gate * args.compensation * growth), 0), gate


def token_factors(weights: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """1 + psi [R, T]: each token against its completion, of mean 1 over it; 1 outside `mask` (VGPO, eqs. 7, 8).

    >>> token_factors(torch.tensor([[0.2, 0.6, 0.4, 9.0]]), torch.tensor([[True, True, True, False]]))
    tensor([[0.5000, 1.5000, 1.0000, 1.0000]])
    """
    low = weights.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    high = weights.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    scaled = torch.where(mask, (weights - low) / (high - low + 1e-8), 0)
    return torch.where(mask, 1 + scaled - scaled.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1), 1)


def trajectory_factors(weights: torch.Tensor, group_size: int) -> torch.Tensor:
    """1 + phi [R]: each completion's sum of weights against its siblings', scaled alike (VGPO, eqs. 9-11).

    >>> trajectory_factors(torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]), group_size=4)
    tensor([1.7500, 0.7500, 0.7500, 0.7500])
    """
    total = weights.sum(1).view(-1, group_size)  # [N, G]
    return token_factors(total, torch.ones_like(total, dtype=torch.bool)).flatten()


@torch.no_grad()
def advantage_factors(states, prompt_states, image_mask, mask, args: Args) -> dict[str, torch.Tensor]:
    """Factors [R, T] of the groups' advantages (VGPO, eq. 12) and what they come from; states [R, T, H], [N, P, H]."""
    cosine = torch.where(mask, cosines(states, prompt_states, image_mask), 0)
    weights, gate = compensate((cosine + 1) / 2, mask, args)
    factors = token_factors(weights, mask).clamp(*args.token_clamp)
    factors = factors * trajectory_factors(weights, args.group_size).clamp(*args.trajectory_clamp)[:, None]
    seen = mask & image_mask.any(1).repeat_interleave(args.group_size)[:, None]  # [R, T] others have a factor of 1
    return {"cosine": cosine, "weight": weights, "gate": gate.float(), "factor": torch.where(seen, factors, 1)}


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
        return draw_prompts(args, policy, train, step, places)

    evaluations.before()
    # `drawn()` returns what `draw` makes of a step; on CUDA a thread works on it while the step before is trained.
    for step, drawn in prefetch(draw, range(first_step, args.steps), in_thread=device.type == "cuda"):
        # === Sample: N prompts, G completions each ===
        meter.start()
        examples, prompts = drawn()
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
        focus = {name: torch.zeros(ids.shape, device=device) for name in ("cosine", "weight", "gate", "factor")}

        def look(mb, scores, focus=focus):  # by the policy that sampled
            image_mask = mb.prompts.input_ids == policy.base.config.image_token_id
            found = advantage_factors(scores.states, scores.prompt_states, image_mask, mb.completion_mask, args)
            for name, values in found.items():
                focus[name][mb.number, : mb.ids.shape[1]] = values

        if updates > 1:
            batch.old_logprobs = score_rows(scorer, batch, args.temperature, args.micro_batch_tokens, look)
        if args.kl_coef:
            batch.ref_logprobs = score_rows(reference, batch, args.temperature, args.micro_batch_tokens)

        # === Update ===
        optimizer.param_groups[0]["lr"] = rate_at(args, step)
        for part in batch.split(args.updates_per_rollout) * args.epochs_per_rollout:
            rows, tokens, trained_rows = total_counts(part, accelerator)  # the means' denominators, over all processes
            meter.total("updates_skipped", (trained_rows == 0) / accelerator.num_processes)
            if not trained_rows:
                continue
            for mb in micro_batches(part, args.group_size, args.micro_batch_tokens, scorer):
                scores = scorer(mb.prompts, mb.ids, mb.completion_mask, args.temperature)
                old_logprobs = scores.logprobs.detach() if mb.old_logprobs is None else mb.old_logprobs
                if updates == 1:
                    look(mb, scores)
                mb.advantages = mb.advantages * focus["factor"][mb.number, : mb.ids.shape[1]]  # [r, t]
                losses, ratio = policy_loss(scores.logprobs, old_logprobs, mb.advantages, mb.mask, args)
                if args.tis_cap:
                    losses = losses * importance_weights(old_logprobs, mb.sampled_logprobs, args.tis_cap)
                if args.kl_coef:
                    kl = k3_divergence(scores.logprobs, mb.ref_logprobs)
                    losses = losses + args.kl_coef * kl
                    meter.add("kl", kl, mb.mask)
                weights = token_weights(mb.mask, args.loss_type, rows, tokens, limit)
                loss = (torch.where(mb.mask, losses, 0) * weights).sum()
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
        lengths, sums = completion_mask.sum(1), focus["weight"].sum(1)  # [R] both
        looked = mask & batch.trained[:, None]  # [R, T]
        meter.add("focus", focus["cosine"], looked)
        meter.add("focus/negative", focus["cosine"] < 0, looked)
        meter.add("focus/gated", focus["gate"], looked)
        late = torch.arange(looked.shape[1], device=device) >= lengths[:, None] / 2  # [R, T]
        for half, inside in (("early", looked & ~late), ("late", looked & late)):
            names = [f"focus/{'right' if right else 'wrong'}/{half}" for right in (accuracy == 1).tolist()]
            meter.add_rows(names, focus["cosine"], inside)
        meter.extremes("focus/factor_min", "focus/factor_max", focus["factor"][looked])
        meter.correlate("focus/length_correlation", sums[batch.trained], lengths[batch.trained], args.group_size)
        batch.focus = focus["cosine"]
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


if __name__ == "__main__":
    launch(main, Args)
