"""VGPO: advantages that follow the eye.

"Visually-Guided Policy Optimization for Multimodal Reasoning" (Wang et al. 2026, arXiv 2604.09349).

    python vgpo.py                                                        # a laptop: built-in model and puzzles
    python vgpo.py --model Qwen/Qwen3-VL-4B --lora-rank 64                # one GPU
    accelerate launch --num-processes 8 vgpo.py --model Qwen/Qwen3-VL-4B  # a node

How much a token has to do with the image is read off the policy itself: the cosine between the token's own last hidden
state and the mean last hidden state of the prompt's image tokens. In the later part of a completion the most visual
tokens get a bonus that grows with position, against forgetting the image. The scores multiply the advantage twice: by
how a token compares with its completion, and by how a completion compares with its siblings.

    focus        F_rt = (cosine(state_rt, mean state of the image tokens) + 1) / 2
    weight       w_rt = F_rt (1 + gate_rt beta t / T_r), gate: the top kappa of the last gamma of the completion, by F
    token        1 + psi_rt, psi = w scaled to [0, 1] over the completion, minus its mean
    trajectory   1 + phi_r, phi = the sum of w over the completion, scaled to [0, 1] over the group, minus its mean
    advantage    A_rt = (1 + psi_rt) (1 + phi_r) (R_r - mean of its group) / (standard deviation of its group + eps)
    ratio        rho_rt = exp(logprob_rt - old_logprob_rt)
    token loss   q_rt = -min(rho_rt A_rt, clip(rho_rt, 1 - clip_low, 1 + clip_high) A_rt) + kl_coef k3_rt
    loss         the mean of q over the tokens of the whole optimizer step (`loss_type` dapo; others below)

These are the paper's equations; the authors' code differs in several steps. They train with `--filter-groups accuracy
--delta 3`. The sum of w is largely a length: `focus/length_correlation` shows how much.

Symbols: N prompts a step over all processes, G completions a prompt, R = N G rows, rows of a prompt together, T tokens.
"""

import contextlib
import time
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from accelerate import Accelerator

from common.data.examples import TEMPLATE, ahead, batch_indices, build_messages, check_template, load_examples
from common.evaluation.accuracy import evaluate
from common.model.load import check_model, encode_prompts, load_policy
from common.model.processes import distribute, gather_weights, in_step, start_processes
from common.model.sampling import decode, sample, uniform_numbers
from common.model.scoring import Scorer, micro_batches, rows_of, score_without_gradient
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
    compensation: float = 0.3
    """beta: strength of the bonus for visual tokens late in a completion (0: none)"""
    tail_share: float = 0.5
    """gamma: share of a completion, its end, in which tokens can get the bonus"""
    gated_share: float = 0.2
    """kappa: share of that tail, its most visual tokens, that gets it"""
    schedule: Literal["linear", "quadratic", "step"] = "linear"
    """how the bonus grows with position: t / T, its square, or all of it from the middle on"""
    token_clamp: tuple[float, float] = (0.0, 2.0)
    """bounds of the token factor, which is between 0 and 2 anyhow (the authors' code: 0.1 2; 1 1: no such factor)"""
    trajectory_clamp: tuple[float, float] = (0.0, 2.0)
    """bounds of the trajectory factor, likewise (the authors' code: 0.9 2; 1 1: no such factor)"""

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


def visual_prototypes(prompt_states: torch.Tensor, image_mask: torch.Tensor) -> torch.Tensor:
    """Mean last hidden state [N, H] float32 of each prompt's image tokens, `image_mask` [N, P] bool in [N, P, H]
    (VGPO, eq. 4); 0 for a prompt without."""
    count = image_mask.sum(1, keepdim=True).clamp(min=1)
    return (prompt_states.float() * image_mask[..., None]).sum(1) / count


