"""NoisyGRPO: explore under noisy images, judge by how noisy they were. Page: docs/noisy_grpo.md

    python noisy_grpo.py    # built-in model; on GPUs: accelerate launch noisy_grpo.py --model Qwen/Qwen3-VL-4B

For each prompt (image and question) sample G completions, score each with a rule, and take the group's own mean for a
baseline: a completion is reinforced as far as it beats its siblings.

NoisyGRPO (Qiu et al. 2025, arXiv 2510.21122) samples each completion on its own noisy copy of the image and trains it
on the clean one. The advantage is a posterior's mean: the noise level gives the prior (the less the better), the reward
the observation, trusted the more the further a group's rewards lie apart.

    noise        image_r = sqrt(abar_t) image + sqrt(1 - abar_t) eps, t = 1000 n_r, n_r the noise level of completion r
    z(x)         (x - mean of its group) / (s(x) + eps), s the standard deviation of its group
    advantage    A_r = z((1 - K) z(R)_r + K z(1 - n)_r), K = v / (prior_var + v), v = lik_alpha / (s(R)^2 + lik_alpha)
    ratio        rho_rt = exp(logprob_rt - old_logprob_rt)
    token loss   q_rt = -min(rho_rt A_r, clip(rho_rt, 1 - clip_low, 1 + clip_high) A_r) + kl_coef k3_rt
    loss         the mean of q over the tokens of the whole optimizer step (`loss_type` dapo; others below)

GRPO is of DeepSeekMath (Shao et al. 2024, arXiv 2402.03300); its variants go by the field's names: token-level
loss and clip-higher (DAPO, 2503.14476), no length and no difficulty bias (Dr. GRPO, 2503.20783), sequence-level ratios
(GSPO, 2507.18071).

Symbols: N prompts a step over all processes, G completions a prompt, R = N G rows, rows of a prompt together, T tokens.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import PIL.Image
import torch

from common.data.prompts import draw_prompts, fitting_prompts, load_splits, local_places, prefetch
from common.evaluation.training import Evaluations
from common.model.sampling import decode, sample, uniform_numbers
from common.model.training import Batch, micro_batches, prepare, rate_at, rows_of, score_rows, total_counts
from common.rewards.designs import check_tokenizer, overlong_penalty, reward_completions
from common.run.folder import start_run
from common.run.settings import Count, Group, Positive, Settings, Share, Weight, check_settings, launch


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
    kl_coef: Weight = 0.04  # weight of the k3 penalty to the initial policy (0: no reference is loaded)
    mask_truncated_completions: bool = False
    """leave completions that hit the length limit out of the loss (overlong filtering, DAPO)"""
    filter_groups: Literal["none", "reward", "accuracy"] = "none"
    """leave groups without reward variance, or all right or all wrong, out of the loss's denominators too"""
    noise_levels: tuple[Share, ...] = (0.0, 0.3, 0.6, 0.9)  # noise of a group's completions, in turn
    noise_draw: Literal["ladder", "uniform"] = "ladder"  # these levels, or each completion's own, uniform from 0 to 1
    noise_images: bool = True  # sample on noisy images (ablation: levels count in the advantage only)
    anneal: bool = False  # let the levels fall to 0 along a sigmoid about two thirds of `steps` (NoisyRollout)
    update_image: Literal["clean", "noisy"] = "clean"  # what log-probabilities are conditioned on in training
    to_bytes: Literal["clamp", "wrap"] = "clamp"  # beyond black and white, or (authors, by accident) modulo 256
    posterior: Literal["bayes", "fixed", "none"] = "bayes"  # trust by spread, by a fixed variance, or rewards alone
    prior_var: Positive = 0.1  # variance of the prior
    lik_alpha: Positive = 0.01  # the likelihood's variance is 1 where all rewards agree, alpha / (s^2 + alpha) else
    lik_var: Positive = 0.1  # likelihood variance of `--posterior fixed`
    tie_mode: Literal["keep", "skip", "shrink"] = "keep"  # equal rewards: trained by noise fully, not, or unscaled


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


ABAR = np.cumprod(1 - ((0.005 - 1e-5) / (1 + np.exp(6 - 12 * np.arange(1000) / 999)) + 1e-5))  # [1000], for each t


def noisy_image(image: PIL.Image.Image, level: float, dice: np.random.Generator, to_bytes: str) -> PIL.Image.Image:
    """The RGB image after step 1000 `level` of the forward process; level 0 is the image itself.

    >>> class dice: standard_normal = np.ones  # for eps = 1: 255 (0.365 + 0.931) is 330 = 256 + 74
    >>> [noisy_image(PIL.Image.new("L", (1, 1), 255), 0.9, dice, how).getpixel((0, 0)) for how in ("clamp", "wrap")]
    [255, 74]
    """
    if level == 0:
        return image
    pixels, abar = np.asarray(image) / 255, ABAR[min(int(1000 * level + 1e-9), 999)]
    noisy = np.trunc((np.sqrt(abar) * pixels + np.sqrt(1 - abar) * dice.standard_normal(pixels.shape)) * 255)
    return PIL.Image.fromarray((np.clip(noisy, 0, 255) if to_bytes == "clamp" else noisy % 256).astype(np.uint8))


