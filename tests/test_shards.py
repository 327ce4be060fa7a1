"""Shards of W and the delta rule on them: nothing is lost, nothing outside a shard is touched."""

from __future__ import annotations

import pytest
import torch

from hdpissa.engine.delta import DeltaRule
from hdpissa.engine.shards import DirectShard, Fp32Shard, SplitShard, make_shard
from hdpissa.engine.slicing import ShardRange

BF16, FP32 = torch.bfloat16, torch.float32
CPU = torch.device("cpu")

# name: (format in the config, dtype that ZeRO-3 computes in, class, bytes per element beside ZeRO-3's)
KINDS = {
    "split": ("split", BF16, SplitShard, 2),
    "fp32": ("fp32", BF16, Fp32Shard, 4),
    "direct": ("split", FP32, DirectShard, 0),
    "direct, fp32": ("fp32", FP32, DirectShard, 0),
}
TIES = [0x3F80_8000, 0x3F81_8000, 0x4049_8000]  # the first and the third exactly between an even and an odd half


def values(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def awkward() -> torch.Tensor:
    bits = [*TIES, 0, 1, 0x7FFF, 0x8000, 0x7F_FFFF, 0x7F7F_0000, 0x7F80_0000, 0x3F80_0001]
    w = torch.tensor(bits, dtype=torch.int32).view(FP32)
    return torch.cat([w, -w, values(40)])


class Storage:
    """What ZeRO-3 owns; it may be replaced by another tensor at any time, as offloading does."""

    def __init__(self, n: int, dtype: torch.dtype) -> None:
        self.tensor = torch.zeros(n, dtype=dtype)

    def __call__(self) -> torch.Tensor:
        return self.tensor


class RoundedShard:
    """bf16 and nothing else, what a plain implementation does: the negative control of this file."""

    def __init__(self, compute, exact, device) -> None:
        self._compute = compute
        compute().copy_(exact)

    def read(self, start, stop):
        return self._compute()[start:stop].float()

    def write(self, start, stop, w):
        self._compute()[start:stop].copy_(w)


def shard_of(kind: str, exact: torch.Tensor):
    format_, dtype, *_ = KINDS[kind]
    storage = Storage(exact.numel(), dtype)
    return make_shard(storage, exact, format=format_, device="auto"), storage


def bits(w: torch.Tensor) -> torch.Tensor:
    return w.contiguous().view(torch.int32)


every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_kind_and_cost(kind):
    shard, _ = shard_of(kind, values(30))
    assert type(shard) is KINDS[kind][2]
    assert shard.nbytes == 30 * KINDS[kind][3]


@every_kind
def test_reads_back_what_it_was_given(kind):
    w = awkward()
    shard, _ = shard_of(kind, w)
    assert torch.equal(bits(shard.read(0, w.numel())), bits(w))
    for start, stop in ((0, 1), (5, 17), (w.numel() - 1, w.numel()), (4, 4)):
        assert torch.equal(bits(shard.read(start, stop)), bits(w[start:stop]))
        assert shard.read(start, stop).dtype == FP32


@every_kind
def test_writes_its_range_and_nothing_else(kind):
    w = awkward()
    shard, storage = shard_of(kind, w)
    before = storage().clone()
    new = w.flip(0)[7:20].clone()
    shard.write(7, 20, new)
    expected = torch.cat([w[:7], new, w[20:]])
    assert torch.equal(bits(shard.read(0, w.numel())), bits(expected))
    assert torch.equal(storage()[:7], before[:7])
    assert torch.equal(storage()[20:], before[20:])
    shard.write(3, 3, new[:0])
    assert torch.equal(bits(shard.read(0, w.numel())), bits(expected))


@every_kind
def test_given_and_written_tensors_stay_the_callers(kind):
    w, new = values(12), values(5, seed=1)
    kept = w.clone()
    shard, _ = shard_of(kind, w)
    shard.write(2, 7, new)
    expected = torch.cat([kept[:2], new, kept[7:]])
    w.fill_(7.0)
    new.fill_(7.0)
    assert torch.equal(shard.read(0, 12), expected)


@every_kind
def test_compute_half_is_the_rounded_value(kind):
    """Model code computes with W rounded to nearest; only exact ties may differ, up instead of to even."""
    w = torch.cat([awkward(), values(10_000, seed=2)])
    shard, storage = shard_of(kind, torch.zeros_like(w))
    initial, _ = shard_of(kind, w)
    shard.write(0, w.numel(), w)
    half = storage()
    assert torch.equal(half, initial._compute()), "the constructor and write must round alike"
    expected = w.to(half.dtype)
    if half.dtype == torch.float32:
        assert torch.equal(half, expected)
        return
    tie = (bits(w) & 0xFFFF) == 0x8000
    assert torch.equal(half[~tie], expected[~tie])
    assert half[:3].tolist() == [1.0078125, 1.015625, 3.15625], "away from zero"
    neighbour = (half[tie].view(torch.int16) - expected[tie].view(torch.int16)).tolist()
    assert set(neighbour) == {0, 1}


@every_kind
def test_looks_the_storage_up_at_every_use(kind):
    """ZeRO-3 frees and replaces its shard's storage; a kept reference would write into the void."""
    w = values(16)
    shard, storage = shard_of(kind, w)
    old = storage.tensor
    storage.tensor = old.clone()
    kept = old.clone()
    shard.write(4, 8, torch.arange(4.0))
    assert storage()[4:8].tolist() == [0, 1, 2, 3]
    assert shard.read(4, 8).tolist() == [0, 1, 2, 3]
    assert torch.equal(old, kept)


@every_kind
def test_empty_shard(kind):
    shard, _ = shard_of(kind, values(0))
    assert shard.read(0, 0).shape == (0,)
    shard.write(0, 0, values(0))
    assert shard.nbytes == 0


def drift(make) -> torch.Tensor:
    """Weights around 1 after 1000 updates of 1e-6, in steps of read, subtract, write."""
    start = 1 + 0.1 * values(64)
    storage = Storage(64, KINDS["split"][1])
    shard = make(storage, start, CPU)
    for _ in range(1000):
        shard.write(0, 64, shard.read(0, 64) - 1e-6)
    return shard.read(0, 64) - start


def test_small_updates_survive_only_with_the_exact_half():
    """1e-6 is 1/4000 of a bf16 step just below 1: rounded weights never move, the split ones do as fp32 does."""
    split, master = drift(SplitShard), drift(Fp32Shard)
    assert torch.equal(split, master)
    # a thousand fp32 subtractions near 1, each off by at most 2⁻²⁴ = 6e-8, all the same way at worst
    assert (split + 1e-3).abs().max() < 6e-5
    start = 1 + 0.1 * values(64)
    assert torch.equal(drift(RoundedShard), start.to(BF16).float() - start), "not one of a thousand updates landed"


# --- DeltaRule.apply ------------------------------------------------------------------------------------------
# Factors and weights are small integers and scale is a power of two, so that every product and sum is exact in
# fp32 in whatever order it is formed: results are compared bit for bit.

ROWS, COLS, Q = 7, 5, 4


def integers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


W, A, B, DA, DB = (
    integers(*shape, seed=i) for i, shape in enumerate([(ROWS, COLS), (Q, COLS), (ROWS, Q), (Q, COLS), (ROWS, Q)])
)


def dense(scale: float, second_order: bool) -> torch.Tensor:
    change = DB @ A + B @ DA - (DB @ DA if second_order else 0)
    return W - scale * change


def applied(kind: str, world: int, *, scale=0.5, second_order=True, **options) -> torch.Tensor:
    """W after every rank of `world` has applied the delta to its own shard."""
    parts = []
    for rank in range(world):
        owned = ShardRange.of(rank, world, ROWS, COLS)
        shard, _ = shard_of(kind, W.flatten()[owned.start : owned.stop].clone())
        rows = slice(owned.row_start, owned.row_stop)
        DeltaRule(second_order=second_order).apply(
            shard, owned, (A, B[rows]), (DA, DB[rows]), scale=scale, **options
        )  # fmt: skip
        parts.append(shard.read(0, owned.numel).clone())
    return torch.cat(parts).view(ROWS, COLS)


@every_kind
@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 16, 34, 40])
def test_delta_on_shards_is_the_dense_delta(kind, world):
    """Shards that cut rows (all of these but 1), lie inside one row (16) or own nothing (16, 34, 40)."""
    assert torch.equal(applied(kind, world), dense(0.5, True))


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("scale", [0.25, 2.0])
def test_delta_scale_and_order(scale, second_order):
    expected = dense(scale, second_order)
    assert torch.equal(applied("split", 3, scale=scale, second_order=second_order), expected)
    assert not torch.equal(expected, dense(scale, not second_order))


