"""Phase `environment` of gpu.py: what the figures are of, how long imports take, and the device's ceilings."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hdpissa.benchmarks.common import timing
from hdpissa.benchmarks.gpu import gpu_rows

# What every training process imports, in the order in which it does.
IMPORTS = ("triton", "transformers.models.llama.modeling_llama", "deepspeed", "datasets", "peft")
PACKAGES = ("numpy", "safetensors", "tokenizers", "datasets", "accelerate", "pydantic", "pytest", "hypothesis")


def versions() -> dict[str, Any]:
    """Those in every result, and those of the packages that tests and smoke need."""
    found = {name: timing.version(name) for name in PACKAGES}
    cache = os.environ.get("TRITON_CACHE_DIR")
    kernels = len(list(Path(cache).glob("*/*.cubin"))) if cache else 0
    return {**timing.environment(), **found, "carried kernels": kernels, "cores": len(os.sched_getaffinity(0))}


def imported(name: str) -> dict[str, Any]:
    start = time.perf_counter()
    importlib.import_module(name)
    return {"value": time.perf_counter() - start, "unit": "s"}


def copy() -> dict[str, Any]:
    return {"value": timing.copy_bandwidth() / 1e12, "unit": "TB/s, both ways"}


def product(dtype: torch.dtype) -> dict[str, Any]:
    return {"value": timing.matmul_rate(dtype) / 1e12, "unit": "TFLOP/s"}


def rows() -> Iterator[dict[str, Any]]:
    for name, value in versions().items():
        yield {"table": "versions", "name": name, "value": value}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        yield {"table": "versions", "name": "memory free / total GB", "value": f"{free / 1e9:.0f} / {total / 1e9:.0f}"}
    yield gpu_rows.attempt({"table": "ceilings", "name": "copy"}, copy)
    for dtype in (torch.bfloat16, torch.float32):
        yield gpu_rows.attempt({"table": "ceilings", "name": f"{str(dtype)[6:]} product"}, partial(product, dtype))
    for name in IMPORTS:
        yield gpu_rows.attempt({"table": "imports", "name": name}, partial(imported, name))


if __name__ == "__main__":
    timing.need_gpu()
    raise SystemExit(gpu_rows.record_all(rows()))
