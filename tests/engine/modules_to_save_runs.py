"""Runs with `modules_to_save`; functions here run inside `ranks.run_ranks`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from engine_runs import whole_weights
from tiny import build, tiny_batch


def train_modules(
    settings: dict,
    *,
    stop: int,
    lr: float,
    model: dict | None = None,
    source: str | None = None,
    poison: tuple[str, int] | None = None,
    checks: bool = False,
    start_from: str | None = None,
    save_to: str | None = None,
    kind: str = "full",
    export_to: str | None = None,
) -> dict[str, Any]:
    """Trains to step `stop`, from the start or a checkpoint.

    Args:
        poison: ("loss" or a parameter's name, step): on the last rank, in that step, the loss or that gradient is nan.
        checks: looks for silent corruption after each step.
        save_to: where to save at the end. export_to: likewise, in fp32.

    Returns: losses, refusals, targets and `modules_to_save` whole, this rank's moments, learning rates.
    """
    from hdpissa.engine import initialize, load_pretrained
    from hdpissa.engine.health import integrity
    from hdpissa.engine.sharding import zero3

    net = load_pretrained(source, settings) if source else build(model)
    engine = initialize(model=net, config=settings, lr=lr, resume_from=start_from)
    modules = engine.optimizer.modules_to_save
    integrity_check = integrity.IntegrityCheck(engine.module, engine.optimizer) if checks else None
    bad = torch.tensor(0.0)
    if poison and poison[0] != "loss":
        modules.params[poison[0]].register_hook(lambda grad: grad + bad.to(grad))
    results = []
    while engine.global_steps < stop:
        step = engine.global_steps
        now = poison is not None and poison[1] == step and dist.get_rank() == dist.get_world_size() - 1
        bad.fill_(float("nan") if now and poison[0] != "loss" else 0.0)
        for slice_id, micro in engine.plan.schedule(engine.gradient_accumulation_steps()):
            loss = engine(**tiny_batch(step, slice_id, micro)).loss
            engine.backward(loss * float("nan") if now and poison[0] == "loss" else loss)
            result = engine.step()
        results.append(result)
        if integrity_check:
            integrity_check.check(step)
    found = {
        "losses": [r.loss for r in results],
        "refusals": [r.refusal for r in results],
        "collectives": [(r.bytes_sent, r.collectives) for r in results],
        "predicted": (engine.exchange_plan().bytes_per_step, engine.exchange_plan().collectives),
        "weights": whole_weights(engine),
        "modules": {name: zero3.whole_value(p).cpu() for name, p in modules.params.items()},
        "compute": {name: zero3.shard_view(p).clone() for name, p in modules.params.items()},
        "own": {(name, state): values.clone() for name, state, values in modules.views()},
        "lrs": [group["lr"] for group in engine.optimizer.param_groups],
        "memory": engine.memory_bytes(),
    }
    if save_to:
        engine.save_checkpoint(save_to, kind=kind)
    if export_to:
        engine.export(export_to, dtype="fp32")
    return found


def refusal(settings: dict, *, model: dict | None = None, detach: bool = False, **options: Any) -> str:
    """The message that a run is refused with.

    Args:
        detach: the output layer is not used.
    """
    from hdpissa.engine import ConfigError, initialize

    try:
        if not detach:
            train_modules(settings, stop=0, lr=1e-3, model=model, **options)
            return "nothing was refused"
        engine = initialize(model=build(model), config=settings)
        hidden = engine(**tiny_batch(0, 0, 0), output_hidden_states=True).hidden_states[-1]
        engine.backward(hidden.square().mean())
        engine.step()
    except (ConfigError, RuntimeError) as error:
        return str(error)
    return "nothing was refused"
