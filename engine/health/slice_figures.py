"""Figures of every slice: how large its gradient and its update are, and how much of W the update moves.

Everything is seen while the optimizer makes it, so nothing is kept for it:

* the norms of ΔA_i, ΔB_i and of their gradients: one reading of each bucket's buffers (`SliceNorms`, which
  `integrity` uses, too);
* the share of the weights whose bf16 half changed, which is what the next forward pass sees: of one weight at a time
  the own shard's half is copied, and compared after the update (`CountingRule`).

Off, it costs nothing: the rule is the plain one, nobody observes. On, it costs that at every so many steps, and one
small all-reduce.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..comm.buckets import Bucket
from ..distributed import heartbeat
from ..method.delta import DeltaRule
from ..optim.optimizer import SliceOptimizer
from ..sharding import zero3
from ..sharding.shards import Shard
from ..sharding.slicing import ShardRange, SlicePlan


class SliceNorms:
    """Norms of the own slices' last update, collected as the optimizer makes it; one per optimizer (`of`).

    Attributes:
        with_updates, with_grads: what is collected in the steps to come.
    """

    def __init__(self, optimizer: SliceOptimizer) -> None:
        self._optimizer, self._store = optimizer, optimizer.store
        self.with_updates = self.with_grads = False
        self._updates: Tensor | None = None
        self._grads: Tensor | None = None

    @classmethod
    def of(cls, optimizer: SliceOptimizer) -> SliceNorms:
        """The one that observes this optimizer already, or a new one."""
        found = getattr(optimizer.observe, "__self__", None)
        if not isinstance(found, cls):
            found = cls(optimizer)
            optimizer.observe = found.observe
        return found

    def observe(self, bucket: Bucket, delta: Tensor) -> None:
        """Called by the optimizer with each bucket's Δ: one reading of it, no waiting for the device."""
        first = bucket is self._store.buckets[0]
        if self.with_updates:
            self._updates = self._add(None if first else self._updates, bucket, delta)
        if self.with_grads:
            grads = self._store.grads[bucket.start : bucket.stop]
            self._grads = self._add(None if first else self._grads, bucket, grads)

    def _add(self, squares: Tensor | None, bucket: Bucket, flat: Tensor) -> Tensor:
        own = self._store.plan.slices_per_rank
        if squares is None:
            squares = torch.zeros(own, dtype=torch.float64, device=flat.device)
        for part in (*bucket.views_A(flat[: bucket.numel_A]), *bucket.views_B(flat[bucket.numel_A :])):
            squares += torch.linalg.vector_norm(part.reshape(own, -1), dim=1, dtype=torch.float64).square()
        return squares

    def updates(self) -> list[float]:
        """‖ΔA_i, ΔB_i‖ of every own slice; empty before the first update."""
        return [] if self._updates is None else self._updates.sqrt().tolist()

    def grads(self) -> list[float]:
        """The norm of every own slice's gradient, the mean over its micro-batches, before clipping."""
        return [] if self._grads is None else (self._grads.sqrt() * self._optimizer.grad_scale).tolist()


# --- what moves in bf16 ----------------------------------------------------------------------------


@dataclass
class Moved:
    """How many weights of the own shards changed in bf16; sums that stay on their device until they are asked for."""

    changed: list[Tensor] = field(default_factory=list)
    looked_at: int = 0

    def add(self, before: Tensor, after: Tensor) -> None:
        self.changed.append((before != after).sum())
        self.looked_at += before.numel()

    def totals(self) -> tuple[int, int]:
        """(changed, looked at)."""
        return sum(int(count) for count in self.changed), self.looked_at


@dataclass(frozen=True)
class CountingRule(DeltaRule):
    """The same update, which also counts what of W's bf16 halves it changes; holds one weight's half meanwhile."""

    moved: Moved = field(default_factory=Moved)

    @classmethod
    def counting(cls, rule: DeltaRule, moved: Moved) -> CountingRule:
        return cls(**{f.name: getattr(rule, f.name) for f in fields(DeltaRule)}, moved=moved)

    def plain(self) -> DeltaRule:
        return DeltaRule(**{f.name: getattr(self, f.name) for f in fields(DeltaRule)})

    def apply(self, shard: Shard, owned: ShardRange, *update: Any, **scale: Any) -> None:
        with self._counted(shard, 0, owned.numel):
            super().apply(shard, owned, *update, **scale)

    def subtract(self, shard: Shard, begin: int, D: Tensor, *update: Any, **scale: Any) -> None:
        with self._counted(shard, begin, begin + D.numel()):
            super().subtract(shard, begin, D, *update, **scale)

    @contextlib.contextmanager
    def _counted(self, shard: Shard, begin: int, end: int) -> Iterator[None]:
        """Within, elements [begin, end) are changed."""
        before = _half(shard, begin, end)
        yield
        if before.numel():
            if before.device != zero3.device():  # what was staged is on its way home
                zero3.fence()
            self.moved.add(before, _half(shard, begin, end))


