"""What a device does at its best, measured once when a run starts: the measure of what training makes of it.

A plain matrix product in the precision of the arithmetic, and a plain copy of memory, take a fraction of a second
together. Nothing is drawn at random, and nothing that training depends on is touched.
"""

import platform
import time
from collections.abc import Callable

import torch

from common.model.layers import precision
from common.model.load import Policy

SIZES = {"cpu": (512, 2**24), "cuda": (4096, 2**28)}  # rows of a square matrix, bytes that are copied
REPEATED = 3


def measure(device: torch.device, dtype: torch.dtype, side: int = 0, size: int = 0) -> dict[str, float]:
    """Operations a second of a product of two square matrices (2 side^3), and bytes a second that a copy reads and
    writes (2 size): the best of some times each."""
    default = SIZES["cuda" if device.type == "cuda" else "cpu"]
    side, size = side or default[0], size or default[1]
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    block = torch.ones(size, dtype=torch.uint8, device=device)

    def best(work: Callable[[], torch.Tensor]) -> float:
        seconds = []
        for _ in range(REPEATED + 1):
            started = time.perf_counter()
            work().flatten()[0].item()  # which waits for the device
            seconds.append(time.perf_counter() - started)
        return min(seconds[1:])

    return {"operations": 2 * side**3 / best(lambda: matrix @ matrix), "bytes": 2 * size / best(block.clone)}


def rates(policy: Policy, processes: int) -> dict[str, object]:
    """The device's rates, and what the model takes at the least.

    `operations_a_token` of an update are those of the language model's layers: 2 a parameter forward, and twice that
    backward, of which with adapters only one half is needed, since no other weight has a gradient. The vision tower,
    attention's own products and the output head come on top, as does what is computed again to spare memory.
    `bytes_a_decoding_step` are the layers' and the output head's weights; keys and values come on top.
    """
    with policy.autocast():
        dtype = precision(torch.empty(0, device=policy.device))
    layers = sum(p.numel() for p in policy.base.model.language_model.layers.parameters())
    read = layers + policy.model.get_output_embeddings().weight.numel()
    cuda = policy.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(policy.device) if cuda else platform.processor() or platform.machine(),
        "processes": processes,
        **measure(policy.device, dtype),
        "operations_a_token": layers * (4 if hasattr(policy.model, "peft_config") else 6),
        "bytes_a_decoding_step": read * dtype.itemsize,
    }
