"""What the ranks of the engine tests do; functions here run inside `ranks.run_ranks`."""

from __future__ import annotations

import gc

import torch
import torch.distributed as dist
from tiny import build, tiny_batch


def whole_weights(engine) -> dict[str, torch.Tensor]:
    """Every target's weight, exact, on rank 0 (empty elsewhere)."""
    gathered = {f"{t.name}.weight": gather_exact(t, engine.plan) for t in engine.targets}
    return {name: w.clone() for name, w in gathered.items() if w is not None}


def all_trained(engine) -> dict[str, torch.Tensor]:
    """The same, and the parameters that are trained whole."""
    from hdpissa.engine.sharding import zero3

    beside = engine.optimizer.modules_to_save.params.items() if engine.optimizer.modules_to_save else ()
    whole = {name: zero3.whole_value(param) for name, param in beside}
    return whole_weights(engine) | {name: w.clone() for name, w in whole.items() if engine.plan.rank == 0}


def gather_exact(target, plan) -> torch.Tensor | None:
    """The whole fp32 weight (O × I) on rank 0, None elsewhere."""
    owned = target.own_range(plan)
    part = torch.zeros(target.shard_size)
    part[: owned.numel] = target.shard.read(0, owned.numel)
    received = [torch.empty_like(part) for _ in target.ranges] if plan.rank == 0 else None
    dist.gather(part, received, dst=0)
    return received and torch.cat(received)[: target.rows * target.cols].view(target.rows, target.cols)


def train_tiny(
    settings,
    *,
    steps=4,
    lr=1e-3,
    model=None,
    checkpointing=False,
    eval_between=False,
    poison=None,
    poison_with=float("nan"),
    staged=False,
    after=None,
    only_ours=None,
):
    """Trains a tiny Llama; returns losses, weights (rank 0), and what the steps reported.

    Args:
        lr: one for all steps, or a list.
        staged: W is treated as if it were on another device than the factors.
        poison: (rank, step): that rank's loss is multiplied by `poison_with` in that step.
        only_ours: (release,): DeepSpeed's own step is left out, and `release_gathered` too unless `release`.
        after: called with the engine at the end; its result is returned too.
    """
    from hdpissa.engine import initialize
    from hdpissa.engine.sharding import shards, zero3

    if staged:
        shards.is_elsewhere = lambda part, device: True
    net = build(model)
    if checkpointing:
        net.gradient_checkpointing_enable({"use_reentrant": False})
    engine = initialize(model=net, config=settings)
    if only_ours is not None:
        engine.ds.step = lambda: None
        zero3.release_gathered = zero3.release_gathered if only_ours[0] else lambda ds: None
    accumulation = engine.gradient_accumulation_steps()
    results, forward_losses = [], []
    for step in range(steps):
        engine.optimizer.param_groups[0]["lr"] = lr[step] if isinstance(lr, list) else lr
        for slice_id, micro in engine.plan.schedule(accumulation):
            loss = engine(**zero3.to_device(tiny_batch(step, slice_id, micro))).loss
            if poison == (dist.get_rank(), step):
                loss = loss * poison_with
            engine.backward(loss)
            results.append(engine.step())
        if eval_between:
            forward_losses.append(eval_loss(engine))
    assert [r is not None for r in results] == ([False] * (accumulation - 1) + [True]) * steps
    results = [r for r in results if r is not None]
    plan = engine.exchange_plan()
    assert {(r.bytes_sent, r.collectives) for r in results if r.applied} == {(plan.bytes_per_step, plan.collectives)}
    return {
        "plan": plan,
        "losses": [r.loss for r in results],
        "steps": results,
        "eval": forward_losses,
        "weights": whole_weights(engine),
        "after": after(engine) if after else None,
    }


def spoil_delta(optimizer) -> None:
    """The next Δ that the optimizer computes has a nan in it."""
    original = optimizer._adam

    def spoilt(bucket, dtype):
        delta = original(bucket, dtype)
        delta[:1] = float("nan")
        optimizer._adam = original
        return delta

    optimizer._adam = spoilt


def lost_weights(settings, *, steps, step, export_to=None):
    """What a nan of rank 0's Δ in `step` leads to: (steps that returned, message, weights before and
    after on rank 0)."""
    from hdpissa.engine import initialize

    engine = initialize(model=build({}), config=settings)
    before, done = whole_weights(engine), 0
    try:
        for at in range(steps):
            if dist.get_rank() == 0 and at == step:
                spoil_delta(engine.optimizer)
            for slice_id, micro in engine.plan.schedule(engine.gradient_accumulation_steps()):
                engine.backward(engine(**tiny_batch(at, slice_id, micro)).loss)
                engine.step()
            done += 1
        if export_to:
            engine.export(export_to)
    except RuntimeError as error:
        return done, str(error), before, whole_weights(engine)
    return done, None, before, whole_weights(engine)