@pytest.mark.parametrize("world", [1, 3, 4])
@pytest.mark.parametrize("block_elements", [1, COLS, COLS + 1, 2 * COLS, 3 * COLS - 1, 10**6])
def test_delta_does_not_depend_on_the_block(block_elements, world):
    """From one row at a time (also where even a row is larger than the block) to all at once."""
    assert torch.equal(applied("split", world, block_elements=block_elements), dense(0.5, True))


def test_block_bounds_the_temporary(monkeypatch):
    """The change of W is never materialised for more than the block's rows."""
    from hdpissa.engine import delta

    seen = []
    whole = delta.kernels.delta_rows

    def recorded(*args, **options):
        seen.append(whole(*args, **options))
        return seen[-1]

    monkeypatch.setattr(delta.kernels, "delta_rows", recorded)
    applied("split", 1, block_elements=2 * COLS)
    assert [len(change) for change in seen] == [2, 2, 2, 1]


def test_rank_without_elements_does_nothing(monkeypatch):
    from hdpissa.engine import delta

    monkeypatch.setattr(delta.kernels, "delta_rows", None)  # would raise if called
    owned = ShardRange.of(15, 16, ROWS, COLS)
    assert owned.rows == 0
    shard, _ = shard_of("split", values(0))
    DeltaRule().apply(shard, owned, (A, B[:0]), (DA, DB[:0]), scale=1.0)


def test_adam_gets_the_rules_numbers():
    """betas and eps reach the kernel: each of them changes the second step."""

    def second_step(rule: DeltaRule) -> float:
        m, v = torch.zeros(1), torch.zeros(1)
        for step, grad in ((1, 1.0), (2, -3.0)):
            change = rule.adam_(m, v, torch.tensor([grad]), step=step, lr=0.1, grad_scale=0.5)
        return change.item()

    m, v = 0.8 * (0.2 * 0.5) + 0.2 * -1.5, 0.6 * (0.4 * 0.25) + 0.4 * 2.25
    by_hand = 0.1 * (m / (1 - 0.8**2)) / ((v / (1 - 0.6**2)) ** 0.5 + 0.25)
    assert second_step(DeltaRule((0.8, 0.6), 0.25)) == pytest.approx(by_hand, rel=1e-6)  # fp32
    assert second_step(DeltaRule()) != pytest.approx(by_hand, rel=1e-2)
