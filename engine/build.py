"""`initialize` and `load_pretrained`: from a model and a config to an engine, step by step.

The order matters: what a person can get wrong is found before a weight is touched; targets are found before DeepSpeed
wraps the model; the exact values are in place before anything is decomposed. Owns no state.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from . import (
    adapt,
    base_files,
    checkpoint,
    decompose,
    ds_config,
    modules_to_save,
    pretrained,
    pulse,
    sharded_load,
    zero3,
)
from .buckets import make_buckets
from .checkpoint_format import CheckpointReader
from .config import HDPissaConfig
from .engine import HDPissaEngine
from .exchange import FactorExchange, choose_kinds
from .factors import FactorStore
from .modules_to_save import ModulesToSave
from .optimizer import SliceOptimizer
from .settings import check_kernels, make_plan, make_rule, resolve_config
from .shards import make_shard
from .slice_cache import SliceCache, identity
from .slicing import SlicePlan
from .targets import Target

logger = logging.getLogger(__name__)


def initialize(
    model: nn.Module,
    config: str | Path | dict,
    *,
    lr: float | None = None,
    resume_from: CheckpointReader | str | Path | None = None,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> HDPissaEngine:
    """Makes an engine out of a model and a DeepSpeed config; collective.

    Args:
        model: built under `zero.Init` (see `load_pretrained`), or whole on every rank; then rank 0's
            values are taken and the model is sharded here.
        config: path or dict; DeepSpeed's keys plus the section `hd_pissa`. "auto" values that the
            Trainer would fill become: micro-batch 1, accumulation 1, no clipping.
        lr: learning rate; default the config's `optimizer.params.lr`, else 2e-5.
        resume_from: a checkpoint, or a folder of them whose latest counts; its factors and state are taken, and
            nothing is decomposed. `engine.load_checkpoint` does the same later, after a decomposition.
        progress: called with each target's name when its slices are ready, how many are, and of how many.

    Raises:
        ConfigError: anything in the config or the model that a user can mend, in one line.
    """
    zero3.init_distributed()
    settings, hd, values = resolve_config(config, lr=lr)
    plan = make_plan(hd, values.gradient_accumulation_steps)
    check_kernels(hd)
    if plan.rank == 0 and "offload_optimizer" in ds_config.read_ds_config(config).get("zero_optimization", {}):
        logger.warning("zero_optimization.offload_optimizer has no effect: the slices' moments stay on the device")
    pulse.reach("start.shards", slow=True)
    adapt.freeze(model)
    targets = adapt.find_targets(model, hd, plan)
    for line in adapt.remarks(model, targets, hd, plan) if plan.rank == 0 else []:
        logger.warning("%s", line)
    beside = modules_to_save.find(model, hd.modules_to_save, targets)
    for param in beside.values():
        param.requires_grad_(True)
    kept = _shard(model, settings, targets, plan)
    zero3.attach_anchor(model, settings)
    ds = zero3.wrap(model, settings)
    model.train()
    _attach_shards(model, targets, plan, kept, hd)
    base = checkpoint.describe_base(model, targets, plan)
    choose_kinds(targets, plan, hd.delta.exchange)
    rule = make_rule(hd)
    buckets = make_buckets(targets, plan, hd.delta.bucket_bytes, rule.dtype.itemsize)
    store = FactorStore(plan, buckets, zero3.device(), impl=hd.kernels.impl, linear=hd.kernels.linear)
    exchange = FactorExchange(plan)
    if isinstance(resume_from, str | Path):
        resume_from = checkpoint.open_checkpoint(resume_from)
    if resume_from is not None:
        numels = {name: zero3.full_numel(p) for name, p in beside.items()}
        checkpoint.refuse_others(resume_from, store, rule, base, numels)
        report = checkpoint.fill_factors(resume_from, store, exchange)
    else:
        report = decompose.compute_slices(
            store,
            exchange,
            method=hd.init.method,
            tol=hd.init.tol,
            placement=hd.init.placement,
            cache=_slice_cache(hd, model, store),
            progress=progress,
        )
    adapt.install(targets, store)
    rate = hd.modules_to_save_learning_rate or values.learning_rate
    optimizer = SliceOptimizer(
        store,
        exchange,
        rule,
        lr=values.learning_rate,
        max_grad_norm=values.max_grad_norm,
        beside=ModulesToSave(beside, ds, lr=rate) if beside else None,
    )
    accumulation = values.gradient_accumulation_steps
    engine = HDPissaEngine(ds, optimizer, plan, accumulation=accumulation, report=report, base=base)
    if resume_from is not None:
        engine.restore(resume_from)
    if plan.rank == 0:
        logger.info("%s", engine.exchange_plan())
    pulse.reach("start.ready")
    return engine


def _slice_cache(hd: HDPissaConfig, model: nn.Module, store: FactorStore) -> SliceCache | None:
    if hd.init.cache_dir is None:
        return None
    # Rank 0's word counts: other hosts may have copies of the files, with times of their own.
    told: list[Any] = [None]
    if store.plan.rank == 0:
        told[0] = identity(base_files.checkpoint_files(getattr(model, "name_or_path", "") or "").values())
    dist.broadcast_object_list(told, 0)
    how = {"slices": store.plan.slices, "method": hd.init.method, "tol": hd.init.tol}
    return SliceCache(hd.init.cache_dir, store.targets, origin=told[0], how=how)


def load_pretrained(name_or_path: str, config: str | Path | dict, **kwargs: Any) -> nn.Module:
    """`AutoModelForCausalLM.from_pretrained` with the weights sharded while they are read; collective."""
    from transformers import AutoModelForCausalLM

    zero3.init_distributed()
    settings, hd, values = resolve_config(config)
    make_plan(hd, values.gradient_accumulation_steps)  # what does not fit is told before anything is read
    check_kernels(hd)
    pulse.reach("start.model", slow=True)
    with sharded_load.reading_own_rows():
        return zero3.load_pretrained(name_or_path, settings, loader=AutoModelForCausalLM, **kwargs)


def _shard(model: nn.Module, settings: dict, targets: list[Target], plan: SlicePlan) -> dict[int, Tensor]:
    """Shards a model that is still whole; id of each target's parameter → exact values of the own range."""
    if zero3.is_sharded(model):
        return {}
    keep = {t.param: slice(t.own_range(plan).start, t.own_range(plan).stop) for t in targets}
    return zero3.shard_module(model, settings, keep)


def _attach_shards(
    model: nn.Module, targets: list[Target], plan: SlicePlan, kept: dict[int, Tensor], hd: HDPissaConfig
) -> None:
    found = ((t, kept.pop(id(t.param))) for t in targets) if kept else pretrained.exact_values(model, targets, plan)
    for target, values in found:
        compute = zero3.shard_getter(target.param)
        target.shard = make_shard(compute, values, format=hd.master.format, device=hd.master.device)
