"""Time of an optimizer step: floors, bound, forecast, and what binds.

The bound lets the gathers of ZeRO-3 overlap with compute perfectly and nothing overlap with the update. Systems of
this kind reach 0.65 to 0.75 of such a bound; the forecast takes 0.7 of it, and no micro-batch may be shorter than the
host needs to launch its kernels. All of it is modelled, nothing measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from hdpissa.launch.planning import exchange as plan_exchange
from hdpissa.launch.planning.run import Run

EFFICIENCY = 0.7
# An eager decoder layer, forward and backward, and the thin products of a trained Linear; a third of it is forward.
LAUNCHES_PER_LAYER, LAUNCHES_PER_LINEAR = 180, 4
LAUNCH_S, COLLECTIVE_S = 4.5e-6, 25e-6
# Reads and writes of Adam per factor element: gradient, two moments, delta, running sum, the gradient's zeroing.
ADAM_BYTES = 40
GATHERS, COPY_GATHERS = "ZeRO-3 gathers", "gathers of second copies (hpZ)"
PASS_GATHERS = "gathers of passes without gradient"
AGAIN = "what stays gathered, after the update"
NORM = "DeepSpeed's gradient norm"
# Products of 16-bit parts that make up one of the update's: fp32 factors in two parts each, TF32's in one.
PRODUCTS = {"fp32": 3, "tf32": 1}


@dataclass(frozen=True)
class Step:
    """Seconds of an optimizer step, and bytes per GPU.

    Attributes:
        products, elementwise, low_rank: of all micro-batches; the floor is the first two.
        link, host: gathers of all micro-batches, over the network or NVLink, and from host memory.
        again: gathering anew, after the update, what stays gathered (`stage3_param_persistence_threshold`).
        launches: host time of all micro-batches.
        exchange, apply, adam, staging: of the update; staging is what comes from the host and goes back.
        wire: bytes sent per GPU, by kind. host_bytes: over the host link.
        link_name, gather_link: what the exchange goes over, and most of the gathers' time.
    """

    tokens: int
    products: float
    elementwise: float
    low_rank: float
    link: float
    host: float
    again: float
    launches: float
    exchange: float
    apply: float
    adam: float
    staging: float
    wire: dict[str, int]
    host_bytes: int
    link_name: str
    gather_link: str
    useful_flops: float
    peak: float

    @property
    def compute(self) -> float:
        return self.products + self.elementwise + self.low_rank

    @property
    def floor(self) -> float:
        """Forward and input gradient of the frozen model, nothing else."""
        return self.products + self.elementwise

    @property
    def update(self) -> float:
        return self.exchange + self.apply + self.adam + self.staging + self.again

    @property
    def bound(self) -> float:
        return max(self.compute, self.link + self.host) + self.update

    @property
    def predicted(self) -> float:
        micro = max(self.compute, self.link + self.host) / EFFICIENCY
        return max(micro, self.launches) + self.update / EFFICIENCY

    @property
    def tokens_per_second(self) -> float:
        """Per GPU."""
        return self.tokens / self.predicted

    @property
    def mfu(self) -> float:
        """Useful FLOP (forward, input gradient, attention, head) over the time and the data sheet's peak."""
        return self.useful_flops / (self.predicted * self.peak)

    @property
    def binds(self) -> str:
        """What a faster part would have to be, for the step to become shorter."""
        gathers = self.link + self.host
        micro = max(self.compute, gathers) / EFFICIENCY
        if self.update / EFFICIENCY > max(micro, self.launches):
            parts = {self.link_name: self.exchange + self.again, "HBM": self.apply + self.adam}
            parts |= {"host link": self.staging}
            return f"{max(parts, key=lambda name: parts[name])} (update)"
        if self.launches > micro:
            return "kernel launches"
        if gathers > self.compute:
            return "host link" if self.host > self.link else self.gather_link
        return "compute" if self.products >= self.elementwise + self.low_rank else "HBM"


def step(run: Run) -> Step:
    """The closed forms, applied."""
    gpu, batch, work, plan = run.cluster.gpu, run.batch, run.work, run.plan
    tokens = batch.tokens * batch.accumulation
    passes = run.objective.policy_passes + run.objective.reference_passes
    wire, link, gather_link = _gather_traffic(run, *_gathered(run))
    anew, again, _ = _gather_traffic(run, *_gathered_again(run))
    passing, pass_link = _pass_traffic(run)
    from_host = _host_bytes_gathers(run)
    staged = _host_bytes_update(run)
    traffic = plan_exchange.update(run.shapes, plan, run.cluster, run.itemsize)
    norm = plan_exchange.norm(plan, run.cluster)
    own = sum(t.factor_numel(plan.slices_per_rank) for t in run.targets)
    return Step(
        tokens=tokens,
        products=tokens * work.floor_flops(recompute=batch.checkpointing, passes=passes) / gpu.bf16,
        elementwise=tokens * work.floor_bytes(recompute=batch.checkpointing, passes=passes) / gpu.hbm,
        low_rank=tokens * max(work.low_rank / gpu.hbm, work.low_rank_flops / gpu.bf16),
        link=link + pass_link,
        host=from_host / gpu.host,
        again=again,
        launches=batch.accumulation * _launches(run),
        exchange=sum(t.seconds for t in traffic.values()) + norm.seconds,
        apply=apply_seconds(run, gpu.bf16 / PRODUCTS[run.section.delta.precision]),
        adam=ADAM_BYTES * own / gpu.hbm,
        staging=staged / gpu.host,
        wire=wire
        | passing
        | ({AGAIN: sum(anew.values())} if again else {})
        | {kind: t.sent for kind, t in traffic.items()}
        | {NORM: norm.sent},
        host_bytes=from_host + staged,
        link_name=run.cluster.link_name(plan.world_size),
        gather_link=gather_link,
        useful_flops=tokens * work.useful_flops,
        peak=gpu.peak,
    )


