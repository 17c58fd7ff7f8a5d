"""Training on several processes.

Adapters are few: every process holds all of them, and their gradients are averaged (DDP). Where all weights are
trained, the float32 masters, their gradients and Adam's moments are cut into as many parts as there are processes
(torch's FSDP2), and each process computes with a whole copy of the weights in the precision of the arithmetic, which is
gathered anew after each optimizer step. Sampling and scoring read that copy as if there were one process.

Masters and moments may also live off the device, in the machine's memory, where the optimizer's step is then taken
(FSDP2's CPU offload): for one process too, which is then alone in a group. What is left on the device are weights and
gradients in the precision of the arithmetic.
"""

import os
import time
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from common.model.layers import precision
from common.model.scoring import Scorer

BACKEND = "cuda:nccl,cpu:gloo"  # the latter for gradients of masters off the device, whose norm is a sum over processes
UNTIL_EXIT = []  # what must not be freed earlier


def start_processes() -> Accelerator:
    """This process among those that the launcher started, or the only one."""
    # Others wait while the first one writes or checks a checkpoint: of a large model for more than NCCL's 10 minutes.
    cuda, several = torch.cuda.is_available(), "LOCAL_RANK" in os.environ
    # accelerate takes a backend that is not its default for a group of processes, and asks the group of a single one.
    settings = InitProcessGroupKwargs(backend=BACKEND if cuda and several else "nccl", timeout=timedelta(hours=2))
    return Accelerator(cpu=not cuda, kwargs_handlers=[settings])


def end_processes(accelerator: Accelerator) -> None:
    """Take leave of the others; without it, processes may abort at exit while others still talk to them."""
    if torch.distributed.is_initialized():
        accelerator.wait_for_everyone()
        # gloo's threads free what they held of the last messages, for which they need the interpreter's lock.
        time.sleep(0.2)
        # DDP would free the group while it holds that lock, which a thread of the group may wait for.
        UNTIL_EXIT.append(torch.distributed.group.WORLD)
    accelerator.end_training()


def distribute(
    scorer: Scorer, accelerator: Accelerator, offload_optimizer: bool = False
) -> tuple[torch.nn.Module, list[torch.nn.Parameter]]:
    """What to call for scores with a gradient, averaged over processes, and the parameters to optimize.

    A sharded parameter is this process's part of it. `gather_weights` has to follow, once all have their values.
    With `offload_optimizer` the parameters, and so what an optimizer keeps of them, are in the machine's memory;
    adapters are few and stay. Load the policy with it too: its float32 weights are then never all on the device.
    """
    every = list(scorer.parameters())
    trained, frozen = ([p for p in every if p.requires_grad is wanted] for wanted in (True, False))
    if hasattr(scorer.policy.model, "peft_config"):
        return accelerator.prepare(scorer) if accelerator.num_processes > 1 else scorer, trained
    if accelerator.num_processes == 1:
        if not offload_optimizer:
            return scorer, trained
        if not torch.distributed.is_initialized():  # a launcher may have started a group of one
            backend = BACKEND if accelerator.device.type == "cuda" else "gloo"
            torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    with scorer.policy.autocast():
        arithmetic = precision(every[0].new_empty(0, device=scorer.policy.device))  # masters may be elsewhere
    settings = dict(
        mesh=init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        reshard_after_forward=False,
        mp_policy=MixedPrecisionPolicy(param_dtype=arithmetic, reduce_dtype=torch.float32, cast_forward_inputs=False),
        ignored_params=set(frozen),  # of these every process has all
        offload_policy=CPUOffloadPolicy(accelerator.device.type == "cuda") if offload_optimizer else OffloadPolicy(),
    )
    # Layers are called as functions, so that only the hooks of `scorer` fire: at the end of a backward pass they
    # average all gradients, a group at a time. A group called by itself while sampling would be taken for the root.
    for layer in scorer.policy.base.model.language_model.layers:
        fully_shard(layer, **settings)
    fully_shard(scorer, **settings)
    scorer.set_reshard_after_backward(False)
    return scorer, [p for p in scorer.parameters() if p.requires_grad]


def gather_weights(scorer: torch.nn.Module) -> None:
    """Make the copy of the weights that the model computes with anew, from all processes' parts of the masters."""
    for module in scorer.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
            module.unshard()


def whole(value: object, keep: bool) -> object:
    """A nested structure with each sharded tensor whole and on the CPU where `keep`, else None in its place. All
    processes call it alike."""
    if isinstance(value, dict):
        return {key: whole(part, keep) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [whole(part, keep) for part in value]
    if isinstance(value, DTensor):
        value = value.full_tensor() if value.device_mesh.size() > 1 else value.to_local()  # of one process not a copy
        return value.cpu() if keep else None
    return value


def part_of(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor that is to be sharded as `parameter` is; the whole where that is not."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    mesh = parameter.device_mesh
    parts = [*value.chunk(mesh.size()), *[value[:0]] * mesh.size()]  # short tensors have fewer parts than processes
    own = torch.empty_like(
        parameter.detach(), dtype=value.dtype
    )  # where the parameter's part is: it may be off the device
    own.to_local().copy_(parts[mesh.get_local_rank()])
    return own
