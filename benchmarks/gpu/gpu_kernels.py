"""Phase `kernels` of gpu.py: the cases of all bench_*.py in one process, each row written as it is measured.

With --linear the layers of two Llamas instead (linear_layers.py).
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from typing import Any

import torch

from hdpissa.benchmarks.common import timing
from hdpissa.benchmarks.gpu import gpu_rows
from hdpissa.benchmarks.kernel_timing import linear_layers, shapes, thin_products

# What a training step spends most time in comes first.
BENCHES = (
    *("low_rank_forward", "low_rank_grad_B", "low_rank_grad_A", "delta_apply", "slice_adam"),
    *("shard_subtract", "dense_delta", "fused_linear"),
)


def module_of(bench: str) -> Any:
    return importlib.import_module(f"hdpissa.benchmarks.kernel_timing.bench_{bench}")


def shrink() -> None:
    """Toy sizes, for the CPU."""
    [tiny] = shapes.distinct([shapes.groups("tiny", 48, 64, 48)[2]])
    shapes.LLAMA_2_7B[:], shapes.LLAMA_3_70B[:] = [tiny], []
    shapes.LLAMA_2_7B_GROUPS[:] = shapes.groups("tiny", 64, 96, 64)[:1]
    shapes.LLAMA_3_70B_GROUPS[:] = []
    for module, name, value in (
        (thin_products, "TOKENS", 32),
        (thin_products, "RANKS", (16,)),
        (linear_layers, "TOKENS", 16),
        (module_of("delta_apply"), "SLICES", (1,)),
        (module_of("shard_subtract"), "NUMEL", 300),
        (module_of("slice_adam"), "SIZES", (300,)),
    ):
        setattr(module, name, value)


def kernels() -> Iterator[dict[str, Any]]:
    for bench in BENCHES:
        try:
            yield from ({"table": bench, **row} for row in module_of(bench).rows())
        except Exception as error:  # the other kernels are still worth having
            yield gpu_rows.failure({"table": bench}, error)


def layers() -> Iterator[dict[str, Any]]:
    for groups in filter(None, (shapes.LLAMA_2_7B_GROUPS, shapes.LLAMA_3_70B_GROUPS)):
        how: dict[str, Any] = {"device": timing.need_gpu(), "time": timing.samples_ms}
        yield from linear_layers.measure_model(groups, tokens=linear_layers.TOKENS, **how)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--linear", action="store_true")
    args = parser.parse_args()
    timing.need_gpu()
    torch.manual_seed(0)
    if gpu_rows.is_dry():
        shrink()
    return gpu_rows.record_all(layers() if args.linear else kernels())


if __name__ == "__main__":
    raise SystemExit(main())
