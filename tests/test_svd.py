"""The top singular triplets and the slices cut from them, against LAPACK in float64."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracle import Oracle
from torch import nn

from hdpissa.engine import krylov, svd
from hdpissa.engine.precision import full_fp32
from hdpissa.engine.svd import Triplets, slice_factors, top_triplets

METHODS = ["auto", "gram", "randomized", "full"]

# Float64 rounding is 1.1e-16. Both methods are backward stable to about n·1e-16 of ‖W‖ (of ‖W‖² for the Gram
# matrix); a singular subspace moves by that over the gap that separates it. The matrices below have
# n ≤ 48 and relative gaps of σ² of at least 5e-4, which allows 48·1.1e-16/5e-4 = 1e-11; measured 6e-13.
TIGHT = 1e-11


pytestmark = pytest.mark.usefixtures("one_thread")


def orthonormal(rows: int, cols: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, cols, generator=generator, dtype=torch.float64))[0]


def with_spectrum(rows: int, cols: int, sigma: list[float], seed: int = 0) -> torch.Tensor:
    k = len(sigma)
    return orthonormal(rows, k, seed) * torch.tensor(sigma, dtype=torch.float64) @ orthonormal(cols, k, seed + 1).T


def gaussian(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lapack(W: torch.Tensor):
    return [torch.from_numpy(part) for part in np.linalg.svd(W.double().numpy(), full_matrices=False)]


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
    with pytest.raises(ValueError, match=r"'gram' reached a residual of \S+, tol is 1\.0e-04"):
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
    from hdpissa.engine.svd import _checked

    W = gaussian(20, 30)
    U, sigma, Vt = (t[..., :4] if t.dim() == 1 else t for t in lapack(W))
    U, Vt = U[:, :4], Vt[:4]
    assert _checked(W, U, sigma, Vt).residual < TIGHT
    assert _checked(W, U.flip(1), sigma, Vt).residual > 0.1
    assert _checked(W, U, sigma * 1.01, Vt).residual > 1e-3
    assert _checked(W, 1.01 * U, sigma * 1.01, Vt).residual > 1e-3
    assert _checked(W, U[:, [0, 0, 2, 3]], sigma[[0, 0, 2, 3]], Vt[[0, 0, 2, 3]]).residual > 0.5, "one found twice"


# --- The randomized method, where it does not see the whole space ---------------------------------------------

N, K = 300, 24
FLAT = [1.5 - 0.0045 * i for i in range(N)]  # relative gaps of 3e-3
HARD = {
    "flat": FLAT,
    "all equal": [3.0] * N,
    "plateau above the cut": [5.0] * 100 + [3.0 - 0.01 * i for i in range(N - 100)],
    "plateau across the cut": [5.0 - 0.05 * i for i in range(20)] + [2.0] * 150 + [1.0] * 130,
    "clusters": [5.0 - 1e-7 * i for i in range(50)] + [4.999 - 1e-9 * i for i in range(50)] + [2.0] * 200,
    "two decades in the cut": [0.82**i for i in range(N)],
    "one large": [100.0, *FLAT[1:]],
    "rank of the cut, then next to nothing": [5.0 - 0.1 * i for i in range(K)] + [1e-9] * 100,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(N, 380), (380, N)])
@pytest.mark.parametrize("name", HARD)
def test_randomized_on_hard_spectra(name, shape, dtype):
    """Both residuals hold by a product of the test's own, and no larger value was missed.

    A residual of tol moves σ by at most tol, and by tol² over the gap to what is left out in the end; a tie or a
    cluster of width w has its values anywhere inside w.
    """
    W = with_spectrum(*shape, HARD[name]).to(dtype)
    found, exact, tol = top_triplets(W, K, method="randomized"), W.double(), 1e-4
    truth = lapack(W)[1][:K]
    assert found.method == "randomized"
    assert ((found.sigma - truth).abs() / truth).max() <= 1e-6
    assert ((exact @ found.Vt.T - found.U * found.sigma).norm(dim=0) / found.sigma).max() <= tol
    assert ((exact.T @ found.U - found.Vt.T * found.sigma).norm(dim=0) / found.sigma).max() <= tol
    eye = torch.eye(K, dtype=torch.float64)
    assert (found.U.T @ found.U - eye).abs().max() <= 1e-10
    assert (found.Vt @ found.Vt.T - eye).abs().max() <= 1e-10
    assert found.residual <= tol
    assert found.bound < 1.1


def test_randomized_goes_below_float32s_rounding():
    """A tolerance that float32 products cannot reach is met by growing on in float64."""
    W = with_spectrum(N, 380, FLAT).float()
    assert top_triplets(W, K, method="randomized").residual > 1e-8
    found = top_triplets(W, K, method="randomized", tol=1e-10)
    assert found.residual <= 1e-10
    assert ((found.sigma - lapack(W)[1][:K]).abs() / found.sigma).max() <= 1e-13


def test_svd_lowrank_fails_where_randomized_holds():
    """The control: what PEFT calls, on the same matrix, is wrong by percents and nearly at right angles."""
    W = with_spectrum(N, 380, FLAT).float()
    U, sigma, _ = lapack(W)
    torch.manual_seed(0)
    wrong_U, wrong_sigma, _ = torch.svd_lowrank(W, q=K, niter=4)

    def sine(basis):
        return torch.linalg.matrix_norm(basis - U[:, :K] @ (U[:, :K].T @ basis), 2)

    assert ((wrong_sigma - sigma[:K]).abs() / sigma[:K]).max() > 0.02
    assert sine(wrong_U.double()) > 0.9
    # residual over gap: 1e-4 over 3e-3; measured 4e-4
    assert sine(top_triplets(W, K, method="randomized").U) < 1e-4 / 3e-3


def test_randomized_is_a_function_of_matrix_and_seed():
    W = with_spectrum(N, 380, FLAT).float()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = top_triplets(W, K, method="randomized")
    assert torch.equal(torch.get_rng_state(), before), "the global generator has moved"
    torch.manual_seed(2)
    again, other = top_triplets(W, K, method="randomized"), top_triplets(W, K, method="randomized", seed=1)
    for name in ("U", "sigma", "Vt"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.U, other.U)
    assert (first.sigma - other.sigma).abs().max() < 1e-6


class Blind(krylov.Search):
    """Starts at right angles to the three largest triplets' vectors: all residuals will hold without them."""

    hidden: torch.Tensor

    def _converge(self, space, first):
        if not len(space.Q):
            start = space.next.double()
            space.next = krylov.orthonormal(start - (start @ self.hidden) @ self.hidden.T, self.generator)
        super()._converge(space, first)


