"""The state of a run as files of a checkpoint, and back: by slice and by range of a weight, at any number of ranks.

full     every target's exact fp32 values, moments, running sums, factors. Resumes bit for bit at the same world size.
         Both kinds: exact fp32 weights and moments of `modules_to_save`, if any.
small    without the weights, which follow in first-order training, because A_i and B_i never change:
         W = W_0 − scale · Σ_i (ΣΔB_i A_i + B_i ΣΔA_i). With the second-order term it leaves Σ_t ΔB_i ΔA_i out; the
         manifest says how much of ΔW that is, where it was measured.

Weights that are no targets are the base model's and are not stored; their checksums are, and a run refuses a
checkpoint of another base. `writer.py` writes, `reader.py` reads, this module knows what the numbers mean.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import consensus
from ..comm.exchange import FactorExchange
from ..directions.decompose import InitReport
from ..distributed import heartbeat
from ..errors import one_line
from ..files.checksum import MASK, checksum, forget, signed
from ..method.delta import DeltaRule
from ..method.targets import Target
from ..optim.factors import FactorStore
from ..optim.modules_to_save import ModulesToSave
from ..optim.optimizer import SliceOptimizer
from ..sharding import zero3
from ..sharding.slicing import SlicePlan
from . import directory
from .manifest import (
    MANIFEST,
    REMEDY,
    STATE,
    Base,
    CheckpointError,
    Manifest,
    StoredModules,
    TargetSpec,
    factors_file,
    modules_file,
    range_key,
    rng_file,
    slice_file,
    weights_file,
)
from .reader import CheckpointReader
from .writer import OwnFile, Part

logger = logging.getLogger(__name__)

# --- the base model --------------------------------------------------------------------------------


def describe_base(model: nn.Module, targets: Sequence[Target], plan: SlicePlan) -> Base:
    """Checksums of every parameter as it is now; collective. Targets by their exact values."""
    exact = {id(t.param): t for t in targets}
    names, sums = [], []
    for name, param in model.named_parameters():
        target = exact.get(id(param))
        shard, start = zero3.shard_view(param), plan.rank * -(-zero3.full_numel(param) // plan.world_size)
        if target is not None and target.shard is not None:
            shard = target.shard.read(0, target.own_range(plan).numel)
        names.append(name)
        sums.append(signed(checksum(shard, start)))
        heartbeat.progress()
    forget()
    total = torch.tensor(sums, dtype=torch.int64, device=zero3.device())
    dist.all_reduce(total)  # int64 wraps around, as the checksum wants it
    found = {name: f"{value & MASK:016x}" for name, value in zip(names, total.tolist(), strict=True)}
    dtype = str(zero3.shard_view(targets[0].param).dtype).removeprefix("torch.")
    return Base(name_or_path=str(getattr(model, "name_or_path", "") or ""), dtype=dtype, checksums=found)


# --- writing -------------------------------------------------------------------------------


def own_files(kind: str, optimizer: SliceOptimizer, extra: Mapping[str, str]) -> list[OwnFile]:
    """The files that this rank writes.

    Args:
        extra: name → text of the caller's files; rank 0 writes them.
    """
    store, plan = optimizer.store, optimizer.store.plan
    states, text = generators()
    files = [OwnFile(rng_file(plan.rank), [_fixed(key, state) for key, state in states.items()], metadata=text)]
    if plan.rank == 0:
        files += [OwnFile(name, text=text) for name, text in extra.items()]
    if kind == "full":
        files.append(OwnFile(weights_file(plan.rank, plan.world_size), list(_weights(store))))
    if (modules := optimizer.modules_to_save) is not None:
        files.append(OwnFile(modules_file(plan.rank, plan.world_size), list(_modules(modules, plan))))
    if plan.replica == 0:
        for index, slice_id in enumerate(plan.owned):
            files.append(OwnFile(slice_file(slice_id), list(_slice_state(store, index))))
            files.append(OwnFile(factors_file(slice_id), list(_factors(store, index)), constant=True))
    return files


def _weights(store: FactorStore) -> Iterator[Part]:
    for target in store.targets:
        owned = target.own_range(store.plan)
        if owned.numel:
            assert target.shard is not None
            key = range_key(target.name, owned.start, owned.stop)
            yield Part(key, (owned.numel,), torch.float32, partial(target.shard.read, 0, owned.numel))


def _modules(modules: ModulesToSave, plan: SlicePlan) -> Iterator[Part]:
    for name, state, values in modules.views():
        owned = modules.own_range(name, plan.rank, plan.world_size)
        if owned.numel:
            yield _fixed(range_key(f"{name}.{state}", owned.start, owned.stop), values)


def _slice_state(store: FactorStore, index: int) -> Iterator[Part]:
    for state in STATE:
        for name, A, B in store.state_views(state, index):
            yield _fixed(f"{name}.{state}_A", A)
            yield _fixed(f"{name}.{state}_B", B)


def _factors(store: FactorStore, index: int) -> Iterator[Part]:
    for target in store.targets:
        A, B = store.own_factors(target, index)
        yield _fixed(f"{target.name}.A", A)
        yield _fixed(f"{target.name}.B", B)


def _fixed(key: str, values: Tensor) -> Part:
    return Part(key, tuple(values.shape), values.dtype, lambda: values)


def make_manifest(
    kind: str,
    optimizer: SliceOptimizer,
    base: Base,
    *,
    steps: tuple[int, int, int],
    report: InitReport,
    residual: float | None,
    client_state: dict[str, Any],
    extra_files: Sequence[str] = (),
) -> Manifest:
    """The manifest without its files.

    Args:
        steps: done, skipped of them, and skipped in a row at the end.

    Raises:
        ConfigError: `client_state` is not JSON-serialisable.
    """
    from importlib.metadata import version

    try:
        client_state = json.loads(json.dumps(client_state))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"client_state must be JSON-serialisable: {one_line(error)}") from None
    store, rule = optimizer.store, optimizer.rule
    manifest = Manifest(
        kind=kind,  # type: ignore[arg-type]
        step=steps[0],
        skipped_steps=steps[1],
        skipped_in_a_row=steps[2],
        updates=optimizer.updates,
        largest_grad=optimizer.largest_grad,
        learning_rate=float(optimizer.param_groups[0]["lr"]),
        world_size=store.plan.world_size,
        slices=store.plan.slices,
        second_order=rule.second_order,
        adam=_adam(rule),
        exact=kind == "full" or sums_are_exact(optimizer),
        residual=residual,
        init_residual=report.residual,
        init_worst=report.worst,
        targets=[_spec(t) for t in store.targets],
        base=base,
        versions={name: version(name) for name in ("hdpissa", "torch", "deepspeed", "transformers")},
        client_state=client_state,
        files={},
        modules_to_save=_describe_modules(optimizer),
        extra_files=sorted(extra_files),
    )
    try:
        Manifest.model_validate_json(json.dumps(manifest.model_dump(mode="json")))
    except ValueError as error:
        raise CheckpointError(
            f"client_state would not be read back ({one_line(error, 160)}): use plain text and numbers"
        ) from None
    return manifest


def _describe_modules(optimizer: SliceOptimizer) -> StoredModules | None:
    if optimizer.modules_to_save is None:
        return None
    return StoredModules(numels=optimizer.modules_to_save.numels, learning_rate=float(optimizer.param_groups[1]["lr"]))


def _adam(rule: DeltaRule) -> dict[str, float]:
    return {"beta1": rule.betas[0], "beta2": rule.betas[1], "eps": rule.eps}


def sums_are_exact(optimizer: SliceOptimizer) -> bool:
    """Whether W follows from the running sums: to first order only, and not where a dense delta is rounded to bf16."""
    rounded = optimizer.rule.dtype != torch.float32 and any(t.kind == "dense" for t in optimizer.store.targets)
    return not (optimizer.rule.second_order or rounded)


def _spec(t: Target) -> TargetSpec:
    return TargetSpec(name=t.name, rows=t.rows, cols=t.cols, r=t.r, scale=t.scale, transposed=t.transposed)


# --- opening and comparing ---------------------------------------------------------------------------------


def open_checkpoint(path: str | Path, *, fall_back: bool = False) -> CheckpointReader:
    """The checkpoint of a folder, every file compared with its SHA-256 by one of the ranks; collective.

    Args:
        path: a checkpoint, or a folder of checkpoints.
        fall_back: take the next best of the folder where one is damaged, with a warning.

    Raises:
        CheckpointError: on all ranks alike.
    """
    path, rank, world_size = Path(path), dist.get_rank(), dist.get_world_size()

    def candidates() -> list[str]:
        itself = (path / MANIFEST).is_file()
        found = [path] if itself else directory.candidates(path) if path.is_dir() else []
        return [str(p) for p in (found if fall_back else found[:1])]

    problems = []
    for candidate in consensus.from_rank0(candidates):  # what rank 0 sees, so that all try the same
        reader, problem = _verified(Path(candidate), rank, world_size)
        if reader is not None and problem is None:
            return reader
        problems.append(problem)
        if rank == 0 and fall_back:
            logger.warning("%s", problem)
    if not problems:
        raise CheckpointError(f"{path} holds no checkpoint (no {MANIFEST}); give a folder checkpoint-N")
    raise CheckpointError(problems[0])


def _verified(folder: Path, rank: int, world_size: int) -> tuple[CheckpointReader | None, str | None]:
    """(reader, None), or the problem of the lowest rank that has one."""
    reader, problem = None, None
    try:
        reader = CheckpointReader(folder)
        names = sorted(reader.manifest.files)[rank::world_size]
        reader.check(names)
        reader.check_headers(names)
    except CheckpointError as error:
        problem = str(error)
    return reader, consensus.first(problem)


def refuse_others(
    reader: CheckpointReader, store: FactorStore, rule: DeltaRule, base: Base, modules: Mapping[str, int]
) -> None:
    """Raises CheckpointError, on all ranks alike, for a checkpoint of another run than this one.

    Args:
        modules: name → elements of the parameters that DeepSpeed trains here.
    """
    found = list(_differences(reader.manifest, store, rule, modules)) or _other_base(
        reader.manifest.base, base, store.targets
    )
    if found:
        raise CheckpointError(
            f"{reader.folder} does not fit this run: {'; '.join(found)}; {REMEDY}, or the same settings"
        )


def _differences(manifest: Manifest, store: FactorStore, rule: DeltaRule, modules: Mapping[str, int]) -> Iterator[str]:
    pairs = [
        ("hd_pissa.slices", manifest.slices, store.plan.slices),
        ("hd_pissa.delta.second_order", manifest.second_order, rule.second_order),
    ]
    yield from (f"{name} is {there} in the checkpoint, {here} here" for name, there, here in pairs if there != here)
    saved = manifest.modules_to_save.numels if manifest.modules_to_save else {}
    if saved != modules:
        odd = next(iter([n for n in {**saved, **modules} if saved.get(n) != modules.get(n)]))
        yield f"hd_pissa.modules_to_save are {len(saved)} in the checkpoint, {len(modules)} here (first other: {odd})"
    there = {t.name: t for t in manifest.targets}
    here = {t.name: _spec(t) for t in store.targets}
    for name in sorted(there.keys() ^ here.keys())[:1]:
        where = "the checkpoint" if name in there else "this run"
        yield f"{len(there)} weights are trained in the checkpoint, {len(here)} here; only {where} has {name}"
    for name in [n for n in here if n in there and there[n] != here[n]][:1]:
        for field in TargetSpec.model_fields:
            a, b = getattr(there[name], field), getattr(here[name], field)
            if a != b:
                yield f"{field} of {name} is {a} in the checkpoint, {b} here"


def _other_base(there: Base, here: Base, targets: Sequence[Target]) -> list[str]:
    """Weights that are not trained are compared only where both runs hold them in the same dtype."""
    trained = {f"{t.name}.weight" for t in targets}
    names = [n for n in here.checksums if there.dtype == here.dtype or n in trained]
    other = [n for n in names if there.checksums.get(n) != here.checksums[n]]
    if not other:
        return []
    return [
        f"the base model is another one: {len(other)} of {len(names)} weights differ (first: {other[0]}); the "
        f"checkpoint's was {there.name_or_path or 'not loaded from files'}"
    ]


# --- restoring ------------------------------------------------------------------------------


def fill_factors(reader: CheckpointReader, store: FactorStore, exchange: FactorExchange) -> InitReport:
    """Gives the store the checkpoint's A and B in place of a decomposition; collective."""
    for bucket in store.buckets:
        As: list[Tensor] = []
        Bs: list[Tensor] = []
        for target in bucket.targets:
            for part, flat in zip(_own_factors(reader, store.plan, target), (As, Bs), strict=True):
                flat.append(part.flatten().to(store.grads.device))
        store.fill(bucket, torch.cat(As), torch.cat(Bs), exchange)
    return InitReport(reader.manifest.init_residual, reader.manifest.init_worst, cached=True)


