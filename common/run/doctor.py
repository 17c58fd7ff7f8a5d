"""What is wrong with a run that does not learn: rules that read its metrics and say so, each once, with what to try.

A rule is a function from the lines of metrics.jsonl so far, oldest first, and the run's arguments to a paragraph, or to
None where it has nothing to say. Thresholds stand where they are used, with the reason. Remarks are lines of
remarks.jsonl: `{"step": ..., "rule": ..., "text": ...}`.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median

from common.rewards.answers import extract

WINDOW = 10  # steps that a rule looks back over, where it does not say otherwise
SOON = 5  # steps after which what is plain to see is said
# So many completions without a single success put its chance below 1 % (95 %: 3 / 300, the rule of three): with groups
# of 8 nine groups of ten then have none.
ENOUGH = 300


def last(history: list[dict], name: str, steps: int = WINDOW) -> list[float]:
    """The values of a metric in the last steps that have one (NaN is null in the file)."""
    return [line[name] for line in history[-steps:] if line.get(name) is not None]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def spread(values: Sequence[float]) -> float:
    """Standard deviation, divisor n - 1; 0 of fewer than two values."""
    centre = mean(values)
    return math.sqrt(sum((v - centre) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0


def rows(args: dict) -> int:
    return args["prompts_per_step"] * args["group_size"]


def verdicts(history: list[dict], steps: int) -> dict[str, float]:
    """Shares of the verdicts of answer checking over the last steps."""
    counts = Counter()
    for line in history[-steps:]:
        counts.update({k.removeprefix("verdicts/"): v for k, v in line.items() if k.startswith("verdicts/") and v})
    return {name: count / counts.total() for name, count in counts.items()}


def fell(history: list[dict], name: str, window: int) -> tuple[float, float] | None:
    """From where to where a metric fell: its best mean over `window` steps, and the mean of the last ones, if the loss
    is more than half and more than five standard errors of the difference of two such means: the best of many is one of
    many by luck, too. A step's own error is read off neighbouring steps, which hardly differ by anything else."""
    values = last(history, name, len(history))
    if len(values) < 2 * window:
        return None
    means = [mean(values[i : i + window]) for i in range(len(values) - window + 1)]
    best, now = max(means[:-window]), means[-1]
    noise = math.sqrt(mean([(b - a) ** 2 for a, b in pairwise(values)]) / 2)
    return (best, now) if best - now > max(best / 2, 5 * noise * math.sqrt(2 / window)) else None


# ------------------------------------------------------------------------------------------------------ the rules


def no_reward(history: list[dict], args: dict) -> str | None:
    """Nothing earned anything, in so many completions that chance is no excuse."""
    steps = max(SOON, math.ceil(ENOUGH / rows(args)))
    accuracy, reward = last(history, "accuracy", steps), last(history, "reward", steps)
    if len(accuracy) < steps or any(accuracy) or max(reward, default=1) > 0:
        return None
    share = verdicts(history, steps)
    text = f"None of the last {steps * rows(args):,} completions was right. "
    if cut := mean(last(history, "completions/clipped_ratio", steps)) > 0.5:
        text += "Most were cut off before they ended: raise --max-completion-length. "
    if share.get("unparsed", 0) > 0.5 and not cut:
        text += (
            f"{share['unparsed']:.0%} of the answers are not of the kind of the reference answers: see whether "
            "--answer-column and --kind fit. "
        )
    elif share.get("ok", 0) < 0.5 and not cut:
        text += (
            f"In {1 - share.get('ok', 0):.0%} no answer was understood: ask in --prompt-template for the answer "
            "between <answer> and </answer> or in \\boxed{}, or start from a model that writes one. "
        )
    elif not cut:
        text += (
            f"{share['ok']:.0%} of the answers were understood: they are wrong, or the reference answers are. Compare "
            "some in completions.jsonl; see whether --answer-column and --kind fit; train on easier examples or from a "
            "better model first. "
        )
    return text + "Without one success there is nothing to learn from, however long the run."


