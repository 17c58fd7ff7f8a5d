"""VPPO: policy gradients for the tokens, and the completions, that depend on the image. Page: docs/vppo.md

    python vppo.py    # built-in model; on GPUs: accelerate launch vppo.py --model Qwen/Qwen3-VL-4B

For each prompt (image and question) sample G completions, score each with a rule, and take the group's own mean for a
baseline: a completion is reinforced as far as it beats its siblings.

VPPO (Huang et al. 2025, arXiv 2510.09285) scores completions again with random image patches black. The tokens whose
log-probability depends most on the image take part in the policy gradient, and completions that depend more count more.

    dependency   S_rt = e^d - d - 1, d = (logprob_rt with the masked image) - (logprob_rt), both of the sampling policy
    filter       keep_rt = 1 for the keep_fraction of the tokens of completion r with the largest S
    shaping      a_r = beta_min + (1 - beta_min) (S_r - min S) / (mean S - min S), S_r the mean of S over completion r
    advantage    A_r = a_r (R_r - mean of its group) / (standard deviation of its group + eps)
    ratio        rho_rt = exp(logprob_rt - old_logprob_rt)
    token loss   q_rt = -keep_rt min(rho_rt A_r, clip(rho_rt, 1 - clip_low, 1 + clip_high) A_r) + kl_coef k3_rt
                        - entropy_coef logprob_rt
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
from common.run.settings import Count, Group, Positive, PositiveShare, Settings, Share, Weight, check_settings, launch


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
    filter_groups: Literal["none", "reward", "accuracy"] = "accuracy"
    """leave groups without reward variance, or all right or all wrong, out of the loss's denominators too"""
    dependency: Literal["k3", "kl"] = "k3"  # from the sampled token, as the authors train, or their eq. 3 in full
    keep_fraction: PositiveShare = 0.4  # share of a completion's tokens that take part in the policy gradient
    beta_min: Share = 0.9  # shaping factor of the completion that depends least (1, without beta_max: no shaping)
    beta_max: Weight = 0.0  # shaping factor of the one that depends most (0: such that the mean factor is 1)
    mask_prob: Share = 0.5  # probability that a patch is black in the masked image
    mask_per: Literal["prompt", "row"] = "prompt"  # one masked image a prompt, or one a row as in the authors' code
    entropy_coef: Weight = 0.06  # weight of the sampled tokens' negative log-likelihood, on all tokens


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


def visual_dependency(old_logprobs, masked_logprobs, completion_mask: torch.Tensor) -> torch.Tensor:
    """S [R, T] float32 without gradient, k3 of KL(image || masked image) at most 10 (VPPO, eq. 3 by appendix B).

    >>> visual_dependency(torch.tensor([[-2.0, -2]]), -torch.ones(1, 2, requires_grad=True), torch.tensor([[1, 0]]) > 0)
    tensor([[0.7183, 0.0000]])
    """
    d = torch.where(completion_mask, masked_logprobs - old_logprobs, 0).detach().clamp(-20, 20)
    return (d.expm1() - d).clamp(0, 10)


