"""The trained model as a PEFT LoRA adapter for its unmodified base, streamed slice by slice.

`adapter` says what the adapter is, `streams` how files come about, `residual` how exact it is. Every slice's owner
sends its fixed factors and its running sums of ΔA and ΔB to rank 0, whether a weight's update travels by factors or
dense. Only a cut to a smaller rank brings a weight's whole pair (never the weight) together, on rank 0.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from . import zero3
from .adapter import CONFIG, FILES, WEIGHTS, Adapted, Tail, adapter_config, key_A, key_B, stack_A, stack_B, truncate
from .base_files import BaseFiles
from .buckets import Bucket
from .errors import ConfigError
from .export_report import ExportReport, Residual
from .factors import FactorStore
from .pretrained import agreed, names_by_param
from .residual import Change, measure
from .slicing import ShardRange, SlicePlan
from .streams import DTYPES, PIECE_BYTES, Block, Entry, Outbox, World, collect, dtype_name, whole_on_one
from .targets import Target


def export_peft(
    model: nn.Module, store: FactorStore, folder: Path, *, dtype: str = "auto", rank: int | None = None, updates: int
) -> ExportReport:
    """Writes adapter_model.safetensors and adapter_config.json, verified, with the measured residual; collective.

    Args:
        dtype: "fp32", "bf16", or "auto": fp32.
        rank: None for the whole adapter (2·r·S components per weight), else cut to at most this many.
        updates: steps that have changed W.

    Raises:
        ConfigError: unknown dtype, a rank below 1, a weight that is also an embedding; or, on all ranks, rank 0 cannot
            write there.
    """
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"export dtype is {dtype!r}: must be 'auto', 'bf16' or 'fp32'")
    if rank is not None and rank < 1:
        raise ConfigError(f"export rank is {rank}: must be at least 1; leave it out for the whole adapter")
    plan, out = store.plan, DTYPES.get(dtype, torch.float32)
    world = World(plan.rank, plan.world_size, zero3.device())
    stacks = list(_stacks(model, store, world))
    cut = Cut(rank, world) if rank is not None else None
    adapted = [s.adapted.cut(rank) if rank is not None else s.adapted for s in stacks]
    entries = [e for s, a in zip(stacks, adapted, strict=True) for e in _entries(s, a, out, cut)]
    outbox = Outbox(folder, world, nbytes=sum(e.nbytes for e in entries))
    outbox.write(WEIGHTS, entries)
    outbox.agree()
    base = getattr(model, "name_or_path", "") or ""
    residual, unknown = _measure(model, store, adapted, outbox, updates)
    config = adapter_config(adapted, [n for n, _ in model.named_modules()], base)
    outbox.guard(lambda: (outbox.partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n"))
    report = ExportReport(
        "peft",
        str(folder),
        dtype_name(out),
        sum(e.nbytes for e in entries),
        r=config["r"],
        residual=residual,
        unknown=unknown,
        truncation=cut.tail.relative if cut else None,
    )
    outbox.publish(report, CONFIG, FILES)
    return report


# --- the stacks of one weight ---------------------------------------------------------------------


@dataclass(frozen=True)
class Stack:
    """A weight's pair, as the ranks have it.

    Attributes:
        of_slice: lora_A's rows for the n-th own slice, fp32.
        of_rows: lora_B's columns for all own slices, rows [begin, end), fp32.
    """

    adapted: Adapted
    plan: SlicePlan
    of_slice: Callable[[int], Tensor]
    of_rows: Callable[[int, int], Tensor]

    def blocks_A(self, out: torch.dtype) -> Iterator[Block]:
        """A slice at a time, from the first rank that owns it."""
        plan, numel = self.plan, self.adapted.r // self.plan.slices * self.adapted.cols
        for slice_id in range(plan.slices):
            sizes = [0] * plan.world_size
            owner = next(k for k in range(plan.world_size) if slice_id in plan.owned_by(k))
            sizes[owner] = numel
            yield Block(sizes, functools.partial(self._slice, slice_id - plan.owned_by(owner).start, out))

    def blocks_B(self, out: torch.dtype) -> Iterator[Block]:
        """Some rows at a time, all slices side by side."""
        plan, adapted = self.plan, self.adapted
        step = max(1, PIECE_BYTES // (adapted.r * out.itemsize))
        for first in range(0, adapted.rows, step):
            last = min(first + step, adapted.rows)
            numel = (last - first) * adapted.r // plan.slices * plan.slices_per_rank
            sizes = [0 if k % plan.ranks_per_slice else numel for k in range(plan.world_size)]
            part = functools.partial(self._rows, first, last, out)
            yield Block(sizes, part, rows=last - first)

    def _slice(self, index: int, out: torch.dtype, begin: int, end: int) -> Tensor:
        return self.of_slice(index).flatten()[begin:end].to(out)

    def _rows(self, first: int, last: int, out: torch.dtype, begin: int, end: int) -> Tensor:
        return self.of_rows(first, last).flatten()[begin:end].to(out)


def _stacks(model: nn.Module, store: FactorStore, world: World) -> Iterator[Stack]:
    names = {id(module): name for name, module in model.named_modules()}
    params = names_by_param(model)
    for bucket in store.buckets:
        sums_A = bucket.views_A(store.delta_sum[bucket.start : bucket.stop_A])
        sums_B = bucket.views_B(store.delta_sum[bucket.stop_A : bucket.stop])
        for target, sum_A, sum_B in zip(bucket.targets, sums_A, sums_B, strict=True):
            modules = tuple(names[id(m)] for m in target.modules)
            _refuse_tied(target, modules, params[id(target.param)])
            adapted = Adapted(modules, target.rows, target.cols, 2 * target.r * store.plan.slices, target.scale)
            own_A = functools.partial(_own_A, store, bucket, target, sum_A)
            own_B = functools.partial(_own_B, store.own_B[target.name], sum_B)
            yield Stack(adapted, store.plan, own_A, own_B)


def _refuse_tied(target: Target, modules: tuple[str, ...], names: list[str]) -> None:
    others = set(names) - {f"{m}.weight" for m in modules}
    if others:
        raise ConfigError(
            f"{target.name} shares its weight with {min(others)}, which no LoRA pair of a Linear can change: exclude "
            f"it from hd_pissa.target_modules, or export as 'hf'"
        )


def _own_A(store: FactorStore, bucket: Bucket, target: Target, sum_A: Tensor, index: int) -> Tensor:
    A_SRI = store.A[target.name].view(-1, target.r, target.cols)
    first = store.plan.owned.start if bucket.kind == "factor" else 0
    sums = sum_A.view(-1, target.r, target.cols)
    return stack_A(A_SRI[first + index, None], sums[index, None])


def _own_B(B_SOR: Tensor, sum_B_SOR: Tensor, first: int, last: int) -> Tensor:
    return stack_B(B_SOR[:, first:last], sum_B_SOR[:, first:last])


# --- the tensors of the file ----------------------------------------------------------------------


@dataclass
class Cut:
    """Cuts pairs on rank 0: the one that is being written, and what was left out so far."""

    rank: int
    world: World
    tail: Tail = field(default_factory=Tail)
    pair: tuple[Tensor, Tensor] | None = None

    def prepare(self, stack: Stack) -> None:
        """Brings a weight's pair to rank 0 and cuts it there; collective."""
        full = stack.adapted
        shapes = ("A", (full.r, full.cols), stack.blocks_A), ("B", (full.rows, full.r), stack.blocks_B)
        whole = []
        for name, shape, blocks in shapes:
            entry = Entry(name, shape, torch.float32, functools.partial(blocks, torch.float32))
            pieces = list(collect(entry, self.world))
            whole += [torch.cat(pieces).view(shape)] if pieces else []
        if whole:
            r = full.cut(self.rank).r
            self.pair = truncate(whole[0], whole[1], r, scale=full.scale, tail=self.tail)


