"""Singular values of what training has changed in a weight: how high its rank really is.

To first order the change of a weight over a whole run is the product of two thin stacks that the ranks have anyway
(`adapter`), of 2·r·S components. Its singular values are those of R_B R_Aᵀ, the triangles of the stacks' QR
decompositions: exact in float64, O((m + n)(r·S)²) operations, and ΔW is never formed. What is left out, the sum of the
steps' second-order terms, moves no singular value by more than its own norm (`residual`: 1e-4 to 1e-3 of ‖ΔW‖).

Bounded in time and memory: rank 0 foresees from what the weights before took how long the next one takes, and leaves
out what would not fit into its seconds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import consensus
from ..distributed import heartbeat
from ..optim.factors import FactorStore
from ..sharding import zero3
from .adapter import Adapted
from .peft_export import LivePairs
from .streams import World

MOST_SECONDS = 20.0
FIRST_GUESS = {"cpu": 2e9}  # operations per second, until one weight has been measured
ELSEWHERE = 1e11


def choose(names: Sequence[str], most: int) -> list[str]:
    """At most so many weights: the middle one of each kind first, then the last ones, then the first ones."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.rsplit(".", 1)[-1], []).append(name)
    places = [lambda found: found[len(found) // 2], lambda found: found[-1], lambda found: found[0]]
    picked = dict.fromkeys(place(found) for place in places for found in kinds.values())
    return list(picked)[:most]


def singular_values(lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """Of scale · lora_B lora_A (Q × I, O × Q), the largest first; as many as the matrix can have that are not 0."""
    R_A = torch.linalg.qr(lora_A.double().T, mode="r").R
    R_B = torch.linalg.qr(lora_B.double(), mode="r").R
    sigma = abs(scale) * torch.linalg.svdvals(R_B @ R_A.T)
    return sigma[: min(lora_A.shape[0], lora_A.shape[1], lora_B.shape[0])]


def measure(model: nn.Module, store: FactorStore, *, most: int, most_seconds: float = MOST_SECONDS) -> dict[str, Any]:
    """Spectra of some weights, for spectra.json; collective, between two steps. Complete on rank 0 only.

    What fails on one rank alone ends it on all, so that none is left waiting: `problem` then says what it was, and on
    which rank, alike on all of them. What was found before that stays.

    Args:
        most: weights that are looked at.
    """
    world = World(store.plan.rank, store.plan.world_size, zero3.device())
    clock = _Clock(most_seconds, FIRST_GUESS.get(world.device.type, ELSEWHERE))
    found: list[dict[str, Any]] = []
    left_out: list[str] = []
    problem = ""
    try:
        pairs = consensus.together(lambda: _begin(model, store, world))
        for name in choose(list(pairs.stacks), most):
            adapted = pairs.stacks[name].adapted
            values = _of_one(pairs, adapted, clock)
            if values is None:
                left_out.append(name)
            elif world.rank == 0:
                r, slices = adapted.r // (2 * store.plan.slices), store.plan.slices
                what = {"name": name, "rows": adapted.rows, "cols": adapted.cols, "r": r, "slices": slices}
                found.append({**what, "values": values})
    except consensus.RankFailedError as failed:
        problem = str(failed)
    return {"weights": found, "left_out": left_out, "seconds": round(clock.spent, 2), "problem": problem}


def _begin(model: nn.Module, store: FactorStore, world: World) -> LivePairs:
    heartbeat.beat("spectra", slow=True)
    return LivePairs(model, store, world)


def _of_one(pairs: LivePairs, adapted: Adapted, clock: _Clock) -> list[float] | None:
    """Singular values of a weight's change, on rank 0; None where there is no time or no room for them; collective."""
    world = pairs.world
    fits = _has_room(adapted, world.device) and (world.rank > 0 or clock.has_time(_operations(adapted)))
    if not consensus.all_ranks(fits):
        return None
    parts = consensus.together(lambda: pairs.prepare(adapted, 0, adapted.r))
    pairs.share(adapted, 0, parts)

    def compute() -> list[float] | None:
        if world.rank:
            return []
        try:
            with heartbeat.single_rank("spectra"):
                pair = pairs.join(adapted, 0, adapted.r, parts)
                values = clock.timed(_operations(adapted), singular_values, *pair, adapted.scale)
        except torch.linalg.LinAlgError:  # not finite: no lack of time or memory
            raise
        except (RuntimeError, MemoryError):  # no memory, or a device without float64
            return None
        return [float(f"{v:.4g}") for v in values.tolist()]

    return consensus.together(compute)


def _operations(adapted: Adapted) -> float:
    """Two QR decompositions and the singular values of a small matrix, roughly."""
    return 2.0 * (adapted.rows + adapted.cols) * adapted.r**2 + 10.0 * adapted.r**3


def _has_room(adapted: Adapted, device: torch.device) -> bool:
    """Whether the stacks fit: received, put together, and in float64."""
    try:
        torch.empty(4 * adapted.r * (adapted.rows + adapted.cols), dtype=torch.float32, device=device)
    except (RuntimeError, MemoryError):
        return False
    return True


class _Clock:
    """What time is left, and how far it goes. `spent`: seconds so far."""

    def __init__(self, most_seconds: float, speed: float) -> None:
        self.spent, self._most, self._speed = 0.0, most_seconds, speed

    def has_time(self, operations: float) -> bool:
        return self.spent + operations / self._speed <= self._most

    def timed(self, operations: float, work: Any, *args: Any) -> Any:
        begun = time.perf_counter()
        result = work(*args)
        if result.is_cuda:
            result = result.cpu()
        seconds = time.perf_counter() - begun
        self.spent += seconds
        self._speed = operations / max(seconds, 1e-6)
        return result
