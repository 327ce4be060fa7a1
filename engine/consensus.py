"""How ranks agree: on a value, on success, on failure.

Each function here is collective: every rank of the group calls it at the same place, and all of them return, or raise,
alike. Where one rank fails alone, the others would otherwise wait in the next collective until its timeout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .errors import one_line

T = TypeVar("T")


class RankFailedError(RuntimeError):
    """Work failed on one rank or several; raised on all of them. The message is one line: "rank 1: …"."""


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's value, in rank order. The value is pickled."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def from_rank0(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, where alone it is called.

    Raises:
        RankFailedError: on all ranks, if it raises there.
    """
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        outcome = [_attempt(work)]
    dist.broadcast_object_list(outcome, 0)
    value, problem = outcome[0]
    if problem is not None:
        raise RankFailedError(f"rank 0: {problem}")
    return value


def together(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """This rank's result of `work`, which must not communicate, once it has succeeded on every rank.

    Raises:
        RankFailedError: on all ranks, with the lowest failing rank's reason.
    """
    value, problem = _attempt(work)
    mine = None if problem is None else f"rank {dist.get_rank(group)}: {problem}"
    if (problem := first(mine, group)) is not None:
        raise RankFailedError(problem)
    return value


def first(problem: str | None, group: dist.ProcessGroup | None = None) -> str | None:
    """The problem of the lowest rank that has one, on all ranks; None where no rank has one."""
    if all_ranks(problem is None, group):
        return None
    return next(text for text in gather(problem, group) if text is not None)


def all_ranks(condition: bool, group: dist.ProcessGroup | None = None) -> bool:
    """Whether a condition holds on every rank; one all-reduce of one number."""
    flag = torch.tensor([int(condition)], device=_device(group))
    dist.all_reduce(flag, dist.ReduceOp.MIN, group=group)
    return bool(flag.item())


def any_rank(condition: bool, group: dist.ProcessGroup | None = None) -> bool:
    """Whether a condition holds on at least one rank; one all-reduce of one number."""
    return not all_ranks(not condition, group)


def _attempt(work: Callable[[], T]) -> tuple[Any, str | None]:
    try:
        return work(), None
    except Exception as error:  # of any type: the other ranks wait for this one's outcome
        return None, one_line(error)


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Where tensors of the group's collectives have to lie."""
    if "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
