"""Leading eigenvectors: float32 made right in float64 really happens, and gives way where it cannot be right."""

from __future__ import annotations

import pytest
import torch
from spectra import orthonormal

from hdpissa.engine.directions import eigen
from hdpissa.engine.directions.svd import top_triplets

S, K = 400, 32
M = eigen.kept(S, K)


def gram_of(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    Q = orthonormal(S, S, seed)
    return (Q * values.double()) @ Q.T


def exact(G: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, vectors = torch.linalg.eigh(G)
    return values.flip(0), vectors.flip(1).t()


falling = torch.linspace(1, 0.02, S)
REFINED = {
    "flat": torch.linspace(1, 0.5, S),
    "falling": falling,
    "decaying": torch.exp(-torch.arange(S) / 120),
    "tied in groups": falling.double().mul(50).round() / 50 + torch.arange(S).flip(0) * 1e-13,
    "one large": torch.cat([torch.tensor([10.0]), falling[1:]]),
    "tiny": falling * 1e-30,
    "huge": falling * 1e30,
}


@pytest.mark.parametrize("name", REFINED)
def test_refined_vectors_are_float64s(name):
    """The same subspaces as LAPACK's in float64: projections on the K leading vectors agree, eigenvalues to 1e-12."""
    G = gram_of(REFINED[name])
    X = eigen._refined(G, K, M)
    assert X is not None
    values, vectors = exact(G)
    assert (X @ X.T - torch.eye(K)).abs().max() <= 1e-12
    found = torch.linalg.vector_norm(X @ G, dim=1)
    assert ((found - values[:K]) / values[:K]).abs().max() <= 1e-12
    outside = X - (X @ vectors[:M].T) @ vectors[:M]
    assert torch.linalg.matrix_norm(outside, 2) <= 1e-7


def test_a_wrong_first_step_is_noticed(monkeypatch):
    """The step does something: without it float32's mixing is left, far above what is accepted."""
    monkeypatch.setattr(eigen, "MIXED", 0.0)
    assert eigen._refined(gram_of(REFINED["falling"]), K, M) is None


def uncoupled_blocks() -> torch.Tensor:
    """Tied values of an uncoupled block just below float32's rounding of the largest: float32 orders them wrongly."""
    W = torch.zeros(384, 384)
    W[:256, :256] = 1 / 256 + 2**-11 * torch.eye(256)
    W[256:, 256:] = 2**-11 * 1.02 * torch.eye(128)
    return W


def test_what_float32_cannot_order_is_left_to_float64():
    W = uncoupled_blocks()
    found = top_triplets(W, 32)
    truth = torch.linalg.svdvals(W.double())[:32]
    assert ((found.sigma - truth) / truth).abs().max() <= 1e-10


@pytest.mark.parametrize("name", ["zero", "infinite", "low rank", "one very large", "tied at the edge"])
def test_what_gives_way(name):
    """Where float32 says too little, the answer is LAPACK's in float64."""
    values = falling.double().clone()
    if name == "zero":
        values.zero_()
    elif name == "low rank":
        values[20:] = 0
    elif name == "one very large":
        values[0] = 1e9
    elif name == "tied at the edge":
        values[10:] = 0.5
    G = gram_of(values)
    if name == "infinite":
        assert eigen._refined(G * 1e200 * 1e200, K, M) is None
        return
    assert eigen._refined(G, K, M) is None
    X = eigen.leading(G, K)
    truth, _ = exact(G)
    assert (torch.linalg.vector_norm(X @ G, dim=1) - truth[:K].abs()).abs().max() <= 1e-12 * max(1.0, truth[0].item())
