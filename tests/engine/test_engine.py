"""Rung 2 of the ladder: the engine on real ranks against the float64 oracle."""

from __future__ import annotations

import pytest
import torch
from engine_runs import (
    counts,
    kinds,
    losses_in_shards,
    lost_weights,
    measure_memory,
    one_step_change,
    raises,
    ranks_of,
    train_tiny,
)
from oracle import Oracle
from ranks import run_ranks
from tiny import SEVEN, build, ds_settings, target_names, tiny_batch, tiny_llama

from hdpissa.engine import ConfigError

STEPS, LR = 4, 1e-3


def oracle_run(slices, per_slice, *, steps=STEPS, lr=LR, r=2, model=None, suffixes=SEVEN, skip=(), **options):
    """(losses, weights, eval losses after each step, oracle) in float64, on the engine's data order."""
    net = build(model, dtype=torch.float64)
    oracle = Oracle(net, target_names(net, suffixes), slices=slices, r=r, **options)
    losses, evals = [], []
    for step in range(steps):
        batches = [[tiny_batch(step, i, j) for j in range(per_slice)] for i in range(slices)]
        if step not in skip:
            losses.append(oracle.step(batches, lr))
        with torch.no_grad():
            evals.append(net(**tiny_batch(999, 0, 0)).loss.item())
    return losses, {n: oracle.parameters[n].detach().clone() for n in oracle.weights}, evals, oracle


def relative(weights, reference):
    """Largest ‖W − W_ref‖ / ‖W_ref‖ over the weights."""
    assert set(weights) == set(reference)
    return max(((weights[n].double() - w).norm() / w.norm()).item() for n, w in reference.items())


LADDER = [(4, 1, 2), (4, 2, 2), (4, 4, 2), (2, 4, 2), (1, 1, 1), (3, 3, 1), (2, 4, 4), (1, 4, 4)]
CASES = [(*case, "factor") for case in LADDER[:6]] + [(*case, "dense") for case in LADDER[:2]]
MORE = [(*case, "factor") for case in LADDER[6:]] + [(*case, "dense") for case in LADDER[2:4]]