def _entries(stack: Stack, adapted: Adapted, out: torch.dtype, cut: Cut | None) -> Iterator[Entry]:
    for name in adapted.names:
        blocks_A: Callable[[], Iterator[Block]] = functools.partial(stack.blocks_A, out)
        blocks_B: Callable[[], Iterator[Block]] = functools.partial(stack.blocks_B, out)
        if cut is not None:
            blocks_A = functools.partial(_cut_blocks, cut, 0, adapted.r * adapted.cols, out, stack)
            blocks_B = functools.partial(_cut_blocks, cut, 1, adapted.r * adapted.rows, out, None)
        yield Entry(key_A(name), (adapted.r, adapted.cols), out, blocks_A)
        yield Entry(key_B(name), (adapted.rows, adapted.r), out, blocks_B)


def _cut_blocks(cut: Cut, index: int, numel: int, out: torch.dtype, stack: Stack | None) -> Iterator[Block]:
    """One half of a cut pair, which is made before its first half and kept for the second."""
    if stack is not None:
        cut.prepare(stack)
    pair = cut.pair
    yield from whole_on_one(lambda: pair[index].to(out), numel, cut.world)  # type: ignore[index]


# --- the residual ---------------------------------------------------------------------------------


def _measure(
    model: nn.Module, store: FactorStore, adapted: list[Adapted], outbox: Outbox, updates: int
) -> tuple[Residual | None, str]:
    """(residual, "") or (None, why it is unknown), alike on all ranks; collective."""
    origin = getattr(model, "name_or_path", "") or ""
    params = names_by_param(model)
    with BaseFiles(origin) as base:
        found = {
            t.name: base.name_of([*params[id(t.param)], *(f"{n}.weight" for n in a.names)], t.rows, t.cols)
            for t, a in zip(store.targets, adapted, strict=True)
        }
        if not agreed(all(found.values())):
            what = f"of the base {origin}" if origin else "since the model was not loaded from a folder or a hub name"
            return None, f"the weights it began with cannot be read again {what}"
        changes = [
            Change(a, t.own_range(store.plan), t.shard_size, _trained(t), functools.partial(_base, base, found[t.name]))
            for t, a in zip(store.targets, adapted, strict=True)
        ]
        try:
            return measure(changes, outbox.partial / WEIGHTS, outbox.world, updates=updates), ""
        except Exception as error:
            if outbox.world.rank:
                raise
            outbox.fail(error)
            return None, ""


def _trained(target: Target) -> Callable[[int, int], Tensor]:
    assert target.shard is not None
    return target.shard.read


def _base(base: BaseFiles, name: str | None, where: ShardRange) -> Tensor:
    assert name is not None
    return base.read(name, where).float()