def _half(shard: Shard, begin: int, end: int) -> Tensor:
    """A copy of elements [begin, end) as the forward pass sees them in bf16."""
    parts = shard.parts()
    half = next((part for part in parts if part.dtype == torch.bfloat16), parts[0])[begin:end]
    return half.clone() if half.dtype == torch.bfloat16 else half.to(torch.bfloat16)


# --- every N steps ---------------------------------------------------------------------------------


class SliceFigures:
    """Looks at every N-th optimizer step; `after` is collective, and the same on all ranks.

    Args:
        every: optimizer steps between two looks.
        patience: steps with a gradient or update of 0 after which a slice is warned of.
        start: steps done.
    """

    def __init__(self, optimizer: SliceOptimizer, *, every: int, patience: int, start: int) -> None:
        self._optimizer, self._plan, self._every = optimizer, optimizer.store.plan, every
        self._norms = SliceNorms.of(optimizer)
        self._silence = Silence(self._plan, every, patience)
        self._updates_too = self._norms.with_updates  # somebody else wants them in any case
        self._moved: Moved | None = None
        self._prepare(start + 1)

    def _prepare(self, step: int) -> None:
        """Has the step looked at, if it is its turn; one that was skipped is made up for by the next."""
        if self._moved is None and step % self._every == 0:
            self._moved = Moved()
            self._optimizer.rule = CountingRule.counting(self._optimizer.rule, self._moved)
            self._norms.with_updates = self._norms.with_grads = True

    def after(self, result: Any, recorder: Any) -> None:
        """Writes the row of a step that was looked at.

        Args:
            result: of the step.
        """
        if self._moved is not None and result.applied:
            begun = time.perf_counter()
            grads, updates, share = self._collect(self._moved)
            row = {"step": result.step, "slice_grad_norms": grads, "slice_delta_norms": updates, "bf16_moved": share}
            recorder.figures(row | {"seconds": round(time.perf_counter() - begun, 4)})
            for line in self._silence.see(result.step, grads, updates, result.learning_rate):
                recorder.say(line)
            self._stop()
        self._prepare(result.step + 1)

    def _stop(self) -> None:
        assert isinstance(self._optimizer.rule, CountingRule)
        self._optimizer.rule, self._moved = self._optimizer.rule.plain(), None
        self._norms.with_updates, self._norms.with_grads = self._updates_too, False

    def _collect(self, moved: Moved) -> tuple[list[float], list[float], float]:
        """(gradient norm of every slice, norm of its update, share of all weights that moved); collective."""
        heartbeat.reach("step.slices")
        plan = self._plan
        found = torch.zeros(2, plan.slices, dtype=torch.float64)
        if plan.replica == 0:  # ranks that share a slice know the same
            own = slice(plan.owned.start, plan.owned.stop)
            found[0, own] = torch.tensor(self._norms.grads(), dtype=torch.float64)
            found[1, own] = torch.tensor(self._norms.updates(), dtype=torch.float64)
        counts = torch.tensor(moved.totals(), dtype=torch.float64)
        told = torch.cat([found.flatten(), counts]).to(zero3.device())
        dist.all_reduce(told)
        *norms, changed, looked_at = told.tolist()
        return norms[: plan.slices], norms[plan.slices :], changed / max(looked_at, 1.0)


class Silence:
    """Which slices have been silent for long: a slice that gets no gradient, or gives no update, is not trained.

    Args:
        every: optimizer steps between two looks. patience: steps.
    """

    def __init__(self, plan: SlicePlan, every: int, patience: int) -> None:
        self._plan, self._every, self._patience = plan, every, patience
        self._since: dict[int, int] = {}  # slice → first step of its silence
        self._told: set[int] = set()

    def see(self, step: int, grads: Sequence[float], updates: Sequence[float], lr: float) -> list[str]:
        """Warnings, one per slice and silence.

        Args:
            lr: where it is 0, an update of 0 means nothing.
        """
        warnings = []
        for slice_id, (grad, update) in enumerate(zip(grads, updates, strict=True)):
            what = "gradient" if grad == 0 else "update" if update == 0 and lr > 0 else ""
            if not what:
                self._since.pop(slice_id, None)
                self._told.discard(slice_id)
                continue
            since = self._since.setdefault(slice_id, step)
            if step - since + self._every >= self._patience and slice_id not in self._told:
                self._told.add(slice_id)
                rank = slice_id * self._plan.ranks_per_slice // self._plan.slices_per_rank
                warnings.append(
                    f"warning: step {step}: slice {slice_id} (rank {rank}) is silent, its {what} was 0 at every look "
                    f"since step {since}: its part of W is not trained; look at its rows and their loss"
                )
        return warnings
