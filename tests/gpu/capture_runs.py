"""Optimizer steps of our layers on a Llama with every launch captured: `python capture_runs.py OUT CASE …`.

Writes what was compiled as JSON: per case, and of two controls. For test_launch_capture.py, in a process of its own,
because the kernels of its own are interpreted.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import triton
from spilling_kernel import spilling

from hdpissa.benchmarks.kernel_timing.launch_capture import Launch, capture
from hdpissa.benchmarks.step import plain_engine, whole_step
from hdpissa.kernels import api, low_rank_grad_A


@dataclass(frozen=True)
class Case:
    """What a step is captured of: a shape, and more of the config's `hd_pissa`."""

    work: whole_step.Work
    dtype: torch.dtype = torch.bfloat16
    section: dict[str, Any] = field(default_factory=dict)


# A quarter of a Llama-2-7B's widths: they divide by what its own divide by, and the blocks are the same.
QUARTER = whole_step.Work(hidden=1024, intermediate=2752, layers=1, heads=8, vocabulary=512, slices=2)
ODD = replace(QUARTER, hidden=576, intermediate=1536, heads=9, length=1001)
CASES = {
    "shipped": Case(QUARTER),
    "dense": Case(QUARTER, section={"delta": {"exchange": "dense"}}),
    "fused": Case(QUARTER, section={"kernels": {"linear": "fused"}}),
    "fp32": Case(replace(QUARTER, length=512), torch.float32),
    "odd": Case(ODD, section={"delta": {"dtype": "bf16", "precision": "tf32"}}),
    "r32": Case(replace(QUARTER, r=32)),
    "r128": Case(replace(QUARTER, r=128)),
    "7b": Case(replace(QUARTER, hidden=4096, intermediate=11008, heads=32, slices=8)),
}


def step(case: Case) -> list[Launch]:
    """Two micro-batches, so that Linears which share an input are found, and the optimizer's phases."""
    model = whole_step.llama(case.work, torch.device("cpu"), case.dtype)
    ids = torch.arange(case.work.length)[None] % case.work.vocabulary
    with capture() as launches:
        optimizer = plain_engine.attach(model, r=case.work.r, slices=case.work.slices, **case.section)
        for index in range(2):
            optimizer.store.active.index = index
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.store.end_of_backward()
        optimizer.reduce()
        assert not optimizer.vote(torch.zeros(4, dtype=torch.float64)).refusal
        optimizer.step()
    return launches


def spills() -> list[Launch]:
    with capture() as launches:
        spilling[(1,)](torch.empty(64, 64), torch.empty(64, 64), SIZE=64, num_warps=1, maxnreg=32)
    return launches


def too_much_shared() -> str:
    """The type of what a kernel of ours raises whose pipeline is made too deep for the chip."""
    blocks = low_rank_grad_A._blocks
    deep = mock.patch.object(low_rank_grad_A, "_blocks", lambda *how: {**blocks(*how), "num_stages": 16})
    x_TI, q_TR = (torch.empty(2048, width, dtype=torch.bfloat16) for width in (1024, 16))
    try:
        with capture(), deep:
            api.low_rank_grad_A_([torch.empty(16, 1024)], [q_TR], x_TI)
    except triton.OutOfResources as error:
        return type(error).__name__
    return ""


def rows(launches: list[Launch]) -> list[dict[str, Any]]:
    """Each distinct kernel, with the number of its launches and what its machine code does."""
    kernels = dict.fromkeys(launch.kernel for launch in launches)
    return [
        {
            **{key: value for key, value in asdict(kernel).items() if key != "cubin"},
            "launches": sum(launch.kernel == kernel for launch in launches),
            "accesses": kernel.accesses,
            "matrix": kernel.matrix_instructions,
        }
        for kernel in kernels
    ]


if __name__ == "__main__":
    out, *names = sys.argv[1:]
    found: dict[str, Any] = {name: rows(step(CASES[name])) for name in names}
    found |= {"spills": rows(spills()), "too much shared": too_much_shared()}
    with open(out, "w") as file:
        json.dump(found, file)
