"""What the ranks of the decomposition tests do; functions here run inside `ranks.run_ranks`."""

from __future__ import annotations

import functools
import logging

import torch
import torch.distributed as dist
from tiny import build, ds_settings


def note(names, name, done, total):
    assert done == len(names) + 1 <= total
    names.append(name)


def slices(several, *, model=None, source=None, scale=1.0, accumulation=1, **hd_pissa):
    """Initialises once per entry of `several` (its `init` section); what each gave, with the messages logged.

    Args:
        source: a folder; {rank} in it is the rank.
        scale: the weights are multiplied by it, as another model of the same shapes.
    """
    from hdpissa.engine import initialize, load_pretrained
    from hdpissa.engine.sharding import zero3

    zero3.init_distributed()
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("hdpissa")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    found = []
    for init in several:
        messages.clear()
        names: list[str] = []
        settings = ds_settings(accumulation=accumulation, init=init, **hd_pissa)
        net = load_pretrained(source.format(rank=dist.get_rank()), settings) if source else build(model)
        if scale != 1.0:
            with torch.no_grad():
                for p in net.parameters():
                    p.mul_(scale)
        engine = initialize(model=net, config=settings, progress=functools.partial(note, names))
        store = engine.optimizer.store
        found.append({
            "A": {n: t.clone() for n, t in store.A.items()},
            "B": {n: t.clone() for n, t in store.own_B.items()},
            "report": engine.init_report,
            "progress": names,
            "messages": [m for m in messages if "slice cache" in m],
        })  # fmt: skip
        dist.barrier()
    return found


def refusal(init, *, poison):
    """The message with which weights that cannot be decomposed are refused, on this rank."""
    from hdpissa.engine import ConfigError, initialize

    net = build({})
    with torch.no_grad():
        net.get_parameter(poison)[0, 0] = float("inf")
    try:
        initialize(model=net, config=ds_settings(init=init))
    except ConfigError as error:
        return str(error)
    return None