def _gathered(run: Run) -> tuple[int, int]:
    """Bytes of the weights that a step's micro-batches gather: of the shards of all ranks, of second copies (hpZ)."""
    steps, found = run.batch.accumulation, run.gathers
    every = steps * found.gathered
    of_all = found.first if run.copy_ranks else every
    return run.placement.width * of_all, run.placement.width * (every - of_all)


def _passes_gather(run: Run) -> int:
    """Bytes of the weights that passes without gradient gather in a step."""
    objective, width = run.objective, run.placement.width
    elements = objective.policy_passes * run.forward_gathers.gathered
    elements += objective.reference_passes * run.reference_gathers.gathered
    return width * run.batch.accumulation * elements


def _pass_traffic(run: Run) -> tuple[dict[str, int], float]:
    """(bytes that a rank sends for them, by kind; their seconds)."""
    world = run.plan.world_size
    sent = _passes_gather(run) * (world - 1) // world
    return ({PASS_GATHERS: sent} if sent else {}), sent / run.cluster.gather_rate(world)


def _gathered_again(run: Run) -> tuple[int, int]:
    """The same of what stays gathered, and has to be gathered anew after each update."""
    of_all = run.gathers.again_first
    return run.placement.width * of_all, run.placement.width * (run.gathers.again - of_all)


def _gather_traffic(run: Run, of_all: int, of_copies: int) -> tuple[dict[str, int], float, str]:
    """(bytes that a rank sends, by kind; their seconds; what most of them goes over) of bytes that are gathered."""
    parts = {GATHERS: (of_all, run.plan.world_size)}
    if run.copy_ranks:
        parts[COPY_GATHERS] = (of_copies, run.copy_ranks)
    wire = {kind: nbytes * (ranks - 1) // ranks for kind, (nbytes, ranks) in parts.items()}
    seconds = {kind: wire[kind] / run.cluster.gather_rate(ranks) for kind, (_, ranks) in parts.items()}
    longest = max(seconds, key=lambda kind: seconds[kind])
    return wire, sum(seconds.values()), run.cluster.link_name(parts[longest][1])


def _host_bytes_gathers(run: Run) -> int:
    """A rank brings its own part of what is gathered from host memory; second copies go there when they are made."""
    if not run.placement.offload:
        return 0
    of_all, of_copies = map(sum, zip(_gathered(run), _gathered_again(run), strict=True))
    copies = (of_copies + of_all) // run.copy_ranks if run.copy_ranks else 0
    return (of_all + _passes_gather(run)) // run.plan.world_size + copies


def _host_bytes_update(run: Run) -> int:
    """What lies on the host goes to the GPU and back."""
    return 2 * run.placement.staged_bytes * sum(t.ranges[0].numel for t in run.targets)


def apply_seconds(run: Run, flops: float) -> float:
    """Taking the delta off the shard: two products of depth S·r per element, or the element's own traffic.

    Args:
        flops: FLOP/s of these products.
    """
    hbm, plan = run.cluster.gpu.hbm, run.plan
    width, master = run.placement.width, run.placement.master_bytes
    # in and out; the rounding of a separate master is written only
    per_element = 2 * (width + master) if run.placement.master_format == "split" or not master else 2 * master + width
    seconds = 0.0
    for t, count in run.shapes:
        numel = t.ranges[0].numel
        product = 4 * t.r * plan.slices * numel / flops
        if t.kind == "factor":
            seconds += count * max(numel * per_element / hbm, product)
        else:  # the deltas of the group's shards are written and sent, the own one comes back and is taken off
            formed = max(run.itemsize * plan.group_size * numel / hbm, product)
            seconds += count * (formed + numel * (run.itemsize * (plan.group_size + 1) + per_element) / hbm)
    return seconds


def _launches(run: Run) -> float:
    """Of a micro-batch."""
    passes = run.objective.policy_passes + run.objective.reference_passes
    thirds = 3 + passes + run.batch.checkpointing
    kernels = LAUNCHES_PER_LAYER * run.model.layers * thirds / 3
    kernels += LAUNCHES_PER_LINEAR * sum(len(t.modules) for t in run.targets)
    return LAUNCH_S * kernels + COLLECTIVE_S * run.gathers.calls
