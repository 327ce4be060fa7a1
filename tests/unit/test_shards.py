"""Shards of W and the delta rule on them: nothing is lost, nothing outside a shard is touched."""

from __future__ import annotations

import pytest
import torch
from engine_runs import Bf16OnlyShard
from plan_runs import SHAPES

from hdpissa.engine.method import delta
from hdpissa.engine.method.delta import DeltaRule
from hdpissa.engine.sharding import shards
from hdpissa.engine.sharding.shards import DirectShard, Fp32Shard, SplitShard, make_shard, on_device, staging_bytes
from hdpissa.engine.sharding.slicing import ShardRange
from hdpissa.kernels import api as kernels

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


def no_bad() -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int32)


def subtract(shard, change: torch.Tensor) -> float:
    """W ← W − change on the whole shard; returns how many results were not finite."""
    bad = no_bad()
    kernels.shard_subtract_(shard.parts(), change, bad, scale=1.0)
    return bad.item()


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
def test_parts_are_the_storage(kind):
    """What a kernel does to the parts is what `read` and ZeRO-3 see from then on."""
    w = awkward()
    shard, storage = shard_of(kind, w)
    parts = shard.parts()
    assert [p.dtype for p in parts] == {"split": [BF16, torch.int16], "fp32": [FP32, BF16]}.get(kind, [FP32])
    assert any(p.data_ptr() == storage().data_ptr() for p in parts)
    assert subtract(shard, torch.ones_like(w)) == 2, "the infinities"
    expected = torch.where(w.isfinite(), w - 1, w)
    assert torch.equal(bits(shard.read(0, w.numel())), bits(expected))
    assert torch.equal(
        storage().float(), expected if storage().dtype == FP32 else kernels.split_fp32(expected)[0].float()
    )


@every_kind
def test_the_given_tensor_stays_the_callers(kind):
    w = values(12)
    kept = w.clone()
    shard, _ = shard_of(kind, w)
    w.fill_(7.0)
    assert torch.equal(shard.read(0, 12), kept)


@every_kind
def test_compute_half_is_the_rounded_value(kind):
    """Model code computes with W rounded to nearest; only exact ties may differ, up instead of to even."""
    w = torch.cat([awkward(), values(10_000, seed=2)])
    initial, _ = shard_of(kind, w)
    shard, storage = shard_of(kind, w)
    subtract(shard, torch.zeros_like(w))
    half = storage()
    assert torch.equal(half, initial._compute()), "the constructor and the kernels must round alike"
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
    subtract(shard, w - torch.arange(16.0))
    assert storage().tolist() == pytest.approx(range(16), abs=1e-6)
    assert shard.read(0, 16).tolist() == pytest.approx(range(16), abs=1e-6)
    assert torch.equal(old, kept)


@every_kind
def test_empty_shard(kind):
    shard, _ = shard_of(kind, values(0))
    assert shard.read(0, 0).shape == (0,)
    subtract(shard, values(0))
    assert shard.nbytes == 0


def drift(make) -> torch.Tensor:
    """What 1000 updates of 1e-6 do to weights around 1."""
    start = 1 + 0.1 * values(64)
    storage = Storage(64, KINDS["split"][1])
    shard = make(storage, start, torch.clone)
    for _ in range(1000):
        subtract(shard, torch.full((64,), 1e-6))
    return shard.read(0, 64) - start


def test_small_updates_survive_only_with_the_exact_half():
    """1e-6 is 1/4000 of a bf16 step just below 1: rounded weights never move, the split ones do as fp32 does."""
    split, master = drift(SplitShard), drift(Fp32Shard)
    assert torch.equal(split, master)
    # a thousand fp32 subtractions near 1, each off by at most 2⁻²⁴ = 6e-8, all the same way at worst
    assert (split + 1e-3).abs().max() < 6e-5
    start = 1 + 0.1 * values(64)
    assert torch.equal(drift(Bf16OnlyShard), start.to(BF16).float() - start), "not one of a thousand updates landed"


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


def applied(kind: str, world: int, *, scale=0.5, second_order=True) -> torch.Tensor:
    """W after every rank of `world` has applied the delta to its own shard."""
    parts, bad = [], no_bad()
    for rank in range(world):
        owned = ShardRange.of(rank, world, ROWS, COLS)
        shard, _ = shard_of(kind, W.flatten()[owned.start : owned.stop].clone())
        rows = slice(owned.row_start, owned.row_stop)
        rule = DeltaRule(second_order=second_order)
        rule.apply(shard, owned, (A, B[rows]), (DA, DB[rows]), bad, scale=scale)
        parts.append(shard.read(0, owned.numel).clone())
    assert not bad.item()
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


@pytest.fixture
def one_kernel(monkeypatch):
    """Counts the calls of `delta_apply_`."""
    calls = []
    whole = kernels.delta_apply_

    def counted(*args, **options):
        calls.append(args[0][0].numel())
        whole(*args, **options)

    monkeypatch.setattr(delta.kernels, "delta_apply_", counted)
    return calls


def test_one_kernel_per_shard(one_kernel):
    applied("split", 3)
    assert one_kernel == [12, 12, 11]


def test_rank_without_elements_does_nothing(one_kernel):
    owned = ShardRange.of(15, 16, ROWS, COLS)
    assert owned.rows == 0
    shard, _ = shard_of("split", values(0))
    DeltaRule().apply(shard, owned, (A, B[:0]), (DA, DB[:0]), no_bad(), scale=1.0)
    assert one_kernel == []


