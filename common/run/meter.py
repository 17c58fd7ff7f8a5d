"""What a step measures: sums over micro-batches, made means over all processes once a step."""

import math
import resource
import sys
import time
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from common.model.load import Work

FOLLOWING = {"sample": "reward", "reward": "update"}  # phases, and which is begun when one is over


class Meter:
    """Means and totals of a training step, by name.

    Processes may measure different things: what one of them lacks counts nothing there. A mean that was measured in an
    earlier step of the run and not in this one is NaN, a total 0, so that every step has the same names.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.means: dict[str, list] = {}  # name -> [sum of values, number of values], both of this process and step
        self.totals: dict[str, object] = {}
        self.work = Work()  # of the policy that is trained, once there is one
        self.begins = lambda phase: None  # called when a step's first phase begins, and each that follows
        self.start()

    def start(self) -> None:
        """A step begins: its time runs from here."""
        self.seconds: dict[str, float] = {}
        self.started = self.lapped = time.perf_counter()
        self.work.clear()  # what evaluations have done since the last step is not the step's
        self.begins("sample")

    def add(self, name: str, values: torch.Tensor | Sequence[float] | float, mask: torch.Tensor | None = None) -> None:
        """Count values into the mean `name`: a tensor's, those inside `mask` (bool, of the same shape), or numbers.

        Nothing waits for the device: sums stay there, in the values' precision, until the step is reduced.
        """
        if isinstance(values, torch.Tensor):
            values = values.detach() if mask is None else values.detach()[mask]
            total, count = values.sum(), values.numel() if mask is None else mask.sum()
        else:
            values = values if isinstance(values, Sequence) else [values]
            total, count = sum(values), len(values)
        mean = self.means.setdefault(name, [0.0, 0.0])
        mean[0], mean[1] = mean[0] + total, mean[1] + count

    def add_rows(self, names: Sequence[str], values: torch.Tensor, mask: torch.Tensor) -> None:
        """Count row i of values [R, T], inside mask [R, T], into the mean `names[i]`."""
        kinds = list(dict.fromkeys(names))
        places = torch.tensor([kinds.index(name) for name in names], device=values.device)
        sums = torch.stack([(values.detach() * mask).sum(-1), mask.sum(-1)]).float()  # [2, R]
        sums = torch.zeros(2, len(kinds), device=values.device).index_add_(1, places, sums)
        for i, name in enumerate(kinds):
            mean = self.means.setdefault(name, [0.0, 0.0])
            mean[0], mean[1] = mean[0] + sums[0, i], mean[1] + sums[1, i]

    def extremes(self, least: str, greatest: str, values: torch.Tensor) -> None:
        """The least and the greatest value over all processes, under these names; NaN where there is none."""
        ends = [values.amin(), values.amax()] if values.numel() else [torch.nan, torch.nan]
        ends = torch.stack([torch.as_tensor(end, dtype=torch.float32, device=self.accelerator.device) for end in ends])
        ends = self.accelerator.gather(ends).view(-1, 2)
        ends = ends[~ends.isnan().any(1)]
        self.add(least, float(ends[:, 0].amin()) if len(ends) else math.nan)
        self.add(greatest, float(ends[:, 1].amax()) if len(ends) else math.nan)

    def correlate(self, name: str, one: torch.Tensor, other: torch.Tensor, group_size: int) -> None:
        """The correlation within groups, over all processes, of values [R]; NaN where one of them does not vary."""
        one, other = (x.view(-1, group_size).double() for x in (one, other))  # [N, G]
        one, other = (x - x.mean(1, keepdim=True) for x in (one, other))
        sums = torch.stack([(one * other).sum(), (one * one).sum(), (other * other).sum()])
        product, *squares = self.accelerator.reduce(sums).tolist()
        self.add(name, product / (math.prod(squares) ** 0.5 or math.nan))

    def total(self, name: str, value: torch.Tensor | float) -> None:
        """Add to what is summed up over all processes and stays a sum."""
        value = value.detach() if isinstance(value, torch.Tensor) else value
        self.totals[name] = self.totals.get(name, 0.0) + value

    def add_terms(self, terms: dict[str, Sequence[float]], verdicts: dict[str, int]) -> None:
        """The terms of a reward, and how often answers were checked with which outcome, those that came up."""
        for name, values in terms.items():
            self.add(f"rewards/{name}/mean", values)
        for status, count in verdicts.items():
            if count:
                self.total(f"verdicts/{status}", count)

    def lap(self, phase: str) -> None:
        """The time since the last lap was spent on `phase`, which is over."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.lapped
        self.lapped = now
        self.begins(FOLLOWING.get(phase, "this step"))

    def reduce(self) -> dict[str, float]:
        """The step's figures over all processes, and the seconds of this one in it and in each phase."""
        for name, value in vars(self.work).items():
            self.total(f"cost/{name}", value)
        means, totals = list(self.means), list(self.totals)
        if self.accelerator.num_processes > 1:
            named = gather_object([(means, totals)])
            means = list(dict.fromkeys(name for names, _ in named for name in names))
            totals = list(dict.fromkeys(name for _, names in named for name in names))
        sums = [x for name in means for x in self.means.get(name, (0.0, 0.0))]
        sums += [self.totals.get(name, 0.0) for name in totals]
        device = self.accelerator.device
        sums = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=device) for x in sums])
        sums = iter(self.accelerator.reduce(sums).tolist())
        pairs = {name: (next(sums), next(sums)) for name in means}
        figures = {name: total / count if count else float("nan") for name, (total, count) in pairs.items()}
        figures |= dict(zip(totals, sums, strict=True))

        seconds = time.perf_counter() - self.started
        figures |= {"tokens_per_second": pairs["completions/mean_length"][0] / seconds, "seconds": seconds}
        figures |= {f"seconds/{phase}": spent for phase, spent in self.seconds.items()}
        figures["memory_gib"] = peak_memory(device) / 2**30
        self.means = {name: [0.0, 0.0] for name in means}
        self.totals = dict.fromkeys(totals, 0.0)
        return figures


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far: of the GPU's memory, or, without one, of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
