"""The plan's closed forms: against tables and sums worked out by hand, and what must follow from what."""

from __future__ import annotations

import dataclasses

import pytest
from plan_runs import SHAPES, write_configs

from hdpissa.engine.config.section import HDPissaConfig
from hdpissa.engine.errors import ConfigError
from hdpissa.launch.planning import advice as plan_advice
from hdpissa.launch.planning import exchange as plan_exchange
from hdpissa.launch.planning import hardware as plan_hardware
from hdpissa.launch.planning import memory as plan_memory
from hdpissa.launch.planning import model as plan_model
from hdpissa.launch.planning import step as plan_step
from hdpissa.launch.planning.gathers import Policy
from hdpissa.launch.planning.hardware import GPUS, Cluster
from hdpissa.launch.planning.objective import Objective
from hdpissa.launch.planning.run import Batch, Placement, Run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of config.json files, by name of the model."""
    return write_configs(tmp_path_factory.mktemp("configs"))


@pytest.fixture(scope="module")
def models(folder):
    """Each model on the meta device, built once."""
    built = {}

    def get(name: str) -> plan_model.Model:
        if name not in built:
            config = plan_model.read_config(str(folder / f"{name}.json"), False)
            built[name] = plan_model.build(config, name, trust_remote_code=False, bf16=True)
        return built[name]

    return get


def make_run(model, gpu="H100", gpus=8, *, rows=1, length=2048, steps=8, checkpointing=False, **section) -> Run:
    cluster = Cluster(GPUS[gpu], gpus, 8)
    batch = Batch(rows, length, steps, checkpointing)
    placement = Placement(2, False, "split", False)
    hidden = model.hidden
    policy = Policy(prefetch_bucket_size=int(0.9 * hidden * hidden), param_persistence_threshold=10 * hidden)
    return Run(model, HDPissaConfig(**section), cluster, batch, placement, policy)


# --- closed forms against tables ---------------------------------------------------------------------------------


# G parameters in targets, in all; FLOP per token of the targets forward, attention f + b (S = 2048), head f + d
T1 = {
    "SmolLM2-135M": (0.106, 0.135, 212e6, 248e6, 113e6),
    "Qwen2.5-0.5B": (0.358, 0.494, 716e6, 308e6, 545e6),
    "Qwen2.5-7B": (6.53, 7.62, 13.1e9, 1.44e9, 2.18e9),
    "Llama-2-7B": (6.48, 6.74, 13.0e9, 1.88e9, 524e6),
    "Llama-3-70B": (68.5, 70.6, 137e9, 9.4e9, 4.2e9),
}
# µs per 1000 tokens of the floor on H100 and H200 at S = 2048, and what grouped and one-pass products add, %
T2 = {
    "SmolLM2-135M": (1830, 1577, 12.8, 10.4),
    "Qwen2.5-0.5B": (4436, 3969, 10.0, 7.8),
    "Qwen2.5-7B": (43630, 41813, 4.7, 3.4),
    "Llama-2-7B": (42204, 40278, 4.5, 3.3),
    "Llama-3-70B": (394203, 385012, 2.6, 1.8),
}


@pytest.mark.parametrize("name", SHAPES)
def test_counts(models, name):
    run = make_run(models(name))
    found = (
        sum(t.rows * t.cols for t in run.targets) / 1e9,
        run.model.parameters / 1e9,
        run.work.forward,
        3.5 * run.work.attention,
        2 * run.work.head,
    )
    assert found == pytest.approx(T1[name], rel=6e-3)  # three digits, where a table has them


@pytest.mark.parametrize("name", SHAPES)
def test_floor_and_low_rank(models, name):
    for gpu, floor, overhead in zip(("H100", "H200"), T2[name][:2], T2[name][2:], strict=True):
        step = plan_step.step(make_run(models(name), gpu))
        assert 1e9 * step.floor / step.tokens == pytest.approx(floor, rel=1e-6, abs=0.51)
        assert 100 * step.low_rank / step.floor == pytest.approx(overhead, abs=0.051)


def test_floor_with_recompute(models):
    """16,384 tokens per GPU of the 70B model on H100: the forward, and a third of the element-wise work, once more."""
    step = plan_step.step(make_run(models("Llama-3-70B"), checkpointing=True))
    assert step.floor == pytest.approx(9.52, rel=1e-3)


# K: gather f + b of the targets GB, factor exchange GB and ms, dense bf16 GB and ms, apply ms (H100)
T3 = {
    ("SmolLM2-135M", 2): (0.212, 0.0146, 0.0324, 0.106, 0.236, 0.142),
    ("SmolLM2-135M", 8): (0.372, 0.0758, 0.168, 0.186, 0.413, 0.0354),
    ("Qwen2.5-0.5B", 8): (1.25, 0.127, 0.283, 0.626, 1.39, 0.119),
    ("Qwen2.5-7B", 8): (22.8, 0.585, 1.30, 11.4, 25.4, 2.18),
    ("Qwen2.5-7B", 16): (24.5, 1.17, 4.39, 12.2, 30.6, 1.09),
    ("Llama-2-7B", 2): (13.0, 0.116, 0.259, 6.48, 14.4, 8.63),
    ("Llama-2-7B", 8): (22.7, 0.586, 1.30, 11.3, 25.2, 2.16),
    ("Llama-2-7B", 64): (25.5, 4.68, 13.2, 12.7, 31.9, 1.05),
    ("Llama-2-7B", 256): (25.8, 18.7, 48.2, 12.9, 32.3, 1.05),
    ("Llama-3-70B", 8): (240, 3.17, 7.03, 120, 266, 22.8),
    ("Llama-3-70B", 64): (270, 25.5, 71.2, 135, 337, 11.1),
}


TF32 = GPUS["H100"].bf16 / 2


@pytest.mark.parametrize(("name", "gpus"), T3, ids=lambda value: str(value))
def test_exchange_and_apply(models, name, gpus):
    run = make_run(models(name), gpus=gpus, delta={"exchange": "factor"})
    factor = [plan_exchange.factor(t, run.plan, run.cluster, 4).times(n) for t, n in run.shapes]
    dense = [plan_exchange.dense(t, run.plan, run.cluster, 2).times(n) for t, n in run.shapes]
    numel = sum(t.rows * t.cols for t in run.targets)
    found = (
        4 * numel * (gpus - 1) / gpus / 1e9,
        sum(t.sent for t in factor) / 1e9,
        1e3 * sum(t.seconds for t in factor),
        sum(t.sent for t in dense) / 1e9,
        1e3 * sum(t.seconds for t in dense),
        1e3 * plan_step.apply_seconds(run, TF32),
    )
    assert found == pytest.approx(T3[name, gpus], rel=6e-3)


def test_best_exchange_per_weight(models):
    """256 ranks: with dense in bf16 and factors in fp32, both together beat either."""
    run = make_run(models("Llama-2-7B"), gpus=256)
    ways = [(plan_exchange.factor(t, run.plan, run.cluster, 4), plan_exchange.dense(t, run.plan, run.cluster, 2))
            for t, _ in run.shapes]  # fmt: skip
    best = sum(n * min(f.seconds, d.seconds) for (f, d), (_, n) in zip(ways, run.shapes, strict=True))
    assert 1e3 * best == pytest.approx(29.5, rel=3e-3)


def test_kinds_are_the_engines(models):
    """Where S·r reaches min(rows, cols) the engine sends wide weights dense, and the plan counts them so."""
    run = make_run(models("SmolLM2-135M"), gpus=8, slices=8, r=24)
    kinds = {t.name.rsplit(".")[-1]: t.kind for t in run.targets}
    assert kinds["k_proj"] == "dense"
    assert kinds["up_proj"] == "factor"
    wire = plan_step.step(run).wire
    assert wire["factor exchange"] > 0 < wire["dense reduce-scatter"]
    factors = plan_memory.memory(run).persistent["A of all slices"]
    assert (
        factors
        < plan_memory.memory(make_run(run.model, r=24, delta={"exchange": "factor"})).persistent["A of all slices"]
    )


# name, gpu, K: floor ms, floor + unfused products + exchange + apply ms, tokens per GPU 16,384; both as printed
T6 = {
    ("SmolLM2-135M", "H100", 8): (30.0, 36.8),
    ("Qwen2.5-0.5B", "H100", 8): (72.7, 85.1),
    ("Qwen2.5-7B", "H200", 8): (685, 726),
    ("Llama-2-7B", "H100", 1): (691, 763),
    ("Llama-2-7B", "H100", 8): (691, 750),
    ("Llama-2-7B", "H100", 64): (691, 760),
}


@pytest.mark.parametrize(("name", "gpu", "gpus"), T6, ids=lambda value: str(value))
def test_perfect_step(models, name, gpu, gpus):
    run = make_run(models(name), gpu, gpus)
    step = plan_step.step(run)
    unfused = step.tokens * 4 * sum(t.rows + t.cols for t in run.targets) / run.cluster.gpu.hbm
    total = step.floor + unfused + step.exchange + plan_step.apply_seconds(run, TF32)
    assert (1e3 * step.floor, 1e3 * total) == pytest.approx(T6[name, gpu, gpus], rel=2e-3)


def test_mfu(models):
    """64 % for Llama-2-7B in 721 ms: forward, input gradient, attention without recompute, head, over 989 TFLOP/s."""
    step = plan_step.step(make_run(models("Llama-2-7B")))
    assert step.useful_flops / (0.721 * step.peak) == pytest.approx(0.64, abs=0.005)


# GB per GPU: 4 bytes for every weight and 16 per element of the own factors, A of all slices in fp32
T7 = {
    ("SmolLM2-135M", 8): (0.15, 0.08),
    ("Qwen2.5-7B", 8): (4.45, 0.58),
    ("Llama-2-7B", 1): (27.59, 0.07),
    ("Llama-2-7B", 64): (1.06, 4.66),
    ("Llama-3-70B", 8): (38.59, 3.19),
}


@pytest.mark.parametrize(("name", "gpus"), T7, ids=lambda value: str(value))
def test_weights_and_state(models, name, gpus):
    """The table counts 4 bytes for weights outside of the targets, too, and the own A twice; no B rows, no sums."""
    run = make_run(models(name), gpus=gpus)
    found = plan_memory.memory(run).persistent
    own_A = 4 * sum(t.r * t.cols for t in run.targets)
    counted = sum(found.values()) - found["A of all slices"] - found["B rows of all slices"]
    counted += own_A + found["other weights"] - found["slice state"] // 4
    assert (counted / 1e9, found["A of all slices"] / 1e9) == pytest.approx(T7[name, gpus], abs=0.0051)


def test_by_hand(models):
    """One weight of 4096 x 11008 on 8 ranks of one node, S = 8, r = 16, worked out with a pencil."""
    run = make_run(models("Llama-2-7B"))
    target = next(t for t in run.targets if t.name.endswith("0.mlp.down_proj"))
    assert (target.rows, target.cols) == (4096, 11008)
    factor = plan_exchange.factor(target, run.plan, run.cluster, 4)
    assert factor.sent == 7 * 16 * 11008 * 4 + 16 * 4 * (4096 - 512)
    assert plan_exchange.dense(target, run.plan, run.cluster, 2).sent == 7 * 4096 * 11008 // 8 * 2
    assert plan_exchange.vote(run.plan, run.cluster).sent == 2 * 7 * 56 // 8  # seven numbers
    halved = dataclasses.replace(run, section=HDPissaConfig(slices=4))
    shared = plan_exchange.shared_slices(halved.shapes, halved.plan, halved.cluster)
    assert shared.sent == 4 * sum(16 * (t.rows + t.cols) for t in halved.targets)  # 2 (c - 1) / c with c = 2
    doubled = dataclasses.replace(run, section=HDPissaConfig(slices=16))
    held = plan_memory.memory(doubled).persistent
    assert held["slice state"] == 16 * 2 * sum(16 * (t.rows + t.cols) for t in run.targets)


def test_trainers_by_hand(models):
    """Llama-3-70B (8192 wide, 8 of 64 heads for keys, 80 layers, 128256 words) on 8 ranks, worked out with a pencil."""
    model = models("Llama-3-70B")
    sft = make_run(model, length=512, checkpointing=True)
    parameters, tokens = model.parameters, 2 * 512
    pairs = dataclasses.replace(sft.with_batch(sequences=2), objective=Objective("dpo", chunked=True, reference=True))
    found = plan_memory.memory(pairs)
    assert found.persistent["reference shards"] == 2 * parameters // 8
    assert found.persistent["A of all slices"] == plan_memory.memory(sft).persistent["A of all slices"]
    twice = 2 * plan_memory.memory(sft).computing["activations"]  # rotary tables do not depend on the rows
    assert found.computing["activations"] == pytest.approx(twice, rel=1e-3)
    assert found.computing["logits and loss"] == 2 * 1024 * 32768 + tokens * (8 * 8192 + 28)
    assert plan_memory.memory(sft).computing["logits and loss"] == 12 * 512 * 128256
    step = plan_step.step(pairs)
    assert step.wire[plan_step.PASS_GATHERS] == 8 * 2 * pairs.reference_gathers.gathered * 7 // 8
    assert step.products - plan_step.step(pairs.with_objective(reference=False)).products == pytest.approx(
        step.tokens * (pairs.work.forward + pairs.work.head + pairs.work.attention) / GPUS["H100"].bf16
    )
    grpo = dataclasses.replace(sft, objective=Objective("grpo", chunked=True))
    assert plan_memory.memory(grpo).generating == {
        "gathered weights": 2 * parameters, "key-value cache": 2 * 2 * 80 * 8 * 128 * 512 * 8,
    }  # fmt: skip
    assert plan_memory.memory(grpo).busiest == "generating"
    by_layer = plan_memory.memory(grpo.with_objective(gathers_to_generate=False)).generating["gathered weights"]
    assert by_layer == 2 * grpo.forward_gathers.peak < parameters // 10


# --- properties --------------------------------------------------------------------------------------------------


def peak(run: Run) -> int:
    return plan_memory.memory(run).peak


def test_memory_moves_the_right_way(models):
    model = models("SmolLM2-135M")
    base = make_run(model, rows=4)
    assert peak(base.with_batch(rows=8)) > peak(base) > peak(base.with_batch(rows=1))
    assert peak(base.with_batch(length=4096)) > peak(base)
    assert peak(base.with_batch(checkpointing=True)) < peak(base)
    assert peak(base.with_offload()) < peak(base)
    assert peak(base.with_batch(accumulation=16)) == peak(base)
    assert peak(make_run(model, rows=4, r=8)) < peak(base)
    peaks = [peak(base.with_gpus(gpus, 8)) for gpus in (8, 16, 64, 1024)]
    assert peaks == sorted(peaks, reverse=True)


def test_offload_moves_weights_to_the_host(models):
    run = make_run(models("SmolLM2-135M"))
    on_gpu, on_host = plan_memory.memory(run), plan_memory.memory(run.with_offload())
    weights = {"bf16 shards", "fp32 remainder", "other weights"}
    assert {name: on_gpu.persistent[name] for name in weights} == {name: on_host.host[name] for name in weights}
    assert not weights & on_host.persistent.keys()
    assert plan_step.step(run).host_bytes == 0 < plan_step.step(run.with_offload()).host_bytes


def with_hpz(run: Run, ranks: int) -> Run:
    return dataclasses.replace(run, placement=dataclasses.replace(run.placement, hpz=ranks))


def test_second_copy_by_hand(models):
    """hpZ of 8 on two nodes: an eighth of W in bf16 on every GPU; only the targets' first gather is on the network."""
    plain = make_run(models("Llama-2-7B"), gpus=16, steps=2)
    run = with_hpz(plain, 8)
    more = peak(run) - peak(plain)
    assert plan_memory.memory(run).persistent["second copy (hpZ)"] == 2 * 6_738_415_616 // 8
    assert more == pytest.approx(1.05 * 2 * 6_738_415_616 / 8, rel=1e-6)  # with its share of the reserve
    step, before = plan_step.step(run), plan_step.step(plain)
    targets = sum(t.rows * t.cols for t in run.targets)
    assert step.wire["ZeRO-3 gathers"] == 2 * targets * 15 // 16
    rest = 2 * 2 * run.gathers.gathered - 2 * targets
    assert step.wire["gathers of second copies (hpZ)"] == rest * 7 // 8
    assert step.link == pytest.approx(2 * targets * 15 / 16 / 400e9 + rest * 7 / 8 / 450e9, rel=1e-6)
    assert step.link < before.link
    assert plan_step.step(with_hpz(make_run(models("Llama-2-7B"), gpus=1), 8)).link == 0


