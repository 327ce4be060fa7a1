"""The randomized method, where it does not see the whole space, and when `auto` takes it."""

from __future__ import annotations

import pytest
import torch
from spectra import gaussian, lapack, with_spectrum

from hdpissa.engine.directions import krylov, svd
from hdpissa.engine.directions.svd import top_triplets

pytestmark = pytest.mark.usefixtures("one_thread")

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


@pytest.mark.parametrize(("rows", "cols", "k"), [(64, 84, 24), (64, 84, 60), (40, 96, 16), (128, 512, 112)])
@pytest.mark.parametrize("spectrum", ["three values", "low rank"])
def test_a_space_that_fills_up(rows, cols, k, spectrum):
    """Nothing is left to grow into: what is there is the answer, or says that it is not."""
    values = [5.0] * (rows // 3) + [3.0] * (rows // 3) + [1.0] * (rows - 2 * (rows // 3))
    W = with_spectrum(rows, cols, values if spectrum == "three values" else values[: rows // 3]).float()
    if spectrum == "low rank" and k > rows // 3:  # triplets of rounding: refused in words, where auto goes on to gram
        with pytest.raises(ValueError, match="randomized"):
            top_triplets(W, k, method="randomized")
        assert top_triplets(W, k).residual <= 1e-4
        return
    found = top_triplets(W, k, method="randomized")
    truth = lapack(W)[1][:k]
    assert found.method == "randomized"
    assert (found.sigma - truth).abs().max() <= 1e-5 * truth[0]


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
    with pytest.raises(ValueError, match=r"1\.0e-04"):
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


def test_auto_chooses_by_cost():
    """Small and middle sizes exactly; large ones by the randomized method, unless most of the space is wanted."""

    for rates in (svd.CPU, svd.GPU):
        assert svd.seconds("gram", 576, 1536, 128, rates) < svd.seconds("randomized", 576, 1536, 128, rates)
        for size in ((4096, 4096), (11008, 4096), (8192, 28672)):
            assert svd.WORTH * svd.seconds("randomized", *size, 128, rates) < svd.seconds("gram", *size, 128, rates)
    assert svd.seconds("gram", 300, 500, 9, svd.CPU) == svd.seconds("gram", 500, 300, 9, svd.CPU)
    assert svd.plan(torch.empty(576, 1536), 128) == ["gram", "full"]
    assert svd.plan(torch.empty(4096, 4096), 128) == ["randomized", "gram", "full"]
    assert svd.plan(torch.empty(4096, 4096), 2048) == ["gram", "full"]
