"""The top singular triplets and the slices cut from them, against LAPACK in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from oracle import Oracle
from spectra import gaussian, lapack, orthonormal, with_spectrum
from torch import nn

from hdpissa.engine.directions.svd import Triplets, slice_factors, top_triplets

METHODS = ["auto", "gram", "randomized", "full"]

# Float64 rounding is 1.1e-16. Both methods are backward stable to about n·1e-16 of ‖W‖ (of ‖W‖² for the Gram
# matrix); a singular subspace moves by that over the gap that separates it. The matrices below have
# n ≤ 48 and relative gaps of σ² of at least 5e-4, which allows 48·1.1e-16/5e-4 = 1e-11; measured 6e-13.
TIGHT = 1e-11


pytestmark = pytest.mark.usefixtures("one_thread")


def leading(W: torch.Tensor, k: int, method: str) -> Triplets:
    """At a tolerance that also the iterative method can only meet by going as far as rounding allows."""
    return top_triplets(W, k, method=method, tol=TIGHT if method == "randomized" else 1e-4)


def product(found: Triplets) -> torch.Tensor:
    return found.U * found.sigma @ found.Vt


def assert_singular_triplets(found: Triplets, W: torch.Tensor, k: int, tol: float = TIGHT) -> None:
    """What is true of any correct triplets, tied or not."""
    norm = torch.linalg.matrix_norm(W, 2)
    assert (found.U.shape, found.sigma.shape, found.Vt.shape) == ((W.shape[0], k), (k,), (k, W.shape[1]))
    assert {found.U.dtype, found.sigma.dtype, found.Vt.dtype} == {torch.float64}
    assert (found.sigma - lapack(W)[1][:k]).abs().max() <= tol * norm
    assert (W @ found.Vt.T - found.U * found.sigma).norm() <= tol * norm
    assert (W.T @ found.U - found.Vt.T * found.sigma).norm() <= tol * norm
    eye = torch.eye(k, dtype=torch.float64)
    assert (found.U.T @ found.U - eye).norm() <= tol
    assert (found.Vt @ found.Vt.T - eye).norm() <= tol
    assert found.residual <= tol


DECAYING = [2.0 * 0.9**i for i in range(30)]
SHAPED = {
    "tall": gaussian(48, 20),
    "wide": gaussian(20, 48),
    "square": gaussian(30, 30),
    "decaying": with_spectrum(48, 30, DECAYING),
    "row": gaussian(1, 17),
    "column": gaussian(17, 1),
    "one large": with_spectrum(30, 40, [1e4, *[1.0 - 0.02 * i for i in range(29)]]),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SHAPED)
def test_agrees_with_lapack(name, method):
    """The same σ, the same rank-k approximation as LAPACK's, for small, middle and full k."""
    W = SHAPED[name]
    U, sigma, Vt = lapack(W)
    full = min(W.shape)
    for k in sorted({1, (full + 1) // 2, full}):
        found = leading(W, k, method)
        # "one large" has gaps of σ² of 1.8e-10 of ‖W‖²: 48·1.1e-16/1.8e-10 by the Gram matrix (measured 6e-8);
        # LAPACK pays only ‖W‖/σ = 2.4e4 in the residual: 48·1.1e-16·2.4e4 (measured 3e-12).
        loose = {"full": 1.3e-10}.get(method, 3e-5) if name == "one large" else TIGHT
        assert_singular_triplets(found, W, k, loose)
        best = U[:, :k] * sigma[:k] @ Vt[:k]
        assert (product(found) - best).norm() <= loose * best.norm()
        assert bool((found.sigma.diff() <= 0).all()), "largest first"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_works_in_float64_whatever_comes_in(dtype, method):
    W = gaussian(24, 18).to(dtype)
    assert_singular_triplets(leading(W, 6, method), W.double(), 6)


@pytest.mark.parametrize("method", METHODS)
def test_flat_spectrum(method):
    """All σ equal: any orthonormal set is right, so only what holds for all of them is asked."""
    W = 3.0 * orthonormal(40, 24, seed=5)
    found = leading(W, 10, method)
    assert_singular_triplets(found, W, 10)
    assert torch.allclose(found.sigma, torch.full((10,), 3.0, dtype=torch.float64), rtol=TIGHT)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
@pytest.mark.parametrize("method", METHODS)
def test_tied_values_span_the_same_space(method, shape):
    """σ = 5, 3, 3, 3, 2, …: vectors inside the tie are free, the spaces before and around it are not."""
    W = with_spectrum(*shape, [5.0, 3.0, 3.0, 3.0, 2.0, 1.0])
    U, _, Vt = lapack(W)
    for k in (1, 4, 6):
        found = leading(W, k, method)
        assert_singular_triplets(found, W, k)
        assert (found.U @ found.U.T - U[:, :k] @ U[:, :k].T).norm() < TIGHT
        assert (found.Vt.T @ found.Vt - Vt[:k].T @ Vt[:k]).norm() < TIGHT
    cut = leading(W, 2, method)  # cuts the tie: one direction, any, out of three
    assert_singular_triplets(cut, W, 2)
    outside = cut.U[:, 1] - U[:, 1:4] @ (U[:, 1:4].T @ cut.U[:, 1])
    assert outside.norm() < TIGHT


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
@pytest.mark.parametrize("method", METHODS)
def test_rank_deficient(method, shape):
    """Rank 5, ten triplets asked for: five true ones, and what the zeros leave free adds nothing to W."""
    W = with_spectrum(*shape, [5.0, 4.0, 3.0, 2.0, 1.0])
    found = leading(W, 10, method)
    assert found.residual < TIGHT
    assert (found.sigma[:5] - torch.tensor([5.0, 4, 3, 2, 1], dtype=torch.float64)).abs().max() < TIGHT
    assert found.sigma[5:].max() < TIGHT
    assert (product(found) - W).norm() < TIGHT
    A, B = slice_factors(found, 2)
    assert bool(torch.isfinite(A).all())
    assert bool(torch.isfinite(B).all())


def test_auto_falls_back_where_gram_misses_the_tolerance():
    """σ of 1e-9 is 1e-18 in the Gram matrix, below float64's rounding: gram refuses, auto is LAPACK."""
    W = with_spectrum(30, 20, [1.0, 0.5, 1e-9, 5e-10])
    with pytest.raises(ValueError, match=r"1\.0e-04"):
        top_triplets(W, 4, method="gram")
    found = top_triplets(W, 4)
    assert found.residual <= 1e-4
    assert (found.sigma - torch.tensor([1.0, 0.5, 1e-9, 5e-10], dtype=torch.float64)).abs().max() < 1e-14
    assert top_triplets(W, 2, method="gram").residual < TIGHT


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@pytest.mark.parametrize("method", METHODS)
def test_zero_matrix(method, shape):
    found = top_triplets(torch.zeros(shape), 4, method=method)
    assert found.residual == 0.0
    assert not found.sigma.any()
    for factor in slice_factors(found, 2):
        assert torch.equal(factor, torch.zeros_like(factor))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", METHODS)
def test_refuses_non_finite(method, bad):
    W = gaussian(6, 5).float()
    W[2, 3] = bad
    with pytest.raises(ValueError, match="non-finite"):
        top_triplets(W, 2, method=method)


def test_residual_sees_wrong_triplets():
    """A residual that stayed small whatever was passed in would let every method through."""
    from hdpissa.engine.directions.svd import _checked

    W = gaussian(20, 30)
    U, sigma, Vt = (t[..., :4] if t.dim() == 1 else t for t in lapack(W))
    U, Vt = U[:, :4], Vt[:4]
    assert _checked(W, U, sigma, Vt).residual < TIGHT
    assert _checked(W, U.flip(1), sigma, Vt).residual > 0.1
    assert _checked(W, U, sigma * 1.01, Vt).residual > 1e-3
    assert _checked(W, 1.01 * U, sigma * 1.01, Vt).residual > 1e-3
    assert _checked(W, U[:, [0, 0, 2, 3]], sigma[[0, 0, 2, 3]], Vt[[0, 0, 2, 3]]).residual > 0.5, "one found twice"


# --- Slices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slices", "r"), [(1, 4), (4, 1), (3, 4), (2, 8), (5, 4)])
@pytest.mark.parametrize("shape", [(24, 20), (20, 24)])
def test_slices_sum_to_the_best_approximation(shape, slices, r):
    """Σ_i B_i A_i is W's best approximation of rank S·r, and slice i holds its triplets i·r … (i+1)·r − 1."""
    W = gaussian(*shape, seed=3)
    U, sigma, Vt = lapack(W)
    A, B = slice_factors(top_triplets(W, slices * r), r)
    assert (A.shape, B.shape) == ((slices, r, shape[1]), (slices, shape[0], r))
    assert {A.dtype, B.dtype} == {torch.float32}
    assert A.is_contiguous()
    assert B.is_contiguous()
    # The factors are rounded to fp32 once: 6e-8 in each of the two, so at most 1.2e-7 of the product's norm
    # where all roundings conspire, and half of that in practice.
    for i in range(slices):
        here = slice(i * r, (i + 1) * r)
        best = U[:, here] * sigma[here] @ Vt[here]
        assert (B[i].double() @ A[i].double() - best).norm() <= 1.2e-7 * best.norm()
        # both factors carry √σ, neither carries σ
        for norms in (A[i].double().norm(dim=1), B[i].double().norm(dim=0)):
            assert torch.allclose(norms, sigma[here].sqrt(), rtol=1e-6)
    total = torch.einsum("sor,sri->oi", B.double(), A.double())
    k = slices * r
    tail = sigma[k:].square().sum().sqrt()  # Eckart-Young: no matrix of this rank comes nearer
    assert (W - total).norm() <= tail + 1.2e-7 * W.norm()


class Regression(nn.Module):
    """Two matrices and a squared loss: the smallest model on which a trajectory can differ."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(gaussian(9, 7, seed=1))
        self.second = nn.Parameter(gaussian(5, 9, seed=2))

    def forward(self, x, y):
        return SimpleNamespace(loss=((x @ self.first.T).tanh() @ self.second.T - y).square().mean())


def trajectory(change) -> list[torch.Tensor]:
    """Both weights after five steps in float64; `change` may replace an oracle's slices first."""
    model = Regression()
    oracle = Oracle(model, ["first", "second"], slices=2, r=2)
    for name in oracle.weights:
        change(oracle.slices[name], oracle.parameters[name].detach())
    for step in range(5):
        seeds = [[10 * step + i] for i in range(2)]
        oracle.step([[{"x": gaussian(6, 7, seed=s), "y": gaussian(6, 5, seed=s)} for s in row] for row in seeds], 1e-2)
    return [p.detach() for p in (model.first, model.second)]


def relative(found, expected) -> float:
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))


