"""W → its top singular triplets → the factors of each slice. Pure: one matrix in, tensors out.

Two methods. `gram` takes the eigenvectors of the smaller Gram matrix in float64: for
leading triplets squaring the condition number is harmless (σ to 1e-13 measured on trained
weights) and it is faster than a full SVD. `full` is LAPACK's SVD. `auto` is `gram`, checked
by its residual, with `full` in float64 where the check fails (rank-deficient weights).
The randomized `svd_lowrank(q = rank)` that PEFT offers is not among them: at the ranks used
here its subspace stands at right angles to the true one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Triplets:
    """The top k singular triplets of W (O × I), largest first.

    Attributes:
        U: O × k.  sigma: k.  Vt: k × I.  All float64.
        residual: largest of ‖W v − σ u‖ / σ and ‖Wᵀ u − σ v‖ / σ over the triplets, and of the
            entries of UᵀU − 1 and VᵀV − 1.
    """

    U: Tensor
    sigma: Tensor
    Vt: Tensor
    residual: float


def top_triplets(W_OI: Tensor, k: int, *, method: str = "auto", tol: float = 1e-4) -> Triplets:
    """The top `k` singular triplets of W.

    Args:
        W_OI: any float dtype, any device; the work is done in float64 there.
        k: at most min(O, I).
        method: "auto", "gram" or "full".
        tol: largest residual accepted of "gram"; what LAPACK reaches for "full" is reported, not judged.

    Raises:
        ValueError: W has non-finite entries, or "gram" misses `tol`.
    """
    W = W_OI.double()
    if not torch.isfinite(W).all():
        raise ValueError("the weight has non-finite entries")
    if method in ("auto", "gram"):
        found = _by_gram(W, k)
        if found is not None and found.residual <= tol:
            return found
        if method == "gram":
            reached = "did not converge" if found is None else f"reached a residual of {found.residual:.1e}"
            raise ValueError(f"init.method 'gram' {reached}, tol is {tol:.1e}")
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    return _checked(W, U[:, :k], sigma[:k], Vt[:k])


def _by_gram(W: Tensor, k: int) -> Triplets | None:
    """Eigenvectors of the smaller of W Wᵀ and Wᵀ W; the other side follows by one product. None: no convergence."""
    wide = W.shape[0] <= W.shape[1]
    M = W if wide else W.t()
    try:
        vectors = torch.linalg.eigh(M @ M.t()).eigenvectors[:, -k:].flip(1)
    except torch.linalg.LinAlgError:
        return None
    other = M.t() @ vectors
    sigma = torch.linalg.vector_norm(other, dim=0)
    other = other / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)
    U, V = (vectors, other) if wide else (other, vectors)
    return _checked(W, U, sigma, V.t())


def _checked(W: Tensor, U: Tensor, sigma: Tensor, Vt: Tensor) -> Triplets:
    """Adds the largest residual, or the loss of orthonormality where that is larger."""
    # A zero singular value leaves its vectors free, and √σ removes them from the factors: not looked at.
    floor = sigma[0].clamp_min(torch.finfo(sigma.dtype).tiny) * 1e-12
    kept = sigma > floor
    U_kept, V_kept, sigma_kept = U[:, kept], Vt[kept].t(), sigma[kept]
    if not len(sigma_kept):
        return Triplets(U, sigma, Vt, 0.0)
    right = torch.linalg.vector_norm(W @ V_kept - U_kept * sigma_kept, dim=0) / sigma_kept
    left = torch.linalg.vector_norm(W.t() @ U_kept - V_kept * sigma_kept, dim=0) / sigma_kept
    eye = torch.eye(len(sigma_kept), dtype=W.dtype, device=W.device)
    skew = [(Q.t() @ Q - eye).abs().max() for Q in (U_kept, V_kept)]
    return Triplets(U, sigma, Vt, torch.stack([right.max(), left.max(), *skew]).max().item())


def slice_factors(triplets: Triplets, r: int) -> tuple[Tensor, Tensor]:
    """Cuts the triplets into slices of rank r: A_i = diag(√σ_i) V_iᵀ, B_i = U_i diag(√σ_i).

    Returns: A (S × R × I) and B (S × O × R), fp32, contiguous; slice i holds triplets i·r … (i+1)·r − 1.
    """
    root = triplets.sigma.sqrt()
    A = (root[:, None] * triplets.Vt).unflatten(0, (-1, r))
    B = (triplets.U * root).unflatten(1, (-1, r)).movedim(1, 0)
    return A.float().contiguous(), B.float().contiguous()
