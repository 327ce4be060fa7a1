"""What ranks do in the tests of the comparison's methods (test_methods.py)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from hdpissa.benchmarks.step.methods import Setting, build


def batch(number: int, rows: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    """Of a rank's micro-batch; every rank has another one."""
    generator = torch.Generator().manual_seed(100 * number + dist.get_rank())
    ids = torch.randint(0, 512, (rows, length), generator=generator)
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def train(names: list[str], setting: dict[str, Any], steps: int = 3) -> dict[str, dict[str, Any]]:
    """For each method what it did: losses, weights before and after, bytes and phases of the last step."""
    return {name: train_one(name, Setting(**setting), steps) for name in names}


def train_one(name: str, setting: Setting, steps: int) -> dict[str, Any]:
    """Every step has the same micro-batches, so that a loss shows what has been learned."""
    method = build(name, setting)
    found: dict[str, Any] = {"before": dict(method.weights()), "loss": []}
    for _ in range(steps):
        method.wire.reset()
        found["loss"].append(sum(method.micro_step(batch(micro)).item() for micro in range(setting.accumulation)))
        method.step(lr=setting.lr)
        found |= {"sent": method.wire.sent, "received": method.wire.received, "phases": method.phases()}
    return found | {"engine": getattr(method, "exchange_bytes", None), "after": dict(method.weights())}


def collectives() -> dict[str, tuple[int, int]]:
    """What `Wire` counts of each collective on three ranks: (sent, received) of this one."""
    from hdpissa.benchmarks.step.wire import Wire
    from hdpissa.engine.sharding import zero3

    wire = Wire.of_process()
    zero3.init_distributed()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    four, twelve = torch.ones(4), torch.ones(12)
    rows = [1 + rank] * ranks  # sent to each; of rank q come 1 + q
    uneven = torch.ones(ranks * (1 + rank), 2), torch.empty(sum(1 + q for q in range(ranks)), 2)
    calls = {
        "all_gather": lambda: dist.all_gather([torch.empty(4) for _ in range(ranks)], four),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(torch.empty(12), four),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(torch.empty(4), twelve),
        "all_reduce": lambda: dist.all_reduce(four),
        "all_to_all": lambda: dist.all_to_all_single(uneven[1], uneven[0], [1 + q for q in range(ranks)], rows),
        "broadcast": lambda: dist.broadcast(four, 1),
        "reduce": lambda: dist.reduce(four, 1),
        "barrier": dist.barrier,
    }
    found = {}
    for name, call in calls.items():
        wire.reset()
        with wire.timed():
            call()
        assert wire.seconds() >= 0
        found[name] = (wire.sent, wire.received)
    return found
