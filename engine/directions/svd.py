"""W → its top singular triplets → the factors of each slice. Pure: one matrix in, tensors out.

`gram` takes the eigenvectors of the smaller Gram matrix, right in float64 (eigen.py): for leading triplets squaring
the condition number is harmless (σ to 1e-13 measured on trained weights) and it is faster than a full SVD.
`randomized` is the block Krylov method of krylov.py, for matrices whose Gram matrix is too large for a dense
eigensolver. `full` is LAPACK's SVD in float64. `auto` is gram, or randomized where that is much cheaper by `seconds`;
where a method misses the tolerance the next one in the order randomized, gram, full takes over. The randomized
`svd_lowrank(q = rank)` that PEFT offers is not among them: at the ranks used here its subspace stands at right angles
to the true one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..precision import full_fp32
from . import eigen, krylov

WORTH = 2  # gram is exact, and `seconds` of randomized is too low where it is small: it must be this much cheaper
ROUNDS = 4  # of the randomized method: a check that failed, then better triplets


@dataclass(frozen=True)
class Triplets:
    """The top k singular triplets of W (O × I), largest first.

    Attributes:
        U: O × k.  sigma: k.  Vt: k × I.  All float64.
        residual: largest of ‖W v − σ u‖ / σ and ‖Wᵀ u − σ v‖ / σ over the triplets, and of the
            entries of UᵀU − 1 and VᵀV − 1.
        method: the one that found them.
        bound: no singular value above this many σ_k is missing among them. 1 for gram and full, which see all;
            of randomized it is true with a probability of 1 − 1e-9.
    """

    U: Tensor
    sigma: Tensor
    Vt: Tensor
    residual: float
    method: str
    bound: float = 1.0


def top_triplets(W_OI: Tensor, k: int, *, method: str = "auto", tol: float = 1e-4, seed: int = 0) -> Triplets:
    """The top `k` singular triplets of W.

    Args:
        W_OI: any float dtype, any device; the work is done there.
        k: at most min(O, I).
        method: "auto", "gram", "randomized" or "full".
        tol: largest residual accepted of "gram" and "randomized"; what LAPACK reaches for "full" is reported, not
            judged.
        seed: of the randomized method's start. Nothing else is random, and the global generators are left alone.

    Raises:
        ValueError: W has non-finite entries, or the method asked for misses `tol`.
    """
    if not all(torch.isfinite(end) for end in W_OI.aminmax()):  # a NaN is both; five times as fast as isfinite(W)
        raise ValueError("the weight has non-finite entries")
    W = W_OI if W_OI.dtype in (torch.float32, torch.float64) else W_OI.float()
    for name in plan(W, k) if method == "auto" else [method]:
        with full_fp32():
            found = _by(name, W, k, tol=tol, seed=seed, thorough=name == method)
        if found is not None and (found.residual <= tol or name == "full"):
            return found
    reached = "did not converge" if found is None else f"reached a residual of {found.residual:.1e}"
    raise ValueError(f"init.method '{method}' {reached}, tol is {tol:.1e}")


def _by(name: str, W: Tensor, k: int, *, tol: float, seed: int, thorough: bool) -> Triplets | None:
    """The triplets by one method, whatever their residual; None: it did not converge."""
    if name == "full":
        return _by_lapack(W, k)
    try:
        if name == "gram":
            return _by_gram(W, k)
        return _by_krylov(W, k, tol=tol, seed=seed, limit=min(W.shape) if thorough else min(W.shape) // 2)
    except torch.linalg.LinAlgError:
        return None


# --- Methods -------------------------------------------------------------------------------------------------


def _by_lapack(W: Tensor, k: int) -> Triplets:
    U, sigma, Vt = torch.linalg.svd(W.double(), full_matrices=False)
    return _checked(W, U[:, :k], sigma[:k], Vt[:k])


def _by_gram(W: Tensor, k: int) -> Triplets:
    """Eigenvectors of the smaller of W Wᵀ and Wᵀ W; the other side follows by one product."""
    if W.numel() <= krylov.CHUNK:
        W = W.double()  # once; of larger ones no full copy is made
    M = _wide(W)
    X = eigen.leading(krylov.gram(M), k)
    Y = krylov.times(X, M)
    sigma = torch.linalg.vector_norm(Y, dim=1)
    return _sided(W, X, sigma, Y / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)[:, None], "gram")


def _by_krylov(W: Tensor, k: int, *, tol: float, seed: int, limit: int) -> Triplets | None:
    """The randomized method until nothing is missing and all residuals hold. None: larger values kept turning up."""
    search = krylov.Search(_wide(W), k, tol=tol, seed=seed, limit=limit)
    for _ in range(ROUNDS):
        found = _sided(W, *search.triplets(), "randomized")
        if found.residual > tol:
            search.polish()
        elif not search.overlooked():
            return replace(found, bound=search.bound)
    return found if found.residual > tol else None


def _wide(W: Tensor) -> Tensor:
    return W if W.shape[0] <= W.shape[1] else W.t()


def _sided(W: Tensor, X: Tensor, sigma: Tensor, Y: Tensor, method: str) -> Triplets:
    """Triplets of W from those of M = `_wide(W)`, given as rows, where σ Y is X M as it was computed."""
    if W.shape[0] <= W.shape[1]:
        return _checked(W, X.t(), sigma, Y, method, left=False)
    return _checked(W, Y.t(), sigma, X, method, right=False)


def _checked(
    W: Tensor, U: Tensor, sigma: Tensor, Vt: Tensor, method: str = "full", *, left: bool = True, right: bool = True
) -> Triplets:
    """Adds the largest residual of the sides asked for, or the loss of orthonormality where that is larger."""
    # A zero singular value leaves its vectors free, and √σ removes them from the factors: not looked at.
    floor = sigma[0].clamp_min(torch.finfo(sigma.dtype).tiny) * 1e-12
    kept = sigma > floor
    U_rows, V_rows, sigma_kept = U.t(), Vt, sigma[:, None]
    if not kept.all():
        U_rows, V_rows, sigma_kept = U_rows[kept], V_rows[kept], sigma_kept[kept]
    if not len(sigma_kept):
        return Triplets(U, sigma, Vt, 0.0, method)
    eye = torch.eye(len(sigma_kept), dtype=sigma.dtype, device=W.device)
    errors = [(rows @ rows.t() - eye).abs().max() for rows in (U_rows, V_rows)]
    if right:
        errors.append(torch.linalg.vector_norm(krylov.times_t(V_rows, W) / sigma_kept - U_rows, dim=1).max())
    if left:
        errors.append(torch.linalg.vector_norm(krylov.times(U_rows, W) / sigma_kept - V_rows, dim=1).max())
    return Triplets(U, sigma, Vt, torch.stack(errors).max().item(), method)


# --- Choice --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """What a device does per second; only their ratios matter to the choice.

    Attributes:
        gemm32, gemm64: FLOP in products, float32 with thin factors, float64 with square ones.
        eigh32, eigh64: n³ of an n × n eigendecomposition with vectors; `row` is its time per row in addition
            (its steps wait for each other).
    """

    gemm32: float
    gemm64: float
    eigh32: float
    eigh64: float
    row: float


# Measured by `benchmarks/startup/svd_methods.py --rates` on one core of an EPYC (AVX2, MKL).
CPU = Rates(gemm32=45e9, gemm64=33e9, eigh32=5.5e9, eigh64=3.1e9, row=0.0)
# Assumed, not measured: 40 TFLOP/s in float32 and float64 products (H100 without tensor cores' TF32, A100 half of
# that), 1 TFLOP/s effective in the 9 n³ FLOP of a dense eigendecomposition, 30 µs per Householder step.
GPU = Rates(gemm32=40e12, gemm64=40e12, eigh32=2e11, eigh64=1.1e11, row=30e-6)


def seconds(method: str, rows: int, cols: int, k: int, rates: Rates) -> float:
    """What gram or randomized is expected to take."""
    s, long = sorted((rows, cols))
    check = 6 * s * long * k / rates.gemm64
    if method == "gram":
        products = 2 * s * s * long * (krylov.GRAM_BLOCKS + 1) / (2 * krylov.GRAM_BLOCKS)
        refined = eigen.kept(s, k)  # 12 s² of them: three products with G or the rest, three of half the size
        turn = s**3 / rates.eigh32 + 12 * s * s * refined / rates.gemm64 if refined else s**3 / rates.eigh64
        return products / rates.gemm64 + turn + s * rates.row + check
    m = krylov.basis_size(s, k)
    if m > s // 2:
        return math.inf  # most of the space is needed: no saving, and the basis would rather not fit
    products = 4 * s * long * (m + krylov.PROBES * krylov.PROBE_STEPS) + 6 * s * m * m
    return products / rates.gemm32 + 2 * (m**3 / rates.eigh32 + m * rates.row) + check * 5 / 3


def plan(W: Tensor, k: int) -> list[str]:
    """The methods in the order in which `auto` tries them."""
    rates = CPU if W.device.type == "cpu" else GPU
    gram, randomized = (seconds(method, W.shape[0], W.shape[1], k, rates) for method in ("gram", "randomized"))
    return ["randomized", "gram", "full"] if WORTH * randomized < gram else ["gram", "full"]


# --- Slices --------------------------------------------------------------------------------------------------


def slice_factors(triplets: Triplets, r: int) -> tuple[Tensor, Tensor]:
    """Cuts the triplets into slices of rank r: A_i = diag(√σ_i) V_iᵀ, B_i = U_i diag(√σ_i).

    Returns: A (S × R × I) and B (S × O × R), fp32, contiguous; slice i holds triplets i·r … (i+1)·r − 1.
    """
    root = triplets.sigma.sqrt()
    A = (root[:, None] * triplets.Vt).unflatten(0, (-1, r))
    B = (triplets.U * root).unflatten(1, (-1, r)).movedim(1, 0)
    return A.float().contiguous(), B.float().contiguous()