def eval_loss(engine) -> float:
    """The loss on a fixed batch in eval mode; same on all ranks."""
    engine.eval()
    with torch.no_grad():
        loss = engine(**tiny_batch(999, 0, 0)).loss.item()
    engine.train()
    return loss


def live_tensor_bytes() -> int:
    """Bytes of every CPU storage that a tensor of the process still refers to, each once."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and thing.device.type == "cpu"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def expected_bytes(engine) -> dict[str, int]:
    """Of a rank: 4 bytes per target weight, the parameter's width per other weight, factors and their state."""
    from hdpissa.engine.sharding import zero3

    world = engine.plan.world_size
    targets = sum(t.rows * t.cols for t in engine.targets)
    every = sum(zero3.full_numel(p) for p in engine.module.parameters())
    width = zero3.shard_view(engine.targets[0].param).element_size()
    held = engine.memory_bytes()
    parts = {
        "target weights": 4 * targets // world,
        "other weights": width * (every - targets) // world,
        "factors": held["factors"],
        "slice state": held["slice_state"],
    }
    return {**parts, "expected": sum(parts.values())}


def measure_memory(settings, model):
    """Bytes of this rank after two steps, measured and expected, and `memory_bytes()`."""
    from hdpissa.engine import initialize

    engine = initialize(model=build(model), config=settings)
    for _ in range(2 * engine.gradient_accumulation_steps()):
        engine.backward(engine(**tiny_batch(0, 0, 0)).loss)
        engine.step()
    return {"measured": live_tensor_bytes(), **expected_bytes(engine)}, engine.memory_bytes()


def losses_in_shards(settings, *, steps, lr, bf16_only=False):
    """Follows every target's exact W through the steps, on one rank.

    Returns: per target (change of W between start and end, sum of the deltas as the kernel gave them,
    W at the start), float64.
    """
    from hdpissa.engine import initialize
    from hdpissa.engine.sharding import shards
    from hdpissa.kernels import api

    if bf16_only:
        shards.FORMATS["split"] = Bf16OnlyShard
    engine = initialize(model=build({}), config=settings)
    assert engine.plan.world_size == 1
    start = {t.name: t.shard.read(0, t.rows * t.cols).double() for t in engine.targets}
    deltas = {t.name: torch.zeros(t.rows * t.cols, dtype=torch.float64) for t in engine.targets}
    order, original = [t.name for t in engine.targets], api.delta_apply_
    calls = []

    def record(parts, *args, start, scale, second_order, **kwargs):
        whole = {"start": start, "numel": parts[0].numel(), "second_order": second_order}
        deltas[order[len(calls) % len(order)]] += scale * api.dense_delta(*args[:4], **whole).double()
        calls.append(1)
        original(parts, *args, start=start, scale=scale, second_order=second_order, **kwargs)

    api.delta_apply_ = record
    for step in range(steps):
        engine.optimizer.param_groups[0]["lr"] = lr
        for slice_id, micro in engine.plan.schedule(engine.gradient_accumulation_steps()):
            engine.backward(engine(**tiny_batch(step, slice_id, micro)).loss)
            engine.step()
    assert len(calls) == steps * len(order)
    end = {t.name: t.shard.read(0, t.rows * t.cols).double() for t in engine.targets}
    return {name: (end[name] - start[name], -deltas[name], start[name]) for name in order}


class Bf16OnlyShard:
    """The negative control, what a plain implementation does: no remainder, W is what bf16 can hold."""

    def __init__(self, compute, exact, place) -> None:
        self._compute = compute
        compute().copy_(exact)

    def read(self, start, stop):
        return self._compute()[start:stop].float()

    def parts(self):
        return self._compute(), torch.zeros(self._compute().numel(), dtype=torch.int16)

    nbytes = 0


def one_step_change(settings, model):
    """(change of every target's W in one step on rank 0, float64; the slice count)."""
    from hdpissa.engine import initialize

    engine = initialize(model=build(model), config=settings)
    before = whole_weights(engine)
    engine.optimizer.param_groups[0]["lr"] = 1e-3
    for slice_id, micro in engine.plan.schedule(engine.gradient_accumulation_steps()):
        engine.backward(engine(**tiny_batch(0, slice_id, micro)).loss)
        engine.step()
    return {name: w.double() - before[name].double() for name, w in whole_weights(engine).items()}


def raises(kind, settings, *, model=None, reentrant=False, detach=False, micro=1):
    """The message of the exception that a short run raises."""
    from hdpissa.engine import initialize

    try:
        net = build(model)
        if reentrant:
            net.gradient_checkpointing_enable({"use_reentrant": True})
        engine = initialize(model=net, config=settings)
        for _ in range(micro):
            loss = engine(**tiny_batch(0, 0, 0)).loss
            if detach:
                loss = loss.detach() * torch.ones((), requires_grad=True)
            engine.backward(loss)
        engine.step()
    except kind as error:
        return str(error)
    return None


