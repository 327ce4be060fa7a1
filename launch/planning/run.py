"""The run that is planned: everything the closed forms need, gathered from model, cluster and config."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from hdpissa.engine.config import ds_config, leaf_modules
from hdpissa.engine.config.section import HDPissaConfig
from hdpissa.engine.errors import ConfigError
from hdpissa.engine.method.targets import Target
from hdpissa.engine.sharding.slicing import ShardRange, SlicePlan
from hdpissa.launch.planning import trace as plan_trace
from hdpissa.launch.planning.gathers import Gathers, Policy, forward, forward_without_trace, simulate, without_trace
from hdpissa.launch.planning.hardware import Cluster
from hdpissa.launch.planning.model import Model, Work, work_per_token
from hdpissa.launch.planning.objective import Objective
from hdpissa.launch.planning.trace import Trace


@dataclass(frozen=True)
class Batch:
    """A rank's share of an optimizer step; every row is taken to be full."""

    rows: int
    length: int
    accumulation: int
    checkpointing: bool
    sequences: int = 1  # of a row

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.rows * self.sequences * self.length


@dataclass(frozen=True)
class Placement:
    """Where weights are kept, and how: width 2 is bf16 compute, 4 is fp32.

    Attributes:
        hpz: DeepSpeed's `zero_hpz_partition_size`, the ranks that share a second copy of W; 1 is none.
    """

    width: int
    offload: bool
    master_format: str
    master_on_cpu: bool
    hpz: int = 1

    @property
    def master_bytes(self) -> int:
        """Per target weight, beside the shard that ZeRO-3 gathers from."""
        return 0 if self.width == 4 else {"split": 2, "fp32": 4}[self.master_format]

    @property
    def staged_bytes(self) -> int:
        """Per target weight, what an update brings from host memory, and back."""
        if self.offload:
            return self.width + self.master_bytes
        return self.master_bytes if self.master_on_cpu else 0


@dataclass(frozen=True)
class Run:
    """One rank's view of a run; rank 0's, whose shards are the fullest.

    Attributes:
        zero: the section `zero_optimization`, of which `policy` is what steers single gathers.
        said: the same as the JSON has it, "auto" included: a reference is made from that, by TRL.

    Raises ConfigError where slices, ranks, accumulation and matrices do not go together, in the engine's words.
    """

    model: Model
    section: HDPissaConfig
    cluster: Cluster
    batch: Batch
    placement: Placement
    policy: Policy
    zero: dict[str, Any] = field(default_factory=dict)
    said: dict[str, Any] = field(default_factory=dict)
    objective: Objective = field(default_factory=Objective)

    @cached_property
    def plan(self) -> SlicePlan:
        world = self.cluster.gpus
        slices = world if self.section.slices == "auto" else self.section.slices
        plan = SlicePlan(slices, world, 0)
        plan.micro_batches_per_slice(self.batch.accumulation)
        if problems := ds_config.second_copy_problems(self.placement.hpz, world):
            raise ConfigError(problems[0])
        if self.objective.reference and self.placement.hpz > 1:
            raise ConfigError(
                f"zero_hpz_partition_size is {self.placement.hpz} with a reference model: DeepSpeed forms hpZ's groups "
                "for one model; set it to 1, or --precompute_ref_log_probs"
            )
        return plan

    @property
    def copy_ranks(self) -> int:
        """Ranks that share a second copy of W; 0 where there is none. DeepSpeed cuts a larger group to the world."""
        return min(self.placement.hpz, self.plan.world_size) if self.placement.hpz > 1 else 0

    @cached_property
    def targets(self) -> list[Target]:
        """The engine's targets, and how the engine lets their update travel; both worked out once per shape."""
        from hdpissa.engine.comm import exchange
        from hdpissa.engine.method import adapt

        found = adapt.find_targets(self.model.module, self.section, SlicePlan(self.plan.slices, 1, 0))
        world = self.plan.world_size
        first: dict[tuple[int, int, int], Target] = {}
        for t in found:
            if _shape(t) not in first:
                ranges = [ShardRange.of(rank, world, t.rows, t.cols) for rank in range(world)]
                first[_shape(t)] = dataclasses.replace(t, ranges=ranges)
        exchange.choose_kinds(list(first.values()), self.plan, self.section.delta.exchange)
        return [dataclasses.replace(t, ranges=(f := first[_shape(t)]).ranges, kind=f.kind) for t in found]

    @cached_property
    def shapes(self) -> list[tuple[Target, int]]:
        """One target of each shape, and how many there are."""
        counts = Counter(_shape(t) for t in self.targets)
        first = {_shape(t): t for t in reversed(self.targets)}
        return [(first[shape], count) for shape, count in counts.items()]

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the update on the wire."""
        return 2 if self.section.delta.dtype == "bf16" else 4

    @cached_property
    def trace(self) -> Trace | None:
        """None for models that cannot run without numbers."""
        found = _trace(self.model, self.targets, self.batch.rows * self.batch.sequences, self.batch.length)
        chunked = found is not None and self.objective.chunked
        return plan_trace.head_read_by_the_model(found, self.model.module) if chunked else found  # type: ignore[arg-type]

    @cached_property
    def work(self) -> Work:
        inputs = self.trace.read // self.batch.tokens if self.trace else None
        return work_per_token(self.model, self.targets, self.batch.length, inputs=inputs, width=self.placement.width)

    @cached_property
    def gathers(self) -> Gathers:
        """Of a micro-batch. A single rank without offload has nothing to gather."""
        if not self.must_gather:
            return NOTHING
        params = {p: number for number, p in enumerate(self.model.module.parameters())}
        updated = frozenset(params[t.param] for t in self.targets) if self.copy_ranks else None
        if self.trace is None:
            numel = [p.numel() for p in params]
            return without_trace(numel, self.policy, checkpointing=self.batch.checkpointing, updated=updated)
        first = _gathers(self, self.trace, updated)
        if updated is None or self.batch.accumulation == 1:
            return first
        later = _gathers(self, self.trace, None)
        return dataclasses.replace(first, peak=max(first.peak, later.peak))

    @property
    def must_gather(self) -> bool:
        return self.plan.world_size > 1 or self.placement.offload

    @cached_property
    def forward_gathers(self) -> Gathers:
        """Of a forward pass without gradient."""
        return self._forward_gathers(self.policy, self.zero)

    @cached_property
    def reference_gathers(self) -> Gathers:
        """Of the reference's forward pass. DeepSpeed takes "auto" for a key that is not there."""
        if not self.objective.reference:
            return NOTHING
        said = {key: value for key, value in self.said.items() if "auto" not in (value, _classes(value))}
        return self._forward_gathers(Policy.of(said), said)

    def _forward_gathers(self, policy: Policy, zero: dict[str, Any]) -> Gathers:
        if not self.must_gather:
            return NOTHING
        if self.trace is None:
            return forward_without_trace([p.numel() for p in self.model.module.parameters()], policy)
        leaves = leaf_modules.find(self.model.module, zero)
        return forward(plan_trace.gathered_whole(self.trace, self.model.module, leaves), policy)

    def with_objective(self, **changes: Any) -> Run:
        return dataclasses.replace(self, objective=dataclasses.replace(self.objective, **changes))

    def with_batch(self, **changes: Any) -> Run:
        return dataclasses.replace(self, batch=dataclasses.replace(self.batch, **changes))

    def with_offload(self) -> Run:
        return dataclasses.replace(self, placement=dataclasses.replace(self.placement, offload=True))

    def without_second_copy(self) -> Run:
        return dataclasses.replace(self, placement=dataclasses.replace(self.placement, hpz=1))

    def with_gpus(self, gpus: int, slices: int) -> Run:
        section = self.section.model_copy(update={"slices": slices})
        return dataclasses.replace(self, cluster=self.cluster.sized(gpus), section=section)


