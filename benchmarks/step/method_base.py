"""What all methods of a comparison have in common: how they are set up, and what a script does with one.

`methods.build` makes them; `method_zero3` and `method_reference` are what they do.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hdpissa.benchmarks.step import wire
from hdpissa.engine.sharding import zero3

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """What a method is built with.

    Attributes:
        model: folder, hub name, or a shape of `method_models.SHAPES` (random weights, the same for all methods).
        dtype: "fp32" or "bf16", of compute. `reference` is fp32 always, as published.
        r: of a slice or an adapter. slices: None is one per rank.
        lr: learning rate of the first steps. micro_batch: rows of a micro-batch.
        accumulation: micro-batches of a rank per optimizer step.
        seed: of random weights and of an adapter's random initialisation.
        layers: decoder layers that are kept, the first ones; None is all.
        pissa: PEFT's name of the initialisation, "pissa" or "pissa_niter_16", which is approximate and quick.
        random_slices: hd_pissa and reference get random slices instead of singular vectors: what a step costs does not
            depend on them, and decomposing a 7B model takes minutes.
        checkpointing: recompute activations in backward. attention: transformers' name of the implementation.
        zero: keys of DeepSpeed's `zero_optimization` on top of the project's.
    """

    model: str
    dtype: str = "fp32"
    r: int = 16
    slices: int | None = None
    lr: float = 2e-5
    micro_batch: int = 1
    accumulation: int = 1
    seed: int = 0
    layers: int | None = None
    pissa: str = "pissa"
    random_slices: bool = False
    checkpointing: bool = False
    attention: str = "sdpa"
    zero: dict[str, Any] = field(default_factory=dict)


class Method(abc.ABC):
    """One process's handle on a method; `build` makes it. All processes call the same in the same order."""

    def __init__(self, name: str, setting: Setting) -> None:
        self.name, self.setting = name, setting
        self.wire = wire.Wire.of_process()
        self._taken = 0  # micro-batches since the last step
        self._moments: dict[str, list[tuple[Any, Any]]] = {}

    @abc.abstractmethod
    def _forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of a micro-batch, with its graph."""

    @abc.abstractmethod
    def _backward(self, loss: Tensor) -> None:
        """Accumulates gradients."""

    @abc.abstractmethod
    def _step(self) -> None:
        """The optimizer step, and the end of an accumulation."""

    @abc.abstractmethod
    def _groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, which hold the learning rate."""

    @abc.abstractmethod
    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the base model, whole target weight in effect, fp32 on the CPU); collective.

        Adapters are merged: W + scaling · B A.
        """

    def micro_step(self, batch: dict[str, Tensor]) -> Tensor:
        """Forward and backward of one micro-batch; its detached mean loss on this rank.

        Args:
            batch: input_ids, attention_mask and labels, each (rows × length); moved to the device here.
        """
        if self._taken == self.setting.accumulation:
            raise RuntimeError(f"{self.name}: more than {self.setting.accumulation} micro-batches without step()")
        if self._taken == 0:
            self._moments = {}
        start = wire.now()
        loss = self._forward(zero3.to_device(batch))
        middle = wire.now()
        self._backward(loss)
        self._taken += 1
        self._moments.setdefault("forward", []).append((start, middle))
        self._moments.setdefault("backward", []).append((middle, wire.now()))
        return loss.detach()

    def step(self, lr: float | None = None) -> None:
        """The optimizer step after `accumulation` micro-batches; at this learning rate, or the one of before."""
        if self._taken != self.setting.accumulation:
            raise RuntimeError(f"{self.name}: step() after {self._taken} of {self.setting.accumulation} micro-batches")
        for group in self._groups() if lr is not None else ():
            group["lr"] = lr
        start = wire.now()
        with self.wire.timed():
            self._step()
        self._moments["step"] = [(start, wire.now())]
        self._taken = 0

    def phases(self) -> dict[str, float]:
        """Seconds of the last optimizer step: forward and backward of all its micro-batches (with the gathers of
        ZeRO-3 that they wait for), exchange (in collectives of the step), and apply (the rest of the step)."""
        spent = {name: sum(wire.between(*pair) for pair in pairs) for name, pairs in self._moments.items()}
        exchange = self.wire.seconds()
        spent["exchange"] = exchange
        spent["apply"] = spent.pop("step", 0.0) - exchange
        return spent
