"""`SliceOptimizer`: from accumulated factor gradients to changed shards.

One step, in phases:

1. `reduce`   ranks that share a slice sum its gradients (one all-reduce; nothing when S ≥ K);
2. `vote`     one small all-reduce: is every gradient finite, what is the norm, plus the caller's tallies. From its
              result every rank draws the same conclusion: the step is taken, or refused with a reason;
3. `step`     per bucket Adam over the flat buffers → ΔA, ΔB of the own slices, then
              factor buckets: all slices' ΔA and ΔB rows come here, one kernel per weight takes the delta off the shard;
              dense buckets: the own slices' dense delta goes to the shards' owners, summed on the way.

All or nothing: nothing is written before the vote, and the vote refuses what could overflow after it
(`overflow_guard`). A result that is not finite all the same is never written, but counted on the device; the count is
part of the next vote, and any raises on all ranks.

Buffers besides the state are bounded per bucket by `delta.bucket_bytes` (`buckets.Bucket.buffer_bytes`).
The caller drops gathered copies before `step` and fences after it (`zero3`). Where DeepSpeed trains parameters in
full (`modules_to_save`) their gradients are voted on, too, and the caller lets DeepSpeed step after `step`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..comm.buckets import Bucket, Piece
from ..comm.exchange import FactorExchange, predicted_bytes
from ..distributed import faults, heartbeat
from ..method.delta import DeltaRule
from ..precision import full_fp32
from ..sharding.shards import Shard, staging_bytes
from ..sharding.slicing import ShardRange
from . import overflow_guard
from .factors import FactorStore
from .modules_to_save import ModulesToSave
from .overflow_guard import OverflowGuard, WeightBound

NORM_ELEMENTS = 2**24


@dataclass(frozen=True)
class Vote:
    """What all ranks know after the vote.

    Attributes:
        grad_norm: L2 norm over all factor gradients of all slices, each slice once; inf or nan
            when any gradient on any rank is not finite.
        tallies: the caller's numbers, summed over ranks.
        refusal: why the step must not be taken; empty when it may.
    """

    grad_norm: float
    tallies: list[float]
    refusal: str = ""


class StepObserver:
    """Sees what a step makes, and changes none of it (`SliceOptimizer.observers`). This one looks at nothing."""

    def delta(self, bucket: Bucket, delta: Tensor) -> None:
        """Called with the own slices' Δ of each bucket, flat, before it is sent; `store.grads` is still there."""

    def writing(self, shard: Shard, begin: int, end: int) -> AbstractContextManager[None]:
        """Entered around every update of elements [begin, end) of a target's shard."""
        return nullcontext()


