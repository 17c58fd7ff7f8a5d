"""ROMA: multimodal reasoning that survives visual degradation.

"Reinforcing Multimodal Reasoning Against Visual Degradation" (Liu et al. 2026, arXiv 2605.09262). Only the abstract is
public where this was written: what it does not say (coefficients, estimator, corruptions) is chosen here and marked.

    python roma.py                                                        # a laptop: built-in model and puzzles
    python roma.py --model Qwen/Qwen3-VL-4B --lora-rank 64                # one GPU
    accelerate launch --num-processes 8 roma.py --model Qwen/Qwen3-VL-4B  # a node

Completions are sampled, rewarded and compared on clean images only: on a degraded one the model would invent what it
cannot see, and be rewarded for inventing. The same tokens are then scored under K corrupted views of the image, and
where the answer was right two terms act on the views: at each token the view that deviates most is pulled back to the
clean distribution, and one view gets a policy gradient of its own with the clean advantage.

    advantage    A_r = (R_r - mean of its group) / (standard deviation of its group + eps)
    ratio        rho_rt = exp(logprob_rt - old_logprob_rt)
    token loss   q_rt = -min(rho_rt A_r, clip(rho_rt, 1 - clip_low, 1 + clip_high) A_r) + kl_coef k3_rt
    view terms   v_rt = c_r (kl_view_coef max_k D^k_rt - aux_coef A_r view_logprob^j_rt), c_r = 1 for right answers
                 D^k_rt = e^-d - 1 + d, d = (logprob_rt without gradient) - view_logprob^k_rt, j one of the K at random
    loss         the mean of q + v over the tokens of the whole optimizer step (`loss_type` dapo; others below)

Symbols: N prompts a step over all processes, G completions a prompt, R = N G rows, rows of a prompt together, T tokens,
K views, V rows that have views.
"""

import contextlib
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator

from common.corruptions import UNSEEN, choose, corrupt
from common.data.examples import TEMPLATE, ahead, batch_indices, build_messages, check_template, load_examples
from common.evaluation.accuracy import evaluate, image_reliance, robustness, show_robustness
from common.model.load import check_model, encode_prompts, load_policy, replace_images
from common.model.processes import distribute, gather_weights, in_step, start_processes
from common.model.sampling import decode, sample, uniform_numbers
from common.model.scoring import Scorer, micro_batches, pack_views, rows_of, score_without_gradient
from common.rewards.answers import score
from common.rewards.designs import check_markers, check_tokenizer, design_rewards, overlong_penalty, request_for
from common.run.folder import Run, check_accelerate, check_flags, memory_advice


