"""The trained model as a PEFT LoRA adapter for its unmodified base, from a running engine.

`adapter` says what the adapter is, `stacks` how its file comes about, `residual` how exact it is. Every slice's owner
sends its fixed factors and its running sums of ΔA and ΔB to rank 0, whether a weight's update travels by factors or
dense.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import consensus
from ..distributed.faults import fault
from ..errors import ConfigError
from ..method.pretrained import names_by_param
from ..method.targets import Target
from ..optim.factors import FactorStore
from ..sharding import zero3
from ..sharding.base_files import BaseFiles
from ..sharding.slicing import ShardRange
from .adapter import Adapted, stack_A, stack_B
from .report import ExportReport, Residual
from .residual import Change, FilePairs, Pairs, measure
from .stacks import AdapterFile, Stack
from .streams import World


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
    """Writes adapter_model.safetensors and adapter_config.json, verified, with the measured residual; collective.

    Args:
        dtype: "fp32", "bf16", or "auto": fp32.
        rank: None for the whole adapter (2·r·S components per weight), else cut to at most this many.
        step: for the report. updates: steps that have changed W.

    Raises:
        ConfigError: unknown dtype, a rank below 1, a weight that is also an embedding; or, on all ranks, rank 0 cannot
            write there.
    """
    refuse_tied(model, store.targets)
    world = World(store.plan.rank, store.plan.world_size, zero3.device())
    file = AdapterFile(list(_stacks(model, store)), folder, world, dtype=dtype, rank=rank)
    try:
        residual, unknown = _measure(model, store, file.adapted, FilePairs(file.weights, world), updates)
    except Exception as error:
        if world.rank:
            raise
        file.outbox.fail(error)
        residual, unknown = None, ""
    return file.publish([n for n, _ in model.named_modules()], _origin(model), step, residual, unknown)


def _origin(model: nn.Module) -> str:
    return getattr(model, "name_or_path", "") or ""


def _stacks(model: nn.Module, store: FactorStore) -> Iterator[Stack]:
    names = {id(module): name for name, module in model.named_modules()}
    sums: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for index in range(store.plan.slices_per_rank):
        for name, sum_A, sum_B in store.state_views("delta_sum", index):
            sums.setdefault(name, []).append((sum_A, sum_B))
    for target in store.targets:
        modules = tuple(names[id(m)] for m in target.modules)
        rows, cols = (target.cols, target.rows) if target.transposed else (target.rows, target.cols)
        adapted = Adapted(modules, rows, cols, 2 * target.r * store.plan.slices, target.scale, target.transposed)
        of_slice = functools.partial(_of_slice, store, target, sums[target.name])
        of_rows = functools.partial(_of_rows, store, target, sums[target.name])
        yield Stack(adapted, store.plan, of_slice, of_rows)


def refuse_modules_to_save(names: Collection[str]) -> None:
    """Raises ConfigError where something is trained that is not in the adapter."""
    if names:
        raise ConfigError(
            f"an adapter cannot hold hd_pissa.modules_to_save ({', '.join(names)}), what is trained there would be "
            f"lost: export as 'hf', or train without"
        )


def refuse_tied(model: nn.Module, targets: Sequence[Target]) -> None:
    """Raises ConfigError where a target's weight is that of an embedding, too."""
    names = {id(module): name for name, module in model.named_modules()}
    params = names_by_param(model)
    for target in targets:
        others = set(params[id(target.param)]) - {f"{names[id(m)]}.weight" for m in target.modules}
        if others:
            raise ConfigError(
                f"{target.name} shares its weight with {min(others)}, which no LoRA pair of a Linear can change: "
                f"exclude it from hd_pissa.target_modules, or export as 'hf'"
            )


def _of_slice(store: FactorStore, target: Target, sums: list[tuple[Tensor, Tensor]], index: int) -> Tensor:
    factors, which = store.own_factors(target, index), int(target.transposed)
    return stack_A(*(t.t() if target.transposed else t for t in (factors[which], sums[index][which])))


def _of_rows(store: FactorStore, target: Target, sums: list[tuple[Tensor, Tensor]], first: int, last: int) -> Tensor:
    if target.transposed:
        As = [store.own_factors(target, index)[0] for index in range(len(sums))]
        return stack_B([(A.t()[first:last], sum_A.t()[first:last]) for A, (sum_A, _) in zip(As, sums, strict=True)])
    B_SOR = store.own_B[target.name]
    return stack_B([(B[first:last], sum_B[first:last]) for B, (_, sum_B) in zip(B_SOR, sums, strict=True)])