def constant_reward(history: list[dict], args: dict) -> str | None:
    """All rewards of several steps are one and the same number. Where that is 1 or 0 of an accuracy, the set is too
    easy or too hard, which other rules say."""
    rewards, deviations, accuracy = (last(history, name, SOON) for name in ("reward", "reward_std", "accuracy"))
    if len(rewards) < SOON or max(rewards) - min(rewards) > 1e-6 or max(deviations, default=1) > 1e-6:
        return None
    if rewards == accuracy:
        return None
    return (
        f"Each of the last {SOON * rows(args):,} completions earned {rewards[-1]:g}, right or wrong (accuracy "
        f"{mean(accuracy):.0%}): the reward is a constant and teaches nothing. See "
        "--reward and what it computes."
    )


def no_variance(history: list[dict], args: dict) -> str | None:
    """Less than one group in ten has rewards that differ: of the usual eight prompts a step, not one."""
    tied = mean(last(history, "frac_reward_zero_std"))
    accuracy = mean(last(history, "accuracy"))
    if len(history) < WINDOW or not tied >= 0.9 or not mean(last(history, "reward")):
        return None
    text = f"In {tied:.0%} of the groups of the last {WINDOW} steps all completions earned the same: no gradient. "
    if accuracy > 0.9:
        return text + f"{accuracy:.0%} are right: the examples are too easy; train on harder ones."
    if accuracy < 0.1:
        return text + f"{accuracy:.0%} are right: too hard; easier examples, a better model or a larger --group-size."
    return text + (
        "Some prompts are always answered right, the others never: a larger --group-size, a higher --temperature or "
        "examples of middling difficulty."
    )


def length_limit(history: list[dict], args: dict) -> str | None:
    """A quarter of the completions cut off: they have no answer, so that length is punished instead of errors."""
    cut = mean(last(history, "completions/clipped_ratio", SOON))
    if len(history) < SOON or not cut >= 0.25:
        return None
    before = mean(last(history[:2], "completions/clipped_ratio"))
    grew = " and their number grows: a penalty (--soft-punish-cache) may hold them" if cut > before + 0.2 else ""
    return (
        f"{cut:.0%} of the completions of the last {SOON} steps were cut off at {args['max_completion_length']} "
        f"tokens{grew}. Raise --max-completion-length, or leave them out with --mask-truncated-completions."
    )


def checks_fail(history: list[dict], args: dict) -> str | None:
    """Answers whose check timed out or raised count as wrong, so one in fifty is a noisy reward."""
    share = verdicts(history, SOON)
    failed = share.get("timeout", 0) + share.get("error", 0)
    if len(history) < SOON or failed < 0.02:
        return None
    return (
        f"Checking {failed:.0%} of the answers of the last {SOON} steps failed (timed out "
        f"{share.get('timeout', 0):.0%}, raised {share.get('error', 0):.0%}); they count as wrong. Use a simpler "
        f"--kind than {args['kind'] or 'math'} where the answers allow it, or leave such rows out of the data."
    )


def not_understood(history: list[dict], args: dict) -> str | None:
    """Half of the answers lost to their form, and no better than before: form is learned in a few steps or not."""
    unread = [1 - verdicts(history[:n], SOON).get("ok", 0) for n in (len(history) - WINDOW + SOON, len(history))]
    if len(history) < WINDOW or not verdicts(history, SOON) or min(unread) < 0.5 or unread[1] < unread[0] - 0.05:
        return None
    if not mean(last(history, "accuracy")):  # no_reward says it
        return None
    return (
        f"{unread[1]:.0%} of the completions of the last {SOON} steps have no answer that could be understood. Ask for "
        "the answer between <answer> and </answer> or in \\boxed{} (--prompt-template), or see --max-completion-length."
    )


def entropy_collapse(history: list[dict], args: dict) -> str | None:
    """A tenth of the first steps' entropy left, and groups of copies: a sure policy that is merely good keeps varied
    groups, and one that was sure from the start has lost nothing."""
    start, now = mean(last(history[:SOON], "entropy")), mean(last(history, "entropy"))
    if len(history) < SOON + WINDOW or not now < start / 10 or not mean(last(history, "frac_reward_zero_std")) >= 0.7:
        return None
    return (
        f"The entropy fell from {start:.3g} to {now:.3g} nats a token and most groups hold copies of one completion: "
        "the policy no longer explores. A lower --learning-rate, a higher --clip-high or --temperature, or --kl-coef."
    )


