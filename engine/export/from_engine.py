"""Exports from a running engine: each rank sends its shards, or its slices, to rank 0.

No process holds more than its shard of a tensor. An adapter's slices are their owners' fixed factors and running sums
of ΔA and ΔB.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import consensus
from ..errors import ConfigError
from ..method.pretrained import names_by_param
from ..method.targets import Target
from ..optim.factors import FactorStore
from ..sharding import zero3
from ..sharding.base_files import BaseFiles
from ..sharding.slicing import ShardRange, SlicePlan
from .hf_folder import write_folder
from .lora_adapter import Measured, write_adapter
from .lora_format import LoraWeight
from .lora_pairs import FilePairs, MemoryPairs, Pair
from .report import ExportReport
from .residual import Change, measure
from .writer import Block, Entry, World, on_rank0, resolve_dtype


def world_of(plan: SlicePlan) -> World:
    return World(plan.rank, plan.world_size, zero3.device())


# --- a Hugging Face folder -------------------------------------------------------------------------


def export_hf(
    model: nn.Module, targets: Sequence[Target], plan: SlicePlan, folder: Path, *, dtype: str, step: int
) -> ExportReport:
    """Writes and verifies the folder; collective.

    Args:
        dtype: "bf16", "fp32" or "auto" (the compute dtype). Under bf16 compute "fp32" gives the exact master of every
            target and of `modules_to_save`; everything else has only its bf16 value.
        step: for the report.

    Raises:
        ConfigError: on all ranks: unknown dtype, or rank 0 cannot write there.
    """
    out = resolve_dtype(dtype, zero3.shard_view(targets[0].param).dtype)
    world = world_of(plan)
    entries = list(_entries(model, targets, world, out))
    return write_folder(
        entries, folder, world, lambda partial: _save_configs(model, out, partial), dtype=out, step=step
    )


def _entries(model: nn.Module, targets: Sequence[Target], world: World, out: torch.dtype) -> Iterator[Entry]:
    """Every parameter once (tied ones under their first name) and every persistent buffer."""
    exact = {id(t.param): t for t in targets}
    for name, param in model.named_parameters():
        sizes = [ShardRange.of(k, world.size, zero3.full_numel(param), 1).numel for k in range(world.size)]
        block = Block(sizes, functools.partial(_shard, param, exact.get(id(param)), out))
        yield Entry(name, tuple(zero3.full_shape(param)), out, functools.partial(iter, [block]))
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in saved:  # replicated, so rank 0 has it
            part = functools.partial(_elements, buffer)
            yield Entry(
                name, tuple(buffer.shape), buffer.dtype, functools.partial(on_rank0, buffer.numel(), part, world)
            )


def _elements(tensor: Tensor, begin: int, end: int) -> Tensor:
    return tensor.flatten()[begin:end]


def _shard(param: nn.Parameter, target: Target | None, out: torch.dtype, begin: int, end: int) -> Tensor:
    """Elements [begin, end) of this rank's shard of a parameter."""
    if target is not None and target.shard is not None and out == torch.float32:
        return target.shard.read(begin, end)
    if param.requires_grad and out == torch.float32:
        return zero3.trained_state(param)[begin:end]
    return zero3.shard_view(param)[begin:end].to(out)


def _save_configs(model: nn.Module, dtype: torch.dtype, folder: Path) -> None:
    config = copy.deepcopy(getattr(model, "config", None))
    if config is None:  # a plain torch module
        return
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)  # type: ignore[union-attr,operator]


# --- an adapter ------------------------------------------------------------------------------------


def export_peft(
    model: nn.Module,
    store: FactorStore,
    folder: Path,
    *,
    dtype: str = "auto",
    rank: int | None = None,
    step: int,
    updates: int,
) -> ExportReport:
    """Writes and verifies the adapter with its measured residual; collective.

    Args:
        dtype: "fp32", "bf16", or "auto": fp32.
        rank: None for the whole adapter (2·r·S components per weight), else cuts it to at most this many.
        step: for the report. updates: steps that have changed W.

    Raises:
        ConfigError: on all ranks: unknown dtype, a rank below 1, or rank 0 cannot write there.
    """
    world = world_of(store.plan)
    return write_adapter(
        list(pairs_of(model, store)),
        folder,
        world,
        lambda weights, pairs: _measure(model, store, weights, pairs, updates),
        dtype=dtype,
        rank=rank,
        modules=[name for name, _ in model.named_modules()],
        base=_origin(model),
        step=step,
    )


def _origin(model: nn.Module) -> str:
    return getattr(model, "name_or_path", "") or ""


def pairs_of(model: nn.Module, store: FactorStore) -> Iterator[Pair]:
    """Every target's pair: the fixed factors, and the running sums of their changes."""
    names = {id(module): name for name, module in model.named_modules()}
    sums = [
        {name: (sum_A, sum_B) for name, sum_A, sum_B in store.state_views("delta_sum", index)}
        for index in range(store.plan.slices_per_rank)
    ]
    for t in store.targets:
        modules = tuple(names[id(m)] for m in t.modules)
        rows, cols = (t.cols, t.rows) if t.transposed else (t.rows, t.cols)
        weight = LoraWeight(modules, rows, cols, 2 * t.r * store.plan.slices, t.scale, t.transposed)
        yield Pair(weight, store.plan, functools.partial(_factors, store, t, sums))


def _factors(store: FactorStore, target: Target, sums: list, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (A, B), (sum_A, sum_B) = store.own_factors(target, index), sums[index][target.name]
    return A, sum_A, B, sum_B


# --- the residual ---------------------------------------------------------------------------------


def measure_sums(model: nn.Module, store: FactorStore, *, updates: int) -> Measured:
    """What the running sums, and so a small checkpoint, leave out of the change of W; collective."""
    pairs, world = list(pairs_of(model, store)), world_of(store.plan)
    return _measure(model, store, [pair.weight for pair in pairs], MemoryPairs(pairs, world), updates)


def _measure(
    model: nn.Module, store: FactorStore, weights: Sequence[LoraWeight], pairs: FilePairs, updates: int
) -> Measured:
    """The residual, the same on all ranks; collective."""
    origin = _origin(model)
    params = names_by_param(model)
    with ExitStack() as stack:
        try:
            base = stack.enter_context(BaseFiles(origin))
            found = {t.name: base.name_of(params[id(t.param)], t.rows, t.cols) for t in store.targets}
        except ConfigError:  # damaged since it was loaded; other ranks may see it whole
            found = {"": None}
        if not consensus.all_ranks(all(found.values())):
            what = f"of the base {origin}" if origin else "since the model was not loaded from a folder or a hub name"
            return None, f"the weights it began with cannot be read again {what}"
        changes = []
        for t, weight in zip(store.targets, weights, strict=True):
            start = functools.partial(_base_values, base, str(found[t.name]))
            changes.append(Change(weight, t.own_range(store.plan), t.shard_size, t.shard.read, start))  # type: ignore[union-attr]
        return measure(changes, pairs, updates=updates), ""


def _base_values(base: BaseFiles, name: str, where: ShardRange) -> Tensor:
    return base.read(name, where).float()