def test_what_a_residual_cannot_see_is_found(monkeypatch):
    """Three largest triplets hidden from the start: residuals hold and are worthless, the probes find them."""
    W = with_spectrum(N, 380, [1.4, 1.3, 1.2, *[0.9**i for i in range(60)]])
    U, sigma, _ = lapack(W)
    Blind.hidden = U[:, :3]
    search = Blind(W, 8, tol=1e-4, seed=0, limit=N)
    X, values, V = search.triplets()
    assert ((V @ W.T - values[:, None] * X).norm(dim=1) / values).max() < 1e-4
    assert values[0] < 1.01, "the start was to be blind"
    assert search.overlooked()
    assert (search.triplets()[1] - sigma[:8]).abs().max() < 1e-6
    assert not search.overlooked()
    assert search.bound < 1.1
    # and so through the front door
    monkeypatch.setattr(krylov, "Search", Blind)
    found = top_triplets(W, 8, method="randomized")
    assert found.residual <= 1e-4
    assert (found.sigma - sigma[:8]).abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(N, 380), (380, N)])
def test_auto_hands_on_what_randomized_cannot_do(monkeypatch, shape):
    """Rank 8 up to float32's rounding, 24 asked for: what remains is at 1e-8 of ‖W‖, 1e-16 in any Gram matrix."""
    W = with_spectrum(*shape, [5.0 - 0.1 * i for i in range(8)]).float()
    with pytest.raises(ValueError, match=r"'randomized' reached a residual of \S+, tol is 1\.0e-04"):
        top_triplets(W, K, method="randomized")
    monkeypatch.setattr(svd, "plan", lambda W, k: ["randomized", "gram", "full"])
    found = top_triplets(W, K)
    assert found.method == "full"
    assert ((found.sigma - lapack(W)[1][:K]).abs()).max() < 1e-14


def test_products_by_pieces(monkeypatch):
    """What needs another dtype than W's is converted piece by piece: the same result, and never a full copy."""
    W, X, Y = gaussian(37, 53).float(), gaussian(5, 37, seed=1), gaussian(5, 53, seed=2)
    monkeypatch.setattr(krylov, "CHUNK", 300)
    for M, left, right in ((W, X, Y), (W.t(), Y, X)):
        assert max(part.numel() for _, part in krylov.row_chunks(M, torch.float64)) <= 300
        exact = M.double()
        for found, truth in (
            (krylov.times(left, M), left @ exact),
            (krylov.times_t(right, M), right @ exact.T),
            (krylov.gram(M), exact @ exact.T),
        ):
            assert found.dtype == torch.float64
            assert (found - truth).norm() <= 1e-15 * 53 * truth.norm()


def test_tf32_is_off_inside_and_back_after():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with full_fp32():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_auto_chooses_by_cost():
    """Small and middle sizes exactly; large ones by the randomized method, unless most of the space is wanted."""

    for rates in (svd.CPU, svd.GPU):
        assert svd.seconds("gram", 576, 1536, 128, rates) < svd.seconds("randomized", 576, 1536, 128, rates)
        for size in ((4096, 4096), (11008, 4096), (8192, 28672)):
            assert 3 * svd.seconds("randomized", *size, 128, rates) < svd.seconds("gram", *size, 128, rates)
    assert svd.seconds("gram", 300, 500, 9, svd.CPU) == svd.seconds("gram", 500, 300, 9, svd.CPU)
    assert svd.plan(torch.empty(576, 1536), 128) == ["gram", "full"]
    assert svd.plan(torch.empty(4096, 4096), 128) == ["randomized", "gram", "full"]
    assert svd.plan(torch.empty(4096, 4096), 2048) == ["gram", "full"]


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
