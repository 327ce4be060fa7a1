"""One forward pass on the meta device: what autograd keeps for the backward pass, and in which order modules run.

Shapes without numbers, so a 70B model takes a second and no memory. The Linears to be trained are the engine's own
`SliceLinear`, attention is counted as flash attention: queries, keys, values, output and one fp32 number per head
and position are kept, never a matrix of scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hdpissa.engine.method.layer import ActiveSlice, LayerFactors, SliceConv1D, SliceLinear


@dataclass(frozen=True)
class Visit:
    """A module begins or ends its forward pass.

    Attributes:
        module: index among `Trace.params`. enters: begins or ends.
        differentiable: whether its inputs (at the beginning) or outputs (at the end) carry gradients.
        layer: the checkpointed block it belongs to; None outside of one. A block itself is outside.
    """

    module: int
    enters: bool
    differentiable: bool
    layer: int | None


@dataclass
class Trace:
    """What one micro-batch leaves behind.

    Attributes:
        visits: in order. params: per module its own parameters, by number. numel: of each parameter.
        blocks: module that is a checkpointed block → which one.
        kept: bytes kept for backward, per block. outside: outside of the blocks, the loss excepted.
        inputs: bytes of all blocks' inputs, which checkpointing keeps in place of `kept`.
        logits: elements of the logits. read: elements of the different inputs that the targets read.
        leaves: modules that are gathered whole. below: where there are some, per module the parameters inside it.
    """

    visits: list[Visit] = field(default_factory=list)
    params: list[list[int]] = field(default_factory=list)
    numel: list[int] = field(default_factory=list)
    blocks: dict[int, int] = field(default_factory=dict)
    kept: list[int] = field(default_factory=list)
    outside: int = 0
    inputs: int = 0
    logits: int = 0
    read: int = 0
    below: list[list[int]] = field(default_factory=list)
    leaves: frozenset[int] = frozenset()


class _FlashAttention(torch.autograd.Function):
    """Keeps what flash attention keeps; computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        batch, heads, length, _ = q.shape
        out = q.new_empty(batch, length, heads, v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(batch, heads, length, dtype=torch.float32))
        return out


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any):
    """An attention of transformers' `AttentionInterface`."""
    return _FlashAttention.apply(query, key, value), None


def run(module: nn.Module, targets: list, *, rows: int, length: int) -> Trace:
    """Traces a micro-batch of `rows` sequences of `length` tokens; restores the module.

    Raises whatever the model raises when it cannot run without numbers (routers that look at their scores).
    """
    recorder = _Recorder(module)
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    saving = torch.autograd.graph.saved_tensors_hooks(recorder.keep, lambda kept: kept)
    with _trainable(module, targets), recorder.hooks(), torch.enable_grad(), saving:
        out = module(input_ids=ids, use_cache=False)
    recorder.trace.logits = out.logits.numel()
    return recorder.finish()


def gathered_whole(trace: Trace, module: nn.Module, leaves: list[nn.Module]) -> Trace:
    """The trace as ZeRO-3 sees it when these modules are its leaves: each has all parameters that are inside it.

    A checkpointed block that is a leaf belongs to itself: it is what runs again.
    """
    number = {m: i for i, m in enumerate(module.modules())}
    inside = {number[m]: number[leaf] for leaf in reversed(leaves) for m in leaf.modules()}  # the outermost leaf
    params = list(trace.params)
    for leaf in set(inside.values()):
        params[leaf] = sorted({p for m, home in inside.items() if home == leaf for p in trace.params[m]})
    visits = []
    for visit in trace.visits:
        if inside.get(visit.module, visit.module) == visit.module:
            own = trace.blocks.get(visit.module) if visit.module in inside else None
            visits.append(visit if own is None else replace(visit, layer=own))
    numbers = {p: i for i, p in enumerate(module.parameters())}
    below = [sorted(numbers[p] for p in m.parameters()) for m in module.modules()]
    return replace(trace, visits=visits, params=params, below=below, leaves=frozenset(inside.values()))


