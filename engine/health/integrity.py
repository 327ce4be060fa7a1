"""A check for silent corruption: what must not change has not, what must agree across ranks does.

Memory, a device or a link can give wrong numbers and no error. What this run knows twice is compared, by checksums of
the bits (`checksum`), so that a single flipped bit counts:

* against their own state when the check was made: the fixed factors A and B, the rows of B, the shards of weights that
  are not trained, and buffers;
* across all ranks: A of all slices where every rank has it, buffers, the learning rate, Adam's t;
* across the ranks that share a slice (more ranks than slices): its moments and running sums. Gradients are not
  looked at: the moments are made of them in the same step.

A difference ends the run on all ranks. Where ranks differ the majority is believed; of two, both are named.

`outliers` is another kind of check, and only warns: a slice whose last update is of quite another size than the others'
may be computed by a device that computes wrongly.

What it does not see: shards of the trained weights themselves (each exists once and changes at every step), copies
that ZeRO-3 has gathered, and anything that was wrong from the start on all ranks alike.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import consensus
from ..distributed import faults, heartbeat
from ..errors import StopError
from ..files.checksum import checksum
from ..optim.factors import FactorStore
from ..optim.optimizer import SliceOptimizer
from ..sharding import zero3
from .slice_figures import SliceNorms

MAX_FINDINGS = 3  # findings in a message
FEWEST_SLICES = 4  # of fewer no robust statistic can say which one is odd
# An outlier is more than 2 times off the median, and more than 8 robust standard deviations of the logarithms. The
# first keeps healthy runs quiet: Adam's updates are nearly alike in size (SmolLM2-135M, 8 slices, r = 16: equal to four
# digits in the first step, within 8 % of the median in the next five), so that their MAD can be tiny. The second
# lets a model whose slices do differ widely be as it is.
FACTOR, DEVIATIONS = 2.0, 8.0
MAD_TO_SIGMA = 1.4826  # of a normal distribution


@dataclass(frozen=True)
class Checked:
    """The result of a check that found nothing wrong.

    Attributes:
        tensors: looked at on this rank. norms: per slice ‖ΔA_i, ΔB_i‖ of the last update; empty before the first.
        outliers: slices whose norm is odd.
    """

    tensors: int
    norms: list[float]
    outliers: list[int]


class IntegrityCheck:
    """Made when all weights are in place (after resuming); `check` is collective, between two steps."""

    def __init__(self, module: nn.Module, optimizer: SliceOptimizer) -> None:
        self._module, self._optimizer, self._store = module, optimizer, optimizer.store
        self._first = {name: checksum(tensor) for name, tensor in self._fixed()}
        self._slice_norms = SliceNorms(optimizer)
        optimizer.observers.append(self._slice_norms)

    # --- what is looked at ---------------------------------------------------------------------------

    def _fixed(self) -> Iterator[tuple[str, Tensor]]:
        """What never changes, by name."""
        store = self._store
        yield from _with_fault("memory.A", [(f"A of {name}", A) for name, A in store.A.items()])
        yield from _with_fault("memory.own_B", [(f"B of {name}", B) for name, B in store.own_B.items()])
        yield from _with_fault("memory.B_rows", [(f"rows of B of {name}", B) for name, B in store.B_rows.items()])
        yield from _with_fault("memory.frozen", _frozen(self._module, store))
        yield from _with_fault("memory.buffer", _buffers(self._module))

    def _agreed(self, fixed: Mapping[str, int]) -> dict[str, int]:
        """What is the same on all ranks: checksums by name."""
        whole = [f"A of {t.name}" for t in self._store.targets if t.kind == "factor"]
        found = {name: fixed[name] for name in (*whole, *(name for name, _ in _buffers(self._module)))}
        group = self._optimizer.param_groups[0]
        if faults.fault("memory.lr"):
            group["lr"] = math.nextafter(group["lr"], math.inf)
        numbers = {"the learning rate": group["lr"], "the number of updates": self._optimizer.updates}
        return found | {name: checksum(torch.tensor(float(n), dtype=torch.float64)) for name, n in numbers.items()}

    def _shared(self) -> dict[str, int]:
        """What is the same on the ranks of a slice: checksums by name; empty where each has its own."""
        store = self._store
        found: dict[str, int] = {}
        if store.plan.ranks_per_slice > 1:
            faults.corrupt_("memory.exp_avg", store.exp_avg)
            for kind in ("exp_avg", "exp_avg_sq", "delta_sum"):
                for t, A, B in store.views(getattr(store, kind)):
                    found |= {f"{kind} of A of {t.name}": checksum(A), f"{kind} of B of {t.name}": checksum(B)}
        return found

    # --- the check -----------------------------------------------------------------------------------

    @torch.no_grad()
    def check(self, step: int) -> Checked:
        """Looks at everything.

        Raises:
            StopError: on all ranks alike, naming the rank and the tensor.
        """
        heartbeat.beat("step.integrity")
        fixed = {}
        for name, tensor in self._fixed():
            fixed[name] = checksum(tensor)
            heartbeat.progress()
        changed = [name for name, value in fixed.items() if value != self._first[name]]
        mine = (changed, self._agreed(fixed), self._shared(), self._slice_norms.updates())
        reports = consensus.gather(mine)
        findings = self._findings(reports)
        if findings:
            more = f" and {len(findings) - MAX_FINDINGS} more" if len(findings) > MAX_FINDINGS else ""
            raise StopError(
                f"silent corruption, found after step {step}: {'; '.join(findings[:MAX_FINDINGS])}{more}. Go on from a "
                f"checkpoint, without that device"
            )
        plan = self._store.plan
        norms = [norm for rank in range(0, plan.world_size, plan.ranks_per_slice) for norm in reports[rank][3]]
        return Checked(len(fixed) + len(mine[1]) + len(mine[2]), norms, outliers(norms))

    def _findings(self, reports: Sequence[tuple]) -> list[str]:
        plan = self._store.plan
        found = [f"rank {rank}: {name} has changed" for rank, (changed, *_) in enumerate(reports) for name in changed]
        groups = [(1, list(range(plan.world_size))), *((2, group) for group in plan.slice_groups())]
        for kind, group in groups:
            for name in reports[group[0]][kind]:
                if any(name in reports[rank][0] for rank in group):  # reported already
                    continue
                odd = _odd_ones({rank: reports[rank][kind][name] for rank in group})
                if odd:
                    found.append(f"rank{'s' * (len(odd) > 1)} {', '.join(map(str, odd))}: {name} differs between ranks")
        return found


def outliers(norms: Sequence[float]) -> list[int]:
    """Slices whose norm is far off the others' by median and MAD of the logarithms; none where fewer than four."""
    if len(norms) < FEWEST_SLICES:
        return []
    logs = [math.log(n) if 0 < n < math.inf else -math.inf if n == 0 else math.inf for n in norms]
    median = statistics.median(logs)
    if not math.isfinite(median):  # the learning rate is 0: nothing has changed
        return []
    spread = MAD_TO_SIGMA * statistics.median(abs(x - median) for x in logs)
    return [i for i, x in enumerate(logs) if abs(x - median) > max(math.log(FACTOR), DEVIATIONS * spread)]


