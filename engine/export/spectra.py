"""Singular values of the change of a weight in training: how high its rank really is.

To first order the change over a whole run is the product of two thin matrices of 2·r·S components (`lora_format`). Its
singular values are those of R_B R_Aᵀ, the triangles of their QR decompositions: exact in float64, O((m + n)(r·S)²)
operations, and ΔW is never formed. What is left out, the sum of the steps' second-order terms, moves no singular value
by more than its own norm (`residual`: 1e-4 to 1e-3 of ‖ΔW‖).

Bounded in time and memory: weights for which rank 0 expects to run out of either are left out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import consensus
from ..distributed import heartbeat
from ..optim.factors import FactorStore
from .from_engine import pairs_of, world_of
from .lora_format import LoraWeight
from .lora_pairs import Pair
from .writer import World

MOST_SECONDS = 20.0


def choose(names: Sequence[str], most: int) -> list[str]:
    """At most so many weights: the middle one of each kind first, then the last ones, then the first ones."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.rsplit(".", 1)[-1], []).append(name)
    layers = list(kinds.values())
    picked = [kind[len(kind) // 2] for kind in layers]
    picked += [kind[-1] for kind in layers] + [kind[0] for kind in layers]
    return list(dict.fromkeys(picked))[:most]


def singular_values(lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """Of scale · lora_B lora_A (Q × I, O × Q), the largest first; as many as the matrix can have that are not 0."""
    R_A = torch.linalg.qr(lora_A.double().T, mode="r").R
    R_B = torch.linalg.qr(lora_B.double(), mode="r").R
    sigma = abs(scale) * torch.linalg.svdvals(R_B @ R_A.T)
    return sigma[: min(lora_A.shape[0], lora_A.shape[1], lora_B.shape[0])]


def measure(model: nn.Module, store: FactorStore, *, most: int, most_seconds: float = MOST_SECONDS) -> dict[str, Any]:
    """Spectra of some weights, for spectra.json; collective, between two steps. Complete on rank 0 only.

    An error on one rank ends it on all: `problem` then has it, the same on every rank, and what was found before stays.

    Args:
        most: number of weights.
    """
    world = world_of(store.plan)
    budget = _Budget(most_seconds, 2e9 if world.device.type == "cpu" else 1e11)
    found: list[dict[str, Any]] = []
    left_out: list[str] = []
    problem = ""
    try:
        pairs = consensus.together(lambda: _begin(model, store))
        for name in choose(list(pairs), most):
            weight = pairs[name].weight
            values = _of_one(pairs[name], world, budget)
            if values is None:
                left_out.append(name)
            elif world.rank == 0:
                r, slices = weight.r // (2 * store.plan.slices), store.plan.slices
                what = {"name": name, "rows": weight.rows, "cols": weight.cols, "r": r, "slices": slices}
                found.append({**what, "values": values})
    except consensus.RankFailedError as failed:
        problem = str(failed)
    return {"weights": found, "left_out": left_out, "seconds": round(budget.spent, 2), "problem": problem}


def _begin(model: nn.Module, store: FactorStore) -> dict[str, Pair]:
    heartbeat.beat("spectra", slow=True)
    return {pair.weight.names[0]: pair for pair in pairs_of(model, store)}


def _of_one(pair: Pair, world: World, budget: _Budget) -> list[float] | None:
    """Singular values of a weight's change, on rank 0; None where time or memory would not do; collective."""
    fits = _has_memory(pair.weight, world.device) and (world.rank > 0 or budget.allows(pair.weight))
    if not consensus.all_ranks(fits):
        return None
    whole = pair.gather(consensus.together(lambda: pair.own_part(world)), world)

    def compute() -> list[float] | None:
        if whole is None:
            return []
        try:
            with heartbeat.single_rank("spectra"), budget.charge(pair.weight):
                values = singular_values(*whole, pair.weight.scale).tolist()
        except torch.linalg.LinAlgError:  # not finite: no lack of time or memory
            raise
        except (RuntimeError, MemoryError):  # no memory, or a device without float64
            return None
        return [float(f"{v:.4g}") for v in values]

    return consensus.together(compute)


def _has_memory(weight: LoraWeight, device: torch.device) -> bool:
    """For the pair: received, put together, and in float64."""
    try:
        torch.empty(4 * weight.r * (weight.rows + weight.cols), dtype=torch.float32, device=device)
    except (RuntimeError, MemoryError):
        return False
    return True


class _Budget:
    """Seconds that were `spent`, and whether those that are left will do for a weight, at the speed of the last one.

    Args:
        speed: operations per second, assumed for the first.
    """

    def __init__(self, most_seconds: float, speed: float) -> None:
        self.spent, self._most, self._speed = 0.0, most_seconds, speed

    def allows(self, weight: LoraWeight) -> bool:
        return self.spent + _operations(weight) / self._speed <= self._most

    @contextmanager
    def charge(self, weight: LoraWeight) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        seconds = time.perf_counter() - begun
        self.spent += seconds
        self._speed = _operations(weight) / max(seconds, 1e-6)


def _operations(weight: LoraWeight) -> float:
    """Two QR decompositions and the singular values of a small matrix, roughly."""
    return 2.0 * (weight.rows + weight.cols) * weight.r**2 + 10.0 * weight.r**3
