"""The evaluations of a training run: before it, on held-out examples every so many steps, and after it."""

from collections.abc import Sequence

from common.corruptions import choose
from common.data.examples import Example
from common.evaluation.accuracy import evaluate, table
from common.evaluation.probes import image_reliance
from common.evaluation.robustness import keep_robustness, robustness, robustness_summary, robustness_table
from common.model.load import Policy
from common.run.folder import Run

RELIANCE_EXAMPLES = 32
SEVERITIES = (1, 3, 5)


class Evaluations:
    """What a run evaluates, its results so far, and how it is said."""

    def __init__(
        self,
        args,
        run: Run,
        policy: Policy,
        held_out: Sequence[Example],
        test: Sequence[Example],
    ):
        """`args` are the script's settings."""
        self.args, self.run, self.policy, self.held_out, self.test = args, run, policy, held_out, test
        self.robust = [test[n] for n in range(min(args.robust_examples, len(test)))]
        self.results, self.cells = {}, {}
        # Half of the rows that training samples at once: there the rows of a group share their prompt, here none do.
        rows = args.slots or args.prompts_per_step // run.accelerator.num_processes * args.group_size
        at_once = max(rows // 2, args.micro_batch_tokens // args.max_completion_length)
        self.options = {
            "template": args.prompt_template,
            "max_new_tokens": args.max_completion_length,
            "batch_prompts": max(1, min(64, at_once)),
        }
        self.everywhere = {"seed": args.seed, "accelerator": run.accelerator}  # each process takes its share

    def on(self, examples: Sequence[Example]) -> dict:
        """Greedy accuracy, as `evaluate` returns it."""
        return evaluate(self.policy, examples, **self.options, **self.everywhere)

    def robustness(self) -> dict:
        """Accuracy of every example in every cell, as `robustness` returns it."""
        names = choose(("seen", "unseen"))
        return robustness(self.policy, self.robust, names, SEVERITIES, **self.options, **self.everywhere)

    def before(self) -> None:
        """Evaluate before the first step; a run that is continued has that already."""
        if len(self.test) and (found := self.run.once("before", lambda: self.on(self.test))):
            self.results["before"] = found
        if self.robust and (found := self.run.once("robustness-before", self.robustness)):
            self.cells["before"] = found

    def during(self, step: int) -> dict[str, float]:
        """Metrics of the evaluation after `step` steps; none where none is due."""
        if not self.args.eval_every or step % self.args.eval_every:
            return {}
        few = [self.held_out[n] for n in range(min(RELIANCE_EXAMPLES, len(self.held_out)))]
        accuracy = self.on(self.held_out)["accuracy"]
        reliance = image_reliance(self.policy, few, **self.options, quiet=not self.run.main)
        return {
            "eval/accuracy": accuracy,
            "eval/image_reliance": reliance["reliance/grey"],
            "eval/other_image_reliance": reliance["reliance/other"],
        }

    def finish(self) -> dict[str, dict]:
        """Evaluate after the last step; print and keep all results."""
        if len(self.test):
            self.results["after"] = self.on(self.test)
        if self.robust:
            self.cells["after"] = self.robustness()
        tables, main = [table(self.results)] if self.results else [], self.run.main
        summary = robustness_summary(self.cells) if main and self.robust else {}
        tables += [robustness_table(summary)] if summary else []
        self.run.finish(self.results, "\n\n".join(tables))
        if summary:
            keep_robustness(self.run.folder, summary, self.cells)
        return self.results
