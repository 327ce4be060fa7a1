"""The published algorithm, our own writing of it, in fp32: what our step is compared with.

* A layer adds x (B A)ᵀ to x Wᵀ: a dense O × I product and a second full product per forward, both again in backward
  for dx, and a dense O × I gradient that becomes grad A = Bᵀ G and grad B = G Aᵀ. The side path is scaled
  down so far that it does not show in the sum, its gradient up by as much.
* Adam layer by layer in Python.
* Three dense O × I products per slice and layer, ΔB A, B ΔA and ΔB ΔA, added up and taken off W.
* Each process holds all of W, gathers every slice's ΔA, ΔB, A and B of each layer, and computes everybody's products.
  The loss of every micro-batch is all-reduced.

Its rank i has slice i; a process may also have several slices here, one after another, but slices are never shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hdpissa.benchmarks.step import method_models
from hdpissa.benchmarks.step.method_base import Method, Setting
from hdpissa.engine.config.section import DEFAULT_TARGETS
from hdpissa.engine.directions import svd
from hdpissa.engine.errors import ConfigError
from hdpissa.engine.sharding.slicing import SlicePlan

SCALE = 1e-16

Factors = Callable[[nn.Linear], tuple[Tensor, Tensor]]  # a Linear → its own slices' A (S' × R × I) and B (S' × O × R)


class DensePathLinear(nn.Linear):
    """A frozen Linear with the slices' dense side path; made by `install`."""

    A_SRI: list[nn.Parameter]
    B_SOR: list[nn.Parameter]
    moments: dict[int, tuple[Tensor, Tensor]]
    active: int

    def forward(self, x: Tensor) -> Tensor:
        """y = x Wᵀ + 1e-16 · x (B_i A_i)ᵀ for the active slice i."""
        dense_OI = (self.B_SOR[self.active] @ self.A_SRI[self.active]) * SCALE
        return nn.functional.linear(x, self.weight, self.bias) + nn.functional.linear(x, dense_OI)


def install(model: nn.Module, compute: Factors) -> list[DensePathLinear]:
    """Freezes the model, and gives its targets their class and the slices that `compute` finds."""
    model.requires_grad_(False)
    layers = []
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in DEFAULT_TARGETS:
            assert isinstance(module, nn.Linear)
            A_SRI, B_SOR = compute(module)
            module.__class__ = DensePathLinear
            assert isinstance(module, DensePathLinear)
            module.A_SRI, module.B_SOR = ([nn.Parameter(part) for part in parts] for parts in (A_SRI, B_SOR))
            factors = (*module.A_SRI, *module.B_SOR)
            module.moments = {id(p): (torch.zeros_like(p), torch.zeros_like(p)) for p in factors}
            module.active = 0
            layers.append(module)
    return layers


@torch.no_grad()
def step(layers: Sequence[DensePathLinear], *, number: int, lr: float) -> None:
    """One optimizer step of all slices, layer by layer; `number` counts from 1."""
    for layer in layers:
        own_dA, own_dB = ([_adam(layer, p, number, lr) for p in parts] for parts in (layer.A_SRI, layer.B_SOR))
        own = (own_dA, own_dB, layer.A_SRI, layer.B_SOR)
        every_slice = [_gathered(torch.stack(list(part))) for part in own]
        change_OI = torch.zeros_like(layer.weight)
        for dA, dB, A, B in zip(*every_slice, strict=True):
            change_OI += dB @ A + B @ dA - dB @ dA
        layer.weight -= change_OI


def _adam(layer: DensePathLinear, factor: nn.Parameter, number: int, lr: float) -> Tensor:
    """ΔA or ΔB by bias-corrected Adam, one pass per operation."""
    exp_avg, exp_avg_sq = layer.moments[id(factor)]
    assert factor.grad is not None
    grad = factor.grad / SCALE
    exp_avg.mul_(0.9).add_(grad, alpha=0.1)
    exp_avg_sq.mul_(0.999).addcmul_(grad, grad, value=0.001)
    factor.grad = None
    return lr * (exp_avg / (1 - 0.9**number)) / ((exp_avg_sq / (1 - 0.999**number)).sqrt() + 1e-8)


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
        self._per_slice = self.plan.micro_batches_per_slice(setting.accumulation)
        self.module = method_models.whole_model(setting, torch.float32)
        method_models.prepare(self.module, setting, input_grads=False)
        compute = _random(setting.r, self.plan) if setting.random_slices else _decomposed(setting.r, self.plan)
        self.layers = install(self.module, compute)
        self._options: dict[str, Any] = {"lr": setting.lr}
        self._steps = 0

    def _forward(self, batch: dict[str, Tensor]) -> Tensor:
        for layer in self.layers:
            layer.active = self._taken // self._per_slice
        return self.module(**batch).loss

    def _backward(self, loss: Tensor) -> None:
        (loss / self._per_slice).backward()
        dist.all_reduce(loss.detach().clone())  # what the published code logs

    def _step(self) -> None:
        self._steps += 1
        step(self.layers, number=self._steps, lr=self._options["lr"])

    def _groups(self) -> list[dict[str, Any]]:
        return [self._options]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, module in self.module.named_modules():
            if isinstance(module, DensePathLinear):
                yield f"{name}.weight", module.weight.detach().float().cpu().clone()


def _gathered(own: Tensor) -> Tensor:
    """The own slices' matrices (S' × …) → those of all ranks (S × …)."""
    every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own)
    return torch.cat(every)


def _decomposed(r: int, plan: SlicePlan) -> Factors:
    """The own slices of the singular value decomposition, which every rank computes for itself, as published."""

    def compute(linear: nn.Linear) -> tuple[Tensor, Tensor]:
        W = linear.weight.detach()
        if plan.slices * r > min(W.shape):
            raise ConfigError(f"{plan.slices} slices of rank {r} of a {W.shape[0]} x {W.shape[1]} matrix: give fewer")
        A_SRI, B_SOR = svd.slice_factors(svd.top_triplets(W, plan.slices * r), r)
        own = slice(plan.owned.start, plan.owned.stop)
        return A_SRI[own].clone(), B_SOR[own].clone()

    return compute


def _random(r: int, plan: SlicePlan) -> Factors:
    """Entries of the size that those of a real weight's slices have."""
    torch.manual_seed(plan.rank)

    def draw(linear: nn.Linear) -> tuple[Tensor, Tensor]:
        (O, I), own = linear.weight.shape, plan.slices_per_rank
        A = linear.weight.new_empty(own, r, I).normal_(std=0.02)
        return A, linear.weight.new_empty(own, O, r).normal_(std=0.02)

    return draw
