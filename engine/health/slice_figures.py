"""Figures of every slice: how large its gradient and its update are, and how much of W the update moves.

Two observers of the optimizer's step, present only in the steps that are observed:

* `SliceNorms`: the norms of ΔA_i, ΔB_i and of their gradients, one reading of each bucket's buffers;
* `MovedWeights`: the share of the weights whose bf16 half changed, which is what the next forward pass sees: of one
  weight at a time the own shard's half is copied, and compared after the update.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..comm.buckets import Bucket
from ..distributed import heartbeat
from ..optim.optimizer import SliceOptimizer, StepObserver
from ..sharding import zero3
from ..sharding.shards import Shard
from ..sharding.slicing import SlicePlan

if TYPE_CHECKING:
    from ..results import StepResult


class SliceNorms(StepObserver):
    """Norms of the own slices' last update and, if wanted, gradient; no waiting for the device."""

    def __init__(self, optimizer: SliceOptimizer, *, gradients: bool = False) -> None:
        self._optimizer, self._store, self._gradients = optimizer, optimizer.store, gradients
        self._updates: Tensor | None = None
        self._grads: Tensor | None = None

    def delta(self, bucket: Bucket, delta: Tensor) -> None:
        first = bucket is self._store.buckets[0]
        self._updates = self._add(None if first else self._updates, bucket, delta)
        if self._gradients:
            grads = self._store.grads[bucket.start : bucket.stop]
            self._grads = self._add(None if first else self._grads, bucket, grads)

    def _add(self, squares: Tensor | None, bucket: Bucket, flat: Tensor) -> Tensor:
        own = self._store.plan.slices_per_rank
        if squares is None:
            squares = torch.zeros(own, dtype=torch.float64, device=flat.device)
        views = list(bucket.split(flat))
        for part in (*(A for _, A, _ in views), *(B for _, _, B in views)):
            squares += torch.linalg.vector_norm(part.reshape(own, -1), dim=1, dtype=torch.float64).square()
        return squares

    def updates(self) -> list[float]:
        """‖ΔA_i, ΔB_i‖ of every own slice; empty before the first update."""
        return [] if self._updates is None else self._updates.sqrt().tolist()

    def grads(self) -> list[float]:
        """The norm of every own slice's gradient, the mean over its micro-batches, before clipping."""
        return [] if self._grads is None else (self._grads.sqrt() * self._optimizer.grad_scale).tolist()


class MovedWeights(StepObserver):
    """How many weights of the own shards an update changes in bf16; sums stay on the device until they are read."""

    def __init__(self) -> None:
        self._changed: list[Tensor] = []
        self._compared = 0

    @contextlib.contextmanager
    def writing(self, shard: Shard, begin: int, end: int) -> Iterator[None]:
        before = _half(shard, begin, end)
        yield
        if before.numel():
            if before.device != zero3.device():  # what was staged is on its way home
                zero3.fence()
            self._changed.append((before != _half(shard, begin, end)).sum())
            self._compared += before.numel()

    def totals(self) -> tuple[int, int]:
        """(weights changed, weights compared)."""
        return sum(int(count) for count in self._changed), self._compared


def _half(shard: Shard, begin: int, end: int) -> Tensor:
    """A copy of elements [begin, end) as the forward pass sees them in bf16."""
    parts = shard.parts()
    half = next((part for part in parts if part.dtype == torch.bfloat16), parts[0])[begin:end]
    return half.clone() if half.dtype == torch.bfloat16 else half.to(torch.bfloat16)


# --- every N steps ---------------------------------------------------------------------------------


class SliceFigures:
    """Observes every N-th optimizer step; `after` is collective, and returns the same on all ranks.

    Args:
        every: optimizer steps between two observed ones.
        patience: steps with a gradient or update of 0 after which a slice is warned of.
        start: steps done.
    """

    def __init__(self, optimizer: SliceOptimizer, *, every: int, patience: int, start: int) -> None:
        self._optimizer, self._plan, self._every = optimizer, optimizer.store.plan, every
        self._silent = SilentSlices(self._plan, every, patience)
        self._observing: tuple[SliceNorms, MovedWeights] | None = None
        self._prepare(start + 1)

    def _prepare(self, step: int) -> None:
        """Observes the step, if it is its turn; where one was skipped, the next takes its place."""
        if self._observing is None and step % self._every == 0:
            self._observing = SliceNorms(self._optimizer, gradients=True), MovedWeights()
            self._optimizer.observers += self._observing

    def after(self, result: StepResult) -> tuple[dict[str, Any], list[str]] | None:
        """(row of figures, warnings) of a step that was observed; None for any other step."""
        found = self._figures(result, *self._observing) if self._observing is not None and result.applied else None
        self._prepare(result.step + 1)
        return found

    def _figures(self, result: StepResult, norms: SliceNorms, moved: MovedWeights) -> tuple[dict[str, Any], list[str]]:
        begun = time.perf_counter()
        grads, updates, share = self._collect(norms, moved)
        for observer in (norms, moved):
            self._optimizer.observers.remove(observer)
        self._observing = None
        row = {"step": result.step, "slice_grad_norms": grads, "slice_delta_norms": updates, "bf16_moved": share}
        row["seconds"] = round(time.perf_counter() - begun, 4)
        return row, self._silent.see(result.step, grads, updates, result.learning_rate)

    def _collect(self, norms: SliceNorms, moved: MovedWeights) -> tuple[list[float], list[float], float]:
        """(gradient norm of every slice, norm of its update, share of all weights that moved); collective."""
        heartbeat.beat("step.slices")
        plan = self._plan
        found = torch.zeros(2, plan.slices, dtype=torch.float64)
        if plan.replica == 0:  # ranks that share a slice know the same
            own = slice(plan.owned.start, plan.owned.stop)
            found[0, own] = torch.tensor(norms.grads(), dtype=torch.float64)
            found[1, own] = torch.tensor(norms.updates(), dtype=torch.float64)
        counts = torch.tensor(moved.totals(), dtype=torch.float64)
        summed = torch.cat([found.flatten(), counts]).to(zero3.device())
        dist.all_reduce(summed)
        *per_slice, changed, compared = summed.tolist()
        return per_slice[: plan.slices], per_slice[plan.slices :], changed / max(compared, 1.0)


class SilentSlices:
    """Which slices have been silent for long: a slice that gets no gradient, or gives no update, is not trained.

    Args:
        every: optimizer steps between two looks. patience: steps.
    """

    def __init__(self, plan: SlicePlan, every: int, patience: int) -> None:
        self._plan, self._every, self._patience = plan, every, patience
        self._since: dict[int, int] = {}  # slice → first step without gradient or update
        self._warned: set[int] = set()

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
                self._warned.discard(slice_id)
                continue
            since = self._since.setdefault(slice_id, step)
            if step - since + self._every >= self._patience and slice_id not in self._warned:
                self._warned.add(slice_id)
                rank = slice_id * self._plan.ranks_per_slice // self._plan.slices_per_rank
                warnings.append(
                    f"warning: step {step}: slice {slice_id} (rank {rank}) is silent, its {what} was 0 at every check "
                    f"since step {since}: its part of W is not trained; look at its rows and their loss"
                )
        return warnings
