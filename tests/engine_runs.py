"""What the ranks of the engine tests do; functions here run inside `ranks.run_ranks`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from tiny import tiny_batch, tiny_llama


def whole_weights(engine) -> dict[str, torch.Tensor]:
    """Every trained weight, exact, on rank 0 (empty elsewhere)."""
    from hdpissa.engine.adapt import gather_exact

    gathered = {f"{t.name}.weight": gather_exact(t, engine.plan) for t in engine.targets}
    return {name: w.clone() for name, w in gathered.items() if w is not None}


def train_tiny(
    settings,
    *,
    steps=4,
    lr=1e-3,
    model=None,
    checkpointing=False,
    eval_between=False,
    poison=None,
    after=None,
):
    """Trains a tiny Llama; returns losses, weights (rank 0), and what the steps reported.

    Args:
        poison: (rank, step): that rank's loss is multiplied by nan in that step.
        after: called with the engine at the end; its result is returned too.
    """
    from hdpissa.engine import initialize

    net = tiny_llama(**(model or {}))
    if checkpointing:
        net.gradient_checkpointing_enable({"use_reentrant": False})
    engine = initialize(model=net, config=settings)
    accumulation = engine.gradient_accumulation_steps()
    results, forward_losses = [], []
    for step in range(steps):
        engine.optimizer.param_groups[0]["lr"] = lr
        for slice_id, micro in engine.plan.schedule(accumulation):
            loss = engine(**tiny_batch(step, slice_id, micro)).loss
            if poison == (dist.get_rank(), step):
                loss = loss * float("nan")
            engine.backward(loss)
            results.append(engine.step())
        if eval_between:
            forward_losses.append(eval_loss(engine))
    results = [r for r in results if r is not None]
    return {
        "losses": [r.loss for r in results],
        "steps": results,
        "eval": forward_losses,
        "weights": whole_weights(engine),
        "after": after(engine) if after else None,
    }


def eval_loss(engine) -> float:
    """The loss on a fixed batch in eval mode; same on all ranks."""
    engine.eval()
    with torch.no_grad():
        loss = engine(**tiny_batch(999, 0, 0)).loss.item()
    engine.train()
    return loss