def vocabulary_divergence(hidden, masked_hidden, head, banned: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(image || masked image) over the vocabulary (VPPO, eq. 3), [Z] float32, in chunks, of hidden states [Z, H].

    >>> vocabulary_divergence(torch.zeros(1, 3), torch.tensor([[4., 1, 9]]).log(), torch.eye(3), torch.arange(3) > 1, 1)
    tensor([0.2231])
    """
    bias = torch.zeros(len(head), device=head.device).masked_fill(banned, -1e30)  # [V] words that are never drawn
    values = []
    for pair in zip(hidden.split(256), masked_hidden.split(256), strict=True):
        clean, masked = (((x @ head.T.to(x.dtype)).float() / temperature + bias).log_softmax(-1) for x in pair)
        values.append((clean.exp() * (clean - masked)).sum(-1))
    return torch.cat(values)


def shaping_factors(row_dependency, seen: torch.Tensor, args: Args) -> torch.Tensor:
    """What advantages [R] are multiplied by (VPPO, eq. 5), 1 where all depend alike; `seen` [S]: all rows that count.

    >>> shaping_factors(torch.tensor([0.1, 0.2, 0.6]), torch.tensor([0.1, 0.2, 0.6]), Args(beta_min=0.8))
    tensor([0.8000, 0.9000, 1.3000])
    """
    if not len(seen) or seen.amax() - seen.amin() <= 1e-6:
        return torch.ones_like(row_dependency)
    point, factor = (seen.amax(), args.beta_max) if args.beta_max else (seen.mean(), 1)  # of the line from the least
    return args.beta_min + (factor - args.beta_min) * (row_dependency - seen.amin()) / (point - seen.amin())


def token_filter(dependency: torch.Tensor, completion_mask: torch.Tensor, keep_fraction: float) -> torch.Tensor:
    """The ceil(keep_fraction n) of each completion's n tokens that depend most [R, T] bool; of equals the earlier.

    >>> token_filter(torch.tensor([[0.3, 0.3, 0.1, 0.9]]), torch.tensor([[True, True, True, False]]), 0.3)
    tensor([[ True, False, False, False]])
    """
    count = (completion_mask.sum(1).double() * keep_fraction - 1e-6).ceil()  # [R] 0.6 * 25 is a little over 15
    order = dependency.masked_fill(~completion_mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return (order.argsort(dim=1) < count[:, None]) & completion_mask


def blacken_patches(pixel_values, uniforms: torch.Tensor, mask_prob: float, black: torch.Tensor) -> torch.Tensor:
    """Patches [P, patch volume], those `black` [patch volume] whose number in `uniforms` [P] is below `mask_prob`.

    >>> blacken_patches(torch.ones(3, 2), torch.tensor([0.9, 0.5, 0.1]), 0.5, torch.zeros(2))[:, 0]
    tensor([1., 1., 0.])
    """
    return torch.where((uniforms < mask_prob)[:, None], black, pixel_values)


def masked_prompts(prompts, policy, step: int, places: list[int], args: Args):
    """The prompts with random patches black: one view for each prompt at `places` of the step, or one for each row."""
    streams = [(place, 1 + g) for place in places for g in range(args.group_size if args.mask_per == "row" else 1)]
    masked = prompts.select([places.index(place) for place, _ in streams])
    if masked.pixel_values is not None:
        uniforms = uniform_numbers(args.seed, step, streams, masked.patches).to(policy.device)  # [P]
        masked.pixel_values = blacken_patches(masked.pixel_values, uniforms, args.mask_prob, policy.black_patch)
    return masked


@torch.no_grad()
def token_dependency(scorer, policy, batch: Batch, step: int, places: list[int], args: Args) -> torch.Tensor:
    """Dependency S [R, T] of the trained rows' tokens: what masked prompts in place of the batch's do to them."""
    masked = masked_prompts(batch.prompts, policy, step, places, args)
    view = Batch(**{**vars(batch), "prompts": masked, "clean": batch.prompts})
    if args.dependency == "k3":
        old_logprobs = batch.sampled_logprobs if batch.old_logprobs is None else batch.old_logprobs
        masked_logprobs = score_rows(scorer, view, args.temperature, args.micro_batch_tokens)
        return visual_dependency(old_logprobs, masked_logprobs, batch.completion_mask & batch.trained[:, None])
    dependency, head = torch.zeros_like(batch.sampled_logprobs), policy.base.get_output_embeddings().weight
    for mb in micro_batches(view, args.group_size, args.micro_batch_tokens):
        inside = mb.completion_mask
        clean, hidden = (scorer(p, mb.ids, inside, args.temperature).hidden[inside] for p in (mb.clean, mb.prompts))
        found = vocabulary_divergence(clean, hidden, head, policy.banned, args.temperature)
        dependency[mb.number, : mb.ids.shape[1]] = torch.zeros_like(mb.sampled_logprobs).masked_scatter(inside, found)
    return dependency


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
        trained = kept & ((advantages.view(-1, args.group_size) != 0).any(1) | bool(args.kl_coef or args.entropy_coef))
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
        if updates > 1:
            batch.old_logprobs = score_rows(scorer, batch, args.temperature, args.micro_batch_tokens)
        if args.kl_coef:
            batch.ref_logprobs = score_rows(reference, batch, args.temperature, args.micro_batch_tokens)
        needed = args.keep_fraction < 1 or args.beta_min < 1 or args.beta_max
        batch.dependency = token_dependency(scorer, policy, batch, step, places, args) if needed else mask * 0.0
        batch.row_dependency = (batch.dependency * completion_mask).sum(1) / completion_mask.sum(1).clamp(min=1)  # [R]
        blind = torch.tensor([not example.images for example in asked], device=device)  # [R]
        batch.keep = token_filter(batch.dependency, completion_mask, args.keep_fraction) | blind[:, None]  # [R, T]
        batch.seen = batch.trained & mask.any(1) & ~blind  # [R] rows whose dependency counts
        meter.add("dependency/no_picture", blind)
        for name, right in (("right", accuracy == 1), ("wrong", accuracy < 1)):
            meter.add(f"dependency/{name}", batch.row_dependency[batch.seen & right])

        # === Update ===
        optimizer.param_groups[0]["lr"] = rate_at(args, step)
        for part in batch.split(args.updates_per_rollout) * args.epochs_per_rollout:
            rows, tokens, trained_rows = total_counts(part, accelerator)  # the means' denominators, over all processes
            meter.total("updates_skipped", (trained_rows == 0) / accelerator.num_processes)
            if not trained_rows:
                continue
            seen = accelerator.gather(part.row_dependency)[accelerator.gather(part.seen)]
            shaping = torch.where(part.seen, shaping_factors(part.row_dependency, seen, args), 1)  # [R]
            part.advantages = (advantages[part.number] * shaping)[:, None] * part.keep  # [R, T]
            meter.add("shaping/mean", shaping[part.seen])
            meter.extremes("shaping/min", "shaping/max", shaping[part.seen])
            for mb in micro_batches(part, args.group_size, args.micro_batch_tokens, scorer):
                scores = scorer(mb.prompts, mb.ids, mb.completion_mask, args.temperature)
                old_logprobs = scores.logprobs.detach() if mb.old_logprobs is None else mb.old_logprobs
                losses, ratio = policy_loss(scores.logprobs, old_logprobs, mb.advantages, mb.mask, args)
                if args.tis_cap:
                    losses = losses * importance_weights(old_logprobs, mb.sampled_logprobs, args.tis_cap)
                losses = losses - args.entropy_coef * scores.logprobs
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
                meter.add("nll", -scores.logprobs, mb.mask)
                for name, inside in (("", mb.mask), ("/kept", mb.mask & mb.keep), ("/dropped", mb.mask & ~mb.keep)):
                    meter.add(f"dependency{name}", mb.dependency, inside)
                meter.add("dependency/kept_share", mb.keep, mb.mask)
                meter.add("dependency/clamped", mb.dependency >= 10, mb.mask)
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
    if args.beta_max and args.beta_max <= args.beta_min:
        raise SystemExit(f"--beta-max {args.beta_max}: must exceed --beta-min {args.beta_min}")


if __name__ == "__main__":
    launch(main, Args)
