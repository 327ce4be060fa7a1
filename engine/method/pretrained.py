"""The exact fp32 values of a rank's shards, read from the checkpoint's own files.

ZeRO-3 rounds weights to the compute dtype while it loads them, so under bf16 compute the values of an fp32
checkpoint are gone when the model stands. Each rank therefore reads the rows of its own shards once
more from the safetensors files: O(shard) memory, in parallel, no communication. That a file's name means
the parameter is *proved*, not assumed: its rounding must equal the shard that ZeRO-3 holds.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .. import consensus
from ..sharding import zero3
from ..sharding.base_files import BaseFiles
from ..sharding.slicing import SlicePlan
from .targets import Target

logger = logging.getLogger(__name__)


def exact_values(model: nn.Module, targets: Sequence[Target], plan: SlicePlan) -> Iterator[tuple[Target, Tensor]]:
    """Yields (target, this rank's elements in fp32), target by target; collective.

    Where the files have nothing that agrees with the shard (renamed, fused or quantised weights, `.bin`
    files, weights changed after loading) the shard's own rounded values are taken, with a warning.
    """
    if zero3.shard_view(targets[0].param).dtype == torch.float32:
        yield from ((t, zero3.shard_view(t.param).clone()) for t in targets)
        return
    origin = getattr(model, "name_or_path", "") or ""
    names = names_by_param(model)
    rounded = []
    with BaseFiles(origin) as base:
        for target in targets:
            value = _read(target, plan, names[id(target.param)], base)
            if not consensus.all_ranks(value is not None) or value is None:
                value = zero3.shard_view(target.param).float()
                rounded.append(target.name)
            yield target, value
    if rounded and origin and plan.rank == 0:
        logger.warning(
            "%d of %d targets start from bf16-rounded values: no safetensors file of %s agrees with them (first: %s)",
            len(rounded),
            len(targets),
            origin,
            rounded[0],
        )


def names_by_param(model: nn.Module) -> dict[int, list[str]]:
    """Every name of every parameter; a tied one has several, the files know one of them."""
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    return names


def _read(target: Target, plan: SlicePlan, names: list[str], base: BaseFiles) -> Tensor | None:
    """This rank's elements from the first file tensor that agrees with the shard; None if none does."""
    owned, shard = target.own_range(plan), zero3.shard_view(target.param)
    for name in names:
        if base.name_of([name], target.rows, target.cols):
            value = base.read(name, owned).float().to(shard.device)
            if torch.equal(value.to(shard.dtype), shard):
                return value
    return None
