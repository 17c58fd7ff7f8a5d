"""Checkpoints: a policy in Hugging Face format with the trainer's state beside it, written whole or not at all.

Under a temporary name until every byte is on the disk, with a checksum of each file, so that damage is found before
anything is loaded.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from common.data.messages import TEMPLATE
from common.model.load import Policy, checkpoints_in, is_tiny, load_policy, save_policy
from common.model.processes import part_of
from common.rewards.designs import request_for
from common.run.files import checksum, one_line, read_arguments, sync, write


def write_checkpoint(folder: Path, policy: Policy, weights: dict | None, trainer: dict) -> None:
    """Write `folder`, named after its step: the policy (with these whole weights, where the model's own are not) and
    the trainer's state, which holds tensors and plain values.

    Raises:
        SystemExit: one line, when it cannot be written; what was there before stays.
    """
    writing = folder.with_name(f"writing-{folder.name}")
    try:
        with one_line(f"checkpoint {folder}"):
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir()
            save_policy(policy, writing, weights)
            torch.save(trainer, writing / "trainer.pt")
            files = sorted(p for p in writing.rglob("*") if p.is_file())
            for path in files:
                sync(path)
            write(writing / "complete", json.dumps({str(p.relative_to(writing)): checksum(p) for p in files}))
            sync(writing)
            if folder.exists():
                shutil.rmtree(folder)
            writing.rename(folder)
            sync(folder.parent)
    except SystemExit:
        shutil.rmtree(writing, ignore_errors=True)
        raise


def drop_old(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints of a run folder."""
    for old in checkpoints_in(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def newest_whole(run: Path) -> Path | None:
    """The newest checkpoint of a run folder that is whole; None where there is none at all. Damaged ones above it are
    set aside: were they to stay, they would count among the newest that are kept.

    Raises:
        SystemExit: there are checkpoints, and none is whole.
    """
    found = checkpoints_in(run)[::-1]
    for number, checkpoint in enumerate(found):
        damage = find_damage(checkpoint)
        if damage is None:
            for damaged in found[:number]:
                aside = damaged.with_name(f"damaged-{damaged.name}")
                shutil.rmtree(aside, ignore_errors=True)
                damaged.rename(aside)
            return checkpoint
        print(f"checkpoint {checkpoint}: {damage}; trying the one before", flush=True)
    if found:  # starting over would throw away the metrics of a run that may be mended by hand
        raise SystemExit(f"--resume {run}: none of its checkpoints is whole; start again with --out")
    return None


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        expected = json.loads((folder / "complete").read_text())
    except (OSError, ValueError):
        return "it was not written to the end"
    if not isinstance(expected, dict) or "trainer.pt" not in expected:
        return "its list of files is damaged"
    for name, digest in expected.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if checksum(folder / name) != digest:
            return f"{name} is truncated or damaged"
    return None


def load_checkpoint(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> dict:
    """Load a checkpoint into policy and optimizer; returns what else is in the trainer's state."""
    load_weights(policy, folder, masters(policy, optimizer))
    # On the CPU: load_state_dict moves what belongs on the device, and Adam's step counters do not. Mapped: the
    # processes of a machine share the memory that it takes.
    state = torch.load(folder / "trainer.pt", weights_only=True, map_location="cpu", mmap=True)
    parameters = optimizer.param_groups[0]["params"]
    for number, moments in state["optimizer"]["state"].items():
        moments |= {name: part_of(value, parameters[number]) for name, value in moments.items()}
    optimizer.load_state_dict(state["optimizer"])
    return state


def masters(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor] | None:
    """All weights by name, the sharded ones as the optimizer has them and frozen ones as the model does; None where
    none are sharded and the model holds all there is."""
    parameters = optimizer.param_groups[0]["params"]
    if not isinstance(parameters[0], DTensor):
        return None
    trained = iter(parameters)
    return {name: next(trained) if p.requires_grad else p for name, p in policy.model.named_parameters()}


def load_weights(policy: Policy, folder: Path, sharded: dict[str, torch.Tensor] | None = None) -> None:
    """Put a checkpoint's weights, or its adapter's, into the model in place, or into the sharded weights."""
    try:
        if (folder / "adapter_model.safetensors").is_file():
            from peft import set_peft_model_state_dict

            outcome = set_peft_model_state_dict(policy.model, load_file(folder / "adapter_model.safetensors"))
            strange = outcome.unexpected_keys
        else:
            # Loaded as any checkpoint is, since the names in a file are not always those in the model.
            weights = load_policy(str(folder)).model.state_dict()
            strange = [] if sharded else policy.model.load_state_dict(weights).unexpected_keys
            with torch.no_grad():
                for name, parameter in (sharded or {}).items():
                    parameter.copy_(part_of(weights[name], parameter))
    except RuntimeError as error:
        strange = [str(error).splitlines()[-1].strip()[:200]]
    if strange:
        raise SystemExit(f"checkpoint {folder}: weights of another model: {strange[0]}")


def settings_of(name: str) -> dict:
    """What a run, or a checkpoint's run, trained with; for any other model the standard template and a completion
    length of 2048, 72 for the built-in one and what was trained from it."""
    template = TEMPLATE.replace("{request}", request_for("accuracy", is_tiny(name)))
    settings = {"max_completion_length": 72 if is_tiny(name) else 2048, "prompt_template": template}
    for folder in (Path(name), Path(name).parent.parent):
        if (folder / "args.json").is_file():
            return settings | read_arguments(f"--model {name}", folder)
    return settings
