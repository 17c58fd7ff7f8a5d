"""Runs a training script and writes what the optimizer saw, for tests that compare runs across processes.

[torchrun --nproc_per_node 2] tests/train_worker.py SCRIPT FILE.pt --flag value ...
"""

import importlib
import sys
from pathlib import Path

import torch
import tyro
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.model.processes import whole
from common.run.folder import Run


def record(script: str, arguments: list[str]) -> dict:
    """Train with these flags; returns each optimizer step's gradients and the weights at the end."""
    torch.set_num_threads(1)
    seen = {"gradients": []}
    check, save = Run.check_gradients, Run.save

    def check_and_record(self, grad_norm):
        gradients = {n: p.grad.clone() for n, p in self.parameters_for_tests if p.grad is not None}
        seen["gradients"].append(whole(gradients, keep=True))
        return check(self, grad_norm)

    def save_and_record(self, step, policy, optimizer):
        seen["weights"] = whole({n: p.detach().clone() for n, p in self.parameters_for_tests}, keep=True)
        save(self, step, policy, optimizer)

    restore = Run.restore

    def restore_and_remember(self, policy, optimizer):
        names = [n for n, p in policy.model.named_parameters() if p.requires_grad]
        self.parameters_for_tests = list(zip(names, optimizer.param_groups[0]["params"], strict=True))
        seen["sharded"] = isinstance(self.parameters_for_tests[0][1], DTensor)
        seen["processes"] = self.accelerator.num_processes
        return restore(self, policy, optimizer)

    Run.check_gradients, Run.save, Run.restore = check_and_record, save_and_record, restore_and_remember
    try:
        module = importlib.import_module(script)
        module.main(tyro.cli(module.Args, args=arguments))
    finally:
        Run.check_gradients, Run.save, Run.restore = check, save, restore
    return seen


if __name__ == "__main__":
    result = record(sys.argv[1], sys.argv[3:])
    if int(__import__("os").environ.get("RANK", 0)) == 0:
        torch.save(result, sys.argv[2])
