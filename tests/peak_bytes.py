"""Memory of code on the CPU, counted by the tensors that it makes."""

from weakref import finalize

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """The most bytes that results of operations hold at a time."""

    def __init__(self):
        super().__init__()
        self.held, self.now, self.most = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.held:  # a view has another's
                self.held.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                finalize(storage, self.free, storage._cdata, storage.nbytes())
        return result

    def free(self, key, nbytes):
        self.held.remove(key)
        self.now -= nbytes
