"""The leading singular triplets of one matrix by a randomized block Krylov method. Pure; M is s × l with s ≤ l.

Spectra of trained weights are flat: σ₁₂₈ and σ₁₂₉ differ by 1e-3 or less. Power iteration with a few columns more
than wanted (`svd_lowrank`) gains next to nothing per step there. A Krylov space keeps what every step found: from
one random block it grows by the newest block's image under M Mᵀ until Rayleigh-Ritz in the whole space has
converged. At 4096 × 4096 and 128 triplets that takes about 1,200 vectors in place of 5,000 and more.

Three things make it safe to rely on:

* The vectors of the basis are kept orthonormal against all others, twice each ("twice is enough").
* The basis is built in float32, the triplets in float64 from it; where rounding left them above the tolerance,
  the space grows on in float64 from the residual (`polish`).
* Small residuals say that the triplets are right, not that they are the largest: b starting vectors find at most
  b copies of a repeated value. So fresh random vectors, orthogonal to what was found, look for more (`overlooked`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 1 << 22  # entries of M converted at a time where it is not of the working dtype: 32 MiB of float64
GRAM_BLOCKS = 4  # of M Mᵀ's columns, each computed from the diagonal down: 5/8 of the products
BLOCK = (16, 32)  # vectors a step adds: half of the triplets wanted, within these limits
PROBES, PROBE_STEPS = 16, 8
MAY_FAIL = 1e-9  # probability that `bound` is too low
AIM = 0.8  # of the tolerance: what the float32 estimate of a residual is to reach
NOISE = 8  # rounding of a float32 product, in units of its epsilon times σ₁²


def row_chunks(M: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """M by rows in the dtype: whole where it has it, else converted piece by piece, so that no full copy exists."""
    step = len(M) if M.dtype == dtype else max(1, CHUNK // M.shape[1])
    for start in range(0, len(M), step):
        rows = slice(start, start + step)
        yield rows, M[rows].to(dtype)


def times(X_bs: Tensor, M_sl: Tensor) -> Tensor:
    """X M (b × l) in X's dtype."""
    out = X_bs.new_zeros(len(X_bs), M_sl.shape[1])
    for rows, part in row_chunks(M_sl, X_bs.dtype):
        out.addmm_(X_bs[:, rows], part)
    return out


def times_t(Y_bl: Tensor, M_sl: Tensor) -> Tensor:
    """Y Mᵀ (b × s) in Y's dtype."""
    return torch.cat([Y_bl @ part.t() for _, part in row_chunks(M_sl, Y_bl.dtype)], 1)


def gram(M_sl: Tensor) -> Tensor:
    """M Mᵀ (s × s) in float64, summed over pieces of M's columns; of the half above the diagonal most is left out."""
    s = len(M_sl)
    out = M_sl.new_zeros(s, s, dtype=torch.float64)
    step = max(1, math.ceil(s / GRAM_BLOCKS))
    for _, part in row_chunks(M_sl.t(), torch.float64):
        for start in range(0, s, step):
            out[start:, start : start + step].addmm_(part.t()[start:], part[:, start : start + step])
    return out.tril() + out.tril(-1).t()


def orthonormal(Z_bs: Tensor, generator: torch.Generator) -> Tensor:
    """An orthonormal basis of the rows, by Cholesky factors of their float64 Gram matrix: mostly products.

    Where the rows are numerically dependent, random directions take the place of what is missing.
    """
    Z = Z_bs.double()
    X = Z = Z / torch.linalg.vector_norm(Z, dim=1, keepdim=True).clamp_min(torch.finfo(Z.dtype).tiny)
    for _ in range(2):
        L, failed = torch.linalg.cholesky_ex(X @ X.t())
        independent = 0.0 if failed.item() else L.diagonal().min().item()
        if independent < 1e-6:
            X = torch.linalg.qr((Z + 1e-7 * random_rows(len(Z), Z.shape[1], generator)).t()).Q.t()
            break
        X = torch.linalg.solve_triangular(L, X, upper=False)
        if independent > 1e-3 and Z_bs.dtype == torch.float32:
            break  # orthogonal to 1e-10 already
    return X.to(Z_bs.dtype)


