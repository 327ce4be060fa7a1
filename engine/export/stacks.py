"""The tensors of an adapter's file, streamed slice by slice, and how the file is finished.

A `Stack` says who has which part of a weight's pair: the ranks of a run, or one process that reads a checkpoint.
Only a cut to a smaller rank brings a whole pair (never the weight) together, on rank 0.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError
from ..sharding.slicing import SlicePlan
from .adapter import CONFIG, FILES, WEIGHTS, Adapted, Tail, adapter_config, key_A, key_B, truncate
from .report import ExportReport, Residual
from .streams import DTYPES, PIECE_BYTES, Block, Entry, Outbox, World, collect, dtype_name, whole_on_one


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

    def owner(self, slice_id: int) -> int:
        """The first rank that owns a slice."""
        return next(k for k in range(self.plan.world_size) if slice_id in self.plan.owned_by(k))

    def blocks_A(self, out: torch.dtype) -> Iterator[Block]:
        """A slice at a time, from the first rank that owns it."""
        plan, numel = self.plan, self.adapted.r // self.plan.slices * self.adapted.cols
        for slice_id in range(plan.slices):
            sizes = [0] * plan.world_size
            owner = self.owner(slice_id)
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


def entries(stack: Stack, adapted: Adapted, out: torch.dtype, cut: Cut | None) -> Iterator[Entry]:
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


# --- the file -------------------------------------------------------------------------------------


class AdapterFile:
    """An adapter that is being written: all its tensors first, then whatever is measured on them, then the rest.

    Args:
        dtype: "fp32", "bf16", or "auto": fp32. rank: None, or the components to cut every pair to.

    Raises:
        ConfigError: unknown dtype, a rank below 1; or, on all ranks, rank 0 cannot write there.
    """

    def __init__(self, stacks: Sequence[Stack], folder: Path, world: World, *, dtype: str, rank: int | None) -> None:
        if dtype not in ("auto", *DTYPES):
            raise ConfigError(f"export dtype is {dtype!r}: must be 'auto', 'bf16' or 'fp32'")
        if rank is not None and rank < 1:
            raise ConfigError(f"export rank is {rank}: must be at least 1; leave it out for the whole adapter")
        self.dtype = DTYPES.get(dtype, torch.float32)
        self.cut = Cut(rank, world) if rank is not None else None
        self.adapted = [s.adapted.cut(rank) if rank is not None else s.adapted for s in stacks]
        pairs = zip(stacks, self.adapted, strict=True)
        tensors = [e for stack, adapted in pairs for e in entries(stack, adapted, self.dtype, self.cut)]
        self.nbytes = sum(e.nbytes for e in tensors)
        self.outbox = Outbox(folder, world, nbytes=self.nbytes)
        self.outbox.write(WEIGHTS, tensors)
        self.outbox.agree()

    @property
    def weights(self) -> Path:
        """Where the tensors are until `publish`; on rank 0."""
        return self.outbox.partial / WEIGHTS

    def publish(
        self, modules: Iterable[str], base: str, step: int, residual: Residual | None, unknown: str
    ) -> ExportReport:
        """Writes the rest, and gives the files their places; collective.

        Args:
            modules, base: for `adapter_config`. step: for the report.
            residual, unknown: as measured, or why it was not.
        """
        config = adapter_config(self.adapted, modules, base)
        self.outbox.guard(lambda: (self.outbox.partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n"))
        report = ExportReport(
            "peft",
            str(self.outbox.folder),
            dtype_name(self.dtype),
            self.nbytes,
            r=config["r"],
            residual=residual,
            unknown=unknown,
            truncation=self.cut.tail.relative if self.cut else None,
            step=step,
        )
        self.outbox.publish(report, CONFIG, FILES)
        return report
