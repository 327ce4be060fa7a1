"""Linears that share their input: found by watching, computed together, to the same gradients as one by one."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from tensors import BF16, DEVICE, F64, assert_as_good, randn
from torch import nn
from torch.utils.checkpoint import checkpoint

from hdpissa.engine.method import layer as layer_module
from hdpissa.engine.method.layer import ActiveSlice, LayerFactors, SliceLinear
from hdpissa.engine.method.shared_input import SharedInputs
from hdpissa.kernels import api

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTHS = {"q": (12, 4), "k": (6, 2), "v": (6, 2), "o": (20, 4), "gate": (27, 4), "up": (27, 3), "down": (20, 4)}


class Block(nn.Module):
    """The wiring of a decoder layer: q, k, v read one input, gate and up another, o and down their own.

    The same numbers in every dtype: those that bf16 can hold.
    """

    def __init__(self, inputs: SharedInputs | None, dtype: torch.dtype = F64, impl: str = "auto") -> None:
        super().__init__()
        torch.manual_seed(0)
        cols = {"o": 12, "down": 27}
        self.active = ActiveSlice()
        for name, (rows, r) in WIDTHS.items():
            linear = nn.Linear(cols.get(name, 20), rows, bias=name == "q", dtype=BF16).to(dtype).requires_grad_(False)
            linear.__class__ = SliceLinear
            linear.slice_factors = factors = LayerFactors(self.active, impl=impl, inputs=inputs)
            keep = F64 if dtype == F64 else torch.float32
            for i in range(2):
                for kind, shape in ((factors.A, (r, linear.in_features)), (factors.B, (rows, r))):
                    leaf = randn(*shape, seed=100 * i + len(kind) + rows, dtype=BF16).to(DEVICE, keep).requires_grad_()
                    leaf.grad = torch.zeros_like(leaf)
                    kind.append(leaf)
            self.add_module(name, linear)
        self.to(DEVICE)

    def forward(self, x, skip: str = ""):
        q, k, v = (getattr(self, name)(x) for name in "qkv")
        if skip == "v":  # called, but without a part in the result
            v = torch.zeros_like(v)
        x = x + self.o(torch.tanh(q) * torch.cat([k, v], dim=-1))
        return x + self.down(torch.tanh(self.gate(x)) * self.up(x))

    def grads(self) -> list[torch.Tensor]:
        of = (getattr(self, name).slice_factors for name in WIDTHS)
        return [leaf.grad.clone() for f in of for leaf in (*f.A, *f.B)]


def run(block: Block, inputs: SharedInputs | None, *, steps: int = 3, checkpointing: bool = False, skip: str = ""):
    """A few forward and backward passes on changing slices; (outputs, dx, gradients)."""
    out = []
    dtype = block.q.weight.dtype
    for step in range(steps):
        block.active.index = step % 2
        x = randn(2, 5, 20, seed=step, dtype=BF16).to(DEVICE, dtype).requires_grad_()
        y = checkpoint(block, x, skip, use_reentrant=False) if checkpointing else block(x, skip)
        y.backward(randn(*y.shape, seed=50 + step, dtype=BF16).to(DEVICE, dtype))
        if inputs is not None:
            inputs.flush()
            assert not inputs.pending
        out += [y.detach(), x.grad]
    return out + block.grads()


def assert_all_as_good(found, plain, truth) -> None:
    """`assert_as_good` for each, beside what fp32 itself may cost: in so small a block torch can be right by luck.

    At most 8 products in a row lead to a gradient (4 forward, 4 back), of at most 27 terms. The roundings of one are
    √27 eps of the sum of the terms' sizes (`fp32_rounding`), which is some √27 times their sum: 8 · 27 eps in all.
    """
    relative = 8 * 27 * torch.finfo(torch.float32).eps
    for ours, theirs, true in zip(found, plain, truth, strict=True):
        assert_as_good(ours, theirs, true.cpu(), rounding=relative * true.norm().item())


def names(block: Block, inputs: SharedInputs) -> dict[str, list[str]]:
    of = {id(getattr(block, name).slice_factors): name for name in WIDTHS}
    return {of[leader]: [of[id(f)] for f in followers] for leader, followers in inputs.followers.items()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_same_gradients_as_one_by_one(checkpointing):
    inputs = SharedInputs()
    together, alone = Block(inputs), Block(None)
    found = run(together, inputs, checkpointing=checkpointing)
    expected = run(alone, None, checkpointing=checkpointing)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    assert names(together, inputs) == {"q": ["k", "v"], "gate": ["up"]}


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_with_the_triton_kernels(dtype):
    """The same through the kernels (CPU: interpreter), whose accumulators are fp32: nearer to float64 than torch."""
    inputs = SharedInputs("triton")
    found = run(Block(inputs, dtype, "triton"), inputs)
    plain = run(Block(None, dtype, "torch"), None)
    truth = run(Block(None, F64, "torch"), None)
    assert_all_as_good(found, plain, truth)


def test_one_reading_of_a_shared_input(monkeypatch):
    """Once learned: a product p and a product of x for every *input*, not for every Linear."""
    inputs = SharedInputs()
    block = Block(inputs)
    run(block, inputs, steps=1)
    calls: list[str] = []

    def counted(name):
        original = getattr(api, name)
        return lambda *a, **k: calls.append(name) or original(*a, **k)

    for name in ("low_rank_forward", "low_rank_grad_A_", "low_rank_grad_B_"):
        monkeypatch.setattr(api, name, counted(name))
    run(block, inputs, steps=1)
    assert calls.count("low_rank_forward") == calls.count("low_rank_grad_A_") == 4
    assert calls.count("low_rank_grad_B_") == 7


def test_a_member_whose_gradient_never_comes():
    """The others get theirs at the end of the backward pass."""
    inputs = SharedInputs()
    together, alone = Block(inputs), Block(None)
    for ours, theirs in zip(run(together, inputs, skip="v"), run(alone, None, skip="v"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    assert not any(leaf.grad.any() for leaf in together.v.slice_factors.A)
    assert any(leaf.grad.any() for leaf in together.k.slice_factors.A)


def test_another_tensor_is_not_mistaken_for_the_leaders():
    """An equal tensor elsewhere in memory, a view of another shape, or one written to since: own p, own group."""
    inputs = SharedInputs()
    block, alone = Block(inputs), Block(None)
    run(block, inputs, steps=1)
    run(alone, None, steps=1)
    for change in (lambda x: x.clone(), lambda x: x[:, :3], lambda x: x.mul_(2)):
        for b in (block, alone):
            x = randn(2, 5, 20, seed=9).to(DEVICE)
            q = b.q(x)
            k = b.k(change(x))
            # torch itself refuses to go back through what read x before it was written to
            (k.sum() if x._version else q.sum() + k.sum()).backward()
        inputs.flush()
    for ours, theirs in zip(block.grads(), alone.grads(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def test_a_backward_pass_that_raises_leaves_nothing_behind():
    """Its half of a group must not be added to the next micro-batch's gradients."""
    inputs = SharedInputs()
    together, alone = Block(inputs), Block(None)
    run(together, inputs, steps=1)
    before = together.grads()

    class Raises(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, dy):
            raise ValueError("on the way back")

    x = randn(2, 5, 20, seed=3).to(DEVICE).requires_grad_()
    q, k = Raises.apply(together.q(x)), together.k(x)
    with pytest.raises(ValueError, match="on the way back"):
        (k.sum() + q.sum() + 0 * together.v(x).sum()).backward()
    assert inputs.pending
    inputs.reset()
    assert not inputs.pending
    for block in (together, alone):
        for name in WIDTHS:
            for leaf in (*getattr(block, name).slice_factors.A, *getattr(block, name).slice_factors.B):
                leaf.grad.zero_()
    assert any(g.any() for g in before)
    for ours, theirs in zip(run(together, inputs, steps=1), run(alone, None, steps=1), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def test_no_activation_is_kept_alive():
    """After the last of a group the input belongs to its graph alone."""
    inputs = SharedInputs()
    block = Block(inputs)
    run(block, inputs, steps=1)
    x = randn(2, 5, 20).to(DEVICE).requires_grad_()
    hidden = x * 1
    seen = weakref.ref(hidden)
    y = block(hidden)
    del hidden
    y.sum().backward()
    del y
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("linear", ["auto", "separate", "fused"])
def test_fused_linear_in_a_layer(linear, monkeypatch):
    """The named form is the one that runs, in groups too; both give the layer's output and gradients."""
    used = []
    original = api.fused_linear
    monkeypatch.setattr(layer_module.kernels, "fused_linear", lambda *a, **k: used.append(1) or original(*a, **k))
    inputs = SharedInputs("triton", share_p=linear != "fused")
    block, plain, truth = Block(inputs, torch.float32, "triton"), Block(None, torch.float32), Block(None)
    for name in WIDTHS:
        getattr(block, name).slice_factors.linear = linear
    found, theirs, true = (run(b, inputs if b is block else None, steps=2) for b in (block, plain, truth))
    assert len(used) == (2 * 14 if linear == "fused" else 0)
    assert names(block, inputs) == {"q": ["k", "v"], "gate": ["up"]}
    assert_all_as_good(found, theirs, true)