@every_kind
def test_what_is_not_finite_is_counted_and_not_written(kind):
    """An infinite factor corrupts its row: those weights stay, the others move, and all of them are counted."""
    spoilt = DB.clone()
    spoilt[2, 1] = torch.inf
    owned, bad = ShardRange.of(0, 1, ROWS, COLS), no_bad()
    shard, _ = shard_of(kind, W.flatten().clone())
    DeltaRule().apply(shard, owned, (A, B), (DA, spoilt), bad, scale=0.5)
    found, expected = shard.read(0, owned.numel).view(ROWS, COLS), dense(0.5, True)
    assert bad.item() == COLS
    assert torch.equal(found[2], W[2])
    others = [row for row in range(ROWS) if row != 2]
    assert torch.equal(found[others], expected[others])


# --- memory of the host ----------------------------------------------------------------------------------------


def test_shards_in_shared_memory():
    """Each in a place of its own, also where one is larger than what is left, and where more come than were told."""
    sizes = (7, 0, 40, 3, 100, 1)
    exact = [values(n, seed=n) for n in sizes]
    for format_ in ("split", "fp32"):
        host = shards.HostMemory(60, pin=False)
        made = [make_shard(Storage(w.numel(), BF16), w, format=format_, device="cpu", host=host) for w in exact]
        assert sum(shard.nbytes for shard in made) == sum(sizes) * (2 if format_ == "split" else 4)
        subtract(made[2], torch.ones(40))
        for n, shard, w in zip(sizes, made, exact, strict=True):
            assert torch.equal(bits(shard.read(0, n)), bits(w - 1 if n == 40 else w))


@pytest.mark.parametrize("world", [1, 8])
@pytest.mark.parametrize("name", ["Llama-2-7B", "Qwen2.5-7B", "Llama-3-70B"])
def test_rounded_up_by_little(name, world):
    """The real sizes, without memory: blocks as torch's allocator of pinned memory rounds them."""
    hidden, kv, ff, layers, heads, *_ = SHAPES[name]
    narrow = hidden // heads * kv
    each = [hidden * n // world for n in (hidden, narrow, narrow, hidden, ff, ff, ff)] * layers
    with torch.device("meta"):
        host = shards.HostMemory(sum(each), pin=False)
        held = [host.take(torch.empty(n, dtype=torch.int16)) for n in each]
    blocks = {h.untyped_storage()._cdata: h.untyped_storage().nbytes() for h in held}
    needed, found = 2 * sum(each), sum(map(rounded, blocks.values()))
    assert needed <= found <= 1.03 * needed
    assert sum(rounded(2 * n) for n in each) > 1.1 * needed, "a block per shard would do"


def rounded(nbytes: int) -> int:
    return 1 << (nbytes - 1).bit_length()


# --- shards on the host, factors on the device: the same code path on one device, by force ---------------------


def test_nothing_is_staged_where_all_is_at_hand():
    parts = (values(5), values(5))
    assert [(at, [p is q for p, q in zip(parts, here, strict=True)]) for at, here in on_device(parts, CPU)] == [
        (0, [True, True])
    ]
    assert staging_bytes(parts, CPU) == 0


@pytest.mark.parametrize("away", [{torch.int16}, {BF16}, {BF16, torch.int16}, {FP32}, {FP32, BF16}])
@pytest.mark.parametrize("chunk", [1, COLS - 1, COLS, 2 * COLS + 1, 10**6])
@pytest.mark.parametrize("world", [1, 3])
def test_staged_shards_change_no_bit(monkeypatch, away, chunk, world):
    """One part elsewhere or all of them, chunks that cut rows: the result is that of one kernel over the shard."""
    expected = {kind: applied(kind, world) for kind in KINDS}
    staged = []
    whole = shards.on_device

    def forced(parts, device):
        for at, here in whole(parts, device, chunk=chunk):
            staged.extend(h.numel() for h, p in zip(here, parts, strict=True) if h.data_ptr() != p[at:].data_ptr())
            yield at, here

    monkeypatch.setattr(shards, "is_elsewhere", lambda part, device: part.dtype in away)
    monkeypatch.setattr(delta, "on_device", forced)
    for kind in KINDS:
        assert torch.equal(applied(kind, world), expected[kind]), kind
    assert staged
    assert max(staged) <= chunk
    parts = shard_of("split", values(9))[0].parts()
    wanted = sum(2 * min(chunk, 9) for p in parts if p.dtype in away)
    assert staging_bytes(parts, CPU, chunk=chunk) == wanted


@pytest.mark.parametrize("chunk", [2, 5, 100])
@pytest.mark.parametrize("away", [True, False])
def test_staged_dense_delta(monkeypatch, chunk, away):
    """`subtract` on a part of a shard, staged or not."""
    whole = shards.on_device
    monkeypatch.setattr(shards, "is_elsewhere", lambda part, device: away)
    monkeypatch.setattr(delta, "on_device", lambda parts, device: whole(parts, device, chunk=chunk))
    shard, _ = shard_of("split", values(12))
    DeltaRule().subtract(shard, 3, torch.arange(5.0), no_bad(), scale=2.0)
    expected = values(12)
    expected[3:8] -= 2 * torch.arange(5.0)
    assert torch.equal(shard.read(0, 12), expected)


# --- Adam -----------------------------------------------------------------------------------------------------


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
