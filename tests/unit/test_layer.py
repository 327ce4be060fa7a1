"""`SliceLinear`: the base layer's output bit for bit, its slices' gradients, and no work beside them."""

from __future__ import annotations

import copy

import pytest
import torch
from tensors import BF16, F64, randn
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hdpissa.engine.method.layer import ActiveSlice, LayerFactors, SliceLinear

pytestmark = pytest.mark.usefixtures("one_thread")


def slice_linear(*, bias=True, dtype=F64, own=2, rows=12, cols=20, r=4):
    """(layer with `own` slices, the nn.Linear that it was, the flat buffer its gradients go to)."""
    torch.manual_seed(0)
    base = nn.Linear(cols, rows, bias=bias, dtype=dtype)
    layer = nn.Linear(cols, rows, bias=bias, dtype=dtype)
    layer.load_state_dict(base.state_dict())
    layer.requires_grad_(False)
    layer.__class__ = SliceLinear
    keep = F64 if dtype == F64 else torch.float32
    flat = torch.zeros(own, r * (rows + cols), dtype=keep)
    factors = LayerFactors(ActiveSlice())
    for i in range(own):
        for kind, shape, part in (
            (factors.A, (r, cols), flat[i, : r * cols]),
            (factors.B, (rows, r), flat[i, r * cols :]),
        ):
            leaf = randn(*shape, seed=10 * i + len(shape) + shape[0], dtype=keep).requires_grad_()
            leaf.grad = part.view(shape)
            kind.append(leaf)
    layer.slice_factors = factors
    return layer, base, flat


INPUTS = {
    "vector": lambda: randn(20),
    "tokens": lambda: randn(5, 20),
    "batch": lambda: randn(2, 3, 20),
    "batches": lambda: randn(2, 3, 2, 20),
    "no tokens": lambda: randn(0, 20),
    "transposed": lambda: randn(20, 5).T,
    "transposed batch": lambda: randn(3, 2, 20).transpose(0, 1),  # cannot be flattened by a view
    "strided": lambda: randn(3, 4, 40)[:, ::2, ::2],
    "expanded": lambda: randn(1, 20).expand(6, 20),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("bias", [True, False])
def test_slice_linear(name, bias):
    """Output and dx are those of nn.Linear, the factor gradients are (Bᵀ G, G Aᵀ) with G from autograd."""
    layer, base, flat = slice_linear(bias=bias)
    x = INPUTS[name]().requires_grad_()
    x_base = INPUTS[name]().requires_grad_()
    y, y_base = layer(x), base(x_base)
    # Bitwise against the frozen base: with a weight that wants a gradient torch itself takes another product
    # for some strides (matmul folds a batch or not), which differs in the last bit.
    frozen = copy.deepcopy(base).requires_grad_(False)
    assert torch.equal(y, frozen(x_base)), "adapters contribute nothing to the output"
    dy = randn(*y.shape, seed=9)
    y.backward(dy)
    y_base.backward(dy)
    # float64 dot products of 20 and 12 terms
    torch.testing.assert_close(x.grad, x_base.grad, rtol=1e-13, atol=1e-13)
    G, (A, B) = base.weight.grad, (layer.slice_factors.A[0], layer.slice_factors.B[0])
    torch.testing.assert_close(A.grad, B.detach().T @ G, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(B.grad, G @ A.detach().T, rtol=1e-12, atol=1e-12)
    assert not flat[1].any(), "the other slice got nothing"
    assert layer.weight.grad is None
    assert layer.slice_factors.reached


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_forward_is_bitwise_the_base_layers(dtype):
    layer, base, _ = slice_linear(dtype=dtype)
    x = randn(7, 20, dtype=dtype)
    assert torch.equal(layer(x), base(x))
    with torch.no_grad():
        assert torch.equal(layer(x), base(x))
    assert torch.equal(layer.eval()(x), base(x))


def test_gradients_add_up_in_the_flat_buffer_of_the_active_slice():
    """Two micro-batches on slice 1, one on slice 0: autograd adds into the views and replaces none of them."""
    layer, _, flat = slice_linear()
    factors = layer.slice_factors
    expected = torch.zeros(2, 12, 20, dtype=F64)
    for seed, active in ((1, 1), (2, 0), (3, 1)):
        factors.active.index = active
        x, dy = randn(6, 20, seed=seed), randn(6, 12, seed=seed + 50)
        layer(x).backward(dy)
        expected[active] += dy.T @ x
    for i, G in enumerate(expected):
        A, B = factors.A[i].detach(), factors.B[i].detach()
        torch.testing.assert_close(flat[i], torch.cat([(B.T @ G).flatten(), (G @ A.T).flatten()]))
        assert factors.A[i].grad.data_ptr() == flat[i].data_ptr()


def test_first_layer_computes_no_input_gradient():
    layer, _, flat = slice_linear()
    x = randn(5, 20)
    layer(x).sum().backward()
    assert x.grad is None
    assert bool(flat[0].any())


class Operators(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def operators(module, x, grad=True) -> list[str]:
    with torch.set_grad_enabled(grad), Operators() as recorded:
        module(x)
    return recorded.seen


def test_no_extra_work_outside_training():
    layer, base, _ = slice_linear()
    base.requires_grad_(False)
    x = randn(5, 20)
    plain = operators(base, x)
    assert len(operators(layer, x)) > len(plain), "training owes p = x Aᵀ; if not seen, nothing is counted"
    assert operators(layer, x, grad=False) == plain
    assert operators(layer.eval(), x) == plain
    assert not layer(x).requires_grad


def test_weight_is_not_among_the_saved_tensors():
    """ZeRO-3 frees the gathered weight after forward; a saved one would keep the whole model alive."""
    layer, base, _ = slice_linear()

    def saved_by(module) -> list[torch.Tensor]:
        saved = []
        x = randn(5, 20).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = module(x)
        y.sum().backward()
        return saved

    storages = [t.untyped_storage().data_ptr() for t in saved_by(layer)]
    assert layer.weight.untyped_storage().data_ptr() not in storages
    assert sorted(tuple(t.shape) for t in saved_by(layer)) == [(5, 4), (5, 20)], "x and p, nothing else"
    # the control: nn.Linear does save its weight, so the hook would see it
    assert any(t.shape == base.weight.shape or t.T.shape == base.weight.shape for t in saved_by(base))


def test_state_dict_stays_the_base_models():
    layer, base, _ = slice_linear()
    assert list(layer.state_dict()) == list(base.state_dict()) == ["weight", "bias"]
    assert [n for n, _ in layer.named_parameters()] == ["weight", "bias"]