def entropy_explosion(history: list[dict], args: dict) -> str | None:
    """Three times the first two steps' entropy and half a nat more: half as many further choices at each token (e^0.5 =
    1.6), while a policy that learns to write in another way moves by tenths."""
    start, now = mean(last(history[:2], "entropy")), mean(last(history, "entropy", SOON))
    if len(history) < SOON or not now > max(3 * start, start + 0.5):
        return None
    return (
        f"The entropy rose from {start:.2f} to {now:.2f} nats a token: the policy comes apart. A lower --learning-rate "
        f"(now {args['learning_rate']:g}), fewer --updates-per-rollout, or --kl-coef."
    )


def kl_explosion(history: list[dict], args: dict) -> str | None:
    """Two nats a token: a completion of thirty tokens is e^60 times likelier than under the reference, whose penalty no
    longer holds. Runs that learn stay below a tenth of it, NoisyGRPO's, which train on what they would not say, below
    one. The median of the steps, since the k3 estimate of a single token may be in the thousands."""
    now = median(last(history, "kl", SOON) or [0.0])
    if len(history) < SOON or not now > 2:
        return None
    return (
        f"The divergence from the reference is {now:.2g} nats a token over the last {SOON} steps: the policy has left "
        f"it. Raise --kl-coef (now {args['kl_coef']:g}) or lower --learning-rate (now {args['learning_rate']:g})."
    )


def gradients_clipped(history: list[dict], args: dict) -> str | None:
    """Every norm of fifteen steps above five times the bound: the bound then sets the length of each step, not the
    gradient. NoisyGRPO's norms are one to three times its default bound, and it learns."""
    norms = last(history, "grad_norm", 15)
    if len(norms) < 15 or min(norms) <= 5 * args["max_grad_norm"]:
        return None
    return (
        "The gradients of the last 15 steps were all clipped, and by far: their norms were "
        f"{min(norms):.3g} to {max(norms):.3g}, --max-grad-norm is {args['max_grad_norm']:g}. Steps of great and of "
        "little evidence then count alike: raise it above the usual norm, or see whether the reward or a coefficient "
        "of the loss is out of scale."
    )


def sampling_mismatch(history: list[dict], args: dict) -> str | None:
    """Rounding costs about 1e-7 in float32 and 0.01 in bf16; at 0.05 nats a token a completion of a hundred tokens may
    well be e^5 times likelier than it was sampled. NoisyGRPO samples on other pictures than it scores, on purpose."""
    apart = mean(last(history, "mismatch", SOON))
    if len(history) < SOON or args.get("noise_images") or not apart > 0.05:
        return None
    return (
        f"Sampling's and scoring's log-probabilities lie {apart:.2g} nats a token apart: what is trained is not what "
        "was sampled. If --top-p, --top-k and --temperature are at their defaults, that is a fault: a run with "
        "preflight says where; --tis-cap 2 limits the harm."
    )


def image_ignored(history: list[dict], args: dict) -> str | None:
    """A grey picture in place of the real one changes the completions' log-probabilities by less than a hundredth of a
    nat a token, or by a tenth of what it did at the first evaluation."""
    values = last(history, "eval/image_reliance", len(history))
    if not values or values[-1] > max(0.01, values[0] / 10):
        return None
    return (
        f"The policy hardly looks at the picture: its completions are only {values[-1]:.3f} nats a token likelier than "
        f"with a grey picture ({values[0]:.3f} at the first evaluation). Do the answers follow from the question "
        "alone? See whether the pictures belong to their rows, and leave such rows out."
    )


def learning_rate_too_high(history: list[dict], args: dict) -> str | None:
    """The reward loses more than half of what it had: of noise, or of harder examples, it does not."""
    loss = fell(history, "reward", SOON)
    early = last(history[:2], "reward"), last(history, "reward", SOON)
    # The first steps' mean has an error of some 0.05 with 64 completions a step; from a quarter on half of it is plain,
    # and where the first update did it, a quarter of what the first step had.
    if not loss and len(history) >= SOON + 2 and max(early[0], default=0) > 0.25:
        if max(early[1]) < max(mean(early[0]) / 2 * (mean(early[0]) > 0.25), max(early[0]) / 4):
            loss = max(early[0]), mean(early[1])
    if not loss:
        return None
    return (
        f"The reward fell from {loss[0]:.2f} to {loss[1]:.2f}, mean of {SOON} steps: the updates destroy the policy. A "
        f"lower --learning-rate (now {args['learning_rate']:g}; a third or a tenth), or fewer --updates-per-rollout; "
        "resume from a checkpoint before the fall under a new --out, as --model."
    )