def head_read_by_the_model(trace: Trace, module: Any) -> Trace:
    """The trace as ZeRO-3 sees it under TRL's chunked head, which takes `lm_head.weight` and never calls lm_head.

    DeepSpeed then counts the weight among the whole model's own parameters, and holds it through each pass.
    """
    head = next((i for i, m in enumerate(module.modules()) if m is module.get_output_embeddings()), None)
    if head is None:
        return trace
    params = [*trace.params]
    params[0], params[head] = sorted({*params[0], *params[head]}), []
    return replace(trace, params=params, visits=[visit for visit in trace.visits if visit.module != head])


@contextmanager
def _trainable(module: nn.Module, targets: list) -> Iterator[None]:
    """Targets as the engine runs them: frozen weights, one slice of factors each."""
    from hdpissa.engine.method import adapt

    def leaf(*shape: int) -> Tensor:
        return torch.empty(*shape, device="meta", requires_grad=True)

    active = ActiveSlice()
    factors = {t.name: LayerFactors(active, [leaf(t.r, t.cols)], [leaf(t.rows, t.r)]) for t in targets}
    frozen = {p: p.requires_grad for p in module.parameters()}
    classes = {linear: type(linear) for target in targets for linear in target.modules}
    adapt.freeze(module)
    adapt.install(targets, SimpleNamespace(layers=factors))  # type: ignore[arg-type]
    module.train()
    try:
        yield
    finally:
        for linear, kind in classes.items():
            linear.__class__ = kind
            del linear.slice_factors
        for p, flag in frozen.items():
            p.requires_grad_(flag)


class _Recorder:
    """Hooks on every module and on what autograd saves."""

    def __init__(self, module: nn.Module) -> None:
        from transformers.modeling_layers import GradientCheckpointingLayer

        self.module = module
        self.modules = list(module.modules())
        self.number = {m: i for i, m in enumerate(self.modules)}
        params = {p: i for i, p in enumerate(module.parameters())}
        self.trace = Trace(
            params=[sorted(params[p] for p in m.parameters(recurse=False)) for m in self.modules],
            numel=[p.numel() for p in params],
        )
        self.blocks = [m for m in self.modules if isinstance(m, GradientCheckpointingLayer)]
        self.block = {m: i for i, m in enumerate(self.blocks)}
        self.trace.blocks = {self.number[m]: i for m, i in self.block.items()}
        self.layer: int | None = None
        self.seen = {p.untyped_storage()._cdata for p in (*module.parameters(), *module.buffers())}
        self.alive: list[Any] = []  # a freed storage's address would be given to the next one
        self.kept = [0] * len(self.blocks)
        self.outside = 0
        self.inputs: dict[int, int] = {}
        self.last_read = 0

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = [m.register_forward_pre_hook(self._enter, with_kwargs=True) for m in self.modules]
        handles += [m.register_forward_hook(self._leave) for m in self.modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def keep(self, tensor: Tensor) -> Tensor:
        """Counts a storage that autograd saves, once."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.alive.append(storage)
            if self.layer is None:
                self.outside += storage.nbytes()
            else:
                self.kept[self.layer] += storage.nbytes()
        return tensor.detach()

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._visit(module, True, args)
        if isinstance(module, SliceLinear | SliceConv1D):
            self._read(args[0])
        if module in self.block:
            self.layer = self.block[module]
            for tensor in _tensors((args, kwargs)):
                self.alive.append(tensor.untyped_storage())
                self.inputs[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()

    def _read(self, x: Tensor) -> None:
        """Linears called one after another with the same x read it together."""
        storage = x.untyped_storage()
        if storage._cdata != self.last_read:
            self.alive.append(storage)
            self.last_read = storage._cdata
            self.trace.read += x.numel()

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        if module in self.block:
            self.layer = None
        self._visit(module, False, output)

    def _visit(self, module: nn.Module, enters: bool, values: Any) -> None:
        differentiable = any(t.requires_grad for t in _tensors(values))
        self.trace.visits.append(Visit(self.number[module], enters, differentiable, self.layer))

    def finish(self) -> Trace:
        self.trace.kept, self.trace.outside = self.kept, self.outside
        self.trace.inputs = sum(self.inputs.values())
        return self.trace


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
