"""The factors a rank keeps, their gradients, moments and running sums, in as few buffers as there are uses for them.

For the slices it owns a rank holds the whole `B` (own × O × R), because gradients need it, and `A`. For the exchange
of thin factors it also keeps the fixed factors that every step's delta needs: `A` of all slices (Q × I) and the
rows of all slices' `B` that its shard touches (C × Q); a target whose delta travels dense needs neither. Gradients and
moments of the own slices lie in flat fp32 buffers in bucket order, so that one kernel walks over all
layers; autograd adds straight into them through the leaves' `.grad`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hdpissa.kernels import api as kernels
from hdpissa.kernels.available import uses_triton

from ..comm.buckets import Bucket
from ..comm.exchange import FactorExchange
from ..method.layer import ActiveSlice, LayerFactors
from ..method.shared_input import SharedInputs
from ..method.targets import Target
from ..sharding.slicing import SlicePlan


class FactorStore:
    """All factors of one rank.

    Attributes:
        grads, exp_avg, exp_avg_sq, delta_sum: flat fp32, own slices of all targets, in the layout of `Bucket`;
            `delta_sum` is the sum of every ΔA and ΔB so far, which small checkpoints and PEFT adapters are made of.
        own_B: per target (own × O × R), the fixed B of the own slices.
        A: per target the fixed A, of all slices (Q × I) or, for a dense one, of the own ones (own · R × I).
        B_rows: per factor target (C × Q), the fixed B of all slices on the own shard.
        layers: per target what its `SliceLinear` modules read.
        inputs: the groups of Linears that share an input; None where Triton does not run.

    Args:
        impl, linear: of the kernels, for `LayerFactors`.
    """

    def __init__(
        self,
        plan: SlicePlan,
        buckets: Sequence[Bucket],
        device: torch.device,
        *,
        impl: kernels.Impl = "auto",
        linear: str = "auto",
    ) -> None:
        self.plan = plan
        self.buckets = list(buckets)
        self.targets: list[Target] = [t for bucket in buckets for t in bucket.targets]
        numel = buckets[-1].stop
        self.grads, self.exp_avg, self.exp_avg_sq, self.delta_sum = (
            torch.zeros(numel, device=device) for _ in range(4)
        )
        self.own_B: dict[str, Tensor] = {}
        self.A: dict[str, Tensor] = {}
        self.B_rows: dict[str, Tensor] = {}
        self.active = ActiveSlice()
        # One reading of x for all that share it pays where the kernels are bound by that reading.
        self.inputs = SharedInputs(impl, share_p=linear != "fused") if uses_triton(self.grads, impl) else None
        self.layers = {
            t.name: LayerFactors(self.active, impl=impl, linear=linear, inputs=self.inputs) for t in self.targets
        }

    def fill(self, bucket: Bucket, own_A: Tensor, own_B: Tensor, exchange: FactorExchange) -> None:
        """Takes the fixed factors of a bucket's own slices and fetches the peers' parts; collective.

        A second call replaces the first one's values in place.

        Args:
            own_A, own_B: flat (numel_A), (numel_B).
        """
        for target, B in zip(bucket.targets, bucket.views_B(own_B), strict=True):
            _keep(self.own_B, target.name, B)
        if bucket.kind == "dense":
            for target, A in zip(bucket.targets, bucket.views_A(own_A), strict=True):
                _keep(self.A, target.name, A)
        else:
            received = exchange.fetch(bucket, own_A, own_B)
            for index, target in enumerate(bucket.targets):
                _keep(self.A, target.name, _alone(received.A(index)))
                _keep(self.B_rows, target.name, _alone(received.B(index)))
        if not self.layers[bucket.targets[0].name].A:
            self._make_leaves(bucket)

    def _make_leaves(self, bucket: Bucket) -> None:
        plan = self.plan
        at_A, at_B = bucket.start, bucket.stop_A
        for t in bucket.targets:
            layer = self.layers[t.name]
            first = plan.owned.start if bucket.kind == "factor" else 0
            A_SRI = self.A[t.name].view(-1, t.r, t.cols)[first : first + plan.slices_per_rank]
            for A_RI, B_OR in zip(A_SRI, self.own_B[t.name], strict=True):
                layer.A.append(self._leaf(A_RI, at_A))
                layer.B.append(self._leaf(B_OR, at_B))
                at_A += A_RI.numel()
                at_B += B_OR.numel()

    def _leaf(self, values: Tensor, offset: int) -> Tensor:
        """An autograd leaf over fixed values, whose gradient accumulates at `offset` of the flat buffer."""
        leaf = values.detach().requires_grad_()
        leaf.grad = self.grads[offset : offset + values.numel()].view_as(values)
        return leaf

    def own_factors(self, target: Target, index: int) -> tuple[Tensor, Tensor]:
        """The fixed A (R × I) and B (O × R) of the rank's slice number `index`."""
        first = index + (self.plan.owned.start if target.kind == "factor" else 0)
        return self.A[target.name].view(-1, target.r, target.cols)[first], self.own_B[target.name][index]

    def state_views(self, state: str, index: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yields (target, A part: R × I, B part: O × R) of a flat buffer, for the rank's slice number `index`.

        Args:
            state: "grads", "exp_avg", "exp_avg_sq" or "delta_sum".
        """
        for t, A, B in self.views(getattr(self, state)):
            yield t.name, A.view(-1, t.r, t.cols)[index], B[index]

    def views(self, flat: Tensor) -> Iterator[tuple[Target, Tensor, Tensor]]:
        """Yields (target, A: own · R × I, B: own × O × R), views of a flat buffer of the store."""
        for bucket in self.buckets:
            yield from bucket.split(flat[bucket.start : bucket.stop])

    def leaves(self) -> list[Tensor]:
        """All leaves, A before B, target by target."""
        return [leaf for layer in self.layers.values() for leaf in (*layer.A, *layer.B)]

    def zero_grad(self) -> None:
        """Clears the gradients, and what a backward pass that raised has left half done."""
        self.grads.zero_()
        if self.inputs is not None:
            self.inputs.reset()

    def end_of_backward(self) -> None:
        """Gradients that wait for a neighbour's are finished without it; see `SharedInputs.flush`."""
        if self.inputs is not None:
            self.inputs.flush()

    def unreached(self) -> list[str]:
        """Targets that no backward pass has reached yet."""
        return [name for name, layer in self.layers.items() if not layer.reached]

    def max_abs(self) -> Tensor:
        """Per target the largest |A|, |B| and |W| that this rank holds (targets × 3), float64."""
        found = []
        for target in self.targets:
            assert target.shard is not None
            W = target.shard.read(0, target.own_range(self.plan).numel)
            held = (self.A[target.name], self.own_B[target.name], W.to(self.grads.device))
            found += [t.abs().amax() if t.numel() else t.new_zeros(()) for t in held]
        return torch.stack(found).double().view(-1, 3)

    @property
    def nbytes_factors(self) -> int:
        """Bytes of the fixed factors."""
        return sum(t.nbytes for held in (self.own_B, self.A, self.B_rows) for t in held.values())

    @property
    def nbytes_state(self) -> int:
        """Bytes of gradients, moments and running sums."""
        return sum(t.nbytes for t in (self.grads, self.exp_avg, self.exp_avg_sq, self.delta_sum))


@torch.no_grad()
def _keep(held: dict[str, Tensor], name: str, values: Tensor) -> None:
    """In place where there is something already: leaves and kernels hold views of it."""
    if name in held:
        held[name].copy_(values)
    else:
        held[name] = values


def _alone(part: Tensor) -> Tensor:
    """The tensor without the buffer that it may be a view of, which it would keep alive."""
    return part.clone() if part.untyped_storage().nbytes() > part.nbytes else part
