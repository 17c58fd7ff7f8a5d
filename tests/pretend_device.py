"""An accelerator that is not there: code for CUDA takes its CUDA branches on the CPU, and is held to CUDA's rules.

    with pretended(monkeypatch) as device:
        ...                     # torch.ones(3, device="cuda") works
        device.most             # bytes that tensors held there at the peak
        device.reads            # waits for a result: .item(), .tolist(), bool(), masks as indices, copies to the CPU

Tensors say that they are on `cuda:0`; to torch they are on a backend of its own (`PrivateUse1`), and their numbers are
on the CPU. An operation that mixes them with CPU tensors is refused, as on a GPU, but for what CUDA allows too: numbers
without dimensions, indices, copies. Autocast rounds to bfloat16 where CUDA's does, and keeps its copies of the weights
as long. What is one kernel on CUDA, and keeps nothing in between, is one operation: attention, RMS norm, the gradient
of an activation. A graph is the list of operations that were seen while it was recorded, done again on the same memory
when it is replayed; waiting for a result while recording is refused.

What it does not show: CUDA's kernels with their rounding, and what their workspaces and the allocator take; streams.
"""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from weakref import finalize

import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import PreTrainedModel

aten = torch.ops.aten
CUDA, BACKEND = torch.device("cuda:0"), "pretend"
COPIES = {aten.copy_.default, aten._to_copy.default}
TAKE_INDICES = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
# Whose result has a size that only the numbers tell, or is a number itself.
WAITS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.unique_dim.default,
    aten._unique2.default, aten.bincount.default, aten.repeat_interleave.Tensor, aten.equal.default,
}  # fmt: skip
IN_BFLOAT16 = "linear matmul mm bmm addmm baddbmm scaled_dot_product_attention".split()
IN_FLOAT32 = "layer_norm softmax.int log_softmax.int exp log rsqrt pow.Tensor_Scalar".split()


