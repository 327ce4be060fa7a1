"""Linears that read the same x (q, k, v; gate, up) as one reading of it, forward and backward.

Which Linears these are is not written in a model, and guessing by name fails with the next architecture. So the
first forward pass is watched: Linears called one after another with the same tensor form a group. From then
on the first of a group computes p for all, and the last whose gradient arrives adds grad A for all.

Nothing is assumed that is not checked again at every call: another tensor than the leader's makes its own p, and
members whose gradient never arrives (an unused output) do not keep the others waiting beyond `flush`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hdpissa.kernels import api as kernels

if TYPE_CHECKING:
    from .layer import LayerFactors


class InputGroup:
    """The Linears that were called with one x, and what their backward passes have delivered so far."""

    def __init__(self, owner: SharedInputs) -> None:
        self._owner = owner
        self.expected = 0
        self._grads: list[Tensor] = []
        self._qs: list[Tensor] = []
        self._x: Tensor | None = None

    def deposit(self, grad_A_RI: Tensor, q_TR: Tensor, x_TI: Tensor) -> None:
        """Takes one member's q; the last one makes all the gradients."""
        self._grads.append(grad_A_RI)
        self._qs.append(q_TR)
        self._x = x_TI
        self._owner.pending.add(self)
        if len(self._qs) == self.expected:
            self.finish()

    def finish(self) -> None:
        """Adds grad A for all that have delivered."""
        assert self._x is not None
        kernels.low_rank_grad_A_(self._grads, self._qs, self._x, impl=self._owner.impl)
        self._grads, self._qs, self._x = [], [], None
        self._owner.pending.discard(self)


class _Leader:
    """The x that is being served, and the p of all members of its group."""

    def __init__(self, x: Tensor, factors: LayerFactors, group: InputGroup, awaited: int) -> None:
        # The tensor itself is held: its memory cannot be given to another one while addresses are compared.
        self.x, self.version = x, x._version
        self.factors, self.group, self.awaited = factors, group, awaited
        self.p: dict[int, Tensor] = {}

    def serves(self, x: Tensor) -> bool:
        """Whether x is the leader's: same memory, same view of it, not written to since."""
        same_view = x.data_ptr() == self.x.data_ptr() and x.shape == self.x.shape and x.stride() == self.x.stride()
        return same_view and x.dtype == self.x.dtype and x._version == self.version


class SharedInputs:
    """Finds the groups of one engine and runs them.

    Args:
        impl: of the kernels.
        share_p: False where each Linear's own product carries its p along (`kernels.linear: "fused"`); the
            gradients of A are still made together.

    Attributes:
        followers: leader's `LayerFactors` (by id) → the others of its group, as learned.
        pending: groups some of whose gradients have arrived.
    """

    def __init__(self, impl: kernels.Impl = "auto", *, share_p: bool = True) -> None:
        self.impl, self.share_p = impl, share_p
        self.followers: dict[int, list[LayerFactors]] = {}
        self.pending: set[InputGroup] = set()
        self._learning = True
        self._leader: _Leader | None = None

    def join(self, x: Tensor, factors: LayerFactors) -> tuple[Tensor | None, InputGroup | None]:
        """Called by a Linear in forward: (its p if a neighbour has computed it, the group it belongs to)."""
        leader = self._leader
        if leader is not None and leader.serves(x):
            if self._learning and id(factors) not in leader.p and factors is not leader.factors:
                self.followers.setdefault(id(leader.factors), []).append(factors)
            leader.group.expected += 1
            leader.awaited -= 1
            if not self._learning and leader.awaited <= 0:
                self._leader = None  # all are served: the activation is not kept for anybody
            return leader.p.pop(id(factors), None), leader.group
        return self._lead(x, factors)

    def _lead(self, x: Tensor, factors: LayerFactors) -> tuple[Tensor | None, InputGroup | None]:
        self._leader = None
        members = [factors, *self.followers.get(id(factors), [])]
        if len(members) == 1 and not self._learning:
            return None, None
        group = InputGroup(self)
        group.expected = 1
        self._leader = _Leader(x, factors, group, len(members) - 1)
        if len(members) == 1 or not self.share_p:
            return None, group
        index = factors.active.index
        A_RI = torch.cat([m.A[index].detach() for m in members])
        p_TR = kernels.low_rank_forward(x.reshape(-1, x.shape[-1]), A_RI, impl=self.impl)
        parts = p_TR.split([m.A[index].shape[0] for m in members], dim=1)
        self._leader.p = {id(m): part for m, part in zip(members[1:], parts[1:], strict=True)}
        return parts[0], group

    def reset(self) -> None:
        """Forgets what a backward pass has left that did not come to its end."""
        self.pending.clear()
        self._leader = None

    def flush(self) -> None:
        """End of a backward pass: groups that wait for a gradient which will not come are finished without it."""
        for group in list(self.pending):
            group.finish()
        self._leader = None
        self._learning = False
