"""Optimizer steps of our layers on a Llama with every launch captured: `python capture_runs.py OUT CASE …`.

Writes what was compiled as JSON: per case, and of two controls. For test_launch_capture.py, in a process of its own,
because the kernels of its own are interpreted.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest import mock

import torch
import triton
from spilling_kernel import spilling

from hdpissa.benchmarks.kernel_timing.launch_capture import Launch, capture
from hdpissa.benchmarks.step import method_models, plain_engine
from hdpissa.kernels import api, low_rank_grad_A


@dataclass(frozen=True)
class Case:
    """What a step is captured of: a Llama's sizes, tokens of a micro-batch, and more of the config's `hd_pissa`."""

    # a quarter of a Llama-2-7B's widths: they divide by what its own divide by, and the blocks are the same
    sizes: method_models.Sizes = (1024, 2752, 1, 8, 8, 512, False)
    length: int = 2048
    dtype: torch.dtype = torch.bfloat16
    r: int = 16
    slices: int = 2
    section: dict[str, Any] = field(default_factory=dict)


CASES = {
    "shipped": Case(),
    "dense": Case(section={"delta": {"exchange": "dense"}}),
    "fused": Case(section={"kernels": {"linear": "fused"}}),
    "fp32": Case(length=512, dtype=torch.float32),
    "odd": Case((576, 1536, 1, 9, 9, 512, False), 1001, section={"delta": {"dtype": "bf16", "precision": "tf32"}}),
    "r32": Case(r=32),
    "r128": Case(r=128),
    "7b": Case((4096, 11008, 1, 32, 32, 512, False), slices=8),
}


def step(case: Case) -> list[Launch]:
    """Two micro-batches, so that Linears which share an input are found, and the optimizer's phases."""
    model = method_models.random_model(method_models.llama_config(case.sizes), case.dtype, torch.device("cpu"))
    model.enable_input_require_grads()
    ids = torch.arange(case.length)[None] % case.sizes[5]
    with capture() as launches:
        optimizer = plain_engine.attach(model, r=case.r, slices=case.slices, **case.section)
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