class Device:
    """What the device has held and done."""

    def __init__(self):
        self.held, self.now, self.most, self.lock = {}, 0, 0, threading.RLock()
        self.reads = self.uploads = 0
        self.recording = None  # operations of the graph that is being recorded
        self.replays = 0
        self.rounded = {}  # autocast's copies of weights

    def hold(self, numbers: torch.Tensor) -> None:
        storage = numbers.untyped_storage()
        with self.lock:
            if storage._cdata not in self.held:
                self.held[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                finalize(storage, self.free, storage._cdata)

    def free(self, key: int) -> None:
        with self.lock:
            self.now -= self.held.pop(key, 0)

    def read(self, what: object) -> None:
        self.reads += 1
        if self.recording is not None:
            raise RuntimeError(f"{what}: operation not permitted when stream is capturing")


device = Device()


class Pretend(torch.Tensor):
    """A tensor of the device around its CPU numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda = property(lambda self: CUDA), property(lambda self: True)

    @staticmethod
    def __new__(cls, numbers):
        self = torch.Tensor._make_wrapper_subclass(
            cls, numbers.size(), strides=numbers.stride(), storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype, device=torch.device(BACKEND, 0),
        )  # fmt: skip
        self.numbers = numbers
        device.hold(numbers)
        return self

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})

    def tolist(self):
        device.read("tolist")
        return self.numbers.tolist()


def is_here(where: object) -> bool:
    return where is not None and torch.device(where).type in ("cuda", BACKEND)


def each(change, value):
    """`value` with `change` made to all that its tuples, lists and dicts hold."""
    if isinstance(value, (tuple, list)):
        return type(value)([each(change, x) for x in value])
    if isinstance(value, dict):
        return {name: each(change, x) for name, x in value.items()}
    return change(value)


def run(function, args, kwargs):
    """The operation on the CPU numbers, after a check that its tensors live together."""
    ours, strangers = [], []

    def plain(x):
        if isinstance(x, Pretend):
            ours.append(x)
            return x.numbers
        if isinstance(x, torch.Tensor) and x.ndim:
            strangers.append(x)
        return torch.device("cpu") if isinstance(x, torch.device) and is_here(x) else x

    flat, options = each(plain, tuple(args)), each(plain, kwargs)
    indices = function in TAKE_INDICES and isinstance(args[0], Pretend)
    if ours and strangers and function not in COPIES and not indices:
        raise RuntimeError(f"{function}: a CPU tensor {tuple(strangers[0].shape)} among tensors on {CUDA}")
    asked = kwargs.get("device")
    here = bool(ours) if asked is None else is_here(asked)
    if function is aten.copy_.default:
        here = isinstance(args[0], Pretend)
    count(function, args, ours, strangers, here)
    if function is aten.bmm.dtype:  # which the CPU lacks
        function = bmm_in
    result = function(*flat, **options)
    if device.recording is not None and here:
        device.recording.append((function, flat, options, result))
    if function is aten.copy_.default:
        return args[0]
    if not here:
        return result
    known = {id(x.numbers): x for x in ours}  # operations in place return what they were given

    def wrap(x):
        if not isinstance(x, torch.Tensor) or isinstance(x, Pretend):
            return x
        return known.get(id(x)) if id(x) in known else Pretend(x)

    return each(wrap, result)


def bmm_in(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.bmm(a.to(dtype), b.to(dtype))


def count(function, args, ours, strangers, here) -> None:
    """Count waits of the host for the device, and copies to it."""
    if function in COPIES:
        device.uploads += bool(here and strangers)
        waits = ours and not here
    elif function in TAKE_INDICES:
        waits = any(isinstance(x, Pretend) and x.dtype == torch.bool for x in args[1])
    else:
        waits = ours and function in WAITS
    if waits:
        device.read(function)


class Mode(TorchDispatchMode):
    """Makes tensors there where `device="cuda"` asks for them, in the thread that enters it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Threads(ThreadPoolExecutor):
    """Threads in which the mode is on too."""

    def submit(self, work, /, *args, **kwargs):
        def there():
            with Mode():
                return work(*args, **kwargs)

        return super().submit(there)


class Fused(torch.autograd.Function):
    """An operation that is one kernel on CUDA: nothing is kept for the backward pass but its arguments."""

    @staticmethod
    def forward(ctx, function, *args):
        ctx.save_for_backward(*args)
        ctx.function = function
        numbers = [None if x is None else x.numbers for x in args]
        result = function(*numbers)
        if device.recording is not None:
            device.recording.append((function, numbers, {}, result))
        return Pretend(result)

    @staticmethod
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        wanted = [n for n in range(len(saved)) if ctx.needs_input_grad[n + 1]]
        with torch.enable_grad():
            numbers = [x if x is None else x.numbers.detach() for x in saved]
            for n in wanted:
                numbers[n].requires_grad_()
            found = torch.autograd.grad(ctx.function(*numbers), [numbers[n] for n in wanted], grad.numbers)
        grads = dict(zip(wanted, map(Pretend, found), strict=True))
        return None, *(grads.get(n) for n in range(len(saved)))


def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    options = dict(dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    return Fused.apply(partial(torch.nn.functional.scaled_dot_product_attention, **options), q, k, v, attn_mask)


def rms_norm(x, shape, weight=None, eps=None):
    return Fused.apply(lambda x, weight: torch.nn.functional.rms_norm(x, shape, weight, eps), x, weight)


AUTOCAST_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)


def under_autocast(operation, dtype: torch.dtype):
    """The operation with float32 and bfloat16 arguments brought to `dtype`, weights once for all."""

    def cast(x):
        if not isinstance(x, Pretend) or x.dtype not in (torch.float32, torch.bfloat16) or x.dtype == dtype:
            return x
        if dtype != torch.bfloat16 or not (x.requires_grad and x.is_leaf):
            return x.to(dtype)
        if id(x) not in device.rounded:
            device.rounded[id(x)] = x.to(dtype)
        return device.rounded[id(x)]

    def call(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST_KEY):
            return operation(*tree_map(cast, args), **tree_map(cast, kwargs))

    return call


class Autocast(torch.amp.autocast_mode.autocast):
    """torch's own for `cuda`, and with it the backend's."""

    def __enter__(self):
        entered = super().__enter__()
        self.before = torch.is_autocast_enabled(BACKEND)
        torch.set_autocast_enabled(BACKEND, torch.is_autocast_enabled("cuda"))
        return entered

    def __exit__(self, *error):
        torch.set_autocast_enabled(BACKEND, self.before)
        return super().__exit__(*error)


class Graph:
    """The operations of a recording, in order, with the memory that they worked on."""

    def __init__(self):
        self.operations = []

    def replay(self) -> None:
        device.replays += 1
        for function, args, kwargs, results in self.operations:
            again = results if is_view(function) else function(*args, **kwargs)
            for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old is not new and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def is_view(function) -> bool:
    returns = [r.alias_info for r in function._schema.returns] if hasattr(function, "_schema") else []
    return any(info is not None and not info.is_write for info in returns)


@contextlib.contextmanager
def recording(graph: Graph, **_):
    device.recording = graph.operations
    try:
        yield
    finally:
        device.recording = None


def set_up() -> None:
    """Once a process: the backend, and what torch calls below the reach of tensor subclasses."""
    _device_constructors()  # remembers torch's own, and not the stand-ins of a test
    _setup_privateuseone_for_python_backend(BACKEND)
    module = getattr(torch, BACKEND)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    module.get_rng_state, module.set_rng_state = lambda where: torch.get_rng_state(), lambda state, where: None
    kept = [torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")]
    kept[1].fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    names = "empty_strided empty.memory_format as_strided copy_ view index.Tensor index_put_ fill_.Scalar".split()
    for name in [*names, "silu_backward"]:  # which would be taken apart
        kept[0].impl(name, below(named(name)), "PrivateUse1")
    kept[0].impl("scaled_dot_product_attention", attend, "AutogradPrivateUse1")
    kept[0].impl("rms_norm", rms_norm, "AutogradPrivateUse1")
    for name in IN_BFLOAT16:
        kept[0].impl(name, under_autocast(named(name), torch.bfloat16), "AutocastPrivateUse1")
    for name in IN_FLOAT32:
        kept[0].impl(name, under_autocast(named(name), torch.float32), "AutocastPrivateUse1")
    set_up.library = kept


def below(function):
    return lambda *args, **kwargs: run(function, args, kwargs)


def named(name: str):
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


@contextlib.contextmanager
def pretended(monkeypatch):
    """The device, empty, for as long as the context lasts; accelerate's accelerator is on it."""
    if not hasattr(set_up, "library"):
        set_up()
    device.__init__()

    def to_host(x):
        return x.detach().numbers.clone() if isinstance(x, Pretend) else x

    def from_host(save):
        def save_from_host(self, folder, state_dict=None, **kwargs):
            return save(self, folder, state_dict=tree_map(to_host, dict(state_dict or self.state_dict())), **kwargs)

        return save_from_host

    torch_save, torch_tensor, move = torch.save, torch.tensor, torch.Tensor.to

    def move_to_the_first(x, *args, **kwargs):  # torch would ask CUDA which device is the current one
        place = lambda y: CUDA if y == "cuda" or (isinstance(y, torch.device) and y.type == "cuda") else y
        return move(x, *map(place, args), **{name: place(value) for name, value in kwargs.items()})

    def tensor(values, *, device=None, **kwargs):
        values = values if isinstance(values, Pretend) else torch_tensor(values, **kwargs)
        return values.to(CUDA, **kwargs) if is_here(device) else values

    for owner, name, stand_in in (
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "is_bf16_supported", lambda *_: True),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_name", lambda where=None: "an accelerator that is not there"),
        (torch.cuda, "max_memory_allocated", lambda where=None: device.most),
        (torch.cuda, "CUDAGraph", Graph),
        (torch.cuda, "graph", recording),
        (torch.cuda, "current_stream", lambda where=None: None),
        (torch.cuda, "set_stream", lambda stream: None),
        (torch, "autocast", Autocast),
        (torch.amp, "autocast", Autocast),
        (torch, "clear_autocast_cache", lambda: device.rounded.clear()),
        (torch, "inference_mode", torch.no_grad),  # which knows no tensors of subclasses
        (torch.Tensor, "to", move_to_the_first),
        (torch, "tensor", tensor),
        (torch, "as_tensor", tensor),
        (torch, "save", lambda value, *rest, **kwargs: torch_save(tree_map(to_host, value), *rest, **kwargs)),
        (PreTrainedModel, "save_pretrained", from_host(PreTrainedModel.save_pretrained)),
        (PeftModel, "save_pretrained", from_host(PeftModel.save_pretrained)),
    ):
        monkeypatch.setattr(owner, name, stand_in)
    monkeypatch.setattr("common.data.prompts.ThreadPoolExecutor", Threads)
    AcceleratorState._reset_state(reset_partial_state=True)  # of the tests before, which were on the CPU
    try:
        with Mode():
            yield device
    finally:
        device.rounded.clear()
        AcceleratorState._reset_state(reset_partial_state=True)