# --- the residual ---------------------------------------------------------------------------------


class LivePairs:
    """The pairs as they are in memory: every slice's owner hands its part to all."""

    problem: Exception | None = None

    def __init__(self, model: nn.Module, store: FactorStore, world: World) -> None:
        self.world = world
        self.stacks = {s.adapted.names[0]: s for s in _stacks(model, store)}

    def read(self, adapted: Adapted, begin: int, end: int) -> tuple[Tensor, Tensor]:
        parts = self.prepare(adapted, begin, end)
        self.share(adapted, begin, parts)
        return self.join(adapted, begin, end, parts)

    # --- `read` in three, for who has to agree with the other ranks before each communicates

    def prepare(self, adapted: Adapted, begin: int, end: int) -> list[tuple[Tensor, Tensor]]:
        """(A, B) of all slices that the components are of: the own ones, and room for those of others."""
        fault("pairs.prepare")
        stack = self.stacks[adapted.names[0]]
        width = adapted.r // stack.plan.slices
        return [self._part(stack, slice_id, width) for slice_id in range(begin // width, -(-end // width))]

    def share(self, adapted: Adapted, begin: int, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Fills that room; collective."""
        stack = self.stacks[adapted.names[0]]
        width = adapted.r // stack.plan.slices
        if stack.plan.world_size > 1:
            for slice_id, (A, B) in enumerate(parts, begin // width):
                dist.broadcast(A, stack.owner(slice_id))
                dist.broadcast(B, stack.owner(slice_id))

    def join(
        self, adapted: Adapted, begin: int, end: int, parts: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """The pair, of just these components."""
        width = adapted.r // self.stacks[adapted.names[0]].plan.slices
        As, Bs = [], []
        for at, (A, B) in zip(range(begin // width * width, end, width), parts, strict=True):
            here = slice(max(0, begin - at), min(width, end - at))
            As.append(A[here])
            Bs.append(B[:, here])
        return torch.cat(As), torch.cat(Bs, 1)

    def _part(self, stack: Stack, slice_id: int, width: int) -> tuple[Tensor, Tensor]:
        plan, adapted = stack.plan, stack.adapted
        if plan.rank == stack.owner(slice_id):
            index = slice_id - plan.owned.start
            B = stack.of_rows(0, adapted.rows)[:, index * width : (index + 1) * width].contiguous()
            return stack.of_slice(index), B
        shapes = (width, adapted.cols), (adapted.rows, width)
        A, B = (torch.empty(shape, device=self.world.device) for shape in shapes)
        return A, B


def measure_sums(model: nn.Module, store: FactorStore, *, updates: int) -> tuple[Residual | None, str]:
    """What the running sums leave out of the change of W, as `_measure`; collective.

    It is what a small checkpoint loses.
    """
    pairs = LivePairs(model, store, World(store.plan.rank, store.plan.world_size, zero3.device()))
    return _measure(model, store, [s.adapted for s in pairs.stacks.values()], pairs, updates)


def _measure(
    model: nn.Module, store: FactorStore, adapted: Sequence[Adapted], pairs: Pairs, updates: int
) -> tuple[Residual | None, str]:
    """(residual, "") or (None, why it is unknown), alike on all ranks; collective."""
    origin = _origin(model)
    params = names_by_param(model)
    weights = list(zip(store.targets, adapted, strict=True))
    with ExitStack() as stack:
        try:
            base = stack.enter_context(BaseFiles(origin))
            found = {t.name: base.name_of(params[id(t.param)], t.rows, t.cols) for t, _ in weights}
        except ConfigError:  # damaged since it was loaded; the other ranks may see it whole
            found = {"": None}
        if not consensus.all_ranks(all(found.values())):
            what = f"of the base {origin}" if origin else "since the model was not loaded from a folder or a hub name"
            return None, f"the weights it began with cannot be read again {what}"
        changes = [
            Change(a, t.own_range(store.plan), t.shard_size, _trained(t), functools.partial(_base, base, found[t.name]))
            for t, a in weights
        ]
        return measure(changes, pairs, updates=updates), ""


def _trained(target: Target) -> Callable[[int, int], Tensor]:
    assert target.shard is not None
    return target.shard.read


def _base(base: BaseFiles, name: str | None, where: ShardRange) -> Tensor:
    assert name is not None
    return base.read(name, where).float()