def export_and_compare(settings, folder, *, model=None, dtype="auto", file_bytes=None, source=None):
    """Trains two steps, exports; returns the engine's logits, eval loss and exact weights on rank 0."""
    from hdpissa.engine import initialize, load_pretrained
    from hdpissa.engine.export import hf_folder

    if file_bytes:
        hf_folder.MAX_FILE_BYTES = file_bytes
    net = load_pretrained(source, settings) if source else build(model)
    engine = initialize(model=net, config=settings)
    for step in range(2):
        engine.optimizer.param_groups[0]["lr"] = 1e-3
        for slice_id, micro in engine.plan.schedule(engine.gradient_accumulation_steps()):
            engine.backward(engine(**tiny_batch(step, slice_id, micro)).loss)
            engine.step()
    engine.eval()
    with torch.no_grad():
        logits = engine(**tiny_batch(999, 0, 0)).logits.float().clone()
        batch = tiny_batch(999, 0, 0)
        ids = engine.generate(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            pad_token_id=0,
            max_new_tokens=4,
            do_sample=False,
        )
    engine.export(folder, dtype=dtype)
    dist.barrier()
    return {"logits": logits, "ids": ids, "weights": whole_weights(engine)}


def start_values(settings, source, *, disturb=False):
    """(exact start values of every target on rank 0, warnings) of a checkpoint under bf16 compute."""
    import logging

    from hdpissa.engine import initialize, load_pretrained
    from hdpissa.engine.sharding import zero3

    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("hdpissa").addHandler(handler)
    net = load_pretrained(source, settings)
    if disturb:  # as a user who changes weights after loading would
        for p in net.parameters():
            zero3.shard_view(p).mul_(1.5)
    engine = initialize(model=net, config=settings)
    return whole_weights(engine), messages


def loading_error(settings, folder):
    """The message with which loading a checkpoint is refused."""
    from hdpissa.engine import ConfigError, load_pretrained

    try:
        load_pretrained(folder, settings)
    except ConfigError as error:
        return str(error)
    return None


def flip_byte(path) -> None:
    """Spoils the last byte of a file."""
    with path.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))


def write_error(settings, folder, *, how=None, format="hf"):
    """Exports to a folder where that cannot work; every rank must come back with an error."""
    from hdpissa.engine import ConfigError, initialize
    from hdpissa.engine.distributed import faults
    from hdpissa.engine.export import writer
    from hdpissa.engine.files import disk

    engine = initialize(model=build({}), config=settings)
    if how == "disk full":
        faults._fault = faults.Fault.parse("save.write:0:*:ENOSPC:2")
    elif how == "flipped byte":
        drop, writer._drop_cache = writer._drop_cache, lambda path: (flip_byte(path), drop(path))
    elif how == "no room":
        disk.free_bytes = lambda folder: 1000
    elif how == "bad generation config":
        engine.module.generation_config.temperature = 0.5
    try:
        engine.export(folder, format=format)
    except ConfigError as error:
        return str(error)
    return None


def groups_of(engine):
    """Names of the leaders of shared inputs → names of their followers, as the engine has learned them."""
    store = engine.optimizer.store
    names = {id(factors): name for name, factors in store.layers.items()}
    return {names[leader]: [names[id(f)] for f in others] for leader, others in store.inputs.followers.items()}


def ranks_of(engine):
    """Module suffix → r."""
    return {t.name.rsplit(".", 1)[-1]: t.r for t in engine.targets}


def kinds(engine):
    """Module suffix → how its update travels."""
    return {t.name.rsplit(".", 1)[-1]: t.kind for t in engine.targets}


def counts(engine):
    """(steps done, steps skipped)."""
    return engine.global_steps, engine.skipped_steps


def train_real(settings, folder, ids, export_folder, *, steps, lr, layers):
    """Trains the first layers of a checkpoint on one text; what test_real_model.py looks at."""
    from safetensors import safe_open

    from hdpissa.engine import initialize, load_pretrained

    engine = initialize(model=load_pretrained(folder, settings, num_hidden_layers=layers), config=settings)
    with safe_open(f"{folder}/model.safetensors", framework="pt") as file:
        exact = sum(torch.equal(w, file.get_tensor(name)) for name, w in whole_weights(engine).items())
    losses = []
    engine.optimizer.param_groups[0]["lr"] = lr
    for _ in range(steps):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        losses.append(engine.step().loss)
    memory = {"measured": live_tensor_bytes(), **expected_bytes(engine)}
    engine.eval()
    with torch.no_grad():
        logits = engine(input_ids=ids).logits.float().clone()
    engine.export(export_folder)
    dist.barrier()
    return {"losses": losses, "exact_at_start": exact, "memory": memory, "logits": logits, "ids": ids}


def in_step(rank, step, action):
    """Has `action` called on one rank just before the optimizer's work of one step (counted from 1)."""
    from hdpissa.engine.optim.optimizer import SliceOptimizer

    original, calls = SliceOptimizer.reduce, []

    def reduce(self):
        calls.append(None)
        if len(calls) == step and dist.get_rank() == rank:
            action()
        return original(self)

    SliceOptimizer.reduce = reduce
