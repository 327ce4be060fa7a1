"""Spectra of ΔW from the factors, against those of dense matrices."""

from __future__ import annotations

import pytest
import torch
from engine_runs import train_tiny
from ranks import run_ranks
from report_runs import spectra_here
from tiny import ds_settings, tiny_llama

from hdpissa.engine.export import spectra


def test_spectrum_of_a_product_that_is_never_formed():
    """Against the dense product's, float64; shapes where 2·r·S is less and more than the matrix."""
    torch.manual_seed(0)
    for rows, cols, components in ((40, 30, 12), (20, 30, 48)):
        A, B = torch.randn(components, cols), torch.randn(rows, components)
        dense = torch.linalg.svdvals(2.0 * B.double() @ A.double())
        found = spectra.singular_values(A, B, -2.0)
        assert len(found) == min(rows, cols, components)
        assert torch.allclose(found, dense[: len(found)], rtol=1e-12)


def test_which_weights():
    names = [f"layers.{i}.{kind}" for i in range(5) for kind in ("q", "v")]
    assert spectra.choose(names, 3) == ["layers.2.q", "layers.2.v", "layers.4.q"]
    assert spectra.choose(names, 99) == [f"layers.{i}.{kind}" for i in (2, 4, 0) for kind in ("q", "v")]
    assert spectra.choose(["lm_head"], 9) == ["lm_head"]
    assert spectra.choose(names, 0) == []


@pytest.mark.parametrize("exchange", ["factor", pytest.param("dense", marks=pytest.mark.slow)])
def test_spectra_of_a_run_are_those_of_its_change(exchange):
    """Two ranks, four slices. Without the second-order term the factors' spectrum is that of W_n − W_0 up to fp32
    rounding of W: each step rounds by at most 2⁻²⁴ |w|, here 6e-8 · 8 · √(rows · cols) ≈ 1e-5 in all singular values.
    """
    delta = {"second_order": False, "exchange": exchange}
    settings = ds_settings(slices=4, accumulation=2, delta=delta)
    results = run_ranks(2, train_tiny, settings, steps=3, after=spectra_here)
    told, start = results[0]["after"], tiny_llama().state_dict()
    assert told["kinds"] == {exchange}
    assert len(told["found"]["weights"]) == 14  # two layers: the middle one is the last
    for weight in told["found"]["weights"]:
        name = f"{weight['name']}.weight"
        dense = torch.linalg.svdvals((results[0]["weights"][name] - start[name]).double())
        values = torch.tensor(weight["values"], dtype=torch.float64)
        assert (weight["r"], weight["slices"]) == (2, 4)
        assert len(values) == min(*start[name].shape, 16)
        assert torch.allclose(values, dense[: len(values)], rtol=1e-3, atol=2e-5), name
        assert (values > 1e-3 * values[0]).sum() > 4, "higher than LoRA's rank, 2"
    assert told["none"]["weights"] == []
    assert len(told["none"]["left_out"]) == 14
    assert results[1]["after"]["found"]["weights"] == []  # rank 0 has them
    damaged = told["damaged"]
    assert (damaged["weights"], damaged["left_out"]) == ([], []), "what is not finite is no lack of time"
    assert "rank 0" in damaged["problem"]
    assert "non-finite" in damaged["problem"]