def test_second_copy_lies_where_the_shards_do(models):
    run = with_hpz(make_run(models("SmolLM2-135M"), gpus=16, slices=8), 8)
    memory, kept = plan_memory.memory(run.with_offload()), plan_memory.memory(run).persistent["second copy (hpZ)"]
    assert memory.host["second copy (hpZ)"] == kept
    assert "second copy (hpZ)" not in memory.persistent
    assert (
        plan_step.step(run.with_offload()).host_bytes
        > plan_step.step(run.without_second_copy().with_offload()).host_bytes
    )


def test_second_copy_that_does_not_fit(models):
    """The advice drops it before it takes more GPUs; groups that do not divide the ranks are refused."""
    run = with_hpz(make_run(models("Llama-3-70B"), gpus=16, rows=1, checkpointing=True), 2)
    assert not plan_advice.fits(run)
    assert plan_advice.cheapest_change(run, file="my.json") == "zero_optimization.zero_hpz_partition_size 1 in my.json"
    with pytest.raises(ConfigError, match="zero_hpz_partition_size"):
        assert with_hpz(run, 3).plan


def test_time_moves_the_right_way(models):
    base = make_run(models("Llama-2-7B"), rows=4, steps=2)
    step = plan_step.step(base)
    recomputed = plan_step.step(base.with_batch(checkpointing=True))
    assert step.predicted < recomputed.predicted < 1.5 * step.predicted
    assert step.bound < step.predicted
    assert step.floor < step.bound
    faster = plan_step.step(make_run(models("Llama-2-7B"), "H200", rows=4, steps=2))
    assert faster.predicted < step.predicted
    longer = plan_step.step(base.with_batch(accumulation=8))
    assert longer.tokens_per_second > step.tokens_per_second  # the update is paid less often