def clip_always(history: list[dict], args: dict) -> str | None:
    """A fifth of the tokens beyond the clip: their gradients are lost, since the updates went too far at once."""
    share = mean(last(history, "clip_ratio/low_mean", SOON)) + mean(last(history, "clip_ratio/high_mean", SOON))
    if len(history) < SOON or not share > 0.2 or args["importance_sampling_level"] == "sequence":
        return None  # sequence ratios are clipped at 3e-4, and for most of them: the authors report that and want it
    return (
        f"{share:.0%} of the tokens lie beyond the clip of the ratio and have no gradient: the updates of one rollout "
        "go too far. A lower --learning-rate, or fewer --updates-per-rollout or --epochs-per-rollout."
    )


def no_change(history: list[dict], args: dict) -> str | None:
    """A rate of 0, which a schedule may end at but not begin with."""
    rates = last(history, "lr", 3)
    if len(rates) < 3 or len(history) > SOON or any(rates):
        return None
    return "The learning rate is 0: nothing changes. Pass --learning-rate."


def overfitting(history: list[dict], args: dict) -> str | None:
    """Held-out accuracy is three standard errors below its best, and the training reward is higher than then."""
    scored = [(n, line["eval/accuracy"]) for n, line in enumerate(history) if line.get("eval/accuracy") is not None]
    if len(scored) < 2 or history[-1].get("eval/accuracy") is None:
        return None
    (best_at, best), (now_at, now) = max(scored, key=lambda pair: pair[1]), scored[-1]
    error = math.sqrt((best * (1 - best) + now * (1 - now)) / args["eval_examples"])
    then, today = (last(history[: n + 1], "reward") for n in (best_at, now_at))
    noise = math.sqrt((spread(then) ** 2 + spread(today) ** 2) / WINDOW)
    if best - now <= 3 * error or mean(today) - mean(then) <= 2 * noise:
        return None
    return (
        f"Held-out accuracy fell from {best:.0%} to {now:.0%} while the training reward rose from {mean(then):.2f} to "
        f"{mean(today):.2f}: the policy learns what pays in training only (a hint, the rows by heart, a flaw of the "
        "reward). Read completions of high reward; more or other training rows; --kl-coef; stop at the best evaluation."
    )


RULES: dict[str, Callable[[list[dict], dict], str | None]] = {
    rule.__name__: rule
    for rule in (
        no_reward, constant_reward, no_variance, length_limit, checks_fail, not_understood, learning_rate_too_high,
        no_change, entropy_collapse, entropy_explosion, kl_explosion, gradients_clipped, clip_always, sampling_mismatch,
        image_ignored, overfitting,
    )
}  # fmt: skip
FORM = {"no_reward", "not_understood", "length_limit"}  # rules whose remark shows endings


class Doctor:
    """The metrics and remarks of a run so far. `examine` after each step; what it returns is new."""

    def __init__(self, args: dict, history: Sequence[dict] = (), remarks: Sequence[dict] = ()):
        """`args` are the run's; `history` and `remarks` are those of a run that is continued."""
        self.args, self.history, self.remarks = args, list(history), list(remarks)
        self.endings = Counter()

    def examine(self, step: int, metrics: dict[str, float | None], endings: Sequence[str] = ()) -> list[dict]:
        """New remarks after a step, `endings` being those of its completions that were not understood."""
        self.history.append({k: v if v is not None and math.isfinite(v) else None for k, v in metrics.items()})
        self.endings.update(endings)
        said = {remark["rule"] for remark in self.remarks}
        new = []
        for name, rule in RULES.items():
            if name not in said and (text := rule(self.history, self.args)):
                shown = [f"{count:,} times …{ending!r}" for ending, count in self.endings.most_common(3)]
                if name in FORM and shown:
                    text += f" Most frequent endings that were not understood: {'; '.join(shown)}."
                new.append({"step": step, "rule": name, "text": text})
        self.remarks += new
        return new


def endings_of(completions: Sequence[str], length: int = 40) -> list[str]:
    """How completions end in which no answer is found, on one line each, numbers as # so that like ones are one.

    >>> endings_of(["<answer>3</answer>", "So it is 12.", "So it is 7."])
    ['So it is #.', 'So it is #.']
    """
    lost = (text[-4 * length :] for text in completions if extract(text)[0] is None)
    return [re.sub(r"\d+", "#", " ".join(text.split()))[-length:] for text in lost]
