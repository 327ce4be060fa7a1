"""Is a difference between two sets of samples more than their noise? The arithmetic of compare.py.

The interval is a bootstrap of the statistic that the figure is, median or mean. With few samples a bootstrap is too
narrow, so that a permutation test of ranks has to agree before a figure has moved: its rate of false alarms is at most
5 % for any number of independent samples. Where so few samples cannot reach that, nothing is said.

Samples are drawn again by what is independent: rounds where a result has them, because the steps of one run share
its luck; pairs where both sides measured the same weights, because weights are no repetitions of one another; else
each sample, as of seeds. Of one round a side nothing is known of the noise between runs: that two such runs differ by
more than the noise within them is no alarm, and is told in other words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

RESAMPLES = 4000
LEVEL = 0.05
STATISTICS: dict[str, Callable[..., Any]] = {"median": np.median, "mean": np.mean}
SLACK = 1e-3  # of a figure, that rounded samples may miss it by


@dataclass(frozen=True)
class Compared:
    """What the samples say.

    Attributes:
        low, high: ends of the 95 % interval, of new / old, or of new − old where `difference` is set.
        moved: whether the interval and the test say so. ratio: of the pairs, where there are pairs.
        within_runs: of one run a side; the interval has the noise within the two alone.
    """

    low: float
    high: float
    moved: bool
    difference: bool = False
    ratio: float | None = None
    within_runs: bool = False

    def __str__(self) -> str:
        return (
            f"{self.low:.3g} … {self.high:.3g} (new − old)" if self.difference else f"{self.low:.3f} … {self.high:.3f}"
        )


def rounds_of(result: Mapping[str, Any], row: Mapping[str, Any]) -> int | None:
    """The rounds that the samples of a row are of; None where the benchmark has no rounds.

    A row tells its own: a method that failed part-way has fewer than were asked for.
    """
    rounds = row.get("rounds", (result.get("configuration") or {}).get("rounds"))
    return rounds if isinstance(rounds, int) and rounds >= 1 else None


def compared(
    figures: Sequence[float],
    samples: Sequence[list[float]],
    weights: Sequence[Sequence[str] | None] = (None, None),
    rounds: Sequence[int | None] = (None, None),
) -> Compared | str:
    """OLD's against NEW's; why there is no answer where there is none (it may be empty).

    Args:
        weights: what the samples are of, where they are of different things.
        rounds: of each side; the samples are round after round. None: each sample stands alone.
    """
    if not all(samples):
        return ""
    if not all(math.isfinite(value) for side in samples for value in side):
        return ": samples that are not finite"
    statistic = statistic_of(figures, samples)
    if statistic is None:
        return ": neither median nor mean of its samples"
    if all(weights):
        return _pairs([dict(zip(w or (), s, strict=False)) for w, s in zip(weights, samples, strict=True)], statistic)
    one_run_each = set(rounds) == {1}
    units = [units_of(side, None if one_run_each else count) for side, count in zip(samples, rounds, strict=True)]
    counts = [len(side) for side in units]
    if 2 / math.comb(sum(counts), counts[0]) > LEVEL:
        if one_run_each:
            return ": one run each"
        return f": {counts[0]} and {counts[1]} {'samples' if set(rounds) == {None} else 'rounds'} are too few"
    return replace(_independent(units, statistic), within_runs=one_run_each)


def statistic_of(figures: Sequence[float], samples: Sequence[list[float]]) -> Callable[..., Any] | None:
    """Median or mean, whichever both figures are of their samples; None where they are something else."""

    def miss(function: Callable[..., Any]) -> float:
        found = [float(function(side)) for side in samples]
        return max(abs(a - b) / max(abs(a), abs(b), 1e-300) for a, b in zip(figures, found, strict=True))

    best = min(STATISTICS.values(), key=miss)
    return best if miss(best) <= SLACK else None


def units_of(samples: list[float], rounds: int | None) -> list[list[float]]:
    """What is drawn again: rounds, or each sample where there are none, or where not every round has one."""
    if rounds is None or len(samples) % rounds:
        return [[value] for value in samples]
    size = len(samples) // rounds
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def interval(old: Sequence[Any], new: Sequence[Any], statistic: Callable[..., Any] = np.median) -> tuple[float, float]:
    """95 % interval of statistic(new) / statistic(old), by bootstrap; the same for the same samples.

    Args:
        old, new: units, each a number or the samples of a round.
    """
    return _ends(np.divide(*_drawn((new, old), statistic)))


def _ends(drawn: Any) -> tuple[float, float]:
    """Of the 95 % in the middle."""
    return float(np.quantile(drawn, LEVEL / 2)), float(np.quantile(drawn, 1 - LEVEL / 2))


def _drawn(sides: Sequence[Sequence[Any]], statistic: Callable[..., Any]) -> list[Any]:
    """The statistic of each side in every resample. Units of one side are equally long."""
    generator = np.random.default_rng(0)
    drawn = []
    for side in sides:
        units = np.asarray(side, float).reshape(len(side), -1)
        chosen = units[generator.integers(len(units), size=(RESAMPLES, len(units)))]
        drawn.append(statistic(chosen.reshape(RESAMPLES, -1), axis=1))
    return drawn


def _independent(units: Sequence[list[list[float]]], statistic: Callable[..., Any]) -> Compared:
    old, new = units
    positive = all(value > 0 for side in units for unit in side for value in unit)
    if positive:
        low, high = interval(old, new, statistic)
    else:
        low, high = _ends(np.subtract(*_drawn((new, old), statistic)))
    same = 1 if positive else 0
    values = [[float(statistic(unit)) for unit in side] for side in units]
    moved = not low <= same <= high and unpaired_test(*values) <= LEVEL
    return Compared(low, high, moved, difference=not positive)


def _pairs(sides: Sequence[Mapping[str, float]], statistic: Callable[..., Any]) -> Compared | str:
    """Each weight's own change: their statistic, and its interval over the weights."""
    names = [name for name in sides[0] if name in sides[1]]
    if 2 / 2 ** len(names) > LEVEL:
        return f": {len(names)} weights on both sides are too few"
    old, new = (np.array([side[name] for name in names]) for side in sides)
    positive = bool((old > 0).all() and (new > 0).all())
    change = new / old if positive else new - old
    low, high = _ends(_drawn([change], statistic)[0])
    same = 1 if positive else 0
    moved = not low <= same <= high and paired_test(change - same) <= LEVEL
    return Compared(low, high, moved, not positive, float(statistic(change)) if positive else None)


def ranked(values: Any) -> Any:
    """Ranks from 1, equal values with the mean of theirs."""
    ordered = np.sort(values)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right") + 1) / 2


def unpaired_test(old: Sequence[float], new: Sequence[float]) -> float:
    """Two-sided p of equal distributions: the rank sum (Mann and Whitney 1947) among those of shuffled labels."""
    ranks = ranked(np.array([*old, *new]))
    ranks -= ranks.mean()
    shuffled = np.random.default_rng(0).permuted(np.tile(ranks, (RESAMPLES, 1)), axis=1)
    return _share(shuffled[:, : len(old)].sum(1), ranks[: len(old)].sum())


def paired_test(changes: Any) -> float:
    """Two-sided p of changes around 0: the signed ranks (Wilcoxon 1945) among those of random signs."""
    signed = np.sign(changes) * ranked(np.abs(changes))
    signs = np.random.default_rng(0).choice((-1, 1), (RESAMPLES, len(signed)))
    return _share((signs * signed).sum(1), signed.sum())


def _share(drawn: Any, seen: float) -> float:
    """How often chance goes as far; the seen one counts, so that the share is never too small."""
    return float((1 + (np.abs(drawn) >= abs(seen) - 1e-9).sum()) / (1 + len(drawn)))
