"""Rung 1 of the ladder: the method in one process, dense, line by line, in any dtype (float64 in the tests).

Written from the equations alone and sharing no code with the engine: no shards, no ranks, no thin
products. The slice gradients come from the dense G_i = ∂loss/∂W, which the engine never forms.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class OracleSlice:
    A: Tensor  # R x I
    B: Tensor  # O x R
    moments: list[Tensor] = field(default_factory=list)  # m_A, v_A, m_B, v_B


class Oracle:
    """HD-PiSSA on the named weights of a model.

    Args:
        model: trained in place, in its own dtype.
        weights: names of the parameters to train.
        slices, r: S and the rank of one slice.
        scale: lora_alpha / r.
        clip: largest L2 norm over all slices' factor gradients together; 0 for none.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: list[str],
        *,
        slices: int,
        r: int,
        scale: float = 1.0,
        betas=(0.9, 0.999),
        eps: float = 1e-8,
        second_order: bool = True,
        clip: float = 0.0,
    ) -> None:
        self.model, self.weights, self.scale = model, weights, scale
        self.betas, self.eps, self.second_order, self.clip = betas, eps, second_order, clip
        self.step_count = 0
        self.norm = 0.0
        self.parameters = dict(model.named_parameters())
        for p in model.parameters():
            p.requires_grad_(False)
        self.slices: dict[str, list[OracleSlice]] = {}
        for name in weights:
            W = self.parameters[name]
            W.requires_grad_(True)
            U, sigma, Vt = torch.linalg.svd(W.detach(), full_matrices=False)
            self.slices[name] = [
                OracleSlice(
                    A=torch.diag(sigma[i * r : (i + 1) * r].sqrt()) @ Vt[i * r : (i + 1) * r],
                    B=U[:, i * r : (i + 1) * r] @ torch.diag(sigma[i * r : (i + 1) * r].sqrt()),
                )
                for i in range(slices)
            ]

    def step(self, micro_batches: list[list[dict]], lr: float) -> float:
        """One optimizer step; micro_batches[i] are slice i's. Returns the mean loss."""
        self.step_count += 1
        losses: list[float] = []
        grads: list[dict[str, tuple[Tensor, Tensor]]] = []
        for i, batches in enumerate(micro_batches):
            self.model.zero_grad()
            for batch in batches:
                loss = self.model(**batch).loss / len(batches)
                loss.backward()
                losses.append(loss.item() * len(batches))
            grads.append({name: self._factor_grads(name, i) for name in self.weights})
        self.norm = sum(g.square().sum() for per in grads for pair in per.values() for g in pair).sqrt().item()
        factor = min(1.0, self.clip / self.norm) if self.clip else 1.0
        with torch.no_grad():
            for name in self.weights:
                delta = sum(self._delta(s, *grads[i][name], factor, lr) for i, s in enumerate(self.slices[name]))
                self.parameters[name] -= self.scale * delta
        self.model.zero_grad()
        return sum(losses) / len(losses)

    def _factor_grads(self, name: str, i: int) -> tuple[Tensor, Tensor]:
        G, s = self.parameters[name].grad, self.slices[name][i]
        return s.B.T @ G, G @ s.A.T

    def _delta(self, s: OracleSlice, grad_A: Tensor, grad_B: Tensor, factor: float, lr: float) -> Tensor:
        if not s.moments:
            s.moments = [torch.zeros_like(t) for t in (s.A, s.A, s.B, s.B)]
        dA = self._adam(s.moments[0], s.moments[1], grad_A * factor) * lr
        dB = self._adam(s.moments[2], s.moments[3], grad_B * factor) * lr
        delta = dB @ s.A + s.B @ dA
        return delta - dB @ dA if self.second_order else delta

    def _adam(self, m: Tensor, v: Tensor, g: Tensor) -> Tensor:
        b1, b2 = self.betas
        m.mul_(b1).add_((1 - b1) * g)
        v.mul_(b2).add_((1 - b2) * g * g)
        m_hat, v_hat = m / (1 - b1**self.step_count), v / (1 - b2**self.step_count)
        return m_hat / (v_hat.sqrt() + self.eps)
