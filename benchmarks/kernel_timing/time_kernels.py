"""How far is every kernel from its floor, the bandwidth of a copy, and how far ahead of torch?

    python benchmarks/kernel_timing/time_kernels.py [KERNEL ...]

The Linears of two Llamas; the thin products and the fused product at 8,192 tokens in bf16. A share of the copy
bandwidth counts each operand once, as the operation has to move it at least. For `fused_linear`
the question is what the thin product costs on top of cuBLAS's big one, launched separately or fused. This is phase
`kernels` of `make gpu`, too: a row is written as soon as it is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hdpissa.benchmarks.common import timing
from hdpissa.benchmarks.gpu import gpu_rows
from hdpissa.engine.errors import ConfigError
from hdpissa.kernels import api, reference

R = 16  # of the update's kernels
FP32, BF16 = torch.float32, torch.bfloat16
Works = dict[str, Callable[[], Any]]


class Shape(NamedTuple):
    """A Linear's weight: rows = out_features, cols = in_features."""

    name: str
    rows: int
    cols: int


# Every size that a Linear of these two has, under the name of the first one.
SHAPES = (
    Shape("llama-2-7b q", 4096, 4096), Shape("llama-2-7b gate", 11008, 4096), Shape("llama-2-7b down", 4096, 11008),
    Shape("llama-3-70b q", 8192, 8192), Shape("llama-3-70b k", 1024, 8192), Shape("llama-3-70b gate", 28672, 8192),
    Shape("llama-3-70b down", 8192, 28672),
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        layers: Linears of the products. weights: those of the update.
        ranks: of a slice, for the products. slices: whose deltas are applied at once.
        shard: weights of a shard that a dense delta is subtracted from. factors: elements of Adam's buffers.
        draw: makes the operands; `torch.zeros` where only the launches matter.
    """

    layers: tuple[Shape, ...] = SHAPES
    weights: tuple[Shape, ...] = SHAPES
    tokens: int = 8192
    ranks: tuple[int, ...] = (16, 64)
    slices: tuple[int, ...] = (1, 2, 4, 8, 16)
    shard: int = 2**28
    # own slices' factors of Llama-2-7B at r = 16 (40 M), and of 8 such slices
    factors: tuple[int, ...] = (40_000_000, 320_000_000)
    draw: Callable[..., Tensor] = torch.randn

    def random(self, *size: int, dtype: torch.dtype = FP32) -> Tensor:
        return self.draw(*size, device=timing.need_gpu(), dtype=dtype)


TINY = Sizes((Shape("tiny gate", 64, 48),), (Shape("tiny gate", 64, 48),), 32, (16,), (1,), 300, (300,))


@dataclass(frozen=True)
class Case:
    """A row to measure.

    Attributes:
        works: column → a launch.
        nbytes: what the operation has to read and write at least.
        derive: more columns, from the times.
    """

    identity: dict[str, Any]
    works: Works
    nbytes: int = 0
    derive: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None


def both(call: Callable[..., Any]) -> Works:
    """A kernel and torch's version of it."""
    return {f"{impl} ms": partial(call, impl=impl) for impl in ("triton", "torch")}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- the products of forward and backward -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """Operands of one Linear: bf16 x (T × I), dy (T × O), W (O × I), p (T × R), fp32 A (R × I), B (O × R)."""

    identity: dict[str, Any]
    x: Tensor
    dy: Tensor
    W: Tensor
    p: Tensor
    A: Tensor
    B: Tensor


def layers(sizes: Sizes) -> Iterator[Layer]:
    """Every Linear for every rank."""
    for shape in sizes.layers:
        O, I, T = shape.rows, shape.cols, sizes.tokens
        x, dy, W = (sizes.random(*size, dtype=BF16) for size in ((T, I), (T, O), (O, I)))
        for r in sizes.ranks:
            identity = {"case": f"{shape.name} {O}x{I}", "r": r}
            yield Layer(identity, x, dy, W, sizes.random(T, r, dtype=BF16), sizes.random(r, I), sizes.random(O, r))


def low_rank_forward(sizes: Sizes) -> Iterator[Case]:
    """p = x Aᵀ; at least one reading of x."""
    for at in layers(sizes):
        yield Case(at.identity, both(partial(api.low_rank_forward, at.x, at.A)), at.x.nbytes + at.A.nbytes)


def low_rank_grad_B(sizes: Sizes) -> Iterator[Case]:
    """q = dy B and grad B += dyᵀ p; at least one reading of dy, grad B read and written."""
    for at in layers(sizes):
        call = partial(api.low_rank_grad_B_, torch.zeros_like(at.B), at.dy, at.p, at.B)
        yield Case(at.identity, both(call), at.dy.nbytes + 3 * at.B.nbytes)


def low_rank_grad_A(sizes: Sizes) -> Iterator[Case]:
    """grad A += qᵀ x; at least one reading of x, grad A read and written."""
    for at in layers(sizes):
        call = partial(api.low_rank_grad_A_, [torch.zeros_like(at.A)], [at.p], at.x)
        yield Case(at.identity, both(call), at.x.nbytes + 2 * at.A.nbytes)


def fused_linear(sizes: Sizes) -> Iterator[Case]:
    """The frozen product alone, followed by the thin kernel, and with the thin product fused into it."""

    def derive(times: Mapping[str, Any]) -> dict[str, Any]:
        faster = min(("separate", "fused"), key=lambda name: times[f"{name} ms"])
        return {"faster": faster, "overhead %": 100 * (times[f"{faster} ms"] / times["linear ms"] - 1)}

    def case(at: Layer, direction: str, wide: Tensor, W: Tensor, thin: Tensor) -> Case:
        works: Works = {
            "linear ms": lambda: nn.functional.linear(wide, W),
            "separate ms": lambda: (nn.functional.linear(wide, W), api.low_rank_forward(wide, thin, impl="triton")),
            "fused ms": lambda: api.fused_linear(wide, W, thin, impl="triton"),
        }
        return Case(at.identity | {"direction": direction}, works, derive=derive)

    for at in layers(sizes):
        yield case(at, "forward", at.x, at.W, at.A)
        yield case(at, "backward", at.dy, at.W.t(), at.B.t())


# --- the update -------------------------------------------------------------------------------------------------------


def update_factors(sizes: Sizes, shape: Shape, Q: int, wire: torch.dtype = FP32) -> list[Tensor]:
    """ΔA, ΔB, A, B of the magnitudes that they have in a run."""
    O, I = shape.rows, shape.cols
    made = (((Q, I), 2e-5, wire), ((O, Q), 2e-5, wire), ((Q, I), 0.1, FP32), ((O, Q), 0.1, FP32))
    return [(sizes.random(*size) * scale).to(dtype) for size, scale, dtype in made]


def delta_error(factors: list[Tensor], precision: str) -> float:
    """Relative error of the D that is subtracted, against float64, on the first 64 rows."""
    dA, dB, A, B = factors[0], factors[1][:64], factors[2], factors[3][:64]
    w, bad = A.new_zeros(len(B) * A.shape[1]), torch.zeros(1, dtype=torch.int32, device=A.device)
    where: dict[str, Any] = {"start": 0, "second_order": True}
    api.delta_apply_((w,), dA, dB, A, B, bad, scale=1.0, precision=precision, impl="triton", **where)
    doubles = [t.double() for t in (dA, dB, A, B)]
    truth = reference.dense_delta(*doubles, numel=w.numel(), dtype=torch.float64, **where)
    return ((w.double() + truth).norm() / truth.norm()).item()


def delta_apply(sizes: Sizes) -> Iterator[Case]:
    """W ← W − D on a split shard that is the whole weight, splitting the factors included: 8 bytes per weight."""
    cases = [(s, FP32, "fp32") for s in sizes.slices] + [(8, BF16, "fp32"), (8, FP32, "tf32")]
    for shape in sizes.weights:
        for slices, wire, precision in cases:
            factors = dA, dB, A, B = update_factors(sizes, shape, slices * R, wire)
            parts = reference.split_fp32(sizes.random(shape.rows * shape.cols))
            bad = torch.zeros(1, dtype=torch.int32, device=parts[0].device)
            call = partial(api.delta_apply_, parts, dA, dB, A, B, bad, start=0, scale=1.0, second_order=True)
            works = both(call) | {"triton ms": partial(call, impl="triton", precision=precision)}
            identity = {"case": shape.name, "slices": slices, "wire": name_of(wire), "precision": precision}
            error = partial(delta_error, factors, precision)
            yield Case(identity, works, 8 * parts[0].numel(), lambda _, error=error: {"relative error of D": error()})  # type: ignore[misc]


def dense_delta(sizes: Sizes) -> Iterator[Case]:
    """D of a rank's own slices, which the dense exchange sends in place of factors; at least one writing of it."""
    for shape in sizes.weights:
        for slices in (1, 4):
            for dtype in (BF16, FP32):
                factors, numel = update_factors(sizes, shape, slices * R), shape.rows * shape.cols
                call = partial(api.dense_delta, *factors, start=0, numel=numel, second_order=True, dtype=dtype)
                identity = {"case": shape.name, "slices": slices, "result": name_of(dtype)}
                yield Case(identity, both(call), numel * dtype.itemsize)


def shard_subtract(sizes: Sizes) -> Iterator[Case]:
    """W ← W − D of a dense D, each tensor once; the bf16 half of a master is only written."""
    exact = sizes.random(sizes.shard)
    high, low = reference.split_fp32(exact)
    for form, parts in {"split": (high, low), "master and half": (exact, high), "fp32": (exact,)}.items():
        for dtype in (BF16, FP32):
            D, bad = sizes.random(sizes.shard, dtype=dtype), torch.zeros(1, dtype=torch.int32, device=exact.device)
            call = partial(api.shard_subtract_, parts, D, bad, scale=1.0)
            moved = D.nbytes + 2 * sum(p.nbytes for p in parts) - (high.nbytes if form == "master and half" else 0)
            yield Case({"case": form, "delta": name_of(dtype)}, both(call), moved)


def slice_adam(sizes: Sizes) -> Iterator[Case]:
    """Adam over flat buffers: reads the gradient and both moments, writes both moments and Δ."""
    hyper: dict[str, Any] = {"step": 7, "lr": 2e-5, "betas": (0.9, 0.999), "eps": 1e-8}
    for numel in sizes.factors:
        for wire in (FP32, BF16):
            m, v, grad = (sizes.random(numel).abs_() for _ in range(3))
            call = partial(api.slice_adam_, m, v, grad, dtype=wire, **hyper)
            yield Case({"case": f"{numel} elements", "wire": name_of(wire)}, both(call), numel * (20 + wire.itemsize))


# What a training step spends most time in comes first.
KERNELS: dict[str, Callable[[Sizes], Iterator[Case]]] = {
    kernel.__name__: kernel
    for kernel in (low_rank_forward, low_rank_grad_B, low_rank_grad_A, delta_apply, slice_adam, shard_subtract,
                   dense_delta, fused_linear)
}  # fmt: skip
IDENTITY = ("kernel", "case", "r", "direction", "slices", "wire", "precision", "result", "delta")
COLUMNS = (*IDENTITY, "triton ms", "torch ms", "torch / triton", "% of copy bandwidth", "relative error of D",
           "linear ms", "separate ms", "fused ms", "overhead %", "failed")  # fmt: skip


def measured(kernel: str, case: Case, bandwidth: float) -> dict[str, Any]:
    times = timing.medians(case.works)
    row = {"kernel": kernel, **case.identity, **times, **(case.derive(times) if case.derive else {})}
    if case.nbytes:
        row["torch / triton"] = times["torch ms"] / times["triton ms"]
        row["% of copy bandwidth"] = 100 * case.nbytes / (times["triton ms"] * 1e-3) / bandwidth
    return row


def rows(sizes: Sizes, kernels: tuple[str, ...] = tuple(KERNELS)) -> Iterator[dict[str, Any]]:
    """One by one, as they are measured; a kernel that fails has a row with the reason, and the others still come."""
    bandwidth = timing.copy_bandwidth()
    for kernel in kernels:
        try:
            yield from (measured(kernel, case, bandwidth) for case in KERNELS[kernel](sizes))
        except Exception as error:
            yield gpu_rows.failure({"kernel": kernel}, error)


def main(argv: list[str] | None = None) -> int:
    parser = timing.Parser(__doc__)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"of {', '.join(KERNELS)}")
    args = parser.parse_args(argv)
    for kernel in args.kernels:
        if kernel not in KERNELS:
            raise ConfigError(f"no kernel {kernel}; give some of {', '.join(KERNELS)}")
    timing.need_gpu()
    torch.manual_seed(0)
    sizes = TINY if gpu_rows.is_dry() else Sizes()
    kernels = tuple(args.kernels) or tuple(KERNELS)
    found = [gpu_rows.record({"table": row["kernel"], **row}) for row in rows(sizes, kernels)]
    note = f"Copy bandwidth {timing.copy_bandwidth() / 1e12:.2f} TB/s. Limit of delta_apply: 80 % up to 8 slices."
    size = {name: value for name, value in asdict(replace(sizes, layers=(), weights=())).items() if name != "draw"}
    timing.write("time_kernels", args, found, COLUMNS, note, identity=IDENTITY, **timing.ONE_RUN, **size)
    return 1 if any("failed" in row for row in found) else 0


if __name__ == "__main__":
    raise SystemExit(timing.run(main))