def cosines(states: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
    """Cosine [R, T] float32 of each completion token's own state [R, T, H] with its prompt's prototype [N, H]."""
    states = states.float()
    prototypes = prototypes.repeat_interleave(len(states) // len(prototypes), dim=0)  # [R, H]
    dots = torch.einsum("rth,rh->rt", states, prototypes)
    return dots / (states.norm(dim=-1) * prototypes.norm(dim=-1)[:, None] + 1e-8)


def compensate(focus: torch.Tensor, mask: torch.Tensor, args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights w [R, T] of focus scores [R, T], 0 outside `mask`, and which tokens got the bonus (VGPO, eqs. 5, 6)."""
    lengths = mask.sum(1, keepdim=True)  # [R, 1]
    positions = torch.arange(mask.shape[1], device=mask.device)  # [T] from 0
    start = ((1 - args.tail_share) * lengths.double() + 1e-9).floor()
    tail = mask & (positions >= start)
    count = (args.gated_share * (lengths - start) + 1e-9).floor().clamp(min=1).long()  # [R, 1]
    ranked = focus.masked_fill(~tail, -torch.inf).sort(dim=1, descending=True).values
    gate = tail & (focus >= ranked.gather(1, count - 1))  # of equals all
    time = (positions + 1) / lengths.clamp(min=1)  # [R, T]
    growth = {"linear": time, "quadratic": time**2, "step": (time >= 0.5).float()}[args.schedule]
    return torch.where(mask, focus * (1 + gate * args.compensation * growth), 0), gate


def token_factors(weights: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """1 + psi [R, T]: each token against its completion, of mean 1 over it; 1 outside `mask` (VGPO, eqs. 7, 8)."""
    low = weights.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    high = weights.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    scaled = torch.where(mask, (weights - low) / (high - low + 1e-8), 0)
    mean = scaled.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return torch.where(mask, 1 + scaled - mean, 1)


def trajectory_factors(weights: torch.Tensor, group_size: int) -> torch.Tensor:
    """1 + phi [R]: each completion's sum of weights against its siblings', of mean 1 over a group (VGPO, eqs. 9-11)."""
    total = weights.sum(1).view(-1, group_size)  # [N, G]
    low, high = total.amin(1, keepdim=True), total.amax(1, keepdim=True)
    scaled = (total - low) / (high - low + 1e-8)
    return (1 + scaled - scaled.mean(1, keepdim=True)).flatten()


@torch.no_grad()
def advantage_factors(
    states: torch.Tensor, prompt_states: torch.Tensor, image_mask: torch.Tensor, mask: torch.Tensor, args: Args
) -> dict[str, torch.Tensor]:
    """The factors [R, T] of whole groups' advantages (VGPO, eq. 12), and for the log what they come from.

    From last hidden states of completions [R, T, H] at the tokens' own positions and of prompts [N, P, H].
    """
    cosine = torch.where(mask, cosines(states, visual_prototypes(prompt_states, image_mask)), 0)
    weights, gate = compensate((cosine + 1) / 2, mask, args)
    factors = token_factors(weights, mask).clamp(*args.token_clamp)
    factors = factors * trajectory_factors(weights, args.group_size).clamp(*args.trajectory_clamp)[:, None]
    sighted = image_mask.any(1).repeat_interleave(args.group_size)[:, None]  # [R, 1] a prompt without image: 1
    factors = torch.where(sighted & mask, factors, 1)
    return {"cosine": cosine, "weight": weights, "gate": gate.float(), "factor": factors}


# ------------------------------------------------------------------------------------------------- the run


@memory_advice()
def main(args: Args) -> dict:
    # === Set up ===
    accelerator = start_processes()
    device, processes = accelerator.device, accelerator.num_processes
    check(args, accelerator)
    run = Run(args, accelerator, "vgpo")
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

    # A process takes its share of each update's prompts: an update sees the same prompts on any number of them.
    shares = torch.arange(args.prompts_per_step).view(args.updates_per_rollout, processes, -1)
    places = shares[:, accelerator.process_index].flatten().tolist()

    def draw(step):  # on CUDA in a thread, a step ahead
        indices = batch_indices(args.seed, step, args.prompts_per_step, len(train))
        examples = [train[indices[place]] for place in places]
        prompts = encode_prompts(
            policy, [build_messages(e, args.prompt_template) for e in examples], [list(e.images) for e in examples]
        )
        return examples, prompts

    before = run.once("before", lambda: accuracy_on(test)) if args.test_examples else None

    for step, drawn in ahead(draw, range(first_step, args.steps), in_thread=device.type == "cuda"):
        started = time.perf_counter()

        # === Sample: N prompts, G completions each ===
        examples, prompts = drawn()
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

        # Without a penalty a group of equal rewards has no gradient: it counts in the means but is not scored.
        trained = kept
        if not args.kl_coef:
            trained = kept & (advantages.view(-1, args.group_size) != 0).any(1)
        trained = trained & loss_mask.view(len(trained), -1).any(1)  # [N]

        # === Views: everything else that the loss compares the scores with ===
        updates = args.updates_per_rollout * args.epochs_per_rollout
        score_rows = dict(
            group_size=args.group_size, temperature=args.temperature, micro_batch_tokens=args.micro_batch_tokens
        )
        old_logprobs = ref_logprobs = None
        focus = {name: torch.zeros(ids.shape, device=device) for name in ("cosine", "weight", "gate", "factor")}

        def look(members, own, scores, prompts=prompts, mask=mask, focus=focus):
            """Keep the factors of some groups, from the states of the policy that sampled them."""
            shown, length = prompts.select(members), scores.logprobs.shape[1]
            image_mask = shown.input_ids == policy.base.config.image_token_id
            found = advantage_factors(scores.states, scores.prompt_states, image_mask, mask[own, :length], args)
            for name, values in found.items():
                focus[name][own, :length] = values

        if updates > 1:
            old_logprobs = score_without_gradient(scorer, prompts, ids, mask, trained, **score_rows, visit=look)
        if args.kl_coef:
            with policy.model.disable_adapter() if args.lora_rank else contextlib.nullcontext():
                ref_logprobs = score_without_gradient(reference or scorer, prompts, ids, mask, trained, **score_rows)

        # === Update ===
        sums = dict.fromkeys(("loss", "entropy", "kl", "clip_low", "clip_high", "mismatch", "scored"), 0.0)
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
                    trained[first : first + share].sum(),
                ]
            )
            total_rows, total_tokens, total_trained = accelerator.reduce(counts).tolist()
            if not total_trained:
                skipped += 1
                continue
            groups = [n for n in range(first, first + share) if trained[n]] or [first]
            width = prompts.input_ids.shape[1]
            batches = list(
                micro_batches(mask[rows_of(groups, args.group_size)], width, args.group_size, args.micro_batch_tokens)
            )
            for batch in in_step(batches, trained_scorer, accelerator, prompts, ids, mask):
                members = [groups[n] for n in batch]
                own = rows_of(members, args.group_size)
                length = int(mask[own].sum(1).max())
                own_mask = loss_mask[own, :length] & trained[members].repeat_interleave(args.group_size)[:, None]
                scores = trained_scorer(
                    prompts.select(members), ids[own, :length], mask[own, :length], args.temperature
                )
                old = scores.logprobs.detach() if old_logprobs is None else old_logprobs[own, :length]
                if updates == 1:  # the policy still is the one that sampled
                    look(members, own, scores)
                seeing = advantages[own, None] * focus["factor"][own, :length]  # [R, T]
                losses, ratio = policy_loss(scores.logprobs, old, seeing, own_mask, args)
                sampled_logprobs = rollout.old_logprobs[own, :length]
                sums["mismatch"] += (old - sampled_logprobs)[own_mask].abs().sum()
                if args.tis_cap:
                    losses = losses * importance_weights(old, sampled_logprobs, args.tis_cap)
                if ref_logprobs is not None:
                    kl = k3_divergence(scores.logprobs, ref_logprobs[own, :length])
                    losses = losses + args.kl_coef * kl
                    sums["kl"] += kl.detach()[own_mask].sum()
                weights = token_weights(own_mask, args.loss_type, total_rows, total_tokens, args.max_completion_length)
                loss = (torch.where(own_mask, losses, 0) * weights).sum()
                accelerator.backward(loss * processes)  # gradients are averaged over processes, the loss is a sum
                positive, negative = advantages[own, None] > 0, advantages[own, None] < 0
                sums["loss"] += loss.detach()
                sums["scored"] += own_mask.sum()
                sums["entropy"] += scores.entropy[own_mask].sum()
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
        scored_mask = loss_mask & trained.repeat_interleave(args.group_size)[:, None]
        half = torch.arange(ids.shape[1], device=device) >= lengths[:, None] / 2  # the later half of each completion
        local |= {"cosine": focus["cosine"][scored_mask].sum(), "gated": focus["gate"][scored_mask].sum()}
        local |= {"negative": (focus["cosine"] < 0)[scored_mask].sum()}
        for name, chosen_rows in (("right", accuracy == 1), ("wrong", accuracy < 1)):
            for part, where in (("late", half), ("early", ~half)):
                where = where & scored_mask & chosen_rows[:, None]
                local |= {f"{name}/{part}": focus["cosine"][where].sum(), f"{name}/{part}/tokens": where.sum()}
        # Within groups: how much a completion's accumulated focus is its length.
        centred = [x.view(-1, args.group_size).double()[trained] for x in (focus["weight"].sum(1), lengths)]
        a, b = (x - x.mean(1, keepdim=True) for x in centred)
        local |= {"ab": (a * b).sum(), "aa": (a * a).sum(), "bb": (b * b).sum()}
        factor = focus["factor"][scored_mask]
        extremes = torch.stack([factor.amin(), factor.amax()]) if len(factor) else torch.ones(2, device=device)
        extremes = accelerator.gather(extremes).view(-1, 2)
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
        mean = lambda name, totals=totals: totals[name] / max(totals[f"{name}/tokens"], 1)
        metrics |= {
            "focus": totals["cosine"] / scored,
            "focus/negative": totals["negative"] / scored,
            "focus/gated": totals["gated"] / scored,
            "focus/factor_min": float(extremes[:, 0].amin()),
            "focus/factor_max": float(extremes[:, 1].amax()),
            "focus/length_correlation": totals["ab"] / ((totals["aa"] * totals["bb"]) ** 0.5 or float("nan")),
            **{f"focus/{n}/{part}": mean(f"{n}/{part}") for n in ("right", "wrong") for part in ("early", "late")},
        }
        if args.eval_every and (step + 1) % args.eval_every == 0:
            metrics["eval/accuracy"] = accuracy_on(held_out)["accuracy"]
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
    return run.finish({"before": before, "after": after})


def check(args: Args, accelerator: Accelerator) -> None:
    """Stop with one line before anything long starts."""
    processes = accelerator.num_processes
    check_accelerate(accelerator)
    check_flags(args, compensation=0)
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
    for name in ("tail_share", "gated_share"):
        if not 0 < getattr(args, name) <= 1:
            raise SystemExit(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0 and at most 1")
    for name in ("token_clamp", "trajectory_clamp"):
        low, high = getattr(args, name)
        if not 0 <= low <= high:
            raise SystemExit(f"--{name.replace('_', '-')} {low} {high}: must be two numbers from 0 up, in order")


if __name__ == "__main__":
    main(tyro.cli(Args))
