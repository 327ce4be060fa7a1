"""Which run is next: a pure function of the rung and of the records that are there.

Successive halving: every rate has a short run with seed 0, the better half goes on to the full budget, and the best of
those gets the other seeds. Where the best short run is at an end of the rates, the next rate outward joins, so that no
arm is judged at the edge of its sweep. A run that diverged counts as infinitely bad.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .rungs import Arm, Point, Rung

BEYOND = 3  # rates that may join at each end


@dataclass(frozen=True)
class Run:
    """One training run; its record bears `name`."""

    rung: str
    arm: Arm
    batch: int
    steps: int
    rate: float
    seed: int
    last: bool  # whether it is at the full budget

    @property
    def name(self) -> str:
        return f"{self.rung}-{self.arm.name}-batch{self.batch}-steps{self.steps}-lr{self.rate:.0e}-seed{self.seed}"


def outward(rates: list[float], up: bool) -> float:
    """The next rate of 1, 3, 10, 30 … beyond the last or the first."""
    exponent = round(2 * math.log10(rates[-1] if up else rates[0])) + (1 if up else -1)
    return float(f"{10 ** (exponent / 2):.0e}")


def runs_of(rung: Rung, point: Point, losses: Mapping[str, float]) -> Iterator[Run]:
    """The runs of a point as far as they are known, in order; what follows from missing ones is not yet.

    Args:
        losses: record → test loss, infinite where the run diverged.
    """

    def run(rate: float, seed: int = 0, *, short: bool = False) -> Run:
        steps = rung.short_steps if short else point.steps
        return Run(rung.name, point.arm, point.batch, steps, rate, seed, not short)

    rates = list(rung.rates)
    if rung.short_steps:
        short = {rate: run(rate, short=True) for rate in rates}
        yield from short.values()
        for _ in range(2 * BEYOND):
            if any(r.name not in losses for r in short.values()):
                return
            rates = sorted(short)
            best = min(rates, key=lambda rate: losses[short[rate].name])
            if best not in (rates[0], rates[-1]) or len(rates) >= len(rung.rates) + BEYOND:
                break
            more = outward(rates, up=best == rates[-1])
            short[more] = run(more, short=True)
            yield short[more]
        ranked = sorted(rates, key=lambda rate: losses[short[rate].name])
        rates = ranked[: max(1, len(ranked) // 2)]
    full = [run(rate) for rate in rates]
    yield from full
    if any(r.name not in losses for r in full):
        return
    best = min(rates, key=lambda rate: losses[run(rate).name])
    yield from (run(best, seed) for seed in range(1, rung.seeds))


def missing(rung: Rung, losses: Mapping[str, float]) -> list[Run]:
    """The runs that are known and not there, in the order of the rung's points.

    Of neighbours with one batch size the first seeds come first, so that all of them are soon in the table.
    """
    found: list[Run] = []
    for _, points in itertools.groupby(rung.points, key=lambda point: point.batch):
        runs = [run for point in points for run in runs_of(rung, point, losses) if run.name not in losses]
        found += sorted(runs, key=lambda run: run.seed)
    return found


def finalists(rung: Rung, point: Point, losses: Mapping[str, float]) -> list[Run]:
    """The runs that are there at the point's best rate; empty before its sweep is complete."""
    runs = [run for run in runs_of(rung, point, losses) if run.last]
    tuned = [run for run in runs if run.seed == 0]
    if not tuned or any(run.name not in losses for run in tuned):
        return []
    best = min(tuned, key=lambda run: losses[run.name]).rate
    return [run for run in runs if run.rate == best and run.name in losses]
