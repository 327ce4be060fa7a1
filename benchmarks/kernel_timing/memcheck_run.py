"""Every kernel once on awkward sizes, for compute-sanitizer to watch.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/kernel_timing/memcheck_run.py

That nothing was found is the exit code's to say. Without torch's cache every tensor is an allocation of its own, so
that a read one element behind it is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hdpissa.benchmarks.common import timing
from hdpissa.benchmarks.gpu import gpu_rows
from hdpissa.kernels import api

T, O, I, R = 67, 131, 259, 17


def calls(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """By stem, a launch of each kernel."""

    def random(*size: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, device=device).to(of)

    x, dy, p, W = random(T, I, of=dtype), random(T, O, of=dtype), random(T, R, of=dtype), random(O, I, of=dtype)
    A, B, grad_A, grad_B = random(R, I), random(O, R), random(R, I), random(O, R)
    start, numel = 5, (O - 2) * I  # begins and ends within a row
    delta = (random(R, I), random(O, R)[:-1], A, B[:-1])
    bad = torch.zeros(1, dtype=torch.int32, device=device)
    parts = api.split_fp32(random(numel)) if dtype == torch.bfloat16 else (random(numel),)
    where: dict[str, Any] = {"start": start, "second_order": True, "impl": "triton"}
    adam: dict[str, Any] = {"step": 1, "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
    return {
        "low_rank_forward": lambda: api.low_rank_forward(x, A, impl="triton"),
        "low_rank_grad_B": lambda: api.low_rank_grad_B_(grad_B, dy, p, B, impl="triton"),
        "low_rank_grad_A": lambda: api.low_rank_grad_A_([grad_A], [p], x, impl="triton"),
        "fused_linear": lambda: api.fused_linear(x, W, A, impl="triton"),
        "slice_adam": lambda: api.slice_adam_(*(random(1031).abs() for _ in range(3)), impl="triton", **adam),
        "dense_delta": lambda: api.dense_delta(*delta, numel=numel, dtype=dtype, **where),
        "delta_apply": lambda: api.delta_apply_(parts, *delta, bad, scale=0.5, **where),
        "shard_subtract": lambda: api.shard_subtract_(parts, random(numel, of=dtype), bad, scale=0.5, impl="triton"),
    }


def rows(device: torch.device) -> Iterator[dict[str, Any]]:
    """Launches all, for bf16 and fp32 operands; each has ended before its row."""
    for dtype in (torch.bfloat16, torch.float32):
        for name, call in calls(device, dtype).items():

            def ended(call: Callable[[], object] = call) -> dict[str, Any]:
                call()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                return {"outcome": "ended"}

            yield gpu_rows.attempt({"kernel": name, "operands": str(dtype)[6:]}, ended)


if __name__ == "__main__":
    raise SystemExit(gpu_rows.record_all(rows(timing.need_gpu())))
