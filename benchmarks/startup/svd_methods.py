"""Which SVD method is cheapest for which size and rank, and do the constants of engine/directions/svd.py predict it?

    python benchmarks/startup/svd_methods.py                 every size and rank, on the GPU where there is one
    python benchmarks/startup/svd_methods.py --rates         only the constants (`Rates`) of this device
    python benchmarks/startup/svd_methods.py --models        only what all matrices of two Llamas would take

The matrices imitate trained weights: random singular vectors, and the quantiles of a small Llama's spectra, of its
flattest (an up_proj) and of one that decays (a q_proj). A control is `svd_lowrank` as PEFT calls it. On a CPU the
time is processor time of one thread, which other processes on the machine disturb least. For the Llamas one shape per
method is measured, and the rate that it reaches is taken for all others.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hdpissa.benchmarks.common import timing
from hdpissa.benchmarks.kernel_timing import shapes
from hdpissa.engine.directions import svd
from hdpissa.engine.precision import full_fp32

SIZES = [(576, 1536), (1024, 1024), (2048, 2048), (2048, 8192), (4096, 4096), (4096, 11008)]
RANKS = (32, 128, 512)
MODELS_RANK = 128
# σ over its value at 3 % of the spectrum, measured at these fractions on SmolLM2-135M's layer 15.
FRACTIONS = [0, 0.002, 0.005, 0.01, 0.02, 0.03, 0.047, 0.0625, 0.1, 0.2, 0.4, 0.7, 0.95, 1]
SPECTRA = {
    "flat": [1.223, 1.169, 1.116, 1.07, 1.035, 1.005, 0.966, 0.937, 0.88, 0.769, 0.606, 0.407, 0.242, 0.15],
    "decaying": [1.517, 1.492, 1.41, 1.181, 1.067, 1.006, 0.921, 0.818, 0.665, 0.439, 0.233, 0.081, 0.011, 0.001],
}


def spectrum(name: str, n: int) -> Tensor:
    """n singular values, largest first, between the quantiles by straight lines."""
    at, values = torch.tensor(FRACTIONS, dtype=torch.float64), torch.tensor(SPECTRA[name], dtype=torch.float64)
    x = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    right = torch.searchsorted(at, x).clamp(1, len(at) - 1)
    part = (x - at[right - 1]) / (at[right] - at[right - 1])
    return values[right - 1] + part * (values[right] - values[right - 1])


def imitated(rows: int, cols: int, name: str, device: torch.device) -> Tensor:
    """rows × cols, float32: a diagonal between two orthogonal matrices, each a product of two block reflections."""
    generator = torch.Generator().manual_seed(0)
    n = min(rows, cols)
    W = torch.zeros(rows, cols)
    W[range(n), range(n)] = spectrum(name, n).float()
    W = W.to(device)
    with full_fp32():
        for side in range(4):
            W = W.t() if side % 2 else W
            V = torch.linalg.qr(torch.randn(len(W), 64, generator=generator)).Q.to(device)
            W = W - 2 * V @ (V.t() @ W)
            W = W.t() if side % 2 else W
    return W.contiguous()


def timed(fn: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """(seconds, result): processor time on a CPU, which is to run one thread; the clock on a GPU."""
    if device.type == "cpu":
        start = time.process_time()
        result = fn()
        return time.process_time() - start, result
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = fn()
    torch.cuda.synchronize()
    return time.perf_counter() - start, result


def rates(device: torch.device, n: int = 512) -> svd.Rates:
    """This device's constants, each the best of three. eigh of two sizes tells its cost per n³ from that per row."""

    def best(fn: Callable[[], Any]) -> float:
        return min(timed(fn, device)[0] for _ in range(3))

    found: dict[str, float] = {}
    for bits, dtype in ((32, torch.float32), (64, torch.float64)):
        big = torch.randn(4 * n, 4 * n, dtype=dtype, device=device)
        thin = torch.randn(32 if bits == 32 else 4 * n, 4 * n, dtype=dtype, device=device)
        found[f"gemm{bits}"] = 2 * len(thin) * len(big) ** 2 / best(partial(torch.matmul, thin, big))
        small = big[: n // 4, : n // 4] + big[: n // 4, : n // 4].t()
        large = big[: 2 * n, : 2 * n] + big[: 2 * n, : 2 * n].t()
        short, long = (best(partial(torch.linalg.eigh, part)) for part in (small, large))
        row = max(0.0, (short - long / 512) / (n / 4 * (1 - 8 / 512))) if device.type == "cuda" else 0.0
        found[f"eigh{bits}"] = (2 * n) ** 3 / max(long - row * 2 * n, 1e-9)
        found["row"] = row
    return svd.Rates(**found)


def case(rows: int, cols: int, rank: int, name: str, device: torch.device, full: float | None) -> dict[str, Any]:
    """One matrix by every method; `full` is the time of its full float32 SVD where that has been taken already."""
    W, true = imitated(rows, cols, name, device), spectrum(name, min(rows, cols))[:rank].to(device)
    row: dict[str, Any] = {"rows": rows, "cols": cols, "rank": rank, "spectrum": name}
    with full_fp32():
        row["full fp32 s"] = full or timed(lambda: torch.linalg.svd(W, full_matrices=False), device)[0]
    constants = svd.CPU if device.type == "cpu" else svd.GPU
    for method in ("gram", "randomized"):
        row[f"{method} predicted s"] = svd.seconds(method, rows, cols, rank, constants)
        try:
            row[f"{method} s"], found = timed(partial(svd.top_triplets, W, rank, method=method), device)
        except ValueError as error:
            row[f"{method} s"] = str(error)
            continue
        row[f"{method} residual"] = found.residual
        row[f"{method} σ error"] = ((found.sigma - true) / true).abs().max().item()
        row[f"full / {method}"] = row["full fp32 s"] / row[f"{method} s"]
    row["auto"] = svd.plan(W, rank)[0]
    torch.manual_seed(0)
    row["lowrank s"], (_, sigma, _) = timed(lambda: torch.svd_lowrank(W, q=rank, niter=4), device)
    row["lowrank σ error"] = ((sigma.double() - true) / true).abs().max().item()
    return row


MEASURED = {"gram": (1024, 8192), "randomized": (4096, 11008)}  # by each method one shape, flat spectrum


def flop(method: str, rows: int, cols: int, rank: int) -> float:
    """FLOP of a method; an eigendecomposition counts 9 n³."""
    return svd.seconds(method, rows, cols, rank, svd.Rates(gemm32=1, gemm64=1, eigh32=1 / 9, eigh64=1 / 9, row=0.0))


def models(device: torch.device, rank: int = MODELS_RANK) -> list[dict[str, Any]]:
    """Every target matrix of two Llamas, by shape and in all, by the method that `auto` takes."""
    rates_reached = {}
    for method, (rows, cols) in MEASURED.items():
        W = imitated(rows, cols, "flat", device)
        took, _ = timed(partial(svd.top_triplets, W, rank, method=method), device)
        rates_reached[method] = flop(method, rows, cols, rank) / took
    table: list[dict[str, Any]] = []
    sizes = {"llama-2-7b": (32, shapes.LLAMA_2_7B_GROUPS), "llama-3-70b": (80, shapes.LLAMA_3_70B_GROUPS)}
    for model, (layers, groups) in sizes.items():
        counts = Counter((m.rows, m.cols) for group in groups for m in group.members)
        parts = []
        for (rows, cols), count in counts.items():
            method = svd.plan(torch.empty(rows, cols, device="meta" if device.type == "cuda" else "cpu"), rank)[0]
            row: dict[str, Any] = {"model": model, "matrix": f"{rows} × {cols}", "matrices": count * layers}
            row |= {"method": method, "TFLOP each": flop(method, rows, cols, rank) / 1e12}
            row["PFLOP"] = row["matrices"] * row["TFLOP each"] / 1e3
            row["GFLOP/s measured"] = rates_reached[method] / 1e9
            row["extrapolated s"] = 1e15 * row["PFLOP"] / rates_reached[method]
            parts.append(row)
        total = {key: sum(part[key] for part in parts) for key in ("matrices", "PFLOP", "extrapolated s")}
        table += [*parts, {"model": model, "matrix": "all", **total}]
    return table


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", action="store_true")
    parser.add_argument("--models", action="store_true")
    parser.add_argument("--largest", type=int, default=4096, help="smaller side of the largest matrix")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    timing.add_result_options(parser)
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    name, configuration = timing.labelled("svd_methods", args.label), timing.configuration_of(args)
    if args.models:
        name, configuration = timing.labelled("svd_models", args.label), {"rank": MODELS_RANK}
    kept: dict[str, Any] = {"folder": args.folder, "configuration": configuration}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    if args.rates:
        return print(rates(device))
    if args.models:
        found = models(device)
        timing.write(name, found, list(found[0]), MODELS_NOTE, identity=("model", "matrix"), **kept)
        return None
    table: list[dict[str, Any]] = []
    for rows, cols in SIZES:
        for shape in SPECTRA if rows <= args.largest else ():
            full = None
            for rank in args.ranks:
                if 2 * rank < rows:
                    table.append(case(rows, cols, rank, shape, device, full))
                    full = table[-1]["full fp32 s"]
                    print(table[-1], flush=True)
    columns = ["rows", "cols", "rank", "spectrum", "full fp32 s"]
    columns += [f"{m} {c}" for m in ("gram", "randomized") for c in ("s", "predicted s", "residual", "σ error")]
    columns += ["full / gram", "full / randomized", "auto", "lowrank s", "lowrank σ error"]
    largest = [row for row in table if (row["rows"], row["cols"]) == (table[-1]["rows"], table[-1]["cols"])]
    ratios = [row.get(f"full / {row['auto']}", 1.0) for row in largest]
    kept["headline"] = (
        f"full fp32 SVD of {largest[0]['rows']} × {largest[0]['cols']} / ours {min(ratios):.2f} to {max(ratios):.2f}"
    )
    timing.write(name, table, columns, NOTE, identity=("rows", "cols", "rank", "spectrum"), **kept)
    return None


NOTE = (
    "Seconds for the leading triplets of one matrix that imitates a trained weight, tolerance 1e-4. On a CPU: "
    "processor time of one thread. lowrank is torch.svd_lowrank(q = rank, niter = 4), the control that fails."
)

MODELS_NOTE = (
    "All target matrices of two Llamas at S·r = 128, tolerance 1e-4, by the method that `auto` takes. FLOP are those "
    "of engine/directions/svd.py's cost model (an eigendecomposition of n × n counts 9 n³); the rate is that of one "
    "matrix per method, measured (gram on 1024 × 8192, randomized on 4096 × 11008, flat spectrum). The seconds are "
    "extrapolated from it. On a CPU: processor time of one thread."
)

if __name__ == "__main__":
    raise SystemExit(timing.run(main))
