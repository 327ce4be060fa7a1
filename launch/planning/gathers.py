"""How much of a model ZeRO-3 holds gathered at a time, and how often it gathers: DeepSpeed's rules, replayed.

DeepSpeed fetches a module's own parameters before it runs, prefetches the next ones of the recorded order up to
`stage3_prefetch_bucket_size` elements while fewer than `stage3_max_live_parameters` are there, and drops a module's
parameters after it ran unless they are used again within `stage3_max_reuse_distance` elements. Several parameters
fetched at once arrive in one buffer and are copied out of it. (partitioned_param_coordinator.py, 0.19.8.)

Under hpZ a parameter that is dropped leaves a second copy behind, and while there is one it is gathered of that, among
the ranks that share it; parameters with and without one are fetched by two collectives. An update drops the copies of
what it changes (`zero3.drop_second_copy`), so only the first gather of a target in an optimizer step is of all ranks.
Numbers of elements throughout.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hdpissa.launch.planning.trace import Trace, Visit


@dataclass(frozen=True)
class Policy:
    """DeepSpeed's keys, in elements, with its defaults."""

    prefetch_bucket_size: int = 50_000_000
    param_persistence_threshold: int = 100_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000

    @classmethod
    def of(cls, zero: dict[str, Any]) -> Policy:
        """From a `zero_optimization` section without "auto"; DeepSpeed takes each key with and without `stage3_`."""
        said = {name: zero.get(f"stage3_{name}", zero.get(name)) for name in cls.__dataclass_fields__}
        return cls(**{name: int(value) for name, value in said.items() if isinstance(value, int | float)})


@dataclass(frozen=True)
class Gathers:
    """Of one micro-batch: most elements held at a time, elements gathered, and in how many collectives.

    Attributes:
        first: elements gathered among all ranks, in the first micro-batch after an update; all of them without hpZ.
        again: elements gathered in DeepSpeed's step, after an update has dropped every gathered copy: those of
            parameters that stay gathered. again_first: of them those that are gathered among all ranks.
    """

    peak: int
    gathered: int
    calls: int
    first: int
    again: int = 0
    again_first: int = 0


def without_trace(
    numel: list[int], policy: Policy, *, checkpointing: bool, updated: frozenset[int] | None = None
) -> Gathers:
    """For a model whose forward pass cannot be traced: everything is gathered once per pass, one by one.

    Args:
        updated: see `simulate`.
    """
    whole = sum(numel)
    passes = 3 if checkpointing else 2
    peak = min(whole, policy.max_live_parameters + max(numel))
    first = passes * whole if updated is None else sum(numel[p] for p in updated)
    return Gathers(peak, passes * whole, passes * len(numel), first)


def forward(trace: Trace, policy: Policy) -> Gathers:
    """Replays a forward pass without gradient."""
    return _Coordinator(trace, policy, None).run([_Event(v.module, v.enters, False) for v in trace.visits])


def forward_without_trace(numel: list[int], policy: Policy) -> Gathers:
    """The same for a model whose forward pass cannot be traced."""
    whole = sum(numel)
    return Gathers(min(whole, policy.max_live_parameters + max(numel)), whole, len(numel), whole)


@dataclass(frozen=True)
class _Event:
    module: int
    fetches: bool  # else releases
    backward: bool
    recompute: bool = False


def simulate(trace: Trace, policy: Policy, *, checkpointing: bool, updated: frozenset[int] | None = None) -> Gathers:
    """Replays one micro-batch of a run whose order DeepSpeed has recorded, the first of an optimizer step.

    Args:
        updated: under hpZ the parameters that an update changes; None without hpZ. (In later micro-batches every
            parameter has its second copy, and is fetched as without hpZ.)
    """
    second = None if updated is None else set(range(len(trace.numel))) - updated
    return _Coordinator(trace, policy, second).run(list(_events(trace.visits, trace.params, checkpointing)))


def _events(visits: list[Visit], params: list[list[int]], checkpointing: bool) -> Iterator[_Event]:
    """The forward pass, then the backward pass in its reverse; each checkpointed block once more forward in between."""
    yield from (_Event(v.module, v.enters, False) for v in visits)
    blocks: dict[int, list[Visit]] = defaultdict(list)
    for v in visits if checkpointing else ():
        if v.layer is not None:
            blocks[v.layer].append(v)
    for v in reversed(visits):
        if v.differentiable:
            yield _Event(v.module, not v.enters, True)
        if v.layer in blocks and not v.enters and params[v.module]:
            # the first saved tensor that is asked for; the block runs until the last one has been made again
            again = blocks.pop(v.layer)
            last = max(i for i, visit in enumerate(again) if visit.enters)
            yield from (_Event(visit.module, visit.enters, False, True) for visit in again[: last + 1])


@dataclass
class _Group:
    """Parameters that are fetched by one collective."""

    waiting: set[int]
    numel: int
    buffered: bool  # several: they lie in a buffer of their own until the last one has been asked for
    copied: bool = False