def random_rows(b: int, s: int, generator: torch.Generator) -> Tensor:
    """Gaussian rows of about unit norm, float64, on the generator's device."""
    return torch.randn(b, s, generator=generator, dtype=torch.float64, device=generator.device) / math.sqrt(s)


class Subspace:
    """Orthonormal rows Q (m × s), H = Q M Mᵀ Qᵀ, and the block that comes next, orthonormal to them.

    After `grow`, M Mᵀ Q = Qᵀ H but for the newest block, which leaves `coupling` times the next one: the residual
    of a Ritz vector y is ‖coupling · (y's newest entries)‖, known without another product with M.
    """

    def __init__(self, M_sl: Tensor, dtype: torch.dtype, generator: torch.Generator) -> None:
        self.M, self.dtype, self.generator = M_sl, dtype, generator
        self.Q = M_sl.new_zeros(0, len(M_sl), dtype=dtype)
        self.H = M_sl.new_zeros(0, 0, dtype=dtype)
        self.next = self.Q
        self.coupling = self.H

    def keep(self, X_qs: Tensor, theta_q: Tensor) -> None:
        """Starts from Ritz vectors and their values."""
        self.Q, self.H = X_qs.to(self.dtype), torch.diag(theta_q.to(self.dtype))

    def propose(self, Z_bs: Tensor) -> None:
        """Makes the next block of Z's rows, as many as there is room for."""
        X = Z_bs[: len(self.M) - len(self.Q)].to(self.dtype)
        for _ in range(2 if len(X) else 0):  # not less: what is left of a converged block is rounding
            X = orthonormal(self._outside(X), self.generator)
        self.next = X

    def grow(self) -> None:
        """Takes the next block in and prepares the one after it: what M Mᵀ makes of it outside of Q."""
        b, m = len(self.next), len(self.Q)
        self.Q = torch.cat([self.Q, self.next])
        Z = times_t(times(self.next, self.M), self.M)
        inside = Z @ self.Q.t()
        Z = Z - inside @ self.Q
        H = self.H.new_zeros(m + b, m + b)
        H[:m, :m] = self.H
        H[m:], H[:m, m:] = inside, inside[:, :m].t()
        self.H = H
        self.propose(Z)
        self.coupling = Z @ self.next.t()

    def ritz(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """(θ, Y, residuals) of the k largest Ritz values; Y is m × k, in the basis Q."""
        theta, Y = torch.linalg.eigh(self.H)
        theta, Y = theta[-k:].flip(0), Y[:, -k:].flip(1)
        left = self.coupling.t() @ Y[len(Y) - len(self.coupling) :]  # none where the space is full
        return theta, Y, torch.linalg.vector_norm(left, dim=0)

    def _outside(self, Z: Tensor) -> Tensor:
        return Z - (Z @ self.Q.t()) @ self.Q


class Search:
    """Looks for the k leading triplets of M; `triplets` are the present ones.

    Args:
        tol: of ‖M v − σ u‖ / σ and ‖Mᵀ u − σ v‖ / σ.
        limit: of vectors in the basis; reached, the search stops where it is.
    """

    def __init__(self, M_sl: Tensor, k: int, *, tol: float, seed: int, limit: int) -> None:
        self.M, self.k, self.tol, self.limit = M_sl, k, tol, min(limit, len(M_sl))
        self.generator = torch.Generator(M_sl.device).manual_seed(seed)
        self.block = max(BLOCK[0], min(BLOCK[1], k // 2))
        self.fast = torch.float64 if M_sl.dtype == torch.float64 else torch.float32
        space = Subspace(M_sl, self.fast, self.generator)
        space.propose(random_rows(self.block, len(M_sl), self.generator))
        self._converge(space, first=max(k + self.block, basis_size(len(M_sl), k) * 3 // 5))

    def triplets(self) -> tuple[Tensor, Tensor, Tensor]:
        """(X, σ, V), float64, rows: k × s, k, k × l."""
        X, sigma, Y = self.X[: self.k], self.sigma[: self.k], self.Y[: self.k]
        return X, sigma, Y / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)[:, None]

    def polish(self) -> None:
        """Grows on in float64 from what the triplets leave of M Mᵀ u − σ² u."""
        space = Subspace(self.M, torch.float64, self.generator)
        space.keep(self.X, self.sigma.square())
        left = times_t(self.Y[: self.k], self.M) - self.sigma[: self.k, None].square() * self.X[: self.k]
        space.propose(left)
        self._converge(space, first=0)

    def overlooked(self) -> bool:
        """Whether fresh random vectors find more than σ_k outside the triplets; if so, they are taken in.

        `bound` is then what may still be hidden there, in units of σ_k: by Kuczyński and Woźniakowski (1992),
        j Lanczos steps from a random vector see less than (1 − ε) λ_max of an s × s matrix with a probability of at
        most 1.648 √s exp(−√ε (2j − 1)), and each probe is a vector of its own.
        """
        kept, theta_k = self.X[: self.k], self.sigma[self.k - 1].square().item()
        space = Subspace(self.M, self.fast, self.generator)
        space.keep(kept, self.sigma[: self.k].square())
        space.propose(random_rows(PROBES, len(self.M), self.generator))
        for _ in range(PROBE_STEPS):
            if not len(space.next):
                break
            space.grow()
        beyond = torch.linalg.eigvalsh(space.H[self.k :, self.k :])[-1:].clamp_min(0)
        seen = beyond.sum().item()
        root = (math.log(1.648 * math.sqrt(len(self.M))) - math.log(MAY_FAIL) / PROBES) / (2 * PROBE_STEPS - 1)
        hidden = seen / (1 - min(root, 0.99) ** 2) if len(space.next) else seen
        error = NOISE * torch.finfo(self.fast).eps * self.sigma[0].item()
        noise = error * self.sigma[self.k - 1].item() + error**2
        self.bound = math.sqrt(hidden / max(theta_k, noise)) if noise else 0.0
        if seen <= theta_k * (1 + self.tol) + noise:
            return False
        self._converge(space, first=0)
        return True

    def _converge(self, space: Subspace, first: int) -> None:
        """Grows the space until its k leading Ritz vectors have converged, or it is full; then the triplets from it."""
        check, before = first, (self.k, 0.5 / (AIM * self.tol))
        while True:
            space.grow()
            m = len(space.Q)
            full = m + len(space.next) > self.limit or not len(space.next)
            if m < check and not full:
                continue
            theta, Y, left = space.ritz(min(self.k + BLOCK[0], m))
            noise = NOISE * torch.finfo(space.dtype).eps * theta[0]
            worst = (left / torch.clamp_min(self.tol * theta, noise))[: self.k].max().nan_to_num().item()
            if full or worst <= AIM:
                break
            check, before = next_check(before, (m, worst / AIM)), (m, worst / AIM)
        self._settle(Y.t() @ space.Q)

    def _settle(self, X_qs: Tensor) -> None:
        """Rayleigh-Ritz in float64 within the span of X: orthonormal X, Y = X M with orthogonal rows, σ their norms."""
        X = orthonormal(X_qs.double(), self.generator)
        Y = times(X, self.M)
        turn = torch.linalg.eigh(Y @ Y.t()).eigenvectors.flip(1).t()
        self.X, self.Y = turn @ X, turn @ Y
        self.sigma = torch.linalg.vector_norm(self.Y, dim=1)


def next_check(before: tuple[int, float], now: tuple[int, float]) -> int:
    """At how many vectors to look again, from two looks at (vectors, residual over what is aimed at).

    A look costs an eigendecomposition, one too late the vectors between. Residuals fall ever faster as the space
    grows, so the line through the logarithms of the last two is taken to be too flat by a third.
    """
    m, ahead = now
    if before[1] <= ahead or before[0] >= m:
        return m * 5 // 4
    slope = math.log(before[1] / ahead) / (m - before[0])
    return round(min(m * 1.25, m + math.log(ahead) / (1.5 * slope)))


def basis_size(s: int, k: int) -> int:
    """How many vectors k triplets of an s-rowed trained weight take, at a residual of 1e-4 (measured)."""
    return min(s, round(1.6 * math.sqrt(k * s)))