@dataclass
class Args:
    # --- the run
    model: str = "tiny"
    """built-in `tiny`, a folder, or a hub id of the Qwen2-VL, Qwen2.5-VL and Qwen3-VL families"""
    lora_rank: int = 0
    """train adapters of this rank instead of all weights (0: all weights)"""
    max_pixels: int = 0
    """bound on an image's area after resizing, in pixels (0: as the checkpoint says)"""
    data: str = ""
    """`puzzles`, a .jsonl or .parquet file, a folder, or a hub id (default: puzzles; geometry3k for a hub model)"""
    train_split: str = "train"
    """split to train on"""
    eval_split: str = "validation"
    """split for the evaluations during training"""
    test_split: str = "test"
    """split for the evaluations before and after training"""
    image_column: str = ""
    """column that holds the images (default: found by the usual names)"""
    question_column: str = ""
    """column that holds the question (default: found by the usual names)"""
    answer_column: str = ""
    """column that holds the answer (default: found by the usual names)"""
    kind: str = ""
    """how answers are checked: math, int, letter, ... (default: math for data sets that do not say)"""
    prompt_template: str = TEMPLATE
    """what the model reads; {question} is filled in, and {request} with what the reward asks for"""
    reward: Literal[
        "accuracy", "vanilla", "only_accuracy", "mixture", "continuous", "visual_fusion", "no_accuracy", "semantic"
    ] = "accuracy"
    """a right answer, tagged or boxed; or a design of common/rewards/designs.py"""
    encoder: str = "sentence-transformers/all-mpnet-base-v2"
    """sentence encoder of `--reward semantic`, a hub id or a folder"""
    soft_punish_cache: int = 0
    """completions that come within so many tokens of the length limit lose up to 1 (DAPO; 0: none)"""
    steps: int = 300
    """rollouts to train for"""
    eval_every: int = 100
    """steps between evaluations on `eval_split` (0: none)"""
    eval_examples: int = 200
    """examples of an evaluation during training"""
    test_examples: int = 500
    """examples of the evaluations before and after training (0: none)"""
    save_every: int = 100
    """steps between checkpoints"""
    keep_checkpoints: int = 2
    """newest checkpoints that are kept"""
    out: str = ""
    """run folder (default: runs/<script>-<model>-seed<seed>)"""
    resume: str = ""
    """run folder to continue"""
    track: str = ""
    """also log to tensorboard, wandb or trackio"""
    seed: int = 1
    """everything random is a function of this, the step and the row"""

    # --- sampling and optimization, the same in every script
    prompts_per_step: int = 8
    """N: prompts of a rollout, over all processes"""
    group_size: int = 8
    """G: completions a prompt"""
    max_completion_length: int = 0
    """longest completion in tokens (default: 72 for the built-in model, else 2048)"""
    temperature: float = 1.0
    """sampling temperature; log-probabilities are taken at it"""
    top_p: float = 1.0
    """nucleus sampling; below 1 the sampled distribution is no longer the one that is trained"""
    top_k: int = 0
    """sample from the k likeliest tokens only (0: all), with the same caution"""
    learning_rate: float = 0.0
    """constant rate of AdamW (default: 3e-5 for the built-in model, else 1e-6)"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""
    updates_per_rollout: int = 1
    """optimizer steps that a rollout's prompts are divided over"""
    epochs_per_rollout: int = 1
    """passes over a rollout"""
    micro_batch_tokens: int = 16384
    """tokens, prompts and padding included, of one forward and backward; lower it when memory runs out"""

    # --- the method
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """divide centred rewards by the standard deviation of the group, of the whole step, or not (Dr. GRPO)"""
    advantage_eps: float = 1e-4
    """added to that standard deviation"""
    loss_type: Literal["grpo", "dapo", "dr_grpo", "bnpo"] = "dapo"
    """how tokens are averaged; see `token_weights`"""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """one ratio a token, or their geometric mean over the completion (GSPO)"""
    clip_low: float = 0.2
    """a ratio below 1 - clip_low gives a token with negative advantage no further push"""
    clip_high: float = 0.28
    """a ratio above 1 + clip_high gives a token with positive advantage no further push (clip-higher, DAPO)"""
    delta: float = 0.0
    """upper bound of the ratio where the advantage is negative; must exceed 1 + clip_high (0: none)"""
    tis_cap: float = 0.0
    """weigh tokens by training over sampling probability, at most this, where the two forwards round apart (0: off)"""
    kl_coef: float = 0.0
    """weight of the k3 penalty to the initial policy (0: no reference is loaded)"""
    mask_truncated_completions: bool = False
    """leave completions that hit the length limit out of the loss (overlong filtering, DAPO)"""
    filter_groups: Literal["none", "reward", "accuracy"] = "none"
    """leave groups without reward variance, or all right or all wrong, out of the loss's denominators too"""
    num_views: int = 2
    """K: corrupted views of each prompt's images"""
    kl_view_coef: float = 0.3
    """weight of the divergence of the worst view from the clean one (0: no such term)"""
    aux_coef: float = 0.3
    """weight of the policy gradient on one view (0: no such term)"""
    kl_worst_case: Literal["token", "sequence", "mean"] = "token"
    """which view counts: the worst at each token, the worst for the completion, or (ablation) the mean over views"""
    view_gate: Literal["correct", "none"] = "correct"
    """rows that the two terms act on: those whose answer is right, or (ablation) all"""
    train_corruptions: tuple[str, ...] = ("seen",)
    """what views are drawn from: names of common/corruptions.py, `seen`, `unseen`, `all`"""
    train_severities: tuple[int, ...] = (1, 2, 3)
    """severities that views are drawn with"""
    corrupt_rollouts: bool = False
    """the failure that the paper argues against: sample and train on the first view instead of the clean image"""
    robust_examples: int = 100
    """test examples of the table clean / seen / unseen before and after training (0: none)"""

    def __post_init__(self):
        tiny = self.model == "tiny"
        self.data = self.data or ("puzzles" if tiny else "hiyouga/geometry3k")
        self.learning_rate = self.learning_rate or (3e-5 if tiny else 1e-6)
        self.max_completion_length = self.max_completion_length or (72 if tiny else 2048)
        self.prompt_template = self.prompt_template.replace("{request}", request_for(self.reward, tiny))


