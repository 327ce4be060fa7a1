"""The methods that benchmarks compare: on real ranks they start alike, do what they are named for, and are counted."""

from __future__ import annotations

import pytest
import torch
from method_runs import collectives, train
from ranks import run_ranks

from hdpissa.benchmarks.step import method_zero3
from hdpissa.benchmarks.step.methods import METHODS, Setting, build
from hdpissa.engine.errors import ConfigError

R, RANKS, MICRO = 4, 2, 2
SETTING = {"model": "tiny", "r": R, "lr": 1e-3, "accumulation": MICRO, "micro_batch": 2}
PER_SLICE = 3 * 1536 * R  # numbers in A and B of a slice: three layers, 1536 = rows and columns of the seven Linears


@pytest.fixture(scope="module")
def found():
    """Three steps of every method on two ranks; rank 0's."""
    return run_ranks(RANKS, train, list(METHODS), SETTING)[0]


def change(run: dict, name: str) -> torch.Tensor:
    return run["after"][name].double() - run["before"][name].double()


def test_all_start_from_the_same_model(found):
    """PiSSA cuts W in two and adds it up again; all others have W itself."""
    first = found["hd_pissa"]
    assert len(first["before"]) == 21
    for run in found.values():
        assert run["before"].keys() == run["after"].keys() == first["before"].keys()
        assert run["loss"][0] == pytest.approx(first["loss"][0], rel=1e-6)
        for name, W in run["before"].items():
            torch.testing.assert_close(W, first["before"][name], atol=1e-6, rtol=0)


def test_all_but_the_frozen_one_learn(found):
    assert all(change(found["frozen"], name).abs().max() == 0 for name in found["frozen"]["before"])
    assert len(set(found["frozen"]["loss"])) == 1
    for name in set(METHODS) - {"frozen"}:
        assert found[name]["loss"] == sorted(found[name]["loss"], reverse=True)
        assert all(change(found[name], target).norm() > 0 for target in found[name]["before"])


def test_the_reference_is_our_method(found):
    """Written twice, in two ways; Adam's first steps divide tiny gradients by themselves, hence not to the last bit."""
    ours, theirs = found["hd_pissa"], found["reference"]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    for name in ours["before"]:
        difference = (change(ours, name) - change(theirs, name)).norm()
        assert difference <= 1e-3 * change(theirs, name).norm()


def test_rank_of_a_change(found):
    """LoRA's stays within r, PiSSA's within 2 r, ours fills 2 r S; its second-order term is below a hundredth."""
    name = "model.layers.0.mlp.gate_proj.weight"
    ranks = {method: torch.linalg.matrix_rank(change(found[method], name), rtol=1e-2).item() for method in METHODS}
    assert ranks["lora"] == R
    assert R < ranks["pissa"] <= 2 * R
    assert ranks["hd_pissa"] == ranks["reference"] == 2 * R * RANKS
    assert ranks["full"] > 2 * R * RANKS


def test_bytes_are_those_of_exchange_and_gathers(found):
    """Ours sends what the engine counts, beside the gathers that a frozen model has, too; the reference four
    all-gathers, and a number per micro-batch."""
    ours = found["hd_pissa"]
    assert ours["sent"] - ours["engine"] == found["frozen"]["sent"] > 0
    assert found["reference"]["sent"] == (RANKS - 1) * 2 * 4 * PER_SLICE + MICRO * 4
    assert all(run["sent"] == run["received"] for run in found.values())


def test_phases_are_there(found):
    for run in found.values():
        assert run["phases"].keys() == {"forward", "backward", "exchange", "apply"}
        assert min(run["phases"].values()) >= 0
        assert run["phases"]["backward"] > 0
        assert run["phases"]["exchange"] > 0


@pytest.mark.parametrize(("trained", "elements"), [(0, 10_000), (7_000, 10_000), (70_000, 70_000), (10**9, 50_000_000)])
def test_the_reduce_bucket_is_as_large_as_what_is_trained(trained, elements):
    """A frozen base has none of its own, and a full one not all of it."""
    net = torch.nn.Linear(1, 1, bias=False).requires_grad_(False)
    net.trained = torch.nn.Parameter(torch.empty(trained, device="meta"))
    assert method_zero3.reduce_bucket(net) == elements


def test_collectives_by_hand():
    """Three ranks; 16 bytes are four fp32 numbers."""
    ranks = run_ranks(3, collectives)
    assert all(r["all_gather"] == r["all_gather_into_tensor"] == (32, 32) for r in ranks)
    assert all(r["reduce_scatter_tensor"] == (32, 32) for r in ranks)
    assert all(r["all_reduce"] == (2 * 2 * 16 // 3,) * 2 for r in ranks)
    assert [r["all_to_all"] for r in ranks] == [(16, 40), (32, 32), (48, 24)]  # rows of 8 bytes
    assert [r["broadcast"] for r in ranks] == [(0, 16), (16, 0), (16, 16)]  # 1 → 2 → 0
    assert [r["reduce"] for r in ranks] == [(16, 0), (0, 16), (16, 16)]
    assert all(r["barrier"] == (0, 0) for r in ranks)


@pytest.mark.parametrize(
    ("name", "setting", "words"), [("lorra", {}, "hd_pissa, lora"), ("lora", {"dtype": "fp16"}, "fp32, bf16")]
)
def test_what_cannot_be_built_is_refused(name, setting, words):
    with pytest.raises(ConfigError, match=words):
        build(name, Setting("tiny", **setting))