@pytest.mark.parametrize(
    ("slices", "world_size", "per_slice", "exchange"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_slices_are_not_ranks(slices, world_size, per_slice, exchange):
    """S = c·K, S = K and K = c·S all give the oracle's W to 1e-6 in fp32, and its norm: the clipping is active.

    By either way through the network; every step on every rank sends the bytes that were predicted (`train_tiny`).
    """
    accumulation = per_slice * slices // world_size
    settings = ds_settings(slices=slices, accumulation=accumulation, clip=0.05, delta={"exchange": exchange})
    losses, reference, _, oracle = oracle_run(slices, per_slice, clip=0.05)
    run = run_ranks(world_size, train_tiny, settings, steps=STEPS, lr=LR)[0]
    assert run["losses"] == pytest.approx(losses, rel=1e-5)
    assert run["steps"][-1].grad_norm == pytest.approx(oracle.norm, rel=1e-4)
    assert relative(run["weights"], reference) < 1e-6


@pytest.mark.parametrize("world_size", [2, 4])
def test_auto_mixes_both_ways(world_size):
    """k_proj and v_proj are 8 × 16, and S·r = 8: dense is fewer bytes there, factors everywhere else."""
    model = {"hidden": 16}
    settings = ds_settings(slices=4, accumulation=8 // world_size)
    losses, reference, evals, _ = oracle_run(4, 2, model=model)
    runs = run_ranks(world_size, train_tiny, settings, steps=STEPS, lr=LR, model=model, eval_between=True, after=kinds)
    for run in runs:
        assert {name for name, kind in run["after"].items() if kind == "dense"} == {"k_proj", "v_proj"}
        assert (run["plan"].factor_targets, run["plan"].dense_targets, run["plan"].buckets) == (10, 4, 2)
        assert run["eval"] == pytest.approx(evals, rel=1e-5)
    assert runs[0]["losses"] == pytest.approx(losses, rel=1e-5)
    assert relative(runs[0]["weights"], reference) < 1e-6


@pytest.mark.parametrize(("exchange", "expected"), [("factor", 3), ("dense", 2), ("auto", 4)])
def test_collectives_do_not_grow_with_the_layers(exchange, expected):
    """One vote, and two collectives per factor bucket, one per dense bucket, for 2 layers as for 8."""
    found = []
    for layers in (2, 8):
        settings = ds_settings(slices=4, accumulation=2, delta={"exchange": exchange})
        run = run_ranks(2, train_tiny, settings, steps=1, model={"hidden": 16, "layers": layers})[0]
        found.append(run["steps"][0].collectives)
    assert found == [expected, expected]


@pytest.mark.parametrize("exchange", ["factor", pytest.param("dense", marks=pytest.mark.slow)])
def test_bf16_on_the_wire(exchange):
    """The whole change of W within half a bf16 unit (2⁻⁸) of the oracle's: roundings are independent, so that their

    norm stays below one rounding's bound, though each step's delta is rounded anew (dense: and its sum).
    """
    settings = ds_settings(slices=4, accumulation=4, delta={"exchange": exchange, "dtype": "bf16"})
    start = {n: w.detach().double() for n, w in tiny_llama().named_parameters()}
    _, reference, _, _ = oracle_run(4, 2)
    run = run_ranks(2, train_tiny, settings, steps=STEPS, lr=LR)[0]
    for name, W in run["weights"].items():
        expected = reference[name] - start[name]
        error = ((W.double() - start[name]) - expected).norm() / expected.norm()
        assert 1e-4 < error < 2**-8, name


VARIANTS = {
    "persistent": {"settings": {"zero": {"stage3_param_persistence_threshold": 100_000}}},
    "checkpointing": {"run": {"checkpointing": True}},
    "checkpointing and persistent": {
        "settings": {"zero": {"stage3_param_persistence_threshold": 500}},
        "run": {"checkpointing": True},
    },
    "offload": {"settings": {"zero": {"offload_param": {"device": "cpu"}}}},
    "no overlap": {"settings": {"zero": {"overlap_comm": False}}},
    "tied": {"model": {"tie": True}},
    "small buckets": {"settings": {"delta": {"bucket_bytes": 1}}},
    "dense, a row at a time": {"settings": {"delta": {"bucket_bytes": 1, "exchange": "dense"}}},
    "dense, first order, lora_alpha": {
        "settings": {"lora_alpha": 6, "delta": {"exchange": "dense", "second_order": False}},
        "oracle": {"scale": 3.0, "second_order": False},
    },
    "dense, offload": {"settings": {"delta": {"exchange": "dense"}, "zero": {"offload_param": {"device": "cpu"}}}},
    "first order": {"settings": {"delta": {"second_order": False}}, "oracle": {"second_order": False}},
    "lora_alpha": {"settings": {"lora_alpha": 6}, "oracle": {"scale": 3.0}},
    "adam": {"settings": {"adam": {"betas": [0.8, 0.9], "eps": 1e-6}}, "oracle": {"betas": (0.8, 0.9), "eps": 1e-6}},
    "all-linear": {"settings": {"target_modules": "all-linear"}},
    "regex": {"settings": {"target_modules": r".*\.(q|v)_proj"}, "suffixes": ["q_proj", "v_proj"]},
    "exclude": {"settings": {"exclude_modules": ["down_proj"]}, "suffixes": SEVEN[:-1]},
    "full svd": {"settings": {"init": {"method": "full"}}},
}


SLOW = ("checkpointing and persistent", "no overlap", "dense, a row at a time", "dense, offload", "full svd")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in VARIANTS])
def test_variants_against_the_oracle(name):
    """Losses, W and the loss of an evaluation between steps, which sees stale gathered copies if there are any."""
    variant = VARIANTS[name]
    settings = ds_settings(slices=2, accumulation=2, **variant.get("settings", {}))
    options = {**variant.get("oracle", {}), "model": variant.get("model")}
    losses, reference, evals, oracle = oracle_run(2, 2, suffixes=variant.get("suffixes", SEVEN), **options)
    run = run_ranks(
        2,
        train_tiny,
        settings,
        steps=STEPS,
        lr=LR,
        model=variant.get("model"),
        eval_between=True,
        **variant.get("run", {}),
    )[0]
    assert run["losses"] == pytest.approx(losses, rel=1e-5)
    assert run["eval"] == pytest.approx(evals, rel=1e-5)
    assert run["steps"][-1].grad_norm == pytest.approx(oracle.norm, rel=1e-4)
    assert relative(run["weights"], reference) < 1e-6


@pytest.mark.parametrize("release", [True, False])
def test_gathered_copies_are_dropped(release):
    """Without DeepSpeed's own step, which drops them as well: with ours W is current, without any it is stale."""
    settings = ds_settings(slices=2, accumulation=2, zero={"stage3_param_persistence_threshold": 100_000})
    _, _, evals, _ = oracle_run(2, 2)
    run = run_ranks(2, train_tiny, settings, steps=STEPS, lr=LR, eval_between=True, only_ours=(release,))[0]
    assert (run["eval"] == pytest.approx(evals, rel=1e-5)) == release


@pytest.mark.parametrize(("slices", "world_size"), [(2, 4), (1, 2), (2, 1)])
def test_shards_that_own_nothing(slices, world_size):
    """9 and 6 elements on four ranks: the last rank owns none of them, others a part of a row."""
    per_slice = max(1, world_size // slices)
    settings = ds_settings(
        slices=slices, accumulation=per_slice * slices // world_size, r=1, target_modules=["first", "second"]
    )
    losses, reference, _, _ = oracle_run(slices, per_slice, r=1, model="narrow", suffixes=["first", "second"])
    run = run_ranks(world_size, train_tiny, settings, steps=STEPS, lr=LR, model="narrow")[0]
    assert run["losses"] == pytest.approx(losses, rel=1e-5)
    assert relative(run["weights"], reference) < 1e-6


def test_rank_pattern_gives_each_module_its_own_rank():
    """r counts per module, and S·r of a small k_proj fits where the default would not."""
    settings = ds_settings(slices=2, r=6, rank_pattern={"k_proj|v_proj": 3, "down_proj": 1})
    run = run_ranks(2, train_tiny, settings, steps=1, after=ranks_of)[0]
    assert run["after"] == {
        "q_proj": 6,
        "k_proj": 3,
        "v_proj": 3,
        "o_proj": 6,
        "gate_proj": 6,
        "up_proj": 6,
        "down_proj": 1,
    }


def test_a_non_finite_gradient_on_one_rank_skips_the_step_on_all():
    """Rank 1's third step is nan: nothing changes anywhere, the moments neither, and it is counted."""
    settings = ds_settings(slices=2, accumulation=1)
    _, reference, evals, _ = oracle_run(2, 1, skip=(2,), steps=5)
    runs = run_ranks(2, train_tiny, settings, steps=5, lr=LR, poison=(1, 2), eval_between=True, after=counts)
    for run in runs:
        assert [r.applied for r in run["steps"]] == [True, True, False, True, True]
        assert run["after"] == (5, 1)
        assert run["eval"] == pytest.approx(evals, rel=1e-5)
    assert relative(runs[0]["weights"], reference) < 1e-6


@pytest.mark.parametrize(
    "absurd", [1e38, float("nan"), *(pytest.param(n, marks=pytest.mark.slow) for n in (float("inf"), 1e30))]
)
def test_a_learning_rate_that_leaves_fp32_skips_the_step(absurd):
    """Before anything is written: W and moments are as if the step had not been, and the reason is told."""
    settings = ds_settings(slices=2, accumulation=1)
    _, reference, evals, _ = oracle_run(2, 1, skip=(2,), steps=5)
    rates = [LR, LR, absurd, LR, LR]
    runs = run_ranks(2, train_tiny, settings, steps=5, lr=rates, eval_between=True, after=counts)
    for run in runs:
        assert [r.applied for r in run["steps"]] == [True, True, False, True, True]
        assert run["steps"][2].refusal.startswith(f"learning rate {absurd:g}: model.layers.0.self_attn.")
        assert [r.refusal for r in run["steps"] if r.applied] == [""] * 4
        assert run["after"] == (5, 1)
        assert run["eval"] == pytest.approx(evals, rel=1e-5)
    assert relative(runs[0]["weights"], reference) < 1e-6


def test_gradients_whose_squares_leave_fp32_skip_the_step():
    """Adam's v would be infinite from then on, and the weights stuck without a word."""
    settings = ds_settings(slices=2, accumulation=1)
    _, reference, _, _ = oracle_run(2, 1, skip=(1,), steps=3)
    run = run_ranks(2, train_tiny, settings, steps=3, lr=LR, poison=(1, 1), poison_with=1e25)[0]
    assert [r.applied for r in run["steps"]] == [True, False, True]
    assert "squares would leave fp32" in run["steps"][1].refusal
    assert relative(run["weights"], reference) < 1e-6


@pytest.mark.parametrize("exchange", ["factor", "dense"])
def test_lost_updates_raise_on_all_ranks(exchange, tmp_path):
    """A nan after the vote, which nothing known produces: W stays finite, and the next vote or the export says so."""
    settings = ds_settings(slices=2, delta={"exchange": exchange})
    for steps in (1, 3):
        folder = str(tmp_path / str(steps)) if steps == 1 else None
        runs = run_ranks(2, lost_weights, settings, steps=steps, step=0, export_to=folder)
        for done, message, _, _ in runs:
            assert done == 1
            assert "weights were not updated" in message
        _, message, before, after = runs[0]
        kept = sum(int((after[n] == w).sum()) for n, w in before.items())
        assert int(message.split()[0]) <= kept
        assert all(w.isfinite().all() for w in after.values())
        assert any((after[n] != w).any() for n, w in before.items())
        assert not list(tmp_path.glob("1/*.safetensors"))


def test_split_master_equals_fp32_master_under_bf16_compute():
    """The remainder format is lossless: same trajectory as a separate fp32 master, bit for bit."""
    model = {"half": True}  # values that were fp16 once: one in sixteen is an exact tie between two bf16 numbers
    runs = [
        run_ranks(2, train_tiny, ds_settings(bf16=True, slices=2, master={"format": f}), model=model, steps=6, lr=LR)[0]
        for f in ("split", "fp32")
    ]
    assert runs[0]["losses"] == runs[1]["losses"]
    assert all(torch.equal(runs[0]["weights"][n], w) for n, w in runs[1]["weights"].items())


BF16_VARIANTS = {
    "offload": ({"zero": {"offload_param": {"device": "cpu"}}}, {}),
    "master on cpu": ({"master": {"device": "cpu"}}, {}),
    "fp32 master, offload": ({"master": {"format": "fp32"}, "zero": {"offload_param": {"device": "cpu"}}}, {}),
    "persistent": ({"zero": {"stage3_param_persistence_threshold": 100_000}}, {}),
    "checkpointing": ({}, {"checkpointing": True}),
    "staged": ({}, {"staged": True}),
    "fp32 master, staged": ({"master": {"format": "fp32"}}, {"staged": True}),
    "optimizer offload": ({"zero": {"offload_optimizer": {"device": "cpu"}}}, {}),
}


@pytest.fixture(scope="module")
def plain_bf16():
    return run_ranks(2, train_tiny, ds_settings(bf16=True, slices=2), steps=STEPS, lr=LR)[0]


@pytest.mark.parametrize("name", BF16_VARIANTS)
def test_bf16_variants_change_no_bit(name, plain_bf16):
    """Where shards and masters lie, and what is recomputed, is no matter of numerics."""
    settings, more = BF16_VARIANTS[name]
    run = run_ranks(2, train_tiny, ds_settings(bf16=True, slices=2, **settings), steps=STEPS, lr=LR, **more)[0]
    assert run["losses"] == plain_bf16["losses"]
    assert all(torch.equal(run["weights"][n], w) for n, w in plain_bf16["weights"].items())


def test_bf16_compute_starts_from_the_exact_fp32_values():
    """A model that is whole on every rank is not rounded before its fp32 shard is taken."""
    run = run_ranks(2, train_tiny, ds_settings(bf16=True, slices=2), steps=1, lr=0.0)[0]
    net = tiny_llama()
    assert all(torch.equal(w, net.get_parameter(n).detach()) for n, w in run["weights"].items())


@pytest.mark.slow
def test_precision_of_the_master():
    """50 steps at lr 2e-5 under bf16 compute: W moves by the sum of the deltas; a bf16-only W does not.

    fp32 rounds each of the 50 subtractions by at most 2⁻²⁴ of |w|, up or down, so that errors add up to no more than
    √50 · 2⁻²⁴ ≈ 4e-7 of ‖W‖; no format without compensation can be nearer to the sum of the deltas.
    """
    settings = ds_settings(bf16=True, slices=2, accumulation=2)
    (exact,) = run_ranks(1, losses_in_shards, settings, steps=50, lr=2e-5)
    (control,) = run_ranks(1, losses_in_shards, settings, steps=50, lr=2e-5, bf16_only=True)
    for moved, deltas, start in exact.values():
        assert (moved - deltas).norm() <= 50**0.5 * 2**-24 * start.norm()
        assert (moved - deltas).norm() <= 1e-3 * deltas.norm()
    for moved, deltas, _ in control.values():
        assert (moved - deltas).norm() > 0.5 * deltas.norm()


def test_one_step_has_rank_two_r_s():
    """S = 8, r = 16: 256 singular values of ΔW, and then nothing but fp32 rounding."""
    model = {"hidden": 320, "layers": 1, "intermediate_size": 300, "num_key_value_heads": 2}
    settings = ds_settings(slices=8, r=16, accumulation=4)
    change = run_ranks(2, one_step_change, settings, model)[0]
    assert len(change) == 7
    for name, delta in change.items():
        sigma = torch.linalg.svdvals(delta)
        assert sigma[255] > 100 * sigma[256], name
        assert sigma[256] < 1e-3 * sigma[0], name


@pytest.mark.parametrize(("bf16", "world_size", "slices"), [(True, 2, 2), (True, 2, 4), (True, 4, 2), (False, 2, 2)])
def test_memory_of_weights_and_state(bf16, world_size, slices):
    """Every live tensor of a rank: 4 bytes per target weight, 2 (fp32 compute: 4) per other, factors, moments."""
    model = {"hidden": 128, "layers": 2, "intermediate_size": 256, "vocab_size": 1024}
    settings = ds_settings(bf16=bf16, slices=slices, r=8, accumulation=max(1, slices // world_size))
    for found, parts in run_ranks(world_size, measure_memory, settings, model):
        weights = found["target weights"] + found["other weights"]
        assert parts["weights"] + parts["master"] == pytest.approx(weights, rel=0.01)
        assert found["measured"] == pytest.approx(found["expected"], rel=0.05)


def test_reentrant_checkpointing_is_refused():
    """It would leave all layers gathered and give no factor gradients, in silence."""
    message = run_ranks(1, raises, ConfigError, ds_settings(slices=1), reentrant=True)[0]
    assert "use_reentrant" in message


def test_a_target_without_gradient_is_an_error():
    """Excluded from the loss, it would silently keep its old value for the whole run."""
    message = run_ranks(2, raises, RuntimeError, ds_settings(slices=2), detach=True)[0]
    assert "14 of 14" in message


def test_backward_past_the_boundary_is_an_error():
    message = run_ranks(1, raises, RuntimeError, ds_settings(slices=1), micro=2)[0]
    assert "step()" in message