class SliceOptimizer(torch.optim.Optimizer):
    """Adam over slice factors whose result goes into W; A_i and B_i themselves never change.

    A torch Optimizer, so that learning-rate schedulers of torch and transformers drive it through
    `param_groups`; there is one group, its parameters are the rank's factor leaves. Constructing it is collective.

    Args:
        store: factors, gradients, moments; `store.targets` must have their shards, and the factors be filled.
        exchange: the collectives.
        rule: betas, eps, second order, dtypes.
        lr: learning rate.
        max_grad_norm: gradients are scaled down to this norm (see `Vote.grad_norm`); 0 turns it off.
        modules_to_save: what DeepSpeed trains; it takes part in the vote, and has the second parameter group, whose
            learning rate schedulers set as well. Its clipping is DeepSpeed's, by its own norm.
    """

    OWN_BALLOT = 3  # numbers of its own in the vote: square of the norm, lost weights, learning rate

    def __init__(
        self,
        store: FactorStore,
        exchange: FactorExchange,
        rule: DeltaRule,
        *,
        lr: float,
        max_grad_norm: float = 0.0,
        modules_to_save: ModulesToSave | None = None,
    ) -> None:
        self.store, self.exchange, self.rule, self.modules_to_save = store, exchange, rule, modules_to_save
        self.max_grad_norm = max_grad_norm
        self.updates = 0  # Adam's t: steps really taken
        self.guard = _measure_weights(store, exchange, rule)
        self._clip = 1.0
        self._change = 0.0  # bound of |ΔA| and |ΔB| in the step that was voted on
        self.largest_grad = 0.0  # bound of any gradient that Adam has seen
        self.observers: list[StepObserver] = []
        self._bad = torch.zeros(1, dtype=torch.int32, device=store.grads.device)
        super().__init__(store.leaves(), {"lr": lr})
        if modules_to_save is not None:
            params, rate = list(modules_to_save.params.values()), modules_to_save.lr
            self.add_param_group({"params": params, "lr": rate, "peak_lr": rate})

    @property
    def grad_scale(self) -> float:
        """Turns the accumulated sums into the slice's own mean.

        DeepSpeed has divided every loss by the rank's gradient_accumulation_steps. A slice that gets 1/c
        of a rank's micro-batches (S = c·K) is owed c times that, one that c ranks share (K = c·S) the
        mean of their sums: S / K either way.
        """
        return self.store.plan.slices / self.store.plan.world_size

    # --- phases 1 and 2 ------------------------------------------------------------------------------

    def reduce(self) -> None:
        """Phase 1: sums the gradients of a shared slice over its ranks."""
        heartbeat.beat("step.reduce")
        first = self.store.buckets[0]
        faults.corrupt_("grad.A", self.store.grads[first.start : first.stop_A])
        faults.corrupt_("grad.B", self.store.grads[first.stop_A : first.stop])
        self.exchange.sum_over_sharers(self.store.grads)

    def vote(self, tallies: Tensor) -> Vote:
        """Phase 2: agrees on norm and finiteness, sets the clip factor for `step`, or refuses the step.

        Args:
            tallies: any float64 numbers of the caller, summed over ranks in the same all-reduce. One that is not
                finite on any rank refuses the step, too: the loss is among them.

        Raises:
            RuntimeError: on all ranks, when an earlier step had results that were not finite.
        """
        heartbeat.beat("step.vote")
        # in pieces: in float64 the whole buffer would be copied at twice its size, at the step's peak of memory
        pieces = self.store.grads.split(NORM_ELEMENTS)
        norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in pieces])
        norm = torch.linalg.vector_norm(norms) * self.grad_scale
        once = norm.square() / self.store.plan.ranks_per_slice  # sharers hold equal copies
        own = [once, self._bad[0].to(once), once.new_full((), abs(self.param_groups[0]["lr"]))]
        if self.modules_to_save is not None:
            own.append(self.modules_to_save.square().to(once))
        ballot = torch.cat([torch.stack(own), tallies.to(once)])
        self.exchange.sum_over_world(ballot)
        squared, lost, lr, *summed = ballot.tolist()
        squared_modules = summed.pop(0) if self.modules_to_save is not None else 0.0
        heartbeat.beat("step.voted")
        _refuse_lost(lost)
        grad_norm = math.sqrt(squared) if math.isfinite(squared) else squared
        clipped = 0 < self.max_grad_norm < grad_norm
        self._clip = self.max_grad_norm / grad_norm if clipped and math.isfinite(grad_norm) else 1.0
        return Vote(grad_norm, summed, _modules_refusal(squared_modules) or self._refusal(grad_norm, lr, summed))

    def _refusal(self, grad_norm: float, lr: float, tallies: list[float]) -> str:
        """Why the step cannot be taken, on all ranks alike; decided from summed numbers only.

        Args:
            lr: the ranks' learning rates added up: no smaller than any of them, and the same number everywhere.
        """
        if not math.isfinite(grad_norm):
            return "a gradient is not finite"
        if not all(map(math.isfinite, tallies)):
            return "a loss is not finite"
        largest = max(self.largest_grad, grad_norm * self._clip)
        if largest > overflow_guard.MAX_GRADIENT:
            return f"gradients of norm {grad_norm:.1e}: their squares would leave fp32"
        change = overflow_guard.max_change(lr, self.rule.betas, self.rule.eps, self.updates + 1, largest)
        target = self.guard.overflowing(change)
        if target is not None:
            return f"learning rate {self.param_groups[0]['lr']:g}: {target} might leave fp32"
        self._change, self.largest_grad = change, largest
        return ""

    def check_weights(self) -> None:
        """Raises RuntimeError on all ranks when a step had results that were not finite; collective.

        The vote does so for all steps before it; this is for the last one.
        """
        lost = self._bad.double()
        self.exchange.sum_over_world(lost)
        _refuse_lost(lost.item())

    # --- phase 3 -------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Phase 3: Adam, exchange, apply, bucket by bucket. Call after a vote that did not refuse."""
        self.updates += 1
        if self.modules_to_save is not None:
            self.modules_to_save.set_lr(self.param_groups[1]["lr"])
        self.guard.grow(self._change)
        with full_fp32():
            for bucket in self.store.buckets:
                heartbeat.beat("step.exchange")
                dtype = self.rule.dtype if bucket.kind == "factor" else torch.float32
                self._apply(bucket, partial(self._adam, bucket, dtype), self.rule)
        heartbeat.beat("step.applied")

    def _apply(self, bucket: Bucket, delta: Callable[[], Tensor], rule: DeltaRule) -> None:
        """Sends Δ of the own slices and takes everybody's off W.

        Args:
            delta: makes it; called once, so that it can be freed as soon as it is sent.
        """
        if bucket.kind == "factor":
            self._apply_factors(bucket, delta, rule)
        else:
            self._apply_dense(bucket, delta, rule)

    def _adam(self, bucket: Bucket, dtype: torch.dtype) -> Tensor:
        """Δ of the own slices, flat, in the layout of `Bucket`; moments and running sums in place."""
        store, here = self.store, slice(bucket.start, bucket.stop)
        delta = self.rule.adam_(
            store.exp_avg[here],
            store.exp_avg_sq[here],
            store.grads[here],
            step=self.updates,
            lr=self.param_groups[0]["lr"],
            grad_scale=self.grad_scale * self._clip,
            dtype=dtype,
        )
        for observer in self.observers:
            observer.delta(bucket, delta)
        store.delta_sum[here] += delta  # as it is sent: what rounding to bf16 took away never reaches W
        return delta

    def _writing(self, shard: Shard, begin: int, end: int) -> ExitStack:
        """Within, elements [begin, end) of a shard change, and all observers know."""
        stack = ExitStack()
        for observer in self.observers:
            stack.enter_context(observer.writing(shard, begin, end))
        return stack

    def _apply_factors(self, bucket: Bucket, delta: Callable[[], Tensor], rule: DeltaRule) -> None:
        """All slices' ΔA and ΔB rows come here."""
        received = self.exchange.factors(bucket, delta())
        heartbeat.beat("step.apply")
        for index, target in enumerate(bucket.targets):
            assert target.shard is not None
            faults.fault("apply.weight")
            factors = self.store.A[target.name], self.store.B_rows[target.name]
            deltas = received.A(index), received.B(index)
            owned = target.own_range(self.store.plan)
            with self._writing(target.shard, 0, owned.numel):
                rule.apply(target.shard, owned, factors, deltas, self._bad, scale=target.scale)
            del deltas  # before the next target's are put together

    def _apply_dense(self, bucket: Bucket, delta_of: Callable[[], Tensor], rule: DeltaRule) -> None:
        """The own slices' delta of every member's shard goes out, the sum of all members' on this shard comes back."""
        delta = delta_of()
        deltas = {t.name: (A, B) for t, A, B in bucket.split(delta)}
        for pieces in bucket.rounds or ():
            heartbeat.progress()
            self._subtract(pieces, self.exchange.reduce_to_owners(self._dense_parts(pieces, deltas, rule)), rule)

    def _dense_parts(self, pieces: list[Piece], deltas: dict[str, tuple[Tensor, Tensor]], rule: DeltaRule) -> Tensor:
        """What the own slices change on each member's pieces (G × elements of a round), in the wire's dtype."""
        plan, dtype = self.store.plan, rule.dtype
        size = sum(p.size for p in pieces)
        parts = torch.empty(plan.group_size, size, dtype=dtype, device=self.store.grads.device)
        at = 0
        for piece in pieces:
            target, column = piece.target, parts[:, at : at + piece.size]
            factors = self.store.A[target.name], self.store.own_B[target.name]
            for rows, where in _cells(piece, plan.group, whole=piece.is_whole(plan)):
                block = rule.dense(where, factors, deltas[target.name], dtype)
                _put(column[rows], block)
                del block
            at += piece.size
        return parts

    def _subtract(self, pieces: list[Piece], summed: Tensor, rule: DeltaRule) -> None:
        plan, at = self.store.plan, 0
        for piece in pieces:
            assert piece.target.shard is not None
            faults.fault("apply.weight")
            D = summed[at : at + piece.of(plan.rank).numel]
            with self._writing(piece.target.shard, piece.begin, piece.begin + D.numel()):
                rule.subtract(piece.target.shard, piece.begin, D, self._bad, scale=piece.target.scale)
            at += piece.size

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Clears the flat gradient buffer; the leaves keep their views of it."""
        self.store.zero_grad()
        if self.modules_to_save is not None:
            self.modules_to_save.zero_grad()

    # --- resuming ------------------------------------------------------------------------------------

    @torch.no_grad()
    def apply_sums(self) -> None:
        """Takes off W what all steps so far have changed to first order, from the running sums; collective.

        W must be the base model's. The sums travel in fp32, whatever the wire's dtype is in training.
        """
        rule = replace(self.rule, second_order=False, dtype=torch.float32)
        with full_fp32():
            for bucket in self.store.buckets:
                self._apply(bucket, self.store.delta_sum[bucket.start : bucket.stop].clone, rule)

    def resume(self, updates: int, largest_grad: float, lr: float) -> None:
        """Goes on after `updates` steps; collective. The weights are in place, their bounds are measured anew."""
        self.updates, self.largest_grad = updates, largest_grad
        self.param_groups[0]["lr"] = lr
        for group in self.param_groups:
            group.pop("initial_lr", None)  # an earlier scheduler's; a new one would begin with that rate
        self.guard = _measure_weights(self.store, self.exchange, self.rule)
        self._bad.zero_()

    @torch.no_grad()
    def restart(self) -> None:
        """Forgets all steps but what they did to W; collective."""
        for moments in (self.store.exp_avg, self.store.exp_avg_sq):
            moments.zero_()
        if self.modules_to_save is not None:
            self.modules_to_save.restart()
        for group in self.param_groups:
            group["lr"] = group.get("peak_lr", self.defaults["lr"])
        self.resume(0, 0.0, self.defaults["lr"])

    # --- figures -------------------------------------------------------------------------------------

    def predicted_bytes(self, tallies: int) -> int:
        """Bytes that this rank sends per step, vote included; see `exchange.predicted_bytes`."""
        ballot = self.OWN_BALLOT + (self.modules_to_save is not None) + tallies
        return predicted_bytes(self.store.targets, self.store.plan, self.rule.dtype.itemsize, ballot=ballot)

    @property
    def collectives(self) -> int:
        """Collective calls per step, vote included."""
        plan = self.store.plan
        exchanged = sum(b.collectives for b in self.store.buckets) if plan.group_size > 1 else 0
        return exchanged + (plan.world_size > 1) + (plan.ranks_per_slice > 1)

    @property
    def buffer_bytes(self) -> int:
        """Most bytes that a step allocates besides the state."""
        device = self.store.grads.device
        parts = (t.shard.parts() for t in self.store.targets if t.shard is not None)
        staged = max(staging_bytes(p, device) for p in parts)
        return staged + max(b.buffer_bytes(self.rule.dtype.itemsize) for b in self.store.buckets)


def _measure_weights(store: FactorStore, exchange: FactorExchange, rule: DeltaRule) -> OverflowGuard:
    """The largest |A|, |B| and |W| of every target on any rank; collective."""
    max_abs = store.max_abs()
    exchange.max_over_world(max_abs)
    weights = [
        WeightBound(t.name, A, B, W, store.plan.slices * t.r, t.scale)
        for t, (A, B, W) in zip(store.targets, max_abs.tolist(), strict=True)
    ]
    return OverflowGuard(weights, second_order=rule.second_order)


def _modules_refusal(squared: float) -> str:
    """Why a step cannot be taken because of the gradients of `modules_to_save`; empty when it can."""
    if not math.isfinite(squared):
        return "a gradient of modules_to_save is not finite"
    if squared > overflow_guard.MAX_GRADIENT**2:
        return f"gradients of modules_to_save of norm {math.sqrt(squared):.1e}: their squares would leave fp32"
    return ""


def _refuse_lost(count: float) -> None:
    if count:
        raise RuntimeError(
            f"{count:.0f} weights were not updated in an earlier step because their new values were not finite: W is "
            f"no longer what the method gives; restart from a checkpoint before that"
        )


def _cells(piece: Piece, group: list[int], *, whole: bool) -> Iterator[tuple[slice, ShardRange]]:
    """(members, flat range of W) to be computed at once: all together where their ranges follow one another."""
    if whole:
        target = piece.target
        yield slice(None), ShardRange(0, target.rows * target.cols, target.cols)
    else:
        yield from ((slice(g, g + 1), piece.of(rank)) for g, rank in enumerate(group))


def _put(cells_GN: Tensor, block: Tensor) -> None:
    """Lays a flat block out over rows of N elements; what it does not fill is padding, zero."""
    width = cells_GN.shape[1]
    full, rest = divmod(block.numel(), width)
    cells_GN[:full].copy_(block[: full * width].view(full, width))
    if full < len(cells_GN):
        cells_GN[full, :rest].copy_(block[full * width :])
        cells_GN[full, rest:].zero_()
        cells_GN[full + 1 :].zero_()