def test_signs_of_singular_vectors_do_not_matter():
    """Flipping u_j and v_j together leaves W's whole trajectory as it was, bit for bit: negation is exact."""

    def flip(slices, W):
        slices[0].A[1] *= -1
        slices[0].B[:, 1] *= -1
        slices[1].A *= -1
        slices[1].B *= -1

    def flip_one_side(slices, W):
        slices[0].A[1] *= -1

    def rotate(slices, W):  # B A stays the same here too, but Adam is no rotation-invariant rule
        turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
        slices[0].A, slices[0].B = turn @ slices[0].A, slices[0].B @ turn.T

    plain = trajectory(lambda slices, W: None)
    assert relative(plain, [Regression().first, Regression().second]) > 1e-2, "nothing moved"
    assert relative(trajectory(flip), plain) == 0.0
    assert relative(trajectory(flip_one_side), plain) > 1e-4
    assert relative(trajectory(rotate), plain) > 1e-4


@pytest.mark.parametrize("method", ["gram", "full"])
def test_any_svd_routine_gives_the_same_run(method):
    """Slices from `top_triplets` train W as LAPACK's do, up to the fp32 rounding of the fixed factors."""

    def replace(slices, W):
        A, B = slice_factors(top_triplets(W, 4, method=method), 2)
        for i, s in enumerate(slices):
            s.A, s.B = A[i].double(), B[i].double()

    # Five steps of 1e-2 move W by a few per cent, rounding changes that by some 1e-7 of it.
    assert relative(trajectory(replace), trajectory(lambda slices, W: None)) < 1e-7
