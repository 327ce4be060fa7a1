"""Which SVD method is cheapest for which size and rank, how right is it, and do the constants of
engine/directions/svd.py predict it?

    python benchmarks/startup/svd_methods.py                 every size and rank, on the GPU where there is one
    python benchmarks/startup/svd_methods.py --model         the weights of SmolLM2-135M, or of a folder that is named
    python benchmarks/startup/svd_methods.py --rates         only the constants (`Rates`) of this device

Measured, too: a full float32 SVD, which is what the published code takes on every process, and as a control
`svd_lowrank` as PEFT calls it. Without --model the matrices imitate trained weights: random singular vectors, and the
quantiles of a small Llama's spectra, of its flattest (an up_proj) and of one that decays (a q_proj). Errors of σ are
against the spectrum that was planted, or LAPACK's in float64. On a CPU the time is processor time of one thread,
which other processes on the machine disturb least. Phase `svd` of `make gpu`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hdpissa.benchmarks.common import timing
from hdpissa.benchmarks.gpu import gpu_rows
from hdpissa.engine.config.section import DEFAULT_TARGETS
from hdpissa.engine.directions import svd
from hdpissa.engine.errors import ConfigError
from hdpissa.engine.precision import full_fp32
from hdpissa.engine.sharding import base_files

SIZES = [(576, 1536), (1024, 1024), (2048, 2048), (2048, 8192), (4096, 4096), (4096, 11008)]
RANKS = (32, 128, 512)
COLUMNS = (
    "rows", "cols", "rank", "spectrum", "full fp32 s",
    *(f"{m} {c}" for m in ("gram", "randomized") for c in ("s", "predicted s", "residual", "σ error")),
    *(f"full / {method}" for method in ("gram", "randomized", "auto")), "auto", "lowrank s", "lowrank σ error",
)  # fmt: skip
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
    """This device's constants, each the best of three. two sizes of eigh separate its cost per n³ from that per row."""

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


def case(W: Tensor, rank: int, name: str, true: Tensor, full: float | None = None) -> dict[str, Any]:
    """One matrix by every method.

    Args:
        name: of its spectrum, or of the weight. true: its singular values.
        full: the time of its full float32 SVD where that has been taken already.
    """
    device, (rows, cols) = W.device, W.shape
    row: dict[str, Any] = {"rows": rows, "cols": cols, "rank": rank, "spectrum": name}
    with full_fp32():
        row["full fp32 s"] = full or timed(lambda: torch.linalg.svd(W, full_matrices=False), device)[0]
    constants = svd.CPU if device.type == "cpu" else svd.GPU
    for method in ("gram", "randomized", "auto"):
        try:
            row[f"{method} s"], found = timed(partial(svd.top_triplets, W, rank, method=method), device)
        except ValueError as error:  # it misses the tolerance
            row[f"{method} s"] = str(error)
            continue
        row[f"{method} residual"] = found.residual
        row[f"{method} σ error"] = ((found.sigma - true[:rank]) / true[:rank]).abs().max().item()
        row[f"full / {method}"] = row["full fp32 s"] / row[f"{method} s"]
        row["auto"] = found.method
    for method in ("gram", "randomized"):
        row[f"{method} predicted s"] = svd.seconds(method, rows, cols, rank, constants)
    torch.manual_seed(0)
    row["lowrank s"], (_, sigma, _) = timed(lambda: torch.svd_lowrank(W, q=rank, niter=4), device)
    row["lowrank σ error"] = ((sigma.double() - true[:rank]) / true[:rank]).abs().max().item()
    return row


def imitations(args: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """A full SVD is taken once for each matrix."""
    for rows, cols in (each for each in args.sizes if each[0] <= args.largest):
        for name in args.spectra:
            W, true, full = imitated(rows, cols, name, device), spectrum(name, min(rows, cols)).to(device), None
            for rank in (rank for rank in args.ranks if 2 * rank < rows):
                row = case(W, rank, name, true, full)
                full = row["full fp32 s"]
                yield row


def weights(args: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Every target weight of a checkpoint.

    Raises:
        ConfigError: there are none, or a rank is too large for one.
    """
    files = base_files.checkpoint_files(args.model)
    names = [name for name in sorted(files) if name.endswith(".weight") and name.split(".")[-2] in DEFAULT_TARGETS]
    if not names:
        raise ConfigError(f"--model {args.model}: no target weights there; give a folder with safetensors files")
    for name in names:
        if args.layers is not None and next(int(part) for part in name.split(".") if part.isdigit()) >= args.layers:
            continue
        with safe_open(files[name], framework="pt") as file:
            W = file.get_tensor(name).float().to(device)
        if max(args.ranks) > min(W.shape):
            raise ConfigError(f"--ranks {max(args.ranks)} exceeds a side of {name} {tuple(W.shape)}; lower it")
        true = torch.linalg.svdvals(W.double())
        yield from (case(W, rank, name, true) for rank in args.ranks)


def size(text: str) -> tuple[int, int]:
    """ROWSxCOLS."""
    rows, cols = text.split("x")
    return int(rows), int(cols)


def main(argv: list[str] | None = None) -> None:
    parser = timing.Parser(__doc__)
    parser.add_argument("--rates", action="store_true")
    parser.add_argument("--model", nargs="?", const="", help="a folder; without a name SmolLM2-135M's")
    parser.add_argument("--layers", type=int, help="only the first ones of the model")
    parser.add_argument("--sizes", type=size, nargs="+", default=SIZES, metavar="ROWSxCOLS")
    parser.add_argument("--largest", type=int, default=4096, help="smaller side of the largest matrix")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--spectra", choices=SPECTRA, nargs="+", default=list(SPECTRA))
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    if args.rates:
        return print(rates(device))
    if args.model is not None:
        args.model = args.model or timing.demo_model()
    table = [gpu_rows.record(row) for row in (imitations if args.model is None else weights)(args, device)]
    spent = [sum(row[column] for row in table) for column in ("full fp32 s", "auto s")]
    errors = max(row["auto σ error"] for row in table)
    headline = (
        f"full fp32 SVD / ours {spent[0] / spent[1]:.2f} over {len(table)} cases, largest error of σ {errors:.1e}"
    )
    name = "svd_methods" if args.model is None else "svd_weights"
    timing.write(name, args, table, COLUMNS, NOTE, identity=("rows", "cols", "rank", "spectrum"), headline=headline)
    return None


NOTE = (
    "Seconds for the leading triplets of one matrix, tolerance 1e-4. On a CPU: "
    "processor time of one thread. lowrank is torch.svd_lowrank(q = rank, niter = 4), the control that fails."
)

if __name__ == "__main__":
    raise SystemExit(timing.run(main))
