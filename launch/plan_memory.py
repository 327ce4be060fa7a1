"""Memory of a planned run, per GPU and per node, by component; bytes.

What stays for the whole run is counted exactly as the engine does (`HDPissaEngine.memory_bytes`). What comes and goes
is counted at two moments: at the turn from forward to backward, and while an optimizer step updates the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from hdpissa.engine.shards import STAGED_ELEMENTS
from hdpissa.launch import plan_exchange
from hdpissa.launch.plan_hardware import GIB
from hdpissa.launch.plan_run import Run

# CUDA context, NCCL's buffers, cuBLAS' workspaces; and what the allocator cannot use of the rest. Assumptions.
CONTEXT = 2 * GIB
FRAGMENTATION = 0.05
# Python, torch, CUDA and DeepSpeed of one process, in host memory; an assumption.
PROCESS = 4 * GIB
# fp32 at the height of the loss's backward pass: log-probabilities, their gradient, the gradient of the logits.
LOSS_BYTES = 12
SECOND_COPY = "second copy (hpZ)"
# Gradients in flight within a block, as a share of what the block keeps for backward.
IN_FLIGHT = 0.5


@dataclass(frozen=True)
class Memory:
    """Bytes by component.

    Attributes:
        persistent: on the GPU for the whole run. computing: on top, at its height in a micro-batch.
        updating: on top, while weights are updated. host: per process, in host memory for the whole run.
    """

    persistent: dict[str, int]
    computing: dict[str, int]
    updating: dict[str, int]
    reserve: int
    host: dict[str, int]

    @property
    def peak(self) -> int:
        """The GPU's peak."""
        return sum(self.persistent.values()) + self.reserve + max(self._most(), sum(self.updating.values()))

    @property
    def busiest(self) -> str:
        """When that is: "computing" or "updating"."""
        return "computing" if self._most() >= sum(self.updating.values()) else "updating"

    def _most(self) -> int:
        return _height(self.computing)


# The loss and a block's backward pass do not meet: only the larger one counts.
EITHER = ("logits and loss (fp32)", "block in backward")


def _height(computing: dict[str, int]) -> int:
    always = sum(n for name, n in computing.items() if name not in EITHER)
    return always + max(computing[name] for name in EITHER)


def memory(run: Run) -> Memory:
    """All of it."""
    weights, factors = _weights(run), _factors(run)
    on_host = {"bf16 shards", "fp32 shards", "other weights", SECOND_COPY} if run.placement.offload else set()
    if run.placement.offload or run.placement.master_on_cpu:
        on_host |= {"fp32 remainder", "fp32 master"}
    persistent = {name: n for name, n in (weights | factors).items() if name not in on_host}
    host = {name: n for name, n in weights.items() if name in on_host}
    computing, updating = _computing(run), _updating(run)
    allocated = sum(persistent.values()) + max(_height(computing), sum(updating.values()))
    reserve = CONTEXT + int(FRAGMENTATION * allocated)
    return Memory(persistent, computing, updating, reserve, {**host, "process": PROCESS})


def _weights(run: Run) -> dict[str, int]:
    """Shards as ZeRO-3 cuts them, each parameter into equal parts, rounded up.

    The second copy of hpZ is of every parameter, in the compute dtype, and lies where the shards do. It is there from
    the first gather of a weight until the weight changes; before an update begins, all of it is.
    """
    world, width = run.plan.world_size, run.placement.width
    target_numel = sum(t.ranges[0].numel for t in run.targets)
    every = sum(-(-p.numel() // world) for p in run.model.module.parameters())
    shards = "bf16 shards" if width == 2 else "fp32 shards"
    master = "fp32 remainder" if run.placement.master_format == "split" else "fp32 master"
    held = {shards: width * target_numel, master: run.placement.master_bytes * target_numel}
    held = {name: n for name, n in held.items() if n} | {"other weights": width * (every - target_numel)}
    return held | ({SECOND_COPY: width * every * (world // run.copy_ranks)} if run.copy_ranks else {})


def _factors(run: Run) -> dict[str, int]:
    """A dense target needs no slices but the own ones."""
    plan, own = run.plan, run.plan.slices_per_rank
    numel_A = sum((plan.slices if t.kind == "factor" else own) * t.r * t.cols for t in run.targets)
    rows_B = sum(plan.slices * t.r * t.ranges[plan.rank].rows for t in run.targets if t.kind == "factor")
    own_B = sum(own * t.r * t.rows for t in run.targets)
    state = sum(t.factor_numel(own) for t in run.targets)
    return {
        "A of all slices": 4 * numel_A,
        "B rows of all slices": 4 * rows_B,
        "own B": 4 * own_B,
        "slice state": 16 * state,
    }


def _computing(run: Run) -> dict[str, int]:
    kept, inputs, outside, logits = activations(run)
    largest = max(kept, default=0)
    if run.batch.checkpointing:
        held, block = inputs + outside, int((1 + IN_FLIGHT) * largest)
    else:
        held, block = sum(kept) + outside, int(IN_FLIGHT * largest)
    return {
        "gathered weights": run.placement.width * run.gathers.peak,
        "activations": held,
        EITHER[0]: LOSS_BYTES * logits,
        EITHER[1]: block,
    }


def activations(run: Run) -> tuple[list[int], int, int, int]:
    """(bytes kept per block, bytes of all blocks' inputs, bytes outside of the blocks, elements of the logits).

    From the trace; for a model that cannot be traced a Llama block's: norms keep fp32 copies of their inputs, the
    Linears and flash attention their inputs, the gated MLP four of its intermediate width.
    """
    if run.trace is not None:
        return run.trace.kept, run.trace.inputs, run.trace.outside, run.trace.logits
    m, width, tokens = run.model, run.placement.width, run.batch.tokens
    block = tokens * (2 * 4 * m.hidden + width * (4 * m.hidden + 2 * m.kv_width + 4 * m.ff))
    inputs = tokens * width * m.hidden
    return [block] * m.layers, inputs * m.layers, 2 * inputs + 4 * tokens * m.hidden, tokens * m.vocabulary


def _updating(run: Run) -> dict[str, int]:
    bucket_bytes = run.section.delta.bucket_bytes
    buffers = {"exchange buffers": plan_exchange.buffer_bytes(run.targets, run.plan, bucket_bytes, run.itemsize)}
    numel = max(t.ranges[0].numel for t, _ in run.shapes)
    staged = run.placement.staged_bytes * min(numel, STAGED_ELEMENTS)
    return buffers | ({"staged weights": staged} if staged else {})


def host_per_node(run: Run, found: Memory) -> int:
    """Bytes of host memory on one node, page cache not counted."""
    return min(run.cluster.gpus, run.cluster.gpus_per_node) * sum(found.host.values())
