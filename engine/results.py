"""What the engine reports of a step and of its exchange: plain records."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepResult:
    """What happened in one optimizer step; equal on all ranks but for `bytes_sent`.

    Attributes:
        step: optimizer steps done, this one included, skipped ones too.
        applied: whether W was changed. refusal: why it was not (a gradient of any rank not finite, or a
            learning rate that could carry a weight beyond fp32); empty when it was.
        loss: mean over ranks and micro-batches.
        grad_norm: L2 norm over all factor gradients of all slices, before clipping.
        learning_rate: the one used.
        tokens: input tokens of all ranks, padding excluded.
        bytes_sent, collectives: of this rank, see `exchange`.
        interrupted: whether any rank's `request_stop` was called before this step.
        failed_save: what went wrong with a checkpoint that was being saved in the background; else empty.
    """

    step: int
    applied: bool
    refusal: str
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    bytes_sent: int
    collectives: int
    interrupted: bool = False
    failed_save: str = ""


@dataclass(frozen=True)
class ExchangePlan:
    """How the update of every weight travels, decided at the start.

    Attributes:
        factor_targets, dense_targets: weights by kind.
        buckets: they are stepped in.
        collectives: per step, the vote included.
        bytes_per_step: sent by this rank, as the cost model has it; `StepResult.bytes_sent` must equal it.
    """

    factor_targets: int
    dense_targets: int
    buckets: int
    collectives: int
    bytes_per_step: int

    def __str__(self) -> str:
        return (
            f"exchange: {self.factor_targets} weights by factors, {self.dense_targets} dense, in {self.buckets} "
            f"buckets; per step {self.collectives} collectives, {self.bytes_per_step / 2**20:.2f} MiB sent by rank 0"
        )