@pytest.mark.parametrize(
    ("name", "changes", "offload", "what"),
    [
        ("Llama-2-7B", {}, False, "compute"),
        ("SmolLM2-135M", {"length": 512, "rows": 1}, False, "kernel launches"),
        ("SmolLM2-135M", {"rows": 32}, False, "HBM"),
        ("Llama-2-7B", {"length": 512, "rows": 2}, False, "NVLink"),
        ("Llama-2-7B", {"length": 512, "rows": 1, "gpus": 64, "slices": 8}, False, "network"),
        ("Llama-2-7B", {"length": 512, "rows": 2, "gpus": 1}, True, "host link"),
        ("Llama-2-7B", {"steps": 1, "length": 512, "rows": 2, "gpus": 1}, True, "host link (update)"),
    ],
)
def test_what_binds(models, name, changes, offload, what):
    run = make_run(models(name), **changes)
    assert plan_step.step(run.with_offload() if offload else run).binds == what


def test_fits_or_not(models):
    """70B with the split master and checkpointing: on 8 x 80 GB, but on 4 only with the weights in host memory."""
    eight = make_run(models("Llama-3-70B"), rows=1, checkpointing=True)
    four = eight.with_gpus(4, 4)
    assert plan_advice.fits(eight)
    assert not plan_advice.fits(four)
    assert plan_advice.fits(four.with_offload())
    fp32_master = dataclasses.replace(eight.with_gpus(4, 4), placement=Placement(2, False, "fp32", False))
    assert peak(fp32_master) > peak(four)


