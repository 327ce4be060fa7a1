"""`initialize` and `load_pretrained`: from a model and a config to an engine, step by step.

The order matters: what a user can get wrong is found before a weight is touched; targets are found before DeepSpeed
wraps the model; the exact values are in place before anything is decomposed. Owns no state.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import algorithms, checkpointing
from .checkpoint import state
from .checkpoint.reader import CheckpointReader
from .comm.buckets import make_buckets
from .comm.exchange import FactorExchange, choose_kinds
from .config.section import HDPissaConfig
from .distributed import heartbeat
from .engine import HDPissaEngine
from .errors import ConfigError
from .method import adapt, pretrained
from .method.delta import DeltaRule
from .method.targets import Target
from .optim import modules_to_save
from .optim.factors import FactorStore
from .optim.modules_to_save import ModulesToSave
from .optim.optimizer import SliceOptimizer
from .resolved_config import ResolvedConfig, resolve_config
from .sharding import sharded_load, zero3
from .sharding.shards import HostMemory, make_shard
from .sharding.slicing import SlicePlan

logger = logging.getLogger(__name__)
ENGINE = "_hdpissa_engine"  # the attribute by which a model knows its engine


def initialize(
    model: nn.Module,
    config: str | Path | dict,
    *,
    lr: float | None = None,
    resume_from: CheckpointReader | str | Path | None = None,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> HDPissaEngine:
    """Makes an engine out of a model and a DeepSpeed config; collective.

    Called again for the same model and config it returns the model's engine, restarted on the weights as they are
    (`HDPissaEngine.restart`).

    Args:
        model: built under `zero.Init` (see `load_pretrained`), or whole on every rank; then rank 0's
            values are taken and the model is sharded here.
        config: path or dict; DeepSpeed's keys plus the section `hd_pissa`. "auto" values that the
            Trainer would fill become: micro-batch 1, accumulation 1, no clipping, bf16 on a GPU.
        lr: learning rate; default the config's `optimizer.params.lr`, else 2e-5.
        resume_from: a checkpoint, or a folder of them whose latest counts; its factors and state are taken, and
            nothing is decomposed. `engine.load_checkpoint` does the same later, after a decomposition.
        progress: called with each target's name when its slices are ready, how many are, and of how many.

    Raises:
        ConfigError: anything in the config or the model that a user can fix, in one line.
    """
    zero3.init_distributed()
    resolved = resolve_config(config, lr=lr)
    if (known := getattr(model, ENGINE, None)) is not None:
        return _initialize_again(known, resolved, resume_from)
    hd, values, plan = resolved.section, resolved.values, resolved.plan
    for key in resolved.unused if plan.rank == 0 else ():
        logger.warning("%s has no effect: the slices' moments stay on the device", key)
    heartbeat.beat("start.shards", slow=True)
    targets, full = _choose_weights(model, hd, plan)
    ds = _shard(model, resolved, targets)
    base = state.describe_base(model, targets, plan)
    algorithm = algorithms.find(hd.method)
    rule = algorithm.update_rule(hd)
    store, exchange = _make_store(targets, plan, hd, rule), FactorExchange(plan)
    if isinstance(resume_from, str | Path):
        resume_from = state.open_checkpoint(resume_from)
    if resume_from is None:
        report = algorithm.fill_directions(model, hd, store, exchange, progress)
    else:
        numels = {name: zero3.full_numel(p) for name, p in full.items()}
        state.refuse_others(resume_from, store, rule, base, numels)
        report = state.fill_factors(resume_from, store, exchange)
    adapt.install(targets, store)
    rate = hd.modules_to_save_learning_rate or values.learning_rate
    modules = ModulesToSave(full, ds, lr=rate) if full else None
    clip = values.max_grad_norm
    optimizer = SliceOptimizer(
        store, exchange, rule, lr=values.learning_rate, max_grad_norm=clip, modules_to_save=modules
    )
    engine = HDPissaEngine(ds, optimizer, resolved, report=report, base=base)
    setattr(model, ENGINE, engine)
    if resume_from is not None:
        checkpointing.restore(engine, resume_from)
    if plan.rank == 0:
        logger.info("%s", engine.exchange_plan())
    heartbeat.beat("start.ready")
    return engine


def _initialize_again(
    engine: HDPissaEngine, config: ResolvedConfig, resume_from: CheckpointReader | str | Path | None
) -> HDPissaEngine:
    """The engine that the model has already; raises ConfigError where another config asks for another one."""
    if not config.same_run(engine.config):
        raise ConfigError(
            f"initialize was called again for a model that is in training with another config ({engine.config}, now "
            f"{config}): load the model anew, or give the same config"
        )
    engine.optimizer.defaults["lr"] = config.values.learning_rate
    if resume_from is None:
        engine.restart()
    else:
        engine.resume_from(resume_from)
    return engine


def load_pretrained(name_or_path: str, config: str | Path | dict, **kwargs: Any) -> nn.Module:
    """`AutoModelForCausalLM.from_pretrained` with the weights sharded while they are read; collective."""
    from transformers import AutoModelForCausalLM

    zero3.init_distributed()
    settings = resolve_config(config).deepspeed
    heartbeat.beat("start.model", slow=True)
    with sharded_load.reading_own_rows():
        return zero3.load_pretrained(name_or_path, settings, loader=AutoModelForCausalLM, **kwargs)


def _choose_weights(
    model: nn.Module, hd: HDPissaConfig, plan: SlicePlan
) -> tuple[list[Target], dict[str, nn.Parameter]]:
    """(targets, parameters to train in full by name); the rest is frozen. Call before DeepSpeed wraps the model."""
    adapt.freeze(model)
    targets = adapt.find_targets(model, hd, plan)
    for line in adapt.remarks(model, targets, hd, plan) if plan.rank == 0 else []:
        logger.warning("%s", line)
    full = modules_to_save.find(model, hd.modules_to_save, targets)
    for param in full.values():
        param.requires_grad_(True)
    return targets, full


# --- exact values, each rank's own rows ------------------------------------------------------------


def _shard(model: nn.Module, config: ResolvedConfig, targets: list[Target]) -> Any:
    """DeepSpeed's engine around the model, of which every rank has its rows, those of targets in the master format."""
    settings, plan, master = config.deepspeed, config.plan, config.section.master
    kept: dict[int, Tensor] = {}  # id of a target's parameter → exact values of the own range
    if not zero3.is_sharded(model):
        keep = {t.param: slice(t.own_range(plan).start, t.own_range(plan).stop) for t in targets}
        kept = zero3.shard_module(model, settings, keep)
    ds = zero3.wrap(model, settings)
    model.train()
    found = ((t, kept.pop(id(t.param))) for t in targets) if kept else pretrained.exact_values(model, targets, plan)
    host = HostMemory(sum(t.own_range(plan).numel for t in targets), pin=torch.cuda.is_available())
    how: dict[str, Any] = {"format": master.format, "device": master.device, "host": host}
    for target, values in found:
        target.shard = make_shard(zero3.shard_getter(target.param), values, **how)
    return ds


# --- factors ---------------------------------------------------------------------------------------


def _make_store(targets: list[Target], plan: SlicePlan, hd: HDPissaConfig, rule: DeltaRule) -> FactorStore:
    """Room for the factors, bucketed by how each target's deltas will travel; nothing is in it yet."""
    choose_kinds(targets, plan, hd.delta.exchange)
    buckets = make_buckets(targets, plan, hd.delta.bucket_bytes, rule.dtype.itemsize)
    return FactorStore(plan, buckets, zero3.device(), impl=hd.kernels.impl, linear=hd.kernels.linear)
