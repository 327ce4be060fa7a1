"""What the ranks of the checkpoint tests do; functions here run inside `ranks.run_ranks`."""

from __future__ import annotations

from typing import Any

from engine_runs import whole_weights
from tiny import build, tiny_batch


def one_step(engine, step: int, lr: float = 1e-3):
    """One optimizer step on the batches of that step; returns its result."""
    engine.optimizer.param_groups[0]["lr"] = lr
    for slice_id, micro in engine.plan.schedule(engine.gradient_accumulation_steps()):
        engine.backward(engine(**tiny_batch(step, slice_id, micro)).loss)
        result = engine.step()
    return result


def train_on(
    settings: dict,
    *,
    stop: int,
    start_from: str | None = None,
    load_later: bool = False,
    save_at: tuple[int, ...] = (),
    save_dir: str | None = None,
    model: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """Trains to step `stop`, from the start or a checkpoint; saves on the way.

    Args:
        load_later: the checkpoint is loaded after a decomposition and a step of its own.
        options: of `save_checkpoint`.
    """
    from hdpissa.engine import initialize

    net = model if hasattr(model, "parameters") else build(model)
    engine = initialize(model=net, config=settings, resume_from=None if load_later else start_from)
    if load_later:
        one_step(engine, 77)
        engine.load_checkpoint(start_from)
    losses = {}
    while engine.global_steps < stop:
        step = engine.global_steps
        losses[step] = one_step(engine, step).loss
        if engine.global_steps in save_at:
            engine.save_checkpoint(save_dir, client_state={"seen": step}, **options)
    engine.wait_for_checkpoint()
    store = engine.optimizer.store
    state = {
        s: {i: list(store.state_views(s, n)) for n, i in enumerate(engine.plan.owned)}
        for s in ("exp_avg", "exp_avg_sq", "delta_sum")
    }
    return {"losses": losses, "weights": whole_weights(engine), "state": state, "step": engine.global_steps}


def refuse(settings: dict, *, spoil: str | None = None, **options: Any) -> str:
    """The message that a checkpoint is refused with.

    Args:
        spoil: a parameter of the model that gets one other value first.
    """
    import torch

    from hdpissa.engine import ConfigError

    model = build(options.pop("model", None))
    if spoil:
        with torch.no_grad():
            model.get_parameter(spoil)[0, 0] += 1e-3
    try:
        train_on(settings, stop=0, model=model, **options)
    except ConfigError as error:
        return str(error)
    return "nothing was refused"


def resume_here(settings: dict, *, save_dir: str) -> str:
    """The message for a save in the middle of an accumulation."""
    from hdpissa.engine import initialize

    engine = initialize(model=build(None), config=settings)
    engine.backward(engine(**tiny_batch(0, 0, 0)).loss)
    try:
        engine.save_checkpoint(save_dir)
    except RuntimeError as error:
        return str(error)
    return "nothing was refused"
