"""The published algorithm on several processes: W whole and in fp32 in each of them, nothing sharded.

What `reference_step` says of one process, and what the published code sends besides: the loss of every micro-batch is
all-reduced, and every step gathers ΔA, ΔB, A and B of each layer. Its rank i has slice i; a process may also have
several slices here, one after another, but slices are never shared.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hdpissa.benchmarks.step import method_models, reference_step
from hdpissa.benchmarks.step.method_base import Method, Setting
from hdpissa.engine.config.section import DEFAULT_TARGETS
from hdpissa.engine.directions import svd
from hdpissa.engine.errors import ConfigError
from hdpissa.engine.sharding.slicing import SlicePlan


class Reference(Method):
    """Attributes: plan: slices and ranks. module: the model, whole."""

    def __init__(self, setting: Setting) -> None:
        super().__init__("reference", setting)
        world = dist.get_world_size()
        self.plan = SlicePlan(world if setting.slices is None else setting.slices, world, dist.get_rank())
        if self.plan.ranks_per_slice > 1:
            raise ConfigError(
                f"reference with {self.plan.slices} slices on {world} processes: the published algorithm has at least "
                f"one slice per process; give --slices {world} or a multiple"
            )
        if setting.lora_alpha not in (None, setting.r):
            raise ConfigError(f"reference with lora_alpha {setting.lora_alpha}: its Adam cancels it; leave it out")
        self._per_slice = self.plan.micro_batches_per_slice(setting.accumulation)
        self.module = method_models.whole_model(setting, torch.float32)
        method_models.prepare(self.module, setting, input_grads=False)
        compute = _random(setting.r, self.plan) if setting.random_slices else _decomposed(setting.r, self.plan)
        self.layers = reference_step.install(self.module, DEFAULT_TARGETS, compute)
        self._options: dict[str, Any] = {"lr": setting.lr}
        self._steps = 0

    def _forward(self, batch: dict[str, Tensor]) -> Tensor:
        reference_step.activate(self.layers, self._taken // self._per_slice)
        return self.module(**batch).loss

    def _backward(self, loss: Tensor) -> None:
        (loss / self._per_slice).backward()
        dist.all_reduce(loss.detach().clone())  # what the published code logs

    def _step(self) -> None:
        self._steps += 1
        reference_step.step(self.layers, number=self._steps, lr=self._options["lr"], share=_gathered)

    def _groups(self) -> list[dict[str, Any]]:
        return [self._options]

    def _evaluate(self, batch: dict[str, Tensor]) -> Tensor:
        self.module.eval()
        loss = self.module(**batch).loss
        self.module.train()
        return loss

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, module in self.module.named_modules():
            if isinstance(module, reference_step.DensePathLinear):
                yield f"{name}.weight", module.weight.detach().float().cpu().clone()


def _gathered(own: Tensor) -> Tensor:
    """The own slices' matrices (S' × …) → those of all ranks (S × …)."""
    every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own)
    return torch.cat(every)


def _decomposed(r: int, plan: SlicePlan) -> reference_step.Factors:
    """The own slices of the singular value decomposition, which every rank computes for itself, as published."""

    def compute(linear: nn.Linear) -> tuple[Tensor, Tensor]:
        W = linear.weight.detach()
        if plan.slices * r > min(W.shape):
            raise ConfigError(f"{plan.slices} slices of rank {r} of a {W.shape[0]} x {W.shape[1]} matrix: give fewer")
        A_SRI, B_SOR = svd.slice_factors(svd.top_triplets(W, plan.slices * r), r)
        own = slice(plan.owned.start, plan.owned.stop)
        return A_SRI[own].clone(), B_SOR[own].clone()

    return compute


def _random(r: int, plan: SlicePlan) -> reference_step.Factors:
    torch.manual_seed(plan.rank)
    return reference_step.random_factors(r, plan.slices_per_rank)