NOTHING = Gathers(0, 0, 0, 0)


def _classes(value: Any) -> Any:
    return value.get("classes") if isinstance(value, dict) else None


def _shape(target: Target) -> tuple[int, int, int]:
    return target.rows, target.cols, target.r


_traces: dict[tuple, Trace | None] = {}


def _trace(model: Model, targets: list, rows: int, length: int) -> Trace | None:
    key = (model.module, tuple((t.name, t.r) for t in targets), rows, length)
    if key not in _traces:
        try:
            _traces[key] = plan_trace.run(model.module, targets, rows=rows, length=length)
        except Exception:  # the model's own code, which may look at values that the meta device has not
            _traces[key] = None  # a formula stands in, and the output says so (`traced: false`)
    return _traces[key]


_simulated: dict[tuple, Gathers] = {}


def _gathers(run: Run, trace: Trace, updated: frozenset[int] | None) -> Gathers:
    """The order of modules, and so the answer, is the same for every batch and every number of GPUs."""
    module, checkpointing = run.model.module, run.batch.checkpointing
    leaves = leaf_modules.find(module, run.zero)
    key = (module, tuple(leaves), run.policy, checkpointing, updated, run.objective.chunked)
    if key not in _simulated:
        seen = plan_trace.gathered_whole(trace, module, leaves) if leaves else trace
        _simulated[key] = simulate(seen, run.policy, checkpointing=checkpointing, updated=updated)
    return _simulated[key]


def largest_slices(model: Model, section: HDPissaConfig, world: int) -> int:
    """The largest number of slices up to `world` that divides it and that every target has singular vectors for.

    Raises:
        ConfigError: not even one slice goes.
    """
    from hdpissa.engine.method import adapt

    found = adapt.find_targets(model.module, section, SlicePlan(1, 1, 0))
    most = min(min(t.rows, t.cols) // t.r for t in found)
    return max(s for s in range(1, world + 1) if world % s == 0 and s <= most)
