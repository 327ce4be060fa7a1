"""The published algorithm, step by step as it is described, in fp32: what our step is compared with.

Our own writing of what the published code does:

* a layer adds x (B A)ᵀ to x Wᵀ: a dense O × I product and a second full product per forward, both again in backward
  for dx, and a dense O × I gradient that becomes grad A = Bᵀ G and grad B = G Aᵀ. The side path is scaled
  down so far that it does not show in the sum, its gradient up by as much;
* Adam layer by layer in Python;
* three dense O × I products per slice and layer, ΔB A, B ΔA and ΔB ΔA, added up and taken off W.

With several processes each holds all of W, sends its slices' ΔA, ΔB, A and B of every layer to all others (`Share`),
and computes everybody's products. One process alone works off all S slices one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

SCALE = 1e-16

Share = Callable[[Tensor], Tensor]  # own slices' matrices (S' × …) → those of all processes (S × …)
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


def random_factors(r: int, slices: int) -> Factors:
    """Entries of the size that those of a real weight's slices have."""

    def draw(linear: nn.Linear) -> tuple[Tensor, Tensor]:
        O, I = linear.weight.shape
        A = linear.weight.new_empty(slices, r, I).normal_(std=0.02)
        return A, linear.weight.new_empty(slices, O, r).normal_(std=0.02)

    return draw


def install(model: nn.Module, suffixes: Sequence[str], compute: Factors) -> list[DensePathLinear]:
    """Freezes the model, and gives the Linears with these names their class and the slices that `compute` finds."""
    model.requires_grad_(False)
    layers = []
    for module in linears(model, suffixes):
        A_SRI, B_SOR = compute(module)
        module.__class__ = DensePathLinear
        assert isinstance(module, DensePathLinear)
        module.A_SRI, module.B_SOR = ([nn.Parameter(part) for part in parts] for parts in (A_SRI, B_SOR))
        module.moments = {id(p): (torch.zeros_like(p), torch.zeros_like(p)) for p in factors(module)}
        module.active = 0
        layers.append(module)
    return layers


def linears(model: nn.Module, suffixes: Sequence[str]) -> Iterator[nn.Linear]:
    """Those with these names, in model order."""
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in suffixes:
            assert isinstance(module, nn.Linear)
            yield module


def factors(layer: DensePathLinear) -> list[nn.Parameter]:
    """All slices' factors."""
    return [*layer.A_SRI, *layer.B_SOR]


def activate(layers: Sequence[DensePathLinear], slice_id: int) -> None:
    """The slice that the next micro-batch feeds."""
    for layer in layers:
        layer.active = slice_id


def alone(own: Tensor) -> Tensor:
    """What a single process shares."""
    return own


@torch.no_grad()
def step(layers: Sequence[DensePathLinear], *, number: int, lr: float = 2e-5, share: Share = alone) -> None:
    """One optimizer step of all slices, layer by layer; `number` counts from 1."""
    for layer in layers:
        own_dA, own_dB = ([_adam(layer, p, number, lr) for p in parts] for parts in (layer.A_SRI, layer.B_SOR))
        own = (own_dA, own_dB, layer.A_SRI, layer.B_SOR)
        every_slice = [share(torch.stack(list(part))) for part in own]
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
