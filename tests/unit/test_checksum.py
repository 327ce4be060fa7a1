"""engine/files/checksum.py: against the formula in Python's integers, additive over cuts, and what it has to notice."""

import itertools

import pytest
import torch

from hdpissa.engine.files import checksum as module
from hdpissa.engine.files.checksum import MASK, add, checksum, signed

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int16, torch.int64, torch.uint8, torch.bool]


def make(dtype, *shape):
    bits = torch.randint(-(2**31), 2**31, shape)
    if dtype.is_floating_point:
        return torch.randn(shape, dtype=torch.float64).to(dtype)
    return bits > 0 if dtype is torch.bool else bits.to(dtype)


def flip(x, element, bit):
    """A copy with one bit flipped."""
    y = x.clone()
    flat = y.view(-1).view(torch.uint8)
    flat[element * x.element_size() + bit // 8] ^= 1 << bit % 8
    return y


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 64 words, so that small tensors cross their borders."""
    monkeypatch.setattr(module, "BLOCK", 64)
    module._multipliers.cache_clear()
    yield
    module._multipliers.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_formula_in_python_integers(dtype, small_blocks):
    x = make(dtype, 201)
    words = x.view(module.WORDS[x.element_size()]).tolist()
    f = [n & MASK for n in module._multipliers(x.device).tolist()]
    assert all(n & 1 for n in f)
    first = 37 * len(words) // x.numel()
    expected = sum(w * f[(first + j) % 64] * module._mix(~((first + j) // 64) & MASK) for j, w in enumerate(words))
    assert checksum(x, start=37) == expected & MASK


def test_multipliers_are_splitmix64():
    """Both spellings, torch's int64 and Python's integers, mean the same."""
    assert [n & MASK for n in module._multipliers(torch.device("cpu"))[:5].tolist()] == [
        module._mix(n) for n in range(5)
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_add_up_to_the_whole(dtype, small_blocks):
    x = make(dtype, 517)
    for cuts in ([0, 517], [0, 1, 517], [0, 64, 128, 517], [0, 3, 3, 200, 516, 517]):
        parts = [checksum(x[a:b], start=a) for a, b in itertools.pairwise(cuts)]
        assert add(*parts) == checksum(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_tensors_are_read_in_logical_order(dtype, small_blocks):
    x = make(dtype, 12, 70)
    wide = make(dtype, 3, 5, 90)
    for strided in (x.T, x[:, 3:40], x[::2], wide.transpose(0, 2), wide.transpose(1, 2)):
        assert checksum(strided, 5) == checksum(strided.contiguous(), 5)


def test_large_tensor_crosses_blocks():
    x = torch.randn(module.BLOCK + 1000)
    assert add(checksum(x[:700_000]), checksum(x[700_000:], 700_000)) == checksum(x)
    assert checksum(flip(x, module.BLOCK + 999, 0)) != checksum(x)


def test_empty_and_scalar():
    assert checksum(torch.empty(0)) == 0
    assert checksum(torch.empty(4, 0)[:, :0]) == 0
    assert checksum(torch.tensor(1.0)) == checksum(torch.tensor([1.0])) != 0


def test_signed_round_trip():
    for value in (0, 1, 2**63 - 1, 2**63, MASK):
        assert torch.tensor(signed(value)).item() & MASK == value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_single_flipped_bit_is_noticed(dtype, small_blocks):
    x = make(dtype, 70)
    want = checksum(x)
    bits = 1 if dtype is torch.bool else 8 * x.element_size()
    assert all(checksum(flip(x, e, b)) != want for e in range(len(x)) for b in range(bits))


@pytest.mark.parametrize("value", [0.0, 1.0, 3e-39])
def test_every_swap_is_noticed(value, small_blocks):
    """Also of elements that differ in nothing but the sign bit, where a sum of 64-bit words would be blind."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.zeros(100, dtype=dtype)
        want = {}
        for i in range(100):
            x[i] = -value if value else 1.0
            got = checksum(torch.where(x == 0, value, x) if value else x)
            assert got not in want
            want[got] = i
            x[i] = 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_moved_elements_are_noticed(dtype, small_blocks):
    x = make(dtype, 150)
    want = checksum(x)
    for source in range(0, 150, 7):
        rest = torch.cat([x[:source], x[source + 1 :]])
        for target in (0, source + 1, 64, 149):
            if target == source:
                continue
            moved = torch.cat([rest[:target], x[source : source + 1], rest[target:]])
            assert torch.equal(moved, x) or checksum(moved) != want
    assert checksum(x.roll(64)) != want  # by whole blocks
    assert checksum(x.flip(0)) != want


def test_two_flipped_signs_are_noticed():
    x = torch.randn(5000)
    want = checksum(x)
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        i, j = torch.randperm(5000, generator=generator)[:2].tolist()
        assert checksum(flip(flip(x, i, 31), j, 31)) != want
