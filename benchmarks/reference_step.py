"""The cost of the published algorithm, step by step as it is described, in fp32: what our step is compared with.

Our own writing of what the published code does, for timing only:

* a layer adds x (B A)ᵀ to x Wᵀ: a dense O × I product and a second full product per forward, both again in backward
  for dx, and a dense O × I gradient that becomes grad A = Bᵀ G and grad B = G Aᵀ. The side path is scaled
  down so far that it does not show in the sum, its gradient up by as much;
* Adam layer by layer in Python;
* three dense O × I products per slice and layer, ΔB A, B ΔA and ΔB ΔA, added up and taken off W.

One process works off all S slices one after another. What the reference's processes send to each other is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

SCALE = 1e-16


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


def install(model: nn.Module, suffixes: Sequence[str], *, r: int, slices: int) -> list[DensePathLinear]:
    """Swaps the class of the Linears with these names, with random slices."""
    model.requires_grad_(False)
    layers = []
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in suffixes:
            assert isinstance(module, nn.Linear)
            module.__class__ = DensePathLinear
            assert isinstance(module, DensePathLinear)
            O, I = module.weight.shape
            module.A_SRI = [nn.Parameter(module.weight.new_empty(r, I).normal_(std=0.02)) for _ in range(slices)]
            module.B_SOR = [nn.Parameter(module.weight.new_empty(O, r).normal_(std=0.02)) for _ in range(slices)]
            module.moments = {id(p): (torch.zeros_like(p), torch.zeros_like(p)) for p in factors(module)}
            module.active = 0
            layers.append(module)
    return layers


def factors(layer: DensePathLinear) -> list[nn.Parameter]:
    """All slices' factors."""
    return [*layer.A_SRI, *layer.B_SOR]


def activate(layers: Sequence[DensePathLinear], slice_id: int) -> None:
    """The slice that the next micro-batch feeds."""
    for layer in layers:
        layer.active = slice_id


@torch.no_grad()
def step(layers: Sequence[DensePathLinear], *, number: int, lr: float = 2e-5) -> None:
    """One optimizer step of all slices, layer by layer; `number` counts from 1."""
    for layer in layers:
        change_OI = torch.zeros_like(layer.weight)
        for A, B in zip(layer.A_SRI, layer.B_SOR, strict=True):
            dA, dB = (_adam(layer, p, number, lr) for p in (A, B))
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