def _odd_ones(values: Mapping[int, int]) -> list[int]:
    """The ranks that are not of the majority's value; all of them where there is no majority."""
    if len(set(values.values())) == 1:
        return []
    common = statistics.mode(values.values())
    odd = [rank for rank, value in values.items() if value != common]
    return odd if 2 * len(odd) < len(values) else list(values)


def _with_fault(point: str, some: Sequence[tuple[str, Tensor]]) -> Sequence[tuple[str, Tensor]]:
    """The same; a fault at that point corrupts the first that is not empty."""
    for _, tensor in [(name, tensor) for name, tensor in some if tensor.numel()][:1]:
        faults.corrupt_(point, tensor)
    return some


def _frozen(module: nn.Module, store: FactorStore) -> list[tuple[str, Tensor]]:
    """This rank's shards of weights that are not trained."""
    trained = {id(t.param) for t in store.targets}
    trained |= {id(p) for p in module.parameters() if p.requires_grad}  # modules_to_save, and the anchor
    named = [(n, p) for n, p in module.named_parameters() if id(p) not in trained]
    return [(f"frozen {name}", zero3.shard_view(param)) for name, param in named]


def _buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that no forward pass changes: statistics of norms and rotary frequencies that follow the length do."""
    found = []
    for name, owner in module.named_modules():
        follows = any(word in str(getattr(owner, "rope_type", "")) for word in ("dynamic", "longrope"))
        if follows or isinstance(owner, nn.modules.batchnorm._NormBase):
            continue
        found += [(f"buffer {name}.{key}", b) for key, b in owner.named_buffers(recurse=False)]
    return found
