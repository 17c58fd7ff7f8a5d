"""What each name in metrics.jsonl means; `python -m common.run.metrics` prints it as the documentation's table."""

from fnmatch import fnmatchcase

# `*` stands for any text, as a term's, a verdict's or a corruption's name. A mean over tokens is one over those that
# were scored and count in the loss, in all processes.
METRICS = {
    "reward": "mean of the R rewards",
    "reward_std": "mean over groups of the standard deviation of their rewards",
    "accuracy": "share of completions whose answer is right",
    "frac_reward_zero_std": "share of groups whose rewards are all equal, which without a penalty have no gradient",
    "frac_accuracy_constant": "share of groups that are all right or all wrong",
    "rewards/*/mean": "mean of a term of the reward design, before its weight",
    "verdicts/*": "completions of the step whose answer was checked with this outcome",
    "completions/mean_length": "tokens of a completion, the end token included",
    "completions/clipped_ratio": "share of completions that the length limit cut",
    "loss": "the objective of an optimizer step, mean over the step's updates; near 0 on policy, so it says little",
    "entropy": "-sum p log p of the distribution that a token was drawn from, mean over tokens, in nats",
    "kl": "k3 estimate of KL(policy || initial policy), e^d - d - 1, mean over tokens (with --kl-coef)",
    "clip_ratio/low_mean": "share of tokens with ratio below 1 - clip_low and negative advantage",
    "clip_ratio/high_mean": "share of tokens with ratio above 1 + clip_high and positive advantage",
    "mismatch": "|old - sampled log-probability|, mean over tokens: what the two forwards round apart",
    "grad_norm": "norm of the gradient before clipping, mean over the step's updates",
    "updates_skipped": "optimizer steps of this rollout without any group to train",
    "lr": "learning rate",
    "tokens_per_second": "sampled tokens over the whole step's time",
    "seconds": "time of the step, without evaluation and saving",
    "seconds/*": "of it, in this phase",
    "cost/trained_tokens": "tokens of prompts and completions that were scored with a gradient, repeated ones once",
    "cost/*": "forwards, pictures encoded, tokens, completions and repeated ones of the step's sampling and scoring",
    "memory_gib": "peak memory so far, in GiB, of the device or, without one, of the process",
    "eval/accuracy": "greedy accuracy on held-out examples",
    "eval/image_reliance": "nats a token that the policy's own greedy completions lose when pictures are grey",
    "eval/other_image_reliance": "the same when pictures are other examples'",
    # noisy_grpo.py
    "prior_weight": "K, the weight of the noise level's prior in the posterior, mean over groups",
    "noise/*/reward": "mean reward at this noise level",
    "noise/*/advantage": "mean advantage at this noise level",
    # vgpo.py
    "focus": "cosine of a token's state with the image tokens' mean state, mean over tokens",
    "focus/negative": "share of tokens whose cosine is below 0",
    "focus/gated": "share of tokens that got the bonus for late visual tokens",
    "focus/factor_min": "least factor of a token's advantage",
    "focus/factor_max": "greatest factor of a token's advantage",
    "focus/length_correlation": "correlation within groups of the sum of weights w with the length",
    "focus/*/*": "mean cosine of the early or late half of right or wrong completions",
    # vppo.py
    "nll": "-log p of the sampled tokens, mean over tokens, which the entropy penalty raises",
    "dependency": "S, how much a token depends on the image, mean over tokens",
    "dependency/kept": "the same over tokens that the filter keeps",
    "dependency/dropped": "the same over tokens that it drops",
    "dependency/kept_share": "share of tokens that it keeps",
    "dependency/clamped": "share of tokens whose S is at its bound of 10",
    "dependency/no_picture": "share of completions of prompts without a picture, which keep all tokens and factor 1",
    "dependency/right": "mean S of a completion, over those whose answer is right",
    "dependency/wrong": "mean S of a completion, over the others",
    "shaping/mean": "mean of the completions' shaping factors",
    "shaping/min": "least shaping factor",
    "shaping/max": "greatest shaping factor",
    # roma.py
    "loss/policy": "the policy's part of the loss",
    "loss/view_kl": "the divergence term's part of the loss",
    "loss/view_aux": "the auxiliary term's part of the loss",
    "view/kl": "divergence of the view that counts, mean over tokens of rows with views",
    "view/kl_mean": "divergence, mean over views and these tokens",
    "view/clamped": "share of these tokens where a divergence is at its bound of 10",
    "view/aux": "-A log p under the auxiliary view, mean over these tokens",
    "view/advantage": "|A|, mean over these tokens",
    "view/gap/*": "clean minus view log-probability under this corruption and severity, mean over tokens",
    "view/won/*": "share of tokens where this corruption was the worst view",
}


def meaning(name: str) -> str | None:
    """What a name stands for; None where nothing says.

    >>> meaning("rewards/think/mean")
    'mean of a term of the reward design, before its weight'
    """
    return METRICS.get(name) or next((text for pattern, text in METRICS.items() if fnmatchcase(name, pattern)), None)


def table() -> str:
    """All names and meanings as a Markdown table."""
    rows = [f"| `{name}` | {text.replace('|', chr(92) + '|')} |" for name, text in METRICS.items()]
    return "\n".join(["| name | meaning |", "| --- | --- |", *rows])


if __name__ == "__main__":
    print(table())
