"""What the ranks of the PEFT export tests do; functions here run inside `ranks.run_ranks`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from engine_runs import whole_weights
from tiny import build, tiny_batch


def train(engine, *, steps: int, lr: float) -> None:
    for step in range(steps):
        engine.optimizer.param_groups[0]["lr"] = lr
        for slice_id, micro in engine.plan.schedule(engine.gradient_accumulation_steps()):
            engine.backward(engine(**tiny_batch(step, slice_id, micro)).loss)
            engine.step()


def train_and_export(settings, source, folder, *, steps=4, lr=1e-3, exports=({},), model=None, pieces=None):
    """Trains a checkpoint (or a fresh model), exports adapters into folder/0, folder/1, …

    Args:
        pieces: (bytes of a piece that is sent, elements of one that is measured).

    Returns: the engine's logits, exact weights (rank 0), the reports, kinds of the updates, (A, ΣΔA, B, ΣΔB).
    """
    from hdpissa.engine import initialize, load_pretrained
    from hdpissa.engine.export import from_engine, residual, writer

    if pieces:
        writer.PIECE_BYTES = pieces[0]
        residual.PIECE_ELEMENTS = pieces[1]
    net = load_pretrained(source, settings) if source else build(model)
    engine = initialize(model=net, config=settings)
    before = whole_weights(engine)
    train(engine, steps=steps, lr=lr)
    engine.eval()
    with torch.no_grad():
        logits = engine(**tiny_batch(999, 0, 0)).logits.float().clone()
    reports = [engine.export(f"{folder}/{i}", format="peft", **options) for i, options in enumerate(exports)]
    sums = from_engine.measure_sums(engine.module, engine.optimizer.store, updates=steps)
    dist.barrier()
    return {
        "logits": logits,
        "before": before,
        "weights": whole_weights(engine),
        "reports": reports,
        "sums": sums,
        "kinds": {t.kind for t in engine.targets},
    }


def export_error(settings, folder, *, model=None, **options):
    """The message with which an export is refused."""
    from hdpissa.engine import ConfigError, initialize

    engine = initialize(model=build(model), config=settings)
    try:
        engine.export(folder, **options)
    except ConfigError as error:
        return str(error)
    return None


def train_and_save(settings, source, folder, *, steps=4, lr=1e-2, kinds=("full", "small"), exports=()):
    """Trains a checkpoint, saves it into folder/<kind>/checkpoint-N, exports into folder/<name> as the engine does.

    Args:
        exports: (name, options of `engine.export`).
    """
    from hdpissa.engine import initialize, load_pretrained

    engine = initialize(model=load_pretrained(source, settings), config=settings)
    train(engine, steps=steps, lr=lr)
    for kind in kinds:
        engine.save_checkpoint(f"{folder}/{kind}", kind=kind)
    engine.eval()
    with torch.no_grad():
        logits = engine(**tiny_batch(999, 0, 0)).logits.float().clone()
    reports = {name: engine.export(f"{folder}/{name}", **options) for name, options in exports}
    dist.barrier()
    return {"logits": logits, "weights": whole_weights(engine), "reports": reports}