def _own_factors(reader: CheckpointReader, plan: SlicePlan, target: Target) -> tuple[Tensor, Tensor]:
    found = [reader.factors(slice_id, target.name) for slice_id in plan.owned]
    return torch.stack([A for A, _ in found]), torch.stack([B for _, B in found])


def refuse_changed(reader: CheckpointReader, optimizer: SliceOptimizer) -> None:
    """Raises CheckpointError, on all ranks alike, for a small checkpoint when W is not the base model's any more."""
    if reader.manifest.kind != "small":
        return
    # `updates` may be of a run that began anew on these weights
    if consensus.any_rank(bool(optimizer.store.delta_sum.any())):
        raise CheckpointError(
            f"{reader.folder} is a small checkpoint and this engine has trained: the checkpoint's sums are applied to "
            f"the base model's weights; load the model anew, or save full checkpoints"
        )


@torch.no_grad()
def restore(reader: CheckpointReader, optimizer: SliceOptimizer) -> None:
    """Moments, sums, weights and generators, as they were saved; collective. The factors are in place already."""
    manifest, store = reader.manifest, optimizer.store
    for index, slice_id in enumerate(store.plan.owned):
        views = {(s, name): (A, B) for s in STATE for name, A, B in store.state_views(s, index)}
        for name, state, A, B in reader.slice_state(slice_id):
            views[state, name][0].copy_(A)
            views[state, name][1].copy_(B)
    if manifest.kind == "small":
        optimizer.apply_sums()
        optimizer.check_weights()
        if store.plan.rank == 0 and not manifest.exact:
            lost = "unknown" if manifest.residual is None else f"{manifest.residual:.1e}"
            logger.warning("%s is small: a part of the change of W is lost (relative: %s)", reader.folder, lost)
    else:
        for target in store.targets:
            owned = target.own_range(store.plan)
            assert target.shard is not None
            target.shard.write(reader.weights(target.name, owned.start, owned.stop))
    if optimizer.modules_to_save is not None:
        _restore_modules(reader, optimizer)
    if store.plan.rank == 0 and manifest.adam != _adam(optimizer.rule):
        logger.warning("Adam goes on with %s, not with %s as before", _adam(optimizer.rule), manifest.adam)
    optimizer.resume(manifest.updates, manifest.largest_grad, manifest.learning_rate)
    if manifest.world_size == store.plan.world_size:
        try:
            set_generators(*reader.rng(store.plan.rank))
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"{reader.folder}: its generators cannot be used ({one_line(error)}); {REMEDY}"
            ) from None
    elif store.plan.rank == 0:
        logger.warning(
            "%d ranks saved, %d go on: dropout, if any, draws anew", manifest.world_size, store.plan.world_size
        )


def _restore_modules(reader: CheckpointReader, optimizer: SliceOptimizer) -> None:
    modules, plan = optimizer.modules_to_save, optimizer.store.plan
    assert modules is not None
    assert reader.manifest.modules_to_save is not None
    for name, state, values in modules.views():
        owned = modules.own_range(name, plan.rank, plan.world_size)
        values.copy_(reader.modules_to_save(name, state, owned.start, owned.stop))
    modules.restored(reader.manifest.updates)
    optimizer.param_groups[1]["lr"] = reader.manifest.modules_to_save.learning_rate


# --- random number generators ----------------------------------------------------------------------


def generators() -> tuple[dict[str, Tensor], dict[str, str]]:
    """(states of torch's generators, those of Python's and NumPy's as text)."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    name, keys, *rest = np.random.get_state(legacy=True)
    numpy = json.dumps([name, np.asarray(keys).tolist(), *rest])
    text = {"python": json.dumps(random.getstate()), "numpy": numpy}
    return states, text


def set_generators(states: dict[str, Tensor], text: dict[str, str]) -> None:
    """Restores what `generators` has returned."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    version, internal, gauss = json.loads(text["python"])
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = json.loads(text["numpy"])
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
