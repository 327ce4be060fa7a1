"""The leading eigenvectors of a symmetric float64 matrix, at less than the price of a float64 eigendecomposition.

A float32 eigendecomposition costs about half of a float64 one. Its vectors are wrong by float32 rounding over the
distance of the eigenvalues: neighbours are mixed, distant ones hardly. So a few more than wanted are taken, one
first-order step in float64 removes what the others left in them (Ogita and Aishima, "Iterative refinement for symmetric
eigenvalue decomposition", 2018, from which this is the block off the diagonal), and Rayleigh-Ritz in float64 sorts them
out among themselves. What it reached is measured; where that is not enough, float64 decides.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 384  # below, a float64 eigendecomposition is as fast
ENOUGH = 1e-9  # ‖G x − λ x‖ / λ of every vector; slices are kept in float32
MORE = 16  # vectors than wanted: they take the edge, where neighbours are mixed
PASSES = 2
EDGE = 32 * torch.finfo(torch.float32).eps  # of ‖G‖: how far a float32 eigenvalue may be off
SLANTED = 1e-3  # an entry of X Xᵀ - 1 beyond it; float32 leaves 1e-6
MIXED = 0.1  # a first-order step beyond this is none: the two values are too close together


def leading(G_ss: Tensor, k: int) -> Tensor:
    """The eigenvectors of the k largest eigenvalues as orthonormal rows (k × s), largest first.

    Args:
        G_ss: symmetric positive semidefinite, float64.

    Raises:
        torch.linalg.LinAlgError: the float64 eigendecomposition did not converge.
    """
    m = kept(len(G_ss), k)
    if m:
        found = _refined(G_ss, k, m)
        if found is not None:
            return found
    return torch.linalg.eigh(G_ss).eigenvectors[:, -k:].flip(1).t()


def kept(s: int, k: int) -> int:
    """How many float32 vectors of an s × s matrix are made right for k of them; 0: float64 is taken at once."""
    m = k + MORE
    return m if s >= SMALLEST and m <= s // 2 else 0


def _refined(G: Tensor, k: int, m: int) -> Tensor | None:
    """Float32 vectors made right in float64; None: not right enough."""
    size = torch.linalg.vector_norm(G)
    if not 0 < size < torch.inf:
        return None
    G = G / size  # float32 has less room for exponents
    try:
        values, vectors = (x.double() for x in torch.linalg.eigh(G.float()))
    except torch.linalg.LinAlgError:
        return None
    theta, X, rest = values[-m:], vectors[:, -m:].t(), vectors[:, :-m]
    image = X @ G
    eye = torch.eye(m, dtype=X.dtype, device=X.device)
    for _ in range(PASSES):
        step = (image - theta[:, None] * X) @ rest / (theta[:, None] - values[:-m])
        X = X + torch.where(step.abs() < MIXED, step, 0.0) @ rest.t()
        off = eye - X @ X.t()  # float32's rounding: (1 - off)^(-1/2) to the third order makes X orthonormal
        if off.abs().max() > SLANTED:
            return None
        X = X + (0.5 * off + 0.375 * off @ off) @ X
        image = X @ G
        theta, V = torch.linalg.eigh(X @ image.t())
        X, image = V.t() @ X, V.t() @ image
        # Small residuals mean eigenvectors, but not the largest ones: what is left out must not reach the k-th. Where
        # values are tied there, float32's order is its rounding's.
        if theta[-k] <= values[-m - 1] + EDGE:
            return None
        residuals = torch.linalg.vector_norm(image - theta[:, None] * X, dim=1)
        if (residuals <= ENOUGH * theta)[-k:].all():
            return X[-k:].flip(0)
    return None
