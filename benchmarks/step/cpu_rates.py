"""What can this CPU do at all: matrix products in fp32 and bf16, and all-gathers between its processes?

    python benchmarks/step/cpu_rates.py [--ranks 2]

The ceilings under a training step on this machine (throughput.py): FLOP/s of one process's products in the shapes of
SmolLM2-135M, while the other processes compute the same, and the time of an all-gather of all its fp32 weights, as
ZeRO-3 does it, in pieces of several sizes. A CPU without bf16 instructions shows here why bf16 is slower on it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from hdpissa.benchmarks.common import ranks, timing

SHAPES = ((576, 1536), (1536, 576), (576, 49152))  # in, out: gate_proj, down_proj, output head
TOKENS = 256
WEIGHTS = 134_515_008  # of the whole model
PIECES_MB = (1, 8, None)
COLUMNS = ("what", "size", "rate", "unit", "seconds")


def product_rates(dtype: torch.dtype, seconds: float) -> list[dict[str, Any]]:
    """A row per shape: FLOP/s of this process's x Wᵀ."""
    import torch.distributed as dist

    rows = []
    for cols, count in SHAPES:
        x, W = torch.randn(TOKENS, cols, dtype=dtype), torch.randn(count, cols, dtype=dtype)
        dist.barrier()
        samples = repeat(lambda x=x, W=W: x @ W.T, seconds)  # type: ignore[misc]
        rates = [2e-9 * TOKENS * cols * count / s for s in samples]
        size = f"{TOKENS} × {cols} × {count}"
        row = {"what": f"product, {str(dtype).removeprefix('torch.')}", "size": size, "unit": "GFLOP/s per process"}
        rows.append(row | {"rate": statistics.median(rates), "samples": {"rate": rates[:50]}, "rounds": 1})
    return rows


def gather_rates(count: int, weights: int) -> list[dict[str, Any]]:
    """A row per size of pieces: all weights in fp32, of which every process has its part, gathered by all."""
    import torch.distributed as dist

    from hdpissa.engine.comm.exchange import _all_gather

    rows = []
    own = weights // count
    for megabytes in PIECES_MB:
        piece = own if megabytes is None else min(own, megabytes * 250_000)
        mine, every = torch.ones(piece), torch.empty(count * piece)
        samples = []
        for _ in range(4):
            dist.barrier()
            start = time.perf_counter()
            for _ in range(own // piece):
                _all_gather(every, mine)
            samples.append(time.perf_counter() - start)
        seconds = statistics.median(samples[1:])  # the first one connects
        size = "at once" if megabytes is None else f"in pieces of {megabytes} MB"
        rate = 4e-6 * own * (count - 1) / seconds
        row = {"what": f"all-gather of {4e-6 * weights:.0f} MB", "size": size, "unit": "MB/s received", "rate": rate}
        rows.append(row | {"seconds": seconds, "samples": {"seconds": samples[1:]}, "rounds": 1})
    return rows


def repeat(work: Callable[[], object], seconds: float) -> list[float]:
    """Times of calls, as many as fit, after one that warms up."""
    work()
    samples: list[float] = []
    while sum(samples) < seconds or len(samples) < 3:
        start = time.perf_counter()
        work()
        samples.append(time.perf_counter() - start)
    return samples


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each product")
    parser.add_argument("--weights", type=int, default=WEIGHTS, help="that are gathered, in fp32")
    timing.add_result_options(parser)
    ranks.add_options(parser)
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    if args.out:
        from hdpissa.engine.sharding import zero3

        zero3.init_distributed()
        rows = product_rates(torch.float32, args.seconds) + product_rates(torch.bfloat16, args.seconds)
        ranks.answer(args.out, rows + gather_rates(args.ranks, args.weights))
        zero3.shut_down()
        return
    name, configuration = timing.result_of("cpu_rates", args)
    rows = ranks.launch(
        __file__, args.ranks, "--ranks", args.ranks, "--seconds", args.seconds, "--weights", args.weights
    )
    fp32, bf16 = (next(r["rate"] for r in rows if r["what"].endswith(kind)) for kind in ("float32", "bfloat16"))
    gathers = [row["seconds"] for row in rows if "seconds" in row]
    headline = f"products {fp32:.0f} GFLOP/s in fp32, {bf16:.1f} in bf16, all weights gathered in {min(gathers):.2f} s"
    note = (
        f"{args.ranks} processes of one thread each, all at the same work; rank 0's figures, medians. Products are "
        f"x Wᵀ with {TOKENS} rows."
    )
    kept: dict[str, Any] = {"identity": ("what", "size"), "configuration": configuration, "headline": headline}
    timing.write(name, rows, COLUMNS, note, folder=args.folder, **kept)


if __name__ == "__main__":
    raise SystemExit(timing.run(main))