def test_advice_is_the_cheapest_that_fits(models):
    """In the order checkpointing, smaller micro-batch, offload, more GPUs; and what it says does fit."""
    model = models("Llama-3-70B")
    assert plan_advice.cheapest_change(make_run(model, rows=1)) == "--gradient_checkpointing"
    wide = make_run(models("Llama-2-7B"), "RTX-4090", rows=16, steps=1, checkpointing=True)
    assert plan_advice.cheapest_change(wide) == "--per_device_train_batch_size 8 --gradient_accumulation_steps 2"
    assert plan_advice.fits(wide.with_batch(rows=8))
    assert not plan_advice.fits(wide)
    four = make_run(model, gpus=4, rows=1, checkpointing=True)
    assert plan_advice.cheapest_change(four) == "--offload_param"
    offloaded = "zero_optimization.offload_param.device"
    assert (
        plan_advice.cheapest_change(four, file="my.json") == f"--offload_param (and the same in my.json: {offloaded})"
    )
    dpo = dataclasses.replace(make_run(model, rows=1, checkpointing=True), objective=Objective("dpo", True, True))
    full = dataclasses.replace(GPUS["H100"], memory=peak(dpo) - 1)
    assert plan_advice.cheapest_change(dataclasses.replace(dpo, cluster=Cluster(full, 8, 8))) == (
        "--precompute_ref_log_probs"
    )
    grpo = dataclasses.replace(make_run(model, rows=1, checkpointing=True), objective=Objective("grpo", True))
    assert plan_advice.cheapest_change(grpo) == "--ds3_gather_for_generation false"
    small = dataclasses.replace(GPUS["A100-40"], memory=2 * plan_hardware.GIB)
    hopeless = dataclasses.replace(make_run(models("SmolLM2-135M"), rows=1), cluster=Cluster(small, 8, 8))
    assert plan_advice.cheapest_change(hopeless).startswith("no change")