# ------------------------------------------------------------------------------------------------- the method


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
    """Which groups [N] bool count in the loss: those with varied rewards, or neither all right nor all wrong (DAPO)."""
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
    """
    weights = loss_mask.float()
    if loss_type == "grpo":
        return weights / weights.sum(1, keepdim=True).clamp(min=1) / max(rows, 1)
    if loss_type == "dr_grpo":
        return weights / (max(rows, 1) * max_completion_length)
    return weights / max(tokens, 1)


def importance_weights(old_logprobs: torch.Tensor, sampled_logprobs: torch.Tensor, cap: float) -> torch.Tensor:
    """min(pi_old / pi_sampled, cap) of each token [R, T], without gradient: what the rounding of sampling and scoring,
    which are different forwards, does to importance (truncated importance sampling, Yao et al. 2025)."""
    return (old_logprobs - sampled_logprobs).detach().clamp(-20, 20).exp().clamp(max=cap)


def k3_divergence(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Estimate of KL(policy || reference) on sampled tokens, never negative (DeepSeekMath, eq. 4): e^d - d - 1."""
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
    drawn = [(str(name), int(dice.choice(args.train_severities))) for name in names]
    return drawn, int(dice.integers(args.num_views))


def surrogate_kl(logprobs: torch.Tensor, view_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Divergence D [K, V, T] of each view from the clean distribution, from log-probabilities [V, T] and [K, V, T].

    The k3 estimate of KL(clean || view) on the sampled tokens, at most 10. The clean side is detached: otherwise right
    tokens would become less likely wherever a corruption hurts them. 0 outside `mask` [V, T].
    """
    gap = torch.where(mask, logprobs.detach() - view_logprobs, 0).clamp(-20, 20)
    return (torch.exp(-gap) - 1 + gap).clamp(max=10)


def worst_case(divergences: torch.Tensor, mask: torch.Tensor, how: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The divergence [V, T] that counts out of [K, V, T], and the view [V, T] int64 it comes from, of equals the first.

    `how` token: the largest at each token; sequence: that of the view with the largest mean over the completion's
    tokens in `mask` [V, T]; mean: the mean over views, beside the view that is largest.
    """
    winner = divergences.argmax(0)
    if how == "mean":
        return divergences.mean(0), winner
    if how == "sequence":
        # The mean over a row's tokens divides every view by the same number.
        winner = (divergences * mask).sum(-1).argmax(0)[:, None].expand_as(winner)
    return divergences.gather(0, winner[None])[0], winner


def aux_loss(
    view_logprobs: torch.Tensor, aux_view: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """-A logprob [V, T] under the view `aux_view` [V] of each row, with the clean advantages [V]; 0 outside `mask`."""
    chosen = view_logprobs[aux_view, torch.arange(len(aux_view), device=aux_view.device)]  # [V, T]
    return torch.where(mask, -advantages[:, None] * chosen, 0)


# ------------------------------------------------------------------------------------------------- the run


@memory_advice()
def main(args: Args) -> dict:
    # === Set up ===
    accelerator = start_processes()
    device, processes = accelerator.device, accelerator.num_processes
    check(args, accelerator)
    run = Run(args, accelerator, "roma")
    columns = {name: getattr(args, name) for name in ("image_column", "question_column", "answer_column", "kind")}
    draws = args.steps * args.prompts_per_step
    train = load_examples(args.data, args.train_split, draws=draws, seed=args.seed, **columns)
    held_out = load_examples(args.data, args.eval_split, limit=args.eval_examples, **columns) if args.eval_every else []
    test = load_examples(args.data, args.test_split, limit=args.test_examples, **columns) if args.test_examples else []
    policy = load_policy(
        args.model, device=device, lora_rank=args.lora_rank, max_pixels=args.max_pixels, seed=args.seed
    )
    check_tokenizer(args.reward, policy.tokenizer)
    scorer = Scorer(policy, gradient_checkpointing=device.type == "cuda", slice_tokens=args.micro_batch_tokens)
    trained_scorer, parameters = distribute(scorer, accelerator)
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    reference = None
    if args.kl_coef and not args.lora_rank:
        frozen = load_policy(args.model, device=device, max_pixels=args.max_pixels, trainable=False)
        reference = Scorer(frozen)
    first_step = run.restore(policy, optimizer)
    gather_weights(scorer)

    evaluation = {
        "template": args.prompt_template,
        "max_new_tokens": args.max_completion_length,
        "batch_prompts": max(1, min(64, args.micro_batch_tokens // args.max_completion_length)),
        "seed": args.seed,
        "accelerator": accelerator,
    }

    def accuracy_on(examples):
        return evaluate(policy, examples, **evaluation)

    def robustness_on(examples):
        """Accuracy on the first test examples, clean and under every seen and unseen corruption."""
        first = [examples[n] for n in range(min(args.robust_examples, len(examples)))]
        return robustness(policy, first, choose(("seen", "unseen")), (1, 3, 5), **evaluation)

    # A process takes its share of each update's prompts: an update sees the same prompts on any number of them.
    shares = torch.arange(args.prompts_per_step).view(args.updates_per_rollout, processes, -1)
    places = shares[:, accelerator.process_index].flatten().tolist()

    def draw(step):  # on CUDA in a thread, a step ahead
        indices = batch_indices(args.seed, step, args.prompts_per_step, len(train))
        examples = [train[indices[place]] for place in places]
        chosen_views, aux_views = zip(*(draw_views(args.seed, step, place, args) for place in places), strict=True)

        def view(k):
            """Each prompt's images, corrupted as its view k says."""
            return [
                [
                    corrupt(image, *chosen_views[n][k], (args.seed, step, place, k, i))
                    for i, image in enumerate(e.images)
                ]
                for n, (place, e) in enumerate(zip(places, examples, strict=True))
            ]

        pictures = view(0) if args.corrupt_rollouts else [list(e.images) for e in examples]
        prompts = encode_prompts(policy, [build_messages(e, args.prompt_template) for e in examples], pictures)
        wanted = range(args.num_views if args.kl_view_coef or args.aux_coef else 0)
        views = [replace_images(policy, prompts, view(k)) for k in wanted]  # other pictures, and nothing else differs
        return examples, prompts, views, chosen_views, aux_views

    before = run.once("before", lambda: accuracy_on(test)) if args.test_examples else None
    robust = args.robust_examples and args.test_examples
    cells_before = run.once("robustness-before", lambda: robustness_on(test)) if robust else None
    corruptions = [(name, s) for name in choose(args.train_corruptions) for s in sorted(set(args.train_severities))]

    for step, drawn in ahead(draw, range(first_step, args.steps), in_thread=device.type == "cuda"):
        started = time.perf_counter()

        # === Sample: N prompts, G completions each ===
        examples, prompts, views, chosen_views, aux_views = drawn()
        rows = [place * args.group_size + g for place in places for g in range(args.group_size)]
        rollout = sample(
            policy,
            prompts,
            args.group_size,
            args.max_completion_length,
            uniform_numbers(args.seed, step, rows, args.max_completion_length),
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
        )
        ids, mask = rollout.completion_ids, rollout.completion_mask  # [R, T]
        completions = decode(policy, rollout)
        sampled = time.perf_counter()

        # === Reward: one number a row ===
        asked = [e for e in examples for _ in range(args.group_size)]  # rows of a prompt stand together
        accuracy, verdicts = score(completions, asked, "auto" if args.reward == "accuracy" else "tag")
        rewards, terms = design_rewards(args.reward, completions, asked, accuracy, args.encoder)
        rewards, accuracy = torch.tensor(rewards, device=device), torch.tensor(accuracy, device=device)  # [R] both
        if args.soft_punish_cache:
            rewards += overlong_penalty(mask.sum(1), args.max_completion_length, args.soft_punish_cache)

        # === Advantage: each row against its group ===
        mine = slice(accelerator.process_index * len(rows), (accelerator.process_index + 1) * len(rows))
        all_rewards = accelerator.gather(rewards)
        advantages = group_advantages(all_rewards, args.group_size, args.scale_rewards, args.advantage_eps)[mine]
        kept = kept_groups(rewards, accuracy, args.group_size, args.filter_groups)  # [N] groups that count
        loss_mask = mask & kept.repeat_interleave(args.group_size)[:, None]  # [R, T]
        if args.mask_truncated_completions:
            loss_mask = loss_mask & rollout.ended[:, None]

        regularized = loss_mask.any(1) & (accuracy == 1 if args.view_gate == "correct" else True)  # [R]
        regularized = regularized & bool(args.kl_view_coef or args.aux_coef)

        # Without a penalty a group of equal rewards has no gradient: it counts in the means but is not scored.
        trained = kept
        if not args.kl_coef:
            trained = kept & (advantages.view(-1, args.group_size) != 0).any(1)
        trained = trained & loss_mask.view(len(trained), -1).any(1)  # [N]

        # === Views: everything else that the loss compares the scores with ===
        updates = args.updates_per_rollout * args.epochs_per_rollout
        active = trained | regularized.view(len(kept), -1).any(1)  # [N] groups with any term of the loss
        if updates > 1:  # else the clean log-probabilities that views are compared with are those of the sampling
            trained = active
        score_rows = dict(
            group_size=args.group_size, temperature=args.temperature, micro_batch_tokens=args.micro_batch_tokens
        )
        old_logprobs = ref_logprobs = None
        if updates > 1:
            old_logprobs = score_without_gradient(scorer, prompts, ids, mask, trained, **score_rows)
        if args.kl_coef:
            with policy.model.disable_adapter() if args.lora_rank else contextlib.nullcontext():
                ref_logprobs = score_without_gradient(reference or scorer, prompts, ids, mask, trained, **score_rows)

        aux_view = torch.tensor(aux_views, device=device).repeat_interleave(args.group_size)  # [R]

        # === Update ===
        sums = dict.fromkeys(("loss", "entropy", "kl", "clip_low", "clip_high", "mismatch", "scored"), 0.0)
        sums |= dict.fromkeys(("view_kl", "view_kl_mean", "aux", "viewed", "clamped", "view_advantage"), 0.0)
        sums |= {"kl_loss": 0.0, "aux_loss": 0.0}  # what the two terms add to the loss
        by_corruption = torch.zeros(3, len(corruptions), device=device)  # of clean minus view, of tokens won, of tokens
        grad_norms, skipped = [], 0
        for update in range(updates):
            share = len(examples) // args.updates_per_rollout
            first = update % args.updates_per_rollout * share
            chosen = rows_of(range(first, first + share), args.group_size)
            # The means' denominators, over all processes; every process then makes at least one backward call.
            counts = torch.stack(
                [
                    kept[first : first + share].sum() * args.group_size,
                    loss_mask[chosen].sum(),
                    active[first : first + share].sum(),
                ]
            )
            total_rows, total_tokens, total_trained = accelerator.reduce(counts).tolist()
            if not total_trained:
                skipped += 1
                continue
            groups = [n for n in range(first, first + share) if active[n]] or [first]
            width = prompts.input_ids.shape[1]
            batches = list(
                micro_batches(
                    mask[rows_of(groups, args.group_size)],
                    width,
                    args.group_size,
                    args.micro_batch_tokens // (1 + len(views)),
                )
            )
            for batch in in_step(batches, trained_scorer, accelerator, prompts, ids, mask):
                members = [groups[n] for n in batch]
                length = int(mask[rows_of(members, args.group_size)].sum(1).max())
                viewed = [r for r in rows_of(members, args.group_size) if regularized[r]]
                # Groups of equal rewards have views but, unless their clean scores are needed, no clean pass.
                members = [n for n in members if trained[n]] or ([] if viewed else members)
                own = rows_of(members, args.group_size)
                own_mask = loss_mask[own, :length] & trained[members].repeat_interleave(args.group_size)[:, None]
                packed, rows_packed, prompt_of_row = pack_views(prompts, views, members, viewed, args.group_size)
                scores = trained_scorer(
                    packed, ids[rows_packed, :length], mask[rows_packed, :length], args.temperature, prompt_of_row
                )
                logprobs, view_logprobs = scores.logprobs.split([len(own), len(rows_packed) - len(own)])
                old = logprobs.detach() if old_logprobs is None else old_logprobs[own, :length]
                losses, ratio = policy_loss(logprobs, old, advantages[own, None], own_mask, args)
                sampled_logprobs = rollout.old_logprobs[own, :length]
                sums["mismatch"] += (old - sampled_logprobs)[own_mask].abs().sum()
                if args.tis_cap:
                    losses = losses * importance_weights(old, sampled_logprobs, args.tis_cap)
                if ref_logprobs is not None:
                    kl = k3_divergence(logprobs, ref_logprobs[own, :length])
                    losses = losses + args.kl_coef * kl
                    sums["kl"] += kl.detach()[own_mask].sum()
                weights = token_weights(own_mask, args.loss_type, total_rows, total_tokens, args.max_completion_length)
                loss = (torch.where(own_mask, losses, 0) * weights).sum()
                if viewed:
                    view_mask = loss_mask[viewed, :length]  # [V, T]
                    clean = rollout.old_logprobs[viewed, :length]
                    if updates > 1:
                        clean = logprobs[[own.index(r) for r in viewed]]
                    view_logprobs = view_logprobs.view(args.num_views, len(viewed), length)  # [K, V, T]
                    divergences = surrogate_kl(clean, view_logprobs, view_mask)  # [K, V, T]
                    worst, winner = worst_case(divergences, view_mask, args.kl_worst_case)
                    aux = aux_loss(view_logprobs, aux_view[viewed], advantages[viewed], view_mask)
                    weights = token_weights(
                        view_mask, args.loss_type, total_rows, total_tokens, args.max_completion_length
                    )
                    kl_term = args.kl_view_coef * (worst * weights).sum()
                    aux_term = args.aux_coef * (aux * weights).sum()
                    loss = loss + kl_term + aux_term
                    sums["kl_loss"] += kl_term.detach()
                    sums["aux_loss"] += aux_term.detach()
                    sums["view_kl"] += worst.detach().sum()
                    sums["view_kl_mean"] += divergences.detach().mean(0).sum()
                    sums["aux"] += aux.detach().sum()
                    sums["viewed"] += view_mask.sum()
                    sums["clamped"] += (divergences.detach().amax(0) >= 10).sum()
                    sums["view_advantage"] += (advantages[viewed].abs()[:, None] * view_mask).sum()
                    gap = (clean - view_logprobs).detach()  # [K, V, T]
                    cell = [[corruptions.index(d) for d in chosen_views[r // args.group_size]] for r in viewed]
                    won = winner == torch.arange(args.num_views, device=device)[:, None, None]
                    counts = torch.stack([gap * view_mask, won & view_mask, view_mask.expand_as(won)])
                    cell = torch.tensor(cell, device=device).T.flatten()  # [K * V]
                    by_corruption.index_add_(1, cell, counts.sum(-1).flatten(1))
                accelerator.backward(loss * processes)  # gradients are averaged over processes, the loss is a sum
                positive, negative = advantages[own, None] > 0, advantages[own, None] < 0
                sums["loss"] += loss.detach()
                sums["scored"] += own_mask.sum()
                sums["entropy"] += scores.entropy[: len(own)][own_mask].sum()
                sums["clip_low"] += ((ratio < 1 - args.clip_low) & negative & own_mask).sum()
                sums["clip_high"] += ((ratio > 1 + args.clip_high) & positive & own_mask).sum()
            grad_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
            if run.check_gradients(grad_norm):
                optimizer.step()
                gather_weights(scorer)
                grad_norms.append(float(grad_norm))
            optimizer.zero_grad()

        # === Log ===
        lengths = mask.sum(1)
        varied = kept_groups(rewards, accuracy, args.group_size, "reward")
        local = {"right": accuracy.sum(), "varied": varied.sum(), "tokens": lengths.sum(), "ended": rollout.ended.sum()}
        local |= sums | {f"verdicts/{status}": count for status, count in verdicts.items()}
        local |= {f"rewards/{name}/mean": sum(scores) for name, scores in terms.items()}
        local["constant"] = (accuracy.view(-1, args.group_size).std(1) == 0).sum()
        local |= {(i, j): by_corruption[i, j] for i in range(3) for j in range(len(corruptions))}
        values = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=device) for x in local.values()])
        totals = dict(zip(local, accelerator.reduce(values).tolist(), strict=True))
        all_rows, scored = len(all_rewards), totals["scored"] or float("nan")
        seconds = time.perf_counter() - started
        metrics = {
            "reward": float(all_rewards.mean()),
            "reward_std": float(all_rewards.view(-1, args.group_size).std(1).mean()),
            "accuracy": totals["right"] / all_rows,
            "frac_reward_zero_std": 1 - totals["varied"] / args.prompts_per_step,
            "frac_accuracy_constant": totals["constant"] / args.prompts_per_step,
            **{f"rewards/{name}/mean": totals[f"rewards/{name}/mean"] / all_rows for name in terms},
            "completions/mean_length": totals["tokens"] / all_rows,
            "completions/clipped_ratio": 1 - totals["ended"] / all_rows,
            "loss": totals["loss"] / updates,
            "entropy": totals["entropy"] / scored,
            "kl": totals["kl"] / scored,
            "clip_ratio/low_mean": totals["clip_low"] / scored,
            "clip_ratio/high_mean": totals["clip_high"] / scored,
            "mismatch": totals["mismatch"] / scored,
            "grad_norm": sum(grad_norms) / len(grad_norms) if grad_norms else float("nan"),
            "updates_skipped": skipped,
            "lr": args.learning_rate,
            "tokens_per_second": totals["tokens"] / seconds,
            "seconds": seconds,
            "seconds/sample": sampled - started,
            **{name: totals[name] for name in (f"verdicts/{status}" for status in verdicts) if totals[name]},
        }
        viewed = totals["viewed"] or float("nan")
        metrics |= {
            "loss/policy": (totals["loss"] - totals["kl_loss"] - totals["aux_loss"]) / updates,
            "loss/view_kl": totals["kl_loss"] / updates,
            "loss/view_aux": totals["aux_loss"] / updates,
            "view/kl": totals["view_kl"] / viewed,
            "view/kl_mean": totals["view_kl_mean"] / viewed,
            "view/aux": totals["aux"] / viewed,
            "view/clamped": totals["clamped"] / viewed,
            "view/advantage": totals["view_advantage"] / viewed,
        }
        # How much likelier a token is clean than under each corruption, and the share of tokens where it was the worst.
        for j, (name, severity) in enumerate(corruptions):
            if totals[2, j]:
                metrics[f"view/gap/{name}/{severity}"] = totals[0, j] / totals[2, j]
                metrics[f"view/won/{name}/{severity}"] = totals[1, j] / totals[2, j]
        if args.eval_every and (step + 1) % args.eval_every == 0:
            metrics["eval/accuracy"] = accuracy_on(held_out)["accuracy"]
            # Collapse watch: a policy that becomes insensitive to its input loses what it gains from the image at all.
            metrics["eval/image_reliance"] = image_reliance(
                policy,
                [held_out[n] for n in range(min(32, len(held_out)))],
                template=args.prompt_template,
                max_new_tokens=args.max_completion_length,
                batch_prompts=evaluation["batch_prompts"],
            )
        run.log(step, metrics)
        run.show(
            step,
            [
                {
                    "question": asked[r].question,
                    "completion": completions[r],
                    "answer": asked[r].answer,
                    "reward": float(rewards[r]),
                    "advantage": float(advantages[r]),
                }
                for r in range(args.group_size)
            ],
        )

        # === Save ===
        stopping = run.should_stop()
        if stopping or (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            run.save(step + 1, policy, optimizer)
        if stopping:
            return run.stopped(step + 1)

    after = accuracy_on(test) if args.test_examples else None
    cells_after = robustness_on(test) if robust else None
    results = run.finish({"before": before, "after": after})
    if robust and accelerator.is_main_process:
        show_robustness(run.folder, {"before": cells_before, "after": cells_after})
    return results


def check(args: Args, accelerator: Accelerator) -> None:
    """Stop with one line before anything long starts."""
    processes = accelerator.num_processes
    check_accelerate(accelerator)
    check_flags(args, num_views=1, kl_view_coef=0, aux_coef=0, robust_examples=0)
    check_model(args.model)
    args.prompt_template = check_template(args.prompt_template)
    if args.model != "tiny":
        check_markers(args.reward, args.prompt_template)
    if args.prompts_per_step % (processes * args.updates_per_rollout):
        raise SystemExit(
            f"--prompts-per-step {args.prompts_per_step}: must be a multiple of {processes} processes times "
            f"--updates-per-rollout {args.updates_per_rollout}"
        )
    if args.delta and args.delta <= 1 + args.clip_high:
        raise SystemExit(f"--delta {args.delta}: must exceed 1 + --clip-high {args.clip_high}")
    try:
        names = choose(args.train_corruptions)
    except ValueError as error:
        raise SystemExit(f"--train-corruptions: {error}") from None
    if not names:
        raise SystemExit("--train-corruptions: names at least one")
    if not args.num_views <= len(names):
        raise SystemExit(f"--num-views {args.num_views}: from 1 to {len(names)}, the --train-corruptions to draw from")
    if not args.train_severities or not set(args.train_severities) <= {1, 2, 3, 4, 5}:
        raise SystemExit(f"--train-severities {args.train_severities}: each must be one of 1 to 5")
    learned = [name for name in names if name in UNSEEN]
    if learned and args.robust_examples and accelerator.is_main_process:
        print(
            f"--train-corruptions: {', '.join(learned)}: trained on, so that the table's `unseen` is no longer unseen"
        )
    if args.corrupt_rollouts and (args.kl_view_coef or args.aux_coef):
        raise SystemExit("--corrupt-rollouts: a baseline without views; pass --kl-view-coef 0 --aux-coef 0 with it")


if __name__ == "__main__":
    main(tyro.cli(Args))
