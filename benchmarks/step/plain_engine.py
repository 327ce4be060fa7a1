"""Our layers and optimizer on a plain model, without DeepSpeed: to time them on one device.

The same parts as `hdpissa.engine.initialize` puts together, with random slices: what a product costs does
not depend on its numbers, and decomposing a 7B model takes minutes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn

from hdpissa.engine import algorithms
from hdpissa.engine.comm.buckets import make_buckets
from hdpissa.engine.comm.exchange import FactorExchange, choose_kinds
from hdpissa.engine.config.section import HDPissaConfig
from hdpissa.engine.directions import decompose
from hdpissa.engine.method import adapt
from hdpissa.engine.optim.factors import FactorStore
from hdpissa.engine.optim.optimizer import SliceOptimizer
from hdpissa.engine.sharding.shards import make_shard
from hdpissa.engine.sharding.slicing import SlicePlan


def random_slices() -> AbstractContextManager[Any]:
    """Within it `initialize` draws slices in place of computing them."""
    return mock.patch.object(decompose, "compute_slices", draw_slices)


def draw_slices(store: FactorStore, exchange: FactorExchange, **_: Any) -> decompose.InitReport:
    """Fills the store with entries of the size that those of a real weight's slices have."""
    for bucket in store.buckets:
        A, B = (torch.empty(n, device=store.grads.device).normal_(std=0.02) for n in (bucket.numel_A, bucket.numel_B))
        store.fill(bucket, A, B, exchange)
    return decompose.InitReport()


def attach(model: nn.Module, *, r: int, slices: int = 1, **section: Any) -> SliceOptimizer:
    """Turns the model's targets into SliceLinears over their own weights, and returns what steps them.

    Args:
        model: whole, on one device; it is frozen and put into training mode.
        section: more of the config's `hd_pissa`.
    """
    hd = HDPissaConfig.from_dict({"r": r, **section})
    plan = SlicePlan(slices, world_size=1, rank=0)
    adapt.freeze(model)
    targets = adapt.find_targets(model, hd, plan)
    for target in targets:
        flat = target.param.data.view(-1)
        target.shard = make_shard(partial(flat.view, -1), flat.float(), format="split", device="auto")
    choose_kinds(targets, plan, hd.delta.exchange)
    rule = algorithms.find(hd.method).update_rule(hd)
    buckets = make_buckets(targets, plan, hd.delta.bucket_bytes, rule.dtype.itemsize)
    store = FactorStore(plan, buckets, flat.device, impl=hd.kernels.impl, linear=hd.kernels.linear)
    exchange = FactorExchange(plan)
    draw_slices(store, exchange)
    adapt.install(targets, store)
    model.train()
    return SliceOptimizer(store, exchange, rule, lr=2e-5)
