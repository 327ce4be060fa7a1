"""Ranks that break NCCL's rules fail, though gloo lets them through: what all tests with `run_ranks` rely on."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from nccl_rules import NcclRuleError
from ranks import RankError, run_ranks

from hdpissa.engine.comm import exchange


def refused(*, caught: bool) -> None:
    """Calls that NCCL refuses, by each of the functions that the engine uses; none is issued."""
    dist.init_process_group("gloo")
    four, two, strided = torch.ones(4), torch.ones(2), torch.ones(4, 2)[:, 0]
    short = torch.ones(4, dtype=torch.int16)
    for call in (
        lambda: dist.all_reduce(strided),
        lambda: dist.broadcast(short, 0),
        lambda: dist.all_gather([four, torch.ones(2, 2)], four),
        lambda: exchange._all_gather(torch.ones(8), strided),
        lambda: exchange._reduce_scatter(two, strided),
        lambda: dist.all_to_all_single(short, short),
        lambda: dist.gather(strided, [four, four] if dist.get_rank() == 0 else None),
        lambda: dist.scatter(strided, [four, four] if dist.get_rank() == 0 else None),
        lambda: dist.send(short, 1 - dist.get_rank()),
        lambda: dist.recv(short, 1 - dist.get_rank()),
    ):
        with pytest.raises(NcclRuleError) if caught else nullcontext():
            call()


def apart(difference: str) -> None:
    """Two all-reduces that gloo carries out, and NCCL would not as they are meant."""
    dist.init_process_group("gloo")
    rank, four = dist.get_rank(), torch.ones(4)
    if difference == "number":
        dist.broadcast(four, 0, async_op=True) if rank == 0 else None  # not waited for, or gloo would tell
    elif difference == "order":
        for reduction in (dist.ReduceOp.SUM, dist.ReduceOp.MAX)[:: 1 - 2 * rank]:
            dist.all_reduce(four, reduction)
    else:
        dist.all_reduce(four if rank else four.int())


def allowed() -> None:
    dist.init_process_group("gloo")
    rank, four = dist.get_rank(), torch.ones(4)
    dist.all_to_all_single(torch.empty(8 * rank), four, [4 * rank] * 2, [0, 4])
    dist.all_gather_object([None, None], {"rank": rank})
    dist.broadcast(torch.ones(0), 0)
    dist.all_reduce(torch.ones(4, 2)[:, 0], group=dist.new_group(backend="gloo"))
    dist.send(four, 1) if rank == 0 else dist.recv(four, 0)
    alone = [dist.new_group([r]) for r in range(2)]
    for _ in range(rank):
        dist.all_reduce(four, group=alone[rank])
    dist.barrier()  # rank 0 holds the store, which making groups needs


def test_calls_that_nccl_refuses():
    """They fail in the rank, and count against it even if it goes on."""
    with pytest.raises(NcclRuleError):
        run_ranks(2, refused, caught=True)
    with pytest.raises(RankError):
        run_ranks(2, refused, caught=False)


@pytest.mark.parametrize("difference", ["number", "order", "dtype"])
def test_ranks_that_issue_different_collectives(difference):
    with pytest.raises(NcclRuleError):
        run_ranks(2, apart, difference)


def test_what_is_allowed():
    """Splits of zero, object collectives, anything in a group that is gloo's by intent, sends, groups of one."""
    run_ranks(2, allowed)
