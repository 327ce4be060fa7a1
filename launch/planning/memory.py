"""Memory of a planned run, per GPU and per node, by component; bytes.

What stays for the whole run is counted exactly as the engine does (`HDPissaEngine.memory_bytes`). What comes and goes
is counted at three moments: at the turn from forward to backward, while an optimizer step updates the weights, and
while GRPO generates.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from hdpissa.engine.sharding.shards import STAGED_ELEMENTS
from hdpissa.launch.planning import exchange as plan_exchange
from hdpissa.launch.planning.hardware import GIB
from hdpissa.launch.planning.run import Run

# CUDA context, NCCL's buffers, cuBLAS' workspaces; and what the allocator cannot use of the rest. Assumptions.
CONTEXT = 2 * GIB
FRAGMENTATION = 0.05
# Python, torch, CUDA and DeepSpeed of one process, in host memory; an assumption.
PROCESS = 4 * GIB
# fp32 at the height of the loss's backward pass: log-probabilities, their gradient, the gradient of the logits.
LOSS_BYTES = 12
# TRL's head projects tiles of so many tokens and vocabulary entries (trl 1.16, kernels/chunked_logprob.py), and keeps
# seven fp32 numbers per token: running sums, log-probability, its gradient.
TILE_TOKENS, TILE_VOCABULARY, TILE_STATISTICS = 4096, 32768, 7
SECOND_COPY = "second copy (hpZ)"
REFERENCE, REFERENCE_GATHERED = "reference shards", "reference: gathered weights"
# Gradients in flight within a block, as a share of what the block keeps for backward.
IN_FLIGHT = 0.5


@dataclass(frozen=True)
class Memory:
    """Bytes by component.

    Attributes:
        persistent: on the GPU for the whole run. computing: on top, at its height in a micro-batch.
        updating: on top, while weights are updated. generating: on top, while GRPO generates; else empty.
        host: per process, in host memory for the whole run.
    """

    persistent: dict[str, int]
    computing: dict[str, int]
    updating: dict[str, int]
    generating: dict[str, int]
    reserve: int
    host: dict[str, int]

    @property
    def peak(self) -> int:
        """The GPU's peak."""
        return sum(self.persistent.values()) + self.reserve + max(self._moments().values())

    @property
    def busiest(self) -> str:
        """When that is: "computing", "updating" or "generating"."""
        moments = self._moments()
        return max(moments, key=lambda name: moments[name])

    def _moments(self) -> dict[str, int]:
        sums = {"updating": sum(self.updating.values()), "generating": sum(self.generating.values())}
        return {"computing": _height(self.computing), **sums}


# The loss and a block's backward pass do not meet: only the larger one counts.
EITHER = ("logits and loss", "block in backward")


def _height(computing: dict[str, int]) -> int:
    always = sum(n for name, n in computing.items() if name not in EITHER)
    return always + max(computing[name] for name in EITHER)


def memory(run: Run) -> Memory:
    """All of it."""
    weights, factors = _weights(run), _factors(run)
    on_host = (
        {"bf16 shards", "fp32 shards", "other weights", SECOND_COPY, REFERENCE} if run.placement.offload else set()
    )
    if run.placement.offload or run.placement.master_on_cpu:
        on_host |= {"fp32 remainder", "fp32 master"}
    persistent = {name: n for name, n in (weights | factors).items() if name not in on_host}
    host = {name: n for name, n in weights.items() if name in on_host}
    found = Memory(persistent, _computing(run), _updating(run), _generating(run), 0, {**host, "process": PROCESS})
    return dataclasses.replace(found, reserve=CONTEXT + int(FRAGMENTATION * found.peak))


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
    held |= {SECOND_COPY: width * every * (world // run.copy_ranks)} if run.copy_ranks else {}
    return held | ({REFERENCE: width * every} if run.objective.reference else {})


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
    width = run.placement.width
    reference = {REFERENCE_GATHERED: width * run.reference_gathers.peak} if run.objective.reference else {}
    loss = chunked_loss(run) if run.objective.chunked else LOSS_BYTES * logits
    gathered = {"gathered weights": width * run.gathers.peak} | reference
    return gathered | {"activations": held, EITHER[0]: loss, EITHER[1]: block}


def chunked_loss(run: Run) -> int:
    """Of TRL's head at the height of its backward pass: a tile of logits, the tokens' last hidden states once more,
    and their gradient in fp32 and in the compute dtype."""
    tokens, width, m = run.batch.tokens, run.placement.width, run.model
    tile = width * min(tokens, TILE_TOKENS) * min(m.vocabulary, TILE_VOCABULARY)
    return tile + tokens * ((2 * width + 4) * m.hidden + 4 * TILE_STATISTICS)


def _generating(run: Run) -> dict[str, int]:
    """All rows of a step are generated at once, by TRL's default; their keys and values are kept until the end."""
    if not run.objective.generates:
        return {}
    m, world, width = run.model, run.plan.world_size, run.placement.width
    gathered = run.forward_gathers.peak
    if run.objective.gathers_to_generate and run.must_gather:
        gathered = sum(world * -(-p.numel() // world) for p in m.module.parameters())
    cache = 2 * width * m.layers * m.kv_width * run.batch.tokens * run.batch.accumulation
    return {"gathered weights": width * gathered, "key-value cache": cache}


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
