"""`SliceOptimizer`: from accumulated factor gradients to changed shards.

One step, in phases:

1. `reduce`   ranks that share a slice sum its gradients (one all-reduce; nothing when S ≥ K);
2. `vote`     one small all-reduce: is every gradient finite, what is the norm, plus the caller's tallies;
3. `step`     per bucket: Adam over the flat buffers → ΔA, ΔB; exchange; each rank takes the delta off
              its own rows of every W.

Nothing is written before the vote, so a step happens on all ranks or on none. Buffers beside the
state: per bucket one flat Δ of the own slices and what the exchange receives (`delta.bucket_bytes`).
The caller drops gathered copies before `step` and fences after it (`zero3`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .delta import DeltaRule
from .exchange import FactorExchange
from .factors import FactorStore
from .targets import Bucket

NORM_ELEMENTS = 2**24


@dataclass(frozen=True)
class Vote:
    """What all ranks know after the vote.

    Attributes:
        grad_norm: L2 norm over all factor gradients of all slices, each slice once; inf or nan
            when any gradient on any rank is not finite.
        tallies: the caller's numbers, summed over ranks.
    """

    grad_norm: float
    tallies: list[float]

    @property
    def finite(self) -> bool:
        """Whether the step may be taken."""
        return math.isfinite(self.grad_norm)


@contextmanager
def _full_fp32() -> Iterator[None]:
    """Products of the update in fp32, whatever the user allows elsewhere: TF32 would cost the delta 13 bits."""
    allowed = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = allowed


class SliceOptimizer(torch.optim.Optimizer):
    """Adam over slice factors whose result goes into W; A_i and B_i themselves never change.

    A torch Optimizer, so that learning-rate schedulers of torch and transformers drive it through
    `param_groups`; there is one group, its parameters are the rank's factor leaves.

    Args:
        store: factors, gradients, moments; `store.targets` must have their shards.
        exchange: the collectives.
        rule: betas, eps, second order.
        lr: learning rate.
        max_grad_norm: gradients are scaled down to this norm (see `Vote.grad_norm`); 0 turns it off.
    """

    def __init__(
        self,
        store: FactorStore,
        exchange: FactorExchange,
        rule: DeltaRule,
        *,
        lr: float,
        max_grad_norm: float = 0.0,
    ) -> None:
        self.store, self.exchange, self.rule = store, exchange, rule
        self.max_grad_norm = max_grad_norm
        self.updates = 0  # Adam's t: steps really taken
        self._clip = 1.0
        super().__init__(store.leaves(), {"lr": lr})

    @property
    def grad_scale(self) -> float:
        """Turns the accumulated sums into the slice's own mean.

        DeepSpeed has divided every loss by the rank's gradient_accumulation_steps. A slice that gets 1/c
        of a rank's micro-batches (S = c·K) is owed c times that, one that c ranks share (K = c·S) the
        mean of their sums: S / K either way.
        """
        return self.store.plan.slices / self.store.plan.world_size

    def reduce(self) -> None:
        """Phase 1: sums the gradients of a shared slice over its ranks."""
        self.exchange.sum_over_sharers(self.store.grads)

    def vote(self, tallies: Tensor) -> Vote:
        """Phase 2: agrees on finiteness and norm, and sets the clip factor for `step`.

        Args:
            tallies: any float64 numbers of the caller, summed over ranks in the same all-reduce.
        """
        # in pieces: in float64 the whole buffer would be copied at twice its size, at the step's peak of memory
        pieces = self.store.grads.split(NORM_ELEMENTS)
        norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in pieces])
        norm = torch.linalg.vector_norm(norms) * self.grad_scale
        once = norm.square() / self.store.plan.ranks_per_slice  # sharers hold equal copies
        ballot = torch.cat([once.view(1), tallies.to(once)])
        self.exchange.sum_over_world(ballot)
        squared, *summed = ballot.tolist()
        grad_norm = math.sqrt(squared) if math.isfinite(squared) else squared
        clipped = 0 < self.max_grad_norm < grad_norm
        self._clip = self.max_grad_norm / grad_norm if clipped and math.isfinite(grad_norm) else 1.0
        return Vote(grad_norm, summed)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Phase 3: Adam, exchange, apply, bucket by bucket. Call after a vote that was finite."""
        self.updates += 1
        with _full_fp32():
            for bucket in self.store.buckets:
                self._step_bucket(bucket)

    def _step_bucket(self, bucket: Bucket) -> None:
        store, plan = self.store, self.store.plan
        here = slice(bucket.start, bucket.stop)
        delta = self.rule.adam_(
            store.exp_avg[here],
            store.exp_avg_sq[here],
            store.grads[here],
            step=self.updates,
            lr=self.param_groups[0]["lr"],
            grad_scale=self.grad_scale * self._clip,
        )
        dA = self.exchange.gather_A(bucket, delta[: bucket.numel_A])
        dB = self.exchange.rows_to_owners(bucket, delta[bucket.numel_A :])
        for target, dA_QI, dB_CQ in zip(bucket.targets, dA, dB, strict=True):
            assert target.shard is not None
            factors = store.A[target.name], store.B_rows[target.name]
            self.rule.apply(target.shard, target.own_range(plan), factors, (dA_QI, dB_CQ), scale=target.scale)

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Clears the flat gradient buffer; the leaves keep their views of it."""
        self.store.grads.zero_()
