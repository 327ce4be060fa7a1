"""Every formula and assumption behind a plan, in words; printed by --explain."""

from __future__ import annotations

from hdpissa.launch.planning import memory as plan_memory
from hdpissa.launch.planning import step as plan_step
from hdpissa.launch.planning.hardware import GIB, figures
from hdpissa.launch.planning.run import Run

TEXT = """
P weights, P_t of them in targets (O × I), K ranks, S slices of rank r, T tokens of a micro-batch, c = S/K or 1.
A row is one sequence; of dpo and reward it is two, chosen and rejected, of which both count in T.

Memory that stays, as the engine counts it
  4 · P_t/K with the split master (6 with fp32), 2 · (P - P_t)/K; fp32 compute: 4 · P/K. Each weight's part rounded up
  4 · S·r · (I + O/K) for A of all slices and the rows of B; 4 · c·r·O own B; 16 · c·r·(O + I) slice state
    (weights whose update travels dense: A of the own slices only, no rows)
  2 · P/K (4 in fp32) for the reference of dpo and kto without precomputed log-probabilities, of grpo with beta > 0
Memory that comes and goes
  gathered weights: DeepSpeed's fetch, prefetch and release rules replayed over the model's own order of modules
  activations: what autograd keeps in a forward pass of the model on the meta device, flash attention assumed
    (a Llama block: 16·hidden + 4·kv + 8·ff bytes per token in bf16); with checkpointing only the blocks' inputs
  block in backward: with checkpointing the block made again; gradients in flight are {in_flight:.0%} of a block
  logits and loss: {loss} bytes per token and vocabulary entry (log-probabilities and two gradients, fp32); of TRL's
    chunked head (sft by choice; dpo, grpo, kto) a tile of {tile_tokens} tokens × {tile_vocabulary} entries, and per
    token (2·2 + 4)·hidden + {statistics} bytes in bf16; it holds lm_head gathered through each pass
  reference: gathered weights as above, by DeepSpeed's rules for the JSON as written, of a forward pass alone
  generation (grpo): all weights (ds3_gather_for_generation), or those of a forward pass; and 2 · layers · kv elements
    per token of all rows of a step, prompt and completion
  the loss and a block's backward pass do not meet; the exchange's buffers meet neither
  reserve: {context:.0f} GiB for CUDA, NCCL and cuBLAS, and {fragmentation:.0%} of the rest for fragmentation (assumed)
  second copy (hpZ): P · bytes of a weight / ranks that share it, where the shards lie; gathers after the first one of
    an optimizer step are of it (of weights outside the targets all are), among those ranks
  host: {process:.0f} GiB per process (assumed), page cache not counted. Not counted: computing the slices at the start
Bytes on the wire, sent per GPU; of generation none is counted
  gathers: gathered weights · (K-1)/K; what stays gathered (stage3_param_persistence_threshold) once more per update
  factors: (K-1) parts of ΔA, and the rows of ΔB that each shard touches;
  dense: (K-1) shards. "auto" takes per weight what sends less. Shared slices: a ring all-reduce of their gradients
  passes without gradient, gathered weights of each: the reference's (kto two), and of kto one of the model itself
  votes: float64 numbers, the engine's, and the gradient norm of the one element that DeepSpeed trains
Time
  products: 4 per weight and token (forward, input gradient; {recompute}), attention 3.5 causal forwards; a forward
    more per pass without gradient. Generation, rewards and precomputing are not in the forecast
  element-wise: 36·hidden + 12·kv + 9·ff elements per layer and token, 3 per vocabulary entry; a third is forward
  low-rank: x read twice per group of Linears that share it, dy once; or
    4·r·(in + out) FLOP per target and token, where these take longer
  apply: max(8 bytes per weight of the shard (split), 4·S·r FLOP), each product made of {products} of 16-bit numbers;
    weights on the host come and go over the host link; Adam {adam} bytes per factor element
  bound = max(compute, gathers) per micro-batch + exchange + apply + Adam + gathering what stays
    gathered, no overlap between the last four
  forecast = bound / {efficiency} (systems of this kind reach 0.65 to 0.75), at least {launch:.1f} µs per kernel and
    {collective:.0f} µs per gather, {per_layer} kernels per layer and {per_linear} per target
  tokens/s count all T tokens, as if no row were padded. MFU(4N) = (forward + input gradient + attention + head,
    nothing twice, no weight gradient) / (time · data-sheet peak)
Rates reached (not promised) by a {name}
  {rates}
  between nodes: a gather enters a node once over all its ports; an all-to-all has its own port only
"""


def explain(run: Run) -> str:
    """The text, with the numbers in use."""
    gpu = figures(run.cluster.gpu)
    name = gpu.pop("name")
    return TEXT.format(
        in_flight=plan_memory.IN_FLIGHT,
        loss=plan_memory.LOSS_BYTES,
        tile_tokens=plan_memory.TILE_TOKENS,
        tile_vocabulary=plan_memory.TILE_VOCABULARY,
        statistics=4 * plan_memory.TILE_STATISTICS,
        context=plan_memory.CONTEXT / GIB,
        fragmentation=plan_memory.FRAGMENTATION,
        process=plan_memory.PROCESS / GIB,
        recompute="the forward twice" if run.batch.checkpointing else "a third forward with checkpointing",
        products=plan_step.PRODUCTS[run.section.delta.precision],
        adam=plan_step.ADAM_BYTES,
        efficiency=plan_step.EFFICIENCY,
        launch=1e6 * plan_step.LAUNCH_S,
        collective=1e6 * plan_step.COLLECTIVE_S,
        per_layer=plan_step.LAUNCHES_PER_LAYER,
        per_linear=plan_step.LAUNCHES_PER_LINEAR,
        name=name,
        rates=", ".join(f"{key} {value:g}" for key, value in gpu.items()),
    ).strip("\n")