@dataclass
class _Coordinator:
    trace: Trace
    policy: Policy
    second: set[int] | None  # those that have a second copy; None: nothing ever has
    available: set[int] = field(default_factory=set)
    groups: dict[int, _Group] = field(default_factory=dict)  # parameter in flight → its collective
    held: int = 0
    peak: int = 0
    gathered: int = 0
    calls: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        numel = self.trace.numel
        self.persistent = {p for p, n in enumerate(numel) if n <= self.policy.param_persistence_threshold}
        self.available |= self.persistent  # fetched in an earlier step
        self.unchanged = set(self.second or ())  # their second copies outlive the update
        self.held = self.peak = sum(numel[p] for p in self.persistent)
        self.counted = 0  # DeepSpeed's own count starts anew in each micro-batch
        self.users: dict[int, set[int]] = defaultdict(set)
        self.last_fetch: dict[int, int] = defaultdict(lambda: -1)
        self.recomputed: dict[int, set[int]] = defaultdict(set)
        self.backward: dict[int, None] = {}

    def run(self, events: list[_Event]) -> Gathers:
        self.order = [e.module for e in events if e.fetches]
        self.queue = deque((p, step) for step, m in enumerate(self.order) for p in self.trace.params[m])
        self.step = 0
        for event in events:
            if event.fetches:
                self._fetch(event)
            else:
                self._release(event)
        again = [self.trace.numel[p] for p in self.persistent]
        again_first = [self.trace.numel[p] for p in self.persistent - self.unchanged]
        return Gathers(self.peak, self.gathered, self.calls, self.first, sum(again), sum(again_first))

    def _gather(self, wanted: set[int]) -> None:
        wanted = {p for p in wanted if p not in self.available and p not in self.groups}
        copied = wanted & (self.second or set())
        self.first += sum(self.trace.numel[p] for p in wanted - copied)
        for members in filter(None, (copied, wanted - copied)):
            self._collect(members)

    def _collect(self, wanted: set[int]) -> None:
        numel = sum(self.trace.numel[p] for p in wanted)
        group = _Group(set(wanted), numel, len(wanted) > 1)
        self.groups.update(dict.fromkeys(wanted, group))
        self.gathered += numel
        self.counted += numel
        self.calls += 1
        self._hold(numel)

    def _hold(self, numel: int) -> None:
        self.held += numel
        self.peak = max(self.peak, self.held)

    def _wait_for(self, params: set[int]) -> None:
        """In the order that holds most: DeepSpeed's is that of a set of objects, another one in every process."""
        firsts = {id(self.groups[p]): p for p in sorted(params, reverse=True)}.values()
        for p in (*firsts, *sorted(params - set(firsts))):
            self._wait(p)

    def _wait(self, param: int) -> None:
        group = self.groups.pop(param)
        if not group.copied:
            group.copied = True
            self.available |= group.waiting
            if group.buffered:
                self._hold(group.numel)
        group.waiting.discard(param)
        if group.buffered and not group.waiting:
            self.held -= group.numel

    def _fetch(self, event: _Event) -> None:
        own = set(self.trace.params[event.module])
        if event.backward:
            self.backward[event.module] = None
        self._gather(own)
        for p in own:
            self.users[p].add(event.module)
            if event.recompute and self.backward:
                self.recomputed[next(reversed(self.backward))].add(p)
        self._wait_for(own & self.groups.keys())
        self._skip({p for p in own if self.last_fetch[p] < self.step})
        self._prefetch()
        self.step += 1

    def _skip(self, fetched: set[int]) -> None:
        """Takes what has just been fetched off the queue of what will be."""
        seen: set[int] = set()
        while self.queue and len(seen) < len(fetched):
            param, step = self.queue.popleft()
            self.last_fetch[param] = step
            seen.add(param)

    def _prefetch(self) -> None:
        room = min(self.policy.max_live_parameters - self.counted, self.policy.prefetch_bucket_size)
        wanted: set[int] = set()
        numel = 0
        while self.policy.prefetch_bucket_size and self.queue and numel < room:
            param, step = self.queue.popleft()
            self.last_fetch[param] = max(self.last_fetch[param], step)
            if param not in self.available and param not in self.groups and param not in wanted:
                wanted.add(param)
                numel += self.trace.numel[param]
        self._gather(wanted)

    def _release(self, event: _Event) -> None:
        own = set(self.trace.params[event.module])
        droppable = {p for p in own if p not in self.persistent and self.last_fetch[p] <= self.step}
        ahead = 0
        # DeepSpeed looks into modules to come as it does into this one: all that is inside those around a leaf counts
        params = self.trace.below if event.module in self.trace.leaves else self.trace.params
        for module in self.order[self.step :] if droppable else ():
            if ahead >= self.policy.max_reuse_distance:
                break
            droppable -= set(params[module])
            ahead += sum(self.trace.numel[p] for p in params[module])
        if event.backward:
            again = self.recomputed.pop(event.module, set())
            own |= again
            droppable |= again - self.persistent
            self.backward.pop(event.module, None)
        for p in own:
            self.users[p].discard(event.module)
            if p in droppable and p in self.available and not self.users[p] and p not in self.groups:
                self.available.discard(p)
                if self.second is not None:
                    self.second.add(p)
                self.held -= self.trace.numel[p]
                self.counted -= self.trace.numel[p]