def levels_of(step: int, place: int, args: Args) -> np.ndarray:
    """Noise levels [G] float64 of the completions of one prompt.

    >>> levels_of(39, 0, Args(group_size=4, noise_levels=(0.0, 0.5), anneal=True, steps=60)).tolist()
    [0.0, 0.25, 0.0, 0.25]
    """
    drawn = np.random.default_rng([args.seed, step, place, 1 + args.group_size]).random(args.group_size)
    levels = np.resize(args.noise_levels, args.group_size) if args.noise_draw == "ladder" else drawn
    risen = 1 / (1 + np.exp(-30 * (step + 1 - args.steps * 2 / 3) / args.steps))  # NoisyRollout: half at two thirds
    return levels * (1 - risen) if args.anneal else levels


def group_z(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x [N, G] against its group: mean 0, and standard deviation (divisor G - 1) 1 but for `eps`; 0 where all agree.

    >>> group_z(torch.tensor([[3.0, 2.0, 1.0], [0.7, 0.7, 0.7]]), eps=0.25)[:, 0]  # (3 - 2) / (1 + 0.25)
    tensor([0.8000, 0.0000])
    """
    varied = x.amax(1, keepdim=True) - x.amin(1, keepdim=True) > 1e-6
    return torch.where(varied, (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + eps), 0)


def posterior_advantages(rewards: torch.Tensor, levels: torch.Tensor, args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages [R] float32, posterior means of rewards [R] under noise levels [R], and the prior's weights K [N].

    >>> posterior_advantages(torch.tensor([2.0, 2.0, 1.0, 1.0]), torch.tensor([0.0, 0.3, 0.6, 0.9]), Args(group_size=4))
    (tensor([ 0.9504,  0.7723, -0.7723, -0.9504]), tensor([0.2256]))
    """
    groups, eps = rewards.double().view(-1, args.group_size), args.advantage_eps  # [N, G]
    by_spread = args.lik_alpha / (groups.std(1, keepdim=True) ** 2 + args.lik_alpha)  # [N, 1]
    likelihood_var = torch.full_like(by_spread, args.lik_var) if args.posterior == "fixed" else by_spread
    weight = likelihood_var / (args.prior_var + likelihood_var)  # [N, 1]
    mean = (1 - weight) * group_z(groups, eps) + weight * group_z(1 - levels.double().view_as(groups), eps)
    tied = (groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True) <= 1e-6) & (args.tie_mode != "keep")
    advantages = torch.where(tied, 0 if args.tie_mode == "skip" else mean, group_z(mean, eps))
    return advantages.flatten().float(), weight[:, 0].float()


def noisy_prompts(policy, examples, prompts, step: int, places: list[int], args: Args):
    """Examples as drawn, prompts to train on, noise levels [R], and a prompt a row that sees its noisy pictures."""
    levels, pictures = np.stack([levels_of(step, place, args) for place in places]), []  # [N, G]
    levels[[not example.images for example in examples]] = 0  # without a picture there is no noise to judge by
    for (n, g), level in np.ndenumerate(levels * args.noise_images):
        dice = np.random.default_rng([args.seed, step, places[n], 1 + g])
        pictures.append([noisy_image(image, level, dice, args.to_bytes) for image in examples[n].images])
    noisy = prompts.select((np.arange(levels.size) // args.group_size).tolist()).with_images(policy, pictures)
    return examples, prompts if args.update_image == "clean" else noisy, torch.tensor(levels).float().flatten(), noisy


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
        return noisy_prompts(policy, *draw_prompts(args, policy, train, step, places), step, places, args)

    evaluations.before()
    # `drawn()` returns what `draw` makes of a step; on CUDA a thread works on it while the step before is trained.
    for step, drawn in prefetch(draw, range(first_step, args.steps), in_thread=device.type == "cuda"):
        # === Sample: N prompts, G completions each ===
        meter.start()
        examples, prompts, levels, noisy = drawn()
        uniforms = uniform_numbers(args.seed, step, numbers, limit)  # [R, T] in [0, 1)
        rollout = sample(policy, noisy, 1, limit, uniforms, *sampling)
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
        if args.posterior != "none":
            advantages, prior_weights = posterior_advantages(rewards, levels.to(device), args)
            meter.add("prior_weight", prior_weights)
        pictured = torch.tensor([bool(example.images) for example in asked], device=device)  # [R]
        for g, level in enumerate(np.resize(args.noise_levels, args.group_size) if args.noise_draw == "ladder" else ()):
            meter.add(f"noise/{level:.2f}/reward", rewards[g :: args.group_size], pictured[g :: args.group_size])
            meter.add(f"noise/{level:.2f}/advantage", advantages[g :: args.group_size], pictured[g :: args.group_size])
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
            for mb in micro_batches(part, args.group_size, args.micro_batch_tokens, scorer):
                scores = scorer(mb.prompts, mb.ids, mb.completion_mask, args.temperature)
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
    if args.posterior != "none" and args.scale_rewards != "group":
        raise SystemExit(f"--scale-rewards {args.scale_rewards}: needs --posterior none, which alone scales otherwise")


if __name__ == "__main__":
    launch(main, Args)
