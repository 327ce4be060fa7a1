"""The cheapest change that makes a run fit, in words that can be typed.

Tried in order of cost: no reference model (its log-probabilities are computed beforehand), gradient checkpointing (a
third more compute), smaller micro-batches with more accumulation (the same step, less efficient), generation with
weights gathered layer by layer (slow), no second copy of W (hpZ; the network), shards and masters in host memory (the
host link), more GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator

from hdpissa.engine.errors import ConfigError
from hdpissa.launch.planning.memory import memory
from hdpissa.launch.planning.objective import PRECOMPUTED
from hdpissa.launch.planning.run import Run

MOST_GPUS = 1024


def fits(run: Run) -> bool:
    return memory(run).peak <= run.cluster.gpu.memory


def cheapest_change(run: Run, *, file: str = "") -> str:
    """The change, or that there is none.

    Args:
        file: the DeepSpeed JSON in use, whose values have to be changed there.
    """
    for changed in _candidates(run):
        if fits(changed):
            return _words(run, changed, file)
    return f"no change of these makes it fit on up to {MOST_GPUS} GPUs; take a GPU with more memory or shorter rows"


def _candidates(run: Run) -> Iterator[Run]:
    """From the cheapest on. What was not enough stays; micro-batches are as large as can be."""
    if run.objective.reference and run.objective.trainer in PRECOMPUTED:
        run = run.with_objective(reference=False)
        yield run
    if not run.batch.checkpointing and run.model.checkpointing:
        run = run.with_batch(checkpointing=True)
    yield from _smaller_batches(run)
    if run.objective.generates and run.objective.gathers_to_generate and memory(run).busiest == "generating":
        run = run.with_objective(gathers_to_generate=False)
        yield from _smaller_batches(run)
    if run.copy_ranks:
        run = run.without_second_copy()
        yield from _smaller_batches(run)
    if not run.placement.offload:
        yield from _smaller_batches(run.with_offload())
    for wider in (*_more_gpus(run), *_more_gpus(run.with_offload())):
        yield from _smaller_batches(wider)


def _smaller_batches(run: Run) -> Iterator[Run]:
    """The run itself, then the same global batch in smaller pieces."""
    rows, steps = run.batch.rows, run.batch.accumulation
    for smaller in (n for n in range(rows, 0, -1) if rows % n == 0):
        yield run.with_batch(rows=smaller, accumulation=steps * (rows // smaller))


def _more_gpus(run: Run) -> Iterator[Run]:
    """The same slices on two, four, … times the GPUs; accumulation shrinks as far as it goes."""
    gpus, steps = run.cluster.gpus, run.batch.accumulation
    while (gpus := gpus * 2) <= MOST_GPUS:
        least = max(1, run.plan.slices // gpus)
        steps = steps // 2 if steps % (2 * least) == 0 else steps
        changed = run.with_gpus(gpus, run.plan.slices).with_batch(accumulation=steps)
        try:
            assert changed.plan
        except ConfigError:  # neither of slices and GPUs divides the other, or the nodes are not whole
            continue
        yield changed


def _words(run: Run, changed: Run, file: str) -> str:
    flags: list[tuple[str, str]] = []
    if run.objective.reference and not changed.objective.reference:
        flags.append(("--precompute_ref_log_probs", ""))
    if changed.batch.checkpointing and not run.batch.checkpointing:
        flags.append(("--gradient_checkpointing", ""))
    if changed.batch.rows != run.batch.rows:
        flags.append((f"--per_device_train_batch_size {changed.batch.rows}", "train_micro_batch_size_per_gpu"))
    if changed.batch.accumulation != run.batch.accumulation:
        flags.append((f"--gradient_accumulation_steps {changed.batch.accumulation}", "gradient_accumulation_steps"))
    if run.objective.gathers_to_generate and not changed.objective.gathers_to_generate:
        flags.append(("--ds3_gather_for_generation false", ""))
    if changed.placement.offload and not run.placement.offload:
        flags.append(("--offload_param", "zero_optimization.offload_param.device"))
    if changed.cluster.gpus != run.cluster.gpus:
        flags.append((f"--gpus {changed.cluster.gpus}", ""))
        flags.append((f"--slices {changed.plan.slices}", "hd_pissa.slices"))
    words = " ".join(flag for flag, _ in flags)
    if changed.copy_ranks < run.copy_ranks:  # only a JSON can have said it
        words += f"{' and ' if words else ''}zero_optimization.zero_hpz_partition_size 1 in {file}"
    keys = [key for _, key in flags if key]
    return words + (f" (and the same in {file}: {', '.join(keys)})" if file and keys else "")
