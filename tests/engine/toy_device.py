"""A device in Python on which numbers are real, mixing devices raises, and every wait of the host is noted.

Its tensors hold one on the CPU that does the work. Rules are CUDA's: a tensor of another device is refused, unless
it is copied, is an index, or a scalar in a pointwise operation; what needs a value on the host waits for the device,
and so does a copy in either direction that is not `non_blocking`.

Importing this makes the device known to torch for the rest of the process, and needs torch 2.13.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

backend_registration._setup_privateuseone_for_python_backend("toy")
DEVICE = torch.device("toy:0")
CPU = torch.device("cpu")
TORCH = str(Path(torch.__file__).parent)

COPIES = ("aten::copy_", "aten::_to_copy", "aten::_copy_from", "aten::set_")
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
# Their result's value or shape is needed on the host.
READ_BACK = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2")

waits: list[tuple[str, str]] = []  # (file, operation), in order; callers clear it


class DeviceMixError(RuntimeError):
    """An operation was given tensors of two devices."""


class ToyTensor(torch.Tensor):
    """A tensor on `DEVICE`; `raw` is on the CPU."""

    @staticmethod
    def __new__(cls, raw):
        how = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, raw.shape, device=DEVICE, **how)
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def data_ptr(self):
        return self.raw.data_ptr()

    # torch writes these two in C++, past the dispatcher
    def tolist(self):
        wait("tolist")
        return self.raw.tolist()

    def new_tensor(self, data, *, dtype=None):
        wait("new_tensor")
        return ToyTensor(torch.tensor(data, dtype=dtype or self.dtype))


class ToyMode(TorchDispatchMode):
    """Within it tensors can be made on `DEVICE`, or moved there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def wait(operation: str) -> None:
    """Notes a wait, and the file of whoever caused it: the innermost one that is neither torch's nor this."""
    frame = sys._getframe(1)
    while frame.f_back and (frame.f_code.co_filename.startswith(TORCH) or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    waits.append((frame.f_code.co_filename, operation))


def run(func, args, kwargs):
    """One operator: checks devices, notes a wait, computes on the CPU, and wraps what belongs on the device."""
    name, wanted = func._schema.name, kwargs.get("device")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_toy = any(isinstance(tensor, ToyTensor) for tensor in tensors)
    if on_toy and name not in COPIES:
        _check_devices(func, name, tensors)
    if on_toy and (name in READ_BACK or (name in INDEXING and _index_waits(tensors))):
        wait(name)
    out = func(*tree_map(_raw, args), **{key: tree_map(_raw, value) for key, value in kwargs.items()})
    to_toy = wanted == DEVICE or wanted == torch.device(DEVICE.type) if wanted is not None else on_toy
    if name == "aten::copy_":
        to_toy = isinstance(args[0], ToyTensor)
    if name in COPIES:
        source = args[1] if name == "aten::copy_" else args[0]
        if isinstance(source, ToyTensor) != to_toy and not _non_blocking(func, args, kwargs):
            wait(name)
    given = {} if name == "aten::_to_copy" else {id(_raw(tensor)): tensor for tensor in tensors}

    def wrap(value):
        if not isinstance(value, torch.Tensor) or id(value) in given:
            return given.get(id(value), value)
        return ToyTensor(value) if to_toy else value

    return tree_map(wrap, out)


def _raw(value):
    if isinstance(value, ToyTensor):
        return value.raw
    return CPU if isinstance(value, torch.device) and value.type == DEVICE.type else value


def _check_devices(func, name, tensors) -> None:
    strangers = [tensor for tensor in tensors if not isinstance(tensor, ToyTensor)]
    if torch.Tag.pointwise in func.tags:
        strangers = [tensor for tensor in strangers if tensor.dim()]
    if name in INDEXING and isinstance(tensors[0], ToyTensor):
        strangers = []
    if strangers:
        raise DeviceMixError(f"{name}: {[tuple(tensor.shape) for tensor in strangers]} on the CPU")


def _index_waits(tensors) -> bool:
    """An index on the CPU is copied, a mask is turned into places whose number the host must know."""
    return any(not isinstance(t, ToyTensor) or t.dtype == torch.bool for t in tensors[1:])


def _non_blocking(func, args, kwargs) -> bool:
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return bool(given.get("non_blocking"))
