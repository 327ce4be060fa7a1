"""Each rank reads only the rows of its own shards, in place of rank 0 reading everything and sending it round.

transformers' own ZeRO-3 path loads the whole checkpoint into rank 0's memory and broadcasts it module by module.
Here one step of `from_pretrained` is replaced while it runs, the one that moves values: safetensors files are cut
along their first dimension, so a rank maps a file and copies its rows. Everything else (config, building under
zero.Init, tying, generation config) stays transformers' own.

A model whose parameters are not, name for name and shape for shape, what the files hold (renamed, fused, prefixed
or quantised weights, `.bin` files) is left to transformers, with a warning that says why.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import consensus
from ..distributed import heartbeat
from ..errors import ConfigError
from . import zero3
from .base_files import open_tensors
from .slicing import ShardRange

logger = logging.getLogger(__name__)

# Elements read at a time: bounds what a rank holds beside its shards, whatever the size of a tensor.
PIECE_ELEMENTS = 2**25
FLOATS = {"F64", "F32", "F16", "BF16"}  # as safetensors names them


@contextmanager
def reading_own_rows(new: Sequence[str] = ()) -> Iterator[None]:
    """Within it `from_pretrained` under ZeRO-3 fills shards from the files; collective.

    Args:
        new: names of modules that the files need not hold: a head that is to be learned.

    Raises:
        ConfigError: from `from_pretrained`: files are damaged, or lack weights of the model, which transformers would
            fill with random numbers and a warning.
    """
    from transformers import PreTrainedModel

    original = PreTrainedModel.__dict__["_load_pretrained_model"]
    building = ExitStack()  # until values arrive, from here or from transformers

    def load(model: nn.Module, state_dict: dict | None, checkpoint_files: list[str] | None, *rest: Any, **more: Any):
        building.close()
        with ExitStack() as stack:
            source, damage = _open(stack, checkpoint_files) if state_dict is None else ({}, None)
            damage = consensus.first(damage)
            if damage is not None:
                raise ConfigError(damage)
            needed, tied = _parameters_and_buffers(model)
            obstacle = consensus.first(_obstacle(needed, tied, source))
            if obstacle is None:
                return _fill(model, needed, source), None
        if dist.get_rank() == 0:
            logger.warning("%s: the whole checkpoint is read on rank 0 and broadcast", obstacle)
        loaded = original.__get__(None, PreTrainedModel)(model, state_dict, checkpoint_files, *rest, **more)
        _refuse_missing(model, loaded[0].missing_keys, new)
        return loaded

    PreTrainedModel._load_pretrained_model = staticmethod(load)  # type: ignore[method-assign]
    try:
        with building:
            building.enter_context(zero3.building_without_broadcast())
            yield
    finally:
        PreTrainedModel._load_pretrained_model = original  # type: ignore[method-assign]


def _refuse_missing(model: nn.Module, missing: set[str], new: Sequence[str]) -> None:
    tied: Any = getattr(model, "all_tied_weights_keys", None) or {}
    ignored: Any = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    named = {name for name, _ in model.named_parameters()} & set(missing) - set(tied)
    lost = sorted(n for n in named if n.split(".")[0] not in new and not any(re.search(p, n) for p in ignored))
    if lost:
        raise ConfigError(
            f"{model.name_or_path} lacks {len(lost)} weights of {type(model).__name__} (first: {lost[0]}): they would "
            f"be random numbers; give the complete checkpoint"
        )


def _open(stack: ExitStack, files: Sequence[str] | None) -> tuple[dict[str, Any], str | None]:
    """Tensor name → the open safetensors file that holds it, none when a file is of another kind; what is damaged."""
    if not files or not all(file.endswith(".safetensors") for file in files):
        return {}, None
    source: dict[str, Any] = {}
    for file in files:
        try:
            handle = stack.enter_context(open_tensors(Path(file)))
        except ConfigError as error:
            return {}, str(error)
        source |= dict.fromkeys(handle.keys(), handle)
    return source, None


def _parameters_and_buffers(model: nn.Module) -> tuple[dict[str, Tensor], set[str]]:
    """What a checkpoint of this model holds, by name, and the names that tying will replace by others."""
    persistent = model.state_dict().keys()
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: tensor for name, tensor in named.items() if name in persistent}, tied


def _obstacle(needed: dict[str, Tensor], tied: set[str], source: dict[str, Any]) -> str | None:
    """Why the files cannot be read row by row; None when they can."""
    if not source:
        return "the checkpoint is not in safetensors files"
    for name, tensor in needed.items():
        if name not in source:
            if name in tied:
                continue
            return f"the files hold no {name}"
        stored = source[name].get_slice(name)
        shape, dtype = stored.get_shape(), stored.get_dtype()
        if list(shape) != list(_shape(tensor)):
            return f"{name} is {tuple(shape)} in the files and {tuple(_shape(tensor))} in the model"
        if tensor.is_floating_point() and dtype not in FLOATS:
            return f"{name} is of dtype {dtype} in the files, quantised it seems"
    return None


def _shape(tensor: Tensor) -> torch.Size:
    return zero3.full_shape(tensor) if isinstance(tensor, nn.Parameter) else tensor.shape


def _fill(model: nn.Module, needed: dict[str, Tensor], source: dict[str, Any]) -> Any:
    """Copies this rank's part of every tensor; returns transformers' record of a complete load."""
    absent = set()
    for name, tensor in needed.items():
        if name not in source:  # the other end of a tie has it
            absent.add(name)
            continue
        stored = source[name].get_slice(name)
        if isinstance(tensor, nn.Parameter):
            _copy_shard(stored, zero3.full_shape(tensor), zero3.shard_view(tensor))
        else:
            tensor.copy_(stored[:] if stored.get_shape() else source[name].get_tensor(name))
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # or transformers draws random numbers
    return _record(absent, source.keys() - needed.keys())


def _record(missing: set[str], unexpected: set[str]) -> Any:
    """transformers' LoadStateDictInfo; its fields differ between releases, all others are empty collections."""
    from transformers.utils.loading_report import LoadStateDictInfo

    empty: dict[str, Any] = {"error_msgs": [], "conversion_errors": {}}
    values = {field.name: empty.get(field.name, set()) for field in dataclasses.fields(LoadStateDictInfo)}
    return LoadStateDictInfo(**values | {"missing_keys": missing, "unexpected_keys": unexpected})


def _copy_shard(stored: Any, shape: torch.Size, shard: Tensor) -> None:
    """shard ← this rank's flat range of the stored tensor, some rows at a time."""
    if not shape:
        shard.copy_(stored[...].view(-1)[: shard.numel()])
        return
    cols = shape[1:].numel()
    owned = ShardRange.of(dist.get_rank(), dist.get_world_size(), shape[0], cols)
    step = max(1, PIECE_ELEMENTS // max(1, cols))
    for first in range(owned.row_start, owned.row_stop, step):
        heartbeat.progress()
        last = min(first + step, owned.row_stop)
        rows = stored[first:last].reshape(-1)
        begin, end = max(owned.start, first * cols), min(owned.stop, last * cols)
        shard[begin - owned.start : end - owned.start].copy_(rows[begin - first * cols : end - first * cols])
