"""What ranks do in test_slice_figures.py; runs inside `ranks.run_ranks`."""

from __future__ import annotations

import torch
from tiny import build, tiny_batch


def halves(engine) -> torch.Tensor:
    """The own shards as the next forward pass sees them in bf16, one after another."""
    parts = []
    for target in engine.targets:
        held = target.shard.parts()
        half = next((part for part in held if part.dtype == torch.bfloat16), held[0])
        parts.append(half[: target.own_range(engine.plan).numel].to(torch.bfloat16).clone())
    return torch.cat(parts)


def own_norms(engine, flat) -> dict[int, float]:
    """Own slice → norm of its part of a flat buffer of the store, put together target by target."""
    store, found = engine.optimizer.store, {}
    for index, slice_id in enumerate(engine.plan.owned):
        parts = [part for _, A, B in store.state_views(flat, index) for part in (A, B)]
        found[slice_id] = float(torch.cat([part.flatten() for part in parts]).double().norm())
    return found


def look(settings, *, steps=4, lr=1e-3, silent=1):
    """Trains a few steps, slice `silent` without any loss, a look at every second step.

    Returns: (rows, lines, per look what they should say: gradient norms, norms of updates, (moved, all) of this rank).
    """
    from hdpissa.engine import initialize
    from hdpissa.engine.health.slice_figures import SliceFigures

    engine = initialize(model=build({}), config=settings)
    optimizer, rows, lines, expected = engine.optimizer, [], [], []
    figures = SliceFigures(optimizer, every=2, patience=4, start=0)
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = lr
        before, sums = halves(engine), optimizer.store.delta_sum.clone()
        reduce, grads = optimizer.reduce, {}
        optimizer.reduce = lambda reduce=reduce, grads=grads: (reduce(), grads.update(own_norms(engine, "grads")))
        for slice_id, micro in engine.plan.schedule(engine.gradient_accumulation_steps()):
            loss = engine(**tiny_batch(step, slice_id, micro)).loss
            engine.backward(loss * 0 if slice_id == silent else loss)
            result = engine.step()
        optimizer.reduce = reduce
        assert bool(optimizer.observers) == (step % 2 == 0)  # every other step is observed
        if (found := figures.after(result)) is not None:
            rows.append(found[0])
            lines += found[1]
        if step % 2 == 0:
            now = optimizer.store.delta_sum.clone()
            optimizer.store.delta_sum.sub_(sums)
            updates = own_norms(engine, "delta_sum")
            optimizer.store.delta_sum.copy_(now)
            after = halves(engine)
            scaled = {i: norm * optimizer.grad_scale for i, norm in grads.items()}
            expected.append((scaled, updates, (int((before != after).sum()), before.numel()), result.grad_norm))
    return rows, lines, expected
