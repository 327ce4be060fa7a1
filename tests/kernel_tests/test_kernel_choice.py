"""Which implementation answers a public kernel function: `impl="auto" | "triton" | "torch"`, and what is refused."""

from __future__ import annotations

import pytest
import torch
from tensors import randn
from test_kernels import public

from hdpissa.kernels import api, available, reference

pytestmark = pytest.mark.usefixtures("one_thread")

SINGLE = torch.float32


def single(*shape: int, seed: int = 0) -> torch.Tensor:
    return randn(*shape, seed=seed, dtype=SINGLE)


def calls() -> dict[str, tuple[tuple, dict]]:
    """Arguments for every public function; made anew each time, since some are written to."""
    factors = single(4, 7), single(3, 4), single(4, 7, seed=1), single(3, 4, seed=1)
    range_of = {"start": 3, "second_order": True}
    parts, bad = reference.split_fp32(single(15)), torch.zeros(1, dtype=torch.int32)
    return {
        "split_fp32": ((single(9),), {}),
        "merge_fp32": (reference.split_fp32(single(9)), {}),
        "low_rank_forward": ((single(5, 7), single(2, 7)), {}),
        "low_rank_grad_B_": ((single(3, 2), single(5, 3), single(5, 2), single(3, 2)), {}),
        "low_rank_grad_A_": (([single(2, 7)], [single(5, 2)], single(5, 7)), {}),
        "fused_linear": ((single(5, 7), single(3, 7), single(2, 7), single(3)), {}),
        "slice_adam_": (
            (torch.zeros(4), torch.zeros(4), torch.arange(4.0)),
            {"step": 1, "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "grad_scale": 0.5},
        ),
        "dense_delta": (factors, {**range_of, "numel": 15}),
        "delta_apply_": ((parts, *factors, bad), {**range_of, "scale": 0.5}),
        "shard_subtract_": ((parts, single(15, seed=1), bad), {"scale": 0.5}),
    }


def called(function, name: str, **extra) -> list[torch.Tensor]:
    """What the function returns, and what it leaves in its arguments."""
    arguments, keywords = calls()[name]
    result = function(*arguments, **keywords, **extra)
    return [t for t in torch.utils._pytree.tree_leaves((result, arguments)) if isinstance(t, torch.Tensor)]


CHOSEN = sorted(public(api) - {"split_fp32", "merge_fp32"})  # these two have one implementation


def test_calls_are_complete():
    assert calls().keys() == public(api)


@pytest.mark.parametrize("name", sorted(public(api)))
def test_torch_is_the_reference(name):
    """On the CPU "auto" is torch, and "torch" is `reference` to the bit."""
    expected = called(getattr(reference, name), name)
    for extra in ({}, {"impl": "auto"}, {"impl": "torch"}) if name in CHOSEN else ({},):
        found = called(getattr(api, name), name, **extra)
        assert all(torch.equal(f, e) and f.dtype == e.dtype for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", CHOSEN)
def test_unknown_implementation_is_refused(name):
    with pytest.raises(ValueError, match=rf"impl='cuda' for {name}.*") as caught:
        called(getattr(api, name), name, impl="cuda")
    assert all(there in str(caught.value) for there in (*api.IMPLEMENTATIONS, "auto"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
@pytest.mark.parametrize("name", CHOSEN)
def test_triton_is_refused_where_it_cannot_run(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=rf"impl='triton' for {name}: the tensors are on cpu.*; or use impl='torch'"):
        called(getattr(api, name), name, impl="triton")


def test_triton_is_refused_for_float64_and_without_triton(monkeypatch):
    x = randn(3, 4)
    with pytest.raises(ValueError, match="float64 is for the torch version only"):
        api.low_rank_forward(x, x, impl="triton")
    assert torch.equal(api.low_rank_forward(x, x), x @ x.T)
    monkeypatch.setattr(available, "has_triton", lambda: False)
    with pytest.raises(ValueError, match="triton is not installed; pip install triton"):
        api.low_rank_forward(x.float(), x.float(), impl="triton")
