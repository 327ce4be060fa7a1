"""Rung 2 of the ladder: the engine on real ranks against the float64 oracle."""

from __future__ import annotations

import pytest
import torch
from engine_runs import train_tiny
from oracle import Oracle
from ranks import run_ranks
from tiny import ds_settings, target_names, tiny_batch, tiny_llama

STEPS, LR = 4, 1e-3


def oracle_run(slices, per_slice, *, steps=STEPS, lr=LR, r=2, model=None, **options):
    """(losses, weights, eval losses after each step, oracle) in float64, on the engine's data order."""
    net = tiny_llama(dtype=torch.float64, **(model or {}))
    oracle = Oracle(net, target_names(net), slices=slices, r=r, **options)
    losses, evals = [], []
    for step in range(steps):
        batches = [[tiny_batch(step, i, j) for j in range(per_slice)] for i in range(slices)]
        losses.append(oracle.step(batches, lr))
        with torch.no_grad():
            evals.append(net(**tiny_batch(999, 0, 0)).loss.item())
    return losses, {n: oracle.parameters[n].detach().clone() for n in oracle.weights}, evals, oracle


def relative(weights, reference):
    """Largest ‖W − W_ref‖ / ‖W_ref‖ over the weights."""
    assert set(weights) == set(reference)
    return max(((weights[n].double() - w).norm() / w.norm()).item() for n, w in reference.items())


@pytest.mark.parametrize(
    ("slices", "world_size", "per_slice"),
    [(4, 1, 2), (4, 2, 2), (4, 4, 2), (2, 4, 2), (2, 4, 4), (1, 1, 1), (3, 3, 1), (1, 4, 4)],
)
def test_slices_are_not_ranks(slices, world_size, per_slice):
    """S = c·K, S = K and K = c·S all give the oracle's W to 1e-6 in fp32."""
    accumulation = per_slice * slices // world_size
    settings = ds_settings(slices=slices, accumulation=accumulation)
    losses, reference, _, _ = oracle_run(slices, per_slice)
    run = run_ranks(world_size, train_tiny, settings, steps=STEPS, lr=LR)[0]
    assert run["losses"] == pytest.approx(losses, rel=1e-5)
    assert relative(run["weights"], reference) < 1e-6
