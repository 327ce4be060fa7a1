"""Do the kernels' tests see errors? Each kernel is broken in one place, and its own test must fail.

A mutation is one replacement in the source: a wrong index, a mask that is missing, a product of low precision, a sum
that is lost. The broken module takes the place of the right one, and the check of its test file runs on it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
import test_kernel_delta_apply
import test_kernel_dense_delta
import test_kernel_fused_linear
import test_kernel_low_rank_forward
import test_kernel_low_rank_grad_A
import test_kernel_low_rank_grad_B
import test_kernel_slice_adam
import torch
from delta_cases import Case
from kernel_cases import matrix

import hdpissa.kernels.api as api

pytestmark = pytest.mark.usefixtures("one_thread")

KERNELS = Path(api.__file__).parent
PACKAGE = "hdpissa.kernels"


def forward():
    test_kernel_low_rank_forward.check(33, 70, 5, torch.float32, "offset", "offset")


def grad_A():
    test_kernel_low_rank_grad_A.check(33, 70, [5, 3], torch.float32, "offset", "offset")


def grad_B():
    test_kernel_low_rank_grad_B.check(33, 70, 5, torch.float32, "offset", "offset")


def dense_delta():
    test_kernel_dense_delta.check(Case(Q=20, cols=70, start=33, numel=300))


def delta_apply():
    test_kernel_delta_apply.test_error_of_the_new_weights()
    test_kernel_delta_apply.check(Case(Q=20, cols=70, start=33, numel=300), "split")


def not_finite():
    test_kernel_delta_apply.test_what_is_not_finite_is_not_written("split")


def slice_adam():
    test_kernel_slice_adam.check(3000)


def fused_linear():
    x, W, A = (matrix(n, 70, torch.float32, seed=n) for n in (33, 40, 5))
    test_kernel_fused_linear.check(x, W, A, None, "mutation")


LOW_PRECISION = "dot(narrow(x_TI, tl.bfloat16), narrow(A_IR, tl.bfloat16)"

BF16_PRODUCT = "dot(narrow(x_TI, tl.bfloat16), narrow(W_IO, tl.bfloat16), total"

# (kernel, what is wrong, the right text, the wrong text, the check)
MUTATIONS = [
    ("low_rank_forward", "wrong index", "A_at += BLOCK_I * stride_ai", "A_at += BLOCK_I * stride_ar", forward),
    ("low_rank_forward", "missing mask", "& here[None, :], other", ", other", forward),
    ("low_rank_forward", "low precision", "dot(x_TI, narrow(A_IR, x_TI.dtype)", LOW_PRECISION, forward),
    ("low_rank_grad_A", "wrong index", "partial + s * I * R", "partial + 0 * s * I * R", grad_A),
    ("low_rank_grad_A", "missing mask", "x_at, mask=here[:, None] & ", "x_at, mask=", grad_A),
    ("low_rank_grad_B", "wrong index", "(j * T + start + t[:, None]) * R", "(j * T + t[:, None]) * R", grad_B),
    ("low_rank_grad_B", "missing mask", "dy_at, mask=here[:, None] & ", "dy_at, mask=", grad_B),
    ("delta_tile", "wrong index", "+ first_i - offset", "+ first_i", dense_delta),
    ("delta_tile", "low precision", "if RIGHT_LIMBS == 2:\n", "if RIGHT_LIMBS == 3:\n", dense_delta),
    ("shard_subtract", "one rounding lost", "(bits - (high << 16))", "(0 * bits)", delta_apply),
    ("shard_subtract", "missing mask", "tl.where(lost, old, new)", "new", not_finite),
    ("slice_adam", "wrong index", "tl.program_id(0).to(tl.int64) * BLOCK", "0 * tl.program_id(0)", slice_adam),
    ("slice_adam", "low precision", "rate2 * (g * g)", "rate2 * narrow(g * g, tl.bfloat16).to(tl.float32)", slice_adam),
    ("fused_linear", "wrong index", "range(0, I, BLOCK_I)", "range(0, I - BLOCK_I, BLOCK_I)", fused_linear),
    ("fused_linear", "low precision", "dot(x_TI, W_IO, total", BF16_PRODUCT, fused_linear),
    ("common", "wrong index", "partial + s * stride", "partial + 0 * s * stride", grad_A),
    ("common", "one partial sum lost", "for s in range(count)", "for s in range(count - 1)", grad_B),
]


def load_broken(name: str, right: str, wrong: str, folder: Path):
    """The kernel module with one place changed, under its own name."""
    source = (KERNELS / f"{name}.py").read_text()
    assert source.count(right) >= 1, f"{name}.py no longer holds {right!r}: mutate something else"
    path = folder / f"{name}.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(f"{PACKAGE}.{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Triton asks for the module of a function by name
    spec.loader.exec_module(module)
    for other in [n for n in sys.modules if n.startswith(f"{PACKAGE}.") and n != spec.name]:
        if getattr(sys.modules[other], "AOT", None):  # kernels that use the broken one are imported anew
            del sys.modules[other]


@pytest.fixture
def right_modules():
    """Puts back whatever a test has replaced."""
    before = {name: module for name, module in sys.modules.items() if name.startswith(PACKAGE)}
    yield
    for name in [n for n in sys.modules if n.startswith(PACKAGE)]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="reads beyond a tensor would end a GPU process")
@pytest.mark.parametrize(
    ("name", "what", "right", "wrong", "check"), MUTATIONS, ids=[f"{m[0]}: {m[1]}" for m in MUTATIONS]
)
def test_a_broken_kernel_fails_its_test(name, what, right, wrong, check, tmp_path, right_modules):
    importlib.import_module(f"{PACKAGE}.{name}")
    check()
    load_broken(name, right, wrong, tmp_path)
    with pytest.raises(AssertionError):
        check()
