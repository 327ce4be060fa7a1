"""NCCL's rules for collectives, held over ranks that talk through gloo, which has fewer.

* dtypes that NCCL has, one per call; dense tensors;
* tensors of a list have one shape;
* all ranks of a group issue the same collectives in the same order, with the same sizes, roots and reductions, and
  what one sends another receives: elsewhere NCCL hangs, or adds up what does not belong together.

Empty tensors and splits are allowed: NCCL has nothing to do then, and the last rule says that no rank has. DeepSpeed
broadcasts an empty list of its modules before the first pass.

Exempt from the first two: groups that are made with backend="gloo", whose tensors stay on the CPU. Object collectives
need no exemption: they are collectives of bytes. Where a test makes a rank fail or leave, and says so, the last holds
as far as both ranks got.

Held at the methods of ProcessGroup, which every function of torch.distributed and DeepSpeed's copies of them end in.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch's table in ProcessGroupNCCL, but for float8.
DTYPES = {
    torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
}  # fmt: skip
# Method → which of its arguments has the same number of elements on all ranks. Both names where torch has renamed one.
SYMMETRIC: dict[str, int | None] = {
    "allreduce": 0, "allreduce_coalesced": 0, "broadcast": 0, "reduce": 0, "gather": 1, "scatter": 0,
    "allgather": 1, "allgather_coalesced": 1, "_allgather_base": 1, "all_gather_single": 1,
    "allgather_into_tensor_coalesced": 1, "all_gather_single_coalesced": 1,
    "reduce_scatter": 0, "_reduce_scatter_base": 0, "reduce_scatter_single": 0,
    "reduce_scatter_tensor_coalesced": 0, "reduce_scatter_single_coalesced": 0,
    "alltoall": None, "alltoall_base": None, "all_to_all_single": None, "barrier": None,
}  # fmt: skip
LISTS = ("gather", "scatter", "allgather", "reduce_scatter")


class NcclRuleError(AssertionError):
    """A collective that NCCL refuses, or on which it would hang."""


class Recorder:
    """What one rank has issued, per (group, its ranks) in order, and the rules that it has broken."""

    def __init__(self) -> None:
        self.calls: dict[tuple[str, tuple[int, ...]], list[tuple]] = defaultdict(list)
        self.broken: list[str] = []
        self._members: dict[str, tuple[int, ...]] = {}
        self._on_cpu: set[str] = set()  # names of the groups that are gloo's by intent

    def install(self) -> None:
        """Puts itself before the collectives of this process, for good."""
        for name, symmetric in SYMMETRIC.items():
            self._wrap(name, functools.partial(self._collective, name, symmetric))
        self._wrap("send", self._send)
        self._wrap("recv", self._receive)
        make = dist.new_group

        @functools.wraps(make)
        def new_group(*args: Any, **kwargs: Any) -> Any:
            group = make(*args, **kwargs)
            if kwargs.get("backend") == "gloo" and isinstance(group, dist.ProcessGroup):
                self._on_cpu.add(group.group_name)
            return group

        dist.new_group = new_group

    def _wrap(self, name: str, note: Any) -> None:
        method = getattr(dist.ProcessGroup, name, None)
        if method is None:
            return

        @functools.wraps(method)
        def noted(group: Any, *args: Any, **kwargs: Any) -> Any:
            note(group, *args, **kwargs)
            return method(group, *args, **kwargs)

        setattr(dist.ProcessGroup, name, noted)

    def _collective(self, name: str, symmetric: int | None, group: Any, *args: Any, **kwargs: Any) -> None:
        self._check(name, group, args)
        options = next((a for a in (*args, *kwargs.values()) if type(a).__name__.endswith("Options")), None)
        reduction = getattr(options, "reduceOp", None)
        self.calls[group.group_name, self._ranks(group)].append(
            (
                name,
                sorted({str(t.dtype) for t in tensors(args)}),
                None if symmetric is None else [t.numel() for t in tensors(args[symmetric])],
                getattr(options, "rootRank", None),
                str(getattr(reduction, "op", reduction)),
            )
        )

    def _send(self, group: Any, sent: list[Tensor], to: int, tag: int) -> None:
        self._pair("send", group, sent, group.rank(), to)

    def _receive(self, group: Any, received: list[Tensor], source: int, tag: int) -> None:
        self._pair("recv", group, received, source, group.rank())

    def _pair(self, name: str, group: Any, given: list[Tensor], source: int, to: int) -> None:
        self._check(name, group, given)
        ranks = self._ranks(group)
        key = f"{group.group_name} {source} to {to}", (ranks[source], ranks[to])
        self.calls[key] += [(str(t.dtype), t.numel()) for t in given]

    def _ranks(self, group: Any) -> tuple[int, ...]:
        """Its members, looked up once."""
        name = group.group_name
        if name not in self._members:
            self._members[name] = tuple(dist.get_process_group_ranks(group))
        return self._members[name]

    def _check(self, name: str, group: Any, args: Any) -> None:
        if group.group_name in self._on_cpu:
            return
        given = list(tensors(args))
        rules = {
            "one dtype": len({t.dtype for t in given}) <= 1,
            "a dtype of NCCL's": all(t.dtype in DTYPES for t in given),
            "contiguous": all(t.is_contiguous() for t in given),
            "one shape in a list": name not in LISTS or all(len({t.shape for t in tensors(a)}) <= 1 for a in args),
        }
        broken = [rule for rule, held in rules.items() if not held]
        if broken:
            shapes = [(str(t.dtype), tuple(t.shape), t.stride()) for t in given]
            self.broken.append(f"{name}: {', '.join(broken)}: {shapes}")
            raise NcclRuleError(self.broken[-1])


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of nested lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def compare(recorders: list[Recorder], *, lost_peer: bool) -> None:
    """Raises NcclRuleError where a rule was broken, though the rank went on, or where ranks differ in what they issued.

    Args:
        recorders: of all ranks, in order.
        lost_peer: a rank fails or leaves on purpose, so that others issue more than it does.
    """
    pair_up = zip if lost_peer else itertools.zip_longest
    broken = [line for recorder in recorders for line in recorder.broken]
    for name, members in {key for recorder in recorders for key in recorder.calls}:
        first, *others = (recorders[rank] for rank in members)
        for rank, other in zip(members[1:], others, strict=True):
            pairs = pair_up(first.calls[name, members], other.calls[name, members])
            differing = [pair for pair in pairs if pair[0] != pair[1]]
            if differing:
                ours, theirs = differing[0]
                broken.append(f"group {name}: rank {members[0]} issues {ours}, rank {rank} {theirs}")
    if broken:
        raise NcclRuleError("\n".join(broken))
