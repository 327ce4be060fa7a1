"""What does the decomposition of a real pretrained model take, and how right is it?

    python benchmarks/startup/init.py [--layers N] [--model_name_or_path FOLDER]

The top S·r = 128 triplets of every target matrix, as `init.method: auto` finds them, beside a full float32 SVD of the
same matrix, which is what the published code takes on every process. The two take turns, matrix by matrix, each the
better of two runs: processor time of one thread, which other work on the machine disturbs least. Errors are against
LAPACK's float64 SVD:

    σ error        largest relative error of a singular value
    slice angle    largest principal angle (rad) between a slice's r vectors and the true ones, on either side. Where
                   two values at a slice's edge are nearly equal, it is the matrix that leaves the slice open: the gap
                   column has the smallest relative distance at such an edge
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hdpissa.benchmarks.common import timing
from hdpissa.engine.config.section import DEFAULT_TARGETS
from hdpissa.engine.directions import svd
from hdpissa.engine.errors import ConfigError
from hdpissa.engine.precision import full_fp32
from hdpissa.engine.sharding import base_files

COLUMNS = ("shape", "matrices", "method", "full fp32 s", "ours s", "full / ours", "σ error", "slice angle", "residual")


def timed(fn: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result): of the processor with one thread, by the clock with several."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    result = fn()
    return clock() - start, result


def matrices(folder: Path, layers: int | None) -> list[tuple[str, Path]]:
    """(name, file) of every target weight of the checkpoint, of the first layers only where `layers` says so."""
    found = []
    for name, file in sorted(base_files.checkpoint_files(str(folder)).items()):
        parts = name.split(".")
        if parts[-1] != "weight" or len(parts) < 2 or parts[-2] not in DEFAULT_TARGETS:
            continue
        number = next((int(part) for part in parts if part.isdigit()), 0)
        if layers is None or number < layers:
            found.append((name, Path(file)))
    return found


def angle(found: Tensor, true: Tensor, r: int) -> float:
    """Largest principal angle in rad between the slices of two sets of orthonormal rows (S·r × n)."""
    largest = 0.0
    for ours, theirs in zip(found.split(r), true.split(r), strict=True):
        outside = ours - (ours @ theirs.t()) @ theirs
        largest = max(largest, torch.linalg.matrix_norm(outside, 2).clamp(max=1).asin().item())
    return largest


def case(name: str, W: Tensor, r: int, slices: int) -> dict[str, Any]:
    """One matrix: both times, and the errors of ours."""
    k = r * slices
    full_s, ours_s = [], []
    for _ in range(2):
        with full_fp32():
            full_s.append(timed(lambda: torch.linalg.svd(W, full_matrices=False))[0])
        took, found = timed(lambda: svd.top_triplets(W, k))
        ours_s.append(took)
    U, sigma, Vt = torch.linalg.svd(W.double(), full_matrices=False)
    edges = torch.arange(r, k + 1, r).clamp(max=len(sigma) - 1)
    return {
        "matrix": name,
        "shape": "{} × {}".format(*W.shape),
        "method": found.method,
        "full fp32 s": min(full_s),
        "ours s": min(ours_s),
        "samples": {"full fp32 s": full_s, "ours s": ours_s},
        "residual": found.residual,
        "σ error": ((found.sigma - sigma[:k]) / sigma[:k]).abs().max().item(),
        "slice angle": max(angle(found.U.t(), U[:, :k].t(), r), angle(found.Vt, Vt[:k], r)),
        "gap": ((sigma[edges - 1] - sigma[edges]) / sigma[edges - 1]).min().item(),
    }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per shape and one of all: times added up, the largest of the errors."""
    shapes = dict.fromkeys(row["shape"] for row in rows)
    groups = {shape: [row for row in rows if row["shape"] == shape] for shape in shapes} | {"all": rows}
    table = []
    for shape, members in groups.items():
        times = {key: sum(row[key] for row in members) for key in ("full fp32 s", "ours s")}
        errors = {key: max(row[key] for row in members) for key in ("residual", "σ error", "slice angle")}
        methods = "/".join(dict.fromkeys(row["method"] for row in members))
        ratio = {"full / ours": times["full fp32 s"] / times["ours s"], "gap": min(row["gap"] for row in members)}
        table.append({"shape": shape, "matrices": len(members), "method": methods, **times, **ratio, **errors})
    return table


def main(argv: list[str] | None = None) -> None:
    parser = timing.Parser(__doc__)
    parser.add_argument("--model_name_or_path", help="a folder; default: the demo's SmolLM2-135M")
    parser.add_argument("--threads", type=int, default=1, help="more than one: seconds of the clock")
    parser.add_argument("--layers", type=int, help="only the first ones")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--slices", type=int, default=8)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    folder = args.model_name_or_path = args.model_name_or_path or timing.demo_model()
    wanted = matrices(Path(folder), args.layers)
    if not wanted:
        raise ConfigError(
            f"--model_name_or_path {folder}: no {'/'.join(DEFAULT_TARGETS)} weights there; give a folder with a "
            f"Llama's safetensors files"
        )
    rows = []
    for weight, file in wanted:
        with safe_open(file, framework="pt") as weights:
            W = weights.get_tensor(weight).float()
        if args.r * args.slices > min(W.shape):
            raise ConfigError(
                f"--slices {args.slices} × --r {args.r} exceeds the smaller side of {weight} {tuple(W.shape)}; lower "
                f"one of them"
            )
        rows.append(case(weight, W, args.r, args.slices))
    how = "processor seconds of one thread" if args.threads == 1 else f"seconds by the clock, {args.threads} threads"
    note = f"The top triplets of {len(rows)} target matrices: {how}, each matrix the better of two, added up."
    table = summary(rows)
    every = table[-1]
    headline = f"full fp32 SVD / ours {every['full / ours']:.2f}, largest error of σ {every['σ error']:.1e}"
    timing.write("init", args, [*table, *rows], COLUMNS, note, identity=("shape", "matrix"), headline=headline)


if __name__ == "__main__":
    raise SystemExit(timing.run(main))
