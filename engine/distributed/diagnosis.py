"""Which rank hangs or is lost: from all ranks' answers to one line.

Pure: no sockets, no clocks. The evidence, strongest first: a host that is gone; a process that has exited; one that
accepts connections but does not answer; one that has passed fewer beats than the others, which therefore wait for it;
of equals one whose main thread is not in a collective, then one with less progress since its last beat. Where nothing
tells the ranks apart (all wait in the same collective, as when the network between them drops packets), none is named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from .heartbeat import Report

Answer = Report | Literal["not reachable", "unresponsive", "exited", "no answer"]


@dataclass(frozen=True)
class Place:
    """A rank, and its host by name and address."""

    rank: int
    host: str
    address: str


P = TypeVar("P", bound=Place)
AGAIN = "then restart"


def places(some: Iterable[Place]) -> str:
    """ "rank 1 on a (10.0.0.1) and ranks 2, 3 on b (10.0.0.2)"; eight hosts at most."""
    ranks: dict[tuple[str, str], list[str]] = {}
    for place in some:
        ranks.setdefault((place.host, place.address), []).append(str(place.rank))
    texts = [f"rank{'s' * (len(r) > 1)} {', '.join(r)} on {host} ({at})" for (host, at), r in ranks.items()]
    return " and ".join(texts[:8]) + (f" and {len(texts) - 8} more hosts" if len(texts) > 8 else "")


def no_progress(answers: Mapping[P, Answer], limit_s: float, slow_s: float) -> bool:
    """Whether no rank that answers has made progress for so long.

    Args:
        limit_s: how long. slow_s: how long at a slow point, where a rank may be working all the same; where some rank
            does not answer at all, the first holds everywhere.
    """
    reports = [a for a in answers.values() if isinstance(a, Report)]
    missing = any(a in ("unresponsive", "no answer") for a in answers.values())
    return all(r.idle_s >= (slow_s if r.slow and not missing else limit_s) for r in reports)


def hanging(reports: Mapping[P, Report]) -> list[P]:
    """The ranks that the others wait for; empty where that cannot be decided."""
    fewest = min((r.count for r in reports.values()), default=0)
    behind = {p: r for p, r in reports.items() if r.count == fewest}
    suspects = {p: r for p, r in behind.items() if not r.waiting} or behind
    if len(suspects) == len(reports):
        slowest = min((r.ticks for r in suspects.values()), default=0)
        suspects = {p: r for p, r in suspects.items() if r.ticks == slowest}
    return list(suspects) if len(suspects) < len(reports) else []


def diagnose(answers: Mapping[P, Answer], own: Place, limit: str, *, still_s: float, backend_error: str = "") -> str:
    """One line.

    Args:
        answers: of all ranks, `own` among them.
        limit: the option that set the time, and its value.
        still_s: a rank that made progress within so many seconds does not hang.
        backend_error: of the collective that failed, if one did.
    """

    def who(answer: str) -> list[P]:
        return [p for p, a in answers.items() if a == answer]

    reports = {p: a for p, a in answers.items() if isinstance(a, Report)}
    here = next((a.place for p, a in reports.items() if p.rank == own.rank), "an unknown place")
    # a host that is cut off may not even reach itself
    silent = [p for p in who("no answer") if p.address != own.address]
    if silent:
        return f"no answer from {places(silent)} ({limit}); check that host and the network, {AGAIN}"
    if ended := who("exited"):
        why = "killed, or see its own output"
        return f"{places(ended)} ended early ({why}) while this rank was in {here}; fix that, {AGAIN}"
    if mute := who("unresponsive"):
        how = "stopped, or stuck in code that lets no other thread run"
        return f"{places(mute)} {_verb(mute)} {how}, while this rank waits in {here} ({limit}); {AGAIN}"
    still = {p: r for p, r in reports.items() if r.idle_s >= still_s}
    if still and (hung := hanging(reports)) and all(p in still for p in hung):
        return f"{_where(hung, reports, own)} ({limit}); look there, {AGAIN}"
    where = f"this rank in {here}; {backend_error}" if backend_error else f"this rank in {here}"
    return f"a collective failed or took longer than {limit} though all ranks answer ({where}); one may be slow"


def _verb(some: list[P]) -> str:
    return "does not answer:" if len(some) == 1 else "do not answer:"


def _where(hung: list[P], reports: Mapping[P, Report], own: Place) -> str:
    """ "rank 1 on a hangs in step 7, forward, for 45 s (at batches.py:88 in batch), while others wait in …"."""
    first = reports[hung[0]]
    others = sorted({r.place for p, r in reports.items() if p not in hung})
    text = f"{places(hung)} hang{'s' * (len(hung) == 1)} in {first.place}, for {first.idle_s:.0f} s (at {first.where})"
    return f"{text}, while the others wait in {' and '.join(others[:3])}"
