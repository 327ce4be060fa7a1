"""Counts what collectives move, of every method alike, and how long they take inside an optimizer step.

All of torch's collectives, DeepSpeed's among them, end in a method of `ProcessGroup`; `Wire` wraps those methods once
per process, so nothing is counted twice and nothing that a method calls on its own escapes. (What does not pass
through Python, torch's functional collectives, would escape; nothing here uses them.)

Bytes of a rank in a group of G, as a ring has them, where N is the rank's own part:

    all-gather       (G − 1) · N sent and received      reduce-scatter   (G − 1) · N, N of the result
    all-reduce       2 (G − 1) · N / G                  all-to-all       all parts but the one that stays
    broadcast        N received by all but the root     reduce           N sent by all but the root
    gather           N to the root                      scatter          N from the root

Sent and received are equal in sum over the ranks; on one rank an all-to-all, a broadcast and the like may differ.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Moved = tuple[int, int]  # bytes sent, bytes received


def nbytes(tensors: Any) -> int:
    """Of a tensor, or of tensors in however many lists."""
    return tensors.nbytes if isinstance(tensors, Tensor) else sum(map(nbytes, tensors))


def _gathered(group: Any, outputs: Any, inputs: Any, *_: Any) -> Moved:
    moved = (group.size() - 1) * nbytes(inputs)
    return moved, moved


def _reduce_scattered(group: Any, outputs: Any, *_: Any) -> Moved:
    moved = (group.size() - 1) * nbytes(outputs)
    return moved, moved


def _summed(group: Any, tensors: Any, *_: Any) -> Moved:
    moved = 2 * (group.size() - 1) * nbytes(tensors) // group.size()
    return moved, moved


def _all_to_all(group: Any, output: Tensor, inputs: Tensor, output_splits: Any, input_splits: Any, *_: Any) -> Moved:
    """What stays on the rank is not counted; equal parts where no sizes are given."""

    def leaving(tensor: Tensor, splits: Any) -> int:
        own, parts = (splits[group.rank()], max(1, tensor.shape[0])) if splits else (1, group.size())
        return tensor.nbytes - own * tensor.nbytes // parts

    return leaving(inputs, input_splits), leaving(output, output_splits)


def _lists_to_lists(group: Any, outputs: Any, inputs: Any, *_: Any) -> Moved:
    rank = group.rank()
    return nbytes(inputs) - nbytes(inputs[rank]), nbytes(outputs) - nbytes(outputs[rank])


def _from_root(group: Any, tensors: Any, options: Any) -> Moved:
    """A pipeline along the ring: every rank but the last passes on what it has."""
    total, place = nbytes(tensors), (group.rank() - options.rootRank) % group.size()
    return total * (place != group.size() - 1), total * (place != 0)


def _to_root(group: Any, tensors: Any, options: Any) -> Moved:
    received, sent = _from_root(group, tensors, options)
    return sent, received


def _gather(group: Any, outputs: Any, inputs: Any, options: Any) -> Moved:
    total, at_root = nbytes(inputs), group.rank() == options.rootRank
    return (0, (group.size() - 1) * total) if at_root else (total, 0)


def _scatter(group: Any, outputs: Any, inputs: Any, options: Any) -> Moved:
    received, sent = _gather(group, inputs, outputs, options)
    return sent, received


# ProcessGroup's methods by rule: those of torch 2.13, and the older names; only one of a pair is called.
NAMES: dict[Callable[..., Moved], str] = {
    _gathered: "all_gather_single _allgather_base all_gather_single_coalesced allgather_into_tensor_coalesced "
    "allgather allgather_coalesced",
    _reduce_scattered: "reduce_scatter_single _reduce_scatter_base reduce_scatter_single_coalesced "
    "reduce_scatter_tensor_coalesced reduce_scatter",
    _summed: "allreduce allreduce_coalesced",
    _all_to_all: "all_to_all_single alltoall_base",
    _lists_to_lists: "alltoall",
    _from_root: "broadcast",
    _to_root: "reduce",
    _gather: "gather",
    _scatter: "scatter",
    lambda group, tensors, *_: (nbytes(tensors), 0): "send",
    lambda group, tensors, *_: (0, nbytes(tensors)): "recv",
}
RULES = {name: rule for rule, names in NAMES.items() for name in names.split()}


def now() -> Any:
    """A moment on the device's current stream, or on the host where there is no GPU; nothing waits for it."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Any, end: Any) -> float:
    """Seconds between two moments; waits for the later one."""
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


class Wire:
    """The count of this process since it was made or `reset`; `Wire.of_process()` is the only one there is.

    Attributes:
        sent, received, calls: bytes and collectives of this rank. by_name: bytes sent by ProcessGroup's method.
        moments: (start, end) of each call and of each wait for one, while `timing` is on.
    """

    _only: Wire | None = None

    def __init__(self) -> None:
        self.timing = False
        self.moments: list[tuple[Any, Any]] = []
        self.reset()

    @classmethod
    def of_process(cls) -> Wire:
        """Wraps the collectives at the first call."""
        if cls._only is None:
            cls._only = cls()
            for name in RULES:
                if hasattr(dist.ProcessGroup, name):
                    setattr(dist.ProcessGroup, name, cls._only._counted(name, getattr(dist.ProcessGroup, name)))
            dist.Work.wait = cls._only._timed(dist.Work.wait)  # type: ignore[method-assign]
        return cls._only

    def reset(self) -> None:
        """Starts the count anew."""
        self.sent = self.received = self.calls = 0
        self.by_name: Counter[str] = Counter()

    def _counted(self, name: str, original: Callable) -> Callable:
        timed, rule = self._timed(original), RULES[name]

        @wraps(original)
        def collective(group: Any, *args: Any, **kwargs: Any) -> Any:
            if group.size() > 1:
                sent, received = rule(group, *args, **kwargs)
                self.sent, self.received, self.calls = self.sent + sent, self.received + received, self.calls + 1
                self.by_name[name] += sent
            return timed(group, *args, **kwargs)

        return collective

    def _timed(self, original: Callable) -> Callable:
        @wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.timing:
                return original(*args, **kwargs)
            start = now()
            result = original(*args, **kwargs)
            self.moments.append((start, now()))
            return result

        return call

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Within it every collective leaves its moments."""
        self.moments, self.timing = [], True
        try:
            yield
        finally:
            self.timing = False

    def seconds(self) -> float:
        """In collectives, in the last `timed` block; on a GPU what the compute stream waited for them."""
        return sum(between(start, end) for start, end in self.moments)
